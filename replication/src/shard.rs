//! Threads, queues, pools and clocks around the sans-io replicas.
//!
//! One thread per shard owns its replicas and the stripes of hard states that they belong to. Round by round it takes all
//! that waits in its inbox, steps every replica that is touched, hands flushes to the pool, and sends the answers:
//!
//! ```text
//!  inbox -> events by replica -> step -> hard states: one append, one flush per stripe
//!                                     -> log flushes: side by side on the pool, or right here when one alone is dirty
//!                                     -> answers
//!                                     -> reads that need the disk: another pool, which answers by itself
//! ```
//!
//! Queues and their bounds: requests in the inbox (`inbox_requests_max`, then `OVERLOADED`), bytes of produce requests
//! in flight (`inbox_bytes_max`, then [`ReplicaHandle::reserve`] waits), reads waiting at a log's end
//! (`parked_reads_max`, then `OVERLOADED`), reads on their way to the disk (`disk_reads_max`, then `OVERLOADED`).
//! What pools report back is bounded by what was given to them: a flush, a checkpoint, an opening per replica.

mod compacting;
mod peers;
mod pulling;
mod resting;
mod scrubbing;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use flowstone_protocol::{BrokerId, Error, ErrorCode, Offset, ReplicaId, Term, Timestamp, TopicPartition};
use flowstone_storage::hard_state::HardStateFlushDone;
use flowstone_storage::{
    CheckpointDone, Compaction, CompactionStep, DataDir, DataDirError, Disk, FlushDone, HardState, OpenError,
    RangeTicket, ReadError, Scrubbed, StorageError,
};
use tokio::sync::watch;

use self::compacting::Compacting;
use self::peers::{NEVER, Places};
pub(crate) use self::pulling::Installed;
use self::pulling::{LOWER_MARK, Pull};
use self::resting::{Quiet, Resting};
pub(crate) use self::scrubbing::Repaired;
use self::scrubbing::{Repairing, Scrubbing};
use crate::effects::{
    Answer, CountOrder, Counted, Effects, Ended, Event, FetchOrder, Fetched, FlushOrder, LookupOrder, ReadOrder,
};
use crate::handle::{Port, ReplicaHandle, SlotKey, StatusCell, shutting_down};
use crate::inbox::{Inbox, Refused};
use crate::machine::Machine;
use crate::metrics::{Counters, ShardMetrics};
use crate::opening::{Lost, OpenJob, Opened, close_log, forget_relaxed, mark_running, mark_stopped, note_relaxed};
use crate::peer::PeerMessage;
use crate::replica::{Replica, ReplicaConfig, SLOW_FLUSH_TICKS, read_error};
use crate::reply::{ByteBudget, Reply};
use crate::request::{FlushMode, Health, Reconfigure, ReplicaSpec, ReplicaStatus, Role, Start};
use crate::stripe::{Stripe, Waiter, Written};
use crate::transport::{GroupMessage, PeerTransport, PullAnswer, PullRequest};
use crate::workers::{JobKind, ThreadPools, Workers, run_or_stop};

/// The leader's clock.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The machine's clock: milliseconds since 1970.
pub fn system_clock() -> Clock {
    Arc::new(|| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Timestamp::new(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    })
}

/// How long an end of a replica keeps it closed, the first time; doubled with each that follows.
const REOPEN_AFTER_MIN: Duration = Duration::from_millis(100);
/// At most.
const REOPEN_AFTER_MAX: Duration = Duration::from_secs(10);
/// A replica that lived this long has recovered: the next end counts as the first.
const RECOVERED_AFTER: Duration = Duration::from_secs(60);
/// How far a log is flushed is itself flushed at most this much later.
const MARKS_FLUSHED_WITHIN: Duration = Duration::from_millis(900);
/// However many replicas a shard has, each replays this many entries before a checkpoint is worth its flushes.
const REPLAY_ENTRIES_MIN: u64 = 1_000;
/// Full disks are probed this often.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// A disk has room again when there is this much beside what is kept: less would let writes in for a moment only.
const PROBE_BYTES: u64 = 1 << 20;
/// Reads of those who left are dropped this often.
const DROP_ABANDONED_EVERY: Duration = Duration::from_secs(5);
/// Retention looks at one slice of the replicas at a time.
const RETENTION_SLICES: u32 = 32;
/// Room for so many messages is kept between rounds; what a burst took beyond that is given back.
const TAKEN_KEPT: usize = 4_096;
/// A flush goes to the pool, even alone, on a disk that is slower than this on average.
const INLINE_FLUSH_TIME_MAX: Duration = Duration::from_micros(250);

/// How shards are run. The defaults suit a broker; tests change what they are about.
#[derive(Debug, Clone)]
pub struct ShardsConfig {
    /// Shard threads.
    pub shards: usize,
    /// Flushes side by side, for all shards together.
    pub flush_threads: usize,
    /// Reads from far back, side by side.
    pub read_threads: usize,
    /// Openings, checkpoints and removals, side by side.
    pub work_threads: usize,
    /// One tick of the election clock; replicas that are alone in their group need none.
    pub tick: Duration,
    /// Bytes of produce requests in flight, per shard.
    pub inbox_bytes_max: usize,
    /// Requests that wait, per shard.
    pub inbox_requests_max: usize,
    /// Bytes of other brokers' messages that wait, per shard; more are dropped, as Raft repeats them.
    pub peer_bytes_max: usize,
    /// Reads that wait at the end of one log.
    pub parked_reads_max: usize,
    /// Reads on their way to the disk, for all shards together.
    pub disk_reads_max: usize,
    /// A checkpoint after this many bytes of a log...
    pub checkpoint_bytes: u64,
    /// ...or this many entries...
    pub checkpoint_entries: u64,
    /// ...or the share of its replica in this many entries of a shard, whichever comes first: bounds what a restart
    /// replays before all lead, however many replicas there are.
    pub replay_entries_max: u64,
    /// Every replica's retention is looked at this often.
    pub retention_every: Duration,
    /// [`FlushMode::Relaxed`]: what is written is flushed within this time.
    pub relaxed_flush_within: Duration,
    /// A flush of at most this many bytes is run by the shard's own thread where one replica alone is dirty, nothing
    /// else waits and the disk was quick lately; with more bytes the shard has better to do meanwhile. 0: never.
    pub inline_flush_bytes_max: u64,
    /// A follower that is this many bytes behind the newest checkpoint pulls what is committed, rather than being sent
    /// entry by entry.
    pub offer_after_bytes: u64,
    /// Bytes of one range that is pulled.
    pub pull_bytes: u32,
    /// Sealed segments are read in the background to find rot, at this rate for all replicas of a shard together; 0: never.
    pub scrub_bytes_per_second: u64,
    /// Every byte is looked at about this often, if the rate allows.
    pub scrub_every: Duration,
    /// Compaction reads and writes at this rate, for all replicas of a shard together; 0: never.
    pub compaction_bytes_per_second: u64,
    /// What a pass of compaction may take for the keys that it looks at, in each shard.
    pub compaction_memory_bytes: u64,
    /// Every compacted log is looked at this often, to see whether a pass is due.
    pub compaction_every: Duration,
    /// For election timeouts.
    pub seed: u64,
    /// The cluster's feature level, for what is created, until [`Shards::set_feature_level`] says another one.
    pub feature_level: u32,
    /// Names this start of the machine: another one at the next start, without a clean stop between, means that what was
    /// only in memory may be lost. Empty where the system does not say.
    pub boot_id: String,
}

impl Default for ShardsConfig {
    fn default() -> Self {
        Self {
            shards: std::thread::available_parallelism().map_or(1, usize::from),
            flush_threads: 16,
            read_threads: 4,
            work_threads: 8,
            tick: Duration::from_millis(100),
            inbox_bytes_max: 64 << 20,
            inbox_requests_max: 1 << 16,
            peer_bytes_max: 128 << 20,
            parked_reads_max: 1 << 14,
            disk_reads_max: 1 << 10,
            checkpoint_bytes: 256 << 20,
            checkpoint_entries: 50_000,
            replay_entries_max: 400_000,
            retention_every: Duration::from_secs(30),
            relaxed_flush_within: Duration::from_secs(1),
            inline_flush_bytes_max: 256 << 10,
            offer_after_bytes: 64 << 20,
            pull_bytes: 1 << 20,
            scrub_bytes_per_second: 4 << 20,
            scrub_every: Duration::from_secs(7 * 24 * 60 * 60),
            compaction_bytes_per_second: 32 << 20,
            compaction_memory_bytes: 64 << 20,
            compaction_every: Duration::from_secs(15),
            seed: 0,
            feature_level: 1,
            boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .map(|id| id.trim().to_owned())
                .unwrap_or_default(),
        }
    }
}

