//! Installing a copy: pulled in pieces, interrupted anywhere, resumed, swapped in whole.

mod source;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{ControlType, Offset, RaftIndex, Term};
use flowstone_storage::sim_disk::{Crash, Operation};
use flowstone_storage::{
    Disk, EntryBody, Install, Log, LogEntry, RealDisk, ReplicaIdentity, SimDisk, StorageError, checkpoint,
};
use source::{DIR, NOW, Random, batches, config, created, filled, identity, open, range, trim};

/// What a copy begins from: the checkpoint's bytes, the first entry and its offset.
fn start(sim: &SimDisk, log: &Log) -> (Bytes, RaftIndex, Offset) {
    let file = checkpoint::read_file(&sim.shared(), &log.newest_checkpoint_file().1).expect("a checkpoint");
    (file, log.first_index(), log.first_offset())
}

fn begin(disk: &Arc<dyn Disk>, sim: &SimDisk, log: &Log, replica: u64) -> Result<Install, StorageError> {
    let (checkpoint, first_index, first_offset) = start(sim, log);
    Install::begin(disk, Path::new(DIR), identity(replica), &checkpoint, first_index, first_offset, config(2_000))
}

fn resume(disk: &Arc<dyn Disk>) -> Result<Option<Install>, StorageError> {
    Install::resume(disk, Path::new(DIR), config(2_000))
}

/// Pulls the next piece.
fn pull(install: &mut Install, log: &Log, max_bytes: usize) -> Result<(), StorageError> {
    let found = range(log, install.next_index(), install.target().applied, max_bytes).expect("readable");
    install.append(found.bytes)
}

fn incoming() -> PathBuf {
    PathBuf::from(format!("{DIR}.incoming"))
}

/// The copy has what the source has, up to its checkpoint, and nothing is left of the install.
fn check_copy(disk: &Arc<dyn Disk>, log: &mut Log, replica: u64) {
    let mut copy = open(disk, 2_000, RaftIndex::new(1));
    assert_eq!(copy.identity(), &identity(replica));
    assert_eq!(copy.checkpoint(), log.checkpoint());
    let (first, last) = (copy.first_index(), copy.last_index());
    assert_eq!(last, log.checkpoint().applied);
    assert_eq!(batches(&mut copy, first, last), batches(log, first, last));
    assert_eq!(
        (copy.log_start(), copy.end_offset()),
        (log.checkpoint().log_start, log.checkpoint().end_offset_at_applied)
    );
    assert_eq!(copy.term_at(RaftIndex::new(first.get() - 1)), log.term_at(RaftIndex::new(first.get() - 1)));
    let parent = disk.read_dir(Path::new(DIR).parent().expect("a parent")).expect("there");
    assert_eq!(parent, ["3"], "no other folder");
    let names = disk.read_dir(Path::new(DIR)).expect("there");
    assert!(!names.iter().any(|name| name == "incoming"), "nothing of the install is left: {names:?}");
}

#[test]
fn a_copy_is_the_same_log() {
    for (seed, max_bytes) in [(1, 1), (2, 900), (3, 1 << 20)] {
        let (source, mut log) = filled(1, 3_000, seed, 100);
        let disk = SimDisk::new(9).shared();
        let mut install = begin(&disk, &source, &log, 2).expect("begun");
        while !install.has_all() {
            pull(&mut install, &log, max_bytes).expect("it belongs there");
        }
        assert!(install.size_bytes() > 0);
        install.finish().expect("swapped in");
        check_copy(&disk, &mut log, 2);
    }
}

#[test]
fn a_copy_of_a_log_whose_past_is_gone_begins_where_that_begins() {
    let (source, mut log) = filled(1, 2_000, 4, 120);
    let middle = log.entry_meta(RaftIndex::new(70)).expect("held").base_offset;
    trim(&mut log, middle);
    let first = log.first_index();
    assert!(first > RaftIndex::new(2), "something was deleted");
    let disk = SimDisk::new(9).shared();
    let mut install = begin(&disk, &source, &log, 2).expect("begun");
    assert_eq!((install.first_index(), install.next_index()), (first, first));
    while !install.has_all() {
        pull(&mut install, &log, 1_500).expect("it belongs there");
    }
    install.finish().expect("swapped in");
    check_copy(&disk, &mut log, 2);
}

