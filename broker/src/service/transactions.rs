//! `flowstone.v1.Transactions`: what producers and operators ask of the coordinator that this broker may be.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::pb::transactions_server::Transactions;
use flowstone_protocol::{Error, ErrorCode, ProducerEpoch, ProducerId, TopicPartition, pb};
use futures::future::join_all;
use prost::Message;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::{confirmed, coordinator, counted, now, submit};
use crate::internal_topics::InternalTopic;
use crate::metrics::Api;
use crate::node::Node;
use crate::partition::{MachineView, OpenPartition, PartitionCommand, PartitionReply};
use crate::transaction::commands::{TransactionCommand, TransactionReply, check_id};
use crate::transaction::driver::{coordinated, fresh_producer};
use crate::transaction::state::Transaction;

/// Who takes an id over waits so long for what is open to be ended everywhere, and is told to ask again then.
const INIT_MAX: Duration = Duration::from_secs(10);
/// Transactions in one answer: what does not fit into a message of the usual size is not told.
const LISTED_MAX: usize = 20_000;

/// `flowstone.v1.Transactions`.
#[derive(Clone, Debug)]
pub(crate) struct TransactionsService {
    node: Arc<Node>,
}

impl TransactionsService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

#[tonic::async_trait]
impl Transactions for TransactionsService {
    async fn init_transactions(
        &self,
        request: Request<pb::InitTransactionsRequest>,
    ) -> Result<Response<pb::InitTransactionsResponse>, Status> {
        let request = request.into_inner();
        let bytes = request.encoded_len();
        counted(&self.node, Api::Transactions, bytes, init(&self.node, request)).await
    }

    async fn end_transaction(
        &self,
        request: Request<pb::EndTransactionRequest>,
    ) -> Result<Response<pb::EndTransactionResponse>, Status> {
        let request = request.into_inner();
        let bytes = request.encoded_len();
        counted(&self.node, Api::Transactions, bytes, end(&self.node, request)).await
    }

    async fn list_transactions(
        &self,
        request: Request<pb::ListTransactionsRequest>,
    ) -> Result<Response<pb::ListTransactionsResponse>, Status> {
        let request = request.into_inner();
        let bytes = request.encoded_len();
        counted(&self.node, Api::Transactions, bytes, list(&self.node, request)).await
    }

    async fn describe_transaction(
        &self,
        request: Request<pb::DescribeTransactionRequest>,
    ) -> Result<Response<pb::DescribeTransactionResponse>, Status> {
        let request = request.into_inner();
        let bytes = request.encoded_len();
        counted(&self.node, Api::Transactions, bytes, describe(&self.node, request)).await
    }

    async fn abort_transaction(
        &self,
        request: Request<pb::AbortTransactionRequest>,
    ) -> Result<Response<pb::AbortTransactionResponse>, Status> {
        let request = request.into_inner();
        let bytes = request.encoded_len();
        counted(&self.node, Api::Transactions, bytes, abort(&self.node, request)).await
    }
}

/// Has the coordinator of `id`, which must be this broker, decide.
async fn decided(node: &Arc<Node>, id: &str, command: TransactionCommand) -> Result<TransactionReply, Error> {
    let partition = coordinator(node, InternalTopic::Transactions, id)?;
    let command = PartitionCommand::Transactions(command);
    match submit(node, InternalTopic::Transactions, &partition, command).await? {
        PartitionReply::Transactions(reply) => {
            node.transactions.wake();
            Ok(reply)
        }
        _ => Err(odd_answer()),
    }
}

fn odd_answer() -> Error {
    Error::new(ErrorCode::Internal, "the coordinator answered something else; this is a defect of the broker")
}

async fn init(node: &Arc<Node>, request: pb::InitTransactionsRequest) -> Result<pb::InitTransactionsResponse, Error> {
    let id = request.transactional_id;
    check_id(&id)?;
    let timeout = Duration::from_millis(request.timeout_ms.max(0).unsigned_abs().into());
    let until = Instant::now() + INIT_MAX;
    loop {
        let partition = coordinator(node, InternalTopic::Transactions, &id)?;
        let MachineView::Transactions(view) = &partition.view else { return Err(odd_answer()) };
        let mut changes = view.changes();
        let command = TransactionCommand::Init { id: id.clone(), timeout, fresh: fresh_producer() };
        match decided(node, &id, command).await? {
            TransactionReply::Producer { producer, epoch } => {
                return Ok(pb::InitTransactionsResponse {
                    producer_id: producer.get(),
                    producer_epoch: epoch.get().into(),
                });
            }
            TransactionReply::Busy if Instant::now() < until => {
                drop(tokio::time::timeout_at(until, changes.changed()).await);
            }
            TransactionReply::Busy => {
                return Err(Error::new(
                    ErrorCode::ConcurrentTransactions,
                    format!("what `{id}` left open is being ended, and a partition of it cannot be reached; try again"),
                ));
            }
            _ => return Err(odd_answer()),
        }
    }
}

