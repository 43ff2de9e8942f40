//! What opening must make durable, and what a segment's bytes must agree with: rows that random operations come to only
//! now and then.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::control::{CONTROL_FORMAT_VERSION, encode_control};
use flowstone_protocol::{
    Compression, ControlType, Offset, PartitionId, RaftIndex, RecordBatchBuilder, ReplicaId, Term, Timestamp, TopicId,
    TopicPartition,
};
use flowstone_storage::sim_disk::Crash;
use flowstone_storage::{
    Disk, EntryBody, Log, LogConfig, LogEntry, OpenError, Read, ReadError, ReplicaIdentity, SimDisk, StorageError,
};

const DIR: &str = "/data/replica";
const NOW: Timestamp = Timestamp::new(1_700_000_000_000);

fn config() -> LogConfig {
    LogConfig { segment_bytes: 2_600, room_kept_bytes: 0, ..LogConfig::default() }
}

fn open(disk: &Arc<dyn Disk>, flushed: u64) -> Result<Log, OpenError> {
    Log::open(Arc::clone(disk), Path::new(DIR), config(), RaftIndex::new(flushed), NOW)
}

fn batch(value: u8) -> Bytes {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(NOW, None, Some(&[value; 442]), []).expect("a small record");
    let batch = builder.build();
    // One sector, so that one that is written anew leaves those behind it as they were.
    assert_eq!(batch.len(), 512);
    batch
}

fn append(log: &mut Log, value: u8) -> Result<(), StorageError> {
    let body = EntryBody::Batch(batch(value));
    let entry = LogEntry { index: log.last_index().next(), term: log.last_term(), body };
    log.append(&[entry], NOW).map(|_| ())
}

fn create(disk: &Arc<dyn Disk>) -> Log {
    let identity = ReplicaIdentity {
        replica: ReplicaId::new(1),
        topic_partition: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
        feature_level: 1,
    };
    Log::create(disk, Path::new(DIR), identity, Bytes::new()).expect("a new log");
    let mut log = open(disk, 1).expect("opens");
    let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
    log.append(&[LogEntry { index: RaftIndex::new(2), term: Term::new(2), body: no_op }], NOW).expect("appended");
    log
}

fn stored(log: &mut Log) -> Vec<Bytes> {
    let (first, last) = (log.first_index().get(), log.last_index().get());
    (first..=last).map(|index| log.stored_batch(RaftIndex::new(index)).expect("there")).collect()
}

/// A life that ends while it opens the log leaves the next one with a view that only the page cache has. That one must
/// not build on it before it is durable.
#[test]
fn a_kill_in_the_middle_of_opening_and_a_power_failure_after_the_next_lose_nothing() {
    let mut crashed_while_opening = 0;
    for seed in 0..300 {
        for operations in 0..8 {
            let sim = SimDisk::new(seed);
            let disk = sim.shared();
            let mut log = create(&disk);
            // Two segments, and a third of which nothing was flushed.
            for value in 0..4 {
                append(&mut log, value).expect("appended");
            }
            log.flush().expect("flushed");
            let flushed = log.last_index().get();
            for value in 10..19 {
                append(&mut log, value).expect("appended");
            }
            drop(log);
            sim.restart(Crash::Power);
            // Some of it is gone, torn or stale: opening cuts and removes, and is killed at it.
            sim.crash_after(operations);
            crashed_while_opening += u64::from(open(&disk, flushed).is_err());
            sim.restart(Crash::Process);
            let mut log = open(&disk, flushed).expect("opens");
            // What is appended now differs from what was there, and is as long; it goes into the same segment.
            log.set_config(LogConfig { segment_bytes: 1 << 20, ..config() });
            let (found, opened_to) = (stored(&mut log).len(), log.last_index().get());
            append(&mut log, 30).expect("appended");
            let is_flushed = seed % 2 == 0;
            if is_flushed {
                log.flush().expect("flushed");
            }
            let (expected, last) = (stored(&mut log), log.last_index().get());
            drop(log);
            sim.restart(Crash::Power);
            let durable = if is_flushed { last } else { opened_to };
            let mut log = open(&disk, durable).unwrap_or_else(|error| panic!("seed {seed}, {operations}: {error}"));
            let after = stored(&mut log);
            let is_right = expected.starts_with(&after) && after.len() >= found && (!is_flushed || after == expected);
            assert!(
                is_right,
                "seed {seed}, killed after {operations} operations: {} of {}",
                after.len(),
                expected.len()
            );
        }
    }
    assert!(crashed_while_opening > 300, "{crashed_while_opening}");
}

