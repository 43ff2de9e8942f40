//! What commands bring about, told as an operator would.

use flowstone_protocol::{BrokerId, LeaderEpoch, Offset, ReplicaId, TopicId, TopicPartition};

use super::change::{Leader, PartitionEntry};
use super::commands::{
    AlterTopic, Leadership, MetadataCommand, MetadataReply, MetadataRules, MovePartition, MoveProgress,
    RecoverPartition, Registration, ReplaceBroker,
};
use super::table::{BrokerEntry, METADATA_PARTITION, METADATA_TOPIC, MetadataTable, Place};
use super::testing::{Cluster, registration};
use crate::coordinator::StateMachine;

fn broker(cluster: &Cluster, id: i32) -> BrokerEntry {
    BrokerEntry::clone(cluster.table().broker(BrokerId::new(id)).expect("registered"))
}

fn entry(cluster: &Cluster, tp: TopicPartition) -> PartitionEntry {
    cluster.table().partition(tp).expect("there").clone()
}

fn only(cluster: &Cluster, topic: &str) -> TopicPartition {
    cluster.topic(topic).entries().next().expect("one").0
}

fn brokers_of(places: &[Place]) -> Vec<i32> {
    places.iter().map(|place| place.broker.get()).collect()
}

fn observers(cluster: &Cluster) -> Vec<i32> {
    cluster.table().observers().map(|place| place.broker.get()).collect()
}

fn progress(cluster: &mut Cluster, tp: TopicPartition, may_remove: bool, removed: &[ReplicaId]) {
    let wanted = entry(cluster, tp).replicas().iter().map(|place| place.replica).collect();
    let progress = MoveProgress { tp, may_remove, removed: removed.to_vec(), wanted, seed: cluster.draw() };
    cluster.run(MetadataCommand::MoveProgress(progress)).expect("taken in");
}

fn recovery(
    cluster: &mut Cluster,
    tp: TopicPartition,
    survivor: Place,
    known_lost: Vec<ReplicaId>,
) -> RecoverPartition {
    let seed = cluster.draw();
    let (survivor, reason) = (survivor.replica, "the others burnt".to_owned());
    RecoverPartition { tp, survivor, survives_as: None, known_lost, reason, seed, validate_only: false }
}

#[test]
fn a_broker_that_starts_again_is_the_same_one_at_other_addresses() {
    let mut cluster = Cluster::of(4);
    let written = cluster.log.len();
    let same = |cluster: &Cluster, id: i32| registration(id, id as u128, "", cluster.incarnation(id));
    let again = same(&cluster, 4);
    cluster.run(MetadataCommand::RegisterBroker(again)).expect("it said so before");
    assert_eq!(cluster.log.len(), written, "nothing new");

    let before = broker(&cluster, 4);
    let moved = Registration { client_address: "10.0.0.9:7070".to_owned(), incarnation: 9, ..same(&cluster, 4) };
    let reply = cluster.run(MetadataCommand::RegisterBroker(moved)).expect("its address changed");
    let after = broker(&cluster, 4);
    assert_eq!((after.client_address.as_str(), after.incarnation), ("10.0.0.9:7070", 9));
    assert_eq!(after.metadata_replica, before.metadata_replica, "the same directory has the same replica");
    assert!(matches!(reply, MetadataReply::Registered { is_founder: false, .. }), "{reply:?}");

    let reply = cluster.try_register(2, 2).expect("a founder");
    let MetadataReply::Registered { metadata_replica, is_founder: true } = reply else { panic!("{reply:?}") };
    assert_eq!(metadata_replica, ReplicaId::new(1_002), "that of the founding");
    assert_eq!(observers(&cluster), [4]);
}

#[test]
fn fencing_is_of_one_start_and_draining_of_the_broker() {
    let mut cluster = Cluster::of(4);
    let id = BrokerId::new(4);
    let drain = |undo| MetadataCommand::DrainBroker { broker: id, undo, seed: 1, validate_only: false };
    let earlier = cluster.incarnation(4);
    cluster.run(drain(false)).expect("it holds nothing");
    cluster.fence(4);
    cluster.restart(4);
    let known = broker(&cluster, 4);
    assert!(known.draining && !known.fenced, "it lives, and is still to be emptied: {known:?}");
    let written = cluster.log.len();
    cluster.run(MetadataCommand::FenceBroker { broker: id, incarnation: earlier }).expect("ignored");
    cluster.run(MetadataCommand::UnfenceBroker { broker: id, incarnation: cluster.incarnation(4) }).expect("is so");
    assert_eq!(cluster.log.len(), written, "what was meant for its last start says nothing of this one");
    cluster.run(drain(true)).expect("stops");
    cluster.run(drain(true)).expect("is so");
    assert_eq!(cluster.log.len(), written + 1);
    assert!(broker(&cluster, 4).takes_replicas());
}

