//! What to keep of a log that was found on disk: facts in, decision out, nothing else.
//!
//! Opening walks the files, gathers these facts, asks here, and acts only when every decision allows it: a replica that
//! is quarantined is left as it was found. A row of the tests below for each row of the tables.
//!
//! `durable` is the index up to which this replica answered for its entries: the higher of the flushed index of the hard
//! state and the newest checkpoint's, by its name: it got that only after a flush up to there, whatever became of it. Up to there nothing is cut; above it, whatever is not whole never happened.

use flowstone_protocol::{Offset, RaftIndex};

use crate::segment::SegmentName;

/// What a replica answered for: none of it may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Entries up to here, which were flushed.
    pub flushed: RaftIndex,
    /// All that was written besides, and the machine was not started anew since. So it is all there, but for what a process
    /// was writing when it was killed, which is at the end of the last segment.
    pub written: bool,
}

impl From<RaftIndex> for Answered {
    /// Only what was flushed.
    fn from(flushed: RaftIndex) -> Self {
        Self { flushed, written: false }
    }
}

/// A checkpoint file that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointFact {
    /// By its name.
    pub applied: RaftIndex,
    /// Whether its checksum and content are right.
    pub valid: bool,
}

/// Which checkpoint to begin from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointDecision {
    /// This one.
    Use(RaftIndex),
    /// No file is valid.
    QuarantineNone,
    /// The newest valid one ends before the log begins: entries between them are gone.
    QuarantineGap(RaftIndex),
}

/// | valid checkpoints | the log begins | decision |
/// |---|---|---|
/// | none | | quarantine |
/// | some | nowhere, or at most one past the newest of them | use that |
/// | some | later | quarantine: entries are missing in between |
///
/// A rotten file newer than it does no harm then: what it held is rebuilt by replaying the log.
pub fn decide_checkpoint(found: &[CheckpointFact], log_first: Option<RaftIndex>) -> CheckpointDecision {
    let newest = found.iter().filter(|fact| fact.valid).map(|fact| fact.applied).max();
    match (newest, log_first) {
        (None, _) => CheckpointDecision::QuarantineNone,
        (Some(applied), Some(first)) if first > applied.next() => CheckpointDecision::QuarantineGap(applied),
        (Some(applied), _) => CheckpointDecision::Use(applied),
    }
}

/// Whether an older checkpoint is kept beside the one that is begun from, for the case that this rots.
///
/// | older checkpoint | members | the log begins | decision |
/// |---|---|---|---|
/// | valid | the same | at most one past it | keep |
/// | any other | | | remove |
///
/// With other members it could stand for election among replicas that are none any more.
pub fn keeps_spare(older: CheckpointFact, same_members: bool, log_first: Option<RaftIndex>) -> bool {
    older.valid && same_members && log_first.is_some_and(|first| first <= older.applied.next())
}

/// What an index file offers of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexFacts {
    /// Slots in its leading whole blocks.
    pub valid: usize,
    /// How many of the segment's entries are in the checkpoint.
    pub applied: usize,
    /// How many of those slots lie within the log file's length.
    pub within_file: usize,
}

/// How many slots of an index file to believe; the walk through the log begins at the last of them.
///
/// Slots above the checkpoint are not believed, though they may be durable: what lies there is replayed into the state
/// machine, and this walk is the only one that checks its CRCs. (Above what is durable an index block may also have
/// reached the disk where its batches did not.) Slots past the file's end are not: the walk will find what is missing.
pub fn believed_slots(facts: IndexFacts) -> usize {
    facts.valid.min(facts.applied).min(facts.within_file)
}

/// How the walk through a segment ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkEnd {
    /// At the file's end, or at zeros up to there.
    Clean,
    /// At bytes that are no batch of this log.
    Bad,
}

/// What was found of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentFacts {
    /// Last entry found whole, in this segment or before.
    pub last_valid: RaftIndex,
    /// What the replica answered for: entries up to here...
    pub durable: RaftIndex,
    /// ...and all that was written ([`Answered::written`]).
    pub written: bool,
    /// How the walk ended.
    pub end: WalkEnd,
    /// Whether the segment behind it begins, by its name, with the index and the offset behind the last valid entry;
    /// `None` where this is the last.
    pub next_continues: Option<bool>,
}

/// What to do with a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentDecision {
    /// It is whole.
    Keep,
    /// Keep what is valid, cut what follows, remove later segments: nobody was told of any of it.
    Cut,
    /// Something that the replica answered for is gone.
    Quarantine,
}

/// | the walk | next segment | durable entries missing | decision |
/// |---|---|---|---|
/// | reaches the next segment's first index and offset | there is one | | keep |
/// | ends clean | none | no | keep |
/// | ends bad | none | no | cut |
/// | ends elsewhere | there is one | no | cut |
/// | any other | | yes | quarantine |
///
/// Where it answered for all that was written, entries are missing as soon as a walk ends before the next segment.
pub fn decide_segment(facts: SegmentFacts) -> SegmentDecision {
    let missing = facts.last_valid < facts.durable || facts.written && facts.next_continues == Some(false);
    match (facts.next_continues, facts.end) {
        (Some(true), _) => SegmentDecision::Keep,
        (None, WalkEnd::Clean) if !missing => SegmentDecision::Keep,
        (None, WalkEnd::Bad) | (Some(false), _) if !missing => SegmentDecision::Cut,
        _ => SegmentDecision::Quarantine,
    }
}

/// The first segment that is kept: those before it lie below the checkpoint's log start and are applied in it, so that
/// only an interrupted deletion left them, or some of them.
pub fn first_needed(segments: &[SegmentName], log_start: Offset, applied: RaftIndex) -> usize {
    let covers = |segment: &SegmentName| segment.base_offset <= log_start && segment.first_index <= applied.next();
    segments.iter().rposition(covers).unwrap_or(0)
}

