//! Brings the groups that are led here to where the metadata wants them, one member at a time, and tells how far they are.
//!
//! What is to be done next is [`next_step`]'s to say, from how the group is and what is wanted: nothing is remembered, so
//! a leader that comes later goes on where another one stopped. Here it is only carried out.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use flowstone_protocol::{BrokerId, Error, ErrorCode, Offset, ReplicaId, TopicPartition};
use flowstone_replication::membership_plan::{PlanStep, next_step};
use flowstone_replication::{GroupStatus, Health, MembershipChange, Reply};
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::task::{self, JoinSet};
use tokio::time::MissedTickBehavior;

use super::control::Control;
use crate::controller::change::PartitionEntry;
use crate::controller::table::{METADATA_PARTITION, MetadataTable};
use crate::partition::{LocalReplicas, Replica, Slot};

/// Groups whose members are being changed are looked at this often.
const STEP_EVERY: Duration = Duration::from_millis(150);
/// All groups led here are looked at this often.
const SURVEY_EVERY: Duration = Duration::from_secs(2);
/// A step that takes longer is asked for again.
const STEP_MAX: Duration = Duration::from_secs(5);
/// Groups that are looked at side by side.
const AT_ONCE: usize = 64;
/// Groups of which a step is under way at a time. One that is stuck keeps its place for [`STEPS_MAX`] steps at the most.
const STEPPING_MAX: usize = 256;
/// How a group is, is asked for this long by a survey: what it does not hear of this time it hears of the next.
const VIEW_MAX: Duration = Duration::from_secs(1);
/// Steps of one group at one go.
const STEPS_MAX: usize = 8;
/// The replica that was meant to lead must have been in sync for so long before it is given the lead: one that comes and
/// goes is not worth the change.
const PREFERRED_AFTER: Duration = Duration::from_secs(5);
/// Leaderships that go back in one survey.
const TRANSFERS_MAX: usize = 50;

/// How the groups led here are, as of the last survey, and what is to be told to the controller.
#[derive(Debug, Default)]
pub(crate) struct Led {
    /// Groups that lack a wanted replica in sync.
    under_replicated: AtomicUsize,
    /// Held for a look or a change; nothing waits inside.
    progress: Mutex<HashMap<TopicPartition, Progress>>,
    /// Brokers whose disks are full, as the controller says: they are given no leadership. As the lock above.
    full: Mutex<HashSet<BrokerId>>,
    /// Brokers whose disks are slow, as the controller says: leadership is not given back to them. As the locks above.
    slow: Mutex<HashSet<BrokerId>>,
    /// There is something to tell.
    news: Notify,
}

/// How far a change of replicas is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) may_remove: bool,
    pub(crate) removed: Vec<ReplicaId>,
    /// The replicas that the leader was told to arrive at.
    pub(crate) wanted: Vec<ReplicaId>,
}

impl Led {
    pub(crate) fn under_replicated(&self) -> usize {
        self.under_replicated.load(Ordering::Relaxed)
    }

    /// What the controller is to be told; taken, as it is found out again where it gets lost.
    pub(crate) fn take_progress(&self) -> Vec<(TopicPartition, Progress)> {
        self.progress.lock().drain().collect()
    }

    pub(crate) fn has_progress(&self) -> bool {
        !self.progress.lock().is_empty()
    }

    /// Waits until there is something to tell.
    pub(crate) async fn has_news(&self) {
        self.news.notified().await;
    }

    pub(crate) fn set_full(&self, full: HashSet<BrokerId>) {
        *self.full.lock() = full;
    }

    fn full(&self) -> HashSet<BrokerId> {
        self.full.lock().clone()
    }

    pub(crate) fn set_slow(&self, slow: HashSet<BrokerId>) {
        *self.slow.lock() = slow;
    }

    /// Brokers to which no leadership is given back.
    fn unfit(&self) -> HashSet<BrokerId> {
        &self.full() | &*self.slow.lock()
    }

    fn tell(&self, tp: TopicPartition, progress: Progress) {
        self.progress.lock().insert(tp, progress);
        self.news.notify_one();
    }
}

/// What is wanted of one group.
#[derive(Clone, Debug)]
pub(crate) struct Goal {
    wanted: Vec<ReplicaId>,
    /// Where these are.
    hosts: Vec<BrokerId>,
    leaving: Vec<ReplicaId>,
    /// Learners that stay so.
    observers: Vec<ReplicaId>,
    may_remove: bool,
    is_changing: bool,
    /// The broker that was meant to lead, with its replica, while it is alive and may be given something.
    preferred: Option<(BrokerId, ReplicaId)>,
}

