//! `flowstone broker-admin`: brokers that come and go.

use crate::args::Common;
use crate::connect::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::moves::{self, Wanted};
use crate::output::{self, Format, List};
use crate::stdio::{confirm, say};
use clap::{Args, Subcommand};
use flowstone_client::{Admin, BrokerHealth, PlannedMove};

/// Look after the brokers of a cluster
#[derive(Debug, Subcommand)]
pub(crate) enum BrokerAdminCommand {
    /// The brokers there are, and how they are
    List,
    /// Move every replica away from a broker, which goes on serving until it has none
    Drain(DrainArgs),
    /// Forget a broker that holds nothing any more
    Decommission(DecommissionArgs),
    /// Give every replica of a dead broker to another one
    Replace(ReplaceArgs),
}

#[derive(Args, Debug)]
pub(crate) struct DrainArgs {
    /// The broker's id
    broker: i32,
    /// Let it have replicas again; what has moved away stays where it is
    #[arg(long, conflicts_with = "dry_run")]
    undo: bool,
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
pub(crate) struct DecommissionArgs {
    /// The broker's id
    broker: i32,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
    /// Do not ask; only asked where stdin and stderr are a terminal
    #[arg(short, long)]
    yes: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ReplaceArgs {
    /// The dead broker's id
    old: i32,
    /// The id of the broker that takes over
    new: i32,
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

pub(crate) async fn run(command: BrokerAdminCommand, common: &Common) -> Outcome {
    let client = connect(common).await?;
    let admin = client.admin();
    match command {
        BrokerAdminCommand::List => output::print(common.output, &List(admin.cluster_health().await?.brokers)),
        BrokerAdminCommand::Drain(args) => drain(&admin, &args, common.output).await,
        BrokerAdminCommand::Decommission(args) => decommission(&admin, &args).await,
        BrokerAdminCommand::Replace(args) => replace(&admin, &args, common.output).await,
    }
}

/// A broker, by its id; one that does not exist is told before anything else.
async fn known(admin: &Admin, id: i32) -> Outcome<BrokerHealth> {
    let brokers = admin.cluster_health().await?.brokers;
    let ids: Vec<i32> = brokers.iter().map(|broker| broker.id).collect();
    brokers.into_iter().find(|broker| broker.id == id).ok_or_else(|| {
        Failure::new(Exit::NotFound, format!("there is no broker {id}; there are {}", output::numbers(&ids)))
    })
}

async fn drain(admin: &Admin, args: &DrainArgs, format: Format) -> Outcome {
    let id = args.broker;
    known(admin, id).await?;
    if args.undo {
        admin.undo_drain(id).await?;
        say(format_args!("broker {id} takes replicas again; `flowstone partition rebalance` gives it some"));
        return Ok(());
    }
    let planned = admin.plan_drain(id).await?;
    if args.dry_run {
        return show_plan(planned, format);
    }
    confirm(&format!("Move {} replicas away from broker {id}?", planned.len()), args.yes)?;
    let planned = admin.drain_broker(id).await?;
    if args.no_wait {
        say(format_args!("broker {id} is being drained; `flowstone partition list --moving` shows how far it is"));
        return Ok(());
    }
    moves::wait(admin, &Wanted { moves: &planned, empty: Some(id) }).await?;
    say(format_args!("broker {id} holds no replicas any more; `flowstone broker-admin decommission {id}` forgets it"));
    Ok(())
}

async fn decommission(admin: &Admin, args: &DecommissionArgs) -> Outcome {
    let id = args.broker;
    let broker = known(admin, id).await?;
    if args.dry_run {
        if broker.replicas > 0 {
            return Err(Failure::failed(format!(
                "broker {id} still holds {} replicas; `flowstone broker-admin drain {id}` moves them away",
                broker.replicas
            )));
        }
        say(format_args!("broker {id} at {} would be forgotten", broker.address));
        return Ok(());
    }
    confirm(&format!("Forget broker {id} at {}?", broker.address), args.yes)?;
    admin.decommission_broker(id).await?;
    say(format_args!("broker {id} is no part of the cluster any more; it can be stopped for good"));
    Ok(())
}

async fn replace(admin: &Admin, args: &ReplaceArgs, format: Format) -> Outcome {
    let ReplaceArgs { old, new, .. } = *args;
    known(admin, old).await?;
    known(admin, new).await?;
    let planned = admin.plan_replace(old, new).await?;
    if args.dry_run {
        return show_plan(planned, format);
    }
    let question = format!("Give the {} replicas of broker {old} to broker {new}?", planned.len());
    confirm(&question, args.yes)?;
    let planned = admin.replace_broker(old, new).await?;
    if args.no_wait {
        say(format_args!("broker {new} takes over; `flowstone partition list --moving` shows how far it is"));
        return Ok(());
    }
    moves::wait(admin, &Wanted { moves: &planned, empty: Some(old) }).await?;
    say(format_args!(
        "broker {new} has all that broker {old} had; `flowstone broker-admin decommission {old}` forgets it"
    ));
    Ok(())
}

fn show_plan(planned: Vec<PlannedMove>, format: Format) -> Outcome {
    moves::tell_plan(&planned);
    output::print(format, &List(planned))
}
