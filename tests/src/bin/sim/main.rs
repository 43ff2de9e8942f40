//! Runs seeds of the simulator, many side by side, or one that prints what happens.

// What it found is what this program is for.
#![allow(clippy::print_stdout)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use flowstone_tests::sim::{Counts, Plan, Report, World};

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
    /// Seeds side by side.
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,
    /// Stop after this many findings.
    #[arg(long, default_value_t = 10)]
    findings: u64,
}

impl Arguments {
    fn plan(&self, seed: u64) -> Plan {
        let mut plan = Plan::drawn(seed);
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
        // The replicas catch panics of the consensus core, and a panic of a run is told with its seed.
        std::panic::set_hook(Box::new(|_| {}));
    }
    if let Some(seed) = arguments.seed {
        let mut plan = if arguments.calm { Plan::calm(seed) } else { arguments.plan(seed) };
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
    let total = Mutex::new((Counts::default(), 0_u64));
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
                    total.0.add(&report.counts);
                    total.1 += 1;
                }
            });
        }
    });
    let (counts, seeds) = total.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    show(&counts);
    let took = began.elapsed();
    println!(
        "{seeds} seeds, {} findings, {:.1} s, {:.1} ms each, {:.1} simulated minutes per minute of one processor",
        found.load(Ordering::Relaxed),
        took.as_secs_f64(),
        took.as_secs_f64() * 1_000.0 * arguments.threads as f64 / seeds.max(1) as f64,
        counts.simulated_millis as f64 / 1_000.0 / (took.as_secs_f64() * arguments.threads as f64),
    );
    if found.into_inner() == 0 { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

/// A panic in a run is a finding of its seed.
fn run_caught(plan: Plan) -> Report {
    let seed = plan.seed;
    std::panic::catch_unwind(|| World::new(plan).run()).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Report { seed, hash: 0, counts: Counts::default(), broken: Some(format!("seed {seed}: a panic: {what}")) }
    })
}

fn show(counts: &Counts) {
    for (name, count) in counts.all() {
        println!("{count:>14}  {}", name.replace('_', " "));
    }
}
