//! Opening a log: gather facts, decide by the table of `recovery.rs`, then act.
//!
//! ```text
//!                 checkpoint.applied    flushed          last whole batch
//!  | segments ... |---------------------|----------------|--------- garbage, zeros -|
//!  |<- index believed, not read ------->|<-- walked, CRCs checked ->|<-- cut if not all zeros
//!                                                        |<- written again, flushed
//! ```

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;

use flowstone_protocol::{LeaderEpoch, Offset, RaftIndex, Timestamp};

use crate::batch_index::{BLOCK_BYTES, BLOCK_SLOTS, Slot, blocks_of, decode_block, valid_prefix};
use crate::checkpoint::{self, CREATION_INDEX, CREATION_TERM, Checkpoint, EpochStart, Found, ReplicaIdentity};
use crate::compaction::{COMPACTED_NAME, CleanedSegment, Cleaning, LogCompaction};
use crate::disk::{Disk, DiskFile, OpenMode};
use crate::error::OpenError;
use crate::install::{self, PROGRESS_NAME};
use crate::log::{Log, LogConfig, OpenLog, write_blocks};
use crate::planted::{Bug, is_planted};
use crate::recovery::{
    Answered, CheckpointDecision, CheckpointFact, IndexFacts, SegmentDecision, SegmentFacts, WalkEnd, believed_slots,
    decide_checkpoint, decide_no_segments, decide_segment, first_needed, keeps_spare,
};
use crate::segment::{Active, IndexFile, Sealed, SegmentName};
use crate::slots::{SealedFiles, replace_index_file};
use crate::small_file::TEMPORARY_SUFFIX;
use crate::walk::{Step, Walker};

/// Bytes written again at a time.
const REWRITE_BYTES: u64 = 1 << 20;

