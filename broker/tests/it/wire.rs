//! Below gRPC: messages that begin and do not go on, that claim what they do not hold, and clients that leave in the
//! middle of one.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use flowstone_protocol::{Error, ErrorCode, pb};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use prost::Message;
use tokio::net::TcpStream;
use tonic::Status;
use tonic::codegen::http::{Request, header};

use crate::http::get;
use crate::stalled::resident_bytes;
use crate::world::*;

/// A connection that speaks HTTP/2 and nothing above it.
struct Wire {
    requests: SendRequest<Bytes>,
    connection: tokio::task::JoinHandle<()>,
}

/// One call of it.
struct Call {
    body: SendStream<Bytes>,
    response: ResponseFuture,
}

impl Wire {
    async fn to(world: &World) -> Wire {
        let socket = TcpStream::connect(world.broker.client_addr).await.expect("connected");
        let (requests, connection) = h2::client::handshake(socket).await.expect("the broker speaks HTTP/2");
        // Ends with the connection, however that ends.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Wire { requests, connection }
    }

    async fn call(&mut self, path: &str) -> Call {
        let request = Request::builder()
            .method("POST")
            .uri(format!("http://broker{path}"))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("a request");
        self.requests = self.requests.clone().ready().await.expect("connected");
        let (response, body) = self.requests.send_request(request, false).expect("sent");
        Call { body, response }
    }

    /// As a process that is killed.
    fn cut(self) {
        self.connection.abort();
    }
}

impl Call {
    fn send(&mut self, bytes: impl Into<Bytes>) {
        self.body.send_data(bytes.into(), false).expect("open");
    }

    /// How the broker ended the call, once it did.
    async fn end(self) -> Error {
        let response = soon("an answer", self.response).await.expect("an answer");
        if let Some(status) = Status::from_header_map(response.headers()) {
            return error_of(&status);
        }
        let mut body: RecvStream = response.into_body();
        while let Some(data) = soon("the end", body.data()).await {
            let data = data.expect("a whole answer");
            body.flow_control().release_capacity(data.len()).expect("received");
        }
        let trailers = soon("the end", body.trailers()).await.expect("an end").expect("trailers");
        error_of(&Status::from_header_map(&trailers).expect("a status"))
    }
}

/// A message's prefix, with a length of our choice.
fn prefix(flag: u8, length: usize) -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u8(flag);
    bytes.put_u32(length as u32);
    bytes
}

fn framed(message: &impl Message) -> BytesMut {
    let mut bytes = prefix(0, message.encoded_len());
    message.encode(&mut bytes).expect("room");
    bytes
}

fn produce(topic: &Topic, request_id: u64, values: &[&str]) -> BytesMut {
    let batch = batch(values);
    framed(&pb::ProduceRequest { request_id, topic_id: topic.id.clone(), batch, ..Default::default() })
}

const PRODUCE: &str = "/flowstone.v1.Log/Produce";
const FETCH: &str = "/flowstone.v1.Log/Fetch";
const LIST_OFFSETS: &str = "/flowstone.v1.Log/ListOffsets";
const CREATE_TOPIC: &str = "/flowstone.v1.Admin/CreateTopic";

#[tokio::test]
async fn messages_that_are_none() {
    let mut world = World::with(&[("limits.message_timeout", "1h")]).await;
    let topic = world.create("orders", 1).await;
    let mut wire = Wire::to(&world).await;
    for path in [PRODUCE, FETCH] {
        let garbage = [prefix(0, 5).freeze(), Bytes::from_static(b"\xff\xff\xff\xff\xff")].concat();
        let compressed = [prefix(1, 2).freeze(), Bytes::from_static(b"\x08\x01")].concat();
        let nonsense = [prefix(9, 2).freeze(), Bytes::from_static(b"\x08\x01")].concat();
        for (what, bytes) in [("garbage", garbage), ("a compressed one", compressed), ("an odd flag", nonsense)] {
            let mut call = wire.call(path).await;
            call.send(bytes);
            let error = call.end().await;
            assert_eq!(error.code, ErrorCode::InvalidRequest, "{what} to {path}: {error:?}");
        }
    }
    world.produce(&topic, 0, batch(&["x"])).await.expect("the broker goes on");
    world.stop().await;
}

#[tokio::test]
async fn each_call_has_its_own_largest_message() {
    let sets = [("limits.request_bytes", "2 MiB"), ("limits.admin_request_bytes", "100 KiB")];
    let mut world = World::with(&sets).await;
    let topic = world.create("orders", 1).await;
    let mut wire = Wire::to(&world).await;
    for (path, length) in [(PRODUCE, 3 << 20), (FETCH, 200 << 10), (LIST_OFFSETS, 200 << 10), (CREATE_TOPIC, 200 << 10)]
    {
        let mut call = wire.call(path).await;
        // Its length is enough to be refused.
        call.send([prefix(0, length).freeze(), Bytes::from(vec![0; 100])].concat());
        let error = call.end().await;
        let told = error.code == ErrorCode::MessageTooLarge || error.message.contains("OutOfRange");
        assert!(told, "{path}: {error:?}");
    }
    world.produce(&topic, 0, batch(&["x"])).await.expect("the broker goes on");
    world.stop().await;
}

