//! The batches of one partition, from the first record to the acknowledgement: which may go now, in which order, under
//! which sequence numbers. Pure: time is an argument, and what is to be sent or told is returned.
//!
//! ```text
//!   sent, oldest first                         ready               open
//! | in flight | in flight | unsent, again | sealed | sealed | takes records |
//!   have sequence numbers                      have none yet
//! ```
//!
//! What keeps the order, whatever is retried:
//! - At most `in_flight_max` batches are sent and not answered.
//! - After a failure nothing is sent until all answers under way are in; then what is left goes again, oldest first,
//!   under its old sequence numbers, before anything new. The broker knows a batch that it has already.
//! - A batch that failed for good leaves a hole in the sequence. Once nothing of the old sequence can still turn out to
//!   be stored, the producer's epoch is raised and the rest is numbered anew from zero ([`PartitionBatches::renew`]).

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::{
    BatchHeader, Compression, HEADER_BYTES, ProducerEpoch, ProducerId, RecordBatchBuilder, Sequence, Timestamp, rewrite,
};

use crate::error::{Error, ErrorCode};
use crate::producer::ack::{Delivery, Outcome};
use crate::producer::sender::PartitionQueue;
use crate::record::Record;
use crate::retry::BackoffPolicy;

/// A batch takes room for this much at a time, so that the buffer's counter is not touched for every record.
const ROOM_STEP_BYTES: usize = 16 << 10;

/// How batches are made.
#[derive(Clone, Debug)]
pub(crate) struct BatchSettings {
    pub(crate) batch_bytes: usize,
    pub(crate) linger: Duration,
    pub(crate) compression: Compression,
    pub(crate) compression_level: Option<i32>,
    pub(crate) delivery_timeout: Duration,
    pub(crate) in_flight_max: usize,
    pub(crate) idempotent: bool,
    /// Whether the broker answers (not with `acks=none`).
    pub(crate) answered: bool,
    /// Batches belong to a transaction, which has one identity and sequence from its first to its last batch: what fails
    /// for good fails the transaction, and nothing is numbered anew before [`PartitionBatches::begin_transaction`].
    pub(crate) transactional: bool,
}

/// Who the broker takes us for, in this partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) producer_id: ProducerId,
    pub(crate) epoch: ProducerEpoch,
}

/// What all stages of a batch carry along.
#[derive(Debug)]
pub(crate) struct Batch {
    number: u64,
    pub(crate) delivery: Arc<Delivery>,
    created: Instant,
    /// Bytes of the producer's buffer that it holds.
    pub(crate) room: usize,
    pub(crate) records: i32,
}

/// A batch and its records, not yet in their final form.
#[derive(Debug)]
pub(crate) struct Unbuilt {
    batch: Batch,
    builder: RecordBatchBuilder,
}

/// A batch in its final form.
#[derive(Debug)]
pub(crate) struct Built {
    batch: Batch,
    bytes: Bytes,
}

impl Unbuilt {
    /// Compresses and seals it: the costly part, done without any lock.
    pub(crate) fn build(self) -> Built {
        let records = self.builder.record_count();
        Built { batch: Batch { records, ..self.batch }, bytes: self.builder.build() }
    }

    fn unsent(self) -> Batch {
        Batch { records: self.builder.record_count(), ..self.batch }
    }
}

#[derive(Debug)]
struct Sent {
    batch: Batch,
    bytes: Bytes,
    state: SentState,
    /// Known not to be stored: never sent, or refused in a way that excludes it. Not the same as `!maybe_stored`: an
    /// attempt that is under way is neither.
    absent: bool,
    /// Some attempt may have been stored without our hearing of it.
    maybe_stored: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SentState {
    /// Under way, under this request id.
    InFlight(u64),
    /// To be sent (again).
    Unsent,
}

/// What may be done next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Nothing, until something happens.
    Idle,
    /// Nothing before this moment.
    At(Instant),
    /// This batch goes out now; [`PartitionBatches::sent`] tells that it did.
    Send { number: u64, bytes: Bytes },
    /// This batch is to be built, and given back to [`PartitionBatches::built`].
    Build(Box<Unbuilt>),
    /// The epochs of this producer id are used up: [`PartitionBatches::set_identity`] with a new one.
    NewProducerId,
}

/// A record's place, and what its arrival calls for.
#[derive(Debug)]
pub(crate) struct Added {
    pub(crate) delivery: Arc<Delivery>,
    pub(crate) index: i32,
    /// A batch was begun: its number, and when it is due.
    pub(crate) opened: Option<(u64, Instant)>,
    /// A batch was closed because it is full.
    pub(crate) sealed: bool,
}

/// Batches that ended, to be told outside of the lock.
pub(crate) type Ended = Vec<(Batch, Outcome)>;

#[derive(Debug)]
pub(crate) struct PartitionBatches {
    settings: Arc<BatchSettings>,
    topic: Arc<str>,
    partition: i32,
    queue: Weak<PartitionQueue>,
    open: Option<Unbuilt>,
    ready: VecDeque<Unbuilt>,
    sent: VecDeque<Sent>,
    /// Someone builds this batch without the lock: no other may be begun, lest they change places.
    building: Option<Arc<Delivery>>,
    /// Everything was failed, with this: a batch that is being built just then fails as soon as it comes back.
    closed: Option<Error>,
    /// After a failure: answers under way are awaited before anything is sent.
    draining: bool,
    /// The sequence has a hole: nothing new under this identity.
    renew: bool,
    /// This producer id is of no use any more.
    id_spent: bool,
    /// The broker may know this identity: something of it is, or may be, stored.
    known: bool,
    identity: Option<Identity>,
    next_sequence: Sequence,
    retry_at: Option<Instant>,
    failures: u32,
    last_error: Option<Error>,
    next_number: u64,
    /// Size of the last full batch: what the next one's buffer begins with.
    last_bytes: usize,
}

