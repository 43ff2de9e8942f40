//! `Fetch`: batches pushed as they are committed, for as long as the client gives credit.
//!
//! ```text
//!   shard --read--> arrivals --CRC--> ready --credit--> client
//!     ^                                 |
//!     +---- next read, one at a time per partition ----+
//! ```
//!
//! A partition is in one of two places: with its shard (a read under way, or parked until something is committed), or in
//! the line of those that want to read and wait for room. A session holds [`READY_BYTES_MAX`] of answers and reads under
//! way, and what parked reads bring on top: those bring the newest bytes, which are the page cache's, not ours. So a
//! client that stops reading costs that much and no more.
//!
//! Nothing is spawned: the response stream itself is the session, and it is polled only while HTTP/2 has room for it.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use flowstone_protocol::{Error, ErrorCode, LeaderEpoch, Offset, pb};
use flowstone_replication::{ReadAnswer, ReadRequest, Reply};
use flowstone_storage::ReadError;
use futures::Stream;
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tonic::{Status, Streaming};

use super::produce::{drained, in_partition};
use super::{find, parse_tp, shutting_down, unreadable};
use crate::metrics::Api;
use crate::node::Node;
use crate::partition::OpenPartition;

/// Bytes of one session's answers that wait for credit and of its reads under way: enough that the next answer is there
/// when the last one has left.
const READY_BYTES_MAX: usize = 1 << 20;
/// Requests taken at one go before answers get their turn.
const REQUESTS_PER_TURN: usize = 64;

/// One fetch stream: reads positions and credit, yields batches.
pub(crate) struct FetchSession {
    node: Arc<Node>,
    requests: Streaming<pb::FetchRequest>,
    drain: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// By the client's fetch id.
    partitions: HashMap<u32, Position>,
    /// Fetch ids that want to read, the one that waits longest first; an id may be stale.
    waiting: VecDeque<u32>,
    arrivals: Arc<Arrivals>,
    /// Checked, in order of arrival, waiting for credit.
    ready: VecDeque<Fetched>,
    ready_bytes: usize,
    /// Upper bound of what reads under way will bring, parked ones aside.
    reading_bytes: usize,
    /// May go below zero by one answer.
    credit: i64,
    /// Names a read, so that what was asked for an older position is told apart.
    reads: u64,
    /// Set: the client sends no more requests, or must not.
    ending: Option<Result<(), Error>>,
    ended: bool,
}

/// One response: `flowstone.v1.FetchResponse` with its batches still in the pieces in which they were read.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) fetch_id: u32,
    pub(crate) session: u32,
    /// Whole batches once put together.
    pub(crate) chunks: Vec<Bytes>,
    /// Of all chunks.
    pub(crate) bytes: usize,
    pub(crate) high_watermark: i64,
    pub(crate) log_start: i64,
    pub(crate) error: Option<pb::ErrorDetail>,
}

/// Where a partition's reader is.
struct Position {
    session: u32,
    partition: Arc<OpenPartition>,
    next: Offset,
    /// What the client saw last, until the first read: from then on, it follows this log.
    last_epoch: Option<LeaderEpoch>,
    read: Option<ReadUnderWay>,
    /// Dropped with the position: a read that is parked for it is then nobody's, and its shard forgets it.
    alive: Arc<()>,
    /// After damage was found: one batch at a time, so that all before it is still delivered.
    one_by_one: bool,
}

#[derive(Clone, Copy)]
struct ReadUnderWay {
    number: u64,
    /// Counted in `reading_bytes`.
    bytes: usize,
    since: Instant,
}

/// Where shards leave what was read, from their threads or their pool's.
#[derive(Debug, Default)]
struct Arrivals {
    /// Held for one push or one take.
    queue: Mutex<Vec<Arrival>>,
    session: AtomicWaker,
}

#[derive(Debug)]
struct Arrival {
    fetch_id: u32,
    number: u64,
    read: Result<ReadAnswer, Error>,
}

impl std::fmt::Debug for FetchSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FetchSession").field("partitions", &self.partitions.len()).finish_non_exhaustive()
    }
}

impl FetchSession {
    pub(crate) fn new(node: Arc<Node>, requests: Streaming<pb::FetchRequest>) -> Self {
        let drain = drained(node.drain.clone());
        Self {
            node,
            requests,
            drain,
            partitions: HashMap::new(),
            waiting: VecDeque::new(),
            arrivals: Arc::default(),
            ready: VecDeque::new(),
            ready_bytes: 0,
            reading_bytes: 0,
            credit: 0,
            reads: 0,
            ending: None,
            ended: false,
        }
    }

