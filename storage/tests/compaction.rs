//! Compaction against a naive model: random keyed records, tombstones and transactions, passes at any time, in pieces, in
//! any memory, and crashes in the middle of them.
//!
//! A record that is gone must have been let go for a reason; one that a finished pass has looked at must be gone where
//! there was one; and what is there is what was written, at its offset.

mod source;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::batch::{split_batches, verify_crc};
use flowstone_protocol::control::encode_marker;
use flowstone_protocol::record::records;
use flowstone_protocol::{
    Compression, ControlType, LeaderEpoch, Marker, Offset, ProducerEpoch, ProducerId, RaftIndex, Record,
    RecordBatchBuilder, Sequence, Term, Timestamp,
};
use flowstone_storage::sim_disk::Crash;
use flowstone_storage::{
    AbortedTransaction, Compaction, CompactionConfig, CompactionLimits, EntryBody, Log, LogConfig, LogEntry, Lookup,
    Read, ReadBytes, RecordCount, Settled, SimDisk,
};

use crate::source::{DIR, Random, created};

const TOMBSTONES_KEPT: i64 = 5_000;

/// A record as it was written.
#[derive(Clone, Debug)]
struct Written {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    timestamp: i64,
    /// One past its batch's last offset: a batch that a pass has seen only a part of is left for the next.
    batch_end: i64,
    /// Of this transaction.
    transaction: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Transaction {
    producer: i64,
    first: i64,
    /// Its marker, and whether it was committed.
    ended: Option<(i64, bool)>,
}

/// What a run went through.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    passes: u64,
    parts: u64,
    swaps: u64,
    crashes: u64,
    crashed_within: u64,
    dropped: u64,
    tombstones_dropped: u64,
    aborted_dropped: u64,
    merged: u64,
    trimmed: u64,
    markers_dropped: u64,
    reads_during: u64,
}

struct Run {
    random: Random,
    sim: SimDisk,
    log: Option<Log>,
    now: i64,
    records: BTreeMap<i64, Written>,
    transactions: Vec<Transaction>,
    open: HashMap<i64, usize>,
    /// A pass that has seen all up to here, and when it began.
    passes: Vec<(i64, i64)>,
    /// When the first pass began that may have looked at an offset below this.
    first_looks: Vec<(i64, i64)>,
    checkpoint: (u64, Bytes),
    log_start: i64,
    flushed: u64,
    memory_bytes: u64,
    lag_min: u64,
    counts: Counts,
}

fn config(segment_bytes: u64, lag_min: u64) -> LogConfig {
    let compaction = CompactionConfig {
        tombstones_kept: Duration::from_millis(TOMBSTONES_KEPT as u64),
        lag_min: Duration::from_millis(lag_min),
        lag_max: None,
        dirty_per_mille_min: 1,
    };
    LogConfig { segment_bytes, room_kept_bytes: 0, compaction: Some(compaction), ..LogConfig::default() }
}

