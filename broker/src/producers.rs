//! What a partition remembers of its producers and their transactions: the machine behind every topic's log.
//!
//! For each producer id: its epoch, its last five batches, and whether a transaction of it is open. That state follows from
//! the log alone (a batch is remembered when it is committed), so it is the same on every replica and after every restart.
//! On the leader an overlay adds what is appended and not committed yet, since that decides about the next batch too.
//!
//! ```text
//!   committed:  .. [5..7] [8..9]                    from the log, in checkpoints
//!   overlay:    .. [5..7] [8..9] [10..14] [15..15]  the leader's; dropped when it steps down
//!                                                ^ next: 16
//! ```
//!
//! A transaction is open from its first batch here to its marker. The marker carries the epoch after the transaction's own,
//! and whatever comes later under a lower epoch is refused: nothing late touches the next transaction, nor hangs.
//!
//! State is given up in two ways, both by the log alone: by the leader's word that a producer was idle for long
//! ([`ControlType::ProducerExpiry`]), and where there are more than [`PRODUCERS_MAX`], that of the one which wrote least
//! recently. Neither happens to one with an open transaction. Of what was given up enough is kept to tell the producer so.

mod checkpoint;
mod forgotten;
mod producer;
mod transactions;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::control::{decode_marker, log_start_of};
use flowstone_protocol::internal::ProducersExpired;
use flowstone_protocol::{
    BatchHeader, ControlType, Error, ErrorCode, Marker, Offset, ProducerId, RaftIndex, Sequence, Timestamp,
};
use flowstone_replication::{Admission, MachineBody, MachineEntry};
use flowstone_storage::AbortedTransaction;
use flowstone_storage::planted::{Bug, is_planted};
use prost::Message;

use forgotten::{Forgotten, Rest};
use producer::{BATCHES_MAX, Batch, Producer, Said};
use transactions::Transactions;

/// Producers that one partition remembers, and transactions that may be open in it.
const PRODUCERS_MAX: usize = 10_000;
/// Aborted transactions that one partition remembers; all of them are in each checkpoint, which must stay one that can be
/// pulled: some 25 bytes each.
const ABORTED_MAX: usize = 1 << 20;
/// Producers that one entry of the log lets go.
const EXPIRED_AT_ONCE_MAX: usize = 1_000;

/// The machine: see the module.
#[derive(Debug)]
pub(crate) struct Producers {
    committed: Known,
    /// Leader only: producers with entries in flight, these included.
    overlay: HashMap<ProducerId, Producer>,
    /// Leader only: since when each producer is seen with the same last entry.
    idle: HashMap<ProducerId, (RaftIndex, Timestamp)>,
    /// An idle producer is forgotten after this long.
    expiration: Duration,
}

/// What is committed. Equal logs lead to equal states.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    producers: HashMap<ProducerId, Producer>,
    /// Those without an open transaction, by their last entry.
    idle: BTreeMap<RaftIndex, ProducerId>,
    transactions: Transactions,
    forgotten: Forgotten,
}

impl Known {
    /// From a checkpoint.
    fn insert(&mut self, id: ProducerId, producer: Producer) {
        match producer.open {
            Some(_) if is_planted(Bug::ForgetOpenTransactions) => {}
            Some(first) => self.transactions.open(first, id),
            None => drop(self.idle.insert(producer.last_index, id)),
        }
        self.producers.insert(id, producer);
    }

    fn take(&mut self, said: &Said) {
        let id = said.id();
        let producer = self.producers.entry(id).or_insert_with(Producer::unknown);
        self.idle.remove(&producer.last_index);
        self.forgotten.remove(id);
        let before = producer.open;
        producer.take(said);
        if producer.open.is_none() {
            self.idle.insert(producer.last_index, id);
        }
        match (before, producer.open, said) {
            (None, Some(first), _) => self.transactions.open(first, id),
            (Some(first), None, Said::Ended { ended, .. }) => {
                self.transactions.end(first, ended.offset, ended.commit);
            }
            _ => {}
        }
        if self.producers.len() > PRODUCERS_MAX
            && let Some((_, idle)) = self.idle.first_key_value()
        {
            self.forget(*idle);
        }
    }

