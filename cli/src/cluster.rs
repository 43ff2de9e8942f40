//! `flowstone cluster`.

use crate::args::Common;
use crate::connect::connect;
use crate::failure::{Failure, Outcome};
use crate::moment;
use crate::output::{self, Format, Row, Shown};
use crate::stdio::say;
use clap::{Args, Subcommand};
use flowstone_client::{
    Admin, BrokerDescription, BrokerHealth, BrokerState, ClusterDescription, ClusterHealth, PartitionHealth,
    PartitionProblem,
};
use std::time::Duration;

/// Time between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Ask about the cluster
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Its id, brokers and size
    Info,
    /// Brokers, and the partitions that are not as they should be; exit 0 only where none is
    Health(HealthArgs),
}

#[derive(Args, Debug)]
pub(crate) struct HealthArgs {
    /// Look every second until Ctrl-C, and print what changed; the exit code is that of the last look
    #[arg(long)]
    watch: bool,
}

impl Row for BrokerDescription {
    const HEADINGS: &'static [&'static str] = &["BROKER", "ADDRESS", "VERSION", "RACK"];
    const NARROW: usize = 3;

    fn cells(&self) -> Vec<String> {
        let rack = if self.rack.is_empty() { "-" } else { &self.rack };
        vec![self.id.to_string(), self.address.clone(), self.version.clone(), rack.to_owned()]
    }

    fn name(&self) -> String {
        self.id.to_string()
    }
}

impl Shown for ClusterDescription {
    fn table(&self, wide: bool) -> String {
        let mut pairs = vec![
            ("cluster", self.cluster_id.clone()),
            ("controller", output::or_none(self.controller)),
            ("topics", self.topics.to_string()),
            ("partitions", self.partitions.to_string()),
        ];
        if wide {
            pairs.push(("feature level", self.feature_level.to_string()));
            pairs.push(("answered by", format!("broker {}, up {}", self.answered_by, moment::span(self.uptime_ms))));
        }
        format!("{}\n{}", output::pairs(pairs), output::table_of(&self.brokers, wide))
    }

    fn name(&self) -> String {
        self.cluster_id.clone()
    }
}

impl Row for BrokerHealth {
    const HEADINGS: &'static [&'static str] = &[
        "BROKER",
        "STATE",
        "ADDRESS",
        "REPLICAS",
        "LEADERS",
        "DISK-FREE",
        "RACK",
        "PEER-ADDRESS",
        "VERSION",
        "DISK-TOTAL",
        "SILENT",
        "DETAIL",
    ];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        let state = match self.state {
            BrokerState::Alive => "alive",
            _ => "dead",
        };
        let rack = if self.rack.is_empty() { "-" } else { &self.rack };
        vec![
            self.id.to_string(),
            if self.draining { format!("{state},draining") } else { state.to_owned() },
            self.address.clone(),
            self.replicas.to_string(),
            self.leaders.to_string(),
            output::bytes(self.disk_free_bytes),
            rack.to_owned(),
            self.peer_address.clone(),
            self.version.clone(),
            output::bytes(self.disk_total_bytes),
            self.silent_ms.map_or_else(|| "never heard of".to_owned(), moment::span),
            if self.detail.is_empty() { "-".to_owned() } else { self.detail.clone() },
        ]
    }

    fn name(&self) -> String {
        self.id.to_string()
    }
}

impl Row for PartitionHealth {
    const HEADINGS: &'static [&'static str] =
        &["TOPIC", "PARTITION", "PROBLEM", "LEADER", "REPLICAS", "IN-SYNC", "DETAIL"];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        vec![
            self.topic.clone(),
            self.partition.to_string(),
            match self.problem {
                PartitionProblem::Leaderless => "leaderless",
                _ => "under-replicated",
            }
            .to_owned(),
            output::or_none(self.leader),
            output::numbers(&self.replicas),
            output::numbers(&self.in_sync),
            self.detail.clone(),
        ]
    }

    fn name(&self) -> String {
        format!("{}/{}", self.topic, self.partition)
    }
}

impl Shown for ClusterHealth {
    fn table(&self, wide: bool) -> String {
        let alive = self.brokers.iter().filter(|broker| broker.state == BrokerState::Alive).count();
        let pairs = output::pairs([
            ("healthy", if self.is_healthy() { "yes" } else { "no" }.to_owned()),
            ("controller", output::or_none(self.controller)),
            ("brokers", format!("{alive} of {} alive", self.brokers.len())),
            ("partitions", self.partitions_total.to_string()),
            ("under-replicated", self.under_replicated.to_string()),
            ("leaderless", self.leaderless.to_string()),
        ]);
        let mut text = format!("{pairs}\n{}", output::table_of(&self.brokers, wide));
        if !self.partitions.is_empty() {
            text.push('\n');
            text.push_str(&output::table_of(&self.partitions, wide));
        }
        text
    }

    fn name(&self) -> String {
        self.partitions.iter().map(Row::name).collect::<Vec<_>>().join("\n")
    }
}

pub(crate) async fn run(command: ClusterCommand, common: &Common) -> Outcome {
    let client = connect(common).await?;
    let admin = client.admin();
    match command {
        ClusterCommand::Info => output::print(common.output, &admin.describe_cluster().await?),
        ClusterCommand::Health(HealthArgs { watch: false }) => {
            let health = admin.cluster_health().await?;
            output::print(common.output, &health)?;
            verdict(&health)
        }
        ClusterCommand::Health(HealthArgs { watch: true }) => watch(&admin, common.output).await,
    }
}

/// What the exit code says.
fn verdict(health: &ClusterHealth) -> Outcome {
    if health.is_healthy() {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{} partitions are under-replicated and {} without a leader; the list says which brokers they wait for",
        health.under_replicated, health.leaderless
    )))
}

async fn watch(admin: &Admin, format: Format) -> Outcome {
    let mut last: Option<ClusterHealth> = None;
    loop {
        let looked = tokio::select! {
            looked = admin.cluster_health() => looked,
            _ = tokio::signal::ctrl_c() => break,
        };
        match looked {
            Ok(health) => {
                if last.as_ref().is_none_or(|last| changed(last, &health)) {
                    output::print(format, &health)?;
                    if matches!(format, Format::Table | Format::Wide) {
                        output::print_line("")?;
                    }
                }
                last = Some(health);
            }
            // It may be what is watched for: a cluster that nobody can ask just now.
            Err(error) => say(format_args!("{error}")),
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_EVERY) => {}
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    last.as_ref().map_or_else(|| Err(Failure::failed("interrupted before the first look")), verdict)
}

/// Whether there is something new to see: not for every byte on a disk, nor for every heartbeat.
fn changed(last: &ClusterHealth, now: &ClusterHealth) -> bool {
    let steady = |health: &ClusterHealth| {
        let brokers = health.brokers.iter().map(|broker| {
            (broker.id, broker.state, broker.draining, broker.replicas, broker.leaders, broker.address.clone())
        });
        let partitions = health
            .partitions
            .iter()
            .map(|partition| (Row::name(partition), partition.problem, partition.leader, partition.in_sync.clone()));
        (health.controller, health.partitions_total, brokers.collect::<Vec<_>>(), partitions.collect::<Vec<_>>())
    };
    steady(last) != steady(now)
}
