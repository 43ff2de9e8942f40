//! A cluster under faults, while `flowstone verify` writes, reads and judges.

use crate::cluster::{Cluster, Setup, wait_for};
use crate::disk::{flip_byte, sealed_segments};
use crate::failure::{Failure, Outcome};
use crate::network::{Link, Node};
use crate::schedule::{Fault, FaultKind, Schedule};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

/// How long a cluster may take to heal when all is over.
const HEAL: Duration = Duration::from_secs(60);
/// How long it may take besides to read everything once more and to judge.
const JUDGE: Duration = Duration::from_secs(180);
/// What a slow link adds, each way.
const DELAY: Duration = Duration::from_millis(100);
/// How long SIGTERM may take.
const TERMINATE: Duration = Duration::from_secs(30);

/// What is done to what.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long the workload and the faults last.
    pub length: Duration,
    /// Of the schedule.
    pub seed: u64,
    /// Brokers.
    pub brokers: i32,
    /// Faults to choose from.
    pub kinds: Vec<FaultKind>,
    /// Partitions of the topic.
    pub partitions: u32,
    /// Records per second; 0 as fast as it goes.
    pub rate: u32,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// What `verify -o json` printed.
    pub verdict: Value,
    /// Faults that were put in, by kind.
    pub faults: BTreeMap<FaultKind, u32>,
    /// Records sent per second of the workload.
    pub operations_per_second: f64,
    /// What else went wrong: a broker that did not come back, say.
    pub failures: Vec<String>,
    /// Where the brokers' files are kept; only where something went wrong.
    pub kept: Option<PathBuf>,
}

impl Report {
    /// Whether nothing went wrong.
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty() && self.verdict["anomalies"].as_array().is_some_and(Vec::is_empty)
    }
}

/// Runs it. `tell` is told each fault as it happens.
///
/// # Errors
/// The cluster does not start, or the workload cannot be run.
pub fn run(settings: &Settings, tell: &mut dyn FnMut(Duration, &str)) -> Outcome<Report> {
    let mut cluster = Setup::new(settings.brokers).start()?;
    let began = Instant::now();
    let length = format!("{}ms", settings.length.as_millis());
    let (partitions, rate) = (settings.partitions.to_string(), settings.rate.to_string());
    let heal = format!("{}s", HEAL.as_secs());
    let arguments = [
        // Small segments, so that there are sealed ones to damage.
        ["verify", "-o", "json", "--keep", "-c", "segment.bytes=2097152"].as_slice(),
        &["--for", &length, "--partitions", &partitions, "--rate", &rate, "--heal", &heal],
    ]
    .concat();
    let mut verify = cluster.command(&arguments).spawn().map_err(Failure::of("flowstone verify"))?;
    let schedule = Schedule::new(settings.seed, settings.length, &cluster.ids(), &settings.kinds);
    let mut report = Report {
        verdict: Value::Null,
        faults: BTreeMap::new(),
        operations_per_second: 0.0,
        failures: Vec::new(),
        kept: None,
    };
    for step in schedule.steps {
        thread::sleep(step.at.saturating_sub(began.elapsed()));
        if matches!(verify.try_wait(), Ok(Some(_))) {
            tell(began.elapsed(), "the workload has ended early");
            break;
        }
        if step.fault.kind.takes_a_copy() && cluster.ok(&["cluster", "health"]).is_err() {
            tell(began.elapsed(), &format!("{} left out: not healed yet", step.fault));
            continue;
        }
        tell(began.elapsed(), &format!("{} for {:?}", step.fault, step.lasts));
        let done = inject(&mut cluster, step.fault, settings.seed).and_then(|()| {
            thread::sleep(step.lasts);
            heal_all(&mut cluster)
        });
        *report.faults.entry(step.fault.kind).or_default() += 1;
        if let Err(failure) = done {
            tell(began.elapsed(), &failure.to_string());
            report.failures.push(format!("{}: {failure}", step.fault));
        }
    }
    if let Err(failure) = heal_all(&mut cluster) {
        report.failures.push(failure.to_string());
    }
    tell(began.elapsed(), "no more faults");
    let patience = settings.length.saturating_sub(began.elapsed()) + HEAL + JUDGE;
    let output = wait_for(verify, patience, "flowstone verify")?;
    report.verdict = serde_json::from_slice(&output.stdout).map_err(|_| {
        Failure::new(format!("flowstone verify: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
    })?;
    let operations = report.verdict["operations"].as_f64().unwrap_or_default();
    report.operations_per_second = operations / settings.length.as_secs_f64();
    if !report.is_clean() {
        report.kept = Some(cluster.keep());
    }
    Ok(report)
}

/// Puts a fault in.
///
/// # Errors
/// It could not be.
fn inject(cluster: &mut Cluster, fault: Fault, seed: u64) -> Outcome {
    let Fault { kind, broker } = fault;
    let others: Vec<i32> = cluster.ids().into_iter().filter(|id| *id != broker).collect();
    let me = Node::Broker(broker);
    match kind {
        FaultKind::Kill => cluster.broker(broker).kill()?,
        FaultKind::Pause => cluster.broker(broker).pause()?,
        FaultKind::Isolate => cluster.isolate(broker),
        FaultKind::Mute => others.iter().for_each(|other| cluster.network().cut_one_way(me, Node::Broker(*other))),
        FaultKind::Deaf => others.iter().for_each(|other| cluster.network().cut_one_way(Node::Broker(*other), me)),
        FaultKind::Bridge => {
            for (index, one) in others.iter().enumerate() {
                for other in &others[index + 1..] {
                    cluster.network().cut(Node::Broker(*one), Node::Broker(*other));
                }
            }
        }
        FaultKind::Clients => cluster.network().cut(me, Node::Clients),
        FaultKind::Delay => slow(cluster, me, Link { delay: DELAY, ..Link::default() }),
        FaultKind::Loss => slow(cluster, me, Link { loss: 0.1, ..Link::default() }),
        FaultKind::Restart => {
            let status = cluster.broker(broker).terminate(TERMINATE)?;
            if !status.success() {
                return Err(Failure::new(format!("broker {broker} ended with {status} when it was asked to stop")));
            }
        }
        FaultKind::KillAll => {
            for id in cluster.ids() {
                cluster.broker(id).kill()?;
            }
        }
        FaultKind::Wipe => {
            cluster.broker(broker).kill()?;
            cluster.broker(broker).wipe()?;
        }
        FaultKind::Rot => {
            let sealed = sealed_segments(cluster.broker(broker).data_dir())?;
            // None yet is no failure: the run is young.
            if let Some(segment) = sealed.get(seed as usize % sealed.len().max(1)) {
                flip_byte(segment)?;
            }
        }
    }
    Ok(())
}

fn slow(cluster: &Cluster, node: Node, link: Link) {
    for other in cluster.ids().into_iter().map(Node::Broker).chain([Node::Clients]) {
        if other != node {
            cluster.network().set(node, other, link);
            cluster.network().set(other, node, link);
        }
    }
}

fn heal_all(cluster: &mut Cluster) -> Outcome {
    cluster.network().heal();
    cluster.start_all()
}
