//! One broker: what starts it and what stops it.
//!
//! ```text
//!   listeners bound: clients are told to come again, peers are answered who is here
//!     -> the cluster is found, or founded           (cluster::join)
//!     -> the metadata's replica is opened           a founder's at once, another's once it is registered
//!     -> registered, and the registration is read back from the metadata: it is caught up
//!     -> replicas are opened                        none before: two that came back must not elect each other
//!     -> clients are served
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use flowstone_protocol::peer::{BrokerHeartbeatRequest, HelloRequest, RegisterRequest, RegisterResponse};
use flowstone_protocol::{BrokerId, ClusterId, DirectoryId, Error, ReplicaId};
use flowstone_replication::{
    Health, PeerTransport, Role, Shards, ShardsConfig, Start, StartError as ShardsError, system_clock,
};
use flowstone_storage::{DataDir, Disk, RealDisk};
use futures::StreamExt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::admin_http::{self, Readiness};
use crate::cluster::belonging::{Belonging, Kept};
use crate::cluster::calls::Calls;
use crate::cluster::control::Control;
use crate::cluster::drive::{self, Driver, Led};
use crate::cluster::duty::{self, Duty};
use crate::cluster::form::{Founder, Founding, Me, founder_of};
use crate::cluster::recovery::MetadataRecovery;
use crate::cluster::session::Door;
use crate::cluster::{book, join, session};
use crate::config::{Config, ConfigError, split_address};
use crate::connections::Connections;
use crate::controller::commands::MetadataRules;
use crate::controller::reconcile::{Reconciler, SET_ASIDE, Succession, close, metadata_spec, open_handle, settled};
use crate::controller::table::{FEATURE_LEVEL, METADATA_PARTITION, METADATA_TOPIC, MetadataTable};
use crate::coordinator::Published;
use crate::group;
use crate::group::driver::GroupCoordinators;
use crate::group::state::GroupRules;
use crate::metrics::{BrokerCollector, Metrics};
use crate::node::Node;
use crate::partition::{LocalReplicas, MachineRules, OpenPartition, PartitionMachine, Peers, Replica, Slot};
use crate::peer::{PeerBook, PeerConfig, PeerIdentity, PeerNetwork};
use crate::room::Room;
use crate::server::{self, Gate};
use crate::service::REQUEST_BYTES_MIN;
use crate::topic_config::{TopicConfig, TopicOverrides};
use crate::transaction;
use crate::transaction::driver::Transactions;
use crate::transaction::state::TransactionRules;

/// Hard state files of a new data directory. Fixed when it is made; a few, so that they flush side by side.
const STRIPES: u32 = 8;
/// Requests other than batches that may wait in one shard's inbox.
const OTHER_REQUESTS_MAX: usize = 1 << 16;
/// Reads that may wait at the end of one log: for every call that there may be.
const PARKED_READS_MAX: usize = 1 << 16;
/// Time that connections are given to end after they were cut.
const CUT_MAX: Duration = Duration::from_secs(2);
/// A seed that takes longer to say who it is has not answered.
const HELLO_MAX: Duration = Duration::from_secs(2);
/// Between two words about a lost replica of the metadata.
const TELL_EVERY: Duration = Duration::from_millis(200);
/// Sessions of a broker of this id that must have been given up before a refused registration is final.
const REGISTRATION_SESSIONS: u32 = 3;
/// Leaderships that are handed over side by side when the broker stops.
const HANDED_OVER_AT_ONCE: usize = 64;
/// Time that handing over takes at most, of the deadline that a stop is given: what is left is for answers and flushes.
const HAND_OVER_MAX: Duration = Duration::from_secs(4);

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
        /// `client`, `peer` or `admin`.
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
    /// This broker cannot be part of the cluster as it is configured.
    #[error("cannot be part of the cluster: {0}")]
    Cluster(String),
    /// The metadata's log cannot be opened or led, or refuses this broker.
    #[error("cannot open the cluster metadata: {0}")]
    Metadata(Error),
    /// The system refused a thread or another resource.
    #[error("cannot start: {0}")]
    System(String),
}

/// The sockets of a broker, bound before it starts: with port 0 others can be told the addresses that the system chose.
#[derive(Debug)]
pub struct Listeners {
    client: TcpListener,
    peer: TcpListener,
    admin: TcpListener,
    /// Where clients connect.
    pub client_addr: SocketAddr,
    /// Where other brokers connect.
    pub peer_addr: SocketAddr,
    /// Where probes and metrics are served.
    pub admin_addr: SocketAddr,
}

impl Listeners {
    /// Binds what `[listen]` says. Connections wait until a broker serves them.
    ///
    /// # Errors
    /// Which one cannot be bound, why, and what to do.
    pub async fn bind(config: &Config) -> Result<Self, StartError> {
        let client = bind("client", &config.listen.client).await?;
        let peer = bind("peer", &config.listen.peer).await?;
        let admin = bind("admin", &config.listen.admin).await?;
        let local = |listener: &TcpListener| {
            listener.local_addr().map_err(|error| StartError::System(format!("a listener has no address: {error}")))
        };
        let (client_addr, peer_addr, admin_addr) = (local(&client)?, local(&peer)?, local(&admin)?);
        Ok(Self { client, peer, admin, client_addr, peer_addr, admin_addr })
    }
}

