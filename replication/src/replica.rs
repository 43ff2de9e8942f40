//! One replica: a log, its Raft and its machine, as a state machine without threads, clocks or files of its own.
//!
//! [`Replica::step`] takes what happened and returns what is to be done. Writing into the log happens inside (into the
//! page cache, through the disk's door); flushing, sending and answering are effects. The order that makes a promise
//! true is kept here, in one queue:
//!
//! ```text
//!  proposals -> ready n: written -> [ready n | needs write w flushed, hard state h flushed | messages] -> released in order
//!                                                                                    |
//!                                          persisted in Raft -> committed -> applied -> answered
//! ```
//!
//! One flush of a log is in flight at a time; whatever is written meanwhile is covered by the next. That is all there is
//! to group commit.

use std::cell::Ref;
use std::collections::VecDeque;

use bytes::Bytes;
use flowstone_protocol::control::{encode_marker, log_start_of, log_start_payload};
use flowstone_protocol::{
    BatchHeader, ControlType, Error, ErrorCode, LeaderEpoch, Marker, Offset, RaftIndex, ReplicaId, Term, Timestamp,
    TimestampType, TopicPartition,
};
use flowstone_storage::planted::{Bug, is_planted};
use flowstone_storage::read::Lookup;
use flowstone_storage::{
    Checkpoint, Compaction, CompactionLimits, EntryBody, HardState, Log, LogEntry, Read, ReadError, RecordCount,
    RepairDone, RetentionConfig, SegmentCopy, Settled, StorageError,
};
use raft::eraftpb::Entry;
use raft::{Ready, StateRole};

use crate::effects::{
    Answer, CountOrder, Counted, Effects, Ended, Event, FlushOrder, HardStateNumber, LookupOrder, LookupWork, Offered,
    Pulled, ReadOrder,
};
use crate::machine::{Admission, Commanded, Machine, MachineBody, MachineEntry};
use crate::membership::{Membership, MembershipChange};
use crate::parked::{Parked, ParkedReads, Waiting};
use crate::peer::{PeerBody, PeerMessage};
use crate::raft_adapter::{self, ELECTION_TICKS, Panicked, Quick, RaftAdapter, Rest, Ticked};
use crate::raft_log;
use crate::reply::{Permit, Reply};
use crate::request::{
    Acks, FlushMode, FoundOffset, GroupStatus, Health, OffsetQuery, Produce, Produced, ReadAnswer, ReadRequest,
    Reconfigure, ReplicaStatus, Role, TrimTo,
};

/// More than a control batch takes beside its payload.
const CONTROL_BYTES: usize = 256;
/// A checkpoint that waits for a quiet moment holds requests back once it is overdue by this factor.
const CHECKPOINT_OVERDUE: u64 = 4;
/// Requests and messages that are held back at a time; then requests are refused with `OVERLOADED`, and peers' messages
/// dropped, as Raft repeats them.
const HELD_MAX: usize = 4_096;
/// Answers to commands that wait for their entry; then `OVERLOADED`. Batches of clients are bounded by their bytes.
const PARKED_MAX: usize = 1 << 16;
/// Ticks within which another has to lead once leadership is being handed over.
const TRANSFER_TICKS: u64 = 20;
/// A leader whose flush is under way for so many ticks hands over to one whose disk was quicker: about what an election
/// takes. One that finds nobody looks again as much later.
pub(crate) const SLOW_FLUSH_TICKS: u32 = 15;

/// How one replica is run.
#[derive(Debug, Clone)]
pub struct ReplicaConfig {
    /// Its partition.
    pub tp: TopicPartition,
    /// Its own id.
    pub replica: ReplicaId,
    /// When a write counts.
    pub flush: FlushMode,
    /// What may be deleted.
    pub retention: RetentionConfig,
    /// It may use the disk's reserve.
    pub internal: bool,
    /// The largest batch of a client, in bytes.
    pub max_message_bytes: usize,
    /// A checkpoint after this many bytes applied...
    pub checkpoint_bytes: u64,
    /// ...or this many entries: bounds what a restart replays.
    pub checkpoint_entries: u64,
    /// Readers that may wait at the high watermark; the next is refused with `OVERLOADED`.
    pub parked_reads_max: usize,
    /// For election timeouts.
    pub seed: u64,
    /// A follower that is about this many bytes behind the newest checkpoint is offered that, rather than being sent entry
    /// by entry.
    pub offer_after_bytes: u64,
    /// In a group that is just being made, this one stands for election at once; the others wait.
    pub stands_first: bool,
}

/// Why a replica could not be made from its log: what that or its checkpoint holds can not be understood. Final: an
/// operator has to look.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CannotOpen(pub String);

/// One replica. See the module's documentation.
#[derive(Debug)]
pub struct Replica<M: Machine> {
    config: ReplicaConfig,
    raft: RaftAdapter,
    machine: M,
    /// Those that vote and count now.
    membership: Membership,
    /// Changes up to here are in it already: they were known to be committed when this replica was opened.
    members_known_to: RaftIndex,
    /// The members as of `applied`, for checkpoints.
    membership_applied: Membership,
    /// The last change up to there was empty, which says of the one before it that it is committed: see [`known_members`].
    change_is_known: bool,
    /// Its log could not be read when it was opened: it ends with its first step.
    unreadable: Option<StorageError>,

    /// Term and vote as last handed out to be flushed.
    hard_state: HardState,
    hard_states_written: HardStateNumber,
    hard_states_flushed: HardStateNumber,
    /// Appends so far, and how many of them are flushed: `writes_flushed <= in flight <= writes`.
    writes: u64,
    writes_flushed: u64,
    flush_in_flight: Option<u64>,
    /// From this tick on the flush in flight counts as slow.
    flush_slow_at: u64,
    /// Clients' bytes that no flush covers yet.
    bytes_unflushed: u64,
    /// What is answered may be unflushed, up to this write: all of it while the mode is relaxed.
    relaxed_writes: Option<u64>,
    /// Relaxed only: flush although nobody waits.
    flush_wanted: bool,
    /// Readies that are not persisted yet, in order, each with what it waits for.
    unflushed: VecDeque<Unflushed>,

    /// The term that it leads.
    leading: Option<Term>,
    /// Its term's no-op is applied: it serves.
    serving: bool,
    /// Accepted in this step, not yet given to Raft.
    proposals: Vec<Entry>,
    /// Where the next accepted batch goes. Storage stamps the same offset; both are compared after the write.
    next_offset: Offset,
    parked: Parked<M>,
    reads: ParkedReads,
    /// Since which tick it hears no leader, while readers wait at it.
    unheard_since: Option<u64>,
    log_start_proposed: bool,
    /// A change of members is among the proposals.
    change_proposed: bool,
    /// Leadership is being handed over.
    transfer: Option<Transfer>,
    linearizable: LinearizableReads,
    /// Set when a reservation failed; cleared by a probe.
    disk_full: Option<String>,

    applied: RaftIndex,
    /// Data records between log start and high watermark.
    records: u64,
    checkpoint: CheckpointState,
    /// Requests held back until an overdue checkpoint found its quiet moment.
    held: Vec<Event<M>>,
    /// Another leader's entries replace some that are flushed: nothing else goes on until that is done.
    truncation: Option<Box<Truncation>>,
    /// The log is about to be cut here.
    cut_below: Option<RaftIndex>,
    ended: bool,
}

/// Leadership that is being handed over.
#[derive(Debug)]
struct Transfer {
    reply: Reply<Result<(), Error>>,
    to: ReplicaId,
    /// The tick after which nobody took over.
    until: u64,
}

/// Those who have to know that this replica still leads. One question is under way at a time; who comes meanwhile waits
/// for the next, as only that was asked after it.
#[derive(Debug, Default)]
struct LinearizableReads {
    number: u64,
    to_ask: Vec<Linearizable>,
    asked: Vec<Linearizable>,
    /// Confirmed up to there; to be answered once that is applied.
    confirmed: Vec<(RaftIndex, Linearizable)>,
}

/// An answer that only a leader may give, and one that does not know yet that it is none any more must not.
#[derive(Debug)]
enum Linearizable {
    /// How far is committed.
    Read { reply: Reply<Result<Offset, Error>> },
    /// That a batch is refused for what is not in the log: the next leader's may have it.
    Missing { reply: Reply<Result<Produced, Error>>, error: Error, permit: Permit },
}

impl Linearizable {
    fn confirmed<M: Machine>(self, high_watermark: Offset) -> Answer<M> {
        match self {
            Self::Read { reply } => Answer::ReadIndex { reply, result: Ok(high_watermark) },
            Self::Missing { reply, error, permit } => Answer::Produce { reply, result: Err(error), permit },
        }
    }

    fn failed<M: Machine>(self, error: Error) -> Answer<M> {
        match self {
            Self::Read { reply } => Answer::ReadIndex { reply, result: Err(error) },
            Self::Missing { reply, permit, .. } => Answer::Produce { reply, result: Err(error), permit },
        }
    }
}

impl LinearizableReads {
    fn is_empty(&self) -> bool {
        self.to_ask.is_empty() && self.asked.is_empty() && self.confirmed.is_empty()
    }

    fn len(&self) -> usize {
        self.to_ask.len() + self.asked.len() + self.confirmed.len()
    }

    fn fail_all<M: Machine>(&mut self, error: &Error, answers: &mut Vec<Answer<M>>) {
        let waiting = self.to_ask.drain(..).chain(self.asked.drain(..));
        let waiting = waiting.chain(self.confirmed.drain(..).map(|(_, waiting)| waiting));
        answers.extend(waiting.map(|waiting| waiting.failed(error.clone())));
    }
}

/// Whether a batch is refused because something is not in the log. Who leads without knowing that another one does since
/// would say so of what that one has: a producer then takes for lost what is stored, and stores it again.
fn says_what_is_missing(error: &Error) -> bool {
    matches!(error.code, ErrorCode::OutOfOrderSequence | ErrorCode::UnknownProducer | ErrorCode::ProducerExpired)
}

/// A ready that waits to cut the log.
#[derive(Debug)]
struct Truncation {
    ready: Ready,
    below: RaftIndex,
    number: HardStateNumber,
}

/// A ready that waits: for the log's write of this number, for the hard state of that.
#[derive(Debug)]
struct Unflushed {
    ready: u64,
    write: Option<u64>,
    hard_state: Option<HardStateNumber>,
    messages: Vec<PeerMessage>,
}

#[derive(Debug, Default)]
struct CheckpointState {
    entries: u64,
    bytes: u64,
    wanted: bool,
    in_flight: bool,
    /// Taken, and waiting for a flush that covers it.
    taken: Option<Taken>,
}

/// What a checkpoint will say, as it was at `applied`.
#[derive(Debug)]
struct Taken {
    applied: RaftIndex,
    log_start: Offset,
    membership: Bytes,
    machine: Bytes,
    /// Its entries are flushed with this write.
    write: u64,
}

