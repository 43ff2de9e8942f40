//! Installing a replica that is copied from others: a checkpoint, and the entries that the log must hold before it.
//!
//! What is pulled goes into a folder of its own beside the replica's. It is a log like any other, but that its manifest
//! comes last: with it the folder is whole, and takes the replica's place.
//!
//! ```text
//! <dir>            what was there before, if anything: untouched until the swap
//! <dir>.incoming   incoming              who it will be, how far it is flushed
//!                  <applied>.state       the checkpoint that it will begin from
//!                  *.log *.index         first_index ......... next_index ->      <= applied
//!                  replica               only once all is there and flushed: from here on there is no way back
//!
//! swap: <dir> is removed, <dir>.incoming gets its name. A crash before `replica` is durable leaves the old replica and an
//! install that goes on; after it, whoever comes next (`Install::resume`, `Log::open`) finishes the swap.
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use flowstone_protocol::{Offset, RaftIndex, Timestamp};

use crate::checkpoint::{CREATION_INDEX, CREATION_TERM, Checkpoint, EpochStart, MANIFEST_NAME, ReplicaIdentity};
use crate::compaction::Cleaning;
use crate::compaction::copying::{Cleanness, Copying};
use crate::disk::{Disk, OpenMode};
use crate::error::{OpenError, StorageError};
use crate::log::{Log, LogConfig, LogEntry};
use crate::open::FoundFiles;
use crate::recovery::Answered;
use crate::scrub::is_unreadable;
use crate::small_file::{self, Fields, FrameError};

/// Names the file that says how far an install is.
pub(crate) const PROGRESS_NAME: &str = "incoming";
const PROGRESS_MAGIC: [u8; 8] = *b"FLOWINCO";
/// The newest version of that file.
pub const INSTALL_FORMAT_VERSION: u32 = 1;
/// Ends the name of the folder that is installed into.
pub(crate) const INCOMING_SUFFIX: &str = ".incoming";

/// A replica that is being copied from others; nobody sees it until [`Install::finish`].
#[derive(Debug)]
pub struct Install {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    incoming: PathBuf,
    first: Place,
    target: Checkpoint,
    /// What came so far. Its checkpoint is one of the entry before the first, or of one that was flushed since.
    log: Log,
    /// What comes by offset, where the source has it no longer as entries: then that is all, and `log` is empty.
    copying: Option<Copying>,
}

/// An entry and the offset that it begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: RaftIndex,
    offset: Offset,
}

/// What the file `incoming` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Progress {
    identity: ReplicaIdentity,
    /// The checkpoint's index.
    applied: RaftIndex,
    first: Place,
    /// The entry behind the last one that was flushed.
    flushed_to: Place,
}

impl Progress {
    fn encode(&self) -> Bytes {
        let mut body = BytesMut::with_capacity(72);
        self.identity.put(&mut body);
        body.put_u64_le(self.applied.get());
        for place in [self.first, self.flushed_to] {
            body.put_u64_le(place.index.get());
            body.put_i64_le(place.offset.get());
        }
        small_file::frame(PROGRESS_MAGIC, INSTALL_FORMAT_VERSION, &body)
    }

    fn decode(file: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields(small_file::unframe(PROGRESS_MAGIC, INSTALL_FORMAT_VERSION, file)?);
        let identity = ReplicaIdentity::take(&mut fields)?;
        let applied = RaftIndex::new(fields.u64()?);
        let mut place = || Ok(Place { index: RaftIndex::new(fields.u64()?), offset: Offset::new(fields.i64()?) });
        let (first, flushed_to) = (place()?, place()?);
        fields.end()?;
        Ok(Self { identity, applied, first, flushed_to })
    }
}

/// The folder that is installed into before it takes the place of `dir`.
pub(crate) fn incoming_dir(dir: &Path) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(INCOMING_SUFFIX);
    dir.with_file_name(name)
}

/// Whether a whole install waits to take the place of `dir`.
pub(crate) fn is_whole(disk: &Arc<dyn Disk>, dir: &Path) -> io::Result<bool> {
    disk.exists(&incoming_dir(dir).join(MANIFEST_NAME))
}

