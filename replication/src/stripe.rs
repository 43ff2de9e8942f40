//! A stripe's file of hard states, as its shard uses it: many replicas' terms, votes and flushed marks in one append and
//! one flush.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use flowstone_protocol::ReplicaId;
use flowstone_storage::hard_state::{HardStateFlushDone, HardStateFlushJob};
use flowstone_storage::{DataDir, Disk, HardState, HardStateFile, HardStateRot, OpenError, StorageError};

use crate::effects::HardStateNumber;
use crate::handle::SlotKey;
use crate::shard::StartError;

/// Who waits for a hard state to be durable.
pub(crate) type Waiter = (SlotKey, HardStateNumber);

/// One stripe. Its file is the one place that knows what a replica said last, whatever the replica does meanwhile.
#[derive(Debug)]
pub(crate) struct Stripe {
    number: u32,
    file: HardStateFile,
    /// To be appended at the end of this round; of a file that failed: by the file that follows it.
    to_append: Vec<(ReplicaId, HardState)>,
    /// Who waits for the next flush, and who for the one in flight.
    waiting: Vec<Waiter>,
    in_flight: Option<Vec<Waiter>>,
    /// Since when a flushed mark is written and not flushed.
    marked_since: Option<Instant>,
    /// Why nothing more is written to it, until it was opened anew.
    failed: Option<String>,
}

/// What [`Stripe::write`] leaves to be done.
#[derive(Debug, Default)]
pub(crate) struct Written {
    /// To run on a pool.
    pub(crate) flush: Option<HardStateFlushJob>,
    /// Whose wait is over already: the file was replaced, and that flushes it.
    pub(crate) durable: Vec<Waiter>,
}

impl Stripe {
    /// Opens its file; one that is rotten takes nothing more.
    fn open(disk: &Arc<dyn Disk>, dir: &Path, number: u32) -> Result<(Self, Option<HardStateRot>), OpenError> {
        let (file, _, rot) = HardStateFile::open(Arc::clone(disk), dir, number)?;
        let stripe = Self {
            number,
            file,
            to_append: Vec::new(),
            waiting: Vec::new(),
            in_flight: None,
            marked_since: None,
            failed: None,
        };
        Ok((stripe, rot))
    }

    /// Opens its file when a broker starts. One that is rotten is made anew: its replicas, which may have forgotten a vote,
    /// can not go on, and those that come in their places can.
    pub(crate) fn start(data_dir: &DataDir, number: u32) -> Result<Self, StartError> {
        let dir = data_dir.hard_state_dir();
        let rot = match Self::open(data_dir.disk(), &dir, number)? {
            (stripe, None) => return Ok(stripe),
            (_, Some(rot)) => rot,
        };
        let lost = data_dir.renew_hard_states(number)?;
        tracing::error!(
            stripe = number,
            position = rot.position,
            detail = rot.detail,
            ?lost,
            "a file of hard states is unreadable, and is made anew: what these replicas voted for is forgotten, they are to be replaced"
        );
        Ok(Self::open(data_dir.disk(), &dir, number)?.0)
    }

