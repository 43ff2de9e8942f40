//! What a broker does for the groups that it coordinates besides deciding: it notices who is silent, computes targets when
//! members or topics change, tells sessions what is new, and lets go of what is too old.
//!
//! One task runs per partition of `__consumer_offsets` that is led here. What it keeps in memory (who was heard when, open
//! streams) ends with the leadership; the next coordinator gives every member a whole session.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use flowstone_protocol::{Error, ErrorCode, Offset, PartitionId, Term, TopicId, TopicPartition};
use parking_lot::{Mutex, MutexGuard, RwLock};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};

use super::commands::{GroupCommand, GroupReply, Install, offsets, unknown_member};
use super::pattern::Patterns;
use super::plan::{Wanting, concerns, wanted_topic};
use super::presence::{Presence, Verdict};
use super::state::GroupTable;
use crate::controller::table::MetadataTable;
use crate::coordinator::Published;
use crate::internal_topics::InternalTopic;
use crate::node::Node;
use crate::partition::{MachineView, OpenPartition, PartitionCommand, PartitionReply, Slot};
use crate::service::{now, submit};

/// Between two looks at who is silent, where there are members.
const TICK: Duration = Duration::from_millis(200);
/// A look that comes later than this was not late because of others: this process stood still.
const STOOD_STILL: Duration = Duration::from_secs(2);
/// Between two looks at what is too old.
const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// Records of one sweep.
const SWEEP_RECORDS_MAX: usize = 1_000;
/// A group's targets are computed at once when it changes, and then not again for this long per member: who comes
/// meanwhile, together with a hundred others, is counted in once.
const PAUSE_PER_MEMBER: Duration = Duration::from_micros(200);
/// Between two tries of what could not be done.
const AGAIN: Duration = Duration::from_millis(500);

/// A member of a group.
type Who = (Arc<str>, Arc<str>);

/// The way to one open session.
#[derive(Debug, Default)]
pub(crate) struct Door {
    /// Told that something may be new.
    pub(crate) wake: Notify,
    ended: OnceLock<Error>,
    /// Held for a look or a change.
    removed_for: Mutex<Option<Error>>,
}

impl Door {
    /// The session is over; the first reason counts.
    pub(crate) fn end(&self, why: Error) {
        self.ended.get_or_init(|| why);
        self.wake.notify_one();
    }

    /// Why it is over.
    pub(crate) fn ended(&self) -> Option<&Error> {
        self.ended.get()
    }

    /// Why the member is being removed, if it is: the session may find it gone before it is told to end.
    pub(crate) fn removed_for(&self) -> Option<Error> {
        self.removed_for.lock().clone()
    }
}

/// A member while this broker coordinates its group.
#[derive(Debug)]
struct Attendance {
    presence: Presence,
    door: Option<Arc<Door>>,
}

impl Attendance {
    fn new(now: Instant) -> Self {
        Self { presence: Presence::new(now), door: None }
    }
}

/// Who is there, as long as one leadership goes on.
#[derive(Debug, Default)]
struct Present {
    /// Held for a look or a change; nothing waits inside.
    members: Mutex<HashMap<Who, Attendance>>,
    /// The leadership is over: nobody enters any more. Changed and read while `members` is held.
    is_over: AtomicBool,
}

impl Present {
    fn lock(&self) -> MutexGuard<'_, HashMap<Who, Attendance>> {
        self.members.lock()
    }

    fn enter(&self, group: &Arc<str>, member: &Arc<str>) -> Result<Arc<Door>, Error> {
        let door = Arc::new(Door::default());
        let mut members = self.lock();
        if self.is_over.load(Ordering::Relaxed) {
            return Err(not_coordinator());
        }
        let now = Instant::now();
        let attendance = members.entry((Arc::clone(group), Arc::clone(member))).or_insert_with(|| Attendance::new(now));
        attendance.presence.heard(now);
        if let Some(earlier) = attendance.door.replace(Arc::clone(&door)) {
            let why = "another stream goes on with this membership; only one may";
            earlier.end(Error::new(ErrorCode::StaleMemberEpoch, why));
        }
        Ok(door)
    }

    /// The leadership is over: all sessions end, and no other one begins.
    fn close(&self) {
        let members = self.lock();
        self.is_over.store(true, Ordering::Relaxed);
        for attendance in members.values() {
            if let Some(door) = &attendance.door {
                door.end(not_coordinator());
            }
        }
    }
}

/// The groups of one partition, while it is led here.
#[derive(Debug)]
pub(crate) struct LedGroups {
    pub(crate) partition: Arc<OpenPartition>,
    pub(crate) view: Published<GroupTable>,
    present: Present,
}