impl Goal {
    pub(crate) fn of(table: &MetadataTable, tp: TopicPartition, entry: &PartitionEntry) -> Self {
        let observers =
            if tp == METADATA_PARTITION { table.observers().map(|place| place.replica).collect() } else { Vec::new() };
        let preferred = entry.replicas().first().and_then(|place| {
            let broker = table.broker(place.broker)?;
            broker.takes_replicas().then_some((place.broker, place.replica))
        });
        Self {
            wanted: entry.replicas().iter().map(|place| place.replica).collect(),
            hosts: entry.replicas().iter().map(|place| place.broker).collect(),
            leaving: entry.leaving().iter().map(|place| place.replica).collect(),
            observers,
            may_remove: entry.may_remove(),
            is_changing: entry.is_changing(),
            preferred,
        }
    }

    /// The next step, observers included.
    pub(crate) fn next(&self, view: &GroupStatus) -> PlanStep {
        // It went on under an id that the table does not name yet: what that wants is of another group.
        let is_named = [&self.wanted, &self.leaving, &self.observers].iter().any(|ids| ids.contains(&view.replica));
        if !is_named {
            return PlanStep::Nothing;
        }
        // To the plan a learner is one that shall vote, or go.
        let mut voting = view.clone();
        voting.membership.learners.retain(|replica| !self.observers.contains(replica));
        voting.members.retain(|member| !self.observers.contains(&member.replica));
        let step = next_step(&voting, &self.wanted, &self.leaving, self.may_remove);
        match step {
            PlanStep::Nothing => {
                let is_member = |replica: &ReplicaId| {
                    view.membership.voters.contains(replica) || view.membership.learners.contains(replica)
                };
                match self.observers.iter().find(|replica| !is_member(replica)) {
                    Some(replica) => PlanStep::AddLearner(*replica),
                    None => PlanStep::Nothing,
                }
            }
            step => step,
        }
    }

    /// Who is to lead in place of a replica whose disk is full: the first wanted one that is in sync and has room.
    fn with_room(&self, view: &GroupStatus, full: &HashSet<BrokerId>) -> Option<ReplicaId> {
        let is_able = |replica: ReplicaId| {
            let member = view.members.iter().find(|member| member.replica == replica);
            member.is_some_and(|member| member.in_sync && member.is_active && !member.is_learner)
        };
        let others = self.wanted.iter().zip(&self.hosts).filter(|(replica, _)| **replica != view.replica);
        others.filter(|(_, host)| !full.contains(host)).map(|(replica, _)| *replica).find(|replica| is_able(*replica))
    }

    /// The replica that was meant to lead, where it does not and may be given the lead once it has been in sync for long.
    fn goes_back_to(&self, view: &GroupStatus, unfit: &HashSet<BrokerId>) -> Option<(BrokerId, ReplicaId)> {
        let (broker, preferred) = self.preferred?;
        let member = view.members.iter().find(|member| member.replica == preferred)?;
        let may = member.in_sync && !member.is_learner && !self.is_changing && !unfit.contains(&broker);
        (preferred != view.replica && may).then_some((broker, preferred))
    }

    fn in_sync(&self, view: &GroupStatus) -> usize {
        let counts = |replica: &&ReplicaId| {
            **replica == view.replica
                || view.members.iter().any(|member| member.replica == **replica && member.in_sync && !member.is_learner)
        };
        self.wanted.iter().filter(counts).count()
    }
}

/// Looks after the groups that are led here.
#[derive(Debug)]
pub(crate) struct Driver {
    control: Arc<Control>,
    replicas: LocalReplicas,
    led: Arc<Led>,
    /// Whether leaderships go back by themselves.
    gives_back: bool,
    /// Since when the replica that was meant to lead is in sync again.
    in_sync_since: HashMap<TopicPartition, Instant>,
    /// Groups at rest whose members are not as wanted, as of the last survey.
    odd: HashSet<TopicPartition>,
    /// Groups of which all was as wanted, by the metadata of then: since when they rest.
    settled: HashMap<TopicPartition, u64>,
    settled_by: Offset,
    steps: JoinSet<()>,
    /// Groups of which a step is under way.
    stepping: HashMap<TopicPartition, task::Id>,
    /// Leaderships that are being given back.
    giving_back: JoinSet<()>,
}

