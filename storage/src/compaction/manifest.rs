//! The file `compacted`: which files hold the part of the log that was cleaned.
//!
//! It alone says so: what it names is the log up to its end, and a segment of the Raft log that begins below that end,
//! or a cleaned file that it does not name, is what a pass left behind. So a swap is the renaming of this file.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use flowstone_protocol::{LeaderEpoch, Offset, RaftIndex, Timestamp};

use super::copying::Cleanness;
use crate::disk::Disk;
use crate::error::{OpenError, StorageError};
use crate::segment::SegmentName;
use crate::small_file::{self, Fields, FrameError};

/// Names the file.
pub(crate) const COMPACTED_NAME: &str = "compacted";
const COMPACTED_MAGIC: [u8; 8] = *b"FLOWCOMP";
/// The newest version of that file, and of cleaned segments.
pub const COMPACTED_FORMAT_VERSION: u32 = 1;
/// Bytes of a cleaned file's entry.
const ENTRY_BYTES: usize = 76;

/// A cleaned segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CleanedSegment {
    pub(crate) name: SegmentName,
    /// One past its last offset.
    pub(crate) end_offset: Offset,
    /// One past the last entry that it was made from.
    pub(crate) end_index: RaftIndex,
    /// Bytes of its batches.
    pub(crate) bytes: u64,
    pub(crate) batches: u64,
    /// Data records.
    pub(crate) records: u64,
    pub(crate) max_timestamp: Timestamp,
    /// The epoch of the batch before it; negative where it is not known.
    pub(crate) epoch_before: LeaderEpoch,
}

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cleaning {
    /// The number of the next cleaned file: none is used twice.
    pub(crate) next_number: u64,
    /// Below here no key is there twice.
    pub(crate) clean_to: Offset,
    /// All that was ever let go because of its age lies below here; not above `clean_to`, but after a crash in a pass.
    pub(crate) dropped_to: Offset,
    /// From when on all tombstones and markers that stayed so far may go; -1 where there are none.
    pub(crate) horizon: Timestamp,
    /// Oldest first, each where the one before it ends.
    pub(crate) segments: Vec<CleanedSegment>,
}

impl Cleaning {
    /// Where the Raft log goes on, if anything was cleaned.
    pub(crate) fn end(&self) -> Option<(Offset, RaftIndex)> {
        self.segments.last().map(|last| (last.end_offset, last.end_index))
    }

    pub(crate) fn cleanness(&self) -> Cleanness {
        Cleanness { clean_to: self.clean_to, dropped_to: self.dropped_to }
    }

    fn encode(&self) -> Bytes {
        let mut body = BytesMut::with_capacity(36 + self.segments.len() * ENTRY_BYTES);
        body.put_u64_le(self.next_number);
        body.put_i64_le(self.clean_to.get());
        body.put_i64_le(self.dropped_to.get());
        body.put_i64_le(self.horizon.get());
        body.put_u32_le(u32::try_from(self.segments.len()).expect("files are counted by far less"));
        for segment in &self.segments {
            body.put_i64_le(segment.name.base_offset.get());
            body.put_u64_le(segment.name.first_index.get());
            body.put_u64_le(segment.name.cleaned);
            body.put_i64_le(segment.end_offset.get());
            body.put_u64_le(segment.end_index.get());
            body.put_u64_le(segment.bytes);
            body.put_u64_le(segment.batches);
            body.put_u64_le(segment.records);
            body.put_i64_le(segment.max_timestamp.get());
            body.put_i32_le(segment.epoch_before.get());
        }
        small_file::frame(COMPACTED_MAGIC, COMPACTED_FORMAT_VERSION, &body)
    }

