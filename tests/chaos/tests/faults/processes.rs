//! Processes that are killed, paused and stopped.

use crate::{all_is_well, alone, three};
use std::time::Duration;

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
