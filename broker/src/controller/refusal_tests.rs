//! Commands that are refused, a row each: the code, what the message says, and how it ends: with what to do.

use flowstone_protocol::{BrokerId, Error, ErrorCode, PartitionId, ReplicaId, TopicId, TopicPartition};

use super::commands::{AlterTopic, CreateTopic, MetadataCommand, MovePartition, RecoverPartition, ReplaceBroker};
use super::table::{METADATA_TOPIC, Place};
use super::testing::{Cluster, registration};

/// Brokers 1 to 3 with a topic `t` on them and `pair` on 1 and 2; broker 4 is down, 5 is draining.
fn world() -> Cluster {
    let mut cluster = Cluster::of(5);
    cluster.create_on("t", &[&[1, 2, 3]]);
    cluster.create_on("pair", &[&[1, 2]]);
    cluster.create_on("single", &[&[1]]);
    cluster.fence(4);
    cluster.run(drain(5)).expect("there are others");
    cluster
}

fn drain(id: i32) -> MetadataCommand {
    MetadataCommand::DrainBroker { broker: BrokerId::new(id), undo: false, seed: 1, validate_only: false }
}

fn move_to(topic: &str, partition: i32, brokers: &[i32]) -> MetadataCommand {
    MetadataCommand::MovePartition(MovePartition {
        topic: topic.to_owned(),
        partition,
        brokers: brokers.iter().copied().map(BrokerId::new).collect(),
        seed: 1,
        validate_only: false,
    })
}

fn replace(old: i32, new: i32) -> MetadataCommand {
    let (old, new) = (BrokerId::new(old), BrokerId::new(new));
    MetadataCommand::ReplaceBroker(ReplaceBroker { old, new, seed: 1, validate_only: false })
}

fn create(name: &str, partitions: i32, replicas: i32, configs: &[(&str, &str)]) -> MetadataCommand {
    MetadataCommand::CreateTopic(CreateTopic {
        name: name.to_owned(),
        partitions,
        replication_factor: replicas,
        configs: configs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        topic_id: TopicId::new(77),
        seed: 1,
        validate_only: false,
    })
}

fn alter(name: &str, partitions: i32, configs: &[(&str, &str)], unset: &[&str]) -> MetadataCommand {
    MetadataCommand::AlterTopic(AlterTopic {
        name: name.to_owned(),
        set: configs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        unset: unset.iter().map(|key| (*key).to_owned()).collect(),
        partitions,
        seed: 1,
        validate_only: false,
    })
}

fn places(cluster: &Cluster, topic: &str) -> (TopicPartition, Vec<Place>) {
    let topic = cluster.topic(topic);
    let (tp, entry) = topic.entries().next().expect("one");
    (tp, entry.places().copied().collect())
}

fn recover(cluster: &Cluster, topic: &str, survivor: Option<usize>, lost: &[usize], reason: &str) -> MetadataCommand {
    let (tp, places) = places(cluster, topic);
    MetadataCommand::RecoverPartition(RecoverPartition {
        tp,
        survivor: survivor.map_or(ReplicaId::new(5), |survivor| places[survivor].replica),
        survives_as: None,
        known_lost: lost.iter().map(|lost| places[*lost].replica).collect(),
        reason: reason.to_owned(),
        seed: 1,
        validate_only: false,
    })
}

#[track_caller]
fn check(cluster: &mut Cluster, command: MetadataCommand, code: ErrorCode, says: &str, end: &str) -> Error {
    let written = cluster.log.len();
    let error = cluster.run(command).expect_err(says);
    assert_eq!(error.code, code, "{error:?}");
    assert!(error.message.contains(says), "`{}` does not say `{says}`", error.message);
    assert!(error.message.ends_with(end), "`{}` does not end with `{end}`", error.message);
    assert_eq!(cluster.log.len(), written, "what is refused writes nothing");
    error
}

