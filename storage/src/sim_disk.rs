//! A disk in memory that tears, forgets and fails, the same way for the same seed.
//!
//! Each file has two images: what programs see (the page cache) and what would survive a power failure. A flush copies
//! the first to the second. When the power fails, every 512-byte sector that was written since the last flush is kept or
//! lost by a coin, a changed length becomes the old one, the new one or one in between, and every change of a folder
//! since its last flush is kept or lost, too. When only the process is killed, all that was written stays.
//!
//! It is harsher than real file systems, which keep changes of folders in order: a folder whose parent was not flushed
//! since it was made may be lost with all that was flushed in it (where asked for: [`SimDisk::set_loses_dirs`]). One thing is simpler: removing a folder is durable at
//! once.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::disk::{DirLock, Disk, DiskFile, OpenMode};

/// What a disk writes whole or not at all.
pub const SECTOR_BYTES: usize = 512;

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The process is killed: all that was written stays in the page cache.
    Process,
    /// The power fails: of what was not flushed, anything may be lost.
    Power,
}

/// An operation that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// Opening a file (fails with EMFILE).
    Open,
    /// Making a file (fails with ENOSPC).
    Create,
    /// Reading (EIO).
    Read,
    /// Writing (EIO, a part of it written).
    Write,
    /// Cutting or extending (EIO).
    SetLen,
    /// Flushing a file (EIO; what was not flushed counts as clean from then on).
    Sync,
    /// Flushing a folder (EIO).
    SyncDir,
    /// Renaming (EIO).
    Rename,
    /// Removing (EIO).
    Remove,
}

/// What a disk went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimCounts {
    /// Operations that change something.
    pub operations: u64,
    /// Times that it crashed in the middle of an operation, or between two.
    pub crashes: u64,
    /// Of those, power failures.
    pub power_failures: u64,
    /// Files of which a power failure kept some unflushed sectors and lost others.
    pub torn_files: u64,
    /// Unflushed sectors lost.
    pub sectors_lost: u64,
    /// Unflushed sectors kept.
    pub sectors_kept: u64,
    /// Changes of folders lost.
    pub names_lost: u64,
    /// Folders lost, with all that was in them.
    pub dirs_lost: u64,
    /// Operations that were made to fail.
    pub faults: u64,
}

/// A simulated disk. Clones share it.
#[derive(Clone, Debug)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
    open_logs: Arc<AtomicUsize>,
}

/// Files by their whole path. Bytes are compared, not parts of paths: all of them are in their one form.
type Names = BTreeMap<OsString, u64>;

#[derive(Debug)]
struct State {
    random: Random,
    dirs: BTreeSet<OsString>,
    /// Folders made since their parent was flushed: each may be lost, with all it holds.
    new_dirs: BTreeSet<OsString>,
    loses_dirs: bool,
    /// What programs see.
    names: Names,
    /// What would survive.
    durable_names: Names,
    /// Changes from the one to the other, in order.
    name_changes: Vec<NameChange>,
    /// Folders renamed since their parent was flushed, old and new name: each may have its old name back, with all that
    /// it holds by then.
    dir_renames: Vec<(PathBuf, PathBuf)>,
    files: BTreeMap<u64, File>,
    next_file: u64,
    /// Files opened in an earlier life are dead.
    life: u64,
    /// Operations until the crash.
    crash_in: Option<u64>,
    crashed: bool,
    bytes_max: Option<u64>,
    /// Operations that fail the next time, with how many go well before.
    faults: Vec<(Operation, u64)>,
    /// Bytes of files that cannot be read (EIO).
    unreadable: Vec<(u64, Range<u64>)>,
    /// Nothing counts as cached: reads that must not wait get nothing.
    cold: bool,
    /// And when that was set.
    flush_horizon: Option<(u64, u64)>,
    read_only: bool,
    locks: BTreeSet<OsString>,
    counts: SimCounts,
}

#[derive(Debug)]
enum NameChange {
    Create { path: PathBuf, file: u64 },
    Remove { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf },
}

impl NameChange {
    fn is_in(&self, dir: &Path) -> bool {
        let (Self::Create { path, .. } | Self::Remove { path } | Self::Rename { to: path, .. }) = self;
        is_in(path.as_os_str(), dir)
    }

