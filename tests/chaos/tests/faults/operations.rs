//! Clusters that grow, shrink and are repaired, while they are written and read.

use crate::{all_is_well, alone, three};
use flowstone_chaos::{Cluster, HANG, Setup, Workload};
use std::path::Path;
use std::time::{Duration, Instant};

#[test]
fn a_broker_is_added_and_another_is_drained_and_decommissioned() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    cluster.ok(&["topic", "create", "held", "-p", "6", "-r", "3"]).expect("a topic");
    cluster
        .ok(&["bench", "produce", "--topic", "held", "--records", "20000", "--size", "1000"])
        .expect("some megabytes to move");
    let began = Instant::now();
    cluster.add(4).expect("a folder");
    cluster.start_all().expect("it joins");
    let mut rounds = 0;
    while !plan_of(&cluster).is_empty() {
        cluster.eventually(&["partition", "rebalance", "--yes", "--timeout", "60s"]).expect("partitions move to it");
        rounds += 1;
        assert!(rounds < 20, "it does not come to an end: {:?}", plan_of(&cluster));
    }
    assert!(rounds > 0, "there was something to move");
    // It votes on the metadata, too.
    cluster
        .ok(&["broker-admin", "drain", "1", "--yes", "--timeout", "60s"])
        .expect("the fourth has room for its replicas");
    cluster.ok(&["broker-admin", "decommission", "1", "--yes"]).expect("it holds nothing any more");
    let pulled: f64 = (2..=4).map(|id| cluster.broker(id).metric("flowstone_pulled_bytes_total").expect("asked")).sum();
    eprintln!("a fourth broker took over from the first in {:?}, {:.1} MB copied", began.elapsed(), pulled / 1e6);
    workload.goes_on(&cluster).expect("it goes on");
    cluster.broker(1).kill().expect("it runs");
    cluster.remove(1);
    // What is left is a whole cluster: it bears another loss.
    cluster.broker(2).kill().expect("it runs");
    workload.goes_on(&cluster).expect("two are a majority");
    cluster.start_all().expect("it comes back");
    all_is_well(&cluster, workload);
}

/// What evening out would move.
fn plan_of(cluster: &Cluster) -> Vec<serde_json::Value> {
    let plan = cluster.json(&["partition", "rebalance", "--dry-run"]).expect("asked");
    plan["moves"].as_array().cloned().unwrap_or_default()
}

#[test]
fn a_dead_broker_is_replaced_by_a_new_one() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    cluster.broker(3).kill().expect("it runs");
    cluster.remove(3);
    cluster.add(4).expect("a folder");
    cluster.start_all().expect("it joins");
    workload.goes_on(&cluster).expect("it goes on");
    cluster.eventually(&["broker-admin", "replace", "3", "4", "--yes", "--timeout", "60s"]).expect("it gets all of it");
    cluster.ok(&["broker-admin", "decommission", "3", "--yes"]).expect("it holds nothing any more");
    all_is_well(&cluster, workload);
}

#[test]
fn the_last_place_of_a_replica_is_not_drained() {
    let _alone = alone();
    let cluster = Setup::new(3).start().expect("three brokers form a cluster");
    cluster.ok(&["topic", "create", "everywhere", "-r", "3"]).expect("a topic");
    let refused = cluster.ok(&["broker-admin", "drain", "2", "--yes"]).expect_err("there is no fourth").to_string();
    assert!(refused.contains("exit status: 1") && refused.contains("no other broker"), "{refused}");
}

#[test]
fn a_broker_moves_to_another_address() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    cluster.broker(3).kill().expect("it runs");
    cluster.broker(3).move_house().expect("ports");
    cluster.start_all().expect("the others learn where it is");
    cluster.wait_healthy().expect("it catches up");
    cluster.broker(1).kill().expect("it runs");
    workload.goes_on(&cluster).expect("two are a majority");
    cluster.start_all().expect("it comes back");
    all_is_well(&cluster, workload);
}

#[test]
fn a_broker_is_killed_while_it_gets_everything_anew() {
    let _alone = alone();
    let mut cluster = Setup::new(3).prepare().expect("three brokers");
    cluster.broker(2).set("limits.pull_bytes_per_second=1 MiB");
    cluster.start_all().expect("three brokers form a cluster");
    cluster.ok(&["topic", "create", "checked", "-p", "3"]).expect("a topic");
    cluster
        .ok(&["bench", "produce", "--topic", "checked", "--records", "60000", "--size", "200"])
        .expect("some megabytes to pull");
    let workload = Workload::start(&cluster, "checked", 3, &[]).expect("records in, records out");
    cluster.broker(2).kill().expect("it runs");
    cluster.broker(2).wipe().expect("it is killed");
    for _ in 0..2 {
        cluster.start(2).expect("the binary starts");
        wait_until_pulling(&mut cluster, 2);
        cluster.broker(2).kill().expect("it runs");
    }
    cluster.start_all().expect("it goes on where it was");
    all_is_well(&cluster, workload);
}

/// Waits until a broker has begun to get a replica anew.
fn wait_until_pulling(cluster: &mut Cluster, id: i32) {
    let began = Instant::now();
    while !holds_incoming(cluster.broker(id).data_dir()) {
        assert!(cluster.broker(id).is_running() && began.elapsed() < HANG, "broker {id} pulls nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn holds_incoming(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    entries.flatten().map(|entry| entry.path()).any(|path| {
        path.is_dir() && (path.extension().is_some_and(|extension| extension == "incoming") || holds_incoming(&path))
    })
}

#[test]
fn of_the_metadata_s_voters_only_one_is_left() {
    let _alone = alone();
    let mut cluster = Setup::new(3).start().expect("three brokers form a cluster");
    cluster.ok(&["topic", "create", "kept", "-p", "1"]).expect("a topic");
    cluster.ok(&["produce", "kept", "/etc/hosts"]).expect("some lines");
    cluster.wait_healthy().expect("every copy is whole");
    for lost in [1, 2] {
        cluster.broker(lost).kill().expect("it runs");
        cluster.remove(lost);
    }
    let recover = |topic: &str| ["partition", "recover", topic, "0", "--from", "3", "--yes"].map(str::to_owned);
    for topic in ["__cluster_metadata", "kept"] {
        let arguments = recover(topic);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        cluster.eventually(&arguments).expect("what is left goes on, loudly");
    }
    let lines = cluster.eventually(&["consume", "kept", "-e"]).expect("it can be read");
    let hosts = std::fs::read_to_string("/etc/hosts").expect("every machine has it");
    assert_eq!(lines.trim_end(), hosts.trim_end());
    cluster.eventually(&["produce", "kept", "/etc/hosts", "--timeout", "2s"]).expect("it can be written");
}
