//! Makes this broker's replicas what the committed metadata says: opens, reconfigures, closes and deletes.
//!
//! The metadata alone decides which replicas exist, never a request and never a folder that is found: a replica's id is
//! in the record that made it, together with the data directory that may hold it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use flowstone_protocol::{DirectoryId, Error, ErrorCode, Offset, ReplicaId, TopicId, TopicPartition};
use flowstone_replication::{
    FlushMode, Health, LogConfig, Reconfigure, ReplicaSpec, Reply, RetentionConfig, Role, Shards, Start,
};
use flowstone_storage::{DataDir, ReplicaIdentity};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{self, AbortHandle, JoinError, JoinSet};

use super::change::{PartitionEntry, Place, Recovered};
use super::table::{METADATA_PARTITION, METADATA_TOPIC_ID, MetadataTable, Topic};
use crate::cluster::belonging::{Belonging, Kept};
use crate::cluster::control::Control;
use crate::cluster::recovery::MetadataRecovery;
use crate::coordinator::Published;
use crate::partition::{LocalReplicas, MachineRules, OpenPartition, PartitionMachine, Peers, Replica, Slot};
use crate::topic_config::{FlushPolicy, TopicConfig, TopicOverrides};

/// Time that all openings of a start are given before the broker serves without those that are left.
const START_OPENINGS_MAX: Duration = Duration::from_secs(120);

/// Between two tries to replace the metadata's own replica.
const SUCCESSION_EVERY: Duration = Duration::from_secs(1);

/// Largest batch of metadata records: a topic of very many partitions is one record.
const METADATA_BATCH_BYTES_MAX: usize = 64 << 20;
/// The metadata's log; what is older is in its checkpoints.
const METADATA_LOG_BYTES: u64 = 128 << 20;
/// Size at which a segment of it is closed.
const METADATA_SEGMENT_BYTES: u64 = 64 << 20;

/// Follows the metadata.
#[derive(Debug)]
pub(crate) struct Reconciler {
    /// Weak: the shards end when the broker says so, whatever this task is doing.
    pub(crate) shards: Weak<Shards<PartitionMachine>>,
    pub(crate) data_dir: Arc<DataDir>,
    pub(crate) table: Published<MetadataTable>,
    pub(crate) replicas: LocalReplicas,
    pub(crate) directory: DirectoryId,
    pub(crate) topic_defaults: TopicOverrides,
    /// What machines behind the cluster's own topics are made with.
    pub(crate) machine_rules: MachineRules,
    /// Metadata up to here is done; `None` before the first pass.
    done: Option<Offset>,
    /// The metadata's recovery that this belongs to: of another one everything is looked at anew.
    recovery: i64,
    /// Openings under way; each is compared with the metadata when it ends: what was altered meanwhile would else reach
    /// nobody.
    openings: JoinSet<(TopicPartition, Slot)>,
    /// The opening of each slot that has one: taking the slot away ends it.
    opening: HashMap<TopicPartition, AbortHandle>,
    /// Replicas that are being closed for good; none is opened in the place of one before that has ended.
    clearings: JoinSet<()>,
    clearing: HashMap<TopicPartition, task::Id>,
    /// Tells of the replicas' leadership and health: one for all of them.
    _watch: JoinSet<()>,
    /// How the metadata's replica is replaced; `None` where there is nothing to be looked after.
    succession: Option<Succession>,
    /// The controller gave yet another replica while one was being opened.
    succeeds_again: bool,
    recoveries: Option<mpsc::Receiver<MetadataRecovery>>,
}

/// What it takes to replace the metadata's own replica while the broker runs.
#[derive(Clone, Debug)]
pub(crate) struct Succession {
    /// The replica that this broker is to have, as the controller says.
    pub(crate) wanted: watch::Receiver<ReplicaId>,
    pub(crate) control: Arc<Control>,
    pub(crate) data_dir: Arc<DataDir>,
    /// Where the new id is noted.
    pub(crate) kept: Arc<Kept>,
}

impl Succession {
    /// Notes the new id, closes the `earlier` replica, and opens the one that takes its place.
    async fn take(
        self,
        next: ReplicaId,
        earlier: Arc<OpenPartition>,
        start: Start,
        peers: Peers,
        shards: Weak<Shards<PartitionMachine>>,
    ) -> (TopicPartition, Slot) {
        // First of all: a start that is cut off from here on goes on with the new one.
        let recovered_from = if let Start::Recovered { from } = start { Some(from) } else { None };
        let note = move |belonging: &mut Belonging| {
            (belonging.metadata_replica, belonging.recovered_from) = (Some(next), recovered_from);
        };
        // Without it this broker follows no metadata: nothing else is worth doing here before that.
        while let Err(error) = self.kept.change(note).await {
            tracing::error!(error, "cannot note the new replica of the metadata; it is tried again");
            tokio::time::sleep(SUCCESSION_EVERY).await;
        }
        loop {
            close(&shards, METADATA_PARTITION, false).await;
            let spec = metadata_spec(&self.data_dir, next, Arc::clone(&peers), start.clone());
            let machine = PartitionMachine::metadata_again(&self.control.table);
            match open_handle(&shards, spec, machine).await {
                Ok(replica) => {
                    self.control.set_metadata(next, replica.clone());
                    let config = TopicConfig::clone(&earlier.config());
                    let partition =
                        OpenPartition::new((METADATA_PARTITION, next), &earlier.topic, true, replica, peers, config);
                    return (METADATA_PARTITION, Slot::Open(Arc::new(partition)));
                }
                Err(error) if error.code == ErrorCode::ShuttingDown => {
                    return (METADATA_PARTITION, Slot::Failed(error.into()));
                }
                Err(error) => {
                    tracing::error!(%error, "cannot open the new replica of the metadata; it is tried again");
                    tokio::time::sleep(SUCCESSION_EVERY).await;
                }
            }
        }
    }
}

