//! What a disk, a crash or a user can do to the files: each gets a clear error that names the place, or is mended, and
//! nothing durable is ever cut silently.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{
    ClusterId, Compression, ControlType, DirectoryId, Offset, PartitionId, RaftIndex, RecordBatchBuilder, ReplicaId,
    Term, Timestamp, TopicId, TopicPartition,
};
use flowstone_storage::inspect::{InspectedEnd, SegmentInspector};
use flowstone_storage::recovery::Answered;
use flowstone_storage::sim_disk::{Crash, Operation};
use flowstone_storage::{
    DataDir, DataDirError, Disk, EntryBody, FoundRecord, Log, LogConfig, LogEntry, Lookup, OpenError, Read, ReadBytes,
    ReadError, RealDisk, ReplicaIdentity, RetentionConfig, SimDisk, StorageError,
};

const DIR: &str = "/data/replica";
const NOW: Timestamp = Timestamp::new(1_700_000_000_000);

fn small_segments() -> LogConfig {
    LogConfig { segment_bytes: 1_000, room_kept_bytes: 0, ..LogConfig::default() }
}

fn identity() -> ReplicaIdentity {
    ReplicaIdentity {
        replica: ReplicaId::new(1),
        topic_partition: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
        feature_level: 1,
    }
}

fn batch(value: u8) -> Bytes {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(NOW, None, Some(&[value; 100]), []).expect("a small record");
    builder.build()
}

fn entry(log: &Log, value: u8) -> LogEntry {
    let index = log.last_index().next();
    LogEntry { index, term: Term::new(2), body: EntryBody::Batch(batch(value)) }
}

fn open(disk: &Arc<dyn Disk>, flushed: u64) -> Result<Log, OpenError> {
    Log::open(Arc::clone(disk), Path::new(DIR), small_segments(), RaftIndex::new(flushed), NOW)
}

/// A log with a no-op (entry 2, offset 0) and `batches` of one record each, all flushed and committed, in segments of 5.
fn filled(disk: &Arc<dyn Disk>, batches: u8) -> Log {
    Log::create(disk, Path::new(DIR), identity(), Bytes::new()).expect("a new log");
    let mut log = open(disk, 1).expect("opens");
    let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
    log.append(&[LogEntry { index: RaftIndex::new(2), term: Term::new(2), body: no_op }], NOW).expect("appended");
    for value in 1..=batches {
        let entry = entry(&log, value);
        log.append(&[entry], NOW).expect("appended");
    }
    log.flush().expect("flushed");
    log.commit_to(log.last_index());
    log
}

/// The same, all of it in a checkpoint: nothing of it is read when it is opened.
fn checkpointed(batches: u8) -> (SimDisk, Arc<dyn Disk>, u64) {
    let (sim, disk, last) = simulated(batches);
    let mut log = open(&disk, last).expect("opens");
    log.commit_to(log.last_index());
    let checkpoint = log.new_checkpoint(log.last_index(), Bytes::new(), Bytes::new());
    log.write_checkpoint(checkpoint).expect("written");
    (sim, disk, last)
}

fn simulated(batches: u8) -> (SimDisk, Arc<dyn Disk>, u64) {
    let sim = SimDisk::new(7);
    let disk = sim.shared();
    let log = filled(&disk, batches);
    let last = log.last_index().get();
    drop(log);
    (sim, disk, last)
}

fn files(disk: &Arc<dyn Disk>, suffix: &str) -> Vec<PathBuf> {
    let mut names = disk.read_dir(Path::new(DIR)).expect("the folder");
    names.sort_unstable();
    names.into_iter().filter(|name| name.ends_with(suffix)).map(|name| Path::new(DIR).join(name)).collect()
}

fn read_all(log: &mut Log) -> Result<Vec<u8>, ReadError> {
    let mut all = Vec::new();
    let mut at = log.log_start();
    while at < log.high_watermark() {
        let bytes: ReadBytes = match log.read(at, 1 << 20)? {
            Read::Bytes(bytes) => bytes,
            Read::Ticket(ticket) => ticket.run()?,
        };
        bytes.verify()?;
        bytes.chunks.iter().for_each(|chunk| all.extend_from_slice(chunk));
        at = bytes.next;
    }
    Ok(all)
}

/// The bytes of a log that opens, all of them committed.
fn reopened(disk: &Arc<dyn Disk>, flushed: u64) -> Vec<u8> {
    let mut log = open(disk, flushed).expect("opens");
    log.commit_to(log.last_index());
    read_all(&mut log).expect("reads")
}

fn quarantined(opened: Result<Log, OpenError>) -> (Offset, String) {
    match opened {
        Err(OpenError::Quarantine { offset, detail, remedy, .. }) => {
            assert!(remedy.contains("restore"), "it says what to do: {remedy}");
            (offset, detail)
        }
        other => panic!("quarantine expected, found {other:?}"),
    }
}

// ---- the tail ----

#[test]
fn a_truncated_tail_that_nobody_was_told_of_is_cut() {
    let (sim, disk, last) = simulated(20);
    let before = reopened(&disk, last);
    let mut log = open(&disk, last).expect("opens");
    let entry = entry(&log, 99);
    log.append(&[entry], NOW).expect("appended");
    drop(log);
    let newest = files(&disk, ".log").pop().expect("a segment");
    let inspected =
        SegmentInspector::open(&disk, &newest).expect("a segment").last().expect("a batch").expect("readable");
    // Every length that a torn write could leave.
    let whole = sim.bytes(&newest).expect("there");
    let end = inspected.position as usize + inspected.header.total_bytes();
    for cut in 1..=inspected.header.total_bytes() {
        sim.set_bytes(&newest, whole[..end - cut].to_vec());
        assert_eq!(reopened(&disk, last), before, "cut by {cut}");
    }
}

#[test]
fn a_garbage_tail_is_cut_and_stays_cut() {
    let (sim, disk, last) = simulated(20);
    let before = reopened(&disk, last);
    let newest = files(&disk, ".log").pop().expect("a segment");
    let log = open(&disk, last).expect("opens");
    assert_eq!(log.close().expect("closes").get(), last);
    let clean = sim.bytes(&newest).expect("there");
    let garbage: [&[u8]; 5] = [
        b"garbage",
        &[0xff; 700],
        // Zeros, then something: a torn write of which only a later sector came.
        &[&[0; 512][..], &[1; 512]].concat(),
        &clean[..clean.len().min(200)],
        &batch(5),
    ];
    for garbage in garbage {
        sim.set_bytes(&newest, [&clean[..], garbage].concat());
        assert_eq!(reopened(&disk, last), before);
        assert_eq!(sim.bytes(&newest).as_deref(), Some(&clean[..]), "it is gone from the file, too");
    }
}

