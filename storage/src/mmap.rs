//! The crate's only `unsafe`: read-only maps of segment files.

// The one module that may: mapping a file cannot be expressed in safe Rust.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use bytes::Bytes;

/// Maps the first `len` bytes of `file`, read-only and shared with the page cache.
///
/// The file must hold at least `len` bytes; [`io::ErrorKind::InvalidInput`] otherwise. What the caller must keep: none
/// of these bytes is cut off the file while the map lives (what the log hands out of a map ends at its high
/// watermark, and it never truncates or rewrites committed bytes; deleting a file leaves its maps alone).
pub(crate) fn map_file(file: &File, len: u64) -> io::Result<Bytes> {
    if len == 0 {
        return Ok(Bytes::new());
    }
    let file_len = file.metadata()?.len();
    let len = usize::try_from(len).map_err(io::Error::other)?;
    if (len as u64) > file_len {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("map of {len} bytes in a file of {file_len}")));
    }
    // SAFETY: the map is read-only and its bytes do not change while anyone can see them: a data directory is locked
    // by one process, which appends behind what it hands out, cuts only uncommitted bytes (never handed out from a
    // map) and writes no byte twice below the high watermark. A sector that cannot be read raises SIGBUS; that is why
    // only the newest two segments, just written, are mapped, and everything else is read with `pread`.
    let map = unsafe { memmap2::MmapOptions::new().len(len).map(file)? };
    Ok(Bytes::from_owner(map))
}
