//! Transactions between brokers: partitions are added to them before they are written to, and coordinators have markers
//! written. What is due, whose turn it is and what a refusal means is decided by the broker's own code; here is the way
//! between brokers, on which everything comes late, again, or never.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use flowstone_broker::simulation::{Answered, Command, EndTurn, Joining, TransactionDuty};
use flowstone_protocol::{BatchHeader, Error, ErrorCode, Marker, ProducerEpoch, ProducerId, TopicPartition};
use flowstone_replication::{Acks, Permit};

use super::broker::{View, broker_id};
use super::clients::Request;
use super::group_coordinators::Committing;
use super::groups::Kind;
use super::network::Node;
use super::outbox::{Answer, Commanded, Out};
use super::world::{Event, World};

/// How long a broker waits for another one's answer.
const CALL_MAX: Duration = Duration::from_millis(1_500);
/// How long a broker tries to add a partition for a producer.
pub(crate) const ADD_MAX: Duration = Duration::from_secs(3);
/// After this time an open transaction is aborted.
const TRANSACTION_TIMEOUT: Duration = Duration::from_millis(2_500);

/// What a client asks of a coordinator.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    Init {
        id: String,
    },
    End {
        id: String,
        owner: (ProducerId, ProducerEpoch),
        commit: bool,
    },
    /// An operator does.
    Abort {
        id: String,
    },
    Join(Joining),
    Report {
        member: String,
        epoch: i32,
        owned: Vec<TopicPartition>,
    },
    Leave {
        member: String,
        keep_place: bool,
    },
    Commit(Committing),
    /// Offsets that are too old go.
    Expire,
    /// What a group has committed.
    Fetch {
        tp: TopicPartition,
    },
}

impl Ask {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Init { .. } | Self::End { .. } | Self::Abort { .. } => Kind::Transactions,
            _ => Kind::Groups,
        }
    }

    /// Whether it may come at any time, and more than once. What members say otherwise comes in order, over a stream of
    /// their own.
    fn may_come_late(&self) -> bool {
        match self {
            Self::Init { .. } | Self::End { .. } | Self::Abort { .. } | Self::Report { .. } => true,
            Self::Commit(committing) => committing.transaction.is_some(),
            Self::Join(_) | Self::Leave { .. } | Self::Fetch { .. } | Self::Expire => false,
        }
    }
}

/// What one broker wants of another.
#[derive(Debug, Clone)]
pub(crate) enum Errand {
    /// The partition is in the transaction from now on.
    Add { id: String, owner: (ProducerId, ProducerEpoch), tp: TopicPartition, group: Option<String> },
    /// The transaction has ended, in this partition.
    Mark { tp: TopicPartition, marker: Marker },
}

/// What a broker does once its errand is done.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// Appends the batch.
    Write { operation: u64, tp: TopicPartition, batch: Bytes, header: BatchHeader, until: Duration },
    /// Tells the group.
    Commit { operation: u64, tp: TopicPartition, committing: Committing, until: Duration },
    /// Goes on ending the transaction.
    Marked { turn: u64, tp: TopicPartition },
}

/// What a broker has under way.
#[derive(Debug, Default)]
pub(crate) struct Transacting {
    duty: TransactionDuty,
    errands: BTreeMap<u64, (Errand, Purpose)>,
    /// Tries to end something, with the partitions whose answer is awaited.
    turns: BTreeMap<u64, (EndTurn, BTreeSet<TopicPartition>)>,
    /// Transactions that a partition is known to be in.
    added: BTreeMap<(TopicPartition, ProducerId), ProducerEpoch>,
    /// When it looks again, if that is planned.
    looks_at: Option<Duration>,
}

/// Whether another broker, or the same one later, may say something else: it has lost its place, or its disk is ill.
pub(crate) fn may_pass(error: &Error) -> bool {
    error.is_retriable() || matches!(error.code, ErrorCode::Quarantined | ErrorCode::StorageFailed)
}

pub(crate) fn nobody_there() -> Error {
    Error::new(ErrorCode::NotLeader, "nobody leads there; ask another one")
}

