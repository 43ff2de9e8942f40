//! The only door to files: a trait for the log's needs, and the real disk behind it.
//!
//! Everything in this crate takes an `Arc<dyn Disk>`, so that [`SimDisk`](crate::sim_disk::SimDisk) can stand in and
//! tear, forget and fail.

use std::any::Any;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

use crate::mmap;

/// How [`Disk::open`] opens a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, to read.
    Read,
    /// An existing file, to read and write.
    ReadWrite,
    /// A file that must not exist yet, to read and write.
    CreateNew,
}

/// Held while this process owns a directory; dropping it gives the directory up.
pub type DirLock = Box<dyn Any + Send + Sync>;

/// A file system, as far as the log needs one.
pub trait Disk: Send + Sync + Debug {
    /// Opens or creates a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;
    /// Makes a directory and its parents; fine if it exists.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory, in no order.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Renames a file, replacing what has the new name; or a directory, where nothing has it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory that is empty.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory and all it holds.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Makes the directory's entries durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Whether something has this path.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// The length of a file, without opening it.
    fn file_len(&self, path: &Path) -> io::Result<u64>;
    /// Bytes that may still be written on the file system that holds `path`.
    fn available_bytes(&self, path: &Path) -> io::Result<u64>;
    /// Counts the logs that are open on this disk: the room kept free for them grows with their number.
    fn open_logs(&self) -> &Arc<AtomicUsize>;
    /// Takes the file at `path` (made if missing) as this process's lock; `None` when another process has it.
    fn lock(&self, path: &Path) -> io::Result<Option<DirLock>>;
}

/// An open file. All positions and lengths are bytes.
pub trait DiskFile: Send + Sync + Debug {
    /// Writes all parts, one after another, from `position` on. An error may leave any part of it written.
    fn write_vectored_at(&self, parts: &[IoSlice<'_>], position: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `position`.
    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.write_vectored_at(&[IoSlice::new(bytes)], position)
    }

    /// Reads up to `buffer.len()` bytes; fewer only at the file's end.
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize>;

    /// Fills `buffer`, or fails with [`io::ErrorKind::UnexpectedEof`].
    fn read_exact_at(&self, buffer: &mut [u8], position: u64) -> io::Result<()> {
        match self.read_at(buffer, position)? {
            read if read == buffer.len() => Ok(()),
            read => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{read} of {} bytes at {position}", buffer.len()),
            )),
        }
    }

    /// Like `read_at`, but `None` instead of waiting for the disk.
    fn read_at_nowait(&self, buffer: &mut [u8], position: u64) -> io::Result<Option<usize>>;

    /// The file's length.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or extends (with zeros) the file; room allocated past `len` is given back.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Takes room for `len` bytes from `position` on without changing the file's length, so that writing there cannot
    /// fail for want of room. `Ok(false)` where the file system has no such thing.
    fn allocate(&self, position: u64, len: u64) -> io::Result<bool>;

    /// Makes the file's bytes and length durable. After an error nothing is known about what was not durable before.
    fn sync_data(&self) -> io::Result<()>;

    /// The first `len` bytes, read-only, without copying them where the disk can. See the contract in `mmap.rs`:
    /// bytes that are handed out must neither change nor be cut off.
    fn map(&self, len: u64) -> io::Result<Bytes>;

    /// Whether bytes written later show in maps made before.
    fn map_is_live(&self) -> bool;
}

/// Whether an error says that the disk, or the user's share of it, is full.
pub fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The file system of this machine.
///
/// Open files are capped: past the cap, those used longest ago are closed and opened again when needed. A file with
/// unflushed writes is never closed by this, so that no failed write-back goes unseen.
#[derive(Clone, Debug)]
pub struct RealDisk {
    open_files: Arc<OpenFiles>,
    open_logs: Arc<AtomicUsize>,
}

impl RealDisk {
    /// A disk that keeps at most about `open_files_max` files open.
    pub fn new(open_files_max: usize) -> Self {
        Self {
            open_files: Arc::new(OpenFiles {
                open_files_max: open_files_max.max(8),
                open: AtomicUsize::new(0),
                make_room_at: AtomicUsize::new(open_files_max.max(8)),
                clock: AtomicU64::new(0),
                files: Mutex::new(Vec::new()),
            }),
            open_logs: Arc::default(),
        }
    }

    /// Half of the process's limit on open files, the other half being for sockets.
    pub fn with_process_limit() -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1 << 20);
        Self::new(usize::try_from(limit / 2).unwrap_or(1 << 19).min(1 << 19))
    }

    /// How many files are open now.
    pub fn open_files(&self) -> usize {
        self.open_files.open.load(Ordering::Relaxed)
    }
}

impl Default for RealDisk {
    fn default() -> Self {
        Self::with_process_limit()
    }
}

