//! Looking up batches in a segment's index: in memory, in what is cached now, or waiting for the disk.
//!
//! The thread that owns a log asks for what is at hand and gets [`NoSlot::NotCached`] where that is not enough; a ticket
//! asks the same questions on a pool and waits. Both ask here.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use bytes::Bytes;
use flowstone_protocol::batch::verify_crc;
use flowstone_protocol::record::records;
use flowstone_protocol::{BatchError, LeaderEpoch, Offset, Timestamp};

use crate::batch_index::{BLOCK_BYTES, BLOCK_SLOTS, Slot, blocks_of, decode_block};
use crate::disk::{Disk, DiskFile, OpenMode};
use crate::error::StorageError;
use crate::log::{IndexBlock, write_blocks};
use crate::read::DECOMPRESSED_BYTES_MAX;
use crate::segment::SegmentName;
use crate::walk::{Step, Walker};

/// Blocks of sealed indexes kept in memory per log (4 KiB each); a binary search through one needs a dozen.
const INDEX_BLOCKS_KEPT: usize = 16;

/// Why a slot is not at hand.
#[derive(Debug)]
pub(crate) enum NoSlot {
    /// Its block would have to be waited for, or rebuilt.
    NotCached,
    /// It cannot be read.
    Failed(StorageError),
}

impl From<StorageError> for NoSlot {
    fn from(error: StorageError) -> Self {
        Self::Failed(error)
    }
}

/// The slots of one segment.
pub(crate) trait Slots {
    fn slot(&mut self, number: usize) -> Result<Slot, NoSlot>;
}

/// What is known of a segment without its slots.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub(crate) base_offset: Offset,
    pub(crate) batches: usize,
    /// How many of them are committed.
    pub(crate) readable: usize,
    /// One past the segment's last offset.
    pub(crate) end_offset: Offset,
    /// One past its last batch's last byte.
    pub(crate) end: u64,
    /// Whether batches may have fewer records than offsets: in a cleaned segment.
    pub(crate) has_holes: bool,
}

/// Batches that a read gives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) position: u64,
    pub(crate) bytes: usize,
    pub(crate) first: Offset,
    pub(crate) next: Offset,
}

impl View {
    /// The first of slots `from..to` for which `is_before` does not hold; `to` where it holds for all.
    pub(crate) fn search(
        slots: &mut dyn Slots,
        from: usize,
        to: usize,
        is_before: impl Fn(&Slot) -> bool,
    ) -> Result<usize, NoSlot> {
        let (mut from, mut to) = (from, to.max(from));
        while from < to {
            let middle = from + (to - from) / 2;
            if is_before(&slots.slot(middle)?) {
                from = middle + 1;
            } else {
                to = middle;
            }
        }
        Ok(from)
    }

    /// The number of the batch that holds `offset`, with its slot.
    pub(crate) fn batch_of(&self, slots: &mut dyn Slots, offset: Offset) -> Result<(usize, Slot), NoSlot> {
        let after = Self::search(slots, 0, self.batches, |slot| slot.base_offset(self.base_offset) <= offset)?;
        let number = after.saturating_sub(1);
        Ok((number, slots.slot(number)?))
    }

    /// The offset behind batch `number`.
    pub(crate) fn offset_behind(&self, slots: &mut dyn Slots, number: usize) -> Result<Offset, NoSlot> {
        if number + 1 < self.batches {
            Ok(slots.slot(number + 1)?.base_offset(self.base_offset))
        } else {
            Ok(self.end_offset)
        }
    }

    /// One past the last committed byte.
    pub(crate) fn readable_end(&self, slots: &mut dyn Slots) -> Result<u64, NoSlot> {
        if self.readable < self.batches { Ok(u64::from(slots.slot(self.readable)?.position)) } else { Ok(self.end) }
    }

