//! What is wanted of each partition: the table that a controller would keep.

use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::{PartitionId, ReplicaId, TopicId, TopicPartition};
use flowstone_replication::membership_plan::{PlanStep, next_step};
use flowstone_replication::{GroupStatus, Health, MembershipChange, Role};

use super::broker::broker_id;
use super::outbox::Out;
use super::world::{Event, World};

/// A replica's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) broker: usize,
    pub(crate) directory: u32,
    pub(crate) replica: ReplicaId,
}

/// One partition as the table has it.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) tp: TopicPartition,
    pub(crate) founders: Arc<[ReplicaId]>,
    pub(crate) wanted: Vec<Place>,
    pub(crate) leaving: Vec<Place>,
    pub(crate) may_remove: bool,
    /// Added by the change that is under way.
    pub(crate) added: Vec<ReplicaId>,
    /// Grows with each change of the above.
    pub(crate) version: u64,
    /// Where readers may begin at the latest.
    pub(crate) trimmed_to: i64,
}

impl Group {
    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        self.wanted.iter().chain(&self.leaving)
    }

    fn ids(places: &[Place]) -> Vec<ReplicaId> {
        places.iter().map(|place| place.replica).collect()
    }

    /// Replica `old` can not go on: a new one on that broker takes its place.
    fn replace(&mut self, old: ReplicaId, new: Place) {
        if let Some(place) = self.wanted.iter_mut().find(|place| place.replica == old) {
            let gone = std::mem::replace(place, new);
            self.leaving.push(gone);
            self.may_remove = true;
            self.added.clear();
            self.version += 1;
        }
    }
}

/// How long it takes until a broker hears of a change.
const HEARD_WITHIN: Duration = Duration::from_millis(800);

impl World {
    /// The partitions that a run begins with.
    pub(crate) fn make_groups(&mut self) {
        for number in 0..self.plan.groups {
            let mut brokers: Vec<usize> = (0..self.plan.brokers).collect();
            while brokers.len() > self.plan.replicas {
                brokers.swap_remove(self.random.index(brokers.len()));
            }
            let places: Vec<_> = brokers.into_iter().map(|broker| self.new_place(broker)).collect();
            let tp = TopicPartition::new(TopicId::new(7), PartitionId::new(number as i32));
            self.groups.push(Group {
                tp,
                founders: Group::ids(&places).into(),
                wanted: places,
                leaving: Vec::new(),
                may_remove: false,
                added: Vec::new(),
                version: 1,
                trimmed_to: 0,
            });
        }
    }

    /// A place on a broker, under an id that was never used.
    pub(crate) fn new_place(&mut self, broker: usize) -> Place {
        let replica = ReplicaId::new(self.random.next() | 1);
        Place { broker, directory: self.brokers[broker].directory, replica }
    }

    /// The table changed: all hear of it, each in its own time.
    pub(crate) fn tell_all(&mut self) {
        for broker in 0..self.brokers.len() {
            let after = self.random.micros(1_000, HEARD_WITHIN.as_micros() as u64);
            self.schedule(after, Event::Table { broker });
        }
    }

    /// A broker reads the table.
    pub(crate) fn on_table(&mut self, broker: usize) {
        let it = &mut self.brokers[broker];
        let Some(running) = &mut it.running else { return };
        running.known.clone_from(&self.groups);
        running.reconcile(broker, it.directory, &self.plan);
        self.after(broker);
    }

    /// A broker came with another directory than the table has: what it had is replaced.
    pub(crate) fn replace_directory(&mut self, broker: usize) {
        let directory = self.brokers[broker].directory;
        for group in 0..self.groups.len() {
            let old = self.groups[group].wanted.iter().find(|it| it.broker == broker && it.directory != directory);
            if let Some(old) = old.map(|place| place.replica) {
                self.replace_replica(group, old);
            }
        }
    }

    fn replace_replica(&mut self, group: usize, old: ReplicaId) {
        let Some(broker) = self.groups[group].wanted.iter().find(|it| it.replica == old).map(|it| it.broker) else {
            return;
        };
        let new = self.new_place(broker);
        self.note("replace", &[group as u64, old.get(), new.replica.get()], || {
            format!("group {group}: {} instead of {old} on broker {broker}", new.replica)
        });
        self.counts.replaced += 1;
        self.groups[group].replace(old, new);
        self.tell_all();
    }