#[test]
fn a_control_batch_of_another_entry_is_none_of_this_log() {
    let sim = SimDisk::new(1);
    let disk = sim.shared();
    let log = create(&disk);
    log.close().expect("closes");
    let path = Path::new(DIR).join("00000000000000000000-00000000000000000002.log");
    let whole = sim.bytes(&path).expect("there");
    for (term, index, offset, last) in [(2, 3, 1, 3), (2, 4, 1, 2), (2, 3, 2, 2), (3, 3, 1, 2)] {
        let (term, index, offset) = (Term::new(term), RaftIndex::new(index), Offset::new(offset));
        let control = encode_control(ControlType::ProducerExpiry, term, index, offset, &[], CONTROL_FORMAT_VERSION);
        sim.set_bytes(&path, [&whole[..], &control].concat());
        let log = open(&disk, 2).expect("opens");
        assert_eq!(log.last_index().get(), last, "term {term}, entry {index}, offset {offset}");
    }
}

#[test]
fn the_room_that_is_kept_is_kept() {
    let sim = SimDisk::new(1);
    let disk = sim.shared();
    let mut log = create(&disk);
    let kept = 50_000;
    log.set_config(LogConfig { segment_bytes: 1 << 20, room_kept_bytes: kept, ..config() });
    sim.set_bytes_max(Some(sim.used_bytes() + 200_000));
    let mut reserved = 0;
    while log.reserve(1_000).is_ok() {
        append(&mut log, 1).expect("what was reserved has room");
        reserved += 1;
    }
    let available = disk.available_bytes(Path::new(DIR)).expect("known");
    // Index blocks are written without asking: 4 KiB for every 127 batches.
    let index_bytes = reserved / 127 * 4_096;
    assert!(reserved > 100 && available + index_bytes >= kept, "{reserved} reserved, {available} left");
    log.reserve_privileged(20_000).expect("this may use it");
}

#[test]
fn the_room_that_is_kept_grows_with_the_logs_on_the_disk() {
    let sim = SimDisk::new(1);
    let disk = sim.shared();
    let mut log = create(&disk);
    let config = LogConfig { segment_bytes: 1 << 20, room_kept_bytes: 100_000, ..config() };
    log.set_config(config.clone());
    sim.set_bytes_max(Some(sim.used_bytes() + 150_000));
    log.reserve(1_000).expect("there is room beside what is kept for one");
    let others: Vec<_> = (0..256)
        .map(|number| {
            let dir = Path::new(DIR).with_file_name(format!("other-{number}"));
            Log::create(&disk, &dir, *log.identity(), Bytes::new()).expect("a new log");
            Log::open(sim.shared(), &dir, config.clone(), RaftIndex::new(1), NOW).expect("opens")
        })
        .collect();
    assert_eq!(config.room_kept_on(&*disk), 200_000);
    match log.reserve(50_000) {
        Err(StorageError::DiskFull { needed_bytes, .. }) => assert!(needed_bytes > 200_000, "{needed_bytes}"),
        other => panic!("{other:?}"),
    }
    drop(others);
    assert_eq!(config.room_kept_on(&*disk), 100_000);
    drop(log);
    assert_eq!(disk.open_logs().load(std::sync::atomic::Ordering::Relaxed), 0);
}

