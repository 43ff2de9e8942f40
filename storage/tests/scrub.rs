//! Rot in sealed segments: found by scrubbing or by a read, repaired from another replica's bytes.

mod source;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use flowstone_protocol::RaftIndex;
use flowstone_storage::sim_disk::{Crash, Operation};
use flowstone_storage::{Log, LogConfig, Read, ReadError, Rotten, ScrubPosition, Scrubbed, SimDisk, StorageError};
use source::{DIR, Random, append_some, batches, created, filled, open, range, trim};

/// Two replicas of the same log, the second one in a single segment.
fn replicas(seed: u64) -> (SimDisk, Log, Log) {
    let (sim, log) = filled(1, 2_000, seed, 120);
    let (_peer_sim, peer) = filled(2, 1 << 20, seed, 120);
    assert_eq!(log.last_index(), peer.last_index());
    (sim, log, peer)
}

fn segments(sim: &SimDisk, suffix: &str) -> Vec<PathBuf> {
    let mut names = sim.shared().read_dir(Path::new(DIR)).expect("the folder");
    names.sort_unstable();
    names.into_iter().filter(|name| name.ends_with(suffix)).map(|name| Path::new(DIR).join(name)).collect()
}

/// A sealed segment of more than 1 700 bytes.
fn large_segment(sim: &SimDisk) -> PathBuf {
    let mut files = segments(sim, ".log");
    files.pop();
    files.into_iter().find(|path| sim.bytes(path).is_some_and(|bytes| bytes.len() > 1_700)).expect("a large one")
}

/// One round of scrubbing.
fn scrub(log: &Log, max_bytes: u64) -> (u64, Vec<Rotten>) {
    let (mut bytes, mut rotten) = (0, Vec::new());
    let mut at = Some(ScrubPosition::START);
    while let Some(job) = at.and_then(|at| log.scrub_job(at, max_bytes)) {
        let found = job.run().expect("the disk answers");
        assert!(found.bytes > 0 || found.rotten.is_some(), "it gets on");
        assert!(found.rotten.is_some() || found.bytes < max_bytes + 3_000, "{} of {max_bytes}", found.bytes);
        bytes += found.bytes;
        rotten.extend(found.rotten);
        at = found.next;
    }
    (bytes, rotten)
}

/// Pulls what is rotten from `peer`, in pieces of about `max_bytes`.
fn repair(log: &mut Log, peer: &Log, rotten: &Rotten, max_bytes: usize) -> Result<bool, StorageError> {
    let mut repair = log.repair(rotten)?;
    while !repair.has_all() {
        let found = range(peer, repair.next_index(), rotten.last_index, max_bytes).expect("the peer has it");
        repair.append(found.bytes)?;
    }
    log.repaired(repair.finish())
}

/// Repairs until nothing is rotten.
fn repair_all(log: &mut Log, peer: &Log) -> usize {
    for rounds in 0.. {
        let (_, rotten) = scrub(log, 1 << 20);
        if rotten.is_empty() {
            return rounds;
        }
        for run in rotten {
            repair(log, peer, &run, 700).expect("repaired");
        }
        assert!(rounds < 10, "still rotten");
    }
    unreachable!("the loop above ends")
}

fn read_at(log: &mut Log, index: RaftIndex) -> Result<(), ReadError> {
    let offset = log.entry_meta(index).expect("held").base_offset;
    let bytes = match log.read(offset, 1)? {
        Read::Bytes(bytes) => bytes,
        Read::Ticket(ticket) => ticket.run()?,
    };
    bytes.verify()
}

fn check_same(log: &mut Log, peer: &mut Log) {
    let (first, last) = (log.first_index(), log.last_index());
    assert_eq!(batches(log, first, last), batches(peer, first, last));
    for index in first.get()..=last.get() {
        read_at(log, RaftIndex::new(index)).expect("readable");
    }
}

#[test]
fn a_round_reads_every_sealed_byte_once() {
    for max_bytes in [1, 1_000, 1 << 20] {
        let (sim, log) = filled(1, 20_000, 1, 400);
        let files = segments(&sim, ".log");
        let (_active, sealed) = files.split_last().expect("some");
        assert!(sealed.len() > 5, "several segments");
        let bytes: usize = sealed.iter().map(|path| sim.bytes(path).expect("there").len()).sum();
        assert_eq!(scrub(&log, max_bytes), (bytes as u64, Vec::new()), "{max_bytes} at a time");
    }
}

