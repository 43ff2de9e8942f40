//! What the cluster looks like: brokers, topics, leaders. A cache that one task keeps fresh by watching a broker.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::pb;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::address::ServerAddress;
use crate::connection::{ConnectionSettings, ControlConnections};
use crate::error::{Error, ErrorCode, Result};
use crate::retry::{Backoff, BackoffPolicy};

/// One topic as last heard of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TopicInfo {
    pub(crate) name: Arc<str>,
    /// 16 bytes, as on the wire.
    pub(crate) id: Bytes,
    /// Leader of each partition, by its number; `None` where there is none now.
    pub(crate) leaders: Vec<Option<i32>>,
    pub(crate) internal: bool,
}

impl TopicInfo {
    pub(crate) fn partition_count(&self) -> i32 {
        i32::try_from(self.leaders.len()).unwrap_or(i32::MAX)
    }

    fn from_pb(topic: &pb::TopicMetadata) -> Self {
        let mut leaders = vec![None; topic.partitions.len()];
        for partition in &topic.partitions {
            let place = usize::try_from(partition.partition).ok().and_then(|number| leaders.get_mut(number));
            if let Some(place) = place {
                *place = (partition.leader_id >= 0).then_some(partition.leader_id);
            }
        }
        Self { name: Arc::from(topic.name.as_str()), id: topic.topic_id.clone(), leaders, internal: topic.internal }
    }
}

/// The cluster at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) cluster_id: String,
    pub(crate) controller: Option<i32>,
    pub(crate) brokers: HashMap<i32, ServerAddress>,
    topics: HashMap<Arc<str>, Arc<TopicInfo>>,
    metadata_offset: i64,
    /// Topics that were asked for by name, and the metadata offset of the answer: the watch may be behind it, and does
    /// not know them then.
    ahead: HashMap<Arc<str>, i64>,
}

impl Snapshot {
    pub(crate) fn topic(&self, name: &str) -> Option<&Arc<TopicInfo>> {
        self.topics.get(name)
    }

    pub(crate) fn leader(&self, topic: &str, partition: i32) -> Option<i32> {
        let topic = self.topics.get(topic)?;
        *topic.leaders.get(usize::try_from(partition).ok()?)?
    }

    /// Takes in an update; `whole` replaces everything. A broker that is behind what is known says nothing new.
    fn apply(&mut self, update: &pb::MetadataResponse, deleted: &[Bytes], whole: bool) {
        let same_cluster = self.cluster_id == update.cluster_id;
        if same_cluster && update.metadata_offset < self.metadata_offset {
            return;
        }
        self.ahead.retain(|_, known_at| same_cluster && *known_at > update.metadata_offset);
        if whole {
            self.topics.retain(|name, _| self.ahead.contains_key(name));
            self.cluster_id.clone_from(&update.cluster_id);
        }
        self.metadata_offset = update.metadata_offset;
        self.controller = (update.controller_id >= 0).then_some(update.controller_id);
        if !update.brokers.is_empty() {
            self.brokers = brokers(&update.brokers);
        }
        if !deleted.is_empty() {
            self.topics.retain(|_, topic| !deleted.contains(&topic.id));
        }
        for topic in update.topics.iter().filter(|topic| topic.error.is_none()) {
            let info = TopicInfo::from_pb(topic);
            self.topics.insert(info.name.clone(), Arc::new(info));
        }
    }

    /// A topic that was asked for by name, ahead of what the watch has told.
    fn add(&mut self, info: TopicInfo, metadata_offset: i64) {
        self.ahead.insert(info.name.clone(), metadata_offset);
        self.topics.insert(info.name.clone(), Arc::new(info));
    }

    /// A broker said who leads; whatever the watch tells next counts more.
    fn set_leader(&mut self, topic: &str, partition: i32, broker: i32, address: Option<ServerAddress>) {
        if let Some(address) = address {
            self.brokers.insert(broker, address);
        }
        if let Some(info) = self.topics.get_mut(topic) {
            let place = usize::try_from(partition).ok().filter(|number| *number < info.leaders.len());
            if let Some(place) = place {
                Arc::make_mut(info).leaders[place] = Some(broker);
            }
        }
    }
}

fn brokers(list: &[pb::Broker]) -> HashMap<i32, ServerAddress> {
    list.iter().filter_map(|broker| Some((broker.id, ServerAddress::parse(&broker.address).ok()?))).collect()
}

/// What the watching task tells: the newest snapshot, and why there is none or why it grows stale.
#[derive(Clone, Debug, Default)]
struct Watched {
    snapshot: Option<Arc<Snapshot>>,
    failure: Option<Error>,
}