impl LedGroups {
    /// A member's session begins; one that it had ends.
    ///
    /// # Errors
    /// `NOT_COORDINATOR` where the leadership has ended meanwhile.
    pub(crate) fn enter(&self, group: &Arc<str>, member: &Arc<str>) -> Result<Arc<Door>, Error> {
        self.present.enter(group, member)
    }

    /// The member said something.
    pub(crate) fn heard(&self, group: &Arc<str>, member: &Arc<str>) {
        if let Some(attendance) = self.present.lock().get_mut(&(Arc::clone(group), Arc::clone(member))) {
            attendance.presence.heard(Instant::now());
        }
    }

    /// The session's stream is gone. The membership goes on until its timeout.
    pub(crate) fn exit(&self, group: &Arc<str>, member: &Arc<str>, door: &Arc<Door>) {
        if let Some(attendance) = self.present.lock().get_mut(&(Arc::clone(group), Arc::clone(member)))
            && attendance.door.as_ref().is_some_and(|current| Arc::ptr_eq(current, door))
        {
            attendance.door = None;
        }
    }

    /// The member is about to be removed for this reason; or, with none, stays after all.
    fn removing(&self, group: &Arc<str>, member: &Arc<str>, why: Option<Error>) {
        if let Some(attendance) = self.present.lock().get(&(Arc::clone(group), Arc::clone(member)))
            && let Some(door) = &attendance.door
        {
            *door.removed_for.lock() = why;
        }
    }

    /// The member is one no more.
    pub(crate) fn end(&self, group: &Arc<str>, member: &Arc<str>, why: Error) {
        let gone = self.present.lock().remove(&(Arc::clone(group), Arc::clone(member)));
        if let Some(door) = gone.and_then(|attendance| attendance.door) {
            door.end(why);
        }
    }

    /// Groups and members, as they are committed.
    fn counts(&self) -> (usize, usize) {
        self.view.with(|table| (table.group_count(), table.member_count()))
    }
}

/// What a member is told that is removed.
fn removal(group: &str, is_silent: bool) -> Error {
    let mut why = unknown_member(group);
    if !is_silent {
        why.message =
            "this member did not give up in time what it was asked for, and was removed from its group: give up \
                       everything and join anew under member epoch 0"
                .to_owned();
    }
    why
}

fn not_coordinator() -> Error {
    let what = "this broker does not coordinate the group any more; look for the coordinator and go on there";
    Error::new(ErrorCode::NotCoordinator, what)
}

/// All partitions of `__consumer_offsets` that are led here.
#[derive(Clone, Debug, Default)]
pub(crate) struct GroupCoordinators {
    /// Written by the driver; readers clone an entry out.
    led: Arc<RwLock<HashMap<TopicPartition, Arc<LedGroups>>>>,
}

impl GroupCoordinators {
    pub(crate) fn get(&self, tp: TopicPartition) -> Option<Arc<LedGroups>> {
        self.led.read().get(&tp).cloned()
    }

    /// All of them, in no order.
    pub(crate) fn all(&self) -> Vec<Arc<LedGroups>> {
        self.led.read().values().cloned().collect()
    }

    /// Groups and members of all groups.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let all = self.all();
        all.iter().map(|led| led.counts()).fold((0, 0), |sum, next| (sum.0 + next.0, sum.1 + next.1))
    }
}

/// A leadership that is followed.
struct Following {
    term: Term,
    partition: Arc<OpenPartition>,
    task: AbortHandle,
}

/// Coordinates whatever partition of `__consumer_offsets` is led here, until aborted.
pub(crate) async fn run(node: Arc<Node>) {
    let mut changes = node.replicas.changes();
    let mut tasks = JoinSet::new();
    let mut following: HashMap<TopicPartition, Following> = HashMap::new();
    loop {
        changes.borrow_and_update();
        let led = led_here(&node);
        following.retain(|tp, known| {
            let stays = led.get(tp).is_some_and(|(partition, term)| {
                *term == known.term && Arc::ptr_eq(partition, &known.partition) && !known.task.is_finished()
            });
            if !stays {
                known.task.abort();
            }
            stays
        });
        for (tp, (partition, term)) in led {
            let MachineView::Groups(view) = &partition.view else { continue };
            following.entry(tp).or_insert_with(|| {
                let led = Arc::new(LedGroups {
                    partition: Arc::clone(&partition),
                    view: view.clone(),
                    present: Present::default(),
                });
                let task = tasks.spawn(Driver::new(Arc::clone(&node), led).run());
                Following { term, partition: Arc::clone(&partition), task }
            });
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            // Only taken off the list; one that ended by itself is begun anew where it still leads.
            Some(_) = tasks.join_next() => {}
        }
    }
}

