//! Transactional producers: two to each transactional id, who fence one another, fall asleep in the middle of a
//! transaction, vanish, and go on as if nothing had happened. And what readers of committed records pass over.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use flowstone_broker::simulation::Answered;
use flowstone_checker::{Kind as Anomaly, SenderId, SenderKind, TransactionEnd, TransactionId, ValueId};
use flowstone_protocol::control::decode_marker;
use flowstone_protocol::{
    BatchHeader, Compression, Error, ErrorCode, Offset, ProducerEpoch, ProducerId, RecordBatchBuilder, Sequence,
};
use flowstone_replication::ReadAnswer;

use super::clients::{Client, Operation, Request};
use super::groups::Kind;
use super::outbox::Answer;
use super::transactions::{Ask, may_pass};
use super::world::World;

/// The place in an operation of what is asked of the coordinator, where a write has its number.
const OF_COORDINATOR: i32 = -1;
/// Of what nobody waits for.
const OF_NOBODY: i32 = -2;

/// See the module.
#[derive(Debug)]
pub(crate) struct Transactor {
    id: usize,
    /// Ends what is open at the end.
    keeper: bool,
    believes: usize,
    owner: Option<Owner>,
    open: Option<Open>,
    is_asking: bool,
    wakes_at: Duration,
    is_finished: bool,
}

#[derive(Debug, Clone, Copy)]
struct Owner {
    producer: ProducerId,
    epoch: ProducerEpoch,
    sender: SenderId,
}

/// A transaction as its producer knows it.
#[derive(Debug)]
struct Open {
    transaction: TransactionId,
    writes: Vec<Write>,
    /// Before this write it falls asleep.
    naps_before: Option<usize>,
    vanishes: bool,
    /// How it is to be ended.
    commits: bool,
    /// It is being ended so.
    ends: Option<bool>,
    /// It was asked to be ended when its producer had been fenced before.
    ended_when_fenced: bool,
    /// A commit was asked for: nobody knows what became of it.
    may_be_committed: bool,
}

#[derive(Debug)]
struct Write {
    group: usize,
    values: Vec<ValueId>,
    batch: Bytes,
    header: BatchHeader,
    believes: usize,
    is_asked: bool,
    is_done: bool,
    retry_at: Duration,
}

/// Who owns each transactional id, as far as its producers were told.
#[derive(Debug, Default)]
pub(crate) struct Fences {
    newest: BTreeMap<usize, (ProducerId, ProducerEpoch)>,
    senders: BTreeMap<usize, Vec<SenderId>>,
    fenced: Vec<SenderId>,
}

/// Transactions that were aborted, as one answer tells of them.
#[derive(Debug)]
pub(crate) struct Aborted {
    /// Those that begin further on, by first offset, the next one last.
    ahead: Vec<(Offset, ProducerId)>,
    within: Vec<ProducerId>,
}

impl Aborted {
    pub(crate) fn of(answer: &ReadAnswer) -> Self {
        let mut ahead: Vec<_> = answer.aborted.iter().map(|&(producer, first)| (first, producer)).collect();
        ahead.sort_unstable_by(|a, b| b.cmp(a));
        Self { ahead, within: Vec::new() }
    }

    /// Whether this batch, the next one in the log, belongs to an aborted transaction.
    pub(crate) fn has(&mut self, header: &BatchHeader, bytes: &Bytes) -> bool {
        while let Some((_, producer)) = self.ahead.pop_if(|(first, _)| *first < header.next_offset()) {
            if !self.within.contains(&producer) {
                self.within.push(producer);
            }
        }
        let is_within = header.attributes.is_transactional() && self.within.contains(&header.producer_id);
        if is_within && header.attributes.is_control() && decode_marker(bytes).is_ok_and(|marker| !marker.commit) {
            self.within.retain(|within| *within != header.producer_id);
        }
        is_within
    }
}

impl Transactor {
    pub(crate) fn describe(&self) -> String {
        format!("transactor of t{}: {:?}, owner {:?}, asking {}", self.id, self.open, self.owner, self.is_asking)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.open.is_none() && !self.is_asking && (self.is_finished || !self.keeper)
    }

    fn id(&self) -> String {
        format!("t{}", self.id)
    }
}

impl World {
    pub(crate) fn make_transactors(&mut self) {
        for id in 0..self.plan.transactional_ids {
            for keeper in [true, false] {
                let wakes_at = if keeper { Duration::ZERO } else { self.random.millis(2_000, 8_000) };
                let believes = self.random.index(self.plan.brokers);
                self.add_client(Client::Transactor(Transactor {
                    id,
                    keeper,
                    believes,
                    owner: None,
                    open: None,
                    is_asking: false,
                    wakes_at,
                    is_finished: false,
                }));
            }
        }
    }

