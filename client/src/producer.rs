//! Records on their way in.

pub(crate) mod ack;
mod batcher;
mod partitioner;
pub(crate) mod sender;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flowstone_protocol::Compression;
use flowstone_protocol::pb;

use crate::cluster::Cluster;
use crate::error::{Error, ErrorCode, Result};
use crate::record::Record;
use crate::transaction::TransactionalBuilder;

pub use ack::Ack;
pub use partitioner::Partitioner;

use batcher::BatchSettings;
pub(crate) use batcher::Identity;
use sender::{Attempt, ProducerCore, SenderSettings};

/// When a record counts as acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Acks {
    /// When it has left: no answer, errors included, and its offset is not known.
    None,
    /// When the leader has it; it may be lost with the leader.
    Leader,
    /// When a majority has it.
    #[default]
    Quorum,
}

impl Acks {
    const fn to_pb(self) -> pb::Acks {
        match self {
            Self::None => pb::Acks::None,
            Self::Leader => pb::Acks::Leader,
            Self::Quorum => pb::Acks::Quorum,
        }
    }
}

impl std::fmt::Display for Acks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Leader => "leader",
            Self::Quorum => "quorum",
        })
    }
}

impl std::str::FromStr for Acks {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "none" => Ok(Self::None),
            "leader" => Ok(Self::Leader),
            "quorum" => Ok(Self::Quorum),
            other => Err(Error::new(
                ErrorCode::InvalidRequest,
                format!("{other:?} is none of the acks: use none, leader or quorum"),
            )),
        }
    }
}

/// How a producer behaves; made by [`Client::producer`](crate::Client::producer).
///
/// Unless told otherwise it is idempotent with `acks=quorum`: what it acknowledged is stored once, in order.
#[derive(Clone, Debug)]
#[must_use = "nothing is set up before build()"]
pub struct ProducerBuilder {
    cluster: Arc<Cluster>,
    acks: Acks,
    idempotent: Option<bool>,
    linger: Duration,
    batch_bytes: usize,
    buffer_bytes: usize,
    record_bytes_max: usize,
    compression: Compression,
    compression_level: Option<i32>,
    delivery_timeout: Duration,
    in_flight: Option<usize>,
    partitioner: Partitioner,
}

/// Most batches of one partition under way at once: as many as brokers remember of an idempotent producer.
const IN_FLIGHT_MAX: usize = 5;

impl ProducerBuilder {
    pub(crate) fn new(cluster: Arc<Cluster>) -> Self {
        Self {
            cluster,
            acks: Acks::Quorum,
            idempotent: None,
            linger: Duration::from_millis(5),
            // Under the 1048588 bytes that a topic takes by default (`max.message.bytes`).
            batch_bytes: 1_000_000,
            buffer_bytes: 64 << 20,
            record_bytes_max: 16 << 20,
            compression: Compression::None,
            compression_level: None,
            delivery_timeout: Duration::from_secs(120),
            in_flight: None,
            partitioner: Partitioner::default(),
        }
    }

    /// When a record counts as acknowledged; [`Acks::Quorum`] unless set. Any other turns idempotence off.
    pub fn acks(mut self, acks: Acks) -> Self {
        self.acks = acks;
        self
    }

    /// Whether each record is stored once however often it is sent. On with `acks=quorum` unless set; `true` with any
    /// other acks is an error.
    pub fn idempotent(mut self, idempotent: bool) -> Self {
        self.idempotent = Some(idempotent);
        self
    }

    /// How long a batch that nobody awaits waits for more records; 5 ms unless set. A full batch goes at once, and so
    /// does one with a record whose [`Ack`] is awaited.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Size at which a batch is full, before compression, in bytes; 1 000 000 unless set.
    pub fn batch_bytes(mut self, bytes: usize) -> Self {
        self.batch_bytes = bytes;
        self
    }

    /// Bytes of records taken in and not acknowledged, at most; 64 MiB unless set. [`Producer::send`] waits while the
    /// buffer is full.
    pub fn buffer_bytes(mut self, bytes: usize) -> Self {
        self.buffer_bytes = bytes;
        self
    }

    /// Largest record taken, in bytes with its frame; 16 MiB unless set. A topic's own limit (`max.message.bytes`) is
    /// usually lower.
    pub fn record_bytes_max(mut self, bytes: usize) -> Self {
        self.record_bytes_max = bytes;
        self
    }

    /// How batches are compressed; not at all unless set.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// The codec's level; the codec's default unless set.
    pub fn compression_level(mut self, level: i32) -> Self {
        self.compression_level = Some(level);
        self
    }

    /// How long a record may take from [`Producer::send`] to its acknowledgement, retries included; 2 minutes unless
    /// set. Past it the record fails with `TIMED_OUT`, and may or may not be stored.
    pub fn delivery_timeout(mut self, timeout: Duration) -> Self {
        self.delivery_timeout = timeout;
        self
    }

