//! The commands that are not about records, and how everything prints.

use crate::daemon::Daemon;
use crate::running::{FLOWSTONE, Running, flowstone};
use rustix::process::{Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::process::Command;

#[test]
fn the_version_names_the_commit() {
    let version = flowstone(&["--version"]).text();
    let (name, rest) = version.trim().split_once(' ').expect("name and version");
    let (number, commit) = rest.split_once(" (").expect("version and commit");
    assert_eq!((name, number), ("flowstone", env!("CARGO_PKG_VERSION")));
    let commit = commit.strip_suffix(')').expect("a bracket");
    assert!(commit == "unknown" || commit.len() >= 7 && commit.chars().all(|c| c.is_ascii_hexdigit()), "{commit}");
}

#[test]
fn dev_prints_its_address_and_three_commands_that_work() {
    let mut command = Command::new(FLOWSTONE);
    command.args(["dev", "--port", "0"]).env_remove("FLOWSTONE_SERVER");
    let mut dev = Running::spawn(command);
    let mut lines = BufReader::new(dev.child.stdout.take().expect("stdout is piped")).lines();
    let mut greeting = Vec::new();
    while greeting.last().is_none_or(|line: &String| !line.contains("Ctrl-C")) {
        greeting.push(lines.next().expect("it greets").expect("text"));
    }
    let greeting = greeting.join("\n");
    let data = greeting.lines().find_map(|line| line.trim().strip_prefix("data ")).expect("a folder");
    let data = data.trim().split(' ').next().expect("a folder");
    assert!(std::fs::exists(data).expect("a path"));
    let commands: Vec<_> = greeting.lines().map(str::trim).filter(|line| line.starts_with(FLOWSTONE)).collect();
    assert_eq!(commands.len(), 3, "{greeting}");
    let mut printed = Vec::new();
    for line in commands {
        let mut shell = Command::new("sh");
        shell.args(["-c", line]);
        printed = Running::spawn(shell).end().ok();
    }
    let hosts = std::fs::read("/etc/hosts").expect("every machine has it");
    assert_eq!(String::from_utf8_lossy(&printed).trim_end(), String::from_utf8_lossy(&hosts).trim_end());
    // Ctrl-C stops it cleanly, and its temporary folder goes.
    kill_process(dev.pid(), Signal::INT).expect("it runs");
    dev.end().ok();
    assert!(!std::fs::exists(data).expect("a path"));
}

#[test]
fn dev_keeps_data_where_it_is_told_to() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("kept");
    for expected in ["", "line\n"] {
        let mut command = Command::new(FLOWSTONE);
        command.args(["dev", "--port", "0", "--data-dir"]).arg(&data).env_remove("FLOWSTONE_SERVER");
        let mut dev = Running::spawn(command);
        let mut lines = BufReader::new(dev.child.stdout.take().expect("stdout is piped")).lines();
        let server = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.trim().strip_prefix("clients ").map(|server| server.trim().to_owned()))
            .expect("an address");
        let server = ["--server", &server];
        let run = |arguments: &[&str]| flowstone(&[arguments, &server].concat());
        if expected.is_empty() {
            run(&["topic", "create", "t"]).ok();
        }
        assert_eq!(run(&["consume", "t", "-e"]).text(), expected);
        Running::start(&[&["produce", "t"], &server[..]].concat()).with_input(b"line\n").ok();
        kill_process(dev.pid(), Signal::TERM).expect("it runs");
        dev.end().ok();
    }
}

