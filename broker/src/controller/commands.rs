//! What may be asked of the metadata, and what is decided: commands in, records and an answer out.
//!
//! Every refusal says what is wrong and what to do about it.

mod brokers;
mod partitions;
mod topics;

use std::sync::Arc;

use flowstone_protocol::internal::metadata_record::Record as Kind;
use flowstone_protocol::{
    BrokerId, ClusterId, DirectoryId, Error, ErrorCode, LeaderEpoch, PartitionId, ReplicaId, Timestamp, TopicId,
    TopicPartition,
};

use super::table::{MetadataTable, Place, Topic};
use crate::internal_topics::InternalTopic;
use crate::topic_config::TopicOverrides;

pub(crate) use brokers::feature_level_due;
pub(crate) use partitions::can_replace;
pub(crate) use topics::REPLICATION_FACTOR_DEFAULT;

/// A change that is asked for. Whatever is random was drawn by the caller, or comes out of the seed in it.
#[derive(Clone, Debug)]
pub(crate) enum MetadataCommand {
    /// The cluster begins; answered alike when it exists.
    Found { cluster: ClusterId, voters: Vec<Place>, feature_level: i32 },
    /// What every broker's release knows may be written from now on.
    RaiseFeatureLevel,
    /// A broker started.
    RegisterBroker(Registration),
    /// The broker's session has ended. Ignored if it has started anew meanwhile.
    FenceBroker { broker: BrokerId, incarnation: u64 },
    /// The broker is heard of again. Ignored if it has started anew meanwhile.
    UnfenceBroker { broker: BrokerId, incarnation: u64 },
    /// Every replica is to move away from the broker, or may come back (`undo`). The moves are begun by
    /// [`upkeep`](super::upkeep), a few at a time; the answer tells all of them.
    DrainBroker { broker: BrokerId, undo: bool, seed: u64, validate_only: bool },
    /// The broker holds nothing any more and is forgotten.
    DecommissionBroker { broker: BrokerId },
    /// What a dead broker held, another one gets.
    ReplaceBroker(ReplaceBroker),
    /// A new topic.
    CreateTopic(CreateTopic),
    /// Other settings, more partitions, or both.
    AlterTopic(AlterTopic),
    /// One of the cluster's own topics is needed; answered alike when it is there.
    EnsureInternalTopic { topic: InternalTopic, topic_id: TopicId, seed: u64 },
    /// Away with it.
    DeleteTopic { name: String },
    /// The partition's replicas shall be on these brokers.
    MovePartition(MovePartition),
    /// Back to where the replicas were.
    CancelMove { topic: String, partition: i32 },
    /// A replica can never vote again: another id takes its place on the same broker.
    ReplaceReplica { tp: TopicPartition, replica: ReplicaId, seed: u64 },
    /// What a partition's leader tells of a change. Old news are ignored.
    MoveProgress(MoveProgress),
    /// Leaderships that began on a broker. Old news are ignored.
    LeadersChanged { broker: BrokerId, leaders: Vec<Leadership> },
    /// The majority is gone for good: one replica goes on with what it has.
    RecoverPartition(RecoverPartition),
}

/// A broker that started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registration {
    pub(crate) id: BrokerId,
    pub(crate) directory: DirectoryId,
    pub(crate) client_address: String,
    pub(crate) peer_address: String,
    pub(crate) rack: String,
    pub(crate) version: String,
    /// Random at each start of the broker.
    pub(crate) incarnation: u64,
    /// The newest feature level that its release knows.
    pub(crate) feature_level: i32,
    /// Its replica of the metadata is drawn from this where it has none.
    pub(crate) seed: u64,
}

/// Which dead broker is replaced by which.
#[derive(Clone, Debug)]
pub(crate) struct ReplaceBroker {
    pub(crate) old: BrokerId,
    pub(crate) new: BrokerId,
    pub(crate) seed: u64,
    pub(crate) validate_only: bool,
}

