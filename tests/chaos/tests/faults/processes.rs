//! Processes that are killed, paused and stopped.

use crate::{all_is_well, alone, three};
use flowstone_chaos::{Cluster, HANG, Setup, flowstone_binary};
use std::net::TcpStream;
use std::time::{Duration, Instant};

#[test]
fn the_leader_is_killed() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    let leader = cluster.leader("checked", 0).expect("asked").expect("a leader");
    cluster.broker(leader).kill().expect("it runs");
    cluster.wait_leader("checked", 0, Some(leader)).expect("another leads");
    workload.goes_on(&cluster).expect("two are a majority");
    cluster.start_all().expect("it comes back");
    all_is_well(&cluster, workload);
}

#[test]
fn a_majority_is_killed_and_comes_back() {
    let _alone = alone();
    let (mut cluster, workload) = three();
    cluster.broker(1).kill().expect("it runs");
    cluster.broker(2).kill().expect("it runs");
    // One of three acknowledges nothing.
    let refused =
        cluster.command(&["produce", "checked", "/etc/hosts", "--timeout", "1s"]).output().expect("the command runs");
    assert!(!refused.status.success());
    cluster.start_all().expect("they come back");
    all_is_well(&cluster, workload);
}

#[test]
fn all_are_killed_and_come_back() {
    let _alone = alone();
    let (mut cluster, workload) = three();
    for id in cluster.ids() {
        cluster.broker(id).kill().expect("it runs");
    }
    cluster.start_all().expect("they come back");
    all_is_well(&cluster, workload);
}

#[test]
fn a_paused_leader_is_replaced_and_tells_nothing_stale() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    let leader = cluster.leader("checked", 0).expect("asked").expect("a leader");
    cluster.broker(leader).pause().expect("it runs");
    cluster.wait_leader("checked", 0, Some(leader)).expect("another leads");
    workload.goes_on(&cluster).expect("two are a majority");
    // Clients that were connected to it ask on: for the ends, too.
    cluster.broker(leader).resume().expect("it runs");
    all_is_well(&cluster, workload);
}

#[test]
fn a_paused_controller_that_goes_on_decides_nothing() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    let controller = |cluster: &Cluster| {
        let info = cluster.json(&["cluster", "info"]).ok()?;
        info["controller"].as_i64().and_then(|id| i32::try_from(id).ok())
    };
    // It tells of brokers that are dead with its exit code, too.
    let state = |cluster: &Cluster, id: i32| {
        let output = cluster.run(&["cluster", "health", "-o", "json"]).ok()?;
        let health: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let broker = health["brokers"].as_array()?.iter().find(|broker| broker["id"] == id)?.clone();
        broker["state"].as_str().map(str::to_owned)
    };
    let paused = controller(&cluster).expect("a controller");
    let others: Vec<i32> = cluster.ids().into_iter().filter(|id| *id != paused).collect();
    cluster.broker(paused).pause().expect("it runs");
    // By the clock of the one that stands still, nobody will have said anything for longer than a session lasts.
    until("another controller gives it up", || {
        others.contains(&controller(&cluster)?).then_some(())?;
        (state(&cluster, paused)? == "dead").then_some(())
    });
    workload.goes_on(&cluster).expect("two are a majority");
    cluster.ok(&["topic", "create", "meanwhile", "-r", "2"]).expect("it decides");
    cluster.broker(paused).resume().expect("it runs");
    // It holds the others for dead, and itself for the controller, until it hears of its successor.
    until("it is taken in again", || {
        for other in &others {
            let state = state(&cluster, *other)?;
            assert_eq!(state, "alive", "broker {other}");
        }
        (state(&cluster, paused)? == "alive").then_some(())
    });
    let returned = cluster.broker(paused).client().address().to_string();
    until("it knows what its successor decided", || {
        let mut command = std::process::Command::new(flowstone_binary().expect("the binary"));
        let command = command.args(["topic", "describe", "meanwhile", "--server", &returned]);
        command.output().expect("it runs").status.success().then_some(())
    });
    all_is_well(&cluster, workload);
}

