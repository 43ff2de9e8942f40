//! What the network between brokers takes and gives: one append back and forth, and as many bytes as go through, from one
//! broker to two others on loopback. Nothing is stored: this is the way alone.
//!
//! ```text
//! cargo run --release -p flowstone-broker --example peers
//! ```

// A program speaks to its terminal.
#![allow(clippy::print_stdout)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_broker::Config;
use flowstone_broker::peer::{PeerBook, PeerCalls, PeerConfig, PeerEntry, PeerEvents, PeerIdentity, PeerNetwork};
use flowstone_broker::storage::{EntryBody, LogEntry};
use flowstone_protocol::peer as pb;
use flowstone_protocol::{
    BrokerId, ClusterId, DirectoryId, Error, ErrorCode, PartitionId, RaftIndex, ReplicaId, Term, TopicId,
    TopicPartition,
};
use flowstone_replication::{GroupMessage, PeerBody, PeerMessage, PeerTransport, PullAnswer, PullRequest, Reply};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Bytes sent and not answered, to each follower.
const IN_FLIGHT_BYTES: u64 = 16 << 20;
const MEASURED: Duration = Duration::from_secs(3);
const ROUND_TRIPS: usize = 20_000;

/// Takes what arrives: a follower answers every append, the leader counts the answers.
struct Taker {
    network: std::sync::Weak<PeerNetwork>,
    answered_bytes: [AtomicU64; 4],
    answers: mpsc::SyncSender<()>,
}

/// As the network holds it.
struct Events(Arc<Taker>);

impl PeerEvents for Events {
    fn deliver(&self, from: BrokerId, messages: Vec<GroupMessage>) {
        let mut answers = Vec::new();
        for GroupMessage { tp, message } in messages {
            match message.body {
                PeerBody::Append { entries, .. } => {
                    let bytes: usize = entries.iter().map(LogEntry::data_bytes).sum();
                    answers.push(GroupMessage { tp, message: PeerMessage { body: answer(bytes as u64), ..message } });
                }
                PeerBody::AppendResponse { index, .. } => {
                    self.0.answered_bytes[from.get() as usize].fetch_add(index.get(), Ordering::Relaxed);
                    // Nobody waits for it while throughput is measured.
                    self.0.answers.try_send(()).ok();
                }
                _ => {}
            }
        }
        if let (Some(network), false) = (self.0.network.upgrade(), answers.is_empty()) {
            network.send(from, answers);
        }
    }

    fn unreachable(&self, broker: BrokerId) {
        println!("broker {broker} is unreachable");
    }

    fn peer_gone(&self, broker: BrokerId) {
        println!("broker {broker} is gone");
    }

    fn serve_pull(&self, _: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        reply.send(Err(nothing()));
    }
}

struct NoCalls;

#[tonic::async_trait]
impl PeerCalls for NoCalls {
    async fn hello(&self, _: PeerIdentity, _: pb::HelloRequest) -> Result<pb::HelloResponse, Error> {
        Err(nothing())
    }
    async fn register(&self, _: PeerIdentity, _: pb::RegisterRequest) -> Result<pb::RegisterResponse, Error> {
        Err(nothing())
    }
    async fn broker_heartbeat(
        &self,
        _: PeerIdentity,
        _: pb::BrokerHeartbeatRequest,
    ) -> Result<pb::BrokerHeartbeatResponse, Error> {
        Err(nothing())
    }
    async fn forward(&self, _: PeerIdentity, _: pb::ForwardRequest) -> Result<pb::ForwardResponse, Error> {
        Err(nothing())
    }
    async fn report(&self, _: PeerIdentity, _: pb::ReportRequest) -> Result<pb::ReportResponse, Error> {
        Err(nothing())
    }
    async fn instruct(&self, _: PeerIdentity, _: pb::InstructRequest) -> Result<pb::InstructResponse, Error> {
        Err(nothing())
    }
}

fn nothing() -> Error {
    Error::new(ErrorCode::Unsupported, "there is nothing here to call; only streams are measured")
}

fn answer(bytes: u64) -> PeerBody {
    PeerBody::AppendResponse {
        index: RaftIndex::new(bytes),
        commit: RaftIndex::new(0),
        reject: false,
        reject_hint: RaftIndex::new(0),
        hint_term: Term::new(0),
        request_snapshot: RaftIndex::new(0),
    }
}