    pub(crate) fn on_transactor(&mut self, client: usize, it: &mut Transactor) -> Option<Duration> {
        if it.is_asking {
            return None;
        }
        if self.stops_sending {
            it.wakes_at = Duration::ZERO;
            if it.open.as_ref().is_some_and(|open| !open.may_be_committed) {
                // Nobody ever asked for its commit, and nobody will.
                self.give_up(client, it, TransactionEnd::Aborted);
            }
            if it.open.is_none() {
                if it.keeper && !it.is_finished {
                    self.ask_coordinator(client, it, Ask::Init { id: it.id() });
                }
                return None;
            }
        }
        if it.wakes_at > self.now {
            return Some(it.wakes_at - self.now);
        }
        let Some(owner) = it.owner else {
            self.ask_coordinator(client, it, Ask::Init { id: it.id() });
            return None;
        };
        if !self.stops_sending && self.random.one_in(150) {
            self.interfere(client, it);
        }
        if it.open.is_none() {
            it.open = Some(self.new_transaction(&owner));
        }
        let open = it.open.as_mut()?;
        if let Some(commit) = open.ends {
            open.may_be_committed |= commit;
            open.ended_when_fenced = self.fences.fenced.contains(&owner.sender);
            if commit {
                self.history.committing(open.transaction);
            }
            let ask = Ask::End { id: it.id(), owner: (owner.producer, owner.epoch), commit };
            self.ask_coordinator(client, it, ask);
            return None;
        }
        if open.writes.iter().all(|write| write.is_done) {
            if open.vanishes {
                // Another process begins in its place, or nobody does, until the transaction's time is over.
                self.give_up(client, it, TransactionEnd::Aborted);
                it.owner = None;
                return Some(self.sleep(it, 50, 4_000));
            }
            open.ends = Some(open.commits);
            return Some(self.random.micros(100, 20_000));
        }
        self.write_on(client, it)
    }

    /// Sends what can be sent, one batch of each partition at a time.
    fn write_on(&mut self, client: usize, it: &mut Transactor) -> Option<Duration> {
        let id = it.id();
        let mut again = None;
        let open = it.open.as_mut()?;
        let mut busy: Vec<usize> = Vec::new();
        for at in 0..open.writes.len() {
            if open.naps_before == Some(at) {
                if open.writes[..at].iter().all(|write| write.is_done) {
                    open.naps_before = None;
                    return Some(self.sleep(it, 300, 6_000));
                }
                break;
            }
            let write = &mut open.writes[at];
            if write.is_done || busy.contains(&write.group) {
                continue;
            }
            busy.push(write.group);
            if write.is_asked {
                continue;
            }
            if write.retry_at > self.now {
                let left = write.retry_at - self.now;
                again = Some(again.map_or(left, |again: Duration| again.min(left)));
                continue;
            }
            write.is_asked = true;
            let (group, broker) = (write.group, write.believes);
            let request = Request::Transact { group, id: id.clone(), batch: write.batch.clone(), header: write.header };
            self.ask(client, group, broker, request, at as i32, None);
        }
        again
    }

    fn sleep(&mut self, it: &mut Transactor, from: u64, to: u64) -> Duration {
        let time = self.random.millis(from, to);
        it.wakes_at = self.now + time;
        time
    }

    fn ask_coordinator(&mut self, client: usize, it: &mut Transactor, ask: Ask) {
        let Some(group) = self.group_with(Kind::Transactions) else { return };
        it.is_asking = true;
        self.ask(client, group, it.believes, Request::Ask(ask), OF_COORDINATOR, None);
    }

    /// An operator aborts whatever is open.
    fn interfere(&mut self, client: usize, it: &Transactor) {
        let Some(group) = self.group_with(Kind::Transactions) else { return };
        self.ask(client, group, it.believes, Request::Ask(Ask::Abort { id: it.id() }), OF_NOBODY, None);
    }

