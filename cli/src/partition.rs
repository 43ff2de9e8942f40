//! `flowstone partition`: where partitions are, and who leads them.

use crate::args::Common;
use crate::connect::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::moves::{self, Wanted};
use crate::output::{self, Format, List, Row, Shown};
use crate::stdio::{confirm, say};
use clap::{Args, Subcommand};
use flowstone_client::{Admin, RebalancePlan, RecoveredPartition};
use serde::Serialize;

/// Look after partitions: their replicas and leaders
#[derive(Debug, Subcommand)]
pub(crate) enum PartitionCommand {
    /// Every partition with its leader and replicas
    List(ListArgs),
    /// Move a partition to other brokers
    Move(MoveArgs),
    /// Take a move back
    CancelMove(PlaceArgs),
    /// Have another broker lead a partition
    TransferLeader(TransferArgs),
    /// Even out replicas and leaders over the brokers
    Rebalance(RebalanceArgs),
    /// Go on with what one broker has of a partition whose majority is gone for good: acknowledged records may be lost
    Recover(RecoverArgs),
}

#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    /// Only these topics
    #[arg(value_name = "TOPIC")]
    topics: Vec<String>,
    /// Those of the cluster itself too
    #[arg(long)]
    internal: bool,
    /// Those whose replicas are being changed, with how far they are
    #[arg(long, conflicts_with_all = ["topics", "internal"])]
    moving: bool,
}

#[derive(Args, Debug)]
pub(crate) struct PlaceArgs {
    /// The topic
    topic: String,
    /// The partition
    #[arg(value_parser = clap::value_parser!(i32).range(0..))]
    partition: i32,
}

#[derive(Args, Debug)]
pub(crate) struct MoveArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// The brokers that will hold it, the preferred leader first: 4,2,3
    #[arg(long, value_name = "BROKER,...", required = true, value_delimiter = ',')]
    to: Vec<i32>,
    /// Only say what would move
    #[arg(long)]
    dry_run: bool,
    /// Return once it has begun
    #[arg(long)]
    no_wait: bool,
}

#[derive(Args, Debug)]
pub(crate) struct TransferArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// The broker that will lead; the best of its replicas unless given
    #[arg(long, value_name = "BROKER")]
    to: Option<i32>,
}

#[derive(Args, Debug)]
pub(crate) struct RebalanceArgs {
    /// Move no data, only leaderships
    #[arg(long)]
    leaders_only: bool,
    /// Only say what would move
    #[arg(long)]
    dry_run: bool,
    /// Do not ask; only asked where stdin and stderr are a terminal
    #[arg(short, long)]
    yes: bool,
    /// Return once it has begun
    #[arg(long)]
    no_wait: bool,
}

#[derive(Args, Debug)]
pub(crate) struct RecoverArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// The broker whose replica survives
    #[arg(long, value_name = "BROKER")]
    from: i32,
    /// Only say what would be kept
    #[arg(long)]
    dry_run: bool,
    /// Do not ask; only asked where stdin and stderr are a terminal
    #[arg(short, long)]
    yes: bool,
}

/// A partition in a list.
#[derive(Debug, Serialize)]
struct Listed {
    topic: String,
    partition: i32,
    leader: Option<i32>,
    leader_epoch: i32,
    replicas: Vec<i32>,
    in_sync: Vec<i32>,
    leaving: Vec<i32>,
    bytes: u64,
    error: Option<String>,
}

impl Row for Listed {
    const HEADINGS: &'static [&'static str] =
        &["TOPIC", "PARTITION", "LEADER", "REPLICAS", "IN-SYNC", "STATE", "EPOCH", "LEAVING", "SIZE"];
    const NARROW: usize = 6;

    fn cells(&self) -> Vec<String> {
        vec![
            self.topic.clone(),
            self.partition.to_string(),
            output::or_none(self.leader),
            output::numbers(&self.replicas),
            output::numbers(&self.in_sync),
            self.error.clone().unwrap_or_else(|| "ok".to_owned()),
            self.leader_epoch.to_string(),
            output::numbers(&self.leaving),
            output::bytes(self.bytes),
        ]
    }

    fn name(&self) -> String {
        format!("{}/{}", self.topic, self.partition)
    }
}

impl Shown for RebalancePlan {
    fn table(&self, wide: bool) -> String {
        let transfers = output::pairs([("leaderships to move", self.leader_transfers.to_string())]);
        format!("{transfers}\n{}", output::table_of(&self.moves, wide))
    }

    fn name(&self) -> String {
        self.moves.iter().map(Row::name).collect::<Vec<_>>().join("\n")
    }
}

impl Shown for RecoveredPartition {
    fn table(&self, _wide: bool) -> String {
        output::pairs([
            ("end offset", self.end_offset.to_string()),
            ("last epoch", self.last_epoch.to_string()),
            ("detail", self.detail.clone()),
        ])
    }

    fn name(&self) -> String {
        self.end_offset.to_string()
    }
}

