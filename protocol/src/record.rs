//! The records of a batch: built in one pass into the batch's own buffer, and read back without copying.
//!
//! ```text
//! | length | attributes | timestamp delta | offset delta | key length | key | value length | value | header count | headers... |
//! | varint | i8, unused | varint          | varint       | varint     |     | varint       |       | varint       |            |
//!          |<------------------------------------------------- length -------------------------------------------------->|
//! header: | key length, varint | key | value length, varint | value |            a length of -1 is null (not for a header's key)
//! ```

pub mod cleaning;

use std::io::Read;

use bytes::Bytes;

use crate::batch::{
    Attributes, BatchError, BatchHeader, CRC_AT, HEADER_BYTES, LOG_OVERHEAD, MAGIC, TimestampType, ValidationLimits,
    crc_of,
};
use crate::compression::{Compression, CompressionError};
use crate::ids::{LeaderEpoch, Offset, ProducerEpoch, ProducerId, Sequence, Timestamp};
use crate::varint::{unzigzag, varint_bytes, write_varint};

/// Largest batch, uncompressed: its length is an `i32`.
const BATCH_BYTES_MAX: usize = i32::MAX as usize;
/// Length, attributes, timestamp delta, offset delta, key length, value length: 5 + 1 + 10 + 5 + 5 + 5.
const RECORD_LEAD_BYTES_MAX: usize = 31;
/// Fewest bytes of a header: a key's length and a value's.
const RECORD_HEADER_BYTES_MIN: usize = 2;
/// Decompressed bytes that the walk looks at at a time.
const WALK_WINDOW_BYTES: usize = 32 * 1024;

/// One record, as a consumer sees it. Key, value and headers share the batch's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its position in the partition.
    pub offset: Offset,
    /// The producer's time, or the leader's where the topic wants that.
    pub timestamp: Timestamp,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value; null is a tombstone in a compacted topic.
    pub value: Option<Bytes>,
    /// Its headers, in order, duplicates kept.
    pub headers: Vec<(Bytes, Option<Bytes>)>,
}

/// What is wrong with one record's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The batch ends within it.
    #[error("the batch ends within it")]
    CutShort,
    /// A varint is longer than its type allows.
    #[error("a varint is longer than its type allows")]
    Varint,
    /// A length is negative, or reaches beyond the record.
    #[error("a length is negative or reaches beyond the record")]
    Length,
    /// The header count is negative, or more than the record has room for.
    #[error("its header count is more than it has room for")]
    HeaderCount,
    /// Its parts do not add up to its length.
    #[error("its parts do not add up to its length")]
    Sum,
    /// Its offset delta does not follow the one before.
    #[error("its offset delta does not follow the one before")]
    OffsetDelta,
}

/// Builds one batch: every record is encoded at once, straight into the batch's buffer.
///
/// ```
/// use flowstone_protocol::record::{RecordBatchBuilder, records};
/// use flowstone_protocol::{BatchError, Compression, Timestamp};
///
/// let now = Timestamp::new(1_700_000_000_000);
/// let mut builder = RecordBatchBuilder::new(Compression::Zstd);
/// builder.append(now, Some(b"order-1"), Some(b"paid"), [])?;
/// builder.append(now, Some(b"order-2"), None, [(&b"trace"[..], Some(&b"4bf9"[..]))])?;
/// let batch = builder.build();
///
/// for record in records(batch, 1 << 20)? {
///     let record = record?;
///     println!("{}: {:?}", record.offset, record.value);
/// }
/// # Ok::<(), BatchError>(())
/// ```
#[derive(Debug)]
pub struct RecordBatchBuilder {
    compression: Compression,
    level: Option<i32>,
    attributes: i16,
    producer_id: ProducerId,
    producer_epoch: ProducerEpoch,
    base_sequence: Sequence,
    base_timestamp: i64,
    max_timestamp: i64,
    record_count: i32,
    /// Room for the header, then the records, uncompressed.
    buffer: Vec<u8>,
}