    fn take_requests(&mut self, cx: &mut Context<'_>) {
        for _ in 0..REQUESTS_PER_TURN {
            if self.ending.is_some() {
                return;
            }
            match Pin::new(&mut self.requests).poll_next(cx) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok(request))) => {
                    if let Err(error) = self.take(request) {
                        self.ending = Some(Err(error));
                    }
                }
                Poll::Ready(Some(Err(status))) => {
                    let bytes_max = self.node.config.limits.request_bytes;
                    self.ending = Some(unreadable(&status, "FetchRequest", bytes_max).map_or(Ok(()), Err));
                }
                // It only closed its own half: credit that is left is still used up.
                Poll::Ready(None) => self.ending = Some(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
    }

    fn take(&mut self, request: pb::FetchRequest) -> Result<(), Error> {
        for fetch_id in request.remove {
            self.forget(fetch_id);
        }
        for wanted in request.set {
            self.forget(wanted.fetch_id);
            let partitions_max = self.node.config.limits.fetch_partitions;
            if self.partitions.len() >= partitions_max {
                return Err(Error::new(
                    ErrorCode::InvalidRequest,
                    format!(
                        "more than {partitions_max} partitions on one fetch stream (limits.fetch_partitions); open a \
                         second stream for the rest"
                    ),
                ));
            }
            match self.position(&wanted) {
                Ok(position) => {
                    self.partitions.insert(wanted.fetch_id, position);
                    self.waiting.push_back(wanted.fetch_id);
                }
                Err(error) => self.fail(wanted.fetch_id, wanted.session, error),
            }
        }
        // What a client may have under way is bounded here, whatever it asks for.
        let credit_max = i64::try_from(self.node.config.limits.fetch_credit_bytes).unwrap_or(i64::MAX);
        let more = i64::try_from(request.credit_bytes).unwrap_or(i64::MAX);
        self.credit = self.credit.saturating_add(more).min(credit_max);
        Ok(())
    }

    fn position(&self, wanted: &pb::FetchPartition) -> Result<Position, Error> {
        let partition = find(&self.node, parse_tp(&wanted.topic_id, wanted.partition)?)?;
        Ok(Position {
            session: wanted.session,
            partition,
            next: Offset::new(wanted.offset),
            last_epoch: (wanted.last_epoch >= 0).then(|| LeaderEpoch::new(wanted.last_epoch)),
            read: None,
            alive: Arc::default(),
            one_by_one: false,
        })
    }

    /// Drops a position, if there is one, with what was read for it.
    fn forget(&mut self, fetch_id: u32) {
        let known = self.partitions.remove(&fetch_id);
        self.reading_bytes -= known.as_ref().and_then(|old| old.read).map_or(0, |read| read.bytes);
        // One that failed is not known any more, and may still have answers in the line.
        if known.is_some() || self.ready.iter().any(|response| response.error.is_some()) {
            self.ready.retain(|response| response.fetch_id != fetch_id);
            self.ready_bytes = self.ready.iter().map(|response| response.bytes).sum();
        }
    }

    /// Tells the client, behind what was read before, and stops sending this partition.
    fn fail(&mut self, fetch_id: u32, session: u32, error: Error) {
        self.node.metrics.refused(Api::Fetch, &error);
        self.partitions.remove(&fetch_id);
        self.ready.push_back(Fetched {
            fetch_id,
            session,
            chunks: Vec::new(),
            bytes: 0,
            high_watermark: -1,
            log_start: -1,
            error: Some(error.to_detail()),
        });
    }

