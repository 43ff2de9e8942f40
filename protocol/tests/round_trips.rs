//! Properties: what is built reads back the same, a rewritten batch holds the same records, and mutated bytes neither
//! panic nor get in unless every reader can read them.

use bytes::Bytes;
use flowstone_protocol::batch::{BatchError, BatchHeader, ValidationLimits, split_batches, validate_produced};
use flowstone_protocol::compression::Compression;
use flowstone_protocol::control::{
    CONTROL_FORMAT_VERSION, ControlRecord, decode_control, encode_control, log_start_of, log_start_payload,
};
use flowstone_protocol::record::{RecordBatchBuilder, records};
use flowstone_protocol::rewrite::{with_compression, with_log_append_time};
use flowstone_protocol::{
    ControlType, LeaderEpoch, Offset, ProducerEpoch, ProducerId, RaftIndex, Sequence, Term, Timestamp, fuzz_targets,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

type Header = (Vec<u8>, Option<Vec<u8>>);

#[derive(Clone, Debug)]
struct Row {
    timestamp: i64,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Vec<Header>,
}

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    // Runs, which codecs shrink, and noise, which they do not.
    prop_oneof![vec(any::<u8>(), 0..=max), (any::<u8>(), 0..=max).prop_map(|(byte, len)| vec![byte; len])]
}

fn row() -> impl Strategy<Value = Row> {
    let header = (bytes(20), option::of(bytes(30)));
    (0..1_700_000_000_000_i64, option::of(bytes(100)), option::of(bytes(1000)), vec(header, 0..4))
        .prop_map(|(timestamp, key, value, headers)| Row { timestamp, key, value, headers })
}

fn rows() -> impl Strategy<Value = Vec<Row>> {
    vec(row(), 1..40)
}

fn codec() -> impl Strategy<Value = Compression> {
    select(Compression::ALL.to_vec())
}

fn build(codec: Compression, rows: &[Row]) -> Bytes {
    let mut builder =
        RecordBatchBuilder::new(codec).producer(ProducerId::new(i64::MAX), ProducerEpoch::new(0), Sequence::new(17));
    for row in rows {
        let headers = row.headers.iter().map(|(key, value)| (&key[..], value.as_deref()));
        builder
            .append(Timestamp::new(row.timestamp), row.key.as_deref(), row.value.as_deref(), headers)
            .expect("far below 2 GiB");
    }
    builder.build()
}

fn limits() -> ValidationLimits {
    ValidationLimits::new(16 << 20, Timestamp::new(1_700_000_000_000))
}

