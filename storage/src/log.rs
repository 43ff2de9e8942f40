//! The log of one replica: append, flush, commit, truncate, roll, checkpoint.
//!
//! ```text
//! offsets:  log_start <= high_watermark <= end_offset        what readers may see is [log_start, high_watermark)
//! indexes:  committed <= last_index,  flushed <= last_index  one entry of the group's Raft log = one batch
//!
//!  first_index                       committed                        last_index
//!  |------------------ read from files ---|------ served from memory -----|
//!  |------------------------------- flushed ----|-- written, not flushed --|
//! ```
//! One thread owns a log; what waits for the disk is handed out as jobs ([`FlushJob`], [`CheckpointJob`],
//! [`ReadTicket`](crate::ReadTicket)) to run elsewhere. Opening is in `open.rs`, reading in `lookup.rs`, retention in
//! `retention.rs`.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::batch::stamped_prefix;
use flowstone_protocol::control::{CONTROL_FORMAT_VERSION, encode_control};
use flowstone_protocol::{BatchHeader, ControlType, LeaderEpoch, Offset, RaftIndex, Term, Timestamp};

use crate::batch_index::{BLOCK_BYTES, BLOCK_SLOTS, Slot, blocks_of, encode_block};
use crate::checkpoint::{
    CREATION_INDEX, CREATION_TERM, Checkpoint, CheckpointDone, CheckpointJob, EpochStart, MANIFEST_NAME,
    ReplicaIdentity,
};
use crate::compaction::{CompactionConfig, LogCompaction};
use crate::disk::{Disk, DiskFile, OpenMode, is_disk_full};
use crate::error::StorageError;
use crate::install;
use crate::segment::{Active, IndexFile, Sealed, SegmentName};
use crate::slots::SealedFiles;
use crate::walk::{ZEROS, is_own_control};

/// How a log is kept; may change while it is open ([`Log::set_config`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// A segment is closed before a batch would take it past this; a larger batch gets one of its own. At most
    /// [`LogConfig::SEGMENT_BYTES_MAX`].
    pub segment_bytes: u64,
    /// A segment is closed when its first batch was appended longer ago than this.
    pub segment_age: Option<Duration>,
    /// Most zeros written ahead of small appends; fewer in a small segment, none ahead of large ones.
    pub zero_ahead_bytes: u64,
    /// Room on the disk that [`Log::reserve`] leaves for control batches, checkpoints and internal topics: as much for
    /// every 256 logs that are open on it ([`LogConfig::room_kept_on`]).
    pub room_kept_bytes: u64,
    /// A segment is closed when it has this many batches, so that its index stays small (32 bytes each).
    pub segment_batches_max: u32,
    /// Whether, and when, only the last record of each key is kept ([`Log::begin_compaction`]).
    pub compaction: Option<CompactionConfig>,
}

impl LogConfig {
    /// Positions in a segment are 32 bits wide, and one batch may lie across the end.
    pub const SEGMENT_BYTES_MAX: u64 = 1 << 31;

    /// The room that is kept on a disk with as many logs as are open there: what cures a full disk costs each of them some
    /// blocks (a control batch, a checkpoint beside the older ones), so that a reserve for one would not do for thousands.
    pub fn room_kept_on(&self, disk: &dyn Disk) -> u64 {
        let logs = disk.open_logs().load(Ordering::Relaxed) as u64;
        self.room_kept_bytes.saturating_mul(logs.div_ceil(LOGS_PER_ROOM_KEPT).max(1))
    }
}

/// Logs that share [`LogConfig::room_kept_bytes`]: 16 KiB each of the default 4 MiB.
const LOGS_PER_ROOM_KEPT: u64 = 256;

/// Counts a log among those that are open on its disk, until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenLog(Arc<AtomicUsize>);

impl OpenLog {
    pub(crate) fn on(disk: &dyn Disk) -> Self {
        let logs = Arc::clone(disk.open_logs());
        logs.fetch_add(1, Ordering::Relaxed);
        Self(logs)
    }
}

impl Drop for OpenLog {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            segment_bytes: 1 << 30,
            segment_age: None,
            zero_ahead_bytes: 1 << 20,
            room_kept_bytes: 4 << 20,
            segment_batches_max: 1 << 18,
            compaction: None,
        }
    }
}

/// The least that is written ahead: what a log that hardly grows costs.
const ZERO_AHEAD_BYTES_MIN: u64 = 16 << 10;
/// A flush group of this size or more grows the file: writing zeros first would write everything twice.
const LARGE_GROUP_BYTES: u64 = 128 << 10;
/// Room is asked of the disk in steps of at most this.
const ALLOCATE_BYTES_MAX: u64 = 8 << 20;
/// Relative offsets and record counts of a segment are 32 bits wide; a batch may take up to `i32::MAX` of either.
const SEGMENT_OFFSETS_MAX: u64 = 1 << 31;

/// Room for no more slots than these is given back by [`Log::shed`].
const SLOTS_SHED_MAX: usize = BLOCK_SLOTS;

/// What an entry carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryBody {
    /// One record batch of a client; its base offset and leader epoch are stamped by [`Log::append`].
    Batch(Bytes),
    /// The log's own.
    Control {
        /// Its type.
        ctype: ControlType,
        /// What the type says it is.
        payload: Bytes,
    },
}

/// A Raft entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Its index.
    pub index: RaftIndex,
    /// Its term.
    pub term: Term,
    /// What it carries.
    pub body: EntryBody,
}

impl LogEntry {
    /// Bytes of the batch, or of the payload.
    pub fn data_bytes(&self) -> usize {
        match &self.body {
            EntryBody::Batch(bytes) => bytes.len(),
            EntryBody::Control { payload, .. } => payload.len(),
        }
    }
}

/// Where an entry was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Its index.
    pub index: RaftIndex,
    /// Its term.
    pub term: Term,
    /// Offset of its first record.
    pub base_offset: Offset,
    /// Offset of its last record.
    pub last_offset: Offset,
    /// The header as stored.
    pub header: BatchHeader,
}

/// What the index alone knows of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryMeta {
    /// Its index.
    pub index: RaftIndex,
    /// Its term.
    pub term: Term,
    /// Offset of its first record.
    pub base_offset: Offset,
    /// Offset of its last record.
    pub last_offset: Offset,
    /// Bytes of the stored batch.
    pub batch_bytes: u32,
    /// The type, if it is a control batch of the log's own.
    pub control: Option<ControlType>,
}

/// A flush of all that was written when it was made; run it on a pool.
#[derive(Debug)]
pub struct FlushJob {
    disk: Arc<dyn Disk>,
    dir: Arc<Path>,
    files: Vec<(SegmentName, Arc<dyn DiskFile>)>,
    /// Whether a segment was made or removed since the last flush.
    sync_dir: bool,
    covers: RaftIndex,
}

