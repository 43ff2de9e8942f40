//! Whoever is elected has all that was committed.

use std::collections::{BTreeMap, BTreeSet};

use flowstone_protocol::{RaftIndex, ReplicaId, Term, TopicPartition};

use super::super::machine::{Heard, Listener};
use super::{Cut, Held, Invariant, Sight};

#[derive(Debug, Default)]
pub(super) struct LeaderCompleteness {
    committed: BTreeMap<TopicPartition, (RaftIndex, Term)>,
    elected: BTreeSet<(TopicPartition, Term, ReplicaId)>,
}

impl Invariant for LeaderCompleteness {
    fn heard(&mut self, who: Listener, what: &Heard) -> Held {
        if let Heard::Committed(entry) = what {
            let newest = self.committed.entry(who.tp).or_insert((entry.index, entry.term));
            if entry.index > newest.0 {
                *newest = (entry.index, entry.term);
            }
        }
        Ok(())
    }

    fn recovered(&mut self, tp: TopicPartition, cut: Cut) {
        // The term of the entry at the cut is not known here: what is committed next counts.
        if self.committed.get(&tp).is_some_and(|(index, _)| index.get() > cut.index) {
            self.committed.remove(&tp);
        }
    }

    fn replica(&mut self, sight: &Sight<'_>) -> Held {
        let Sight { who, replica, .. } = *sight;
        if !sight.leads() || !self.elected.insert((who.tp, replica.status().term, who.replica)) {
            return Ok(());
        }
        // One that was paused since it was voted for may come into an old term much later: what is of a newer one it lacks.
        let newest = self.committed.get(&who.tp).filter(|(_, term)| *term <= replica.status().term);
        let Some(&(index, term)) = newest else { return Ok(()) };
        let log = replica.log();
        if log.term_at(index) == Some(term) || index <= log.checkpoint().applied {
            return Ok(());
        }
        Err(format!(
            "{}: replica {} is elected in term {}; entry {index} of term {term} is committed, and its log ends at {} and has \
             term {:?} there",
            who.tp,
            who.replica,
            replica.status().term,
            log.last_index(),
            log.term_at(index),
        ))
    }
}
