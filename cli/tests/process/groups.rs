//! Consumer groups and transactions as commands.

use crate::daemon::{Daemon, Setup};
use crate::running::Running;
use rustix::process::{Signal, kill_process};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Far beyond what anything here takes, whatever the machine.
const HANG: Duration = Duration::from_secs(120);

/// A broker with a topic `t`, and a few internal partitions.
fn start(partitions: &str) -> (TempDir, Daemon) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Setup::new(&folder.path().join("data")).set("cluster.internal_partitions=2").start();
    broker.run(&["topic", "create", "t", "-p", partitions]).ok();
    (folder, broker)
}

fn lag(broker: &Daemon) -> serde_json::Value {
    broker.run(&["group", "lag", "g", "-o", "json"]).json()
}

/// Waits until a command's JSON is as wanted.
#[track_caller]
fn wait_for(broker: &Daemon, command: &[&str], wanted: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    let began = Instant::now();
    loop {
        let ended = broker.run(&[command, &["-o", "json"]].concat());
        if ended.status.success() {
            let json = ended.json();
            if wanted(&json) {
                return json;
            }
        }
        assert!(began.elapsed() < HANG, "{command:?} does not tell what is waited for");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reads so many lines of a command that goes on.
#[track_caller]
fn lines(running: &mut Running, count: usize) -> Vec<String> {
    let stdout = running.child.stdout.as_mut().expect("stdout is piped");
    // One byte at a time: what lies behind stays for who reads on.
    BufReader::with_capacity(1, stdout).lines().take(count).map(|line| line.expect("text")).collect()
}

#[test]
fn a_group_goes_on_where_it_was_and_has_committed_what_was_printed() {
    let (_folder, broker) = start("1");
    broker.feed(&["produce", "t"], b"1\n2\n3\n4\n5\n6\n").ok();
    let consume = |more: &[&str]| broker.run(&[&["consume", "t", "-g", "g"], more].concat());
    assert_eq!(consume(&["-n", "2"]).text(), "1\n2\n");
    let [behind] = lag(&broker).as_array().expect("an array")[..].to_vec().try_into().expect("one partition");
    let keys: Vec<&str> = behind.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(keys, ["committed", "end", "lag", "partition", "topic"]);
    assert_eq!((&behind["topic"], &behind["partition"], &behind["lag"]), (&json!("t"), &json!(0), &json!(4)));
    // `--from` holds only where nothing is committed.
    assert_eq!(consume(&["-n", "1", "--from", "start"]).text(), "3\n");
    let committed = behind["committed"].as_i64().expect("an offset");
    let until = (committed + 3).to_string();
    assert_eq!(consume(&["--until", &until]).text(), "4\n5\n");
    assert_eq!(consume(&["-e"]).text(), "6\n");
    assert_eq!(consume(&["-e"]).text(), "", "nothing is left");
    assert_eq!(lag(&broker)[0]["lag"], 0);
    // Elsewhere they begin as asked.
    assert_eq!(broker.run(&["consume", "t", "-g", "h", "--from", "-2", "-e"]).text(), "5\n6\n");
    assert_eq!(broker.run(&["consume", "t", "-g", "i", "--from", "end", "-e"]).text(), "");
    // What makes no sense.
    broker.run(&["consume", "t", "-g", "g", "-p", "0"]).fails(2, &["leave -p out"]);
    broker.run(&["consume", "nothing", "-g", "g"]).fails(3, &["nothing"]);
    broker.run(&["consume", "t", "-g", "", "-e"]).fails(2, &[]);
}

#[test]
fn signals_commit_what_was_printed_and_leave() {
    let (_folder, broker) = start("2");
    for (signal, first) in [(Signal::INT, 1), (Signal::TERM, 11)] {
        let mut member = broker.begin(&["consume", "t", "-g", "g"]);
        let input: String = (first..first + 10).map(|number| format!("{number}\n")).collect();
        broker.feed(&["produce", "t"], input.as_bytes()).ok();
        let mut seen: Vec<u32> = lines(&mut member, 10).iter().map(|line| line.parse().expect("a number")).collect();
        seen.sort_unstable();
        assert_eq!(seen, (first..first + 10).collect::<Vec<_>>(), "from where the one before was");
        kill_process(member.pid(), signal).expect("it runs");
        assert_eq!(member.end().text(), "");
        let described = broker.run(&["group", "describe", "g", "-o", "json"]).json();
        assert_eq!((&described["state"], &described["members"]), (&json!("empty"), &json!([])));
        let behind: u64 = lag(&broker).as_array().expect("an array").iter().filter_map(|it| it["lag"].as_u64()).sum();
        assert_eq!(behind, 0);
    }
    // With an end that was asked for, being stopped before it is a failure.
    let mut member = broker.begin(&["consume", "t", "-g", "g", "-n", "100"]);
    broker.feed(&["produce", "t"], b"21\n").ok();
    assert_eq!(lines(&mut member, 1), ["21"]);
    kill_process(member.pid(), Signal::TERM).expect("it runs");
    member.end().fails(1, &["before the end"]);
    // What was printed by then is committed all the same.
    assert_eq!(broker.run(&["consume", "t", "-g", "g", "-e"]).text(), "");
}

#[test]
fn two_members_share() {
    let (_folder, broker) = start("2");
    let mut first = broker.begin(&["consume", "t", "-g", "g", "-f", "%p %v\\n"]);
    wait_for(&broker, &["group", "describe", "g"], |group| {
        group["state"] == "stable" && group["members"][0]["owned"].as_array().is_some_and(|owned| owned.len() == 2)
    });
    broker.feed(&["produce", "t", "-p", "0"], b"a\n").ok();
    broker.feed(&["produce", "t", "-p", "1"], b"b\n").ok();
    let mut both = lines(&mut first, 2);
    both.sort();
    assert_eq!(both, ["0 a", "1 b"]);
    let mut second = broker.begin(&["consume", "t", "-g", "g", "-f", "%p %v\\n"]);
    let group = wait_for(&broker, &["group", "describe", "g"], |group| {
        let members = group["members"].as_array().cloned().unwrap_or_default();
        let one = |member: &serde_json::Value| member["owned"].as_array().is_some_and(|owned| owned.len() == 1);
        group["state"] == "stable" && members.len() == 2 && members.iter().all(one)
    });
    let group_keys: Vec<&str> = group.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(group_keys, ["assignor", "coordinator", "group", "group_epoch", "members", "offsets", "state"]);
    broker.feed(&["produce", "t", "-p", "0"], b"c\n").ok();
    broker.feed(&["produce", "t", "-p", "1"], b"d\n").ok();
    // Each has one of them, and neither has what was printed before.
    let mut each = [lines(&mut first, 1).remove(0), lines(&mut second, 1).remove(0)];
    each.sort();
    assert_eq!(each, ["0 c", "1 d"]);
    // A group that is active is left alone.
    broker.run(&["group", "seek", "g", "--to", "start"]).fails(1, &["member"]);
    broker.run(&["group", "delete", "g"]).fails(1, &["members; stop them first"]);
    for member in [first, second] {
        kill_process(member.pid(), Signal::TERM).expect("it runs");
        assert_eq!(member.end().text(), "");
    }
}

#[test]
fn groups_are_listed_sought_and_deleted() {
    let (_folder, broker) = start("1");
    assert_eq!(broker.run(&["group", "list", "-o", "json"]).json(), json!([]));
    for command in [&["describe", "g"][..], &["lag", "g"], &["seek", "g", "--to", "start"], &["delete", "g"]] {
        broker.run(&[&["group"], command].concat()).fails(3, &["g"]);
    }
    broker.feed(&["produce", "t"], b"1\n2\n3\n").ok();
    broker.run(&["consume", "t", "-g", "g", "-e"]).ok();
    assert_eq!(broker.run(&["group", "list", "-o", "name"]).text(), "g\n");
    let listed = broker.run(&["group", "list", "-o", "json"]).json();
    assert_eq!(
        (&listed[0]["group"], &listed[0]["state"], &listed[0]["members"]),
        (&json!("g"), &json!("empty"), &json!(0))
    );
    assert!(broker.run(&["group", "list"]).text().starts_with("GROUP"));
    assert!(broker.run(&["group", "lag", "g"]).text().starts_with("TOPIC"));
    assert!(broker.run(&["group", "describe", "g"]).text().contains("empty"));
    // A dry run changes nothing.
    let end = lag(&broker)[0]["end"].as_i64().expect("an offset");
    let told = broker.run(&["group", "seek", "g", "--to", "-1", "--dry-run", "-o", "json"]).json();
    assert_eq!((&told[0]["topic"], &told[0]["partition"], &told[0]["from"]), (&json!("t"), &json!(0), &json!(end)));
    assert_eq!(lag(&broker)[0]["lag"], 0);
    broker.run(&["group", "seek", "g", "--to", "-1"]).ok();
    assert_eq!(broker.run(&["consume", "t", "-g", "g", "-e"]).text(), "3\n");
    broker.run(&["group", "seek", "g", "--to", "start", "--topic", "t"]).ok();
    assert_eq!(lag(&broker)[0]["lag"], 3);
    broker.run(&["group", "seek", "g", "--to", "1000"]).fails(1, &["out of range"]);
    broker.run(&["group", "seek", "g", "--to", "end", "--topic", "nowhere"]).fails(3, &["nowhere"]);
    broker.run(&["group", "seek", "g", "--to", "end", "-p", "7"]).fails(3, &["7"]);
    broker.run(&["group", "seek", "g", "--to", "sideways"]).fails(2, &[]);
    broker.run(&["group", "seek", "g", "--to", "end"]).ok();
    assert_eq!(broker.run(&["consume", "t", "-g", "g", "-e"]).text(), "");
    // One that was never there is made by it.
    broker.run(&["group", "seek", "new", "--to", "-2", "--topic", "t"]).ok();
    assert_eq!(broker.run(&["consume", "t", "-g", "new", "-e"]).text(), "2\n3\n");
    broker.run(&["group", "delete", "g", "--dry-run"]).ok();
    broker.run(&["group", "delete", "g"]).ok();
    broker.run(&["group", "describe", "g"]).fails(3, &["g"]);
    assert_eq!(broker.run(&["group", "list", "-o", "name"]).text(), "new\n");
}

#[test]
fn an_input_is_one_transaction() {
    let (_folder, broker) = start("4");
    assert_eq!(broker.run(&["txn", "list", "-o", "json"]).json(), json!([]));
    broker.run(&["txn", "describe", "a"]).fails(3, &["a"]);
    broker.run(&["txn", "abort", "a"]).fails(3, &["a"]);
    let produce = ["produce", "t", "--transactional-id", "a"];
    broker.feed(&produce, b"1\n2\n3\n").ok();
    let seen = |isolation: &str| {
        let text = broker.run(&["consume", "t", "-e", "--isolation", isolation]).text();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    wait_for(&broker, &["txn", "describe", "a"], |it| it["state"] == "complete_commit" && it["pending"] == json!([]));
    assert_eq!(seen("read_committed"), ["1", "2", "3"]);
    // A line that is no record, and nothing of the whole input counts.
    let json = [&produce[..], &["--input", "json"]].concat();
    broker.feed(&json, b"{\"value\":\"x\"}\nno record\n").fails(1, &["aborted", "line 2"]);
    broker.run(&[&produce[..], &["--acks", "leader"]].concat()).fails(2, &["quorum"]);
    broker.run(&[&produce[..], &["--transaction-timeout", "1d"]].concat()).fails(2, &[]);
    broker.run(&["consume", "t", "-e", "--isolation", "sideways"]).fails(2, &["read_committed"]);
    // Interrupted, whichever way: nothing of it counts, and nobody waits for it.
    for signal in [Signal::INT, Signal::TERM] {
        let mut open = broker.begin(&produce);
        open.child.stdin.as_mut().expect("stdin is piped").write_all(b"thrown away\n").expect("it reads");
        wait_for(&broker, &["txn", "describe", "a"], |it| it["state"] == "ongoing");
        kill_process(open.pid(), signal).expect("it runs");
        // Its stdin stays open for as long as it runs.
        let stdin = open.child.stdin.take();
        open.end().fails(1, &["interrupted", "nothing of it counts"]);
        drop(stdin);
        wait_for(&broker, &["txn", "describe", "a"], |it| {
            it["state"] == "complete_abort" && it["pending"] == json!([])
        });
        assert_eq!(seen("read_committed"), ["1", "2", "3"]);
    }
    assert!(seen("read_uncommitted").contains(&"thrown away".to_owned()));
    // A group passes over it too.
    assert_eq!(broker.run(&["consume", "t", "-g", "g", "-e"]).text().lines().count(), 3);
    let behind: u64 = lag(&broker).as_array().expect("an array").iter().filter_map(|it| it["lag"].as_u64()).sum();
    assert_eq!(behind, 0);
}

#[test]
fn a_hanging_transaction_is_seen_and_aborted() {
    let (_folder, broker) = start("1");
    let mut open = broker.begin(&["produce", "t", "--transactional-id", "a"]);
    open.child.stdin.as_mut().expect("stdin is piped").write_all(b"hangs\n").expect("it reads");
    let described = wait_for(&broker, &["txn", "describe", "a"], |it| it["state"] == "ongoing");
    assert_eq!(described["written"], json!([{"topic": "t", "partition": 0}]));
    assert_eq!((&described["transactional_id"], &described["partitions"]), (&json!("a"), &json!(1)));
    let listed = broker.run(&["txn", "list", "-o", "json"]).json();
    assert_eq!((&listed[0]["transactional_id"], &listed[0]["state"]), (&json!("a"), &json!("ongoing")));
    assert!(broker.run(&["txn", "list"]).text().starts_with("ID"));
    assert_eq!(broker.run(&["txn", "list", "--hanging", "1h", "-o", "json"]).json(), json!([]));
    wait_for(&broker, &["txn", "list", "--hanging", "1ms"], |it| it.as_array().is_some_and(|all| all.len() == 1));
    broker.run(&["txn", "abort", "a"]).ok();
    // Until its partitions are told, it is being aborted, and asking for that once more is no mistake.
    wait_for(&broker, &["txn", "describe", "a"], |it| it["state"] == "complete_abort");
    broker.run(&["txn", "abort", "a"]).fails(1, &[]);
    // Its producer is cut off.
    open.end().fails(1, &["not committed"]);
    assert_eq!(broker.run(&["consume", "t", "-e"]).text(), "");
}

#[test]
fn a_member_that_stood_still_for_too_long_takes_nothing_back_when_it_goes_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Setup::new(&folder.path().join("data"))
        .set("cluster.internal_partitions=2")
        .set("group.session_timeout_min=500 ms")
        .set("group.session_timeout=1 s")
        .start();
    broker.run(&["topic", "create", "t", "-p", "1"]).ok();
    broker.feed(&["produce", "t"], b"1\n").ok();
    let mut first = broker.begin(&["consume", "t", "-g", "g"]);
    assert_eq!(lines(&mut first, 1), ["1"]);
    kill_process(first.pid(), Signal::STOP).expect("it runs");
    // Its session ends, and another one has the partition. What it printed and had not committed comes again.
    let mut second = broker.begin(&["consume", "t", "-g", "g"]);
    broker.feed(&["produce", "t"], b"2\n").ok();
    while lines(&mut second, 1) != ["2"] {}
    let has_all = |member: &serde_json::Value| member["owned"].as_array().is_some_and(|owned| owned.len() == 1);
    let group = wait_for(&broker, &["group", "describe", "g"], |group| {
        group["state"] == "stable"
            && group["members"].as_array().is_some_and(|them| them.len() == 1 && has_all(&them[0]))
    });
    let owner = group["members"][0]["member_id"].clone();
    assert!(owner.is_string(), "{group}");
    // It goes on, notices, and waits beside the other one.
    kill_process(first.pid(), Signal::CONT).expect("it runs");
    wait_for(&broker, &["group", "describe", "g"], |group| {
        let members = group["members"].as_array().cloned().unwrap_or_default();
        let keeps = members.iter().any(|member| member["member_id"] == owner && has_all(member));
        group["state"] == "stable" && members.len() == 2 && keeps
    });
    broker.feed(&["produce", "t"], b"3\n").ok();
    assert_eq!(lines(&mut second, 1), ["3"]);
    for member in [first, second] {
        kill_process(member.pid(), Signal::TERM).expect("it runs");
        assert_eq!(member.end().text(), "", "nothing twice");
    }
    assert_eq!(broker.run(&["consume", "t", "-g", "g", "-e"]).text(), "", "nor was a commit taken back");
}
