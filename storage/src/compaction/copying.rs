//! Copying a part of a log by offset: what a replica needs that can not be given entries, because they were cleaned.
//!
//! The source gives the batches of an offset range as it has them now, cleaned or not. Their boundaries are those of the
//! batches that were written, or of what is left of several of them; so whoever takes them can go on from any offset that it
//! came to, also where the source was compacted meanwhile, or is another one.
//!
//! ```text
//!   taken so far:  | batch | nothing is left |
//!   the source:    | batch | nothing is left of all of it      | batch |
//!                                            ^ from here: cut to what is still wanted
//! ```
//! One thing must not be mixed: a part of before a tombstone did its work, and a part of after it went. Each replica cleans by
//! its own clock, so that is told by offsets: see [`Cleanness`].

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::{BatchError, BatchHeader, LeaderEpoch, Offset, RaftIndex, Timestamp};

use super::manifest::{CleanedSegment, Cleaning};
use super::writer::{Writer, within};
use super::{Busy, Swap};
use crate::disk::Disk;
use crate::error::{ReadError, StorageError};
use crate::log::Log;
use crate::lookup::Which;
use crate::read::ReadTicket;
use crate::segment::SegmentName;
use crate::walk::check_placed;

/// A batch that was given, and checked.
struct Given {
    header: BatchHeader,
    batch: Bytes,
    /// Its type where it is one of the log's own that this program knows.
    control: Option<i16>,
}

/// The batches of this run, each the one that belongs behind the one before, the first behind one of `epoch`.
///
/// # Errors
/// What is wrong with the first that does not.
fn given(bytes: Bytes, wanted: Range<Offset>, epoch: Option<LeaderEpoch>) -> Result<Vec<Given>, String> {
    let mut all = Vec::new();
    let (mut next, mut epoch) = (wanted.start, epoch);
    for split in split_batches(bytes) {
        let (header, batch) = split.map_err(|error| error.to_string())?;
        let checked = check_placed(&batch, &header, next, None, epoch);
        let control = checked.or_else(|wrong| wrong.unless_newer().map(|()| None))?;
        (next, epoch) = (header.next_offset(), Some(header.leader_epoch));
        if next > wanted.end {
            return Err(format!("offsets up to {next}, wanted up to {}", wanted.end));
        }
        all.push(Given { header, batch, control });
    }
    Ok(all)
}

/// How far a log, or a part of one, is cleaned.
///
/// Where two parts of different logs are put together, a record that was deleted comes back if one of them has it still, and
/// the other one its tombstone no longer. So nothing may have gone because of its age from the one (`dropped_to`) above where
/// the other is clean (`clean_to`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cleanness {
    /// No record is there that one below here takes the place of, or deletes.
    pub clean_to: Offset,
    /// All tombstones and markers of transactions that went because of their age were below here.
    pub dropped_to: Offset,
}

impl Cleanness {
    /// Of both together, of which the other one ends at `end`.
    fn and(self, other: Self, end: Offset) -> Self {
        Self { clean_to: self.clean_to.min(other.clean_to), dropped_to: self.dropped_to.max(other.dropped_to.min(end)) }
    }
}

/// Batches of an offset range, CRCs checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OffsetRange {
    /// The batches, stamped, back to back; at least one.
    pub bytes: Bytes,
    /// The offset behind the last of them: where to go on.
    pub next: Offset,
    /// Of the log that they are of.
    pub cleanness: Cleanness,
}

/// An offset range to read on a pool. It stays valid whatever becomes of the log.
#[derive(Debug)]
pub struct OffsetRangeTicket {
    read: ReadTicket,
    from: Offset,
    to: Offset,
    cleanness: Cleanness,
}

