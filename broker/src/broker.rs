//! One broker: what starts it and what stops it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowstone_protocol::{BrokerId, ClusterId, DirectoryId, Error, ReplicaId};
use flowstone_replication::{
    FlushMode, LogConfig, ReplicaSpec, RetentionConfig, Shards, ShardsConfig, StartError as ShardsError, system_clock,
};
use flowstone_storage::{DataDir, Disk, RealDisk};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::admin_http::{self, Readiness};
use crate::config::{Config, ConfigError, split_address};
use crate::connections::Connections;
use crate::controller::commands::{MetadataCommand, MetadataRules};
use crate::controller::reconcile::{Reconciler, open_replica};
use crate::controller::table::{BrokerEntry, METADATA_PARTITION, METADATA_TOPIC, MetadataTable, Place};
use crate::metrics::{BrokerCollector, Metrics};
use crate::node::{Node, command_to};
use crate::partition::{LocalReplicas, OpenPartition, PartitionMachine, Slot};
use crate::room::Room;
use crate::server;
use crate::service::REQUEST_BYTES_MIN;
use crate::topic_config::{TopicConfig, TopicOverrides};

/// Hard state files of a new data directory. Fixed when it is made; a few, so that they flush side by side.
const STRIPES: u32 = 8;
/// Largest batch of metadata records: a topic of very many partitions is one record.
const METADATA_BATCH_BYTES_MAX: usize = 64 << 20;
/// The metadata's log; what is older is in its checkpoints.
const METADATA_LOG_BYTES: u64 = 128 << 20;
/// Size at which a segment of it is closed.
const METADATA_SEGMENT_BYTES: u64 = 64 << 20;
/// Requests other than batches that may wait in one shard's inbox.
const OTHER_REQUESTS_MAX: usize = 1 << 16;
/// Reads that may wait at the end of one log: for every call that there may be.
const PARKED_READS_MAX: usize = 1 << 16;
/// Time that connections are given to end after they were cut.
const CUT_MAX: Duration = Duration::from_secs(2);

/// Starts brokers.
#[derive(Debug)]
pub struct Broker;

/// Why a broker did not start. Each says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A listener cannot be bound.
    #[error("cannot listen on listen.{listener} = `{address}`: {source}; {remedy}")]
    Bind {
        /// `client` or `admin`.
        listener: &'static str,
        /// As configured.
        address: String,
        /// The system's reason.
        source: std::io::Error,
        /// What to do.
        remedy: String,
    },
    /// The data directory cannot be used: locked, not writable, of a newer format, damaged.
    #[error("cannot use the data directory {}: {reason}", path.display())]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// The metadata's log cannot be opened or led, or refuses this broker.
    #[error("cannot open the cluster metadata: {0}")]
    Metadata(Error),
    /// The system refused a thread or another resource.
    #[error("cannot start: {0}")]
    System(String),
}

/// A broker that serves. Dropping it stops it at once: what is under way is cut off, nothing acknowledged is lost.
#[derive(Debug)]
pub struct RunningBroker {
    /// Where clients connect.
    pub client_addr: SocketAddr,
    /// Where probes and metrics are served.
    pub admin_addr: SocketAddr,
    /// This broker.
    pub broker_id: BrokerId,
    /// The cluster that it is part of.
    pub cluster_id: ClusterId,
    readiness: Readiness,
    failed: watch::Receiver<Option<String>>,
    drain: watch::Sender<bool>,
    cut: watch::Sender<bool>,
    stop_admin: watch::Sender<bool>,
    serving: JoinHandle<()>,
    admin: JoinHandle<()>,
    /// What goes on beside requests, until aborted.
    background: Vec<JoinHandle<()>>,
    /// The only strong hold on the shards.
    shards: Option<Arc<Shards<PartitionMachine>>>,
}

/// What a shutdown left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Every call ended by itself before the deadline.
    pub drained: bool,
    /// Time that it took.
    pub took: Duration,
}

