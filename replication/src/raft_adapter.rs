//! The `raft` crate 0.7, with its known gaps handled in this one place:
//!
//! - it draws election timeouts from the thread's random numbers: here they are a function of seed, replica and term,
//!   set again after every call that can have reset them;
//! - it logs through `slog`: bridged to `tracing`, one level lower, as thousands of groups share a process;
//! - it panics on what it holds impossible: caught here, and the replica is opened anew;
//! - its `propose` copies: proposals are stepped, with `Bytes`;
//! - it would forward a proposal to the leader: nothing but a leader's own proposals is ever stepped;
//! - its wire format is rust-protobuf: messages are translated to and from our own, here;
//! - its leader builds messages for every heartbeat: a leader's clock is kept here, and what an idle group says to itself
//!   never goes through a whole step ([`RaftAdapter::quick_beat`], [`RaftAdapter::quick_message`]);
//! - it sends a snapshot once and waits for ever: the offer is repeated here.

use std::cell::Ref;
use std::panic::{AssertUnwindSafe, catch_unwind};

use flowstone_protocol::{RaftIndex, ReplicaId, Term};
use flowstone_storage::checkpoint::CREATION_TERM;
use flowstone_storage::{EntryBody, HardState, Log, StorageError};
use raft::eraftpb::{Entry, Message, MessageType};
use raft::{CAMPAIGN_TRANSFER, Config, ProgressState, RawNode, Ready, SnapshotStatus, StateRole};

use crate::effects::{FetchOrder, Fetched};
use crate::membership::{Membership, MembershipChange};
use crate::peer::{PeerBody, PeerMessage};
use crate::raft_log::{self, RaftLog};
use crate::request::MemberStatus;

/// Ticks between a leader's heartbeats.
pub(crate) const HEARTBEAT_TICKS: u64 = 3;
/// Ticks of silence after which a leader is not believed in any more, and in which a leader must hear of a majority.
pub(crate) const ELECTION_TICKS: usize = 7;
/// The first of the voters stands for election this much later: clocks differ by a tick, and a vote is refused by whoever
/// still believes in the leader.
const ELECTION_TICKS_MORE: usize = 1;
/// One voter stands after the other: a vote and its flush take less.
const ELECTION_TICKS_APART: usize = 2;
/// Above all of these.
const ELECTION_TICKS_MAX: usize = ELECTION_TICKS + ELECTION_TICKS_MORE + (ELECTION_TICKS + 1) * ELECTION_TICKS_APART;
/// Ticks between two offers to the same follower.
const OFFER_TICKS: u64 = 10;
/// A member that was not heard of for so long is not active.
const ACTIVE_TICKS: u64 = 2 * ELECTION_TICKS as u64;
/// A member that lacks no more entries than this is in sync: what is on its way counts among them.
const IN_SYNC_ENTRIES: u64 = 4_096;
/// Members whose last message is remembered: more than any group has.
const HEARD_MAX: usize = 64;
/// Bytes of entries in one message to a follower.
const MESSAGE_BYTES_MAX: u64 = 1 << 20;
/// Messages on their way to one follower.
const MESSAGES_IN_FLIGHT_MAX: usize = 64;

const _: () = assert!(ELECTION_TICKS as u64 > 2 * HEARTBEAT_TICKS);
/// The crate refuses, by a panic, a timeout that is not below its maximum.
const _: () = assert!(
    ELECTION_TICKS + ELECTION_TICKS_MORE + ELECTION_TICKS * ELECTION_TICKS_APART + (ELECTION_TICKS_APART - 1)
        < ELECTION_TICKS_MAX
);

/// The Raft crate panicked; its state is not to be used again.
#[derive(Debug)]
pub(crate) struct Panicked(pub(crate) String);

/// One replica's Raft.
pub(crate) struct RaftAdapter {
    node: RawNode<RaftLog>,
    id: u64,
    seed: u64,
    /// Ticks so far.
    ticks: u64,
    /// Since the last heartbeats; a leader's alone.
    beat: u64,
    /// When followers were offered last what they are to pull.
    offered_at: u64,
    /// The voters, in order; changed with the membership.
    voters: Vec<u64>,
    /// The election timeout, and what it was computed for: term, leader, whether that is known to be gone.
    timeout: usize,
    timeout_of: Option<(u64, u64, bool)>,
    /// The leader of this term is gone.
    gone: Option<u64>,
    /// When the leader heard of each member last.
    heard: Vec<(u64, u64)>,
    /// It stands at once while its group has not had a leader yet.
    stands_first: bool,
}

/// Members of a group at rest, beside the leader.
pub(crate) const REST_MEMBERS: usize = 4;

/// A group at rest, as one of its replicas sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rest {
    pub(crate) leads: bool,
    /// The leader, or those that follow.
    pub(crate) others: [ReplicaId; REST_MEMBERS],
    pub(crate) term: Term,
    pub(crate) commit: RaftIndex,
    /// Ticks of silence after which it stands for election.
    pub(crate) timeout: u64,
}

