//! What waits to be sent on one stream.

use std::collections::VecDeque;
use std::task::{Context, Poll};

use flowstone_replication::GroupMessage;
use futures::task::AtomicWaker;
use parking_lot::Mutex;

use super::config::QueueLimits;
use super::wire::{bytes_of, items_of};

/// Room for so many messages is kept when none waits; what a burst took beyond that is given back.
const MESSAGES_KEPT: usize = 256;

/// Messages on their way to one broker: bounded, in order, filled by any thread, emptied by one task. What finds no room
/// is dropped, and the task is told to say so.
#[derive(Debug)]
pub(crate) struct Queue {
    limits: QueueLimits,
    /// Held for a push or a take; nothing waits inside.
    waiting: Mutex<Waiting>,
    /// The task that empties it.
    task: AtomicWaker,
}

#[derive(Debug, Default)]
struct Waiting {
    messages: VecDeque<GroupMessage>,
    bytes: usize,
    /// Something was dropped since this was asked for last.
    overflowed: bool,
}

impl Queue {
    pub(crate) fn new(limits: QueueLimits) -> Self {
        Self { limits, waiting: Mutex::new(Waiting::default()), task: AtomicWaker::new() }
    }

    /// Queues `messages`; from the first that finds no room on, all are dropped. Returns how many were.
    pub(crate) fn push(&self, messages: Vec<GroupMessage>) -> usize {
        let mut left = messages.len();
        let mut waiting = self.waiting.lock();
        let was_empty = waiting.messages.is_empty();
        for message in messages {
            let bytes = bytes_of(&message);
            let is_full =
                waiting.messages.len() >= self.limits.messages_max || waiting.bytes + bytes > self.limits.bytes_max;
            if is_full && !waiting.messages.is_empty() {
                break;
            }
            waiting.bytes += bytes;
            waiting.messages.push_back(message);
            left -= 1;
        }
        let first_dropped = left > 0 && !waiting.overflowed;
        waiting.overflowed |= left > 0;
        drop(waiting);
        // Else the task knows already that there is something to do.
        if was_empty || first_dropped {
            self.task.wake();
        }
        left
    }

    /// Moves the oldest messages to `into`: until they have `bytes_aim` bytes or `items_max` parts, but at least one.
    pub(crate) fn take(&self, into: &mut Vec<GroupMessage>, items_max: usize, bytes_aim: usize) {
        let (mut items, mut bytes) = (0, 0);
        let mut waiting = self.waiting.lock();
        while let Some(next) = waiting.messages.front() {
            let (next_items, next_bytes) = (items_of(next), bytes_of(next));
            if items > 0 && (items + next_items > items_max || bytes + next_bytes > bytes_aim) {
                break;
            }
            items += next_items;
            bytes += next_bytes;
            waiting.bytes -= next_bytes;
            into.extend(waiting.messages.pop_front());
        }
        if waiting.messages.is_empty() {
            waiting.messages.shrink_to(MESSAGES_KEPT);
        }
    }

