//! Workers that do nothing by themselves: a test does their jobs when it says so.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Instant;

use flowstone_replication::{JobKind, Workers};
use flowstone_storage::flush::Job;

/// What was ordered and not done yet, and what time it is.
#[derive(Default)]
pub(crate) struct Jobs {
    waiting: Mutex<VecDeque<Job>>,
    now: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

impl Jobs {
    /// From now on it is so late.
    pub(crate) fn set_now(&self, now: Instant) {
        *self.now.lock().unwrap() = Some(now);
    }

    /// Does all of them, in their order.
    pub(crate) fn run(&self) {
        loop {
            // A job may order the next one.
            let Some(job) = self.waiting.lock().unwrap().pop_front() else { return };
            job();
        }
    }
}

impl Workers for Jobs {
    fn submit(&self, _kind: JobKind, job: Job) {
        self.waiting.lock().unwrap().push_back(job);
    }

    fn now(&self) -> Instant {
        self.now.lock().unwrap().expect("set before the first round")
    }
}
