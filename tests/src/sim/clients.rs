//! Producers, readers, and those who ask for marks: what they are told goes into the history that is judged.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use flowstone_checker::payload::Run;
use flowstone_checker::{Asked, Isolation, LogId, Mark, Observed, ReaderId, SenderId, SenderKind, ValueId, View};
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::record::records;
use flowstone_protocol::{
    BatchHeader, Compression, Error, ErrorCode, LeaderEpoch, Offset, ProducerEpoch, ProducerId, RecordBatchBuilder,
    Sequence,
};
use flowstone_replication::{Acks, OffsetQuery, Permit, ReadAnswer, ReadRequest, TrimTo};

use flowstone_storage::ReadError;

use super::broker::broker_id;
use super::keyed::{KeyedReader, KeyedWriter};
use super::members::Member;
use super::network::Node;
use super::outbox::{Answer, Out};
use super::transactions::Ask;
use super::transactors::{Aborted, Transactor};
use super::world::{Event, World};

/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_millis(2_500);
/// Bytes of one read.
pub(crate) const READ_BYTES: usize = 8 << 10;
/// Batches that a producer has in flight: as many as a partition remembers.
const BATCHES_MAX: usize = 5;
/// Most records of one batch.
const RECORDS_MAX: u64 = 3;

/// What a client asks a broker.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Produce {
        batch: Bytes,
        header: BatchHeader,
        acks: Acks,
    },
    Read(ReadRequest),
    LogStart,
    HighWatermark,
    Trim(Offset),
    /// A batch of a transaction of this transactional id.
    Transact {
        group: usize,
        id: String,
        batch: Bytes,
        header: BatchHeader,
    },
    /// Something of a coordinator.
    Ask(Ask),
}

/// A request that is not answered yet.
#[derive(Debug)]
pub(crate) struct Operation {
    pub(crate) client: usize,
    pub(crate) group: usize,
    pub(crate) broker: usize,
    /// Records that a quorum is asked for.
    pub(crate) next_of: Option<u64>,
    /// The first sequence of a produced batch.
    pub(crate) sequence: i32,
    pub(crate) asked: Option<Asked>,
}

/// See the module.
#[derive(Debug)]
pub(crate) enum Client {
    Producer(Producer),
    Reader(Reader),
    Transactor(Transactor),
    Member(Box<Member>),
    KeyedWriter(KeyedWriter),
    KeyedReader(KeyedReader),
    /// Asks what a scenario says, once.
    Script {
        answer: Option<Answer>,
    },
    /// Asks for the high watermark that is certain.
    Asker {
        group: usize,
    },
    /// Moves the log start, once.
    Trimmer {
        group: usize,
        to: Offset,
        is_done: bool,
    },
}

#[derive(Debug)]
pub(crate) struct Producer {
    group: usize,
    sender: SenderId,
    kind: SenderKind,
    acks: Acks,
    id: i64,
    next_sequence: i32,
    next_number: u64,
    in_flight: VecDeque<Pending>,
    /// Whom it believes to lead.
    believes: usize,
}

#[derive(Debug)]
struct Pending {
    number: u64,
    sequence: i32,
    values: Vec<ValueId>,
    batch: Bytes,
    header: BatchHeader,
    is_asked: bool,
    retry_at: Duration,
    tries: u32,
}

#[derive(Debug)]
pub(crate) struct Reader {
    group: usize,
    reader: ReaderId,
    position: Offset,
    high_watermark: Offset,
    last_epoch: Option<LeaderEpoch>,
    any_replica: bool,
    /// Reads what is committed of transactions.
    committed: bool,
    is_asked: bool,
    believes: usize,
    /// Reads from this broker alone...
    pinned: Option<usize>,
    /// ...up to here.
    until: Option<Offset>,
}

