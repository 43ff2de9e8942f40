//! The records of a benchmark: values that cost nothing to make, and the pace at which they go.

use std::time::{Duration, Instant};

/// Offsets into the source at which values begin: enough of them that no two neighbours are alike.
const STARTS: usize = 1 << 10;

/// Values of one size, as text that compresses about as well as real text does.
#[derive(Debug)]
pub(crate) struct Values {
    source: Vec<u8>,
    size: usize,
}

impl Values {
    pub(crate) fn new(size: usize) -> Self {
        // A linear congruential generator: the same text in every run, so that runs compare.
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let source = (0..size + STARTS)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                b"etaoin shrdlucmfwypETAOIN0123456"[(state >> 59) as usize]
            })
            .collect();
        Values { source, size }
    }

    /// Bytes of every value.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The value of a record by its number.
    pub(crate) fn value(&self, number: u64) -> &[u8] {
        let start = (number as usize).wrapping_mul(31) % STARTS;
        &self.source[start..start + self.size]
    }
}

/// When each record is due.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    began: Instant,
    /// Records per second.
    rate: f64,
}

impl Pace {
    pub(crate) fn new(began: Instant, rate: f64) -> Self {
        Pace { began, rate }
    }

    /// The moment at which a record by its number is to be sent.
    pub(crate) fn due(&self, number: u64) -> Instant {
        self.began + Duration::from_secs_f64(number as f64 / self.rate)
    }
}

/// How `total` divides among `parts`: part `index`'s share.
pub(crate) fn share(total: u64, parts: u64, index: u64) -> u64 {
    total / parts + u64::from(index < total % parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        for (total, parts) in [(10, 3), (2, 3), (9, 3), (1_000_000, 7)] {
            assert_eq!((0..parts).map(|index| share(total, parts, index)).sum::<u64>(), total);
        }
    }

    #[test]
    fn values_have_their_size_and_differ() {
        let values = Values::new(100);
        assert!((0..5_000).all(|number| values.value(number).len() == 100));
        assert_ne!(values.value(0), values.value(1));
        assert_eq!(Values::new(0).value(7), b"");
    }
}