fn led_here(node: &Node) -> HashMap<TopicPartition, (Arc<OpenPartition>, Term)> {
    let topic = node
        .table
        .with(|table| table.topic_named(InternalTopic::Groups.name()).map(|topic| (topic.id, topic.partitions.len())));
    let Some((topic, partitions)) = topic else { return HashMap::new() };
    let all = (0..partitions).map(|number| TopicPartition { topic, partition: PartitionId::new(number as i32) });
    let led = all.filter_map(|tp| match node.replicas.get(tp)? {
        Slot::Open(partition) => {
            let status = partition.replica.status();
            status.is_ready().then_some((tp, (partition, status.term)))
        }
        _ => None,
    });
    led.collect()
}

/// Is the coordinator of one partition's groups, for one term.
struct Driver {
    node: Arc<Node>,
    led: Arc<LedGroups>,
    /// Groups whose targets are to be computed, and not before when.
    dirty: HashMap<Arc<str>, Instant>,
    /// Groups whose targets were computed a moment ago.
    rested: HashMap<Arc<str>, Instant>,
    patterns: Patterns,
    /// Topics that are gone, of which offsets may be left.
    gone: HashSet<TopicId>,
    /// Groups' changes up to here are seen.
    seen: Offset,
    /// Topics' changes up to here are seen.
    topics_seen: Offset,
}

impl Drop for Driver {
    fn drop(&mut self) {
        let tp = self.led.partition.tp;
        let mut led = self.node.groups.led.write();
        // The next leadership may be followed already.
        if led.get(&tp).is_some_and(|current| Arc::ptr_eq(current, &self.led)) {
            led.remove(&tp);
        }
        drop(led);
        self.led.present.close();
    }
}

impl Driver {
    fn new(node: Arc<Node>, led: Arc<LedGroups>) -> Self {
        Self {
            node,
            led,
            dirty: HashMap::new(),
            rested: HashMap::new(),
            patterns: Patterns::default(),
            gone: HashSet::new(),
            seen: Offset::new(-1),
            topics_seen: Offset::new(-1),
        }
    }

