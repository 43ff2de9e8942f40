//! What is wanted of each partition: the cluster's metadata says so for the users' partitions, and each broker follows what
//! it has of it. Of the metadata's own replicas the simulator itself keeps the list.

use std::sync::Arc;
use std::time::Duration;

use flowstone_broker::simulation::{METADATA, MetadataView, Partition, ReplicaPlace};
use flowstone_protocol::{DirectoryId, LeaderEpoch, PartitionId, RaftIndex, ReplicaId, Term, TopicId, TopicPartition};
use flowstone_replication::membership_plan::{PlanStep, next_step};
use flowstone_replication::{GroupStatus, Health, MembershipChange, Role};

use super::broker::{broker_id, broker_index};
use super::controller::Call;
use super::machine::Listener;
use super::network::Node;
use super::outbox::Out;
use super::world::{Event, World};

/// What is behind a topic's partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Users' records.
    Records,
    /// Users' records, of which the last one of each key is kept.
    Keyed,
    /// Coordinators of transactions.
    Transactions,
    /// Coordinators of groups.
    Groups,
    /// The cluster's metadata.
    Metadata,
}

impl Kind {
    /// The topic's name. Those of coordinators have no internal ones here: then operators move them, too.
    pub(crate) fn topic(self) -> &'static str {
        match self {
            Self::Records => "simulated",
            Self::Keyed => "keyed",
            Self::Transactions => "transactions",
            Self::Groups => "groups",
            Self::Metadata => "metadata",
        }
    }

    pub(crate) fn topic_id(self) -> TopicId {
        match self {
            Self::Records => TopicId::new(7),
            Self::Keyed => TopicId::new(8),
            Self::Transactions => TopicId::new(9),
            Self::Groups => TopicId::new(10),
            Self::Metadata => METADATA.topic,
        }
    }

    /// Of a topic that is there.
    pub(crate) fn of(topic: TopicId) -> Self {
        let all = [Self::Records, Self::Keyed, Self::Transactions, Self::Groups];
        all.into_iter().find(|kind| kind.topic_id() == topic).unwrap_or(Self::Metadata)
    }
}

/// A replica's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) broker: usize,
    pub(crate) directory: DirectoryId,
    pub(crate) replica: ReplicaId,
}

impl From<&ReplicaPlace> for Place {
    fn from(place: &ReplicaPlace) -> Self {
        Self { broker: broker_index(place.broker), directory: place.directory, replica: place.replica }
    }
}

impl From<&Place> for ReplicaPlace {
    fn from(place: &Place) -> Self {
        Self { broker: broker_id(place.broker), directory: place.directory, replica: place.replica }
    }
}

/// One partition as it is wanted, as of the newest word that was committed.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) tp: TopicPartition,
    /// Those that it began with; of the metadata alone.
    pub(crate) founders: Arc<[ReplicaId]>,
    pub(crate) wanted: Vec<Place>,
    pub(crate) leaving: Vec<Place>,
    pub(crate) may_remove: bool,
    /// What went on after its majority was lost, and from which replica's log.
    pub(crate) recovered: Option<(ReplicaId, ReplicaId)>,
    /// Grows with each change of the above; 0: it does not exist yet.
    pub(crate) version: u64,
    /// Where readers may begin at the latest.
    pub(crate) trimmed_to: i64,
    /// Since when it has no majority that could ever vote again, as far as an operator knows.
    pub(crate) helpless_since: Option<Duration>,
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
            self.version += 1;
        }
    }

    fn is(&self, partition: &Partition) -> bool {
        let same =
            |places: &[Place], wanted: &[ReplicaPlace]| places.iter().copied().eq(wanted.iter().map(Place::from));
        same(&self.wanted, &partition.wanted)
            && same(&self.leaving, &partition.leaving)
            && self.may_remove == partition.may_remove
            && self.recovered == partition.recovered
    }
}

/// How long it takes until a broker follows a change that it knows of.
const HEARD_WITHIN: Duration = Duration::from_millis(800);
/// Between two looks of brokers at what they lead.
const DRIVE_EVERY: Duration = Duration::from_millis(250);

/// What a broker tells of a replica that is being copied from the others.
fn has_nothing() -> Health {
    let message = "it is being copied".to_owned();
    Health::Lost { message, lost_memory: true, last_term: Term::new(0), last_index: RaftIndex::new(0) }
}

