//! The door between a shard and the threads and the time outside of it. The simulator stands behind it, too.

use std::fmt::Debug;
use std::time::Instant;

use flowstone_storage::FlushPool;
use flowstone_storage::flush::Job;

/// What a job does: jobs of one kind must not wait for those of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum JobKind {
    /// Flushes of logs and of hard states: acknowledgements wait for them.
    Flush,
    /// Reads from far back.
    Read,
    /// Openings, checkpoints, removals.
    Work,
}

/// Runs what a shard must not wait for, and says how late it is.
pub trait Workers: Debug + Send + Sync + 'static {
    /// Runs a job once, at some time, beside the shard; jobs may end in any order. A job reports back by itself.
    fn submit(&self, kind: JobKind, job: Job);

    /// The time that deadlines and durations are measured in. It never goes back.
    fn now(&self) -> Instant;
}

/// A pool of threads for each kind.
#[derive(Debug)]
pub(crate) struct ThreadPools {
    flush: FlushPool,
    read: FlushPool,
    work: FlushPool,
}

impl ThreadPools {
    pub(crate) fn start(flush: usize, read: usize, work: usize) -> std::io::Result<Self> {
        Ok(Self {
            flush: FlushPool::new("flush", flush)?,
            read: FlushPool::new("read", read)?,
            work: FlushPool::new("work", work)?,
        })
    }
}

impl Workers for ThreadPools {
    fn submit(&self, kind: JobKind, job: Job) {
        let pool = match kind {
            JobKind::Flush => &self.flush,
            JobKind::Read => &self.read,
            JobKind::Work => &self.work,
        };
        pool.submit(Box::new(move || {
            let _guard = StopTheProcess;
            job();
        }));
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// A shard or a job that panics has found a broken invariant: nothing it would do from here on could be trusted.
pub(crate) struct StopTheProcess;

impl Drop for StopTheProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a broken invariant: the process stops, so that nothing is acknowledged that is not so");
            std::process::abort();
        }
    }
}
