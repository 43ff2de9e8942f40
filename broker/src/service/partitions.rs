//! `Admin`'s calls about where partitions' replicas and leaders are.

use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::peer::{InstructRequest, ReplicaReport, instruct_request};
use flowstone_protocol::{BrokerId, Error, ErrorCode, PartitionId, ReplicaId, TopicPartition, pb};
use futures::{StreamExt, stream};

use super::admin::{decided, odd_answer};
use super::brokers::{bytes_by_partition, not_a_replica, show_moves};
use super::topics::named;
use crate::cluster::drive;
use crate::cluster::recovery;
use crate::cluster::report::Reports;
use crate::controller::balance;
use crate::controller::change::PartitionEntry;
use crate::controller::commands::{
    MetadataCommand, MetadataReply, MovePartition, PlannedMove, RecoverPartition, unknown_partition,
};
use crate::controller::table::{METADATA_TOPIC, MetadataTable, Topic};
use crate::node::Node;
use crate::partition::Slot;

/// A leader takes at most this long to hand over, its group's health permitting.
const TRANSFER_MAX: Duration = Duration::from_secs(10);
/// How long an answer waits for this broker to know of a new leader.
const FOLLOW_UP_MAX: Duration = Duration::from_secs(2);
/// Brokers that are asked one after another, where each says that another one leads.
const HOPS_MAX: usize = 4;
/// Moves of data that one rebalancing begins; called again it goes on.
const MOVES_MAX: usize = 100;
/// Leaderships that are handed over side by side.
const TRANSFERS_AT_ONCE: usize = 16;

fn partition_of(topic: &Topic, partition: i32) -> Result<(TopicPartition, PartitionEntry), Error> {
    let id = PartitionId::new(partition);
    let entry = topic.partition(id).ok_or_else(|| unknown_partition(topic, partition))?;
    Ok((TopicPartition { topic: topic.id, partition: id }, entry.clone()))
}

pub(super) async fn move_partition(
    node: &Arc<Node>,
    request: pb::MovePartitionRequest,
) -> Result<pb::MovePartitionResponse, Error> {
    decided(node, "MovePartition", request, move_here).await
}