impl Driver {
    pub(crate) fn new(control: Arc<Control>, replicas: LocalReplicas, led: Arc<Led>, gives_back: bool) -> Self {
        Self {
            control,
            replicas,
            led,
            gives_back,
            in_sync_since: HashMap::new(),
            odd: HashSet::new(),
            settled: HashMap::new(),
            settled_by: Offset::ZERO,
            steps: JoinSet::new(),
            stepping: HashMap::new(),
            giving_back: JoinSet::new(),
        }
    }

    /// Until aborted.
    pub(crate) async fn run(mut self) {
        let mut ticks = tokio::time::interval(STEP_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut surveyed = Instant::now();
        loop {
            ticks.tick().await;
            self.step_all();
            if surveyed.elapsed() >= SURVEY_EVERY {
                self.survey().await;
                surveyed = Instant::now();
            }
        }
    }

    /// The replica here, where it leads.
    fn leader(&self, tp: TopicPartition) -> Option<Replica> {
        match self.replicas.get(tp)? {
            Slot::Open(partition) if partition.replica.status().is_ready() => Some(partition.replica.clone()),
            _ => None,
        }
    }

    /// Begins a step of every group that wants one and has none under way: one that is slow holds up nobody else.
    fn step_all(&mut self) {
        while let Some(ended) = self.steps.try_join_next_with_id() {
            let ended = ended.map_or_else(|error| error.id(), |(id, ())| id);
            self.stepping.retain(|_, step| *step != ended);
        }
        let goals: Vec<(Replica, Goal)> = self.control.table.with(|table| {
            let changing = table.changing().map(|(tp, _)| tp);
            let mut tps: HashSet<TopicPartition> = changing.chain(self.odd.iter().copied()).collect();
            if self.control.leads() {
                tps.insert(METADATA_PARTITION);
            }
            let goal = |tp: TopicPartition| Some((self.leader(tp)?, Goal::of(table, tp, table.partition(tp)?)));
            tps.into_iter().filter(|tp| !self.stepping.contains_key(tp)).filter_map(goal).collect()
        });
        for (replica, goal) in goals.into_iter().take(STEPPING_MAX.saturating_sub(self.stepping.len())) {
            let (tp, led) = (replica.tp(), Arc::clone(&self.led));
            let begun = self.steps.spawn(async move {
                if let Err(error) = step(&replica, &goal, &led).await {
                    // It leads no more, or a change is under way: the next look tells.
                    tracing::debug!(%tp, %error, "a step of a change of members was refused");
                }
            });
            self.stepping.insert(tp, begun.id());
        }
    }

    /// All groups led here, but for those that rest as they did when all was as wanted in them.
    async fn survey(&mut self) {
        let (full, unfit) = (self.led.full(), self.led.unfit());
        let applied = self.control.table.with(MetadataTable::applied);
        if self.settled_by != applied || !unfit.is_empty() {
            self.settled.clear();
            self.settled_by = applied;
        }
        // Asked before: while the table is looked at, the replica that applies the metadata waits.
        let open = self.replicas.all().into_iter().filter_map(|(tp, slot)| match slot {
            Slot::Open(partition) => {
                let status = partition.replica.status();
                // Before it is asked how it is: what happens from now on is not in that.
                let rests = partition.replica.rests_since().filter(|_| status.health == Health::Ok);
                let is_settled = rests.is_some() && self.settled.get(&tp).copied() == rests;
                (status.is_ready() && !is_settled).then(|| (tp, partition.replica.clone(), rests))
            }
            _ => None,
        });
        let open: Vec<(TopicPartition, Replica, Option<u64>)> = open.collect();
        let resting: HashMap<TopicPartition, u64> =
            open.iter().filter_map(|(tp, _, rests)| Some((*tp, (*rests)?))).collect();
        let open: Vec<(TopicPartition, Replica)> = open.into_iter().map(|(tp, replica, _)| (tp, replica)).collect();
        let goals: Vec<(Replica, Goal)> = self.control.table.with(|table| {
            let goal = |(tp, replica): (TopicPartition, Replica)| {
                let goal = Goal::of(table, tp, table.partition(tp)?);
                // One that is alone, as it should be, has nothing to be looked at.
                (goal.wanted.len() > 1 || goal.is_changing).then_some((replica, goal))
            };
            open.into_iter().filter_map(goal).collect()
        });
        let views: Vec<(Replica, Goal, GroupStatus)> = stream::iter(goals)
            .map(|(replica, goal)| async move {
                let view = tokio::time::timeout(VIEW_MAX, group(&replica)).await.ok()?.ok()?;
                Some((replica, goal, view))
            })
            .buffer_unordered(AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await;
        let lacking = views.iter().filter(|(_, goal, view)| goal.in_sync(view) < goal.wanted.len()).count();
        self.led.under_replicated.store(lacking, Ordering::Relaxed);
        self.odd = views
            .iter()
            .filter(|(_, goal, view)| goal.next(view) != PlanStep::Nothing)
            .map(|(replica, _, _)| replica.tp())
            .collect();
        for (replica, goal, view) in &views {
            let as_wanted = goal.in_sync(view) == goal.wanted.len()
                && goal.next(view) == PlanStep::Nothing
                && goal.goes_back_to(view, &unfit).is_none();
            match resting.get(&replica.tp()).filter(|_| as_wanted && unfit.is_empty()) {
                Some(since) => self.settled.insert(replica.tp(), *since),
                None => self.settled.remove(&replica.tp()),
            };
        }
        while self.giving_back.try_join_next().is_some() {}
        self.leave_full_disk(&views, &full);
        if self.gives_back {
            self.give_back(&views, &unfit);
        }
    }

    /// Where the disk here is full, partitions are led by replicas that have room: the others can be written.
    fn leave_full_disk(&mut self, views: &[(Replica, Goal, GroupStatus)], full: &HashSet<BrokerId>) {
        let is_full_here = full.contains(&self.control.me);
        // The metadata has a reserve of its own.
        let is_full = |replica: &Replica| {
            replica.status().health == Health::DiskFull || (is_full_here && replica.tp() != METADATA_PARTITION)
        };
        let due = views.iter().filter(|(replica, goal, _)| !goal.is_changing && is_full(replica));
        let due = due.filter_map(|(replica, goal, view)| Some((replica, goal.with_room(view, full)?)));
        for (replica, to) in due.take(TRANSFERS_MAX.saturating_sub(self.giving_back.len())) {
            let replica = Replica::clone(replica);
            self.giving_back.spawn(async move {
                match transfer(&replica, Some(to)).await {
                    Ok(()) => {
                        tracing::warn!(tp = %replica.tp(), "the disk is full: a replica with room leads from now on")
                    }
                    Err(error) => tracing::debug!(tp = %replica.tp(), %error, "no replica with room took the lead"),
                }
            });
        }
    }

    /// Leaderships go back to the replicas that were meant to lead, once these have caught up.
    fn give_back(&mut self, views: &[(Replica, Goal, GroupStatus)], unfit: &HashSet<BrokerId>) {
        let now = Instant::now();
        let mut due = Vec::new();
        let mut waiting = HashMap::new();
        for (replica, goal, view) in views {
            let Some((broker, preferred)) = goal.goes_back_to(view, unfit) else { continue };
            let since = *self.in_sync_since.get(&replica.tp()).unwrap_or(&now);
            waiting.insert(replica.tp(), since);
            if now.duration_since(since) >= PREFERRED_AFTER {
                due.push((replica, broker, preferred));
            }
        }
        self.in_sync_since = waiting;
        let room = TRANSFERS_MAX.saturating_sub(self.giving_back.len());
        for (replica, broker, preferred) in due.into_iter().take(room) {
            self.in_sync_since.remove(&replica.tp());
            let replica = Replica::clone(replica);
            self.giving_back.spawn(async move {
                match transfer(&replica, Some(preferred)).await {
                    Ok(()) => tracing::debug!(tp = %replica.tp(), %broker, "leadership went back"),
                    Err(error) => tracing::debug!(tp = %replica.tp(), %broker, %error, "leadership did not go back"),
                }
            });
        }
    }
}

/// As many steps of one group as go at once.
async fn step(replica: &Replica, goal: &Goal, led: &Led) -> Result<(), Error> {
    for _ in 0..STEPS_MAX {
        let view = group(replica).await?;
        let change = match goal.next(&view) {
            PlanStep::Nothing => return Ok(()),
            PlanStep::AddLearner(id) => MembershipChange::AddLearner(id),
            PlanStep::Promote(id) => MembershipChange::Promote(id),
            PlanStep::Remove(id) => MembershipChange::Remove(id),
            PlanStep::TransferAway(to) => return transfer(replica, Some(to)).await,
            PlanStep::ReportMayRemove => {
                led.tell(replica.tp(), Progress { may_remove: true, removed: Vec::new(), wanted: goal.wanted.clone() });
                return Ok(());
            }
            PlanStep::Done { removed } => {
                led.tell(replica.tp(), Progress { may_remove: false, removed, wanted: goal.wanted.clone() });
                return Ok(());
            }
        };
        tracing::info!(tp = %replica.tp(), ?change, "the group's members change");
        let (sender, receiver) = oneshot::channel();
        replica.change_membership(change, Reply::from(sender));
        answer(receiver).await?;
    }
    Ok(())
}

/// How the group is, as the replica sees it.
///
/// # Errors
/// The replica has ended, or does not answer.
pub(crate) async fn group(replica: &Replica) -> Result<GroupStatus, Error> {
    let (sender, receiver) = oneshot::channel();
    replica.group(Reply::from(sender));
    answer(receiver).await
}

/// Hands leadership over, to the best of the others where none is named; returns when another leads.
///
/// # Errors
/// It did not come to that.
pub(crate) async fn transfer(replica: &Replica, to: Option<ReplicaId>) -> Result<(), Error> {
    let (sender, receiver) = oneshot::channel();
    replica.transfer_leader(to, Reply::from(sender));
    answer(receiver).await
}

async fn answer<T>(receiver: oneshot::Receiver<Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(STEP_MAX, receiver).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err(Error::new(ErrorCode::ShuttingDown, "this broker is shutting down; ask another one")),
        Err(_) => Err(Error::new(
            ErrorCode::TimedOut,
            format!("the partition did not do it within {STEP_MAX:?}; look at its health, and try again"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::{RaftIndex, Term};
    use flowstone_replication::{MemberStatus, Membership};

    use super::*;

    fn replica(id: u64) -> ReplicaId {
        ReplicaId::new(id)
    }

    /// Replica 1 leads; `in_sync` of the others are.
    fn view(in_sync: &[u64]) -> GroupStatus {
        let members = [2, 3].map(|id| MemberStatus {
            replica: replica(id),
            is_learner: false,
            matched: RaftIndex::new(1),
            is_active: true,
            in_sync: in_sync.contains(&id),
            lag_entries: 0,
        });
        GroupStatus {
            replica: replica(1),
            leader: Some(replica(1)),
            term: Term::new(1),
            membership: Membership { voters: [1, 2, 3].map(replica).to_vec(), learners: Vec::new() },
            members: members.to_vec(),
            change_is_known: true,
            commit: RaftIndex::new(1),
            last: RaftIndex::new(1),
            pulled: None,
        }
    }

    #[test]
    fn who_has_room_leads_in_place_of_a_full_disk_and_nothing_goes_back_while_it_is_full() {
        let broker = |id: i32| BrokerId::new(id);
        let goal = |preferred: i32| Goal {
            wanted: [1, 2, 3].map(replica).to_vec(),
            hosts: [1, 2, 3].map(broker).to_vec(),
            leaving: Vec::new(),
            observers: Vec::new(),
            may_remove: false,
            is_changing: false,
            preferred: Some((broker(preferred), replica(preferred as u64))),
        };
        let full = |ids: &[i32]| ids.iter().copied().map(broker).collect::<HashSet<_>>();
        assert_eq!(goal(1).with_room(&view(&[2, 3]), &full(&[1])), Some(replica(2)));
        assert_eq!(goal(1).with_room(&view(&[2, 3]), &full(&[1, 2])), Some(replica(3)));
        assert_eq!(goal(1).with_room(&view(&[2]), &full(&[1, 2])), None, "what is behind does not lead");
        assert_eq!(goal(1).with_room(&view(&[2, 3]), &full(&[1, 2, 3])), None, "all are full: it stays");
        assert_eq!(goal(2).goes_back_to(&view(&[2]), &full(&[])), Some((broker(2), replica(2))));
        assert_eq!(goal(2).goes_back_to(&view(&[2]), &full(&[2])), None);
        assert_eq!(goal(2).goes_back_to(&view(&[3]), &full(&[])), None);
        assert_eq!(goal(1).goes_back_to(&view(&[2, 3]), &full(&[])), None, "it leads");
        let led = Led::default();
        led.set_slow(full(&[2]));
        assert_eq!(goal(2).goes_back_to(&view(&[2]), &led.unfit()), None, "nor while it is slow");
        led.set_full(full(&[3]));
        assert_eq!(led.unfit(), full(&[2, 3]));
        led.set_slow(full(&[]));
        assert!(goal(2).goes_back_to(&view(&[2]), &led.unfit()).is_some());
    }
}