impl PartitionBatches {
    pub(crate) fn new(
        settings: Arc<BatchSettings>,
        topic: Arc<str>,
        partition: i32,
        queue: Weak<PartitionQueue>,
        identity: Option<Identity>,
    ) -> Self {
        Self {
            settings,
            topic,
            partition,
            queue,
            open: None,
            ready: VecDeque::new(),
            sent: VecDeque::new(),
            building: None,
            closed: None,
            draining: false,
            renew: false,
            id_spent: false,
            known: false,
            identity,
            next_sequence: Sequence::new(0),
            retry_at: None,
            failures: 0,
            last_error: None,
            next_number: 0,
            last_bytes: 0,
        }
    }

    /// Encodes a record into the open batch; `None` where `take_room` refuses the bytes that it needs.
    ///
    /// `credit` is room that the caller holds already; what is used of it is taken out.
    pub(crate) fn append(
        &mut self,
        record: &Record<'_>,
        timestamp: i64,
        credit: &mut usize,
        now: impl FnOnce() -> Instant,
        take_room: impl Fn(usize) -> bool,
    ) -> Result<Option<Added>, Error> {
        let bytes = record.bytes_max();
        let mut sealed = false;
        if self.open.as_ref().is_some_and(|open| open.builder.estimated_bytes() + bytes > self.settings.batch_bytes) {
            self.seal_open();
            sealed = true;
        }
        let used = self.open.as_ref().map_or(HEADER_BYTES, |open| open.builder.estimated_bytes());
        let room = self.open.as_ref().map_or(0, |open| open.batch.room);
        let more = (used + bytes).saturating_sub(room);
        let granted = if more == 0 {
            0
        } else if *credit >= more {
            std::mem::take(credit)
        } else if more < ROOM_STEP_BYTES && self.last_bytes > ROOM_STEP_BYTES && take_room(ROOM_STEP_BYTES) {
            ROOM_STEP_BYTES
        } else if take_room(more) {
            more
        } else {
            return Ok(None);
        };
        let mut opened = None;
        if self.open.is_none() {
            let batch = self.new_batch(now());
            opened = Some((batch.number, batch.created + self.settings.linger));
            let capacity = self.last_bytes.min(self.settings.batch_bytes).max(HEADER_BYTES + bytes);
            let builder = RecordBatchBuilder::with_capacity(self.settings.compression, capacity)
                .level(self.settings.compression_level);
            let builder = if self.settings.transactional { builder.transactional() } else { builder };
            self.open = Some(Unbuilt { batch, builder });
        }
        let Some(open) = &mut self.open else { return Ok(None) };
        open.batch.room += granted;
        let headers = record.headers.iter().map(|(key, value)| (key.as_bytes().unwrap_or_default(), value.as_bytes()));
        let appended =
            open.builder.append(Timestamp::new(timestamp), record.key_bytes(), record.value_bytes(), headers);
        if let Err(error) = appended {
            // Nothing was added. Only a batch beyond 2 GiB can do this, which the record's limit excludes.
            return Err(Error::from(flowstone_protocol::Error::from(error)).at(&self.topic, self.partition));
        }
        let added =
            Added { delivery: open.batch.delivery.clone(), index: open.builder.record_count() - 1, opened, sealed };
        // The next record is likely as large as this one: a batch without room for it need not wait for it.
        if open.builder.estimated_bytes() + bytes > self.settings.batch_bytes {
            self.seal_open();
            return Ok(Some(Added { sealed: true, ..added }));
        }
        Ok(Some(added))
    }

    fn new_batch(&mut self, now: Instant) -> Batch {
        let number = self.next_number;
        self.next_number += 1;
        let delivery = Delivery::new(self.topic.clone(), self.partition, self.queue.clone());
        Batch { number, delivery, created: now, room: 0, records: 0 }
    }

    fn seal_open(&mut self) {
        if let Some(open) = self.open.take() {
            self.last_bytes = open.builder.estimated_bytes();
            self.ready.push_back(open);
        }
    }

    /// Whether the open batch is this one.
    pub(crate) fn is_open(&self, number: u64) -> bool {
        self.open.as_ref().is_some_and(|open| open.batch.number == number)
    }

    /// Whether a batch is being filled.
    pub(crate) fn has_open(&self) -> bool {
        self.open.is_some()
    }

    /// Whether anything waits to be sent or answered.
    pub(crate) fn is_idle(&self) -> bool {
        self.open.is_none() && self.ready.is_empty() && self.sent.is_empty() && self.building.is_none()
    }

    /// What all batches that are not ended will be told through.
    pub(crate) fn deliveries(&self) -> impl Iterator<Item = &Arc<Delivery>> {
        let sent = self.sent.iter().map(|sent| &sent.batch.delivery);
        let waiting = self.ready.iter().chain(&self.open).map(|unbuilt| &unbuilt.batch.delivery);
        sent.chain(&self.building).chain(waiting)
    }

