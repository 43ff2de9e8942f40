//! The broker's pure parts, for the simulator alone: what runs behind replicas' logs, what may be asked of a coordinator,
//! and what a broker and its controller conclude from the metadata. Nothing here has a clock, a thread or a socket: time,
//! chance and the way between brokers are the simulator's.
//!
//! A coordinator of some kind is a [`LogMachine`] behind a partition's replicas; a [`Command`] is given to the handle of the
//! replica that leads, and the [`Answer`] arrives once all that was applied before it is committed. A further kind needs a
//! constructor of its machine and constructors of its commands here, and nothing else.

mod coordinators;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::{
    BatchHeader, BrokerId, ClusterId, DirectoryId, Error, LeaderEpoch, Marker, Offset, ProducerId, ReplicaId, Term,
    Timestamp, TopicId, TopicPartition,
};
use flowstone_replication::membership_plan::PlanStep;
use flowstone_replication::{Admission, Commanded, GroupStatus, Health, Machine, MachineEntry, Start};
use flowstone_storage::AbortedTransaction;

use crate::cluster::drive::Goal;
use crate::controller::change::{PartitionEntry, Place};
use crate::controller::commands::{
    CreateTopic, Leadership, MetadataCommand, MetadataRules, MovePartition, MoveProgress, RecoverPartition,
    Registration,
};
use crate::controller::liveness::Liveness;
use crate::controller::lost::{LogEnd, LostReplicas, Told};
use crate::controller::reconcile::WantedReplica;
use crate::controller::table::{FEATURE_LEVEL, METADATA_PARTITION, MetadataTable};
use crate::controller::upkeep;
use crate::coordinator::Published;
use crate::partition::{PartitionCommand, PartitionMachine, PartitionReply};

pub use coordinators::{
    Answered, EndTurn, GroupDuty, GroupsView, Joining, MemberView, TransactionDuty, TransactionsView,
};

/// The partition of the cluster's metadata.
pub const METADATA: TopicPartition = METADATA_PARTITION;
/// Partitions that a controller moves at a time.
const MOVES_AT_ONCE: usize = 8;

/// What a broker runs behind a replica's log.
#[derive(Debug)]
pub struct LogMachine(PartitionMachine);

/// What is asked of a coordinator.
#[derive(Debug)]
pub struct Command(PartitionCommand);

/// What a coordinator answers.
#[derive(Debug)]
pub struct Answer(PartitionReply);

impl Answer {
    /// In short, for people.
    pub fn describe(&self) -> String {
        format!("{:?}", self.0)
    }
}

impl LogMachine {
    /// Behind a topic's records.
    pub fn records() -> Self {
        Self(PartitionMachine::records())
    }

    /// Behind `__cluster_metadata-0`, with the view of what it commits.
    pub fn metadata() -> (Self, MetadataView) {
        let rules = MetadataRules {
            topics_max: 100,
            partitions_per_topic_max: 100,
            partitions_max: 1_000,
            batch_bytes_max: 16 << 20,
            internal_partitions: 4,
            topic_defaults: Default::default(),
        };
        let (machine, view) = PartitionMachine::metadata(MetadataTable::new(rules));
        (Self(machine), MetadataView(view))
    }

    /// The same for a replica that takes the place of another one of the same broker: the view goes on.
    pub fn metadata_again(view: &MetadataView) -> Self {
        Self(PartitionMachine::metadata_again(&view.0))
    }

    /// On a leader whose machine applies before the commit: the state with what is in flight, as a checkpoint of it would
    /// be. It is the committed one where nothing is.
    pub fn live_checkpoint(&self) -> Option<Bytes> {
        self.0.live_checkpoint()
    }
}

impl Machine for LogMachine {
    type Command = Command;
    type Reply = Result<Answer, Error>;

    fn admit(&mut self, batch: &BatchHeader, now: Timestamp) -> Admission {
        self.0.admit(batch, now)
    }

    fn admit_marker(&mut self, marker: &Marker, now: Timestamp) -> Admission {
        self.0.admit_marker(marker, now)
    }

    fn expired(&mut self, now: Timestamp) -> Option<Bytes> {
        self.0.expired(now)
    }

    fn may_expire(&self) -> bool {
        self.0.may_expire()
    }

    fn last_stable_offset(&self, high_watermark: Offset) -> Offset {
        self.0.last_stable_offset(high_watermark)
    }

    fn aborted_between(&self, from: Offset, to: Offset) -> Vec<(ProducerId, Offset)> {
        self.0.aborted_between(from, to)
    }

    fn aborted_transactions(&self) -> Vec<AbortedTransaction> {
        self.0.aborted_transactions()
    }

    fn appended(&mut self, entry: &MachineEntry<'_>) {
        self.0.appended(entry);
    }

    fn committed(&mut self, entry: &MachineEntry<'_>) {
        self.0.committed(entry);
    }

    fn command(&mut self, command: Command, now: Timestamp) -> Commanded<Self::Reply> {
        let Commanded { batch, reply } = self.0.command(command.0, now);
        Commanded { batch, reply: reply.map(Answer) }
    }

