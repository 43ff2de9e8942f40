//! What becomes of replicas that can never vote again, once their brokers have told so.
//!
//! | told by | the partition |
//! |---|---|
//! | a minority of the voters | goes on; each lost one is replaced under a new id |
//! | a majority, not all | waits: for the others to tell, or for an operator, who may choose one that is whole |
//! | all voters, and what was lost was in memory alone | goes on with the best of them, by itself |
//!
//! In memory alone: brokers tell again with every heartbeat, until it is settled.

use std::collections::{BTreeMap, HashMap};

use flowstone_protocol::{RaftIndex, ReplicaId, Term, TopicPartition};

use super::commands::{MetadataCommand, RecoverPartition, can_replace};
use super::placement::Draws;
use super::table::{MetadataTable, Place};

/// The last entry of a replica's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LogEnd {
    pub(crate) term: Term,
    pub(crate) index: RaftIndex,
}

/// How a replica is, as its broker tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// What was in memory alone may be gone (`flowstone.flush = relaxed`): it cannot vote, and could go on.
    LostMemory(LogEnd),
    /// What it answered for is gone or unreadable.
    Lost,
}

/// What brokers have told of lost replicas.
#[derive(Clone, Debug, Default)]
pub(crate) struct LostReplicas {
    told: HashMap<TopicPartition, BTreeMap<ReplicaId, Told>>,
}

impl LostReplicas {
    pub(crate) fn tell(&mut self, tp: TopicPartition, replica: ReplicaId, told: Told) {
        self.told.entry(tp).or_default().insert(replica, told);
    }

    /// Replicas of a partition that cannot vote, for a recovery that is asked for.
    pub(crate) fn known_lost(&self, tp: TopicPartition) -> Vec<ReplicaId> {
        let told = self.told.get(&tp).into_iter().flatten();
        told.map(|(replica, _)| *replica).collect()
    }

    /// What is to be done now. Forgets what is settled: replicas that are no members any more.
    pub(crate) fn due(&mut self, table: &MetadataTable, seed: u64) -> Vec<MetadataCommand> {
        let mut draws = Draws::from_seed(seed);
        self.told.retain(|tp, told| {
            let entry = table.partition(*tp);
            // The metadata's observers are no members of its assignment, and told of all the same.
            let observes = |replica: ReplicaId| table.observers().any(|place| place.replica == replica);
            // One on its way out may still be a voter: its word counts where all of them have to tell.
            told.retain(|replica, _| entry.is_some_and(|entry| entry.place(*replica).is_some()) || observes(*replica));
            !told.is_empty()
        });
        let mut partitions: Vec<_> = self.told.iter().collect();
        partitions.sort_unstable_by_key(|(tp, _)| **tp);
        partitions.into_iter().flat_map(|(tp, told)| settle(table, *tp, told, &mut draws)).collect()
    }
}

/// What one partition needs.
fn settle(
    table: &MetadataTable,
    tp: TopicPartition,
    told: &BTreeMap<ReplicaId, Told>,
    draws: &mut Draws,
) -> Vec<MetadataCommand> {
    let Some(entry) = table.partition(tp) else { return Vec::new() };
    let lost = || told.keys().copied();
    let electorates = entry.electorates();
    let lost_of = |voters: &[Place]| voters.iter().filter(|voter| told.contains_key(&voter.replica)).count();
    if electorates.iter().all(|voters| voters.len() - lost_of(voters) > voters.len() / 2) {
        let is_leaving = |replica: ReplicaId| entry.leaving().iter().any(|place| place.replica == replica);
        return lost()
            // Its place is taken, or is not wanted.
            .filter(|replica| !is_leaving(*replica) && can_replace(table, entry, *replica))
            .map(|replica| MetadataCommand::ReplaceReplica { tp, replica, seed: draws.next() })
            .collect();
    }
    // A voter of which nobody tells may be whole, or have more than all others; one that lost what it had on disk may have
    // been the only one to have what was acknowledged.
    // In the middle of a change that holds for whoever may be a voter by now, or may be one still.
    let mut voters: Vec<Place> = electorates.into_iter().flatten().collect();
    voters.sort_unstable_by_key(|voter| voter.replica);
    voters.dedup();
    let lost_voters = lost_of(&voters);
    let end = |replica: ReplicaId| match told.get(&replica)? {
        Told::LostMemory(end) => Some(*end),
        Told::Lost => None,
    };
    let ends: Option<Vec<(LogEnd, ReplicaId)>> =
        voters.iter().map(|voter| end(voter.replica).map(|end| (end, voter.replica))).collect();
    let Some((best, survivor)) = ends.and_then(|ends| ends.into_iter().max()) else { return Vec::new() };
    vec![MetadataCommand::RecoverPartition(RecoverPartition {
        tp,
        survivor,
        survives_as: None,
        known_lost: lost().collect(),
        reason: format!(
            "{lost_voters} of {} voters lost what was in memory alone (flowstone.flush = relaxed); the best log goes on, up \
             to index {} of term {}",
            voters.len(),
            best.index,
            best.term
        ),
        seed: draws.next(),
        validate_only: false,
    })]
}

