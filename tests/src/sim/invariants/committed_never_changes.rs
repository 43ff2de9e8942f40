//! What is committed at an index is the same entry for ever, on every replica, at the same offset.

use std::collections::BTreeMap;

use flowstone_protocol::{RaftIndex, TopicPartition};

use super::super::machine::{CommittedEntry, Heard, Listener};
use super::{Held, Invariant};

#[derive(Debug, Default)]
pub(super) struct CommittedNeverChanges {
    entries: BTreeMap<(TopicPartition, RaftIndex), CommittedEntry>,
}

impl Invariant for CommittedNeverChanges {
    fn heard(&mut self, who: Listener, what: &Heard) -> Held {
        let Heard::Committed(entry) = what else { return Ok(()) };
        let known = *self.entries.entry((who.tp, entry.index)).or_insert(*entry);
        if known != *entry {
            return Err(format!("{}: committed was {known:?}, and replica {} commits {entry:?}", who.tp, who.replica));
        }
        let before =
            entry.index.get().checked_sub(1).and_then(|index| self.entries.get(&(who.tp, RaftIndex::new(index))));
        match before {
            Some(before) if before.next_offset != entry.base_offset || before.term > entry.term => {
                Err(format!("{}: {entry:?} does not follow {before:?}", who.tp))
            }
            _ => Ok(()),
        }
    }
}
