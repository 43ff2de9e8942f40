//! Accepting clients: how many there may be, how long they may take to speak, how long they may say nothing.
//!
//! The HTTP/2 server underneath has a deadline for neither the preface nor an idle connection, and no cap on connections;
//! so the accepted socket is wrapped here, and its reads end when a deadline passes.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tonic::transport::server::Connected;

use crate::config::LimitsConfig;
use crate::metrics::Metrics;

/// The HTTP/2 preface and the frame header of the SETTINGS that must follow it.
const PREFACE_BYTES: usize = 24 + 9;
/// Pause after an accept that failed for want of something (file descriptors, memory): the connection stays in the
/// system's queue, and trying at once again would only burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Refusals are logged this often at most.
const LOG_EVERY_MS: u64 = 1_000;

/// What is counted of one listener's connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConnectionMetrics {
    /// Open now.
    pub(crate) open: Gauge,
    /// Turned away by a limit.
    pub(crate) refused: Counter,
    /// Cut off by a deadline.
    pub(crate) timed_out: Counter,
    /// Accepts that failed.
    pub(crate) accept_errors: Counter,
}

impl From<Arc<Metrics>> for ConnectionMetrics {
    fn from(metrics: Arc<Metrics>) -> Self {
        Self {
            open: metrics.connections.clone(),
            refused: metrics.connections_refused.clone(),
            timed_out: metrics.connections_timed_out.clone(),
            accept_errors: metrics.accept_errors.clone(),
        }
    }
}

/// Connections that are open, by address.
#[derive(Debug)]
pub(crate) struct Connections {
    limits: LimitsConfig,
    metrics: ConnectionMetrics,
    /// Held for a look and a change; nothing waits inside.
    by_address: Mutex<HashMap<IpAddr, usize>>,
    open: AtomicUsize,
    /// When a refusal was logged last, in milliseconds after `since`: whoever floods the broker does not flood its log.
    refusal_logged_ms: AtomicU64,
    since: Instant,
}

impl Connections {
    pub(crate) fn new(limits: LimitsConfig, metrics: impl Into<ConnectionMetrics>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            metrics: metrics.into(),
            by_address: Mutex::new(HashMap::new()),
            open: AtomicUsize::new(0),
            refusal_logged_ms: AtomicU64::new(0),
            since: Instant::now(),
        })
    }

    /// A place for one more from `address`, if the limits leave one.
    fn admit(self: &Arc<Self>, address: IpAddr) -> Result<Place, &'static str> {
        let mut by_address = self.by_address.lock();
        if self.open.load(Ordering::Relaxed) >= self.limits.connections {
            return Err("limits.connections");
        }
        let from_there = by_address.entry(address).or_default();
        if *from_there >= self.limits.connections_per_address {
            return Err("limits.connections_per_address");
        }
        *from_there += 1;
        self.open.fetch_add(1, Ordering::Relaxed);
        self.metrics.open.inc();
        Ok(Place { connections: Arc::clone(self), address })
    }
}

impl Connections {
    fn refused(&self, address: SocketAddr, limit: &str) {
        self.metrics.refused.inc();
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        let last = self.refusal_logged_ms.load(Ordering::Relaxed);
        if last == 0 || now - last >= LOG_EVERY_MS {
            self.refusal_logged_ms.store(now, Ordering::Relaxed);
            tracing::warn!(%address, limit, "connections are turned away");
        }
    }
}

/// One connection's place, given back when it is dropped.
#[derive(Debug)]
struct Place {
    connections: Arc<Connections>,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_address = self.connections.by_address.lock();
        if let Some(from_there) = by_address.get_mut(&self.address) {
            *from_there -= 1;
            if *from_there == 0 {
                by_address.remove(&self.address);
            }
        }
        self.connections.open.fetch_sub(1, Ordering::Relaxed);
        self.connections.metrics.open.dec();
    }
}