/// Why shards could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A stripe's file of hard states can not be opened.
    #[error(transparent)]
    HardState(#[from] OpenError),
    /// A stripe's file of hard states is rotten, and can not be made anew.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The file system or the system's limits refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// All shards of a broker. Dropping it stops them as [`Shards::shutdown`] does.
#[derive(Debug)]
pub struct Shards<M: Machine> {
    ports: Vec<Arc<Port<M>>>,
    // Guards the handles for the time of taking them: threads are joined once, by whoever comes first.
    threads: Mutex<Vec<JoinHandle<()>>>,
    data_dir: Arc<DataDir>,
    /// This start of the machine.
    boot_id: String,
    peer_bytes_max: usize,
    /// Written whenever the cluster's changes; read where something is created.
    feature_level: Arc<AtomicU32>,
    /// Counts the changes of all replicas' roles, terms, leaders and health.
    changes: Arc<watch::Sender<u64>>,
}

impl<M: Machine> Shards<M> {
    /// Starts the threads; no replica is open yet.
    ///
    /// # Errors
    /// When the hard states can not be read, or threads can not be started.
    pub fn start(
        config: ShardsConfig,
        data_dir: Arc<DataDir>,
        clock: Clock,
        transport: Arc<dyn PeerTransport>,
    ) -> Result<Self, StartError> {
        let workers = ThreadPools::start(config.flush_threads, config.read_threads, config.work_threads)
            .map_err(|source| StartError::Io { action: "start a pool's threads", source })?;
        let (all, shards) = Self::assemble(&config, data_dir, clock, Arc::new(workers), transport)?;
        for (number, shard) in shards.into_iter().enumerate() {
            let thread = std::thread::Builder::new()
                .name(format!("shard-{number}"))
                .spawn(move || run_or_stop(|| shard.run()))
                .map_err(|source| StartError::Io { action: "start a shard's thread", source })?;
            all.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(all)
    }

    /// The shards, and their cores: to be put on threads, or stepped by hand.
    fn assemble(
        config: &ShardsConfig,
        data_dir: Arc<DataDir>,
        clock: Clock,
        workers: Arc<dyn Workers>,
        transport: Arc<dyn PeerTransport>,
    ) -> Result<(Self, Vec<Shard<M>>), StartError> {
        let disk = Arc::clone(data_dir.disk());
        let lost_memory = mark_running(&disk, &data_dir, &config.boot_id)
            .map_err(|source| StartError::Io { action: "note in the data directory that a broker runs", source })?;
        let disk_reads = Arc::new(AtomicUsize::new(0));
        let feature_level = Arc::new(AtomicU32::new(config.feature_level));
        let shards = config.shards.max(1);
        let hard_state_dir = data_dir.hard_state_dir();
        let mut stripes: Vec<BTreeMap<u32, Stripe>> = (0..shards).map(|_| BTreeMap::new()).collect();
        for number in 0..data_dir.stripes() {
            let stripe = Stripe::start(&data_dir, number)?;
            stripes[number as usize % shards].insert(number, stripe);
        }
        let mut all = Self {
            ports: Vec::new(),
            threads: Mutex::new(Vec::new()),
            data_dir,
            boot_id: config.boot_id.clone(),
            peer_bytes_max: config.peer_bytes_max,
            feature_level: Arc::clone(&feature_level),
            changes: Arc::default(),
        };
        let now = workers.now();
        let mut cores = Vec::with_capacity(shards);
        // Later starts have larger numbers, as far as clocks go; where they do not, sessions take a moment to be taken over.
        let start = u64::try_from(clock().get()).unwrap_or_default();
        for (number, stripes) in stripes.into_iter().enumerate() {
            let port = Arc::new(Port {
                inbox: Inbox::new(config.inbox_requests_max),
                budget: ByteBudget::new(config.inbox_bytes_max),
                peer_bytes: AtomicUsize::new(0),
                counters: Counters::default(),
            });
            cores.push(Shard {
                config: config.clone(),
                data_dir: Arc::clone(&all.data_dir),
                disk: Arc::clone(&disk),
                hard_state_dir: hard_state_dir.clone(),
                clock: Arc::clone(&clock),
                lost_memory,
                port: Arc::clone(&port),
                workers: Arc::clone(&workers),
                transport: Arc::clone(&transport),
                disk_reads: Arc::clone(&disk_reads),
                feature_level: Arc::clone(&feature_level),
                changes: Arc::clone(&all.changes),
                now,
                taken: Vec::new(),
                stripes,
                slots: Vec::new(),
                free: Vec::new(),
                by_partition: HashMap::new(),
                touched: Vec::new(),
                flushes: Vec::new(),
                flushes_in_flight: 0,
                flush_time: Duration::ZERO,
                answers: Vec::new(),
                outgoing: BTreeMap::new(),
                heartbeats: Vec::new(),
                ticks: 0,
                wakes: Vec::new(),
                quiet: Vec::new(),
                resting: Resting::new(number, start),
                pulls: Vec::new(),
                scrubbing: Scrubbing::new(config, now),
                compacting: Compacting::new(config, now),
                timers: Timers::new(config),
                stopping: None,
                unclean: false,
            });
            all.ports.push(port);
        }
        Ok((all, cores))
    }

    fn port(&self, tp: TopicPartition) -> &Arc<Port<M>> {
        &self.ports[self.data_dir.stripe_of(tp) as usize % self.ports.len()]
    }

    /// Opens a replica, or makes it where there is none yet. The handle is given once its log is recovered; leadership
    /// follows by itself, see [`ReplicaHandle::ready`].
    ///
    /// A replica that is quarantined, or that can not be opened at the moment, gives a handle too: its status tells.
    ///
    /// # Errors
    /// `INVALID_REQUEST` when the partition is open already; `SHUTTING_DOWN`.
    pub fn open(&self, spec: ReplicaSpec, machine: M, opened: Reply<Result<ReplicaHandle<M>, Error>>) {
        let port = self.port(spec.tp);
        if let Some(message) = port.inbox.report(Message::Open { spec: Box::new(spec), machine, opened }) {
            message.refuse(&shutting_down());
        }
    }

    /// Closes a replica: whoever waits is told that this broker has it no longer. With `delete_files` its folder is
    /// removed, too. Answers when that is done; at once when it is not open.
    pub fn close(&self, tp: TopicPartition, delete_files: bool, closed: Reply<()>) {
        if let Some(message) = self.port(tp).inbox.report(Message::Close { tp, delete_files, closed }) {
            message.refuse(&shutting_down());
        }
    }

    /// Takes messages of another broker's replicas. From any thread; what there is no room for is dropped, as Raft repeats
    /// what matters.
    pub fn deliver(&self, from: BrokerId, messages: Vec<GroupMessage>) {
        let mut by_shard: Vec<Vec<GroupMessage>> = self.ports.iter().map(|_| Vec::new()).collect();
        for message in messages {
            by_shard[self.data_dir.stripe_of(message.tp) as usize % self.ports.len()].push(message);
        }
        for (port, messages) in self.ports.iter().zip(by_shard).filter(|(_, messages)| !messages.is_empty()) {
            let bytes: usize = messages.iter().map(|message| message.message.bytes()).sum();
            // One message larger than all the room there is passes alone.
            let before = port.peer_bytes.fetch_add(bytes, Ordering::Relaxed);
            if before > 0 && before + bytes > self.peer_bytes_max {
                port.peer_bytes.fetch_sub(bytes, Ordering::Relaxed);
                port.counters.messages_dropped.fetch_add(messages.len() as u64, Ordering::Relaxed);
                continue;
            }
            // A shard that has stopped needs none.
            drop(port.inbox.report(Message::Peers { from, messages, bytes }));
        }
    }

    /// What was sent to this broker lately may be lost: its queue overflowed, or its stream broke.
    pub fn unreachable(&self, broker: BrokerId) {
        for port in &self.ports {
            drop(port.inbox.report(Message::Unreachable { broker }));
        }
    }

    /// This broker's process is gone: whoever follows a leader there need not wait for the full timeout.
    pub fn peer_gone(&self, broker: BrokerId) {
        for port in &self.ports {
            drop(port.inbox.report(Message::PeerGone { broker }));
        }
    }

    /// Gives another broker a range of what a replica here has committed; whatever its role.
    pub fn serve_pull(&self, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        if let Err(Refused::Full(message) | Refused::Closed(message)) =
            self.port(request.tp).inbox.request(Message::ServePull { request, reply })
        {
            message.refuse(&shutting_down());
        }
    }

    /// The cluster's feature level, as it is by now: replicas that are made from now on say that they were made under it.
    pub fn set_feature_level(&self, level: u32) {
        self.feature_level.store(level, Ordering::Relaxed);
    }

    /// Told, sooner or later but always, when some replica's role, term, leader or health has changed: of one,
    /// [`ReplicaHandle::changed`] tells. One receiver for all of them costs nothing for each.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What each shard counted.
    pub fn metrics(&self) -> Vec<ShardMetrics> {
        self.ports.iter().map(|port| port.counters.read(port.inbox.len(), port.budget.free())).collect()
    }

    /// Stops: refuses what comes, finishes what was accepted, writes checkpoints, closes the logs cleanly and joins the
    /// threads.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl<M: Machine> Drop for Shards<M> {
    fn drop(&mut self) {
        // Stepped by hand: whoever steps them ends them.
        if self.threads.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            return;
        }
        let (done, finished) = mpsc::channel();
        for port in &self.ports {
            // A shard that is gone already has nothing to stop.
            drop(port.inbox.report(Message::Shutdown { done: done.clone() }));
        }
        drop(done);
        let clean = (0..self.ports.len()).all(|_| finished.recv() == Ok(true));
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            drop(thread.join());
        }
        if clean {
            mark_stopped(&self.data_dir, &self.boot_id);
        }
    }
}

/// The same shards without threads and without a clock, stepped by hand: for simulations. Jobs go to the given
/// [`Workers`]; whatever runs them, between two rounds, is a function of its seed.
///
/// Dropping it is what a kill does: nothing is finished, nothing is flushed.
#[derive(Debug)]
pub struct ManualShards<M: Machine> {
    shards: Shards<M>,
    cores: Vec<Shard<M>>,
    /// How the stop ended, once one was asked for.
    finished: Option<(mpsc::Receiver<bool>, usize)>,
    clean: bool,
}

