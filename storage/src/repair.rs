//! Repairing a sealed segment: what is rotten was pulled from another replica, the rest is copied, and the new file takes
//! the old one's name.
//!
//! ```text
//! old   | good            | rotten        | good        |    <segment>.log
//!          copied            pulled          copied
//! new   | good            | good          | good        |    <segment>.log.new, flushed, then renamed
//! ```
//! The bytes of an entry are the same on every replica, so nothing moves, and the index stays right. A crash leaves the
//! old file or the new one.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::{LeaderEpoch, Offset, RaftIndex};

use crate::disk::{DiskFile, OpenMode};
use crate::error::StorageError;
use crate::log::Log;
use crate::lookup::Which;
use crate::scrub::{Rotten, is_unreadable};
use crate::segment::SegmentName;
use crate::slots::{SealedFiles, View};
use crate::small_file::temporary_path;
use crate::walk::{Step, Walker, ZEROS, check};

/// Bytes copied at a time.
const COPY_BYTES: u64 = 1 << 20;
/// What is copied at a time where something there cannot be read.
const COPY_UNREADABLE_BYTES: u64 = 4 << 10;

/// A repair that is under way: give it the pulled batches, in as many pieces as they come in, then [`Repair::finish`] it.
/// All of it waits for the disk: run it on a pool. Dropped unfinished it leaves a temporary file, which the next repair of
/// the segment, or the next opening, removes.
#[derive(Debug)]
pub struct Repair {
    files: Arc<SealedFiles>,
    view: View,
    rotten: Rotten,
    room_kept_bytes: u64,
    /// The new file, once there is something to write.
    new: Option<Arc<dyn DiskFile>>,
    position: u64,
    next_index: RaftIndex,
    offset: Offset,
    epoch: Option<LeaderEpoch>,
}

/// How a repair ended; give it to [`Log::repaired`].
#[derive(Debug)]
pub struct RepairDone {
    segment: SegmentName,
    repaired: Result<Outcome, StorageError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The new file is in place; whether nothing else in it is rotten.
    Replaced { is_whole: bool },
    /// The segment was deleted meanwhile.
    Deleted,
}

impl Log {
    /// Begins to repair what a [`ScrubJob`](crate::scrub::ScrubJob) found. Fails with [`StorageError::NoEntry`] where the
    /// segment is not there any more, is not sealed, or not all committed.
    pub fn repair(&self, rotten: &Rotten) -> Result<Repair, StorageError> {
        let no_entry = |index| StorageError::NoEntry { index, first: self.first_index(), last: self.last_index() };
        let Which::Sealed(at) = self.segment_of_index(rotten.first_index)?.0 else {
            return Err(no_entry(rotten.first_index));
        };
        let segment = &self.sealed[at];
        let is_it = segment.name == rotten.segment
            && segment.end_index <= self.committed.next()
            && rotten.position.saturating_add(rotten.bytes) <= segment.bytes;
        if !is_it {
            return Err(no_entry(rotten.first_index));
        }
        Ok(Repair {
            files: Arc::clone(&segment.files),
            view: self.view(Which::Sealed(at)),
            room_kept_bytes: self.config.room_kept_on(&*self.disk),
            new: None,
            position: rotten.position,
            next_index: rotten.first_index,
            offset: rotten.first_offset,
            epoch: rotten.epoch_before,
            rotten: rotten.clone(),
        })
    }

    /// Reads from the repaired file from now on. Returns whether the segment is wholly right now; where it is not, more of
    /// it is rotten than was repaired: scrub it again.
    ///
    /// A repair that failed leaves the log as it was, and poisons nothing.
    pub fn repaired(&mut self, done: RepairDone) -> Result<bool, StorageError> {
        let Outcome::Replaced { is_whole } = done.repaired? else { return Ok(true) };
        let Some(at) = self.sealed.iter().position(|segment| segment.name == done.segment) else { return Ok(true) };
        let (bytes, batches) = (self.sealed[at].bytes, self.sealed[at].batches());
        let files = self.sealed_files(done.segment, bytes, batches, None);
        let segment = &mut self.sealed[at];
        // What it knew of rot, and its open file, are the old file's.
        segment.files.retire();
        segment.files = files;
        segment.map = None;
        Ok(is_whole)
    }
}