impl RecordBatchBuilder {
    /// An empty batch whose records will be compressed so.
    pub fn new(compression: Compression) -> Self {
        Self::with_capacity(compression, 0)
    }

    /// As [`Self::new`], with room for `bytes` of batch before the buffer grows.
    pub fn with_capacity(compression: Compression, bytes: usize) -> Self {
        let mut buffer = Vec::with_capacity(bytes.max(HEADER_BYTES));
        buffer.resize(HEADER_BYTES, 0);
        Self {
            compression,
            level: None,
            attributes: 0,
            producer_id: ProducerId::NONE,
            producer_epoch: ProducerEpoch::NONE,
            base_sequence: Sequence::NONE,
            base_timestamp: 0,
            max_timestamp: i64::MIN,
            record_count: 0,
            buffer,
        }
    }

    /// Sets the codec's level; see [`Compression::compress`].
    #[must_use]
    pub fn level(mut self, level: Option<i32>) -> Self {
        self.level = level;
        self
    }

    /// Names the idempotent producer and the sequence of the first record.
    #[must_use]
    pub fn producer(mut self, id: ProducerId, epoch: ProducerEpoch, base_sequence: Sequence) -> Self {
        self.set_producer(id, epoch, base_sequence);
        self
    }

    /// As [`Self::producer`], on a batch under way: the sequence is often known only when the batch is closed.
    pub fn set_producer(&mut self, id: ProducerId, epoch: ProducerEpoch, base_sequence: Sequence) {
        self.producer_id = id;
        self.producer_epoch = epoch;
        self.base_sequence = base_sequence;
    }

    /// Marks the batch as part of a transaction.
    #[must_use]
    pub fn transactional(mut self) -> Self {
        self.attributes |= Attributes::TRANSACTIONAL;
        self
    }

    /// Marks the batch as the log's own, which readers skip.
    #[must_use]
    pub(crate) fn control(mut self) -> Self {
        self.attributes |= Attributes::CONTROL;
        self
    }