impl World {
    /// The partitions that a run begins with: the users', and last that of the metadata.
    pub(crate) fn make_groups(&mut self) {
        for (kind, partitions) in self.plan.topics() {
            for number in 0..partitions {
                let tp = TopicPartition::new(kind.topic_id(), PartitionId::new(number));
                self.groups.push(Group::new(tp, Vec::new()));
            }
        }
        let places: Vec<_> = (0..self.plan.brokers).map(|broker| self.new_place(broker)).collect();
        self.groups.push(Group::new(METADATA, places));
    }

    /// The metadata's group.
    pub(crate) fn metadata(&self) -> usize {
        self.groups.len() - 1
    }

    /// The first partition of this kind, where there is one.
    pub(crate) fn group_with(&self, kind: Kind) -> Option<usize> {
        self.groups.iter().position(|group| Kind::of(group.tp.topic) == kind)
    }

    pub(crate) fn group_of(&self, tp: TopicPartition) -> usize {
        self.groups.iter().position(|group| group.tp == tp).unwrap_or_else(|| unreachable!("{tp} is no partition here"))
    }

    /// A place on a broker, under an id that was never used.
    fn new_place(&mut self, broker: usize) -> Place {
        let replica = ReplicaId::new(self.random.next() | 1);
        Place { broker, directory: self.brokers[broker].directory_id(), replica }
    }

    /// All hear of a change, each in its own time.
    fn tell_all(&mut self) {
        for broker in 0..self.brokers.len() {
            self.tell(broker);
        }
    }

    /// A broker learned something, and follows it soon.
    pub(crate) fn tell(&mut self, broker: usize) {
        let after = self.random.micros(1_000, HEARD_WITHIN.as_micros() as u64);
        self.schedule(after, Event::Table { broker });
    }

    /// A broker follows what it knows.
    pub(crate) fn on_table(&mut self, broker: usize) {
        let metadata = self.metadata();
        let it = &mut self.brokers[broker];
        let directory = it.directory_id();
        let Some(running) = &mut it.running else { return };
        running.metadata.clone_from(&self.groups[metadata]);
        running.reconcile(broker, directory, &self.plan);
        self.after(broker);
    }

    /// A broker committed something of the metadata: what is committed is so, whoever heard of it.
    pub(crate) fn on_metadata(&mut self, broker: usize, view: &MetadataView) {
        if view.applied() > self.table_at {
            self.table_at = view.applied();
            self.registered = (0..self.brokers.len()).filter(|&it| view.broker(broker_id(it)).is_some()).count();
            for group in 0..self.metadata() {
                let Some(partition) = view.partition(self.groups[group].tp) else { continue };
                if !self.groups[group].is(&partition) {
                    self.on_wanted(group, &partition);
                }
            }
        }
        self.tell(broker);
    }

    fn on_wanted(&mut self, group: usize, partition: &Partition) {
        let it = &mut self.groups[group];
        let wanted: Vec<Place> = partition.wanted.iter().map(Place::from).collect();
        let took_over = |place: &&Place| {
            let before = it.wanted.iter().find(|before| before.broker == place.broker);
            before.is_some_and(|before| before.replica != place.replica)
        };
        let was_recovered = partition.recovered.filter(|_| partition.recovered != it.recovered);
        if was_recovered.is_none() {
            self.counts.replaced += wanted.iter().filter(took_over).count() as u64;
        }
        if !it.leaving.is_empty() && partition.leaving.is_empty() {
            self.counts.moves += 1;
        }
        it.wanted = wanted;
        it.leaving = partition.leaving.iter().map(Place::from).collect();
        it.may_remove = partition.may_remove;
        it.recovered = partition.recovered;
        it.version += 1;
        let version = it.version;
        self.note("wanted", &[group as u64, version], || format!("group {group}: {partition:?}"));
        if let Some((replica, from)) = was_recovered {
            self.counts.recoveries += 1;
            self.groups[group].helpless_since = None;
            let tp = self.groups[group].tp;
            self.recovering.push((Listener { tp, replica }, from));
        }
    }

    /// A broker came with another directory than the metadata's replica there had.
    pub(crate) fn replace_directory(&mut self, broker: usize) {
        let directory = self.brokers[broker].directory_id();
        let group = self.metadata();
        let old = self.groups[group].wanted.iter().find(|it| it.broker == broker && it.directory != directory);
        if let Some(old) = old.map(|place| place.replica) {
            self.replace_replica(old);
        }
    }