impl FlushJob {
    /// The last entry that it makes durable.
    pub fn covers(&self) -> RaftIndex {
        self.covers
    }

    /// Flushes, older segments first, then the folder.
    pub fn run(&self) -> FlushDone {
        FlushDone { covers: self.covers, flushed: self.flush() }
    }

    fn flush(&self) -> Result<(), StorageError> {
        for (name, file) in &self.files {
            file.sync_data().map_err(StorageError::io("flush", &name.log_path(&self.dir)))?;
        }
        if self.sync_dir {
            self.disk.sync_dir(&self.dir).map_err(StorageError::io("flush", &self.dir))?;
        }
        Ok(())
    }
}

/// How a flush ended; give it to [`Log::flush_done`].
#[derive(Debug)]
pub struct FlushDone {
    covers: RaftIndex,
    flushed: Result<(), StorageError>,
}

impl FlushDone {
    /// Whether it failed.
    pub fn is_err(&self) -> bool {
        self.flushed.is_err()
    }
}

/// A block of a sealed segment's index: the segment's first index, the block's number, its slots.
pub(crate) type IndexBlock = ((RaftIndex, u32), Box<[Slot]>);

/// An entry that is not known to be committed.
#[derive(Debug)]
pub(crate) struct TailEntry {
    pub(crate) term: Term,
    /// The offset after its last record.
    pub(crate) end_offset: Offset,
    pub(crate) body: EntryBody,
}

/// The log of one replica.
#[derive(Debug)]
pub struct Log {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) dir: Arc<Path>,
    pub(crate) identity: ReplicaIdentity,
    pub(crate) config: LogConfig,
    /// The newest durable one.
    pub(crate) checkpoint: Checkpoint,
    /// The one before it, whose file is kept for the case that the newest one's rots; it knows the same members, and the
    /// log holds all entries behind it.
    pub(crate) spare_checkpoint: Option<RaftIndex>,
    /// Oldest first; the last is the one before `active`.
    pub(crate) sealed: VecDeque<Sealed>,
    /// What is known of those of them that were cleaned: the first ones.
    pub(crate) compaction: LogCompaction,
    pub(crate) active: Active,
    /// Every epoch of the log, oldest first, from that of the entry before `first_index` on.
    pub(crate) epochs: Vec<EpochStart>,
    pub(crate) log_start: Offset,
    pub(crate) high_watermark: Offset,
    pub(crate) committed: RaftIndex,
    pub(crate) flushed: RaftIndex,
    pub(crate) end_offset: Offset,
    /// The entries above `committed` that were appended since the log was opened, up to the last. Their bytes are
    /// served from here: the files may yet be cut.
    pub(crate) tail: VecDeque<TailEntry>,
    /// The index of the tail's first entry; one past the last entry when the tail is empty.
    pub(crate) tail_first: RaftIndex,
    /// Blocks of sealed segments' indexes that were used last, by (first index of the segment, block number).
    pub(crate) index_blocks: VecDeque<IndexBlock>,
    /// Sealed segments with bytes that no flush job has covered.
    pub(crate) unflushed_sealed: Vec<(SegmentName, Arc<dyn DiskFile>)>,
    /// Bytes of the active segment that no flush job has covered.
    pub(crate) unflushed_bytes: u64,
    /// Whether segments were made since the last flush job.
    pub(crate) dir_changed: bool,
    pub(crate) flush_in_flight: bool,
    /// Where the log was cut last since the flush in flight was handed out: that flush says nothing of what came after.
    pub(crate) cut_during_flush: Option<RaftIndex>,
    /// Bytes promised by `reserve` and not appended yet.
    pub(crate) reserved_bytes: u64,
    /// Whether the last attempt to begin a new segment failed; it is told once.
    pub(crate) is_roll_overdue: bool,
    /// The first failed write or flush.
    pub(crate) poison: Option<String>,
    pub(crate) _counted: OpenLog,
}

/// An entry, stamped, ready to be written.
struct Stamped {
    prefix: [u8; 16],
    /// The whole batch; its first 16 bytes are not written, `prefix` is.
    batch: Bytes,
    header: BatchHeader,
    control: Option<i16>,
    begins_epoch: bool,
    tail: TailEntry,
}

impl Log {
    /// Makes the folder of a new replica: the first checkpoint, an empty segment, and last the manifest. Durable when
    /// this returns; a folder without a manifest was not wholly created, and is created anew.
    ///
    /// Fails with [`StorageError::Io`] of kind `AlreadyExists` where there is a replica.
    pub fn create(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        identity: ReplicaIdentity,
        membership: Bytes,
    ) -> Result<(), StorageError> {
        if Self::exists(disk, dir).map_err(StorageError::io("open", dir))? {
            let source = io::Error::new(io::ErrorKind::AlreadyExists, "there is a replica");
            return Err(StorageError::Io { action: "create", path: dir.to_owned(), source });
        }
        disk.create_dir_all(dir).map_err(StorageError::io("create", dir))?;
        for name in disk.read_dir(dir).map_err(StorageError::io("read", dir))? {
            let path = dir.join(name);
            disk.remove_file(&path).map_err(StorageError::io("remove", &path))?;
        }
        let checkpoint = Checkpoint::creation(membership);
        let path = dir.join(Checkpoint::file_name(checkpoint.applied));
        let write_first = || {
            let file = disk.open(&path, OpenMode::CreateNew)?;
            file.write_at(&checkpoint.encode(), 0)?;
            file.sync_data()
        };
        write_first().map_err(StorageError::io("write", &path))?;
        let segment = SegmentName::of_raft(Offset::ZERO, CREATION_INDEX.next());
        let path = segment.log_path(dir);
        disk.open(&path, OpenMode::CreateNew).map_err(StorageError::io("create", &path))?;
        // The folder's own name, and its topic's, before the manifest: a replica that has one is not lost with a folder
        // above it, also where this is killed before it returns.
        for parent in dir.ancestors().skip(1).take(2).filter(|parent| !parent.as_os_str().is_empty()) {
            disk.sync_dir(parent).map_err(StorageError::io("flush", parent))?;
        }
        // The checkpoint's name, too: of two names that are flushed together one may be there alone after a power failure, and
        // a replica that has a manifest and no checkpoint is lost.
        disk.sync_dir(dir).map_err(StorageError::io("flush", dir))?;
        identity.write(disk, dir)
    }

    /// Whether `dir` holds a replica that was wholly created, or a wholly installed one is about to take it.
    pub fn exists(disk: &Arc<dyn Disk>, dir: &Path) -> io::Result<bool> {
        Ok(disk.exists(&dir.join(MANIFEST_NAME))? || install::is_whole(disk, dir)?)
    }

