//! `flowstone group`: who reads what, how far, how far behind.

use crate::args::Common;
use crate::connect::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::moment;
use crate::output::{self, Format, List, Row, Shown};
use crate::position::From;
use crate::stdio::{confirm, say};
use clap::{Args, Subcommand};
use flowstone_client::{
    Admin, CommittedOffset, ErrorCode, GroupDescription, GroupMember, GroupState, GroupSummary, OffsetSpec,
    PartitionLag, Position,
};
use serde::Serialize;
use std::collections::BTreeSet;
use std::time::Duration;

/// Time between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Look after consumer groups
#[derive(Debug, Subcommand)]
pub(crate) enum GroupCommand {
    /// All groups
    List,
    /// One group: its members, what each reads, what is committed
    Describe(NameArgs),
    /// How many records it is behind, by partition
    Lag(LagArgs),
    /// Set where it goes on; only while it has no members
    Seek(SeekArgs),
    /// Forget it, and all that it committed; only while it has no members
    Delete(DeleteArgs),
}

#[derive(Args, Debug)]
pub(crate) struct NameArgs {
    /// The group
    group: String,
}

#[derive(Args, Debug)]
pub(crate) struct LagArgs {
    /// The group
    group: String,
    /// Look every second until Ctrl-C
    #[arg(long)]
    watch: bool,
}

#[derive(Args, Debug)]
pub(crate) struct SeekArgs {
    /// The group
    group: String,
    /// Where to: start, end, an offset, -N (the last N of each partition), @TIME
    #[arg(long, value_name = "POSITION", allow_hyphen_values = true)]
    to: From,
    /// Only this topic, also where the group never read it; may be given several times. Else all that it has committed
    #[arg(long = "topic", value_name = "TOPIC")]
    topics: Vec<String>,
    /// Only this partition of each topic; may be given several times
    #[arg(short, long = "partition", value_name = "PARTITION", value_parser = clap::value_parser!(i32).range(0..))]
    partitions: Vec<i32>,
    /// Only say where it would go on
    #[arg(long)]
    dry_run: bool,
    /// Do not ask; only asked where stdin and stderr are a terminal
    #[arg(short, long)]
    yes: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DeleteArgs {
    /// The group
    group: String,
    /// Only say what would be forgotten
    #[arg(long)]
    dry_run: bool,
    /// Do not ask; only asked where stdin and stderr are a terminal
    #[arg(short, long)]
    yes: bool,
}

fn state(state: GroupState) -> &'static str {
    match state {
        GroupState::Stable => "stable",
        GroupState::Rebalancing => "rebalancing",
        _ => "empty",
    }
}

impl Row for GroupSummary {
    const HEADINGS: &'static [&'static str] = &["GROUP", "STATE", "MEMBERS", "ASSIGNOR", "EPOCH"];
    const NARROW: usize = 3;

    fn cells(&self) -> Vec<String> {
        vec![
            self.group.clone(),
            state(self.state).to_owned(),
            self.members.to_string(),
            self.assignor.clone(),
            self.group_epoch.to_string(),
        ]
    }

    fn name(&self) -> String {
        self.group.clone()
    }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// Partitions of a few topics, as in `orders[0,1] bills[4]`.
fn places(partitions: &[flowstone_client::MemberPartition]) -> String {
    let topics: BTreeSet<&str> = partitions.iter().map(|partition| partition.topic.as_str()).collect();
    let one = |topic: &str| {
        let of_it = partitions.iter().filter(|partition| partition.topic == topic);
        let numbers: Vec<_> = of_it.map(|partition| partition.partition).collect();
        format!("{topic}[{}]", output::numbers(&numbers))
    };
    or_dash(&topics.into_iter().map(one).collect::<Vec<_>>().join(" "))
}

