//! A broker in memory with the produce and fetch rules of a real one, that refuses, forgets and goes silent on command.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use flowstone_protocol::batch::stamped_prefix;
use flowstone_protocol::pb::log_server::{Log, LogServer};
use flowstone_protocol::{BatchHeader, Error, ErrorCode, LeaderEpoch, Offset, ProducerId, Sequence, pb};
use futures::Stream;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// What happens to a produce request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should.
    Normal,
    /// Not stored; answered with this error.
    Refuse(ErrorCode),
    /// Stored; never answered.
    StoreSilently,
    /// Stored; answered with this error.
    StoreAndRefuse(ErrorCode),
    /// Neither stored nor answered.
    Ignore,
    /// Not stored; the stream ends with this error.
    EndStream(ErrorCode),
}

type Judge = Box<dyn FnMut(&pb::ProduceRequest, &BatchHeader) -> Verdict + Send>;

#[derive(Default)]
struct Part {
    batches: Vec<(Offset, Bytes)>,
    next: i64,
    log_start: i64,
    producers: HashMap<ProducerId, Known>,
}

struct Known {
    epoch: i16,
    last: VecDeque<(Sequence, Sequence, i64)>,
}

struct State {
    topics: Vec<(String, Bytes, Vec<Part>)>,
    judge: Option<Judge>,
    next_producer: i64,
    /// Keep nothing, answer at once: to measure the client alone.
    discard: bool,
    fetched_bytes: u64,
    sessions: usize,
}

pub struct FakeBroker {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    grown: watch::Sender<u64>,
    metadata: watch::Sender<i64>,
    advertised: Arc<Mutex<SocketAddr>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Service {
    advertised: Arc<Mutex<SocketAddr>>,
    state: Arc<Mutex<State>>,
    grown: watch::Sender<u64>,
    metadata: watch::Sender<i64>,
}

impl FakeBroker {
    pub async fn start(topics: &[(&str, usize)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let topics = topics.iter().zip(1_u8..).map(|((name, partitions), id)| {
            let parts = (0..*partitions).map(|_| Part::default()).collect();
            ((*name).to_owned(), Bytes::copy_from_slice(&[id; 16]), parts)
        });
        let state = State {
            topics: topics.collect(),
            judge: None,
            next_producer: 1000,
            discard: false,
            fetched_bytes: 0,
            sessions: 0,
        };
        let state = Arc::new(Mutex::new(state));
        let (grown, metadata) = (watch::Sender::new(0), watch::Sender::new(1));
        let advertised = Arc::new(Mutex::new(address));
        let service = Service {
            advertised: advertised.clone(),
            state: state.clone(),
            grown: grown.clone(),
            metadata: metadata.clone(),
        };
        let task = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .tcp_nodelay(true)
                .initial_stream_window_size(8 << 20)
                .initial_connection_window_size(16 << 20)
                .max_frame_size(256 << 10)
                .add_service(LogServer::new(service).max_decoding_message_size(64 << 20))
                .serve_with_incoming(TcpListenerStream::new(listener).map(|socket| {
                    let socket = socket?;
                    socket.set_nodelay(true)?;
                    Ok::<_, std::io::Error>(socket)
                }))
                .await
                .unwrap();
        });
        Self { address, state, grown, metadata, advertised, task }
    }

    /// Names another address in the metadata: a proxy's.
    pub fn advertise(self, address: SocketAddr) -> Self {
        *self.advertised.lock().unwrap() = address;
        self.metadata.send_modify(|offset| *offset += 1);
        self
    }

    /// Decides what happens to each produce request from now on.
    pub fn judge(&self, judge: impl FnMut(&pb::ProduceRequest, &BatchHeader) -> Verdict + Send + 'static) {
        self.state.lock().unwrap().judge = Some(Box::new(judge));
    }

    pub fn discard(&self) {
        self.state.lock().unwrap().discard = true;
    }

    /// Forgets all producers, as if their state had expired.
    pub fn forget_producers(&self) {
        for (_, _, parts) in &mut self.state.lock().unwrap().topics {
            parts.iter_mut().for_each(|part| part.producers.clear());
        }
    }

    pub fn trim(&self, topic: &str, partition: usize, to: i64) {
        let mut state = self.state.lock().unwrap();
        let (_, _, parts) = state.topics.iter_mut().find(|(name, ..)| name == topic).unwrap();
        parts[partition].log_start = to;
    }