    /// Ends cleanly: flushes all, cuts the zeros, completes the index file. Returns the last index, which is flushed;
    /// a hard state that says so spares the next opening its work.
    pub fn close(mut self) -> Result<RaftIndex, StorageError> {
        self.check_writable()?;
        let path = self.active.name.log_path(&self.dir);
        let is_long = self.active.zeroed_to > self.active.end || self.active.allocated_to > self.active.end;
        if is_long {
            self.active.log.set_len(self.active.end).map_err(StorageError::io("cut", &path))?;
        }
        self.write_index_blocks(true);
        if is_long || self.unflushed_bytes > 0 || self.flush_in_flight {
            self.active.log.sync_data().map_err(StorageError::io("flush", &path))?;
        }
        for (name, file) in &self.unflushed_sealed {
            file.sync_data().map_err(StorageError::io("flush", &name.log_path(&self.dir)))?;
        }
        if self.dir_changed || self.flush_in_flight {
            self.disk.sync_dir(&self.dir).map_err(StorageError::io("flush", &self.dir))?;
        }
        Ok(self.last_index())
    }

    /// Who this replica is.
    pub fn identity(&self) -> &ReplicaIdentity {
        &self.identity
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How it is kept.
    pub fn config(&self) -> &LogConfig {
        &self.config
    }

    /// Changes how it is kept, from the next append on.
    pub fn set_config(&mut self, config: LogConfig) {
        self.config = config;
    }

    /// First offset that readers may see.
    pub fn log_start(&self) -> Offset {
        self.log_start
    }

    /// One past the last committed offset.
    pub fn high_watermark(&self) -> Offset {
        self.high_watermark
    }

    /// One past the last offset written.
    pub fn end_offset(&self) -> Offset {
        self.end_offset
    }

    /// First entry held; one more than the last when there is none. Cleaned segments lie below it: they hold no entries.
    pub fn first_index(&self) -> RaftIndex {
        self.first_raft_segment().first_index
    }

    /// The first segment that holds entries.
    pub(crate) fn first_raft_segment(&self) -> SegmentName {
        self.sealed.get(self.compaction.cleaned_segments).map_or(self.active.name, |segment| segment.name)
    }

    /// The oldest segment, which offsets and epochs are known from.
    pub(crate) fn oldest_segment(&self) -> SegmentName {
        self.sealed.front().map_or(self.active.name, |segment| segment.name)
    }

    /// Last entry written.
    pub fn last_index(&self) -> RaftIndex {
        RaftIndex::new(self.active.end_index().get() - 1)
    }

    /// Last entry known to be committed.
    pub fn committed_index(&self) -> RaftIndex {
        self.committed
    }

    /// Last entry known to be durable.
    pub fn flushed_index(&self) -> RaftIndex {
        self.flushed
    }

    /// The term of an entry; known from the one before `first_index` to the last.
    pub fn term_at(&self, index: RaftIndex) -> Option<Term> {
        if index.next() < self.first_index() || index > self.last_index() {
            return None;
        }
        if index == CREATION_INDEX {
            return Some(CREATION_TERM);
        }
        let after = self.epochs.partition_point(|start| start.index <= index);
        self.epochs.get(after.checked_sub(1)?)?.epoch.term()
    }

    /// The term of the last entry.
    pub fn last_term(&self) -> Term {
        self.epochs.last().and_then(|start| start.epoch.term()).unwrap_or(CREATION_TERM)
    }

    /// The leaders' epochs and where they begin, oldest first.
    pub fn epochs(&self) -> &[EpochStart] {
        &self.epochs
    }

    /// One past the last offset of the newest epoch that is not above `epoch`; `None` where the log knows none, or
    /// `epoch` is above its newest.
    pub fn epoch_end(&self, epoch: LeaderEpoch) -> Option<Offset> {
        let after = self.epochs.partition_point(|start| start.epoch <= epoch);
        match (after, self.epochs.get(after)) {
            (0, _) => None,
            (_, Some(next)) => Some(next.offset),
            (_, None) if self.epochs.last().is_some_and(|last| last.epoch == epoch) => Some(self.end_offset),
            (_, None) => None,
        }
    }

    /// Bytes of all batches in the files.
    pub fn size_bytes(&self) -> u64 {
        self.sealed.iter().map(|segment| segment.bytes).sum::<u64>() + self.active.end
    }

    /// Bytes of those of them that are entries.
    pub fn raft_bytes(&self) -> u64 {
        self.sealed.iter().skip(self.compaction.cleaned_segments).map(|segment| segment.bytes).sum::<u64>()
            + self.active.end
    }

    /// Why nothing more is written, if so.
    pub fn poisoned(&self) -> Option<&str> {
        self.poison.as_deref()
    }

    /// Whether nothing more is written.
    pub fn is_poisoned(&self) -> bool {
        self.poison.is_some()
    }

    fn check_writable(&self) -> Result<(), StorageError> {
        match &self.poison {
            None => Ok(()),
            Some(reason) => Err(StorageError::Poisoned { path: self.dir.to_path_buf(), reason: reason.clone() }),
        }
    }

    /// Notes the first failure: what the files hold is unknown from here on.
    fn poisoned_by(&mut self, error: StorageError) -> StorageError {
        if self.poison.is_none() {
            tracing::error!(dir = %self.dir.display(), %error, "the log takes no more writes");
            self.poison = Some(error.to_string());
        }
        error
    }

    /// The boundaries' order, after every change.
    fn assert_boundaries(&self) {
        assert!(
            self.log_start <= self.high_watermark
                && self.high_watermark <= self.end_offset
                && self.committed <= self.last_index()
                && self.flushed <= self.last_index(),
            "boundaries out of order in {}: log start {}, high watermark {}, end {}; committed {}, flushed {}, last {}",
            self.dir.display(),
            self.log_start,
            self.high_watermark,
            self.end_offset,
            self.committed,
            self.flushed,
            self.last_index(),
        );
    }

    // ---- room ----

    /// Makes sure that `bytes` more can be appended; what was reserved since the last append adds up.
    ///
    /// Fails with [`StorageError::DiskFull`], which poisons nothing, when that would leave less on the
    /// disk than [`LogConfig::room_kept_on`] says; so a full disk is known before anything is proposed.
    pub fn reserve(&mut self, bytes: usize) -> Result<(), StorageError> {
        self.reserve_leaving(bytes, self.config.room_kept_on(&*self.disk))
    }

    /// The same, with the room that is kept for what cures a full disk: control batches and internal topics.
    pub fn reserve_privileged(&mut self, bytes: usize) -> Result<(), StorageError> {
        self.reserve_leaving(bytes, 0)
    }

    fn reserve_leaving(&mut self, bytes: usize, room_kept: u64) -> Result<(), StorageError> {
        self.check_writable()?;
        let reserved = self.reserved_bytes + bytes as u64;
        let too_long = self.active.end + reserved > self.segment_bytes()
            || self.active.slots.len() >= self.config.segment_batches_max as usize
            || self.end_offset.get() - self.active.name.base_offset.get() >= SEGMENT_OFFSETS_MAX as i64;
        if !self.active.slots.is_empty() && too_long {
            // Now, where a failure hurts nobody, rather than in the append.
            self.roll(0).map_err(|error| self.as_disk_full(error, reserved))?;
        }
        let need_to = self.active.end + reserved;
        if need_to > self.active.allocated_to {
            self.take_room(need_to, room_kept)?;
        }
        self.reserved_bytes = reserved;
        Ok(())
    }

    fn take_room(&mut self, need_to: u64, room_kept: u64) -> Result<(), StorageError> {
        let path = self.active.name.log_path(&self.dir);
        let needed = need_to - self.active.end;
        let full = |available| StorageError::DiskFull {
            path: self.dir.to_path_buf(),
            needed_bytes: needed + room_kept,
            available_bytes: available,
        };
        let available = self.disk.available_bytes(&self.dir).map_err(StorageError::io("ask for room in", &self.dir))?;
        // What was allocated before is no longer counted as available.
        let new = need_to - self.active.allocated_to.max(self.active.end);
        if available < new.saturating_add(room_kept) {
            return Err(full(available));
        }
        // More than needed, so that this is rare; as much as the segment holds already, so that a small log stays small.
        let spare = need_to.clamp(ZERO_AHEAD_BYTES_MIN, ALLOCATE_BYTES_MAX);
        let from = self.active.allocated_to.max(self.active.zeroed_to);
        // The spare part is a favour, and leaves alone what is kept.
        let generous = (need_to + spare)
            .min(self.segment_bytes())
            .min(from.saturating_add(available - room_kept.min(available)))
            .max(need_to);
        for target in [generous, need_to] {
            if target <= from {
                self.active.allocated_to = from;
                return Ok(());
            }
            match self.active.log.allocate(from, target - from) {
                Ok(true) => {
                    self.active.allocated_to = target;
                    return Ok(());
                }
                // Nothing can be promised here; the check above has to do.
                Ok(false) => return Ok(()),
                Err(error) if is_disk_full(&error) => {}
                Err(error) => return Err(StorageError::io("take room in", &path)(error)),
            }
        }
        Err(full(available))
    }

    fn as_disk_full(&self, error: StorageError, needed_bytes: u64) -> StorageError {
        if !error.is_disk_full() {
            return error;
        }
        let available_bytes = self.disk.available_bytes(&self.dir).unwrap_or(0);
        StorageError::DiskFull { path: self.dir.to_path_buf(), needed_bytes, available_bytes }
    }

    fn segment_bytes(&self) -> u64 {
        self.config.segment_bytes.min(LogConfig::SEGMENT_BYTES_MAX)
    }

    // ---- append ----

    /// Writes entries behind the last one, without flushing: offsets and epochs are stamped here. `now` only decides
    /// when a segment is old.
    ///
    /// Fails with [`StorageError::Refused`] before anything is written where an entry cannot be part of this log: a
    /// batch that is not exactly one batch, a term below the last one or above `i32::MAX`, a term that does not begin
    /// with a no-op. Any other failure poisons the log.
    ///
    /// # Panics
    /// If the entries do not follow the last one: cut with [`Self::truncate_from`] first.
    pub fn append(&mut self, entries: &[LogEntry], now: Timestamp) -> Result<Vec<Appended>, StorageError> {
        self.append_entries(entries, now, false)
    }

    /// The same for batches that another replica stamped: they must carry the offsets and epochs that they get here.
    pub fn append_stamped(&mut self, entries: &[LogEntry], now: Timestamp) -> Result<Vec<Appended>, StorageError> {
        self.append_entries(entries, now, true)
    }

    fn append_entries(
        &mut self,
        entries: &[LogEntry],
        now: Timestamp,
        must_agree: bool,
    ) -> Result<Vec<Appended>, StorageError> {
        self.check_writable()?;
        let mut stamped = Vec::with_capacity(entries.len());
        let mut appended = Vec::with_capacity(entries.len());
        let (mut index, mut term, mut offset) = (self.last_index(), self.last_term(), self.end_offset);
        for entry in entries {
            index = index.next();
            assert_eq!(entry.index, index, "an entry in the wrong place in {}", self.dir.display());
            let next = stamp(entry, term, offset, must_agree)?;
            appended.push(Appended {
                index,
                term: entry.term,
                base_offset: offset,
                last_offset: next.header.last_offset(),
                header: next.header,
            });
            term = entry.term;
            offset = next.tail.end_offset;
            stamped.push(next);
        }
        let written = self.write_stamped(stamped, now);
        self.reserved_bytes = 0;
        written.map_err(|error| self.poisoned_by(error))?;
        self.assert_boundaries();
        Ok(appended)
    }

    /// Writes in runs, each one `pwritev` into one segment.
    fn write_stamped(&mut self, stamped: Vec<Stamped>, now: Timestamp) -> Result<(), StorageError> {
        let mut bytes_left: u64 = stamped.iter().map(|next| next.batch.len() as u64).sum();
        if !stamped.is_empty() && self.is_old(now) {
            self.roll_unless_it_fails(bytes_left)?;
        }
        let mut run = Vec::with_capacity(stamped.len());
        let mut run_bytes = 0;
        for next in stamped {
            let bytes = next.batch.len() as u64;
            let slots = self.active.slots.len() + run.len();
            let offsets = next.header.base_offset.get() - self.active.name.base_offset.get();
            let full = self.active.end + run_bytes + bytes > self.segment_bytes()
                || slots >= self.config.segment_batches_max as usize
                || offsets as u64 >= SEGMENT_OFFSETS_MAX;
            if full && slots > 0 {
                self.write_run(std::mem::take(&mut run), run_bytes, now)?;
                run_bytes = 0;
                if self.active.end + bytes > LogConfig::SEGMENT_BYTES_MAX || offsets as u64 >= SEGMENT_OFFSETS_MAX {
                    self.roll(bytes_left)?;
                } else {
                    self.roll_unless_it_fails(bytes_left)?;
                }
            }
            bytes_left -= bytes;
            run_bytes += bytes;
            run.push(next);
        }
        self.write_run(run, run_bytes, now)
    }

    fn write_run(&mut self, run: Vec<Stamped>, run_bytes: u64, now: Timestamp) -> Result<(), StorageError> {
        if run.is_empty() {
            return Ok(());
        }
        let position = self.active.end;
        let end = position + run_bytes;
        let zeroed_to = self.zeros_wanted(end, run_bytes);
        let mut parts = Vec::with_capacity(run.len() * 2 + 16);
        for next in &run {
            parts.push(IoSlice::new(&next.prefix));
            parts.push(IoSlice::new(&next.batch[next.prefix.len()..]));
        }
        let mut zeros = zeroed_to.saturating_sub(end) as usize;
        while zeros > 0 {
            let part = zeros.min(ZEROS.len());
            parts.push(IoSlice::new(&ZEROS[..part]));
            zeros -= part;
        }
        let written = self.active.log.write_vectored_at(&parts, position);
        written.map_err(StorageError::io("write", &self.active.name.log_path(&self.dir)))?;

        self.active.zeroed_to = self.active.zeroed_to.max(zeroed_to).max(end);
        self.unflushed_bytes += run_bytes;
        self.active.born.get_or_insert(now);
        for next in run {
            let slot = Slot::of(
                &next.header,
                next.control,
                u32::try_from(self.active.end).expect("segments are far below 4 GiB"),
                self.active.name.base_offset,
                self.active.slots.last(),
            );
            if next.begins_epoch {
                self.epochs.push(EpochStart {
                    epoch: next.header.leader_epoch,
                    index: self.active.end_index(),
                    offset: next.header.base_offset,
                });
            }
            self.active.end = slot.end_position();
            self.active.slots.push(slot);
            self.end_offset = next.tail.end_offset;
            self.tail.push_back(next.tail);
        }
        assert_eq!(self.active.end, end, "bytes written and indexed in {}", self.dir.display());
        if self.active.slots.len() / BLOCK_SLOTS > self.index_blocks_written() {
            self.write_index_blocks(false);
        }
        Ok(())
    }

    /// Up to where the file should be zeros once a run that ends at `end` is written; `end` or less for no zeros.
    fn zeros_wanted(&mut self, end: u64, run_bytes: u64) -> u64 {
        let is_large = self.unflushed_bytes + run_bytes >= LARGE_GROUP_BYTES;
        if end <= self.active.zeroed_to || is_large || self.config.zero_ahead_bytes == 0 {
            return end;
        }
        let most = self.config.zero_ahead_bytes;
        let ahead = end.clamp(ZERO_AHEAD_BYTES_MIN.min(most), most);
        let wanted = (end + ahead).next_multiple_of(BLOCK_BYTES as u64).min(self.segment_bytes().max(end));
        // Zeros are a favour: where there is no room for them, they are not worth a failed write.
        if wanted > self.active.allocated_to && self.take_room(wanted, self.config.room_kept_on(&*self.disk)).is_err() {
            return end;
        }
        wanted
    }

    /// Gives back the memory that only a log which is written to needs: for one that will not be for a while. What is large
    /// stays as it is, as it would be copied with the next write.
    pub fn shed(&mut self) {
        self.tail.shrink_to_fit();
        self.epochs.shrink_to_fit();
        if self.active.slots.capacity() <= SLOTS_SHED_MAX {
            self.active.slots.shrink_to_fit();
        }
    }

    fn is_old(&mut self, now: Timestamp) -> bool {
        let Some(born) = &mut self.active.born else { return false };
        // A clock that was ahead and is right again would keep the segment open for as long as it was ahead.
        *born = (*born).min(now);
        let born = *born;
        self.config.segment_age.is_some_and(|age| !self.active.slots.is_empty() && born.after(age) <= now)
    }

    // ---- segments ----

    /// Closes the active segment if it is older than [`LogConfig::segment_age`], so that retention can come to it
    /// although nothing is appended. Returns whether it did; where it could not (a full disk), it is tried again the
    /// next time.
    pub fn roll_if_due(&mut self, now: Timestamp) -> Result<bool, StorageError> {
        self.check_writable()?;
        if !self.is_old(now) {
            return Ok(false);
        }
        self.roll_unless_it_fails(0)
    }

    /// Closes the active segment if it has any batches, whatever its size: so that what is rotten in it can be repaired.
    /// Whether it did; where it could not (a full disk), it can be tried again.
    pub fn seal(&mut self) -> Result<bool, StorageError> {
        self.check_writable()?;
        if self.active.slots.is_empty() {
            return Ok(false);
        }
        self.roll_unless_it_fails(0)
    }

    /// Rolls where the old segment can be used on as well; whether it did. Fails only where a failure poisoned the log.
    fn roll_unless_it_fails(&mut self, bytes: u64) -> Result<bool, StorageError> {
        let Err(error) = self.roll(bytes) else {
            self.is_roll_overdue = false;
            return Ok(true);
        };
        if self.is_poisoned() {
            return Err(error);
        }
        if !std::mem::replace(&mut self.is_roll_overdue, true) {
            let segment = self.active.name.log_path(&self.dir);
            tracing::warn!(path = %segment.display(), %error, "cannot begin a new segment: the old one grows on");
        }
        Ok(false)
    }

    /// Begins a new segment behind the active one, and moves the room for `bytes` over, which may have been reserved in
    /// the old one. A failure leaves the log as it was, or poisons it where a file may be left that says otherwise.
    fn roll(&mut self, bytes: u64) -> Result<(), StorageError> {
        if self.active.zeroed_to > self.active.end || self.active.allocated_to > self.active.end {
            let path = self.active.name.log_path(&self.dir);
            self.active.log.set_len(self.active.end).map_err(StorageError::io("cut", &path))?;
            self.active.zeroed_to = self.active.end;
            self.active.allocated_to = self.active.end;
        }
        // The last step that may fail: a new segment's file says that nothing more was appended to the one before.
        let name = SegmentName::of_raft(self.end_offset, self.active.end_index());
        let mut next = self.create_segment(name)?;
        // Before the index takes some of it. Where the disk cannot promise, writing will show.
        if matches!(next.log.allocate(0, bytes), Ok(true)) {
            next.allocated_to = bytes;
        }
        self.write_index_blocks(true);
        let closed = std::mem::replace(&mut self.active, next);
        self.dir_changed = true;
        self.unflushed_bytes = 0;
        // Also where all was flushed: the cut is not, and the file that remains must not look longer than it is.
        self.unflushed_sealed.push((closed.name, Arc::clone(&closed.log)));
        if let Some(previous) = self.sealed.back_mut() {
            previous.map = None;
        }
        let files = self.sealed_files(closed.name, closed.end, closed.slots.len(), Some(Arc::clone(&closed.log)));
        self.sealed.push_back(Sealed {
            name: closed.name,
            end_offset: self.end_offset,
            end_index: closed.end_index(),
            bytes: closed.end,
            batches: closed.slots.len(),
            records: closed.records(),
            max_timestamp: closed.max_timestamp(),
            files,
            map: closed.map,
        });
        Ok(())
    }

    pub(crate) fn sealed_files(
        &self,
        name: SegmentName,
        bytes: u64,
        batches: usize,
        log: Option<Arc<dyn DiskFile>>,
    ) -> Arc<SealedFiles> {
        let epoch_before = self.epoch_before(name);
        let (disk, dir) = (Arc::clone(&self.disk), Arc::clone(&self.dir));
        Arc::new(SealedFiles::new(disk, dir, name, bytes, batches, epoch_before, log))
    }

    /// The epoch of the entry before a segment, if it is known.
    pub(crate) fn epoch_before(&self, name: SegmentName) -> Option<LeaderEpoch> {
        if name.first_index == CREATION_INDEX.next() {
            return LeaderEpoch::from_term(CREATION_TERM);
        }
        let after = self.epochs.partition_point(|start| start.index < name.first_index);
        Some(self.epochs.get(after.checked_sub(1)?)?.epoch)
    }

    /// An empty segment. A file of this name is what a failed attempt left: no entry of this log is in it.
    fn create_segment(&mut self, name: SegmentName) -> Result<Active, StorageError> {
        let path = name.log_path(&self.dir);
        self.remove_segment_files(name)?;
        let log = match self.disk.open(&path, OpenMode::CreateNew) {
            Ok(log) => log,
            Err(error) => {
                // Whether it was made or not, it must not be found next to batches of its own in the active segment:
                // not now, and not after a power failure that kept its making and lost its removal.
                self.dir_changed = true;
                self.remove_segment_files(name).map_err(|error| self.poisoned_by(error))?;
                return Err(StorageError::io("create", &path)(error));
            }
        };
        Ok(Active {
            name,
            log,
            index_file: IndexFile::None,
            slots: Vec::new(),
            end: 0,
            zeroed_to: 0,
            allocated_to: 0,
            born: None,
            map: None,
        })
    }

    fn index_blocks_written(&self) -> usize {
        match &self.active.index_file {
            IndexFile::None => 0,
            IndexFile::Written { blocks } => *blocks,
            IndexFile::Off => usize::MAX,
        }
    }

    /// Writes the active segment's full index blocks that are not in its file yet; with `all`, the last one too. A
    /// failure costs the next opening a rebuild, no more.
    pub(crate) fn write_index_blocks(&mut self, all: bool) {
        let written = self.index_blocks_written();
        let slots = &self.active.slots;
        let want = if all { blocks_of(slots.len()) } else { slots.len() / BLOCK_SLOTS };
        if written >= want {
            return;
        }
        let path = self.active.name.index_path(&self.dir);
        let write = || {
            let mode = match self.active.index_file {
                IndexFile::Written { .. } => OpenMode::ReadWrite,
                IndexFile::None | IndexFile::Off => OpenMode::CreateNew,
            };
            write_blocks(&*self.disk.open(&path, mode)?, self.active.name, slots, written..want)
        };
        self.active.index_file = match write() {
            // A block that is not full is written again when it is.
            Ok(()) => IndexFile::Written { blocks: want.min(slots.len() / BLOCK_SLOTS) },
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot write an index: it will be rebuilt when opened");
                IndexFile::Off
            }
        };
    }

