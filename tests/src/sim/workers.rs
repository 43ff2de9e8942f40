//! Jobs of a broker's pools: kept until the simulation says that they end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use flowstone_replication::{JobKind, Workers};
use flowstone_storage::flush::Job;

use super::time::LocalClock;

/// Stands where a broker has threads.
pub(crate) struct SimWorkers {
    clock: Arc<LocalClock>,
    // One thread runs everything: the lock is only what `Sync` asks for.
    submitted: Mutex<Vec<(JobKind, Job)>>,
}

impl std::fmt::Debug for SimWorkers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimWorkers").finish_non_exhaustive()
    }
}

impl SimWorkers {
    pub(crate) fn new(clock: Arc<LocalClock>) -> Arc<Self> {
        Arc::new(Self { clock, submitted: Mutex::new(Vec::new()) })
    }

    /// What was submitted since the last call, in order.
    pub(crate) fn take(&self) -> Vec<(JobKind, Job)> {
        std::mem::take(&mut *self.submitted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Workers for SimWorkers {
    fn submit(&self, kind: JobKind, job: Job) {
        self.submitted.lock().unwrap_or_else(PoisonError::into_inner).push((kind, job));
    }

    fn now(&self) -> Instant {
        self.clock.now()
    }
}
