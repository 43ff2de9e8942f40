//! The machine behind a partition's log: records of users, or one of the coordinators.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::{
    BatchHeader, BrokerId, Error, ErrorCode, Marker, Offset, ProducerEpoch, ProducerId, ReplicaId, Term, Timestamp,
    TopicPartition,
};
use flowstone_replication::{Admission, Commanded, Machine, MachineEntry, ReplicaHandle};
use flowstone_storage::AbortedTransaction;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use crate::controller::commands::{MetadataCommand, MetadataReply};
use crate::controller::table::MetadataTable;
use crate::coordinator::{Coordinator, Published};
use crate::group::commands::{GroupCommand, GroupReply};
use crate::group::state::{GroupRules, GroupTable};
use crate::internal_topics::InternalTopic;
use crate::producers::Producers;
use crate::topic_config::TopicConfig;
use crate::transaction::commands::{TransactionCommand, TransactionReply};
use crate::transaction::state::{TransactionRules, TransactionTable};

/// A replica of this broker.
pub(crate) type Replica = ReplicaHandle<PartitionMachine>;
/// Where the replicas of a group are.
pub(crate) type Peers = Arc<[(ReplicaId, BrokerId)]>;

/// What runs behind a replica's log.
#[derive(Debug)]
pub(crate) enum PartitionMachine {
    /// A topic's records.
    Records(Box<Producers>),
    /// `__cluster_metadata-0`.
    Metadata(Box<Coordinator<MetadataTable>>),
    /// A partition of `__consumer_offsets`.
    Groups(Box<Coordinator<GroupTable>>),
    /// A partition of `__transaction_state`.
    Transactions(Box<Coordinator<TransactionTable>>),
}

/// What the machine behind a replica commits, for those who read it.
#[derive(Clone, Debug)]
pub(crate) enum MachineView {
    /// Nothing but the records themselves.
    Records,
    Groups(Published<GroupTable>),
    Transactions(Published<TransactionTable>),
}

/// What the machines behind topics are made with.
#[derive(Clone, Debug)]
pub(crate) struct MachineRules {
    pub(crate) groups: Arc<GroupRules>,
    pub(crate) transactions: Arc<TransactionRules>,
    /// Idle producers are forgotten after this long.
    pub(crate) producer_expiration: Duration,
}

impl Default for MachineRules {
    fn default() -> Self {
        Self { groups: Arc::default(), transactions: Arc::default(), producer_expiration: Producers::EXPIRATION }
    }
}

/// A command to a coordinator.
#[derive(Debug)]
pub(crate) enum PartitionCommand {
    Metadata(MetadataCommand),
    Groups(GroupCommand),
    Transactions(TransactionCommand),
}

/// A coordinator's answer.
#[derive(Debug)]
pub(crate) enum PartitionReply {
    Metadata(MetadataReply),
    Groups(GroupReply),
    Transactions(TransactionReply),
}

impl PartitionMachine {
    pub(crate) fn records() -> Self {
        Self::Records(Box::default())
    }

    /// What runs behind a topic of this name, and the view on what it commits.
    pub(crate) fn behind(topic: &str, rules: &MachineRules) -> (Self, MachineView) {
        match InternalTopic::named(topic) {
            Some(InternalTopic::Groups) => {
                let (coordinator, view) = Coordinator::new(GroupTable::new(Arc::clone(&rules.groups)));
                (Self::Groups(Box::new(coordinator)), MachineView::Groups(view))
            }
            Some(InternalTopic::Transactions) => {
                let (coordinator, view) = Coordinator::new(TransactionTable::new(Arc::clone(&rules.transactions)));
                (Self::Transactions(Box::new(coordinator)), MachineView::Transactions(view))
            }
            None => (Self::Records(Box::new(Producers::new(rules.producer_expiration))), MachineView::Records),
        }
    }

    /// The metadata's machine, and the view on what it commits.
    pub(crate) fn metadata(empty: MetadataTable) -> (Self, Published<MetadataTable>) {
        let (coordinator, view) = Coordinator::new(empty);
        (Self::Metadata(Box::new(coordinator)), view)
    }
}

