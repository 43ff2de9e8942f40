//! The command line: what is common to all commands. Each command's own flags are in its file.

use crate::failure::{Failure, Outcome};
use crate::output::Format;
use crate::{
    bench, broker, broker_admin, cluster, completion, config, consume, debug, dev, group, moment, partition, produce,
    topic, txn, verify,
};
use clap::{Args, Parser, Subcommand};
use std::time::Duration;

/// The version and the commit that it was built from.
pub(crate) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("FLOWSTONE_COMMIT"), ")");

/// Where a broker listens unless told otherwise.
const DEFAULT_SERVER: &str = "127.0.0.1:7070";

/// Flowstone: a distributed commit log.
#[derive(Debug, Parser)]
#[command(
    name = "flowstone",
    version = VERSION,
    disable_help_subcommand = true,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 ok, 1 failed, 2 usage or invalid config, 3 not found, 4 unreachable or timed out, 5 denied."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Args, Clone, Debug)]
pub(crate) struct Common {
    /// Brokers to ask first, any of the cluster
    #[arg(
        long,
        global = true,
        value_name = "HOST:PORT[,...]",
        env = "FLOWSTONE_SERVER",
        default_value = DEFAULT_SERVER,
        help_heading = "Common options"
    )]
    pub(crate) server: String,

    /// How long to try before giving up: 10s, 500ms, 1m
    #[arg(long, global = true, value_name = "SPAN", default_value = "10s", value_parser = moment::parse_span,
          help_heading = "Common options")]
    pub(crate) timeout: Duration,

    /// Form of the output
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORM",
        help_heading = "Common options"
    )]
    pub(crate) output: Format,
}

impl Common {
    /// The addresses of `--server`, each checked, so that a mistake is a usage error rather than a failure to
    /// connect.
    pub(crate) fn servers(&self) -> Outcome<Vec<String>> {
        // A variable that is set to nothing is not set.
        let server = if self.server.is_empty() { DEFAULT_SERVER } else { &self.server };
        server.split(',').map(|server| check_server(server.trim())).collect::<Result<_, _>>().map_err(Failure::usage)
    }
}

/// `HOST:PORT`, an IPv6 address in brackets.
fn check_server(server: &str) -> Result<String, String> {
    let problem =
        |what: &str| Err(format!("--server `{server}` {what}; write HOST:PORT, as in localhost:7070 or [::1]:7070"));
    if server.contains("://") {
        return problem("is a URL");
    }
    let Some((host, port)) = server.rsplit_once(':') else {
        return problem("has no port");
    };
    if server.ends_with(']') {
        return problem("has no port");
    }
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.contains(':') && !bracketed {
        return problem("is an IPv6 address without brackets");
    }
    if bracketed && host[1..host.len() - 1].parse::<std::net::Ipv6Addr>().is_err() {
        return problem("has no IPv6 address in its brackets");
    }
    if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c == '/') {
        return problem("has no valid host");
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(server.to_owned()),
        _ => problem("has no valid port"),
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Dev(dev::DevArgs),
    Broker(broker::BrokerArgs),
    #[command(subcommand)]
    Topic(topic::TopicCommand),
    Produce(produce::ProduceArgs),
    Consume(consume::ConsumeArgs),
    #[command(subcommand)]
    Group(group::GroupCommand),
    #[command(subcommand)]
    Txn(txn::TxnCommand),
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    Verify(verify::VerifyArgs),
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    #[command(subcommand)]
    BrokerAdmin(broker_admin::BrokerAdminCommand),
    #[command(subcommand)]
    Partition(partition::PartitionCommand),
    #[command(subcommand)]
    Config(config::ConfigCommand),
    #[command(subcommand)]
    Debug(debug::DebugCommand),
    Completion(completion::CompletionArgs),
}

/// `key=value`, the value may hold further `=`.
///
/// # Errors
/// What is wrong with it, for a usage error.
pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write key=value".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_model_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn servers() {
        for server in ["localhost:7070", "127.0.0.1:1", "[::1]:7070", "broker-1.example.com:65535"] {
            assert_eq!(check_server(server).as_deref(), Ok(server));
        }
        for (server, part) in [
            ("localhost", "has no port"),
            ("[::1]", "has no port"),
            ("::1:7070", "without brackets"),
            ("::1", "without brackets"),
            ("[localhost]:7070", "no IPv6 address"),
            (":7070", "no valid host"),
            ("a b:7070", "no valid host"),
            ("host:0", "no valid port"),
            ("host:65536", "no valid port"),
            ("host:", "no valid port"),
            ("", "has no port"),
            ("http://host:7070", "URL"),
        ] {
            let error = check_server(server).expect_err(server);
            assert!(error.contains(part), "{server}: {error}");
        }
    }

    #[test]
    fn pairs_split_at_the_first_equals_sign() {
        assert_eq!(key_value("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(key_value("a="), Ok(("a".to_owned(), String::new())));
        assert!(key_value("a").is_err());
        assert!(key_value("=b").is_err());
    }
}
