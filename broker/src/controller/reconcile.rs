//! Makes this broker's replicas what the committed metadata says: opens, reconfigures, closes and deletes.
//!
//! The metadata alone decides which replicas exist, never a request and never a folder that is found: a replica's id is
//! in the record that made it, together with the data directory that may hold it.

use std::collections::HashSet;
use std::sync::{Arc, Weak};

use flowstone_protocol::{DirectoryId, Error, ErrorCode, Offset, PartitionId, ReplicaId, TopicId, TopicPartition};
use flowstone_replication::{FlushMode, Health, LogConfig, Reconfigure, ReplicaSpec, Reply, RetentionConfig, Shards};
use flowstone_storage::DataDir;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::table::{METADATA_TOPIC_ID, MetadataTable, Topic};
use crate::coordinator::Published;
use crate::partition::{LocalReplicas, OpenPartition, PartitionMachine, Replica, Slot};
use crate::topic_config::{FlushPolicy, TopicConfig, TopicOverrides};

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
    /// Metadata up to here is done; `None` before the first pass.
    done: Option<Offset>,
    /// Openings under way; each ends with its slot filled.
    openings: JoinSet<()>,
}

/// What the metadata wants of this broker.
#[derive(Debug)]
struct Wanted {
    topic: Arc<Topic>,
    replicas: Vec<(TopicPartition, ReplicaId)>,
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
        let openings = JoinSet::new();
        Self {
            shards: Arc::downgrade(shards),
            data_dir,
            table,
            replicas,
            directory,
            topic_defaults,
            done: None,
            openings,
        }
    }

    /// The first pass, and its openings: returns when every local replica is open or has said why not.
    pub(crate) async fn catch_up(&mut self) {
        self.remove_strangers().await;
        self.pass().await;
        while self.openings.join_next().await.is_some() {}
    }

    /// Follows the metadata until aborted.
    pub(crate) async fn run(mut self) {
        let mut changes = self.table.changes();
        loop {
            changes.borrow_and_update();
            self.pass().await;
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                // Only taken off the list: each fills its own slot.
                Some(_) = self.openings.join_next() => {}
            }
        }
    }

    /// One look at what changed since the last.
    async fn pass(&mut self) {
        let (applied, wanted, gone) = self.look();
        let Some(shards) = self.shards.upgrade() else { return };
        for tp in gone {
            self.delete(&shards, tp);
        }
        for wanted in wanted {
            self.make_so(&shards, &wanted);
        }
        self.done = Some(applied);
    }

    /// What is wanted of the topics that changed, and replicas here whose topic is gone.
    fn look(&self) -> (Offset, Vec<Wanted>, Vec<TopicPartition>) {
        let since = self.done.unwrap_or(Offset::new(-1));
        let here = |topic: &Arc<Topic>| {
            let replicas = topic.partitions.iter().enumerate().filter_map(|(partition, places)| {
                let place = places.iter().find(|place| place.directory == self.directory)?;
                let partition = PartitionId::new(partition as i32);
                Some((TopicPartition { topic: topic.id, partition }, place.replica))
            });
            Wanted { topic: Arc::clone(topic), replicas: replicas.collect() }
        };
        self.table.with(|table| {
            let changed = table
                .topics()
                // The metadata's own replica is opened before there is any metadata.
                .filter(|topic| topic.id != METADATA_TOPIC_ID)
                .filter(|topic| self.done.is_none() || topic.changed_at > since);
            let wanted = changed.map(here).collect();
            let open = self.replicas.all();
            let gone: Box<dyn Fn(TopicId) -> bool> = match table.deleted_since(since) {
                Some(deleted) => {
                    let deleted: HashSet<TopicId> = deleted.into_iter().collect();
                    Box::new(move |topic| deleted.contains(&topic))
                }
                None => Box::new(|topic| table.topic(topic).is_none()),
            };
            let gone = open.into_iter().map(|(tp, _)| tp).filter(|tp| gone(tp.topic)).collect();
            (table.applied(), wanted, gone)
        })
    }

    fn make_so(&mut self, shards: &Arc<Shards<PartitionMachine>>, wanted: &Wanted) {
        let topic = &wanted.topic;
        let config = TopicConfig::resolve(&self.topic_defaults, &topic.overrides);
        for (tp, replica) in &wanted.replicas {
            let config = match &config {
                Ok(config) => config,
                // Defaults of this broker that contradict what the topic was given.
                Err(error) => {
                    let error = Error::clone(error).with_topic(topic.name.as_str()).with_partition(tp.partition);
                    self.replicas.set(*tp, Slot::Refused(error));
                    continue;
                }
            };
            match self.replicas.get(*tp) {
                Some(Slot::Open(partition)) => {
                    if *partition.config() != *config {
                        partition.replica.reconfigure(reconfigure(config));
                        partition.set_config(config.clone());
                    }
                }
                // Its opening looks at the settings of this moment; a change in between comes with the next pass.
                Some(Slot::Opening) | Some(Slot::Failed(_)) => {}
                None | Some(Slot::Refused(_)) => self.open(shards, topic, *tp, *replica, config.clone()),
            }
        }
    }

    fn open(
        &mut self,
        shards: &Arc<Shards<PartitionMachine>>,
        topic: &Arc<Topic>,
        tp: TopicPartition,
        replica: ReplicaId,
        config: TopicConfig,
    ) {
        self.replicas.set(tp, Slot::Opening);
        let spec = ReplicaSpec {
            tp,
            replica,
            dir: self.data_dir.replica_dir(tp),
            log: log_config(&config),
            flush: flush_mode(config.flush),
            retention: retention(&config),
            internal: topic.internal,
            max_message_bytes: config.max_message_bytes,
        };
        let opened = open_replica(shards, spec, PartitionMachine::records());
        let (replicas, topic) = (self.replicas.clone(), Arc::clone(topic));
        self.openings.spawn(async move {
            let slot = match opened.await {
                Ok(replica) => {
                    let partition = OpenPartition::new(tp, &topic.name, topic.internal, replica, config);
                    Slot::Open(Arc::new(partition))
                }
                Err(error) => {
                    tracing::error!(topic = topic.name, partition = tp.partition.get(), %error, "cannot open a replica");
                    Slot::Failed(error.with_topic(topic.name.as_str()).with_partition(tp.partition))
                }
            };
            // Deleted meanwhile: the slot is gone, and so is the replica.
            replicas.fill(tp, slot);
        });
    }

    fn delete(&mut self, shards: &Arc<Shards<PartitionMachine>>, tp: TopicPartition) {
        if self.replicas.remove(tp).is_none() {
            return;
        }
        let data_dir = Arc::clone(&self.data_dir);
        shards.close(
            tp,
            true,
            Reply::new(move |()| tracing::debug!(%tp, dir = %data_dir.path().display(), "a replica was deleted")),
        );
    }

    /// Folders of replicas that the metadata does not name: left by a crash in the middle of a deletion.
    async fn remove_strangers(&self) {
        let known: HashSet<TopicPartition> = self.table.with(|table| {
            let partitions = |topic: &Arc<Topic>| {
                let id = topic.id;
                (0..topic.partitions.len())
                    .map(move |partition| TopicPartition { topic: id, partition: PartitionId::new(partition as i32) })
            };
            table.topics().flat_map(partitions).collect()
        });
        let data_dir = Arc::clone(&self.data_dir);
        let removed = tokio::task::spawn_blocking(move || {
            for tp in data_dir.replicas()?.into_iter().filter(|tp| !known.contains(tp)) {
                tracing::info!(%tp, "removing the folder of a replica that was deleted");
                data_dir.remove_replica(tp)?;
            }
            Ok::<(), flowstone_storage::DataDirError>(())
        });
        if let Ok(Err(error)) = removed.await {
            tracing::warn!(%error, "cannot remove the folders of deleted replicas; the next start tries again");
        }
    }
}