async fn end(node: &Arc<Node>, request: pb::EndTransactionRequest) -> Result<pb::EndTransactionResponse, Error> {
    let Some(pb::TransactionRef { transactional_id: id, producer_id, producer_epoch }) = request.transaction else {
        return Err(Error::new(ErrorCode::InvalidRequest, "set `transaction`: which one is to be ended"));
    };
    check_id(&id)?;
    let Ok(epoch) = i16::try_from(producer_epoch) else {
        return Err(Error::new(
            ErrorCode::InvalidRequest,
            format!("{producer_epoch} is no epoch; send the one that InitTransactions or EndTransaction gave"),
        ));
    };
    let command = TransactionCommand::End {
        id: id.clone(),
        producer: ProducerId::new(producer_id),
        epoch: ProducerEpoch::new(epoch),
        commit: request.commit,
        fresh: fresh_producer(),
    };
    match decided(node, &id, command).await? {
        TransactionReply::Producer { producer, epoch } => {
            Ok(pb::EndTransactionResponse { producer_id: producer.get(), producer_epoch: epoch.get().into() })
        }
        _ => Err(odd_answer()),
    }
}

async fn abort(node: &Arc<Node>, request: pb::AbortTransactionRequest) -> Result<pb::AbortTransactionResponse, Error> {
    let id = request.transactional_id;
    check_id(&id)?;
    match decided(node, &id, TransactionCommand::Abort { id: id.clone(), fresh: fresh_producer() }).await? {
        TransactionReply::Done => Ok(pb::AbortTransactionResponse {}),
        _ => Err(odd_answer()),
    }
}

async fn list(node: &Arc<Node>, request: pb::ListTransactionsRequest) -> Result<pb::ListTransactionsResponse, Error> {
    if let Some(state) = request.states.iter().find(|state| pb::TransactionState::try_from(**state).is_err()) {
        return Err(Error::new(ErrorCode::InvalidRequest, format!("{state} is no state of a transaction")));
    }
    let led = coordinated(node);
    // Of partitions that are led elsewhere by now, those brokers tell.
    let asked = led.iter().map(|(partition, _)| confirmed(node, InternalTopic::Transactions, partition));
    let confirmed = join_all(asked).await;
    let now = now();
    let mut transactions = Vec::new();
    for ((_, view), confirmed) in led.iter().zip(confirmed) {
        if confirmed.is_err() {
            continue;
        }
        view.with(|table| {
            let wanted = table.iter().filter(|(_, it)| {
                let open_for = now.get() - it.started_at.get();
                let is_old = request.open_longer_than_ms <= 0
                    || (it.started_at.get() >= 0 && open_for > request.open_longer_than_ms);
                is_old && (request.states.is_empty() || request.states.contains(&(it.stage.to_pb() as i32)))
            });
            transactions.extend(wanted.map(|(id, it)| listing(id, it)));
        });
    }
    transactions.sort_by(|a, b| a.transactional_id.cmp(&b.transactional_id));
    transactions.truncate(LISTED_MAX);
    Ok(pb::ListTransactionsResponse { transactions })
}

fn listing(id: &str, it: &Transaction) -> pb::TransactionListing {
    // While markers are being written, whose they are: the producer has its next epoch already.
    let (producer, epoch) = match (it.decision(), it.last_ended) {
        (Some(decision), Some((ended, _))) => (decision.producer, ended),
        _ => (it.producer, it.epoch),
    };
    pb::TransactionListing {
        transactional_id: id.to_owned(),
        producer_id: producer.get(),
        producer_epoch: epoch.get().into(),
        state: it.stage.to_pb() as i32,
        started_at: it.started_at.get(),
        timeout_ms: i32::try_from(it.timeout.as_millis()).unwrap_or(i32::MAX),
        partitions: i32::try_from(it.partitions.len()).unwrap_or(i32::MAX),
    }
}

async fn describe(
    node: &Arc<Node>,
    request: pb::DescribeTransactionRequest,
) -> Result<pb::DescribeTransactionResponse, Error> {
    let id = request.transactional_id;
    check_id(&id)?;
    let partition: Arc<OpenPartition> = coordinator(node, InternalTopic::Transactions, &id)?;
    confirmed(node, InternalTopic::Transactions, &partition).await?;
    let MachineView::Transactions(view) = &partition.view else { return Err(odd_answer()) };
    let Some(it) = view.with(|table| table.get(&id).cloned()) else {
        return Err(Error::new(
            ErrorCode::UnknownTransaction,
            format!("no producer uses the transactional id `{id}`; list them to see which there are"),
        ));
    };
    let pending = match it.stage.is_preparing() {
        true => node.transactions.pending(&id).unwrap_or_else(|| it.partitions.clone()),
        false => BTreeSet::new(),
    };
    Ok(pb::DescribeTransactionResponse {
        transaction: Some(listing(&id, &it)),
        partitions: by_topic(node, &it.partitions),
        groups: it.groups.iter().map(|group| group.to_string()).collect(),
        coordinator: node
            .client_address(node.id)
            .map(|address| pb::BrokerAddress { broker_id: node.id.get(), address }),
        pending_markers: by_topic(node, &pending),
    })
}

fn by_topic(node: &Node, partitions: &BTreeSet<TopicPartition>) -> Vec<pb::TopicPartitions> {
    let mut topics: Vec<pb::TopicPartitions> = Vec::new();
    for tp in partitions {
        let topic_id = Bytes::copy_from_slice(&tp.topic.to_bytes());
        match topics.last_mut().filter(|topic| topic.topic_id == topic_id) {
            Some(topic) => topic.partitions.push(tp.partition.get()),
            None => {
                let topic = node.table.with(|table| table.topic(tp.topic).map(|topic| topic.name.to_string()));
                topics.push(pb::TopicPartitions {
                    topic_id,
                    topic: topic.unwrap_or_default(),
                    partitions: vec![tp.partition.get()],
                });
            }
        }
    }
    topics
}
