//! What goes wrong, and how it is taken back.

use std::time::Duration;

use flowstone_protocol::{Offset, ReplicaId, Term, TopicPartition};
use flowstone_replication::{GroupMessage, PeerBody, Role};
use flowstone_storage::sim_disk::{Crash, Operation};

use super::broker::{ROOM_KEPT_BYTES, broker_id};
use super::clients::Client;
use super::controller::Call;
use super::groups::Kind;
use super::machine::Listener;
use super::network::Node;
use super::plan::Fault;
use super::world::{Event, World};

/// Takes a fault back.
#[derive(Debug)]
pub(crate) enum Undo {
    Mend { cuts: Vec<(Node, Node)> },
    Room { broker: usize, life: u64 },
    FastDisk { broker: usize },
    NoPlannedCrash { broker: usize, life: u64 },
    NoStrikes,
}

/// How old the note of what is flushed may be: with the slowest disk.
pub(crate) const FLUSHED_IS_NOTED_WITHIN: Duration = Duration::from_secs(15);
/// How long voters are struck after a leader went.
const STRIKES_FOR: Duration = Duration::from_secs(5);
/// Calls for votes that are remembered, to come again.
const CALLS_MAX: usize = 64;

/// See [`Fault::CrashVoter`].
#[derive(Debug, Default)]
pub(crate) struct Strikes {
    pub(crate) are_armed: bool,
    /// Calls for votes with who sent them and to whom.
    calls: Vec<(usize, usize, GroupMessage)>,
    /// Who is to be struck, for a vote in which term of which group.
    struck: Option<(usize, TopicPartition, Term, ReplicaId)>,
}

/// See [`Fault::MoveBehind`].
#[derive(Debug)]
pub(crate) struct Behind {
    group: usize,
    /// The broker that hears nothing.
    deaf: usize,
    /// The one that restarts, once it was chosen.
    restarted: Option<usize>,
    until: Duration,
}

impl World {
    /// The next fault, and the one after it.
    pub(crate) fn on_fault(&mut self) {
        if self.is_healing {
            return;
        }
        let fault = self.random.pick(&self.plan.faults.clone()).copied();
        if let Some(fault) = fault {
            self.inject(fault);
        }
        let mean = self.plan.fault_gap.as_micros() as u64;
        let after = self.random.micros(mean / 4, mean * 7 / 4);
        self.schedule(after, Event::Fault);
    }

