//! `Produce`: batches in, acknowledgements out, on one stream.
//!
//! ```text
//!   client --messages--> session: check, room --batch--> shard: append, flush, commit
//!      ^                                                   |
//!      +----- answers, as many as there are in one --------+
//! ```
//!
//! One task reads, checks and answers, so a client that does not take its answers is not read from either. Room in the
//! shard (bytes of batches not answered yet) is waited for before the next message is read: the client's HTTP/2 window
//! fills, and it waits in turn. A client that leaves in the middle loses nothing acknowledged: what was handed to the
//! shard goes its way, only its answers have nobody left to take them.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use flowstone_protocol::batch::validate_produced;
use flowstone_protocol::{
    BatchError, BatchHeader, Compression, Error, ErrorCode, Timestamp, TopicPartition, ValidationLimits, pb, rewrite,
};
use flowstone_replication::{Acks, Permit, Produced, Reply};
use futures::stream::FuturesUnordered;
use futures::task::AtomicWaker;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::{Status, Streaming};

use super::{find, now, parse_tp, shutting_down, unreadable};
use crate::metrics::Api;
use crate::node::Node;
use crate::partition::OpenPartition;
use crate::receiving::Held;
use crate::topic_config::{CompressionPolicy, TimestampPolicy, TopicConfig};
use crate::transaction::commands::{Addition, check_id};

/// What a request takes of the shard's room at least: its bookkeeping counts too, or small requests would be unbounded.
pub(crate) const REQUEST_BYTES_MIN: usize = 1 << 10;
/// Compressed batches are checked where they are read as long as they decompress to no more than this; what is larger is
/// checked on a thread of its own, so that other streams go on. A few KiB may decompress to many MiB, so it is what comes
/// out that is bounded, not what is sent.
const CHECK_INLINE_BYTES_MAX: usize = 64 << 10;
/// The call's path.
pub(crate) const PATH: &str = "/flowstone.v1.Log/Produce";
/// Messages taken at one go before others get their turn.
const MESSAGES_PER_TURN: usize = 64;

/// A partition, and whether it is in its transaction now.
type Added = (Arc<OpenPartition>, Result<(), Error>);
type Pending<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Batches that wait until their partition is in their transaction, of one stream; then no more requests are read.
const ADDING_MAX: usize = 1_000;

/// One produce stream: reads requests and yields answers.
pub(crate) struct ProduceSession {
    node: Arc<Node>,
    requests: Streaming<pb::ProduceRequest>,
    /// What was received of a request; given back once its batch has room in its shard.
    held: Held,
    step: Step,
    /// Partitions that are being added to a transaction, with the batches that wait for that, in order.
    adding: HashMap<TopicPartition, Vec<(Checked, Permit)>>,
    /// Batches in `adding`.
    adding_count: usize,
    additions: FuturesUnordered<Pending<Added>>,
    answers: Arc<Answers>,
    drain: Pending<()>,
    /// Set: no more requests are read; once everything is answered, the stream ends so.
    ending: Option<Result<(), Error>>,
}

/// What the session waits for, answers aside.
enum Step {
    /// The next message.
    Read,
    /// A batch being checked on another thread.
    Check(Pending<Result<Checked, Refused>>),
    /// Room in the shard.
    Room(Pending<(Checked, Permit)>),
}

/// A batch that may be appended.
struct Checked {
    /// Of the batch's transaction; empty for a plain batch.
    transactional_id: String,
    request_id: u64,
    received: Instant,
    acks: Acks,
    partition: Arc<OpenPartition>,
    batch: Bytes,
    header: BatchHeader,
}

/// A batch that may not.
struct Refused {
    request_id: u64,
    acks: Acks,
    error: Error,
}

/// Where shards leave answers, from their threads.
#[derive(Debug, Default)]
struct Answers {
    /// Held for one push or one take.
    state: Mutex<AnswersState>,
    session: AtomicWaker,
}

#[derive(Debug, Default)]
struct AnswersState {
    ready: Vec<pb::ProduceResult>,
    /// Handed to shards and not answered; bounded by their room.
    in_flight: usize,
}

impl Answers {
    fn push(&self, result: pb::ProduceResult) {
        self.state.lock().ready.push(result);
    }

    /// The answer to one that was counted in flight.
    fn complete(&self, result: Option<pb::ProduceResult>) {
        let mut state = self.state.lock();
        state.in_flight -= 1;
        state.ready.extend(result);
        drop(state);
        self.session.wake();
    }
}

impl std::fmt::Debug for ProduceSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProduceSession").field("ending", &self.ending).finish_non_exhaustive()
    }
}

