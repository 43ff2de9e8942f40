//! A TCP proxy in front of one listener of one broker: it knows who dials, and asks the network about every piece.
//!
//! ```text
//!  dialer --> [read] --> queue --> [wait for the link, write] --> broker
//!  dialer <-- [write, wait for the link] <-- queue <-- [read] <-- broker
//! ```
//! Each arrow is a thread. The queue holds so many pieces (`QUEUE_PIECES`); then reading stops, and TCP slows the sender down.

use crate::dialer::process_of;
use crate::failure::{Failure, Outcome};
use crate::network::{Network, Node};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

/// Bytes that are passed on at once.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces on their way through one direction of a connection.
const QUEUE_PIECES: usize = 64;

/// Who may dial a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialers {
    /// Other brokers: told apart by their process.
    Brokers,
    /// Clients, which are not told apart.
    Clients,
}

/// A proxy that listens; it ends when dropped, with all its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    network: Arc<Network>,
    /// Who is behind it.
    node: Node,
    dialers: Dialers,
    /// Where the broker listens now; guards one word.
    target: Mutex<Option<SocketAddr>>,
    /// Both sockets of every connection, to end them; guards the list.
    connections: Mutex<Vec<TcpStream>>,
    closed: AtomicBool,
}

impl Proxy {
    /// Listens on a free port of the loopback.
    ///
    /// # Errors
    /// No port is free.
    pub fn start(network: &Arc<Network>, node: Node, dialers: Dialers) -> Outcome<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(Failure::of("a proxy cannot listen"))?;
        let address = listener.local_addr().map_err(Failure::of("a proxy has no address"))?;
        let shared = Arc::new(Shared {
            network: network.clone(),
            node,
            dialers,
            target: Mutex::new(None),
            connections: Mutex::new(Vec::new()),
            closed: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        thread::spawn(move || {
            for connection in listener.incoming() {
                if accepting.closed.load(Ordering::Acquire) {
                    return;
                }
                if let Ok(connection) = connection {
                    let shared = accepting.clone();
                    thread::spawn(move || shared.connect(connection, address));
                }
            }
        });
        Ok(Proxy { address, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where connections go from now on; those that are there stay.
    pub fn set_target(&self, target: Option<SocketAddr>) {
        *self.shared.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }

    /// Ends all connections at once, as a firewall that forgot them.
    pub fn reset(&self) {
        let mut connections = self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        for connection in connections.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.reset();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn connect(self: Arc<Self>, dialed: TcpStream, address: SocketAddr) {
        let Some(from) = self.dialer(&dialed, address) else { return };
        // As a first packet that is lost: the dialer waits, and the broker behind learns nothing.
        let now = Instant::now();
        if !self.network.wait_to_pass(from, self.node, now) || !self.network.wait_to_pass(self.node, from, now) {
            return;
        }
        let target = *self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Ok(answered)) = target.map(TcpStream::connect) else { return };
        let _ = (dialed.set_nodelay(true), answered.set_nodelay(true));
        if let (Ok(one), Ok(other)) = (dialed.try_clone(), answered.try_clone()) {
            self.keep(one);
            self.keep(other);
        }
        let (Ok(dialed_reads), Ok(answered_reads)) = (dialed.try_clone(), answered.try_clone()) else { return };
        let there = self.clone();
        thread::spawn(move || there.pass(from, there.node, dialed_reads, answered));
        self.pass(self.node, from, answered_reads, dialed);
    }

    fn dialer(&self, dialed: &TcpStream, address: SocketAddr) -> Option<Node> {
        if self.dialers == Dialers::Clients {
            return Some(Node::Clients);
        }
        let processes = self.network.processes();
        let candidates: Vec<u32> = processes.iter().map(|(_, process)| *process).collect();
        let process = process_of(dialed.peer_addr().ok()?, address, &candidates);
        let node = processes.into_iter().find(|(_, known)| Some(*known) == process).map(|(node, _)| node);
        Some(node.unwrap_or(Node::Stranger))
    }

    fn keep(&self, connection: TcpStream) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that have ended go.
        connections.retain(|connection| connection.peer_addr().is_ok());
        connections.push(connection);
    }

    /// Passes on one direction, until its end.
    fn pass(&self, from: Node, to: Node, reads: TcpStream, mut writes: TcpStream) {
        let Ok(mut reader) = reads.try_clone() else { return };
        let (queue, queued) = mpsc::sync_channel::<(Instant, Vec<u8>)>(QUEUE_PIECES);
        let network = self.network.clone();
        let reading = thread::spawn(move || {
            let mut piece = vec![0; PIECE_BYTES];
            // The end of the stream is a piece too: it must not overtake what is late, nor pass a cut.
            loop {
                let bytes = reader.read(&mut piece).unwrap_or(0);
                let sent = queue.send((network.due(from, to), piece[..bytes].to_vec()));
                if bytes == 0 || sent.is_err() {
                    return;
                }
            }
        });
        for (due, piece) in &queued {
            if !self.network.wait_to_pass(from, to, due) || piece.is_empty() || writes.write_all(&piece).is_err() {
                break;
            }
        }
        let _ = (writes.shutdown(Shutdown::Write), reads.shutdown(Shutdown::Read));
        // With these, a reader ends that waits for room in the queue, or for bytes.
        drop(queued);
        let _ = reading.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Link;
    use std::time::Duration;

    const NODE: Node = Node::Broker(1);
    /// Far beyond what anything here takes.
    const HANG: Duration = Duration::from_secs(60);

    /// A proxy in front of a listener, with a connection through it: both ends.
    fn through() -> (Arc<Network>, Proxy, TcpStream, TcpStream) {
        let network = Arc::new(Network::default());
        let proxy = Proxy::start(&network, NODE, Dialers::Clients).expect("a proxy");
        let behind = TcpListener::bind("127.0.0.1:0").expect("a port");
        proxy.set_target(behind.local_addr().ok());
        let client = TcpStream::connect(proxy.address()).expect("it listens");
        let (broker, _) = behind.accept().expect("it is dialed");
        client.set_read_timeout(Some(HANG)).expect("a timeout");
        broker.set_read_timeout(Some(HANG)).expect("a timeout");
        (network, proxy, client, broker)
    }

    fn comes(stream: &mut TcpStream, bytes: &[u8]) {
        let mut got = vec![0; bytes.len()];
        stream.read_exact(&mut got).expect("it comes");
        assert_eq!(got, bytes);
    }

    #[test]
    fn a_cut_in_one_direction_holds_that_one_up() {
        let (network, _proxy, mut client, mut broker) = through();
        network.cut_one_way(Node::Clients, NODE);
        client.write_all(b"asked").expect("room");
        broker.write_all(b"told").expect("room");
        comes(&mut client, b"told");
        broker.set_nonblocking(true).expect("a mode");
        assert!(broker.read(&mut [0; 8]).is_err(), "nothing passed");
        broker.set_nonblocking(false).expect("a mode");
        network.heal();
        comes(&mut broker, b"asked");
    }

    #[test]
    fn an_end_does_not_pass_a_cut() {
        let (network, _proxy, client, mut broker) = through();
        network.cut(Node::Clients, NODE);
        drop(client);
        broker.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        assert!(broker.read(&mut [0; 8]).is_err(), "neither bytes nor an end");
        broker.set_read_timeout(Some(HANG)).expect("a timeout");
        network.heal();
        assert_eq!(broker.read(&mut [0; 8]).expect("an end"), 0);
    }

    #[test]
    fn who_dials_over_a_cut_waits() {
        let (network, proxy, ..) = through();
        let behind = TcpListener::bind("127.0.0.1:0").expect("a port");
        proxy.set_target(behind.local_addr().ok());
        network.cut_one_way(NODE, Node::Clients);
        let mut client = TcpStream::connect(proxy.address()).expect("it listens");
        client.write_all(b"hello").expect("room");
        behind.set_nonblocking(true).expect("a mode");
        assert!(behind.accept().is_err(), "nobody came");
        network.heal();
        behind.set_nonblocking(false).expect("a mode");
        comes(&mut behind.accept().expect("now it comes").0, b"hello");
    }

    #[test]
    fn delay_and_loss_take_time_and_lose_nothing() {
        let (network, _proxy, mut client, mut broker) = through();
        let delay = Duration::from_millis(80);
        network.set(Node::Clients, NODE, Link { delay, ..Link::default() });
        let began = Instant::now();
        client.write_all(b"late").expect("room");
        comes(&mut broker, b"late");
        assert!(began.elapsed() >= delay);
        network.set(Node::Clients, NODE, Link { loss: 1.0, ..Link::default() });
        let began = Instant::now();
        client.write_all(b"lost").expect("room");
        comes(&mut broker, b"lost");
        assert!(began.elapsed() >= Duration::from_millis(200));
    }

    #[test]
    fn a_reset_ends_what_is_there() {
        let (_network, proxy, mut client, _broker) = through();
        proxy.reset();
        assert!(matches!(client.read(&mut [0; 8]), Ok(0) | Err(_)));
    }
}