/// Lets a whole install take the place of `dir`, if one waits there; whether one did. Begun once, it is carried through
/// by whoever comes next.
pub(crate) fn swap_in(disk: &Arc<dyn Disk>, dir: &Path) -> Result<bool, StorageError> {
    let incoming = incoming_dir(dir);
    if !is_whole(disk, dir).map_err(StorageError::io("open", &incoming))? {
        return Ok(false);
    }
    // A life before this one may have been killed between the manifest's renaming and this: what it replaces must not go
    // before it is there to stay.
    disk.sync_dir(&incoming).map_err(StorageError::io("flush", &incoming))?;
    remove_dir(disk, dir)?;
    disk.rename(&incoming, dir).map_err(StorageError::io("rename", &incoming))?;
    let parent = dir.parent().unwrap_or(Path::new("."));
    disk.sync_dir(parent).map_err(StorageError::io("flush", parent))?;
    Ok(true)
}

/// Removes a folder of files, if it is there.
fn remove_dir(disk: &Arc<dyn Disk>, dir: &Path) -> Result<(), StorageError> {
    let names = match disk.read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        names => names.map_err(StorageError::io("read", dir))?,
    };
    for name in names {
        let path = dir.join(name);
        disk.remove_file(&path).map_err(StorageError::io("remove", &path))?;
    }
    disk.remove_dir(dir).map_err(StorageError::io("remove", dir))
}

impl Install {
    /// Begins to install a replica that will be in `dir`, from a checkpoint file's bytes as they were pulled; entries are
    /// wanted from `first_index` (which begins with `first_offset`) up to the checkpoint's. An install that was under way
    /// is given up. What `dir` holds stays as it is until [`Self::finish`].
    ///
    /// Fails with [`StorageError::NotInstallable`] where the checkpoint is rotten, or the entries do not lead up to it.
    pub fn begin(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        identity: ReplicaIdentity,
        checkpoint: &Bytes,
        first_index: RaftIndex,
        first_offset: Offset,
        config: LogConfig,
    ) -> Result<Self, StorageError> {
        let target = Checkpoint::decode(checkpoint).map_err(|detail| not_installable(dir, detail))?;
        let first = Place { index: first_index, offset: first_offset };
        Self::begin_at(disk, dir, identity, checkpoint, (target, first), None, config)
    }

    /// The same from a source that is compacted: all up to the checkpoint is wanted by offset
    /// ([`Self::wanted_offsets`]), from `start` on, which begins with the entry beside it. None of it will be entries: the
    /// log begins behind the checkpoint.
    pub fn begin_by_offset(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        identity: ReplicaIdentity,
        checkpoint: &Bytes,
        start: (Offset, RaftIndex),
        config: LogConfig,
    ) -> Result<Self, StorageError> {
        let target = Checkpoint::decode(checkpoint).map_err(|detail| not_installable(dir, detail))?;
        let first = Place { index: target.applied.next(), offset: target.end_offset_at_applied };
        Self::begin_at(disk, dir, identity, checkpoint, (target, first), Some(start), config)
    }

    fn begin_at(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        identity: ReplicaIdentity,
        checkpoint: &Bytes,
        (target, first): (Checkpoint, Place),
        copied: Option<(Offset, RaftIndex)>,
        config: LogConfig,
    ) -> Result<Self, StorageError> {
        let start = copied.map_or(first, |(offset, index)| Place { index, offset });
        check_start(&target, start).map_err(|detail| not_installable(dir, detail))?;
        // One that is whole is not under way any more.
        swap_in(disk, dir)?;
        Self::abandon(disk, dir)?;
        let incoming = incoming_dir(dir);
        disk.create_dir_all(&incoming).map_err(StorageError::io("create", &incoming))?;
        let path = incoming.join(Checkpoint::file_name(target.applied));
        let write_checkpoint = || {
            let file = disk.open(&path, OpenMode::CreateNew)?;
            file.write_at(checkpoint, 0)?;
            file.sync_data()
        };
        write_checkpoint().map_err(StorageError::io("write", &path))?;
        // All that leads to the folder, before there is anything in it that must not be lost.
        for parent in dir.ancestors().skip(1).take(2).filter(|parent| !parent.as_os_str().is_empty()) {
            disk.sync_dir(parent).map_err(StorageError::io("flush", parent))?;
        }
        let progress = Progress { identity, applied: target.applied, first, flushed_to: first };
        let copying = match copied {
            Some(start) => {
                let end = (first.offset, first.index);
                Some(Copying::begin(disk, &incoming, start, end, config.segment_bytes)?)
            }
            None => None,
        };
        write_progress(disk, &incoming, &progress)?;
        Self::open(disk, dir, progress, target, copying, config)
            .map_err(|error| not_installable(dir, error.to_string()))
    }

