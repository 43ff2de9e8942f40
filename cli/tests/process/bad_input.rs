//! Every mistake that a user of the command line can make: its exit code, and what is said about it.

use crate::daemon::Daemon;
use crate::running::{FLOWSTONE, Running, flowstone};
use rustix::process::Signal;
use std::io::{BufRead, BufReader};
use std::process::Command;

#[test]
fn usage() {
    for (arguments, says) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["topic", "create"], "NAME"),
        (&["topic", "create", "t", "-p", "0"], "0"),
        (&["topic", "create", "t", "-p", "many"], "many"),
        (&["topic", "create", "t", "-c", "novalue"], "key=value"),
        (&["topic", "alter", "t"], "nothing to change"),
        (&["topic", "trim", "t", "0", "-1"], "-1"),
        (&["topic", "list", "-o", "xml"], "xml"),
        (&["topic", "list", "--timeout", "soon"], "soon"),
        (&["consume", "t", "-f", "%q"], "%q"),
        (&["consume", "t", "-f", "%v", "-o", "json"], "-f"),
        (&["consume", "t", "-o", "yaml"], "json"),
        (&["consume", "t", "--from", "later"], "later"),
        (&["consume", "t", "--until", "start"], "start"),
        (&["consume"], "TOPIC"),
        (&["produce", "t", "--acks", "leader", "--idempotent=true"], "quorum"),
        (&["produce", "t", "--acks", "all"], "all"),
        (&["produce", "t", "--compression", "bzip2"], "bzip2"),
        (&["produce", "t", "-k", ""], "delimiter"),
        (&["produce", "t", "-k", "\\q"], "\\q"),
        (&["produce", "t", "-H", "novalue"], "key=value"),
        (&["produce", "t", "-k", ":", "--input", "json"], "json"),
        (&["bench", "produce", "--records", "0"], "0"),
        (&["bench", "produce", "--size", "x"], "x"),
        (&["partition", "move", "t", "0"], "--to"),
        (&["partition", "move", "t", "0", "--to", "1,x"], "x"),
        (&["partition", "recover", "t", "0"], "--from"),
        (&["partition", "list", "t", "--moving"], "--moving"),
        (&["broker-admin", "drain"], "BROKER"),
        (&["broker-admin", "drain", "one"], "one"),
        (&["broker-admin", "drain", "1", "--undo", "--dry-run"], "--undo"),
        (&["broker-admin", "replace", "1"], "NEW"),
        (&["dev", "-n", "0"], "0"),
        (&["broker"], "--config"),
        (&["broker", "--config", "/nowhere.toml"], "/nowhere.toml"),
    ] {
        let said = flowstone(arguments).fails(2, &[says]);
        assert!(said.starts_with("error:") || said.contains("Usage:"), "{arguments:?}: {said}");
    }
}

#[test]
fn servers() {
    for (server, says) in [
        ("localhost", "no port"),
        ("[::1]", "no port"),
        ("::1:7070", "brackets"),
        ("host:port", "no valid port"),
        ("http://localhost:7070", "URL"),
        ("localhost:7070,", "no port"),
    ] {
        flowstone(&["topic", "list", "--server", server]).fails(2, &[says, "HOST:PORT"]);
    }
    let mut command = Command::new(FLOWSTONE);
    command.args(["topic", "list"]).env("FLOWSTONE_SERVER", "localhost");
    Running::spawn(command).end().fails(2, &["no port"]);
}

#[test]
fn nobody_there() {
    // A port that was free a moment ago: nobody listens.
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let server = format!("127.0.0.1:{port}");
    for arguments in [
        &["topic", "list"][..],
        &["cluster", "health"],
        &["broker-admin", "list"],
        &["consume", "t"],
        &["produce", "t"],
        &["bench", "e2e"],
    ] {
        flowstone(&[arguments, &["--server", &server, "--timeout", "300ms"]].concat()).fails(4, &[&server]);
    }
    // One that takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let server = silent.local_addr().expect("its address").to_string();
    flowstone(&["topic", "list", "--server", &server, "--timeout", "500ms"]).fails(4, &[&server]);
}

#[test]
fn a_broker_that_stops_answering_in_the_middle() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t"]).ok();
    // More than the reader is sent ahead.
    broker.feed(&["produce", "t"], &b"a line of thirty-two bytes, or so\n".repeat(1_000_000)).ok();
    let mut consume = broker.begin(&["consume", "t", "-e", "--timeout", "3s"]);
    let mut lines = BufReader::new(consume.child.stdout.take().expect("stdout is piped")).lines();
    lines.next().expect("a line").expect("text");
    broker.signal(Signal::STOP);
    lines.map_while(Result::ok).for_each(drop);
    consume.end().fails(4, &[&broker.server, "--timeout"]);
}

#[test]
fn ipv6() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        eprintln!("skipped: this machine has no IPv6 loopback");
        return;
    }
    let broker = crate::daemon::Setup::new(&folder.path().join("data")).at("[::1]:0").start();
    assert!(broker.server.starts_with("[::1]:"), "{}", broker.server);
    broker.run(&["topic", "create", "t"]).ok();
    broker.feed(&["produce", "t"], b"line\n").ok();
    assert_eq!(broker.run(&["consume", "t", "-e"]).text(), "line\n");
}

