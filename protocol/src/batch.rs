//! The record batch, Kafka's format v2: header, CRC, and the check of what a producer sends.
//!
//! ```text
//!  0         8        12        16      17    21      23       27       35       43       51     53       57       61
//!  | base    | batch   | leader  | magic | crc | attri- | last   | base    | max     | pro-   | pro-  | base   | record  | records...
//!  | offset  | length  | epoch   | = 2   |     | butes  | offset | time-   | time-   | ducer  | ducer | se-    | count   |
//!  | i64     | i32     | i32     | i8    | u32 | i16    | delta  | stamp   | stamp   | id     | epoch | quence | i32     |
//!  |<- stamped by storage when appended ->|     |<------------------- covered by the CRC-32C -------------------------------->|
//!            |         |<------------------------------- batch length -------------------------------------------------------->|
//! ```
//! All integers are big-endian. (The batch length lies in the stamped prefix but never changes.)

use std::fmt;
use std::time::Duration;

use bytes::Bytes;

use crate::compression::{Compression, CompressionError};
use crate::error::{Error, ErrorCode};
use crate::ids::{LeaderEpoch, Offset, ProducerEpoch, ProducerId, Sequence, Timestamp};
use crate::record::{RecordError, walk};

/// Bytes of a batch before its records.
pub const HEADER_BYTES: usize = 61;
/// Bytes before those that the batch length counts: base offset and batch length.
pub const LOG_OVERHEAD: usize = 12;
/// The only magic byte of format v2.
pub const MAGIC: i8 = 2;

const LEADER_EPOCH_AT: usize = 12;
const MAGIC_AT: usize = 16;
pub(crate) const CRC_AT: usize = 17;
pub(crate) const ATTRIBUTES_AT: usize = 21;
const LAST_OFFSET_DELTA_AT: usize = 23;
const BASE_TIMESTAMP_AT: usize = 27;
pub(crate) const MAX_TIMESTAMP_AT: usize = 35;
const PRODUCER_ID_AT: usize = 43;
const PRODUCER_EPOCH_AT: usize = 51;
const BASE_SEQUENCE_AT: usize = 53;
const RECORD_COUNT_AT: usize = 57;
const _: () = assert!(RECORD_COUNT_AT + size_of::<i32>() == HEADER_BYTES);
const _: () = assert!(LOG_OVERHEAD == size_of::<i64>() + size_of::<i32>());

/// Who wrote a batch's timestamps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimestampType {
    /// The producer, one for each record.
    CreateTime,
    /// The leader when it appended: one, the header's maximum, for all records.
    LogAppendTime,
}

/// The attribute bits of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes(pub(crate) i16);

impl Attributes {
    pub(crate) const COMPRESSION: i16 = 0b111;
    pub(crate) const LOG_APPEND_TIME: i16 = 1 << 3;
    pub(crate) const TRANSACTIONAL: i16 = 1 << 4;
    pub(crate) const CONTROL: i16 = 1 << 5;
    pub(crate) const DELETE_HORIZON: i16 = 1 << 6;
    const KNOWN: i16 = 0x7f;

    /// Wraps the bits.
    pub const fn new(bits: i16) -> Self {
        Self(bits)
    }

    /// The bits.
    pub const fn bits(self) -> i16 {
        self.0
    }

    /// The codec of the records; an error where this program knows none of that number.
    pub fn compression(self) -> Result<Compression, BatchError> {
        let id = (self.0 & Self::COMPRESSION) as u8;
        Compression::from_id(id).ok_or(BatchError::UnknownCompression { id })
    }

    /// Who wrote the timestamps.
    pub const fn timestamp_type(self) -> TimestampType {
        if self.0 & Self::LOG_APPEND_TIME == 0 { TimestampType::CreateTime } else { TimestampType::LogAppendTime }
    }

    /// Whether the batch belongs to a transaction.
    pub const fn is_transactional(self) -> bool {
        self.0 & Self::TRANSACTIONAL != 0
    }