    /// Nothing below `log_start` is read any more. A transaction of which nothing else is left holds nobody up: its marker may
    /// be lost, where the log came back shorter than it was acknowledged. One that goes on is open again with its next batch.
    fn trim(&mut self, log_start: Offset) {
        self.transactions.prune(log_start);
        let is_gone = |(_, id): &(Offset, ProducerId)| {
            let last = self.producers.get(id).and_then(Producer::last);
            last.is_none_or(|batch| batch.last_offset() < log_start)
        };
        let gone: Vec<(Offset, ProducerId)> = self.transactions.open_below(log_start).filter(is_gone).collect();
        for (first, id) in gone {
            self.transactions.let_go(first);
            if let Some(producer) = self.producers.get_mut(&id) {
                producer.open = None;
                self.idle.insert(producer.last_index, id);
            }
        }
    }

    /// Gives a producer's state up, unless a transaction of it is open.
    fn forget(&mut self, id: ProducerId) {
        let Some(producer) = self.producers.get(&id).filter(|producer| producer.open.is_none()) else { return };
        let rest = Rest { epoch: producer.epoch, is_unused: producer.batches.is_empty() };
        self.idle.remove(&producer.last_index);
        self.producers.remove(&id);
        self.forgotten.push(id, rest);
    }
}

impl Default for Producers {
    fn default() -> Self {
        Self::new(Self::EXPIRATION)
    }
}

impl Producers {
    /// How long idle producers are remembered where nothing else is configured.
    pub(crate) const EXPIRATION: Duration = Duration::from_secs(24 * 60 * 60);

    /// A machine that has seen nothing, and forgets producers that were idle for so long.
    pub(crate) fn new(expiration: Duration) -> Self {
        Self { committed: Known::default(), overlay: HashMap::new(), idle: HashMap::new(), expiration }
    }

    fn known(&self, id: ProducerId) -> Option<&Producer> {
        self.overlay.get(&id).or_else(|| self.committed.producers.get(&id))
    }

    /// May this batch be appended?
    pub(crate) fn admit(&self, batch: &BatchHeader) -> Admission {
        let id = batch.producer_id;
        if id == ProducerId::NONE {
            return Admission::Append;
        }
        let begins = batch.base_sequence == Sequence::new(0);
        let Some(known) = self.known(id) else {
            return self.admit_unknown(batch, begins);
        };
        if batch.producer_epoch < known.epoch {
            if is_planted(Bug::TakeOldEpochs) {
                return Admission::Append;
            }
            return fenced(batch, known.epoch.get());
        }
        let transactional = batch.attributes.is_transactional();
        if transactional != known.transactional {
            let (is, was) = if transactional { ("", "plainly") } else { ("out", "in transactions") };
            return refuse(
                ErrorCode::InvalidTransactionState,
                format!(
                    "producer {id} sent a batch with{is} a transaction, and has written {was} so far; use another producer \
                     for that"
                ),
            );
        }
        if batch.producer_epoch > known.epoch {
            if known.open.is_some() {
                return refuse(
                    ErrorCode::ConcurrentTransactions,
                    format!("the transaction before this one of producer {id} is being ended; try again in a moment"),
                );
            }
            return match begins {
                true => self.admit_transaction(transactional),
                false => out_of_order(batch, "a new epoch begins at 0"),
            };
        }
        let (first, last) = (batch.base_sequence, batch.last_sequence());
        if let Some(original) = known.batches.iter().find(|seen| seen.first == first && seen.last == last) {
            let Batch { base_offset, index, timestamp, .. } = *original;
            return Admission::Duplicate { base_offset, index, timestamp };
        }
        let Some(newest) = known.last() else {
            return match begins {
                true => self.admit_transaction(transactional),
                false => out_of_order(batch, "a new transaction begins at 0: batches before it are missing"),
            };
        };
        let expected = newest.last.next();
        if first == expected {
            return Admission::Append;
        }
        if ahead_of(first, expected) {
            return out_of_order(batch, &format!("{expected} is next: batches before it are missing; send them first"));
        }
        refuse(
            ErrorCode::DuplicateSequence,
            format!(
                "producer {id} sent sequences {first} to {last} again, and they are too old to say at which offset they are \
                 (the last {BATCHES_MAX} batches are remembered, {expected} is next): they are stored"
            ),
        )
    }