impl Client {
    /// In short, for people.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Producer(it) => format!("producer {} of group {}: {} in flight", it.id, it.group, it.in_flight.len()),
            Self::Transactor(it) => it.describe(),
            Self::Member(it) => it.describe(),
            Self::KeyedWriter(it) => format!("{it:?}"),
            Self::KeyedReader(it) => format!("{it:?}"),
            Self::Reader(it) => format!("reader of group {} at {} of {:?}", it.group, it.position, it.until),
            Self::Script { answer } => format!("{answer:?}"),
            Self::Asker { .. } | Self::Trimmer { .. } => "another".to_owned(),
        }
    }

    /// Whether nothing is to be waited for.
    pub(crate) fn is_done(&self) -> bool {
        match self {
            Self::Producer(producer) => producer.in_flight.is_empty(),
            Self::Transactor(it) => it.is_done(),
            Self::Member(it) => it.is_done(),
            Self::KeyedWriter(it) => it.is_done(),
            Self::KeyedReader(it) => it.is_done(),
            Self::Reader(reader) => reader.until.is_none_or(|until| reader.position >= until),
            Self::Asker { .. } | Self::Trimmer { .. } | Self::Script { .. } => true,
        }
    }
}

impl World {
    pub(crate) fn run_id(&self) -> Run {
        Run(self.plan.seed)
    }

    /// The clients that a run begins with.
    pub(crate) fn make_clients(&mut self) {
        for group in 0..self.plan.groups {
            let log = self.history.log("simulated", self.groups[group].tp.partition);
            self.logs.push(log);
            for number in 0..self.plan.producers {
                self.add_producer(group, number as i64 + 1, SenderKind::IDEMPOTENT, Acks::Quorum);
            }
            if self.random.one_in(2) {
                self.add_producer(group, -1, SenderKind::PLAIN, Acks::Quorum);
            }
            if self.random.one_in(3) {
                self.add_producer(group, -1, SenderKind::LOSSY, Acks::Leader);
            }
            for number in 0..self.plan.readers {
                self.add_reader(group, number % 2 == 1, false, None, None);
            }
            if self.plan.transactional_ids > 0 {
                self.add_reader(group, false, true, None, None);
            }
            self.add_client(Client::Asker { group });
        }
        self.make_transactors();
        self.make_members();
        self.make_keyed();
    }

    fn add_producer(&mut self, group: usize, id: i64, kind: SenderKind, acks: Acks) {
        let sender = self.history.sender(kind);
        let believes = self.random.index(self.plan.brokers);
        let in_flight = VecDeque::new();
        let producer =
            Producer { group, sender, kind, acks, id, next_sequence: 0, next_number: 0, in_flight, believes };
        self.add_client(Client::Producer(producer));
    }

    fn add_reader(
        &mut self,
        group: usize,
        any_replica: bool,
        committed: bool,
        pinned: Option<usize>,
        until: Option<Offset>,
    ) {
        let isolation = if committed { Isolation::ReadCommitted } else { Isolation::ReadUncommitted };
        let reader = self.history.reader(isolation);
        self.history.assigned(reader, self.logs[group], Offset::ZERO);
        let believes = pinned.unwrap_or_else(|| self.random.index(self.plan.brokers));
        self.add_client(Client::Reader(Reader {
            group,
            reader,
            position: Offset::ZERO,
            high_watermark: Offset::ZERO,
            last_epoch: None,
            any_replica,
            committed,
            is_asked: false,
            believes,
            pinned,
            until,
        }));
    }

    pub(crate) fn add_client(&mut self, client: Client) {
        self.clients.push(client);
        self.turns.push(None);
        let after = self.random.millis(1, 300);
        self.turn_after(self.clients.len() - 1, after);
    }

    /// A client's turn.
    pub(crate) fn on_client(&mut self, client: usize) {
        let mut it = std::mem::replace(&mut self.clients[client], Client::Asker { group: 0 });
        let again = match &mut it {
            Client::Producer(producer) => self.on_producer(client, producer),
            Client::Reader(reader) => self.on_reader(client, reader),
            Client::Transactor(transactor) => self.on_transactor(client, transactor),
            Client::Member(member) => self.on_member(client, member),
            Client::KeyedWriter(writer) => self.on_keyed_writer(client, writer),
            Client::KeyedReader(reader) => self.on_keyed_reader(client, reader),
            Client::Script { .. } => None,
            Client::Asker { group } => self.on_asker(client, *group),
            Client::Trimmer { group, to, is_done } => {
                let broker = self.leader_of(*group).unwrap_or(0);
                let (group, to) = (*group, *to);
                if *is_done {
                    None
                } else {
                    *is_done = true;
                    self.ask(client, group, broker, Request::Trim(to), 0, None);
                    None
                }
            }
        };
        self.clients[client] = it;
        if let Some(again) = again {
            self.turn_after(client, again);
        }
    }

