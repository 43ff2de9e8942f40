//! What is left of a log that its replica can not go on with, batch by batch: the replica that takes its place copies what
//! is good, and pulls the rest.
//!
//! Nothing of it is believed for lying there: every CRC is checked here, and whoever takes a batch compares its index,
//! offset and epoch with a history that is known to be committed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::RaftIndex;

use crate::batch_index::{Slot, valid_prefix};
use crate::disk::{Disk, DiskFile, OpenMode};
use crate::segment::SegmentName;
use crate::small_file;
use crate::walk::{Step, Walker};

/// The segments in a folder, to be read whatever became of them. It changes nothing.
#[derive(Debug)]
pub struct KeptLog {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// Ascending.
    segments: Vec<SegmentName>,
    /// The one that was read last.
    open: Option<OpenSegment>,
}

#[derive(Debug)]
struct OpenSegment {
    name: SegmentName,
    file: Arc<dyn DiskFile>,
    file_bytes: u64,
    /// As far as its index is right.
    slots: Vec<Slot>,
    /// Stands before the batch that is likely to be read next.
    walker: Option<Walker>,
}

impl KeptLog {
    /// What is in `dir`; `None` where no segment of a Raft log is.
    ///
    /// # Errors
    /// When the folder can not be read.
    pub fn find(disk: &Arc<dyn Disk>, dir: &Path) -> io::Result<Option<Self>> {
        let names = match disk.read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            names => names?,
        };
        // What was cleaned is named by three numbers: its batches are no entries any more.
        let of_raft = names.iter().filter(|name| name.matches('-').count() == 1);
        let mut segments: Vec<_> = of_raft.filter_map(|name| SegmentName::of_log_file(name)).collect();
        segments.sort_unstable_by_key(|segment| (segment.first_index, segment.base_offset));
        let kept = Self { disk: Arc::clone(disk), dir: dir.to_owned(), segments, open: None };
        Ok((!kept.segments.is_empty()).then_some(kept))
    }

    /// Whole batches, CRCs checked, of the entries from `first` to `last` at most: as many as fit in `bytes_max` and lie in
    /// one segment, at least one. `None` where the first of them is not here, or can not be read.
    pub fn read(&mut self, first: RaftIndex, last: RaftIndex, bytes_max: usize) -> Option<Bytes> {
        let (name, next) = self.segment_of(first)?;
        if self.open.as_ref().is_none_or(|open| open.name != name) {
            self.open = OpenSegment::open(&self.disk, &self.dir, name);
        }
        let behind = next.map_or(last.next(), |next| next.min(last.next()));
        self.open.as_mut()?.read(first, behind, bytes_max)
    }

    /// The first entry behind `index` that may be here though `index` is not.
    pub fn resumes_behind(&self, index: RaftIndex) -> Option<RaftIndex> {
        let (name, next) = self.segment_of(index).unwrap_or((*self.segments.first()?, None));
        if index < name.first_index {
            return Some(name.first_index);
        }
        let open = self.open.as_ref().filter(|open| open.name == name);
        let indexed = open.map_or(0, |open| open.slots.len() as u64);
        let behind = index.next();
        if behind < name.first_index.plus(indexed) { Some(behind) } else { next }
    }

    /// The segment that an entry is in, if any, and the first entry of the one behind it.
    fn segment_of(&self, index: RaftIndex) -> Option<(SegmentName, Option<RaftIndex>)> {
        let after = self.segments.partition_point(|segment| segment.first_index <= index);
        let name = *self.segments.get(after.checked_sub(1)?)?;
        Some((name, self.segments.get(after).map(|next| next.first_index)))
    }
}

impl OpenSegment {
    fn open(disk: &Arc<dyn Disk>, dir: &Path, name: SegmentName) -> Option<Self> {
        let file = disk.open(&name.log_path(dir), OpenMode::Read).ok()?;
        let file_bytes = file.len().ok()?;
        let index = small_file::read_file(disk, &name.index_path(dir)).unwrap_or_default();
        let mut slots = valid_prefix(name, &index);
        slots.truncate(slots.partition_point(|slot| slot.end_position() <= file_bytes));
        Some(Self { name, file, file_bytes, slots, walker: None })
    }

    /// A walk that stands at `index`, or before it where the index file does not reach so far.
    fn walk_to(&self, index: RaftIndex) -> Walker {
        let number = (index.get() - self.name.first_index.get()) as usize;
        let number = number.min(self.slots.len().saturating_sub(1));
        let (position, offset) = self.slots.get(number).map_or((0, self.name.base_offset), |slot| {
            (u64::from(slot.position), slot.base_offset(self.name.base_offset))
        });
        let epoch = number.checked_sub(1).and_then(|before| self.slots.get(before)).map(|slot| slot.epoch);
        let first = self.name.first_index.plus(number as u64);
        Walker::new(Arc::clone(&self.file), self.file_bytes, position, offset, first, epoch)
    }

    fn read(&mut self, first: RaftIndex, behind: RaftIndex, bytes_max: usize) -> Option<Bytes> {
        let mut walker = match self.walker.take() {
            Some(walker) if walker.index == first => walker,
            _ => self.walk_to(first),
        };
        while walker.index < first {
            if !matches!(walker.step(), Ok(Step::Batch { .. })) {
                return None;
            }
        }
        let from = walker.position;
        let mut to = from;
        while walker.index < behind && (to == from || to - from < bytes_max as u64) {
            // What can not be read is as good as what is damaged.
            let Ok(Step::Batch { .. }) = walker.step() else { break };
            to = walker.position;
        }
        if to == from {
            return None;
        }
        self.walker = Some(walker);
        let mut bytes = vec![0; usize::try_from(to - from).ok()?];
        self.file.read_exact_at(&mut bytes, from).ok()?;
        Some(Bytes::from(bytes))
    }
}
