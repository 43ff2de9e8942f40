//! What can be asked of a replica, and what comes back.

use std::path::PathBuf;

use bytes::Bytes;
use flowstone_protocol::{BatchHeader, Error, LeaderEpoch, Offset, ReplicaId, Term, Timestamp, TopicPartition};
use flowstone_storage::{LogConfig, ReadBytes, RetentionConfig};

use crate::reply::{Permit, Reply};

/// When a produce request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acks {
    /// At once: `Ok` says that it was taken, nothing more. The service sends no answer on.
    None,
    /// When the leader has it: flushed, or under [`FlushMode::Relaxed`] written.
    Leader,
    /// When it is committed.
    Quorum,
}

/// When a log counts as persisted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FlushMode {
    /// After `fdatasync`: what is acknowledged survives a power failure.
    #[default]
    Quorum,
    /// Once written to the page cache; flushed in the background. Survives the process, not the machine.
    Relaxed,
}

/// One replica as the metadata describes it.
#[derive(Debug, Clone)]
pub struct ReplicaSpec {
    /// The partition that it belongs to.
    pub tp: TopicPartition,
    /// Its own id, never used twice.
    pub replica: ReplicaId,
    /// Its folder.
    pub dir: PathBuf,
    /// Segments.
    pub log: LogConfig,
    /// When a write counts.
    pub flush: FlushMode,
    /// What may be deleted.
    pub retention: RetentionConfig,
    /// One of the cluster's own topics: it may use the disk's reserve.
    pub internal: bool,
    /// The largest batch of a client, in bytes.
    pub max_message_bytes: usize,
}

/// What a produce request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Produced {
    /// The offset of the batch's first record.
    pub base_offset: Offset,
    /// The broker's time in the batch, where the topic has `LogAppendTime`.
    pub log_append_time: Option<Timestamp>,
}

/// Which batches to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadRequest {
    /// The offset to begin at; the first batch may begin below it.
    pub from: Offset,
    /// How many bytes to give; one whole batch is given even when it is longer.
    pub max_bytes: usize,
    /// The epoch of the last batch that the reader saw: when this log's end of that epoch lies below `from`, the reader
    /// followed a history that was lost, and is told `LOG_DIVERGED`.
    pub last_epoch: Option<LeaderEpoch>,
    /// At the high watermark: wait for more (true) or answer with nothing (false).
    pub wait: bool,
}

/// What a read is answered.
#[derive(Debug)]
pub struct ReadAnswer {
    /// Whole batches, not yet verified: [`ReadBytes::verify`] is for the service, off the shard's thread.
    pub bytes: ReadBytes,
    /// The first offset for readers.
    pub log_start: Offset,
    /// One past the last committed offset.
    pub high_watermark: Offset,
}

/// Which offset to look up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffsetQuery {
    /// The log start.
    Start,
    /// The high watermark.
    End,
    /// The first record at or after this time.
    Timestamp(Timestamp),
    /// The record this many data records before the end; the log start when there are fewer.
    RecordsFromEnd(u64),
}

/// An offset that was looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundOffset {
    /// The offset.
    pub offset: Offset,
    /// The record's timestamp where the query was by time, else [`Timestamp::NONE`].
    pub timestamp: Timestamp,
    /// The leader's epoch.
    pub leader_epoch: LeaderEpoch,
}

/// Up to where to trim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrimTo {
    /// This offset becomes the log start.
    Offset(Offset),
    /// All that is committed now.
    HighWatermark,
}

/// A replica's part in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is being opened, or has ended and will be opened anew.
    Opening,
    /// It follows, or knows no leader.
    Follower,
    /// It asks for votes.
    Candidate,
    /// It leads, and does not serve yet: its term's first entry is not committed.
    Elected,
    /// It leads and serves.
    Leader,
}

/// Whether a replica can do its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It can.
    Ok,
    /// It reads, and refuses writes until there is room; it finds out by itself.
    DiskFull,
    /// A write or flush failed: it is opened anew by itself.
    Failed {
        /// What failed.
        message: String,
    },
    /// What it answered for is gone or unreadable: nothing is served until an operator acts.
    Quarantined {
        /// What was found, where, and what to do.
        message: String,
    },
}

/// A replica, seen from outside. A moment old at most; never a mixture that goes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Its part.
    pub role: Role,
    /// The term it knows.
    pub term: Term,
    /// The first offset for readers.
    pub log_start: Offset,
    /// One past the last committed offset.
    pub high_watermark: Offset,
    /// One past the last appended offset.
    pub end_offset: Offset,
    /// Bytes of its segments.
    pub size_bytes: u64,
    /// Data records between log start and high watermark; about, where only an index on the disk would tell exactly.
    pub records: u64,
    /// Whether it works.
    pub health: Health,
}

impl ReplicaStatus {
    /// Leads and serves.
    pub fn is_ready(&self) -> bool {
        self.role == Role::Leader
    }

    /// The epoch that its appends carry.
    pub fn leader_epoch(&self) -> LeaderEpoch {
        LeaderEpoch::from_term(self.term).unwrap_or(LeaderEpoch::NONE)
    }
}

/// One client's batch on its way into the log.
#[derive(Debug)]
pub struct Produce {
    /// One whole record batch, validated.
    pub batch: Bytes,
    /// Its header.
    pub header: BatchHeader,
    /// When to answer.
    pub acks: Acks,
    /// Its room in the shard.
    pub permit: Permit,
    /// Where the answer goes.
    pub reply: Reply<Result<Produced, Error>>,
}

/// What may change while a replica runs.
#[derive(Debug, Clone)]
pub struct Reconfigure {
    /// Segments.
    pub log: LogConfig,
    /// What may be deleted.
    pub retention: RetentionConfig,
    /// When a write counts.
    pub flush: FlushMode,
    /// The largest batch of a client, in bytes.
    pub max_message_bytes: usize,
}
