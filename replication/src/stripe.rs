//! A stripe's file of hard states, as its shard uses it: many replicas' terms, votes and flushed marks in one append and
//! one flush.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use flowstone_protocol::ReplicaId;
use flowstone_storage::hard_state::{HardStateFlushDone, HardStateFlushJob};
use flowstone_storage::{Disk, HardState, HardStateFile, HardStateRot, OpenError, StorageError};

use crate::effects::HardStateNumber;
use crate::handle::SlotKey;

/// One stripe.
#[derive(Debug)]
pub(crate) struct Stripe {
    number: u32,
    file: HardStateFile,
    /// What the file said of replicas that were not opened since.
    found: HashMap<ReplicaId, HardState>,
    /// Something in it is unreadable: what its replicas voted may be forgotten.
    rot: Option<HardStateRot>,
    /// To be appended at the end of this round.
    to_append: Vec<(ReplicaId, HardState)>,
    /// Who waits for the next flush, and who for the one in flight.
    waiting: Vec<(SlotKey, HardStateNumber)>,
    in_flight: Option<Vec<(SlotKey, HardStateNumber)>>,
    /// Since when a flushed mark is written and not flushed.
    marked_since: Option<Instant>,
    /// Why nothing more is written to it, until it was opened anew.
    failed: Option<String>,
}

impl Stripe {
    pub(crate) fn open(disk: &Arc<dyn Disk>, dir: &Path, number: u32) -> Result<Self, OpenError> {
        let (file, found, rot) = HardStateFile::open(Arc::clone(disk), dir, number)?;
        Ok(Self {
            number,
            file,
            found,
            rot,
            to_append: Vec::new(),
            waiting: Vec::new(),
            in_flight: None,
            marked_since: None,
            failed: None,
        })
    }

    /// What is known of a replica that is to be opened.
    pub(crate) fn found(&self, replica: ReplicaId) -> Option<HardState> {
        self.found.get(&replica).copied()
    }

    /// Why its replicas must not take part, if so.
    pub(crate) fn rotten(&self) -> Option<String> {
        self.rot.as_ref().map(|rot| {
            format!(
                "the hard states of stripe {} are unreadable at byte {} ({}): what its replicas voted for may be forgotten; restore the file from a backup, or recover the partition explicitly",
                self.number, rot.position, rot.detail
            )
        })
    }

    pub(crate) fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// A term or vote that somebody waits for.
    pub(crate) fn put(&mut self, slot: SlotKey, number: HardStateNumber, replica: ReplicaId, state: HardState) {
        self.to_append.push((replica, state));
        self.waiting.push((slot, number));
    }

    /// How far a log is flushed; nobody waits, it is flushed within a second.
    pub(crate) fn mark(&mut self, replica: ReplicaId, state: HardState, now: Instant) {
        self.to_append.push((replica, state));
        self.marked_since.get_or_insert(now);
    }

    /// What a replica that was closed is opened with the next time.
    pub(crate) fn remember(&mut self, replica: ReplicaId, state: HardState) {
        self.found.insert(replica, state);
    }

    pub(crate) fn forget(&mut self, replica: ReplicaId) {
        self.found.remove(&replica);
        self.file.forget(replica);
    }

    pub(crate) fn marked_since(&self) -> Option<Instant> {
        // While one is in flight its end comes first.
        if self.in_flight.is_some() || self.failed.is_some() { None } else { self.marked_since }
    }

    /// Writes what this round brought, and says which flush to run: at once where somebody waits or `flush_marks`.
    pub(crate) fn write(&mut self, flush_marks: bool) -> Result<Option<HardStateFlushJob>, StorageError> {
        if self.failed.is_some() {
            return Ok(None);
        }
        if !self.to_append.is_empty() {
            self.file.append(&self.to_append)?;
            self.to_append.clear();
        }
        if self.in_flight.is_some() || (self.waiting.is_empty() && !flush_marks) {
            return Ok(None);
        }
        self.marked_since = None;
        match self.file.flush_job() {
            Some(job) => {
                self.in_flight = Some(std::mem::take(&mut self.waiting));
                Ok(Some(job))
            }
            // Nothing to flush, or it could not be prepared; the file says which.
            None => self.file.flush().map(|()| None),
        }
    }

    /// Whose wait is over.
    pub(crate) fn flushed(
        &mut self,
        done: HardStateFlushDone,
    ) -> Result<Vec<(SlotKey, HardStateNumber)>, StorageError> {
        let waited = self.in_flight.take().unwrap_or_default();
        self.file.flush_done(done)?;
        Ok(waited)
    }

    pub(crate) fn has_flush_in_flight(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Nothing more is written.
    pub(crate) fn fail(&mut self, why: String) {
        self.to_append.clear();
        self.waiting.clear();
        self.marked_since = None;
        self.failed = Some(why);
    }

    /// Opens it anew after a failure, and makes durable what its replicas know: it may be more than what was found.
    pub(crate) fn reopen(
        &mut self,
        disk: &Arc<dyn Disk>,
        dir: &Path,
        known: &[(ReplicaId, HardState)],
    ) -> Result<(), String> {
        let mut anew = Self::open(disk, dir, self.number).map_err(|error| error.to_string())?;
        anew.file.append(known).and_then(|()| anew.file.flush()).map_err(|error| error.to_string())?;
        *self = anew;
        Ok(())
    }

    /// Appends and flushes all, waiting for the disk: at the end.
    pub(crate) fn finish(&mut self) -> Result<(), StorageError> {
        if self.failed.is_some() {
            return Ok(());
        }
        self.file.append(&std::mem::take(&mut self.to_append))?;
        self.file.flush()
    }
}