    /// A replica of the metadata gives its place to a new one.
    fn replace_replica(&mut self, old: ReplicaId) {
        let group = self.metadata();
        let Some(broker) = self.groups[group].wanted.iter().find(|it| it.replica == old).map(|it| it.broker) else {
            return;
        };
        let new = self.new_place(broker);
        self.note("replace", &[old.get(), new.replica.get()], || {
            format!("the metadata: {} instead of {old} on broker {broker}", new.replica)
        });
        self.counts.replaced += 1;
        self.groups[group].replace(old, new);
        self.tell_all();
    }

    /// What brokers do again and again: for the members of the groups that they lead, for the cluster, and for themselves.
    pub(crate) fn drive(&mut self) {
        for broker in 0..self.brokers.len() {
            let it = &self.brokers[broker];
            if it.running.as_ref().is_some_and(|running| !it.is_paused && !running.is_stopping) {
                self.drive_broker(broker);
            }
        }
        self.operate();
        self.schedule(DRIVE_EVERY, Event::Drive);
    }

    fn drive_broker(&mut self, broker: usize) {
        let metadata = self.metadata();
        let id = broker_id(broker);
        let directory = self.brokers[broker].directory_id();
        let it = &self.brokers[broker];
        let Some(running) = &it.running else { return };
        let (mut lost, mut copied, mut news) = (Vec::new(), Vec::new(), Vec::new());
        for (&tp, local) in &running.replicas {
            let Some(handle) = &local.handle else { continue };
            let status = handle.status();
            if let Health::Lost { .. } = &status.health {
                lost.push((tp, local.replica, status.health.clone()));
            } else if status.role == Role::Pulling && self.plan.is_relaxed(tp) {
                copied.push((tp, local.replica));
            } else if status.role == Role::Leader {
                let group = self.group_of(tp);
                handle.group(running.outbox.reply(move |status| Out::Status { group, status }));
                if let (Some(view), Some(epoch)) = (&running.view, LeaderEpoch::from_term(status.term))
                    && tp != METADATA
                    && !view.knows_leader(tp, id, epoch)
                {
                    news.push((tp, local.replica, epoch));
                }
            }
        }
        let incarnation = running.incarnation;
        let is_registered = running.is_registered(broker, directory);
        for (tp, replica, health) in &lost {
            self.check_lost(broker, Listener { tp: *tp, replica: *replica }, health);
        }
        lost.extend(copied.into_iter().map(|(tp, replica)| (tp, replica, has_nothing())));
        if let Some((_, replica, _)) = lost.iter().find(|(tp, _, _)| *tp == METADATA) {
            let (replica, after) = (*replica, self.random.millis(50, 900));
            self.schedule(after, Event::Lost { replica });
        }
        if !is_registered {
            self.call(Node::Broker(broker), Call::Register { broker, directory, incarnation });
        }
        for (tp, replica, epoch) in news {
            self.call(Node::Broker(broker), Call::Leads { broker, tp, replica, epoch });
        }
        lost.retain(|(tp, _, _)| *tp != METADATA);
        if is_registered
            && let Some(to) = self.leader_of(metadata)
            && let Some(at) = self.way(Node::Broker(broker), to)
        {
            self.schedule_at(at, Event::Heartbeat { to, from: broker, incarnation, lost });
        }
        self.control(broker);
        self.coordinate(broker, true);
        self.coordinate_groups(broker);
        self.after(broker);
    }

    /// A replica of the metadata is lost.
    pub(crate) fn on_lost(&mut self, replica: ReplicaId) {
        self.replace_replica(replica);
    }