pub(crate) async fn run(command: PartitionCommand, common: &Common) -> Outcome {
    let client = connect(common).await?;
    let admin = client.admin();
    match command {
        PartitionCommand::List(args) => list(&admin, &args, common.output).await,
        PartitionCommand::Move(args) => move_partition(&admin, &args, common.output).await,
        PartitionCommand::CancelMove(PlaceArgs { topic, partition }) => {
            admin.cancel_move(&topic, partition).await?;
            say(format_args!("{topic}/{partition} stays where it was"));
            Ok(())
        }
        PartitionCommand::TransferLeader(TransferArgs { place: PlaceArgs { topic, partition }, to }) => {
            let leader = admin.transfer_leader(&topic, partition, to).await?;
            say(format_args!("{topic}/{partition} is led by broker {leader}"));
            Ok(())
        }
        PartitionCommand::Rebalance(args) => rebalance(&admin, &args, common.output).await,
        PartitionCommand::Recover(args) => recover(&admin, &args, common.output).await,
    }
}

async fn list(admin: &Admin, args: &ListArgs, format: Format) -> Outcome {
    if args.moving {
        return output::print(format, &List(admin.list_moves().await?));
    }
    let names = if args.topics.is_empty() {
        let topics = if args.internal { admin.list_all_topics().await? } else { admin.list_topics().await? };
        topics.into_iter().map(|topic| topic.name).collect()
    } else {
        args.topics.clone()
    };
    let mut listed = Vec::new();
    for name in names {
        let topic = match admin.describe_topic(&name).await {
            Ok(topic) => topic,
            // Deleted since the list was made.
            Err(error) if error.is_not_found() && args.topics.is_empty() => continue,
            Err(error) => return Err(error.into()),
        };
        listed.extend(topic.partitions.into_iter().map(|partition| Listed {
            topic: topic.name.clone(),
            partition: partition.partition,
            leader: partition.leader,
            leader_epoch: partition.leader_epoch,
            replicas: partition.replicas,
            in_sync: partition.in_sync,
            leaving: partition.leaving,
            bytes: partition.log_bytes,
            error: partition.error,
        }));
    }
    output::print(format, &List(listed))
}

async fn move_partition(admin: &Admin, args: &MoveArgs, format: Format) -> Outcome {
    let (topic, partition) = (args.place.topic.as_str(), args.place.partition);
    let to = output::numbers(&args.to);
    if args.dry_run {
        let described = admin.describe_topic(topic).await?;
        let there = described.partitions.iter().find(|known| known.partition == partition).ok_or_else(|| {
            let last = described.partitions.len().saturating_sub(1);
            Failure::new(Exit::NotFound, format!("there is no partition {partition}: {topic} has 0 to {last}"))
        })?;
        let (from, size) = (output::numbers(&there.replicas), output::bytes(there.log_bytes));
        say(format_args!("{topic}/{partition} with {size} would move from {from} to {to}"));
        return Ok(());
    }
    let planned = admin.move_partition(topic, partition, &args.to).await?;
    if args.no_wait {
        say(format_args!("{topic}/{partition} moves; `flowstone partition list --moving` shows how far it is"));
        return if format == Format::Table { Ok(()) } else { output::print(format, &List(vec![planned])) };
    }
    moves::wait(admin, &Wanted { moves: std::slice::from_ref(&planned), empty: None }).await?;
    say(format_args!("{topic}/{partition} is on brokers {to}"));
    if format == Format::Table { Ok(()) } else { output::print(format, &List(vec![planned])) }
}

async fn rebalance(admin: &Admin, args: &RebalanceArgs, format: Format) -> Outcome {
    let plan = admin.plan_rebalance(args.leaders_only).await?;
    if args.dry_run {
        moves::tell_plan(&plan.moves);
        return output::print(format, &plan);
    }
    if plan.moves.is_empty() && plan.leader_transfers == 0 {
        say(format_args!("replicas and leaders are even already"));
        return Ok(());
    }
    let question = format!("Move {} partitions and {} leaderships?", plan.moves.len(), plan.leader_transfers);
    confirm(&question, args.yes)?;
    let plan = admin.rebalance(args.leaders_only).await?;
    let (moves, leaders) = (plan.moves.len(), plan.leader_transfers);
    if args.no_wait {
        say(format_args!("{moves} partitions move; `flowstone partition list --moving` shows how far they are"));
        return Ok(());
    }
    moves::wait(admin, &Wanted { moves: &plan.moves, empty: None }).await?;
    say(format_args!("{moves} partitions and {leaders} leaderships moved"));
    Ok(())
}

async fn recover(admin: &Admin, args: &RecoverArgs, format: Format) -> Outcome {
    let (topic, partition, from) = (args.place.topic.as_str(), args.place.partition, args.from);
    let planned = admin.plan_recovery(topic, partition, from).await?;
    if args.dry_run {
        say(format_args!("{topic}/{partition} would go on with what broker {from} has: {}", planned.detail));
        return output::print(format, &planned);
    }
    say(format_args!("what broker {from} has of {topic}/{partition}: {}", planned.detail));
    let question = format!(
        "Go on with offsets below {} of broker {from}, and give up for good whatever else was acknowledged?",
        planned.end_offset
    );
    confirm(&question, args.yes)?;
    let recovered = admin.recover_partition(topic, partition, from).await?;
    say(format_args!("{topic}/{partition} goes on at offset {}: {}", recovered.end_offset, recovered.detail));
    if format == Format::Table { Ok(()) } else { output::print(format, &recovered) }
}
