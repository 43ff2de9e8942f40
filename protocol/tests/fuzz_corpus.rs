//! Replays the corpus of every fuzz target of this crate, as it is checked in under `fuzz/corpus/<target>`.

use std::fs;
use std::path::{Path, PathBuf};

use flowstone_protocol::compression::Compression;
use flowstone_protocol::control::{CONTROL_FORMAT_VERSION, encode_control, log_start_payload};
use flowstone_protocol::error::{Error, ErrorCode};
use flowstone_protocol::fuzz_targets::TARGETS;
use flowstone_protocol::record::RecordBatchBuilder;
use flowstone_protocol::{BrokerId, ControlType, Offset, PartitionId, RaftIndex, Term, Timestamp};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

#[test]
fn every_target_takes_its_corpus() {
    for (name, target) in TARGETS {
        let folder = corpus(name);
        let mut inputs = 0;
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("a readable folder").path();
            let input = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            // What libFuzzer also tries first.
            target(&[]);
            target(&input);
            inputs += 1;
        }
        assert!(inputs > 0, "no corpus for {name}");
    }
}

/// Writes the inputs to begin from; fuzzing adds others beside them.
/// `cargo test -p flowstone-protocol --test fuzz_corpus -- --ignored`
#[test]
#[ignore = "writes into fuzz/corpus"]
fn write_seeds() {
    let save = |target: &str, name: &str, bytes: &[u8]| {
        let folder = corpus(target);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(name), bytes).expect("a file");
    };
    for codec in Compression::ALL {
        let mut builder = RecordBatchBuilder::new(codec);
        for i in 0..5_u8 {
            let headers = [(&b"trace"[..], Some(&[i; 9][..])), (b"trace", None)];
            let key = [b'k', i];
            builder
                .append(
                    Timestamp::new(1_700_000_000_000 + i64::from(i)),
                    (i % 2 == 0).then_some(&key[..]),
                    (i != 3).then_some(&[b'v'; 40][..]),
                    headers.into_iter().take(usize::from(i % 3)),
                )
                .expect("small");
        }
        let batch = builder.build();
        save("batch", codec.as_str(), &batch);
        save("sealed_batch", codec.as_str(), &batch);
        let mut compressed = vec![codec.id()];
        codec.compress(None, &b"all work and no play ".repeat(50), &mut compressed).expect("a vector takes all");
        save("decompress", codec.as_str(), &compressed);
        let mut rows = vec![codec.id()];
        rows.extend_from_slice(
            b"\x41\x03\x00\x10key, value and the rest\xe3\x00\x00\x04nothing else here\x1c\x02\x01\x00",
        );
        save("round_trip", codec.as_str(), &rows);
    }
    let control = encode_control(
        ControlType::LogStart,
        Term::new(3),
        RaftIndex::new(9),
        Offset::new(77),
        &log_start_payload(Offset::new(50)),
        CONTROL_FORMAT_VERSION,
    );
    save("batch", "control", &control);
    save("sealed_batch", "control", &control);
    save("decompress", "snappy_that_claims_4_gib", &[2, 0xff, 0xff, 0xff, 0xff, 0x0f, 0, 1]);
    save("decompress", "snappy_raw", &[2, 5, 16, b'h', b'e', b'l', b'l', b'o']);
    save("decompress", "zstd_with_a_large_window", &[4, 0x28, 0xb5, 0x2f, 0xfd, 0, 17 << 3, 1, 0, 0]);
    save("decompress", "lz4_linked_4_mib_blocks", &[3, 0x04, 0x22, 0x4d, 0x18, 0x40, 0x70, 0xdf, 0xff, 0xff, 0x3f, 0]);
    let error = Error::new(ErrorCode::NotLeader, "ask the leader")
        .with_topic("orders")
        .with_partition(PartitionId::new(2))
        .with_leader(BrokerId::new(1), "127.0.0.1:7070");
    save("messages", "error_detail", error.to_status().details());
    save("messages", "produce", b"\x08\x01\x12\x100123456789abcdef\x18\x02\x20\x03\x2a\x04batc");
}
