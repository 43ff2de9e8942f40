//! What a replica must never forget: its term, its vote, and how far its log is flushed. One append-only file for a
//! stripe of replicas, so that an election storm costs a flush, not thousands.
//!
//! ```text
//! | header, a block | block 1                             | block 2 ...               zeros up to the end |
//!                   | sector | sector | ... 8 of 512 bytes |
//! sector: | magic "FHS1" | entries: u16 | 0: u16 | sector number: u64 | durable sectors: u64 | 0: u32 | crc: u32 | 15 entries, 32 bytes each |
//!          0              4              6        8                    16                     24       28         32                       512
//! entry:  | replica: u64 | term: u64 | vote: u64, 0 = none | flushed: u64 |    all zeros but the replica: it is gone
//! ```
//! A sector is written whole, and while it is not flushed it may be written again with more in it; a flush closes the
//! block, and what follows begins a new one (the closed block's unused sectors are written empty), so that flushed bytes
//! are never written again. A sector of zeros was never written. Since sectors tear only between, not within, one that
//! is neither zeros nor valid has rotted; so has a sector of zeros among the first `durable sectors` that a later one
//! vouches for. The last entry of a replica counts.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use flowstone_protocol::{RaftIndex, ReplicaId, Term};

use crate::disk::{Disk, DiskFile, OpenMode};
use crate::error::{OpenError, StorageError};
use crate::small_file::{self, Fields, FrameError};
use crate::walk::ZEROS;

const SECTOR_BYTES: usize = 512;
const BLOCK_BYTES: usize = 4096;
const BLOCK_SECTORS: u64 = (BLOCK_BYTES / SECTOR_BYTES) as u64;
const SECTOR_HEAD_BYTES: usize = 32;
const ENTRY_BYTES: usize = 32;
/// Replicas in a sector.
const SECTOR_ENTRIES: usize = (SECTOR_BYTES - SECTOR_HEAD_BYTES) / ENTRY_BYTES;
const _: () = assert!(SECTOR_HEAD_BYTES + SECTOR_ENTRIES * ENTRY_BYTES == SECTOR_BYTES);

const FILE_MAGIC: [u8; 8] = *b"FLOWHARD";
/// The newest version of a hard state file.
pub const HARD_STATE_FORMAT_VERSION: u32 = 1;
const SECTOR_MAGIC: [u8; 4] = *b"FHS1";
const CRC_AT: usize = 28;

/// Bytes of a new file, unless it has to hold very many replicas: 64 flushes.
const FILE_BYTES_MIN: u64 = 256 << 10;
/// A new file has room for this many times what it begins with.
const FILE_GROWTH: u64 = 16;
/// A file longer than this is none of ours.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// A file is replaced once this part of it is left: what is written meanwhile finds room in it.
const SPARE_PART: u64 = 4;

/// What stands for a replica that is gone: no replica has term 0, its creation is of term 1.
const FORGOTTEN: HardState = HardState { term: Term::new(0), vote: None, flushed: RaftIndex::new(0) };

/// What a replica must never forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardState {
    /// Its term.
    pub term: Term,
    /// Whom it voted for in that term.
    pub vote: Option<ReplicaId>,
    /// Up to where its log is flushed.
    pub flushed: RaftIndex,
}

impl HardState {
    /// Stands for what a replica said that can not be read any more: it may have voted for anyone, in any term, and must
    /// not take part under that id again.
    pub const LOST: Self = Self { term: Term::new(u64::MAX), vote: None, flushed: RaftIndex::new(u64::MAX) };

    /// Whether what the replica said is lost.
    pub fn is_lost(&self) -> bool {
        *self == Self::LOST
    }
}

/// A part of a stripe's file is unreadable: what its replicas voted may be forgotten, so none of them may take part
/// under its old id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HardStateRot {
    /// Byte position of the first unreadable sector.
    pub position: u64,
    /// What was found.
    pub detail: String,
}