    /// Cuts entry `from` and all above it; flushed when this returns, so that what is appended next cannot be mixed
    /// with what was cut. Any failure poisons the log.
    ///
    /// The caller has made a hard state durable that says `flushed < from`: else a crash in here would look like lost
    /// entries to the next opening.
    ///
    /// # Panics
    /// If `from` is committed, or not in the log.
    ///
    /// ```text
    /// before: | segment A | segment B        | segment C (active) |
    ///                          ^ from
    /// after:  | segment A | B  | (active again, the rest cut, C removed)
    /// ```
    pub fn truncate_from(&mut self, from: RaftIndex) -> Result<(), StorageError> {
        self.check_writable()?;
        if from == self.active.end_index() {
            return Ok(());
        }
        assert!(
            from > self.committed && from >= self.first_index() && from <= self.last_index(),
            "cannot cut from {from}: committed {}, first {}, last {}",
            self.committed,
            self.first_index(),
            self.last_index(),
        );
        self.cut_from(from).map_err(|error| self.poisoned_by(error))?;
        self.assert_boundaries();
        Ok(())
    }

    fn cut_from(&mut self, from: RaftIndex) -> Result<(), StorageError> {
        let mut removed = false;
        while self.active.name.first_index > from {
            // The segment before becomes the active one again.
            let slots = self.all_slots_of_newest_sealed()?;
            let Some(before) = self.sealed.pop_back() else { break };
            before.files.retire();
            // The handle that readers use is for reading alone; the one that wrote what is not flushed sees its errors.
            let written = self.unflushed_sealed.iter().find(|(name, _)| *name == before.name);
            let log = match written {
                Some((_, log)) => Arc::clone(log),
                None => {
                    let path = before.name.log_path(&self.dir);
                    self.disk.open(&path, OpenMode::ReadWrite).map_err(StorageError::io("open", &path))?
                }
            };
            let reopened = Active {
                name: before.name,
                log,
                // Opened for writing below, once it is known how much of it stays.
                index_file: IndexFile::Off,
                end: before.bytes,
                zeroed_to: before.bytes,
                allocated_to: before.bytes,
                born: None,
                slots,
                map: before.map,
            };
            let gone = std::mem::replace(&mut self.active, reopened);
            self.unflushed_sealed.retain(|(name, _)| *name != before.name);
            self.remove_segment_files(gone.name)?;
            removed = true;
        }
        let keep = (from.get() - self.active.name.first_index.get()) as usize;
        let cut = self.active.slots[keep];
        let path = self.active.name.log_path(&self.dir);
        let end = u64::from(cut.position);
        self.active.log.set_len(end).map_err(StorageError::io("cut", &path))?;
        self.active.log.sync_data().map_err(StorageError::io("flush", &path))?;
        for (name, file) in std::mem::take(&mut self.unflushed_sealed) {
            // They are older than what stays here, and so is their cut.
            file.sync_data().map_err(StorageError::io("flush", &name.log_path(&self.dir)))?;
        }
        self.cut_index(keep)?;
        if removed || self.dir_changed {
            self.disk.sync_dir(&self.dir).map_err(StorageError::io("flush", &self.dir))?;
            self.dir_changed = false;
        }
        self.end_offset = cut.base_offset(self.active.name.base_offset);
        self.active.slots.truncate(keep);
        self.active.end = end;
        self.active.zeroed_to = end;
        self.active.allocated_to = end;
        self.active.map = None;
        self.unflushed_bytes = 0;
        self.reserved_bytes = 0;
        self.index_blocks.clear();
        while self.epochs.last().is_some_and(|start| start.index >= from) {
            self.epochs.pop();
        }
        self.tail.truncate(from.get().saturating_sub(self.tail_first.get()) as usize);
        self.tail_first = self.tail_first.min(from);
        let before = RaftIndex::new(from.get() - 1);
        if self.flush_in_flight {
            // Older bytes may be in that flush's hands alone.
            self.flushed = self.flushed.min(before);
            self.cut_during_flush = Some(from);
        } else {
            self.flushed = before;
        }
        Ok(())
    }