/// What an idle group's message needs.
#[derive(Debug)]
pub(crate) enum Quick {
    /// A step.
    Step,
    /// Nothing more.
    Done,
    /// This answer.
    Answer(PeerMessage),
}

/// What came of ticks that were passed without a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ticked {
    /// Nothing more is to be done.
    Done,
    /// There is something to be done: a step.
    Step,
}

impl std::fmt::Debug for RaftAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftAdapter").field("id", &self.id).field("term", &self.term()).finish_non_exhaustive()
    }
}

impl RaftAdapter {
    /// A replica as its log and hard state have it; nothing is asked of anybody yet.
    pub(crate) fn open(
        replica: ReplicaId,
        log: Log,
        hard_state: HardState,
        membership: Membership,
        seed: u64,
        offer_after_bytes: u64,
        stands_first: bool,
    ) -> Result<Self, Panicked> {
        let config = Config {
            id: replica.get(),
            election_tick: ELECTION_TICKS,
            // Above every timeout that `set_election_timeout` gives.
            max_election_tick: ELECTION_TICKS_MAX,
            // A leader's clock is kept here.
            heartbeat_tick: ELECTION_TICKS - 1,
            applied: log.checkpoint().applied.get(),
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: MESSAGES_IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let voters = sorted(&membership);
        let store = RaftLog::new(log, hard_state, membership, offer_after_bytes);
        let node = caught(|| RawNode::new(&config, store, &bridge::logger()))?
            .map_err(|error| Panicked(format!("cannot open: {error}")))?;
        let mut adapter = Self {
            node,
            id: replica.get(),
            seed,
            ticks: 0,
            beat: 0,
            offered_at: 0,
            voters,
            timeout: 0,
            timeout_of: None,
            gone: None,
            heard: Vec::new(),
            stands_first,
        };
        caught(|| adapter.set_election_timeout())?;
        Ok(adapter)
    }

    pub(crate) fn log(&self) -> Ref<'_, Log> {
        self.node.store().log.borrow()
    }

    /// What could not be read for the crate, and made it panic.
    pub(crate) fn unreadable(&self) -> Option<StorageError> {
        self.node.store().unreadable.take()
    }

    /// What a follower needs, is not known to be committed, and is damaged.
    pub(crate) fn damaged_tail(&self) -> Option<StorageError> {
        self.node.store().damaged_tail.take()
    }

    pub(crate) fn log_mut(&mut self) -> &mut Log {
        self.node.mut_store().log.get_mut()
    }

    pub(crate) fn into_log(self) -> Log {
        self.node.raft.r.raft_log.store.log.into_inner()
    }

    pub(crate) fn term(&self) -> Term {
        Term::new(self.node.raft.term)
    }

    pub(crate) fn role(&self) -> StateRole {
        self.node.raft.state
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.role() == StateRole::Leader
    }

    /// Who leads, as far as is known.
    pub(crate) fn leader(&self) -> Option<ReplicaId> {
        (self.node.raft.leader_id != raft::INVALID_ID).then(|| ReplicaId::new(self.node.raft.leader_id))
    }

    /// Whether a leader was heard of within an election timeout: a voter forgets its leader then, one that does not vote
    /// never does.
    pub(crate) fn hears_leader(&self) -> bool {
        let raft = &self.node.raft;
        raft.leader_id != raft::INVALID_ID && (raft.promotable() || raft.election_elapsed < ELECTION_TICKS)
    }

    /// Entries up to here are persisted as far as Raft was told.
    pub(crate) fn persisted(&self) -> RaftIndex {
        RaftIndex::new(self.node.raft.raft_log.persisted)
    }

    /// What is committed, as far as it knows.
    pub(crate) fn committed(&self) -> RaftIndex {
        RaftIndex::new(self.node.raft.raft_log.committed)
    }

    /// The last entry, written or not.
    pub(crate) fn last_index(&self) -> RaftIndex {
        RaftIndex::new(self.node.raft.raft_log.last_index())
    }

    /// Whether it has this entry of this term, written or about to be.
    pub(crate) fn holds(&self, index: RaftIndex, term: Term) -> bool {
        self.node.raft.raft_log.match_term(index.get(), term.get())
    }

    /// A leader that is about to hand over takes no proposals.
    pub(crate) fn takes_proposals(&self) -> bool {
        self.is_leader() && self.node.raft.lead_transferee.is_none()
    }

    fn call<T>(&mut self, f: impl FnOnce(&mut RawNode<RaftLog>) -> T) -> Result<T, Panicked> {
        let node = &mut self.node;
        let result = caught(|| f(node))?;
        self.set_election_timeout();
        Ok(result)
    }

