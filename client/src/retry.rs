//! When to try again: exponential backoff with jitter. Pure; time and chance are arguments.

use std::time::Duration;

/// Waits that double from `first` to `most`, each shortened by up to a fifth so that clients do not march in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BackoffPolicy {
    pub(crate) first: Duration,
    pub(crate) most: Duration,
}

impl BackoffPolicy {
    /// Between attempts to reach a broker.
    pub(crate) const CONNECT: Self = Self { first: Duration::from_millis(20), most: Duration::from_secs(1) };
    /// Between attempts of a request that a broker refused for now.
    pub(crate) const REQUEST: Self = Self { first: Duration::from_millis(10), most: Duration::from_secs(1) };

    /// The wait after `failures` (from 1 on) failures in a row; `chance` is uniform in `0.0..1.0`.
    pub(crate) fn wait(&self, failures: u32, chance: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(20);
        let whole = self.first.saturating_mul(1 << doublings).min(self.most);
        whole.mul_f64(1.0 - 0.2 * chance.clamp(0.0, 1.0))
    }
}

/// Failures in a row, and the wait that follows each.
#[derive(Debug)]
pub(crate) struct Backoff {
    policy: BackoffPolicy,
    failures: u32,
}

impl Backoff {
    pub(crate) const fn new(policy: BackoffPolicy) -> Self {
        Self { policy, failures: 0 }
    }

    /// Counts one more failure and says how long to wait.
    pub(crate) fn failed(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.policy.wait(self.failures, rand::random::<f64>())
    }

    /// The next failure waits the first wait again.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_most() {
        let policy = BackoffPolicy { first: Duration::from_millis(10), most: Duration::from_millis(500) };
        let waits: Vec<u128> = (1..=8).map(|failures| policy.wait(failures, 0.0).as_millis()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 500, 500]);
        assert_eq!(policy.wait(u32::MAX, 0.0), policy.most);
    }

    #[test]
    fn jitter_shortens_by_at_most_a_fifth() {
        let policy = BackoffPolicy { first: Duration::from_millis(100), most: Duration::from_secs(1) };
        assert_eq!(policy.wait(1, 1.0), Duration::from_millis(80));
        let mut backoff = Backoff::new(policy);
        for expected in [100, 200, 400] {
            let wait = backoff.failed().as_millis();
            assert!((expected * 8 / 10..=expected).contains(&wait), "{wait} for {expected}");
        }
        backoff.succeeded();
        assert!(backoff.failed().as_millis() <= 100);
    }
}