/// A stripe's file.
///
/// One thread owns it; flushes are handed out as jobs.
#[derive(Debug)]
pub struct HardStateFile {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    stripe: u32,
    /// `None` where it is missing: then it is rotten, too.
    file: Option<Arc<dyn DiskFile>>,
    /// Sectors that the file has room for behind the header's block.
    sectors_max: u64,
    /// Sectors below this are flushed, or handed to a flush: never written again.
    closed: u64,
    /// The entries of the sectors from `closed` on, which are written, and may be written again.
    open: Vec<Vec<(ReplicaId, HardState)>>,
    /// Where in `open` a replica stands: at most once.
    open_at: HashMap<ReplicaId, (usize, usize)>,
    /// Sectors below this are known to be flushed: what a sector written now vouches for.
    durable: u64,
    flush_in_flight: bool,
    /// `closed`, as the flush in flight found it.
    in_flight_to: u64,
    /// Said since the job began that replaces the file: to be written into the new one as well.
    late: Option<BTreeMap<ReplicaId, HardState>>,
    /// The newest state of every replica: what a new file begins with.
    states: HashMap<ReplicaId, HardState>,
    /// Replicas to be written as forgotten with the next append.
    forgotten: Vec<ReplicaId>,
    /// The first failed write or flush, or the rot that was found.
    poison: Option<String>,
}

/// A flush to run on a pool. Where the file is almost full it makes a new one, which takes a few flushes.
#[derive(Debug)]
pub struct HardStateFlushJob {
    path: PathBuf,
    what: FlushWhat,
}

#[derive(Debug)]
enum FlushWhat {
    Sync { file: Arc<dyn DiskFile> },
    Replace { disk: Arc<dyn Disk>, stripe: u32, states: HashMap<ReplicaId, HardState> },
}

impl HardStateFlushJob {
    /// Flushes.
    pub fn run(&self) -> HardStateFlushDone {
        let flushed = match &self.what {
            FlushWhat::Sync { file } => file.sync_data().map(|()| None).map_err(StorageError::io("flush", &self.path)),
            FlushWhat::Replace { disk, stripe, states } => replace_file(disk, &self.path, *stripe, states)
                .map(Some)
                .map_err(StorageError::io("replace", &self.path)),
        };
        HardStateFlushDone { flushed }
    }
}

/// How it ended; give it to [`HardStateFile::flush_done`].
#[derive(Debug)]
pub struct HardStateFlushDone {
    /// The new file, if one was made.
    flushed: Result<Option<NewFile>, StorageError>,
}

/// A file that took another one's place, with the sectors that it has room for, and those that it begins with.
#[derive(Debug)]
struct NewFile {
    file: Arc<dyn DiskFile>,
    sectors_max: u64,
    used: u64,
}

/// What [`HardStateFile::open`] found: the file, what each replica said last, and what is unreadable.
pub type OpenedHardState = (HardStateFile, HashMap<ReplicaId, HardState>, Option<HardStateRot>);

impl HardStateFile {
    /// The file's name.
    pub fn file_name(stripe: u32) -> String {
        format!("hard-state-{stripe:05}")
    }

    /// Makes the file of a new data directory. Durable when this returns.
    pub fn create(disk: &Arc<dyn Disk>, dir: &Path, stripe: u32) -> Result<(), StorageError> {
        let path = dir.join(Self::file_name(stripe));
        replace_file(disk, &path, stripe, &HashMap::new()).map(|_| ()).map_err(StorageError::io("create", &path))
    }

    /// Makes a new file with these states, in the place of one that is of no use any more. Durable when this returns; a
    /// crash leaves the old one or the new one.
    pub fn replace(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        stripe: u32,
        states: &HashMap<ReplicaId, HardState>,
    ) -> Result<(), StorageError> {
        let path = dir.join(Self::file_name(stripe));
        replace_file(disk, &path, stripe, states).map(|_| ()).map_err(StorageError::io("replace", &path))
    }

