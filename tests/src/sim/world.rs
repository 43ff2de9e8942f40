//! The cluster, its clients and its misfortunes, in one thread: a queue of events, each a function of the seed.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt::Display;
use std::time::{Duration, Instant};

use flowstone_checker::{History, LogId};
use flowstone_protocol::{Error, ErrorCode, Offset, RaftIndex, ReplicaId, Term};
use flowstone_replication::{GroupMessage, JobKind, PeerBody, PullAnswer, PullRequest, PullWhat, Reply, Role};
use flowstone_storage::sim_disk::Crash;

use flowstone_broker::simulation::METADATA;

use super::broker::{Running, SimBroker, broker_id, broker_index};
use super::clients::{Client, Operation, Request};
use super::controller::{Call, LostReplica};
use super::counts::Counts;
use super::faults::{Behind, FLUSHED_IS_NOTED_WITHIN, Strikes, Undo};
use super::groups::Group;
use super::invariants::{self, Cut, Invariant, Sight};
use super::keyed::KeyedLog;
use super::machine::{Heard, Listener};
use super::members::Ownership;
use super::network::{Network, Node};
use super::outbox::{Answer, Out};
use super::plan::Plan;
use super::random::{Random, mix};
use super::time::{LocalClock, RATE_ONE};
use super::trace::Trace;
use super::transactions::Errand;
use super::transactors::Fences;

/// How long after all has healed everything has to be well.
const WELL_WITHIN: Duration = Duration::from_secs(90);
/// What the consensus core says when its log answers with an error.
const UNREADABLE: &str = "unexpected error: Store(Other(";
/// How long a question for a range waits for its answer.
const PULL_TIMEOUT: Duration = Duration::from_secs(2);

/// What happens next.
pub(crate) enum Event {
    Round { broker: usize, life: u64 },
    Job { broker: usize, life: u64, job: u64 },
    Deliver { from: usize, to: usize, messages: Vec<GroupMessage> },
    PeerGone { broker: usize, gone: usize },
    PullAsked { from: usize, question: u64, request: PullRequest },
    PullAnswered { question: u64, answer: Result<PullAnswer, Error> },
    Request { broker: usize, operation: u64, request: Request },
    Answer { operation: u64, answer: Answer },
    Client { client: usize },
    Start { broker: usize, life: u64 },
    Resume { broker: usize },
    Table { broker: usize },
    Drive,
    Call { to: usize, call: Call },
    Heartbeat { to: usize, from: usize, incarnation: u64, lost: Vec<LostReplica> },
    Lost { replica: ReplicaId },
    MayRemove { version: u64 },
    Removed { removed: Vec<ReplicaId> },
    Fault,
    Undo(Undo),
    Strike { broker: usize, life: u64 },
    MoveBehind,
    ErrandBegins { broker: usize, life: u64, number: u64 },
    Errand { to: usize, from: usize, life: u64, number: u64, errand: Errand },
    ErrandDone { broker: usize, life: u64, number: u64, result: Result<(), Error> },
    Coordinate { broker: usize, life: u64 },
}

/// What is to happen, in the order of time; what it is lies beside, so that ordering moves little.
#[derive(Default)]
struct Queue {
    order: BinaryHeap<Reverse<(Duration, u64, usize)>>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
}

impl Queue {
    fn push(&mut self, at: Duration, number: u64, event: Event) {
        let place = match self.free.pop() {
            Some(place) => {
                self.events[place] = Some(event);
                place
            }
            None => {
                self.events.push(Some(event));
                self.events.len() - 1
            }
        };
        self.order.push(Reverse((at, number, place)));
    }

    /// The next one, if it happens until then.
    fn pop_until(&mut self, until: Duration) -> Option<(Duration, Event)> {
        let Reverse((at, _, place)) = *self.order.peek()?;
        if at > until {
            return None;
        }
        self.order.pop();
        self.free.push(place);
        Some((at, self.events[place].take()?))
    }
}

/// A question for a range that is under way.
struct Asked {
    broker: usize,
    life: u64,
    reply: Reply<Result<PullAnswer, Error>>,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The same whenever the same seed is run.
    pub hash: u64,
    /// What it saw.
    pub counts: Counts,
    /// What was broken, if anything was.
    pub broken: Option<String>,
}

/// See the module.
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) now: Duration,
    queue: Queue,
    numbers: u64,
    pub(crate) random: Random,
    pub(crate) brokers: Vec<SimBroker>,
    pub(crate) network: Network,
    pub(crate) groups: Vec<Group>,
    /// The newest of the metadata that was committed.
    pub(crate) table_at: Offset,
    /// Brokers that it knows.
    pub(crate) registered: usize,
    /// Replicas that are to go on without their majority, each with the one whose log it has.
    pub(crate) recovering: Vec<(Listener, ReplicaId)>,
    pub(crate) clients: Vec<Client>,
    /// When each has its next turn.
    pub(crate) turns: Vec<Option<Duration>>,
    pub(crate) operations: BTreeMap<u64, Operation>,
    asked: BTreeMap<u64, Asked>,
    pub(crate) held: Vec<Vec<Event>>,
    pub(crate) history: History,
    pub(crate) logs: Vec<LogId>,
    invariants: Vec<(&'static str, Box<dyn Invariant>)>,
    lives: u64,
    elected: BTreeMap<(usize, u64), ReplicaId>,
    last_index: BTreeMap<Listener, u64>,
    /// What was committed of each group, by index: its term, and the offset behind it.
    committed: Vec<Vec<Option<(Term, Offset)>>>,
    pub(crate) damaged: Vec<Listener>,
    pub(crate) fences: Fences,
    pub(crate) ownership: Ownership,
    pub(crate) keyed: KeyedLog,
    pub(crate) strikes: Strikes,
    pub(crate) behind: Option<Behind>,
    pub(crate) settled_at: Vec<u64>,
    pub(crate) is_healing: bool,
    pub(crate) stops_sending: bool,
    pub(crate) counts: Counts,
    pub(crate) trace: Trace,
    broken: Option<String>,
}

