//! Administration: topics, offsets, the cluster.

mod groups;
mod operations;
mod transactions;

use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::pb;
use serde::Serialize;

use crate::address::ServerAddress;
use crate::cluster::Cluster;
use crate::error::{Error, ErrorCode, Result};
use crate::metadata::TopicInfo;
use crate::retry::{Backoff, BackoffPolicy};

pub(crate) use groups::check_range;
pub use groups::{
    CommittedOffset, GroupDescription, GroupMember, GroupState, GroupSummary, MemberPartition, PartitionLag,
};
pub use operations::{
    BrokerHealth, BrokerState, ClusterHealth, MoveDescription, PartitionHealth, PartitionProblem, PlannedMove,
    RebalancePlan, RecoveredPartition,
};
pub use transactions::{TransactionDescription, TransactionState, TransactionSummary};

/// Creates, lists, describes, changes and deletes; made by [`Client::admin`](crate::Client::admin).
///
/// Any broker may be asked for anything. Every call retries what is retriable until the client's request timeout, and may
/// fail with `TIMED_OUT`. What was done by an attempt whose answer was lost is not reported as an error by the next.
///
/// ```no_run
/// # async fn run(client: flowstone_client::Client) -> flowstone_client::Result<()> {
/// use flowstone_client::NewTopic;
/// let admin = client.admin();
/// admin.create_topic(NewTopic::new("orders").partitions(12).config("retention.ms", "604800000")).await?;
/// for topic in admin.list_topics().await? {
///     println!("{} with {} partitions", topic.name, topic.partitions);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Admin {
    cluster: Arc<Cluster>,
}

/// A topic to create.
#[derive(Clone, Debug)]
pub struct NewTopic {
    request: pb::CreateTopicRequest,
}

/// What to change about a topic, as one change.
#[derive(Clone, Debug)]
pub struct AlterTopic {
    request: pb::AlterTopicRequest,
}

/// A topic in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TopicSummary {
    /// Its name.
    pub name: String,
    /// Its id, as a UUID; a topic made anew under an old name has another.
    pub topic_id: String,
    /// Its number of partitions.
    pub partitions: i32,
    /// Replicas of each partition.
    pub replication_factor: i32,
    /// Whether it is one of the cluster's own.
    pub internal: bool,
}

/// A topic in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TopicDescription {
    /// Its name.
    pub name: String,
    /// Its id, as a UUID.
    pub topic_id: String,
    /// Replicas of each partition.
    pub replication_factor: i32,
    /// Whether it is one of the cluster's own.
    pub internal: bool,
    /// Every config key with its effective value, sorted by key.
    pub configs: Vec<ConfigValue>,
    /// Its partitions, by number.
    pub partitions: Vec<PartitionDescription>,
}

/// The effective value of a config key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ConfigValue {
    /// The key, such as `retention.ms`.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Where the value comes from.
    pub source: ConfigSource,
}

/// Where a config value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ConfigSource {
    /// Nothing set it.
    Default,
    /// The broker's config.
    Broker,
    /// The topic's own config.
    Topic,
}

/// One partition in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PartitionDescription {
    /// Its number.
    pub partition: i32,
    /// The broker that leads it, where there is one.
    pub leader: Option<i32>,
    /// The leader's epoch.
    pub leader_epoch: i32,
    /// The brokers that hold it, the preferred leader first.
    pub replicas: Vec<i32>,
    /// Those whose replica votes and has all that is committed, as the leader sees it.
    pub in_sync: Vec<i32>,
    /// The brokers whose replica is on its way out.
    pub leaving: Vec<i32>,
    /// First offset that can be read.
    pub log_start: i64,
    /// One past the last offset that can be read.
    pub high_watermark: i64,
    /// One past the last offset written.
    pub end_offset: i64,
    /// Bytes on disk at the answering broker.
    pub log_bytes: u64,
    /// Data records between log start and high watermark; control records are not counted.
    pub records: u64,
    /// Why it cannot serve now.
    pub error: Option<String>,
}

