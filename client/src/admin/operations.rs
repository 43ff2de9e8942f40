//! Operating a cluster: health, draining and replacing brokers, moving partitions, leaders, recovery.

use flowstone_protocol::pb;
use serde::Serialize;

use super::Admin;
use crate::error::{Error, ErrorCode, Result};

/// How a cluster is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ClusterHealth {
    /// The broker that leads the metadata, where there is one.
    pub controller: Option<i32>,
    /// All brokers, by id.
    pub brokers: Vec<BrokerHealth>,
    /// Partitions in all.
    pub partitions_total: i32,
    /// Partitions of which a replica is missing or behind.
    pub under_replicated: i32,
    /// Partitions without a leader: nothing can be written to them.
    pub leaderless: i32,
    /// Those that are not as they should be, by topic and partition; at most 1000 of them.
    pub partitions: Vec<PartitionHealth>,
}

impl ClusterHealth {
    /// Whether every partition has a leader and all its replicas.
    pub fn is_healthy(&self) -> bool {
        self.under_replicated == 0 && self.leaderless == 0
    }
}

/// Whether a broker is heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum BrokerState {
    /// The controller hears of it.
    Alive,
    /// The controller has not heard of it for a while.
    Dead,
}

/// How a broker is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct BrokerHealth {
    /// Its id.
    pub id: i32,
    /// Whether the controller hears of it.
    pub state: BrokerState,
    /// Whether its replicas are to go elsewhere.
    pub draining: bool,
    /// `HOST:PORT` of its client listener.
    pub address: String,
    /// `HOST:PORT` of its peer listener.
    pub peer_address: String,
    /// Its rack, empty where not set.
    pub rack: String,
    /// Its version.
    pub version: String,
    /// Replicas that it holds.
    pub replicas: i32,
    /// Partitions that it leads.
    pub leaders: i32,
    /// Free bytes where its data are.
    pub disk_free_bytes: u64,
    /// All bytes there.
    pub disk_total_bytes: u64,
    /// Milliseconds since the controller heard of it, where it ever has.
    pub silent_ms: Option<i64>,
    /// What is wrong with it beside that, for people; empty for nothing.
    pub detail: String,
}

/// What is wrong with a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PartitionProblem {
    /// A replica is missing or behind.
    UnderReplicated,
    /// Nobody leads it.
    Leaderless,
}

/// A partition that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PartitionHealth {
    /// Its topic.
    pub topic: String,
    /// Its number.
    pub partition: i32,
    /// What is wrong.
    pub problem: PartitionProblem,
    /// The broker that leads it, where there is one.
    pub leader: Option<i32>,
    /// The brokers that should hold it.
    pub replicas: Vec<i32>,
    /// Those whose replica has all that is committed.
    pub in_sync: Vec<i32>,
    /// Which replica lacks, and why as far as is known.
    pub detail: String,
}

/// A change of a partition's replicas that is begun, or would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PlannedMove {
    /// Its topic.
    pub topic: String,
    /// Its number.
    pub partition: i32,
    /// The brokers that hold it, the preferred leader first.
    pub from: Vec<i32>,
    /// The brokers that will hold it, the preferred leader first.
    pub to: Vec<i32>,
    /// Bytes to be copied, for each replica that is new.
    pub bytes: u64,
}

/// A change of replicas that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MoveDescription {
    /// Its topic.
    pub topic: String,
    /// Its number.
    pub partition: i32,
    /// Brokers that get a replica.
    pub adding: Vec<i32>,
    /// Brokers that lose theirs.
    pub removing: Vec<i32>,
    /// Bytes that the slowest new replica has.
    pub bytes_done: u64,
    /// Bytes that the leader has.
    pub bytes_total: u64,
    /// Where it stands, in words.
    pub state: String,
}

/// What a rebalance begins, or would begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RebalancePlan {
    /// Replicas that move.
    pub moves: Vec<PlannedMove>,
    /// Leaderships that move.
    pub leader_transfers: i32,
}