    // A function of term and voters, so that it does not matter how often the crate drew its own: a new election is a new
    // term, hence a new order. Voters stand one after the other, so that votes are rarely split; the seed moves each by less
    // than they are apart.
    fn set_election_timeout(&mut self) {
        let raft = &self.node.raft;
        let of = (raft.term, raft.leader_id, self.gone == Some(raft.term));
        if self.timeout_of != Some(of) {
            // Everybody has to come to the same order: no broker's own seed is in it.
            let order = |id: u64| mix(mix(id) ^ mix(raft.term).rotate_left(17));
            let own = order(self.id);
            let before = self.voters.iter().filter(|&&id| id != self.id && id != raft.leader_id && order(id) < own);
            let place = before.count().min(ELECTION_TICKS);
            let jitter = if of.2 { 0 } else { mix(self.seed ^ own) as usize % ELECTION_TICKS_APART };
            self.timeout = ELECTION_TICKS + ELECTION_TICKS_MORE + place * ELECTION_TICKS_APART + jitter;
            self.timeout_of = Some(of);
        }
        if self.node.raft.randomized_election_timeout() != self.timeout {
            let timeout = self.timeout;
            self.node.raft.set_randomized_election_timeout(timeout);
        }
        // Nobody has led yet, so nobody is believed in: asked again with every tick until the others are there.
        let raft = &mut self.node.raft;
        if self.stands_first && raft.term <= CREATION_TERM.get() && raft.leader_id == raft::INVALID_ID {
            raft.election_elapsed = raft.election_elapsed.max(self.timeout - 1);
        }
    }

    /// The process of the leader is gone: it is not believed in any more, and the first voter stands with the next tick.
    pub(crate) fn leader_gone(&mut self) {
        if self.role() != StateRole::Follower || self.node.raft.leader_id == raft::INVALID_ID {
            return;
        }
        self.gone = Some(self.node.raft.term);
        self.set_election_timeout();
        self.node.raft.election_elapsed = self.node.raft.election_elapsed.max(ELECTION_TICKS);
    }

    // ---- time ------------------------------------------------------------------------------------------------------

    /// Ticks so far.
    pub(crate) fn ticks(&self) -> u64 {
        self.ticks
    }

    /// Begins to count here: of a replica that has just been opened.
    pub(crate) fn begin_at(&mut self, ticks: u64) {
        self.ticks = ticks;
    }

    /// Time that went by while nothing happened. What is due since then happens with the next tick.
    pub(crate) fn pass(&mut self, ticks: u64) {
        self.ticks += ticks;
        self.beat += ticks;
        let elapsed = &mut self.node.raft.election_elapsed;
        *elapsed = elapsed.saturating_add(usize::try_from(ticks).unwrap_or(usize::MAX));
    }

    /// After how many ticks the next one matters; `None` for never.
    pub(crate) fn wakes_in(&self) -> Option<u64> {
        let raft = &self.node.raft;
        match self.role() {
            StateRole::Leader if self.is_alone() => None,
            StateRole::Leader if raft.lead_transferee.is_some() || raft.pending_read_count() > 0 => Some(1),
            StateRole::Leader => Some(HEARTBEAT_TICKS.saturating_sub(self.beat).max(1)),
            // It never stands for election. But it votes, and while it believes in a leader it refuses to: that must pass,
            // also where nothing else in its shard needs ticks.
            _ if !raft.promotable() => (raft.leader_id != raft::INVALID_ID && raft.election_elapsed < ELECTION_TICKS)
                .then(|| (ELECTION_TICKS - raft.election_elapsed) as u64),
            _ => Some((self.timeout.saturating_sub(raft.election_elapsed) as u64).max(1)),
        }
    }

    /// Nobody else belongs to the group; it may be one that it was removed from.
    fn is_alone(&self) -> bool {
        self.node.raft.prs().iter().all(|(&id, _)| id == self.id)
    }

    /// One tick.
    pub(crate) fn tick(&mut self) -> Result<Ticked, Panicked> {
        self.ticks += 1;
        if !self.is_leader() {
            let due = self.call(RawNode::tick)?;
            return Ok(if due { Ticked::Step } else { Ticked::Done });
        }
        self.beat += 1;
        if self.check_quorum()? == Ticked::Step {
            return Ok(Ticked::Step);
        }
        if self.beat < HEARTBEAT_TICKS {
            return Ok(Ticked::Done);
        }
        self.beat = 0;
        self.call(|node| node.raft.ping())?;
        Ok(Ticked::Step)
    }

