//! `Admin`'s calls about brokers and the cluster as a whole.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use flowstone_protocol::{BrokerId, Error, ErrorCode, TopicPartition, pb};

use super::admin::{decided, decided_as, odd_answer};
use super::metadata::{brokers, controller};
use super::topics::in_sync;
use crate::cluster::control::Again;
use crate::cluster::report::{Reports, Rows};
use crate::controller::change::{PartitionEntry, Place};
use crate::controller::commands::{MetadataCommand, MetadataReply, PlannedMove, ReplaceBroker, can_replace};
use crate::controller::table::{BrokerEntry, MetadataTable, Topic};
use crate::node::Node;

/// Partitions that one answer about the cluster's health names.
const UNHEALTHY_MAX: usize = 1000;
/// Partitions that an error names.
const NAMED_MAX: usize = 10;

pub(super) async fn describe(
    node: &Arc<Node>,
    _request: pb::DescribeClusterRequest,
) -> Result<pb::DescribeClusterResponse, Error> {
    let controller_id = controller(node);
    Ok(node.table.with(|table| pb::DescribeClusterResponse {
        cluster_id: node.cluster.to_string(),
        controller_id,
        brokers: brokers(table),
        topics: table.topic_count() as i32,
        partitions: table.partition_count() as i32,
        feature_level: table.founding().map_or(0, |founding| founding.feature_level),
        uptime_ms: i64::try_from(node.ready_since.elapsed().as_millis()).unwrap_or(i64::MAX),
        broker_id: node.id.get(),
    }))
}

pub(super) async fn health(
    node: &Arc<Node>,
    request: pb::ClusterHealthRequest,
) -> Result<pb::ClusterHealthResponse, Error> {
    decided_as(node, "ClusterHealth", &[], Again::Harmless, request, health_here).await
}

/// By the controller, which knows of whom it has heard; the rest is asked of all brokers that are alive.
pub(super) async fn health_here(
    node: Arc<Node>,
    _request: pb::ClusterHealthRequest,
) -> Result<pb::ClusterHealthResponse, Error> {
    if !node.control.leads() {
        return Err(node.control.not_controller());
    }
    // Walks over all partitions: not under the lock that every reader takes.
    let table = node.table.with(MetadataTable::clone);
    let alive = table.brokers().filter(|broker| !broker.fenced).map(|broker| broker.id);
    let reports = Reports::of(&node, alive, &[]).await;
    let leaders = reports.leaders();
    let mut leads: HashMap<BrokerId, i32> = HashMap::new();
    for (leader, _) in leaders.values() {
        *leads.entry(*leader).or_default() += 1;
    }
    let mut response = pb::ClusterHealthResponse {
        brokers: Vec::new(),
        partitions: Vec::new(),
        partitions_total: 0,
        under_replicated: 0,
        leaderless: 0,
        controller_id: node.id.get(),
    };
    let rows = reports.rows();
    for (topic, tp, entry) in table.entries() {
        response.partitions_total += 1;
        let Some(unhealthy) = partition_health(&table, &rows, topic, tp, entry, leaders.get(&tp).copied()) else {
            continue;
        };
        match unhealthy.problem() {
            pb::PartitionProblem::Leaderless => response.leaderless += 1,
            _ => response.under_replicated += 1,
        }
        if response.partitions.len() < UNHEALTHY_MAX {
            response.partitions.push(unhealthy);
        }
    }
    let now = Instant::now();
    response.brokers = table
        .brokers()
        .map(|broker| {
            let leaders = leads.get(&broker.id).copied().unwrap_or(0);
            let is_silent = reports.silent.contains(&broker.id);
            broker_health(&node, &table, broker, leaders, is_silent, now)
        })
        .collect();
    Ok(response)
}

