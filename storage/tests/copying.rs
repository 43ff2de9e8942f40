//! A compacted log is copied by offset: through crashes of who copies, and passes of who gives; and a damaged cleaned segment
//! is written anew from what another replica has.

mod source;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::record::records;
use flowstone_protocol::{Compression, ControlType, Offset, RaftIndex, RecordBatchBuilder, Term, Timestamp};
use flowstone_storage::sim_disk::{Crash, Operation};
use flowstone_storage::{
    Cleanness, CompactionConfig, CompactionLimits, EntryBody, Install, Log, LogConfig, LogEntry, OpenError, OpenMode,
    Read, Rotten, Settled, SimDisk, StorageError, checkpoint,
};

use crate::source::{DIR, NOW, Random, created, identity, settle};

type Records = BTreeMap<i64, (Vec<u8>, Option<Vec<u8>>)>;

fn config(tombstones_kept: Duration) -> LogConfig {
    let compaction = CompactionConfig { tombstones_kept, dirty_per_mille_min: 1, ..CompactionConfig::default() };
    LogConfig { segment_bytes: 3_000, room_kept_bytes: 0, compaction: Some(compaction), ..LogConfig::default() }
}

/// Appends keyed records, some of them tombstones, in some terms.
fn write(log: &mut Log, random: &mut Random, batches: u64, all: &mut Records) {
    for _ in 0..batches {
        let begins_term = log.last_term() == Term::new(1) || random.one_in(20);
        let term = Term::new(log.last_term().get() + u64::from(begins_term));
        let base = log.end_offset().get();
        let body = if begins_term {
            EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() }
        } else {
            let mut builder = RecordBatchBuilder::new(Compression::Lz4);
            for number in 0..=random.below(4) as i64 {
                let key = format!("key {}", random.below(30)).into_bytes();
                let value = (!random.one_in(6)).then(|| vec![random.next() as u8; random.below(80) as usize]);
                builder.append(NOW, Some(&key), value.as_deref(), []).expect("small");
                all.insert(base + number, (key, value));
            }
            EntryBody::Batch(builder.build())
        };
        log.append(&[LogEntry { index: log.last_index().next(), term, body }], NOW).expect("appended");
    }
    settle(log);
}

fn compact(log: &mut Log, now: Timestamp) {
    let settled = Settled::new(log.high_watermark(), Vec::new());
    let limits = CompactionLimits { up_to: RaftIndex::new(u64::MAX), memory_bytes: 1 << 20, seed: 3, now };
    let Some(mut pass) = log.begin_compaction(settled, limits) else { return };
    loop {
        let step = pass.step(10_000).expect("it goes on");
        log.compacted(&mut pass);
        if step.is_done {
            return;
        }
    }
}

fn read_all(log: &mut Log) -> Records {
    let mut found = Records::new();
    let mut at = log.log_start();
    while at < log.high_watermark() {
        let bytes = match log.read(at, 4_000).expect("in range") {
            Read::Bytes(bytes) => bytes,
            Read::Ticket(ticket) => ticket.run().expect("read"),
        };
        bytes.verify().expect("right");
        for batch in bytes.chunks.iter().flat_map(|chunk| flowstone_protocol::batch::split_batches(chunk.clone())) {
            let (header, batch) = batch.expect("whole");
            if header.attributes.is_control() {
                continue;
            }
            for record in records(batch, 1 << 20).expect("a batch") {
                let record = record.expect("a record");
                let (key, value) = (record.key.expect("keyed").to_vec(), record.value.map(|value| value.to_vec()));
                assert!(found.insert(record.offset.get(), (key, value)).is_none());
            }
        }
        at = bytes.next;
    }
    found
}

/// What a consumer that reads all of it knows in the end.
fn view(records: &Records) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut view = BTreeMap::new();
    for (key, value) in records.values() {
        match value {
            Some(value) => view.insert(key.clone(), value.clone()),
            None => view.remove(key),
        };
    }
    view
}

fn compacted_source(seed: u64, all: &mut Records) -> (SimDisk, Log, Random) {
    let mut random = Random(seed);
    let (sim, mut log) = created(1, 3_000);
    log.set_config(config(Duration::from_secs(60)));
    write(&mut log, &mut random, 120, all);
    source::checkpoint(&mut log);
    compact(&mut log, NOW);
    assert!(log.first_offset() > log.local_start().0, "something is cleaned");
    (sim, log, random)
}