    fn lead(&mut self, term: Term) {
        self.0.lead(term);
    }

    fn step_down(&mut self) {
        self.0.step_down();
    }

    fn reads_records(&self) -> bool {
        self.0.reads_records()
    }

    fn applies_at_append(&self) -> bool {
        self.0.applies_at_append()
    }

    fn checkpoint(&self) -> Bytes {
        self.0.checkpoint()
    }

    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), Error> {
        self.0.restore(checkpoint)
    }
}

/// A replica's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaPlace {
    /// The broker...
    pub broker: BrokerId,
    /// ...with this data directory.
    pub directory: DirectoryId,
    /// The replica's id.
    pub replica: ReplicaId,
}

impl From<&Place> for ReplicaPlace {
    fn from(place: &Place) -> Self {
        Self { broker: place.broker, directory: place.directory, replica: place.replica }
    }
}

impl From<&ReplicaPlace> for Place {
    fn from(place: &ReplicaPlace) -> Self {
        Self { broker: place.broker, directory: place.directory, replica: place.replica }
    }
}

/// A partition as the metadata has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Wanted replicas, the preferred leader first.
    pub wanted: Vec<ReplicaPlace>,
    /// Those on their way out.
    pub leaving: Vec<ReplicaPlace>,
    /// They may be removed, and there is no way back.
    pub may_remove: bool,
    /// The replica that went on with the log of another one after the majority was lost, and that one.
    pub recovered: Option<(ReplicaId, ReplicaId)>,
}

/// A replica that a broker is to have.
#[derive(Debug, Clone)]
pub struct LocalReplica {
    /// Of which partition.
    pub tp: TopicPartition,
    /// Its id.
    pub replica: ReplicaId,
    /// Where the replicas of its group are.
    pub peers: Arc<[(ReplicaId, BrokerId)]>,
    /// How it begins.
    pub start: Start,
}

/// A broker as the metadata has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegisteredBroker {
    /// Its data directory.
    pub directory: DirectoryId,
    /// Which of its starts.
    pub incarnation: u64,
    /// It is not heard of.
    pub fenced: bool,
}

/// The committed metadata, as far as one broker has it.
#[derive(Debug, Clone)]
pub struct MetadataView(Published<MetadataTable>);

impl MetadataView {
    /// Offset of the last record taken in, -1 for none.
    pub fn applied(&self) -> Offset {
        self.0.with(MetadataTable::applied)
    }

    /// Whether the cluster is founded.
    pub fn is_founded(&self) -> bool {
        self.0.with(|table| table.founding().is_some())
    }

    /// A broker.
    pub fn broker(&self, id: BrokerId) -> Option<RegisteredBroker> {
        self.0.with(|table| {
            let broker = table.broker(id)?;
            let (directory, incarnation, fenced) = (broker.directory, broker.incarnation, broker.fenced);
            Some(RegisteredBroker { directory, incarnation, fenced })
        })
    }

    /// A partition.
    pub fn partition(&self, tp: TopicPartition) -> Option<Partition> {
        self.0.with(|table| {
            let entry = table.partition(tp)?;
            Some(Partition {
                wanted: entry.replicas().iter().map(ReplicaPlace::from).collect(),
                leaving: entry.leaving().iter().map(ReplicaPlace::from).collect(),
                may_remove: entry.may_remove(),
                recovered: entry.recovered().map(|recovered| (recovered.replica, recovered.from)),
            })
        })
    }

    /// Whether the metadata knows that this broker leads the partition in this epoch, or in a later one.
    pub fn knows_leader(&self, tp: TopicPartition, broker: BrokerId, epoch: LeaderEpoch) -> bool {
        let leader = self.0.with(|table| table.partition(tp).and_then(PartitionEntry::leader));
        leader.is_some_and(|leader| leader.epoch > epoch || (leader.epoch == epoch && leader.broker == broker))
    }

    /// The users' replicas that a data directory is to have: the reconciler's decision.
    pub fn replicas_in(&self, directory: DirectoryId) -> Vec<LocalReplica> {
        self.0.with(|table| {
            let entries = table.entries().filter(|(topic, _, _)| !topic.internal);
            let wanted = entries.filter_map(|(_, tp, entry)| WantedReplica::in_directory(tp, entry, directory));
            wanted
                .map(|WantedReplica { tp, replica, peers, start }| LocalReplica { tp, replica, peers, start })
                .collect()
        })
    }

    /// What the leader of a partition's group does next.
    pub fn next_step(&self, tp: TopicPartition, status: &GroupStatus) -> PlanStep {
        let goal = self.0.with(|table| table.partition(tp).map(|entry| Goal::of(table, tp, entry)));
        goal.map_or(PlanStep::Nothing, |goal| goal.next(status))
    }
}

impl Command {
    fn metadata(command: MetadataCommand) -> Self {
        Self(PartitionCommand::Metadata(command))
    }

