//! The shell around the batches: streams to the brokers, timers, and the buffer's room.
//!
//! Whoever makes a batch ready sends it: the thread that fills it, awaits it, or hears an answer calls
//! [`ProducerCore::dispatch`], which needs no task to wake up. Two kinds of tasks remain: one [`Link`] per broker, which
//! connects and reads answers, and one driver, for what time and metadata bring about.
//!
//! Locks, outermost first: topics, a partition's batches, a link, timers. Nothing awaits inside any.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use flowstone_protocol::pb;
use flowstone_protocol::{ProducerEpoch, ProducerId};
use futures::Stream;
use tokio::sync::{Notify, Semaphore, mpsc, watch};

use crate::cluster::Cluster;
use crate::error::{Error, ErrorCode, ErrorKind, Result};
use crate::locked;
use crate::metadata::TopicInfo;
use crate::producer::ack::{Ack, Outcome};
use crate::producer::batcher::{Added, Batch, BatchSettings, Ended, Identity, Next, PartitionBatches};
use crate::producer::partitioner::{Partitioner, StickyPartition};
use crate::record::{Record, unix_millis};
use crate::retry::{Backoff, BackoffPolicy};
use crate::wire::{self, Outgoing};

/// Number of `ProduceRequest.batch`, its last field.
const BATCH_TAG: u32 = 5;

/// How a producer behaves, beyond how it makes batches.
#[derive(Clone, Debug)]
pub(crate) struct SenderSettings {
    pub(crate) acks: pb::Acks,
    pub(crate) partitioner: Partitioner,
    pub(crate) record_bytes_max: usize,
    pub(crate) buffer_bytes: usize,
    /// Goes with every batch of a transactional producer.
    pub(crate) transactional_id: Option<String>,
}

/// What one attempt to take a record in came to.
pub(crate) enum Attempt {
    Added(Ack),
    /// The topic is not known yet.
    UnknownTopic,
    /// Nothing was taken in; this many bytes must be free first.
    NoRoom(usize),
    Refused(Error),
}

/// Everything of one producer; its tasks and handles share it.
pub(crate) struct ProducerCore {
    pub(crate) cluster: Arc<Cluster>,
    batching: Arc<BatchSettings>,
    settings: SenderSettings,
    /// What new partitions begin with; another one after each transaction. Guards the value alone.
    identity: Mutex<Option<Identity>>,
    /// Why the transaction can only be aborted: a record of it failed. Guards the error alone.
    spoiled: Mutex<Option<Error>>,
    /// As `spoiled`, for those that must not wait.
    is_spoiled: AtomicBool,
    runtime: tokio::runtime::Handle,
    topics: RwLock<HashMap<Arc<str>, Arc<ProducerTopic>>>,
    /// Every partition of every known topic.
    queues: RwLock<Vec<Arc<PartitionQueue>>>,
    links: Mutex<HashMap<i32, Arc<Link>>>,
    /// Bytes of the buffer that are free.
    room: Semaphore,
    timers: Timers,
    closing: AtomicBool,
    /// As `stop`, for those that must not wait.
    stopped: AtomicBool,
    stop: watch::Sender<bool>,
    /// Link tasks that have not ended.
    links_running: watch::Sender<usize>,
    /// Batches begun and not ended.
    outstanding: AtomicUsize,
    /// The first failure that no flush has told of.
    failure: Mutex<Option<Error>>,
    pub(crate) counters: Counters,
    /// Ourselves, for the queues.
    this: Weak<Self>,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) records_acknowledged: AtomicU64,
    pub(crate) records_failed: AtomicU64,
    pub(crate) batches_sent: AtomicU64,
    pub(crate) bytes_sent: AtomicU64,
}

/// One topic as this producer sees it: immutable, replaced when its metadata changes.
#[derive(Debug)]
struct ProducerTopic {
    info: Arc<TopicInfo>,
    sticky: Arc<StickyPartition>,
    queues: Vec<Arc<PartitionQueue>>,
}

/// One partition: its batches, and the link to its leader.
pub(crate) struct PartitionQueue {
    topic: Arc<str>,
    topic_id: Bytes,
    partition: i32,
    core: Weak<ProducerCore>,
    state: Mutex<QueueState>,
}

struct QueueState {
    batches: PartitionBatches,
    link: Option<Arc<Link>>,
    asking_for_id: bool,
}

impl std::fmt::Debug for PartitionQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

impl PartitionQueue {
    /// Somebody awaits a batch of it.
    pub(crate) fn send_now(self: &Arc<Self>) {
        if let Some(core) = self.core.upgrade() {
            core.dispatch(self);
        }
    }
}