/// Told when the controller gives this broker another replica of the metadata; never, where nobody would tell.
async fn wanted_again(wanted: &mut Option<watch::Receiver<ReplicaId>>) {
    if let Some(wanted) = wanted
        && wanted.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// The next wish that the metadata be recovered; never, where nobody can have one.
async fn asked_for(recoveries: &mut Option<mpsc::Receiver<MetadataRecovery>>) -> MetadataRecovery {
    if let Some(recoveries) = recoveries
        && let Some(recovery) = recoveries.recv().await
    {
        return recovery;
    }
    std::future::pending().await
}

/// How the metadata's own replica is kept.
pub(crate) fn metadata_spec(data_dir: &DataDir, replica: ReplicaId, peers: Peers, start: Start) -> ReplicaSpec {
    ReplicaSpec {
        tp: METADATA_PARTITION,
        replica,
        dir: data_dir.replica_dir(METADATA_PARTITION),
        log: LogConfig { segment_bytes: METADATA_SEGMENT_BYTES, ..LogConfig::default() },
        flush: FlushMode::Quorum,
        retention: RetentionConfig { time: None, bytes: Some(METADATA_LOG_BYTES) },
        internal: true,
        max_message_bytes: METADATA_BATCH_BYTES_MAX,
        peers,
        start,
    }
}

/// What the metadata wants of this broker.
#[derive(Debug)]
struct Wanted {
    topic: Arc<Topic>,
    replicas: Vec<WantedReplica>,
}

/// One replica that this broker's directory is to have.
#[derive(Clone, Debug)]
pub(crate) struct WantedReplica {
    pub(crate) tp: TopicPartition,
    pub(crate) replica: ReplicaId,
    pub(crate) peers: Peers,
    pub(crate) start: Start,
}

impl WantedReplica {
    /// What is wanted of a partition in a data directory. A replica that took the place of another in it goes before that
    /// one.
    pub(crate) fn in_directory(tp: TopicPartition, entry: &PartitionEntry, directory: DirectoryId) -> Option<Self> {
        let place = entry.places().find(|place| place.directory == directory)?;
        Some(Self::of(tp, entry, place.replica))
    }

    fn of(tp: TopicPartition, entry: &PartitionEntry, replica: ReplicaId) -> Self {
        let start = match entry.recovered() {
            Some(Recovered { replica: survivor, from }) if survivor == replica => Start::Recovered { from },
            _ if entry.is_founder(replica) => Start::FirstVoter { voters: entry.founders().into() },
            _ => Start::Learner,
        };
        let peers = entry.places().map(|place| (place.replica, place.broker)).collect();
        Self { tp, replica, peers, start }
    }
}

impl Reconciler {
    pub(crate) fn new(
        shards: &Arc<Shards<PartitionMachine>>,
        data_dir: Arc<DataDir>,
        table: Published<MetadataTable>,
        replicas: LocalReplicas,
        topic_defaults: TopicOverrides,
    ) -> Self {
        let directory = data_dir.id();
        let mut watch = JoinSet::new();
        watch.spawn(tell_changes(shards.changes(), replicas.clone()));
        Self {
            shards: Arc::downgrade(shards),
            data_dir,
            table,
            replicas,
            directory,
            topic_defaults,
            machine_rules: MachineRules::default(),
            done: None,
            recovery: 0,
            openings: JoinSet::new(),
            opening: HashMap::new(),
            clearings: JoinSet::new(),
            clearing: HashMap::new(),
            _watch: watch,
            succession: None,
            succeeds_again: false,
            recoveries: None,
        }
    }

    /// The first pass, and its openings: returns when every local replica is open, leads where it is alone, or has said
    /// why not, and at the latest after [`START_OPENINGS_MAX`]: one sick folder must not keep all others from being
    /// served.
    pub(crate) async fn catch_up(&mut self) {
        self.remove_strangers().await;
        self.pass();
        let openings = async {
            while let Some(opened) = self.openings.join_next_with_id().await {
                self.on_opened(opened);
            }
        };
        if tokio::time::timeout(START_OPENINGS_MAX, openings).await.is_err() {
            tracing::error!(
                left = self.openings.len(),
                "replicas are still being opened: the broker starts without them"
            );
        }
    }

    /// Follows the metadata until aborted.
    pub(crate) async fn run(mut self) {
        let mut changes = self.table.changes();
        let mut wanted = self.succession.as_ref().map(|succession| succession.wanted.clone());
        let mut recoveries = self.recoveries.take();
        // What changed before it was listened.
        self.pass();
        self.succeed();
        loop {
            tokio::select! {
                changed = changes.changed() => match changed {
                    Ok(()) => self.pass(),
                    Err(_) => return,
                },
                Some(opened) = self.openings.join_next_with_id() => self.on_opened(opened),
                Some(cleared) = self.clearings.join_next_with_id() => self.on_cleared(cleared),
                () = wanted_again(&mut wanted) => self.succeed(),
                recovery = asked_for(&mut recoveries) => self.recover(recovery),
            }
        }
    }

    /// One look at what changed since the last.
    fn pass(&mut self) {
        let Look { applied, recovery, wanted, gone, ends } = self.look();
        let Some(shards) = self.shards.upgrade() else { return };
        shards.set_feature_level(self.table.with(MetadataTable::feature_level).unsigned_abs());
        for tp in gone {
            self.take_away(&shards, tp, ends);
        }
        for wanted in wanted {
            self.make_so(&shards, &wanted);
        }
        (self.done, self.recovery) = (Some(applied), recovery);
    }

    /// A replica is closed for good: another one may be wanted in its place by now.
    fn on_cleared(&mut self, cleared: Result<(task::Id, ()), JoinError>) {
        let ended = cleared.map_or_else(|error| error.id(), |(id, ())| id);
        let Some(tp) = self.clearing.iter().find(|(_, clearing)| **clearing == ended).map(|(tp, _)| *tp) else {
            return;
        };
        self.clearing.remove(&tp);
        let Some(shards) = self.shards.upgrade() else { return };
        if let Some(wanted) = self.wanted_of(tp) {
            self.make_so(&shards, &wanted);
        }
    }

    /// What is wanted of one replica.
    fn wanted_of(&self, tp: TopicPartition) -> Option<Wanted> {
        let Wanted { topic, mut replicas } =
            self.table.with(|table| table.topic(tp.topic).map(|topic| self.wanted(topic)))?;
        replicas.retain(|wanted| wanted.tp == tp);
        (!replicas.is_empty()).then_some(Wanted { topic, replicas })
    }

    /// An opening has ended: its replica is made what the metadata wants by now.
    fn on_opened(&mut self, opened: Result<(task::Id, (TopicPartition, Slot)), JoinError>) {
        // One that was ended belongs to a replica that is gone.
        let Ok((opening, (tp, slot))) = opened else { return };
        // So does one that had ended by itself before its replica was taken away: what it opened is closed by now.
        if self.opening.get(&tp).is_none_or(|current| current.id() != opening) {
            return;
        }
        self.opening.remove(&tp);
        let is_open = matches!(slot, Slot::Open(_));
        self.replicas.set(tp, slot);
        if !is_open {
            return;
        }
        if tp == METADATA_PARTITION {
            // It may be to give way to yet another one by now. Never because of an older wish: what was recovered goes on.
            if std::mem::take(&mut self.succeeds_again) {
                self.succeed();
            }
            return;
        }
        let Some(shards) = self.shards.upgrade() else { return };
        if self.table.with(MetadataTable::recovery) != self.recovery {
            // What is gone now may have been lost: the next pass, which is due, looks at everything.
            return;
        }
        match self.wanted_of(tp) {
            Some(wanted) => self.make_so(&shards, &wanted),
            // Taken away while it was being opened, with its topic or alone.
            None => self.take_away(&shards, tp, Ends::Deleted),
        }
    }

    /// Looks after the metadata's own replica, which was opened before there was any metadata; and gives its place to
    /// another one when the controller says so.
    pub(crate) fn adopt(
        &mut self,
        partition: &Arc<OpenPartition>,
        succession: Succession,
        recoveries: mpsc::Receiver<MetadataRecovery>,
    ) {
        self.replicas.set(partition.tp, Slot::Open(Arc::clone(partition)));
        self.succession = Some(succession);
        self.recoveries = Some(recoveries);
    }

    /// The metadata's majority is gone for good, and an operator wants what is here to go on.
    fn recover(&mut self, recovery: MetadataRecovery) {
        let Some(succession) = &self.succession else { return };
        let Some(Slot::Open(earlier)) = self.replicas.get(METADATA_PARTITION) else { return };
        let from = earlier.replica_id;
        tracing::error!(%from, to = %recovery.survives_as, "the metadata goes on with what this broker has of it");
        let start = Start::Recovered { from };
        let peers: Peers = Arc::from([(recovery.survives_as, succession.control.me)]);
        let (succession, shards) = (succession.clone(), self.shards.clone());
        // It takes the place of whatever was being tried, and must not be closed by that.
        self.succeeds_again = false;
        if let Some(earlier) = self.opening.remove(&METADATA_PARTITION) {
            earlier.abort();
        }
        let opening = self.openings.spawn(async move {
            let slot = succession.take(recovery.survives_as, earlier, start, peers, shards).await;
            let is_done = matches!(&slot.1, Slot::Open(partition) if partition.replica_id == recovery.survives_as);
            // Whoever waits is told of the failure by the sender's end.
            if is_done && recovery.done.send(()).is_err() {
                tracing::debug!("whoever asked for the metadata's recovery has given up waiting");
            }
            slot
        });
        self.opening.insert(METADATA_PARTITION, opening);
    }

    /// The metadata's replica here was removed from its group, or lost: another one takes its place.
    fn succeed(&mut self) {
        let Some(succession) = &self.succession else { return };
        if self.opening.contains_key(&METADATA_PARTITION) {
            // Looked at again when that ends: two at once would close each other's.
            self.succeeds_again = true;
            return;
        }
        let next = *succession.wanted.borrow();
        let Some(Slot::Open(earlier)) = self.replicas.get(METADATA_PARTITION) else { return };
        if earlier.replica_id == next {
            return;
        }
        tracing::warn!(from = %earlier.replica_id, to = %next, "the metadata's replica here begins anew");
        let peers: Peers =
            self.table.with(|table| metadata_places(table).map(|place| (place.replica, place.broker)).collect());
        let opening =
            self.openings.spawn(succession.clone().take(next, earlier, Start::Learner, peers, self.shards.clone()));
        self.opening.insert(METADATA_PARTITION, opening);
    }

    /// What this broker has of a topic.
    fn wanted(&self, topic: &Arc<Topic>) -> Wanted {
        let replicas = topic.entries();
        let replicas = replicas.filter_map(|(tp, entry)| WantedReplica::in_directory(tp, entry, self.directory));
        Wanted { topic: Arc::clone(topic), replicas: replicas.collect() }
    }

    /// What is wanted of the topics that changed, and replicas here whose topic or place is gone.
    fn look(&self) -> Look {
        self.table.with(|table| {
            self.tell_metadata_peers(table);
            let recovery = table.recovery();
            // What was done belongs to a history that was given up.
            let done = self.done.filter(|_| self.recovery == recovery);
            let since = done.unwrap_or(Offset::new(-1));
            let changed: Vec<&Arc<Topic>> = match done {
                None => table.topics().collect(),
                Some(done) => table.changed_since(done).collect(),
            };
            // The metadata's own replica is opened before there is any metadata.
            let changed: Vec<Wanted> = changed
                .into_iter()
                .filter(|topic| topic.id != METADATA_TOPIC_ID)
                .map(|topic| self.wanted(topic))
                .collect();
            if self.done.is_some() && done.is_none() {
                let gone = self.unknown_to(table);
                return Look { applied: table.applied(), recovery, wanted: changed, gone, ends: Ends::Unknown };
            }
            let deleted: Option<HashSet<TopicId>> =
                table.deleted_since(since).map(|topics| topics.into_iter().collect());
            let is_deleted = |topic: TopicId| match &deleted {
                Some(deleted) => deleted.contains(&topic),
                // Too many were deleted to be remembered.
                None => table.topic(topic).is_none(),
            };
            let looked_at: HashSet<TopicId> = changed.iter().map(|wanted| wanted.topic.id).collect();
            let has_no_place = |tp: TopicPartition| {
                let is_here = |entry: &PartitionEntry| entry.places().any(|place| place.directory == self.directory);
                looked_at.contains(&tp.topic) && !table.partition(tp).is_some_and(is_here)
            };
            let here = || self.replicas.all().into_iter().map(|(tp, _)| tp).filter(|tp| tp.topic != METADATA_TOPIC_ID);
            let gone = if looked_at.is_empty() && deleted.as_ref().is_some_and(HashSet::is_empty) {
                Vec::new()
            } else {
                here().filter(|tp| is_deleted(tp.topic) || has_no_place(*tp)).collect()
            };
            Look { applied: table.applied(), recovery, wanted: changed, gone, ends: Ends::Deleted }
        })
    }

    /// Replicas here that a table which was recovered with a loss does not know, or in whose place it knows an earlier one.
    fn unknown_to(&self, table: &MetadataTable) -> Vec<TopicPartition> {
        let is_known = |tp: TopicPartition, slot: &Slot| {
            let Some(entry) = table.partition(tp) else { return false };
            let Some(place) = entry.places().find(|place| place.directory == self.directory) else { return false };
            match slot {
                Slot::Open(open) => goes_on_with(entry, place.replica, open.replica_id),
                Slot::Opening | Slot::Failed(_) | Slot::Refused(_) => true,
            }
        };
        let here = self.replicas.all().into_iter().filter(|(tp, _)| tp.topic != METADATA_TOPIC_ID);
        here.filter(|(tp, slot)| !is_known(*tp, slot)).map(|(tp, _)| tp).collect()
    }

    /// Where the metadata's other replicas are follows from who is registered.
    fn tell_metadata_peers(&self, table: &MetadataTable) {
        let Some(Slot::Open(metadata)) = self.replicas.get(METADATA_PARTITION) else { return };
        let peers: Peers = metadata_places(table).map(|place| (place.replica, place.broker)).collect();
        if !peers.is_empty() {
            metadata.set_peers(&peers);
        }
    }

    fn make_so(&mut self, shards: &Arc<Shards<PartitionMachine>>, wanted: &Wanted) {
        let topic = &wanted.topic;
        // One for all of them.
        let config = TopicConfig::resolve(&self.topic_defaults, &topic.overrides).map(Arc::new);
        for wanted in &wanted.replicas {
            let tp = wanted.tp;
            if self.clearing.contains_key(&tp) {
                // Looked at again when that has ended.
                continue;
            }
            let config = match &config {
                Ok(config) => config,
                // Defaults of this broker that contradict what the topic was given.
                Err(error) => {
                    let error = Error::clone(error).with_topic(topic.name.as_str()).with_partition(tp.partition);
                    self.replicas.set(tp, Slot::Refused(error.into()));
                    continue;
                }
            };
            match self.replicas.get(tp) {
                Some(Slot::Open(partition)) if partition.replica_id == wanted.replica => {
                    partition.set_peers(&wanted.peers);
                    bring_up(&partition, config);
                }
                Some(Slot::Open(earlier)) => {
                    tracing::info!(%tp, from = %earlier.replica_id, to = %wanted.replica, "a replica takes another's place");
                    self.open(shards, topic, wanted, Arc::clone(config), Some(earlier));
                }
                // Looked at again when its opening ends.
                Some(Slot::Opening) => {}
                None | Some(Slot::Failed(_) | Slot::Refused(_)) => {
                    self.open(shards, topic, wanted, Arc::clone(config), None);
                }
            }
        }
    }

    /// Opens a replica; one that has its place until now is closed before.
    fn open(
        &mut self,
        shards: &Arc<Shards<PartitionMachine>>,
        topic: &Arc<Topic>,
        wanted: &WantedReplica,
        config: Arc<TopicConfig>,
        earlier: Option<Arc<OpenPartition>>,
    ) {
        let WantedReplica { tp, replica: replica_id, peers, start } = wanted.clone();
        self.replicas.set(tp, Slot::Opening);
        let spec = ReplicaSpec {
            tp,
            replica: replica_id,
            dir: self.data_dir.replica_dir(tp),
            log: log_config(&config),
            flush: flush_mode(config.flush),
            retention: retention(&config),
            internal: topic.internal,
            max_message_bytes: config.max_message_bytes,
            peers: Arc::clone(&peers),
            start,
        };
        // Weak while it waits: the shards end when the broker says so.
        let shards = Arc::downgrade(shards);
        let topic = Arc::clone(topic);
        let rules = self.machine_rules.clone();
        // Whatever had this place is closed first, and what is being deleted is gone first; at the start there is nothing.
        let is_first = self.done.is_none();
        let opening = self.openings.spawn(async move {
            if !is_first {
                // Its files stay until the new one has what takes their place.
                close(&shards, tp, false).await;
            }
            drop(earlier);
            let (machine, view) = PartitionMachine::behind(&topic.name, &rules);
            let opened = open_handle(&shards, spec, machine).await;
            let slot = match opened {
                Ok(replica) => {
                    let partition =
                        OpenPartition::new((tp, replica_id), &topic.name, topic.internal, replica, peers, config)
                            .viewed(view);
                    // One that failed is opened again by its shard, and says meanwhile what is wrong with it.
                    if let Err(error) = settled(&partition.replica, partition.has_peers()).await {
                        tracing::error!(topic = topic.name, partition = tp.partition.get(), %error, "cannot open a replica");
                    }
                    Slot::Open(Arc::new(partition))
                }
                Err(error) => {
                    tracing::error!(topic = topic.name, partition = tp.partition.get(), %error, "cannot open a replica");
                    Slot::Failed(Box::new(error.with_topic(topic.name.as_str()).with_partition(tp.partition)))
                }
            };
            (tp, slot)
        });
        self.opening.insert(tp, opening);
    }

    fn take_away(&mut self, shards: &Arc<Shards<PartitionMachine>>, tp: TopicPartition, ends: Ends) {
        let Some(slot) = self.replicas.remove(tp) else { return };
        // One that was not begun is not; one that was is closed by what follows.
        if let Some(opening) = self.opening.remove(&tp) {
            opening.abort();
        }
        let (shards, data_dir) = (Arc::downgrade(shards), Arc::clone(&self.data_dir));
        // Of one that it has not open the shard knows no files.
        let is_open = matches!(slot, Slot::Open(_));
        drop(slot);
        let clearing = self.clearings.spawn(async move {
            close(&shards, tp, ends == Ends::Deleted).await;
            if ends == Ends::Deleted && is_open {
                return;
            }
            let clearing = task::spawn_blocking(move || match ends {
                Ends::Deleted => data_dir.remove_replica(tp).map_err(|error| error.to_string()),
                Ends::Unknown => set_aside(&data_dir, tp).map_err(|error| error.to_string()),
            });
            if let Ok(Err(error)) = clearing.await {
                tracing::warn!(%tp, error, "cannot clear the folder of a replica that is wanted no more; the next start tries again");
            }
        });
        self.clearing.insert(tp, clearing.id());
    }

    /// Folders of replicas that the metadata does not give to this directory: left by a crash in the middle of a
    /// deletion, or taken away while this broker was down. Where the metadata went on with a loss since they were compared
    /// last, it may have lost the topic or the place rather than taken it away: then they are set aside, as is what belongs
    /// to another replica than the one that it knows here.
    async fn remove_strangers(&self) {
        let kept = self.succession.as_ref().map(|succession| Arc::clone(&succession.kept));
        let settled = kept.as_ref().map_or(0, |kept| kept.get(|belonging| belonging.settled_recovery));
        let (recovery, known) = self.table.with(|table| {
            let here = table.entries().filter_map(|(_, tp, entry)| {
                let place = entry.places().find(|place| place.directory == self.directory)?;
                Some((tp, (place.replica, entry.clone())))
            });
            (table.recovery(), here.collect::<HashMap<_, _>>())
        });
        let is_sure = recovery == settled;
        let data_dir = Arc::clone(&self.data_dir);
        let removed = tokio::task::spawn_blocking(move || {
            let mut is_done = true;
            for tp in data_dir.replicas()?.into_iter().filter(|tp| *tp != METADATA_PARTITION) {
                let is_known = known.get(&tp).is_some_and(|(replica, entry)| {
                    is_sure || held(&data_dir, tp).is_none_or(|held| goes_on_with(entry, *replica, held))
                });
                if is_known {
                    continue;
                }
                if is_sure {
                    tracing::info!(%tp, "removing the folder of a replica that was deleted");
                    data_dir.remove_replica(tp)?;
                } else if let Err(error) = set_aside(&data_dir, tp) {
                    tracing::warn!(%tp, %error, "cannot set the folder of an unknown replica aside; it stays where it is");
                    is_done = false;
                }
            }
            Ok::<bool, flowstone_storage::DataDirError>(is_done)
        });
        match (removed.await, kept) {
            (Ok(Ok(true)), Some(kept)) if !is_sure => {
                if let Err(error) = kept.change(move |belonging| belonging.settled_recovery = recovery).await {
                    tracing::warn!(
                        error,
                        "cannot note that the replicas here were compared with the recovered metadata"
                    );
                }
            }
            (Ok(Err(error)), _) => {
                tracing::warn!(%error, "cannot remove the folders of deleted replicas; the next start tries again");
            }
            _ => {}
        }
    }
}

/// One look at the metadata.
#[derive(Debug)]
struct Look {
    applied: Offset,
    recovery: i64,
    wanted: Vec<Wanted>,
    /// Replicas here that are wanted no more.
    gone: Vec<TopicPartition>,
    /// How these end.
    ends: Ends,
}

/// What becomes of the files of a replica that is not wanted any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// Its topic was deleted, or it was moved away: so are they.
    Deleted,
    /// A metadata that went on with a loss does not know it: they are set aside.
    Unknown,
}