impl World {
    /// A cluster that starts.
    pub fn new(plan: Plan) -> Self {
        let base = Instant::now();
        let mut random = Random::new(plan.seed, 2);
        let brokers = (0..plan.brokers)
            .map(|index| {
                let rate = if plan.clock_drift { RATE_ONE * (900 + random.below(201)) / 1_000 } else { RATE_ONE };
                SimBroker::new(index, plan.seed, LocalClock::new(base, rate))
            })
            .collect();
        let network = Network::new(Random::new(plan.seed, 3), plan.weather);
        let mut world = Self {
            now: Duration::ZERO,
            queue: Queue::default(),
            numbers: 0,
            random,
            brokers,
            network,
            groups: Vec::new(),
            table_at: Offset::new(-1),
            registered: 0,
            recovering: Vec::new(),
            clients: Vec::new(),
            turns: Vec::new(),
            operations: BTreeMap::new(),
            asked: BTreeMap::new(),
            held: (0..plan.brokers).map(|_| Vec::new()).collect(),
            history: History::new(),
            logs: Vec::new(),
            invariants: invariants::all(),
            lives: 0,
            elected: BTreeMap::new(),
            last_index: BTreeMap::new(),
            committed: vec![Vec::new(); plan.partitions()],
            damaged: Vec::new(),
            fences: Fences::default(),
            ownership: Ownership::default(),
            keyed: KeyedLog::default(),
            strikes: Strikes::default(),
            behind: None,
            settled_at: vec![0; plan.partitions()],
            is_healing: false,
            stops_sending: false,
            counts: Counts::default(),
            trace: Trace::new(plan.prints),
            broken: None,
            plan,
        };
        take_panic();
        world.make_groups();
        world.make_clients();
        for broker in 0..world.brokers.len() {
            world.schedule(Duration::from_millis(1), Event::Start { broker, life: 0 });
        }
        world.schedule(Duration::from_millis(200), Event::Drive);
        world
    }

    /// Runs it to its end: faults, healing, and a last look at everything.
    pub fn run(mut self) -> Report {
        if !self.plan.faults.is_empty() {
            self.schedule(Duration::from_millis(1_500), Event::Fault);
        }
        self.run_for(Duration::from_secs(1) + self.plan.faulty_for);
        self.finish()
    }