/// What a recovered partition has, or would have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RecoveredPartition {
    /// One past the last offset that the survivor has.
    pub end_offset: i64,
    /// The leader epoch of what it has last.
    pub last_epoch: i32,
    /// What is kept and what may be lost, in words.
    pub detail: String,
}

impl Admin {
    /// Which partitions and brokers are not as they should be.
    ///
    /// # Errors
    /// None but those of every call.
    pub async fn cluster_health(&self) -> Result<ClusterHealth> {
        let health = self
            .cluster
            .call_admin(|mut admin| async move { admin.cluster_health(pb::ClusterHealthRequest {}).await })
            .await?;
        let mut brokers: Vec<BrokerHealth> = health.brokers.into_iter().map(BrokerHealth::from_pb).collect();
        brokers.sort_by_key(|broker| broker.id);
        Ok(ClusterHealth {
            controller: broker_id(health.controller_id),
            brokers,
            partitions_total: health.partitions_total,
            under_replicated: health.under_replicated,
            leaderless: health.leaderless,
            partitions: health.partitions.into_iter().map(PartitionHealth::from_pb).collect(),
        })
    }

    /// Begins to move every replica away from a broker, and gives it no new ones. It goes on serving what it still has;
    /// [`list_moves`](Self::list_moves) tells how far that is.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for a broker that does not exist, or whose replicas have nowhere else to go.
    pub async fn drain_broker(&self, broker: i32) -> Result<Vec<PlannedMove>> {
        self.drain(pb::DrainBrokerRequest { broker_id: broker, ..Default::default() }).await
    }

    /// What [`drain_broker`](Self::drain_broker) would move.
    ///
    /// # Errors
    /// As [`drain_broker`](Self::drain_broker).
    pub async fn plan_drain(&self, broker: i32) -> Result<Vec<PlannedMove>> {
        self.drain(pb::DrainBrokerRequest { broker_id: broker, validate_only: true, ..Default::default() }).await
    }

    /// Lets a broker have replicas again; what has moved away stays where it is.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for a broker that does not exist.
    pub async fn undo_drain(&self, broker: i32) -> Result<()> {
        self.drain(pb::DrainBrokerRequest { broker_id: broker, undo: true, ..Default::default() }).await.map(drop)
    }

    async fn drain(&self, request: pb::DrainBrokerRequest) -> Result<Vec<PlannedMove>> {
        let answer = self.cluster.call_admin(|mut admin| async move { admin.drain_broker(request).await }).await?;
        Ok(planned(answer.moves))
    }

    /// Forgets a broker that holds nothing any more.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for a broker that does not exist, still holds replicas, or is alive and not drained.
    pub async fn decommission_broker(&self, broker: i32) -> Result<()> {
        let mut retried = false;
        let request = pb::DecommissionBrokerRequest { broker_id: broker };
        let done = self
            .cluster
            .call_admin_once(|mut admin| async move { admin.decommission_broker(request).await }, &mut retried)
            .await;
        match done {
            // The first attempt did it, and its answer was lost.
            Err(error) if retried && !error.is_retriable() => {
                let there = self.describe_cluster().await?.brokers.iter().any(|known| known.id == broker);
                if there { Err(error) } else { Ok(()) }
            }
            done => done.map(drop),
        }
    }

    /// Gives every replica of a dead broker to another one.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for brokers that do not exist, an old one that is alive, a new one that is not.
    pub async fn replace_broker(&self, old: i32, new: i32) -> Result<Vec<PlannedMove>> {
        self.replace(pb::ReplaceBrokerRequest { old_broker_id: old, new_broker_id: new, validate_only: false }).await
    }

    /// What [`replace_broker`](Self::replace_broker) would move.
    ///
    /// # Errors
    /// As [`replace_broker`](Self::replace_broker).
    pub async fn plan_replace(&self, old: i32, new: i32) -> Result<Vec<PlannedMove>> {
        self.replace(pb::ReplaceBrokerRequest { old_broker_id: old, new_broker_id: new, validate_only: true }).await
    }

