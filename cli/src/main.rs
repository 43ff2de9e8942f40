//! The binary `flowstone`: broker, development setup and administration.
//!
//! One file per command. Data go to stdout, all else to stderr; how a command ends is one type, [`failure::Failure`],
//! and its exit codes are stable. Everything that is asked of a cluster goes through `flowstone-client`'s public API;
//! only `dev`, `broker`, `config` and `debug` touch the broker's crate.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod broker;
mod broker_admin;
mod cluster;
mod completion;
mod config;
mod connect;
mod consume;
mod debug;
mod dev;
mod escape;
mod failure;
mod group;
mod lines;
mod moment;
mod moves;
mod output;
mod partition;
mod position;
mod probe;
mod produce;
mod record_json;
mod record_view;
mod stdio;
mod template;
mod topic;
mod txn;
mod verify;

use args::{Cli, Command};
use clap::Parser;
use failure::{Failure, Outcome};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(cli: Cli) -> Outcome {
    let Cli { common, command } = cli;
    match command {
        Command::Config(command) => config::run(&command, &common),
        Command::Debug(command) => debug::run(&command, &common),
        Command::Completion(args) => completion::run(&args),
        Command::Dev(args) => serving()?.block_on(dev::run(args)),
        Command::Broker(args) => serving()?.block_on(broker::run(args)),
        Command::Topic(command) => asking()?.block_on(topic::run(command, &common)),
        Command::Cluster(command) => asking()?.block_on(cluster::run(command, &common)),
        Command::BrokerAdmin(command) => asking()?.block_on(broker_admin::run(command, &common)),
        Command::Partition(command) => asking()?.block_on(partition::run(command, &common)),
        Command::Group(command) => asking()?.block_on(group::run(command, &common)),
        Command::Txn(command) => asking()?.block_on(txn::run(command, &common)),
        Command::Produce(args) => asking()?.block_on(produce::run(args, &common)),
        Command::Consume(args) => asking()?.block_on(consume::run(args, &common)),
        Command::Verify(args) => asking()?.block_on(verify::run(&args, &common)),
        Command::Bench(command) => asking()?.block_on(bench::run(command, &common)),
    }
}

/// The runtime of a broker: its sockets. Half the cores, the others are for its shards. With two cores one thread
/// was as fast as two, for many records and for a lone one.
fn serving() -> Outcome<tokio::runtime::Runtime> {
    build((cores() / 2).max(1))
}

/// The runtime of a client. With two cores two threads took in a tenth more than one, and read twice as fast: sockets and
/// decoding beside what the command itself does. More than a few have nothing to do.
fn asking() -> Outcome<tokio::runtime::Runtime> {
    build(cores().min(4))
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn build(threads: usize) -> Outcome<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_name("flowstone-io")
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start a thread: {error}")))
}