    fn on_producer(&mut self, client: usize, it: &mut Producer) -> Option<Duration> {
        // No further ahead of the oldest than a partition remembers.
        let oldest = it.in_flight.front().map_or(it.next_number, |pending| pending.number);
        let has_room = it.next_number < oldest + BATCHES_MAX as u64;
        if !self.stops_sending && has_room && self.random.below(4) > 0 {
            let pending = self.new_batch(it);
            it.in_flight.push_back(pending);
        }
        let mut again = if self.stops_sending {
            None
        } else {
            Some(self.random.micros(500, self.plan.produce_gap.as_micros() as u64))
        };
        for at in 0..it.in_flight.len() {
            let pending = &mut it.in_flight[at];
            if pending.is_asked {
                continue;
            }
            if pending.retry_at > self.now {
                let left = pending.retry_at - self.now;
                again = Some(again.map_or(left, |again| again.min(left)));
                continue;
            }
            pending.is_asked = true;
            pending.tries += 1;
            if pending.tries > 1 {
                self.counts.retries += 1;
            }
            let records = pending.values.len() as u64;
            let request = Request::Produce { batch: pending.batch.clone(), header: pending.header, acks: it.acks };
            let (group, broker, sequence) = (it.group, it.believes, pending.sequence);
            let next_of = (it.acks == Acks::Quorum).then_some(records);
            self.ask_with(client, group, broker, request, sequence, None, next_of);
        }
        again
    }

    fn new_batch(&mut self, it: &mut Producer) -> Pending {
        let count = 1 + self.random.below(RECORDS_MAX);
        let sequence = it.next_sequence;
        it.next_sequence += count as i32;
        let number = it.next_number;
        it.next_number += 1;
        let mut builder = RecordBatchBuilder::new(Compression::None);
        if it.id >= 0 {
            builder = builder.producer(ProducerId::new(it.id), ProducerEpoch::new(0), Sequence::new(sequence));
        }
        let mut values = Vec::new();
        for _ in 0..count {
            let value = self.history.send(it.sender, self.logs[it.group], self.now);
            let bytes = if self.random.one_in(20) { self.random.index(3_000) } else { self.random.index(150) };
            let wall = self.brokers[0].clock.wall();
            let appended = builder.append(wall, None, Some(&self.run_id().encode(value, bytes)), []);
            appended.expect("a few records are far below any limit");
            values.push(value);
        }
        let batch = builder.build();
        let header = BatchHeader::parse(&batch).expect("just built");
        Pending { number, sequence, values, batch, header, is_asked: false, retry_at: self.now, tries: 0 }
    }

    fn on_reader(&mut self, client: usize, it: &mut Reader) -> Option<Duration> {
        if it.is_asked || it.until.is_some_and(|until| it.position >= until) {
            return None;
        }
        let broker = it.pinned.unwrap_or(it.believes);
        let request = ReadRequest {
            last_epoch: it.last_epoch,
            wait: it.until.is_none() && self.random.one_in(2),
            any_replica: it.any_replica,
            known_high_watermark: Some(it.high_watermark),
            committed: it.committed,
            ..ReadRequest::new(it.position, READ_BYTES)
        };
        it.is_asked = true;
        self.ask(client, it.group, broker, Request::Read(request), 0, None);
        None
    }

    fn on_asker(&mut self, client: usize, group: usize) -> Option<Duration> {
        if self.stops_sending {
            return None;
        }
        let broker = self.random.index(self.plan.brokers);
        let asked = self.history.ask(self.logs[group], Mark::HighWatermark, View::Fresh);
        self.ask(client, group, broker, Request::HighWatermark, 0, Some(asked));
        Some(self.random.millis(100, 1_000))
    }

