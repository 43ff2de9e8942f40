//! How long it takes to open many logs as a kill leaves them:
//! `cargo run --release -p flowstone-storage --example open_many -- FOLDER [LOGS]`
// It prints: it is a program for people.
#![allow(clippy::print_stdout, reason = "its figures are what it is for")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use flowstone_protocol::{
    Compression, ControlType, PartitionId, RaftIndex, RecordBatchBuilder, ReplicaId, Term, Timestamp, TopicId,
    TopicPartition,
};
use flowstone_storage::{Disk, EntryBody, Log, LogConfig, LogEntry, RealDisk, ReplicaIdentity};

const NOW: Timestamp = Timestamp::new(1_700_000_000_000);
const BATCHES: usize = 20;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let Some(folder) = arguments.next() else {
        eprintln!("usage: open_many FOLDER [LOGS]");
        std::process::exit(2);
    };
    let logs: usize = arguments.next().and_then(|logs| logs.parse().ok()).unwrap_or(1000);
    let folder = Path::new(&folder).join("open-many");
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(NOW, None, Some(&[7; 1000]), []).expect("a small record");
    let batch = builder.build();

    let began = Instant::now();
    let dirs: Vec<_> = (0..logs).map(|number| folder.join(number.to_string())).collect();
    for dir in &dirs {
        let identity = ReplicaIdentity {
            replica: ReplicaId::new(1),
            topic_partition: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
            feature_level: 1,
        };
        Log::create(&disk, dir, identity, Bytes::new()).expect("a new log");
    }
    println!("create {logs}: {:.0?}", began.elapsed());

    let began = Instant::now();
    let mut flushed = RaftIndex::new(1);
    for dir in &dirs {
        let mut log = Log::open(Arc::clone(&disk), dir, LogConfig::default(), flushed, NOW).expect("opens");
        let mut entries = vec![LogEntry {
            index: RaftIndex::new(2),
            term: Term::new(2),
            body: EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() },
        }];
        for _ in 0..BATCHES {
            let index = entries[entries.len() - 1].index.next();
            entries.push(LogEntry { index, term: Term::new(2), body: EntryBody::Batch(batch.clone()) });
        }
        log.append(&entries, NOW).expect("appended");
        log.flush().expect("flushed");
        flushed = RaftIndex::new(1);
    }
    println!("open, append {BATCHES} batches of 1 KiB, flush, drop {logs}: {:.0?}", began.elapsed());

    flushed = RaftIndex::new(flushed.get() + 1 + BATCHES as u64);
    for round in 1..=3 {
        let began = Instant::now();
        let opened: Vec<_> = dirs
            .iter()
            .map(|dir| Log::open(Arc::clone(&disk), dir, LogConfig::default(), flushed, NOW).expect("opens"))
            .collect();
        println!("open {logs}, round {round}: {:.0?}", began.elapsed());
        drop(opened);
    }
    std::fs::remove_dir_all(&folder).expect("removed");
}
