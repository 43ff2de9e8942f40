//! A broker and its clients.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use flowstone_broker::{Broker, Config, RunningBroker};
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::pb::admin_client::AdminClient;
use flowstone_protocol::pb::log_client::LogClient;
use flowstone_protocol::{
    Compression, Error, ErrorCode, ProducerEpoch, ProducerId, RecordBatchBuilder, Sequence, Timestamp, pb, record,
};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// Nothing here takes this long; what does has hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct World {
    pub(crate) broker: RunningBroker,
    pub(crate) log: LogClient<Channel>,
    pub(crate) admin: AdminClient<Channel>,
    pub(crate) dir: TempDir,
    sets: Vec<(String, String)>,
}

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing within {PATIENCE:?}"),
    }
}

/// Looks again and again, until it is so.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    soon(what, async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

pub(crate) fn config(dir: &TempDir, sets: &[(&str, &str)]) -> Config {
    let mut config = Config::dev(dir.path().join("data"), 0);
    for (key, value) in sets {
        config.set_key(key, value).expect("a valid key");
    }
    config
}

pub(crate) async fn channel(broker: &RunningBroker) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{}", broker.client_addr)).expect("an address");
    endpoint.connect().await.expect("the broker listens")
}

impl World {
    pub(crate) async fn new() -> World {
        World::with(&[]).await
    }

    pub(crate) async fn with(sets: &[(&str, &str)]) -> World {
        World::at(tempfile::tempdir().expect("a temporary folder"), sets).await
    }

    pub(crate) async fn at(dir: TempDir, sets: &[(&str, &str)]) -> World {
        let broker = soon("start", Broker::start(config(&dir, sets))).await.expect("the broker starts");
        let channel = channel(&broker).await;
        let sets = sets.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        World {
            broker,
            log: LogClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            admin: AdminClient::new(channel),
            dir,
            sets,
        }
    }

    /// Stops cleanly; the folder stays.
    pub(crate) async fn stop(self) -> TempDir {
        let World { broker, log, admin, dir, .. } = self;
        drop((log, admin));
        soon("shutdown", broker.shutdown(PATIENCE)).await;
        dir
    }

    pub(crate) async fn restart(self) -> World {
        let sets = self.sets.clone();
        let dir = self.stop().await;
        let sets: Vec<(&str, &str)> = sets.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        World::at(dir, &sets).await
    }

    pub(crate) async fn create(&mut self, name: &str, partitions: i32) -> Topic {
        self.create_with(name, partitions, &[]).await.expect("created")
    }

    pub(crate) async fn create_with(
        &mut self,
        name: &str,
        partitions: i32,
        configs: &[(&str, &str)],
    ) -> Result<Topic, Error> {
        let request = pb::CreateTopicRequest {
            name: name.to_owned(),
            partitions,
            configs: entries(configs),
            ..Default::default()
        };
        let response = soon("create", self.admin.create_topic(request)).await.map_err(|status| error_of(&status))?;
        let topic = response.into_inner().topic.expect("described");
        Ok(Topic { name: topic.name, id: topic.topic_id })
    }

    pub(crate) async fn describe(&mut self, name: &str) -> pb::TopicDescription {
        let request = pb::DescribeTopicRequest { name: name.to_owned() };
        let response = soon("describe", self.admin.describe_topic(request)).await.expect("described");
        response.into_inner().topic.expect("described")
    }

    pub(crate) async fn producer(&mut self) -> Producer {
        let (requests, receiver) = mpsc::channel(1 << 10);
        let answers = soon("produce", self.log.produce(ReceiverStream::new(receiver))).await.expect("a stream");
        Producer { requests, answers: answers.into_inner(), ready: Vec::new(), next_id: 0 }
    }

    /// One batch, acknowledged.
    pub(crate) async fn produce(&mut self, topic: &Topic, partition: i32, batch: Bytes) -> Result<i64, Error> {
        let mut producer = self.producer().await;
        producer.send(topic, partition, batch).await;
        producer.answer().await.1
    }

    pub(crate) async fn fetcher(&mut self) -> Fetcher {
        let (requests, receiver) = mpsc::channel(1 << 10);
        let answers = soon("fetch", self.log.fetch(ReceiverStream::new(receiver))).await.expect("a stream");
        Fetcher { requests, answers: answers.into_inner() }
    }

