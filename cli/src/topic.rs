//! `flowstone topic`.

use crate::args::{Common, key_value};
use crate::connect::connect;
use crate::failure::{Failure, Outcome};
use crate::output::{self, Format, List, Row, Shown};
use crate::stdio::{confirm, say};
use clap::{Args, Subcommand};
use flowstone_client::{
    Admin, AlterTopic, ConfigSource, ConfigValue, NewTopic, OffsetSpec, PartitionDescription, TopicDescription,
    TopicSummary,
};

/// Make, show, change and remove topics
#[derive(Debug, Subcommand)]
pub(crate) enum TopicCommand {
    /// Make a topic
    Create(CreateArgs),
    /// The topics there are
    List(ListArgs),
    /// One topic: its partitions and its configuration
    Describe(DescribeArgs),
    /// Change a topic's configuration, or give it more partitions
    Alter(AlterArgs),
    /// Remove a topic and its records
    Delete(DeleteArgs),
    /// Remove a partition's records below an offset
    Trim(TrimArgs),
}

#[derive(Args, Debug)]
pub(crate) struct CreateArgs {
    /// Its name: letters, digits, `.`, `_` and `-`
    name: String,
    /// Partitions
    #[arg(short, long, value_name = "PARTITIONS", default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..))]
    partitions: i32,
    /// Replicas of each partition [default: 3, or as many as there are brokers]
    #[arg(short, long, value_name = "REPLICAS", value_parser = clap::value_parser!(i32).range(1..))]
    replicas: Option<i32>,
    /// A key of its configuration, as in retention.ms=604800000
    #[arg(short, long = "config", value_name = "KEY=VALUE", value_parser = key_value)]
    config: Vec<(String, String)>,
    /// Only check
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    /// Those of the cluster itself too
    #[arg(long)]
    internal: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DescribeArgs {
    /// The topic
    name: String,
}

#[derive(Args, Debug)]
pub(crate) struct AlterArgs {
    /// The topic
    name: String,
    /// Partitions in all; there can only be more of them
    #[arg(short, long, value_name = "TOTAL", value_parser = clap::value_parser!(i32).range(1..))]
    partitions: Option<i32>,
    /// A key of its configuration, as in retention.ms=604800000
    #[arg(short, long = "config", value_name = "KEY=VALUE", value_parser = key_value)]
    config: Vec<(String, String)>,
    /// A key that goes back to its default
    #[arg(long, value_name = "KEY")]
    unset: Vec<String>,
    /// Only check
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DeleteArgs {
    /// The topic
    name: String,
    /// Do not ask; only asked where stdin and stderr are a terminal
    #[arg(short, long)]
    yes: bool,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args, Debug)]
pub(crate) struct TrimArgs {
    /// The topic
    name: String,
    /// The partition
    partition: i32,
    /// The first offset that stays, or `end`
    #[arg(value_parser = trim_offset)]
    offset: TrimTo,
    /// Do not ask; only asked where stdin and stderr are a terminal
    #[arg(short, long)]
    yes: bool,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug)]
enum TrimTo {
    Offset(i64),
    End,
}

fn trim_offset(text: &str) -> Result<TrimTo, String> {
    if text == "end" {
        return Ok(TrimTo::End);
    }
    match text.parse() {
        Ok(offset @ 0..) => Ok(TrimTo::Offset(offset)),
        _ => Err("write an offset or `end`".to_owned()),
    }
}

impl Row for TopicSummary {
    const HEADINGS: &'static [&'static str] = &["NAME", "PARTITIONS", "REPLICAS", "ID", "INTERNAL"];
    const NARROW: usize = 3;

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.partitions.to_string(),
            self.replication_factor.to_string(),
            self.topic_id.clone(),
            self.internal.to_string(),
        ]
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

impl Row for PartitionDescription {
    const HEADINGS: &'static [&'static str] = &[
        "PARTITION",
        "LEADER",
        "START",
        "HIGH-WATERMARK",
        "RECORDS",
        "SIZE",
        "STATE",
        "EPOCH",
        "END",
        "REPLICAS",
        "BYTES",
        "IN-SYNC",
    ];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        vec![
            self.partition.to_string(),
            output::or_none(self.leader),
            self.log_start.to_string(),
            self.high_watermark.to_string(),
            self.records.to_string(),
            output::bytes(self.log_bytes),
            self.error.clone().unwrap_or_else(|| "ok".to_owned()),
            self.leader_epoch.to_string(),
            self.end_offset.to_string(),
            output::numbers(&self.replicas),
            self.log_bytes.to_string(),
            output::numbers(&self.in_sync),
        ]
    }

    fn name(&self) -> String {
        self.partition.to_string()
    }
}

