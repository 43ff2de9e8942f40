//! What the clocks of one broker show. True time is a [`Duration`] since the run began.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use flowstone_protocol::Timestamp;
use flowstone_replication::Clock;

/// Parts in a million: a clock that is right.
pub(crate) const RATE_ONE: u64 = 1_000_000;
/// Where all wall clocks stand at the beginning.
const WALL_START_MILLIS: i64 = 1_700_000_000_000;

/// The clocks of one broker: one that never goes back and may be fast or slow, and one on the wall that jumps.
#[derive(Debug)]
pub(crate) struct LocalClock {
    base: Instant,
    true_nanos: AtomicU64,
    rate: u64,
    wall_off_by_millis: AtomicI64,
}

impl LocalClock {
    /// `base` is the same for all; what it shows is never looked at, only differences are.
    pub(crate) fn new(base: Instant, rate: u64) -> Arc<Self> {
        Arc::new(Self { base, true_nanos: AtomicU64::new(0), rate, wall_off_by_millis: AtomicI64::new(0) })
    }

    pub(crate) fn set(&self, moment: Duration) {
        self.true_nanos.store(u64::try_from(moment.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn now(&self) -> Instant {
        let true_nanos = u128::from(self.true_nanos.load(Ordering::Relaxed));
        self.base + Duration::from_nanos((true_nanos * u128::from(self.rate) / u128::from(RATE_ONE)) as u64)
    }

    /// The first true time at which [`Self::now`] is not before `local`.
    pub(crate) fn moment_of(&self, local: Instant) -> Duration {
        let local = local.saturating_duration_since(self.base).as_nanos();
        Duration::from_nanos((local * u128::from(RATE_ONE)).div_ceil(u128::from(self.rate)) as u64)
    }

    pub(crate) fn jump_wall(&self, millis: i64) {
        self.wall_off_by_millis.fetch_add(millis, Ordering::Relaxed);
    }

    pub(crate) fn wall(&self) -> Timestamp {
        let millis = (self.true_nanos.load(Ordering::Relaxed) / 1_000_000) as i64;
        Timestamp::new(WALL_START_MILLIS + millis + self.wall_off_by_millis.load(Ordering::Relaxed))
    }

    pub(crate) fn wall_clock(self: &Arc<Self>) -> Clock {
        let clock = Arc::clone(self);
        Arc::new(move || clock.wall())
    }
}