impl ProducerCore {
    /// A producer's core with its driver running.
    pub(crate) fn start(
        cluster: Arc<Cluster>,
        batching: BatchSettings,
        settings: SenderSettings,
        identity: Option<Identity>,
    ) -> Arc<Self> {
        let core = Arc::new_cyclic(|this| Self {
            cluster,
            batching: Arc::new(batching),
            identity: Mutex::new(identity),
            spoiled: Mutex::default(),
            is_spoiled: AtomicBool::new(false),
            runtime: tokio::runtime::Handle::current(),
            topics: RwLock::default(),
            queues: RwLock::default(),
            links: Mutex::default(),
            room: Semaphore::new(settings.buffer_bytes),
            settings,
            timers: Timers::default(),
            closing: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            stop: watch::Sender::new(false),
            links_running: watch::Sender::new(0),
            outstanding: AtomicUsize::new(0),
            failure: Mutex::default(),
            counters: Counters::default(),
            this: this.clone(),
        });
        tokio::spawn(drive(core.clone()));
        core
    }

    /// Takes a record in, if its topic is known and there is room. `credit` is room that the caller holds already.
    pub(crate) fn try_append(&self, record: &Record<'_>, credit: &mut usize) -> Attempt {
        if self.closing.load(Ordering::Relaxed) {
            return Attempt::Refused(Error::closed("producer"));
        }
        if let Some(error) = self.spoiled() {
            return Attempt::Refused(error);
        }
        let bytes = record.bytes_max();
        if bytes > self.settings.record_bytes_max {
            let most = self.settings.record_bytes_max;
            let message = format!("the record takes up to {bytes} bytes, this producer's limit is {most}");
            return Attempt::Refused(Error::new(ErrorCode::MessageTooLarge, message).at_topic(record.topic));
        }
        let timestamp = record.timestamp.unwrap_or_else(|| unix_millis(SystemTime::now()));
        if timestamp < 0 {
            let message = format!("a record's timestamp must not be before 1970, {timestamp} ms is");
            return Attempt::Refused(Error::new(ErrorCode::InvalidTimestamp, message).at_topic(record.topic));
        }
        let topics = self.topics.read().unwrap_or_else(PoisonError::into_inner);
        let Some(topic) = topics.get(record.topic) else { return Attempt::UnknownTopic };
        let count = topic.info.partition_count();
        let partition = match record.partition {
            Some(partition) => partition,
            None => self.settings.partitioner.choose(record, count, &topic.sticky),
        };
        let queue = usize::try_from(partition).ok().and_then(|number| topic.queues.get(number));
        let Some(queue) = queue else {
            let message = format!("there is no partition {partition}: the topic has 0 to {}", count - 1);
            let error = Error::new(ErrorCode::UnknownPartition, message).at(record.topic, partition);
            return Attempt::Refused(error);
        };
        let take_room = |bytes: usize| self.take_room(bytes);
        let appended = locked(&queue.state).batches.append(record, timestamp, credit, Instant::now, take_room);
        let Added { delivery, index, opened, sealed } = match appended {
            Ok(Some(added)) => added,
            // The widest header, so that the wait is for enough wherever the record will go.
            Ok(None) => return Attempt::NoRoom(bytes + flowstone_protocol::HEADER_BYTES),
            Err(error) => return Attempt::Refused(error),
        };
        if opened.is_some() {
            self.outstanding.fetch_add(1, Ordering::SeqCst);
        }
        if sealed {
            topic.sticky.move_on(partition, &topic.info.leaders);
        }
        // Closed since this began: it goes at once, or fails at once where the tasks have ended.
        let late = opened.is_some() && self.closing.load(Ordering::SeqCst);
        let now_due = late || opened.is_some() && self.batching.linger.is_zero();
        let dispatch = (sealed || now_due).then(|| queue.clone());
        if let Some((number, due)) = opened {
            if now_due || sealed {
                self.timers.touch();
            } else {
                self.timers.linger(due, number, queue.clone());
            }
        }
        drop(topics);
        if let Some(queue) = dispatch {
            self.dispatch(&queue);
        }
        Attempt::Added(Ack::new(delivery, index, timestamp))
    }

    /// No batch of this partition is open any more: another one takes the records without a key.
    fn move_on(&self, queue: &PartitionQueue) {
        let topics = self.topics.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(topic) = topics.get(&queue.topic) {
            topic.sticky.move_on(queue.partition, &topic.info.leaders);
        }
    }

    fn take_room(&self, bytes: usize) -> bool {
        match u32::try_from(bytes).map(|bytes| self.room.try_acquire_many(bytes)) {
            Ok(Ok(permit)) => {
                permit.forget();
                true
            }
            _ => false,
        }
    }

    /// Waits until this much of the buffer is free, and takes it; what is not used goes back by
    /// [`ProducerCore::give_room`].
    pub(crate) async fn wait_for_room(&self, bytes: usize) -> Result<usize> {
        if bytes > self.settings.buffer_bytes {
            let most = self.settings.buffer_bytes;
            let message = format!("the record takes up to {bytes} bytes, this producer's whole buffer has {most}");
            return Err(Error::new(ErrorCode::MessageTooLarge, message));
        }
        // Room comes free when batches end: those that still wait for company must go.
        self.send_everything();
        let wanted = u32::try_from(bytes).unwrap_or(u32::MAX);
        let stopped = self.stopped();
        tokio::select! {
            permit = self.room.acquire_many(wanted) => {
                permit.map_err(|_| Error::closed("producer"))?.forget();
                Ok(wanted as usize)
            }
            () = stopped => Err(Error::closed("producer")),
        }
    }