/// The cache and the control connections: what producers, consumers and administration share. Dropping the last
/// holder ends the watch.
#[derive(Debug)]
pub(crate) struct Cluster {
    connections: ControlConnections,
    bootstrap: Vec<ServerAddress>,
    request_timeout: Duration,
    watched: watch::Sender<Watched>,
}

impl Cluster {
    /// Starts to watch, and waits for the first answer for as long as a request may take.
    pub(crate) async fn connect(
        bootstrap: Vec<ServerAddress>,
        settings: ConnectionSettings,
        request_timeout: Duration,
    ) -> Result<Arc<Self>> {
        let cluster = Arc::new(Self {
            connections: ControlConnections::new(settings),
            bootstrap,
            request_timeout,
            watched: watch::Sender::default(),
        });
        let mut watched = cluster.watched.subscribe();
        tokio::spawn(watch_metadata(Arc::downgrade(&cluster), watched.clone()));
        let refused = |watched: &Watched| watched.failure.as_ref().is_some_and(|failure| !failure.is_retriable());
        let first = watched.wait_for(|watched| watched.snapshot.is_some() || refused(watched));
        let answered = tokio::time::timeout(request_timeout, first).await.is_ok_and(|first| first.is_ok());
        if !answered || cluster.watched.borrow().snapshot.is_none() {
            let failure = cluster.watched.borrow().failure.clone();
            let tried = cluster.bootstrap.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(failure.unwrap_or_else(|| {
                Error::unreachable(format!(
                    "no broker answered within {request_timeout:?} at {tried}; is one running there?"
                ))
            }));
        }
        Ok(cluster)
    }

    pub(crate) fn settings(&self) -> &ConnectionSettings {
        self.connections.settings()
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        self.request_timeout
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.watched.borrow().snapshot.clone().unwrap_or_default()
    }

    /// Tells of every change from now on.
    pub(crate) fn changes(&self) -> MetadataChanges {
        MetadataChanges(self.watched.subscribe())
    }

    /// A topic: from the cache, or asked for where the cache has none.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC` where a broker that is ready does not know it.
    pub(crate) async fn topic(&self, name: &str) -> Result<Arc<TopicInfo>> {
        if let Some(topic) = self.snapshot().topic(name) {
            return Ok(topic.clone());
        }
        let response = self
            .call_log(None, |mut log| {
                let request = pb::MetadataRequest { topics: vec![name.to_owned()], include_internal: true };
                async move { log.metadata(request).await }
            })
            .await
            .map_err(|error| error.at_topic(name))?;
        let missing = || Error::new(ErrorCode::UnknownTopic, "there is no such topic; create it first").at_topic(name);
        let topic = response.topics.iter().find(|topic| topic.name == name).ok_or_else(missing)?;
        if let Some(detail) = &topic.error {
            return Err(Error::from_detail(detail).at_topic(name));
        }
        let info = TopicInfo::from_pb(topic);
        let known = Arc::new(info.clone());
        let (brokers, metadata_offset) = (brokers(&response.brokers), response.metadata_offset);
        self.change(|snapshot| {
            snapshot.add(info, metadata_offset);
            for (id, address) in brokers {
                snapshot.brokers.entry(id).or_insert(address);
            }
        });
        Ok(known)
    }

    /// Drops a topic that a broker does not know any more, so that its name is asked for anew.
    pub(crate) fn forget(&self, name: &str) {
        if self.snapshot().topic(name).is_some() {
            self.change(|snapshot| {
                snapshot.topics.remove(name);
            });
        }
    }

    /// Takes a broker's word for who leads a partition.
    pub(crate) fn heed_hint(&self, topic: &str, partition: i32, error: &Error) {
        let Some((broker, address)) = error.leader_hint() else { return };
        let snapshot = self.snapshot();
        if broker < 0 || snapshot.leader(topic, partition) == Some(broker) {
            return;
        }
        let address = ServerAddress::parse(address).ok();
        if address.is_some() || snapshot.brokers.contains_key(&broker) {
            self.change(|snapshot| snapshot.set_leader(topic, partition, broker, address));
        }
    }

    fn change(&self, change: impl FnOnce(&mut Snapshot)) {
        self.watched.send_modify(|watched| {
            change(Arc::make_mut(watched.snapshot.get_or_insert_default()));
        });
    }

    /// Where to ask, best first: the one named, then the known brokers, then the addresses from the start.
    fn candidates(&self, first: Option<&ServerAddress>) -> Vec<ServerAddress> {
        let snapshot = self.snapshot();
        let mut list: Vec<ServerAddress> = first.into_iter().cloned().collect();
        let mut known: Vec<_> = snapshot.brokers.iter().collect();
        known.sort();
        for address in known.into_iter().map(|(_, address)| address).chain(&self.bootstrap) {
            if !list.contains(address) {
                list.push(address.clone());
            }
        }
        list
    }