#[test]
fn what_is_not_committed_or_not_sealed_is_left_alone() {
    let (_sim, mut log) = created(1, 1_000);
    assert!(log.scrub_job(ScrubPosition::START, 1).is_none());
    append_some(&mut log, &mut Random(1), 40);
    log.flush().expect("flushed");
    assert!(log.scrub_job(ScrubPosition::START, 1).is_none(), "nothing is committed");
    assert!(log.scrub_job_at(flowstone_protocol::Offset::ZERO).is_none());
    log.commit_to(RaftIndex::new(20));
    let (some, _) = scrub(&log, 1 << 20);
    log.commit_to(log.last_index());
    let (all, _) = scrub(&log, 1 << 20);
    assert!(some > 0 && some < all, "{some} of {all}");
}

#[test]
fn every_flipped_bit_is_found_where_it_is_and_repaired() {
    let (sim, mut log, mut peer) = replicas(2);
    let path = segments(&sim, ".log")[1].clone();
    let right = sim.bytes(&path).expect("there");
    for at in (0..right.len()).step_by(53) {
        // Another disk's rot: what was open sees it.
        sim.flip_bit(&path, at as u64, (at % 8) as u8);
        let (_, rotten) = scrub(&log, 1 << 20);
        let [run] = &rotten[..] else { panic!("{at}: {rotten:?}") };
        assert!((run.position..run.position + run.bytes).contains(&(at as u64)), "{at}: {run:?}");
        assert_eq!(run.first_index, run.last_index, "{at}: one batch");
        assert!(read_at(&mut log, run.first_index).is_err(), "{at}");
        let found = range(&peer, run.first_index, run.last_index, 1 << 20).expect("the peer has it");
        let mut repair = log.repair(run).expect("to be repaired");
        repair.append(found.bytes).expect("as it was");
        assert!(log.repaired(repair.finish()).expect("repaired"), "{at}: whole again");
        assert_eq!(sim.bytes(&path).expect("there"), right, "{at}");
        read_at(&mut log, run.first_index).expect("readable again");
    }
    check_same(&mut log, &mut peer);
    assert!(segments(&sim, ".new").is_empty());
}

#[test]
fn a_repaired_log_opens_after_any_power_failure() {
    let (sim, mut log, mut peer) = replicas(3);
    let path = segments(&sim, ".log")[2].clone();
    sim.flip_bit(&path, 100, 3);
    repair_all(&mut log, &peer);
    let last = log.last_index();
    drop(log);
    sim.restart(Crash::Power);
    let mut log = open(&sim.shared(), 2_000, last);
    log.commit_to(last);
    assert_eq!(scrub(&log, 1 << 20).1, []);
    check_same(&mut log, &mut peer);
}

#[test]
fn rot_of_every_shape_is_repaired() {
    type Damage = fn(&SimDisk, &Path);
    let damages: [(&str, Damage); 11] = [
        ("zeros over several batches", |sim, path| {
            let mut bytes = sim.bytes(path).expect("there");
            bytes[300..1_100].fill(0);
            sim.set_bytes(path, bytes);
        }),
        ("two runs apart", |sim, path| {
            let len = sim.bytes(path).expect("there").len() as u64;
            sim.flip_bit(path, 70, 1);
            sim.flip_bit(path, len - 20, 1);
        }),
        ("the first batch", |sim, path| sim.flip_bit(path, 0, 1)),
        ("the end is cut off", |sim, path| {
            let mut bytes = sim.bytes(path).expect("there");
            bytes.truncate(bytes.len() / 2);
            sim.set_bytes(path, bytes);
        }),
        ("all of it is zeros", |sim, path| {
            let len = sim.bytes(path).expect("there").len();
            sim.set_bytes(path, vec![0; len]);
        }),
        ("it is empty", |sim, path| sim.set_bytes(path, Vec::new())),
        ("a bad sector", |sim, path| sim.set_unreadable(path, 512..513)),
        ("a bad sector, and no index", |sim, path| {
            sim.set_unreadable(path, 512..513);
            sim.shared().remove_file(&path.with_extension("index")).expect("removed");
        }),
        ("the file is gone", |sim, path| sim.shared().remove_file(path).expect("removed")),
        ("the index as well", |sim, path| {
            sim.flip_bit(path, 400, 1);
            sim.shared().remove_file(&path.with_extension("index")).expect("removed");
        }),
        ("file and index are gone", |sim, path| {
            sim.shared().remove_file(path).expect("removed");
            sim.shared().remove_file(&path.with_extension("index")).expect("removed");
        }),
    ];
    for (what, damage) in damages {
        for number in [0, 1, 4] {
            let (sim, mut log, mut peer) = replicas(4);
            source::checkpoint(&mut log);
            let last = log.last_index();
            drop(log);
            let path = segments(&sim, ".log")[number].clone();
            let right = sim.bytes(&path).expect("there");
            // Opened after it happened where that is possible, so that nothing of it is open or kept.
            let mut log = open(&sim.shared(), 2_000, last);
            log.commit_to(last);
            damage(&sim, &path);
            repair_all(&mut log, &peer);
            assert_eq!(sim.bytes(&path).expect("there"), right, "{what}, segment {number}");
            let first = log.first_index();
            assert_eq!(batches(&mut log, first, last), batches(&mut peer, first, last), "{what}");
        }
    }
}

