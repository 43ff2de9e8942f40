//! What one coordinator knows of its transactional ids.
//!
//! Each transaction has an epoch of its own. The step that decides it hands out the next epoch, so that nothing late of one
//! transaction, neither a write nor an end, is ever taken for the next one's:
//!
//! ```text
//!   Empty --add--> Ongoing --end, timeout, operator, takeover--> Prepare{Commit,Abort} --all markers--> Complete{..}
//!    ^   epoch 4             epoch 4                              epoch 5 from here on                       |
//!    +--- init: epoch + 1 ---+----------------- add: Ongoing again, epoch 5 <--------------------------------+
//! ```
//!
//! At the last but one epoch the next transaction gets another producer id, and the markers the last epoch.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::internal::{TransactionEntry, TransactionsCheckpoint};
use flowstone_protocol::{Error, ErrorCode, Offset, ProducerEpoch, ProducerId, Timestamp, TopicPartition, pb};
use prost::Message;

use super::commands::{self, TransactionCommand, TransactionReply};
use super::records::{self, TransactionRecord};
use crate::coordinator::StateMachine;

/// What transactions may ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TransactionRules {
    /// The longest that a transaction may be open.
    pub(crate) timeout_max: Duration,
    /// A transactional id that was not used for so long is forgotten.
    pub(crate) id_expiration: Duration,
    /// Transactional ids of one partition of `__transaction_state`.
    pub(crate) ids_max: usize,
}

impl Default for TransactionRules {
    fn default() -> Self {
        Self {
            timeout_max: Duration::from_secs(15 * 60),
            id_expiration: Duration::from_secs(7 * 24 * 60 * 60),
            ids_max: 100_000,
        }
    }
}

/// Where a transaction is. Numbers are those of [`pb::TransactionState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Stage {
    /// Nothing written yet.
    Empty = 1,
    Ongoing = 2,
    /// Decided; the markers are being written.
    PrepareCommit = 3,
    PrepareAbort = 4,
    CompleteCommit = 5,
    CompleteAbort = 6,
}

impl Stage {
    pub(super) const fn from_number(number: i32) -> Option<Self> {
        Some(match number {
            1 => Self::Empty,
            2 => Self::Ongoing,
            3 => Self::PrepareCommit,
            4 => Self::PrepareAbort,
            5 => Self::CompleteCommit,
            6 => Self::CompleteAbort,
            _ => return None,
        })
    }

    pub(crate) const fn to_pb(self) -> pb::TransactionState {
        match self {
            Self::Empty => pb::TransactionState::Empty,
            Self::Ongoing => pb::TransactionState::Ongoing,
            Self::PrepareCommit => pb::TransactionState::PrepareCommit,
            Self::PrepareAbort => pb::TransactionState::PrepareAbort,
            Self::CompleteCommit => pb::TransactionState::CompleteCommit,
            Self::CompleteAbort => pb::TransactionState::CompleteAbort,
        }
    }

    pub(crate) const fn is_preparing(self) -> bool {
        matches!(self, Self::PrepareCommit | Self::PrepareAbort)
    }
}

/// Why a transaction ended that its producer did not end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Cut {
    /// It did.
    #[default]
    None,
    /// It was open for too long. Its producer is not replaced by anybody, and may go on with the next one.
    TimedOut,
    /// An operator ended it.
    Operator,
    /// Another instance took the transactional id over.
    TakenOver,
}

impl Cut {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::None => "",
            Self::TimedOut => "timed out",
            Self::Operator => "aborted by an operator",
            Self::TakenOver => "taken over",
        }
    }

    /// A reason that a newer release gives cuts a producer off all the same.
    pub(super) fn named(name: &str) -> Self {
        match name {
            "" => Self::None,
            "timed out" => Self::TimedOut,
            "taken over" => Self::TakenOver,
            _ => Self::Operator,
        }
    }
}

/// One transactional id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transaction {
    /// Who may write now, and under which epoch: while markers are being written, those of the next transaction.
    pub(crate) producer: ProducerId,
    pub(crate) epoch: ProducerEpoch,
    /// The id of the transaction before, where that was another one.
    pub(crate) previous: Option<ProducerId>,
    pub(crate) stage: Stage,
    pub(crate) timeout: Duration,
    /// [`Timestamp::NONE`] while none is open.
    pub(crate) started_at: Timestamp,
    pub(crate) updated_at: Timestamp,
    /// Where it wrote, until all markers are there.
    pub(crate) partitions: BTreeSet<TopicPartition>,
    /// Whose offsets are in it.
    pub(crate) groups: BTreeSet<Arc<str>>,
    /// The epoch of the transaction before, and whether it was committed: for who asks again.
    pub(crate) last_ended: Option<(ProducerEpoch, bool)>,
    /// How that came to its end; or why whoever was before is cut off.
    pub(crate) cut: Cut,
}

/// What ends a decided transaction in its partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Decision {
    pub(crate) producer: ProducerId,
    /// One above that of the transaction.
    pub(crate) epoch: ProducerEpoch,
    pub(crate) commit: bool,
}

impl Transaction {
    /// The id under which the last transaction wrote.
    pub(super) fn ended_producer(&self) -> ProducerId {
        self.previous.unwrap_or(self.producer)
    }

    /// What the markers say, while they are being written.
    pub(crate) fn decision(&self) -> Option<Decision> {
        let (epoch, commit) = self.last_ended.filter(|_| self.stage.is_preparing())?;
        Some(Decision {
            producer: self.ended_producer(),
            epoch: ProducerEpoch::new(epoch.get().saturating_add(1)),
            commit,
        })
    }