    /// Lets this go wrong now, if it can.
    pub fn inject(&mut self, fault: Fault) {
        let broker = self.random.index(self.brokers.len());
        let any_group = self.random.index(self.groups.len());
        let group = any_group % self.plan.groups;
        let movable = any_group % self.metadata();
        let up = self.brokers[broker].running.is_some();
        self.note("fault", &[fault as u64, broker as u64], || format!("{fault:?} (broker {})", broker_id(broker)));
        match fault {
            Fault::Kill | Fault::PowerOff if up => {
                let has_power = fault == Fault::Kill || !self.may_lose_power(broker);
                let crash = if has_power { Crash::Process } else { Crash::Power };
                let down = self.random.millis(20, 6_000);
                self.kill(broker, crash, down);
            }
            Fault::KillMany => {
                let mut many = self.brokers.len() / 2 + 1 + self.random.index(self.brokers.len() / 2 + 1);
                let mut crash = if self.random.one_in(2) { Crash::Process } else { Crash::Power };
                if self.plan.relaxed && crash == Crash::Power {
                    // All of them at once, and only where nothing was lost before: the best log goes on by itself.
                    many = self.brokers.len();
                    let all_whole = self.damaged.is_empty() && self.brokers.iter().all(|it| it.running.is_some());
                    crash = if all_whole { Crash::Power } else { Crash::Process };
                    if crash == Crash::Power {
                        // Should they not go on by themselves, an operator comes.
                        for group in 0..self.plan.groups {
                            self.groups[group].helpless_since = Some(self.now);
                        }
                    }
                }
                for broker in 0..many.min(self.brokers.len()) {
                    let down = self.random.millis(20, 4_000);
                    if self.brokers[broker].running.is_some() {
                        let crash = if self.is_rot_hidden(broker) { Crash::Process } else { crash };
                        self.kill(broker, crash, down);
                    }
                }
            }
            Fault::CrashSoon if up => {
                let after = self.random.below(40);
                let it = &self.brokers[broker];
                it.disk.crash_after(after);
                let life = it.life;
                self.schedule(Duration::from_secs(3), Event::Undo(Undo::NoPlannedCrash { broker, life }));
            }
            Fault::Stop if up => self.stop(broker),
            Fault::Pause if up => {
                let time = self.random.millis(200, 5_000);
                self.pause(broker, time);
            }
            Fault::CutLeader => {
                if let Some(leader) = self.leader_of(any_group) {
                    self.cut_off(&[leader]);
                }
            }
            Fault::CutHalves => {
                let half: Vec<_> = (0..self.brokers.len()).filter(|_| self.random.one_in(2)).collect();
                self.cut_off(&half);
            }
            Fault::CutRing => {
                let all = self.brokers.len();
                let far = |a: usize, b: usize| (a + 1) % all != b && (b + 1) % all != a;
                let pairs: Vec<_> = (0..all)
                    .flat_map(|a| (0..all).map(move |b| (a, b)))
                    .filter(|&(a, b)| a != b && far(a, b))
                    .collect();
                // Of three, all are neighbours: one link of the ring is cut.
                let pairs = if pairs.is_empty() { vec![(0, 1), (1, 0)] } else { pairs };
                self.cut_pairs(&pairs);
            }
            Fault::CutBridge => {
                let pairs: Vec<_> = (0..self.brokers.len())
                    .flat_map(|a| (0..self.brokers.len()).map(move |b| (a, b)))
                    .filter(|&(a, b)| a != broker && b != broker && (a + b) % 2 == 1)
                    .collect();
                self.cut_pairs(&pairs);
            }
            Fault::CutOneWay => {
                let other = (broker + 1 + self.random.index(self.brokers.len() - 1)) % self.brokers.len();
                self.cut_pairs(&[(broker, other)]);
            }
            Fault::CutClients => {
                let cuts = vec![(Node::Clients, Node::Broker(broker)), (Node::Broker(broker), Node::Clients)];
                self.cut(cuts);
            }
            Fault::ClockJump => {
                let seconds = self.random.below(7_200) as i64 - 3_600;
                self.brokers[broker].clock.jump_wall(seconds * 1_000);
                self.counts.clock_jumps += 1;
            }
            Fault::DiskFull if !self.brokers[broker].is_full => {
                let room = self.random.below(ROOM_KEPT_BYTES * 2);
                self.fill_disk(broker, room);
            }
            Fault::DiskFault if up => {
                let operations = [
                    Operation::Sync,
                    Operation::Sync,
                    Operation::Write,
                    Operation::Write,
                    Operation::Open,
                    Operation::Create,
                    Operation::SetLen,
                    Operation::SyncDir,
                    Operation::Rename,
                    Operation::Remove,
                ];
                let operation = operations[self.random.index(operations.len())];
                self.brokers[broker].disk.fail(operation, self.random.below(6));
            }
            Fault::SlowDisk => {
                self.brokers[broker].slow_flushes = Some(self.random.millis(500, 10_000));
                self.schedule(Duration::from_secs(8), Event::Undo(Undo::FastDisk { broker }));
            }
            Fault::Rot => self.rot(broker),
            Fault::Wipe => self.wipe(broker),
            Fault::Move => {
                self.move_replica(movable);
            }
            Fault::CancelMove => {
                self.cancel_move(movable);
            }
            Fault::Transfer => {
                self.transfer(any_group);
            }
            Fault::Trim => self.trim(group),
            Fault::CrashVoter => self.arm_strikes(any_group),
            Fault::MoveBehind => self.move_behind(movable),
            Fault::LoseMajority => self.lose_majority(group),
            _ => {}
        }
    }

