//! A shell around one replica without threads: every effect is performed when the test says so.

// Each test program uses its own part of this.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{BatchHeader, Error, Offset, PartitionId, ReplicaId, Timestamp, TopicId, TopicPartition};
use flowstone_replication::effects::{CountOrder, Fetched, FlushOrder, HardStateNumber, Offered};
use flowstone_replication::{
    Acks, Effects, Ended, Event, FlushMode, LogConfig, Machine, Membership, PeerMessage, Permit, Produce, Produced,
    ReadAnswer, ReadRequest, Replica, ReplicaConfig, Reply, RetentionConfig,
};
use flowstone_storage::checkpoint::CREATION_INDEX;
use flowstone_storage::{CheckpointJob, Disk, HardState, Log, RangeTicket, ReadError, ReplicaIdentity};
use tokio::sync::oneshot;

pub type Answer<T> = oneshot::Receiver<Result<T, Error>>;

pub const TP: TopicPartition = TopicPartition::new(TopicId::new(7), PartitionId::new(3));

pub fn config(replica: u64) -> ReplicaConfig {
    ReplicaConfig {
        tp: TP,
        replica: ReplicaId::new(replica),
        flush: FlushMode::Quorum,
        retention: RetentionConfig::default(),
        internal: false,
        max_message_bytes: 1 << 20,
        checkpoint_bytes: 1 << 20,
        checkpoint_entries: 1_000,
        parked_reads_max: 100,
        seed: 1,
        offer_after_bytes: 1 << 40,
        stands_first: false,
    }
}

/// Makes the replica's folder, with these voters.
pub fn create(disk: &Arc<dyn Disk>, dir: &Path, replica: u64, voters: &[u64]) {
    let identity = ReplicaIdentity { replica: ReplicaId::new(replica), topic_partition: TP, feature_level: 1 };
    let membership = Membership { voters: voters.iter().copied().map(ReplicaId::new).collect(), learners: Vec::new() };
    Log::create(disk, dir, identity, membership.encode()).expect("a new replica is made");
}

/// One replica and what it ordered.
pub struct Shell<M: Machine> {
    pub replica: Replica<M>,
    pub now: Timestamp,
    /// Ordered, not run.
    pub flush: Option<FlushOrder>,
    pub checkpoint: Option<CheckpointJob>,
    pub hard_state_waiting: Option<(HardStateNumber, HardState)>,
    /// What a stripe's file would hold, flushed.
    pub hard_state: Option<HardState>,
    pub sent: Vec<PeerMessage>,
    pub ended: Option<Ended>,
    /// Read for followers, not given back yet.
    pub fetched: Vec<Fetched>,
    pub offered: Option<Offered>,
    pub count: Option<CountOrder>,
    /// Everything below is performed at once.
    pub holds_flushes: bool,
    pub holds_hard_states: bool,
    pub holds_checkpoints: bool,
}

impl<M: Machine> Shell<M> {
    pub fn open(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        log: LogConfig,
        hard_state: Option<HardState>,
        machine: M,
        config: ReplicaConfig,
    ) -> Result<Self, String> {
        let now = Timestamp::new(1_000_000);
        let flushed = hard_state.map_or(CREATION_INDEX, |state| state.flushed);
        let log = Log::open(Arc::clone(disk), dir, log, flushed, now).map_err(|error| error.to_string())?;
        let replica = Replica::open(log, hard_state, machine, config).map_err(|error| error.to_string())?;
        Ok(Self {
            replica,
            now,
            flush: None,
            checkpoint: None,
            hard_state_waiting: None,
            hard_state,
            sent: Vec::new(),
            ended: None,
            fetched: Vec::new(),
            offered: None,
            count: None,
            holds_flushes: false,
            holds_hard_states: false,
            holds_checkpoints: false,
        })
    }

    /// Steps, and performs what is not held, until nothing is left to do.
    pub fn step(&mut self, events: impl IntoIterator<Item = Event<M>>) {
        let effects = self.replica.step(events, self.now);
        self.perform(effects);
        self.work();
    }

