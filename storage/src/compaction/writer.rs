//! A cleaned segment that is being written: batches whose offsets follow each other, from the first on without a gap.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::record::cleaning::empty_batch;
use flowstone_protocol::{BatchHeader, LeaderEpoch, Offset, RaftIndex, Timestamp};

use super::manifest::CleanedSegment;
use crate::batch_index::Slot;
use crate::disk::{Disk, DiskFile, OpenMode};
use crate::error::StorageError;
use crate::segment::SegmentName;
use crate::slots::replace_index_file;
use crate::walk::{Step, Walker};

/// Bytes written at a time.
const WRITE_BYTES: usize = 1 << 20;

/// A new file, and what was put into it.
#[derive(Debug)]
pub(crate) struct Writer {
    disk: Arc<dyn Disk>,
    dir: Arc<Path>,
    name: SegmentName,
    file: Arc<dyn DiskFile>,
    buffer: Vec<u8>,
    /// Bytes in the file and in the buffer.
    end: u64,
    slots: Vec<Slot>,
    next: Offset,
    /// Offsets from here up to `next` are those of batches that nothing is left of, of this epoch.
    gap: Option<(Offset, LeaderEpoch)>,
    epoch_before: Option<LeaderEpoch>,
}

impl Writer {
    /// Begins a file; what has its name was left by an attempt that failed.
    pub(crate) fn begin(
        disk: &Arc<dyn Disk>,
        dir: &Arc<Path>,
        name: SegmentName,
        epoch_before: Option<LeaderEpoch>,
    ) -> Result<Self, StorageError> {
        remove_files(&**disk, dir, name)?;
        let path = name.log_path(dir);
        let file = disk.open(&path, OpenMode::CreateNew).map_err(StorageError::io("create", &path))?;
        Ok(Self {
            disk: Arc::clone(disk),
            dir: Arc::clone(dir),
            name,
            file,
            buffer: Vec::new(),
            end: 0,
            slots: Vec::new(),
            next: name.base_offset,
            gap: None,
            epoch_before,
        })
    }

    /// The offset that comes next.
    pub(crate) fn next(&self) -> Offset {
        self.next
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.end
    }

