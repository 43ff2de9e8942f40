//! Brokers that end, fall silent, are slow, move, or are not who they should be.

use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::super::QueueLimits;
use super::*;

/// What a proxy does with the bytes between a broker and the server that it dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Pass,
    /// Those to the server are lost, as on a network that is broken in one direction.
    LostThere,
    /// All are lost, and nobody is told that the other side has closed.
    LostBoth,
    /// Those to the server are not read: it is slow.
    Held,
}

/// Stands between a broker and the one that it dials.
struct Proxy {
    address: SocketAddr,
    /// Where connections lead that are made from now on.
    server: watch::Sender<SocketAddr>,
    way: watch::Sender<Way>,
    task: JoinHandle<()>,
}

impl Proxy {
    async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (way, ways) = watch::channel(Way::Pass);
        let (server, servers) = watch::channel(server);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = *servers.borrow();
                let Ok(server) = TcpStream::connect(server).await else { continue };
                let (client_reads, client_writes) = client.into_split();
                let (server_reads, server_writes) = server.into_split();
                tokio::spawn(Self::there(client_reads, server_writes, ways.clone()));
                tokio::spawn(Self::back(server_reads, client_writes, ways.clone()));
            }
        });
        Self { address, server, way, task }
    }

    async fn there(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut ways: watch::Receiver<Way>) {
        let mut bytes = vec![0; 64 << 10];
        loop {
            if ways.wait_for(|way| *way != Way::Held).await.is_err() {
                return;
            }
            let Ok(read @ 1..) = from.read(&mut bytes).await else { return };
            let way = *ways.borrow();
            let is_lost = matches!(way, Way::LostThere | Way::LostBoth);
            if !is_lost && to.write_all(&bytes[..read]).await.is_err() {
                return;
            }
        }
    }

    async fn back(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut ways: watch::Receiver<Way>) {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let read = from.read(&mut bytes).await.unwrap_or(0);
            let is_lost = *ways.borrow() == Way::LostBoth;
            if read == 0 {
                // An error means that the test is over.
                drop(ways.wait_for(|way| *way != Way::LostBoth).await);
                return;
            }
            if !is_lost && to.write_all(&bytes[..read]).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn is_unreachable(told: &Told, broker: i32) -> bool {
    matches!(told, Told::Unreachable(which) if *which == id(broker))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_ends_is_told_of_and_found_again_when_it_is_back() {
    let mut nodes = cluster(3, config()).await;
    let mut third = nodes.pop().expect("three");
    let mut second = nodes.pop().expect("three");
    let mut first = nodes.pop().expect("three");
    until_connected(&first, &mut second).await;
    first.send(&second, vec![append(1, &[10])]);
    second.delivered(1).await;
    let address = second.kill().await;
    let told = first.until(|told| matches!(told, Told::Gone(broker) if *broker == id(2))).await;
    assert!(!told.iter().any(|told| matches!(told, Told::Gone(broker) if *broker == id(3))));
    // The others go on.
    first.send(&third, vec![append(2, &[10])]);
    third.delivered(1).await;

    let listener = TcpListener::bind(address).await.expect("its port again");
    let identity = PeerIdentity { incarnation: 2, ..identity(2) };
    let mut second = Node::start_on(listener, identity, config(), |_| Err(refused_by_calls()));
    second.knows(&first);
    until_connected(&first, &mut second).await;
    until_connected(&second, &mut first).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_is_noticed_and_healed() {
    for silence in [Way::LostThere, Way::LostBoth] {
        let mut first = Node::start(identity(1), impatient()).await;
        let mut second = Node::start(identity(2), impatient()).await;
        let proxy = Proxy::to(second.address).await;
        first.knows_at(&second, &proxy.address.to_string());
        second.knows(&first);
        until_connected(&first, &mut second).await;
        until_connected(&second, &mut first).await;

        while first.told.try_recv().is_ok() {}
        proxy.way.send_replace(silence);
        first.until(|told| is_unreachable(told, 2)).await;
        // The other direction is another stream, and still there.
        second.send(&first, vec![append(77, &[10])]);
        first.until(|told| matches!(told, Told::Delivered(_, messages) if group_of(&messages[0]) == 77)).await;

        proxy.way.send_replace(Way::Pass);
        until_connected(&first, &mut second).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_broker_costs_no_other_anything() {
    const BYTES_MAX: usize = 1 << 20;
    // Nothing but the full queue tells of it.
    let config = PeerConfig {
        appends_queue: QueueLimits { messages_max: 10_000, bytes_max: BYTES_MAX },
        keepalive_timeout: 10 * LONG,
        ..config()
    };
    let mut nodes = Vec::new();
    for broker in 1..=3 {
        nodes.push(Node::start(identity(broker), config.clone()).await);
    }
    let [first, second, third] = &mut nodes[..] else { unreachable!("three") };
    let proxy = Proxy::to(second.address).await;
    first.knows_at(second, &proxy.address.to_string());
    first.knows(third);
    second.knows(first);
    third.knows(first);
    first.send(second, vec![append(0, &[10])]);
    second.delivered(1).await;

    proxy.way.send_replace(Way::Held);
    // Sending never waits: all of it is dropped beyond what sockets, HTTP/2 and the queue hold.
    let sent = 3_000;
    for group in 1..=sent {
        first.send(second, vec![append(group, &[100_000])]);
        first.send(third, vec![append(group, &[10])]);
        if group % 100 == 0 {
            third.delivered(100).await;
        }
    }
    first.until(|told| is_unreachable(told, 2)).await;
    let dropped = first.network.figures().messages_dropped;
    let held_bytes = (sent - dropped) * 100_000;
    assert!(held_bytes < 64 << 20, "{held_bytes} bytes are kept for a broker that does not read");

    proxy.way.send_replace(Way::Pass);
    first.send(second, vec![append(sent + 1, &[10])]);
    let mut last = 0;
    second
        .until(|told| {
            if let Told::Delivered(_, messages) = told {
                for message in messages.iter().filter(|m| matches!(m.message.body, PeerBody::Append { .. })) {
                    let group = group_of(message);
                    assert!(group > last || group == sent + 1, "{group} after {last}: in order, whatever was dropped");
                    last = group;
                }
            }
            first.send_once_more(id(2), sent + 1);
            last == sent + 1
        })
        .await;
}

impl Node {
    /// For a receiver that may have had no room when it was sent first.
    fn send_once_more(&self, to: BrokerId, group: u64) {
        self.network.send(to, vec![append(group, &[10])]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_not_who_it_says_is_refused() {
    let other_cluster = PeerIdentity { cluster: Some(ClusterId::new(0xbad)), ..identity(2) };
    let other_directory = PeerIdentity { directory: DirectoryId::new(0xbad), ..identity(2) };
    for liar in [other_cluster, other_directory, identity(4), PeerIdentity { cluster: None, ..identity(2) }] {
        let mut first = Node::start(identity(1), config()).await;
        first.network.book().set(id(2), PeerEntry { address: String::new(), directory: Some(directory(2)) });
        let mut liar = Node::start(liar, config()).await;
        liar.knows(&first);
        liar.send(&first, vec![append(1, &[10]), heartbeat(1)]);
        liar.until(|told| is_unreachable(told, 1)).await;
        assert!(first.network.figures().refused > 0);
        assert!(first.told.try_recv().is_err(), "nothing of it is believed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_is_heard_once_it_is_registered_and_no_longer_when_its_directory_is_replaced() {
    let mut nodes = cluster(2, config()).await;
    let [first, second] = &mut nodes[..] else { unreachable!("two") };
    second.network.book().remove(id(1));
    first.send(second, vec![heartbeat(1)]);
    first.until(|told| is_unreachable(told, 2)).await;
    second.knows(first);
    until_connected(first, second).await;

    let entry = PeerEntry { address: first.address.to_string(), directory: Some(DirectoryId::new(0xbad)) };
    second.network.book().set(id(1), entry);
    first.send(second, vec![heartbeat(2)]);
    first.until(|told| is_unreachable(told, 2)).await;
    while let Ok(told) = second.told.try_recv() {
        assert!(
            !matches!(&told, Told::Delivered(_, messages) if messages.iter().any(|message| group_of(message) == 2)),
            "{told:?} of a directory that is not registered any more"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_answers_at_a_wrong_address_gets_nothing() {
    let mut first = Node::start(identity(1), config()).await;
    let mut third = Node::start(identity(3), config()).await;
    third.knows(&first);
    // Broker 2 is said to be where broker 3 is.
    let entry = PeerEntry { address: third.address.to_string(), directory: Some(directory(2)) };
    first.network.book().set(id(2), entry);
    first.network.send(id(2), vec![append(1, &[10])]);
    first.until(|told| is_unreachable(told, 2)).await;
    assert!(third.told.try_recv().is_err());

    // Nor does broker 2 with a directory that is not its own.
    let mut wiped = Node::start(PeerIdentity { directory: DirectoryId::new(0xbad), ..identity(2) }, config()).await;
    wiped.knows(&first);
    first.network.book().set_address(id(2), &wiped.address.to_string());
    while first.told.try_recv().is_ok() {}
    first.network.send(id(2), vec![append(1, &[10])]);
    first.until(|told| is_unreachable(told, 2)).await;
    assert!(wiped.told.try_recv().is_err());

    // Once that is put right, the new address is dialled.
    let mut second = Node::start(identity(2), config()).await;
    second.knows(&first);
    first.knows(&second);
    until_connected(&first, &mut second).await;
    // And again, when it moves while it is connected.
    let address = second.address;
    let proxy = Proxy::to(address).await;
    first.knows_at(&second, &proxy.address.to_string());
    let opened = first.network.figures().streams_opened;
    until_connected(&first, &mut second).await;
    let moved = async {
        let mut every = tokio::time::interval(Duration::from_millis(10));
        while first.network.figures().streams_opened == opened {
            every.tick().await;
            first.send(&second, vec![heartbeat(1)]);
        }
    };
    timeout(LONG, moved).await.expect("dialled anew");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_reached_another_broker_are_made_anew() {
    let first = Node::start(identity(1), config()).await;
    let second = Node::start(identity(2), config()).await;
    let third = Node::start(identity(3), config()).await;
    second.knows(&first);
    third.knows(&first);
    let proxy = Proxy::to(third.address).await;
    first.knows_at(&second, &proxy.address.to_string());
    let client = first.network.client();
    let reached_the_third = |error: &Error| error.message.contains("has reached broker 3");
    let report = client.report(id(2), pb::ReportRequest::default(), LONG).await.expect_err("broker 3 is there");
    assert!(reached_the_third(&report), "{report}");
    let pull = client.pull(id(2), pb::PullRequest::default(), LONG).await.expect_err("broker 3 is there");
    assert!(reached_the_third(&pull), "{pull}");

    // The address leads to broker 2 again; the connections that were made go on to the third.
    proxy.server.send_replace(second.address);
    client.report(id(2), pb::ReportRequest::default(), LONG).await.expect("a connection of its own");
    let pull = client.pull(id(2), pb::PullRequest::default(), LONG).await.expect_err("nothing was asked for");
    assert!(!reached_the_third(&pull), "{pull}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn brokers_that_are_not_there_are_told_of_again_and_again() {
    let mut first = Node::start(identity(1), config()).await;
    // Nobody listens where a listener was bound and dropped.
    let nowhere = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("bound");
    first.network.book().set_address(id(2), &nowhere.to_string());
    for broker in [2, 3] {
        for _ in 0..3 {
            first.network.send(id(broker), vec![heartbeat(1)]);
            first.until(|told| is_unreachable(told, broker)).await;
        }
    }
    assert_eq!(first.network.figures().messages_dropped, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_comes_back_is_not_kept_waiting() {
    let patient = PeerConfig { backoff_min: 10 * LONG, backoff_max: 10 * LONG, ..config() };
    let mut first = Node::start(identity(1), patient).await;
    let address = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("bound");
    let entry = PeerEntry { address: address.to_string(), directory: Some(directory(2)) };
    first.network.book().set(id(2), entry);
    first.network.send(id(2), vec![heartbeat(1)]);
    first.until(|told| is_unreachable(told, 2)).await;
    // It speaks: so it can be spoken to.
    let listener = TcpListener::bind(address).await.expect("the port again");
    let mut second = Node::start_on(listener, identity(2), config(), |_| Err(refused_by_calls()));
    second.knows(&first);
    until_connected(&second, &mut first).await;
    until_connected(&first, &mut second).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_is_dropped_lets_go_of_everything() {
    let mut nodes = cluster(2, config()).await;
    let [first, second] = &mut nodes[..] else { unreachable!("two") };
    until_connected(first, second).await;
    let left = Arc::new(Mutex::new(()));
    let weak = Arc::downgrade(&left);
    let (sender, _told) = mpsc::unbounded_channel();
    let lonely = PeerNetwork::start(config(), identity(3), PeerBook::new(), Handle::current());
    let range = move |_| {
        drop(left.lock());
        Err(refused_by_calls())
    };
    lonely.attach(Events { told: sender, range: Arc::new(range) });
    lonely.book().set_address(id(1), &first.address.to_string());
    lonely.send(id(1), vec![heartbeat(1)]);
    drop(lonely);
    let gone = async {
        while weak.strong_count() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LONG, gone).await.expect("its tasks end");
}
