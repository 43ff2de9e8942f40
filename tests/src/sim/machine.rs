//! The machine behind the simulated logs, and one around it that tells what it was given.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use flowstone_protocol::{BatchHeader, Error, Offset, RaftIndex, ReplicaId, Term, Timestamp, TopicPartition};
use flowstone_replication::{Admission, Commanded, Machine, MachineEntry};

use super::producers::Producers;

/// After this many entries the state of the machine is compared between replicas.
const COMPARED_EVERY: u64 = 8;

/// What a machine was given, or told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Heard {
    /// An entry is committed.
    Committed(CommittedEntry),
    /// The state after that entry.
    State { index: RaftIndex, state: Bytes },
    /// Its replica leads and serves.
    Leads(Term),
}

/// What identifies an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CommittedEntry {
    pub(crate) index: RaftIndex,
    pub(crate) term: Term,
    pub(crate) base_offset: Offset,
    pub(crate) next_offset: Offset,
    pub(crate) crc: u32,
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
    fn hear(&self, who: Listener, what: Heard) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((who, what));
    }

    pub(crate) fn take(&self) -> Vec<(Listener, Heard)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The machine of one replica, listened to.
#[derive(Debug)]
pub(crate) struct SimMachine {
    inner: Producers,
    who: Listener,
    ears: Arc<Ears>,
}

impl SimMachine {
    pub(crate) fn new(who: Listener, ears: Arc<Ears>) -> Self {
        Self { inner: Producers::default(), who, ears }
    }
}

impl Machine for SimMachine {
    type Command = ();
    type Reply = ();

    fn admit(&mut self, batch: &BatchHeader, _now: Timestamp) -> Admission {
        self.inner.admit(batch)
    }

    fn appended(&mut self, entry: &MachineEntry<'_>) {
        self.inner.appended(entry);
    }

    fn committed(&mut self, entry: &MachineEntry<'_>) {
        self.inner.committed(entry);
        let seen = CommittedEntry {
            index: entry.index,
            term: entry.term,
            base_offset: entry.base_offset,
            next_offset: entry.header.next_offset(),
            crc: entry.header.crc,
        };
        self.ears.hear(self.who, Heard::Committed(seen));
        if entry.index.get().is_multiple_of(COMPARED_EVERY) {
            self.ears.hear(self.who, Heard::State { index: entry.index, state: self.inner.checkpoint() });
        }
    }

    fn command(&mut self, (): (), _now: Timestamp) -> Commanded<()> {
        Commanded { batch: None, reply: () }
    }

    fn lead(&mut self, term: Term) {
        self.ears.hear(self.who, Heard::Leads(term));
    }

    fn step_down(&mut self) {
        self.inner.step_down();
    }

    fn reads_records(&self) -> bool {
        false
    }

    fn checkpoint(&self) -> Bytes {
        self.inner.checkpoint()
    }

    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), Error> {
        self.inner.restore(checkpoint)
    }
}
