//! What the services of one broker share.

use std::sync::Arc;
use std::time::Instant;

use flowstone_protocol::{BrokerId, ClusterId, Error, ErrorCode, LeaderEpoch, TopicPartition};
use flowstone_replication::Role;
use tokio::sync::{Semaphore, watch};

use crate::cluster::control::Control;
use crate::config::Config;
use crate::controller::change::Leader;
use crate::controller::table::MetadataTable;
use crate::coordinator::Published;
use crate::group::driver::GroupCoordinators;
use crate::metrics::Metrics;
use crate::partition::{LocalReplicas, OpenPartition, Slot};
use crate::room::Room;
use crate::transaction::driver::Transactions;

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
    /// The consumer groups that this broker coordinates.
    pub(crate) groups: GroupCoordinators,
    /// Its part in transactions.
    pub(crate) transactions: Transactions,
    /// True once the broker drains: streams end, no new work is taken.
    pub(crate) drain: watch::Receiver<bool>,
    pub(crate) metrics: Arc<Metrics>,
    /// Whether the disk has room.
    pub(crate) room: Room,
    /// Turns of checks that decompress or compress much.
    pub(crate) checks: Arc<Semaphore>,
    pub(crate) ready_since: Instant,
}

/// Who leads a partition, as far as is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Led {
    /// `None`: nobody, or not known.
    pub(crate) by: Option<BrokerId>,
    /// Since which epoch; [`LeaderEpoch::NONE`] where none is known.
    pub(crate) epoch: LeaderEpoch,
    /// This broker's own replica hears it: it leads, whatever the controller believes of its broker.
    pub(crate) is_heard: bool,
}

impl Led {
    /// What the metadata says.
    fn told(told: Option<Leader>) -> Self {
        let epoch = told.map_or(LeaderEpoch::NONE, |leader| leader.epoch);
        Self { by: told.map(|leader| leader.broker), epoch, is_heard: false }
    }

    /// What a replica of broker `me` makes of what was `told`: what it knows is newer, unless it was left behind.
    fn seen(me: BrokerId, role: Role, epoch: LeaderEpoch, leader: Option<BrokerId>, told: Self) -> Self {
        match role {
            Role::Leader => Self { by: Some(me), epoch, is_heard: true },
            _ if epoch < told.epoch || (epoch == told.epoch && leader.is_none()) => told,
            // Elected, and about to serve: who asks is told to try again. A voter that hears nothing for an election timeout
            // stops believing in its leader; the others may go on.
            _ => {
                Self { by: leader, epoch, is_heard: leader.is_some() && matches!(role, Role::Follower | Role::Elected) }
            }
        }
    }

    /// Who leads, where brokers of which the controller hears nothing lead nothing unless somebody else hears them.
    pub(crate) fn alive(self, is_dead: impl Fn(BrokerId) -> bool) -> Option<BrokerId> {
        self.by.filter(|leader| self.is_heard || !is_dead(*leader))
    }
}

impl Node {
    /// Who leads, where the metadata says `told`: what the replica here knows is newer, unless it was left behind.
    pub(crate) fn led(&self, tp: TopicPartition, told: Option<Leader>) -> Led {
        let told = Led::told(told);
        let Some(Slot::Open(partition)) = self.replicas.get(tp) else { return told };
        let status = partition.replica.status();
        Led::seen(self.id, status.role, status.leader_epoch(), status.leader_broker, told)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn broker(id: i32) -> BrokerId {
        BrokerId::new(id)
    }

    #[test]
    fn a_leader_that_is_heard_leads_though_the_controller_does_not_hear_its_broker() {
        let told = Led::told(Some(Leader { broker: broker(4), epoch: LeaderEpoch::new(7) }));
        let is_dead = |broker: BrokerId| broker.get() == 4;
        assert_eq!(told.alive(is_dead), None, "nobody else knows better");
        let seen = |role, epoch, leader: Option<i32>| {
            Led::seen(broker(3), role, LeaderEpoch::new(epoch), leader.map(broker), told).alive(is_dead)
        };
        assert_eq!(seen(Role::Follower, 7, Some(4)), Some(broker(4)));
        assert_eq!(seen(Role::Follower, 7, None), None, "it hears no more of it");
        assert_eq!(seen(Role::Follower, 6, Some(4)), None, "it was left behind");
        assert_eq!(seen(Role::Learner, 7, Some(4)), None, "it never notices that a leader is silent");
        assert_eq!(seen(Role::Leader, 8, None), Some(broker(3)));
        assert_eq!(seen(Role::Follower, 8, Some(5)), Some(broker(5)));
        assert_eq!(Led::seen(broker(4), Role::Leader, LeaderEpoch::new(7), None, told).alive(is_dead), Some(broker(4)));
    }
}