    /// Whether the batch is the log's own: consumers skip it.
    pub const fn is_control(self) -> bool {
        self.0 & Self::CONTROL != 0
    }

    /// Whether the base timestamp is the time after which tombstones may be removed (compacted logs).
    pub const fn has_delete_horizon(self) -> bool {
        self.0 & Self::DELETE_HORIZON != 0
    }

    /// Bits that no version of the format has given a meaning.
    pub const fn unknown_bits(self) -> i16 {
        self.0 & !Self::KNOWN
    }
}

/// A batch's header, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Offset of the first record, stamped at append.
    pub base_offset: Offset,
    /// Bytes of the batch after this field, at least 49.
    pub batch_length: i32,
    /// Term of the leader that appended it, stamped at append.
    pub leader_epoch: LeaderEpoch,
    /// 2.
    pub magic: i8,
    /// CRC-32C of everything from the attributes on.
    pub crc: u32,
    /// Codec and flags.
    pub attributes: Attributes,
    /// Last record's offset less the base offset; not negative.
    pub last_offset_delta: i32,
    /// What the records' timestamps are relative to: the first record's.
    pub base_timestamp: Timestamp,
    /// Latest timestamp of the records.
    pub max_timestamp: Timestamp,
    /// -1 without a producer.
    pub producer_id: ProducerId,
    /// -1 without a producer.
    pub producer_epoch: ProducerEpoch,
    /// Sequence of the first record, -1 without a producer.
    pub base_sequence: Sequence,
    /// Records in the batch, control ones too; not negative.
    pub record_count: i32,
}