/// Opens a replica and waits until it leads, or until it is known that it cannot.
pub(crate) fn open_replica(
    shards: &Shards<PartitionMachine>,
    spec: ReplicaSpec,
    machine: PartitionMachine,
) -> impl Future<Output = Result<Replica, Error>> + Send + use<> {
    let (sender, receiver) = oneshot::channel();
    shards.open(spec, machine, Reply::from(sender));
    async move {
        let stopped = |_| Error::new(ErrorCode::ShuttingDown, "the broker is shutting down");
        let replica: Replica = receiver.await.map_err(stopped)??;
        loop {
            match replica.ready().await {
                Ok(()) => return Ok(replica),
                Err(error) => match replica.status().health {
                    Health::Quarantined { .. } => return Err(error),
                    // Opened anew by itself; the next call waits for that.
                    _ => tracing::warn!(%error, "a replica is not ready yet"),
                },
            }
        }
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
    LogConfig { segment_bytes: config.segment_bytes, segment_age: config.segment_age, ..LogConfig::default() }
}

fn retention(config: &TopicConfig) -> RetentionConfig {
    RetentionConfig { time: config.retention, bytes: config.retention_bytes }
}

fn flush_mode(policy: FlushPolicy) -> FlushMode {
    match policy {
        FlushPolicy::Quorum => FlushMode::Quorum,
        FlushPolicy::Relaxed => FlushMode::Relaxed,
    }
}