#[cfg(test)]
mod tests {
    use super::super::testing::Cluster;
    use super::*;

    fn end(term: u64, index: u64) -> LogEnd {
        LogEnd { term: Term::new(term), index: RaftIndex::new(index) }
    }

    /// A partition on brokers 1, 2, 3, with its replicas.
    fn world() -> (Cluster, TopicPartition, Vec<ReplicaId>) {
        let mut cluster = Cluster::of(3);
        cluster.create_on("t", &[&[1, 2, 3]]);
        let topic = cluster.topic("t");
        let (tp, entry) = topic.entries().next().expect("one");
        let replicas = entry.replicas().iter().map(|place| place.replica).collect();
        (cluster, tp, replicas)
    }

    #[test]
    fn a_minority_is_replaced() {
        let (mut cluster, tp, replicas) = world();
        let mut lost = LostReplicas::default();
        lost.tell(tp, replicas[1], Told::Lost);
        cluster.run_all(lost.due(cluster.table(), 1));
        let entry = cluster.table().partition(tp).expect("there").clone();
        assert!(entry.leaving().iter().any(|place| place.replica == replicas[1]) && entry.may_remove());
        assert_eq!(lost.due(cluster.table(), 2).len(), 0, "it is settled, though its broker tells it once more");
        lost.tell(tp, replicas[1], Told::Lost);
        assert_eq!(lost.due(cluster.table(), 3).len(), 0);
    }

    #[test]
    fn a_majority_waits_until_all_have_told_and_the_best_goes_on() {
        let (mut cluster, tp, replicas) = world();
        let mut lost = LostReplicas::default();
        lost.tell(tp, replicas[0], Told::LostMemory(end(3, 90)));
        lost.tell(tp, replicas[1], Told::LostMemory(end(4, 70)));
        assert_eq!(lost.due(cluster.table(), 1).len(), 0, "the third may be whole, or have more");
        lost.tell(tp, replicas[2], Told::LostMemory(end(4, 60)));
        let due = lost.due(cluster.table(), 1);
        cluster.run_all(due);
        let entry = cluster.table().partition(tp).expect("there").clone();
        assert_eq!(entry.recovered().map(|recovered| recovered.from), Some(replicas[1]), "the newest term wins");
        let recovery = cluster.table().recoveries().next().expect("kept for the record");
        assert!(recovery.reason.contains("3 of 3 voters"), "{}", recovery.reason);
        assert_eq!(recovery.given_up.len(), 3);
        assert_eq!(lost.due(cluster.table(), 2).len(), 0);
    }

    #[test]
    fn in_the_middle_of_a_move_the_one_that_leaves_tells_as_well() {
        let mut cluster = Cluster::of(4);
        cluster.create_on("t", &[&[1, 2, 3]]);
        cluster.move_to("t", 0, &[4, 2, 3]).expect("begun");
        let (tp, entry) = cluster.topic("t").entries().map(|(tp, entry)| (tp, entry.clone())).next().expect("one");
        let replica = |broker: i32| entry.places().find(|place| place.broker.get() == broker).expect("there").replica;
        let mut lost = LostReplicas::default();
        for broker in [1, 2, 3] {
            lost.tell(tp, replica(broker), Told::LostMemory(end(3, 80 - broker as u64)));
        }
        assert_eq!(lost.due(cluster.table(), 1).len(), 0, "the new one may vote by now, and be whole");
        lost.tell(tp, replica(4), Told::LostMemory(end(2, 99)));
        let due = lost.due(cluster.table(), 1);
        cluster.run_all(due);
        let recovered = cluster.table().partition(tp).expect("there").recovered();
        assert_eq!(recovered.map(|recovered| recovered.from), Some(replica(1)), "the best log is the leaving one's");
    }

    #[test]
    fn what_was_lost_on_disk_is_never_passed_over_by_itself() {
        let (cluster, tp, replicas) = world();
        let mut lost = LostReplicas::default();
        for (replica, told) in replicas.iter().zip([Told::Lost, Told::Lost, Told::LostMemory(end(9, 9))]) {
            lost.tell(tp, *replica, told);
        }
        assert_eq!(lost.due(cluster.table(), 1).len(), 0, "an operator decides");
        assert_eq!(lost.known_lost(tp).len(), 3);
    }
}