#[test]
fn only_asking_writes_nothing() {
    let mut cluster = Cluster::of(4);
    cluster.create_on("t", &[&[1, 2, 3], &[2, 3, 1]]);
    cluster.fence(3);
    let written = cluster.log.len();
    let tp = only(&cluster, "t");
    let ids: Vec<BrokerId> = [4, 2, 1].map(BrokerId::new).to_vec();
    let (old, new) = (BrokerId::new(3), BrokerId::new(4));
    let wanted =
        MovePartition { topic: "t".to_owned(), partition: 0, brokers: ids.clone(), seed: 1, validate_only: true };
    let (moves, _) = cluster.moves(MetadataCommand::MovePartition(wanted));
    assert_eq!((moves[0].to.clone(), moves[0].from.len()), (ids, 3));
    let (moves, _) =
        cluster.moves(MetadataCommand::DrainBroker { broker: new, undo: false, seed: 1, validate_only: true });
    assert_eq!(moves, [], "it holds nothing");
    let replace = ReplaceBroker { old, new, seed: 1, validate_only: true };
    let (moves, more) = cluster.moves(MetadataCommand::ReplaceBroker(replace));
    assert_eq!((moves.len(), more), (3, false), "two of the topic, one of the metadata");
    let survivor = *entry(&cluster, tp).replicas().first().expect("three");
    let lost = entry(&cluster, tp).replicas()[1..].iter().map(|place| place.replica).collect();
    let asked = RecoverPartition { validate_only: true, ..recovery(&mut cluster, tp, survivor, lost) };
    let reply = cluster.run(MetadataCommand::RecoverPartition(asked)).expect("two of three are lost");
    assert!(matches!(reply, MetadataReply::Recovered { given_up } if given_up.len() == 3));
    assert_eq!(cluster.log.len(), written);
}

#[test]
fn leaders_are_what_members_say_and_never_go_back() {
    let mut cluster = Cluster::of(4);
    cluster.create_on("t", &[&[1, 2, 3]]);
    let tp = only(&cluster, "t");
    let leader =
        |cluster: &Cluster| entry(cluster, tp).leader().map(|Leader { broker, epoch }| (broker.get(), epoch.get()));
    let tell = |cluster: &mut Cluster, from: i32, replica: ReplicaId, epoch: i32| {
        let leaders = vec![Leadership { tp, replica, epoch: LeaderEpoch::new(epoch) }];
        cluster.run(MetadataCommand::LeadersChanged { broker: BrokerId::new(from), leaders }).expect("taken in");
    };
    let replicas: Vec<ReplicaId> = entry(&cluster, tp).replicas().iter().map(|place| place.replica).collect();
    assert_eq!(leader(&cluster), None);
    tell(&mut cluster, 2, replicas[1], 3);
    assert_eq!(leader(&cluster), Some((2, 3)));
    for (from, replica, epoch) in
        [(1, replicas[0], 2), (1, replicas[0], 3), (4, replicas[0], 9), (1, ReplicaId::new(1), 9)]
    {
        let written = cluster.log.len();
        tell(&mut cluster, from, replica, epoch);
        assert_eq!((leader(&cluster), cluster.log.len()), (Some((2, 3)), written), "from {from} in epoch {epoch}");
    }
    assert_eq!(cluster.table().load(BrokerId::new(2)).leads, 1);
    tell(&mut cluster, 3, replicas[2], 4);
    assert_eq!(leader(&cluster), Some((3, 4)));
    assert_eq!(cluster.table().load(BrokerId::new(2)).leads, 0);
    cluster.move_to("t", 0, &[1, 2, 4]).expect("moves");
    assert_eq!(leader(&cluster), Some((3, 4)), "it leads until it has handed over");
    progress(&mut cluster, tp, true, &[]);
    assert_eq!(leader(&cluster), Some((3, 4)));
    // Two terms in one heartbeat, the later one first.
    let of = |replica: usize, epoch: i32| Leadership { tp, replica: replicas[replica], epoch: LeaderEpoch::new(epoch) };
    let leaders = vec![of(2, 8), of(2, 6)];
    cluster.run(MetadataCommand::LeadersChanged { broker: BrokerId::new(3), leaders }).expect("taken in");
    assert_eq!(leader(&cluster), Some((3, 8)));
    // A partition that is gone, or a topic, is no reason for trouble.
    let gone = TopicPartition { topic: TopicId::new(5), ..tp };
    let leaders = vec![Leadership { tp: gone, replica: replicas[0], epoch: LeaderEpoch::new(9) }];
    cluster.run(MetadataCommand::LeadersChanged { broker: BrokerId::new(1), leaders }).expect("ignored");
}