impl Row for GroupMember {
    const HEADINGS: &'static [&'static str] =
        &["MEMBER", "CLIENT", "INSTANCE", "READS", "SHALL-READ", "HOST", "RACK", "EPOCH", "TOPICS", "PATTERN"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        vec![
            self.member_id.clone(),
            or_dash(&self.client_id),
            or_dash(&self.instance_id),
            places(&self.owned),
            places(&self.target),
            or_dash(&self.host),
            or_dash(&self.rack),
            self.member_epoch.to_string(),
            or_dash(&self.topics.join(",")),
            or_dash(&self.topic_pattern),
        ]
    }

    fn name(&self) -> String {
        self.member_id.clone()
    }
}

impl Row for CommittedOffset {
    const HEADINGS: &'static [&'static str] = &["TOPIC", "PARTITION", "COMMITTED", "AGE", "METADATA"];
    const NARROW: usize = 3;

    fn cells(&self) -> Vec<String> {
        vec![
            self.topic.clone(),
            self.partition.to_string(),
            self.offset.to_string(),
            moment::span(moment::now_ms().saturating_sub(self.committed_at).max(0)),
            or_dash(&self.metadata),
        ]
    }

    fn name(&self) -> String {
        format!("{}/{}", self.topic, self.partition)
    }
}

impl Shown for GroupDescription {
    fn table(&self, wide: bool) -> String {
        let mut pairs = vec![
            ("group", self.group.clone()),
            ("state", state(self.state).to_owned()),
            ("members", self.members.len().to_string()),
        ];
        if wide {
            pairs.push(("assignor", self.assignor.clone()));
            pairs.push(("epoch", self.group_epoch.to_string()));
            pairs.push(("coordinator", format!("broker {}", self.coordinator)));
        }
        format!(
            "{}\n{}\n{}",
            output::pairs(pairs),
            output::table_of(&self.members, wide),
            output::table_of(&self.offsets, wide)
        )
    }

    fn name(&self) -> String {
        self.group.clone()
    }
}

impl Row for PartitionLag {
    const HEADINGS: &'static [&'static str] = &["TOPIC", "PARTITION", "COMMITTED", "END", "LAG"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        vec![
            self.topic.clone(),
            self.partition.to_string(),
            self.committed.map_or_else(|| "-".to_owned(), |offset| offset.to_string()),
            self.end.to_string(),
            self.lag.to_string(),
        ]
    }

    fn name(&self) -> String {
        format!("{}/{}", self.topic, self.partition)
    }
}

/// Where a partition goes on.
#[derive(Debug, Serialize)]
struct Sought {
    topic: String,
    partition: i32,
    from: Option<i64>,
    to: i64,
}

impl Row for Sought {
    const HEADINGS: &'static [&'static str] = &["TOPIC", "PARTITION", "FROM", "TO"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        vec![
            self.topic.clone(),
            self.partition.to_string(),
            self.from.map_or_else(|| "-".to_owned(), |offset| offset.to_string()),
            self.to.to_string(),
        ]
    }

    fn name(&self) -> String {
        format!("{}/{}", self.topic, self.partition)
    }
}

pub(crate) async fn run(command: GroupCommand, common: &Common) -> Outcome {
    let client = connect(common).await?;
    let admin = client.admin();
    match command {
        GroupCommand::List => output::print(common.output, &List(admin.list_groups().await?)),
        GroupCommand::Describe(args) => output::print(common.output, &admin.describe_group(&args.group).await?),
        GroupCommand::Lag(LagArgs { group, watch: false }) => {
            output::print(common.output, &List(admin.group_lag(&group).await?))
        }
        GroupCommand::Lag(LagArgs { group, watch: true }) => watch(&admin, &group, common.output).await,
        GroupCommand::Seek(args) => seek(&admin, &args, common.output).await,
        GroupCommand::Delete(args) => delete(&admin, &args).await,
    }
}

