//! What lies and bombs cost: the process's peak of mapped memory hardly moves. Alone in its process, so that nothing
//! else moves it.

use bytes::Bytes;
use flowstone_protocol::Timestamp;
use flowstone_protocol::batch::{ValidationLimits, crc_of, validate_produced};
use flowstone_protocol::compression::Compression;
use flowstone_protocol::record::{RecordBatchBuilder, records};

const CAP: usize = 4 << 20;
/// Twice the cap (a vector that doubles), the codecs' own (16 MiB for the largest lz4 blocks, 8 for zstd), and slack
/// for the allocator's arenas.
const BOUND_KIB: u64 = (2 * CAP as u64 + (24 << 20) + (8 << 20)) / 1024;

/// Peak of the process's address space in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).expect("a peak");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

fn with_records(template: &[u8], codec: Compression, count: i32, records: &[u8]) -> Vec<u8> {
    let mut batch = template[..61].to_vec();
    batch.extend_from_slice(records);
    let length = (batch.len() - 12) as i32;
    batch[8..12].copy_from_slice(&length.to_be_bytes());
    batch[21..23].copy_from_slice(&i16::from(codec.id()).to_be_bytes());
    batch[23..27].copy_from_slice(&(count - 1).to_be_bytes());
    batch[57..61].copy_from_slice(&count.to_be_bytes());
    let crc = crc_of(&batch);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
    batch
}

#[test]
fn lies_and_bombs_cost_little() {
    let now = Timestamp::new(1_700_000_000_000);
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(now, None, Some(b"template"), []).expect("small");
    let template = builder.build();

    let mut bombs = Vec::new();
    {
        // 1 GiB of zeros would be the bomb; made in pieces, so that making it does not move the peak.
        use std::io::Write;
        let zeros = vec![0; 1 << 20];
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(9));
        let mut zstd = zstd::stream::write::Encoder::new(Vec::new(), 3).expect("an encoder");
        let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
        for _ in 0..256 {
            gzip.write_all(&zeros).expect("a vector takes all");
            zstd.write_all(&zeros).expect("a vector takes all");
            lz4.write_all(&zeros).expect("a vector takes all");
        }
        bombs.push((Compression::Gzip, gzip.finish().expect("a vector takes all")));
        bombs.push((Compression::Zstd, zstd.finish().expect("a vector takes all")));
        bombs.push((Compression::Lz4, lz4.finish().expect("a vector takes all")));
    }
    // Lengths that lie: snappy of 4 GiB; zstd with a window of 2 GiB; an lz4 frame with 4 MiB linked blocks.
    bombs.push((Compression::Snappy, vec![0xff, 0xff, 0xff, 0xff, 0x0f, 0, 1]));
    bombs.push((Compression::Zstd, vec![0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3, 1, 0, 0]));
    bombs.push((Compression::Lz4, vec![0x04, 0x22, 0x4d, 0x18, 0x40, 0x70, 0xdf, 0xff, 0xff, 0x3f, 0]));
    // A record count of 2 billion over nothing much, and a record that says it has as many headers.
    bombs.push((Compression::None, vec![0x0c, 0, 0, 0, 1, 1, 0]));
    bombs.push((Compression::None, vec![0x14, 0, 0, 0, 1, 1, 0xfe, 0xff, 0xff, 0xff, 0x0f]));

    let before = peak_kib();
    for (codec, bomb) in bombs {
        for count in [1, i32::MAX] {
            let batch = with_records(&template, codec, count, &bomb);
            let limits = ValidationLimits { max_decompressed_bytes: CAP, ..ValidationLimits::new(batch.len(), now) };
            // The one record of the template's kind is the only thing here that is well formed.
            let honest = codec == Compression::None && count == 1 && bomb.len() == 7;
            assert_eq!(validate_produced(&batch, &limits).is_ok(), honest, "{codec} {count}");
            if let Ok(iter) = records(Bytes::from(batch), CAP) {
                let (_, most) = iter.size_hint();
                assert!(most.is_some_and(|most| most <= 3), "{codec}: {most:?} records are hoped for");
                assert_eq!(iter.collect::<Result<Vec<_>, _>>().is_ok(), honest);
            }
        }
    }
    let grown = peak_kib() - before;
    assert!(grown <= BOUND_KIB, "{grown} KiB, at most {BOUND_KIB} were allowed");
}
