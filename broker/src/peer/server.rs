//! The peer listener: every limit is set here, and dispatch only matches.

use std::convert::Infallible;
use std::future::{Future, ready};
use std::sync::Arc;
use std::task::{Context, Poll};

use flowstone_protocol::Error;
use flowstone_protocol::peer as pb;
use futures::stream;
use pb::peer_server::{Peer, PeerServer};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::calls::PeerCalls;
use super::config::RESPONSE_BYTES_MAX;
use super::identity::{PeerIdentity, Trust, check_caller};
use super::link::MESSAGE_BYTES_AIM;
use super::network::{Shared, StreamKind};
use super::pull::Serving;
use super::streams;
use super::wrong_port::{OnlyOn, Port};
use crate::connections::{Connections, Incoming};
use crate::receiving::Receiving;
use crate::server::GuardedCalls;

/// Largest HTTP/2 frame that is taken: one message of a stream, so that the batches in it come in one piece.
const FRAME_BYTES: u32 = MESSAGE_BYTES_AIM as u32 + (64 << 10);
/// HTTP/2 windows: what may be under way on a stream, and what may lie here unread.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 12 << 20;

const _: () = assert!(FRAME_BYTES < 1 << 24 && FRAME_BYTES < STREAM_WINDOW_BYTES);

pub(crate) async fn serve(
    shared: Arc<Shared>,
    listener: TcpListener,
    calls: Arc<dyn PeerCalls>,
    client_address: String,
    mut drain: watch::Receiver<bool>,
    cut: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let limits = shared.config.limits.clone();
    let connections = Connections::new(limits.clone(), shared.counters.connections.clone());
    let receiving = Receiving::new(limits.receiving_bytes, limits.message_timeout);
    let (keepalive_interval, keepalive_timeout) = (shared.config.keepalive_interval, shared.config.keepalive_timeout);
    let service = PeerService { shared: Arc::clone(&shared), calls };
    let generated = PeerServer::new(service)
        .max_decoding_message_size(limits.admin_request_bytes)
        .max_encoding_message_size(RESPONSE_BYTES_MAX);
    let dispatch = Dispatch { shared, drain: drain.clone(), generated };
    let routes = OnlyOn::new(Port::Peer, &client_address, Routes::new(dispatch).prepare());
    let routes = GuardedCalls { inner: routes, receiving };
    let incoming = Incoming::new(listener, connections, cut);
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(limits.streams_per_connection)
        .max_frame_size(FRAME_BYTES)
        .http2_max_header_list_size(limits.header_bytes)
        .http2_keepalive_interval(Some(keepalive_interval))
        .http2_keepalive_timeout(Some(keepalive_timeout))
        .http2_max_pending_accept_reset_streams(Some(limits.pending_reset_streams))
        .http2_max_local_error_reset_streams(Some(limits.pending_reset_streams))
        .http2_adaptive_window(Some(false))
        .accept_http1(false)
        .serve_with_incoming_shutdown(routes, incoming, async move {
            // An error means that the broker is gone altogether.
            drop(drain.wait_for(|drains| *drains).await);
        })
        .await
}

/// The generated service, but for the two streams, which read their messages themselves.
#[derive(Clone)]
struct Dispatch {
    shared: Arc<Shared>,
    drain: watch::Receiver<bool>,
    generated: PeerServer<PeerService>,
}

impl NamedService for Dispatch {
    const NAME: &'static str = <PeerServer<PeerService> as NamedService>::NAME;
}

impl Service<http::Request<Body>> for Dispatch {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<http::Response<Body>, Infallible>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<http::Request<Body>>::poll_ready(&mut self.generated, cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path();
        match [StreamKind::Votes, StreamKind::Appends].into_iter().find(|kind| kind.path() == path) {
            Some(kind) => {
                let response = streams::serve(Arc::clone(&self.shared), kind, self.drain.clone(), request);
                Box::pin(ready(Ok(response)))
            }
            None => self.generated.call(request),
        }
    }
}

/// `flowstone.peer.v1.Peer`: checks who calls, and hands on.
struct PeerService {
    shared: Arc<Shared>,
    calls: Arc<dyn PeerCalls>,
}

