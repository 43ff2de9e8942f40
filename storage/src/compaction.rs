//! Compaction: of the sealed, committed part of a log below its newest checkpoint only the last record of each key is
//! kept. Offsets stay; what is left of them without a record is told by batches without records.
//!
//! ```text
//!   | cleaned ............ | dirty, sealed ........ | not to be cleaned yet | active |
//!   ^ log start            ^ clean to               ^ newest checkpoint, last stable offset, least age
//!
//!   a pass:  1. the newest offset of every key of the dirty part is noted (as many as fit in memory)
//!            2. every segment from the first on is copied without what is superseded, several into one file
//!            3. each new file: read again, flushed, named in the file `compacted`; then the old ones go
//! ```
//! A cleaned segment is no part of the Raft log any more: its batches have offsets and epochs, but no indexes. So the
//! log's first index moves up to where the cleaned part ends. Every batch of it is checked as before: offsets follow each
//! other without a gap, and the no-ops that begin terms stay.
//!
//! A [`Compaction`] runs on a pool, in pieces, so that its rate can be limited; the thread that owns the log takes each new
//! file in. Whoever reads the old ones reads on: they are removed when nobody does. A crash leaves the old or the new.

pub(crate) mod copying;
mod manifest;
mod offset_map;
mod writer;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::record::cleaning::{Cleaned, Horizon, clean};
use flowstone_protocol::record::records;
use flowstone_protocol::{BatchError, BatchHeader, ControlType, LeaderEpoch, Offset, ProducerId, RaftIndex, Timestamp};

pub use self::manifest::COMPACTED_FORMAT_VERSION;
pub(crate) use self::manifest::{COMPACTED_NAME, CleanedSegment, Cleaning};
use self::offset_map::OffsetMap;
use self::writer::{Writer, Written, remove_files};
use crate::checkpoint::Checkpoint;
use crate::disk::Disk;
use crate::error::StorageError;
use crate::log::Log;
use crate::lookup::Which;
use crate::planted::{Bug, is_planted};
use crate::read::DECOMPRESSED_BYTES_MAX;
use crate::segment::{Sealed, SegmentName};
use crate::slots::{SealedFiles, View, WaitingSlots};
use crate::walk::{Step, Walker};

/// Relative offsets of a segment are 32 bits wide; a batch may take up to `i32::MAX` of them.
const SEGMENT_OFFSETS_MAX: i64 = 1 << 31;

/// How a log is compacted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompactionConfig {
    /// Tombstones, and markers of transactions of which no record is left, stay so long after they were cleaned first.
    pub tombstones_kept: Duration,
    /// A segment is not cleaned before all its records are so old.
    pub lag_min: Duration,
    /// A dirty segment with records this old is reason enough for a pass.
    pub lag_max: Option<Duration>,
    /// Else a pass begins when so many thousandths of what it would look at are dirty.
    pub dirty_per_mille_min: u32,
}

impl Default for CompactionConfig {
    fn default() -> Self {
        Self {
            tombstones_kept: Duration::from_secs(24 * 60 * 60),
            lag_min: Duration::ZERO,
            lag_max: None,
            dirty_per_mille_min: 500,
        }
    }
}

/// A transaction that was aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AbortedTransaction {
    /// Whose.
    pub producer: ProducerId,
    /// The offset of its first batch.
    pub first: Offset,
    /// The offset of the marker that ended it.
    pub marker: Offset,
}

/// What the state machine behind a log knows of its transactions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    last_stable: Offset,
    /// By producer, then first offset.
    aborted: Vec<AbortedTransaction>,
    /// Ascending.
    markers: Vec<Offset>,
}

impl Settled {
    /// All transactions below `last_stable` have ended; those in `aborted` were aborted. Nothing at or above
    /// `last_stable` is cleaned; the markers of `aborted` stay: readers are told of them.
    pub fn new(last_stable: Offset, mut aborted: Vec<AbortedTransaction>) -> Self {
        aborted.sort_unstable();
        let mut markers: Vec<_> = aborted.iter().map(|transaction| transaction.marker).collect();
        markers.sort_unstable();
        Self { last_stable, aborted, markers }
    }

