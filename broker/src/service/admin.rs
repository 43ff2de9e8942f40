//! `flowstone.v1.Admin`: topics and the cluster. Any broker can be asked: what the controller decides is handed to it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::pb::admin_server::Admin;
use flowstone_protocol::peer::ForwardRequest;
use flowstone_protocol::{Error, ErrorCode, TopicId, TopicName, TopicNameError, pb};
use futures::future::BoxFuture;
use prost::Message;
use tonic::{Request, Response, Status};

use super::{brokers, coordinators, counted, partitions, repeated, topics};
use crate::cluster::control::{Again, METADATA_END};
use crate::controller::table::MetadataTable;
use crate::metrics::Api;
use crate::node::Node;

/// A call that is handed to another broker takes at most this long: it may copy nothing, only decide.
const FORWARD_MAX: Duration = Duration::from_secs(30);

/// `flowstone.v1.Admin`.
#[derive(Clone, Debug)]
pub(crate) struct AdminService {
    node: Arc<Node>,
}

impl AdminService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

/// Has the controller do `here`, which is the call of this name.
pub(super) async fn decided<Q, R, F>(
    node: &Arc<Node>,
    method: &'static str,
    request: Q,
    here: impl Fn(Arc<Node>, Q) -> F + Send + Sync,
) -> Result<R, Error>
where
    Q: Message + Clone,
    R: Message + Default,
    F: Future<Output = Result<R, Error>> + Send,
{
    decided_as(node, method, &[], Again::Harmful, request, here).await
}

/// As [`decided`], for a call that may reach the controller twice: `request_id` tells it that it is the same.
pub(super) async fn decided_as<Q, R, F>(
    node: &Arc<Node>,
    method: &'static str,
    request_id: &[u8],
    again: Again,
    request: Q,
    here: impl Fn(Arc<Node>, Q) -> F + Send + Sync,
) -> Result<R, Error>
where
    Q: Message + Clone,
    R: Message + Default,
    F: Future<Output = Result<R, Error>> + Send,
{
    let call = |to| -> BoxFuture<'_, Result<R, Error>> {
        let request = request.clone();
        let here = &here;
        Box::pin(async move {
            if to == node.id {
                return here(Arc::clone(node), request).await;
            }
            handed_on(node, to, method, &request, request_id).await
        })
    };
    node.control.at_controller(again, call).await
}

/// Has another broker do the call of this name.
pub(super) async fn handed_on<Q: Message, R: Message + Default>(
    node: &Node,
    to: flowstone_protocol::BrokerId,
    method: &str,
    request: &Q,
    request_id: &[u8],
) -> Result<R, Error> {
    let request = ForwardRequest {
        caller: None,
        method: method.to_owned(),
        request: request.encode_to_vec().into(),
        request_id: Bytes::copy_from_slice(request_id),
    };
    let answer = node.control.peers.forward(to, request, FORWARD_MAX).await?;
    R::decode(answer.response).map_err(|error| {
        Error::new(
            ErrorCode::Internal,
            format!("broker {to} answered what is no answer ({error}); run one version of Flowstone on all brokers"),
        )
    })
}

/// Does what another broker was asked for and handed on.
pub(crate) async fn forwarded(node: &Arc<Node>, forwarded: ForwardRequest) -> Result<Bytes, Error> {
    let ForwardRequest { method, request, request_id, .. } = forwarded;
    match method.as_str() {
        METADATA_END => {
            let end = node.control.committed_end().await?;
            let recovery = node.table.with(MetadataTable::recovery);
            let end = i128::from(recovery) << 64 | i128::from(end.get());
            Ok(Bytes::copy_from_slice(&end.to_be_bytes()))
        }
        "CreateTopic" => {
            let id = TopicId::from_slice(&request_id).unwrap_or_else(topics::fresh_id);
            run(node, request, |node, request| topics::create_here(node, request, id)).await
        }
        coordinators::ENSURE => run(node, request, coordinators::ensure_here).await,
        "AlterTopic" => run(node, request, topics::alter_here).await,
        "DeleteTopic" => run(node, request, topics::delete_here).await,
        "TrimPartition" => run(node, request, topics::trim_here).await,
        "ClusterHealth" => run(node, request, brokers::health_here).await,
        "DrainBroker" => run(node, request, brokers::drain_here).await,
        "DecommissionBroker" => run(node, request, brokers::decommission_here).await,
        "ReplaceBroker" => run(node, request, brokers::replace_here).await,
        "MovePartition" => run(node, request, partitions::move_here).await,
        "CancelMove" => run(node, request, partitions::cancel_here).await,
        "Rebalance" => run(node, request, partitions::rebalance_here).await,
        "RecoverPartition" => run(node, request, partitions::recover_here).await,
        other => Err(Error::new(
            ErrorCode::Unsupported,
            format!("broker {} does not know the call `{other}`; run one version of Flowstone on all brokers", node.id),
        )),
    }
}

