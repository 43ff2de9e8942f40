//! At most one replica of a group leads in a term.

use std::collections::BTreeMap;

use flowstone_protocol::{ReplicaId, Term, TopicPartition};

use super::{Held, Invariant, Sight};

#[derive(Debug, Default)]
pub(super) struct OneLeaderPerTerm {
    leaders: BTreeMap<(TopicPartition, Term), ReplicaId>,
}

impl Invariant for OneLeaderPerTerm {
    fn replica(&mut self, sight: &Sight<'_>) -> Held {
        if !sight.leads() {
            return Ok(());
        }
        let (who, term) = (sight.who, sight.replica.status().term);
        let first = *self.leaders.entry((who.tp, term)).or_insert(who.replica);
        if first == who.replica {
            return Ok(());
        }
        Err(format!("{}: replicas {first} and {} both lead in term {term}", who.tp, who.replica))
    }
}
