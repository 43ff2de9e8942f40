//! The hard states against a map, over a simulated disk: what was flushed is never forgotten, what was only written may
//! be, and rot is told.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use flowstone_protocol::{RaftIndex, ReplicaId, Term};
use flowstone_storage::sim_disk::{Crash, Operation};
use flowstone_storage::{Disk, HardState, HardStateFile, OpenError, SimDisk, StorageError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const DIR: &str = "/data";

fn state(term: u64, vote: u64, flushed: u64) -> HardState {
    HardState {
        term: Term::new(term),
        vote: (vote != 0).then_some(ReplicaId::new(vote)),
        flushed: RaftIndex::new(flushed),
    }
}

fn disk_with_file(seed: u64) -> (SimDisk, Arc<dyn Disk>) {
    let sim = SimDisk::new(seed);
    let disk = sim.shared();
    disk.create_dir_all(Path::new(DIR)).expect("a folder");
    HardStateFile::create(&disk, Path::new(DIR), 3).expect("created");
    (sim, disk)
}

fn open(disk: &Arc<dyn Disk>) -> (HardStateFile, HashMap<ReplicaId, HardState>) {
    let (file, states, rot) = HardStateFile::open(Arc::clone(disk), Path::new(DIR), 3).expect("opens");
    assert_eq!(rot, None);
    (file, states)
}

#[test]
fn what_was_flushed_is_never_forgotten() {
    let (mut crashes, mut compactions) = (0, 0);
    for seed in 0..40 {
        let mut random = StdRng::seed_from_u64(seed);
        let (sim, disk) = disk_with_file(seed);
        let (mut file, mut flushed) = open(&disk);
        // Each replica's states since its last flushed one: a power failure may leave any of them.
        let mut written: HashMap<ReplicaId, Vec<HardState>> = HashMap::new();
        let mut in_flight = None;
        let mut number = 0;
        for _ in 0..600 {
            if random.random_range(0..60) == 0 {
                sim.crash_after(random.random_range(0..8));
            }
            match random.random_range(0..10) {
                0..6 => {
                    let states: Vec<_> = (0..random.random_range(1..40))
                        .map(|_| {
                            number += 1;
                            (ReplicaId::new(random.random_range(1..60)), state(number, number % 3, number))
                        })
                        .collect();
                    for (replica, state) in &states {
                        written.entry(*replica).or_default().push(*state);
                    }
                    let _ = file.append(&states);
                }
                6..8 => {
                    if in_flight.is_none() {
                        in_flight = file.flush_job().map(|job| (job, written.clone()));
                    }
                }
                8 => {
                    if let Some((job, covered)) = in_flight.take()
                        && file.flush_done(job.run()).is_ok()
                    {
                        for (replica, states) in covered.into_iter().filter(|(_, states)| !states.is_empty()) {
                            flushed.insert(replica, states[states.len() - 1]);
                            written.entry(replica).or_default().drain(..states.len());
                        }
                    }
                }
                _ => sim.fail(Operation::Write, 5),
            }
            if sim.is_crashed() || file.append(&[]).is_err() || random.random_range(0..100) == 0 {
                crashes += 1;
                drop(file);
                in_flight = None;
                let power = random.random_range(0..2) == 0;
                sim.restart(if power { Crash::Power } else { Crash::Process });
                let found;
                (file, found) = open(&disk);
                for (replica, state) in &flushed {
                    let candidates = written.get(replica).into_iter().flatten();
                    let found = found.get(replica).unwrap_or_else(|| panic!("seed {seed}: {replica} is forgotten"));
                    assert!(
                        candidates.chain([state]).any(|candidate| candidate == found),
                        "seed {seed}: {replica} was flushed as {state:?}, found {found:?}"
                    );
                }
                for (replica, state) in &found {
                    let candidates = written.get(replica).into_iter().flatten().chain(flushed.get(replica));
                    assert!(
                        candidates.into_iter().any(|candidate| candidate == state),
                        "seed {seed}: {state:?} is made up"
                    );
                }
                // What was found is durable now.
                flushed = found;
                written.clear();
            }
        }
        // A file that replaced a full one says with how many sectors it began.
        let bytes = sim.bytes(&file_path()).expect("there");
        compactions += u64::from(bytes[28] > 0);
    }
    assert!(crashes > 100 && compactions > 0, "{crashes} crashes, {compactions} runs that filled a file");
}

#[test]
fn a_busy_replica_does_not_fill_the_file() {
    let (sim, disk) = disk_with_file(1);
    let (mut file, _) = open(&disk);
    let before = sim.counts().operations;
    for flushed in 0..50_000 {
        file.append(&[(ReplicaId::new(1), state(1, 0, flushed))]).expect("written");
    }
    // One write each: no new file was begun.
    assert_eq!(sim.counts().operations - before, 50_000);
    assert_eq!(file.state(ReplicaId::new(1)), Some(state(1, 0, 49_999)));
}

#[test]
fn a_full_file_begins_anew_with_the_newest_states() {
    let (sim, disk) = disk_with_file(1);
    let (mut file, _) = open(&disk);
    for round in 1..500 {
        for replica in 1..30 {
            file.append(&[(ReplicaId::new(replica), state(round, replica, round))]).expect("written");
        }
        file.flush().expect("flushed");
    }
    file.forget(ReplicaId::new(7));
    drop(file);
    sim.restart(Crash::Power);
    let (_, states) = open(&disk);
    assert_eq!(states.len(), 29);
    assert!(states.values().all(|state| state.term == Term::new(499)));
}

/// A file that is almost full; each of a few replicas was flushed with this term.
fn almost_full(disk: &Arc<dyn Disk>) -> (HardStateFile, u64) {
    let (mut file, _) = open(disk);
    let mut round = 0;
    while !file.is_almost_full() {
        round += 1;
        for replica in 1..30 {
            file.append(&[(ReplicaId::new(replica), state(round, replica, round))]).expect("written");
        }
        if !file.is_almost_full() {
            file.flush().expect("flushed");
        }
    }
    (file, round)
}

#[test]
fn what_is_said_while_the_file_is_replaced_is_in_whichever_is_left() {
    let said = |round: u64| (ReplicaId::new(7), state(round + 1, 9, round + 1));
    // Said before the new file is made, and after it has taken the old one's name; the process ends there, or goes on.
    for (is_made_first, goes_on, crash) in [
        (false, false, Crash::Process),
        (false, true, Crash::Process),
        (true, true, Crash::Process),
        (false, true, Crash::Power),
        (true, true, Crash::Power),
        (true, false, Crash::Power),
    ] {
        let (sim, disk) = disk_with_file(1);
        let (mut file, round) = almost_full(&disk);
        let job = file.flush_job().expect("a new file is due");
        assert!(file.flush_job().is_none(), "one at a time");
        let made = is_made_first.then(|| job.run());
        file.append(&[said(round)]).expect("written");
        assert_eq!(file.state(ReplicaId::new(7)), Some(said(round).1));
        if goes_on {
            file.flush_done(made.unwrap_or_else(|| job.run())).expect("replaced");
            assert!(!file.is_almost_full());
            if matches!(crash, Crash::Power) {
                file.flush().expect("flushed");
            }
        }
        drop(file);
        sim.restart(crash);
        let (file, states) = open(&disk);
        let found = states[&ReplicaId::new(7)];
        let case = format!("new file first: {is_made_first}, goes on: {goes_on}, {crash:?}");
        if goes_on || !is_made_first {
            assert_eq!(found, said(round).1, "{case}");
        } else {
            // Only the old file had it, which lost its name: nobody was told.
            assert!(found == said(round).1 || found == state(round, 7, round), "{case}: {found:?}");
        }
        assert_eq!(states.len(), 29, "{case}");
        assert!(states.iter().all(|(id, it)| id.get() == 7 || it.term == Term::new(round)), "{case}");
        drop(file);
    }
}

fn file_path() -> std::path::PathBuf {
    Path::new(DIR).join(HardStateFile::file_name(3))
}

fn flushed_file() -> (SimDisk, Arc<dyn Disk>) {
    let (sim, disk) = disk_with_file(1);
    let (mut file, _) = open(&disk);
    for round in 1..4 {
        file.append(&[(ReplicaId::new(1), state(round, 1, round)), (ReplicaId::new(2), state(round, 2, round))])
            .expect("written");
        file.flush().expect("flushed");
    }
    (sim, disk)
}

#[test]
fn a_flipped_bit_is_rot_and_the_file_takes_no_more() {
    // In the last flushed sector's entries, and in an earlier one.
    for position in [4096 + 40, 4096 + 8192 + 33, 4096 + 512 + 3] {
        let (sim, disk) = flushed_file();
        sim.flip_bit(&file_path(), position, 4);
        let before = sim.bytes(&file_path());
        let (mut file, _, rot) = HardStateFile::open(Arc::clone(&disk), Path::new(DIR), 3).expect("opens");
        let rot = rot.expect("rot is told");
        assert_eq!(rot.position, position / 512 * 512);
        let refused = file.append(&[(ReplicaId::new(1), state(9, 1, 9))]);
        assert!(matches!(refused, Err(StorageError::Poisoned { .. })), "{refused:?}");
        assert_eq!(sim.bytes(&file_path()), before, "it is left as it was found, so that it is found again");
    }
}

#[test]
fn a_flushed_sector_that_is_zeros_is_rot() {
    let (sim, disk) = flushed_file();
    let mut bytes = sim.bytes(&file_path()).expect("there");
    bytes[4096..4096 + 512].fill(0);
    sim.set_bytes(&file_path(), bytes);
    let (_, _, rot) = HardStateFile::open(disk, Path::new(DIR), 3).expect("opens");
    assert_eq!(rot.map(|rot| rot.position), Some(4096));
}

#[test]
fn a_missing_or_short_file_is_rot() {
    let (sim, disk) = flushed_file();
    let mut bytes = sim.bytes(&file_path()).expect("there");
    bytes.truncate(10_000);
    sim.set_bytes(&file_path(), bytes);
    let (_, states, rot) = HardStateFile::open(Arc::clone(&disk), Path::new(DIR), 3).expect("opens");
    assert!(rot.is_some() && states.is_empty());
    disk.remove_file(&file_path()).expect("removed");
    let (mut file, _, rot) = HardStateFile::open(disk, Path::new(DIR), 3).expect("opens");
    assert!(rot.is_some_and(|rot| rot.detail.contains("missing")));
    assert!(file.append(&[(ReplicaId::new(1), state(9, 1, 9))]).is_err());
}

#[test]
fn a_newer_format_is_told() {
    let (sim, disk) = flushed_file();
    let mut bytes = sim.bytes(&file_path()).expect("there");
    bytes[8] = 2;
    let crc_at = 16 + bytes[12] as usize;
    let crc = crc32fast::hash(&bytes[..crc_at]);
    bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    sim.set_bytes(&file_path(), bytes);
    let opened = HardStateFile::open(disk, Path::new(DIR), 3);
    assert!(matches!(opened, Err(OpenError::NewerFormat { found: 2, known: 1, .. })), "{opened:?}");
}

#[test]
fn a_failed_flush_poisons() {
    let (sim, disk) = flushed_file();
    let (mut file, _) = open(&disk);
    file.append(&[(ReplicaId::new(1), state(8, 1, 8))]).expect("written");
    sim.fail(Operation::Sync, 0);
    assert!(matches!(file.flush(), Err(StorageError::Io { action: "flush", .. })));
    let refused = file.append(&[(ReplicaId::new(1), state(9, 1, 9))]);
    assert!(matches!(refused, Err(StorageError::Poisoned { .. })), "{refused:?}");
    assert!(file.flush_job().is_none());
    // Opened anew, what the page cache still has is written again and flushed: then a power failure cannot take it.
    sim.restart(Crash::Process);
    let (_, found) = open(&disk);
    sim.restart(Crash::Power);
    let (_, after) = open(&disk);
    assert_eq!(found, after);
}

#[test]
fn a_renamed_file_whose_folder_was_not_flushed_is_flushed_by_opening_it() {
    for seed in 0..40 {
        let (sim, disk) = disk_with_file(seed);
        let (mut file, _) = open(&disk);
        file.append(&[(ReplicaId::new(1), state(1, 1, 1))]).expect("written");
        file.flush().expect("flushed");
        // The file that takes the full one's place is renamed, and the flush of its folder fails.
        sim.fail(Operation::SyncDir, 0);
        let replaced = (2..2_000).find(|number| {
            let written = file.append(&[(ReplicaId::new(1), state(*number, 1, *number))]);
            written.is_err() || file.flush().is_err()
        });
        assert!(replaced.is_some(), "the file was never full");
        let (mut file, _) = open(&disk);
        file.append(&[(ReplicaId::new(1), state(5_000, 9, 5_000))]).expect("written");
        file.flush().expect("flushed: the vote is given");
        drop(file);
        sim.restart(Crash::Power);
        let (file, _) = open(&disk);
        assert_eq!(file.state(ReplicaId::new(1)), Some(state(5_000, 9, 5_000)), "seed {seed}: a vote is forgotten");
    }
}

#[test]
fn a_forgotten_replica_stays_forgotten() {
    let (_, disk) = flushed_file();
    let (mut file, _) = open(&disk);
    file.forget(ReplicaId::new(1));
    file.append(&[(ReplicaId::new(2), state(9, 1, 9))]).expect("written");
    file.flush().expect("flushed");
    drop(file);
    let (file, states) = open(&disk);
    assert_eq!((states.len(), file.state(ReplicaId::new(1))), (1, None));
}