fn broker_health(
    node: &Node,
    table: &MetadataTable,
    broker: &BrokerEntry,
    leaders: i32,
    is_silent: bool,
    now: Instant,
) -> pb::BrokerHealth {
    let (silence, disk) = node.control.duty.of(broker.id, now);
    let state = if broker.fenced { pb::BrokerState::Dead } else { pb::BrokerState::Alive };
    let is_here = broker.id == node.id;
    let mut detail = Vec::new();
    if is_silent {
        // It is alive by its own word: what it leads may be well, though it counts as without a leader here.
        detail.push(format!("does not answer broker {}, the controller: see what is between the two", node.id));
    }
    if let Some(by) = node.control.duty.detour(broker.id) {
        detail.push(format!("is heard of by way of broker {by} alone: see what is between it and broker {}", node.id));
    }
    if disk.is_full {
        detail.push("its disk is full: it leads nothing that others can lead; free some room".to_owned());
    }
    pb::BrokerHealth {
        broker_id: broker.id.get(),
        state: state.into(),
        draining: broker.draining,
        address: broker.client_address.clone(),
        peer_address: broker.peer_address.clone(),
        rack: broker.rack.clone(),
        version: broker.version.clone(),
        replicas: table.load(broker.id).replicas as i32,
        leaders,
        disk_free_bytes: if is_here { node.room.free_bytes() } else { disk.free_bytes },
        disk_total_bytes: if is_here { node.room.total_bytes() } else { disk.total_bytes },
        detail: detail.join("; "),
        silent_ms: silence.map_or(-1, |silence| i64::try_from(silence.as_millis()).unwrap_or(i64::MAX)),
    }
}

/// What a partition lacks; `None` for nothing.
fn partition_health(
    table: &MetadataTable,
    rows: &Rows<'_>,
    topic: &Topic,
    tp: TopicPartition,
    entry: &PartitionEntry,
    leader: Option<(BrokerId, &flowstone_protocol::peer::ReplicaReport)>,
) -> Option<pb::PartitionHealth> {
    let mut burdens = Vec::new();
    let (problem, in_sync) = match leader {
        None => (pb::PartitionProblem::Leaderless, Vec::new()),
        Some((leader, report)) => {
            let in_sync = in_sync((tp, entry), leader, report, rows);
            burdens = dead_leavers((tp, entry), report, rows);
            if burdens.is_empty() && in_sync.len() >= entry.replicas().len() {
                return None;
            }
            (pb::PartitionProblem::UnderReplicated, in_sync)
        }
    };
    let lacking = entry.replicas().iter().filter(|place| !in_sync.contains(&place.broker.get())).map(|place| {
        let broker = place.broker;
        let said = rows.of(tp, place);
        match (table.broker(broker), said) {
            (None, _) => format!("broker {broker} is not part of the cluster any more"),
            (Some(known), _) if known.fenced => format!("broker {broker} is down"),
            (Some(known), _) if known.directory != place.directory => {
                format!("broker {broker} came back with another data directory")
            }
            (Some(_), None) => format!("broker {broker} says nothing of it"),
            (Some(_), Some(row)) => match &row.error {
                Some(error) => format!("broker {broker}: {}", error.message),
                None => format!("broker {broker} is {}", row.role),
            },
        }
    });
    let burdens = burdens.into_iter().map(|place| {
        format!("replica {} of broker {} is on its way out, gone, and votes still", place.replica, place.broker)
    });
    Some(pb::PartitionHealth {
        topic: topic.name.clone(),
        partition: tp.partition.get(),
        problem: problem.into(),
        leader_id: leader.map_or(-1, |(leader, _)| leader.get()),
        replicas: entry.replicas().iter().map(|place| place.broker.get()).collect(),
        detail: lacking.chain(burdens).collect::<Vec<_>>().join("; "),
        in_sync,
    })
}

/// Replicas that leave, and count for the majority though they take no part any more: with one of these a partition bears the
/// death of one broker less than it has replicas for.
fn dead_leavers(
    (tp, entry): (TopicPartition, &PartitionEntry),
    report: &flowstone_protocol::peer::ReplicaReport,
    rows: &Rows<'_>,
) -> Vec<Place> {
    let is_dead = |place: &&Place| {
        let member = report.members.iter().find(|member| member.replica_id == place.replica.get());
        member.is_some_and(|member| !member.is_learner && (!member.in_sync || rows.is_away(tp, place)))
    };
    entry.leaving().iter().filter(is_dead).copied().collect()
}

