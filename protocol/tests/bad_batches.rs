//! Every kind of bad batch, each told by its own error and code.

use bytes::Bytes;
use flowstone_protocol::batch::{BatchError, BatchHeader, HEADER_BYTES, ValidationLimits, crc_of, validate_produced};
use flowstone_protocol::compression::Compression;
use flowstone_protocol::error::{ErrorCode, ErrorKind};
use flowstone_protocol::record::{RecordBatchBuilder, RecordError, records};
use flowstone_protocol::{Error, ProducerEpoch, ProducerId, Sequence, Timestamp};

const NOW: Timestamp = Timestamp::new(1_700_000_000_000);
const HOUR: i64 = 3_600_000;
const MAX_BYTES: usize = 4096;

// Where the fields lie in a batch.
const LENGTH: usize = 8;
const MAGIC: usize = 16;
const CRC: usize = 17;
const ATTRIBUTES: usize = 21;
const LAST_OFFSET_DELTA: usize = 23;
const MAX_TIMESTAMP: usize = 35;
const PRODUCER_ID: usize = 43;
const RECORD_COUNT: usize = 57;

fn limits() -> ValidationLimits {
    ValidationLimits { max_decompressed_bytes: 100_000, max_records: 50, ..ValidationLimits::new(MAX_BYTES, NOW) }
}

/// Three records, each of 24 bytes: length 1, attributes 1, timestamp 1, offset 1, no key 1, value 1 + 17, headers 1.
fn good() -> Vec<u8> {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    for _ in 0..3 {
        builder.append(NOW, None, Some(b"seventeen bytes.."), []).expect("small");
    }
    builder.build().to_vec()
}

fn with_timestamps(first: i64, second: i64) -> Vec<u8> {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    for timestamp in [first, second] {
        builder.append(Timestamp::new(timestamp), None, Some(b"x"), []).expect("small");
    }
    builder.build().to_vec()
}

/// The batch with the bytes at `at` replaced, and its CRC right.
fn patched(mut batch: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    batch[at..at + bytes.len()].copy_from_slice(bytes);
    sealed(batch)
}

/// The good batch's header over other records; length and CRC right.
fn with_records(count: i32, attributes: i16, records: &[u8]) -> Vec<u8> {
    let mut batch = good();
    batch.truncate(HEADER_BYTES);
    batch.extend_from_slice(records);
    batch[ATTRIBUTES..ATTRIBUTES + 2].copy_from_slice(&attributes.to_be_bytes());
    batch[RECORD_COUNT..].first_chunk_mut::<4>().expect("a header").copy_from_slice(&count.to_be_bytes());
    batch[LAST_OFFSET_DELTA..][..4].copy_from_slice(&(count - 1).to_be_bytes());
    sealed(batch)
}

fn sealed(mut batch: Vec<u8>) -> Vec<u8> {
    let length = (batch.len() - 12) as i32;
    batch[LENGTH..LENGTH + 4].copy_from_slice(&length.to_be_bytes());
    let crc = crc_of(&batch);
    batch[CRC..CRC + 4].copy_from_slice(&crc.to_be_bytes());
    batch
}

fn check_with(limits: &ValidationLimits, batch: &[u8]) -> Result<BatchHeader, BatchError> {
    validate_produced(batch, limits)
}

#[track_caller]
fn refused(batch: &[u8], code: ErrorCode) -> BatchError {
    let error = check_with(&limits(), batch).expect_err("a bad batch must be refused");
    assert_eq!(error.code(), code, "{error}");
    let told = Error::from(error.clone());
    assert_eq!((told.code, told.kind()), (code, ErrorKind::Fatal));
    assert!(!told.message.is_empty());
    error
}

#[test]
fn a_good_batch_passes() {
    let header = check_with(&limits(), &good()).expect("it is good");
    assert_eq!((header.record_count, header.total_bytes()), (3, HEADER_BYTES + 3 * 24));
    for (first, second) in [(0, 0), (0, NOW.get() + HOUR), (NOW.get() + HOUR, 0)] {
        assert!(check_with(&limits(), &with_timestamps(first, second)).is_ok(), "{first} {second}");
    }
}

