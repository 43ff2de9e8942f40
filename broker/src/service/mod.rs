//! The gRPC services: each call is one file, dispatch only matches.

mod admin;
mod brokers;
mod coordinators;
mod early;
mod fetch;
mod fetch_body;
mod groups;
mod metadata;
mod offsets;
mod partitions;
mod produce;
mod topics;
mod transactions;

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use flowstone_protocol::pb::log_server::{Log, LogServer};
use flowstone_protocol::{Error, ErrorCode, PartitionId, Timestamp, TopicId, TopicName, TopicPartition, pb};
use futures::stream;
use prost::Message;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::metrics::Api;
use crate::node::Node;
use crate::partition::{OpenPartition, Slot};
use crate::receiving::Held;

pub(crate) use admin::{AdminService, forwarded};
pub(crate) use coordinators::{CoordinatorsService, confirmed, coordinator, coordinator_broker, submit};
pub(crate) use early::{EarlyAdmin, RECOVER_PATH, starting};
pub(crate) use groups::GroupsService;
pub(crate) use produce::REQUEST_BYTES_MIN;
pub(crate) use transactions::TransactionsService;

/// `flowstone.v1.Log`.
#[derive(Clone, Debug)]
pub(crate) struct LogService {
    node: Arc<Node>,
}

impl LogService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

#[tonic::async_trait]
impl Log for LogService {
    type ProduceStream = produce::ProduceSession;
    type FetchStream = stream::Empty<Result<pb::FetchResponse, Status>>;
    type WatchMetadataStream = metadata::MetadataWatch;

    async fn produce(
        &self,
        request: Request<Streaming<pb::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        let held = request.extensions().get::<Held>().cloned().unwrap_or_default();
        Ok(Response::new(produce::ProduceSession::new(Arc::clone(&self.node), request.into_inner(), held)))
    }

    /// Never called: [`LogCalls`] takes this path before the generated service sees it.
    async fn fetch(
        &self,
        _request: Request<Streaming<pb::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        Err(Status::internal("Fetch did not reach its own service"))
    }

    async fn metadata(&self, request: Request<pb::MetadataRequest>) -> Result<Response<pb::MetadataResponse>, Status> {
        let request = request.get_ref();
        counted(&self.node, Api::Metadata, request.encoded_len(), metadata::metadata(&self.node, request)).await
    }

    async fn watch_metadata(
        &self,
        request: Request<pb::WatchMetadataRequest>,
    ) -> Result<Response<Self::WatchMetadataStream>, Status> {
        Ok(Response::new(metadata::watch(Arc::clone(&self.node), request.get_ref().include_internal)))
    }

    async fn list_offsets(
        &self,
        request: Request<pb::ListOffsetsRequest>,
    ) -> Result<Response<pb::ListOffsetsResponse>, Status> {
        let request = request.into_inner();
        let bytes = request.encoded_len();
        counted(&self.node, Api::ListOffsets, bytes, offsets::list_offsets(&self.node, request)).await
    }

    async fn init_producer(
        &self,
        _request: Request<pb::InitProducerRequest>,
    ) -> Result<Response<pb::InitProducerResponse>, Status> {
        // Random, so that no broker needs to ask another; 63 bits, so that two alike are not to be expected.
        let producer_id = (rand::random::<u64>() >> 1) as i64;
        Ok(Response::new(pb::InitProducerResponse { producer_id, producer_epoch: 0 }))
    }
}

/// `flowstone.v1.Log` as it is served: the generated service, but for `Fetch`, whose batches are sent without a copy.
#[derive(Clone, Debug)]
pub(crate) struct LogCalls {
    node: Arc<Node>,
    /// For Produce, whose messages are large.
    produce: LogServer<LogService>,
    /// For all others.
    others: LogServer<LogService>,
}

impl LogCalls {
    pub(crate) fn new(node: Arc<Node>, produce: LogServer<LogService>, others: LogServer<LogService>) -> Self {
        Self { node, produce, others }
    }
}

impl NamedService for LogCalls {
    const NAME: &'static str = <LogServer<LogService> as NamedService>::NAME;
}

impl Service<http::Request<Body>> for LogCalls {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<http::Response<Body>, Infallible>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<http::Request<Body>>::poll_ready(&mut self.others, cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match request.uri().path() {
            fetch_body::PATH => Box::pin(ready(Ok(fetch_body::serve(Arc::clone(&self.node), request)))),
            produce::PATH => self.produce.call(request),
            _ => self.others.call(request),
        }
    }
}

