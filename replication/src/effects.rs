//! What goes into a replica's step, and what comes out.

use bytes::Bytes;
use flowstone_protocol::{Error, LeaderEpoch, Marker, Offset, ProducerId, RaftIndex, ReplicaId, Term, Timestamp};
use flowstone_storage::read::LookupTicket;
use flowstone_storage::{
    CheckpointDone, CheckpointJob, CountTicket, FlushDone, FlushJob, HardState, LogEntry, ReadError, ReadTicket,
    StorageError,
};

use crate::machine::Machine;
use crate::membership::MembershipChange;
use crate::peer::PeerMessage;
use crate::replica::read_error;
use crate::reply::{Permit, Reply};
use crate::request::{
    FoundOffset, GroupStatus, OffsetQuery, Produce, Produced, ReadAnswer, ReadRequest, Reconfigure, TrimTo,
};

/// What can happen to a replica.
#[derive(Debug)]
pub enum Event<M: Machine> {
    /// Stand for election now, rather than at the timeout: the only voter has nobody to wait for.
    Campaign,
    /// A client's batch.
    Produce(Produce),
    /// A coordinator's command.
    Command {
        /// For the machine.
        command: M::Command,
        /// Where its answer goes.
        reply: Reply<Result<M::Reply, Error>>,
    },
    /// A read.
    Read {
        /// Of what.
        request: ReadRequest,
        /// Where the batches go.
        reply: Reply<Result<ReadAnswer, Error>>,
    },
    /// A lookup of an offset.
    ListOffset {
        /// Of which.
        query: OffsetQuery,
        /// Where it goes.
        reply: Reply<Result<Option<FoundOffset>, Error>>,
    },
    /// A wish to move the log start.
    Trim {
        /// To where.
        to: TrimTo,
        /// Where the log start goes.
        reply: Reply<Result<Offset, Error>>,
    },
    /// A transaction ends in this partition.
    Marker {
        /// How.
        marker: Marker,
        /// Told when that is committed.
        reply: Reply<Result<(), Error>>,
    },
    /// Other settings.
    Reconfigure(Reconfigure),
    /// A change of who belongs to the group.
    ChangeMembership {
        /// One replica at a time.
        change: MembershipChange,
        /// Told when it is applied.
        reply: Reply<Result<(), Error>>,
    },
    /// A wish that another replica lead.
    TransferLeader {
        /// Which; the best there is where none is named.
        to: Option<ReplicaId>,
        /// Told when another leads, or why not.
        reply: Reply<Result<(), Error>>,
    },
    /// How is the group?
    Group {
        /// Where that goes.
        reply: Reply<Result<GroupStatus, Error>>,
    },
    /// What is committed now for certain, whoever else may believe to lead?
    ReadIndex {
        /// Where the high watermark goes.
        reply: Reply<Result<Offset, Error>>,
    },
    /// These replicas' broker can not be reached at the moment: what was sent to them is lost.
    Unreachable(Vec<ReplicaId>),
    /// The leader's process is gone: somebody should stand for election soon.
    LeaderGone,
    /// Entries for a follower that were read from the disk.
    Fetched(Fetched),
    /// Records that [`Effects::count`] asked for are counted.
    Counted(Counted),
    /// Committed batches from another replica, to be appended as if the leader had sent them.
    Pulled(Pulled),
    /// The flush that [`Effects::flush`] asked for is over.
    Flushed(FlushDone),
    /// The hard state of this number, and all before it, is flushed.
    HardStateFlushed(HardStateNumber),
    /// The checkpoint that [`Effects::checkpoint`] asked for is over.
    CheckpointWritten(CheckpointDone),
    /// One tick of the election clock. A replica alone in its group needs none.
    Tick,
    /// From another replica of the group.
    Peer(PeerMessage),
    /// Look whether retention lets something go (the leader's clock decides).
    Retain,
    /// The disk that was full seems to have room again: writes are tried.
    RoomAgain,
    /// What was only written should be flushed now ([`crate::FlushMode::Relaxed`]).
    FlushNow,
    /// Write a checkpoint, whether one is due or not.
    CheckpointNow,
    /// Drop the reads of those who have left.
    DropAbandoned,
}