/// The cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ClusterDescription {
    /// Its id.
    pub cluster_id: String,
    /// The broker that leads the metadata, where there is one.
    pub controller: Option<i32>,
    /// Its brokers.
    pub brokers: Vec<BrokerDescription>,
    /// Topics, the cluster's own left out.
    pub topics: i32,
    /// Partitions of these topics.
    pub partitions: i32,
    /// Gates new records and file formats.
    pub feature_level: i32,
    /// The broker that answered.
    pub answered_by: i32,
    /// Milliseconds since that broker was ready.
    pub uptime_ms: i64,
}

/// One broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct BrokerDescription {
    /// Its id.
    pub id: i32,
    /// `HOST:PORT` of its client listener.
    pub address: String,
    /// Its rack, empty where not set.
    pub rack: String,
    /// Its version.
    pub version: String,
}

/// A place in a partition's log, to be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OffsetSpec {
    /// The first offset that can be read.
    Start,
    /// One past the last offset that can be read.
    End,
    /// The first record whose timestamp, in milliseconds since 1970, is at least this; the end where there is none.
    Timestamp(i64),
    /// The record that has this many data records at or after it; the start where there are fewer.
    FromEnd(u64),
}

/// What a lookup found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct OffsetInfo {
    /// The topic asked about.
    pub topic: String,
    /// The partition asked about.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
    /// The timestamp of the record found, where one was asked for.
    pub timestamp: Option<i64>,
    /// First offset that can be read.
    pub log_start: i64,
    /// One past the last offset that can be read.
    pub high_watermark: i64,
    /// First offset of the oldest open transaction, the high watermark where none is open: how far `read_committed` reads.
    pub last_stable_offset: i64,
    /// Data records between log start and high watermark.
    pub records: u64,
}

impl NewTopic {
    /// A topic of this name with one partition and the cluster's defaults.
    pub fn new(name: impl Into<String>) -> Self {
        Self { request: pb::CreateTopicRequest { name: name.into(), ..Default::default() } }
    }

    /// Number of partitions; the cluster's default, 1, unless set.
    #[must_use]
    pub fn partitions(mut self, partitions: i32) -> Self {
        // Zero asks for the default on the wire; somebody who says zero here wants to be told that it is no number.
        self.request.partitions = if partitions == 0 { -1 } else { partitions };
        self
    }

    /// Replicas of each partition; the smaller of 3 and the number of brokers unless set.
    #[must_use]
    pub fn replicas(mut self, replicas: i32) -> Self {
        self.request.replication_factor = if replicas == 0 { -1 } else { replicas };
        self
    }

    /// One config key, such as `retention.ms`.
    #[must_use]
    pub fn config(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.configs.push(pb::ConfigEntry { key: key.into(), value: value.into() });
        self
    }

    /// Only check whether it could be created.
    #[must_use]
    pub fn validate_only(mut self, validate_only: bool) -> Self {
        self.request.validate_only = validate_only;
        self
    }
}

impl AlterTopic {
    /// Changes to this topic, none yet.
    pub fn new(name: impl Into<String>) -> Self {
        Self { request: pb::AlterTopicRequest { name: name.into(), ..Default::default() } }
    }

    /// The new number of partitions in all; it can only grow.
    #[must_use]
    pub fn partitions(mut self, total: i32) -> Self {
        self.request.partitions = if total == 0 { -1 } else { total };
        self
    }

    /// Sets a config key.
    #[must_use]
    pub fn set(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.set.push(pb::ConfigEntry { key: key.into(), value: value.into() });
        self
    }

    /// Gives a config key back its default.
    #[must_use]
    pub fn unset(mut self, key: impl Into<String>) -> Self {
        self.request.unset.push(key.into());
        self
    }

    /// Only check whether it could be changed.
    #[must_use]
    pub fn validate_only(mut self, validate_only: bool) -> Self {
        self.request.validate_only = validate_only;
        self
    }
}

impl Admin {
    pub(crate) fn new(cluster: Arc<Cluster>) -> Self {
        Self { cluster }
    }

