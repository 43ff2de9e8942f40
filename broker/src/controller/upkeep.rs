//! What a controller does without being asked: replicas whose directory is gone are replaced, draining brokers are
//! emptied, the topics behind coordinators get the replicas that they had no brokers for, a few partitions at a time.
//!
//! It needs no memory: each round looks at what is, so a new controller goes on where the last one stopped.

use std::collections::BTreeMap;

use flowstone_protocol::{BrokerId, TopicPartition};

use super::balance;
use super::commands::{MetadataCommand, MovePartition, REPLICATION_FACTOR_DEFAULT, can_replace};
use super::placement::Draws;
use super::table::{MetadataTable, Place};
use crate::internal_topics::InternalTopic;

/// Replacements of one round: they are records in the log, and each of them begins a copy.
const REPLACEMENTS_MAX: usize = 100;

/// What is to be done now, so that at most `moves_max` partitions are being moved at a time. Each call wants another
/// seed, and wants the commands of the one before to be done.
pub(crate) fn due(table: &MetadataTable, moves_max: usize, seed: u64) -> Vec<MetadataCommand> {
    let mut draws = Draws::from_seed(seed);
    let mut due: Vec<MetadataCommand> = replacements(table)
        .take(REPLACEMENTS_MAX)
        .map(|(tp, place)| MetadataCommand::ReplaceReplica { tp, replica: place.replica, seed: draws.next() })
        .collect();
    // A change whose new replica is on a broker that is down copies nothing, and may wait for long: the others go on.
    let is_up = |place: &Place| table.broker(place.broker).is_some_and(|broker| !broker.fenced);
    let copied = table.changing().filter(|(_, entry)| entry.joining().all(is_up)).count();
    let mut room = moves_max.saturating_sub(copied + due.len());
    for broker in table.brokers().filter(|broker| broker.draining && table.load(broker.id).replicas > 0) {
        if room == 0 {
            break;
        }
        let moves = balance::emptied(table, broker.id, room, &mut draws).moves;
        room -= moves.len();
        due.extend(moves.into_iter().map(|planned| {
            MetadataCommand::MovePartition(MovePartition {
                topic: planned.topic,
                partition: planned.tp.partition.get(),
                brokers: planned.to,
                seed: draws.next(),
                validate_only: false,
            })
        }));
    }
    due.extend(raises(table, room, &mut draws));
    due
}

/// The topics behind coordinators have as many replicas as there may be, however few brokers there were when they were made.
fn raises(table: &MetadataTable, room: usize, draws: &mut Draws) -> Vec<MetadataCommand> {
    let able: Vec<_> = table.brokers().filter(|broker| broker.takes_replicas()).collect();
    let wanted = able.len().min(REPLICATION_FACTOR_DEFAULT as usize);
    let topics = InternalTopic::ALL.into_iter().filter_map(|topic| table.topic_named(topic.name()));
    let short =
        topics.flat_map(|topic| topic.entries().map(move |(tp, entry)| (topic, tp, entry))).filter(|(_, _, entry)| {
            let staying = entry.replicas().iter().filter(|place| able.iter().any(|broker| broker.id == place.broker));
            // One that has a replica on a broker that is down, or is being emptied, is first of all not hurried.
            !entry.is_changing() && entry.replicas().len() < wanted && staying.count() == entry.replicas().len()
        });
    let mut given: BTreeMap<BrokerId, u32> = BTreeMap::new();
    let mut due = Vec::new();
    for (topic, tp, entry) in short.take(room) {
        let mut brokers: Vec<BrokerId> = entry.replicas().iter().map(|place| place.broker).collect();
        while brokers.len() < wanted {
            let racks: Vec<&str> =
                able.iter().filter(|it| brokers.contains(&it.id)).map(|it| it.rack.as_str()).collect();
            let next = able.iter().filter(|broker| !brokers.contains(&broker.id)).min_by_key(|broker| {
                let load = table.load(broker.id).replicas + given.get(&broker.id).copied().unwrap_or_default();
                (racks.contains(&broker.rack.as_str()), load, broker.id)
            });
            let Some(next) = next else { break };
            *given.entry(next.id).or_default() += 1;
            brokers.push(next.id);
        }
        due.push(MetadataCommand::MovePartition(MovePartition {
            topic: topic.name.clone(),
            partition: tp.partition.get(),
            brokers,
            seed: draws.next(),
            validate_only: false,
        }));
    }
    due
}