    fn new_transaction(&mut self, owner: &Owner) -> Open {
        let transaction = self.history.transaction();
        let count = 1 + self.random.index(4);
        let mut sequences = vec![0; self.plan.groups];
        let mut writes = Vec::new();
        for _ in 0..count {
            let group = self.random.index(self.plan.groups);
            let records = 1 + self.random.below(2) as i32;
            let sequence = Sequence::new(sequences[group]);
            sequences[group] += records;
            let mut builder = RecordBatchBuilder::new(Compression::None)
                .producer(owner.producer, owner.epoch, sequence)
                .transactional();
            let mut values = Vec::new();
            for _ in 0..records {
                let value = self.history.send_in(transaction, owner.sender, self.logs[group], self.now);
                let bytes = self.random.index(100);
                let wall = self.brokers[0].clock.wall();
                let appended = builder.append(wall, None, Some(&self.run_id().encode(value, bytes)), []);
                appended.expect("a few records are far below any limit");
                values.push(value);
            }
            let batch = builder.build();
            let header = BatchHeader::parse(&batch).expect("just built");
            let believes = self.leader_of(group).unwrap_or_else(|| self.random.index(self.plan.brokers));
            let retry_at = self.now;
            writes.push(Write { group, values, batch, header, believes, is_asked: false, is_done: false, retry_at });
        }
        let naps_before = self.random.one_in(8).then(|| self.random.index(count + 1)).filter(|at| *at < count);
        Open {
            transaction,
            writes,
            naps_before,
            vanishes: self.random.one_in(20),
            commits: !self.random.one_in(6),
            ends: None,
            ended_when_fenced: false,
            may_be_committed: false,
        }
    }

    /// The transaction is over for its producer: what it waits for still, it does not wait for any more.
    fn give_up(&mut self, client: usize, it: &mut Transactor, end: TransactionEnd) {
        let Some(open) = it.open.take() else { return };
        it.is_asking = false;
        self.operations.retain(|_, operation| operation.client != client);
        for write in open.writes.iter().filter(|write| !write.is_done) {
            for &value in &write.values {
                self.history.unknown(value);
            }
        }
        match end {
            TransactionEnd::Committed => self.counts.transactions_committed += 1,
            TransactionEnd::Aborted => self.counts.transactions_aborted += 1,
            TransactionEnd::Unknown => {}
        }
        self.history.transaction_ended(open.transaction, end);
        self.note("transaction", &[it.id as u64, end as u64], || format!("t{}: {:?} {end:?}", it.id, open.transaction));
    }

    /// What is known of a transaction whose producer does not learn any more how it ended.
    fn unknown_end(open: &Option<Open>) -> TransactionEnd {
        match open {
            Some(open) if open.may_be_committed => TransactionEnd::Unknown,
            _ => TransactionEnd::Aborted,
        }
    }

    /// Another producer has its place, or an operator took it away.
    fn on_fenced(&mut self, client: usize, it: &mut Transactor) -> Option<Duration> {
        self.counts.producers_fenced += 1;
        self.give_up(client, it, Self::unknown_end(&it.open));
        it.owner = None;
        Some(self.sleep(it, 500, 5_000))
    }

    pub(crate) fn on_transacted(
        &mut self,
        client: usize,
        it: &mut Transactor,
        operation: &Operation,
        answer: Answer,
    ) -> Option<Duration> {
        match operation.sequence {
            OF_NOBODY => None,
            OF_COORDINATOR => {
                it.is_asking = false;
                self.on_coordinated(client, it, operation, answer)
            }
            at => self.on_wrote(client, it, operation, at as usize, answer),
        }
    }

    fn on_wrote(
        &mut self,
        client: usize,
        it: &mut Transactor,
        operation: &Operation,
        at: usize,
        answer: Answer,
    ) -> Option<Duration> {
        let now = self.now;
        let write = it.open.as_mut()?.writes.get_mut(at)?;
        write.is_asked = false;
        let error = match answer {
            Answer::Produced(Ok(produced)) => {
                write.is_done = true;
                for (number, &value) in write.values.iter().enumerate() {
                    self.history.acknowledged(value, produced.base_offset.plus(number as i64), now);
                }
                let (group, sequence, offset) = (write.group, write.header.base_sequence, produced.base_offset);
                self.note("wrote", &[it.id as u64, at as u64, offset.get() as u64], || {
                    format!("t{}: write {at}, sequence {sequence} of group {group}, at {offset}", it.id)
                });
                return Some(Duration::from_micros(100));
            }
            Answer::Produced(Err(error)) => Some(error),
            _ => None,
        };
        write.believes = self.leader_of(write.group).unwrap_or(operation.broker);
        if self.random.one_in(4) {
            write.believes = self.other_broker(write.group, operation.broker);
        }
        let Some(error) = error.filter(|error| !may_pass(error)) else {
            let wait = self.random.millis(5, 150);
            write.retry_at = now + wait;
            return Some(wait);
        };
        self.note("write refused", &[it.id as u64, at as u64], || format!("t{}: {error}", it.id));
        match error.code {
            ErrorCode::ProducerFenced => self.on_fenced(client, it),
            ErrorCode::TransactionAborted => {
                self.counts.transactions_timed_out += 1;
                self.spoil(it)
            }
            ErrorCode::UnknownTransaction => self.spoil(it),
            _ => {
                self.fail(&format!("t{}: a write in a transaction is refused: {error:?}", it.id));
                None
            }
        }
    }

