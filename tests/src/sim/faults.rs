//! What goes wrong, and how it is taken back.

use std::time::Duration;

use flowstone_protocol::Offset;
use flowstone_storage::sim_disk::{Crash, Operation};

use super::broker::{ROOM_KEPT_BYTES, broker_id};
use super::clients::Client;
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
        let group = self.random.index(self.groups.len());
        let up = self.brokers[broker].running.is_some();
        self.note("fault", &[fault as u64, broker as u64], || format!("{fault:?} (broker {})", broker_id(broker)));
        match fault {
            Fault::Kill | Fault::PowerOff if up => {
                let crash = if fault == Fault::Kill { Crash::Process } else { Crash::Power };
                let down = self.random.millis(20, 6_000);
                self.kill(broker, crash, down);
            }
            Fault::KillMany => {
                let many = self.brokers.len() / 2 + 1 + self.random.index(self.brokers.len() / 2 + 1);
                let crash = if self.random.one_in(2) { Crash::Process } else { Crash::Power };
                for broker in 0..many.min(self.brokers.len()) {
                    let down = self.random.millis(20, 4_000);
                    if self.brokers[broker].running.is_some() {
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
                if let Some(leader) = self.leader_of(group) {
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
                self.move_replica(group);
            }
            Fault::CancelMove => {
                self.cancel_move(group);
            }
            Fault::Transfer => {
                self.transfer(group);
            }
            Fault::Trim => self.trim(group),
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

    /// Whether one broker's data may be lost now: all that was lost before is replaced, and the rest is whole.
    fn may_damage(&self, broker: usize) -> bool {
        self.damaged.is_empty()
            && self.groups.iter().enumerate().all(|(number, group)| {
                // Mid-change a majority is not what it was.
                group.leaving.is_empty()
                    && self.settled_at[number] == group.version
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
        let mut files = it.files();
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