/// Copies all that is wanted, `between` being called before each piece.
fn copy(log: &mut Log, install: &mut Install, mut between: impl FnMut(&mut Log, u64)) -> Result<(), StorageError> {
    let mut piece = 0;
    while let Some((from, to)) = install.wanted_offsets() {
        between(log, piece);
        piece += 1;
        let range = log.offset_range(from, to, 500).expect("held").run().expect("read");
        assert!(range.next > from);
        install.append_offsets(range.bytes, range.cleanness)?;
    }
    Ok(())
}

fn begin(log: &Log, sim: &SimDisk) -> Install {
    let (_, path) = log.newest_checkpoint_file();
    let dir = Path::new(DIR);
    let bytes = checkpoint::read_file(&sim.shared(), &path).expect("a checkpoint");
    let target = SimDisk::new(9);
    let config = config(Duration::from_secs(60));
    Install::begin_by_offset(&target.shared(), dir, identity(2), &bytes, log.local_start(), config).expect("begun")
}

#[test]
fn a_source_that_is_compacted_meanwhile_gives_the_rest_all_the_same() {
    for seed in 0..20 {
        let mut all = Records::new();
        let (sim, mut log, mut random) = compacted_source(seed, &mut all);
        let (checkpoint, path) = log.newest_checkpoint_file();
        let (applied, end) = (checkpoint.applied, checkpoint.end_offset_at_applied);
        let bytes = checkpoint::read_file(&sim.shared(), &path).expect("a checkpoint");
        let target = SimDisk::new(seed);
        let dir = Path::new(DIR);
        let settings = config(Duration::from_secs(60));
        let start = log.local_start();
        let disk = target.shared();
        let begun = Install::begin_by_offset(&disk, dir, identity(2), &bytes, start, settings.clone());
        let mut install = begun.expect("begun");
        copy(&mut log, &mut install, |log, piece| {
            if piece % 4 == 3 {
                write(log, &mut random, 20, &mut all);
                source::checkpoint(log);
                compact(log, NOW);
            }
        })
        .expect("copied");
        assert!(install.has_all());
        install.finish().expect("in place");
        let mut copied = Log::open(disk, dir, settings, RaftIndex::new(1), NOW).expect("opens");
        assert_eq!((copied.checkpoint().applied, copied.first_index()), (applied, applied.next()));
        assert_eq!((copied.high_watermark(), copied.first_offset()), (end, end));
        let found = read_all(&mut copied);
        for (offset, record) in &found {
            assert_eq!(all.get(offset), Some(record), "offset {offset}");
        }
        // The rest comes as entries; then both say the same.
        let mut whole = found;
        whole.extend(read_all(&mut log).range(end.get()..).map(|(offset, record)| (*offset, record.clone())));
        assert_eq!(view(&whole), view(&all), "seed {seed}");
        // What was copied is compacted here as anywhere.
        compact(&mut copied, NOW);
        for (offset, record) in &read_all(&mut copied) {
            assert_eq!(all.get(offset), Some(record), "offset {offset}");
        }
    }
}

#[test]
fn a_copy_goes_on_behind_what_was_flushed_whenever_it_is_killed() {
    let mut resumed = 0;
    for seed in 0..60 {
        let mut all = Records::new();
        let (sim, mut log, mut random) = compacted_source(seed % 6, &mut all);
        let expected = read_all(&mut log);
        let (checkpoint, path) = log.newest_checkpoint_file();
        let end = checkpoint.end_offset_at_applied;
        let bytes = checkpoint::read_file(&sim.shared(), &path).expect("a checkpoint");
        let target = SimDisk::new(seed);
        let (disk, dir) = (target.shared(), Path::new(DIR));
        let settings = config(Duration::from_secs(60));
        let crash = if seed % 2 == 0 { Crash::Power } else { Crash::Process };
        for life in 0_u64.. {
            if life < 8 {
                target.crash_after(random.below(80));
            }
            let mut go_on = || -> Result<bool, StorageError> {
                if Log::exists(&disk, dir).unwrap_or(false) {
                    return Ok(true);
                }
                let install = match Install::resume(&disk, dir, settings.clone())? {
                    Some(install) => {
                        resumed += u64::from(install.size_bytes() > 0);
                        Some(install)
                    }
                    None if Log::exists(&disk, dir).unwrap_or(false) => None,
                    None => Some(Install::begin_by_offset(
                        &disk,
                        dir,
                        identity(2),
                        &bytes,
                        log.local_start(),
                        settings.clone(),
                    )?),
                };
                let Some(mut install) = install else { return Ok(true) };
                copy(&mut log, &mut install, |_, _| {})?;
                install.finish()?;
                Ok(true)
            };
            let done = go_on();
            let is_crashed = target.is_crashed();
            assert!(done.is_ok() || is_crashed, "{done:?}");
            target.cancel_crash();
            if done.is_ok() && !is_crashed {
                break;
            }
            target.restart(crash);
        }
        let mut copied = Log::open(Arc::clone(&disk), dir, settings, RaftIndex::new(1), NOW).expect("opens");
        let expected: Records = expected.range(..end.get()).map(|(offset, it)| (*offset, it.clone())).collect();
        assert_eq!(read_all(&mut copied), expected, "seed {seed}");
    }
    assert!(resumed > 10, "{resumed} copies went on behind something");
}