    /// The install into `dir` that an earlier life left, ready to go on behind what it flushed; `None` where there is none.
    /// One that was whole takes the replica's place now, which is `None` as well: then `dir` is to be opened. One that
    /// cannot go on (rot, a newer format) is removed.
    pub fn resume(disk: &Arc<dyn Disk>, dir: &Path, config: LogConfig) -> Result<Option<Self>, StorageError> {
        if swap_in(disk, dir)? {
            return Ok(None);
        }
        let incoming = incoming_dir(dir);
        if !disk.exists(&incoming).map_err(StorageError::io("open", &incoming))? {
            return Ok(None);
        }
        let path = incoming.join(PROGRESS_NAME);
        let resumed = match small_file::read_file(disk, &path) {
            Ok(file) => match Progress::decode(&file) {
                Ok(progress) => Self::reopen(disk, dir, progress, config),
                Err(error) => Err(OpenError::Io {
                    action: "go on with",
                    path,
                    source: io::Error::new(io::ErrorKind::InvalidData, format!("{error:?}")),
                }),
            },
            Err(source) => Err(OpenError::Io { action: "open", path, source }),
        };
        match resumed {
            Ok(install) => Ok(Some(install)),
            // The disk may answer the next time.
            Err(OpenError::Io { action, path, source })
                if !is_unreadable(&source)
                    && !matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) =>
            {
                Err(StorageError::Io { action, path, source })
            }
            Err(error) => {
                tracing::warn!(dir = %incoming.display(), %error, "an install cannot go on and begins again");
                Self::abandon(disk, dir)?;
                Ok(None)
            }
        }
    }

    fn reopen(disk: &Arc<dyn Disk>, dir: &Path, progress: Progress, config: LogConfig) -> Result<Self, OpenError> {
        let path = incoming_dir(dir).join(Checkpoint::file_name(progress.applied));
        let file = small_file::read_file(disk, &path).map_err(OpenError::io("open", &path))?;
        let invalid = |detail| OpenError::io("go on with", &path)(io::Error::new(io::ErrorKind::InvalidData, detail));
        let target = Checkpoint::decode(&file).map_err(&invalid)?;
        let end = (target.end_offset_at_applied, target.applied.next());
        let incoming = incoming_dir(dir);
        let copied = Cleaning::read(disk, &incoming)?;
        let copying = Copying::resume(disk, &incoming, copied, end, config.segment_bytes)
            .map_err(|()| invalid("nothing of it is there yet".to_owned()))?;
        if copying.is_none() {
            check_start(&target, progress.first).map_err(&invalid)?;
        }
        Self::open(disk, dir, progress, target, copying, config)
    }

    /// Opens what came so far as a log that begins from what was flushed.
    fn open(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        progress: Progress,
        target: Checkpoint,
        copying: Option<Copying>,
        config: LogConfig,
    ) -> Result<Self, OpenError> {
        let incoming = incoming_dir(dir);
        let Progress { identity, first, flushed_to, .. } = progress;
        let mut found = FoundFiles::list(disk, &incoming)?;
        found.leave_cleaned();
        let begun = checkpoint_before(&target, first, flushed_to);
        // Nothing is appended to it but what is pulled, in large pieces; and no topic's clock applies to it.
        let config = LogConfig { zero_ahead_bytes: 0, segment_age: None, ..config };
        let (disk, answered) = (Arc::clone(disk), Answered::from(begun.applied));
        let log =
            Log::open_from(Arc::clone(&disk), &incoming, config, identity, found, begun, answered, Timestamp::NONE)?;
        Ok(Self { disk, dir: dir.to_owned(), incoming, first, target, log, copying })
    }

    /// Removes an install that is not whole; fine if there is none.
    pub fn abandon(disk: &Arc<dyn Disk>, dir: &Path) -> Result<(), StorageError> {
        let incoming = incoming_dir(dir);
        // First what it would go on from.
        let progress = incoming.join(PROGRESS_NAME);
        match disk.remove_file(&progress) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StorageError::io("remove", &progress)(error));
            }
            _ => {}
        }
        remove_dir(disk, &incoming)
    }

    /// Who the replica will be.
    pub fn identity(&self) -> &ReplicaIdentity {
        self.log.identity()
    }

    /// The checkpoint that it will begin from: entries up to its `applied` are wanted.
    pub fn target(&self) -> &Checkpoint {
        &self.target
    }

    /// The first entry that the log will hold.
    pub fn first_index(&self) -> RaftIndex {
        self.first.index
    }

    /// The entry that is wanted next; one past the target's when all are there.
    pub fn next_index(&self) -> RaftIndex {
        self.log.last_index().next()
    }

    /// Whether all entries are there: [`Self::finish`] it.
    pub fn has_all(&self) -> bool {
        self.next_index() > self.target.applied && self.wanted_offsets().is_none()
    }

    /// The offsets that are wanted next, up to and without the second; `None` where entries are, or all are there.
    pub fn wanted_offsets(&self) -> Option<(Offset, Offset)> {
        self.copying.as_ref()?.wanted()
    }

    /// How far what was copied by offset is cleaned: to be told to those who give the rest, see
    /// [`Log::goes_with`](crate::log::Log::goes_with).
    pub fn held_offsets(&self) -> Option<Cleanness> {
        self.copying.as_ref().map(Copying::held)
    }

    /// Writes batches of the offsets from [`Self::wanted_offsets`] on, of a log that is so clean. Fails as [`Self::append`]
    /// does.
    ///
    /// # Panics
    /// Where no offsets are wanted.
    pub fn append_offsets(&mut self, batches: Bytes, cleanness: Cleanness) -> Result<(), StorageError> {
        let needed_bytes = (batches.len() as u64).saturating_add(self.log.config().room_kept_on(&*self.disk));
        let available = self.disk.available_bytes(&self.incoming);
        let available_bytes = available.map_err(StorageError::io("ask for room in", &self.incoming))?;
        if available_bytes < needed_bytes {
            return Err(StorageError::DiskFull { path: self.incoming.clone(), needed_bytes, available_bytes });
        }
        let copying = self.copying.as_mut().filter(|copying| copying.wanted().is_some());
        copying.expect("offsets are wanted").append(batches, cleanness)
    }

    /// Bytes of the entries that are there.
    pub fn size_bytes(&self) -> u64 {
        self.log.size_bytes() + self.copying.as_ref().map_or(0, Copying::bytes)
    }

    /// Appends whole stored batches, of which the first is entry [`Self::next_index`]; not flushed yet.
    ///
    /// Fails with [`StorageError::Refused`], having written nothing, where they are not what belongs there (a wrong CRC,
    /// another offset or epoch than the checkpoint's history says, entries past it): ask another replica. With
    /// [`StorageError::DiskFull`] where there is no room for them now. After any other failure: drop this, and resume.
    pub fn append(&mut self, batches: Bytes) -> Result<(), StorageError> {
        let first = self.next_index();
        let bytes = batches.len();
        let entries = LogEntry::decode_range(batches.clone(), first)?;
        for entry in &entries {
            let refused = |detail| Err(StorageError::Refused { index: entry.index, detail });
            if entry.index > self.target.applied {
                return refused(format!("the checkpoint ends at {}", self.target.applied));
            }
            let epoch = epoch_at(&self.target.epochs, entry.index).map(|start| start.epoch.term());
            if epoch != Some(Some(entry.term)) {
                return refused(format!("its term is {}, the checkpoint has another there", entry.term));
            }
        }
        self.log.reserve(bytes)?;
        self.log.append_pulled(batches, Timestamp::NONE)?;
        // All of it is committed where it comes from: no need to keep it in memory.
        self.log.commit_to(self.log.last_index());
        Ok(())
    }

    /// Makes what came so far durable: a later life goes on behind it.
    pub fn flush(&mut self) -> Result<(), StorageError> {
        if let Some(copying) = &mut self.copying {
            copying.flush()?;
        }
        let flushed = self.log.flush()?;
        let flushed_to = Place { index: flushed.next(), offset: self.log.end_offset() };
        let progress =
            Progress { identity: *self.log.identity(), applied: self.target.applied, first: self.first, flushed_to };
        write_progress(&self.disk, &self.incoming, &progress)
    }

    /// Flushes all and lets it take the place of what `dir` held; durable when this returns. Any crash leaves the old
    /// replica and an install that goes on, or the new one.
    ///
    /// The old replica's log must be dropped, and no flush or checkpoint of it be under way: they would be written into
    /// the new one's folder.
    ///
    /// Fails with [`StorageError::NotInstallable`] where entries are missing, or do not end where the checkpoint says:
    /// then [`Self::abandon`] it, and begin again from another replica.
    pub fn finish(mut self) -> Result<(), StorageError> {
        let Checkpoint { applied, end_offset_at_applied, ref epochs, .. } = self.target;
        if !self.has_all() {
            return Err(not_installable(
                &self.dir,
                format!("entries from {} to {applied} are missing", self.next_index()),
            ));
        }
        let from_first = |epochs: &[EpochStart]| -> Vec<EpochStart> {
            epochs.iter().copied().filter(|start| start.index >= self.first.index).collect()
        };
        if self.log.end_offset() != end_offset_at_applied || from_first(self.log.epochs()) != from_first(epochs) {
            let detail =
                format!("the checkpoint ends at offset {end_offset_at_applied}, the log at {}", self.log.end_offset());
            return Err(not_installable(&self.dir, detail));
        }
        self.flush()?;
        let identity = *self.log.identity();
        // Its files are closed before their folder is renamed: a disk may close them and open them again by name.
        self.log.close()?;
        identity.write(&self.disk, &self.incoming)?;
        swap_in(&self.disk, &self.dir)?;
        Ok(())
    }
}

