//! What goes in comes out.

use crate::daemon::Daemon;
use crate::running::Running;
use rustix::process::{Signal, kill_process};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Real text: this workspace's own sources and its lock file, repeated to 100 000 lines.
fn real_lines() -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut text = Vec::new();
    for file in ["Cargo.lock", "LICENSE", "README.md", "cli/tests/process/round_trip.rs"] {
        text.extend(std::fs::read(root.join(file)).unwrap_or_else(|error| panic!("{file}: {error}")));
    }
    let lines = text.iter().filter(|byte| **byte == b'\n').count();
    let mut all = text.repeat(100_000 / lines + 1);
    let end = all.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(99_999).expect("enough lines").0;
    all.truncate(end + 1);
    all
}

fn sorted(lines: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<_> = lines.split_inclusive(|byte| *byte == b'\n').collect();
    lines.sort_unstable();
    lines
}

#[track_caller]
fn same(left: &[u8], right: &[u8]) {
    // Not assert_eq: a megabyte of difference helps nobody.
    assert!(left == right, "{} bytes in, {} bytes out, or other bytes", left.len(), right.len());
}

#[test]
fn a_hundred_thousand_lines_come_back_identical_and_again_after_kill_nine() {
    let folder = folder();
    let data = folder.path().join("data");
    let broker = Daemon::start(&data);
    broker.run(&["topic", "create", "lines"]).ok();
    broker.run(&["topic", "create", "spread", "-p", "4"]).ok();
    let lines = real_lines();
    let said = broker.feed(&["produce", "lines"], &lines);
    assert!(said.stderr.contains("100000"), "{}", said.stderr);
    said.ok();
    broker.feed(&["produce", "spread", "--compression", "lz4"], &lines).ok();
    same(&lines, &broker.run(&["consume", "lines", "-e"]).ok());
    assert!(sorted(&lines) == sorted(&broker.run(&["consume", "spread", "-e"]).ok()));
    broker.kill();
    let broker = Daemon::start(&data);
    same(&lines, &broker.run(&["consume", "lines", "-e"]).ok());
    assert!(sorted(&lines) == sorted(&broker.run(&["consume", "spread", "-e"]).ok()));
}

#[test]
fn empty_lines_long_lines_and_bytes_that_are_no_text() {
    let folder = folder();
    let broker = Daemon::start(&folder.path().join("data"));
    let mut input = b"\n\nfirst\r\n\xff\xfe\x00\n".to_vec();
    input.extend(vec![b'x'; 700_000]);
    input.extend(b"\n\nlast\n");
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        broker.run(&["topic", "create", codec]).ok();
        broker.feed(&["produce", codec, "--compression", codec], &input).ok();
        same(&input, &broker.run(&["consume", codec, "-e"]).ok());
    }
    // The last line needs no line end, and a file is as good as stdin.
    let file = folder.path().join("input");
    std::fs::write(&file, b"one\ntwo").expect("written");
    broker.run(&["topic", "create", "file"]).ok();
    broker.run(&["produce", "file", file.to_str().expect("text")]).ok();
    assert_eq!(broker.run(&["consume", "file", "-e"]).text(), "one\ntwo\n");
    // Nothing is nothing, and a topic without records ends at once.
    broker.run(&["topic", "create", "nothing"]).ok();
    broker.feed(&["produce", "nothing"], b"").ok();
    assert_eq!(broker.run(&["consume", "nothing", "-e"]).text(), "");
}

#[test]
fn keys_headers_and_templates() {
    let folder = folder();
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "keyed", "-p", "3"]).ok();
    let produce = ["produce", "keyed", "-k", r"\t", "-H", "a=1", "-H", "a=2", "-H", "b="];
    broker.feed(&produce, b"k1\tv1\nno delimiter\n\tempty key\nk1\tv2\twith another\nk2\t\n").ok();
    let mut lines: Vec<_> =
        broker.run(&["consume", "keyed", "-e", "-f", r"%t|%k|%v|%h\n"]).text().lines().map(str::to_owned).collect();
    let of_k1: Vec<_> = lines.iter().filter(|line| line.contains("|k1|")).cloned().collect();
    assert_eq!(of_k1, ["keyed|k1|v1|a=1,a=2,b=", "keyed|k1|v2\twith another|a=1,a=2,b="]);
    lines.sort();
    assert_eq!(lines.len(), 5);
    assert!(lines.contains(&"keyed||no delimiter|a=1,a=2,b=".to_owned()));
    assert!(lines.contains(&"keyed||empty key|a=1,a=2,b=".to_owned()));
    assert!(lines.contains(&"keyed|k2||a=1,a=2,b=".to_owned()));
    // A line without the delimiter has a null key; one that begins with it an empty one.
    let records = broker.run(&["consume", "keyed", "-e", "-o", "json"]).text();
    let keys: Vec<serde_json::Value> = records
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("json")["key"].clone())
        .collect();
    assert_eq!(keys.iter().filter(|key| key.is_null()).count(), 1, "{records}");
    assert_eq!(keys.iter().filter(|key| *key == "").count(), 1, "{records}");
}

