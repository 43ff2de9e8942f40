//! What may be asked of a coordinator of transactions, and what it decides.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::{Error, ErrorCode, ProducerEpoch, ProducerId, Timestamp, TopicPartition};

use super::state::{Cut, Decision, Stage, Transaction, TransactionTable};
use crate::coordinator::PIECE_BYTES;
use flowstone_storage::planted::{Bug, is_planted};

/// Partitions of one transaction.
const PARTITIONS_MAX: usize = 10_000;
/// Groups whose offsets are in one transaction.
const GROUPS_MAX: usize = 1_000;
/// Bytes of a transactional id.
const ID_BYTES_MAX: usize = 249;
/// Of one partition in a transaction's record, at the most.
const PARTITION_BYTES: usize = 32;

/// What is asked. Producer ids are random, given with the command where one may be needed.
#[derive(Clone, Debug)]
pub(crate) enum TransactionCommand {
    /// A producer begins to use the id: whoever used it before is cut off.
    Init { id: String, timeout: Duration, fresh: ProducerId },
    /// Partitions that are about to be written to, each in its transaction.
    Add(Vec<Addition>),
    /// A producer ends its transaction.
    End { id: String, producer: ProducerId, epoch: ProducerEpoch, commit: bool, fresh: ProducerId },
    /// It may have been open for too long.
    TimeOut { id: Arc<str>, fresh: ProducerId },
    /// An operator ends it.
    Abort { id: String, fresh: ProducerId },
    /// Every partition has its marker.
    Written { id: Arc<str>, decision: Decision },
    /// They may not have been used for long.
    Forget(Vec<Arc<str>>),
}

/// One partition, or group, of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Addition {
    pub(crate) id: Arc<str>,
    pub(crate) producer: ProducerId,
    pub(crate) epoch: ProducerEpoch,
    pub(crate) partition: Option<TopicPartition>,
    pub(crate) group: Option<Arc<str>>,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TransactionReply {
    /// Who may write now.
    Producer {
        producer: ProducerId,
        epoch: ProducerEpoch,
    },
    /// What was open before is being ended: ask again.
    Busy,
    /// Of each addition.
    Added(Vec<Result<(), Error>>),
    Done,
}

/// Ids that change, forgotten where nothing follows; and the answer.
pub(super) type Decided = (Vec<(Arc<str>, Option<Transaction>)>, TransactionReply);

/// What follows from `command` in this state.
///
/// # Errors
/// Why it cannot be; nothing changes then.
pub(super) fn decide(table: &TransactionTable, command: TransactionCommand, now: Timestamp) -> Result<Decided, Error> {
    match command {
        TransactionCommand::Init { id, timeout, fresh } => init(table, &id, timeout, fresh),
        TransactionCommand::Add(additions) => Ok(add(table, additions, now)),
        TransactionCommand::End { id, producer, epoch, commit, fresh } => {
            end(table, &id, (producer, epoch), commit, fresh)
        }
        TransactionCommand::TimeOut { id, fresh } => {
            let Some(transaction) = table.get(&id).filter(|it| it.due().is_some_and(|due| due <= now)) else {
                return Ok((Vec::new(), TransactionReply::Done));
            };
            Ok((vec![(id, Some(decided(transaction, false, Cut::TimedOut, fresh)))], TransactionReply::Done))
        }
        TransactionCommand::Abort { id, fresh } => abort(table, &id, fresh),
        TransactionCommand::Written { id, decision } => Ok((written(table, &id, decision), TransactionReply::Done)),
        TransactionCommand::Forget(ids) => {
            let unused = |id: &Arc<str>| table.get(id).is_some_and(|it| table.is_unused(it, now));
            let forgotten = ids.into_iter().filter(unused).map(|id| (id, None)).collect();
            Ok((forgotten, TransactionReply::Done))
        }
    }
}

/// Checks what a client calls an id.
///
/// # Errors
/// `INVALID_TRANSACTIONAL_ID`.
pub(crate) fn check_id(id: &str) -> Result<(), Error> {
    if !(1..=ID_BYTES_MAX).contains(&id.len()) || id.chars().any(char::is_control) {
        return Err(Error::new(
            ErrorCode::InvalidTransactionalId,
            format!("a transactional id has 1 to {ID_BYTES_MAX} bytes and no control characters; choose another one"),
        ));
    }
    Ok(())
}

