//! One simulated broker: real shards on a simulated disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flowstone_broker::simulation::{Duty, GroupsView, LogMachine, METADATA, MetadataView, TransactionsView};
use flowstone_protocol::{BrokerId, DirectoryId, ReplicaId, Term, TopicPartition};
use flowstone_replication::{FlushMode, JobKind, LogConfig, ManualShards, ReplicaHandle, ReplicaSpec};
use flowstone_replication::{ShardsConfig, Start};
use flowstone_storage::flush::Job;
use flowstone_storage::planted::{Bug, is_planted};
use flowstone_storage::{CompactionConfig, DataDir, Disk, SimDisk};

use super::group_coordinators::Grouping;
use super::groups::{Group, Kind, Place};
use super::keyed::TOMBSTONES_KEPT;
use super::machine::{Ears, Listener, SimMachine};
use super::outbox::{Out, Outbox, SimTransport};
use super::plan::Plan;
use super::random::{Random, mix};
use super::time::LocalClock;
use super::transactions::Transacting;
use super::workers::SimWorkers;

/// Where a broker keeps its data.
const DATA_DIR: &str = "/data";
/// What a broker that is full has less than.
pub(crate) const ROOM_KEPT_BYTES: u64 = 32 << 10;

/// The number of a broker by its place in the cluster.
pub(crate) fn broker_id(index: usize) -> BrokerId {
    BrokerId::new(index as i32 + 1)
}

/// The place of a broker in the cluster by its number.
pub(crate) fn broker_index(id: BrokerId) -> usize {
    (id.get() - 1) as usize
}

/// See the module.
pub(crate) struct SimBroker {
    pub(crate) disk: SimDisk,
    /// Another one after each wipe.
    pub(crate) directory: u32,
    pub(crate) clock: Arc<LocalClock>,
    /// Grows with each start and each end.
    pub(crate) life: u64,
    /// Grows with each power failure.
    pub(crate) boots: u64,
    /// In a box, as it is taken out for a look after each round.
    pub(crate) running: Option<Box<Running>>,
    pub(crate) is_paused: bool,
    pub(crate) is_full: bool,
    /// A bit of this disk flipped: what is opened from it may turn out to be rotten.
    pub(crate) rots: bool,
    /// When that was last.
    pub(crate) rotted_at: Option<Duration>,
    /// A life ended with its power, and none since was long enough to note how much had been flushed by then.
    pub(crate) lost_power: bool,
    /// It ended otherwise than by a clean stop.
    pub(crate) crashed: bool,
    /// When it was started last.
    pub(crate) started_at: Duration,
    /// How long flushes take, where the disk is ill.
    pub(crate) slow_flushes: Option<Duration>,
    pub(crate) random: Random,
    index: usize,
    seed: u64,
}

/// What lives while the process does.
pub(crate) struct Running {
    pub(crate) shards: ManualShards<SimMachine>,
    pub(crate) workers: Arc<SimWorkers>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) ears: Arc<Ears>,
    pub(crate) data_dir: Arc<DataDir>,
    pub(crate) replicas: BTreeMap<TopicPartition, Local>,
    /// Each with how far the disk was when it was ordered.
    pub(crate) jobs: BTreeMap<u64, (JobKind, Job, u64)>,
    pub(crate) round_at: Option<Duration>,
    /// Replicas that were there after the last round, with the number of their life.
    pub(crate) seen: BTreeMap<Listener, u64>,
    /// What it knows of the metadata's own replicas.
    pub(crate) metadata: Group,
    /// The metadata as far as its own replica of it has committed.
    pub(crate) view: Option<MetadataView>,
    /// Which of its starts.
    pub(crate) incarnation: u64,
    /// What it keeps while it leads the metadata, since that term.
    pub(crate) duty: Option<(Term, Duty)>,
    /// What it keeps as a coordinator of transactions, and on behalf of producers and of coordinators.
    pub(crate) transacting: Transacting,
    /// What it keeps as a coordinator of groups.
    pub(crate) grouping: Grouping,
    pub(crate) is_stopping: bool,
}

/// A replica that is open, or on its way.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) replica: ReplicaId,
    pub(crate) handle: Option<ReplicaHandle<SimMachine>>,
    pub(crate) is_closing: bool,
    pub(crate) view: View,
}

/// What a coordinator's replica has committed.
#[derive(Debug, Clone)]
pub(crate) enum View {
    None,
    Transactions(TransactionsView),
    Groups(GroupsView),
}

impl SimBroker {
    pub(crate) fn new(index: usize, seed: u64, clock: Arc<LocalClock>) -> Self {
        let mut broker = Self {
            disk: SimDisk::new(0),
            directory: 0,
            clock,
            life: 0,
            boots: 0,
            running: None,
            is_paused: false,
            is_full: false,
            rots: false,
            rotted_at: None,
            lost_power: false,
            crashed: false,
            started_at: Duration::ZERO,
            slow_flushes: None,
            random: Random::new(seed, 100 + index as u64),
            index,
            seed,
        };
        broker.new_disk();
        broker
    }