#[test]
fn whoever_follows_is_told_of_the_topics_that_changed_and_not_of_leaders() {
    let mut cluster = Cluster::of(3);
    cluster.create("a", 2, 3);
    cluster.create("b", 2, 3);
    let changed = |cluster: &Cluster, since| {
        let names: Vec<&str> = cluster.table().changed_since(since).map(|topic| topic.name.as_str()).collect();
        names.join(" ")
    };
    let start = cluster.table().applied();
    assert_eq!(changed(&cluster, start), "");
    let tp = only(&cluster, "b");
    cluster.lead(tp, 1, 1);
    assert_eq!(changed(&cluster, start), "", "nobody has to do anything");
    let turned: Vec<i32> = brokers_of(entry(&cluster, tp).replicas()).into_iter().rev().collect();
    cluster.move_to("b", 0, &turned).expect("another order");
    cluster.create("c", 1, 1);
    assert_eq!(changed(&cluster, start), "b c");
    let later = cluster.table().applied();
    cluster.run(MetadataCommand::DeleteTopic { name: "c".to_owned() }).expect("deleted");
    assert_eq!(changed(&cluster, later), "");
    assert_eq!(changed(&cluster, Offset::new(-1)), format!("{METADATA_TOPIC} a b"), "each once");
}

#[test]
fn a_topic_is_deleted_while_a_broker_is_down_and_its_name_begins_anew() {
    let mut cluster = Cluster::of(3);
    cluster.create("t", 2, 3);
    let (before, since) = (cluster.topic("t").id, cluster.table().applied());
    cluster.fence(2);
    cluster.run(MetadataCommand::DeleteTopic { name: "t".to_owned() }).expect("nobody has to be asked");
    cluster.create("t", 1, 2);
    assert_ne!(cluster.topic("t").id, before);
    assert_eq!(cluster.table().deleted_since(since), Some(vec![before]), "its brokers learn of it when they are back");
    assert!(cluster.table().topic(before).is_none());
    // What its leader still tells is of a partition that is gone.
    let tp = TopicPartition { topic: before, partition: 0.into() };
    let late = MoveProgress { tp, may_remove: true, removed: Vec::new(), wanted: Vec::new(), seed: 1 };
    cluster.run(MetadataCommand::MoveProgress(late)).expect("ignored");
    let late = MetadataCommand::ReplaceReplica { tp, replica: ReplicaId::new(1), seed: 1 };
    cluster.run(late).expect("ignored");
}

#[test]
fn progress_counts_for_the_change_that_it_is_of() {
    let mut cluster = Cluster::of(5);
    cluster.create_on("t", &[&[1, 2, 3]]);
    let tp = only(&cluster, "t");
    cluster.move_to("t", 0, &[4, 2, 3]).expect("moves");
    let of_first: Vec<ReplicaId> = entry(&cluster, tp).replicas().iter().map(|place| place.replica).collect();
    cluster.run(MetadataCommand::CancelMove { topic: "t".to_owned(), partition: 0 }).expect("cancelled");
    cluster.finish_moves();
    cluster.move_to("t", 0, &[5, 2, 3]).expect("moves");
    let late = MoveProgress { tp, may_remove: true, removed: Vec::new(), wanted: of_first, seed: 1 };
    cluster.run(MetadataCommand::MoveProgress(late)).expect("ignored");
    assert!(!entry(&cluster, tp).may_remove(), "broker 5 has not caught up");
    progress(&mut cluster, tp, true, &[]);
    assert!(entry(&cluster, tp).may_remove());
}

