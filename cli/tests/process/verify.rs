//! `flowstone verify`: clean where the cluster is, and not where it is not.

use crate::daemon::{Daemon, Setup};
use crate::running::{Running, flowstone};
use rustix::process::{Signal, kill_process};
use std::path::Path;
use std::time::{Duration, Instant};

/// Far beyond what anything here takes, whatever the machine.
const HANG: Duration = Duration::from_secs(120);

/// Waits until partition 0 of the topic ends at this offset or behind it; where it does.
#[track_caller]
fn wait_for_end(broker: &Daemon, topic: &str, at_least: i64) -> i64 {
    let began = Instant::now();
    loop {
        let described = broker.run(&["topic", "describe", topic, "-o", "json"]);
        if described.status.success() {
            let end = described.json()["partitions"][0]["high_watermark"].as_i64().expect("an offset");
            if end >= at_least {
                return end;
            }
        }
        assert!(began.elapsed() < HANG, "{topic} does not grow to {at_least}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A workload that goes on until it is interrupted.
fn endless(broker: &Daemon, topic: &str) -> Running {
    broker.begin(&["verify", "--for", "1h", "--topic", topic, "--partitions", "1", "-o", "json"])
}

fn interrupt(verify: &Running) {
    kill_process(verify.pid(), Signal::INT).expect("it runs");
}

#[test]
fn a_whole_cluster_is_clean_and_nothing_is_left() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    let report = broker.run(&["verify", "--for", "1s", "-o", "json"]).json();
    let keys: Vec<&str> = report.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(keys, ["acknowledged", "anomalies", "failed", "longest_gap_ms", "operations", "unknown"]);
    let number = |name: &str| report[name].as_u64().expect("a number");
    assert!(number("acknowledged") > 0, "{report}");
    assert_eq!(number("operations"), number("acknowledged") + number("failed") + number("unknown"));
    assert_eq!(report["anomalies"], serde_json::json!([]));
    assert_eq!(broker.run(&["topic", "list", "-o", "name"]).text(), "");
    // For people, and with the topic left there.
    let told = broker.run(&["verify", "--for", "200ms", "--keep", "--partitions", "2"]).text();
    assert!(told.contains("longest gap:") && told.contains("anomalies:"), "{told}");
    let kept = broker.run(&["topic", "list", "-o", "name"]).text();
    assert!(kept.starts_with("verify-"), "{kept}");
}

#[test]
fn kills_cost_time_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let mut broker = Daemon::start(&data);
    let server = broker.server.clone();
    let verify = endless(&broker, "checked");
    for _ in 0..2 {
        let end = wait_for_end(&broker, "checked", 1);
        wait_for_end(&broker, "checked", end + 300);
        broker.kill();
        broker = Setup::new(&data).at(&server).start();
    }
    let end = wait_for_end(&broker, "checked", 1);
    wait_for_end(&broker, "checked", end + 300);
    interrupt(&verify);
    let report = verify.end().json();
    assert_eq!(report["anomalies"], serde_json::json!([]));
    assert!(report["longest_gap_ms"].as_u64().expect("a number") > 0, "{report}");
}

#[test]
fn a_log_that_was_set_back_is_found() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (data, before) = (folder.path().join("data"), folder.path().join("before"));
    let mut broker = Daemon::start(&data);
    let server = broker.server.clone();
    let verify = endless(&broker, "checked");
    wait_for_end(&broker, "checked", 300);
    broker.kill();
    copy(&data, &before);
    broker = Setup::new(&data).at(&server).start();
    let end = wait_for_end(&broker, "checked", 1);
    wait_for_end(&broker, "checked", end + 500);
    broker.kill();
    std::fs::remove_dir_all(&data).expect("it is ours");
    std::fs::rename(&before, &data).expect("it is ours");
    broker = Setup::new(&data).at(&server).start();
    // What was acknowledged meanwhile is overwritten.
    wait_for_end(&broker, "checked", end + 300);
    interrupt(&verify);
    let ended = verify.end();
    let report: serde_json::Value = serde_json::from_slice(&ended.stdout).expect("json");
    let kinds: Vec<&str> =
        report["anomalies"].as_array().expect("a list").iter().filter_map(|found| found["kind"].as_str()).collect();
    for kind in ["inconsistent offsets", "regression"] {
        assert!(kinds.contains(&kind), "no {kind}: {report}");
    }
    let first = &report["anomalies"][0];
    assert_eq!((first["topic"].as_str(), first["partition"].as_i64()), (Some("checked"), Some(0)));
    assert!(first["offset"].is_i64() && first["detail"].is_string(), "{first}");
    ended.fails(1, &["broke its promises", "inconsistent offsets"]);
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy(&path, &name);
        } else {
            std::fs::copy(&path, &name).expect("copied");
        }
    }
}

#[test]
fn records_of_others_are_not_judged() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "shared", "-p", "2"]).ok();
    broker.feed(&["produce", "shared"], b"before\n").ok();
    let verify = broker.begin(&["verify", "--for", "1h", "--topic", "shared", "-o", "json"]);
    wait_for_end(&broker, "shared", 100);
    broker.feed(&["produce", "shared"], b"meanwhile\n").ok();
    interrupt(&verify);
    assert_eq!(verify.end().json()["anomalies"], serde_json::json!([]));
    assert_eq!(broker.run(&["topic", "list", "-o", "name"]).text(), "shared\n");
}

#[test]
fn a_second_interrupt_judges_at_once() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    let mut verify = endless(&broker, "checked");
    wait_for_end(&broker, "checked", 100);
    // Nothing heals any more.
    broker.kill();
    interrupt(&verify);
    // Until it is heard: a signal that is still under way swallows the next.
    let began = Instant::now();
    while verify.child.try_wait().expect("it is our child").is_none() {
        assert!(began.elapsed() < HANG, "it goes on");
        std::thread::sleep(Duration::from_millis(200));
        let _ = kill_process(verify.pid(), Signal::INT);
    }
    let report = verify.end().json();
    assert_eq!(report["anomalies"], serde_json::json!([]));
}

#[test]
fn what_cannot_be_verified_is_told() {
    let nowhere = ["--server", "127.0.0.1:1", "--timeout", "300ms"];
    for workload in ["log", "group", "transaction"] {
        let verify = ["verify", "--for", "1s", "--workload", workload];
        flowstone(&[&verify, &nowhere[..]].concat()).fails(4, &["flowstone dev"]);
    }
    flowstone(&[&["verify", "-o", "name"], &nowhere[..]].concat()).fails(2, &["-o table"]);
}