#[test]
fn wrong_crc() {
    for at in ATTRIBUTES..good().len() {
        let mut batch = good();
        batch[at] ^= 0x10;
        let error = refused(&batch, ErrorCode::CorruptBatch);
        assert!(matches!(error, BatchError::Crc { .. }), "byte {at}: {error}");
    }
}

#[test]
fn wrong_magic() {
    for magic in [0_u8, 1, 3, 0xff] {
        let mut batch = good();
        batch[MAGIC] = magic;
        assert_eq!(refused(&batch, ErrorCode::Unsupported), BatchError::Magic { found: magic as i8 });
    }
}

#[test]
fn lying_length() {
    let real = good().len() - 12;
    for length in [i32::MIN, -1, 0, 48, 49, real as i32 - 1, real as i32 + 1, i32::MAX] {
        let mut batch = good();
        batch[LENGTH..LENGTH + 4].copy_from_slice(&length.to_be_bytes());
        let error = refused(&batch, ErrorCode::CorruptBatch);
        assert!(matches!(error, BatchError::Length { header, .. } if header == length), "{length}: {error}");
    }
}

#[test]
fn cut_short_or_followed_by_another() {
    for bytes in 0..HEADER_BYTES {
        assert_eq!(refused(&good()[..bytes], ErrorCode::CorruptBatch), BatchError::NeedMore { bytes: HEADER_BYTES });
    }
    let mut two = good();
    two.extend_from_slice(&good());
    assert!(matches!(refused(&two, ErrorCode::CorruptBatch), BatchError::Length { .. }));
}

#[test]
fn lying_record_count() {
    for (count, found) in [(1, None), (2, None), (4, Some(3)), (50, Some(3))] {
        let batch = patched(good(), RECORD_COUNT, &i32::to_be_bytes(count));
        let batch = patched(batch, LAST_OFFSET_DELTA, &i32::to_be_bytes(count - 1));
        let error = refused(&batch, ErrorCode::InvalidRecord);
        assert_eq!(error, BatchError::RecordCount { header: count, found });
    }
    let negative = patched(good(), RECORD_COUNT, &i32::to_be_bytes(-3));
    assert!(matches!(refused(&negative, ErrorCode::InvalidRecord), BatchError::RecordCount { header: -3, .. }));
    let delta = patched(good(), LAST_OFFSET_DELTA, &i32::to_be_bytes(3));
    assert_eq!(refused(&delta, ErrorCode::InvalidRecord), BatchError::LastOffsetDelta { header: 3, records: 3 });
    let many = patched(patched(good(), RECORD_COUNT, &[0x7f; 4]), LAST_OFFSET_DELTA, &[0x7f, 0x7f, 0x7f, 0x7e]);
    assert!(matches!(refused(&many, ErrorCode::BatchTooLarge), BatchError::TooManyRecords { .. }));
}

#[test]
fn lying_record_count_under_compression() {
    for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
        let mut compressed = Vec::new();
        assert_eq!(codec.compress(None, &good()[HEADER_BYTES..], &mut compressed), Ok(()));
        for (count, found) in [(2, None), (4, Some(3))] {
            let batch = with_records(count, i16::from(codec.id()), &compressed);
            let error = refused(&batch, ErrorCode::InvalidRecord);
            assert_eq!(error, BatchError::RecordCount { header: count, found }, "{codec}");
        }
        assert!(check_with(&limits(), &with_records(3, i16::from(codec.id()), &compressed)).is_ok());
    }
}

#[test]
fn oversized() {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(NOW, None, Some(&[1; MAX_BYTES]), []).expect("small");
    let batch = builder.build();
    let error = refused(&batch, ErrorCode::BatchTooLarge);
    assert_eq!(error, BatchError::TooLarge { bytes: batch.len(), bytes_max: MAX_BYTES });
    assert!(check_with(&ValidationLimits { max_bytes: batch.len(), ..limits() }, &batch).is_ok());
}

