//! `flowstone cluster`.

use crate::args::Common;
use crate::connect::connect;
use crate::failure::Outcome;
use crate::moment;
use crate::output::{self, Row, Shown};
use clap::Subcommand;
use flowstone_client::{BrokerDescription, ClusterDescription};

/// Ask about the cluster
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Its id, brokers and size
    Info,
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
            ("controller", self.controller.map_or_else(|| "none".to_owned(), |id| id.to_string())),
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

pub(crate) async fn run(command: ClusterCommand, common: &Common) -> Outcome {
    let client = connect(common).await?;
    match command {
        ClusterCommand::Info => output::print(common.output, &client.admin().describe_cluster().await?),
    }
}
