//! The metadata behind its shell: what is decided, taken in, checkpointed and taken up again.

use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::internal::MetadataRecord;
use flowstone_protocol::{
    BatchHeader, BrokerId, ClusterId, DirectoryId, Error, ErrorCode, LeaderEpoch, Offset, RaftIndex, ReplicaId, Term,
    Timestamp, TopicId,
};
use flowstone_replication::{Commanded, MachineBody, MachineEntry};
use prost::Message;

use super::commands::{
    AlterTopic, CreateTopic, Leadership, MetadataCommand, MetadataReply, MovePartition, MoveProgress, RecoverPartition,
    ReplaceBroker,
};
use super::placement::Draws;
use super::table::{METADATA_TOPIC, MetadataTable, Place, Topic};
use super::testing::{Cluster, registration, rules};
use crate::coordinator::{Coordinator, Published, StateMachine};

/// One replica of the metadata: a log in memory, and what is committed of it.
struct Controller {
    machine: Coordinator<MetadataTable>,
    view: Published<MetadataTable>,
    log: Vec<Bytes>,
    end: i64,
    committed: usize,
}

impl Controller {
    fn new() -> Self {
        let (machine, view) = Coordinator::new(MetadataTable::new(rules()));
        Self { machine, view, log: Vec::new(), end: 0, committed: 0 }
    }

    fn founded() -> Self {
        let mut controller = Self::new();
        controller.machine.lead(Term::new(1));
        let voter = Place { broker: BrokerId::new(1), directory: DirectoryId::new(7), replica: ReplicaId::new(70) };
        controller
            .run(MetadataCommand::Found { cluster: ClusterId::new(9), voters: vec![voter], feature_level: 1 })
            .expect("founded");
        controller.run(register(1, 7)).expect("registered");
        controller
    }