    /// A leader's election clock: it steps down when it has not heard of a majority, and goes on when the one that was to
    /// take over has not.
    fn check_quorum(&mut self) -> Result<Ticked, Panicked> {
        self.node.raft.election_elapsed += 1;
        if self.node.raft.election_elapsed < ELECTION_TICKS {
            return Ok(Ticked::Done);
        }
        self.node.raft.election_elapsed = 0;
        let id = self.id;
        self.call(|node| {
            let mut message = Message::default();
            message.set_msg_type(MessageType::MsgCheckQuorum);
            message.from = id;
            // It knows no error.
            drop(node.raft.step(message));
            if node.raft.state == StateRole::Leader && node.raft.lead_transferee.is_some() {
                node.raft.abort_leader_transfer();
                return Ticked::Step;
            }
            if node.raft.state == StateRole::Leader { Ticked::Done } else { Ticked::Step }
        })
    }

    /// Ticks of a leader whose group has nothing to say but that it lives, or of a follower: without a step, unless
    /// something comes of it. `None`: it needs a whole step, and nothing was passed.
    pub(crate) fn quick_ticks(&mut self, ticks: u64, out: &mut Vec<PeerMessage>) -> Result<Option<Ticked>, Panicked> {
        let raft = &self.node.raft;
        if ticks == 0 || self.node.has_ready() {
            return Ok(None);
        }
        if self.is_leader() {
            let unfit = raft.lead_transferee.is_some()
                || raft.pending_read_count() > 0
                || raft.prs().iter().any(|(_, progress)| progress.state == ProgressState::Snapshot);
            if unfit {
                return Ok(None);
            }
            self.pass(ticks - 1);
            self.ticks += 1;
            self.beat += 1;
            if self.check_quorum()? == Ticked::Step {
                return Ok(Some(Ticked::Step));
            }
            if self.beat >= HEARTBEAT_TICKS {
                self.beat = 0;
                let raft = &self.node.raft;
                let committed = raft.raft_log.committed;
                for (&id, progress) in raft.prs().iter().filter(|&(&id, _)| id != self.id) {
                    out.push(PeerMessage {
                        from: ReplicaId::new(self.id),
                        to: ReplicaId::new(id),
                        term: Term::new(raft.term),
                        body: PeerBody::Heartbeat { commit: RaftIndex::new(committed.min(progress.matched)) },
                    });
                }
            }
            return Ok(Some(Ticked::Done));
        }
        self.pass(ticks - 1);
        self.tick().map(Some)
    }

    /// A heartbeat that tells nothing new, or the answer to one.
    pub(crate) fn quick_message(&mut self, message: &PeerMessage) -> Quick {
        let id = message.from.get();
        let ticks = self.ticks;
        let raft = &mut self.node.raft;
        if message.term.get() != raft.term {
            return Quick::Step;
        }
        match message.body {
            PeerBody::Heartbeat { commit } => {
                let fits = raft.state == StateRole::Follower
                    && raft.leader_id == id
                    && commit.get() <= raft.raft_log.committed
                    && raft.pending_request_snapshot == raft::INVALID_INDEX
                    && self.gone.is_none();
                if !fits {
                    return Quick::Step;
                }
                raft.election_elapsed = 0;
                Quick::Answer(PeerMessage {
                    from: message.to,
                    to: message.from,
                    term: message.term,
                    body: PeerBody::HeartbeatResponse { commit: RaftIndex::new(raft.raft_log.committed), lane: 0 },
                })
            }
            PeerBody::HeartbeatResponse { commit, .. } if raft.state == StateRole::Leader => {
                let last = raft.raft_log.last_index();
                let Some(progress) = raft.mut_prs().get_mut(id) else { return Quick::Step };
                // One that could not be reached for a while and lacks nothing: the crate would probe it only once there is
                // something to send, and until then it would pass for one that lags.
                if progress.state == ProgressState::Probe && progress.matched == last {
                    progress.become_replicate();
                }
                let fits = progress.matched == last
                    && progress.state == ProgressState::Replicate
                    && progress.pending_request_snapshot == raft::INVALID_INDEX
                    && !progress.ins.full();
                if !fits {
                    return Quick::Step;
                }
                progress.recent_active = true;
                progress.update_committed(commit.get());
                hear(&mut self.heard, id, ticks);
                Quick::Done
            }
            _ => Quick::Step,
        }
    }

    /// What heartbeats of a group at rest, or the answers to them, look like: until the next step they need not come here.
    pub(crate) fn rest(&self) -> Option<Rest> {
        let raft = &self.node.raft;
        let (term, commit) = (Term::new(raft.term), RaftIndex::new(raft.raft_log.committed));
        let mut others = [ReplicaId::new(raft::INVALID_ID); REST_MEMBERS];
        match raft.state {
            StateRole::Follower
                if raft.leader_id != raft::INVALID_ID
                    && raft.pending_request_snapshot == raft::INVALID_INDEX
                    && self.gone.is_none() =>
            {
                others[0] = ReplicaId::new(raft.leader_id);
                Some(Rest { leads: false, others, term, commit, timeout: self.timeout as u64 })
            }
            StateRole::Leader if raft.lead_transferee.is_none() && raft.pending_read_count() == 0 => {
                let last = raft.raft_log.last_index();
                let followers = raft.prs().iter().filter(|&(&id, _)| id != self.id);
                for (at, (&id, progress)) in followers.enumerate() {
                    let fits = progress.matched == last
                        && progress.state == ProgressState::Replicate
                        && progress.pending_request_snapshot == raft::INVALID_INDEX
                        && !progress.ins.full();
                    *others.get_mut(at).filter(|_| fits)? = ReplicaId::new(id);
                }
                Some(Rest { leads: true, others, term, commit, timeout: 0 })
            }
            _ => None,
        }
    }