    pub(crate) fn give_room(&self, bytes: usize) {
        self.room.add_permits(bytes);
    }

    /// Ends the tasks. What is taken in from now on fails.
    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.stop.send_replace(true);
    }

    async fn stopped(&self) {
        let mut stop = self.stop.subscribe();
        // The sender is ours: the wait ends by the value alone.
        let _ = stop.wait_for(|stop| *stop).await;
    }

    /// Every stream has ended, and with it what was under way on it was taken or lost.
    pub(crate) async fn left(&self) {
        let mut running = self.links_running.subscribe();
        // The sender is ours: the wait ends by the value alone.
        let _ = running.wait_for(|running| *running == 0).await;
    }

    fn all_queues(&self) -> Vec<Arc<PartitionQueue>> {
        self.queues.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends what waits for company, and returns what all that is not ended is told through.
    pub(crate) fn send_everything(&self) -> Vec<Arc<crate::producer::ack::Delivery>> {
        let mut deliveries = Vec::new();
        for queue in self.all_queues() {
            let before = deliveries.len();
            deliveries.extend(locked(&queue.state).batches.deliveries().cloned());
            if deliveries.len() > before {
                for delivery in &deliveries[before..] {
                    delivery.want();
                }
                self.dispatch(&queue);
            }
        }
        deliveries
    }

    /// Makes a topic's partitions known.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`.
    pub(crate) async fn load_topic(&self, name: &str) -> Result<()> {
        let info = self.cluster.topic(name).await?;
        if info.leaders.is_empty() {
            return Err(Error::new(ErrorCode::NoLeader, "the topic has no partitions yet; try again").at_topic(name));
        }
        self.set_topic(info);
        Ok(())
    }

    /// Takes a topic's metadata in: new partitions get queues, changed leaders get links.
    fn set_topic(&self, info: Arc<TopicInfo>) {
        let (moved, queues) = {
            let mut topics = self.topics.write().unwrap_or_else(PoisonError::into_inner);
            let old = topics.get(&info.name).filter(|old| old.info.id == info.id);
            let mut queues = old.map(|old| old.queues.clone()).unwrap_or_default();
            let sticky = old.map_or_else(
                || Arc::new(StickyPartition::starting_at(rand::random_range(0..info.partition_count().max(1)))),
                |old| old.sticky.clone(),
            );
            let known = queues.len();
            for partition in known..info.leaders.len() {
                queues.push(self.new_queue(&info, partition as i32));
            }
            self.queues.write().unwrap_or_else(PoisonError::into_inner).extend(queues[known..].iter().cloned());
            let topic = ProducerTopic { info: info.clone(), sticky, queues: queues.clone() };
            (topics.insert(info.name.clone(), Arc::new(topic)).is_some(), queues)
        };
        for (queue, leader) in queues.iter().zip(&info.leaders) {
            self.set_leader(queue, *leader);
        }
        if moved {
            tracing::debug!(topic = %info.name, "metadata changed");
        }
    }

    fn new_queue(&self, info: &TopicInfo, partition: i32) -> Arc<PartitionQueue> {
        Arc::new_cyclic(|queue| PartitionQueue {
            topic: info.name.clone(),
            topic_id: info.id.clone(),
            partition,
            core: self.this.clone(),
            state: Mutex::new(QueueState {
                batches: PartitionBatches::new(
                    self.batching.clone(),
                    info.name.clone(),
                    partition,
                    queue.clone(),
                    *locked(&self.identity),
                ),
                link: None,
                asking_for_id: false,
            }),
        })
    }

    /// Points a partition at the link of its leader. What is under way to another broker is sent again.
    fn set_leader(&self, queue: &Arc<PartitionQueue>, leader: Option<i32>) {
        let link = leader.map(|broker| self.link(broker));
        {
            let mut state = locked(&queue.state);
            if state.link.as_ref().map(|link| link.broker) == leader {
                return;
            }
            if leader.is_none() {
                state.batches.set_trouble(Error::new(ErrorCode::NoLeader, "the partition has no leader"));
            }
            if let Some(old) = std::mem::replace(&mut state.link, link) {
                old.abandon(queue);
            }
            state.batches.connection_lost(None);
        }
        self.dispatch(queue);
    }

    fn link(&self, broker: i32) -> Arc<Link> {
        let mut links = locked(&self.links);
        let link = links.entry(broker).or_insert_with(|| {
            let link = Arc::new(Link { broker, state: Mutex::default(), needed: Notify::new() });
            if let Some(core) = self.this.upgrade() {
                let link = link.clone();
                core.links_running.send_modify(|running| *running += 1);
                self.runtime.spawn(async move {
                    run_link(core.clone(), link).await;
                    core.links_running.send_modify(|running| *running -= 1);
                });
            }
            link
        });
        link.clone()
    }

    /// Sends what may go of a partition, now, on this thread.
    pub(crate) fn dispatch(&self, queue: &Arc<PartitionQueue>) {
        loop {
            if self.stopped.load(Ordering::SeqCst) {
                let ended = locked(&queue.state).batches.fail_all(&Error::closed("producer"));
                return self.finish(ended);
            }
            if let Some(error) = self.spoiled() {
                let ended = locked(&queue.state).batches.fail_all(&error);
                return self.finish(ended);
            }
            let (unbuilt, is_filling) = {
                let mut state = locked(&queue.state);
                let state = &mut *state;
                let Some(link) = &state.link else { return };
                if !link.is_up() {
                    if !state.batches.is_idle() {
                        link.needed.notify_one();
                    }
                    return;
                }
                match state.batches.next(Instant::now()) {
                    Next::Idle => return,
                    Next::At(at) => {
                        self.timers.alarm(at, queue.clone());
                        return;
                    }
                    Next::Send { number, bytes } => {
                        let bytes_sent = bytes.len() as u64;
                        let left = link.push(queue, bytes, &self.settings, |request_id| {
                            let unanswered = state.batches.sent(number, request_id)?;
                            Some(Unanswered { core: self.this.clone(), batch: Some(unanswered) })
                        });
                        if !left {
                            // The link went down since; its task will send this again.
                            return;
                        }
                        self.counters.batches_sent.fetch_add(1, Ordering::Relaxed);
                        self.counters.bytes_sent.fetch_add(bytes_sent, Ordering::Relaxed);
                        continue;
                    }
                    Next::NewProducerId => {
                        if !std::mem::replace(&mut state.asking_for_id, true)
                            && let Some(core) = self.this.upgrade()
                        {
                            self.runtime.spawn(renew_producer_id(core, queue.clone()));
                        }
                        return;
                    }
                    Next::Build(unbuilt) => (unbuilt, state.batches.has_open()),
                }
            };
            if !is_filling {
                // It goes before it is full: records without a key that come slowly reach all partitions, too.
                self.move_on(queue);
            }
            let built = unbuilt.build();
            let ended = locked(&queue.state).batches.built(built);
            self.finish(ended);
        }
    }

    /// Tells what ended, and gives back its room.
    fn finish(&self, ended: Ended) {
        for (batch, outcome) in ended {
            match &outcome {
                Outcome::Stored { .. } => {
                    self.counters.records_acknowledged.fetch_add(batch.records as u64, Ordering::Relaxed);
                }
                Outcome::Failed(error) => {
                    self.counters.records_failed.fetch_add(batch.records as u64, Ordering::Relaxed);
                    locked(&self.failure).get_or_insert_with(|| error.clone());
                    if self.batching.transactional && !self.is_spoiled.load(Ordering::SeqCst) {
                        self.spoil(error);
                    }
                }
                // One goes, two come.
                Outcome::Split { .. } => {
                    self.outstanding.fetch_add(2, Ordering::SeqCst);
                }
            }
            // Room first: who awaits the outcome may send at once.
            self.give_room(batch.room);
            batch.delivery.resolve(outcome);
            // One of the two sees the other, here and in `begin_close`.
            if self.outstanding.fetch_sub(1, Ordering::SeqCst) == 1 && self.closing.load(Ordering::SeqCst) {
                self.stop();
            }
        }
    }

    fn answered(&self, link: &Arc<Link>, response: pb::ProduceResponse) {
        let now = Instant::now();
        let mut touched: Vec<Arc<PartitionQueue>> = Vec::new();
        for result in response.results {
            let Some(queue) = link.take(result.request_id) else { continue };
            let answer = match &result.error {
                None => Ok((result.base_offset, (result.log_append_time >= 0).then_some(result.log_append_time))),
                Some(detail) => Err(self.judged(&queue, Error::from_detail(detail))),
            };
            if let Err(error) = &answer {
                self.cluster.refused(&queue.topic, queue.partition, error);
            }
            let ended = locked(&queue.state).batches.answered(result.request_id, answer, now, rand::random::<f64>());
            self.finish(ended);
            if !touched.iter().any(|known| Arc::ptr_eq(known, &queue)) {
                touched.push(queue);
            }
        }
        for queue in touched {
            self.dispatch(&queue);
        }
    }

    /// A broker that does not know a partition that the metadata has may be behind it: the metadata, asked for anew, will
    /// say whether the topic is gone.
    fn judged(&self, queue: &PartitionQueue, error: Error) -> Error {
        let unknown = matches!(error.code(), ErrorCode::UnknownTopic | ErrorCode::UnknownPartition);
        let there = || {
            let snapshot = self.cluster.snapshot();
            snapshot.topic(&queue.topic).is_some_and(|topic| topic.id == queue.topic_id)
        };
        if unknown && there() {
            return Error::new(ErrorCode::NotLeader, "the broker does not know the partition (yet)").caused_by(error);
        }
        error
    }

    /// A message that is too large for the broker ends the stream, once all before it are answered: so it is the oldest
    /// that is not. Sent again as it is, it would end every stream.
    fn refuse_oldest(&self, link: &Arc<Link>, error: &Error) {
        let Some((request_id, queue)) = link.take_oldest() else { return };
        let now = Instant::now();
        let ended = locked(&queue.state).batches.answered(request_id, Err(error.clone()), now, rand::random::<f64>());
        self.finish(ended);
    }

    /// The transaction can only be aborted now, for this reason: all its records fail that are not acknowledged.
    fn spoil(&self, error: &Error) {
        let message = format!("a record of the transaction failed ({error}); abort it and begin again");
        let code = match error.code() {
            // Where a partition says that the producer is fenced, it has the transaction's end already: by its timeout, or
            // because another instance took over. Only the coordinator can tell which.
            ErrorCode::ProducerFenced
            // What the partition has of this producer is gone, or not what it should be: the next transaction's sequence
            // begins anew.
            | ErrorCode::OutOfOrderSequence
            | ErrorCode::UnknownProducer
            | ErrorCode::ProducerExpired => ErrorCode::TransactionAborted,
            // The same record would spoil the next transaction as well.
            code if error.kind() == ErrorKind::Fatal => code,
            _ => ErrorCode::TransactionAborted,
        };
        let spoiled = Error::new(code, message).caused_by(error.clone());
        locked(&self.spoiled).get_or_insert(spoiled);
        self.is_spoiled.store(true, Ordering::SeqCst);
        // Not from here: whoever tells of the failure may hold more of them.
        if let Some(core) = self.this.upgrade() {
            self.runtime.spawn(async move {
                for queue in core.all_queues() {
                    core.dispatch(&queue);
                }
            });
        }
    }

    /// Why the transaction can only be aborted, where that is so.
    pub(crate) fn spoiled(&self) -> Option<Error> {
        self.is_spoiled.load(Ordering::SeqCst).then(|| locked(&self.spoiled).clone()).flatten()
    }

    /// Fails what is not acknowledged of the transaction, which is being aborted.
    pub(crate) fn give_up_transaction(&self) {
        let error = Error::new(ErrorCode::TransactionAborted, "the transaction was aborted; begin another one");
        for queue in self.all_queues() {
            let ended = locked(&queue.state).batches.fail_all(&error);
            self.finish(ended);
        }
    }

    /// The transaction before is over: the next one begins, under this identity.
    pub(crate) fn begin_transaction(&self, identity: Identity) {
        *locked(&self.identity) = Some(identity);
        for queue in self.all_queues() {
            locked(&queue.state).batches.begin_transaction(identity);
        }
        locked(&self.failure).take();
        locked(&self.spoiled).take();
        self.is_spoiled.store(false, Ordering::SeqCst);
    }

    /// The first failure since this was last asked.
    pub(crate) fn take_failure(&self) -> Option<Error> {
        locked(&self.failure).take()
    }

    /// No more records; the tasks end once everything is told.
    pub(crate) fn begin_close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.send_everything();
        if self.outstanding.load(Ordering::SeqCst) == 0 {
            self.stop();
        }
    }

    /// Fails what is left, and ends the tasks.
    pub(crate) fn abort(&self, error: &Error) {
        for queue in self.all_queues() {
            let ended = locked(&queue.state).batches.fail_all(error);
            self.finish(ended);
        }
        self.stop();
    }

    /// Compares what is known of the topics with the metadata; returns the names that the metadata does not have.
    fn refresh(&self) -> Vec<Arc<str>> {
        let snapshot = self.cluster.snapshot();
        let known: Vec<Arc<ProducerTopic>> =
            self.topics.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let mut missing = Vec::new();
        for topic in known {
            match snapshot.topic(&topic.info.name) {
                None => missing.push(topic.info.name.clone()),
                Some(info) if **info == *topic.info => {}
                Some(info) if info.id == topic.info.id => self.set_topic(info.clone()),
                Some(info) => {
                    self.drop_topic(&topic.info.name, "the topic was deleted, and made anew under its name");
                    self.set_topic(info.clone());
                }
            }
        }
        missing
    }

    fn drop_topic(&self, name: &str, why: &str) {
        let topic = self.topics.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        let Some(topic) = topic else { return };
        let error = Error::new(ErrorCode::UnknownTopic, why);
        for queue in &topic.queues {
            let ended = locked(&queue.state).batches.fail_all(&error);
            self.finish(ended);
        }
        let mut queues = self.queues.write().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|queue| !topic.queues.iter().any(|gone| Arc::ptr_eq(gone, queue)));
    }

    /// A topic that the metadata lost sight of: is it gone for good?
    async fn check_missing(&self, name: Arc<str>) {
        match self.cluster.topic(&name).await {
            Ok(info) => self.set_topic(info),
            Err(error) if error.code() == ErrorCode::UnknownTopic => self.drop_topic(&name, "the topic was deleted"),
            Err(error) => tracing::debug!(topic = %name, %error, "cannot tell whether the topic still exists"),
        }
    }

    /// Gives up what is too old; has doubts about who leads where nobody does, or whoever does says nothing.
    fn sweep(&self, now: Instant) {
        let links: Vec<_> = locked(&self.links).values().cloned().collect();
        for queue in links.iter().flat_map(|link| link.unheard()) {
            self.cluster.doubt(&queue.topic);
        }
        for queue in self.all_queues() {
            let waits = {
                let state = locked(&queue.state);
                state.link.is_none() && !state.batches.is_idle()
            };
            if waits {
                self.cluster.doubt(&queue.topic);
            }
            let ended = locked(&queue.state).batches.expire(now);
            if !ended.is_empty() {
                self.finish(ended);
                self.dispatch(&queue);
            }
        }
    }

    fn has_work_for(&self, link: &Arc<Link>) -> bool {
        self.all_queues().iter().any(|queue| {
            let state = locked(&queue.state);
            state.link.as_ref().is_some_and(|known| Arc::ptr_eq(known, link)) && !state.batches.is_idle()
        })
    }

    fn dispatch_link(&self, link: &Arc<Link>) {
        for queue in self.all_queues() {
            let ours = locked(&queue.state).link.as_ref().is_some_and(|known| Arc::ptr_eq(known, link));
            if ours {
                self.dispatch(&queue);
            }
        }
    }
}