#[test]
fn a_tail_that_was_flushed_and_is_gone_is_never_cut_silently() {
    let (sim, disk, last) = simulated(20);
    let newest = files(&disk, ".log").pop().expect("a segment");
    let log = open(&disk, last).expect("opens");
    let end = log.end_offset();
    log.close().expect("closes");
    let whole = sim.bytes(&newest).expect("there");
    sim.set_bytes(&newest, whole[..whole.len() - 1].to_vec());
    let before = sim.bytes(&newest);
    let (offset, detail) = quarantined(open(&disk, last));
    assert_eq!(offset.next(), end, "the offset that is gone: {detail}");
    assert_eq!(sim.bytes(&newest), before, "nothing was changed");
    // The same where it says that one entry less was flushed: then nobody was told of it.
    assert_eq!(open(&disk, last - 1).expect("opens").last_index().get(), last - 1);
}

#[test]
fn a_missing_segment_is_told() {
    let (_, disk, last) = simulated(30);
    let segments = files(&disk, ".log");
    disk.remove_file(&segments[2]).expect("removed");
    let (offset, detail) = quarantined(open(&disk, last));
    let begins = segments[2].file_name().and_then(|name| name.to_str()).expect("a name")[..20].parse::<i64>();
    assert_eq!(Ok(offset.get()), begins, "{detail}");
}

#[test]
fn all_segments_missing_is_told() {
    let (_, disk, last) = simulated(5);
    for path in files(&disk, ".log") {
        disk.remove_file(&path).expect("removed");
    }
    assert!(quarantined(open(&disk, last)).1.contains("no segment"));
}

// ---- the index ----

#[test]
fn deleted_and_foreign_indexes_are_rebuilt() {
    let (sim, disk, last) = simulated(40);
    let before = reopened(&disk, last);
    let indexes = files(&disk, ".index");
    assert!(indexes.len() > 3, "{indexes:?}");
    let originals: Vec<_> = indexes.iter().map(|path| sim.bytes(path).expect("there")).collect();
    // Deleted.
    for path in &indexes {
        disk.remove_file(path).expect("removed");
    }
    assert_eq!(reopened(&disk, last), before);
    let rebuilt: Vec<_> = indexes.iter().map(|path| sim.bytes(path).expect("written anew")).collect();
    assert_eq!(rebuilt, originals);
    // Another segment's, noise, cut, a flipped bit.
    for wrong in [originals[1].clone(), vec![0x5a; 4096], originals[0][..100].to_vec(), Vec::new()] {
        sim.set_bytes(&indexes[0], wrong);
        assert_eq!(reopened(&disk, last), before);
    }
    for position in [0, 9, 20, 30, 33, 40, 60] {
        sim.flip_bit(&indexes[0], position, 1);
        assert_eq!(reopened(&disk, last), before, "a bit at {position}");
    }
}

#[test]
fn an_index_that_is_spoilt_while_the_log_is_open_is_rebuilt() {
    let (sim, disk, last) = simulated(40);
    let mut log = open(&disk, last).expect("opens");
    log.commit_to(RaftIndex::new(last));
    sim.flip_bit(&files(&disk, ".index")[1], 40, 1);
    let all = read_all(&mut log).expect("reads");
    assert_eq!(all, reopened(&disk, last));
}

// ---- rot ----

#[test]
fn a_flipped_bit_in_a_sealed_segment_is_told_by_the_read_and_the_rest_goes_on() {
    let (sim, disk, last) = checkpointed(40);
    let sealed = files(&disk, ".log")[1].clone();
    let name = sealed.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    let base: i64 = name[..20].parse().expect("an offset");
    // In the second batch's records (each batch is 168 or 169 bytes, of one offset).
    let second =
        u64::from(u32::from_be_bytes(sim.bytes(&sealed).expect("there")[8..12].try_into().expect("4 bytes"))) + 12;
    sim.flip_bit(&sealed, second + 100, 3);
    let mut log = open(&disk, last).expect("opens: it was not looked at");
    log.commit_to(RaftIndex::new(last));
    let Err(ReadError::Corrupt { segment, position, offset, detail }) = read_all(&mut log) else {
        panic!("the rot is read over");
    };
    assert_eq!((segment, position, offset.get()), (name, second, base + 1), "{detail}");
    // Records elsewhere are served.
    let bytes = match log.read(Offset::new(base + 10), 1).expect("readable") {
        Read::Bytes(bytes) => bytes,
        Read::Ticket(ticket) => ticket.run().expect("readable"),
    };
    bytes.verify().expect("right");
    let Err(StorageError::Corrupt { position, .. }) = log.entry(RaftIndex::new((base + 1 + 2) as u64)) else {
        panic!("the rot is taken for an entry");
    };
    assert_eq!(position, second);
}

#[test]
fn flipped_offset_and_epoch_bits_are_outside_the_crc_and_found() {
    let (sim, disk, last) = checkpointed(40);
    let sealed = files(&disk, ".log")[1].clone();
    let whole = sim.bytes(&sealed).expect("there");
    for position in (0..8).chain(12..16) {
        for bit in 0..8 {
            sim.set_bytes(&sealed, whole.clone());
            sim.flip_bit(&sealed, position, bit);
            let mut log = open(&disk, last).expect("opens: it was not looked at");
            log.commit_to(RaftIndex::new(last));
            let base = Offset::new(
                sealed.file_name().and_then(|name| name.to_str()).expect("a name")[..20].parse().expect("an offset"),
            );
            let index = RaftIndex::new(base.get() as u64 + 2);
            assert!(matches!(log.stored_batch(index), Err(StorageError::Corrupt { .. })), "byte {position}, bit {bit}");
            if position < 8 {
                assert!(read_all(&mut log).is_err(), "byte {position}, bit {bit}");
            }
        }
    }
}

#[test]
fn one_flipped_epoch_bit_in_the_tail_does_not_win_an_election() {
    let (sim, disk, last) = simulated(3);
    let newest = files(&disk, ".log").pop().expect("a segment");
    let mut log = open(&disk, last).expect("opens");
    let entry = entry(&log, 50);
    let position = log.size_bytes();
    log.append(&[entry], NOW).expect("appended");
    drop(log);
    for bit in 0..8 {
        let whole = sim.bytes(&newest).expect("there");
        // The highest byte of the epoch of the last batch.
        for byte in 12..16 {
            sim.set_bytes(&newest, whole.clone());
            sim.flip_bit(&newest, position + byte, bit);
            let log = open(&disk, last).expect("opens");
            assert_eq!(log.last_term(), Term::new(2), "byte {byte}, bit {bit}");
            assert_eq!(log.last_index().get(), last, "the batch is cut");
            drop(log);
        }
        sim.set_bytes(&newest, whole);
    }
    // The no-op's own epoch: what it repeats inside its CRC does not agree.
    sim.flip_bit(&files(&disk, ".log")[0], 15, 3);
    let (offset, _) = quarantined(open(&disk, last));
    assert_eq!(offset, Offset::ZERO);
}