impl Log {
    /// Opens the log in `dir` and makes it whole: what a crash left behind the last whole batch is cut, what lies above
    /// `flushed` (the hard state's) is written again and flushed. Committed = applied = the checkpoint; the leader says
    /// how far commit really is. Afterwards all entries are flushed.
    ///
    /// Fails with [`OpenError::Quarantine`], having changed nothing, where an entry up to `flushed` or the checkpoint
    /// is gone or unreadable, or another one that was answered for. `now` is not used to decide what to keep.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        config: LogConfig,
        answered: impl Into<Answered>,
        now: Timestamp,
    ) -> Result<Self, OpenError> {
        let Answered { flushed, written } = answered.into();
        install::swap_in(&disk, dir).map_err(OpenError::of_storage)?;
        let identity = ReplicaIdentity::read(&disk, dir)?;
        let mut found = FoundFiles::list(&disk, dir)?;
        if found.was_installed {
            found.temporary.push(PROGRESS_NAME.to_owned());
        }
        let durable = flushed.max(found.checkpoints.first().copied().unwrap_or(CREATION_INDEX));
        let checkpoint = found.checkpoint(&disk, dir, durable)?;
        let spare = found.spare_checkpoint(&disk, dir, &checkpoint)?;
        let mut useless = found.checkpoints.clone();
        useless.retain(|applied| *applied != checkpoint.applied && Some(*applied) != spare);
        let answered = Answered { flushed: durable, written };
        let mut log = Self::open_from(disk, dir, config, identity, found, checkpoint, answered, now)?;
        log.spare_checkpoint = spare;
        for applied in useless {
            // Nothing depends on their being gone.
            let _ = log.disk.remove_file(&dir.join(Checkpoint::file_name(applied)));
        }
        Ok(log)
    }

    /// Opens a log from the files found, beginning with `checkpoint`; what was `answered` for must be there.
    #[allow(clippy::too_many_arguments, reason = "each is one fact, and there are two callers")]
    pub(crate) fn open_from(
        disk: Arc<dyn Disk>,
        dir: &Path,
        config: LogConfig,
        identity: ReplicaIdentity,
        found: FoundFiles,
        checkpoint: Checkpoint,
        answered: Answered,
        now: Timestamp,
    ) -> Result<Self, OpenError> {
        let Answered { flushed: durable, written } = answered;
        let cleaned = found.cleaned_segments(&disk, dir, &checkpoint)?;
        let mut walk = LogWalk {
            disk: &disk,
            dir,
            durable,
            written,
            checkpoint: &checkpoint,
            epochs: checkpoint.epochs.clone(),
            segments: Vec::with_capacity(found.segments.len()),
            dropped: Vec::new(),
        };
        let (unneeded, needed) =
            found.segments.split_at(first_needed(&found.segments, checkpoint.log_start, checkpoint.applied));
        walk.dropped.extend_from_slice(unneeded);
        let garbage = walk.walk(needed)?;
        let LogWalk { epochs, segments, mut dropped, .. } = walk;

        // Decided; from here on files change. First the checkpoint itself: a life before this one may have been killed
        // between its renaming and the flush of the folder, and what it replaces must not go before it is there.
        if !dropped.is_empty() || !found.superseded.is_empty() {
            disk.sync_dir(dir).map_err(OpenError::io("flush", dir))?;
        }
        let orphans = found.index_files.iter().filter(|name| !found.segments.contains(name));
        let superseded = found.superseded.iter().copied();
        let gone = found.cleaning.segments.iter().filter(|segment| !cleaned.contains(segment));
        let gone = gone.map(|segment| segment.name);
        dropped.extend(superseded.chain(gone));
        let leftovers =
            found.temporary.iter().map(|name| dir.join(name)).chain(orphans.map(|name| name.index_path(dir)));
        let dropped = dropped.iter().flat_map(|name| [name.log_path(dir), name.index_path(dir)]);
        for path in leftovers.chain(dropped) {
            remove_if_there(&disk, &path)?;
        }
        let mut segments: VecDeque<WalkedSegment> = segments.into();
        let last = match segments.pop_back() {
            Some(last) => last,
            None => {
                let name = SegmentName::of_raft(checkpoint.end_offset_at_applied, checkpoint.applied.next());
                let path = name.log_path(dir);
                let log = disk.open(&path, OpenMode::CreateNew).map_err(OpenError::io("create", &path))?;
                WalkedSegment::empty(name, log)
            }
        };
        let end_offset = last.end_offset;
        let log_first = segments.front().unwrap_or(&last).name.base_offset;
        let log_first = cleaned.first().map_or(log_first, |oldest| oldest.name.base_offset);
        let last_index = RaftIndex::new(last.end_index.get() - 1);
        for segment in segments.iter().chain([&last]).filter(|segment| segment.end_index > durable.next()) {
            if !is_planted(Bug::TrustThePageCache) {
                segment.write_again(dir, durable)?;
            }
        }
        let active = last.into_active(&disk, dir, garbage, now)?;
        // Also where nothing changed now: a life before this one may have cut or removed something and been killed before
        // it flushed that. What is seen here must be what a power failure leaves.
        if !is_planted(Bug::TrustThePageCache) {
            active.log.sync_data().map_err(OpenError::io("flush", &active.name.log_path(dir)))?;
        }
        disk.sync_dir(dir).map_err(OpenError::io("flush", dir))?;

        let mut log = Self {
            dir: Arc::from(dir),
            identity,
            config,
            sealed: VecDeque::with_capacity(cleaned.len() + segments.len()),
            compaction: LogCompaction::opened(found.cleaning, cleaned.len()),
            active,
            epochs,
            // Retention may have gone on from a newer checkpoint that is rotten now.
            log_start: checkpoint.log_start.max(log_first),
            high_watermark: checkpoint.end_offset_at_applied,
            committed: checkpoint.applied,
            flushed: last_index,
            end_offset,
            tail: VecDeque::new(),
            tail_first: last_index.next(),
            index_blocks: VecDeque::new(),
            unflushed_sealed: Vec::new(),
            unflushed_bytes: 0,
            dir_changed: false,
            flush_in_flight: false,
            cut_during_flush: None,
            reserved_bytes: 0,
            is_roll_overdue: false,
            poison: None,
            _counted: OpenLog::on(&*disk),
            checkpoint,
            spare_checkpoint: None,
            disk,
        };
        log.sealed.extend(cleaned.iter().map(|segment| segment.sealed(&log.disk, &log.dir)));
        for segment in segments {
            if !segment.slots.is_empty() && segment.index_slots != segment.slots.len() {
                replace_index_file(&*log.disk, dir, segment.name, &segment.slots);
            }
            let batches = (segment.end_index.get() - segment.name.first_index.get()) as usize;
            let files = log.sealed_files(segment.name, segment.end(), batches, None);
            log.sealed.push_back(segment.into_sealed(files));
        }
        // The checkpoint knows epochs from its own first index on; older ones may be of segments that are gone.
        let kept_from =
            log.epochs.partition_point(|start| start.index < log.oldest_segment().first_index).saturating_sub(1);
        log.epochs.drain(..kept_from);
        Ok(log)
    }
}

