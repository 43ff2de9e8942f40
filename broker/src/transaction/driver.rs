//! What acts for the coordinators of transactions that this broker is: aborts what was open for too long, and writes the
//! markers of what is decided until every partition has them.
//!
//! Nothing is remembered that would be missed: a coordinator that takes over finds in its table what is decided and not yet
//! ended everywhere, and begins anew. A marker that is there already is answered as done.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::peer::{TransactionMarker, WriteMarkersRequest, WriteMarkersResponse};
use flowstone_protocol::{BrokerId, Error, ErrorCode, LeaderEpoch, ProducerEpoch, ProducerId, TopicPartition};
use flowstone_replication::Reply;
use futures::future::join_all;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;

use super::adder::{TransactionAdder, detail, result};
use super::commands::TransactionCommand;
use super::endings::{Ending, Endings, Turn};
use super::state::{Decision, TransactionTable};
use super::upkeep::{begin_decided, due, marker_of};
use crate::cluster::calls;
use crate::coordinator::Published;
use crate::group::commands::{GroupCommand, GroupReply};
use crate::internal_topics::InternalTopic;
use crate::node::Node;
use crate::partition::{MachineView, OpenPartition, PartitionCommand, PartitionReply, Slot};
use crate::service::{find, now, submit};

/// Looked at this often where nothing wakes it: a timeout is late by so much at the most.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Ids that were not used for long are looked for this often.
const FORGET_EVERY: Duration = Duration::from_secs(60);
/// Transactions whose markers are written side by side; the next ones wait their turn.
const ENDING_MAX: usize = 1_000;
/// A call takes at most this long.
const CALL_MAX: Duration = Duration::from_secs(5);

/// A broker's part in transactions.
#[derive(Debug, Default)]
pub(crate) struct Transactions {
    /// The way to coordinators.
    pub(crate) adder: TransactionAdder,
    /// Something was decided here.
    decided: Notify,
    /// Partitions that lack their marker, of what is being ended here. Held for a look or a change.
    pending: Mutex<HashMap<Arc<str>, BTreeSet<TopicPartition>>>,
}

impl Transactions {
    /// Something was decided: its markers are to be written now.
    pub(crate) fn wake(&self) {
        self.decided.notify_one();
    }

    /// Partitions that lack their marker, as far as that is known.
    pub(crate) fn pending(&self, id: &str) -> Option<BTreeSet<TopicPartition>> {
        self.pending.lock().get(id).cloned()
    }
}

/// Partitions of `__transaction_state` that this broker coordinates now, with what they have committed.
pub(crate) fn coordinated(node: &Node) -> Vec<(Arc<OpenPartition>, Published<TransactionTable>)> {
    let partitions = node.table.with(|table| {
        let topic = table.topic_named(InternalTopic::Transactions.name())?;
        Some((topic.id, topic.partitions.len()))
    });
    let Some((topic, partitions)) = partitions else { return Vec::new() };
    let count = i32::try_from(partitions).unwrap_or(i32::MAX);
    let open = (0..count).filter_map(|partition| {
        let tp = TopicPartition { topic, partition: flowstone_protocol::PartitionId::new(partition) };
        let Some(Slot::Open(partition)) = node.replicas.get(tp) else { return None };
        let MachineView::Transactions(view) = partition.view.clone() else { return None };
        partition.replica.status().is_ready().then_some((partition, view))
    });
    open.collect()
}

/// What a task was for.
#[derive(Debug)]
enum Done {
    Ended(Ending),
    /// Something of it could not be done.
    Left(Turn),
    Looked(TopicPartition),
}