/// The replica whose files are here; `None` where that cannot be read: who opens them says why.
fn held(data_dir: &DataDir, tp: TopicPartition) -> Option<ReplicaId> {
    ReplicaIdentity::read(data_dir.disk(), &data_dir.replica_dir(tp)).ok().map(|identity| identity.replica)
}

/// Whether the files of replica `held` are what `wanted` is to go on with.
fn goes_on_with(entry: &PartitionEntry, wanted: ReplicaId, held: ReplicaId) -> bool {
    let from = entry.recovered().filter(|recovered| recovered.replica == wanted).map(|recovered| recovered.from);
    held == wanted || from == Some(held)
}

/// Where folders go that the metadata does not know after it went on with a loss; nothing reads them any more.
pub(crate) const SET_ASIDE: &str = "set-aside";

fn set_aside(data_dir: &DataDir, tp: TopicPartition) -> std::io::Result<()> {
    let (disk, from) = (data_dir.disk(), data_dir.replica_dir(tp));
    if !disk.exists(&from)? {
        // An install alone: others have what it pulled.
        return Ok(());
    }
    let aside = data_dir.path().join(SET_ASIDE);
    disk.create_dir_all(&aside)?;
    // One that was set aside before stays as well.
    let to = aside.join(format!("{}-{}-{:016x}", tp.topic, tp.partition, rand::random::<u64>()));
    tracing::error!(
        %tp, to = %to.display(),
        "the metadata, which was recovered with a possible loss, does not know this replica: its folder is set aside; \
         delete it once nobody misses its records"
    );
    disk.rename(&from, &to)?;
    disk.sync_dir(&aside)?;
    let Some(topic) = from.parent() else { return Ok(()) };
    // Other partitions of the topic may be there.
    match disk.remove_dir(topic) {
        Ok(()) => disk.sync_dir(topic.parent().unwrap_or(data_dir.path())),
        Err(_) => disk.sync_dir(topic),
    }
}