async fn run<Q, R, F>(node: &Arc<Node>, request: Bytes, call: impl FnOnce(Arc<Node>, Q) -> F) -> Result<Bytes, Error>
where
    Q: Message + Default,
    R: Message,
    F: Future<Output = Result<R, Error>>,
{
    let request = Q::decode(request)
        .map_err(|error| Error::new(ErrorCode::InvalidRequest, format!("what was handed on is malformed: {error}")))?;
    Ok(call(Arc::clone(node), request).await?.encode_to_vec().into())
}

/// # Errors
/// `INVALID_TOPIC_NAME` for what no topic can be called.
pub(super) fn well_named(name: &str) -> Result<(), Error> {
    let malformed =
        |error: TopicNameError| Error::new(ErrorCode::InvalidTopicName, error.to_string()).with_topic(repeated(name));
    TopicName::new(name).map(|_| ()).map_err(malformed)
}

/// The controller answered a command with what belongs to another.
pub(super) fn odd_answer() -> Error {
    Error::new(ErrorCode::Internal, "the controller answered something else; this is a defect, please report it")
}

macro_rules! calls {
    ($($name:ident($request:ident) -> $response:ident = $call:path;)*) => {
        #[tonic::async_trait]
        impl Admin for AdminService {
            $(async fn $name(
                &self,
                request: Request<pb::$request>,
            ) -> Result<Response<pb::$response>, Status> {
                let request = request.into_inner();
                let bytes = request.encoded_len();
                counted(&self.node, Api::Admin, bytes, $call(&self.node, request)).await
            })*
        }
    };
}

calls! {
    create_topic(CreateTopicRequest) -> CreateTopicResponse = topics::create;
    list_topics(ListTopicsRequest) -> ListTopicsResponse = topics::list;
    describe_topic(DescribeTopicRequest) -> DescribeTopicResponse = topics::describe_named;
    alter_topic(AlterTopicRequest) -> AlterTopicResponse = topics::alter;
    delete_topic(DeleteTopicRequest) -> DeleteTopicResponse = topics::delete;
    trim_partition(TrimPartitionRequest) -> TrimPartitionResponse = topics::trim;
    describe_cluster(DescribeClusterRequest) -> DescribeClusterResponse = brokers::describe;
    cluster_health(ClusterHealthRequest) -> ClusterHealthResponse = brokers::health;
    drain_broker(DrainBrokerRequest) -> DrainBrokerResponse = brokers::drain;
    decommission_broker(DecommissionBrokerRequest) -> DecommissionBrokerResponse = brokers::decommission;
    replace_broker(ReplaceBrokerRequest) -> ReplaceBrokerResponse = brokers::replace;
    move_partition(MovePartitionRequest) -> MovePartitionResponse = partitions::move_partition;
    cancel_move(CancelMoveRequest) -> CancelMoveResponse = partitions::cancel_move;
    list_moves(ListMovesRequest) -> ListMovesResponse = partitions::list_moves;
    transfer_leader(TransferLeaderRequest) -> TransferLeaderResponse = partitions::transfer_leader;
    rebalance(RebalanceRequest) -> RebalanceResponse = partitions::rebalance;
    recover_partition(RecoverPartitionRequest) -> RecoverPartitionResponse = partitions::recover_partition;
}