impl<M: Machine> Event<M> {
    /// The answer `error` to whoever waits for this.
    pub(crate) fn refused(self, error: Error) -> Option<Answer<M>> {
        Some(match self {
            Self::Produce(Produce { reply, permit, .. }) => Answer::Produce { reply, result: Err(error), permit },
            Self::Command { reply, .. } => Answer::Command { reply, result: Err(error) },
            Self::Read { reply, .. } => Answer::Read { reply, result: Err(error) },
            Self::ListOffset { reply, .. } => Answer::ListOffset { reply, result: Err(error) },
            Self::Trim { reply, .. } => Answer::Trim { reply, result: Err(error) },
            Self::Marker { reply, .. } => Answer::Marker { reply, result: Err(error) },
            Self::ChangeMembership { reply, .. } | Self::TransferLeader { reply, .. } => {
                Answer::ChangeMembership { reply, result: Err(error) }
            }
            Self::Group { reply } => Answer::Group { reply, result: Err(error) },
            Self::ReadIndex { reply } => Answer::ReadIndex { reply, result: Err(error) },
            Self::Campaign
            | Self::Unreachable(_)
            | Self::LeaderGone
            | Self::Fetched(_)
            | Self::Counted(_)
            | Self::Pulled(_)
            | Self::Reconfigure(_)
            | Self::Flushed(_)
            | Self::HardStateFlushed(_)
            | Self::CheckpointWritten(_)
            | Self::Tick
            | Self::Peer(_)
            | Self::Retain
            | Self::RoomAgain
            | Self::FlushNow
            | Self::CheckpointNow
            | Self::DropAbandoned => return None,
        })
    }
}

/// Counts a replica's changes of term and vote within one life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct HardStateNumber(pub(crate) u64);

/// What a step wants done. Everything in here may be done at once and in any order: what has to wait for the disk is not
/// in here yet. It is kept inside the replica until [`Event::Flushed`] or [`Event::HardStateFlushed`] releases it, in the
/// order in which it arose, and then comes out as `send_flushed` and `answers` of that step.
#[derive(Debug)]
#[must_use = "a flush that is not done is never answered"]
pub struct Effects<M: Machine> {
    /// A leader's messages: they need not wait for its own flush.
    pub send_now: Vec<PeerMessage>,
    /// Messages that waited for a flush, and that flush is done: votes, and a follower's answers.
    pub send_flushed: Vec<PeerMessage>,
    /// Term and vote to append to the stripe's file and to flush; then [`Event::HardStateFlushed`].
    pub hard_state: Option<(HardStateNumber, HardState)>,
    /// The log was flushed this far: to be noted beside term and vote, and flushed within a second. Nobody waits for it.
    pub flushed: Option<HardState>,
    /// A flush of the log to run, covering all that was written so far; then [`Event::Flushed`]. One at a time.
    pub flush: Option<FlushOrder>,
    /// A checkpoint to write; then [`Event::CheckpointWritten`]. One at a time.
    pub checkpoint: Option<CheckpointJob>,
    /// Answers to give.
    pub answers: Vec<Answer<M>>,
    /// Reads that need the disk: to be run on a pool, which answers.
    pub tickets: Vec<ReadOrder>,
    /// Lookups that need the disk, or time: to be run on a pool, which answers.
    pub lookups: Vec<LookupOrder>,
    /// Entries for followers that lie on the disk: to be read on a pool; then [`Event::Fetched`].
    pub fetches: Vec<FetchOrder>,
    /// Records to be counted on a pool; then [`Event::Counted`].
    pub count: Option<CountOrder>,
    /// The leader offers what is committed up to there, as it can not send it entry by entry: it is to be pulled.
    pub offered: Option<Offered>,
    /// Its disk takes so long for a flush that it hands leadership over.
    pub is_disk_slow: bool,
    /// The replica has ended: nothing in it may be used any more. Everyone who waited is in `answers`.
    pub ended: Option<Ended>,
}

impl<M: Machine> Default for Effects<M> {
    fn default() -> Self {
        Self {
            send_now: Vec::new(),
            send_flushed: Vec::new(),
            hard_state: None,
            flushed: None,
            flush: None,
            checkpoint: None,
            answers: Vec::new(),
            tickets: Vec::new(),
            lookups: Vec::new(),
            fetches: Vec::new(),
            count: None,
            offered: None,
            is_disk_slow: false,
            ended: None,
        }
    }
}