    /// Lets this much time pass.
    pub fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        self.run_until(until, |_| false);
    }

    /// Runs until it is so, or until the time has come; says whether it is so.
    pub(crate) fn run_until(&mut self, until: Duration, is_so: impl Fn(&Self) -> bool) -> bool {
        while self.broken.is_none() {
            if is_so(self) {
                return true;
            }
            let Some((at, event)) = self.queue.pop_until(until) else { break };
            self.now = at;
            self.counts.events += 1;
            self.happen(event);
        }
        if self.broken.is_none() {
            self.now = self.now.max(until);
        }
        is_so(self)
    }

    /// Heals everything, waits until all is well, reads all there is and judges it.
    pub fn finish(mut self) -> Report {
        self.heal();
        let until = self.now + WELL_WITHIN;
        if !self.run_until(until, Self::is_well) && self.broken.is_none() {
            let groups: Vec<_> = (0..self.groups.len()).map(|group| self.describe(group)).collect();
            let clients: Vec<_> = self.clients.iter().filter(|it| !it.is_done()).map(Client::describe).collect();
            self.fail(&format!("stuck {WELL_WITHIN:?} after healing: {}\nclients: {clients:?}", groups.join("\n")));
        }
        self.history.sending_ended(self.now);
        self.look_at_machines();
        if self.broken.is_none() {
            self.read_everything();
            self.judge_pipeline();
        }
        if self.broken.is_none() {
            let logs = self.logs.clone();
            for log in logs {
                self.history.fully_read(log);
            }
        }
        let verdict = std::mem::take(&mut self.history).judge();
        self.counts.reads += verdict.reads;
        if let Some(anomaly) = verdict.anomalies.first() {
            let all = verdict.anomalies.iter().take(5).map(ToString::to_string).collect::<Vec<_>>().join("\n");
            if self.broken.is_none() {
                self.fail(&format!("{}: {all}", anomaly.kind));
            }
        }
        for broker in 0..self.brokers.len() {
            self.count(broker);
        }
        for broker in &self.brokers {
            let disk = broker.disk.counts();
            self.counts.torn_files += disk.torn_files;
            self.counts.sectors_lost += disk.sectors_lost;
            self.counts.disk_faults += disk.faults;
            let numbers = [disk.operations, disk.crashes, disk.sectors_lost, disk.sectors_kept, disk.names_lost];
            self.trace.note(self.now, "disk", &numbers, || format!("{disk:?}"));
        }
        self.counts.simulated_millis = self.now.as_millis() as u64;
        Report { seed: self.plan.seed, hash: self.trace.hash(), counts: self.counts, broken: self.broken }
    }

    /// Every machine, and what a leading one has in flight, is what a replay of its log leads to.
    fn look_at_machines(&mut self) {
        for broker in 0..self.brokers.len() {
            let Some(running) = self.brokers[broker].running.take() else { continue };
            for replica in running.shards.replicas() {
                let who = Listener { tp: replica.config().tp, replica: replica.config().replica };
                let sight = Sight { who, replica, life: 0, is_relaxed: self.plan.is_relaxed(who.tp) };
                self.counts.replays += 1;
                self.check(|invariant| invariant.at_rest(&sight));
            }
            self.brokers[broker].running = Some(running);
        }
    }

    pub(crate) fn schedule(&mut self, after: Duration, event: Event) {
        self.schedule_at(self.now + after, event);
    }

    pub(crate) fn schedule_at(&mut self, at: Duration, event: Event) {
        self.numbers += 1;
        self.queue.push(at.max(self.now), self.numbers, event);
    }

    pub(crate) fn note<D: Display>(&mut self, kind: &'static str, numbers: &[u64], text: impl FnOnce() -> D) {
        self.trace.note(self.now, kind, numbers, text);
    }

    /// A promise was broken: the run ends here.
    pub(crate) fn fail(&mut self, what: &str) {
        if self.broken.is_none() {
            self.broken = Some(format!("seed {} at {:.6} s: {what}", self.plan.seed, self.now.as_secs_f64()));
        }
    }

    /// What was broken so far.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    fn check(&mut self, look: impl Fn(&mut dyn Invariant) -> Result<(), String>) {
        let mut broken = None;
        for (name, invariant) in &mut self.invariants {
            if let Err(what) = look(&mut **invariant) {
                broken = Some(format!("{name}: {what}"));
            }
        }
        if let Some(broken) = broken {
            self.fail(&broken);
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Round { broker, life } => {
                let it = &self.brokers[broker];
                let due = it.running.as_ref().is_some_and(|it| it.round_at == Some(self.now));
                if it.life == life && due && !self.is_held(broker, || Event::Round { broker, life }) {
                    self.round(broker);
                }
            }
            Event::Job { broker, life, job } => {
                if self.brokers[broker].life == life && !self.is_held(broker, || Event::Job { broker, life, job }) {
                    self.job(broker, job);
                }
            }
            Event::Deliver { from, to, messages } => self.deliver(from, to, messages),
            Event::PeerGone { broker, gone } => {
                if let Some(running) = &self.brokers[broker].running {
                    running.shards.shards().peer_gone(broker_id(gone));
                    self.after(broker);
                }
            }
            Event::PullAsked { from, question, request } => self.pull_asked(from, question, request),
            Event::PullAnswered { question, answer } => self.pull_answered(question, answer),
            Event::Request { broker, operation, request } => self.on_request(broker, operation, request),
            Event::Answer { operation, answer } => self.on_answer(operation, answer),
            Event::Client { client } => {
                if self.turns[client] == Some(self.now) {
                    self.turns[client] = None;
                    self.on_client(client);
                }
            }
            Event::Start { broker, life } => {
                if self.brokers[broker].life == life && self.brokers[broker].running.is_none() {
                    self.start(broker);
                }
            }
            Event::Resume { broker } => self.resume(broker),
            Event::Table { broker } => {
                if !self.is_held(broker, || Event::Table { broker }) {
                    self.on_table(broker);
                }
            }
            Event::Drive => self.drive(),
            Event::Call { to, call } => self.on_call(to, call),
            Event::Heartbeat { to, from, incarnation, lost } => self.on_heartbeat(to, from, incarnation, lost),
            Event::Lost { replica } => self.on_lost(replica),
            Event::MayRemove { version } => self.on_may_remove(version),
            Event::Removed { removed } => self.on_removed(&removed),
            Event::Fault => self.on_fault(),
            Event::Strike { broker, life } => self.on_strike(broker, life),
            Event::MoveBehind => self.on_move_behind(),
            Event::ErrandBegins { broker, life, number } => self.on_errand_begins(broker, life, number),
            Event::Errand { to, from, life, number, errand } => self.on_errand(to, from, life, number, errand),
            Event::ErrandDone { broker, life, number, result } => self.on_errand_done(broker, life, number, result),
            Event::Coordinate { broker, life } => {
                let is_due = self.brokers[broker].life == life && self.brokers[broker].running.is_some();
                if is_due && !self.is_held(broker, || Event::Coordinate { broker, life }) {
                    self.coordinate(broker, false);
                    self.after(broker);
                }
            }
            Event::Undo(undo) => self.on_undo(undo),
        }
    }

    /// A client's next turn, unless it has an earlier one.
    pub(crate) fn turn_after(&mut self, client: usize, after: Duration) {
        let at = self.now + after;
        if self.turns[client].is_none_or(|turn| at < turn) {
            self.turns[client] = Some(at);
            self.schedule_at(at, Event::Client { client });
        }
    }

    /// A number that was not given out before.
    pub(crate) fn new_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Whether its process is paused: then what happens to it waits.
    pub(crate) fn is_held(&mut self, broker: usize, event: impl FnOnce() -> Event) -> bool {
        let is_paused = self.brokers[broker].is_paused;
        if is_paused {
            self.held[broker].push(event());
        }
        is_paused
    }

    fn round(&mut self, broker: usize) {
        let it = &mut self.brokers[broker];
        it.clock.set(self.now);
        let now = it.clock.now();
        if let Some(running) = &mut it.running {
            running.round_at = None;
            running.shards.round(now);
        }
        self.note("round", &[broker as u64], || format!("broker {}", broker_id(broker)));
        self.look(broker);
        self.after(broker);
    }

    fn job(&mut self, broker: usize, number: u64) {
        let it = &mut self.brokers[broker];
        it.clock.set(self.now);
        let Some((kind, job, ordered_at)) = it.running.as_mut().and_then(|running| running.jobs.remove(&number)) else {
            return;
        };
        self.note("job", &[broker as u64, kind as u64], || format!("broker {}: {kind:?}", broker_id(broker)));
        // What is written while a flush is under way is not covered by it.
        let disk = self.brokers[broker].disk.clone();
        disk.set_flush_horizon((kind == JobKind::Flush).then_some(ordered_at));
        job();
        disk.set_flush_horizon(None);
        self.after(broker);
    }

    /// Looks at every replica of a broker.
    fn look(&mut self, broker: usize) {
        if let Some(panic) = take_panic()
            && !self.could_not_read(broker, &panic)
        {
            self.fail(&format!("broker {}: the consensus core panicked: {panic}", broker_id(broker)));
        }
        if self.brokers[broker].disk.is_crashed() {
            return;
        }
        let Some(mut running) = self.brokers[broker].running.take() else { return };
        if !self.recovering.is_empty() {
            self.look_for_recovered(&running);
        }
        let mut has_news = false;
        for (who, what) in running.ears.take() {
            // One that goes on without its majority replays its log while it is opened: it is heard once it is known from
            // where on nothing of before counts.
            if self.recovering.iter().any(|(recovering, _)| *recovering == who) {
                running.ears.hear(who, what);
                continue;
            }
            self.check(|invariant| invariant.heard(who, &what));
            match what {
                Heard::State { .. } => self.counts.states_compared += 1,
                Heard::Committed(entry) => {
                    has_news |= who.tp == METADATA;
                    let group = self.group_of(who.tp);
                    let (index, known) = (entry.index.get() as usize, &mut self.committed[group]);
                    if known.len() <= index {
                        known.resize(index + 1, None);
                        known[index] = Some((entry.term, entry.next_offset()));
                    }
                }
                Heard::Leads => {}
            }
        }
        if let Some(view) = running.view.clone().filter(|_| has_news) {
            self.on_metadata(broker, &view);
        }
        let before = std::mem::take(&mut running.seen);
        for replica in running.shards.replicas() {
            let config = replica.config();
            let who = Listener { tp: config.tp, replica: config.replica };
            let life = before.get(&who).copied().unwrap_or_else(|| {
                self.lives += 1;
                self.lives
            });
            running.seen.insert(who, life);
            let sight = Sight { who, replica, life, is_relaxed: self.plan.is_relaxed(who.tp) };
            self.check(|invariant| invariant.replica(&sight));
            let status = replica.status();
            let group = self.group_of(who.tp);
            if matches!(status.role, Role::Elected | Role::Leader)
                && self.elected.insert((group, status.term.get()), who.replica).is_none()
            {
                self.counts.elections += 1;
                let term = status.term.get();
                self.trace.note(self.now, "elected", &[broker as u64, group as u64, term], || {
                    format!("broker {} leads group {group} in term {term}", broker_id(broker))
                });
            }
            // What a leader's clock deleted is gone for readers everywhere.
            if group < self.plan.groups && status.log_start.get() > self.groups[group].trimmed_to {
                self.counts.retained += 1;
                self.groups[group].trimmed_to = status.log_start.get();
                self.history.trimmed(self.logs[group], status.log_start);
            }
            let last = replica.log().last_index().get();
            if self.last_index.insert(who, last).is_some_and(|before| before > last) {
                self.counts.truncations += 1;
            }
        }
        for &who in before.keys().filter(|who| !running.seen.contains_key(who)) {
            self.check(|invariant| {
                invariant.ended(who);
                Ok(())
            });
        }
        self.brokers[broker].running = Some(running);
    }

    /// Whether the consensus core ended as its log could not be read, on a disk that had reason to fail: it knows no other
    /// way, and the replica is opened anew.
    fn could_not_read(&self, broker: usize, panic: &str) -> bool {
        let it = &self.brokers[broker];
        let may_fail = it.disk.is_crashed() || it.rots || it.disk.counts().faults > 0;
        may_fail && panic.contains(UNREADABLE)
    }

    /// Whether a replica here goes on without its majority: from where on nothing of before counts.
    fn look_for_recovered(&mut self, running: &Running) {
        for replica in running.shards.replicas() {
            let who = Listener { tp: replica.config().tp, replica: replica.config().replica };
            let Some(at) = self.recovering.iter().position(|(recovering, _)| *recovering == who) else { continue };
            self.recovering.swap_remove(at);
            let log = replica.log();
            let group = self.group_of(who.tp);
            // Up to there it has what was committed; behind may be what another leader once wrote.
            let known = &self.committed[group];
            let end = known.len().min(log.last_index().get() as usize + 1);
            let agrees = |index: &usize| {
                known[*index].is_some_and(|(term, _)| log.term_at(RaftIndex::new(*index as u64)) == Some(term))
            };
            let cut = match (0..end).rev().find(agrees) {
                Some(index) => Cut { index: index as u64, offset: known[index].map_or(Offset::ZERO, |(_, next)| next) },
                // What it has of the beginning is in its checkpoint.
                None => Cut { index: log.checkpoint().applied.get(), offset: log.end_offset() },
            };
            self.note("recovered", &[group as u64, cut.index], || format!("group {group} goes on from {cut:?}"));
            self.check(|invariant| {
                invariant.recovered(who.tp, cut);
                Ok(())
            });
            self.committed[group].truncate(cut.index as usize + 1);
            self.history.recovered(self.logs[group], cut.offset);
            self.on_recovered(group, cut.offset);
        }
    }

    /// Takes over what a broker's shard counted, before it is gone.
    pub(crate) fn count(&mut self, broker: usize) {
        let Some(running) = &self.brokers[broker].running else { return };
        for shard in running.shards.shards().metrics() {
            self.counts.reopened += shard.replicas_ended;
            self.counts.scrubbed_bytes += shard.scrubbed_bytes;
            self.counts.repairs += shard.repaired_ranges;
            self.counts.compactions += shard.compactions;
            self.counts.compacted_away_bytes += shard.compaction_freed_bytes;
        }
    }

    /// Takes out what a broker did, and sees to it that it goes on.
    pub(crate) fn after(&mut self, broker: usize) {
        if self.brokers[broker].disk.is_crashed() {
            // Whatever it did in that step, nobody heard of it.
            self.counts.crashes_in_operation += 1;
            let power = self.brokers[broker].random.one_in(2) && self.may_lose_power(broker);
            self.interrupt(broker);
            self.die(broker, if power { Crash::Power } else { Crash::Process });
            let after = self.random.millis(50, 2_000);
            self.restart_after(broker, after);
            return;
        }
        loop {
            let Some(running) = &mut self.brokers[broker].running else { return };
            let outs = running.outbox.take();
            if outs.is_empty() {
                break;
            }
            for out in outs {
                self.send_out(broker, out);
            }
        }
        self.take_jobs(broker);
        let Some(running) = &mut self.brokers[broker].running else { return };
        if running.is_stopping && running.shards.stopped().is_some() {
            self.note("stopped", &[broker as u64], || format!("broker {}", broker_id(broker)));
            self.die(broker, Crash::Process);
            self.brokers[broker].crashed = false;
            let after = self.random.millis(50, 1_000);
            self.restart_after(broker, after);
            return;
        }
        self.wake(broker);
    }

    /// Schedules its next round.
    fn wake(&mut self, broker: usize) {
        let jitter = self.random.micros(5, 120);
        let it = &mut self.brokers[broker];
        let Some(running) = &mut it.running else { return };
        let at = if running.shards.is_waiting() || (running.is_stopping && running.round_at.is_none()) {
            Some(self.now + jitter)
        } else {
            running.shards.next_deadline().map(|deadline| it.clock.moment_of(deadline).max(self.now))
        };
        let Some(at) = at else { return };
        if running.round_at.is_none_or(|planned| at < planned || planned < self.now) {
            running.round_at = Some(at);
            let life = it.life;
            self.schedule_at(at, Event::Round { broker, life });
        }
    }

    fn take_jobs(&mut self, broker: usize) {
        let it = &mut self.brokers[broker];
        let Some(running) = &mut it.running else { return };
        let mut ends = Vec::new();
        for (kind, job) in running.workers.take() {
            let takes = match kind {
                JobKind::Flush => match it.slow_flushes {
                    Some(slow) => slow,
                    None if it.random.one_in(50) => it.random.millis(5, 60),
                    None => it.random.micros(100, 2_000),
                },
                JobKind::Read => it.random.micros(50, 5_000),
                JobKind::Work | JobKind::Clean => it.random.micros(100, 10_000),
            };
            self.numbers += 1;
            running.jobs.insert(self.numbers, (kind, job, it.disk.counts().operations));
            ends.push((takes, self.numbers));
        }
        let life = it.life;
        for (takes, job) in ends {
            self.schedule(takes, Event::Job { broker, life, job });
        }
    }

    fn send_out(&mut self, broker: usize, out: Out) {
        match out {
            Out::Opened { tp, handle } => {
                let Some(running) = &mut self.brokers[broker].running else { return };
                match handle {
                    Ok(handle) => {
                        if let Some(local) = running.replicas.get_mut(&tp) {
                            local.handle = Some(handle);
                        }
                    }
                    Err(error) if error.code == ErrorCode::ShuttingDown => {}
                    Err(error) => self.fail(&format!("broker {} does not open {tp}: {error}", broker_id(broker))),
                }
            }
            Out::Closed { tp } => {
                let Some(running) = &mut self.brokers[broker].running else { return };
                running.replicas.remove(&tp);
                self.schedule(Duration::from_millis(1), Event::Table { broker });
            }
            Out::Sent { to, messages } => self.send_messages(broker, broker_index(to), messages),
            Out::Pull { from, request, reply } => self.pull(broker, broker_index(from), request, reply),
            Out::Pulled { question, answer } => {
                let Some(asked) = self.asked.get(&question) else { return };
                let at = self.network.deliveries(Node::Broker(broker), Node::Broker(asked.broker), self.now).once();
                if let Some(at) = at {
                    let answer = self.perhaps_damaged(answer);
                    self.schedule_at(at, Event::PullAnswered { question, answer });
                }
            }
            Out::Answered { operation, answer } => {
                self.check_answer(operation, &answer);
                if let Some(at) = self.network.deliveries(Node::Broker(broker), Node::Clients, self.now).once() {
                    self.schedule_at(at, Event::Answer { operation, answer });
                }
            }
            Out::Commanded { result } => {
                let ok = matches!(result, Ok(Ok(_)));
                self.counts.commanded += u64::from(ok);
                self.note("commanded", &[broker as u64, u64::from(ok)], || match &result {
                    Ok(Ok(answer)) => answer.describe(),
                    Ok(Err(error)) | Err(error) => error.to_string(),
                });
            }
            Out::ErrandDone { to, life, number, result } => self.send_errand_done(broker, to, life, number, result),
            Out::EndPending { to, life, number, marker, result } => {
                self.on_end_pending(broker, to, life, number, &marker, result);
            }
            Out::Written { turn, is_written } => self.on_written(broker, turn, is_written),
            Out::Reported { operation, member, result } => self.on_reported(broker, operation, &member, result),
            Out::Confirmed { operation, of, result } => self.on_confirmed(broker, operation, of, result),
            Out::Asked { operation, result } => self.on_asked(broker, operation, result),
            Out::Status { group, status } => {
                if let Ok(status) = status {
                    self.on_status(broker, group, &status);
                }
            }
            Out::Changed { group, what, result } => {
                let ok = u64::from(result.is_ok());
                self.note("changed", &[broker as u64, group as u64, ok], || {
                    format!("broker {}, group {group}: {what}: {result:?}", broker_id(broker))
                });
                if result.is_ok() {
                    if what == "transfer" {
                        self.counts.transfers += 1;
                    } else {
                        self.counts.membership_changes += 1;
                        self.members_changed(group, what);
                    }
                }
            }
        }
    }

    fn send_messages(&mut self, from: usize, to: usize, messages: Vec<GroupMessage>) {
        for message in &messages {
            self.check(|invariant| invariant.sent(message.tp, &message.message));
            let it = &message.message;
            let numbers = [from as u64, to as u64, it.term.get(), kind_of(&it.body)];
            self.trace.note(self.now, "send", &numbers, || {
                format!("broker {} to {}: {} {it:?}", broker_id(from), broker_id(to), message.tp)
            });
        }
        // To a replica that was on this very broker before this one: nobody there.
        if from == to {
            return;
        }
        if self.strikes.are_armed && self.is_struck(from, to, &messages) {
            return;
        }
        let count = messages.len() as u64;
        let deliveries = self.network.deliveries(Node::Broker(from), Node::Broker(to), self.now);
        let mut arrivals: Vec<_> = deliveries.all().collect();
        let Some(last) = arrivals.pop() else {
            self.counts.lost += count;
            // A stream that breaks is noticed now and then.
            if self.random.one_in(4)
                && let Some(running) = &self.brokers[from].running
            {
                running.shards.shards().unreachable(broker_id(to));
            }
            return;
        };
        for at in arrivals {
            self.schedule_at(at, Event::Deliver { from, to, messages: messages.clone() });
        }
        self.schedule_at(last, Event::Deliver { from, to, messages });
    }

    fn deliver(&mut self, from: usize, to: usize, messages: Vec<GroupMessage>) {
        if self.brokers[to].is_paused {
            self.held[to].push(Event::Deliver { from, to, messages });
            return;
        }
        let Some(running) = &self.brokers[to].running else { return };
        self.counts.delivered += messages.len() as u64;
        running.shards.shards().deliver(broker_id(from), messages);
        self.after(to);
    }

    fn pull(&mut self, broker: usize, from: usize, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        self.counts.pulls += 1;
        if request.what == PullWhat::Checkpoint {
            self.counts.snapshots += 1;
        }
        self.numbers += 1;
        let question = self.numbers;
        self.note("pull", &[broker as u64, from as u64], || {
            format!("broker {} from {}: {request:?}", broker_id(broker), broker_id(from))
        });
        self.asked.insert(question, Asked { broker, life: self.brokers[broker].life, reply });
        if let Some(at) = self.network.deliveries(Node::Broker(broker), Node::Broker(from), self.now).once() {
            self.schedule_at(at, Event::PullAsked { from, question, request });
        }
        let answer = Err(Error::new(ErrorCode::TimedOut, "no answer to a pull; try again"));
        self.schedule(PULL_TIMEOUT, Event::PullAnswered { question, answer });
    }

    fn pull_asked(&mut self, from: usize, question: u64, request: PullRequest) {
        if self.is_held(from, || Event::PullAsked { from, question, request }) {
            return;
        }
        let Some(running) = &self.brokers[from].running else {
            let answer = Err(Error::new(ErrorCode::StorageFailed, "nobody there; try another"));
            return self.schedule(Duration::from_millis(1), Event::PullAnswered { question, answer });
        };
        let reply = running.outbox.reply(move |answer| Out::Pulled { question, answer });
        running.shards.shards().serve_pull(request, reply);
        self.after(from);
    }

    fn pull_answered(&mut self, question: u64, answer: Result<PullAnswer, Error>) {
        let Some(asked) = self.asked.remove(&question) else { return };
        let Asked { broker, life, reply } = asked;
        if self.brokers[broker].life != life {
            return;
        }
        if self.brokers[broker].is_paused {
            self.asked.insert(question, Asked { broker, life, reply });
            self.held[broker].push(Event::PullAnswered { question, answer });
            return;
        }
        let ok = u64::from(answer.is_ok());
        self.note("pulled", &[broker as u64, ok], || match &answer {
            Ok(PullAnswer::Checkpoint { first_index, .. }) => format!("a checkpoint, files from {first_index}"),
            Ok(PullAnswer::Batches { next, bytes, .. }) => format!("{} bytes, next {next}", bytes.len()),
            Ok(PullAnswer::Offsets { next, bytes, .. }) => format!("{} bytes, next offset {next}", bytes.len()),
            Err(error) => error.to_string(),
        });
        reply.send(answer);
        self.after(broker);
    }

    /// Bytes that were damaged on the way, behind every checksum of the transport.
    fn perhaps_damaged(&mut self, answer: Result<PullAnswer, Error>) -> Result<PullAnswer, Error> {
        match answer {
            Ok(PullAnswer::Batches { bytes, next, commit }) if !self.is_healing && self.random.one_in(40) => {
                self.counts.pulls_damaged += 1;
                let mut damaged = bytes.to_vec();
                if !damaged.is_empty() {
                    let at = self.random.index(damaged.len());
                    damaged[at] ^= 1 << self.random.below(8);
                }
                Ok(PullAnswer::Batches { bytes: damaged.into(), next, commit })
            }
            answer => answer,
        }
    }

    fn check_answer(&mut self, operation: u64, answer: &Answer) {
        let Answer::Produced(Ok(produced)) = answer else { return };
        let Some(Operation { group, next_of: Some(records), .. }) = self.operations.get(&operation) else { return };
        let (tp, next) = (self.groups[*group].tp, produced.base_offset.plus(*records as i64));
        self.check(|invariant| invariant.acknowledged(tp, next));
    }

    // ---- lives -----------------------------------------------------------------------------------------------------

    fn start(&mut self, broker: usize) {
        let it = &mut self.brokers[broker];
        it.clock.set(self.now);
        it.started_at = self.now;
        let metadata = self.groups.last().expect("the metadata has a group");
        let started = it.start(&self.plan, metadata);
        if let Err(why) = started {
            self.note("start", &[broker as u64, 0], || format!("broker {} does not start: {why}", broker_id(broker)));
            let crashed = self.brokers[broker].disk.is_crashed();
            self.die(broker, if crashed { Crash::Power } else { Crash::Process });
            self.restart_after(broker, Duration::from_millis(500));
            return;
        }
        self.note("start", &[broker as u64, 1], || format!("broker {}", broker_id(broker)));
        self.replace_directory(broker);
        let after = self.random.micros(500, 50_000);
        self.schedule(after, Event::Table { broker });
    }

    /// Starts it when the time has come, unless it was started before.
    pub(crate) fn restart_after(&mut self, broker: usize, after: Duration) {
        let life = self.brokers[broker].life;
        self.schedule(after, Event::Start { broker, life });
    }

    /// The process is gone, and perhaps the power.
    pub(crate) fn die(&mut self, broker: usize, crash: Crash) {
        self.count(broker);
        let now = self.now;
        let it = &mut self.brokers[broker];
        // A short life may have ended before it came to note what the one before had flushed.
        let is_noted = it.running.is_some() && now >= it.started_at + FLUSHED_IS_NOTED_WITHIN;
        it.running = None;
        it.life += 1;
        it.is_paused = false;
        it.slow_flushes = None;
        it.lost_power = crash == Crash::Power || it.lost_power && !is_noted;
        it.crashed = true;
        if crash == Crash::Power {
            it.boots += 1;
            self.counts.power_failures += 1;
        }
        let loses_memory = crash == Crash::Power && self.plan.relaxed;
        it.disk.restart(crash);
        self.held[broker].clear();
        self.counts.crashes += 1;
        if loses_memory {
            self.counts.relaxed_power_failures += 1;
            for who in self.places_on(broker) {
                if self.plan.is_relaxed(who.tp) {
                    self.damage(who);
                }
            }
        }
        self.note("die", &[broker as u64, u64::from(crash == Crash::Power)], || {
            format!("broker {}: {crash:?}", broker_id(broker))
        });
        // Connections of a process that dies are reset; those of a machine without power are silent.
        if crash == Crash::Process {
            for other in (0..self.brokers.len()).filter(|&other| other != broker) {
                if let Some(at) = self.network.deliveries(Node::Broker(broker), Node::Broker(other), self.now).once() {
                    self.schedule_at(at, Event::PeerGone { broker: other, gone: broker });
                }
            }
        }
        let lost: Vec<_> =
            self.operations.iter().filter(|(_, it)| it.broker == broker).map(|(&operation, _)| operation).collect();
        for operation in lost {
            self.schedule(Duration::from_millis(1), Event::Answer { operation, answer: Answer::Lost });
        }
    }

    fn interrupt(&mut self, broker: usize) {
        let seen = self.brokers[broker].running.as_ref().map(|running| running.seen.clone()).unwrap_or_default();
        for &who in seen.keys() {
            self.check(|invariant| {
                invariant.interrupted(who);
                Ok(())
            });
        }
    }

    /// What this replica had may be gone.
    pub(crate) fn damage(&mut self, who: Listener) {
        self.damaged.push(who);
        self.last_index.remove(&who);
        self.check(|invariant| {
            invariant.damaged(who);
            Ok(())
        });
    }

    fn resume(&mut self, broker: usize) {
        if !std::mem::take(&mut self.brokers[broker].is_paused) {
            return;
        }
        self.note("resume", &[broker as u64], || format!("broker {}", broker_id(broker)));
        for event in std::mem::take(&mut self.held[broker]) {
            self.schedule(Duration::from_nanos(1), event);
        }
        if let Some(running) = &mut self.brokers[broker].running {
            running.round_at = None;
        }
        self.wake(broker);
    }

    /// A group's members are as wanted, and all are in sync.
    pub(crate) fn on_settled(&mut self, group: usize) {
        self.settled_at[group] = self.groups[group].version;
        let places: Vec<_> = self.groups[group].places().map(|place| place.replica).collect();
        let tp = self.groups[group].tp;
        self.damaged.retain(|who| who.tp != tp || places.contains(&who.replica));
    }

    /// Whether all is well: every broker up, every group as wanted, every replica as far as its leader, every client
    /// done.
    pub(crate) fn is_well(&self) -> bool {
        if self.brokers.iter().any(|broker| broker.running.is_none() || broker.is_paused) {
            return false;
        }
        let is_group_well = |number: usize| {
            let group = &self.groups[number];
            let Some(leader) = self.leader_of(number) else { return false };
            let Some(leader) = self.brokers[leader].handle(group.tp).map(|handle| handle.status()) else {
                return false;
            };
            group.version > 0
                && group.leaving.is_empty()
                && self.settled_at[number] == group.version
                && group.wanted.iter().all(|place| {
                    let handle = self.brokers[place.broker].handle(group.tp);
                    handle.is_some_and(|handle| {
                        let status = handle.status();
                        status.high_watermark == leader.end_offset && status.end_offset == leader.end_offset
                    })
                })
        };
        (0..self.groups.len()).all(is_group_well) && self.clients.iter().all(Client::is_done)
    }

    /// All faults end, and nobody sends anything new.
    fn heal(&mut self) {
        self.is_healing = true;
        self.stops_sending = true;
        self.network.heal();
        self.note("heal", &[], || "all faults end");
        for broker in 0..self.brokers.len() {
            let it = &mut self.brokers[broker];
            it.disk.set_bytes_max(None);
            it.disk.cancel_crash();
            it.disk.cancel_faults();
            it.slow_flushes = None;
            it.is_full = false;
            self.resume(broker);
            if self.brokers[broker].running.is_none() {
                self.restart_after(broker, Duration::from_millis(100));
            }
        }
    }
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// From now on panics are not told on the console: those that the replicas catch are findings of the run that they belong
/// to, and others end it.
pub fn hear_panics() {
    std::panic::set_hook(Box::new(|panic| {
        PANIC.with(|heard| *heard.borrow_mut() = Some(panic.to_string()));
    }));
}