impl<M: Machine> ManualShards<M> {
    /// As [`Shards::start`], with the caller in the place of the threads.
    ///
    /// # Errors
    /// When the hard states can not be read.
    pub fn start(
        config: &ShardsConfig,
        data_dir: Arc<DataDir>,
        clock: Clock,
        workers: Arc<dyn Workers>,
        transport: Arc<dyn PeerTransport>,
    ) -> Result<Self, StartError> {
        let (shards, cores) = Shards::assemble(config, data_dir, clock, workers, transport)?;
        Ok(Self { shards, cores, finished: None, clean: true })
    }

    /// The shards as callers hold them.
    pub fn shards(&self) -> &Shards<M> {
        &self.shards
    }

    /// Whether anything waits in an inbox.
    pub fn is_waiting(&self) -> bool {
        self.shards.ports.iter().any(|port| !port.inbox.is_empty())
    }

    /// When the next round is due, if nothing arrives before.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.cores.iter().filter_map(Shard::next_deadline).min()
    }

    /// One round of every shard: all that waits, and all that is due.
    pub fn round(&mut self, now: Instant) {
        self.cores.retain_mut(|core| {
            core.port.inbox.take_waiting(&mut core.taken);
            !core.round(now)
        });
    }

    /// Begins to stop, as [`Shards::shutdown`] does; rounds and jobs go on until [`ManualShards::stopped`].
    pub fn stop(&mut self) {
        let (done, finished) = mpsc::channel();
        for port in &self.shards.ports {
            drop(port.inbox.report(Message::Shutdown { done: done.clone() }));
        }
        self.finished.get_or_insert((finished, self.shards.ports.len()));
    }

    /// Whether all shards have stopped, and if so whether cleanly.
    pub fn stopped(&mut self) -> Option<bool> {
        let (finished, left) = self.finished.as_mut()?;
        while let Ok(clean) = finished.try_recv() {
            self.clean &= clean;
            *left -= 1;
        }
        if *left > 0 {
            return None;
        }
        if self.clean {
            mark_stopped(&self.shards.data_dir, &self.shards.boot_id);
        }
        Some(self.clean)
    }

    /// The replicas that run, to look at.
    pub fn replicas(&self) -> impl Iterator<Item = &Replica<M>> {
        self.cores.iter().flat_map(|core| &core.slots).filter_map(|slot| match &slot.state {
            State::Running(replica) => Some(&**replica),
            _ => None,
        })
    }
}

/// What arrives at a shard.
#[derive(Debug)]
pub(crate) enum Message<M: Machine> {
    Event {
        slot: SlotKey,
        event: Event<M>,
    },
    Open {
        spec: Box<ReplicaSpec>,
        machine: M,
        opened: Reply<Result<ReplicaHandle<M>, Error>>,
    },
    Close {
        tp: TopicPartition,
        delete_files: bool,
        closed: Reply<()>,
    },
    Opened {
        slot: SlotKey,
        outcome: Opened<M>,
    },
    Flushed {
        slot: SlotKey,
        done: FlushDone,
        took: Duration,
    },
    CheckpointWritten {
        slot: SlotKey,
        done: CheckpointDone,
    },
    Removed {
        slot: SlotKey,
    },
    HardStatesFlushed {
        stripe: u32,
        done: HardStateFlushDone,
    },
    /// With what it says from now on, if anything; and whether nothing of it was only in memory.
    LogClosed {
        slot: SlotKey,
        says: Option<HardState>,
        is_clean: bool,
    },
    Peers {
        from: BrokerId,
        messages: Vec<GroupMessage>,
        bytes: usize,
    },
    Unreachable {
        broker: BrokerId,
    },
    PeerGone {
        broker: BrokerId,
    },
    ServePull {
        request: PullRequest,
        reply: Reply<Result<PullAnswer, Error>>,
    },
    /// A read found rot there.
    Corrupt {
        slot: SlotKey,
        offset: Offset,
    },
    Pulled {
        slot: SlotKey,
        number: u64,
        answer: Result<PullAnswer, Error>,
    },
    Installed {
        slot: SlotKey,
        installed: Installed,
    },
    Scrubbed {
        slot: SlotKey,
        scrubbed: Result<Scrubbed, ReadError>,
        /// It was asked for by a read, rather than by the round.
        by_read: bool,
    },
    Repaired {
        slot: SlotKey,
        outcome: Repaired,
    },
    Compacted {
        slot: SlotKey,
        compaction: Box<Compaction>,
        stepped: Result<CompactionStep, StorageError>,
    },
    Fetched {
        slot: SlotKey,
        fetched: Fetched,
    },
    Counted {
        slot: SlotKey,
        counted: Counted,
    },
    Noted {
        slot: SlotKey,
        relaxed: RelaxedNote,
    },
    SetPeers {
        slot: SlotKey,
        peers: Arc<[(ReplicaId, BrokerId)]>,
    },
    Shutdown {
        done: mpsc::Sender<bool>,
    },
}

impl<M: Machine> Message<M> {
    /// Answers whoever waits for this with `error`.
    pub(crate) fn refuse(self, error: &Error) {
        match self {
            Self::Event { event, .. } => {
                if let Some(answer) = event.refused(error.clone()) {
                    answer.send();
                }
            }
            Self::Open { opened, .. } => opened.send(Err(error.clone())),
            Self::Close { closed, .. } => closed.send(()),
            Self::ServePull { reply, .. } => reply.send(Err(error.clone())),
            Self::Shutdown { done } => {
                let _ = done.send(true);
            }
            Self::Opened { .. }
            | Self::Flushed { .. }
            | Self::CheckpointWritten { .. }
            | Self::Removed { .. }
            | Self::HardStatesFlushed { .. }
            | Self::Peers { .. }
            | Self::Unreachable { .. }
            | Self::PeerGone { .. }
            | Self::SetPeers { .. }
            | Self::Corrupt { .. }
            | Self::Fetched { .. }
            | Self::Counted { .. }
            | Self::Noted { .. }
            | Self::Pulled { .. }
            | Self::Installed { .. }
            | Self::Scrubbed { .. }
            | Self::Repaired { .. }
            | Self::Compacted { .. }
            | Self::LogClosed { .. } => {}
        }
    }
}

/// A place in the table.
#[derive(Debug)]
struct Slot<M: Machine> {
    life: u32,
    spec: ReplicaSpec,
    status: Arc<StatusCell>,
    state: State<M>,
    /// What waits for the next step.
    events: Vec<Event<M>>,
    touched: bool,
    /// It is in the list of what is to be flushed, and in that of full disks.
    awaits_flush: bool,
    awaits_room: bool,
    /// Flushes, checkpoints, openings that were handed out and are not reported back.
    jobs: u32,
    /// What readers were told last: it does not go back while the replica is opened anew.
    shown: ReplicaStatus,
    /// Ends since it last recovered.
    ends: u32,
    running_since: Instant,
    opened: Option<Reply<Result<ReplicaHandle<M>, Error>>>,
    closing: Option<Closing>,
    places: Places,
    /// What it pulls from others.
    pull: Option<Box<Pull>>,
    /// Where its leader was, while it has no log that knows.
    hint: Option<BrokerId>,
    repair: Option<Box<Repairing>>,
    /// Its log was copied from others a moment ago.
    is_copied: bool,
    /// Which other one's files go once it is copied.
    replaces: Option<ReplicaId>,
    relaxed: RelaxedNote,
}

/// The note in a replica's folder that it answers for what is only in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RelaxedNote {
    Not,
    There,
    /// On the pool.
    Changing,
    /// It could not be changed: looked at again when the replica is opened anew.
    Unknown,
}

#[derive(Debug)]
struct Closing {
    delete_files: bool,
    closed: Vec<Reply<()>>,
}

#[derive(Debug)]
enum State<M: Machine> {
    /// Nothing lives here.
    Free,
    /// On the pool.
    Opening,
    Running(Box<Replica<M>>),
    /// It ended; opened anew at that time, once nothing of it is in flight.
    Failed {
        machine: M,
        message: String,
        reopen_at: Instant,
    },
    /// It ended over damaged bytes that others have whole: opened anew once these are repaired.
    Mending {
        replica: Box<Replica<M>>,
        message: String,
    },
    /// Until an operator acts.
    Quarantined {
        message: String,
    },
    /// Until it is replaced.
    Lost(Lost),
    /// It has no log to go on with: one is being pulled.
    Pulling {
        machine: M,
    },
    /// Its files are being removed, or its log closed.
    Ending,
}

/// What has to happen later. Lists hold places in the table that may have become something else since.
#[derive(Debug)]
struct Timers {
    tick_at: Option<Instant>,
    relaxed_at: Option<Instant>,
    relaxed: Vec<u32>,
    probe_at: Option<Instant>,
    full: Vec<u32>,
    reopen: Vec<u32>,
    retention_at: Option<Instant>,
    retention_slice: u32,
    retention_step: Duration,
    abandoned_at: Option<Instant>,
}

impl Timers {
    fn new(config: &ShardsConfig) -> Self {
        Self {
            tick_at: None,
            relaxed_at: None,
            relaxed: Vec::new(),
            probe_at: None,
            full: Vec::new(),
            reopen: Vec::new(),
            retention_at: None,
            retention_slice: 0,
            retention_step: (config.retention_every / RETENTION_SLICES).max(Duration::from_millis(1)),
            abandoned_at: None,
        }
    }
}