impl PartitionMachine {
    /// The metadata's machine of a replica that takes the place of another one: readers keep the view that they have.
    pub(crate) fn metadata_again(view: &Published<MetadataTable>) -> Self {
        Self::Metadata(Box::new(Coordinator::behind(view)))
    }

    /// A leading coordinator's state with what is in flight.
    pub(crate) fn live_checkpoint(&self) -> Option<Bytes> {
        match self {
            Self::Records(_) => None,
            Self::Metadata(coordinator) => coordinator.live_checkpoint(),
            Self::Groups(coordinator) => coordinator.live_checkpoint(),
            Self::Transactions(coordinator) => coordinator.live_checkpoint(),
        }
    }
}

impl Machine for PartitionMachine {
    type Command = PartitionCommand;
    type Reply = Result<PartitionReply, Error>;

    fn admit(&mut self, batch: &BatchHeader, _now: Timestamp) -> Admission {
        match self {
            Self::Records(producers) => producers.admit(batch),
            Self::Metadata(coordinator) => coordinator.admit(batch),
            Self::Groups(coordinator) => coordinator.admit(batch),
            Self::Transactions(coordinator) => coordinator.admit(batch),
        }
    }

    fn admit_marker(&mut self, marker: &Marker, _now: Timestamp) -> Admission {
        match self {
            Self::Records(producers) => producers.admit_marker(marker),
            _ => Admission::Refuse(Error::new(
                ErrorCode::InternalTopic,
                "no transaction writes into a coordinator's log",
            )),
        }
    }

    fn expired(&mut self, now: Timestamp) -> Option<Bytes> {
        match self {
            Self::Records(producers) => producers.expired(now),
            _ => None,
        }
    }

    fn may_expire(&self) -> bool {
        matches!(self, Self::Records(producers) if producers.may_expire())
    }

    fn last_stable_offset(&self, high_watermark: Offset) -> Offset {
        match self {
            Self::Records(producers) => producers.last_stable_offset(high_watermark),
            _ => high_watermark,
        }
    }

    fn aborted_between(&self, from: Offset, to: Offset) -> Vec<(ProducerId, Offset)> {
        match self {
            Self::Records(producers) => producers.aborted_between(from, to),
            _ => Vec::new(),
        }
    }

    fn aborted_transactions(&self) -> Vec<AbortedTransaction> {
        match self {
            Self::Records(producers) => producers.aborted_transactions(),
            _ => Vec::new(),
        }
    }

    fn appended(&mut self, entry: &MachineEntry<'_>) {
        match self {
            Self::Records(producers) => producers.appended(entry),
            Self::Metadata(coordinator) => coordinator.appended(entry),
            Self::Groups(coordinator) => coordinator.appended(entry),
            Self::Transactions(coordinator) => coordinator.appended(entry),
        }
    }

    fn committed(&mut self, entry: &MachineEntry<'_>) {
        match self {
            Self::Records(producers) => producers.committed(entry),
            Self::Metadata(coordinator) => coordinator.committed(entry),
            Self::Groups(coordinator) => coordinator.committed(entry),
            Self::Transactions(coordinator) => coordinator.committed(entry),
        }
    }

    fn command(&mut self, command: PartitionCommand, now: Timestamp) -> Commanded<Self::Reply> {
        match (self, command) {
            (Self::Metadata(coordinator), PartitionCommand::Metadata(command)) => {
                let Commanded { batch, reply } = coordinator.command(command, now);
                Commanded { batch, reply: reply.map(PartitionReply::Metadata) }
            }
            (Self::Groups(coordinator), PartitionCommand::Groups(command)) => {
                let Commanded { batch, reply } = coordinator.command(command, now);
                Commanded { batch, reply: reply.map(PartitionReply::Groups) }
            }
            (Self::Transactions(coordinator), PartitionCommand::Transactions(command)) => {
                let Commanded { batch, reply } = coordinator.command(command, now);
                Commanded { batch, reply: reply.map(PartitionReply::Transactions) }
            }
            (Self::Records(_) | Self::Metadata(_) | Self::Groups(_) | Self::Transactions(_), command) => {
                let error = Error::new(ErrorCode::Internal, format!("no coordinator here takes {command:?}"));
                Commanded { batch: None, reply: Err(error) }
            }
        }
    }