    /// Whether a producer's batch at `offset` belongs to a transaction that was aborted.
    pub fn is_aborted(&self, producer: ProducerId, offset: Offset) -> bool {
        let after = self.aborted.partition_point(|at| (at.producer, at.first) <= (producer, offset));
        let before = after.checked_sub(1).map(|at| self.aborted[at]);
        before.is_some_and(|at| at.producer == producer && offset < at.marker)
    }

    fn needs_marker(&self, offset: Offset) -> bool {
        self.markers.binary_search(&offset).is_ok()
    }
}

/// What a pass may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompactionLimits {
    /// No entry above is cleaned, besides all that forbids it anyway: a follower may need it as it is.
    pub up_to: RaftIndex,
    /// For the keys' newest offsets: 24 bytes a key, a quarter of it being free.
    pub memory_bytes: u64,
    /// Seeds the keys' hashes.
    pub seed: u64,
    /// The time.
    pub now: Timestamp,
}

/// What a log knows of its cleaned part.
#[derive(Debug)]
pub(crate) struct LogCompaction {
    /// How many of the sealed segments are cleaned ones: the first.
    pub(crate) cleaned_segments: usize,
    pub(crate) cleaning: Cleaning,
    /// Another one has it while a pass, or a repair of a cleaned segment, is under way.
    busy: Arc<Busy>,
    /// Another replica waits for a pass up to here.
    wanted_to: Offset,
    /// Files that were replaced, and may still be read.
    replaced: Vec<Arc<SealedFiles>>,
}

impl LogCompaction {
    pub(crate) fn opened(cleaning: Cleaning, cleaned_segments: usize) -> Self {
        let busy = Arc::new(Busy::default());
        Self { cleaned_segments, cleaning, busy, wanted_to: Offset::ZERO, replaced: Vec::new() }
    }
}

/// Who changes the cleaned part of a log holds it.
#[derive(Debug, Default)]
pub(crate) struct Busy {
    /// Whether the file `compacted` was to be replaced, and that failed: it says what it said, or the new.
    is_unsure: AtomicBool,
}

impl Busy {
    /// Replaces the file `compacted`.
    fn write(&self, cleaning: &Cleaning, disk: &Arc<dyn Disk>, dir: &Path) -> Result<(), StorageError> {
        self.is_unsure.store(true, Ordering::Relaxed);
        cleaning.write(disk, dir)?;
        self.is_unsure.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Makes sure that the file `compacted` says what is known: else a file that it may name already would be written anew.
    fn be_sure(&self, known: &Cleaning, disk: &Arc<dyn Disk>, dir: &Path) -> Result<(), StorageError> {
        if self.is_unsure.load(Ordering::Relaxed) { self.write(known, disk, dir) } else { Ok(()) }
    }
}

impl CleanedSegment {
    pub(crate) fn sealed(&self, disk: &Arc<dyn Disk>, dir: &Arc<Path>) -> Sealed {
        let epoch_before = Some(self.epoch_before).filter(|epoch| *epoch != LeaderEpoch::NONE);
        let (disk, dir, batches) = (Arc::clone(disk), Arc::clone(dir), self.batches as usize);
        Sealed {
            name: self.name,
            end_offset: self.end_offset,
            end_index: self.end_index,
            bytes: self.bytes,
            batches,
            records: self.records,
            max_timestamp: self.max_timestamp,
            files: Arc::new(SealedFiles::new(disk, dir, self.name, self.bytes, batches, epoch_before, None)),
            map: None,
        }
    }
}

/// A segment that a pass reads.
#[derive(Debug)]
struct Input {
    name: SegmentName,
    files: Arc<SealedFiles>,
    view: View,
    end_offset: Offset,
    end_index: RaftIndex,
    bytes: u64,
    batches: usize,
    records: u64,
    epoch_before: Option<LeaderEpoch>,
}

/// A file that is in place, and what it takes the place of.
#[derive(Debug)]
pub(crate) struct Swap {
    pub(crate) replaced: Vec<SegmentName>,
    pub(crate) segment: CleanedSegment,
}

/// A pass over a log. Run [`Self::step`] on a pool, and after each give it to [`Log::compacted`]; dropped it leaves what
/// was done so far.
#[derive(Debug)]
pub struct Compaction {
    disk: Arc<dyn Disk>,
    dir: Arc<Path>,
    config: CompactionConfig,
    segment_bytes: u64,
    segment_batches_max: usize,
    room_kept_bytes: u64,
    limits: CompactionLimits,
    settled: Settled,
    inputs: Vec<Input>,
    /// As on the disk.
    cleaning: Cleaning,
    keys: OffsetMap,
    /// Keys were noted up to here.
    noted_to: Offset,
    phase: Phase,
    /// The input that is read.
    at: usize,
    walker: Option<Walker>,
    output: Option<Output>,
    /// Producers with records that stayed, of a transaction whose marker is to come.
    with_data: HashSet<ProducerId>,
    /// What this pass, or one before it, let go because of its age lies below.
    dropped_to: Offset,
    horizon: Timestamp,
    swap: Option<Swap>,
    totals: CompactionTotals,
    busy: Arc<Busy>,
}

#[derive(Debug)]
struct Output {
    writer: Writer,
    /// The first input that is in it.
    from: usize,
    is_changed: bool,
}

#[derive(Debug)]
enum Phase {
    Noting,
    Cleaning,
    Verifying { written: Box<Written>, inputs: std::ops::Range<usize>, is_changed: bool },
    Ended,
}

/// What a piece of a pass did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompactionStep {
    /// Bytes read and written.
    pub bytes: u64,
    /// Whether the pass is over.
    pub is_done: bool,
}

