//! Consumer groups: partitions shared out among members, positions kept by the cluster.

mod events;
mod membership;
mod session;
mod shared;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use flowstone_protocol::pb;
use flowstone_protocol::pb::CoordinatorKind;
use futures::Stream;
use tokio::sync::oneshot;

use crate::cluster::Cluster;
use crate::consumer::{
    Consumer, ConsumerBuilder, ConsumerRecord, Isolation, OnOutOfRange, Position, RecordBatch, StartAt,
};
use crate::coordinator::Coordinator;
use crate::error::{Error, ErrorCode, Result};

pub use events::{GroupEvent, GroupEvents, Revocation};

use crate::admin::check_range;
use membership::Membership;
pub(crate) use membership::Part;
use session::Session;
pub(crate) use shared::Place;
use shared::{Change, Closing, Shared};

/// How a group shares its partitions out among its members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Assignor {
    /// Only what must move moves, one member after the other, while all others read on.
    #[default]
    Cooperative,
    /// As even as possible, keeping what each member has.
    Sticky,
    /// Topic by topic, in runs of neighbours.
    Range,
    /// One by one, in turn.
    RoundRobin,
}

impl Assignor {
    /// Its name in the protocol.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cooperative => "cooperative",
            Self::Sticky => "sticky",
            Self::Range => "range",
            Self::RoundRobin => "roundrobin",
        }
    }
}

/// How to take part in a group; made by [`Client::group`](crate::Client::group).
#[derive(Clone, Debug)]
#[must_use = "nobody joins before join()"]
pub struct GroupBuilder {
    cluster: Arc<Cluster>,
    group: String,
    client_id: String,
    topics: Vec<String>,
    pattern: String,
    start_at: StartAt,
    instance_id: String,
    assignor: Option<Assignor>,
    session_timeout: Option<Duration>,
    rebalance_timeout: Option<Duration>,
    commit_every: Option<Duration>,
    rack: String,
    consumer: ConsumerBuilder,
}

/// Unless set otherwise: how often what was processed is committed.
const COMMIT_EVERY: Duration = Duration::from_secs(1);

impl GroupBuilder {
    pub(crate) fn new(cluster: Arc<Cluster>, group: String, client_id: String) -> Self {
        let consumer = ConsumerBuilder::new(cluster.clone());
        Self {
            cluster,
            group,
            client_id,
            topics: Vec::new(),
            pattern: String::new(),
            start_at: StartAt::default(),
            instance_id: String::new(),
            assignor: None,
            session_timeout: None,
            rebalance_timeout: None,
            commit_every: Some(COMMIT_EVERY),
            rack: String::new(),
            consumer,
        }
    }