    /// Creates a topic; it is known to this client when this returns.
    ///
    /// # Errors
    /// `TOPIC_ALREADY_EXISTS`, `INVALID_TOPIC_NAME`, `INVALID_PARTITIONS`, `INVALID_REPLICATION_FACTOR`,
    /// `INVALID_CONFIG`, `INTERNAL_TOPIC`.
    pub async fn create_topic(&self, topic: NewTopic) -> Result<TopicDescription> {
        let mut request = topic.request;
        request.request_id = Bytes::copy_from_slice(&rand::random::<u128>().to_be_bytes());
        let name = request.name.clone();
        // A retry must know whose topic it is that exists already.
        let before = match self.cluster.ask_for_topic(&name).await {
            Ok(known) => Some(known.id.clone()),
            Err(_) => None,
        };
        let mut retried = false;
        let created = self
            .cluster
            .call_admin_once(
                |mut admin| {
                    let request = request.clone();
                    async move { admin.create_topic(request).await }
                },
                &mut retried,
            )
            .await
            .map_err(|error| error.at_topic(&name));
        if request.validate_only {
            return description(created?.topic);
        }
        let topic = match created {
            Err(error) if retried && error.code() == ErrorCode::TopicAlreadyExists => {
                self.created_before(&request, before).await.ok_or(error)?
            }
            created => created?.topic,
        };
        if let Some(topic) = &topic {
            // Other brokers may not have heard of it yet: who uses it now must not be told that there is no such topic.
            self.cluster.know_created(topic);
        }
        description(topic)
    }

    /// The topic that an earlier attempt created, whose answer was lost: it was not there before, and is as it should be.
    async fn created_before(
        &self,
        request: &pb::CreateTopicRequest,
        before: Option<Bytes>,
    ) -> Option<Option<pb::TopicDescription>> {
        let topic = self.described(&request.name).await.ok()?;
        let there = topic.as_ref()?;
        let set = |wanted: &pb::ConfigEntry| {
            let known = there.configs.iter().find(|config| config.key == wanted.key);
            known.is_some_and(|config| config.source() == pb::ConfigSource::Topic && config.value == wanted.value)
        };
        let as_wanted = i32::try_from(there.partitions.len()) == Ok(request.partitions.max(1))
            && (request.replication_factor == 0 || there.replication_factor == request.replication_factor)
            && request.configs.iter().all(set);
        (before.as_ref() != Some(&there.topic_id) && as_wanted).then_some(topic)
    }

    /// The topics, by name, without the cluster's own.
    ///
    /// # Errors
    /// None but those of every call.
    pub async fn list_topics(&self) -> Result<Vec<TopicSummary>> {
        self.list(false).await
    }

    /// The topics, by name, with the cluster's own (`__...`).
    ///
    /// # Errors
    /// None but those of every call.
    pub async fn list_all_topics(&self) -> Result<Vec<TopicSummary>> {
        self.list(true).await
    }

    async fn list(&self, include_internal: bool) -> Result<Vec<TopicSummary>> {
        let response = self
            .cluster
            .call_admin(|mut admin| async move { admin.list_topics(pb::ListTopicsRequest { include_internal }).await })
            .await?;
        let mut topics: Vec<TopicSummary> = response.topics.into_iter().map(TopicSummary::from_pb).collect();
        topics.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(topics)
    }

    /// Everything about a topic.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`.
    pub async fn describe_topic(&self, name: &str) -> Result<TopicDescription> {
        description(self.described(name).await?)
    }

    async fn described(&self, name: &str) -> Result<Option<pb::TopicDescription>> {
        let response = self
            .cluster
            .call_admin(|mut admin| {
                let request = pb::DescribeTopicRequest { name: name.to_owned() };
                async move { admin.describe_topic(request).await }
            })
            .await
            .map_err(|error| error.at_topic(name))?;
        Ok(response.topic)
    }

