//! Each codec over the records of one batch: text of log lines, which shrinks as such text does.

// criterion's macros make undocumented items.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flowstone_protocol::compression::Compression;

fn lines(bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 128);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let line = format!(
            "2026-07-{:02}T10:{:02}:{:02}Z INFO request id={:016x} path=/v1/orders/{} status=200 took_us={}\n",
            state % 28 + 1,
            state >> 8 & 31,
            state >> 16 & 31,
            state,
            state >> 24 & 0xffff,
            state >> 40 & 0xfff,
        );
        out.extend_from_slice(line.as_bytes());
    }
    out.truncate(bytes);
    out
}

fn codecs(criterion: &mut Criterion) {
    for bytes in [16 << 10, 256 << 10] {
        let input = lines(bytes);
        for codec in Compression::ALL {
            let mut compressed = Vec::new();
            codec.compress(None, &input, &mut compressed).expect("a vector takes all");
            let mut group = criterion.benchmark_group(format!("{codec}, {} KiB", bytes >> 10));
            group.throughput(Throughput::Bytes(bytes as u64));
            let percent = 100 * compressed.len() / bytes;
            group.bench_function(format!("compress to {percent} %"), |bencher| {
                bencher.iter(|| {
                    let mut out = Vec::new();
                    codec.compress(None, black_box(&input), &mut out).map(|()| out)
                });
            });
            group.bench_function("decompress", |bencher| {
                bencher.iter(|| codec.decompress(black_box(&compressed), 1 << 20));
            });
            group.finish();
        }
    }
}

criterion_group!(benches, codecs);
criterion_main!(benches);