    /// Reads this topic too.
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.topics.push(topic.into());
        self
    }

    /// Reads these topics too. Topics that do not exist yet are read once they do.
    pub fn topics(mut self, topics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.topics.extend(topics.into_iter().map(Into::into));
        self
    }

    /// Reads every topic whose whole name this regular expression matches too, those that come later included.
    pub fn pattern(mut self, pattern: impl Into<String>) -> Self {
        self.pattern = pattern.into();
        self
    }

    /// Where reading begins in partitions of which the group has committed nothing; [`StartAt::Earliest`] unless set.
    pub fn start_at(mut self, start_at: StartAt) -> Self {
        self.start_at = start_at;
        self
    }

    /// A name that stays the same across restarts: who comes back with it within the session timeout has its predecessor's
    /// partitions again, without a rebalance.
    pub fn instance_id(mut self, instance_id: impl Into<String>) -> Self {
        self.instance_id = instance_id.into();
        self
    }

    /// How partitions are shared out; the group's way unless set.
    pub fn assignor(mut self, assignor: Assignor) -> Self {
        self.assignor = Some(assignor);
        self
    }

    /// Silence after which the group goes on without this member; the broker's default unless set. Heartbeats come from
    /// a task of their own: a slow program does not fall silent, one that hangs as a whole does.
    pub fn session_timeout(mut self, timeout: Duration) -> Self {
        self.session_timeout = Some(timeout);
        self
    }

    /// How long this member may take to give partitions up; the broker's default unless set.
    pub fn rebalance_timeout(mut self, timeout: Duration) -> Self {
        self.rebalance_timeout = Some(timeout);
        self
    }

    /// How often what was processed is committed; every second unless set. What was handed out counts as processed when
    /// the next is asked for: nothing is skipped, and what was in hand when a program died is read again (at least once).
    pub fn commit_every(mut self, interval: Duration) -> Self {
        self.commit_every = Some(interval);
        self
    }

    /// Nothing is committed but by [`GroupConsumer::commit`] and its like, and by transactions.
    pub fn commit_manually(mut self) -> Self {
        self.commit_every = None;
        self
    }

    /// Which records of transactions are handed out; [`Isolation::ReadCommitted`] unless set.
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.consumer = self.consumer.isolation(isolation);
        self
    }

    /// Where this program runs: see [`ConsumerBuilder::rack`]; the group gives it partitions with a replica there first.
    pub fn rack(mut self, rack: impl AsRef<str>) -> Self {
        rack.as_ref().clone_into(&mut self.rack);
        self.consumer = self.consumer.rack(rack);
        self
    }

    /// See [`ConsumerBuilder::prefetch_bytes`].
    pub fn prefetch_bytes(mut self, bytes: usize) -> Self {
        self.consumer = self.consumer.prefetch_bytes(bytes);
        self
    }

    /// See [`ConsumerBuilder::on_out_of_range`].
    pub fn on_out_of_range(mut self, policy: OnOutOfRange) -> Self {
        self.consumer = self.consumer.on_out_of_range(policy);
        self
    }

    /// Joins: returns once the group has taken this member in. Its partitions come with the first batches.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for settings that make no sense; `INVALID_GROUP`, `INVALID_PATTERN`, `GROUP_FULL`;
    /// `TIMED_OUT` where no broker answers.
    pub async fn join(self) -> Result<GroupConsumer> {
        let invalid = |message: &str| Err(Error::new(ErrorCode::InvalidRequest, message));
        if self.topics.is_empty() && self.pattern.is_empty() {
            return invalid("a group's member needs topics or a pattern to subscribe to");
        }
        if self.commit_every.is_some_and(|every| every.is_zero()) {
            return invalid("the time between two commits must be longer than zero");
        }
        if matches!(self.start_at, StartAt::Offset(offset) if offset < 0) {
            return invalid("an offset to start at cannot be negative");
        }
        let millis = |timeout: Option<Duration>| match timeout {
            None => Ok(0),
            Some(timeout) => i32::try_from(timeout.as_millis())
                .ok()
                .filter(|millis| *millis > 0)
                .ok_or_else(|| Error::new(ErrorCode::InvalidRequest, "a group's timeouts must be 1 ms to 24 days")),
        };
        let join = pb::JoinGroup {
            group: self.group.clone(),
            member_id: random_id(),
            member_epoch: 0,
            instance_id: self.instance_id.clone(),
            client_id: self.client_id,
            rack: self.rack,
            topics: self.topics,
            topic_pattern: self.pattern,
            assignor: self.assignor.map(Assignor::as_str).unwrap_or_default().to_owned(),
            session_timeout_ms: millis(self.session_timeout)?,
            rebalance_timeout_ms: millis(self.rebalance_timeout)?,
            owned: Vec::new(),
        };
        let consumer = Consumer::of_group(self.consumer)?;
        let shared = Shared::new(Membership::new(join, Instant::now()), self.commit_every.is_some());
        let coordinator = Arc::new(Coordinator::new(self.cluster.clone(), CoordinatorKind::Group, self.group));
        let session = Session {
            shared: shared.clone(),
            coordinator: coordinator.clone(),
            start_at: self.start_at,
            commit_every: self.commit_every,
            keep_place: !self.instance_id.is_empty(),
        };
        tokio::spawn(session.run());
        let mut joined = GroupConsumer { shared, coordinator, consumer, current: None };
        let timeout = self.cluster.request_timeout();
        match tokio::time::timeout(timeout, std::future::poll_fn(|context| joined.poll_joined(context))).await {
            Ok(Ok(())) => Ok(joined),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::unreachable(format!(
                "the group's coordinator did not take this member in within {timeout:?}; is the cluster healthy?"
            ))),
        }
    }
}

/// A random id, in the form of a UUID.
fn random_id() -> String {
    let bits = rand::random::<u128>();
    format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        bits >> 96,
        (bits >> 80) & 0xffff,
        (bits >> 68) & 0xfff,
        0x8000 | (bits >> 52) & 0x3fff,
        bits & 0xffff_ffff_ffff
    )
}

