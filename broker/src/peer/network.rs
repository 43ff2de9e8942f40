//! The network of brokers as one of them holds it.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use flowstone_protocol::{BrokerId, ClusterId, Error};
use flowstone_replication::{GroupMessage, PeerBody, PeerTransport, PullAnswer, PullRequest, Reply};
use parking_lot::{Mutex, RwLock};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

use super::book::PeerBook;
use super::calls::{PeerCalls, PeerEvents};
use super::client::{Channels, PeerClient};
use super::config::PeerConfig;
use super::identity::PeerIdentity;
use super::link::Link;
use super::pull::{Asked, Pulling, Serving};
use super::server;

/// Refusals are logged this often at most.
const REFUSALS_LOGGED_EVERY: Duration = Duration::from_secs(1);

/// One of the two streams that a broker opens to each other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum StreamKind {
    /// Votes, heartbeats, what is small and must never wait behind a batch.
    Votes,
    /// Appends and their answers, ranges offered.
    Appends,
}

impl StreamKind {
    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Votes => "/flowstone.peer.v1.Peer/Votes",
            Self::Appends => "/flowstone.peer.v1.Peer/Appends",
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Votes => "votes",
            Self::Appends => "appends",
        }
    }

    /// Messages of a group that must not overtake each other go the same way.
    const fn of(body: &PeerBody) -> Self {
        match body {
            PeerBody::Append { .. }
            | PeerBody::AppendResponse { .. }
            | PeerBody::SnapshotOffer { .. }
            | PeerBody::SnapshotAnswer { .. } => Self::Appends,
            PeerBody::Vote { .. }
            | PeerBody::VoteResponse { .. }
            | PeerBody::Heartbeat { .. }
            | PeerBody::HeartbeatResponse { .. }
            | PeerBody::Beat(_)
            | PeerBody::BeatAnswer(_)
            | PeerBody::TransferLeader
            | PeerBody::TimeoutNow
            | PeerBody::ReadIndex { .. }
            | PeerBody::ReadIndexAnswer { .. }
            | PeerBody::Ended => Self::Votes,
        }
    }
}

/// All ways to and from the other brokers: their streams, ranges that are pulled, calls. It stops when it is dropped.
#[derive(Debug)]
pub struct PeerNetwork {
    shared: Arc<Shared>,
}

/// What the network counted, since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerFigures {
    /// Messages, rows included, handed to HTTP/2.
    pub messages_sent: u64,
    /// Bytes of them on the wire, but for HTTP/2's own.
    pub bytes_sent: u64,
    /// Messages, rows included, that arrived.
    pub messages_received: u64,
    /// Bytes of them.
    pub bytes_received: u64,
    /// Messages that found no room, or whose stream broke before they were sent.
    pub messages_dropped: u64,
    /// Streams that were opened and accepted.
    pub streams_opened: u64,
    /// Streams and calls of others that were refused.
    pub refused: u64,
    /// Bytes of ranges that were pulled from others.
    pub pulled_bytes: u64,
    /// Bytes of ranges that others pulled from here.
    pub served_bytes: u64,
    /// Other brokers that both streams to are open now.
    pub brokers_connected: u64,
    /// Connections of others open now.
    pub connections: u64,
    /// Messages that wait to be sent now.
    pub messages_waiting: u64,
    /// Bytes of them.
    pub bytes_waiting: u64,
}

impl PeerNetwork {
    /// Begins: nothing is dialled before there is something to send. Tasks run on `runtime`.
    pub fn start(config: PeerConfig, identity: PeerIdentity, book: PeerBook, runtime: Handle) -> Arc<Self> {
        let shared = Shared {
            pulling: Pulling::new(&config),
            serving: Serving::new(&config),
            channels: Channels::default(),
            config,
            identity: RwLock::new(identity),
            book,
            runtime,
            events: OnceLock::new(),
            peers: RwLock::new(HashMap::new()),
            accepted: Mutex::new(HashMap::new()),
            stop: watch::Sender::new(false),
            counters: Counters::default(),
            refusal_logged: Mutex::new(None),
        };
        Arc::new(Self { shared: Arc::new(shared) })
    }

    /// Says who takes what arrives; once, before [`PeerNetwork::serve`]. What arrives earlier is dropped.
    pub fn attach(&self, events: impl PeerEvents) {
        if self.shared.events.set(Arc::new(events)).is_err() {
            tracing::error!("the peer network was attached twice: the first stays");
        }
    }

    /// This broker belongs to a cluster now, and says so from here on.
    pub fn set_cluster(&self, cluster: ClusterId) {
        self.shared.identity.write().cluster = Some(cluster);
    }

    /// Who this broker says it is.
    pub fn identity(&self) -> PeerIdentity {
        self.shared.identity()
    }

    /// Who the others are.
    pub fn book(&self) -> &PeerBook {
        &self.shared.book
    }