    pub fn delete_topic(&self, topic: &str) {
        self.state.lock().unwrap().topics.retain(|(name, ..)| name != topic);
        self.metadata.send_modify(|offset| *offset += 1);
    }

    pub fn add_partition(&self, topic: &str) {
        let mut state = self.state.lock().unwrap();
        let (_, _, parts) = state.topics.iter_mut().find(|(name, ..)| name == topic).unwrap();
        parts.push(Part::default());
        drop(state);
        self.metadata.send_modify(|offset| *offset += 1);
    }

    pub fn fetched_bytes(&self) -> u64 {
        self.state.lock().unwrap().fetched_bytes
    }

    /// Fetch streams opened so far.
    pub fn fetch_sessions(&self) -> usize {
        self.state.lock().unwrap().sessions
    }

    /// All values of a partition, in order.
    pub fn values(&self, topic: &str, partition: usize) -> Vec<String> {
        let state = self.state.lock().unwrap();
        let (_, _, parts) = state.topics.iter().find(|(name, ..)| name == topic).unwrap();
        let mut values = Vec::new();
        for (_, batch) in &parts[partition].batches {
            for record in flowstone_protocol::record::records(batch.clone(), 64 << 20).unwrap() {
                values.push(String::from_utf8(record.unwrap().value.unwrap().to_vec()).unwrap());
            }
        }
        values
    }

    /// Epoch and base sequence of every batch of a partition, in order.
    pub fn sequences(&self, topic: &str, partition: usize) -> Vec<(i16, i32)> {
        let state = self.state.lock().unwrap();
        let (_, _, parts) = state.topics.iter().find(|(name, ..)| name == topic).unwrap();
        let header = |(_, batch): &(Offset, Bytes)| BatchHeader::parse(batch).unwrap();
        parts[partition].batches.iter().map(header).map(|h| (h.producer_epoch.get(), h.base_sequence.get())).collect()
    }
}

impl State {
    fn part(&mut self, topic_id: &[u8], partition: i32) -> Result<&mut Part, Error> {
        let unknown = || Error::new(ErrorCode::UnknownTopic, "no such topic");
        let (_, _, parts) = self.topics.iter_mut().find(|(_, id, _)| *id == topic_id).ok_or_else(unknown)?;
        parts.get_mut(partition as usize).ok_or_else(|| Error::new(ErrorCode::UnknownPartition, "no such partition"))
    }

    fn append(&mut self, request: &pb::ProduceRequest, header: &BatchHeader) -> Result<i64, Error> {
        let discard = self.discard;
        let part = self.part(&request.topic_id, request.partition)?;
        let base = part.next;
        if discard {
            part.next += i64::from(header.record_count);
            return Ok(base);
        }
        flowstone_protocol::batch::verify_crc(&request.batch).map_err(Error::from)?;
        if header.producer_id != ProducerId::NONE {
            let (epoch, first) = (header.producer_epoch.get(), header.base_sequence);
            match part.producers.get_mut(&header.producer_id) {
                None if first.get() == 0 => {}
                None => return Err(Error::new(ErrorCode::UnknownProducer, "unknown producer")),
                Some(known) if epoch < known.epoch => {
                    return Err(Error::new(ErrorCode::ProducerFenced, "old epoch"));
                }
                Some(known) if epoch > known.epoch => {
                    if first.get() != 0 {
                        return Err(Error::new(ErrorCode::OutOfOrderSequence, "a new epoch begins at 0"));
                    }
                    part.producers.remove(&header.producer_id);
                }
                Some(known) => {
                    if let Some((_, _, offset)) = known.last.iter().find(|(f, ..)| *f == first) {
                        return Ok(*offset);
                    }
                    let expected = known.last.back().unwrap().1.next();
                    if first != expected {
                        return Err(Error::new(ErrorCode::OutOfOrderSequence, "a gap"));
                    }
                }
            }
            let known = part.producers.entry(header.producer_id).or_insert(Known { epoch, last: VecDeque::new() });
            if known.last.len() == 5 {
                known.last.pop_front();
            }
            known.last.push_back((first, header.last_sequence(), base));
        }
        let mut batch = request.batch.to_vec();
        let prefix = stamped_prefix(&batch, Offset::new(base), LeaderEpoch::new(1));
        batch[..16].copy_from_slice(&prefix);
        part.batches.push((Offset::new(base), batch.into()));
        part.next += i64::from(header.record_count);
        Ok(base)
    }