    /// An empty disk in the place of the one that is there.
    pub(crate) fn new_disk(&mut self) {
        let counts = self.disk.counts();
        if self.directory == 0 || !is_planted(Bug::VoterWithAmnesia) {
            self.directory += 1;
        }
        self.rots = false;
        self.rotted_at = None;
        self.disk = SimDisk::new(self.random.next());
        self.disk.set_loses_dirs(true);
        self.disk.add_counts(counts);
    }

    /// The id of its data directory.
    pub(crate) fn directory_id(&self) -> DirectoryId {
        DirectoryId::new(u128::from(mix(mix(self.seed) ^ (self.index as u64) << 32 ^ u64::from(self.directory)) | 1))
    }

    /// Starts the process; `Err` where its disk does not let it.
    pub(crate) fn start(&mut self, plan: &Plan, metadata: &Group) -> Result<(), String> {
        let index = self.index;
        let disk: Arc<dyn Disk> = self.disk.shared();
        let data_dir = DataDir::open_or_create(disk, Path::new(DATA_DIR), self.directory_id(), 1)
            .map_err(|error| error.to_string())?;
        let data_dir = Arc::new(data_dir);
        let workers = SimWorkers::new(Arc::clone(&self.clock));
        let outbox = Arc::new(Outbox::default());
        let config = ShardsConfig {
            shards: 1,
            checkpoint_entries: plan.checkpoint_entries,
            checkpoint_bytes: 1 << 20,
            retention_every: Duration::from_secs(2),
            relaxed_flush_within: Duration::from_millis(300),
            scrub_every: Duration::from_secs(3),
            compaction_every: Duration::from_millis(900),
            compaction_memory_bytes: [1 << 10, 4 << 10, 1 << 20][plan.seed as usize % 3],
            seed: mix(plan.seed ^ index as u64),
            boot_id: format!("boot {}", self.boots),
            inline_flush_bytes_max: if self.random.one_in(4) { 256 << 10 } else { 0 },
            ..ShardsConfig::default()
        };
        let shards = ManualShards::start(
            &config,
            Arc::clone(&data_dir),
            self.clock.wall_clock(),
            workers.clone(),
            Arc::new(SimTransport(Arc::clone(&outbox))),
        )
        .map_err(|error| error.to_string())?;
        self.life += 1;
        self.running = Some(Box::new(Running {
            shards,
            workers,
            outbox,
            ears: Arc::new(Ears::default()),
            data_dir,
            replicas: BTreeMap::new(),
            jobs: BTreeMap::new(),
            round_at: None,
            seen: BTreeMap::new(),
            metadata: metadata.clone(),
            view: None,
            incarnation: mix(plan.seed ^ (index as u64) << 40 ^ self.life) | 1,
            duty: None,
            transacting: Transacting::default(),
            grouping: None,
            is_stopping: false,
        }));
        Ok(())
    }

    /// The handle of its replica of this partition, where there is one.
    pub(crate) fn handle(&self, tp: TopicPartition) -> Option<&ReplicaHandle<SimMachine>> {
        self.running.as_ref()?.replicas.get(&tp)?.handle.as_ref()
    }

    /// Takes the files of a replica away while the broker is down.
    pub(crate) fn destroy(&self, folder: &Path) {
        let disk = self.disk.shared();
        // A disk that fails here keeps them: then nothing was lost.
        drop(disk.remove_dir_all(folder).and_then(|()| folder.parent().map_or(Ok(()), |parent| disk.sync_dir(parent))));
    }