#[test]
fn zero_records() {
    let batch = with_records(0, 0, &[]);
    // Last offset delta -1: impossible in itself; a delta of 0 gets further.
    refused(&batch, ErrorCode::InvalidRecord);
    let batch = patched(batch, LAST_OFFSET_DELTA, &[0; 4]);
    assert_eq!(refused(&batch, ErrorCode::InvalidRecord), BatchError::Empty);
}

#[test]
fn decompression_beyond_the_cap() {
    // One honest record of 10 MB of zeros, and the same bytes as a stream of tiny records.
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(NOW, None, Some(&vec![0; 10_000_000]), []).expect("below 2 GiB");
    let one = builder.build().slice(HEADER_BYTES..);
    for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
        let mut bomb = Vec::new();
        assert_eq!(codec.compress(None, &one, &mut bomb), Ok(()));
        let roomy = ValidationLimits { max_bytes: usize::MAX, ..limits() };
        let batch = with_records(1, i16::from(codec.id()), &bomb);
        let error = check_with(&roomy, &batch).expect_err("a bomb");
        assert_eq!(error, BatchError::DecompressedTooLarge { bytes_max: 100_000 }, "{codec}");
        assert_eq!(error.code(), ErrorCode::BatchTooLarge);
        assert!(records(Bytes::from(batch.clone()), 100_000).is_err());
        let enough = ValidationLimits { max_decompressed_bytes: one.len(), ..roomy };
        assert!(check_with(&enough, &batch).is_ok(), "{codec}");
        let one_less = ValidationLimits { max_decompressed_bytes: one.len() - 1, ..roomy };
        assert!(check_with(&one_less, &batch).is_err(), "{codec}");
    }
}

#[test]
fn garbage_under_every_codec() {
    for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
        let mut compressed = Vec::new();
        assert_eq!(codec.compress(None, &good()[HEADER_BYTES..], &mut compressed), Ok(()));
        let id = i16::from(codec.id());
        assert!(
            check_with(&limits(), &with_records(3, id, &good()[HEADER_BYTES..])).is_err(),
            "{codec}: not compressed"
        );
        assert!(check_with(&limits(), &with_records(3, id, &[])).is_err(), "{codec}: nothing");
        let short = &compressed[..compressed.len() / 2];
        assert!(check_with(&limits(), &with_records(3, id, short)).is_err(), "{codec}: cut short");
        let mut trailing = compressed.clone();
        trailing.extend_from_slice(b"trailing bytes");
        assert!(check_with(&limits(), &with_records(3, id, &trailing)).is_err(), "{codec}: bytes behind");
    }
}

#[test]
fn lying_lengths_inside_the_codecs() {
    // Raw snappy that claims 4 GiB.
    let snappy = with_records(1, 2, &[0xff, 0xff, 0xff, 0xff, 0x0f, 0, 1]);
    refused(&snappy, ErrorCode::CorruptBatch);
    // A xerial block that claims to be longer than what is there.
    let mut framed = b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01".to_vec();
    framed.extend_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0, 0]);
    refused(&with_records(1, 2, &framed), ErrorCode::CorruptBatch);
    // A zstd frame that wants a window of 128 MiB (magic, no content size, window descriptor 17 << 3).
    let zstd = with_records(1, 4, &[0x28, 0xb5, 0x2f, 0xfd, 0, 17 << 3, 1, 0, 0]);
    refused(&zstd, ErrorCode::CorruptBatch);
    // The legacy lz4 frame.
    refused(&with_records(1, 3, &[0x02, 0x21, 0x4c, 0x18, 1, 0, 0, 0, 0]), ErrorCode::CorruptBatch);
}