/// Acts for the coordinators that this broker is, until aborted.
pub(crate) async fn run(node: Arc<Node>) {
    let mut endings = Endings::new(ENDING_MAX);
    // Of one that cannot commit at the moment, the others know nothing.
    let mut looking: HashSet<TopicPartition> = HashSet::new();
    let mut tasks: JoinSet<Done> = JoinSet::new();
    let mut forgot = Instant::now();
    let mut look_at = Instant::now() + LOOK_EVERY;
    // More was decided than there were places.
    let mut is_short = false;
    loop {
        let wake_at = endings.next_due().map_or(look_at, |due| due.min(look_at));
        let looks = tokio::select! {
            () = node.transactions.decided.notified() => true,
            () = tokio::time::sleep_until(wake_at.into()) => false,
            Some(done) = tasks.join_next() => {
                let mut looks = is_short;
                match done {
                    Ok(Done::Ended(ended)) => {
                        node.transactions.pending.lock().remove(&ended.2);
                        endings.ended(&ended);
                    }
                    Ok(Done::Left(turn)) => endings.again(turn, Instant::now()),
                    Ok(Done::Looked(tp)) => {
                        looking.remove(&tp);
                        looks = true;
                    }
                    // Which it was is not known. What is begun a second time does no harm: markers repeat.
                    Err(error) => {
                        tracing::error!(%error, "the end of a transaction was cut off; it is begun anew");
                        endings.clear();
                        looking.clear();
                    }
                }
                // What was decided meanwhile has woken this by itself.
                looks
            }
        };
        let is_time = Instant::now() >= look_at;
        let led = coordinated(&node);
        let mut turns = Vec::new();
        while let Some(turn) = endings.begin_due(Instant::now()) {
            turns.push(turn);
        }
        if looks || is_time {
            let forgets = is_time && forgot.elapsed() >= FORGET_EVERY;
            if forgets {
                forgot = Instant::now();
            }
            if is_time {
                look_at = Instant::now() + LOOK_EVERY;
            }
            is_short = false;
            for (partition, view) in &led {
                let epoch = partition.replica.status().leader_epoch();
                let commands = match is_time {
                    true => view.with(|table| due(table, now(), forgets, fresh_producer)),
                    false => Vec::new(),
                };
                if !commands.is_empty() && looking.insert(partition.tp) {
                    let (node, partition) = (Arc::clone(&node), Arc::clone(partition));
                    tasks.spawn(async move {
                        // All at once: they share a flush.
                        join_all(commands.into_iter().map(|command| act(&node, &partition, command))).await;
                        Done::Looked(partition.tp)
                    });
                }
                let (begun, were_too_few) =
                    view.with(|table| begin_decided(&mut endings, (partition.tp, epoch), table));
                is_short |= were_too_few;
                turns.extend(begun);
            }
        }
        for turn in turns {
            let (tp, _, id, _) = &turn.ending;
            let Some((partition, _)) = led.iter().find(|(partition, _)| partition.tp == *tp) else {
                // Whoever coordinates it now goes on.
                node.transactions.pending.lock().remove(id);
                endings.ended(&turn.ending);
                continue;
            };
            let (node, partition) = (Arc::clone(&node), Arc::clone(partition));
            tasks.spawn(async move { end(&node, &partition, turn).await });
        }
    }
}

async fn act(node: &Node, partition: &OpenPartition, command: TransactionCommand) -> bool {
    let command = PartitionCommand::Transactions(command);
    match submit(node, InternalTopic::Transactions, partition, command).await {
        Ok(_) => true,
        Err(error) => {
            tracing::debug!(tp = %partition.tp, %error, "a coordinator's own step was refused; it looks again");
            false
        }
    }
}

/// Random, so that no broker needs to ask another; 63 bits, so that two alike are not to be expected.
pub(crate) fn fresh_producer() -> ProducerId {
    ProducerId::new((rand::random::<u64>() >> 1) as i64)
}

/// Tries to write the markers of one decision that are left, each once; where none is left, the coordinator notes it.
async fn end(node: &Arc<Node>, partition: &OpenPartition, mut turn: Turn) -> Done {
    let ending = turn.ending.clone();
    let (_, epoch, id, decision) = &ending;
    let is_coordinator = || {
        let status = partition.replica.status();
        status.is_ready() && status.leader_epoch() == *epoch
    };
    if !is_coordinator() {
        return Done::Ended(turn.ending);
    }
    if !turn.left.is_empty() {
        node.transactions.pending.lock().insert(Arc::clone(id), turn.left.clone());
        let mut by_broker: HashMap<BrokerId, Vec<TopicPartition>> = HashMap::new();
        let mut unknown = Vec::new();
        for tp in &turn.left {
            if node.table.with(|table| table.partition(*tp).is_none()) {
                unknown.push(*tp);
            } else if let Some(leader) = node.leader(*tp).by {
                by_broker.entry(leader).or_default().push(*tp);
            }
        }
        for tp in gone(node, unknown).await {
            turn.left.remove(&tp);
        }
        let calls = by_broker.into_iter().map(|(broker, tps)| write(node, broker, tps, *decision, *epoch));
        for (tp, written) in join_all(calls).await.into_iter().flatten() {
            let is_over = turn.take(tp, &written);
            let Err(error) = written else { continue };
            match is_over {
                true => {
                    if error.code == ErrorCode::InvalidTransactionState {
                        tracing::error!(
                            transactional_id = %id, %tp, %error,
                            "a transaction is ended in a partition otherwise than it was decided: it is not whole"
                        );
                    }
                }
                // Whoever replaced this coordinator goes on.
                false if error.code == ErrorCode::NotCoordinator && !is_coordinator() => {}
                false if error.is_retriable() => {
                    tracing::debug!(transactional_id = %id, %tp, %error, "a marker could not be written; it is tried again");
                }
                false => {
                    tracing::warn!(transactional_id = %id, %tp, %error, "a marker was refused; it is tried again");
                }
            }
        }
    }
    if turn.left.is_empty() {
        let written = TransactionCommand::Written { id: Arc::clone(id), decision: *decision };
        if act(node, partition, written).await {
            return Done::Ended(turn.ending);
        }
    } else {
        node.transactions.pending.lock().insert(Arc::clone(id), turn.left.clone());
    }
    Done::Left(turn)
}

