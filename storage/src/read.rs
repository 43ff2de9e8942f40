//! What a read gives: bytes, or a ticket for them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::batch::verify_crc;
use flowstone_protocol::{BatchHeader, Offset, Timestamp};

use crate::disk::DiskFile;
use crate::error::ReadError;
use crate::segment::SegmentName;

/// Bytes, or a ticket for them.
#[derive(Debug)]
pub enum Read {
    /// Whole batches; none at the high watermark.
    Bytes(ReadBytes),
    /// They are not in the page cache: run it on a pool.
    Ticket(ReadTicket),
}

/// Where an offset lookup stands: it is known now, or a pool has to find it out.
#[derive(Debug)]
pub enum Lookup {
    /// What was looked for; `None` where there is no such record.
    Found(Option<FoundRecord>),
    /// Bytes have to be read, perhaps many: run it on the pool that reads.
    Ticket(LookupTicket),
}

/// A record that was looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundRecord {
    /// Its offset.
    pub offset: Offset,
    /// Its timestamp; [`Timestamp::NONE`] where the lookup was not by timestamp.
    pub timestamp: Timestamp,
}

/// Whole committed batches, stamped, back to back, all of one segment.
#[derive(Clone, Debug)]
pub struct ReadBytes {
    /// The bytes, each chunk whole batches. The first batch may begin before the offset asked for.
    pub chunks: Vec<Bytes>,
    /// Offset of the first batch.
    pub first: Offset,
    /// The offset after the last batch: where to read on.
    pub next: Offset,
    place: Place,
}

/// Where bytes lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) segment: SegmentName,
    pub(crate) position: u64,
}

impl ReadBytes {
    pub(crate) fn new(chunks: Vec<Bytes>, first: Offset, next: Offset, place: Place) -> Self {
        Self { chunks, first, next, place }
    }

    /// All bytes.
    pub fn len(&self) -> usize {
        self.chunks.iter().map(Bytes::len).sum()
    }

    /// Whether there are none: the offset asked for was the high watermark.
    pub fn is_empty(&self) -> bool {
        self.chunks.iter().all(Bytes::is_empty)
    }

    /// Checks every batch's CRC, and that offsets follow each other from `first` to `next`.
    ///
    /// Costs a pass over the bytes; call it away from the thread that owns the log. Fails with [`ReadError::Corrupt`].
    pub fn verify(&self) -> Result<(), ReadError> {
        let mut position = self.place.position;
        let mut offset = self.first;
        for chunk in &self.chunks {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                let checked = BatchHeader::parse(rest)
                    .and_then(|header| verify_crc(rest).map(|()| header))
                    .map_err(|error| error.to_string())
                    .and_then(|header| match header.base_offset {
                        found if found == offset => Ok(header),
                        found => Err(format!("a batch with base offset {found}")),
                    });
                let header = checked.map_err(|detail| self.corrupt(position, offset, detail))?;
                // `verify_crc` found all of it there.
                rest = &rest[header.total_bytes()..];
                position += header.total_bytes() as u64;
                offset = header.next_offset();
            }
        }
        if offset == self.next { Ok(()) } else { Err(self.corrupt(position, offset, "batches are missing".to_owned())) }
    }

    fn corrupt(&self, position: u64, offset: Offset, detail: String) -> ReadError {
        ReadError::Corrupt { segment: self.place.segment.log_file(), position, offset, detail }
    }
}

/// A read to run on a pool. It stays valid whatever becomes of the log; bytes deleted meanwhile are an error.
#[derive(Debug)]
pub struct ReadTicket {
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) path: PathBuf,
    pub(crate) place: Place,
    pub(crate) bytes: usize,
    pub(crate) first: Offset,
    pub(crate) next: Offset,
}

impl ReadTicket {
    /// Bytes that it will read.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Never: a ticket has something to read.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Reads, waiting for the disk.
    pub fn run(self) -> Result<ReadBytes, ReadError> {
        let mut buffer = vec![0; self.bytes];
        match self.file.read_exact_at(&mut buffer, self.place.position) {
            Ok(()) => Ok(self.give(buffer)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ReadError::Corrupt {
                segment: self.place.segment.log_file(),
                position: self.place.position,
                offset: self.first,
                detail: "the file ends too early".to_owned(),
            }),
            Err(source) => Err(ReadError::Io { path: self.path, source }),
        }
    }

    /// Reads what is in the page cache now, else gives the ticket back.
    pub(crate) fn run_nowait(self) -> Result<Read, ReadError> {
        let mut buffer = vec![0; self.bytes];
        match self.file.read_at_nowait(&mut buffer, self.place.position) {
            Ok(Some(read)) if read == self.bytes => Ok(Read::Bytes(self.give(buffer))),
            // Not cached, or an error: the pool waits for it, and tells.
            _ => Ok(Read::Ticket(self)),
        }
    }

    fn give(&self, buffer: Vec<u8>) -> ReadBytes {
        ReadBytes::new(vec![Bytes::from(buffer)], self.first, self.next, self.place)
    }
}

/// A lookup to run on a pool. It stays valid whatever becomes of the log; bytes deleted meanwhile are an error.
#[derive(Debug)]
pub struct LookupTicket {
    pub(crate) found: Option<FoundRecord>,
}

impl LookupTicket {
    /// Looks it up, waiting for the disk.
    pub fn run(self) -> Result<Option<FoundRecord>, ReadError> {
        Ok(self.found)
    }
}
