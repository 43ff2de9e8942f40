//! Files of any bytes: nothing panics, and recovery comes to the same result twice. The fuzzer goes further; this is what
//! runs everywhere: noise, and real files with something changed.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::batch::stamped_prefix;
use flowstone_protocol::control::{CONTROL_FORMAT_VERSION, encode_control};
use flowstone_protocol::{
    Compression, ControlType, LeaderEpoch, Offset, RaftIndex, RecordBatchBuilder, ReplicaId, Term, Timestamp,
};
use flowstone_storage::checkpoint::EpochStart;
use flowstone_storage::fuzz_targets::{
    pull_range, read_checkpoint, read_hard_state, read_index, recover_log, resume_install,
};
use flowstone_storage::{Checkpoint, Disk, HardState, HardStateFile, SimDisk};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// Runs `target` on noise, on `whole`, and on `whole` cut, flipped, overwritten and extended.
fn check(target: fn(&[u8]), whole: &[u8], rounds: u64) {
    target(&[]);
    target(whole);
    for seed in 0..rounds {
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = whole.to_vec();
        match seed % 5 {
            0 => {
                bytes = vec![0; random.random_range(0..5_000)];
                random.fill_bytes(&mut bytes);
            }
            1 => bytes.truncate(random.random_range(0..whole.len())),
            2 => {
                for _ in 0..random.random_range(1..4) {
                    let at = random.random_range(0..whole.len());
                    bytes[at] ^= 1 << random.random_range(0..8);
                }
            }
            3 => {
                let from = random.random_range(0..whole.len());
                let to = random.random_range(from..whole.len().min(from + 600));
                random.fill_bytes(&mut bytes[from..to]);
            }
            _ => {
                let from = random.random_range(0..whole.len());
                bytes.extend_from_within(from..);
            }
        }
        let result = std::panic::catch_unwind(|| target(&bytes));
        assert!(result.is_ok(), "seed {seed}");
    }
}

fn segment() -> Vec<u8> {
    let no_op = |index, offset, term| {
        let (term, index, offset) = (Term::new(term), RaftIndex::new(index), Offset::new(offset));
        encode_control(ControlType::NoOp, term, index, offset, &[], CONTROL_FORMAT_VERSION)
    };
    let mut bytes = no_op(2, 0, 2).to_vec();
    let mut offset = 1;
    for number in 0..20 {
        let mut builder = RecordBatchBuilder::new(if number % 4 == 0 { Compression::Zstd } else { Compression::None });
        for _ in 0..=number % 3 {
            builder
                .append(Timestamp::new(1_700_000_000_000), Some(b"key"), Some(&[7; 90]), [])
                .expect("a small record");
        }
        let batch = builder.build();
        bytes.extend_from_slice(&stamped_prefix(&batch, Offset::new(offset), LeaderEpoch::new(2)));
        bytes.extend_from_slice(&batch[16..]);
        offset += 1 + number % 3;
    }
    bytes.extend_from_slice(&no_op(23, offset, 5));
    bytes.resize(bytes.len() + 2_000, 0);
    bytes
}

#[test]
fn recovery() {
    // A quarter of the input is the index: of none, here, three parts are the log.
    let mut input = segment();
    input.resize(input.len() * 4 / 3 + 4, 0);
    check(recover_log, &input, 2_000);
}

#[test]
fn index() {
    let mut noise = vec![0; 3 * 4096];
    StdRng::seed_from_u64(9).fill_bytes(&mut noise);
    check(read_index, &noise, 500);
}

#[test]
fn hard_state() {
    let sim = SimDisk::new(1);
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let dir = Path::new("/data");
    disk.create_dir_all(dir).expect("a folder");
    HardStateFile::create(&disk, dir, 0).expect("created");
    let (mut file, _, _) = HardStateFile::open(Arc::clone(&disk), dir, 0).expect("opens");
    for round in 1..20 {
        let states: Vec<_> = (1..round * 3)
            .map(|replica| {
                let state = HardState {
                    term: Term::new(round),
                    vote: Some(ReplicaId::new(5)),
                    flushed: RaftIndex::new(replica),
                };
                (ReplicaId::new(replica), state)
            })
            .collect();
        file.append(&states).expect("written");
        file.flush().expect("flushed");
    }
    let bytes = sim.bytes(&dir.join(HardStateFile::file_name(0))).expect("there");
    check(read_hard_state, &bytes, 300);
}

#[test]
fn checkpoint() {
    let checkpoint = Checkpoint {
        applied: RaftIndex::new(100),
        term: Term::new(4),
        log_start: Offset::new(10),
        end_offset_at_applied: Offset::new(200),
        membership: Bytes::from_static(b"members"),
        machine: Bytes::from_static(b"the state of the machine"),
        epochs: vec![
            EpochStart { epoch: LeaderEpoch::new(2), index: RaftIndex::new(2), offset: Offset::new(0) },
            EpochStart { epoch: LeaderEpoch::new(4), index: RaftIndex::new(50), offset: Offset::new(120) },
        ],
    };
    let file = checkpoint.encode();
    assert_eq!(Checkpoint::decode(&file), Ok(checkpoint));
    check(read_checkpoint, &file, 2_000);
    for bit in 0..file.len() * 8 {
        let mut flipped = file.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Checkpoint::decode(&Bytes::from(flipped)).is_err(), "bit {bit}");
    }
}

#[test]
fn ranges_from_other_replicas() {
    check(pull_range, include_bytes!("../../fuzz/corpus/pull_range/a_log"), 2_000);
}

#[test]
fn what_an_interrupted_install_left() {
    check(resume_install, include_bytes!("../../fuzz/corpus/resume_install/half_way"), 1_000);
    check(resume_install, include_bytes!("../../fuzz/corpus/resume_install/whole"), 1_000);
}
