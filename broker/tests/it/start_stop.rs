//! What keeps a broker from starting, and how it stops.

use std::time::Duration;

use flowstone_broker::{Broker, StartError};
use flowstone_protocol::{ErrorCode, pb};

use crate::http::get;
use crate::world::*;

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let mut world = World::new().await;
    let topic = world.create("orders", 3).await;
    for partition in 0..3 {
        world.produce(&topic, partition, batch(&["a", "b"])).await.expect("stored");
    }
    let cluster = world.broker.cluster_id;
    for _ in 0..3 {
        world = world.restart().await;
        assert_eq!(world.broker.cluster_id, cluster);
        for partition in 0..3 {
            assert_eq!(world.values(&topic, partition, 0).await, ["a", "b"]);
        }
    }
    world.stop().await;
}

#[tokio::test]
async fn folders_of_deleted_replicas_are_removed_at_the_next_start() {
    let mut world = World::new().await;
    let topic = world.create("orders", 2).await;
    world.produce(&topic, 1, batch(&["x"])).await.expect("stored");
    let dir = world.stop().await;
    // As a crash in the middle of a deletion leaves it.
    let topics = dir.path().join("data/topics");
    let stranger = topics.join("00000000-0000-0000-0000-00000000beef").join("0");
    std::fs::create_dir_all(&stranger).expect("made");
    std::fs::write(stranger.join("00000000000000000000-00000000000000000002.log"), b"").expect("written");
    let mut world = World::at(dir, &[]).await;
    assert!(!stranger.exists());
    assert_eq!(world.values(&topic, 1, 0).await, ["x"]);
    world.stop().await;
}

#[tokio::test]
async fn a_port_in_use() {
    let world = World::new().await;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut config = config(&dir, &[]);
    config.listen.client = world.broker.client_addr.to_string();
    let error = Broker::start(config).await.expect_err("refused");
    assert!(matches!(error, StartError::Bind { listener: "client", .. }), "{error:?}");
    assert!(error.to_string().contains("another process has this port"), "{error}");
    world.stop().await;
}

#[tokio::test]
async fn a_directory_that_another_broker_has() {
    let world = World::new().await;
    let error = Broker::start(config(&world.dir, &[])).await.expect_err("refused");
    assert!(matches!(error, StartError::DataDir { .. }), "{error:?}");
    assert!(error.to_string().contains("in use by another"), "{error}");
    world.stop().await;
}

#[tokio::test]
async fn a_directory_that_cannot_be_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    // A file stands where the directory should be: refused to root, too.
    std::fs::write(dir.path().join("data"), b"").expect("written");
    let error = Broker::start(config(&dir, &[])).await.expect_err("refused");
    assert!(matches!(error, StartError::DataDir { .. }), "{error:?}");
    assert!(error.to_string().contains("data"), "{error}");
}

#[tokio::test]
async fn a_directory_keeps_its_node_id() {
    let dir = World::new().await.stop().await;
    let started = soon("start", Broker::start(config(&dir, &[("node.id", "2")]))).await;
    let error = started.expect_err("it is another broker's").to_string();
    assert!(error.contains("is broker 1's") && error.contains("node.id = 1"), "{error}");
    World::at(dir, &[]).await.stop().await;
}

#[tokio::test]
async fn shutting_down_answers_what_is_under_way_and_ends_streams() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let mut producer = world.producer().await;
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 1, 64 << 20).await;
    let mut watch = world.log.watch_metadata(pb::WatchMetadataRequest::default()).await.expect("told").into_inner();
    watch.message().await.expect("told").expect("everything once");
    // Large ones, so that some are still under way when the end begins.
    let large = batch(&[&"x".repeat(500_000)]);
    for _ in 0..60 {
        producer.send(&topic, 0, large.clone()).await;
    }
    producer.answer().await.1.expect("stored");
    // A call that goes on keeps the broker from its end for as long as this looks at it.
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel(&world.broker).await);
    let request = tonic_health::pb::HealthCheckRequest { service: "flowstone.v1.Log".to_owned() };
    let mut health_watch = health.watch(request).await.expect("a stream").into_inner();
    health_watch.message().await.expect("told").expect("a status");
    let admin = world.broker.admin_addr;
    let World { broker, dir, log, admin: admin_client, .. } = world;
    drop((log, admin_client));
    let stopping = tokio::spawn(broker.shutdown(PATIENCE));
    // Whatever was taken is answered; the rest was never taken, and the stream says why it ends.
    let mut acknowledged = 1;
    let error = loop {
        match producer.result().await {
            Ok(Some(result)) if result.error.is_none() => acknowledged += 1,
            Ok(Some(result)) => panic!("refused in the middle: {result:?}"),
            Ok(None) => panic!("a stream that ends without a word"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code, ErrorCode::ShuttingDown, "{error:?}");
    let (_, metrics) = get(admin, "/metrics").await;
    assert!(
        metrics.contains(&format!("flowstone_requests_total{{api=\"Produce\"}} {acknowledged}\n")),
        "{acknowledged} answered, and:\n{metrics}"
    );
    let status = health_watch.message().await.expect("told").expect("a status").status();
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::NotServing);
    drop((health_watch, health));
    let fetched = loop {
        if let Err(error) = fetcher.response().await {
            break error;
        }
    };
    assert_eq!(fetched.code, ErrorCode::ShuttingDown, "{fetched:?}");
    let watched = error_of(&watch.message().await.expect_err("the watch ends"));
    assert_eq!(watched.code, ErrorCode::ShuttingDown, "{watched:?}");
    let report = soon("the end", stopping).await.expect("no panic");
    assert!(report.drained);
    assert!(tokio::net::TcpStream::connect(admin).await.is_err(), "nothing listens any more");

    let mut world = World::at(dir, &[]).await;
    let stored = world.values(&topic, 0, 0).await.len();
    assert!(stored >= acknowledged, "{stored} of {acknowledged} acknowledged");
    world.stop().await;
}

