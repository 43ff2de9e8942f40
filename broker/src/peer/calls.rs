//! What the broker behind the peer listener does: the calls that it answers, and what it is told of streams.

use flowstone_protocol::peer as pb;
use flowstone_protocol::{BrokerId, Error, ErrorCode};
use flowstone_replication::{GroupMessage, Machine, PullAnswer, PullRequest, Reply, Shards};

use super::identity::PeerIdentity;

/// Answers the calls of other brokers. Who calls was checked, as far as each method says; an error travels whole, with
/// its kind and its leader hint, and [`super::PeerClient`] returns it as it was.
#[tonic::async_trait]
pub trait PeerCalls: Send + Sync + 'static {
    /// Who is there. From anyone who speaks the protocol: it may belong to no cluster, or to another one.
    async fn hello(&self, from: PeerIdentity, request: pb::HelloRequest) -> Result<pb::HelloResponse, Error>;

    /// From a broker of the same cluster whose directory may be new.
    async fn register(&self, from: PeerIdentity, request: pb::RegisterRequest) -> Result<pb::RegisterResponse, Error>;

    /// From a registered broker, as are all others below.
    async fn broker_heartbeat(
        &self,
        from: PeerIdentity,
        request: pb::BrokerHeartbeatRequest,
    ) -> Result<pb::BrokerHeartbeatResponse, Error>;

    /// A call of `flowstone.v1.Admin` that another broker received.
    async fn forward(&self, from: PeerIdentity, request: pb::ForwardRequest) -> Result<pb::ForwardResponse, Error>;

    /// How the replicas here are.
    async fn report(&self, from: PeerIdentity, request: pb::ReportRequest) -> Result<pb::ReportResponse, Error>;

    /// Something to do with a partition that is led here.
    async fn instruct(&self, from: PeerIdentity, request: pb::InstructRequest) -> Result<pb::InstructResponse, Error>;

    /// Partitions are about to be written in transactions that are coordinated here.
    async fn add_to_transaction(
        &self,
        _from: PeerIdentity,
        _request: pb::AddToTransactionRequest,
    ) -> Result<pb::AddToTransactionResponse, Error> {
        Err(Error::new(ErrorCode::Unsupported, "no transactions are coordinated here; look for the coordinator again"))
    }

    /// Transactions that are decided end in partitions that are led here.
    async fn write_markers(
        &self,
        _from: PeerIdentity,
        _request: pb::WriteMarkersRequest,
    ) -> Result<pb::WriteMarkersResponse, Error> {
        Err(Error::new(ErrorCode::Unsupported, "no partitions are led here; look for their leaders again"))
    }
}

/// What the network hands to the replicas. Each is called on the network's own tasks and must return at once.
pub trait PeerEvents: Send + Sync + 'static {
    /// Messages have arrived.
    fn deliver(&self, from: BrokerId, messages: Vec<GroupMessage>);
    /// Messages to a broker were dropped, since their queue was full or its stream broke.
    fn unreachable(&self, broker: BrokerId);
    /// A broker closed its connection or it was reset: its process has ended, most likely.
    fn peer_gone(&self, broker: BrokerId);
    /// Another broker asks for a range.
    fn serve_pull(&self, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>);
}

/// The shards take everything themselves. Hand in a weak reference: the network must not keep them from ending.
impl<M: Machine> PeerEvents for std::sync::Weak<Shards<M>> {
    fn deliver(&self, from: BrokerId, messages: Vec<GroupMessage>) {
        if let Some(shards) = self.upgrade() {
            shards.deliver(from, messages);
        }
    }

    fn unreachable(&self, broker: BrokerId) {
        if let Some(shards) = self.upgrade() {
            shards.unreachable(broker);
        }
    }

    fn peer_gone(&self, broker: BrokerId) {
        if let Some(shards) = self.upgrade() {
            shards.peer_gone(broker);
        }
    }

    fn serve_pull(&self, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        if let Some(shards) = self.upgrade() {
            shards.serve_pull(request, reply);
        }
    }
}