    async fn replace(&self, request: pb::ReplaceBrokerRequest) -> Result<Vec<PlannedMove>> {
        let answer = self.cluster.call_admin(|mut admin| async move { admin.replace_broker(request).await }).await?;
        Ok(planned(answer.moves))
    }

    /// Begins to move a partition to these brokers, the preferred leader first; as many as it has replicas, or another
    /// number to change that for this partition.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`; `INVALID_REQUEST` for brokers that do not exist or are not alive, or while
    /// another move of the partition is under way.
    pub async fn move_partition(&self, topic: &str, partition: i32, brokers: &[i32]) -> Result<PlannedMove> {
        let mut retried = false;
        let request = pb::MovePartitionRequest { topic: topic.to_owned(), partition, brokers: brokers.to_vec() };
        let answer = self
            .cluster
            .call_admin_once(
                |mut admin| {
                    let request = request.clone();
                    async move { admin.move_partition(request).await }
                },
                &mut retried,
            )
            .await
            .map_err(|error| error.at(topic, partition));
        match answer {
            Ok(answer) => {
                let planned = answer.r#move.map(PlannedMove::from_pb);
                planned
                    .ok_or_else(|| Error::new(ErrorCode::Internal, "the broker answered without the move; report this"))
            }
            // The first attempt began it, and its answer was lost.
            Err(error) if retried && !error.is_retriable() => {
                let described = self.describe_topic(topic).await?;
                let begun = described.partitions.into_iter().find(|known| known.partition == partition);
                let begun = begun.filter(|known| known.replicas == brokers);
                let Some(begun) = begun else { return Err(error) };
                let to = begun.replicas;
                Ok(PlannedMove { topic: topic.to_owned(), partition, from: begun.leaving, to, bytes: begun.log_bytes })
            }
            Err(error) => Err(error),
        }
    }

    /// Takes a move back, as long as it is not beyond that.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`; `INVALID_REQUEST` where nothing moves, or the old replicas are being removed.
    pub async fn cancel_move(&self, topic: &str, partition: i32) -> Result<()> {
        let request = pb::CancelMoveRequest { topic: topic.to_owned(), partition };
        let cancelled = self.cluster.call_admin(|mut admin| {
            let request = request.clone();
            async move { admin.cancel_move(request).await }
        });
        cancelled.await.map(drop).map_err(|error| error.at(topic, partition))
    }

    /// The partitions whose replicas are being changed, with how far they are.
    ///
    /// # Errors
    /// None but those of every call.
    pub async fn list_moves(&self) -> Result<Vec<MoveDescription>> {
        let answer =
            self.cluster.call_admin(|mut admin| async move { admin.list_moves(pb::ListMovesRequest {}).await }).await?;
        Ok(answer.moves.into_iter().map(MoveDescription::from_pb).collect())
    }

    /// Has another broker lead a partition, the best of its replicas or the one that is named; returns who leads now.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`; `INVALID_REQUEST` for a broker that holds no replica; `TIMED_OUT` where that
    /// replica does not catch up.
    pub async fn transfer_leader(&self, topic: &str, partition: i32, to: Option<i32>) -> Result<i32> {
        let to_broker_id = to.unwrap_or(-1);
        let request = pb::TransferLeaderRequest { topic: topic.to_owned(), partition, to_broker_id };
        let answer = self.cluster.call_admin(|mut admin| {
            let request = request.clone();
            async move { admin.transfer_leader(request).await }
        });
        Ok(answer.await.map_err(|error| error.at(topic, partition))?.leader_id)
    }

    /// Evens out replicas and leaders over the brokers; with `leaders_only` no data move.
    ///
    /// # Errors
    /// None but those of every call.
    pub async fn rebalance(&self, leaders_only: bool) -> Result<RebalancePlan> {
        self.rebalance_as(pb::RebalanceRequest { validate_only: false, leaders_only }).await
    }

    /// What [`rebalance`](Self::rebalance) would begin.
    ///
    /// # Errors
    /// As [`rebalance`](Self::rebalance).
    pub async fn plan_rebalance(&self, leaders_only: bool) -> Result<RebalancePlan> {
        self.rebalance_as(pb::RebalanceRequest { validate_only: true, leaders_only }).await
    }

