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
use flowstone_storage::sim_disk::Crash;
use flowstone_storage::{
    CompactionConfig, CompactionLimits, EntryBody, Install, Log, LogConfig, LogEntry, Read, Settled, SimDisk,
    StorageError, checkpoint,
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
        install.append_offsets(range.bytes)?;
    }
    Ok(())
}

fn begin(log: &Log, sim: &SimDisk) -> Install {
    let (_, path) = log.newest_checkpoint_file();
    let dir = Path::new(DIR);
    let bytes = checkpoint::read_file(&sim.shared(), &path).expect("a checkpoint");
    let target = SimDisk::new(9);
    let config = config(Duration::from_secs(60));
    Install::begin_by_offset(&target.shared(), dir, identity(2), &bytes, log.local_start(), NOW, config).expect("begun")
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
        let begun = Install::begin_by_offset(&disk, dir, identity(2), &bytes, start, NOW, settings.clone());
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
                        NOW,
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
        assert!(matches!(install.append_offsets(wrong), Err(StorageError::Refused { .. })));
        assert_eq!(install.wanted_offsets(), Some((from, to)));
    }
    let later = log.offset_range(range.next, to, 2_000).expect("held").run().expect("read");
    assert!(matches!(install.append_offsets(later.bytes), Err(StorageError::Refused { .. })));
    install.append_offsets(range.bytes).expect("what is wanted");
    assert_eq!(install.wanted_offsets(), Some((range.next, to)));
}

#[test]
fn who_began_before_a_tombstone_went_is_not_given_the_rest() {
    let mut all = Records::new();
    let (_sim, mut log, _) = compacted_source(2, &mut all);
    let later = NOW.after(Duration::from_secs(61));
    assert!(log.gives_since(NOW, later), "nothing went because of its age yet");
    compact(&mut log, later);
    assert_eq!(log.dropped_by_age_at(), later, "tombstones went");
    assert!(!log.gives_since(NOW, later));
    // Who began a moment ago has copied nothing that they deleted.
    assert!(log.gives_since(NOW.after(Duration::from_secs(30)), later));
    assert!(log.gives_since(later, later.after(Duration::from_secs(600))));
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
    let name = sim
        .shared()
        .read_dir(Path::new(DIR))
        .expect("a folder")
        .into_iter()
        .filter(|name| name.ends_with(".log") && name.matches('-').count() == 2)
        .min()
        .expect("a cleaned segment");
    sim.flip_bit(&Path::new(DIR).join(&name), 200, 3);
    let mut position = flowstone_storage::ScrubPosition::START;
    let rotten = loop {
        let scrubbed = log.scrub_job(position, 1 << 20).expect("sealed").run().expect("read");
        if let Some(rotten) = scrubbed.rotten {
            break rotten;
        }
        position = scrubbed.next.expect("it is found");
    };
    assert_eq!(rotten.segment.log_file(), name);
    assert!(log.repair(&rotten).is_err(), "its batches are no entries");
    assert!(log.has_cleaned(rotten.segment));
    let mut copy = log.begin_segment_copy(rotten.segment).expect("begun");
    assert!(log.is_compacting(), "nothing else changes it meanwhile");
    while let Some((from, to)) = copy.wanted() {
        let range = other.offset_range(from, to, 700).expect("held").run().expect("read");
        copy.append(range.bytes).expect("taken");
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
