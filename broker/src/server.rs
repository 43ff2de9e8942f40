//! The gRPC server: every limit of HTTP/2 and of the messages is set here.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use flowstone_protocol::pb::admin_server::AdminServer;
use flowstone_protocol::pb::coordinators_server::CoordinatorsServer;
use flowstone_protocol::pb::groups_server::GroupsServer;
use flowstone_protocol::pb::log_server::LogServer;
use flowstone_protocol::pb::transactions_server::TransactionsServer;
use flowstone_protocol::{Error, FILE_DESCRIPTOR_SET};
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::RwLock;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::codegen::{Bytes, Service};
use tonic::service::Routes;
use tonic::transport::Server;

use crate::admin_http::Readiness;
use crate::cluster::calls::Calls;
use crate::config::LimitsConfig;
use crate::connections::{CallGuard, ConnectionCalls, Connections, Incoming};
use crate::node::Node;
use crate::peer::wrong_port::{OnlyOn, Port};
use crate::receiving::Receiving;
use crate::service::{
    AdminService, CoordinatorsService, EarlyAdmin, GroupsService, LogCalls, LogService, RECOVER_PATH,
    TransactionsService, starting,
};

/// Largest HTTP/2 frame that clients are asked to send: large frames mean fewer of them for a large batch.
const FRAME_BYTES: u32 = 256 << 10;
/// Largest answer of a call other than Fetch: metadata of very many partitions.
const RESPONSE_BYTES_MAX: usize = 64 << 20;

/// The services, once the broker has found its cluster; until then every call is told to come again, and why.
#[derive(Debug)]
pub(crate) struct Gate {
    routes: OnceLock<Routes>,
    /// The one call that is answered before: without it a cluster that lost the metadata's majority could not be started.
    early: OnceLock<AdminServer<EarlyAdmin>>,
    /// What every call is told once the cluster does not know this broker any more. Held for a look or a change.
    shut: RwLock<Option<Error>>,
    readiness: Readiness,
}

impl Gate {
    pub(crate) fn new(readiness: Readiness) -> Arc<Self> {
        Arc::new(Self { routes: OnceLock::new(), early: OnceLock::new(), shut: RwLock::new(None), readiness })
    }

    /// Serves from now on. The first call decides.
    pub(crate) fn open(&self, node: &Arc<Node>) {
        self.routes.get_or_init(|| routes(node, &node.config.limits));
    }

    /// Takes an operator's wish to recover the metadata from now on.
    pub(crate) fn serve_recovery(&self, calls: &Arc<Calls>) {
        let early = EarlyAdmin::new(Arc::clone(calls), self.readiness.clone());
        self.early.get_or_init(|| AdminServer::new(early));
    }

    /// Refuses every call from now on, for `reason`; `None`: serves again.
    pub(crate) fn shut(&self, reason: Option<Error>) {
        *self.shut.write() = reason;
    }

    fn closed(&self) -> tonic::Status {
        starting(&self.readiness).to_status()
    }
}

/// Serves clients until `drain`; then takes no new connection or call and returns when all have ended. `cut` ends those
/// that do not.
pub(crate) async fn serve(
    gate: Arc<Gate>,
    limits: LimitsConfig,
    listener: TcpListener,
    connections: Arc<Connections>,
    mut drain: watch::Receiver<bool>,
    cut: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let receiving = Receiving::new(limits.receiving_bytes, limits.message_timeout);
    let clients = OnlyOn::new(Port::Client, "", GatedCalls { gate, routes: None });
    let routes = GuardedCalls { inner: clients, receiving };
    let incoming = Incoming::new(listener, connections, cut);
    Server::builder()
        .initial_stream_window_size(limits.stream_window_bytes)
        .initial_connection_window_size(limits.connection_window_bytes)
        .max_concurrent_streams(limits.streams_per_connection)
        .max_frame_size(FRAME_BYTES)
        .http2_max_header_list_size(limits.header_bytes)
        .http2_keepalive_interval(Some(limits.keepalive_interval))
        .http2_keepalive_timeout(Some(limits.keepalive_timeout))
        .http2_max_pending_accept_reset_streams(Some(limits.pending_reset_streams))
        .http2_max_local_error_reset_streams(Some(limits.pending_reset_streams))
        .http2_adaptive_window(Some(false))
        .max_connection_age(limits.connection_age)
        .accept_http1(false)
        .serve_with_incoming_shutdown(routes, incoming, async move {
            // An error means that the broker is gone altogether.
            drop(drain.wait_for(|drains| *drains).await);
        })
        .await
}