#[test]
fn a_bad_sector_is_rot_of_the_batches_in_it_and_the_rest_is_copied() {
    let (sim, mut log) = filled(1, 20_000, 5, 120);
    let (_peer_sim, mut peer) = filled(2, 1 << 20, 5, 120);
    let path = segments(&sim, ".log")[0].clone();
    let right = sim.bytes(&path).expect("there");
    let end = right.len() as u64;
    sim.set_unreadable(&path, end - 600..end - 500);
    let (_, rotten) = scrub(&log, 1 << 20);
    let [run] = &rotten[..] else { panic!("{rotten:?}") };
    for index in (log.first_index().get()..=log.last_index().get()).map(RaftIndex::new) {
        let is_rotten = (run.first_index..=run.last_index).contains(&index);
        assert_eq!(log.stored_batch(index).is_err(), is_rotten, "{index} of {run:?}");
    }
    assert!(repair(&mut log, &peer, run, 1 << 20).expect("repaired"));
    assert_eq!(sim.bytes(&path).expect("there"), right);
    check_same(&mut log, &mut peer);
}

#[test]
fn a_bad_sector_beside_what_is_repaired_is_left_out_and_found_the_next_time() {
    let (sim, mut log, mut peer) = replicas(5);
    let path = large_segment(&sim);
    sim.flip_bit(&path, 20, 1);
    let (_, rotten) = scrub(&log, 1 << 20);
    let end = sim.bytes(&path).expect("there").len() as u64;
    sim.set_unreadable(&path, end - 10..end);
    assert!(!repair(&mut log, &peer, &rotten[0], 1 << 20).expect("repaired"), "but not whole");
    assert_eq!(repair_all(&mut log, &peer), 1);
    check_same(&mut log, &mut peer);
}

