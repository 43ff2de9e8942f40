//! A cluster of brokers, and one client of it.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_broker::{Broker, Config, Listeners, RunningBroker, StartError};
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::pb::admin_client::AdminClient;
use flowstone_protocol::pb::log_client::LogClient;
use flowstone_protocol::{Compression, Error, ErrorCode, RecordBatchBuilder, Timestamp, pb, record};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

/// Nothing here takes this long; what does has hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
/// Short, so that tests of dead brokers are; long enough for a machine that is busy with much else.
const SESSION_TIMEOUT: &str = "2s";

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing within {PATIENCE:?}"),
    }
}

/// Looks again and again, until it is so.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let began = Instant::now();
    loop {
        let why = match look().await {
            Ok(found) => return found,
            Err(why) => why,
        };
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}: {why}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One broker's place: its folder and addresses outlive its process.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
    pub(crate) peer: String,
    pub(crate) sets: Vec<(String, String)>,
    /// The newest feature level that its release knows.
    pub(crate) release: i32,
}

pub(crate) struct World {
    pub(crate) home: TempDir,
    pub(crate) places: BTreeMap<i32, Place>,
    pub(crate) running: BTreeMap<i32, RunningBroker>,
    pub(crate) seeds: Vec<String>,
    next_folder: u32,
}

impl World {
    /// Places for brokers 1 to `brokers`, all of them seeds; none runs.
    pub(crate) async fn places(brokers: i32) -> World {
        let mut world = World {
            home: tempfile::tempdir().expect("a temporary folder"),
            places: BTreeMap::new(),
            running: BTreeMap::new(),
            seeds: Vec::new(),
            next_folder: 0,
        };
        for id in 1..=brokers {
            world.add_place(id).await;
            world.seeds.push(world.places[&id].peer.clone());
        }
        world
    }

    /// A cluster of so many brokers.
    pub(crate) async fn of(brokers: i32) -> World {
        let mut world = World::places(brokers).await;
        let ids: Vec<i32> = world.places.keys().copied().collect();
        world.start_all(&ids).await;
        world
    }

    /// Room for one more broker, which is no seed.
    pub(crate) async fn add_place(&mut self, id: i32) {
        let peer = free_address().await;
        let dir = self.new_folder();
        self.places.insert(id, Place { dir, peer, sets: Vec::new(), release: 1 });
    }

    fn new_folder(&mut self) -> PathBuf {
        self.next_folder += 1;
        self.home.path().join(format!("data-{}", self.next_folder))
    }

    /// The broker's disk is lost: it gets an empty one.
    pub(crate) fn wipe(&mut self, id: i32) {
        let dir = self.new_folder();
        self.places.get_mut(&id).expect("a place").dir = dir;
    }

    /// The release that the broker runs from its next start on.
    pub(crate) fn install(&mut self, id: i32, release: i32) {
        self.places.get_mut(&id).expect("a place").release = release;
    }

    pub(crate) fn set(&mut self, id: i32, key: &str, value: &str) {
        self.places.get_mut(&id).expect("a place").sets.push((key.to_owned(), value.to_owned()));
    }

    pub(crate) fn config(&self, id: i32) -> Config {
        let place = &self.places[&id];
        let mut config = Config::dev(&place.dir, 0);
        let seeds = self.seeds.join(",");
        let fixed = [
            ("node.id", id.to_string()),
            ("listen.peer", place.peer.clone()),
            ("cluster.seeds", seeds),
            ("limits.broker_session_timeout", SESSION_TIMEOUT.to_owned()),
            ("storage.shards", "1".to_owned()),
            ("storage.flush_threads", "4".to_owned()),
        ];
        for (key, value) in
            fixed.iter().map(|(key, value)| (*key, value)).chain(place.sets.iter().map(|(k, v)| (k.as_str(), v)))
        {
            config.set_key(key, value).expect("a valid key");
        }
        config
    }

    /// Begins to start a broker; the future ends when it is ready.
    pub(crate) fn starting(&self, id: i32) -> impl Future<Output = Result<RunningBroker, StartError>> + use<> {
        let (config, release) = (self.config(id), self.places[&id].release);
        async move {
            let began = Instant::now();
            let listeners = loop {
                match Listeners::bind(&config).await {
                    Ok(listeners) => break listeners,
                    // The port was free a moment ago; whoever took it for a connection of its own gives it back soon.
                    Err(_) if began.elapsed() < PATIENCE => tokio::time::sleep(Duration::from_millis(20)).await,
                    Err(error) => return Err(error),
                }
            };
            Broker::start_as(config, listeners, release).await
        }
    }