pub(super) async fn drain(node: &Arc<Node>, request: pb::DrainBrokerRequest) -> Result<pb::DrainBrokerResponse, Error> {
    decided(node, "DrainBroker", request, drain_here).await
}

pub(super) async fn drain_here(
    node: Arc<Node>,
    request: pb::DrainBrokerRequest,
) -> Result<pb::DrainBrokerResponse, Error> {
    let command = MetadataCommand::DrainBroker {
        broker: BrokerId::new(request.broker_id),
        undo: request.undo,
        seed: rand::random(),
        validate_only: request.validate_only,
    };
    let MetadataReply::Moves { moves, .. } = node.control.command(command).await? else {
        return Err(odd_answer());
    };
    Ok(pb::DrainBrokerResponse { moves: show_moves(&node, &moves).await })
}

pub(super) async fn decommission(
    node: &Arc<Node>,
    request: pb::DecommissionBrokerRequest,
) -> Result<pb::DecommissionBrokerResponse, Error> {
    decided(node, "DecommissionBroker", request, decommission_here).await
}

pub(super) async fn decommission_here(
    node: Arc<Node>,
    request: pb::DecommissionBrokerRequest,
) -> Result<pb::DecommissionBrokerResponse, Error> {
    let command = MetadataCommand::DecommissionBroker { broker: BrokerId::new(request.broker_id) };
    match node.control.command(command).await? {
        MetadataReply::Done => Ok(pb::DecommissionBrokerResponse {}),
        _ => Err(odd_answer()),
    }
}

pub(super) async fn replace(
    node: &Arc<Node>,
    request: pb::ReplaceBrokerRequest,
) -> Result<pb::ReplaceBrokerResponse, Error> {
    decided(node, "ReplaceBroker", request, replace_here).await
}

pub(super) async fn replace_here(
    node: Arc<Node>,
    request: pb::ReplaceBrokerRequest,
) -> Result<pb::ReplaceBrokerResponse, Error> {
    let mut planned = Vec::new();
    loop {
        let command = MetadataCommand::ReplaceBroker(ReplaceBroker {
            old: BrokerId::new(request.old_broker_id),
            new: BrokerId::new(request.new_broker_id),
            seed: rand::random(),
            validate_only: request.validate_only,
        });
        let MetadataReply::Moves { moves, more } = node.control.command(command).await? else {
            return Err(odd_answer());
        };
        let is_stuck = moves.is_empty();
        planned.extend(moves);
        if !more || request.validate_only || is_stuck {
            break;
        }
    }
    let left = if request.validate_only { Vec::new() } else { stuck(&node, BrokerId::new(request.old_broker_id)) };
    if let Some(first) = left.first() {
        let named: Vec<String> =
            left.iter().take(NAMED_MAX).map(|(topic, tp)| format!("{topic} {}", tp.partition)).collect();
        return Err(Error::new(
            ErrorCode::InvalidRequest,
            format!(
                "{} partition(s) are given new replicas; {} have no majority without broker {} and are left as they are \
                 ({}{}); bring it back, or go on with what is left of each, if anything is: flowstone partition recover {} {}",
                planned.len(),
                left.len(),
                request.old_broker_id,
                named.join(", "),
                if left.len() > NAMED_MAX { ", ..." } else { "" },
                first.0,
                first.1.partition
            ),
        ));
    }
    Ok(pb::ReplaceBrokerResponse { moves: show_moves(&node, &planned).await })
}

/// Partitions with a replica on a broker that is gone, whose groups cannot decide on another one.
fn stuck(node: &Node, gone: BrokerId) -> Vec<(String, TopicPartition)> {
    let table = node.table.with(MetadataTable::clone);
    let stuck = table.entries().filter_map(|(topic, tp, entry)| {
        let lost = entry.replicas().iter().find(|place| place.broker == gone)?;
        (!can_replace(&table, entry, lost.replica)).then(|| (topic.name.clone(), tp))
    });
    stuck.collect()
}

