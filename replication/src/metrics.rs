//! What a shard counts, for whoever shows it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Upper bounds of the flush histogram's buckets; one more follows for all that took longer.
pub const FLUSH_BUCKETS: [Duration; 10] = [
    Duration::from_micros(50),
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_micros(2_500),
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(250),
    Duration::from_secs(1),
];

/// A disk that took too long for a flush counts as slow for so long.
const SLOW_FOR: Duration = Duration::from_secs(60);

/// A shard's counters since it was started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShardMetrics {
    /// Requests that wait in the inbox just now.
    pub requests_waiting: usize,
    /// Bytes of produce requests that may still be taken in.
    pub bytes_free: usize,
    /// Steps of replicas.
    pub steps: u64,
    /// Flushes of logs.
    pub flushes: u64,
    /// Those of them that the shard's own thread ran.
    pub flushes_inline: u64,
    /// Time spent in them, side by side counted each.
    pub flush_time: Duration,
    /// How many took up to [`FLUSH_BUCKETS`], each bucket by itself; the last took longer.
    pub flush_buckets: [u64; FLUSH_BUCKETS.len() + 1],
    /// Replicas that ended because their disk failed or their core gave up.
    pub replicas_ended: u64,
    /// Elections that replicas here stood for.
    pub elections: u64,
    /// Times that a replica here began to lead.
    pub leader_changes: u64,
    /// Messages to other brokers.
    pub messages_sent: u64,
    /// Messages of other brokers, or to them, that there was no room or no way for.
    pub messages_dropped: u64,
    /// Bytes of batches and checkpoints pulled from other brokers.
    pub pulled_bytes: u64,
    /// Bytes of batches and checkpoints given to other brokers.
    pub served_bytes: u64,
    /// Bytes of sealed segments read to find rot.
    pub scrubbed_bytes: u64,
    /// Damaged ranges found.
    pub rotten_ranges: u64,
    /// Those of them that were replaced by good bytes of another replica.
    pub repaired_ranges: u64,
    /// Passes of compaction that ended.
    pub compactions: u64,
    /// Bytes that compaction read and wrote.
    pub compacted_bytes: u64,
    /// Bytes that it made room for.
    pub compaction_freed_bytes: u64,
    /// Of compacted topics' sealed segments: bytes that no pass has looked at...
    pub compaction_dirty_bytes: u64,
    /// ...and all bytes.
    pub compaction_total_bytes: u64,
}

/// The same, being counted.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) steps: AtomicU64,
    pub(crate) flushes_inline: AtomicU64,
    pub(crate) replicas_ended: AtomicU64,
    pub(crate) elections: AtomicU64,
    pub(crate) leader_changes: AtomicU64,
    pub(crate) messages_sent: AtomicU64,
    pub(crate) messages_dropped: AtomicU64,
    pub(crate) pulled_bytes: AtomicU64,
    pub(crate) served_bytes: AtomicU64,
    pub(crate) scrubbed_bytes: AtomicU64,
    pub(crate) rotten_ranges: AtomicU64,
    pub(crate) repaired_ranges: AtomicU64,
    pub(crate) compactions: AtomicU64,
    pub(crate) compacted_bytes: AtomicU64,
    pub(crate) compaction_freed_bytes: AtomicU64,
    pub(crate) compaction_dirty_bytes: AtomicU64,
    pub(crate) compaction_total_bytes: AtomicU64,
    // Guards the moment for the time of a copy.
    slow_until: Mutex<Option<Instant>>,
    // When the flush that the shard's own thread waits for will have been slow; as above.
    slow_from: Mutex<Option<Instant>>,
    flush_nanos: AtomicU64,
    flush_buckets: [AtomicU64; FLUSH_BUCKETS.len() + 1],
}

impl Counters {
    /// A flush takes, or took, so long that leadership is better off elsewhere.
    pub(crate) fn disk_is_slow(&self, now: Instant) {
        *self.slow_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(now + SLOW_FOR);
    }