    /// Its leader was heard of at that tick.
    pub(crate) fn heard_leader(&mut self, at: u64) {
        self.pass(at.saturating_sub(self.ticks));
        let since = usize::try_from(self.ticks - at.min(self.ticks)).unwrap_or(usize::MAX);
        self.node.raft.election_elapsed = self.node.raft.election_elapsed.min(since);
    }

    /// A follower that has everything answered a heartbeat.
    pub(crate) fn heard_follower(&mut self, replica: ReplicaId) {
        let ticks = self.ticks;
        if let Some(progress) = self.node.raft.mut_prs().get_mut(replica.get()) {
            progress.recent_active = true;
            hear(&mut self.heard, replica.get(), ticks);
        }
    }

    /// A leader whose clock did not go while others spoke for it, until this tick; all its followers have everything, and
    /// were heard of last when it says here. Its quorum was there when the one that was silent longest was heard of.
    pub(crate) fn rested(&mut self, until: u64, heard: &[(ReplicaId, u64)]) {
        self.pass(until.saturating_sub(self.ticks));
        let oldest = heard.iter().map(|&(_, at)| at).min().unwrap_or(self.ticks);
        let since = self.ticks.saturating_sub(oldest);
        self.node.raft.election_elapsed = usize::try_from(since).unwrap_or(usize::MAX);
        for &(replica, at) in heard {
            if let Some(progress) = self.node.raft.mut_prs().get_mut(replica.get()) {
                progress.recent_active = at > oldest;
                let known = self.heard.iter().find(|(other, _)| *other == replica.get()).map_or(0, |(_, at)| *at);
                hear(&mut self.heard, replica.get(), known.max(at));
            }
        }
    }

    /// Gives back the memory that only a busy group needs: of thousands most are at rest.
    pub(crate) fn shed(&mut self) {
        let raft = &mut self.node.raft;
        raft.maybe_free_inflight_buffers();
        raft.msgs.shrink_to_fit();
        raft.raft_log.unstable.entries.shrink_to_fit();
        self.heard.shrink_to_fit();
        self.node.store().shed();
        self.log_mut().shed();
    }

    /// Offers again what followers were told to pull and have not: either message may be lost.
    fn offers(&mut self) -> Vec<PeerMessage> {
        if !self.is_leader() || self.ticks < self.offered_at + OFFER_TICKS {
            return Vec::new();
        }
        self.offered_at = self.ticks;
        let raft = &self.node.raft;
        let (index, index_term) = {
            let log = self.log();
            let index = log.checkpoint().applied;
            (index, log.term_at(index).unwrap_or_default())
        };
        let offer = |&id: &u64| PeerMessage {
            from: ReplicaId::new(self.id),
            to: ReplicaId::new(id),
            term: Term::new(raft.term),
            body: PeerBody::SnapshotOffer { index, index_term },
        };
        let waiting = raft.prs().iter().filter(|(_, progress)| progress.state == ProgressState::Snapshot);
        waiting.map(|(id, _)| offer(id)).collect()
    }

    /// Offers to repeat after a tick.
    pub(crate) fn offers_due(&mut self) -> Vec<PeerMessage> {
        self.offers()
    }

    // ---- calls -----------------------------------------------------------------------------------------------------

    pub(crate) fn campaign(&mut self) -> Result<(), Panicked> {
        // Refused only where it can not be elected anyway.
        self.call(|node| drop(node.campaign()))
    }

    /// Appends entries as leader, in order; `Ok(false)` when Raft dropped them all.
    pub(crate) fn propose(&mut self, entries: Vec<Entry>) -> Result<bool, Panicked> {
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.id;
        message.set_entries(entries.into());
        self.call(|node| node.raft.step(message).is_ok())
    }

    /// Takes a message of a member of the group.
    pub(crate) fn step(&mut self, message: PeerMessage) -> Result<(), Panicked> {
        if self.is_leader() {
            let (id, ticks) = (message.from.get(), self.ticks);
            hear(&mut self.heard, id, ticks);
        } else if matches!(message.body, PeerBody::Append { .. } | PeerBody::Heartbeat { .. }) {
            // It is not gone, or another leads.
            self.gone = None;
        }
        let message = to_raft_message(message);
        // A message that does not fit (an answer of a stranger, say) is dropped: Raft repeats what matters.
        self.call(|node| drop(node.step(message)))
    }