/// Moves as they are told, with the bytes that each copies at most.
pub(super) async fn show_moves(node: &Arc<Node>, moves: &[PlannedMove]) -> Vec<pb::PlannedMove> {
    if moves.is_empty() {
        return Vec::new();
    }
    let bytes = bytes_by_partition(node).await;
    let brokers = |brokers: &[BrokerId]| brokers.iter().map(|broker| broker.get()).collect();
    moves
        .iter()
        .map(|planned| {
            let added = planned.to.iter().filter(|broker| !planned.from.contains(broker)).count() as u64;
            pb::PlannedMove {
                topic: planned.topic.clone(),
                partition: planned.tp.partition.get(),
                from: brokers(&planned.from),
                to: brokers(&planned.to),
                bytes: bytes.get(&planned.tp).copied().unwrap_or(0) * added,
            }
        })
        .collect()
}

/// How large each partition is, as its leader tells.
pub(super) async fn bytes_by_partition(node: &Arc<Node>) -> HashMap<TopicPartition, u64> {
    let alive: Vec<BrokerId> =
        node.table.with(|table| table.brokers().filter(|broker| !broker.fenced).map(|broker| broker.id).collect());
    let reports = Reports::of(node, alive, &[]).await;
    reports.leaders().into_iter().map(|(tp, (_, report))| (tp, report.log_bytes)).collect()
}

/// For a broker that is named and is none of the cluster.
pub(super) fn not_a_replica(node: &Node, broker: BrokerId, entry: &PartitionEntry) -> Error {
    let holders: Vec<String> = entry.replicas().iter().map(|place| place.broker.to_string()).collect();
    let known = node.table.with(|table| table.broker(broker).is_some());
    let what = if known { "has no replica of the partition" } else { "is none of the cluster" };
    Error::new(ErrorCode::InvalidRequest, format!("broker {broker} {what}; name one of {}", holders.join(", ")))
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::peer::{MemberReport, ReplicaReport, ReportResponse};
    use flowstone_protocol::{DirectoryId, PartitionId, ReplicaId, TopicId};

    use super::*;
    use crate::controller::change::Assignment;

    #[test]
    fn who_leaves_and_is_gone_burdens_its_partition_while_it_votes() {
        let tp = TopicPartition { topic: TopicId::from_bytes([7; 16]), partition: PartitionId::new(0) };
        let place = |broker: i32, replica: u64| Place {
            broker: BrokerId::new(broker),
            directory: DirectoryId::from_bytes([1; 16]),
            replica: ReplicaId::new(replica),
        };
        let lost = place(2, 12);
        let before = PartitionEntry::new(Assignment::new(vec![place(1, 11), lost, place(3, 13)]));
        let entry = PartitionEntry::new(Assignment::replaced(&before, lost, place(2, 22)));
        // The new one caught up, and counts, before the old one is out.
        let burdens = |old: MemberReport, of_broker_2: &[u64]| {
            let member = |replica_id: u64| MemberReport { replica_id, in_sync: true, ..MemberReport::default() };
            let members = vec![member(11), member(22), member(13), old];
            let report = ReplicaReport { replica_id: 11, members, ..ReplicaReport::default() };
            let row = |&replica_id: &u64| ReplicaReport {
                topic_id: tp.topic.to_bytes().to_vec().into(),
                replica_id,
                role: "follower".to_owned(),
                ..ReplicaReport::default()
            };
            let mut reports = Reports::default();
            let answer =
                ReportResponse { replicas: of_broker_2.iter().map(row).collect(), ..ReportResponse::default() };
            reports.by_broker.insert(BrokerId::new(2), answer);
            dead_leavers((tp, &entry), &report, &reports.rows())
        };
        let old = |in_sync: bool, is_learner: bool| MemberReport {
            replica_id: 12,
            in_sync,
            is_learner,
            ..MemberReport::default()
        };
        assert_eq!(burdens(old(false, false), &[12, 22]), [lost], "its leader does not hear of it");
        assert_eq!(burdens(old(true, false), &[22]), [lost], "its broker says that it is gone");
        assert_eq!(burdens(old(true, false), &[12, 22]), [], "it lives");
        assert_eq!(burdens(old(false, true), &[22]), [], "it does not vote");
    }
}