impl World {
    /// Gives a transactional batch to a broker: its partition is added to the transaction first.
    pub(crate) fn on_transact(
        &mut self,
        broker: usize,
        operation: u64,
        tp: TopicPartition,
        id: String,
        batch: Bytes,
        header: BatchHeader,
    ) {
        let owner = (header.producer_id, header.producer_epoch);
        let Some(running) = &self.brokers[broker].running else { return };
        if running.transacting.added.get(&(tp, owner.0)) == Some(&owner.1) {
            return self.append(broker, operation, tp, batch, header);
        }
        let until = self.now + ADD_MAX;
        let purpose = Purpose::Write { operation, tp, batch, header, until };
        self.errand(broker, Errand::Add { id, owner, tp, group: None }, purpose, Duration::ZERO);
    }

    fn append(&mut self, broker: usize, operation: u64, tp: TopicPartition, batch: Bytes, header: BatchHeader) {
        let it = &self.brokers[broker];
        let (Some(running), Some(handle)) = (&it.running, it.handle(tp)) else {
            self.answer(broker, operation, Answer::Produced(Err(nobody_there())));
            return;
        };
        let reply = running.outbox.reply(move |it| Out::Answered { operation, answer: Answer::Produced(it) });
        handle.produce(batch, header, Acks::Quorum, Permit::unbounded(), reply);
    }

    /// A broker answers a client by itself.
    pub(crate) fn answer(&mut self, broker: usize, operation: u64, answer: Answer) {
        if let Some(at) = self.network.deliveries(Node::Broker(broker), Node::Clients, self.now).once() {
            self.schedule_at(at, Event::Answer { operation, answer });
        }
    }

    /// A number as brokers draw them for producer ids.
    fn fresh(&mut self) -> ProducerId {
        ProducerId::new((self.random.next() >> 1) as i64)
    }

    /// A client's question reached a broker, which may coordinate what it is about.
    pub(crate) fn on_ask(&mut self, broker: usize, operation: u64, tp: TopicPartition, ask: &Ask) {
        let fresh = self.fresh();
        let command = match ask {
            Ask::Init { id } => Command::init_transactions(id, TRANSACTION_TIMEOUT, fresh),
            Ask::End { id, owner, commit } => Command::end_transaction(id, *owner, *commit, fresh),
            Ask::Abort { id } => Command::abort_transaction(id, fresh),
            _ => return self.on_group_ask(broker, operation, tp, ask),
        };
        let it = &self.brokers[broker];
        let (Some(running), Some(handle)) = (&it.running, it.handle(tp)) else { return };
        handle.command(command, running.outbox.reply(move |result| Out::Asked { operation, result }));
    }

    pub(crate) fn on_asked(&mut self, broker: usize, operation: u64, result: Commanded) {
        let result = result.and_then(|answer| answer).map(|answer| answer.told());
        if matches!(result, Ok(Answered::Producer { .. } | Answered::Busy | Answered::Done)) {
            self.coordinates_after(broker, Duration::from_micros(500));
        }
        if matches!(result, Ok(Answered::Joined(_))) {
            self.coordinate_groups(broker);
        }
        self.answer(broker, operation, Answer::Asked(result));
    }

    // ---- errands ---------------------------------------------------------------------------------------------------

    pub(crate) fn errand(&mut self, broker: usize, errand: Errand, purpose: Purpose, after: Duration) {
        let number = self.new_number();
        let it = &mut self.brokers[broker];
        let life = it.life;
        let Some(running) = &mut it.running else { return };
        running.transacting.errands.insert(number, (errand, purpose));
        self.schedule(after, Event::ErrandBegins { broker, life, number });
    }