#[test]
fn what_is_not_wanted_or_damaged_is_refused_and_changes_nothing() {
    let mut all = Records::new();
    let (sim, log, _) = compacted_source(5, &mut all);
    let mut install = begin(&log, &sim);
    let (from, to) = install.wanted_offsets().expect("wanted");
    let range = log.offset_range(from, to, 2_000).expect("held").run().expect("read");
    let mut damaged = range.bytes.to_vec();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    for wrong in [Bytes::from(damaged), range.bytes.slice(..range.bytes.len() - 1)] {
        assert!(matches!(install.append_offsets(wrong, range.cleanness), Err(StorageError::Refused { .. })));
        assert_eq!(install.wanted_offsets(), Some((from, to)));
    }
    let later = log.offset_range(range.next, to, 2_000).expect("held").run().expect("read");
    assert!(matches!(install.append_offsets(later.bytes, later.cleanness), Err(StorageError::Refused { .. })));
    install.append_offsets(range.bytes, range.cleanness).expect("what is wanted");
    assert_eq!(install.wanted_offsets(), Some((range.next, to)));
}

/// How far a replica is that is slow to compact.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slow {
    Never,
    Half,
    Once,
}

/// Two replicas of the same log: one that let its tombstones go, one that is slow; and what is in the log.
fn fast_and_slow(seed: u64, how: Slow) -> (SimDisk, Log, SimDisk, Log, Records) {
    let mut all = Records::new();
    let (fast_sim, mut fast, _) = compacted_source(seed, &mut all);
    // The second time nothing is due, but what was replaced goes.
    for _ in 0..2 {
        compact(&mut fast, NOW.after(Duration::from_secs(61)));
    }
    let (slow_sim, mut slow) = created(3, 3_000);
    slow.set_config(config(Duration::from_secs(60)));
    let mut random = Random(seed);
    write(&mut slow, &mut random, 60, &mut Records::new());
    source::checkpoint(&mut slow);
    if how == Slow::Half {
        compact(&mut slow, NOW);
    }
    write(&mut slow, &mut random, 60, &mut Records::new());
    source::checkpoint(&mut slow);
    if how == Slow::Once {
        compact(&mut slow, NOW);
    }
    (fast_sim, fast, slow_sim, slow, all)
}

