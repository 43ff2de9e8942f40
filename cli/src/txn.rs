//! `flowstone txn`: transactions, and those that hang.

use crate::args::Common;
use crate::connect::connect;
use crate::failure::Outcome;
use crate::moment;
use crate::output::{self, List, Row, Shown};
use crate::stdio::{confirm, say};
use clap::{Args, Subcommand};
use flowstone_client::{TransactionDescription, TransactionState, TransactionSummary};
use std::time::Duration;

/// Look after transactions
#[derive(Debug, Subcommand)]
pub(crate) enum TxnCommand {
    /// All transactional ids, and what each is doing
    List(ListArgs),
    /// One transactional id: the partitions and groups of its transaction, and what it waits for
    Describe(IdArgs),
    /// Abort the open transaction of an id; its producer is cut off
    Abort(AbortArgs),
}

#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    /// Only those with a transaction that is open for longer than this: readers of committed records wait for it
    #[arg(long, value_name = "SPAN", value_parser = moment::parse_span)]
    hanging: Option<Duration>,
}

#[derive(Args, Debug)]
pub(crate) struct IdArgs {
    /// The transactional id
    id: String,
}

#[derive(Args, Debug)]
pub(crate) struct AbortArgs {
    /// The transactional id
    id: String,
    /// Do not ask; only asked where stdin and stderr are a terminal
    #[arg(short, long)]
    yes: bool,
}

fn state(state: TransactionState) -> &'static str {
    match state {
        TransactionState::Ongoing => "ongoing",
        TransactionState::PrepareCommit => "committing",
        TransactionState::PrepareAbort => "aborting",
        TransactionState::CompleteCommit => "committed",
        TransactionState::CompleteAbort => "aborted",
        _ => "empty",
    }
}

fn open_for(started_at: Option<i64>) -> String {
    started_at.map_or_else(|| "-".to_owned(), |at| moment::span(moment::now_ms().saturating_sub(at).max(0)))
}

impl Row for TransactionSummary {
    const HEADINGS: &'static [&'static str] =
        &["ID", "STATE", "OPEN-FOR", "PARTITIONS", "TIMEOUT", "PRODUCER", "EPOCH"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        vec![
            self.transactional_id.clone(),
            state(self.state).to_owned(),
            open_for(self.started_at),
            self.partitions.to_string(),
            moment::span(self.timeout_ms.into()),
            self.producer_id.to_string(),
            self.producer_epoch.to_string(),
        ]
    }

    fn name(&self) -> String {
        self.transactional_id.clone()
    }
}

impl Shown for TransactionDescription {
    fn table(&self, wide: bool) -> String {
        let summary = &self.summary;
        let places = |partitions: &[flowstone_client::MemberPartition]| {
            let names: Vec<_> = partitions.iter().map(|place| format!("{}/{}", place.topic, place.partition)).collect();
            if names.is_empty() { "-".to_owned() } else { names.join(" ") }
        };
        let mut pairs = vec![
            ("transactional id", summary.transactional_id.clone()),
            ("state", state(summary.state).to_owned()),
            ("open for", open_for(summary.started_at)),
            ("timeout", moment::span(summary.timeout_ms.into())),
            ("partitions", places(&self.written)),
            ("groups", if self.groups.is_empty() { "-".to_owned() } else { self.groups.join(" ") }),
            ("not told yet", places(&self.pending)),
        ];
        if wide {
            pairs.push(("producer id", summary.producer_id.to_string()));
            pairs.push(("producer epoch", summary.producer_epoch.to_string()));
            pairs.push(("coordinator", format!("broker {}", self.coordinator)));
        }
        output::pairs(pairs)
    }

    fn name(&self) -> String {
        self.summary.transactional_id.clone()
    }
}

pub(crate) async fn run(command: TxnCommand, common: &Common) -> Outcome {
    let client = connect(common).await?;
    let admin = client.admin();
    match command {
        TxnCommand::List(ListArgs { hanging }) => {
            output::print(common.output, &List(admin.list_transactions(hanging).await?))
        }
        TxnCommand::Describe(IdArgs { id }) => output::print(common.output, &admin.describe_transaction(&id).await?),
        TxnCommand::Abort(AbortArgs { id, yes }) => {
            let described = admin.describe_transaction(&id).await?;
            confirm(
                &format!(
                    "Abort the transaction of {id} in {} partitions, and cut its producer off?",
                    described.summary.partitions
                ),
                yes,
            )?;
            admin.abort_transaction(&id).await?;
            say(format_args!("the transaction of {id} is aborted"));
            Ok(())
        }
    }
}