/// Every replica of the metadata: those that vote or leave, and those that only follow.
fn metadata_places(table: &MetadataTable) -> impl Iterator<Item = Place> {
    let voters = table.partition(METADATA_PARTITION).into_iter().flat_map(|entry| entry.places().copied());
    voters.chain(table.observers())
}

/// Opens a replica, and waits until its log is recovered.
///
/// # Errors
/// It is open already, or the shards are stopping.
pub(crate) async fn open_handle(
    shards: &Weak<Shards<PartitionMachine>>,
    spec: ReplicaSpec,
    machine: PartitionMachine,
) -> Result<Replica, Error> {
    let (sender, receiver) = oneshot::channel();
    match shards.upgrade() {
        Some(shards) => shards.open(spec, machine, Reply::from(sender)),
        None => return Err(shutting_down()),
    }
    receiver.await.map_err(|_| shutting_down())?
}

/// Closes a replica, if it is open, and waits until that is done.
pub(crate) async fn close(shards: &Weak<Shards<PartitionMachine>>, tp: TopicPartition, delete_files: bool) {
    let (sender, receiver) = oneshot::channel();
    if let Some(shards) = shards.upgrade() {
        shards.close(tp, delete_files, Reply::from(sender));
    }
    // An error means that the shards are stopping: then all are closed.
    drop(receiver.await);
}

