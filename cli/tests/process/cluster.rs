//! A cluster as its users meet it: lines in and out while brokers die, and the commands that look after it.

use crate::daemon::Daemon;
use crate::dev_cluster::{DevCluster, runs, until};
use crate::running::{Running, flowstone};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};

const LINES: usize = 60_000;

fn line(number: usize) -> String {
    format!("{number:08} {}\n", "abcdefghijklmnopqrstuvwxyz".repeat(number % 4))
}

/// Puts all lines into `lines`; `hit` is called when some are acknowledged and most are not. Every line must be
/// acknowledged.
fn produce_while(cluster: &DevCluster, hit: impl FnOnce()) {
    let mut produce = cluster.begin(&["produce", "lines", "-o", "json", "--timeout", "100s"]);
    let mut stdin = produce.child.stdin.take().expect("stdin is piped");
    let mut acknowledged = BufReader::new(produce.child.stdout.take().expect("stdout is piped")).lines();
    let feeding = std::thread::spawn(move || {
        for number in 0..LINES {
            stdin.write_all(line(number).as_bytes()).expect("produce reads");
        }
    });
    let mut told = 0;
    while told < LINES / 10 {
        acknowledged.next().expect("acknowledgements come").expect("text");
        told += 1;
    }
    hit();
    told += acknowledged.map_while(Result::ok).count();
    feeding.join().expect("produce reads all");
    produce.end().ok();
    assert_eq!(told, LINES);
}

/// Every line is there once, and in each partition in the order in which it was sent.
fn all_there(cluster: &DevCluster) {
    let read = cluster.run(&["consume", "lines", "-e", "-f", r"%p %v\n", "--timeout", "60s"]).text();
    let mut last: BTreeMap<&str, usize> = BTreeMap::new();
    let mut there = vec![false; LINES];
    for text in read.lines() {
        let (partition, value) = text.split_once(' ').expect("partition and value");
        let number: usize = value.split(' ').next().and_then(|number| number.parse().ok()).expect("a number");
        assert_eq!(format!("{value}\n"), line(number));
        assert!(!std::mem::replace(&mut there[number], true), "line {number} is there twice");
        let before = last.insert(partition, number);
        assert!(before.is_none_or(|before| before < number), "{number} after {before:?} in partition {partition}");
    }
    let missing = there.iter().filter(|there| !**there).count();
    assert_eq!(missing, 0, "lines are missing");
}

#[test]
fn the_leader_is_killed_with_lines_under_way() {
    let cluster = DevCluster::start(3, None);
    cluster.run(&["topic", "create", "lines", "-p", "3"]).ok();
    let leader = cluster.leader("lines", 0);
    produce_while(&cluster, || cluster.signal(leader, Signal::KILL));
    all_there(&cluster);
    // Whoever asks is told what is wrong, and by what exit code.
    let health = cluster.run(&["cluster", "health", "-o", "json"]);
    assert_eq!(health.status.code(), Some(1));
    let (ended, messages) = cluster.end(Signal::TERM);
    ended.ok();
    assert!(messages.contains(&format!("broker {leader} (process")), "{messages}");
    assert!(messages.contains("starts it again"), "{messages}");
}

#[test]
fn the_leader_is_stopped_with_lines_under_way_and_goes_on() {
    let cluster = DevCluster::start(3, None);
    cluster.run(&["topic", "create", "lines", "-p", "3"]).ok();
    let leader = cluster.leader("lines", 0);
    produce_while(&cluster, || cluster.signal(leader, Signal::STOP));
    cluster.signal(leader, Signal::CONT);
    all_there(&cluster);
    cluster.healthy();
}