fn append(data: &Bytes, entries: usize) -> GroupMessage {
    let entry = |index| LogEntry {
        index: RaftIndex::new(index as u64),
        term: Term::new(1),
        body: EntryBody::Batch(data.clone()),
    };
    GroupMessage {
        tp: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
        message: PeerMessage {
            from: ReplicaId::new(1),
            to: ReplicaId::new(2),
            term: Term::new(1),
            body: PeerBody::Append {
                previous_index: RaftIndex::new(0),
                previous_term: Term::new(0),
                commit: RaftIndex::new(0),
                entries: (1..=entries).map(entry).collect(),
            },
        },
    }
}

struct Node {
    network: Arc<PeerNetwork>,
    taker: Arc<Taker>,
    address: String,
    answered: mpsc::Receiver<()>,
    _runtime: Runtime,
    _drain: watch::Sender<bool>,
}

fn start(broker: i32) -> Node {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let identity = PeerIdentity {
        broker: BrokerId::new(broker),
        directory: DirectoryId::new(broker as u128),
        incarnation: 1,
        cluster: Some(ClusterId::new(1)),
    };
    let config = PeerConfig::new(&Config::dev("unused", 0).limits);
    let network = PeerNetwork::start(config, identity, PeerBook::new(), runtime.handle().clone());
    let (answers, answered) = mpsc::sync_channel(1);
    let taker = Arc::new(Taker { network: Arc::downgrade(&network), answered_bytes: Default::default(), answers });
    network.attach(Events(Arc::clone(&taker)));
    let (drain, drains) = watch::channel(false);
    let serving = Arc::clone(&network);
    runtime.spawn(async move {
        let cut = drains.clone();
        serving.serve(listener, Arc::new(NoCalls), String::new(), drains, cut).await
    });
    Node { network, taker, address, answered, _runtime: runtime, _drain: drain }
}

fn main() {
    let nodes: Vec<Node> = (1..=3).map(start).collect();
    for node in &nodes {
        for other in nodes.iter().filter(|other| other.address != node.address) {
            let identity = other.network.identity();
            let entry = PeerEntry { address: other.address.clone(), directory: Some(identity.directory) };
            node.network.book().set(identity.broker, entry);
        }
    }
    let leader = &nodes[0];
    round_trips(leader);
    for (bytes, entries) in [(1 << 10, 100), (16 << 10, 16), (64 << 10, 8), (1 << 20, 1)] {
        throughput(leader, bytes, entries);
    }
}

fn round_trips(leader: &Node) {
    let data = Bytes::from(vec![7; 1_000]);
    let mut took = Vec::with_capacity(ROUND_TRIPS);
    for round in 0..ROUND_TRIPS + 1_000 {
        let began = Instant::now();
        leader.network.send(BrokerId::new(2), vec![append(&data, 1)]);
        leader.answered.recv().expect("an answer");
        if round >= 1_000 {
            took.push(began.elapsed());
        }
    }
    took.sort();
    let at = |share: f64| took[(took.len() as f64 * share) as usize];
    println!("one append of 1000 B and its answer: p50 {:?}, p99 {:?}, p99.9 {:?}", at(0.5), at(0.99), at(0.999));
}

fn throughput(leader: &Node, bytes: usize, entries: usize) {
    let data = Bytes::from(vec![7; bytes]);
    let counts = &leader.taker.answered_bytes;
    let start = [2, 3].map(|broker| counts[broker].load(Ordering::Relaxed));
    let mut sent = [0; 2];
    let began = Instant::now();
    while began.elapsed() < MEASURED {
        for (at, broker) in [2usize, 3].into_iter().enumerate() {
            while sent[at] - (counts[broker].load(Ordering::Relaxed) - start[at]) < IN_FLIGHT_BYTES {
                leader.network.send(BrokerId::new(broker as i32), vec![append(&data, entries)]);
                sent[at] += (bytes * entries) as u64;
            }
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    let arrived: u64 =
        [2usize, 3].iter().enumerate().map(|(at, b)| counts[*b].load(Ordering::Relaxed) - start[at]).sum();
    let mb = arrived as f64 / 1e6 / began.elapsed().as_secs_f64();
    println!("{entries} batches of {bytes} B in a message: {:.0} MB/s to each of two, {mb:.0} MB/s in all", mb / 2.0);
    // The next measurement begins with nothing under way.
    while [2usize, 3].iter().enumerate().any(|(at, b)| counts[*b].load(Ordering::Relaxed) - start[at] < sent[at]) {
        std::thread::sleep(Duration::from_millis(1));
    }
}