    /// The same change, in a folder that got another name.
    fn moved(self, from: &Path, to: &Path) -> Self {
        match self {
            Self::Create { path, file } => Self::Create { path: moved(path, from, to), file },
            Self::Remove { path } => Self::Remove { path: moved(path, from, to) },
            Self::Rename { from: old, to: new } => {
                Self::Rename { from: moved(old, from, to), to: moved(new, from, to) }
            }
        }
    }
}

/// Whether `path` lies in the folder `dir` itself.
fn is_in(path: &OsStr, dir: &Path) -> bool {
    let (path, dir) = (path.as_bytes(), dir.as_os_str().as_bytes());
    let name = path.strip_prefix(dir).map(|rest| if dir == b"/" { Some(rest) } else { rest.strip_prefix(b"/") });
    name.flatten().is_some_and(|name| !name.is_empty() && !name.contains(&b'/'))
}

/// What `path` is called once the folder `from` is called `to`.
fn moved(path: PathBuf, from: &Path, to: &Path) -> PathBuf {
    match path.strip_prefix(from) {
        Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
        Ok(rest) => to.join(rest),
        Err(_) => path,
    }
}

#[derive(Debug, Default)]
struct File {
    seen: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors that differ, or may, each with the operation that first changed it since it was flushed.
    dirty: BTreeMap<u64, u64>,
    /// The operation that goes on.
    operation: u64,
    /// Room taken past the end.
    allocated: u64,
}

impl File {
    fn used(&self) -> u64 {
        self.allocated.max(self.seen.len() as u64)
    }

    fn touch(&mut self, from: usize, to: usize) {
        if from < to {
            for sector in (from / SECTOR_BYTES) as u64..to.div_ceil(SECTOR_BYTES) as u64 {
                self.dirty.entry(sector).or_insert(self.operation);
            }
        }
    }

    fn write(&mut self, bytes: &[u8], position: usize) {
        let end = position + bytes.len();
        let old = self.seen.len();
        if end > old {
            self.seen.resize(end, 0);
            self.touch(old, end);
        }
        self.seen[position..end].copy_from_slice(bytes);
        self.touch(position, end);
    }

    fn set_len(&mut self, len: usize) {
        let old = self.seen.len();
        self.seen.resize(len, 0);
        self.allocated = 0;
        self.touch(len.min(old), len.max(old));
    }

    fn sector_to(&self, image: &mut [u8], sector: u64) {
        let from = sector as usize * SECTOR_BYTES;
        let to = (from + SECTOR_BYTES).min(image.len());
        if from >= to {
            return;
        }
        let seen = self.seen.get(from..to.min(self.seen.len())).unwrap_or_default();
        image[from..from + seen.len()].copy_from_slice(seen);
        image[from + seen.len()..to].fill(0);
    }

    /// Flushes what was changed by operations up to `horizon`, and by those after `since`.
    fn flush(&mut self, horizon: u64, since: u64) {
        let mut image = std::mem::take(&mut self.durable);
        image.resize(self.seen.len(), 0);
        for (sector, operation) in std::mem::take(&mut self.dirty) {
            if operation <= horizon || operation > since {
                self.sector_to(&mut image, sector);
            } else {
                self.dirty.insert(sector, operation);
            }
        }
        self.durable = image;
    }

    /// Makes some of what is not flushed durable: how many sectors were kept and lost.
    fn flush_some(&mut self, random: &mut Random) -> (u64, u64) {
        let mut image = std::mem::take(&mut self.durable);
        let (old, new) = (image.len(), self.seen.len());
        let len = match random.below(4) {
            0 => old,
            1 => old.min(new) + random.below(old.abs_diff(new) as u64 + 1) as usize,
            _ => new,
        };
        image.resize(len, 0);
        let keep_of_8 = [0, 1, 4, 7, 8][random.below(5) as usize];
        let (mut kept, mut lost) = (0, 0);
        for sector in std::mem::take(&mut self.dirty).into_keys() {
            if random.below(8) < keep_of_8 {
                self.sector_to(&mut image, sector);
                kept += 1;
            } else {
                lost += 1;
            }
        }
        self.durable = image;
        (kept, lost)
    }
}

/// SplitMix64: small, and the same everywhere.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

