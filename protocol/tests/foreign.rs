//! Interop with an implementation that is not ours: its bytes are read by us, ours by it.

use bytes::{Bytes, BytesMut};
use flowstone_protocol::batch::{BatchHeader, TimestampType, ValidationLimits, validate_produced, verify_crc};
use flowstone_protocol::compression::Compression;
use flowstone_protocol::control::{CONTROL_FORMAT_VERSION, encode_control};
use flowstone_protocol::record::{Record, RecordBatchBuilder, records};
use flowstone_protocol::rewrite::{with_compression, with_log_append_time};
use flowstone_protocol::{
    ControlType, LeaderEpoch, Offset, ProducerEpoch, ProducerId, RaftIndex, Sequence, Term, Timestamp,
};
use kafka_protocol::indexmap::IndexMap;
use kafka_protocol::protocol::StrBytes;
use kafka_protocol::records as foreign;

const NOW: i64 = 1_700_000_000_000;

/// Key, value, headers (no duplicate names: the foreign reader keeps only the last), milliseconds after the first.
type Row = (Option<&'static [u8]>, Option<&'static [u8]>, &'static [(&'static str, Option<&'static [u8]>)], i64);

const ROWS: &[Row] = &[
    (Some(b"key"), Some(b"value"), &[], 0),
    (None, Some(b"no key"), &[], 5),
    (Some(b"tombstone"), None, &[], 3),
    (None, None, &[("null", None), ("empty", Some(b"")), ("trace", Some(b"00-4bf9"))], -2000),
    (Some(b""), Some(b""), &[("", Some(b"nameless"))], 100_000),
    (Some(&[0xff; 300]), Some(&[7; 70_000]), &[("big", Some(&[1; 200]))], 1),
];

fn foreign_codec(codec: Compression) -> foreign::Compression {
    match codec {
        Compression::None => foreign::Compression::None,
        Compression::Gzip => foreign::Compression::Gzip,
        Compression::Snappy => foreign::Compression::Snappy,
        Compression::Lz4 => foreign::Compression::Lz4,
        Compression::Zstd => foreign::Compression::Zstd,
    }
}

/// What a batch says of itself.
#[derive(Clone, Copy, Debug)]
struct Shape {
    producer: Option<(i64, i16, i32)>,
    transactional: bool,
    control: bool,
}

const PLAIN: Shape = Shape { producer: None, transactional: false, control: false };
const SHAPES: &[Shape] = &[
    PLAIN,
    Shape { producer: Some((0x1234_5678_9abc_def0, 3, 41)), ..PLAIN },
    Shape { producer: Some((9, 0, 0)), transactional: true, ..PLAIN },
    Shape { producer: Some((9, 1, -1)), transactional: true, control: true },
];

fn foreign_batch(codec: Compression, shape: Shape) -> Bytes {
    let (producer_id, producer_epoch, base_sequence) = shape.producer.unwrap_or((-1, -1, -1));
    let records: Vec<foreign::Record> = ROWS
        .iter()
        .enumerate()
        .map(|(i, (key, value, headers, after))| foreign::Record {
            transactional: shape.transactional,
            control: shape.control,
            delete_horizon: false,
            partition_leader_epoch: 12,
            producer_id,
            producer_epoch,
            timestamp_type: foreign::TimestampType::Creation,
            offset: 1000 + i as i64,
            // It begins a new batch where sequence and offset do not run in step, without a producer too.
            sequence: base_sequence + i as i32,
            timestamp: NOW + after,
            key: key.map(Bytes::from_static),
            value: value.map(Bytes::from_static),
            headers: headers
                .iter()
                .map(|(key, value)| (StrBytes::from_static_str(key), value.map(Bytes::from_static)))
                .collect::<IndexMap<_, _>>(),
        })
        .collect();
    let mut out = BytesMut::new();
    let options = foreign::RecordEncodeOptions { version: 2, compression: foreign_codec(codec) };
    foreign::RecordBatchEncoder::encode(&mut out, &records, &options).expect("the foreign encoder takes the rows");
    out.freeze()
}

fn our_batch(codec: Compression, shape: Shape) -> Bytes {
    let mut builder = RecordBatchBuilder::new(codec);
    if let Some((id, epoch, sequence)) = shape.producer {
        builder = builder.producer(ProducerId::new(id), ProducerEpoch::new(epoch), Sequence::new(sequence));
    }
    if shape.transactional {
        builder = builder.transactional();
    }
    for (key, value, headers, after) in ROWS {
        let headers = headers.iter().map(|(key, value)| (key.as_bytes(), *value));
        builder.append(Timestamp::new(NOW + after), *key, *value, headers).expect("far below 2 GiB");
    }
    builder.build()
}

fn read_ours(batch: Bytes) -> Vec<Record> {
    records(batch, 1 << 20).expect("a readable batch").collect::<Result<_, _>>().expect("readable records")
}

#[track_caller]
fn check_rows(records: &[Record], base_offset: i64, timestamp: impl Fn(i64) -> i64) {
    assert_eq!(records.len(), ROWS.len());
    for (i, (record, (key, value, headers, after))) in records.iter().zip(ROWS).enumerate() {
        assert_eq!(record.offset, Offset::new(base_offset + i as i64));
        assert_eq!(record.timestamp, Timestamp::new(timestamp(*after)));
        assert_eq!(record.key.as_deref(), *key);
        assert_eq!(record.value.as_deref(), *value);
        let ours: Vec<_> = record.headers.iter().map(|(key, value)| (&key[..], value.as_deref())).collect();
        let rows: Vec<_> = headers.iter().map(|(key, value)| (key.as_bytes(), *value)).collect();
        assert_eq!(ours, rows);
    }
}

fn decode_foreign(batch: &Bytes) -> foreign::RecordSet {
    let mut batch = batch.clone();
    let set = foreign::RecordBatchDecoder::decode(&mut batch).expect("the foreign decoder takes our bytes");
    assert!(batch.is_empty(), "the foreign decoder left bytes");
    set
}

#[track_caller]
fn check_foreign_rows(set: &foreign::RecordSet, base_offset: i64) {
    assert_eq!(set.records.len(), ROWS.len());
    for (i, (record, (key, value, headers, after))) in set.records.iter().zip(ROWS).enumerate() {
        assert_eq!(record.offset, base_offset + i as i64);
        assert_eq!(record.timestamp, NOW + after);
        assert_eq!(record.key.as_deref(), *key);
        assert_eq!(record.value.as_deref(), *value);
        let theirs: Vec<_> = record.headers.iter().map(|(key, value)| (key.as_str(), value.as_deref())).collect();
        assert_eq!(theirs, headers.to_vec());
    }
}

#[test]
fn their_batches_are_read_by_us() {
    for codec in Compression::ALL {
        for shape in SHAPES {
            let batch = foreign_batch(codec, *shape);
            let header = BatchHeader::parse(&batch).expect("a header");
            assert_eq!(header.total_bytes(), batch.len(), "{codec} {shape:?}: one batch");
            assert_eq!(verify_crc(&batch), Ok(()));
            assert_eq!(header.base_offset, Offset::new(1000));
            assert_eq!(header.last_offset(), Offset::new(1005));
            assert_eq!(header.leader_epoch, LeaderEpoch::new(12));
            assert_eq!(header.attributes.compression(), Ok(codec));
            assert_eq!(header.attributes.timestamp_type(), TimestampType::CreateTime);
            assert_eq!(header.attributes.is_transactional(), shape.transactional);
            assert_eq!(header.attributes.is_control(), shape.control);
            assert_eq!(header.data_records(), if shape.control { 0 } else { ROWS.len() as u64 });
            let (id, epoch, sequence) = shape.producer.unwrap_or((-1, -1, -1));
            assert_eq!(header.producer_id, ProducerId::new(id));
            assert_eq!(header.producer_epoch, ProducerEpoch::new(epoch));
            assert_eq!(header.base_sequence, Sequence::new(sequence));
            assert_eq!(header.max_timestamp, Timestamp::new(NOW + 100_000));
            check_rows(&read_ours(batch), 1000, |after| NOW + after);
        }
    }
}

#[test]
fn their_plain_batches_pass_our_check() {
    let limits = ValidationLimits::new(1 << 20, Timestamp::new(NOW));
    for codec in Compression::ALL {
        for shape in SHAPES {
            let checked = validate_produced(&foreign_batch(codec, *shape), &limits);
            assert_eq!(checked.is_ok(), !shape.control, "{codec} {shape:?}: {checked:?}");
        }
    }
}

#[test]
fn our_batches_are_read_by_them() {
    for codec in Compression::ALL {
        for shape in SHAPES.iter().filter(|shape| !shape.control) {
            let batch = our_batch(codec, *shape);
            let set = decode_foreign(&batch);
            assert_eq!(set.version, 2);
            assert_eq!(set.compression, foreign_codec(codec), "the rows shrink under every codec");
            check_foreign_rows(&set, 0);
            let (id, epoch, sequence) = shape.producer.unwrap_or((-1, -1, -1));
            for (i, record) in set.records.iter().enumerate() {
                assert_eq!((record.producer_id, record.producer_epoch), (id, epoch));
                assert_eq!(record.transactional, shape.transactional);
                assert!(!record.control);
                assert_eq!(record.partition_leader_epoch, -1);
                if shape.producer.is_some() {
                    assert_eq!(record.sequence, sequence + i as i32);
                }
            }
        }
    }
}

#[test]
fn what_a_leader_rewrites_is_read_by_them() {
    for from in Compression::ALL {
        let batch = our_batch(from, SHAPES[1]);
        for to in Compression::ALL {
            let rewritten = with_compression(&batch, to, None, 1 << 20).expect("it can be rewritten");
            let set = decode_foreign(&rewritten);
            assert_eq!(set.compression, foreign_codec(to));
            check_foreign_rows(&set, 0);
            assert_eq!(set.records[0].sequence, 41);
        }
        let stamped = with_log_append_time(&batch, Timestamp::new(NOW + 77)).expect("it can be stamped");
        assert!(decode_foreign(&stamped).records[0].timestamp_type == foreign::TimestampType::LogAppend);
        check_rows(&read_ours(stamped), 0, |_| NOW + 77);
    }
}

#[test]
fn our_control_batches_are_control_batches_to_them() {
    let (term, index, offset) = (Term::new(5), RaftIndex::new(80), Offset::new(1234));
    let batch = encode_control(ControlType::LogStart, term, index, offset, b"payload", CONTROL_FORMAT_VERSION);
    let set = decode_foreign(&batch);
    let [record] = &set.records[..] else { panic!("one record, not {}", set.records.len()) };
    assert!(record.control && !record.transactional);
    assert_eq!((record.offset, record.partition_leader_epoch, record.producer_id), (1234, 5, -1));
    // The form that Kafka's clients parse before they skip it: (i16 version, i16 type), (i16 version, i32 epoch, ...).
    assert_eq!(record.key.as_deref(), Some(&[0, 0, 0, 102][..]));
    let value = record.value.as_deref().expect("a value");
    assert_eq!(value[..6], [0, 1, 0, 0, 0, 5]);
    assert_eq!(&value[value.len() - 7..], b"payload");
}

#[test]
fn lz4_with_linked_and_large_blocks_is_read() {
    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
    use std::io::Write;
    let input: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 7 % 251) as u8).collect();
    for size in [BlockSize::Max64KB, BlockSize::Max256KB, BlockSize::Max1MB, BlockSize::Max4MB] {
        for mode in [BlockMode::Independent, BlockMode::Linked] {
            let info = FrameInfo::new().block_size(size).block_mode(mode).content_checksum(true).block_checksums(true);
            let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
            encoder.write_all(&input).expect("a vector takes all");
            let frame = encoder.finish().expect("a vector takes all");
            let output = Compression::Lz4.decompress(&frame, input.len());
            assert!(output.as_deref() == Ok(&input[..]), "{size:?} {mode:?}");
        }
    }
}