    /// A batch of a producer of which nothing is known any more, or yet.
    fn admit_unknown(&self, batch: &BatchHeader, begins: bool) -> Admission {
        let id = batch.producer_id;
        let rest = self.committed.forgotten.get(id);
        if let Some(rest) = rest {
            if batch.producer_epoch < rest.epoch {
                return fenced(batch, rest.epoch.get());
            }
            if batch.producer_epoch == rest.epoch && !(rest.is_unused && begins) {
                return refuse(
                    ErrorCode::ProducerExpired,
                    format!(
                        "producer {id} wrote nothing here for longer than producer.id.expiration.ms, or more than \
                         {PRODUCERS_MAX} others have since: what it wrote is forgotten, and whether sequence {} was stored \
                         before cannot be told; take a new producer id",
                        batch.base_sequence
                    ),
                );
            }
        }
        if begins {
            return self.admit_transaction(batch.attributes.is_transactional());
        }
        refuse(
            ErrorCode::UnknownProducer,
            format!(
                "producer {id} begins at sequence {}, and this partition knows nothing of it (its state went with the \
                 records, or this is another log than the one it wrote to); what it sent before may or may not be stored: \
                 take a new producer id",
                batch.base_sequence
            ),
        )
    }

    /// A producer's first batch, perhaps of a transaction.
    fn admit_transaction(&self, transactional: bool) -> Admission {
        if transactional && self.committed.transactions.open_count() >= PRODUCERS_MAX {
            return refuse(
                ErrorCode::Overloaded,
                format!("{PRODUCERS_MAX} transactions are open in this partition; try again when some have ended"),
            );
        }
        if transactional && self.committed.transactions.aborted_count() >= ABORTED_MAX {
            return refuse(
                ErrorCode::Overloaded,
                format!(
                    "{ABORTED_MAX} transactions were aborted in this partition and are remembered until the log start passes \
                     them; trim the partition, or give its topic a retention"
                ),
            );
        }
        Admission::Append
    }

    /// May this transaction be ended so?
    pub(crate) fn admit_marker(&self, marker: &Marker) -> Admission {
        let id = marker.producer_id;
        let late = || {
            refuse(
                ErrorCode::ProducerFenced,
                format!(
                    "a later transaction of producer {id} than the one to be ended has begun here: that one is over"
                ),
            )
        };
        let Some(known) = self.known(id) else {
            return match self.committed.forgotten.get(id) {
                Some(rest) if marker.producer_epoch <= rest.epoch => late(),
                // What was to be written in it never came: it comes too late from now on.
                _ => Admission::Append,
            };
        };
        if let Some(ended) = known.ended
            && marker.coordinator_epoch < ended.coordinator
        {
            return refuse(
                ErrorCode::NotCoordinator,
                format!(
                    "a coordinator of epoch {} ended a transaction of producer {id} here, and this one has epoch {}: it was \
                     replaced",
                    ended.coordinator, marker.coordinator_epoch
                ),
            );
        }
        match known.ended.filter(|ended| ended.epoch == marker.producer_epoch) {
            Some(ended) if ended.commit == marker.commit => {
                Admission::Duplicate { base_offset: ended.offset, index: ended.index, timestamp: ended.timestamp }
            }
            Some(ended) => refuse(
                ErrorCode::InvalidTransactionState,
                format!(
                    "the transaction of producer {id} was {} here, and is now to be {}: this is a defect of the coordinator",
                    if ended.commit { "committed" } else { "aborted" },
                    if marker.commit { "committed" } else { "aborted" },
                ),
            ),
            None if marker.producer_epoch <= known.epoch => late(),
            None => Admission::Append,
        }
    }

    /// What the entry says of a producer; `None` where it says nothing.
    fn said(entry: &MachineEntry<'_>) -> Option<Said> {
        if let MachineBody::Records(batch) = entry.body
            && entry.header.attributes.is_control()
        {
            return match decode_marker(batch) {
                Ok(marker) => Some(Said::ended(entry, &marker)),
                Err(error) => {
                    tracing::error!(offset = entry.base_offset.get(), %error, "a marker is not understood: it ends nothing");
                    None
                }
            };
        }
        Said::wrote(entry)
    }

    /// Leader: the entry is in the log and in flight.
    pub(crate) fn appended(&mut self, entry: &MachineEntry<'_>) {
        if let Some(said) = Self::said(entry) {
            let committed = &self.committed.producers;
            let known = || committed.get(&said.id()).cloned().unwrap_or_else(Producer::unknown);
            self.overlay.entry(said.id()).or_insert_with(known).take(&said);
        }
    }

    /// The entry is committed.
    pub(crate) fn committed(&mut self, entry: &MachineEntry<'_>) {
        if let MachineBody::Control { ctype, payload } = entry.body {
            match ctype {
                ControlType::LogStart => {
                    if let Ok(log_start) = log_start_of(payload) {
                        self.committed.trim(log_start);
                    }
                }
                ControlType::ProducerExpiry => self.forget(payload),
                _ => {}
            }
            return;
        }
        let Some(said) = Self::said(entry) else { return };
        self.committed.take(&said);
        // Nothing of it is in flight any more: both would say the same.
        if self.overlay.get(&said.id()).is_some_and(|producer| producer.last_index <= entry.index) {
            self.overlay.remove(&said.id());
        }
    }