/// A broker that serves. Dropping it stops it at once: what is under way is cut off, nothing acknowledged is lost.
#[derive(Debug)]
pub struct RunningBroker {
    /// Where clients connect.
    pub client_addr: SocketAddr,
    /// Where other brokers connect.
    pub peer_addr: SocketAddr,
    /// Where probes and metrics are served.
    pub admin_addr: SocketAddr,
    /// This broker.
    pub broker_id: BrokerId,
    /// The cluster that it is part of.
    pub cluster_id: ClusterId,
    life: Life,
    replicas: LocalReplicas,
}

/// All that goes on for a broker: it ends when this is dropped, also where the start was given up in the middle.
#[derive(Debug)]
struct Life {
    readiness: Readiness,
    failed: watch::Receiver<Option<String>>,
    fail: watch::Sender<Option<String>>,
    /// Leaderships are being handed over.
    stopping: watch::Sender<bool>,
    drain: watch::Sender<bool>,
    cut: watch::Sender<bool>,
    stop_admin: watch::Sender<bool>,
    serving: Option<JoinHandle<()>>,
    peers_serving: Option<JoinHandle<()>>,
    admin: Option<JoinHandle<()>>,
    /// What goes on beside requests, until aborted.
    background: Vec<JoinHandle<()>>,
    network: Option<Arc<PeerNetwork>>,
    /// The only strong hold on the shards.
    shards: Option<Arc<Shards<PartitionMachine>>>,
}

impl Life {
    fn new(readiness: Readiness) -> Self {
        let (fail, failed) = watch::channel(None);
        Self {
            readiness,
            failed,
            fail,
            stopping: watch::Sender::new(false),
            drain: watch::Sender::new(false),
            cut: watch::Sender::new(false),
            stop_admin: watch::Sender::new(false),
            serving: None,
            peers_serving: None,
            admin: None,
            background: Vec::new(),
            network: None,
            shards: None,
        }
    }

    /// Runs a server; the broker has failed when it ends by itself.
    fn serve<E: std::fmt::Display>(
        &self,
        listener: &'static str,
        server: impl Future<Output = Result<(), E>> + Send + 'static,
    ) -> JoinHandle<()> {
        let fail = self.fail.clone();
        tokio::spawn(async move {
            if let Err(error) = server.await {
                fail.send_replace(Some(format!("the {listener} listener has ended: {error}")));
            }
        })
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        for end in [&self.stopping, &self.drain, &self.cut, &self.stop_admin] {
            end.send_replace(true);
        }
        if let Some(network) = &self.network {
            network.stop();
        }
        for task in self.background.drain(..).chain(self.serving.take()).chain(self.peers_serving.take()) {
            task.abort();
        }
        if let Some(admin) = self.admin.take() {
            admin.abort();
        }
    }
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
    /// Starts a broker on the current tokio runtime and returns once it is ready: its cluster is formed or found,
    /// listeners accept, metadata is caught up, local replicas are recovered. Forming a cluster waits for all its seeds,
    /// for as long as that takes; dropping the future gives the start up.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub async fn start(config: Config) -> Result<RunningBroker, StartError> {
        config.check()?;
        let listeners = Listeners::bind(&config).await?;
        Self::start_on(config, listeners).await
    }

    /// As [`Broker::start`], on listeners that were bound before.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub async fn start_on(config: Config, listeners: Listeners) -> Result<RunningBroker, StartError> {
        Self::start_as(config, listeners, FEATURE_LEVEL).await
    }

    /// As [`Broker::start_on`], as a release would that knows feature levels up to `feature_level`: to try out upgrades.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub async fn start_as(
        config: Config,
        listeners: Listeners,
        feature_level: i32,
    ) -> Result<RunningBroker, StartError> {
        config.check()?;
        Starting::new(config, &listeners, feature_level).run(listeners).await
    }
}

/// A broker on its way up.
struct Starting {
    config: Config,
    started: Instant,
    incarnation: u64,
    /// The newest feature level that this release knows.
    feature_level: i32,
    client_address: String,
    peer_address: String,
    metrics: Arc<Metrics>,
    replicas: LocalReplicas,
    readiness: Readiness,
    life: Life,
}

/// What a start goes through with.
struct Around<'a> {
    calls: &'a Arc<Calls>,
    network: &'a Arc<PeerNetwork>,
    recover: mpsc::Sender<MetadataRecovery>,
}

/// The metadata as a start opened it.
struct OpenMetadata {
    replica_id: ReplicaId,
    peers: Peers,
    replica: Replica,
    table: Published<MetadataTable>,
}

impl Starting {
    fn new(config: Config, listeners: &Listeners, feature_level: i32) -> Self {
        let replicas = LocalReplicas::default();
        let readiness = Readiness::new(replicas.clone());
        readiness.hold("metadata", "the broker is starting");
        Self {
            started: Instant::now(),
            incarnation: rand::random(),
            feature_level,
            client_address: advertised(&config.advertise.client, &config.listen.client, listeners.client_addr),
            peer_address: advertised(&config.advertise.peer, &config.listen.peer, listeners.peer_addr),
            metrics: Arc::new(Metrics::new()),
            life: Life::new(readiness.clone()),
            config,
            replicas,
            readiness,
        }
    }