    fn parse(file: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields(small_file::unframe(COMPACTED_MAGIC, COMPACTED_FORMAT_VERSION, file)?);
        let next_number = fields.u64()?;
        let clean_to = Offset::new(fields.i64()?);
        let (dropped_to, horizon) = (Offset::new(fields.i64()?), Timestamp::new(fields.i64()?));
        let count = fields.u32()? as usize;
        // What is left bounds what is reserved.
        if fields.0.len() != count * ENTRY_BYTES {
            return Err(FrameError::Invalid("wrong number of cleaned segments"));
        }
        let mut segments: Vec<CleanedSegment> = Vec::with_capacity(count);
        for _ in 0..count {
            let name = SegmentName {
                base_offset: Offset::new(fields.i64()?),
                first_index: RaftIndex::new(fields.u64()?),
                cleaned: fields.u64()?,
            };
            let segment = CleanedSegment {
                name,
                end_offset: Offset::new(fields.i64()?),
                end_index: RaftIndex::new(fields.u64()?),
                bytes: fields.u64()?,
                batches: fields.u64()?,
                records: fields.u64()?,
                max_timestamp: Timestamp::new(fields.i64()?),
                epoch_before: LeaderEpoch::new(fields.i32()?),
            };
            let follows = segments
                .last()
                .is_none_or(|last| last.end_offset == name.base_offset && last.end_index == name.first_index);
            let is_one = follows
                && name.cleaned > 0
                && name.cleaned < next_number
                && name.base_offset >= Offset::ZERO
                && segment.end_offset > name.base_offset
                && segment.end_index > name.first_index
                && segment.batches > 0;
            if !is_one {
                return Err(FrameError::Invalid("a cleaned segment that contradicts itself, or the one before it"));
            }
            segments.push(segment);
        }
        fields.end()?;
        Ok(Self { next_number, clean_to, dropped_to, horizon, segments })
    }

    /// What is known of the log in `dir`: nothing was cleaned where there is no file.
    pub(crate) fn read(disk: &Arc<dyn Disk>, dir: &Path) -> Result<Self, OpenError> {
        let path = dir.join(COMPACTED_NAME);
        let file = match small_file::read_file(disk, &path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::nothing()),
            Err(error) => return Err(OpenError::io("open", &path)(error)),
        };
        match Self::parse(&file) {
            Ok(cleaning) => Ok(cleaning),
            Err(FrameError::Newer { found }) => {
                Err(OpenError::NewerFormat { path, found, known: COMPACTED_FORMAT_VERSION })
            }
            Err(FrameError::Invalid(detail)) => Err(OpenError::Quarantine {
                path: dir.to_owned(),
                offset: Offset::ZERO,
                detail: format!("its file `{COMPACTED_NAME}` is rotten: {detail}"),
                remedy:
                    "restore that file from a backup of this data directory (where there are other replicas, remove \
                         this one and let it be copied from them)"
                        .to_owned(),
            }),
        }
    }

    pub(crate) fn nothing() -> Self {
        Self { next_number: 1, horizon: Timestamp::NONE, ..Self::default() }
    }

    /// Makes it what is known of the log in `dir`; durable when this returns, with all that was done in the folder before.
    pub(crate) fn write(&self, disk: &Arc<dyn Disk>, dir: &Path) -> Result<(), StorageError> {
        let path = dir.join(COMPACTED_NAME);
        small_file::replace_file(disk, &path, &self.encode()).map(|_| ()).map_err(StorageError::io("write", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(base: i64, first: u64, cleaned: u64, end: i64, end_index: u64) -> CleanedSegment {
        CleanedSegment {
            name: SegmentName { base_offset: Offset::new(base), first_index: RaftIndex::new(first), cleaned },
            end_offset: Offset::new(end),
            end_index: RaftIndex::new(end_index),
            bytes: 100,
            batches: 1,
            records: 3,
            max_timestamp: Timestamp::new(5),
            epoch_before: LeaderEpoch::new(1),
        }
    }

    fn cleaning(segments: Vec<CleanedSegment>) -> Cleaning {
        Cleaning { next_number: 10, segments, ..Cleaning::nothing() }
    }

    #[test]
    fn it_is_read_back_and_every_flipped_bit_is_seen() {
        let cleaning = cleaning(vec![segment(0, 2, 7, 50, 9), segment(50, 9, 3, 60, 12)]);
        let file = cleaning.encode();
        assert_eq!(Cleaning::parse(&file), Ok(cleaning));
        for bit in 0..file.len() * 8 {
            let mut flipped = file.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Cleaning::parse(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn segments_that_do_not_follow_each_other_are_refused() {
        for segments in [
            vec![segment(0, 2, 7, 50, 9), segment(51, 9, 3, 60, 12)],
            vec![segment(0, 2, 7, 50, 9), segment(50, 10, 3, 60, 12)],
            vec![segment(0, 2, 10, 50, 9)],
            vec![segment(0, 2, 0, 50, 9)],
            vec![segment(0, 2, 7, 0, 9)],
            vec![segment(0, 2, 7, 50, 2)],
        ] {
            assert!(Cleaning::parse(&cleaning(segments).encode()).is_err());
        }
    }
}