    /// The cluster begins, with these replicas of its metadata.
    pub fn found(cluster: ClusterId, voters: &[ReplicaPlace]) -> Self {
        Self::metadata(MetadataCommand::Found {
            cluster,
            voters: voters.iter().map(Place::from).collect(),
            feature_level: FEATURE_LEVEL,
        })
    }

    /// A broker started, `incarnation` names the start.
    pub fn register(broker: BrokerId, directory: DirectoryId, incarnation: u64) -> Self {
        Self::metadata(MetadataCommand::RegisterBroker(Registration {
            id: broker,
            directory,
            client_address: format!("client-{broker}"),
            peer_address: format!("peer-{broker}"),
            rack: String::new(),
            version: "simulated".to_owned(),
            incarnation,
            feature_level: FEATURE_LEVEL,
            seed: incarnation,
        }))
    }

    /// A new topic; `configs` as a user writes them.
    pub fn create_topic(
        name: &str,
        topic_id: TopicId,
        partitions: i32,
        replicas: i32,
        configs: &[(&str, &str)],
        seed: u64,
    ) -> Self {
        Self::metadata(MetadataCommand::CreateTopic(CreateTopic {
            name: name.to_owned(),
            partitions,
            replication_factor: replicas,
            configs: configs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
            topic_id,
            seed,
            validate_only: false,
        }))
    }

    /// A partition's replicas shall be on these brokers.
    pub fn move_partition(topic: &str, partition: i32, brokers: Vec<BrokerId>, seed: u64) -> Self {
        let topic = topic.to_owned();
        Self::metadata(MetadataCommand::MovePartition(MovePartition {
            topic,
            partition,
            brokers,
            seed,
            validate_only: false,
        }))
    }

    /// Back to where the replicas were.
    pub fn cancel_move(topic: &str, partition: i32) -> Self {
        Self::metadata(MetadataCommand::CancelMove { topic: topic.to_owned(), partition })
    }

    /// What a group's leader tells of a change that it was told with these `wanted` replicas: what it `removed`, or that it
    /// may remove.
    pub fn progress(tp: TopicPartition, wanted: Vec<ReplicaId>, removed: Vec<ReplicaId>, seed: u64) -> Self {
        let may_remove = removed.is_empty();
        Self::metadata(MetadataCommand::MoveProgress(MoveProgress { tp, may_remove, removed, wanted, seed }))
    }

    /// A leadership that began on this broker.
    pub fn leads(broker: BrokerId, tp: TopicPartition, replica: ReplicaId, epoch: LeaderEpoch) -> Self {
        let leaders = vec![Leadership { tp, replica, epoch }];
        Self::metadata(MetadataCommand::LeadersChanged { broker, leaders })
    }
}

/// What the broker that leads the metadata keeps in memory while it does, and what it does without being asked.
#[derive(Debug)]
pub struct Duty {
    session_timeout: Duration,
    liveness: Liveness,
    lost: LostReplicas,
}

impl Duty {
    /// A controller that has heard of nobody yet.
    pub fn new(session_timeout: Duration, now: Instant) -> Self {
        Self { session_timeout, liveness: Liveness::new(session_timeout, now), lost: LostReplicas::default() }
    }

    /// A broker said that it lives.
    pub fn heard(&mut self, broker: BrokerId, incarnation: u64, now: Instant) {
        self.liveness.heard(broker, incarnation, false, now);
        self.lost.heard(broker);
    }

    /// A broker said, after it was [`heard`](Self::heard), that a replica of it is lost; anything but [`Health::Lost`] says
    /// nothing. One that is being copied tells that it lost memory and has no entry.
    pub fn lost(&mut self, broker: BrokerId, tp: TopicPartition, replica: ReplicaId, health: &Health) {
        if let Health::Lost { lost_memory, last_term, last_index, .. } = health {
            let end = LogEnd { term: *last_term, index: *last_index };
            self.lost.tell(broker, tp, replica, Told::of(*lost_memory, end));
        }
    }

    /// What is due. The metadata's own replicas are looked after by the simulator.
    pub fn due(&mut self, view: &MetadataView, now: Instant, seed: u64) -> Vec<Command> {
        view.0.with(|table| {
            self.liveness.keep(table);
            let mut due = self.liveness.due(table, now);
            due.extend(self.lost.due(table, self.session_timeout, now, seed));
            due.extend(upkeep::due(table, MOVES_AT_ONCE, seed ^ 1));
            due.retain(
                |command| !matches!(command, MetadataCommand::ReplaceReplica { tp, .. } if *tp == METADATA_PARTITION),
            );
            due.into_iter().map(Command::metadata).collect()
        })
    }

    /// An operator wants a partition without a majority to go on with what this replica has.
    pub fn recover(&self, tp: TopicPartition, survivor: ReplicaId, seed: u64) -> Command {
        Command::metadata(MetadataCommand::RecoverPartition(RecoverPartition {
            tp,
            survivor,
            survives_as: None,
            known_lost: self.lost.known_lost(tp),
            reason: "the majority is gone for good".to_owned(),
            seed,
            validate_only: false,
        }))
    }
}