/// The files of a replica's folder, by their names.
#[derive(Debug, Default)]
pub(crate) struct FoundFiles {
    /// Those of the Raft log, ascending.
    segments: Vec<SegmentName>,
    /// Which cleaned ones there are.
    cleaning: Cleaning,
    /// Cleaned segments that were replaced, or never came to count, and those of the Raft log that were cleaned.
    superseded: Vec<SegmentName>,
    index_files: Vec<SegmentName>,
    /// Descending.
    checkpoints: Vec<RaftIndex>,
    temporary: Vec<String>,
    /// Whether there is the file that said how far its install was.
    was_installed: bool,
}

impl FoundFiles {
    pub(crate) fn list(disk: &Arc<dyn Disk>, dir: &Path) -> Result<Self, OpenError> {
        let mut found = Self { cleaning: Cleaning::read(disk, dir)?, ..Self::default() };
        let cleaned_to = found.cleaning.end().map_or(CREATION_INDEX, |(_, index)| index);
        for name in disk.read_dir(dir).map_err(OpenError::io("read", dir))? {
            if let Some(segment) = SegmentName::of_log_file(&name) {
                let counts = if segment.is_cleaned() {
                    found.cleaning.segments.iter().any(|it| it.name == segment)
                } else {
                    segment.first_index >= cleaned_to
                };
                match (counts, segment.is_cleaned()) {
                    (true, true) => {}
                    (true, false) => found.segments.push(segment),
                    (false, _) => found.superseded.push(segment),
                }
            } else if let Some(segment) = SegmentName::of_index_file(&name) {
                if !found.cleaning.segments.iter().any(|it| it.name == segment) {
                    found.index_files.push(segment);
                }
            } else if let Some(applied) = Checkpoint::index_of_name(&name) {
                found.checkpoints.push(applied);
            } else if name.ends_with(TEMPORARY_SUFFIX) {
                found.temporary.push(name);
            } else if name == PROGRESS_NAME {
                found.was_installed = true;
            }
        }
        found.segments.sort_unstable_by_key(|segment| (segment.first_index, segment.base_offset));
        found.checkpoints.sort_unstable_by(|left, right| right.cmp(left));
        Ok(found)
    }

    /// The checkpoint to begin from, where entries up to `durable` were flushed.
    fn checkpoint(&self, disk: &Arc<dyn Disk>, dir: &Path, durable: RaftIndex) -> Result<Checkpoint, OpenError> {
        let mut facts = Vec::with_capacity(1);
        let mut newest = None;
        let mut rot = String::new();
        for applied in &self.checkpoints {
            match checkpoint::read(disk, dir, *applied)? {
                Found::Valid(checkpoint) => {
                    facts.push(CheckpointFact { applied: *applied, valid: true });
                    newest = Some(*checkpoint);
                    break;
                }
                Found::Rotten(detail) => {
                    tracing::error!(dir = %dir.display(), %applied, detail, "a checkpoint is rotten, trying an older one");
                    facts.push(CheckpointFact { applied: *applied, valid: false });
                    rot.push_str(&format!("; {} is rotten: {detail}", Checkpoint::file_name(*applied)));
                }
            }
        }
        let decision = decide_checkpoint(&facts, self.segments.first().map(|segment| segment.first_index));
        match (decision, newest) {
            (CheckpointDecision::Use(applied), Some(checkpoint)) => {
                let no_log = self.segments.is_empty() && decide_no_segments(applied, durable) != SegmentDecision::Keep;
                if no_log {
                    let detail = format!("no segment is left, entries up to {durable} were flushed");
                    return Err(quarantine(dir, checkpoint.end_offset_at_applied, detail));
                }
                Ok(checkpoint)
            }
            (CheckpointDecision::QuarantineGap(applied), Some(checkpoint)) => {
                let detail = format!("its checkpoint ends at entry {applied}, before its log begins{rot}");
                Err(quarantine(dir, checkpoint.end_offset_at_applied, detail))
            }
            _ => Err(quarantine(dir, Offset::ZERO, format!("it has no valid checkpoint{rot}"))),
        }
    }
}