    pub(crate) async fn start(&mut self, id: i32) {
        let broker = soon(&format!("start of broker {id}"), self.starting(id)).await.expect("it starts");
        self.running.insert(id, broker);
    }

    pub(crate) async fn start_all(&mut self, ids: &[i32]) {
        let starting: Vec<_> = ids.iter().map(|id| self.starting(*id)).collect();
        let started = soon("start of all", futures::future::join_all(starting)).await;
        for (id, broker) in ids.iter().zip(started) {
            self.running.insert(*id, broker.unwrap_or_else(|error| panic!("broker {id}: {error}")));
        }
    }

    /// As `kill -9` does: nothing is said to anybody.
    pub(crate) async fn kill(&mut self, id: i32) {
        let broker = self.running.remove(&id).expect("it runs");
        drop(broker);
        // Its directory is free again once its threads have ended.
        let lock = self.places[&id].dir.clone();
        until("the directory's lock", async || {
            let file = std::fs::File::open(lock.join("LOCK")).map_err(|error| error.to_string())?;
            file.try_lock().map_err(|error| error.to_string())
        })
        .await;
    }

    /// Stops cleanly.
    pub(crate) async fn stop(&mut self, id: i32) {
        let broker = self.running.remove(&id).expect("it runs");
        soon("shutdown", broker.shutdown(PATIENCE)).await;
    }

    pub(crate) fn ids(&self) -> Vec<i32> {
        self.running.keys().copied().collect()
    }

    /// A client of one broker.
    pub(crate) fn client(&self, id: i32) -> Client {
        Client::of(self.running[&id].client_addr)
    }

    /// Of any that runs.
    pub(crate) fn any(&self) -> Client {
        self.client(*self.running.keys().next().expect("one runs"))
    }

    /// Waits until the broker knows who leads a partition, and says who.
    pub(crate) async fn leader(&self, ask: i32, topic: &str, partition: i32) -> i32 {
        until("a leader", async || self.client(ask).leader(topic, partition).await).await
    }

    /// Hands a partition's leadership to this broker, whoever has it, as often as it takes.
    pub(crate) async fn hand_over(&self, topic: &str, partition: i32, to: i32) {
        let request = pb::TransferLeaderRequest { topic: topic.to_owned(), partition, to_broker_id: to };
        until("a transfer", async || {
            let answered = soon("transfer", self.client(to).admin.transfer_leader(request.clone())).await;
            let leader = answered.map_err(|status| error_of(status).to_string())?.into_inner().leader_id;
            if leader == to { Ok(()) } else { Err(format!("broker {leader} leads")) }
        })
        .await;
    }

    /// Waits until every partition of the cluster has all its replicas in sync, and a leader that runs.
    pub(crate) async fn healthy(&self) {
        until("a healthy cluster", async || {
            let health = self.any().health().await.map_err(|error| error.to_string())?;
            if health.under_replicated + health.leaderless > 0 {
                return Err(format!("{:?}", health.partitions));
            }
            Ok(())
        })
        .await;
    }

    /// Appends one value to a partition, at its leader, as often as it takes; returns its offset.
    pub(crate) async fn produce(&self, topic: &Topic, partition: i32, value: &str) -> i64 {
        until("an acknowledgement", async || {
            let mut why = "nobody runs".to_owned();
            for id in self.ids() {
                match self.client(id).produce(topic, partition, batch(&[value])).await {
                    Ok(offset) => return Ok(offset),
                    Err(error) => why = format!("broker {id}: {error}"),
                }
            }
            Err(why)
        })
        .await
    }

    /// All values of a partition, from the start to the end as the leader knows it.
    pub(crate) async fn values(&self, topic: &Topic, partition: i32) -> Vec<String> {
        until("all values", async || {
            let mut why = "nobody runs".to_owned();
            for id in self.ids() {
                match self.client(id).values(topic, partition, false).await {
                    Ok(values) => return Ok(values),
                    Err(error) => why = format!("broker {id}: {error}"),
                }
            }
            Err(why)
        })
        .await
    }
}