/// A member of a group: reads the partitions that the group gives it, and keeps its positions in the cluster.
///
/// ```no_run
/// # async fn run(client: flowstone_client::Client) -> flowstone_client::Result<()> {
/// let mut group = client.group("billing").topics(["orders"]).join().await?;
/// while let Some(batch) = group.next_batch().await {
///     for record in &batch? {
///         println!("{}: {:?}", record.offset(), record.value_bytes());
///     }
///     // Committed by itself when the next batch is asked for: at least once.
/// }
/// # Ok(())
/// # }
/// ```
///
/// When partitions go to other members, what was in hand is finished first: they are given up when the next batch is
/// asked for. Dropping it leaves the group; [`close`](Self::close) commits what was handed out first.
pub struct GroupConsumer {
    shared: Arc<Shared>,
    coordinator: Arc<Coordinator>,
    consumer: Consumer,
    /// What the stream of records is in the middle of.
    current: Option<Current>,
}

/// Positions as they are committed.
#[derive(Debug, Default)]
struct Placed {
    offsets: BTreeMap<Part, Place>,
    /// The topic's name, the partition, and for which time the member has it.
    owned: Vec<(String, Part, u64)>,
    /// Those beyond what was ever seen: their leaders have to say whether they are there.
    unseen: Vec<Position>,
}

/// A batch of which records are handed out one by one.
#[derive(Debug)]
struct Current {
    batch: RecordBatch,
    /// The next record's place in it.
    next: usize,
    /// Of its partition, when it came.
    serial: u64,
    /// Leader epoch of its records.
    epoch: i32,
}

impl Current {
    fn part(&self) -> Part {
        (self.batch.topic_id().clone(), self.batch.partition())
    }
}

impl std::fmt::Debug for GroupConsumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupConsumer").field("member", &self.shared).finish_non_exhaustive()
    }
}

impl Drop for GroupConsumer {
    fn drop(&mut self) {
        self.begin_close(Closing::Dropped);
    }
}

impl GroupConsumer {
    /// The next records of some partition, once there are any; `None` after the membership ended with an error that was
    /// told. Dropping the future loses nothing.
    ///
    /// # Errors
    /// `FENCED_INSTANCE` where another member took the instance id, and whatever else ends a membership for good; what
    /// [`Consumer::next_batch`] fails with, once for each partition.
    pub async fn next_batch(&mut self) -> Option<Result<RecordBatch>> {
        std::future::poll_fn(|context| self.poll_next_batch(context)).await
    }

    /// The next record; as [`next_batch`](Self::next_batch). It counts as processed when the one after it is asked for.
    ///
    /// # Errors
    /// As [`next_batch`](Self::next_batch).
    pub async fn next_record(&mut self) -> Option<Result<ConsumerRecord>> {
        std::future::poll_fn(|context| self.poll_next_record(context)).await
    }

