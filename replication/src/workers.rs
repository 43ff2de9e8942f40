//! The door between a shard and the threads and the time outside of it. The simulator stands behind it, too.

use std::fmt::Debug;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
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
    /// Compaction: nobody waits for it.
    Clean,
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
    clean: FlushPool,
}

impl ThreadPools {
    pub(crate) fn start(flush: usize, read: usize, work: usize) -> std::io::Result<Self> {
        Ok(Self {
            flush: FlushPool::new("flush", flush)?,
            read: FlushPool::new("read", read)?,
            work: FlushPool::new("work", work)?,
            clean: FlushPool::new("clean", 1)?,
        })
    }
}

impl Workers for ThreadPools {
    fn submit(&self, kind: JobKind, job: Job) {
        let pool = match kind {
            JobKind::Flush => &self.flush,
            JobKind::Read => &self.read,
            JobKind::Work => &self.work,
            JobKind::Clean => &self.clean,
        };
        pool.submit(Box::new(move || run_or_stop(job)));
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// Runs a shard or a job. One that panics has found a broken invariant: nothing it would do from here on could be trusted,
/// so the process stops, and says why.
pub(crate) fn run_or_stop(run: impl FnOnce()) {
    // Unwind safe: nobody looks at anything after a panic.
    let Err(panic) = catch_unwind(AssertUnwindSafe(run)) else { return };
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a message");
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("without a name");
    let why = "the process stops, so that nothing is acknowledged that is not so";
    tracing::error!(thread, message, "a broken invariant: {why}");
    // Whatever becomes of the log's last lines.
    let mut stderr = std::io::stderr().lock();
    // There is nobody left to tell that this failed.
    drop(writeln!(stderr, "thread {thread}: a broken invariant: {message}: {why}").and_then(|()| stderr.flush()));
    std::process::abort();
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    /// Tells the test program to be the process that stops.
    const STOPS: &str = "FLOWSTONE_TEST_STOPS";
    const SIGABRT: i32 = 6;

    #[test]
    fn a_panic_of_a_job_stops_the_process_and_tells_what_it_was() {
        if std::env::var_os(STOPS).is_some() {
            // The hook that tells of panics is somebody else's to set.
            std::panic::set_hook(Box::new(|_| {}));
            let pools = ThreadPools::start(1, 1, 1).unwrap();
            pools.submit(JobKind::Work, Box::new(|| panic!("an index of {} in {}", 7, 3)));
            drop(pools);
            return;
        }
        let name = "workers::tests::a_panic_of_a_job_stops_the_process_and_tells_what_it_was";
        let mut child = Command::new(std::env::current_exe().unwrap());
        let ended = child.args(["--exact", name, "--nocapture"]).env(STOPS, "1").output().unwrap();
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.signal(), Some(SIGABRT), "{:?}: {stderr}", ended.status);
        assert!(stderr.contains("thread work-0") && stderr.contains("an index of 7 in 3"), "{stderr}");
    }
}