#[test]
fn json_copies_a_topic_byte_for_byte() {
    let folder = folder();
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "from"]).ok();
    broker.run(&["topic", "create", "to"]).ok();
    let input = concat!(
        r#"{"value":"plain","timestamp":1700000000123}"#,
        "\n\n",
        r#"{"key":null,"value":null}"#,
        "\n",
        r#"{"key":{"base64":"/w=="},"value":"","headers":[{"key":"h","value":"1"},{"key":"h","value":null},{"key":"i","value":{"base64":"gA=="}}]}"#,
        "\n",
        r#"{"topic":"elsewhere","partition":7,"offset":9,"value":"é\n\"\\"}"#,
        "\n"
    );
    broker.feed(&["produce", "from", "--input", "json"], input.as_bytes()).ok();
    let first = broker.run(&["consume", "from", "-e", "-o", "json"]).ok();
    broker.feed(&["produce", "to", "--input", "json"], &first).ok();
    let second = broker.run(&["consume", "to", "-e", "-o", "json"]).ok();
    let parsed = |bytes: &[u8], topic: &str| -> Vec<serde_json::Value> {
        String::from_utf8_lossy(bytes)
            .lines()
            .map(|line| {
                let mut record: serde_json::Value = serde_json::from_str(line).expect("json");
                assert_eq!(record["topic"], topic);
                record.as_object_mut().expect("an object").remove("topic");
                record
            })
            .collect()
    };
    let (first, second) = (parsed(&first, "from"), parsed(&second, "to"));
    assert_eq!(first, second);
    assert_eq!(first.len(), 4);
    assert_eq!(first[0]["timestamp"], 1_700_000_000_123_i64);
    assert_eq!(first[1]["value"], serde_json::Value::Null);
    assert_eq!(first[2]["key"]["base64"], "/w==");
    assert_eq!(first[2]["headers"][2]["value"]["base64"], "gA==");
    assert_eq!(first[3]["value"], "é\n\"\\");
    assert_eq!(first[3]["partition"], 0);
}

#[test]
fn positions_and_counts() {
    let folder = folder();
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t"]).ok();
    let mut input = String::new();
    for second in 0..10 {
        input.push_str(&format!(
            "{{\"value\":\"{second}\",\"timestamp\":{}}}\n",
            1_700_000_000_000_i64 + second * 1_000
        ));
    }
    broker.feed(&["produce", "t", "--input", "json"], input.as_bytes()).ok();
    // Control records take offsets, so the first record's is asked for.
    let first: i64 = broker.run(&["consume", "t", "-n", "1", "-f", "%o"]).text().parse().expect("an offset");
    let consume = |arguments: &[&str]| broker.run(&[&["consume", "t"], arguments].concat()).text().replace('\n', " ");
    assert_eq!(consume(&["-e"]), "0 1 2 3 4 5 6 7 8 9 ");
    assert_eq!(consume(&["-n", "3"]), "0 1 2 ");
    assert_eq!(consume(&["-n", "0"]), "");
    assert_eq!(consume(&["-e", "-n", "99"]), "0 1 2 3 4 5 6 7 8 9 ");
    assert_eq!(consume(&["-e", "--from", "-3"]), "7 8 9 ");
    assert_eq!(consume(&["-e", "--from", "-99"]), "0 1 2 3 4 5 6 7 8 9 ");
    assert_eq!(consume(&["-e", "--from", "end"]), "");
    assert_eq!(consume(&["-e", "--from", &(first + 8).to_string()]), "8 9 ");
    assert_eq!(consume(&["--until", &(first + 2).to_string()]), "0 1 ");
    assert_eq!(consume(&["--until", "end"]), "0 1 2 3 4 5 6 7 8 9 ");
    assert_eq!(consume(&["-e", "--from", "@1700000007000"]), "7 8 9 ");
    assert_eq!(consume(&["-e", "--from", "@2023-11-14T22:13:27.500Z"]), "8 9 ");
    assert_eq!(consume(&["-e", "--from", "@-1h"]), "");
    assert_eq!(consume(&["--from", "@1700000002000", "--until", "@1700000005000"]), "2 3 4 ");
    assert_eq!(consume(&["--from", &(first + 5).to_string(), "--until", &(first + 3).to_string()]), "");
}

