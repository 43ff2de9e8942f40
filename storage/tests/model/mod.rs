//! The log against a naive model of it: random operations over a simulated disk that tears, forgets and fails, crashes
//! at any point, and reopening.
//!
//! After each crash the log must hold every entry that was reported as flushed, then nothing or a whole prefix of what
//! was written after, byte for byte; and the newest checkpoint that was reported as written, or a later one.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::batch::stamped_prefix;
use flowstone_protocol::control::{CONTROL_FORMAT_VERSION, encode_control};
use flowstone_protocol::{
    Compression, ControlType, LeaderEpoch, Offset, PartitionId, RaftIndex, RecordBatchBuilder, ReplicaId, Term,
    Timestamp, TopicId, TopicPartition,
};
use flowstone_storage::sim_disk::{Crash, Operation, SimCounts};
use flowstone_storage::{
    Checkpoint, Disk, EntryBody, FlushJob, FoundRecord, Log, LogConfig, LogEntry, Lookup, OpenError, Read, ReadError,
    RecordCount, ReplicaIdentity, SimDisk, StorageError,
};

/// What a run went through: a run in which one of these is zero has tested little.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) operations: u64,
    pub(crate) appends: u64,
    pub(crate) entries: u64,
    pub(crate) truncations: u64,
    pub(crate) flushes: u64,
    pub(crate) flushes_failed: u64,
    pub(crate) writes_failed: u64,
    pub(crate) disk_full: u64,
    pub(crate) rolls: u64,
    pub(crate) reads: u64,
    pub(crate) tickets: u64,
    pub(crate) lookups: u64,
    pub(crate) lookups_by_ticket: u64,
    pub(crate) checkpoints: u64,
    pub(crate) segments_deleted: u64,
    pub(crate) reopened_clean: u64,
    pub(crate) reopened_after_kill: u64,
    pub(crate) reopened_after_power_failure: u64,
    /// Crashes in the middle of an operation of the disk, opening included.
    pub(crate) crashed_within: u64,
    pub(crate) crashed_while_opening: u64,
    pub(crate) entries_lost: u64,
    /// The newest checkpoint was rotten, and the one before it was begun from; or was of no use.
    pub(crate) fell_back: u64,
    pub(crate) spares_useless: u64,
    pub(crate) disk: SimCounts,
}

/// Small and deterministic.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

#[derive(Clone, Debug)]
struct ModelEntry {
    term: u64,
    body: EntryBody,
    /// The batch as it must be stored.
    stored: Bytes,
    base: i64,
    end: i64,
    /// Data records: offset and timestamp.
    records: Vec<(i64, i64)>,
}

/// The log as it should be. Entry 0 and 1 stand for the group's creation; entry `n` is `entries[n]`.
struct Model {
    entries: Vec<ModelEntry>,
    committed: u64,
    flushed: u64,
    log_start: i64,
    /// Where the log began when it was opened.
    first_offset: i64,
    /// Checkpoints of which the newest is one that may be found: one, or two while one is written.
    checkpoints: Vec<(u64, i64)>,
    /// Those before them, oldest first: the newest of them may be kept.
    older: Vec<(u64, i64)>,
    /// What the hard state says was flushed: never above what was.
    hard_state: u64,
    /// Everything below was dropped from the model's memory (the log may still have it).
    forgotten: u64,
}

impl Model {
    fn last(&self) -> u64 {
        self.entries.len() as u64 - 1
    }

    fn entry(&self, index: u64) -> &ModelEntry {
        &self.entries[index as usize]
    }

    fn high_watermark(&self) -> i64 {
        self.entry(self.committed).end
    }
}

/// One run: a log, its model, its disk.
pub(crate) struct Run {
    random: Random,
    disk: SimDisk,
    dir: PathBuf,
    config: LogConfig,
    log: Option<Log>,
    model: Model,
    flush: Option<(FlushJob, u64)>,
    now: i64,
    trace: VecDeque<(u64, u64, i64, u64, u64, u64, i64)>,
    /// Faults that came before this operation.
    faults_before: u64,
    /// Whether the newest checkpoint was made rotten since the log was open.
    spoiled: bool,
    pub(crate) counts: Counts,
}

const REPLICA: u64 = 77;

fn identity() -> ReplicaIdentity {
    ReplicaIdentity {
        replica: ReplicaId::new(REPLICA),
        topic_partition: TopicPartition::new(TopicId::new(5), PartitionId::new(3)),
        feature_level: 1,
    }
}