    /// Changes configs, adds partitions, or both.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `INVALID_CONFIG`, `INVALID_PARTITIONS`, `INTERNAL_TOPIC`.
    pub async fn alter_topic(&self, change: AlterTopic) -> Result<TopicDescription> {
        let request = change.request;
        let mut retried = false;
        let altered = self
            .cluster
            .call_admin_once(
                |mut admin| {
                    let request = request.clone();
                    async move { admin.alter_topic(request).await }
                },
                &mut retried,
            )
            .await
            .map_err(|error| error.at_topic(&request.name));
        match altered {
            // The first attempt added the partitions, and its answer was lost: there can be no more added up to there.
            Err(error) if retried && error.code() == ErrorCode::InvalidPartitions && !request.validate_only => {
                let described = self.describe_topic(&request.name).await?;
                let done = i32::try_from(described.partitions.len()) == Ok(request.partitions)
                    && request.set.iter().all(|wanted| has_config(&described, wanted));
                if done { Ok(described) } else { Err(error) }
            }
            altered => description(altered?.topic),
        }
    }

    /// Deletes a topic with all that is in it.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `INTERNAL_TOPIC`.
    pub async fn delete_topic(&self, name: &str) -> Result<()> {
        let mut retried = false;
        let deleted = self
            .cluster
            .call_admin_once(
                |mut admin| {
                    let request = pb::DeleteTopicRequest { name: name.to_owned() };
                    async move { admin.delete_topic(request).await }
                },
                &mut retried,
            )
            .await;
        match deleted {
            // The first attempt deleted it, and its answer was lost.
            Err(error) if retried && error.code() == ErrorCode::UnknownTopic => {}
            deleted => drop(deleted.map_err(|error| error.at_topic(name))?),
        }
        self.cluster.forget(name);
        Ok(())
    }

    /// Gives up the records of a partition below `offset`, and returns the new log start.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`, `INTERNAL_TOPIC`; `OFFSET_OUT_OF_RANGE` for one beyond the high watermark.
    pub async fn trim(&self, topic: &str, partition: i32, offset: i64) -> Result<i64> {
        if offset < 0 {
            let message = format!("an offset to trim to cannot be negative, {offset} is; use trim_to_end for all");
            return Err(Error::new(ErrorCode::InvalidRequest, message).at(topic, partition));
        }
        self.trim_partition(topic, partition, offset).await
    }

    /// Gives up all records of a partition that can be read now, and returns the new log start.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`, `INTERNAL_TOPIC`.
    pub async fn trim_to_end(&self, topic: &str, partition: i32) -> Result<i64> {
        self.trim_partition(topic, partition, -1).await
    }

    async fn trim_partition(&self, topic: &str, partition: i32, offset: i64) -> Result<i64> {
        let leader = self.leader(topic, partition).await?;
        let response = self
            .cluster
            .call_admin_at(
                leader.as_ref(),
                |mut admin| {
                    let request = pb::TrimPartitionRequest { topic: topic.to_owned(), partition, offset };
                    async move { admin.trim_partition(request).await }
                },
                // Trimming twice to the same offset is trimming once.
                &mut false,
            )
            .await
            .map_err(|error| error.at(topic, partition))?;
        Ok(response.log_start)
    }

    async fn leader(&self, topic: &str, partition: i32) -> Result<Option<ServerAddress>> {
        known_partition(&*self.cluster.topic(topic).await?, partition)?;
        let snapshot = self.cluster.snapshot();
        Ok(snapshot.leader(topic, partition).and_then(|leader| snapshot.address(leader)).cloned())
    }

    /// The cluster and its brokers.
    ///
    /// # Errors
    /// None but those of every call.
    pub async fn describe_cluster(&self) -> Result<ClusterDescription> {
        let response = self
            .cluster
            .call_admin(|mut admin| async move { admin.describe_cluster(pb::DescribeClusterRequest {}).await })
            .await?;
        Ok(ClusterDescription {
            cluster_id: response.cluster_id,
            controller: (response.controller_id >= 0).then_some(response.controller_id),
            brokers: response
                .brokers
                .into_iter()
                .map(|broker| BrokerDescription {
                    id: broker.id,
                    address: broker.address,
                    rack: broker.rack,
                    version: broker.version,
                })
                .collect(),
            topics: response.topics,
            partitions: response.partitions,
            feature_level: response.feature_level,
            answered_by: response.broker_id,
            uptime_ms: response.uptime_ms,
        })
    }

