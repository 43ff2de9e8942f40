//! Probes and metrics.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::*;

/// Status and body of a GET.
pub(crate) async fn get(address: std::net::SocketAddr, path: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).await.expect("the admin listener");
    let request = format!("GET {path} HTTP/1.1\r\nhost: broker\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut response = String::new();
    soon("a response", socket.read_to_string(&mut response)).await.expect("text");
    let (head, body) = response.split_once("\r\n\r\n").expect("a response");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, body.to_owned())
}

#[tokio::test]
async fn probes_and_metrics() {
    let mut world = World::with(&[("limits.metrics_partitions", "2")]).await;
    let topic = world.create("orders", 3).await;
    world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
    world.produce(&topic, 9, batch(&["x"])).await.expect_err("no such partition");
    world.values(&topic, 0, 0).await;
    let admin = world.broker.admin_addr;
    assert_eq!(get(admin, "/livez").await, (200, "ok\n".to_owned()));
    assert_eq!(get(admin, "/readyz").await, (200, "ready\n".to_owned()));
    assert_eq!(get(admin, "/nowhere").await.0, 404);
    let (status, text) = get(admin, "/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "flowstone_requests_total{api=\"Produce\"} 2",
        "flowstone_request_errors_total{api=\"Produce\",code=\"UNKNOWN_PARTITION\"} 1",
        "flowstone_request_latency_seconds_count{api=\"Produce\"} 1",
        "flowstone_flush_latency_seconds_bucket{le=\"+Inf\"} ",
        "flowstone_requests_waiting ",
        "flowstone_topics 1",
        "flowstone_replicas 4",
        "flowstone_partitions_leaderless 0",
        "flowstone_connections ",
        "flowstone_disk_free_bytes ",
        "flowstone_process_resident_bytes ",
        "flowstone_process_cpu_seconds_total ",
        "flowstone_partitions_quarantined 0",
        "flowstone_replicas_set_aside 0",
        "flowstone_peer_messages_waiting 0",
    ] {
        assert!(text.contains(line), "wanted `{line}` in:\n{text}");
    }
    // What was answered gives its room back, a moment after the answer.
    until("the room is given back", async || {
        get(admin, "/metrics").await.1.contains("flowstone_in_flight_bytes 0\n").then_some(())
    })
    .await;
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).expect(name);
        line.parse::<f64>().expect("a number")
    };
    assert!(value("flowstone_process_threads") > 1.0);
    assert!(value("flowstone_process_open_files") < value("flowstone_process_open_files_max"));
    assert!(value("flowstone_disk_free_bytes") <= value("flowstone_disk_bytes"));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs_f64();
    let started = value("flowstone_process_start_time_seconds");
    assert!(now - started > -5.0 && now - started < 86_400.0, "started {started}, now {now}");
    assert!(value("flowstone_received_bytes_total{api=\"Admin\"}") > 0.0);
    assert!(value("flowstone_sent_bytes_total{api=\"Admin\"}") > 0.0);
    // Two partitions have series of their own, whatever the number of partitions.
    assert_eq!(text.matches("flowstone_partition_high_watermark{").count(), 2, "{text}");
    assert!(text.ends_with("# EOF\n"));
    // Every family is named once, as its readers demand.
    let families: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
    let distinct: std::collections::HashSet<&&str> = families.iter().collect();
    assert_eq!(families.len(), distinct.len(), "{families:?}");
    world.stop().await;
}

#[tokio::test]
async fn a_reader_at_the_end_is_counted_until_it_leaves() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let admin = world.broker.admin_addr;
    let parked = async |count: &str| {
        let line = format!("flowstone_reads_parked {count}\n");
        get(admin, "/metrics").await.1.contains(&line).then_some(())
    };
    let mut fetcher = world.fetcher().await;
    fetcher.set(1, &topic, 0, 0, 1 << 20).await;
    until("a reader that waits", async || parked("1").await).await;
    // It is given what comes, and waits again.
    world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
    fetcher.response().await.expect("pushed");
    until("it waits again", async || parked("1").await).await;
    drop(fetcher);
    // Whoever left is forgotten when the partition is looked at next.
    until("nobody waits", async || {
        world.produce(&topic, 0, batch(&["y"])).await.expect("stored");
        parked("0").await
    })
    .await;
    world.stop().await;
}