/// Makes the replica, through crashes: once it is made, it is there to stay, with every folder above it.
fn create(disk: &SimDisk, dir: &Path, random: &mut Random) {
    for _ in 0..100 {
        let power = if random.one_in(2) { Crash::Power } else { Crash::Process };
        disk.crash_after(random.below(40));
        let is_made = match Log::exists(&disk.shared(), dir) {
            // By a life that was killed: opening makes it durable.
            Ok(true) => {
                Log::open(disk.shared(), dir, LogConfig::default(), RaftIndex::new(1), Timestamp::new(0)).is_ok()
            }
            _ => Log::create(&disk.shared(), dir, identity(), Bytes::from_static(b"members")).is_ok(),
        };
        assert!(is_made || disk.is_crashed(), "it cannot be made");
        disk.cancel_crash();
        disk.restart(power);
        if is_made {
            assert!(Log::exists(&disk.shared(), dir).expect("asked"), "made, and lost");
            return;
        }
    }
    panic!("it is never made");
}

/// Runs `operations` random operations; panics where log and model differ, naming seed and operation.
pub(crate) fn run(seed: u64, operations: u64) -> Counts {
    let mut run = Run::new(seed);
    for number in 0..operations {
        run.counts.operations += 1;
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.operation()));
        if let Err(panic) = result {
            run.print_trace();
            eprintln!("log and model differ: seed {seed}, operation {number}");
            std::panic::resume_unwind(panic);
        }
    }
    run.counts.disk = run.disk.counts();
    run.counts
}

