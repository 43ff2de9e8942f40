//! `Admin`'s calls about topics.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::{BrokerId, Error, ErrorCode, Offset, PartitionId, ReplicaId, TopicId, TopicPartition, pb};
use flowstone_replication::{Reply, TrimTo};
use tokio::sync::oneshot;

use super::admin::{decided, decided_as, handed_on, odd_answer, well_named};
use super::find;
use super::partitions::confirmed;
use crate::cluster::control::Again;
use crate::cluster::report::{Reports, Rows, sickness};
use crate::controller::change::{PartitionEntry, Place};
use crate::controller::commands::{
    AlterTopic, CreateTopic, MetadataCommand, MetadataReply, internal_topic, unknown_topic,
};
use crate::controller::table::{MetadataTable, Topic};
use crate::node::{Led, Node};
use crate::partition::Slot;
use crate::topic_config::TOPIC_KEYS;

/// How long an answer waits for a change to have reached the brokers. The change itself is committed; past this, clients
/// that come early are told to try again.
const FOLLOW_UP_MAX: Duration = Duration::from_secs(10);
/// A name that is not known here may have been given a moment ago by another broker: how long that may take to be found
/// out.
const LOOK_UP_MAX: Duration = Duration::from_secs(2);
/// Brokers that a forwarded trim may be sent to, one after another.
const HOPS_MAX: usize = 3;

pub(super) async fn create(
    node: &Arc<Node>,
    request: pb::CreateTopicRequest,
) -> Result<pb::CreateTopicResponse, Error> {
    well_named(&request.name)?;
    let validate_only = request.validate_only;
    // Drawn once, by the client or here: a controller that is asked a second time, since the first answer was lost, knows
    // the topic by it.
    let id = match TopicId::from_slice(&request.request_id) {
        Some(id) => id,
        None if request.request_id.is_empty() => fresh_id(),
        None => {
            return Err(Error::new(
                ErrorCode::InvalidRequest,
                format!("request_id has {} bytes; give it 16, or leave it out", request.request_id.len()),
            ));
        }
    };
    let here = |node, request| create_here(node, request, id);
    let response: pb::CreateTopicResponse =
        decided_as(node, "CreateTopic", &id.to_bytes(), Again::Harmless, request, here).await?;
    let topic = followed(node, response.topic, validate_only).await;
    Ok(pb::CreateTopicResponse { topic })
}

/// The id of a topic to come.
pub(super) fn fresh_id() -> TopicId {
    TopicId::new(uuid::Uuid::new_v4().as_u128())
}

pub(super) async fn create_here(
    node: Arc<Node>,
    request: pb::CreateTopicRequest,
    topic_id: TopicId,
) -> Result<pb::CreateTopicResponse, Error> {
    let command = CreateTopic {
        name: request.name,
        partitions: request.partitions,
        replication_factor: request.replication_factor,
        configs: entries(request.configs),
        topic_id,
        seed: rand::random(),
        validate_only: request.validate_only,
    };
    let MetadataReply::Topic(topic) = node.control.command(MetadataCommand::CreateTopic(command)).await? else {
        return Err(odd_answer());
    };
    Ok(pb::CreateTopicResponse { topic: Some(described(&node, &topic, &Reports::default())) })
}

pub(super) async fn alter(node: &Arc<Node>, request: pb::AlterTopicRequest) -> Result<pb::AlterTopicResponse, Error> {
    well_named(&request.name)?;
    let validate_only = request.validate_only;
    let response: pb::AlterTopicResponse = decided(node, "AlterTopic", request, alter_here).await?;
    let topic = followed(node, response.topic, validate_only).await;
    Ok(pb::AlterTopicResponse { topic })
}

pub(super) async fn alter_here(
    node: Arc<Node>,
    request: pb::AlterTopicRequest,
) -> Result<pb::AlterTopicResponse, Error> {
    let command = AlterTopic {
        name: request.name,
        set: entries(request.set),
        unset: request.unset,
        partitions: request.partitions,
        seed: rand::random(),
        validate_only: request.validate_only,
    };
    let MetadataReply::Topic(topic) = node.control.command(MetadataCommand::AlterTopic(command)).await? else {
        return Err(odd_answer());
    };
    Ok(pb::AlterTopicResponse { topic: Some(described(&node, &topic, &Reports::default())) })
}