impl ProduceSession {
    pub(crate) fn new(node: Arc<Node>, requests: Streaming<pb::ProduceRequest>, held: Held) -> Self {
        let drain = drained(node.drain.clone());
        Self {
            node,
            requests,
            held,
            step: Step::Read,
            adding: HashMap::new(),
            adding_count: 0,
            additions: FuturesUnordered::new(),
            answers: Arc::default(),
            drain,
            ending: None,
        }
    }

    /// Reads and hands on until something has to be waited for.
    fn drive(&mut self, cx: &mut Context<'_>) {
        if self.ending.is_none() && self.drain.as_mut().poll(cx).is_ready() {
            self.ending = Some(Err(shutting_down()));
        }
        let mut turns = 0;
        loop {
            while let Poll::Ready(Some((partition, added))) = self.additions.poll_next_unpin(cx) {
                self.added(&partition, added);
            }
            match &mut self.step {
                Step::Read => {
                    if self.ending.is_some() || self.adding_count >= ADDING_MAX {
                        return;
                    }
                    if turns == MESSAGES_PER_TURN {
                        cx.waker().wake_by_ref();
                        return;
                    }
                    turns += 1;
                    match Pin::new(&mut self.requests).poll_next(cx) {
                        Poll::Pending => return,
                        Poll::Ready(None) => self.ending = Some(Ok(())),
                        Poll::Ready(Some(Err(status))) => {
                            let bytes_max = self.node.config.limits.request_bytes;
                            self.ending = Some(
                                unreadable(&status, "ProduceRequest", "limits.request_bytes", bytes_max)
                                    .map_or(Ok(()), Err),
                            );
                        }
                        Poll::Ready(Some(Ok(request))) => self.take(request),
                    }
                }
                Step::Check(check) => match check.as_mut().poll(cx) {
                    Poll::Pending => return,
                    Poll::Ready(checked) => {
                        self.step = Step::Read;
                        match checked {
                            Ok(checked) => self.admit(checked),
                            Err(refused) => self.refuse(refused),
                        }
                    }
                },
                Step::Room(room) => match room.as_mut().poll(cx) {
                    Poll::Pending => return,
                    Poll::Ready((checked, permit)) => {
                        self.step = Step::Read;
                        self.append(checked, permit);
                    }
                },
            }
        }
    }

    fn take(&mut self, mut request: pb::ProduceRequest) {
        let transactional_id = std::mem::take(&mut request.transactional_id);
        let received = Instant::now();
        self.node.metrics.received(Api::Produce, request.batch.len());
        let request_id = request.request_id;
        let acks = match request.acks() {
            pb::Acks::None => Acks::None,
            pb::Acks::Leader => Acks::Leader,
            pb::Acks::Quorum | pb::Acks::Unspecified => Acks::Quorum,
        };
        let partition = match self.check_target(&request) {
            Ok(partition) => partition,
            Err(error) => return self.refuse(Refused { request_id, acks, error }),
        };
        let rules = Rules::new(&self.node, &partition.config());
        let batch = request.batch;
        let target = Arc::clone(&partition);
        let checked = move |(batch, header)| Checked {
            transactional_id,
            request_id,
            received,
            acks,
            partition: target,
            batch,
            header,
        };
        let node = Arc::clone(&self.node);
        let refused =
            move |error, partition: &OpenPartition| Refused { request_id, acks, error: node.explain(error, partition) };
        match rules.check_inline(&batch) {
            Some(Ok(batch)) => self.admit(checked(batch)),
            Some(Err(error)) => self.refuse(refused(error, &partition)),
            None => {
                let checks = Arc::clone(&self.node.checks);
                self.step = Step::Check(Box::pin(async move {
                    // As many at once as there are cores: each may hold a whole decompressed batch. Never closed.
                    let _turn = checks.acquire_owned().await;
                    match tokio::task::spawn_blocking(move || rules.check(batch)).await {
                        Ok(Ok(batch)) => Ok(checked(batch)),
                        Ok(Err(error)) => Err(refused(error, &partition)),
                        Err(_) => {
                            let error =
                                Error::new(ErrorCode::Internal, "the check of this batch was cut off; send it again");
                            Err(refused(error, &partition))
                        }
                    }
                }));
            }
        }
    }

    fn check_target(&self, request: &pb::ProduceRequest) -> Result<Arc<OpenPartition>, Error> {
        let partition = find(&self.node, parse_tp(&request.topic_id, request.partition)?)?;
        if partition.internal {
            let error = crate::controller::commands::internal_topic(&partition.topic);
            return Err(self.node.explain(error, &partition));
        }
        self.node.room.check().map_err(|error| self.node.explain(error, &partition))?;
        Ok(partition)
    }