#[test]
fn a_part_of_before_a_tombstone_did_its_work_is_not_put_together_with_one_of_after_it_went() {
    let (mut refused, mut whole) = (0, 0);
    for seed in 0..60 {
        let (fast_sim, mut fast, _slow_sim, mut slow, all) =
            fast_and_slow(seed, if seed % 2 == 0 { Slow::Never } else { Slow::Once });
        assert!(fast.cleanness().dropped_to > Offset::ZERO, "tombstones went");
        let (checkpoint, path) = fast.newest_checkpoint_file();
        let end = checkpoint.end_offset_at_applied;
        let bytes = checkpoint::read_file(&fast_sim.shared(), &path).expect("a checkpoint");
        let expected =
            view(&read_all(&mut slow).range(..end.get()).map(|(at, record)| (*at, record.clone())).collect());
        let target = SimDisk::new(seed);
        let (disk, dir, settings) = (target.shared(), Path::new(DIR), config(Duration::from_secs(60)));
        let begun = Install::begin_by_offset(&disk, dir, identity(2), &bytes, slow.local_start(), settings.clone());
        let mut install = begun.expect("begun");
        let (mut random, mut is_refused) = (Random(seed), false);
        while let Some((from, to)) = install.wanted_offsets() {
            let source = if random.one_in(2) { &fast } else { &slow };
            let held = install.held_offsets().expect("by offset");
            is_refused = !source.goes_with(held, from, to);
            if is_refused {
                break;
            }
            let range = source.offset_range(from, to, 500).expect("held").run().expect("read");
            install.append_offsets(range.bytes, range.cleanness).expect("taken");
        }
        if is_refused {
            refused += 1;
            continue;
        }
        whole += 1;
        install.finish().expect("in place");
        let mut copied = Log::open(disk, dir, settings, RaftIndex::new(1), NOW).expect("opens");
        assert_eq!(view(&read_all(&mut copied)), expected, "seed {seed}");
        // Whatever is cleaned there now.
        for later in [0, 61, 200, 300] {
            compact(&mut copied, NOW.after(Duration::from_secs(later)));
            assert_eq!(view(&read_all(&mut copied)), expected, "seed {seed}");
        }
        assert!(all.len() > read_all(&mut fast).len());
    }
    assert!(refused >= 10 && whole >= 10, "{refused} were refused, {whole} came to their end");
}

#[test]
fn a_tombstone_that_was_copied_goes_no_sooner_than_a_pass_has_seen_it() {
    let mut dropped = 0;
    for seed in 0..20 {
        let mut all = Records::new();
        let (sim, log, _) = compacted_source(seed, &mut all);
        let (_slow_sim, mut slow) = created(3, 3_000);
        write(&mut slow, &mut Random(seed), 120, &mut Records::new());
        let expected = view(&read_all(&mut slow));
        let (_, path) = log.newest_checkpoint_file();
        let bytes = checkpoint::read_file(&sim.shared(), &path).expect("a checkpoint");
        let (target, dir, settings) = (SimDisk::new(4), Path::new(DIR), config(Duration::from_secs(60)));
        let disk = target.shared();
        let begun = Install::begin_by_offset(&disk, dir, identity(2), &bytes, log.local_start(), settings.clone());
        let mut install = begun.expect("begun");
        // What is deleted is from one that never cleaned, what deletes it from one that did, and knows from when on it may go.
        while let Some((from, to)) = install.wanted_offsets() {
            let source = if from.get() < to.get() / 2 { &slow } else { &log };
            assert!(source.goes_with(install.held_offsets().expect("by offset"), from, to));
            let range = source.offset_range(from, to, 500).expect("held").run().expect("read");
            install.append_offsets(range.bytes, range.cleanness).expect("taken");
        }
        install.finish().expect("in place");
        let mut copied = Log::open(disk, dir, settings, RaftIndex::new(1), NOW).expect("opens");
        for pass in [1, 2] {
            compact(&mut copied, NOW.after(Duration::from_secs(61 * pass)));
            let Cleanness { clean_to, dropped_to } = copied.cleanness();
            assert!(pass == 2 || dropped_to == Offset::ZERO, "seed {seed}");
            dropped += u64::from(dropped_to > Offset::ZERO);
            assert!(dropped_to <= clean_to);
            let end = copied.high_watermark();
            assert!(end <= slow.high_watermark());
            if end == slow.high_watermark() {
                assert_eq!(view(&read_all(&mut copied)), expected);
            }
        }
    }
    assert!(dropped > 5, "of {dropped} tombstones went");
}

