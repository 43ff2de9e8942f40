//! What a scenario says, so that it reads aloud.

use std::path::PathBuf;
use std::time::Duration;

use flowstone_replication::Role;
use flowstone_storage::sim_disk::Crash;

use super::groups::Place;
use super::network::Node;
use super::world::World;

/// How long anything that is waited for may take.
pub(super) const SOON: Duration = Duration::from_secs(30);

impl World {
    /// Waits until the partition has a leader that serves, and says which broker that is.
    ///
    /// # Panics
    /// When none comes.
    pub fn wait_for_leader(&mut self, group: usize) -> usize {
        let until = self.now + SOON;
        let found = self.run_until(until, |world| world.leader_of(group).is_some());
        assert!(found, "no leader within {SOON:?}: {}{}", self.describe(group), self.broken().unwrap_or_default());
        self.leader_of(group).expect("there was one a line ago")
    }

    /// Waits until another broker than this one leads.
    ///
    /// # Panics
    /// When none does.
    pub fn wait_for_another_leader(&mut self, group: usize, than: usize) -> usize {
        let until = self.now + SOON;
        let found = self.run_until(until, |world| world.leader_of(group).is_some_and(|leader| leader != than));
        assert!(found, "no other leader within {SOON:?}: {}", self.describe(group));
        self.leader_of(group).expect("there was one a line ago")
    }

    /// Waits until so many more batches are acknowledged.
    ///
    /// # Panics
    /// When they are not.
    pub fn wait_for_acknowledgements(&mut self, batches: u64) {
        let wanted = self.counts.acknowledged + batches;
        let until = self.now + SOON;
        let got = self.run_until(until, |world| world.counts.acknowledged >= wanted);
        let acknowledged = self.counts.acknowledged;
        assert!(got, "{acknowledged} of {wanted} within {SOON:?}: {:?}\n{}", self.broken(), self.describe(0));
    }

    /// Kills a process; it stays down until [`World::start_broker`].
    pub fn kill_process(&mut self, broker: usize) {
        self.die(broker, Crash::Process);
    }

    /// Cuts a broker's power; it stays down until [`World::start_broker`].
    pub fn cut_power(&mut self, broker: usize) {
        self.die(broker, Crash::Power);
    }

    /// Starts a broker that is down.
    pub fn start_broker(&mut self, broker: usize) {
        self.restart_after(broker, Duration::from_millis(1));
    }

    /// Pauses a process for so long.
    pub fn pause_broker(&mut self, broker: usize, time: Duration) {
        self.pause(broker, time);
    }

    /// Cuts these brokers off from all others; clients reach everyone still.
    pub fn cut_brokers_off(&mut self, side: &[usize]) {
        for (from, to) in self.across(side) {
            self.network.cut(from, to);
        }
        self.counts.cuts += 1;
    }

    /// Takes [`World::cut_brokers_off`] back.
    pub fn mend_brokers(&mut self, side: &[usize]) {
        for (from, to) in self.across(side) {
            self.network.mend(from, to);
        }
    }

    fn across(&self, side: &[usize]) -> Vec<(Node, Node)> {
        let all = 0..self.brokers.len();
        all.clone()
            .flat_map(|from| all.clone().map(move |to| (from, to)))
            .filter(|(from, to)| side.contains(from) != side.contains(to))
            .map(|(from, to)| (Node::Broker(from), Node::Broker(to)))
            .collect()
    }

    /// Cuts everything that one broker sends to the others; it hears them still.
    pub fn cut_what_it_sends(&mut self, broker: usize) {
        for other in (0..self.brokers.len()).filter(|&other| other != broker) {
            self.network.cut(Node::Broker(broker), Node::Broker(other));
        }
        self.counts.cuts += 1;
    }

    /// Ends all cuts.
    pub fn mend_everything(&mut self) {
        self.network.heal();
    }

    /// The brokers with a replica of the partition.
    pub fn brokers_of(&self, group: usize) -> Vec<usize> {
        self.groups[group].places().map(|place: &Place| place.broker).collect()
    }

    /// Moves some replica of the partition to a broker without one.
    ///
    /// # Panics
    /// When there is no such broker.
    pub fn begin_move(&mut self, group: usize) {
        let until = self.now + SOON;
        while self.groups[group].leaving.is_empty() && self.now < until {
            self.move_replica(group);
            let soon = self.now + Duration::from_millis(300);
            self.run_until(soon, |world| !world.groups[group].leaving.is_empty());
        }
        assert!(!self.groups[group].leaving.is_empty(), "nowhere to move to: {}", self.describe(group));
    }

    /// Replaces the disk of a broker by an empty one, and starts it again.
    pub fn wipe_disk(&mut self, broker: usize) {
        self.wipe(broker);
    }

    /// The brokers whose replica is elected, and does not serve yet.
    pub fn elected_and_not_serving(&self, group: usize) -> Vec<usize> {
        let tp = self.groups[group].tp;
        (0..self.brokers.len())
            .filter(|&broker| self.brokers[broker].handle(tp).is_some_and(|it| it.status().role == Role::Elected))
            .collect()
    }

    /// Waits until this is so.
    ///
    /// # Panics
    /// When it does not become so.
    pub fn wait_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let until = self.now + SOON;
        let so = self.run_until(until, is_so);
        assert!(so, "not so within {SOON:?}: {what}\n{}\n{:?}", self.describe(0), self.broken());
    }

    /// Whether no change of members of the partition is under way.
    pub fn is_settled(&self, group: usize) -> bool {
        self.groups[group].leaving.is_empty() && self.settled_at[group] == self.groups[group].version
    }

    /// Batches acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.counts.acknowledged
    }

    /// What happened so far.
    pub fn counts(&self) -> super::Counts {
        self.counts
    }

    /// Flips a bit in a sealed segment of a broker that is down or up; says whether there was one.
    pub fn flip_a_bit_in_a_sealed_segment(&mut self, broker: usize) -> bool {
        let files = self.brokers[broker].files();
        let logs: Vec<_> = files.iter().filter(|file| file.extension().is_some_and(|it| it == "log")).collect();
        let is_long = |file: &PathBuf| self.brokers[broker].disk.bytes(file).is_some_and(|bytes| bytes.len() > 200);
        let sealed = logs
            .iter()
            .find(|file| is_long(file) && logs.iter().any(|other| other.parent() == file.parent() && other > *file));
        let Some(file) = sealed.map(|file| (*file).clone()) else { return false };
        self.brokers[broker].disk.flip_bit(&file, 100, 3);
        self.brokers[broker].rots = true;
        self.counts.rot += 1;
        for who in self.places_on(broker) {
            self.damage(who);
        }
        true
    }
}
