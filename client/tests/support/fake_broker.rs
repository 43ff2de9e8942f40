//! A broker in memory with the produce and fetch rules of a real one, that refuses, forgets and goes silent on command;
//! or several that share one log and one metadata, each with its own view of both.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use flowstone_protocol::batch::stamped_prefix;
use flowstone_protocol::pb::admin_server::{Admin, AdminServer};
use flowstone_protocol::pb::log_server::{Log, LogServer};
use flowstone_protocol::{BatchHeader, BrokerId, Error, ErrorCode, LeaderEpoch, Offset, ProducerId, Sequence, pb};
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

struct Part {
    batches: Vec<(Offset, Bytes)>,
    next: i64,
    log_start: i64,
    producers: HashMap<ProducerId, Known>,
    leader: i32,
    epoch: i32,
    replicas: Vec<i32>,
}

impl Part {
    fn on(replicas: Vec<i32>) -> Self {
        let leader = replicas[0];
        Self { batches: Vec::new(), next: 0, log_start: 0, producers: HashMap::new(), leader, epoch: 1, replicas }
    }
}

struct Known {
    epoch: i16,
    last: VecDeque<(Sequence, Sequence, i64)>,
}

/// What all brokers of a cluster share: the log is committed as soon as it is appended.
struct State {
    topics: Vec<(String, Bytes, Vec<Part>)>,
    /// The next topic's id, repeated.
    next_topic: u8,
    next_producer: i64,
    controller: i32,
    brokers: Vec<Member>,
}

/// A broker as the others know it.
struct Member {
    id: i32,
    rack: String,
    address: SocketAddr,
    alive: bool,
}

/// A broker's own: what it sees, and what is wrong with it.
struct Own {
    judge: Option<Judge>,
    /// Keep nothing, answer at once: to measure the client alone.
    discard: bool,
    fetched_bytes: u64,
    sessions: usize,
    produced: usize,
    metadata_calls: usize,
    watches: usize,
    /// The metadata as this broker sees it, from then on.
    frozen: Option<(pb::MetadataResponse, i64)>,
    /// Whom it takes for the leader when it is asked and does not lead; the truth unless set.
    hint: Option<i32>,
    /// A follower knows that much to be committed.
    committed: Option<i64>,
    /// A reader that knows more is told to retry, rather than made to wait.
    impatient: bool,
    /// High watermarks told to readers, in order.
    watermarks: Vec<i64>,
    admin: AdminFault,
    admin_calls: usize,
}

/// What happens to administration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdminFault {
    #[default]
    None,
    /// The next request is carried out, and its answer lost.
    LoseAnswer,
    /// The next request is lost.
    LoseRequest,
}

/// The log and the metadata of a cluster.
#[derive(Clone)]
pub struct Shared {
    state: Arc<Mutex<State>>,
    grown: watch::Sender<u64>,
    metadata: watch::Sender<i64>,
}

pub struct FakeBroker {
    pub id: i32,
    pub address: SocketAddr,
    shared: Shared,
    own: Arc<Mutex<Own>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Service {
    id: i32,
    shared: Shared,
    own: Arc<Mutex<Own>>,
}

impl Shared {
    /// Topics with partitions on these brokers, led by the first of them.
    pub fn new(topics: &[(&str, usize)], replicas: &[i32]) -> Self {
        let state = State {
            topics: Vec::new(),
            next_topic: 1,
            next_producer: 1000,
            controller: replicas[0],
            brokers: Vec::new(),
        };
        let shared =
            Self { state: Arc::new(Mutex::new(state)), grown: watch::Sender::new(0), metadata: watch::Sender::new(1) };
        for (name, partitions) in topics {
            shared.state.lock().unwrap().add_topic(name, *partitions, replicas);
        }
        shared
    }

    /// Tells whoever watches.
    pub fn announce(&self) {
        self.metadata.send_modify(|offset| *offset += 1);
    }

    /// Another leader, since the next epoch. Nobody is told.
    pub fn lead(&self, topic: &str, partition: usize, broker: i32) {
        let mut state = self.state.lock().unwrap();
        let (_, _, parts) = state.topics.iter_mut().find(|(name, ..)| name == topic).unwrap();
        parts[partition].leader = broker;
        parts[partition].epoch += 1;
        drop(state);
        self.grown.send_modify(|grown| *grown += 1);
    }

    /// The broker that leads the metadata.
    pub fn set_controller(&self, broker: i32) {
        self.state.lock().unwrap().controller = broker;
    }

