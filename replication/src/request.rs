//! What can be asked of a replica, and what comes back.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{
    BatchHeader, BrokerId, Error, LeaderEpoch, Offset, ProducerId, RaftIndex, ReplicaId, Term, Timestamp,
    TopicPartition,
};
use flowstone_storage::{LogConfig, ReadBytes, RetentionConfig};

use crate::membership::Membership;
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
    /// Where the other replicas of its group are, as the metadata says; its own place may be among them. More is learned
    /// from whoever writes to it.
    pub peers: Arc<[(ReplicaId, BrokerId)]>,
    /// How it begins where it does not exist yet.
    pub start: Start,
}

impl ReplicaSpec {
    /// Whether there is anybody else in its group.
    pub fn has_peers(&self) -> bool {
        self.peers.iter().any(|&(replica, _)| replica != self.replica)
    }
}

/// How a replica begins where it does not exist yet. One that exists goes on, whatever this says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// As one of those that the group begins with: made only where neither its files nor its votes exist.
    FirstVoter {
        /// All of those.
        voters: Arc<[ReplicaId]>,
    },
    /// As one that pulls everything first, and votes when its leader says so.
    Learner,
    /// No majority is left: the log of this replica, in the same folder, goes on under the new id as the only voter.
    Recovered {
        /// Whose log it was.
        from: ReplicaId,
    },
}

impl Start {
    /// As the only voter.
    pub fn alone(replica: ReplicaId) -> Self {
        Self::FirstVoter { voters: Arc::from([replica]) }
    }
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
    /// A replica that does not lead may answer, with what it knows to be committed.
    pub any_replica: bool,
    /// The highest high watermark that the reader was told: a replica that is behind it waits (where `wait` is set) or
    /// answers with a retriable error, never with an offset out of range.
    pub known_high_watermark: Option<Offset>,
    /// Only up to the last stable offset, with what was aborted below it; at that it waits, as at the high watermark.
    pub committed: bool,
}

impl ReadRequest {
    /// A read from the leader.
    pub const fn new(from: Offset, max_bytes: usize) -> Self {
        Self {
            from,
            max_bytes,
            last_epoch: None,
            wait: false,
            any_replica: false,
            known_high_watermark: None,
            committed: false,
        }
    }
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
    /// Where the oldest open transaction begins; the high watermark where none is open.
    pub last_stable_offset: Offset,
    /// With [`ReadRequest::committed`]: the transactions that were aborted and have batches in `bytes`, as producer and first
    /// offset.
    pub aborted: Vec<(ProducerId, Offset)>,
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
    /// This offset itself, and how many data records there are from it to the high watermark.
    RecordsFrom(Offset),
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
    /// Data records from the offset to the high watermark, where they were asked for.
    pub records: Option<u64>,
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
    /// It follows, and its acknowledgement does not count.
    Learner,
    /// It has no log yet, or one that is too old to go on with: it pulls one, and neither votes nor answers meanwhile.
    Pulling,
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
    /// What it answered for is gone, unreadable, or in doubt, and there are others to ask: under this id it can never vote
    /// again. To be replaced by one with a new id.
    Lost {
        /// What was found, and where.
        message: String,
        /// Its log is whole as far as it goes, and only what was in memory at the end of an earlier run may be missing.
        lost_memory: bool,
        /// The term of its last entry.
        last_term: Term,
        /// Its last entry.
        last_index: RaftIndex,
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
    /// Where the oldest open transaction begins; the high watermark where none is open.
    pub last_stable_offset: Offset,
    /// One past the last appended offset.
    pub end_offset: Offset,
    /// Bytes of its segments.
    pub size_bytes: u64,
    /// Data records between log start and high watermark; about, where only an index on the disk would tell exactly.
    pub records: u64,
    /// Whether it works.
    pub health: Health,
    /// Who leads its group, as far as it knows.
    pub leader: Option<ReplicaId>,
    /// Where that replica is; `None` where it is this one, or that is not known.
    pub leader_broker: Option<BrokerId>,
    /// Its acknowledgement counts.
    pub is_voter: bool,
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

/// A group, as one of its replicas sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    /// Which replica says so.
    pub replica: ReplicaId,
    /// Who leads, as far as it knows.
    pub leader: Option<ReplicaId>,
    /// Its term.
    pub term: Term,
    /// What it knows to be committed.
    pub commit: RaftIndex,
    /// Its last entry.
    pub last: RaftIndex,
    /// Who belongs to the group.
    pub membership: Membership,
    /// Its members, the leader itself among them; empty where another leads.
    pub members: Vec<MemberStatus>,
    /// The newest change of members was followed by an empty one, and both are committed: a majority has it in its log that
    /// the first is. Only then whoever that removed can be done without: a voter that does not know still asks it for its
    /// vote, and forgets what it knew when it is started anew.
    pub change_is_known: bool,
    /// Entries pulled so far, and how many it will be, while it pulls.
    pub pulled: Option<(u64, u64)>,
}

/// One member of a group, as its leader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberStatus {
    /// Its id.
    pub replica: ReplicaId,
    /// Its acknowledgement does not count.
    pub is_learner: bool,
    /// The last entry that it is known to have, flushed.
    pub matched: RaftIndex,
    /// It was heard of within about an election timeout.
    pub is_active: bool,
    /// It is active, it is sent entries as they come, and it lacks 4 096 of them at most, however large they are: what is on
    /// its way counts among those.
    pub in_sync: bool,
    /// Entries that it is not known to have.
    pub lag_entries: u64,
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