    /// Appends what another replica has committed, as an append of the leader's. It is no sign that the leader lives: who
    /// catches up may do so for minutes, and the others may need its vote.
    pub(crate) fn append_pulled(&mut self, message: PeerMessage) -> Result<(), Panicked> {
        let elapsed = self.node.raft.election_elapsed;
        let message = to_raft_message(message);
        self.call(|node| drop(node.step(message)))?;
        self.node.raft.election_elapsed = elapsed;
        Ok(())
    }

    /// What was sent to this member is lost.
    pub(crate) fn unreachable(&mut self, replica: ReplicaId) -> Result<(), Panicked> {
        if !self.is_leader() {
            return Ok(());
        }
        self.call(|node| node.report_unreachable(replica.get()))
    }

    /// This member could not pull what it was offered: it is probed, and offered again.
    pub(crate) fn offer_failed(&mut self, replica: ReplicaId) -> Result<(), Panicked> {
        self.call(|node| node.report_snapshot(replica.get(), SnapshotStatus::Failure))
    }

    /// Begins to hand over.
    pub(crate) fn transfer_leader(&mut self, to: ReplicaId) -> Result<(), Panicked> {
        self.call(|node| node.transfer_leader(to.get()))
    }

    /// To whom leadership is being handed over.
    pub(crate) fn transferee(&self) -> Option<ReplicaId> {
        self.node.raft.lead_transferee.map(ReplicaId::new)
    }

    /// Asks a majority whether this still leads; the answer comes with a ready.
    pub(crate) fn read_index(&mut self, request: u64) -> Result<(), Panicked> {
        self.call(|node| node.read_index(request.to_be_bytes().to_vec()))
    }

    /// A change of members is in the log and not applied.
    pub(crate) fn has_pending_change(&self) -> bool {
        self.node.raft.has_pending_conf()
    }

    /// Gives the entries that were asked for. Those that could not be read are asked for again with the follower's next
    /// answer, not at once: they may be damaged, and stay so for a while.
    pub(crate) fn fetched(&mut self, fetched: Fetched) -> Result<(), Panicked> {
        let Fetched { first, entries, context } = fetched;
        if !self.node.store().take_fetched(first, entries) {
            return Ok(());
        }
        let result = self.call(|node| node.on_entries_fetched(context.0));
        self.node.store().drop_fetched();
        result
    }

    /// Entries to read for followers.
    pub(crate) fn fetches(&self) -> Vec<FetchOrder> {
        self.node.store().fetches()
    }

    /// The voter to hand over to, where none is named: active, and with the longest log; of those the first.
    pub(crate) fn best_successor(&self) -> Option<ReplicaId> {
        self.best_successor_beyond(RaftIndex::new(0))
    }

    /// The same, if it has flushed more than up to `index`.
    pub(crate) fn best_successor_beyond(&self, index: RaftIndex) -> Option<ReplicaId> {
        let members = self.members();
        let fit = members.into_iter().filter(|member| !member.is_learner && member.replica.get() != self.id);
        fit.filter(|member| member.is_active && member.matched > index)
            .max_by_key(|member| (member.matched, std::cmp::Reverse(member.replica)))
            .map(|member| member.replica)
    }

    /// The group's members, as their leader sees them.
    pub(crate) fn members(&self) -> Vec<MemberStatus> {
        if !self.is_leader() {
            return Vec::new();
        }
        let raft = &self.node.raft;
        let last = raft.raft_log.last_index();
        let learners = raft.prs().conf().learners();
        let mut members: Vec<_> = raft
            .prs()
            .iter()
            .map(|(&id, progress)| {
                let heard = self.heard.iter().find(|(other, _)| *other == id).map(|(_, at)| *at);
                let is_active = id == self.id || heard.is_some_and(|at| at + ACTIVE_TICKS >= self.ticks);
                let matched = if id == self.id { last } else { progress.matched };
                let lag_entries = last.saturating_sub(matched);
                MemberStatus {
                    replica: ReplicaId::new(id),
                    is_learner: learners.contains(&id),
                    matched: RaftIndex::new(matched),
                    is_active,
                    in_sync: is_active
                        && lag_entries <= IN_SYNC_ENTRIES
                        && (id == self.id || progress.state == ProgressState::Replicate),
                    lag_entries,
                }
            })
            .collect();
        members.sort_unstable_by_key(|member| member.replica);
        members
    }

    pub(crate) fn has_ready(&self) -> bool {
        self.node.has_ready()
    }

    pub(crate) fn ready(&mut self) -> Result<Ready, Panicked> {
        self.call(RawNode::ready)
    }

    /// The ready's entries can be read from the log; they need not be flushed.
    pub(crate) fn written(&mut self, ready: Ready) -> Result<(), Panicked> {
        self.call(|node| node.advance_append_async(ready))
    }