    fn entry<R>(batch: &Bytes, index: usize, offset: i64, then: impl FnOnce(&MachineEntry<'_>) -> R) -> R {
        let header = BatchHeader::parse(batch).expect("built by the shell");
        then(&MachineEntry {
            index: RaftIndex::new(index as u64 + 1),
            term: Term::new(1),
            base_offset: Offset::new(offset),
            header: &header,
            body: MachineBody::Records(batch),
        })
    }

    /// The leader's part: decided and appended, not committed.
    fn append(&mut self, command: MetadataCommand) -> Result<MetadataReply, Error> {
        let Commanded { batch, reply } = self.machine.command(command, Timestamp::new(1));
        if let Some(batch) = batch {
            Self::entry(&batch, self.log.len(), self.end, |entry| self.machine.appended(entry));
            self.end += BatchHeader::parse(&batch).expect("built by the shell").offsets();
            self.log.push(batch);
        }
        reply
    }

    fn commit(&mut self) {
        let mut offset = 0;
        for (index, batch) in self.log.iter().enumerate() {
            if index >= self.committed {
                Self::entry(batch, index, offset, |entry| self.machine.committed(entry));
            }
            offset += BatchHeader::parse(batch).expect("built by the shell").offsets();
        }
        self.committed = self.log.len();
    }

    fn run(&mut self, command: MetadataCommand) -> Result<MetadataReply, Error> {
        let reply = self.append(command);
        self.commit();
        reply
    }

    fn names(&self) -> Vec<String> {
        self.view.with(|table| table.topics().map(|topic| topic.name.clone()).collect())
    }

    fn checkpoint(&self) -> Bytes {
        self.machine.checkpoint()
    }
}

fn register(id: i32, directory: u128) -> MetadataCommand {
    MetadataCommand::RegisterBroker(registration(id, directory, "", 1))
}

fn create(name: &str, partitions: i32) -> MetadataCommand {
    let id = name.bytes().fold(1u128, |id, byte| id * 257 + u128::from(byte));
    MetadataCommand::CreateTopic(CreateTopic {
        name: name.to_owned(),
        partitions,
        replication_factor: 0,
        configs: vec![("retention.ms".to_owned(), "1d".to_owned())],
        topic_id: TopicId::new(id),
        seed: 1,
        validate_only: false,
    })
}

fn alter(name: &str, partitions: i32, set: &[(&str, &str)], unset: &[&str]) -> MetadataCommand {
    MetadataCommand::AlterTopic(AlterTopic {
        name: name.to_owned(),
        set: set.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        unset: unset.iter().map(|key| (*key).to_owned()).collect(),
        partitions,
        seed: 2,
        validate_only: false,
    })
}

fn delete(name: &str) -> MetadataCommand {
    MetadataCommand::DeleteTopic { name: name.to_owned() }
}

#[test]
fn commands_in_flight_see_each_other_and_readers_see_what_is_committed() {
    let mut controller = Controller::founded();
    controller.append(create("a", 1)).expect("created");
    let MetadataCommand::CreateTopic(other) = create("a", 1) else { unreachable!("it creates") };
    let other = MetadataCommand::CreateTopic(CreateTopic { topic_id: TopicId::new(2), ..other });
    let again = controller.append(other).expect_err("the first is in flight");
    assert_eq!(again.code, ErrorCode::TopicAlreadyExists);
    controller.append(delete("a")).expect("the first is in flight");
    controller.append(create("b", 2)).expect("created");
    assert_eq!(controller.names(), [METADATA_TOPIC], "nothing of it is committed");
    controller.commit();
    assert_eq!(controller.names(), [METADATA_TOPIC, "b"]);
}

#[test]
fn stepping_down_forgets_what_was_not_committed() {
    let mut controller = Controller::founded();
    controller.append(create("lost", 1)).expect("created");
    controller.machine.step_down();
    controller.log.pop();
    controller.end -= 1;
    let refused = controller.append(create("x", 1)).expect_err("it does not lead");
    assert_eq!(refused.code, ErrorCode::LeaderNotReady);
    controller.machine.lead(Term::new(2));
    controller.run(create("lost", 1)).expect("created anew");
    assert_eq!(controller.names(), [METADATA_TOPIC, "lost"]);
}

#[test]
fn a_checkpoint_and_the_replay_of_all_records_lead_to_the_same_state() {
    let mut controller = Controller::founded();
    let mut draws = Draws::from_seed(11);
    let name = |draw: u64| format!("topic-{}", draw % 12);
    for _ in 0..400 {
        let command = match draws.next() % 5 {
            0 | 1 => create(&name(draws.next()), 1 + (draws.next() % 4) as i32),
            2 => alter(&name(draws.next()), 0, &[("segment.ms", "1h")], &["retention.ms"]),
            3 => alter(&name(draws.next()), 1 + (draws.next() % 9) as i32, &[], &[]),
            _ => delete(&name(draws.next())),
        };
        // Many are refused, as names are taken or unknown: that is part of it.
        drop(controller.run(command));
    }
    assert!(controller.log.len() > 100, "{} changes are too few to tell", controller.log.len());

    let replayed = {
        let mut other = Controller::new();
        other.log = controller.log.clone();
        other.commit();
        other.checkpoint()
    };
    assert_eq!(replayed, controller.checkpoint());

    let mut restored = Controller::new();
    restored.machine.restore(&controller.checkpoint()).expect("own bytes");
    assert_eq!(restored.checkpoint(), controller.checkpoint());
    let counted = |controller: &Controller| {
        controller.view.with(|table| (table.topic_count(), table.partition_count(), table.applied()))
    };
    assert_eq!(counted(&restored), counted(&controller));
    let counted_anew: usize = controller
        .view
        .with(|table| table.topics().filter(|topic| !topic.internal).map(|topic| topic.partitions.len()).sum());
    assert_eq!(controller.view.with(MetadataTable::partition_count), counted_anew);
    // The live copy goes on where the restored one begins.
    restored.machine.lead(Term::new(3));
    restored.run(create("after", 1)).expect("created");
    assert!(restored.names().contains(&"after".to_owned()));
}

#[test]
fn a_replica_that_is_opened_anew_never_shows_an_older_state() {
    let mut controller = Controller::founded();
    let early = controller.checkpoint();
    let replayed_from = controller.log.len();
    for name in ["a", "b", "c"] {
        controller.run(create(name, 1)).expect("created");
    }
    let shown = controller.names();
    let version = *controller.view.changes().borrow();
    controller.machine.step_down();
    controller.machine.restore(&early).expect("own bytes");
    let mut offset = 0;
    let log = controller.log.clone();
    for (index, batch) in log.iter().enumerate() {
        assert_eq!(controller.names(), shown, "before the replay of entry {index}");
        assert_eq!(*controller.view.changes().borrow(), version);
        if index >= replayed_from {
            Controller::entry(batch, index, offset, |entry| controller.machine.committed(entry));
        }
        offset += BatchHeader::parse(batch).expect("built by the shell").offsets();
    }
    assert_eq!(controller.names(), shown);
    controller.machine.lead(Term::new(2));
    controller.run(create("d", 1)).expect("created");
    assert_eq!(controller.names().len(), shown.len() + 1);
}

#[test]
fn a_broker_keeps_its_directory_and_a_cluster_is_founded_once() {
    let mut controller = Controller::founded();
    let before = controller.log.len();
    controller.run(register(1, 7)).expect("nothing new");
    let voter = Place { broker: BrokerId::new(2), directory: DirectoryId::new(8), replica: ReplicaId::new(80) };
    controller
        .run(MetadataCommand::Found { cluster: ClusterId::new(10), voters: vec![voter], feature_level: 1 })
        .expect("founded");
    assert_eq!(controller.log.len(), before, "nothing was appended");
    assert_eq!(
        controller.view.with(|table| table.founding().map(|founding| founding.cluster)),
        Some(ClusterId::new(9))
    );
    let error = controller.run(register(1, 8)).expect_err("another directory");
    assert!(error.message.contains("node.id"), "{}", error.message);
    controller.run(register(2, 8)).expect("another broker");
    let MetadataReply::Topic(topic) = controller.run(create("copies", 4)).expect("created") else { panic!("no topic") };
    assert_eq!(topic.replication_factor, 2, "as many as there are brokers, up to three");
}

#[test]
fn deletions_are_remembered_for_watchers_up_to_a_point() {
    let mut controller = Controller::founded();
    let since = controller.view.with(MetadataTable::applied);
    for round in 0..2_000 {
        controller.run(create(&format!("t{round}"), 1)).expect("created");
        controller.run(delete(&format!("t{round}"))).expect("deleted");
    }
    controller.view.with(|table| {
        assert!(table.deleted_since(since).is_none(), "too long ago");
        let lately = Offset::new(table.applied().get() - 20);
        assert_eq!(table.deleted_since(lately).expect("known").len(), 10);
    });
}

#[test]
fn records_of_a_newer_release_stop_the_machine() {
    let mut table = MetadataTable::new(rules());
    let unknown = MetadataRecord::decode(&b"\x9a\x06\x00"[..]).expect("an unknown field is no malformed message");
    let error = table.apply(unknown, Offset::ZERO).expect_err("refused");
    assert_eq!(error.code, ErrorCode::Unsupported);
    assert!(error.message.contains("newer"), "{}", error.message);
    assert!(table.restore(b"\xff\xff\xff").is_err());
}

/// One more command, of any kind, about things that are there more often than not.
fn any_command(cluster: &Cluster, draws: &mut Draws) -> MetadataCommand {
    let table = cluster.table();
    let pick = |draws: &mut Draws, of: u64| draws.next() % of;
    let name = |draws: &mut Draws| format!("topic-{}", draws.next() % 6);
    let broker = |draws: &mut Draws| BrokerId::new(1 + (draws.next() % 6) as i32);
    let seed = draws.next();
    let validate_only = draws.next().is_multiple_of(16);
    let partitions: Vec<_> =
        table.entries().map(|(topic, tp, entry)| (topic.name.clone(), tp, entry.clone())).collect();
    let (topic, tp, entry) = partitions[pick(draws, partitions.len() as u64) as usize].clone();
    let changing: Vec<_> = table.changing().map(|(tp, entry)| (tp, entry.clone())).collect();
    let places: Vec<ReplicaId> = entry.places().map(|place| place.replica).collect();
    let replica = places[pick(draws, places.len() as u64) as usize];
    let incarnation = |draws: &mut Draws, broker: BrokerId| match draws.next() % 8 {
        0 => 7,
        _ => table.broker(broker).map_or(0, |broker| broker.incarnation),
    };
    match pick(draws, 22) {
        0..=2 => MetadataCommand::CreateTopic(CreateTopic {
            name: name(draws),
            partitions: (1 + pick(draws, 5)) as i32,
            replication_factor: pick(draws, 5) as i32,
            configs: vec![("retention.ms".to_owned(), "1d".to_owned())],
            topic_id: TopicId::new(u128::from(seed)),
            seed,
            validate_only,
        }),
        3 | 4 => MetadataCommand::AlterTopic(AlterTopic {
            name: name(draws),
            set: vec![("min.insync.replicas".to_owned(), (1 + pick(draws, 2)).to_string())],
            unset: vec!["retention.ms".to_owned()],
            partitions: pick(draws, 10) as i32,
            seed,
            validate_only,
        }),
        5 => delete(&name(draws)),
        6 | 7 => {
            let id = (1 + pick(draws, 6)) as i32;
            // Mostly the directory that it has, now and then an empty one.
            let known = table.broker(BrokerId::new(id)).map(|broker| broker.directory.get());
            let directory = known.filter(|_| pick(draws, 4) > 0).unwrap_or(u128::from(seed));
            MetadataCommand::RegisterBroker(registration(id, directory, ["a", "b"][pick(draws, 2) as usize], seed))
        }
        8 => {
            let broker = broker(draws);
            MetadataCommand::FenceBroker { broker, incarnation: incarnation(draws, broker) }
        }
        9 | 10 => {
            let broker = broker(draws);
            MetadataCommand::UnfenceBroker { broker, incarnation: incarnation(draws, broker) }
        }
        11 => {
            let undo = pick(draws, 3) > 0;
            MetadataCommand::DrainBroker { broker: broker(draws), undo, seed, validate_only }
        }
        12 => MetadataCommand::DecommissionBroker { broker: broker(draws) },
        13 => {
            let (old, new) = (broker(draws), broker(draws));
            MetadataCommand::ReplaceBroker(ReplaceBroker { old, new, seed, validate_only })
        }
        14 | 15 => {
            let brokers = (0..1 + pick(draws, 4)).map(|_| broker(draws)).collect();
            let partition = tp.partition.get();
            MetadataCommand::MovePartition(MovePartition { topic, partition, brokers, seed, validate_only })
        }
        16 => MetadataCommand::CancelMove { topic, partition: tp.partition.get() },
        17 => MetadataCommand::ReplaceReplica { tp, replica, seed },
        18 | 19 => {
            let (tp, entry) = match changing.len() as u64 {
                0 => (tp, entry),
                len => changing[pick(draws, len) as usize].clone(),
            };
            let removed = entry.leaving().iter().map(|place| place.replica).filter(|_| pick(draws, 2) == 0).collect();
            let wanted = entry.replicas().iter().map(|place| place.replica).collect();
            let may_remove = pick(draws, 2) == 0;
            MetadataCommand::MoveProgress(MoveProgress { tp, may_remove, removed, wanted, seed })
        }
        20 => {
            let epoch = LeaderEpoch::new(pick(draws, 50) as i32);
            let broker = entry.place(replica).map_or(broker(draws), |place| place.broker);
            MetadataCommand::LeadersChanged { broker, leaders: vec![Leadership { tp, replica, epoch }] }
        }
        _ => MetadataCommand::RecoverPartition(RecoverPartition {
            tp,
            survivor: replica,
            survives_as: None,
            known_lost: places,
            reason: "so that it goes on".to_owned(),
            seed,
            validate_only,
        }),
    }
}

/// What is kept beside the entries, against what they say.
fn check_counts(table: &MetadataTable, seed: u64) {
    let mut partitions = 0;
    let mut changing = Vec::new();
    let mut loads = std::collections::BTreeMap::<BrokerId, [u32; 4]>::new();
    for (topic, tp, entry) in table.entries() {
        partitions += usize::from(!topic.internal);
        if entry.is_changing() {
            changing.push(tp);
        }
        for place in entry.replicas() {
            loads.entry(place.broker).or_default()[0] += 1;
        }
        loads.entry(entry.replicas()[0].broker).or_default()[1] += 1;
        for place in entry.leaving() {
            loads.entry(place.broker).or_default()[2] += 1;
        }
        if let Some(leader) = entry.leader() {
            loads.entry(leader.broker).or_default()[3] += 1;
        }
    }
    changing.sort_unstable();
    assert_eq!(table.partition_count(), partitions, "seed {seed}");
    assert_eq!(table.changing().map(|(tp, _)| tp).collect::<Vec<_>>(), changing, "seed {seed}");
    for id in (0..8).map(BrokerId::new) {
        let load = table.load(id);
        let counted = loads.get(&id).copied().unwrap_or_default();
        assert_eq!([load.replicas, load.preferred, load.leaving, load.leads], counted, "seed {seed}, broker {id}");
    }
    let strays = table.entries().any(|(_, _, entry)| {
        let stray = |place: &Place| table.brokers().all(|broker| broker.directory != place.directory);
        entry.replicas().iter().any(stray)
    });
    assert_eq!(table.holds_strays(), strays, "seed {seed}");
}

/// All but what is only there for those who follow, and begins anew with a checkpoint.
fn check_same(table: &MetadataTable, live: &MetadataTable) {
    assert_eq!(table.founding(), live.founding());
    assert!(table.brokers().eq(live.brokers()), "brokers differ");
    assert!(table.removed_directories().eq(live.removed_directories()), "decommissioned directories differ");
    assert!(table.recoveries().eq(live.recoveries()), "recoveries differ");
    let topics = |table: &MetadataTable| {
        let timeless = |topic: &Arc<Topic>| Topic { changed_at: Offset::ZERO, ..Topic::clone(topic) };
        table.topics().map(timeless).collect::<Vec<_>>()
    };
    assert_eq!(topics(table), topics(live));
    assert_eq!(table.applied(), live.applied());
}

/// What must hold of every partition, whatever was asked for.
fn check_entries(table: &MetadataTable, seed: u64) {
    let mut ids = std::collections::BTreeSet::new();
    for (topic, tp, entry) in table.entries() {
        let context = || format!("seed {seed}: {} {tp}: {entry:?}", topic.name);
        assert!(!entry.replicas().is_empty(), "{}", context());
        for place in entry.places() {
            assert!(ids.insert(place.replica), "an id stands twice: {}", context());
            assert!(table.broker(place.broker).is_some(), "a broker that is gone: {}", context());
        }
        let brokers: std::collections::BTreeSet<_> = entry.replicas().iter().map(|place| place.broker).collect();
        assert_eq!(brokers.len(), entry.replicas().len(), "two replicas on one broker: {}", context());
        assert_eq!(entry.before().is_empty(), !entry.is_changing(), "{}", context());
        assert!(!entry.voters().is_empty(), "{}", context());
    }
    // Each broker's replica of the metadata is one of its own.
    for observer in table.observers() {
        assert!(ids.insert(observer.replica), "seed {seed}: broker {} observes under a taken id", observer.broker);
    }
}

#[test]
fn replay_and_checkpoint_lead_to_the_live_state_whatever_is_asked() {
    let mut kinds = std::collections::BTreeMap::<&str, usize>::new();
    let mut refused = 0;
    for seed in 0..25 {
        let mut draws = Draws::from_seed(seed);
        let mut cluster = Cluster::of(4);
        let cut = 1 + draws.next() as usize % 250;
        let mut middle = None;
        let mut used = std::collections::BTreeSet::new();
        for step in 0..300 {
            let command = any_command(&cluster, &mut draws);
            let before: std::collections::BTreeSet<ReplicaId> =
                cluster.table().entries().flat_map(|(_, _, entry)| entry.places().map(|place| place.replica)).collect();
            refused += usize::from(cluster.run(command).is_err());
            for (_, tp, entry) in cluster.table().entries() {
                for place in entry.places().filter(|place| !before.contains(&place.replica)) {
                    assert!(!used.contains(&place.replica), "seed {seed}: {tp} has an id for the second time");
                }
            }
            used.extend(before);
            if step == cut {
                middle = Some((cluster.log.len(), cluster.table().clone()));
            }
            check_entries(cluster.table(), seed);
        }
        check_counts(cluster.table(), seed);
        for record in &cluster.log {
            *kinds.entry(kind(record)).or_default() += 1;
        }

        let mut replayed = MetadataTable::new(rules());
        let apply = |table: &mut MetadataTable, from: usize| {
            for (at, record) in cluster.log.iter().enumerate().skip(from) {
                table.apply(record.clone(), Offset::new(at as i64)).expect("it was taken in before");
            }
        };
        apply(&mut replayed, 0);
        assert_eq!(replayed.checkpoint(), cluster.table().checkpoint(), "seed {seed}: replayed");
        let (at, then) = middle.expect("the cut lies within the steps");
        let checkpoint = then.checkpoint();
        let mut restored = MetadataTable::new(rules());
        restored.restore(&checkpoint).expect("own bytes");
        check_same(&restored, &then);
        check_counts(&restored, seed);
        assert_eq!(restored.checkpoint(), checkpoint, "seed {seed}");
        apply(&mut restored, at);
        assert_eq!(restored.checkpoint(), cluster.table().checkpoint(), "seed {seed}: from the checkpoint at {at}");
        for table in [&replayed, &restored] {
            check_counts(table, seed);
            check_same(table, cluster.table());
            // They would decide alike.
            for _ in 0..30 {
                let command = any_command(&cluster, &mut draws);
                let decide = |table: &MetadataTable| table.decide(command.clone(), Timestamp::new(1)).0;
                assert_eq!(decide(table), decide(cluster.table()), "seed {seed}: {command:?}");
            }
        }
    }
    assert_eq!(kinds.len(), 12, "records of some kind were never written: {kinds:?}");
    assert!(kinds.values().all(|count| *count >= 10), "too few to tell: {kinds:?}");
    assert!(refused > 500, "{refused}");
}

fn kind(record: &MetadataRecord) -> &'static str {
    use flowstone_protocol::internal::metadata_record::Record as Kind;
    match record.record.as_ref().expect("written here") {
        Kind::ClusterFounded(_) => "founded",
        Kind::BrokerRegistered(_) => "registered",
        Kind::TopicCreated(_) => "created",
        Kind::PartitionsAdded(_) => "added",
        Kind::TopicConfigChanged(_) => "configured",
        Kind::TopicDeleted(_) => "deleted",
        Kind::BrokerFenced(_) => "fenced",
        Kind::BrokerDraining(_) => "draining",
        Kind::BrokerRemoved(_) => "removed",
        Kind::LeadersChanged(_) => "led",
        Kind::PartitionReassigned(_) => "reassigned",
        Kind::PartitionRecovered(_) => "recovered",
        Kind::FeatureLevelRaised(_) => "level raised",
    }
}