    fn lead(&mut self, term: Term) {
        match self {
            Self::Records(producers) => producers.lead(),
            Self::Metadata(coordinator) => coordinator.lead(term),
            Self::Groups(coordinator) => coordinator.lead(term),
            Self::Transactions(coordinator) => coordinator.lead(term),
        }
    }

    fn step_down(&mut self) {
        match self {
            Self::Records(producers) => producers.step_down(),
            Self::Metadata(coordinator) => coordinator.step_down(),
            Self::Groups(coordinator) => coordinator.step_down(),
            Self::Transactions(coordinator) => coordinator.step_down(),
        }
    }

    fn reads_records(&self) -> bool {
        match self {
            Self::Records(_) => false,
            Self::Metadata(_) | Self::Groups(_) | Self::Transactions(_) => true,
        }
    }

    /// What is in flight lives beside the committed state in both kinds, see [`Coordinator`] and [`Producers`].
    fn applies_at_append(&self) -> bool {
        false
    }

    fn checkpoint(&self) -> Bytes {
        match self {
            Self::Records(producers) => producers.checkpoint(),
            Self::Metadata(coordinator) => coordinator.checkpoint(),
            Self::Groups(coordinator) => coordinator.checkpoint(),
            Self::Transactions(coordinator) => coordinator.checkpoint(),
        }
    }

    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), Error> {
        match self {
            Self::Records(producers) => producers.restore(checkpoint),
            Self::Metadata(coordinator) => coordinator.restore(checkpoint),
            Self::Groups(coordinator) => coordinator.restore(checkpoint),
            Self::Transactions(coordinator) => coordinator.restore(checkpoint),
        }
    }
}

/// Transactions that a coordinator was heard to have a partition in: what they write here need not be asked for again.
#[derive(Debug, Default)]
pub(crate) struct AddedTransactions {
    /// Held for a look or an entry; nothing waits inside.
    added: Mutex<HashMap<ProducerId, (ProducerEpoch, Instant)>>,
}

/// Producers remembered so; when there are more, all are asked for again.
const ADDED_MAX: usize = 10_000;
/// For so long: past it, it is asked for again, so that nothing that is long over is taken for known.
const ADDED_FOR: Duration = Duration::from_secs(60);

impl AddedTransactions {
    pub(crate) fn contains(&self, producer: ProducerId, epoch: ProducerEpoch) -> bool {
        self.added.lock().get(&producer).is_some_and(|(known, since)| *known == epoch && since.elapsed() < ADDED_FOR)
    }

    pub(crate) fn insert(&self, producer: ProducerId, epoch: ProducerEpoch) {
        let mut added = self.added.lock();
        if added.len() >= ADDED_MAX {
            added.clear();
        }
        added.insert(producer, (epoch, Instant::now()));
    }
}

/// A replica that was opened, with what the services need to know of its topic.
#[derive(Debug)]
pub(crate) struct OpenPartition {
    pub(crate) tp: TopicPartition,
    /// The topic's name.
    pub(crate) topic: Arc<str>,
    /// One of the cluster's own topics.
    pub(crate) internal: bool,
    /// Which of the partition's replicas this is.
    pub(crate) replica_id: ReplicaId,
    pub(crate) replica: Replica,
    /// What its machine commits.
    pub(crate) view: MachineView,
    pub(crate) added: AddedTransactions,
    /// Where the group's replicas are, as the reconciler told it last.
    peers: RwLock<Peers>,
    /// Written by the reconciler when the topic's settings change; readers clone it out.
    config: RwLock<Arc<TopicConfig>>,
}