fn routes(node: &Arc<Node>, limits: &LimitsConfig) -> Routes {
    let log = |request_bytes| {
        LogServer::new(LogService::new(Arc::clone(node)))
            .max_decoding_message_size(request_bytes)
            .max_encoding_message_size(RESPONSE_BYTES_MAX)
    };
    let log = LogCalls::new(Arc::clone(node), log(limits.request_bytes), log(limits.admin_request_bytes));
    let admin =
        AdminServer::new(AdminService::new(Arc::clone(node))).max_decoding_message_size(limits.admin_request_bytes);
    let coordinators = CoordinatorsServer::new(CoordinatorsService::new(Arc::clone(node)))
        .max_decoding_message_size(limits.admin_request_bytes);
    let groups =
        GroupsServer::new(GroupsService::new(Arc::clone(node))).max_decoding_message_size(limits.admin_request_bytes);
    let transactions = TransactionsServer::new(TransactionsService::new(Arc::clone(node)))
        .max_decoding_message_size(limits.admin_request_bytes);
    let (health, health_service) = tonic_health::server::health_reporter();
    let mut drain = node.drain.clone();
    tokio::spawn(async move {
        health.set_serving::<LogServer<LogService>>().await;
        health.set_serving::<AdminServer<AdminService>>().await;
        health.set_serving::<CoordinatorsServer<CoordinatorsService>>().await;
        health.set_serving::<GroupsServer<GroupsService>>().await;
        health.set_serving::<TransactionsServer<TransactionsService>>().await;
        drop(drain.wait_for(|drains| *drains).await);
        for service in [
            "",
            "flowstone.v1.Log",
            "flowstone.v1.Admin",
            "flowstone.v1.Coordinators",
            "flowstone.v1.Transactions",
            "flowstone.v1.Groups",
        ] {
            health.set_service_status(service, tonic_health::ServingStatus::NotServing).await;
        }
    });
    let mut routes = Routes::new(log)
        .add_service(admin)
        .add_service(coordinators)
        .add_service(transactions)
        .add_service(groups)
        .add_service(health_service);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1();
    match reflection {
        Ok(reflection) => routes = routes.add_service(reflection),
        // Built from descriptors that were compiled in: a broken build, and no reason not to serve.
        Err(error) => tracing::error!(%error, "server reflection is not available"),
    }
    routes.prepare()
}

/// One connection's way through the gate.
#[derive(Clone, Debug)]
struct GatedCalls {
    gate: Arc<Gate>,
    routes: Option<Routes>,
}

impl Service<http::Request<Body>> for GatedCalls {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        if self.routes.is_none() {
            self.routes = self.gate.routes.get().cloned();
        }
        match &mut self.routes {
            Some(routes) => Service::<http::Request<Body>>::poll_ready(routes, cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if let Some(error) = &*self.gate.shut.read() {
            return Box::pin(std::future::ready(Ok(error.to_status().into_http())));
        }
        match &mut self.routes {
            Some(routes) => Box::pin(routes.call(request)),
            None => match self.gate.early.get() {
                Some(early) if request.uri().path() == RECOVER_PATH => Box::pin(early.clone().call(request)),
                _ => Box::pin(std::future::ready(Ok(self.gate.closed().into_http()))),
            },
        }
    }
}

/// Tells a connection's guard of its calls, so that one that is used is not idle, and meters what they receive.
#[derive(Clone, Debug)]
pub(crate) struct GuardedCalls<S> {
    pub(crate) inner: S,
    pub(crate) receiving: Receiving,
}

impl<S> Service<http::Request<Body>> for GuardedCalls<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<CountedBody>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let guard = request.extensions().get::<ConnectionCalls>().map(ConnectionCalls::begin);
        let (parts, body) = request.into_parts();
        let (body, held) = self.receiving.meter(body);
        let mut request = http::Request::from_parts(parts, body);
        request.extensions_mut().insert(held);
        let response = self.inner.call(request);
        Box::pin(async move { Ok(response.await?.map(|inner| CountedBody { inner, _guard: guard })) })
    }
}

/// A response's body; the call ends with it.
#[derive(Debug)]
pub(crate) struct CountedBody {
    inner: Body,
    // Held for its drop alone.
    _guard: Option<CallGuard>,
}

impl HttpBody for CountedBody {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