    /// The committed batches from the one that holds `from` on that begin below `below` and fit in `bytes_max`, at least one.
    pub(crate) fn extent(
        &self,
        slots: &mut dyn Slots,
        from: Offset,
        bytes_max: usize,
        below: Offset,
    ) -> Result<Extent, NoSlot> {
        let (number, first) = self.batch_of(slots, from)?;
        let position = u64::from(first.position);
        let limit = position.saturating_add(bytes_max as u64);
        // The usual read, at the tail, takes all there is: one look instead of a search.
        let end = if self.readable == self.batches && self.end <= limit && self.end_offset <= below {
            self.readable
        } else {
            let fits = |slot: &Slot| slot.end_position() <= limit && slot.base_offset(self.base_offset) < below;
            Self::search(slots, number + 1, self.readable, fits)?
        };
        let bytes = (slots.slot(end - 1)?.end_position() - position) as usize;
        let next = self.offset_behind(slots, end - 1)?;
        Ok(Extent { position, bytes, first: first.base_offset(self.base_offset), next })
    }

    /// Where the first committed batch lies that can hold a record so late at or behind `from`: the first at which the
    /// running maximum comes to `timestamp`. Its position and offset.
    pub(crate) fn first_reaching(
        &self,
        slots: &mut dyn Slots,
        timestamp: Timestamp,
        from: Offset,
    ) -> Result<Option<(u64, Offset)>, NoSlot> {
        let first = if self.base_offset < from { self.batch_of(slots, from)?.0 } else { 0 };
        let found = Self::search(slots, first, self.readable, |slot| slot.max_timestamp < timestamp)?;
        if found >= self.readable {
            return Ok(None);
        }
        let slot = slots.slot(found)?;
        Ok(Some((u64::from(slot.position), slot.base_offset(self.base_offset))))
    }

    /// Data records of the segment before `offset`, which lies in it. Where only the batch itself can tell, it is read
    /// from `files`; [`NoSlot::NotCached`] without them.
    pub(crate) fn records_before(
        &self,
        slots: &mut dyn Slots,
        offset: Offset,
        files: Option<&SealedFiles>,
    ) -> Result<u64, NoSlot> {
        if offset <= self.base_offset {
            return Ok(0);
        }
        let (number, slot) = self.batch_of(slots, offset)?;
        let in_batches_before = self.records_of_batches(slots, number)?;
        // Offsets within a batch are its records: nothing removes single records but compaction.
        let into_batch = (offset.get() - slot.base_offset(self.base_offset).get()).max(0) as u64;
        let records = u64::from(slot.records) - in_batches_before;
        if into_batch > 0 && records > 0 && self.is_thinned(slots, number, &slot, records)? {
            let offsets = files.ok_or(NoSlot::NotCached)?.offsets_of(&slot)?;
            return Ok(in_batches_before + offsets.partition_point(|at| *at < offset) as u64);
        }
        Ok(in_batches_before + into_batch.min(records))
    }

    /// Whether batch `number`, of so many data records, has lost some of them.
    fn is_thinned(&self, slots: &mut dyn Slots, number: usize, slot: &Slot, records: u64) -> Result<bool, NoSlot> {
        let offsets = self.offset_behind(slots, number)?.get() - slot.base_offset(self.base_offset).get();
        Ok(self.has_holes && records < offsets as u64)
    }

    /// The offset of the data record that has `before` others before it in the segment.
    /// As for [`Self::records_before`], its batch may have to be read.
    pub(crate) fn offset_of_record(
        &self,
        slots: &mut dyn Slots,
        before: u64,
        files: Option<&SealedFiles>,
    ) -> Result<Offset, NoSlot> {
        let number = Self::search(slots, 0, self.batches, |slot| u64::from(slot.records) <= before)?;
        let slot = slots.slot(number)?;
        let in_batches_before = self.records_of_batches(slots, number)?;
        let into_batch = before - in_batches_before;
        let records = u64::from(slot.records) - in_batches_before;
        if self.is_thinned(slots, number, &slot, records)? {
            let offsets = files.ok_or(NoSlot::NotCached)?.offsets_of(&slot)?;
            if let Some(offset) = offsets.get(into_batch as usize) {
                return Ok(*offset);
            }
        }
        Ok(slot.base_offset(self.base_offset).plus(into_batch as i64))
    }

    /// Data records of the segment's first `batches`.
    fn records_of_batches(&self, slots: &mut dyn Slots, batches: usize) -> Result<u64, NoSlot> {
        match batches.checked_sub(1) {
            Some(last) => Ok(u64::from(slots.slot(last)?.records)),
            None => Ok(0),
        }
    }
}