/// What a pass came to so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompactionTotals {
    /// Bytes of the segments that were cleaned.
    pub bytes_before: u64,
    /// Bytes of what they became.
    pub bytes_after: u64,
    /// Files that took the place of others.
    pub swaps: u64,
}

impl Log {
    /// Begins a pass where one is due: `None` where the topic is not compacted, one is under way, or there is too little to
    /// clean. Nothing above the newest checkpoint, the last stable offset or what is committed is cleaned, nor the
    /// active segment.
    pub fn begin_compaction(&mut self, settled: Settled, limits: CompactionLimits) -> Option<Compaction> {
        self.remove_replaced();
        let (config, inputs) = self.due(settled.last_stable, &limits)?;
        let cleaning = &self.compaction.cleaning;
        let keys = inputs.iter().filter(|input| input.end_offset > cleaning.clean_to).map(|input| input.records).sum();
        Some(Compaction {
            disk: Arc::clone(&self.disk),
            dir: Arc::clone(&self.dir),
            config,
            segment_bytes: self.config.segment_bytes.min(crate::log::LogConfig::SEGMENT_BYTES_MAX),
            segment_batches_max: self.config.segment_batches_max as usize,
            room_kept_bytes: self.config.room_kept_on(&*self.disk),
            // Its memory is taken when the first piece is run.
            keys: OffsetMap::new(0, 0, limits.seed),
            noted_to: cleaning.clean_to,
            cleaning: cleaning.clone(),
            limits: CompactionLimits { memory_bytes: limits.memory_bytes.min(map_bytes(keys)), ..limits },
            settled,
            inputs,
            phase: Phase::Noting,
            at: 0,
            walker: None,
            output: None,
            with_data: HashSet::new(),
            dropped_to: self.compaction.cleaning.dropped_to,
            horizon: Timestamp::NONE,
            swap: None,
            totals: CompactionTotals::default(),
            busy: Arc::clone(&self.compaction.busy),
        })
    }

    /// Whether [`Self::begin_compaction`] would begin a pass where all below `last_stable` is settled: what was aborted may be
    /// much to tell for a log that is not due.
    pub fn is_compaction_due(&self, last_stable: Offset, limits: &CompactionLimits) -> bool {
        self.due(last_stable, limits).is_some()
    }

    /// What a pass would read, if one is due.
    fn due(&self, last_stable: Offset, limits: &CompactionLimits) -> Option<(CompactionConfig, Vec<Input>)> {
        let config = self.config.compaction?;
        if self.is_poisoned() || self.is_compacting() {
            return None;
        }
        let inputs: Vec<Input> = self.cleanable(&config, last_stable, limits);
        let cleaning = &self.compaction.cleaning;
        let is_dirty = |input: &&Input| input.end_offset > cleaning.clean_to;
        let total: u64 = inputs.iter().map(|input| input.bytes).sum();
        let dirty: u64 = inputs.iter().filter(is_dirty).map(|input| input.bytes).sum();
        let oldest = inputs.iter().position(|input| is_dirty(&input)).map(|at| self.sealed[at].max_timestamp);
        let is_overdue = config.lag_max.zip(oldest).is_some_and(|(lag, oldest)| oldest.after(lag) <= limits.now);
        let is_much = dirty > 0 && dirty * 1_000 >= total * u64::from(config.dirty_per_mille_min.min(1_000));
        let are_tombstones_due =
            !inputs.is_empty() && cleaning.horizon != Timestamp::NONE && cleaning.horizon <= limits.now;
        // Until then nobody can be given a part of it together with a part of another one.
        let is_wanted = dirty > 0 && self.compaction.wanted_to.max(cleaning.dropped_to) > cleaning.clean_to;
        (is_overdue || is_much || are_tombstones_due || is_wanted).then_some((config, inputs))
    }

