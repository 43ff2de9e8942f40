//! Fuzz targets: plain functions of arbitrary bytes that must neither panic nor allocate without bound. `fuzz/` runs
//! them under libFuzzer; a test replays its corpus. They `assert!` what must hold of any input.

use bytes::Bytes;
use prost::Message;

use crate::batch::{
    ATTRIBUTES_AT, BatchHeader, CRC_AT, HEADER_BYTES, LOG_OVERHEAD, MAGIC, ValidationLimits, crc_of, split_batches,
    validate_produced, verify_crc,
};
use crate::compression::Compression;
use crate::control::{decode_control, encode_control};
use crate::ids::{ProducerEpoch, ProducerId, Sequence, Timestamp};
use crate::record::{RecordBatchBuilder, records};
use crate::rewrite::{with_compression, with_log_append_time};
use crate::{Error, pb};

/// Takes any bytes, and panics where it finds a defect.
pub type Target = fn(&[u8]);

/// The targets by name, which is also the name of their corpus folder.
pub const TARGETS: [(&str, Target); 5] = [
    ("batch", batch),
    ("sealed_batch", sealed_batch),
    ("decompress", decompress),
    ("messages", messages),
    ("round_trip", round_trip),
];

const DECOMPRESSED_BYTES_MAX: usize = 1 << 20;
const NOW: Timestamp = Timestamp::new(1_700_000_000_000);

fn limits() -> ValidationLimits {
    ValidationLimits {
        max_bytes: 1 << 20,
        max_decompressed_bytes: DECOMPRESSED_BYTES_MAX,
        max_records: 1 << 20,
        now: NOW,
        max_timestamp_ahead: ValidationLimits::TIMESTAMP_AHEAD,
        require_keys: false,
    }
}

/// Bytes as they come: nearly all fail early, by their CRC at the latest.
pub fn batch(data: &[u8]) {
    let _ = BatchHeader::parse(data);
    let _ = verify_crc(data);
    let _ = validate_produced(data, &limits());
    let _ = decode_control(data);
    for split in split_batches(Bytes::copy_from_slice(data)) {
        let Ok((header, batch)) = split else { break };
        assert_eq!(header.total_bytes(), batch.len());
        read_all(&batch);
    }
}

/// Bytes with magic, length and CRC put right, so that what lies behind them is reached.
pub fn sealed_batch(data: &[u8]) {
    if data.len() < HEADER_BYTES {
        return;
    }
    let mut batch = data.to_vec();
    let length = (batch.len() - LOG_OVERHEAD) as i32;
    batch[8..12].copy_from_slice(&length.to_be_bytes());
    batch[16] = MAGIC as u8;
    let crc = crc_of(&batch);
    batch[CRC_AT..ATTRIBUTES_AT].copy_from_slice(&crc.to_be_bytes());

    if let Ok(record) = decode_control(&batch) {
        let again = encode_control(
            record.ctype,
            record.term,
            record.index,
            record.offset,
            &record.payload,
            record.format_version,
        );
        let decoded = decode_control(&again);
        assert_eq!(decoded, Ok(record), "a control record does not survive");
    }
    let read = read_all(&batch);
    if let Ok(header) = validate_produced(&batch, &limits()) {
        // What the broker lets in, every consumer can read, and nothing else comes out.
        assert_eq!(read, Some(header.record_count as usize), "an accepted batch does not read back");
        for codec in Compression::ALL {
            if let Ok(rewritten) = with_compression(&batch, codec, None, DECOMPRESSED_BYTES_MAX) {
                assert_eq!(
                    validate_produced(&rewritten, &ValidationLimits { max_bytes: usize::MAX, ..limits() })
                        .map(|rewritten| rewritten.record_count),
                    Ok(header.record_count)
                );
            }
        }
        let stamped = with_log_append_time(&batch, NOW);
        assert!(stamped.is_ok_and(|batch| verify_crc(&batch).is_ok()));
    }
}

/// The first byte chooses a codec, the rest is its input.
pub fn decompress(data: &[u8]) {
    let Some((codec, input)) = data.split_first() else { return };
    let Some(codec) = Compression::from_id(codec % 5) else { return };
    if let Ok(output) = codec.decompress(input, DECOMPRESSED_BYTES_MAX) {
        assert!(output.len() <= DECOMPRESSED_BYTES_MAX);
        let mut compressed = Vec::new();
        assert_eq!(codec.compress(None, &output, &mut compressed), Ok(()));
        assert_eq!(codec.decompress(&compressed, DECOMPRESSED_BYTES_MAX), Ok(output));
    }
}