/// An address of this machine that nobody listens on, nor ever will but for whom it is given to: where this machine has
/// more than one for itself, no other listener is on it, and whoever connects to somebody gets a port of 127.0.0.1.
pub(crate) async fn free_address() -> String {
    static ASKED: AtomicU8 = AtomicU8::new(0);
    let [.., high, low] = std::process::id().to_be_bytes();
    let own = Ipv4Addr::new(127, 1 + ASKED.fetch_add(1, Ordering::Relaxed) % 250, high, low);
    let listener = match tokio::net::TcpListener::bind((own, 0)).await {
        Ok(listener) => listener,
        Err(_) => tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port"),
    };
    listener.local_addr().expect("an address").to_string()
}

#[derive(Clone, Debug)]
pub(crate) struct Topic {
    pub(crate) name: String,
    pub(crate) id: Bytes,
}

/// A client of one broker.
pub(crate) struct Client {
    pub(crate) log: LogClient<Channel>,
    pub(crate) admin: AdminClient<Channel>,
}

impl Client {
    pub(crate) fn of(address: SocketAddr) -> Client {
        let channel = Endpoint::from_shared(format!("http://{address}")).expect("an address").connect_lazy();
        Client {
            log: LogClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            admin: AdminClient::new(channel),
        }
    }

    pub(crate) async fn create(&mut self, name: &str, partitions: i32, replicas: i32) -> Result<Topic, Error> {
        let request = pb::CreateTopicRequest {
            name: name.to_owned(),
            partitions,
            replication_factor: replicas,
            ..Default::default()
        };
        let response = soon("create", self.admin.create_topic(request)).await.map_err(error_of)?;
        let topic = response.into_inner().topic.expect("described");
        Ok(Topic { name: topic.name, id: topic.topic_id })
    }

    pub(crate) async fn describe(&mut self, name: &str) -> Result<pb::TopicDescription, Error> {
        let request = pb::DescribeTopicRequest { name: name.to_owned() };
        let response = soon("describe", self.admin.describe_topic(request)).await.map_err(error_of)?;
        Ok(response.into_inner().topic.expect("described"))
    }

    pub(crate) async fn delete(&mut self, name: &str) -> Result<(), Error> {
        let request = pb::DeleteTopicRequest { name: name.to_owned() };
        soon("delete", self.admin.delete_topic(request)).await.map(|_| ()).map_err(error_of)
    }

    pub(crate) async fn cluster(&mut self) -> Result<pb::DescribeClusterResponse, Error> {
        let response = soon("cluster", self.admin.describe_cluster(pb::DescribeClusterRequest {})).await;
        response.map(tonic::Response::into_inner).map_err(error_of)
    }

    pub(crate) async fn health(&mut self) -> Result<pb::ClusterHealthResponse, Error> {
        let response = soon("health", self.admin.cluster_health(pb::ClusterHealthRequest {})).await;
        response.map(tonic::Response::into_inner).map_err(error_of)
    }

    pub(crate) async fn moves(&mut self) -> Result<Vec<pb::MoveDescription>, Error> {
        let response = soon("moves", self.admin.list_moves(pb::ListMovesRequest {})).await;
        response.map(|moves| moves.into_inner().moves).map_err(error_of)
    }

    pub(crate) async fn metadata(&mut self, topic: &str) -> Result<pb::MetadataResponse, Error> {
        let request = pb::MetadataRequest { topics: vec![topic.to_owned()], include_internal: true };
        soon("metadata", self.log.metadata(request)).await.map(tonic::Response::into_inner).map_err(error_of)
    }

    /// All that this broker knows, and what changes.
    pub(crate) async fn watch(&mut self) -> tonic::Streaming<pb::MetadataUpdate> {
        let request = pb::WatchMetadataRequest::default();
        soon("watch", self.log.watch_metadata(request)).await.expect("watched").into_inner()
    }

    /// Who leads a partition, as this broker knows it.
    pub(crate) async fn leader(&mut self, topic: &str, partition: i32) -> Result<i32, String> {
        let metadata = self.metadata(topic).await.map_err(|error| error.to_string())?;
        let topic = metadata.topics.first().ok_or("no such topic")?;
        let partition = topic.partitions.get(partition as usize).ok_or_else(|| format!("{:?}", topic.error))?;
        if partition.leader_id < 0 { Err("nobody leads".to_owned()) } else { Ok(partition.leader_id) }
    }