    /// Whether there is something to take, or to tell; wakes the task of `cx` when there is.
    pub(crate) fn poll_work(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.task.register(cx.waker());
        let waiting = self.waiting.lock();
        if waiting.messages.is_empty() && !waiting.overflowed { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Messages that wait, and their bytes.
    pub(crate) fn waiting(&self) -> (usize, usize) {
        let waiting = self.waiting.lock();
        (waiting.messages.len(), waiting.bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.lock().messages.is_empty()
    }

    /// Whether something was dropped since this was asked last.
    pub(crate) fn take_overflow(&self) -> bool {
        std::mem::take(&mut self.waiting.lock().overflowed)
    }

    /// Drops all that waits; returns how many there were.
    pub(crate) fn clear(&self) -> usize {
        let waiting = std::mem::take(&mut *self.waiting.lock());
        waiting.messages.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use super::super::tests::{append, heartbeat};
    use super::*;

    fn queue(messages_max: usize, bytes_max: usize) -> Queue {
        Queue::new(QueueLimits { messages_max, bytes_max })
    }

    fn taken(queue: &Queue, items_max: usize, bytes_aim: usize) -> usize {
        let mut taken = Vec::new();
        queue.take(&mut taken, items_max, bytes_aim);
        taken.len()
    }

    #[test]
    fn a_full_queue_drops_and_says_so_once() {
        let queue = queue(3, usize::MAX);
        assert_eq!(queue.push(vec![heartbeat(1), heartbeat(2)]), 0);
        assert!(!queue.take_overflow());
        assert_eq!(queue.push(vec![heartbeat(3), heartbeat(4), heartbeat(5)]), 2);
        assert!(queue.take_overflow());
        assert!(!queue.take_overflow());
        assert_eq!(taken(&queue, 100, usize::MAX), 3);
        assert_eq!(queue.push(vec![heartbeat(6)]), 0);
        assert_eq!(queue.clear(), 1);
    }

    #[test]
    fn bytes_are_bounded_and_one_too_large_passes_alone() {
        let queue = queue(100, 10_000);
        assert_eq!(queue.push(vec![append(1, &[20_000])]), 0);
        assert_eq!(queue.push(vec![append(2, &[10])]), 1);
        assert_eq!(taken(&queue, 100, usize::MAX), 1);
        assert_eq!(queue.push(vec![append(3, &[6_000]), append(4, &[6_000])]), 1);
        assert_eq!(queue.clear(), 1);
        assert_eq!(queue.push(vec![append(5, &[6_000])]), 0, "what was cleared takes no room");
    }

    #[test]
    fn groups_end_at_their_aim() {
        let queue = queue(100, usize::MAX);
        queue.push((1..=10).map(|at| append(at, &[1_000])).collect());
        let one = bytes_of(&append(1, &[1_000]));
        assert_eq!(taken(&queue, 100, 1), 1, "at least one");
        assert_eq!(taken(&queue, 100, 3 * one), 3);
        assert_eq!(taken(&queue, 4, usize::MAX), 2, "each counts for itself and its entry");
        assert_eq!(taken(&queue, 100, usize::MAX), 4);
        assert_eq!(taken(&queue, 100, usize::MAX), 0);
    }

    #[test]
    fn a_burst_leaves_no_room_behind_that_nobody_needs() {
        let queue = queue(usize::MAX, usize::MAX);
        let room = || queue.waiting.lock().messages.capacity();
        queue.push((0..10 * MESSAGES_KEPT as u64).map(heartbeat).collect());
        assert_eq!(taken(&queue, MESSAGES_KEPT, usize::MAX), MESSAGES_KEPT);
        assert!(room() >= 10 * MESSAGES_KEPT, "kept while some wait: {}", room());
        taken(&queue, usize::MAX, usize::MAX);
        assert!(queue.is_empty() && room() <= MESSAGES_KEPT, "room for {}", room());
    }

    /// Counts how often it is woken.
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_task_is_woken_by_the_first_message_and_the_first_drop_alone() {
        let queue = queue(2, usize::MAX);
        let woken = Arc::new(Woken(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        let mut check = |expected: Poll<()>, times: usize| {
            assert_eq!(queue.poll_work(&mut cx), expected);
            assert_eq!(woken.0.swap(0, Ordering::Relaxed), times);
        };
        check(Poll::Pending, 0);
        queue.push(vec![heartbeat(1)]);
        check(Poll::Ready(()), 1);
        queue.push(vec![heartbeat(2)]);
        check(Poll::Ready(()), 0);
        queue.push(vec![heartbeat(3)]);
        check(Poll::Ready(()), 1);
        queue.push(vec![heartbeat(4)]);
        check(Poll::Ready(()), 0);
        queue.clear();
        check(Poll::Pending, 0);
    }
}