impl Broker {
    /// Starts a broker on the current tokio runtime and returns once it is ready: listeners accept, metadata is caught
    /// up, local replicas are recovered.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub async fn start(config: Config) -> Result<RunningBroker, StartError> {
        config.check()?;
        let started = Instant::now();
        raise_open_files(config.limits.open_files);

        let client = bind("client", &config.listen.client).await?;
        let admin = bind("admin", &config.listen.admin).await?;
        let local = |listener: &TcpListener| {
            listener.local_addr().map_err(|error| StartError::System(format!("a listener has no address: {error}")))
        };
        let (client_addr, admin_addr) = (local(&client)?, local(&admin)?);
        let client_address = advertised(&config.advertise.client, &config.listen.client, client_addr);
        let peer_address = if config.advertise.peer.is_empty() { &config.listen.peer } else { &config.advertise.peer };

        let metrics = Arc::new(Metrics::new());
        let replicas = LocalReplicas::default();
        let readiness = Readiness::new(replicas.clone());
        readiness.hold("metadata", "the broker is starting");
        let (stop_admin, admin_stops) = watch::channel(false);
        let (fail, failed) = watch::channel(None);
        let admin = spawn_admin(admin, readiness.clone(), Arc::clone(&metrics), admin_stops, fail.clone());

        let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
        let data_dir = open_data_dir(Arc::clone(&disk), config.node.data_dir.clone()).await?;
        let cluster = data_dir.cluster().unwrap_or_default();
        let shards = start_shards(&config, Arc::clone(&data_dir)).await?;

        let rules = MetadataRules {
            topics_max: config.limits.topics,
            partitions_per_topic_max: config.limits.partitions_per_topic,
            partitions_max: config.limits.partitions,
            batch_bytes_max: config.batch_bytes_max(),
            topic_defaults: config.topic.clone(),
        };
        let (machine, table) = PartitionMachine::metadata(MetadataTable::new(rules));
        let voter =
            Place { broker: config.node.id, directory: data_dir.id(), replica: founding_replica(data_dir.id()) };
        let metadata = open_replica(&shards, metadata_spec(&data_dir, voter.replica), machine)
            .await
            .map_err(StartError::Metadata)?;
        let found = MetadataCommand::Found { cluster, voters: vec![voter] };
        let register = MetadataCommand::RegisterBroker(BrokerEntry {
            id: config.node.id,
            directory: data_dir.id(),
            client_address,
            peer_address: peer_address.clone(),
            rack: config.node.rack.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        });
        for command in [found, register] {
            command_to(&metadata, command).await.map_err(StartError::Metadata)?;
        }
        let founded = table.with(|table| table.founding().map(|founding| founding.cluster));
        if founded != Some(cluster) {
            return Err(StartError::DataDir {
                path: config.node.data_dir.clone(),
                reason: format!(
                    "its manifest names cluster {cluster}, its metadata another ({founded:?}): files of two directories \
                     were mixed; restore one of them whole"
                ),
            });
        }

        readiness.hold("replicas", "local replicas are being recovered");
        readiness.release("metadata");
        let own = TopicConfig::resolve(&TopicOverrides::new(), &TopicOverrides::new()).map_err(StartError::Metadata)?;
        let own = OpenPartition::new(METADATA_PARTITION, METADATA_TOPIC, true, metadata.clone(), own);
        replicas.set(METADATA_PARTITION, Slot::Open(Arc::new(own)));
        let mut reconciler =
            Reconciler::new(&shards, Arc::clone(&data_dir), table.clone(), replicas.clone(), config.topic.clone());
        reconciler.catch_up().await;

