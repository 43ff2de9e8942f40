//! Networks on loopback, talking to each other.

mod calls;
mod faults;
mod hostile;
mod streams;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::peer as pb;
use flowstone_protocol::{
    BrokerId, ClusterId, DirectoryId, Error, ErrorCode, PartitionId, RaftIndex, ReplicaId, Term, TopicId,
    TopicPartition,
};
use flowstone_replication::{GroupMessage, PeerBody, PeerMessage, PeerTransport, PullAnswer, PullRequest, Reply};
use flowstone_storage::{EntryBody, LogEntry};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{PeerBook, PeerCalls, PeerConfig, PeerEntry, PeerEvents, PeerIdentity, PeerNetwork};
use crate::config::Config;

pub(super) fn message(group: u64, body: PeerBody) -> GroupMessage {
    GroupMessage {
        tp: TopicPartition::new(TopicId::new(u128::from(group) << 64 | 7), PartitionId::new(3)),
        message: PeerMessage { from: ReplicaId::new(group), to: ReplicaId::new(group + 1), term: Term::new(5), body },
    }
}

pub(super) fn heartbeat(group: u64) -> GroupMessage {
    message(group, PeerBody::Heartbeat { commit: RaftIndex::new(group) })
}

/// Entries of as many bytes each, from index 1 on.
pub(super) fn append(group: u64, entries: &[usize]) -> GroupMessage {
    let entry = |(at, bytes): (usize, &usize)| LogEntry {
        index: RaftIndex::new(at as u64 + 1),
        term: Term::new(5),
        body: EntryBody::Batch(Bytes::from(vec![(group as u8).wrapping_add(at as u8); *bytes])),
    };
    message(
        group,
        PeerBody::Append {
            previous_index: RaftIndex::new(0),
            previous_term: Term::new(0),
            commit: RaftIndex::new(group),
            entries: entries.iter().enumerate().map(entry).collect(),
        },
    )
}

/// The group that a message of [`heartbeat`] or [`append`] is of.
fn group_of(message: &GroupMessage) -> u64 {
    message.message.from.get()
}

/// Long after everything here is over: a test that waits this long has failed, on however slow a machine.
const LONG: Duration = Duration::from_secs(60);
const CLUSTER: u128 = 0xc1;

fn id(broker: i32) -> BrokerId {
    BrokerId::new(broker)
}

fn directory(broker: i32) -> DirectoryId {
    DirectoryId::new(0xd000 + broker as u128)
}

fn identity(broker: i32) -> PeerIdentity {
    PeerIdentity {
        broker: id(broker),
        directory: directory(broker),
        incarnation: 1,
        cluster: Some(ClusterId::new(CLUSTER)),
    }
}

fn config() -> PeerConfig {
    let config = Config::dev("unused", 0);
    PeerConfig { backoff_max: Duration::from_millis(50), ..PeerConfig::new(&config.limits) }
}

/// Short enough that a test can wait for silence to be noticed.
fn impatient() -> PeerConfig {
    PeerConfig {
        keepalive_interval: Duration::from_millis(50),
        keepalive_timeout: Duration::from_millis(300),
        hello_timeout: Duration::from_millis(500),
        ..config()
    }
}

/// What a network told its broker.
#[derive(Debug)]
enum Told {
    Delivered(BrokerId, Vec<GroupMessage>),
    Unreachable(BrokerId),
    Gone(BrokerId),
}

#[derive(Clone)]
struct Events {
    told: mpsc::UnboundedSender<Told>,
    /// What is answered to every pull.
    range: Arc<dyn Fn(PullRequest) -> Result<PullAnswer, Error> + Send + Sync>,
}

impl PeerEvents for Events {
    fn deliver(&self, from: BrokerId, messages: Vec<GroupMessage>) {
        // A test that has seen enough listens no more.
        drop(self.told.send(Told::Delivered(from, messages)));
    }

    fn unreachable(&self, broker: BrokerId) {
        drop(self.told.send(Told::Unreachable(broker)));
    }

    fn peer_gone(&self, broker: BrokerId) {
        drop(self.told.send(Told::Gone(broker)));
    }

    fn serve_pull(&self, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        reply.send((self.range)(request));
    }
}

/// Answers every call in a way that shows that it came here.
struct Calls;

fn refused_by_calls() -> Error {
    Error::new(ErrorCode::NotLeader, "ask the controller").with_leader(id(9), "nine:1")
}

#[tonic::async_trait]
impl PeerCalls for Calls {
    async fn hello(&self, from: PeerIdentity, request: pb::HelloRequest) -> Result<pb::HelloResponse, Error> {
        Ok(pb::HelloResponse { controller_id: from.broker.get(), seeds: request.seeds, ..Default::default() })
    }

    async fn register(&self, from: PeerIdentity, _: pb::RegisterRequest) -> Result<pb::RegisterResponse, Error> {
        Ok(pb::RegisterResponse { metadata_replica_id: from.incarnation, ..Default::default() })
    }

