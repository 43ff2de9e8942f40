//! The project's targets for one broker, each as a ratio from one run: the bare limit and the broker take turns
//! (A B A B ...), and what is printed is the median of the pairs and their spread.
//!
//! It starts `flowstone dev` and `bare` from its own folder, on loopback, with its files below `--dir`, and ends and
//! removes what it started. Absolute figures say as much about the machine as about the program.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use serde_json::Value;

type Failure = Box<dyn Error + Send + Sync>;

#[derive(Parser)]
#[command(about = "Measures one broker against the bare limits of the same machine, in pairs")]
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
}

const ALL: [Target; 6] =
    [Target::Durable, Target::Relaxed, Target::Small, Target::ReadBack, Target::Latency, Target::Start];
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

/// What several runs came to.
#[derive(Default)]
struct Figures(Vec<f64>);

impl Figures {
    fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    fn line(&self, name: &str) -> String {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
        format!("{name:<50} {median:>10.2}   ({:.2} to {:.2})", sorted[0], sorted[sorted.len() - 1])
    }
}

fn field(value: &Value, name: &str) -> Result<f64, Failure> {
    value[name].as_f64().ok_or_else(|| format!("no number {name} in {value}").into())
}

struct Programs {
    folder: PathBuf,
}

impl Programs {
    fn beside_this_one() -> Result<Self, Failure> {
        let folder = std::env::current_exe()?.parent().ok_or("this program lies in no folder")?.to_owned();
        for name in ["flowstone", "bare"] {
            if !folder.join(name).is_file() {
                return Err(format!(
                    "{} is missing: run cargo build --release -p flowstone-cli -p flowstone-tests",
                    folder.join(name).display()
                )
                .into());
            }
        }
        Ok(Self { folder })
    }

    fn bare(&self, args: &[&str]) -> Result<Value, Failure> {
        json(Command::new(self.folder.join("bare")).args(args))
    }
}

fn json(command: &mut Command) -> Result<Value, Failure> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("{command:?} ended with {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
}

/// A broker of this run: killed when dropped, should the run end early.
struct Broker {
    child: Child,
    flowstone: PathBuf,
    server: String,
    ready_after: Duration,
}

impl Broker {
    fn start(programs: &Programs, data: &Path) -> Result<Self, Failure> {
        let flowstone = programs.folder.join("flowstone");
        let port = free_ports()?;
        let from = Instant::now();
        let mut child = Command::new(&flowstone)
            .args(["dev", "--port", &port.to_string(), "--data-dir"])
            .arg(data)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdout = child.stdout.take().ok_or("the broker has no output")?;
        let server = format!("127.0.0.1:{port}");
        let mut broker = Self { child, flowstone, server, ready_after: Duration::ZERO };
        let mut lines = BufReader::new(stdout);
        let mut line = String::new();
        while !line.contains("is ready") {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                return Err("the broker ended before it was ready: start flowstone dev by hand to see why".into());
            }
        }
        broker.ready_after = from.elapsed();
        // The rest of what it prints is read away, so that it never waits for us.
        std::thread::spawn(move || io::copy(&mut lines, &mut io::sink()));
        Ok(broker)
    }

    fn flowstone(&self, args: &[&str]) -> Result<Value, Failure> {
        json(Command::new(&self.flowstone).args(args).args([
            "--server",
            &self.server,
            "--timeout",
            "60s",
            "-o",
            "json",
        ]))
    }

    /// One run of `flowstone bench` into a topic of its own, removed afterwards.
    fn bench(&self, what: &str, size: u64, megabytes: u64, partitions: u32, flush: &str) -> Result<Value, Failure> {
        let records = (megabytes * 1_000_000 / size).to_string();
        let config = format!("flowstone.flush={flush}");
        self.flowstone(&[
            "bench",
            what,
            "--records",
            &records,
            "--size",
            &size.to_string(),
            "--partitions",
            &partitions.to_string(),
            "-c",
            &config,
        ])
    }

    fn delete(&self, topic: &str) -> Result<(), Failure> {
        self.flowstone(&["topic", "delete", topic, "--yes"]).map(drop)
    }

    /// Memory of its own: what maps of files show of the page cache is not counted.
    fn resident_mib(&self) -> Result<f64, Failure> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<f64>().ok()
        };
        let (anonymous, file) = kib("RssAnon:").zip(kib("RssFile:")).ok_or("no RssAnon in /proc")?;
        // The program's own text is part of RssFile; the maps of an idle broker add next to nothing.
        Ok((anonymous + file) / 1024.0)
    }

    fn stop(mut self) -> Result<(), Failure> {
        // SIGTERM by the shell's own kill: the standard library only knows SIGKILL.
        let killed = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status()?;
        let ended = self.child.wait()?;
        if killed.success() && ended.success() { Ok(()) } else { Err(format!("the broker ended with {ended}").into()) }
    }

    fn kill(mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port whose two successors are free as well: `dev` takes three.
fn free_ports() -> Result<u16, Failure> {
    for _ in 0..100 {
        let first = TcpListener::bind(("127.0.0.1", 0))?;
        let port = first.local_addr()?.port();
        let next = |by: u16| port.checked_add(by).is_some_and(|port| TcpListener::bind(("127.0.0.1", port)).is_ok());
        if next(1) && next(2) {
            return Ok(port);
        }
    }
    Err("no three free ports in a row".into())
}

/// A folder of this run, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(parent: &Path) -> Result<Self, Failure> {
        let path = parent.join(format!("targets-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(fs::canonicalize(path)?))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
