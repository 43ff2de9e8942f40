//! What a client is told to be with a quorum is committed when it is told so.

use std::collections::BTreeMap;

use flowstone_protocol::{Offset, TopicPartition};

use super::super::machine::{Heard, Listener};
use super::{Cut, Held, Invariant};

#[derive(Debug, Default)]
pub(super) struct AcknowledgedIsCommitted {
    committed: BTreeMap<TopicPartition, Offset>,
}

impl Invariant for AcknowledgedIsCommitted {
    fn heard(&mut self, who: Listener, what: &Heard) -> Held {
        if let Heard::Committed(entry) = what {
            let end = self.committed.entry(who.tp).or_default();
            *end = (*end).max(entry.next_offset());
        }
        Ok(())
    }

    fn recovered(&mut self, tp: TopicPartition, cut: Cut) {
        let end = self.committed.entry(tp).or_default();
        *end = (*end).min(cut.offset);
    }

    fn acknowledged(&mut self, tp: TopicPartition, next: Offset) -> Held {
        let committed = self.committed.get(&tp).copied().unwrap_or_default();
        if next <= committed {
            return Ok(());
        }
        Err(format!("{tp}: a client was told that all before offset {next} is with a quorum; committed is {committed}"))
    }
}