    pub(crate) fn batches(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn name(&self) -> SegmentName {
        self.name
    }

    /// Puts a batch behind the last one. `control` is the type of one of the log's own.
    pub(crate) fn put(&mut self, header: &BatchHeader, control: Option<i16>, batch: &[u8]) -> Result<(), StorageError> {
        assert_eq!(header.base_offset, self.next, "offsets of {} follow each other", self.name.log_file());
        self.close_gap()?;
        self.put_bytes(header, control, batch)
    }

    /// Nothing is left of the offsets up to `to`, which were written under `epoch`.
    pub(crate) fn skip(&mut self, to: Offset, epoch: LeaderEpoch) -> Result<(), StorageError> {
        assert!(to > self.next, "offsets of {} follow each other", self.name.log_file());
        let (from, gap_epoch) = *self.gap.get_or_insert((self.next, epoch));
        if gap_epoch != epoch || to.get() - from.get() > i64::from(i32::MAX) {
            self.close_gap()?;
            self.gap = Some((self.next, epoch));
        }
        self.next = to;
        Ok(())
    }

    fn close_gap(&mut self) -> Result<(), StorageError> {
        let Some((from, epoch)) = self.gap.take() else { return Ok(()) };
        let batch = empty_batch(from, self.next, epoch);
        let header = BatchHeader::parse(&batch).expect("made a moment ago");
        self.put_bytes(&header, None, &batch)
    }

    fn put_bytes(&mut self, header: &BatchHeader, control: Option<i16>, batch: &[u8]) -> Result<(), StorageError> {
        let position = u32::try_from(self.end).expect("cleaned segments are far below 4 GiB");
        self.slots.push(Slot::of(header, control, position, self.name.base_offset, self.slots.last()));
        self.buffer.extend_from_slice(batch);
        self.end += batch.len() as u64;
        self.next = header.next_offset();
        if self.buffer.len() >= WRITE_BYTES { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<(), StorageError> {
        let position = self.end - self.buffer.len() as u64;
        let path = self.name.log_path(&self.dir);
        self.file.write_at(&self.buffer, position).map_err(StorageError::io("write", &path))?;
        self.buffer.clear();
        Ok(())
    }

    /// All is there: what was written is to be read again before it is flushed.
    pub(crate) fn end(mut self, end_index: RaftIndex) -> Result<Written, StorageError> {
        self.close_gap()?;
        self.write()?;
        let Self { disk, dir, name, file, slots, next, epoch_before, end, .. } = self;
        let walker =
            Walker::new(Arc::clone(&file), end, 0, name.base_offset, name.first_index, epoch_before).of_cleaned();
        let last = slots.last();
        let segment = CleanedSegment {
            name,
            end_offset: next,
            end_index,
            bytes: end,
            batches: slots.len() as u64,
            records: last.map_or(0, |slot| u64::from(slot.records)),
            max_timestamp: last.map_or(Timestamp::NONE, |slot| slot.max_timestamp),
            epoch_before: epoch_before.unwrap_or(LeaderEpoch::NONE),
        };
        Ok(Written { disk, dir, file, slots, walker, segment })
    }

    /// Gives it up.
    pub(crate) fn abandon(self) {
        let Self { disk, dir, name, file, .. } = self;
        drop(file);
        // What stays is swept at the next opening.
        let _ = remove_files(&*disk, &dir, name);
    }
}

/// A cleaned segment that is written, and being read again.
#[derive(Debug)]
pub(crate) struct Written {
    disk: Arc<dyn Disk>,
    dir: Arc<Path>,
    file: Arc<dyn DiskFile>,
    slots: Vec<Slot>,
    walker: Walker,
    segment: CleanedSegment,
}

impl Written {
    /// Reads about `bytes_max` of it again; how many, and whether that was all.
    pub(crate) fn verify(&mut self, bytes_max: u64) -> Result<(u64, bool), StorageError> {
        let path = self.segment.name.log_path(&self.dir);
        let from = self.walker.position;
        while self.walker.position < self.segment.bytes && self.walker.position - from < bytes_max {
            match self.walker.step().map_err(StorageError::io("read", &path))? {
                Step::Batch { .. } | Step::Newer { .. } => {}
                Step::Clean | Step::Bad { .. } => {
                    let (position, offset) = (self.walker.position, self.walker.offset);
                    let detail = "what was written a moment ago is not there".to_owned();
                    return Err(StorageError::Corrupt {
                        segment: self.segment.name.log_file(),
                        position,
                        offset,
                        detail,
                    });
                }
            }
        }
        let is_all = self.walker.position >= self.segment.bytes;
        Ok((self.walker.position - from, is_all))
    }

    /// Flushes it. Its name in the folder is not durable yet.
    pub(crate) fn flush(self) -> Result<CleanedSegment, StorageError> {
        let path = self.segment.name.log_path(&self.dir);
        self.file.sync_data().map_err(StorageError::io("flush", &path))?;
        // A help, never needed.
        replace_index_file(&*self.disk, &self.dir, self.segment.name, &self.slots);
        Ok(self.segment)
    }

    pub(crate) fn abandon(self) {
        let Self { disk, dir, file, segment, walker, .. } = self;
        drop((file, walker));
        let _ = remove_files(&*disk, &dir, segment.name);
    }
}

/// Removes a segment's files, if they are there.
pub(crate) fn remove_files(disk: &dyn Disk, dir: &Path, name: SegmentName) -> Result<(), StorageError> {
    for path in [name.log_path(dir), name.index_path(dir)] {
        match disk.remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StorageError::io("remove", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A batch of bytes that were copied or read, cut to the offsets `from..to`: only one without records may reach beyond.
pub(crate) fn within(header: &BatchHeader, batch: &Bytes, from: Offset, to: Offset) -> Option<Bytes> {
    let (first, next) = (header.base_offset.max(from), header.next_offset().min(to));
    if first == header.base_offset && next == header.next_offset() {
        return Some(batch.clone());
    }
    let is_empty = header.record_count == 0 && !header.attributes.is_control();
    (is_empty && first < next).then(|| empty_batch(first, next, header.leader_epoch))
}