impl PeerService {
    /// Answers one call, if its caller is trusted that far.
    async fn answer<T, A>(
        &self,
        caller: Option<&pb::Caller>,
        trust: Trust,
        call: impl FnOnce(PeerIdentity) -> A,
    ) -> Result<Response<T>, Status>
    where
        A: Future<Output = Result<T, Error>>,
    {
        let checked = check_caller(&self.shared.identity(), &self.shared.book, caller, trust).and_then(|from| {
            // What it asks of itself it may, and an unregistered start is told why by who registers it.
            let is_asked = trust == Trust::Registered && from.broker != self.shared.identity().broker;
            if is_asked { self.shared.check_start(&from).map(|()| from) } else { Ok(from) }
        });
        match checked {
            Ok(from) => call(from).await.map(Response::new).map_err(|error| error.to_status()),
            Err(error) => {
                let broker = caller.map(|caller| caller.broker_id.into());
                self.shared.refused("a call of another broker", broker, &error);
                Err(error.to_status())
            }
        }
    }
}

macro_rules! handed_on {
    ($self:ident, $request:ident, $trust:expr, $call:ident) => {{
        let request = $request.into_inner();
        let caller = request.caller.clone();
        $self.answer(caller.as_ref(), $trust, |from| $self.calls.$call(from, request)).await
    }};
}

#[tonic::async_trait]
impl Peer for PeerService {
    type VotesStream = stream::Empty<Result<pb::StreamAnswer, Status>>;
    type AppendsStream = stream::Empty<Result<pb::StreamAnswer, Status>>;

    /// Never called, nor is `appends`: [`Dispatch`] takes their paths before the generated service sees them.
    async fn votes(
        &self,
        _request: Request<Streaming<pb::StreamMessage>>,
    ) -> Result<Response<Self::VotesStream>, Status> {
        Err(Status::internal("Votes did not reach its own service"))
    }

    async fn appends(
        &self,
        _request: Request<Streaming<pb::StreamMessage>>,
    ) -> Result<Response<Self::AppendsStream>, Status> {
        Err(Status::internal("Appends did not reach its own service"))
    }

    async fn hello(&self, request: Request<pb::HelloRequest>) -> Result<Response<pb::HelloResponse>, Status> {
        handed_on!(self, request, Trust::Anyone, hello)
    }

    async fn register(&self, request: Request<pb::RegisterRequest>) -> Result<Response<pb::RegisterResponse>, Status> {
        handed_on!(self, request, Trust::SameCluster, register)
    }

    async fn broker_heartbeat(
        &self,
        request: Request<pb::BrokerHeartbeatRequest>,
    ) -> Result<Response<pb::BrokerHeartbeatResponse>, Status> {
        // One that is not registered any more has to be told so; by its start it is known, or not.
        handed_on!(self, request, Trust::SameCluster, broker_heartbeat)
    }

    async fn forward(&self, request: Request<pb::ForwardRequest>) -> Result<Response<pb::ForwardResponse>, Status> {
        handed_on!(self, request, Trust::Registered, forward)
    }

    async fn report(&self, request: Request<pb::ReportRequest>) -> Result<Response<pb::ReportResponse>, Status> {
        handed_on!(self, request, Trust::Registered, report)
    }

    async fn instruct(&self, request: Request<pb::InstructRequest>) -> Result<Response<pb::InstructResponse>, Status> {
        handed_on!(self, request, Trust::Registered, instruct)
    }

    async fn add_to_transaction(
        &self,
        request: Request<pb::AddToTransactionRequest>,
    ) -> Result<Response<pb::AddToTransactionResponse>, Status> {
        handed_on!(self, request, Trust::Registered, add_to_transaction)
    }

    async fn write_markers(
        &self,
        request: Request<pb::WriteMarkersRequest>,
    ) -> Result<Response<pb::WriteMarkersResponse>, Status> {
        handed_on!(self, request, Trust::Registered, write_markers)
    }

    async fn pull(&self, request: Request<pb::PullRequest>) -> Result<Response<pb::PullResponse>, Status> {
        let request = request.get_ref();
        self.answer(request.caller.as_ref(), Trust::Registered, |_| Serving::serve(&self.shared, request)).await
    }
}
