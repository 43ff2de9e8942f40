//! `flowstone bench`: the client used as a program would use it, and what came of it.

mod consume;
mod e2e;
mod load;
mod produce;
mod report;

use crate::args::{Common, key_value};
use crate::connect::connect;
use crate::failure::{Failure, Outcome};
use crate::output::{self, Format};
use crate::produce::{AcksArg, CompressionArg};
use clap::{Args, Subcommand};
use flowstone_client::{Admin, Client, ErrorCode, NewTopic};
use report::{Measured, Report, Setting};
use std::time::{SystemTime, UNIX_EPOCH};

/// Measure: throughput, and latencies from HDR histograms
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Records in; latency is from sending a record to its acknowledgement
    Produce(BenchArgs),
    /// Records out; latency is the time waited for each batch. Records that the topic lacks are written first
    Consume(BenchArgs),
    /// One record in and out at a time, or at --rate; latency is from sending a record to reading it
    E2e(BenchArgs),
}

#[derive(Args, Clone, Debug)]
pub(crate) struct BenchArgs {
    /// The topic, made where it is missing; without it a temporary one, removed at the end
    #[arg(long)]
    topic: Option<String>,

    /// How many records in all [default: 1000000; e2e: 10000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    records: Option<u64>,

    /// Bytes of a record's value
    #[arg(long, value_name = "BYTES", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=16 << 20))]
    size: u32,

    /// Records per second, in all; as fast as it goes without it
    #[arg(long, value_name = "RECORDS/S", value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,

    /// Producers (bench consume: consumers), each with a connection of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    producers: u16,

    /// Partitions of a topic that is made
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..))]
    partitions: i32,

    /// A key of the configuration of a topic that is made, as in flowstone.flush=relaxed
    #[arg(short, long = "config", value_name = "KEY=VALUE", value_parser = key_value)]
    config: Vec<(String, String)>,

    /// When a record counts as written
    #[arg(long, value_enum, default_value_t)]
    acks: AcksArg,

    /// How batches are compressed
    #[arg(long, value_enum, default_value_t)]
    compression: CompressionArg,

    /// Records of one producer under way at once; 1 is one at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    in_flight: Option<u32>,

    /// Bytes of a batch [default: the client's]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..))]
    batch_bytes: Option<u32>,
}

impl BenchArgs {
    fn records(&self, default: u64) -> u64 {
        self.records.unwrap_or(default)
    }
}

/// The topic of a run.
#[derive(Clone, Debug)]
struct Topic {
    name: String,
    partitions: i32,
    flush: String,
}

pub(crate) async fn run(command: BenchCommand, common: &Common) -> Outcome {
    if !matches!(common.output, Format::Table | Format::Json) {
        return Err(Failure::usage("bench prints -o table or -o json"));
    }
    let (BenchCommand::Produce(args) | BenchCommand::Consume(args) | BenchCommand::E2e(args)) = &command;
    let client = connect(common).await?;
    let admin = client.admin();
    let (topic, temporary) = match &args.topic {
        Some(name) => (existing_or_new(&admin, name, args).await?, false),
        None => (new(&admin, &temporary_name(), args).await?, true),
    };
    let measured = tokio::select! {
        measured = measure(&command, &client, &topic, common) => measured,
        _ = tokio::signal::ctrl_c() => Err(Failure::failed("interrupted")),
    };
    if temporary {
        let removed = admin.delete_topic(&topic.name).await.map_err(Failure::from);
        // What went wrong first is what is told.
        if measured.is_ok() {
            removed.map_err(|failure| failure.context(format_args!("cannot remove topic {}", topic.name)))?;
        }
    }
    let (benchmark, measured) = measured?;
    let failed = measured.errors;
    let setting = Setting {
        benchmark,
        topic: topic.name,
        partitions: topic.partitions,
        acks: args.acks.name().to_owned(),
        flush: topic.flush,
    };
    output::print(common.output, &Report::new(setting, &measured))?;
    if failed > 0 {
        return Err(Failure::failed(format!("{failed} records failed; the broker's log says why")));
    }
    Ok(())
}

async fn measure(
    command: &BenchCommand,
    client: &Client,
    topic: &Topic,
    common: &Common,
) -> Outcome<(&'static str, Measured)> {
    match command {
        BenchCommand::Produce(args) => Ok(("produce", produce::run(args, topic, common).await?)),
        BenchCommand::Consume(args) => Ok(("consume", consume::run(args, client, topic, common).await?)),
        BenchCommand::E2e(args) => Ok(("e2e", e2e::run(args, client, topic, common).await?)),
    }
}

fn temporary_name() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("bench-{}-{}", since.as_millis(), std::process::id())
}

async fn existing_or_new(admin: &Admin, name: &str, args: &BenchArgs) -> Outcome<Topic> {
    match admin.describe_topic(name).await {
        Ok(topic) => Ok(Topic::of(&topic)),
        Err(error) if error.code() == ErrorCode::UnknownTopic => new(admin, name, args).await,
        Err(error) => Err(error.into()),
    }
}

async fn new(admin: &Admin, name: &str, args: &BenchArgs) -> Outcome<Topic> {
    let mut topic = NewTopic::new(name).partitions(args.partitions);
    for (key, value) in &args.config {
        topic = topic.config(key, value);
    }
    Ok(Topic::of(&admin.create_topic(topic).await?))
}

impl Topic {
    fn of(topic: &flowstone_client::TopicDescription) -> Topic {
        let flush = topic.configs.iter().find(|config| config.key == "flowstone.flush");
        Topic {
            name: topic.name.clone(),
            partitions: i32::try_from(topic.partitions.len()).unwrap_or(i32::MAX),
            flush: flush.map_or_else(|| "quorum".to_owned(), |config| config.value.clone()),
        }
    }
}