fn all_of(read: Read) -> Option<ReadBytes> {
    match read {
        Read::Bytes(bytes) => Some(bytes),
        Read::Ticket(ticket) => ticket.run().ok(),
    }
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let (sim, log) = created(7, 2_000);
        let memory_bytes = [48, 24 * 8, 24 * 40, 1 << 20][random.below(4) as usize];
        let lag_min = [0, 0, 2_000][random.below(3) as usize];
        let mut run = Self {
            random,
            sim,
            log: Some(log),
            now: 1_700_000_000_000,
            records: BTreeMap::new(),
            transactions: Vec::new(),
            open: HashMap::new(),
            passes: Vec::new(),
            first_looks: Vec::new(),
            checkpoint: (1, Bytes::new()),
            log_start: 0,
            flushed: 1,
            memory_bytes,
            lag_min,
            counts: Counts::default(),
        };
        let config = config(2_000, lag_min);
        run.log().set_config(config);
        run.append(EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() }, 2);
        run
    }

    fn log(&mut self) -> &mut Log {
        self.log.as_mut().expect("the log is open")
    }

    fn append(&mut self, body: EntryBody, term: u64) {
        let now = Timestamp::new(self.now);
        let log = self.log();
        let entry = LogEntry { index: log.last_index().next(), term: Term::new(term), body };
        let appended = log.append(&[entry], now);
        assert!(appended.is_ok() || self.sim.is_crashed(), "{:?}", appended.err());
    }

    fn settle(&mut self) {
        let log = self.log();
        log.flush().expect("flushed");
        let last = log.last_index();
        log.commit_to(last);
        self.flushed = last.get();
    }

    fn write(&mut self) {
        let term = self.log().last_term().get();
        let base = self.log().end_offset().get();
        if self.random.one_in(30) {
            self.append(EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() }, term + 1);
        } else if self.random.one_in(20) {
            let payload = Bytes::from_static(b"whoever");
            self.append(EntryBody::Control { ctype: ControlType::ProducerExpiry, payload }, term);
        } else if self.random.one_in(6) && !self.open.is_empty() {
            let mut open: Vec<_> = self.open.keys().copied().collect();
            open.sort_unstable();
            let producer = open[self.random.below(open.len() as u64) as usize];
            let commit = self.random.one_in(2);
            let marker = Marker {
                producer_id: ProducerId::new(producer),
                producer_epoch: ProducerEpoch::new(1),
                commit,
                coordinator_epoch: LeaderEpoch::new(1),
            };
            let batch = encode_marker(&marker, Timestamp::new(self.now));
            let transaction = self.open.remove(&producer).expect("open");
            self.transactions[transaction].ended = Some((base, commit));
            self.append(EntryBody::Batch(batch), term);
        } else {
            self.write_records(base, term);
        }
    }

    fn write_records(&mut self, base: i64, term: u64) {
        let codec = [Compression::None, Compression::Lz4, Compression::Zstd][self.random.below(3) as usize];
        let mut builder = RecordBatchBuilder::new(codec);
        let transaction = self.random.one_in(4).then(|| {
            let producer = self.random.below(3) as i64;
            builder.set_producer(ProducerId::new(producer), ProducerEpoch::new(0), Sequence::new(0));
            let transactions = &mut self.transactions;
            *self.open.entry(producer).or_insert_with(|| {
                transactions.push(Transaction { producer, first: base, ended: None });
                transactions.len() - 1
            })
        });
        let count = 1 + self.random.below(6) as i64;
        for number in 0..count {
            let key = format!("key {}", self.random.below(25)).into_bytes();
            let value = vec![self.random.next() as u8; self.random.below(120) as usize];
            let written = Written {
                key: (!self.random.one_in(40)).then_some(key),
                value: (!self.random.one_in(5)).then_some(value),
                timestamp: self.now - self.random.below(500) as i64,
                batch_end: base + count,
                transaction,
            };
            let Written { key, value, timestamp, .. } = &written;
            builder.append(Timestamp::new(*timestamp), key.as_deref(), value.as_deref(), []).expect("small");
            self.records.insert(base + number, written);
        }
        let builder = if transaction.is_some() { builder.transactional() } else { builder };
        self.append(EntryBody::Batch(builder.build()), term);
    }

    fn write_checkpoint(&mut self) {
        let machine = Bytes::from(format!("machine {}", self.random.next()));
        let log = self.log();
        let applied = log.committed_index();
        let checkpoint = log.new_checkpoint(applied, Bytes::from_static(b"members"), machine.clone());
        if checkpoint.applied != applied || checkpoint.machine != machine {
            return;
        }
        let job = log.checkpoint_job(checkpoint);
        if log.checkpoint_done(job.run()).is_ok() {
            self.checkpoint = (applied.get(), machine);
        }
    }

    fn is_aborted(&self, record: &Written) -> bool {
        let ended = record.transaction.and_then(|at| self.transactions[at].ended);
        ended.is_some_and(|(_, committed)| !committed)
    }

    fn settled(&mut self) -> Settled {
        let open = self.open.values().map(|at| self.transactions[*at].first).min();
        let aborted = self.transactions.iter().filter_map(|at| match at.ended {
            Some((marker, false)) => Some(AbortedTransaction {
                producer: ProducerId::new(at.producer),
                first: Offset::new(at.first),
                marker: Offset::new(marker),
            }),
            _ => None,
        });
        let aborted = aborted.collect();
        let end = self.log().high_watermark();
        Settled::new(open.map_or(end, Offset::new), aborted)
    }

    /// A pass, in pieces, other things in between; it may be given up, or crash.
    fn compact(&mut self) {
        let settled = self.settled();
        let (seed, now) = (self.random.next(), Timestamp::new(self.now));
        let memory_bytes = self.memory_bytes;
        let limits = CompactionLimits { up_to: RaftIndex::new(u64::MAX), memory_bytes, seed, now };
        let clean_to = self.log().clean_to();
        let Some(mut pass) = self.log().begin_compaction(settled, limits) else { return };
        assert!(self.log().is_compacting());
        let reaches = self.log().high_watermark().get();
        self.first_looks.push((reaches, self.now));
        let given_up = self.random.one_in(6).then(|| self.random.below(10));
        if self.random.one_in(3) {
            let ahead = self.random.below(60);
            self.sim.crash_after(ahead);
        }
        for piece in 0_u64.. {
            if given_up == Some(piece) {
                self.sim.cancel_crash();
                return;
            }
            let bytes = 1 + self.random.below(3_000);
            match pass.step(bytes) {
                Ok(step) => {
                    self.log().compacted(&mut pass);
                    if step.is_done {
                        break;
                    }
                }
                Err(error) => {
                    assert!(self.sim.is_crashed(), "a pass failed: {error}");
                    return;
                }
            }
            if !self.sim.is_crashed() && self.random.one_in(4) {
                self.now += 1;
                self.write();
                self.settle_unless_crashed();
            }
            if self.sim.is_crashed() {
                return;
            }
            if self.random.one_in(5) {
                self.check_all();
                self.counts.reads_during += 1;
            }
        }
        self.sim.cancel_crash();
        self.end_of_pass(&pass, clean_to);
    }

    fn settle_unless_crashed(&mut self) {
        let log = self.log();
        if log.flush().is_ok() {
            let last = log.last_index();
            log.commit_to(last);
            self.flushed = last.get();
        }
    }

    fn end_of_pass(&mut self, pass: &Compaction, clean_to: Offset) {
        let totals = pass.totals();
        self.counts.passes += 1;
        self.counts.swaps += totals.swaps;
        self.counts.merged += u64::from(totals.swaps == 1 && totals.bytes_before > 2_500);
        let now_clean = self.log().clean_to();
        let began = self.first_looks.last().expect("noted").1;
        self.passes.push((now_clean.get(), began));
        self.counts.parts += u64::from(self.memory_bytes < 1_000 && now_clean > clean_to);
    }

    /// Whether a record may be gone, for which reason soever.
    fn may_be_gone(&self, offset: i64, record: &Written) -> bool {
        let superseded = || {
            let key = record.key.as_ref();
            key.is_some()
                && self
                    .records
                    .range(offset + 1..)
                    .any(|(_, other)| other.key.as_ref() == key && !self.is_aborted(other) && self.is_decided(other))
        };
        let is_old = || {
            record.value.is_none()
                && record.key.is_some()
                && self.first_looks.iter().any(|(to, at)| offset < *to && at + TOMBSTONES_KEPT <= self.now)
        };
        self.is_decided(record) && (self.is_aborted(record) || superseded() || is_old())
    }

    fn is_decided(&self, record: &Written) -> bool {
        record.transaction.is_none_or(|at| self.transactions[at].ended.is_some())
    }

    /// Whether a record must be gone: a finished pass has seen it, and why it should go.
    fn must_be_gone(&self, offset: i64, record: &Written) -> bool {
        let (clean_to, _) = self.passes.last().copied().unwrap_or((0, 0));
        if offset >= clean_to {
            return false;
        }
        let superseded = record.key.is_some()
            && self
                .records
                .range(offset + 1..clean_to)
                .any(|(_, other)| other.key == record.key && !self.is_aborted(other));
        let is_old = record.value.is_none()
            && record.key.is_some()
            && self.passes.iter().enumerate().any(|(at, (to, first))| {
                record.batch_end <= *to && self.passes[at..].iter().any(|(_, later)| first + TOMBSTONES_KEPT <= *later)
            });
        (self.is_aborted(record) && record.batch_end <= clean_to) || superseded || is_old
    }

    fn read_all(&mut self) -> Option<Vec<Bytes>> {
        let mut batches = Vec::new();
        let mut at = self.log().log_start();
        let end = self.log().high_watermark();
        while at < end {
            let max_bytes = [1, 500, 100_000][self.random.below(3) as usize];
            let read = self.log().read(at, max_bytes).expect("in range");
            let bytes = all_of(read)?;
            bytes.verify().expect("what is read is right");
            assert!(bytes.first <= at && bytes.next > at, "{} to {} where {at} was asked for", bytes.first, bytes.next);
            for chunk in &bytes.chunks {
                for split in split_batches(chunk.clone()) {
                    let (_, batch) = split.expect("whole batches");
                    verify_crc(&batch).expect("a right CRC");
                    batches.push(batch);
                }
            }
            at = bytes.next;
        }
        Some(batches)
    }

    fn check_all(&mut self) {
        let Some(batches) = self.read_all() else {
            assert!(self.sim.is_crashed(), "a read failed");
            return;
        };
        let log_start = self.log_start;
        let mut found: BTreeMap<i64, Record> = BTreeMap::new();
        let mut markers = Vec::new();
        for batch in batches {
            let header = flowstone_protocol::BatchHeader::parse(&batch).expect("a header");
            if header.attributes.is_control() {
                if header.attributes.is_transactional() {
                    markers.push(header.base_offset.get());
                }
                continue;
            }
            for record in records(batch, 1 << 20).expect("a batch") {
                let record = record.expect("a record");
                if record.offset.get() >= log_start {
                    assert!(found.insert(record.offset.get(), record).is_none());
                }
            }
        }
        for (offset, record) in &found {
            let written = &self.records[offset];
            assert_eq!(record.key.as_deref(), written.key.as_deref(), "key at {offset}");
            assert_eq!(record.value.as_deref(), written.value.as_deref(), "value at {offset}");
            assert_eq!(record.timestamp.get(), written.timestamp, "timestamp at {offset}");
            assert!(!self.must_be_gone(*offset, written), "offset {offset} should have gone: {written:?}");
        }
        let end = self.log().high_watermark().get();
        let (mut dropped, mut tombstones, mut aborted) = (0, 0, 0);
        for (offset, written) in self.records.range(log_start..end) {
            if !found.contains_key(offset) {
                assert!(self.may_be_gone(*offset, written), "offset {offset} is gone: {written:?}");
                dropped += 1;
                tombstones += u64::from(written.value.is_none());
                aborted += u64::from(self.is_aborted(written));
            }
        }
        // Readers are told of what was aborted: then they must find where it ends.
        for transaction in &self.transactions {
            match transaction.ended {
                Some((marker, false)) if marker >= log_start && marker < end => assert!(markers.contains(&marker)),
                Some((marker, true)) if marker >= log_start && marker < end && !markers.contains(&marker) => {
                    self.counts.markers_dropped += 1;
                }
                _ => {}
            }
        }
        self.counts.dropped += dropped;
        self.counts.tombstones_dropped += tombstones;
        self.counts.aborted_dropped += aborted;
        self.check_lookups(&found);
    }

    fn check_lookups(&mut self, found: &BTreeMap<i64, Record>) {
        let (start, end) = (self.log_start, self.log().high_watermark().get());
        let present: Vec<(i64, i64)> = found.iter().map(|(offset, record)| (*offset, record.timestamp.get())).collect();
        for _ in 0..3 {
            let from = start + self.random.below((end - start + 1) as u64) as i64;
            let to = from + self.random.below((end - from + 1) as u64) as i64;
            let expected = present.iter().filter(|(offset, _)| (from..to).contains(offset)).count() as u64;
            let counted = self.log().records_between(Offset::new(from), Offset::new(to)).and_then(RecordCount::wait);
            match counted {
                Ok(counted) => assert_eq!(counted, expected, "records from {from} to {to}"),
                Err(error) => return assert!(self.sim.is_crashed(), "{error}"),
            }
            let wait = |lookup: Lookup| match lookup {
                Lookup::Found(found) => Ok(found),
                Lookup::Ticket(ticket) => ticket.run(),
            };
            let back = self.random.below(present.len() as u64 + 2);
            let expected = match back {
                0 => end,
                _ if back > present.len() as u64 => start,
                _ => present[present.len() - back as usize].0,
            };
            match self.log().find_records_from_end(back).and_then(wait) {
                Ok(found) => assert_eq!(found.map(|it| it.offset.get()), Some(expected), "{back} from the end"),
                Err(error) => return assert!(self.sim.is_crashed(), "{error}"),
            }
            let time = self.now - self.random.below(3_000) as i64;
            let expected = present.iter().find(|(_, at)| *at >= time).copied();
            match self.log().find_timestamp(Timestamp::new(time)).and_then(wait) {
                Ok(found) => {
                    assert_eq!(found.map(|it| (it.offset.get(), it.timestamp.get())), expected, "at {time}");
                }
                Err(error) => return assert!(self.sim.is_crashed(), "{error}"),
            }
        }
    }

    fn reopen(&mut self, crash: Crash) {
        self.counts.crashes += 1;
        self.counts.crashed_within += u64::from(self.sim.is_crashed());
        self.sim.cancel_crash();
        self.log = None;
        self.sim.restart(crash);
        let (flushed, now) = (RaftIndex::new(self.flushed), Timestamp::new(self.now));
        let config = config(2_000, self.lag_min);
        if self.random.one_in(3) {
            // Killed while it opens, and opened again.
            let ahead = self.random.below(20);
            self.sim.crash_after(ahead);
            let opened = Log::open(self.sim.shared(), Path::new(DIR), config.clone(), flushed, now);
            assert!(opened.is_ok() || self.sim.is_crashed(), "{:?}", opened.err());
            drop(opened);
            self.sim.cancel_crash();
            self.sim.restart(if self.random.one_in(2) { Crash::Power } else { Crash::Process });
        }
        let log = Log::open(self.sim.shared(), Path::new(DIR), config, flushed, now);
        let mut log = log.unwrap_or_else(|error| panic!("it does not open: {error}"));
        assert_eq!(log.checkpoint().applied.get(), self.checkpoint.0);
        assert_eq!(log.checkpoint().machine, self.checkpoint.1, "the machine's state outlives its records");
        // What was written and not flushed may be there or not: what is not never happened.
        let last = log.last_index();
        log.commit_to(last);
        log.set_log_start(Offset::new(self.log_start));
        let end = log.end_offset().get();
        self.flushed = last.get();
        self.records.retain(|offset, _| *offset < end);
        self.log_start = log.log_start().get();
        let Self { transactions, open, .. } = self;
        for (at, transaction) in transactions.iter_mut().enumerate() {
            if transaction.ended.is_some_and(|(marker, _)| marker >= end) {
                transaction.ended = None;
                open.insert(transaction.producer, at);
            }
        }
        open.retain(|_, at| transactions[*at].first < end);
        self.log = Some(log);
    }

    fn trim(&mut self) {
        let end = self.log().high_watermark().get();
        let by = self.random.below(((end - self.log_start) / 3).max(1) as u64) as i64;
        self.log_start += by;
        let start = Offset::new(self.log_start);
        self.log().set_log_start(start);
        self.write_checkpoint();
        let removed = self.log().delete_segments_below_checkpoint();
        self.counts.trimmed += removed.unwrap_or(0) as u64;
    }

    fn operation(&mut self) {
        self.now += self.random.below(200) as i64;
        match self.random.below(100) {
            0..60 => {
                self.write();
                self.settle();
            }
            60..72 => self.write_checkpoint(),
            72..88 => self.compact(),
            88..92 => self.check_all(),
            92..95 => {
                let crash = if self.random.one_in(2) { Crash::Power } else { Crash::Process };
                self.reopen(crash);
            }
            95 => self.trim(),
            96 => self.now += TOMBSTONES_KEPT,
            97 => {
                let cold = self.random.one_in(2);
                self.sim.set_cold(cold);
            }
            _ => {
                self.log().seal().expect("sealed");
            }
        }
        if self.sim.is_crashed() {
            let crash = if self.random.one_in(2) { Crash::Power } else { Crash::Process };
            self.reopen(crash);
            self.check_all();
        }
        let log = self.log();
        let (first, last, offset) = (log.first_index(), log.last_index(), log.first_offset());
        if first <= last {
            assert_eq!(log.entry_meta(first).expect("held").base_offset, offset);
        }
        assert!(first <= log.checkpoint().applied.next());
    }
}

