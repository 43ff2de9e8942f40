//! `flowstone verify` against a cluster, for as long as a test needs it.

use crate::broker::LOOK_INTERVAL;
use crate::cluster::{Cluster, HANG, wait_for};
use crate::failure::{Failure, Outcome};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::process::Child;
use std::thread;
use std::time::Instant;

/// A workload that goes on until it is finished; killed when dropped.
#[derive(Debug)]
pub struct Workload {
    topic: String,
    partitions: usize,
    child: Option<Child>,
}

impl Workload {
    /// Starts writing and reading a topic, which is made where it is missing, and waits until every partition takes
    /// records.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn start(cluster: &Cluster, topic: &str, partitions: usize, more: &[&str]) -> Outcome<Workload> {
        let count = partitions.to_string();
        let arguments =
            ["verify", "--for", "1h", "--rate", "1000", "-o", "json", "--topic", topic, "--partitions", &count];
        let child = cluster.command(&[&arguments, more].concat()).spawn().map_err(Failure::of("flowstone verify"))?;
        let mut workload = Workload { topic: topic.to_owned(), partitions, child: Some(child) };
        workload.goes_on(cluster)?;
        Ok(workload)
    }

    /// Where each partition ends now, as far as any broker knows: one that is cut off from a leader knows less.
    fn ends(&self, cluster: &Cluster) -> Vec<i64> {
        let mut ends = vec![0; self.partitions];
        for broker in cluster.brokers() {
            let described = cluster.json_of(broker, &["topic", "describe", &self.topic]).unwrap_or_default();
            for (partition, end) in ends.iter_mut().enumerate() {
                let told = described["partitions"][partition]["high_watermark"].as_i64();
                *end = told.unwrap_or(0).max(*end);
            }
        }
        ends
    }

    /// Waits until every partition has taken some more records.
    ///
    /// # Errors
    /// One takes none for [`HANG`], or the workload has ended.
    pub fn goes_on(&mut self, cluster: &Cluster) -> Outcome {
        self.goes_on_in(cluster, self.partitions)
    }

    /// Waits until so many partitions have taken some more records.
    ///
    /// # Errors
    /// Fewer do for [`HANG`], or the workload has ended.
    pub fn goes_on_in(&mut self, cluster: &Cluster, partitions: usize) -> Outcome {
        let began = Instant::now();
        let before = self.ends(cluster);
        loop {
            let now = self.ends(cluster);
            if before.iter().zip(&now).filter(|(before, now)| **now >= *before + 20).count() >= partitions {
                return Ok(());
            }
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                return Err(Failure::new(format!("flowstone verify ended early with {status}: {}", self.output()?)));
            }
            if began.elapsed() > HANG {
                return Err(Failure::new(format!("{} takes no records: {before:?}, then {now:?}", self.topic)));
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Ends it, and lets it judge: the verdict, which names no anomaly and some records.
    ///
    /// # Errors
    /// It found an anomaly, or nothing to judge.
    pub fn finish(mut self) -> Outcome<Value> {
        if let Some(child) = &self.child {
            kill_process(Pid::from_child(child), Signal::INT).map_err(Failure::of("flowstone verify"))?;
        }
        let text = self.output()?;
        let verdict: Value =
            serde_json::from_str(&text).map_err(|_| Failure::new(format!("flowstone verify: {text}")))?;
        let clean = verdict["anomalies"].as_array().is_some_and(Vec::is_empty);
        if clean && verdict["acknowledged"].as_u64() > Some(0) { Ok(verdict) } else { Err(Failure::new(text)) }
    }

    /// What it printed, once it has ended; what it said, where it printed nothing.
    fn output(&mut self) -> Outcome<String> {
        let child = self.child.take().ok_or_else(|| Failure::new("flowstone verify has ended before"))?;
        let output = wait_for(child, HANG * 2, "flowstone verify")?;
        let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = (child.kill(), child.wait());
        }
    }
}