struct Shard<M: Machine> {
    config: ShardsConfig,
    data_dir: Arc<DataDir>,
    disk: Arc<dyn Disk>,
    hard_state_dir: PathBuf,
    clock: Clock,
    lost_memory: bool,
    port: Arc<Port<M>>,
    workers: Arc<dyn Workers>,
    transport: Arc<dyn PeerTransport>,
    /// Reads submitted and not answered yet, of all shards.
    disk_reads: Arc<AtomicUsize>,
    /// The cluster's.
    feature_level: Arc<AtomicU32>,
    /// All shards'.
    changes: Arc<watch::Sender<u64>>,
    /// When this round began.
    now: Instant,
    /// Empty between rounds.
    taken: Vec<Message<M>>,
    /// In the order of their numbers: what is written when must not depend on a hash.
    stripes: BTreeMap<u32, Stripe>,
    slots: Vec<Slot<M>>,
    free: Vec<u32>,
    by_partition: HashMap<TopicPartition, u32>,
    touched: Vec<u32>,
    /// Ordered in this round.
    flushes: Vec<(SlotKey, FlushOrder)>,
    flushes_in_flight: usize,
    /// How long a flush takes lately.
    flush_time: Duration,
    answers: Vec<Answer<M>>,
    /// To other brokers, in this round.
    outgoing: BTreeMap<BrokerId, Vec<GroupMessage>>,
    /// Empty between calls.
    heartbeats: Vec<PeerMessage>,
    /// Ticks so far, and after which of them each place in the table is woken.
    ticks: u64,
    wakes: Vec<u64>,
    /// Those whose groups are at rest, and with whom they are spoken for.
    quiet: Vec<Option<Quiet>>,
    resting: Resting,
    /// Places in the table that pull something.
    pulls: Vec<u32>,
    scrubbing: Scrubbing,
    compacting: Compacting,
    timers: Timers,
    stopping: Option<mpsc::Sender<bool>>,
    /// A log could not be closed cleanly: the broker does not note that it stopped so.
    unclean: bool,
}

impl<M: Machine> std::fmt::Debug for Shard<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("slots", &self.slots).finish_non_exhaustive()
    }
}

impl<M: Machine> Shard<M> {
    fn run(mut self) {
        loop {
            let deadline = self.next_deadline();
            self.port.inbox.take(&mut self.taken, deadline);
            if self.round(self.workers.now()) {
                return;
            }
        }
    }

    /// Performs what was taken and what is due; whether it was the last round.
    fn round(&mut self, now: Instant) -> bool {
        self.now = now;
        let mut taken = std::mem::take(&mut self.taken);
        for message in taken.drain(..) {
            self.take(message);
        }
        taken.shrink_to(TAKEN_KEPT);
        self.taken = taken;
        self.on_time(now);
        self.settle(now);
        self.hand_out_flushes();
        self.stopping.is_some() && self.try_finish()
    }

    // ---- messages --------------------------------------------------------------------------------------------------

    fn take(&mut self, message: Message<M>) {
        match message {
            Message::Event { slot, event } => self.on_request(slot, event),
            Message::Open { spec, machine, opened } => self.on_open(*spec, machine, opened),
            Message::Close { tp, delete_files, closed } => self.on_close(tp, delete_files, closed),
            Message::Opened { slot, outcome } => self.on_opened(slot, outcome),
            Message::Flushed { slot, done, took } => {
                self.flushes_in_flight -= 1;
                self.note_flush_time(took);
                self.report(slot, Event::Flushed(done));
            }
            Message::CheckpointWritten { slot, done } => self.report(slot, Event::CheckpointWritten(done)),
            Message::Removed { slot } => self.on_removed(slot),
            Message::HardStatesFlushed { stripe, done } => self.on_hard_states_flushed(stripe, done),
            Message::LogClosed { slot, says, is_clean } => self.on_log_closed(slot, says, is_clean),
            Message::Peers { from, messages, bytes } => self.on_peers(from, messages, bytes),
            Message::Unreachable { broker } => self.on_unreachable(broker),
            Message::PeerGone { broker } => self.on_peer_gone(broker),
            Message::ServePull { request, reply } => self.on_serve_pull(request, reply),
            Message::SetPeers { slot, peers } => self.on_set_peers(slot, peers),
            Message::Corrupt { slot, offset } => self.on_corrupt(slot, offset),
            Message::Pulled { slot, number, answer } => self.on_pulled(slot, number, answer),
            Message::Installed { slot, installed } => self.on_installed(slot, installed),
            Message::Scrubbed { slot, scrubbed, by_read } => self.on_scrubbed(slot, scrubbed, by_read),
            Message::Compacted { slot, compaction, stepped } => self.on_compacted(slot, compaction, stepped),
            Message::Repaired { slot, outcome } => self.on_repaired(slot, outcome),
            Message::Fetched { slot, fetched } => self.report(slot, Event::Fetched(fetched)),
            Message::Counted { slot, counted } => self.report(slot, Event::Counted(counted)),
            Message::Noted { slot, relaxed } => self.on_noted(slot, relaxed),
            Message::Shutdown { done } => self.on_shutdown(done),
        }
    }

    fn on_request(&mut self, key: SlotKey, event: Event<M>) {
        if let Event::Reconfigure(change) = &event
            && let Some(slot) = self.slots.get_mut(key.index as usize).filter(|slot| slot.life == key.life)
        {
            // Whatever state it is in: its next life begins with them.
            slot.spec.log = change.log.clone();
            slot.spec.retention = change.retention;
            slot.spec.flush = change.flush;
            slot.spec.max_message_bytes = change.max_message_bytes;
            self.reconfigure(key.index);
            return;
        }
        if let Some(slot) = self.slots.get(key.index as usize).filter(|slot| slot.life == key.life)
            && matches!(slot.state, State::Pulling { .. })
            && let Event::Group { reply } = event
        {
            let result = Ok(self.pulling_status(key.index));
            self.answers.push(Answer::Group { reply, result });
            return;
        }
        let partition = self.slots.get(key.index as usize).map(|slot| slot.spec.tp.partition);
        let refusal = if self.stopping.is_some() {
            shutting_down()
        } else {
            match self.slots.get_mut(key.index as usize).filter(|slot| slot.life == key.life) {
                None => gone(),
                Some(slot) if slot.closing.is_some() => gone(),
                Some(slot) => match &slot.state {
                    State::Running(_) => {
                        slot.events.push(event);
                        self.touch(key.index);
                        return;
                    }
                    State::Opening => {
                        Error::new(ErrorCode::LeaderNotReady, "the partition is being opened; try again in a moment")
                    }
                    State::Failed { message, .. } | State::Mending { message, .. } => Error::new(
                        ErrorCode::StorageFailed,
                        format!("the replica failed and is opened anew: {message}"),
                    ),
                    State::Quarantined { message } | State::Lost(Lost { message, .. }) => {
                        Error::new(ErrorCode::Quarantined, message.clone())
                    }
                    State::Pulling { .. } => {
                        Error::new(ErrorCode::NotLeader, "this replica is being copied from others; ask for the leader")
                    }
                    State::Free | State::Ending => gone(),
                },
            }
        };
        let refusal = match partition {
            Some(partition) => refusal.with_partition(partition),
            None => refusal,
        };
        self.answers.extend(event.refused(refusal));
    }

    /// A job of a replica came home.
    fn report(&mut self, key: SlotKey, event: Event<M>) {
        let slot = &mut self.slots[key.index as usize];
        assert_eq!(slot.life, key.life, "a place is not given away while a job of its replica is in flight");
        slot.jobs -= 1;
        if matches!(slot.state, State::Running(_)) {
            slot.events.push(event);
            self.touch(key.index);
        } else {
            // It may have been the last thing that a closing, or an install, waited for.
            self.close_if_idle(key.index);
            self.drive_pull(key.index);
        }
    }

    fn touch(&mut self, index: u32) {
        self.stir(index);
        let slot = &mut self.slots[index as usize];
        if !slot.touched {
            slot.touched = true;
            self.touched.push(index);
        }
    }

    fn on_open(&mut self, spec: ReplicaSpec, machine: M, opened: Reply<Result<ReplicaHandle<M>, Error>>) {
        if self.stopping.is_some() {
            opened.send(Err(shutting_down()));
            return;
        }
        if self.by_partition.contains_key(&spec.tp) {
            opened.send(Err(Error::new(ErrorCode::InvalidRequest, format!("partition {} is open already", spec.tp))
                .with_partition(spec.tp.partition)));
            return;
        }
        let tp = spec.tp;
        let places = Places::new(Arc::clone(&spec.peers));
        let slot = Slot {
            life: 0,
            spec,
            status: Arc::new(StatusCell::new(Arc::clone(&self.changes))),
            state: State::Free,
            events: Vec::new(),
            touched: false,
            awaits_flush: false,
            awaits_room: false,
            jobs: 0,
            shown: ReplicaStatus {
                role: Role::Opening,
                term: Term::new(0),
                log_start: Offset::ZERO,
                high_watermark: Offset::ZERO,
                last_stable_offset: Offset::ZERO,
                end_offset: Offset::ZERO,
                size_bytes: 0,
                records: 0,
                health: Health::Ok,
                leader: None,
                leader_broker: None,
                is_voter: false,
            },
            ends: 0,
            running_since: self.now,
            opened: Some(opened),
            closing: None,
            places,
            pull: None,
            hint: None,
            repair: None,
            is_copied: false,
            replaces: None,
            relaxed: RelaxedNote::Not,
        };
        let index = match self.free.pop() {
            Some(index) => {
                let place = &mut self.slots[index as usize];
                *place = Slot { life: place.life.wrapping_add(1), ..slot };
                index
            }
            None => {
                self.slots.push(slot);
                self.wakes.push(NEVER);
                self.quiet.push(None);
                u32::try_from(self.slots.len() - 1).expect("fewer replicas than 2^32")
            }
        };
        self.by_partition.insert(tp, index);
        self.open_slot(index, machine);
    }