/// What a new topic shall be.
#[derive(Clone, Debug)]
pub(crate) struct CreateTopic {
    pub(crate) name: String,
    /// As the user said, unchecked; 0 for the default.
    pub(crate) partitions: i32,
    /// As the user said, unchecked; 0 for the default.
    pub(crate) replication_factor: i32,
    /// As the user wrote them.
    pub(crate) configs: Vec<(String, String)>,
    pub(crate) topic_id: TopicId,
    pub(crate) seed: u64,
    pub(crate) validate_only: bool,
}

/// What shall become of a topic.
#[derive(Clone, Debug)]
pub(crate) struct AlterTopic {
    pub(crate) name: String,
    pub(crate) set: Vec<(String, String)>,
    pub(crate) unset: Vec<String>,
    /// New total, unchecked; 0 leaves it.
    pub(crate) partitions: i32,
    pub(crate) seed: u64,
    pub(crate) validate_only: bool,
}

/// Where a partition's replicas shall be.
#[derive(Clone, Debug)]
pub(crate) struct MovePartition {
    pub(crate) topic: String,
    /// As the user said, unchecked.
    pub(crate) partition: i32,
    /// The preferred leader first; another number of them than now changes the partition's replicas.
    pub(crate) brokers: Vec<BrokerId>,
    pub(crate) seed: u64,
    pub(crate) validate_only: bool,
}

/// How far a change of replicas is.
#[derive(Clone, Debug)]
pub(crate) struct MoveProgress {
    pub(crate) tp: TopicPartition,
    /// All new replicas vote.
    pub(crate) may_remove: bool,
    /// Out of the group for good.
    pub(crate) removed: Vec<ReplicaId>,
    /// The replicas at which the leader was told to arrive; `may_remove` counts for no other change.
    pub(crate) wanted: Vec<ReplicaId>,
    /// For a new replica of the metadata where a voter of it leaves.
    pub(crate) seed: u64,
}

/// A leadership that began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leadership {
    pub(crate) tp: TopicPartition,
    pub(crate) replica: ReplicaId,
    pub(crate) epoch: LeaderEpoch,
}

/// Which replica goes on where no majority is left.
#[derive(Clone, Debug)]
pub(crate) struct RecoverPartition {
    pub(crate) tp: TopicPartition,
    pub(crate) survivor: ReplicaId,
    /// The id under which it goes on, where it does so already (the metadata itself); else one is drawn.
    pub(crate) survives_as: Option<ReplicaId>,
    /// Replicas that can never vote again although their brokers live.
    pub(crate) known_lost: Vec<ReplicaId>,
    /// Who asked and why, for the record.
    pub(crate) reason: String,
    pub(crate) seed: u64,
    pub(crate) validate_only: bool,
}

/// The answer to a command.
#[derive(Clone, Debug)]
pub(crate) enum MetadataReply {
    /// It is so.
    Done,
    /// The broker is one of the cluster.
    Registered {
        /// Its replica of the metadata.
        metadata_replica: ReplicaId,
        /// The replica is one of those that the metadata's group began with.
        is_founder: bool,
    },
    /// The topic as it is, or would be.
    Topic(Arc<Topic>),
    /// The topic that is gone.
    Deleted(TopicId),
    /// What moves, or would.
    Moves {
        moves: Vec<PlannedMove>,
        /// More than one command takes at a time are to move: it wants to be given again.
        more: bool,
    },
    /// The replicas that are given up, the survivor under its old id among them.
    Recovered { given_up: Vec<Place> },
}

/// A move of a partition's replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PlannedMove {
    pub(crate) topic: String,
    pub(crate) tp: TopicPartition,
    /// The preferred leader first, as in `to`.
    pub(crate) from: Vec<BrokerId>,
    pub(crate) to: Vec<BrokerId>,
}