impl BatchHeader {
    /// Decodes the header that `bytes` begins with. The rest of the batch need not be there.
    ///
    /// Fails with [`BatchError::NeedMore`] on fewer than [`HEADER_BYTES`], else where a field cannot be true of any
    /// batch: magic, a length shorter than the header, a negative count or offset delta.
    pub fn parse(bytes: &[u8]) -> Result<Self, BatchError> {
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(BatchError::NeedMore { bytes: HEADER_BYTES });
        };
        let header = Self {
            base_offset: Offset::new(i64::from_be_bytes(field(bytes, 0))),
            batch_length: i32::from_be_bytes(field(bytes, 8)),
            leader_epoch: LeaderEpoch::new(i32::from_be_bytes(field(bytes, LEADER_EPOCH_AT))),
            magic: bytes[MAGIC_AT] as i8,
            crc: u32::from_be_bytes(field(bytes, CRC_AT)),
            attributes: Attributes(i16::from_be_bytes(field(bytes, ATTRIBUTES_AT))),
            last_offset_delta: i32::from_be_bytes(field(bytes, LAST_OFFSET_DELTA_AT)),
            base_timestamp: Timestamp::new(i64::from_be_bytes(field(bytes, BASE_TIMESTAMP_AT))),
            max_timestamp: Timestamp::new(i64::from_be_bytes(field(bytes, MAX_TIMESTAMP_AT))),
            producer_id: ProducerId::new(i64::from_be_bytes(field(bytes, PRODUCER_ID_AT))),
            producer_epoch: ProducerEpoch::new(i16::from_be_bytes(field(bytes, PRODUCER_EPOCH_AT))),
            base_sequence: Sequence::new(i32::from_be_bytes(field(bytes, BASE_SEQUENCE_AT))),
            record_count: i32::from_be_bytes(field(bytes, RECORD_COUNT_AT)),
        };
        if header.magic != MAGIC {
            return Err(BatchError::Magic { found: header.magic });
        }
        if header.batch_length < (HEADER_BYTES - LOG_OVERHEAD) as i32 {
            return Err(BatchError::Length { header: header.batch_length, found: None });
        }
        if header.record_count < 0 {
            return Err(BatchError::RecordCount { header: header.record_count, found: None });
        }
        if header.last_offset_delta < 0 {
            return Err(BatchError::LastOffsetDelta { header: header.last_offset_delta, records: header.record_count });
        }
        Ok(header)
    }

    /// Writes the header into the first [`HEADER_BYTES`] of `into`.
    pub(crate) fn write(&self, into: &mut [u8; HEADER_BYTES]) {
        into[0..8].copy_from_slice(&self.base_offset.get().to_be_bytes());
        into[8..12].copy_from_slice(&self.batch_length.to_be_bytes());
        into[LEADER_EPOCH_AT..16].copy_from_slice(&self.leader_epoch.get().to_be_bytes());
        into[MAGIC_AT] = self.magic as u8;
        into[CRC_AT..21].copy_from_slice(&self.crc.to_be_bytes());
        into[ATTRIBUTES_AT..23].copy_from_slice(&self.attributes.0.to_be_bytes());
        into[LAST_OFFSET_DELTA_AT..27].copy_from_slice(&self.last_offset_delta.to_be_bytes());
        into[BASE_TIMESTAMP_AT..35].copy_from_slice(&self.base_timestamp.get().to_be_bytes());
        into[MAX_TIMESTAMP_AT..43].copy_from_slice(&self.max_timestamp.get().to_be_bytes());
        into[PRODUCER_ID_AT..51].copy_from_slice(&self.producer_id.get().to_be_bytes());
        into[PRODUCER_EPOCH_AT..53].copy_from_slice(&self.producer_epoch.get().to_be_bytes());
        into[BASE_SEQUENCE_AT..57].copy_from_slice(&self.base_sequence.get().to_be_bytes());
        into[RECORD_COUNT_AT..61].copy_from_slice(&self.record_count.to_be_bytes());
    }

    /// Bytes of the whole batch, header included; at least [`HEADER_BYTES`].
    pub const fn total_bytes(&self) -> usize {
        LOG_OVERHEAD + self.batch_length as usize
    }

    /// Offset of the last record.
    pub const fn last_offset(&self) -> Offset {
        self.base_offset.plus(self.last_offset_delta as i64)
    }

    /// Offset after the last record.
    pub const fn next_offset(&self) -> Offset {
        self.last_offset().next()
    }

    /// Offsets that the batch takes; more than its records where a log was compacted.
    pub const fn offsets(&self) -> i64 {
        self.last_offset_delta as i64 + 1
    }

    /// Records that consumers see: none in a control batch.
    pub const fn data_records(&self) -> u64 {
        if self.attributes.is_control() { 0 } else { self.record_count as u64 }
    }

    /// Whether an idempotent producer wrote it.
    pub const fn has_producer(&self) -> bool {
        self.producer_id.get() >= 0
    }

    /// Sequence of the last record; meaningless without a producer.
    pub const fn last_sequence(&self) -> Sequence {
        self.base_sequence.plus(self.last_offset_delta)
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// The CRC-32C of a batch as its header should have it: of everything from the attributes on.
///
/// # Panics
/// If `batch` is shorter than a header.
pub fn crc_of(batch: &[u8]) -> u32 {
    assert!(batch.len() >= HEADER_BYTES, "a batch of {} bytes is shorter than its header", batch.len());
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &batch[ATTRIBUTES_AT..]) as u32
}

/// Checks one whole batch's CRC. `batch` begins with it and has all of it; what lies behind is ignored.
pub fn verify_crc(batch: &[u8]) -> Result<(), BatchError> {
    let header = BatchHeader::parse(batch)?;
    let Some(batch) = batch.get(..header.total_bytes()) else {
        return Err(BatchError::NeedMore { bytes: header.total_bytes() });
    };
    let computed = crc_of(batch);
    if computed == header.crc { Ok(()) } else { Err(BatchError::Crc { header: header.crc, computed }) }
}