    /// All of this ready, and of those before it, is persisted.
    pub(crate) fn persisted_ready(&mut self, number: u64) -> Result<(), Panicked> {
        self.call(|node| node.on_persist_ready(number))
    }

    pub(crate) fn applied(&mut self, index: RaftIndex) -> Result<(), Panicked> {
        self.call(|node| node.advance_apply_to(index.get()))
    }

    pub(crate) fn change_membership(&mut self, change: MembershipChange) -> Result<Membership, Panicked> {
        let change = change.to_raft();
        let state = self
            .call(|node| node.apply_conf_change(&change))?
            .map_err(|error| Panicked(format!("cannot change members: {error}")))?;
        let membership = Membership::from_raft(&state);
        self.voters = sorted(&membership);
        self.timeout_of = None;
        self.set_election_timeout();
        self.heard.retain(|(id, _)| membership.contains(ReplicaId::new(*id)));
        Ok(membership)
    }

    /// From the crate's message to ours; `None` for what has no form between brokers.
    pub(crate) fn peer_message(message: Message) -> Option<PeerMessage> {
        from_raft_message(message)
    }
}

fn sorted(membership: &Membership) -> Vec<u64> {
    let mut voters: Vec<_> = membership.voters.iter().map(|voter| voter.get()).collect();
    voters.sort_unstable();
    voters
}

/// Notes when a member was heard of; there are a handful of them.
fn hear(heard: &mut Vec<(u64, u64)>, id: u64, ticks: u64) {
    if let Some((_, at)) = heard.iter_mut().find(|(other, _)| *other == id) {
        *at = ticks;
    } else if heard.len() < HEARD_MAX {
        heard.push((id, ticks));
    }
}

/// A leader's entry, ready to be proposed.
pub(crate) fn proposal(body: EntryBody) -> Entry {
    raft_log::body_to_raft(body)
}

fn caught<T>(f: impl FnOnce() -> T) -> Result<T, Panicked> {
    // Unwind safe: after a panic the node is dropped, never looked at.
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Panicked(message.to_owned())
    })
}

/// SplitMix64's finisher: every bit of the input moves every bit of the output.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn to_raft_message(message: PeerMessage) -> Message {
    let mut m =
        Message { from: message.from.get(), to: message.to.get(), term: message.term.get(), ..Message::default() };
    match message.body {
        PeerBody::Append { previous_index, previous_term, commit, entries } => {
            m.set_msg_type(MessageType::MsgAppend);
            m.index = previous_index.get();
            m.log_term = previous_term.get();
            m.commit = commit.get();
            m.set_entries(entries.into_iter().map(raft_log::to_raft).collect::<Vec<_>>().into());
        }
        PeerBody::AppendResponse { index, commit, reject, reject_hint, hint_term, request_snapshot } => {
            m.set_msg_type(MessageType::MsgAppendResponse);
            m.index = index.get();
            m.commit = commit.get();
            m.reject = reject;
            m.reject_hint = reject_hint.get();
            m.log_term = hint_term.get();
            m.request_snapshot = request_snapshot.get();
        }
        PeerBody::Vote { pre, last_index, last_term, commit, commit_term, transfer } => {
            m.set_msg_type(if pre { MessageType::MsgRequestPreVote } else { MessageType::MsgRequestVote });
            m.index = last_index.get();
            m.log_term = last_term.get();
            m.commit = commit.get();
            m.commit_term = commit_term.get();
            if transfer {
                m.context = CAMPAIGN_TRANSFER.into();
            }
        }
        PeerBody::VoteResponse { pre, reject, commit, commit_term } => {
            m.set_msg_type(if pre {
                MessageType::MsgRequestPreVoteResponse
            } else {
                MessageType::MsgRequestVoteResponse
            });
            m.reject = reject;
            m.commit = commit.get();
            m.commit_term = commit_term.get();
        }
        PeerBody::Heartbeat { commit } => {
            m.set_msg_type(MessageType::MsgHeartbeat);
            m.commit = commit.get();
        }
        PeerBody::HeartbeatResponse { commit, .. } => {
            m.set_msg_type(MessageType::MsgHeartbeatResponse);
            m.commit = commit.get();
        }
        PeerBody::TransferLeader => m.set_msg_type(MessageType::MsgTransferLeader),
        PeerBody::TimeoutNow => m.set_msg_type(MessageType::MsgTimeoutNow),
        // An offer says that the leader lives; what it offers is not the crate's business.
        PeerBody::SnapshotOffer { .. } => m.set_msg_type(MessageType::MsgHeartbeat),
        // What was pulled is flushed.
        PeerBody::SnapshotAnswer { index, .. } => {
            m.set_msg_type(MessageType::MsgAppendResponse);
            m.index = index.get();
        }
        // Heartbeats that carry which question they ask, and their answers.
        PeerBody::ReadIndex { request } => {
            m.set_msg_type(MessageType::MsgHeartbeat);
            m.context = request.to_be_bytes().to_vec().into();
        }
        PeerBody::ReadIndexAnswer { request, index, .. } => {
            m.set_msg_type(MessageType::MsgHeartbeatResponse);
            m.context = request.to_be_bytes().to_vec().into();
            m.commit = index.get();
        }
        // Never stepped: a message that says nothing.
        PeerBody::Ended | PeerBody::Beat(_) | PeerBody::BeatAnswer(_) => {
            m.set_msg_type(MessageType::MsgHeartbeatResponse)
        }
    }
    m
}

