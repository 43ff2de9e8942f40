//! `flowstone.v1.Admin`: topics and the cluster.

use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::pb::admin_server::Admin;
use flowstone_protocol::{
    Error, ErrorCode, Offset, PartitionId, TopicId, TopicName, TopicNameError, TopicPartition, pb,
};
use flowstone_replication::{Health, Reply, TrimTo};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::metadata::{brokers, controller, leader};
use super::produce::in_partition;
use super::{counted, find, repeated};
use crate::controller::commands::{
    AlterTopic, CreateTopic, MetadataCommand, MetadataReply, internal_topic, unknown_topic,
};
use crate::controller::table::Topic;
use crate::metrics::Api;
use crate::node::Node;
use crate::partition::Slot;
use crate::topic_config::TOPIC_KEYS;

/// How long an answer waits for a change to have reached this broker's replicas. The change itself is committed; past
/// this, clients that come early are told to try again.
const FOLLOW_UP_MAX: Duration = Duration::from_secs(10);

/// `flowstone.v1.Admin`.
#[derive(Clone, Debug)]
pub(crate) struct AdminService {
    node: Arc<Node>,
}

impl AdminService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    async fn create(&self, request: pb::CreateTopicRequest) -> Result<pb::CreateTopicResponse, Error> {
        well_named(&request.name)?;
        let validate_only = request.validate_only;
        let command = CreateTopic {
            name: request.name,
            partitions: request.partitions,
            replication_factor: request.replication_factor,
            configs: entries(request.configs),
            topic_id: TopicId::new(uuid::Uuid::new_v4().as_u128()),
            seed: rand::random(),
            validate_only,
        };
        let topic = self.topic_after(MetadataCommand::CreateTopic(command), validate_only).await?;
        Ok(pb::CreateTopicResponse { topic: Some(self.describe(&topic)) })
    }

    async fn alter(&self, request: pb::AlterTopicRequest) -> Result<pb::AlterTopicResponse, Error> {
        well_named(&request.name)?;
        let validate_only = request.validate_only;
        let command = AlterTopic {
            name: request.name,
            set: entries(request.set),
            unset: request.unset,
            partitions: request.partitions,
            seed: rand::random(),
            validate_only,
        };
        let topic = self.topic_after(MetadataCommand::AlterTopic(command), validate_only).await?;
        Ok(pb::AlterTopicResponse { topic: Some(self.describe(&topic)) })
    }

    /// The topic as the command leaves it, its replicas open where it was really done.
    async fn topic_after(&self, command: MetadataCommand, validate_only: bool) -> Result<Arc<Topic>, Error> {
        let MetadataReply::Topic(topic) = self.node.command(command).await? else {
            return Err(Error::new(ErrorCode::Internal, "the controller answered something else"));
        };
        if !validate_only {
            // Past the deadline the topic is there all the same.
            drop(tokio::time::timeout(FOLLOW_UP_MAX, self.opened(&topic)).await);
        }
        Ok(topic)
    }

    /// Waits until every partition of `topic` on this broker is open, or has failed to open.
    async fn opened(&self, topic: &Topic) {
        let mut changes = self.node.replicas.changes();
        for partition in 0..topic.partitions.len() {
            let tp = TopicPartition { topic: topic.id, partition: PartitionId::new(partition as i32) };
            while !matches!(self.node.replicas.get(tp), Some(Slot::Open(_) | Slot::Failed(_) | Slot::Refused(_))) {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        }
    }

    async fn delete(&self, request: pb::DeleteTopicRequest) -> Result<pb::DeleteTopicResponse, Error> {
        well_named(&request.name)?;
        let command = MetadataCommand::DeleteTopic { name: request.name };
        let MetadataReply::Deleted(topic) = self.node.command(command).await? else {
            return Err(Error::new(ErrorCode::Internal, "the controller answered something else"));
        };
        Ok(pb::DeleteTopicResponse { topic_id: topic.to_bytes().to_vec().into() })
    }

    fn named(&self, name: &str) -> Result<Arc<Topic>, Error> {
        well_named(name)?;
        self.node.table.with(|table| table.topic_named(name).cloned()).ok_or_else(|| unknown_topic(name))
    }

    fn describe(&self, topic: &Topic) -> pb::TopicDescription {
        let configs = TOPIC_KEYS.iter().map(|key| {
            let broker = self.node.config.topic.get(key.name);
            let (value, source) = match (topic.overrides.get(key.name), broker) {
                (Some(value), _) => (value.as_str(), pb::ConfigSource::Topic),
                (None, Some(value)) => (value.as_str(), pb::ConfigSource::Broker),
                (None, None) => (key.default, pb::ConfigSource::Default),
            };
            pb::ConfigValue { key: key.name.to_owned(), value: value.to_owned(), source: source.into() }
        });
        pb::TopicDescription {
            name: topic.name.clone(),
            topic_id: topic.id.to_bytes().to_vec().into(),
            replication_factor: topic.replication_factor as i32,
            internal: topic.internal,
            configs: configs.collect(),
            partitions: (0..topic.partitions.len()).map(|partition| self.partition(topic, partition)).collect(),
        }
    }

    fn partition(&self, topic: &Topic, partition: usize) -> pb::PartitionDescription {
        let tp = TopicPartition { topic: topic.id, partition: PartitionId::new(partition as i32) };
        let (leader_id, leader_epoch) = leader(&self.node, tp);
        let mut description = pb::PartitionDescription {
            partition: tp.partition.get(),
            leader_id,
            leader_epoch,
            replicas: topic.partitions[partition].iter().map(|place| place.broker.get()).collect(),
            log_start: 0,
            high_watermark: 0,
            end_offset: 0,
            log_bytes: 0,
            records: 0,
            error: None,
            in_sync: Vec::new(),
            leaving: Vec::new(),
        };
        match find(&self.node, tp) {
            Ok(partition) => {
                let status = partition.replica.status();
                description.log_start = status.log_start.get();
                description.high_watermark = status.high_watermark.get();
                description.end_offset = status.end_offset.get();
                description.log_bytes = status.size_bytes;
                description.records = status.records;
                description.error = sickness(&status.health).map(|error| in_partition(error, &partition).to_detail());
            }
            Err(error) => description.error = Some(error.to_detail()),
        }
        description
    }

    async fn trim(&self, request: pb::TrimPartitionRequest) -> Result<pb::TrimPartitionResponse, Error> {
        well_named(&request.topic)?;
        if request.topic.starts_with("__") {
            return Err(internal_topic(&request.topic));
        }
        let topic = self.named(&request.topic)?;
        let tp = TopicPartition { topic: topic.id, partition: PartitionId::new(request.partition) };
        let partition = find(&self.node, tp)?;
        let to = match request.offset {
            -1 => TrimTo::HighWatermark,
            offset => {
                let status = partition.replica.status();
                // A log start that is there already is no error: trimming twice is trimming once.
                if offset < 0 || Offset::new(offset) > status.high_watermark {
                    let error = Error::new(
                        ErrorCode::OffsetOutOfRange,
                        format!(
                            "offset {offset} is out of range: the partition begins at {} and ends at {}; trim to one of \
                             these, or to -1 for its end",
                            status.log_start, status.high_watermark
                        ),
                    );
                    return Err(in_partition(error, &partition));
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
            .map_err(|error| in_partition(error, &partition))?;
        Ok(pb::TrimPartitionResponse { log_start: log_start.get() })
    }

    fn list(&self, include_internal: bool) -> pb::ListTopicsResponse {
        let topics = self.node.table.with(|table| {
            let wanted = table.topics().filter(|topic| include_internal || !topic.internal);
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
        pb::ListTopicsResponse { topics }
    }

    fn cluster(&self) -> pb::DescribeClusterResponse {
        let node = &self.node;
        node.table.with(|table| pb::DescribeClusterResponse {
            cluster_id: node.cluster.to_string(),
            controller_id: controller(node),
            brokers: brokers(table),
            topics: table.topic_count() as i32,
            partitions: table.partition_count() as i32,
            feature_level: table.founding().map_or(0, |founding| founding.feature_level),
            uptime_ms: i64::try_from(node.ready_since.elapsed().as_millis()).unwrap_or(i64::MAX),
            broker_id: node.id.get(),
        })
    }
}

/// # Errors
/// `INVALID_TOPIC_NAME` for what no topic can be called.
fn well_named(name: &str) -> Result<(), Error> {
    let malformed =
        |error: TopicNameError| Error::new(ErrorCode::InvalidTopicName, error.to_string()).with_topic(repeated(name));
    TopicName::new(name).map(|_| ()).map_err(malformed)
}

/// What keeps a replica from its work.
fn sickness(health: &Health) -> Option<Error> {
    match health {
        Health::Ok => None,
        Health::DiskFull => Some(Error::new(
            ErrorCode::DiskFull,
            "there is no room on the disk: the partition is read-only until there is; free some, or lower retention",
        )),
        Health::Failed { message } => Some(Error::new(ErrorCode::StorageFailed, message.clone())),
        Health::Quarantined { message } => Some(Error::new(ErrorCode::Quarantined, message.clone())),
    }
}

fn entries(entries: Vec<pb::ConfigEntry>) -> Vec<(String, String)> {
    entries.into_iter().map(|entry| (entry.key, entry.value)).collect()
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_topic(
        &self,
        request: Request<pb::CreateTopicRequest>,
    ) -> Result<Response<pb::CreateTopicResponse>, Status> {
        counted(&self.node, Api::Admin, self.create(request.into_inner())).await
    }

    async fn list_topics(
        &self,
        request: Request<pb::ListTopicsRequest>,
    ) -> Result<Response<pb::ListTopicsResponse>, Status> {
        counted(&self.node, Api::Admin, async { Ok(self.list(request.get_ref().include_internal)) }).await
    }

    async fn describe_topic(
        &self,
        request: Request<pb::DescribeTopicRequest>,
    ) -> Result<Response<pb::DescribeTopicResponse>, Status> {
        let call = async {
            let topic = self.named(&request.get_ref().name)?;
            Ok(pb::DescribeTopicResponse { topic: Some(self.describe(&topic)) })
        };
        counted(&self.node, Api::Admin, call).await
    }

    async fn alter_topic(
        &self,
        request: Request<pb::AlterTopicRequest>,
    ) -> Result<Response<pb::AlterTopicResponse>, Status> {
        counted(&self.node, Api::Admin, self.alter(request.into_inner())).await
    }

    async fn delete_topic(
        &self,
        request: Request<pb::DeleteTopicRequest>,
    ) -> Result<Response<pb::DeleteTopicResponse>, Status> {
        counted(&self.node, Api::Admin, self.delete(request.into_inner())).await
    }

    async fn trim_partition(
        &self,
        request: Request<pb::TrimPartitionRequest>,
    ) -> Result<Response<pb::TrimPartitionResponse>, Status> {
        counted(&self.node, Api::Admin, self.trim(request.into_inner())).await
    }

    async fn describe_cluster(
        &self,
        _request: Request<pb::DescribeClusterRequest>,
    ) -> Result<Response<pb::DescribeClusterResponse>, Status> {
        counted(&self.node, Api::Admin, async { Ok(self.cluster()) }).await
    }

    async fn cluster_health(
        &self,
        _request: Request<pb::ClusterHealthRequest>,
    ) -> Result<Response<pb::ClusterHealthResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }

    async fn drain_broker(
        &self,
        _request: Request<pb::DrainBrokerRequest>,
    ) -> Result<Response<pb::DrainBrokerResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }

    async fn decommission_broker(
        &self,
        _request: Request<pb::DecommissionBrokerRequest>,
    ) -> Result<Response<pb::DecommissionBrokerResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }

    async fn replace_broker(
        &self,
        _request: Request<pb::ReplaceBrokerRequest>,
    ) -> Result<Response<pb::ReplaceBrokerResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }

    async fn move_partition(
        &self,
        _request: Request<pb::MovePartitionRequest>,
    ) -> Result<Response<pb::MovePartitionResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }

    async fn cancel_move(
        &self,
        _request: Request<pb::CancelMoveRequest>,
    ) -> Result<Response<pb::CancelMoveResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }

    async fn list_moves(
        &self,
        _request: Request<pb::ListMovesRequest>,
    ) -> Result<Response<pb::ListMovesResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }

    async fn transfer_leader(
        &self,
        _request: Request<pb::TransferLeaderRequest>,
    ) -> Result<Response<pb::TransferLeaderResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }

    async fn rebalance(
        &self,
        _request: Request<pb::RebalanceRequest>,
    ) -> Result<Response<pb::RebalanceResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }

    async fn recover_partition(
        &self,
        _request: Request<pb::RecoverPartitionRequest>,
    ) -> Result<Response<pb::RecoverPartitionResponse>, Status> {
        Err(Error::new(ErrorCode::Unsupported, "not in this version").to_status())
    }
}
