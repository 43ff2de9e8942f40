//! `flowstone.v1.Admin` of a broker that is not part of its cluster yet: the one call that may be needed to get there.

use std::sync::Arc;

use flowstone_protocol::pb::admin_server::Admin;
use flowstone_protocol::{Error, ErrorCode, pb};
use tonic::{Request, Response, Status};

use crate::admin_http::Readiness;
use crate::cluster::calls::Calls;
use crate::cluster::recovery;
use crate::controller::table::METADATA_TOPIC;

/// The path of the call that is answered.
pub(crate) const RECOVER_PATH: &str = "/flowstone.v1.Admin/RecoverPartition";

/// Answers while the broker starts.
#[derive(Clone, Debug)]
pub(crate) struct EarlyAdmin {
    calls: Arc<Calls>,
    readiness: Readiness,
}

impl EarlyAdmin {
    pub(crate) fn new(calls: Arc<Calls>, readiness: Readiness) -> Self {
        Self { calls, readiness }
    }

    async fn recover(&self, request: pb::RecoverPartitionRequest) -> Result<pb::RecoverPartitionResponse, Error> {
        if request.topic != METADATA_TOPIC {
            return Err(starting(&self.readiness));
        }
        recovery::asked_for(&self.calls.control()?, request).await
    }
}

/// What is said to whoever comes before the broker serves.
pub(crate) fn starting(readiness: &Readiness) -> Error {
    Error::new(
        ErrorCode::LeaderNotReady,
        format!("this broker is starting ({}); try again in a moment, or ask another one", readiness.held().join("; ")),
    )
}

macro_rules! not_yet {
    ($($name:ident($request:ident) -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl Admin for EarlyAdmin {
            async fn recover_partition(
                &self,
                request: Request<pb::RecoverPartitionRequest>,
            ) -> Result<Response<pb::RecoverPartitionResponse>, Status> {
                self.recover(request.into_inner()).await.map(Response::new).map_err(|error| error.to_status())
            }

            $(async fn $name(&self, _request: Request<pb::$request>) -> Result<Response<pb::$response>, Status> {
                Err(starting(&self.readiness).to_status())
            })*
        }
    };
}

not_yet! {
    create_topic(CreateTopicRequest) -> CreateTopicResponse;
    list_topics(ListTopicsRequest) -> ListTopicsResponse;
    describe_topic(DescribeTopicRequest) -> DescribeTopicResponse;
    alter_topic(AlterTopicRequest) -> AlterTopicResponse;
    delete_topic(DeleteTopicRequest) -> DeleteTopicResponse;
    trim_partition(TrimPartitionRequest) -> TrimPartitionResponse;
    describe_cluster(DescribeClusterRequest) -> DescribeClusterResponse;
    cluster_health(ClusterHealthRequest) -> ClusterHealthResponse;
    drain_broker(DrainBrokerRequest) -> DrainBrokerResponse;
    decommission_broker(DecommissionBrokerRequest) -> DecommissionBrokerResponse;
    replace_broker(ReplaceBrokerRequest) -> ReplaceBrokerResponse;
    move_partition(MovePartitionRequest) -> MovePartitionResponse;
    cancel_move(CancelMoveRequest) -> CancelMoveResponse;
    list_moves(ListMovesRequest) -> ListMovesResponse;
    transfer_leader(TransferLeaderRequest) -> TransferLeaderResponse;
    rebalance(RebalanceRequest) -> RebalanceResponse;
}
