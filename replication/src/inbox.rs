//! A shard's inbox: many senders, one thread that takes everything there is at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Why a request was not taken. Carries it back, so that it can be answered.
#[derive(Debug)]
pub(crate) enum Refused<T> {
    /// As many requests as may wait are waiting.
    Full(T),
    /// The shard has stopped.
    Closed(T),
}

/// The queue. Requests are bounded by `requests_max`; what the shard's own pools report back is bounded by what the
/// shard has handed to them, and is always taken.
#[derive(Debug)]
pub(crate) struct Inbox<T> {
    // Guards the queue for the time of a push or a swap; nothing blocks while it is held.
    state: Mutex<State<T>>,
    wake: Condvar,
    // The queue's length, for a look without the lock.
    waiting: AtomicUsize,
    requests_max: usize,
}

#[derive(Debug)]
struct State<T> {
    queue: Vec<T>,
    asleep: bool,
    closed: bool,
}

impl<T> Inbox<T> {
    pub(crate) fn new(requests_max: usize) -> Self {
        Self {
            state: Mutex::new(State { queue: Vec::new(), asleep: false, closed: false }),
            wake: Condvar::new(),
            waiting: AtomicUsize::new(0),
            requests_max,
        }
    }

    // A sender that panicked holding the lock left a whole queue behind: pushing is one step.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, mut state: MutexGuard<'_, State<T>>, item: T) {
        state.queue.push(item);
        self.waiting.store(state.queue.len(), Ordering::Relaxed);
        let asleep = std::mem::take(&mut state.asleep);
        drop(state);
        // Only the first push after it fell asleep pays for the system call.
        if asleep {
            self.wake.notify_one();
        }
    }

    /// Puts a request in, if there is room.
    pub(crate) fn request(&self, item: T) -> Result<(), Refused<T>> {
        let state = self.lock();
        if state.closed {
            return Err(Refused::Closed(item));
        }
        if state.queue.len() >= self.requests_max {
            return Err(Refused::Full(item));
        }
        self.put(state, item);
        Ok(())
    }

    /// Puts a report of the shard's own pools in; gives it back when the shard has stopped.
    pub(crate) fn report(&self, item: T) -> Option<T> {
        let state = self.lock();
        if state.closed {
            return Some(item);
        }
        self.put(state, item);
        None
    }

    /// Whether nothing waits; a hint, without the lock.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0
    }

    /// How much waits; a hint, without the lock.
    pub(crate) fn len(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Moves all that waits into `taken` (which must be empty), sleeping until there is something or until `deadline`.
    pub(crate) fn take(&self, taken: &mut Vec<T>, deadline: Option<Instant>) {
        debug_assert!(taken.is_empty());
        let mut state = self.lock();
        while state.queue.is_empty() {
            state.asleep = true;
            state = match deadline {
                None => self.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
                    else {
                        break;
                    };
                    self.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        state.asleep = false;
        std::mem::swap(&mut state.queue, taken);
        self.waiting.store(0, Ordering::Relaxed);
    }

    /// Moves all that waits into `taken` (which must be empty).
    pub(crate) fn take_waiting(&self, taken: &mut Vec<T>) {
        debug_assert!(taken.is_empty());
        std::mem::swap(&mut self.lock().queue, taken);
        self.waiting.store(0, Ordering::Relaxed);
    }

    /// Takes nothing more; gives what still waits.
    pub(crate) fn close(&self) -> Vec<T> {
        let mut state = self.lock();
        state.closed = true;
        self.waiting.store(0, Ordering::Relaxed);
        std::mem::take(&mut state.queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn takes_all_in_order_and_wakes_a_sleeper() {
        let inbox = Arc::new(Inbox::new(1_000));
        let sender = Arc::clone(&inbox);
        let thread = std::thread::spawn(move || {
            for i in 0..500 {
                sender.request(i).unwrap();
            }
        });
        let mut all = Vec::new();
        while all.len() < 500 {
            let mut taken = Vec::new();
            inbox.take(&mut taken, None);
            assert!(!taken.is_empty(), "without a deadline it sleeps until there is something");
            all.extend(taken);
        }
        thread.join().unwrap();
        assert_eq!(all, (0..500).collect::<Vec<_>>());
    }

    #[test]
    fn refuses_requests_when_full_and_never_reports() {
        let inbox = Inbox::new(2);
        inbox.request(1).unwrap();
        inbox.request(2).unwrap();
        assert!(matches!(inbox.request(3), Err(Refused::Full(3))));
        assert_eq!(inbox.report(4), None);
        assert_eq!(inbox.close(), [1, 2, 4]);
        assert!(matches!(inbox.request(5), Err(Refused::Closed(5))));
        assert_eq!(inbox.report(6), Some(6));
    }

    #[test]
    fn gives_up_at_the_deadline() {
        let inbox = Inbox::<u8>::new(2);
        let mut taken = Vec::new();
        inbox.take(&mut taken, Some(Instant::now() + Duration::from_millis(2)));
        assert!(taken.is_empty());
    }
}