    /// Whether a broker is there, as the metadata has it.
    pub fn set_alive(&self, broker: i32, alive: bool) {
        let mut state = self.state.lock().unwrap();
        state.brokers.iter_mut().find(|member| member.id == broker).unwrap().alive = alive;
    }

    /// A topic made by somebody else, which nobody is told of.
    pub fn add_topic(&self, name: &str, partitions: usize, replicas: &[i32]) {
        self.state.lock().unwrap().add_topic(name, partitions, replicas);
    }

    pub fn topic_names(&self) -> Vec<String> {
        self.state.lock().unwrap().topics.iter().map(|(name, ..)| name.clone()).collect()
    }
}

impl FakeBroker {
    /// A broker alone.
    pub async fn start(topics: &[(&str, usize)]) -> Self {
        Self::join(1, "", &Shared::new(topics, &[1])).await
    }

    /// A broker of a cluster.
    pub async fn join(id: i32, rack: &str, shared: &Shared) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = shared.clone();
        let member = Member { id, rack: rack.to_owned(), address, alive: true };
        shared.state.lock().unwrap().brokers.push(member);
        let own = Arc::new(Mutex::new(Own {
            judge: None,
            discard: false,
            fetched_bytes: 0,
            sessions: 0,
            produced: 0,
            metadata_calls: 0,
            watches: 0,
            frozen: None,
            hint: None,
            committed: None,
            impatient: false,
            watermarks: Vec::new(),
            admin: AdminFault::None,
            admin_calls: 0,
        }));
        let service = Service { id, shared: shared.clone(), own: own.clone() };
        let task = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .tcp_nodelay(true)
                .initial_stream_window_size(8 << 20)
                .initial_connection_window_size(16 << 20)
                .max_frame_size(256 << 10)
                .add_service(LogServer::new(service.clone()).max_decoding_message_size(64 << 20))
                .add_service(AdminServer::new(service))
                .serve_with_incoming(TcpListenerStream::new(listener).map(|socket| {
                    let socket = socket?;
                    socket.set_nodelay(true)?;
                    Ok::<_, std::io::Error>(socket)
                }))
                .await
                .unwrap();
        });
        Self { id, address, shared, own, task }
    }

    fn own(&self) -> std::sync::MutexGuard<'_, Own> {
        self.own.lock().unwrap()
    }

    /// Sees no change of the metadata any more.
    pub fn freeze_metadata(&self) {
        let offset = *self.shared.metadata.borrow();
        let seen = self.shared.state.lock().unwrap().metadata(&[], offset);
        self.own().frozen = Some((seen, offset));
    }

    /// Takes this broker for the leader of whatever it does not lead itself.
    pub fn hint_at(&self, broker: Option<i32>) {
        self.own().hint = broker;
    }

    /// As a follower, knows only so much to be committed.
    pub fn set_committed(&self, offset: Option<i64>, impatient: bool) {
        let mut own = self.own();
        own.committed = offset;
        own.impatient = impatient;
        drop(own);
        self.shared.grown.send_modify(|grown| *grown += 1);
    }

    pub fn set_admin_fault(&self, fault: AdminFault) {
        self.own().admin = fault;
    }

    pub fn admin_calls(&self) -> usize {
        self.own().admin_calls
    }

    /// Requests to produce so far.
    pub fn produced(&self) -> usize {
        self.own().produced
    }

    /// Calls of Metadata and watches so far.
    pub fn metadata_calls(&self) -> (usize, usize) {
        let own = self.own();
        (own.metadata_calls, own.watches)
    }

    /// High watermarks told to readers.
    pub fn watermarks(&self) -> Vec<i64> {
        self.own().watermarks.clone()
    }

    /// Names another address in the metadata: a proxy's.
    pub fn advertise(self, address: SocketAddr) -> Self {
        let mut state = self.shared.state.lock().unwrap();
        state.brokers.iter_mut().find(|member| member.id == self.id).unwrap().address = address;
        drop(state);
        self.shared.announce();
        self
    }

    /// Decides what happens to each produce request from now on.
    pub fn judge(&self, judge: impl FnMut(&pb::ProduceRequest, &BatchHeader) -> Verdict + Send + 'static) {
        self.own().judge = Some(Box::new(judge));
    }

    pub fn discard(&self) {
        self.own().discard = true;
    }

    /// Forgets all producers, as if their state had expired.
    pub fn forget_producers(&self) {
        for (_, _, parts) in &mut self.shared.state.lock().unwrap().topics {
            parts.iter_mut().for_each(|part| part.producers.clear());
        }
    }

    pub fn trim(&self, topic: &str, partition: usize, to: i64) {
        let mut state = self.shared.state.lock().unwrap();
        let (_, _, parts) = state.topics.iter_mut().find(|(name, ..)| name == topic).unwrap();
        parts[partition].log_start = to;
    }

    pub fn delete_topic(&self, topic: &str) {
        self.shared.state.lock().unwrap().topics.retain(|(name, ..)| name != topic);
        self.shared.announce();
    }

    pub fn add_partition(&self, topic: &str) {
        let mut state = self.shared.state.lock().unwrap();
        let (_, _, parts) = state.topics.iter_mut().find(|(name, ..)| name == topic).unwrap();
        let replicas = parts[0].replicas.clone();
        parts.push(Part::on(replicas));
        drop(state);
        self.shared.announce();
    }

    pub fn fetched_bytes(&self) -> u64 {
        self.own().fetched_bytes
    }

    /// Fetch streams opened so far.
    pub fn fetch_sessions(&self) -> usize {
        self.own().sessions
    }

    /// All values of a partition, in order.
    pub fn values(&self, topic: &str, partition: usize) -> Vec<String> {
        let state = self.shared.state.lock().unwrap();
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
        let state = self.shared.state.lock().unwrap();
        let (_, _, parts) = state.topics.iter().find(|(name, ..)| name == topic).unwrap();
        let header = |(_, batch): &(Offset, Bytes)| BatchHeader::parse(batch).unwrap();
        parts[partition].batches.iter().map(header).map(|h| (h.producer_epoch.get(), h.base_sequence.get())).collect()
    }
}