#[test]
fn all_are_killed_and_come_back_with_everything() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let cluster = DevCluster::start(3, Some(&data));
    cluster.run(&["topic", "create", "lines", "-p", "3"]).ok();
    produce_while(&cluster, || {});
    for broker in &cluster.brokers {
        cluster.signal(broker.id, Signal::KILL);
    }
    // With nobody left there is nothing to be done.
    let (ended, messages) = cluster.ends();
    ended.fails(1, &[]);
    assert!(messages.contains("all brokers ended") && messages.contains("--data-dir"), "{messages}");
    let cluster = DevCluster::start(3, Some(&data));
    all_there(&cluster);
    cluster.healthy();
    // One more may join later.
    drop(cluster);
    let cluster = DevCluster::start(4, Some(&data));
    let info = cluster.run(&["cluster", "info", "-o", "json"]).json();
    assert_eq!(info["brokers"].as_array().map(Vec::len), Some(4), "{info}");
    all_there(&cluster);
}

#[test]
fn brokers_end_with_the_process_that_started_them() {
    // Killed, without a chance to tell anybody.
    let cluster = DevCluster::start(3, None);
    let brokers = cluster.brokers.clone();
    let data = cluster.data.clone();
    assert!(brokers.iter().all(|broker| runs(broker.pid)));
    let (ended, _) = cluster.end(Signal::KILL);
    assert!(!ended.status.success());
    until("the brokers to end", || !brokers.iter().any(|broker| runs(broker.pid)));
    // Nobody was left to remove it.
    let _ = std::fs::remove_dir_all(data);
    // Asked, as Ctrl-C does.
    let cluster = DevCluster::start(2, None);
    let brokers = cluster.brokers.clone();
    let data = cluster.data.clone();
    cluster.run(&["topic", "create", "t"]).ok();
    let (ended, _) = cluster.end(Signal::INT);
    ended.ok();
    assert!(!brokers.iter().any(|broker| runs(broker.pid)));
    assert!(!std::fs::exists(data).expect("a path"));
}