    fn admit(&mut self, checked: Checked) {
        if let Err(error) = check_transaction(&checked) {
            let error = self.node.explain(error, &checked.partition);
            return self.refuse(Refused { request_id: checked.request_id, acks: checked.acks, error });
        }
        let bytes = checked.batch.len().max(REQUEST_BYTES_MIN);
        if let Some(permit) = checked.partition.replica.try_reserve(bytes) {
            return self.append(checked, permit);
        }
        let replica = checked.partition.replica.clone();
        self.node.metrics.produce_waits.inc();
        self.step = Step::Room(Box::pin(async move {
            let permit = replica.reserve(bytes).await;
            (checked, permit)
        }));
    }

    /// Appends it, unless its partition has to be added to its transaction first, or others of that partition wait so.
    fn append(&mut self, checked: Checked, permit: Permit) {
        self.held.release();
        let tp = checked.partition.tp;
        if let Some(waiting) = self.adding.get_mut(&tp) {
            waiting.push((checked, permit));
            self.adding_count += 1;
            return;
        }
        let (producer, epoch) = (checked.header.producer_id, checked.header.producer_epoch);
        if checked.transactional_id.is_empty() || checked.partition.added.contains(producer, epoch) {
            return self.append_now(checked, permit);
        }
        let addition = Addition {
            id: checked.transactional_id.as_str().into(),
            producer,
            epoch,
            partition: Some(tp),
            group: None,
        };
        let (node, partition) = (Arc::clone(&self.node), Arc::clone(&checked.partition));
        self.additions.push(Box::pin(async move {
            let added = node.transactions.adder.add(&node, addition).await;
            if added.is_ok() {
                partition.added.insert(producer, epoch);
            }
            (partition, added)
        }));
        self.adding.insert(tp, vec![(checked, permit)]);
        self.adding_count += 1;
    }

    /// The partition is in the transaction of the first batch that waited for that, or cannot be.
    fn added(&mut self, partition: &OpenPartition, added: Result<(), Error>) {
        let waiting = self.adding.remove(&partition.tp).unwrap_or_default();
        self.adding_count -= waiting.len();
        let mut first = None;
        for (checked, permit) in waiting {
            let of = (checked.header.producer_id, checked.header.producer_epoch);
            match &added {
                // Those behind of the same transaction go the same way; others have one of their own to ask for.
                Err(error) if *first.get_or_insert(of) == of => {
                    let error = self.node.explain(error.clone(), &checked.partition);
                    self.node.metrics.refused(Api::Produce, &error);
                    let error = Some(error.to_detail());
                    let request_id = checked.request_id;
                    self.answers.push(pb::ProduceResult { request_id, base_offset: -1, log_append_time: -1, error });
                }
                _ => self.append_again(checked, permit),
            }
        }
    }

    /// As [`Self::append`], of one whose message was released before.
    fn append_again(&mut self, checked: Checked, permit: Permit) {
        let held = std::mem::take(&mut self.held);
        self.append(checked, permit);
        self.held = held;
    }

    fn append_now(&self, checked: Checked, permit: Permit) {
        let Checked { request_id, received, acks, partition, batch, header, .. } = checked;
        self.answers.state.lock().in_flight += 1;
        let answers = Arc::clone(&self.answers);
        let node = Arc::clone(&self.node);
        let replica = partition.replica.clone();
        let reply = Reply::new(move |produced: Result<Produced, Error>| {
            node.metrics.answered(Api::Produce, received, produced.as_ref().err());
            let produced = produced.map_err(|error| node.explain(error, &partition));
            answers.complete((acks != Acks::None).then(|| result(request_id, produced)));
        });
        replica.produce(batch, header, acks, permit, reply);
    }

    fn refuse(&self, refused: Refused) {
        let Refused { request_id, acks, error } = refused;
        self.held.release();
        self.node.metrics.refused(Api::Produce, &error);
        // `acks=none` wants no answer, not even this one.
        if acks != Acks::None {
            let error = Some(error.to_detail());
            self.answers.push(pb::ProduceResult { request_id, base_offset: -1, log_append_time: -1, error });
        }
    }
}

impl Stream for ProduceSession {
    type Item = Result<pb::ProduceResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let session = &mut *self;
        // Before anything is looked at: an answer that comes in between wakes the task again.
        session.answers.session.register(cx.waker());
        session.drive(cx);
        let mut state = session.answers.state.lock();
        if !state.ready.is_empty() {
            let results = std::mem::take(&mut state.ready);
            return Poll::Ready(Some(Ok(pb::ProduceResponse { results })));
        }
        let idle = matches!(session.step, Step::Read) && state.in_flight == 0 && session.adding_count == 0;
        drop(state);
        match &session.ending {
            Some(Ok(())) if idle => Poll::Ready(None),
            Some(Err(error)) if idle => {
                let status = error.to_status();
                session.ending = Some(Ok(()));
                Poll::Ready(Some(Err(status)))
            }
            _ => Poll::Pending,
        }
    }
}