#[test]
fn topics() {
    use ErrorCode::{
        InternalTopic, InvalidConfig, InvalidPartitions, InvalidReplicationFactor, InvalidTopicName,
        TopicAlreadyExists, UnknownTopic,
    };
    let c = &mut world();
    check(c, create("a b", 1, 1, &[]), InvalidTopicName, "' '", "");
    check(c, create("__x", 1, 1, &[]), InternalTopic, "the cluster's own", "never written or changed");
    check(c, create("t", 1, 1, &[]), TopicAlreadyExists, "`t` exists", "or delete that one first");
    check(c, create("n", -1, 1, &[]), InvalidPartitions, "-1 partitions", "or raise limits.partitions_per_topic");
    check(c, create("n", 2_001, 1, &[]), InvalidPartitions, "1 to 2000", "or raise limits.partitions_per_topic");
    check(c, create("n", 1, -1, &[]), InvalidReplicationFactor, "-1 replica(s)", "ask for 1 to 4");
    check(c, create("n", 1, 6, &[]), InvalidReplicationFactor, "6 replica(s)", "ask for 1 to 4");
    check(c, create("n", 1, 3, &[("min.insync.replicas", "3")]), InvalidConfig, "majority (2)", "lower it to 2");
    check(c, create("n", 1, 1, &[("retension.ms", "1")]), InvalidConfig, "unknown", "did you mean `retention.ms`?");
    let twice = [("retention.ms", "1"), ("retention.ms", "2")];
    check(c, create("n", 1, 1, &twice), InvalidConfig, "given twice", "give it once");
    check(c, alter("nope", 2, &[], &[]), UnknownTopic, "no topic `nope`", "create it first");
    check(c, alter(METADATA_TOPIC, 2, &[], &[]), InternalTopic, "the cluster's own", "never written or changed");
    check(c, alter("t", -3, &[], &[]), InvalidPartitions, "-3 partitions", "or raise limits.partitions_per_topic");
    check(c, alter("pair", 0, &[("min.insync.replicas", "3")], &[]), InvalidConfig, "majority (2)", "lower it to 2");
    check(c, alter("t", 0, &[("retention.ms", "1")], &["retention.ms"]), InvalidConfig, "both", "do one of them");
    check(c, alter("t", 0, &[], &["colour"]), InvalidConfig, "unknown topic config `colour`", "segment.ms");
    c.run(alter("t", 5, &[], &[])).expect("more partitions");
    check(c, alter("t", 4, &[], &[]), InvalidPartitions, "only ever added", "or create another topic");
    let gone = MetadataCommand::DeleteTopic { name: "nope".to_owned() };
    check(c, gone, UnknownTopic, "no topic `nope`", "create it first");
    let own = MetadataCommand::DeleteTopic { name: METADATA_TOPIC.to_owned() };
    check(c, own, InternalTopic, "the cluster's own", "never written or changed");
    // Whoever is down is there later; but a majority has to begin.
    c.fence(3);
    let down = "start the brokers that are down, or ask for 1 to 3";
    check(c, create("n", 1, 4, &[]), InvalidReplicationFactor, "of 5 broker(s) 2 can take one", down);
    for id in [1, 2] {
        c.fence(id);
    }
    check(c, create("n", 1, 1, &[]), InvalidReplicationFactor, "0 can take one", "or stop draining one");
    // What one partition has is what counts.
    let c = &mut world();
    c.move_to("t", 0, &[1]).expect("to fewer");
    check(c, alter("t", 0, &[("min.insync.replicas", "2")], &[]), InvalidConfig, "majority (1)", "lower it to 1");
}