    pub(crate) fn ask(
        &mut self,
        client: usize,
        group: usize,
        broker: usize,
        request: Request,
        sequence: i32,
        asked: Option<Asked>,
    ) {
        self.ask_with(client, group, broker, request, sequence, asked, None);
    }

    #[expect(clippy::too_many_arguments, reason = "one operation, told apart field by field")]
    fn ask_with(
        &mut self,
        client: usize,
        group: usize,
        broker: usize,
        request: Request,
        sequence: i32,
        asked: Option<Asked>,
        next_of: Option<u64>,
    ) {
        let operation = self.new_number();
        self.operations.insert(operation, Operation { client, group, broker, next_of, sequence, asked });
        let deliveries = self.network.deliveries(Node::Clients, Node::Broker(broker), self.now);
        if self.group_of_request(&request).is_some() {
            let mut arrivals: Vec<_> = deliveries.all().collect();
            if !self.is_healing && self.random.one_in(30) {
                // A connection that was given up delivers what it has.
                arrivals.push(self.now + self.random.millis(50, 8_000));
            }
            for at in arrivals {
                self.schedule_at(at, Event::Request { broker, operation, request: request.clone() });
            }
        } else if let Some(at) = deliveries.once() {
            self.schedule_at(at, Event::Request { broker, operation, request });
        }
        self.schedule(PATIENCE, Event::Answer { operation, answer: Answer::Lost });
    }

    /// A request reached a broker.
    pub(crate) fn on_request(&mut self, broker: usize, operation: u64, request: Request) {
        // What is of transactions counts whenever it comes, whoever waits for it still.
        let asked = self.operations.get(&operation).map(|it| it.group);
        let Some(group) = asked.or_else(|| self.group_of_request(&request)) else { return };
        if self.brokers[broker].is_paused {
            self.held[broker].push(Event::Request { broker, operation, request });
            return;
        }
        let tp = self.groups[group].tp;
        let it = &self.brokers[broker];
        // Whoever was given up does not know it yet; its clients do.
        let is_given_up = self.groups[group].recovered.is_some() && {
            let local = it.running.as_ref().and_then(|running| running.replicas.get(&tp));
            local.is_none_or(|local| self.groups[group].places().all(|place| place.replica != local.replica))
        };
        let (Some(running), Some(handle), false) = (&it.running, it.handle(tp), is_given_up) else {
            self.schedule(Duration::from_micros(200), Event::Answer { operation, answer: Answer::NotTaken });
            return;
        };
        match request {
            Request::Produce { batch, header, acks } => {
                let reply = running.outbox.reply(move |it| Out::Answered { operation, answer: Answer::Produced(it) });
                handle.produce(batch, header, acks, Permit::unbounded(), reply);
            }
            Request::Read(request) => {
                let reply = running.outbox.reply(move |it| Out::Answered { operation, answer: Answer::Read(it) });
                handle.read(request, reply);
            }
            Request::LogStart => {
                let reply = running.outbox.reply(move |it: Result<Option<_>, Error>| {
                    let found = it.map(|found: Option<flowstone_replication::FoundOffset>| {
                        found.map_or(Offset::ZERO, |found| found.offset)
                    });
                    Out::Answered { operation, answer: Answer::HighWatermark(found) }
                });
                handle.list_offset(OffsetQuery::Start, reply);
            }
            Request::HighWatermark => {
                let reply =
                    running.outbox.reply(move |it| Out::Answered { operation, answer: Answer::HighWatermark(it) });
                handle.read_index(reply);
            }
            Request::Transact { id, batch, header, .. } => self.on_transact(broker, operation, tp, id, batch, header),
            Request::Ask(ask) => self.on_ask(broker, operation, tp, &ask),
            Request::Trim(to) => {
                let reply = running.outbox.reply(move |it| Out::Answered { operation, answer: Answer::Trimmed(it) });
                handle.trim(TrimTo::Offset(to), reply);
            }
        }
        self.note("request", &[broker as u64, operation], || format!("broker {}: {operation}", broker_id(broker)));
        self.after(broker);
    }

