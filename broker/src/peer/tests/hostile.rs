//! Bytes at the peer port that no broker sends.

use std::future::poll_fn;
use std::io::ErrorKind;

use bytes::{Buf, BytesMut};
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::super::wire;
use super::*;

const VOTES: &str = "/flowstone.peer.v1.Peer/Votes";

/// Sends `body` on a call of its own and returns how that ends: the error that the broker names.
async fn call(address: SocketAddr, path: &str, body: Vec<Bytes>, ends: bool) -> Option<Error> {
    let socket = TcpStream::connect(address).await.expect("connected");
    let (send, connection) = h2::client::handshake(socket).await.expect("HTTP/2");
    // It ends with the call.
    let connection = tokio::spawn(async move { drop(connection.await) });
    let mut send = send.ready().await.expect("ready");
    let request = http::Request::post(format!("http://{address}{path}"))
        .header("content-type", "application/grpc")
        .body(())
        .expect("a request");
    let (response, mut sender) = send.send_request(request, false).expect("sent");
    for piece in body {
        // The broker may have ended the call already.
        if sender.send_data(piece, false).is_err() {
            break;
        }
    }
    if ends {
        drop(sender.send_data(Bytes::new(), true));
    }
    let read = async {
        let response = response.await.ok()?;
        if let Some(status) = tonic::Status::from_header_map(response.headers()) {
            return Error::from_status(&status);
        }
        let mut body = response.into_body();
        while let Some(Ok(data)) = body.data().await {
            drop(body.flow_control().release_capacity(data.len()));
        }
        let trailers = poll_fn(|cx| body.poll_trailers(cx)).await.ok()??;
        Error::from_status(&tonic::Status::from_header_map(&trailers)?)
    };
    let error = timeout(LONG, read).await.expect("it ends");
    connection.abort();
    error
}

fn bytes(mut chunks: impl Buf) -> Bytes {
    chunks.copy_to_bytes(chunks.remaining())
}

fn hello(broker: i32) -> Bytes {
    bytes(wire::encode_hello(identity(broker).to_caller(Some(id(1)))))
}

fn framed(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::new();
    framed.extend_from_slice(&[0]);
    framed.extend_from_slice(&(message.len() as u32).to_be_bytes());
    framed.extend_from_slice(message);
    framed.freeze()
}

/// Broker 1, which knows broker 2 and expects more than it gets.
async fn victim() -> Node {
    let config = PeerConfig { hello_timeout: Duration::from_millis(100), ..config() };
    let node = Node::start(identity(1), config).await;
    node.network.book().set(id(2), PeerEntry { address: String::new(), directory: Some(directory(2)) });
    node
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_begin_wrongly_are_refused_with_a_reason() {
    let mut victim = victim().await;
    let check = async |body: Vec<Bytes>, part: &str| {
        let error = call(victim.address, VOTES, body, false).await.expect("an error of ours");
        assert!(error.message.contains(part), "{error} rather than {part}");
    };
    check(vec![], "nobody said who speaks").await;
    check(vec![Bytes::from_static(&[0, 0])], "nobody said who speaks").await;
    check(vec![framed(b"")], "before it was said who speaks").await;
    check(vec![framed(&[0xff; 40])], "cannot be read").await;
    check(vec![Bytes::from_static(&[1, 0, 0, 0, 0])], "compressed").await;
    // Its length alone is enough.
    check(vec![Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff])], "larger than").await;
    check(vec![hello(3)], "not registered").await;
    check(vec![hello(1)], "from this very broker").await;
    let mut other = identity(2).to_caller(Some(id(5)));
    check(vec![bytes(wire::encode_hello(other.clone()))], "looks for broker 5").await;
    other.protocol_version = 99;
    check(vec![bytes(wire::encode_hello(other))], "version 99").await;
    check(vec![hello(2), hello(2)], "says again").await;
    let too_large = (victim.network.shared_for_tests().config.message_bytes_max as u32 + 1).to_be_bytes();
    check(vec![hello(2), Bytes::from([&[0], &too_large[..]].concat())], "larger than").await;
    assert!(victim.told.try_recv().is_err(), "nothing was delivered");
    // One that speaks first and is right is heard.
    let body = vec![hello(2), bytes(wire::encode(&[heartbeat(4)]))];
    assert_eq!(call(victim.address, VOTES, body, true).await, None);
    victim.delivered(1).await;
}