    /// Batches of one partition under way at once, 1 to 5. Unless set: 5 with idempotence; 1 without, because then a
    /// retried batch would land behind its successors.
    pub fn in_flight(mut self, batches: usize) -> Self {
        self.in_flight = Some(batches);
        self
    }

    /// Who chooses the partition; [`Partitioner::murmur2`] unless set.
    pub fn partitioner(mut self, partitioner: Partitioner) -> Self {
        self.partitioner = partitioner;
        self
    }

    /// Checks the settings and, where it is idempotent, asks for a producer id.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for settings that make no sense; `TIMED_OUT` where no broker gives a producer id.
    pub async fn build(self) -> Result<Producer> {
        self.check()?;
        let identity = if self.is_idempotent() { Some(sender::init_producer(&self.cluster).await?) } else { None };
        Ok(self.start(identity, None))
    }

    /// Makes a transactional producer of it: its records are stored in transactions alone, under this id, which stays the
    /// same across restarts and is used by one producer at a time. A later one fences the earlier one.
    pub fn transactional_id(self, transactional_id: impl Into<String>) -> TransactionalBuilder {
        TransactionalBuilder::new(self, transactional_id.into())
    }

    pub(crate) fn is_idempotent(&self) -> bool {
        self.idempotent.unwrap_or(self.acks == Acks::Quorum)
    }

    pub(crate) fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for settings that make no sense.
    pub(crate) fn check(&self) -> Result<()> {
        let invalid = |message: String| Err(Error::new(ErrorCode::InvalidRequest, message));
        let idempotent = self.is_idempotent();
        if idempotent && self.acks != Acks::Quorum {
            return invalid(format!(
                "an idempotent producer needs acks=quorum, not acks={}; set one or the other",
                self.acks
            ));
        }
        let in_flight = self.batches_in_flight();
        if !(1..=IN_FLIGHT_MAX).contains(&in_flight) {
            return invalid(format!("batches in flight must be 1 to {IN_FLIGHT_MAX}, not {in_flight}"));
        }
        if self.batch_bytes == 0 || self.batch_bytes > 1 << 30 {
            return invalid(format!("batch_bytes must be 1 byte to 1 GiB, not {}", self.batch_bytes));
        }
        if self.record_bytes_max == 0 || self.record_bytes_max > 1 << 30 {
            return invalid(format!("record_bytes_max must be 1 byte to 1 GiB, not {}", self.record_bytes_max));
        }
        if self.buffer_bytes < 1024 || self.buffer_bytes > u32::MAX as usize {
            return invalid(format!("buffer_bytes must be 1 KiB to 4 GiB, not {}", self.buffer_bytes));
        }
        if self.delivery_timeout.is_zero() || self.delivery_timeout <= self.linger {
            return invalid("the delivery timeout must be longer than the linger".to_owned());
        }
        Ok(())
    }

    fn batches_in_flight(&self) -> usize {
        self.in_flight.unwrap_or(if self.is_idempotent() { IN_FLIGHT_MAX } else { 1 })
    }

    /// The producer under this identity.
    pub(crate) fn start(self, identity: Option<Identity>, transactional_id: Option<String>) -> Producer {
        let batching = BatchSettings {
            batch_bytes: self.batch_bytes,
            linger: self.linger,
            compression: self.compression,
            compression_level: self.compression_level,
            delivery_timeout: self.delivery_timeout,
            in_flight_max: self.batches_in_flight(),
            idempotent: self.is_idempotent(),
            answered: self.acks != Acks::None,
            transactional: transactional_id.is_some(),
        };
        let settings = SenderSettings {
            acks: self.acks.to_pb(),
            partitioner: self.partitioner,
            record_bytes_max: self.record_bytes_max,
            buffer_bytes: self.buffer_bytes,
            transactional_id,
        };
        let core = ProducerCore::start(self.cluster, batching, settings, identity);
        Producer { handle: Arc::new(Handle { core }) }
    }
}

/// Takes records in, batches them, and sends them until they are acknowledged or given up. Cheap to clone; clones share
/// one buffer. When the last one goes, what was taken in is still sent for as long as the runtime lives; to know how it
/// ended, [`flush`](Producer::flush) or [`close`](Producer::close) first.
///
/// ```no_run
/// # async fn run(client: flowstone_client::Client) -> flowstone_client::Result<()> {
/// use flowstone_client::Record;
/// let producer = client.producer().build().await?;
/// // One record, and where it came to lie:
/// let at = producer.send(Record::to("orders").key("17").value("2 apples")).await?.await?;
/// println!("partition {}, offset {}", at.partition, at.offset);
/// // Many, acknowledged together:
/// for number in 0..1000 {
///     producer.send(Record::to("orders").value(number.to_string())).await?;
/// }
/// producer.flush().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Producer {
    handle: Arc<Handle>,
}