    /// Adds a record. Fails, and adds nothing, where the batch would be larger than 2 GiB.
    ///
    /// `headers` are (key, value) in order; `[]` for none.
    #[inline]
    pub fn append<'h>(
        &mut self,
        timestamp: Timestamp,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h [u8], Option<&'h [u8]>), IntoIter: Clone>,
    ) -> Result<(), BatchError> {
        let headers = headers.into_iter();
        if self.record_count == 0 {
            self.base_timestamp = timestamp.get();
        }
        // Wrapping here and when reading: any timestamp comes back as it was.
        let timestamp_delta = timestamp.get().wrapping_sub(self.base_timestamp);
        let offset_delta = i64::from(self.record_count);
        let key_length = key.map_or(-1, |key| key.len() as i64);
        let value_length = value.map_or(-1, |value| value.len() as i64);

        let (mut header_count, mut header_bytes) = (0_i64, 0);
        for (key, value) in headers.clone() {
            let value_length = value.map_or(-1, |value| value.len() as i64);
            header_count += 1;
            header_bytes += varint_bytes(key.len() as i64) + key.len();
            header_bytes += varint_bytes(value_length) + value.map_or(0, <[u8]>::len);
        }
        let key_bytes = key.map_or(0, <[u8]>::len);
        let value_bytes = value.map_or(0, <[u8]>::len);
        let length = 1
            + varint_bytes(timestamp_delta)
            + varint_bytes(offset_delta)
            + varint_bytes(key_length)
            + key_bytes
            + varint_bytes(value_length)
            + value_bytes
            + varint_bytes(header_count)
            + header_bytes;
        let bytes = self.buffer.len() + RECORD_LEAD_BYTES_MAX + length;
        if bytes > BATCH_BYTES_MAX || self.record_count == i32::MAX {
            return Err(BatchError::TooLarge { bytes, bytes_max: BATCH_BYTES_MAX });
        }
        self.buffer.reserve(varint_bytes(length as i64) + length);

        let mut lead = [0; RECORD_LEAD_BYTES_MAX];
        let mut at = write_varint(&mut lead, 0, length as i64);
        // Attributes: none.
        at += 1;
        at = write_varint(&mut lead, at, timestamp_delta);
        at = write_varint(&mut lead, at, offset_delta);
        at = write_varint(&mut lead, at, key_length);
        if let Some(key) = key {
            self.buffer.extend_from_slice(&lead[..at]);
            self.buffer.extend_from_slice(key);
            at = 0;
        }
        at = write_varint(&mut lead, at, value_length);
        self.buffer.extend_from_slice(&lead[..at]);
        if let Some(value) = value {
            self.buffer.extend_from_slice(value);
        }
        if header_count == 0 {
            self.buffer.push(0);
        } else {
            self.extend_varint(header_count);
            for (key, value) in headers {
                self.extend_varint(key.len() as i64);
                self.buffer.extend_from_slice(key);
                self.extend_varint(value.map_or(-1, |value| value.len() as i64));
                self.buffer.extend_from_slice(value.unwrap_or_default());
            }
        }
        self.max_timestamp = self.max_timestamp.max(timestamp.get());
        self.record_count += 1;
        Ok(())
    }

    /// Bytes of the batch were it built now without compression; with it, usually more than it will have.
    pub fn estimated_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Records so far.
    pub fn record_count(&self) -> i32 {
        self.record_count
    }

    /// Whether there is no record yet.
    pub fn is_empty(&self) -> bool {
        self.record_count == 0
    }

    /// Most bytes that a record of this shape adds to a batch, before compression.
    pub fn record_bytes_max<'h>(
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h [u8], Option<&'h [u8]>)>,
    ) -> usize {
        let headers: usize =
            headers.into_iter().map(|(key, value)| 10 + key.len() + value.map_or(0, <[u8]>::len)).sum();
        RECORD_LEAD_BYTES_MAX + 5 + key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len) + headers
    }

    /// The batch, CRC set; base offset 0 and leader epoch -1 until storage stamps them.
    ///
    /// Records that the codec makes no smaller are stored uncompressed.
    ///
    /// # Panics
    /// Without a record: an empty batch is refused everywhere.
    pub fn build(self) -> Bytes {
        assert!(self.record_count > 0, "a batch has at least one record");
        let mut compression = self.compression;
        let mut batch = self.buffer;
        if compression != Compression::None {
            let records = &batch[HEADER_BYTES..];
            let mut compressed = Vec::with_capacity(HEADER_BYTES + records.len() / 2);
            compressed.resize(HEADER_BYTES, 0);
            let done = compression.compress(self.level, records, &mut compressed);
            if done.is_ok() && compressed.len() < batch.len() {
                batch = compressed;
            } else {
                compression = Compression::None;
            }
        }
        let header = BatchHeader {
            base_offset: Offset::ZERO,
            batch_length: (batch.len() - LOG_OVERHEAD) as i32,
            leader_epoch: LeaderEpoch::NONE,
            magic: MAGIC,
            crc: 0,
            attributes: Attributes::new(self.attributes | i16::from(compression.id())),
            last_offset_delta: self.record_count - 1,
            base_timestamp: Timestamp::new(self.base_timestamp),
            max_timestamp: Timestamp::new(self.max_timestamp),
            producer_id: self.producer_id,
            producer_epoch: self.producer_epoch,
            base_sequence: self.base_sequence,
            record_count: self.record_count,
        };
        seal(batch, &header)
    }

    fn extend_varint(&mut self, value: i64) {
        let mut bytes = [0; 10];
        let end = write_varint(&mut bytes, 0, value);
        self.buffer.extend_from_slice(&bytes[..end]);
    }
}

/// Writes `header` over the first bytes of `batch`, sets the CRC, and freezes it.
pub(crate) fn seal(mut batch: Vec<u8>, header: &BatchHeader) -> Bytes {
    if let Some(into) = batch.first_chunk_mut::<HEADER_BYTES>() {
        header.write(into);
    }
    let crc = crc_of(&batch);
    batch[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_be_bytes());
    Bytes::from(batch)
}

