//! What a read gives: bytes, or a ticket for them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::batch::verify_crc;
use flowstone_protocol::record::records;
use flowstone_protocol::{BatchError, BatchHeader, HEADER_BYTES, Offset, Timestamp};

use crate::disk::DiskFile;
use crate::error::ReadError;
use crate::segment::SegmentName;
use crate::slots::{Extent, SealedFiles, View, WaitingSlots};

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

impl FoundRecord {
    pub(crate) fn at(offset: Offset) -> Self {
        Self { offset, timestamp: Timestamp::NONE }
    }
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

    pub(crate) fn of_extent(segment: SegmentName, extent: Extent, bytes: Bytes) -> Self {
        Self::new(vec![bytes], extent.first, extent.next, Place { segment, position: extent.position })
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
pub struct ReadTicket(Ticket);

#[derive(Debug)]
enum Ticket {
    /// It is known where the bytes lie.
    Bytes { source: Source, extent: Extent },
    /// The index has to be asked first.
    Search { files: Arc<SealedFiles>, view: View, from: Offset, bytes_max: usize, below: Offset },
}

/// A segment's log file.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Sealed(Arc<SealedFiles>),
    Active { name: SegmentName, path: PathBuf, file: Arc<dyn DiskFile> },
}

impl Source {
    fn name(&self) -> SegmentName {
        match self {
            Self::Sealed(files) => files.name,
            Self::Active { name, .. } => *name,
        }
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Sealed(files) => files.log_path(),
            Self::Active { path, .. } => path.clone(),
        }
    }

    pub(crate) fn file(&self) -> Result<Arc<dyn DiskFile>, ReadError> {
        match self {
            Self::Sealed(files) => files.log().map_err(ReadError::from),
            Self::Active { file, .. } => Ok(Arc::clone(file)),
        }
    }

    fn file_now(&self) -> Option<Arc<dyn DiskFile>> {
        match self {
            Self::Sealed(files) => files.log_now(),
            Self::Active { file, .. } => Some(Arc::clone(file)),
        }
    }

    pub(crate) fn read(
        &self,
        file: &dyn DiskFile,
        buffer: &mut [u8],
        position: u64,
        offset: Offset,
    ) -> Result<(), ReadError> {
        file.read_exact_at(buffer, position).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => self.corrupt(position, offset, "the file ends too early".to_owned()),
            _ => ReadError::Io { path: self.path(), source },
        })
    }

    pub(crate) fn corrupt(&self, position: u64, offset: Offset, detail: String) -> ReadError {
        ReadError::Corrupt { segment: self.name().log_file(), position, offset, detail }
    }
}

impl ReadTicket {
    pub(crate) fn search(files: Arc<SealedFiles>, view: View, from: Offset, bytes_max: usize, below: Offset) -> Self {
        Self(Ticket::Search { files, view, from, bytes_max, below })
    }

    pub(crate) fn extent(source: Source, extent: Extent) -> Self {
        Self(Ticket::Bytes { source, extent })
    }

    /// Reads, waiting for the disk.
    pub fn run(self) -> Result<ReadBytes, ReadError> {
        let (source, extent) = match self.0 {
            Ticket::Bytes { source, extent } => (source, extent),
            Ticket::Search { files, view, from, bytes_max, below } => {
                let extent = view.extent(&mut WaitingSlots::of(&files), from, bytes_max, below)?;
                (Source::Sealed(files), extent)
            }
        };
        let mut buffer = vec![0; extent.bytes];
        source.read(&*source.file()?, &mut buffer, extent.position, extent.first)?;
        Ok(ReadBytes::of_extent(source.name(), extent, Bytes::from(buffer)))
    }
}

/// Reads what is in the page cache now, else gives a ticket.
pub(crate) fn read_now(source: Source, extent: Extent) -> Read {
    if let Some(file) = source.file_now() {
        let mut buffer = vec![0; extent.bytes];
        if matches!(file.read_at_nowait(&mut buffer, extent.position), Ok(Some(read)) if read == extent.bytes) {
            return Read::Bytes(ReadBytes::of_extent(source.name(), extent, Bytes::from(buffer)));
        }
    }
    // Not cached, or an error: the pool waits for it, and tells.
    Read::Ticket(ReadTicket(Ticket::Bytes { source, extent }))
}

/// Most that one batch may decompress to when a timestamp is looked up in it, or it is compacted: one that comes to more counts
/// as damaged.
pub const DECOMPRESSED_BYTES_MAX: usize = 256 << 20;

/// A lookup to run on a pool. It stays valid whatever becomes of the log; bytes deleted meanwhile are an error.
#[derive(Debug)]
pub struct LookupTicket(pub(crate) Question);

#[derive(Debug)]
pub(crate) enum Question {
    /// The first record at or behind offset `from` of at least this time, in one of these segments.
    Timestamp { timestamp: Timestamp, from: Offset, spans: Vec<Span> },
    /// The `n`th data record before `to`, which lies in the last of these segments, but not before `from`.
    RecordsFromEnd { n: u64, from: Offset, to: Offset, segments: Vec<(Arc<SealedFiles>, View, u64)> },
}