/// Its end is the producer's.
struct Handle {
    core: Arc<ProducerCore>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer").finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.begin_close();
    }
}

/// What a producer has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProducerStats {
    /// Records acknowledged (with `acks=none`: sent).
    pub records_acknowledged: u64,
    /// Records that failed.
    pub records_failed: u64,
    /// Batches sent, repetitions included.
    pub batches_sent: u64,
    /// Bytes of these batches.
    pub bytes_sent: u64,
}

impl Producer {
    pub(crate) fn core(&self) -> &Arc<ProducerCore> {
        &self.handle.core
    }

    /// Takes a record in; waits while the buffer is full. The [`Ack`] tells what became of it; dropping it is fine where
    /// [`flush`](Self::flush) tells enough.
    ///
    /// Records that one task sends to one partition are stored in that order. Dropping this future before it is ready
    /// leaves the record out.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`; `MESSAGE_TOO_LARGE` for one beyond
    /// [`record_bytes_max`](ProducerBuilder::record_bytes_max); `INVALID_TIMESTAMP` for one before 1970;
    /// `SHUTTING_DOWN` once the producer is closed.
    pub async fn send(&self, record: Record<'_>) -> Result<Ack> {
        let core = &self.handle.core;
        match core.try_append(&record, &mut 0) {
            Attempt::Added(ack) => Ok(ack),
            Attempt::Refused(error) => Err(error),
            Attempt::UnknownTopic | Attempt::NoRoom(_) => self.send_waiting(record).await,
        }
    }

    async fn send_waiting(&self, record: Record<'_>) -> Result<Ack> {
        let core = &self.handle.core;
        let mut credit = Credit { core, bytes: 0 };
        loop {
            match core.try_append(&record, &mut credit.bytes) {
                Attempt::Added(ack) => return Ok(ack),
                Attempt::Refused(error) => return Err(error),
                Attempt::UnknownTopic => core.load_topic(record.topic).await?,
                Attempt::NoRoom(bytes) => {
                    core.give_room(std::mem::take(&mut credit.bytes));
                    let waited = core.wait_for_room(bytes).await;
                    credit.bytes = waited.map_err(|error| error.at_topic(record.topic))?;
                }
            }
        }
    }

    /// Takes a record in without waiting; `None` where there is no room for it now, or its topic was never used before.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn try_send(&self, record: &Record<'_>) -> Result<Option<Ack>> {
        match self.handle.core.try_append(record, &mut 0) {
            Attempt::Added(ack) => Ok(Some(ack)),
            Attempt::Refused(error) => Err(error),
            Attempt::UnknownTopic | Attempt::NoRoom(_) => Ok(None),
        }
    }

    /// Sends everything taken in so far, at once, and waits until each record is acknowledged or failed.
    ///
    /// # Errors
    /// The first failure of any record since the last flush, seen by its [`Ack`] or not.
    pub async fn flush(&self) -> Result<()> {
        let core = &self.handle.core;
        for delivery in core.send_everything() {
            delivery.settled().await;
        }
        core.take_failure().map_or(Ok(()), Err)
    }

    /// Takes no more records, sends what there is, and waits for it; what is not acknowledged by then fails.
    ///
    /// # Errors
    /// As [`flush`](Self::flush); `TIMED_OUT` where the time was too short.
    pub async fn close(self, timeout: Duration) -> Result<()> {
        let core = &self.handle.core;
        core.begin_close();
        let until = tokio::time::Instant::now() + timeout;
        let finished = tokio::time::timeout_at(until, self.flush()).await;
        let late = Error::new(
            ErrorCode::TimedOut,
            format!("the producer was closed after {timeout:?}, before the record was acknowledged; it may be stored"),
        );
        core.abort(&late);
        // Everything is told; with `acks=none` only the end of the streams says that the brokers have it.
        let _ = tokio::time::timeout_at(until, core.left()).await;
        finished.unwrap_or(Err(late))
    }

    /// What it has done so far.
    pub fn stats(&self) -> ProducerStats {
        let counters = &self.handle.core.counters;
        ProducerStats {
            records_acknowledged: counters.records_acknowledged.load(Ordering::Relaxed),
            records_failed: counters.records_failed.load(Ordering::Relaxed),
            batches_sent: counters.batches_sent.load(Ordering::Relaxed),
            bytes_sent: counters.bytes_sent.load(Ordering::Relaxed),
        }
    }
}

/// Room of the buffer held for one record; goes back with the future that waited for it.
struct Credit<'a> {
    core: &'a ProducerCore,
    bytes: usize,
}

impl Drop for Credit<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.core.give_room(self.bytes);
        }
    }
}