#[test]
fn rot_of_what_was_written_and_answered_for_is_no_torn_end() {
    let (sim, disk, last) = simulated(40);
    sim.flip_bit(&files(&disk, ".log")[1], 30, 3);
    let open = |written| {
        let answered = Answered { flushed: RaftIndex::new(1), written };
        Log::open(Arc::clone(&disk), Path::new(DIR), small_segments(), answered, NOW)
    };
    // The machine was not started anew: all of it is in its memory, if not on its disk.
    let (offset, detail) = quarantined(open(true));
    assert!(offset > Offset::ZERO, "{detail}");
    // It was: what was not flushed may be gone, and nobody was told that it is there.
    let log = open(false).expect("opens");
    assert!(log.last_index().get() < last, "the rest is cut");
    // The end of the last segment may always be torn: by a process that was killed as it wrote.
    let newest = files(&disk, ".log").pop().expect("a segment");
    drop(log);
    let bytes = sim.bytes(&newest).expect("there");
    sim.set_bytes(&newest, [&bytes[..], b"half a batch"].concat());
    let answered = Answered { flushed: RaftIndex::new(1), written: true };
    Log::open(Arc::clone(&disk), Path::new(DIR), small_segments(), answered, NOW).expect("opens");
}

/// A log with checkpoints of the entries `applied`, one after another, written with these members.
fn with_checkpoints(applied: &[(u64, &'static [u8])]) -> (SimDisk, Arc<dyn Disk>, u64) {
    let (sim, disk, last) = simulated(40);
    let mut log = open(&disk, last).expect("opens");
    log.commit_to(RaftIndex::new(last));
    for (index, members) in applied {
        let members = Bytes::from_static(members);
        let checkpoint = log.new_checkpoint(RaftIndex::new(*index), members, Bytes::from_static(b"machine"));
        log.write_checkpoint(checkpoint).expect("written");
    }
    (sim, disk, last)
}

fn checkpoints(disk: &Arc<dyn Disk>) -> Vec<u64> {
    let number = |path: &PathBuf| path.file_stem()?.to_str()?.parse().ok();
    files(disk, ".state").iter().map(|path| number(path).expect("a number")).collect()
}

#[test]
fn rotten_checkpoints_and_manifests_are_told() {
    let (sim, disk, last) = with_checkpoints(&[(5, b""), (8, b"")]);
    let states = files(&disk, ".state");
    assert_eq!(checkpoints(&disk), [5, 8], "the one before the newest is kept, older ones are removed");
    sim.flip_bit(&states[0], 30, 0);
    sim.flip_bit(&states[1], 30, 0);
    let (_, detail) = quarantined(open(&disk, last));
    assert!(detail.contains("00000000000000000008.state"), "{detail}");
    assert_eq!(checkpoints(&disk), [5, 8], "nothing was changed");
    sim.flip_bit(&states[1], 30, 0);
    sim.flip_bit(&Path::new(DIR).join("replica"), 20, 0);
    quarantined(open(&disk, last));
}

#[test]
fn where_the_newest_checkpoint_is_rotten_the_one_before_it_is_begun_from() {
    let (sim, disk, last) = with_checkpoints(&[(5, b""), (8, b"")]);
    let all = reopened(&disk, last);
    sim.flip_bit(&files(&disk, ".state")[1], 30, 0);
    let log = open(&disk, 1).expect("opens");
    assert_eq!(log.checkpoint().applied, RaftIndex::new(5));
    assert_eq!(&log.checkpoint().machine[..], b"machine");
    assert_eq!((log.committed_index(), log.last_index().get()), (RaftIndex::new(5), last));
    assert_eq!(checkpoints(&disk), [5], "the rotten one is not taken for an older one later");
    drop(log);
    assert_eq!(reopened(&disk, 1), all);
}

#[test]
fn a_rotten_checkpoint_still_says_that_its_entries_were_flushed() {
    let (sim, disk, _) = with_checkpoints(&[(5, b""), (8, b"")]);
    sim.flip_bit(&files(&disk, ".state")[1], 30, 0);
    // Entry 8 is gone, and no hard state says that it was there.
    let segments = files(&disk, ".log");
    assert!(segments[1].ends_with("00000000000000000006-00000000000000000008.log"), "{segments:?}");
    sim.flip_bit(&segments[1], 100, 0);
    let (_, detail) = quarantined(open(&disk, 1));
    assert!(detail.contains("up to 8 were flushed"), "{detail}");
}

#[test]
fn a_checkpoint_that_knows_other_members_is_not_kept() {
    let (sim, disk, last) = with_checkpoints(&[(5, b"a, b, c"), (8, b"c, d, e")]);
    assert_eq!(checkpoints(&disk), [8]);
    // A crash may have kept it from being removed.
    let (_, other_disk, _) = with_checkpoints(&[(5, b"a, b, c")]);
    let old = files(&other_disk, ".state").pop().expect("there");
    let read = |path: &Path| other_disk.open(path, flowstone_storage::OpenMode::Read).expect("there");
    let mut bytes = vec![0; other_disk.file_len(&old).expect("there") as usize];
    read(&old).read_exact_at(&mut bytes, 0).expect("read");
    sim.set_bytes(&old, bytes);
    assert_eq!(checkpoints(&disk), [5, 8]);
    let log = open(&disk, last).expect("opens");
    assert_eq!((log.checkpoint().applied, log.spare_checkpoint()), (RaftIndex::new(8), None));
    assert_eq!(checkpoints(&disk), [8]);
}

#[test]
fn a_spare_checkpoint_outlives_a_restart_and_makes_way_for_retention() {
    let (_, disk, last) = with_checkpoints(&[(5, b""), (8, b"")]);
    let mut log = open(&disk, last).expect("opens");
    assert_eq!(log.spare_checkpoint(), Some(RaftIndex::new(5)));
    // Deleting what lies behind both of them leaves it; deleting what it would replay does not.
    log.commit_to(RaftIndex::new(last));
    let checkpoint = |log: &mut Log, offset: Offset, index: u64| {
        log.set_log_start(offset);
        let checkpoint = log.new_checkpoint(RaftIndex::new(index), Bytes::new(), Bytes::new());
        log.write_checkpoint(checkpoint).expect("written");
    };
    let start = log.entry_meta(RaftIndex::new(8)).expect("held").base_offset;
    checkpoint(&mut log, start, 9);
    assert_eq!(log.delete_segments_below_checkpoint().expect("deleted"), 1);
    assert_eq!((log.spare_checkpoint(), checkpoints(&disk)), (Some(RaftIndex::new(8)), vec![8, 9]));
    let start = log.entry_meta(RaftIndex::new(18)).expect("held").base_offset;
    checkpoint(&mut log, start, 20);
    assert_eq!(log.spare_checkpoint(), Some(RaftIndex::new(9)));
    assert_eq!(log.delete_segments_below_checkpoint().expect("deleted"), 2);
    assert_eq!((log.spare_checkpoint(), checkpoints(&disk)), (None, vec![20]));
}

#[test]
fn begun_from_the_older_checkpoint_a_log_starts_where_its_files_do() {
    let (sim, disk, last) = with_checkpoints(&[(8, b"")]);
    let mut log = open(&disk, last).expect("opens");
    log.commit_to(RaftIndex::new(last));
    let start = log.entry_meta(RaftIndex::new(8)).expect("held").base_offset;
    log.set_log_start(start);
    let checkpoint = log.new_checkpoint(RaftIndex::new(9), Bytes::new(), Bytes::new());
    log.write_checkpoint(checkpoint).expect("written");
    assert_eq!(log.delete_segments_below_checkpoint().expect("deleted"), 1);
    let first = log.first_offset();
    drop(log);
    sim.flip_bit(&files(&disk, ".state")[1], 30, 0);
    let mut log = open(&disk, last).expect("opens");
    assert_eq!((log.checkpoint().applied, log.checkpoint().log_start), (RaftIndex::new(8), Offset::ZERO));
    assert_eq!(log.log_start(), first);
    assert!(matches!(log.read(Offset::ZERO, 1), Err(ReadError::OutOfRange { .. })));
    log.commit_to(log.last_index());
    read_all(&mut log).expect("reads");
}

#[test]
fn a_newer_format_is_told() {
    let (sim, disk, last) = simulated(1);
    let path = Path::new(DIR).join("replica");
    let mut bytes = sim.bytes(&path).expect("there");
    bytes[8] = 9;
    let covered = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..covered]);
    bytes[covered..].copy_from_slice(&crc.to_le_bytes());
    sim.set_bytes(&path, bytes);
    let opened = open(&disk, last);
    assert!(matches!(opened, Err(OpenError::NewerFormat { found: 9, known: 1, .. })), "{opened:?}");
}

