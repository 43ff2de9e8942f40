//! A replica as its callers hold it.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use flowstone_protocol::{BatchHeader, BrokerId, Error, ErrorCode, Marker, Offset, ReplicaId, Term, TopicPartition};
use tokio::sync::{Notify, watch};

use crate::effects::Event;
use crate::inbox::{Inbox, Refused};
use crate::machine::Machine;
use crate::membership::MembershipChange;
use crate::metrics::Counters;
use crate::reply::{ByteBudget, Permit, Reply};
use crate::request::{
    Acks, FoundOffset, GroupStatus, Health, OffsetQuery, Produce, Produced, ReadAnswer, ReadRequest, Reconfigure,
    ReplicaStatus, Role, TrimTo,
};
use crate::shard::Message;

/// What callers share of one shard.
#[derive(Debug)]
pub(crate) struct Port<M: Machine> {
    pub(crate) inbox: Inbox<Message<M>>,
    pub(crate) budget: ByteBudget,
    /// Bytes of peers' messages in the inbox.
    pub(crate) peer_bytes: AtomicUsize,
    pub(crate) counters: Counters,
}

/// One life of one place in a shard's table: a message for an earlier life is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SlotKey {
    pub(crate) index: u32,
    pub(crate) life: u32,
}

/// A replica in its shard. Cheap to clone; every call returns at once, answers come through replies.
#[derive(Debug)]
pub struct ReplicaHandle<M: Machine> {
    pub(crate) port: Arc<Port<M>>,
    pub(crate) slot: SlotKey,
    pub(crate) tp: TopicPartition,
    pub(crate) status: Arc<StatusCell>,
}

impl<M: Machine> Clone for ReplicaHandle<M> {
    fn clone(&self) -> Self {
        Self { port: Arc::clone(&self.port), slot: self.slot, tp: self.tp, status: Arc::clone(&self.status) }
    }
}

impl<M: Machine> ReplicaHandle<M> {
    /// Its partition.
    pub fn tp(&self) -> TopicPartition {
        self.tp
    }

    /// How it is; read from atomics.
    pub fn status(&self) -> ReplicaStatus {
        self.status.read()
    }

    /// Whether a flush of its shard took, or takes, about as long as an election, not long before `now`: leadership that
    /// was handed over for that reason should not be given back yet.
    pub fn is_disk_slow(&self, now: Instant) -> bool {
        self.port.counters.is_disk_slow(now)
    }

    /// Since when its group rests, by its shard's own count, never 0: while it does, all members have everything, and are
    /// heard of. The number is another one whenever it came back to rest. `None`: something is under way in it.
    pub fn rests_since(&self) -> Option<u64> {
        Some(self.status.rests_since.load(Ordering::Acquire)).filter(|&since| since != 0)
    }

    /// Waits until it leads and serves.
    ///
    /// # Errors
    /// `QUARANTINED` when it never will.
    pub async fn ready(&self) -> Result<(), Error> {
        loop {
            // Registered before looking: a change in between is not missed.
            let changed = self.status.changed.notified();
            let status = self.status.read();
            if status.is_ready() {
                return Ok(());
            }
            if let Health::Quarantined { message } | Health::Lost { message, .. } = status.health {
                return Err(Error::new(ErrorCode::Quarantined, message).with_partition(self.tp.partition));
            }
            changed.await;
        }
    }

    /// Waits until its role, term, leader or health differs from what was `seen`, and returns how it is then.
    pub async fn changed(&self, seen: &ReplicaStatus) -> ReplicaStatus {
        loop {
            // Registered before looking, as above.
            let changed = self.status.changed.notified();
            let status = self.status.read();
            if status.role != seen.role
                || status.term != seen.term
                || status.leader != seen.leader
                || status.health != seen.health
            {
                return status;
            }
            changed.await;
        }
    }

    /// Waits for room for `bytes` in its shard. First come, first served; more than the whole budget waits for all of it.
    pub async fn reserve(&self, bytes: usize) -> Permit {
        self.port.budget.reserve(bytes).await
    }

    /// Room for `bytes`, if there is any just now.
    pub fn try_reserve(&self, bytes: usize) -> Option<Permit> {
        self.port.budget.try_reserve(bytes)
    }

    /// Appends one client's batch, validated already. Batches of one caller are appended in the order of the calls.
    pub fn produce(
        &self,
        batch: Bytes,
        header: BatchHeader,
        acks: Acks,
        permit: Permit,
        reply: Reply<Result<Produced, Error>>,
    ) {
        self.send(Event::Produce(Produce { batch, header, acks, permit, reply }));
    }