#[test]
fn brokers() {
    use ErrorCode::InvalidRequest;
    let c = &mut world();
    let register = |id: i32, directory: u128| MetadataCommand::RegisterBroker(registration(id, directory, "", 5));
    check(c, register(-1, 9), InvalidRequest, "below 0", "one of 0 and above");
    check(c, register(6, 1), InvalidRequest, "is broker 1's", "or with an empty node.data_dir");
    let error = check(c, register(1, 9), InvalidRequest, "another data directory", "(limits.broker_session_timeout)");
    assert!(error.is_retriable(), "the other one may be dead, and nobody has noticed yet");

    let named = "name one of 1, 2, 3, 4, 5";
    check(c, drain(9), InvalidRequest, "no broker 9", named);
    let undo = MetadataCommand::DrainBroker { broker: BrokerId::new(9), undo: true, seed: 1, validate_only: false };
    check(c, undo, InvalidRequest, "no broker 9", named);
    let error = check(c, drain(1), InvalidRequest, "no other broker", "or move the partition to fewer replicas, first");
    assert!(error.message.contains("partition 0 (on 1, 2, 3)"), "{}", error.message);

    let decommission = |id: i32| MetadataCommand::DecommissionBroker { broker: BrokerId::new(id) };
    check(c, decommission(9), InvalidRequest, "no broker 9", named);
    check(c, decommission(1), InvalidRequest, "still holds 4 replica(s)", "flowstone broker-admin drain 1");
    c.fence(1);
    check(c, decommission(1), InvalidRequest, "it is down", "flowstone broker-admin replace 1 NEW");

    check(c, replace(9, 2), InvalidRequest, "no broker 9", named);
    check(c, replace(1, 9), InvalidRequest, "no broker 9", named);
    check(c, replace(1, 1), InvalidRequest, "cannot replace itself", "name the broker that takes over");
    check(c, replace(2, 3), InvalidRequest, "is alive", "flowstone broker-admin drain 2");
    check(c, replace(1, 4), InvalidRequest, "is down", "start it, or name another one");
    check(c, replace(1, 5), InvalidRequest, "is draining", "stop draining it, or name another one");
    check(c, replace(1, 2), InvalidRequest, "replica on broker 2 already", "or move the partition to fewer replicas");

    // It was emptied and is waited for; then it is gone for good.
    let c = &mut world();
    c.run(decommission(5)).expect("it holds nothing");
    check(c, register(5, 5), InvalidRequest, "was decommissioned", "start it with an empty node.data_dir");
    check(c, register(7, 5), InvalidRequest, "was broker 5's", "start it with an empty node.data_dir");
}

#[test]
fn draining_waits_for_what_is_under_way() {
    let c = &mut Cluster::of(4);
    c.create_on("t", &[&[1, 2, 3]]);
    c.run(drain(1)).expect("broker 4 takes it");
    let left = "still holds 2 replica(s), and forgetting it would lose them; wait until it is empty";
    let decommission = || MetadataCommand::DecommissionBroker { broker: BrokerId::new(1) };
    check(c, decommission(), ErrorCode::InvalidRequest, left, "wait until it is empty");
    c.move_to("t", 0, &[4, 2, 3]).expect("moved");
    check(c, decommission(), ErrorCode::InvalidRequest, left, "wait until it is empty");
}

#[test]
fn moves() {
    use ErrorCode::{InvalidConfig, InvalidRequest, UnknownPartition, UnknownTopic};
    let c = &mut world();
    check(c, move_to("nope", 0, &[1]), UnknownTopic, "no topic `nope`", "create it first");
    check(c, move_to("t", 7, &[1]), UnknownPartition, "no partition 7", "name one of 0 to 0");
    check(c, move_to("t", -1, &[1]), UnknownPartition, "no partition -1", "name one of 0 to 0");
    check(c, move_to("t", 0, &[]), InvalidRequest, "at least one replica", "name the brokers that shall hold it");
    check(c, move_to("t", 0, &[1, 2, 1]), InvalidRequest, "broker 1 is named twice", "name it once");
    check(c, move_to("t", 0, &[1, 9]), InvalidRequest, "no broker 9", "name one of 1, 2, 3, 4, 5");
    check(c, move_to("t", 0, &[1, 4]), InvalidRequest, "broker 4 is down", "start it, or name another one");
    check(c, move_to("t", 0, &[1, 5]), InvalidRequest, "is draining", "stop draining it, or name another one");
    c.run(alter("t", 0, &[("min.insync.replicas", "2")], &[])).expect("a majority of three");
    check(c, move_to("t", 0, &[1]), InvalidConfig, "above the majority (1)", "lower it to 1");

    let cancel = |topic: &str, partition| MetadataCommand::CancelMove { topic: topic.to_owned(), partition };
    check(c, cancel("nope", 0), UnknownTopic, "no topic `nope`", "create it first");
    check(c, cancel("t", 3), UnknownPartition, "no partition 3", "name one of 0 to 0");
    check(c, cancel("pair", 0), InvalidRequest, "is not being moved", "flowstone partition list --moving");
    c.run(move_to("pair", 0, &[3, 2])).expect("moves");
    let wait = "flowstone partition cancel-move pair 0";
    check(c, move_to("pair", 0, &[1, 3]), InvalidRequest, "is being moved already", wait);
    c.run(cancel("pair", 0)).expect("there is a way back");
    check(c, cancel("pair", 0), InvalidRequest, "past the point of return", "then move it back");
}

