//! The project's targets, each as a ratio from one run where there is something to compare with: both sides take turns
//! (A B A B ...), and what is printed is the median of the pairs and their spread.
//!
//! It starts `flowstone` and `bare` from its own folder, on loopback, with its files below `--dir`, and ends and removes
//! what it started. Absolute figures say as much about the machine as about the program.

#![forbid(unsafe_code)]

mod cluster;
mod compaction;
mod deliveries;
mod growing;
mod running;

use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use serde_json::Value;

use crate::running::{Broker, Figures, Folder, Programs, field};

type Failure = Box<dyn Error + Send + Sync>;

#[derive(Parser)]
#[command(about = "Measures brokers against the limits of the same machine, in pairs")]
struct Cli {
    /// What to measure; everything without it.
    #[arg(value_enum)]
    targets: Vec<Target>,
    /// Pairs of runs.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Folder on the disk to measure; a new folder is made in it and removed.
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// MB (10^6 bytes) that one run of a throughput target moves.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(10..))]
    megabytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
enum Target {
    /// 1000 B records into 8 partitions, flushed, against the bare loop.
    Durable,
    /// The same into `flowstone.flush=relaxed` topics, against the bare loop without flushes.
    Relaxed,
    /// 100 B records in and out.
    Small,
    /// 1000 B records read back.
    ReadBack,
    /// One record at a time, flushed, against the bare round trip.
    Latency,
    /// Start to ready: empty, and with 1000 partitions after kill -9; memory.
    Start,
    /// 1000 busy partitions, against 8.
    Busy,
    /// Three brokers, three replicas, against one broker.
    Replicated,
    /// 10 000 idle partitions on three brokers: processor and memory.
    Idle,
    /// The leader killed, and leadership handed over: until the next acknowledged write.
    Failover,
    /// A broker comes back to a partition that went on without it, while that serves.
    CatchUp,
    /// A fourth broker takes over from the first one, under load: seconds, bytes, what clients saw.
    Grow,
    /// Three brokers: idempotent and transactional against plain producing, `read_committed` against `read_uncommitted`.
    Deliveries,
    /// Three brokers: commits of transactions, in flushes of the same disk, and commits of offsets.
    Commits,
    /// Three brokers: a group of 100 members and 1000 partitions that one leaves.
    Rebalance,
    /// 10 M records over 1 M keys are compacted, without a broker: MB/s, memory, reads meanwhile.
    Compaction,
}

const ALL: [Target; 16] = [
    Target::Durable,
    Target::Relaxed,
    Target::Small,
    Target::ReadBack,
    Target::Latency,
    Target::Start,
    Target::Busy,
    Target::Replicated,
    Target::Idle,
    Target::Failover,
    Target::CatchUp,
    Target::Grow,
    Target::Deliveries,
    Target::Commits,
    Target::Rebalance,
    Target::Compaction,
];
/// Records of the latency target, after those that warm up.
const ROUND_TRIPS: u64 = 5_000;
const START_PARTITIONS: u32 = 1_000;

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "targets: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    let targets = if cli.targets.is_empty() { &ALL[..] } else { &cli.targets };
    let folder = Folder::new(&cli.dir)?;
    let programs = Programs::beside_this_one()?;
    for &target in targets {
        let lines = match target {
            Target::Durable => ingest(cli, &programs, &folder, true)?,
            Target::Relaxed => ingest(cli, &programs, &folder, false)?,
            Target::Small => small(cli, &programs, &folder)?,
            Target::ReadBack => read_back(cli, &programs, &folder)?,
            Target::Latency => latency(cli, &programs, &folder)?,
            Target::Start => start(cli, &programs, &folder)?,
            Target::Busy => busy(cli, &programs, &folder)?,
            Target::Replicated => cluster::replicated(cli, &programs, &folder)?,
            Target::Idle => cluster::idle(&programs, &folder)?,
            Target::Failover => cluster::failover(cli, &programs, &folder)?,
            Target::CatchUp => cluster::catch_up(cli, &programs, &folder)?,
            Target::Grow => growing::grow(cli, &programs, &folder)?,
            Target::Deliveries => deliveries::deliveries(cli, &programs, &folder)?,
            Target::Commits => deliveries::commits(&programs, &folder)?,
            Target::Rebalance => deliveries::rebalance(cli, &programs, &folder)?,
            Target::Compaction => compaction::compaction(&folder.0.join("compaction"))?,
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{target:?}, {} pairs", cli.pairs)?;
        for line in lines {
            writeln!(out, "  {line}")?;
        }
    }
    Ok(())
}

fn ingest(cli: &Cli, programs: &Programs, folder: &Folder, flushed: bool) -> Result<Vec<String>, Failure> {
    let broker = Broker::start(programs, &folder.0.join("ingest"))?;
    let flush = if flushed { "quorum" } else { "relaxed" };
    let (mut bare, mut ours, mut ratio) = (Figures::default(), Figures::default(), Figures::default());
    for _ in 0..cli.pairs {
        let mib = ((cli.megabytes * 1_000_000) >> 20).to_string();
        let folder = folder.0.display().to_string();
        let mut args = vec!["ingest", "--mib", &mib, "--dir", &folder, "-o", "json"];
        if !flushed {
            args.push("--no-flush");
        }
        let limit = field(&programs.bare(&args)?, "mb_per_second")?;
        let got = field(&broker.bench("produce", 1000, cli.megabytes, 8, flush)?, "mb_per_second")?;
        bare.push(limit);
        ours.push(got);
        ratio.push(got / limit);
    }
    broker.stop()?;
    Ok(vec![bare.line("bare, MB/s"), ours.line("broker, MB/s"), ratio.line("broker / bare")])
}

fn small(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let broker = Broker::start(programs, &folder.0.join("small"))?;
    let (mut written, mut read) = (Figures::default(), Figures::default());
    for pair in 0..cli.pairs {
        let topic = format!("small-{pair}");
        let records = (cli.megabytes * 10_000).to_string();
        let args = ["--topic", &topic, "--partitions", "8", "--size", "100", "--records", &records];
        written
            .push(field(&broker.flowstone(&[&["bench", "produce"], &args[..]].concat())?, "records_per_second")? / 1e6);
        read.push(field(&broker.flowstone(&[&["bench", "consume"], &args[..]].concat())?, "records_per_second")? / 1e6);
        broker.delete(&topic)?;
    }
    broker.stop()?;
    Ok(vec![written.line("100 B in, M records/s"), read.line("100 B out, M records/s")])
}

fn read_back(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let broker = Broker::start(programs, &folder.0.join("read"))?;
    let records = (cli.megabytes * 1_000).to_string();
    let args = ["--topic", "back", "--partitions", "8", "--size", "1000", "--records", &records];
    broker.flowstone(&[&["bench", "produce"], &args[..]].concat())?;
    let mut read = Figures::default();
    for _ in 0..cli.pairs {
        read.push(field(&broker.flowstone(&[&["bench", "consume"], &args[..]].concat())?, "mb_per_second")?);
    }
    broker.stop()?;
    Ok(vec![read.line("1000 B out, MB/s")])
}

fn latency(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let broker = Broker::start(programs, &folder.0.join("latency"))?;
    let mut figures: [Figures; 6] = Default::default();
    for _ in 0..cli.pairs {
        let round_trips = ROUND_TRIPS.to_string();
        let dir = folder.0.display().to_string();
        let bare = programs.bare(&["pingpong", "--round-trips", &round_trips, "--dir", &dir, "-o", "json"])?;
        let ours =
            broker.flowstone(&["bench", "produce", "--records", &round_trips, "--size", "1000", "--in-flight", "1"])?;
        let micros = |latency: &Value, name: &str, per: f64| field(latency, name).map(|value| value * per);
        let (ours, bare) = (&ours["latency_ms"], &bare["latency_us"]);
        let of = [
            micros(bare, "p50", 1.0)?,
            micros(ours, "p50", 1e3)?,
            micros(bare, "p99", 1.0)?,
            micros(ours, "p99", 1e3)?,
        ];
        for (figures, value) in figures.iter_mut().zip(of.into_iter().chain([of[1] / of[0], of[3] / of[2]])) {
            figures.push(value);
        }
    }
    broker.stop()?;
    let names = ["bare p50, us", "broker p50, us", "bare p99, us", "broker p99, us", "p50 ratio", "p99 ratio"];
    Ok(names.iter().zip(&figures).map(|(name, figures)| figures.line(name)).collect())
}

fn start(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let (mut empty, mut idle, mut full, mut resident) =
        (Figures::default(), Figures::default(), Figures::default(), Figures::default());
    for pair in 0..cli.pairs {
        let broker = Broker::start(programs, &folder.0.join(format!("empty-{pair}")))?;
        empty.push(broker.ready_after.as_secs_f64() * 1e3);
        idle.push(broker.resident_mib()?);
        broker.stop()?;
    }
    let data = folder.0.join("thousand");
    let partitions = START_PARTITIONS.to_string();
    let mut broker = Broker::start(programs, &data)?;
    broker.flowstone(&["topic", "create", "thousand", "-p", &partitions])?;
    for _ in 0..cli.pairs {
        let records = (START_PARTITIONS * 100).to_string();
        // Batches of one record reach every partition: a producer without keys goes on to the next with each batch.
        broker.flowstone(&[
            "bench",
            "produce",
            "--topic",
            "thousand",
            "--records",
            &records,
            "--size",
            "100",
            "--batch-bytes",
            "1",
        ])?;
        broker.kill()?;
        broker = Broker::start(programs, &data)?;
        full.push(broker.ready_after.as_secs_f64() * 1e3);
        resident.push(broker.resident_mib()?);
    }
    broker.stop()?;
    Ok(vec![
        empty.line("empty: start to ready, ms"),
        idle.line("empty: resident, MiB"),
        full.line("1000 partitions after kill -9: start to ready, ms"),
        resident.line("1000 partitions: resident, MiB"),
    ])
}

fn busy(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let broker = Broker::start(programs, &folder.0.join("busy"))?;
    let (mut few, mut many, mut ratio) = (Figures::default(), Figures::default(), Figures::default());
    for _ in 0..cli.pairs {
        let base = field(&broker.bench("produce", 1000, cli.megabytes, 8, "quorum")?, "mb_per_second")?;
        let got = field(&broker.bench("produce", 1000, cli.megabytes, 1000, "quorum")?, "mb_per_second")?;
        few.push(base);
        many.push(got);
        ratio.push(got / base);
    }
    broker.stop()?;
    Ok(vec![few.line("8 partitions, MB/s"), many.line("1000 partitions, MB/s"), ratio.line("1000 / 8")])
}
