//! Disks that are gone, damaged or full.

use crate::{all_is_well, alone, three};
use flowstone_chaos::{
    Cluster, HANG, Setup, SmallDisk, Workload, active_segments, flip_byte, forget_tail, sealed_segments,
};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[test]
fn a_wiped_broker_comes_back_as_a_new_one() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    cluster.broker(2).kill().expect("it runs");
    cluster.broker(2).wipe().expect("it is killed");
    cluster.start_all().expect("it joins again");
    cluster.wait_healthy().expect("it gets everything again");
    // Now its copy counts: with one of the others gone, it is half of the majority.
    cluster.broker(1).kill().expect("it runs");
    workload.goes_on(&cluster).expect("two are a majority");
    cluster.start_all().expect("it comes back");
    all_is_well(&cluster, workload);
}

/// Writes numbered lines until there are sealed segments everywhere.
fn fill(cluster: &Cluster, lines: usize) -> String {
    let text: String = (0..lines).map(|number| format!("{number:08} {}\n", "x".repeat(200))).collect();
    write(cluster, &text);
    text
}

/// Writes lines into a topic of small segments.
fn write(cluster: &Cluster, text: &str) {
    let arguments = ["topic", "create", "lines", "-r", "3", "-c", "segment.bytes=2097152"];
    cluster.ok(&arguments).expect("a topic with small segments");
    let mut produce = cluster.command(&["produce", "lines"]);
    let mut produce = produce.stdin(std::process::Stdio::piped()).spawn().expect("the command runs");
    produce.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads");
    assert!(produce.wait().expect("our child").success(), "all lines are acknowledged");
}

#[test]
fn a_flipped_byte_in_a_sealed_segment_is_mended_from_another_broker() {
    let _alone = alone();
    let mut cluster = Setup::new(3).start().expect("three brokers form a cluster");
    let text = fill(&cluster, 40_000);
    cluster.wait_healthy().expect("all copies are whole");
    let leader = cluster.leader("lines", 0).expect("asked").expect("a leader");
    let sealed = sealed_segments(cluster.broker(leader).data_dir()).expect("a folder");
    let largest =
        sealed.iter().max_by_key(|path| path.metadata().map_or(0, |file| file.len())).expect("a sealed segment");
    let whole = std::fs::read(largest).expect("a file");
    // Closed in order, so that nothing of a sealed segment is read when it starts; and read from the disk then.
    assert!(cluster.broker(leader).terminate(Duration::from_secs(30)).expect("it stops").success());
    flip_byte(largest).expect("content");
    cluster.start_all().expect("a rotten sealed segment is no reason not to start");
    cluster.wait_healthy().expect("it is in sync");
    assert!(cluster.ok(&["consume", "lines", "-e"]).expect("it can be read") == text, "every line, and no other");
    // Whoever reads from the broker itself makes it look.
    let began = Instant::now();
    while std::fs::read(largest).ok().as_ref() != Some(&whole) {
        let _ = cluster.run(&["partition", "transfer-leader", "lines", "0", "--to", &leader.to_string()]);
        let read = cluster.ok(&["consume", "lines", "-e"]).expect("it can be read");
        assert!(read == text, "every line, and no other");
        assert!(began.elapsed() < HANG, "{} is not mended", largest.display());
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_full_disk_stops_one_copy_and_not_the_cluster() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let disk = match SmallDisk::mount(&folder.path().join("disk"), 64) {
        Ok(disk) => disk,
        Err(failure) => return eprintln!("left out, this takes root: {failure}"),
    };
    let mut cluster = Setup::new(3).prepare().expect("three brokers");
    cluster.broker(3).set_data_dir(&disk.folder().join("data"));
    cluster.start_all().expect("three brokers form a cluster");
    let mut workload = Workload::start(&cluster, "checked", 3, &[]).expect("records in, records out");
    // Somebody else takes the room.
    let filler = disk.folder().join("filler");
    let mut file = std::fs::File::create(&filler).expect("a file");
    while file.write_all(&[1; 1 << 16]).is_ok() {}
    drop(file);
    // Partitions that it leads are read-only until there is room; those of others go on, and so does every reader.
    let led_by_others =
        (0..3).filter(|partition| cluster.leader("checked", *partition).ok().flatten() != Some(3)).count();
    workload.goes_on_in(&cluster, led_by_others).expect("those of others go on");
    assert!(cluster.broker(3).is_running() && cluster.broker(3).ready().is_ok(), "it does not crash");
    std::fs::remove_file(&filler).expect("it is ours");
    all_is_well(&cluster, workload);
}

/// Kills broker 2 in the middle of a workload, does something to its files, and starts it again: it gets back what it
/// lost, and nothing is wrong. Then its copy counts.
#[track_caller]
fn killed_and_damaged(damage: impl FnOnce(&Path)) {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    cluster.broker(2).kill().expect("it runs");
    damage(cluster.broker(2).data_dir());
    cluster.start_all().expect("damage is no reason not to start");
    cluster.wait_healthy().expect("it gets back what it lost");
    let damaged = cluster.broker(2).messages();
    assert!(!damaged.contains("panicked"), "{damaged}");
    cluster.broker(1).kill().expect("it runs");
    workload.goes_on(&cluster).expect("two are a majority");
    cluster.start_all().expect("it comes back");
    all_is_well(&cluster, workload);
}

fn of_partitions(segments: Vec<PathBuf>) -> Vec<PathBuf> {
    // Those of the workload: they have the most.
    segments.into_iter().take(3).collect()
}

#[test]
fn a_flipped_byte_in_a_committed_tail_is_refetched() {
    killed_and_damaged(|data_dir| {
        for segment in of_partitions(active_segments(data_dir).expect("a folder")) {
            flip_byte(&segment).expect("content");
        }
    });
}

#[test]
fn a_tail_that_was_flushed_and_is_gone_is_noticed() {
    killed_and_damaged(|data_dir| {
        for segment in of_partitions(active_segments(data_dir).expect("a folder")) {
            forget_tail(&segment).expect("content");
        }
    });
}

/// Files below a folder whose names fit.
fn files(folder: &Path, fits: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("read").path();
        if path.is_dir() {
            found.extend(files(&path, fits));
        } else if path.file_name().is_some_and(|name| fits(&name.to_string_lossy())) {
            found.push(path);
        }
    }
    found
}