impl Log {
    /// A ticket for the committed batches of the offsets from `from` up to and without `to`: as many as fit in `max_bytes`
    /// and lie in one segment, at least one. Both must be boundaries of batches that were written; the log start does not
    /// matter.
    ///
    /// Fails with [`ReadError::OutOfRange`] where the files do not begin so early, or `to` is not committed here.
    pub fn offset_range(&self, from: Offset, to: Offset, max_bytes: usize) -> Result<OffsetRangeTicket, ReadError> {
        let (start, high_watermark) = (self.local_start().0, self.high_watermark);
        if from < start || from >= to || to > high_watermark {
            return Err(ReadError::OutOfRange { offset: from, log_start: start, high_watermark });
        }
        let which = self.segment_of_offset(from);
        let read = match which {
            Which::Sealed(number) => {
                let files = Arc::clone(&self.sealed[number].files);
                ReadTicket::search(files, self.view(which), from, max_bytes, to)
            }
            Which::Active => {
                let extent =
                    self.view(which).extent(&mut crate::slots::ActiveSlots(&self.active.slots), from, max_bytes, to);
                ReadTicket::extent(self.source_of(which), extent.map_err(StorageError::from)?)
            }
        };
        Ok(OffsetRangeTicket { read, from, to, cleanness: self.cleanness() })
    }

    /// Of all that lies below what is committed here.
    pub fn cleanness(&self) -> Cleanness {
        self.compaction.cleaning.cleanness()
    }

    /// Whether the offsets from `from` up to `to` may be put together with what another one holds of this log below `from`,
    /// and perhaps above `to`: nothing comes back that was deleted.
    pub fn goes_with(&self, held: Cleanness, from: Offset, to: Offset) -> bool {
        let own = self.cleanness();
        // What went from here before `from` is of no matter: that was copied as it is there.
        let is_held_clean = own.dropped_to <= from || own.dropped_to.min(to) <= held.clean_to;
        is_held_clean && held.dropped_to <= own.clean_to
    }
}

impl OffsetRangeTicket {
    /// Reads, waiting for the disk, and checks all of it.
    pub fn run(self) -> Result<OffsetRange, ReadError> {
        let Self { read, from, to, cleanness } = self;
        let read = read.run()?;
        read.verify()?;
        let next = read.next.min(to);
        let out_of_range = || ReadError::OutOfRange { offset: from, log_start: read.first, high_watermark: read.next };
        if read.first >= from && read.next <= to {
            return Ok(OffsetRange { bytes: read.chunks.concat().into(), next, cleanness });
        }
        let mut bytes = BytesMut::with_capacity(read.len());
        for split in read.chunks.iter().flat_map(|chunk| split_batches(chunk.clone())) {
            // Checked a moment ago.
            let (header, batch) = split.map_err(|_: BatchError| out_of_range())?;
            let batch = within(&header, &batch, from, to).ok_or_else(out_of_range)?;
            bytes.extend_from_slice(&batch);
        }
        Ok(OffsetRange { bytes: bytes.freeze(), next, cleanness })
    }
}

/// A part of a log that is being written from what others gave of it, as cleaned segments.
#[derive(Debug)]
pub(crate) struct Copying {
    disk: Arc<dyn Disk>,
    dir: Arc<Path>,
    cleaning: Cleaning,
    writer: Option<Writer>,
    segment_bytes: u64,
    next: Offset,
    /// The entry that the next segment is named by: they are not known, and given away one a batch.
    next_index: RaftIndex,
    epoch: Option<LeaderEpoch>,
    /// All up to here is wanted...
    end: Offset,
    /// ...and this is the entry that comes next.
    end_index: RaftIndex,
}

impl Copying {
    /// Begins to copy into a folder, from an offset and the entry that was there.
    ///
    pub(crate) fn begin(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        start: (Offset, RaftIndex),
        end: (Offset, RaftIndex),
        segment_bytes: u64,
    ) -> Result<Self, StorageError> {
        // What is not there yet is as clean as can be. When its tombstones may go is seen by the first pass, which is due.
        let horizon = Timestamp::new(0);
        let cleaning = Cleaning { next_number: 2, clean_to: end.0, horizon, ..Cleaning::nothing() };
        cleaning.write(disk, dir)?;
        Ok(Self::goes_on(disk, dir, cleaning, start, end, segment_bytes))
    }

    fn goes_on(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        cleaning: Cleaning,
        (next, next_index): (Offset, RaftIndex),
        (end, end_index): (Offset, RaftIndex),
        segment_bytes: u64,
    ) -> Self {
        let (disk, dir) = (Arc::clone(disk), Arc::from(dir));
        Self { disk, dir, cleaning, writer: None, segment_bytes, next, next_index, epoch: None, end, end_index }
    }