/// The active segment's.
pub(crate) struct ActiveSlots<'a>(pub(crate) &'a [Slot]);

impl Slots for ActiveSlots<'_> {
    fn slot(&mut self, number: usize) -> Result<Slot, NoSlot> {
        Ok(self.0[number])
    }
}

/// A sealed segment's, through the blocks that its log keeps.
pub(crate) struct KeptSlots<'a> {
    pub(crate) kept: &'a mut VecDeque<IndexBlock>,
    pub(crate) files: &'a SealedFiles,
    /// Whether to wait for what is neither kept nor cached.
    pub(crate) waits: bool,
}

impl Slots for KeptSlots<'_> {
    fn slot(&mut self, number: usize) -> Result<Slot, NoSlot> {
        let block = (number / BLOCK_SLOTS) as u32;
        let key = (self.files.name.first_index, block);
        // The front was used last.
        match self.kept.iter().position(|(at, _)| *at == key) {
            Some(0) => {}
            Some(at) => {
                if let Some(found) = self.kept.remove(at) {
                    self.kept.push_front(found);
                }
            }
            None => {
                let slots = if self.waits {
                    self.files.block(block)?
                } else {
                    self.files.block_now(block)?.ok_or(NoSlot::NotCached)?
                };
                self.kept.truncate(INDEX_BLOCKS_KEPT - 1);
                self.kept.push_front((key, slots));
            }
        }
        Ok(self.kept[0].1[number % BLOCK_SLOTS])
    }
}

/// A sealed segment's, on a pool: it waits, and keeps the block used last.
pub(crate) struct WaitingSlots<'a> {
    files: &'a SealedFiles,
    block: Option<(u32, Box<[Slot]>)>,
}

impl<'a> WaitingSlots<'a> {
    pub(crate) fn of(files: &'a SealedFiles) -> Self {
        Self { files, block: None }
    }
}

impl Slots for WaitingSlots<'_> {
    fn slot(&mut self, number: usize) -> Result<Slot, NoSlot> {
        let wanted = (number / BLOCK_SLOTS) as u32;
        let slots = match self.block.take() {
            Some((block, slots)) if block == wanted => slots,
            _ => self.files.block(wanted)?,
        };
        let slot = slots[number % BLOCK_SLOTS];
        self.block = Some((wanted, slots));
        Ok(slot)
    }
}

/// A sealed segment's files: shared by the log and the tickets that look into them.
#[derive(Debug)]
pub(crate) struct SealedFiles {
    disk: Arc<dyn Disk>,
    dir: Arc<Path>,
    pub(crate) name: SegmentName,
    /// Bytes of its batches.
    bytes: u64,
    batches: usize,
    /// The epoch of the entry before it, if known.
    epoch_before: Option<LeaderEpoch>,
    /// Held to open a file or to write an index, never while a log is walked; the log's own thread does not wait for it
    /// but to cut or delete the segment.
    state: Mutex<FilesState>,
    /// Held by the one that walks the log to rebuild the index; others on the pool wait for its result.
    rebuilding: Mutex<()>,
}

#[derive(Debug, Default)]
struct FilesState {
    log: Option<Arc<dyn DiskFile>>,
    index: Option<Arc<dyn DiskFile>>,
    /// A rebuilt index that could not be written.
    rebuilt: Option<Box<[Slot]>>,
    /// What a rebuild that failed found: walking through it again finds the same.
    rot: Option<(u64, Offset, String)>,
    /// Set when the segment is deleted, or appended to again: nothing may be written to its files from then on.
    is_retired: bool,
}