impl FoundFiles {
    /// The checkpoint that is kept beside `newest`.
    fn spare_checkpoint(
        &self,
        disk: &Arc<dyn Disk>,
        dir: &Path,
        newest: &Checkpoint,
    ) -> Result<Option<RaftIndex>, OpenError> {
        let Some(applied) = self.checkpoints.iter().copied().find(|applied| *applied < newest.applied) else {
            return Ok(None);
        };
        let found = match checkpoint::read(disk, dir, applied)? {
            Found::Valid(found) => Some(found),
            Found::Rotten(_) => None,
        };
        let same_members = found.as_ref().is_some_and(|found| found.membership == newest.membership);
        let fact = CheckpointFact { applied, valid: found.is_some() };
        let needed = first_needed(&self.segments, newest.log_start, newest.applied);
        let log_first = self.segments.get(needed).map(|segment| segment.first_index);
        Ok(keeps_spare(fact, same_members, log_first).then_some(applied))
    }
}

impl FoundFiles {
    /// Lets what an install has copied by offset alone: its own log knows nothing of it.
    pub(crate) fn leave_cleaned(&mut self) {
        self.cleaning = Cleaning::nothing();
    }

    /// The cleaned segments that hold anything from the log start on. The Raft log goes on where they end.
    fn cleaned_segments(
        &self,
        disk: &Arc<dyn Disk>,
        dir: &Path,
        checkpoint: &Checkpoint,
    ) -> Result<Vec<CleanedSegment>, OpenError> {
        let is_needed = |segment: &&CleanedSegment| segment.end_offset > checkpoint.log_start;
        let mut needed: Vec<_> = self.cleaning.segments.iter().filter(is_needed).copied().collect();
        // Retention may have gone on from a newer checkpoint that is rotten now.
        let is_older = self.checkpoints.first().is_some_and(|newest| *newest > checkpoint.applied);
        while let Some(oldest) = needed.first().filter(|_| is_older) {
            let path = oldest.name.log_path(dir);
            if disk.exists(&path).map_err(OpenError::io("open", &path))? {
                break;
            }
            needed.remove(0);
        }
        for segment in &needed {
            let path = segment.name.log_path(dir);
            let missing = match disk.file_len(&path) {
                Ok(bytes) if bytes >= segment.bytes => continue,
                Ok(bytes) => format!("has {bytes} of {} bytes", segment.bytes),
                Err(error) if error.kind() == io::ErrorKind::NotFound => "is missing".to_owned(),
                Err(error) => return Err(OpenError::io("open", &path)(error)),
            };
            let detail = format!("the cleaned segment {} {missing}", segment.name.log_file());
            return Err(quarantine(dir, segment.name.base_offset, detail));
        }
        // Without a segment the log begins behind the checkpoint.
        let behind = SegmentName::of_raft(checkpoint.end_offset_at_applied, checkpoint.applied.next());
        let first = self.segments.first().copied().unwrap_or(behind);
        if self.cleaning == Cleaning::nothing()
            && first.base_offset > checkpoint.log_start
            && self.superseded.iter().any(|segment| segment.is_cleaned())
        {
            let detail = format!(
                "it has cleaned segments, its log begins at offset {}, and its file `{COMPACTED_NAME}` is missing",
                first.base_offset
            );
            return Err(quarantine(dir, checkpoint.log_start, detail));
        }
        // Those that are gone led up to the Raft log, too.
        if let Some(end) = self.cleaning.segments.last().filter(|end| end.end_offset > checkpoint.log_start)
            && (first.base_offset, first.first_index) != (end.end_offset, end.end_index)
        {
            let detail = format!(
                "its cleaned segments end at offset {}, and its log begins at {}",
                end.end_offset, first.base_offset
            );
            return Err(quarantine(dir, end.end_offset, detail));
        }
        Ok(needed)
    }
}