/// Looks again and again, until it is so.
#[track_caller]
fn until(what: &str, mut look: impl FnMut() -> Option<()>) {
    let began = Instant::now();
    while look().is_none() {
        assert!(began.elapsed() < HANG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn one_after_another_is_restarted() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    for id in cluster.ids() {
        let status = cluster.broker(id).terminate(Duration::from_secs(30)).expect("it stops");
        assert!(status.success(), "broker {id} ended with {status}");
        cluster.start_all().expect("it comes back");
        workload.goes_on(&cluster).expect("it goes on");
        cluster.wait_healthy().expect("it catches up");
    }
    all_is_well(&cluster, workload);
}

#[test]
fn a_broker_without_file_descriptors_holds_up_nobody_and_recovers() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    let open = cluster.broker(2).metric("flowstone_process_open_files").expect("asked");
    // What it has it keeps; it gets none for new connections, segments and maps.
    let before = cluster.broker(2).limit_open_files(open as u64).expect("it runs");
    let address = cluster.broker(2).client().address();
    let held: Vec<TcpStream> = (0..100).map_while(|_| TcpStream::connect(address).ok()).collect();
    assert_eq!(held.len(), 100, "the proxy takes them");
    workload.goes_on(&cluster).expect("those that have what they need go on");
    assert!(cluster.broker(2).is_running());
    drop(held);
    cluster.broker(2).limit_open_files(before).expect("it still runs");
    cluster.wait_ready(2).expect("it recovers");
    all_is_well(&cluster, workload);
}

#[test]
fn memory_stays_bounded_while_a_follower_takes_nothing() {
    let _alone = alone();
    let mut cluster = Setup::new(3)
        .set("storage.in_flight_bytes_max=16 MiB")
        .set("limits.receiving_bytes=32 MiB")
        .start()
        .expect("three brokers form a cluster");
    cluster.ok(&["topic", "create", "wide", "-r", "3"]).expect("a topic");
    cluster.wait_healthy().expect("all copies are whole");
    let leader = cluster.leader("wide", 0).expect("asked").expect("a leader");
    let paused = cluster.ids().into_iter().find(|id| *id != leader).expect("two follow");
    let before = cluster.broker(leader).own_memory().expect("it runs");
    cluster.broker(paused).pause().expect("it runs");
    // Far more than may wait for the one that takes nothing: 64 MiB of appends.
    let arguments =
        ["bench", "produce", "--topic", "wide", "--records", "4000", "--size", "100000", "--timeout", "90s"];
    let mut produce = cluster.command(&arguments).spawn().expect("it starts");
    let (began, mut most) = (Instant::now(), 0);
    let status = loop {
        most = most.max(cluster.broker(leader).own_memory().expect("it runs"));
        match produce.try_wait().expect("our child") {
            Some(status) => break status,
            None => assert!(began.elapsed() < HANG * 2, "400 MB are not written"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "two are a majority");
    let grown = most.saturating_sub(before) >> 20;
    assert!(grown < 256, "the leader's memory has grown by {grown} MiB over 400 MB that one follower did not take");
    cluster.broker(paused).resume().expect("it runs");
    cluster.wait_healthy().expect("it catches up");
}

#[test]
fn data_of_a_newer_release_is_refused_and_the_others_go_on() {
    let _alone = alone();
    let (mut cluster, mut workload) = three();
    assert!(cluster.broker(3).terminate(Duration::from_secs(30)).expect("it stops").success());
    // As a newer release left it: its version, and the checksum that belongs to it.
    let manifest = cluster.broker(3).data_dir().join("manifest");
    let known = std::fs::read(&manifest).expect("every data directory has one");
    let mut newer = known.clone();
    newer[8..12].copy_from_slice(&99_u32.to_le_bytes());
    let covered = newer.len() - 4;
    let crc = crc32fast::hash(&newer[..covered]);
    newer[covered..].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&manifest, newer).expect("written");
    cluster.start(3).expect("the binary starts");
    let ended = cluster.broker(3).wait_for_end(HANG).expect("it refuses, and ends");
    assert!(!ended.status.success() && ended.messages.contains("newer"), "{}", ended.messages);
    workload.goes_on(&cluster).expect("two are a majority");
    // The release that wrote it takes it up again, and finds it as it was.
    std::fs::write(&manifest, known).expect("written");
    cluster.start_all().expect("it comes back");
    all_is_well(&cluster, workload);
}