/// Waits until a replica has found its part in its group (one that is alone leads), or until it is known what keeps it
/// from that.
pub(crate) async fn settled(replica: &Replica, has_peers: bool) -> Result<(), Error> {
    let mut status = replica.status();
    loop {
        match &status.health {
            _ if status.is_ready() => return Ok(()),
            Health::Failed { message } => return Err(Error::new(ErrorCode::StorageFailed, message.clone())),
            Health::Quarantined { message } | Health::Lost { message, .. } => {
                return Err(Error::new(ErrorCode::Quarantined, message.clone()));
            }
            Health::Ok | Health::DiskFull if has_peers && status.role != Role::Opening => return Ok(()),
            Health::Ok | Health::DiskFull => status = replica.changed(&status).await,
        }
    }
}

/// Tells whenever some replica's leadership or health changes, until aborted: the metadata says nothing of these, and
/// whoever watches it learns of them in no other way.
async fn tell_changes(mut changes: watch::Receiver<u64>, replicas: LocalReplicas) {
    while changes.changed().await.is_ok() {
        replicas.touch();
    }
}

fn shutting_down() -> Error {
    Error::new(ErrorCode::ShuttingDown, "the broker is shutting down")
}

/// Gives a replica its topic's settings, where they are others than it has.
fn bring_up(partition: &OpenPartition, config: &Arc<TopicConfig>) {
    if partition.config() != *config {
        partition.replica.reconfigure(reconfigure(config));
        partition.set_config(Arc::clone(config));
    }
}