#[test]
fn other_failures_of_the_disk_are_no_rot() {
    let (sim, log, _) = replicas(5);
    let last = log.last_index();
    drop(log);
    let mut log = open(&sim.shared(), 2_000, last);
    log.commit_to(last);
    // No descriptors: for the log, and for its index.
    for go_well in [0, 1] {
        let job = log.scrub_job(ScrubPosition::START, 1 << 20).expect("something is sealed");
        sim.fail(Operation::Open, go_well);
        match job.run() {
            Err(ReadError::Io { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(scrub(&log, 1 << 20).1, []);
}

#[test]
fn a_read_that_found_rot_leads_to_the_same_repair() {
    let (sim, mut log, mut peer) = replicas(6);
    let path = segments(&sim, ".log")[1].clone();
    let mut bytes = sim.bytes(&path).expect("there");
    bytes[200..1_600].fill(0xee);
    sim.set_bytes(&path, bytes);
    let bad: Vec<RaftIndex> = (log.first_index().get()..=log.last_index().get())
        .map(RaftIndex::new)
        .filter(|index| read_at(&mut log, *index).is_err())
        .collect();
    assert!(bad.len() > 2, "a run: {bad:?}");
    for asked in &bad {
        let Err(ReadError::Corrupt { offset, .. }) = read_at(&mut log, *asked) else { panic!("{asked} is rotten") };
        let job = log.scrub_job_at(offset).expect("it is sealed");
        let Scrubbed { rotten: Some(run), .. } = job.run().expect("the disk answers") else { panic!("{asked}") };
        assert_eq!((run.first_index, run.last_index), (bad[0], bad[bad.len() - 1]), "from {asked}");
    }
    let fine = log.entry_meta(bad[0]).expect("held").base_offset.plus(-1);
    let job = log.scrub_job_at(fine).expect("it is sealed");
    assert_eq!(job.run().expect("the disk answers").rotten, None);
    repair_all(&mut log, &peer);
    check_same(&mut log, &mut peer);
}

#[test]
fn what_was_trimmed_since_it_was_read_is_not_looked_at() {
    let (_sim, mut log) = filled(1, 2_000, 6, 120);
    log.commit_to(log.last_index());
    assert!(log.seal().expect("sealed"));
    let all = log.high_watermark();
    trim(&mut log, all);
    assert!(log.scrub_job_at(flowstone_protocol::Offset::ZERO).is_none());
}

#[test]
fn what_was_mapped_is_read_anew_after_a_repair() {
    let (sim, mut log, mut peer) = replicas(6);
    let files = segments(&sim, ".log");
    let newest = files[files.len() - 2].clone();
    sim.flip_bit(&newest, 100, 1);
    let run = scrub(&log, 1 << 20).1.remove(0);
    assert!(read_at(&mut log, run.first_index).is_err(), "from the map");
    assert!(repair(&mut log, &peer, &run, 1 << 20).expect("repaired"));
    check_same(&mut log, &mut peer);
}

#[test]
fn rot_in_the_active_segment_is_repaired_once_that_is_sealed() {
    let (sim, mut log) = filled(1, 1 << 20, 7, 60);
    let (_peer_sim, mut peer) = filled(2, 1 << 20, 7, 60);
    let path = segments(&sim, ".log")[0].clone();
    sim.flip_bit(&path, 500, 1);
    let offset = log.entry_meta(RaftIndex::new(5)).expect("held").base_offset;
    assert!(log.scrub_job_at(offset).is_none(), "not sealed");
    assert!(log.seal().expect("sealed"));
    assert!(!log.seal().expect("nothing to seal"));
    let found = log.scrub_job(ScrubPosition::START, 1 << 20).expect("sealed").run().expect("the disk answers");
    let run = found.rotten.expect("rotten");
    assert!(repair(&mut log, &peer, &run, 1 << 20).expect("repaired"));
    log.flush().expect("flushed");
    check_same(&mut log, &mut peer);
    append_some(&mut log, &mut Random(5), 5);
}

#[test]
fn bytes_that_do_not_belong_there_are_refused_and_the_old_file_stays() {
    let (sim, mut log, peer) = replicas(8);
    let path = segments(&sim, ".log")[1].clone();
    let mut bytes = sim.bytes(&path).expect("there");
    bytes[200..900].fill(0xee);
    sim.set_bytes(&path, bytes.clone());
    let run = scrub(&log, 1 << 20).1.remove(0);
    let (first, last) = (run.first_index, run.last_index);
    let right = range(&peer, first, last, 1 << 20).expect("the peer has it").bytes;
    let later = range(&peer, first.next(), last.next(), 1 << 20).expect("the peer has it").bytes;
    let more = range(&peer, first, last.next(), 1 << 20).expect("the peer has it").bytes;
    let mut flipped = right.to_vec();
    flipped[80] ^= 1;
    let wrong = [
        ("later ones", later),
        ("more than is rotten", more),
        ("a piece", right.slice(..right.len() - 1)),
        ("a flipped bit", flipped.into()),
    ];
    for (what, batches) in wrong {
        let mut repair = log.repair(&run).expect("to be repaired");
        match repair.append(batches) {
            Err(StorageError::Refused { .. }) => assert_eq!(repair.next_index(), first, "{what}"),
            other => panic!("{what}: {other:?}"),
        }
        repair.append(right.clone()).expect("the right ones are taken after that");
    }
    let done = log.repair(&run).expect("to be repaired").finish();
    match log.repaired(done) {
        Err(StorageError::Refused { index, .. }) => assert_eq!(index, first, "nothing was pulled"),
        other => panic!("{other:?}"),
    }
    assert_eq!(sim.bytes(&path).expect("there"), bytes);
    assert!(segments(&sim, ".new").is_empty(), "swept");
}

#[test]
fn a_full_disk_is_told_before_anything_is_written() {
    let (sim, mut log, peer) = replicas(8);
    sim.flip_bit(&segments(&sim, ".log")[1], 300, 1);
    let run = scrub(&log, 1 << 20).1.remove(0);
    log.set_config(LogConfig { room_kept_bytes: 50_000, ..log.config().clone() });
    // Room for nothing; room for a copy, but for what is kept.
    for room in [500, 40_000] {
        sim.set_bytes_max(Some(sim.used_bytes() + room));
        match repair(&mut log, &peer, &run, 1 << 20) {
            Err(error) if error.is_disk_full() => {}
            other => panic!("{room}: {other:?}"),
        }
    }
    assert!(segments(&sim, ".new").is_empty());
    assert!(!log.is_poisoned());
    sim.set_bytes_max(None);
    assert!(repair(&mut log, &peer, &run, 1 << 20).expect("there is room again"));
}

#[test]
fn a_segment_that_is_deleted_meanwhile_does_not_come_back() {
    let (sim, mut log, peer) = replicas(9);
    let path = segments(&sim, ".log")[0].clone();
    sim.flip_bit(&path, 300, 1);
    let run = scrub(&log, 1 << 20).1.remove(0);
    let found = range(&peer, run.first_index, run.last_index, 1 << 20).expect("the peer has it");
    let mut repair = log.repair(&run).expect("to be repaired");
    let scrubbing = log.scrub_job(ScrubPosition::START, 1 << 20).expect("sealed");
    let middle = log.entry_meta(RaftIndex::new(60)).expect("held").base_offset;
    trim(&mut log, middle);
    assert!(!sim.shared().exists(&path).expect("asked"));
    repair.append(found.bytes).expect("as it was");
    let done = repair.finish();
    log.repaired(done).expect("nothing to do any more");
    assert!(!sim.shared().exists(&path).expect("asked"), "deleted is deleted");
    assert!(segments(&sim, ".new").is_empty());
    match log.repair(&run) {
        Err(StorageError::NoEntry { .. }) => {}
        other => panic!("{other:?}"),
    }
    // Its rot is of no concern either, wherever it is read from.
    let _ = scrubbing.run();
    assert_eq!(scrub(&log, 1 << 20).1, []);
}

#[test]
fn a_segment_that_is_not_all_committed_is_not_repaired() {
    let (sim, mut log) = created(1, 1_000);
    append_some(&mut log, &mut Random(1), 40);
    source::settle(&mut log);
    let last = log.last_index();
    let path = segments(&sim, ".log")[1].clone();
    sim.flip_bit(&path, 300, 1);
    let run = scrub(&log, 1 << 20).1.remove(0);
    // A log that was opened again does not know yet how far commit is.
    sim.flip_bit(&path, 300, 1);
    drop(log);
    let mut log = open(&sim.shared(), 1_000, last);
    match log.repair(&run) {
        Err(StorageError::NoEntry { .. }) => {}
        other => panic!("{other:?}"),
    }
    log.commit_to(last);
    log.repair(&run).expect("to be repaired now");
}

#[test]
fn a_crash_anywhere_leaves_the_old_file_or_the_new_one() {
    let mut outcomes = BTreeSet::new();
    for seed in 0..120 {
        let mut random = Random(seed);
        let (sim, mut log, mut peer) = replicas(20 + seed % 7);
        let files = segments(&sim, ".log");
        let path = files[random.below(files.len() as u64 - 1) as usize].clone();
        let right = sim.bytes(&path).expect("there");
        for _ in 0..=random.below(3) {
            sim.flip_bit(&path, random.below(right.len() as u64), 3);
        }
        let rotten_bytes = sim.bytes(&path).expect("there");
        let last = log.last_index();
        source::checkpoint(&mut log);
        let runs = scrub(&log, 1 << 20).1;
        // Rot and a lost index together are more than opening can bear: what is written ahead of time reaches the disk.
        for path in segments(&sim, ".index") {
            sim.set_bytes(&path, sim.bytes(&path).expect("there"));
        }
        sim.crash_after(random.below(12));
        let crash = if random.one_in(2) { Crash::Power } else { Crash::Process };
        let is_done = runs.iter().all(|run| repair(&mut log, &peer, run, 600).is_ok());
        assert!(is_done || sim.is_crashed());
        drop(log);
        sim.cancel_crash();
        sim.restart(crash);
        let found = sim.bytes(&path).expect("there");
        if is_done {
            assert_eq!(found, right, "seed {seed}: what was repaired stays so");
        }
        assert_eq!(found.len(), right.len(), "seed {seed}");
        outcomes.insert(match () {
            () if found == right => "new",
            () if found == rotten_bytes => "old",
            // Of several runs some were repaired.
            () => "between",
        });
        let mut log = open(&sim.shared(), 2_000, last);
        log.commit_to(last);
        assert!(segments(&sim, ".new").is_empty(), "seed {seed}: swept");
        repair_all(&mut log, &peer);
        check_same(&mut log, &mut peer);
    }
    assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), ["between", "new", "old"], "the run is vacuous");
}
