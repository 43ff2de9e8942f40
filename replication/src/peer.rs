//! Messages between the replicas of one group.
//!
//! They are our own types from end to end: no byte from a peer reaches the Raft crate's decoder, entries carry batches by
//! reference, and there is no form for a forwarded proposal (a follower would forward it, and a new leader append it
//! without deduplication).

use flowstone_protocol::{RaftIndex, ReplicaId, Term, TopicPartition};
use flowstone_storage::LogEntry;

/// An entry beside its data.
const ENTRY_BYTES: usize = size_of::<LogEntry>();

/// One message. Both ids are checked on arrival: what is not for this very replica is dropped.
#[derive(Debug, Clone)]
pub struct PeerMessage {
    /// Who sent it.
    pub from: ReplicaId,
    /// For whom it is.
    pub to: ReplicaId,
    /// The sender's term; in a pre-vote the term it would have.
    pub term: Term,
    /// What it says.
    pub body: PeerBody,
}

impl PeerMessage {
    /// About what it takes in memory.
    pub fn bytes(&self) -> usize {
        let entries = match &self.body {
            PeerBody::Append { entries, .. } => entries.iter().map(|entry| entry.data_bytes() + ENTRY_BYTES).sum(),
            PeerBody::Beat(beat) => {
                size_of::<Beat>() + (beat.joins.len() + beat.leaves.len()) * size_of::<RestingGroup>()
            }
            PeerBody::BeatAnswer(answer) => size_of::<BeatAnswer>() + answer.left.len() * size_of::<RestingGroup>(),
            _ => 0,
        };
        size_of::<Self>() + entries
    }
}

/// What a [`PeerMessage`] says.
#[derive(Debug, Clone)]
pub enum PeerBody {
    /// The leader's next entries, or only its commit index.
    Append {
        /// The entry before them.
        previous_index: RaftIndex,
        /// Its term.
        previous_term: Term,
        /// The leader's commit index.
        commit: RaftIndex,
        /// The entries, in order, as the leader's log has them.
        entries: Vec<LogEntry>,
    },
    /// Answers [`PeerBody::Append`].
    AppendResponse {
        /// The last entry that agrees, or, rejected, the one that was refused.
        index: RaftIndex,
        /// The follower's commit index.
        commit: RaftIndex,
        /// The entries did not fit.
        reject: bool,
        /// Rejected: where to try next.
        reject_hint: RaftIndex,
        /// Rejected: the term there.
        hint_term: Term,
        /// Not zero: the follower asks for a snapshot up to at least here.
        request_snapshot: RaftIndex,
    },
    /// Asks for a vote.
    Vote {
        /// Only asks whether it would get it; changes nobody's term.
        pre: bool,
        /// The candidate's last entry.
        last_index: RaftIndex,
        /// Its term.
        last_term: Term,
        /// The candidate's commit index.
        commit: RaftIndex,
        /// The term of the entry there.
        commit_term: Term,
        /// The leader itself asked for this election, to hand over.
        transfer: bool,
    },
    /// Answers [`PeerBody::Vote`].
    VoteResponse {
        /// As in the question.
        pre: bool,
        /// No.
        reject: bool,
        /// Rejected: the voter's commit index.
        commit: RaftIndex,
        /// Rejected: the term of the entry there.
        commit_term: Term,
    },
    /// The leader lives.
    Heartbeat {
        /// What the follower may commit.
        commit: RaftIndex,
    },
    /// So does the follower.
    HeartbeatResponse {
        /// The follower's commit index.
        commit: RaftIndex,
        /// Its group rests there, in the shard of this number, counted from 1; 0: it does not.
        lane: u32,
    },
    /// All groups that this shard and that one count as resting live: in place of a heartbeat of each. Addressed to one of
    /// them.
    Beat(Box<Beat>),
    /// Answers [`PeerBody::Beat`].
    BeatAnswer(Box<BeatAnswer>),
    /// A follower asks its leader to hand leadership to it.
    TransferLeader,
    /// The leader tells a follower to stand for election at once.
    TimeoutNow,
    /// The leader's log does not begin early enough for the follower, or the follower is far behind: it is to pull what
    /// is committed, up to here.
    SnapshotOffer {
        /// The leader's newest checkpoint.
        index: RaftIndex,
        /// The term of the entry there.
        index_term: Term,
    },
    /// Answers [`PeerBody::SnapshotOffer`].
    SnapshotAnswer {
        /// As in the offer.
        index: RaftIndex,
        /// It could not be pulled; else all up to there is in the follower's log, flushed.
        failed: bool,
    },
    /// The leader asks whether it still leads, for a linearizable read; a heartbeat otherwise.
    ReadIndex {
        /// Which read.
        request: u64,
    },
    /// Answers [`PeerBody::ReadIndex`].
    ReadIndexAnswer {
        /// As in the question.
        request: u64,
        /// The follower's commit index.
        index: RaftIndex,
        /// It does not follow the asker; never sent to date, as a follower of another simply tells its term.
        refused: bool,
    },
    /// The sender has ended and will be opened anew, or was closed: nothing of it is to be waited for.
    Ended,
}

/// A leader and a follower of a group at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestingGroup {
    /// Of which partition.
    pub tp: TopicPartition,
    /// The leader.
    pub leader: ReplicaId,
    /// The follower.
    pub follower: ReplicaId,
    /// In which term.
    pub term: Term,
}

/// What a shard says for all groups at rest that it leads, and that follow in one shard of another broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    /// Another one when either side was restarted, or they could not agree; newer ones have larger numbers.
    pub session: u64,
    /// Counts the beats of the session, from 1 on.
    pub number: u64,
    /// The shard that speaks, from 1 on.
    pub lane: u32,
    /// Over all groups that it speaks for, once those that leave and then those that join are counted.
    pub sum: u64,
    /// Those that it speaks for from now on.
    pub joins: Vec<RestingGroup>,
    /// Those that it does not speak for any more.
    pub leaves: Vec<RestingGroup>,
}

/// How a shard took a [`Beat`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeatAnswer {
    /// As in the beat.
    pub session: u64,
    /// As in the beat.
    pub number: u64,
    /// The shard that answers, from 1 on.
    pub lane: u32,
    /// It counts the same groups. If not, the session is over.
    pub is_known: bool,
    /// Groups of the session that do not follow that leader any more, or do not rest.
    pub left: Vec<RestingGroup>,
}
