//! In one term a replica gives its vote to one candidate, whatever crashes lie between.

use std::collections::BTreeMap;

use flowstone_protocol::{ReplicaId, Term, TopicPartition};
use flowstone_replication::{PeerBody, PeerMessage};

use super::{Held, Invariant};

#[derive(Debug, Default)]
pub(super) struct VotesAreKept {
    votes: BTreeMap<(TopicPartition, ReplicaId, Term), ReplicaId>,
}

impl Invariant for VotesAreKept {
    fn sent(&mut self, tp: TopicPartition, message: &PeerMessage) -> Held {
        let candidate = match message.body {
            PeerBody::Vote { pre: false, .. } => message.from,
            PeerBody::VoteResponse { pre: false, reject: false, .. } => message.to,
            _ => return Ok(()),
        };
        let first = *self.votes.entry((tp, message.from, message.term)).or_insert(candidate);
        if first == candidate {
            return Ok(());
        }
        Err(format!(
            "{tp}: in term {} replica {} votes for {first}, and then for {candidate}",
            message.term, message.from
        ))
    }
}
