//! Disks that are gone, damaged or full.

use crate::{all_is_well, alone, three};
use flowstone_chaos::{Cluster, HANG, Setup, SmallDisk, Workload, flip_byte, sealed_segments};
use std::io::Write;
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
    let arguments = ["topic", "create", "lines", "-r", "3", "-c", "segment.bytes=2097152"];
    cluster.ok(&arguments).expect("a topic with small segments");
    let mut produce = cluster.command(&["produce", "lines"]);
    let mut produce = produce.stdin(std::process::Stdio::piped()).spawn().expect("the command runs");
    produce.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads");
    assert!(produce.wait().expect("our child").success(), "all lines are acknowledged");
    text
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
