//! When an entry is committed for the first time, a majority of the voters has it on its disk, flushed.

use std::collections::BTreeMap;

use flowstone_protocol::{RaftIndex, ReplicaId, Term, TopicPartition};
use flowstone_storage::EpochStart;
use flowstone_storage::checkpoint::CREATION_INDEX;

use super::super::machine::Listener;
use super::{Cut, Held, Invariant, Sight};

/// What one replica has flushed, as it was last seen: a crash leaves it that.
#[derive(Debug, Default)]
struct Flushed {
    index: RaftIndex,
    epochs: Vec<EpochStart>,
    /// It ended in the round in which it may have flushed more.
    is_unknown: bool,
}

impl Flushed {
    fn has(&self, index: RaftIndex, term: Term) -> bool {
        if self.is_unknown {
            return true;
        }
        let epoch = self.epochs.iter().rev().find(|start| start.index <= index);
        self.index >= index && epoch.is_some_and(|start| start.epoch.term() == Some(term))
    }
}

/// How many sets of voters are remembered.
const VOTERS_KEPT: usize = 3;

#[derive(Debug, Default)]
pub(super) struct CommittedOnQuorum {
    flushed: BTreeMap<Listener, Flushed>,
    committed: BTreeMap<TopicPartition, RaftIndex>,
    /// Voters as each replica saw them, the last few, newest last: what is committed before a change is applied is
    /// committed by the voters of before, and a leader with a slow disk applies late.
    voters: BTreeMap<Listener, Vec<Vec<ReplicaId>>>,
}

impl Invariant for CommittedOnQuorum {
    fn replica(&mut self, sight: &Sight<'_>) -> Held {
        let Sight { who, replica, is_relaxed, .. } = *sight;
        let log = replica.log();
        let flushed = self.flushed.entry(who).or_default();
        flushed.is_unknown = false;
        flushed.index = if is_relaxed { log.last_index() } else { log.flushed_index() };
        if flushed.epochs != log.epochs() {
            flushed.epochs = log.epochs().to_vec();
        }
        let voters = self.voters.entry(who).or_default();
        if voters.last() != Some(&replica.membership().voters) {
            voters.push(replica.membership().voters.clone());
            let many = voters.len();
            voters.drain(..many.saturating_sub(VOTERS_KEPT));
        }
        let index = replica.applied();
        // Creation is given with the replicas.
        let known = self.committed.entry(who.tp).or_insert(CREATION_INDEX);
        if index <= *known {
            return Ok(());
        }
        *known = index;
        let Some(term) = log.term_at(index) else { return Ok(()) };
        let has = |voters: &[ReplicaId]| {
            let with = voters.iter().filter(|&&replica| {
                self.flushed.get(&Listener { tp: who.tp, replica }).is_some_and(|flushed| flushed.has(index, term))
            });
            with.count() > voters.len() / 2
        };
        let voters = &self.voters[&who];
        if voters.iter().any(|voters| has(voters)) {
            return Ok(());
        }
        let all: Vec<_> = self.flushed.iter().filter(|(other, _)| other.tp == who.tp).collect();
        Err(format!(
            "{}: replica {} commits entry {index} of term {term}, voters {voters:?}, flushed: {all:?}",
            who.tp, who.replica
        ))
    }

    fn recovered(&mut self, tp: TopicPartition, cut: Cut) {
        let known = self.committed.entry(tp).or_insert(CREATION_INDEX);
        *known = (*known).min(RaftIndex::new(cut.index));
    }

    // What a damaged one had when it said so counts: that is why no more than a minority may be damaged.
    fn ended(&mut self, who: Listener) {
        self.flushed.entry(who).or_default().is_unknown = true;
    }
}