/// The first 16 bytes of `batch` as they are stored: base offset, batch length (as it is), leader epoch.
///
/// # Panics
/// If `batch` is shorter than that.
pub fn stamped_prefix(batch: &[u8], base_offset: Offset, epoch: LeaderEpoch) -> [u8; 16] {
    let mut prefix = [0; 16];
    prefix[..8].copy_from_slice(&base_offset.get().to_be_bytes());
    prefix[8..12].copy_from_slice(&batch[8..12]);
    prefix[12..].copy_from_slice(&epoch.get().to_be_bytes());
    prefix
}

/// Splits bytes into the whole batches that they hold, back to back, without copying.
///
/// Each item is a batch with its parsed header; its CRC and records are not checked. A header that cannot be true is
/// an error, a batch of which only a part is there is [`BatchError::NeedMore`]; both end the iteration.
pub fn split_batches(bytes: Bytes) -> SplitBatches {
    SplitBatches { rest: bytes }
}

/// What [`split_batches`] returns.
#[derive(Clone, Debug)]
pub struct SplitBatches {
    rest: Bytes,
}

impl Iterator for SplitBatches {
    type Item = Result<(BatchHeader, Bytes), BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let parsed = BatchHeader::parse(&self.rest).and_then(|header| {
            let bytes = header.total_bytes();
            if bytes <= self.rest.len() { Ok((header, bytes)) } else { Err(BatchError::NeedMore { bytes }) }
        });
        Some(match parsed {
            Ok((header, bytes)) => Ok((header, self.rest.split_to(bytes))),
            Err(error) => {
                self.rest = Bytes::new();
                Err(error)
            }
        })
    }
}

/// What a producer's batch may be.
#[derive(Clone, Copy, Debug)]
pub struct ValidationLimits {
    /// Bytes of the batch as it was sent, header included (`max.message.bytes`).
    pub max_bytes: usize,
    /// Bytes of its records once decompressed.
    pub max_decompressed_bytes: usize,
    /// Records in it.
    pub max_records: i32,
    /// The present.
    pub now: Timestamp,
    /// How far ahead of the present a record's timestamp may be.
    pub max_timestamp_ahead: Duration,
    /// Whether every record must have a key (compacted topics).
    pub require_keys: bool,
}

impl ValidationLimits {
    /// How far ahead of the present a record's timestamp may be, unless a topic says otherwise.
    pub const TIMESTAMP_AHEAD: Duration = Duration::from_secs(60 * 60);

    /// The limits of a topic with this `max.message.bytes`: 64 MiB decompressed (or `max_bytes`, where that is more),
    /// any number of records, an hour ahead of `now`, no keys required.
    pub fn new(max_bytes: usize, now: Timestamp) -> Self {
        Self {
            max_bytes,
            max_decompressed_bytes: max_bytes.max(64 << 20),
            max_records: i32::MAX,
            now,
            max_timestamp_ahead: Self::TIMESTAMP_AHEAD,
            require_keys: false,
        }
    }
}