        let room = Room::new(config.storage.free_bytes_min);
        metrics.watch(BrokerCollector {
            shards: Arc::downgrade(&shards),
            in_flight_bytes_max: config.storage.in_flight_bytes_max,
            replicas: replicas.clone(),
            table: table.clone(),
            room: room.clone(),
            partitions_max: config.limits.metrics_partitions,
            started,
        });
        let (drain, drains) = watch::channel(false);
        let (cut, cuts) = watch::channel(false);
        let background =
            vec![tokio::spawn(reconciler.run()), tokio::spawn(room.clone().watch(disk, config.node.data_dir.clone()))];
        let broker_id = config.node.id;
        let connections = Connections::new(config.limits.clone(), Arc::clone(&metrics));
        let node = Arc::new(Node {
            id: broker_id,
            cluster,
            table,
            metadata,
            replicas,
            drain: drains.clone(),
            metrics,
            room,
            checks: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from))),
            ready_since: Instant::now(),
            config,
        });
        let serving = tokio::spawn(async move {
            if let Err(error) = server::serve(node, client, connections, drains, cuts).await {
                fail.send_replace(Some(format!("the client listener has ended: {error}")));
            }
        });
        readiness.release("replicas");
        tracing::info!(%client_addr, %admin_addr, %cluster, took = ?started.elapsed(), "the broker is ready");
        Ok(RunningBroker {
            client_addr,
            admin_addr,
            broker_id,
            cluster_id: cluster,
            readiness,
            failed,
            drain,
            cut,
            stop_admin,
            serving,
            admin,
            background,
            shards: Some(shards),
        })
    }
}

impl RunningBroker {
    /// Waits until the broker can no longer do its work by itself, and says why; pends for ever while it can.
    pub async fn wait(&self) -> String {
        let mut failed = self.failed.clone();
        loop {
            if let Some(reason) = failed.borrow_and_update().clone() {
                return reason;
            }
            if failed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Stops: takes no new work, answers what is under way, flushes, closes. Calls that have not ended by `deadline` are
    /// cut off; producers then send again what was not acknowledged.
    pub async fn shutdown(mut self, deadline: Duration) -> ShutdownReport {
        let began = Instant::now();
        self.readiness.hold("shutdown", "the broker is draining");
        self.drain.send_replace(true);
        let drained = tokio::time::timeout(deadline, &mut self.serving).await.is_ok();
        if !drained {
            tracing::warn!(?deadline, "calls are still open after the deadline: they are cut off");
            self.cut.send_replace(true);
            if tokio::time::timeout(CUT_MAX, &mut self.serving).await.is_err() {
                self.serving.abort();
            }
        }
        for task in self.background.drain(..) {
            task.abort();
            // Aborted: that is the error.
            drop(task.await);
        }
        if let Some(shards) = self.shards.take() {
            // Joins threads that still flush: not on the runtime's thread.
            drop(tokio::task::spawn_blocking(move || drop(shards)).await);
        }
        self.stop_admin.send_replace(true);
        // A scraper that holds its connection does not hold up the end.
        drop(tokio::time::timeout(CUT_MAX, &mut self.admin).await);
        let report = ShutdownReport { drained, took: began.elapsed() };
        tracing::info!(drained, took = ?report.took, "the broker has stopped");
        report
    }
}

impl Drop for RunningBroker {
    fn drop(&mut self) {
        self.drain.send_replace(true);
        self.cut.send_replace(true);
        self.stop_admin.send_replace(true);
        for task in self.background.drain(..) {
            task.abort();
        }
        self.serving.abort();
        self.admin.abort();
    }
}

async fn bind(listener: &'static str, address: &str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| {
        let remedy = match source.kind() {
            std::io::ErrorKind::AddrInUse => {
                format!("another process has this port: stop it, or set listen.{listener} to another one")
            }
            std::io::ErrorKind::PermissionDenied => {
                format!("ports below 1024 need privileges: set listen.{listener} to a higher one")
            }
            _ => format!("set listen.{listener} to an address of this machine"),
        };
        StartError::Bind { listener, address: address.to_owned(), source, remedy }
    })
}

/// What others are told: as configured, else as listened on, with the port that was really bound.
fn advertised(advertise: &str, listen: &str, bound: SocketAddr) -> String {
    if !advertise.is_empty() {
        return advertise.to_owned();
    }
    match split_address(listen) {
        // A name stays a name.
        Ok((host, _)) if host.parse::<std::net::IpAddr>().is_err() => format!("{host}:{}", bound.port()),
        _ => bound.to_string(),
    }
}

fn spawn_admin(
    listener: TcpListener,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    stop: watch::Receiver<bool>,
    fail: watch::Sender<Option<String>>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        if let Err(error) = admin_http::serve(listener, readiness, metrics, stop).await {
            fail.send_replace(Some(format!("the admin listener has ended: {error}")));
        }
    })
}