/// Where the parts of one record lie: positions within the batch's records, decompressed.
#[derive(Clone, Copy, Debug)]
struct Parts {
    timestamp_delta: i64,
    offset_delta: i32,
    key: Option<Span>,
    value: Option<Span>,
    header_count: usize,
    headers_at: usize,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    at: usize,
    bytes: usize,
}

/// Bytes of records, front to back: from memory, or from a decompressing stream.
trait Source {
    /// The next byte.
    fn byte(&mut self) -> Result<u8, SourceError>;
    /// Passes over `bytes`.
    fn skip(&mut self, bytes: usize) -> Result<(), SourceError>;
    /// Bytes passed so far.
    fn position(&self) -> usize;
}

enum SourceError {
    Record(RecordError),
    Compression(CompressionError),
}

impl From<RecordError> for SourceError {
    fn from(error: RecordError) -> Self {
        Self::Record(error)
    }
}

impl SourceError {
    fn of_record(self, record: i32) -> BatchError {
        match self {
            Self::Record(problem) => BatchError::Record { record, problem },
            Self::Compression(error) => error.into(),
        }
    }
}

/// Records in memory.
struct Slice<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Source for Slice<'_> {
    #[inline(always)]
    fn byte(&mut self) -> Result<u8, SourceError> {
        let byte = *self.bytes.get(self.at).ok_or(RecordError::CutShort)?;
        self.at += 1;
        Ok(byte)
    }

    #[inline(always)]
    fn skip(&mut self, bytes: usize) -> Result<(), SourceError> {
        if bytes > self.bytes.len() - self.at {
            return Err(RecordError::CutShort.into());
        }
        self.at += bytes;
        Ok(())
    }

    #[inline(always)]
    fn position(&self) -> usize {
        self.at
    }
}

/// Records as they come out of a codec, through a window.
struct Window<'a> {
    reader: &'a mut dyn Read,
    codec: Compression,
    bytes_max: usize,
    window: Box<[u8]>,
    at: usize,
    len: usize,
    /// Bytes that were passed before the window's first.
    before: usize,
}

impl Window<'_> {
    /// Whether there are more bytes; reads some where the window is used up.
    fn fill(&mut self) -> Result<bool, SourceError> {
        if self.at < self.len {
            return Ok(true);
        }
        self.before += self.len;
        self.at = 0;
        self.len = 0;
        self.len = loop {
            match self.reader.read(&mut self.window) {
                Ok(bytes) => break bytes,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(SourceError::Compression(self.codec.read_error(error, self.bytes_max))),
            }
        };
        if self.before + self.len > self.bytes_max {
            return Err(SourceError::Compression(CompressionError::TooLarge { bytes_max: self.bytes_max }));
        }
        Ok(self.len > 0)
    }
}

impl Source for Window<'_> {
    #[inline]
    fn byte(&mut self) -> Result<u8, SourceError> {
        if self.at == self.len && !self.fill()? {
            return Err(RecordError::CutShort.into());
        }
        let byte = self.window[self.at];
        self.at += 1;
        Ok(byte)
    }

    #[inline]
    fn skip(&mut self, mut bytes: usize) -> Result<(), SourceError> {
        while bytes > self.len - self.at {
            bytes -= self.len - self.at;
            self.at = self.len;
            if !self.fill()? {
                return Err(RecordError::CutShort.into());
            }
        }
        self.at += bytes;
        Ok(())
    }

    #[inline]
    fn position(&self) -> usize {
        self.before + self.at
    }
}

/// A varint of at most 64 bits.
#[inline(always)]
fn varlong(source: &mut impl Source) -> Result<i64, SourceError> {
    let first = source.byte()?;
    if first < 0x80 {
        return Ok(unzigzag(u64::from(first)));
    }
    let mut value = u64::from(first & 0x7f);
    let mut shift = 7;
    loop {
        let byte = source.byte()?;
        // The tenth byte has room for one bit.
        if shift == 63 && byte > 1 {
            return Err(RecordError::Varint.into());
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(unzigzag(value));
        }
        shift += 7;
    }
}