/// The registry behind the cap.
#[derive(Debug)]
struct OpenFiles {
    open_files_max: usize,
    /// Files with a descriptor.
    open: AtomicUsize,
    /// How many must be open before files are closed the next time: the cap, or more where little could be closed.
    make_room_at: AtomicUsize,
    /// Counts uses; a file's last reading of it orders the files by age.
    clock: AtomicU64,
    /// All files handed out and not yet dropped. Held only while files are registered or closed; nothing in it waits.
    files: Mutex<Vec<Weak<RealFile>>>,
}

impl OpenFiles {
    fn register(self: &Arc<Self>, file: &Arc<RealFile>) {
        let mut files = lock(&self.files);
        // Dead entries are dropped when they could be half of all, so that this is constant time on average.
        if files.len() == files.capacity() {
            files.retain(|file| file.strong_count() > 0);
        }
        files.push(Arc::downgrade(file));
    }

    /// Closes the files used longest ago, an eighth of the cap at once so that this is rare.
    fn make_room(&self) {
        let open = self.open.load(Ordering::Relaxed);
        if open < self.make_room_at.load(Ordering::Relaxed) {
            return;
        }
        let step = self.open_files_max.div_ceil(8);
        self.close_oldest((open + step).saturating_sub(self.open_files_max).max(1));
        // Where most files are dirty little can be closed, and looking at all of them at each opening would find no more.
        let open = self.open.load(Ordering::Relaxed);
        self.make_room_at.store(self.open_files_max.max(open + step / 2), Ordering::Relaxed);
    }

    /// Closes `count` files that can be closed, those used longest ago.
    fn close_oldest(&self, count: usize) {
        let files: Vec<Arc<RealFile>> = lock(&self.files).iter().filter_map(Weak::upgrade).collect();
        let mut candidates: Vec<(u64, Arc<RealFile>)> = files
            .into_iter()
            .filter(|file| !file.dirty.load(Ordering::Acquire) && lock(&file.descriptor).is_some())
            .map(|file| (file.last_use.load(Ordering::Relaxed), file))
            .collect();
        if count < candidates.len() {
            candidates.select_nth_unstable_by_key(count, |(last_use, _)| *last_use);
        }
        // Some are in use: then newer ones go.
        let mut closed = 0;
        for (_, file) in candidates {
            if closed >= count {
                break;
            }
            closed += usize::from(file.close_if_clean());
        }
    }