    /// Whether a pass, or a repair of a cleaned segment, is under way.
    pub fn is_compacting(&self) -> bool {
        Arc::strong_count(&self.compaction.busy) > 1
    }

    /// Whether a pass was begun by this log, rather than before it was opened anew.
    pub fn has_begun(&self, compaction: &Compaction) -> bool {
        Arc::ptr_eq(&self.compaction.busy, &compaction.busy)
    }

    pub(crate) fn busy(&self) -> Arc<Busy> {
        Arc::clone(&self.compaction.busy)
    }

    /// Bytes of sealed segments that were written since the last pass, and of all sealed segments.
    pub fn dirty_bytes(&self) -> (u64, u64) {
        let clean_to = self.compaction.cleaning.clean_to;
        let dirty = self.sealed.iter().filter(|segment| segment.end_offset > clean_to);
        (dirty.map(|segment| segment.bytes).sum(), self.sealed.iter().map(|segment| segment.bytes).sum())
    }

    /// Below this offset no key is there twice, as far as a pass could know.
    pub fn clean_to(&self) -> Offset {
        self.compaction.cleaning.clean_to
    }

    /// Another replica waits until this one is clean up to `offset`: a pass is due, however little it has to look at.
    pub fn want_clean_to(&mut self, offset: Offset) {
        self.compaction.wanted_to = self.compaction.wanted_to.max(offset);
    }

    fn cleanable(&self, config: &CompactionConfig, last_stable: Offset, limits: &CompactionLimits) -> Vec<Input> {
        let up_to = limits.up_to.min(self.checkpoint.applied).min(self.committed);
        let (last_stable, now) = (last_stable.min(self.high_watermark), limits.now);
        let may_be = |segment: &&Sealed| {
            let is_old = segment.name.is_cleaned()
                || config.lag_min.is_zero()
                || segment.max_timestamp.after(config.lag_min) <= now;
            let is_flushed = self.unflushed_sealed.iter().all(|(name, _)| *name != segment.name);
            segment.end_index <= up_to.next() && segment.end_offset <= last_stable && is_old && is_flushed
        };
        let cleanable = self.sealed.iter().take_while(may_be).enumerate();
        cleanable
            .map(|(at, segment)| Input {
                name: segment.name,
                files: Arc::clone(&segment.files),
                view: self.view(Which::Sealed(at)),
                end_offset: segment.end_offset,
                end_index: segment.end_index,
                bytes: segment.bytes,
                batches: segment.batches,
                records: segment.records,
                epoch_before: segment.files.epoch_before(),
            })
            .collect()
    }

    /// Takes in what a piece of a pass has put in place, if it did. The log's first index is above it from now on.
    pub fn compacted(&mut self, compaction: &mut Compaction) {
        if let Some(swap) = compaction.swap.take() {
            self.swap_in(swap, &compaction.cleaning);
        } else if matches!(compaction.phase, Phase::Ended) {
            self.compaction.cleaning = compaction.cleaning.clone();
        }
    }