/// Why a replica ended; it is to be opened anew.
#[derive(Debug)]
pub enum Ended {
    /// A write, a flush or a read that it needs for itself failed.
    Storage(StorageError),
    /// The Raft crate found something that it holds impossible.
    Panicked(String),
    /// The term can not grow any more.
    TermExhausted(Term),
    /// The stripe's file of hard states failed.
    HardState(String),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Storage(error) => error.fmt(f),
            Self::Panicked(message) => write!(f, "the consensus core refused to go on: {message}"),
            Self::TermExhausted(term) => write!(f, "term {term} is the last that a log can hold"),
            Self::HardState(message) => f.write_str(message),
        }
    }
}

/// One answer on its way out.
#[derive(Debug)]
pub enum Answer<M: Machine> {
    /// To a produce request.
    Produce {
        /// Where it goes.
        reply: Reply<Result<Produced, Error>>,
        /// What it says.
        result: Result<Produced, Error>,
        /// Given back with it.
        permit: Permit,
    },
    /// To a command.
    Command {
        /// Where it goes.
        reply: Reply<Result<M::Reply, Error>>,
        /// What it says.
        result: Result<M::Reply, Error>,
    },
    /// To a read.
    Read {
        /// Where it goes.
        reply: Reply<Result<ReadAnswer, Error>>,
        /// What it says.
        result: Result<ReadAnswer, Error>,
    },
    /// To a lookup.
    ListOffset {
        /// Where it goes.
        reply: Reply<Result<Option<FoundOffset>, Error>>,
        /// What it says.
        result: Result<Option<FoundOffset>, Error>,
    },
    /// To a trim.
    Trim {
        /// Where it goes.
        reply: Reply<Result<Offset, Error>>,
        /// What it says.
        result: Result<Offset, Error>,
    },
    /// To a transaction's marker.
    Marker {
        /// Where it goes.
        reply: Reply<Result<(), Error>>,
        /// What it says.
        result: Result<(), Error>,
    },
    /// To a change of membership, or of the leader.
    ChangeMembership {
        /// Where it goes.
        reply: Reply<Result<(), Error>>,
        /// What it says.
        result: Result<(), Error>,
    },
    /// To a question about the group.
    Group {
        /// Where it goes.
        reply: Reply<Result<GroupStatus, Error>>,
        /// What it says.
        result: Result<GroupStatus, Error>,
    },
    /// To a question about what is committed for certain.
    ReadIndex {
        /// Where it goes.
        reply: Reply<Result<Offset, Error>>,
        /// What it says.
        result: Result<Offset, Error>,
    },
}

impl<M: Machine> Answer<M> {
    /// Hands it on.
    pub fn send(self) {
        match self {
            Self::Produce { reply, result, permit } => {
                // Room first: whoever is woken by the answer finds it.
                drop(permit);
                reply.send(result);
            }
            Self::Command { reply, result } => reply.send(result),
            Self::Read { reply, result } => reply.send(result),
            Self::ListOffset { reply, result } => reply.send(result),
            Self::Trim { reply, result } => reply.send(result),
            Self::Marker { reply, result } => reply.send(result),
            Self::ChangeMembership { reply, result } => reply.send(result),
            Self::Group { reply, result } => reply.send(result),
            Self::ReadIndex { reply, result } => reply.send(result),
        }
    }
}

/// A flush to run.
#[derive(Debug)]
pub struct FlushOrder {
    /// What to run.
    pub job: FlushJob,
    /// Clients' bytes among what it has to write; control batches and coordinators' are few.
    pub bytes: u64,
}

/// A read that needs the disk.
#[derive(Debug)]
pub struct ReadOrder {
    /// What to run.
    pub ticket: ReadTicket,
    /// Where the batches go.
    pub reply: Reply<Result<ReadAnswer, Error>>,
    /// As the answer will say.
    pub log_start: Offset,
    /// As the answer will say.
    pub high_watermark: Offset,
    /// As the answer will say.
    pub last_stable_offset: Offset,
    /// Those that may have batches in what is read.
    pub aborted: Vec<(ProducerId, Offset)>,
}