impl OpenPartition {
    pub(crate) fn new(
        (tp, replica_id): (TopicPartition, ReplicaId),
        topic: &str,
        internal: bool,
        replica: Replica,
        peers: Peers,
        config: impl Into<Arc<TopicConfig>>,
    ) -> Self {
        Self {
            tp,
            topic: topic.into(),
            internal,
            replica_id,
            replica,
            view: MachineView::Records,
            added: AddedTransactions::default(),
            peers: RwLock::new(peers),
            config: RwLock::new(config.into()),
        }
    }

    /// The same with what its machine commits.
    #[must_use]
    pub(crate) fn viewed(self, view: MachineView) -> Self {
        Self { view, ..self }
    }

    /// Whether there is anybody else in its group.
    pub(crate) fn has_peers(&self) -> bool {
        self.peers.read().iter().any(|(replica, _)| *replica != self.replica_id)
    }

    /// Tells the replica where the others are, if that is news.
    pub(crate) fn set_peers(&self, peers: &Peers) {
        let mut known = self.peers.write();
        if *known != *peers {
            *known = Arc::clone(peers);
            self.replica.set_peers(Arc::clone(peers));
        }
    }

    pub(crate) fn config(&self) -> Arc<TopicConfig> {
        Arc::clone(&self.config.read())
    }

    pub(crate) fn set_config(&self, config: Arc<TopicConfig>) {
        *self.config.write() = config;
    }
}

/// A replica's place in this broker: open, or the reason why it is not.
#[derive(Clone, Debug)]
pub(crate) enum Slot {
    /// It runs. It may still not lead, or be sick: its status says so.
    Open(Arc<OpenPartition>),
    /// It is being opened.
    Opening,
    /// It could not even be tried to open it.
    Failed(Box<Error>),
    /// It was not opened: its topic's settings contradict this broker's. Other settings open it.
    Refused(Box<Error>),
}

/// The replicas of this broker, as the services find them.
#[derive(Clone, Debug, Default)]
pub(crate) struct LocalReplicas {
    /// Written when replicas come and go, by the reconciler alone; readers clone a handle out and never await inside.
    slots: Arc<RwLock<HashMap<TopicPartition, Slot>>>,
    /// Counts the changes.
    changes: Arc<watch::Sender<u64>>,
}

impl LocalReplicas {
    pub(crate) fn get(&self, tp: TopicPartition) -> Option<Slot> {
        self.slots.read().get(&tp).cloned()
    }

    pub(crate) fn set(&self, tp: TopicPartition, slot: Slot) {
        self.slots.write().insert(tp, slot);
        self.changes.send_modify(|count| *count += 1);
    }

    pub(crate) fn remove(&self, tp: TopicPartition) -> Option<Slot> {
        let slot = self.slots.write().remove(&tp);
        self.changes.send_modify(|count| *count += 1);
        slot
    }

    /// A replica leads, or does not any more.
    pub(crate) fn touch(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Told whenever a replica came, went, failed to open, or its leadership or health changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// All of them, in no order.
    pub(crate) fn all(&self) -> Vec<(TopicPartition, Slot)> {
        self.slots.read().iter().map(|(tp, slot)| (*tp, slot.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Brokers have tens of thousands of replicas, most of them idle: what only a busy or a sick one needs belongs in a box.
    #[test]
    fn what_each_replica_takes_stays_small() {
        let sizes = [
            ("replica", size_of::<flowstone_replication::Replica<PartitionMachine>>(), 3_200),
            ("machine", size_of::<PartitionMachine>(), 16),
            ("producers", size_of::<Producers>(), 320),
            ("handle", size_of::<Replica>(), 64),
            ("open partition", size_of::<OpenPartition>(), 256),
            ("slot", size_of::<Slot>(), 16),
            ("log", size_of::<flowstone_storage::Log>(), 1_000),
            ("spec", size_of::<flowstone_replication::ReplicaSpec>(), 256),
            ("status", size_of::<flowstone_replication::ReplicaStatus>(), 160),
        ];
        for (what, bytes, bytes_max) in sizes {
            assert!(bytes <= bytes_max, "a {what} takes {bytes} bytes, more than {bytes_max}");
        }
    }
}