    /// The files that may rot: all but what a data directory is known by.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let disk = self.disk.shared();
        let mut found = Vec::new();
        let mut folders = vec![PathBuf::from(DATA_DIR)];
        while let Some(folder) = folders.pop() {
            for name in disk.read_dir(&folder).unwrap_or_default() {
                let path = folder.join(&name);
                if self.disk.bytes(&path).is_none() {
                    folders.push(path);
                } else if folder != Path::new(DATA_DIR) || name.starts_with("hard-state-") {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }
}

/// A replica that is to be here.
struct Wanted {
    replica: ReplicaId,
    peers: Arc<[(ReplicaId, BrokerId)]>,
    start: Start,
}

impl Running {
    /// Whether the metadata, as far as it is known here, has this start of the broker: only then it may follow it, see the
    /// rules on who a replica is.
    pub(crate) fn is_registered(&self, index: usize, directory: DirectoryId) -> bool {
        let known = self.view.as_ref().and_then(|view| view.broker(broker_id(index)));
        known.is_some_and(|known| known.incarnation == self.incarnation && known.directory == directory)
    }

    /// Opens what belongs here and closes what does not.
    pub(crate) fn reconcile(&mut self, index: usize, directory: DirectoryId, plan: &Plan) {
        if self.is_stopping {
            return;
        }
        let group = &self.metadata;
        let is_here = |place: &&Place| place.broker == index && place.directory == directory;
        // One folder for a partition: a new replica begins when the old one's is gone.
        let here = group.wanted.iter().find(is_here).or_else(|| group.leaving.iter().find(is_here));
        let wanted = here.map(|place| Wanted {
            replica: place.replica,
            peers: group.places().map(|place| (place.replica, broker_id(place.broker))).collect::<Vec<_>>().into(),
            start: if group.founders.contains(&place.replica) {
                Start::FirstVoter { voters: Arc::clone(&group.founders) }
            } else {
                Start::Learner
            },
        });
        self.make_so(METADATA, wanted, plan);
        if !self.is_registered(index, directory) {
            return;
        }
        let wanted = self.view.as_ref().map(|view| view.replicas_in(directory)).unwrap_or_default();
        let gone: Vec<_> = self
            .replicas
            .keys()
            .copied()
            .filter(|&tp| tp != METADATA && !wanted.iter().any(|replica| replica.tp == tp))
            .collect();
        for tp in gone {
            self.make_so(tp, None, plan);
        }
        for replica in wanted {
            let wanted = Wanted { replica: replica.replica, peers: replica.peers, start: replica.start };
            self.make_so(replica.tp, Some(wanted), plan);
        }
    }

    fn make_so(&mut self, tp: TopicPartition, wanted: Option<Wanted>, plan: &Plan) {
        match (wanted, self.replicas.get_mut(&tp)) {
            (Some(wanted), None) => self.open(tp, wanted, plan),
            (Some(Wanted { replica, peers, .. }), Some(local)) if replica == local.replica => {
                if let Some(handle) = &local.handle {
                    handle.set_peers(peers);
                }
            }
            (wanted, Some(local)) => {
                if !local.is_closing {
                    local.is_closing = true;
                    let closed = self.outbox.reply(move |()| Out::Closed { tp });
                    // What takes its place may go on with its files.
                    self.shards.shards().close(tp, wanted.is_none(), closed);
                }
            }
            (None, None) => {}
        }
    }

    fn open(&mut self, tp: TopicPartition, wanted: Wanted, plan: &Plan) {
        let Wanted { replica, peers, start } = wanted;
        let who = Listener { tp, replica };
        let kind = Kind::of(tp.topic);
        let (inner, view) = match (kind, &self.view) {
            (Kind::Records | Kind::Keyed, _) => (LogMachine::forgetful_records(plan.producers_kept), View::None),
            (Kind::Transactions, _) => {
                let (machine, view) = LogMachine::transactions();
                (machine, View::Transactions(view))
            }
            (Kind::Groups, _) => {
                let (machine, view) = LogMachine::groups(plan.offsets_kept);
                (machine, View::Groups(view))
            }
            (Kind::Metadata, Some(view)) => (LogMachine::metadata_again(view), View::None),
            (Kind::Metadata, None) => {
                let (machine, view) = LogMachine::metadata();
                self.view = Some(view);
                (machine, View::None)
            }
        };
        let spec = ReplicaSpec {
            tp,
            replica,
            dir: self.data_dir.replica_dir(tp),
            log: log_config(plan, kind),
            flush: if plan.is_relaxed(tp) { FlushMode::Relaxed } else { FlushMode::Quorum },
            retention: plan.retention(tp.topic),
            internal: !matches!(kind, Kind::Records | Kind::Keyed),
            max_message_bytes: 1 << 20,
            peers,
            start,
        };
        self.replicas.insert(tp, Local { replica, handle: None, is_closing: false, view });
        let machine = SimMachine::new(inner, who, Arc::clone(&self.ears));
        let opened = self.outbox.reply(move |handle| Out::Opened { tp, handle });
        self.shards.shards().open(spec, machine, opened);
    }
}

/// Of a topic of which the last record of each key is kept, and where that is done often.
fn compaction(kind: Kind) -> Option<CompactionConfig> {
    let (tombstones_kept, dirty_per_mille_min) = match kind {
        Kind::Records | Kind::Metadata => return None,
        Kind::Keyed => (TOMBSTONES_KEPT, 50),
        Kind::Transactions | Kind::Groups => (Duration::from_secs(2), 300),
    };
    Some(CompactionConfig { tombstones_kept, dirty_per_mille_min, ..CompactionConfig::default() })
}

fn log_config(plan: &Plan, kind: Kind) -> LogConfig {
    let compaction = compaction(kind);
    LogConfig {
        compaction,
        // So that there is something to be cleaned.
        segment_bytes: if compaction.is_some() { plan.segment_bytes.min(6 << 10) } else { plan.segment_bytes },
        zero_ahead_bytes: 4 << 10,
        room_kept_bytes: ROOM_KEPT_BYTES,
        ..LogConfig::default()
    }
}
