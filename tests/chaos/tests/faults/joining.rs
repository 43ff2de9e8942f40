//! Brokers that should not be let in, or not found a cluster.

use crate::alone;
use flowstone_chaos::{HANG, Setup};
use std::time::{Duration, Instant};

#[test]
fn two_brokers_with_one_id_are_not_both_let_in() {
    let _alone = alone();
    let mut cluster = Setup::new(3).start().expect("three brokers form a cluster");
    let seeds: Vec<_> = cluster.brokers().iter().map(|broker| broker.peer().address()).collect();
    let mut second = Setup::new(2).prepare().expect("another folder");
    second.start_with_seeds(2, &seeds).expect("the binary starts");
    let ended = second.broker(2).wait_for_end(HANG).expect("it is refused, and ends");
    assert!(!ended.status.success() && ended.messages.contains('2'), "{}", ended.messages);
    for id in cluster.ids() {
        assert!(cluster.broker(id).ready().expect("it runs").is_ok(), "broker {id} is disturbed");
    }
}

#[test]
fn the_data_of_another_cluster_is_refused() {
    let _alone = alone();
    let cluster = Setup::new(3).start().expect("three brokers form a cluster");
    let seeds: Vec<_> = cluster.brokers().iter().map(|broker| broker.peer().address()).collect();
    let mut other = Setup::new(1).start().expect("a cluster of one");
    other.broker(1).kill().expect("it runs");
    other.start_with_seeds(1, &seeds).expect("the binary starts");
    let ended = other.broker(1).wait_for_end(HANG).expect("it is refused, and ends");
    assert!(!ended.status.success() && ended.messages.contains("cluster"), "{}", ended.messages);
}

#[test]
fn seeds_that_disagree_form_no_cluster_and_say_so() {
    let _alone = alone();
    let mut cluster = Setup::new(3).prepare().expect("three brokers");
    let seeds: Vec<_> = cluster.brokers().iter().map(|broker| broker.peer().address()).collect();
    cluster.start(1).expect("the binary starts");
    cluster.start(2).expect("the binary starts");
    cluster.start_with_seeds(3, &[seeds[2], seeds[0], seeds[1]]).expect("the binary starts");
    for id in cluster.ids() {
        let reasons = not_ready_because(&mut cluster, id, "seeds");
        assert!(reasons.contains("seeds"), "broker {id}: {reasons}");
    }
    // Once they agree, they are one.
    cluster.broker(3).kill().expect("it runs");
    cluster.start_all().expect("now they form a cluster");
}

#[test]
fn two_of_three_seeds_wait_for_the_third() {
    let _alone = alone();
    let mut cluster = Setup::new(3).prepare().expect("three brokers");
    cluster.start(1).expect("the binary starts");
    cluster.start(3).expect("the binary starts");
    not_ready_because(&mut cluster, 1, "");
    not_ready_because(&mut cluster, 3, "");
    cluster.start_all().expect("with the third they form a cluster");
    let brokers = cluster.json(&["cluster", "info"]).expect("asked")["brokers"].as_array().map(Vec::len);
    assert_eq!(brokers, Some(3));
}

/// Waits until a broker says, for this reason, that it is not ready; what it says.
#[track_caller]
fn not_ready_because(cluster: &mut flowstone_chaos::Cluster, id: i32, reason: &str) -> String {
    let began = Instant::now();
    loop {
        match cluster.broker(id).ready().expect("it runs") {
            Ok(()) => panic!("broker {id} is ready"),
            Err(said) if said.starts_with("503") && said.contains(reason) => return said,
            Err(said) => assert!(began.elapsed() < HANG, "broker {id} says {said}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_client_that_talks_to_the_peer_listener_is_told() {
    let _alone = alone();
    let cluster = Setup::new(3).start().expect("three brokers form a cluster");
    let peer = cluster.brokers()[0].peer_listener().expect("it runs").to_string();
    let output = std::process::Command::new(flowstone_chaos::flowstone_binary().expect("the binary"))
        .args(["topic", "list", "--timeout", "5s", "--server", &peer])
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("peer"), "{said}");
}
