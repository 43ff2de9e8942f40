//! `Fetch`: batches pushed as they are committed, for as long as the client gives credit.
//!
//! ```text
//!   shard --read--> arrivals --CRC--> ready --credit--> client
//!     ^                                 |
//!     +---- next read, one at a time per partition ----+
//! ```
//!
//! A partition is in one of two places: with its shard (a read under way, or parked until something is committed), or in
//! the line of those that want to read and wait for room. Reads that find something at once are started only while
//! [`READY_BYTES_MAX`] is not used up; reads that were parked may bring more than that all at once, and what they bring
//! past [`ARRIVED_BYTES_MAX`] is dropped and read again later. So a client that stops reading costs that much, one batch
//! and some bytes per partition, whatever the number of its partitions.
//!
//! Nothing is spawned: the response stream itself is the session, and it is polled only while HTTP/2 has room for it.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use flowstone_protocol::{Error, ErrorCode, LeaderEpoch, Offset, TopicPartition, pb};
use flowstone_replication::{ReadAnswer, ReadRequest, Reply};
use flowstone_storage::ReadError;
use futures::Stream;
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tonic::{Status, Streaming};

use super::produce::drained;
use super::{find, parse_tp, shutting_down, unreadable};
use crate::metrics::Api;
use crate::node::Node;
use crate::partition::OpenPartition;
use crate::receiving::Held;

/// Bytes of one session's answers that wait for credit and of its reads under way: enough that the next answer is there
/// when the last one has left.
const READY_BYTES_MAX: usize = 1 << 20;
/// Bytes of answers that wait, those of reads that were parked included.
const ARRIVED_BYTES_MAX: usize = 4 << 20;
/// Requests taken at one go before answers get their turn.
const REQUESTS_PER_TURN: usize = 64;
/// Stale entries that a line may hold besides one for each partition, before it is swept.
const STALE_MAX: usize = 64;

/// One fetch stream: reads positions and credit, yields batches.
pub(crate) struct FetchSession {
    node: Arc<Node>,
    requests: Streaming<pb::FetchRequest>,
    /// What was received of a request; given back with each that was taken.
    held: Held,
    drain: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// By the client's fetch id. Together with `failed` never more than `limits.fetch_partitions`.
    positions: HashMap<u32, Position>,
    /// Which fetch id reads a partition: one per stream.
    readers: HashMap<TopicPartition, u32>,
    /// Positions that ended in an error which was not sent yet, by fetch id.
    failed: HashMap<u32, Generation>,
    /// Positions that want to read, the one that waits longest first; some may be stale.
    waiting: VecDeque<(u32, Generation)>,
    arrivals: Arc<Arrivals>,
    /// Checked, in order of arrival, waiting for credit; some may be stale.
    ready: VecDeque<Ready>,
    ready_bytes: usize,
    /// Errors of positions that have nothing in `ready`: they wait for nothing. Some may be stale.
    errors: VecDeque<Ready>,
    /// Upper bound of what reads under way will bring, parked ones aside.
    reading_bytes: usize,
    /// May go below zero by one answer.
    credit: i64,
    /// Counts positions and reads, so that what belongs to an older one is told apart.
    count: u64,
    /// Set: the client sends no more requests, or must not.
    ending: Option<Result<(), Error>>,
    ended: bool,
}

/// One position that was set; a later one for the same fetch id is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Generation(u64);

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
    pub(crate) last_stable_offset: i64,
    pub(crate) log_start: i64,
    pub(crate) aborted: Vec<pb::AbortedTransaction>,
    pub(crate) error: Option<pb::ErrorDetail>,
}

/// A response that waits.
struct Ready {
    generation: Generation,
    fetched: Fetched,
}

/// Where a partition's reader is.
struct Position {
    generation: Generation,
    session: u32,
    partition: Arc<OpenPartition>,
    next: Offset,
    /// What the client saw last, until the first read: from then on, it follows this log.
    last_epoch: Option<LeaderEpoch>,
    read: Option<ReadUnderWay>,
    /// Responses of it in `ready`.
    in_line: usize,
    /// Any replica will do.
    any_replica: bool,
    /// Only what is committed of transactions.
    committed: bool,
    /// The highest high watermark that the client was told, here or elsewhere.
    known_high_watermark: Option<Offset>,
    /// Dropped with the position: a read that is parked for it is then nobody's, and its shard forgets it.
    alive: Arc<()>,
    /// After damage was found: one batch at a time, so that all before it is still delivered.
    one_by_one: bool,
}