#[test]
fn a_copy_of_a_log_with_nothing_behind_its_checkpoint_is_empty_and_goes_on() {
    let (source, mut log) = filled(1, 2_000, 4, 60);
    let (end, applied) = (log.end_offset(), log.last_index());
    log.set_log_start(end);
    source::checkpoint(&mut log);
    // As if all of it were one segment that retention took.
    let (file, _, _) = start(&source, &log);
    let disk = SimDisk::new(9).shared();
    let install = Install::begin(&disk, Path::new(DIR), identity(2), &file, applied.next(), end, config(2_000));
    let install = install.expect("begun");
    assert!(install.has_all());
    install.finish().expect("swapped in");
    let mut copy = open(&disk, 2_000, RaftIndex::new(1));
    assert_eq!((copy.first_index(), copy.end_offset()), (applied.next(), end));
    assert_eq!(copy.last_term(), log.last_term());
    source::append_some(&mut copy, &mut Random(8), 10);
}

#[test]
fn what_does_not_belong_there_is_refused_and_another_source_can_give_it() {
    let (source, log) = filled(1, 100_000, 5, 40);
    let (_other, other) = filled(3, 100_000, 6, 80);
    let disk = SimDisk::new(9).shared();
    let mut install = begin(&disk, &source, &log, 2).expect("begun");
    let right = range(&log, install.next_index(), install.target().applied, 1 << 20).expect("readable").bytes;
    let beyond = range(&log, install.next_index(), log.last_index(), 1 << 20).expect("readable").bytes;
    let foreign = range(&other, install.next_index(), other.last_index(), 1 << 20).expect("readable").bytes;
    let mut wrong = vec![("another log", foreign), ("a piece", right.slice(..right.len() - 1)), ("none", Bytes::new())];
    if beyond != right {
        wrong.push(("more than the checkpoint knows", beyond));
    }
    for at in (0..right.len()).step_by(61) {
        let mut flipped = right.to_vec();
        flipped[at] ^= 4;
        wrong.push(("a flipped bit", flipped.into()));
    }
    for (what, bytes) in wrong {
        match install.append(bytes) {
            Err(StorageError::Refused { .. }) => assert_eq!(install.next_index(), RaftIndex::new(2), "{what}"),
            other => panic!("{what}: {other:?}"),
        }
    }
    install.append(right).expect("the right ones are taken after all that");
    install.finish().expect("swapped in");
}

#[test]
fn entries_of_another_term_than_the_checkpoint_has_there_are_refused() {
    // The same offsets, and each a history of its own.
    let history = |replica, term| {
        let (sim, mut log) = created(replica, 2_000);
        let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
        log.append(&[LogEntry { index: RaftIndex::new(2), term: Term::new(term), body: no_op }], NOW)
            .expect("appended");
        source::settle(&mut log);
        source::checkpoint(&mut log);
        (sim, log)
    };
    let ((source, log), (_other, other)) = (history(1, 3), history(2, 4));
    let disk = SimDisk::new(9).shared();
    let mut install = begin(&disk, &source, &log, 5).expect("begun");
    match pull(&mut install, &other, 1 << 20) {
        Err(StorageError::Refused { detail, .. }) => assert!(detail.contains("term"), "{detail}"),
        other => panic!("{other:?}"),
    }
    pull(&mut install, &log, 1 << 20).expect("the right ones are taken");
}

#[test]
fn one_that_waits_for_its_place_counts_as_there_and_takes_it_whatever_comes_next() {
    let (source, mut log) = filled(1, 2_000, 8, 30);
    let mut waiting = 0;
    for operations in 0.. {
        let (target, old) = filled(7, 1_000, 3, 20);
        drop(old);
        let disk = target.shared();
        let mut install = begin(&disk, &source, &log, 2).expect("begun");
        while !install.has_all() {
            pull(&mut install, &log, 5_000).expect("it belongs there");
        }
        target.crash_after(operations);
        let finished = install.finish();
        target.cancel_crash();
        target.restart(Crash::Process);
        assert!(Log::exists(&disk, Path::new(DIR)).expect("asked"), "after {operations} operations");
        if disk.exists(&incoming().join("replica")).expect("asked") {
            waiting += 1;
            // Another one begins and is given up.
            drop(begin(&disk, &source, &log, 3).expect("begun"));
            Install::abandon(&disk, Path::new(DIR)).expect("given up");
            check_copy(&disk, &mut log, 2);
        }
        if finished.is_ok() {
            break;
        }
    }
    assert!(waiting > 3, "it waited {waiting} times");
}