/// Where a segment's committed batches are to be looked through.
#[derive(Debug)]
pub(crate) enum Span {
    /// Its index says where a batch so late comes first.
    Sealed { files: Arc<SealedFiles>, view: View },
    /// From a batch on up to the last committed one.
    Active { source: Source, position: u64, offset: Offset, end: u64 },
}

impl LookupTicket {
    /// Looks it up, waiting for the disk.
    pub fn run(self) -> Result<Option<FoundRecord>, ReadError> {
        match self.0 {
            Question::Timestamp { timestamp, from, spans } => {
                for span in spans {
                    let (source, position, offset, end) = match span {
                        Span::Active { source, position, offset, end } => (source, position, offset, end),
                        Span::Sealed { files, view } => {
                            let slots = &mut WaitingSlots::of(&files);
                            let Some((position, offset)) = view.first_reaching(slots, timestamp, from)? else {
                                continue;
                            };
                            let end = view.readable_end(slots)?;
                            (Source::Sealed(files), position, offset, end)
                        }
                    };
                    if let Some(found) = first_record(&source, position, offset, end, timestamp, from)? {
                        return Ok(Some(found));
                    }
                }
                Ok(None)
            }
            Question::RecordsFromEnd { n, from, to, segments } => {
                let mut before = 0;
                if let Some(((files, view, _), earlier)) = segments.split_last() {
                    before = earlier.iter().map(|(_, _, records)| records).sum::<u64>();
                    before += view.records_before(&mut WaitingSlots::of(files), to, Some(files))?;
                }
                let Some(mut before) = before.checked_sub(n) else { return Ok(Some(FoundRecord::at(from))) };
                for (files, view, records) in &segments {
                    if before < *records {
                        let offset = view.offset_of_record(&mut WaitingSlots::of(files), before, Some(files))?;
                        return Ok(Some(FoundRecord::at(offset.max(from))));
                    }
                    before -= records;
                }
                Ok(Some(FoundRecord::at(to)))
            }
        }
    }
}

/// How many data records lie between two offsets.
#[derive(Debug)]
pub enum RecordCount {
    /// So many.
    Exact(u64),
    /// About so many, as if they were spread evenly within a segment whose index is not at hand; and who counts them.
    About(u64, CountTicket),
}

impl RecordCount {
    /// The exact number, waiting for the disk.
    pub fn wait(self) -> Result<u64, ReadError> {
        match self {
            Self::Exact(records) => Ok(records),
            Self::About(_, ticket) => ticket.run(),
        }
    }
}

/// A count of records to run on a pool. It stays valid whatever becomes of the log.
#[derive(Debug)]
pub struct CountTicket {
    pub(crate) until: RecordsBefore,
    pub(crate) from: RecordsBefore,
}

/// Data records of a log before an offset.
#[derive(Debug)]
pub(crate) enum RecordsBefore {
    Known(u64),
    /// Those of the segments before this one, and those in it before `offset`.
    Sealed {
        in_earlier: u64,
        files: Arc<SealedFiles>,
        view: View,
        offset: Offset,
    },
}

impl CountTicket {
    /// Counts them, waiting for the disk.
    pub fn run(self) -> Result<u64, ReadError> {
        Ok(self.until.count()?.saturating_sub(self.from.count()?))
    }
}

impl RecordsBefore {
    fn count(self) -> Result<u64, ReadError> {
        match self {
            Self::Known(records) => Ok(records),
            Self::Sealed { in_earlier, files, view, offset } => {
                Ok(in_earlier + view.records_before(&mut WaitingSlots::of(&files), offset, Some(&files))?)
            }
        }
    }
}

/// The first record of `position..end` at or behind offset `from` whose timestamp is at least `timestamp`. Batches that
/// cannot hold one are stepped over by their headers.
fn first_record(
    source: &Source,
    mut position: u64,
    mut offset: Offset,
    end: u64,
    timestamp: Timestamp,
    from: Offset,
) -> Result<Option<FoundRecord>, ReadError> {
    let file = source.file()?;
    while position < end {
        let mut head = [0; HEADER_BYTES];
        source.read(&*file, &mut head, position, offset)?;
        let corrupt = |error: BatchError| source.corrupt(position, offset, error.to_string());
        let header = BatchHeader::parse(&head).map_err(corrupt)?;
        let bytes = header.total_bytes();
        if header.base_offset != offset || bytes as u64 > end - position {
            let detail = format!("a batch with base offset {} and {bytes} bytes", header.base_offset);
            return Err(source.corrupt(position, offset, detail));
        }
        let may_hold = header.next_offset() > from && header.max_timestamp >= timestamp;
        if may_hold && !header.attributes.is_control() {
            let mut batch = vec![0; bytes];
            source.read(&*file, &mut batch, position, offset)?;
            verify_crc(&batch).map_err(corrupt)?;
            for record in records(Bytes::from(batch), DECOMPRESSED_BYTES_MAX).map_err(corrupt)? {
                let record = record.map_err(corrupt)?;
                if record.offset >= from && record.timestamp >= timestamp {
                    return Ok(Some(FoundRecord { offset: record.offset, timestamp: record.timestamp }));
                }
            }
        }
        position += bytes as u64;
        offset = header.next_offset();
    }
    Ok(None)
}