    pub(crate) fn swap_in(&mut self, swap: Swap, cleaning: &Cleaning) {
        self.compaction.cleaning = cleaning.clone();
        let is_replaced = |segment: &Sealed| swap.replaced.contains(&segment.name);
        let Some(from) = self.sealed.iter().position(is_replaced) else {
            // Retention was faster: what is named and not there lies below the log start.
            let _ = remove_files(&*self.disk, &self.dir, swap.segment.name);
            return;
        };
        let count = self.sealed.iter().skip(from).take_while(|segment| is_replaced(segment)).count();
        let end_index = swap.segment.end_index;
        for segment in self.sealed.drain(from..from + count) {
            segment.files.retire();
            self.compaction.replaced.push(segment.files);
        }
        self.sealed.insert(from, swap.segment.sealed(&self.disk, &self.dir));
        self.compaction.cleaned_segments = self.sealed.iter().take_while(|segment| segment.name.is_cleaned()).count();
        self.index_blocks.clear();
        if let Some(spare) = self.spare_checkpoint.take_if(|spare| end_index > spare.next()) {
            // Where this fails it is found to be of no use at the next opening.
            let _ = self.disk.remove_file(&self.dir.join(Checkpoint::file_name(spare)));
        }
        self.remove_replaced();
    }

    /// Removes files that were replaced and that nobody reads any more.
    pub fn remove_replaced(&mut self) {
        let Self { disk, dir, compaction, .. } = self;
        compaction.replaced.retain(|files| {
            if Arc::strong_count(files) > 1 {
                return true;
            }
            // What stays is swept at the next opening.
            let _ = remove_files(&**disk, dir, files.name);
            false
        });
    }
}

/// What a map of so many keys takes at most.
fn map_bytes(keys: u64) -> u64 {
    (keys.saturating_add(keys / 2).saturating_add(4)).saturating_mul(offset_map::ENTRY_BYTES as u64)
}

/// A batch that a walk stepped over.
struct Stepped {
    header: BatchHeader,
    position: u64,
    /// The type of one of the log's own.
    control: Option<i16>,
}

/// What becomes of a batch.
enum Fate {
    Stays,
    Becomes(Bytes),
    Goes,
}

impl Compaction {
    /// Reads and writes about `bytes_max` (at least a batch), waiting for the disk. What it put in place must have been
    /// taken in by [`Log::compacted`] before the next piece.
    ///
    /// After a failure drop it: the log is as it was, or further on.
    pub fn step(&mut self, bytes_max: u64) -> Result<CompactionStep, StorageError> {
        assert!(self.swap.is_none(), "what was put in place in {} was not taken in", self.dir.display());
        let mut bytes = 0;
        while bytes < bytes_max && self.swap.is_none() {
            let stepped = match self.phase {
                Phase::Noting => self.note(bytes_max - bytes),
                Phase::Cleaning => self.clean(bytes_max - bytes),
                Phase::Verifying { .. } => self.verify(bytes_max - bytes),
                Phase::Ended => break,
            };
            match stepped {
                Ok(stepped) => bytes += stepped,
                Err(error) => {
                    self.abandon();
                    return Err(error);
                }
            }
        }
        Ok(CompactionStep { bytes, is_done: matches!(self.phase, Phase::Ended) })
    }

    /// What it came to so far.
    pub fn totals(&self) -> CompactionTotals {
        self.totals
    }

    fn abandon(&mut self) {
        if let Some(output) = self.output.take() {
            output.writer.abandon();
        }
        if let Phase::Verifying { written, .. } = std::mem::replace(&mut self.phase, Phase::Ended) {
            written.abandon();
        }
    }

    /// The walk through the present input, and what lies at its place.
    fn next_batch(&mut self) -> Result<Option<(Walker, Stepped)>, StorageError> {
        let input = &self.inputs[self.at];
        let mut walker = match self.walker.take() {
            Some(walker) => walker,
            // Keys below were noted in an earlier pass.
            None if matches!(self.phase, Phase::Noting) && self.noted_to > input.name.base_offset => {
                let slots = &mut WaitingSlots::of(&input.files);
                let (_, slot) = input.view.batch_of(slots, self.noted_to)?;
                input.files.walker(u64::from(slot.position), slot.base_offset(input.name.base_offset), None)?
            }
            None => input.files.walker(0, input.name.base_offset, input.epoch_before)?,
        };
        if walker.position >= input.bytes {
            return Ok(None);
        }
        let stepped = walker.step().map_err(StorageError::io("read", &input.files.log_path()))?;
        let detail = match stepped {
            Step::Batch { header, position, control } => {
                return Ok(Some((walker, Stepped { header, position, control })));
            }
            Step::Bad { detail } => detail,
            Step::Clean => "batches are missing".to_owned(),
            // It may be needed by whoever understands it, and nothing is wrong with it.
            Step::Newer { ctype } => {
                let (dir, offset) = (self.dir.to_path_buf(), walker.offset);
                return Err(StorageError::NewerBatch { path: dir, offset, ctype });
            }
        };
        Err(self.corrupt(walker.position, walker.offset, detail))
    }