    /// Calls other brokers.
    pub fn client(&self) -> PeerClient {
        PeerClient::new(Arc::clone(&self.shared))
    }

    /// Serves other brokers until `drain`; then takes nothing new, ends their streams, and returns when all calls have
    /// ended. `cut` ends those that do not. `client_address` is told to clients that come here.
    ///
    /// # Errors
    /// The listener has ended by itself.
    pub async fn serve(
        &self,
        listener: TcpListener,
        calls: Arc<dyn PeerCalls>,
        client_address: String,
        drain: watch::Receiver<bool>,
        cut: watch::Receiver<bool>,
    ) -> Result<(), tonic::transport::Error> {
        server::serve(Arc::clone(&self.shared), listener, calls, client_address, drain, cut).await
    }

    /// Whether this start of a broker may speak for it, as far as is known here: not beside another one that is registered
    /// and has its streams open here. On a copy of a data directory both would vote under the same names.
    ///
    /// # Errors
    /// The other one speaks.
    pub fn check_start(&self, from: &PeerIdentity) -> Result<(), Error> {
        self.shared.check_start(from)
    }

    /// A broker is not part of the cluster any more: nothing is kept for it. Should it come back, all is made anew.
    pub fn forget(&self, broker: BrokerId) {
        self.shared.book.remove(broker);
        if let Some(peer) = self.shared.peers.write().remove(&broker) {
            peer.votes.end();
            peer.appends.end();
        }
        self.shared.channels.forget(broker);
        self.shared.accepted.lock().retain(|(from, _), _| *from != broker);
    }

    /// What was counted.
    pub fn figures(&self) -> PeerFigures {
        self.shared.figures()
    }

    #[cfg(test)]
    pub(super) fn shared_for_tests(&self) -> &Shared {
        &self.shared
    }

    /// Ends all streams to others; nothing is sent any more.
    pub fn stop(&self) {
        self.shared.stop.send_replace(true);
    }
}

impl Drop for PeerNetwork {
    fn drop(&mut self) {
        self.stop();
    }
}

impl PeerTransport for PeerNetwork {
    fn send(&self, to: BrokerId, messages: Vec<GroupMessage>) {
        let peer = self.shared.peer(to);
        let appends = messages.iter().filter(|m| StreamKind::of(&m.message.body) == StreamKind::Appends).count();
        if appends == messages.len() {
            peer.appends.push(&self.shared, messages);
        } else if appends == 0 {
            peer.votes.push(&self.shared, messages);
        } else {
            let (appends, votes) =
                messages.into_iter().partition(|m| StreamKind::of(&m.message.body) == StreamKind::Appends);
            peer.votes.push(&self.shared, votes);
            peer.appends.push(&self.shared, appends);
        }
    }

    fn pull(&self, from: BrokerId, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        let asked = Asked::new(reply);
        self.shared.runtime.spawn(Pulling::run(Arc::clone(&self.shared), from, request, asked));
    }
}

/// The streams to one other broker.
#[derive(Debug)]
pub(crate) struct Peer {
    votes: Arc<Link>,
    appends: Arc<Link>,
}

/// A stream from another broker.
#[derive(Debug)]
struct Accepted {
    /// By which start of it.
    incarnation: u64,
    /// Ends with it; dropped when a newer one takes its place.
    until: oneshot::Sender<()>,
}