    /// When it is to be aborted, if it is open.
    pub(crate) fn due(&self) -> Option<Timestamp> {
        (self.stage == Stage::Ongoing).then(|| self.started_at.after(self.timeout))
    }
}

/// All transactional ids of one partition of `__transaction_state`.
#[derive(Clone, Debug)]
pub(crate) struct TransactionTable {
    rules: Arc<TransactionRules>,
    transactions: HashMap<Arc<str>, Arc<Transaction>>,
    /// Those that are open, by when they are due.
    due: BTreeSet<(Timestamp, Arc<str>)>,
    /// Those whose markers are being written.
    preparing: BTreeSet<Arc<str>>,
    applied: Option<Offset>,
}

impl TransactionTable {
    pub(crate) fn new(rules: Arc<TransactionRules>) -> Self {
        Self { rules, transactions: HashMap::new(), due: BTreeSet::new(), preparing: BTreeSet::new(), applied: None }
    }

    pub(crate) fn rules(&self) -> &TransactionRules {
        &self.rules
    }

    pub(crate) fn get(&self, id: &str) -> Option<&Arc<Transaction>> {
        self.transactions.get(id)
    }

    pub(crate) fn key(&self, id: &str) -> Option<&Arc<str>> {
        self.transactions.get_key_value(id).map(|(id, _)| id)
    }

    /// All of them, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Transaction>)> {
        self.transactions.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.transactions.len()
    }

    /// Open ones that have to be aborted at `now`, the one that is longest overdue first.
    pub(crate) fn overdue(&self, now: Timestamp) -> impl Iterator<Item = &Arc<str>> {
        self.due.iter().take_while(move |(due, _)| *due <= now).map(|(_, id)| id)
    }

    /// Those whose markers are being written.
    pub(crate) fn preparing(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Transaction>)> {
        self.preparing.iter().filter_map(|id| self.transactions.get_key_value(id))
    }

    /// Those that were not used for so long that they are to be forgotten at `now`.
    pub(crate) fn unused(&self, now: Timestamp) -> impl Iterator<Item = &Arc<str>> {
        self.transactions.iter().filter(move |(_, it)| self.is_unused(it, now)).map(|(id, _)| id)
    }

    pub(super) fn is_unused(&self, transaction: &Transaction, now: Timestamp) -> bool {
        let rests = matches!(transaction.stage, Stage::Empty | Stage::CompleteCommit | Stage::CompleteAbort);
        rests && transaction.updated_at.after(self.rules.id_expiration) <= now
    }

    fn put(&mut self, id: Arc<str>, transaction: Transaction) {
        self.remove(&id);
        if let Some(due) = transaction.due() {
            self.due.insert((due, Arc::clone(&id)));
        }
        if transaction.stage.is_preparing() {
            self.preparing.insert(Arc::clone(&id));
        }
        self.transactions.insert(id, Arc::new(transaction));
    }

    fn remove(&mut self, id: &str) {
        if let Some((id, before)) = self.transactions.remove_entry(id) {
            self.preparing.remove(&id);
            if let Some(due) = before.due() {
                self.due.remove(&(due, id));
            }
        }
    }
}

impl StateMachine for TransactionTable {
    type Command = TransactionCommand;
    type Reply = TransactionReply;
    type Record = TransactionRecord;

    fn decide(
        &self,
        command: TransactionCommand,
        now: Timestamp,
    ) -> (Vec<TransactionRecord>, Result<TransactionReply, Error>) {
        match commands::decide(self, command, now) {
            Ok((changes, reply)) => {
                let record = |(id, it): (Arc<str>, Option<Transaction>)| {
                    let value = it.map(|it| records::to_value(&Transaction { updated_at: now, ..it }));
                    TransactionRecord { id, value }
                };
                (changes.into_iter().map(record).collect(), Ok(reply))
            }
            Err(error) => (Vec::new(), Err(error)),
        }
    }

    fn apply(&mut self, record: TransactionRecord, at: Offset) -> Result<(), Error> {
        match record.value {
            Some(value) => {
                let transaction = records::from_value(&value).map_err(|error| {
                    Error::new(error.code, format!("the transaction record at offset {at}: {}", error.message))
                })?;
                self.put(record.id, transaction);
            }
            None => self.remove(&record.id),
        }
        self.applied = Some(at);
        Ok(())
    }

    fn applied(&self) -> Offset {
        self.applied.unwrap_or(Offset::new(-1))
    }

    fn checkpoint(&self) -> Bytes {
        let mut transactions: Vec<TransactionEntry> = self
            .transactions
            .iter()
            .map(|(id, it)| TransactionEntry { transactional_id: id.to_string(), value: Some(records::to_value(it)) })
            .collect();
        // Equal states have equal checkpoints.
        transactions.sort_by(|a, b| a.transactional_id.cmp(&b.transactional_id));
        TransactionsCheckpoint { transactions, applied: self.applied().get() }.encode_to_vec().into()
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut fresh = Self::new(Arc::clone(&self.rules));
        if !bytes.is_empty() {
            let malformed =
                |what: String| Error::new(ErrorCode::CorruptLog, format!("the transactions' checkpoint {what}"));
            let checkpoint =
                TransactionsCheckpoint::decode(bytes).map_err(|error| malformed(format!("is malformed: {error}")))?;
            for entry in checkpoint.transactions {
                let value = entry.value.ok_or_else(|| malformed("has an id without a state".to_owned()))?;
                fresh.put(entry.transactional_id.into(), records::from_value(&value)?);
            }
            fresh.applied = (checkpoint.applied >= 0).then(|| Offset::new(checkpoint.applied));
        }
        *self = fresh;
        Ok(())
    }
}