    /// Asks brokers in turn, `first` before others, until one answers for good or the request timeout is over.
    async fn call<T, F: Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>>(
        &self,
        first: Option<&ServerAddress>,
        attempt: impl Fn(&ServerAddress) -> Result<F>,
    ) -> Result<T> {
        let deadline = Instant::now() + self.request_timeout;
        let mut backoff = Backoff::new(BackoffPolicy::REQUEST);
        let mut first = first.cloned();
        loop {
            let mut last = None;
            let candidates = self.candidates(first.as_ref());
            // One that hangs must not use up the time of the others.
            let share = self.request_timeout / u32::try_from(candidates.len()).unwrap_or(u32::MAX).max(1);
            for address in candidates {
                let until = deadline.min(Instant::now() + share);
                let error = match tokio::time::timeout_at(until, attempt(&address)?).await {
                    Ok(Ok(response)) => return Ok(response.into_inner()),
                    Ok(Err(status)) => Error::from_status(&address, status),
                    Err(_) => {
                        let message = format!("the broker at {address} did not answer in {share:?}; is it overloaded?");
                        Error::unreachable(message)
                    }
                };
                if !error.is_retriable() {
                    return Err(error);
                }
                if let Some((_, hint)) = error.leader_hint() {
                    first = ServerAddress::parse(hint).ok();
                }
                // A broker that gave a reason tells more than the next one's refused connection.
                if last.as_ref().is_none_or(Error::is_unreachable) || !error.is_unreachable() {
                    last = Some(error);
                }
            }
            let wait = backoff.failed();
            if Instant::now() + wait >= deadline {
                return Err(last.unwrap_or_else(|| Error::unreachable("no broker is known")));
            }
            tokio::time::sleep(wait).await;
        }
    }

    pub(crate) async fn call_log<T, F: Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>>(
        &self,
        first: Option<&ServerAddress>,
        attempt: impl Fn(pb::log_client::LogClient<tonic::transport::Channel>) -> F,
    ) -> Result<T> {
        self.call(first, |address| Ok(attempt(self.connections.log(address)?))).await
    }

    pub(crate) async fn call_admin<T, F: Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>>(
        &self,
        first: Option<&ServerAddress>,
        attempt: impl Fn(pb::admin_client::AdminClient<tonic::transport::Channel>) -> F,
    ) -> Result<T> {
        self.call(first, |address| Ok(attempt(self.connections.admin(address)?))).await
    }

    /// The controller's address, where it is known.
    pub(crate) fn controller(&self) -> Option<ServerAddress> {
        let snapshot = self.snapshot();
        snapshot.brokers.get(&snapshot.controller?).cloned()
    }
}

/// Wakes whoever waits for the metadata to change.
#[derive(Clone, Debug)]
pub(crate) struct MetadataChanges(watch::Receiver<Watched>);

