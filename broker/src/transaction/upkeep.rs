//! What a coordinator of transactions does without being asked, decided apart from doing it: who acts for it, between
//! brokers or simulated ones, asks here.

use std::collections::BTreeSet;
use std::sync::Arc;

use flowstone_protocol::{Error, ErrorCode, LeaderEpoch, Marker, ProducerId, Timestamp, TopicPartition};

use flowstone_storage::planted::{Bug, is_planted};

use super::commands::TransactionCommand;
use super::endings::{Ending, Endings, Turn};
use super::state::{Decision, TransactionTable};

/// Ids forgotten, or aborted for their time, at one go.
const AT_ONCE: usize = 1_000;

/// What the clock asks for: transactions that were open for too long, and, where `forgets`, ids that were not used for long.
pub(crate) fn due(
    table: &TransactionTable,
    now: Timestamp,
    forgets: bool,
    mut fresh: impl FnMut() -> ProducerId,
) -> Vec<TransactionCommand> {
    let overdue = table.overdue(now).take(AT_ONCE).cloned();
    let mut due: Vec<TransactionCommand> =
        overdue.map(|id| TransactionCommand::TimeOut { id, fresh: fresh() }).collect();
    if !due.is_empty() {
        tracing::info!(count = due.len(), "transactions were open for too long; they are aborted");
    }
    let mut unused: Vec<Arc<str>> =
        if forgets { table.unused(now).take(AT_ONCE).cloned().collect() } else { Vec::new() };
    unused.sort_unstable();
    if !unused.is_empty() {
        due.push(TransactionCommand::Forget(unused));
    }
    due
}

/// Gives places to what is decided in this partition and not known of yet; and whether there were too few of them.
pub(crate) fn begin_decided(
    endings: &mut Endings,
    (tp, epoch): (TopicPartition, LeaderEpoch),
    table: &TransactionTable,
) -> (Vec<Turn>, bool) {
    let room = endings.room();
    let preparing = table.preparing().filter_map(|(id, transaction)| {
        let key: Ending = (tp, epoch, Arc::clone(id), transaction.decision()?);
        (!endings.is_known(&key)).then(|| (key, transaction.partitions.clone()))
    });
    let decided: Vec<(Ending, BTreeSet<TopicPartition>)> = preparing.take(room + 1).collect();
    let is_short = decided.len() > room;
    (decided.into_iter().filter_map(|(key, partitions)| endings.begin(key, partitions)).collect(), is_short)
}

/// What a partition that is not a group coordinator's is asked to write.
pub(crate) fn marker_of(decision: Decision, coordinator: LeaderEpoch) -> Marker {
    Marker {
        producer_id: decision.producer,
        producer_epoch: decision.epoch,
        commit: decision.commit,
        coordinator_epoch: coordinator,
    }
}

/// What a marker's refusal means for its partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// The transaction has come to its end there.
    Over,
    Again,
}

pub(crate) const fn after(refusal: &Error) -> After {
    match refusal.code {
        // A later transaction began there: this one is over.
        ErrorCode::ProducerFenced => After::Over,
        // It has an end there, and no second one is ever taken: after a recovery of the coordinator's log with a loss, what
        // was decided may have been decided anew.
        ErrorCode::InvalidTransactionState => After::Over,
        _ => After::Again,
    }
}

impl Turn {
    /// What a partition answered; whether it needs no other try.
    pub(crate) fn take(&mut self, tp: TopicPartition, written: &Result<(), Error>) -> bool {
        let is_over = written.as_ref().err().is_none_or(|refusal| after(refusal) == After::Over);
        if is_over || is_planted(Bug::LoseMarkers) {
            self.left.remove(&tp);
        }
        is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_that_stays_so_is_not_tried_again() {
        for (code, wanted) in [
            (ErrorCode::ProducerFenced, After::Over),
            (ErrorCode::InvalidTransactionState, After::Over),
            (ErrorCode::NotCoordinator, After::Again),
            (ErrorCode::NotLeader, After::Again),
            (ErrorCode::NoLeader, After::Again),
            (ErrorCode::TimedOut, After::Again),
            (ErrorCode::Overloaded, After::Again),
            (ErrorCode::Internal, After::Again),
        ] {
            assert_eq!(after(&Error::new(code, "")), wanted, "{code}");
        }
    }
}
