//! The `raft` crate 0.7, with its known gaps handled in this one place:
//!
//! - it draws election timeouts from the thread's random numbers: here they are a function of seed, replica and term,
//!   set again after every call that can have reset them;
//! - it logs through `slog`: bridged to `tracing`, one level lower, as thousands of groups share a process;
//! - it panics on what it holds impossible: caught here, and the replica is opened anew;
//! - its `propose` copies: proposals are stepped, with `Bytes`;
//! - it would forward a proposal to the leader: nothing but a leader's own proposals is ever stepped;
//! - its wire format is rust-protobuf: messages are translated to and from our own, here.

use std::cell::Ref;
use std::panic::{AssertUnwindSafe, catch_unwind};

use flowstone_protocol::{RaftIndex, ReplicaId, Term};
use flowstone_storage::{EntryBody, HardState, Log, StorageError};
use raft::eraftpb::{Entry, Message, MessageType};
use raft::{CAMPAIGN_TRANSFER, Config, RawNode, Ready, StateRole};

use crate::membership::{Membership, MembershipChange};
use crate::peer::{PeerBody, PeerMessage};
use crate::raft_log::{self, RaftLog};

/// Ticks between a leader's heartbeats.
const HEARTBEAT_TICKS: usize = 2;
/// Ticks of silence before an election, at least; at most twice as many.
const ELECTION_TICKS: usize = 6;
/// Bytes of entries in one message to a follower.
const MESSAGE_BYTES_MAX: u64 = 1 << 20;
/// Messages on their way to one follower.
const MESSAGES_IN_FLIGHT_MAX: usize = 256;

const _: () = assert!(ELECTION_TICKS > HEARTBEAT_TICKS);

/// The Raft crate panicked; its state is not to be used again.
#[derive(Debug)]
pub(crate) struct Panicked(pub(crate) String);

/// One replica's Raft.
pub(crate) struct RaftAdapter {
    node: RawNode<RaftLog>,
    id: u64,
    seed: u64,
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
    ) -> Result<Self, Panicked> {
        let config = Config {
            id: replica.get(),
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            applied: log.checkpoint().applied.get(),
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: MESSAGES_IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let store = RaftLog::new(log, hard_state, membership);
        let node = caught(|| RawNode::new(&config, store, &bridge::logger()))?
            .map_err(|error| Panicked(format!("cannot open: {error}")))?;
        let mut adapter = Self { node, id: replica.get(), seed };
        adapter.set_election_timeout();
        Ok(adapter)
    }

    pub(crate) fn log(&self) -> Ref<'_, Log> {
        self.node.store().log.borrow()
    }

    /// What could not be read for the crate, and made it panic.
    pub(crate) fn unreadable(&self) -> Option<StorageError> {
        self.node.store().unreadable.take()
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

    /// Entries up to here are persisted as far as Raft was told.
    pub(crate) fn persisted(&self) -> RaftIndex {
        RaftIndex::new(self.node.raft.raft_log.persisted)
    }

    /// The last entry, written or not.
    pub(crate) fn last_index(&self) -> RaftIndex {
        RaftIndex::new(self.node.raft.raft_log.last_index())
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

    // A function of the term alone, so that it does not matter how often the crate drew its own: a new election is a new
    // term, hence a new draw.
    fn set_election_timeout(&mut self) {
        let mixed = mix(self.seed ^ mix(self.id) ^ mix(self.node.raft.term).rotate_left(17));
        let timeout = ELECTION_TICKS + (mixed % ELECTION_TICKS as u64) as usize;
        if self.node.raft.randomized_election_timeout() != timeout {
            self.node.raft.set_randomized_election_timeout(timeout);
        }
    }

    pub(crate) fn campaign(&mut self) -> Result<(), Panicked> {
        // Refused only where it can not be elected anyway.
        self.call(|node| drop(node.campaign()))
    }

    pub(crate) fn tick(&mut self) -> Result<(), Panicked> {
        self.call(|node| {
            node.tick();
        })
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
        let message = to_raft_message(message);
        // A message that does not fit (an answer of a stranger, say) is dropped: Raft repeats what matters.
        self.call(|node| drop(node.step(message)))
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
        Ok(Membership::from_raft(&state))
    }

    /// From the crate's message to ours; `None` for what has no form between brokers.
    pub(crate) fn peer_message(message: Message) -> Option<PeerMessage> {
        from_raft_message(message)
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
fn mix(mut x: u64) -> u64 {
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
        PeerBody::HeartbeatResponse { commit } => {
            m.set_msg_type(MessageType::MsgHeartbeatResponse);
            m.commit = commit.get();
        }
        PeerBody::TransferLeader => m.set_msg_type(MessageType::MsgTransferLeader),
        PeerBody::TimeoutNow => m.set_msg_type(MessageType::MsgTimeoutNow),
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
        MessageType::MsgHeartbeat => PeerBody::Heartbeat { commit },
        MessageType::MsgHeartbeatResponse => PeerBody::HeartbeatResponse { commit },
        MessageType::MsgTransferLeader => PeerBody::TransferLeader,
        MessageType::MsgTimeoutNow => PeerBody::TimeoutNow,
        // Local to a node, or never asked for here: proposals, snapshots and reads by index.
        MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgPropose
        | MessageType::MsgSnapshot
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum
        | MessageType::MsgReadIndex
        | MessageType::MsgReadIndexResp => return None,
    };
    Some(PeerMessage { from: ReplicaId::new(m.from), to: ReplicaId::new(m.to), term: Term::new(m.term), body })
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
