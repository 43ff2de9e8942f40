//! The way to the controller: what brokers and operators ask of the metadata's coordinator, and what the broker that leads
//! it does without being asked.

use std::time::Duration;

use flowstone_broker::simulation::{Command, Duty, ReplicaPlace};
use flowstone_protocol::{BrokerId, ClusterId, DirectoryId, LeaderEpoch, ReplicaId, TopicPartition};
use flowstone_replication::{Health, Role};

use super::broker::broker_id;
use super::groups::Kind;
use super::machine::Listener;
use super::network::Node;
use super::outbox::Out;
use super::world::{Event, World};

/// After this silence a broker's session is over.
const SESSION_TIMEOUT: Duration = Duration::from_millis(2_500);
/// How long an operator looks at a partition that has lost its majority.
const OPERATOR_WAITS: Duration = Duration::from_secs(8);

/// What is asked of the controller. Whoever asks does so again until the metadata says that it is done.
#[derive(Debug, Clone)]
pub(crate) enum Call {
    Register { broker: usize, directory: DirectoryId, incarnation: u64 },
    Leads { broker: usize, tp: TopicPartition, replica: ReplicaId, epoch: LeaderEpoch },
    Progress { tp: TopicPartition, wanted: Vec<ReplicaId>, removed: Vec<ReplicaId> },
    CreateTopic { kind: Kind, partitions: i32 },
    Move { group: usize, brokers: Vec<usize> },
    CancelMove { group: usize },
    Recover { tp: TopicPartition, survivor: ReplicaId },
}

/// A lost replica, as its broker tells.
pub(crate) type LostReplica = (TopicPartition, ReplicaId, Health);

impl World {
    /// When what is sent to a broker now arrives.
    pub(crate) fn way(&mut self, from: Node, to: usize) -> Option<Duration> {
        if from == Node::Broker(to) {
            return Some(self.now);
        }
        self.network.deliveries(from, Node::Broker(to), self.now).once()
    }

    /// Asks the controller, where there is one and a way to it.
    pub(crate) fn call(&mut self, from: Node, call: Call) {
        let Some(to) = self.leader_of(self.metadata()) else { return };
        if let Some(at) = self.way(from, to) {
            self.schedule_at(at, Event::Call { to, call });
        }
    }

    /// What was asked reached the broker that led the metadata.
    pub(crate) fn on_call(&mut self, to: usize, call: Call) {
        if self.brokers[to].is_paused {
            self.held[to].push(Event::Call { to, call });
            return;
        }
        let seed = self.random.next();
        let replicas = self.plan.replicas as i32;
        let topic_of = |group: usize| {
            let tp = self.groups[group].tp;
            (Kind::of(tp.topic).topic(), tp.partition.get())
        };
        let Some(running) = &self.brokers[to].running else { return };
        let command = match call {
            Call::Register { broker, directory, incarnation } => {
                Command::register(broker_id(broker), directory, incarnation)
            }
            Call::Leads { broker, tp, replica, epoch } => Command::leads(broker_id(broker), tp, replica, epoch),
            Call::Progress { tp, wanted, removed } => Command::progress(tp, wanted, removed, seed),
            Call::CreateTopic { kind, partitions } => {
                Command::create_topic(kind.topic(), kind.topic_id(), partitions, replicas, &[], seed)
            }
            Call::Move { group, brokers } => {
                let brokers: Vec<BrokerId> = brokers.into_iter().map(broker_id).collect();
                let (topic, partition) = topic_of(group);
                Command::move_partition(topic, partition, brokers, seed)
            }
            Call::CancelMove { group } => {
                let (topic, partition) = topic_of(group);
                Command::cancel_move(topic, partition)
            }
            Call::Recover { tp, survivor } => match &running.duty {
                Some((_, duty)) => duty.recover(tp, survivor, seed),
                None => return,
            },
        };
        self.command(to, command);
        self.after(to);
    }

    /// Gives a command to a broker's replica of the metadata.
    fn command(&mut self, broker: usize, command: Command) {
        let tp = self.groups[self.metadata()].tp;
        self.counts.commands += 1;
        let text = if self.plan.prints { format!("{command:?}") } else { String::new() };
        self.note("command", &[broker as u64], || format!("to broker {}: {text}", broker_id(broker)));
        let it = &self.brokers[broker];
        if let (Some(running), Some(handle)) = (&it.running, it.handle(tp)) {
            handle.command(command, running.outbox.reply(|result| Out::Commanded { result }));
        }
    }

