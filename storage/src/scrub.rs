//! Scrubbing: batches of sealed segments are read again and checked, so that rot is found while others still have the
//! bytes; and found rot is measured, so that it can be pulled (`repair.rs`).
//!
//! ```text
//! a sealed segment:  | good | good | rotten | rotten | good | good |
//!                                   ^ position         ^ position + bytes
//!                                   first_index, last_index
//! ```
//! Where the index is gone as well nobody knows where the next batch begins: then all to the segment's end counts as
//! rotten.

use std::io;
use std::sync::Arc;

use flowstone_protocol::{BatchHeader, LeaderEpoch, Offset, RaftIndex};

use crate::batch_index::Slot;
use crate::disk::DiskFile;
use crate::error::{ReadError, StorageError};
use crate::log::Log;
use crate::lookup::Which;
use crate::segment::SegmentName;
use crate::slots::{NoSlot, SealedFiles, Slots, View, WaitingSlots};
use crate::walk::{Step, check_placed};

/// Bytes read at a time, unless a batch is larger.
const WINDOW_BYTES: u64 = 256 << 10;

/// Where scrubbing goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubPosition(RaftIndex);

impl ScrubPosition {
    /// The oldest segment.
    pub const START: Self = Self(RaftIndex::new(0));
}

/// A run of batches of a sealed segment that are not what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotten {
    /// The segment.
    pub segment: SegmentName,
    /// The first entry that is rotten...
    pub first_index: RaftIndex,
    /// ...and the last, inclusive.
    pub last_index: RaftIndex,
    /// Where the first of them begins in the segment's file.
    pub position: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Offset of the first of them.
    pub first_offset: Offset,
    /// What was wrong with the first.
    pub detail: String,
    /// The epoch of the entry before them, if known.
    pub(crate) epoch_before: Option<LeaderEpoch>,
}

/// What a piece of scrubbing found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scrubbed {
    /// Bytes that were read and checked.
    pub bytes: u64,
    /// Where to go on; `None` at the end of what is sealed: begin again some time later.
    pub next: Option<ScrubPosition>,
    /// The first rotten batches found, as far as they lie together; what lies behind them comes next.
    pub rotten: Option<Rotten>,
}

/// A piece of scrubbing; run it on a pool.
#[derive(Debug)]
pub struct ScrubJob {
    files: Arc<SealedFiles>,
    view: View,
    from: From,
    bytes_max: u64,
    /// The first entry behind the segment, if that is sealed as well.
    behind: Option<RaftIndex>,
}

#[derive(Clone, Copy, Debug)]
enum From {
    /// The batch of this number.
    Batch(usize),
    /// The batch that holds this offset.
    Offset(Offset),
}

impl Log {
    /// The next piece of scrubbing: about `max_bytes` (at least one batch) of one sealed segment whose entries are all
    /// committed. `None` where there is none at `from` or behind it: the round is over.
    pub fn scrub_job(&self, from: ScrubPosition, max_bytes: u64) -> Option<ScrubJob> {
        let at = self.sealed.partition_point(|segment| segment.end_index <= from.0);
        let first = self.sealed.get(at)?.name.first_index;
        self.scrub(at, From::Batch(from.0.get().saturating_sub(first.get()) as usize), max_bytes)
    }

    /// Looks at the batch that holds `offset`, and as far around it as it is rotten: for a read that found corrupt bytes
    /// there. `None` where it lies in no sealed segment whose entries are all committed ([`Self::seal`]).
    pub fn scrub_job_at(&self, offset: Offset) -> Option<ScrubJob> {
        let Which::Sealed(at) = self.segment_of_offset(offset) else { return None };
        // It may have been trimmed since it was read.
        self.sealed.get(at).filter(|segment| segment.name.base_offset <= offset)?;
        self.scrub(at, From::Offset(offset), 0)
    }

    /// Whether `offset` lies in the active segment, or behind it: what has rotted there can be repaired once that is sealed
    /// ([`Self::seal`]).
    pub fn is_in_active_segment(&self, offset: Offset) -> bool {
        matches!(self.segment_of_offset(offset), Which::Active)
    }