fn quarantine(dir: &Path, offset: Offset, detail: String) -> OpenError {
    let remedy = "keep a copy of the folder, then restore it from a backup of this data directory, or delete the topic \
                  and create it anew (where there are other replicas, remove this one and let it be copied from them)";
    OpenError::Quarantine { path: dir.to_owned(), offset, detail, remedy: remedy.to_owned() }
}

fn remove_if_there(disk: &Arc<dyn Disk>, path: &Path) -> Result<(), OpenError> {
    match disk.remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(OpenError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// A segment of which is known what it holds.
#[derive(Debug)]
struct WalkedSegment {
    name: SegmentName,
    log: Option<Arc<dyn DiskFile>>,
    index: Option<Arc<dyn DiskFile>>,
    /// All slots; empty where only the last block of a sealed segment's index was looked at.
    slots: Vec<Slot>,
    last_slot: Option<Slot>,
    end_offset: Offset,
    end_index: RaftIndex,
    /// Length of the log file.
    file_bytes: u64,
    /// How many of `slots` the index file has right; 0 where it says anything else.
    index_slots: usize,
    /// Blocks, whole or not, in the index file.
    index_blocks: usize,
}

impl WalkedSegment {
    fn empty(name: SegmentName, log: Arc<dyn DiskFile>) -> Self {
        Self {
            name,
            log: Some(log),
            index: None,
            slots: Vec::new(),
            last_slot: None,
            end_offset: name.base_offset,
            end_index: name.first_index,
            file_bytes: 0,
            index_slots: 0,
            index_blocks: 0,
        }
    }

    fn end(&self) -> u64 {
        self.last_slot.map_or(0, |slot| slot.end_position())
    }

    fn into_sealed(self, files: Arc<SealedFiles>) -> Sealed {
        Sealed {
            name: self.name,
            end_offset: self.end_offset,
            end_index: self.end_index,
            bytes: self.end(),
            batches: (self.end_index.get() - self.name.first_index.get()) as usize,
            records: self.last_slot.map_or(0, |slot| u64::from(slot.records)),
            max_timestamp: self.last_slot.map_or(Timestamp::NONE, |slot| slot.max_timestamp),
            files,
            map: None,
        }
    }

    /// Whether the index file holds all full blocks of the slots, and nothing that is not true.
    fn index_is_right(&self) -> bool {
        self.index_slots / BLOCK_SLOTS == self.slots.len() / BLOCK_SLOTS
            && self.index_blocks == blocks_of(self.index_slots)
    }

    /// Makes the last segment ready to be appended to: what lies behind its last batch is cut unless it is zeros.
    fn into_active(self, disk: &Arc<dyn Disk>, dir: &Path, garbage: bool, now: Timestamp) -> Result<Active, OpenError> {
        let end = self.end();
        let path = self.name.log_path(dir);
        let log = match &self.log {
            Some(log) => Arc::clone(log),
            None => disk.open(&path, OpenMode::ReadWrite).map_err(OpenError::io("open", &path))?,
        };
        let mut zeroed_to = self.file_bytes.max(end);
        if garbage {
            tracing::warn!(path = %path.display(), position = end, bytes = self.file_bytes - end, "cutting a torn tail");
            log.set_len(end).map_err(OpenError::io("cut", &path))?;
            zeroed_to = end;
        }
        let full_blocks = self.slots.len() / BLOCK_SLOTS;
        let index_file = match &self.index {
            None => IndexFile::None,
            Some(file) => {
                let path = self.name.index_path(dir);
                let settle = || {
                    if !self.index_is_right() {
                        // Blocks of entries that were never flushed are cut, durably, before others take their place:
                        // else they may come back, and be believed, where the new ones were lost.
                        file.set_len(0)?;
                        file.sync_data()?;
                        write_blocks(&**file, self.name, &self.slots, 0..full_blocks)?;
                    }
                    file.sync_data()
                };
                settle().map_err(OpenError::io("write", &path))?;
                IndexFile::Written { blocks: full_blocks }
            }
        };
        // Its first batch's own time, where it has one: the time of the append is not kept.
        let born = self.slots.iter().map(|slot| slot.max_timestamp).find(|time| *time != Timestamp::NONE);
        Ok(Active {
            name: self.name,
            log,
            index_file,
            born: (!self.slots.is_empty()).then_some(born.map_or(now, |born| born.min(now))),
            slots: self.slots,
            end,
            zeroed_to,
            allocated_to: zeroed_to,
            map: None,
        })
    }

    /// Writes the segment's batches above `durable` again, and flushes them: some may be in the page cache alone, clean,
    /// because an earlier flush of them failed.
    fn write_again(&self, dir: &Path, durable: RaftIndex) -> Result<(), OpenError> {
        let path = self.name.log_path(dir);
        let io = |error| OpenError::io("write again", &path)(error);
        let Some(log) = &self.log else { return Ok(()) };
        let first = durable.next().get().saturating_sub(self.name.first_index.get()) as usize;
        let Some(slot) = self.slots.get(first) else { return Ok(()) };
        let mut at = u64::from(slot.position);
        let end = self.end();
        let mut buffer = Vec::new();
        while at < end {
            let count = (end - at).min(REWRITE_BYTES);
            buffer.resize(count as usize, 0);
            log.read_exact_at(&mut buffer, at).and_then(|()| log.write_at(&buffer, at)).map_err(io)?;
            at += count;
        }
        log.sync_data().map_err(io)
    }
}

/// An index file, if there is one, with its bytes.
type IndexBytes = (Option<Arc<dyn DiskFile>>, Vec<u8>);

/// What a walk through one segment found.
struct Walked {
    slots: Vec<Slot>,
    end: WalkEnd,
    detail: String,
    end_offset: Offset,
    end_index: RaftIndex,
}

/// The walk through all segments of a log.
struct LogWalk<'a> {
    disk: &'a Arc<dyn Disk>,
    dir: &'a Path,
    durable: RaftIndex,
    /// See [`Answered::written`].
    written: bool,
    checkpoint: &'a Checkpoint,
    /// Begins with the checkpoint's.
    epochs: Vec<EpochStart>,
    segments: Vec<WalkedSegment>,
    /// Segments to remove.
    dropped: Vec<SegmentName>,
}

impl LogWalk<'_> {
    /// Looks at every segment; whether garbage is to be cut off the last one kept.
    fn walk(&mut self, names: &[SegmentName]) -> Result<bool, OpenError> {
        let mut names = names.iter().copied().peekable();
        while let Some(name) = names.next() {
            let next = names.peek().copied();
            if let Some(next) = next
                && let Some(segment) = self.sealed_by_its_index(name, next)?
            {
                self.segments.push(segment);
                continue;
            }
            let (segment, end, detail) = self.walk_segment(name, next)?;
            let facts = SegmentFacts {
                last_valid: RaftIndex::new(segment.end_index.get() - 1),
                durable: self.durable,
                written: self.written,
                end,
                next_continues: next
                    .map(|next| next.first_index == segment.end_index && next.base_offset == segment.end_offset),
            };
            match decide_segment(facts) {
                SegmentDecision::Keep => self.segments.push(segment),
                SegmentDecision::Cut => {
                    self.segments.push(segment);
                    self.dropped.extend(names);
                    return Ok(true);
                }
                SegmentDecision::Quarantine => {
                    let answered = if facts.last_valid < self.durable {
                        format!("entries up to {} were flushed", self.durable)
                    } else {
                        "those in the segments behind it were answered for".to_owned()
                    };
                    let detail = format!(
                        "{} at position {}: {detail}; {answered}, {} is the last one there",
                        name.log_file(),
                        segment.end(),
                        facts.last_valid,
                    );
                    return Err(quarantine(self.dir, segment.end_offset, detail));
                }
            }
        }
        Ok(false)
    }

    /// A segment that is all in the checkpoint with another behind it, if its index's last block and its length agree
    /// with that: nothing else of it is read now.
    fn sealed_by_its_index(&self, name: SegmentName, next: SegmentName) -> Result<Option<WalkedSegment>, OpenError> {
        if next.first_index > self.checkpoint.applied.next() || next.first_index <= name.first_index {
            return Ok(None);
        }
        let batches = (next.first_index.get() - name.first_index.get()) as usize;
        let Ok(index) = self.disk.open(&name.index_path(self.dir), OpenMode::Read) else { return Ok(None) };
        let Some(last_block) = read_block(&*index, name, blocks_of(batches) - 1) else { return Ok(None) };
        let Some(last_slot) = last_block.last().copied() else { return Ok(None) };
        let path = name.log_path(self.dir);
        let file_bytes = self.disk.file_len(&path).map_err(OpenError::io("open", &path))?;
        let before_last = (blocks_of(batches) - 1) * BLOCK_SLOTS;
        let agrees = before_last + last_block.len() == batches
            && last_slot.end_position() <= file_bytes
            && last_slot.base_offset(name.base_offset) < next.base_offset;
        if !agrees {
            return Ok(None);
        }
        Ok(Some(WalkedSegment {
            name,
            log: None,
            index: None,
            slots: Vec::new(),
            last_slot: Some(last_slot),
            end_offset: next.base_offset,
            end_index: next.first_index,
            file_bytes,
            index_slots: batches,
            index_blocks: blocks_of(batches),
        }))
    }

    /// The epoch of the entry before a segment.
    fn epoch_before(&self, name: SegmentName) -> Option<LeaderEpoch> {
        if name.first_index == CREATION_INDEX.next() {
            return LeaderEpoch::from_term(CREATION_TERM);
        }
        let after = self.epochs.partition_point(|start| start.index < name.first_index);
        after.checked_sub(1).map(|before| self.epochs[before].epoch)
    }

    /// Reads a segment from the last slot on that its index is believed for; how the walk ended, and at what.
    fn walk_segment(
        &mut self,
        name: SegmentName,
        next: Option<SegmentName>,
    ) -> Result<(WalkedSegment, WalkEnd, String), OpenError> {
        let path = name.log_path(self.dir);
        let log = self.disk.open(&path, OpenMode::ReadWrite).map_err(OpenError::io("open", &path))?;
        let file_bytes = log.len().map_err(OpenError::io("open", &path))?;
        let (index, index_bytes) = self.read_index(name)?;
        let index_slots = valid_prefix(name, &index_bytes);
        let up_to = |index: RaftIndex| index.get().saturating_sub(name.first_index.get()) as usize;
        let durable = up_to(next.map_or(self.durable.next(), |next| next.first_index.min(self.durable.next())));
        let believed = believed_slots(IndexFacts {
            valid: index_slots.len(),
            applied: up_to(self.checkpoint.applied.next()),
            within_file: index_slots.partition_point(|slot| slot.end_position() <= file_bytes),
        });
        let known_epochs = self.epochs.len();
        let believed_slots = index_slots[..believed].to_vec();
        let mut walked = self.walk_from(name, next, &log, file_bytes, believed_slots)?;
        if believed > 0 && walked.slots.len() < durable {
            // The log does not go on where its index says: it may be the index that is wrong, for all its checksums.
            self.epochs.truncate(known_epochs);
            walked = self.walk_from(name, next, &log, file_bytes, Vec::new())?;
        }
        let Walked { slots, end, detail, end_offset, end_index } = walked;
        let segment = WalkedSegment {
            name,
            log: Some(log),
            index,
            last_slot: slots.last().copied(),
            index_slots: if slots.starts_with(&index_slots) { index_slots.len() } else { 0 },
            index_blocks: index_bytes.len().div_ceil(BLOCK_BYTES),
            slots,
            end_offset,
            end_index,
            file_bytes,
        };
        Ok((segment, end, detail))
    }

    /// Walks from the last of `slots` on, which is looked at again: an index of another life of this file would not
    /// agree.
    fn walk_from(
        &mut self,
        name: SegmentName,
        next: Option<SegmentName>,
        log: &Arc<dyn DiskFile>,
        file_bytes: u64,
        mut slots: Vec<Slot>,
    ) -> Result<Walked, OpenError> {
        let path = name.log_path(self.dir);
        let again = slots.pop();
        let epoch = slots.last().map(|slot| slot.epoch).or_else(|| self.epoch_before(name));
        let (position, offset) =
            again.map_or((0, name.base_offset), |slot| (u64::from(slot.position), slot.base_offset(name.base_offset)));
        let index = name.first_index.plus(slots.len() as u64);
        let mut walker = Walker::new(Arc::clone(log), file_bytes, position, offset, index, epoch);
        for (number, slot) in slots.iter().enumerate() {
            self.note_epoch(name, number, slot);
        }
        let (end, detail) = loop {
            if let Some(next) = next.filter(|next| walker.index == next.first_index) {
                break (WalkEnd::Clean, format!("the next segment begins at offset {}", next.base_offset));
            }
            match walker.step().map_err(OpenError::io("read", &path))? {
                Step::Batch { header, position, control } => {
                    let Ok(position) = u32::try_from(position) else {
                        break (WalkEnd::Bad, "a segment larger than 4 GiB".to_owned());
                    };
                    let slot = Slot::of(&header, control, position, name.base_offset, slots.last());
                    self.note_epoch(name, slots.len(), &slot);
                    slots.push(slot);
                }
                Step::Clean => break (WalkEnd::Clean, "the file ends".to_owned()),
                Step::Bad { detail } => break (WalkEnd::Bad, detail),
                Step::Newer { ctype } => {
                    tracing::error!(path = %path.display(), ctype, "a control batch of a type that is not known");
                    return Err(OpenError::NewerFormat {
                        path,
                        found: checkpoint::LOG_FORMAT_VERSION + 1,
                        known: checkpoint::LOG_FORMAT_VERSION,
                    });
                }
            }
        };
        Ok(Walked { slots, end, detail, end_offset: walker.offset, end_index: walker.index })
    }

    /// A segment's index file, if there is one, with its bytes.
    fn read_index(&self, name: SegmentName) -> Result<IndexBytes, OpenError> {
        let path = name.index_path(self.dir);
        let file = match self.disk.open(&path, OpenMode::ReadWrite) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((None, Vec::new())),
            Err(error) => return Err(OpenError::io("open", &path)(error)),
        };
        let len = file.len().map_err(OpenError::io("open", &path))?;
        // What does not read is rebuilt.
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        if file.read_exact_at(&mut bytes, 0).is_err() {
            bytes.clear();
        }
        Ok((Some(file), bytes))
    }

    fn note_epoch(&mut self, name: SegmentName, number: usize, slot: &Slot) {
        let index = name.first_index.plus(number as u64);
        let is_new = self.epochs.last().is_none_or(|last| slot.epoch > last.epoch);
        if index > self.checkpoint.applied && is_new {
            let offset = slot.base_offset(name.base_offset);
            self.epochs.push(EpochStart { epoch: slot.epoch, index, offset });
        }
    }
}

fn read_block(index: &dyn DiskFile, name: SegmentName, number: usize) -> Option<Vec<Slot>> {
    let mut bytes = vec![0; BLOCK_BYTES];
    index.read_exact_at(&mut bytes, (number * BLOCK_BYTES) as u64).ok()?;
    decode_block(name, number as u32, &bytes)
}