#[test]
fn a_damaged_segment_is_not_given_what_was_deleted_in_the_rest() {
    let (mut refused, mut given) = (0, 0);
    for seed in 0..24 {
        let (sim, mut log, _slow_sim, mut slow, _) =
            fast_and_slow(seed, if seed % 2 == 0 { Slow::Half } else { Slow::Once });
        let expected = view(&read_all(&mut log));
        let rotten = rot(&sim, &log);
        let mut copy = log.begin_segment_copy(rotten.segment).expect("begun");
        while let Some((from, to)) = copy.wanted() {
            if !slow.goes_with(copy.held(), from, to) {
                // Once it has cleaned as far it gives it.
                assert_eq!(seed % 2, 0, "it is as clean");
                refused += 1;
                slow.want_clean_to(copy.held().dropped_to);
                // That is all that it is due for.
                let settings = slow.config().clone();
                let alone = settings.compaction.map(|it| CompactionConfig { dirty_per_mille_min: 1_000, ..it });
                slow.set_config(LogConfig { compaction: alone, ..settings });
                compact(&mut slow, NOW);
                assert!(slow.goes_with(copy.held(), from, to));
            }
            let range = slow.offset_range(from, to, 700).expect("held").run().expect("read");
            copy.append(range.bytes, range.cleanness).expect("taken");
            given += 1;
        }
        log.segment_copied(&mut copy);
        drop(copy);
        assert_eq!(view(&read_all(&mut log)), expected, "seed {seed}");
        let Cleanness { clean_to, dropped_to } = log.cleanness();
        assert!(dropped_to <= clean_to);
        compact(&mut log, NOW.after(Duration::from_secs(62)));
        assert_eq!(view(&read_all(&mut log)), expected, "seed {seed}");
    }
    assert!(refused >= 6 && given >= 24, "{refused} refused, {given} given");
}

/// Damages the first cleaned segment.
fn rot(sim: &SimDisk, log: &Log) -> Rotten {
    let names = sim.shared().read_dir(Path::new(DIR)).expect("a folder");
    let mut cleaned: Vec<_> =
        names.into_iter().filter(|name| name.ends_with(".log") && name.matches('-').count() == 2).collect();
    cleaned.sort_unstable();
    sim.flip_bit(&Path::new(DIR).join(&cleaned[0]), 200, 3);
    let mut position = flowstone_storage::ScrubPosition::START;
    loop {
        let scrubbed = log.scrub_job(position, 1 << 20).expect("sealed").run().expect("read");
        if let Some(rotten) = scrubbed.rotten {
            assert_eq!(rotten.segment.log_file(), cleaned[0]);
            return rotten;
        }
        position = scrubbed.next.expect("it is found");
    }
}

/// Runs a pass up to its end, or up to where it fails.
fn try_compact(log: &mut Log) -> Result<(), StorageError> {
    let settled = Settled::new(log.high_watermark(), Vec::new());
    let limits = CompactionLimits { up_to: RaftIndex::new(u64::MAX), memory_bytes: 1 << 20, seed: 3, now: NOW };
    let Some(mut pass) = log.begin_compaction(settled, limits) else { return Ok(()) };
    loop {
        let step = pass.step(10_000)?;
        log.compacted(&mut pass);
        if step.is_done {
            return Ok(());
        }
    }
}

#[test]
fn what_the_file_names_is_on_the_disk_before_it() {
    for seed in 0..120 {
        let mut all = Records::new();
        let (sim, mut log) = created(seed, 3_000);
        log.set_config(config(Duration::from_secs(60)));
        write(&mut log, &mut Random(4), 60, &mut all);
        source::checkpoint(&mut log);
        let (flushed, expected) = (log.flushed_index(), view(&read_all(&mut log)));
        // The second flush of the folder is the one behind the renaming of `compacted`.
        sim.fail(Operation::SyncDir, 1);
        try_compact(&mut log).expect_err("the folder is not flushed");
        sim.cancel_faults();
        drop(log);
        sim.restart(Crash::Power);
        let opened = Log::open(sim.shared(), Path::new(DIR), config(Duration::from_secs(60)), flushed, NOW);
        let mut log = opened.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!(view(&read_all(&mut log)), expected, "seed {seed}");
    }
}

#[test]
fn what_the_disk_may_name_already_is_not_written_over() {
    for run in 0..200 {
        let mut all = Records::new();
        let (sim, mut log) = created(run, 3_000);
        log.set_config(config(Duration::from_secs(60)));
        write(&mut log, &mut Random(4), 60, &mut all);
        source::checkpoint(&mut log);
        let (flushed, expected) = (log.flushed_index(), view(&read_all(&mut log)));
        sim.fail(Operation::SyncDir, 1);
        try_compact(&mut log).expect_err("the folder is not flushed");
        sim.cancel_faults();
        assert_eq!(view(&read_all(&mut log)), expected, "run {run}");
        sim.crash_after(run % 40);
        let again = try_compact(&mut log);
        let crash = if sim.is_crashed() && run % 3 > 0 { Crash::Process } else { Crash::Power };
        assert!(again.is_ok() || sim.is_crashed(), "{again:?}");
        sim.cancel_crash();
        drop(log);
        sim.restart(crash);
        let opened = Log::open(sim.shared(), Path::new(DIR), config(Duration::from_secs(60)), flushed, NOW);
        let mut log = opened.unwrap_or_else(|error| panic!("run {run}: {error}"));
        assert_eq!(view(&read_all(&mut log)), expected, "run {run}");
    }
}