    pub(crate) fn on_undo(&mut self, undo: Undo) {
        if self.is_healing {
            return;
        }
        match undo {
            Undo::Mend { cuts } => {
                for (from, to) in cuts {
                    self.network.mend(from, to);
                }
                self.note("mended", &[], || "a cut");
            }
            Undo::Room { broker, life } => {
                let _ = life;
                self.brokers[broker].disk.set_bytes_max(None);
                self.brokers[broker].is_full = false;
            }
            Undo::NoStrikes => self.strikes = Strikes::default(),
            Undo::FastDisk { broker } => self.brokers[broker].slow_flushes = None,
            Undo::NoPlannedCrash { broker, life } => {
                if self.brokers[broker].life == life {
                    self.brokers[broker].disk.cancel_crash();
                }
            }
        }
    }

    /// Kills a process, perhaps with the power, and starts it again later.
    pub(crate) fn kill(&mut self, broker: usize, crash: Crash, down: Duration) {
        self.die(broker, crash);
        self.restart_after(broker, down);
    }

    fn stop(&mut self, broker: usize) {
        if let Some(running) = &mut self.brokers[broker].running
            && !running.is_stopping
        {
            running.is_stopping = true;
            running.shards.stop();
            self.counts.stops += 1;
            self.after(broker);
        }
    }

    pub(crate) fn pause(&mut self, broker: usize, time: Duration) {
        if !self.brokers[broker].is_paused {
            self.brokers[broker].is_paused = true;
            self.counts.pauses += 1;
            self.schedule(time, Event::Resume { broker });
        }
    }

    /// Cuts these brokers off from the others.
    pub(crate) fn cut_off(&mut self, side: &[usize]) {
        let all = 0..self.brokers.len();
        let pairs: Vec<_> = all
            .clone()
            .flat_map(|a| all.clone().map(move |b| (a, b)))
            .filter(|(a, b)| side.contains(a) != side.contains(b))
            .collect();
        self.cut_pairs(&pairs);
    }

    fn cut_pairs(&mut self, pairs: &[(usize, usize)]) {
        self.cut(pairs.iter().map(|&(from, to)| (Node::Broker(from), Node::Broker(to))).collect());
    }

    fn cut(&mut self, cuts: Vec<(Node, Node)>) {
        for &(from, to) in &cuts {
            self.network.cut(from, to);
        }
        self.counts.cuts += 1;
        let time = self.random.millis(100, 8_000);
        self.schedule(time, Event::Undo(Undo::Mend { cuts }));
    }

    fn fill_disk(&mut self, broker: usize, room: u64) {
        let time = self.random.millis(500, 6_000);
        let it = &mut self.brokers[broker];
        it.is_full = true;
        it.disk.set_bytes_max(Some(it.disk.used_bytes() + room));
        let life = it.life;
        self.counts.full_disks += 1;
        self.schedule(time, Event::Undo(Undo::Room { broker, life }));
    }

    /// Whether this broker's power may fail: where writes count unflushed that is a loss.
    pub(crate) fn may_lose_power(&self, broker: usize) -> bool {
        (!self.plan.relaxed || self.may_damage(broker)) && !self.is_rot_hidden(broker)
    }

    /// Whether a bit flipped in what may have been flushed after the last note of how much that is: after a power failure it
    /// passes for the torn end of the log, and what was answered for is cut, unseen.
    fn is_rot_hidden(&self, broker: usize) -> bool {
        self.brokers[broker].rotted_at.is_some_and(|at| self.now < at + FLUSHED_IS_NOTED_WITHIN)
    }