    /// Gives a coordinator's command to the machine; the answer waits until it is committed.
    pub fn command(&self, command: M::Command, reply: Reply<Result<M::Reply, Error>>) {
        self.send(Event::Command { command, reply });
    }

    /// Ends a producer's transaction in this partition; leader only. Answers when that is committed, at once where it was
    /// before; `PRODUCER_FENCED` where a later transaction has begun, `NOT_COORDINATOR` where a newer coordinator has
    /// written.
    pub fn marker(&self, marker: Marker, reply: Reply<Result<(), Error>>) {
        self.send(Event::Marker { marker, reply });
    }

    /// Reads committed batches.
    pub fn read(&self, request: ReadRequest, reply: Reply<Result<ReadAnswer, Error>>) {
        self.send(Event::Read { request, reply });
    }

    /// A read gave bytes that are not what was written: they are looked at, and repaired where there are other replicas.
    pub fn found_corrupt(&self, offset: Offset) {
        // A shard that has stopped repairs nothing.
        drop(self.port.inbox.report(Message::Corrupt { slot: self.slot, offset }));
    }

    /// Looks an offset up; `None` where no record is at or after the time.
    pub fn list_offset(&self, query: OffsetQuery, reply: Reply<Result<Option<FoundOffset>, Error>>) {
        self.send(Event::ListOffset { query, reply });
    }

    /// Moves the log start, by a control batch; answers with the log start once that is committed. A log start that is
    /// there already is left as it is.
    pub fn trim(&self, to: TrimTo, reply: Reply<Result<Offset, Error>>) {
        self.send(Event::Trim { to, reply });
    }

    /// Says where the other replicas of the group are; what is learned from their own messages goes before it.
    pub fn set_peers(&self, peers: Arc<[(ReplicaId, BrokerId)]>) {
        // Told to one that has stopped, they are those of its next start anyway.
        drop(self.port.inbox.report(Message::SetPeers { slot: self.slot, peers }));
    }

    /// Changes who belongs to the group; leader only, one change at a time. Answers when it is applied, `NOT_LEADER` where
    /// another leads, `OVERLOADED` while another change is under way, `INVALID_REQUEST` for what would break the group.
    pub fn change_membership(&self, change: MembershipChange, reply: Reply<Result<(), Error>>) {
        self.send(Event::ChangeMembership { change, reply });
    }

    /// Hands leadership to another voter, the best there is where none is named; leader only. Answers when another leads;
    /// `TIMED_OUT` when that one did not take over in time, and this one goes on.
    pub fn transfer_leader(&self, to: Option<ReplicaId>, reply: Reply<Result<(), Error>>) {
        self.send(Event::TransferLeader { to, reply });
    }

    /// How the group is, as this replica sees it.
    pub fn group(&self, reply: Reply<Result<GroupStatus, Error>>) {
        self.send(Event::Group { reply });
    }

    /// The high watermark, once a majority has confirmed that this replica still leads: nothing that was acknowledged
    /// before the call lies above it. Leader only.
    pub fn read_index(&self, reply: Reply<Result<Offset, Error>>) {
        self.send(Event::ReadIndex { reply });
    }

    /// Changes settings from the next step on, or from the next opening on: they are never lost, however much waits.
    pub fn reconfigure(&self, change: Reconfigure) {
        // Told to one that has stopped, they are those of its next start anyway.
        drop(self.port.inbox.report(Message::Event { slot: self.slot, event: Event::Reconfigure(change) }));
    }

    fn send(&self, event: Event<M>) {
        match self.port.inbox.request(Message::Event { slot: self.slot, event }) {
            Ok(()) => {}
            Err(Refused::Full(message)) => message.refuse(&Error::new(
                ErrorCode::Overloaded,
                "too many requests wait for this shard; try again in a moment",
            )),
            Err(Refused::Closed(message)) => message.refuse(&shutting_down()),
        }
    }
}

/// The shards are stopping, or have.
pub(crate) fn shutting_down() -> Error {
    Error::new(ErrorCode::ShuttingDown, "the broker is shutting down; try again when it is back")
}

/// What a replica's shard publishes about it.
#[derive(Debug)]
pub(crate) struct StatusCell {
    role: AtomicU8,
    term: AtomicU64,
    log_start: AtomicI64,
    last_stable_offset: AtomicI64,
    high_watermark: AtomicI64,
    end_offset: AtomicI64,
    size_bytes: AtomicU64,
    records: AtomicU64,
    // 0: none.
    leader: AtomicU64,
    // Negative: not known.
    leader_broker: AtomicI64,
    is_voter: AtomicBool,
    // 0: it does not.
    rests_since: AtomicU64,
    // Guards the message beside the state for the time of a clone.
    health: Mutex<Health>,
    // Told at every change of role, term or health.
    changed: Notify,
    // The same of all replicas, counted.
    all: Arc<watch::Sender<u64>>,
}