/// Those that are deleted for certain: one that is not known here may be newer than what this broker has heard.
async fn gone(node: &Node, unknown: Vec<TopicPartition>) -> Vec<TopicPartition> {
    if unknown.is_empty() || node.control.caught_up().await.is_err() {
        return Vec::new();
    }
    node.table.with(|table| unknown.into_iter().filter(|tp| table.partition(*tp).is_none()).collect())
}

type Written = Vec<(TopicPartition, Result<(), Error>)>;

/// Has one broker end the transaction in partitions that it leads.
async fn write(
    node: &Arc<Node>,
    broker: BrokerId,
    tps: Vec<TopicPartition>,
    decision: Decision,
    coordinator: LeaderEpoch,
) -> Written {
    let results = if broker == node.id {
        join_all(tps.iter().map(|tp| mark(node, *tp, decision, coordinator))).await
    } else {
        let marker = |tp: &TopicPartition| TransactionMarker {
            producer_id: decision.producer.get(),
            producer_epoch: decision.epoch.get().into(),
            commit: decision.commit,
            coordinator_epoch: coordinator.get(),
            topic_id: Bytes::copy_from_slice(&tp.topic.to_bytes()),
            partition: tp.partition.get(),
            groups: Vec::new(),
        };
        let request = WriteMarkersRequest { caller: None, markers: tps.iter().map(marker).collect() };
        match node.control.peers.write_markers(broker, request, CALL_MAX).await {
            Ok(WriteMarkersResponse { results }) if results.len() == tps.len() => results.iter().map(result).collect(),
            Ok(_) => vec![Err(Error::new(ErrorCode::Internal, "the broker answered something else")); tps.len()],
            Err(error) => vec![Err(error); tps.len()],
        }
    };
    tps.into_iter().zip(results).collect()
}

/// Ends a transaction in one partition that is led here.
async fn mark(node: &Arc<Node>, tp: TopicPartition, decision: Decision, coordinator: LeaderEpoch) -> Result<(), Error> {
    let partition = find(node, tp)?;
    if InternalTopic::named(&partition.topic) == Some(InternalTopic::Groups) {
        let Decision { producer, epoch, commit } = decision;
        let command = GroupCommand::EndPending { producer, epoch, commit };
        // Piece by piece, where there is very much of it.
        while let PartitionReply::Groups(GroupReply::More) =
            submit(node, InternalTopic::Groups, &partition, PartitionCommand::Groups(command.clone())).await?
        {}
        return Ok(());
    }
    let marker = marker_of(decision, coordinator);
    let (sender, receiver) = oneshot::channel();
    partition.replica.marker(marker, Reply::from(sender));
    let stopped = || Error::new(ErrorCode::ShuttingDown, "this broker is shutting down; try again when it is back");
    receiver.await.unwrap_or_else(|_| Err(stopped()))
}

/// Another broker, which coordinates a transaction, has it ended in partitions that are led here.
pub(crate) async fn answer_markers(node: &Arc<Node>, request: WriteMarkersRequest) -> WriteMarkersResponse {
    let odd = || Error::new(ErrorCode::InvalidRequest, "a marker is malformed: a defect of the broker that asks");
    let marks = request.markers.iter().map(|marker| async move {
        let tp = calls::partition(&marker.topic_id, marker.partition).ok_or_else(odd)?;
        let epoch = i16::try_from(marker.producer_epoch).map(ProducerEpoch::new).map_err(|_| odd())?;
        let decision = Decision { producer: ProducerId::new(marker.producer_id), epoch, commit: marker.commit };
        mark(node, tp, decision, LeaderEpoch::new(marker.coordinator_epoch)).await
    });
    WriteMarkersResponse { results: join_all(marks).await.into_iter().map(detail).collect() }
}
