//! What may be changed in a batch: by its producer before it is stored, and by a leader before it proposes it, where the
//! topic asks for it. Nobody rewrites it later.

use bytes::Bytes;

use crate::batch::{Attributes, BatchError, BatchHeader, HEADER_BYTES, LOG_OVERHEAD};
use crate::compression::Compression;
use crate::ids::{ProducerEpoch, ProducerId, Sequence, Timestamp};
use crate::record::seal;

/// The batch under another identity and sequence of its producer, which sends it anew.
///
/// `batch` begins with one whole batch.
pub fn with_producer(
    batch: &[u8],
    producer_id: ProducerId,
    producer_epoch: ProducerEpoch,
    base_sequence: Sequence,
) -> Result<Bytes, BatchError> {
    let (header, batch) = whole(batch)?;
    Ok(seal(batch.to_vec(), &BatchHeader { producer_id, producer_epoch, base_sequence, ..header }))
}

/// The batch with the leader's time for all its records (`message.timestamp.type=LogAppendTime`).
///
/// `batch` begins with one whole batch.
pub fn with_log_append_time(batch: &[u8], now: Timestamp) -> Result<Bytes, BatchError> {
    let (mut header, batch) = whole(batch)?;
    header.attributes = Attributes::new(header.attributes.bits() | Attributes::LOG_APPEND_TIME);
    header.max_timestamp = now;
    Ok(seal(batch.to_vec(), &header))
}

/// The batch with its records in another codec (`compression.type`). Its records must come to at most
/// `max_decompressed` bytes.
///
/// `batch` begins with one whole batch. Where the new form would be larger, the records stay uncompressed.
pub fn with_compression(
    batch: &[u8],
    compression: Compression,
    level: Option<i32>,
    max_decompressed: usize,
) -> Result<Bytes, BatchError> {
    let (mut header, batch) = whole(batch)?;
    let present = header.attributes.compression()?;
    let decompressed;
    let records = if present == Compression::None {
        &batch[HEADER_BYTES..]
    } else {
        decompressed = present.decompress(&batch[HEADER_BYTES..], max_decompressed)?;
        &decompressed
    };
    let mut rewritten = Vec::with_capacity(HEADER_BYTES + records.len());
    rewritten.resize(HEADER_BYTES, 0);
    let mut codec = compression;
    compression.compress(level, records, &mut rewritten)?;
    if rewritten.len() > HEADER_BYTES + records.len() {
        codec = Compression::None;
        rewritten.truncate(HEADER_BYTES);
        rewritten.extend_from_slice(records);
    }
    let bytes = rewritten.len() - LOG_OVERHEAD;
    header.batch_length =
        i32::try_from(bytes).map_err(|_| BatchError::TooLarge { bytes, bytes_max: i32::MAX as usize })?;
    header.attributes = Attributes::new(header.attributes.bits() & !Attributes::COMPRESSION | i16::from(codec.id()));
    Ok(seal(rewritten, &header))
}

fn whole(batch: &[u8]) -> Result<(BatchHeader, &[u8]), BatchError> {
    let header = BatchHeader::parse(batch)?;
    match batch.get(..header.total_bytes()) {
        Some(batch) => Ok((header, batch)),
        None => Err(BatchError::NeedMore { bytes: header.total_bytes() }),
    }
}
