//! What is committed at an index is the same entry for ever, on every replica, at the same offset.

use std::collections::BTreeMap;

use flowstone_protocol::{Offset, Term, TopicPartition};

use super::super::machine::{CommittedEntry, Heard, Listener};
use super::{Cut, Held, Invariant};

/// What identifies an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    term: Term,
    base_offset: Offset,
    next_offset: Offset,
    crc: u32,
}

impl Identity {
    fn of(entry: &CommittedEntry) -> Self {
        let (term, base_offset) = (entry.term, entry.base_offset);
        Self { term, base_offset, next_offset: entry.next_offset(), crc: entry.header.crc }
    }
}

#[derive(Debug, Default)]
pub(super) struct CommittedNeverChanges {
    /// By index; nothing where no entry was seen.
    entries: BTreeMap<TopicPartition, Vec<Option<Identity>>>,
}

impl Invariant for CommittedNeverChanges {
    fn heard(&mut self, who: Listener, what: &Heard) -> Held {
        let Heard::Committed(entry) = what else { return Ok(()) };
        let entries = self.entries.entry(who.tp).or_default();
        let (index, is) = (entry.index.get() as usize, Identity::of(entry));
        if entries.len() <= index {
            entries.resize(index + 1, None);
        }
        let known = *entries[index].get_or_insert(is);
        if known != is {
            return Err(format!("{}: entry {index} was {known:?}, and replica {} commits {is:?}", who.tp, who.replica));
        }
        match index.checked_sub(1).and_then(|before| entries[before]) {
            Some(before) if before.next_offset != is.base_offset || before.term > is.term => {
                Err(format!("{}: entry {index}, {is:?}, does not follow {before:?}", who.tp))
            }
            _ => Ok(()),
        }
    }

    fn recovered(&mut self, tp: TopicPartition, cut: Cut) {
        self.entries.entry(tp).or_default().truncate(cut.index as usize + 1);
    }
}