    /// Nothing of it can count any more: it is aborted.
    fn spoil(&mut self, it: &mut Transactor) -> Option<Duration> {
        it.open.as_mut()?.ends = Some(false);
        Some(Duration::from_millis(1))
    }

    fn on_coordinated(
        &mut self,
        client: usize,
        it: &mut Transactor,
        operation: &Operation,
        answer: Answer,
    ) -> Option<Duration> {
        let ends = it.open.as_ref().and_then(|open| open.ends);
        let answer = match answer {
            Answer::Asked(answer) => answer,
            _ => Err(Error::new(ErrorCode::TimedOut, "nobody answered; try again")),
        };
        match (answer, ends) {
            (Ok(Answered::Producer { producer, epoch }), None) => {
                if self.stops_sending && it.keeper {
                    it.is_finished = true;
                    return None;
                }
                self.owns(it, producer, epoch);
                Some(self.random.micros(100, 50_000))
            }
            (Ok(Answered::Producer { producer, epoch }), Some(commit)) => {
                let owner = it.owner.as_mut()?;
                (owner.producer, owner.epoch) = (producer, epoch);
                let sender = owner.sender;
                if it.open.as_ref().is_some_and(|open| open.ended_when_fenced) {
                    let detail =
                        format!("a transaction of t{} was ended by sender {sender:?} after it was fenced", it.id);
                    self.history.report(Anomaly::ZombieAccepted, self.logs[0], None, detail);
                }
                self.give_up(client, it, if commit { TransactionEnd::Committed } else { TransactionEnd::Aborted });
                Some(self.random.millis(1, 300))
            }
            (Ok(_), _) => Some(self.random.millis(10, 200)),
            (Err(error), _) if may_pass(&error) => {
                if error.code != ErrorCode::ConcurrentTransactions {
                    let group = self.group_with(Kind::Transactions)?;
                    it.believes = self.other_broker(group, operation.broker);
                }
                if ends.is_some() && !self.stops_sending && self.random.one_in(40) {
                    // It gives up, and asks for a new identity.
                    self.give_up(client, it, Self::unknown_end(&it.open));
                    it.owner = None;
                }
                Some(self.random.millis(10, 200))
            }
            (Err(error), None) => {
                self.fail(&format!("t{}: no producer is given: {error:?}", it.id));
                None
            }
            (Err(error), Some(commit)) => match error.code {
                ErrorCode::ProducerFenced => self.on_fenced(client, it),
                ErrorCode::TransactionAborted if commit => {
                    self.counts.transactions_timed_out += 1;
                    if let Some(open) = &mut it.open {
                        // It was not committed, and never will be.
                        open.may_be_committed = false;
                    }
                    self.spoil(it)
                }
                ErrorCode::UnknownTransaction => {
                    self.give_up(client, it, Self::unknown_end(&it.open));
                    it.owner = None;
                    Some(self.random.millis(10, 200))
                }
                _ => {
                    self.fail(&format!("t{}: a transaction does not end: {error:?}", it.id));
                    None
                }
            },
        }
    }

    /// A producer was told that the transactional id is its own: whoever was told so before writes nothing any more.
    fn owns(&mut self, it: &mut Transactor, producer: ProducerId, epoch: ProducerEpoch) {
        let sender = self.history.sender(SenderKind::IDEMPOTENT);
        let newest = self.fences.newest.get(&it.id).copied();
        let fenced = match newest {
            // It was overtaken by the answer to its successor.
            Some((of, newest)) if of == producer && newest >= epoch => vec![sender],
            // Of two ids nobody knows which is the newer one.
            Some((of, _)) if of != producer => Vec::new(),
            _ => {
                self.fences.newest.insert(it.id, (producer, epoch));
                self.fences.senders.remove(&it.id).unwrap_or_default()
            }
        };
        for fenced in fenced {
            self.history.fenced(fenced);
            self.fences.fenced.push(fenced);
        }
        self.fences.senders.entry(it.id).or_default().push(sender);
        it.owner = Some(Owner { producer, epoch, sender });
    }
}