    /// Whether one broker's data may be lost now: all that was lost before is replaced, and the rest is whole.
    fn may_damage(&self, broker: usize) -> bool {
        self.damaged.is_empty()
            && self.groups.iter().enumerate().all(|(number, group)| {
                // Mid-change a majority is not what it was.
                group.leaving.is_empty()
                    && self.settled_at[number] == group.version
                    && !group.wanted.is_empty()
                    && group.wanted.len() > usize::from(group.wanted.iter().any(|place| place.broker == broker)) * 2
            })
    }

    pub(crate) fn places_on(&self, broker: usize) -> Vec<Listener> {
        let mut found = Vec::new();
        for group in &self.groups {
            let here = group.places().filter(|place| place.broker == broker);
            found.extend(here.map(|place| Listener { tp: group.tp, replica: place.replica }));
        }
        found
    }

    /// Flips one bit.
    fn rot(&mut self, broker: usize) {
        if !self.may_damage(broker) {
            return;
        }
        let it = &self.brokers[broker];
        let is_up = it.running.is_some();
        // The same the other way round: see `is_rot_hidden`. Whoever was killed may not have come to note its last flush.
        let is_noted = is_up && self.now >= it.started_at + FLUSHED_IS_NOTED_WITHIN;
        if it.lost_power && !is_noted || it.crashed && !is_up {
            return;
        }
        let mut files = it.files();
        // What others have compacted they do not have as the entries that a repair of a log asks for.
        let compacted = [Kind::Keyed, Kind::Transactions, Kind::Groups].map(|kind| kind.topic_id().to_string());
        files.retain(|file| {
            let is_of = |part: &str| compacted.iter().any(|topic| topic == part);
            !file.components().any(|part| part.as_os_str().to_str().is_some_and(is_of))
        });
        if is_up {
            // What a process has open and still writes is not believed to rot under it: a sealed segment.
            let logs: Vec<_> =
                files.iter().filter(|file| file.extension().is_some_and(|it| it == "log")).cloned().collect();
            let newest: Vec<_> = logs
                .iter()
                .filter(|file| !logs.iter().any(|other| other.parent() == file.parent() && other > *file))
                .cloned()
                .collect();
            files = logs.into_iter().filter(|file| !newest.contains(file)).collect();
        }
        let Some(file) = self.random.pick(&files).cloned() else { return };
        let bytes = self.brokers[broker].disk.bytes(&file).map_or(0, |bytes| bytes.len() as u64);
        if bytes == 0 {
            return;
        }
        let (position, bit) = (self.random.below(bytes), self.random.below(8) as u8);
        self.brokers[broker].disk.flip_bit(&file, position, bit);
        self.brokers[broker].rots = true;
        self.brokers[broker].rotted_at = Some(self.now);
        self.counts.rot += 1;
        for who in self.places_on(broker) {
            self.damage(who);
        }
        self.note("rot", &[broker as u64, position], || {
            format!("broker {}: {} byte {position} bit {bit}", broker_id(broker), file.display())
        });
    }

    /// Replaces a disk by an empty one.
    pub(crate) fn wipe(&mut self, broker: usize) {
        if self.may_damage(broker) {
            self.give_empty_disk(broker);
        }
    }

    /// The same, whatever was on the disk.
    pub(crate) fn give_empty_disk(&mut self, broker: usize) {
        if self.brokers[broker].running.is_some() {
            self.die(broker, Crash::Power);
        }
        for who in self.places_on(broker) {
            self.damage(who);
        }
        self.brokers[broker].new_disk();
        self.counts.wipes += 1;
        let down = self.random.millis(100, 3_000);
        self.restart_after(broker, down);
    }

    /// The leader of a group goes for a moment, and from now on voters are struck.
    fn arm_strikes(&mut self, group: usize) {
        let Some(leader) = self.leader_of(group) else { return };
        self.kill(leader, Crash::Process, Duration::from_millis(80));
        self.strikes = Strikes { are_armed: true, ..Strikes::default() };
        self.schedule(STRIKES_FOR, Event::Undo(Undo::NoStrikes));
    }