fn init(table: &TransactionTable, id: &str, timeout: Duration, fresh: ProducerId) -> Result<Decided, Error> {
    check_id(id)?;
    let timeout_max = table.rules().timeout_max;
    if timeout.is_zero() || timeout > timeout_max {
        return Err(Error::new(
            ErrorCode::InvalidTransactionTimeout,
            format!(
                "a transaction's timeout of {timeout:?} is not between 1 ms and {timeout_max:?} (transaction.max_timeout); \
                 set another one"
            ),
        ));
    }
    let Some((key, known)) = table.key(id).zip(table.get(id)) else {
        if table.len() >= table.rules().ids_max {
            return Err(Error::new(
                ErrorCode::Overloaded,
                format!(
                    "this coordinator knows {} transactional ids, its limit (transaction.ids_per_partition); use ids again \
                     rather than new ones, or wait until unused ones are forgotten (transaction.id_expiration)",
                    table.len()
                ),
            ));
        }
        let first = Transaction {
            producer: fresh,
            epoch: ProducerEpoch::new(0),
            previous: None,
            stage: Stage::Empty,
            timeout,
            started_at: Timestamp::NONE,
            updated_at: Timestamp::NONE,
            partitions: Default::default(),
            groups: Default::default(),
            last_ended: None,
            cut: Cut::None,
        };
        return Ok((vec![(id.into(), Some(first))], producer(fresh, ProducerEpoch::new(0))));
    };
    match known.stage {
        Stage::PrepareCommit | Stage::PrepareAbort if is_planted(Bug::KeepPreparing) => {
            let reply = producer(known.producer, known.epoch);
            Ok((Vec::new(), reply))
        }
        Stage::PrepareCommit | Stage::PrepareAbort => Ok((Vec::new(), TransactionReply::Busy)),
        Stage::Ongoing => {
            let aborted = decided(known, false, Cut::TakenOver, fresh);
            Ok((vec![(Arc::clone(key), Some(aborted))], TransactionReply::Busy))
        }
        Stage::Empty | Stage::CompleteCommit | Stage::CompleteAbort => {
            let (next, epoch) = next_of(known, fresh);
            let begun = Transaction {
                producer: next,
                epoch,
                previous: None,
                stage: Stage::Empty,
                timeout,
                last_ended: None,
                cut: Cut::TakenOver,
                ..Transaction::clone(known)
            };
            Ok((vec![(Arc::clone(key), Some(begun))], producer(next, epoch)))
        }
    }
}

const fn producer(producer: ProducerId, epoch: ProducerEpoch) -> TransactionReply {
    TransactionReply::Producer { producer, epoch }
}

/// Who writes after the epoch that is current now. The last epoch is kept for a marker.
fn next_of(transaction: &Transaction, fresh: ProducerId) -> (ProducerId, ProducerEpoch) {
    if transaction.epoch.get() < i16::MAX - 1 {
        (transaction.producer, ProducerEpoch::new(transaction.epoch.get() + 1))
    } else {
        (fresh, ProducerEpoch::new(0))
    }
}

/// Decided, and to be ended in its partitions; at its end at once where there are none.
fn decided(transaction: &Transaction, commit: bool, cut: Cut, fresh: ProducerId) -> Transaction {
    let (next, epoch) = next_of(transaction, fresh);
    let stage = match (transaction.partitions.is_empty(), commit) {
        (false, true) => Stage::PrepareCommit,
        (false, false) => Stage::PrepareAbort,
        (true, true) => Stage::CompleteCommit,
        (true, false) => Stage::CompleteAbort,
    };
    let started_at = if transaction.partitions.is_empty() { Timestamp::NONE } else { transaction.started_at };
    Transaction {
        producer: next,
        epoch,
        previous: (next != transaction.producer).then_some(transaction.producer),
        stage,
        started_at,
        last_ended: Some((transaction.epoch, commit)),
        cut,
        ..transaction.clone()
    }
}

/// What a producer's id and epoch are to a transactional id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Current,
    /// Of the transaction that ended last.
    Ended,
    Older,
}