impl Run {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let disk = SimDisk::new(random.next());
        let dir = PathBuf::from("/data/topics/5/3");
        disk.shared().create_dir_all(Path::new("/data/topics")).expect("a folder");
        disk.set_loses_dirs(true);
        create(&disk, &dir, &mut random);
        let creation = ModelEntry {
            term: 1,
            body: EntryBody::Batch(Bytes::new()),
            stored: Bytes::new(),
            base: 0,
            end: 0,
            records: Vec::new(),
        };
        let mut run = Self {
            config: LogConfig::default(),
            disk,
            dir,
            log: None,
            model: Model {
                entries: vec![ModelEntry { term: 0, ..creation.clone() }, creation],
                committed: 1,
                flushed: 1,
                log_start: 0,
                first_offset: 0,
                checkpoints: vec![(1, 0)],
                older: Vec::new(),
                hard_state: 1,
                forgotten: 2,
            },
            flush: None,
            now: 1_700_000_000_000,
            trace: VecDeque::new(),
            faults_before: 0,
            spoiled: false,
            counts: Counts::default(),
            random,
        };
        run.config = run.random_config();
        run.open();
        run
    }

    fn random_config(&mut self) -> LogConfig {
        LogConfig {
            segment_bytes: [600, 3_000, 20_000, 60_000][self.random.below(4) as usize],
            segment_age: self.random.one_in(2).then(|| Duration::from_millis(self.random.within(50, 5_000))),
            zero_ahead_bytes: [0, 4_096, 16_384, 65_536][self.random.below(4) as usize],
            room_kept_bytes: 10_000,
            segment_batches_max: [5, 200, 1_000][self.random.below(3) as usize],
            compaction: None,
        }
    }

    fn log(&mut self) -> &mut Log {
        self.log.as_mut().expect("the log is open between operations")
    }

    pub(crate) fn operation(&mut self) {
        self.now += self.random.below(40) as i64;
        // A crash is planned some operations of the disk ahead, so that it comes in the middle of anything.
        if self.random.one_in(40) {
            let ahead = self.random.below(30);
            self.disk.crash_after(ahead);
        }
        self.faults_before = self.disk.counts().faults;
        let choice = self.random.below(100);
        self.note(choice);
        match choice {
            0..30 => self.append(),
            30..34 => self.truncate(),
            34..48 => self.commit(),
            48..54 => self.flush_here(),
            54..62 => self.flush_elsewhere(),
            62..76 => self.read(),
            76..86 => self.look_up(),
            86..90 => self.checkpoint(),
            90..92 => self.move_log_start(),
            92..94 => self.delete_segments(),
            94 => self.roll_if_due(),
            95 => self.change_config(),
            96 => self.reopen_clean(),
            97 => self.fail_somewhere(),
            98 => self.fill_disk(),
            _ => self.end_life(),
        }
        let is_alive = self.log.is_some() && !self.disk.is_crashed();
        if is_alive && self.model.entries.len() > 400 && self.random.one_in(20) {
            self.shrink();
        }
        if self.log.is_none() || self.disk.is_crashed() {
            self.recover();
        }
        let model = (self.model.committed, self.model.last(), self.model.high_watermark());
        let log = self.log();
        assert_eq!((log.committed_index().get(), log.last_index().get(), log.high_watermark().get()), model);
    }

    /// Keeps what the last operations began with, to be shown where log and model differ.
    fn note(&mut self, choice: u64) {
        let Model { committed, flushed, hard_state, log_start, .. } = self.model;
        let line = (
            choice,
            self.model.last(),
            self.model.entry(self.model.last()).end,
            committed,
            flushed,
            hard_state,
            log_start,
        );
        self.trace.push_back(line);
        if self.trace.len() > 30 {
            self.trace.pop_front();
        }
    }

    fn print_trace(&self) {
        eprintln!("choice: last, end; committed, flushed, hard state, log start");
        for (choice, last, end, committed, flushed, hard_state, log_start) in &self.trace {
            eprintln!("{choice:3}: {last}, {end}; {committed}, {flushed}, {hard_state}, {log_start}");
        }
        let disk = self.disk.shared();
        for name in disk.read_dir(&self.dir).unwrap_or_default() {
            let path = self.dir.join(&name);
            let Ok(mut segment) = flowstone_storage::inspect::SegmentInspector::open(&disk, &path) else { continue };
            let batches = segment.by_ref().count();
            eprintln!("{name}: {:?} bytes, {batches} batches, {:?}", disk.file_len(&path), segment.end());
        }
    }

    // ---- writing ----

    fn append(&mut self) {
        let count = if self.random.one_in(10) { self.random.within(2, 40) } else { self.random.within(1, 3) };
        let mut entries = Vec::new();
        let before = self.model.entries.len();
        for _ in 0..count {
            let last = self.model.entry(self.model.last());
            let index = self.model.last() + 1;
            let begins_term = last.term == 1 || self.random.one_in(25);
            let term = if begins_term { last.term + self.random.within(1, 3) } else { last.term };
            let base = last.end;
            let entry = if begins_term {
                self.control(index, term, base, ControlType::NoOp, Bytes::new())
            } else if self.random.one_in(12) {
                let payload = Bytes::from(vec![7; self.random.below(50) as usize]);
                self.control(index, term, base, ControlType::ProducerExpiry, payload)
            } else {
                self.data(term, base)
            };
            entries.push(LogEntry { index: RaftIndex::new(index), term: Term::new(term), body: entry.body.clone() });
            self.model.entries.push(entry);
        }
        self.counts.appends += 1;
        self.counts.entries += count;
        if self.random.one_in(2) {
            let bytes = entries.iter().map(LogEntry::data_bytes).sum::<usize>() + 100 * entries.len();
            match self.log().reserve(bytes) {
                Ok(()) => {}
                Err(error) => {
                    self.model.entries.truncate(before);
                    return self.refused(error);
                }
            }
        }
        let now = Timestamp::new(self.now);
        match self.log().append(&entries, now) {
            Ok(appended) => {
                for (at, entry) in appended.iter().zip(&self.model.entries[before..]) {
                    assert_eq!(at.base_offset.get(), entry.base);
                    assert_eq!(at.last_offset.get() + 1, entry.end);
                    assert_eq!(at.header.leader_epoch.get() as u64, entry.term);
                }
            }
            // Any prefix of it may be in the file.
            Err(error) => self.failed(error),
        }
    }

    fn control(&mut self, index: u64, term: u64, base: i64, ctype: ControlType, payload: Bytes) -> ModelEntry {
        let stored = encode_control(
            ctype,
            Term::new(term),
            RaftIndex::new(index),
            Offset::new(base),
            &payload,
            CONTROL_FORMAT_VERSION,
        );
        ModelEntry {
            term,
            body: EntryBody::Control { ctype, payload },
            stored,
            base,
            end: base + 1,
            records: Vec::new(),
        }
    }

    fn data(&mut self, term: u64, base: i64) -> ModelEntry {
        let compression = if self.random.one_in(8) { Compression::Lz4 } else { Compression::None };
        let mut builder = RecordBatchBuilder::new(compression);
        let count = if self.random.one_in(5) { self.random.within(2, 20) } else { 1 };
        let mut records = Vec::new();
        let bytes = if self.random.one_in(15) { self.random.within(1_000, 30_000) } else { self.random.below(200) };
        let value = vec![(self.random.next() & 0xff) as u8; (bytes / count) as usize];
        for number in 0..count as i64 {
            // Not in order: producers' clocks differ.
            let timestamp = self.now - 500 + self.random.below(1_000) as i64;
            builder.append(Timestamp::new(timestamp), None, Some(&value), std::iter::empty()).expect("a small record");
            records.push((base + number, timestamp));
        }
        let batch = builder.build();
        let epoch = LeaderEpoch::new(term as i32);
        let mut stored = batch.to_vec();
        stored[..16].copy_from_slice(&stamped_prefix(&batch, Offset::new(base), epoch));
        let end = base + count as i64;
        ModelEntry { term, body: EntryBody::Batch(batch), stored: Bytes::from(stored), base, end, records }
    }

    fn truncate(&mut self) {
        let (committed, last) = (self.model.committed, self.model.last());
        let lowest = (committed + 1).max(self.model.forgotten);
        if lowest > last {
            return;
        }
        let from = self.random.within(lowest, last);
        // The caller's part: the hard state says less, durably, before.
        self.model.hard_state = self.model.hard_state.min(from - 1);
        self.model.flushed = self.model.flushed.min(from - 1);
        self.counts.truncations += 1;
        match self.log().truncate_from(RaftIndex::new(from)) {
            Ok(()) => {
                self.model.entries.truncate(from as usize);
                match &mut self.flush {
                    // The flush covers what was older, the cut the rest.
                    Some((_, covers)) => *covers = from - 1,
                    None => self.model.flushed = from - 1,
                }
                assert_eq!(self.log().flushed_index().get(), self.model.flushed);
            }
            Err(error) => self.failed(error),
        }
    }

    fn commit(&mut self) {
        let (committed, last) = (self.model.committed, self.model.last());
        let to = self.random.within(committed, last);
        self.log().commit_to(RaftIndex::new(to));
        self.model.committed = to;
    }

    fn flush_here(&mut self) {
        if self.flush.is_some() {
            return;
        }
        self.counts.flushes += 1;
        match self.log().flush() {
            Ok(flushed) => {
                assert_eq!(flushed.get(), self.model.last());
                self.flushed_to(flushed.get());
            }
            Err(error) => self.failed(error),
        }
    }

    /// Begins a flush, or ends the one that was begun: other operations come between.
    fn flush_elsewhere(&mut self) {
        match self.flush.take() {
            None => {
                let last = self.model.last();
                self.flush = self.log().flush_job().map(|job| (job, last));
            }
            Some((job, covers)) => {
                self.counts.flushes += 1;
                let done = job.run();
                match self.log().flush_done(done) {
                    Ok(flushed) => {
                        assert_eq!(flushed.get(), self.model.flushed.max(covers));
                        self.flushed_to(flushed.get());
                    }
                    Err(error) => self.failed(error),
                }
            }
        }
    }

    fn flushed_to(&mut self, flushed: u64) {
        self.model.flushed = flushed;
        // The hard state follows sooner or later.
        if self.random.one_in(2) {
            self.model.hard_state = flushed;
        }
    }

    fn checkpoint(&mut self) {
        let applied = self.model.committed;
        let newest = self.model.checkpoints.last().map_or(0, |(applied, _)| *applied);
        if applied > self.model.flushed || applied <= newest {
            return;
        }
        // One of what was committed some time ago is as good.
        let applied = if self.random.one_in(3) { self.random.within(newest + 1, applied) } else { applied };
        let machine = Bytes::from(format!("machine at {applied}"));
        let checkpoint =
            self.log().new_checkpoint(RaftIndex::new(applied), Bytes::from_static(b"members"), machine.clone());
        assert_eq!(checkpoint.end_offset_at_applied.get(), self.model.entry(applied).end);
        assert_eq!(checkpoint.term.get(), self.model.entry(applied).term);
        let log_start = checkpoint.log_start.get();
        self.model.checkpoints.push((applied, log_start));
        match self.log().write_checkpoint(checkpoint) {
            Ok(()) => {
                self.counts.checkpoints += 1;
                let before = self.model.checkpoints.remove(0);
                self.model.older.push(before);
                assert_eq!(self.log().spare_checkpoint().map(RaftIndex::get), Some(before.0));
            }
            Err(error) => {
                // The older one still holds, or the new one was written although it says otherwise. It poisons nothing.
                assert!(!self.log().is_poisoned());
                if !self.disk.is_crashed() {
                    // What the folder holds is known at the next opening.
                    self.log = None;
                }
                drop(error);
            }
        }
    }

    fn move_log_start(&mut self) {
        let high_watermark = self.model.high_watermark();
        if high_watermark > self.model.log_start {
            let start = self.random.within(self.model.log_start as u64, high_watermark as u64) as i64;
            self.log().set_log_start(Offset::new(start));
            self.model.log_start = start;
        }
    }

    fn delete_segments(&mut self) {
        match self.log().delete_segments_below_checkpoint() {
            Ok(deleted) => self.counts.segments_deleted += deleted as u64,
            Err(_) => assert!(!self.log().is_poisoned()),
        }
        let first = self.log().first_index().get();
        let (applied, log_start) = self.model.checkpoints[0];
        assert!(first <= applied + 1, "entries behind the checkpoint were deleted");
        if let Some(spare) = self.log().spare_checkpoint() {
            assert!(first <= spare.next().get(), "entries behind the spare checkpoint were deleted");
        }
        if first > 2 && first - 1 <= self.model.last() {
            let log_start = log_start.max(self.model.first_offset);
            assert!(self.model.entry(first - 1).end <= log_start, "records behind the log start were deleted");
        }
    }

    fn roll_if_due(&mut self) {
        let now = Timestamp::new(self.now + 1_000);
        match self.log().roll_if_due(now) {
            Ok(rolled) => self.counts.rolls += u64::from(rolled),
            Err(_) => assert!(!self.log().is_poisoned() || self.disk.is_crashed()),
        }
    }

    fn change_config(&mut self) {
        self.config = self.random_config();
        let config = self.config.clone();
        self.log().set_config(config);
        let cold = self.random.one_in(2);
        self.disk.set_cold(cold);
    }

    /// Lets the model and the log become small again, so that a run stays fast.
    fn shrink(&mut self) {
        if self.model.committed < self.model.last() {
            let last = self.model.last();
            self.log().commit_to(RaftIndex::new(last));
            self.model.committed = last;
        }
        let high_watermark = self.model.high_watermark();
        self.log().set_log_start(Offset::new(high_watermark));
        self.model.log_start = high_watermark;
        self.flush_here();
        if self.log.is_some() && !self.disk.is_crashed() && !self.log().is_poisoned() {
            self.checkpoint();
        }
        if self.log.is_some() && !self.disk.is_crashed() && !self.log().is_poisoned() {
            self.delete_segments();
        }
        // A group of its own from here on would be as good: begin again.
        if self.log.is_some() && self.model.checkpoints.len() == 1 && self.random.one_in(4) {
            self.begin_again();
        }
    }

    fn begin_again(&mut self) {
        self.counts.disk = self.disk.counts();
        let counts = self.counts;
        let seed = self.random.next();
        let mut fresh = Self::new(seed);
        fresh.counts = counts;
        fresh.disk_counts_before(counts.disk);
        *self = fresh;
    }

    // ---- reading ----

    fn read(&mut self) {
        self.counts.reads += 1;
        let high_watermark = self.model.high_watermark();
        let from = self.random.within(0, (high_watermark + 3) as u64) as i64;
        let max_bytes = [1, 100, 2_000, 1 << 20][self.random.below(4) as usize];
        let log_start = self.model.log_start;
        let read = self.log().read(Offset::new(from), max_bytes);
        if from < log_start || from > high_watermark {
            let Err(ReadError::OutOfRange { offset, log_start: start, high_watermark: end }) = read else {
                panic!("{from} is out of {log_start}..={high_watermark}, got {read:?}");
            };
            assert_eq!((offset.get(), start.get(), end.get()), (from, log_start, high_watermark));
            return;
        }
        let bytes = match read {
            Ok(Read::Bytes(bytes)) => bytes,
            Ok(Read::Ticket(ticket)) => {
                self.counts.tickets += 1;
                match ticket.run() {
                    Ok(bytes) => bytes,
                    Err(_) if self.disk.is_crashed() => return,
                    Err(error) => return self.read_failed(&error.to_string()),
                }
            }
            Err(_) if self.disk.is_crashed() => return,
            Err(error) => return self.read_failed(&error.to_string()),
        };
        if from == high_watermark {
            assert!(bytes.is_empty() && bytes.next.get() == from);
            return;
        }
        bytes.verify().expect("what is read is right");
        let all: Vec<u8> = bytes.chunks.concat();
        assert!(!all.is_empty(), "at least one batch");
        let mut index =
            (2..=self.model.committed).find(|index| self.model.entry(*index).end > from).expect("committed");
        let mut expected = Vec::new();
        while expected.len() < all.len() {
            expected.extend_from_slice(&self.model.entry(index).stored);
            index += 1;
        }
        assert_eq!(all, expected);
        assert_eq!(bytes.next.get(), self.model.entry(index - 1).end);
        assert!(index - 1 <= self.model.committed, "only what is committed");
        let is_one = self.model.entry(index - 1).base <= from;
        assert!(is_one || all.len() <= max_bytes, "{} bytes where {max_bytes} were asked for", all.len());
    }

    fn look_up(&mut self) {
        self.counts.lookups += 1;
        let (committed, last) = (self.model.committed, self.model.last());
        let first = self.log().first_index().get();
        if first <= last {
            let index = self.random.within(first, last);
            let expected = self.model.entry(index).clone();
            let at = RaftIndex::new(index);
            assert_eq!(self.log().term_at(at), Some(Term::new(expected.term)));
            match self.log().entry(at) {
                Ok(entry) => {
                    assert_eq!(entry.term.get(), expected.term);
                    match (&entry.body, &expected.body) {
                        // From a file it comes stamped, from memory as it was given.
                        (EntryBody::Batch(found), EntryBody::Batch(given)) => {
                            assert!(*found == expected.stored || found == given);
                        }
                        (found, given) => assert_eq!(found, given),
                    }
                }
                Err(error) => return self.read_failed(&error.to_string()),
            }
            match (self.log().stored_batch(at), self.log().entry_meta(at), self.log().header(at)) {
                (Ok(stored), Ok(meta), Ok(header)) => {
                    assert_eq!(stored, expected.stored);
                    assert_eq!((meta.base_offset.get(), meta.last_offset.get() + 1), (expected.base, expected.end));
                    assert_eq!(meta.batch_bytes as usize, expected.stored.len());
                    assert_eq!(meta.control.is_some(), matches!(expected.body, EntryBody::Control { .. }));
                    assert_eq!(Ok(header), flowstone_protocol::BatchHeader::parse(&expected.stored));
                }
                _ => return self.read_failed("an entry that was read a moment ago"),
            }
        }
        if first > 2 {
            assert_eq!(
                self.log().term_at(RaftIndex::new(first - 1)).map(Term::get),
                Some(self.model.entry(first - 1).term)
            );
        }
        assert_eq!(self.log().term_at(RaftIndex::new(last + 1)), None);

        let log_start = self.model.log_start;
        let readable: Vec<(i64, i64)> = self.model.entries[2..=committed as usize]
            .iter()
            .flat_map(|entry| entry.records.iter().copied())
            .filter(|(offset, _)| *offset >= log_start)
            .collect();
        let timestamp = self.now - 3_000 + self.random.below(4_000) as i64;
        let expected = readable.iter().find(|(_, at)| *at >= timestamp).copied();
        let answer = self.log().find_timestamp(Timestamp::new(timestamp)).and_then(|lookup| self.answer(lookup));
        match answer {
            Ok(found) => {
                let found = found.map(|record| (record.offset.get(), record.timestamp.get()));
                assert_eq!(found, expected, "at {timestamp}");
            }
            Err(error) => return self.read_failed(&error.to_string()),
        }
        let high_watermark = self.model.high_watermark();
        let from = self.random.within(log_start as u64, high_watermark as u64) as i64;
        let to = self.random.within(from as u64, high_watermark as u64) as i64;
        let expected = readable.iter().filter(|(offset, _)| (from..to).contains(offset)).count() as u64;
        let found = self.log().records_between(Offset::new(from), Offset::new(to));
        match found.and_then(RecordCount::wait) {
            Ok(found) => assert_eq!(found, expected, "records from {from} to {to}"),
            Err(error) => return self.read_failed(&error.to_string()),
        }
        let back = self.random.below(readable.len() as u64 + 3);
        let expected = match back {
            0 => high_watermark,
            _ if back > readable.len() as u64 => log_start,
            _ => readable[readable.len() - back as usize].0,
        };
        let answer = self.log().find_records_from_end(back).and_then(|lookup| self.answer(lookup));
        match answer {
            Ok(found) => {
                let found = found.map(|record| record.offset.get());
                assert_eq!(found, Some(expected), "{back} records from the end");
            }
            Err(error) => return self.read_failed(&error.to_string()),
        }
        let end_offset = self.model.entry(last).end;
        let last_term = self.model.entry(last).term;
        assert_eq!(self.log().end_offset().get(), end_offset);
        assert_eq!(self.log().last_term().get(), last_term);
        if last_term > 1 {
            // Below the first entry held nothing is known but the epoch just before.
            let oldest = self.model.entry(first.min(last)).term;
            let epoch = self.random.within(oldest, last_term + 1);
            let expected = match self.model.entries[2..].iter().find(|entry| entry.term > epoch) {
                _ if epoch > last_term => None,
                Some(entry) => Some(entry.base),
                None => Some(end_offset),
            };
            assert_eq!(
                self.log().epoch_end(LeaderEpoch::new(epoch as i32)).map(Offset::get),
                expected,
                "epoch {epoch}"
            );
        }
    }

    fn answer(&mut self, lookup: Lookup) -> Result<Option<FoundRecord>, ReadError> {
        match lookup {
            Lookup::Found(found) => Ok(found),
            Lookup::Ticket(ticket) => {
                self.counts.lookups_by_ticket += 1;
                ticket.run()
            }
        }
    }

    fn read_failed(&mut self, error: &str) {
        assert!(self.disk.is_crashed(), "a read failed: {error}");
    }

    // ---- ends of lives ----

    fn refused(&mut self, error: StorageError) {
        match error {
            _ if self.disk.is_crashed() => {}
            StorageError::DiskFull { .. } => {
                self.counts.disk_full += 1;
                assert!(!self.log().is_poisoned(), "a full disk poisons nothing");
            }
            // A fault in the middle of rolling: nothing was promised, nothing lost.
            StorageError::Io { .. } => assert!(!self.log().is_poisoned()),
            error => panic!("not reserved: {error}"),
        }
    }

    /// A write or a flush failed: from here on the log refuses everything, until it is opened anew.
    fn failed(&mut self, error: StorageError) {
        if self.disk.is_crashed() {
            return;
        }
        match error {
            StorageError::Io { action: "flush", .. } => self.counts.flushes_failed += 1,
            _ => self.counts.writes_failed += 1,
        }
        assert!(self.disk.counts().faults > self.faults_before, "nothing was made to fail, and still: {error}");
        assert!(self.log().is_poisoned(), "a failure poisons: {error}");
        let entry = LogEntry {
            index: self.log().last_index().next(),
            term: self.log().last_term(),
            body: EntryBody::Control { ctype: ControlType::ProducerExpiry, payload: Bytes::new() },
        };
        assert!(matches!(self.log().append(&[entry], Timestamp::new(0)), Err(StorageError::Poisoned { .. })));
        assert!(self.log().flush_job().is_none());
        self.log = None;
    }

    fn fail_somewhere(&mut self) {
        let operation = [Operation::Write, Operation::Sync, Operation::SyncDir, Operation::SetLen, Operation::Create]
            [self.random.below(5) as usize];
        let go_well = self.random.below(6);
        self.disk.fail(operation, go_well);
    }

    fn fill_disk(&mut self) {
        // What fails from here on fails for want of room.
        self.disk.cancel_faults();
        let used = self.disk.used_bytes();
        self.disk.set_bytes_max(Some(used + self.random.below(30_000)));
        for _ in 0..self.random.within(1, 5) {
            if self.log.is_some() && !self.disk.is_crashed() && !self.log().is_poisoned() {
                self.append_reserved();
            }
        }
        self.disk.set_bytes_max(None);
    }

    /// What a leader does: nothing is proposed that was not reserved.
    fn append_reserved(&mut self) {
        let term = self.model.entry(self.model.last()).term;
        if term == 1 {
            return;
        }
        let entry = self.data(term, self.model.entry(self.model.last()).end);
        let index = RaftIndex::new(self.model.last() + 1);
        let log_entry = LogEntry { index, term: Term::new(term), body: entry.body.clone() };
        if let Err(error) = self.log().reserve(log_entry.data_bytes()) {
            return self.refused(error);
        }
        let now = Timestamp::new(self.now);
        self.model.entries.push(entry);
        match self.log().append(&[log_entry], now) {
            Ok(_) => {}
            Err(error) if error.is_disk_full() => panic!("reserved, and still: {error}"),
            Err(error) => self.failed(error),
        }
    }

    fn reopen_clean(&mut self) {
        if let Some((job, _)) = self.flush.take() {
            let done = job.run();
            if let Err(error) = self.log().flush_done(done) {
                return self.failed(error);
            }
        }
        let log = self.log.take().expect("open");
        // Where that fails nothing is known of what was not flushed.
        if let Ok(last) = log.close() {
            assert_eq!(last.get(), self.model.last());
            self.model.flushed = last.get();
            self.model.hard_state = last.get();
            self.counts.reopened_clean += 1;
            self.disk.cancel_faults();
            self.open_or_crash();
        }
    }

    fn end_life(&mut self) {
        self.log = None;
    }

    /// The process ends, by whatever was the reason, and the log is opened until that works.
    fn recover(&mut self) {
        loop {
            if self.disk.is_crashed() {
                self.counts.crashed_within += 1;
            }
            self.log = None;
            self.flush = None;
            if self.random.one_in(2) {
                self.counts.reopened_after_power_failure += 1;
                self.disk.restart(Crash::Power);
            } else {
                // A kill leaves the hard state exact.
                self.counts.reopened_after_kill += 1;
                self.disk.restart(Crash::Process);
            }
            self.spoil_indexes();
            self.spoil_checkpoint();
            if self.random.one_in(4) {
                let ahead = self.random.below(12);
                self.disk.crash_after(ahead);
            }
            self.open_or_crash();
            if self.log.is_some() {
                return;
            }
        }
    }

    /// An index is no more than a help: whatever becomes of it, the log is the same.
    fn spoil_indexes(&mut self) {
        let names = self.disk.read_dir(&self.dir).expect("the folder");
        for name in names.iter().filter(|name| name.ends_with(".index")) {
            let path = self.dir.join(name);
            match self.random.below(20) {
                0 => self.disk.remove_file(&path).expect("it is there"),
                1 => {
                    let bytes = self.disk.bytes(&path).unwrap_or_default();
                    if !bytes.is_empty() {
                        let at = self.random.below(bytes.len() as u64);
                        self.disk.flip_bit(&path, at, 3);
                    }
                }
                _ => {}
            }
        }
    }

    /// Rot in the newest checkpoint, where there is another one.
    fn spoil_checkpoint(&mut self) {
        if self.spoiled || !self.random.one_in(8) {
            return;
        }
        let mut names = self.disk.read_dir(&self.dir).expect("the folder");
        names.retain(|name| name.ends_with(".state"));
        names.sort_unstable();
        if let [.., _, newest] = &names[..] {
            let path = self.dir.join(newest);
            // A shorter one stays rotten, also where its removal was lost and this comes to it again.
            let mut bytes = self.disk.bytes(&path).expect("it is there");
            bytes.pop();
            self.disk.set_bytes(&path, bytes);
            self.spoiled = true;
        }
    }

    fn open_or_crash(&mut self) {
        let opened = self.open_log();
        match opened {
            // The one before it was of no use: what it needs was deleted, and its own file's removal lost.
            Err(OpenError::Quarantine { .. }) if self.spoiled && !self.disk.is_crashed() => {
                self.counts.spares_useless += 1;
                self.begin_again();
            }
            // Its last operation was one whose failure does not matter; the next would fail.
            Ok(_) if self.disk.is_crashed() => self.counts.crashed_while_opening += 1,
            Ok(log) => self.check_opened(log),
            Err(_) if self.disk.is_crashed() => self.counts.crashed_while_opening += 1,
            Err(error) => panic!("cannot open: {error}\n{:?}", self.disk.read_dir(&self.dir)),
        }
        if self.log.is_none() && !self.disk.is_crashed() {
            panic!("no log");
        }
    }

    fn open_log(&self) -> Result<Log, flowstone_storage::OpenError> {
        let disk: Arc<dyn Disk> = self.disk.shared();
        let flushed = RaftIndex::new(self.model.hard_state);
        Log::open(disk, Path::new(&self.dir), self.config.clone(), flushed, Timestamp::new(self.now))
    }

    fn open(&mut self) {
        let log = self.open_log().expect("opens");
        self.check_opened(log);
    }

    /// Everything that was promised is there; the model follows what was found of the rest.
    fn check_opened(&mut self, log: Log) {
        self.disk.cancel_crash();
        self.disk.cancel_faults();
        let last = log.last_index().get();
        assert!(last >= self.model.flushed, "flushed up to {}, found up to {last}", self.model.flushed);
        assert!(last <= self.model.last(), "written up to {}, found up to {last}", self.model.last());
        self.counts.entries_lost += self.model.last() - last;
        self.model.entries.truncate(last as usize + 1);
        self.model.flushed = last;
        // What was found was made durable; the hard state follows.
        self.model.hard_state = last;
        let checkpoint: &Checkpoint = log.checkpoint();
        let found = (checkpoint.applied.get(), checkpoint.log_start.get());
        if self.spoiled && self.model.older.contains(&found) {
            self.counts.fell_back += 1;
        } else {
            assert!(self.model.checkpoints.contains(&found), "{found:?} is none of {:?}", self.model.checkpoints);
        }
        self.spoiled = false;
        assert_eq!(&checkpoint.membership[..], b"members");
        let may_be_older = std::mem::replace(&mut self.model.checkpoints, vec![found]);
        self.model.older.extend(may_be_older);
        self.model.older.retain(|(applied, _)| *applied < found.0);
        self.model.committed = found.0;
        // Retention went on from the one that is rotten now.
        self.model.first_offset = log.first_offset().get();
        self.model.log_start = found.1.max(self.model.first_offset);
        self.model.forgotten = log.first_index().get();
        assert_eq!(log.identity(), &identity());
        assert_eq!(log.flushed_index().get(), last);
        assert_eq!(log.log_start().get(), self.model.log_start);
        assert_eq!(log.high_watermark().get(), self.model.high_watermark());
        self.log = Some(log);
        for index in self.model.forgotten..=last {
            let expected = self.model.entry(index).stored.clone();
            match self.log().stored_batch(RaftIndex::new(index)) {
                Ok(found) => assert_eq!(found, expected, "entry {index}"),
                Err(error) => panic!("entry {index}: {error}"),
            }
        }
    }

    fn disk_counts_before(&mut self, before: SimCounts) {
        self.disk.add_counts(before);
    }
}

