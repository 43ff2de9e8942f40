//! What a million operations cost to record and to judge: `cargo run --release -p flowstone-checker --example million`.

use std::time::{Duration, Instant};

use flowstone_checker::{History, Isolation, Observed, SenderKind};
use flowstone_protocol::{Offset, PartitionId};

fn main() {
    let operations: u64 = std::env::args().nth(1).and_then(|count| count.parse().ok()).unwrap_or(1_000_000);
    let began = Instant::now();
    let mut history = History::new();
    let logs: Vec<_> = (0..12).map(|number| history.log("orders", PartitionId::new(number))).collect();
    let senders: Vec<_> = (0..6).map(|_| history.sender(SenderKind::IDEMPOTENT)).collect();
    let readers: Vec<_> = (0..3).map(|_| history.reader(Isolation::ReadUncommitted)).collect();
    for log in &logs {
        readers.iter().for_each(|reader| history.assigned(*reader, *log, Offset::new(0)));
    }
    for number in 0..operations {
        let (log, offset) = (logs[number as usize % 12], Offset::new((number / 12) as i64));
        let at = Duration::from_micros(number * 50);
        let value = history.send(senders[number as usize % 6], log, at);
        history.acknowledged(value, offset, at);
        for reader in &readers {
            history.read(*reader, log, offset, Observed::Value(value));
        }
    }
    logs.iter().for_each(|log| history.fully_read(*log));
    let recorded = began.elapsed();
    let verdict = history.judge();
    eprintln!(
        "{} operations and {} reads: recorded in {recorded:?}, judged in {:?}, {} anomalies",
        verdict.operations,
        verdict.reads,
        began.elapsed() - recorded,
        verdict.anomalies.len()
    );
}