#[test]
fn cleaned_segments_are_not_let_go_where_the_file_that_names_them_is_missing() {
    let mut all = Records::new();
    let (sim, mut log, _) = compacted_source(3, &mut all);
    let (expected, flushed) = (read_all(&mut log), log.flushed_index());
    // Nothing is due, but what was replaced goes.
    compact(&mut log, NOW);
    drop(log);
    let (disk, dir) = (sim.shared(), Path::new(DIR));
    let file = dir.join("compacted");
    let bytes = sim.bytes(&file).expect("it is there");
    disk.remove_file(&file).expect("removed");
    let opened = Log::open(sim.shared(), dir, config(Duration::from_secs(60)), flushed, NOW);
    assert!(matches!(opened, Err(OpenError::Quarantine { .. })), "{:?}", opened.map(|log| log.log_start()));
    // Nothing has changed: with the file it is whole.
    let made = disk.open(&file, OpenMode::CreateNew).expect("made");
    made.write_at(&bytes, 0).expect("written");
    let opened = Log::open(sim.shared(), dir, config(Duration::from_secs(60)), flushed, NOW);
    assert_eq!(read_all(&mut opened.expect("opens")), expected);
}

#[test]
fn the_checkpoint_before_serves_where_retention_has_taken_cleaned_segments() {
    let mut all = Records::new();
    let (sim, mut log, mut random) = compacted_source(3, &mut all);
    let dir = Path::new(DIR);
    write(&mut log, &mut random, 10, &mut all);
    source::checkpoint(&mut log);
    let cleaned = |sim: &SimDisk| {
        let names = sim.shared().read_dir(dir).expect("a folder");
        names.iter().filter(|name| name.ends_with(".log") && name.matches('-').count() == 2).count()
    };
    let before = cleaned(&sim);
    assert!(before > 1, "{before} cleaned segments");
    // Into the second one.
    let first = first_segment_end(&log);
    log.set_log_start(first);
    write(&mut log, &mut random, 3, &mut all);
    let name = {
        source::checkpoint(&mut log);
        log.newest_checkpoint_file().1
    };
    assert_eq!(log.delete_segments_below_checkpoint().expect("removed"), 1);
    assert_eq!(cleaned(&sim), before - 1);
    let (expected, flushed) = (read_all(&mut log), log.flushed_index());
    drop(log);
    sim.flip_bit(&name, 60, 1);
    let opened = Log::open(sim.shared(), dir, config(Duration::from_secs(60)), RaftIndex::new(1), NOW);
    let mut log = opened.expect("opens from the one before");
    assert!(log.checkpoint().applied < flushed);
    log.commit_to(log.last_index());
    assert_eq!(read_all(&mut log), expected);
}

/// Where the first segment ends: a range lies in one.
fn first_segment_end(log: &Log) -> Offset {
    let range = log.offset_range(log.local_start().0, log.high_watermark(), 1 << 20).expect("held");
    range.run().expect("read").next
}

#[test]
fn a_damaged_cleaned_segment_is_written_anew_from_another_replica() {
    let mut all = Records::new();
    let (sim, mut log, _) = compacted_source(11, &mut all);
    let expected = read_all(&mut log);
    // Another replica, which never compacted.
    let mut records = Records::new();
    let mut random = Random(11);
    let (_other_sim, mut other) = created(3, 3_000);
    write(&mut other, &mut random, 120, &mut records);
    assert_eq!(records, all);
    let rotten = rot(&sim, &log);
    assert!(log.repair(&rotten).is_err(), "its batches are no entries");
    assert!(log.has_cleaned(rotten.segment));
    let mut copy = log.begin_segment_copy(rotten.segment).expect("begun");
    assert!(log.is_compacting(), "nothing else changes it meanwhile");
    while let Some((from, to)) = copy.wanted() {
        let range = other.offset_range(from, to, 700).expect("held").run().expect("read");
        copy.append(range.bytes, range.cleanness).expect("taken");
    }
    log.segment_copied(&mut copy);
    drop(copy);
    assert_eq!(view(&read_all(&mut log)), view(&expected));
    // It is dirty again, and cleaned anew.
    assert!(log.clean_to() <= Offset::new(rotten.first_offset.get()));
    compact(&mut log, NOW);
    assert_eq!(view(&read_all(&mut log)), view(&expected));
    drop(log);
    sim.restart(Crash::Power);
    let opened = Log::open(sim.shared(), Path::new(DIR), config(Duration::from_secs(60)), RaftIndex::new(1), NOW);
    assert_eq!(view(&read_all(&mut opened.expect("opens"))), view(&expected));
}