impl MetadataChanges {
    /// Returns once something changed since the last call; never, once the cluster is gone.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Keeps the cache fresh for as long as somebody holds the cluster. The receiver is only there to learn of its end:
/// a task that held the cluster itself would keep it alive for ever.
async fn watch_metadata(cluster: Weak<Cluster>, mut alive: watch::Receiver<Watched>) {
    let mut backoff = Backoff::new(BackoffPolicy::CONNECT);
    let mut turn = 0_usize;
    loop {
        let Some(strong) = cluster.upgrade() else { return };
        let candidates = strong.candidates(None);
        let address = &candidates[turn % candidates.len()];
        let client = strong.connections.log(address);
        drop(strong);
        let mut heard = false;
        let failure = match client {
            Ok(client) => tokio::select! {
                failure = follow(&cluster, address, client, &mut heard) => failure,
                () = ended(&mut alive) => return,
            },
            Err(error) => error,
        };
        if heard {
            backoff.succeeded();
        }
        turn = turn.wrapping_add(1);
        let Some(strong) = cluster.upgrade() else { return };
        tracing::debug!(%address, %failure, "metadata watch ended");
        strong.watched.send_if_modified(|watched| {
            watched.failure = Some(failure);
            // Only who waits for the first answer wants to know.
            watched.snapshot.is_none()
        });
        drop(strong);
        tokio::select! {
            () = tokio::time::sleep(backoff.failed()) => {}
            () = ended(&mut alive) => return,
        }
    }
}

async fn ended(alive: &mut watch::Receiver<Watched>) {
    while alive.changed().await.is_ok() {}
}

/// One watch, to its end; the error says why it ended.
async fn follow(
    cluster: &Weak<Cluster>,
    address: &ServerAddress,
    mut client: pb::log_client::LogClient<tonic::transport::Channel>,
    heard: &mut bool,
) -> Error {
    let mut stream = match client.watch_metadata(pb::WatchMetadataRequest { include_internal: true }).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Error::from_status(address, status),
    };
    loop {
        match stream.message().await {
            Ok(Some(update)) => {
                let Some(strong) = cluster.upgrade() else { return Error::closed("client") };
                if let Some(metadata) = &update.metadata {
                    let whole = !*heard;
                    strong.change(|snapshot| snapshot.apply(metadata, &update.deleted_topic_ids, whole));
                    *heard = true;
                } else if *heard && !update.deleted_topic_ids.is_empty() {
                    strong.change(|snapshot| {
                        snapshot.topics.retain(|_, topic| !update.deleted_topic_ids.contains(&topic.id));
                    });
                }
            }
            Ok(None) => return Error::unreachable("the broker ended the metadata watch"),
            Err(status) => return Error::from_status(address, status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(name: &str, id: u8, leaders: &[i32]) -> pb::TopicMetadata {
        let partitions = leaders.iter().zip(0..).map(|(leader, partition)| pb::PartitionMetadata {
            partition,
            leader_id: *leader,
            leader_epoch: 1,
            replicas: vec![*leader],
        });
        pb::TopicMetadata {
            name: name.into(),
            topic_id: Bytes::copy_from_slice(&[id; 16]),
            partitions: partitions.collect(),
            internal: false,
            error: None,
        }
    }

    fn update(offset: i64, topics: Vec<pb::TopicMetadata>) -> pb::MetadataResponse {
        pb::MetadataResponse {
            cluster_id: "c".into(),
            brokers: vec![pb::Broker { id: 1, address: "127.0.0.1:7070".into(), ..Default::default() }],
            controller_id: 1,
            topics,
            metadata_offset: offset,
        }
    }

    #[test]
    fn a_whole_update_replaces_and_a_part_adds() {
        let mut snapshot = Snapshot::default();
        snapshot.apply(&update(5, vec![topic("a", 1, &[1, -1]), topic("b", 2, &[1])]), &[], true);
        assert_eq!((snapshot.leader("a", 0), snapshot.leader("a", 1), snapshot.leader("a", 2)), (Some(1), None, None));
        snapshot.apply(&update(6, vec![topic("a", 1, &[2, 2])]), &[Bytes::copy_from_slice(&[2; 16])], false);
        assert_eq!(snapshot.leader("a", 1), Some(2));
        assert!(snapshot.topic("b").is_none());
        snapshot.apply(&update(7, vec![topic("c", 3, &[1])]), &[], true);
        assert!(snapshot.topic("a").is_none() && snapshot.topic("c").is_some());
    }

    #[test]
    fn a_topic_asked_for_by_name_outlives_a_watch_that_is_behind() {
        let mut snapshot = Snapshot::default();
        snapshot.apply(&update(5, vec![]), &[], true);
        snapshot.add(TopicInfo::from_pb(&topic("new", 3, &[1])), 8);
        snapshot.apply(&update(7, vec![]), &[], true);
        assert!(snapshot.topic("new").is_some(), "the watch is behind the answer");
        snapshot.apply(&update(8, vec![]), &[], true);
        assert!(snapshot.topic("new").is_none(), "the watch knows better");
    }

    #[test]
    fn a_broker_that_is_behind_changes_nothing() {
        let mut snapshot = Snapshot::default();
        snapshot.apply(&update(9, vec![topic("a", 1, &[1])]), &[], true);
        snapshot.apply(&update(4, vec![]), &[], true);
        assert!(snapshot.topic("a").is_some());
        // Another cluster at the same address starts anew, however small its offsets.
        let other = pb::MetadataResponse { cluster_id: "other".into(), ..update(1, vec![]) };
        snapshot.apply(&other, &[], true);
        assert!(snapshot.topic("a").is_none());
    }

    #[test]
    fn a_hint_moves_one_leader() {
        let mut snapshot = Snapshot::default();
        snapshot.apply(&update(1, vec![topic("a", 1, &[1, 1])]), &[], true);
        snapshot.set_leader("a", 1, 7, ServerAddress::parse("h:1").ok());
        snapshot.set_leader("a", 9, 7, None);
        assert_eq!((snapshot.leader("a", 0), snapshot.leader("a", 1)), (Some(1), Some(7)));
        assert!(snapshot.brokers.contains_key(&7));
    }
}