impl RepairDone {
    /// Whether it failed.
    pub fn is_err(&self) -> bool {
        self.repaired.is_err()
    }
}

impl Repair {
    /// The entry that is wanted next; one past [`Rotten::last_index`] when all are there.
    pub fn next_index(&self) -> RaftIndex {
        self.next_index
    }

    /// Whether all that was rotten has come: [`Self::finish`] it.
    pub fn has_all(&self) -> bool {
        self.next_index > self.rotten.last_index
    }

    /// What it is to repair.
    pub fn rotten(&self) -> &Rotten {
        &self.rotten
    }

    /// Writes pulled batches, of which the first is entry [`Self::next_index`].
    ///
    /// Fails with [`StorageError::Refused`], having written nothing, where they are not what was there (a wrong CRC, offset
    /// or epoch, other bytes in all): ask another replica. With [`StorageError::DiskFull`] where there is no room for
    /// another copy of the segment. After any other failure: drop it, and begin again.
    pub fn append(&mut self, batches: Bytes) -> Result<(), StorageError> {
        let (mut index, mut offset, mut epoch) = (self.next_index, self.offset, self.epoch);
        for split in split_batches(batches.clone()) {
            let refused = |detail: String| StorageError::Refused { index, detail };
            let (header, batch) = split.map_err(|error| refused(error.to_string()))?;
            let checked = check(&batch, &header, offset, index, epoch);
            checked.map(|_| ()).or_else(|wrong| wrong.unless_newer()).map_err(refused)?;
            (index, offset, epoch) = (index.next(), header.next_offset(), Some(header.leader_epoch));
        }
        let end = self.position + batches.len() as u64;
        let must_end = self.rotten.position + self.rotten.bytes;
        let all = self.rotten.last_index.next();
        if index > all || end > must_end || (index == all) != (end == must_end) {
            let left = must_end - self.position;
            let detail = format!("{} bytes up to entry {index} where {left} up to {all} belong", batches.len());
            return Err(StorageError::Refused { index: self.next_index, detail });
        }
        let file = self.new_file()?;
        let path = temporary_path(&self.files.log_path());
        file.write_at(&batches, self.position).map_err(StorageError::io("write", &path))?;
        (self.position, self.next_index, self.offset, self.epoch) = (end, index, offset, epoch);
        Ok(())
    }

    /// Copies what is good behind the rotten batches, checks the new file, flushes it, and gives it the old one's name;
    /// durable when this returns.
    pub fn finish(mut self) -> RepairDone {
        let repaired = self.replace();
        if !matches!(repaired, Ok(Outcome::Replaced { .. })) {
            // It may not have been made; what stays is swept at the next opening.
            let _ = self.files.disk().remove_file(&temporary_path(&self.files.log_path()));
        }
        RepairDone { segment: self.rotten.segment, repaired }
    }