/// Every request that a client may send, and the errors that it may be sent.
pub fn messages(data: &[u8]) {
    let bytes = || Bytes::copy_from_slice(data);
    let _ = pb::ProduceRequest::decode(bytes());
    let _ = pb::FetchRequest::decode(bytes());
    let _ = pb::MetadataRequest::decode(bytes());
    let _ = pb::ListOffsetsRequest::decode(bytes());
    let _ = pb::CreateTopicRequest::decode(bytes());
    let _ = pb::AlterTopicRequest::decode(bytes());
    let _ = pb::TrimPartitionRequest::decode(bytes());
    if let Ok(detail) = pb::ErrorDetail::decode(bytes()) {
        let error = Error::from_detail(&detail);
        assert_eq!(Error::from_status(&error.to_status()), Some(error));
    }
}

/// Records made of the bytes, built and read back: they must be the same.
///
/// The first byte chooses the codec; each record then takes a byte of flags, one of key length, two of value length.
pub fn round_trip(data: &[u8]) {
    let Some((codec, mut rest)) = data.split_first() else { return };
    let Some(codec) = Compression::from_id(codec % 5) else { return };
    let mut expected = Vec::new();
    while let Some(([flags, key, value_high, value_low], after)) = rest.split_first_chunk::<4>() {
        let mut after = after;
        let mut take = |bytes: usize| {
            let (taken, left) = after.split_at(bytes.min(after.len()));
            after = left;
            taken
        };
        let key = (flags & 1 == 0).then(|| take(usize::from(*key)));
        let value = (flags & 2 == 0).then(|| take(usize::from(u16::from_be_bytes([*value_high, *value_low]))));
        let headers: Vec<(&[u8], Option<&[u8]>)> =
            (0..flags >> 5).map(|i| (take(usize::from(i)), (i % 2 == 0).then(|| take(3)))).collect();
        let timestamp = NOW.get() - i64::from(*flags) * i64::from(*value_low);
        expected.push((Timestamp::new(timestamp), key, value, headers));
        rest = after;
    }
    if expected.is_empty() {
        return;
    }
    let mut builder =
        RecordBatchBuilder::new(codec).producer(ProducerId::new(7), ProducerEpoch::new(0), Sequence::new(3));
    for (timestamp, key, value, headers) in &expected {
        assert_eq!(builder.append(*timestamp, *key, *value, headers.iter().copied()), Ok(()));
    }
    let estimated = builder.estimated_bytes();
    let batch = builder.build();
    assert!(batch.len() <= estimated, "{} bytes, {estimated} were told", batch.len());
    let roomy = ValidationLimits { max_bytes: usize::MAX, max_decompressed_bytes: usize::MAX, ..limits() };
    assert!(validate_produced(&batch, &roomy).is_ok());
    let Ok(iter) = records(batch, usize::MAX) else { panic!("a batch of our own cannot be read") };
    let mut count = 0;
    for (record, (timestamp, key, value, headers)) in iter.zip(&expected) {
        let Ok(record) = record else { panic!("a record of our own cannot be read") };
        assert_eq!(record.timestamp, *timestamp);
        assert_eq!(record.key.as_deref(), *key);
        assert_eq!(record.value.as_deref(), *value);
        assert!(record.headers.iter().map(|(key, value)| (&key[..], value.as_deref())).eq(headers.iter().copied()));
        count += 1;
    }
    assert_eq!(count, expected.len());
}

/// Reads the batch to its end by both ways; the number of records, `None` where one is malformed.
fn read_all(batch: &[u8]) -> Option<usize> {
    let iter = records(Bytes::copy_from_slice(batch), DECOMPRESSED_BYTES_MAX).ok()?;
    let most = iter.size_hint().1;
    let mut views = iter.clone();
    let (mut count, mut failed) = (0, false);
    for record in iter {
        let view = views.next_view();
        match (record, view) {
            (Ok(record), Some(Ok(view))) => {
                assert_eq!(record.key.as_deref(), view.key);
                assert_eq!(record.value.as_deref(), view.value);
                assert_eq!((record.offset, record.timestamp), (view.offset, view.timestamp));
                count += 1;
            }
            (Err(_), Some(Err(_))) => failed = true,
            (record, view) => panic!("read as {record:?} and as {view:?}"),
        }
    }
    assert!(views.next_view().is_none());
    assert!(most.is_some_and(|most| count <= most));
    (!failed).then_some(count)
}