    /// Goes on behind what an earlier life has flushed; `None` where nothing was copied, `Err` where it was begun and
    /// nothing is there yet: then it is to be begun again.
    pub(crate) fn resume(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        cleaning: Cleaning,
        end: (Offset, RaftIndex),
        segment_bytes: u64,
    ) -> Result<Option<Self>, ()> {
        match cleaning.end() {
            None if cleaning == Cleaning::nothing() => Ok(None),
            Some(at) if at.0 <= end.0 && at.1 <= end.1 => {
                Ok(Some(Self::goes_on(disk, dir, cleaning, at, end, segment_bytes)))
            }
            _ => Err(()),
        }
    }

    /// What is still wanted; `None` when all of it is there, and flushed.
    pub(crate) fn wanted(&self) -> Option<(Offset, Offset)> {
        (self.next < self.end).then_some((self.next, self.end))
    }

    /// How far what is there is cleaned.
    pub(crate) fn held(&self) -> Cleanness {
        self.cleaning.cleanness()
    }

    /// Writes what was given of the range from [`Self::wanted`] on, of a log that is so clean.
    ///
    /// Fails with [`StorageError::Refused`], having written nothing, where that is not what belongs there.
    pub(crate) fn append(&mut self, bytes: Bytes, cleanness: Cleanness) -> Result<(), StorageError> {
        let refused = |detail| StorageError::Refused { index: self.next_index, detail };
        let given = given(bytes, self.next..self.end, self.epoch).map_err(refused)?;
        let next = given.last().map_or(self.next, |given| given.header.next_offset());
        let Cleanness { clean_to, dropped_to } = self.held().and(cleanness, next);
        (self.cleaning.clean_to, self.cleaning.dropped_to) = (clean_to, dropped_to);
        for Given { header, batch, control } in given {
            let is_full = self.writer.as_ref().is_some_and(|writer| {
                writer.bytes() + batch.len() as u64 > self.segment_bytes
                    || header.next_offset().get() - writer.name().base_offset.get() > super::SEGMENT_OFFSETS_MAX
            });
            if is_full {
                self.flush()?;
            }
            let writer = match &mut self.writer {
                Some(writer) => writer,
                none => {
                    let (base_offset, first_index) = (self.next, self.next_index);
                    let name = SegmentName { base_offset, first_index, cleaned: self.cleaning.next_number };
                    none.insert(Writer::begin(&self.disk, &self.dir, name, self.epoch)?)
                }
            };
            writer.put(&header, control, &batch)?;
            (self.next, self.epoch) = (header.next_offset(), Some(header.leader_epoch));
        }
        if self.next == self.end { self.flush() } else { Ok(()) }
    }

    /// Closes the present segment, and makes all durable: a later life goes on behind it.
    pub(crate) fn flush(&mut self) -> Result<(), StorageError> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let is_last = self.next == self.end;
        let end_index = if is_last { self.end_index } else { self.next_index.plus(writer.batches() as u64) };
        if end_index <= self.next_index || end_index > self.end_index {
            let detail = format!("more batches than entries up to {}", self.end_index);
            return Err(StorageError::NotInstallable { path: self.dir.to_path_buf(), detail });
        }
        let segment = writer.end(end_index)?.flush()?;
        self.disk.sync_dir(&self.dir).map_err(StorageError::io("flush", &self.dir))?;
        let mut cleaning = self.cleaning.clone();
        cleaning.segments.push(segment);
        cleaning.next_number += 1;
        cleaning.write(&self.disk, &self.dir)?;
        (self.cleaning, self.next_index) = (cleaning, end_index);
        Ok(())
    }

    /// Bytes that are there.
    pub(crate) fn bytes(&self) -> u64 {
        let flushed: u64 = self.cleaning.segments.iter().map(|segment| segment.bytes).sum();
        flushed + self.writer.as_ref().map_or(0, Writer::bytes)
    }
}

/// A cleaned segment that is damaged, and is written anew from what another replica has of its offsets. Compaction goes on
/// afterwards. Dropped unfinished it leaves a file, which the next opening removes.
#[derive(Debug)]
pub struct SegmentCopy {
    disk: Arc<dyn Disk>,
    dir: Arc<Path>,
    name: SegmentName,
    end: Offset,
    end_index: RaftIndex,
    cleaning: Cleaning,
    writer: Option<Writer>,
    next: Offset,
    epoch: Option<LeaderEpoch>,
    /// Of what was copied and the rest of the log together.
    held: Cleanness,
    swap: Option<Swap>,
    busy: Arc<Busy>,
}

