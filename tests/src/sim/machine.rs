//! The broker's own machines behind the simulated logs, and what is around each: it tells what the machine was given.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use flowstone_broker::simulation::{Answer, Command, LogMachine};
use flowstone_protocol::{
    BatchHeader, ControlType, Error, Marker, Offset, ProducerId, RaftIndex, ReplicaId, Term, Timestamp, TopicPartition,
};
use flowstone_replication::{Admission, Commanded, Machine, MachineBody, MachineEntry};
use flowstone_storage::AbortedTransaction;
use flowstone_storage::planted::{Bug, is_planted};

/// After this many entries the state of the machine is compared with that of a replay.
const COMPARED_EVERY: u64 = 16;

/// What a machine was given, or told.
#[derive(Debug, Clone)]
pub(crate) enum Heard {
    /// An entry is committed.
    Committed(CommittedEntry),
    /// The state after that entry.
    State { index: RaftIndex, state: Bytes },
    /// Its replica leads and serves.
    Leads,
}

/// An entry, with all that a machine is given of it.
#[derive(Debug, Clone)]
pub(crate) struct CommittedEntry {
    pub(crate) index: RaftIndex,
    pub(crate) term: Term,
    pub(crate) base_offset: Offset,
    pub(crate) header: BatchHeader,
    pub(crate) body: CommittedBody,
}

/// As [`MachineBody`] has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CommittedBody {
    Header,
    Records(Bytes),
    Control(ControlType, Bytes),
}

impl CommittedEntry {
    fn of(entry: &MachineEntry<'_>) -> Self {
        let body = match entry.body {
            MachineBody::Header => CommittedBody::Header,
            MachineBody::Records(batch) => CommittedBody::Records(batch.clone()),
            MachineBody::Control { ctype, payload } => CommittedBody::Control(ctype, payload.clone()),
        };
        let MachineEntry { index, term, base_offset, header, .. } = *entry;
        Self { index, term, base_offset, header: *header, body }
    }

    pub(crate) fn next_offset(&self) -> Offset {
        self.header.next_offset()
    }

    /// Gives it to a machine that replays.
    pub(crate) fn give(&self, machine: &mut LogMachine) {
        let body = match &self.body {
            CommittedBody::Header => MachineBody::Header,
            CommittedBody::Records(batch) => MachineBody::Records(batch),
            CommittedBody::Control(ctype, payload) => MachineBody::Control { ctype: *ctype, payload },
        };
        let Self { index, term, base_offset, ref header, .. } = *self;
        machine.committed(&MachineEntry { index, term, base_offset, header, body });
    }
}

/// Who heard it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Listener {
    pub(crate) tp: TopicPartition,
    pub(crate) replica: ReplicaId,
}

/// What all machines of one broker heard since it was last emptied.
#[derive(Debug, Default)]
pub(crate) struct Ears(Mutex<Vec<(Listener, Heard)>>);

impl Ears {
    pub(crate) fn hear(&self, who: Listener, what: Heard) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((who, what));
    }

    pub(crate) fn take(&self) -> Vec<(Listener, Heard)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The machine of one replica, listened to.
#[derive(Debug)]
pub(crate) struct SimMachine {
    inner: LogMachine,
    who: Listener,
    ears: Arc<Ears>,
}

impl SimMachine {
    pub(crate) fn new(inner: LogMachine, who: Listener, ears: Arc<Ears>) -> Self {
        Self { inner, who, ears }
    }

    pub(crate) fn inner(&self) -> &LogMachine {
        &self.inner
    }
}

impl Machine for SimMachine {
    type Command = Command;
    type Reply = Result<Answer, Error>;

    fn admit(&mut self, batch: &BatchHeader, now: Timestamp) -> Admission {
        if is_planted(Bug::NoDeduplication) {
            return Admission::Append;
        }
        self.inner.admit(batch, now)
    }

    fn admit_marker(&mut self, marker: &Marker, now: Timestamp) -> Admission {
        self.inner.admit_marker(marker, now)
    }

    fn expired(&mut self, now: Timestamp) -> Option<Bytes> {
        self.inner.expired(now)
    }

    fn may_expire(&self) -> bool {
        self.inner.may_expire()
    }

    fn last_stable_offset(&self, high_watermark: Offset) -> Offset {
        self.inner.last_stable_offset(high_watermark)
    }

    fn aborted_between(&self, from: Offset, to: Offset) -> Vec<(ProducerId, Offset)> {
        self.inner.aborted_between(from, to)
    }

    fn aborted_transactions(&self) -> Vec<AbortedTransaction> {
        self.inner.aborted_transactions()
    }

    fn appended(&mut self, entry: &MachineEntry<'_>) {
        self.inner.appended(entry);
    }

    fn committed(&mut self, entry: &MachineEntry<'_>) {
        self.inner.committed(entry);
        self.ears.hear(self.who, Heard::Committed(CommittedEntry::of(entry)));
        if entry.index.get().is_multiple_of(COMPARED_EVERY) {
            self.ears.hear(self.who, Heard::State { index: entry.index, state: self.inner.checkpoint() });
        }
    }

    fn command(&mut self, command: Command, now: Timestamp) -> Commanded<Self::Reply> {
        self.inner.command(command, now)
    }

    fn lead(&mut self, term: Term) {
        self.inner.lead(term);
        self.ears.hear(self.who, Heard::Leads);
    }

    fn step_down(&mut self) {
        self.inner.step_down();
    }

    fn reads_records(&self) -> bool {
        self.inner.reads_records()
    }

    fn applies_at_append(&self) -> bool {
        self.inner.applies_at_append()
    }

    fn checkpoint(&self) -> Bytes {
        self.inner.checkpoint()
    }

    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), Error> {
        self.inner.restore(checkpoint)
    }
}