async fn renew_producer_id(core: Arc<ProducerCore>, queue: Arc<PartitionQueue>) {
    let mut backoff = Backoff::new(BackoffPolicy::REQUEST);
    loop {
        match init_producer(&core.cluster).await {
            Ok(identity) => {
                let mut state = locked(&queue.state);
                state.batches.set_identity(identity);
                state.asking_for_id = false;
                break;
            }
            Err(error) => locked(&queue.state).batches.set_trouble(error),
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.failed()) => {}
            () = core.stopped() => return,
        }
    }
    core.dispatch(&queue);
}

/// A producer id of our own.
pub(crate) async fn init_producer(cluster: &Arc<Cluster>) -> Result<Identity> {
    let response =
        cluster.call_log(None, |mut log| async move { log.init_producer(pb::InitProducerRequest {}).await }).await?;
    let epoch = i16::try_from(response.producer_epoch).map_err(|_| {
        Error::new(ErrorCode::Internal, "the broker gave a producer epoch that is no 16-bit number; report this")
    })?;
    Ok(Identity { producer_id: ProducerId::new(response.producer_id), epoch: ProducerEpoch::new(epoch) })
}

/// The stream to one broker.
#[derive(Debug)]
pub(crate) struct Link {
    broker: i32,
    state: Mutex<LinkState>,
    /// There is something to send, and no stream.
    needed: Notify,
}