#[test]
fn added_partitions_go_where_the_topic_has_few() {
    let mut cluster = Cluster::of(3);
    cluster.create("other", 30, 1);
    cluster.create_on("t", &[&[1], &[1], &[1]]);
    let alter = AlterTopic {
        name: "t".to_owned(),
        set: Vec::new(),
        unset: Vec::new(),
        partitions: 9,
        seed: 5,
        validate_only: false,
    };
    cluster.run(MetadataCommand::AlterTopic(alter)).expect("more");
    let mut counts = [0; 3];
    for (_, entry) in cluster.topic("t").entries() {
        counts[entry.replicas()[0].broker.get() as usize - 1] += 1;
    }
    assert_eq!(counts, [3, 3, 3]);
}

#[test]
fn a_voter_of_the_metadata_changes_places_with_an_observer() {
    let mut cluster = Cluster::of(5);
    assert_eq!(observers(&cluster), [4, 5]);
    let observer = broker(&cluster, 4).metadata_replica;
    cluster.fence(3);
    cluster.move_to(METADATA_TOPIC, 0, &[1, 2, 4]).expect("moves");
    let moving = entry(&cluster, METADATA_PARTITION);
    assert_eq!(moving.replicas()[2].replica, observer, "it has followed under this id, and votes under it");
    assert_eq!(observers(&cluster), [5]);
    cluster.finish_moves();
    let left = broker(&cluster, 3);
    assert_eq!(observers(&cluster), [3, 5], "who votes no more observes");
    assert_ne!(left.metadata_replica, ReplicaId::new(1_003), "under an id that never was");
    assert!(left.fenced, "it is down all the same");

    // Back, and given up half way: whoever was to vote observes again, under another id once more.
    let joined = broker(&cluster, 5).metadata_replica;
    cluster.move_to(METADATA_TOPIC, 0, &[1, 2, 5]).expect("moves");
    cluster.run(MetadataCommand::CancelMove { topic: METADATA_TOPIC.to_owned(), partition: 0 }).expect("cancelled");
    cluster.finish_moves();
    assert_eq!(brokers_of(entry(&cluster, METADATA_PARTITION).replicas()), [1, 2, 4]);
    assert_eq!(observers(&cluster), [3, 5]);
    assert_ne!(broker(&cluster, 5).metadata_replica, joined);
}

#[test]
fn lost_replicas_of_the_metadata_come_back_under_new_ids() {
    let mut cluster = Cluster::of(4);
    let lost = |cluster: &mut Cluster, replica: ReplicaId| {
        let seed = cluster.draw();
        cluster.run(MetadataCommand::ReplaceReplica { tp: METADATA_PARTITION, replica, seed }).expect("replaced");
    };
    let observer = broker(&cluster, 4).metadata_replica;
    lost(&mut cluster, observer);
    assert_ne!(broker(&cluster, 4).metadata_replica, observer);
    assert!(!entry(&cluster, METADATA_PARTITION).is_changing(), "an observer is no voter");

    lost(&mut cluster, ReplicaId::new(1_002));
    let after = entry(&cluster, METADATA_PARTITION);
    assert_eq!(brokers_of(after.replicas()), [1, 2, 3]);
    assert_eq!(after.replicas()[1].replica, broker(&cluster, 2).metadata_replica);
    assert!(after.may_remove() && !after.is_founder(after.replicas()[1].replica));
    cluster.finish_moves();
    assert_eq!(observers(&cluster), [4]);
    assert_eq!(entry(&cluster, METADATA_PARTITION).founders().len(), 3, "the founding stays what it was");
}