#[test]
fn the_life_of_a_topic() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    assert_eq!(broker.run(&["topic", "list", "-o", "json"]).json(), serde_json::json!([]));
    broker.run(&["topic", "create", "checked", "--dry-run"]).ok();
    let made = broker.run(&["topic", "create", "orders", "-p", "2", "-c", "retention.ms=1000000", "-o", "json"]).json();
    assert_eq!((made["name"].as_str(), made["partitions"].as_array().map(Vec::len)), (Some("orders"), Some(2)));
    broker.run(&["topic", "create", "bills"]).ok();

    // Every form.
    let list = broker.run(&["topic", "list", "-o", "json"]).json();
    let names: Vec<_> = list.as_array().expect("an array").iter().map(|topic| topic["name"].as_str()).collect();
    assert_eq!(names, [Some("bills"), Some("orders")]);
    assert_eq!(broker.run(&["topic", "list", "-o", "name"]).text(), "bills\norders\n");
    let table = broker.run(&["topic", "list"]).text();
    let rows: Vec<Vec<_>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["NAME", "PARTITIONS", "REPLICAS"]);
    assert_eq!(rows[2], ["orders", "2", "1"]);
    assert!(
        broker.run(&["topic", "list", "-o", "wide"]).text().lines().all(|line| line.split_whitespace().count() == 5)
    );
    assert!(broker.run(&["topic", "list", "-o", "yaml"]).text().contains("- name: bills\n"));
    assert!(broker.run(&["topic", "list", "--internal", "-o", "name"]).text().contains("__cluster_metadata\n"));

    let config = |key: &str| {
        let described = broker.run(&["topic", "describe", "orders", "-o", "json"]).json();
        let configs = described["configs"].as_array().expect("an array").clone();
        let row = configs.into_iter().find(|row| row["key"] == key).expect("the key");
        (row["value"].as_str().expect("text").to_owned(), row["source"].as_str().expect("text").to_owned())
    };
    assert_eq!(config("retention.ms"), ("1000000".to_owned(), "topic".to_owned()));
    assert_eq!(config("segment.bytes").1, "default");
    broker
        .run(&["topic", "alter", "orders", "-c", "segment.bytes=33554432", "--unset", "retention.ms", "-p", "3"])
        .ok();
    assert_eq!(config("segment.bytes"), ("33554432".to_owned(), "topic".to_owned()));
    assert_eq!(config("retention.ms").1, "default");
    let described = broker.run(&["topic", "describe", "orders", "-o", "json"]).json();
    assert_eq!(described["partitions"].as_array().map(Vec::len), Some(3));

    // Trimmed: what is below is gone, and the answer names the valid range.
    broker.feed(&["produce", "orders", "-p", "0"], b"a\nb\nc\n").ok();
    let offsets = broker.run(&["consume", "orders", "-p", "0", "-e", "-f", r"%o\n"]).text();
    let second = offsets.lines().nth(1).expect("three offsets");
    let trim = ["topic", "trim", "orders", "0", second];
    broker.run(&[&trim[..], &["--dry-run"]].concat()).ok();
    assert_eq!(broker.run(&["consume", "orders", "-e"]).text(), "a\nb\nc\n");
    broker.run(&[&trim[..], &["--yes"]].concat()).ok();
    assert_eq!(broker.run(&["consume", "orders", "-e"]).text(), "b\nc\n");
    broker.run(&["consume", "orders", "-p", "0", "--from", "0", "-e"]).fails(1, &[second]);
    broker.run(&["topic", "trim", "orders", "0", "end", "--yes"]).ok();
    assert_eq!(broker.run(&["consume", "orders", "-e"]).text(), "");

    broker.run(&["topic", "delete", "orders", "--dry-run"]).ok();
    broker.run(&["topic", "describe", "orders"]).ok();
    broker.run(&["topic", "delete", "orders", "--yes"]).ok();
    broker.run(&["topic", "describe", "orders"]).fails(3, &["orders"]);
    assert_eq!(broker.run(&["topic", "list", "-o", "name"]).text(), "bills\n");
}

#[test]
fn cluster_info_in_every_form() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t", "-p", "3"]).ok();
    let info = broker.run(&["cluster", "info", "-o", "json"]).json();
    assert_eq!((info["topics"].as_i64(), info["partitions"].as_i64()), (Some(1), Some(3)));
    assert_eq!(info["brokers"][0]["address"], broker.server);
    let id = info["cluster_id"].as_str().expect("an id");
    assert!(broker.run(&["cluster", "info"]).text().contains(id));
    assert!(broker.run(&["cluster", "info", "-o", "yaml"]).text().contains(id));
    assert_eq!(broker.run(&["cluster", "info", "-o", "name"]).text().trim(), id);
}

#[test]
fn configurations_are_checked_and_explained() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("flowstone.toml");
    let path = file.to_str().expect("text");
    std::fs::write(&file, "[node]\nid = 7\n[topic]\n\"retention.ms\" = \"7d\"\n").expect("written");
    flowstone(&["config", "check", "--config", path]).ok();
    flowstone(&["config", "check", path]).ok();
    let mut command = Command::new(FLOWSTONE);
    command.args(["config", "explain", "--config", path, "--set", "node.rack=b", "-o", "json"]);
    command.env("FLOWSTONE_STORAGE__SHARDS", "1").env("FLOWSTONE_ELSE", "no config");
    let rows = Running::spawn(command).end().json();
    let of = |key: &str| {
        let row = rows.as_array().expect("an array").iter().find(|row| row["key"] == key).expect("the key").clone();
        (row["value"].as_str().expect("text").to_owned(), row["origin"].as_str().expect("text").to_owned())
    };
    assert_eq!(of("node.id"), ("7".to_owned(), format!("file {path}")));
    assert_eq!(of("node.rack"), ("b".to_owned(), "--set".to_owned()));
    assert_eq!(of("storage.shards"), ("1".to_owned(), "env FLOWSTONE_STORAGE__SHARDS".to_owned()));
    assert_eq!(of("listen.client").1, "default");
    for (text, says) in [
        ("[node]\nidd = 1\n", &["node.idd", "did you mean", "node.id"][..]),
        ("[node]\nid = \"x\"\n", &["node.id"]),
        ("[node\n", &["TOML"]),
        ("[listen]\nclient = \"0.0.0.0:7070\"\n", &["security.insecure"]),
    ] {
        std::fs::write(&file, text).expect("written");
        flowstone(&["config", "check", path]).fails(2, says);
        flowstone(&["broker", "--config", path]).fails(2, says);
    }
    flowstone(&["config", "check", "/nowhere/flowstone.toml"]).fails(2, &["/nowhere/flowstone.toml"]);
}

