//! Two logs that agree on one entry's index and term agree on all before it: so an entry of one index and term has one
//! content and one predecessor, whoever sends it.

use std::collections::BTreeMap;

use flowstone_protocol::{BatchHeader, TopicPartition};
use flowstone_replication::{PeerBody, PeerMessage};
use flowstone_storage::{EntryBody, LogEntry};

use super::super::random::mix;
use super::{Held, Invariant};

#[derive(Debug, Default)]
pub(super) struct LogMatching {
    /// By index and term: the predecessor's term, and the content.
    entries: BTreeMap<(TopicPartition, u64, u64), (u64, u64)>,
}

/// The same on every replica: nothing in it that an append stamps.
fn content(entry: &LogEntry) -> u64 {
    match &entry.body {
        EntryBody::Batch(batch) => BatchHeader::parse(batch)
            .map_or(0, |header| mix(u64::from(header.crc) ^ (header.total_bytes() as u64).rotate_left(32))),
        EntryBody::Control { ctype, payload } => payload
            .iter()
            .fold(u64::from(ctype.id() as u16), |hash, &byte| mix(hash.wrapping_mul(31) ^ u64::from(byte))),
    }
}

impl Invariant for LogMatching {
    fn sent(&mut self, tp: TopicPartition, message: &PeerMessage) -> Held {
        let PeerBody::Append { previous_index, previous_term, entries, .. } = &message.body else { return Ok(()) };
        let (mut index, mut term) = (previous_index.get(), previous_term.get());
        for entry in entries {
            if entry.index.get() != index + 1 || entry.term.get() < term {
                return Err(format!(
                    "{tp}: replica {} sends entry {} of term {} behind entry {index} of term {term}",
                    message.from, entry.index, entry.term
                ));
            }
            let is = (term, content(entry));
            (index, term) = (entry.index.get(), entry.term.get());
            let was = *self.entries.entry((tp, index, term)).or_insert(is);
            if was != is {
                return Err(format!(
                    "{tp}: entry {index} of term {term}, as replica {} sends it, was another one before: (previous term, \
                     content) {was:?}, now {is:?}",
                    message.from
                ));
            }
        }
        Ok(())
    }
}
