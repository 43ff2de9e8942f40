//! `flowstone.v1.Coordinators`, and the way in which a service reaches a coordinator that this broker leads.

use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::pb::coordinators_server::Coordinators;
use flowstone_protocol::{BrokerId, Error, ErrorCode, Offset, TopicId, TopicPartition, pb};
use flowstone_replication::{Reply, Role};
use prost::Message;
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::admin::{decided_as, odd_answer};
use super::topics::{described, fresh_id, reached};
use super::{counted, shutting_down};
use crate::cluster::control::Again;
use crate::cluster::report::Reports;
use crate::controller::commands::{MetadataCommand, MetadataReply};
use crate::internal_topics::InternalTopic;
use crate::metrics::Api;
use crate::node::Node;
use crate::partition::{OpenPartition, PartitionCommand, PartitionReply, Slot};

/// Keys of one call.
const KEYS_MAX: usize = 1000;
/// How long a call waits for a topic that it was the first to need. Past this, its caller asks again.
const FIRST_USE_MAX: Duration = Duration::from_secs(10);

/// `flowstone.v1.Coordinators`.
#[derive(Clone, Debug)]
pub(crate) struct CoordinatorsService {
    node: Arc<Node>,
}

impl CoordinatorsService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

#[tonic::async_trait]
impl Coordinators for CoordinatorsService {
    async fn find_coordinators(
        &self,
        request: Request<pb::FindCoordinatorsRequest>,
    ) -> Result<Response<pb::FindCoordinatorsResponse>, Status> {
        let request = request.into_inner();
        let bytes = request.encoded_len();
        counted(&self.node, Api::FindCoordinators, bytes, find_coordinators(&self.node, request)).await
    }
}

async fn find_coordinators(
    node: &Arc<Node>,
    request: pb::FindCoordinatorsRequest,
) -> Result<pb::FindCoordinatorsResponse, Error> {
    let Some(kind) = InternalTopic::of_kind(request.kind()) else {
        let what = "say in `kind` whether the keys are groups or transactional ids";
        return Err(Error::new(ErrorCode::InvalidRequest, what));
    };
    if request.keys.len() > KEYS_MAX {
        let what = format!("{} keys in one call, and {KEYS_MAX} is the limit; split them", request.keys.len());
        return Err(Error::new(ErrorCode::InvalidRequest, what));
    }
    let topic = ensured(node, kind).await?;
    let coordinators = request.keys.into_iter().map(|key| {
        let tp = partition_of(topic, &key);
        let led = node.leader(tp);
        let is_dead = |broker| node.table.with(|table| table.broker(broker).is_none_or(|broker| broker.fenced));
        let broker = led.alive(is_dead).and_then(|leader| {
            let address = node.client_address(leader)?;
            Some(pb::BrokerAddress { broker_id: leader.get(), address })
        });
        let error = broker.is_none().then(|| no_coordinator(kind, tp).to_detail());
        pb::CoordinatorFound { key, broker, partition: tp.partition.get(), error }
    });
    Ok(pb::FindCoordinatorsResponse { coordinators: coordinators.collect() })
}

fn no_coordinator(kind: InternalTopic, tp: TopicPartition) -> Error {
    let what = "nobody leads the coordinator's partition at the moment; try again in a moment";
    Error::new(ErrorCode::NoLeader, what).with_topic(kind.name()).with_partition(tp.partition)
}

/// Which topic it is, and how many partitions it has.
type Known = (TopicId, usize);

fn known(node: &Node, kind: InternalTopic) -> Option<Known> {
    node.table.with(|table| table.topic_named(kind.name()).map(|topic| (topic.id, topic.partitions.len())))
}

fn partition_of((topic, partitions): Known, key: &str) -> TopicPartition {
    TopicPartition { topic, partition: InternalTopic::partition_of(key, partitions) }
}

/// The topic, made by the controller where nobody has needed it before.
async fn ensured(node: &Arc<Node>, kind: InternalTopic) -> Result<Known, Error> {
    if let Some(known) = known(node, kind) {
        return Ok(known);
    }
    let request = pb::CreateTopicRequest { name: kind.name().to_owned(), ..Default::default() };
    let made: pb::CreateTopicResponse = decided_as(node, ENSURE, &[], Again::Harmless, request, ensure_here).await?;
    let id = made.topic.as_ref().and_then(|topic| TopicId::from_slice(&topic.topic_id)).ok_or_else(odd_answer)?;
    let partitions = made.topic.map_or(0, |topic| topic.partitions.len());
    // Past the deadline the topic is there all the same, and who asks for its coordinators is told to come again.
    drop(tokio::time::timeout(FIRST_USE_MAX, reached(node, id, partitions)).await);
    known(node, kind).ok_or_else(|| {
        let what = "the cluster's own topic was made a moment ago and has not reached this broker; try again";
        Error::new(ErrorCode::LeaderNotReady, what).with_topic(kind.name())
    })
}

/// The name under which brokers hand this on to the controller: no call of clients'.
pub(super) const ENSURE: &str = "EnsureInternalTopic";

/// By the controller.
pub(super) async fn ensure_here(
    node: Arc<Node>,
    request: pb::CreateTopicRequest,
) -> Result<pb::CreateTopicResponse, Error> {
    let topic = InternalTopic::named(&request.name).ok_or_else(|| {
        let what = "no topic of this name is the cluster's own; run one version of Flowstone on all brokers";
        Error::new(ErrorCode::Unsupported, what)
    })?;
    let command = MetadataCommand::EnsureInternalTopic { topic, topic_id: fresh_id(), seed: rand::random() };
    let MetadataReply::Topic(topic) = node.control.command(command).await? else { return Err(odd_answer()) };
    Ok(pb::CreateTopicResponse { topic: Some(described(&node, &topic, &Reports::default())) })
}

