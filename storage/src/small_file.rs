//! The frame of our own small files (manifests and checkpoints): magic, version, length, body, CRC-32; and their
//! little-endian fields.
//!
//! ```text
//!  0        8         12        16               16 + n      20 + n
//!  +--------+---------+---------+--- ... ---------+-----------+
//!  | magic  | version | n: u32  | body, n bytes   | crc: u32  |   crc = CRC-32 (IEEE) of all before it
//!  +--------+---------+---------+--- ... ---------+-----------+
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use crate::disk::{Disk, DiskFile, OpenMode};

/// What precedes the body.
const HEAD_BYTES: usize = 16;
/// What follows it.
const CRC_BYTES: usize = 4;
/// Above this a length is a lie: the largest checkpoint is far smaller. Not written, and not read.
pub(crate) const FILE_BYTES_MAX: usize = 1 << 30;

/// Why the bytes are no such file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FrameError {
    /// Another kind of file, or torn, or rotten; with what was wrong.
    Invalid(&'static str),
    /// A newer Flowstone wrote it.
    Newer { found: u32 },
}

/// A whole file of these bytes.
pub(crate) fn frame(magic: [u8; 8], version: u32, body: &[u8]) -> Bytes {
    let mut file = BytesMut::with_capacity(HEAD_BYTES + body.len() + CRC_BYTES);
    file.put_slice(&magic);
    file.put_u32_le(version);
    file.put_u32_le(u32::try_from(body.len()).expect("bodies are far below 4 GiB"));
    file.put_slice(body);
    let crc = crc32fast::hash(&file);
    file.put_u32_le(crc);
    file.freeze()
}

/// The body of a file of this magic and at most this version.
pub(crate) fn unframe(magic: [u8; 8], version: u32, file: &[u8]) -> Result<&[u8], FrameError> {
    if file.len() < HEAD_BYTES + CRC_BYTES {
        return Err(FrameError::Invalid("too short"));
    }
    if file[..8] != magic {
        return Err(FrameError::Invalid("wrong magic"));
    }
    let number = |at: usize| u32::from_le_bytes([file[at], file[at + 1], file[at + 2], file[at + 3]]);
    let body_bytes = number(12) as usize;
    if file.len() != HEAD_BYTES + body_bytes + CRC_BYTES {
        return Err(FrameError::Invalid("wrong length"));
    }
    let covered = HEAD_BYTES + body_bytes;
    if crc32fast::hash(&file[..covered]) != number(covered) {
        return Err(FrameError::Invalid("wrong checksum"));
    }
    // After the checksum, so that a flipped bit in the version does not look like a newer program.
    let found = number(8);
    match found {
        0 => Err(FrameError::Invalid("version 0")),
        found if found > version => Err(FrameError::Newer { found }),
        _ => Ok(&file[HEAD_BYTES..covered]),
    }
}

/// Bytes of the file that `bytes` begins with, by its own length; at most `bytes.len()`.
pub(crate) fn framed_bytes(bytes: &[u8]) -> Result<usize, FrameError> {
    let length = bytes.get(12..HEAD_BYTES).ok_or(FrameError::Invalid("too short"))?;
    let body_bytes = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
    let whole = HEAD_BYTES + body_bytes + CRC_BYTES;
    if whole <= bytes.len() { Ok(whole) } else { Err(FrameError::Invalid("wrong length")) }
}

/// Reads a whole small file.
pub(crate) fn read_file(disk: &Arc<dyn Disk>, path: &Path) -> io::Result<Bytes> {
    let file = disk.open(path, OpenMode::Read)?;
    let len = usize::try_from(file.len()?).map_err(io::Error::other)?;
    if len > FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{len} bytes are too many for this file")));
    }
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(Bytes::from(bytes))
}

/// Replaces the file at `path`: after a crash it has the old bytes or the new ones. Durable when this returns.
/// Returns the new file.
pub(crate) fn replace_file(disk: &Arc<dyn Disk>, path: &Path, bytes: &[u8]) -> io::Result<Arc<dyn DiskFile>> {
    if bytes.len() > FILE_BYTES_MAX {
        // The reader would refuse it, and what it replaces would be gone.
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} bytes are too many", bytes.len())));
    }
    let new = temporary_path(path);
    match disk.remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = disk.open(&new, OpenMode::CreateNew)?;
    file.write_at(bytes, 0)?;
    file.sync_data()?;
    // Closed before it is renamed, and opened by its new name: a disk may close it and open it again by name.
    drop(file);
    disk.rename(&new, path)?;
    disk.sync_dir(path.parent().unwrap_or(Path::new(".")))?;
    disk.open(path, OpenMode::ReadWrite)
}

/// What a file is called until it is whole; swept at the next opening.
pub(crate) fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(TEMPORARY_SUFFIX);
    path.with_file_name(name)
}

/// Ends the name of a file that is not whole yet.
pub(crate) const TEMPORARY_SUFFIX: &str = ".new";

/// Takes fields off a body; every length is checked against what is left before it is believed.
#[derive(Debug)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], FrameError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(FrameError::Invalid("body too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(FrameError::Invalid("body too short"))?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FrameError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn i32(&mut self) -> Result<i32, FrameError> {
        self.array().map(i32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FrameError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&mut self) -> Result<i64, FrameError> {
        self.array().map(i64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self) -> Result<u128, FrameError> {
        self.array().map(u128::from_le_bytes)
    }

    /// A length as `u32`, then that many bytes.
    pub(crate) fn sized(&mut self) -> Result<&'a [u8], FrameError> {
        let len = self.u32()? as usize;
        self.take(len)
    }

    pub(crate) fn end(self) -> Result<(), FrameError> {
        if self.0.is_empty() { Ok(()) } else { Err(FrameError::Invalid("bytes after the last field")) }
    }
}

/// Appends a length as `u32`, then the bytes.
pub(crate) fn put_sized(body: &mut BytesMut, bytes: &[u8]) {
    body.put_u32_le(u32::try_from(bytes.len()).expect("fields are far below 4 GiB"));
    body.put_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_back_and_every_flipped_bit_is_found() {
        let file = frame(*b"FLOWTEST", 3, b"body");
        assert_eq!(unframe(*b"FLOWTEST", 3, &file), Ok(&b"body"[..]));
        assert_eq!(unframe(*b"FLOWTEST", 2, &file), Err(FrameError::Newer { found: 3 }));
        for bit in 0..file.len() * 8 {
            let mut flipped = file.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(unframe(*b"FLOWTEST", 3, &flipped), Err(FrameError::Invalid(_))), "bit {bit}");
        }
        for len in 0..file.len() {
            assert!(matches!(unframe(*b"FLOWTEST", 3, &file[..len]), Err(FrameError::Invalid(_))), "length {len}");
        }
    }
}
