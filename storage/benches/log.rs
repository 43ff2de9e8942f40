//! The hot parts of the log, on a real disk: append, index lookup, read, open.
//!
//! `cargo bench -p flowstone-storage`; `-- open` for one of them.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use flowstone_protocol::{
    Compression, ControlType, Offset, PartitionId, RaftIndex, RecordBatchBuilder, ReplicaId, Term, Timestamp, TopicId,
    TopicPartition,
};
use flowstone_storage::{Disk, EntryBody, Log, LogConfig, LogEntry, Read, RealDisk, ReplicaIdentity};

const NOW: Timestamp = Timestamp::new(1_700_000_000_000);

fn batch(bytes: usize) -> Bytes {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    let value = vec![7; 1000];
    while builder.is_empty() || builder.estimated_bytes() + 1000 < bytes {
        builder.append(NOW, None, Some(&value), []).expect("a small record");
    }
    builder.build()
}

fn create(disk: &Arc<dyn Disk>, dir: &Path) -> Log {
    let identity = ReplicaIdentity {
        replica: ReplicaId::new(1),
        topic_partition: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
        feature_level: 1,
    };
    Log::create(disk, dir, identity, Bytes::new()).expect("a new log");
    let mut log = open(disk, dir, RaftIndex::new(1));
    let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
    log.append(&[LogEntry { index: RaftIndex::new(2), term: Term::new(2), body: no_op }], NOW).expect("appended");
    log
}

fn open(disk: &Arc<dyn Disk>, dir: &Path, flushed: RaftIndex) -> Log {
    Log::open(Arc::clone(disk), dir, LogConfig::default(), flushed, NOW).expect("opens")
}

fn entry(log: &Log, batch: &Bytes) -> LogEntry {
    LogEntry { index: log.last_index().next(), term: Term::new(2), body: EntryBody::Batch(batch.clone()) }
}

/// A folder on the disk that the target folder is on; the one for temporary files may be in memory.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

fn append(c: &mut Criterion) {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    let mut group = c.benchmark_group("append");
    for (name, bytes, flush) in [
        ("1 KiB", 1 << 10, false),
        ("16 KiB", 16 << 10, false),
        ("1 MiB", 1 << 20, false),
        ("1 KiB, flushed", 1 << 10, true),
        ("16 KiB, flushed", 16 << 10, true),
        ("1 MiB, flushed", 1 << 20, true),
    ] {
        let batch = batch(bytes);
        group.throughput(Throughput::Bytes(batch.len() as u64));
        group.bench_function(name, |b| {
            b.iter_custom(|iterations| {
                let folder = folder();
                let mut log = create(&disk, &folder.path().join("replica"));
                log.flush().expect("flushed");
                let mut took = Duration::ZERO;
                for _ in 0..iterations {
                    let entry = entry(&log, &batch);
                    let began = Instant::now();
                    log.reserve(batch.len()).expect("room");
                    black_box(log.append(&[entry], NOW).expect("appended"));
                    if flush {
                        log.flush().expect("flushed");
                    }
                    log.commit_to(log.last_index());
                    took += began.elapsed();
                    // What is deleted in between costs, but is not what is measured.
                    if log.size_bytes() > 4 << 30 {
                        drop(log);
                        std::fs::remove_dir_all(folder.path().join("replica")).expect("removed");
                        log = create(&disk, &folder.path().join("replica"));
                    }
                }
                took
            });
        });
    }
    group.finish();
}

fn filled(disk: &Arc<dyn Disk>, dir: &Path, batch: &Bytes, batches: u64) -> Log {
    let mut log = create(disk, dir);
    for _ in 0..batches {
        let entry = entry(&log, batch);
        log.append(&[entry], NOW).expect("appended");
    }
    log.flush().expect("flushed");
    log.commit_to(log.last_index());
    log
}

fn lookup(c: &mut Criterion) {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    let folder = folder();
    let mut log = filled(&disk, &folder.path().join("replica"), &batch(1 << 10), 200_000);
    let mut group = c.benchmark_group("lookup");
    let mut at = 0;
    let mut next = |end: i64| {
        at = (at + 7_919) % end;
        at
    };
    let end = log.high_watermark().get() - 1;
    group.bench_function("entry by index", |b| {
        b.iter(|| black_box(log.entry_meta(RaftIndex::new(2 + next(end) as u64)).expect("known")));
    });
    group.bench_function("read one batch by offset, active segment", |b| {
        b.iter(|| black_box(log.read(Offset::new(next(end)), 1).expect("readable")));
    });
    group.bench_function("offset by count from the end", |b| {
        b.iter(|| black_box(log.find_records_from_end(next(end) as u64).expect("readable")));
    });
    group.finish();
}

fn read(c: &mut Criterion) {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    let folder = folder();
    let mut log = filled(&disk, &folder.path().join("replica"), &batch(16 << 10), 40_000);
    let mut group = c.benchmark_group("read");
    group.sample_size(20);
    let end = log.high_watermark();
    group.throughput(Throughput::Bytes(log.size_bytes()));
    let mut whole = |verify: bool| {
        let mut at = Offset::ZERO;
        let mut bytes = 0;
        while at < end {
            match log.read(at, 1 << 20).expect("readable") {
                Read::Bytes(read) => {
                    if verify {
                        read.verify().expect("right");
                    }
                    at = read.next;
                    bytes += read.len();
                }
                Read::Ticket(ticket) => at = ticket.run().expect("readable").next,
            }
        }
        bytes
    };
    group.bench_function("640 MB, 1 MiB at a time, from the map", |b| b.iter(|| whole(false)));
    group.bench_function("640 MB, 1 MiB at a time, CRC checked", |b| b.iter(|| whole(true)));
    group.finish();
}

fn opening(c: &mut Criterion) {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    let folder = folder();
    let mut group = c.benchmark_group("open");
    group.sample_size(20);
    // As a kill leaves them: zeros ahead, no clean end.
    for (name, batches) in [("fresh", 0), ("100 batches of 1 KiB", 100), ("20 000 batches of 1 KiB", 20_000)] {
        let dir = folder.path().join(name);
        let log = filled(&disk, &dir, &batch(1 << 10), batches);
        let flushed = log.flushed_index();
        drop(log);
        group.bench_function(name, |b| {
            b.iter_batched(|| (), |()| black_box(open(&disk, &dir, flushed)), BatchSize::PerIteration);
        });
    }
    group.finish();
}

criterion_group!(benches, append, lookup, read, opening);
criterion_main!(benches);