    /// What a replica said last, whether it is durable yet or not.
    pub(crate) fn state(&self, replica: ReplicaId) -> Option<HardState> {
        let new = self.to_append.iter().rev().find(|(other, _)| *other == replica).map(|(_, state)| *state);
        new.or_else(|| self.file.state(replica))
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

    /// A replica whose files are removed; its id is never used again.
    pub(crate) fn forget(&mut self, replica: ReplicaId) {
        self.to_append.retain(|(other, _)| *other != replica);
        self.file.forget(replica);
    }

    pub(crate) fn marked_since(&self) -> Option<Instant> {
        // While one is in flight its end comes first.
        if self.in_flight.is_some() || self.failed.is_some() { None } else { self.marked_since }
    }

    /// Writes what this round brought, and says which flush to run: at once where somebody waits or `flush_marks`.
    pub(crate) fn write(&mut self, flush_marks: bool) -> Result<Written, StorageError> {
        if self.failed.is_some() {
            return Ok(Written::default());
        }
        if !self.to_append.is_empty() {
            self.file.append(&self.to_append)?;
            self.to_append.clear();
        }
        // One that is almost full is replaced while there is room for what comes meanwhile.
        let is_due = flush_marks || !self.waiting.is_empty() || self.file.is_almost_full();
        if self.in_flight.is_some() || !is_due {
            return Ok(Written::default());
        }
        self.marked_since = None;
        match self.file.flush_job() {
            Some(job) => {
                self.in_flight = Some(std::mem::take(&mut self.waiting));
                Ok(Written { flush: Some(job), durable: Vec::new() })
            }
            // Nothing is left to flush, or it could not be prepared; the file says which.
            None => {
                self.file.flush()?;
                Ok(Written { flush: None, durable: std::mem::take(&mut self.waiting) })
            }
        }
    }

    /// Whose wait is over.
    pub(crate) fn flushed(&mut self, done: HardStateFlushDone) -> Result<Vec<Waiter>, StorageError> {
        let waited = self.in_flight.take().unwrap_or_default();
        self.file.flush_done(done)?;
        Ok(waited)
    }

    pub(crate) fn has_flush_in_flight(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Nothing more is written. What was to be is kept: the replicas of this stripe may know more than the file.
    pub(crate) fn fail(&mut self, why: String) {
        self.waiting.clear();
        self.marked_since = None;
        self.failed = Some(why);
    }

    /// Opens it anew after a failure, and makes durable what its replicas said: it may be more than what is found.
    pub(crate) fn reopen(&mut self, disk: &Arc<dyn Disk>, dir: &Path) -> Result<(), String> {
        let (mut anew, rot) = Self::open(disk, dir, self.number).map_err(|error| error.to_string())?;
        if rot.is_some() {
            // All that was ever said is known here.
            let states = self.file.states().collect();
            HardStateFile::replace(disk, dir, self.number, &states).map_err(|error| error.to_string())?;
            anew = Self::open(disk, dir, self.number).map_err(|error| error.to_string())?.0;
        }
        let gone: Vec<_> = anew.file.states().map(|(replica, _)| replica).collect();
        for replica in gone.into_iter().filter(|&replica| self.state(replica).is_none()) {
            anew.file.forget(replica);
        }
        let mut known: Vec<_> = self.file.states().collect();
        // The same states make the same bytes.
        known.sort_unstable_by_key(|(replica, _)| *replica);
        known.extend(self.to_append.iter().copied());
        anew.file.append(&known).and_then(|()| anew.file.flush()).map_err(|error| error.to_string())?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use flowstone_protocol::{RaftIndex, Term};
    use flowstone_storage::SimDisk;
    use flowstone_storage::sim_disk::{Crash, Operation};

    const DIR: &str = "/hard-states";

    fn disk() -> (SimDisk, Arc<dyn Disk>) {
        let sim = SimDisk::new(1);
        let disk = sim.shared();
        disk.create_dir_all(Path::new(DIR)).unwrap();
        HardStateFile::create(&disk, Path::new(DIR), 0).unwrap();
        (sim, disk)
    }

    fn open(disk: &Arc<dyn Disk>) -> Stripe {
        Stripe::open(disk, Path::new(DIR), 0).unwrap().0
    }

    fn state(term: u64) -> HardState {
        HardState { term: Term::new(term), vote: None, flushed: RaftIndex::new(term) }
    }

    /// Writes and flushes; says how many waits are over.
    fn flush(stripe: &mut Stripe) -> usize {
        let Written { flush, durable } = stripe.write(true).unwrap();
        durable.len() + flush.map_or(0, |job| stripe.flushed(job.run()).unwrap().len())
    }

    #[test]
    fn nobody_waits_for_ever_when_the_file_is_replaced() {
        let (_, disk) = disk();
        let mut stripe = open(&disk);
        let slot = SlotKey { index: 0, life: 0 };
        // Each round begins a block of its own: the file is full, and replaced, many times.
        for round in 1..3_000 {
            stripe.put(slot, HardStateNumber(round), ReplicaId::new(round % 7 + 1), state(round));
            assert_eq!(flush(&mut stripe), 1, "round {round}");
        }
    }

    #[test]
    fn a_removed_replica_does_not_come_back() {
        let (sim, disk) = disk();
        let (kept, removed) = (ReplicaId::new(1), ReplicaId::new(2));
        let mut stripe = open(&disk);
        stripe.mark(kept, state(3), Instant::now());
        stripe.mark(removed, state(4), Instant::now());
        flush(&mut stripe);
        stripe.mark(removed, state(5), Instant::now());
        stripe.forget(removed);
        assert_eq!(stripe.state(removed), None);
        stripe.mark(kept, state(3), Instant::now());
        flush(&mut stripe);
        drop(stripe);
        sim.restart(Crash::Power);
        let disk = sim.shared();
        let stripe = open(&disk);
        assert_eq!(stripe.file.states().collect::<Vec<_>>(), [(kept, state(3))]);
    }

    #[test]
    fn a_file_opened_anew_knows_what_was_not_appended_and_who_is_closed() {
        let (sim, disk) = disk();
        let mut stripe = open(&disk);
        let slot = SlotKey { index: 0, life: 0 };
        stripe.mark(ReplicaId::new(1), state(3), Instant::now());
        sim.fail(Operation::Sync, 0);
        let job = stripe.write(true).unwrap().flush.unwrap();
        assert!(stripe.flushed(job.run()).is_err());
        stripe.put(slot, HardStateNumber(1), ReplicaId::new(2), state(5));
        stripe.fail("its flush failed".to_owned());
        assert_eq!(stripe.state(ReplicaId::new(2)), Some(state(5)));
        assert!(stripe.write(true).unwrap().flush.is_none(), "nothing is written to it meanwhile");
        stripe.reopen(&disk, Path::new(DIR)).unwrap();
        assert_eq!(stripe.failed(), None);
        drop(stripe);
        sim.restart(Crash::Power);
        let disk = sim.shared();
        let stripe = open(&disk);
        assert_eq!(stripe.state(ReplicaId::new(1)), Some(state(3)));
        assert_eq!(stripe.state(ReplicaId::new(2)), Some(state(5)));
    }

    #[test]
    fn one_flush_serves_all_who_waited_when_it_began() {
        let (_, disk) = disk();
        let mut stripe = open(&disk);
        let slot = |index| SlotKey { index, life: 0 };
        for index in 0..100 {
            stripe.put(slot(index), HardStateNumber(1), ReplicaId::new(u64::from(index) + 1), state(2));
        }
        let job = stripe.write(false).unwrap().flush.expect("they wait");
        stripe.put(slot(100), HardStateNumber(1), ReplicaId::new(101), state(2));
        assert!(stripe.write(false).unwrap().flush.is_none(), "one at a time");
        assert_eq!(stripe.flushed(job.run()).unwrap().len(), 100, "not the one who came later");
        let job = stripe.write(false).unwrap().flush.expect("it waits");
        assert_eq!(stripe.flushed(job.run()).unwrap(), [(slot(100), HardStateNumber(1))]);
        assert!(stripe.write(true).unwrap().flush.is_none(), "nothing is left to flush");
    }
}
