//! kill -9 at any moment: nothing acknowledged is missing, nothing is torn, and the broker is back at once.
//!
//! `FLOWSTONE_KILLS` says how often (3 unless set); `tests/kill-nine` runs it 20 times with figures.

use crate::daemon::{Daemon, Setup};
use std::io::{BufRead, BufReader, Write};
use std::time::Duration;

fn kills() -> usize {
    std::env::var("FLOWSTONE_KILLS").ok().and_then(|count| count.parse().ok()).unwrap_or(3)
}

/// Lines that tell their number and whether they are whole.
fn line(number: usize) -> String {
    let filling = "abcdefghijklmnopqrstuvwxyz".repeat(1 + number % 7);
    format!("{number:09} {filling} {number:09}\n")
}

/// Offsets after which the broker is killed: another one every round.
fn enough(round: usize) -> usize {
    1 + round * 7_919 % 40_000
}

#[test]
fn killed_in_the_middle_of_producing_nothing_acknowledged_is_missing_and_nothing_torn() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let mut broker = Daemon::start(&data);
    broker.run(&["topic", "create", "lines"]).ok();
    // What is in the log for certain, then what may be there; each round begins where the log ended.
    let mut next = 0;
    for round in 0..kills() {
        let mut produce = broker.begin(&["produce", "lines", "-o", "json", "--timeout", "1s"]);
        let mut stdin = produce.child.stdin.take().expect("stdin is piped");
        let mut acknowledged = BufReader::new(produce.child.stdout.take().expect("stdout is piped")).lines();
        let from = next;
        let feeding = std::thread::spawn(move || {
            // Until the producer gives up.
            for number in from.. {
                if stdin.write_all(line(number).as_bytes()).is_err() {
                    return;
                }
            }
        });
        // Killed as soon as so many are acknowledged, while more are on their way.
        let mut told = Vec::new();
        while told.len() < enough(round) {
            told.push(acknowledged.next().expect("acknowledgements come").expect("text"));
        }
        broker.kill();
        told.extend(acknowledged.map_while(Result::ok));
        feeding.join().expect("feeding does not panic");
        produce.end().fails(4, &["not acknowledged"]);

        broker = Daemon::start(&data);
        let read = broker.run(&["consume", "lines", "-e"]).text();
        let lines = read.split_inclusive('\n').count();
        let certain = from + told.len();
        assert!(lines >= certain, "round {round}: {certain} lines were acknowledged, {lines} are there");
        for (number, text) in read.split_inclusive('\n').enumerate() {
            assert_eq!(text, line(number), "round {round}");
        }
        // The offsets that were told are those where the lines are.
        let offsets = broker.run(&["consume", "lines", "-e", "-f", r"%o\n"]).text();
        let offsets: Vec<&str> = offsets.lines().skip(from).take(told.len()).collect();
        for (told, at) in told.iter().zip(&offsets) {
            let told: serde_json::Value = serde_json::from_str(told).expect("json");
            assert_eq!(told["offset"].to_string(), **at, "round {round}");
        }
        eprintln!(
            "round {round}: {} acknowledged, {} there, ready again after {:?}",
            told.len(),
            lines - from,
            broker.ready_after
        );
        next = lines;
    }
}

#[test]
fn a_producer_goes_on_over_kills_without_loss_or_duplicate() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let mut broker = Daemon::start(&data);
    let server = broker.server.clone();
    broker.run(&["topic", "create", "lines"]).ok();
    let mut produce = broker.begin(&["produce", "lines", "-o", "json", "--timeout", "120s"]);
    let mut stdin = produce.child.stdin.take().expect("stdin is piped");
    let mut acknowledged = BufReader::new(produce.child.stdout.take().expect("stdout is piped")).lines();
    let total = 20_000 * (kills() + 1);
    let feeding = std::thread::spawn(move || {
        for number in 0..total {
            stdin.write_all(line(number).as_bytes()).expect("produce reads");
        }
    });
    let mut told = 0;
    for _ in 0..kills() {
        for _ in 0..enough(told).min(20_000) {
            acknowledged.next().expect("acknowledgements come").expect("text");
            told += 1;
        }
        broker.kill();
        broker = Setup::new(&data).at(&server).start();
    }
    told += acknowledged.map_while(Result::ok).count();
    feeding.join().expect("produce reads all");
    produce.end().ok();
    assert_eq!(told, total);
    let expected: String = (0..total).map(line).collect();
    let read = broker.run(&["consume", "lines", "-e"]).text();
    assert!(read == expected, "{total} lines went in, {} came out, or others", read.lines().count());
}

#[test]
fn a_restart_after_kill_nine_is_ready_soon() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let broker = Daemon::start(&data);
    broker.run(&["topic", "create", "lines", "-p", "16"]).ok();
    broker.feed(&["produce", "lines"], &b"line\n".repeat(200_000)).ok();
    broker.kill();
    let broker = Daemon::start(&data);
    eprintln!("ready after {:?}", broker.ready_after);
    // Far above what it takes, for machines that do other things meanwhile; the figure is `tests/kill-nine`'s.
    assert!(broker.ready_after < Duration::from_secs(30));
    assert_eq!(broker.run(&["consume", "lines", "-e"]).text().lines().count(), 200_000);
}
