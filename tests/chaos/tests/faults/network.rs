//! Brokers that do not reach each other, or late.

use crate::{all_is_well, alone, three};
use flowstone_chaos::{Link, Node, Setup, Workload, flowstone_binary};
use std::time::Duration;

#[test]
fn a_leader_that_only_clients_reach_acknowledges_nothing() {
    let _alone = alone();
    let (cluster, mut workload) = three();
    let leader = cluster.leader("checked", 0).expect("asked").expect("a leader");
    cluster.isolate(leader);
    cluster.wait_leader("checked", 0, Some(leader)).expect("the others elect one of them");
    workload.goes_on(&cluster).expect("two are a majority");
    cluster.network().heal();
    all_is_well(&cluster, workload);
}

#[test]
fn one_direction_is_cut_and_nothing_wedges() {
    let _alone = alone();
    for mute in [true, false] {
        let (cluster, mut workload) = three();
        let leader = cluster.leader("checked", 0).expect("asked").expect("a leader");
        for other in cluster.ids().into_iter().filter(|id| *id != leader) {
            let (leader, other) = (Node::Broker(leader), Node::Broker(other));
            let (from, to) = if mute { (leader, other) } else { (other, leader) };
            cluster.network().cut_one_way(from, to);
        }
        workload.goes_on(&cluster).expect("the others go on");
        cluster.network().heal();
        all_is_well(&cluster, workload);
    }
}

#[test]
fn one_broker_is_the_bridge_between_two() {
    let _alone = alone();
    let (cluster, mut workload) = three();
    let leader = cluster.leader("checked", 0).expect("asked").expect("a leader");
    let others: Vec<i32> = cluster.ids().into_iter().filter(|id| *id != leader).collect();
    // The leader and one of the others do not reach each other; the third reaches both.
    cluster.network().cut(Node::Broker(leader), Node::Broker(others[0]));
    workload.goes_on(&cluster).expect("there is a majority");
    cluster.network().heal();
    all_is_well(&cluster, workload);
}

#[test]
fn clients_do_not_reach_a_leader_that_others_reach() {
    let _alone = alone();
    let (mut cluster, workload) = three();
    let leader = cluster.leader("checked", 0).expect("asked").expect("a leader");
    cluster.network().cut(Node::Broker(leader), Node::Clients);
    // The others have no reason to replace it, and whoever asks one of them is answered.
    let address = cluster.broker(leader).client().address().to_string();
    let mut command = std::process::Command::new(flowstone_binary().expect("the binary"));
    let command = command.args(["cluster", "info", "--timeout", "1s", "--server", &address]);
    assert_eq!(command.output().expect("it runs").status.code(), Some(4));
    cluster.ok(&["cluster", "info"]).expect("the others answer");
    cluster.network().heal();
    all_is_well(&cluster, workload);
}

#[test]
fn delay_and_loss_are_only_slow() {
    let _alone = alone();
    let (cluster, mut workload) = three();
    for one in cluster.ids() {
        for other in cluster.ids() {
            let link = Link { delay: Duration::from_millis(20), loss: 0.02, ..Link::default() };
            cluster.network().set(Node::Broker(one), Node::Broker(other), link);
        }
    }
    workload.goes_on(&cluster).expect("it goes on");
    cluster.network().heal();
    all_is_well(&cluster, workload);
}

#[test]
fn of_five_the_larger_half_goes_on_and_so_does_a_ring() {
    let _alone = alone();
    let cluster = Setup::new(5).start().expect("five brokers form a cluster");
    cluster.ok(&["topic", "create", "checked", "-p", "1", "-r", "5"]).expect("a topic on all of them");
    let mut workload = Workload::start(&cluster, "checked", 1, &[]).expect("records in, records out");
    let leader = cluster.leader("checked", 0).expect("asked").expect("a leader");
    let others: Vec<i32> = cluster.ids().into_iter().filter(|id| *id != leader).collect();
    // The leader and one more on one side, three on the other.
    for one in [leader, others[0]] {
        for other in &others[1..] {
            cluster.network().cut(Node::Broker(one), Node::Broker(*other));
        }
    }
    workload.goes_on(&cluster).expect("three of five are a majority");
    cluster.network().heal();
    cluster.wait_healthy().expect("it heals");
    // A ring: each reaches its two neighbours, which are a majority with it, and nobody reaches all.
    let ids = cluster.ids();
    for (at, id) in ids.iter().enumerate() {
        for step in [2, 3] {
            cluster.network().cut_one_way(Node::Broker(*id), Node::Broker(ids[(at + step) % ids.len()]));
        }
    }
    workload.goes_on(&cluster).expect("whoever leads has a majority");
    cluster.network().heal();
    all_is_well(&cluster, workload);
}