    /// Opens it on the pool, recovery included.
    fn open_slot(&mut self, index: u32, machine: M) {
        let key = self.key(index);
        // Its file may have failed under its neighbours: nothing put into that would ever be durable.
        if let Err(message) = self.reopen_stripe(self.data_dir.stripe_of(self.slots[index as usize].spec.tp)) {
            self.on_opened_outcome(key, Opened::Failed { machine, message });
            return;
        }
        let slot = &mut self.slots[index as usize];
        let stripe = &self.stripes[&self.data_dir.stripe_of(slot.spec.tp)];
        let before = match &slot.spec.start {
            Start::Recovered { from } => stripe.state(*from),
            Start::FirstVoter { .. } | Start::Learner => None,
        };
        slot.state = State::Opening;
        slot.jobs += 1;
        let job = OpenJob {
            disk: Arc::clone(&self.disk),
            spec: slot.spec.clone(),
            hard_state: stripe.state(slot.spec.replica),
            hard_state_before: before,
            boot_id: self.config.boot_id.clone(),
            is_new: std::mem::take(&mut slot.is_copied),
            config: ReplicaConfig {
                tp: slot.spec.tp,
                replica: slot.spec.replica,
                flush: slot.spec.flush,
                retention: slot.spec.retention,
                internal: slot.spec.internal,
                max_message_bytes: slot.spec.max_message_bytes,
                checkpoint_bytes: self.config.checkpoint_bytes,
                checkpoint_entries: self.config.checkpoint_entries,
                parked_reads_max: self.config.parked_reads_max,
                seed: self.config.seed,
                offer_after_bytes: self.config.offer_after_bytes,
                stands_first: matches!(
                    &slot.spec.start,
                    Start::FirstVoter { voters } if voters.first() == Some(&slot.spec.replica)
                ),
            },
            feature_level: self.feature_level.load(Ordering::Relaxed),
            lost_memory: self.lost_memory,
            now: (self.clock)(),
        };
        let port = Arc::clone(&self.port);
        self.workers.submit(
            JobKind::Work,
            Box::new(move || {
                drop(port.inbox.report(Message::Opened { slot: key, outcome: job.run(machine) }));
            }),
        );
    }

    fn on_opened(&mut self, key: SlotKey, outcome: Opened<M>) {
        self.slots[key.index as usize].jobs -= 1;
        self.on_opened_outcome(key, outcome);
    }

    fn on_opened_outcome(&mut self, key: SlotKey, outcome: Opened<M>) {
        let slot = &mut self.slots[key.index as usize];
        match outcome {
            Opened::Replica(mut replica) => {
                let alone = replica.is_only_voter();
                replica.begin_at(self.ticks);
                slot.relaxed = if replica.is_relaxed() { RelaxedNote::There } else { RelaxedNote::Not };
                slot.state = State::Running(replica);
                slot.running_since = self.now;
                slot.events.clear();
                // Whatever is kept of its records: producers that are idle for long are let go of then, too.
                self.timers.retention_at.get_or_insert(self.now + self.timers.retention_step);
                // Settings may have changed while it was opened.
                self.reconfigure(key.index);
                if alone {
                    self.slots[key.index as usize].events.push(Event::Campaign);
                }
                self.touch(key.index);
            }
            Opened::Failed { machine, message } => {
                tracing::error!(tp = %slot.spec.tp, %message, "cannot open a replica; trying again");
                self.set_failed(key.index, machine, message);
            }
            Opened::Pulls { machine, install, kept, replaces } => {
                slot.state = State::Pulling { machine };
                slot.replaces = replaces;
                self.show(key.index);
                self.begin_install(key.index, install, kept);
            }
            Opened::Lost(lost) => {
                let message = &lost.message;
                tracing::error!(tp = %slot.spec.tp, message, "a replica is lost: it is to be replaced");
                slot.state = State::Lost(lost);
                self.show(key.index);
            }
            Opened::Quarantined { message } => {
                tracing::error!(tp = %slot.spec.tp, %message, "a replica is quarantined");
                slot.state = State::Quarantined { message };
                self.show(key.index);
            }
        }
        let slot = &mut self.slots[key.index as usize];
        if let Some(opened) = slot.opened.take() {
            opened.send(Ok(ReplicaHandle {
                port: Arc::clone(&self.port),
                slot: key,
                tp: slot.spec.tp,
                status: Arc::clone(&slot.status),
            }));
        }
        if slot.closing.is_some() {
            self.close_if_idle(key.index);
        }
    }

    /// Tells a replica its settings. It may answer for what is only in memory once it is noted, durably, that it does.
    fn reconfigure(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if !matches!(slot.state, State::Running(_)) || slot.closing.is_some() {
            return;
        }
        let is_noted = slot.relaxed == RelaxedNote::There;
        let must_note = slot.spec.flush == FlushMode::Relaxed && slot.relaxed == RelaxedNote::Not;
        slot.events.push(Event::Reconfigure(Reconfigure {
            log: slot.spec.log.clone(),
            retention: slot.spec.retention,
            flush: if is_noted { slot.spec.flush } else { FlushMode::Quorum },
            max_message_bytes: slot.spec.max_message_bytes,
        }));
        if must_note {
            let boot_id = self.config.boot_id.clone();
            self.note_relaxed(index, RelaxedNote::There, move |disk, dir| note_relaxed(disk, dir, &boot_id));
        }
        self.touch(index);
    }

    /// Changes the note that a replica answers for what is only in memory, on a pool.
    fn note_relaxed(
        &mut self,
        index: u32,
        then: RelaxedNote,
        change: impl FnOnce(&Arc<dyn Disk>, &Path) -> std::io::Result<()> + Send + 'static,
    ) {
        let key = self.key(index);
        let slot = &mut self.slots[index as usize];
        slot.relaxed = RelaxedNote::Changing;
        slot.jobs += 1;
        let (port, disk, dir) = (Arc::clone(&self.port), Arc::clone(&self.disk), slot.spec.dir.clone());
        self.workers.submit(
            JobKind::Work,
            Box::new(move || {
                let noted = change(&disk, &dir);
                if let Err(error) = &noted {
                    tracing::warn!(dir = %dir.display(), %error, "cannot note whether a replica is flushed: all of it is, until it is opened anew");
                }
                let relaxed = if noted.is_ok() { then } else { RelaxedNote::Unknown };
                drop(port.inbox.report(Message::Noted { slot: key, relaxed }));
            }),
        );
    }

    fn on_noted(&mut self, key: SlotKey, relaxed: RelaxedNote) {
        let slot = &mut self.slots[key.index as usize];
        assert_eq!(slot.life, key.life, "a place is not given away while a job of its replica is in flight");
        slot.jobs -= 1;
        slot.relaxed = relaxed;
        if matches!(slot.state, State::Running(_)) {
            // What is wanted may have changed meanwhile.
            self.reconfigure(key.index);
        }
        self.close_if_idle(key.index);
        self.drive_pull(key.index);
    }

    fn set_failed(&mut self, index: u32, machine: M, message: String) {
        let slot = &mut self.slots[index as usize];
        if self.now.saturating_duration_since(slot.running_since) > RECOVERED_AFTER {
            slot.ends = 0;
        }
        let wait = REOPEN_AFTER_MIN.saturating_mul(1 << slot.ends.min(16)).min(REOPEN_AFTER_MAX);
        slot.ends += 1;
        slot.state = State::Failed { machine, message, reopen_at: self.now + wait };
        self.timers.reopen.push(index);
        self.show(index);
    }

    fn on_close(&mut self, tp: TopicPartition, delete_files: bool, closed: Reply<()>) {
        let Some(&index) = self.by_partition.get(&tp) else {
            closed.send(());
            return;
        };
        self.stir(index);
        let slot = &mut self.slots[index as usize];
        let closing = slot.closing.get_or_insert(Closing { delete_files: false, closed: Vec::new() });
        closing.delete_files |= delete_files;
        closing.closed.push(closed);
        // What was accepted is finished first, unless all of it goes anyway.
        if delete_files && let State::Running(replica) = &mut slot.state {
            let error = gone().with_partition(tp.partition);
            let mut fx = replica.close(&error);
            self.answers.append(&mut fx.answers);
            let late = std::mem::take(&mut slot.events);
            self.answers.extend(late.into_iter().filter_map(|event| event.refused(error.clone())));
        }
        self.close_if_idle(index);
    }