    /// All values of a partition, from `offset` to its end.
    pub(crate) async fn values(&mut self, topic: &Topic, partition: i32, offset: i64) -> Vec<String> {
        let end = self.offset(topic, partition, End).await.expect("listed").high_watermark;
        let mut fetcher = self.fetcher().await;
        fetcher.set(0, topic, partition, offset, 64 << 20).await;
        let mut values = Vec::new();
        let mut next = offset;
        while next < end {
            let response = fetcher.response().await.expect("batches");
            assert!(response.error.is_none(), "{:?}", response.error);
            for record in records(&response.batches, offset) {
                values.push(record.1);
            }
            next = next_offset(&response.batches);
        }
        values
    }

    pub(crate) async fn offset(
        &mut self,
        topic: &Topic,
        partition: i32,
        at: impl Into<At>,
    ) -> Result<pb::OffsetAnswer, Error> {
        let query = pb::OffsetQuery { topic_id: topic.id.clone(), partition, at: Some(at.into().0) };
        let request = pb::ListOffsetsRequest { queries: vec![query], linearizable: false };
        let response =
            soon("list offsets", self.log.list_offsets(request)).await.map_err(|status| error_of(&status))?;
        let answer = response.into_inner().answers.remove(0);
        match &answer.error {
            Some(error) => Err(Error::from_detail(error)),
            None => Ok(answer),
        }
    }
}

pub(crate) struct At(pb::offset_query::At);
pub(crate) struct Start;
pub(crate) struct End;
pub(crate) struct Time(pub(crate) i64);
pub(crate) struct FromEnd(pub(crate) u64);

impl From<Start> for At {
    fn from(_: Start) -> At {
        At(pb::offset_query::At::Start(pb::offset_query::Start {}))
    }
}

impl From<End> for At {
    fn from(_: End) -> At {
        At(pb::offset_query::At::End(pb::offset_query::End {}))
    }
}

impl From<Time> for At {
    fn from(time: Time) -> At {
        At(pb::offset_query::At::Timestamp(time.0))
    }
}