fn from_raft_message(mut m: Message) -> Option<PeerMessage> {
    let index = RaftIndex::new(m.index);
    let log_term = Term::new(m.log_term);
    let commit = RaftIndex::new(m.commit);
    let commit_term = Term::new(m.commit_term);
    let body = match m.get_msg_type() {
        MessageType::MsgAppend => {
            let entries = m.take_entries().into_iter().map(raft_log::from_raft).collect::<Option<Vec<_>>>()?;
            PeerBody::Append { previous_index: index, previous_term: log_term, commit, entries }
        }
        MessageType::MsgAppendResponse => PeerBody::AppendResponse {
            index,
            commit,
            reject: m.reject,
            reject_hint: RaftIndex::new(m.reject_hint),
            hint_term: log_term,
            request_snapshot: RaftIndex::new(m.request_snapshot),
        },
        kind @ (MessageType::MsgRequestVote | MessageType::MsgRequestPreVote) => PeerBody::Vote {
            pre: kind == MessageType::MsgRequestPreVote,
            last_index: index,
            last_term: log_term,
            commit,
            commit_term,
            transfer: m.context == CAMPAIGN_TRANSFER,
        },
        kind @ (MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse) => {
            PeerBody::VoteResponse {
                pre: kind == MessageType::MsgRequestPreVoteResponse,
                reject: m.reject,
                commit,
                commit_term,
            }
        }
        MessageType::MsgHeartbeat => match request_of(&m.context) {
            Some(request) => PeerBody::ReadIndex { request },
            None => PeerBody::Heartbeat { commit },
        },
        MessageType::MsgHeartbeatResponse => match request_of(&m.context) {
            Some(request) => PeerBody::ReadIndexAnswer { request, index: commit, refused: false },
            None => PeerBody::HeartbeatResponse { commit, lane: 0 },
        },
        MessageType::MsgSnapshot => {
            let metadata = m.get_snapshot().get_metadata();
            PeerBody::SnapshotOffer { index: RaftIndex::new(metadata.index), index_term: Term::new(metadata.term) }
        }
        MessageType::MsgTransferLeader => PeerBody::TransferLeader,
        MessageType::MsgTimeoutNow => PeerBody::TimeoutNow,
        // Local to a node, or never asked for here: proposals, and reads by index that are forwarded.
        MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgPropose
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum
        | MessageType::MsgReadIndex
        | MessageType::MsgReadIndexResp => return None,
    };
    Some(PeerMessage { from: ReplicaId::new(m.from), to: ReplicaId::new(m.to), term: Term::new(m.term), body })
}

/// Which read a heartbeat asks for, if any.
pub(crate) fn request_of(context: &[u8]) -> Option<u64> {
    context.try_into().ok().map(u64::from_be_bytes)
}

/// `slog` to `tracing`.
mod bridge {
    use std::sync::OnceLock;

    use slog::{Drain, Level, Logger, Never, OwnedKVList, Record, o};

    struct ToTracing;

    impl Drain for ToTracing {
        type Ok = ();
        type Err = Never;

        fn log(&self, record: &Record<'_>, _values: &OwnedKVList) -> Result<(), Never> {
            // Every election of every group logs ten lines of information: they are details here.
            match record.level() {
                Level::Critical | Level::Error => tracing::error!(target: "raft", "{}", record.msg()),
                Level::Warning => tracing::debug!(target: "raft", "{}", record.msg()),
                Level::Info | Level::Debug | Level::Trace => tracing::trace!(target: "raft", "{}", record.msg()),
            }
            Ok(())
        }

        fn is_enabled(&self, level: Level) -> bool {
            match level {
                Level::Critical | Level::Error => true,
                Level::Warning => tracing::enabled!(target: "raft", tracing::Level::DEBUG),
                Level::Info | Level::Debug | Level::Trace => {
                    tracing::enabled!(target: "raft", tracing::Level::TRACE)
                }
            }
        }
    }

    /// One for the process: a logger is shared state behind an `Arc`.
    pub(super) fn logger() -> Logger {
        static LOGGER: OnceLock<Logger> = OnceLock::new();
        LOGGER.get_or_init(|| Logger::root(ToTracing, o!())).clone()
    }
}
