//! From the broker that takes a transactional write to the coordinator: the partition is in the transaction from now on.
//!
//! Who asks while a call to the same broker is under way goes with the next one, all in one message, as entries share a
//! flush: however many partitions begin to be written at once, a coordinator is asked twice at the most. It answers at once,
//! whatever it says, since others wait for the same answer: an addition that has to wait for something asks again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::peer::{AddToTransactionRequest, AddToTransactionResponse, TransactionAddition};
use flowstone_protocol::{BrokerId, Error, ErrorCode, ProducerEpoch, ProducerId, pb};
use futures::future::join_all;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::commands::{Addition, TransactionCommand, TransactionReply};
use crate::cluster::calls;
use crate::internal_topics::InternalTopic;
use crate::node::Node;
use crate::partition::{OpenPartition, PartitionCommand, PartitionReply};
use crate::service::{confirmed, coordinator, coordinator_broker, submit};

/// An addition is tried for this long: about two elections of a coordinator.
const ADD_MAX: Duration = Duration::from_secs(10);
/// A call takes at most this long.
const CALL_MAX: Duration = Duration::from_secs(5);
/// Between two tries where nobody could be asked; doubles.
const RETRY_MIN: Duration = Duration::from_millis(2);
const RETRY_MAX: Duration = Duration::from_millis(200);
/// The same where the transaction before is still being ended, which takes a few flushes: a producer that begins the next
/// one at once waits for nothing else. It does not double, and is over after [`ENDING_SOON`].
const ENDING_RETRY: Duration = Duration::from_millis(1);
const ENDING_SOON: Duration = Duration::from_millis(100);
/// Additions of one call.
const CALL_ADDITIONS_MAX: usize = 1_000;
/// Additions that wait for the next call to one broker; then `OVERLOADED`.
const WAITING_MAX: usize = 20_000;

/// Additions, each with its place among those that were asked for together.
type Numbered = Vec<(usize, Addition)>;
type Waiting = (Addition, oneshot::Sender<Result<(), Error>>);

/// Adds partitions and groups to transactions.
#[derive(Debug, Default)]
pub(crate) struct TransactionAdder {
    /// Held for a push or a take; nothing waits inside.
    lanes: Mutex<HashMap<BrokerId, Lane>>,
}

/// The way to one broker.
#[derive(Debug, Default)]
struct Lane {
    waiting: Vec<Waiting>,
    /// A call is under way, and takes what waits when it is back.
    is_busy: bool,
}

