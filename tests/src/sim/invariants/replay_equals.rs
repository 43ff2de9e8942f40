//! The state of a machine follows from its log: after one index it is the same on every replica, and the same again after
//! every replay.

use std::collections::BTreeMap;

use bytes::Bytes;
use flowstone_protocol::{RaftIndex, TopicPartition};

use super::super::machine::{Heard, Listener};
use super::{Held, Invariant};

#[derive(Debug, Default)]
pub(super) struct ReplayEquals {
    states: BTreeMap<(TopicPartition, RaftIndex), Bytes>,
}

impl Invariant for ReplayEquals {
    fn heard(&mut self, who: Listener, what: &Heard) -> Held {
        let Heard::State { index, state } = what else { return Ok(()) };
        let known = self.states.entry((who.tp, *index)).or_insert_with(|| state.clone());
        if known == state {
            return Ok(());
        }
        Err(format!(
            "{}: after entry {index} the state of replica {} is not what another's was: {known:?}, {state:?}",
            who.tp, who.replica
        ))
    }
}