fn whose(transaction: &Transaction, (producer, epoch): (ProducerId, ProducerEpoch)) -> Whose {
    if (producer, epoch) == (transaction.producer, transaction.epoch) {
        Whose::Current
    } else if producer == transaction.ended_producer()
        && transaction.last_ended.is_some_and(|(ended, _)| ended == epoch)
    {
        Whose::Ended
    } else {
        Whose::Older
    }
}

fn unknown(id: &str) -> Error {
    Error::new(
        ErrorCode::UnknownTransaction,
        format!("no producer uses the transactional id `{id}`, or it was not used for long; call InitTransactions"),
    )
}

fn fenced(id: &str, transaction: &Transaction, (producer, epoch): (ProducerId, ProducerEpoch)) -> Error {
    let why = match transaction.cut {
        Cut::None | Cut::TimedOut => "that is over",
        Cut::Operator => "an operator aborted its transaction",
        Cut::TakenOver => "another instance took it over",
    };
    Error::new(
        ErrorCode::ProducerFenced,
        format!(
            "producer {producer} with epoch {epoch} does not own the transactional id `{id}` any more: {why}; stop it, or \
             begin anew with InitTransactions"
        ),
    )
}

fn timed_out(id: &str, transaction: &Transaction) -> Error {
    Error::new(
        ErrorCode::TransactionAborted,
        format!(
            "the transaction of `{id}` was open for longer than {:?}, and was aborted; call EndTransaction to abort it, and \
             begin the next one",
            transaction.timeout
        ),
    )
}

/// A transaction grows in place: it is copied once, whatever is added to it in one command.
fn add(table: &TransactionTable, additions: Vec<Addition>, now: Timestamp) -> Decided {
    let mut changed: Vec<(Arc<str>, Transaction)> = Vec::new();
    let mut places: HashMap<Arc<str>, usize> = HashMap::new();
    let mut results = Vec::with_capacity(additions.len());
    let mut bytes = 0;
    for addition in additions {
        let place = places.get(&addition.id).copied();
        let known = match place {
            Some(place) => Some(&changed[place].1),
            None => table.get(&addition.id).map(|it| &**it),
        };
        let grows = match known.ok_or_else(|| unknown(&addition.id)).and_then(|known| grows(known, &addition)) {
            Ok(grows) => grows,
            Err(error) => {
                results.push(Err(error));
                continue;
            }
        };
        if grows {
            let place = match (place, known) {
                (None, Some(known)) if bytes < PIECE_BYTES => {
                    bytes += bytes_of(known);
                    changed.push((Arc::clone(&addition.id), known.clone()));
                    places.insert(Arc::clone(&addition.id), changed.len() - 1);
                    changed.len() - 1
                }
                (Some(place), _) => place,
                _ => {
                    let what = "very large transactions are changed at once; try again in a moment";
                    results.push(Err(Error::new(ErrorCode::Overloaded, what)));
                    continue;
                }
            };
            grow(&mut changed[place].1, addition, now);
        }
        results.push(Ok(()));
    }
    let changed = changed.into_iter().map(|(id, transaction)| (id, Some(transaction))).collect();
    (changed, TransactionReply::Added(results))
}

/// About as large as its record is.
fn bytes_of(transaction: &Transaction) -> usize {
    let groups: usize = transaction.groups.iter().map(|group| group.len() + 4).sum();
    ID_BYTES_MAX + transaction.partitions.len() * PARTITION_BYTES + groups
}

/// Whether the transaction is another one with the addition: it may have it already.
///
/// # Errors
/// Why it is not taken.
fn grows(known: &Transaction, addition: &Addition) -> Result<bool, Error> {
    let (id, from) = (&addition.id, (addition.producer, addition.epoch));
    match whose(known, from) {
        Whose::Current => {}
        Whose::Ended if known.cut == Cut::TimedOut => return Err(timed_out(id, known)),
        Whose::Ended | Whose::Older => return Err(fenced(id, known, from)),
    }
    if known.stage.is_preparing() {
        return Err(Error::new(
            ErrorCode::ConcurrentTransactions,
            format!("the transaction of `{id}` before this one is being ended; try again in a moment"),
        ));
    }
    let has_partition = addition.partition.is_none_or(|tp| known.partitions.contains(&tp));
    let has_group = addition.group.as_ref().is_none_or(|group| known.groups.contains(group));
    let is_full = (!has_partition && known.partitions.len() >= PARTITIONS_MAX)
        || (!has_group && known.groups.len() >= GROUPS_MAX);
    if is_full {
        return Err(Error::new(
            ErrorCode::InvalidRequest,
            format!("a transaction has at most {PARTITIONS_MAX} partitions and {GROUPS_MAX} groups; make smaller ones"),
        ));
    }
    Ok(known.stage != Stage::Ongoing || !has_partition || !has_group)
}

