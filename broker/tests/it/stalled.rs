//! Clients that stop reading, and producers that outrun the disk: memory stays bounded.

use flowstone_protocol::pb;

use crate::world::*;

pub(crate) fn resident_bytes() -> i64 {
    let pages = std::fs::read_to_string("/proc/self/statm").expect("readable");
    // Shared pages (the logs' maps) are the page cache's: third field.
    let fields: Vec<i64> = pages.split_whitespace().map(|field| field.parse().expect("a number")).collect();
    (fields[1] - fields[2]) * 4096
}

#[tokio::test]
async fn readers_that_stop_cost_bounded_memory() {
    let mut world = World::with(&[("limits.connections_per_address", "100")]).await;
    let topic = world.create("orders", 4).await;
    let value = "x".repeat(500_000);
    for number in 0..80 {
        world.produce(&topic, number % 4, batch(&[&value])).await.expect("stored");
    }
    let before = resident_bytes();
    // Each asks for everything and takes nothing: 40 MB each, if it were held for them.
    let mut stalled = Vec::new();
    for _ in 0..16 {
        let channel = channel(&world.broker).await;
        let mut log = pb::log_client::LogClient::new(channel);
        let (requests, receiver) = tokio::sync::mpsc::channel(1);
        let set = (0..4).map(|partition| position(partition as u32, &topic, partition, 0)).collect();
        requests.send(pb::FetchRequest { set, credit_bytes: 64 << 20, ..Default::default() }).await.expect("room");
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        stalled.push((log.fetch(stream).await.expect("a stream"), requests));
    }
    // Everyone else goes on meanwhile, and long enough for the stalled ones to be filled up.
    for number in 0..80 {
        world.produce(&topic, number % 4, batch(&[&value])).await.expect("stored");
    }
    assert_eq!(world.values(&topic, 0, 0).await.len(), 40);
    let grown = resident_bytes() - before;
    assert!(grown < 16 * (4 << 20), "16 stalled readers cost {grown} bytes");
    // And nothing was read for them beyond what waits for them: about 1 MiB each, and what is on its way to them.
    let (_, metrics) = crate::http::get(world.broker.admin_addr, "/metrics").await;
    let line =
        metrics.lines().find(|line| line.starts_with("flowstone_sent_bytes_total{api=\"Fetch\"}")).expect("counted");
    let read: usize = line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number");
    assert!(read < 16 * (4 << 20) + 40 * 600_000, "{read} bytes were read for 16 stalled readers and one that reads");
    drop(stalled);
    world.stop().await;
}

#[tokio::test]
async fn a_producer_that_takes_no_answers_is_not_read_from() {
    let mut world = World::with(&[("limits.stream_window_bytes", "100 KiB")]).await;
    let topic = world.create("orders", 1).await;
    let mut producer = world.producer().await;
    let tiny = batch(&["x"]);
    // As many as it takes, as long as they are taken.
    let (mut sent, mut taken_at) = (0u64, std::time::Instant::now());
    while taken_at.elapsed() < std::time::Duration::from_secs(1) {
        if producer.try_send(&topic, 0, tiny.clone()) {
            (sent, taken_at) = (sent + 1, std::time::Instant::now());
        } else {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert!(sent < 1_000_000, "a million requests were read of a client that reads no answer");
    }
    // Nothing of it is lost: it was told to wait, and goes on when it reads.
    for _ in 0..sent {
        producer.answer().await.1.expect("stored");
    }
    assert_eq!(world.offset(&topic, 0, End).await.expect("listed").records, sent);
    world.stop().await;
}

#[tokio::test]
async fn producers_that_outrun_the_shard_wait() {
    let mut world = World::with(&[("storage.in_flight_bytes_max", "4 MiB")]).await;
    let topic = world.create("orders", 1).await;
    let batch = batch(&[&"x".repeat(900_000)]);
    let mut producer = world.producer().await;
    for _ in 0..200 {
        producer.send(&topic, 0, batch.clone()).await;
    }
    for _ in 0..200 {
        producer.answer().await.1.expect("stored");
    }
    let (_, metrics) = crate::http::get(world.broker.admin_addr, "/metrics").await;
    let waits = metrics.lines().find_map(|line| line.strip_prefix("flowstone_produce_waits_total ")).expect("counted");
    assert!(waits.parse::<u64>().expect("a number") > 0, "nobody waited");
    world.stop().await;
}