impl From<FromEnd> for At {
    fn from(records: FromEnd) -> At {
        At(pb::offset_query::At::RecordsFromEnd(records.0))
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Topic {
    pub(crate) name: String,
    pub(crate) id: Bytes,
}

pub(crate) struct Producer {
    requests: mpsc::Sender<pb::ProduceRequest>,
    answers: Streaming<pb::ProduceResponse>,
    ready: Vec<pb::ProduceResult>,
    next_id: u64,
}

impl Producer {
    pub(crate) async fn send(&mut self, topic: &Topic, partition: i32, batch: Bytes) -> u64 {
        self.send_acks(topic, partition, batch, pb::Acks::Quorum).await
    }

    pub(crate) async fn send_acks(&mut self, topic: &Topic, partition: i32, batch: Bytes, acks: pb::Acks) -> u64 {
        let request_id = self.next_id;
        self.next_id += 1;
        let request = pb::ProduceRequest {
            request_id,
            topic_id: topic.id.clone(),
            partition,
            acks: acks.into(),
            batch,
            ..Default::default()
        };
        soon("room to send", self.requests.send(request)).await.expect("the stream is open");
        request_id
    }

    pub(crate) fn try_send(&mut self, topic: &Topic, partition: i32, batch: Bytes) -> bool {
        let topic_id = topic.id.clone();
        let request = pb::ProduceRequest { request_id: self.next_id, topic_id, partition, batch, ..Default::default() };
        self.next_id += 1;
        self.requests.try_send(request).is_ok()
    }

    /// The next answer, whichever request it belongs to.
    pub(crate) async fn answer(&mut self) -> (u64, Result<i64, Error>) {
        let result = self.result().await.expect("the stream goes on").expect("an answer");
        let outcome = match &result.error {
            Some(error) => Err(Error::from_detail(error)),
            None => Ok(result.base_offset),
        };
        (result.request_id, outcome)
    }

    pub(crate) async fn result(&mut self) -> Result<Option<pb::ProduceResult>, Error> {
        while self.ready.is_empty() {
            match soon("an answer", self.answers.message()).await.map_err(|status| error_of(&status))? {
                Some(response) => self.ready = response.results,
                None => return Ok(None),
            }
        }
        Ok(Some(self.ready.remove(0)))
    }

    /// Sends no more; what is under way is still answered.
    pub(crate) fn finish(self) -> Producer {
        let (closed, _) = mpsc::channel(1);
        Producer { requests: closed, ..self }
    }
}

pub(crate) struct Fetcher {
    pub(crate) requests: mpsc::Sender<pb::FetchRequest>,
    pub(crate) answers: Streaming<pb::FetchResponse>,
}

impl Fetcher {
    pub(crate) async fn set(&mut self, fetch_id: u32, topic: &Topic, partition: i32, offset: i64, credit: u64) {
        let set = vec![position(fetch_id, topic, partition, offset)];
        self.send(pb::FetchRequest { set, remove: Vec::new(), credit_bytes: credit }).await;
    }

    pub(crate) async fn credit(&mut self, credit_bytes: u64) {
        self.send(pb::FetchRequest { credit_bytes, ..Default::default() }).await;
    }

    pub(crate) async fn send(&mut self, request: pb::FetchRequest) {
        soon("room to send", self.requests.send(request)).await.expect("the stream is open");
    }

    pub(crate) async fn response(&mut self) -> Result<pb::FetchResponse, Error> {
        let message = soon("a response", self.answers.message()).await.map_err(|status| error_of(&status))?;
        Ok(message.expect("the stream goes on"))
    }

    /// The error of the next response.
    pub(crate) async fn error(&mut self) -> Error {
        let response = self.response().await.expect("a response");
        Error::from_detail(&response.error.expect("an error"))
    }
}

pub(crate) fn position(fetch_id: u32, topic: &Topic, partition: i32, offset: i64) -> pb::FetchPartition {
    pb::FetchPartition {
        fetch_id,
        session: fetch_id,
        topic_id: topic.id.clone(),
        partition,
        offset,
        last_epoch: -1,
        from_any_replica: false,
        known_high_watermark: -1,
        ..Default::default()
    }
}

pub(crate) fn entries(configs: &[(&str, &str)]) -> Vec<pb::ConfigEntry> {
    configs.iter().map(|(key, value)| pb::ConfigEntry { key: (*key).to_owned(), value: (*value).to_owned() }).collect()
}

pub(crate) fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    since.as_millis() as i64
}

/// A batch of these values, stamped with the present.
pub(crate) fn batch(values: &[&str]) -> Bytes {
    batch_at(values, now())
}

pub(crate) fn batch_at(values: &[&str], timestamp: i64) -> Bytes {
    build(RecordBatchBuilder::new(Compression::None), values, timestamp)
}

pub(crate) fn sequenced(id: i64, epoch: i16, first: i32, values: &[&str]) -> Bytes {
    let builder = RecordBatchBuilder::new(Compression::None).producer(
        ProducerId::new(id),
        ProducerEpoch::new(epoch),
        Sequence::new(first),
    );
    build(builder, values, now())
}

pub(crate) fn build(mut builder: RecordBatchBuilder, values: &[&str], timestamp: i64) -> Bytes {
    for value in values {
        builder.append(Timestamp::new(timestamp), None, Some(value.as_bytes()), []).expect("fits");
    }
    builder.build()
}

/// Offset and value of every data record at or after `from`.
pub(crate) fn records(batches: &Bytes, from: i64) -> Vec<(i64, String)> {
    let mut found = Vec::new();
    for batch in split_batches(batches.clone()) {
        let (header, batch) = batch.expect("whole batches");
        if header.attributes.is_control() {
            continue;
        }
        for record in record::records(batch, 64 << 20).expect("valid") {
            let record = record.expect("valid");
            if record.offset.get() >= from {
                let value = record.value.unwrap_or_default();
                found.push((record.offset.get(), String::from_utf8(value.to_vec()).expect("text")));
            }
        }
    }
    found
}

/// Offset after the last batch.
pub(crate) fn next_offset(batches: &Bytes) -> i64 {
    let last = split_batches(batches.clone()).last().expect("a batch").expect("whole");
    last.0.next_offset().get()
}

pub(crate) fn error_of(status: &tonic::Status) -> Error {
    Error::from_status(status).unwrap_or_else(|| {
        Error::new(ErrorCode::Unspecified, format!("{:?} without a detail: {}", status.code(), status.message()))
    })
}

/// What was refused says so, and what to do.
pub(crate) fn assert_refused<T: std::fmt::Debug>(result: Result<T, Error>, code: ErrorCode, part: &str) {
    let error = result.expect_err(part);
    assert_eq!(error.code, code, "{error:?}");
    assert!(error.message.contains(part), "wanted `{part}` in: {}", error.message);
}