impl Row for ConfigValue {
    const HEADINGS: &'static [&'static str] = &["KEY", "VALUE", "FROM"];
    const NARROW: usize = 3;

    fn cells(&self) -> Vec<String> {
        let source = match self.source {
            ConfigSource::Topic => "topic",
            ConfigSource::Broker => "broker",
            _ => "default",
        };
        vec![self.key.clone(), self.value.clone(), source.to_owned()]
    }

    fn name(&self) -> String {
        self.key.clone()
    }
}

impl Shown for TopicDescription {
    fn table(&self, wide: bool) -> String {
        let mut pairs = vec![("topic", self.name.clone())];
        if wide {
            pairs.push(("id", self.topic_id.clone()));
            pairs.push(("internal", self.internal.to_string()));
        }
        pairs.push(("partitions", self.partitions.len().to_string()));
        pairs.push(("replicas", self.replication_factor.to_string()));
        format!(
            "{}\n{}\n{}",
            output::pairs(pairs),
            output::table_of(&self.partitions, wide),
            output::table_of(&self.configs, wide)
        )
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

pub(crate) async fn run(command: TopicCommand, common: &Common) -> Outcome {
    if let TopicCommand::Alter(args) = &command
        && args.partitions.is_none()
        && args.config.is_empty()
        && args.unset.is_empty()
    {
        return Err(Failure::usage("nothing to change; say -p TOTAL, -c KEY=VALUE or --unset KEY"));
    }
    let client = connect(common).await?;
    let admin = client.admin();
    match command {
        TopicCommand::Create(args) => create(&admin, args, common.output).await,
        TopicCommand::List(args) => {
            let topics = if args.internal { admin.list_all_topics().await? } else { admin.list_topics().await? };
            output::print(common.output, &List(topics))
        }
        TopicCommand::Describe(args) => output::print(common.output, &admin.describe_topic(&args.name).await?),
        TopicCommand::Alter(args) => alter(&admin, args, common.output).await,
        TopicCommand::Delete(args) => delete(&admin, args).await,
        TopicCommand::Trim(args) => trim(&admin, args).await,
    }
}

async fn create(admin: &Admin, args: CreateArgs, format: Format) -> Outcome {
    let mut topic = NewTopic::new(&args.name).partitions(args.partitions).validate_only(args.dry_run);
    if let Some(replicas) = args.replicas {
        topic = topic.replicas(replicas);
    }
    for (key, value) in args.config {
        topic = topic.config(key, value);
    }
    let topic = admin.create_topic(topic).await?;
    if format != Format::Table {
        return output::print(format, &topic);
    }
    let verb = if args.dry_run { "could be created" } else { "created" };
    say(format_args!("topic {} {verb}, partitions: {}", args.name, args.partitions));
    Ok(())
}

async fn alter(admin: &Admin, args: AlterArgs, format: Format) -> Outcome {
    let mut change = AlterTopic::new(&args.name).validate_only(args.dry_run);
    if let Some(total) = args.partitions {
        change = change.partitions(total);
    }
    for (key, value) in args.config {
        change = change.set(key, value);
    }
    for key in args.unset {
        change = change.unset(key);
    }
    let topic = admin.alter_topic(change).await?;
    if format != Format::Table {
        return output::print(format, &topic);
    }
    say(format_args!("topic {} {}", args.name, if args.dry_run { "could be changed so" } else { "changed" }));
    Ok(())
}

async fn delete(admin: &Admin, args: DeleteArgs) -> Outcome {
    // A topic that is not there is told before the question.
    let topic = admin.describe_topic(&args.name).await?;
    let records: u64 = topic.partitions.iter().map(|partition| partition.records).sum();
    let what = format!("topic {} with {} partitions and {records} records", args.name, topic.partitions.len());
    if args.dry_run {
        say(format_args!("{what} would be deleted"));
        return Ok(());
    }
    confirm(&format!("Delete {what}, for good?"), args.yes)?;
    admin.delete_topic(&args.name).await?;
    say(format_args!("{what} deleted"));
    Ok(())
}

async fn trim(admin: &Admin, args: TrimArgs) -> Outcome {
    let (name, partition) = (&args.name, args.partition);
    let range = admin.list_offsets(&[(name, partition, OffsetSpec::Start)]).await?;
    let (start, end) = range.first().map_or((0, 0), |range| (range.log_start, range.high_watermark));
    let to = match args.offset {
        TrimTo::Offset(offset) => offset,
        TrimTo::End => end,
    };
    if args.dry_run {
        if to > end {
            return Err(Failure::failed(format!("offset {to} is beyond the end; valid are {start} to {end}")));
        }
        say(format_args!("the records of {name}/{partition} at offsets {start} to below {to} would be removed"));
        return Ok(());
    }
    confirm(&format!("Remove the records of {name}/{partition} below offset {to}, for good?"), args.yes)?;
    let start = match args.offset {
        TrimTo::Offset(offset) => admin.trim(name, partition, offset).await?,
        TrimTo::End => admin.trim_to_end(name, partition).await?,
    };
    say(format_args!("{name}/{partition} begins at offset {start}"));
    Ok(())
}
