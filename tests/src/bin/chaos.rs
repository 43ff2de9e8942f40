//! Real brokers under faults, while a workload checks what they promise:
//! `cargo run --release -p flowstone-tests --bin chaos -- --for 120s`.
//!
//! It prints each fault as it happens, then operations per second, the longest time in which some partition acknowledged
//! nothing, and the anomalies. Exit code 0 only where there is none. The schedule follows from `--seed`.

#![forbid(unsafe_code)]

use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;
use flowstone_chaos::{FaultKind, Report, Settings, run};

/// Put real brokers through kills, pauses, cuts and damage, and check what they promise
#[derive(Debug, Parser)]
struct Args {
    /// How long, such as 120s or 10m
    #[arg(long = "for", value_name = "SPAN", default_value = "120s", value_parser = span)]
    length: Duration,

    /// Which schedule; a random one unless given
    #[arg(long)]
    seed: Option<u64>,

    /// Brokers
    #[arg(long, default_value_t = 3)]
    brokers: i32,

    /// Faults to choose from, separated by commas; all unless given
    #[arg(long, value_delimiter = ',', value_parser = kind)]
    faults: Vec<FaultKind>,

    /// Partitions of the topic
    #[arg(long, default_value_t = 3)]
    partitions: u32,

    /// Records per second; 0 as fast as it goes
    #[arg(long, default_value_t = 5_000)]
    rate: u32,
}

fn span(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[digits..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err("write 120s, 10m or 1h".to_owned()),
    };
    let number: u64 = text[..digits].parse().map_err(|_| "write 120s, 10m or 1h".to_owned())?;
    Ok(Duration::from_secs(number * unit))
}

fn kind(text: &str) -> Result<FaultKind, String> {
    text.parse().map_err(|failure: flowstone_chaos::Failure| failure.to_string())
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(message) = build() {
        eprintln!("error: {message}");
        return ExitCode::FAILURE;
    }
    let seed = args.seed.unwrap_or_else(|| u64::from(std::process::id()));
    let kinds = if args.faults.is_empty() { FaultKind::ALL.to_vec() } else { args.faults };
    let settings = Settings {
        length: args.length,
        seed,
        brokers: args.brokers,
        kinds,
        partitions: args.partitions,
        rate: args.rate,
    };
    eprintln!("seed {seed}: {} brokers for {:?}", settings.brokers, settings.length);
    let mut tell = |at: Duration, what: &str| eprintln!("{:7.1} s  {what}", at.as_secs_f64());
    match run(&settings, &mut tell) {
        Ok(report) => print(&report, seed),
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Brokers of the state that this program was built from, where cargo runs it.
fn build() -> Result<(), String> {
    let Some(cargo) = std::env::var_os("CARGO") else { return Ok(()) };
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "-p", "flowstone-cli"]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{command:?} ended with {status}")),
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}

fn print(report: &Report, seed: u64) -> ExitCode {
    let number = |name: &str| report.verdict[name].as_u64().unwrap_or_default();
    let anomalies = report.verdict["anomalies"].as_array().map_or(&[][..], Vec::as_slice);
    let faults: Vec<String> = report.faults.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    eprintln!();
    eprintln!("faults:            {}", faults.join(", "));
    eprintln!("operations:        {}", number("operations"));
    eprintln!("acknowledged:      {}", number("acknowledged"));
    eprintln!("failed:            {}", number("failed"));
    eprintln!("unknown:           {}", number("unknown"));
    eprintln!("operations/s:      {:.0}", report.operations_per_second);
    eprintln!("longest gap:       {} ms", number("longest_gap_ms"));
    eprintln!("anomalies:         {}", anomalies.len());
    for anomaly in anomalies {
        eprintln!("  {anomaly}");
    }
    for failure in &report.failures {
        eprintln!("failure: {failure}");
    }
    if report.is_clean() {
        return ExitCode::SUCCESS;
    }
    if let Some(kept) = &report.kept {
        eprintln!("the brokers' files are in {}; --seed {seed} repeats the schedule", kept.display());
    }
    ExitCode::FAILURE
}