/// A varint of at most 32 bits.
#[inline(always)]
fn varint(source: &mut impl Source) -> Result<i32, SourceError> {
    let first = source.byte()?;
    if first < 0x80 {
        return Ok(unzigzag(u64::from(first)) as i32);
    }
    let mut value = u64::from(first & 0x7f);
    let mut shift = 7;
    loop {
        let byte = source.byte()?;
        // The fifth byte has room for four bits.
        if shift == 28 && byte > 0x0f {
            return Err(RecordError::Varint.into());
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(unzigzag(value) as i32);
        }
        shift += 7;
    }
}

/// A length and what it measures, which ends before `end`; `None` is null.
#[inline(always)]
fn nullable(source: &mut impl Source, end: usize) -> Result<Option<Span>, SourceError> {
    let length = varint(source)?;
    let at = source.position();
    if length < 0 {
        return if length == -1 { Ok(None) } else { Err(RecordError::Length.into()) };
    }
    let bytes = length as usize;
    if bytes > end.saturating_sub(at) {
        return Err(RecordError::Length.into());
    }
    source.skip(bytes)?;
    Ok(Some(Span { at, bytes }))
}

/// One header: its key and value.
#[inline(always)]
fn header(source: &mut impl Source, end: usize) -> Result<(Span, Option<Span>), SourceError> {
    let key = nullable(source, end)?.ok_or(RecordError::Length)?;
    Ok((key, nullable(source, end)?))
}

/// One record: checked in full, its parts measured.
#[inline(always)]
fn parts(source: &mut impl Source) -> Result<Parts, SourceError> {
    let length = varint(source)?;
    if length < 0 {
        return Err(RecordError::Length.into());
    }
    let end = source.position().checked_add(length as usize).ok_or(RecordError::Length)?;
    // Attributes: no bit has a meaning.
    source.byte()?;
    let timestamp_delta = varlong(source)?;
    let offset_delta = varint(source)?;
    let key = nullable(source, end)?;
    let value = nullable(source, end)?;
    let header_count = varint(source)?;
    let headers_at = source.position();
    let header_count = usize::try_from(header_count).map_err(|_| RecordError::HeaderCount)?;
    if header_count > end.saturating_sub(headers_at) / RECORD_HEADER_BYTES_MIN {
        return Err(RecordError::HeaderCount.into());
    }
    for _ in 0..header_count {
        header(source, end)?;
    }
    if source.position() != end {
        return Err(RecordError::Sum.into());
    }
    Ok(Parts { timestamp_delta, offset_delta, key, value, header_count, headers_at })
}

/// Checks every record of a producer's batch against its header and the limits.
pub(crate) fn walk(
    header: &BatchHeader,
    compression: Compression,
    records: &[u8],
    limits: &ValidationLimits,
) -> Result<(), BatchError> {
    if compression == Compression::None {
        let mut source = Slice { bytes: records, at: 0 };
        walk_source(header, &mut source, limits)?;
        return if source.at == records.len() { Ok(()) } else { Err(more_records(header)) };
    }
    let bytes_max = limits.max_decompressed_bytes;
    let walked = compression.with_reader(records, bytes_max, |reader| {
        let window = vec![0; WALK_WINDOW_BYTES].into_boxed_slice();
        let mut source = Window { reader, codec: compression, bytes_max, window, at: 0, len: 0, before: 0 };
        Ok(walk_source(header, &mut source, limits).and_then(|()| match source.fill() {
            Ok(false) => Ok(()),
            Ok(true) => Err(more_records(header)),
            Err(error) => Err(error.of_record(header.record_count)),
        }))
    });
    walked?
}

fn more_records(header: &BatchHeader) -> BatchError {
    BatchError::RecordCount { header: header.record_count, found: None }
}

