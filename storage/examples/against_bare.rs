//! What the log costs over bare `pwrite` and `fdatasync` of the same bytes, in turn over several files, interleaved:
//! `cargo run --release -p flowstone-storage --example against_bare -- FOLDER [BATCH_BYTES] [FILES] [MIB]`
// It prints: it is a program for people.
#![allow(clippy::print_stdout, reason = "its figures are what it is for")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::{
    Compression, ControlType, PartitionId, RaftIndex, RecordBatchBuilder, ReplicaId, Term, Timestamp, TopicId,
    TopicPartition,
};
use flowstone_storage::{Disk, EntryBody, Log, LogConfig, LogEntry, RealDisk, ReplicaIdentity};

const NOW: Timestamp = Timestamp::new(1_700_000_000_000);
const ROUNDS: usize = 7;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let Some(folder) = arguments.next() else {
        eprintln!("usage: against_bare FOLDER [BATCH_BYTES] [FILES] [MIB]");
        std::process::exit(2);
    };
    let mut number = |otherwise: usize| arguments.next().and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let (batch_bytes, files, mib) = (number(1 << 20), number(8), number(1024));
    let folder = Path::new(&folder).join("against-bare");
    let mut builder = RecordBatchBuilder::new(Compression::None);
    while builder.is_empty() || builder.estimated_bytes() + 1_100 < batch_bytes {
        builder.append(NOW, None, Some(&[7; 1000]), []).expect("a small record");
    }
    let batch = builder.build();
    let appends = (mib << 20) / batch.len();
    println!("{appends} appends of {} bytes in turn to {files} files, each flushed; {ROUNDS} pairs", batch.len());
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let bare = in_folder(&folder, |folder| bare(folder, &batch, files, appends));
        let log = in_folder(&folder, |folder| logs(folder, &batch, files, appends));
        let per = |took: Duration| took.as_secs_f64() * 1e6 / appends as f64;
        println!("bare {:.1} us, log {:.1} us per append", per(bare), per(log));
        ratios.push(bare.as_secs_f64() / log.as_secs_f64());
    }
    ratios.sort_unstable_by(f64::total_cmp);
    println!("bare / log: median {:.2}, {:.2} to {:.2}", ratios[ROUNDS / 2], ratios[0], ratios[ROUNDS - 1]);
}

fn in_folder(folder: &Path, run: impl FnOnce(&Path) -> Duration) -> Duration {
    std::fs::create_dir_all(folder).expect("a folder");
    let took = run(folder);
    std::fs::remove_dir_all(folder).expect("removed");
    took
}

fn bare(folder: &Path, batch: &Bytes, files: usize, appends: usize) -> Duration {
    let files: Vec<_> =
        (0..files).map(|number| File::create_new(folder.join(number.to_string())).expect("created")).collect();
    let mut ends = vec![0; files.len()];
    let began = Instant::now();
    for number in 0..appends {
        let at = number % files.len();
        files[at].write_all_at(batch, ends[at]).expect("written");
        files[at].sync_data().expect("flushed");
        ends[at] += batch.len() as u64;
    }
    began.elapsed()
}

fn logs(folder: &Path, batch: &Bytes, files: usize, appends: usize) -> Duration {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    let mut logs: Vec<_> = (0..files)
        .map(|number| {
            let dir = folder.join(number.to_string());
            let identity = ReplicaIdentity {
                replica: ReplicaId::new(1),
                topic_partition: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
                feature_level: 1,
            };
            Log::create(&disk, &dir, identity, Bytes::new()).expect("a new log");
            let mut log =
                Log::open(Arc::clone(&disk), &dir, LogConfig::default(), RaftIndex::new(1), NOW).expect("opens");
            let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
            let entry = LogEntry { index: RaftIndex::new(2), term: Term::new(2), body: no_op };
            log.append(&[entry], NOW).expect("appended");
            log.flush().expect("flushed");
            log
        })
        .collect();
    let began = Instant::now();
    for number in 0..appends {
        let log = &mut logs[number % files];
        let index = log.last_index().next();
        let entry = LogEntry { index, term: Term::new(2), body: EntryBody::Batch(batch.clone()) };
        log.reserve(batch.len()).expect("room");
        log.append(&[entry], NOW).expect("appended");
        log.flush().expect("flushed");
        log.commit_to(index);
    }
    began.elapsed()
}