    /// Opens a stripe's file, and makes durable what it holds.
    ///
    /// Fails with [`OpenError::Io`] where it cannot be read, with [`OpenError::NewerFormat`] where a newer program wrote
    /// it. Where a part of it has rotted, or all of it is missing, it is left as it is and takes no appends.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, stripe: u32) -> Result<OpenedHardState, OpenError> {
        let path = dir.join(Self::file_name(stripe));
        let file = match disk.open(&path, OpenMode::ReadWrite) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(OpenError::io("open", &path)(error)),
        };
        let mut bytes = Vec::new();
        if let Some(file) = &file {
            let len = file.len().map_err(OpenError::io("open", &path))?;
            bytes.resize(len.min(FILE_BYTES_MAX) as usize, 0);
            file.read_exact_at(&mut bytes, 0).map_err(OpenError::io("read", &path))?;
        }
        let found = match &file {
            Some(_) => read_sectors(stripe, &bytes),
            None => Err(FrameError::Invalid("the file is missing")),
        };
        let found = match found {
            Ok(found) => found,
            Err(FrameError::Newer { found }) => {
                return Err(OpenError::NewerFormat { path, found, known: HARD_STATE_FORMAT_VERSION });
            }
            Err(FrameError::Invalid(detail)) => {
                Found { rot: Some(HardStateRot { position: 0, detail: detail.to_owned() }), ..Found::default() }
            }
        };
        let mut opened = Self {
            disk,
            path,
            stripe,
            file,
            sectors_max: found.sectors_max,
            closed: found.written.next_multiple_of(BLOCK_SECTORS),
            open: Vec::new(),
            open_at: HashMap::new(),
            durable: found.durable,
            flush_in_flight: false,
            in_flight_to: 0,
            late: None,
            states: found.states.clone(),
            forgotten: Vec::new(),
            poison: found.rot.as_ref().map(|rot| format!("unreadable at byte {}: {}", rot.position, rot.detail)),
        };
        if found.rot.is_none() {
            // The life before may have renamed this file over a full one and failed to flush the folder: what is told
            // to be durable from here on must not vanish with its name.
            opened.disk.sync_dir(dir).map_err(OpenError::io("flush", dir))?;
            opened.write_again(&bytes).map_err(OpenError::io("write again", &opened.path))?;
        }
        Ok((opened, found.states, found.rot))
    }

    /// The replicas that any sector of a stripe's file names which can still be read, whatever else of it is rotten; none
    /// where there is no file. In no order.
    pub(crate) fn mentioned(disk: &Arc<dyn Disk>, dir: &Path, stripe: u32) -> Result<Vec<ReplicaId>, StorageError> {
        let path = dir.join(Self::file_name(stripe));
        let file = match disk.open(&path, OpenMode::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(StorageError::io("open", &path)(error)),
        };
        let len = file.len().map_err(StorageError::io("read", &path))?;
        let mut bytes = vec![0; len.min(FILE_BYTES_MAX) as usize];
        file.read_exact_at(&mut bytes, 0).map_err(StorageError::io("read", &path))?;
        let (sectors, _) = bytes.get(BLOCK_BYTES..).unwrap_or_default().as_chunks::<SECTOR_BYTES>();
        let entries = (0..).zip(sectors).filter_map(|(number, sector)| decode_sector(number, sector));
        Ok(entries.flat_map(|(_, entries)| entries).map(|(replica, _)| replica).collect())
    }

    /// What nobody vouches for may be in the page cache alone, clean, because a flush of it failed: it is written again
    /// and flushed, and sectors that were lost or never used become empty ones.
    fn write_again(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        for number in self.durable..self.closed {
            let at = sector_position(number);
            let sector = &bytes[at as usize..at as usize + SECTOR_BYTES];
            if sector == &ZEROS[..SECTOR_BYTES] {
                file.write_at(&encode_sector(number, self.durable, &[]), at)?;
            } else {
                file.write_at(sector, at)?;
            }
        }
        if self.durable < self.closed {
            file.sync_data()?;
        }
        self.durable = self.closed;
        Ok(())
    }

    /// Writes new states, without flushing. A replica's newest one counts. What a full file has no room for is kept until
    /// the next flush, which makes a new one. Any failure poisons the file.
    pub fn append(&mut self, states: &[(ReplicaId, HardState)]) -> Result<(), StorageError> {
        let file = self.writable()?;
        let mut first_changed = usize::MAX;
        let forgotten = std::mem::take(&mut self.forgotten);
        let forgotten = forgotten.into_iter().map(|replica| (replica, FORGOTTEN));
        for (replica, state) in forgotten.chain(states.iter().copied()) {
            if state != FORGOTTEN {
                self.states.insert(replica, state);
            }
            if let Some(late) = &mut self.late {
                late.insert(replica, state);
            }
            let (sector, place) = match self.open_at.get(&replica) {
                Some(&(sector, place)) => {
                    self.open[sector][place].1 = state;
                    (sector, place)
                }
                None => {
                    if self.open.last().is_none_or(|entries| entries.len() == SECTOR_ENTRIES) {
                        self.open.push(Vec::with_capacity(SECTOR_ENTRIES));
                    }
                    let sector = self.open.len() - 1;
                    self.open[sector].push((replica, state));
                    (sector, self.open[sector].len() - 1)
                }
            };
            self.open_at.insert(replica, (sector, place));
            first_changed = first_changed.min(sector);
        }
        if self.closed + self.open.len() as u64 > self.sectors_max {
            return Ok(());
        }
        let mut sectors = Vec::new();
        for (at, entries) in self.open.iter().enumerate().skip(first_changed) {
            sectors.extend_from_slice(&encode_sector(self.closed + at as u64, self.durable, entries));
        }
        if sectors.is_empty() {
            return Ok(());
        }
        let at = sector_position(self.closed + first_changed as u64);
        let written = file.write_at(&sectors, at).map_err(StorageError::io("write", &self.path));
        written.map_err(|error| self.poisoned_by(error))
    }

    /// The newest state of a replica.
    pub fn state(&self, replica: ReplicaId) -> Option<HardState> {
        self.states.get(&replica).copied()
    }

    /// The newest state of every replica.
    pub fn states(&self) -> impl Iterator<Item = (ReplicaId, HardState)> {
        self.states.iter().map(|(replica, state)| (*replica, *state))
    }

    /// Forgets a replica that is gone; its id is never used again. Written with the next append, so that a crash before
    /// that brings it back: nothing depends on its being gone.
    pub fn forget(&mut self, replica: ReplicaId) {
        if self.states.remove(&replica).is_some() {
            self.forgotten.push(replica);
        }
    }

    /// Whether the file is almost full: the next flush makes a new one, and should come soon.
    pub fn is_almost_full(&self) -> bool {
        self.closed + self.open.len() as u64 > self.sectors_max - self.sectors_max / SPARE_PART
    }

    /// A flush of all that was appended; `None` when all of it is durable, or a flush is in flight.
    pub fn flush_job(&mut self) -> Option<HardStateFlushJob> {
        let is_almost_full = self.is_almost_full();
        if (self.open.is_empty() && !is_almost_full) || self.flush_in_flight {
            return None;
        }
        let file = self.writable().ok()?;
        if is_almost_full {
            self.flush_in_flight = true;
            self.late = Some(BTreeMap::new());
            let (disk, stripe, states) = (Arc::clone(&self.disk), self.stripe, self.states.clone());
            let what = FlushWhat::Replace { disk, stripe, states };
            return Some(HardStateFlushJob { path: self.path.clone(), what });
        }
        let end = self.closed + self.open.len() as u64;
        let closed = end.next_multiple_of(BLOCK_SECTORS);
        let padding: Vec<u8> = (end..closed).flat_map(|number| encode_sector(number, self.durable, &[])).collect();
        if !padding.is_empty()
            && let Err(error) = file.write_at(&padding, sector_position(end))
        {
            self.poisoned_by(StorageError::io("write", &self.path)(error));
            return None;
        }
        self.closed = closed;
        self.open.clear();
        self.open_at.clear();
        self.flush_in_flight = true;
        self.in_flight_to = closed;
        Some(HardStateFlushJob { path: self.path.clone(), what: FlushWhat::Sync { file } })
    }

    /// Takes note of a flush that ended. One that failed poisons the file.
    pub fn flush_done(&mut self, done: HardStateFlushDone) -> Result<(), StorageError> {
        assert!(self.flush_in_flight, "a flush of {} ended that never began", self.path.display());
        self.flush_in_flight = false;
        let late = self.late.take();
        let Some(NewFile { file, sectors_max, used }) = done.flushed.map_err(|error| self.poisoned_by(error))? else {
            self.durable = self.durable.max(self.in_flight_to);
            return self.writable().map(|_| ());
        };
        self.writable()?;
        self.file = Some(file);
        self.sectors_max = sectors_max;
        self.closed = used;
        self.durable = used;
        self.open.clear();
        self.open_at.clear();
        let late: Vec<_> = late.unwrap_or_default().into_iter().collect();
        self.append(&late)
    }

    /// Flushes here and now; no flush may be in flight.
    pub fn flush(&mut self) -> Result<(), StorageError> {
        let job = self.flush_job();
        self.writable()?;
        match job {
            Some(job) => self.flush_done(job.run()),
            None => Ok(()),
        }
    }

    fn writable(&self) -> Result<Arc<dyn DiskFile>, StorageError> {
        match (&self.poison, &self.file) {
            (None, Some(file)) => Ok(Arc::clone(file)),
            (reason, _) => Err(StorageError::Poisoned {
                path: self.path.clone(),
                reason: reason.clone().unwrap_or_else(|| "the file is missing".to_owned()),
            }),
        }
    }

    fn poisoned_by(&mut self, error: StorageError) -> StorageError {
        if self.poison.is_none() {
            tracing::error!(path = %self.path.display(), %error, "the hard states take no more writes");
            self.poison = Some(error.to_string());
        }
        error
    }
}