    /// Opens something; where the process has no descriptors left, a few of our own are closed for it: a flush has just
    /// made some closable, and a flush that fails for want of a number would end a replica.
    fn open(&self, open: impl Fn() -> io::Result<File>) -> io::Result<File> {
        self.make_room();
        match open() {
            Err(error) if is_out_of_descriptors(&error) => {
                self.close_oldest(self.open_files_max.div_ceil(8));
                open()
            }
            opened => opened,
        }
    }
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    [Errno::MFILE, Errno::NFILE].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// A file that is opened when used, and may be closed in between.
#[derive(Debug)]
struct RealFile {
    path: PathBuf,
    writable: bool,
    open_files: Arc<OpenFiles>,
    last_use: AtomicU64,
    /// Set by a write, cleared by a flush: while set the descriptor stays open, because a failed write-back is
    /// reported only to descriptors that were open when it happened.
    dirty: AtomicBool,
    /// The descriptor. Held while it is opened or cloned; not while bytes move.
    descriptor: Mutex<Option<Arc<File>>>,
}

impl RealFile {
    fn file(&self) -> io::Result<Arc<File>> {
        self.last_use.store(self.open_files.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if let Some(file) = lock(&self.descriptor).as_ref() {
            return Ok(Arc::clone(file));
        }
        let opened = self.open_files.open(|| OpenOptions::new().read(true).write(self.writable).open(&self.path))?;
        let mut descriptor = lock(&self.descriptor);
        if let Some(file) = descriptor.as_ref() {
            // Another use of it was faster.
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(opened);
        self.open_files.open.fetch_add(1, Ordering::Relaxed);
        *descriptor = Some(Arc::clone(&file));
        Ok(file)
    }

    /// Changes the file.
    fn change(&self, change: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let file = self.file()?;
        self.dirty.store(true, Ordering::Release);
        let changed = change(&file);
        // Again: a flush that began in the middle of it has cleared this, and may not cover it. Before the descriptor
        // is given back, so that nobody finds it idle and clean.
        self.dirty.store(true, Ordering::Release);
        changed
    }

    fn close_if_clean(&self) -> bool {
        let mut descriptor = lock(&self.descriptor);
        // A use in flight holds a second reference; one that writes may not have set `dirty` yet.
        let idle = descriptor.as_ref().is_some_and(|file| Arc::strong_count(file) == 1);
        if !idle || self.dirty.load(Ordering::Acquire) {
            return false;
        }
        *descriptor = None;
        self.open_files.open.fetch_sub(1, Ordering::Relaxed);
        true
    }
}

impl Drop for RealFile {
    fn drop(&mut self) {
        if lock(&self.descriptor).is_some() {
            self.open_files.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Parts that one `pwritev` takes (`IOV_MAX`).
const PARTS_MAX: usize = 1024;

impl DiskFile for RealFile {
    fn write_vectored_at(&self, parts: &[IoSlice<'_>], position: u64) -> io::Result<()> {
        self.change(|file| write_parts(file, parts, position))
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let file = self.file()?;
        let mut read = 0;
        while read < buffer.len() {
            let rest = &mut buffer[read..];
            match retry_interrupted(|| rustix::io::pread(&*file, &mut *rest, position + read as u64))? {
                0 => break,
                count => read += count,
            }
        }
        Ok(read)
    }

    fn read_at_nowait(&self, buffer: &mut [u8], position: u64) -> io::Result<Option<usize>> {
        let file = self.file()?;
        let mut read = 0;
        while read < buffer.len() {
            let mut rest = [IoSliceMut::new(&mut buffer[read..])];
            match rustix::io::preadv2(&*file, &mut rest, position + read as u64, ReadWriteFlags::NOWAIT) {
                Ok(0) => break,
                Ok(count) => read += count,
                Err(Errno::INTR) => {}
                // AGAIN: not cached. NOTSUP: this file system cannot tell, so it may wait.
                Err(Errno::AGAIN | Errno::NOTSUP) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(read))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file()?.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(|file| file.set_len(len))
    }

    fn allocate(&self, position: u64, len: u64) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let allocate =
            |file: &File| retry_interrupted(|| rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, position, len));
        match self.change(allocate) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(Errno::NOTSUP.raw_os_error()) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        let file = self.file()?;
        // Cleared first: a write during the flush may not be covered by it, and sets it again.
        self.dirty.store(false, Ordering::Release);
        let flushed = file.sync_data();
        if flushed.is_err() {
            self.dirty.store(true, Ordering::Release);
        }
        flushed
    }

    fn map(&self, len: u64) -> io::Result<Bytes> {
        mmap::map_file(&*self.file()?, len)
    }

    fn map_is_live(&self) -> bool {
        true
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let writable = mode != OpenMode::Read;
        let mut options = OpenOptions::new();
        options.read(true).write(writable).create_new(mode == OpenMode::CreateNew);
        let file = self.open_files.open(|| options.open(path))?;
        let file = Arc::new(RealFile {
            path: path.to_owned(),
            writable,
            open_files: Arc::clone(&self.open_files),
            last_use: AtomicU64::new(self.open_files.clock.fetch_add(1, Ordering::Relaxed)),
            dirty: AtomicBool::new(false),
            descriptor: Mutex::new(Some(Arc::new(file))),
        });
        self.open_files.open.fetch_add(1, Ordering::Relaxed);
        self.open_files.register(&file);
        Ok(file)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        // A parent may be removed as empty by another thread before its child is made: then it is made again.
        let mut left = 8;
        loop {
            match fs::create_dir_all(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && left > 0 => left -= 1,
                made => return made,
            }
        }
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.open_files.open(|| File::open(path))?.sync_all()
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        fs::exists(path)
    }

    fn file_len(&self, path: &Path) -> io::Result<u64> {
        Ok(fs::metadata(path)?.len())
    }

    fn available_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn open_logs(&self) -> &Arc<AtomicUsize> {
        &self.open_logs
    }

    fn lock(&self, path: &Path) -> io::Result<Option<DirLock>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

/// Writes all parts, one after another.
fn write_parts(file: &File, parts: &[IoSlice<'_>], position: u64) -> io::Result<()> {
    let mut position = position;
    for parts in parts.chunks(PARTS_MAX) {
        let whole: usize = parts.iter().map(|part| part.len()).sum();
        let mut written = retry_interrupted(|| rustix::io::pwritev(file, parts, position))?;
        // A short write is rare (2 GiB, a signal, a disk filling up): the rest goes part by part.
        if written < whole {
            let mut skip = written;
            for part in parts {
                let mut rest = &part[skip.min(part.len())..];
                skip = skip.saturating_sub(part.len());
                while !rest.is_empty() {
                    let at = position + written as u64;
                    match retry_interrupted(|| rustix::io::pwrite(file, rest, at))? {
                        0 => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                        count => {
                            written += count;
                            rest = &rest[count..];
                        }
                    }
                }
            }
        }
        position += whole as u64;
    }
    Ok(())
}

fn retry_interrupted<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Ok(value) => return Ok(value),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A panic while one of these locks was held leaves nothing half done, so poisoning means nothing here.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