#[test]
fn a_start_that_does_not_lead_up_to_the_checkpoint_is_refused() {
    let (source, mut log) = filled(1, 2_000, 7, 100);
    let middle = log.entry_meta(RaftIndex::new(50)).expect("held").base_offset;
    trim(&mut log, middle);
    let (file, first_index, first_offset) = start(&source, &log);
    let disk = SimDisk::new(9).shared();
    let refused = |file: &Bytes, index: RaftIndex, offset: Offset, what: &str| {
        match Install::begin(&disk, Path::new(DIR), identity(2), file, index, offset, config(2_000)) {
            Err(StorageError::NotInstallable { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
        assert!(!disk.exists(&incoming()).expect("asked"), "{what}");
    };
    let applied = log.checkpoint().applied;
    refused(&file.slice(1..), first_index, first_offset, "a rotten checkpoint");
    refused(&file, RaftIndex::new(1), Offset::ZERO, "the creation is no entry");
    refused(&file, RaftIndex::new(2), first_offset, "the first entry has offset 0");
    refused(&file, applied.plus(2), log.checkpoint().end_offset_at_applied, "entries are missing in between");
    refused(&file, applied.next(), Offset::ZERO, "an empty log ends where the checkpoint does");
    refused(&file, first_index, log.checkpoint().log_start.next(), "readers may see what it would not hold");
}

#[test]
fn an_install_that_lacks_entries_does_not_take_the_replicas_place() {
    let (source, log) = filled(1, 100_000, 5, 40);
    let (target, old) = filled(2, 2_000, 77, 20);
    let disk = target.shared();
    drop(old);
    let mut install = begin(&disk, &source, &log, 3).expect("begun");
    pull(&mut install, &log, 500).expect("it belongs there");
    match install.finish() {
        Err(StorageError::NotInstallable { detail, .. }) => assert!(detail.contains("missing"), "{detail}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(open(&disk, 2_000, RaftIndex::new(1)).identity(), &identity(2));
}

#[test]
fn a_full_disk_only_waits() {
    let (source, mut log) = filled(1, 3_000, 8, 100);
    let target = SimDisk::new(9);
    let disk = target.shared();
    let mut install = begin(&disk, &source, &log, 2).expect("begun");
    pull(&mut install, &log, 900).expect("there is room");
    target.set_bytes_max(Some(target.used_bytes() + 100));
    for _ in 0..3 {
        match pull(&mut install, &log, 1 << 20) {
            Err(error) if error.is_disk_full() => {}
            other => panic!("{other:?}"),
        }
    }
    target.set_bytes_max(None);
    while !install.has_all() {
        pull(&mut install, &log, 900).expect("there is room again");
    }
    install.finish().expect("swapped in");
    check_copy(&disk, &mut log, 2);
}

#[test]
fn an_install_goes_on_behind_what_it_flushed_without_reading_it_again() {
    let (source, mut log) = filled(1, 1_000, 9, 120);
    let target = SimDisk::new(9);
    let disk = target.shared();
    let mut install = begin(&disk, &source, &log, 2).expect("begun");
    while install.next_index() < RaftIndex::new(60) {
        pull(&mut install, &log, 900).expect("it belongs there");
    }
    install.flush().expect("flushed");
    let next = install.next_index();
    drop(install);
    target.restart(Crash::Process);
    let before = target.counts().operations;
    let mut install = resume(&disk).expect("resumed").expect("there is one");
    assert_eq!((install.next_index(), install.identity()), (next, &identity(2)));
    let operations = target.counts().operations - before;
    assert!(operations < 10, "what was flushed is not written again, but there were {operations} operations");
    while !install.has_all() {
        pull(&mut install, &log, 900).expect("it belongs there");
    }
    install.finish().expect("swapped in");
    check_copy(&disk, &mut log, 2);
}

#[test]
fn an_install_whose_files_are_rotten_is_given_up() {
    let (source, log) = filled(1, 1_000, 9, 120);
    for victim in ["incoming", ".state", ".log"] {
        let target = SimDisk::new(9);
        let disk = target.shared();
        let mut install = begin(&disk, &source, &log, 2).expect("begun");
        while install.next_index() < RaftIndex::new(60) {
            pull(&mut install, &log, 900).expect("it belongs there");
        }
        install.flush().expect("flushed");
        drop(install);
        let name = disk.read_dir(&incoming()).expect("there").into_iter().filter(|name| name.ends_with(victim)).max();
        let path = incoming().join(name.expect("a file of this kind"));
        let mut bytes = target.bytes(&path).expect("there");
        bytes.truncate(bytes.len() / 2);
        target.set_bytes(&path, bytes);
        assert!(resume(&disk).expect("no failure of the disk").is_none(), "{victim}");
        assert!(!disk.exists(&incoming()).expect("asked"), "{victim}");
        begin(&disk, &source, &log, 2).expect("begun anew");
    }
}

#[test]
fn another_install_takes_the_place_of_one_that_was_under_way() {
    let (source, mut log) = filled(1, 1_000, 9, 50);
    let (other_source, other) = filled(4, 1_000, 10, 90);
    let disk = SimDisk::new(9).shared();
    let mut install = begin(&disk, &other_source, &other, 2).expect("begun");
    pull(&mut install, &other, 5_000).expect("it belongs there");
    install.flush().expect("flushed");
    drop(install);
    let mut install = begin(&disk, &source, &log, 3).expect("begun");
    while !install.has_all() {
        pull(&mut install, &log, 5_000).expect("it belongs there");
    }
    install.finish().expect("swapped in");
    check_copy(&disk, &mut log, 3);
}

#[test]
fn on_a_real_disk() {
    let (source, mut log) = filled(1, 1_000, 9, 50);
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("5/3");
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(64));
    Log::create(&disk, &dir, identity(7), Bytes::new()).expect("an old one");
    let (checkpoint, first_index, first_offset) = start(&source, &log);
    let config = config(2_000);
    let begun = Install::begin(&disk, &dir, identity(2), &checkpoint, first_index, first_offset, config.clone());
    let mut install = begun.expect("begun");
    pull(&mut install, &log, 2_000).expect("it belongs there");
    install.flush().expect("flushed");
    drop(install);
    let mut install = Install::resume(&disk, &dir, config.clone()).expect("resumed").expect("there is one");
    while !install.has_all() {
        pull(&mut install, &log, 2_000).expect("it belongs there");
    }
    install.finish().expect("swapped in");
    let mut copy = Log::open(disk, &dir, config, RaftIndex::new(1), NOW).expect("opens");
    assert_eq!(copy.identity(), &identity(2));
    let (first, last) = (copy.first_index(), copy.last_index());
    assert_eq!(last, log.checkpoint().applied);
    assert_eq!(batches(&mut copy, first, last), batches(&mut log, first, last));
}

/// What the run below went through.
#[derive(Default)]
struct Seen {
    resumed: u64,
    resumed_with_progress: u64,
    begun_again: u64,
    old_found: u64,
    swapped_by_resume: u64,
    swapped_by_open: u64,
    refused: u64,
    power_failures: u64,
}

/// Random pieces, flushes, rotten pieces and crashes at any operation of the disk, until the copy stands.
fn install_through_crashes(seed: u64, seen: &mut Seen) {
    let mut random = Random(seed);
    let segment_bytes = 500 + random.below(4_000);
    let (source, mut log) = filled(1, segment_bytes, random.next(), 40 + random.below(60));
    if random.one_in(2) {
        let middle = log.entry_meta(RaftIndex::new(20)).expect("held").base_offset;
        trim(&mut log, middle);
    }
    // What is there before: nothing, or a replica under another id.
    let has_old = random.one_in(2);
    let (target, old_batches) = if has_old {
        let (sim, mut old) = created(7, 1_000);
        source::append_some(&mut old, &mut random, 20);
        source::settle(&mut old);
        let last = old.last_index();
        let all = batches(&mut old, RaftIndex::new(2), last);
        old.close().expect("closed");
        (sim, all)
    } else {
        (SimDisk::new(random.next()), Vec::new())
    };
    let disk = target.shared();
    // The data directory's own folders are there to stay.
    disk.create_dir_all(Path::new("/data/topics")).expect("a folder");
    target.set_loses_dirs(true);
    let mut flushed = None;
    for life in 0.. {
        assert!(life < 2_000, "it never ends");
        target.crash_after(random.below(60));
        match one_life(&disk, &source, &log, &mut random, &mut flushed, seen) {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) => assert!(target.is_crashed(), "nothing failed but this: {error}"),
        }
        let crash = if random.one_in(2) { Crash::Power } else { Crash::Process };
        seen.power_failures += u64::from(crash == Crash::Power);
        target.restart(crash);
        // Whoever opens the replica now finds the old one, whole, or the new one.
        let exists = Log::exists(&disk, Path::new(DIR)).expect("asked");
        assert!(exists || !has_old, "there is always one or the other");
        if exists && random.one_in(4) {
            let was_waiting = disk.exists(&incoming().join("replica")).expect("asked");
            let mut found = open(&disk, 1_000, RaftIndex::new(1));
            if found.identity() == &identity(2) {
                seen.swapped_by_open += u64::from(was_waiting);
                break;
            }
            seen.old_found += 1;
            assert_eq!(found.identity(), &identity(7));
            let last = found.last_index();
            assert_eq!(batches(&mut found, RaftIndex::new(2), last), old_batches);
        }
    }
    target.cancel_crash();
    target.restart(if random.one_in(2) { Crash::Power } else { Crash::Process });
    check_copy(&disk, &mut log, 2);
}

/// One life of the one who installs: whether the copy stands at its end. `flushed`: what an install flushed last, which a
/// later life must find.
fn one_life(
    disk: &Arc<dyn Disk>,
    source: &SimDisk,
    log: &Log,
    random: &mut Random,
    flushed: &mut Option<RaftIndex>,
    seen: &mut Seen,
) -> Result<bool, StorageError> {
    let waited = disk.exists(&incoming().join("replica")).unwrap_or(false);
    let resumed = resume(disk)?;
    let stands = resumed.is_none()
        && Log::exists(disk, Path::new(DIR)).unwrap_or(false)
        && ReplicaIdentity::read(disk, Path::new(DIR)).is_ok_and(|found| found == identity(2));
    if stands {
        seen.swapped_by_resume += u64::from(waited);
        return Ok(true);
    }
    let mut install = match resumed {
        Some(install) => {
            seen.resumed += 1;
            seen.resumed_with_progress += u64::from(flushed.is_some());
            install
        }
        None => {
            assert_eq!(*flushed, None, "what was flushed is found again");
            seen.begun_again += 1;
            begin(disk, source, log, 2)?
        }
    };
    if let Some(flushed) = *flushed {
        assert!(install.next_index() >= flushed, "flushed to {flushed}, found to {}", install.next_index());
    }
    while !install.has_all() {
        let max_bytes = 1 + random.below(2_000) as usize;
        let found = range(log, install.next_index(), install.target().applied, max_bytes).expect("readable");
        if random.one_in(8) {
            let mut rotten = found.bytes.to_vec();
            let at = random.below(rotten.len() as u64) as usize;
            rotten[at] ^= 1 << random.below(8);
            match install.append(rotten.into()) {
                Err(StorageError::Refused { .. }) => seen.refused += 1,
                Err(error) => return Err(error),
                Ok(()) => panic!("rot at {at} was taken"),
            }
        }
        install.append(found.bytes)?;
        if random.one_in(5) {
            let next = install.next_index();
            install.flush()?;
            *flushed = Some(next);
        }
        if random.one_in(20) {
            return Ok(false);
        }
    }
    // From here on it may be whole, and then it is not an install any more.
    let finished = install.finish();
    if finished.is_err() {
        *flushed = None;
    }
    finished.map(|()| true)
}

#[test]
fn any_crash_leaves_the_old_replica_or_the_new_one_and_an_install_that_goes_on() {
    let mut seen = Seen::default();
    for seed in 0..150 {
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| install_through_crashes(seed, &mut seen)));
        if let Err(panic) = result {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
    for (what, count) in [
        ("installs that went on", seen.resumed),
        ("installs that went on behind what was flushed", seen.resumed_with_progress),
        ("installs that began again", seen.begun_again),
        ("old replicas found", seen.old_found),
        ("swaps finished by the next to resume", seen.swapped_by_resume),
        ("swaps finished by the next to open", seen.swapped_by_open),
        ("rotten pieces", seen.refused),
        ("power failures", seen.power_failures),
    ] {
        assert!(count > 0, "no {what}: the run is vacuous");
    }
}

#[test]
fn a_failing_disk_fails_an_install_and_leaves_what_was_there() {
    let (source, mut log) = filled(1, 1_000, 9, 50);
    for operation in [Operation::Write, Operation::Sync, Operation::SyncDir, Operation::Rename, Operation::Create] {
        for go_well in 0..12 {
            let (target, old) = filled(7, 1_000, 3, 20);
            drop(old);
            let disk = target.shared();
            target.fail(operation, go_well);
            let attempt = || -> Result<(), StorageError> {
                let mut install = match resume(&disk)? {
                    Some(install) => install,
                    None if ReplicaIdentity::read(&disk, Path::new(DIR)).expect("a replica") == identity(2) => {
                        return Ok(());
                    }
                    None => begin(&disk, &source, &log, 2)?,
                };
                while !install.has_all() {
                    pull(&mut install, &log, 900)?;
                    install.flush()?;
                }
                install.finish()
            };
            let mut attempts = 1;
            while let Err(error) = attempt() {
                assert!(target.counts().faults >= 1, "{operation:?} {go_well}: {error}");
                attempts += 1;
                assert!(attempts < 5, "{operation:?} {go_well}: it fails again and again: {error}");
            }
            target.cancel_faults();
            target.restart(Crash::Power);
            check_copy(&disk, &mut log, 2);
        }
    }
}