    /// What may be done next.
    pub(crate) fn next(&mut self, now: Instant) -> Next {
        if self.building.is_some() {
            return Next::Idle;
        }
        let in_flight = self.in_flight();
        if self.draining {
            if in_flight > 0 {
                return Next::Idle;
            }
            self.draining = false;
        }
        let can_renew = self.renew && in_flight == 0 && self.sent.front().is_none_or(|front| front.absent);
        if can_renew && !self.renew() {
            return Next::NewProducerId;
        }
        if let Some(unsent) = self.sent.iter().find(|sent| sent.state == SentState::Unsent) {
            if let Some(at) = self.retry_at.filter(|at| *at > now) {
                return Next::At(at);
            }
            if in_flight >= self.settings.in_flight_max {
                return Next::Idle;
            }
            return Next::Send { number: unsent.batch.number, bytes: unsent.bytes.clone() };
        }
        if self.renew || in_flight >= self.settings.in_flight_max {
            return Next::Idle;
        }
        if self.ready.is_empty() && self.open.as_ref().is_some_and(|open| self.is_due(open, now)) {
            self.seal_open();
        }
        let Some(mut unbuilt) = self.ready.pop_front() else { return Next::Idle };
        if let Some(identity) = self.identity {
            unbuilt.builder.set_producer(identity.producer_id, identity.epoch, self.next_sequence);
            self.next_sequence = self.next_sequence.plus(unbuilt.builder.record_count());
        }
        self.building = Some(unbuilt.batch.delivery.clone());
        Next::Build(Box::new(unbuilt))
    }

    fn is_due(&self, open: &Unbuilt, now: Instant) -> bool {
        open.batch.delivery.is_wanted() || now.saturating_duration_since(open.batch.created) >= self.settings.linger
    }

    fn in_flight(&self) -> usize {
        self.sent.iter().filter(|sent| sent.state != SentState::Unsent).count()
    }

    /// A batch from [`Next::Build`] is done; it is sent next, unless everything was failed meanwhile.
    pub(crate) fn built(&mut self, built: Built) -> Ended {
        self.building = None;
        let Built { batch, bytes } = built;
        if let Some(error) = &self.closed {
            return vec![(batch, Outcome::Failed(error.clone()))];
        }
        self.sent.push_back(Sent { batch, bytes, state: SentState::Unsent, absent: true, maybe_stored: false });
        Vec::new()
    }

    /// A batch from [`Next::Send`] went out under this request id. Without answers to come it is handed back: its
    /// end is known as soon as it has left.
    pub(crate) fn sent(&mut self, number: u64, request_id: u64) -> Option<Batch> {
        let at = self.sent.iter().position(|sent| sent.batch.number == number && sent.state == SentState::Unsent)?;
        if !self.settings.answered {
            return self.sent.remove(at).map(|sent| sent.batch);
        }
        self.sent[at].state = SentState::InFlight(request_id);
        self.sent[at].absent = false;
        None
    }

    /// The broker answered a request: base offset and append time, or why not.
    pub(crate) fn answered(
        &mut self,
        request_id: u64,
        answer: Result<(i64, Option<i64>), Error>,
        now: Instant,
        chance: f64,
    ) -> Ended {
        let Some(at) = self.sent.iter().position(|sent| sent.state == SentState::InFlight(request_id)) else {
            // It was given up before; its answer comes too late to count.
            return Vec::new();
        };
        let error = match answer {
            Ok((base_offset, log_append_time)) => {
                self.failures = 0;
                self.retry_at = None;
                self.known = true;
                return self.end(at, Outcome::Stored { base_offset, log_append_time });
            }
            Err(error) => error.at(&self.topic, self.partition),
        };
        let sent = &mut self.sent[at];
        match error.code() {
            ErrorCode::OutOfOrderSequence
            | ErrorCode::UnknownProducer
            | ErrorCode::ProducerExpired
            | ErrorCode::ProducerFenced
                if self.settings.transactional && (at == 0 || error.code() == ErrorCode::ProducerFenced) =>
            {
                self.end(at, Outcome::Failed(error))
            }
            ErrorCode::DuplicateSequence if self.settings.idempotent => {
                self.end(at, Outcome::Stored { base_offset: -1, log_append_time: None })
            }
            // It came after one that the broker has not: it follows that one again.
            ErrorCode::OutOfOrderSequence | ErrorCode::UnknownProducer | ErrorCode::ProducerExpired
                if self.settings.idempotent && at > 0 =>
            {
                sent.state = SentState::Unsent;
                // A gap tells that it is not stored. A producer that was forgotten may have stored it before.
                sent.absent =
                    error.code() == ErrorCode::OutOfOrderSequence || !(sent.maybe_stored && self.known);
                self.draining = true;
                Vec::new()
            }
            // The broker lost what came before it, or forgot this producer. What may be stored must not be sent under
            // another number; what is not, may.
            ErrorCode::OutOfOrderSequence
            | ErrorCode::UnknownProducer
            | ErrorCode::ProducerExpired
            | ErrorCode::ProducerFenced
                if self.settings.idempotent =>
            {
                let code = error.code();
                self.id_spent |= code == ErrorCode::ProducerFenced;
                // What the broker never knew it cannot have forgotten: then nothing behind a failed first is stored.
                if code != ErrorCode::OutOfOrderSequence && sent.maybe_stored && self.known {
                    self.renew = true;
                    return self.end(at, Outcome::Failed(error));
                }
                sent.state = SentState::Unsent;
                sent.absent = true;
                self.draining = true;
                // Behind a batch that failed for good, this was to be expected.
                if !self.renew {
                    tracing::warn!(topic = %self.topic, partition = self.partition, %error, "sequence begins anew");
                    self.renew = true;
                    self.failed(error, now, chance);
                }
                Vec::new()
            }
            ErrorCode::BatchTooLarge
            | ErrorCode::MessageTooLarge
            | ErrorCode::InvalidRecord
            | ErrorCode::InvalidTimestamp
                // What may be stored already must not be stored again in halves.
                if sent.batch.records > 1 && !sent.maybe_stored =>
            {
                self.split(at, error)
            }
            _ if error.is_retriable() => {
                sent.state = SentState::Unsent;
                sent.maybe_stored = true;
                self.draining = true;
                self.failed(error, now, chance);
                Vec::new()
            }
            _ => {
                self.renew |= self.settings.idempotent;
                self.end(at, Outcome::Failed(error))
            }
        }
    }