#[test]
fn a_segment_can_be_looked_at() {
    let (sim, disk, last) = simulated(3);
    let path = files(&disk, ".log").remove(0);
    let mut segment = SegmentInspector::open(&disk, &path).expect("opens");
    let batches: Vec<_> = segment.by_ref().map(|batch| batch.expect("readable")).collect();
    assert_eq!(batches.len() as u64, last - 1);
    assert_eq!(batches[0].control, Some(ControlType::NoOp));
    assert_eq!(batches[3].header.base_offset, Offset::new(3));
    assert!(matches!(segment.end(), Some(InspectedEnd::Clean { zeros, .. }) if *zeros > 0), "{:?}", segment.end());
    sim.flip_bit(&path, batches[2].position + 80, 0);
    let mut segment = SegmentInspector::open(&disk, &path).expect("opens");
    assert_eq!(segment.by_ref().count(), 2);
    let Some(InspectedEnd::Bad { position, detail }) = segment.end() else { panic!("{:?}", segment.end()) };
    assert!(*position == batches[2].position && detail.contains("CRC"), "{detail}");
    assert!(SegmentInspector::open(&disk, Path::new("/data/replica/replica")).is_err());
}

// ---- the file system ----

#[test]
fn no_file_descriptors_is_an_error_that_passes() {
    let (sim, disk, last) = simulated(10);
    for go_well in 0..6 {
        sim.fail(Operation::Open, go_well);
        match open(&disk, last) {
            Err(error @ OpenError::Io { .. }) => assert!(error.to_string().contains("ulimit"), "{error}"),
            // Opened with fewer than so many, or what failed is rebuilt.
            Ok(log) => assert_eq!(log.last_index().get(), last),
            Err(error) => panic!("{error}"),
        }
        sim.cancel_faults();
    }
    assert_eq!(open(&disk, last).expect("opens").last_index().get(), last);
}

#[test]
fn no_file_descriptor_for_a_new_segment_refuses_and_poisons_nothing() {
    let (sim, disk, last) = simulated(4);
    let mut log = open(&disk, last).expect("opens");
    sim.fail(Operation::Open, 0);
    let refused = log.reserve(5_000);
    assert!(matches!(refused, Err(StorageError::Io { action: "create", .. })), "{refused:?}");
    assert!(!log.is_poisoned());
    log.reserve(5_000).expect("the next time there is one");
    let entry = entry(&log, 1);
    log.append(&[entry], NOW).expect("appended");
}

#[test]
fn a_read_only_file_system_is_told_with_what_to_do() {
    let (sim, disk, last) = simulated(10);
    sim.set_read_only(true);
    let error = open(&disk, last).expect_err("cannot open");
    assert!(matches!(error, OpenError::Io { .. }), "{error:?}");
    assert!(error.to_string().contains("remount"), "{error}");
    sim.set_read_only(false);
    let mut log = open(&disk, last).expect("opens");
    sim.set_read_only(true);
    let entry = entry(&log, 1);
    assert!(log.append(&[entry], NOW).is_err());
    assert!(log.is_poisoned());
}