    /// A client is answered, or has waited long enough.
    pub(crate) fn on_answer(&mut self, number: u64, answer: Answer) {
        let Some(operation) = self.operations.remove(&number) else { return };
        let client = operation.client;
        let mut it = std::mem::replace(&mut self.clients[client], Client::Asker { group: 0 });
        let again = match (&mut it, answer) {
            (Client::Producer(producer), answer) => self.on_produced(producer, &operation, answer),
            (Client::Reader(reader), answer) => self.on_read(client, reader, &operation, answer),
            (Client::Transactor(it), answer) => self.on_transacted(client, it, &operation, answer),
            (Client::Member(it), answer) => self.on_membered(client, it, &operation, answer),
            (Client::Script { answer: heard }, answer) => {
                *heard = Some(answer);
                None
            }
            (Client::KeyedWriter(it), answer) => self.on_keyed_written(it, &operation, answer),
            (Client::KeyedReader(it), answer) => self.on_keyed_read(it, &operation, answer),
            (Client::Asker { .. }, Answer::HighWatermark(Ok(offset))) => {
                if let Some(asked) = operation.asked {
                    self.history.told(asked, offset);
                }
                self.counts.linearizable_reads += 1;
                self.note("asked", &[offset.get() as u64], || format!("high watermark {offset}"));
                None
            }
            (Client::Trimmer { .. }, Answer::Trimmed(Ok(to))) => {
                self.counts.trims += 1;
                self.note("trimmed", &[to.get() as u64], || format!("log start {to}"));
                None
            }
            _ => None,
        };
        self.clients[client] = it;
        if let Some(again) = again {
            self.turn_after(client, again);
        }
    }

    fn on_produced(&mut self, it: &mut Producer, operation: &Operation, answer: Answer) -> Option<Duration> {
        let sequence = operation.sequence;
        let at = it.in_flight.iter().position(|pending| pending.sequence == sequence)?;
        match answer {
            Answer::Produced(Ok(produced)) => {
                let pending = it.in_flight.remove(at)?;
                if pending.tries > 1 {
                    self.counts.answered_again += 1;
                }
                for (number, &value) in pending.values.iter().enumerate() {
                    self.history.acknowledged(value, produced.base_offset.plus(number as i64), self.now);
                }
                self.counts.acknowledged += 1;
                let base_offset = produced.base_offset;
                self.note("acked", &[base_offset.get() as u64, sequence as u64], || {
                    format!("group {}: producer {} sequence {sequence} at {base_offset}", it.group, it.id)
                });
                Some(Duration::from_micros(100))
            }
            other => {
                let why = match &other {
                    Answer::Produced(Err(error)) => format!("{:?}", error.code),
                    other => format!("{other:?}"),
                };
                let number = why.bytes().map(u64::from).sum();
                self.note("refused", &[sequence as u64, number], || {
                    format!(
                        "group {}: producer {} sequence {sequence} by broker {}: {why}",
                        it.group,
                        it.id,
                        operation.broker + 1
                    )
                });
                if let Answer::Produced(Err(error)) = &other
                    && error.code == ErrorCode::DuplicateSequence
                {
                    self.fail(&format!(
                        "producer {}'s batch {sequence} is refused as long known, and was never acknowledged: {error}",
                        it.id
                    ));
                }
                // Whoever does not lead any more, or is gone: another one is asked.
                it.believes = self.other_broker(it.group, operation.broker);
                if it.kind.idempotent {
                    let wait = self.random.millis(5, 150);
                    let pending = &mut it.in_flight[at];
                    pending.is_asked = false;
                    pending.retry_at = self.now + wait;
                    return Some(wait);
                }
                let pending = it.in_flight.remove(at)?;
                self.counts.unknown += 1;
                for value in pending.values {
                    if matches!(other, Answer::NotTaken) {
                        self.history.failed(value);
                    } else {
                        self.history.unknown(value);
                    }
                }
                Some(Duration::from_millis(5))
            }
        }
    }

    /// Some broker that has a replica, rather another one.
    pub(crate) fn other_broker(&mut self, group: usize, than: usize) -> usize {
        let brokers: Vec<_> =
            self.groups[group].places().map(|place| place.broker).filter(|&broker| broker != than).collect();
        // Before the topic exists anybody may be asked.
        self.random.pick(&brokers).copied().unwrap_or_else(|| self.random.index(self.brokers.len()))
    }