#[inline(always)]
fn walk_source(header: &BatchHeader, source: &mut impl Source, limits: &ValidationLimits) -> Result<(), BatchError> {
    let latest = limits.now.after(limits.max_timestamp_ahead);
    let mut max_timestamp = i64::MIN;
    for record in 0..header.record_count {
        let start = source.position();
        let parts = match parts(source) {
            Ok(parts) => parts,
            // The bytes ended between two records: the count lies, the records do not.
            Err(SourceError::Record(RecordError::CutShort)) if source.position() == start => {
                return Err(BatchError::RecordCount { header: header.record_count, found: Some(record as usize) });
            }
            Err(error) => return Err(error.of_record(record)),
        };
        if parts.offset_delta != record {
            return Err(BatchError::Record { record, problem: RecordError::OffsetDelta });
        }
        let timestamp = header.base_timestamp.get().wrapping_add(parts.timestamp_delta);
        if timestamp < 0 || timestamp > latest.get() {
            return Err(BatchError::Timestamp { record, timestamp: Timestamp::new(timestamp), latest });
        }
        max_timestamp = max_timestamp.max(timestamp);
        if limits.require_keys && parts.key.is_none() {
            return Err(BatchError::MissingKey { record });
        }
    }
    if header.max_timestamp.get() != max_timestamp {
        return Err(BatchError::MaxTimestamp { header: header.max_timestamp, found: Timestamp::new(max_timestamp) });
    }
    Ok(())
}

/// The records of one batch, header and length checked, CRC not.
///
/// `batch` begins with one whole batch; what lies behind it is ignored. Compressed records are decompressed at once,
/// to at most `max_decompressed` bytes. Control batches are read as any other; consumers skip them by their header.
pub fn records(batch: Bytes, max_decompressed: usize) -> Result<RecordIter, BatchError> {
    let header = BatchHeader::parse(&batch)?;
    if batch.len() < header.total_bytes() {
        return Err(BatchError::NeedMore { bytes: header.total_bytes() });
    }
    let records = batch.slice(HEADER_BYTES..header.total_bytes());
    let records = match header.attributes.compression()? {
        Compression::None => records,
        codec => Bytes::from(codec.decompress(&records, max_decompressed)?),
    };
    Ok(RecordIter { header, records, at: 0, next: 0 })
}

/// What [`records`] returns: an iterator that ends after the header's record count, or after the first error.
///
/// A batch with fewer or more records than its header says ends with an error.
#[derive(Clone, Debug)]
pub struct RecordIter {
    header: BatchHeader,
    records: Bytes,
    at: usize,
    /// Number within the batch of the record at `at`.
    next: i32,
}

/// One record, borrowed from its batch: for readers that keep nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordView<'a> {
    /// Its position in the partition.
    pub offset: Offset,
    /// As [`Record::timestamp`].
    pub timestamp: Timestamp,
    /// Its key.
    pub key: Option<&'a [u8]>,
    /// Its value.
    pub value: Option<&'a [u8]>,
}

/// Where the parts of one record lie within [`RecordIter::record_bytes`]: for readers that keep a whole batch and look
/// into it later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLayout {
    /// As [`Record::offset`].
    pub offset: Offset,
    /// As [`Record::timestamp`].
    pub timestamp: Timestamp,
    /// First byte and number of bytes of its key.
    pub key: Option<(usize, usize)>,
    /// First byte and number of bytes of its value.
    pub value: Option<(usize, usize)>,
    /// First byte of its headers, to be read by [`headers_at`].
    pub headers_at: usize,
    /// How many headers it has.
    pub header_count: usize,
}

/// The headers of a record whose [`RecordLayout`] told where they begin and how many they are; in order, duplicates
/// kept. Ends early where `record_bytes` is not what the layout was made from.
pub fn headers_at(
    record_bytes: &[u8],
    headers_at: usize,
    header_count: usize,
) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
    let mut source = Slice { bytes: record_bytes, at: headers_at.min(record_bytes.len()) };
    (0..header_count).map_while(move |_| {
        let (key, value) = header(&mut source, record_bytes.len()).ok()?;
        let span = |span: Span| &record_bytes[span.at..span.at + span.bytes];
        Some((span(key), value.map(span)))
    })
}