/// Replicas in directories that their brokers do not have any more, as far as their groups can still decide on others.
fn replacements(table: &MetadataTable) -> impl Iterator<Item = (TopicPartition, Place)> {
    // Seldom there is one; only then all partitions are looked at.
    let any = table.holds_strays();
    let all = any.then(|| table.entries()).into_iter().flatten();
    all.flat_map(|(_, tp, entry)| entry.replicas().iter().map(move |place| (tp, entry, place)))
        .filter(|(_, _, place)| table.broker(place.broker).is_some_and(|broker| broker.directory != place.directory))
        .filter(|(_, entry, place)| can_replace(table, entry, place.replica))
        .map(|(tp, _, place)| (tp, *place))
}

#[cfg(test)]
mod tests {
    use super::super::commands::ReplaceBroker;
    use super::super::table::METADATA_PARTITION;
    use super::super::testing::Cluster;
    use super::*;
    use flowstone_protocol::TopicId;

    /// Has the controller do what is due until nothing is, its leaders following at once; returns the rounds.
    fn settle(cluster: &mut Cluster, moves_max: usize) -> usize {
        for round in 0..200 {
            let seed = cluster.draw();
            let due = due(cluster.table(), moves_max, seed);
            if due.is_empty() {
                return round;
            }
            cluster.run_all(due);
            assert!(cluster.table().changing().count() <= moves_max.max(REPLACEMENTS_MAX));
            cluster.finish_moves();
        }
        panic!("no end");
    }

    #[test]
    fn a_topic_behind_coordinators_grows_with_the_cluster() {
        let mut cluster = Cluster::of(1);
        let ensure = |id| MetadataCommand::EnsureInternalTopic {
            topic: InternalTopic::Groups,
            topic_id: TopicId::new(id),
            seed: 5,
        };
        cluster.run(ensure(70)).expect("made");
        let before = cluster.topic("__consumer_offsets");
        assert!(before.internal);
        assert_eq!((before.id, before.partitions.len(), before.replication_factor), (TopicId::new(70), 4, 1));
        assert_eq!(cluster.table().partition_count(), 0, "it does not count for the limits");
        // Asked for again, it is the same one.
        cluster.run(ensure(71)).expect("there");
        assert_eq!(cluster.topic("__consumer_offsets"), before);
        assert_eq!(settle(&mut cluster, 2), 0, "there is nobody else");
        cluster.register(2);
        cluster.register(3);
        cluster.register(4);
        cluster.fence(4);
        assert!(settle(&mut cluster, 2) >= 2);
        for (_, entry) in cluster.topic("__consumer_offsets").entries() {
            let mut brokers: Vec<i32> = entry.replicas().iter().map(|place| place.broker.get()).collect();
            assert_eq!(brokers[0], 1, "who led it still may");
            brokers.sort_unstable();
            assert_eq!(brokers, [1, 2, 3]);
        }
        assert_eq!(settle(&mut cluster, 2), 0, "and that is that");
    }

    #[test]
    fn a_draining_broker_is_emptied_a_few_partitions_at_a_time_and_may_then_go() {
        let mut cluster = Cluster::of(4);
        cluster.create("a", 20, 3);
        cluster.create("b", 5, 1);
        let drain =
            |undo| MetadataCommand::DrainBroker { broker: BrokerId::new(1), undo, seed: 3, validate_only: false };
        cluster.run(drain(false)).expect("there are others");
        let rounds = settle(&mut cluster, 3);
        assert!(rounds >= 5, "{rounds} rounds");
        let load = cluster.table().load(BrokerId::new(1));
        assert_eq!((load.replicas, load.leaving), (0, 0));
        let metadata = cluster.table().partition(METADATA_PARTITION).expect("founded");
        assert!(metadata.replicas().iter().all(|place| place.broker != BrokerId::new(1)), "another one votes for it");
        assert_eq!(metadata.replicas().len(), 3);
        cluster.run(MetadataCommand::DecommissionBroker { broker: BrokerId::new(1) }).expect("it is empty");
        assert!(cluster.table().broker(BrokerId::new(1)).is_none());
        cluster.try_register(1, 1).expect_err("its directory is not taken in again");
        cluster.try_register(1, 55).expect("an empty one is");
    }