    /// A broker told the controller that it lives, and what it lost.
    pub(crate) fn on_heartbeat(&mut self, to: usize, from: usize, incarnation: u64, lost: Vec<LostReplica>) {
        if self.brokers[to].is_paused {
            self.held[to].push(Event::Heartbeat { to, from, incarnation, lost });
            return;
        }
        let it = &mut self.brokers[to];
        it.clock.set(self.now);
        let now = it.clock.now();
        if let Some((_, duty)) = it.running.as_mut().and_then(|running| running.duty.as_mut()) {
            duty.heard(broker_id(from), incarnation, now);
            for (tp, replica, health) in lost {
                duty.lost(broker_id(from), tp, replica, &health);
            }
        }
    }

    /// What the broker does as the controller, where it is that.
    pub(crate) fn control(&mut self, broker: usize) {
        let metadata = self.metadata();
        let tp = self.groups[metadata].tp;
        let seed = self.random.next();
        let it = &mut self.brokers[broker];
        it.clock.set(self.now);
        let now = it.clock.now();
        let status = it.handle(tp).map(|handle| handle.status());
        let Some(running) = &mut it.running else { return };
        let Some(status) = status.filter(|status| status.role == Role::Leader) else {
            running.duty = None;
            return;
        };
        let Some(view) = running.view.clone() else { return };
        if running.duty.as_ref().is_none_or(|(term, _)| *term != status.term) {
            running.duty = Some((status.term, Duty::new(SESSION_TIMEOUT, now)));
        }
        if !view.is_founded() {
            let voters: Vec<_> = self.groups[metadata].wanted.iter().map(ReplicaPlace::from).collect();
            return self.command(broker, Command::found(ClusterId::new(u128::from(self.plan.seed)), &voters));
        }
        let Some((_, duty)) = &mut running.duty else { return };
        for command in duty.due(&view, now, seed) {
            self.command(broker, command);
        }
    }

    /// What operators do: they make the topic, and recover what has lost its majority for good.
    pub(crate) fn operate(&mut self) {
        for (kind, partitions) in self.plan.topics() {
            let has_topic = self.groups.iter().all(|group| group.tp.topic != kind.topic_id() || group.version > 0);
            if !has_topic && self.registered == self.brokers.len() {
                self.call(Node::Clients, Call::CreateTopic { kind, partitions });
            }
        }
        for group in 0..self.plan.groups {
            let Some(since) = self.groups[group].helpless_since else { continue };
            if self.now - since < OPERATOR_WAITS {
                continue;
            }
            if self.leader_of(group).is_some() {
                self.groups[group].helpless_since = None;
            } else if let Some(survivor) = self.survivor(group) {
                let tp = self.groups[group].tp;
                self.call(Node::Clients, Call::Recover { tp, survivor });
            }
        }
    }

    /// Where a majority of a group can never vote again: the replica that has the most.
    fn survivor(&self, group: usize) -> Option<ReplicaId> {
        let it = &self.groups[group];
        let whole = it.places().filter_map(|place| {
            let running = self.brokers[place.broker].running.as_ref()?;
            let local = running.replicas.get(&it.tp).filter(|local| local.replica == place.replica)?;
            let status = local.handle.as_ref()?.status();
            let end = status.end_offset.get() as u64;
            match status.health {
                Health::Ok | Health::DiskFull if matches!(status.role, Role::Follower | Role::Candidate) => {
                    Some(((2, end), place.replica))
                }
                // It was about to be a voter; and what one had before a copy was begun in its place is there still.
                Health::Ok | Health::DiskFull if matches!(status.role, Role::Learner | Role::Pulling) && end > 0 => {
                    Some(((1, end), place.replica))
                }
                // Nothing but what was in memory: where all did, one of them has to go on.
                Health::Lost { lost_memory: true, last_index, .. } => Some(((0, last_index.get()), place.replica)),
                _ => None,
            }
        });
        whole.max().map(|(_, replica)| replica)
    }

    /// Only what was damaged may be lost.
    pub(crate) fn check_lost(&mut self, broker: usize, who: Listener, health: &Health) {
        let Health::Lost { message, .. } = health else { return };
        // One that was replaced may not have heard of it.
        let is_wanted = self.groups[self.group_of(who.tp)].places().any(|place| place.replica == who.replica);
        if !is_wanted {
            return;
        }
        if !self.damaged.contains(&who) && !self.brokers[broker].rots {
            self.fail(&format!(
                "{}: replica {} is lost, and nothing of it was damaged: {message}",
                who.tp, who.replica
            ));
        }
    }
}