/// What all tasks of the network share.
pub(crate) struct Shared {
    pub(crate) config: PeerConfig,
    /// Held for a look or a change, as are all locks here; nothing waits inside.
    identity: RwLock<PeerIdentity>,
    pub(crate) book: PeerBook,
    runtime: Handle,
    events: OnceLock<Arc<dyn PeerEvents>>,
    /// All that something was sent to.
    peers: RwLock<HashMap<BrokerId, Arc<Peer>>>,
    /// The newest stream of each kind from each broker: dropped when there is a newer one, which ends it.
    accepted: Mutex<HashMap<(BrokerId, StreamKind), Accepted>>,
    pub(crate) pulling: Pulling,
    pub(crate) serving: Serving,
    pub(crate) channels: Channels,
    /// True once the network has stopped.
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) counters: Counters,
    /// When a refusal was logged last.
    refusal_logged: Mutex<Option<Instant>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("identity", &self.identity()).field("book", &self.book).finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn identity(&self) -> PeerIdentity {
        *self.identity.read()
    }

    pub(crate) fn events(&self) -> Option<&Arc<dyn PeerEvents>> {
        self.events.get()
    }

    pub(crate) fn unreachable(&self, broker: BrokerId) {
        if let Some(events) = self.events() {
            events.unreachable(broker);
        }
    }

    pub(crate) fn peer_gone(&self, broker: BrokerId) {
        if let Some(events) = self.events() {
            events.peer_gone(broker);
        }
    }

    /// Counts what another broker was refused, and logs it now and then: whoever tries for ever does not flood the log.
    pub(crate) fn refused(&self, what: &str, broker: Option<BrokerId>, error: &Error) {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let mut logged = self.refusal_logged.lock();
        if logged.is_none_or(|at| now - at >= REFUSALS_LOGGED_EVERY) {
            *logged = Some(now);
            drop(logged);
            let broker = broker.map(BrokerId::get);
            tracing::warn!(broker, %error, "{what} is refused");
        }
    }

    /// Links that are kept.
    #[cfg(test)]
    pub(super) fn links(&self) -> usize {
        2 * self.peers.read().len()
    }

    /// As [`PeerNetwork::check_start`].
    pub(crate) fn check_start(&self, from: &PeerIdentity) -> Result<(), Error> {
        let Some(registered) = self.book.start_of(from.broker).filter(|start| *start != from.incarnation) else {
            return Ok(());
        };
        let accepted = self.accepted.lock();
        let speaks = [StreamKind::Votes, StreamKind::Appends].iter().any(|kind| {
            let stream = accepted.get(&(from.broker, *kind));
            stream.is_some_and(|stream| stream.incarnation == registered && !stream.until.is_closed())
        });
        if !speaks {
            // A start that has ended; whoever comes back must be able to vote before it can be registered.
            return Ok(());
        }
        Err(Error::new(
            flowstone_protocol::ErrorCode::PermissionDenied,
            format!(
                "broker {} runs already, on the same data directory: one of the two is a copy; stop the newer one, and start \
                 it with an empty directory and a node.id of its own",
                from.broker
            ),
        ))
    }

    /// A stream from a broker was accepted: it ends when what is returned does. Any older one of its kind ends now.
    pub(crate) fn accept(&self, from: BrokerId, incarnation: u64, kind: StreamKind) -> oneshot::Receiver<()> {
        let (until, superseded) = oneshot::channel();
        self.accepted.lock().insert((from, kind), Accepted { incarnation, until });
        // It is up: whoever waits to dial it again need not wait any longer.
        if let Some(peer) = self.peers.read().get(&from) {
            peer.votes.retry_now();
            peer.appends.retry_now();
        }
        superseded
    }

    fn peer(self: &Arc<Self>, broker: BrokerId) -> Arc<Peer> {
        if let Some(peer) = self.peers.read().get(&broker) {
            return Arc::clone(peer);
        }
        let mut peers = self.peers.write();
        let peer = peers.entry(broker).or_insert_with(|| {
            let open = |kind| {
                let link = Link::new(broker, kind, self);
                self.runtime.spawn(Arc::clone(&link).run(Arc::clone(self)));
                link
            };
            Arc::new(Peer { votes: open(StreamKind::Votes), appends: open(StreamKind::Appends) })
        });
        Arc::clone(peer)
    }

    fn figures(&self) -> PeerFigures {
        let connected = |peer: &&Arc<Peer>| peer.votes.is_connected() && peer.appends.is_connected();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        let (mut messages_waiting, mut bytes_waiting) = (0, 0);
        for peer in self.peers.read().values() {
            for link in [&peer.votes, &peer.appends] {
                let (messages, bytes) = link.waiting();
                messages_waiting += messages as u64;
                bytes_waiting += bytes as u64;
            }
        }
        PeerFigures {
            messages_sent: read(&counters.messages_sent),
            bytes_sent: read(&counters.bytes_sent),
            messages_received: read(&counters.messages_received),
            bytes_received: read(&counters.bytes_received),
            messages_dropped: read(&counters.messages_dropped),
            streams_opened: read(&counters.streams_opened),
            refused: read(&counters.refused),
            pulled_bytes: read(&counters.pulled_bytes),
            served_bytes: read(&counters.served_bytes),
            brokers_connected: self.peers.read().values().filter(connected).count() as u64,
            connections: u64::try_from(counters.connections.open.get()).unwrap_or(0),
            messages_waiting,
            bytes_waiting,
        }
    }
}

/// Counts since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    messages_sent: AtomicU64,
    bytes_sent: AtomicU64,
    messages_received: AtomicU64,
    bytes_received: AtomicU64,
    messages_dropped: AtomicU64,
    streams_opened: AtomicU64,
    refused: AtomicU64,
    pulled_bytes: AtomicU64,
    served_bytes: AtomicU64,
    pub(crate) connections: crate::connections::ConnectionMetrics,
}

impl Counters {
    pub(crate) fn sent(&self, messages: usize, bytes: usize) {
        self.messages_sent.fetch_add(messages as u64, Ordering::Relaxed);
        self.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, messages: usize, bytes: usize) {
        self.messages_received.fetch_add(messages as u64, Ordering::Relaxed);
        self.bytes_received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn dropped(&self, messages: usize) {
        self.messages_dropped.fetch_add(messages as u64, Ordering::Relaxed);
    }

    pub(crate) fn connected(&self) {
        self.streams_opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn pulled(&self, bytes: usize) {
        self.pulled_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn served(&self, bytes: usize) {
        self.served_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}