#[test]
fn a_full_disk_refuses_before_anything_is_proposed_and_recovers() {
    let (sim, disk, last) = simulated(10);
    let config = LogConfig { segment_bytes: 100_000, room_kept_bytes: 20_000, ..LogConfig::default() };
    let mut log = Log::open(disk, Path::new(DIR), config, RaftIndex::new(last), NOW).expect("opens");
    log.commit_to(RaftIndex::new(last));
    sim.set_bytes_max(Some(sim.used_bytes() + 60_000));
    let mut appended = 0;
    let error = loop {
        match log.reserve(1_000) {
            Ok(()) => {
                let entry = entry(&log, 1);
                log.append(&[entry], NOW).expect("what was reserved has room");
                appended += 1;
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StorageError::DiskFull { .. }) && error.is_disk_full(), "{error}");
    assert!(error.to_string().contains("retention"), "it says what to do: {error}");
    assert!(appended > 30 && !log.is_poisoned());
    assert!(log.reserve(1_000).is_err(), "still full");
    // What frees room has room of its own.
    log.reserve_privileged(200).expect("the room that was kept");
    let payload = flowstone_protocol::control::log_start_payload(log.high_watermark());
    let control = EntryBody::Control { ctype: ControlType::LogStart, payload };
    let index = log.last_index().next();
    log.append(&[LogEntry { index, term: Term::new(2), body: control }], NOW).expect("appended");
    log.flush().expect("flushed");
    let log_start = log.high_watermark();
    log.commit_to(index);
    log.set_log_start(log_start);
    let checkpoint = log.new_checkpoint(index, Bytes::new(), Bytes::new());
    log.write_checkpoint(checkpoint).expect("a checkpoint has room");
    assert!(log.delete_segments_below_checkpoint().expect("deleted") > 0);
    sim.set_bytes_max(Some(sim.used_bytes() + 60_000));
    log.reserve(1_000).expect("there is room again");
}

#[test]
fn a_failed_flush_is_never_retried() {
    let (sim, disk, last) = simulated(4);
    let mut log = open(&disk, last).expect("opens");
    let first = entry(&log, 1);
    log.append(&[first], NOW).expect("appended");
    sim.fail(Operation::Sync, 0);
    let job = log.flush_job().expect("something to flush");
    assert!(log.flush_job().is_none(), "one in flight");
    let error = log.flush_done(job.run()).expect_err("it failed");
    assert!(matches!(error, StorageError::Io { action: "flush", .. }));
    assert_eq!(log.flushed_index().get(), last, "nothing was acknowledged");
    let second = entry(&log, 2);
    assert!(matches!(log.append(&[second], NOW), Err(StorageError::Poisoned { .. })));
    assert!(matches!(log.reserve(1), Err(StorageError::Poisoned { .. })));
    assert!(matches!(log.flush(), Err(StorageError::Poisoned { .. })));
    assert!(log.flush_job().is_none());
    // Opened anew, the entry that the page cache still has is written again, so that a power failure cannot take it.
    drop(log);
    sim.restart(Crash::Process);
    let log = open(&disk, last).expect("opens");
    assert_eq!(log.last_index().get(), last + 1);
    drop(log);
    sim.restart(Crash::Power);
    assert_eq!(open(&disk, last + 1).expect("opens").last_index().get(), last + 1);
}

// ---- entries ----

#[test]
fn entries_that_cannot_be_part_of_the_log_are_refused_and_poison_nothing() {
    let (_, disk, last) = simulated(2);
    let mut log = open(&disk, last).expect("opens");
    let index = log.last_index().next();
    let two_batches = Bytes::from([batch(1), batch(2)].concat());
    let control = flowstone_protocol::control::encode_control(
        ControlType::ProducerExpiry,
        Term::new(2),
        index,
        log.end_offset(),
        &[],
        1,
    );
    for (term, body, why) in [
        (1, EntryBody::Batch(batch(1)), "below"),
        (3, EntryBody::Batch(batch(1)), "no-op"),
        (1 << 31, EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() }, "above"),
        (2, EntryBody::Batch(two_batches), "a batch of"),
        (2, EntryBody::Batch(batch(1).slice(..100)), "a batch of"),
        (2, EntryBody::Batch(Bytes::from_static(b"no batch")), "cut short"),
        (2, EntryBody::Batch(control), "control"),
    ] {
        let refused = log.append(&[LogEntry { index, term: Term::new(term), body }], NOW);
        let Err(StorageError::Refused { index: at, detail }) = refused else { panic!("{why}: {refused:?}") };
        assert!(at == index && detail.contains(why), "{detail}");
    }
    // One that was stamped elsewhere must have been stamped the same.
    let stamped = LogEntry { index, term: Term::new(2), body: EntryBody::Batch(batch(1)) };
    assert!(matches!(log.append_stamped(std::slice::from_ref(&stamped), NOW), Err(StorageError::Refused { .. })));
    log.append(&[stamped], NOW).expect("nothing is poisoned");
    let stored = log.stored_batch(index).expect("there");
    log.truncate_from(index).expect("cut");
    let again = LogEntry { index, term: Term::new(2), body: EntryBody::Batch(stored) };
    log.append_stamped(&[again], NOW).expect("it agrees");
}

// ---- retention ----

#[test]
fn retention_by_bytes_and_time_goes_by_whole_committed_segments() {
    let (_, disk, last) = simulated(40);
    let mut log = open(&disk, last).expect("opens");
    let none = RetentionConfig::default();
    let by_bytes = |bytes| RetentionConfig { bytes: Some(bytes), ..none };
    let by_time = |seconds| RetentionConfig { time: Some(std::time::Duration::from_secs(seconds)), ..none };
    let later = NOW.after(std::time::Duration::from_secs(100));
    assert_eq!(log.retention_target(&by_bytes(0), later), None, "nothing is committed");
    log.commit_to(RaftIndex::new(last));
    assert_eq!(log.retention_target(&none, later), None);
    assert!(log.may_retain(later), "it has closed segments");
    assert_eq!(log.retention_target(&by_time(100), later), None, "exactly that old is kept");
    let all_sealed = log.retention_target(&by_time(99), later).expect("all are older");
    assert_eq!(log.retention_target(&by_bytes(0), later), Some(all_sealed));
    assert_eq!(log.retention_target(&by_bytes(log.size_bytes()), later), None);
    let target = log.retention_target(&by_bytes(log.size_bytes() - 1_000), later).expect("one segment");
    log.set_log_start(target);
    assert_eq!(log.log_start(), target);
    assert_eq!(log.delete_segments_below_checkpoint().expect("deleted"), 0, "no durable checkpoint says so");
    let checkpoint = log.new_checkpoint(RaftIndex::new(last), Bytes::new(), Bytes::new());
    log.write_checkpoint(checkpoint).expect("written");
    let before = files(&disk, ".log").len();
    assert_eq!(log.delete_segments_below_checkpoint().expect("deleted"), 1);
    assert_eq!(files(&disk, ".log").len(), before - 1);
    assert!(matches!(log.read(Offset::ZERO, 1), Err(ReadError::OutOfRange { log_start, .. }) if log_start == target));
    drop(log);
    let log = open(&disk, last).expect("opens");
    assert_eq!(log.log_start(), target);
    assert_eq!(log.term_at(RaftIndex::new(log.first_index().get() - 1)), Some(Term::new(2)));
}