    #[test]
    fn draining_stops_when_it_is_undone() {
        let mut cluster = Cluster::of(4);
        cluster.create("a", 20, 3);
        let broker = BrokerId::new(2);
        cluster
            .run(MetadataCommand::DrainBroker { broker, undo: false, seed: 3, validate_only: false })
            .expect("drains");
        let seed = cluster.draw();
        let moves = due(cluster.table(), 2, seed);
        assert_eq!(moves.len(), 2);
        cluster.run_all(moves);
        let seed = cluster.draw();
        assert_eq!(due(cluster.table(), 2, seed).len(), 0, "two are under way");
        cluster
            .run(MetadataCommand::DrainBroker { broker, undo: true, seed: 0, validate_only: false })
            .expect("undone");
        cluster.finish_moves();
        assert_eq!(settle(&mut cluster, 2), 0);
        assert!(cluster.table().load(broker).replicas > 5, "it keeps what it still has");
    }

    #[test]
    fn moves_to_a_broker_that_died_do_not_hold_up_the_others() {
        let mut cluster = Cluster::of(4);
        cluster.create_on("a", &[&[1], &[1], &[1], &[1], &[1], &[1]]);
        for partition in [0, 1] {
            cluster.move_to("a", partition, &[4]).expect("begun");
        }
        let broker = BrokerId::new(1);
        cluster
            .run(MetadataCommand::DrainBroker { broker, undo: false, seed: 3, validate_only: false })
            .expect("drains");
        assert_eq!(due(cluster.table(), 2, 1).len(), 0, "two are under way");
        cluster.fence(4);
        assert_eq!(due(cluster.table(), 2, 1).len(), 2);
    }

    #[test]
    fn a_broker_back_with_an_empty_disk_gets_new_replicas_in_its_old_places() {
        let mut cluster = Cluster::of(3);
        cluster.create("a", 10, 3);
        cluster.create("single", 6, 1);
        let error = cluster.try_register(2, 22).expect_err("the other is alive");
        assert!(error.is_retriable() && error.message.contains("session"), "{}", error.message);
        cluster.fence(2);
        cluster.try_register(2, 22).expect("its session has ended");
        settle(&mut cluster, 5);
        let broker = cluster.table().broker(BrokerId::new(2)).expect("registered").clone();
        let mut alone = 0;
        for (topic, tp, entry) in cluster.table().entries() {
            let Some(place) = entry.replicas().iter().find(|place| place.broker == broker.id) else { continue };
            if topic.name == "single" {
                alone += 1;
                assert_ne!(place.directory, broker.directory, "{tp}: nobody is left who could decide on another one");
            } else {
                assert_eq!(place.directory, broker.directory, "{tp}");
                assert!(!entry.is_founder(place.replica), "{tp}: it begins as a learner");
            }
        }
        assert_eq!(alone, 2);
        let metadata = cluster.table().partition(METADATA_PARTITION).expect("founded");
        assert!(metadata.place(broker.metadata_replica).is_some(), "it votes on the metadata again, under its new id");
    }

    #[test]
    fn a_dead_broker_is_replaced_by_another_one() {
        let mut cluster = Cluster::of(3);
        cluster.create("a", 1_200, 3);
        cluster.register(4);
        cluster.fence(3);
        let replace = |seed| {
            let (old, new) = (BrokerId::new(3), BrokerId::new(4));
            MetadataCommand::ReplaceBroker(ReplaceBroker { old, new, seed, validate_only: false })
        };
        let mut given = 0;
        loop {
            let seed = cluster.draw();
            let (moves, more) = cluster.moves(replace(seed));
            given += moves.len();
            if !more {
                break;
            }
        }
        assert_eq!(given, 1_201, "the metadata's replica as well");
        assert_eq!(cluster.table().load(BrokerId::new(3)).replicas, 0);
        assert_eq!(cluster.table().load(BrokerId::new(4)).replicas, 1_201);
        let entry = cluster.topic("a").partitions.get(7).expect("there").clone();
        assert!(entry.may_remove() && entry.leaving().len() == 1, "a dead one is removed first");
        cluster.finish_moves();
        cluster.run(MetadataCommand::DecommissionBroker { broker: BrokerId::new(3) }).expect("it holds nothing");
    }
}
