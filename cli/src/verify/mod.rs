//! `flowstone verify`: a workload against a live cluster, and a checker that judges what its clients saw.

mod ending;
mod members;
mod producing;
mod reading;
mod workers;

use crate::args::{Common, key_value};
use crate::broker::StopSignals;
use crate::connect::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::moment;
use crate::output::{self, Format, Shown};
use crate::stdio::say;
use clap::{Args, ValueEnum};
use flowstone_checker::{Anomaly, History, LogId, Offset, Verdict, payload};
use flowstone_client::{Admin, Client, ErrorCode, NewTopic, OffsetSpec, TopicDescription};
use indicatif::ProgressBar;
use serde::Serialize;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Check a live cluster: write and read for a while, and find what a log that keeps its promises cannot have done.
///
/// Several idempotent producers write every partition; readers follow the end, others read again from anywhere; the ends
/// are asked for all the while. With --workload group or transaction a consumer group reads along, whose members come, go
/// and die; with transaction they write what they read on to a second topic, exactly once. Then it waits until every partition takes a record again, reads everything once more, and
/// judges. Exit code 0 only without an anomaly. Kill, pause and cut off brokers while it runs. Ctrl-C ends the workload
/// early and judges what there is; a second one judges at once.
#[derive(Args, Debug)]
pub(crate) struct VerifyArgs {
    /// How long the workload runs
    #[arg(long = "for", value_name = "SPAN", default_value = "60s", value_parser = moment::parse_span)]
    duration: Duration,

    /// What is done
    #[arg(long, value_enum, default_value_t)]
    workload: Workload,

    /// The topic, made where it is missing; without it a temporary one, removed at the end
    #[arg(long)]
    topic: Option<String>,

    /// Leaves the temporary topic there
    #[arg(long, conflicts_with = "topic")]
    keep: bool,

    /// Partitions of a topic that is made
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=1000))]
    partitions: i32,

    /// A key of the configuration of a topic that is made, as in flowstone.flush=relaxed
    #[arg(short, long = "config", value_name = "KEY=VALUE", value_parser = key_value)]
    config: Vec<(String, String)>,

    /// Producers, each with a connection of its own
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    producers: u16,

    /// Bytes of a record's value
    #[arg(long, value_name = "BYTES", default_value_t = 128, value_parser = clap::value_parser!(u32).range(..=1 << 20))]
    size: u32,

    /// Records per second, in all; 0 as fast as it goes. What is remembered of each takes some 60 bytes
    #[arg(long, value_name = "RECORDS/S", default_value_t = 5_000)]
    rate: u32,

    /// How long the cluster may take to heal once the workload has ended
    #[arg(long, value_name = "SPAN", default_value = "60s", value_parser = moment::parse_span)]
    heal: Duration,
}

/// The value of `--workload`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// Records in, records out
    #[default]
    Log,
    /// As log, and a consumer group reads it whose members come, go and die
    Group,
    /// As group, and its members write what they read on to a second topic, exactly once, in transactions
    Transaction,
}

/// What all of a workload's clients share.
struct Workbench {
    common: Common,
    topic: String,
    /// One partition after the other.
    logs: Vec<Log>,
    /// Records that are not of this run are those of others, rather than phantoms.
    shared_topic: bool,
    value_bytes: usize,
    run: payload::Run,
    began: Instant,
    /// Guards the order of what happened. Never held over an await: whoever holds it writes one line.
    history: Arc<Mutex<History>>,
    /// Records of this run acknowledged, for the progress bar.
    progress: ProgressBar,
}

/// A partition that is written and read.
#[derive(Clone, Copy)]
struct Log {
    id: LogId,
    partition: i32,
    /// Where this run begins.
    base: i64,
}

impl Workbench {
    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    fn log(&self, partition: i32) -> Option<&Log> {
        self.logs.get(usize::try_from(partition).ok()?)
    }
}

/// Told to all clients when the workload is to end.
type Stop = watch::Receiver<bool>;

/// Resolves when the workload is to end.
async fn stopped(stop: &mut Stop) {
    // An error is the end of whoever would tell it.
    let _ = stop.wait_for(|stop| *stop).await;
}