impl SealedFiles {
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        dir: Arc<Path>,
        name: SegmentName,
        bytes: u64,
        batches: usize,
        epoch_before: Option<LeaderEpoch>,
        log: Option<Arc<dyn DiskFile>>,
    ) -> Self {
        let state = Mutex::new(FilesState { log, ..FilesState::default() });
        Self { disk, dir, name, bytes, batches, epoch_before, state, rebuilding: Mutex::new(()) }
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.name.log_path(&self.dir)
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The epoch of the entry before the segment, if known.
    pub(crate) fn epoch_before(&self) -> Option<LeaderEpoch> {
        self.epoch_before
    }

    /// The log file, if it is open.
    pub(crate) fn log_now(&self) -> Option<Arc<dyn DiskFile>> {
        self.state_now()?.log.clone()
    }

    /// The log file, opened if need be.
    pub(crate) fn log(&self) -> Result<Arc<dyn DiskFile>, StorageError> {
        let mut state = self.state();
        if let Some(file) = &state.log {
            return Ok(Arc::clone(file));
        }
        let path = self.log_path();
        let file = self.disk.open(&path, OpenMode::Read).map_err(StorageError::io("open", &path))?;
        Ok(Arc::clone(state.log.insert(file)))
    }

    /// The offsets of a batch's records, ascending.
    fn offsets_of(&self, slot: &Slot) -> Result<Vec<Offset>, StorageError> {
        let path = self.log_path();
        let mut batch = vec![0; slot.batch_bytes as usize];
        let (position, offset) = (u64::from(slot.position), slot.base_offset(self.name.base_offset));
        self.log()?.read_exact_at(&mut batch, position).map_err(StorageError::io("read", &path))?;
        let read = || -> Result<Vec<Offset>, BatchError> {
            verify_crc(&batch)?;
            records(Bytes::from(batch), DECOMPRESSED_BYTES_MAX)?.map(|record| Ok(record?.offset)).collect()
        };
        read().map_err(|error| StorageError::Corrupt {
            segment: self.name.log_file(),
            position,
            offset,
            detail: error.to_string(),
        })
    }

    /// From here on nothing is written to these files by a lookup.
    pub(crate) fn retire(&self) {
        self.state().is_retired = true;
    }

    /// Whether the segment is deleted, or appended to again.
    pub(crate) fn is_retired(&self) -> bool {
        self.state().is_retired
    }

    /// Gives the file at `new` the log file's name; whether it did: not where the segment is retired, whose name may be
    /// gone for good. Not durable yet.
    pub(crate) fn replace_log(&self, new: &Path) -> io::Result<bool> {
        // Held meanwhile: who deletes the segment retires it first.
        let state = self.state();
        if state.is_retired {
            return Ok(false);
        }
        self.disk.rename(new, &self.log_path())?;
        Ok(true)
    }

    /// A block of the index, if it is cached and right.
    fn block_now(&self, block: u32) -> Result<Option<Box<[Slot]>>, StorageError> {
        let Some(state) = self.state_now() else { return Ok(None) };
        if let Some(known) = self.known(&state, block)? {
            return Ok(Some(known));
        }
        let Some(index) = &state.index else { return Ok(None) };
        let mut bytes = vec![0; BLOCK_BYTES];
        match index.read_at_nowait(&mut bytes, u64::from(block) * BLOCK_BYTES as u64) {
            Ok(Some(BLOCK_BYTES)) => Ok(self.decode(block, &bytes)),
            // Whatever it is, whoever may wait finds out.
            _ => Ok(None),
        }
    }

    /// A block of the index, rebuilt from the log where its file is missing or wrong.
    fn block(&self, block: u32) -> Result<Box<[Slot]>, StorageError> {
        if let Some(slots) = self.block_in_file(block)? {
            return Ok(slots);
        }
        let one_at_a_time = self.rebuilding.lock().unwrap_or_else(PoisonError::into_inner);
        // Another one may have rebuilt it meanwhile.
        if let Some(slots) = self.block_in_file(block)? {
            return Ok(slots);
        }
        let slots = self.rebuild()?;
        drop(one_at_a_time);
        Ok(slots_of_block(&slots, block))
    }

    fn block_in_file(&self, block: u32) -> Result<Option<Box<[Slot]>>, StorageError> {
        let mut state = self.state();
        if let Some(known) = self.known(&state, block)? {
            return Ok(Some(known));
        }
        let index = match &state.index {
            Some(index) => Arc::clone(index),
            None => {
                let path = self.name.index_path(&self.dir);
                match self.disk.open(&path, OpenMode::Read) {
                    Ok(index) => Arc::clone(state.index.insert(index)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    // Walking through the log would need a descriptor, too.
                    Err(error) => return Err(StorageError::io("open", &path)(error)),
                }
            }
        };
        drop(state);
        let mut bytes = vec![0; BLOCK_BYTES];
        match index.read_exact_at(&mut bytes, u64::from(block) * BLOCK_BYTES as u64) {
            Ok(()) => Ok(self.decode(block, &bytes)),
            Err(_) => Ok(None),
        }
    }

    /// What an earlier rebuild left in memory.
    fn known(&self, state: &FilesState, block: u32) -> Result<Option<Box<[Slot]>>, StorageError> {
        if let Some((position, offset, detail)) = &state.rot {
            let (position, offset, detail) = (*position, *offset, detail.clone());
            return Err(StorageError::Corrupt { segment: self.name.log_file(), position, offset, detail });
        }
        Ok(state.rebuilt.as_deref().map(|slots| slots_of_block(slots, block)))
    }

    fn decode(&self, block: u32, bytes: &[u8]) -> Option<Box<[Slot]>> {
        let slots = decode_block(self.name, block, bytes)?;
        let expected = (self.batches - block as usize * BLOCK_SLOTS).min(BLOCK_SLOTS);
        (slots.len() == expected).then(|| slots.into_boxed_slice())
    }

    /// Walks through the segment, and writes its index anew.
    fn rebuild(&self) -> Result<Vec<Slot>, StorageError> {
        let path = self.log_path();
        tracing::warn!(path = %path.display(), "a segment's index is missing or wrong: rebuilding it");
        let name = self.name;
        let mut walker = self.walker(0, name.base_offset, self.epoch_before)?;
        let mut slots: Vec<Slot> = Vec::with_capacity(self.batches);
        while slots.len() < self.batches {
            let detail = match walker.step().map_err(StorageError::io("read", &path))? {
                Step::Batch { header, position, control } => {
                    slots.push(Slot::of(&header, control, position as u32, name.base_offset, slots.last()));
                    continue;
                }
                Step::Bad { detail } => detail,
                Step::Newer { ctype } => format!("a control batch of unknown type {ctype}"),
                Step::Clean => "batches are missing".to_owned(),
            };
            let (position, offset) = (walker.position, walker.offset);
            self.state().rot = Some((position, offset, detail.clone()));
            return Err(StorageError::Corrupt { segment: name.log_file(), position, offset, detail });
        }
        let mut state = self.state();
        state.index = None;
        if state.is_retired || !replace_index_file(&*self.disk, &self.dir, name, &slots) {
            state.rebuilt = Some(slots.clone().into_boxed_slice());
        }
        Ok(slots)
    }

    /// A walk through the segment from a batch on.
    pub(crate) fn walker(
        &self,
        position: u64,
        offset: Offset,
        epoch: Option<LeaderEpoch>,
    ) -> Result<Walker, StorageError> {
        let walker = Walker::new(self.log()?, self.bytes, position, offset, self.name.first_index, epoch);
        Ok(if self.name.is_cleaned() { walker.of_cleaned() } else { walker })
    }

    fn state(&self) -> MutexGuard<'_, FilesState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, unless somebody has it: who has it may be waiting for the disk.
    fn state_now(&self) -> Option<MutexGuard<'_, FilesState>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(state)) => Some(state.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

fn slots_of_block(slots: &[Slot], block: u32) -> Box<[Slot]> {
    let from = block as usize * BLOCK_SLOTS;
    Box::from(&slots[from..slots.len().min(from + BLOCK_SLOTS)])
}

/// Writes a sealed segment's index file anew; whether it could. A failure only costs time later.
pub(crate) fn replace_index_file(disk: &dyn Disk, dir: &Path, name: SegmentName, slots: &[Slot]) -> bool {
    let path = name.index_path(dir);
    // It may not be there.
    let _ = disk.remove_file(&path);
    let written = disk
        .open(&path, OpenMode::CreateNew)
        .and_then(|file| write_blocks(&*file, name, slots, 0..blocks_of(slots.len())));
    if let Err(error) = &written {
        tracing::warn!(path = %path.display(), %error, "cannot write a rebuilt index");
    }
    written.is_ok()
}
