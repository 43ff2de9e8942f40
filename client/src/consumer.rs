//! Records on their way out.

mod batch;
mod fetcher;

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use flowstone_protocol::pb;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream};
use tokio::time::Sleep;

use crate::admin::{OffsetInfo, OffsetSpec, known_partition, list_offsets};
use crate::cluster::{Cluster, MetadataChanges};
use crate::connection::CREDIT_BYTES_MAX;
use crate::error::{Error, ErrorCode, Result};
use crate::group::Place;
use crate::metadata::{Snapshot, TopicInfo};
use crate::record::unix_millis;
use crate::retry::BackoffPolicy;

pub use batch::{ConsumerRecord, RecordBatch, RecordRef, Records};

use batch::{Aborted, Wanted};
use fetcher::{BrokerStream, FetchEvent};

/// Where reading of a partition begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartAt {
    /// The first record that can be read.
    #[default]
    Earliest,
    /// Behind the last record there is when the consumer is built.
    Latest,
    /// This offset.
    Offset(i64),
    /// The first record whose timestamp, in milliseconds since 1970, is at least this.
    Timestamp(i64),
    /// So many records before the end, in each partition.
    FromEnd(u64),
}

impl StartAt {
    /// The first record from this time on.
    pub fn time(at: SystemTime) -> Self {
        Self::Timestamp(unix_millis(at))
    }
}

/// Where reading of a partition ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopAt {
    /// It goes on for ever.
    #[default]
    Never,
    /// Where the partition ends when the consumer is built.
    End,
    /// Before this offset.
    Offset(i64),
    /// Before the first record whose timestamp, in milliseconds since 1970, is at least this; at the end as of now where
    /// there is none.
    Timestamp(i64),
}

/// What happens when the position is no offset that can be read: trimmed away, or beyond the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnOutOfRange {
    /// An `OFFSET_OUT_OF_RANGE` error that names the valid range; the partition then waits for a seek.
    #[default]
    Error,
    /// Go on at the first record that can be read.
    Earliest,
    /// Go on at the end.
    Latest,
}

/// Which records of transactions are handed out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isolation {
    /// All, those of transactions that are open or were aborted too.
    ReadUncommitted,
    /// Those of committed transactions, and those without one. Reading waits at the first record of the oldest open
    /// transaction.
    #[default]
    ReadCommitted,
}

impl Isolation {
    pub(crate) const fn to_pb(self) -> pb::IsolationLevel {
        match self {
            Self::ReadUncommitted => pb::IsolationLevel::ReadUncommitted,
            Self::ReadCommitted => pb::IsolationLevel::ReadCommitted,
        }
    }
}

impl std::fmt::Display for Isolation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ReadUncommitted => "read_uncommitted",
            Self::ReadCommitted => "read_committed",
        })
    }
}

impl std::str::FromStr for Isolation {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "read_uncommitted" => Ok(Self::ReadUncommitted),
            "read_committed" => Ok(Self::ReadCommitted),
            other => Err(Error::new(
                ErrorCode::InvalidRequest,
                format!("{other:?} is no isolation level: use read_committed or read_uncommitted"),
            )),
        }
    }
}

/// A place in a partition.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Position {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
}

impl Position {
    /// This offset of this partition.
    pub fn new(topic: impl AsRef<str>, partition: i32, offset: i64) -> Self {
        Self { topic: Arc::from(topic.as_ref()), partition, offset }
    }
}

/// What to read, and how; made by [`Client::consumer`](crate::Client::consumer).
#[derive(Clone, Debug)]
#[must_use = "nothing is read before build()"]
pub struct ConsumerBuilder {
    cluster: Arc<Cluster>,
    topics: Vec<String>,
    partitions: Vec<(String, i32, Option<StartAt>)>,
    start_at: StartAt,
    stop_at: StopAt,
    on_out_of_range: OnOutOfRange,
    prefetch_bytes: usize,
    decompressed_bytes_max: usize,
    rack: Arc<str>,
    isolation: Isolation,
}

impl ConsumerBuilder {
    pub(crate) fn new(cluster: Arc<Cluster>) -> Self {
        Self {
            cluster,
            topics: Vec::new(),
            partitions: Vec::new(),
            start_at: StartAt::default(),
            stop_at: StopAt::default(),
            on_out_of_range: OnOutOfRange::default(),
            prefetch_bytes: 8 << 20,
            decompressed_bytes_max: 256 << 20,
            rack: Arc::from(""),
            isolation: Isolation::default(),
        }
    }