#[test]
fn lost_replicas() {
    use ErrorCode::{InvalidRequest, UnknownPartition, UnknownTopic};
    let c = &mut world();
    let lost = |c: &Cluster, topic: &str, which: usize| {
        let (tp, places) = places(c, topic);
        MetadataCommand::ReplaceReplica { tp, replica: places[which].replica, seed: 1 }
    };
    let command = lost(c, "single", 0);
    check(c, command, InvalidRequest, "no majority", "flowstone partition recover single 0");
    let command = lost(c, "pair", 1);
    check(c, command, InvalidRequest, "no majority", "flowstone partition recover pair 0");
    let command = lost(c, "t", 0);
    c.run(command).expect("two of three are left");
    let command = lost(c, "t", 1);
    check(c, command, InvalidRequest, "no majority", "flowstone partition recover t 0");

    let c = &mut world();
    let command = recover(c, "t", Some(0), &[], " ");
    check(c, command, InvalidRequest, "for the record", "give the reason for it");
    let command = recover(c, "t", None, &[], "why");
    check(c, command, InvalidRequest, "replica 5 is none of topic `t`", "name a broker that has one: 1, 2, 3");
    let command = recover(c, "t", Some(0), &[2], "why");
    check(c, command, InvalidRequest, "alive (brokers 1, 2)", "flowstone cluster health");
    let command = recover(c, "single", Some(0), &[], "why");
    check(c, command, InvalidRequest, "alive (brokers 1)", "flowstone cluster health");
    c.fence(2);
    c.fence(3);
    let command = recover(c, "t", Some(1), &[], "why");
    check(c, command, InvalidRequest, "broker 2 is down", "start it first");
    c.try_register(3, 33).expect("another directory");
    let command = recover(c, "t", Some(2), &[], "why");
    check(c, command, InvalidRequest, "another data directory now", "name another one of brokers 1, 2");
    let recovering = |tp| {
        let (known_lost, reason) = (Vec::new(), "why".to_owned());
        let survivor = ReplicaId::new(1);
        let recover =
            RecoverPartition { tp, survivor, survives_as: None, known_lost, reason, seed: 1, validate_only: false };
        MetadataCommand::RecoverPartition(recover)
    };
    let (tp, _) = places(c, "t");
    let other = TopicPartition { partition: PartitionId::new(4), ..tp };
    check(c, recovering(other), UnknownPartition, "no partition 4", "name one of 0 to 0");
    let other = TopicPartition { topic: TopicId::new(4), ..tp };
    check(c, recovering(other), UnknownTopic, "there is no topic", "create it first");
    let command = recover(c, "t", Some(0), &[], "two disks burnt");
    c.run(command).expect("one of three is left");

    let c = &mut world();
    c.fence(1);
    c.try_register(1, 11).expect("another directory");
    let command = recover(c, "single", Some(0), &[], "why");
    check(c, command, InvalidRequest, "nothing is left of it", "flowstone topic delete single");
}

#[test]
fn limits() {
    use ErrorCode::{InvalidPartitions, InvalidRequest};
    let c = &mut Cluster::of(1);
    for topic in 0..5 {
        c.create(&format!("big-{topic}"), 2_000, 1);
    }
    check(c, create("n", 1, 1, &[]), InvalidPartitions, "10001 partitions", "or raise limits.partitions");
    let c = &mut Cluster::of(1);
    for topic in 0..100 {
        c.create(&format!("small-{topic}"), 1, 1);
    }
    check(c, create("n", 1, 1, &[]), InvalidRequest, "100 topics, its limit", "or raise limits.topics");
}

#[test]
fn releases_that_do_not_know_what_the_cluster_writes() {
    let c = &mut world();
    let registration = super::commands::Registration { feature_level: 0, ..registration(9, 9, "", 1) };
    let register = MetadataCommand::RegisterBroker(registration);
    check(c, register, ErrorCode::InvalidRequest, "knows up to 0", "start it with a newer release");
}

#[test]
fn a_replacement_leaves_out_what_has_no_majority_without_the_dead_broker() {
    let mut c = world();
    c.register(6);
    c.fence(1);
    let (moves, more) = c.moves(replace(1, 6));
    let topics: Vec<&str> = moves.iter().map(|planned| planned.topic.as_str()).collect();
    assert!(topics.contains(&"t") && !topics.contains(&"pair") && !topics.contains(&"single"), "{topics:?}");
    assert!(!more);
    assert!(c.topic("single").entries().all(|(_, entry)| !entry.is_changing()));
}