    fn scrub(&self, at: usize, from: From, bytes_max: u64) -> Option<ScrubJob> {
        let segment = self.sealed.get(at).filter(|segment| self.is_scrubbable(segment.end_index))?;
        let behind = self.sealed.get(at + 1).filter(|next| self.is_scrubbable(next.end_index));
        Some(ScrubJob {
            files: Arc::clone(&segment.files),
            view: self.view(Which::Sealed(at)),
            from,
            bytes_max,
            behind: behind.map(|next| next.name.first_index),
        })
    }

    /// What is not committed may be cut, and is not on other replicas for sure.
    fn is_scrubbable(&self, end_index: RaftIndex) -> bool {
        end_index <= self.committed.next()
    }
}

impl ScrubJob {
    /// Reads and checks, waiting for the disk. Fails where the file system does, for another reason than bytes that
    /// cannot be read.
    pub fn run(self) -> Result<Scrubbed, ReadError> {
        let name = self.files.name;
        let file = match self.files.log() {
            Ok(file) => file,
            Err(StorageError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && !self.files.is_retired() =>
            {
                let run = Rotten {
                    segment: name,
                    first_index: name.first_index,
                    last_index: name.first_index.plus(self.view.batches as u64 - 1),
                    position: 0,
                    bytes: self.view.end,
                    first_offset: name.base_offset,
                    detail: "the file is missing".to_owned(),
                    epoch_before: self.files.epoch_before(),
                };
                return Ok(Scrubbed { bytes: 0, next: self.behind.map(ScrubPosition), rotten: Some(run) });
            }
            Err(error) => return Err(error.into()),
        };
        let mut reader = BatchReader { file, end: self.view.end, window: Vec::new(), window_at: 0 };
        match self.by_index(&mut reader) {
            Ok(scrubbed) => Ok(scrubbed),
            Err(NoSlot::Failed(StorageError::Corrupt { .. })) => self.without_index(),
            Err(NoSlot::Failed(StorageError::Io { source, .. })) if is_unreadable(&source) => self.without_index(),
            Err(error) => Err(error.into()),
        }
    }

    /// Batch by batch, each where its slot says that it is.
    fn by_index(&self, reader: &mut BatchReader) -> Result<Scrubbed, NoSlot> {
        let slots = &mut WaitingSlots::of(&self.files);
        let mut number = match self.from {
            From::Batch(number) => number,
            From::Offset(offset) => self.view.batch_of(slots, offset)?.0,
        };
        let began = number;
        let mut bytes = 0;
        let mut first_bad = None;
        while number < self.view.batches {
            let slot = slots.slot(number)?;
            if let Err(detail) = self.check_batch(reader, slots, number, &slot)? {
                first_bad = Some((number, detail));
                break;
            }
            bytes += u64::from(slot.batch_bytes);
            number += 1;
            if bytes >= self.bytes_max {
                break;
            }
        }
        let Some((mut first, detail)) = first_bad else {
            return Ok(Scrubbed { bytes, next: self.position_of(number), rotten: None });
        };
        // A read may have found the middle of it.
        if matches!(self.from, From::Offset(_)) && first == began {
            while first > 0 {
                let slot = slots.slot(first - 1)?;
                if self.check_batch(reader, slots, first - 1, &slot)?.is_ok() {
                    break;
                }
                first -= 1;
            }
        }
        while number < self.view.batches {
            let slot = slots.slot(number)?;
            bytes += u64::from(slot.batch_bytes);
            number += 1;
            if number < self.view.batches {
                let slot = slots.slot(number)?;
                if self.check_batch(reader, slots, number, &slot)?.is_ok() {
                    break;
                }
            }
        }
        let (from, to) = (slots.slot(first)?, slots.slot(number - 1)?);
        let name = self.files.name;
        let rotten = Rotten {
            segment: name,
            first_index: name.first_index.plus(first as u64),
            last_index: name.first_index.plus(number as u64 - 1),
            position: u64::from(from.position),
            bytes: to.end_position() - u64::from(from.position),
            first_offset: from.base_offset(name.base_offset),
            detail,
            epoch_before: self.epoch_before(slots, first)?,
        };
        Ok(Scrubbed { bytes, next: self.position_of(number), rotten: Some(rotten) })
    }

    /// Whether batch `number` is the one that its slot tells of.
    fn check_batch(
        &self,
        reader: &mut BatchReader,
        slots: &mut dyn Slots,
        number: usize,
        slot: &Slot,
    ) -> Result<Result<(), String>, NoSlot> {
        let name = self.files.name;
        let epoch = self.epoch_before(slots, number)?;
        let batch = match reader.batch(slot) {
            Ok(batch) => batch,
            Err(error) if is_unreadable(&error) => return Ok(Err(error.to_string())),
            Err(error) => return Err(StorageError::io("read", &self.files.log_path())(error).into()),
        };
        let offset = slot.base_offset(name.base_offset);
        let index = (!name.is_cleaned()).then(|| name.first_index.plus(number as u64));
        Ok(match BatchHeader::parse(batch) {
            Ok(header) if header.total_bytes() == batch.len() => {
                check_placed(batch, &header, offset, index, epoch).map(|_| ()).or_else(|wrong| wrong.unless_newer())
            }
            Ok(header) => {
                Err(format!("a batch of {} bytes where one of {} belongs", header.total_bytes(), batch.len()))
            }
            Err(error) => Err(error.to_string()),
        })
    }

    fn epoch_before(&self, slots: &mut dyn Slots, number: usize) -> Result<Option<LeaderEpoch>, NoSlot> {
        match number.checked_sub(1) {
            Some(before) => Ok(Some(slots.slot(before)?.epoch)),
            None => Ok(self.files.epoch_before()),
        }
    }

    /// The index cannot be rebuilt, because of rot in the log: where that begins is all that can be known.
    fn without_index(&self) -> Result<Scrubbed, ReadError> {
        let name = self.files.name;
        let mut walker = self.files.walker(0, name.base_offset, self.files.epoch_before())?;
        let behind = name.first_index.plus(self.view.batches as u64);
        let next = self.behind.map(ScrubPosition);
        while walker.index < behind {
            let detail = match walker.step() {
                Ok(Step::Batch { .. }) => continue,
                Ok(Step::Clean) => "zeros".to_owned(),
                Ok(Step::Bad { detail }) => detail,
                Ok(Step::Newer { ctype }) => format!("a control batch of unknown type {ctype}"),
                Err(error) if is_unreadable(&error) => error.to_string(),
                Err(source) => return Err(ReadError::Io { path: self.files.log_path(), source }),
            };
            let rotten = Rotten {
                segment: name,
                first_index: walker.index,
                last_index: RaftIndex::new(behind.get() - 1),
                position: walker.position,
                bytes: self.view.end - walker.position,
                first_offset: walker.offset,
                detail,
                epoch_before: walker.epoch,
            };
            return Ok(Scrubbed { bytes: self.view.end, next, rotten: Some(rotten) });
        }
        Ok(Scrubbed { bytes: self.view.end, next, rotten: None })
    }

    /// Where to go on behind the segment's first `number` batches.
    fn position_of(&self, number: usize) -> Option<ScrubPosition> {
        if number < self.view.batches {
            return Some(ScrubPosition(self.files.name.first_index.plus(number as u64)));
        }
        self.behind.map(ScrubPosition)
    }
}

/// Whether bytes are gone, rather than out of reach for now.
pub(crate) fn is_unreadable(error: &io::Error) -> bool {
    const EIO: i32 = rustix::io::Errno::IO.raw_os_error();
    error.kind() == io::ErrorKind::UnexpectedEof || error.raw_os_error() == Some(EIO)
}

/// Reads batches one after another, many at a time.
#[derive(Debug)]
struct BatchReader {
    file: Arc<dyn DiskFile>,
    /// One past the last byte that belongs to the segment.
    end: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl BatchReader {
    fn batch(&mut self, slot: &Slot) -> io::Result<&[u8]> {
        let (at, end) = (u64::from(slot.position), slot.end_position());
        if at < self.window_at || end > self.window_at + self.window.len() as u64 {
            let exactly = end - at;
            let many = exactly.max(WINDOW_BYTES.min(self.end.saturating_sub(at)));
            // What cannot be read may lie behind this batch.
            if self.read(at, many).is_err() {
                self.read(at, exactly)?;
            }
        }
        let from = (at - self.window_at) as usize;
        Ok(&self.window[from..from + slot.batch_bytes as usize])
    }

    fn read(&mut self, at: u64, count: u64) -> io::Result<()> {
        self.window.resize(usize::try_from(count).map_err(io::Error::other)?, 0);
        self.window_at = at;
        let read = self.file.read_exact_at(&mut self.window, at);
        if read.is_err() {
            self.window.clear();
        }
        read
    }
}