/// The last panic of this thread that nobody took.
pub fn take_panic() -> Option<String> {
    PANIC.with(|heard| heard.borrow_mut().take())
}

/// A number for each kind of message.
fn kind_of(body: &PeerBody) -> u64 {
    let of = |numbers: [u64; 3]| numbers.into_iter().fold(7_u64, |hash, number| mix(hash.wrapping_mul(31) ^ number));
    match body {
        PeerBody::Append { previous_index, commit, entries, .. } => {
            of([previous_index.get(), commit.get(), entries.len() as u64])
        }
        PeerBody::AppendResponse { index, reject, .. } => of([1, index.get(), u64::from(*reject)]),
        PeerBody::Vote { pre, last_index, .. } => of([2, u64::from(*pre), last_index.get()]),
        PeerBody::VoteResponse { pre, reject, .. } => of([3, u64::from(*pre), u64::from(*reject)]),
        PeerBody::Heartbeat { commit } => of([4, 0, commit.get()]),
        PeerBody::HeartbeatResponse { commit, lane } => of([5, u64::from(*lane), commit.get()]),
        PeerBody::Beat(beat) => of([14, beat.number, beat.sum]),
        PeerBody::BeatAnswer(answer) => of([15, u64::from(answer.is_known), answer.number]),
        PeerBody::SnapshotOffer { index, .. } => of([6, 0, index.get()]),
        PeerBody::SnapshotAnswer { index, failed } => of([7, u64::from(*failed), index.get()]),
        _ => 9,
    }
}