    fn metadata(&self, address: SocketAddr, names: &[String], offset: i64) -> pb::MetadataResponse {
        let described = |(name, id, parts): &(String, Bytes, Vec<Part>)| pb::TopicMetadata {
            name: name.clone(),
            topic_id: id.clone(),
            partitions: (0..parts.len() as i32)
                .map(|partition| pb::PartitionMetadata { partition, leader_id: 1, leader_epoch: 1, replicas: vec![1] })
                .collect(),
            internal: false,
            error: None,
        };
        let topics = if names.is_empty() {
            self.topics.iter().map(described).collect()
        } else {
            let told = |name: &String| match self.topics.iter().find(|(known, ..)| known == name) {
                Some(topic) => described(topic),
                None => pb::TopicMetadata {
                    name: name.clone(),
                    error: Some(Error::new(ErrorCode::UnknownTopic, "no such topic; create it").to_detail()),
                    ..Default::default()
                },
            };
            names.iter().map(told).collect()
        };
        pb::MetadataResponse {
            cluster_id: "fake".into(),
            brokers: vec![pb::Broker { id: 1, address: address.to_string(), ..Default::default() }],
            controller_id: 1,
            topics,
            metadata_offset: offset,
        }
    }
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Log for Service {
    type ProduceStream = Out<pb::ProduceResponse>;
    type FetchStream = Out<pb::FetchResponse>;
    type WatchMetadataStream = Out<pb::MetadataUpdate>;

    async fn produce(
        &self,
        request: Request<Streaming<pb::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        let service = self.clone();
        let requests = request.into_inner();
        let answers = requests.filter_map(move |request| {
            let request = match request {
                Ok(request) => request,
                Err(status) => return Some(Err(status)),
            };
            let header = BatchHeader::parse(&request.batch).unwrap();
            let mut state = service.state.lock().unwrap();
            let verdict = match &mut state.judge {
                Some(judge) => judge(&request, &header),
                None => Verdict::Normal,
            };
            let told = |answer: Result<i64, Error>| pb::ProduceResponse {
                results: vec![pb::ProduceResult {
                    request_id: request.request_id,
                    base_offset: *answer.as_ref().unwrap_or(&-1),
                    log_append_time: -1,
                    error: answer.err().map(|error| error.to_detail()),
                }],
            };
            let refused = |code| Err(Error::new(code, "as the test wants it"));
            let answer = match verdict {
                Verdict::Normal => Some(Ok(told(state.append(&request, &header)))),
                Verdict::Refuse(code) => Some(Ok(told(refused(code)))),
                // What follows a batch that is missing is refused for that.
                Verdict::StoreAndRefuse(code) => Some(Ok(told(state.append(&request, &header).and(refused(code))))),
                Verdict::StoreSilently => state.append(&request, &header).err().map(|error| Ok(told(Err(error)))),
                Verdict::Ignore => None,
                Verdict::EndStream(code) => Some(Err(Error::new(code, "as the test wants it").to_status())),
            };
            service.grown.send_modify(|grown| *grown += 1);
            answer.filter(|_| request.acks() != pb::Acks::None)
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch(
        &self,
        request: Request<Streaming<pb::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let (sender, receiver) = mpsc::channel(1);
        let (state, mut grown) = (self.state.clone(), self.grown.subscribe());
        state.lock().unwrap().sessions += 1;
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            let mut wanted: HashMap<u32, pb::FetchPartition> = HashMap::new();
            let mut credit = 0_i64;
            loop {
                let response = {
                    let mut state = state.lock().unwrap();
                    let mut found = None;
                    for (id, want) in &mut wanted {
                        let response = pb::FetchResponse { fetch_id: *id, session: want.session, ..Default::default() };
                        let part = match state.part(&want.topic_id, want.partition) {
                            Ok(part) => part,
                            Err(error) => {
                                found = Some(pb::FetchResponse { error: Some(error.to_detail()), ..response });
                                break;
                            }
                        };
                        let (log_start, high_watermark) = (part.log_start, part.next);
                        let response = pb::FetchResponse { high_watermark, log_start, ..response };
                        if want.offset < log_start || want.offset > high_watermark {
                            let text = format!("offset {} is out of range {log_start}..{high_watermark}", want.offset);
                            let error = Error::new(ErrorCode::OffsetOutOfRange, text);
                            found = Some(pb::FetchResponse { error: Some(error.to_detail()), ..response });
                            break;
                        }
                        let after = part.batches.partition_point(|(base, _)| base.get() <= want.offset);
                        let held = after
                            .checked_sub(1)
                            .and_then(|at| part.batches.get(at))
                            .filter(|(_, batch)| BatchHeader::parse(batch).unwrap().next_offset().get() > want.offset);
                        let Some((_, batch)) = held.filter(|_| credit > 0) else { continue };
                        want.offset = BatchHeader::parse(batch).unwrap().next_offset().get();
                        found = Some(pb::FetchResponse { batches: batch.clone(), ..response });
                        break;
                    }
                    if let Some(response) = &found {
                        if response.error.is_some() {
                            wanted.remove(&response.fetch_id);
                        }
                        credit -= response.batches.len() as i64;
                        state.fetched_bytes += response.batches.len() as u64;
                    }
                    found
                };
                if let Some(response) = response {
                    if sender.send(Ok(response)).await.is_err() {
                        return;
                    }
                    continue;
                }
                tokio::select! {
                    request = requests.next() => {
                        let Some(Ok(request)) = request else { return };
                        credit += request.credit_bytes as i64;
                        for id in request.remove {
                            wanted.remove(&id);
                        }
                        wanted.extend(request.set.into_iter().map(|want| (want.fetch_id, want)));
                    }
                    _ = grown.changed() => {}
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn metadata(&self, request: Request<pb::MetadataRequest>) -> Result<Response<pb::MetadataResponse>, Status> {
        let names = request.into_inner().topics;
        let offset = *self.metadata.borrow();
        Ok(Response::new(self.state.lock().unwrap().metadata(*self.advertised.lock().unwrap(), &names, offset)))
    }

    async fn watch_metadata(
        &self,
        _: Request<pb::WatchMetadataRequest>,
    ) -> Result<Response<Self::WatchMetadataStream>, Status> {
        let service = self.clone();
        let known: Arc<Mutex<Vec<Bytes>>> = Arc::default();
        let changes = tokio_stream::wrappers::WatchStream::new(self.metadata.subscribe());
        let updates = changes.map(move |offset| {
            let metadata = service.state.lock().unwrap().metadata(*service.advertised.lock().unwrap(), &[], offset);
            let ids: Vec<Bytes> = metadata.topics.iter().map(|topic| topic.topic_id.clone()).collect();
            let mut known = known.lock().unwrap();
            let deleted = known.iter().filter(|id| !ids.contains(id)).cloned().collect();
            *known = ids;
            Ok(pb::MetadataUpdate { metadata: Some(metadata), deleted_topic_ids: deleted })
        });
        Ok(Response::new(Box::pin(updates)))
    }

    async fn list_offsets(
        &self,
        request: Request<pb::ListOffsetsRequest>,
    ) -> Result<Response<pb::ListOffsetsResponse>, Status> {
        let mut state = self.state.lock().unwrap();
        let answers = request.into_inner().queries.into_iter().map(|query| {
            let part = match state.part(&query.topic_id, query.partition) {
                Ok(part) => part,
                Err(error) => return pb::OffsetAnswer { error: Some(error.to_detail()), ..Default::default() },
            };
            let offset = match query.at.unwrap() {
                pb::offset_query::At::Start(_) => part.log_start,
                pb::offset_query::At::End(_) | pb::offset_query::At::Timestamp(_) => part.next,
                pb::offset_query::At::RecordsFromEnd(records) => (part.next - records as i64).max(part.log_start),
            };
            pb::OffsetAnswer {
                offset,
                timestamp: -1,
                log_start: part.log_start,
                high_watermark: part.next,
                records: (part.next - part.log_start) as u64,
                error: None,
            }
        });
        Ok(Response::new(pb::ListOffsetsResponse { answers: answers.collect() }))
    }

    async fn init_producer(
        &self,
        _: Request<pb::InitProducerRequest>,
    ) -> Result<Response<pb::InitProducerResponse>, Status> {
        let mut state = self.state.lock().unwrap();
        state.next_producer += 1;
        Ok(Response::new(pb::InitProducerResponse { producer_id: state.next_producer, producer_epoch: 0 }))
    }
}
