//! What becomes of replicas that can never vote again, once their brokers have told so.
//!
//! | told by | the partition |
//! |---|---|
//! | a minority of the voters | goes on; each lost one is replaced under a new id: see below |
//! | a majority, not all | waits: for the others to tell, or for an operator, who may choose one that is whole |
//! | all voters, and what was lost was in memory alone | goes on with the best of them, by itself |
//!
//! After a power failure of all brokers the first one that is back looks like a minority, and may be the best of all: one
//! that lost memory alone is only replaced once the partition has found another leader since, or once the others have been
//! there for a session without telling the same. One that took such a one's place and has nothing yet counts as told: it
//! is none that the others could wait for.
//!
//! In memory alone: brokers tell again with every heartbeat, until it is settled.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use flowstone_protocol::{BrokerId, LeaderEpoch, RaftIndex, ReplicaId, Term, TopicPartition};

use super::change::PartitionEntry;
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
    /// It is to be copied from the others, and has nothing yet: so for as long as its broker says so.
    Nothing,
}

impl Told {
    /// As it comes over: one that lost memory, and has no entry, has nothing at all.
    pub(crate) fn of(lost_memory: bool, end: LogEnd) -> Self {
        match lost_memory {
            true if end.index == RaftIndex::new(0) => Self::Nothing,
            true => Self::LostMemory(end),
            false => Self::Lost,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Word {
    told: Told,
    by: BrokerId,
    /// When it was looked at first, and in which epoch the partition was led then.
    seen: Option<(Instant, LeaderEpoch)>,
}

/// What brokers have told of lost replicas.
#[derive(Clone, Debug, Default)]
pub(crate) struct LostReplicas {
    told: HashMap<TopicPartition, BTreeMap<ReplicaId, Word>>,
}

impl LostReplicas {
    /// A broker says anew which of its replicas have nothing yet: of the others that holds no more.
    pub(crate) fn heard(&mut self, by: BrokerId) {
        for told in self.told.values_mut() {
            told.retain(|_, word| word.told != Told::Nothing || word.by != by);
        }
    }

    pub(crate) fn tell(&mut self, by: BrokerId, tp: TopicPartition, replica: ReplicaId, told: Told) {
        let words = self.told.entry(tp).or_default();
        let seen = words.get(&replica).and_then(|word| word.seen);
        words.insert(replica, Word { told, by, seen });
    }

    /// Replicas of a partition that cannot vote, for a recovery that is asked for.
    pub(crate) fn known_lost(&self, tp: TopicPartition) -> Vec<ReplicaId> {
        let told = self.told.get(&tp).into_iter().flatten();
        told.map(|(replica, _)| *replica).collect()
    }

    /// What is to be done now. Forgets what is settled: replicas that are no members any more. `patience` is how long all
    /// that started together need to tell: a session.
    pub(crate) fn due(
        &mut self,
        table: &MetadataTable,
        patience: Duration,
        now: Instant,
        seed: u64,
    ) -> Vec<MetadataCommand> {
        let mut draws = Draws::from_seed(seed);
        self.told.retain(|tp, told| {
            let entry = table.partition(*tp);
            // The metadata's observers are no members of its assignment, and told of all the same.
            let observes = |replica: ReplicaId| table.observers().any(|place| place.replica == replica);
            // One on its way out may still be a voter: its word counts where all of them have to tell.
            told.retain(|replica, _| entry.is_some_and(|entry| entry.place(*replica).is_some()) || observes(*replica));
            for word in told.values_mut() {
                word.seen.get_or_insert_with(|| (now, entry.map_or(LeaderEpoch::NONE, led_in)));
            }
            !told.is_empty()
        });
        let mut partitions: Vec<_> = self.told.iter().collect();
        partitions.sort_unstable_by_key(|(tp, _)| **tp);
        partitions.into_iter().flat_map(|(tp, told)| settle(table, *tp, told, (patience, now), &mut draws)).collect()
    }
}

/// The epoch in which a partition was led last.
fn led_in(entry: &PartitionEntry) -> LeaderEpoch {
    entry.leader().map_or(LeaderEpoch::NONE, |leader| leader.epoch)
}

/// What one partition needs.
fn settle(
    table: &MetadataTable,
    tp: TopicPartition,
    told: &BTreeMap<ReplicaId, Word>,
    (patience, now): (Duration, Instant),
    draws: &mut Draws,
) -> Vec<MetadataCommand> {
    let Some(entry) = table.partition(tp) else { return Vec::new() };
    let has_nothing = |replica: ReplicaId| told.get(&replica).is_some_and(|word| word.told == Told::Nothing);
    // One that joins and has nothing does not vote.
    let fresh: Vec<Place> = entry.joining().filter(|place| has_nothing(place.replica)).copied().collect();
    let mut electorates = entry.electorates();
    electorates.iter_mut().for_each(|voters| voters.retain(|voter| !fresh.contains(voter)));
    let has_majority_of = |is_counted: &dyn Fn(&Place) -> bool| {
        electorates.iter().all(|voters| voters.iter().filter(|voter| is_counted(voter)).count() > voters.len() / 2)
    };
    if has_majority_of(&|voter| !told.contains_key(&voter.replica)) {
        let is_leaving = |replica: ReplicaId| entry.leaving().iter().any(|place| place.replica == replica);
        let is_up = |voter: &Place| table.broker(voter.broker).is_some_and(|broker| !broker.fenced);
        let others_are_there = has_majority_of(&|voter| !told.contains_key(&voter.replica) && is_up(voter));
        let is_due = |word: &Word| match (word.told, word.seen) {
            (Told::Lost, _) => true,
            (Told::LostMemory(_), Some((since, epoch))) => {
                led_in(entry) > epoch || (others_are_there && now.saturating_duration_since(since) >= patience)
            }
            (Told::LostMemory(_), None) | (Told::Nothing, _) => false,
        };
        return told
            .iter()
            .filter(|(_, word)| is_due(word))
            .map(|(replica, _)| *replica)
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
    let mut best: Option<(LogEnd, ReplicaId)> = None;
    for voter in &voters {
        match told.get(&voter.replica).map(|word| word.told) {
            Some(Told::LostMemory(end)) => best = best.max(Some((end, voter.replica))),
            Some(Told::Nothing) => {}
            // Its place is taken by one that has nothing: it was lost before, and tells no more.
            None if fresh.iter().any(|place| place.directory == voter.directory) => {}
            Some(Told::Lost) | None => return Vec::new(),
        }
    }
    let Some((best, survivor)) = best else { return Vec::new() };
    let lost_voters = voters.iter().filter(|voter| told.contains_key(&voter.replica)).count();
    vec![MetadataCommand::RecoverPartition(RecoverPartition {
        tp,
        survivor,
        survives_as: None,
        known_lost: told.keys().copied().collect(),
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

    const PATIENCE: Duration = Duration::from_secs(6);

    /// Brokers and moments of one test.
    struct Story {
        lost: LostReplicas,
        now: Instant,
    }

    impl Story {
        fn new() -> Self {
            Self { lost: LostReplicas::default(), now: Instant::now() }
        }

        /// Its broker tells.
        fn tell(&mut self, cluster: &Cluster, tp: TopicPartition, replica: ReplicaId, told: Told) {
            let entry = cluster.table().partition(tp).expect("there");
            let by = entry.place(replica).expect("a member").broker;
            self.lost.tell(by, tp, replica, told);
        }

        fn due(&mut self, cluster: &Cluster, seed: u64) -> Vec<MetadataCommand> {
            self.lost.due(cluster.table(), PATIENCE, self.now, seed)
        }
    }

    #[test]
    fn a_minority_is_replaced() {
        let (mut cluster, tp, replicas) = world();
        let mut story = Story::new();
        story.tell(&cluster, tp, replicas[1], Told::Lost);
        let due = story.due(&cluster, 1);
        cluster.run_all(due);
        let entry = cluster.table().partition(tp).expect("there").clone();
        assert!(entry.leaving().iter().any(|place| place.replica == replicas[1]) && entry.may_remove());
        assert_eq!(story.due(&cluster, 2).len(), 0, "it is settled, though its broker tells it once more");
        story.tell(&cluster, tp, replicas[1], Told::Lost);
        assert_eq!(story.due(&cluster, 3).len(), 0);
    }

    #[test]
    fn who_lost_memory_is_replaced_once_the_others_are_known_to_go_on() {
        let (mut cluster, tp, replicas) = world();
        cluster.lead(tp, 2, 3);
        let mut story = Story::new();
        story.tell(&cluster, tp, replicas[1], Told::LostMemory(end(3, 90)));
        assert_eq!(story.due(&cluster, 1).len(), 0, "the power may have failed everywhere");
        // The others say nothing of the kind for a whole session.
        story.now += PATIENCE;
        cluster.fence(3);
        assert_eq!(story.due(&cluster, 2).len(), 0, "one of them is not back");
        cluster.restart(3);
        assert_eq!(story.due(&cluster, 3).len(), 1);
        // Or one of them leads by now.
        story.now -= PATIENCE;
        assert_eq!(story.due(&cluster, 4).len(), 0);
        cluster.lead(tp, 1, 4);
        let due = story.due(&cluster, 5);
        assert!(matches!(due[..], [MetadataCommand::ReplaceReplica { replica, .. }] if replica == replicas[1]));
    }

    #[test]
    fn one_that_was_replaced_before_the_others_told_does_not_hold_them_up() {
        let (mut cluster, tp, replicas) = world();
        let mut story = Story::new();
        story.tell(&cluster, tp, replicas[0], Told::LostMemory(end(3, 95)));
        story.due(&cluster, 1);
        story.now += PATIENCE;
        let due = story.due(&cluster, 2);
        cluster.run_all(due);
        let fresh = cluster.table().partition(tp).expect("there").joining().next().expect("a new one").replica;
        // Another controller begins: nobody tells of the one that was replaced any more.
        for (told_before, best) in [(false, replicas[2]), (true, replicas[0])] {
            let mut story = if told_before { Story { lost: story.lost.clone(), ..story } } else { Story::new() };
            story.tell(&cluster, tp, replicas[1], Told::LostMemory(end(3, 90)));
            story.tell(&cluster, tp, replicas[2], Told::LostMemory(end(3, 92)));
            assert_eq!(story.due(&cluster, 3).len(), 0, "the new one may have a copy by now");
            story.tell(&cluster, tp, fresh, Told::of(true, end(0, 0)));
            let due = story.due(&cluster, 4);
            assert!(
                matches!(&due[..], [MetadataCommand::RecoverPartition(recover)] if recover.survivor == best),
                "{due:?}"
            );
            // Its broker says so no more.
            let by = cluster.table().partition(tp).and_then(|entry| entry.place(fresh)).expect("there").broker;
            story.lost.heard(by);
            assert_eq!(story.due(&cluster, 5).len(), 0);
            if told_before {
                story.tell(&cluster, tp, fresh, Told::Nothing);
                let due = story.due(&cluster, 6);
                cluster.run_all(due);
                break;
            }
        }
        assert!(cluster.table().partition(tp).expect("there").recovered().is_some());
    }

    #[test]
    fn a_majority_waits_until_all_have_told_and_the_best_goes_on() {
        let (mut cluster, tp, replicas) = world();
        let mut story = Story::new();
        story.tell(&cluster, tp, replicas[0], Told::LostMemory(end(3, 90)));
        story.tell(&cluster, tp, replicas[1], Told::LostMemory(end(4, 70)));
        assert_eq!(story.due(&cluster, 1).len(), 0, "the third may be whole, or have more");
        story.tell(&cluster, tp, replicas[2], Told::LostMemory(end(4, 60)));
        let due = story.due(&cluster, 1);
        cluster.run_all(due);
        let entry = cluster.table().partition(tp).expect("there").clone();
        assert_eq!(entry.recovered().map(|recovered| recovered.from), Some(replicas[1]), "the newest term wins");
        let recovery = cluster.table().recoveries().next().expect("kept for the record");
        assert!(recovery.reason.contains("3 of 3 voters"), "{}", recovery.reason);
        assert_eq!(recovery.given_up.len(), 3);
        assert_eq!(story.due(&cluster, 2).len(), 0);
    }

    #[test]
    fn in_the_middle_of_a_move_the_one_that_leaves_tells_as_well() {
        let mut cluster = Cluster::of(4);
        cluster.create_on("t", &[&[1, 2, 3]]);
        cluster.move_to("t", 0, &[4, 2, 3]).expect("begun");
        let (tp, entry) = cluster.topic("t").entries().map(|(tp, entry)| (tp, entry.clone())).next().expect("one");
        let replica = |broker: i32| entry.places().find(|place| place.broker.get() == broker).expect("there").replica;
        let mut story = Story::new();
        for broker in [1, 2, 3] {
            story.tell(&cluster, tp, replica(broker), Told::LostMemory(end(3, 80 - broker as u64)));
        }
        assert_eq!(story.due(&cluster, 1).len(), 0, "the new one may vote by now, and be whole");
        story.tell(&cluster, tp, replica(4), Told::LostMemory(end(2, 99)));
        let due = story.due(&cluster, 1);
        cluster.run_all(due);
        let recovered = cluster.table().partition(tp).expect("there").recovered();
        assert_eq!(recovered.map(|recovered| recovered.from), Some(replica(1)), "the best log is the leaving one's");
    }

    #[test]
    fn what_was_lost_on_disk_is_never_passed_over_by_itself() {
        let (cluster, tp, replicas) = world();
        let mut story = Story::new();
        for (replica, told) in replicas.iter().zip([Told::Lost, Told::Lost, Told::LostMemory(end(9, 9))]) {
            story.tell(&cluster, tp, *replica, told);
        }
        assert_eq!(story.due(&cluster, 1).len(), 0, "an operator decides");
        assert_eq!(story.lost.known_lost(tp).len(), 3);
    }
}