impl<M: Machine> Replica<M> {
    /// A replica from its opened log and from what its stripe's file says about it; nothing if it was never written.
    ///
    /// # Errors
    /// When what the checkpoint holds can not be understood.
    pub fn open(
        log: Log,
        hard_state: Option<HardState>,
        mut machine: M,
        config: ReplicaConfig,
    ) -> Result<Self, CannotOpen> {
        let mut log = log;
        let identity = *log.identity();
        if identity.replica != config.replica || identity.topic_partition != config.tp {
            return Err(CannotOpen(format!(
                "the folder belongs to replica {} of {}, not to replica {} of {}",
                identity.replica, identity.topic_partition, config.replica, config.tp
            )));
        }
        let checkpoint = log.checkpoint();
        let membership = Membership::decode(&checkpoint.membership)
            .map_err(|error| CannotOpen(format!("the checkpoint at index {}: {error}", checkpoint.applied)))?;
        machine.restore(&checkpoint.machine).map_err(|error| {
            CannotOpen(format!(
                "the checkpoint at index {} holds no state of this machine: {error}",
                checkpoint.applied
            ))
        })?;
        let applied = checkpoint.applied;
        let (members, members_known_to, unreadable) = match known_members(&mut log, &membership) {
            Ok((members, index)) => (members, index, None),
            Err(error) => (membership.clone(), applied, Some(error)),
        };

        // A crash may keep the first entries of a term and forget the term itself: it is in the log, then.
        let flushed = log.flushed_index();
        let mut hard_state = hard_state.unwrap_or(HardState { term: Term::new(0), vote: None, flushed });
        if hard_state.term < log.last_term() {
            hard_state = HardState { term: log.last_term(), vote: None, flushed };
        }
        if is_planted(Bug::ForgetVote) {
            hard_state.vote = None;
        }
        let records = match count_records(&mut log) {
            RecordCount::Exact(records) => records,
            // Whoever opens may wait.
            RecordCount::About(about, ticket) => ticket.run().unwrap_or_else(|error| {
                tracing::warn!(dir = %log.dir().display(), %error, "cannot count the records of a log: about {about}");
                about
            }),
        };
        delete_trimmed(&mut log);
        let next_offset = log.end_offset();
        let raft = RaftAdapter::open(
            config.replica,
            log,
            hard_state,
            members.clone(),
            config.seed,
            config.offer_after_bytes,
            config.stands_first,
        )
        .map_err(|Panicked(message)| CannotOpen(message))?;
        Ok(Self {
            parked: Parked::default(),
            reads: ParkedReads::new(config.parked_reads_max),
            unheard_since: None,
            relaxed_writes: (config.flush == FlushMode::Relaxed).then_some(u64::MAX),
            config,
            raft,
            machine,
            membership: members,
            members_known_to,
            membership_applied: membership,
            change_is_known: false,
            unreadable,
            hard_state,
            hard_states_written: HardStateNumber::default(),
            hard_states_flushed: HardStateNumber::default(),
            writes: 0,
            writes_flushed: 0,
            flush_in_flight: None,
            flush_slow_at: 0,
            flush_wanted: false,
            unflushed: VecDeque::new(),
            leading: None,
            serving: false,
            proposals: Vec::new(),
            bytes_unflushed: 0,
            next_offset,
            log_start_proposed: false,
            change_proposed: false,
            transfer: None,
            linearizable: LinearizableReads::default(),
            disk_full: None,
            applied,
            records,
            checkpoint: CheckpointState::default(),
            held: Vec::new(),
            truncation: None,
            cut_below: None,
            ended: false,
        })
    }

    /// Takes what happened, in order, and says what is to be done. `now` is the leader's clock.
    pub fn step(&mut self, events: impl IntoIterator<Item = Event<M>>, now: Timestamp) -> Effects<M> {
        let mut fx = Effects::default();
        let mut outcome = self.unreadable.take().map_or(Ok(()), |error| Err(Ended::Storage(error)));
        for event in events {
            if outcome.is_err() || self.ended {
                fx.answers.extend(event.refused(self.ended_error("it was opened anew")));
            } else {
                outcome = self.on_event(event, now, &mut fx);
            }
        }
        if !self.ended
            && let Err(ended) = outcome.and_then(|()| self.settle(now, &mut fx)).and_then(|()| self.can_send())
        {
            // What the Raft crate could not read is the reason, rather than that it can not do without.
            let ended = match (ended, self.raft.unreadable()) {
                (Ended::Panicked(_), Some(error)) => Ended::Storage(error),
                (ended, _) => ended,
            };
            self.end(ended, &mut fx);
        }
        self.settle_mark(&mut fx);
        fx
    }

    /// # Errors
    /// What a follower needs is not known to be committed, and damaged: leading on, this would never commit what it was elected
    /// with; and it answered for that.
    fn can_send(&self) -> Result<(), Ended> {
        self.raft.damaged_tail().map_or(Ok(()), |error| Err(Ended::Storage(error)))
    }

    /// One state leaves a step, the newest: a mark that was noted before a vote, or before a cut was decided, would take
    /// it back, as the file's last entry counts.
    fn settle_mark(&self, fx: &mut Effects<M>) {
        if self.ended {
            return;
        }
        match &mut fx.hard_state {
            Some((_, state)) => {
                *state = self.hard_state();
                fx.flushed = None;
            }
            None => fx.flushed = fx.flushed.map(|_| self.hard_state()),
        }
    }

    /// Ticks that it has seen.
    pub fn ticks(&self) -> u64 {
        self.raft.ticks()
    }

    /// Begins to count ticks here: right after it was opened.
    pub fn begin_at(&mut self, ticks: u64) {
        self.raft.begin_at(ticks);
    }

    /// Ticks that went by and that nothing happened in. What is due since then happens with the next [`Event::Tick`].
    pub fn pass_ticks(&mut self, ticks: u64) {
        self.raft.pass(ticks);
    }

    /// After how many ticks, from those that it has seen, the next one matters: never while it is alone in its group and
    /// leads it, nor while it does not vote.
    pub fn wakes_in(&self) -> Option<u64> {
        self.raft.wakes_in()
    }

    /// Whether nothing is under way that a step would have to look at.
    fn is_idle(&self) -> bool {
        !self.ended
            && self.truncation.is_none()
            && self.unflushed.is_empty()
            && self.proposals.is_empty()
            && self.held.is_empty()
            && self.transfer.is_none()
            && self.linearizable.is_empty()
    }

    /// Passes ticks without a step where nothing comes of them but heartbeats, which are appended to `out`. `None`: it
    /// needs [`Event::Tick`], and nothing was passed; else whether it needs a step, without a tick.
    pub fn quick_ticks(&mut self, ticks: u64, out: &mut Vec<PeerMessage>) -> Option<bool> {
        // Whoever waits at one that does not lead is told when nobody else does.
        if !self.is_idle() || (!self.serving && !self.reads.is_empty()) {
            return None;
        }
        match self.raft.quick_ticks(ticks, out) {
            Ok(ticked) => ticked.map(|ticked| ticked == Ticked::Step),
            // The step finds it, and ends the replica.
            Err(Panicked(message)) => {
                tracing::error!(tp = %self.config.tp, message, "the consensus core gave up at a tick");
                None
            }
        }
    }

    /// Takes a heartbeat, or the answer to one, without a step where it tells nothing new; `Err` gives the message back for
    /// [`Event::Peer`].
    ///
    /// # Errors
    /// When it needs a step.
    pub fn quick_message(&mut self, message: PeerMessage) -> Result<Option<PeerMessage>, PeerMessage> {
        if message.to != self.config.replica || !self.is_idle() {
            return Err(message);
        }
        match self.raft.quick_message(&message) {
            Quick::Step => Err(message),
            Quick::Done => Ok(None),
            Quick::Answer(answer) => Ok(Some(answer)),
        }
    }

    /// How its group is while it rests: heartbeats that fit need not be given to it until it is stepped next; what they
    /// said is then told by [`Replica::heard_leader`] and [`Replica::heard_follower`].
    pub(crate) fn rest(&self) -> Option<Rest> {
        if self.is_idle() { self.raft.rest() } else { None }
    }

    pub(crate) fn heard_leader(&mut self, at: u64) {
        self.raft.heard_leader(at);
    }

    pub(crate) fn heard_follower(&mut self, replica: ReplicaId) {
        self.raft.heard_follower(replica);
    }

    /// Gives back the memory that only a busy replica needs.
    pub(crate) fn shed(&mut self) {
        self.unflushed.shrink_to_fit();
        self.proposals.shrink_to_fit();
        self.held.shrink_to_fit();
        self.parked.shed();
        self.raft.shed();
    }

    pub(crate) fn rested(&mut self, until: u64, heard: &[(ReplicaId, u64)]) {
        self.raft.rested(until, heard);
    }

    /// Whether there is anything in its group but itself.
    pub fn is_alone(&self) -> bool {
        self.membership.is_alone(self.config.replica)
    }

    /// Whether its vote alone decides.
    pub fn is_only_voter(&self) -> bool {
        self.membership.is_only_voter(self.config.replica)
    }

    /// Whether [`Event::Retain`] may have anything to do. What is written to one segment that is not full is most of what
    /// there is where thousands are idle.
    pub fn may_retain(&self, now: Timestamp) -> bool {
        self.machine.may_expire() || self.log().may_retain(now)
    }

    /// Whether something is written and not flushed, nor being flushed.
    pub fn is_dirty(&self) -> bool {
        self.writes > self.flush_in_flight.unwrap_or(self.writes_flushed)
    }

    /// Whether it may answer for what is only in memory.
    pub fn is_relaxed(&self) -> bool {
        self.relaxed_writes.is_some()
    }

    /// Whether writes are refused for want of room.
    pub fn is_disk_full(&self) -> bool {
        self.disk_full.is_some()
    }

    /// Whether readers wait.
    pub fn has_parked_reads(&self) -> bool {
        !self.reads.is_empty()
    }

    /// Applied and not yet in a checkpoint.
    pub fn entries_since_checkpoint(&self) -> u64 {
        self.checkpoint.entries
    }

    /// Changes after how many entries a checkpoint is due: its part of what a restart may replay in all.
    pub fn checkpoint_after(&mut self, entries: u64) {
        self.config.checkpoint_entries = entries;
    }

    /// Whether a flush or a checkpoint that it ordered is not reported back yet.
    pub fn has_work_in_flight(&self) -> bool {
        self.flush_in_flight.is_some() || self.checkpoint.in_flight
    }

    /// Its settings.
    pub fn config(&self) -> &ReplicaConfig {
        &self.config
    }