/// Where a sector begins in the file.
fn sector_position(number: u64) -> u64 {
    BLOCK_BYTES as u64 + number * SECTOR_BYTES as u64
}

fn encode_sector(number: u64, durable: u64, entries: &[(ReplicaId, HardState)]) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    {
        let mut out = &mut sector[..];
        out.put_slice(&SECTOR_MAGIC);
        out.put_u16_le(entries.len() as u16);
        out.put_u16_le(0);
        out.put_u64_le(number);
        out.put_u64_le(durable);
        out.put_u64_le(0);
        for (replica, state) in entries {
            out.put_u64_le(replica.get());
            out.put_u64_le(state.term.get());
            out.put_u64_le(state.vote.map_or(0, ReplicaId::get));
            out.put_u64_le(state.flushed.get());
        }
    }
    let crc = sector_checksum(&sector);
    sector[CRC_AT..SECTOR_HEAD_BYTES].copy_from_slice(&crc.to_le_bytes());
    sector
}

fn sector_checksum(sector: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&sector[..CRC_AT]);
    hasher.update(&sector[SECTOR_HEAD_BYTES..]);
    hasher.finalize()
}

/// A valid sector: how many it vouches for, and its entries.
fn decode_sector(number: u64, sector: &[u8]) -> Option<(u64, Vec<(ReplicaId, HardState)>)> {
    let crc = u32::from_le_bytes(*sector[CRC_AT..].first_chunk()?);
    if crc != sector_checksum(sector) {
        return None;
    }
    let mut fields = Fields(sector);
    let is_ours = fields.take(SECTOR_MAGIC.len()).ok()? == SECTOR_MAGIC;
    let counts = fields.u32().ok()?;
    let entries = counts as usize & 0xffff;
    if !is_ours || fields.u64().ok()? != number || entries > SECTOR_ENTRIES {
        return None;
    }
    let durable = fields.u64().ok()?;
    fields.u64().ok()?;
    let mut decoded = Vec::with_capacity(entries);
    for _ in 0..entries {
        let replica = ReplicaId::new(fields.u64().ok()?);
        let term = Term::new(fields.u64().ok()?);
        let vote = fields.u64().ok()?;
        let flushed = RaftIndex::new(fields.u64().ok()?);
        let vote = (vote != 0).then_some(ReplicaId::new(vote));
        decoded.push((replica, HardState { term, vote, flushed }));
    }
    Some((durable, decoded))
}