    fn take_arrivals(&mut self) {
        let arrived = std::mem::take(&mut *self.arrivals.queue.lock());
        for Arrival { fetch_id, number, read } in arrived {
            let Some(position) = self.partitions.get_mut(&fetch_id) else { continue };
            let Some(under_way) = position.read.filter(|read| read.number == number) else { continue };
            position.read = None;
            self.reading_bytes -= under_way.bytes;
            let session = position.session;
            let in_this = |error: Error| in_partition(error, &position.partition);
            let answer = match read {
                Ok(answer) => answer,
                Err(error) => {
                    let error = in_this(error);
                    self.fail(fetch_id, session, error);
                    continue;
                }
            };
            if let Err(damage) = answer.bytes.verify() {
                if position.one_by_one {
                    let error = in_this(corrupt(&damage));
                    self.fail(fetch_id, session, error);
                } else {
                    position.one_by_one = true;
                    self.waiting.push_back(fetch_id);
                }
                continue;
            }
            let bytes = answer.bytes.len();
            if answer.bytes.next > position.next {
                position.next = answer.bytes.next;
                // It told of what the client had read before; the records now on their way are this log's own.
                position.last_epoch = None;
            }
            self.waiting.push_back(fetch_id);
            if bytes == 0 {
                continue;
            }
            self.node.metrics.sent(Api::Fetch, under_way.since, bytes);
            self.ready_bytes += bytes;
            self.ready.push_back(Fetched {
                fetch_id,
                session,
                chunks: answer.bytes.chunks,
                bytes,
                high_watermark: answer.high_watermark.get(),
                log_start: answer.log_start.get(),
                error: None,
            });
        }
    }

    /// Sends reads to the shards, in turn, while there is room for what they bring.
    fn start_reads(&mut self) {
        let response_bytes = self.node.config.limits.fetch_response_bytes;
        while self.credit > 0 && self.ready_bytes + self.reading_bytes < READY_BYTES_MAX {
            let Some(fetch_id) = self.waiting.pop_front() else { return };
            let Some(position) = self.partitions.get_mut(&fetch_id) else { continue };
            if position.read.is_some() {
                continue;
            }
            let max_bytes = if position.one_by_one { 1 } else { response_bytes };
            // A read at the end is parked, for as long as nothing is written: it must not hold up the others.
            let parks = position.next >= position.partition.replica.status().high_watermark;
            let bytes = if parks { 0 } else { max_bytes };
            self.reads += 1;
            let number = self.reads;
            position.read = Some(ReadUnderWay { number, bytes, since: Instant::now() });
            self.reading_bytes += bytes;
            let request = ReadRequest { from: position.next, max_bytes, last_epoch: position.last_epoch, wait: true };
            let arrivals = Arc::downgrade(&self.arrivals);
            let reply = Reply::while_alive(&position.alive, move |read| {
                if let Some(arrivals) = arrivals.upgrade() {
                    arrivals.queue.lock().push(Arrival { fetch_id, number, read });
                    arrivals.session.wake();
                }
            });
            position.partition.replica.read(request, reply);
        }
    }

    /// The next response that the client's credit allows. An error needs none: it only waits for what was read of its own
    /// partition.
    fn next_response(&mut self) -> Option<Fetched> {
        let next = if self.credit > 0 {
            0
        } else {
            let first_of = |fetch_id: u32| self.ready.iter().find(|response| response.fetch_id == fetch_id);
            self.ready.iter().position(|response| {
                response.error.is_some() && first_of(response.fetch_id).is_some_and(|first| first.error.is_some())
            })?
        };
        let response = self.ready.remove(next)?;
        self.ready_bytes -= response.bytes;
        self.credit -= response.bytes as i64;
        Some(response)
    }
}

impl Stream for FetchSession {
    type Item = Result<Fetched, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let session = &mut *self;
        if session.ended {
            return Poll::Ready(None);
        }
        // Before anything is looked at: what comes in between wakes the task again.
        session.arrivals.session.register(cx.waker());
        if session.ending.is_none() && session.drain.as_mut().poll(cx).is_ready() {
            session.ending = Some(Err(shutting_down()));
        }
        session.take_requests(cx);
        session.take_arrivals();
        // Before the answer leaves: the next read goes on meanwhile.
        session.start_reads();
        if let Some(Err(error)) = &session.ending {
            session.ended = true;
            return Poll::Ready(Some(Err(error.to_status())));
        }
        if let Some(response) = session.next_response() {
            // Room has come free.
            session.start_reads();
            return Poll::Ready(Some(Ok(response)));
        }
        if session.ending.is_some() && session.credit <= 0 {
            session.ended = true;
            return Poll::Ready(None);
        }
        Poll::Pending
    }
}

/// What a reader is told of bytes that are not what was written.
fn corrupt(damage: &ReadError) -> Error {
    Error::new(
        ErrorCode::CorruptLog,
        format!(
            "{damage}; restore that file from a backup or another replica, or read on behind it: other partitions, and \
             offsets after the damage, are not touched by it"
        ),
    )
}
