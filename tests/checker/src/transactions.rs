//! Transactions, as their sender knows them.

/// A transaction of a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TransactionId(pub(crate) u32);

impl TransactionId {
    /// Its number in its history, from 0.
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// How a transaction ended, as far as its sender knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionEnd {
    /// The commit was acknowledged.
    Committed,
    /// The abort was acknowledged, or nobody ever asked for a commit and it was fenced.
    Aborted,
    /// A commit was asked for; nobody knows what became of it.
    Unknown,
}

/// What is known of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// No commit was asked for.
    Open,
    /// A commit is under way: it may be visible from now on.
    Committing,
    /// It ended.
    Ended(TransactionEnd),
}