    async fn rebalance_as(&self, request: pb::RebalanceRequest) -> Result<RebalancePlan> {
        let answer = self.cluster.call_admin(|mut admin| async move { admin.rebalance(request).await }).await?;
        Ok(RebalancePlan { moves: planned(answer.moves), leader_transfers: answer.leader_transfers })
    }

    /// Goes on with what one broker's replica has, where the majority is gone for good. **Acknowledged records may be
    /// lost**: those that this replica does not have.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`; `INVALID_REQUEST` where a majority is there, or that broker has no replica.
    pub async fn recover_partition(&self, topic: &str, partition: i32, from: i32) -> Result<RecoveredPartition> {
        self.recover(topic, partition, from, false).await
    }

    /// What [`recover_partition`](Self::recover_partition) would keep.
    ///
    /// # Errors
    /// As [`recover_partition`](Self::recover_partition).
    pub async fn plan_recovery(&self, topic: &str, partition: i32, from: i32) -> Result<RecoveredPartition> {
        self.recover(topic, partition, from, true).await
    }

    async fn recover(&self, topic: &str, partition: i32, from: i32, validate_only: bool) -> Result<RecoveredPartition> {
        let topic_name = topic.to_owned();
        let request = pb::RecoverPartitionRequest { topic: topic_name, partition, from_broker_id: from, validate_only };
        let answer = self.cluster.call_admin(|mut admin| {
            let request = request.clone();
            async move { admin.recover_partition(request).await }
        });
        let answer = answer.await.map_err(|error| error.at(topic, partition))?;
        Ok(RecoveredPartition { end_offset: answer.end_offset, last_epoch: answer.last_epoch, detail: answer.detail })
    }
}

fn broker_id(id: i32) -> Option<i32> {
    (id >= 0).then_some(id)
}

fn planned(moves: Vec<pb::PlannedMove>) -> Vec<PlannedMove> {
    moves.into_iter().map(PlannedMove::from_pb).collect()
}

impl BrokerHealth {
    fn from_pb(broker: pb::BrokerHealth) -> Self {
        Self {
            state: match broker.state() {
                pb::BrokerState::Alive => BrokerState::Alive,
                pb::BrokerState::Dead | pb::BrokerState::Unspecified => BrokerState::Dead,
            },
            id: broker.broker_id,
            draining: broker.draining,
            address: broker.address,
            peer_address: broker.peer_address,
            rack: broker.rack,
            version: broker.version,
            replicas: broker.replicas,
            leaders: broker.leaders,
            disk_free_bytes: broker.disk_free_bytes,
            disk_total_bytes: broker.disk_total_bytes,
            silent_ms: (broker.silent_ms >= 0).then_some(broker.silent_ms),
            detail: broker.detail,
        }
    }
}

impl PartitionHealth {
    fn from_pb(partition: pb::PartitionHealth) -> Self {
        Self {
            problem: match partition.problem() {
                pb::PartitionProblem::Leaderless => PartitionProblem::Leaderless,
                pb::PartitionProblem::UnderReplicated | pb::PartitionProblem::Unspecified => {
                    PartitionProblem::UnderReplicated
                }
            },
            topic: partition.topic,
            partition: partition.partition,
            leader: broker_id(partition.leader_id),
            replicas: partition.replicas,
            in_sync: partition.in_sync,
            detail: partition.detail,
        }
    }
}

impl PlannedMove {
    fn from_pb(planned: pb::PlannedMove) -> Self {
        let pb::PlannedMove { topic, partition, from, to, bytes } = planned;
        Self { topic, partition, from, to, bytes }
    }
}

impl MoveDescription {
    fn from_pb(described: pb::MoveDescription) -> Self {
        let pb::MoveDescription { topic, partition, adding, removing, bytes_done, bytes_total, state } = described;
        Self { topic, partition, adding, removing, bytes_done, bytes_total, state }
    }
}
