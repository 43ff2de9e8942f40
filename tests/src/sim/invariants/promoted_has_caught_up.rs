//! Whoever begins to vote is about as far as the leader that promoted it: a group that counts on an empty replica has less to
//! lose than it believes.

use std::collections::BTreeMap;

use flowstone_protocol::{RaftIndex, ReplicaId, TopicPartition};

use super::super::machine::Listener;
use super::{Held, Invariant, Sight};

/// Entries that come while the change is under way.
const UNDER_WAY_MAX: u64 = 600;
/// As many more may a replica lack that counts as in sync, and is being sent what it lacks.
const IN_SYNC_MAX: u64 = 4_096;

#[derive(Debug, Default)]
pub(super) struct PromotedHasCaughtUp {
    /// The last entry of each replica, as it was last seen.
    last: BTreeMap<Listener, RaftIndex>,
    voters: BTreeMap<TopicPartition, (u64, Vec<ReplicaId>)>,
}

impl Invariant for PromotedHasCaughtUp {
    fn replica(&mut self, sight: &Sight<'_>) -> Held {
        let Sight { who, replica, .. } = *sight;
        self.last.insert(who, replica.log().last_index());
        if !sight.leads() {
            return Ok(());
        }
        let voters = &replica.membership().voters;
        let applied = replica.applied().get();
        let (known_at, known) = self.voters.entry(who.tp).or_insert_with(|| (applied, voters.clone()));
        if applied < *known_at || known == voters {
            return Ok(());
        }
        let new: Vec<ReplicaId> = voters.iter().copied().filter(|voter| !known.contains(voter)).collect();
        (*known_at, *known) = (applied, voters.clone());
        for promoted in new {
            let last = self.last.get(&Listener { tp: who.tp, replica: promoted }).copied();
            // One that nobody saw running has nothing, or is being copied.
            let lacks_max = if last.is_some() { IN_SYNC_MAX + UNDER_WAY_MAX } else { UNDER_WAY_MAX };
            let last = last.unwrap_or_default();
            if last.get() + lacks_max < applied {
                return Err(format!(
                    "{}: replica {promoted} votes from entry {applied} on, and its log ends at {last}",
                    who.tp
                ));
            }
        }
        Ok(())
    }
}