    /// Looks up places of partitions' logs; the answers are in the order of the questions.
    ///
    /// A leader answers from what it knows. One that was just replaced and has not heard of it knows less than there is;
    /// [`list_offsets_linearizable`](Self::list_offsets_linearizable) does not take its word.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`: the first that occurs, for all.
    pub async fn list_offsets(&self, queries: &[(&str, i32, OffsetSpec)]) -> Result<Vec<OffsetInfo>> {
        list_offsets(&self.cluster, queries, false).await
    }

    /// As [`list_offsets`](Self::list_offsets), and each leader makes sure that it still leads before it answers: all that
    /// was acknowledged before this call, to whomever, lies below the end.
    ///
    /// # Errors
    /// As [`list_offsets`](Self::list_offsets); `TIMED_OUT` for a partition whose majority is away.
    pub async fn list_offsets_linearizable(&self, queries: &[(&str, i32, OffsetSpec)]) -> Result<Vec<OffsetInfo>> {
        list_offsets(&self.cluster, queries, true).await
    }

    /// Looks up one place in every partition of a topic, by partition.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`.
    pub async fn topic_offsets(&self, topic: &str, at: OffsetSpec) -> Result<Vec<OffsetInfo>> {
        let partitions = self.cluster.topic(topic).await?.partition_count();
        let queries: Vec<_> = (0..partitions).map(|partition| (topic, partition, at)).collect();
        list_offsets(&self.cluster, &queries, false).await
    }
}

pub(crate) fn known_partition(topic: &TopicInfo, partition: i32) -> Result<()> {
    let count = topic.partition_count();
    if (0..count).contains(&partition) {
        return Ok(());
    }
    let message = format!("there is no partition {partition}: {} has 0 to {}", topic.name, count - 1);
    Err(Error::new(ErrorCode::UnknownPartition, message).at(&topic.name, partition))
}

/// Asks the leaders, again for those partitions whose leader changed or is not ready, until the request timeout.
pub(crate) async fn list_offsets(
    cluster: &Arc<Cluster>,
    queries: &[(&str, i32, OffsetSpec)],
    linearizable: bool,
) -> Result<Vec<OffsetInfo>> {
    let queries: Vec<_> = queries.iter().map(|(topic, partition, at)| (*topic, *partition, at.to_pb())).collect();
    query_offsets(cluster, &queries, linearizable).await
}

/// As [`list_offsets`], for all that a broker can be asked.
async fn query_offsets(
    cluster: &Arc<Cluster>,
    queries: &[(&str, i32, pb::offset_query::At)],
    linearizable: bool,
) -> Result<Vec<OffsetInfo>> {
    let deadline = tokio::time::Instant::now() + cluster.request_timeout();
    let mut found: Vec<Option<OffsetInfo>> = vec![None; queries.len()];
    let mut backoff = Backoff::new(BackoffPolicy::REQUEST);
    loop {
        let mut by_leader: std::collections::BTreeMap<Option<i32>, Vec<usize>> = std::collections::BTreeMap::new();
        for (number, (name, partition, _)) in queries.iter().enumerate().filter(|(number, _)| found[*number].is_none())
        {
            let topic = cluster.topic(name).await?;
            known_partition(&topic, *partition)?;
            by_leader.entry(cluster.snapshot().leader(name, *partition)).or_default().push(number);
        }
        let mut retriable = None;
        for (leader, numbers) in by_leader {
            let address = leader.and_then(|leader| cluster.snapshot().address(leader).cloned());
            let mut request = pb::ListOffsetsRequest { linearizable, ..Default::default() };
            for number in &numbers {
                let (name, partition, at) = queries[*number];
                let topic_id = cluster.topic(name).await?.id.clone();
                request.queries.push(pb::OffsetQuery { topic_id, partition, at: Some(at) });
            }
            let response = cluster
                .call_log(address.as_ref(), |mut log| {
                    let request = request.clone();
                    async move { log.list_offsets(request).await }
                })
                .await?;
            if response.answers.len() != numbers.len() {
                return Err(Error::new(
                    ErrorCode::Internal,
                    "the broker answered another number of offsets than was asked for; report this",
                ));
            }
            for (number, answer) in numbers.into_iter().zip(response.answers) {
                let (name, partition, _) = queries[number];
                if let Some(detail) = &answer.error {
                    let error = Error::from_detail(detail).at(name, partition);
                    if error.is_not_found() {
                        // It was there: either it is gone, which the next round finds out, or that broker is behind.
                        cluster.forget(name);
                    } else if !error.is_retriable() {
                        return Err(error);
                    }
                    cluster.refused(name, partition, &error);
                    retriable = Some(error);
                    continue;
                }
                found[number] = Some(OffsetInfo {
                    topic: name.to_owned(),
                    partition,
                    offset: answer.offset,
                    timestamp: (answer.timestamp >= 0).then_some(answer.timestamp),
                    log_start: answer.log_start,
                    high_watermark: answer.high_watermark,
                    last_stable_offset: answer.last_stable_offset,
                    records: answer.records,
                });
            }
        }
        let Some(error) = retriable else { return Ok(found.into_iter().flatten().collect()) };
        let wait = backoff.failed();
        if tokio::time::Instant::now() + wait >= deadline {
            return Err(error);
        }
        tokio::time::sleep(wait).await;
    }
}