/// The accepted sockets of one listener, each in its guard.
pub(crate) struct Incoming {
    listener: TcpListener,
    connections: Arc<Connections>,
    /// True: every connection is cut.
    cut: watch::Receiver<bool>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Incoming {
    pub(crate) fn new(listener: TcpListener, connections: Arc<Connections>, cut: watch::Receiver<bool>) -> Self {
        Self { listener, connections, cut, pause: None }
    }
}

impl Stream for Incoming {
    type Item = io::Result<GuardedSocket>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match ready!(self.listener.poll_accept(cx)) {
                Ok((socket, address)) => match self.connections.admit(address.ip()) {
                    Ok(place) => {
                        // Without this, small answers wait for the client's delayed acknowledgement. A socket that
                        // refuses it is gone already, and the first read says so.
                        drop(socket.set_nodelay(true));
                        let guarded = GuardedSocket::new(socket, place, self.cut.clone());
                        return Poll::Ready(Some(Ok(guarded)));
                    }
                    Err(limit) => {
                        self.connections.refused(address, limit);
                    }
                },
                // The client went before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    self.connections.metrics.accept_errors.inc();
                    tracing::error!(
                        %error,
                        "cannot accept connections; with too many open files, raise the limit (ulimit -n) or lower \
                         limits.connections"
                    );
                    self.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

/// What a connection's calls tell its guard.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionCalls {
    state: Arc<CallsState>,
}

#[derive(Debug)]
struct CallsState {
    peer: SocketAddr,
    since: Instant,
    open: AtomicUsize,
    /// When the last call ended, in milliseconds after `since`.
    last_end_ms: AtomicU64,
}

impl ConnectionCalls {
    /// Where the client connects from.
    pub(crate) fn peer(&self) -> SocketAddr {
        self.state.peer
    }

    /// Counts a call until the guard is dropped.
    pub(crate) fn begin(&self) -> CallGuard {
        self.state.open.fetch_add(1, Ordering::Relaxed);
        CallGuard { state: Arc::clone(&self.state) }
    }
}

/// A call that is under way.
#[derive(Debug)]
pub(crate) struct CallGuard {
    state: Arc<CallsState>,
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        let ended = u64::try_from(self.state.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.state.last_end_ms.store(ended, Ordering::Relaxed);
        self.state.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A client's socket, whose reads fail once a deadline has passed.
pub(crate) struct GuardedSocket {
    socket: TcpStream,
    place: Place,
    calls: ConnectionCalls,
    /// Counted up to [`PREFACE_BYTES`].
    preface_bytes: usize,
    /// The handshake's, then the idle deadline.
    deadline: Pin<Box<Sleep>>,
    cut: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl GuardedSocket {
    fn new(socket: TcpStream, place: Place, mut cut: watch::Receiver<bool>) -> Self {
        let peer = socket.peer_addr().unwrap_or_else(|_| SocketAddr::new(place.address, 0));
        let state =
            CallsState { peer, since: Instant::now(), open: AtomicUsize::new(0), last_end_ms: AtomicU64::new(0) };
        let deadline = Box::pin(sleep(place.connections.limits.handshake_timeout));
        let cut = Box::pin(async move {
            // An error means that the broker is gone altogether.
            drop(cut.wait_for(|cut| *cut).await);
        });
        Self { socket, place, calls: ConnectionCalls { state: Arc::new(state) }, preface_bytes: 0, deadline, cut }
    }

    /// Fails when this connection's time is over; else makes sure that the task is woken when it will be.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the broker has stopped"));
        }
        while self.deadline.as_mut().poll(cx).is_ready() {
            let limits = &self.place.connections.limits;
            let calls = &self.calls.state;
            let what = if self.preface_bytes < PREFACE_BYTES {
                "no HTTP/2 within limits.handshake_timeout"
            } else {
                let last_end = calls.since + Duration::from_millis(calls.last_end_ms.load(Ordering::Relaxed));
                let until = if calls.open.load(Ordering::Relaxed) > 0 {
                    Instant::now() + limits.idle_timeout
                } else {
                    last_end + limits.idle_timeout
                };
                if until > Instant::now() {
                    self.deadline.set(sleep_until(until));
                    continue;
                }
                "no call within limits.idle_timeout"
            };
            self.place.connections.metrics.timed_out.inc();
            tracing::debug!(peer = %calls.peer, what, "a connection is closed");
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        Ok(())
    }
}

impl AsyncRead for GuardedSocket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let guarded = &mut *self;
        let before = buf.filled().len();
        match Pin::new(&mut guarded.socket).poll_read(cx, buf) {
            Poll::Ready(Ok(())) => {
                if guarded.preface_bytes < PREFACE_BYTES {
                    guarded.preface_bytes += buf.filled().len() - before;
                    if guarded.preface_bytes >= PREFACE_BYTES {
                        let idle = guarded.place.connections.limits.idle_timeout;
                        guarded.deadline.set(sleep(idle));
                    }
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            // Deadlines are looked at when there is nothing to read: a connection that speaks is not late.
            Poll::Pending => guarded.check(cx).map_or_else(|error| Poll::Ready(Err(error)), |()| Poll::Pending),
        }
    }
}

impl AsyncWrite for GuardedSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl Connected for GuardedSocket {
    type ConnectInfo = ConnectionCalls;

    fn connect_info(&self) -> ConnectionCalls {
        self.calls.clone()
    }
}