    fn failed(&mut self, error: Error, now: Instant, chance: f64) {
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + BackoffPolicy::REQUEST.wait(self.failures, chance));
        self.last_error = Some(error);
    }

    fn end(&mut self, at: usize, outcome: Outcome) -> Ended {
        self.sent.remove(at).map(|sent| (sent.batch, outcome)).into_iter().collect()
    }

    /// One record spoils this batch: its halves go on alone, in its place, so that the others are stored.
    fn split(&mut self, at: usize, error: Error) -> Ended {
        let Some(sent) = self.sent.remove(at) else { return Vec::new() };
        let Some((first, second)) = halves(&sent.bytes, &self.settings) else {
            self.renew |= self.settings.idempotent;
            return vec![(sent.batch, Outcome::Failed(error))];
        };
        let middle = first.record_count();
        let halves = [sent.batch.delivery.part(), sent.batch.delivery.part()];
        let sequence = BatchHeader::parse(&sent.bytes).map_or(Sequence::new(0), |header| header.base_sequence);
        for (step, (builder, delivery)) in [first, second].into_iter().zip(halves.clone()).enumerate() {
            let number = self.next_number;
            self.next_number += 1;
            // The room stays with the whole; it is given back when the whole ends, which is now. The halves are
            // sent at once and hold what the whole held.
            let batch =
                Batch { number, delivery, created: sent.batch.created, room: 0, records: builder.record_count() };
            let mut builder = builder;
            if let Some(identity) = self.identity.filter(|_| self.settings.transactional) {
                // The whole is not stored, and the halves take its numbers: no other batch is touched.
                let base = if step == 0 { sequence } else { sequence.plus(middle) };
                builder = builder.transactional();
                builder.set_producer(identity.producer_id, identity.epoch, base);
            }
            let bytes = builder.build();
            let part = Sent { batch, bytes, state: SentState::Unsent, absent: true, maybe_stored: false };
            self.sent.insert(at + step, part);
        }
        // The whole was refused and so is not stored; outside a transaction what is left is numbered anew.
        self.renew |= self.settings.idempotent && !self.settings.transactional;
        self.draining = true;
        vec![(sent.batch, Outcome::Split { at: middle, halves })]
    }

    /// The connection is gone, or the partition is led elsewhere now: what is under way is sent again.
    pub(crate) fn connection_lost(&mut self, error: Option<Error>) {
        for sent in &mut self.sent {
            if sent.state != SentState::Unsent {
                sent.state = SentState::Unsent;
                sent.maybe_stored = true;
            }
        }
        self.draining = false;
        if error.is_some() {
            self.last_error = error;
        }
    }

    /// Numbers what is left anew under the next epoch; false where the epochs are used up.
    ///
    /// Nothing is in flight, and the oldest batch, if there is one, is known not to be stored: so none behind it is, for
    /// the broker takes the batches of one sequence in order only.
    fn renew(&mut self) -> bool {
        let Some(identity) = self.identity else {
            self.renew = false;
            return true;
        };
        if self.id_spent || identity.epoch.get() == i16::MAX {
            return false;
        }
        self.set_identity(Identity { epoch: ProducerEpoch::new(identity.epoch.get() + 1), ..identity });
        true
    }

    /// The transaction before is over, and with it all its batches: the next one begins under this identity.
    pub(crate) fn begin_transaction(&mut self, identity: Identity) {
        self.closed = None;
        self.draining = false;
        self.retry_at = None;
        self.failures = 0;
        self.set_identity(identity);
    }

    /// Begins a new sequence under this identity.
    pub(crate) fn set_identity(&mut self, identity: Identity) {
        self.identity = Some(identity);
        self.renew = false;
        self.id_spent = false;
        self.known = false;
        self.next_sequence = Sequence::new(0);
        for sent in &mut self.sent {
            sent.bytes = under(&sent.bytes, identity, self.next_sequence);
            self.next_sequence = self.next_sequence.plus(sent.batch.records);
            sent.absent = true;
            sent.maybe_stored = false;
        }
    }

    /// Gives up what is older than the delivery timeout.
    pub(crate) fn expire(&mut self, now: Instant) -> Ended {
        let timeout = self.settings.delivery_timeout;
        let late = |batch: &Batch| now.saturating_duration_since(batch.created) >= timeout;
        let mut ended = Vec::new();
        // Oldest first in each stage, and stages in order of age: the first that is in time ends the search.
        while let Some(front) = self.sent.front().filter(|front| late(&front.batch)) {
            // What never left leaves no hole that a broker could see, but its numbers are given away all the same.
            self.renew |= self.settings.idempotent;
            let unanswered = front.state != SentState::Unsent || front.maybe_stored;
            self.known |= unanswered;
            let error = self.timed_out(unanswered);
            ended.extend(self.end(0, Outcome::Failed(error)));
        }
        while self.ready.front().is_some_and(|front| late(&front.batch)) {
            let error = self.timed_out(false);
            ended.extend(self.ready.pop_front().map(|unbuilt| (unbuilt.unsent(), Outcome::Failed(error))));
        }
        if self.open.as_ref().is_some_and(|open| late(&open.batch)) {
            let error = self.timed_out(false);
            ended.extend(self.open.take().map(|unbuilt| (unbuilt.unsent(), Outcome::Failed(error))));
        }
        ended
    }

    fn timed_out(&self, maybe_stored: bool) -> Error {
        let timeout = self.settings.delivery_timeout;
        let fate = if maybe_stored { "it may be stored all the same" } else { "it is not stored" };
        let why = self.last_error.as_ref().map(|error| format!("; last: {}", error.message())).unwrap_or_default();
        let message = format!("the record was not acknowledged within {timeout:?} ({fate}){why}");
        let error = Error::new(ErrorCode::TimedOut, message).at(&self.topic, self.partition);
        match &self.last_error {
            Some(last) => error.caused_by(last.clone()),
            None => error,
        }
    }

    /// Fails everything, for good: the topic is gone, or the producer is.
    pub(crate) fn fail_all(&mut self, error: &Error) -> Ended {
        let error = error.clone().at(&self.topic, self.partition);
        self.closed = Some(error.clone());
        let failed = |batch: Batch| (batch, Outcome::Failed(error.clone()));
        let sent = self.sent.drain(..).map(|sent| failed(sent.batch));
        let waiting = self.ready.drain(..).chain(self.open.take()).map(|unbuilt| failed(unbuilt.unsent()));
        sent.chain(waiting).collect()
    }

    /// Why nothing gets through now, for the message of a timeout.
    pub(crate) fn set_trouble(&mut self, error: Error) {
        self.last_error = Some(error);
    }
}