impl OffsetSpec {
    fn to_pb(self) -> pb::offset_query::At {
        match self {
            Self::Start => pb::offset_query::At::Start(pb::offset_query::Start {}),
            Self::End => pb::offset_query::At::End(pb::offset_query::End {}),
            Self::Timestamp(millis) => pb::offset_query::At::Timestamp(millis),
            Self::FromEnd(records) => pb::offset_query::At::RecordsFromEnd(records),
        }
    }
}

impl TopicSummary {
    fn from_pb(topic: pb::TopicSummary) -> Self {
        Self {
            topic_id: uuid(&topic.topic_id),
            name: topic.name,
            partitions: topic.partitions,
            replication_factor: topic.replication_factor,
            internal: topic.internal,
        }
    }
}

/// Whether the topic itself sets this key to this value.
fn has_config(topic: &TopicDescription, wanted: &pb::ConfigEntry) -> bool {
    let known = topic.configs.iter().find(|config| config.key == wanted.key);
    known.is_some_and(|config| config.source == ConfigSource::Topic && config.value == wanted.value)
}

fn uuid(bytes: &[u8]) -> String {
    flowstone_protocol::TopicId::from_slice(bytes).map(|id| id.to_string()).unwrap_or_default()
}

fn description(topic: Option<pb::TopicDescription>) -> Result<TopicDescription> {
    let Some(topic) = topic else {
        return Err(Error::new(ErrorCode::Internal, "the broker answered without the topic; report this"));
    };
    let configs = topic.configs.into_iter().map(|config| ConfigValue {
        source: match config.source() {
            pb::ConfigSource::Topic => ConfigSource::Topic,
            pb::ConfigSource::Broker => ConfigSource::Broker,
            pb::ConfigSource::Default | pb::ConfigSource::Unspecified => ConfigSource::Default,
        },
        key: config.key,
        value: config.value,
    });
    let partitions = topic.partitions.into_iter().map(|partition| PartitionDescription {
        partition: partition.partition,
        leader: (partition.leader_id >= 0).then_some(partition.leader_id),
        leader_epoch: partition.leader_epoch,
        replicas: partition.replicas,
        in_sync: partition.in_sync,
        leaving: partition.leaving,
        log_start: partition.log_start,
        high_watermark: partition.high_watermark,
        end_offset: partition.end_offset,
        log_bytes: partition.log_bytes,
        records: partition.records,
        error: partition.error.map(|detail| flowstone_protocol::Error::from_detail(&detail).message),
    });
    Ok(TopicDescription {
        topic_id: uuid(&topic.topic_id),
        configs: configs.collect(),
        partitions: partitions.collect(),
        name: topic.name,
        replication_factor: topic.replication_factor,
        internal: topic.internal,
    })
}
