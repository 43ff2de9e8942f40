//! The files of a log: the active segment, which grows, and the sealed ones, which never change.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{Offset, RaftIndex, Timestamp};

use crate::batch_index::Slot;
use crate::disk::DiskFile;
use crate::slots::SealedFiles;

const LOG_SUFFIX: &str = ".log";
const INDEX_SUFFIX: &str = ".index";
const DIGITS: usize = 20;

/// What a segment begins with: `<base offset, 20 digits>-<first Raft index, 20 digits>`, so that its index can always
/// be rebuilt. A cleaned one has a third part, the number of the cleaning that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentName {
    /// Offset of its first record.
    pub base_offset: Offset,
    /// Raft index of its first batch; of a cleaned one, of what was there.
    pub first_index: RaftIndex,
    /// 0 for a segment of the Raft log. Else it was cleaned: its batches are no entries any more, and this number tells
    /// it from what else had its place.
    pub cleaned: u64,
}

impl SegmentName {
    /// A segment of the Raft log.
    pub const fn of_raft(base_offset: Offset, first_index: RaftIndex) -> Self {
        Self { base_offset, first_index, cleaned: 0 }
    }

    /// Whether its batches are what compaction left, and no entries of the Raft log.
    pub const fn is_cleaned(self) -> bool {
        self.cleaned > 0
    }

    fn stem(self) -> String {
        let stem = format!("{:020}-{:020}", self.base_offset.get(), self.first_index.get());
        if self.is_cleaned() { format!("{stem}-{:020}", self.cleaned) } else { stem }
    }

    /// The segment's file name.
    pub fn log_file(self) -> String {
        self.stem() + LOG_SUFFIX
    }

    /// Its index's file name.
    pub fn index_file(self) -> String {
        self.stem() + INDEX_SUFFIX
    }

    /// The segment of this file name, if it is one.
    pub fn of_log_file(name: &str) -> Option<Self> {
        Self::of_stem(name.strip_suffix(LOG_SUFFIX)?)
    }

    /// The segment of this index's file name, if it is one.
    pub fn of_index_file(name: &str) -> Option<Self> {
        Self::of_stem(name.strip_suffix(INDEX_SUFFIX)?)
    }

    fn of_stem(stem: &str) -> Option<Self> {
        let mut parts = stem.split('-');
        let (offset, index, cleaned) = (parts.next()?, parts.next()?, parts.next());
        if parts.next().is_some() {
            return None;
        }
        let number = |digits: &str| {
            let plain = digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_digit());
            plain.then(|| digits.parse::<u64>().ok()).flatten()
        };
        Some(Self {
            base_offset: Offset::new(i64::try_from(number(offset)?).ok()?),
            first_index: RaftIndex::new(number(index)?),
            cleaned: match cleaned {
                None => 0,
                Some(cleaned) => number(cleaned).filter(|cleaned| *cleaned > 0)?,
            },
        })
    }

    pub(crate) fn log_path(self, dir: &Path) -> PathBuf {
        dir.join(self.log_file())
    }

    pub(crate) fn index_path(self, dir: &Path) -> PathBuf {
        dir.join(self.index_file())
    }
}

/// Where the active segment's index file stands. It is opened for each block: a block is 127 batches, and an open file
/// per replica would be too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IndexFile {
    /// Not made yet: it is, when the first block is full.
    None,
    /// Holds this many full blocks.
    Written { blocks: usize },
    /// Could not be written; the index is rebuilt at the next opening.
    Off,
}

/// A map of a segment, and how far its bytes are known to be current.
#[derive(Debug)]
pub(crate) struct SegmentMap {
    pub(crate) bytes: Bytes,
    /// Bytes up to here were written when the map was made; what came later shows only in a map that is live.
    pub(crate) current_to: u64,
}

/// The segment that is appended to.
///
/// ```text
/// 0                    end            zeroed_to            allocated_to
/// |  batches, indexed  |    zeros     |  room on the disk  |
///                      ^ next batch   ^ length of the file
/// ```
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) name: SegmentName,
    pub(crate) log: Arc<dyn DiskFile>,
    pub(crate) index_file: IndexFile,
    /// One per batch.
    pub(crate) slots: Vec<Slot>,
    /// One past the last batch; the next one goes here.
    pub(crate) end: u64,
    /// The file's length: all zeros from `end` to here. Never below `end`.
    pub(crate) zeroed_to: u64,
    /// The disk has promised room up to here.
    pub(crate) allocated_to: u64,
    /// When its first batch was appended, as far as known; rolling by age counts from here.
    pub(crate) born: Option<Timestamp>,
    pub(crate) map: Option<SegmentMap>,
}

impl Active {
    pub(crate) fn end_index(&self) -> RaftIndex {
        self.name.first_index.plus(self.slots.len() as u64)
    }

    pub(crate) fn records(&self) -> u64 {
        self.slots.last().map_or(0, |slot| u64::from(slot.records))
    }

    pub(crate) fn max_timestamp(&self) -> Timestamp {
        self.slots.last().map_or(Timestamp::NONE, |slot| slot.max_timestamp)
    }
}

/// A segment that no longer changes.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) name: SegmentName,
    /// One past its last offset.
    pub(crate) end_offset: Offset,
    /// One past its last Raft index.
    pub(crate) end_index: RaftIndex,
    /// Bytes of its batches.
    pub(crate) bytes: u64,
    pub(crate) batches: usize,
    pub(crate) records: u64,
    pub(crate) max_timestamp: Timestamp,
    /// Its files, opened when first used.
    pub(crate) files: Arc<SealedFiles>,
    /// Only of the newest sealed segment.
    pub(crate) map: Option<SegmentMap>,
}

impl Sealed {
    pub(crate) fn batches(&self) -> usize {
        self.batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_offset_and_index() {
        let name = SegmentName::of_raft(Offset::new(1234), RaftIndex::new(99));
        assert_eq!(name.log_file(), "00000000000000001234-00000000000000000099.log");
        assert_eq!(SegmentName::of_log_file(&name.log_file()), Some(name));
        let cleaned = SegmentName { cleaned: 7, ..name };
        assert_eq!(cleaned.index_file(), "00000000000000001234-00000000000000000099-00000000000000000007.index");
        assert_eq!(SegmentName::of_index_file(&cleaned.index_file()), Some(cleaned));
        assert_eq!(SegmentName::of_index_file(&name.index_file()), Some(name));
        for wrong in [
            "",
            "replica",
            "1-2.log",
            "00000000000000001234-00000000000000000099-00000000000000000000.log",
            "00000000000000001234-00000000000000000099-00000000000000000007-00000000000000000007.log",
            "00000000000000001234-00000000000000000099.log.new",
            "00000000000000001234.log",
            "99999999999999999999-00000000000000000099.log",
            "+0000000000000001234-00000000000000000099.log",
        ] {
            assert_eq!(SegmentName::of_log_file(wrong), None, "{wrong}");
        }
    }
}