impl TransactionAdder {
    /// Adds a partition, or a group, to the transaction of a producer id and epoch, beginning it where it is not open.
    /// Returns once the coordinator has that committed; the same again changes nothing.
    ///
    /// # Errors
    /// `PRODUCER_FENCED`, `TRANSACTION_ABORTED` and `UNKNOWN_TRANSACTION` are the coordinator's word; `CONCURRENT_TRANSACTIONS`
    /// where the transaction before is still being ended, and what is retriable where nobody could be asked.
    pub(crate) async fn add(&self, node: &Arc<Node>, addition: Addition) -> Result<(), Error> {
        let began = Instant::now();
        let mut pause = RETRY_MIN;
        let mut hint = None;
        // Two that each take the other for the coordinator are not followed to and fro without a pause.
        let mut was_hinted = false;
        loop {
            let added = match hint
                .take()
                .map_or_else(|| coordinator_broker(node, InternalTopic::Transactions, &addition.id), Ok)
            {
                Ok(broker) => self.ask(node, broker, addition.clone()).await,
                Err(error) => Err(error),
            };
            let error = match added {
                Err(error) if error.is_retriable() && began.elapsed() < ADD_MAX => error,
                // To its client the coordinator is not this broker: what it may do is ask again.
                Err(error) if error.code == ErrorCode::NotCoordinator => {
                    let what = "the transaction's coordinator is not known at the moment; try again";
                    return Err(Error::new(ErrorCode::NoLeader, what));
                }
                added => return added,
            };
            hint = error.leader_hint.as_ref().map(|(broker, _)| *broker);
            if hint.is_none() || was_hinted {
                let is_ending = error.code == ErrorCode::ConcurrentTransactions;
                // Not for long: where it does not end, a partition cannot be reached.
                let is_soon = is_ending && began.elapsed() < ENDING_SOON;
                tokio::time::sleep(if is_soon { ENDING_RETRY } else { pause }).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
            was_hinted = hint.is_some();
        }
    }

    async fn ask(&self, node: &Arc<Node>, broker: BrokerId, addition: Addition) -> Result<(), Error> {
        let (sender, receiver) = oneshot::channel();
        let begins = {
            let mut lanes = self.lanes.lock();
            let lane = lanes.entry(broker).or_default();
            if lane.waiting.len() >= WAITING_MAX {
                let what = "too many transactions begin at once; try again in a moment";
                return Err(Error::new(ErrorCode::Overloaded, what));
            }
            lane.waiting.push((addition, sender));
            !std::mem::replace(&mut lane.is_busy, true)
        };
        if begins {
            let node = Arc::clone(node);
            // On a task of its own: who asked first may go away, and others go with it.
            tokio::spawn(async move { node.transactions.adder.run(&node, broker).await });
        }
        receiver.await.unwrap_or_else(|_| {
            Err(Error::new(ErrorCode::ShuttingDown, "this broker is shutting down; ask another one"))
        })
    }

    /// Calls until nobody waits.
    async fn run(&self, node: &Arc<Node>, broker: BrokerId) {
        loop {
            let batch: Vec<Waiting> = {
                let mut lanes = self.lanes.lock();
                let Some(lane) = lanes.get_mut(&broker) else { return };
                lane.waiting.retain(|(_, sender)| !sender.is_closed());
                if lane.waiting.is_empty() {
                    lanes.remove(&broker);
                    return;
                }
                let count = lane.waiting.len().min(CALL_ADDITIONS_MAX);
                lane.waiting.drain(..count).collect()
            };
            let (additions, senders): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
            let results = match broker == node.id {
                true => add_here(node, additions).await,
                false => add_there(node, broker, additions).await,
            };
            for (sender, result) in senders.into_iter().zip(results) {
                // Whoever is gone needs no answer.
                drop(sender.send(result));
            }
        }
    }
}

async fn add_there(node: &Node, broker: BrokerId, additions: Vec<Addition>) -> Vec<Result<(), Error>> {
    let count = additions.len();
    let request = AddToTransactionRequest { caller: None, additions: additions.iter().map(to_message).collect() };
    match node.control.peers.add_to_transaction(broker, request, CALL_MAX).await {
        Ok(AddToTransactionResponse { results }) if results.len() == count => results.iter().map(result).collect(),
        Ok(_) => vec![Err(Error::new(ErrorCode::Internal, "the coordinator answered something else")); count],
        Err(error) => vec![Err(error); count],
    }
}

/// What a row of an answer says; nothing is a success.
pub(super) fn result(detail: &pb::ErrorDetail) -> Result<(), Error> {
    match detail.code {
        0 => Ok(()),
        _ => Err(Error::from_detail(detail)),
    }
}

pub(super) fn detail(result: Result<(), Error>) -> pb::ErrorDetail {
    result.err().map(|error| error.to_detail()).unwrap_or_default()
}

fn to_message(addition: &Addition) -> TransactionAddition {
    TransactionAddition {
        transactional_id: addition.id.to_string(),
        producer_id: addition.producer.get(),
        producer_epoch: addition.epoch.get().into(),
        topic_id: addition.partition.map(|tp| Bytes::copy_from_slice(&tp.topic.to_bytes())).unwrap_or_default(),
        partition: addition.partition.map_or(-1, |tp| tp.partition.get()),
        group: addition.group.as_deref().unwrap_or_default().to_owned(),
    }
}

fn from_message(addition: &TransactionAddition) -> Result<Addition, Error> {
    let odd = || {
        Error::new(
            ErrorCode::InvalidRequest,
            "an addition to a transaction is malformed: a defect of the broker that asks",
        )
    };
    let partition = match addition.partition {
        ..0 => None,
        partition => Some(calls::partition(&addition.topic_id, partition).ok_or_else(odd)?),
    };
    Ok(Addition {
        id: addition.transactional_id.as_str().into(),
        producer: ProducerId::new(addition.producer_id),
        epoch: i16::try_from(addition.producer_epoch).map(ProducerEpoch::new).map_err(|_| odd())?,
        partition,
        group: (!addition.group.is_empty()).then(|| addition.group.as_str().into()),
    })
}

/// Another broker asks the coordinators here.
pub(crate) async fn answer_add(node: &Arc<Node>, request: AddToTransactionRequest) -> AddToTransactionResponse {
    let read: Vec<Result<Addition, Error>> = request.additions.iter().map(from_message).collect();
    let additions: Vec<Addition> = read.iter().filter_map(|addition| addition.as_ref().ok().cloned()).collect();
    let mut added = add_here(node, additions).await.into_iter();
    let results = read.into_iter().map(|addition| match addition {
        Ok(_) => detail(added.next().unwrap_or(Ok(()))),
        Err(error) => detail(Err(error)),
    });
    AddToTransactionResponse { results: results.collect() }
}

/// Has the coordinators here add; in the order of the additions.
async fn add_here(node: &Arc<Node>, additions: Vec<Addition>) -> Vec<Result<(), Error>> {
    let mut results: Vec<Result<(), Error>> = vec![Ok(()); additions.len()];
    let mut partitions: Vec<(Arc<OpenPartition>, Numbered)> = Vec::new();
    for (at, addition) in additions.into_iter().enumerate() {
        match coordinator(node, InternalTopic::Transactions, &addition.id) {
            Ok(partition) => match partitions.iter_mut().find(|(known, _)| known.tp == partition.tp) {
                Some((_, of)) => of.push((at, addition)),
                None => partitions.push((partition, vec![(at, addition)])),
            },
            Err(error) => results[at] = Err(error),
        }
    }
    let asked = partitions.into_iter().map(|(partition, of)| add_at(node, partition, of));
    for (at, result) in join_all(asked).await.into_iter().flatten() {
        results[at] = result;
    }
    results
}

/// Has one coordinator add.
async fn add_at(node: &Arc<Node>, partition: Arc<OpenPartition>, of: Numbered) -> Vec<(usize, Result<(), Error>)> {
    let additions = of.iter().map(|(_, addition)| addition.clone()).collect();
    let command = PartitionCommand::Transactions(TransactionCommand::Add(additions));
    let results = match submit(node, InternalTopic::Transactions, &partition, command).await {
        Ok(PartitionReply::Transactions(TransactionReply::Added(results))) => results,
        Ok(_) => vec![Err(Error::new(ErrorCode::Internal, "the coordinator answered something else")); of.len()],
        Err(error) => vec![Err(error); of.len()],
    };
    // What is refused writes nothing, so that nobody has confirmed it: it may be of one who was replaced, and does not know
    // of a newer epoch.
    let is_final = |result: &Result<(), Error>| result.as_ref().is_err_and(|error| !error.is_retriable());
    let results = match results.iter().any(is_final) {
        true => match confirmed(node, InternalTopic::Transactions, &partition).await {
            Ok(_) => results,
            Err(error) => vec![Err(error); of.len()],
        },
        false => results,
    };
    of.into_iter().map(|(at, _)| at).zip(results).collect()
}