impl RecordIter {
    /// The batch's header.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// The next record without its headers and without counting references; as [`Iterator::next`] otherwise.
    #[inline]
    pub fn next_view(&mut self) -> Option<Result<RecordView<'_>, BatchError>> {
        Some(match self.advance()? {
            Ok(parts) => {
                let span = |span: Span| &self.records[span.at..span.at + span.bytes];
                Ok(RecordView {
                    offset: self.offset(&parts),
                    timestamp: self.timestamp(&parts),
                    key: parts.key.map(span),
                    value: parts.value.map(span),
                })
            }
            Err(error) => Err(error),
        })
    }

    /// The records' bytes, decompressed.
    pub fn record_bytes(&self) -> &Bytes {
        &self.records
    }

    /// Where the next record lies; as [`Iterator::next`] otherwise.
    #[inline]
    pub fn next_layout(&mut self) -> Option<Result<RecordLayout, BatchError>> {
        let span = |span: Span| (span.at, span.bytes);
        Some(self.advance()?.map(|parts| RecordLayout {
            offset: self.offset(&parts),
            timestamp: self.timestamp(&parts),
            key: parts.key.map(span),
            value: parts.value.map(span),
            headers_at: parts.headers_at,
            header_count: parts.header_count,
        }))
    }

    #[inline]
    fn advance(&mut self) -> Option<Result<Parts, BatchError>> {
        if self.next >= self.header.record_count {
            if self.at == self.records.len() {
                return None;
            }
            self.at = self.records.len();
            return Some(Err(more_records(&self.header)));
        }
        let record = self.next;
        let mut source = Slice { bytes: &self.records, at: self.at };
        match parts(&mut source) {
            Ok(parts) => {
                self.at = source.at;
                self.next += 1;
                Some(Ok(parts))
            }
            Err(error) => {
                let error = if self.at == self.records.len() {
                    BatchError::RecordCount { header: self.header.record_count, found: Some(record as usize) }
                } else {
                    error.of_record(record)
                };
                // Nothing behind a malformed record can be trusted.
                self.next = self.header.record_count;
                self.at = self.records.len();
                Some(Err(error))
            }
        }
    }

    #[inline]
    fn offset(&self, parts: &Parts) -> Offset {
        self.header.base_offset.plus(i64::from(parts.offset_delta))
    }

    #[inline]
    fn timestamp(&self, parts: &Parts) -> Timestamp {
        match self.header.attributes.timestamp_type() {
            TimestampType::CreateTime => {
                Timestamp::new(self.header.base_timestamp.get().wrapping_add(parts.timestamp_delta))
            }
            TimestampType::LogAppendTime => self.header.max_timestamp,
        }
    }

    fn headers(&self, parts: &Parts) -> Vec<(Bytes, Option<Bytes>)> {
        let slice = |span: Span| self.records.slice(span.at..span.at + span.bytes);
        // What a header takes in memory is some thirty times the two bytes that it may take in a record: no more than
        // a few are reserved on the record's word.
        let mut headers = Vec::with_capacity(parts.header_count.min(16));
        let mut source = Slice { bytes: &self.records, at: parts.headers_at };
        for _ in 0..parts.header_count {
            // The record was checked when its parts were measured.
            let Ok((key, value)) = header(&mut source, self.records.len()) else { break };
            headers.push((slice(key), value.map(slice)));
        }
        headers
    }
}

impl Iterator for RecordIter {
    type Item = Result<Record, BatchError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        Some(match self.advance()? {
            Ok(parts) => {
                let slice = |span: Span| self.records.slice(span.at..span.at + span.bytes);
                Ok(Record {
                    offset: self.offset(&parts),
                    timestamp: self.timestamp(&parts),
                    key: parts.key.map(slice),
                    value: parts.value.map(slice),
                    headers: if parts.header_count == 0 { Vec::new() } else { self.headers(&parts) },
                })
            }
            Err(error) => Err(error),
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // Each record takes at least 7 bytes: a lying count reserves nothing. One more than that for an error.
        let most = ((self.records.len() - self.at) / 7 + 1).min((self.header.record_count - self.next) as usize + 1);
        (0, Some(most))
    }
}
