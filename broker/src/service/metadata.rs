//! `Metadata` and `WatchMetadata`: brokers, topics, and where partitions are led.

use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use flowstone_protocol::{BrokerId, Error, ErrorCode, Offset, PartitionId, TopicName, TopicPartition, pb};
use futures::{FutureExt, Stream, StreamExt, stream};
use tonic::Status;

use super::{repeated, shutting_down};
use crate::controller::change::PartitionEntry;
use crate::controller::commands::unknown_topic;
use crate::controller::table::{MetadataTable, Topic};
use crate::node::Node;

/// Between a watcher's updates.
const PAUSE: Duration = Duration::from_millis(20);
/// Nobody.
const NO_LEADER: i32 = -1;

/// How long a name that is not known here may take to be looked up for certain.
const LOOK_UP_MAX: Duration = Duration::from_secs(2);

/// The named topics, or all.
pub(super) async fn metadata(node: &Node, request: &pb::MetadataRequest) -> Result<pb::MetadataResponse, Error> {
    let names_max = node.config.limits.queries_per_request;
    if request.topics.len() > names_max {
        return Err(Error::new(
            ErrorCode::InvalidRequest,
            format!(
                "{} names in one call, and {names_max} is the limit (limits.queries_per_request); name none to get all",
                request.topics.len()
            ),
        ));
    }
    let is_known = |name: &String| node.table.with(|table| table.topic_named(name).is_some());
    if !request.topics.iter().all(is_known) {
        // Another broker may have created it a moment ago; if that cannot be found out, what is known here must do.
        drop(tokio::time::timeout(LOOK_UP_MAX, node.control.caught_up()).await);
    }
    let view = View::of(node);
    let topics = if request.topics.is_empty() {
        let wanted = view.topics.iter().filter(|topic| request.include_internal || !topic.internal);
        wanted.map(|topic| topic_metadata(node, &view, topic)).collect()
    } else {
        let by_name: HashMap<&str, &Arc<Topic>> =
            view.topics.iter().map(|topic| (topic.name.as_str(), topic)).collect();
        request.topics.iter().map(|name| named(node, &view, by_name.get(name.as_str()).copied(), name)).collect()
    };
    Ok(view.response(node, topics))
}

/// The metadata of one moment, taken out of the table by reference: what is made of it takes long, and the table's own
/// replica must not wait for that.
struct View {
    /// Sorted by name.
    topics: Vec<Arc<Topic>>,
    brokers: Vec<pb::Broker>,
    /// Brokers that the controller has not heard of for too long.
    dead: HashSet<BrokerId>,
    applied: Offset,
    recovery: i64,
}

impl View {
    fn of(node: &Node) -> Self {
        node.table.with(Self::of_table)
    }

    fn of_table(table: &MetadataTable) -> Self {
        Self {
            topics: table.topics().cloned().collect(),
            brokers: brokers(table),
            dead: table.brokers().filter(|broker| broker.fenced).map(|broker| broker.id).collect(),
            applied: table.applied(),
            recovery: table.recovery(),
        }
    }

    fn response(self, node: &Node, topics: Vec<pb::TopicMetadata>) -> pb::MetadataResponse {
        pb::MetadataResponse {
            cluster_id: node.cluster.to_string(),
            brokers: self.brokers,
            controller_id: controller(node),
            topics,
            metadata_offset: self.applied.get(),
            metadata_recovery: self.recovery,
        }
    }
}

fn named(node: &Node, view: &View, topic: Option<&Arc<Topic>>, name: &str) -> pb::TopicMetadata {
    let error = match topic {
        Some(topic) => return topic_metadata(node, view, topic),
        // A name that no topic can have says so, rather than that there is none.
        None => match TopicName::new(name) {
            Ok(_) => unknown_topic(name),
            Err(malformed) => Error::new(ErrorCode::InvalidTopicName, malformed.to_string()).with_topic(repeated(name)),
        },
    };
    pb::TopicMetadata {
        name: name.to_owned(),
        topic_id: Vec::new().into(),
        partitions: Vec::new(),
        internal: name.starts_with("__"),
        error: Some(error.to_detail()),
    }
}

pub(super) fn brokers(table: &MetadataTable) -> Vec<pb::Broker> {
    table
        .brokers()
        .map(|broker| pb::Broker {
            id: broker.id.get(),
            address: broker.client_address.clone(),
            rack: broker.rack.clone(),
            version: broker.version.clone(),
        })
        .collect()
}

/// The broker that leads the metadata.
pub(super) fn controller(node: &Node) -> i32 {
    node.control.controller().map_or(NO_LEADER, BrokerId::get)
}

fn topic_metadata(node: &Node, view: &View, topic: &Topic) -> pb::TopicMetadata {
    let partitions = topic.partitions.iter().enumerate().map(|(partition, entry)| {
        let partition = PartitionId::new(partition as i32);
        let (leader_id, leader_epoch) = leader(node, &view.dead, TopicPartition { topic: topic.id, partition }, entry);
        let brokers = || entry.replicas().iter().map(|place| place.broker);
        pb::PartitionMetadata {
            partition: partition.get(),
            leader_id,
            leader_epoch,
            replicas: brokers().map(BrokerId::get).collect(),
            alive: brokers().filter(|broker| !view.dead.contains(broker)).map(BrokerId::get).collect(),
        }
    });
    pb::TopicMetadata {
        name: topic.name.clone(),
        topic_id: topic.id.to_bytes().to_vec().into(),
        partitions: partitions.collect(),
        internal: topic.internal,
        error: None,
    }
}

