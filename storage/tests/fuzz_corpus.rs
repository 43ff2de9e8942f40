//! Replays the corpus of every fuzz target of this crate, as it is checked in under `fuzz/corpus/<target>`.

mod source;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flowstone_protocol::{Offset, RaftIndex, ReplicaId, Term};
use flowstone_storage::fuzz_targets::TARGETS;
use flowstone_storage::{Disk, HardState, HardStateFile, Install, SimDisk};
use source::{DIR, config, filled, identity, range};

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
/// `cargo test -p flowstone-storage --test fuzz_corpus -- --ignored`
#[test]
#[ignore = "writes into fuzz/corpus"]
fn write_seeds() {
    let save = |target: &str, name: &str, bytes: &[u8]| {
        let folder = corpus(target);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(name), bytes).expect("a file");
    };
    // A log of a few entries, with its index.
    let (sim, log) = filled(1, 1 << 20, 3, 12);
    let first = Path::new(DIR).join("00000000000000000000-00000000000000000002.log");
    let all = range(&log, RaftIndex::new(2), log.last_index(), 1 << 20).expect("readable").bytes;
    save("pull_range", "a_log", &all);
    save("pull_range", "a_log_with_a_piece_behind", &[&all[..], &all[..40]].concat());
    save("read_checkpoint", "a_log", &sim.bytes(&log.newest_checkpoint_file().1).expect("there"));
    log.close().expect("closed");
    let segment = sim.bytes(&first).expect("there");
    let index = sim.bytes(&first.with_extension("index")).expect("there");
    save("read_index", "a_log", &index);
    let quarter = segment.len().div_ceil(3);
    save("recover_log", "a_log", &[&segment[..], &vec![0; quarter][..]].concat());
    save("recover_log", "a_torn_log", &[&segment[..segment.len() - 30], &vec![0; 600][..]].concat());
    // So much log that its last quarter is the index.
    let mut both = segment.clone();
    both.resize(index.len() * 3, 0);
    save("recover_log", "a_log_with_its_index", &[both, index].concat());
    // An install up to entry 9: half way, and whole.
    let (source, log) = filled(1, 1 << 20, 4, 8);
    let (checkpoint, path) = log.newest_checkpoint_file();
    assert_eq!(checkpoint.applied, RaftIndex::new(9));
    let state = source.bytes(&path).expect("there");
    let other = SimDisk::new(1);
    let disk: Arc<dyn Disk> = other.shared();
    let (first, start, config) = (RaftIndex::new(2), Offset::ZERO, config(1 << 20));
    let begun = Install::begin(&disk, Path::new(DIR), identity(1), &state.clone().into(), first, start, config);
    let mut install = begun.expect("begun");
    for (name, last) in [("half_way", 5), ("whole", 9)] {
        let pulled = range(&log, install.next_index(), RaftIndex::new(last), 1 << 20).expect("readable");
        install.append(pulled.bytes).expect("it belongs there");
        install.flush().expect("flushed");
        let incoming = Path::new("/data/topics/5/3.incoming");
        let part = |name: &str| other.bytes(&incoming.join(name)).expect("there");
        let (progress, segment) = (part("incoming"), part("00000000000000000000-00000000000000000002.log"));
        let lengths = [progress.len() as u16, state.len() as u16].map(u16::to_le_bytes).concat();
        save("resume_install", name, &[lengths, progress, state.clone(), segment].concat());
    }
    // A hard state file.
    disk.create_dir_all(Path::new("/data")).expect("a folder");
    HardStateFile::create(&disk, Path::new("/data"), 0).expect("created");
    let (mut file, _, _) = HardStateFile::open(Arc::clone(&disk), Path::new("/data"), 0).expect("opens");
    let state = HardState { term: Term::new(3), vote: Some(ReplicaId::new(5)), flushed: RaftIndex::new(7) };
    file.append(&[(ReplicaId::new(5), state)]).expect("written");
    file.flush().expect("flushed");
    let bytes = other.bytes(&Path::new("/data").join(HardStateFile::file_name(0))).expect("there");
    // Zeros to its end: a shorter file is one of another length, which is refused as a whole.
    save("read_hard_state", "one_replica", &bytes[..bytes.len().min(16 << 10)]);
}