    /// Reads all partitions of this topic too, those that are added later from their start.
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.topics.push(topic.into());
        self
    }

    /// Reads all partitions of these topics too.
    pub fn topics(mut self, topics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.topics.extend(topics.into_iter().map(Into::into));
        self
    }

    /// Reads this partition too, from where [`start_at`](Self::start_at) says.
    pub fn partition(mut self, topic: impl Into<String>, partition: i32) -> Self {
        self.partitions.push((topic.into(), partition, None));
        self
    }

    /// Reads this partition too, from here.
    pub fn partition_at(mut self, topic: impl Into<String>, partition: i32, start_at: StartAt) -> Self {
        self.partitions.push((topic.into(), partition, Some(start_at)));
        self
    }

    /// Where reading begins; [`StartAt::Earliest`] unless set.
    pub fn start_at(mut self, start_at: StartAt) -> Self {
        self.start_at = start_at;
        self
    }

    /// Where reading ends; [`StopAt::Never`] unless set. Once every partition is there, the consumer ends.
    pub fn stop_at(mut self, stop_at: StopAt) -> Self {
        self.stop_at = stop_at;
        self
    }

    /// What happens when a position cannot be read; [`OnOutOfRange::Error`] unless set.
    pub fn on_out_of_range(mut self, policy: OnOutOfRange) -> Self {
        self.on_out_of_range = policy;
        self
    }

    /// Bytes that a broker may send ahead of what was taken, up to 32 MiB; 8 MiB unless set. With the batch in hand,
    /// this bounds a consumer's memory, per broker: one that stops reading stops the broker's sending. One batch of
    /// records is always sent, however large.
    pub fn prefetch_bytes(mut self, bytes: usize) -> Self {
        self.prefetch_bytes = bytes;
        self
    }

    /// Most bytes that one compressed batch may grow to, up to 2 GiB; 256 MiB unless set.
    pub fn decompressed_bytes_max(mut self, bytes: usize) -> Self {
        self.decompressed_bytes_max = bytes;
        self
    }

    /// Where this program runs: partitions are read from a replica on a broker of the same rack, up to what that replica
    /// knows to be committed, and from their leader where there is none; without a rack always from the leader. What
    /// reaches the program is the same either way, a little later from a follower.
    pub fn rack(mut self, rack: impl AsRef<str>) -> Self {
        self.rack = Arc::from(rack.as_ref());
        self
    }

    /// Which records of transactions are handed out; [`Isolation::ReadCommitted`] unless set.
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// Whether the settings that hold for any partition make sense.
    fn check(&self) -> Result<()> {
        let invalid = |message: &str| Err(Error::new(ErrorCode::InvalidRequest, message));
        if !(1..=CREDIT_BYTES_MAX).contains(&self.prefetch_bytes) {
            return invalid("prefetch_bytes must be 1 byte to 32 MiB");
        }
        if !(1..=i32::MAX as usize).contains(&self.decompressed_bytes_max) {
            return invalid("decompressed_bytes_max must be 1 byte to 2 GiB");
        }
        Ok(())
    }

    /// Looks up where to begin and to end. Reading begins with the first poll.
    ///
    /// The ends are asked for [linearizably](crate::Admin::list_offsets_linearizable): with [`StopAt::End`], all that was
    /// acknowledged before this call is read.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`; `INVALID_REQUEST` for settings that make no sense, such as nothing to
    /// read; `TIMED_OUT` where no broker answers.
    pub async fn build(self) -> Result<Consumer> {
        let invalid = |message: &str| Err(Error::new(ErrorCode::InvalidRequest, message));
        if self.topics.is_empty() && self.partitions.is_empty() {
            return invalid("a consumer needs a topic or a partition to read");
        }
        self.check()?;
        let mut wanted: Vec<(Arc<TopicInfo>, i32, StartAt)> = Vec::new();
        let mut add = |topic: &Arc<TopicInfo>, partition: i32, start_at: StartAt| {
            if !wanted.iter().any(|(known, number, _)| known.name == topic.name && *number == partition) {
                wanted.push((topic.clone(), partition, start_at));
            }
        };
        for (name, partition, start_at) in &self.partitions {
            let topic = self.cluster.topic(name).await?;
            known_partition(&topic, *partition)?;
            add(&topic, *partition, start_at.unwrap_or(self.start_at));
        }
        let mut topics = Vec::new();
        for name in &self.topics {
            let topic = self.cluster.topic(name).await?;
            for partition in 0..topic.partition_count() {
                add(&topic, partition, self.start_at);
            }
            topics.push(topic.name.clone());
        }
        let mut queries = Vec::new();
        for (topic, partition, start_at) in &wanted {
            let start = match start_at {
                StartAt::Earliest => Some(OffsetSpec::Start),
                StartAt::Latest => Some(OffsetSpec::End),
                StartAt::Timestamp(millis) => Some(OffsetSpec::Timestamp(*millis)),
                StartAt::FromEnd(records) => Some(OffsetSpec::FromEnd(*records)),
                StartAt::Offset(_) => None,
            };
            let stop = match self.stop_at {
                StopAt::End => Some(OffsetSpec::End),
                StopAt::Timestamp(millis) => Some(OffsetSpec::Timestamp(millis)),
                StopAt::Never | StopAt::Offset(_) => None,
            };
            queries.extend(start.into_iter().chain(stop).map(|at| (&*topic.name, *partition, at)));
        }
        let at_end = |(_, _, at): &(&str, i32, OffsetSpec)| matches!(at, OffsetSpec::End);
        let linearizable = queries.iter().any(at_end);
        let mut found = list_offsets(&self.cluster, &queries, linearizable).await?.into_iter();
        let mut partitions = Vec::new();
        for (topic, partition, start_at) in &wanted {
            let mut high_watermark = None;
            let readable = |info: &OffsetInfo| match self.isolation {
                Isolation::ReadCommitted => info.offset.min(info.last_stable_offset),
                Isolation::ReadUncommitted => info.offset,
            };
            let mut next = || {
                found.next().map_or(0, |info| {
                    high_watermark = high_watermark.max(Some(info.high_watermark));
                    readable(&info)
                })
            };
            let start = match start_at {
                StartAt::Offset(offset) => *offset,
                _ => next(),
            };
            if start < 0 {
                let message = format!("an offset to start at cannot be negative, {start} is");
                return Err(Error::new(ErrorCode::InvalidRequest, message).at(&topic.name, *partition));
            }
            let until = match self.stop_at {
                StopAt::Never => i64::MAX,
                StopAt::Offset(offset) => offset,
                StopAt::End | StopAt::Timestamp(_) => next(),
            };
            partitions.push(Partition { high_watermark, ..Partition::new(topic, *partition, start, until) });
        }
        let mut consumer = Consumer { topics, ..Consumer::empty(self) };
        for partition in partitions {
            consumer.add(partition);
        }
        Ok(consumer)
    }
}