fn grow(transaction: &mut Transaction, addition: Addition, now: Timestamp) {
    if transaction.stage != Stage::Ongoing {
        transaction.stage = Stage::Ongoing;
        transaction.started_at = now;
    }
    let is_lost = is_planted(Bug::WriteUnadded) && !transaction.partitions.is_empty();
    transaction.partitions.extend(addition.partition.filter(|_| !is_lost));
    transaction.groups.extend(addition.group);
}

fn end(
    table: &TransactionTable,
    id: &str,
    from: (ProducerId, ProducerEpoch),
    commit: bool,
    fresh: ProducerId,
) -> Result<Decided, Error> {
    let Some((key, known)) = table.key(id).zip(table.get(id)) else { return Err(unknown(id)) };
    match whose(known, from) {
        Whose::Older => Err(fenced(id, known, from)),
        Whose::Ended => match (known.cut, known.last_ended) {
            (Cut::Operator | Cut::TakenOver, _) => Err(fenced(id, known, from)),
            // The same again gets the same answer; and who aborts what was aborted has what he wants.
            (_, Some((_, ended))) if ended == commit => Ok((Vec::new(), producer(known.producer, known.epoch))),
            (Cut::TimedOut, _) => Err(timed_out(id, known)),
            (Cut::None, _) => Err(Error::new(
                ErrorCode::InvalidTransactionState,
                format!(
                    "the transaction of `{id}` was {} before; what is decided stays so",
                    if commit { "aborted" } else { "committed" }
                ),
            )),
        },
        Whose::Current if known.stage.is_preparing() => Err(Error::new(
            ErrorCode::ConcurrentTransactions,
            format!("the transaction of `{id}` before this one is being ended; try again in a moment"),
        )),
        Whose::Current => {
            let mut next = decided(known, commit, Cut::None, fresh);
            if next.partitions.is_empty() {
                next.groups.clear();
            }
            let reply = producer(next.producer, next.epoch);
            Ok((vec![(Arc::clone(key), Some(next))], reply))
        }
    }
}

fn abort(table: &TransactionTable, id: &str, fresh: ProducerId) -> Result<Decided, Error> {
    let Some((key, known)) = table.key(id).zip(table.get(id)) else { return Err(unknown(id)) };
    match known.stage {
        Stage::Ongoing => {
            let aborted = decided(known, false, Cut::Operator, fresh);
            Ok((vec![(Arc::clone(key), Some(aborted))], TransactionReply::Done))
        }
        Stage::PrepareAbort => Ok((Vec::new(), TransactionReply::Done)),
        Stage::PrepareCommit => Err(Error::new(
            ErrorCode::InvalidTransactionState,
            format!("the transaction of `{id}` is committed, and being ended everywhere; what is decided stays so"),
        )),
        Stage::Empty | Stage::CompleteCommit | Stage::CompleteAbort => Err(Error::new(
            ErrorCode::InvalidTransactionState,
            format!("no transaction of `{id}` is open: there is nothing to abort"),
        )),
    }
}

fn written(table: &TransactionTable, id: &Arc<str>, decision: Decision) -> Vec<(Arc<str>, Option<Transaction>)> {
    let Some(known) = table.get(id).filter(|it| it.decision() == Some(decision)) else { return Vec::new() };
    let ended = Transaction {
        stage: if decision.commit { Stage::CompleteCommit } else { Stage::CompleteAbort },
        started_at: Timestamp::NONE,
        partitions: Default::default(),
        groups: Default::default(),
        ..Transaction::clone(known)
    };
    vec![(Arc::clone(id), Some(ended))]
}