    /// Moves one replica of a group to a broker that has none, if there is one.
    pub(crate) fn move_replica(&mut self, group: usize) -> bool {
        let it = &self.groups[group];
        let free: Vec<usize> =
            (0..self.brokers.len()).filter(|&broker| it.places().all(|place| place.broker != broker)).collect();
        if !it.leaving.is_empty() || free.is_empty() {
            return false;
        }
        let to = free[self.random.index(free.len())];
        let new = self.new_place(to);
        let at = self.random.index(self.groups[group].wanted.len());
        let it = &mut self.groups[group];
        let old = std::mem::replace(&mut it.wanted[at], new);
        it.leaving.push(old);
        it.added.push(new.replica);
        it.may_remove = false;
        it.version += 1;
        self.note("move", &[group as u64, old.replica.get(), new.replica.get()], || {
            format!("group {group}: {} on broker {to} instead of {} on broker {}", new.replica, old.replica, old.broker)
        });
        self.tell_all();
        true
    }

    /// Calls a move off, while that is possible.
    pub(crate) fn cancel_move(&mut self, group: usize) -> bool {
        let it = &mut self.groups[group];
        if it.may_remove || it.leaving.is_empty() {
            return false;
        }
        let back = std::mem::take(&mut it.leaving);
        let (added, kept): (Vec<_>, Vec<_>) =
            it.wanted.iter().copied().partition(|place| it.added.contains(&place.replica));
        it.wanted = kept.into_iter().chain(back).collect();
        it.leaving = added;
        it.added.clear();
        it.may_remove = true;
        it.version += 1;
        self.note("cancel", &[group as u64], || format!("group {group}: the move is called off"));
        self.tell_all();
        // What it goes back to may be gone: a broker whose disk was replaced meanwhile has come back without it.
        for broker in 0..self.brokers.len() {
            if self.brokers[broker].running.is_some() {
                self.replace_directory(broker);
            }
        }
        true
    }

    /// What leaders do for the members of their groups, and what brokers report.
    pub(crate) fn drive(&mut self) {
        for broker in 0..self.brokers.len() {
            let it = &self.brokers[broker];
            let Some(running) = it.running.as_ref().filter(|running| !it.is_paused && !running.is_stopping) else {
                continue;
            };
            let mut lost = Vec::new();
            let mut has_lost_votes = false;
            for (group, known) in running.known.iter().enumerate() {
                let Some(handle) = it.handle(known.tp) else { continue };
                let status = handle.status();
                if let Health::Lost { message, .. } = &status.health {
                    // No replica can vote here again, whatever its id: an operator gives the broker an empty directory.
                    has_lost_votes |= message.contains("the hard states of stripe");
                    lost.push((group, running.replicas[&known.tp].replica));
                } else if status.role == Role::Leader {
                    handle.group(running.outbox.reply(move |status| Out::Status { group, status }));
                }
            }
            if has_lost_votes {
                self.give_empty_disk(broker);
                continue;
            }
            for (group, replica) in lost {
                let after = self.random.millis(50, 900);
                self.schedule(after, Event::Lost { group, replica });
            }
            self.after(broker);
        }
        self.schedule(Duration::from_millis(250), Event::Drive);
    }

    /// A broker reported that a replica is lost.
    pub(crate) fn on_lost(&mut self, group: usize, replica: ReplicaId) {
        self.replace_replica(group, replica);
    }