/// Opens or makes the directory; a new one is given its cluster at once, before anything is founded, so that a start that
/// is cut off in the middle goes on with the same one.
async fn open_data_dir(disk: Arc<dyn Disk>, path: PathBuf) -> Result<Arc<DataDir>, StartError> {
    let opening = tokio::task::spawn_blocking(move || {
        let refused = |reason: String| StartError::DataDir { path: path.clone(), reason };
        let new_id = DirectoryId::new(uuid::Uuid::new_v4().as_u128());
        let mut data_dir =
            DataDir::open_or_create(disk, &path, new_id, STRIPES).map_err(|error| refused(error.to_string()))?;
        if data_dir.cluster().is_none() {
            let cluster = ClusterId::new(uuid::Uuid::new_v4().as_u128());
            data_dir.set_cluster(cluster).map_err(|error| refused(error.to_string()))?;
        }
        Ok(Arc::new(data_dir))
    });
    opening.await.map_err(|error| StartError::System(error.to_string()))?
}

async fn start_shards(config: &Config, data_dir: Arc<DataDir>) -> Result<Arc<Shards<PartitionMachine>>, StartError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let shards = match config.storage.shards {
        // The other half is for the sockets.
        0 => (cores / 2).max(1),
        shards => shards,
    };
    let in_flight_bytes_max = (config.storage.in_flight_bytes_max / shards).max(1);
    let shards_config = ShardsConfig {
        shards,
        flush_threads: config.storage.flush_threads,
        read_threads: config.storage.read_threads,
        inbox_bytes_max: in_flight_bytes_max,
        parked_reads_max: PARKED_READS_MAX,
        // As many as there is room for: a producer of small batches waits for room, it is not refused.
        inbox_requests_max: in_flight_bytes_max / REQUEST_BYTES_MIN + OTHER_REQUESTS_MAX,
        seed: rand::random(),
        ..ShardsConfig::default()
    };
    let path = config.node.data_dir.clone();
    let starting =
        tokio::task::spawn_blocking(move || Shards::start(shards_config, data_dir, system_clock()).map(Arc::new));
    match starting.await {
        Ok(Ok(shards)) => Ok(shards),
        Ok(Err(error @ ShardsError::HardState(_))) => Err(StartError::DataDir { path, reason: error.to_string() }),
        Ok(Err(error)) => Err(StartError::System(error.to_string())),
        Err(error) => Err(StartError::System(error.to_string())),
    }
}

/// The id of the replica that a directory founds a cluster's metadata with. Random, as the directory's id is, and a
/// directory founds once: so a start that is cut off at any point goes on with the same one.
fn founding_replica(directory: DirectoryId) -> ReplicaId {
    ReplicaId::new(((directory.get() >> 64) as u64 ^ directory.get() as u64).max(1))
}

fn metadata_spec(data_dir: &DataDir, replica: ReplicaId) -> ReplicaSpec {
    ReplicaSpec {
        tp: METADATA_PARTITION,
        replica,
        dir: data_dir.replica_dir(METADATA_PARTITION),
        log: LogConfig { segment_bytes: METADATA_SEGMENT_BYTES, ..LogConfig::default() },
        flush: FlushMode::Quorum,
        retention: RetentionConfig { time: None, bytes: Some(METADATA_LOG_BYTES) },
        internal: true,
        max_message_bytes: METADATA_BATCH_BYTES_MAX,
    }
}

/// As many open files as the system gives, up to `wanted`.
fn raise_open_files(wanted: u64) {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    let Some(current) = limit.current else { return };
    let target = wanted.min(hard).max(current);
    if target > current {
        let raised = Rlimit { current: Some(target), maximum: limit.maximum };
        match setrlimit(Resource::Nofile, raised) {
            Ok(()) => tracing::debug!(from = current, to = target, "raised the limit on open files"),
            Err(error) => tracing::warn!(%error, current, "cannot raise the limit on open files (ulimit -n)"),
        }
    }
}