#[test]
fn bits_that_a_plain_producer_must_not_set() {
    for (bit, what) in [(3, "append time"), (4, "transactional"), (5, "control"), (6, "horizon"), (7, "unknown")] {
        let batch = patched(good(), ATTRIBUTES, &i16::to_be_bytes(1 << bit));
        let error = refused(&batch, ErrorCode::InvalidRecord);
        assert!(matches!(error, BatchError::NotAllowed { what: found } if found.contains(what)), "{bit}: {error}");
    }
    let unknown_high_bit = patched(good(), ATTRIBUTES, &i16::to_be_bytes(i16::MIN));
    assert!(matches!(refused(&unknown_high_bit, ErrorCode::InvalidRecord), BatchError::NotAllowed { .. }));
}

#[test]
fn unknown_compression() {
    for id in 5..8_u8 {
        let batch = patched(good(), ATTRIBUTES, &i16::to_be_bytes(i16::from(id)));
        assert_eq!(refused(&batch, ErrorCode::UnsupportedCompression), BatchError::UnknownCompression { id });
    }
}

#[test]
fn timestamps_out_of_range() {
    let latest = NOW.get() + HOUR;
    for (first, second, bad) in [
        (-1, -1, (0, -1)),
        (0, -1, (1, -1)),
        (i64::MIN, 0, (0, i64::MIN)),
        (NOW.get(), latest + 1, (1, latest + 1)),
        (i64::MAX, 0, (0, i64::MAX)),
    ] {
        let error = refused(&with_timestamps(first, second), ErrorCode::InvalidTimestamp);
        let expected =
            BatchError::Timestamp { record: bad.0, timestamp: Timestamp::new(bad.1), latest: Timestamp::new(latest) };
        assert_eq!(error, expected, "{first} {second}");
    }
}

#[test]
fn lying_max_timestamp() {
    for lie in [-1, 0, NOW.get() - 1, NOW.get() + 1, i64::MAX] {
        let batch = patched(good(), MAX_TIMESTAMP, &lie.to_be_bytes());
        let error = refused(&batch, ErrorCode::InvalidTimestamp);
        assert_eq!(error, BatchError::MaxTimestamp { header: Timestamp::new(lie), found: NOW });
    }
}

#[test]
fn half_a_producer() {
    // Id, epoch, sequence.
    for (id, epoch, sequence, good_producer) in [
        (-1, -1, -1, true),
        (7, 0, 0, true),
        (i64::MAX, i16::MAX, i32::MAX, true),
        (7, -1, 0, false),
        (7, 0, -1, false),
        (-2, 0, 0, false),
    ] {
        let mut builder = RecordBatchBuilder::new(Compression::None);
        builder.append(NOW, None, None, []).expect("small");
        builder.set_producer(ProducerId::new(id), ProducerEpoch::new(epoch), Sequence::new(sequence));
        let checked = check_with(&limits(), &builder.build());
        match checked {
            Ok(_) => assert!(good_producer, "{id} {epoch} {sequence}"),
            Err(error) => {
                assert!(!good_producer, "{id} {epoch} {sequence}: {error}");
                assert!(matches!(error, BatchError::Producer { .. }), "{error}");
            }
        }
    }
    assert_eq!(PRODUCER_ID, 43);
}

#[test]
fn missing_keys_on_a_compacted_topic() {
    let compacted = ValidationLimits { require_keys: true, ..limits() };
    assert_eq!(check_with(&compacted, &good()), Err(BatchError::MissingKey { record: 0 }));
    let mut builder = RecordBatchBuilder::new(Compression::Zstd);
    for i in 0..20 {
        builder.append(NOW, (i != 11).then_some(b"key"), Some(b"value"), []).expect("small");
    }
    assert_eq!(check_with(&compacted, &builder.build()), Err(BatchError::MissingKey { record: 11 }));
}