pub(super) async fn move_here(
    node: Arc<Node>,
    request: pb::MovePartitionRequest,
) -> Result<pb::MovePartitionResponse, Error> {
    let command = MovePartition {
        topic: request.topic,
        partition: request.partition,
        brokers: request.brokers.into_iter().map(BrokerId::new).collect(),
        seed: rand::random(),
        validate_only: false,
    };
    let MetadataReply::Moves { moves, .. } = node.control.command(MetadataCommand::MovePartition(command)).await?
    else {
        return Err(odd_answer());
    };
    Ok(pb::MovePartitionResponse { r#move: show_moves(&node, &moves).await.pop() })
}

pub(super) async fn cancel_move(
    node: &Arc<Node>,
    request: pb::CancelMoveRequest,
) -> Result<pb::CancelMoveResponse, Error> {
    decided(node, "CancelMove", request, cancel_here).await
}

pub(super) async fn cancel_here(
    node: Arc<Node>,
    request: pb::CancelMoveRequest,
) -> Result<pb::CancelMoveResponse, Error> {
    let command = MetadataCommand::CancelMove { topic: request.topic, partition: request.partition };
    node.control.command(command).await?;
    Ok(pb::CancelMoveResponse {})
}

pub(super) async fn list_moves(
    node: &Arc<Node>,
    _request: pb::ListMovesRequest,
) -> Result<pb::ListMovesResponse, Error> {
    // Whoever has just begun a move by another broker wants to see it.
    drop(tokio::time::timeout(FOLLOW_UP_MAX, node.control.caught_up()).await);
    type Changing = (String, TopicPartition, PartitionEntry, Option<BrokerId>);
    let (changing, alive): (Vec<Changing>, Vec<BrokerId>) = node.table.with(|table| {
        let is_down = |broker: BrokerId| table.broker(broker).is_none_or(|known| known.fenced);
        let down = |entry: &PartitionEntry| entry.joining().map(|place| place.broker).find(|broker| is_down(*broker));
        let name = |tp: TopicPartition| table.topic(tp.topic).map(|topic| topic.name.clone()).unwrap_or_default();
        let changing = table.changing().map(|(tp, entry)| (name(tp), tp, entry.clone(), down(entry))).collect();
        (changing, table.brokers().filter(|broker| !broker.fenced).map(|broker| broker.id).collect())
    });
    if changing.is_empty() {
        return Ok(pb::ListMovesResponse { moves: Vec::new() });
    }
    let mut topics: Vec<_> = changing.iter().map(|(_, tp, ..)| tp.topic).collect();
    topics.dedup();
    let reports = Reports::of(node, alive, &topics).await;
    let leaders = reports.leaders();
    let moves = changing.into_iter().map(|(topic, tp, entry, down)| {
        let leader = leaders.get(&tp).map(|(_, report)| *report);
        describe_move(topic, tp, &entry, down, leader, &reports)
    });
    Ok(pb::ListMovesResponse { moves: moves.collect() })
}

fn describe_move(
    topic: String,
    tp: TopicPartition,
    entry: &PartitionEntry,
    down: Option<BrokerId>,
    leader: Option<&ReplicaReport>,
    reports: &Reports,
) -> pb::MoveDescription {
    let joining: Vec<_> = entry.joining().copied().collect();
    let total = leader.map_or(0, |leader| leader.log_bytes);
    let done = |replica: ReplicaId| {
        let Some((_, _, row)) = reports.replicas().find(|(_, of, row)| *of == tp && row.replica_id == replica.get())
        else {
            return 0;
        };
        if row.role == "pulling" && row.pull_bytes_total > 0 {
            return (u128::from(total) * u128::from(row.pulled_bytes) / u128::from(row.pull_bytes_total)) as u64;
        }
        row.log_bytes.min(total)
    };
    let bytes_done = joining.iter().map(|place| done(place.replica)).min().unwrap_or(total);
    let state = match (leader, entry.may_remove(), down) {
        (None, _, _) => "waits for a leader".to_owned(),
        (Some(_), _, Some(broker)) => {
            format!("waits for broker {broker}, which is down: start it, or cancel the move and begin another")
        }
        (Some(_), false, None) => "new replicas are catching up".to_owned(),
        (Some(_), true, None) => "old replicas are being removed".to_owned(),
    };
    pb::MoveDescription {
        topic,
        partition: tp.partition.get(),
        adding: joining.iter().map(|place| place.broker.get()).collect(),
        removing: entry.leaving().iter().map(|place| place.broker.get()).collect(),
        bytes_done,
        bytes_total: total,
        state,
    }
}

pub(super) async fn transfer_leader(
    node: &Arc<Node>,
    request: pb::TransferLeaderRequest,
) -> Result<pb::TransferLeaderResponse, Error> {
    let topic = named(node, &request.topic).await?;
    let in_partition =
        |error: Error| error.with_topic(topic.name.as_str()).with_partition(PartitionId::new(request.partition));
    let (tp, entry) = partition_of(&topic, request.partition)?;
    let to = match request.to_broker_id {
        -1 => None,
        broker => {
            let broker = BrokerId::new(broker);
            let place = entry.replicas().iter().find(|place| place.broker == broker);
            let place = place.ok_or_else(|| in_partition(not_a_replica(node, broker, &entry)))?;
            Some((broker, place.replica))
        }
    };
    let leader = transfer(node, tp, to).await.map_err(in_partition)?;
    Ok(pb::TransferLeaderResponse { leader_id: leader.map_or(-1, BrokerId::get) })
}

/// Has the leader hand over; returns who leads then, as far as it is known here.
async fn transfer(
    node: &Arc<Node>,
    tp: TopicPartition,
    to: Option<(BrokerId, ReplicaId)>,
) -> Result<Option<BrokerId>, Error> {
    let no_leader = || Error::new(ErrorCode::NoLeader, "the partition has no leader at the moment; try again");
    let mut leader = node.leader(tp).by.ok_or_else(no_leader)?;
    for _ in 0..HOPS_MAX {
        if to.is_some_and(|(broker, _)| broker == leader) {
            return Ok(Some(leader));
        }
        let replica = to.map(|(_, replica)| replica);
        let handed = if leader == node.id {
            match node.replicas.get(tp) {
                Some(Slot::Open(partition)) => {
                    drive::transfer(&partition.replica, replica).await.map_err(|error| node.explain(error, &partition))
                }
                _ => Err(no_leader()),
            }
        } else {
            let what = instruct_request::What::TransferLeaderTo(replica.map_or(0, ReplicaId::get));
            let request = InstructRequest {
                caller: None,
                topic_id: tp.topic.to_bytes().to_vec().into(),
                partition: tp.partition.get(),
                what: Some(what),
            };
            node.control.peers.instruct(leader, request, TRANSFER_MAX).await.map(|_| ())
        };
        match handed {
            Ok(()) => {
                let before = leader;
                let follow = async {
                    let mut changes = node.table.changes();
                    let mut replicas = node.replicas.changes();
                    loop {
                        if let Some(now) = node.leader(tp).by.filter(|now| *now != before) {
                            return Some(now);
                        }
                        tokio::select! {
                            changed = changes.changed() => changed.ok()?,
                            changed = replicas.changed() => changed.ok()?,
                        }
                    }
                };
                let followed = tokio::time::timeout(FOLLOW_UP_MAX, follow).await.ok().flatten();
                return Ok(followed.or(to.map(|(broker, _)| broker)));
            }
            Err(Error { code: ErrorCode::NotLeader, leader_hint: Some((hint, _)), .. }) if hint != leader => {
                leader = hint
            }
            Err(error) => return Err(error),
        }
    }
    Err(no_leader())
}

pub(super) async fn rebalance(node: &Arc<Node>, request: pb::RebalanceRequest) -> Result<pb::RebalanceResponse, Error> {
    decided(node, "Rebalance", request, rebalance_here).await
}

pub(super) async fn rebalance_here(
    node: Arc<Node>,
    request: pb::RebalanceRequest,
) -> Result<pb::RebalanceResponse, Error> {
    if !node.control.leads() {
        return Err(node.control.not_controller());
    }
    let bytes = bytes_by_partition(&node).await;
    let table = node.table.with(MetadataTable::clone);
    let plan = balance::plan(&table, &bytes, MOVES_MAX, request.leaders_only);
    if !request.validate_only {
        for planned in &plan.moves {
            let PlannedMove { topic, tp, to, .. } = planned.clone();
            let command = MovePartition {
                topic,
                partition: tp.partition.get(),
                brokers: to,
                seed: rand::random(),
                validate_only: false,
            };
            // It was deleted or is being moved by now: the rest is as good.
            if let Err(error) = node.control.command(MetadataCommand::MovePartition(command)).await {
                tracing::debug!(%tp, %error, "a planned move was not begun");
            }
        }
        let full = node.control.duty.full();
        let transfers =
            plan.transfers.iter().filter(|(_, broker)| !full.contains(broker)).filter_map(|(tp, broker)| {
                let place = table.partition(*tp)?.replicas().iter().find(|place| place.broker == *broker)?;
                Some((*tp, (*broker, place.replica)))
            });
        stream::iter(transfers)
            .for_each_concurrent(TRANSFERS_AT_ONCE, |(tp, to)| {
                let node = &node;
                async move {
                    if let Err(error) = transfer(node, tp, Some(to)).await {
                        tracing::debug!(%tp, %error, "a leadership did not go to its preferred broker");
                    }
                }
            })
            .await;
    }
    Ok(pb::RebalanceResponse {
        moves: show_moves(&node, &plan.moves).await,
        leader_transfers: plan.transfers.len() as i32,
    })
}

pub(super) async fn recover_partition(
    node: &Arc<Node>,
    request: pb::RecoverPartitionRequest,
) -> Result<pb::RecoverPartitionResponse, Error> {
    if request.topic != METADATA_TOPIC {
        return decided(node, "RecoverPartition", request, recover_here).await;
    }
    // There is no controller to decide it: the survivor itself does.
    recovery::asked_for(&node.control, request).await
}

/// Whether a leader hears most of its voters.
pub(super) fn confirmed(leader: &ReplicaReport) -> bool {
    let voters = || leader.members.iter().filter(|member| !member.is_learner);
    let active = voters().filter(|member| member.is_active || member.replica_id == leader.replica_id).count();
    active > voters().count() / 2
}

/// Why a replica that only learns is not to be gone on with: there is one that has more, or it has nothing.
fn better_than<'a>(
    survivor: &ReplicaReport,
    on: BrokerId,
    all: impl Iterator<Item = (BrokerId, TopicPartition, &'a ReplicaReport)>,
) -> Option<String> {
    let best = all.filter(|(broker, ..)| *broker != on).max_by_key(|(_, _, row)| (row.term, row.end_offset));
    match (survivor.role.as_str(), best) {
        ("learner" | "pulling", Some((broker, _, row))) if row.end_offset > survivor.end_offset => {
            Some(format!("broker {broker} has more, up to offset {}; name that one", row.end_offset))
        }
        ("pulling", _) => Some(
            "it is being copied, and what it copies from may come back; bring back a broker that had it".to_owned(),
        ),
        _ => None,
    }
}

pub(super) async fn recover_here(
    node: Arc<Node>,
    request: pb::RecoverPartitionRequest,
) -> Result<pb::RecoverPartitionResponse, Error> {
    let topic = named(&node, &request.topic).await?;
    let (tp, entry) = partition_of(&topic, request.partition)?;
    let from = BrokerId::new(request.from_broker_id);
    let in_partition = |error: Error| error.with_topic(topic.name.as_str()).with_partition(tp.partition);
    let survivor = entry.places().find(|place| place.broker == from);
    let survivor = *survivor.ok_or_else(|| in_partition(not_a_replica(&node, from, &entry)))?;
    let alive: Vec<BrokerId> =
        node.table.with(|table| table.brokers().filter(|broker| !broker.fenced).map(|broker| broker.id).collect());
    let reports = Reports::of(&node, alive.into_iter().chain([from]), &[topic.id]).await;
    // In the middle of a change of replicas the metadata does not know whether the group has a majority; a leader does.
    if let Some((leader, row)) = reports.leaders().get(&tp)
        && confirmed(row)
    {
        return Err(in_partition(Error::new(
            ErrorCode::InvalidRequest,
            format!(
                "broker {leader} leads the partition with a majority of its voters, and recovering would throw away what it \
                 has acknowledged; see what is wrong with the others: flowstone cluster health"
            ),
        )));
    }
    let row = reports.replicas().find(|(_, of, row)| *of == tp && row.replica_id == survivor.replica.get());
    let Some((_, _, row)) = row else {
        return Err(in_partition(Error::new(
            ErrorCode::NoLeader,
            format!("broker {from} does not tell how its replica is; see that it runs, and try again"),
        )));
    };
    if let Some(better) = better_than(row, from, reports.replicas().filter(|(_, of, _)| *of == tp)) {
        return Err(in_partition(Error::new(
            ErrorCode::InvalidRequest,
            format!("broker {from} has not got all of the partition yet: {better}"),
        )));
    }
    let command = RecoverPartition {
        tp,
        survivor: survivor.replica,
        survives_as: None,
        known_lost: node.control.duty.known_lost(tp),
        reason: format!("an operator asked to go on with what broker {from} has"),
        seed: rand::random(),
        validate_only: request.validate_only,
    };
    let reply = node.control.command(MetadataCommand::RecoverPartition(command)).await?;
    let MetadataReply::Recovered { given_up, .. } = reply else { return Err(odd_answer()) };
    let given_up: Vec<String> =
        given_up.iter().filter(|place| place.broker != from).map(|place| place.broker.to_string()).collect();
    Ok(pb::RecoverPartitionResponse {
        end_offset: row.end_offset,
        last_epoch: i32::try_from(row.term).unwrap_or(i32::MAX),
        detail: format!(
            "what broker {from} has is kept, up to offset {} (exclusive); what only brokers {} had is lost, and their \
             replicas begin anew",
            row.end_offset,
            given_up.join(", ")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_learner_does_not_go_on_where_another_one_has_more() {
        let row =
            |role: &str, end_offset| ReplicaReport { role: role.to_owned(), end_offset, ..ReplicaReport::default() };
        let tp = TopicPartition { topic: flowstone_protocol::TopicId::new(1), partition: PartitionId::new(0) };
        let (me, other) = (BrokerId::new(1), BrokerId::new(2));
        let better = |mine: &ReplicaReport, others: &[ReplicaReport]| {
            better_than(mine, me, others.iter().chain([mine]).zip([other, me]).map(|(row, broker)| (broker, tp, row)))
        };
        let more = [row("candidate", 9)];
        assert!(better(&row("learner", 3), &more).is_some_and(|why| why.contains("broker 2 has more")));
        assert_eq!(better(&row("learner", 9), &more), None);
        assert_eq!(better(&row("candidate", 3), &more), None, "that is for the operator to decide");
        assert!(better_than(&row("pulling", 0), me, std::iter::empty()).is_some());
    }
}