    /// Goes on with a closing once nothing of the replica is in flight.
    fn close_if_idle(&mut self, index: u32) {
        let key = self.key(index);
        let slot = &mut self.slots[index as usize];
        let Some(closing) = &slot.closing else { return };
        if slot.jobs > 0 || slot.touched || matches!(slot.state, State::Ending | State::Free) {
            return;
        }
        let state = std::mem::replace(&mut slot.state, State::Ending);
        let delete_files = closing.delete_files;
        slot.jobs += 1;
        self.rise(index);
        self.show(index);
        let slot = &self.slots[index as usize];
        let port = Arc::clone(&self.port);
        if delete_files {
            drop(state);
            let (data_dir, tp) = (Arc::clone(&self.data_dir), slot.spec.tp);
            self.workers.submit(
                JobKind::Work,
                Box::new(move || {
                    if let Err(error) = data_dir.remove_replica(tp) {
                        tracing::error!(%tp, %error, "cannot remove the files of a replica");
                    }
                    drop(port.inbox.report(Message::Removed { slot: key }));
                }),
            );
        } else if let State::Running(mut replica) = state {
            // Nothing of it is in flight: whoever still waits, waits for something that can not come any more.
            let error = if self.stopping.is_some() { shutting_down() } else { gone() };
            let tp = slot.spec.tp;
            let mut fx = replica.close(&error.with_partition(tp.partition));
            self.answers.append(&mut fx.answers);
            for message in replica.farewell() {
                self.send(index, tp, message);
            }
            self.workers.submit(
                JobKind::Work,
                Box::new(move || {
                    let says = replica.hard_state();
                    let says = close_log(replica.into_log()).map(|flushed| HardState { flushed, ..says });
                    let is_clean = says.is_some();
                    drop(port.inbox.report(Message::LogClosed { slot: key, says, is_clean }));
                }),
            );
        } else {
            // What failed, or is in doubt, must not be forgotten by a stop that looks clean.
            let is_clean = !is_in_doubt(&state);
            drop(state);
            drop(port.inbox.report(Message::LogClosed { slot: key, says: None, is_clean }));
        }
    }

    fn on_removed(&mut self, key: SlotKey) {
        let slot = &mut self.slots[key.index as usize];
        slot.jobs -= 1;
        let (tp, replica) = (slot.spec.tp, slot.spec.replica);
        self.stripe_mut(tp).forget(replica);
        self.free_slot(key.index);
    }

    fn on_log_closed(&mut self, key: SlotKey, says: Option<HardState>, is_clean: bool) {
        let slot = &mut self.slots[key.index as usize];
        slot.jobs -= 1;
        self.unclean |= !is_clean;
        if let Some(says) = says {
            let (tp, replica) = (slot.spec.tp, slot.spec.replica);
            let now = self.now;
            self.stripe_mut(tp).mark(replica, says, now);
        }
        self.free_slot(key.index);
    }

    fn stripe_mut(&mut self, tp: TopicPartition) -> &mut Stripe {
        self.stripes.get_mut(&self.data_dir.stripe_of(tp)).expect("every shard has the stripes of its partitions")
    }

    fn free_slot(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.state = State::Free;
        // What others still answer is for nobody: it must not begin a job for whoever has the place next.
        (slot.pull, slot.repair) = (None, None);
        self.by_partition.remove(&slot.spec.tp);
        if let Some(closing) = slot.closing.take() {
            for closed in closing.closed {
                closed.send(());
            }
        }
        self.free.push(index);
    }

    // ---- steps -----------------------------------------------------------------------------------------------------

    fn key(&self, index: u32) -> SlotKey {
        SlotKey { index, life: self.slots[index as usize].life }
    }

    /// Steps what is touched and writes its hard states, until nothing is left to step.
    fn settle(&mut self, now: Instant) {
        loop {
            self.step_touched();
            self.write_hard_states(now);
            if self.touched.is_empty() {
                return;
            }
        }
    }

    fn step_touched(&mut self) {
        if self.touched.is_empty() {
            return;
        }
        let now = (self.clock)();
        for index in std::mem::take(&mut self.touched) {
            self.step(index, now);
        }
    }

    fn step(&mut self, index: u32, now: Timestamp) {
        let slot = &mut self.slots[index as usize];
        slot.touched = false;
        if !matches!(slot.state, State::Running(_)) {
            self.close_if_idle(index);
            return;
        }
        let closing = slot.closing.is_some();
        self.pass_ticks(index);
        let slot = &mut self.slots[index as usize];
        let State::Running(replica) = &mut slot.state else { return };
        let mut events = std::mem::take(&mut slot.events);
        let share = self.config.replay_entries_max / self.by_partition.len().max(1) as u64;
        replica.checkpoint_after(share.max(REPLAY_ENTRIES_MIN).min(self.config.checkpoint_entries));
        let fx = replica.step(events.drain(..), now);
        self.port.counters.steps.fetch_add(1, Ordering::Relaxed);
        slot.events = events;
        self.perform(index, fx);
        if closing {
            self.close_if_idle(index);
        }
    }

    fn perform(&mut self, index: u32, fx: Effects<M>) {
        let key = self.key(index);
        let slot = &mut self.slots[index as usize];
        let Effects {
            send_now,
            send_flushed,
            hard_state,
            flushed,
            flush,
            checkpoint,
            mut answers,
            tickets,
            lookups,
            fetches,
            count,
            offered,
            is_disk_slow,
            ended,
        } = fx;
        if is_disk_slow {
            self.port.counters.disk_is_slow(self.now);
        }
        let (tp, replica) = (slot.spec.tp, slot.spec.replica);
        for message in send_now.into_iter().chain(send_flushed) {
            self.send(index, tp, message);
        }
        for answer in &mut answers {
            if let Answer::Group { result: Ok(group), .. } = answer {
                group.pulled = self.pulled(index);
            }
        }
        self.answers.append(&mut answers);
        let slot = &mut self.slots[index as usize];
        if hard_state.is_some() || flushed.is_some() {
            let stripe = self
                .stripes
                .get_mut(&self.data_dir.stripe_of(tp))
                .expect("every shard has the stripes of its partitions");
            if let Some((number, state)) = hard_state {
                stripe.put(key, number, replica, state);
            }
            if let Some(state) = flushed {
                stripe.mark(replica, state, self.now);
            }
        }
        if let Some(order) = flush {
            slot.jobs += 1;
            self.flushes.push((key, order));
        }
        if let Some(job) = checkpoint {
            slot.jobs += 1;
            let port = Arc::clone(&self.port);
            self.workers.submit(
                JobKind::Work,
                Box::new(move || {
                    drop(port.inbox.report(Message::CheckpointWritten { slot: key, done: job.run() }));
                }),
            );
        }
        for order in fetches {
            self.fetch_from_disk(index, order);
        }
        for order in tickets {
            self.read_from_disk(index, order);
        }
        for order in lookups {
            self.look_up_on_disk(key, order);
        }
        if let Some(order) = count {
            self.count_on_disk(index, order);
        }
        if let Some(ended) = ended {
            self.on_ended(index, &ended);
            return;
        }
        self.show(index);
        self.arm(index);
        self.wake(index);
        let slot = &self.slots[index as usize];
        if slot.relaxed == RelaxedNote::There
            && slot.spec.flush == FlushMode::Quorum
            && matches!(&slot.state, State::Running(replica) if !replica.is_relaxed())
        {
            self.note_relaxed(index, RelaxedNote::Not, forget_relaxed);
        }
        if let Some(offered) = offered {
            self.on_offered(index, offered);
        }
        if self.slots[index as usize].pull.is_some() {
            self.drive_pull(index);
        }
    }

    /// Reads entries for a follower, on a pool.
    fn fetch_from_disk(&mut self, index: u32, order: FetchOrder) {
        let key = self.key(index);
        let slot = &mut self.slots[index as usize];
        let State::Running(replica) = &slot.state else { return };
        let ticket = replica.log().range(order.first, order.last, order.max_bytes as usize);
        slot.jobs += 1;
        let port = Arc::clone(&self.port);
        self.workers.submit(
            JobKind::Read,
            Box::new(move || {
                let entries = ticket.map_err(ReadError::from).and_then(RangeTicket::run_entries);
                if let Err(ReadError::Corrupt { offset, .. }) = &entries {
                    drop(port.inbox.report(Message::Corrupt { slot: key, offset: *offset }));
                }
                drop(port.inbox.report(Message::Fetched { slot: key, fetched: order.done(entries) }));
            }),
        );
    }

    /// Sets the timers that the replica needs now.
    fn arm(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let State::Running(replica) = &slot.state else { return };
        if slot.spec.flush == FlushMode::Relaxed && replica.is_dirty() && !slot.awaits_flush {
            slot.awaits_flush = true;
            self.timers.relaxed.push(index);
            self.timers.relaxed_at.get_or_insert(self.now + self.config.relaxed_flush_within);
        }
        if replica.is_disk_full() && !slot.awaits_room {
            slot.awaits_room = true;
            self.timers.full.push(index);
            self.timers.probe_at.get_or_insert(self.now + PROBE_EVERY);
        }
        if replica.has_parked_reads() {
            self.timers.abandoned_at.get_or_insert(self.now + DROP_ABANDONED_EVERY);
        }
    }

    fn on_ended(&mut self, index: u32, ended: &Ended) {
        self.rise(index);
        let slot = &mut self.slots[index as usize];
        let message = ended.to_string();
        self.port.counters.replicas_ended.fetch_add(1, Ordering::Relaxed);
        let State::Running(mut replica) = std::mem::replace(&mut slot.state, State::Ending) else {
            unreachable!("only a running replica is stepped");
        };
        slot.events.clear();
        slot.pull = None;
        slot.repair = None;
        let tp = slot.spec.tp;
        for message in replica.farewell() {
            self.send(index, tp, message);
        }
        let slot = &mut self.slots[index as usize];
        if let Ended::Storage(StorageError::Corrupt { offset, .. }) = ended {
            // Opened again it would find the same bytes.
            if slot.spec.has_peers() {
                let sealed = if slot.closing.is_none() { replica.seal_at(*offset) } else { Ok(()) };
                let job = sealed.ok().and_then(|()| replica.log().scrub_job_at(*offset));
                slot.state = State::Mending { replica, message };
                match job {
                    Some(job) => {
                        self.show(index);
                        self.look_at_rot(index, job);
                    }
                    None => self.lose(index),
                }
                return;
            }
            let message =
                format!("{message}; put the replica's files back from a backup, or trim or delete what is damaged");
            tracing::error!(tp = %slot.spec.tp, %message, "a replica is quarantined");
            slot.state = State::Quarantined { message };
            self.show(index);
            return;
        }
        tracing::error!(tp = %slot.spec.tp, %message, "a replica ended; it is opened anew");
        let machine = replica.into_machine();
        self.set_failed(index, machine, message);
    }