#[test]
fn one_survivor_of_the_metadata_goes_on_and_all_others_come_to_it_anew() {
    let mut cluster = Cluster::of(5);
    cluster.create("t", 2, 3);
    let topic = only(&cluster, "t");
    let voted = entry(&cluster, topic).replicas()[0].replica;
    assert!(entry(&cluster, topic).is_founder(voted));
    let survivor = entry(&cluster, METADATA_PARTITION).replicas()[1];
    let before: Vec<ReplicaId> = (1..=5).map(|id| broker(&cluster, id).metadata_replica).collect();
    let lost = vec![ReplicaId::new(1_001), ReplicaId::new(1_003)];
    cluster.fence(3);
    let recover = RecoverPartition {
        survives_as: Some(ReplicaId::new(77)),
        ..recovery(&mut cluster, METADATA_PARTITION, survivor, lost)
    };
    cluster.run(MetadataCommand::RecoverPartition(recover)).expect("it leads already");
    let after = entry(&cluster, METADATA_PARTITION);
    assert_eq!(after.replicas()[0], Place { replica: ReplicaId::new(77), ..survivor });
    assert_eq!(brokers_of(after.replicas())[..2], [2, 1], "those who are there begin anew beside it");
    assert!([4, 5].contains(&brokers_of(after.replicas())[2]), "in place of the one that is down");
    assert_eq!(after.founders(), []);
    for (id, before) in (1..=5).zip(before) {
        assert_ne!(broker(&cluster, id).metadata_replica, before, "broker {id}: the group knows none of the old ids");
    }
    assert!(broker(&cluster, 3).fenced);
    assert_eq!(cluster.table().recoveries().count(), 1);
    assert!(!entry(&cluster, topic).is_founder(voted), "what it says of others may be from long ago");
    let first = cluster.table().recovery();
    let mut restored = MetadataTable::new(MetadataRules::default());
    restored.restore(&cluster.table().checkpoint()).expect("its own");
    assert_eq!(restored.recovery(), first);
    assert!(!restored.partition(topic).expect("there").is_founder(voted));
    // The next one is a later one, whatever the clock says.
    let again = RecoverPartition {
        survives_as: Some(ReplicaId::new(78)),
        ..recovery(&mut cluster, METADATA_PARTITION, after.replicas()[0], Vec::new())
    };
    cluster.run(MetadataCommand::RecoverPartition(again)).expect("it leads already");
    assert!(cluster.table().recovery() > first);
}

#[test]
fn the_table_follows_a_survivor_of_the_metadata_that_leads_already() {
    // An observer, which the table believes to be down, as it does of nobody else.
    let mut cluster = Cluster::of(4);
    cluster.fence(4);
    let observer = cluster.table().observers().next().expect("one");
    assert_eq!(observer.broker.get(), 4);
    let recover = recovery(&mut cluster, METADATA_PARTITION, observer, Vec::new());
    cluster.run(MetadataCommand::RecoverPartition(recover.clone())).expect_err("the voters seem to be alive");
    let recover = RecoverPartition { survives_as: Some(ReplicaId::new(77)), ..recover };
    cluster.run(MetadataCommand::RecoverPartition(recover)).expect("it goes on already");
    let after = entry(&cluster, METADATA_PARTITION);
    assert_eq!(after.replicas()[0], Place { replica: ReplicaId::new(77), ..observer });
    assert_eq!(broker(&cluster, 4).metadata_replica, ReplicaId::new(77));
}

#[test]
fn a_recovered_partition_counts_its_leaders_anew() {
    let mut cluster = Cluster::of(4);
    cluster.create_on("t", &[&[1, 2, 3]]);
    let tp = only(&cluster, "t");
    cluster.lead(tp, 1, 9);
    let replicas = entry(&cluster, tp).replicas().to_vec();
    cluster.fence(1);
    cluster.fence(2);
    let recover = recovery(&mut cluster, tp, replicas[2], Vec::new());
    let reply = cluster.run(MetadataCommand::RecoverPartition(recover)).expect("two of three are gone");
    let MetadataReply::Recovered { given_up } = reply else { panic!("{reply:?}") };
    assert_eq!(given_up, replicas);
    let after = entry(&cluster, tp);
    let survivor = after.replicas()[0];
    assert_eq!(survivor.broker.get(), 3);
    assert_eq!(after.leader(), None, "whoever led before leads no more");
    assert_eq!(after.recovered().map(|recovered| recovered.from), Some(replicas[2].replica));
    assert_eq!(after.replicas().len(), 3);
    assert!(brokers_of(after.replicas()).contains(&4), "a live broker comes first: {:?}", after.replicas());
    // The survivor had not heard of the last elections: its epochs may begin below.
    let leaders = vec![Leadership { tp, replica: survivor.replica, epoch: LeaderEpoch::new(7) }];
    cluster.run(MetadataCommand::LeadersChanged { broker: BrokerId::new(3), leaders }).expect("taken in");
    // The one that was given up comes back, and still believes to lead.
    cluster.restart(1);
    let stale = vec![Leadership { tp, replica: replicas[0].replica, epoch: LeaderEpoch::new(9) }];
    cluster.run(MetadataCommand::LeadersChanged { broker: BrokerId::new(1), leaders: stale }).expect("ignored");
    assert_eq!(entry(&cluster, tp).leader().map(|leader| (leader.broker.get(), leader.epoch.get())), Some((3, 7)));
    let recovery = cluster.table().recoveries().next().expect("kept for the record");
    assert_eq!((recovery.tp, recovery.reason.as_str(), recovery.given_up.len()), (tp, "the others burnt", 3));
    assert!(recovery.at.get() > 0);
}

