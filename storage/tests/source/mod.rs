//! A log to copy from: entries of several terms and sizes, in several segments.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{
    Compression, ControlType, Offset, PartitionId, RaftIndex, RecordBatchBuilder, ReplicaId, Term, Timestamp, TopicId,
    TopicPartition,
};
use flowstone_storage::{Disk, EntryBody, Log, LogConfig, LogEntry, Range, ReadError, ReplicaIdentity, SimDisk};

pub(crate) const NOW: Timestamp = Timestamp::new(1_700_000_000_000);
/// The folder of every replica here; a disk has one.
pub(crate) const DIR: &str = "/data/topics/5/3";

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub(crate) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

pub(crate) fn identity(replica: u64) -> ReplicaIdentity {
    ReplicaIdentity {
        replica: ReplicaId::new(replica),
        topic_partition: TopicPartition::new(TopicId::new(5), PartitionId::new(3)),
        feature_level: 1,
    }
}

pub(crate) fn config(segment_bytes: u64) -> LogConfig {
    LogConfig { segment_bytes, room_kept_bytes: 0, ..LogConfig::default() }
}

pub(crate) fn open(disk: &Arc<dyn Disk>, segment_bytes: u64, flushed: RaftIndex) -> Log {
    Log::open(Arc::clone(disk), Path::new(DIR), config(segment_bytes), flushed, NOW).expect("opens")
}

/// An empty log of replica `replica`.
pub(crate) fn created(replica: u64, segment_bytes: u64) -> (SimDisk, Log) {
    let sim = SimDisk::new(replica);
    let disk = sim.shared();
    Log::create(&disk, Path::new(DIR), identity(replica), Bytes::from_static(b"members")).expect("a new log");
    let log = open(&disk, segment_bytes, RaftIndex::new(1));
    (sim, log)
}

/// Appends `count` entries, random in size and kind, some of them beginning a term.
pub(crate) fn append_some(log: &mut Log, random: &mut Random, count: u64) {
    for _ in 0..count {
        let begins_term = log.last_term() == Term::new(1) || random.one_in(15);
        let term = Term::new(log.last_term().get() + if begins_term { 1 + random.below(3) } else { 0 });
        let body = if begins_term {
            EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() }
        } else if random.one_in(10) {
            EntryBody::Control { ctype: ControlType::ProducerExpiry, payload: Bytes::from(vec![7; 20]) }
        } else {
            let mut builder = RecordBatchBuilder::new(Compression::None);
            let value = vec![random.next() as u8; random.below(400) as usize];
            for _ in 0..=random.below(4) {
                builder.append(NOW, None, Some(&value), []).expect("a small record");
            }
            EntryBody::Batch(builder.build())
        };
        log.append(&[LogEntry { index: log.last_index().next(), term, body }], NOW).expect("appended");
    }
}

/// Flushes and commits all.
pub(crate) fn settle(log: &mut Log) {
    log.flush().expect("flushed");
    log.commit_to(log.last_index());
}

/// A checkpoint of all that is committed.
#[allow(dead_code)] // Not by every test that shares this file.
pub(crate) fn checkpoint(log: &mut Log) {
    let checkpoint =
        log.new_checkpoint(log.committed_index(), Bytes::from_static(b"members"), Bytes::from_static(b"machine"));
    log.write_checkpoint(checkpoint).expect("written");
}

/// A log of `count` random entries, all flushed and committed, in a checkpoint up to some of the last.
#[allow(dead_code)] // Not by every test that shares this file.
pub(crate) fn filled(replica: u64, segment_bytes: u64, seed: u64, count: u64) -> (SimDisk, Log) {
    let mut random = Random(seed);
    let (sim, mut log) = created(replica, segment_bytes);
    append_some(&mut log, &mut random, count);
    settle(&mut log);
    checkpoint(&mut log);
    let more = random.below(10);
    append_some(&mut log, &mut random, more);
    settle(&mut log);
    (sim, log)
}

/// The bytes of one range.
#[allow(dead_code)] // Not by every test that shares this file.
pub(crate) fn range(log: &Log, first: RaftIndex, last: RaftIndex, max_bytes: usize) -> Result<Range, ReadError> {
    log.range(first, last, max_bytes).expect("held").run()
}

/// Every stored batch from `first` to `last`.
#[allow(dead_code)] // Not by every test that shares this file.
pub(crate) fn batches(log: &mut Log, first: RaftIndex, last: RaftIndex) -> Vec<Bytes> {
    (first.get()..=last.get()).map(|index| log.stored_batch(RaftIndex::new(index)).expect("stored")).collect()
}

/// Moves the log start to `offset`, and lets go of the segments below it.
#[allow(dead_code)] // Not by every test that shares this file.
pub(crate) fn trim(log: &mut Log, offset: Offset) {
    log.set_log_start(offset);
    append_some(log, &mut Random(1), 3);
    settle(log);
    checkpoint(log);
    log.delete_segments_below_checkpoint().expect("deleted");
}