    /// What is damaged in a replica that ended over it can not be repaired.
    fn lose(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.repair = None;
        match std::mem::replace(&mut slot.state, State::Ending) {
            State::Mending { replica, message } => {
                tracing::error!(tp = %slot.spec.tp, message, "a replica is lost: it is to be replaced");
                let (last_term, last_index) = (replica.log().last_term(), replica.log().last_index());
                slot.state = State::Lost(Lost { message, lost_memory: false, last_term, last_index });
                self.show(index);
            }
            state => slot.state = state,
        }
    }

    /// What was damaged in a replica that ended over it is repaired, or was not found: it is opened anew.
    fn mended(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        match std::mem::replace(&mut slot.state, State::Ending) {
            State::Mending { replica, message } => {
                let machine = replica.into_machine();
                self.set_failed(index, machine, message);
            }
            state => slot.state = state,
        }
    }

    /// Publishes how a replica is.
    fn show(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let mut now = match &slot.state {
            State::Running(replica) => replica.status(),
            State::Failed { message, .. } | State::Mending { message, .. } => ReplicaStatus {
                role: Role::Opening,
                health: Health::Failed { message: message.clone() },
                ..slot.shown.clone()
            },
            State::Quarantined { message } => ReplicaStatus {
                role: Role::Opening,
                health: Health::Quarantined { message: message.clone() },
                ..slot.shown.clone()
            },
            State::Lost(Lost { message, lost_memory, last_term, last_index }) => ReplicaStatus {
                role: Role::Opening,
                health: Health::Lost {
                    message: message.clone(),
                    lost_memory: *lost_memory,
                    last_term: *last_term,
                    last_index: *last_index,
                },
                ..slot.shown.clone()
            },
            State::Pulling { .. } => {
                let health = match &slot.pull {
                    Some(pull) if pull.is_disk_full => Health::DiskFull,
                    _ => Health::Ok,
                };
                ReplicaStatus { role: Role::Pulling, health, leader: None, is_voter: false, ..slot.shown.clone() }
            }
            State::Free | State::Opening | State::Ending => ReplicaStatus { role: Role::Opening, ..slot.shown.clone() },
        };
        // Until it leads again it does not know how far it was committed: what was shown before holds.
        if !now.is_ready() && now.high_watermark < slot.shown.high_watermark {
            now.log_start = slot.shown.log_start;
            now.high_watermark = slot.shown.high_watermark;
            now.end_offset = now.end_offset.max(slot.shown.end_offset);
            now.records = slot.shown.records;
        }
        now.leader_broker =
            now.leader.filter(|&leader| leader != slot.spec.replica).and_then(|leader| slot.places.broker_of(leader));
        let leads = |role| matches!(role, Role::Elected | Role::Leader);
        let counters = &self.port.counters;
        if now.role == Role::Candidate && (slot.shown.role != Role::Candidate || now.term != slot.shown.term) {
            counters.elections.fetch_add(1, Ordering::Relaxed);
        }
        if leads(now.role) && !(leads(slot.shown.role) && now.term == slot.shown.term) {
            counters.leader_changes.fetch_add(1, Ordering::Relaxed);
        }
        slot.status.publish(&now);
        slot.shown = now;
    }

    /// Counts one more who waits for the disk, if there is room for one.
    fn wait_for_disk(&self) -> Result<Arc<AtomicUsize>, Error> {
        let waiting = &self.disk_reads;
        if waiting.fetch_add(1, Ordering::Relaxed) >= self.config.disk_reads_max {
            waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(Error::new(ErrorCode::Overloaded, "too many readers wait for the disk; try again in a moment"));
        }
        Ok(Arc::clone(waiting))
    }

    fn look_up_on_disk(&mut self, slot: SlotKey, order: LookupOrder) {
        match self.wait_for_disk() {
            Err(error) => order.reply.send(Err(error)),
            Ok(waiting) => {
                let port = Arc::clone(&self.port);
                self.workers.submit(
                    JobKind::Read,
                    Box::new(move || {
                        if let Some(offset) = order.run() {
                            drop(port.inbox.report(Message::Corrupt { slot, offset }));
                        }
                        waiting.fetch_sub(1, Ordering::Relaxed);
                    }),
                );
            }
        }
    }

    /// Counts records, on a pool.
    fn count_on_disk(&mut self, index: u32, order: CountOrder) {
        let key = self.key(index);
        self.slots[index as usize].jobs += 1;
        let port = Arc::clone(&self.port);
        self.workers.submit(
            JobKind::Read,
            Box::new(move || drop(port.inbox.report(Message::Counted { slot: key, counted: order.run() }))),
        );
    }

    fn read_from_disk(&mut self, index: u32, order: ReadOrder) {
        let slot = self.key(index);
        let has_peers = self.slots[index as usize].spec.has_peers();
        let port = Arc::clone(&self.port);
        let waiting = match self.wait_for_disk() {
            Err(error) => return order.reply.send(Err(error)),
            Ok(waiting) => waiting,
        };
        self.workers.submit(
            JobKind::Read,
            Box::new(move || {
                if !order.reply.is_abandoned() {
                    let (reply, answer) = order.run();
                    if let Err(ReadError::Corrupt { offset, .. }) = &answer {
                        drop(port.inbox.report(Message::Corrupt { slot, offset: *offset }));
                    }
                    reply.send(answer.map_err(|error| match error {
                        ReadError::Corrupt { .. } if has_peers => Error::new(
                            ErrorCode::StorageFailed,
                            format!("{error}; it is being repaired from another replica: try again in a moment"),
                        ),
                        error => read_error(&error),
                    }));
                }
                waiting.fetch_sub(1, Ordering::Relaxed);
            }),
        );
    }

    // ---- flushes ---------------------------------------------------------------------------------------------------

    fn note_flush_time(&mut self, took: Duration) {
        // A moving average over some eight flushes; a single slow one counts at once, or the next would stall the shard.
        self.port.counters.flushed(took);
        if took >= self.config.tick * SLOW_FLUSH_TICKS {
            self.port.counters.disk_is_slow(self.now);
        }
        self.flush_time = (self.flush_time * 7 + took) / 8;
    }

    fn hand_out_flushes(&mut self) {
        loop {
            let alone = self.flushes.len() == 1
                && self.flushes_in_flight == 0
                && self.flushes[0].1.bytes <= self.config.inline_flush_bytes_max
                && self.config.inline_flush_bytes_max > 0
                && self.flush_time < INLINE_FLUSH_TIME_MAX
                && self.port.inbox.is_empty();
            if alone {
                self.send_messages();
                self.send_answers();
                self.flush_here();
                // The step that follows may have ordered the next one; requests that came meanwhile go first.
                continue;
            }
            for (slot, order) in std::mem::take(&mut self.flushes) {
                self.flushes_in_flight += 1;
                let (port, workers) = (Arc::clone(&self.port), Arc::clone(&self.workers));
                self.workers.submit(
                    JobKind::Flush,
                    Box::new(move || {
                        let began = workers.now();
                        let done = order.job.run();
                        let took = workers.now().saturating_duration_since(began);
                        drop(port.inbox.report(Message::Flushed { slot, done, took }));
                    }),
                );
            }
            self.send_messages();
            self.send_answers();
            return;
        }
    }

    /// One replica alone is dirty, nobody else waits, the disk is quick: the two thread switches of a hand-over to the
    /// pool would cost more than the flush itself. A disk that was quick until now and hangs holds up the whole shard, once:
    /// no heartbeat leaves it meanwhile, so that after an election timeout the others lead what it led. After that the
    /// average is far above [`INLINE_FLUSH_TIME_MAX`], and stays so for dozens of quick flushes.
    fn flush_here(&mut self) {
        let Some((key, order)) = self.flushes.pop() else { return };
        self.port.counters.flushes_inline.fetch_add(1, Ordering::Relaxed);
        let began = self.workers.now();
        self.port.counters.waits_for_flush(Some(began + self.config.tick * SLOW_FLUSH_TICKS));
        let done = order.job.run();
        let ended = self.workers.now();
        self.port.counters.waits_for_flush(None);
        self.now = ended;
        self.note_flush_time(ended - began);
        self.report(key, Event::Flushed(done));
        // How far the log is flushed is written before anybody is told that it is.
        self.settle(ended);
        self.send_answers();
    }

    fn send_answers(&mut self) {
        for answer in self.answers.drain(..) {
            answer.send();
        }
    }

    fn write_hard_states(&mut self, now: Instant) {
        let mut failed = Vec::new();
        let mut durable = Vec::new();
        for (&number, stripe) in &mut self.stripes {
            let flush_marks = stripe.marked_since().is_some_and(|since| since + MARKS_FLUSHED_WITHIN <= now);
            match stripe.write(flush_marks) {
                Ok(Written { flush, durable: mut waited }) => {
                    durable.append(&mut waited);
                    if let Some(job) = flush {
                        let port = Arc::clone(&self.port);
                        self.workers.submit(
                            JobKind::Flush,
                            Box::new(move || {
                                drop(port.inbox.report(Message::HardStatesFlushed { stripe: number, done: job.run() }));
                            }),
                        );
                    }
                }
                Err(error) => failed.push((number, error.to_string())),
            }
        }
        self.tell_durable(durable);
        for (number, why) in failed {
            self.fail_stripe(number, &why);
        }
    }