    async fn run(mut self) {
        let mut changes = self.led.view.changes();
        let mut topics = self.node.table.changes();
        changes.borrow_and_update();
        self.begin();
        self.node.groups.led.write().insert(self.led.partition.tp, Arc::clone(&self.led));
        // Without that, topics that are there might be taken for gone.
        while let Err(error) = self.node.control.caught_up().await {
            tracing::debug!(%error, "a group coordinator waits for the metadata");
            tokio::time::sleep(AGAIN).await;
        }
        topics.borrow_and_update();
        self.topics_seen = self.node.table.with(MetadataTable::applied);
        self.gone = self.unknown_topics().into_iter().collect();
        self.forget_gone().await;
        let (mut swept, mut looked) = (Instant::now(), Instant::now());
        loop {
            self.look();
            self.assign_due().await;
            let started = Instant::now();
            let has_members = !self.led.present.lock().is_empty();
            let mut until = swept + SWEEP_EVERY;
            if has_members {
                until = until.min(looked + TICK);
            }
            until = self.dirty.values().fold(until, |until, due| until.min(*due));
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                changed = topics.changed() => {
                    if changed.is_err() { return }
                    self.topics_changed().await;
                }
                () = tokio::time::sleep_until(until.into()) => {}
            }
            let now = Instant::now();
            if now.saturating_duration_since(until.max(started)) > STOOD_STILL {
                tracing::warn!("this process stood still; all members of groups are given a new session");
                for attendance in self.led.present.lock().values_mut() {
                    attendance.presence.anew(now);
                }
            }
            if now >= looked + TICK {
                self.remove_silent(now).await;
                looked = Instant::now();
            }
            if now >= swept + SWEEP_EVERY {
                self.forget_gone().await;
                self.sweep().await;
                swept = Instant::now();
            }
        }
    }

    /// Everybody is given a whole session; every group is looked at.
    fn begin(&mut self) {
        let now = Instant::now();
        let mut present = self.led.present.lock();
        self.led.view.with(|table| {
            for (name, group) in table.groups().filter(|(_, group)| !group.members.is_empty()) {
                self.dirty.insert(Arc::clone(name), now);
                for (id, member) in &group.members {
                    let mut attendance = Attendance::new(now);
                    attendance.presence.asked(&member.revoking, now);
                    present.insert((Arc::clone(name), Arc::clone(id)), attendance);
                }
            }
            self.seen = crate::coordinator::StateMachine::applied(table);
        });
    }

    /// What changed since the last look: sessions are told, and groups are noted whose targets are due.
    fn look(&mut self) {
        let now = Instant::now();
        let mut present = self.led.present.lock();
        let (dirty, rested) = (&mut self.dirty, &self.rested);
        self.seen = self.led.view.with(|table| {
            for (name, member) in table.changed_since(self.seen) {
                let Some(group) = table.group(name) else { continue };
                if group.assigned_epoch != group.epoch && !group.members.is_empty() {
                    let due = rested.get(name).copied().unwrap_or(now);
                    dirty.entry(Arc::clone(name)).or_insert(due);
                }
                let Some((id, member)) = member.and_then(|id| Some((id, group.members.get(id)?))) else { continue };
                let who = (Arc::clone(name), Arc::clone(id));
                let attendance = present.entry(who).or_insert_with(|| Attendance::new(now));
                attendance.presence.asked(&member.revoking, now);
                if let Some(door) = &attendance.door {
                    door.wake.notify_one();
                }
            }
            crate::coordinator::StateMachine::applied(table)
        });
    }

    /// Computes the targets that are due, and has them decided.
    async fn assign_due(&mut self) {
        let now = Instant::now();
        self.rested.retain(|_, until| *until > now);
        let due: Vec<Arc<str>> =
            self.dirty.iter().filter(|(_, due)| **due <= now).map(|(name, _)| Arc::clone(name)).collect();
        for name in due {
            self.dirty.remove(&name);
            let Some((install, members)) = self.plan(&name).await else { continue };
            let Some(install) = install else { continue };
            let command = GroupCommand::Install(install);
            match self.submit(command).await {
                Ok(_) => {
                    self.node.metrics.group_rebalances.inc();
                    self.rested.insert(name, Instant::now() + PAUSE_PER_MEMBER * members as u32);
                }
                Err(error) => {
                    tracing::debug!(%error, group = &*name, "targets could not be set; it is tried again");
                    self.dirty.insert(name, Instant::now() + AGAIN);
                }
            }
        }
    }

    /// The targets of a group, and how many members it has; `None` where it has none.
    async fn plan(&mut self, name: &Arc<str>) -> Option<(Option<Install>, usize)> {
        let wanting = self.led.view.with(|table| table.group(name).map(|group| Wanting::of(name, group)))?;
        let members = wanting.member_count();
        if members == 0 {
            return None;
        }
        let patterns = &mut self.patterns;
        let topics = self.node.table.with(|table| {
            let topics = wanting.topics(table, patterns);
            let has_racks = wanting.has_racks();
            topics.iter().map(|topic| wanted_topic(topic, has_racks, table)).collect::<Vec<_>>()
        });
        // Of very many partitions it takes a while: other tasks go on meanwhile.
        let mut patterns = std::mem::take(&mut self.patterns);
        let planned = tokio::task::spawn_blocking(move || {
            let install = wanting.plan(&topics, &mut patterns);
            (install, patterns)
        });
        match planned.await {
            Ok((install, patterns)) => {
                self.patterns = patterns;
                Some((install, members))
            }
            Err(error) => {
                tracing::error!(%error, group = &**name, "a group's targets could not be computed; it is tried again");
                self.dirty.insert(Arc::clone(name), Instant::now() + AGAIN);
                None
            }
        }
    }

    fn submit(&self, command: GroupCommand) -> impl Future<Output = Result<PartitionReply, Error>> + use<'_> {
        let command = PartitionCommand::Groups(command);
        submit(&self.node, InternalTopic::Groups, &self.led.partition, command)
    }

    /// Members that were silent for their session timeout, or keep what they were asked for, are removed.
    async fn remove_silent(&mut self, now: Instant) {
        let (mut silent, mut gone) = (Vec::new(), Vec::new());
        {
            let present = self.led.present.lock();
            self.led.view.with(|table| {
                for ((name, id), attendance) in &*present {
                    let member = table.group(name).and_then(|group| group.members.get(id));
                    let Some(member) = member else {
                        gone.push((Arc::clone(name), Arc::clone(id)));
                        continue;
                    };
                    let verdict = attendance.presence.verdict(member, now);
                    if verdict != Verdict::Stays {
                        silent.push((Arc::clone(name), Arc::clone(id), verdict == Verdict::IsSilent));
                    }
                }
            });
        }
        for (name, id) in gone {
            self.led.end(&name, &id, unknown_member(&name));
        }
        let removals = silent.iter().map(|(name, id, is_silent)| {
            let why = if *is_silent { "silent" } else { "keeps what it was asked to give up" };
            tracing::info!(group = &**name, member = &**id, why, "a member is removed from its group");
            self.led.removing(name, id, Some(removal(name, *is_silent)));
            self.submit(GroupCommand::Remove { group: Arc::clone(name), member: Arc::clone(id) })
        });
        let removed = futures::future::join_all(removals).await;
        for ((name, id, is_silent), removed) in silent.iter().zip(removed) {
            match removed {
                Ok(_) => {
                    self.node.metrics.group_members_removed.inc();
                    self.led.end(name, id, removal(name, *is_silent));
                }
                Err(error) => {
                    self.led.removing(name, id, None);
                    tracing::debug!(%error, "a member could not be removed; it is tried again");
                }
            }
        }
    }

    /// Topics were made, grew, or are gone.
    async fn topics_changed(&mut self) {
        if self.node.table.with(MetadataTable::applied) < self.topics_seen {
            // The metadata went on with a loss: nothing that was seen counts any more.
            self.topics_seen = Offset::new(-1);
        }
        let (applied, changed, deleted) = self.node.table.with(|table| {
            let changed: Vec<_> = table.changed_since(self.topics_seen).cloned().collect();
            (table.applied(), changed, table.deleted_since(self.topics_seen))
        });
        self.topics_seen = applied;
        let deleted: HashSet<TopicId> = match deleted {
            Some(deleted) => deleted.into_iter().collect(),
            // Too many to be remembered.
            None => self.unknown_topics().into_iter().collect(),
        };
        if changed.is_empty() && deleted.is_empty() {
            return;
        }
        let now = Instant::now();
        let (patterns, dirty) = (&mut self.patterns, &mut self.dirty);
        self.led.view.with(|table| {
            for (name, group) in table.groups() {
                if concerns(group, &changed, &deleted, patterns) {
                    dirty.entry(Arc::clone(name)).or_insert(now);
                }
            }
        });
        self.gone.extend(deleted);
        self.forget_gone().await;
    }

    /// Topics of committed offsets that are gone. What was committed is older than the metadata that is looked at.
    fn unknown_topics(&self) -> Vec<TopicId> {
        let committed: HashSet<TopicId> = self
            .led
            .view
            .with(|table| table.groups().flat_map(|(_, group)| group.offsets.keys().map(|tp| tp.topic)).collect());
        self.node.table.with(|table| committed.into_iter().filter(|topic| table.topic(*topic).is_none()).collect())
    }

    /// Offsets of topics that are gone go with them, piece by piece; those that could not are tried again with the sweep.
    async fn forget_gone(&mut self) {
        let is_left = |table: &GroupTable| {
            table.groups().any(|(_, group)| group.offsets.keys().any(|tp| self.gone.contains(&tp.topic)))
        };
        while !self.gone.is_empty() && self.led.view.with(is_left) {
            match self.submit(GroupCommand::ForgetTopics(self.gone.iter().copied().collect())).await {
                Ok(PartitionReply::Groups(GroupReply::More)) => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::debug!(%error, "offsets of topics that are gone stay for a while");
                    return;
                }
            }
        }
        self.gone.clear();
    }

    async fn sweep(&self) {
        while self.led.view.with(|table| offsets::is_due(table, now())) {
            match self.submit(GroupCommand::Expire { records_max: SWEEP_RECORDS_MAX }).await {
                Ok(PartitionReply::Groups(GroupReply::Expired { more: true })) => {}
                Ok(_) => return,
                Err(error) => {
                    tracing::debug!(%error, "what is too old stays until the next sweep");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_enters_once_the_leadership_is_over() {
        let present = Present::default();
        let (group, member): (Arc<str>, Arc<str>) = ("g".into(), "m".into());
        let first = present.enter(&group, &member).expect("it leads");
        let second = present.enter(&group, &member).expect("it leads");
        assert_eq!(first.ended().map(|error| error.code), Some(ErrorCode::StaleMemberEpoch));
        assert!(second.ended().is_none());
        present.close();
        assert_eq!(second.ended().map(|error| error.code), Some(ErrorCode::NotCoordinator));
        let late = present.enter(&group, &member).map_err(|error| error.code);
        assert_eq!(late.err(), Some(ErrorCode::NotCoordinator), "nobody would ever wake it");
    }
}