#[test]
fn what_dev_refuses() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let one = folder.path().join("one");
    Daemon::start(&one).stop();
    let one = one.to_str().expect("text");
    flowstone(&["dev", "-n", "2", "--port", "0", "--data-dir", one]).fails(1, &[one, "one broker", "--data-dir"]);
    let several = folder.path().join("several");
    drop(DevCluster::start(2, Some(&several)));
    let several = several.to_str().expect("text");
    flowstone(&["dev", "--port", "0", "--data-dir", several]).fails(1, &[several, "several brokers", "-n"]);
    flowstone(&["dev", "-n", "3", "--port", "65400"]).fails(2, &["65400", "lower"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its address").port();
    // The peer port of the first broker.
    let first = (port - 1).to_string();
    flowstone(&["dev", "-n", "2", "--port", &first]).fails(1, &[&port.to_string(), "in use", "--port"]);
}

#[test]
fn commands_that_look_after_a_cluster() {
    let cluster = DevCluster::start(3, None);
    cluster.run(&["topic", "create", "t", "-p", "2"]).ok();
    cluster.feed(&["produce", "t"], b"one\ntwo\nthree\n").ok();
    cluster.healthy();
    let health = cluster.run(&["cluster", "health", "-o", "json"]).json();
    assert_eq!((health["under_replicated"].as_i64(), health["leaderless"].as_i64()), (Some(0), Some(0)), "{health}");
    assert_eq!(health["brokers"].as_array().map(Vec::len), Some(3));
    let brokers = cluster.run(&["broker-admin", "list", "-o", "json"]).json();
    for broker in brokers.as_array().expect("a list") {
        assert_eq!((broker["state"].as_str(), broker["draining"].as_bool()), (Some("alive"), Some(false)), "{broker}");
    }
    let table = cluster.run(&["broker-admin", "list"]).text();
    assert!(table.starts_with("BROKER  STATE"), "{table}");
    let partitions = cluster.run(&["partition", "list", "t", "-o", "json"]).json();
    for partition in partitions.as_array().expect("a list") {
        assert_eq!(partition["replicas"].as_array().map(Vec::len), Some(3), "{partition}");
        assert_eq!(partition["in_sync"].as_array().map(Vec::len), Some(3), "{partition}");
    }
    assert_eq!(cluster.run(&["partition", "list", "-o", "name"]).text(), "t/0\nt/1\n");
    // A leadership moves, to whom it is told.
    let leader = cluster.leader("t", 0);
    let other = leader % 3 + 1;
    cluster.run(&["partition", "transfer-leader", "t", "0", "--to", &other.to_string()]).ok();
    assert_eq!(cluster.leader("t", 0), other);
    // Fewer replicas, and back to as many.
    let to = format!("{leader},{other}");
    let moved = cluster.run(&["partition", "move", "t", "1", "--to", &to, "-o", "json"]).json();
    assert_eq!(moved[0]["to"].as_array().map(Vec::len), Some(2), "{moved}");
    assert_eq!(cluster.run(&["partition", "list", "--moving", "-o", "json"]).json(), serde_json::json!([]));
    let listed = cluster.run(&["partition", "list", "t", "-o", "json"]).json();
    assert_eq!(listed[1]["replicas"], serde_json::json!([leader, other]));
    cluster.run(&["partition", "move", "t", "1", "--to", "1,2,3"]).ok();
    cluster.run(&["partition", "rebalance", "--dry-run"]).ok();
    cluster.run(&["partition", "rebalance", "--yes"]).ok();
    let mut read: Vec<String> = cluster.run(&["consume", "t", "-e"]).text().lines().map(str::to_owned).collect();
    read.sort();
    assert_eq!(read, ["one", "three", "two"]);
    // Mistakes, each with its exit code and what to do.
    cluster.run(&["broker-admin", "drain", "9"]).fails(3, &["no broker 9", "1,2,3"]);
    cluster.run(&["broker-admin", "drain", "1"]).fails(1, &["no other broker"]);
    cluster.run(&["broker-admin", "decommission", "1"]).fails(1, &["drain 1"]);
    cluster.run(&["broker-admin", "replace", "1", "2"]).fails(1, &["alive"]);
    cluster.run(&["partition", "move", "t", "0", "--to", "1,9"]).fails(1, &["no broker 9"]);
    cluster.run(&["partition", "move", "t", "7", "--to", "1"]).fails(3, &["partition"]);
    cluster.run(&["partition", "move", "nowhere", "0", "--to", "1"]).fails(3, &["nowhere"]);
    cluster.run(&["partition", "cancel-move", "t", "0"]).fails(1, &["not being moved"]);
    cluster.run(&["partition", "recover", "t", "0", "--from", "1"]).fails(1, &["majority", "cluster health"]);
    cluster.run(&["topic", "create", "u", "-r", "4"]).fails(2, &["4"]);
    // Any broker answers for all; each alone knows where the others are.
    for broker in &cluster.brokers {
        let server = broker.client.as_str();
        let described = Running::start(&["topic", "describe", "t", "-o", "json", "--server", server]).end().json();
        assert_eq!(described["partitions"].as_array().map(Vec::len), Some(2));
        let read = Running::start(&["consume", "t", "-e", "--server", server]).end().text();
        assert_eq!(read.lines().count(), 3);
    }
}

#[test]
fn a_broker_is_drained_and_forgotten_while_lines_go_in() {
    let cluster = DevCluster::start(4, None);
    cluster.run(&["topic", "create", "lines", "-p", "6"]).ok();
    cluster.healthy();
    let planned = cluster.run(&["broker-admin", "drain", "1", "--dry-run", "-o", "json"]).json();
    assert!(!planned.as_array().expect("a list").is_empty());
    produce_while(&cluster, || {
        cluster.run(&["broker-admin", "drain", "1", "--yes"]).ok();
    });
    let listed = cluster.run(&["partition", "list", "--internal", "-o", "json"]).json();
    for partition in listed.as_array().expect("a list") {
        let replicas = partition["replicas"].as_array().expect("a list");
        assert!(
            !replicas.contains(&serde_json::json!(1)) && partition["leaving"] == serde_json::json!([]),
            "{partition}"
        );
    }
    cluster.run(&["broker-admin", "decommission", "1", "--yes"]).ok();
    let brokers = cluster.run(&["broker-admin", "list", "-o", "name"]).text();
    assert_eq!(brokers, "2\n3\n4\n");
    all_there(&cluster);
    cluster.healthy();
}