    /// The shard's own thread waits for a flush, which counts as slow from then on; `None`: it is over. While it waits it
    /// tells nobody else.
    pub(crate) fn waits_for_flush(&self, slow_from: Option<Instant>) {
        *self.slow_from.lock().unwrap_or_else(PoisonError::into_inner) = slow_from;
    }

    pub(crate) fn is_disk_slow(&self, now: Instant) -> bool {
        let read = |moment: &Mutex<Option<Instant>>| *moment.lock().unwrap_or_else(PoisonError::into_inner);
        read(&self.slow_until).is_some_and(|until| now < until) || read(&self.slow_from).is_some_and(|from| now >= from)
    }

    pub(crate) fn flushed(&self, took: Duration) {
        let bucket = FLUSH_BUCKETS.iter().position(|&bound| took <= bound).unwrap_or(FLUSH_BUCKETS.len());
        self.flush_buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.flush_nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn read(&self, requests_waiting: usize, bytes_free: usize) -> ShardMetrics {
        let flush_buckets = std::array::from_fn(|i| self.flush_buckets[i].load(Ordering::Relaxed));
        ShardMetrics {
            requests_waiting,
            bytes_free,
            steps: self.steps.load(Ordering::Relaxed),
            flushes: flush_buckets.iter().sum(),
            flushes_inline: self.flushes_inline.load(Ordering::Relaxed),
            flush_time: Duration::from_nanos(self.flush_nanos.load(Ordering::Relaxed)),
            flush_buckets,
            replicas_ended: self.replicas_ended.load(Ordering::Relaxed),
            elections: self.elections.load(Ordering::Relaxed),
            leader_changes: self.leader_changes.load(Ordering::Relaxed),
            messages_sent: self.messages_sent.load(Ordering::Relaxed),
            messages_dropped: self.messages_dropped.load(Ordering::Relaxed),
            pulled_bytes: self.pulled_bytes.load(Ordering::Relaxed),
            served_bytes: self.served_bytes.load(Ordering::Relaxed),
            scrubbed_bytes: self.scrubbed_bytes.load(Ordering::Relaxed),
            rotten_ranges: self.rotten_ranges.load(Ordering::Relaxed),
            repaired_ranges: self.repaired_ranges.load(Ordering::Relaxed),
            compactions: self.compactions.load(Ordering::Relaxed),
            compacted_bytes: self.compacted_bytes.load(Ordering::Relaxed),
            compaction_freed_bytes: self.compaction_freed_bytes.load(Ordering::Relaxed),
            compaction_dirty_bytes: self.compaction_dirty_bytes.load(Ordering::Relaxed),
            compaction_total_bytes: self.compaction_total_bytes.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_counts_in_the_first_bucket_that_holds_it() {
        let counters = Counters::default();
        counters.flushed(FLUSH_BUCKETS[0]);
        counters.flushed(FLUSH_BUCKETS[0] + Duration::from_nanos(1));
        counters.flushed(Duration::from_secs(60));
        let read = counters.read(0, 0);
        assert_eq!((read.flushes, read.flush_buckets[0], read.flush_buckets[1], read.flush_buckets[10]), (3, 1, 1, 1));
    }

    #[test]
    fn a_disk_is_slow_for_a_while() {
        let (counters, now) = (Counters::default(), Instant::now());
        assert!(!counters.is_disk_slow(now));
        counters.disk_is_slow(now);
        assert!(counters.is_disk_slow(now + SLOW_FOR / 2));
        assert!(!counters.is_disk_slow(now + SLOW_FOR));
        // One that the shard itself waits for is slow before it is over.
        let from = now + 2 * SLOW_FOR;
        counters.waits_for_flush(Some(from));
        assert!(!counters.is_disk_slow(from - Duration::from_nanos(1)) && counters.is_disk_slow(from));
        counters.waits_for_flush(None);
        assert!(!counters.is_disk_slow(from));
    }
}