/// The same batch under another identity and sequence.
fn under(bytes: &Bytes, identity: Identity, base_sequence: Sequence) -> Bytes {
    rewrite::with_producer(bytes, identity.producer_id, identity.epoch, base_sequence)
        .unwrap_or_else(|error| unreachable!("a batch that we built is whole: {error}"))
}

/// The records of a batch of ours in two; `None` where it cannot be read, which a batch that we built can.
fn halves(bytes: &Bytes, settings: &BatchSettings) -> Option<(RecordBatchBuilder, RecordBatchBuilder)> {
    let records = flowstone_protocol::record::records(bytes.clone(), usize::MAX).ok()?;
    let middle = records.header().record_count / 2;
    let builder = || RecordBatchBuilder::new(settings.compression).level(settings.compression_level);
    let (mut first, mut second) = (builder(), builder());
    for (record, index) in records.zip(0..) {
        let record = record.ok()?;
        let half = if index < middle { &mut first } else { &mut second };
        let headers = record.headers.iter().map(|(key, value)| (&**key, value.as_deref()));
        half.append(record.timestamp, record.key.as_deref(), record.value.as_deref(), headers).ok()?;
    }
    (!first.is_empty() && !second.is_empty()).then_some((first, second))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A partition's batches and a clock that only moves when told.
    struct Bench {
        batches: PartitionBatches,
        now: Instant,
        next_request: u64,
        ended: Vec<(Arc<Delivery>, Outcome)>,
    }

    #[derive(Debug, PartialEq, Eq, Clone, Copy)]
    struct OnWire {
        request: u64,
        epoch: i16,
        sequence: i32,
        records: i32,
    }

    fn settings() -> BatchSettings {
        BatchSettings {
            batch_bytes: 1000,
            linger: Duration::from_millis(5),
            compression: Compression::None,
            compression_level: None,
            delivery_timeout: Duration::from_secs(10),
            in_flight_max: 5,
            idempotent: true,
            answered: true,
            transactional: false,
        }
    }

    impl Bench {
        fn new(settings: BatchSettings) -> Self {
            let identity = Identity { producer_id: ProducerId::new(7), epoch: ProducerEpoch::new(0) };
            let identity = settings.idempotent.then_some(identity);
            let batches = PartitionBatches::new(Arc::new(settings), "t".into(), 0, Weak::new(), identity);
            Self { batches, now: Instant::now(), next_request: 0, ended: Vec::new() }
        }

        fn add(&mut self, value_bytes: usize) -> Added {
            let value = vec![b'v'; value_bytes];
            let now = self.now;
            let record = Record::to("t").value(&value);
            self.batches.append(&record, 1000, &mut 0, || now, |_| true).unwrap().unwrap()
        }

        /// `count` full batches of one record each.
        fn add_batches(&mut self, count: usize) -> Vec<Arc<Delivery>> {
            (0..count).map(|_| self.add(800).delivery).collect()
        }

        /// Sends all that may go now.
        fn run(&mut self) -> Vec<OnWire> {
            let mut wire = Vec::new();
            loop {
                match self.batches.next(self.now) {
                    Next::Build(unbuilt) => {
                        let ended = self.batches.built(unbuilt.build());
                        self.note(ended);
                    }
                    Next::Send { number, bytes } => {
                        self.next_request += 1;
                        flowstone_protocol::batch::verify_crc(&bytes).unwrap();
                        let header = BatchHeader::parse(&bytes).unwrap();
                        wire.push(OnWire {
                            request: self.next_request,
                            epoch: header.producer_epoch.get(),
                            sequence: header.base_sequence.get(),
                            records: header.record_count,
                        });
                        assert!(self.batches.sent(number, self.next_request).is_none());
                    }
                    Next::Idle | Next::At(_) | Next::NewProducerId => return wire,
                }
            }
        }

        fn answer(&mut self, wire: OnWire, answer: Result<i64, ErrorCode>) {
            let answer = answer.map(|offset| (offset, None)).map_err(|code| Error::new(code, "told so"));
            let ended = self.batches.answered(wire.request, answer, self.now, 0.0);
            self.note(ended);
        }

        fn note(&mut self, ended: Ended) {
            for (batch, outcome) in ended {
                self.ended.push((batch.delivery, outcome));
            }
        }

        fn expire(&mut self) {
            let ended = self.batches.expire(self.now);
            self.note(ended);
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
        }

        /// The offset that a delivery got, or the code that it failed with.
        fn outcome(&self, delivery: &Arc<Delivery>) -> Option<Result<i64, ErrorCode>> {
            let (_, outcome) = self.ended.iter().find(|(ended, _)| Arc::ptr_eq(ended, delivery))?;
            Some(match outcome {
                Outcome::Stored { base_offset, .. } => Ok(*base_offset),
                Outcome::Failed(error) => Err(error.code()),
                Outcome::Split { .. } => panic!("split"),
            })
        }
    }

    fn sequences(wire: &[OnWire]) -> Vec<(i16, i32)> {
        wire.iter().map(|wire| (wire.epoch, wire.sequence)).collect()
    }

    #[test]
    fn a_batch_goes_when_it_is_full_or_awaited_or_its_linger_is_over() {
        let mut bench = Bench::new(settings());
        let first = bench.add(100);
        assert!(first.opened.is_some() && !first.sealed);
        assert!(bench.run().is_empty());
        bench.pass(Duration::from_millis(5));
        assert_eq!(bench.run().len(), 1);
        let awaited = bench.add(100);
        assert!(bench.run().is_empty());
        awaited.delivery.want();
        assert_eq!(bench.run().len(), 1);
        // The third does not fit: the first two are a full batch, and known to be one before the third comes.
        assert!(!bench.add(300).sealed && bench.add(300).sealed);
        assert!(bench.add(300).opened.is_some());
        let wire = bench.run();
        assert_eq!((wire.len(), wire[0].records, wire[0].sequence), (1, 2, 2));
    }

    #[test]
    fn a_record_without_room_is_left_out_whole() {
        let mut bench = Bench::new(settings());
        let record = Record::to("t").value("v");
        let now = bench.now;
        let refused = bench.batches.append(&record, 1, &mut 0, || now, |_| false).unwrap();
        assert!(refused.is_none() && bench.batches.is_idle());
        // Room that the caller brings counts, and what it takes up stays with the batch.
        let mut credit = 500;
        assert!(bench.batches.append(&record, 1, &mut credit, || now, |_| false).unwrap().is_some());
        assert_eq!(credit, 0);
        assert!(bench.batches.append(&record, 1, &mut credit, || now, |_| false).unwrap().is_some());
    }

    #[test]
    fn no_more_than_five_are_under_way() {
        let mut bench = Bench::new(settings());
        let deliveries = bench.add_batches(8);
        let wire = bench.run();
        assert_eq!(sequences(&wire), [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]);
        assert!(bench.run().is_empty());
        bench.answer(wire[0], Ok(50));
        assert_eq!(sequences(&bench.run()), [(0, 5)]);
        assert_eq!(bench.outcome(&deliveries[0]), Some(Ok(50)));
    }

    #[test]
    fn after_a_lost_connection_all_goes_again_in_order_under_its_old_numbers() {
        let mut bench = Bench::new(settings());
        bench.add_batches(7);
        let wire = bench.run();
        bench.answer(wire[0], Ok(0));
        bench.run();
        bench.batches.connection_lost(None);
        let again = bench.run();
        assert_eq!(sequences(&again), [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]);
        // An answer of the old connection counts no more.
        bench.answer(wire[1], Ok(1));
        assert_eq!(bench.ended.len(), 1);
        for (wire, offset) in again.into_iter().zip(1..) {
            bench.answer(wire, Ok(offset));
        }
        assert_eq!(sequences(&bench.run()), [(0, 6)]);
    }

    #[test]
    fn a_refusal_for_now_waits_for_the_answers_under_way_then_repeats_the_rest_in_order() {
        let mut bench = Bench::new(settings());
        let deliveries = bench.add_batches(4);
        let wire = bench.run();
        bench.answer(wire[0], Ok(10));
        bench.answer(wire[1], Err(ErrorCode::Overloaded));
        bench.add_batches(1);
        bench.pass(Duration::from_secs(1));
        assert!(bench.run().is_empty(), "answers are under way");
        bench.answer(wire[2], Err(ErrorCode::OutOfOrderSequence));
        bench.answer(wire[3], Err(ErrorCode::OutOfOrderSequence));
        let again = bench.run();
        assert_eq!(sequences(&again), [(0, 1), (0, 2), (0, 3), (0, 4)]);
        for (wire, offset) in again.into_iter().zip(11..) {
            bench.answer(wire, Ok(offset));
        }
        let offsets: Vec<_> = deliveries.iter().map(|delivery| bench.outcome(delivery)).collect();
        assert_eq!(offsets, [Some(Ok(10)), Some(Ok(11)), Some(Ok(12)), Some(Ok(13))]);
        assert!(bench.batches.is_idle());
    }

    #[test]
    fn refusals_in_a_row_wait_longer_each_time() {
        let mut bench = Bench::new(settings());
        bench.add_batches(1);
        let mut waits = Vec::new();
        for _ in 0..3 {
            let wire = bench.run();
            bench.answer(wire[0], Err(ErrorCode::Overloaded));
            let Next::At(at) = bench.batches.next(bench.now) else { panic!("it does not wait") };
            waits.push(at - bench.now);
            bench.now = at;
        }
        assert!(waits[0] > Duration::ZERO && waits[1] > waits[0] && waits[2] > waits[1], "{waits:?}");
    }

    #[test]
    fn a_batch_refused_for_good_leaves_its_successors_whole_under_the_next_epoch() {
        let mut bench = Bench::new(settings());
        let deliveries = bench.add_batches(4);
        let wire = bench.run();
        bench.answer(wire[0], Ok(0));
        bench.answer(wire[1], Err(ErrorCode::UnsupportedCompression));
        bench.answer(wire[2], Err(ErrorCode::OutOfOrderSequence));
        assert!(bench.run().is_empty(), "one answer is under way");
        bench.answer(wire[3], Err(ErrorCode::OutOfOrderSequence));
        bench.add_batches(1);
        let again = bench.run();
        assert_eq!(sequences(&again), [(1, 0), (1, 1), (1, 2)]);
        bench.answer(again[0], Ok(1));
        bench.answer(again[1], Ok(2));
        assert_eq!(bench.outcome(&deliveries[1]), Some(Err(ErrorCode::UnsupportedCompression)));
        assert_eq!((bench.outcome(&deliveries[2]), bench.outcome(&deliveries[3])), (Some(Ok(1)), Some(Ok(2))));
    }

    #[test]
    fn after_a_timeout_the_old_sequence_is_settled_before_the_epoch_rises() {
        let mut bench = Bench::new(settings());
        let first = bench.add_batches(1);
        bench.run();
        bench.pass(Duration::from_secs(9));
        let rest = bench.add_batches(2);
        let wire = bench.run();
        bench.pass(Duration::from_secs(1));
        bench.expire();
        assert_eq!(bench.outcome(&first[0]), Some(Err(ErrorCode::TimedOut)));
        bench.add_batches(1);
        assert!(bench.run().is_empty(), "the second and third may be stored");
        // The connection breaks: whether they are stored is settled under their old numbers.
        bench.batches.connection_lost(None);
        let again = bench.run();
        assert_eq!(sequences(&again), [(0, 1), (0, 2)]);
        assert_ne!(again[0].request, wire[0].request);
        // The first was stored after all, so was the second; the third was not, but is now.
        bench.answer(again[0], Ok(1));
        bench.answer(again[1], Ok(2));
        assert_eq!((bench.outcome(&rest[0]), bench.outcome(&rest[1])), (Some(Ok(1)), Some(Ok(2))));
        assert_eq!(sequences(&bench.run()), [(1, 0)]);
    }

    #[test]
    fn after_a_timeout_a_gap_means_that_the_rest_is_not_stored() {
        let mut bench = Bench::new(settings());
        bench.add_batches(1);
        bench.run();
        bench.pass(Duration::from_secs(9));
        bench.add_batches(2);
        let wire = bench.run();
        bench.pass(Duration::from_secs(1));
        bench.expire();
        bench.answer(wire[0], Err(ErrorCode::OutOfOrderSequence));
        bench.answer(wire[1], Err(ErrorCode::OutOfOrderSequence));
        assert_eq!(sequences(&bench.run()), [(1, 0), (1, 1)]);
    }

    #[test]
    fn what_never_left_fails_alone_and_leaves_no_hole() {
        let mut bench = Bench::new(settings());
        let delivery = bench.add(100).delivery;
        bench.pass(Duration::from_secs(10));
        bench.expire();
        assert_eq!(bench.outcome(&delivery), Some(Err(ErrorCode::TimedOut)));
        bench.add_batches(1);
        assert_eq!(sequences(&bench.run()), [(0, 0)]);
    }

    #[test]
    fn a_timeout_takes_every_stage() {
        let mut bench = Bench::new(settings());
        let mut deliveries = bench.add_batches(7);
        deliveries.push(bench.add(100).delivery);
        assert_eq!(bench.run().len(), 5);
        bench.pass(Duration::from_millis(9_999));
        bench.expire();
        assert!(bench.ended.is_empty());
        bench.pass(Duration::from_millis(1));
        bench.expire();
        for delivery in &deliveries {
            assert_eq!(bench.outcome(delivery), Some(Err(ErrorCode::TimedOut)));
        }
        assert!(bench.batches.is_idle());
    }

    #[test]
    fn a_forgotten_producer_begins_anew_unless_the_batch_may_be_stored() {
        let mut bench = Bench::new(settings());
        bench.add_batches(1);
        let wire = bench.run();
        bench.answer(wire[0], Ok(0));
        let second = bench.add_batches(1);
        let wire = bench.run();
        bench.answer(wire[0], Err(ErrorCode::UnknownProducer));
        bench.pass(Duration::from_secs(1));
        let again = bench.run();
        assert_eq!(sequences(&again), [(1, 0)]);
        bench.answer(again[0], Ok(1));
        assert_eq!(bench.outcome(&second[0]), Some(Ok(1)));
        // Now one whose fate is unknown when the producer is forgotten: it may be stored.
        let third = bench.add_batches(1);
        bench.run();
        bench.batches.connection_lost(None);
        let again = bench.run();
        assert_eq!(sequences(&again), [(1, 1)]);
        bench.answer(again[0], Err(ErrorCode::UnknownProducer));
        assert_eq!(bench.outcome(&third[0]), Some(Err(ErrorCode::UnknownProducer)));
        bench.add_batches(1);
        assert_eq!(sequences(&bench.run()), [(2, 0)]);
    }

    #[test]
    fn behind_a_first_batch_that_failed_nothing_can_be_stored() {
        let mut bench = Bench::new(settings());
        bench.add_batches(3);
        let wire = bench.run();
        bench.answer(wire[0], Err(ErrorCode::UnsupportedCompression));
        bench.batches.connection_lost(None);
        let again = bench.run();
        assert_eq!(sequences(&again), [(0, 1), (0, 2)]);
        bench.answer(again[0], Err(ErrorCode::UnknownProducer));
        bench.answer(again[1], Err(ErrorCode::UnknownProducer));
        assert_eq!(sequences(&bench.run()), [(1, 0), (1, 1)]);
    }

    #[test]
    fn used_up_epochs_and_fenced_ids_ask_for_another() {
        let mut bench = Bench::new(settings());
        let last = Identity { producer_id: ProducerId::new(7), epoch: ProducerEpoch::new(i16::MAX) };
        bench.batches.set_identity(last);
        bench.add_batches(2);
        let wire = bench.run();
        bench.answer(wire[0], Err(ErrorCode::InvalidRecord));
        bench.answer(wire[1], Err(ErrorCode::OutOfOrderSequence));
        assert!(matches!(bench.batches.next(bench.now), Next::NewProducerId));
        bench.batches.set_identity(Identity { producer_id: ProducerId::new(8), epoch: ProducerEpoch::new(0) });
        let wire = bench.run();
        assert_eq!(sequences(&wire), [(0, 0)]);
        bench.answer(wire[0], Err(ErrorCode::ProducerFenced));
        assert!(matches!(bench.batches.next(bench.now), Next::NewProducerId));
    }

    #[test]
    fn a_spoilt_batch_goes_on_in_halves_until_the_culprit_is_alone() {
        let mut bench = Bench::new(settings());
        let whole = bench.add(10).delivery;
        bench.add(20);
        bench.add(30);
        whole.want();
        let mut wire = bench.run();
        let next = bench.add_batches(1);
        wire.extend(bench.run());
        assert_eq!((wire.len(), wire[0].records), (2, 3));
        bench.answer(wire[0], Err(ErrorCode::BatchTooLarge));
        bench.answer(wire[1], Err(ErrorCode::OutOfOrderSequence));
        let Some((_, Outcome::Split { at: 1, halves })) = bench.ended.pop() else { panic!("not split") };
        let halves = halves.clone();
        let wire = bench.run();
        assert_eq!(sequences(&wire), [(1, 0), (1, 1), (1, 3)]);
        assert_eq!((wire[0].records, wire[1].records), (1, 2));
        bench.answer(wire[0], Err(ErrorCode::BatchTooLarge));
        bench.answer(wire[1], Err(ErrorCode::OutOfOrderSequence));
        bench.answer(wire[2], Err(ErrorCode::OutOfOrderSequence));
        let wire = bench.run();
        assert_eq!(sequences(&wire), [(2, 0), (2, 2)]);
        bench.answer(wire[0], Ok(5));
        bench.answer(wire[1], Ok(7));
        assert_eq!(bench.outcome(&halves[0]), Some(Err(ErrorCode::BatchTooLarge)));
        assert_eq!(bench.outcome(&halves[1]), Some(Ok(5)));
        assert_eq!(bench.outcome(&next[0]), Some(Ok(7)));
    }

    #[test]
    fn a_split_puts_no_more_under_way_than_before() {
        let mut bench = Bench::new(settings());
        bench.add(10).delivery.want();
        bench.add(20);
        let mut wire = bench.run();
        bench.add_batches(4);
        wire.extend(bench.run());
        assert_eq!(wire.len(), 5);
        bench.answer(wire[0], Err(ErrorCode::InvalidRecord));
        for wire in &wire[1..] {
            bench.answer(*wire, Err(ErrorCode::OutOfOrderSequence));
        }
        let again = bench.run();
        assert_eq!(sequences(&again), [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]);
        bench.answer(again[0], Ok(0));
        assert_eq!(sequences(&bench.run()), [(1, 5)]);
    }

    #[test]
    fn a_batch_that_is_being_built_is_waited_for_and_fails_with_the_rest() {
        let mut bench = Bench::new(settings());
        let delivery = bench.add(100).delivery;
        delivery.want();
        let Next::Build(unbuilt) = bench.batches.next(bench.now) else { panic!("nothing to build") };
        assert!(bench.batches.deliveries().any(|known| Arc::ptr_eq(known, &delivery)), "a flush must wait for it");
        let ended = bench.batches.fail_all(&Error::closed("producer"));
        assert!(ended.is_empty());
        let ended = bench.batches.built(unbuilt.build());
        bench.note(ended);
        assert!(matches!(bench.outcome(&delivery), Some(Err(_))));
        assert!(bench.batches.is_idle());
    }

    #[test]
    fn what_may_be_stored_is_not_stored_again_in_halves() {
        let mut bench = Bench::new(settings());
        let whole = bench.add(10).delivery;
        bench.add(20);
        whole.want();
        assert_eq!(bench.run().len(), 1);
        bench.batches.connection_lost(None);
        let again = bench.run();
        bench.answer(again[0], Err(ErrorCode::BatchTooLarge));
        assert_eq!(bench.outcome(&whole), Some(Err(ErrorCode::BatchTooLarge)));
        assert!(bench.run().is_empty());
    }

    #[test]
    fn behind_a_forgotten_producer_nothing_that_may_be_stored_is_numbered_anew() {
        let mut bench = Bench::new(settings());
        bench.add_batches(1);
        let wire = bench.run();
        bench.answer(wire[0], Ok(0));
        let deliveries = bench.add_batches(2);
        bench.run();
        bench.batches.connection_lost(None);
        let again = bench.run();
        bench.answer(again[1], Err(ErrorCode::UnknownProducer));
        bench.answer(again[0], Err(ErrorCode::UnknownProducer));
        // The second is asked for once more, under its old number: only then it is known what became of it.
        let again = bench.run();
        assert_eq!(sequences(&again), [(0, 2)]);
        bench.answer(again[0], Err(ErrorCode::UnknownProducer));
        assert_eq!(bench.outcome(&deliveries[1]), Some(Err(ErrorCode::UnknownProducer)));
    }

    #[test]
    fn without_idempotence_one_at_a_time_keeps_the_order() {
        let mut bench = Bench::new(BatchSettings { idempotent: false, in_flight_max: 1, ..settings() });
        let deliveries = bench.add_batches(2);
        let wire = bench.run();
        assert_eq!(sequences(&wire), [(-1, -1)]);
        bench.answer(wire[0], Err(ErrorCode::NotLeader));
        bench.pass(Duration::from_secs(1));
        let again = bench.run();
        bench.answer(again[0], Ok(0));
        let wire = bench.run();
        bench.answer(wire[0], Ok(1));
        assert_eq!((bench.outcome(&deliveries[0]), bench.outcome(&deliveries[1])), (Some(Ok(0)), Some(Ok(1))));
    }

    #[test]
    fn sequences_go_on_at_zero_past_the_largest() {
        let mut bench = Bench::new(settings());
        bench.batches.next_sequence = Sequence::new(i32::MAX);
        bench.add_batches(2);
        assert_eq!(sequences(&bench.run()), [(0, i32::MAX), (0, 0)]);
    }
}