/// The full check of a producer's batch: nothing that passes can surprise a replica or a consumer.
///
/// `batch` is exactly one batch. Checked are length, magic, CRC, codec, that no control or unknown bit is set and the
/// transactional one with a producer alone, the producer's fields, and every record, decompressed in a stream where need be: count, offset deltas from
/// 0 on without a gap, lengths that add up, timestamps from 0 to `now` + `max_timestamp_ahead`, the header's maximum
/// timestamp, keys where they are required, nothing behind the last record. Memory: a window of some 100 KiB and the
/// codec's own (at most 16 MiB, see [`Compression`]), whatever the batch claims.
///
/// Base offset and leader epoch are not looked at: storage stamps them.
pub fn validate_produced(batch: &[u8], limits: &ValidationLimits) -> Result<BatchHeader, BatchError> {
    if batch.len() > limits.max_bytes {
        return Err(BatchError::TooLarge { bytes: batch.len(), bytes_max: limits.max_bytes });
    }
    let header = BatchHeader::parse(batch)?;
    if header.total_bytes() != batch.len() {
        return Err(BatchError::Length { header: header.batch_length, found: Some(batch.len() - LOG_OVERHEAD) });
    }
    let computed = crc_of(batch);
    if computed != header.crc {
        return Err(BatchError::Crc { header: header.crc, computed });
    }
    let attributes = header.attributes;
    if attributes.is_control() {
        return Err(BatchError::NotAllowed { what: "the control bit" });
    }
    if attributes.is_transactional() && header.producer_id == ProducerId::NONE {
        return Err(BatchError::NotAllowed { what: "the transactional bit without a producer" });
    }
    if attributes.has_delete_horizon() {
        return Err(BatchError::NotAllowed { what: "a delete horizon" });
    }
    if attributes.timestamp_type() == TimestampType::LogAppendTime {
        return Err(BatchError::NotAllowed { what: "the log append time bit" });
    }
    if attributes.unknown_bits() != 0 {
        return Err(BatchError::NotAllowed { what: "an unknown attribute bit" });
    }
    let compression = attributes.compression()?;
    if header.record_count == 0 {
        return Err(BatchError::Empty);
    }
    if header.record_count > limits.max_records {
        return Err(BatchError::TooManyRecords { records: header.record_count, records_max: limits.max_records });
    }
    if header.last_offset_delta != header.record_count - 1 {
        return Err(BatchError::LastOffsetDelta { header: header.last_offset_delta, records: header.record_count });
    }
    let no_producer = header.producer_id == ProducerId::NONE;
    if !no_producer
        && (header.producer_id.get() < 0 || header.producer_epoch.get() < 0 || header.base_sequence.get() < 0)
    {
        return Err(BatchError::Producer {
            id: header.producer_id,
            epoch: header.producer_epoch,
            sequence: header.base_sequence,
        });
    }
    walk(&header, compression, &batch[HEADER_BYTES..], limits)?;
    Ok(header)
}