impl Log {
    /// Begins to write a damaged cleaned segment anew; `None` where it is not there any more, or the log is being
    /// compacted: then try again later.
    pub fn begin_segment_copy(&self, segment: SegmentName) -> Option<SegmentCopy> {
        let found = self.sealed.iter().find(|other| other.name == segment && segment.is_cleaned())?;
        if self.is_compacting() {
            return None;
        }
        let cleaning = self.compaction.cleaning.clone();
        Some(SegmentCopy {
            disk: Arc::clone(&self.disk),
            dir: Arc::clone(&self.dir),
            name: segment,
            end: found.end_offset,
            end_index: found.end_index,
            writer: None,
            next: segment.base_offset,
            epoch: found.files.epoch_before(),
            held: cleaning.cleanness(),
            cleaning,
            swap: None,
            busy: self.busy(),
        })
    }

    /// Whether a segment is one of those that were cleaned.
    pub fn has_cleaned(&self, segment: SegmentName) -> bool {
        segment.is_cleaned() && self.sealed.iter().any(|other| other.name == segment)
    }

    /// Reads from the new file from now on.
    pub fn segment_copied(&mut self, copy: &mut SegmentCopy) {
        if let Some(swap) = copy.swap.take().filter(|_| Arc::ptr_eq(&copy.busy, &self.compaction.busy)) {
            self.swap_in(swap, &copy.cleaning);
        }
    }
}

impl SegmentCopy {
    /// What is still wanted; `None` when all of it is there.
    pub fn wanted(&self) -> Option<(Offset, Offset)> {
        (self.next < self.end).then_some((self.next, self.end))
    }

    /// Which segment it is.
    pub fn segment(&self) -> SegmentName {
        self.name
    }

    /// What to tell those who give it: see [`Log::goes_with`].
    pub fn held(&self) -> Cleanness {
        self.held
    }

    /// Writes what was given from [`Self::wanted`] on, of a log that is so clean; with the last of it the new file is in
    /// place, durably.
    ///
    /// Fails with [`StorageError::Refused`], having written nothing, where that is not what belongs there: ask another
    /// replica. After any other failure: drop it.
    pub fn append(&mut self, bytes: Bytes, cleanness: Cleanness) -> Result<(), StorageError> {
        let refused = |detail| StorageError::Refused { index: self.name.first_index, detail };
        let given = given(bytes, self.next..self.end, self.epoch).map_err(refused)?;
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => {
                self.busy.be_sure(&self.cleaning, &self.disk, &self.dir)?;
                let name = SegmentName { cleaned: self.cleaning.next_number, ..self.name };
                none.insert(Writer::begin(&self.disk, &self.dir, name, self.epoch)?)
            }
        };
        for Given { header, batch, control } in given {
            writer.put(&header, control, &batch)?;
            (self.next, self.epoch) = (header.next_offset(), Some(header.leader_epoch));
        }
        self.held = self.held.and(cleanness, self.next);
        if self.next == self.end { self.finish() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<(), StorageError> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let mut written = writer.end(self.end_index)?;
        written.verify(u64::MAX)?;
        let segment: CleanedSegment = written.flush()?;
        self.disk.sync_dir(&self.dir).map_err(StorageError::io("flush", &self.dir))?;
        let mut cleaning = self.cleaning.clone();
        let Some(at) = cleaning.segments.iter().position(|other| other.name == self.name) else { return Ok(()) };
        cleaning.segments[at] = segment;
        cleaning.next_number += 1;
        // What another one still has may be superseded here, and its tombstones may be due at another time.
        (cleaning.clean_to, cleaning.dropped_to) = (self.held.clean_to, self.held.dropped_to);
        cleaning.horizon = Timestamp::new(0);
        self.busy.write(&cleaning, &self.disk, &self.dir)?;
        self.cleaning = cleaning;
        self.swap = Some(Swap { replaced: vec![self.name], segment });
        Ok(())
    }
}