#[test]
fn completions_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = flowstone(&["completion", shell]).text();
        assert!(script.contains("consume"), "{shell}");
    }
    flowstone(&["completion", "cmd"]).fails(2, &["cmd"]);
}

#[test]
fn a_segment_is_shown_up_to_its_first_fault() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let broker = Daemon::start(&data);
    broker.run(&["topic", "create", "t"]).ok();
    broker.feed(&["produce", "t"], b"one\n").ok();
    broker.feed(&["produce", "t"], b"two\n").ok();
    broker.stop();
    let mut found = Vec::new();
    let mut folders = vec![data.join("topics")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "log") {
                found.push(path);
            }
        }
    }
    let segment = found
        .into_iter()
        .find(|path| std::fs::read(path).expect("readable").windows(3).any(|bytes| bytes == b"two"))
        .expect("a segment that holds the records");
    let path = segment.to_str().expect("text");
    let rows = flowstone(&["debug", "segment", path, "-o", "json"]).json();
    let batches = rows["batches"].as_array().expect("an array");
    let records: i64 =
        batches.iter().filter(|b| b["control"] == false).map(|b| b["records"].as_i64().expect("a number")).sum();
    assert_eq!((records, &rows["fault"]), (2, &serde_json::Value::Null));
    assert!(flowstone(&["debug", "segment", path]).text().lines().count() > batches.len());
    // A flipped bit in the last batch: those before it are shown, and where it is.
    let mut bytes = std::fs::read(&segment).expect("readable");
    let at = bytes.windows(3).position(|bytes| bytes == b"two").expect("there");
    bytes[at] ^= 1;
    std::fs::write(&segment, bytes).expect("writable");
    let ended = flowstone(&["debug", "segment", path, "-o", "json"]);
    let shown: serde_json::Value = serde_json::from_slice(&ended.stdout).expect("json");
    assert_eq!(shown["batches"].as_array().map(Vec::len), Some(batches.len() - 1));
    ended.fails(1, &["CRC"]);
    flowstone(&["debug", "segment", "/nowhere.log"]).fails(1, &["/nowhere.log"]);
}

#[test]
fn benchmarks_report_what_they_did() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    let fields =
        ["records", "bytes", "seconds", "records_per_second", "mb_per_second", "latency_ms", "acks", "flush", "errors"];
    for (what, more) in [
        ("produce", &["--producers", "2", "--partitions", "3"][..]),
        ("consume", &["--partitions", "2"]),
        ("e2e", &[]),
        ("produce", &["--rate", "1000000", "--acks", "leader"]),
    ] {
        let report =
            broker.run(&[&["bench", what, "--records", "500", "--size", "100", "-o", "json"], more].concat()).json();
        for field in fields {
            assert!(report.get(field).is_some(), "{what}: {field}: {report}");
        }
        assert_eq!((report["records"].as_i64(), report["bytes"].as_i64()), (Some(500), Some(50_000)), "{what}");
        assert_eq!(report["errors"], 0, "{what}");
        assert_eq!(report["flush"], "quorum", "{what}");
        for percentile in ["p50", "p99", "p999", "max"] {
            assert!(report["latency_ms"][percentile].is_number(), "{what}: {percentile}");
        }
    }
    // Temporary topics are gone; a named one is made and stays.
    assert_eq!(broker.run(&["topic", "list", "-o", "name"]).text(), "");
    broker.run(&["bench", "produce", "--topic", "b", "--partitions", "2", "--records", "10"]).ok();
    broker.run(&["bench", "consume", "--topic", "b", "--records", "10"]).ok();
    assert_eq!(broker.run(&["consume", "b", "-e"]).text().lines().count(), 10);
}