    fn corrupt(&self, position: u64, offset: Offset, detail: String) -> StorageError {
        StorageError::Corrupt { segment: self.inputs[self.at].name.log_file(), position, offset, detail }
    }

    /// Notes the keys of some dirty batches.
    fn note(&mut self, bytes_max: u64) -> Result<u64, StorageError> {
        if self.at == 0 && self.walker.is_none() {
            self.keys = OffsetMap::new(u64::MAX, self.limits.memory_bytes, self.limits.seed);
        }
        let mut bytes = 0;
        while bytes < bytes_max {
            let Some(input) = self.inputs.get(self.at) else {
                self.begin_cleaning();
                break;
            };
            if input.end_offset <= self.noted_to {
                self.at += 1;
                continue;
            }
            let end_offset = input.end_offset;
            let Some((mut walker, Stepped { header, position, .. })) = self.next_batch()? else {
                (self.at, self.noted_to) = (self.at + 1, end_offset);
                continue;
            };
            let batch_bytes = header.total_bytes();
            bytes += batch_bytes as u64;
            let is_data = !header.attributes.is_control() && header.record_count > 0;
            let is_aborted =
                header.attributes.is_transactional() && self.settled.is_aborted(header.producer_id, header.base_offset);
            if is_data && !is_aborted && header.next_offset() > self.cleaning.clean_to {
                let path = self.inputs[self.at].files.log_path();
                let batch = walker.batch_at(position, batch_bytes).map_err(StorageError::io("read", &path))?;
                let batch = Bytes::copy_from_slice(batch);
                let noted = note_keys(&mut self.keys, batch, self.cleaning.clean_to)
                    .map_err(|error| self.corrupt(position, header.base_offset, error.to_string()))?;
                if let Err(no_room_at) = noted {
                    // As far as the memory went: what comes behind is for another pass.
                    self.noted_to = no_room_at;
                    self.inputs.truncate(self.at + 1);
                    self.begin_cleaning();
                    break;
                }
            }
            self.walker = Some(walker);
        }
        Ok(bytes)
    }

    fn begin_cleaning(&mut self) {
        (self.phase, self.at, self.walker) = (Phase::Cleaning, 0, None);
    }

    /// Copies some batches, without what is superseded.
    fn clean(&mut self, bytes_max: u64) -> Result<u64, StorageError> {
        let mut bytes = 0;
        while bytes < bytes_max {
            if self.at >= self.inputs.len() {
                self.end_pass()?;
                break;
            }
            if self.output.is_none() {
                self.begin_output()?;
            }
            let Some((mut walker, Stepped { header, position, control })) = self.next_batch()? else {
                self.at += 1;
                if self.is_output_full() {
                    self.end_output()?;
                    break;
                }
                continue;
            };
            let path = self.inputs[self.at].files.log_path();
            let batch = walker.batch_at(position, header.total_bytes()).map_err(StorageError::io("read", &path))?;
            bytes += 2 * batch.len() as u64;
            let fate = self
                .fate_of(&header, control, batch)
                .map_err(|error| self.corrupt(position, header.base_offset, error.to_string()))?;
            let Some(output) = &mut self.output else { break };
            match fate {
                Fate::Stays => output.writer.put(&header, control, batch)?,
                Fate::Becomes(batch) => {
                    output.is_changed = true;
                    let header = BatchHeader::parse(&batch).expect("made a moment ago");
                    output.writer.put(&header, control, &batch)?;
                }
                Fate::Goes => {
                    // What was empty before is no news.
                    output.is_changed |= header.record_count > 0;
                    output.writer.skip(header.next_offset(), header.leader_epoch)?;
                }
            }
            self.walker = Some(walker);
        }
        Ok(bytes)
    }