impl Counts {
    /// Both runs together.
    #[allow(dead_code)] // Used by the example, which shares this file.
    pub(crate) fn plus(mut self, other: &Self) -> Self {
        self.operations += other.operations;
        self.appends += other.appends;
        self.entries += other.entries;
        self.truncations += other.truncations;
        self.flushes += other.flushes;
        self.flushes_failed += other.flushes_failed;
        self.writes_failed += other.writes_failed;
        self.disk_full += other.disk_full;
        self.rolls += other.rolls;
        self.reads += other.reads;
        self.tickets += other.tickets;
        self.lookups += other.lookups;
        self.lookups_by_ticket += other.lookups_by_ticket;
        self.checkpoints += other.checkpoints;
        self.segments_deleted += other.segments_deleted;
        self.reopened_clean += other.reopened_clean;
        self.reopened_after_kill += other.reopened_after_kill;
        self.reopened_after_power_failure += other.reopened_after_power_failure;
        self.crashed_within += other.crashed_within;
        self.crashed_while_opening += other.crashed_while_opening;
        self.entries_lost += other.entries_lost;
        self.fell_back += other.fell_back;
        self.spares_useless += other.spares_useless;
        self.disk.operations += other.disk.operations;
        self.disk.crashes += other.disk.crashes;
        self.disk.power_failures += other.disk.power_failures;
        self.disk.torn_files += other.disk.torn_files;
        self.disk.sectors_lost += other.disk.sectors_lost;
        self.disk.sectors_kept += other.disk.sectors_kept;
        self.disk.names_lost += other.disk.names_lost;
        self.disk.dirs_lost += other.disk.dirs_lost;
        self.disk.faults += other.disk.faults;
        self
    }
}