#[test]
fn a_pass_that_the_power_ends_at_any_point_leaves_the_old_or_the_new() {
    let mut swapped = 0;
    for run in 0..240 {
        let mut all = Records::new();
        let (sim, mut log) = created(run, 3_000);
        log.set_config(config(Duration::from_secs(60)));
        write(&mut log, &mut Random(4), 60, &mut all);
        source::checkpoint(&mut log);
        let flushed = log.flushed_index();
        let expected = view(&read_all(&mut log));
        let settled = Settled::new(log.high_watermark(), Vec::new());
        let limits = CompactionLimits { up_to: RaftIndex::new(u64::MAX), memory_bytes: 1 << 20, seed: 3, now: NOW };
        let mut pass = log.begin_compaction(settled, limits).expect("due");
        sim.crash_after(run % 60);
        while let Ok(step) = pass.step(10_000) {
            log.compacted(&mut pass);
            if step.is_done {
                break;
            }
        }
        sim.cancel_crash();
        drop((pass, log));
        sim.restart(Crash::Power);
        let opened = Log::open(sim.shared(), Path::new(DIR), config(Duration::from_secs(60)), flushed, NOW);
        let mut log = opened.unwrap_or_else(|error| panic!("run {run}: {error}"));
        swapped += u64::from(log.first_offset() > log.local_start().0);
        assert_eq!(view(&read_all(&mut log)), expected, "run {run}");
        for (offset, record) in &read_all(&mut log) {
            assert_eq!(all.get(offset), Some(record), "run {run}, offset {offset}");
        }
    }
    assert!((40..230).contains(&swapped), "{swapped} had new files");
}

#[test]
fn what_a_newer_program_wrote_is_not_taken_for_damage() {
    let mut all = Records::new();
    let (sim, mut log) = created(1, 3_000);
    log.set_config(config(Duration::from_secs(60)));
    write(&mut log, &mut Random(4), 20, &mut all);
    let (index, term) = (log.last_index().next(), log.last_term());
    let payload = Bytes::from(vec![7; 20]);
    let body = EntryBody::Control { ctype: ControlType::ProducerExpiry, payload };
    log.append(&[LogEntry { index, term, body }], NOW).expect("appended");
    write(&mut log, &mut Random(5), 60, &mut all);
    source::checkpoint(&mut log);
    // The key of a control record: its length, version 0, the type.
    let known = [8, 0, 0, 0, ControlType::ProducerExpiry.id() as u8];
    let dir = Path::new(DIR);
    let mut changed = 0;
    for name in sim.shared().read_dir(dir).expect("a folder").iter().filter(|name| name.ends_with(".log")) {
        let mut bytes = sim.bytes(&dir.join(name)).expect("a file");
        let mut at = 0;
        while let Ok(header) = flowstone_protocol::BatchHeader::parse(&bytes[at..]) {
            let batch = &mut bytes[at..at + header.total_bytes()];
            at += header.total_bytes();
            if let Some(key) = batch.windows(5).position(|window| window == known)
                && header.attributes.is_control()
            {
                batch[key + 3..key + 5].copy_from_slice(&999_i16.to_be_bytes());
                let crc = flowstone_protocol::batch::crc_of(batch).to_be_bytes();
                batch[17..21].copy_from_slice(&crc);
                changed += 1;
            }
        }
        sim.set_bytes(&dir.join(name), bytes);
    }
    assert_eq!(changed, 1);
    let error = try_compact(&mut log).expect_err("it may be needed by whoever understands it");
    assert!(matches!(error, StorageError::NewerBatch { ctype: 999, .. }), "{error}");
}
