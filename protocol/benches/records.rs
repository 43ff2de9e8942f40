//! The hot parts of the record batch: building, the broker's walk, reading, and the CRC.
//!
//! One batch of 100 B values without keys is what `flowstone bench` sends; throughput is in records, or bytes for the CRC.

// criterion's macros make undocumented items.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use flowstone_protocol::batch::{BatchHeader, ValidationLimits, crc_of, validate_produced};
use flowstone_protocol::compression::Compression;
use flowstone_protocol::record::{RecordBatchBuilder, records};
use flowstone_protocol::{RaftIndex, Term, Timestamp, control};

const NOW: Timestamp = Timestamp::new(1_700_000_000_000);

/// A batch of about `batch_bytes` with values of `value_bytes`, half of each noise, so that codecs halve it.
fn batch(codec: Compression, value_bytes: usize, batch_bytes: usize) -> (Bytes, u64) {
    let mut builder = RecordBatchBuilder::with_capacity(codec, batch_bytes + value_bytes);
    let mut value = vec![b'x'; value_bytes];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while builder.estimated_bytes() < batch_bytes {
        for byte in value.iter_mut().step_by(2) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        builder.append(NOW, None, Some(&value), []).expect("below 2 GiB");
    }
    let records = builder.record_count() as u64;
    (builder.build(), records)
}

fn build(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("build");
    for (value_bytes, batch_bytes) in [(100, 16 << 10), (100, 256 << 10), (1000, 256 << 10)] {
        let value = vec![b'x'; value_bytes];
        let (_, records) = batch(Compression::None, value_bytes, batch_bytes);
        group.throughput(Throughput::Elements(records));
        group.bench_function(format!("{value_bytes} B into {} KiB", batch_bytes >> 10), |bencher| {
            bencher.iter(|| {
                let mut builder = RecordBatchBuilder::with_capacity(Compression::None, batch_bytes + 2048);
                for _ in 0..records {
                    builder.append(NOW, None, Some(black_box(&value)), []).expect("below 2 GiB");
                }
                builder.build()
            });
        });
    }
    let value = [b'x'; 100];
    let headers: [(&[u8], Option<&[u8]>); 2] = [(b"trace", Some(b"00-4bf92f3577b34da6")), (b"tenant", Some(b"7"))];
    group.throughput(Throughput::Elements(1000));
    group.bench_function("100 B with key and 2 headers", |bencher| {
        bencher.iter(|| {
            let mut builder = RecordBatchBuilder::with_capacity(Compression::None, 256 << 10);
            for i in 0..1000_u32 {
                let key = i.to_be_bytes();
                builder.append(NOW, Some(&key), Some(black_box(&value)), headers).expect("below 2 GiB");
            }
            builder.build()
        });
    });
    group.finish();
}

fn validate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("validate");
    for codec in Compression::ALL {
        for value_bytes in [100, 1000] {
            let (batch, records) = batch(codec, value_bytes, 256 << 10);
            let limits = ValidationLimits::new(1 << 20, NOW);
            assert!(validate_produced(&batch, &limits).is_ok());
            group.throughput(Throughput::Elements(records));
            group.bench_function(format!("{codec}, {value_bytes} B"), |bencher| {
                bencher.iter(|| validate_produced(black_box(&batch), &limits));
            });
        }
    }
    // One record at a time: what a batch costs before its records.
    for codec in [Compression::None, Compression::Zstd] {
        let mut builder = RecordBatchBuilder::new(codec);
        builder.append(NOW, None, Some(&[b'x'; 1000]), []).expect("small");
        let batch = builder.build();
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("{codec}, one record of 1000 B"), |bencher| {
            bencher.iter(|| validate_produced(black_box(&batch), &ValidationLimits::new(1 << 20, NOW)));
        });
    }
    group.finish();
}

fn iterate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("iterate");
    for codec in Compression::ALL {
        let (batch, count) = batch(codec, 100, 256 << 10);
        group.throughput(Throughput::Elements(count));
        group.bench_function(format!("{codec}, 100 B, records"), |bencher| {
            bencher.iter_batched(
                || batch.clone(),
                |batch| {
                    let mut bytes = 0;
                    for record in records(batch, 1 << 20).expect("readable") {
                        bytes += record.expect("readable").value.map_or(0, |value| value.len());
                    }
                    bytes
                },
                BatchSize::SmallInput,
            );
        });
    }
    let (batch, count) = batch(Compression::None, 100, 256 << 10);
    group.throughput(Throughput::Elements(count));
    group.bench_function("none, 100 B, views", |bencher| {
        bencher.iter(|| {
            let mut iter = records(batch.clone(), 1 << 20).expect("readable");
            let mut bytes = 0;
            while let Some(view) = iter.next_view() {
                bytes += view.expect("readable").value.map_or(0, <[u8]>::len);
            }
            bytes
        });
    });
    group.bench_function("none, 100 B, collected", |bencher| {
        bencher.iter(|| records(batch.clone(), 1 << 20).expect("readable").collect::<Vec<_>>());
    });
    group.finish();
}

fn frame(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("crc");
    for bytes in [1 << 10, 16 << 10, 256 << 10, 1 << 20] {
        let (batch, _) = batch(Compression::None, 1000, bytes);
        group.throughput(Throughput::Bytes(batch.len() as u64));
        group.bench_function(format!("{} KiB", bytes >> 10), |bencher| bencher.iter(|| crc_of(black_box(&batch))));
    }
    group.finish();
    let mut group = criterion.benchmark_group("header");
    let (batch, _) = batch(Compression::None, 1000, 1000);
    group.throughput(Throughput::Elements(1));
    group.bench_function("parse", |bencher| bencher.iter(|| BatchHeader::parse(black_box(&batch))));
    let encode = || {
        control::encode_control(
            control::ControlType::NoOp,
            Term::new(3),
            RaftIndex::new(9),
            flowstone_protocol::Offset::new(7),
            b"",
            control::CONTROL_FORMAT_VERSION,
        )
    };
    let batch = encode();
    group.bench_function("control, encode", |bencher| bencher.iter(encode));
    group.bench_function("control, decode", |bencher| bencher.iter(|| control::decode_control(black_box(&batch))));
    group.finish();
}

criterion_group!(benches, build, validate, iterate, frame);
criterion_main!(benches);