    /// Looks at messages on their way out while voters are struck; whether they were taken off the way, to come late.
    pub(crate) fn is_struck(&mut self, from: usize, to: usize, messages: &[GroupMessage]) -> bool {
        let mut comes_late = false;
        for message in messages {
            let it = &message.message;
            let candidate = match it.body {
                PeerBody::Vote { pre: false, .. } => it.from,
                PeerBody::VoteResponse { pre: false, reject: false, .. } => it.to,
                _ => continue,
            };
            if matches!(it.body, PeerBody::Vote { .. }) {
                comes_late = true;
                if self.strikes.calls.len() < CALLS_MAX {
                    self.strikes.calls.push((from, to, message.clone()));
                }
            }
            if self.strikes.struck.is_none() && self.random.one_in(2) {
                self.strikes.struck = Some((from, message.tp, it.term, candidate));
                let life = self.brokers[from].life;
                self.schedule(Duration::from_nanos(1), Event::Strike { broker: from, life });
            }
        }
        if comes_late {
            // So that another one stands for election in the same term.
            let late = self.random.millis(50, 900);
            self.schedule(late, Event::Deliver { from, to, messages: messages.to_vec() });
        }
        comes_late
    }

    /// A voter loses its power, and hears the calls of all others again when it is back.
    pub(crate) fn on_strike(&mut self, broker: usize, life: u64) {
        let Some((_, tp, term, candidate)) = self.strikes.struck else { return };
        if self.brokers[broker].life != life || self.brokers[broker].running.is_none() {
            self.strikes.struck = None;
            return;
        }
        let crash = if self.may_lose_power(broker) { Crash::Power } else { Crash::Process };
        self.counts.struck_voters += 1;
        self.kill(broker, crash, Duration::from_millis(20));
        for (from, to, message) in std::mem::take(&mut self.strikes.calls) {
            let it = &message.message;
            if to == broker && message.tp == tp && it.term == term && it.from != candidate {
                for _ in 0..4 {
                    let late = self.random.millis(30, 2_000);
                    self.schedule(late, Event::Deliver { from, to, messages: vec![message.clone()] });
                }
            }
        }
        // Those that are still to come are let through as they are.
        self.strikes.are_armed = false;
    }

    /// Moves a replica away from a broker that hears nothing of it.
    fn move_behind(&mut self, group: usize) {
        let leader = self.leader_of(group);
        let it = &self.groups[group];
        let is_settled = it.leaving.is_empty() && it.version > 0 && self.settled_at[group] == it.version;
        let others: Vec<usize> = it.wanted.iter().map(|place| place.broker).filter(|it| Some(*it) != leader).collect();
        let free: Vec<usize> =
            (0..self.brokers.len()).filter(|&broker| it.wanted.iter().all(|place| place.broker != broker)).collect();
        let (Some(&deaf), Some(&to), true) = (self.random.pick(&others), free.first(), is_settled) else { return };
        if self.behind.is_some() || leader.is_none() {
            return;
        }
        let brokers =
            it.wanted.iter().map(|place| if place.broker == deaf { to } else { place.broker }).collect::<Vec<_>>();
        self.call(Node::Clients, Call::Move { group, brokers });
        let until = self.now + Duration::from_secs(8);
        self.behind = Some(Behind { group, deaf, restarted: None, until });
        self.sever(&[deaf], true);
        self.counts.moves_behind += 1;
        self.schedule(Duration::from_millis(20), Event::MoveBehind);
    }

    /// Cuts these brokers off from all others, or takes that back.
    fn sever(&mut self, side: &[usize], cut: bool) {
        for from in 0..self.brokers.len() {
            for to in 0..self.brokers.len() {
                if side.contains(&from) != side.contains(&to) {
                    let (from, to) = (Node::Broker(from), Node::Broker(to));
                    if cut { self.network.cut(from, to) } else { self.network.mend(from, to) }
                }
            }
        }
    }