    /// Its log.
    pub fn log(&self) -> Ref<'_, Log> {
        self.raft.log()
    }

    /// Its log, to close it: the replica is not stepped any more.
    pub fn into_log(self) -> Log {
        self.raft.into_log()
    }

    /// Closes the active segment if `offset`, which is committed, lies in that and can not be read: it can be repaired then.
    /// Segments need not be the same on all replicas.
    ///
    /// # Errors
    /// When the log takes no more writes.
    pub fn seal_at(&mut self, offset: Offset) -> Result<(), StorageError> {
        let log = self.log();
        let is_due = offset < log.high_watermark() && log.is_in_active_segment(offset) && self.truncation.is_none();
        drop(log);
        if is_due {
            self.raft.log_mut().seal()?;
        }
        Ok(())
    }

    /// Reads from a repaired file from now on; whether nothing else in that is rotten.
    ///
    /// # Errors
    /// When the repair failed: the log is as it was.
    pub fn repaired(&mut self, done: RepairDone) -> Result<bool, StorageError> {
        self.raft.log_mut().repaired(done)
    }

    /// Begins to compact its log, where that is due; see [`Log::begin_compaction`].
    ///
    /// What a follower that is heard of has not got yet is left as it is: it would have to be copied a compacted log in place
    /// of some entries.
    pub fn begin_compaction(&mut self, memory_bytes: u64, seed: u64, now: Timestamp) -> Option<Compaction> {
        self.log().config().compaction?;
        let own = self.config.replica;
        let followers = self.raft.members().into_iter().filter(|member| member.replica != own && member.is_active);
        let up_to = followers.map(|member| member.matched).min().unwrap_or(RaftIndex::new(u64::MAX));
        let limits = CompactionLimits { up_to, memory_bytes, seed, now };
        let last_stable = self.last_stable_offset();
        self.raft.log_mut().remove_replaced();
        if !self.log().is_compaction_due(last_stable, &limits) {
            return None;
        }
        let settled = Settled::new(last_stable, self.machine.aborted_transactions());
        self.raft.log_mut().begin_compaction(settled, limits)
    }

    /// Another replica waits until this one's log is clean up to `offset`: the active segment is closed where that lies in
    /// it, as only closed ones are cleaned.
    pub fn want_clean_to(&mut self, offset: Offset) {
        let log = self.log();
        let is_due = log.config().compaction.is_some() && offset > log.cleanness().clean_to;
        drop(log);
        if is_due {
            self.raft.log_mut().want_clean_to(offset);
            if let Err(error) = self.seal_at(offset.plus(-1)) {
                tracing::debug!(tp = %self.config.tp, %error, "a segment is not closed: the log takes no writes");
            }
        }
    }

    /// Reads from the new file of a cleaned segment from now on.
    pub fn segment_copied(&mut self, copy: &mut SegmentCopy) {
        let before = self.log().sealed_records();
        self.raft.log_mut().segment_copied(copy);
        self.count_from(before);
    }

    /// The sealed segments had so many records before some of them were replaced.
    fn count_from(&mut self, before: u64) {
        let after = self.log().sealed_records();
        self.records = (self.records + after).saturating_sub(before);
    }

    /// Takes in what a piece of a compaction did; `false` where it was not begun by this life of the replica.
    pub fn compacted(&mut self, compaction: &mut Compaction) -> bool {
        let is_own = self.log().has_begun(compaction);
        if is_own {
            let before = self.log().sealed_records();
            self.raft.log_mut().compacted(compaction);
            self.count_from(before);
        }
        is_own
    }

    /// Its machine.
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// The machine of a replica that has ended, for its next life.
    pub fn into_machine(self) -> M {
        self.machine
    }

    /// Who belongs to its group.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// Whether its acknowledgement counts.
    pub fn is_voter(&self) -> bool {
        self.membership.voters.contains(&self.config.replica)
    }

    /// Who leads, as far as it knows.
    pub fn leader(&self) -> Option<ReplicaId> {
        self.raft.leader()
    }

    /// Term, vote and flushed index as they are now.
    pub fn hard_state(&self) -> HardState {
        HardState { flushed: self.flushed_index(), ..self.hard_state }
    }

    /// Entries up to here are as durable as its flush mode asks for.
    pub fn persisted(&self) -> RaftIndex {
        self.raft.persisted()
    }

    /// Entries up to here are known to be committed; they may not be persisted here, nor applied.
    pub fn committed(&self) -> RaftIndex {
        self.raft.committed()
    }

    /// The last entry that the machine was given.
    pub fn applied(&self) -> RaftIndex {
        self.applied
    }

    /// How it is.
    pub fn status(&self) -> ReplicaStatus {
        let log = self.log();
        ReplicaStatus {
            role: match self.raft.role() {
                StateRole::Leader if self.serving => Role::Leader,
                StateRole::Leader => Role::Elected,
                StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
                StateRole::Follower if self.is_voter() => Role::Follower,
                StateRole::Follower => Role::Learner,
            },
            term: self.raft.term(),
            log_start: log.log_start(),
            high_watermark: log.high_watermark(),
            last_stable_offset: self.last_stable_offset(),
            end_offset: log.end_offset(),
            size_bytes: log.size_bytes(),
            records: self.records,
            health: if self.disk_full.is_some() { Health::DiskFull } else { Health::Ok },
            leader: self.raft.leader(),
            leader_broker: None,
            is_voter: self.is_voter(),
        }
    }

    fn on_event(&mut self, event: Event<M>, now: Timestamp, fx: &mut Effects<M>) -> Result<(), Ended> {
        let report = matches!(event, Event::Flushed(_) | Event::HardStateFlushed(_) | Event::CheckpointWritten(_));
        let request =
            matches!(event, Event::Produce(_) | Event::Command { .. } | Event::Trim { .. } | Event::Marker { .. });
        if (self.truncation.is_some() && !report) || (request && self.holds_back()) {
            // Settings are few, and never lost.
            if self.held.len() < HELD_MAX || matches!(event, Event::Reconfigure(_)) {
                self.held.push(event);
            } else {
                fx.answers.extend(event.refused(self.overloaded("too many requests wait for this partition's disk")));
            }
            return Ok(());
        }
        match event {
            Event::Produce(produce) => self.produce(produce, now, fx),
            Event::Command { command, reply } => self.command(command, reply, now, fx)?,
            Event::Read { request, reply } => self.read(request, reply, fx),
            Event::ListOffset { query, reply } => self.list_offset(query, reply, fx),
            Event::Trim { to, reply } => self.trim(to, reply, fx),
            Event::Marker { marker, reply } => self.marker(&marker, reply, now, fx),
            Event::ChangeMembership { change, reply } => self.propose_membership(change, reply, fx),
            Event::Reconfigure(change) => self.reconfigure(change),
            Event::Retain => {
                self.raft.log_mut().roll_if_due(now)?;
                self.retain(now);
                self.expire(now);
                delete_trimmed(self.raft.log_mut());
            }
            Event::RoomAgain => {
                if self.disk_full.take().is_some() {
                    tracing::info!(tp = %self.config.tp, "the disk has room again: writes are tried");
                }
            }
            Event::FlushNow => self.flush_wanted = true,
            Event::CheckpointNow => self.checkpoint.wanted = true,
            Event::DropAbandoned => self.reads.drop_abandoned(),

            Event::Flushed(done) => {
                let write =
                    self.flush_in_flight.take().expect("a flush is reported once, by whoever was told to run it");
                let flushed = self.raft.log_mut().flush_done(done);
                if !is_planted(Bug::IgnoreFailedFlush) {
                    flushed.map_err(Ended::Storage)?;
                }
                self.writes_flushed = write;
                self.relaxed_writes = self.relaxed_writes.filter(|&owed| owed > write);
                fx.flushed = Some(self.hard_state());
            }
            Event::HardStateFlushed(number) => {
                self.hard_states_flushed = self.hard_states_flushed.max(number);
            }
            Event::CheckpointWritten(done) => {
                self.checkpoint.in_flight = false;
                match self.raft.log_mut().checkpoint_done(done) {
                    Ok(()) => delete_trimmed(self.raft.log_mut()),
                    // The log is whole without it, only longer to replay; tried again when the next is due.
                    Err(error) => tracing::warn!(tp = %self.config.tp, %error, "cannot write a checkpoint"),
                }
            }

            // The order of what was accepted and of what peers say is the order in which they came.
            Event::Campaign => {
                self.propose_all()?;
                self.check_term_below(self.raft.term())?;
                self.raft.campaign()?;
            }
            Event::Tick => {
                self.propose_all()?;
                self.check_term_below(self.raft.term())?;
                self.raft.tick()?;
                fx.send_now.extend(self.raft.offers_due());
                self.leave_slow_disk(fx)?;
            }
            Event::Peer(message) => {
                self.propose_all()?;
                // Only for this very replica, and only in a term that a log can hold.
                let is_for_this = message.to == self.config.replica || is_planted(Bug::TakeStrangersMessages);
                if is_for_this && self.check_term_below(message.term).is_ok() {
                    self.peer(message, fx)?;
                }
            }
            Event::TransferLeader { to, reply } => {
                self.propose_all()?;
                self.transfer_leader(to, reply, fx)?;
            }
            Event::Group { reply } => {
                let result = Ok(self.group());
                fx.answers.push(Answer::Group { reply, result });
            }
            Event::ReadIndex { reply } => self.linearize(Linearizable::Read { reply }, fx),
            Event::Unreachable(replicas) => {
                self.propose_all()?;
                for replica in replicas {
                    self.raft.unreachable(replica)?;
                }
            }
            Event::LeaderGone => self.raft.leader_gone(),
            Event::Fetched(fetched) => {
                self.propose_all()?;
                self.raft.fetched(fetched)?;
            }
            Event::Pulled(pulled) => self.pulled(pulled)?,
            Event::Counted(Counted { log_start, about, records }) => match records {
                // More was applied since.
                Ok(records) if log_start == self.log().log_start() => {
                    self.records = (self.records + records).saturating_sub(about);
                }
                // It moved on, and those that are left are counted.
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(tp = %self.config.tp, %error, "cannot count the records of a log: their number is about right");
                }
            },
        }
        Ok(())
    }

    // ---- what clients ask ------------------------------------------------------------------------------------------

    /// Why it does not serve, if it does not.
    fn unavailable(&self) -> Option<Error> {
        if self.serving {
            return None;
        }
        let (code, message) = match self.raft.role() {
            StateRole::Leader => {
                (ErrorCode::LeaderNotReady, "the leader was just elected and is not ready yet; try again")
            }
            _ if self.is_only_voter() => (ErrorCode::LeaderNotReady, "the partition is being opened; try again"),
            _ if self.raft.leader().is_some() => {
                (ErrorCode::NotLeader, "this broker does not lead the partition; ask for its leader")
            }
            _ => (ErrorCode::NoLeader, "the partition has no leader at the moment; try again"),
        };
        Some(Error::new(code, message).with_partition(self.config.tp.partition))
    }

    /// Next index and offset of what is accepted now.
    fn next_index(&self) -> RaftIndex {
        self.raft.last_index().plus(self.proposals.len() as u64 + 1)
    }

    fn produce(&mut self, produce: Produce, now: Timestamp, fx: &mut Effects<M>) {
        match self.try_produce(&produce, now) {
            Ok((index, base_offset, timestamp)) => {
                let header = &produce.header;
                let log_append_time =
                    (header.attributes.timestamp_type() == TimestampType::LogAppendTime).then_some(timestamp);
                let produced = Produced { base_offset, log_append_time };
                let Produce { acks, permit, reply, .. } = produce;
                if index <= self.applied {
                    fx.answers.push(Answer::Produce { reply, result: Ok(produced), permit });
                    return;
                }
                let permit = if acks == Acks::Quorum {
                    permit
                } else {
                    self.parked.keep(index, permit);
                    Permit::unbounded()
                };
                if acks == Acks::None {
                    fx.answers.push(Answer::Produce { reply, result: Ok(produced), permit });
                } else {
                    let waiting = Waiting::Produce { reply, produced, permit };
                    let only_persisted = acks == Acks::Leader || is_planted(Bug::AnswerBeforeCommit);
                    self.parked.park(index, only_persisted, waiting);
                }
            }
            Err(error) => {
                let Produce { permit, reply, .. } = produce;
                if says_what_is_missing(&error) {
                    return self.linearize(Linearizable::Missing { reply, error, permit }, fx);
                }
                fx.answers.push(Answer::Produce { reply, result: Err(error), permit });
            }
        }
    }

    /// Where the batch is, or goes, and its latest timestamp there.
    fn try_produce(&mut self, produce: &Produce, now: Timestamp) -> Result<(RaftIndex, Offset, Timestamp), Error> {
        if let Some(error) = self.unavailable() {
            return Err(error);
        }
        // What is in the log already is told so, whatever the topic's settings have become since.
        match self.machine.admit(&produce.header, now) {
            Admission::Append => {}
            Admission::Duplicate { base_offset, index, timestamp } => return Ok((index, base_offset, timestamp)),
            Admission::Refuse(error) => return Err(error),
        }
        let bytes = produce.batch.len();
        if bytes > self.config.max_message_bytes {
            return Err(Error::new(
                ErrorCode::BatchTooLarge,
                format!(
                    "a batch of {bytes} bytes is above the topic's max.message.bytes of {}; send smaller batches, or raise it",
                    self.config.max_message_bytes
                ),
            )
            .with_partition(self.config.tp.partition));
        }
        let (index, base_offset) = self.accept(produce.batch.clone(), &produce.header)?;
        Ok((index, base_offset, produce.header.max_timestamp))
    }

    /// Takes a batch into this step's proposals, if there is room on the disk.
    fn accept(&mut self, batch: Bytes, header: &BatchHeader) -> Result<(RaftIndex, Offset), Error> {
        if let Some(error) = self.handing_over() {
            return Err(error);
        }
        self.reserve(batch.len())?;
        Ok(self.take_in(batch, header))
    }

    /// Takes a batch that has its room into this step's proposals.
    fn take_in(&mut self, batch: Bytes, header: &BatchHeader) -> (RaftIndex, Offset) {
        let index = self.next_index();
        let term = self.raft.term();
        let base_offset = self.next_offset;
        let header = BatchHeader {
            base_offset,
            leader_epoch: LeaderEpoch::from_term(term).unwrap_or(LeaderEpoch::NONE),
            ..*header
        };
        let reads = self.machine.reads_records() || header.attributes.is_control();
        let body = if reads { MachineBody::Records(&batch) } else { MachineBody::Header };
        self.machine.appended(&MachineEntry { index, term, base_offset, header: &header, body });
        self.next_offset = base_offset.plus(header.offsets());
        self.bytes_unflushed += batch.len() as u64;
        self.proposals.push(raft_adapter::proposal(EntryBody::Batch(batch)));
        (index, base_offset)
    }

    /// Room on the disk for a batch, before anything is decided about it: nothing that was proposed fails for want of it.
    fn reserve(&mut self, bytes: usize) -> Result<(), Error> {
        let partition = self.config.tp.partition;
        let reserved = if self.config.internal {
            self.raft.log_mut().reserve_privileged(bytes)
        } else if let Some(message) = &self.disk_full {
            return Err(Error::new(ErrorCode::DiskFull, message.clone()).with_partition(partition));
        } else {
            self.raft.log_mut().reserve(bytes)
        };
        reserved.map_err(|error| {
            let message = error.to_string();
            if !error.is_disk_full() {
                return Error::new(ErrorCode::StorageFailed, message).with_partition(partition);
            }
            if !self.config.internal {
                tracing::warn!(tp = %self.config.tp, %message, "disk full: writes are refused until there is room");
                self.disk_full = Some(message.clone());
            }
            Error::new(ErrorCode::DiskFull, message).with_partition(partition)
        })
    }

    fn marker(&mut self, marker: &Marker, reply: Reply<Result<(), Error>>, now: Timestamp, fx: &mut Effects<M>) {
        match self.try_marker(marker, now) {
            Ok(index) if index > self.applied => self.parked.park(index, false, Waiting::Marker { reply }),
            result => fx.answers.push(Answer::Marker { reply, result: result.map(|_| ()) }),
        }
    }

    /// Where the marker is, or goes.
    fn try_marker(&mut self, marker: &Marker, now: Timestamp) -> Result<RaftIndex, Error> {
        if let Some(error) = self.unavailable().or_else(|| self.handing_over()) {
            return Err(error);
        }
        if self.parked.len() >= PARKED_MAX {
            return Err(self.overloaded("too much waits to be committed"));
        }
        match self.machine.admit_marker(marker, now) {
            Admission::Append => {}
            Admission::Duplicate { index, .. } => return Ok(index),
            Admission::Refuse(error) => return Err(error.with_partition(self.config.tp.partition)),
        }
        let batch = encode_marker(marker, now);
        // A transaction that could not end for want of room would hold back all readers.
        self.reserve_cure(batch.len())?;
        let header = BatchHeader::parse(&batch)
            .unwrap_or_else(|error| unreachable!("a marker of {} is no batch: {error}", self.config.tp));
        Ok(self.take_in(batch, &header).0)
    }

    /// Room for what the log itself writes: it may use what is kept for a full disk's cure.
    fn reserve_cure(&mut self, bytes: usize) -> Result<(), Error> {
        self.raft.log_mut().reserve_privileged(bytes).map_err(|error| {
            let code = if error.is_disk_full() { ErrorCode::DiskFull } else { ErrorCode::StorageFailed };
            Error::new(code, error.to_string()).with_partition(self.config.tp.partition)
        })
    }

    /// Takes a control batch into this step's proposals; it may use the room that is kept for a full disk's cure.
    fn accept_control(&mut self, ctype: ControlType, payload: Bytes) -> Result<RaftIndex, Error> {
        if let Some(error) = self.handing_over() {
            return Err(error);
        }
        self.reserve_cure(CONTROL_BYTES + payload.len())?;
        let index = self.next_index();
        self.next_offset = self.next_offset.next();
        self.proposals.push(raft_adapter::proposal(EntryBody::Control { ctype, payload }));
        Ok(index)
    }

    fn command(
        &mut self,
        command: M::Command,
        reply: Reply<Result<M::Reply, Error>>,
        now: Timestamp,
        fx: &mut Effects<M>,
    ) -> Result<(), Ended> {
        let refusal = self.unavailable().or_else(|| self.handing_over());
        let refusal = refusal.or_else(|| {
            (self.parked.len() >= PARKED_MAX).then(|| self.overloaded("too many commands wait for their entries"))
        });
        if let Some(error) = refusal {
            fx.answers.push(Answer::Command { reply, result: Err(error) });
            return Ok(());
        }
        let Commanded { batch, reply: answer } = self.machine.command(command, now);
        if let Some(batch) = batch {
            let header = BatchHeader::parse(&batch)
                .unwrap_or_else(|error| panic!("the machine of {} made a batch that is none: {error}", self.config.tp));
            // Nothing is decided twice: a machine that applied what then could not be appended would be ahead of its log.
            if let Err(error) = self.accept(batch, &header) {
                fx.answers.push(Answer::Command { reply, result: Err(error) });
                return Ok(());
            }
        }
        // All that was applied before it: reads too tell nothing that may yet be lost.
        let index = RaftIndex::new(self.next_index().get() - 1);
        if index <= self.applied {
            fx.answers.push(Answer::Command { reply, result: Ok(answer) });
        } else {
            self.parked.park(index, false, Waiting::Command { reply, answer });
        }
        Ok(())
    }

    fn trim(&mut self, to: TrimTo, reply: Reply<Result<Offset, Error>>, fx: &mut Effects<M>) {
        let (log_start, high_watermark) = (self.log().log_start(), self.log().high_watermark());
        let to = match to {
            TrimTo::Offset(to) => to,
            TrimTo::HighWatermark => high_watermark,
        };
        let result = if let Some(error) = self.unavailable() {
            Err(error)
        } else if to > high_watermark || to < Offset::ZERO {
            Err(Error::new(
                ErrorCode::OffsetOutOfRange,
                format!("cannot trim to offset {to}: {log_start} to {high_watermark} are valid"),
            )
            .with_partition(self.config.tp.partition))
        } else if to <= log_start {
            Ok(log_start)
        } else {
            match self.accept_control(ControlType::LogStart, log_start_payload(to)) {
                Ok(index) => return self.parked.park(index, false, Waiting::Trim { reply, to }),
                Err(error) => Err(error),
            }
        };
        fx.answers.push(Answer::Trim { reply, result });
    }

    fn propose_membership(&mut self, change: MembershipChange, reply: Reply<Result<(), Error>>, fx: &mut Effects<M>) {
        match self.try_propose_membership(change) {
            Ok(Some(index)) => self.parked.park(index, false, Waiting::Membership { reply }),
            Ok(None) => fx.answers.push(Answer::ChangeMembership { reply, result: Ok(()) }),
            Err(error) => fx.answers.push(Answer::ChangeMembership { reply, result: Err(error) }),
        }
    }

    /// Where the change goes; `None` where it is as wanted already.
    fn try_propose_membership(&mut self, change: MembershipChange) -> Result<Option<RaftIndex>, Error> {
        if let Some(error) = self.unavailable().or_else(|| self.handing_over()) {
            return Err(error);
        }
        // The crate would make an empty entry of it, and nobody would know.
        if self.change_proposed || self.raft.has_pending_change() {
            return Err(self.overloaded("another change of this group's members is under way"));
        }
        let Membership { voters, learners } = &self.membership;
        let own = self.config.replica;
        let refused = match change {
            MembershipChange::AddLearner(replica) if learners.contains(&replica) => return Ok(None),
            MembershipChange::AddLearner(replica) if voters.contains(&replica) => Some("it votes already"),
            MembershipChange::AddLearner(replica) if replica.get() == 0 => Some("0 is nobody's id"),
            MembershipChange::Promote(replica) if voters.contains(&replica) => return Ok(None),
            MembershipChange::Promote(replica) if !learners.contains(&replica) => {
                Some("it does not follow yet: add it as a learner first")
            }
            // The first time it is an empty change: see `GroupStatus::change_is_known`.
            MembershipChange::Remove(replica) if !self.membership.contains(replica) && self.change_is_known => {
                return Ok(None);
            }
            MembershipChange::Remove(replica) if voters == &[replica] => Some("it is the only voter"),
            MembershipChange::Remove(replica) if replica == own => {
                Some("it leads: hand leadership over first, and ask the new leader")
            }
            _ => None,
        };
        if let Some(why) = refused {
            return Err(Error::new(
                ErrorCode::InvalidRequest,
                format!("cannot change the members ({change:?}): {why}"),
            )
            .with_partition(self.config.tp.partition));
        }
        let index = self.accept_control(ControlType::Membership, change.encode())?;
        self.change_proposed = true;
        Ok(Some(index))
    }

    // ---- leadership and the others of the group --------------------------------------------------------------------

    fn handing_over(&self) -> Option<Error> {
        (!self.raft.takes_proposals()).then(|| {
            Error::new(ErrorCode::NotLeader, "leadership is being handed over; ask for the leader")
                .with_partition(self.config.tp.partition)
        })
    }

    fn peer(&mut self, message: PeerMessage, fx: &mut Effects<M>) -> Result<(), Ended> {
        match &message.body {
            // Shards speak so, not replicas.
            PeerBody::Beat(_) | PeerBody::BeatAnswer(_) => return Ok(()),
            PeerBody::Ended => {
                if self.raft.leader() == Some(message.from) {
                    self.raft.leader_gone();
                }
                return Ok(());
            }
            &PeerBody::SnapshotAnswer { index, failed } => {
                let fits = self.raft.is_leader() && message.term == self.raft.term() && index <= self.raft.last_index();
                return match (fits, failed) {
                    (true, true) => Ok(self.raft.offer_failed(message.from)?),
                    (true, false) => Ok(self.raft.step(message)?),
                    (false, _) => Ok(()),
                };
            }
            &PeerBody::SnapshotOffer { index, index_term } => {
                let (leader, term) = (message.from, message.term);
                self.raft.step(message)?;
                if self.raft.term() == term && self.raft.leader() == Some(leader) {
                    self.offered(Offered { leader, index, index_term }, fx);
                }
                return Ok(());
            }
            // It would count as having what is not there.
            &PeerBody::AppendResponse { index, reject: false, .. }
                if index > self.raft.last_index() && self.raft.is_leader() && message.term == self.raft.term() =>
            {
                tracing::error!(tp = %self.config.tp, from = %message.from, %index, last_index = %self.raft.last_index(), "a follower answers for entries that this leader does not have: it is of another history; its answer is dropped");
                return Ok(());
            }
            PeerBody::Append { previous_index, previous_term, entries, .. }
                if message.term >= self.raft.term()
                    && self.raft.holds(*previous_index, *previous_term)
                    && !self.has_room_for(entries) =>
            {
                // What is refused anyway takes no room: that would only be given back with the next append.
                return Ok(());
            }
            _ => {}
        }
        Ok(self.raft.step(message)?)
    }

    /// Whether there is room for entries of the leader's; without, they are not taken, and Raft sends them again.
    fn has_room_for(&mut self, entries: &[LogEntry]) -> bool {
        let last = self.raft.last_index();
        let new = entries.iter().filter(|entry| entry.index > last);
        let (bytes, is_control) = new.fold((0, true), |(bytes, is_control), entry| {
            let control = matches!(entry.body, EntryBody::Control { .. });
            (bytes + CONTROL_BYTES + entry.data_bytes(), is_control && control)
        });
        if bytes == 0 || self.raft.log().is_poisoned() {
            return true;
        }
        let log = self.raft.log_mut();
        let reserved =
            if self.config.internal || is_control { log.reserve_privileged(bytes) } else { log.reserve(bytes) };
        match reserved {
            Err(error) if error.is_disk_full() => {
                if self.disk_full.is_none() {
                    tracing::warn!(tp = %self.config.tp, %error, "disk full: this replica falls behind until there is room");
                }
                self.disk_full = Some(error.to_string());
                false
            }
            Ok(()) => {
                self.disk_full = None;
                true
            }
            // The write finds the same, and ends the replica.
            Err(_) => true,
        }
    }

    /// What the leader offers is in the log already, or has to be pulled.
    fn offered(&mut self, offered: Offered, fx: &mut Effects<M>) {
        let has_it = {
            let log = self.log();
            offered.index <= log.committed_index() || log.term_at(offered.index) == Some(offered.index_term)
        };
        if !has_it {
            fx.offered = Some(offered);
        } else if offered.index <= self.raft.persisted() {
            fx.send_now.push(PeerMessage {
                from: self.config.replica,
                to: offered.leader,
                term: self.raft.term(),
                body: PeerBody::SnapshotAnswer { index: offered.index, failed: false },
            });
        }
    }

    /// What it tells its peers when it ends.
    pub fn farewell(&self) -> Vec<PeerMessage> {
        let Membership { voters, learners } = &self.membership;
        let others = voters.iter().chain(learners).filter(|&&replica| replica != self.config.replica);
        others
            .map(|&to| PeerMessage { from: self.config.replica, to, term: self.raft.term(), body: PeerBody::Ended })
            .collect()
    }

    /// Appends what another replica has committed as if the leader had sent it: every leader has it.
    fn pulled(&mut self, pulled: Pulled) -> Result<(), Ended> {
        let Pulled { first, next, compared, bytes } = pulled;
        let Some(leader) = self.raft.leader().filter(|&leader| leader != self.config.replica) else { return Ok(()) };
        let previous = RaftIndex::new(first.get() - 1);
        let Some(previous_term) = self.log().term_at(previous) else { return Ok(()) };
        // The entry before them is taken from this log itself: unless it is the committed one, entries of two histories
        // would stand behind each other.
        if previous > self.raft.committed() && compared != Some((previous, previous_term)) {
            tracing::debug!(tp = %self.config.tp, %first, "pulled entries do not follow what is known to be committed: they are dropped");
            return Ok(());
        }
        // What was stamped must agree with what it is stamped with here: all follow the first, and that follows an entry
        // which both have.
        let stamped = BatchHeader::parse(&bytes).map(|header| header.base_offset);
        let here = if first > self.log().last_index() {
            self.log().end_offset()
        } else {
            self.raft.log_mut().entry_meta(first)?.base_offset
        };
        let entries = match (LogEntry::decode_range(bytes, first), stamped) {
            (Ok(entries), Ok(stamped)) if stamped == here => entries,
            (Ok(_), stamped) => {
                tracing::error!(tp = %self.config.tp, %first, ?stamped, %here, "pulled entries begin at another offset: they are dropped");
                return Ok(());
            }
            (Err(error), _) => {
                tracing::warn!(tp = %self.config.tp, %first, %error, "pulled entries are not whole: they are dropped");
                return Ok(());
            }
        };
        if !self.has_room_for(&entries) {
            return Ok(());
        }
        let commit = RaftIndex::new(next.get() - 1);
        let body = PeerBody::Append { previous_index: previous, previous_term, commit, entries };
        let term = self.raft.term();
        Ok(self.raft.append_pulled(PeerMessage { from: leader, to: self.config.replica, term, body })?)
    }

    fn transfer_leader(
        &mut self,
        to: Option<ReplicaId>,
        reply: Reply<Result<(), Error>>,
        fx: &mut Effects<M>,
    ) -> Result<(), Ended> {
        let partition = self.config.tp.partition;
        let to = to.or_else(|| self.raft.best_successor());
        let result = match (self.unavailable(), to) {
            (Some(error), _) => Err(error),
            (None, _) if self.transfer.is_some() => Err(self.overloaded("leadership is being handed over already")),
            (None, None) => {
                Err(Error::new(ErrorCode::NoLeader, "no other voter is there to lead; try again when one is back")
                    .with_partition(partition))
            }
            (None, Some(to)) if to == self.config.replica => Ok(()),
            // It may be the very one that is being removed: it would take over, apply that, and lead a group without it.
            (None, _) if self.change_proposed || self.raft.has_pending_change() => {
                Err(self.overloaded("a change of this group's members is under way"))
            }
            (None, Some(to)) if !self.membership.voters.contains(&to) => {
                Err(Error::new(ErrorCode::InvalidRequest, format!("replica {to} does not vote: it can not lead"))
                    .with_partition(partition))
            }
            (None, Some(to)) => {
                self.raft.transfer_leader(to)?;
                let until = self.raft.ticks() + TRANSFER_TICKS;
                self.transfer = Some(Transfer { reply, to, until });
                return Ok(());
            }
        };
        fx.answers.push(Answer::ChangeMembership { reply, result });
        Ok(())
    }

    /// A leader counts its own disk, so that what a majority has flushed waits for its flush all the same; and it goes on
    /// to say that it lives, so that nobody else stands for election. Where its flush takes too long it hands over, to
    /// whoever has flushed most, if that is more than it has itself: disks that are all slow gain nothing by it.
    fn leave_slow_disk(&mut self, fx: &mut Effects<M>) -> Result<(), Ended> {
        let is_waited_for =
            || self.unflushed.iter().any(|it| it.write.is_some_and(|write| write > self.writes_flushed));
        if self.flush_in_flight.is_none()
            || self.raft.ticks() < self.flush_slow_at
            || !self.raft.takes_proposals()
            || self.transfer.is_some()
            // It may be the very one that is being removed.
            || self.change_proposed
            || self.raft.has_pending_change()
            || !is_waited_for()
        {
            return Ok(());
        }
        let persisted = self.raft.persisted();
        let Some(to) = self.raft.best_successor_beyond(persisted) else { return Ok(()) };
        tracing::warn!(tp = %self.config.tp, %to, "a flush takes too long here: another replica is to lead");
        fx.is_disk_slow = true;
        self.flush_slow_at = self.raft.ticks() + u64::from(SLOW_FLUSH_TICKS);
        Ok(self.raft.transfer_leader(to)?)
    }

    /// Answers who wanted another leader, once there is one, or none in time.
    fn settle_transfer(&mut self, fx: &mut Effects<M>) {
        let Some(transfer) = &self.transfer else { return };
        let failed = || {
            Err(Error::new(
                ErrorCode::TimedOut,
                format!("replica {} did not take over in time; try again, or choose another", transfer.to),
            )
            .with_partition(self.config.tp.partition))
        };
        let result = match (self.raft.is_leader(), self.raft.leader()) {
            (true, _) if self.raft.transferee().is_some() => return,
            (true, _) => failed(),
            (false, Some(leader)) if leader != self.config.replica => Ok(()),
            (false, _) if self.raft.ticks() >= transfer.until => failed(),
            (false, _) => return,
        };
        if let Some(Transfer { reply, .. }) = self.transfer.take() {
            fx.answers.push(Answer::ChangeMembership { reply, result });
        }
    }

    fn group(&self) -> GroupStatus {
        GroupStatus {
            replica: self.config.replica,
            leader: self.raft.leader(),
            term: self.raft.term(),
            commit: self.raft.committed(),
            last: self.raft.last_index(),
            membership: self.membership.clone(),
            members: self.raft.members(),
            change_is_known: self.change_is_known,
            pulled: None,
        }
    }

    /// Answers once a majority has confirmed that this still leads.
    fn linearize(&mut self, waiting: Linearizable, fx: &mut Effects<M>) {
        let refusal = self.unavailable().or_else(|| {
            (self.linearizable.len() >= PARKED_MAX).then(|| self.overloaded("too many wait to learn what is committed"))
        });
        match refusal {
            Some(error) => fx.answers.push(waiting.failed(error)),
            None if is_planted(Bug::ReadWithoutQuorum) => {
                fx.answers.push(waiting.confirmed(self.log().high_watermark()));
            }
            None => self.linearizable.to_ask.push(waiting),
        }
    }

    /// Asks for those who wait to ask, and answers those who may know.
    fn settle_reads(&mut self, fx: &mut Effects<M>) -> Result<(), Ended> {
        if self.linearizable.is_empty() {
            return Ok(());
        }
        let (applied, high_watermark) = (self.applied, self.log().high_watermark());
        let known = self.linearizable.confirmed.extract_if(.., |(index, _)| *index <= applied);
        fx.answers.extend(known.map(|(_, waiting)| waiting.confirmed(high_watermark)));
        if self.linearizable.asked.is_empty() && !self.linearizable.to_ask.is_empty() && self.serving {
            self.linearizable.asked = std::mem::take(&mut self.linearizable.to_ask);
            self.linearizable.number += 1;
            self.raft.read_index(self.linearizable.number)?;
        }
        Ok(())
    }

    /// A majority has confirmed that this still leads.
    fn confirmed(&mut self, states: Vec<raft::ReadState>) {
        for state in states {
            if raft_adapter::request_of(&state.request_ctx) == Some(self.linearizable.number) {
                let index = RaftIndex::new(state.index);
                let asked = std::mem::take(&mut self.linearizable.asked);
                self.linearizable.confirmed.extend(asked.into_iter().map(|waiting| (index, waiting)));
            }
        }
    }

    /// The leader's clock decides what retention lets go; everyone learns it from the log.
    fn retain(&mut self, now: Timestamp) {
        if !self.serving || self.log_start_proposed || !self.raft.takes_proposals() {
            return;
        }
        let target = {
            let log = self.log();
            log.retention_target(&self.config.retention, now)
                .map(|target| target.min(log.high_watermark()))
                .filter(|&target| target > log.log_start())
        };
        if let Some(target) = target {
            // Without room it is tried again at the next round.
            self.log_start_proposed = self.accept_control(ControlType::LogStart, log_start_payload(target)).is_ok();
        }
    }

    /// Producers that were idle for too long by the leader's clock: everyone learns it from the log.
    fn expire(&mut self, now: Timestamp) {
        if self.serving
            && self.raft.takes_proposals()
            && let Some(payload) = self.machine.expired(now)
            // Without room it is tried again at the next round.
            && let Err(error) = self.accept_control(ControlType::ProducerExpiry, payload)
        {
            tracing::debug!(tp = %self.config.tp, %error, "idle producers are forgotten later");
        }
    }

    /// Up to where readers of what is committed may read.
    fn last_stable_offset(&self) -> Offset {
        let log = self.log();
        self.machine.last_stable_offset(log.high_watermark()).max(log.log_start())
    }

    fn reconfigure(&mut self, change: Reconfigure) {
        let Reconfigure { log, retention, flush, max_message_bytes } = change;
        self.raft.log_mut().set_config(log);
        self.config.retention = retention;
        self.config.max_message_bytes = max_message_bytes;
        if self.config.flush == FlushMode::Relaxed && flush == FlushMode::Quorum {
            // Everything that was acknowledged unflushed is flushed first.
            self.flush_wanted = true;
            self.relaxed_writes = Some(self.writes).filter(|&owed| owed > self.writes_flushed);
        }
        if flush == FlushMode::Relaxed {
            self.relaxed_writes = Some(u64::MAX);
        }
        self.config.flush = flush;
    }

    fn read(&mut self, request: ReadRequest, reply: Reply<Result<ReadAnswer, Error>>, fx: &mut Effects<M>) {
        let partition = self.config.tp.partition;
        let elsewhere = self.unavailable();
        if let Some(error) = elsewhere.as_ref().filter(|_| !request.any_replica) {
            fx.answers.push(Answer::Read { reply, result: Err(error.clone()) });
            return;
        }
        let (high_watermark, end) = (self.log().high_watermark(), self.log().end_offset());
        let newest_epoch = self.log().epochs().last().map(|start| start.epoch);
        // What this replica does not have yet is not out of range, nor is the history another: it is behind. Whether what
        // was read diverged from what is committed now, only a leader can tell.
        let is_behind = request.known_high_watermark.is_some_and(|known| known > high_watermark);
        if elsewhere.is_some() && (request.from > high_watermark || (request.from == high_watermark && is_behind)) {
            self.park_read(
                request,
                reply,
                || {
                    Error::new(
                        ErrorCode::NotLeader,
                        format!("this replica knows of {high_watermark} offsets, and more are committed; try again, or ask for the leader"),
                    )
                    .with_partition(partition)
                },
                fx,
            );
            return;
        }
        if elsewhere.is_none() {
            if let Some(epoch) = request.last_epoch.filter(|&epoch| Some(epoch) > newest_epoch) {
                // Another leader wrote what was read; its log is not known to have diverged, only this one to be behind.
                let result = Err(Error::new(
                    ErrorCode::NotLeader,
                    format!("what was read is of leader epoch {epoch}, which this log does not know yet; ask for the leader and try again"),
                )
                .with_partition(partition));
                fx.answers.push(Answer::Read { reply, result });
                return;
            }
            if let Some(epoch) = request.last_epoch
                && let Some(epoch_end) = self.epoch_end(epoch)
                && epoch_end < request.from
            {
                let result = Err(Error::new(
                    ErrorCode::LogDiverged,
                    format!("the log was recovered with loss: leader epoch {epoch} ends at offset {epoch_end}, and {} was read with it; decide where to go on", request.from),
                )
                .with_partition(partition));
                fx.answers.push(Answer::Read { reply, result });
                return;
            }
        }
        // At the end, or in what is appended and not committed yet: there is nothing to read, and nothing is wrong.
        let readable = if request.committed { self.last_stable_offset() } else { high_watermark };
        if request.from >= readable && request.from <= end {
            if request.wait {
                self.park_read(request, reply, || unreachable!("it waits"), fx);
            } else {
                // The log gives nothing there.
                self.read_now(ReadRequest { from: request.from.min(high_watermark), ..request }, reply, fx);
            }
            return;
        }
        self.read_now(request, reply, fx);
    }

    /// Lets a read wait for more to be committed, if it may; else it is told `otherwise`.
    fn park_read(
        &mut self,
        request: ReadRequest,
        reply: Reply<Result<ReadAnswer, Error>>,
        otherwise: impl FnOnce() -> Error,
        fx: &mut Effects<M>,
    ) {
        if !request.wait {
            fx.answers.push(Answer::Read { reply, result: Err(otherwise()) });
        } else if let Err(reply) = self.reads.park(request, reply) {
            let result = Err(Error::new(
                ErrorCode::Overloaded,
                format!("more than {} readers wait for this partition; try again later", self.config.parked_reads_max),
            )
            .with_partition(self.config.tp.partition));
            fx.answers.push(Answer::Read { reply, result });
        }
    }

    /// Readers that wait at a replica which nobody leads, or which takes nothing in, are told: the partition goes on
    /// elsewhere, and they would not hear of it.
    fn follow_silence(&mut self, fx: &mut Effects<M>) {
        if self.serving || self.reads.is_empty() || (self.raft.hears_leader() && self.disk_full.is_none()) {
            self.unheard_since = None;
            return;
        }
        let ticks = self.raft.ticks();
        // An election in between is none of their business.
        let since = *self.unheard_since.get_or_insert(ticks);
        let never_notices = self.raft.leader().is_some();
        if never_notices || self.disk_full.is_some() || ticks.saturating_sub(since) >= ELECTION_TICKS as u64 {
            self.unheard_since = None;
            let error = Error::new(
                ErrorCode::NotLeader,
                "this replica hears of no leader, and what is committed elsewhere does not reach it; ask for the leader and \
                 try again",
            )
            .with_partition(self.config.tp.partition);
            self.reads.fail_all(&error, &mut fx.answers);
        }
    }

    /// Where an epoch ends at the latest, as far as this log knows.
    fn epoch_end(&self, epoch: LeaderEpoch) -> Option<Offset> {
        let log = self.log();
        // Before the first that is known, none can end later than that one begins.
        log.epoch_end(epoch).or_else(|| log.epochs().first().map(|start| start.offset))
    }

    fn read_now(&mut self, request: ReadRequest, reply: Reply<Result<ReadAnswer, Error>>, fx: &mut Effects<M>) {
        let last_stable_offset = self.last_stable_offset();
        let log = self.raft.log_mut();
        // What the reader was told elsewhere does not go back. A leader, too, may be behind what its followers know to be
        // committed: while its own disk is slow.
        let end = log.end_offset();
        let known =
            request.known_high_watermark.filter(|&known| if self.serving { known <= end } else { request.any_replica });
        let high_watermark = log.high_watermark().max(known.unwrap_or(Offset::ZERO));
        let log_start = log.log_start();
        let below = if request.committed { last_stable_offset } else { log.high_watermark() };
        let read = log.read_below(request.from, request.max_bytes, below);
        let aborted = |to| match request.committed {
            true => self.machine.aborted_between(request.from, to),
            false => Vec::new(),
        };
        match read {
            Ok(Read::Bytes(bytes)) => {
                let aborted = aborted(bytes.next);
                let answer = ReadAnswer { bytes, log_start, high_watermark, last_stable_offset, aborted };
                fx.answers.push(Answer::Read { reply, result: Ok(answer) });
            }
            Ok(Read::Ticket(ticket)) => {
                let aborted = aborted(below);
                fx.tickets.push(ReadOrder { ticket, reply, log_start, high_watermark, last_stable_offset, aborted });
            }
            Err(error) => {
                let result = Err(read_error(&error).with_partition(self.config.tp.partition));
                fx.answers.push(Answer::Read { reply, result });
            }
        }
    }

    fn list_offset(
        &mut self,
        query: OffsetQuery,
        reply: Reply<Result<Option<FoundOffset>, Error>>,
        fx: &mut Effects<M>,
    ) {
        if let Some(error) = self.unavailable() {
            fx.answers.push(Answer::ListOffset { reply, result: Err(error) });
            return;
        }
        let leader_epoch = LeaderEpoch::from_term(self.raft.term()).unwrap_or(LeaderEpoch::NONE);
        let at = |offset| FoundOffset { offset, timestamp: Timestamp::NONE, leader_epoch, records: None };
        let log = self.raft.log_mut();
        let found = match query {
            OffsetQuery::Start => Ok(Some(at(log.log_start()))),
            OffsetQuery::End => Ok(Some(at(log.high_watermark()))),
            OffsetQuery::RecordsFromEnd(_) | OffsetQuery::Timestamp(_) => {
                let lookup = match query {
                    OffsetQuery::Timestamp(timestamp) => log.find_timestamp(timestamp),
                    OffsetQuery::RecordsFromEnd(records) => log.find_records_from_end(records),
                    _ => unreachable!("answered above and below"),
                };
                match lookup {
                    Ok(Lookup::Found(found)) => {
                        Ok(found.map(|found| FoundOffset { timestamp: found.timestamp, ..at(found.offset) }))
                    }
                    Ok(Lookup::Ticket(ticket)) => {
                        fx.lookups.push(LookupOrder { work: LookupWork::Find(ticket), reply, leader_epoch });
                        return;
                    }
                    Err(error) => Err(read_error(&error).with_partition(self.config.tp.partition)),
                }
            }
            OffsetQuery::RecordsFrom(from) => {
                let end = log.high_watermark();
                let from = from.clamp(log.log_start(), end);
                match log.records_between(from, end) {
                    Ok(RecordCount::Exact(records)) => Ok(Some(FoundOffset { records: Some(records), ..at(from) })),
                    Ok(RecordCount::About(_, ticket)) => {
                        let work = LookupWork::Count { from, ticket };
                        fx.lookups.push(LookupOrder { work, reply, leader_epoch });
                        return;
                    }
                    Err(error) => Err(read_error(&error).with_partition(self.config.tp.partition)),
                }
            }
        };
        fx.answers.push(Answer::ListOffset { reply, result: found });
    }

    // ---- from accepted to answered ---------------------------------------------------------------------------------

    /// Lets everything that can happen now happen, and orders what must be waited for.
    fn settle(&mut self, now: Timestamp, fx: &mut Effects<M>) -> Result<(), Ended> {
        loop {
            self.propose_all()?;
            while self.truncation.is_none() {
                self.release(fx)?;
                if !self.raft.has_ready() {
                    break;
                }
                let ready = self.raft.ready()?;
                self.follow_leadership(fx)?;
                self.process_ready(ready, now, fx)?;
            }
            self.settle_transfer(fx);
            self.settle_reads(fx)?;
            self.follow_silence(fx);
            if self.truncation.is_none() && self.raft.has_ready() {
                continue;
            }
            if self.truncation.is_some() {
                let Some(ready) = self.truncation_may_begin() else { break };
                self.process_ready(ready, now, fx)?;
                continue;
            }
            self.take_checkpoint();
            if self.held.is_empty() || self.holds_back() {
                break;
            }
            let mut held = std::mem::take(&mut self.held).into_iter();
            while let Some(event) = held.next() {
                if let Err(ended) = self.on_event(event, now, fx) {
                    // Told with the others.
                    self.held.extend(held);
                    return Err(ended);
                }
            }
        }
        self.order(fx);
        fx.fetches.extend(self.raft.fetches());
        Ok(())
    }

    /// Gives the accepted batches to Raft, all at once.
    fn propose_all(&mut self) -> Result<(), Ended> {
        if self.proposals.is_empty() {
            return Ok(());
        }
        let expected = self.raft.last_index().plus(self.proposals.len() as u64);
        let proposals = std::mem::take(&mut self.proposals);
        self.change_proposed = false;
        let taken = self.raft.propose(proposals)?;
        // The machine has them already: a proposal that is dropped now would leave it ahead of its log.
        if !taken || self.raft.last_index() != expected {
            return Err(Ended::Panicked(format!(
                "proposals up to index {expected} were dropped at index {}",
                self.raft.last_index()
            )));
        }
        Ok(())
    }

    /// Releases what is flushed, strictly in the order of the readies: one that needs nothing itself still waits for those
    /// before it, else an append that is sent again would be answered while its bytes are still in flight.
    fn release(&mut self, fx: &mut Effects<M>) -> Result<(), Ended> {
        let mut persisted = None;
        while let Some(front) = self.unflushed.front() {
            let written =
                front.write.is_none_or(|write| write <= self.writes_flushed) || is_planted(Bug::AckBeforeFlush);
            let voted = front.hard_state.is_none_or(|number| number <= self.hard_states_flushed)
                || is_planted(Bug::VoteBeforeFlush);
            if !(written && voted) {
                if is_planted(Bug::ReleaseOutOfOrder) {
                    let free = self.unflushed.iter_mut().filter(|it| it.write.is_none() && it.hard_state.is_none());
                    fx.send_flushed.extend(free.flat_map(|it| std::mem::take(&mut it.messages)));
                }
                break;
            }
            persisted = Some(front.ready);
            let front = self.unflushed.pop_front().expect("it was there a line ago");
            fx.send_flushed.extend(front.messages);
        }
        if let Some(ready) = persisted {
            self.raft.persisted_ready(ready)?;
            let persisted = self.raft.persisted();
            self.parked.answer_persisted(persisted, &mut fx.answers);
        }
        Ok(())
    }

    fn process_ready(&mut self, mut ready: Ready, now: Timestamp, fx: &mut Effects<M>) -> Result<(), Ended> {
        if !ready.snapshot().get_metadata().get_conf_state().get_voters().is_empty() {
            return Err(Ended::Panicked("a snapshot appeared that nobody sent".to_owned()));
        }
        let (first, flushed) = (ready.entries().first().map(|entry| RaftIndex::new(entry.index)), self.flushed_index());
        if let Some(first) = first.filter(|&first| first <= flushed && !is_planted(Bug::CutWithoutMark)) {
            // What is flushed is only cut once it is known, durably, not to be answered for any more: a crash in the
            // middle would look like loss otherwise.
            let number =
                self.put_hard_state(HardState { flushed: RaftIndex::new(first.get() - 1), ..self.hard_state }, fx);
            self.truncation = Some(Box::new(Truncation { ready, below: first, number }));
            return Ok(());
        }

        let number = ready.number();
        let term = self.raft.term();
        let vote = ready
            .hs()
            .map_or(self.hard_state.vote, |hs| (hs.vote != raft::INVALID_ID).then(|| ReplicaId::new(hs.vote)));
        // The commit index is not stored: a change of that alone is nothing.
        let hard_state = ((term, vote) != (self.hard_state.term, self.hard_state.vote)).then(|| {
            assert!(term >= self.hard_state.term, "term goes back from {} to {term}", self.hard_state.term);
            self.put_hard_state(HardState { term, vote, flushed }, fx)
        });

        let entries = ready.take_entries();
        let write = if entries.is_empty() {
            None
        } else {
            self.write(entries, now)?;
            (self.config.flush == FlushMode::Quorum).then_some(self.writes)
        };

        let to_peers = |messages: Vec<raft::eraftpb::Message>| {
            messages.into_iter().filter_map(RaftAdapter::peer_message).collect::<Vec<_>>()
        };
        self.confirmed(ready.take_read_states());
        fx.send_now.extend(to_peers(ready.take_messages()));
        let messages = to_peers(ready.take_persisted_messages());
        let committed = ready.take_committed_entries();
        self.raft.written(ready)?;
        self.unflushed.push_back(Unflushed { ready: number, write, hard_state, messages });
        if let (Some(first), Some(last)) = (committed.first(), committed.last()) {
            self.apply(RaftIndex::new(first.index), RaftIndex::new(last.index), fx)?;
        }
        Ok(())
    }

    /// Hands out term, vote and flushed index; what waits for them names the number.
    fn put_hard_state(&mut self, state: HardState, fx: &mut Effects<M>) -> HardStateNumber {
        self.hard_state = state;
        self.hard_states_written = HardStateNumber(self.hard_states_written.0 + 1);
        fx.hard_state = Some((self.hard_states_written, state));
        self.hard_states_written
    }

    /// The ready that cuts the log, once its hard state is durable and no flush of the old bytes is in flight.
    fn truncation_may_begin(&mut self) -> Option<Ready> {
        let (flushed, idle) = (self.hard_states_flushed, self.flush_in_flight.is_none());
        let truncation = self.truncation.take_if(|truncation| idle && truncation.number <= flushed)?;
        let Truncation { ready, below, .. } = *truncation;
        // From here on the log itself answers for less.
        self.cut_below = Some(below);
        Some(ready)
    }

    /// Up to where this replica answers for its log.
    fn flushed_index(&self) -> RaftIndex {
        let flushed = self.log().flushed_index();
        match self.truncation.as_ref().map(|truncation| truncation.below).or(self.cut_below) {
            Some(below) => flushed.min(RaftIndex::new(below.get() - 1)),
            None => flushed,
        }
    }

    fn write(&mut self, entries: Vec<Entry>, now: Timestamp) -> Result<(), Ended> {
        let entries = entries
            .into_iter()
            .map(|entry| {
                let index = entry.index;
                raft_log::from_raft(entry)
                    .ok_or_else(|| Ended::Panicked(format!("entry {index} has a form that no leader makes")))
            })
            .collect::<Result<Vec<LogEntry>, Ended>>()?;
        let first = entries[0].index;
        let log = self.raft.log_mut();
        if first <= log.last_index() {
            log.truncate_from(first).map_err(Ended::Storage)?;
            self.cut_below = None;
        }
        let log = self.raft.log_mut();
        log.append(&entries, now).map_err(Ended::Storage)?;
        self.writes += 1;
        let end = self.log().end_offset();
        if self.serving {
            assert_eq!(end, self.next_offset, "storage stamped other offsets than {} was promised", self.config.tp);
        } else {
            self.next_offset = end;
        }
        Ok(())
    }

    /// Notices that leadership came or went.
    fn follow_leadership(&mut self, fx: &mut Effects<M>) -> Result<(), Ended> {
        let leading = self.raft.is_leader().then(|| self.raft.term());
        if self.leading == leading {
            return Ok(());
        }
        if self.leading.is_some() {
            self.serving = false;
            self.log_start_proposed = false;
            if !is_planted(Bug::KeepOverlay) {
                self.machine.step_down();
            }
            let error = Error::new(
                ErrorCode::NotLeader,
                "leadership was lost before this was committed; it may or may not be in the log: ask for the leader and try again",
            )
            .with_partition(self.config.tp.partition);
            self.parked.fail_all(&error, &mut fx.answers);
            self.reads.fail_leaders(&error, &mut fx.answers);
            self.linearizable.fail_all(&error, &mut fx.answers);
            if self.machine.applies_at_append() {
                self.replay()?;
            }
        }
        self.leading = leading;
        self.serving = self.serving || (leading.is_some() && is_planted(Bug::ServeBeforeOwnEntry));
        Ok(())
    }

    /// Drops the machine's state and makes it anew from the checkpoint and what is applied since.
    fn replay(&mut self) -> Result<(), Ended> {
        let (from, machine) = {
            let log = self.raft.log();
            (log.checkpoint().applied.next(), log.checkpoint().machine.clone())
        };
        self.machine
            .restore(&machine)
            .map_err(|error| Ended::Panicked(format!("the checkpoint can not be read a second time: {error}")))?;
        for index in from.get()..=self.applied.get() {
            self.give(RaftIndex::new(index))?;
        }
        Ok(())
    }

    /// Gives one committed entry to the machine; says what it was if it was a control batch.
    fn give(&mut self, index: RaftIndex) -> Result<(BatchHeader, Option<(ControlType, Bytes)>), Ended> {
        let log = self.raft.log_mut();
        let header = log.header(index).map_err(Ended::Storage)?;
        let term = header.leader_epoch.term().unwrap_or_default();
        let is_control = header.attributes.is_control();
        let body = if is_control || self.machine.reads_records() {
            Some(log.entry(index).map_err(Ended::Storage)?.body)
        } else {
            None
        };
        let entry = |body| MachineEntry { index, term, base_offset: header.base_offset, header: &header, body };
        Ok(match body {
            None => {
                self.machine.committed(&entry(MachineBody::Header));
                (header, None)
            }
            Some(EntryBody::Batch(batch)) => {
                self.machine.committed(&entry(MachineBody::Records(&batch)));
                (header, None)
            }
            Some(EntryBody::Control { ctype, payload }) => {
                self.machine.committed(&entry(MachineBody::Control { ctype, payload: &payload }));
                (header, Some((ctype, payload)))
            }
        })
    }

    fn apply(&mut self, first: RaftIndex, last: RaftIndex, fx: &mut Effects<M>) -> Result<(), Ended> {
        assert_eq!(first, self.applied.next(), "{}: entries are applied in order", self.config.tp);
        let mut log_start = None;
        for index in first.get()..=last.get() {
            let index = RaftIndex::new(index);
            let (header, control) = self.give(index)?;
            self.records += header.data_records();
            self.checkpoint.entries += 1;
            self.checkpoint.bytes += header.total_bytes() as u64;
            self.applied = index;
            match control {
                Some((ControlType::NoOp, _))
                    if self.leading.is_some() && self.leading == header.leader_epoch.term() =>
                {
                    // Raft gives the entries of a new term in order: everything before it is applied, too.
                    self.serving = true;
                    let end_offset = self.log().end_offset();
                    self.next_offset = end_offset;
                    self.machine.lead(self.raft.term());
                }
                Some((ControlType::LogStart, payload)) => {
                    self.log_start_proposed = false;
                    match log_start_of(&payload) {
                        Ok(offset) => log_start = log_start.max(Some(offset)),
                        Err(error) => {
                            tracing::error!(tp = %self.config.tp, %index, %error, "a log start is not understood: it changes nothing")
                        }
                    }
                }
                Some((ControlType::Membership, payload)) => match MembershipChange::decode(&payload) {
                    Ok(change) => {
                        let after = self.membership_applied.after(change);
                        self.change_is_known = after == self.membership_applied;
                        self.membership_applied = after;
                        if index > self.members_known_to {
                            self.membership = self.raft.change_membership(change)?;
                        }
                        // How far was committed is forgotten at every opening: who votes is not to be.
                        self.checkpoint.wanted |= !is_planted(Bug::ForgetMembers);
                    }
                    Err(error) => {
                        tracing::error!(tp = %self.config.tp, %index, %error, "a change of members is not understood: it changes nothing")
                    }
                },
                _ => {}
            }
        }
        self.raft.applied(last)?;
        let log = self.raft.log_mut();
        log.commit_to(last);
        if let Some(log_start) = log_start.filter(|&offset| offset > log.log_start()) {
            log.set_log_start(log_start.min(log.high_watermark()));
            // Files go only below a checkpoint that knows the new log start.
            self.checkpoint.wanted = true;
            self.records = match count_records(log) {
                RecordCount::Exact(records) => records,
                RecordCount::About(about, ticket) => {
                    fx.count = Some(CountOrder { ticket, log_start: log.log_start(), about });
                    about
                }
            };
        }
        let log_start = self.log().log_start();
        self.parked.answer_applied(last, log_start, &mut fx.answers);
        if !self.reads.is_empty() {
            // Those that wait at one that does not lead are content with that.
            let high_watermark = self.log().high_watermark();
            for (request, reply) in self.reads.take_below(high_watermark, self.last_stable_offset()) {
                self.read_now(request, reply, fx);
            }
        }
        Ok(())
    }

    // ---- flushes and checkpoints -----------------------------------------------------------------------------------

    fn order(&mut self, fx: &mut Effects<M>) {
        let wanted = self.config.flush == FlushMode::Quorum || self.flush_wanted || self.checkpoint.taken.is_some();
        if wanted
            && self.flush_in_flight.is_none()
            && self.writes > self.writes_flushed
            && let Some(job) = self.raft.log_mut().flush_job()
        {
            self.flush_in_flight = Some(self.writes);
            self.flush_slow_at = self.raft.ticks() + u64::from(SLOW_FLUSH_TICKS);
            fx.flush = Some(FlushOrder { job, bytes: std::mem::take(&mut self.bytes_unflushed) });
        }
        self.flush_wanted = self.flush_wanted && self.writes > self.flush_in_flight.unwrap_or(self.writes_flushed);
        if let Some(taken) = self.checkpoint.taken.take_if(|taken| taken.write <= self.writes_flushed) {
            self.checkpoint.in_flight = true;
            let log = self.raft.log_mut();
            let checkpoint = log.new_checkpoint(taken.applied, taken.membership, taken.machine);
            // The log start of then: one that moved meanwhile may lie above what this checkpoint knows.
            fx.checkpoint = Some(log.checkpoint_job(Checkpoint { log_start: taken.log_start, ..checkpoint }));
        }
    }

    fn checkpoint_due(&self, factor: u64) -> bool {
        let state = &self.checkpoint;
        state.entries > 0
            && (state.wanted
                || state.entries >= self.config.checkpoint_entries * factor
                || state.bytes >= self.config.checkpoint_bytes * factor)
    }

    /// Nothing is in flight that the machine has and the log has not committed.
    fn is_quiet(&self) -> bool {
        self.applied == self.raft.last_index() && self.proposals.is_empty()
    }

    /// An overdue checkpoint waits for a quiet moment: nothing more is let in until it came.
    fn holds_back(&self) -> bool {
        self.machine.applies_at_append()
            && self.serving
            && !self.is_quiet()
            && self.checkpoint.taken.is_none()
            && !self.checkpoint.in_flight
            && self.checkpoint_due(CHECKPOINT_OVERDUE)
    }

    fn take_checkpoint(&mut self) {
        if self.checkpoint.in_flight || self.checkpoint.taken.is_some() || !self.checkpoint_due(1) {
            return;
        }
        // One that applies at append is ahead of what is committed unless nothing is in flight.
        if self.machine.applies_at_append() && self.serving && !self.is_quiet() {
            return;
        }
        let (log_start, flushed) = (self.log().log_start(), self.log().flushed_index());
        let taken = Taken {
            applied: self.applied,
            log_start,
            membership: self.membership_applied.encode(),
            machine: self.machine.checkpoint(),
            // Already flushed under `FlushMode::Quorum`; else it waits for a flush that covers it.
            write: if self.applied <= flushed { self.writes_flushed } else { self.writes },
        };
        self.checkpoint = CheckpointState { taken: Some(taken), ..CheckpointState::default() };
    }

    // ---- ends ------------------------------------------------------------------------------------------------------

    fn check_term_below(&self, term: Term) -> Result<(), Ended> {
        // The next election must have a term that a leader epoch can hold.
        if LeaderEpoch::from_term(Term::new(term.get() + 1)).is_none() {
            return Err(Ended::TermExhausted(term));
        }
        Ok(())
    }

    fn overloaded(&self, what: &str) -> Error {
        Error::new(ErrorCode::Overloaded, format!("{what}; try again in a moment"))
            .with_partition(self.config.tp.partition)
    }

    fn ended_error(&self, why: &str) -> Error {
        Error::new(
            ErrorCode::StorageFailed,
            format!("the replica had to stop ({why}) and is opened anew; what was in flight may or may not be in the log: try again"),
        )
        .with_partition(self.config.tp.partition)
    }

    /// Ends it from outside: its stripe's file of hard states failed. Everyone who waits is in the effects.
    pub fn fail(&mut self, ended: Ended) -> Effects<M> {
        let mut fx = Effects::default();
        if !self.ended {
            self.end(ended, &mut fx);
        }
        fx
    }

    /// Ends it because it is closed: whoever waits is told `error`.
    pub fn close(&mut self, error: &Error) -> Effects<M> {
        let mut fx = Effects::default();
        self.fail_everyone(error, &mut fx);
        self.ended = true;
        fx
    }

    fn end(&mut self, ended: Ended, fx: &mut Effects<M>) {
        let error = self.ended_error(&ended.to_string());
        // What this step wanted of the disk or of others is not wanted any more; what it answered before stays true.
        fx.send_now.clear();
        fx.hard_state = None;
        fx.flush = None;
        fx.checkpoint = None;
        fx.fetches.clear();
        fx.count = None;
        fx.offered = None;
        self.fail_everyone(&error, fx);
        self.ended = true;
        fx.ended = Some(ended);
    }

    fn fail_everyone(&mut self, error: &Error, fx: &mut Effects<M>) {
        self.serving = false;
        self.parked.fail_all(error, &mut fx.answers);
        self.reads.fail_all(error, &mut fx.answers);
        self.linearizable.fail_all(error, &mut fx.answers);
        if let Some(Transfer { reply, .. }) = self.transfer.take() {
            fx.answers.push(Answer::ChangeMembership { reply, result: Err(error.clone()) });
        }
        fx.answers.extend(std::mem::take(&mut self.held).into_iter().filter_map(|event| event.refused(error.clone())));
    }
}