impl ReadOrder {
    /// Reads, waiting for the disk; and where that goes.
    pub fn run(self) -> (Reply<Result<ReadAnswer, Error>>, Result<ReadAnswer, ReadError>) {
        let Self { ticket, reply, log_start, high_watermark, last_stable_offset, mut aborted } = self;
        let answer = ticket.run().map(|bytes| {
            aborted.retain(|(_, first)| *first < bytes.next);
            ReadAnswer { bytes, log_start, high_watermark, last_stable_offset, aborted }
        });
        (reply, answer)
    }
}

/// A lookup of an offset that needs the disk, or time.
#[derive(Debug)]
pub struct LookupOrder {
    /// What to run.
    pub work: LookupWork,
    /// Where the offset goes.
    pub reply: Reply<Result<Option<FoundOffset>, Error>>,
    /// As the answer will say.
    pub leader_epoch: LeaderEpoch,
}

impl LookupOrder {
    /// Looks it up, waiting for the disk, and answers; not where nobody waits any more. The offset where it met rot, if it
    /// did.
    pub fn run(self) -> Option<Offset> {
        let Self { work, reply, leader_epoch } = self;
        if reply.is_abandoned() {
            return None;
        }
        let found = match work {
            LookupWork::Find(ticket) => ticket.run().map(|found| {
                found.map(|found| FoundOffset {
                    offset: found.offset,
                    timestamp: found.timestamp,
                    leader_epoch,
                    records: None,
                })
            }),
            LookupWork::Count { from, ticket } => ticket.run().map(|records| {
                Some(FoundOffset { offset: from, timestamp: Timestamp::NONE, leader_epoch, records: Some(records) })
            }),
        };
        let rot = match &found {
            Err(ReadError::Corrupt { offset, .. }) => Some(*offset),
            _ => None,
        };
        reply.send(found.map_err(|error| read_error(&error)));
        rot
    }
}

/// What a lookup does on the disk.
#[derive(Debug)]
pub enum LookupWork {
    /// Finds an offset.
    Find(LookupTicket),
    /// Counts the data records from an offset on.
    Count {
        /// That offset.
        from: Offset,
        /// Who counts.
        ticket: CountTicket,
    },
}

/// What a leader offered to a follower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offered {
    /// Who offered it.
    pub leader: ReplicaId,
    /// Up to which entry.
    pub index: RaftIndex,
    /// The term of the entry there.
    pub index_term: Term,
}

/// Entries that a leader wants to send and that lie on the disk.
#[derive(Debug)]
pub struct FetchOrder {
    /// The first of them.
    pub first: RaftIndex,
    /// The last, at most.
    pub last: RaftIndex,
    /// Bytes of them, at most; one is given whatever its length.
    pub max_bytes: u32,
    /// For the Raft crate.
    pub(crate) context: FetchContext,
}

/// What the Raft crate wants to be told with the entries.
#[derive(Debug)]
pub(crate) struct FetchContext(pub(crate) raft::GetEntriesContext);

impl FetchOrder {
    /// What was read, or why it could not be.
    pub fn done(self, entries: Result<Vec<LogEntry>, ReadError>) -> Fetched {
        Fetched { first: self.first, entries, context: self.context }
    }
}

/// The records of the log are to be counted, as its index is not at hand.
#[derive(Debug)]
pub struct CountOrder {
    pub(crate) ticket: CountTicket,
    /// From there on...
    pub(crate) log_start: Offset,
    /// ...there are about so many.
    pub(crate) about: u64,
}

impl CountOrder {
    /// Counts, waiting for the disk.
    pub fn run(self) -> Counted {
        Counted { log_start: self.log_start, about: self.about, records: self.ticket.run() }
    }
}

/// How many records there are, rather than about so many.
#[derive(Debug)]
pub struct Counted {
    pub(crate) log_start: Offset,
    pub(crate) about: u64,
    pub(crate) records: Result<u64, ReadError>,
}

/// Entries for a follower, read.
#[derive(Debug)]
pub struct Fetched {
    pub(crate) first: RaftIndex,
    pub(crate) entries: Result<Vec<LogEntry>, ReadError>,
    pub(crate) context: FetchContext,
}

/// Committed batches from another replica's log.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// The entry that they begin with.
    pub first: RaftIndex,
    /// One past the last.
    pub next: RaftIndex,
    /// An entry of this log that was found to be the committed one: what is pulled may go on behind it, though it is not
    /// known to be committed here.
    pub compared: Option<(RaftIndex, Term)>,
    /// Back to back, as stored there; not verified yet.
    pub bytes: Bytes,
}