/// One partition that is read.
#[derive(Debug)]
struct Partition {
    topic: Arc<str>,
    topic_id: Bytes,
    partition: i32,
    /// Offset of the next record to be handed out.
    position: i64,
    /// Offset of the next record to come from the broker; ahead of `position` by what is in hand.
    fetch_position: i64,
    /// First offset that is not wanted.
    until: i64,
    /// Tells answers for this position from those for earlier ones.
    session: u32,
    last_epoch: i32,
    paused: bool,
    failures: u32,
    /// The highest that any broker told: it never goes back, whichever replica is read next.
    high_watermark: Option<i64>,
    /// A broker in our rack that did not serve this partition, and until when it is not asked again.
    avoided: Option<(i32, Instant)>,
    state: Fetching,
}

/// For how long a follower is passed over that did not serve a partition.
const AVOIDED_FOR: Duration = Duration::from_secs(5);
/// Time between two looks at a partition without a leader.
const LEADERLESS_WAIT: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fetching {
    /// To be set on its leader's stream.
    Unset,
    /// Set on this broker's stream.
    Set(i32),
    /// To be set again after this moment.
    Waiting(Instant),
    /// Nobody leads it: looked at again after this moment, or once the metadata names a leader.
    Leaderless(Instant),
    /// Its new position is being looked up.
    LookedUp,
    /// The user was told why it stopped; a seek sets it going again.
    Stopped,
    /// It is where it should stop.
    Done,
    /// It is read no more; its place is free.
    Gone,
}

impl Partition {
    fn new(topic: &TopicInfo, partition: i32, start: i64, until: i64) -> Self {
        let mut partition = Self {
            topic: topic.name.clone(),
            topic_id: topic.id.clone(),
            partition,
            position: start,
            fetch_position: start,
            until,
            session: 0,
            last_epoch: -1,
            paused: false,
            failures: 0,
            high_watermark: None,
            avoided: None,
            state: Fetching::Unset,
        };
        partition.check_done();
        partition
    }

    /// The broker to read it from: the nearest, or its leader.
    fn source(&self, snapshot: &Snapshot, rack: &str, now: Instant) -> Option<i32> {
        let leader = || snapshot.leader(&self.topic, self.partition);
        if rack.is_empty() {
            return leader();
        }
        let avoided = |broker| self.avoided.is_some_and(|(known, until)| known == broker && until > now);
        snapshot.nearest(&self.topic, self.partition, rack, avoided).or_else(leader)
    }

    /// This broker did not serve it. Where another may, it is passed over for a while.
    fn avoid(&mut self, broker: i32) {
        self.avoided = Some((broker, Instant::now() + AVOIDED_FOR));
    }

    fn check_done(&mut self) {
        if self.fetch_position >= self.until {
            self.state = Fetching::Done;
        }
    }
}

type Lookup = (usize, u32, Result<i64>);