/// The records of one-record batches, and what is wrong with each.
#[test]
fn malformed_records() {
    #[track_caller]
    fn check(what: &str, record: &[u8], problem: RecordError) {
        let expected = BatchError::Record { record: 0, problem };
        assert_eq!(refused(&with_records(1, 0, record), ErrorCode::InvalidRecord), expected, "{what}");
        // A stream out of a codec is walked by the same rules.
        let mut compressed = Vec::new();
        assert_eq!(Compression::Zstd.compress(None, record, &mut compressed), Ok(()));
        assert_eq!(refused(&with_records(1, 4, &compressed), ErrorCode::InvalidRecord), expected, "{what}, zstd");
        // And so does the reader see it.
        let read: Result<Vec<_>, _> =
            records(Bytes::from(with_records(1, 0, record)), 0).and_then(|records| records.collect());
        if problem != RecordError::OffsetDelta {
            assert_eq!(read, Err(expected), "{what}");
        }
    }
    // Zigzag: 1 is 0x02, 6 is 0x0c, 7 is 0x0e, -1 is 0x01, -2 is 0x03.
    let fine = [0x0c, 0, 0, 0, 1, 1, 0];
    assert!(check_with(&limits(), &with_records(1, 0, &fine)).is_ok());

    check("overlong length", &[0x8c, 0x80, 0x80, 0x80, 0x80, 0, 0, 0, 0, 1, 1, 0], RecordError::Varint);
    check("length beyond 32 bits", &[0xff, 0xff, 0xff, 0xff, 0x1f, 0, 0, 0, 1, 1, 0], RecordError::Varint);
    let overlong_timestamp = [0x20, 0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0, 0, 1, 1, 0];
    check("overlong timestamp", &overlong_timestamp, RecordError::Varint);
    let wide_timestamp = [0x1e, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 1, 1, 0];
    check("timestamp beyond 64 bits", &wide_timestamp, RecordError::Varint);
    check("overlong offset", &[0x16, 0, 0, 0x80, 0x80, 0x80, 0x80, 0x80, 0, 1, 1, 0], RecordError::Varint);
    check("negative length", &[0x01, 0, 0, 0, 1, 1, 0], RecordError::Length);
    check("zero length", &[0x00, 0, 0, 0, 1, 1, 0], RecordError::Sum);
    check("length too small", &[0x0a, 0, 0, 0, 1, 1, 0], RecordError::Sum);
    check("length too large", &[0x0e, 0, 0, 0, 1, 1, 0], RecordError::Sum);
    check("offset delta off by one", &[0x0c, 0, 0, 2, 1, 1, 0], RecordError::OffsetDelta);
    check("negative offset delta", &[0x0c, 0, 0, 1, 1, 1, 0], RecordError::OffsetDelta);
    check("key of length -2", &[0x0c, 0, 0, 0, 3, 1, 0], RecordError::Length);
    check("value of length -2", &[0x0c, 0, 0, 0, 1, 3, 0], RecordError::Length);
    check("key beyond the record", &[0x0c, 0, 0, 0, 0x20, 1, 0], RecordError::Length);
    check("value beyond the record", &[0x0c, 0, 0, 0, 1, 0x7e, 0], RecordError::Length);
    check("key of 2 GiB", &[0x14, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff, 0x0f, 1, 0], RecordError::Length);
    check("negative header count", &[0x0c, 0, 0, 0, 1, 1, 1], RecordError::HeaderCount);
    check("a header that has no room", &[0x0c, 0, 0, 0, 1, 1, 2], RecordError::HeaderCount);
    check("2 billion headers", &[0x14, 0, 0, 0, 1, 1, 0xfe, 0xff, 0xff, 0xff, 0x0f], RecordError::HeaderCount);
    check("header with a null key", &[0x10, 0, 0, 0, 1, 1, 2, 1, 1], RecordError::Length);
    check("header value beyond the record", &[0x10, 0, 0, 0, 1, 1, 2, 0, 0x40], RecordError::Length);
    check("cut within a varint", &[0x8c], RecordError::CutShort);
    check("cut after the length", &[0x0c], RecordError::CutShort);
    check("cut before the headers", &[0x0c, 0, 0, 0, 1, 1], RecordError::CutShort);
}

#[test]
fn bytes_behind_the_last_record() {
    let mut batch = good();
    batch.push(0);
    let error = refused(&sealed(batch), ErrorCode::InvalidRecord);
    assert_eq!(error, BatchError::RecordCount { header: 3, found: None });
}