/// Bounds and defaults of this broker's configuration.
#[derive(Clone, Debug, Default)]
pub(crate) struct MetadataRules {
    pub(crate) topics_max: usize,
    pub(crate) partitions_per_topic_max: u32,
    pub(crate) partitions_max: usize,
    pub(crate) batch_bytes_max: usize,
    /// Of each topic behind coordinators, when it is made.
    pub(crate) internal_partitions: u32,
    pub(crate) topic_defaults: TopicOverrides,
}

type Decided = (Vec<Kind>, MetadataReply);

/// What follows from `command` in this state.
pub(crate) fn decide(table: &MetadataTable, command: MetadataCommand, now: Timestamp) -> Result<Decided, Error> {
    match command {
        MetadataCommand::Found { cluster, voters, feature_level } => {
            Ok(brokers::found(table, cluster, &voters, feature_level))
        }
        MetadataCommand::RaiseFeatureLevel => Ok(brokers::raise_feature_level(table)),
        MetadataCommand::RegisterBroker(registration) => brokers::register(table, registration),
        MetadataCommand::FenceBroker { broker, incarnation } => Ok(brokers::fence(table, broker, incarnation, true)),
        MetadataCommand::UnfenceBroker { broker, incarnation } => Ok(brokers::fence(table, broker, incarnation, false)),
        MetadataCommand::DrainBroker { broker, undo: true, validate_only, .. } => {
            brokers::undo_drain(table, broker, validate_only)
        }
        MetadataCommand::DrainBroker { broker, undo: false, seed, validate_only } => {
            brokers::drain(table, broker, seed, validate_only)
        }
        MetadataCommand::DecommissionBroker { broker } => brokers::decommission(table, broker),
        MetadataCommand::ReplaceBroker(replace) => brokers::replace(table, &replace),
        MetadataCommand::CreateTopic(create) => topics::create(table, create),
        MetadataCommand::AlterTopic(alter) => topics::alter(table, alter),
        MetadataCommand::EnsureInternalTopic { topic, topic_id, seed } => topics::ensure(table, topic, topic_id, seed),
        MetadataCommand::DeleteTopic { name } => topics::delete(table, &name),
        MetadataCommand::MovePartition(wanted) => partitions::move_to(table, &wanted),
        MetadataCommand::CancelMove { topic, partition } => partitions::cancel_move(table, &topic, partition),
        MetadataCommand::ReplaceReplica { tp, replica, seed } => partitions::replace(table, tp, replica, seed),
        MetadataCommand::MoveProgress(progress) => Ok(partitions::progress(table, &progress)),
        MetadataCommand::LeadersChanged { broker, leaders } => Ok(partitions::leaders_changed(table, broker, &leaders)),
        MetadataCommand::RecoverPartition(recover) => partitions::recover(table, recover, now),
    }
}

/// For a name that no topic has.
pub(crate) fn unknown_topic(name: &str) -> Error {
    Error::new(
        ErrorCode::UnknownTopic,
        format!("there is no topic `{}`; topics are not created by using them: create it first", name.escape_debug()),
    )
    .with_topic(name)
}

/// For a change to what is the cluster's own.
pub(crate) fn internal_topic(name: &str) -> Error {
    Error::new(
        ErrorCode::InternalTopic,
        format!("`{name}`: names that begin with `__` are the cluster's own; they are read, never written or changed"),
    )
    .with_topic(name)
}

/// For a partition that a topic does not have.
pub(crate) fn unknown_partition(topic: &Topic, partition: i32) -> Error {
    let last = topic.partitions.len().saturating_sub(1);
    Error::new(
        ErrorCode::UnknownPartition,
        format!("topic `{}` has no partition {partition}; name one of 0 to {last}", topic.name),
    )
    .with_topic(topic.name.as_str())
    .with_partition(PartitionId::new(partition))
}

/// For an id that no broker has.
pub(crate) fn unknown_broker(table: &MetadataTable, broker: BrokerId) -> Error {
    let known: Vec<String> = table.brokers().map(|broker| broker.id.to_string()).collect();
    Error::new(
        ErrorCode::InvalidRequest,
        format!("there is no broker {broker} in the cluster; name one of {}", known.join(", ")),
    )
}
