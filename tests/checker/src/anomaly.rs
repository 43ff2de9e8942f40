//! What can be wrong with a history, and the verdict on one.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use flowstone_protocol::{Offset, PartitionId};

/// A way in which a history cannot have come from a log that keeps its promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// One offset was read with two values.
    InconsistentOffsets,
    /// One value of an idempotent sender lies at two offsets, or two values are made of one offset that was read.
    Duplicate,
    /// An acknowledged value below the highest offset read that no one read; or an offset that was consumed, of which nothing
    /// came.
    LostWrite,
    /// Acknowledged, and not there after healing and a full reading.
    Unseen,
    /// Read, although its send or its transaction failed for certain.
    AbortedRead,
    /// Read by a committed reader before its transaction's commit was asked for.
    PreCommittedRead,
    /// One part of a transaction was read, another is missing.
    TornTransaction,
    /// A reader jumped over values that are there.
    Skip,
    /// A reader went back, or was given an offset again.
    NonMonotonicRead,
    /// A sender's later value lies before its earlier one.
    NonMonotonicSend,
    /// A mark moved back: high watermark, last stable offset, log start, a committed offset.
    Regression,
    /// No progress after healing.
    Stuck,
    /// What a fenced sender or member did was taken.
    ZombieAccepted,
    /// The acknowledged offset is not where the value is read.
    WrongAck,
    /// A value that nobody wrote, or not there, or with wrong bytes.
    Phantom,
    /// A state machine that was rebuilt from its log differs from the live one.
    ReplayDiffers,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 16] = [
        Kind::InconsistentOffsets,
        Kind::Duplicate,
        Kind::LostWrite,
        Kind::Unseen,
        Kind::AbortedRead,
        Kind::PreCommittedRead,
        Kind::TornTransaction,
        Kind::Skip,
        Kind::NonMonotonicRead,
        Kind::NonMonotonicSend,
        Kind::Regression,
        Kind::Stuck,
        Kind::ZombieAccepted,
        Kind::WrongAck,
        Kind::Phantom,
        Kind::ReplayDiffers,
    ];

    /// Its name, stable: programs compare it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::InconsistentOffsets => "inconsistent offsets",
            Kind::Duplicate => "duplicate",
            Kind::LostWrite => "lost write",
            Kind::Unseen => "unseen",
            Kind::AbortedRead => "aborted read",
            Kind::PreCommittedRead => "pre-committed read",
            Kind::TornTransaction => "torn transaction",
            Kind::Skip => "skip",
            Kind::NonMonotonicRead => "non-monotonic read",
            Kind::NonMonotonicSend => "non-monotonic send",
            Kind::Regression => "regression",
            Kind::Stuck => "stuck",
            Kind::ZombieAccepted => "zombie accepted",
            Kind::WrongAck => "wrong ack",
            Kind::Phantom => "phantom",
            Kind::ReplayDiffers => "replay differs",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One thing that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anomaly {
    /// What kind of thing.
    pub kind: Kind,
    /// The topic; empty where it is about none.
    pub topic: String,
    /// The partition; -1 where it is about none.
    pub partition: PartitionId,
    /// The offset that it is about, where there is one.
    pub offset: Option<Offset>,
    /// Both sides, for people.
    pub detail: String,
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}-{}", self.kind, self.topic, self.partition)?;
        if let Some(offset) = self.offset {
            write!(f, " at offset {offset}")?;
        }
        write!(f, ": {}", self.detail)
    }
}

/// What came of judging a history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "a verdict that nobody looks at finds nothing"]
pub struct Verdict {
    /// Sends.
    pub operations: u64,
    /// Sends acknowledged.
    pub acknowledged: u64,
    /// Sends that failed for certain.
    pub failed: u64,
    /// Sends of which nobody knows.
    pub unknown: u64,
    /// Records read, by all readers together.
    pub reads: u64,
    /// Longest time in which some partition that was written acknowledged nothing.
    pub longest_gap: Duration,
    /// The first of each kind, [`Verdict::KEPT_MAX`] at most; by kind.
    pub anomalies: Vec<Anomaly>,
    /// How many there are of each kind that was found, those not kept included.
    pub counts: BTreeMap<Kind, u64>,
}

impl Verdict {
    /// Most anomalies of one kind that are kept; the others are counted.
    pub const KEPT_MAX: usize = 20;

    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        self.counts.is_empty()
    }
}

/// Anomalies as they are found: as many as told are kept, all are counted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Findings {
    kept: BTreeMap<Kind, Vec<Anomaly>>,
    counts: BTreeMap<Kind, u64>,
}

impl Findings {
    pub(crate) fn add(&mut self, anomaly: Anomaly) {
        *self.counts.entry(anomaly.kind).or_default() += 1;
        let kept = self.kept.entry(anomaly.kind).or_default();
        if kept.len() < Verdict::KEPT_MAX {
            kept.push(anomaly);
        }
    }

    pub(crate) fn into_parts(self) -> (Vec<Anomaly>, BTreeMap<Kind, u64>) {
        (self.kept.into_values().flatten().collect(), self.counts)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }
}