/// Frames of a real stream, changed here and there, through the whole of it: the broker neither panics nor stops.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutated_streams_do_not_hurt() {
    let mut victim = victim().await;
    let mut rng = StdRng::seed_from_u64(7);
    let messages = [append(1, &[10, 3_000, 0]), heartbeat(2), message(3, PeerBody::TimeoutNow)];
    let original = [hello(2), bytes(wire::encode(&messages)), bytes(wire::encode(&[heartbeat(4)]))].concat();
    let mut refused = 0;
    for _ in 0..300 {
        let mut changed = original.clone();
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(0..changed.len());
            match rng.random_range(0..4) {
                0 => changed[at] = rng.random(),
                1 => changed.truncate(at.max(1)),
                2 => changed[at] ^= 0x80,
                _ => changed.insert(at, rng.random()),
            }
        }
        let cut = rng.random_range(0..=changed.len());
        let pieces = vec![Bytes::copy_from_slice(&changed[..cut]), Bytes::copy_from_slice(&changed[cut..])];
        let path = if rng.random() { VOTES } else { "/flowstone.peer.v1.Peer/Appends" };
        refused += usize::from(call(victim.address, path, pieces, true).await.is_some());
    }
    assert!(refused > 50, "only {refused} of 300 were refused: the mutations say little");
    assert_still_serves(&mut victim).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_http2_or_no_call_is_turned_away() {
    let mut victim = victim().await;
    let mut rng = StdRng::seed_from_u64(8);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for round in 0..100 {
        let mut sent = match round % 3 {
            0 => preface.to_vec(),
            1 => b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
            _ => Vec::new(),
        };
        sent.extend((0..rng.random_range(0..2_000)).map(|_| rng.random::<u8>()));
        let mut socket = TcpStream::connect(victim.address).await.expect("connected");
        // It may be closed in the middle of this.
        drop(socket.write_all(&sent).await);
        drop(socket.shutdown().await);
        let mut answer = Vec::new();
        match timeout(LONG, socket.read_to_end(&mut answer)).await.expect("it is closed") {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
        }
    }
    // Calls whose messages are none.
    for path in ["Hello", "Register", "Pull", "Forward", "Report", "Instruct", "BrokerHeartbeat", "Nothing"] {
        for body in [vec![], vec![framed(&[0xff; 100])], vec![Bytes::from_static(&[0, 0x7f, 0xff, 0xff, 0xff])]] {
            let path = format!("/flowstone.peer.v1.Peer/{path}");
            let error = call(victim.address, &path, body, true).await;
            assert!(error.is_none(), "gRPC's own, not {error:?}");
        }
        let path = format!("/flowstone.peer.v1.Peer/{path}");
        let error = call(victim.address, &path, vec![framed(b"")], true).await;
        assert!(path.ends_with("Nothing") || error.expect("refused").message.contains("who it is"));
    }
    assert_still_serves(&mut victim).await;
}

/// Many that begin large messages and do not go on share one budget, and do not take it from others for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_do_not_go_on_are_given_up() {
    let mut config = config();
    config.limits.message_timeout = Duration::from_millis(200);
    let mut victim = Node::start(identity(1), config).await;
    for broker in 2..6 {
        let entry = PeerEntry { address: String::new(), directory: Some(directory(broker)) };
        victim.network.book().set(id(broker), entry);
    }
    let begun = [&[0], &(60u32 << 20).to_be_bytes()[..], &[0; 100]].concat();
    let calls = (2..6).map(|broker| call(victim.address, VOTES, vec![hello(broker), begun.clone().into()], false));
    for error in futures::future::join_all(calls).await {
        let error = error.expect("an error of ours");
        assert_eq!(error.code, ErrorCode::TimedOut, "{error}");
    }
    assert_still_serves(&mut victim).await;
}

async fn assert_still_serves(victim: &mut Node) {
    let friend = Node::start(identity(2), config()).await;
    victim.knows(&friend);
    friend.knows(victim);
    until_connected(&friend, victim).await;
    let answer = friend.network.client().report(id(1), pb::ReportRequest::default(), LONG).await;
    assert_eq!(
        answer.expect("an answer").encode_to_vec().len(),
        pb::ReportResponse { disk_free_bytes: 2, ..Default::default() }.encoded_len()
    );
}