/// What a file holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) states: HashMap<ReplicaId, HardState>,
    pub(crate) sectors_max: u64,
    /// One past the last sector that is not zeros.
    pub(crate) written: u64,
    /// Sectors that were known to be flushed when the newest one was written.
    pub(crate) durable: u64,
    pub(crate) rot: Option<HardStateRot>,
}

/// Reads a whole file; an error where its header is not right.
pub(crate) fn read_sectors(stripe: u32, bytes: &[u8]) -> Result<Found, FrameError> {
    let header = bytes.get(..BLOCK_BYTES).ok_or(FrameError::Invalid("the file is shorter than its header"))?;
    let header_bytes = small_file::framed_bytes(header)?;
    let mut fields = Fields(small_file::unframe(FILE_MAGIC, HARD_STATE_FORMAT_VERSION, &header[..header_bytes])?);
    let (its_stripe, sectors_max, begun_with) = (fields.u32()?, fields.u64()?, fields.u64()?);
    fields.end()?;
    if its_stripe != stripe {
        return Err(FrameError::Invalid("it is another stripe's file"));
    }
    let (sectors, rest) = bytes[BLOCK_BYTES..].as_chunks::<SECTOR_BYTES>();
    if sectors.len() as u64 != sectors_max || !rest.is_empty() || begun_with > sectors_max {
        return Err(FrameError::Invalid("the file's length is wrong"));
    }
    let mut found = Found { sectors_max, durable: begun_with, ..Found::default() };
    let mut first_zeros = None;
    for (number, sector) in (0..).zip(sectors) {
        if sector == &ZEROS[..SECTOR_BYTES] {
            first_zeros.get_or_insert(number);
            continue;
        }
        found.written = number + 1;
        match decode_sector(number, sector) {
            Some((durable, entries)) => {
                found.durable = found.durable.max(durable);
                for (replica, state) in entries {
                    if state == FORGOTTEN {
                        found.states.remove(&replica);
                    } else {
                        found.states.insert(replica, state);
                    }
                }
            }
            None if found.rot.is_none() => {
                let detail = "a sector is neither zeros nor valid".to_owned();
                found.rot = Some(HardStateRot { position: sector_position(number), detail });
            }
            None => {}
        }
    }
    if let Some(number) = first_zeros
        && number < found.durable
        && found.rot.is_none()
    {
        let detail = "a sector is zeros, a later one says that it was flushed".to_owned();
        found.rot = Some(HardStateRot { position: sector_position(number), detail });
    }
    found.durable = found.durable.min(sectors_max);
    Ok(found)
}