    /// The broker sends it to whom it believes to lead.
    pub(crate) fn on_errand_begins(&mut self, broker: usize, life: u64, number: u64) {
        if self.brokers[broker].life != life || self.is_held(broker, || Event::ErrandBegins { broker, life, number }) {
            return;
        }
        let Some(running) = &self.brokers[broker].running else { return };
        let Some((errand, _)) = running.transacting.errands.get(&number) else { return };
        let errand = errand.clone();
        let tp = match &errand {
            Errand::Add { .. } => {
                let group = self.group_with(Kind::Transactions).unwrap_or_else(|| self.metadata());
                self.groups[group].tp
            }
            Errand::Mark { tp, .. } => *tp,
        };
        let group = self.group_of(tp);
        let leader = self.leader_of(group).filter(|_| !self.random.one_in(15));
        let to = leader.unwrap_or_else(|| self.other_broker(group, broker));
        self.note("errand", &[broker as u64, to as u64, number], || {
            format!("broker {} to {}: {number} {errand:?}", broker_id(broker), broker_id(to))
        });
        let event = |errand: &Errand| Event::Errand { to, from: broker, life, number, errand: errand.clone() };
        if to == broker {
            self.schedule(Duration::from_micros(1), event(&errand));
        } else {
            for at in self.network.deliveries(Node::Broker(broker), Node::Broker(to), self.now).all() {
                self.schedule_at(at, event(&errand));
            }
        }
        // One of a connection that was believed to be gone.
        if !self.is_healing && self.random.one_in(10) {
            let late = self.random.millis(20, 6_000);
            self.schedule(late, event(&errand));
        }
        let result = Err(Error::new(ErrorCode::TimedOut, "no answer; try again"));
        self.schedule(CALL_MAX, Event::ErrandDone { broker, life, number, result });
    }

    pub(crate) fn on_errand(&mut self, to: usize, from: usize, life: u64, number: u64, errand: Errand) {
        if self.brokers[to].is_paused {
            self.held[to].push(Event::Errand { to, from, life, number, errand });
            return;
        }
        let at = match &errand {
            Errand::Add { .. } => self.group_with(Kind::Transactions).map(|group| self.groups[group].tp),
            Errand::Mark { tp, .. } => Some(*tp),
        };
        let it = &self.brokers[to];
        let (Some(running), Some(handle)) = (&it.running, at.and_then(|tp| it.handle(tp))) else {
            return self.send_errand_done(to, from, life, number, Err(nobody_there()));
        };
        match errand {
            Errand::Add { id, owner, tp, group } => {
                let command = Command::add_to_transaction(&id, owner, tp, group.as_deref());
                let reply = running.outbox.reply(move |result: Commanded| {
                    let result = result.and_then(|answer| answer).and_then(|answer| match answer.told() {
                        Answered::Added(mut results) => results.pop().unwrap_or(Ok(())),
                        told => unreachable!("an addition is answered with {told:?}"),
                    });
                    Out::ErrandDone { to: from, life, number, result }
                });
                handle.command(command, reply);
            }
            Errand::Mark { tp, marker } if Kind::of(tp.topic) == Kind::Groups => {
                let reply =
                    running.outbox.reply(move |result| Out::EndPending { to: from, life, number, marker, result });
                handle.command(Command::end_pending(&marker), reply);
            }
            Errand::Mark { marker, .. } => {
                let reply = running.outbox.reply(move |result| Out::ErrandDone { to: from, life, number, result });
                handle.marker(marker, reply);
            }
        }
        self.after(to);
    }