/// The topic once a change of it has reached this broker and every partition has a leader; as the controller described it
/// where it was only to be checked.
async fn followed(
    node: &Arc<Node>,
    told: Option<pb::TopicDescription>,
    validate_only: bool,
) -> Option<pb::TopicDescription> {
    let told = told?;
    let id = TopicId::from_slice(&told.topic_id)?;
    if validate_only {
        return Some(told);
    }
    // Past the deadline the change is made all the same.
    drop(tokio::time::timeout(FOLLOW_UP_MAX, reached(node, id, told.partitions.len())).await);
    match node.table.with(|table| table.topic(id).cloned()) {
        Some(topic) => Some(describe(node, &topic).await),
        None => Some(told),
    }
}

/// Waits until the topic is known here with that many partitions, and each is led by somebody or has failed to open.
pub(super) async fn reached(node: &Arc<Node>, id: TopicId, partitions: usize) {
    drop(node.control.caught_up().await);
    let (mut replicas, mut changes) = (node.replicas.changes(), node.table.changes());
    let is_served = |tp: TopicPartition, entry: &PartitionEntry| {
        let slot = node.replicas.get(tp);
        let is_here = entry.replicas().iter().any(|place| place.broker == node.id);
        match slot {
            Some(Slot::Failed(_) | Slot::Refused(_)) => true,
            Some(Slot::Open(_)) => node.led(tp, entry.leader()).by.is_some(),
            _ => !is_here && node.led(tp, entry.leader()).by.is_some(),
        }
    };
    loop {
        replicas.borrow_and_update();
        changes.borrow_and_update();
        let topic = node.table.with(|table| table.topic(id).cloned());
        if let Some(topic) = topic
            && topic.partitions.len() >= partitions
            && topic.entries().all(|(tp, entry)| is_served(tp, entry))
        {
            return;
        }
        tokio::select! {
            changed = replicas.changed() => if changed.is_err() { return },
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

pub(super) async fn delete(
    node: &Arc<Node>,
    request: pb::DeleteTopicRequest,
) -> Result<pb::DeleteTopicResponse, Error> {
    well_named(&request.name)?;
    let response: pb::DeleteTopicResponse = decided(node, "DeleteTopic", request, delete_here).await?;
    // Whoever asks this broker next is told that it is gone.
    drop(tokio::time::timeout(LOOK_UP_MAX, node.control.caught_up()).await);
    Ok(response)
}

pub(super) async fn delete_here(
    node: Arc<Node>,
    request: pb::DeleteTopicRequest,
) -> Result<pb::DeleteTopicResponse, Error> {
    let command = MetadataCommand::DeleteTopic { name: request.name };
    let MetadataReply::Deleted(topic) = node.control.command(command).await? else {
        return Err(odd_answer());
    };
    Ok(pb::DeleteTopicResponse { topic_id: topic.to_bytes().to_vec().into() })
}

/// The topic of that name, asked for certain where it is not known here.
pub(super) async fn named(node: &Node, name: &str) -> Result<Arc<Topic>, Error> {
    well_named(name)?;
    let look = || node.table.with(|table| table.topic_named(name).cloned());
    if let Some(topic) = look() {
        return Ok(topic);
    }
    drop(tokio::time::timeout(LOOK_UP_MAX, node.control.caught_up()).await);
    look().ok_or_else(|| unknown_topic(name))
}

pub(super) async fn describe_named(
    node: &Arc<Node>,
    request: pb::DescribeTopicRequest,
) -> Result<pb::DescribeTopicResponse, Error> {
    let topic = named(node, &request.name).await?;
    Ok(pb::DescribeTopicResponse { topic: Some(describe(node, &topic).await) })
}

/// The topic, as the leaders of its partitions tell.
async fn describe(node: &Arc<Node>, topic: &Topic) -> pb::TopicDescription {
    let leaders: HashSet<BrokerId> = topic
        .entries()
        .filter_map(|(tp, entry)| {
            let leader = node.led(tp, entry.leader()).by?;
            // What this broker knows of a partition that it has alone, it need not be asked for.
            (leader != node.id || entry.is_changing() || entry.replicas().len() > 1).then_some(leader)
        })
        .collect();
    let reports = if leaders.is_empty() { Reports::default() } else { Reports::of(node, leaders, &[topic.id]).await };
    described(node, topic, &reports)
}

pub(super) fn described(node: &Node, topic: &Topic, reports: &Reports) -> pb::TopicDescription {
    let configs = TOPIC_KEYS.iter().map(|key| {
        let broker = node.config.topic.get(key.name);
        let (value, source) = match (topic.overrides.get(key.name), broker) {
            (Some(value), _) => (value.as_str(), pb::ConfigSource::Topic),
            (None, Some(value)) => (value.as_str(), pb::ConfigSource::Broker),
            (None, None) => (key.default, pb::ConfigSource::Default),
        };
        pb::ConfigValue { key: key.name.to_owned(), value: value.to_owned(), source: source.into() }
    });
    let (leaders, rows) = (reports.leaders(), reports.rows());
    let partitions = topic.entries().map(|(tp, entry)| match leaders.get(&tp) {
        Some((leader, report)) => {
            let mut description =
                empty(tp, entry, Led { by: Some(*leader), epoch: epoch_of(report.term), is_heard: true });
            description.log_start = report.log_start;
            description.high_watermark = report.high_watermark;
            description.end_offset = report.end_offset;
            description.log_bytes = report.log_bytes;
            description.records = report.records;
            description.error = report.error.clone().or_else(|| {
                (!confirmed(report)).then(|| {
                    stale(format!(
                        "broker {leader} leads it and hears no majority of its replicas: another may lead by now"
                    ))
                })
            });
            description.in_sync = in_sync((tp, entry), *leader, report, &rows);
            description
        }
        None => partition_here(node, tp, entry),
    });
    pb::TopicDescription {
        name: topic.name.clone(),
        topic_id: topic.id.to_bytes().to_vec().into(),
        replication_factor: topic.replication_factor as i32,
        internal: topic.internal,
        configs: configs.collect(),
        partitions: partitions.collect(),
    }
}

fn epoch_of(term: u64) -> flowstone_protocol::LeaderEpoch {
    flowstone_protocol::LeaderEpoch::from_term(flowstone_protocol::Term::new(term))
        .unwrap_or(flowstone_protocol::LeaderEpoch::NONE)
}

/// Brokers whose wanted replica votes and has all that is committed, as the leader sees it and unless that broker itself
/// says otherwise.
pub(super) fn in_sync(
    (tp, entry): (TopicPartition, &PartitionEntry),
    leader: BrokerId,
    report: &flowstone_protocol::peer::ReplicaReport,
    rows: &Rows<'_>,
) -> Vec<i32> {
    let follows = |replica: ReplicaId| {
        let member = report.members.iter().find(|member| member.replica_id == replica.get());
        member.is_some_and(|member| member.in_sync && !member.is_learner)
    };
    let is_in_sync = |place: &&Place| place.broker == leader || follows(place.replica) && !rows.is_away(tp, place);
    entry.replicas().iter().filter(is_in_sync).map(|place| place.broker.get()).collect()
}

fn empty(tp: TopicPartition, entry: &PartitionEntry, led: Led) -> pb::PartitionDescription {
    let brokers = |places: &[Place]| places.iter().map(|place| place.broker.get()).collect();
    pb::PartitionDescription {
        partition: tp.partition.get(),
        leader_id: led.by.map_or(-1, BrokerId::get),
        leader_epoch: led.epoch.get(),
        replicas: brokers(entry.replicas()),
        log_start: 0,
        high_watermark: 0,
        end_offset: 0,
        log_bytes: 0,
        records: 0,
        error: None,
        in_sync: Vec::new(),
        leaving: brokers(entry.leaving()),
    }
}

/// A partition of which no leader told, as it is known here.
fn partition_here(node: &Node, tp: TopicPartition, entry: &PartitionEntry) -> pb::PartitionDescription {
    let led = node.led(tp, entry.leader());
    let mut description = empty(tp, entry, led);
    match find(node, tp) {
        Ok(partition) => {
            let status = partition.replica.status();
            description.log_start = status.log_start.get();
            description.high_watermark = status.high_watermark.get();
            description.end_offset = status.end_offset.get();
            description.log_bytes = status.size_bytes;
            description.records = status.records;
            if status.is_ready() && entry.replicas().len() == 1 {
                description.in_sync = vec![node.id.get()];
            }
            description.error = sickness(&status.health).map(|error| node.explain(error, &partition).to_detail());
            if description.error.is_none() && entry.replicas().len() > 1 {
                // It is not asked where it is known to be down, and else did not answer.
                let why = match led.by.filter(|leader| *leader != node.id) {
                    Some(leader) => format!("broker {leader}, which led it last, does not answer"),
                    None => "nobody is known to lead it".to_owned(),
                };
                description.error = Some(stale(format!("{why}: the figures are what broker {} has", node.id)));
            }
        }
        Err(error) => description.error = Some(error.to_detail()),
    }
    description
}

/// What a description says that may be from earlier.
fn stale(why: String) -> flowstone_protocol::pb::ErrorDetail {
    Error::new(ErrorCode::NoLeader, format!("{why}, and may be old; ask again, or see flowstone cluster health"))
        .to_detail()
}

pub(super) async fn trim(
    node: &Arc<Node>,
    request: pb::TrimPartitionRequest,
) -> Result<pb::TrimPartitionResponse, Error> {
    well_named(&request.topic)?;
    if request.topic.starts_with("__") {
        return Err(internal_topic(&request.topic));
    }
    let topic = named(node, &request.topic).await?;
    let tp = TopicPartition { topic: topic.id, partition: PartitionId::new(request.partition) };
    let mut to = node.leader(tp).by.filter(|leader| *leader != node.id);
    for _ in 0..HOPS_MAX {
        let trimmed = match to {
            None => trim_here(Arc::clone(node), request.clone()).await,
            Some(leader) => handed_on(node, leader, "TrimPartition", &request, &[]).await,
        };
        match trimmed {
            Err(Error { code: ErrorCode::NotLeader, leader_hint: Some((leader, _)), .. }) => {
                to = (leader != node.id).then_some(leader);
            }
            trimmed => return trimmed,
        }
    }
    Err(Error::new(ErrorCode::NoLeader, "the partition's leader changes too often; try again")
        .with_topic(request.topic)
        .with_partition(tp.partition))
}

pub(super) async fn trim_here(
    node: Arc<Node>,
    request: pb::TrimPartitionRequest,
) -> Result<pb::TrimPartitionResponse, Error> {
    let topic = named(&node, &request.topic).await?;
    let tp = TopicPartition { topic: topic.id, partition: PartitionId::new(request.partition) };
    let partition = find(&node, tp)?;
    let to = match request.offset {
        -1 => TrimTo::HighWatermark,
        offset => {
            let status = partition.replica.status();
            // A log start that is there already is no error: trimming twice is trimming once.
            if offset < 0 || (status.is_ready() && Offset::new(offset) > status.high_watermark) {
                let error = Error::new(
                    ErrorCode::OffsetOutOfRange,
                    format!(
                        "offset {offset} is out of range: the partition begins at {} and ends at {}; trim to one of \
                         these, or to -1 for its end",
                        status.log_start, status.high_watermark
                    ),
                );
                return Err(node.explain(error, &partition));
            }
            TrimTo::Offset(Offset::new(offset))
        }
    };
    let (sender, receiver) = oneshot::channel();
    partition.replica.trim(to, Reply::from(sender));
    let log_start = receiver
        .await
        .map_err(|_| super::shutting_down())
        .and_then(|answer| answer)
        .map_err(|error| node.explain(error, &partition))?;
    Ok(pb::TrimPartitionResponse { log_start: log_start.get() })
}

pub(super) async fn list(node: &Arc<Node>, request: pb::ListTopicsRequest) -> Result<pb::ListTopicsResponse, Error> {
    let topics = node.table.with(|table: &MetadataTable| {
        let wanted = table.topics().filter(|topic| request.include_internal || !topic.internal);
        wanted
            .map(|topic| pb::TopicSummary {
                name: topic.name.clone(),
                topic_id: topic.id.to_bytes().to_vec().into(),
                partitions: topic.partitions.len() as i32,
                replication_factor: topic.replication_factor as i32,
                internal: topic.internal,
            })
            .collect()
    });
    Ok(pb::ListTopicsResponse { topics })
}

fn entries(entries: Vec<pb::ConfigEntry>) -> Vec<(String, String)> {
    entries.into_iter().map(|entry| (entry.key, entry.value)).collect()
}
