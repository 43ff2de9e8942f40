//! What real processes do when they are killed, paused, cut off, wiped, damaged or misconfigured: each row of the promises'
//! table of faults that needs processes.

mod disks;
mod joining;
mod namespaces;
mod network;
mod operations;
mod processes;
mod table;
mod topics;

use flowstone_chaos::{Cluster, Setup, Workload};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One cluster at a time: three daemons and a workload are enough for any machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Three brokers, and a workload on three partitions.
fn three() -> (Cluster, Workload) {
    let cluster = Setup::new(3).start().expect("three brokers form a cluster");
    let workload = Workload::start(&cluster, "checked", 3, &[]).expect("records in, records out");
    (cluster, workload)
}

/// The workload goes on, and in the end nothing is wrong.
fn all_is_well(cluster: &Cluster, mut workload: Workload) {
    workload.goes_on(cluster).expect("it takes records again");
    cluster.wait_healthy().expect("it heals");
    workload.finish().expect("no anomaly");
}