    /// Cuts the active segment's index file to the full blocks of its first `keep` slots, flushed: a block that was
    /// written before the cut must not be believed after it.
    fn cut_index(&mut self, keep: usize) -> Result<(), StorageError> {
        let path = self.active.name.index_path(&self.dir);
        self.active.index_file = match self.disk.open(&path, OpenMode::ReadWrite) {
            Ok(file) => {
                let blocks = keep / BLOCK_SLOTS;
                let cut = || {
                    let len = file.len()?;
                    let kept = (blocks * BLOCK_BYTES) as u64;
                    if len > kept {
                        file.set_len(kept)?;
                        file.sync_data()?;
                    }
                    Ok(len.min(kept) as usize / BLOCK_BYTES)
                };
                let blocks = cut().map_err(StorageError::io("cut", &path))?;
                IndexFile::Written { blocks }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => IndexFile::None,
            Err(error) => return Err(StorageError::io("open", &path)(error)),
        };
        Ok(())
    }

    pub(crate) fn remove_segment_files(&self, name: SegmentName) -> Result<(), StorageError> {
        for path in [name.log_path(&self.dir), name.index_path(&self.dir)] {
            match self.disk.remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StorageError::io("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    // ---- flush ----

    /// A flush of all that is written now; `None` when all of it is durable, or a flush is in flight (what is written
    /// meanwhile is the next group).
    pub fn flush_job(&mut self) -> Option<FlushJob> {
        let is_due = self.unflushed_bytes > 0 || !self.unflushed_sealed.is_empty() || self.dir_changed;
        if !is_due || self.flush_in_flight || self.is_poisoned() {
            return None;
        }
        let mut files = std::mem::take(&mut self.unflushed_sealed);
        if self.unflushed_bytes > 0 {
            files.push((self.active.name, Arc::clone(&self.active.log)));
        }
        self.unflushed_bytes = 0;
        self.flush_in_flight = true;
        self.cut_during_flush = None;
        Some(FlushJob {
            disk: Arc::clone(&self.disk),
            dir: Arc::clone(&self.dir),
            files,
            sync_dir: std::mem::take(&mut self.dir_changed),
            covers: self.last_index(),
        })
    }

    /// Takes note of a flush that ended; returns the flushed index. A flush that failed poisons the log.
    pub fn flush_done(&mut self, done: FlushDone) -> Result<RaftIndex, StorageError> {
        assert!(self.flush_in_flight, "a flush ended in {} that never began", self.dir.display());
        self.flush_in_flight = false;
        done.flushed.map_err(|error| self.poisoned_by(error))?;
        self.check_writable()?;
        // What was cut and appended again since then was not flushed by it; what was below the cut was flushed then.
        let covers = match self.cut_during_flush.take() {
            Some(cut) => RaftIndex::new(cut.get() - 1),
            None => done.covers,
        };
        self.flushed = self.flushed.max(covers);
        self.assert_boundaries();
        Ok(self.flushed)
    }

    /// Flushes here and now; no flush may be in flight.
    pub fn flush(&mut self) -> Result<RaftIndex, StorageError> {
        self.check_writable()?;
        match self.flush_job() {
            Some(job) => self.flush_done(job.run()),
            None => Ok(self.flushed),
        }
    }

    // ---- commit ----

    /// All entries up to `index` are committed: moves the high watermark, and lets go of their bytes in memory. Never
    /// moves back; an index that is committed already is fine.
    ///
    /// # Panics
    /// If `index` is above the last entry.
    pub fn commit_to(&mut self, index: RaftIndex) {
        if index <= self.committed {
            return;
        }
        assert!(
            index <= self.last_index(),
            "cannot commit {index} in {}: the last is {}",
            self.dir.display(),
            self.last_index()
        );
        let Some((index, end_offset)) = self.end_offset_of(index) else { return };
        if index <= self.committed {
            return;
        }
        self.committed = index;
        self.high_watermark = end_offset;
        while self.tail_first <= index && self.tail.pop_front().is_some() {
            self.tail_first = self.tail_first.next();
        }
        if self.tail.is_empty() {
            self.tail_first = self.active.end_index();
            if self.tail.capacity() > TAIL_CAPACITY_KEPT {
                self.tail.shrink_to(TAIL_CAPACITY_KEPT);
            }
        }
        self.assert_boundaries();
    }

    /// The offset after entry `index`; where an index file cannot be read, the same of an entry before it.
    fn end_offset_of(&mut self, index: RaftIndex) -> Option<(RaftIndex, Offset)> {
        if index == self.last_index() {
            return Some((index, self.end_offset));
        }
        if let Some(at) = index.get().checked_sub(self.tail_first.get())
            && let Some(entry) = self.tail.get(at as usize)
        {
            return Some((index, entry.end_offset));
        }
        match self.entry_meta(index) {
            Ok(meta) => Some((index, meta.last_offset.next())),
            Err(error) => {
                tracing::error!(%error, "cannot look up a committed entry: the high watermark stays behind");
                self.sealed
                    .iter()
                    .rev()
                    .find(|segment| segment.end_index <= index)
                    .map(|segment| (RaftIndex::new(segment.end_index.get() - 1), segment.end_offset))
            }
        }
    }

    // ---- checkpoints ----

    /// The newest durable checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The newest durable checkpoint, and its file; read it with
    /// [`checkpoint::read_file`](crate::checkpoint::read_file). Together with [`Self::first_index`] of the same moment it
    /// is what another replica needs to begin from: the log holds all entries behind it.
    pub fn newest_checkpoint_file(&self) -> (&Checkpoint, PathBuf) {
        (&self.checkpoint, self.dir.join(Checkpoint::file_name(self.checkpoint.applied)))
    }

    /// Offset of the first entry held; the end offset when there is none. Below it there may be cleaned segments.
    pub fn first_offset(&self) -> Offset {
        self.first_raft_segment().base_offset
    }

    /// The first offset in the files, and the entry that was there first.
    pub fn local_start(&self) -> (Offset, RaftIndex) {
        let oldest = self.oldest_segment();
        (oldest.base_offset, oldest.first_index)
    }

    /// A checkpoint of all up to `applied`, the last entry that `membership` and `machine` reflect; what the log knows
    /// is filled in. Write it with [`Self::checkpoint_job`] once `flushed_index` has come to it.
    ///
    /// Where an index file cannot be read, this is the newest durable checkpoint once more, which changes nothing.
    ///
    /// # Panics
    /// If `applied` is not committed.
    pub fn new_checkpoint(&mut self, applied: RaftIndex, membership: Bytes, machine: Bytes) -> Checkpoint {
        assert!(
            applied <= self.committed,
            "a checkpoint of {applied} in {}, committed only up to {}",
            self.dir.display(),
            self.committed
        );
        if applied <= self.checkpoint.applied {
            return self.checkpoint.clone();
        }
        let end_offset_at_applied = if applied == self.committed {
            self.high_watermark
        } else {
            match self.entry_meta(applied) {
                Ok(meta) => meta.last_offset.next(),
                Err(error) => {
                    tracing::error!(%error, "no checkpoint now");
                    return self.checkpoint.clone();
                }
            }
        };
        let epochs: Vec<_> = self.epochs.iter().copied().filter(|start| start.index <= applied).collect();
        Checkpoint {
            applied,
            term: epochs.last().and_then(|start| start.epoch.term()).unwrap_or(CREATION_TERM),
            log_start: self.log_start.min(end_offset_at_applied),
            end_offset_at_applied,
            membership,
            machine,
            epochs,
        }
    }

    /// The job that makes a checkpoint durable; it does nothing where there is a newer one, or the same.
    ///
    /// # Panics
    /// If the log is not flushed up to it: nothing durable may rest on what is not. Or if it contradicts itself.
    pub fn checkpoint_job(&self, checkpoint: Checkpoint) -> CheckpointJob {
        assert!(
            checkpoint.applied <= self.flushed.max(self.checkpoint.applied),
            "a checkpoint of {} in {}, flushed only up to {}",
            checkpoint.applied,
            self.dir.display(),
            self.flushed,
        );
        let is_new = checkpoint.applied > self.checkpoint.applied;
        if is_new && let Err(problem) = checkpoint.check() {
            panic!("a checkpoint of {} in {}: {problem:?}", checkpoint.applied, self.dir.display());
        }
        CheckpointJob { disk: Arc::clone(&self.disk), dir: self.dir.to_path_buf(), checkpoint, is_new }
    }

    /// Takes note of a checkpoint that was written, and removes older ones but the last before it: that one is begun from
    /// where the new one's file rots. A failure changes and poisons nothing: the older checkpoint still holds.
    ///
    /// One that knows other members is not kept: a replica that believed it could stand for election among those that are
    /// replicas no more.
    pub fn checkpoint_done(&mut self, done: CheckpointDone) -> Result<(), StorageError> {
        done.written?;
        if done.checkpoint.applied <= self.checkpoint.applied {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.checkpoint, done.checkpoint);
        self.spare_checkpoint = (before.membership == self.checkpoint.membership).then_some(before.applied);
        // An old file that stays does no harm, so a failure is no matter; the next checkpoint tries again.
        for name in self.disk.read_dir(&self.dir).unwrap_or_default() {
            if Checkpoint::index_of_name(&name)
                .is_some_and(|applied| applied < self.checkpoint.applied && Some(applied) != self.spare_checkpoint)
            {
                let _ = self.disk.remove_file(&self.dir.join(name));
            }
        }
        Ok(())
    }

    /// The checkpoint before the newest one, if it is kept: opening begins from it where the newest one's file is rotten.
    pub fn spare_checkpoint(&self) -> Option<RaftIndex> {
        self.spare_checkpoint
    }

    /// Writes a checkpoint here and now.
    pub fn write_checkpoint(&mut self, checkpoint: Checkpoint) -> Result<(), StorageError> {
        let job = self.checkpoint_job(checkpoint);
        self.checkpoint_done(job.run())
    }
}

/// Entries of the tail whose room is kept when it is empty.
const TAIL_CAPACITY_KEPT: usize = 16;

/// Stamps one entry that is to stand at `offset`, behind one of `last_term`.
fn stamp(entry: &LogEntry, last_term: Term, offset: Offset, must_agree: bool) -> Result<Stamped, StorageError> {
    let refused = |detail: String| StorageError::Refused { index: entry.index, detail };
    let Some(epoch) = LeaderEpoch::from_term(entry.term) else {
        return Err(refused(format!("its term {} is above {}", entry.term, i32::MAX)));
    };
    let is_no_op = matches!(entry.body, EntryBody::Control { ctype: ControlType::NoOp, .. });
    if entry.term < last_term {
        return Err(refused(format!("its term {} is below {last_term}, the last one", entry.term)));
    }
    let begins_epoch = entry.term > last_term;
    if begins_epoch && !is_no_op {
        return Err(refused(format!("its term {} does not begin with a no-op", entry.term)));
    }
    let (batch, control) = match &entry.body {
        EntryBody::Batch(batch) => (batch.clone(), None),
        EntryBody::Control { ctype, payload } => {
            let batch = encode_control(*ctype, entry.term, entry.index, offset, payload, CONTROL_FORMAT_VERSION);
            (batch, Some(ctype.id()))
        }
    };
    let mut header = BatchHeader::parse(&batch).map_err(|error| refused(error.to_string()))?;
    if header.total_bytes() != batch.len() {
        return Err(refused(format!("a batch of {} bytes in {}", header.total_bytes(), batch.len())));
    }
    if control.is_none() && is_own_control(header.attributes) {
        return Err(refused("a control batch given as data".to_owned()));
    }
    if must_agree && (header.base_offset != offset || header.leader_epoch != epoch) {
        return Err(refused(format!(
            "it was stamped with offset {} and epoch {}, here it would be {offset} and {epoch}",
            header.base_offset, header.leader_epoch
        )));
    }
    header.base_offset = offset;
    header.leader_epoch = epoch;
    let tail = TailEntry { term: entry.term, end_offset: header.next_offset(), body: entry.body.clone() };
    Ok(Stamped { prefix: stamped_prefix(&batch, offset, epoch), batch, header, control, begins_epoch, tail })
}

/// Writes blocks `blocks` of an index.
pub(crate) fn write_blocks(
    file: &dyn DiskFile,
    name: SegmentName,
    slots: &[Slot],
    blocks: std::ops::Range<usize>,
) -> io::Result<()> {
    for number in blocks {
        let from = number * BLOCK_SLOTS;
        let to = slots.len().min(from + BLOCK_SLOTS);
        let block = encode_block(name, number as u32, &slots[from..to]);
        file.write_at(&block, (number * BLOCK_BYTES) as u64)?;
    }
    Ok(())
}