    fn on_hard_states_flushed(&mut self, number: u32, done: HardStateFlushDone) {
        let Some(stripe) = self.stripes.get_mut(&number) else { return };
        match stripe.flushed(done) {
            Ok(waited) => self.tell_durable(waited),
            Err(error) => self.fail_stripe(number, &error.to_string()),
        }
    }

    fn tell_durable(&mut self, waited: Vec<Waiter>) {
        for (key, number) in waited {
            let Some(slot) = self.slots.get_mut(key.index as usize).filter(|slot| slot.life == key.life) else {
                continue;
            };
            if number == LOWER_MARK {
                self.mark_lowered(key.index, true);
            } else if matches!(slot.state, State::Running(_)) {
                slot.events.push(Event::HardStateFlushed(number));
                self.touch(key.index);
            }
        }
    }

    /// A stripe's file failed: all its replicas end, and are opened anew once the file was.
    fn fail_stripe(&mut self, number: u32, why: &str) {
        tracing::error!(stripe = number, why, "a file of hard states failed: its replicas end");
        if let Some(stripe) = self.stripes.get_mut(&number) {
            stripe.fail(why.to_owned());
        }
        for index in 0..self.slots.len() as u32 {
            let slot = &mut self.slots[index as usize];
            if self.data_dir.stripe_of(slot.spec.tp) != number || slot.closing.is_some() {
                continue;
            }
            if let State::Running(replica) = &mut slot.state {
                let events = std::mem::take(&mut slot.events);
                let mut fx = replica.fail(Ended::HardState(why.to_owned()));
                // What waited for a step is told the same.
                let mut late = replica.step(events, Timestamp::NONE);
                fx.answers.append(&mut late.answers);
                self.perform(index, fx);
            } else {
                self.mark_lowered(index, false);
            }
        }
        self.send_answers();
    }

    // ---- time ------------------------------------------------------------------------------------------------------

    fn next_deadline(&self) -> Option<Instant> {
        let timers = &self.timers;
        let reopen = timers.reopen.iter().filter_map(|&index| match &self.slots[index as usize] {
            Slot { state: State::Failed { reopen_at, .. }, jobs: 0, .. } => Some(*reopen_at),
            _ => None,
        });
        let marks =
            self.stripes.values().filter_map(|stripe| stripe.marked_since()).map(|since| since + MARKS_FLUSHED_WITHIN);
        let slots = &self.slots;
        let pulls = self.pulls.iter().filter_map(|&index| slots[index as usize].pull.as_deref().and_then(Pull::due));
        let pulls = pulls.chain(self.scrubbing.repairs(slots));
        [timers.tick_at, timers.relaxed_at, timers.probe_at, timers.retention_at, timers.abandoned_at]
            .into_iter()
            .flatten()
            .chain(reopen)
            .chain(marks)
            .chain(pulls)
            .chain(self.scrubbing.due())
            .chain(self.compacting.due())
            .min()
    }

    fn on_time(&mut self, now: Instant) {
        if take_due(&mut self.timers.tick_at, now) {
            self.on_tick();
        }
        if take_due(&mut self.timers.relaxed_at, now) {
            for index in std::mem::take(&mut self.timers.relaxed) {
                self.slots[index as usize].awaits_flush = false;
                self.event(index, Event::FlushNow);
            }
        }
        if take_due(&mut self.timers.probe_at, now) {
            // Asked once for all of them, and nothing is taken: a probe must not use up what it looks for.
            let available = self.disk.available_bytes(self.data_dir.path()).unwrap_or(0);
            for index in std::mem::take(&mut self.timers.full) {
                let slot = &mut self.slots[index as usize];
                if available >= slot.spec.log.room_kept_on(&*self.disk).saturating_add(PROBE_BYTES) {
                    // Found full again, it comes back with its step.
                    slot.awaits_room = false;
                    self.event(index, Event::RoomAgain);
                } else if matches!(slot.state, State::Running(_)) {
                    self.timers.full.push(index);
                } else {
                    slot.awaits_room = false;
                }
            }
            if !self.timers.full.is_empty() {
                self.timers.probe_at = Some(now + PROBE_EVERY);
            }
        }
        if take_due(&mut self.timers.abandoned_at, now) {
            for index in 0..self.slots.len() as u32 {
                if matches!(&self.slots[index as usize].state, State::Running(replica) if replica.has_parked_reads()) {
                    self.event(index, Event::DropAbandoned);
                }
            }
        }
        if take_due(&mut self.timers.retention_at, now) {
            let slice = self.timers.retention_slice;
            self.timers.retention_slice = (slice + 1) % RETENTION_SLICES;
            let mut any = false;
            for index in 0..self.slots.len() as u32 {
                let slot = &self.slots[index as usize];
                any |= !matches!(slot.state, State::Free);
                let is_due = index % RETENTION_SLICES == slice
                    && matches!(&slot.state, State::Running(replica) if replica.may_retain((self.clock)()));
                if is_due {
                    self.event(index, Event::Retain);
                }
            }
            if any {
                self.timers.retention_at = Some(now + self.timers.retention_step);
            }
        }
        if !self.timers.reopen.is_empty() {
            self.reopen_due(now);
        }
        if !self.pulls.is_empty() {
            self.drive_due_pulls();
        }
        self.scrub_if_due();
        self.compact_if_due();
    }

    fn event(&mut self, index: u32, event: Event<M>) {
        let slot = &mut self.slots[index as usize];
        if matches!(slot.state, State::Running(_)) && slot.closing.is_none() {
            slot.events.push(event);
            self.touch(index);
        }
    }

    /// Opens anew what ended, once its time has come and nothing of its earlier life is in flight.
    fn reopen_due(&mut self, now: Instant) {
        for index in std::mem::take(&mut self.timers.reopen) {
            let slot = &mut self.slots[index as usize];
            let State::Failed { reopen_at, .. } = &slot.state else { continue };
            if slot.closing.is_some() {
                self.close_if_idle(index);
                continue;
            }
            if self.stopping.is_some() {
                continue;
            }
            if *reopen_at > now || slot.jobs > 0 {
                self.timers.reopen.push(index);
                continue;
            }
            let slot = &mut self.slots[index as usize];
            if let State::Failed { machine, .. } = std::mem::replace(&mut slot.state, State::Opening) {
                self.show(index);
                self.open_slot(index, machine);
            }
        }
    }

    fn reopen_stripe(&mut self, number: u32) -> Result<(), String> {
        let Some(stripe) = self.stripes.get_mut(&number) else { return Ok(()) };
        if stripe.failed().is_none() {
            return Ok(());
        }
        if stripe.has_flush_in_flight() {
            return Err("a flush of the hard states is still in flight".to_owned());
        }
        stripe.reopen(&self.disk, &self.hard_state_dir)
    }

    // ---- the end ---------------------------------------------------------------------------------------------------

    fn on_shutdown(&mut self, done: mpsc::Sender<bool>) {
        if self.stopping.is_some() {
            let _ = done.send(true);
            return;
        }
        self.stopping = Some(done);
        // What was accepted is finished, flushed and put into a checkpoint.
        for index in 0..self.slots.len() as u32 {
            self.event(index, Event::FlushNow);
            self.event(index, Event::CheckpointNow);
        }
    }

    /// Whether all is done: every job came home, every log is closed, the last marks are flushed.
    fn try_finish(&mut self) -> bool {
        let in_flight = self.slots.iter().any(|slot| slot.jobs > 0 || slot.touched)
            || self.stripes.values().any(Stripe::has_flush_in_flight)
            || !self.touched.is_empty();
        if in_flight {
            return false;
        }
        let mut closing = false;
        for index in 0..self.slots.len() as u32 {
            let slot = &mut self.slots[index as usize];
            if matches!(slot.state, State::Running(_)) {
                slot.closing.get_or_insert(Closing { delete_files: false, closed: Vec::new() });
                self.close_if_idle(index);
                closing = true;
            }
        }
        self.send_answers();
        if closing {
            return false;
        }
        let mut clean = !self.unclean && !self.slots.iter().any(|slot| is_in_doubt(&slot.state));
        for stripe in self.stripes.values_mut() {
            if let Some(error) = stripe.failed() {
                tracing::error!(error, "the hard states could not be written at the end");
                clean = false;
            } else if let Err(error) = stripe.finish() {
                tracing::error!(%error, "cannot flush the hard states at the end");
                clean = false;
            }
        }
        for message in self.port.inbox.close() {
            message.refuse(&shutting_down());
        }
        if let Some(done) = self.stopping.take() {
            // Nobody is left to tell when the process ends by itself.
            let _ = done.send(clean);
        }
        true
    }
}

/// Whether something that it answered for may have been only in memory.
fn is_in_doubt<M: Machine>(state: &State<M>) -> bool {
    matches!(state, State::Failed { .. } | State::Mending { .. } | State::Lost(Lost { lost_memory: true, .. }))
}

fn take_due(at: &mut Option<Instant>, now: Instant) -> bool {
    at.take_if(|at| *at <= now).is_some()
}

fn gone() -> Error {
    Error::new(ErrorCode::NotLeader, "this broker does not have the partition any more; ask for its leader")
}