    /// One batch, acknowledged by this very broker.
    pub(crate) async fn produce(&mut self, topic: &Topic, partition: i32, batch: Bytes) -> Result<i64, Error> {
        let (requests, receiver) = mpsc::channel(1);
        let request = pb::ProduceRequest {
            request_id: 0,
            topic_id: topic.id.clone(),
            partition,
            acks: pb::Acks::Quorum.into(),
            batch,
            ..Default::default()
        };
        requests.send(request).await.expect("room");
        let answers = soon("produce", self.log.produce(ReceiverStream::new(receiver))).await.map_err(error_of)?;
        let answer = soon("an answer", answers.into_inner().message()).await.map_err(error_of)?;
        let Some(answer) = answer else {
            return Err(Error::new(ErrorCode::ShuttingDown, "the stream ended"));
        };
        match &answer.results[0].error {
            Some(error) => Err(Error::from_detail(error)),
            None => Ok(answer.results[0].base_offset),
        }
    }

    pub(crate) async fn end(&mut self, topic: &Topic, partition: i32, linearizable: bool) -> Result<i64, Error> {
        let at = pb::offset_query::At::End(pb::offset_query::End {});
        let query = pb::OffsetQuery { topic_id: topic.id.clone(), partition, at: Some(at) };
        let request = pb::ListOffsetsRequest { queries: vec![query], linearizable };
        let response = soon("list offsets", self.log.list_offsets(request)).await.map_err(error_of)?;
        let answer = response.into_inner().answers.remove(0);
        match &answer.error {
            Some(error) => Err(Error::from_detail(error)),
            None => Ok(answer.high_watermark),
        }
    }

    /// All values of a partition as this very broker has them; only a leader answers unless `any` replica will do.
    pub(crate) async fn values(&mut self, topic: &Topic, partition: i32, any: bool) -> Result<Vec<String>, Error> {
        let end = if any { None } else { Some(self.end(topic, partition, true).await?) };
        self.read(topic, partition, end.unwrap_or(0), any).await
    }

    /// Values up to `end`, from offset 0 on.
    pub(crate) async fn read(
        &mut self,
        topic: &Topic,
        partition: i32,
        end: i64,
        any: bool,
    ) -> Result<Vec<String>, Error> {
        let set = pb::FetchPartition {
            fetch_id: 1,
            session: 1,
            topic_id: topic.id.clone(),
            partition,
            offset: 0,
            last_epoch: -1,
            from_any_replica: any,
            known_high_watermark: end,
            ..Default::default()
        };
        let mut values = Vec::new();
        self.fetch(set, end, |answer| {
            let mut next = 0;
            for batch in split_batches(answer.batches.clone()) {
                let (header, batch) = batch.expect("whole batches");
                next = header.next_offset().get();
                if header.attributes.is_control() {
                    continue;
                }
                for record in record::records(batch, 64 << 20).expect("valid") {
                    let value = record.expect("valid").value.unwrap_or_default();
                    values.push(String::from_utf8(value.to_vec()).expect("text"));
                }
            }
            next
        })
        .await?;
        Ok(values)
    }

    /// Reads on until `take`, which says where an answer ends, has come to `end`.
    pub(crate) async fn fetch(
        &mut self,
        set: pb::FetchPartition,
        end: i64,
        mut take: impl FnMut(&pb::FetchResponse) -> i64,
    ) -> Result<(), Error> {
        let (requests, receiver) = mpsc::channel(1);
        let request = pb::FetchRequest { set: vec![set], remove: Vec::new(), credit_bytes: 64 << 20 };
        requests.send(request).await.expect("room");
        let answers = soon("fetch", self.log.fetch(ReceiverStream::new(receiver))).await.map_err(error_of)?;
        let mut answers = answers.into_inner();
        let mut next = 0;
        while next < end {
            let answer = soon("batches", answers.message()).await.map_err(error_of)?;
            let answer = answer.ok_or_else(|| Error::new(ErrorCode::ShuttingDown, "the stream ended"))?;
            if let Some(error) = &answer.error {
                return Err(Error::from_detail(error));
            }
            next = take(&answer);
        }
        Ok(())
    }
}

/// A batch of these values.
pub(crate) fn batch(values: &[&str]) -> Bytes {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let mut builder = RecordBatchBuilder::new(Compression::None);
    for value in values {
        builder.append(Timestamp::new(since.as_millis() as i64), None, Some(value.as_bytes()), []).expect("fits");
    }
    builder.build()
}

pub(crate) fn error_of(status: tonic::Status) -> Error {
    Error::from_status(&status).unwrap_or_else(|| {
        Error::new(ErrorCode::Unspecified, format!("{:?} without a detail: {}", status.code(), status.message()))
    })
}