#[test]
fn a_segment_is_closed_when_it_is_old() {
    let sim = SimDisk::new(1);
    let disk = sim.shared();
    let mut log = filled(&disk, 1);
    log.set_config(LogConfig { segment_age: Some(std::time::Duration::from_secs(10)), ..LogConfig::default() });
    assert!(!log.may_retain(NOW.after(std::time::Duration::from_secs(9))), "there is nothing to be looked at");
    assert!(log.may_retain(NOW.after(std::time::Duration::from_secs(10))));
    assert!(log.may_retain(Timestamp::new(NOW.get() - 1)), "the clock was ahead");
    assert_eq!(log.roll_if_due(NOW.after(std::time::Duration::from_secs(9))).ok(), Some(false));
    assert_eq!(log.roll_if_due(NOW.after(std::time::Duration::from_secs(10))).ok(), Some(true));
    assert_eq!(
        log.roll_if_due(NOW.after(std::time::Duration::from_secs(99))).ok(),
        Some(false),
        "an empty one is not old"
    );
    assert_eq!(files(&disk, ".log").len(), 2);
}

// ---- the data directory, on a real disk ----

fn real() -> (tempfile::TempDir, Arc<dyn Disk>) {
    (tempfile::tempdir().expect("a folder"), Arc::new(RealDisk::new(64)))
}

fn open_dir(disk: &Arc<dyn Disk>, path: &Path) -> Result<DataDir, DataDirError> {
    DataDir::open_or_create(Arc::clone(disk), path, DirectoryId::new(42), 4)
}

#[test]
fn a_data_directory_is_made_once_and_known_again() {
    let (folder, disk) = real();
    let path = folder.path().join("a/b");
    let mut dir = open_dir(&disk, &path).expect("made");
    assert_eq!((dir.id(), dir.cluster(), dir.stripes()), (DirectoryId::new(42), None, 4));
    dir.set_cluster(ClusterId::new(9)).expect("noted");
    let partition = TopicPartition::new(TopicId::new(5), PartitionId::new(3));
    let stripe = dir.stripe_of(partition);
    Log::create(&disk, &dir.replica_dir(partition), identity(), Bytes::new()).expect("created");
    drop(dir);
    let mut dir = DataDir::open_or_create(Arc::clone(&disk), &path, DirectoryId::new(1), 16).expect("opens");
    assert_eq!((dir.id(), dir.cluster(), dir.stripes()), (DirectoryId::new(42), Some(ClusterId::new(9)), 4));
    assert_eq!(dir.stripe_of(partition), stripe);
    assert_eq!(dir.replicas().expect("listed"), [partition]);
    let refused = dir.set_cluster(ClusterId::new(10));
    assert!(matches!(refused, Err(DataDirError::OtherCluster { .. })), "{refused:?}");
    dir.remove_replica(partition).expect("removed");
    dir.remove_replica(partition).expect("gone already");
    assert_eq!(dir.replicas().expect("listed"), []);
}

#[test]
fn a_data_directory_in_use_is_told() {
    let (folder, disk) = real();
    let dir = open_dir(&disk, folder.path()).expect("made");
    let error = open_dir(&disk, folder.path()).expect_err("in use");
    assert!(matches!(error, DataDirError::Locked { .. }) && error.to_string().contains("another broker"), "{error}");
    drop(dir);
    open_dir(&disk, folder.path()).expect("free again");
}

#[test]
fn a_data_directory_of_a_newer_format_is_told() {
    let (folder, disk) = real();
    drop(open_dir(&disk, folder.path()).expect("made"));
    let path = folder.path().join("manifest");
    let mut bytes = std::fs::read(&path).expect("there");
    bytes[8] = 2;
    let covered = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..covered]);
    bytes[covered..].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&path, &bytes).expect("written");
    let error = open_dir(&disk, folder.path()).expect_err("newer");
    assert!(matches!(error, DataDirError::Newer { found: 2, known: 1, .. }), "{error}");
    bytes[20] ^= 1;
    std::fs::write(&path, &bytes).expect("written");
    let error = open_dir(&disk, folder.path()).expect_err("rotten");
    assert!(matches!(error, DataDirError::Damaged { .. }), "{error}");
}

#[test]
fn a_data_directory_that_cannot_be_written_is_told() {
    let sim = SimDisk::new(1);
    let disk = sim.shared();
    disk.create_dir_all(Path::new("/data")).expect("a folder");
    sim.set_read_only(true);
    let error = open_dir(&disk, Path::new("/data")).expect_err("read-only");
    assert!(matches!(error, DataDirError::NotWritable { .. }) && error.to_string().contains("right"), "{error}");
}

#[test]
fn a_folder_of_something_else_is_not_taken_over() {
    let (folder, disk) = real();
    std::fs::write(folder.path().join("thesis.tex"), "...").expect("written");
    let error = open_dir(&disk, folder.path()).expect_err("not empty");
    assert!(matches!(error, DataDirError::NotEmpty { .. }) && error.to_string().contains("thesis.tex"), "{error}");
}

#[test]
fn making_a_data_directory_survives_a_crash_at_any_point() {
    for seed in 0..200 {
        let sim = SimDisk::new(seed);
        let disk = sim.shared();
        let path = Path::new("/data");
        sim.crash_after(seed % 50);
        let made = open_dir(&disk, path).map(|dir| dir.id());
        let crashed = sim.is_crashed();
        sim.restart(if seed % 2 == 0 { Crash::Power } else { Crash::Process });
        let dir = open_dir(&disk, path).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert!(crashed || made.is_ok());
        for stripe in 0..4 {
            let (_, _, rot) = flowstone_storage::HardStateFile::open(Arc::clone(&disk), &dir.hard_state_dir(), stripe)
                .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert_eq!(rot, None, "seed {seed}, stripe {stripe}");
        }
    }
}