    async fn run(mut self, listeners: Listeners) -> Result<RunningBroker, StartError> {
        raise_open_files(self.config.limits.open_files);
        let Listeners { client, peer, admin, client_addr, peer_addr, admin_addr } = listeners;
        let (readiness, metrics) = (self.readiness.clone(), Arc::clone(&self.metrics));
        let admin = admin_http::serve(admin, readiness.clone(), Arc::clone(&metrics), self.life.stop_admin.subscribe());
        self.life.admin = Some(self.life.serve("admin", admin));

        let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
        let has_others = self.config.has_other_seeds(&self.peer_address);
        let data_dir = open_data_dir(Arc::clone(&disk), self.config.node.data_dir.clone(), !has_others).await?;
        let gate = Gate::new(readiness.clone());
        let connections = Connections::new(self.config.limits.clone(), Arc::clone(&metrics));
        let limits = self.config.limits.clone();
        let (drains, cuts) = (self.life.drain.subscribe(), self.life.cut.subscribe());
        let serving = server::serve(Arc::clone(&gate), limits, client, connections, drains, cuts);
        self.life.serving = Some(self.life.serve("client", serving));

        let me = Me {
            broker: self.config.node.id,
            directory: data_dir.id(),
            incarnation: self.incarnation,
            peer_address: self.peer_address.clone(),
            cluster: data_dir.cluster(),
            feature_level: self.feature_level,
        };
        let refused = |reason: String| StartError::DataDir { path: self.config.node.data_dir.clone(), reason };
        let known = Belonging::load(&data_dir, me.broker, &me.peer_address, self.feature_level).map_err(refused)?;
        let book = PeerBook::new();
        let calls = Calls::new(me.clone(), self.config.cluster.seeds.clone(), book.clone());
        if let Some(known) = &known {
            // Before anybody can ask: one that seems to belong to nothing would let a second cluster be founded.
            calls.tell_founding(known.founding.clone());
        }
        let network = self.open_network(&me, peer, &calls, book);
        let (data_dir, mut belonging) = self.find_cluster(me, data_dir, known, &calls, &network).await?;
        let cluster = belonging.founding.cluster;

        let transport: Arc<dyn PeerTransport> = Arc::<PeerNetwork>::clone(&network);
        let shards = start_shards(&self.config, Arc::clone(&data_dir), transport).await?;
        self.life.shards = Some(Arc::clone(&shards));
        network.attach(Arc::downgrade(&shards));
        let (recover, mut recoveries) = mpsc::channel(1);
        gate.serve_recovery(&calls);
        let around = Around { calls: &calls, network: &network, recover };
        let (metadata, control) = self.enter(&shards, &data_dir, &mut belonging, around, &mut recoveries).await?;
        let table = metadata.table.clone();

        readiness.hold("replicas", "local replicas are being recovered");
        for concern in ["metadata", "cluster", "registration"] {
            readiness.release(concern);
        }
        let replicas = self.replicas.clone();
        let room = Room::new(self.config.storage.free_bytes_min);
        let led = Arc::new(Led::default());
        let metadata_replica = watch::Sender::new(metadata.replica_id);
        let kept = Kept::new(Arc::clone(&data_dir), belonging);
        let succession = Succession {
            wanted: metadata_replica.subscribe(),
            control: Arc::clone(&control),
            data_dir: Arc::clone(&data_dir),
            kept: Arc::clone(&kept),
        };
        let ends = watch::Sender::new(false);
        let session = session::Session {
            control: Arc::clone(&control),
            calls: Arc::clone(&calls),
            replicas: replicas.clone(),
            led: Arc::clone(&led),
            room: room.clone(),
            stopping: self.life.stopping.subscribe(),
            metadata_replica,
            registration: self.registration(),
            door: Door { gate: Arc::clone(&gate), readiness: readiness.clone(), ends: ends.clone() },
        };
        let (mut drains, ended) = (self.life.drain.subscribe(), ends.clone());
        self.life.background.push(tokio::spawn(async move {
            // An error means that the broker is gone altogether.
            drop(drains.wait_for(|drains| *drains).await);
            ended.send_replace(true);
        }));
        // From here on the controller hears of this broker: opening many replicas may take longer than a session lives.
        self.life.background.push(tokio::spawn(session.run()));
        let (broken, held) = (table.clone(), readiness.clone());
        self.life.background.push(tokio::spawn(async move {
            let error = broken.broken().await;
            held.hold("metadata", format!("it is not followed any more: {error}"));
        }));
        self.life.background.push(tokio::spawn(book::follow(
            table.clone(),
            Arc::downgrade(&network),
            network.book().clone(),
            self.config.node.id,
            kept,
        )));

        let own = TopicConfig::resolve(&TopicOverrides::new(), &TopicOverrides::new()).map_err(StartError::Metadata)?;
        let own = OpenPartition::new(
            (METADATA_PARTITION, metadata.replica_id),
            METADATA_TOPIC,
            true,
            metadata.replica,
            metadata.peers,
            own,
        );
        let mut reconciler =
            Reconciler::new(&shards, Arc::clone(&data_dir), table.clone(), replicas.clone(), self.config.topic.clone());
        reconciler.machine_rules = MachineRules {
            groups: Arc::new(group_rules(&self.config)),
            transactions: Arc::new(transaction_rules(&self.config)),
            producer_expiration: self.config.producer.id_expiration,
        };
        reconciler.adopt(&Arc::new(own), succession, recoveries);
        // Opening many replicas may take long: whoever scrapes sees how far that is.
        let groups = GroupCoordinators::default();
        metrics.watch(BrokerCollector {
            groups: groups.clone(),
            shards: Arc::downgrade(&shards),
            network: Arc::downgrade(&network),
            control: Arc::clone(&control),
            led: Arc::clone(&led),
            in_flight_bytes_max: self.config.storage.in_flight_bytes_max,
            replicas: replicas.clone(),
            table: table.clone(),
            room: room.clone(),
            set_aside: self.config.node.data_dir.join(SET_ASIDE),
            partitions_max: self.config.limits.metrics_partitions,
            started: self.started,
        });
        reconciler.catch_up().await;

        let gives_back = self.config.cluster.preferred_leaders;
        let driver = Driver::new(Arc::clone(&control), replicas.clone(), led, gives_back);
        self.life.background.extend([
            tokio::spawn(reconciler.run()),
            tokio::spawn(driver.run()),
            tokio::spawn(room.clone().watch(disk, self.config.node.data_dir.clone())),
        ]);
        let broker_id = self.config.node.id;
        let node = Arc::new(Node {
            id: broker_id,
            cluster,
            table,
            control,
            replicas: replicas.clone(),
            groups,
            transactions: Transactions::default(),
            drain: ends.subscribe(),
            metrics,
            room,
            checks: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from))),
            ready_since: Instant::now(),
            config: self.config,
        });
        self.life.background.push(tokio::spawn(group::driver::run(Arc::clone(&node))));
        self.life.background.push(tokio::spawn(transaction::driver::run(Arc::clone(&node))));
        calls.serve_all(&node);
        gate.open(&node);
        readiness.release("replicas");
        tracing::info!(%client_addr, %admin_addr, %cluster, took = ?self.started.elapsed(), "the broker is ready");
        Ok(RunningBroker {
            client_addr,
            peer_addr,
            admin_addr,
            broker_id,
            cluster_id: cluster,
            life: self.life,
            replicas,
        })
    }

    /// Answers other brokers from now on.
    fn open_network(&mut self, me: &Me, listener: TcpListener, calls: &Arc<Calls>, book: PeerBook) -> Arc<PeerNetwork> {
        let identity = PeerIdentity {
            broker: me.broker,
            directory: me.directory,
            incarnation: me.incarnation,
            cluster: me.cluster,
        };
        let config = PeerConfig::new(&self.config.limits);
        let network = PeerNetwork::start(config, identity, book, tokio::runtime::Handle::current());
        self.life.network = Some(Arc::clone(&network));
        calls.attach(&network);
        let (drains, cuts) = (self.life.drain.subscribe(), self.life.cut.subscribe());
        let (served, calls) = (Arc::clone(&network), Arc::clone(calls));
        let client_address = self.client_address.clone();
        let serving = async move { served.serve(listener, calls, client_address, drains, cuts).await };
        self.life.peers_serving = Some(self.life.serve("peer", serving));
        network
    }

    /// What this directory belongs to; found out, and noted there, if it belongs to nothing yet.
    async fn find_cluster(
        &self,
        me: Me,
        data_dir: DataDir,
        known: Option<Belonging>,
        calls: &Arc<Calls>,
        network: &Arc<PeerNetwork>,
    ) -> Result<(Arc<DataDir>, Belonging), StartError> {
        let refused = |reason: String| StartError::DataDir { path: self.config.node.data_dir.clone(), reason };
        let (data_dir, belonging) = match known {
            Some(known) if data_dir.cluster().is_some() => {
                if self.config.has_other_seeds(&me.peer_address) {
                    let mut asked = self.config.cluster.seeds.clone();
                    // Where this directory's broker was reached last: on a copy of it the other one runs there still.
                    let itself = known.brokers.iter().chain(&known.founding.voters);
                    let itself = itself.filter(|broker| broker.directory == me.directory && broker.broker == me.broker);
                    for earlier in itself.map(|broker| &broker.peer_address) {
                        if !earlier.is_empty() && *earlier != me.peer_address && !asked.contains(earlier) {
                            asked.push(earlier.clone());
                        }
                    }
                    let checked = join::check(&me, &asked, self.hello(network)).await;
                    checked.map_err(StartError::Cluster)?;
                }
                (Arc::new(data_dir), known)
            }
            // A start before this one was cut off between its two notes.
            Some(known) => note(data_dir, known.founding, me.broker).await.map_err(refused)?,
            None => {
                let seeds = &self.config.cluster.seeds;
                let founding = join::find(&me, seeds, &self.readiness, self.hello(network)).await;
                let founding = founding.map_err(StartError::Cluster)?;
                note(data_dir, founding, me.broker).await.map_err(refused)?
            }
        };
        // What was registered last goes before what the cluster began with.
        let known = belonging.founding.voters.iter().chain(&belonging.brokers);
        for founder in known.filter(|founder| founder.broker != me.broker) {
            book::enter(network.book(), founder);
        }
        network.set_cluster(belonging.founding.cluster);
        calls.tell_founding(belonging.founding.clone());
        Ok((data_dir, belonging))
    }

    fn hello(
        &self,
        network: &Arc<PeerNetwork>,
    ) -> impl Fn(String) -> futures::future::BoxFuture<'static, Result<flowstone_protocol::peer::HelloResponse, Error>> + use<>
    {
        let client = network.client();
        let request = HelloRequest {
            caller: None,
            seeds: self.config.cluster.seeds.clone(),
            peer_address: self.peer_address.clone(),
            feature_level: self.feature_level,
        };
        move |address: String| {
            let (client, request) = (client.clone(), request.clone());
            Box::pin(async move { client.hello(&address, request, HELLO_MAX).await })
        }
    }

    /// Opens the metadata's replica and registers; returns once this broker finds its own registration there.
    async fn enter(
        &mut self,
        shards: &Arc<Shards<PartitionMachine>>,
        data_dir: &Arc<DataDir>,
        belonging: &mut Belonging,
        around: Around<'_>,
        recoveries: &mut mpsc::Receiver<MetadataRecovery>,
    ) -> Result<(OpenMetadata, Arc<Control>), StartError> {
        let Around { calls, network, recover } = around;
        self.readiness.hold("metadata", "the cluster metadata is being opened");
        let shards = Arc::downgrade(shards);
        let mut registered = None;
        if belonging.metadata_replica.is_none() {
            // The controller gives this directory a replica of the metadata.
            registered = Some(self.register(network, None, calls).await?);
        }
        loop {
            if let Some(response) = &registered {
                let id = ReplicaId::new(response.metadata_replica_id);
                if belonging.metadata_replica != Some(id) {
                    (belonging.metadata_replica, belonging.recovered_from) = (Some(id), None);
                    self.save(data_dir, belonging).await?;
                }
            }
            let others = registered.as_ref().map(metadata_replicas).unwrap_or_default();
            let mut opened = self.open_metadata(&shards, data_dir, belonging, &others).await?;
            let duty = Duty::new(self.config.limits.broker_session_timeout);
            let me = self.config.node.id;
            let replica = (opened.replica_id, opened.replica.clone());
            let control = Control::new(me, replica, opened.table.clone(), duty, network, recover.clone());
            // Ends with the loop's turn, where the replica is opened another time.
            let keeper = AbortOnDrop(tokio::spawn(duty::run(Arc::clone(&control), self.incarnation)));
            calls.serve_metadata(&control);
            let response = loop {
                let entering = async {
                    let response = match registered.take() {
                        Some(response) => response,
                        None => self.register(network, Some(&control), calls).await?,
                    };
                    let response = self.exchange(&opened, &control, calls, response).await?;
                    if ReplicaId::new(response.metadata_replica_id) == opened.replica_id {
                        self.readiness.hold("metadata", "the cluster metadata is catching up");
                        // What the controller knew of the others may be from before they came back elsewhere.
                        let _looking = self.look_around(network, calls);
                        self.find_itself(&opened.table, &opened.replica).await?;
                    }
                    Ok::<_, StartError>(response)
                };
                tokio::select! {
                    response = entering => break response?,
                    // What a newer release wrote: no waiting helps.
                    error = opened.table.broken() => return Err(StartError::Metadata(error)),
                    // Without a majority nobody is ever registered: here an operator gives up what the others had.
                    Some(recovery) = recoveries.recv() => {
                        self.recover_metadata(&shards, data_dir, belonging, &mut opened, &control, recovery).await?;
                    }
                }
            };
            if ReplicaId::new(response.metadata_replica_id) != opened.replica_id {
                if opened.replica.status().is_ready() {
                    // Nobody could give another one but itself: what it has is all that there is.
                    return Err(StartError::Metadata(Error::new(
                        flowstone_protocol::ErrorCode::Internal,
                        "the metadata is led here by a replica that it does not name; start the broker again, and report \
                         this if it stays so",
                    )));
                }
                tracing::warn!(
                    "the replica of the metadata here was given up while the broker was away: it begins anew"
                );
                drop((keeper, control, opened));
                calls.stop_metadata();
                // Its files stay until the new one has what takes their place.
                close(&shards, METADATA_PARTITION, false).await;
                registered = Some(response);
                continue;
            }
            let founded = opened.table.with(|table| table.founding().map(|founding| founding.cluster));
            if founded != Some(belonging.founding.cluster) {
                return Err(StartError::DataDir {
                    path: self.config.node.data_dir.clone(),
                    reason: format!(
                        "it belongs to cluster {}, and its metadata to another ({founded:?}): files of two directories \
                         were mixed; restore one of them whole",
                        belonging.founding.cluster
                    ),
                });
            }
            self.life.background.push(keeper.keep());
            return Ok((opened, control));
        }
    }

    /// Where the metadata's replica here can never vote again: tells so until the controller gives this broker another one.
    async fn exchange(
        &self,
        opened: &OpenMetadata,
        control: &Arc<Control>,
        calls: &Arc<Calls>,
        mut response: RegisterResponse,
    ) -> Result<RegisterResponse, StartError> {
        let own = TopicConfig::resolve(&TopicOverrides::new(), &TopicOverrides::new()).map_err(StartError::Metadata)?;
        let key = (METADATA_PARTITION, opened.replica_id);
        let (replica, peers) = (opened.replica.clone(), Arc::clone(&opened.peers));
        let partition = OpenPartition::new(key, METADATA_TOPIC, true, replica, peers, own);
        while let Some(lost) = session::lost(&partition) {
            if response.metadata_replica_id != opened.replica_id.get() {
                break;
            }
            self.readiness
                .hold("metadata", format!("its replica here is lost, another one is asked for: {}", lost.reason));
            let request = BrokerHeartbeatRequest { lost: vec![lost], ..BrokerHeartbeatRequest::default() };
            match session::tell(control, calls, &request).await {
                // Of a controller that has not heard of the registration yet it is none.
                Ok(answer) if answer.metadata_replica_id != 0 => {
                    response.metadata_replica_id = answer.metadata_replica_id;
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "the loss of the metadata's replica was not taken"),
            }
            tokio::time::sleep(TELL_EVERY).await;
        }
        Ok(response)
    }

    /// Has the metadata go on with what is here, as its only voter under another id. Whoever asked waits until it leads.
    async fn recover_metadata(
        &self,
        shards: &Weak<Shards<PartitionMachine>>,
        data_dir: &Arc<DataDir>,
        belonging: &mut Belonging,
        opened: &mut OpenMetadata,
        control: &Arc<Control>,
        recovery: MetadataRecovery,
    ) -> Result<(), StartError> {
        let MetadataRecovery { survives_as, done } = recovery;
        let from = opened.replica_id;
        tracing::error!(%from, to = %survives_as, "the metadata goes on with what this broker has of it");
        // First of all: a start that is cut off from here on goes on with it.
        (belonging.metadata_replica, belonging.recovered_from) = (Some(survives_as), Some(from));
        self.save(data_dir, belonging).await?;
        close(shards, METADATA_PARTITION, false).await;
        let peers: Peers = Arc::from([(survives_as, self.config.node.id)]);
        let spec = metadata_spec(data_dir, survives_as, Arc::clone(&peers), Start::Recovered { from });
        let machine = PartitionMachine::metadata_again(&opened.table);
        let replica = open_handle(shards, spec, machine).await.map_err(StartError::Metadata)?;
        control.set_metadata(survives_as, replica.clone());
        *opened = OpenMetadata { replica_id: survives_as, peers, replica, table: opened.table.clone() };
        if done.send(()).is_err() {
            tracing::debug!("whoever asked for the metadata's recovery has given up waiting");
        }
        Ok(())
    }

    async fn save(&self, data_dir: &Arc<DataDir>, belonging: &Belonging) -> Result<(), StartError> {
        let (data_dir, belonging) = (Arc::clone(data_dir), belonging.clone());
        let saved = tokio::task::spawn_blocking(move || belonging.save(&data_dir)).await;
        let saved = saved.map_err(|error| StartError::System(error.to_string()))?;
        saved.map_err(|reason| StartError::DataDir { path: self.config.node.data_dir.clone(), reason })
    }

    async fn open_metadata(
        &self,
        shards: &Weak<Shards<PartitionMachine>>,
        data_dir: &Arc<DataDir>,
        belonging: &Belonging,
        others: &[Founder],
    ) -> Result<OpenMetadata, StartError> {
        let rules = MetadataRules {
            topics_max: self.config.limits.topics,
            partitions_per_topic_max: self.config.limits.partitions_per_topic,
            partitions_max: self.config.limits.partitions,
            batch_bytes_max: self.config.batch_bytes_max(),
            internal_partitions: self.config.cluster.internal_partitions,
            topic_defaults: self.config.topic.clone(),
        };
        if let Some(shards) = shards.upgrade() {
            shards.set_feature_level(belonging.founding.feature_level.unsigned_abs());
        }
        let (machine, table) = PartitionMachine::metadata(MetadataTable::new(rules).supporting(self.feature_level));
        let Some(replica_id) = belonging.metadata_replica else {
            return Err(StartError::System("no replica of the metadata was given to this broker".to_owned()));
        };
        let founders = &belonging.founding.voters;
        let start = if belonging.is_founder() {
            Start::FirstVoter { voters: founders.iter().map(|founder| founder.replica).collect() }
        } else if let Some(from) = belonging.recovered_from {
            Start::Recovered { from }
        } else {
            Start::Learner
        };
        // By replica: those of the founding that were replaced since harm nobody.
        let known = founders.iter().chain(&belonging.brokers).chain(others);
        let peers: BTreeMap<ReplicaId, BrokerId> = known.map(|known| (known.replica, known.broker)).collect();
        let peers: Peers = peers.into_iter().collect();
        let spec = metadata_spec(data_dir, replica_id, Arc::clone(&peers), start);
        let replica = open_handle(shards, spec, machine).await.map_err(StartError::Metadata)?;
        let has_peers = peers.iter().any(|(other, _)| *other != replica_id);
        match settled(&replica, has_peers).await {
            // The controller gives this broker another one.
            Err(_) if matches!(replica.status().health, Health::Lost { .. }) => {}
            settled => settled.map_err(StartError::Metadata)?,
        }
        Ok(OpenMetadata { replica_id, peers, replica, table })
    }

    /// What this start registers with.
    fn registration(&self) -> RegisterRequest {
        RegisterRequest {
            caller: None,
            client_address: self.client_address.clone(),
            peer_address: self.peer_address.clone(),
            rack: self.config.node.rack.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            feature_level: self.feature_level,
        }
    }

    /// Asks those whom the seeds know as well, until dropped: addresses may have changed while this broker was away.
    fn look_around(&self, network: &Arc<PeerNetwork>, calls: &Arc<Calls>) -> AbortOnDrop {
        AbortOnDrop(tokio::spawn(book::look_around(
            self.config.cluster.seeds.clone(),
            self.peer_address.clone(),
            network.book().clone(),
            self.hello(network),
            calls.identity(),
        )))
    }

    /// Registers at the controller, whoever that is: `control` knows, once the metadata is open here.
    async fn register(
        &self,
        network: &Arc<PeerNetwork>,
        control: Option<&Arc<Control>>,
        calls: &Arc<Calls>,
    ) -> Result<RegisterResponse, StartError> {
        let request = self.registration();
        let me = self.config.node.id;
        let looking = self.look_around(network, calls);
        let contacts = || {
            let controller = control.and_then(|control| control.controller());
            let known = network.book().all().into_iter().map(|(broker, _)| broker);
            // Itself, where it may become the controller.
            let itself = control.map(|control| control.me);
            let mut contacts: Vec<BrokerId> = controller.into_iter().chain(itself).chain(known).collect();
            let mut seen = std::collections::HashSet::new();
            contacts.retain(|broker| seen.insert(*broker));
            contacts
        };
        let client = network.client();
        let register = |to: BrokerId, request: RegisterRequest| {
            let (client, calls) = (client.clone(), Arc::clone(calls));
            async move {
                if to == me {
                    return calls.take_in(calls.identity(), request).await;
                }
                client.register(to, request, session::ANSWER_MAX).await
            }
        };
        let patience = self.config.limits.broker_session_timeout * REGISTRATION_SESSIONS;
        let response = session::register(contacts, register, &request, patience, &self.readiness).await;
        drop(looking);
        let response = response.map_err(|error| StartError::Cluster(error.message))?;
        // Some may have lost the directory by which they were known here, and the metadata is to come from them. A founder
        // that has not registered yet is where it was when the cluster was founded.
        let registered = |other: &&Founder| other.broker != me && !other.peer_address.is_empty();
        for other in metadata_replicas(&response).iter().filter(registered) {
            book::enter(network.book(), other);
        }
        Ok(response)
    }

    /// Waits until the metadata here holds this start's registration: it is caught up.
    async fn find_itself(&self, table: &Published<MetadataTable>, replica: &Replica) -> Result<(), StartError> {
        let mut changes = table.changes();
        let me = self.config.node.id;
        let is_here =
            || table.with(|table| table.broker(me).is_some_and(|broker| broker.incarnation == self.incarnation));
        let mut seen = replica.status();
        while !is_here() {
            match &seen.health {
                Health::Quarantined { message } | Health::Lost { message, .. } => {
                    return Err(StartError::Metadata(Error::new(
                        flowstone_protocol::ErrorCode::Quarantined,
                        format!(
                            "{message}; or start with an empty data directory: the cluster gives this broker its replicas anew"
                        ),
                    )));
                }
                Health::Ok | Health::DiskFull | Health::Failed { .. } => {}
            }
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return Err(StartError::System("the metadata has stopped".to_owned()));
                    }
                }
                now = replica.changed(&seen) => seen = now,
            }
        }
        Ok(())
    }
}

