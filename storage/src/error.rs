//! What can go wrong outside: each error says where, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use flowstone_protocol::{Offset, RaftIndex};

use crate::slots::NoSlot;

/// A failure of a write, a flush or a read that the log needs for itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The file system failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "open", "flush".
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no room for what was to be written; nothing was written, and the log is as it was.
    #[error(
        "no room on the disk that holds {}: {needed_bytes} bytes wanted, {available_bytes} available; free some, or lower the retention of topics",
        path.display()
    )]
    DiskFull {
        /// The replica's folder.
        path: PathBuf,
        /// Bytes wanted, what is kept for emergencies included.
        needed_bytes: u64,
        /// Bytes that the file system had.
        available_bytes: u64,
    },
    /// An earlier write or flush failed; nothing more is written until the log is opened anew.
    #[error("the log in {} takes no more writes: {reason}; it has to be opened anew", path.display())]
    Poisoned {
        /// The replica's folder.
        path: PathBuf,
        /// The first failure.
        reason: String,
    },
    /// Stored bytes are not what was written.
    #[error("corrupt bytes in {segment} at position {position} (offset {offset}): {detail}")]
    Corrupt {
        /// The file's name.
        segment: String,
        /// Byte position within the file.
        position: u64,
        /// The offset stored there.
        offset: Offset,
        /// What was wrong.
        detail: String,
    },
    /// What was to be appended cannot be part of this log; nothing was written.
    #[error("entry {index} refused: {detail}")]
    Refused {
        /// The entry.
        index: RaftIndex,
        /// Why.
        detail: String,
    },
    /// A newer Flowstone wrote a batch that this one can not judge; it is as it was written.
    #[error(
        "the log in {} has a control batch of type {ctype} at offset {offset}, which a newer Flowstone wrote; start that one",
        path.display()
    )]
    NewerBatch {
        /// The replica's folder.
        path: PathBuf,
        /// Its offset.
        offset: Offset,
        /// The type that is not known.
        ctype: i16,
    },
    /// A replica cannot be made of what was pulled for it; nothing that was there before has changed.
    #[error("cannot install a replica in {}: {detail}; pull it from another replica", path.display())]
    NotInstallable {
        /// The folder that it would take.
        path: PathBuf,
        /// Why not.
        detail: String,
    },
    /// The entry is not in the log (any more).
    #[error("no entry {index}: the log holds {first} to {last}")]
    NoEntry {
        /// The entry asked for.
        index: RaftIndex,
        /// First entry held.
        first: RaftIndex,
        /// Last entry held.
        last: RaftIndex,
    },
}

impl StorageError {
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// Whether the disk being full is the cause.
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::DiskFull { .. } => true,
            Self::Io { source, .. } => crate::disk::is_disk_full(source),
            _ => false,
        }
    }
}

/// Why a replica's log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file system failed; opening again may succeed.
    #[error("cannot {action} {}: {source}{}", path.display(), hint(source))]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something that this replica answered for is gone or unreadable. Nothing was changed on disk.
    #[error("replica in {} is quarantined at offset {offset}: {detail}; {remedy}", path.display())]
    Quarantine {
        /// The replica's folder.
        path: PathBuf,
        /// The first offset that is gone or unreadable.
        offset: Offset,
        /// What was found.
        detail: String,
        /// What an operator can do.
        remedy: String,
    },
    /// A newer Flowstone wrote this.
    #[error("{} has format version {found}, this program knows up to {known}; start a newer Flowstone", path.display())]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version known here.
        known: u32,
    },
}

impl OpenError {
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

impl OpenError {
    /// What an opening did on the way, failed: it may succeed the next time.
    pub(crate) fn of_storage(error: StorageError) -> Self {
        match error {
            StorageError::Io { action, path, source } => Self::Io { action, path, source },
            other => Self::Io { action: "open", path: PathBuf::new(), source: io::Error::other(other) },
        }
    }
}

/// What a user can do about the commoner failures of a file system.
fn hint(source: &io::Error) -> &'static str {
    const EMFILE: i32 = rustix::io::Errno::MFILE.raw_os_error();
    const ENFILE: i32 = rustix::io::Errno::NFILE.raw_os_error();
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => " (the file system is mounted read-only: remount it writable)",
        io::ErrorKind::PermissionDenied => " (give this user the right to read and write it)",
        io::ErrorKind::StorageFull => " (free some room on this disk)",
        _ if matches!(source.raw_os_error(), Some(EMFILE | ENFILE)) => {
            " (no file descriptors left: raise the limit, e.g. `ulimit -n 65536`)"
        }
        _ => "",
    }
}

/// Why a read has no bytes to give.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Nothing is, or ever will be, readable there as the log stands.
    #[error("offset {offset} is out of range: {log_start} to {high_watermark} can be read")]
    OutOfRange {
        /// The offset asked for.
        offset: Offset,
        /// First offset that can be read.
        log_start: Offset,
        /// One past the last committed offset.
        high_watermark: Offset,
    },
    /// Stored bytes are not what was written.
    #[error("corrupt bytes in {segment} at position {position} (offset {offset}): {detail}")]
    Corrupt {
        /// The file's name.
        segment: String,
        /// Byte position of the batch within the file.
        position: u64,
        /// The offset expected there.
        offset: Offset,
        /// What was wrong.
        detail: String,
    },
    /// The file system failed.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl From<StorageError> for ReadError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::Corrupt { segment, position, offset, detail } => {
                Self::Corrupt { segment, position, offset, detail }
            }
            StorageError::Io { path, source, .. } => Self::Io { path, source },
            // The other errors are of writes; a read's own lookups never leave the log.
            other => Self::Io { path: PathBuf::new(), source: io::Error::other(other) },
        }
    }
}

/// On a pool nothing is "not cached": who asks there waits.
impl From<NoSlot> for ReadError {
    fn from(error: NoSlot) -> Self {
        StorageError::from(error).into()
    }
}

impl From<NoSlot> for StorageError {
    fn from(error: NoSlot) -> Self {
        match error {
            NoSlot::Failed(error) => error,
            NoSlot::NotCached => unreachable!("a lookup that waits was told not to"),
        }
    }
}