    /// A leader looks at its group.
    pub(crate) fn on_status(&mut self, broker: usize, group: usize, status: &GroupStatus) {
        let it = &self.brokers[broker];
        let Some(running) = &it.running else { return };
        let tp = self.groups[group].tp;
        let (step, wanted, is_news) = if tp == METADATA {
            let known = &running.metadata;
            let wanted = Group::ids(&known.wanted);
            let step = next_step(status, &wanted, &Group::ids(&known.leaving), known.may_remove);
            (step, wanted, known.version == self.groups[group].version)
        } else {
            let Some(view) = &running.view else { return };
            let Some(known) = view.partition(tp) else { return };
            let wanted = known.wanted.iter().map(|place| place.replica).collect();
            (view.next_step(tp, status), wanted, self.groups[group].is(&known))
        };
        let Some(handle) = it.handle(tp) else { return };
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
                if settled && is_news && self.groups[group].leaving.is_empty() {
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
            PlanStep::ReportMayRemove if tp == METADATA => {
                let version = running.metadata.version;
                let after = self.random.millis(5, 600);
                self.schedule(after, Event::MayRemove { version });
            }
            PlanStep::Done { removed } if tp == METADATA => {
                let after = self.random.millis(5, 600);
                self.schedule(after, Event::Removed { removed: removed.clone() });
            }
            PlanStep::ReportMayRemove => {
                self.call(Node::Broker(broker), Call::Progress { tp, wanted, removed: Vec::new() });
            }
            PlanStep::Done { removed } => {
                self.call(Node::Broker(broker), Call::Progress { tp, wanted, removed: removed.clone() });
            }
        }
        self.note("plan", &[broker as u64, group as u64], || format!("broker {broker}, group {group}: {step:?}"));
    }

    /// The second half of a change of the metadata's replicas begins.
    pub(crate) fn on_may_remove(&mut self, version: u64) {
        let group = self.metadata();
        let it = &mut self.groups[group];
        if it.version == version && !it.may_remove {
            it.may_remove = true;
            it.version += 1;
            self.tell_all();
        }
    }

    /// These replicas of the metadata are out of its group for good.
    pub(crate) fn on_removed(&mut self, removed: &[ReplicaId]) {
        let group = self.metadata();
        let it = &mut self.groups[group];
        let before = it.leaving.len();
        it.leaving.retain(|place| !removed.contains(&place.replica));
        if it.leaving.len() < before {
            it.version += 1;
            if it.leaving.is_empty() {
                it.may_remove = false;
            }
            self.note("removed", &[], || format!("the metadata: {removed:?} are gone"));
            self.tell_all();
        }
    }

    /// Moves one replica of a users' group to a broker that has none, if there is one.
    pub(crate) fn move_replica(&mut self, group: usize) -> bool {
        let it = &self.groups[group];
        let free: Vec<usize> =
            (0..self.brokers.len()).filter(|&broker| it.places().all(|place| place.broker != broker)).collect();
        if !it.leaving.is_empty() || it.wanted.is_empty() || free.is_empty() {
            return false;
        }
        let to = free[self.random.index(free.len())];
        let at = self.random.index(self.groups[group].wanted.len());
        let mut brokers: Vec<usize> = self.groups[group].wanted.iter().map(|place| place.broker).collect();
        let from = std::mem::replace(&mut brokers[at], to);
        self.note("move", &[group as u64, from as u64, to as u64], || {
            format!("group {group}: to {} instead of {}", broker_id(to), broker_id(from))
        });
        self.call(Node::Clients, Call::Move { group, brokers });
        true
    }

    /// Calls a move of a users' group off, while that is possible.
    pub(crate) fn cancel_move(&mut self, group: usize) {
        if !self.groups[group].leaving.is_empty() {
            self.note("cancel", &[group as u64], || format!("group {group}: the move is called off"));
            self.call(Node::Clients, Call::CancelMove { group });
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
        let mut text = format!(
            "group {group} ({}): wanted {:?}, leaving {:?}, may remove {}, recovered {:?}, settled {}",
            it.tp,
            it.wanted,
            it.leaving,
            it.may_remove,
            it.recovered,
            self.settled_at[group] == it.version
        );
        for broker in 0..self.brokers.len() {
            let is = &self.brokers[broker];
            match (&is.running, is.handle(it.tp)) {
                (None, _) => text.push_str(&format!("\n  broker {}: down", broker_id(broker))),
                (Some(running), None) => {
                    let local = running.replicas.get(&it.tp);
                    let registered = running.is_registered(broker, is.directory_id());
                    text.push_str(&format!(
                        "\n  broker {}: no replica open ({local:?}), registered {registered}",
                        broker_id(broker)
                    ));
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

impl Group {
    fn new(tp: TopicPartition, places: Vec<Place>) -> Self {
        Self {
            tp,
            founders: Group::ids(&places).into(),
            version: u64::from(!places.is_empty()),
            wanted: places,
            leaving: Vec::new(),
            may_remove: false,
            recovered: None,
            trimmed_to: 0,
            helpless_since: None,
        }
    }
}