/// What to do where no segment was found at all.
///
/// | durable entries above the checkpoint | decision |
/// |---|---|
/// | none | begin an empty segment behind the checkpoint (`Keep`) |
/// | some | quarantine |
pub fn decide_no_segments(applied: RaftIndex, durable: RaftIndex) -> SegmentDecision {
    if durable <= applied { SegmentDecision::Keep } else { SegmentDecision::Quarantine }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn index(index: u64) -> RaftIndex {
        RaftIndex::new(index)
    }

    #[test]
    fn checkpoints() {
        use CheckpointDecision::{QuarantineGap, QuarantineNone, Use};
        #[track_caller]
        fn check(found: &[(u64, bool)], log_first: Option<u64>, expected: CheckpointDecision) {
            let found: Vec<_> =
                found.iter().map(|&(applied, valid)| CheckpointFact { applied: index(applied), valid }).collect();
            assert_eq!(decide_checkpoint(&found, log_first.map(index)), expected);
        }
        check(&[], None, QuarantineNone);
        check(&[], Some(2), QuarantineNone);
        check(&[(1, false), (9, false)], Some(2), QuarantineNone);
        check(&[(1, true)], None, Use(index(1)));
        check(&[(1, true)], Some(2), Use(index(1)));
        check(&[(9, true), (1, true)], Some(2), Use(index(9)));
        check(&[(1, true), (9, false)], Some(2), Use(index(1)));
        check(&[(1, true), (9, false)], Some(5), QuarantineGap(index(1)));
        check(&[(9, true)], Some(10), Use(index(9)));
        check(&[(9, true)], Some(11), QuarantineGap(index(9)));
    }

    #[test]
    fn spare_checkpoints() {
        #[track_caller]
        fn check(applied: u64, valid: bool, same_members: bool, log_first: Option<u64>, expected: bool) {
            let older = CheckpointFact { applied: index(applied), valid };
            assert_eq!(keeps_spare(older, same_members, log_first.map(index)), expected);
        }
        check(9, true, true, Some(2), true);
        check(9, true, true, Some(10), true);
        check(9, true, true, Some(11), false); // retention took what it needs
        check(9, true, true, None, false);
        check(9, true, false, Some(2), false);
        check(9, false, true, Some(2), false);
    }

    #[test]
    fn index_files() {
        #[track_caller]
        fn check(valid: usize, applied: usize, within_file: usize, expected: usize) {
            assert_eq!(believed_slots(IndexFacts { valid, applied, within_file }), expected);
        }
        check(0, 500, 0, 0); // missing, or of another segment
        check(127, 500, 127, 127); // the active segment's: full blocks only
        check(254, 200, 254, 200); // the rest is replayed, or outran the flush
        check(254, 500, 100, 100); // the log is shorter than its index says
        check(254, 0, 254, 0);
    }

    #[test]
    fn segments() {
        use SegmentDecision::{Cut, Keep, Quarantine};
        use WalkEnd::{Bad, Clean};
        #[track_caller]
        fn check(last_valid: u64, durable: u64, end: WalkEnd, next: Option<bool>, expected: SegmentDecision) {
            let (last_valid, durable) = (index(last_valid), index(durable));
            let facts = SegmentFacts { last_valid, durable, written: false, end, next_continues: next };
            assert_eq!(decide_segment(facts), expected, "{facts:?}");
            // All that was written is there still: only the end of the last segment may be cut.
            let expected = if expected == Cut && next.is_some() { Quarantine } else { expected };
            assert_eq!(decide_segment(SegmentFacts { written: true, ..facts }), expected, "{facts:?}");
        }
        // The last segment.
        check(50, 50, Clean, None, Keep);
        check(50, 40, Clean, None, Keep);
        check(50, 50, Bad, None, Cut);
        check(50, 40, Bad, None, Cut);
        check(49, 50, Clean, None, Quarantine);
        check(49, 50, Bad, None, Quarantine);
        // A segment with another behind it.
        check(50, 90, Clean, Some(true), Keep);
        check(50, 90, Bad, Some(true), Keep); // garbage behind the last batch of a sealed segment
        check(50, 40, Clean, Some(false), Cut); // torn, a file lost, or one of another life, above the durable entries
        check(50, 50, Bad, Some(false), Cut);
        check(50, 51, Bad, Some(false), Quarantine);
        check(50, 90, Clean, Some(false), Quarantine);
    }

    #[test]
    fn segments_that_the_checkpoint_needs() {
        #[track_caller]
        fn check(segments: &[(i64, u64)], log_start: i64, applied: u64, expected: usize) {
            let segments: Vec<_> = segments
                .iter()
                .map(|&(offset, first)| SegmentName::of_raft(Offset::new(offset), index(first)))
                .collect();
            assert_eq!(first_needed(&segments, Offset::new(log_start), index(applied)), expected);
        }
        let segments = [(0, 2), (100, 50), (200, 90)];
        check(&[], 0, 1, 0);
        check(&segments, 0, 1, 0);
        check(&segments, 99, 95, 0);
        check(&segments, 100, 95, 1);
        check(&segments, 150, 95, 1);
        check(&segments, 200, 95, 2);
        check(&segments, 200, 89, 2);
        check(&segments, 200, 88, 1); // entry 89 is not in the checkpoint
        check(&segments, 900, 95, 2); // the last one stays
    }

    #[test]
    fn no_segments() {
        assert_eq!(decide_no_segments(index(1), index(0)), SegmentDecision::Keep);
        assert_eq!(decide_no_segments(index(1), index(1)), SegmentDecision::Keep);
        assert_eq!(decide_no_segments(index(1), index(2)), SegmentDecision::Quarantine);
    }
}