/// Whether what the request says of a transaction and what its batch says agree.
fn check_transaction(checked: &Checked) -> Result<(), Error> {
    let transactional = checked.header.attributes.is_transactional();
    let named = !checked.transactional_id.is_empty();
    if transactional != named {
        let what = if transactional {
            "a transactional batch came without its transactional id: it belongs to no transaction; send both, or a plain batch"
        } else {
            "a plain batch came with a transactional id; mark the batch as transactional, or leave the id out"
        };
        return Err(Error::new(ErrorCode::InvalidTransactionState, what));
    }
    if !transactional {
        return Ok(());
    }
    if checked.acks != Acks::Quorum {
        let what = "a transactional batch is acknowledged by a majority, or it could be lost from what is committed; set \
                    acks to quorum";
        return Err(Error::new(ErrorCode::InvalidRequest, what));
    }
    check_id(&checked.transactional_id)
}

/// Ends when the broker drains.
pub(super) fn drained(mut drain: watch::Receiver<bool>) -> Pending<()> {
    Box::pin(async move {
        // An error means that the broker is gone altogether.
        drop(drain.wait_for(|drains| *drains).await);
    })
}

fn result(request_id: u64, produced: Result<Produced, Error>) -> pb::ProduceResult {
    match produced {
        Ok(produced) => pb::ProduceResult {
            request_id,
            base_offset: produced.base_offset.get(),
            log_append_time: produced.log_append_time.unwrap_or(Timestamp::NONE).get(),
            error: None,
        },
        Err(error) => {
            pb::ProduceResult { request_id, base_offset: -1, log_append_time: -1, error: Some(error.to_detail()) }
        }
    }
}

/// How a batch is checked and, where its topic asks for it, rewritten.
struct Rules {
    limits: ValidationLimits,
    codec: Option<Compression>,
    log_append_time: bool,
}

impl Rules {
    fn new(node: &Node, topic: &TopicConfig) -> Self {
        let limits = ValidationLimits {
            // The topic's own maximum is the replica's to check: a batch that is stored already is answered with its
            // offset, also after that maximum was lowered.
            max_bytes: node.config.batch_bytes_max(),
            max_decompressed_bytes: node.config.limits.decompressed_bytes,
            max_records: i32::try_from(node.config.limits.records_per_batch).unwrap_or(i32::MAX),
            now: now(),
            max_timestamp_ahead: topic.timestamp_ahead_max,
            require_keys: topic.compaction.is_some(),
        };
        let codec = match topic.compression {
            CompressionPolicy::Producer => None,
            CompressionPolicy::Codec(codec) => Some(codec),
        };
        Self { limits, codec, log_append_time: topic.timestamps == TimestampPolicy::LogAppendTime }
    }

    /// The check, as far as it is quick; `None` where it is not.
    fn check_inline(&self, batch: &Bytes) -> Option<Result<(Bytes, BatchHeader), Error>> {
        let sent = BatchHeader::parse(batch).ok().and_then(|header| header.attributes.compression().ok());
        // A header that cannot be read is refused at once.
        let Some(sent) = sent else { return Some(self.check(batch.clone())) };
        if self.codec.is_some_and(|codec| codec != sent) {
            return None;
        }
        if sent == Compression::None {
            return Some(self.check(batch.clone()));
        }
        let bytes_max = CHECK_INLINE_BYTES_MAX.min(self.limits.max_decompressed_bytes);
        let limits = ValidationLimits { max_decompressed_bytes: bytes_max, ..self.limits };
        match validate_produced(batch, &limits) {
            Err(BatchError::DecompressedTooLarge { .. }) if bytes_max < self.limits.max_decompressed_bytes => None,
            Err(error) => Some(Err(error.into())),
            Ok(header) => Some(self.rewritten(batch.clone(), header)),
        }
    }

    fn check(&self, batch: Bytes) -> Result<(Bytes, BatchHeader), Error> {
        let header = validate_produced(&batch, &self.limits)?;
        self.rewritten(batch, header)
    }

    /// The batch as its topic wants it stored.
    fn rewritten(&self, mut batch: Bytes, header: BatchHeader) -> Result<(Bytes, BatchHeader), Error> {
        let mut rewritten = false;
        if let Some(codec) = self.codec
            && header.attributes.compression()? != codec
        {
            batch = rewrite::with_compression(&batch, codec, None, self.limits.max_decompressed_bytes)?;
            rewritten = true;
        }
        if self.log_append_time {
            batch = rewrite::with_log_append_time(&batch, self.limits.now)?;
            rewritten = true;
        }
        if !rewritten {
            return Ok((batch, header));
        }
        let header = BatchHeader::parse(&batch)?;
        Ok((batch, header))
    }
}