#[derive(Debug, Default)]
struct LinkState {
    outbound: Option<mpsc::UnboundedSender<Outbound>>,
    next_request: u64,
    /// Requests without an answer yet.
    pending: HashMap<u64, Arc<PartitionQueue>>,
    /// The last request when [`Link::unheard`] was called: one of those that is still pending at the next call has been
    /// for as long.
    looked_at: u64,
}

/// One message on its way out. Bounded by the batches in flight per partition, or (`acks=none`) by the buffer.
#[derive(Debug)]
struct Outbound {
    /// All but the batch.
    request: pb::ProduceRequest,
    batch: Bytes,
    unanswered: Option<Unanswered>,
}

/// A batch whose end is that it leaves (`acks=none`): it is told so when the connection takes it, or that it was lost.
struct Unanswered {
    core: Weak<ProducerCore>,
    batch: Option<Batch>,
}

impl std::fmt::Debug for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unanswered").field("batch", &self.batch).finish_non_exhaustive()
    }
}

impl Unanswered {
    fn end(&mut self, outcome: Outcome) {
        if let (Some(core), Some(batch)) = (self.core.upgrade(), self.batch.take()) {
            core.finish(vec![(batch, outcome)]);
        }
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if self.batch.is_some() {
            self.end(Outcome::Failed(Error::unreachable(
                "the connection broke before the record left; with acks=none it is not sent again",
            )));
        }
    }
}