impl StatusCell {
    pub(crate) fn new(all: Arc<watch::Sender<u64>>) -> Self {
        Self {
            role: AtomicU8::new(role_to_u8(Role::Opening)),
            term: AtomicU64::new(0),
            log_start: AtomicI64::new(0),
            last_stable_offset: AtomicI64::new(0),
            high_watermark: AtomicI64::new(0),
            end_offset: AtomicI64::new(0),
            size_bytes: AtomicU64::new(0),
            records: AtomicU64::new(0),
            leader: AtomicU64::new(0),
            leader_broker: AtomicI64::new(-1),
            is_voter: AtomicBool::new(false),
            rests_since: AtomicU64::new(0),
            health: Mutex::new(Health::Ok),
            changed: Notify::new(),
            all,
        }
    }

    pub(crate) fn read(&self) -> ReplicaStatus {
        // The order of the loads is the reverse of the stores' in `publish`: log start <= last stable offset <= high watermark <= end.
        let role = role_from_u8(self.role.load(Ordering::Acquire));
        let log_start = Offset::new(self.log_start.load(Ordering::Acquire));
        let last_stable_offset = Offset::new(self.last_stable_offset.load(Ordering::Acquire));
        let high_watermark = Offset::new(self.high_watermark.load(Ordering::Acquire));
        let end_offset = Offset::new(self.end_offset.load(Ordering::Acquire));
        ReplicaStatus {
            role,
            term: Term::new(self.term.load(Ordering::Relaxed)),
            log_start,
            high_watermark,
            last_stable_offset,
            end_offset,
            size_bytes: self.size_bytes.load(Ordering::Relaxed),
            records: self.records.load(Ordering::Relaxed),
            health: self.health.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            leader: Some(self.leader.load(Ordering::Relaxed)).filter(|&id| id != 0).map(ReplicaId::new),
            leader_broker: i32::try_from(self.leader_broker.load(Ordering::Relaxed))
                .ok()
                .filter(|&id| id >= 0)
                .map(BrokerId::new),
            is_voter: self.is_voter.load(Ordering::Relaxed),
        }
    }

    /// By the shard's thread alone: it rests since this tick, if it did not already, or does not any more.
    pub(crate) fn rests(&self, since: Option<u64>) {
        match since {
            None => self.rests_since.store(0, Ordering::Release),
            Some(tick) if self.rests_since.load(Ordering::Relaxed) == 0 => {
                self.rests_since.store(tick.max(1), Ordering::Release);
            }
            Some(_) => {}
        }
    }

    /// By the shard's thread alone.
    pub(crate) fn publish(&self, now: &ReplicaStatus) {
        self.size_bytes.store(now.size_bytes, Ordering::Relaxed);
        self.records.store(now.records, Ordering::Relaxed);
        self.end_offset.store(now.end_offset.get(), Ordering::Release);
        self.high_watermark.store(now.high_watermark.get(), Ordering::Release);
        self.last_stable_offset.store(now.last_stable_offset.get(), Ordering::Release);
        self.log_start.store(now.log_start.get(), Ordering::Release);
        let role = role_to_u8(now.role);
        let mut changed = self.term.swap(now.term.get(), Ordering::Relaxed) != now.term.get();
        changed |= self.role.swap(role, Ordering::Release) != role;
        let leader = now.leader.map_or(0, ReplicaId::get);
        changed |= self.leader.swap(leader, Ordering::Relaxed) != leader;
        let broker = now.leader_broker.map_or(-1, |broker| i64::from(broker.get()));
        changed |= self.leader_broker.swap(broker, Ordering::Relaxed) != broker;
        self.is_voter.store(now.is_voter, Ordering::Relaxed);
        {
            let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
            if *health != now.health {
                health.clone_from(&now.health);
                changed = true;
            }
        }
        if changed {
            self.changed.notify_waiters();
            self.all.send_modify(|count| *count = count.wrapping_add(1));
        }
    }
}

const fn role_to_u8(role: Role) -> u8 {
    match role {
        Role::Opening => 0,
        Role::Follower => 1,
        Role::Candidate => 2,
        Role::Elected => 3,
        Role::Leader => 4,
        Role::Learner => 5,
        Role::Pulling => 6,
    }
}

const fn role_from_u8(role: u8) -> Role {
    match role {
        1 => Role::Follower,
        2 => Role::Candidate,
        3 => Role::Elected,
        4 => Role::Leader,
        5 => Role::Learner,
        6 => Role::Pulling,
        _ => Role::Opening,
    }
}