impl State {
    fn add_topic(&mut self, name: &str, partitions: usize, replicas: &[i32]) {
        let parts = (0..partitions).map(|_| Part::on(replicas.to_vec())).collect();
        self.topics.push((name.to_owned(), Bytes::copy_from_slice(&[self.next_topic; 16]), parts));
        self.next_topic += 1;
    }

    fn address(&self, broker: i32) -> String {
        self.brokers
            .iter()
            .find(|member| member.id == broker)
            .map(|member| member.address.to_string())
            .unwrap_or_default()
    }

    fn part(&mut self, topic_id: &[u8], partition: i32) -> Result<&mut Part, Error> {
        let unknown = || Error::new(ErrorCode::UnknownTopic, "no such topic");
        let (_, _, parts) = self.topics.iter_mut().find(|(_, id, _)| *id == topic_id).ok_or_else(unknown)?;
        parts.get_mut(partition as usize).ok_or_else(|| Error::new(ErrorCode::UnknownPartition, "no such partition"))
    }

    fn append(&mut self, request: &pb::ProduceRequest, header: &BatchHeader, discard: bool) -> Result<i64, Error> {
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
        let prefix = stamped_prefix(&batch, Offset::new(base), LeaderEpoch::new(part.epoch));
        batch[..16].copy_from_slice(&prefix);
        part.batches.push((Offset::new(base), batch.into()));
        part.next += i64::from(header.record_count);
        Ok(base)
    }

    fn metadata(&self, names: &[String], offset: i64) -> pb::MetadataResponse {
        let alive = |broker: &i32| self.brokers.iter().any(|member| member.id == *broker && member.alive);
        let described = |(name, id, parts): &(String, Bytes, Vec<Part>)| pb::TopicMetadata {
            name: name.clone(),
            topic_id: id.clone(),
            partitions: parts
                .iter()
                .zip(0..)
                .map(|(part, partition)| pb::PartitionMetadata {
                    partition,
                    leader_id: part.leader,
                    leader_epoch: part.epoch,
                    replicas: part.replicas.clone(),
                    alive: part.replicas.iter().copied().filter(alive).collect(),
                })
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
            brokers: self
                .brokers
                .iter()
                .map(|member| pb::Broker {
                    id: member.id,
                    address: member.address.to_string(),
                    rack: member.rack.clone(),
                    version: "fake".into(),
                })
                .collect(),
            controller_id: self.controller,
            topics,
            metadata_offset: offset,
            metadata_recovery: 0,
        }
    }
}

