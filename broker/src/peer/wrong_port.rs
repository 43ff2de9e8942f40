//! Calls that came to a listener which is not theirs: a client's at the peer port, a broker's at the client port.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::task::{Context, Poll};

use flowstone_protocol::{Error, ErrorCode};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};

/// What the paths of all calls between brokers begin with.
const PEER_PATHS: &str = "/flowstone.peer.";

/// Whose calls a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    /// All but brokers'.
    Client,
    /// Brokers' alone.
    Peer,
}

/// Tells those who have come to the wrong port, and hands on the others.
#[derive(Clone, Debug)]
pub(crate) struct OnlyOn<S> {
    port: Port,
    inner: S,
    /// Where the others are to go.
    told: Arc<Error>,
}

impl<S> OnlyOn<S> {
    /// `elsewhere`: the address of the other listener; may be empty.
    pub(crate) fn new(port: Port, elsewhere: &str, inner: S) -> Self {
        let at = if elsewhere.is_empty() { String::new() } else { format!(", {elsewhere}") };
        let message = match port {
            Port::Client => format!(
                "this is the client listener of a broker (listen.client), and other brokers have to connect to its peer \
                 listener (listen.peer{at}); correct cluster.seeds and advertise.peer"
            ),
            Port::Peer => format!(
                "this is the peer listener of a broker (listen.peer), for other brokers alone; connect to its client \
                 listener (listen.client{at})"
            ),
        };
        Self { port, inner, told: Arc::new(Error::new(ErrorCode::Unsupported, message)) }
    }
}

impl<S> Service<http::Request<Body>> for OnlyOn<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<http::Response<Body>, Infallible>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let is_peers = request.uri().path().starts_with(PEER_PATHS);
        if is_peers == (self.port == Port::Peer) {
            Box::pin(self.inner.call(request))
        } else {
            Box::pin(ready(Ok(self.told.to_status().into_http())))
        }
    }
}