impl SimDisk {
    /// An empty disk.
    pub fn new(seed: u64) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                random: Random(seed),
                dirs: BTreeSet::new(),
                new_dirs: BTreeSet::new(),
                loses_dirs: false,
                names: BTreeMap::new(),
                durable_names: BTreeMap::new(),
                name_changes: Vec::new(),
                dir_renames: Vec::new(),
                files: BTreeMap::new(),
                next_file: 0,
                life: 0,
                crash_in: None,
                crashed: false,
                bytes_max: None,
                faults: Vec::new(),
                unreadable: Vec::new(),
                cold: false,
                flush_horizon: None,
                read_only: false,
                locks: BTreeSet::new(),
                counts: SimCounts::default(),
            })),
            open_logs: Arc::default(),
        }
    }

    /// The disk as the log takes it.
    pub fn shared(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }

    /// What it went through.
    pub fn counts(&self) -> SimCounts {
        self.lock().counts
    }

    /// Adds what an earlier disk went through, for runs that use several.
    pub fn add_counts(&self, earlier: SimCounts) {
        let counts = &mut self.lock().counts;
        counts.operations += earlier.operations;
        counts.crashes += earlier.crashes;
        counts.power_failures += earlier.power_failures;
        counts.torn_files += earlier.torn_files;
        counts.sectors_lost += earlier.sectors_lost;
        counts.sectors_kept += earlier.sectors_kept;
        counts.names_lost += earlier.names_lost;
        counts.dirs_lost += earlier.dirs_lost;
        counts.faults += earlier.faults;
    }

    /// The `operations`th operation from now on that changes something is the last of this life: it is done in part or
    /// not at all, and everything fails from there on until [`Self::restart`].
    pub fn crash_after(&self, operations: u64) {
        self.lock().crash_in = Some(operations);
    }

    /// Forgets about a crash that was planned and did not come.
    pub fn cancel_crash(&self) {
        self.lock().crash_in = None;
    }

    /// Whether it has crashed.
    pub fn is_crashed(&self) -> bool {
        self.lock().crashed
    }

    /// Ends this life, in whatever way, and begins the next: open files are dead, locks are free, planned faults gone.
    pub fn restart(&self, crash: Crash) {
        let mut state = self.lock();
        let state = &mut *state;
        state.counts.crashes += 1;
        if crash == Crash::Power {
            state.counts.power_failures += 1;
            state.lose_power();
        }
        state.drop_nameless();
        state.life += 1;
        state.crashed = false;
        state.crash_in = None;
        state.faults.clear();
        state.locks.clear();
    }

    /// Makes the operation fail once, after `go_well` more of its kind.
    pub fn fail(&self, operation: Operation, go_well: u64) {
        self.lock().faults.push((operation, go_well));
    }

    /// Lets nothing fail any more that did not yet.
    pub fn cancel_faults(&self) {
        self.lock().faults.clear();
    }

    /// A bad sector: what touches these bytes of a file fails to read them (EIO) from now on. Another file that takes its
    /// name has sectors of its own.
    pub fn set_unreadable(&self, path: &Path, bytes: Range<u64>) {
        let mut state = self.lock();
        if let Some(number) = state.names.get(path.as_os_str()).copied() {
            state.unreadable.push((number, bytes));
        }
    }

    /// Limits the bytes of all files together.
    pub fn set_bytes_max(&self, bytes_max: Option<u64>) {
        self.lock().bytes_max = bytes_max;
    }

    /// Bytes of all files together, room taken ahead included.
    pub fn used_bytes(&self) -> u64 {
        self.lock().used()
    }

    /// From now on folders that are made may be lost, too, until their parent is flushed.
    pub fn set_loses_dirs(&self, loses_dirs: bool) {
        self.lock().loses_dirs = loses_dirs;
    }

    /// Flushes make durable only what was changed up to this operation, as counted by [`SimCounts::operations`], and what
    /// is changed from now on: for jobs that began then and end now. `None`: all there is.
    pub fn set_flush_horizon(&self, operation: Option<u64>) {
        let mut state = self.lock();
        state.flush_horizon = operation.map(|operation| (operation, state.counts.operations));
    }

    /// While cold, reads that must not wait get nothing.
    pub fn set_cold(&self, cold: bool) {
        self.lock().cold = cold;
    }

    /// While read-only, everything that changes something fails with EROFS.
    pub fn set_read_only(&self, read_only: bool) {
        self.lock().read_only = read_only;
    }

    /// The bytes of a file, as programs see them.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.lock();
        state.files.get(state.names.get(path.as_os_str())?).map(|file| file.seen.clone())
    }

    /// Replaces a file's bytes, on the disk as in the cache: what rot, or a meddling user, does.
    pub fn set_bytes(&self, path: &Path, bytes: Vec<u8>) {
        let mut state = self.lock();
        let number = match state.names.get(path.as_os_str()) {
            Some(number) => *number,
            None => {
                let number = state.create(path);
                state.durable_names.insert(path.into(), number);
                number
            }
        };
        if let Some(parent) = path.parent() {
            state.dirs.extend(parent.ancestors().map(OsString::from));
        }
        let file = File { durable: bytes.clone(), seen: bytes, ..File::default() };
        state.files.insert(number, file);
    }

    /// Flips one bit of a file, on the disk as in the cache.
    pub fn flip_bit(&self, path: &Path, position: u64, bit: u8) {
        if let Some(mut bytes) = self.bytes(path) {
            bytes[position as usize] ^= 1 << bit;
            self.set_bytes(path, bytes);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn crashed() -> io::Error {
    io::Error::other("the simulated machine has crashed")
}

fn system_error(errno: rustix::io::Errno) -> io::Error {
    io::Error::from_raw_os_error(errno.raw_os_error())
}

impl State {
    fn used(&self) -> u64 {
        self.names.values().filter_map(|number| self.files.get(number)).map(File::used).sum()
    }

    fn create(&mut self, path: &Path) -> u64 {
        let number = self.next_file;
        self.next_file += 1;
        self.files.insert(number, File::default());
        self.names.insert(path.into(), number);
        number
    }

    /// Whether a planned fault of this kind comes now.
    fn is_faulty(&mut self, operation: Operation) -> bool {
        let Some(at) = self.faults.iter().position(|(planned, _)| *planned == operation) else { return false };
        if self.faults[at].1 > 0 {
            self.faults[at].1 -= 1;
            return false;
        }
        self.faults.remove(at);
        self.counts.faults += 1;
        true
    }

    /// Counts an operation that changes something; `Err` once crashed, `Ok(true)` where it is the last of this life.
    fn change(&mut self) -> io::Result<bool> {
        if self.crashed {
            return Err(crashed());
        }
        if self.read_only {
            return Err(system_error(rustix::io::Errno::ROFS));
        }
        self.counts.operations += 1;
        match &mut self.crash_in {
            Some(0) => {
                self.crash_in = None;
                self.crashed = true;
                Ok(true)
            }
            Some(left) => {
                *left -= 1;
                Ok(false)
            }
            None => Ok(false),
        }
    }

    /// A change that is done whole or not at all: in a crash, a coin says which.
    fn change_at_once(&mut self, operation: Operation, change: impl FnOnce(&mut Self)) -> io::Result<()> {
        let is_last = self.change()?;
        if self.is_faulty(operation) {
            return Err(system_error(rustix::io::Errno::IO));
        }
        if !is_last {
            change(self);
            return Ok(());
        }
        if self.random.below(2) == 0 {
            change(self);
        }
        Err(crashed())
    }

    fn file(&self, path: &Path) -> io::Result<u64> {
        self.names.get(path.as_os_str()).copied().ok_or_else(|| system_error(rustix::io::Errno::NOENT))
    }

    fn lose_power(&mut self) {
        for file in self.files.values_mut() {
            let (kept, lost) = file.flush_some(&mut self.random);
            file.seen.clone_from(&file.durable);
            file.allocated = 0;
            self.counts.sectors_kept += kept;
            self.counts.sectors_lost += lost;
            self.counts.torn_files += u64::from(kept > 0 && lost > 0);
        }
        let keep_of_8 = [0, 1, 4, 7, 8][self.random.below(5) as usize];
        for change in std::mem::take(&mut self.name_changes) {
            if self.random.below(8) < keep_of_8 {
                apply(&mut self.durable_names, &change);
            } else {
                self.counts.names_lost += 1;
            }
        }
        for dir in std::mem::take(&mut self.new_dirs) {
            if self.random.below(8) >= keep_of_8 {
                self.counts.dirs_lost += 1;
                self.dirs.retain(|lost| !Path::new(lost).starts_with(&dir));
                self.durable_names.retain(|lost, _| !Path::new(lost).starts_with(&dir));
            }
        }
        for (from, to) in std::mem::take(&mut self.dir_renames).into_iter().rev() {
            if self.random.below(8) >= keep_of_8
                && self.dirs.contains(to.as_os_str())
                && !self.dirs.contains(from.as_os_str())
            {
                self.counts.names_lost += 1;
                self.move_dir(&to, &from);
            }
        }
        self.names.clone_from(&self.durable_names);
    }

    /// Gives a folder another name, in both images: what is in it goes with it.
    fn move_dir(&mut self, from: &Path, to: &Path) {
        let move_one = |path: OsString| moved(path.into(), from, to).into_os_string();
        let move_all = |names: &mut Names| {
            *names = std::mem::take(names).into_iter().map(|(path, file)| (move_one(path), file)).collect();
        };
        move_all(&mut self.names);
        move_all(&mut self.durable_names);
        let move_dirs = |dirs: &mut BTreeSet<OsString>| {
            *dirs = std::mem::take(dirs).into_iter().map(move_one).collect();
        };
        move_dirs(&mut self.dirs);
        move_dirs(&mut self.new_dirs);
        let changes = std::mem::take(&mut self.name_changes);
        self.name_changes = changes.into_iter().map(|change| change.moved(from, to)).collect();
    }

    fn rename_dir(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        if self.dirs.contains(to.as_os_str()) || self.names.contains_key(to.as_os_str()) {
            return Err(system_error(rustix::io::Errno::NOTEMPTY));
        }
        self.change_at_once(Operation::Rename, |state| {
            state.move_dir(from, to);
            state.dir_renames.push((from.to_owned(), to.to_owned()));
        })
    }

    /// Lets go of files that nothing can bring back.
    fn drop_nameless(&mut self) {
        let made = self.name_changes.iter().filter_map(|change| match change {
            NameChange::Create { file, .. } => Some(*file),
            NameChange::Remove { .. } | NameChange::Rename { .. } => None,
        });
        let named: BTreeSet<u64> =
            self.names.values().chain(self.durable_names.values()).copied().chain(made).collect();
        self.files.retain(|number, _| named.contains(number));
    }
}

fn apply(names: &mut Names, change: &NameChange) {
    match change {
        NameChange::Create { path, file } => {
            names.insert(path.into(), *file);
        }
        NameChange::Remove { path } => {
            names.remove(path.as_os_str());
        }
        NameChange::Rename { from, to } => {
            // Where the file's making was lost, so is its renaming.
            if let Some(file) = names.remove(from.as_os_str()) {
                names.insert(to.into(), file);
            }
        }
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.lock();
        if state.crashed {
            return Err(crashed());
        }
        if state.is_faulty(Operation::Open) {
            return Err(system_error(rustix::io::Errno::MFILE));
        }
        if state.read_only && mode != OpenMode::Read {
            return Err(system_error(rustix::io::Errno::ROFS));
        }
        if mode == OpenMode::CreateNew {
            if state.names.contains_key(path.as_os_str()) {
                return Err(system_error(rustix::io::Errno::EXIST));
            }
            if !path.parent().is_some_and(|parent| state.dirs.contains(parent.as_os_str())) {
                return Err(system_error(rustix::io::Errno::NOENT));
            }
            if state.is_faulty(Operation::Create) {
                return Err(system_error(rustix::io::Errno::NOSPC));
            }
            state.change_at_once(Operation::Create, |state| {
                let file = state.create(path);
                state.name_changes.push(NameChange::Create { path: path.to_owned(), file });
            })?;
        }
        let number = state.file(path)?;
        Ok(Arc::new(SimFile { disk: self.clone(), number, life: state.life, writable: mode != OpenMode::Read }))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.dirs.contains(path.as_os_str()) {
            return Ok(());
        }
        state.change_at_once(Operation::Rename, |state| {
            // A name that was given up cannot be taken again before that is durable.
            state.dir_renames.retain(|(from, _)| !path.starts_with(from));
            for dir in path.ancestors() {
                if state.dirs.insert(dir.into()) && dir.parent().is_some() && state.loses_dirs {
                    state.new_dirs.insert(dir.into());
                }
            }
        })
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.lock();
        if state.crashed {
            return Err(crashed());
        }
        if !state.dirs.contains(path.as_os_str()) {
            return Err(system_error(rustix::io::Errno::NOENT));
        }
        let entries = state.names.keys().chain(&state.dirs).filter(|entry| is_in(entry, path));
        Ok(entries.filter_map(|entry| Some(Path::new(entry).file_name()?.to_str()?.to_owned())).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.dirs.contains(from.as_os_str()) {
            return state.rename_dir(from, to);
        }
        state.file(from)?;
        state.change_at_once(Operation::Rename, |state| {
            let change = NameChange::Rename { from: from.to_owned(), to: to.to_owned() };
            apply(&mut state.names, &change);
            state.name_changes.push(change);
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.crashed {
            return Err(crashed());
        }
        state.file(path)?;
        state.change_at_once(Operation::Remove, |state| {
            let change = NameChange::Remove { path: path.to_owned() };
            apply(&mut state.names, &change);
            state.name_changes.push(change);
        })
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let names = self.read_dir(path)?;
        if !names.is_empty() {
            return Err(system_error(rustix::io::Errno::NOTEMPTY));
        }
        self.remove_dir_all(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !state.dirs.contains(path.as_os_str()) {
            return Err(system_error(rustix::io::Errno::NOENT));
        }
        state.change_at_once(Operation::Remove, |state| {
            state.names.retain(|name, _| !Path::new(name).starts_with(path));
            state.durable_names.retain(|name, _| !Path::new(name).starts_with(path));
            state.name_changes.retain(|change| {
                let (NameChange::Create { path: name, .. }
                | NameChange::Remove { path: name }
                | NameChange::Rename { to: name, .. }) = change;
                !name.starts_with(path)
            });
            state.dirs.retain(|dir| !Path::new(dir).starts_with(path));
            state.new_dirs.retain(|dir| !Path::new(dir).starts_with(path));
            state.dir_renames.retain(|(_, to)| !to.starts_with(path));
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !state.crashed && !state.dirs.contains(path.as_os_str()) {
            return Err(system_error(rustix::io::Errno::NOENT));
        }
        state.change_at_once(Operation::SyncDir, |state| {
            state.new_dirs.retain(|dir| !is_in(dir, path));
            state.dir_renames.retain(|(_, to)| !is_in(to.as_os_str(), path));
            let changes = std::mem::take(&mut state.name_changes);
            let (flushed, rest) = changes.into_iter().partition::<Vec<_>, _>(|change| change.is_in(path));
            for change in &flushed {
                apply(&mut state.durable_names, change);
            }
            state.name_changes = rest;
        })
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let state = self.lock();
        if state.crashed {
            return Err(crashed());
        }
        Ok(state.names.contains_key(path.as_os_str()) || state.dirs.contains(path.as_os_str()))
    }

    fn file_len(&self, path: &Path) -> io::Result<u64> {
        let state = self.lock();
        if state.crashed {
            return Err(crashed());
        }
        let number = state.file(path)?;
        Ok(state.files[&number].seen.len() as u64)
    }

    fn available_bytes(&self, _path: &Path) -> io::Result<u64> {
        let state = self.lock();
        Ok(state.bytes_max.map_or(u64::MAX / 2, |most| most.saturating_sub(state.used())))
    }

    fn open_logs(&self) -> &Arc<AtomicUsize> {
        &self.open_logs
    }

    fn lock(&self, path: &Path) -> io::Result<Option<DirLock>> {
        let mut state = self.lock();
        if state.crashed {
            return Err(crashed());
        }
        if state.read_only {
            return Err(system_error(rustix::io::Errno::ROFS));
        }
        if !state.locks.insert(path.into()) {
            return Ok(None);
        }
        if !state.names.contains_key(path.as_os_str()) {
            let file = state.create(path);
            state.durable_names.insert(path.into(), file);
        }
        let life = state.life;
        Ok(Some(Box::new(SimLock { disk: self.clone(), path: path.to_owned(), life })))
    }
}

struct SimLock {
    disk: SimDisk,
    path: PathBuf,
    life: u64,
}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut state = self.disk.lock();
        if state.life == self.life {
            state.locks.remove(self.path.as_os_str());
        }
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    number: u64,
    life: u64,
    writable: bool,
}

impl SimFile {
    fn state(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.lock();
        if state.crashed || state.life != self.life {
            return Err(crashed());
        }
        Ok(state)
    }

    fn writable(&self) -> io::Result<MutexGuard<'_, State>> {
        if self.writable { self.state() } else { Err(system_error(rustix::io::Errno::BADF)) }
    }
}

impl State {
    /// The file, also one that has no name any more but is open.
    fn file_mut(&mut self, number: u64) -> &mut File {
        let file = self.files.entry(number).or_default();
        file.operation = self.counts.operations;
        file
    }
}

impl DiskFile for SimFile {
    fn write_vectored_at(&self, parts: &[IoSlice<'_>], position: u64) -> io::Result<()> {
        let mut state = self.writable()?;
        let is_last = state.change()?;
        let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        let position = position as usize;
        if state.is_faulty(Operation::Write) || is_last {
            let mut written = state.random.below(bytes.len() as u64 + 1) as usize;
            if written < bytes.len() {
                // Whole sectors only: not even the page cache tears one (the kernel copies page by page).
                written = ((position + written) / SECTOR_BYTES * SECTOR_BYTES).saturating_sub(position);
            }
            state.file_mut(self.number).write(&bytes[..written], position);
            return Err(if is_last { crashed() } else { system_error(rustix::io::Errno::IO) });
        }
        let end = (position + bytes.len()) as u64;
        let used = state.file_mut(self.number).used();
        let grows = end.saturating_sub(used);
        if state.bytes_max.is_some_and(|most| state.used() + grows > most) {
            let fits = bytes.len().min((used as usize).saturating_sub(position));
            state.file_mut(self.number).write(&bytes[..fits], position);
            return Err(system_error(rustix::io::Errno::NOSPC));
        }
        state.file_mut(self.number).write(&bytes, position);
        Ok(())
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let mut state = self.state()?;
        let asked = position..position + buffer.len() as u64;
        let is_bad = |(number, bytes): &(u64, Range<u64>)| {
            *number == self.number && bytes.start < asked.end && asked.start < bytes.end
        };
        if state.is_faulty(Operation::Read) || state.unreadable.iter().any(is_bad) {
            return Err(system_error(rustix::io::Errno::IO));
        }
        let seen = &state.file_mut(self.number).seen;
        let from = (position as usize).min(seen.len());
        let count = buffer.len().min(seen.len() - from);
        buffer[..count].copy_from_slice(&seen[from..from + count]);
        Ok(count)
    }

    fn read_at_nowait(&self, buffer: &mut [u8], position: u64) -> io::Result<Option<usize>> {
        if self.state()?.cold {
            return Ok(None);
        }
        self.read_at(buffer, position).map(Some)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.state()?.file_mut(self.number).seen.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let number = self.number;
        self.writable()?.change_at_once(Operation::SetLen, |state| state.file_mut(number).set_len(len as usize))
    }

    fn allocate(&self, position: u64, len: u64) -> io::Result<bool> {
        let mut state = self.writable()?;
        if state.read_only {
            return Err(system_error(rustix::io::Errno::ROFS));
        }
        let end = position + len;
        let grows = end.saturating_sub(state.file_mut(self.number).used());
        if state.bytes_max.is_some_and(|most| state.used() + grows > most) {
            return Err(system_error(rustix::io::Errno::NOSPC));
        }
        let file = state.file_mut(self.number);
        file.allocated = file.allocated.max(end);
        Ok(true)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state()?;
        let is_last = state.change()?;
        let number = self.number;
        let fails = state.is_faulty(Operation::Sync);
        let (horizon, since) = state.flush_horizon.unwrap_or((u64::MAX, u64::MAX));
        let State { files, random, .. } = &mut *state;
        let file = files.entry(number).or_default();
        if fails {
            // What could not be written counts as clean, and no later flush will try again.
            file.flush_some(random);
            return Err(system_error(rustix::io::Errno::IO));
        }
        if is_last {
            // How much of it was done shows when the power is back.
            return Err(crashed());
        }
        file.flush(horizon, since);
        Ok(())
    }

    fn map(&self, len: u64) -> io::Result<Bytes> {
        let mut state = self.state()?;
        let seen = &state.file_mut(self.number).seen;
        match seen.get(..len as usize) {
            Some(bytes) => Ok(Bytes::copy_from_slice(bytes)),
            None => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
    }

    fn map_is_live(&self) -> bool {
        false
    }
}