async fn watch(admin: &Admin, group: &str, format: Format) -> Outcome {
    let mut last = None;
    loop {
        let looked = tokio::select! {
            looked = admin.group_lag(group) => looked,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        match looked {
            Ok(lag) => {
                if last.as_ref() != Some(&lag) {
                    output::print(format, &List(lag.clone()))?;
                    if matches!(format, Format::Table | Format::Wide) {
                        output::print_line("")?;
                    }
                }
                last = Some(lag);
            }
            // It may be what is watched for: a coordinator that is on its way.
            Err(error) if error.is_retriable() => say(format_args!("{error}")),
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

async fn seek(admin: &Admin, args: &SeekArgs, format: Format) -> Outcome {
    let committed = match admin.describe_group(&args.group).await {
        Ok(group) => group.offsets,
        // One that was never there begins where it is told, where it is said what it is to read.
        Err(error) if error.code() == ErrorCode::UnknownGroup && !args.topics.is_empty() => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let mut places: BTreeSet<(String, i32)> = BTreeSet::new();
    for topic in &args.topics {
        let topic = admin.describe_topic(topic).await?;
        places.extend(topic.partitions.iter().map(|partition| (topic.name.clone(), partition.partition)));
    }
    if args.topics.is_empty() {
        places.extend(committed.iter().map(|offset| (offset.topic.clone(), offset.partition)));
    }
    for partition in &args.partitions {
        if !places.iter().any(|(_, known)| known == partition) {
            let message = format!("there is no partition {partition} to seek in; leave -p out for all there are");
            return Err(Failure::new(Exit::NotFound, message));
        }
    }
    if !args.partitions.is_empty() {
        places.retain(|(_, partition)| args.partitions.contains(partition));
    }
    if places.is_empty() {
        let message = format!("group {} has committed nothing; name what it is to read with --topic", args.group);
        return Err(Failure::new(Exit::NotFound, message));
    }
    let spec = match args.to {
        From::Start | From::Offset(_) => OffsetSpec::Start,
        From::End => OffsetSpec::End,
        From::Last(records) => OffsetSpec::FromEnd(records),
        From::Time(ms) => OffsetSpec::Timestamp(ms),
    };
    let queries: Vec<_> = places.iter().map(|(topic, partition)| (topic.as_str(), *partition, spec)).collect();
    let mut sought = Vec::new();
    for info in admin.list_offsets_linearizable(&queries).await? {
        let to = match args.to {
            From::Offset(offset) if (info.log_start..=info.high_watermark).contains(&offset) => offset,
            From::Offset(offset) => {
                return Err(Failure::failed(format!(
                    "offset {offset} is out of range: {}/{} has {} to {}; choose one of these",
                    info.topic, info.partition, info.log_start, info.high_watermark
                )));
            }
            _ => info.offset,
        };
        let known = committed.iter().find(|offset| offset.topic == info.topic && offset.partition == info.partition);
        sought.push(Sought {
            from: known.map(|offset| offset.offset),
            topic: info.topic,
            partition: info.partition,
            to,
        });
    }
    let positions: Vec<_> =
        sought.iter().map(|sought| Position::new(&sought.topic, sought.partition, sought.to)).collect();
    // A group with members is told before the question.
    admin.reset_offsets(&args.group, &positions, true).await?;
    if !args.dry_run {
        let question = format!("Have group {} go on elsewhere in {} partitions?", args.group, sought.len());
        confirm(&question, args.yes)?;
        admin.reset_offsets(&args.group, &positions, false).await?;
    }
    output::print(format, &List(sought))?;
    let verb = if args.dry_run { "would go" } else { "goes" };
    say(format_args!("group {} {verb} on as listed", args.group));
    Ok(())
}

async fn delete(admin: &Admin, args: &DeleteArgs) -> Outcome {
    let group = admin.describe_group(&args.group).await?;
    let what = format!("group {} with what it committed for {} partitions", args.group, group.offsets.len());
    if !group.members.is_empty() {
        return Err(Failure::failed(format!(
            "group {} has {} members; stop them first",
            args.group,
            group.members.len()
        )));
    }
    if args.dry_run {
        say(format_args!("{what} would be forgotten"));
        return Ok(());
    }
    confirm(&format!("Forget {what}, for good?"), args.yes)?;
    admin.delete_group(&args.group).await?;
    say(format_args!("{what} forgotten"));
    Ok(())
}