    /// ```text
    /// | batch | stays |
    /// |---|---|
    /// | the log's own: a no-op / another | always: epochs are checked by it / never: the checkpoint has what it did |
    /// | a transaction's marker | while readers are told of it, while records of it stay, else until its horizon |
    /// | of an aborted transaction | never |
    /// | a record with a key | unless the key comes again behind it; a tombstone only until its batch's horizon, and a pass before this one has ended that saw it |
    /// | a record without a key | always: nothing takes its place |
    /// ```
    /// Behind what was noted all stay as they are, but for records whose keys are known to come again.
    fn fate_of(&mut self, header: &BatchHeader, control: Option<i16>, batch: &[u8]) -> Result<Fate, BatchError> {
        if let Some(ctype) = control {
            return Ok(if ctype == ControlType::NoOp.id() { Fate::Stays } else { Fate::Goes });
        }
        let now = self.limits.now;
        let noted_to = self.noted_to;
        let horizon = now.after(self.config.tombstones_kept);
        let is_due = header.attributes.has_delete_horizon() && header.base_timestamp <= now;
        // One that came from elsewhere may have its horizon from there: what it deletes goes with this pass at the earliest,
        // and must be gone before it does.
        let is_new = header.next_offset() > self.cleaning.clean_to;
        let is_over = is_due && !is_new;
        let is_noted = header.next_offset() <= noted_to;
        let cleaned = if header.attributes.is_control() {
            let has_data = self.with_data.remove(&header.producer_id);
            if !is_noted || has_data || self.settled.needs_marker(header.base_offset) {
                return Ok(Fate::Stays);
            }
            if is_over {
                self.dropped_to = self.dropped_to.max(header.next_offset());
                return Ok(Fate::Goes);
            }
            clean(&Bytes::copy_from_slice(batch), DECOMPRESSED_BYTES_MAX, Horizon::Always(horizon), |_| true)?
        } else if header.record_count == 0 {
            return Ok(Fate::Goes);
        } else {
            let is_transactional = header.attributes.is_transactional();
            if is_noted && is_transactional && self.settled.is_aborted(header.producer_id, header.base_offset) {
                return Ok(Fate::Goes);
            }
            let (keys, dropped_to) = (&self.keys, &mut self.dropped_to);
            let horizon = if is_noted { Horizon::OfTombstones(horizon) } else { Horizon::Untouched };
            let cleaned = clean(&Bytes::copy_from_slice(batch), DECOMPRESSED_BYTES_MAX, horizon, |record| {
                let Some(key) = record.key else { return true };
                if is_planted(Bug::KeepOlderRecords) && keys.newest(key) == Some(record.offset) {
                    return false;
                }
                if is_planted(Bug::DropTombstones) && record.value.is_none() {
                    return false;
                }
                if keys.newest(key).is_some_and(|newest| newest > record.offset) {
                    return false;
                }
                let goes = is_over && record.value.is_none();
                if goes {
                    *dropped_to = (*dropped_to).max(record.offset.next());
                }
                !goes
            })?;
            if is_transactional && cleaned != Cleaned::Nothing {
                self.with_data.insert(header.producer_id);
            }
            cleaned
        };
        let stays = match &cleaned {
            Cleaned::Same => Some(*header),
            Cleaned::Changed(batch) => Some(BatchHeader::parse(batch)?),
            Cleaned::Nothing => None,
        };
        let is_to_go =
            |stays: &BatchHeader| stays.attributes.has_delete_horizon() && (stays.base_timestamp > now || is_new);
        if let Some(stays) = stays.filter(is_to_go) {
            self.horizon = self.horizon.max(stays.base_timestamp);
        }
        Ok(match cleaned {
            Cleaned::Same => Fate::Stays,
            Cleaned::Changed(batch) => Fate::Becomes(batch),
            Cleaned::Nothing => Fate::Goes,
        })
    }

    fn begin_output(&mut self) -> Result<(), StorageError> {
        let input = &self.inputs[self.at];
        let rest: u64 = self.inputs[self.at..].iter().map(|input| input.bytes).sum();
        let needed = rest.min(self.segment_bytes.max(input.bytes)).saturating_add(self.room_kept_bytes);
        let available = self.disk.available_bytes(&self.dir).map_err(StorageError::io("ask for room in", &self.dir))?;
        if available < needed {
            let path = self.dir.to_path_buf();
            return Err(StorageError::DiskFull { path, needed_bytes: needed, available_bytes: available });
        }
        self.busy.be_sure(&self.cleaning, &self.disk, &self.dir)?;
        let name = SegmentName { cleaned: self.cleaning.next_number, ..input.name };
        let writer = Writer::begin(&self.disk, &self.dir, name, input.epoch_before)?;
        self.output = Some(Output { writer, from: self.at, is_changed: false });
        Ok(())
    }