/// Who leads, and since which epoch, as far as this broker knows. What only the metadata says of a dead broker does not
/// count: it is from before its death.
fn leader(node: &Node, dead: &HashSet<BrokerId>, tp: TopicPartition, entry: &PartitionEntry) -> (i32, i32) {
    let led = node.led(tp, entry.leader());
    (led.alive(|leader| dead.contains(&leader)).map_or(NO_LEADER, BrokerId::get), led.epoch.get())
}

/// The updates of one watcher.
pub(crate) struct MetadataWatch(Pin<Box<dyn Stream<Item = Result<pb::MetadataUpdate, Status>> + Send>>);

impl std::fmt::Debug for MetadataWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MetadataWatch")
    }
}

impl Stream for MetadataWatch {
    type Item = Result<pb::MetadataUpdate, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(cx)
    }
}

/// Everything once, then what changes. A watcher that reads slowly gets several changes as one update: what is kept for
/// it is one offset and the leaders it was told.
pub(super) fn watch(node: Arc<Node>, include_internal: bool) -> MetadataWatch {
    let drained = super::produce::drained(node.drain.clone()).shared();
    let watcher = Watcher {
        changes: node.table.changes(),
        replicas: node.replicas.changes(),
        node,
        include_internal,
        told: None,
        recovery: 0,
        leaders: HashMap::new(),
        dead: HashSet::new(),
    };
    let updates = stream::unfold(watcher, |mut watcher| async move {
        let update = watcher.next().await?;
        Some((Ok(update), watcher))
    });
    let end = stream::once(drained.clone().map(|()| Err(shutting_down().to_status())));
    // The goodbye ends the stream, also for a watcher that waits.
    MetadataWatch(Box::pin(updates.take_until(drained).chain(end)))
}

struct Watcher {
    node: Arc<Node>,
    changes: tokio::sync::watch::Receiver<Offset>,
    replicas: tokio::sync::watch::Receiver<u64>,
    include_internal: bool,
    /// Metadata up to here was told; `None` before the first update.
    told: Option<Offset>,
    /// The metadata's recovery that this belongs to: of another one everything is told anew.
    recovery: i64,
    /// Leaders as they were told.
    leaders: HashMap<TopicPartition, (i32, i32)>,
    /// Brokers that were dead then.
    dead: HashSet<BrokerId>,
}

impl Watcher {
    async fn next(&mut self) -> Option<pb::MetadataUpdate> {
        loop {
            if self.told.is_some() {
                // Many changes come together; one update tells of them.
                tokio::time::sleep(PAUSE).await;
            }
            self.changes.borrow_and_update();
            self.replicas.borrow_and_update();
            if let Some(update) = self.update() {
                return Some(update);
            }
            tokio::select! {
                changed = self.changes.changed() => changed.ok()?,
                changed = self.replicas.changed() => changed.ok()?,
            }
        }
    }

    /// What changed since the last one; `None` for nothing.
    fn update(&mut self) -> Option<pb::MetadataUpdate> {
        let node = Arc::clone(&self.node);
        let recovery = node.table.with(MetadataTable::recovery);
        if std::mem::replace(&mut self.recovery, recovery) != recovery {
            self.told = None;
        }
        let since = self.told.unwrap_or(Offset::new(-1));
        let (deleted, brokers_changed, view) = node
            .table
            .with(|table| (table.deleted_since(since), table.brokers_changed_at() > since, View::of_table(table)));
        // Too far behind to be told what went: it gets everything, as at the beginning.
        let deleted = if self.told.is_some() { deleted } else { None };
        let whole = deleted.is_none();
        let mut topics = Vec::new();
        let mut leaders = HashMap::new();
        // Whoever reads from the nearest replica wants to know which of them live.
        let turned: HashSet<BrokerId> = view.dead.symmetric_difference(&self.dead).copied().collect();
        for topic in view.topics.iter().filter(|topic| self.include_internal || !topic.internal) {
            let mut changed = whole || topic.changed_at > since;
            for (partition, entry) in topic.partitions.iter().enumerate() {
                let tp = TopicPartition { topic: topic.id, partition: PartitionId::new(partition as i32) };
                let now = leader(&node, &view.dead, tp, entry);
                changed |= self.leaders.get(&tp) != Some(&now);
                changed |= !turned.is_empty() && entry.replicas().iter().any(|place| turned.contains(&place.broker));
                leaders.insert(tp, now);
            }
            if changed {
                topics.push(topic_metadata(&node, &view, topic));
            }
        }
        self.leaders = leaders;
        self.dead.clone_from(&view.dead);
        let deleted = deleted.unwrap_or_default();
        if !whole && topics.is_empty() && deleted.is_empty() && !brokers_changed {
            self.told = Some(view.applied);
            return None;
        }
        self.told = Some(view.applied);
        Some(pb::MetadataUpdate {
            metadata: Some(view.response(&node, topics)),
            deleted_topic_ids: deleted.iter().map(|topic| topic.to_bytes().to_vec().into()).collect(),
        })
    }
}