#[test]
fn what_the_broker_refuses() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t", "-p", "2"]).ok();
    let long = "x".repeat(250);
    for (arguments, exit, says) in [
        // Names.
        (&["topic", "create", "a b"][..], 2, &["a b"][..]),
        (&["topic", "create", ""], 2, &[]),
        (&["topic", "create", "."], 2, &[]),
        (&["topic", "create", ".."], 2, &[".."]),
        (&["topic", "create", &long], 2, &["249"]),
        (&["topic", "create", "t"], 1, &["t", "exists"]),
        // What is not there.
        (&["topic", "describe", "nothing"], 3, &["nothing"]),
        (&["topic", "delete", "nothing", "--yes"], 3, &["nothing"]),
        (&["topic", "alter", "nothing", "-p", "3"], 3, &["nothing"]),
        (&["topic", "trim", "nothing", "0", "0", "--yes"], 3, &["nothing"]),
        (&["topic", "trim", "t", "7", "0", "--yes"], 3, &["7"]),
        (&["consume", "nothing", "-e"], 3, &["nothing"]),
        (&["consume", "t", "-p", "7", "-e"], 3, &["7", "0 to 1"]),
        (&["produce", "nothing"], 3, &["nothing"]),
        // Offsets: the answer names the valid range.
        (&["topic", "trim", "t", "0", "999", "--yes"], 1, &["999"]),
        (&["consume", "t", "--from", "999", "-e"], 1, &["999"]),
        // Sizes and configuration.
        (&["topic", "create", "many", "-p", "1000000"], 2, &["1000000"]),
        (&["topic", "alter", "t", "-p", "1"], 2, &["2"]),
        (&["topic", "create", "r", "-r", "3"], 2, &["3"]),
        (&["topic", "create", "c", "-c", "retention.sm=1"], 2, &["retention.sm", "did you mean", "retention.ms"]),
        (&["topic", "create", "c", "-c", "retention.ms=soon"], 2, &["retention.ms", "soon"]),
        (
            &["topic", "create", "c", "-c", "segment.bytes=1000000", "-c", "max.message.bytes=2000000"],
            2,
            &["segment.bytes"],
        ),
        (&["topic", "alter", "t", "--unset", "nothing"], 2, &["nothing"]),
        // The cluster's own topics: read, never written or deleted.
        (&["topic", "create", "__mine"], 5, &["__"]),
        (&["topic", "delete", "__cluster_metadata", "--yes"], 5, &["__cluster_metadata"]),
    ] {
        broker.run(arguments).fails(exit, says);
    }
    broker.feed(&["produce", "nothing"], b"line\n").fails(3, &["nothing"]);
    broker.feed(&["produce", "t", "-p", "2"], b"line\n").fails(3, &["2"]);
    broker.feed(&["produce", "__cluster_metadata"], b"line\n").fails(5, &["__cluster_metadata"]);
    // And after all that it serves.
    broker.feed(&["produce", "t", "-p", "0"], b"line\n").ok();
    assert_eq!(broker.run(&["consume", "t", "-e"]).text(), "line\n");
}

#[test]
fn records_that_are_refused_fail_alone_and_are_counted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t", "-c", "max.message.bytes=10000"]).ok();
    let mut input = b"before\n".to_vec();
    input.extend(vec![b'x'; 20_000]);
    input.extend(b"\nafter\n");
    broker.feed(&["produce", "t"], &input).fails(1, &["1 record", "not acknowledged", "line 2", "max.message.bytes"]);
    assert_eq!(broker.run(&["consume", "t", "-e"]).text(), "before\nafter\n");
    // More than an hour ahead.
    let ahead = b"{\"value\":\"x\",\"timestamp\":99999999999999}\n";
    broker.feed(&["produce", "t", "--input", "json"], ahead).fails(1, &["timestamp"]);
    // A line that is no record: the lines before it are in.
    broker.feed(&["produce", "t", "--input", "json"], b"{\"value\":\"json\"}\nnonsense\n").fails(1, &["line 2"]);
    assert_eq!(broker.run(&["consume", "t", "-e"]).text(), "before\nafter\njson\n");
}

#[test]
fn input_that_cannot_be_read() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t"]).ok();
    broker.run(&["produce", "t", "/nowhere/input"]).fails(1, &["/nowhere/input", "No such file"]);
    // A folder opens and does not read; so does memory of another's, whoever asks.
    broker.run(&["produce", "t", "/proc"]).fails(1, &["/proc", "directory"]);
    assert_eq!(broker.run(&["consume", "t", "-e"]).text(), "");
}

#[test]
fn acks_that_exclude_idempotence_warn() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Daemon::start(&folder.path().join("data"));
    broker.run(&["topic", "create", "t"]).ok();
    for acks in ["leader", "none"] {
        let ended = broker.feed(&["produce", "t", "--acks", acks], b"line\n");
        assert!(ended.stderr.contains("warning") && ended.stderr.contains("idempoten"), "{acks}: {}", ended.stderr);
        ended.ok();
    }
    let ended = broker.feed(&["produce", "t", "--idempotent=false"], b"line\n");
    assert!(!ended.stderr.contains("warning"), "{}", ended.stderr);
    ended.ok();
    assert_eq!(broker.run(&["consume", "t", "-n", "3"]).text(), "line\nline\nline\n");
}
