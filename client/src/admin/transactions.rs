//! Transactions from outside: which are open, which hang, and how to end one.

use std::collections::BTreeMap;
use std::time::Duration;

use flowstone_protocol::pb;
use flowstone_protocol::pb::CoordinatorKind;
use flowstone_protocol::pb::transactions_client::TransactionsClient;
use serde::Serialize;

use super::Admin;
use super::groups::{MemberPartition, partitions};
use crate::coordinator::{Coordinator, ask_all_coordinators};
use crate::error::Result;

/// Where a transactional id stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TransactionState {
    /// Nothing was written under it yet.
    Empty,
    /// Open.
    Ongoing,
    /// Committed; the partitions are being told.
    PrepareCommit,
    /// Aborted; the partitions are being told.
    PrepareAbort,
    /// The last one was committed.
    CompleteCommit,
    /// The last one was aborted.
    CompleteAbort,
}

/// A transactional id in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TransactionSummary {
    /// The id.
    pub transactional_id: String,
    /// Its producer's id and epoch.
    pub producer_id: i64,
    /// Grows with each transaction.
    pub producer_epoch: i32,
    /// Where it stands.
    pub state: TransactionState,
    /// When the open one began, in milliseconds since 1970.
    pub started_at: Option<i64>,
    /// After how many milliseconds it is aborted where its producer does nothing.
    pub timeout_ms: i32,
    /// Number of partitions in it.
    pub partitions: i32,
}

/// A transactional id in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TransactionDescription {
    /// What lists tell.
    #[serde(flatten)]
    pub summary: TransactionSummary,
    /// The broker that coordinates it.
    pub coordinator: i32,
    /// The partitions written in the open transaction.
    pub written: Vec<MemberPartition>,
    /// The groups whose offsets are in it.
    pub groups: Vec<String>,
    /// The partitions that were not told of its end yet.
    pub pending: Vec<MemberPartition>,
}

impl Admin {
    /// All transactional ids, by id; with `open_longer_than` only those with a transaction that is open for longer.
    ///
    /// # Errors
    /// `TIMED_OUT` where a coordinator does not answer.
    pub async fn list_transactions(&self, open_longer_than: Option<Duration>) -> Result<Vec<TransactionSummary>> {
        let open_longer_than_ms =
            open_longer_than.map_or(0, |time| i64::try_from(time.as_millis()).unwrap_or(i64::MAX).max(1));
        let request = pb::ListTransactionsRequest { states: Vec::new(), open_longer_than_ms };
        let answers = ask_all_coordinators(&self.cluster, CoordinatorKind::Transaction, |channel| {
            let request = request.clone();
            async move { TransactionsClient::new(channel).list_transactions(request).await }
        })
        .await?;
        let listings = answers.into_iter().flat_map(|answer| answer.transactions);
        let by_id: BTreeMap<_, _> =
            listings.map(|listing| (listing.transactional_id.clone(), summary(listing))).collect();
        Ok(by_id.into_values().collect())
    }

    /// One transactional id.
    ///
    /// # Errors
    /// `UNKNOWN_TRANSACTION` for an id that nobody used.
    pub async fn describe_transaction(&self, transactional_id: &str) -> Result<TransactionDescription> {
        let request = pb::DescribeTransactionRequest { transactional_id: transactional_id.to_owned() };
        let answer = self
            .transaction_coordinator(transactional_id)
            .call(|channel| {
                let request = request.clone();
                async move { TransactionsClient::new(channel).describe_transaction(request).await }
            })
            .await?;
        Ok(TransactionDescription {
            summary: summary(answer.transaction.unwrap_or_default()),
            coordinator: answer.coordinator.map_or(-1, |broker| broker.broker_id),
            written: partitions(answer.partitions),
            groups: answer.groups,
            pending: partitions(answer.pending_markers),
        })
    }

    /// Aborts the open transaction of this id; its producer is fenced.
    ///
    /// # Errors
    /// `UNKNOWN_TRANSACTION` for an id that nobody used; `INVALID_TRANSACTION_STATE` where none is open.
    pub async fn abort_transaction(&self, transactional_id: &str) -> Result<()> {
        let request = pb::AbortTransactionRequest { transactional_id: transactional_id.to_owned() };
        self.transaction_coordinator(transactional_id)
            .call(|channel| {
                let request = request.clone();
                async move { TransactionsClient::new(channel).abort_transaction(request).await }
            })
            .await
            .map(drop)
    }

    fn transaction_coordinator(&self, transactional_id: &str) -> Coordinator {
        Coordinator::new(self.cluster.clone(), CoordinatorKind::Transaction, transactional_id)
    }
}

fn summary(listing: pb::TransactionListing) -> TransactionSummary {
    TransactionSummary {
        state: match listing.state() {
            pb::TransactionState::Unspecified | pb::TransactionState::Empty => TransactionState::Empty,
            pb::TransactionState::Ongoing => TransactionState::Ongoing,
            pb::TransactionState::PrepareCommit => TransactionState::PrepareCommit,
            pb::TransactionState::PrepareAbort => TransactionState::PrepareAbort,
            pb::TransactionState::CompleteCommit => TransactionState::CompleteCommit,
            pb::TransactionState::CompleteAbort => TransactionState::CompleteAbort,
        },
        transactional_id: listing.transactional_id,
        producer_id: listing.producer_id,
        producer_epoch: listing.producer_epoch,
        started_at: (listing.started_at >= 0).then_some(listing.started_at),
        timeout_ms: listing.timeout_ms,
        partitions: listing.partitions,
    }
}