/// A task that ends with its holder.
struct AbortOnDrop(JoinHandle<()>);

impl AbortOnDrop {
    /// It goes on.
    fn keep(self) -> JoinHandle<()> {
        let mut kept = tokio::spawn(std::future::ready(()));
        let mut this = self;
        std::mem::swap(&mut kept, &mut this.0);
        kept
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn metadata_replicas(response: &RegisterResponse) -> Vec<Founder> {
    response.metadata_replicas.iter().filter_map(founder_of).collect()
}

/// Notes which cluster the directory belongs to; durable when this returns, and only then told to anyone.
async fn note(
    mut data_dir: DataDir,
    founding: Founding,
    broker: BrokerId,
) -> Result<(Arc<DataDir>, Belonging), String> {
    let noting = tokio::task::spawn_blocking(move || {
        let belonging = Belonging::new(founding, broker, &data_dir);
        belonging.save(&data_dir)?;
        data_dir.set_cluster(belonging.founding.cluster).map_err(|error| error.to_string())?;
        Ok((Arc::new(data_dir), belonging))
    });
    noting.await.map_err(|error| error.to_string())?
}

impl RunningBroker {
    /// Waits until the broker can no longer do its work by itself, and says why; pends for ever while it can.
    pub async fn wait(&self) -> String {
        let mut failed = self.life.failed.clone();
        loop {
            if let Some(reason) = failed.borrow_and_update().clone() {
                return reason;
            }
            if failed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Stops: hands its leaderships over, takes no new work, answers what is under way, flushes, closes. Calls that have
    /// not ended by `deadline` are cut off; producers then send again what was not acknowledged.
    pub async fn shutdown(mut self, deadline: Duration) -> ShutdownReport {
        let began = Instant::now();
        self.life.readiness.hold("shutdown", "the broker is draining");
        self.life.stopping.send_replace(true);
        self.hand_over(HAND_OVER_MAX.min(deadline / 2)).await;
        self.life.drain.send_replace(true);
        let mut serving = self.life.serving.take();
        let drained = match &mut serving {
            Some(serving) => {
                let left = deadline.saturating_sub(began.elapsed());
                let drained = tokio::time::timeout(left, &mut *serving).await.is_ok();
                if !drained {
                    tracing::warn!(?deadline, "calls are still open after the deadline: they are cut off");
                    self.life.cut.send_replace(true);
                    if tokio::time::timeout(CUT_MAX, &mut *serving).await.is_err() {
                        serving.abort();
                    }
                }
                drained
            }
            None => true,
        };
        for task in self.life.background.drain(..) {
            task.abort();
            // Aborted: that is the error.
            drop(task.await);
        }
        if let Some(shards) = self.life.shards.take() {
            // Joins threads that still flush: not on the runtime's thread.
            drop(tokio::task::spawn_blocking(move || drop(shards)).await);
        }
        if let Some(network) = self.life.network.take() {
            network.stop();
        }
        // Other brokers' calls wait for nothing that is still done here.
        self.life.cut.send_replace(true);
        if let Some(mut peers_serving) = self.life.peers_serving.take()
            && tokio::time::timeout(CUT_MAX, &mut peers_serving).await.is_err()
        {
            peers_serving.abort();
        }
        self.life.stop_admin.send_replace(true);
        if let Some(mut admin) = self.life.admin.take() {
            // A scraper that holds its connection does not hold up the end.
            drop(tokio::time::timeout(CUT_MAX, &mut admin).await);
        }
        let report = ShutdownReport { drained, took: began.elapsed() };
        tracing::info!(drained, took = ?report.took, "the broker has stopped");
        report
    }

    /// Hands every leadership to another broker that can take it, the metadata's last: so a planned stop costs no
    /// election timeout. What nobody takes within `within` stays until the end.
    async fn hand_over(&self, within: Duration) {
        let led = |metadata: bool| -> Vec<Replica> {
            let open = self.replicas.all().into_iter().filter_map(|(tp, slot)| match slot {
                Slot::Open(partition) if (tp == METADATA_PARTITION) == metadata => Some(partition),
                _ => None,
            });
            let leads = |partition: &Arc<OpenPartition>| {
                partition.has_peers() && matches!(partition.replica.status().role, Role::Leader | Role::Elected)
            };
            open.filter(leads).map(|partition| partition.replica.clone()).collect()
        };
        let handing = async {
            for metadata in [false, true] {
                futures::stream::iter(led(metadata))
                    .for_each_concurrent(HANDED_OVER_AT_ONCE, |replica| async move {
                        if let Err(error) = drive::transfer(&replica, None).await {
                            tracing::debug!(tp = %replica.tp(), %error, "a leadership was not handed over");
                        }
                    })
                    .await;
            }
        };
        if tokio::time::timeout(within, handing).await.is_err() {
            tracing::warn!(?within, "not every leadership was handed over in time");
        }
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

/// Opens or makes the directory. One of a broker `alone` is given its cluster at once, before anything is founded, so
/// that a start that is cut off in the middle goes on with the same one.
async fn open_data_dir(disk: Arc<dyn Disk>, path: PathBuf, alone: bool) -> Result<DataDir, StartError> {
    let opening = tokio::task::spawn_blocking(move || {
        let refused = |reason: String| StartError::DataDir { path: path.clone(), reason };
        let new_id = DirectoryId::new(uuid::Uuid::new_v4().as_u128());
        let mut data_dir =
            DataDir::open_or_create(disk, &path, new_id, STRIPES).map_err(|error| refused(error.to_string()))?;
        if alone && data_dir.cluster().is_none() {
            let cluster = ClusterId::new(uuid::Uuid::new_v4().as_u128());
            data_dir.set_cluster(cluster).map_err(|error| refused(error.to_string()))?;
        }
        Ok(data_dir)
    });
    opening.await.map_err(|error| StartError::System(error.to_string()))?
}

async fn start_shards(
    config: &Config,
    data_dir: Arc<DataDir>,
    transport: Arc<dyn PeerTransport>,
) -> Result<Arc<Shards<PartitionMachine>>, StartError> {
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
        scrub_bytes_per_second: config.limits.scrub_bytes_per_second,
        compaction_bytes_per_second: config.limits.compaction_bytes_per_second.div_ceil(shards as u64),
        compaction_memory_bytes: config.limits.compaction_memory / shards as u64,
        ..ShardsConfig::default()
    };
    let path = config.node.data_dir.clone();
    let starting = tokio::task::spawn_blocking(move || {
        Shards::start(shards_config, data_dir, system_clock(), transport).map(Arc::new)
    });
    match starting.await {
        Ok(Ok(shards)) => Ok(shards),
        Ok(Err(error @ ShardsError::HardState(_))) => Err(StartError::DataDir { path, reason: error.to_string() }),
        Ok(Err(error)) => Err(StartError::System(error.to_string())),
        Err(error) => Err(StartError::System(error.to_string())),
    }
}

/// What the configuration says of consumer groups.
fn group_rules(config: &Config) -> GroupRules {
    GroupRules {
        members_max: config.group.members,
        groups_max: config.group.groups_per_partition,
        offsets_max: config.group.offsets,
        offsets_retention: config.group.offsets_retention,
        assignor: config.group.assignor.clone(),
    }
}

fn transaction_rules(config: &Config) -> TransactionRules {
    TransactionRules {
        timeout_max: config.transaction.max_timeout,
        id_expiration: config.transaction.id_expiration,
        ids_max: config.transaction.ids_per_partition,
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