#[tokio::test]
async fn a_call_that_does_not_end_is_cut_off() {
    let mut world = World::new().await;
    // A health watch is told and goes on for ever.
    let channel = channel(&world.broker).await;
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest { service: "flowstone.v1.Log".to_owned() };
    let mut health = client.watch(request).await.expect("a stream").into_inner();
    let serving = health.message().await.expect("told").expect("a status").status();
    assert_eq!(serving, tonic_health::pb::health_check_response::ServingStatus::Serving);
    let topic = world.create("orders", 1).await;
    world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
    let World { broker, dir, log, admin, .. } = world;
    drop((log, admin));
    let report = soon("the end", broker.shutdown(Duration::from_millis(100))).await;
    assert!(!report.drained);
    // Cut off, not left hanging.
    while let Ok(Some(_)) = soon("the end of the call", health.message()).await {}
    let mut world = World::at(dir, &[]).await;
    assert_eq!(world.values(&topic, 0, 0).await, ["x"]);
    world.stop().await;
}

#[tokio::test]
async fn a_fetch_whose_client_sends_no_more_does_not_hold_up_the_end() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 0, 1 << 20).await;
    fetcher.response().await.expect("the term's first entry");
    let Fetcher { requests, answers } = fetcher;
    // Half closed, with credit left: what is written is still pushed.
    drop(requests);
    world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
    let (requests, _) = tokio::sync::mpsc::channel(1);
    let mut fetcher = Fetcher { requests, answers };
    assert_eq!(records(&fetcher.response().await.expect("pushed").batches, 0)[0].1, "x");
    let World { broker, log, admin, dir, .. } = world;
    drop((log, admin));
    let stopping = tokio::spawn(broker.shutdown(PATIENCE));
    assert_eq!(fetcher.response().await.expect_err("it ends").code, ErrorCode::ShuttingDown);
    assert!(soon("the end", stopping).await.expect("no panic").drained);
    drop(dir);
}

#[tokio::test]
async fn draining_is_not_ready() {
    let mut world = World::new().await;
    let channel = channel(&world.broker).await;
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest { service: String::new() };
    let mut health = client.watch(request).await.expect("a stream").into_inner();
    health.message().await.expect("told").expect("a status");
    world.create("orders", 1).await;
    let admin = world.broker.admin_addr;
    let World { broker, dir, log, admin: admin_client, .. } = world;
    drop((log, admin_client));
    let stopping = tokio::spawn(broker.shutdown(PATIENCE));
    until("draining is told", async || {
        let (status, text) = get(admin, "/readyz").await;
        (status == 503 && text.contains("draining")).then_some(())
    })
    .await;
    assert_eq!(get(admin, "/livez").await.0, 200);
    // The call that held it up ends.
    drop((health, client));
    soon("the end", stopping).await.expect("no panic");
    drop(dir);
}

#[tokio::test]
async fn a_broker_that_is_dropped_loses_nothing() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
    let World { broker, dir, log, admin, .. } = world;
    drop((log, admin, broker));
    let broker = until("the directory is free", async || match Broker::start(config(&dir, &[])).await {
        Ok(broker) => Some(broker),
        Err(StartError::DataDir { .. }) => None,
        Err(error) => panic!("{error}"),
    })
    .await;
    let mut log = pb::log_client::LogClient::new(channel(&broker).await);
    let metadata = log.metadata(pb::MetadataRequest::default()).await.expect("told").into_inner();
    assert_eq!(metadata.topics[0].topic_id, topic.id);
    drop(log);
    broker.shutdown(PATIENCE).await;
}