impl Link {
    fn is_up(&self) -> bool {
        locked(&self.state).outbound.is_some()
    }

    /// Puts a batch on the stream; `sent` learns its request id first, under the lock, so that no answer can be
    /// faster. False where there is no stream.
    fn push(
        &self,
        queue: &Arc<PartitionQueue>,
        batch: Bytes,
        settings: &SenderSettings,
        sent: impl FnOnce(u64) -> Option<Unanswered>,
    ) -> bool {
        let mut state = locked(&self.state);
        let state = &mut *state;
        let Some(outbound) = &state.outbound else { return false };
        state.next_request += 1;
        let request_id = state.next_request;
        let unanswered = sent(request_id);
        if unanswered.is_none() {
            state.pending.insert(request_id, queue.clone());
        }
        let request = pb::ProduceRequest {
            request_id,
            topic_id: queue.topic_id.clone(),
            partition: queue.partition,
            acks: settings.acks.into(),
            batch: Bytes::new(),
            transactional_id: settings.transactional_id.clone().unwrap_or_default(),
        };
        // A stream whose other end is gone is about to be reported by its task, which sends all this again.
        let _ = outbound.send(Outbound { request, batch, unanswered });
        true
    }

    fn take(&self, request_id: u64) -> Option<Arc<PartitionQueue>> {
        locked(&self.state).pending.remove(&request_id)
    }