    /// A leader looks at its group.
    pub(crate) fn on_status(&mut self, broker: usize, group: usize, status: &GroupStatus) {
        let it = &self.brokers[broker];
        let Some(running) = &it.running else { return };
        let known = &running.known[group];
        let (wanted, leaving) = (Group::ids(&known.wanted), Group::ids(&known.leaving));
        let step = next_step(status, &wanted, &leaving, known.may_remove);
        let version = known.version;
        let Some(handle) = it.handle(known.tp) else { return };
        let changed = |what| running.outbox.reply(move |result| Out::Changed { group, what, result });
        match &step {
            PlanStep::Nothing => {
                let mut voters = status.membership.voters.clone();
                let mut wanted = wanted;
                voters.sort_unstable();
                wanted.sort_unstable();
                let settled = voters == wanted
                    && status.membership.learners.is_empty()
                    && status.members.iter().all(|member| member.in_sync || member.replica == status.replica);
                if settled && self.groups[group].version == version && self.groups[group].leaving.is_empty() {
                    self.on_settled(group);
                }
                return;
            }
            PlanStep::AddLearner(replica) => {
                handle.change_membership(MembershipChange::AddLearner(*replica), changed("add"));
            }
            PlanStep::Promote(replica) => {
                handle.change_membership(MembershipChange::Promote(*replica), changed("promote"));
            }
            PlanStep::Remove(replica) => {
                handle.change_membership(MembershipChange::Remove(*replica), changed("remove"));
            }
            PlanStep::TransferAway(to) => handle.transfer_leader(Some(*to), changed("transfer")),
            PlanStep::ReportMayRemove => {
                let after = self.random.millis(5, 600);
                self.schedule(after, Event::MayRemove { group, version });
            }
            PlanStep::Done { removed } => {
                let after = self.random.millis(5, 600);
                self.schedule(after, Event::Removed { group, removed: removed.clone() });
            }
        }
        self.note("plan", &[broker as u64, group as u64], || format!("broker {broker}, group {group}: {step:?}"));
    }

    /// The second half of a change begins.
    pub(crate) fn on_may_remove(&mut self, group: usize, version: u64) {
        let it = &mut self.groups[group];
        if it.version == version && !it.may_remove {
            it.may_remove = true;
            it.added.clear();
            it.version += 1;
            self.tell_all();
        }
    }

    /// These are out of the group for good.
    pub(crate) fn on_removed(&mut self, group: usize, removed: &[ReplicaId]) {
        let it = &mut self.groups[group];
        let before = it.leaving.len();
        it.leaving.retain(|place| !removed.contains(&place.replica));
        if it.leaving.len() < before {
            it.version += 1;
            if it.leaving.is_empty() {
                it.may_remove = false;
                self.counts.moves += 1;
            }
            self.note("removed", &[group as u64], || format!("group {group}: {removed:?} are gone"));
            self.tell_all();
        }
    }

    /// Hands leadership of a group over, to whomever.
    pub(crate) fn transfer(&mut self, group: usize) -> bool {
        let Some(broker) = self.leader_of(group) else { return false };
        let places: Vec<_> =
            self.groups[group].wanted.iter().filter(|place| place.broker != broker).map(|it| it.replica).collect();
        let to = self.random.pick(&places).copied();
        let it = &self.brokers[broker];
        let (Some(running), Some(handle)) = (&it.running, it.handle(self.groups[group].tp)) else { return false };
        handle
            .transfer_leader(to, running.outbox.reply(move |result| Out::Changed { group, what: "transfer", result }));
        self.note("transfer", &[group as u64, broker as u64], || format!("group {group}: broker {broker} to {to:?}"));
        self.after(broker);
        true
    }

    /// The broker that leads a group and serves, where there is one that can be reached.
    pub(crate) fn leader_of(&self, group: usize) -> Option<usize> {
        let tp = self.groups[group].tp;
        let leads = |broker: &usize| {
            let it = &self.brokers[*broker];
            !it.is_paused && it.handle(tp).is_some_and(|handle| handle.status().role == Role::Leader)
        };
        // Of two that believe it, the one of the higher term.
        (0..self.brokers.len())
            .filter(leads)
            .max_by_key(|&broker| self.brokers[broker].handle(tp).map(|it| it.status().term))
    }

    /// Where the replicas of a group are, for people.
    pub(crate) fn describe(&self, group: usize) -> String {
        let it = &self.groups[group];
        let mut text =
            format!("group {group}: wanted {:?}, leaving {:?}, may remove {}", it.wanted, it.leaving, it.may_remove);
        for broker in 0..self.brokers.len() {
            let is = &self.brokers[broker];
            match (&is.running, is.handle(it.tp)) {
                (None, _) => text.push_str(&format!("\n  broker {}: down", broker_id(broker))),
                (Some(running), None) => {
                    let local = running.replicas.get(&it.tp);
                    text.push_str(&format!("\n  broker {}: no replica open ({local:?})", broker_id(broker)));
                }
                (Some(running), Some(handle)) => {
                    let replica = running.replicas[&it.tp].replica;
                    text.push_str(&format!(
                        "\n  broker {} replica {replica}: {:?}",
                        broker_id(broker),
                        handle.status()
                    ));
                }
            }
        }
        text
    }
}