/// The partition behind `key`, whose coordinator is this broker.
///
/// # Errors
/// `NOT_COORDINATOR` with the one who is, as far as that is known; `LEADER_NOT_READY`, `NO_LEADER` where nobody is yet.
pub(crate) fn coordinator(node: &Node, kind: InternalTopic, key: &str) -> Result<Arc<OpenPartition>, Error> {
    let Some(known) = known(node, kind) else {
        let what = "nobody coordinates anything yet; look for the coordinator first (FindCoordinators)";
        return Err(Error::new(ErrorCode::NotCoordinator, what));
    };
    let tp = partition_of(known, key);
    match node.replicas.get(tp) {
        Some(Slot::Open(partition)) => match partition.replica.status().role {
            Role::Leader => Ok(partition),
            Role::Elected => Err(begins(kind, tp)),
            _ => Err(elsewhere(node, kind, tp)),
        },
        Some(Slot::Failed(error) | Slot::Refused(error)) => Err(*error),
        Some(Slot::Opening) => Err(begins(kind, tp)),
        None => Err(elsewhere(node, kind, tp)),
    }
}

/// The broker that leads the coordinator's partition of `key`, as far as is known here.
///
/// # Errors
/// `NO_LEADER` where nobody is known to; `NOT_COORDINATOR` where nobody needed a coordinator yet.
pub(crate) fn coordinator_broker(node: &Node, kind: InternalTopic, key: &str) -> Result<BrokerId, Error> {
    let Some(known) = known(node, kind) else {
        let what = "nobody coordinates anything yet; look for the coordinator first (FindCoordinators)";
        return Err(Error::new(ErrorCode::NotCoordinator, what));
    };
    let tp = partition_of(known, key);
    node.leader(tp).by.ok_or_else(|| no_coordinator(kind, tp))
}

fn begins(kind: InternalTopic, tp: TopicPartition) -> Error {
    let what = "this broker is about to be the coordinator; try again in a moment";
    Error::new(ErrorCode::LeaderNotReady, what).with_topic(kind.name()).with_partition(tp.partition)
}

fn elsewhere(node: &Node, kind: InternalTopic, tp: TopicPartition) -> Error {
    let in_partition = |error: Error| error.with_topic(kind.name()).with_partition(tp.partition);
    let leader = node.leader(tp).by.filter(|leader| *leader != node.id);
    let address = leader.and_then(|leader| Some((leader, node.client_address(leader)?)));
    match address {
        Some((leader, address)) => {
            let what = format!("broker {} is not the coordinator, broker {leader} is; ask that one", node.id);
            in_partition(Error::new(ErrorCode::NotCoordinator, what).with_leader(leader, address))
        }
        None => {
            let what = format!("broker {} is not the coordinator; look for it again (FindCoordinators)", node.id);
            in_partition(Error::new(ErrorCode::NotCoordinator, what))
        }
    }
}

/// Has the coordinator behind `partition` decide. It is asked at once, in the order of the calls; the future ends when what
/// it decided, and all that was decided before, is committed.
///
/// # Errors
/// What it refused; `NOT_COORDINATOR` where it is not, or not any more.
pub(crate) fn submit<'a>(
    node: &'a Node,
    kind: InternalTopic,
    partition: &'a OpenPartition,
    command: PartitionCommand,
) -> impl Future<Output = Result<PartitionReply, Error>> + use<'a> {
    let (sender, receiver) = oneshot::channel();
    partition.replica.command(command, Reply::from(sender));
    settled(node, kind, partition, receiver)
}

/// The answer of a coordinator that was asked.
async fn settled(
    node: &Node,
    kind: InternalTopic,
    partition: &OpenPartition,
    answer: oneshot::Receiver<Result<Result<PartitionReply, Error>, Error>>,
) -> Result<PartitionReply, Error> {
    match answer.await.map_err(|_| shutting_down()).and_then(|answer| answer).and_then(|answer| answer) {
        // A refusal writes nothing, so that nobody has confirmed it: it may be of one who was replaced, and does not know.
        Err(error) if !error.is_retriable() => {
            confirmed(node, kind, partition).await?;
            Err(error)
        }
        Err(error) => Err(moved_on(node, kind, partition.tp, error)),
        Ok(reply) => Ok(reply),
    }
}

/// As [`submit`], for whoever does not stay with what it borrows.
pub(crate) fn submit_owned(
    node: Arc<Node>,
    kind: InternalTopic,
    partition: Arc<OpenPartition>,
    command: PartitionCommand,
) -> impl Future<Output = Result<PartitionReply, Error>> + use<> {
    let (sender, receiver) = oneshot::channel();
    partition.replica.command(command, Reply::from(sender));
    async move { settled(&node, kind, &partition, receiver).await }
}

/// Waits until a majority has confirmed that this broker is the coordinator, and returns the end of what is committed:
/// nothing that was acknowledged before the call, by whomever, lies above it.
///
/// # Errors
/// `NOT_COORDINATOR` where it is not.
pub(crate) async fn confirmed(node: &Node, kind: InternalTopic, partition: &OpenPartition) -> Result<Offset, Error> {
    let (sender, receiver) = oneshot::channel();
    partition.replica.read_index(Reply::from(sender));
    let confirmed = receiver.await.map_err(|_| shutting_down()).and_then(|answer| answer);
    confirmed.map_err(|error| moved_on(node, kind, partition.tp, error))
}

fn moved_on(node: &Node, kind: InternalTopic, tp: TopicPartition, error: Error) -> Error {
    if error.code == ErrorCode::NotLeader { elsewhere(node, kind, tp) } else { error }
}