    fn forget(&mut self, payload: &[u8]) {
        match ProducersExpired::decode(payload) {
            Ok(expired) => {
                for id in expired.producer_ids {
                    self.committed.forget(ProducerId::new(id));
                }
            }
            Err(error) => {
                tracing::error!(%error, "what was said of idle producers is not understood: none is forgotten")
            }
        }
    }

    /// Leader: the producers that have been idle for too long, as the payload of a control batch.
    pub(crate) fn expired(&mut self, now: Timestamp) -> Option<Bytes> {
        let (committed, overlay, expiration) = (&self.committed.producers, &self.overlay, self.expiration);
        self.idle.retain(|id, _| committed.contains_key(id));
        let mut expired = Vec::new();
        for (id, producer) in committed {
            let (index, since) = self.idle.entry(*id).or_insert((producer.last_index, now));
            if *index != producer.last_index {
                (*index, *since) = (producer.last_index, now);
            } else if since.after(expiration) <= now && producer.open.is_none() && !overlay.contains_key(id) {
                expired.push((producer.last_index, id.get()));
            }
        }
        if expired.is_empty() {
            return None;
        }
        // Those that have been idle longest, and in an order that does not depend on a map.
        expired.sort_unstable();
        expired.truncate(EXPIRED_AT_ONCE_MAX);
        let producer_ids = expired.into_iter().map(|(_, id)| id).collect();
        Some(ProducersExpired { producer_ids }.encode_to_vec().into())
    }

    /// Whether there is anybody to be forgotten.
    pub(crate) fn may_expire(&self) -> bool {
        !self.committed.producers.is_empty()
    }

    /// Where the oldest open transaction begins, `high_watermark` where none is open.
    pub(crate) fn last_stable_offset(&self, high_watermark: Offset) -> Offset {
        if is_planted(Bug::ServeUnstable) {
            return high_watermark;
        }
        self.committed.transactions.stable(high_watermark)
    }

    /// All transactions that were aborted and that readers are told of.
    pub(crate) fn aborted_transactions(&self) -> Vec<AbortedTransaction> {
        let aborted = self.committed.transactions.aborted();
        aborted.map(|it| AbortedTransaction { producer: it.producer, first: it.first, marker: it.last }).collect()
    }

    /// Transactions that were aborted and have batches between two offsets.
    pub(crate) fn aborted_between(&self, from: Offset, to: Offset) -> Vec<(ProducerId, Offset)> {
        if is_planted(Bug::HideAborted) {
            return Vec::new();
        }
        self.committed.transactions.aborted_between(from, to)
    }

    /// Nobody has been idle under this leader yet.
    pub(crate) fn lead(&mut self) {
        self.idle.clear();
    }

    /// What was in flight may never be committed.
    pub(crate) fn step_down(&mut self) {
        self.overlay.clear();
        self.idle.clear();
    }

    pub(crate) fn checkpoint(&self) -> Bytes {
        checkpoint::encode(&self.committed)
    }

    pub(crate) fn restore(&mut self, checkpoint: &[u8]) -> Result<(), Error> {
        let committed = checkpoint::decode(checkpoint)?;
        *self = Self { committed, ..Self::new(self.expiration) };
        Ok(())
    }
}

/// Whether `a` comes after `b` on the circle of 2^31 sequence numbers: the shorter way decides.
fn ahead_of(a: Sequence, b: Sequence) -> bool {
    let distance = a.get().wrapping_sub(b.get()) & i32::MAX;
    distance != 0 && distance < 1 << 30
}

fn fenced(batch: &BatchHeader, epoch: i16) -> Admission {
    refuse(
        ErrorCode::ProducerFenced,
        format!(
            "producer {} is at epoch {epoch}, and this batch has epoch {}: its transaction is over, or a newer instance took \
             over; stop this one",
            batch.producer_id, batch.producer_epoch
        ),
    )
}

fn out_of_order(batch: &BatchHeader, why: &str) -> Admission {
    refuse(
        ErrorCode::OutOfOrderSequence,
        format!(
            "producer {} sent sequence {} of epoch {}: {why}",
            batch.producer_id, batch.base_sequence, batch.producer_epoch
        ),
    )
}

fn refuse(code: ErrorCode, message: String) -> Admission {
    Admission::Refuse(Error::new(code, message))
}

#[cfg(test)]
mod tests;