/// Reads partitions by position, without a group: a [`Stream`] of records, or batch by batch.
///
/// It reads ahead within its [`prefetch_bytes`](ConsumerBuilder::prefetch_bytes) once it was polled, reconnects and follows
/// leaders by itself, and goes on where it was. An error is told once; then its partition waits for a
/// [`seek`](Consumer::seek) while the others go on.
///
/// ```no_run
/// # async fn run(client: flowstone_client::Client) -> flowstone_client::Result<()> {
/// use flowstone_client::{StartAt, StopAt};
/// let mut consumer = client.consumer().topic("orders").start_at(StartAt::Earliest).stop_at(StopAt::End).build().await?;
/// while let Some(batch) = consumer.next_batch().await {
///     for record in &batch? {
///         println!("{}: {:?}", record.offset(), record.value_bytes());
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct Consumer {
    settings: ConsumerBuilder,
    /// Topics of which new partitions are read too.
    topics: Vec<Arc<str>>,
    /// By fetch id.
    partitions: Vec<Partition>,
    by_name: HashMap<(Arc<str>, i32), usize>,
    /// Its partitions are a group's: it waits while it has none.
    of_group: bool,
    /// Places of partitions that are gone.
    free: Vec<usize>,
    /// Partitions whose position moved without a record; for groups alone.
    passed_over: Vec<usize>,
    streams: Vec<BrokerStream>,
    /// Which stream is polled first.
    turn: usize,
    /// What the stream of records is in the middle of: the batch, and the next record's place in it.
    current: Option<(usize, RecordBatch, usize)>,
    /// To be told before anything else.
    errors: VecDeque<Error>,
    lookups: FuturesUnordered<BoxFuture<'static, Lookup>>,
    wake_at: Option<(Instant, Pin<Box<Sleep>>)>,
    changed: BoxFuture<'static, MetadataChanges>,
    /// Some partition may have to be set on another stream.
    dirty: bool,
}

impl std::fmt::Debug for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consumer").field("partitions", &self.partitions).finish_non_exhaustive()
    }
}

fn next_change(mut changes: MetadataChanges) -> BoxFuture<'static, MetadataChanges> {
    Box::pin(async move {
        changes.changed().await;
        changes
    })
}

impl Consumer {
    /// The next records of some partition; `None` once every partition is where it should stop, or stopped by an error
    /// that was told. Dropping the future loses nothing.
    ///
    /// # Errors
    /// `OFFSET_OUT_OF_RANGE` (see [`OnOutOfRange`]), `LOG_DIVERGED` where the log was recovered with loss,
    /// `CORRUPT_BATCH`, `UNKNOWN_TOPIC` for one that was deleted. Brokers that cannot be reached are tried for ever.
    pub async fn next_batch(&mut self) -> Option<Result<RecordBatch>> {
        std::future::poll_fn(|context| self.poll_next_batch(context)).await
    }

    /// The next record; `None` as for [`next_batch`](Self::next_batch).
    ///
    /// # Errors
    /// As [`next_batch`](Self::next_batch).
    pub async fn next_record(&mut self) -> Option<Result<ConsumerRecord>> {
        std::future::poll_fn(|context| self.poll_next_record(context)).await
    }