impl From<Panicked> for Ended {
    fn from(Panicked(message): Panicked) -> Self {
        Self::Panicked(message)
    }
}

impl From<StorageError> for Ended {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

/// The members after all changes that are known to be committed, and the index of the last of those.
///
/// The commit index is not stored, and whoever votes with members that are more than one change old can elect a second
/// leader. But a change is only proposed once the one before it is applied, so all in the log but the last are committed.
fn known_members(log: &mut Log, checkpointed: &Membership) -> Result<(Membership, RaftIndex), StorageError> {
    let mut known = (checkpointed.clone(), log.checkpoint().applied);
    let mut last = None;
    for index in known.1.next().get()..=log.last_index().get() {
        let index = RaftIndex::new(index);
        if log.entry_meta(index)?.control != Some(ControlType::Membership) {
            continue;
        }
        if let Some(before) = last.replace(index)
            && let EntryBody::Control { payload, .. } = log.entry(before)?.body
            && let Ok(change) = MembershipChange::decode(&payload)
            && !is_planted(Bug::ForgetMembers)
        {
            known = (known.0.after(change), before);
        }
    }
    Ok(known)
}

/// Data records that can be read. Only told to people: where an index can not be read the offsets have to do, which count
/// control batches, too.
fn count_records(log: &mut Log) -> RecordCount {
    let (from, to) = (log.log_start(), log.high_watermark());
    log.records_between(from, to).unwrap_or_else(|error| {
        tracing::warn!(dir = %log.dir().display(), %error, "cannot count the records of a log: its offsets are taken instead");
        RecordCount::Exact(u64::try_from(to.get() - from.get()).unwrap_or(0))
    })
}

/// Deletes what lies below both the log start and a durable checkpoint. What fails is tried again at the next look of
/// retention, and when the replica is opened.
fn delete_trimmed(log: &mut Log) {
    if let Err(error) = log.delete_segments_below_checkpoint() {
        tracing::warn!(dir = %log.dir().display(), %error, "cannot delete what retention let go; trying again later");
    }
}

/// A read's failure as its caller is told.
pub(crate) fn read_error(error: &ReadError) -> Error {
    let code = match error {
        ReadError::OutOfRange { .. } => ErrorCode::OffsetOutOfRange,
        ReadError::Corrupt { .. } => ErrorCode::CorruptLog,
        _ => ErrorCode::StorageFailed,
    };
    Error::new(code, error.to_string())
}
