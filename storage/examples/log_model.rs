//! Runs the log against its model for as many random operations as told:
//! `cargo run --release -p flowstone-storage --example log_model -- --operations 10000000 --seed 1`
// It prints: it is a program for people.
#![allow(clippy::print_stdout, reason = "its figures are what it is for")]

#[path = "../tests/model/mod.rs"]
mod model;

use std::time::Instant;

/// Operations of one run; each run has a seed of its own.
const OPERATIONS_PER_RUN: u64 = 10_000;

fn main() {
    let (mut operations, mut seed) = (100_000, 1);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let number = arguments.next().and_then(|number| number.parse::<u64>().ok());
        match (argument.as_str(), number) {
            ("--operations", Some(number)) => operations = number,
            ("--seed", Some(number)) => seed = number,
            _ => {
                eprintln!("usage: log_model [--operations N] [--seed N]");
                std::process::exit(2);
            }
        }
    }
    let began = Instant::now();
    let mut total = model::Counts::default();
    while total.operations < operations {
        let counts = model::run(seed, OPERATIONS_PER_RUN.min(operations - total.operations));
        total = total.plus(&counts);
        seed += 1;
        if total.operations % 500_000 < OPERATIONS_PER_RUN {
            println!("{} operations, {:.0?}", total.operations, began.elapsed());
        }
    }
    println!("{total:#?}");
    println!("next seed {seed}, {:.0?}", began.elapsed());
}