/// What is wrong with a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// Not a failure of a stream that goes on: the batch, or its header, has at least this many bytes in all.
    #[error("the record batch is cut short: {bytes} bytes are needed")]
    NeedMore {
        /// Bytes from the batch's first on.
        bytes: usize,
    },
    /// Not format v2.
    #[error(
        "record batch of format {found}, only format 2 is known: use a client that speaks it (Kafka's 0.11 or later)"
    )]
    Magic {
        /// The magic byte.
        found: i8,
    },
    /// The batch length is not that of the bytes sent.
    #[error("the record batch says that it is {header} bytes long{}", Found(.found))]
    Length {
        /// Its batch length.
        header: i32,
        /// What it should be.
        found: Option<usize>,
    },
    /// Larger than the topic takes.
    #[error(
        "record batch of {bytes} bytes, the topic takes at most {bytes_max}: send smaller batches or raise max.message.bytes"
    )]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// `max.message.bytes`.
        bytes_max: usize,
    },
    /// The bytes are not those that were checksummed.
    #[error(
        "record batch with a wrong CRC: {header:08x} in its header, {computed:08x} of its bytes; it was damaged on the way"
    )]
    Crc {
        /// In the header.
        header: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// No records.
    #[error("record batch without records: send at least one")]
    Empty,
    /// More records than allowed.
    #[error("record batch of {records} records, at most {records_max} are allowed: send smaller batches")]
    TooManyRecords {
        /// Its count.
        records: i32,
        /// The limit.
        records_max: i32,
    },
    /// The record count is not the number of records.
    #[error("the record batch says that it has {header} records{}", Found(.found))]
    RecordCount {
        /// Its count.
        header: i32,
        /// The records found, where that is known.
        found: Option<usize>,
    },
    /// The last offset delta is not the record count less one.
    #[error("record batch with last offset delta {header} and {records} records")]
    LastOffsetDelta {
        /// Its last offset delta.
        header: i32,
        /// Its record count.
        records: i32,
    },
    /// A bit that a plain producer must not set.
    #[error("record batch with {what} set: a producer outside a transaction must not set it")]
    NotAllowed {
        /// The bit.
        what: &'static str,
    },
    /// Producer id, epoch and sequence do not belong together.
    #[error("record batch with producer id {id}, epoch {epoch}, sequence {sequence}: all three are set, or none (-1)")]
    Producer {
        /// Its producer id.
        id: ProducerId,
        /// Its producer epoch.
        epoch: ProducerEpoch,
        /// Its base sequence.
        sequence: Sequence,
    },
    /// A codec that is not known.
    #[error("record batch with unknown compression {id}: use none, gzip, snappy, lz4 or zstd")]
    UnknownCompression {
        /// Its number.
        id: u8,
    },
    /// The records cannot be decompressed.
    #[error("record batch that cannot be decompressed: {0}")]
    Compression(CompressionError),
    /// The records decompress to more than is allowed.
    #[error("record batch that decompresses to more than {bytes_max} bytes: send smaller batches")]
    DecompressedTooLarge {
        /// The cap.
        bytes_max: usize,
    },
    /// A record's timestamp is below zero or too far ahead.
    #[error("record {record} has the timestamp {timestamp}, allowed is 0 to {latest}: check the producer's clock")]
    Timestamp {
        /// Its number within the batch, the first is 0.
        record: i32,
        /// Its timestamp.
        timestamp: Timestamp,
        /// The latest that is allowed.
        latest: Timestamp,
    },
    /// The maximum timestamp is not the records' maximum.
    #[error("the record batch says that its latest timestamp is {header}, its records' is {found}")]
    MaxTimestamp {
        /// Its maximum timestamp.
        header: Timestamp,
        /// The records'.
        found: Timestamp,
    },
    /// A record without a key where one is required.
    #[error("record {record} has no key: a compacted topic needs one in every record")]
    MissingKey {
        /// Its number within the batch, the first is 0.
        record: i32,
    },
    /// A record that is not well formed.
    #[error("record {record} of the batch is malformed: {problem}")]
    Record {
        /// Its number within the batch, the first is 0.
        record: i32,
        /// What is wrong.
        problem: RecordError,
    },
    /// A control batch that is not of the log's own form.
    #[error("control batch of an unknown form: {problem}")]
    Control {
        /// What is wrong.
        problem: &'static str,
    },
    /// A control record of a type that this program does not know.
    #[error("control record of type {ctype}, which this version does not know: upgrade this broker")]
    UnknownControlType {
        /// Its type.
        ctype: i16,
    },
}

struct Found<'a>(&'a Option<usize>);

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(found) => write!(f, ", {found} are there"),
            None => f.write_str(", which cannot be"),
        }
    }
}

impl BatchError {
    /// The code that a producer is answered with.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::NeedMore { .. }
            | Self::Length { .. }
            | Self::Crc { .. }
            | Self::Compression(_)
            | Self::Control { .. } => ErrorCode::CorruptBatch,
            Self::Magic { .. } | Self::UnknownControlType { .. } => ErrorCode::Unsupported,
            Self::TooLarge { .. } | Self::TooManyRecords { .. } | Self::DecompressedTooLarge { .. } => {
                ErrorCode::BatchTooLarge
            }
            Self::Empty
            | Self::RecordCount { .. }
            | Self::LastOffsetDelta { .. }
            | Self::NotAllowed { .. }
            | Self::Producer { .. }
            | Self::MissingKey { .. }
            | Self::Record { .. } => ErrorCode::InvalidRecord,
            Self::UnknownCompression { .. } => ErrorCode::UnsupportedCompression,
            Self::Timestamp { .. } | Self::MaxTimestamp { .. } => ErrorCode::InvalidTimestamp,
        }
    }
}

impl From<BatchError> for Error {
    fn from(error: BatchError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

impl From<CompressionError> for BatchError {
    fn from(error: CompressionError) -> Self {
        match error {
            CompressionError::TooLarge { bytes_max } => Self::DecompressedTooLarge { bytes_max },
            other => Self::Compression(other),
        }
    }
}