    /// The records, one by one.
    pub fn records(&mut self) -> GroupRecords<'_> {
        GroupRecords { group: self }
    }

    fn poll_joined(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let mut state = self.shared.state();
        if state.membership.is_member() {
            return Poll::Ready(Ok(()));
        }
        if state.over {
            let failure = state.failure.take();
            return Poll::Ready(Err(failure.unwrap_or_else(|| Error::closed("group's consumer"))));
        }
        state.wake_me(context.waker());
        Poll::Pending
    }

    /// As [`next_batch`](Self::next_batch), for code that polls.
    pub fn poll_next_batch(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<RecordBatch>>> {
        if let Some(current) = self.current.take() {
            let part = current.part();
            let Current { mut batch, next, serial, epoch } = current;
            batch.skip_to(next);
            let place = Place { offset: batch.next_offset(), epoch };
            if !batch.is_empty() && self.shared.state().hand_out(&part, place, Some(serial)).is_some() {
                return Poll::Ready(Some(Ok(batch)));
            }
        }
        self.poll_batch(context).map(|next| next.map(|next| next.map(|current| current.batch)))
    }

    /// Does what the session's task said of partitions since the last time.
    fn take_changes(&mut self) {
        let changes = self.shared.state().take_changes();
        for (part, change) in changes {
            self.current.take_if(|current| current.part() == part);
            match change {
                Change::Begin { topic, place } => self.consumer.assign(&topic, part.1, place.offset, place.epoch),
                Change::End => self.consumer.unassign(&part.0, part.1),
            }
        }
    }

    /// The user is done with what it had in hand.
    fn hand_back(&self) {
        if self.shared.state().hand_back(Instant::now()) {
            self.shared.work.notify_one();
        }
    }

    /// The next batch that may be handed out, marked as in hand as a whole.
    fn poll_batch(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Current>>> {
        loop {
            self.hand_back();
            {
                let mut state = self.shared.state();
                if let Some(failure) = state.failure.take() {
                    return Poll::Ready(Some(Err(failure)));
                }
                if state.over {
                    return Poll::Ready(None);
                }
                // Before the changes are taken, so that those that come later wake.
                state.wake_me(context.waker());
            }
            self.take_changes();
            let polled = self.consumer.poll_next_batch(context);
            let mut given = None;
            if let Poll::Ready(Some(Ok(batch))) = &polled {
                let epoch = self.consumer.last_epoch(batch.topic(), batch.partition());
                let place = Place { offset: batch.next_offset(), epoch };
                let part = (batch.topic_id().clone(), batch.partition());
                // None where it went to another member a moment ago.
                given = self.shared.state().hand_out(&part, place, None).map(|serial| (serial, epoch));
            }
            self.passed_over();
            match polled {
                Poll::Ready(Some(Ok(mut batch))) => {
                    if let Some((serial, epoch)) = given {
                        batch.set_member(Member {
                            shared: self.shared.clone(),
                            coordinator: self.coordinator.clone(),
                            serial,
                        });
                        return Poll::Ready(Some(Ok(Current { batch, next: 0, serial, epoch })));
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Positions that moved past records that nobody is handed (control records, aborted transactions) count as processed.
    fn passed_over(&mut self) {
        let moved = self.consumer.take_passed_over();
        if !moved.is_empty() {
            let mut state = self.shared.state();
            for (topic_id, partition, place) in moved {
                state.passed_over(&(topic_id, partition), place);
            }
        }
    }

    fn poll_next_record(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<ConsumerRecord>>> {
        loop {
            if let Some(mut current) = self.current.take()
                && let Some(record) = current.batch.get(current.next).map(|record| record.to_record())
            {
                self.hand_back();
                let after = current.batch.offset_at(current.next + 1).unwrap_or(current.batch.next_offset());
                let place = Place { offset: after, epoch: current.epoch };
                if self.shared.state().hand_out(&current.part(), place, Some(current.serial)).is_none() {
                    continue;
                }
                current.next += 1;
                self.current = Some(current);
                return Poll::Ready(Some(Ok(record)));
            }
            match std::task::ready!(self.poll_batch(context)) {
                Some(Ok(current)) => {
                    // Nothing of it is in hand yet.
                    let first = current.batch.offset_at(0).unwrap_or(current.batch.next_offset());
                    self.shared.state().hold_at(&current.part(), first);
                    self.current = Some(current);
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }

    /// Commits everything that was handed out, and waits until the group has it. Called before the records are dealt
    /// with, that is at most once; called after, at least once. Partitions whose batches a transaction
    /// [consumed](crate::Transaction::consumed) are left to transactions.
    ///
    /// # Errors
    /// `NOT_ASSIGNED`, `UNKNOWN_MEMBER` where a partition is another member's by now; nothing of that partition was
    /// committed, and its records will be read by that member. `SHUTTING_DOWN` once the member left. Where no coordinator
    /// can be reached this waits for one; the group gives the partitions away after the session timeout.
    pub fn commit(&self) -> impl Future<Output = Result<()>> + Send + 'static + use<> {
        self.commit_async()
    }

    /// Commits everything that was handed out; the future tells when the group has it, and need not be awaited.
    pub fn commit_async(&self) -> impl Future<Output = Result<()>> + Send + 'static + use<> {
        let (reply, answered) = oneshot::channel();
        {
            let mut state = self.shared.state();
            if state.over || state.closing.is_some() {
                let _ = reply.send(Err(Error::closed("group's consumer")));
            } else {
                state.commit_handed(reply);
            }
        }
        self.shared.work.notify_one();
        async move { answered.await.unwrap_or_else(|_| Err(Error::closed("group's consumer"))) }
    }

    /// Commits these positions, whatever was handed out: each is the next offset to read.
    ///
    /// # Errors
    /// As [`commit`](Self::commit); `UNKNOWN_PARTITION` for one that this member does not own; `OFFSET_OUT_OF_RANGE` for a
    /// position that its log does not have.
    pub fn commit_positions(
        &self,
        positions: &[Position],
    ) -> impl Future<Output = Result<()>> + Send + 'static + use<> {
        let placed = self.places(positions);
        let (shared, coordinator) = (Arc::clone(&self.shared), Arc::clone(&self.coordinator));
        async move {
            let Placed { offsets, owned, unseen } = placed?;
            check_range(coordinator.cluster(), &unseen).await?;
            let (reply, answered) = oneshot::channel();
            {
                let mut state = shared.state();
                if state.over || state.closing.is_some() {
                    return Err(Error::closed("group's consumer"));
                }
                // Given to it anew since, it may begin where another member got to.
                if let Some((topic, (_, partition), _)) =
                    owned.iter().find(|(_, part, serial)| !state.owns(part, *serial))
                {
                    let message = "another member may have it by now, and reads on from what was committed before";
                    return Err(Error::new(ErrorCode::NotAssigned, message).at(topic, *partition));
                }
                state.commit(offsets, Some(reply));
            }
            shared.work.notify_one();
            answered.await.unwrap_or_else(|_| Err(Error::closed("group's consumer")))
        }
    }

    /// What is to be committed for these positions.
    fn places(&self, positions: &[Position]) -> Result<Placed> {
        let mut placed = Placed::default();
        for position in positions {
            let (topic, partition) = (&*position.topic, position.partition);
            let topic_id = self.consumer.topic_id(topic, partition);
            let part = topic_id.map(|topic_id| (topic_id, partition));
            let serial = part.as_ref().and_then(|part| self.shared.state().serial(part));
            let (Some(part), Some(serial)) = (part, serial) else {
                let message = "this member does not own this partition; commit what was handed out by it";
                return Err(Error::new(ErrorCode::UnknownPartition, message).at(topic, partition));
            };
            let seen = self.consumer.high_watermark(topic, partition)?.unwrap_or(0);
            if position.offset < 0 || position.offset > seen {
                placed.unseen.push(position.clone());
            }
            placed.owned.push((topic.to_owned(), part.clone(), serial));
            placed.offsets.insert(part, Place { offset: position.offset, epoch: -1 });
        }
        Ok(placed)
    }

    /// What happens to this member's partitions from now on. While somebody listens, partitions wait for their
    /// [`Revocation`] to be dropped before they go to other members.
    pub fn events(&self) -> GroupEvents {
        GroupEvents::new(self.shared.subscribe())
    }

    /// The partitions that are read now, by topic and number.
    pub fn assignment(&self) -> Vec<(String, i32)> {
        let state = self.shared.state();
        let mut assigned: Vec<_> = state
            .held
            .iter()
            .filter(|(_, held)| !held.revoking)
            .map(|((_, partition), held)| (held.topic.to_string(), *partition))
            .collect();
        assigned.sort();
        assigned
    }

    /// Whether the group has said what this member shall read, and all of that is being read.
    pub fn is_settled(&self) -> bool {
        self.shared.state().is_settled()
    }

    /// This member's id.
    pub fn member_id(&self) -> String {
        self.shared.state().membership.member_id().to_owned()
    }

    /// The group's name.
    pub fn group(&self) -> String {
        self.shared.state().membership.group().to_owned()
    }

    /// Subscribes to other topics from now on.
    pub fn subscribe(&self, topics: impl IntoIterator<Item = impl Into<String>>, pattern: impl Into<String>) {
        let now = Instant::now();
        let topics = topics.into_iter().map(Into::into).collect();
        let step = self.shared.state().membership.subscribe(topics, pattern.into(), now);
        self.shared.perform(step.into_iter().collect(), now);
    }

    /// See [`Consumer::seek`]. The new position counts as processed: it is what is committed next.
    ///
    /// # Errors
    /// As [`Consumer::seek`].
    pub fn seek(&mut self, topic: &str, partition: i32, offset: i64) -> Result<()> {
        self.take_changes();
        self.consumer.seek(topic, partition, offset)?;
        self.current.take_if(|current| current.batch.topic() == topic && current.batch.partition() == partition);
        if let Some(topic_id) = self.consumer.topic_id(topic, partition) {
            self.shared.state().sought(&(topic_id, partition), offset);
        }
        Ok(())
    }

    /// See [`Consumer::pause`].
    ///
    /// # Errors
    /// As [`Consumer::pause`].
    pub fn pause(&mut self, topic: &str, partition: i32) -> Result<()> {
        self.take_changes();
        // What is left of a batch is fetched again.
        if let Some(current) =
            self.current.take_if(|current| current.batch.topic() == topic && current.batch.partition() == partition)
            && let Some(offset) = current.batch.offset_at(current.next)
        {
            self.consumer.seek(topic, partition, offset)?;
        }
        self.consumer.pause(topic, partition)
    }

    /// See [`Consumer::resume`].
    ///
    /// # Errors
    /// As [`Consumer::resume`].
    pub fn resume(&mut self, topic: &str, partition: i32) -> Result<()> {
        self.take_changes();
        self.consumer.resume(topic, partition)
    }

    /// See [`Consumer::position`].
    ///
    /// # Errors
    /// As [`Consumer::position`].
    pub fn position(&self, topic: &str, partition: i32) -> Result<i64> {
        if let Some(current) = &self.current
            && current.batch.topic() == topic
            && current.batch.partition() == partition
            && let Some(offset) = current.batch.offset_at(current.next)
        {
            return Ok(offset);
        }
        self.consumer.position(topic, partition)
    }

    /// Commits what was handed out (unless commits are manual), leaves the group and waits until the group knows. A static
    /// member's place is kept for its session timeout.
    ///
    /// # Errors
    /// Why the last commit was not taken; `TIMED_OUT` where that took too long: whether it was is not known then, and the
    /// group goes on without this member after its session timeout.
    pub async fn close(mut self, timeout: Duration) -> Result<()> {
        self.current = None;
        self.begin_close(Closing::Closed);
        let over = std::future::poll_fn(|context| {
            let mut state = self.shared.state();
            if state.over {
                return Poll::Ready(state.failure.take());
            }
            state.wake_me(context.waker());
            Poll::Pending
        });
        match tokio::time::timeout(timeout, over).await {
            Ok(None) => Ok(()),
            Ok(Some(error)) => Err(error),
            Err(_) => {
                let late =
                    Error::unreachable(format!("the group did not hear of this member's leaving in {timeout:?}"));
                Err(match self.shared.state().trouble() {
                    Some(trouble) => late.caused_by(trouble.clone()),
                    None => late,
                })
            }
        }
    }

    fn begin_close(&self, how: Closing) {
        let mut state = self.shared.state();
        // One that waits for its close no longer is dropped.
        state.closing = Some(how);
        drop(state);
        self.shared.work.notify_one();
    }
}

/// The records of a member, one by one; made by [`GroupConsumer::records`].
#[derive(Debug)]
pub struct GroupRecords<'a> {
    group: &'a mut GroupConsumer,
}

impl Stream for GroupRecords<'_> {
    type Item = Result<ConsumerRecord>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.group.poll_next_record(context)
    }
}

/// Whose batch it is: what a transaction needs to commit its offsets.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    shared: Arc<Shared>,
    coordinator: Arc<Coordinator>,
    /// Which time it was that the member owned the batch's partition.
    serial: u64,
}

impl Member {
    /// The group's name and the member's id.
    pub(crate) fn name(&self) -> (String, String) {
        let membership = &self.shared.state().membership;
        (membership.group().to_owned(), membership.member_id().to_owned())
    }

    pub(crate) fn coordinator(&self) -> Arc<Coordinator> {
        self.coordinator.clone()
    }

    /// See [`Shared::commits_answered`].
    pub(crate) async fn commits_answered(&self, part: &Part) {
        self.shared.commits_answered(part).await;
    }

    /// Which time it was that the member owned the batch's partition.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    /// The member's id and its epoch, where all these partitions have been its own since the time with these serials began.
    pub(crate) fn owner<'a>(&self, parts: impl IntoIterator<Item = (&'a Part, u64)>) -> Option<(String, i32)> {
        let state = self.shared.state();
        let owned = parts.into_iter().all(|(part, serial)| state.owns(part, serial));
        owned.then(|| (state.membership.member_id().to_owned(), state.membership.epoch()))
    }

    /// From now on this partition's offsets commit with transactions alone.
    pub(crate) fn in_transactions(&self, part: &Part) {
        self.shared.state().in_transactions(part);
    }
}