fn reconfigure(config: &TopicConfig) -> Reconfigure {
    Reconfigure {
        log: log_config(config),
        retention: retention(config),
        flush: flush_mode(config.flush),
        max_message_bytes: config.max_message_bytes,
    }
}

fn log_config(config: &TopicConfig) -> LogConfig {
    LogConfig {
        segment_bytes: config.segment_bytes,
        segment_age: config.segment_age,
        compaction: config.compaction,
        ..LogConfig::default()
    }
}

fn retention(config: &TopicConfig) -> RetentionConfig {
    if !config.deletes {
        return RetentionConfig::default();
    }
    RetentionConfig { time: config.retention, bytes: config.retention_bytes }
}

fn flush_mode(policy: FlushPolicy) -> FlushMode {
    match policy {
        FlushPolicy::Quorum => FlushMode::Quorum,
        FlushPolicy::Relaxed => FlushMode::Relaxed,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use flowstone_protocol::{BatchHeader, BrokerId, ClusterId, Compression, RecordBatchBuilder, Timestamp};
    use flowstone_replication::{Acks, ShardsConfig};
    use flowstone_storage::SimDisk;
    use flowstone_storage::sim_disk::Operation;

    use super::*;
    use crate::cluster::control::command_to;
    use crate::cluster::duty::Duty;
    use crate::cluster::form::Founding;
    use crate::controller::commands::{
        AlterTopic, CreateTopic, MetadataCommand, MetadataReply, MetadataRules, Registration,
    };
    use crate::controller::table::{METADATA_PARTITION, Place};
    use crate::peer::{PeerBook, PeerConfig, PeerIdentity, PeerNetwork};

    /// Nothing here takes this long; what does has hung.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// A broker without its services.
    struct World {
        disk: SimDisk,
        shards: Arc<Shards<PartitionMachine>>,
        metadata: Replica,
        replicas: LocalReplicas,
        reconciler: Reconciler,
    }

    impl World {
        async fn new() -> Self {
            let disk = SimDisk::new(1);
            let path = Path::new("/data");
            let data_dir = DataDir::open_or_create(disk.shared(), path, DirectoryId::new(7), 1).expect("an empty disk");
            let data_dir = Arc::new(data_dir);
            let config = ShardsConfig { shards: 1, inline_flush_bytes_max: 0, ..ShardsConfig::default() };
            let clock = Arc::new(|| Timestamp::new(1));
            let shards = Shards::start(config, Arc::clone(&data_dir), clock, Arc::new(flowstone_replication::NoPeers))
                .expect("started");
            let shards = Arc::new(shards);
            let rules = MetadataRules {
                topics_max: 10,
                partitions_per_topic_max: 10,
                partitions_max: 10,
                batch_bytes_max: 8 << 20,
                internal_partitions: 4,
                topic_defaults: TopicOverrides::new(),
            };
            let (machine, table) = PartitionMachine::metadata(MetadataTable::new(rules));
            let spec = ReplicaSpec {
                tp: METADATA_PARTITION,
                replica: ReplicaId::new(1),
                dir: data_dir.replica_dir(METADATA_PARTITION),
                log: LogConfig::default(),
                flush: FlushMode::Quorum,
                retention: RetentionConfig::default(),
                internal: true,
                max_message_bytes: 1 << 20,
                peers: Arc::from([]),
                start: Start::alone(ReplicaId::new(1)),
            };
            let metadata = open_handle(&Arc::downgrade(&shards), spec, machine).await.expect("opened");
            settled(&metadata, false).await.expect("it leads");
            let voter = Place { broker: BrokerId::new(1), directory: data_dir.id(), replica: ReplicaId::new(1) };
            let broker = Registration {
                id: BrokerId::new(1),
                directory: data_dir.id(),
                client_address: "127.0.0.1:1".to_owned(),
                peer_address: "127.0.0.1:2".to_owned(),
                rack: String::new(),
                version: String::new(),
                incarnation: 1,
                feature_level: crate::controller::table::FEATURE_LEVEL,
                seed: 1,
            };
            let found = MetadataCommand::Found { cluster: ClusterId::new(3), voters: vec![voter], feature_level: 1 };
            for command in [found, MetadataCommand::RegisterBroker(broker)] {
                command_to(&metadata, command).await.expect("done");
            }
            let replicas = LocalReplicas::default();
            let reconciler = Reconciler::new(&shards, data_dir, table, replicas.clone(), TopicOverrides::new());
            World { disk, shards, metadata, replicas, reconciler }
        }

        async fn create(&self, name: &str) -> Arc<Topic> {
            let command = CreateTopic {
                name: name.to_owned(),
                partitions: 1,
                replication_factor: 1,
                configs: Vec::new(),
                topic_id: TopicId::new(11),
                seed: 0,
                validate_only: false,
            };
            self.topic(MetadataCommand::CreateTopic(command)).await
        }

        async fn alter(&self, name: &str, key: &str, value: &str) -> Arc<Topic> {
            let command = AlterTopic {
                name: name.to_owned(),
                set: vec![(key.to_owned(), value.to_owned())],
                unset: Vec::new(),
                partitions: 0,
                seed: 0,
                validate_only: false,
            };
            self.topic(MetadataCommand::AlterTopic(command)).await
        }

        async fn topic(&self, command: MetadataCommand) -> Arc<Topic> {
            match command_to(&self.metadata, command).await.expect("done") {
                MetadataReply::Topic(topic) => topic,
                other => panic!("{other:?}"),
            }
        }

        fn open(&self, topic: &Topic) -> Arc<OpenPartition> {
            let tp = TopicPartition { topic: topic.id, partition: flowstone_protocol::PartitionId::new(0) };
            match self.replicas.get(tp) {
                Some(Slot::Open(partition)) => partition,
                other => panic!("{other:?}"),
            }
        }
    }

    async fn produce(partition: &OpenPartition) -> Result<(), Error> {
        let mut batch = RecordBatchBuilder::new(Compression::None);
        batch.append(Timestamp::new(1), None, Some(b"x"), []).expect("fits");
        let batch = batch.build();
        let header = BatchHeader::parse(&batch).expect("built here");
        let permit = partition.replica.reserve(batch.len()).await;
        let (sender, receiver) = oneshot::channel();
        partition.replica.produce(batch, header, Acks::Quorum, permit, Reply::from(sender));
        receiver.await.expect("answered").map(|_| ())
    }

    #[tokio::test]
    async fn what_is_altered_while_a_replica_opens_holds_once_it_is_open() {
        let mut world = World::new().await;
        let before = world.create("orders").await;
        let after = world.alter("orders", "flowstone.flush", "relaxed").await;
        assert_ne!(before.overrides, after.overrides);
        // The opening began with the settings of before, and the metadata's change was looked at while it ran.
        let config = TopicConfig::resolve(&TopicOverrides::new(), &before.overrides).expect("valid");
        let Wanted { replicas, .. } = world.reconciler.wanted(&before);
        let tp = replicas[0].tp;
        let shards = Arc::clone(&world.shards);
        world.reconciler.open(&shards, &before, &replicas[0], config.into(), None);
        world.reconciler.pass();
        assert!(matches!(world.replicas.get(tp), Some(Slot::Opening)));
        tokio::time::timeout(PATIENCE, world.reconciler.catch_up()).await.expect("in time");
        let wanted = TopicConfig::resolve(&TopicOverrides::new(), &after.overrides).expect("valid");
        assert_eq!(*world.open(&after).config(), wanted);
    }

    #[tokio::test]
    async fn a_topic_deleted_as_its_replica_has_just_opened_leaves_nothing() {
        let mut world = World::new().await;
        let topic = world.create("orders").await;
        let tp = TopicPartition { topic: topic.id, partition: flowstone_protocol::PartitionId::new(0) };
        world.reconciler.pass();
        // The opening has ended, and nobody has looked at that yet.
        let opened = world.reconciler.openings.join_next_with_id();
        let opened = tokio::time::timeout(PATIENCE, opened).await.expect("in time").expect("one");
        let delete = MetadataCommand::DeleteTopic { name: "orders".to_owned() };
        command_to(&world.metadata, delete).await.expect("done");
        world.reconciler.pass();
        world.reconciler.on_opened(opened);
        assert!(world.replicas.get(tp).is_none(), "{:?}", world.replicas.get(tp));
    }

    #[tokio::test]
    async fn files_of_a_replica_that_could_not_be_opened_go_with_its_topic() {
        let mut world = World::new().await;
        let topic = world.create("orders").await;
        let tp = TopicPartition { topic: topic.id, partition: flowstone_protocol::PartitionId::new(0) };
        tokio::time::timeout(PATIENCE, world.reconciler.catch_up()).await.expect("in time");
        // As after an opening that failed: the shard knows nothing of it.
        close(&Arc::downgrade(&world.shards), tp, false).await;
        world.replicas.set(tp, Slot::Failed(Box::new(Error::new(ErrorCode::StorageFailed, "a sick disk"))));
        let (disk, dir) = (world.disk.shared(), world.reconciler.data_dir.replica_dir(tp));
        assert!(disk.exists(&dir).expect("looked up"));
        let delete = MetadataCommand::DeleteTopic { name: "orders".to_owned() };
        command_to(&world.metadata, delete).await.expect("done");
        world.reconciler.pass();
        let cleared = world.reconciler.clearings.join_next_with_id();
        let cleared = tokio::time::timeout(PATIENCE, cleared).await.expect("in time").expect("one");
        world.reconciler.on_cleared(cleared);
        assert!(!disk.exists(&dir).expect("looked up"));
        assert!(world.reconciler.clearing.is_empty());
    }

    #[tokio::test]
    async fn another_replica_of_the_metadata_is_tried_until_its_disk_takes_it() {
        let mut world = World::new().await;
        let data_dir = Arc::clone(&world.reconciler.data_dir);
        let me = BrokerId::new(1);
        let identity = PeerIdentity { broker: me, directory: data_dir.id(), incarnation: 1, cluster: None };
        let limits = crate::config::Config::dev(Path::new("/data"), 0).limits;
        let runtime = tokio::runtime::Handle::current();
        let network = PeerNetwork::start(PeerConfig::new(&limits), identity, PeerBook::new(), runtime);
        let (recover, recoveries) = mpsc::channel(1);
        let duty = Duty::new(Duration::from_secs(6));
        let metadata = (ReplicaId::new(1), world.metadata.clone());
        let control = Control::new(me, metadata, world.reconciler.table.clone(), duty, &network, recover);
        let founding = Founding { cluster: ClusterId::new(3), voters: Vec::new(), feature_level: 1 };
        let belonging = Belonging {
            founding,
            metadata_replica: Some(ReplicaId::new(1)),
            recovered_from: None,
            brokers: Vec::new(),
            settled_recovery: 0,
        };
        let kept = Kept::new(Arc::clone(&data_dir), belonging);
        let (wanted, wants) = watch::channel(ReplicaId::new(1));
        let config = TopicConfig::resolve(&TopicOverrides::new(), &TopicOverrides::new()).expect("defaults");
        let key = (METADATA_PARTITION, ReplicaId::new(1));
        let earlier = OpenPartition::new(key, "metadata", true, world.metadata.clone(), Arc::from([]), config);
        let succession = Succession { wanted: wants, control, data_dir, kept: Arc::clone(&kept) };
        world.reconciler.adopt(&Arc::new(earlier), succession, recoveries);
        let World { disk, shards, metadata: _metadata, replicas, reconciler } = world;
        // The first note of it fails.
        disk.fail(Operation::Create, 0);
        let running = tokio::spawn(reconciler.run());
        wanted.send_replace(ReplicaId::new(2));
        let mut changes = replicas.changes();
        let taken = async {
            loop {
                match replicas.get(METADATA_PARTITION) {
                    Some(Slot::Open(partition)) if partition.replica_id == ReplicaId::new(2) => return,
                    _ => changes.changed().await.expect("it runs"),
                }
            }
        };
        tokio::time::timeout(PATIENCE, taken).await.expect("it is tried again");
        assert_eq!(
            kept.get(|belonging| belonging.metadata_replica),
            Some(ReplicaId::new(2)),
            "a start goes on with it"
        );
        running.abort();
        drop(running.await);
        drop((shards, network));
    }

    #[tokio::test]
    async fn who_watches_is_told_when_a_replica_leads_again() {
        let mut world = World::new().await;
        let topic = world.create("orders").await;
        tokio::time::timeout(PATIENCE, world.reconciler.catch_up()).await.expect("in time");
        let partition = world.open(&topic);
        produce(&partition).await.expect("stored");
        let World { disk, shards, metadata: _metadata, replicas, reconciler } = world;
        let running = tokio::spawn(reconciler.run());
        let mut changes = replicas.changes();
        disk.fail(Operation::Sync, 0);
        let error = produce(&partition).await.expect_err("the flush fails");
        assert_eq!(error.code, ErrorCode::StorageFailed, "{error:?}");
        let told = tokio::time::timeout(PATIENCE, async {
            loop {
                changes.changed().await.expect("it runs");
                if partition.replica.status().is_ready() {
                    return;
                }
            }
        });
        told.await.expect("told that it leads again");
        // Its leader epoch was told as well: it is a new one.
        produce(&partition).await.expect("stored");
        running.abort();
        drop(running.await);
        drop(shards);
    }
}