/// The names of newer segments may be lost where the removal of older ones is not: then nothing would be left.
#[test]
fn segments_are_deleted_only_once_those_that_stay_are_durable() {
    for seed in 0..100 {
        let sim = SimDisk::new(seed);
        let disk = sim.shared();
        let mut log = create(&disk);
        for value in 0..10 {
            append(&mut log, value).expect("appended");
        }
        log.flush().expect("flushed");
        let flushed = log.last_index();
        log.commit_to(flushed);
        let end = log.high_watermark();
        log.set_log_start(end);
        let checkpoint = log.new_checkpoint(flushed, Bytes::new(), Bytes::new());
        log.write_checkpoint(checkpoint).expect("written");
        // The next batch begins a segment of its own, whose name nobody has flushed.
        log.set_config(LogConfig { segment_bytes: 1, ..config() });
        append(&mut log, 50).expect("appended");
        let job = log.flush_job().expect("something to flush");
        assert!(log.delete_segments_below_checkpoint().expect("deleted") > 0);
        drop(job);
        drop(log);
        sim.restart(Crash::Power);
        let log = open(&disk, flushed.get()).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!((log.log_start(), log.high_watermark()), (end, end));
    }
}

/// A block of an earlier life of the file is whole, right as far as it goes, and too short.
#[test]
fn a_sealed_segments_index_that_ends_too_early_is_rebuilt() {
    let sim = SimDisk::new(1);
    let disk = sim.shared();
    let mut log = create(&disk);
    append(&mut log, 1).expect("appended");
    let last = log.close().expect("closes").get();
    let path = Path::new(DIR).join("00000000000000000000-00000000000000000002.index");
    let short = sim.bytes(&path).expect("written at the close");
    let mut log = open(&disk, last).expect("opens");
    for value in 2..12 {
        append(&mut log, value).expect("appended");
    }
    let expected = stored(&mut log);
    log.flush().expect("flushed");
    let last = log.last_index();
    drop(log);
    let mut log = open(&disk, last.get()).expect("opens");
    sim.set_bytes(&path, short);
    assert_eq!(stored(&mut log), expected);
}

#[test]
fn one_flush_is_in_flight_and_the_next_covers_what_came_meanwhile() {
    let disk = SimDisk::new(1).shared();
    let mut log = create(&disk);
    let first = log.flush_job().expect("something to flush");
    append(&mut log, 1).expect("appended");
    assert!(log.flush_job().is_none(), "one at a time");
    assert_eq!(log.flush_done(first.run()).expect("flushed").get(), 2);
    let second = log.flush_job().expect("what came meanwhile");
    assert_eq!(second.covers().get(), 3);
    assert_eq!(log.flush_done(second.run()).expect("flushed").get(), 3);
    assert!(log.flush_job().is_none(), "nothing to flush");
}

#[test]
fn a_checkpoint_under_another_name_is_none() {
    let disk = SimDisk::new(1).shared();
    let mut log = create(&disk);
    append(&mut log, 1).expect("appended");
    let last = log.flush().expect("flushed");
    log.commit_to(last);
    let checkpoint = log.new_checkpoint(last, Bytes::new(), Bytes::new());
    log.write_checkpoint(checkpoint).expect("written");
    drop(log);
    let named = |index: u64| Path::new(DIR).join(format!("{index:020}.state"));
    disk.rename(&named(last.get()), &named(2)).expect("renamed");
    for name in disk.read_dir(Path::new(DIR)).expect("the folder") {
        if name.ends_with(".state") && name != "00000000000000000002.state" {
            disk.remove_file(&Path::new(DIR).join(name)).expect("removed");
        }
    }
    let opened = open(&disk, last.get());
    assert!(matches!(opened, Err(OpenError::Quarantine { .. })), "{opened:?}");
}

#[test]
fn a_read_of_which_a_part_is_missing_is_found_out() {
    let disk = SimDisk::new(1).shared();
    let mut log = create(&disk);
    for value in 1..4 {
        append(&mut log, value).expect("appended");
    }
    log.commit_to(log.last_index());
    let Ok(Read::Bytes(mut bytes)) = log.read(Offset::ZERO, 1 << 20) else { panic!("readable") };
    bytes.verify().expect("right");
    let first = bytes.len() - batch(3).len();
    bytes.chunks[0].truncate(first);
    assert!(matches!(bytes.verify(), Err(ReadError::Corrupt { .. })));
}
