//! Runs seeds of the simulator, many side by side, or one that prints what happens.

// What it found is what this program is for.
#![allow(clippy::print_stdout)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use flowstone_tests::sim::{Counts, Plan, Report, World, hear_panics, take_panic};

/// Runs the simulator.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Run this seed alone.
    #[arg(long)]
    seed: Option<u64>,
    /// With one seed: print every event.
    #[arg(long)]
    print: bool,
    /// With one seed: nothing goes wrong.
    #[arg(long)]
    calm: bool,
    /// Run every seed twice and compare the traces.
    #[arg(long)]
    twice: bool,
    /// Leave these faults out (as in `rot,wipe`).
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// Only these faults.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Plant this bug (a build with the feature `planted`), or `all`: tells how many seeds it takes to find it.
    #[cfg(feature = "planted")]
    #[arg(long)]
    plant: Option<String>,
    /// Whether transactions, groups and compaction are in it; else every seed says so itself.
    #[arg(long)]
    coordinators: Option<bool>,
    /// Seeds side by side.
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,
    /// Tell how far it is this often, in seconds; 0: never.
    #[arg(long, default_value_t = 30)]
    progress: u64,
    /// Stop after this many findings.
    #[arg(long, default_value_t = 10)]
    findings: u64,
}

impl Arguments {
    fn plan(&self, seed: u64) -> Plan {
        let mut plan = match self.coordinators {
            Some(_) => Plan::plain(seed),
            None => Plan::drawn(seed),
        };
        if self.coordinators == Some(true) {
            plan.coordinate();
        }
        plan.faults.retain(|fault| {
            let name = fault.name();
            !self.without.contains(&name) && (self.only.is_empty() || self.only.contains(&name))
        });
        plan
    }
}

fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    if !arguments.print {
        hear_panics();
    }
    if let Some(seed) = arguments.seed {
        let mut plan = if arguments.calm { Plan::calm(seed) } else { arguments.plan(seed) };
        if arguments.calm && arguments.coordinators == Some(true) {
            plan.coordinate();
        }
        plan.prints = arguments.print;
        let report = World::new(plan).run();
        show(&report.counts);
        println!("trace {:016x}", report.hash);
        return match report.broken {
            Some(broken) => {
                println!("BROKEN {broken}");
                std::process::ExitCode::FAILURE
            }
            None => std::process::ExitCode::SUCCESS,
        };
    }
    #[cfg(feature = "planted")]
    if let Some(name) = &arguments.plant {
        return find_planted(&arguments, name);
    }
    run_many(&arguments)
}

/// How many seeds it takes to find each planted bug.
#[cfg(feature = "planted")]
fn find_planted(arguments: &Arguments, name: &str) -> std::process::ExitCode {
    use flowstone_storage::planted::{Bug, plant};

    let mut missed = false;
    let chosen = Bug::ALL.into_iter().filter(|bug| name == "all" || format!("{bug:?}").eq_ignore_ascii_case(name));
    for bug in chosen {
        plant(Some(bug));
        let found = (arguments.first..arguments.first + arguments.seeds)
            .find_map(|seed| run_caught(arguments.plan(seed)).broken.map(|broken| (seed, broken)));
        plant(None);
        match found {
            Some((seed, broken)) => {
                let first: String = broken.chars().take(160).collect();
                println!("{bug:?}: after {} seeds: {first}", seed - arguments.first + 1);
            }
            None => {
                missed = true;
                println!("{bug:?}: not found in {} seeds", arguments.seeds);
            }
        }
    }
    if missed { std::process::ExitCode::FAILURE } else { std::process::ExitCode::SUCCESS }
}

fn run_many(arguments: &Arguments) -> std::process::ExitCode {
    let began = Instant::now();
    let next = AtomicU64::new(arguments.first);
    let end = arguments.first + arguments.seeds;
    let found = AtomicU64::new(0);
    let total = Mutex::new(Total { counts: Counts::default(), seeds: 0, told: began });
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || found.load(Ordering::Relaxed) >= arguments.findings {
                        return;
                    }
                    let mut report = run_caught(arguments.plan(seed));
                    if arguments.twice {
                        let again = run_caught(arguments.plan(seed));
                        if again.hash != report.hash && report.broken.is_none() {
                            report.broken = Some(format!(
                                "seed {seed}: two runs differ: {:016x}, {:016x}",
                                report.hash, again.hash
                            ));
                        }
                    }
                    if let Some(broken) = &report.broken {
                        found.fetch_add(1, Ordering::Relaxed);
                        println!("BROKEN {broken}\n");
                    }
                    let mut total = total.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    total.counts.add(&report.counts);
                    total.seeds += 1;
                    if arguments.progress > 0 && total.told.elapsed() >= Duration::from_secs(arguments.progress) {
                        total.told = Instant::now();
                        let found = found.load(Ordering::Relaxed);
                        println!(
                            "{} of {} seeds, {found} findings, {:.0} s",
                            total.seeds,
                            arguments.seeds,
                            began.elapsed().as_secs_f64()
                        );
                    }
                }
            });
        }
    });
    let Total { counts, seeds, .. } = total.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    show(&counts);
    let found = found.into_inner();
    let (took, processor) = (began.elapsed(), processor_time());
    let simulated = counts.simulated_millis as f64 / 60_000.0;
    println!(
        "{seeds} seeds in {:.1} s, {:.1} ms of processor time each, {simulated:.0} simulated minutes, {:.0} per minute of one \
         processor",
        took.as_secs_f64(),
        processor.as_secs_f64() * 1_000.0 / seeds.max(1) as f64,
        simulated / (processor.as_secs_f64() / 60.0),
    );
    println!(
        "{} elections, {} truncations, {} snapshots, {} membership changes, {} crashes, {} torn files, {found} findings",
        counts.elections,
        counts.truncations,
        counts.snapshots,
        counts.membership_changes,
        counts.crashes,
        counts.torn_files,
    );
    // Less than all faults were asked for, or few seeds: what did not happen says nothing.
    let is_whole = arguments.only.is_empty() && arguments.without.is_empty() && seeds >= VACUOUS_FROM;
    let missing: Vec<_> = counts.all().into_iter().filter(|(_, count)| *count == 0).map(|(name, _)| name).collect();
    let is_vacuous = is_whole && !missing.is_empty();
    if is_vacuous {
        println!("VACUOUS: never seen: {}", missing.join(", "));
    }
    if found == 0 && !is_vacuous { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

/// A run of this many seeds has to go through everything.
const VACUOUS_FROM: u64 = 200;

/// What all runs came to.
struct Total {
    counts: Counts,
    seeds: u64,
    /// When it was told last.
    told: Instant,
}

/// Processor time that this process took so far, where the system tells; else none.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name in brackets: user time is the 12th, system time the 13th, in hundredths of a second.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let hundredths: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(hundredths * 10)
}

/// A panic in a run is a finding of its seed.
fn run_caught(plan: Plan) -> Report {
    let seed = plan.seed;
    std::panic::catch_unwind(|| World::new(plan).run()).unwrap_or_else(|_| {
        let what = take_panic().unwrap_or_else(|| "no message".to_owned());
        Report { seed, hash: 0, counts: Counts::default(), broken: Some(format!("seed {seed}: a panic: {what}")) }
    })
}

fn show(counts: &Counts) {
    for (name, count) in counts.all() {
        println!("{count:>14}  {}", name.replace('_', " "));
    }
}