/// What Kafka's own clients can read: older ones take no linked blocks, and no block above 64 KiB.
#[test]
fn lz4_is_written_as_kafka_wants_it() {
    let mut frame = Vec::new();
    assert_eq!(Compression::Lz4.compress(None, &[7; 200_000], &mut frame), Ok(()));
    let [m0, m1, m2, m3, flags, block, ..] = frame[..] else { panic!("a frame has a header") };
    assert_eq!(u32::from_le_bytes([m0, m1, m2, m3]), 0x184d_2204);
    assert_eq!(flags, 0b0110_0000, "version 1, independent blocks, no checksums, no sizes");
    assert_eq!(block, 4 << 4, "64 KiB");
}

/// The highest levels would write windows that our own readers, and others that follow RFC 8878, refuse.
#[test]
fn zstd_of_the_highest_level_is_read() {
    let input: Vec<u8> = (0..9 << 20).map(|at: u32| (at >> 12) as u8).collect();
    for level in [19, 20, 22] {
        let mut frame = Vec::new();
        assert_eq!(Compression::Zstd.compress(Some(level), &input, &mut frame), Ok(()));
        assert!(Compression::Zstd.decompress(&frame, input.len()).as_deref() == Ok(&input[..]), "level {level}");
    }
}

#[test]
fn snappy_is_read_raw_and_framed() {
    let input = b"snappy, snappy, snappy, and then some".repeat(3000);
    let raw = snap::raw::Encoder::new().compress_vec(&input).expect("it can be compressed");
    assert!(Compression::Snappy.decompress(&raw, input.len()).as_deref() == Ok(&input[..]));
    let mut framed = Vec::new();
    assert_eq!(Compression::Snappy.compress(None, &input, &mut framed), Ok(()));
    assert_eq!(framed[..8], *b"\x82SNAPPY\0");
    assert!(Compression::Snappy.decompress(&framed, input.len()).as_deref() == Ok(&input[..]));
}

#[test]
fn gzip_of_several_members_and_zstd_of_several_frames_are_read() {
    for codec in [Compression::Gzip, Compression::Zstd] {
        let mut both = Vec::new();
        assert_eq!(codec.compress(None, b"first, ", &mut both), Ok(()));
        assert_eq!(codec.compress(None, b"second", &mut both), Ok(()));
        assert_eq!(codec.decompress(&both, 100).as_deref(), Ok(&b"first, second"[..]));
    }
}
