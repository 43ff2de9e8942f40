//! The trace of a run: a hash over everything that happened, and lines for people who ask.

use std::fmt::Display;
use std::time::Duration;

use super::random::mix;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    hash: u64,
    prints: bool,
}

impl Trace {
    pub(crate) fn new(prints: bool) -> Self {
        Self { hash: 0, prints }
    }

    /// One event: `numbers` are hashed, the text is only made where it is printed.
    pub(crate) fn note<D: Display>(
        &mut self,
        at: Duration,
        kind: &'static str,
        numbers: &[u64],
        text: impl FnOnce() -> D,
    ) {
        let mut hash = mix(self.hash ^ (at.as_nanos() as u64));
        for byte in kind.bytes() {
            hash = hash.rotate_left(7) ^ u64::from(byte);
        }
        for &number in numbers {
            hash = mix(hash.wrapping_mul(31) ^ number);
        }
        self.hash = mix(hash);
        if self.prints {
            eprintln!("{:>12.6} {kind:<12} {}", at.as_secs_f64(), text());
        }
    }

    /// The same for the same run.
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }
}