    /// The file that will take the old one's place, with all before the rotten batches copied.
    fn new_file(&mut self) -> Result<Arc<dyn DiskFile>, StorageError> {
        if let Some(file) = &self.new {
            return Ok(Arc::clone(file));
        }
        let path = temporary_path(&self.files.log_path());
        let disk = self.files.disk();
        let dir = self.files.dir();
        let available = disk.available_bytes(dir).map_err(StorageError::io("ask for room in", dir))?;
        let needed = self.view.end.saturating_add(self.room_kept_bytes);
        if available < needed {
            return Err(StorageError::DiskFull {
                path: dir.to_owned(),
                needed_bytes: needed,
                available_bytes: available,
            });
        }
        match disk.remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StorageError::io("remove", &path)(error));
            }
            _ => {}
        }
        let file = disk.open(&path, OpenMode::CreateNew).map_err(StorageError::io("create", &path))?;
        self.copy(&file, 0, self.rotten.position)?;
        Ok(Arc::clone(self.new.insert(file)))
    }

    /// Copies bytes of the old file to the same place of the new one. What cannot be read is left out: zeros are no batch,
    /// so that it is found again as what it is.
    fn copy(&self, new: &Arc<dyn DiskFile>, from: u64, to: u64) -> Result<(), StorageError> {
        if from >= to {
            return Ok(());
        }
        let old = self.files.log()?;
        let path = self.files.log_path();
        let mut buffer = Vec::new();
        let mut copy_piece = |at: u64, count: u64| -> Result<bool, StorageError> {
            buffer.resize(count as usize, 0);
            match old.read_exact_at(&mut buffer, at) {
                Ok(()) => {
                    new.write_at(&buffer, at).map(|()| true).map_err(StorageError::io("write", &temporary_path(&path)))
                }
                Err(error) if is_unreadable(&error) => Ok(false),
                Err(error) => Err(StorageError::io("read", &path)(error)),
            }
        };
        let mut at = from;
        while at < to {
            let count = COPY_BYTES.min(to - at);
            if !copy_piece(at, count)? {
                let mut within = at;
                while within < at + count {
                    let small = COPY_UNREADABLE_BYTES.min(at + count - within);
                    if !copy_piece(within, small)? {
                        let written = new.write_at(&ZEROS[..small as usize], within);
                        written.map_err(StorageError::io("write", &temporary_path(&path)))?;
                    }
                    within += small;
                }
            }
            at += count;
        }
        Ok(())
    }

    fn replace(&mut self) -> Result<Outcome, StorageError> {
        if !self.has_all() {
            let detail = format!("entries from it to {} were not pulled", self.rotten.last_index);
            return Err(StorageError::Refused { index: self.next_index, detail });
        }
        let file = self.new_file()?;
        self.copy(&file, self.rotten.position + self.rotten.bytes, self.view.end)?;
        let path: PathBuf = temporary_path(&self.files.log_path());
        let is_whole = self.check(&file)?;
        file.sync_data().map_err(StorageError::io("flush", &path))?;
        // Closed before it is renamed: a disk may close it and open it again by name.
        drop(file);
        self.new = None;
        let renamed = self.files.replace_log(&path).map_err(StorageError::io("rename", &path))?;
        if !renamed {
            return Ok(Outcome::Deleted);
        }
        let dir = self.files.dir();
        self.files.disk().sync_dir(dir).map_err(StorageError::io("flush", dir))?;
        Ok(Outcome::Replaced { is_whole })
    }

    /// Reads the new file again, whole: the batches that were pulled must be right. Whether all are.
    fn check(&self, file: &Arc<dyn DiskFile>) -> Result<bool, StorageError> {
        let path = temporary_path(&self.files.log_path());
        let Rotten { segment: name, first_index, position, first_offset, .. } = self.rotten;
        let walk = |walker: &mut Walker, behind: RaftIndex| -> Result<bool, StorageError> {
            while walker.index < behind {
                match walker.step().map_err(StorageError::io("read", &path))? {
                    Step::Batch { .. } => {}
                    // Written by a newer program, and whole: this one does not go further.
                    Step::Newer { .. } => return Ok(true),
                    Step::Clean | Step::Bad { .. } => return Ok(false),
                }
            }
            Ok(true)
        };
        let end = position + self.rotten.bytes;
        let epoch = self.rotten.epoch_before;
        let mut pulled = Walker::new(Arc::clone(file), end, position, first_offset, first_index, epoch);
        if !walk(&mut pulled, self.rotten.last_index.next())? {
            let (position, offset) = (pulled.position, pulled.offset);
            let detail = "what was written a moment ago is not there".to_owned();
            return Err(StorageError::Corrupt { segment: name.log_file(), position, offset, detail });
        }
        let epoch = self.files.epoch_before();
        let mut all = Walker::new(Arc::clone(file), self.view.end, 0, name.base_offset, name.first_index, epoch);
        let behind = name.first_index.plus(self.view.batches as u64);
        walk(&mut all, behind)
    }
}