    async fn broker_heartbeat(
        &self,
        _: PeerIdentity,
        _: pb::BrokerHeartbeatRequest,
    ) -> Result<pb::BrokerHeartbeatResponse, Error> {
        Err(refused_by_calls())
    }

    async fn forward(&self, _: PeerIdentity, request: pb::ForwardRequest) -> Result<pb::ForwardResponse, Error> {
        Ok(pb::ForwardResponse { error: None, response: request.request })
    }

    async fn report(&self, from: PeerIdentity, _: pb::ReportRequest) -> Result<pb::ReportResponse, Error> {
        Ok(pb::ReportResponse { disk_free_bytes: from.broker.get() as u64, ..Default::default() })
    }

    async fn instruct(&self, _: PeerIdentity, _: pb::InstructRequest) -> Result<pb::InstructResponse, Error> {
        std::future::pending().await
    }
}

/// A broker's network that serves on loopback.
struct Node {
    network: Arc<PeerNetwork>,
    address: SocketAddr,
    told: mpsc::UnboundedReceiver<Told>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
    drain: watch::Sender<bool>,
    cut: watch::Sender<bool>,
}

impl Node {
    async fn start(identity: PeerIdentity, config: PeerConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        Self::start_on(listener, identity, config, |request| {
            Err(Error::new(ErrorCode::UnknownPartition, format!("no {}", request.tp)))
        })
    }

    fn start_on(
        listener: TcpListener,
        identity: PeerIdentity,
        config: PeerConfig,
        range: impl Fn(PullRequest) -> Result<PullAnswer, Error> + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().expect("bound");
        let network = PeerNetwork::start(config, identity, PeerBook::new(), Handle::current());
        let (sender, told) = mpsc::unbounded_channel();
        network.attach(Events { told: sender, range: Arc::new(range) });
        let (drain, drains) = watch::channel(false);
        let (cut, cuts) = watch::channel(false);
        let serving = {
            let network = Arc::clone(&network);
            tokio::spawn(async move {
                network.serve(listener, Arc::new(Calls), "client.test:7070".to_owned(), drains, cuts).await
            })
        };
        Self { network, address, told, serving, drain, cut }
    }

    fn broker(&self) -> BrokerId {
        self.network.identity().broker
    }

    /// Enters `other` as registered.
    fn knows(&self, other: &Node) {
        self.knows_at(other, &other.address.to_string());
    }

    fn knows_at(&self, other: &Node, address: &str) {
        let identity = other.network.identity();
        let entry = PeerEntry { address: address.to_owned(), directory: Some(identity.directory) };
        self.network.book().set(identity.broker, entry);
    }

    fn send(&self, to: &Node, messages: Vec<GroupMessage>) {
        self.network.send(to.broker(), messages);
    }

    async fn next(&mut self) -> Told {
        timeout(LONG, self.told.recv()).await.expect("in time").expect("open")
    }

    /// Everything told until `is_last`, that included.
    async fn until(&mut self, mut is_last: impl FnMut(&Told) -> bool) -> Vec<Told> {
        let mut all = Vec::new();
        loop {
            all.push(self.next().await);
            if is_last(&all[all.len() - 1]) {
                return all;
            }
        }
    }

    /// The messages delivered until there are `count`, by who sent them.
    async fn delivered(&mut self, count: usize) -> HashMap<BrokerId, Vec<GroupMessage>> {
        let mut delivered: HashMap<BrokerId, Vec<GroupMessage>> = HashMap::new();
        while delivered.values().map(Vec::len).sum::<usize>() < count {
            if let Told::Delivered(from, messages) = self.next().await {
                delivered.entry(from).or_default().extend(messages);
            }
        }
        delivered
    }

    /// Ends like a process that is killed: its sockets close, whatever is under way.
    async fn kill(self) -> SocketAddr {
        self.network.stop();
        self.cut.send_replace(true);
        self.drain.send_replace(true);
        timeout(LONG, self.serving).await.expect("in time").expect("no panic").expect("no error");
        self.address
    }
}

/// Brokers 1 to `count` that know each other.
async fn cluster(count: i32, config: PeerConfig) -> Vec<Node> {
    let mut nodes = Vec::new();
    for broker in 1..=count {
        nodes.push(Node::start(identity(broker), config.clone()).await);
    }
    for node in &nodes {
        for other in nodes.iter().filter(|other| other.broker() != node.broker()) {
            node.knows(other);
        }
    }
    nodes
}

/// Sends heartbeats from one to the other until one arrives.
async fn until_connected(from: &Node, to: &mut Node) {
    let trying = async {
        let mut every = tokio::time::interval(Duration::from_millis(10));
        loop {
            every.tick().await;
            from.send(to, vec![heartbeat(999)]);
            while let Ok(told) = to.told.try_recv() {
                if matches!(told, Told::Delivered(broker, _) if broker == from.broker()) {
                    return;
                }
            }
        }
    };
    timeout(LONG, trying).await.expect("connected");
}