    /// A group coordinator has done a piece of the end of a transaction.
    pub(crate) fn on_end_pending(
        &mut self,
        broker: usize,
        to: usize,
        life: u64,
        number: u64,
        marker: &Marker,
        result: Commanded,
    ) {
        let result = match result.and_then(|answer| answer).map(|answer| answer.told()) {
            Ok(Answered::More) => {
                let Some(tp) = self.group_with(Kind::Groups).map(|group| self.groups[group].tp) else { return };
                let it = &self.brokers[broker];
                let (Some(running), Some(handle)) = (&it.running, it.handle(tp)) else { return };
                let marker = *marker;
                let reply = running.outbox.reply(move |result| Out::EndPending { to, life, number, marker, result });
                return handle.command(Command::end_pending(&marker), reply);
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        self.send_errand_done(broker, to, life, number, result);
    }

    pub(crate) fn send_errand_done(
        &mut self,
        broker: usize,
        to: usize,
        life: u64,
        number: u64,
        result: Result<(), Error>,
    ) {
        let at = match broker == to {
            true => Some(self.now + Duration::from_micros(1)),
            false => self.network.deliveries(Node::Broker(broker), Node::Broker(to), self.now).once(),
        };
        if let Some(at) = at {
            self.schedule_at(at, Event::ErrandDone { broker: to, life, number, result });
        }
    }

    pub(crate) fn on_errand_done(&mut self, broker: usize, life: u64, number: u64, result: Result<(), Error>) {
        if self.brokers[broker].life != life {
            return;
        }
        if self.brokers[broker].is_paused {
            self.held[broker].push(Event::ErrandDone { broker, life, number, result });
            return;
        }
        let Some(running) = &mut self.brokers[broker].running else { return };
        let known = running.transacting.errands.remove(&number);
        match &result {
            Err(error) if matches!(error.code, ErrorCode::ProducerFenced | ErrorCode::NotCoordinator) => {
                self.counts.errands_refused += 1;
            }
            Err(error) if error.code == ErrorCode::TimedOut => {}
            // Its answer came before.
            _ => self.counts.errands_repeated += u64::from(known.is_none()),
        }
        let Some((errand, purpose)) = known else { return };
        self.note("errand done", &[broker as u64, number, u64::from(result.is_ok())], || {
            format!("broker {}: {number}: {result:?}", broker_id(broker))
        });
        match purpose {
            Purpose::Write { operation, tp, batch, header, until } => match result {
                Ok(()) => {
                    self.counts.partitions_added += 1;
                    let Some(running) = &mut self.brokers[broker].running else { return };
                    running.transacting.added.insert((tp, header.producer_id), header.producer_epoch);
                    self.append(broker, operation, tp, batch, header);
                }
                Err(error) if may_pass(&error) && self.now < until => {
                    let purpose = Purpose::Write { operation, tp, batch, header, until };
                    let pause = self.random.millis(2, 100);
                    self.errand(broker, errand, purpose, pause);
                }
                Err(error) => self.answer(broker, operation, Answer::Produced(Err(error))),
            },
            Purpose::Commit { operation, tp, committing, until } => match result {
                Ok(()) => {
                    self.counts.partitions_added += 1;
                    self.commit_added(broker, operation, tp, &committing);
                }
                Err(error) if may_pass(&error) && self.now < until => {
                    let purpose = Purpose::Commit { operation, tp, committing, until };
                    let pause = self.random.millis(2, 100);
                    self.errand(broker, errand, purpose, pause);
                }
                Err(error) => self.answer(broker, operation, Answer::Asked(Err(error))),
            },
            Purpose::Marked { turn, tp } => self.on_marked(broker, turn, tp, &result),
        }
        self.after(broker);
    }

    // ---- the coordinator -------------------------------------------------------------------------------------------

    fn coordinates_after(&mut self, broker: usize, after: Duration) {
        let it = &mut self.brokers[broker];
        let (at, life) = (self.now + after, it.life);
        let Some(running) = &mut it.running else { return };
        let planned = &mut running.transacting.looks_at;
        if planned.is_none_or(|planned| planned <= self.now || at < planned) {
            *planned = Some(at);
            self.schedule_at(at, Event::Coordinate { broker, life });
        }
    }

    /// What a broker does for the transactions that it coordinates; `is_time`: its clock is looked at, too.
    pub(crate) fn coordinate(&mut self, broker: usize, is_time: bool) {
        let Some(group) = self.group_with(Kind::Transactions) else { return };
        let tp = self.groups[group].tp;
        let forgets = self.random.one_in(8);
        let mut fresh = self.random.clone();
        self.random.next();
        let it = &mut self.brokers[broker];
        it.clock.set(self.now);
        let (now, wall) = (it.clock.now(), it.clock.wall());
        let Some(running) = &mut it.running else { return };
        let local = running.replicas.get(&tp);
        let led = local.and_then(|local| {
            let status = local.handle.as_ref()?.status();
            let View::Transactions(view) = &local.view else { return None };
            status.is_ready().then(|| (local, view.clone(), status.leader_epoch()))
        });
        let mut turns = Vec::new();
        while let Some(turn) = running.transacting.duty.begin_due(now) {
            turns.push(turn);
        }
        let mut epoch = None;
        if let Some((local, view, leads)) = led {
            epoch = Some(leads);
            if is_time && let Some(handle) = &local.handle {
                let fresh = || ProducerId::new((fresh.next() >> 1) as i64);
                for command in TransactionDuty::due(&view, wall, forgets, fresh) {
                    handle.command(command, running.outbox.reply(|result| Out::Commanded { result }));
                }
            }
            turns.extend(running.transacting.duty.begin(tp, leads, &view));
        }
        let begun: Vec<EndTurn> = turns
            .into_iter()
            .filter(|turn| {
                let is_own = epoch.is_some_and(|epoch| turn.coordinator() == (tp, epoch));
                if !is_own {
                    // Whoever coordinates it now goes on.
                    running.transacting.duty.ended(turn);
                }
                is_own
            })
            .collect();
        let due = running.transacting.duty.next_due().map(|due| it.clock.moment_of(due).saturating_sub(self.now));
        for turn in begun {
            self.begin_turn(broker, turn);
        }
        if let Some(after) = due {
            self.coordinates_after(broker, after.max(Duration::from_micros(50)));
        }
    }

    fn begin_turn(&mut self, broker: usize, turn: EndTurn) {
        let number = self.new_number();
        let (left, marker) = (turn.left().clone(), turn.marker());
        let Some(running) = &mut self.brokers[broker].running else { return };
        running.transacting.turns.insert(number, (turn, left.clone()));
        if left.is_empty() {
            return self.end_turn(broker, number);
        }
        for tp in left {
            self.errand(broker, Errand::Mark { tp, marker }, Purpose::Marked { turn: number, tp }, Duration::ZERO);
        }
    }

    fn on_marked(&mut self, broker: usize, turn: u64, tp: TopicPartition, result: &Result<(), Error>) {
        let Some(running) = &mut self.brokers[broker].running else { return };
        let Some((ending, awaited)) = running.transacting.turns.get_mut(&turn) else { return };
        ending.take(tp, result);
        awaited.remove(&tp);
        let is_over = awaited.is_empty();
        if let Err(error) = result
            && error.code == ErrorCode::InvalidTransactionState
        {
            self.fail(&format!("{tp}: a transaction is ended otherwise than it was decided: {error}"));
        }
        if is_over {
            self.end_turn(broker, turn);
        }
    }

    /// Every partition has answered: the coordinator notes that it is done, or tries again later.
    fn end_turn(&mut self, broker: usize, number: u64) {
        let it = &mut self.brokers[broker];
        it.clock.set(self.now);
        let now = it.clock.now();
        let Some(running) = &mut it.running else { return };
        let Some((turn, _)) = running.transacting.turns.get(&number) else { return };
        let (tp, _) = turn.coordinator();
        let handle = running.replicas.get(&tp).and_then(|local| local.handle.as_ref());
        if let (true, Some(handle)) = (turn.left().is_empty(), handle) {
            let reply = running.outbox.reply(move |result: Commanded| {
                let is_written = matches!(result, Ok(Ok(_)));
                Out::Written { turn: number, is_written }
            });
            handle.command(turn.written(), reply);
            return;
        }
        if let Some((turn, _)) = running.transacting.turns.remove(&number) {
            running.transacting.duty.again(turn, now);
            self.coordinates_after(broker, Duration::from_millis(10));
        }
    }

    pub(crate) fn on_written(&mut self, broker: usize, number: u64, is_written: bool) {
        let it = &mut self.brokers[broker];
        it.clock.set(self.now);
        let now = it.clock.now();
        let Some(running) = &mut it.running else { return };
        let Some((turn, _)) = running.transacting.turns.remove(&number) else { return };
        if is_written {
            running.transacting.duty.ended(&turn);
        } else {
            running.transacting.duty.again(turn, now);
        }
        self.coordinates_after(broker, Duration::from_millis(1));
    }

    /// Where a request goes that nobody waits for any more.
    pub(crate) fn group_of_request(&self, request: &Request) -> Option<usize> {
        match request {
            Request::Transact { group, .. } => Some(*group),
            Request::Ask(ask) if ask.may_come_late() => self.group_with(ask.kind()),
            _ => None,
        }
    }
}
