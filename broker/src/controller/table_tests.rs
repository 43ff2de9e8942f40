//! The metadata behind its shell: what is decided, taken in, checkpointed and taken up again.

use bytes::Bytes;
use flowstone_protocol::internal::MetadataRecord;
use flowstone_protocol::{
    BatchHeader, BrokerId, ClusterId, DirectoryId, Error, ErrorCode, Offset, RaftIndex, ReplicaId, Term, Timestamp,
    TopicId,
};
use flowstone_replication::{Commanded, MachineBody, MachineEntry};
use prost::Message;

use super::commands::{AlterTopic, CreateTopic, MetadataCommand, MetadataReply, MetadataRules};
use super::placement::Draws;
use super::table::{BrokerEntry, METADATA_TOPIC, MetadataTable, Place};
use crate::coordinator::{Coordinator, Published, StateMachine};

fn rules() -> MetadataRules {
    MetadataRules {
        topics_max: 100,
        partitions_per_topic_max: 50,
        partitions_max: 1_000,
        batch_bytes_max: 1 << 24,
        topic_defaults: Default::default(),
    }
}

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
        controller.run(MetadataCommand::Found { cluster: ClusterId::new(9), voters: vec![voter] }).expect("founded");
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
    MetadataCommand::RegisterBroker(BrokerEntry {
        id: BrokerId::new(id),
        directory: DirectoryId::new(directory),
        client_address: format!("127.0.0.1:{id}"),
        peer_address: String::new(),
        rack: String::new(),
        version: "0".to_owned(),
    })
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
    let again = controller.append(create("a", 1)).expect_err("the first is in flight");
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
    controller.run(MetadataCommand::Found { cluster: ClusterId::new(10), voters: vec![voter] }).expect("founded");
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