fn write_progress(disk: &Arc<dyn Disk>, incoming: &Path, progress: &Progress) -> Result<(), StorageError> {
    let path = incoming.join(PROGRESS_NAME);
    small_file::replace_file(disk, &path, &progress.encode()).map(|_| ()).map_err(StorageError::io("write", &path))
}

fn not_installable(dir: &Path, detail: String) -> StorageError {
    StorageError::NotInstallable { path: dir.to_owned(), detail }
}

/// The epoch of an entry.
fn epoch_at(epochs: &[EpochStart], index: RaftIndex) -> Option<&EpochStart> {
    epochs[..epochs.partition_point(|start| start.index <= index)].last()
}

/// Whether a log whose first entry is `first` can lead up to the checkpoint.
fn check_start(target: &Checkpoint, first: Place) -> Result<(), String> {
    let Checkpoint { applied, log_start, end_offset_at_applied, epochs, .. } = target;
    let Place { index, offset } = first;
    let begins_right = match index {
        index if index <= CREATION_INDEX => false,
        index if index == CREATION_INDEX.next() => offset == Offset::ZERO,
        // The epoch of the entry before it is needed.
        index => epoch_at(epochs, RaftIndex::new(index.get() - 1)).is_some(),
    };
    let ends_right = if index == applied.next() { offset == *end_offset_at_applied } else { index < applied.next() };
    if begins_right && ends_right && offset <= *log_start {
        Ok(())
    } else {
        Err(format!(
            "a log from entry {index}, offset {offset}, does not lead up to a checkpoint of entry {applied} with log start {log_start}"
        ))
    }
}

/// What a log holds that begins at `first` and is believed up to `flushed_to`, as a checkpoint to open it from.
fn checkpoint_before(target: &Checkpoint, first: Place, flushed_to: Place) -> Checkpoint {
    let applied = RaftIndex::new(flushed_to.index.get() - 1);
    let epochs: Vec<EpochStart> = target.epochs.iter().copied().filter(|start| start.index <= applied).collect();
    Checkpoint {
        applied,
        term: epochs.last().and_then(|start| start.epoch.term()).unwrap_or(CREATION_TERM),
        log_start: first.offset,
        end_offset_at_applied: flushed_to.offset,
        membership: Bytes::new(),
        machine: Bytes::new(),
        epochs,
    }
}