impl Service {
    /// Refused where another broker leads.
    fn check_leads(&self, state: &mut State, topic_id: &[u8], partition: i32) -> Result<(), Error> {
        let leader = state.part(topic_id, partition)?.leader;
        if leader == self.id {
            return Ok(());
        }
        let leader = self.own.lock().unwrap().hint.unwrap_or(leader);
        let error = Error::new(ErrorCode::NotLeader, format!("broker {} does not lead it", self.id));
        Err(if leader < 0 { error } else { error.with_leader(BrokerId::new(leader), state.address(leader)) })
    }

    fn seen_metadata(&self, names: &[String]) -> pb::MetadataResponse {
        let offset = *self.shared.metadata.borrow();
        let state = self.shared.state.lock().unwrap();
        match &self.own.lock().unwrap().frozen {
            None => state.metadata(names, offset),
            Some((seen, _)) => {
                let mut seen = seen.clone();
                if !names.is_empty() {
                    seen.topics.retain(|topic| names.contains(&topic.name));
                    for name in names
                        .iter()
                        .filter(|name| !seen.topics.iter().any(|topic| topic.name == **name))
                        .cloned()
                        .collect::<Vec<_>>()
                    {
                        let error = Some(Error::new(ErrorCode::UnknownTopic, "no such topic; create it").to_detail());
                        seen.topics.push(pb::TopicMetadata { name, error, ..Default::default() });
                    }
                }
                seen
            }
        }
    }