    /// A group's members changed: where the deaf one was removed, another one restarts at once.
    pub(crate) fn members_changed(&mut self, group: usize, what: &str) {
        let Some(behind) = &self.behind else { return };
        if what != "remove" || behind.group != group || behind.restarted.is_some() || self.is_healing {
            return;
        }
        let deaf = behind.deaf;
        let others: Vec<usize> =
            self.groups[group].wanted.iter().map(|place| place.broker).filter(|&broker| broker != deaf).collect();
        let Some(&restarted) = self.random.pick(&others) else { return };
        if let Some(behind) = &mut self.behind {
            behind.restarted = Some(restarted);
            behind.until = self.now + Duration::from_secs(8);
        }
        self.kill(restarted, Crash::Process, Duration::from_millis(30));
    }

    /// Once the restarted one is open it is on the side of the deaf one.
    pub(crate) fn on_move_behind(&mut self) {
        let Some(Behind { group, deaf, restarted, until }) = self.behind else { return };
        if self.is_healing {
            self.behind = None;
            return;
        }
        let tp = self.groups[group].tp;
        let is_open = restarted.is_some_and(|restarted| {
            let running = self.brokers[restarted].running.as_ref();
            running.is_some_and(|running| running.seen.keys().any(|who| who.tp == tp))
        });
        if let (true, Some(restarted)) = (is_open, restarted) {
            self.behind = None;
            self.sever(&[deaf], false);
            self.cut_off(&[deaf, restarted]);
        } else if self.now >= until {
            self.behind = None;
            self.sever(&[deaf], false);
        } else {
            self.schedule(Duration::from_millis(20), Event::MoveBehind);
        }
    }

    /// What most replicas of a group had is gone for good; their brokers are there, and an operator comes.
    fn lose_majority(&mut self, group: usize) {
        let brokers: Vec<usize> = self.groups[group].wanted.iter().map(|place| place.broker).collect();
        if !self.random.one_in(3) || brokers.is_empty() || !self.may_damage(brokers[0]) || self.stops_sending {
            return;
        }
        let tp = self.groups[group].tp;
        let folder = |broker: usize| {
            let running = self.brokers[broker].running.as_ref();
            running.map(|running| (broker, running.data_dir.replica_dir(tp)))
        };
        let folders: Vec<_> = brokers[..brokers.len() / 2 + 1].iter().filter_map(|&broker| folder(broker)).collect();
        // Whoever is left must have a log: one that is being copied as a whole has none, and nobody to copy from any more.
        let has_log = |&broker: &usize| {
            let status = self.brokers[broker].handle(tp).map(|handle| handle.status());
            status.is_some_and(|status| !matches!(status.role, Role::Pulling | Role::Opening))
        };
        if folders.len() <= brokers.len() / 2 || !brokers[brokers.len() / 2 + 1..].iter().any(has_log) {
            return;
        }
        self.counts.lost_majorities += 1;
        self.groups[group].helpless_since = Some(self.now);
        for (broker, folder) in folders {
            let places = self.groups[group].wanted.iter().filter(|place| place.broker == broker);
            for who in places.map(|place| Listener { tp, replica: place.replica }).collect::<Vec<_>>() {
                self.damage(who);
            }
            let down = self.random.millis(50, 1_500);
            self.kill(broker, Crash::Process, down);
            self.brokers[broker].destroy(&folder);
        }
    }

    /// Moves the log start somewhere into what is committed.
    fn trim(&mut self, group: usize) {
        let tp = self.groups[group].tp;
        let Some(leader) = self.leader_of(group) else { return };
        let Some(status) = self.brokers[leader].handle(tp).map(|handle| handle.status()) else { return };
        let (from, to) = (status.log_start.get(), status.high_watermark.get());
        let to = from + self.random.below((to - from).max(0) as u64 / 2 + 1) as i64;
        let it = &mut self.groups[group];
        it.trimmed_to = it.trimmed_to.max(to);
        self.history.trimmed(self.logs[group], Offset::new(to));
        self.add_client(Client::Trimmer { group, to: Offset::new(to), is_done: false });
    }
}