    /// As [`next_batch`](Self::next_batch), for code that polls.
    pub fn poll_next_batch(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<RecordBatch>>> {
        if let Some((index, mut batch, next)) = self.current.take() {
            batch.skip_to(next);
            if !batch.is_empty() {
                self.partitions[index].position = batch.next_offset();
                return Poll::Ready(Some(Ok(batch)));
            }
        }
        self.poll_fetched(context).map(|fetched| {
            fetched.map(|fetched| {
                fetched.map(|(index, batch)| {
                    self.partitions[index].position = batch.next_offset();
                    batch
                })
            })
        })
    }

    fn poll_next_record(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<ConsumerRecord>>> {
        loop {
            if let Some((index, batch, next)) = &mut self.current {
                if let Some(record) = batch.get(*next) {
                    let record = record.to_record();
                    *next += 1;
                    // Behind the last record lie control records at most: they count as read with it.
                    self.partitions[*index].position = batch.offset_at(*next).unwrap_or(batch.next_offset());
                    return Poll::Ready(Some(Ok(record)));
                }
                self.current = None;
            }
            match std::task::ready!(self.poll_fetched(context)) {
                Some(Ok((index, batch))) => self.current = Some((index, batch, 0)),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }

    /// Goes on reading this partition at `offset`, whatever stopped it.
    ///
    /// # Errors
    /// `UNKNOWN_PARTITION` for one that is not read here; `INVALID_REQUEST` for a negative offset. Whether the offset
    /// can be read turns out when it is.
    pub fn seek(&mut self, topic: &str, partition: i32, offset: i64) -> Result<()> {
        let index = self.index(topic, partition)?;
        if offset < 0 {
            let message = format!("an offset to seek to cannot be negative, {offset} is");
            return Err(Error::new(ErrorCode::InvalidRequest, message).at(topic, partition));
        }
        self.move_to(index, offset);
        Ok(())
    }

    fn move_to(&mut self, index: usize, offset: i64) {
        self.current.take_if(|(current, ..)| *current == index);
        self.unset(index);
        let partition = &mut self.partitions[index];
        partition.position = offset;
        partition.fetch_position = offset;
        partition.last_epoch = -1;
        partition.failures = 0;
        partition.state = Fetching::Unset;
        partition.check_done();
        self.dirty = true;
    }

    /// As [`seek`](Self::seek), to a place that is looked up first.
    ///
    /// # Errors
    /// As [`seek`](Self::seek); `TIMED_OUT` where no broker answers.
    pub async fn seek_to(&mut self, topic: &str, partition: i32, to: StartAt) -> Result<()> {
        self.index(topic, partition)?;
        let at = match to {
            StartAt::Offset(offset) => return self.seek(topic, partition, offset),
            StartAt::Earliest => OffsetSpec::Start,
            StartAt::Latest => OffsetSpec::End,
            StartAt::Timestamp(millis) => OffsetSpec::Timestamp(millis),
            StartAt::FromEnd(records) => OffsetSpec::FromEnd(records),
        };
        let found = list_offsets(&self.settings.cluster, &[(topic, partition, at)], false).await?;
        self.seek(topic, partition, found.first().map_or(0, |info| info.offset))
    }

    /// One whose partitions come and go; it never ends.
    pub(crate) fn of_group(settings: ConsumerBuilder) -> Result<Self> {
        settings.check()?;
        Ok(Self { of_group: true, ..Self::empty(settings) })
    }

    fn empty(settings: ConsumerBuilder) -> Self {
        Self {
            changed: next_change(settings.cluster.changes()),
            settings,
            topics: Vec::new(),
            partitions: Vec::new(),
            by_name: HashMap::new(),
            of_group: false,
            free: Vec::new(),
            passed_over: Vec::new(),
            streams: Vec::new(),
            turn: 0,
            current: None,
            errors: VecDeque::new(),
            lookups: FuturesUnordered::new(),
            wake_at: None,
            dirty: true,
        }
    }

    /// Reads this partition too, from here on. `last_epoch`: leader epoch of the last record before it, -1 if unknown.
    pub(crate) fn assign(&mut self, topic: &TopicInfo, partition: i32, offset: i64, last_epoch: i32) {
        self.unassign(&topic.id, partition);
        let mut partition = Partition { last_epoch, ..Partition::new(topic, partition, offset, i64::MAX) };
        match self.free.pop() {
            Some(index) => {
                // Answers for the place's last partition are of an older session.
                partition.session = self.partitions[index].session.wrapping_add(1);
                self.by_name.insert((partition.topic.clone(), partition.partition), index);
                self.partitions[index] = partition;
                self.dirty = true;
            }
            None => self.add(partition),
        }
    }

    /// Reads this partition no more.
    pub(crate) fn unassign(&mut self, topic_id: &Bytes, partition: i32) {
        let is = |known: &Partition| known.topic_id == *topic_id && known.partition == partition;
        let gone = |known: &Partition| known.state == Fetching::Gone;
        let Some(index) = self.partitions.iter().position(|known| is(known) && !gone(known)) else { return };
        self.current.take_if(|(current, ..)| *current == index);
        self.unset(index);
        let partition = &mut self.partitions[index];
        partition.state = Fetching::Gone;
        self.by_name.remove(&(partition.topic.clone(), partition.partition));
        self.free.push(index);
    }

    /// The id of the topic of a partition that is read here.
    pub(crate) fn topic_id(&self, topic: &str, partition: i32) -> Option<Bytes> {
        self.index(topic, partition).ok().map(|index| self.partitions[index].topic_id.clone())
    }

    /// Leader epoch of the last record handed out of this partition, -1 for none.
    pub(crate) fn last_epoch(&self, topic: &str, partition: i32) -> i32 {
        self.index(topic, partition).map_or(-1, |index| self.partitions[index].last_epoch)
    }

    /// Partitions whose position moved without a record, since the last call.
    pub(crate) fn take_passed_over(&mut self) -> Vec<(Bytes, i32, Place)> {
        let moved = std::mem::take(&mut self.passed_over);
        let place = |index: usize| {
            let partition = &self.partitions[index];
            let place = Place { offset: partition.position, epoch: partition.last_epoch };
            (partition.topic_id.clone(), partition.partition, place)
        };
        moved.into_iter().filter(|index| self.partitions[*index].state != Fetching::Gone).map(place).collect()
    }

    /// Hands out nothing more of this partition until it is resumed; its position stays.
    ///
    /// # Errors
    /// `UNKNOWN_PARTITION` for one that is not read here.
    pub fn pause(&mut self, topic: &str, partition: i32) -> Result<()> {
        let index = self.index(topic, partition)?;
        let dropped = self.current.take_if(|(current, ..)| *current == index).is_some();
        self.unset(index);
        let partition = &mut self.partitions[index];
        // What is in hand goes; it is fetched again, and with it whatever ended the fetching behind it. A place that is
        // being looked up is looked up again: its answer is of an old session.
        if dropped || partition.state == Fetching::LookedUp {
            partition.state = Fetching::Unset;
        }
        partition.fetch_position = partition.position;
        partition.paused = true;
        Ok(())
    }

    /// Goes on with a partition that was paused.
    ///
    /// # Errors
    /// `UNKNOWN_PARTITION` for one that is not read here.
    pub fn resume(&mut self, topic: &str, partition: i32) -> Result<()> {
        let index = self.index(topic, partition)?;
        self.partitions[index].paused = false;
        self.dirty = true;
        Ok(())
    }

    /// Offset of the next record of this partition to be handed out.
    ///
    /// # Errors
    /// `UNKNOWN_PARTITION` for one that is not read here.
    pub fn position(&self, topic: &str, partition: i32) -> Result<i64> {
        Ok(self.partitions[self.index(topic, partition)?].position)
    }

    /// The positions of all partitions that are read.
    pub fn positions(&self) -> Vec<Position> {
        let position = |partition: &Partition| Position {
            topic: partition.topic.clone(),
            partition: partition.partition,
            offset: partition.position,
        };
        self.partitions.iter().map(position).collect()
    }

    /// One past the last offset that could be read when this partition's broker last sent something; it never goes back,
    /// whichever replica that is, but for a log that was recovered with loss.
    ///
    /// # Errors
    /// `UNKNOWN_PARTITION` for one that is not read here.
    pub fn high_watermark(&self, topic: &str, partition: i32) -> Result<Option<i64>> {
        Ok(self.partitions[self.index(topic, partition)?].high_watermark)
    }

    /// Where the partitions end now: one past the last offset that can be read. All that was acknowledged before this
    /// call lies below.
    ///
    /// # Errors
    /// `TIMED_OUT` where no broker answers, or a partition's majority is away; `UNKNOWN_TOPIC` for one that was deleted.
    pub async fn end_offsets(&self) -> Result<Vec<Position>> {
        let queries: Vec<_> =
            self.partitions.iter().map(|partition| (&*partition.topic, partition.partition, OffsetSpec::End)).collect();
        let found = list_offsets(&self.settings.cluster, &queries, true).await?;
        let position = |(partition, info): (&Partition, OffsetInfo)| Position {
            topic: partition.topic.clone(),
            partition: partition.partition,
            offset: info.offset,
        };
        Ok(self.partitions.iter().zip(found).map(position).collect())
    }

    fn index(&self, topic: &str, partition: i32) -> Result<usize> {
        let index = self.by_name.get(&(Arc::from(topic), partition)).copied();
        index.ok_or_else(|| {
            Error::new(ErrorCode::UnknownPartition, "this consumer does not read this partition").at(topic, partition)
        })
    }

    fn add(&mut self, partition: Partition) {
        self.by_name.insert((partition.topic.clone(), partition.partition), self.partitions.len());
        self.partitions.push(partition);
        self.dirty = true;
    }

    /// Takes a partition off the stream that it is set on; what is under way is then of an old session.
    fn unset(&mut self, index: usize) {
        let partition = &mut self.partitions[index];
        if let Fetching::Set(broker) = partition.state {
            partition.state = Fetching::Unset;
            if let Some(stream) = self.streams.iter().find(|stream| stream.broker == broker) {
                stream.send(pb::FetchRequest { remove: vec![index as u32], ..Default::default() });
            }
        }
        partition.session = partition.session.wrapping_add(1);
    }

    fn poll_fetched(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<(usize, RecordBatch)>>> {
        loop {
            if let Some(error) = self.errors.pop_front() {
                return Poll::Ready(Some(Err(error)));
            }
            while let Poll::Ready(changes) = self.changed.poll_unpin(context) {
                self.changed = next_change(changes);
                self.metadata_changed();
            }
            while let Poll::Ready(Some((index, session, found))) = Pin::new(&mut self.lookups).poll_next(context) {
                self.looked_up(index, session, found);
            }
            if let Some((_, sleep)) = &mut self.wake_at
                && sleep.as_mut().poll(context).is_ready()
            {
                self.wake_at = None;
                self.dirty = true;
            }
            if std::mem::take(&mut self.dirty) {
                self.place(context);
            }
            if !self.errors.is_empty() {
                continue;
            }
            let ended =
                |partition: &Partition| matches!(partition.state, Fetching::Done | Fetching::Stopped | Fetching::Gone);
            let Poll::Ready((at, event)) = self.poll_streams(context) else {
                if self.dirty {
                    continue;
                }
                let ended = !self.of_group && self.partitions.iter().all(ended);
                return if ended { Poll::Ready(None) } else { Poll::Pending };
            };
            match event {
                FetchEvent::Up | FetchEvent::Rested => self.dirty = true,
                FetchEvent::Down(error) => {
                    let broker = self.streams[at].broker;
                    tracing::debug!(broker, %error, "fetch stream ended");
                    let snapshot = self.settings.cluster.snapshot();
                    for index in 0..self.partitions.len() {
                        let partition = &mut self.partitions[index];
                        let source = partition.source(&snapshot, &self.settings.rack, Instant::now());
                        let set = partition.state == Fetching::Set(broker);
                        if set || partition.state == Fetching::Unset && source == Some(broker) {
                            partition.avoid(broker);
                            self.settings.cluster.doubt(&partition.topic);
                        }
                        if !set {
                            continue;
                        }
                        partition.session = partition.session.wrapping_add(1);
                        partition.state = Fetching::Unset;
                        if !error.is_retriable() && error.is_of_broker() {
                            // It would end the next stream as well.
                            self.stop(index, error.clone());
                        }
                    }
                    self.dirty = true;
                }
                FetchEvent::Response(response) => {
                    self.streams[at].taken(response.batches.len());
                    if let Some(fetched) = self.take_in(response) {
                        return Poll::Ready(Some(Ok(fetched)));
                    }
                }
            }
        }
    }

    /// The first event of any stream; the others' wakers are registered where there is none.
    fn poll_streams(&mut self, context: &mut Context<'_>) -> Poll<(usize, FetchEvent)> {
        let streams = self.streams.len();
        for step in 0..streams {
            let at = (self.turn + step) % streams;
            if let Poll::Ready(event) = self.streams[at].poll(context) {
                // The next one first, so that a fast broker does not starve the others.
                self.turn = (at + 1) % streams;
                return Poll::Ready((at, event));
            }
        }
        Poll::Pending
    }

    /// Sets what is unset on the streams of its leaders; connects these where need be.
    fn place(&mut self, context: &mut Context<'_>) {
        let snapshot = self.settings.cluster.snapshot();
        let now = Instant::now();
        let mut earliest: Option<Instant> = None;
        let mut sets: HashMap<i32, Vec<pb::FetchPartition>> = HashMap::new();
        for (index, partition) in self.partitions.iter_mut().enumerate() {
            if let Fetching::Waiting(until) | Fetching::Leaderless(until) = partition.state {
                if until > now {
                    earliest = Some(earliest.map_or(until, |known| known.min(until)));
                    continue;
                }
                partition.state = Fetching::Unset;
            }
            if partition.state != Fetching::Unset || partition.paused {
                continue;
            }
            let Some(broker) = partition.source(&snapshot, &self.settings.rack, now) else {
                // The metadata will name a leader, sooner or later.
                self.settings.cluster.doubt(&partition.topic);
                let until = now + LEADERLESS_WAIT;
                partition.state = Fetching::Leaderless(until);
                earliest = Some(earliest.map_or(until, |known| known.min(until)));
                continue;
            };
            let at = self.streams.iter().position(|stream| stream.broker == broker).unwrap_or_else(|| {
                self.streams.push(BrokerStream::new(broker, self.settings.prefetch_bytes));
                self.streams.len() - 1
            });
            let stream = &mut self.streams[at];
            if !stream.is_open() {
                stream.connect(self.settings.cluster.settings(), snapshot.address(broker));
                continue;
            }
            partition.session = partition.session.wrapping_add(1);
            partition.state = Fetching::Set(broker);
            sets.entry(broker).or_default().push(pb::FetchPartition {
                fetch_id: index as u32,
                session: partition.session,
                topic_id: partition.topic_id.clone(),
                partition: partition.partition,
                offset: partition.fetch_position,
                last_epoch: partition.last_epoch,
                from_any_replica: !self.settings.rack.is_empty(),
                known_high_watermark: partition.high_watermark.unwrap_or(-1),
                isolation: self.settings.isolation.to_pb().into(),
            });
        }
        for (broker, set) in sets {
            if let Some(stream) = self.streams.iter().find(|stream| stream.broker == broker) {
                stream.send(pb::FetchRequest { set, ..Default::default() });
            }
        }
        if let Some(at) = earliest
            && self.wake_at.as_ref().is_none_or(|(known, _)| *known > at)
        {
            let mut sleep = Box::pin(tokio::time::sleep_until(at.into()));
            if sleep.as_mut().poll(context).is_ready() {
                self.dirty = true;
            }
            self.wake_at = Some((at, sleep));
        }
    }

    fn metadata_changed(&mut self) {
        let snapshot = self.settings.cluster.snapshot();
        self.dirty = true;
        for index in 0..self.partitions.len() {
            let partition = &self.partitions[index];
            let known = snapshot.topic(&partition.topic).is_some_and(|topic| topic.id == partition.topic_id);
            let source = partition.source(&snapshot, &self.settings.rack, Instant::now());
            match partition.state {
                Fetching::Done | Fetching::Stopped | Fetching::Gone => {}
                // The group takes it away.
                _ if !known && self.of_group => {
                    self.unset(index);
                    self.partitions[index].state = Fetching::Stopped;
                }
                _ if !known => {
                    let error = Error::new(ErrorCode::UnknownTopic, "the topic was deleted");
                    self.stop(index, error);
                }
                Fetching::Set(broker) if source.is_some_and(|source| source != broker) => self.unset(index),
                // What it waits for may be here.
                Fetching::Waiting(_) if partition.failures == 0 => self.partitions[index].state = Fetching::Unset,
                // Whatever was refused before: that was another leader.
                Fetching::Leaderless(_) if source.is_some() => self.partitions[index].state = Fetching::Unset,
                _ => {}
            }
        }
        for name in self.topics.clone() {
            let Some(topic) = snapshot.topic(&name) else { continue };
            for partition in 0..topic.partition_count() {
                if !self.by_name.contains_key(&(name.clone(), partition)) {
                    let until = match self.settings.stop_at {
                        StopAt::Never => i64::MAX,
                        StopAt::Offset(offset) => offset,
                        // It was not there when the ends were looked up: nothing of it is wanted.
                        StopAt::End | StopAt::Timestamp(_) => 0,
                    };
                    self.add(Partition::new(topic, partition, 0, until));
                }
            }
        }
    }

    fn stop(&mut self, index: usize, error: Error) {
        self.unset(index);
        let partition = &mut self.partitions[index];
        partition.state = Fetching::Stopped;
        self.errors.push_back(error.at(&partition.topic, partition.partition));
    }

    /// A message of a broker; the records in it that are wanted.
    fn take_in(&mut self, response: pb::FetchResponse) -> Option<(usize, RecordBatch)> {
        let index = response.fetch_id as usize;
        let partition = self.partitions.get_mut(index)?;
        if partition.session != response.session || !matches!(partition.state, Fetching::Set(_)) {
            // Meant for an earlier position.
            return None;
        }
        if let Some(detail) = &response.error {
            self.refused(index, Error::from_detail(detail));
            return None;
        }
        partition.failures = 0;
        partition.high_watermark = partition.high_watermark.max(Some(response.high_watermark));
        let wanted = Wanted {
            from: partition.fetch_position,
            until: partition.until,
            decompressed_bytes_max: self.settings.decompressed_bytes_max,
        };
        let decoded = batch::decode(
            &partition.topic,
            (&partition.topic_id, partition.partition),
            response.batches,
            response.high_watermark,
            wanted,
            Aborted::new(&response.aborted),
        );
        partition.fetch_position = decoded.batch.next_offset();
        if decoded.last_epoch >= 0 {
            partition.last_epoch = decoded.last_epoch;
        }
        if decoded.batch.is_empty() {
            partition.position = partition.fetch_position;
            if self.of_group {
                self.passed_over.push(index);
            }
        }
        if partition.fetch_position >= partition.until {
            self.unset(index);
            self.partitions[index].state = Fetching::Done;
        }
        if let Some(error) = decoded.failure {
            self.stop(index, error);
        }
        (!decoded.batch.is_empty()).then_some((index, decoded.batch))
    }

    /// The broker does not send this partition any more until it is set again.
    fn refused(&mut self, index: usize, error: Error) {
        let snapshot = self.settings.cluster.snapshot();
        let partition = &mut self.partitions[index];
        let follower = match partition.state {
            Fetching::Set(broker) if snapshot.leader(&partition.topic, partition.partition) != Some(broker) => {
                partition.avoid(broker);
                true
            }
            _ => false,
        };
        let policy = self.settings.on_out_of_range;
        let out_of_range = error.code() == ErrorCode::OffsetOutOfRange;
        if out_of_range && !follower && policy != OnOutOfRange::Error {
            let at = if policy == OnOutOfRange::Earliest { OffsetSpec::Start } else { OffsetSpec::End };
            self.look_up(index, at);
            return;
        }
        // Whoever does not know a topic that the metadata has may be behind it; a follower that says that an offset is out
        // of range may be behind its leader, and the leader decides.
        let known = snapshot.topic(&partition.topic).is_some_and(|topic| topic.id == partition.topic_id);
        let behind = error.is_not_found() && known || follower && out_of_range;
        if !error.is_retriable() && !behind {
            if error.code() == ErrorCode::LogDiverged {
                // Its end is what it is now, not what it was.
                partition.high_watermark = None;
            }
            self.stop(index, error);
            return;
        }
        self.settings.cluster.refused(&partition.topic, partition.partition, &error);
        partition.failures = partition.failures.saturating_add(1);
        let wait: Duration = BackoffPolicy::REQUEST.wait(partition.failures, rand::random::<f64>());
        partition.state = Fetching::Waiting(Instant::now() + wait);
        partition.session = partition.session.wrapping_add(1);
        self.dirty = true;
    }

    fn look_up(&mut self, index: usize, at: OffsetSpec) {
        let partition = &mut self.partitions[index];
        partition.state = Fetching::LookedUp;
        partition.session = partition.session.wrapping_add(1);
        let (topic, number, session) = (partition.topic.clone(), partition.partition, partition.session);
        let cluster = self.settings.cluster.clone();
        self.lookups.push(Box::pin(async move {
            let found = list_offsets(&cluster, &[(&topic, number, at)], false).await;
            (index, session, found.map(|found| found.first().map_or(0, |info| info.offset)))
        }));
    }

    fn looked_up(&mut self, index: usize, session: u32, found: Result<i64>) {
        let partition = &mut self.partitions[index];
        if partition.session != session || partition.state != Fetching::LookedUp {
            return;
        }
        match found {
            Ok(offset) => {
                tracing::info!(
                    topic = %partition.topic,
                    partition = partition.partition,
                    from = partition.position,
                    to = offset,
                    "position was out of range"
                );
                self.move_to(index, offset);
            }
            Err(error) if error.is_retriable() => {
                let wait = BackoffPolicy::REQUEST.wait(1, rand::random::<f64>());
                partition.state = Fetching::Waiting(Instant::now() + wait);
                self.dirty = true;
            }
            Err(error) => self.stop(index, error),
        }
    }
}

impl Stream for Consumer {
    type Item = Result<ConsumerRecord>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_next_record(context)
    }
}