#[derive(Clone, Copy)]
struct ReadUnderWay {
    number: u64,
    /// Counted in `reading_bytes`; 0 for one that is parked.
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
        f.debug_struct("FetchSession").field("positions", &self.positions.len()).finish_non_exhaustive()
    }
}

impl FetchSession {
    pub(crate) fn new(node: Arc<Node>, requests: Streaming<pb::FetchRequest>, held: Held) -> Self {
        let drain = drained(node.drain.clone());
        Self {
            node,
            requests,
            held,
            drain,
            positions: HashMap::new(),
            readers: HashMap::new(),
            failed: HashMap::new(),
            waiting: VecDeque::new(),
            arrivals: Arc::default(),
            ready: VecDeque::new(),
            ready_bytes: 0,
            errors: VecDeque::new(),
            reading_bytes: 0,
            credit: 0,
            count: 0,
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
                    self.held.release();
                }
                Poll::Ready(Some(Err(status))) => {
                    let bytes_max = self.node.config.limits.admin_request_bytes;
                    let error = unreadable(&status, "FetchRequest", "limits.admin_request_bytes", bytes_max);
                    self.ending = Some(error.map_or(Ok(()), Err));
                }
                // It only closed its own half: credit that is left is still used up.
                Poll::Ready(None) => self.ending = Some(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
    }

    fn take(&mut self, request: pb::FetchRequest) -> Result<(), Error> {
        let partitions_max = self.node.config.limits.fetch_partitions;
        let too_many = || {
            Error::new(
                ErrorCode::InvalidRequest,
                format!(
                    "more than {partitions_max} partitions on one fetch stream (limits.fetch_partitions); open a second \
                     stream for the rest"
                ),
            )
        };
        if request.set.len().max(request.remove.len()) > partitions_max {
            return Err(too_many());
        }
        for fetch_id in request.remove {
            self.forget(fetch_id);
        }
        for wanted in request.set {
            self.forget(wanted.fetch_id);
            if self.positions.len() + self.failed.len() >= partitions_max {
                return Err(too_many());
            }
            let generation = self.next_generation();
            match self.position(&wanted, generation) {
                Ok(position) => {
                    self.readers.insert(position.partition.tp, wanted.fetch_id);
                    self.positions.insert(wanted.fetch_id, position);
                    self.wait(wanted.fetch_id, generation);
                }
                Err(error) => self.fail(wanted.fetch_id, wanted.session, generation, 0, error),
            }
        }
        // Credit is the client's own bound; what a session holds is bounded without it.
        let more = i64::try_from(request.credit_bytes).unwrap_or(i64::MAX);
        self.credit = self.credit.saturating_add(more);
        Ok(())
    }

    fn next_generation(&mut self) -> Generation {
        self.count += 1;
        Generation(self.count)
    }

    fn position(&self, wanted: &pb::FetchPartition, generation: Generation) -> Result<Position, Error> {
        let partition = find(&self.node, parse_tp(&wanted.topic_id, wanted.partition)?)?;
        if let Some(reader) = self.readers.get(&partition.tp) {
            let error = Error::new(
                ErrorCode::InvalidRequest,
                format!(
                    "fetch_id {reader} reads this partition on the same stream; set that one, or open a second stream"
                ),
            );
            return Err(self.node.explain(error, &partition));
        }
        let committed = match pb::IsolationLevel::try_from(wanted.isolation) {
            Ok(pb::IsolationLevel::Unspecified | pb::IsolationLevel::ReadUncommitted) => false,
            Ok(pb::IsolationLevel::ReadCommitted) => true,
            Err(_) => {
                let error = Error::new(
                    ErrorCode::InvalidRequest,
                    format!(
                        "isolation level {} is not known: read_uncommitted is 1, read_committed 2; upgrade the broker if \
                         there are more by now",
                        wanted.isolation
                    ),
                );
                return Err(self.node.explain(error, &partition));
            }
        };
        Ok(Position {
            committed,
            generation,
            session: wanted.session,
            partition,
            next: Offset::new(wanted.offset),
            last_epoch: (wanted.last_epoch >= 0).then(|| LeaderEpoch::new(wanted.last_epoch)),
            read: None,
            in_line: 0,
            any_replica: wanted.from_any_replica,
            known_high_watermark: (wanted.from_any_replica && wanted.known_high_watermark > 0)
                .then(|| Offset::new(wanted.known_high_watermark)),
            alive: Arc::default(),
            one_by_one: false,
        })
    }

    /// Drops a position, if there is one. What was read for it is stale from now on.
    fn forget(&mut self, fetch_id: u32) -> Option<Position> {
        self.failed.remove(&fetch_id);
        let old = self.positions.remove(&fetch_id)?;
        self.reading_bytes -= old.read.map_or(0, |read| read.bytes);
        self.readers.remove(&old.partition.tp);
        Some(old)
    }

    /// Puts a position into the line of those that want to read.
    fn wait(&mut self, fetch_id: u32, generation: Generation) {
        if self.waiting.len() > 2 * self.positions.len() + STALE_MAX {
            let positions = &self.positions;
            let stays = |id: &u32, generation: &Generation| {
                positions.get(id).is_some_and(|position| position.generation == *generation && position.read.is_none())
            };
            self.waiting.retain(|(id, generation)| stays(id, generation));
        }
        self.waiting.push_back((fetch_id, generation));
    }

    /// Tells the client, behind what was read before, and stops sending this partition.
    fn fail(&mut self, fetch_id: u32, session: u32, generation: Generation, in_line: usize, error: Error) {
        self.node.metrics.refused(Api::Fetch, &error);
        self.forget(fetch_id);
        self.failed.insert(fetch_id, generation);
        let fetched = Fetched {
            fetch_id,
            session,
            chunks: Vec::new(),
            bytes: 0,
            high_watermark: -1,
            last_stable_offset: -1,
            log_start: -1,
            aborted: Vec::new(),
            error: Some(error.to_detail()),
        };
        let error = Ready { generation, fetched };
        if in_line > 0 {
            self.ready.push_back(error);
            return;
        }
        if self.errors.len() > 2 * self.failed.len() + STALE_MAX {
            let failed = &self.failed;
            self.errors.retain(|error| failed.get(&error.fetched.fetch_id) == Some(&error.generation));
        }
        self.errors.push_back(error);
    }

    fn take_arrivals(&mut self) {
        let arrived = std::mem::take(&mut *self.arrivals.queue.lock());
        for Arrival { fetch_id, number, read } in arrived {
            let Some(position) = self.positions.get_mut(&fetch_id) else { continue };
            let Some(under_way) = position.read.filter(|read| read.number == number) else { continue };
            position.read = None;
            self.reading_bytes -= under_way.bytes;
            let (session, generation, in_line) = (position.session, position.generation, position.in_line);
            let answer = match read {
                Ok(answer) => answer,
                Err(error) => {
                    let error = self.node.explain(error, &position.partition);
                    self.fail(fetch_id, session, generation, in_line, error);
                    continue;
                }
            };
            if self.ready_bytes > ARRIVED_BYTES_MAX {
                // Many that were parked came at once: it is read again when there is room.
                self.wait(fetch_id, generation);
                continue;
            }
            if let Err(damage) = answer.bytes.verify() {
                let has_peers = position.partition.has_peers();
                if let (true, ReadError::Corrupt { offset, .. }) = (has_peers, &damage) {
                    position.partition.replica.found_corrupt(*offset);
                }
                if position.one_by_one {
                    let error = if has_peers { being_repaired(&damage) } else { corrupt(&damage) };
                    let error = self.node.explain(error, &position.partition);
                    self.fail(fetch_id, session, generation, in_line, error);
                } else {
                    position.one_by_one = true;
                    self.wait(fetch_id, generation);
                }
                continue;
            }
            let bytes = answer.bytes.len();
            if position.any_replica {
                position.known_high_watermark = position.known_high_watermark.max(Some(answer.high_watermark));
            }
            if answer.bytes.next > position.next {
                position.next = answer.bytes.next;
                // It told of what the client had read before; the records now on their way are this log's own.
                position.last_epoch = None;
            }
            if bytes > 0 {
                position.in_line += 1;
                // Waiting for something to be written is no latency.
                let since = (under_way.bytes > 0).then_some(under_way.since);
                self.node.metrics.sent(Api::Fetch, since, bytes);
                self.ready_bytes += bytes;
                let fetched = Fetched {
                    fetch_id,
                    session,
                    chunks: answer.bytes.chunks,
                    bytes,
                    high_watermark: answer.high_watermark.get(),
                    last_stable_offset: answer.last_stable_offset.get(),
                    log_start: answer.log_start.get(),
                    aborted: answer
                        .aborted
                        .into_iter()
                        .map(|(producer, first)| pb::AbortedTransaction {
                            producer_id: producer.get(),
                            first_offset: first.get(),
                        })
                        .collect(),
                    error: None,
                };
                self.ready.push_back(Ready { generation, fetched });
            }
            self.wait(fetch_id, generation);
        }
    }

    /// Sends reads to the shards, in turn, while there is room for what they bring.
    fn start_reads(&mut self) {
        let response_bytes = self.node.config.limits.fetch_response_bytes;
        while self.credit > 0 && self.ready_bytes + self.reading_bytes < READY_BYTES_MAX {
            let Some((fetch_id, generation)) = self.waiting.pop_front() else { return };
            let Some(position) = self.positions.get_mut(&fetch_id) else { continue };
            if position.read.is_some() || position.generation != generation {
                continue;
            }
            let max_bytes = if position.one_by_one { 1 } else { response_bytes };
            // A read at the end is parked, for as long as nothing is written: it must not hold up the others.
            let status = position.partition.replica.status();
            let readable = if position.committed { status.last_stable_offset } else { status.high_watermark };
            let parks = position.next >= readable;
            let bytes = if parks { 0 } else { max_bytes };
            self.count += 1;
            let number = self.count;
            position.read = Some(ReadUnderWay { number, bytes, since: Instant::now() });
            self.reading_bytes += bytes;
            let request = ReadRequest {
                from: position.next,
                max_bytes,
                last_epoch: position.last_epoch,
                wait: true,
                any_replica: position.any_replica,
                known_high_watermark: position.known_high_watermark,
                committed: position.committed,
            };
            let arrivals = Arc::downgrade(&self.arrivals);
            let parked = parks.then(|| self.node.metrics.read_parks());
            let reply = Reply::while_alive(&position.alive, move |read| {
                drop(parked);
                if let Some(arrivals) = arrivals.upgrade() {
                    arrivals.queue.lock().push(Arrival { fetch_id, number, read });
                    arrivals.session.wake();
                }
            });
            position.partition.replica.read(request, reply);
        }
    }

    /// The next response that the client's credit allows. An error needs none: it only waits for what was read of its own
    /// partition before.
    fn next_response(&mut self) -> Option<Fetched> {
        while let Some(Ready { generation, fetched }) = self.errors.pop_front() {
            if self.failed.get(&fetched.fetch_id) == Some(&generation) {
                self.failed.remove(&fetched.fetch_id);
                return Some(fetched);
            }
        }
        while let Some(Ready { generation, fetched }) = self.ready.front() {
            let position = self.positions.get_mut(&fetched.fetch_id).filter(|at| at.generation == *generation);
            let failed = self.failed.get(&fetched.fetch_id) == Some(generation);
            let stale = position.is_none() && !failed;
            if !stale && fetched.error.is_none() && self.credit <= 0 {
                return None;
            }
            if let Some(position) = position {
                position.in_line -= 1;
            }
            let Ready { fetched, .. } = self.ready.pop_front()?;
            self.ready_bytes -= fetched.bytes;
            if stale {
                continue;
            }
            if fetched.error.is_some() {
                self.failed.remove(&fetched.fetch_id);
            }
            self.credit -= fetched.bytes as i64;
            return Some(fetched);
        }
        None
    }

    /// After the client closed its half: whether nothing can come any more.
    fn is_done(&self) -> bool {
        self.credit <= 0 || (self.positions.is_empty() && self.ready.is_empty())
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
        if !matches!(session.ending, Some(Err(_))) && session.drain.as_mut().poll(cx).is_ready() {
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
        // Stale answers may have gone, and left room.
        session.start_reads();
        if session.ending.is_some() && session.is_done() {
            session.ended = true;
            return Poll::Ready(None);
        }
        Poll::Pending
    }
}

/// What a reader is told of bytes that are not what was written, and that another replica has as they were.
fn being_repaired(damage: &ReadError) -> Error {
    let message = format!("{damage}; it is being repaired from another replica: try again in a moment");
    Error::new(ErrorCode::StorageFailed, message)
}

/// What a reader is told of bytes that are not what was written, where there is no other replica.
fn corrupt(damage: &ReadError) -> Error {
    Error::new(
        ErrorCode::CorruptLog,
        format!(
            "{damage}; restore that file from a backup or another replica, or read on behind it: other partitions, and \
             offsets after the damage, are not touched by it"
        ),
    )
}