#[tokio::test]
async fn messages_that_do_not_go_on_hold_bounded_room_for_a_bounded_time() {
    let sets =
        [("limits.request_bytes", "2 MiB"), ("limits.receiving_bytes", "4 MiB"), ("limits.message_timeout", "500ms")];
    let mut world = World::with(&sets).await;
    let topic = world.create("orders", 1).await;
    let mut wire = Wire::to(&world).await;
    let mut stalled = Vec::new();
    for _ in 0..16 {
        let mut call = wire.call(PRODUCE).await;
        call.send([prefix(0, 1_900_000).freeze(), Bytes::from(vec![0; 1_000])].concat());
        stalled.push(call);
    }
    // All room is theirs, so others wait; and it comes free, so they do not wait for ever.
    world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
    for call in stalled {
        let error = call.end().await;
        assert_eq!(error.code, ErrorCode::TimedOut, "{error:?}");
        assert!(error.message.contains("limits.message_timeout"), "{}", error.message);
    }
    world.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_within_a_message_takes_nothing_with_it() {
    let mut world = World::with(&[("limits.receiving_bytes", "32 MiB")]).await;
    let topic = world.create("orders", 1).await;
    for round in 0..20 {
        let mut wire = Wire::to(&world).await;
        let mut call = wire.call(PRODUCE).await;
        let whole = produce(&topic, 1, &["whole"]);
        let half = produce(&topic, 2, &["half"]);
        let cut = half.len() * (round + 1) / 21;
        call.send([whole.freeze(), half.freeze().slice(..cut)].concat());
        let mut fetch = wire.call(FETCH).await;
        let set = vec![position(0, &topic, 0, 0)];
        fetch.send(framed(&pb::FetchRequest { set, credit_bytes: 1 << 20, ..Default::default() }).freeze());
        // The whole one is answered; then the client is gone, in the middle of the other and of the fetch.
        let response = soon("an answer", call.response).await.expect("an answer");
        let mut answers = response.into_body();
        soon("an answer", answers.data()).await.expect("an answer").expect("an answer");
        wire.cut();
    }
    assert_eq!(world.values(&topic, 0, 0).await, ["whole"; 20]);
    until("what they held is free", async || {
        let (_, metrics) = get(world.broker.admin_addr, "/metrics").await;
        let free = metrics.contains("flowstone_in_flight_bytes 0\n") && metrics.contains("flowstone_connections 1\n");
        free.then_some(())
    })
    .await;
    // All of the room is there, and what is taken gives its own back: one stream passes more than all of it.
    let large = batch(&[&"x".repeat(1_000_000)]);
    let mut producer = world.producer().await;
    for _ in 0..40 {
        producer.send(&topic, 0, large.clone()).await;
        producer.answer().await.1.expect("stored");
    }
    for _ in 0..40 {
        producer.send(&topic, 9, large.clone()).await;
        producer.answer().await.1.expect_err("no such partition");
    }
    world.stop().await;
}

#[tokio::test]
async fn many_positions_cost_no_more_than_they_should() {
    let mut world = World::with(&[("limits.fetch_partitions", "1000")]).await;
    let topic = world.create("orders", 1).await;
    let mut fetcher = world.fetcher().await;
    let nowhere = |fetch_id: u32| position(fetch_id, &topic, 1_000, 0);
    let before = resident_bytes();
    // Errors that nobody reads: a new one for the same fetch id takes the old one's place.
    for _ in 0..200 {
        let set = (0..1_000).map(nowhere).collect();
        fetcher.send(pb::FetchRequest { set, ..Default::default() }).await;
    }
    tokio::time::timeout(Duration::from_secs(30), world.produce(&topic, 0, batch(&["x"])))
        .await
        .expect("others are served meanwhile")
        .expect("stored");
    let grown = resident_bytes() - before;
    assert!(grown < 32 << 20, "errors that nobody reads cost {grown} bytes");
    let set = (0..1_001).map(nowhere).collect();
    fetcher.send(pb::FetchRequest { set, ..Default::default() }).await;
    let end = loop {
        if let Err(error) = fetcher.response().await {
            break error;
        }
    };
    assert_eq!(end.code, ErrorCode::InvalidRequest, "{end:?}");
    assert!(end.message.contains("limits.fetch_partitions"), "{}", end.message);
    world.stop().await;
}