    /// Performs what was ordered and is not held.
    pub fn work(&mut self) {
        loop {
            let event = if let Some(fetched) = self.fetched.pop() {
                Some(Event::Fetched(fetched))
            } else if let Some(order) = self.count.take() {
                Some(Event::Counted(order.run()))
            } else if !self.holds_hard_states && self.hard_state_waiting.is_some() {
                self.run_hard_state()
            } else if !self.holds_flushes && self.flush.is_some() {
                self.run_flush()
            } else if !self.holds_checkpoints && self.checkpoint.is_some() {
                self.run_checkpoint()
            } else {
                return;
            };
            let Some(event) = event else { return };
            let effects = self.replica.step([event], self.now);
            self.perform(effects);
        }
    }

    pub fn run_flush(&mut self) -> Option<Event<M>> {
        self.flush.take().map(|order| Event::Flushed(order.job.run()))
    }

    pub fn run_hard_state(&mut self) -> Option<Event<M>> {
        self.hard_state_waiting.take().map(|(number, state)| {
            self.hard_state = Some(state);
            Event::HardStateFlushed(number)
        })
    }

    pub fn run_checkpoint(&mut self) -> Option<Event<M>> {
        self.checkpoint.take().map(|job| Event::CheckpointWritten(job.run()))
    }

    pub fn perform(&mut self, effects: Effects<M>) {
        let Effects {
            send_now,
            send_flushed,
            hard_state,
            flushed,
            flush,
            checkpoint,
            answers,
            tickets,
            lookups,
            fetches,
            count,
            offered,
            is_disk_slow: _,
            ended,
        } = effects;
        self.sent.extend(send_now);
        self.sent.extend(send_flushed);
        if hard_state.is_some() {
            self.hard_state_waiting = hard_state;
        }
        if let Some(state) = flushed {
            self.hard_state = Some(state);
        }
        if let Some(order) = flush {
            assert!(self.flush.is_none(), "one flush at a time");
            self.flush = Some(order);
        }
        if let Some(job) = checkpoint {
            assert!(self.checkpoint.is_none(), "one checkpoint at a time");
            self.checkpoint = Some(job);
        }
        for answer in answers {
            answer.send();
        }
        for order in tickets {
            let (reply, answer) = order.run();
            reply.send(answer.map_err(|error| Error::new(flowstone_protocol::ErrorCode::Internal, error.to_string())));
        }
        for order in fetches {
            let ticket = self.replica.log().range(order.first, order.last, order.max_bytes as usize);
            let entries = ticket.map_err(ReadError::from).and_then(RangeTicket::run_entries);
            self.fetched.push(order.done(entries));
        }
        if count.is_some() {
            self.count = count;
        }
        if offered.is_some() {
            self.offered = offered;
        }
        for order in lookups {
            order.run();
        }
        if ended.is_some() {
            self.ended = ended;
        }
    }

    pub fn produce(&mut self, (batch, header): (Bytes, BatchHeader), acks: Acks) -> Answer<Produced> {
        let (event, answer) = produce((batch, header), acks);
        self.step([event]);
        answer
    }

    pub fn read(&mut self, from: i64) -> Answer<ReadAnswer> {
        let (reply, answer) = reply();
        let request = ReadRequest { wait: true, ..ReadRequest::new(Offset::new(from), 1 << 20) };
        self.step([Event::Read { request, reply }]);
        answer
    }
}

pub fn produce<M: Machine>((batch, header): (Bytes, BatchHeader), acks: Acks) -> (Event<M>, Answer<Produced>) {
    let (reply, answer) = reply();
    (Event::Produce(Produce { batch, header, acks, permit: Permit::unbounded(), reply }), answer)
}

pub fn reply<T>() -> (Reply<Result<T, Error>>, Answer<T>) {
    let (sender, answer) = oneshot::channel();
    (Reply::from(sender), answer)
}

/// The answer, which must be there.
#[track_caller]
pub fn answered<T>(mut answer: Answer<T>) -> Result<T, Error> {
    answer.try_recv().expect("it is answered")
}

/// Nothing was answered yet; gives the answer back.
#[track_caller]
pub fn unanswered<T: std::fmt::Debug>(mut answer: Answer<T>) -> Answer<T> {
    assert!(matches!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty)), "it must not be answered yet");
    answer
}
