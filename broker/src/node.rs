//! What the services of one broker share.

use std::sync::Arc;
use std::time::Instant;

use flowstone_protocol::{BrokerId, ClusterId, Error, ErrorCode, LeaderEpoch, ReplicaId, TopicPartition};
use flowstone_replication::Role;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::cluster::control::Control;
use crate::config::Config;
use crate::controller::change::Leader;
use crate::controller::table::MetadataTable;
use crate::coordinator::Published;
use crate::metrics::Metrics;
use crate::partition::{LocalReplicas, OpenPartition, Slot};
use crate::room::Room;

/// One broker, as its services see it.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) id: BrokerId,
    pub(crate) cluster: ClusterId,
    /// The committed metadata.
    pub(crate) table: Published<MetadataTable>,
    /// The metadata's own replica, and the way to the broker that leads it.
    pub(crate) control: Arc<Control>,
    pub(crate) replicas: LocalReplicas,
    /// True once the broker drains: streams end, no new work is taken.
    pub(crate) drain: watch::Receiver<bool>,
    pub(crate) metrics: Arc<Metrics>,
    /// Whether the disk has room.
    pub(crate) room: Room,
    /// Turns of checks that decompress or compress much.
    pub(crate) checks: Arc<Semaphore>,
    pub(crate) ready_since: Instant,
    /// Takes the wish that the metadata's replica here go on as the only voter.
    pub(crate) recover_metadata: mpsc::Sender<MetadataRecovery>,
}

/// The metadata's majority is gone for good: the replica here is to go on under this id.
#[derive(Debug)]
pub(crate) struct MetadataRecovery {
    pub(crate) survives_as: ReplicaId,
    /// Told once it is open.
    pub(crate) done: oneshot::Sender<()>,
}

/// Who leads a partition, as far as is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Led {
    /// `None`: nobody, or not known.
    pub(crate) by: Option<BrokerId>,
    /// Since which epoch; [`LeaderEpoch::NONE`] where none is known.
    pub(crate) epoch: LeaderEpoch,
}

impl Node {
    /// Who leads, where the metadata says `told`: what the replica here knows is newer, unless it was left behind.
    pub(crate) fn led(&self, tp: TopicPartition, told: Option<Leader>) -> Led {
        let told =
            Led { by: told.map(|leader| leader.broker), epoch: told.map_or(LeaderEpoch::NONE, |leader| leader.epoch) };
        let Some(Slot::Open(partition)) = self.replicas.get(tp) else { return told };
        let status = partition.replica.status();
        let epoch = status.leader_epoch();
        match status.role {
            Role::Leader => Led { by: Some(self.id), epoch },
            _ if epoch < told.epoch || (epoch == told.epoch && status.leader_broker.is_none()) => told,
            // Elected, and about to serve: who asks is told to try again.
            _ => Led { by: status.leader_broker, epoch },
        }
    }

    /// Who leads, by all that this broker knows.
    pub(crate) fn leader(&self, tp: TopicPartition) -> Led {
        let told = self.table.with(|table| table.partition(tp).and_then(|entry| entry.leader()));
        self.led(tp, told)
    }

    /// What a client is told: which partition it is about and, where another broker leads, who and where that is.
    pub(crate) fn explain(&self, error: Error, partition: &OpenPartition) -> Error {
        let error = error.with_topic(&*partition.topic).with_partition(partition.tp.partition);
        self.with_leader_hint(error, partition.tp)
    }

    /// Names the leader in an error that sends the client elsewhere.
    pub(crate) fn with_leader_hint(&self, error: Error, tp: TopicPartition) -> Error {
        if error.code != ErrorCode::NotLeader || error.leader_hint.is_some() {
            return error;
        }
        match self.leader(tp).by.filter(|leader| *leader != self.id) {
            Some(leader) => match self.client_address(leader) {
                Some(address) => error.with_leader(leader, address),
                None => error,
            },
            None => error,
        }
    }

    /// Where clients reach a broker.
    pub(crate) fn client_address(&self, broker: BrokerId) -> Option<String> {
        self.table.with(|table| table.broker(broker).map(|broker| broker.client_address.clone()))
    }
}