#[test]
fn several_topics_and_one_partition() {
    let folder = folder();
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "a", "-p", "2"]).ok();
    broker.run(&["topic", "create", "b"]).ok();
    broker.feed(&["produce", "a", "-p", "0"], b"a0\n").ok();
    broker.feed(&["produce", "a", "-p", "1"], b"a1\n").ok();
    broker.feed(&["produce", "b"], b"b0\n").ok();
    let both = broker.run(&["consume", "a", "b", "-e", "-f", r"%t/%p %v\n"]).ok();
    assert_eq!(sorted(&both), [&b"a/0 a0\n"[..], b"a/1 a1\n", b"b/0 b0\n"]);
    assert_eq!(broker.run(&["consume", "a", "-p", "1", "-e"]).text(), "a1\n");
    assert_eq!(broker.run(&["consume", "a", "b", "-n", "2"]).text().lines().count(), 2);
}

#[test]
fn what_comes_later_is_printed_at_once_and_a_closed_stdout_ends_it_quietly() {
    let folder = folder();
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t"]).ok();
    let mut consume = broker.begin(&["consume", "t"]);
    let mut lines = BufReader::new(consume.child.stdout.take().expect("stdout is piped"));
    let mut produce = broker.begin(&["produce", "t"]);
    let mut typed = produce.child.stdin.take().expect("stdin is piped");
    for text in ["one\n", "two\n"] {
        // Each is waited for before the next is typed: neither command holds a line back.
        typed.write_all(text.as_bytes()).expect("produce reads");
        let mut line = String::new();
        lines.read_line(&mut line).expect("consume prints");
        assert_eq!(line, text);
    }
    drop(typed);
    produce.end().ok();
    // Nothing more comes, and still it notices.
    drop(lines);
    let ended = consume.end();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
    // And so does one that has much to print.
    broker.feed(&["produce", "t"], &b"line\n".repeat(50_000)).ok();
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "{ \"$0\" consume t --server \"$1\"; echo $? >&2; } | head -n 1"]);
    shell.args([crate::running::FLOWSTONE, &broker.server]);
    let ended = Running::spawn(shell).end();
    assert_eq!(ended.stderr, "0\n");
    assert_eq!(ended.text(), "one\n");
}

#[test]
fn ctrl_c_ends_a_producer_with_what_it_had_sent() {
    let folder = folder();
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t"]).ok();
    let mut consume = broker.begin(&["consume", "t"]);
    let mut seen = BufReader::new(consume.child.stdout.take().expect("stdout is piped"));
    let mut produce = broker.begin(&["produce", "t"]);
    produce.child.stdin.as_mut().expect("stdin is piped").write_all(b"one\n").expect("produce reads");
    let mut line = String::new();
    seen.read_line(&mut line).expect("consume prints");
    kill_process(produce.pid(), Signal::INT).expect("it runs");
    let stdin = produce.child.stdin.take();
    produce.end().fails(1, &["interrupted", "1 record"]);
    drop(stdin);
    // For a reader that would go on for ever, Ctrl-C is the ordinary end.
    kill_process(consume.pid(), Signal::INT).expect("it runs");
    consume.end().ok();
}

#[test]
fn acknowledgements_are_printed_on_demand() {
    let folder = folder();
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t"]).ok();
    let said = broker.feed(&["produce", "t", "-o", "json"], b"a\nb\nc\n").text();
    let told: Vec<_> = said
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).expect("json")["offset"].as_i64().expect("a number")
        })
        .collect();
    let read: Vec<i64> = broker
        .run(&["consume", "t", "-e", "-f", r"%o\n"])
        .text()
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    assert_eq!(told, read);
    assert_eq!(told.len(), 3);
}