#[test]
fn rotten_indexes_and_checkpoints_are_made_anew() {
    killed_and_damaged(|data_dir| {
        let rotten = files(data_dir, &|name| name.ends_with(".index") || name.ends_with(".state"));
        // A new file may have no content yet.
        let flipped = rotten.iter().filter(|path| flip_byte(path).is_ok()).count();
        assert!(flipped >= 3, "{rotten:?}");
    });
}

#[test]
fn a_rotten_hard_state_makes_a_replica_that_does_not_vote() {
    killed_and_damaged(|data_dir| {
        let states = files(data_dir, &|name| name.starts_with("hard-state-"));
        let flipped = states.iter().filter(|path| flip_byte(path).is_ok()).count();
        assert!(flipped >= 3, "{states:?}");
    });
}

#[test]
fn a_copy_that_finds_no_room_goes_on_once_there_is_some() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let disk = match SmallDisk::mount(&folder.path().join("disk"), 192) {
        Ok(disk) => disk,
        Err(failure) => return eprintln!("left out, this takes root: {failure}"),
    };
    let mut cluster = Setup::new(3).prepare().expect("three brokers");
    cluster.broker(3).set_data_dir(&disk.folder().join("data"));
    cluster.start_all().expect("three brokers form a cluster");
    // Digits of a generator's numbers: no codec makes them small.
    let mut number = 1_u64;
    let mut next = || {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        format!("{number:016x}")
    };
    let text: String = (0..40_000).map(|_| (0..64).map(|_| next()).collect::<String>() + "\n").collect();
    write(&cluster, &text);
    // Stopped in order they leave a checkpoint at the end of the log: all of it is copied, nothing sent entry by entry.
    for id in [1, 2] {
        cluster.wait_healthy().expect("all copies are whole");
        assert!(cluster.broker(id).terminate(Duration::from_secs(30)).expect("it stops").success());
        cluster.start_all().expect("it comes back");
    }
    cluster.wait_healthy().expect("all copies are whole");
    cluster.broker(3).kill().expect("it runs");
    cluster.broker(3).wipe().expect("it is killed");
    // Room for less than the copy, though more than is kept free.
    let filler = disk.folder().join("filler");
    std::fs::write(&filler, vec![1; 160 << 20]).expect("there is room");
    cluster.start(3).expect("the binary starts");
    let began = Instant::now();
    let (mut pulled, mut free) = (0.0, f64::MAX);
    while pulled < 1e6 || free > 16e6 {
        let broker = cluster.broker(3);
        pulled = broker.metric("flowstone_pulled_bytes_total").unwrap_or(0.0);
        free = broker.metric("flowstone_disk_free_bytes").unwrap_or(f64::MAX);
        assert!(
            broker.is_running() && began.elapsed() < HANG,
            "{pulled} pulled, {free} free: {}",
            broker.last_messages()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    // The rest is read and written meanwhile.
    cluster.ok(&["produce", "lines", "/etc/hosts"]).expect("two are a majority");
    assert!(cluster.ok(&["cluster", "health"]).is_err(), "there is no room for all of it");
    assert!(cluster.broker(3).is_running(), "it does not end");
    std::fs::remove_file(&filler).expect("it is ours");
    cluster.wait_healthy().expect("it gets the rest");
    let hosts = std::fs::read_to_string("/etc/hosts").expect("every machine has it");
    let read = cluster.ok(&["consume", "lines", "-e"]).expect("it can be read");
    assert!(read == text + &hosts, "every line, and no other");
}