#[test]
fn random_keyed_records_passes_and_crashes() {
    let mut total = Counts::default();
    for seed in 0..24 {
        let mut run = Run::new(seed);
        for number in 0..400 {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.operation()));
            if let Err(panic) = done {
                eprintln!("log and model differ: seed {seed}, operation {number}");
                std::panic::resume_unwind(panic);
            }
        }
        run.check_all();
        let counts = run.counts;
        total.passes += counts.passes;
        total.parts += counts.parts;
        total.swaps += counts.swaps;
        total.crashes += counts.crashes;
        total.crashed_within += counts.crashed_within;
        total.dropped += counts.dropped;
        total.tombstones_dropped += counts.tombstones_dropped;
        total.aborted_dropped += counts.aborted_dropped;
        total.merged += counts.merged;
        total.trimmed += counts.trimmed;
        total.markers_dropped += counts.markers_dropped;
        total.reads_during += counts.reads_during;
    }
    // A run that saw none of these has shown nothing.
    for (what, count) in [
        ("passes", total.passes),
        ("passes over as much as fitted in memory", total.parts),
        ("files swapped", total.swaps),
        ("crashes", total.crashes),
        ("crashes within a pass", total.crashed_within),
        ("records let go", total.dropped),
        ("tombstones let go", total.tombstones_dropped),
        ("aborted records let go", total.aborted_dropped),
        ("segments merged", total.merged),
        ("segments trimmed", total.trimmed),
        ("markers let go", total.markers_dropped),
        ("reads during a pass", total.reads_during),
    ] {
        assert!(count > 0, "no {what}: the run is vacuous");
    }
    eprintln!("{total:?}");
}