pub(crate) async fn run(args: &VerifyArgs, common: &Common) -> Outcome {
    if !matches!(common.output, Format::Table | Format::Wide | Format::Json | Format::Yaml) {
        return Err(Failure::usage("verify prints -o table, wide, json or yaml"));
    }
    // From here on a signal ends the workload, not the process.
    let mut signals = StopSignals::new()?;
    let client = connect(common).await?;
    let admin = client.admin();
    let (topic, temporary) = topic(&admin, args).await?;
    let outcome = verify(args, common, &client, &topic, &mut signals).await;
    if temporary && !args.keep {
        let removed = admin.delete_topic(&topic.name).await.map_err(Failure::from);
        // What the workload found is what is told first.
        if let (Ok(_), Err(failure)) = (&outcome, removed) {
            let failure = failure.context(format_args!("warning: cannot remove topic {}", topic.name));
            if let Failure::Error { message, .. } = failure {
                say(format_args!("{message}"));
            }
        }
    }
    let verdict = outcome?;
    output::print(common.output, &Report::of(&verdict))?;
    if !verdict.is_clean() {
        let counts: Vec<String> = verdict.counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        return Err(Failure::failed(format!(
            "the cluster broke its promises: {}; keep the brokers' data and logs, and report it",
            counts.join(", ")
        )));
    }
    if verdict.acknowledged == 0 {
        let message =
            "nothing was acknowledged, so nothing was verified; `flowstone cluster info` tells whether it runs";
        return Err(Failure::new(Exit::Unreachable, message));
    }
    Ok(())
}

/// The topic, and whether it is gone at the end.
async fn topic(admin: &Admin, args: &VerifyArgs) -> Outcome<(TopicDescription, bool)> {
    // Retention may not take what is to be read at the end.
    let new = |name: &str| {
        let kept = NewTopic::new(name)
            .partitions(args.partitions)
            .config("retention.ms", "-1")
            .config("retention.bytes", "-1");
        args.config.iter().fold(kept, |topic, (key, value)| topic.config(key, value))
    };
    let Some(name) = &args.topic else {
        let name = format!("verify-{}-{}", moment::now_ms(), std::process::id());
        return Ok((admin.create_topic(new(&name)).await?, true));
    };
    match admin.describe_topic(name).await {
        Ok(topic) => Ok((topic, false)),
        Err(error) if error.code() == ErrorCode::UnknownTopic => Ok((admin.create_topic(new(name)).await?, false)),
        Err(error) => Err(error.into()),
    }
}

async fn verify(
    args: &VerifyArgs,
    common: &Common,
    client: &Client,
    topic: &TopicDescription,
    signals: &mut StopSignals,
) -> Outcome<Verdict> {
    let run = payload::Run(RandomState::new().build_hasher().finish());
    let shared = (run, Instant::now(), Arc::default(), ProgressBar::new_spinner());
    let bench = Arc::new(workbench(args, common, client, topic, shared).await?);
    let (stop_sender, stop) = watch::channel(false);
    let mut group = match args.workload {
        Workload::Log => Beside::Nothing,
        Workload::Group => Beside::Members(members::start(&bench, client).await?),
        Workload::Transaction => Beside::Workers(workers::start(args, &bench, client, topic).await?),
    };
    let mut producers = producing::start(&bench, args, &stop).await?;
    let mut readers = reading::start(&bench, &stop).await?;
    bench.progress.set_message("writing and reading");
    tokio::select! {
        () = tokio::time::sleep(args.duration) => {}
        () = signals.next() => say(format_args!("interrupted; waiting for the cluster to heal, then judging what there is")),
        failure = first_failure(&mut producers, &mut readers) => return Err(failure),
    }
    let _ = stop_sender.send(true);
    let ended = async {
        let ends = ending::wait_and_read_all(&bench, args.heal, &mut producers, &mut readers).await;
        match &mut group {
            Beside::Nothing => {}
            Beside::Members(members) => members.finish(args.heal, &ends).await,
            Beside::Workers(workers) => workers.finish(args.heal, &ends).await,
        }
    };
    tokio::select! {
        () = ended => {}
        () = signals.next() => {
            say(format_args!("interrupted again; judging at once, without a last reading"));
            bench.history().sending_ended(bench.elapsed());
        }
    }
    match group {
        Beside::Nothing => {}
        Beside::Members(members) => members.clean_up(client).await,
        Beside::Workers(workers) => workers.clean_up(client).await,
    }
    bench.progress.set_message("judging");
    let verdict = bench.history().judge();
    bench.progress.finish_and_clear();
    Ok(verdict)
}

