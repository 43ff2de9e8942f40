//! A cluster that grows and shrinks under load.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::Cluster;
use crate::running::{Folder, Programs, field};
use crate::{Cli, Failure};

/// Records per second of 128 B and more that are written, read and judged meanwhile.
const RATE: &str = "2000";
/// Rounds of rebalancing: each moves a few partitions at a time until nothing is left to move.
const ROUNDS_MAX: usize = 20;
/// Far beyond what joining takes.
const JOIN_MAX: Duration = Duration::from_secs(120);
/// Far beyond what any of the commands takes.
const COMMAND: &str = "1800s";

/// A fourth broker joins, partitions move to it, the first one is drained, decommissioned and stopped: how long, how many
/// bytes, and what a client that wrote and read all the time saw.
pub(crate) fn grow(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let mut cluster = Cluster::start(programs, folder, "grow")?;
    let records = (cli.megabytes * 1_000).to_string();
    cluster.flowstone(&["topic", "create", "held", "-p", "12", "-r", "3"])?;
    cluster.flowstone(&["bench", "produce", "--topic", "held", "--records", &records, "--size", "1000"])?;
    let arguments = ["verify", "--for", "2h", "--rate", RATE, "--topic", "checked", "--partitions", "12"];
    let mut workload = Workload(cluster.command(&arguments).stdout(Stdio::piped()).spawn()?);
    cluster.healthy()?;

    let began = Instant::now();
    let fourth = cluster.add(programs)?;
    while cluster.flowstone(&["cluster", "info"])?["brokers"].as_array().map_or(0, Vec::len) < fourth {
        if began.elapsed() > JOIN_MAX {
            return Err("the fourth broker does not join: start four brokers by hand to see why".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    cluster.healthy()?;
    let joined = began.elapsed();
    let mut moves = 0;
    for _ in 0..ROUNDS_MAX {
        let plan = cluster.flowstone(&["partition", "rebalance", "--dry-run"])?;
        let planned = plan["moves"].as_array().map_or(0, Vec::len);
        if planned == 0 {
            break;
        }
        moves += planned;
        cluster.flowstone_within(COMMAND, &["partition", "rebalance", "--yes"])?;
    }
    cluster.healthy()?;
    let (rebalanced, copied) = (began.elapsed(), pulled(&cluster, fourth)?);
    cluster.flowstone_within(COMMAND, &["broker-admin", "drain", "1", "--yes"])?;
    let drained = began.elapsed();
    cluster.flowstone_within(COMMAND, &["broker-admin", "decommission", "1", "--yes"])?;
    cluster.stop_one(1)?;
    let (gone, all_copied) = (began.elapsed(), pulled(&cluster, fourth)?);
    let verdict = workload.finish()?;
    cluster.stop()?;
    let seconds = Duration::as_secs_f64;
    let count = |name: &str| field(&verdict, name).map(|count| count as u64);
    Ok(vec![
        format!("{} MB in 12 partitions of three replicas", cli.megabytes),
        format!("the fourth broker has joined after {:.1} s", seconds(&joined)),
        format!("{moves} moves to even out: {:.1} s, {:.0} MB copied", seconds(&(rebalanced - joined)), copied / 1e6),
        format!(
            "the first one drained: {:.1} s, {:.0} MB copied",
            seconds(&(drained - rebalanced)),
            (all_copied - copied) / 1e6
        ),
        format!("decommissioned and stopped: {:.1} s", seconds(&(gone - drained))),
        format!(
            "clients: {} acknowledged, {} failed, {} unknown, {} anomalies, longest gap {} ms",
            count("acknowledged")?,
            count("failed")?,
            count("unknown")?,
            verdict["anomalies"].as_array().map_or(0, Vec::len),
            count("longest_gap_ms")?
        ),
    ])
}

/// Bytes that the brokers but the first, which is to go, have pulled from others.
fn pulled(cluster: &Cluster, brokers: usize) -> Result<f64, Failure> {
    (2..=brokers).map(|broker| cluster.metric(broker, "flowstone_pulled_bytes_total")).sum()
}

/// A workload that is checked; killed when dropped.
struct Workload(Child);

impl Workload {
    /// Ends it, and lets it judge.
    fn finish(&mut self) -> Result<Value, Failure> {
        // SIGINT by the shell's own kill: the standard library only knows SIGKILL.
        Command::new("kill").args(["-INT", &self.0.id().to_string()]).status()?;
        let stdout = self.0.stdout.take().ok_or("the workload has ended before")?;
        let verdict = serde_json::from_reader(stdout)?;
        self.0.wait()?;
        Ok(verdict)
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}
