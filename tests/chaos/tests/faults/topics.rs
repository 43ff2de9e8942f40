//! Topics that come and go while brokers do.

use crate::alone;
use flowstone_chaos::{Setup, Workload};

#[test]
fn replicas_than_which_there_are_fewer_brokers_are_refused() {
    let _alone = alone();
    let cluster = Setup::new(3).start().expect("three brokers form a cluster");
    let refused = cluster.ok(&["topic", "create", "wide", "-r", "4"]).expect_err("there are three").to_string();
    assert!(refused.contains('4') && refused.contains('3'), "{refused}");
}

#[test]
fn a_topic_is_deleted_and_made_again_while_a_broker_is_down() {
    let _alone = alone();
    let mut cluster = Setup::new(3).start().expect("three brokers form a cluster");
    let mut before = Workload::start(&cluster, "again", 3, &[]).expect("records in, records out");
    cluster.broker(3).kill().expect("it runs");
    before.goes_on(&cluster).expect("two are a majority");
    drop(before);
    cluster.ok(&["topic", "delete", "again", "--yes"]).expect("deleted while a broker is down");
    let after = Workload::start(&cluster, "again", 3, &[]).expect("made again, and nothing of the old is in it");
    cluster.start_all().expect("it comes back, and deletes what is deleted");
    crate::all_is_well(&cluster, after);
}

#[test]
fn a_topic_is_deleted_while_it_is_written() {
    let _alone = alone();
    let cluster = Setup::new(3).start().expect("three brokers form a cluster");
    for round in 0..3 {
        cluster.ok(&["topic", "create", "short-lived", "-p", "3", "-r", "3"]).expect("a topic, again");
        let arguments = ["bench", "produce", "--topic", "short-lived", "--records", "100000000", "--rate", "2000"];
        let mut produce = cluster.command(&arguments).spawn().expect("it starts");
        cluster.eventually(&["consume", "short-lived", "-n", "100", "--timeout", "5s"]).expect("it is written");
        cluster.ok(&["topic", "delete", "short-lived", "--yes"]).expect("deleted while it is written");
        let status = produce.wait().expect("our child");
        // The topic is unknown, and stays so.
        assert!(!status.success(), "round {round}");
        let listed = cluster.ok(&["topic", "list", "-o", "name"]).expect("asked");
        assert!(!listed.contains("short-lived"), "{listed}");
        cluster.wait_healthy().expect("nothing of it is left to be healed");
    }
}