#[test]
fn making_a_replica_survives_a_crash_at_any_point() {
    let mut whole = 0;
    for seed in 0..200 {
        let sim = SimDisk::new(seed);
        let disk = sim.shared();
        sim.crash_after(seed % 20);
        let made = Log::create(&disk, Path::new(DIR), identity(), Bytes::new());
        let crashed = sim.is_crashed();
        sim.restart(if seed % 2 == 0 { Crash::Power } else { Crash::Process });
        let exists = Log::exists(&disk, Path::new(DIR)).expect("known");
        assert!(made.is_err() || exists || crashed, "seed {seed}: what was made is there");
        if !exists {
            Log::create(&disk, Path::new(DIR), identity(), Bytes::new()).expect("made anew");
        }
        whole += u64::from(exists);
        assert_eq!(open(&disk, 1).expect("opens").last_index(), RaftIndex::new(1), "seed {seed}");
        let again = Log::create(&disk, Path::new(DIR), identity(), Bytes::new());
        assert!(
            matches!(again, Err(StorageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::AlreadyExists)
        );
    }
    assert!(whole > 20 && whole < 190, "{whole}");
}

// ---- the real disk ----

#[test]
fn a_log_on_a_real_disk_with_few_descriptors() {
    let (folder, _) = real();
    let real = RealDisk::new(8);
    let disk: Arc<dyn Disk> = Arc::new(real.clone());
    let mut logs = Vec::new();
    for number in 0..40 {
        let dir = folder.path().join(number.to_string());
        Log::create(&disk, &dir, identity(), Bytes::new()).expect("a new log");
        let config = small_segments();
        let mut log = Log::open(Arc::clone(&disk), &dir, config, RaftIndex::new(1), NOW).expect("opens");
        let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
        log.append(&[LogEntry { index: RaftIndex::new(2), term: Term::new(2), body: no_op }], NOW).expect("appended");
        log.flush().expect("flushed: what is not stays open");
        logs.push(log);
    }
    for value in 1..20 {
        for log in &mut logs {
            let entry = entry(log, value);
            log.reserve(entry.data_bytes()).expect("room");
            log.append(&[entry], NOW).expect("appended");
            log.flush().expect("flushed");
            log.commit_to(log.last_index());
        }
        assert!(real.open_files() <= 12, "{} files are open", real.open_files());
    }
    let all: Vec<_> = logs.iter_mut().map(|log| read_all(log).expect("reads")).collect();
    assert!(all.iter().all(|bytes| *bytes == all[0] && !bytes.is_empty()));
    for (number, log) in logs.into_iter().enumerate() {
        let last = log.close().expect("closes");
        let dir = folder.path().join(number.to_string());
        let mut log = Log::open(Arc::clone(&disk), &dir, small_segments(), last, NOW).expect("opens");
        log.commit_to(last);
        assert_eq!(read_all(&mut log).expect("reads"), all[0]);
    }
}

#[test]
fn a_clean_close_cuts_the_zeros() {
    let (folder, disk) = real();
    let dir = folder.path().join("replica");
    Log::create(&disk, &dir, identity(), Bytes::new()).expect("a new log");
    let config = LogConfig::default();
    let mut log = Log::open(Arc::clone(&disk), &dir, config, RaftIndex::new(1), NOW).expect("opens");
    let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
    log.append(&[LogEntry { index: RaftIndex::new(2), term: Term::new(2), body: no_op }], NOW).expect("appended");
    let segment = dir.join("00000000000000000000-00000000000000000002.log");
    let bytes = log.size_bytes();
    assert!(std::fs::metadata(&segment).expect("there").len() > bytes, "zeros are written ahead");
    log.close().expect("closes");
    assert_eq!(std::fs::metadata(&segment).expect("there").len(), bytes);
}

// ---- what only a hostile disk shows ----

#[test]
fn every_entry_above_the_checkpoint_is_checked_when_opened() {
    // In an earlier segment and in the last: both are replayed, and nobody else looks at a CRC of what is replayed.
    for batches in [4, 150] {
        let sim = SimDisk::new(7);
        let disk = sim.shared();
        let config = LogConfig { segment_bytes: 1 << 20, segment_batches_max: 140, ..small_segments() };
        Log::create(&disk, Path::new(DIR), identity(), Bytes::new()).expect("a new log");
        let open = |flushed| Log::open(Arc::clone(&disk), Path::new(DIR), config.clone(), RaftIndex::new(flushed), NOW);
        let mut log = open(1).expect("opens");
        let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
        log.append(&[LogEntry { index: RaftIndex::new(2), term: Term::new(2), body: no_op }], NOW).expect("appended");
        for value in 1..=batches {
            let entry = entry(&log, value);
            log.append(&[entry], NOW).expect("appended");
        }
        log.flush().expect("flushed");
        let last = log.last_index().get();
        log.close().expect("closed");
        open(last).expect("opens");
        // The producer's id of the second batch.
        let first = files(&disk, ".log").remove(0);
        let position = SegmentInspector::open(&disk, &first).expect("a segment").nth(1).expect("there").expect("there");
        sim.flip_bit(&first, position.position + 50, 3);
        let (offset, _) = quarantined(open(last));
        assert_eq!(offset, Offset::new(1), "{batches} batches");
    }
}

#[test]
fn descriptors_stay_below_their_cap_however_often_a_log_rolls() {
    let folder = tempfile::tempdir().expect("a folder");
    let real = RealDisk::new(16);
    let disk: Arc<dyn Disk> = Arc::new(real.clone());
    let dir = folder.path().join("replica");
    Log::create(&disk, &dir, identity(), Bytes::new()).expect("a new log");
    let mut log = Log::open(Arc::clone(&disk), &dir, small_segments(), RaftIndex::new(1), NOW).expect("opens");
    let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
    log.append(&[LogEntry { index: RaftIndex::new(2), term: Term::new(2), body: no_op }], NOW).expect("appended");
    for value in 1..=250 {
        let entry = entry(&log, value);
        log.append(&[entry], NOW).expect("appended");
        log.flush().expect("flushed");
        log.commit_to(log.last_index());
    }
    // Every segment's index is looked at.
    for back in 1..=250 {
        found(log.find_records_from_end(back));
    }
    assert!(real.open_files() <= 16, "{} files are open", real.open_files());
}

fn found(lookup: Result<Lookup, ReadError>) -> Option<FoundRecord> {
    match lookup.expect("looked up") {
        Lookup::Found(found) => found,
        Lookup::Ticket(ticket) => ticket.run().expect("looked up"),
    }
}

#[test]
fn a_roll_that_nobody_needs_may_fail() {
    let sim = SimDisk::new(7);
    let disk = sim.shared();
    drop(filled(&disk, 2));
    let config =
        LogConfig { segment_age: Some(std::time::Duration::from_secs(10)), segment_bytes: 1 << 20, ..small_segments() };
    let mut log = Log::open(disk, Path::new(DIR), config, RaftIndex::new(4), NOW).expect("opens");
    let later = NOW.after(std::time::Duration::from_secs(60));
    sim.fail(Operation::Create, 0);
    let entry = entry(&log, 9);
    log.append(&[entry], later).expect("the old segment takes it");
    assert!(!log.is_poisoned());
    assert_eq!(files(&sim.shared(), ".log").len(), 1);
    sim.fail(Operation::Create, 0);
    assert_eq!(log.roll_if_due(later).ok(), Some(false));
    assert_eq!(log.roll_if_due(later).ok(), Some(true), "tried again");
}

#[test]
fn a_clock_that_was_ahead_does_not_keep_a_segment_open() {
    let disk = SimDisk::new(7).shared();
    Log::create(&disk, Path::new(DIR), identity(), Bytes::new()).expect("a new log");
    let age = std::time::Duration::from_secs(10);
    let config = LogConfig { segment_age: Some(age), segment_bytes: 1 << 20, ..small_segments() };
    let mut log = Log::open(disk, Path::new(DIR), config, RaftIndex::new(1), NOW).expect("opens");
    let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
    let ahead = NOW.after(std::time::Duration::from_secs(1_000_000));
    log.append(&[LogEntry { index: RaftIndex::new(2), term: Term::new(2), body: no_op }], ahead).expect("appended");
    assert_eq!(log.roll_if_due(NOW).ok(), Some(false), "the clock was corrected: it is young from now on");
    assert_eq!(log.roll_if_due(NOW.after(age)).ok(), Some(true));
}

#[test]
fn a_lookup_that_would_wait_becomes_a_ticket_and_a_rotten_segment_is_walked_once() {
    let (sim, disk, last) = checkpointed(40);
    let mut log = open(&disk, last).expect("opens");
    log.commit_to(RaftIndex::new(last));
    sim.set_cold(true);
    // Nothing is known of the first segment's batches: whoever may wait looks.
    assert!(matches!(log.read(Offset::new(2), 1), Ok(Read::Ticket(_))));
    assert!(matches!(log.find_timestamp(NOW), Ok(Lookup::Ticket(_))));
    assert!(matches!(log.find_records_from_end(39), Ok(Lookup::Ticket(_))));
    assert_eq!(found(log.find_timestamp(NOW)), Some(FoundRecord { offset: Offset::new(1), timestamp: NOW }));
    assert_eq!(found(log.find_records_from_end(39)).map(|record| record.offset), Some(Offset::new(2)));
    // What all segments' latest timestamps say is known without looking.
    assert!(matches!(log.find_timestamp(NOW.after(std::time::Duration::from_secs(1))), Ok(Lookup::Found(None))));
    drop(log);

    // An index that is gone is rebuilt by the ticket; where the segment is rotten too, once.
    let sealed = files(&disk, ".log")[1].clone();
    let base: i64 =
        sealed.file_name().and_then(|name| name.to_str()).expect("a name")[..20].parse().expect("an offset");
    let mut log = open(&disk, last).expect("opens");
    log.commit_to(RaftIndex::new(last));
    disk.remove_file(&sealed.with_extension("index")).expect("removed");
    sim.flip_bit(&sealed, 100, 3);
    let read = |log: &mut Log| match log.read(Offset::new(base), 1) {
        Ok(Read::Ticket(ticket)) => ticket.run().map(|_| ()),
        Ok(Read::Bytes(_)) => Ok(()),
        Err(error) => Err(error),
    };
    assert!(matches!(read(&mut log), Err(ReadError::Corrupt { .. })));
    // From now on it fails without reading: the file may be gone.
    disk.remove_file(&sealed).expect("removed");
    assert!(matches!(log.read(Offset::new(base), 1), Err(ReadError::Corrupt { .. })));
}

#[test]
fn a_lookup_in_a_segment_that_was_cut_or_deleted_writes_nothing() {
    let (_, disk, last) = checkpointed(40);
    let mut log = open(&disk, last).expect("opens");
    log.commit_to(RaftIndex::new(last));
    let index = files(&disk, ".index")[0].clone();
    disk.remove_file(&index).expect("removed");
    let Ok(Read::Ticket(ticket)) = log.read(Offset::new(1), 1) else { panic!("a ticket") };
    let end = log.high_watermark();
    log.set_log_start(end);
    let entry = entry(&log, 41);
    log.append(&[entry], NOW).expect("appended");
    log.flush().expect("flushed");
    log.commit_to(log.last_index());
    for _ in 0..2 {
        let checkpoint = log.new_checkpoint(log.last_index(), Bytes::new(), Bytes::new());
        log.write_checkpoint(checkpoint).expect("written");
        let entry = self::entry(&log, 42);
        log.append(&[entry], NOW).expect("appended");
        log.flush().expect("flushed");
        log.commit_to(log.last_index());
    }
    assert!(log.delete_segments_below_checkpoint().expect("deleted") > 0);
    assert!(ticket.run().is_err(), "its bytes are gone");
    assert!(!disk.exists(&index).expect("known"), "an index of a segment that is gone");
}

#[test]
fn a_replica_that_was_created_is_not_lost_with_a_folder_above_it() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..200 {
        let sim = SimDisk::new(seed);
        let disk = sim.shared();
        let path = Path::new("/mnt/disk/data");
        sim.set_loses_dirs(true);
        let open_dir = || DataDir::open_or_create(sim.shared(), path, DirectoryId::new(7), 2);
        // Killed anywhere while both are made; what is there afterwards was told to be there.
        sim.crash_after(seed % 60);
        let make =
            |dir: &DataDir| Log::create(&disk, &dir.replica_dir(identity().topic_partition), identity(), Bytes::new());
        let _ = open_dir().map(|dir| make(&dir));
        sim.cancel_crash();
        sim.restart(Crash::Process);
        let dir = open_dir().expect("opens or begins again");
        let replica = dir.replica_dir(identity().topic_partition);
        let exists = Log::exists(&disk, &replica).expect("known");
        if exists {
            Log::open(Arc::clone(&disk), &replica, small_segments(), RaftIndex::new(1), NOW).expect("opens");
        }
        drop(dir);
        sim.restart(Crash::Power);
        lost += sim.counts().dirs_lost;
        if exists {
            kept += 1;
            assert!(Log::exists(&disk, &replica).expect("known"), "seed {seed}: a whole replica is gone");
        }
        assert_eq!(open_dir().expect("opens").id(), DirectoryId::new(7), "seed {seed}");
    }
    assert!(lost > 0 && kept > 0, "{lost} folders lost, {kept} replicas made");
}

#[test]
fn partitions_of_a_topic_are_removed_and_made_at_the_same_time() {
    let folder = tempfile::tempdir().expect("a folder");
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(64));
    let dir = DataDir::open_or_create(Arc::clone(&disk), folder.path(), DirectoryId::new(7), 1).expect("made");
    let topic = TopicId::new(9);
    std::thread::scope(|threads| {
        for number in 0..4 {
            let (dir, disk) = (&dir, &disk);
            threads.spawn(move || {
                let partition = TopicPartition::new(topic, PartitionId::new(number));
                for _ in 0..50 {
                    disk.create_dir_all(&dir.replica_dir(partition)).expect("made");
                    dir.remove_replica(partition).expect("removed");
                }
            });
        }
    });
    assert!(dir.replicas().expect("listed").is_empty());
}