/// Answers a call, and counts it.
async fn counted<T: Message>(
    node: &Node,
    api: Api,
    request_bytes: usize,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<Response<T>, Status> {
    let received = Instant::now();
    node.metrics.received(api, request_bytes);
    let result = call.await;
    node.metrics.answered(api, received, result.as_ref().err());
    node.metrics.sent_bytes(api, result.as_ref().map_or(0, T::encoded_len));
    result.map(Response::new).map_err(|error| error.to_status())
}

/// The present, as far as this machine's clock knows it.
pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::new(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// The replica here that may serve `tp`, or what to tell the client. Whether it leads is its own to say.
pub(crate) fn find(node: &Node, tp: TopicPartition) -> Result<Arc<OpenPartition>, Error> {
    match node.replicas.get(tp) {
        Some(Slot::Open(partition)) => return Ok(partition),
        Some(Slot::Failed(error) | Slot::Refused(error)) => return Err(*error),
        Some(Slot::Opening) | None => {}
    }
    let topic = node.table.with(|table| {
        let topic = table.topic(tp.topic)?;
        let is_here = table.partition(tp).is_some_and(|entry| entry.places().any(|place| place.broker == node.id));
        Some((topic.name.clone(), topic.partitions.len(), is_here))
    });
    let Some((name, partitions, is_here)) = topic else {
        return Err(Error::new(
            ErrorCode::UnknownTopic,
            format!("there is no topic with id {}; it was deleted, or never created: look its name up again", tp.topic),
        )
        .with_partition(tp.partition));
    };
    if usize::try_from(tp.partition.get()).map_or(true, |partition| partition >= partitions) {
        return Err(Error::new(
            ErrorCode::UnknownPartition,
            format!(
                "topic `{name}` has no partition {}; it has {partitions}, from 0 to {}",
                tp.partition,
                partitions.saturating_sub(1)
            ),
        )
        .with_topic(name)
        .with_partition(tp.partition));
    }
    if !is_here {
        let error = Error::new(
            ErrorCode::NotLeader,
            format!("broker {} has no replica of this partition; ask the broker that leads it", node.id),
        );
        return Err(node.with_leader_hint(error.with_topic(name).with_partition(tp.partition), tp));
    }
    let (code, what) = if *node.drain.borrow() {
        (ErrorCode::ShuttingDown, "this broker is shutting down; try again when it is back")
    } else {
        (ErrorCode::LeaderNotReady, "the partition is being opened; try again in a moment")
    };
    Err(Error::new(code, what).with_topic(name).with_partition(tp.partition))
}

/// A name that a client sent, as it is repeated to it: a whole message long it would not fit into an answer's headers.
fn repeated(name: &str) -> &str {
    match name.char_indices().nth(TopicName::BYTES_MAX) {
        Some((cut, _)) => &name[..cut],
        None => name,
    }
}

fn parse_tp(topic_id: &[u8], partition: i32) -> Result<TopicPartition, Error> {
    match TopicId::from_slice(topic_id) {
        Some(topic) => Ok(TopicPartition { topic, partition: PartitionId::new(partition) }),
        None => Err(Error::new(
            ErrorCode::InvalidRequest,
            format!("topic_id has {} bytes and needs 16; take it from Metadata", topic_id.len()),
        )),
    }
}

/// What to say about a stream whose next message could not be read; `None` where the client has just gone. `limit` is the
/// key of the largest message, `bytes_max` its value.
fn unreadable(status: &Status, carries: &str, limit: &str, bytes_max: usize) -> Option<Error> {
    match status.code() {
        Code::OutOfRange => Some(Error::new(
            ErrorCode::MessageTooLarge,
            format!(
                "a message is larger than {limit} ({bytes_max}): {}; send smaller ones, or raise the limit",
                status.message()
            ),
        )),
        // Decoding, or the framing around it.
        Code::Internal => Some(Error::new(
            ErrorCode::InvalidRequest,
            format!("a message on this stream is no {carries}: {}; check which call this is", status.message()),
        )),
        Code::DeadlineExceeded => Some(Error::new(ErrorCode::TimedOut, status.message())),
        Code::Unimplemented => Some(Error::new(ErrorCode::Unsupported, status.message())),
        _ => None,
    }
}

/// Told to streams when the broker stops.
fn shutting_down() -> Error {
    Error::new(ErrorCode::ShuttingDown, "this broker is shutting down; go on at another one, or when it is back")
}