    /// Carries a request out, unless a fault is set, which then is over. Only the controller carries anything out.
    fn administer<T>(&self, act: impl FnOnce(&mut State) -> Result<T, Error>) -> Result<Response<T>, Status> {
        let mut own = self.own.lock().unwrap();
        own.admin_calls += 1;
        let fault = std::mem::take(&mut own.admin);
        let hint = own.hint;
        drop(own);
        let lost = || Status::unavailable("lost, as the test wants it");
        if fault == AdminFault::LoseRequest {
            return Err(lost());
        }
        let mut state = self.shared.state.lock().unwrap();
        if state.controller != self.id {
            let controller = hint.unwrap_or(state.controller);
            let error = Error::new(ErrorCode::NotLeader, "another broker leads the metadata");
            return Err(error.with_leader(BrokerId::new(controller), state.address(controller)).to_status());
        }
        let done = act(&mut state).map_err(|error| error.to_status());
        drop(state);
        self.shared.announce();
        if fault == AdminFault::LoseAnswer { Err(lost()) } else { done.map(Response::new) }
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
            let mut state = service.shared.state.lock().unwrap();
            let (verdict, discard) = {
                let mut own = service.own.lock().unwrap();
                own.produced += 1;
                let verdict = own.judge.as_mut().map_or(Verdict::Normal, |judge| judge(&request, &header));
                (verdict, own.discard)
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
            let mut append = || {
                service.check_leads(&mut state, &request.topic_id, request.partition)?;
                state.append(&request, &header, discard)
            };
            let answer = match verdict {
                Verdict::Normal => Some(Ok(told(append()))),
                Verdict::Refuse(code) => Some(Ok(told(refused(code)))),
                // What follows a batch that is missing is refused for that.
                Verdict::StoreAndRefuse(code) => Some(Ok(told(append().and(refused(code))))),
                Verdict::StoreSilently => append().err().map(|error| Ok(told(Err(error)))),
                Verdict::Ignore => None,
                Verdict::EndStream(code) => Some(Err(Error::new(code, "as the test wants it").to_status())),
            };
            service.shared.grown.send_modify(|grown| *grown += 1);
            answer.filter(|_| request.acks() != pb::Acks::None)
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch(
        &self,
        request: Request<Streaming<pb::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let (sender, receiver) = mpsc::channel(1);
        let (service, mut grown) = (self.clone(), self.shared.grown.subscribe());
        service.own.lock().unwrap().sessions += 1;
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            let mut wanted: HashMap<u32, pb::FetchPartition> = HashMap::new();
            let mut credit = 0_i64;
            loop {
                let response = {
                    let mut state = service.shared.state.lock().unwrap();
                    let mut found = None;
                    for (id, want) in &mut wanted {
                        let response = pb::FetchResponse { fetch_id: *id, session: want.session, ..Default::default() };
                        if !want.from_any_replica
                            && let Err(error) = service.check_leads(&mut state, &want.topic_id, want.partition)
                        {
                            found = Some(pb::FetchResponse { error: Some(error.to_detail()), ..response });
                            break;
                        }
                        let part = match state.part(&want.topic_id, want.partition) {
                            Ok(part) => part,
                            Err(error) => {
                                found = Some(pb::FetchResponse { error: Some(error.to_detail()), ..response });
                                break;
                            }
                        };
                        let (log_start, mut high_watermark) = (part.log_start, part.next);
                        if part.leader != service.id {
                            let own = service.own.lock().unwrap();
                            high_watermark = high_watermark.min(own.committed.unwrap_or(i64::MAX));
                            if want.known_high_watermark > high_watermark {
                                if own.impatient {
                                    let error = Error::new(ErrorCode::LeaderNotReady, "this replica is behind");
                                    found = Some(pb::FetchResponse { error: Some(error.to_detail()), ..response });
                                    break;
                                }
                                continue;
                            }
                        }
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
                            .filter(|(_, batch)| BatchHeader::parse(batch).unwrap().next_offset().get() > want.offset)
                            .filter(|(base, _)| base.get() < high_watermark);
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
                        let mut own = service.own.lock().unwrap();
                        own.fetched_bytes += response.batches.len() as u64;
                        if response.error.is_none() {
                            own.watermarks.push(response.high_watermark);
                        }
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
        self.own.lock().unwrap().metadata_calls += 1;
        Ok(Response::new(self.seen_metadata(&request.into_inner().topics)))
    }

    async fn watch_metadata(
        &self,
        _: Request<pb::WatchMetadataRequest>,
    ) -> Result<Response<Self::WatchMetadataStream>, Status> {
        let service = self.clone();
        service.own.lock().unwrap().watches += 1;
        let known: Arc<Mutex<Vec<Bytes>>> = Arc::default();
        let changes = tokio_stream::wrappers::WatchStream::new(self.shared.metadata.subscribe());
        let updates = changes.map(move |_| {
            let metadata = service.seen_metadata(&[]);
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
        let mut state = self.shared.state.lock().unwrap();
        let answers = request.into_inner().queries.into_iter().map(|query| {
            if let Err(error) = self.check_leads(&mut state, &query.topic_id, query.partition) {
                return pb::OffsetAnswer { error: Some(error.to_detail()), ..Default::default() };
            }
            let part = match state.part(&query.topic_id, query.partition) {
                Ok(part) => part,
                Err(error) => return pb::OffsetAnswer { error: Some(error.to_detail()), ..Default::default() },
            };
            let offset = match query.at.unwrap() {
                pb::offset_query::At::Start(_) => part.log_start,
                pb::offset_query::At::End(_) | pb::offset_query::At::Timestamp(_) => part.next,
                pb::offset_query::At::RecordsFromEnd(records) => (part.next - records as i64).max(part.log_start),
                pb::offset_query::At::RecordsFrom(offset) => offset.clamp(part.log_start, part.next),
            };
            pb::OffsetAnswer {
                offset,
                timestamp: -1,
                log_start: part.log_start,
                high_watermark: part.next,
                records: (part.next - part.log_start) as u64,
                error: None,
                last_stable_offset: part.next,
            }
        });
        Ok(Response::new(pb::ListOffsetsResponse { answers: answers.collect() }))
    }

    async fn init_producer(
        &self,
        _: Request<pb::InitProducerRequest>,
    ) -> Result<Response<pb::InitProducerResponse>, Status> {
        let mut state = self.shared.state.lock().unwrap();
        state.next_producer += 1;
        Ok(Response::new(pb::InitProducerResponse { producer_id: state.next_producer, producer_epoch: 0 }))
    }
}

fn described(state: &State, name: &str) -> Result<pb::TopicDescription, Error> {
    let unknown = || Error::new(ErrorCode::UnknownTopic, "no such topic");
    let (_, id, parts) = state.topics.iter().find(|(known, ..)| known == name).ok_or_else(unknown)?;
    let partitions = parts.iter().zip(0..).map(|(part, partition)| pb::PartitionDescription {
        partition,
        leader_id: part.leader,
        replicas: part.replicas.clone(),
        ..Default::default()
    });
    Ok(pb::TopicDescription {
        name: name.to_owned(),
        topic_id: id.clone(),
        replication_factor: parts[0].replicas.len() as i32,
        partitions: partitions.collect(),
        ..Default::default()
    })
}

/// What a fake broker does not do. Written as `async_trait` would: it does not see into macros.
macro_rules! not_done {
    ($($call:ident: $request:ident -> $response:ident),* $(,)?) => {
        $(fn $call<'broker, 'call>(
            &'broker self,
            _: Request<pb::$request>,
        ) -> Pin<Box<dyn Future<Output = Result<Response<pb::$response>, Status>> + Send + 'call>>
        where
            'broker: 'call,
            Self: 'call,
        {
            Box::pin(std::future::ready(Err(Status::unimplemented("a fake broker does not do this"))))
        })*
    };
}

#[tonic::async_trait]
impl Admin for Service {
    async fn create_topic(
        &self,
        request: Request<pb::CreateTopicRequest>,
    ) -> Result<Response<pb::CreateTopicResponse>, Status> {
        let request = request.into_inner();
        self.administer(|state| {
            if state.topics.iter().any(|(name, ..)| *name == request.name) {
                return Err(Error::new(ErrorCode::TopicAlreadyExists, "it exists"));
            }
            let brokers: Vec<i32> = state.brokers.iter().map(|member| member.id).collect();
            state.add_topic(&request.name, request.partitions.max(1) as usize, &brokers);
            Ok(pb::CreateTopicResponse { topic: Some(described(state, &request.name)?) })
        })
    }

    async fn describe_topic(
        &self,
        request: Request<pb::DescribeTopicRequest>,
    ) -> Result<Response<pb::DescribeTopicResponse>, Status> {
        let name = request.into_inner().name;
        self.administer(|state| Ok(pb::DescribeTopicResponse { topic: Some(described(state, &name)?) }))
    }

    async fn alter_topic(
        &self,
        request: Request<pb::AlterTopicRequest>,
    ) -> Result<Response<pb::AlterTopicResponse>, Status> {
        let request = request.into_inner();
        self.administer(|state| {
            let unknown = || Error::new(ErrorCode::UnknownTopic, "no such topic");
            let (_, _, parts) = state.topics.iter_mut().find(|(name, ..)| *name == request.name).ok_or_else(unknown)?;
            if request.partitions as usize <= parts.len() {
                return Err(Error::new(ErrorCode::InvalidPartitions, "there can only be more"));
            }
            let replicas = parts[0].replicas.clone();
            parts.resize_with(request.partitions as usize, || Part::on(replicas.clone()));
            Ok(pb::AlterTopicResponse { topic: Some(described(state, &request.name)?) })
        })
    }

    async fn delete_topic(
        &self,
        request: Request<pb::DeleteTopicRequest>,
    ) -> Result<Response<pb::DeleteTopicResponse>, Status> {
        let name = request.into_inner().name;
        self.administer(|state| {
            let topic_id = described(state, &name)?.topic_id;
            state.topics.retain(|(known, ..)| *known != name);
            Ok(pb::DeleteTopicResponse { topic_id })
        })
    }

    async fn decommission_broker(
        &self,
        request: Request<pb::DecommissionBrokerRequest>,
    ) -> Result<Response<pb::DecommissionBrokerResponse>, Status> {
        let id = request.into_inner().broker_id;
        self.administer(|state| {
            if !state.brokers.iter().any(|member| member.id == id) {
                return Err(Error::new(ErrorCode::InvalidRequest, "no such broker"));
            }
            state.brokers.retain(|member| member.id != id);
            Ok(pb::DecommissionBrokerResponse {})
        })
    }

    async fn describe_cluster(
        &self,
        _: Request<pb::DescribeClusterRequest>,
    ) -> Result<Response<pb::DescribeClusterResponse>, Status> {
        self.administer(|state| {
            let metadata = state.metadata(&[], 0);
            Ok(pb::DescribeClusterResponse {
                cluster_id: metadata.cluster_id,
                controller_id: state.controller,
                brokers: metadata.brokers,
                ..Default::default()
            })
        })
    }

    not_done! {
        list_topics: ListTopicsRequest -> ListTopicsResponse,
        trim_partition: TrimPartitionRequest -> TrimPartitionResponse,
        cluster_health: ClusterHealthRequest -> ClusterHealthResponse,
        drain_broker: DrainBrokerRequest -> DrainBrokerResponse,
        replace_broker: ReplaceBrokerRequest -> ReplaceBrokerResponse,
        move_partition: MovePartitionRequest -> MovePartitionResponse,
        cancel_move: CancelMoveRequest -> CancelMoveResponse,
        list_moves: ListMovesRequest -> ListMovesResponse,
        transfer_leader: TransferLeaderRequest -> TransferLeaderResponse,
        rebalance: RebalanceRequest -> RebalanceResponse,
        recover_partition: RecoverPartitionRequest -> RecoverPartitionResponse,
    }
}