    /// Whether the next input may not fit into the present file.
    fn is_output_full(&self) -> bool {
        let (Some(output), Some(next)) = (&self.output, self.inputs.get(self.at)) else { return true };
        let writer = &output.writer;
        writer.bytes() + next.bytes > self.segment_bytes
            || writer.batches() + next.batches > self.segment_batches_max
            || next.end_offset.get() - writer.name().base_offset.get() > SEGMENT_OFFSETS_MAX
    }

    fn end_output(&mut self) -> Result<(), StorageError> {
        let Some(Output { writer, from, is_changed }) = self.output.take() else { return Ok(()) };
        let last = &self.inputs[self.at - 1];
        assert_eq!(writer.next(), last.end_offset, "{} is written to its end", writer.name().log_file());
        let written = Box::new(writer.end(last.end_index)?);
        // One that was cleaned before and has lost nothing stays.
        let is_changed = is_changed || self.at - from > 1 || !last.name.is_cleaned();
        self.phase = Phase::Verifying { written, inputs: from..self.at, is_changed };
        Ok(())
    }

    fn verify(&mut self, bytes_max: u64) -> Result<u64, StorageError> {
        let Phase::Verifying { written, is_changed, .. } = &mut self.phase else { return Ok(0) };
        let (bytes, is_all) = if *is_changed { written.verify(bytes_max)? } else { (0, true) };
        if is_all
            && let Phase::Verifying { written, inputs, is_changed } =
                std::mem::replace(&mut self.phase, Phase::Cleaning)
        {
            if is_changed {
                self.put_in_place(*written, inputs)?;
            } else {
                written.abandon();
            }
        }
        Ok(bytes)
    }

    fn put_in_place(&mut self, written: Written, inputs: std::ops::Range<usize>) -> Result<(), StorageError> {
        let segment = written.flush()?;
        // What the file `compacted` will name must not be lost by a power failure that it survives.
        self.disk.sync_dir(&self.dir).map_err(StorageError::io("flush", &self.dir))?;
        let oldest = self.inputs[0].name.base_offset;
        let mut cleaning = self.cleaning.clone();
        cleaning.segments.retain(|other| {
            let is_apart = other.end_offset <= segment.name.base_offset || other.name.base_offset >= segment.end_offset;
            is_apart && other.end_offset > oldest
        });
        let at = cleaning.segments.partition_point(|other| other.end_offset <= segment.name.base_offset);
        cleaning.segments.insert(at, segment);
        cleaning.next_number += 1;
        cleaning.horizon = cleaning.horizon.max(self.horizon);
        cleaning.dropped_to = self.dropped_to;
        self.busy.write(&cleaning, &self.disk, &self.dir)?;
        self.cleaning = cleaning;
        self.totals.bytes_before += self.inputs[inputs.clone()].iter().map(|input| input.bytes).sum::<u64>();
        self.totals.bytes_after += segment.bytes;
        self.totals.swaps += 1;
        let replaced = self.inputs[inputs].iter().map(|input| input.name).collect();
        self.swap = Some(Swap { replaced, segment });
        Ok(())
    }

    fn end_pass(&mut self) -> Result<(), StorageError> {
        let mut cleaning = self.cleaning.clone();
        cleaning.clean_to = cleaning.clean_to.max(self.noted_to);
        cleaning.horizon = self.horizon;
        if cleaning != self.cleaning {
            self.busy.write(&cleaning, &self.disk, &self.dir)?;
            self.cleaning = cleaning;
        }
        self.phase = Phase::Ended;
        Ok(())
    }
}

/// Notes a batch's keys from `from` on; the first record that there was no room for, if there was one.
fn note_keys(keys: &mut OffsetMap, batch: Bytes, from: Offset) -> Result<Result<(), Offset>, BatchError> {
    let mut records = records(batch, DECOMPRESSED_BYTES_MAX)?;
    while let Some(record) = records.next_view() {
        let record = record?;
        if record.offset < from {
            continue;
        }
        if let Some(key) = record.key
            && !keys.insert(key, record.offset)
        {
            return Ok(Err(record.offset));
        }
    }
    Ok(Ok(()))
}