/// What runs beside producers and readers.
enum Beside {
    Nothing,
    Members(members::Members),
    Workers(workers::Workers),
}

/// Clients end before they are stopped only where going on makes no sense: the topic was deleted, say.
async fn first_failure(producers: &mut JoinSet<Outcome>, readers: &mut JoinSet<Outcome>) -> Failure {
    loop {
        let ended = tokio::select! {
            Some(ended) = producers.join_next() => ended,
            Some(ended) = readers.join_next() => ended,
        };
        match ended {
            Ok(Err(failure)) => return failure,
            Ok(Ok(())) => {}
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}

async fn workbench(
    args: &VerifyArgs,
    common: &Common,
    client: &Client,
    topic: &TopicDescription,
    (run, began, history, progress): (payload::Run, Instant, Arc<Mutex<History>>, ProgressBar),
) -> Outcome<Workbench> {
    let name = &topic.name;
    let queries: Vec<_> = topic.partitions.iter().map(|p| (name.as_str(), p.partition, OffsetSpec::End)).collect();
    let ends = client.admin().list_offsets_linearizable(&queries).await?;
    let logs = {
        let mut history = history.lock().unwrap_or_else(PoisonError::into_inner);
        let log = |end: flowstone_client::OffsetInfo| Log {
            id: history.log(name, end.partition.into()),
            partition: end.partition,
            base: end.offset,
        };
        ends.into_iter().map(log).collect()
    };
    Ok(Workbench {
        common: common.clone(),
        topic: name.clone(),
        logs,
        shared_topic: args.topic.is_some(),
        value_bytes: args.size as usize,
        run,
        began,
        history,
        progress,
    })
}

/// What `-o json` fixes.
#[derive(Debug, Serialize)]
struct Report {
    operations: u64,
    acknowledged: u64,
    failed: u64,
    unknown: u64,
    longest_gap_ms: u64,
    anomalies: Vec<Found>,
    /// Of a kind that is there often, only the first are told.
    #[serde(skip)]
    anomalies_in_all: u64,
}

#[derive(Debug, Serialize)]
struct Found {
    kind: &'static str,
    topic: String,
    partition: i32,
    offset: Option<i64>,
    detail: String,
}

impl Report {
    fn of(verdict: &Verdict) -> Report {
        let found = |anomaly: &Anomaly| Found {
            kind: anomaly.kind.as_str(),
            topic: anomaly.topic.clone(),
            partition: anomaly.partition.get(),
            offset: anomaly.offset.map(Offset::get),
            detail: anomaly.detail.clone(),
        };
        Report {
            operations: verdict.operations,
            acknowledged: verdict.acknowledged,
            failed: verdict.failed,
            unknown: verdict.unknown,
            longest_gap_ms: u64::try_from(verdict.longest_gap.as_millis()).unwrap_or(u64::MAX),
            anomalies: verdict.anomalies.iter().map(found).collect(),
            anomalies_in_all: verdict.counts.values().sum(),
        }
    }
}

impl output::Row for Found {
    const HEADINGS: &'static [&'static str] = &["ANOMALY", "PARTITION", "OFFSET", "DETAIL"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        let offset = self.offset.map_or_else(|| "-".to_owned(), |offset| offset.to_string());
        vec![self.kind.to_owned(), format!("{}-{}", self.topic, self.partition), offset, self.detail.clone()]
    }

    fn name(&self) -> String {
        self.kind.to_owned()
    }
}

impl Shown for Report {
    fn table(&self, wide: bool) -> String {
        let mut text = output::pairs([
            ("operations", self.operations.to_string()),
            ("acknowledged", self.acknowledged.to_string()),
            ("failed", self.failed.to_string()),
            ("unknown", self.unknown.to_string()),
            ("longest gap", format!("{} ms", self.longest_gap_ms)),
            ("anomalies", self.anomalies_in_all.to_string()),
        ]);
        if !self.anomalies.is_empty() {
            text.push('\n');
            text.push_str(&output::table_of(&self.anomalies, wide));
        }
        text
    }

    fn name(&self) -> String {
        self.anomalies.iter().map(output::Row::name).collect::<Vec<_>>().join("\n")
    }
}