    /// The partitions of requests that were without an answer when this was last called, and are still.
    fn unheard(&self) -> Vec<Arc<PartitionQueue>> {
        let mut state = locked(&self.state);
        let before = state.looked_at;
        state.looked_at = state.next_request;
        let mut queues: Vec<Arc<PartitionQueue>> = Vec::new();
        for (_, queue) in state.pending.iter().filter(|(request_id, _)| **request_id <= before) {
            if !queues.iter().any(|known| Arc::ptr_eq(known, queue)) {
                queues.push(queue.clone());
            }
        }
        queues
    }

    fn take_oldest(&self) -> Option<(u64, Arc<PartitionQueue>)> {
        let mut state = locked(&self.state);
        let oldest = *state.pending.keys().min()?;
        state.pending.remove(&oldest).map(|queue| (oldest, queue))
    }

    /// Answers for this partition count no more.
    fn abandon(&self, queue: &Arc<PartitionQueue>) {
        locked(&self.state).pending.retain(|_, pending| !Arc::ptr_eq(pending, queue));
    }

    fn up(&self, outbound: mpsc::UnboundedSender<Outbound>) {
        locked(&self.state).outbound = Some(outbound);
    }

    /// The stream is gone; returns the partitions that had something under way.
    fn down(&self) -> Vec<Arc<PartitionQueue>> {
        let mut state = locked(&self.state);
        state.outbound = None;
        let mut queues: Vec<Arc<PartitionQueue>> = Vec::new();
        for (_, queue) in state.pending.drain() {
            if !queues.iter().any(|known| Arc::ptr_eq(known, &queue)) {
                queues.push(queue);
            }
        }
        queues
    }
}

/// What gRPC pulls from when the connection has room.
struct OutboundStream(mpsc::UnboundedReceiver<Outbound>);

impl Stream for OutboundStream {
    type Item = Outgoing;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|outbound| {
            outbound.map(|mut outbound| {
                if let Some(unanswered) = &mut outbound.unanswered {
                    unanswered.end(Outcome::Stored { base_offset: -1, log_append_time: None });
                }
                Outgoing::with_payload(&outbound.request, BATCH_TAG, outbound.batch)
            })
        })
    }
}

/// Longest time between two looks at what is under way: a broker that answers nothing for one to two of them is doubted.
const SWEEP_MAX: Duration = Duration::from_millis(500);

/// How long a broker may take to end its side of a stream that we ended.
const LEAVE_MAX: Duration = Duration::from_secs(5);

/// Keeps a stream to one broker while there is something to send to it.
async fn run_link(core: Arc<ProducerCore>, link: Arc<Link>) {
    let mut backoff = Backoff::new(BackoffPolicy::CONNECT);
    loop {
        tokio::select! {
            () = link.needed.notified() => {}
            () = core.stopped() => return,
        }
        while core.has_work_for(&link) {
            let mut answered = false;
            let error = {
                let mut stream = std::pin::pin!(serve_link(&core, &link, &mut answered));
                tokio::select! {
                    error = &mut stream => error,
                    () = core.stopped() => {
                        link.down();
                        if core.settings.acks == pb::Acks::None {
                            // Our side of the stream ends behind what is on it; the broker takes that and ends its side.
                            // What is sent so has no other way to be known to have arrived. All else is answered: a
                            // broker that hangs is not waited for.
                            let _ = tokio::time::timeout(LEAVE_MAX, stream).await;
                        }
                        return;
                    }
                }
            };
            if answered {
                backoff.succeeded();
            }
            tracing::debug!(broker = link.broker, %error, "produce stream ended");
            if error.code() == ErrorCode::MessageTooLarge {
                core.refuse_oldest(&link, &error);
            }
            let under_way = link.down();
            for queue in core.all_queues() {
                let mut state = locked(&queue.state);
                if under_way.iter().any(|known| Arc::ptr_eq(known, &queue)) {
                    state.batches.connection_lost(Some(error.clone()));
                } else if state.link.as_ref().is_some_and(|known| Arc::ptr_eq(known, &link)) {
                    state.batches.set_trouble(error.clone());
                } else {
                    continue;
                }
                if !state.batches.is_idle() {
                    core.cluster.doubt(&queue.topic);
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.failed()) => {}
                () = core.stopped() => return,
            }
        }
    }
}

