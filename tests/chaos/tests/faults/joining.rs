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

#[test]
fn a_seed_that_cannot_be_resolved_is_named_and_keeps_a_cluster_from_being_founded() {
    let _alone = alone();
    let mut cluster = Setup::new(3).prepare().expect("three brokers");
    let seeds: Vec<_> = cluster.brokers().iter().map(|broker| broker.peer().address().to_string()).collect();
    let unresolvable = format!("cluster.seeds={},{},flowstone.invalid:7071", seeds[0], seeds[1]);
    for id in [1, 2] {
        cluster.broker(id).set(unresolvable.clone());
        cluster.start(id).expect("the binary starts");
    }
    for id in [1, 2] {
        let said = not_ready_because(&mut cluster, id, "flowstone.invalid");
        assert!(said.contains("flowstone.invalid:7071"), "{said}");
    }
    // With the right name they are a cluster.
    for id in [1, 2] {
        cluster.broker(id).kill().expect("it goes on and asks again");
        cluster.broker(id).set(format!("cluster.seeds={}", seeds.join(",")));
    }
    cluster.start_all().expect("now they form a cluster");
}

#[test]
fn a_broker_without_seeds_is_a_cluster_of_its_own_and_joins_no_other() {
    let _alone = alone();
    let cluster = Setup::new(3).start().expect("three brokers form a cluster");
    let mut alone = Setup::new(1).prepare().expect("another folder");
    alone.start_with_seeds(1, &[]).expect("the binary starts");
    alone.wait_ready(1).expect("it needs nobody");
    let of = |cluster: &flowstone_chaos::Cluster| {
        let info = cluster.json(&["cluster", "info"]).expect("asked");
        (info["cluster_id"].clone(), info["brokers"].as_array().map(Vec::len))
    };
    let ((three, brokers), (one, single)) = (of(&cluster), of(&alone));
    assert!(three != one && one.is_string(), "{three} and {one}");
    assert_eq!((brokers, single), (Some(3), Some(1)));
    // Given the others' seeds later, it is told that it belongs elsewhere rather than taken in.
    let seeds: Vec<_> = cluster.brokers().iter().map(|broker| broker.peer().address()).collect();
    alone.broker(1).kill().expect("it runs");
    alone.start_with_seeds(1, &seeds).expect("the binary starts");
    let ended = alone.broker(1).wait_for_end(HANG).expect("it is refused, and ends");
    assert!(!ended.status.success() && ended.messages.contains("cluster"), "{}", ended.messages);
}

#[test]
fn a_broker_that_talks_to_the_client_listener_is_told() {
    let _alone = alone();
    let mut cluster = Setup::new(3).start().expect("three brokers form a cluster");
    let client = cluster.brokers()[0].client().address();
    let mut stray = Setup::new(1).prepare().expect("another folder");
    stray.broker(1).set("node.id=9");
    stray.start_with_seeds(1, &[client]).expect("the binary starts");
    let said = not_ready_because(&mut stray, 1, "client listener");
    assert!(said.contains(&client.to_string()), "{said}");
    for id in cluster.ids() {
        assert!(cluster.broker(id).ready().expect("it runs").is_ok(), "broker {id} is disturbed");
    }
}

#[test]
fn a_broker_that_answers_at_another_ones_address_gets_nothing_of_it() {
    let _alone = alone();
    let (mut cluster, mut workload) = crate::three();
    let (second, third) = (cluster.brokers()[1].peer_listener(), cluster.brokers()[2].peer_listener());
    // Whoever dials broker 3 reaches broker 2 from now on; streams that are there are cut, so that all dial again.
    cluster.broker(3).peer().set_target(second);
    for other in [1, 2] {
        cluster.broker(other).kill().expect("it runs");
        cluster.start(other).expect("the binary starts");
        if other == 2 {
            let second = cluster.brokers()[1].peer_listener();
            cluster.broker(3).peer().set_target(second);
        }
    }
    cluster.wait_ready(1).expect("two are a majority");
    cluster.wait_ready(2).expect("two are a majority");
    workload.goes_on(&cluster).expect("nobody takes one for the other");
    let began = Instant::now();
    while !(1..=2).any(|id| cluster.broker(id).messages().contains("has reached broker 2")) {
        assert!(began.elapsed() < HANG, "nobody says so: {}", cluster.broker(1).last_messages());
        std::thread::sleep(Duration::from_millis(20));
    }
    cluster.broker(3).peer().set_target(third);
    crate::all_is_well(&cluster, workload);
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