    fn on_read(&mut self, client: usize, it: &mut Reader, operation: &Operation, answer: Answer) -> Option<Duration> {
        it.is_asked = false;
        match answer {
            Answer::Read(Ok(answer)) => {
                let progress = self.take_read(it, operation.broker, &answer);
                if !progress && !it.any_replica && self.random.one_in(20) {
                    it.believes = self.other_broker(it.group, operation.broker);
                }
                Some(if progress { self.random.millis(1, 30) } else { self.random.millis(20, 200) })
            }
            Answer::HighWatermark(Ok(log_start)) => {
                let log_start = log_start.max(it.position);
                self.history.assigned(it.reader, self.logs[it.group], log_start);
                it.position = log_start;
                it.last_epoch = None;
                Some(Duration::from_millis(5))
            }
            Answer::Read(Err(error)) if error.code == ErrorCode::OffsetOutOfRange => {
                if it.position.get() >= self.groups[it.group].trimmed_to {
                    let position = it.position;
                    self.fail(&format!("a reader at offset {position} of group {} is told: {error}", it.group));
                }
                // Where the log begins, its leader says.
                let broker = self.leader_of(it.group).unwrap_or(operation.broker);
                it.is_asked = true;
                self.ask(client, it.group, broker, Request::LogStart, 0, None);
                None
            }
            Answer::Read(Err(error)) if error.code == ErrorCode::LogDiverged => {
                self.fail(&format!("a reader of what was committed is told: {error}"));
                None
            }
            other => {
                self.note("no read", &[operation.broker as u64], || match &other {
                    Answer::Read(Err(error)) => error.to_string(),
                    _ => "no answer".to_owned(),
                });
                it.believes = self.other_broker(it.group, operation.broker);
                Some(self.random.millis(20, 200))
            }
        }
    }

    /// Whether what was read is what was written. Where it is not, the service tells its client to ask again, and the replica
    /// to look at its files.
    pub(crate) fn is_undamaged(&mut self, group: usize, broker: usize, answer: &ReadAnswer) -> bool {
        let Err(error) = answer.bytes.verify() else { return true };
        self.note("rotten", &[broker as u64], || error.to_string());
        if let ReadError::Corrupt { offset, .. } = &error
            && let Some(handle) = self.brokers[broker].handle(self.groups[group].tp)
        {
            handle.found_corrupt(*offset);
            self.counts.rotten_reads += 1;
            self.after(broker);
        }
        false
    }

    /// Whether it got on.
    fn take_read(&mut self, it: &mut Reader, broker: usize, answer: &ReadAnswer) -> bool {
        // A leader that does not know yet that it is none any more tells what it knows: like a client, a reader forgets
        // nothing that it was told before. (That of one replica never goes back: see the invariants.)
        it.high_watermark = it.high_watermark.max(answer.high_watermark);
        if !self.is_undamaged(it.group, broker, answer) {
            it.believes = self.other_broker(it.group, broker);
            return false;
        }
        let before = it.position;
        let mut aborted = Aborted::of(answer);
        for chunk in &answer.bytes.chunks {
            for batch in split_batches(chunk.clone()) {
                let Ok((header, bytes)) = batch else {
                    self.fail("a read gives half a batch");
                    return false;
                };
                let is_aborted = it.committed && aborted.has(&header, &bytes);
                self.take_batch(it, &header, bytes, is_aborted);
            }
        }
        // Another replica may have told it more before.
        if it.position > before.max(answer.high_watermark) {
            let (position, high_watermark) = (it.position, answer.high_watermark);
            self.fail(&format!("a reader is given records up to {position} above the high watermark {high_watermark}"));
        }
        if it.committed && it.position > before.max(answer.last_stable_offset) {
            let (position, stable) = (it.position, answer.last_stable_offset);
            self.fail(&format!(
                "a reader of what is committed is given records up to {position}, and stable is {stable}"
            ));
        }
        self.note("read", &[broker as u64, it.position.get() as u64], || {
            format!(
                "group {}, reader {:?}: up to {} of {} from broker {}",
                it.group,
                it.reader,
                it.position,
                it.high_watermark,
                broker_id(broker)
            )
        });
        it.position > before
    }