/// One stream, from connecting to its end; the error says why it ended.
async fn serve_link(core: &Arc<ProducerCore>, link: &Arc<Link>, answered: &mut bool) -> Error {
    let address = core.cluster.snapshot().address(link.broker).cloned();
    let Some(address) = address else {
        return Error::unreachable(format!("the address of broker {} is not known", link.broker));
    };
    let settings = core.cluster.settings();
    let channel = match settings.connect(&address).await {
        Ok(channel) => channel,
        Err(error) => return error,
    };
    let (sender, receiver) = mpsc::unbounded_channel();
    // Batches need not wait for the call to be accepted: they follow its headers.
    link.up(sender);
    core.dispatch_link(link);
    let outbound = OutboundStream(receiver);
    let call = wire::open(channel, "/flowstone.v1.Log/Produce", outbound, settings.message_bytes_max).await;
    let mut answers = match call {
        Ok(answers) => answers,
        Err(status) => return Error::from_status(&address, status),
    };
    loop {
        match answers.message::<pb::ProduceResponse>().await {
            Some(Ok(response)) => {
                *answered = true;
                core.answered(link, response);
            }
            Some(Err(status)) => return Error::from_status(&address, status),
            None => return Error::unreachable(format!("the broker at {address} ended the stream")),
        }
    }
}

/// Moments at which partitions must be looked at.
#[derive(Debug, Default)]
struct Timers {
    state: Mutex<TimerState>,
    /// Something earlier than what the driver waits for was added.
    changed: Notify,
}

#[derive(Debug, Default)]
struct TimerState {
    /// Open batches in order of their due time: the linger is the same for all.
    lingering: VecDeque<(Instant, u64, Arc<PartitionQueue>)>,
    /// Waits after refusals: few.
    alarms: Vec<(Instant, Arc<PartitionQueue>)>,
    /// What the driver waits for; `None` while it waits for `changed` alone.
    armed: Option<Instant>,
}

impl Timers {
    fn linger(&self, at: Instant, number: u64, queue: Arc<PartitionQueue>) {
        let mut state = locked(&self.state);
        state.lingering.push_back((at, number, queue));
        self.arm(&mut state, at);
    }

    fn alarm(&self, at: Instant, queue: Arc<PartitionQueue>) {
        let mut state = locked(&self.state);
        if !state.alarms.iter().any(|(known, waiting)| *known == at && Arc::ptr_eq(waiting, &queue)) {
            state.alarms.push((at, queue));
        }
        self.arm(&mut state, at);
    }

    /// There is something whose age must be watched from now on.
    fn touch(&self) {
        let state = locked(&self.state);
        if state.armed.is_none() {
            self.changed.notify_one();
        }
    }

    fn arm(&self, state: &mut TimerState, at: Instant) {
        if state.armed.is_none_or(|armed| at < armed) {
            state.armed = Some(at);
            self.changed.notify_one();
        }
    }

    /// What is due, and sets what the driver waits for next: the earliest of the rest and `latest`.
    fn take_due(&self, now: Instant, latest: Option<Instant>) -> (Vec<Arc<PartitionQueue>>, Option<Instant>) {
        let mut due = Vec::new();
        // Most batches left long before, filled or awaited: the driver need not wake for them. Whether one is still
        // open is asked without the timers' lock, which is the inner one.
        while let Some((at, number, queue)) = self.first_lingering() {
            let open = locked(&queue.state).batches.is_open(number);
            if open && at > now {
                break;
            }
            locked(&self.state).lingering.pop_front();
            if open {
                due.push(queue);
            }
        }
        let mut state = locked(&self.state);
        due.extend(state.alarms.extract_if(.., |(at, _)| *at <= now).map(|(_, queue)| queue));
        let next = state.alarms.iter().map(|(at, _)| *at).chain(state.lingering.front().map(|(at, ..)| *at));
        state.armed = next.chain(latest).min();
        (due, state.armed)
    }

    /// The batch that is due first. Only the driver takes it away.
    fn first_lingering(&self) -> Option<(Instant, u64, Arc<PartitionQueue>)> {
        locked(&self.state).lingering.front().cloned()
    }
}

/// Looks at partitions when time or the metadata calls for it, until the producer stops.
async fn drive(core: Arc<ProducerCore>) {
    let mut changes = core.cluster.changes();
    let sweep_every = (core.batching.delivery_timeout / 8).clamp(Duration::from_millis(5), SWEEP_MAX);
    let mut sweep_at: Option<Instant> = None;
    loop {
        let now = Instant::now();
        if sweep_at.is_some_and(|at| at <= now) {
            core.sweep(now);
            sweep_at = None;
        }
        if sweep_at.is_none() && core.outstanding.load(Ordering::SeqCst) > 0 {
            sweep_at = Some(now + sweep_every);
        }
        let (due, next) = core.timers.take_due(now, sweep_at);
        for queue in due {
            core.dispatch(&queue);
        }
        let wait = async {
            match next {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = wait => {}
            () = core.timers.changed.notified() => {}
            () = changes.changed() => {
                for name in core.refresh() {
                    core.check_missing(name).await;
                }
            }
            () = core.stopped() => break,
        }
    }
    // What was taken in while the end was decided fails.
    for queue in core.all_queues() {
        core.dispatch(&queue);
    }
}
