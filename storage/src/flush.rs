//! Threads that wait for the disk, so that shard threads do not: flushes, reads from far back, checkpoints.
//!
//! Group commit needs nothing else: a log has one flush in flight, and whatever is written meanwhile is covered by the
//! next. Use one pool for flushes and another for reads, so that a reader far behind cannot hold up acknowledgements.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A job for a [`FlushPool`].
pub type Job = Box<dyn FnOnce() + Send + 'static>;

/// Jobs that wait for a thread; [`FlushPool::submit`] waits for room beyond that. A log has at most one flush and one
/// checkpoint in flight, so this is reached only by readers.
pub const JOBS_WAITING_MAX: usize = 65_536;

/// A fixed number of threads, taking jobs in the order they came.
#[derive(Debug)]
pub struct FlushPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// The jobs that wait, and whether the pool is closing. Held only to push or pop; jobs run without it.
    queue: Mutex<Queue>,
    /// Signals a new job, or the end.
    job_came: Condvar,
    /// Signals room in a full queue.
    room_came: Condvar,
}

struct Queue {
    jobs: VecDeque<Job>,
    closing: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl FlushPool {
    /// Starts `threads` threads (at least one), named `<name>-<number>`.
    pub fn new(name: &str, threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { jobs: VecDeque::new(), closing: false }),
            job_came: Condvar::new(),
            room_came: Condvar::new(),
        });
        let mut pool = Self { shared, threads: Vec::with_capacity(threads.max(1)) };
        for number in 0..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("{name}-{number}")).spawn(move || shared.work())?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Hands a job to the next free thread. Waits while [`JOBS_WAITING_MAX`] jobs are ahead of it.
    pub fn submit(&self, job: Job) {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        while queue.jobs.len() >= JOBS_WAITING_MAX {
            queue = self.shared.room_came.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.jobs.push_back(job);
        drop(queue);
        self.shared.job_came.notify_one();
    }
}

impl Drop for FlushPool {
    /// Runs what was submitted, then ends the threads.
    fn drop(&mut self) {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).closing = true;
        self.shared.job_came.notify_all();
        for thread in self.threads.drain(..) {
            // A pool owned by its own job would wait for itself: that thread ends by itself after the job.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread of a flush pool ended by a panic");
            }
        }
    }
}

impl Shared {
    fn work(&self) {
        while let Some(job) = self.next_job() {
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a job of a flush pool ended by a panic");
            }
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                if queue.jobs.len() + 1 == JOBS_WAITING_MAX {
                    self.room_came.notify_all();
                }
                return Some(job);
            }
            if queue.closing {
                return None;
            }
            queue = self.job_came.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn runs_every_job_even_after_a_panic_and_on_drop() {
        // One thread: another would run the rest in its place.
        let pool = FlushPool::new("test", 1).expect("threads");
        let ran = Arc::new(AtomicUsize::new(0));
        for number in 0..100 {
            let ran = Arc::clone(&ran);
            pool.submit(Box::new(move || {
                assert_ne!(number, 50, "a planted panic");
                ran.fetch_add(1, Ordering::Relaxed);
            }));
        }
        drop(pool);
        assert_eq!(ran.load(Ordering::Relaxed), 99);
    }

    #[test]
    fn jobs_run_side_by_side() {
        let pool = FlushPool::new("test", 2).expect("threads");
        let (to_first, first) = mpsc::channel();
        let (to_second, second) = mpsc::channel();
        let (done, finished) = mpsc::channel();
        let also_done = done.clone();
        // Each waits for a word of the other, so one thread alone would never finish.
        pool.submit(Box::new(move || {
            to_second.send(()).expect("the second job waits");
            first.recv().expect("the second job answers");
            done.send(()).expect("the test waits");
        }));
        pool.submit(Box::new(move || {
            to_first.send(()).expect("the first job waits");
            second.recv().expect("the first job answers");
            also_done.send(()).expect("the test waits");
        }));
        finished.recv().expect("both run");
        finished.recv().expect("both run");
    }
}