    fn take_batch(&mut self, it: &mut Reader, header: &BatchHeader, bytes: Bytes, is_aborted: bool) {
        let log: LogId = self.logs[it.group];
        it.last_epoch = Some(header.leader_epoch);
        let next = header.next_offset();
        if header.base_offset > it.position {
            let (from, to) = (it.position, header.base_offset);
            self.fail(&format!("a reader at offset {from} is given a batch from {to} on"));
        }
        if is_aborted && !header.attributes.is_control() {
            self.counts.aborted_batches_passed += 1;
        }
        if header.attributes.is_control() || is_aborted {
            self.history.read_past(it.reader, log, next);
            it.position = it.position.max(next);
            return;
        }
        let Ok(all) = records(bytes, 1 << 20) else {
            self.fail("a batch that was read is none");
            return;
        };
        for (number, record) in all.enumerate() {
            let offset = header.base_offset.plus(number as i64);
            if offset < it.position {
                continue;
            }
            let value = record.ok().and_then(|record| record.value).unwrap_or_default();
            let observed = match self.run_id().decode(value.as_ref()) {
                Ok(value) => Observed::Value(value),
                Err(what) => Observed::Phantom(what.to_string()),
            };
            self.history.read(it.reader, log, offset, observed);
            if it.any_replica {
                self.counts.follower_reads += 1;
            }
            it.position = offset.next();
        }
        it.position = it.position.max(next);
    }

    /// A group went on without its majority, from `end` on: whoever writes or reads begins anew there. A client is told so by
    /// an unknown producer id and by a log that diverged; here all are told at once, and what they asked is forgotten.
    pub(crate) fn on_recovered(&mut self, group: usize, end: Offset) {
        self.operations.retain(|_, operation| operation.group != group);
        let mut clients = std::mem::take(&mut self.clients);
        for (number, client) in clients.iter_mut().enumerate() {
            match client {
                Client::Producer(it) if it.group == group => {
                    for pending in it.in_flight.drain(..) {
                        self.counts.unknown += 1;
                        for value in pending.values {
                            self.history.unknown(value);
                        }
                    }
                    if it.id >= 0 {
                        it.id += 1_000;
                        it.sender = self.history.sender(it.kind);
                    }
                    (it.next_sequence, it.next_number) = (0, 0);
                }
                Client::Reader(it) if it.group == group => {
                    it.is_asked = false;
                    it.high_watermark = Offset::ZERO;
                    it.last_epoch = None;
                    if it.position > end {
                        it.position = end;
                        self.history.assigned(it.reader, self.logs[group], end);
                    }
                }
                _ => {}
            }
            self.turn_after(number, Duration::from_millis(10));
        }
        self.clients = clients;
    }

    /// Reads every replica from its log start to the high watermark.
    pub(crate) fn read_everything(&mut self) {
        for group in 0..self.plan.groups {
            let tp = self.groups[group].tp;
            let Some(leader) = self.leader_of(group) else { continue };
            let Some(until) = self.brokers[leader].handle(tp).map(|handle| handle.status().high_watermark) else {
                continue;
            };
            let brokers: Vec<_> = self.groups[group].wanted.iter().map(|place| place.broker).collect();
            for broker in brokers {
                self.add_reader(group, true, false, Some(broker), Some(until));
            }
            if self.plan.transactional_ids > 0 {
                // The last stable offset is where nothing is open any more: at the end.
                self.add_reader(group, true, true, Some(leader), Some(until));
            }
        }
        self.read_keyed();
        let until = self.now + Duration::from_secs(60);
        if !self.run_until(until, |world| world.clients.iter().all(Client::is_done)) && self.broken().is_none() {
            let waiting: Vec<_> = self.clients.iter().filter(|it| !it.is_done()).map(Client::describe).collect();
            let waiting = format!("{waiting:?}");
            self.fail(&format!("stuck: everything was to be read, and still waiting are {waiting}"));
        }
    }
}
