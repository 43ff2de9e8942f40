//! Connections that are too many, too slow or idle, and disks without room.

use flowstone_protocol::{ErrorCode, pb};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::http::get;
use crate::world::*;

/// Whether the broker closed this connection.
async fn closed(socket: &mut TcpStream) -> bool {
    let mut buffer = [0; 1 << 10];
    loop {
        match soon("bytes or an end", socket.read(&mut buffer)).await {
            Ok(0) | Err(_) => return true,
            Ok(_) => {}
        }
    }
}

async fn metric(world: &World, name: &str) -> i64 {
    let (_, text) = get(world.broker.admin_addr, "/metrics").await;
    let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).expect(name);
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
}

#[tokio::test]
async fn more_connections_than_allowed_are_turned_away() {
    let mut world = World::with(&[("limits.connections_per_address", "2")]).await;
    // The world's own is the first.
    let second = TcpStream::connect(world.broker.client_addr).await.expect("connected");
    until("the second is counted", async || (metric(&world, "flowstone_connections").await == 2).then_some(())).await;
    let mut third = TcpStream::connect(world.broker.client_addr).await.expect("the system accepts");
    assert!(closed(&mut third).await);
    assert_eq!(metric(&world, "flowstone_connections_refused_total").await, 1);
    world.create("orders", 1).await;
    drop(second);
    until("there is a place again", async || (metric(&world, "flowstone_connections").await == 1).then_some(())).await;
    let mut again = pb::log_client::LogClient::new(channel(&world.broker).await);
    soon("served", again.metadata(pb::MetadataRequest::default())).await.expect("served");
    drop(again);
    world.stop().await;
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let world = World::with(&[("limits.handshake_timeout", "50ms"), ("limits.idle_timeout", "1h")]).await;
    for bytes in [&b""[..], b"PRI * HTTP/2.0\r\n"] {
        let mut silent = TcpStream::connect(world.broker.client_addr).await.expect("connected");
        silent.write_all(bytes).await.expect("sent");
        assert!(closed(&mut silent).await);
    }
    assert_eq!(metric(&world, "flowstone_connections_timed_out_total").await, 2);
    world.stop().await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_one_with_a_call_is_not() {
    let mut world = World::with(&[("limits.idle_timeout", "300ms"), ("limits.keepalive_interval", "50ms")]).await;
    let topic = world.create("orders", 1).await;
    // Its fetch waits for what is not there yet: a call that is open, however silent.
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 1, 1 << 20).await;
    let idle = channel(&world.broker).await;
    pb::log_client::LogClient::new(idle.clone()).metadata(pb::MetadataRequest::default()).await.expect("told");
    until("the idle one is closed", async || {
        (metric(&world, "flowstone_connections_timed_out_total").await == 1).then_some(())
    })
    .await;
    assert_eq!(metric(&world, "flowstone_connections").await, 1);
    world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
    assert!(!fetcher.response().await.expect("pushed").batches.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn what_is_no_http2_is_refused() {
    let mut world = World::new().await;
    let mut stranger = TcpStream::connect(world.broker.client_addr).await.expect("connected");
    stranger.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n and so on, and on, and on").await.expect("sent");
    assert!(closed(&mut stranger).await);
    world.create("orders", 1).await;
    world.stop().await;
}

#[tokio::test]
async fn topics_and_partitions_are_bounded() {
    let mut world =
        World::with(&[("limits.topics", "2"), ("limits.partitions_per_topic", "3"), ("limits.partitions", "5")]).await;
    assert_refused(world.create_with("a", 4, &[]).await, ErrorCode::InvalidPartitions, "limits.partitions_per_topic");
    world.create("a", 3).await;
    assert_refused(world.create_with("b", 3, &[]).await, ErrorCode::InvalidPartitions, "limits.partitions");
    world.create("b", 1).await;
    assert_refused(world.create_with("c", 1, &[]).await, ErrorCode::InvalidRequest, "limits.topics");
    world.stop().await;
}

#[tokio::test]
async fn a_fetch_stream_has_so_many_partitions() {
    let mut world = World::with(&[("limits.fetch_partitions", "2")]).await;
    let topic = world.create("orders", 3).await;
    let at = |partition: i32| position(partition as u32, &topic, partition, 0);
    // One after another, all at once, and one again and again.
    for requests in [vec![vec![at(0), at(1)], vec![at(2)]], vec![vec![at(0), at(1), at(2)]], vec![vec![at(0); 3]]] {
        let mut fetcher = world.fetcher().await;
        for set in requests {
            fetcher.send(pb::FetchRequest { set, ..Default::default() }).await;
        }
        let error = fetcher.response().await.expect_err("the stream ends");
        assert_eq!(error.code, ErrorCode::InvalidRequest);
        assert!(error.message.contains("limits.fetch_partitions"), "{}", error.message);
    }
    world.stop().await;
}

#[tokio::test]
async fn a_disk_without_room_refuses_writes_and_serves_reads() {
    // A floor that no disk reaches.
    let dir = World::new().await.stop().await;
    let mut world = World::at(dir, &[]).await;
    let topic = world.create("orders", 1).await;
    world.produce(&topic, 0, batch(&["before"])).await.expect("stored");
    let dir = world.stop().await;
    let mut world = World::at(dir, &[("storage.free_bytes_min", "1000 TiB")]).await;
    let refused = until("the disk is looked at", async || world.produce(&topic, 0, batch(&["x"])).await.err()).await;
    assert_eq!(refused.code, ErrorCode::DiskFull);
    assert!(refused.message.contains("storage.free_bytes_min"), "{}", refused.message);
    assert_eq!(world.values(&topic, 0, 1).await[0], "before");
    let mut world = World::at(world.stop().await, &[]).await;
    world.produce(&topic, 0, batch(&["after"])).await.expect("room again");
    world.stop().await;
}

#[tokio::test]
async fn one_call_asks_so_much_and_one_batch_holds_so_much() {
    let mut world = World::with(&[("limits.queries_per_request", "3"), ("limits.records_per_batch", "10")]).await;
    let topic = world.create_with("orders", 1, &[("compression.type", "uncompressed")]).await.expect("created");
    let query = pb::OffsetQuery { topic_id: topic.id.clone(), partition: 0, at: None };
    let request = pb::ListOffsetsRequest { queries: vec![query; 4], linearizable: false };
    let listed = world.log.list_offsets(request).await.map_err(|status| error_of(&status));
    assert_refused(listed, ErrorCode::InvalidRequest, "limits.queries_per_request");
    let request = pb::MetadataRequest { topics: vec!["orders".to_owned(); 4], include_internal: false };
    let told = world.log.metadata(request).await.map_err(|status| error_of(&status));
    assert_refused(told, ErrorCode::InvalidRequest, "limits.queries_per_request");
    let eleven = world.produce(&topic, 0, batch(&["x"; 11])).await;
    assert_refused(eleven, ErrorCode::BatchTooLarge, "10");
    // Small as it is sent, too large as this topic wants it stored.
    let compressed = flowstone_protocol::RecordBatchBuilder::new(flowstone_protocol::Compression::Zstd);
    let unfolds = build(compressed, &[&"x".repeat(2_000_000)], now());
    assert_refused(world.produce(&topic, 0, unfolds).await, ErrorCode::BatchTooLarge, "max");
    world.stop().await;
}