#[track_caller]
fn check_rows(batch: Bytes, rows: &[Row], base: i64, log_append_time: Option<i64>) {
    let read: Vec<_> = records(batch, 16 << 20).expect("readable").collect::<Result<_, _>>().expect("readable");
    assert_eq!(read.len(), rows.len());
    for (i, (record, row)) in read.iter().zip(rows).enumerate() {
        assert_eq!(record.offset, Offset::new(base + i as i64));
        assert_eq!(record.timestamp, Timestamp::new(log_append_time.unwrap_or(row.timestamp)));
        assert_eq!(record.key.as_deref(), row.key.as_deref());
        assert_eq!(record.value.as_deref(), row.value.as_deref());
        let headers: Vec<Header> =
            record.headers.iter().map(|(key, value)| (key.to_vec(), value.as_deref().map(<[u8]>::to_vec))).collect();
        assert_eq!(headers, row.headers);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_built_passes_and_reads_back(codec in codec(), rows in rows()) {
        let batch = build(codec, &rows);
        let header = validate_produced(&batch, &limits()).expect("a good batch");
        prop_assert_eq!(header.record_count as usize, rows.len());
        prop_assert_eq!(header.last_sequence(), Sequence::new(17 + rows.len() as i32 - 1));
        check_rows(batch, &rows, 0, None);
    }

    #[test]
    fn stamping_leaves_the_crc_alone(codec in codec(), rows in rows(), base in 0..i64::MAX / 2, epoch in 0..i32::MAX) {
        let mut batch = build(codec, &rows).to_vec();
        let (base, epoch) = (Offset::new(base), LeaderEpoch::new(epoch));
        let prefix = flowstone_protocol::batch::stamped_prefix(&batch, base, epoch);
        batch[..16].copy_from_slice(&prefix);
        let header = validate_produced(&batch, &limits()).expect("still good");
        prop_assert_eq!((header.base_offset, header.leader_epoch), (base, epoch));
        check_rows(Bytes::from(batch), &rows, base.get(), None);
    }

    #[test]
    fn rewriting_keeps_the_records(from in codec(), to in codec(), rows in rows(), now in 0..i64::MAX) {
        let batch = build(from, &rows);
        let rewritten = with_compression(&batch, to, None, 16 << 20).expect("a good batch");
        let header = validate_produced(&rewritten, &limits()).expect("a good batch");
        prop_assert_eq!(header.base_sequence, Sequence::new(17));
        check_rows(rewritten.clone(), &rows, 0, None);
        let stamped = with_log_append_time(&rewritten, Timestamp::new(now)).expect("a good batch");
        check_rows(stamped, &rows, 0, Some(now));
    }

    #[test]
    fn batches_split_where_they_were_joined(codec in codec(), all in vec(vec(row(), 1..4), 0..5), cut in any::<usize>()) {
        let batches: Vec<Bytes> = all.iter().map(|rows| build(codec, rows)).collect();
        let joined = batches.concat();
        let split: Vec<Bytes> = split_batches(Bytes::from(joined.clone()))
            .map(|split| split.map(|(_, batch)| batch))
            .collect::<Result<_, _>>()
            .expect("whole batches");
        prop_assert_eq!(&split, &batches);
        // Cut anywhere: the whole ones come first, then one that needs more.
        let cut = cut.checked_rem(joined.len()).unwrap_or(0);
        let mut whole = 0;
        for split in split_batches(Bytes::from(joined[..cut].to_vec())) {
            match split {
                Ok((header, batch)) => {
                    prop_assert_eq!(&batch, &batches[whole]);
                    prop_assert_eq!(header.total_bytes(), batch.len());
                    whole += 1;
                }
                Err(error) => prop_assert!(matches!(error, BatchError::NeedMore { .. }), "{}", error),
            }
        }
        let starts: usize = batches[..whole].iter().map(Bytes::len).sum();
        prop_assert!(starts <= cut && batches.get(whole).is_none_or(|next| starts + next.len() > cut));
    }

    #[test]
    fn mutated_batches_are_told_from_good_ones(
        codec in codec(),
        rows in vec(row(), 1..8),
        mutations in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in option::of(any::<prop::sample::Index>()),
    ) {
        let mut batch = build(codec, &rows).to_vec();
        for (at, byte) in mutations {
            let at = at.index(batch.len());
            batch[at] = byte;
        }
        if let Some(cut) = cut {
            batch.truncate(cut.index(batch.len()));
        }
        // With the CRC as it was, and with all of the frame put right again: the targets assert what must hold.
        fuzz_targets::batch(&batch);
        fuzz_targets::sealed_batch(&batch);
    }

    #[test]
    fn compressed_bytes_come_back_and_the_cap_holds(codec in codec(), level in option::of(-10..30), input in bytes(100_000)) {
        let mut compressed = b"what was there before".to_vec();
        let before = compressed.len();
        codec.compress(level, &input, &mut compressed).expect("any input can be compressed");
        let compressed = &compressed[before..];
        let output = codec.decompress(compressed, input.len());
        prop_assert_eq!(output.as_deref(), Ok(&input[..]));
        if !input.is_empty() && codec != Compression::None {
            prop_assert!(codec.decompress(compressed, input.len() - 1).is_err());
        }
    }

    #[test]
    fn decompressing_noise_is_harmless(codec in 0..5_u8, noise in bytes(500)) {
        let mut input = vec![codec];
        input.extend_from_slice(&noise);
        fuzz_targets::decompress(&input);
    }

    #[test]
    fn decompressing_damaged_streams_is_harmless(
        codec in codec(),
        input in bytes(5000),
        mutations in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut damaged = vec![codec.id()];
        codec.compress(None, &input, &mut damaged).expect("any input can be compressed");
        for (at, byte) in mutations {
            let at = 1 + at.index(damaged.len());
            if let Some(into) = damaged.get_mut(at) {
                *into = byte;
            }
        }
        fuzz_targets::decompress(&damaged);
    }

    #[test]
    fn control_batches_come_back_the_same(
        ctype in select(vec![ControlType::NoOp, ControlType::Membership, ControlType::LogStart, ControlType::ProducerExpiry]),
        term in 0..=i32::MAX as u64,
        index in any::<u64>(),
        offset in 0..i64::MAX,
        payload in bytes(300),
        format_version in any::<i16>(),
    ) {
        let (term, index, offset) = (Term::new(term), RaftIndex::new(index), Offset::new(offset));
        let batch = encode_control(ctype, term, index, offset, &payload, format_version);
        prop_assert_eq!(&batch, &encode_control(ctype, term, index, offset, &payload, format_version));
        let expected = ControlRecord { ctype, term, index, offset, format_version, payload: payload.into() };
        prop_assert_eq!(decode_control(&batch), Ok(expected));
        let header = BatchHeader::parse(&batch).expect("a header");
        prop_assert_eq!((header.base_offset, header.offsets(), header.data_records()), (offset, 1, 0));
        prop_assert_eq!(header.max_timestamp, Timestamp::NONE);
    }

    /// No bit of a control batch can flip unseen: not in the part that the CRC covers, nor in the epoch and offset that
    /// it does not.
    #[test]
    fn a_flipped_bit_in_a_control_batch_is_seen(at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let batch = encode_control(
            ControlType::NoOp,
            Term::new(7),
            RaftIndex::new(42),
            Offset::new(1 << 40),
            b"",
            CONTROL_FORMAT_VERSION,
        );
        let mut flipped = batch.to_vec();
        let at = at.index(flipped.len());
        flipped[at] ^= 1 << bit;
        prop_assert!(decode_control(&flipped).is_err(), "byte {}", at);
    }

    #[test]
    fn log_starts_come_back(offset in any::<i64>()) {
        let payload = log_start_payload(Offset::new(offset));
        prop_assert_eq!(log_start_of(&payload), Ok(Offset::new(offset)));
        prop_assert!(log_start_of(&payload[1..]).is_err());
    }
}

#[test]
fn duplicate_headers_stay_in_order() {
    let headers: [(&[u8], Option<&[u8]>); 4] =
        [(b"a", Some(b"1")), (b"b", None), (b"a", Some(b"2")), (b"a", Some(b"1"))];
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(Timestamp::new(1), None, None, headers).expect("small");
    let batch = builder.build();
    let record = records(batch.clone(), 0).expect("readable").next().expect("one").expect("readable");
    let read: Vec<_> = record.headers.iter().map(|(key, value)| (&key[..], value.as_deref())).collect();
    assert_eq!(read, headers);
}

#[test]
fn uncompressed_records_share_the_batchs_memory() {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(Timestamp::new(1), Some(b"key"), Some(b"value"), [(&b"h"[..], Some(&b"v"[..]))]).expect("small");
    let batch = builder.build();
    let within = |part: &Bytes| batch.as_ptr_range().contains(&part.as_ptr());
    let record = records(batch.clone(), 0).expect("readable").next().expect("one").expect("readable");
    assert!(record.key.as_ref().is_some_and(within) && record.value.as_ref().is_some_and(within));
    assert!(record.headers.iter().all(|(key, value)| within(key) && value.as_ref().is_some_and(within)));
    assert_eq!(records(batch, 0).expect("readable").next().expect("one").expect("readable").headers.capacity(), 1);
}

#[test]
fn records_that_do_not_shrink_are_stored_as_they_are() {
    let mut builder = RecordBatchBuilder::new(Compression::Gzip);
    builder.append(Timestamp::new(1), None, Some(b"x"), []).expect("small");
    let header = BatchHeader::parse(&builder.build()).expect("a header");
    assert_eq!(header.attributes.compression(), Ok(Compression::None));
}

#[test]
fn a_batch_ends_at_its_own_end() {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(Timestamp::new(1), None, Some(b"x"), []).expect("small");
    let batch = builder.build();
    let mut followed = batch.to_vec();
    followed.extend_from_slice(&[0; 100]);
    assert_eq!(records(Bytes::from(followed), 0).expect("readable").count(), 1);
    let short = batch.slice(..batch.len() - 1);
    assert_eq!(records(short, 0).map(|_| ()), Err(BatchError::NeedMore { bytes: batch.len() }));
}

#[test]
fn compression_names() {
    for codec in Compression::ALL {
        assert_eq!(codec.as_str().parse(), Ok(codec));
        assert_eq!(Compression::from_id(codec.id()), Some(codec));
    }
    let error = "brotli".parse::<Compression>().expect_err("unknown");
    assert!(error.to_string().contains("use none, gzip, snappy, lz4 or zstd"));
}