/// Writes a new file with these states, flushed, in place of the one at `path`.
fn replace_file(
    disk: &Arc<dyn Disk>,
    path: &Path,
    stripe: u32,
    states: &HashMap<ReplicaId, HardState>,
) -> io::Result<NewFile> {
    let mut entries: Vec<_> = states.iter().map(|(replica, state)| (*replica, *state)).collect();
    // The same states make the same bytes.
    entries.sort_unstable_by_key(|(replica, _)| *replica);
    let used = (entries.len().div_ceil(SECTOR_ENTRIES) as u64).next_multiple_of(BLOCK_SECTORS);
    let room_max = FILE_BYTES_MAX / SECTOR_BYTES as u64 - BLOCK_SECTORS;
    let room = (used * FILE_GROWTH).max(FILE_BYTES_MIN / SECTOR_BYTES as u64 - BLOCK_SECTORS).min(room_max).max(used);
    let mut body = BytesMut::with_capacity(20);
    body.put_u32_le(stripe);
    body.put_u64_le(room);
    body.put_u64_le(used);
    let header = small_file::frame(FILE_MAGIC, HARD_STATE_FORMAT_VERSION, &body);
    if sector_position(room) > FILE_BYTES_MAX {
        let problem = format!("{} replicas are more than a file may hold ({FILE_BYTES_MAX} bytes)", states.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    let mut bytes = vec![0; sector_position(room) as usize];
    bytes[..header.len()].copy_from_slice(&header);
    let mut chunks = entries.chunks(SECTOR_ENTRIES);
    for number in 0..used {
        let sector = encode_sector(number, 0, chunks.next().unwrap_or_default());
        let at = sector_position(number) as usize;
        bytes[at..at + SECTOR_BYTES].copy_from_slice(&sector);
    }
    let file = small_file::replace_file(disk, path, &bytes)?;
    Ok(NewFile { file, sectors_max: room, used })
}