#[test]
fn founders_that_are_late_know_the_group_as_it_began() {
    // Broker 3 was down when the topic was made, and one of the others was replaced since.
    let mut cluster = Cluster::of(4);
    cluster.create_on("t", &[&[1, 2, 3]]);
    let tp = only(&cluster, "t");
    let founders = entry(&cluster, tp).founders();
    cluster.move_to("t", 0, &[4, 2, 3]).expect("moves");
    cluster.finish_moves();
    let after = entry(&cluster, tp);
    assert_eq!(after.founders(), founders);
    assert!(after.is_founder(after.replicas()[2].replica) && !after.is_founder(after.replicas()[0].replica));
}

#[test]
fn brokers_that_come_back_wiped_together_are_given_replicas_by_the_one_that_leads() {
    let mut cluster = Cluster::of(3);
    cluster.create_on("t", &[&[1, 2, 3]]);
    let tp = only(&cluster, "t");
    cluster.fence(1);
    cluster.fence(2);
    let survivor = entry(&cluster, tp).replicas().iter().copied().find(|place| place.broker.get() == 3).expect("there");
    let recover = recovery(&mut cluster, tp, survivor, Vec::new());
    cluster.run(MetadataCommand::RecoverPartition(recover)).expect("two of three are gone");
    let learners: Vec<Place> = entry(&cluster, tp).replicas()[1..].to_vec();
    assert_eq!(learners.len(), 2, "they begin anew when they are back");
    // Both at once, with empty disks.
    for id in [1, 2] {
        cluster.try_register(id, 10 + id as u128).expect("its session has ended");
    }
    let wants = |cluster: &Cluster| {
        let due = super::upkeep::due(cluster.table(), 9, 1);
        due.into_iter().filter(|due| matches!(due, MetadataCommand::ReplaceReplica { tp: of, .. } if *of == tp)).count()
    };
    assert_eq!(wants(&cluster), 0, "nobody leads");
    cluster.lead(tp, 3, 9);
    assert_eq!(wants(&cluster), 2);
    let due = super::upkeep::due(cluster.table(), 9, 1);
    for command in due {
        // The metadata's own voters are not what this is about.
        drop(cluster.run(command));
    }
    let after = entry(&cluster, tp);
    for place in after.replicas() {
        assert_eq!(place.directory, broker(&cluster, place.broker.get()).directory);
    }
    assert_eq!(after.leaving(), learners);
}

#[test]
fn what_a_group_can_be_in_the_middle_of_a_move_decides_on_its_recovery() {
    let mut cluster = Cluster::of(4);
    cluster.create_on("t", &[&[1, 2, 3]]);
    let tp = only(&cluster, "t");
    cluster.move_to("t", 0, &[4, 2, 3]).expect("begun");
    let survivor = entry(&cluster, tp).replicas().iter().copied().find(|place| place.broker.get() == 3).expect("there");
    cluster.fence(4);
    let recover = recovery(&mut cluster, tp, survivor, Vec::new());
    cluster.run(MetadataCommand::RecoverPartition(recover)).expect_err("three of four are alive");
    // The new one may vote by now: then two of four are gone, and nobody leads.
    cluster.fence(2);
    let recover = recovery(&mut cluster, tp, survivor, Vec::new());
    cluster.run(MetadataCommand::RecoverPartition(recover)).expect("needed");
}

#[test]
fn a_creation_whose_answer_was_lost_is_the_same_one_when_it_comes_again() {
    let mut cluster = Cluster::of(3);
    let creation = cluster.creation("orders", 2, 3);
    cluster.run(MetadataCommand::CreateTopic(creation.clone())).expect("created");
    let written = cluster.log.len();
    let MetadataReply::Topic(topic) =
        cluster.run(MetadataCommand::CreateTopic(creation.clone())).expect("it is its own")
    else {
        panic!("another answer");
    };
    assert_eq!((topic.id, cluster.log.len()), (creation.topic_id, written), "nothing new");
    let other = cluster.creation("orders", 2, 3);
    let error = cluster.run(MetadataCommand::CreateTopic(other)).expect_err("somebody else's");
    assert_eq!(error.code, flowstone_protocol::ErrorCode::TopicAlreadyExists);
}
