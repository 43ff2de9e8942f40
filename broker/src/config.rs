//! The broker's configuration: defaults, then a TOML file, then `FLOWSTONE_SECTION__KEY` of the environment, then
//! `--set section.key=value`; the last one wins, and [`Config::explain`] tells which it was.
//!
//! Every key is one row of [`KEYS`]: its name, default, meaning, how it is set and shown. The reference in
//! `docs/operating.md` is that table.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use config::{FileFormat, Source, ValueKind};
use flowstone_protocol::BrokerId;
use flowstone_storage::DECOMPRESSED_BYTES_MAX;

use crate::topic_config::{self, TOPIC_KEYS, TopicConfig, TopicOverrides};
use crate::units::{did_you_mean, parse_bytes, parse_duration, show_bytes, show_duration};

/// Prefix of the environment's config variables; only those that also hold `__` are config.
const ENV_PREFIX: &str = "FLOWSTONE_";
/// Room that a request needs beside its batch: protobuf framing and the other fields.
const REQUEST_OVERHEAD_BYTES: usize = 1 << 10;

/// What a broker runs with. Built by [`Config::load`] or [`Config::dev`]; fields may then be changed by a program
/// that embeds a broker, and are checked again at start.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// This broker.
    pub node: NodeConfig,
    /// Addresses bound.
    pub listen: Addresses,
    /// Addresses that others are told, where they differ; empty: as bound.
    pub advertise: Addresses,
    /// The cluster.
    pub cluster: ClusterConfig,
    /// Access.
    pub security: SecurityConfig,
    /// Disks and threads.
    pub storage: StorageConfig,
    /// Written maxima.
    pub limits: LimitsConfig,
    /// Consumer groups.
    pub group: GroupConfig,
    /// Transactions.
    pub transaction: TransactionConfig,
    /// Producers that write to this broker's partitions.
    pub producer: ProducerConfig,
    /// Defaults of topics' configuration, canonical values by Kafka's keys.
    pub topic: TopicOverrides,
    /// Logging.
    pub log: LogConfig,
    /// Where each value that is no default came from, by key.
    origins: Vec<(String, Origin)>,
}

/// Section `[node]`.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeConfig {
    /// Unique in the cluster.
    pub id: BrokerId,
    /// Folder of everything the broker keeps.
    pub data_dir: PathBuf,
    /// Failure domain; may be empty.
    pub rack: String,
}

/// Sections `[listen]` and `[advertise]`: `host:port`, IPv6 hosts in brackets.
#[derive(Clone, Debug, PartialEq)]
pub struct Addresses {
    /// gRPC for clients.
    pub client: String,
    /// gRPC among brokers.
    pub peer: String,
    /// HTTP for probes and metrics.
    pub admin: String,
}

/// Section `[cluster]`.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterConfig {
    /// Peer addresses of the brokers that form the cluster; empty or this broker's own: a cluster of one.
    pub seeds: Vec<String>,
    /// Whether leaderships go back by themselves to the replicas that were meant to lead.
    pub preferred_leaders: bool,
    /// Partitions of each topic behind coordinators, when it is made.
    pub internal_partitions: u32,
}

/// Section `[security]`.
#[derive(Clone, Debug, PartialEq)]
pub struct SecurityConfig {
    /// Allows listeners off loopback although there is neither TLS nor login.
    pub insecure: bool,
}

/// Section `[storage]`.
#[derive(Clone, Debug, PartialEq)]
pub struct StorageConfig {
    /// Threads that run replicas; 0: half of the machine's cores.
    pub shards: usize,
    /// Threads that flush.
    pub flush_threads: usize,
    /// Threads that read what is not cached.
    pub read_threads: usize,
    /// Free bytes of the data directory's file system below which producing is refused.
    pub free_bytes_min: u64,
    /// Bytes that clients may have under way to the logs; producers wait above it.
    pub in_flight_bytes_max: usize,
}

/// Section `[limits]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LimitsConfig {
    /// Client connections.
    pub connections: usize,
    /// Client connections from one address.
    pub connections_per_address: usize,
    /// Open calls of one connection.
    pub streams_per_connection: u32,
    /// Largest message of Produce.
    pub request_bytes: usize,
    /// Largest message of any other call than Produce.
    pub admin_request_bytes: usize,
    /// Bytes of all clients' messages that are being received, or wait to be taken.
    pub receiving_bytes: usize,
    /// Time in which a client that has begun a message must send the rest of it, or another MiB.
    pub message_timeout: Duration,
    /// Headers of one call.
    pub header_bytes: u32,
    /// Time in which a connection must have sent its HTTP/2 preface.
    pub handshake_timeout: Duration,
    /// Time after which a connection without a call is closed.
    pub idle_timeout: Duration,
    /// Age at which a connection is asked to go; calls on it end by themselves.
    pub connection_age: Duration,
    /// Silence after which the broker pings.
    pub keepalive_interval: Duration,
    /// Silence after that ping which ends the connection.
    pub keepalive_timeout: Duration,
    /// HTTP/2 flow control window of one call.
    pub stream_window_bytes: u32,
    /// HTTP/2 flow control window of one connection.
    pub connection_window_bytes: u32,
    /// Calls that a peer may reset before it is cut off.
    pub pending_reset_streams: usize,
    /// Aim for one fetch response; one batch may be larger.
    pub fetch_response_bytes: usize,
    /// Partitions of one fetch stream.
    pub fetch_partitions: usize,
    /// Queries of one ListOffsets call and names of one Metadata call.
    pub queries_per_request: usize,
    /// Bytes that one batch may decompress to.
    pub decompressed_bytes: usize,
    /// Records of one batch.
    pub records_per_batch: u32,
    /// Topics of the cluster.
    pub topics: usize,
    /// Partitions of one topic.
    pub partitions_per_topic: u32,
    /// Partitions of the cluster.
    pub partitions: usize,
    /// Partitions that have series of their own in `/metrics`.
    pub metrics_partitions: usize,
    /// Open files to ask of the system.
    pub open_files: u64,
    /// Silence after which the controller takes a broker for dead.
    pub broker_session_timeout: Duration,
    /// Bytes per second that this broker pulls from others for replicas that are new, far behind or damaged.
    pub pull_bytes_per_second: u64,
    /// Pulls of other brokers that are served side by side.
    pub pulls_served: usize,
    /// Bytes per second of old segments that are read again to find rot; 0: none.
    pub scrub_bytes_per_second: u64,
    /// Bytes per second that compaction reads and writes; 0: none.
    pub compaction_bytes_per_second: u64,
    /// What passes of compaction may take, all together, for the keys that they look at.
    pub compaction_memory: u64,
}

/// Section `[group]`: consumer groups.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupConfig {
    /// Silence after which a member is removed, where it does not say.
    pub session_timeout: Duration,
    /// The shortest that a member may ask for.
    pub session_timeout_min: Duration,
    /// The longest that a member may ask for.
    pub session_timeout_max: Duration,
    /// How often members are told to speak.
    pub heartbeat_interval: Duration,
    /// Time in which a member gives up what it was asked for, where it does not say.
    pub rebalance_timeout: Duration,
    /// Of groups whose members name none.
    pub assignor: String,
    /// Members of one group.
    pub members: usize,
    /// Groups of one partition of `__consumer_offsets`.
    pub groups_per_partition: usize,
    /// Offsets of one group.
    pub offsets: usize,
    /// How long an empty group keeps its offsets.
    pub offsets_retention: Duration,
}

/// Section `[transaction]`.
#[derive(Clone, Debug, PartialEq)]
pub struct TransactionConfig {
    /// The longest that a transaction may be open.
    pub max_timeout: Duration,
    /// A transactional id that was not used for so long is forgotten.
    pub id_expiration: Duration,
    /// Transactional ids of one partition of `__transaction_state`.
    pub ids_per_partition: usize,
}

/// Section `[producer]`.
#[derive(Clone, Debug, PartialEq)]
pub struct ProducerConfig {
    /// An idempotent producer that wrote nothing to a partition for so long is forgotten there.
    pub id_expiration: Duration,
}

/// Section `[log]`: the broker's own messages.
#[derive(Clone, Debug, PartialEq)]
pub struct LogConfig {
    /// Filter directives, as in `info,flowstone_broker=debug`.
    pub level: String,
    /// Form of a line.
    pub format: LogFormat,
}

/// Form of the broker's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    /// Text.
    Text,
    /// JSON, one object a line.
    Json,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Default,
    /// A config file.
    File(PathBuf),
    /// A variable of the environment.
    Env(String),
    /// `--set` on the command line.
    Set,
    /// The program that embeds the broker, or `flowstone dev`.
    Program,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File(path) => write!(f, "file {}", path.display()),
            Origin::Env(name) => write!(f, "env {name}"),
            Origin::Set => f.write_str("--set"),
            Origin::Program => f.write_str("program"),
        }
    }
}

/// One row of [`Config::explain`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explained {
    /// `section.key`.
    pub key: String,
    /// Effective value, in the form that the config takes.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the config file {}: {source}; check the path and its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("the config file {} is not valid TOML: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A key that does not exist.
    #[error("unknown config key `{key}` ({origin}){}", suggestion.as_ref().map_or_else(
        || "; `flowstone config explain` lists all keys".to_owned(), |near| format!("; did you mean `{near}`?")))]
    UnknownKey {
        /// The key, as written.
        key: String,
        /// Where it was written.
        origin: Origin,
        /// The nearest known key.
        suggestion: Option<String>,
    },
    /// A value that its key does not take.
    #[error("config {key} = `{value}` ({origin}): {reason}")]
    Invalid {
        /// The key.
        key: String,
        /// The value, as written.
        value: String,
        /// Where it was written.
        origin: Origin,
        /// What is wrong and what to write.
        reason: String,
    },
    /// Values that contradict each other.
    #[error("{0}")]
    Conflict(String),
}

/// One key of the configuration; the table of them is the reference.
pub struct Key {
    /// `section.key`.
    pub name: &'static str,
    /// Default, in the form that the config takes.
    pub default: &'static str,
    /// What it does.
    pub doc: &'static str,
    set: fn(&mut Config, &str) -> Result<(), String>,
    show: fn(&Config) -> String,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("name", &self.name).field("default", &self.default).finish_non_exhaustive()
    }
}

/// A row of [`KEYS`] over one field, by how its values are read and shown.
macro_rules! key {
    ($name:literal, $default:literal, $($field:ident).+, $read:expr, $show:expr, $doc:literal) => {
        Key {
            name: $name,
            default: $default,
            doc: $doc,
            set: |config, text| {
                config.$($field).+ = $read(text)?;
                Ok(())
            },
            show: |config| $show(&config.$($field).+),
        }
    };
}

/// Every key, topic defaults (`topic.<topic config>`) aside.
pub const KEYS: &[Key] = &[
    key!("node.id", "1", node.id, broker_id, shown, "This broker's number, unique in the cluster and never changed."),
    key!("node.data_dir", "data", node.data_dir, path, shown_path, "Folder of everything that the broker keeps."),
    key!("node.rack", "", node.rack, text, shown, "Failure domain of this broker."),
    key!("listen.client", "127.0.0.1:7070", listen.client, address, shown, "Where clients connect (gRPC)."),
    key!("listen.peer", "127.0.0.1:7071", listen.peer, address, shown, "Where other brokers connect (gRPC)."),
    key!("listen.admin", "127.0.0.1:7072", listen.admin, address, shown, "`/livez`, `/readyz`, `/metrics` (HTTP)."),
    key!("advertise.client", "", advertise.client, advertised, shown, "What clients are told, if not `listen.client`."),
    key!("advertise.peer", "", advertise.peer, advertised, shown, "What brokers are told, if not `listen.peer`."),
    key!("advertise.admin", "", advertise.admin, advertised, shown, "What others are told, if not `listen.admin`."),
    key!(
        "cluster.seeds",
        "",
        cluster.seeds,
        addresses,
        shown_list,
        "Peer addresses that form the cluster, the same list on every broker; empty or only this broker's own: a cluster of one."
    ),
    key!(
        "cluster.preferred_leaders",
        "true",
        cluster.preferred_leaders,
        parsed,
        shown,
        "Leaderships go back by themselves to the first replica of each partition once that has caught up."
    ),
    key!(
        "cluster.internal_partitions",
        "50",
        cluster.internal_partitions,
        positive32,
        shown,
        "Partitions of `__consumer_offsets` and `__transaction_state`, each when it is first used; fixed afterwards."
    ),
    key!(
        "security.insecure",
        "false",
        security.insecure,
        parsed,
        shown,
        "Allows listeners off loopback although there is no TLS and no login yet."
    ),
    key!(
        "storage.shards",
        "0",
        storage.shards,
        parsed,
        shown,
        "Threads that run partitions; 0: half of the machine's cores."
    ),
    key!("storage.flush_threads", "16", storage.flush_threads, positive, shown, "Flushes that run side by side."),
    key!("storage.read_threads", "4", storage.read_threads, positive, shown, "Reads from disk that run side by side."),
    key!(
        "storage.free_bytes_min",
        "16 MiB",
        storage.free_bytes_min,
        parse_bytes,
        size_u64,
        "Free bytes on the data directory's file system below which producing is refused until there is room."
    ),
    key!(
        "storage.in_flight_bytes_max",
        "128 MiB",
        storage.in_flight_bytes_max,
        size,
        size_usize,
        "Bytes of clients' batches received and not yet answered; producers wait above it."
    ),
    key!("limits.connections", "1024", limits.connections, positive, shown, "Client connections."),
    key!(
        "limits.connections_per_address",
        "512",
        limits.connections_per_address,
        positive,
        shown,
        "Client connections from one address."
    ),
    key!(
        "limits.streams_per_connection",
        "256",
        limits.streams_per_connection,
        positive32,
        shown,
        "Open calls of one connection."
    ),
    key!(
        "limits.request_bytes",
        "16 MiB",
        limits.request_bytes,
        size,
        size_usize,
        "Largest message of `Produce`; a topic's `max.message.bytes` stays 1 KiB below."
    ),
    key!(
        "limits.admin_request_bytes",
        "1 MiB",
        limits.admin_request_bytes,
        size,
        size_usize,
        "Largest message of any other call than `Produce`."
    ),
    key!(
        "limits.receiving_bytes",
        "256 MiB",
        limits.receiving_bytes,
        size,
        size_usize,
        "Bytes of all clients' messages above 64 KiB that are being received or wait to be taken; clients wait above it. At least twice `limits.request_bytes`."
    ),
    key!(
        "limits.message_timeout",
        "30s",
        limits.message_timeout,
        positive_duration,
        shown_duration,
        "Time in which a client that has begun a message must send the rest of it, or another MiB."
    ),
    key!("limits.header_bytes", "16 KiB", limits.header_bytes, size32, size_u32, "Headers of one call."),
    key!(
        "limits.handshake_timeout",
        "5s",
        limits.handshake_timeout,
        positive_duration,
        shown_duration,
        "Time in which a connection must have begun to speak HTTP/2."
    ),
    key!(
        "limits.idle_timeout",
        "10m",
        limits.idle_timeout,
        positive_duration,
        shown_duration,
        "Time after which a connection without an open call is closed."
    ),
    key!(
        "limits.connection_age",
        "1d",
        limits.connection_age,
        positive_duration,
        shown_duration,
        "Age at which a connection is asked to go; its open calls go on, new ones take another."
    ),
    key!(
        "limits.keepalive_interval",
        "20s",
        limits.keepalive_interval,
        positive_duration,
        shown_duration,
        "Silence after which a connection is pinged."
    ),
    key!(
        "limits.keepalive_timeout",
        "20s",
        limits.keepalive_timeout,
        positive_duration,
        shown_duration,
        "Time to answer that ping."
    ),
    key!(
        "limits.stream_window_bytes",
        "4 MiB",
        limits.stream_window_bytes,
        window,
        size_u32,
        "HTTP/2 window of one call: bytes that a client may send ahead."
    ),
    key!(
        "limits.connection_window_bytes",
        "8 MiB",
        limits.connection_window_bytes,
        window,
        size_u32,
        "HTTP/2 window of one connection."
    ),
    key!(
        "limits.pending_reset_streams",
        "64",
        limits.pending_reset_streams,
        positive,
        shown,
        "Calls that a client may have reset before they were accepted; above it, it is cut off."
    ),
    key!(
        "limits.fetch_response_bytes",
        "256 KiB",
        limits.fetch_response_bytes,
        size,
        size_usize,
        "Aim for one fetch response; a larger batch goes alone."
    ),
    key!(
        "limits.fetch_partitions",
        "10000",
        limits.fetch_partitions,
        positive,
        shown,
        "Partitions of one fetch stream."
    ),
    key!(
        "limits.queries_per_request",
        "10000",
        limits.queries_per_request,
        positive,
        shown,
        "Partitions of one ListOffsets call, names of one Metadata call."
    ),
    key!(
        "limits.decompressed_bytes",
        "64 MiB",
        limits.decompressed_bytes,
        decompressed_size,
        size_usize,
        "Bytes that one batch may decompress to: at most 256 MiB."
    ),
    key!("limits.records_per_batch", "1000000", limits.records_per_batch, positive32, shown, "Records of one batch."),
    key!("limits.topics", "10000", limits.topics, positive, shown, "Topics of the cluster."),
    key!(
        "limits.partitions_per_topic",
        "10000",
        limits.partitions_per_topic,
        positive32,
        shown,
        "Partitions of one topic."
    ),
    key!("limits.partitions", "20000", limits.partitions, positive, shown, "Partitions of the cluster."),
    key!(
        "limits.metrics_partitions",
        "1000",
        limits.metrics_partitions,
        parsed,
        shown,
        "Partitions with series of their own in `/metrics`; the rest only count in the totals."
    ),
    key!(
        "limits.open_files",
        "1048576",
        limits.open_files,
        parsed,
        shown,
        "Open files asked of the system at start (as many as its hard limit gives)."
    ),
    key!(
        "limits.broker_session_timeout",
        "6s",
        limits.broker_session_timeout,
        positive_duration,
        shown_duration,
        "Silence after which the controller takes a broker for dead: it is given nothing new until it is back. Leaderships move long before, by themselves."
    ),
    key!(
        "limits.pull_bytes_per_second",
        "64 MiB",
        limits.pull_bytes_per_second,
        size64,
        size_u64,
        "Bytes per second that this broker pulls from others for replicas that are new, far behind or damaged, so that serving goes on."
    ),
    key!(
        "limits.pulls_served",
        "16",
        limits.pulls_served,
        positive,
        shown,
        "Pulls of other brokers that this one serves side by side; more wait."
    ),
    key!(
        "limits.scrub_bytes_per_second",
        "4 MiB",
        limits.scrub_bytes_per_second,
        parse_bytes,
        size_u64,
        "Bytes per second of old segments that are read again in the background to find rot; 0: none."
    ),
    key!(
        "limits.compaction_bytes_per_second",
        "64 MiB",
        limits.compaction_bytes_per_second,
        parse_bytes,
        size_u64,
        "Bytes per second that the compaction of topics with `cleanup.policy=compact` reads and writes; 0: nothing is compacted."
    ),
    key!(
        "limits.compaction_memory",
        "64 MiB",
        limits.compaction_memory,
        size64,
        size_u64,
        "Memory for the keys that compaction looks at in one pass, some 30 bytes each; with less, a pass cleans less."
    ),
    key!(
        "group.session_timeout",
        "10s",
        group.session_timeout,
        positive_duration,
        shown_duration,
        "Silence after which a member of a consumer group is removed, where it does not say."
    ),
    key!(
        "group.session_timeout_min",
        "1s",
        group.session_timeout_min,
        positive_duration,
        shown_duration,
        "The shortest session timeout that a member may ask for."
    ),
    key!(
        "group.session_timeout_max",
        "30m",
        group.session_timeout_max,
        positive_duration,
        shown_duration,
        "The longest session timeout that a member may ask for."
    ),
    key!(
        "group.heartbeat_interval",
        "3s",
        group.heartbeat_interval,
        positive_duration,
        shown_duration,
        "How often members are told to send a heartbeat; never more seldom than a third of their session timeout."
    ),
    key!(
        "group.rebalance_timeout",
        "1m",
        group.rebalance_timeout,
        positive_duration,
        shown_duration,
        "Time in which a member gives partitions up that it was asked for, where it does not say; past it, it is removed."
    ),
    key!(
        "group.assignor",
        "cooperative",
        group.assignor,
        assignor,
        shown,
        "Assignor of groups whose members name none: `range`, `roundrobin`, `sticky` or `cooperative`."
    ),
    key!("group.members", "10000", group.members, positive, shown, "Members of one consumer group."),
    key!(
        "group.groups_per_partition",
        "10000",
        group.groups_per_partition,
        positive,
        shown,
        "Consumer groups of one partition of `__consumer_offsets`."
    ),
    key!(
        "group.offsets",
        "100000",
        group.offsets,
        positive,
        shown,
        "Committed offsets of one consumer group, those in open transactions included."
    ),
    key!(
        "group.offsets_retention",
        "7d",
        group.offsets_retention,
        positive_duration,
        shown_duration,
        "How long a consumer group without members keeps its committed offsets."
    ),
    key!(
        "transaction.max_timeout",
        "15m",
        transaction.max_timeout,
        positive_duration,
        shown_duration,
        "The longest timeout that a transactional producer may ask for."
    ),
    key!(
        "transaction.id_expiration",
        "7d",
        transaction.id_expiration,
        positive_duration,
        shown_duration,
        "A transactional id without an open transaction is forgotten after this long without use."
    ),
    key!(
        "transaction.ids_per_partition",
        "100000",
        transaction.ids_per_partition,
        positive,
        shown,
        "Transactional ids of one partition of `__transaction_state`."
    ),
    key!(
        "producer.id.expiration.ms",
        "1d",
        producer.id_expiration,
        positive_duration,
        shown_duration,
        "What a partition remembers of an idempotent producer is forgotten after this long without a write of it; a producer that goes on later is told `PRODUCER_EXPIRED`."
    ),
    key!(
        "log.level",
        "info",
        log.level,
        text,
        shown,
        "The broker's own messages: `error`, `warn`, `info`, `debug`, `trace`, or per module as in `info,flowstone_broker=debug`."
    ),
    key!(
        "log.format",
        "auto",
        log.format,
        log_format,
        shown_format,
        "`text`, `json`, or `auto`: text on a terminal, else JSON."
    ),
];

impl Config {
    /// Reads the file (if any), the environment's variables (pass `std::env::vars()`) and `--set key=value` texts.
    ///
    /// # Errors
    /// The first thing that is wrong, with where it was written and what to write instead.
    pub fn load(
        file: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
        sets: &[String],
    ) -> Result<Config, ConfigError> {
        let mut config = Config::built_in();
        if let Some(path) = file {
            for (key, value) in read_file(path)? {
                config.set(&key, &value, Origin::File(path.to_owned()))?;
            }
        }
        for (name, value) in env {
            if let Some(key) = env_key(&name) {
                let key = key_of_env(&key).unwrap_or(key);
                config.set(&key, &value, Origin::Env(name))?;
            }
        }
        for assignment in sets {
            let Some((key, value)) = assignment.split_once('=') else {
                return Err(ConfigError::Invalid {
                    key: assignment.clone(),
                    value: String::new(),
                    origin: Origin::Set,
                    reason: "write --set section.key=value".to_owned(),
                });
            };
            config.set(key.trim(), value.trim(), Origin::Set)?;
        }
        config.check()?;
        Ok(config)
    }

    /// One broker on loopback: clients at `port`, peers at `port + 1`, admin at `port + 2`; port 0 lets the system
    /// choose each.
    pub fn dev(data_dir: impl Into<PathBuf>, port: u16) -> Config {
        let mut config = Config::built_in();
        let at = |ahead: u16| format!("127.0.0.1:{}", if port == 0 { 0 } else { port.saturating_add(ahead) });
        config.node.data_dir = data_dir.into();
        config.listen = Addresses { client: at(0), peer: at(1), admin: at(2) };
        for key in ["node.data_dir", "listen.client", "listen.peer", "listen.admin"] {
            config.origins.push((key.to_owned(), Origin::Program));
        }
        config
    }

    /// Sets one key, as `--set` does; for programs that embed a broker.
    ///
    /// # Errors
    /// An unknown key, or a value that it does not take.
    pub fn set_key(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        self.set(key, value, Origin::Program)
    }

    /// Every key with its effective value and where that came from, in the order of the reference.
    pub fn explain(&self) -> Vec<Explained> {
        let origin = |key: &str| {
            self.origins.iter().rev().find(|(known, _)| known == key).map_or(Origin::Default, |(_, o)| o.clone())
        };
        let fixed = KEYS.iter().map(|key| Explained {
            key: key.name.to_owned(),
            value: (key.show)(self),
            origin: origin(key.name),
        });
        let topics = TOPIC_KEYS.iter().map(|key| {
            let name = format!("topic.{}", key.name);
            let value = self.topic.get(key.name).map_or(key.default, String::as_str).to_owned();
            let origin = origin(&name);
            Explained { key: name, value, origin }
        });
        fixed.chain(topics).collect()
    }

    /// Checks what no single key can: addresses against `security.insecure`, topic defaults against limits.
    ///
    /// # Errors
    /// [`ConfigError::Conflict`] with what to change.
    pub fn check(&self) -> Result<(), ConfigError> {
        let conflict = |text: String| Err(ConfigError::Conflict(text));
        let listeners = [
            ("client", &self.listen.client, &self.advertise.client),
            ("peer", &self.listen.peer, &self.advertise.peer),
            ("admin", &self.listen.admin, &self.advertise.admin),
        ];
        for (name, listen, advertise) in listeners {
            let (host, _) = split_address(listen)
                .map_err(|reason| ConfigError::Conflict(format!("listen.{name} = `{listen}`: {reason}")))?;
            let off_loopback = match host.parse::<IpAddr>() {
                Ok(ip) => !ip.is_loopback(),
                Err(_) => !host.eq_ignore_ascii_case("localhost"),
            };
            if off_loopback && !self.security.insecure {
                return conflict(format!(
                    "listen.{name} = `{listen}` is off loopback, and there is no TLS and no login yet: whoever reaches \
                     it can read, write and delete everything; listen on 127.0.0.1 or [::1], or set \
                     security.insecure = true where the network keeps others out"
                ));
            }
            // Nobody is told the admin listener's address, so only the other two must be reachable as advertised.
            if advertise.is_empty() && is_unspecified(&host) && name != "admin" {
                return conflict(format!(
                    "listen.{name} = `{listen}` listens on every address, so others cannot be told it; set \
                     advertise.{name} to the address by which they reach this broker"
                ));
            }
        }
        if self.batch_bytes_max() == 0 {
            return conflict(format!("limits.request_bytes must be above {REQUEST_OVERHEAD_BYTES} bytes"));
        }
        if self.limits.receiving_bytes < 2 * self.limits.request_bytes {
            return conflict(format!(
                "limits.receiving_bytes ({}) is below twice limits.request_bytes ({}): large messages would wait for each \
                 other; raise the one or lower the other",
                self.limits.receiving_bytes, self.limits.request_bytes
            ));
        }
        if self.limits.connection_window_bytes < self.limits.stream_window_bytes {
            return conflict(format!(
                "limits.connection_window_bytes ({}) is below limits.stream_window_bytes ({}); raise the one or lower \
                 the other",
                self.limits.connection_window_bytes, self.limits.stream_window_bytes
            ));
        }
        let (shortest, longest) = (self.group.session_timeout_min, self.group.session_timeout_max);
        if !(shortest..=longest).contains(&self.group.session_timeout) {
            return conflict(format!(
                "group.session_timeout ({}) is not within group.session_timeout_min ({}) and group.session_timeout_max \
                 ({}); move one of them",
                show_duration(self.group.session_timeout),
                show_duration(shortest),
                show_duration(longest)
            ));
        }
        let mut seeds = self.cluster.seeds.clone();
        seeds.sort();
        if let Some(twice) = seeds.windows(2).find(|pair| pair[0] == pair[1]) {
            return conflict(format!("cluster.seeds names `{}` twice; name every broker once", twice[0]));
        }
        if let Some(nowhere) =
            seeds.iter().find(|seed| split_address(seed).is_ok_and(|(host, port)| is_unspecified(&host) || port == 0))
        {
            return conflict(format!(
                "cluster.seeds names `{nowhere}`, where nobody can be reached; write the address and port by which brokers \
                 reach that one"
            ));
        }
        let topics = TopicConfig::resolve(&self.topic, &TopicOverrides::new())
            .and_then(|topics| topics.check(1, self.batch_bytes_max()));
        topics.map_err(|error| ConfigError::Conflict(format!("section [topic]: {}", error.message)))
    }

    /// Largest batch that fits into a request.
    pub fn batch_bytes_max(&self) -> usize {
        self.limits.request_bytes.saturating_sub(REQUEST_OVERHEAD_BYTES)
    }

    /// Whether there are to be other brokers than the one that others reach at `peer_address`, which is this one: else it is
    /// a cluster of its own from the start.
    pub(crate) fn has_other_seeds(&self, peer_address: &str) -> bool {
        self.cluster.seeds.iter().any(|seed| *seed != self.listen.peer && seed != peer_address)
    }

    /// All defaults. Every default is parsed by its own key, so the reference cannot differ from them.
    fn built_in() -> Config {
        let nothing = || Addresses { client: String::new(), peer: String::new(), admin: String::new() };
        let mut config = Config {
            node: NodeConfig { id: BrokerId::new(0), data_dir: PathBuf::new(), rack: String::new() },
            listen: nothing(),
            advertise: nothing(),
            cluster: ClusterConfig { seeds: Vec::new(), preferred_leaders: false, internal_partitions: 0 },
            security: SecurityConfig { insecure: false },
            storage: StorageConfig {
                shards: 0,
                flush_threads: 0,
                read_threads: 0,
                free_bytes_min: 0,
                in_flight_bytes_max: 0,
            },
            limits: LimitsConfig {
                connections: 0,
                connections_per_address: 0,
                streams_per_connection: 0,
                request_bytes: 0,
                admin_request_bytes: 0,
                header_bytes: 0,
                handshake_timeout: Duration::ZERO,
                idle_timeout: Duration::ZERO,
                connection_age: Duration::ZERO,
                keepalive_interval: Duration::ZERO,
                keepalive_timeout: Duration::ZERO,
                stream_window_bytes: 0,
                connection_window_bytes: 0,
                pending_reset_streams: 0,
                fetch_response_bytes: 0,
                receiving_bytes: 0,
                message_timeout: Duration::ZERO,
                fetch_partitions: 0,
                queries_per_request: 0,
                decompressed_bytes: 0,
                records_per_batch: 0,
                topics: 0,
                partitions_per_topic: 0,
                partitions: 0,
                metrics_partitions: 0,
                open_files: 0,
                broker_session_timeout: Duration::ZERO,
                pull_bytes_per_second: 0,
                pulls_served: 0,
                scrub_bytes_per_second: 0,
                compaction_bytes_per_second: 0,
                compaction_memory: 0,
            },
            group: GroupConfig {
                session_timeout: Duration::ZERO,
                session_timeout_min: Duration::ZERO,
                session_timeout_max: Duration::ZERO,
                heartbeat_interval: Duration::ZERO,
                rebalance_timeout: Duration::ZERO,
                assignor: String::new(),
                members: 0,
                groups_per_partition: 0,
                offsets: 0,
                offsets_retention: Duration::ZERO,
            },
            transaction: TransactionConfig {
                max_timeout: Duration::ZERO,
                id_expiration: Duration::ZERO,
                ids_per_partition: 0,
            },
            producer: ProducerConfig { id_expiration: Duration::ZERO },
            topic: TopicOverrides::new(),
            log: LogConfig { level: String::new(), format: LogFormat::Auto },
            origins: Vec::new(),
        };
        for key in KEYS {
            if let Err(reason) = (key.set)(&mut config, key.default) {
                unreachable!("the default of {} is malformed: {reason}", key.name);
            }
        }
        config
    }

    fn set(&mut self, key: &str, value: &str, origin: Origin) -> Result<(), ConfigError> {
        let invalid = |reason: String, origin: Origin| ConfigError::Invalid {
            key: key.to_owned(),
            value: value.to_owned(),
            origin,
            reason,
        };
        if let Some(topic_key) = key.strip_prefix("topic.").and_then(topic_config::topic_key) {
            match topic_config::canonical_value(topic_key.name, value) {
                Ok(canonical) => self.topic.insert(topic_key.name.to_owned(), canonical),
                Err(error) => return Err(invalid(error.message, origin)),
            };
        } else if let Some(known) = KEYS.iter().find(|known| known.name == key) {
            (known.set)(self, value).map_err(|reason| invalid(reason, origin.clone()))?;
        } else {
            let topics: Vec<String> = TOPIC_KEYS.iter().map(|key| format!("topic.{}", key.name)).collect();
            let names = KEYS.iter().map(|key| key.name).chain(topics.iter().map(String::as_str));
            let suggestion = did_you_mean(key, names).map(str::to_owned);
            return Err(ConfigError::UnknownKey { key: key.to_owned(), origin, suggestion });
        }
        self.origins.push((key.to_owned(), origin));
        Ok(())
    }
}

/// `FLOWSTONE_NODE__DATA_DIR` -> `node.data_dir`; `None` for variables that are no config.
fn env_key(name: &str) -> Option<String> {
    let rest = name.strip_prefix(ENV_PREFIX)?;
    let (section, key) = rest.split_once("__")?;
    Some(format!("{}.{}", section.to_ascii_lowercase(), key.to_ascii_lowercase()))
}

/// Dots inside a key (`retention.ms`) are underscores in the environment.
fn key_of_env(key: &str) -> Option<String> {
    let plain = |name: &str| name.replace('.', "_");
    let wanted = plain(key);
    let fixed = KEYS.iter().map(|known| known.name.to_owned());
    let topics = TOPIC_KEYS.iter().map(|known| format!("topic.{}", known.name));
    fixed.chain(topics).find(|known| plain(known) == wanted)
}

/// The file's values as text by dotted key.
fn read_file(path: &Path) -> Result<Vec<(String, String)>, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    let malformed = |reason: String| ConfigError::Malformed { path: path.to_owned(), reason };
    let tables =
        config::File::from_str(&text, FileFormat::Toml).collect().map_err(|error| malformed(error.to_string()))?;
    let mut values = Vec::new();
    for (key, value) in tables {
        flatten(&key, value.kind, &mut values).map_err(malformed)?;
    }
    values.sort();
    Ok(values)
}

fn flatten(key: &str, value: ValueKind, into: &mut Vec<(String, String)>) -> Result<(), String> {
    match value {
        ValueKind::Table(table) => {
            for (inner, value) in table {
                flatten(&format!("{key}.{inner}"), value.kind, into)?;
            }
        }
        ValueKind::Array(items) => {
            let items: Result<Vec<String>, String> = items
                .into_iter()
                .map(|item| item.into_string().map_err(|_| format!("`{key}` takes a list of plain values")))
                .collect();
            into.push((key.to_owned(), items?.join(",")));
        }
        ValueKind::Nil => into.push((key.to_owned(), String::new())),
        plain => into.push((key.to_owned(), plain.to_string())),
    }
    Ok(())
}

/// Host (brackets taken off) and port.
pub(crate) fn split_address(address: &str) -> Result<(String, u16), String> {
    let example = "write host:port, as in 127.0.0.1:7070 or [::1]:7070";
    let (host, port) = address.rsplit_once(':').ok_or_else(|| format!("the port is missing; {example}"))?;
    let host = match host.strip_prefix('[') {
        Some(inner) => {
            let inner = inner.strip_suffix(']').ok_or_else(|| format!("a bracket is missing; {example}"))?;
            inner.parse::<std::net::Ipv6Addr>().map_err(|_| format!("`{inner}` is no IPv6 address; {example}"))?;
            inner
        }
        None if host.contains(':') => return Err(format!("an IPv6 host needs brackets; {example}")),
        None => host,
    };
    if host.is_empty() {
        return Err(format!("the host is missing; {example}"));
    }
    let port = port.parse().map_err(|_| format!("`{port}` is no port; {example}"))?;
    Ok((host.to_owned(), port))
}

fn is_unspecified(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified())
}

fn text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("must not be empty".to_owned()) } else { Ok(PathBuf::from(text)) }
}

fn broker_id(text: &str) -> Result<BrokerId, String> {
    match text.parse::<i32>() {
        Ok(id) if id >= 0 => Ok(BrokerId::new(id)),
        _ => Err(format!("must be a number from 0 to {}", i32::MAX)),
    }
}

fn address(text: &str) -> Result<String, String> {
    split_address(text).map(|_| text.to_owned())
}

fn advertised(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Ok(String::new());
    }
    let (host, port) = split_address(text)?;
    if is_unspecified(&host) {
        return Err("nobody can connect to that; write the address by which others reach this broker".to_owned());
    }
    if port == 0 {
        return Err("port 0 cannot be reached; write the port by which others reach this broker".to_owned());
    }
    Ok(text.to_owned())
}

fn addresses(text: &str) -> Result<Vec<String>, String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(address).collect()
}

fn parsed<T: FromStr>(text: &str) -> Result<T, String> {
    let kind = std::any::type_name::<T>();
    let expected = if kind == "bool" { "true or false" } else { "a whole number, not negative" };
    text.parse().map_err(|_| format!("must be {expected}"))
}

fn positive(text: &str) -> Result<usize, String> {
    match parsed(text)? {
        0 => Err("must be above 0".to_owned()),
        number => Ok(number),
    }
}

fn positive32(text: &str) -> Result<u32, String> {
    u32::try_from(positive(text)?).map_err(|_| "too large".to_owned())
}

fn size64(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        0 => Err("must be above 0".to_owned()),
        bytes => Ok(bytes),
    }
}

fn size(text: &str) -> Result<usize, String> {
    let bytes = size64(text)?;
    // Messages and batches have 32-bit lengths on the wire.
    if bytes > u64::from(u32::MAX) { Err("at most 4 GiB".to_owned()) } else { Ok(bytes as usize) }
}

/// What is taken must be read again by whoever compacts the log, or looks something up in it.
fn decompressed_size(text: &str) -> Result<usize, String> {
    match size(text)? {
        bytes if bytes > DECOMPRESSED_BYTES_MAX => Err(format!("at most {}", size_usize(&DECOMPRESSED_BYTES_MAX))),
        bytes => Ok(bytes),
    }
}

fn size32(text: &str) -> Result<u32, String> {
    u32::try_from(size64(text)?).map_err(|_| "too large".to_owned())
}

/// HTTP/2's windows: at least its default, at most 31 bits.
fn window(text: &str) -> Result<u32, String> {
    match size32(text)? {
        bytes @ 65_535..=0x7fff_ffff => Ok(bytes),
        _ => Err("must lie between 65535 B and 2 GiB (HTTP/2's bounds)".to_owned()),
    }
}

fn positive_duration(text: &str) -> Result<Duration, String> {
    let duration = parse_duration(text)?;
    if duration.is_zero() { Err("must be above 0".to_owned()) } else { Ok(duration) }
}

fn assignor(text: &str) -> Result<String, String> {
    match crate::group::assignment::Assignor::named(text) {
        Some(assignor) => Ok(assignor.name().to_owned()),
        None => Err("must be range, roundrobin, sticky or cooperative".to_owned()),
    }
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "auto" => Ok(LogFormat::Auto),
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("must be auto, text or json".to_owned()),
    }
}

fn shown(value: &impl ToString) -> String {
    value.to_string()
}

fn shown_path(path: &Path) -> String {
    path.display().to_string()
}

fn shown_list(items: &[String]) -> String {
    items.join(",")
}

fn shown_duration(duration: &Duration) -> String {
    show_duration(*duration)
}

fn size_u64(bytes: &u64) -> String {
    show_bytes(*bytes)
}

fn size_u32(bytes: &u32) -> String {
    show_bytes(u64::from(*bytes))
}

fn size_usize(bytes: &usize) -> String {
    show_bytes(*bytes as u64)
}

fn shown_format(format: &LogFormat) -> String {
    match format {
        LogFormat::Auto => "auto",
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(toml: &str, env: &[(&str, &str)], sets: &[&str]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("broker.toml");
        std::fs::write(&path, toml).expect("written");
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let sets: Vec<String> = sets.iter().map(|text| (*text).to_owned()).collect();
        Config::load(Some(&path), env, &sets)
    }

    #[test]
    fn no_batch_may_come_to_more_than_can_be_compacted() {
        let load = |set: &str| load(EXAMPLE, &[], &["limits.decompressed_bytes=256MiB", set]);
        let config = load("limits.topics=5").expect("as much as can be");
        assert_eq!(config.limits.decompressed_bytes, DECOMPRESSED_BYTES_MAX);
        let error = load("limits.decompressed_bytes=257MiB").expect_err("more").to_string();
        assert!(error.contains("limits.decompressed_bytes") && error.contains("256 MiB"), "{error}");
    }

    const EXAMPLE: &str = r#"
        [node]
        id = 1
        data_dir = "data/1"
        rack = "a"
        [listen]
        client = "127.0.0.1:7070"
        peer   = "127.0.0.1:7071"
        admin  = "127.0.0.1:7072"
        [cluster]
        seeds = ["127.0.0.1:7071"]
        [limits]
        request_bytes = "8 MiB"
        [topic]
        retention.ms = "7d"
        "segment.bytes" = 67108864
    "#;

    #[test]
    fn the_last_source_wins_and_explain_tells_which() {
        let config = load(
            EXAMPLE,
            &[("FLOWSTONE_NODE__ID", "2"), ("FLOWSTONE_TOPIC__RETENTION_BYTES", "1 GiB"), ("FLOWSTONE_SERVER", "x")],
            &["node.rack=b"],
        )
        .expect("valid");
        assert_eq!(config.node.id, BrokerId::new(2));
        assert_eq!(config.limits.request_bytes, 8 << 20);
        let rows = config.explain();
        let check = |key: &str, value: &str, origin: &str| {
            let row = rows.iter().find(|row| row.key == key).expect(key);
            assert_eq!((row.value.as_str(), row.origin.to_string().split(' ').next()), (value, Some(origin)), "{key}");
        };
        check("node.id", "2", "env");
        check("node.rack", "b", "--set");
        check("node.data_dir", "data/1", "file");
        check("limits.request_bytes", "8 MiB", "file");
        check("limits.connections", "1024", "default");
        check("topic.retention.ms", "604800000", "file");
        check("topic.retention.bytes", "1073741824", "env");
        check("topic.segment.bytes", "67108864", "file");
        check("topic.segment.ms", "604800000", "default");
    }

    #[test]
    fn every_default_reads_back_as_it_is_shown() {
        let config = Config::built_in();
        assert!(config.check().is_ok());
        for key in KEYS {
            assert_eq!((key.show)(&config), key.default, "{}", key.name);
        }
    }

    #[test]
    fn mistakes_are_told_with_what_to_do() {
        let check = |toml: &str, sets: &[&str], part: &str| {
            let error = load(toml, &[], sets).expect_err(part).to_string();
            assert!(error.contains(part), "wanted `{part}` in: {error}");
        };
        check("[node]\ndata_dri = \"x\"", &[], "did you mean `node.data_dir`?");
        check("[nod]\nid = 1", &[], "did you mean `node.id`?");
        check("", &["qqqqqqqqqq.wwwwwwwwwww=1"], "config explain");
        check("[node\nid = 1", &[], "not valid TOML");
        check("", &["node.id"], "write --set section.key=value");
        check("", &["node.id=-1"], "must be a number from 0");
        check("", &["security.insecure=maybe"], "true or false");
        check("", &["limits.idle_timeout=5"], "number with a unit");
        check("", &["limits.request_bytes=lots"], "number with a unit");
        check("", &["topic.retention.ms=soon"], "no duration");
        check("", &["topic.retention.mss=1"], "did you mean `topic.retention.ms`?");
        check("", &["topic.segment.bytes=65536"], "below max.message.bytes");
        check("", &["topic.min.insync.replicas=2"], "above the majority");
        check("", &["topic.max.message.bytes=17 MiB"], "limits.request_bytes");
        check("", &["listen.client=127.0.0.1"], "the port is missing");
        check("", &["listen.client=::1:7070"], "needs brackets");
        check("", &["listen.client=[::1:7070"], "bracket");
        check("", &["listen.client=10.0.0.1:7070"], "security.insecure = true");
        check("", &["listen.client=0.0.0.0:7070", "security.insecure=true"], "set advertise.client");
        check("", &["listen.client=[::]:7070", "security.insecure=true"], "set advertise.client");
        check("", &["advertise.client=0.0.0.0:7070"], "nobody can connect");
        check("", &["advertise.client=[::]:7070"], "nobody can connect");
        check("", &["cluster.seeds=127.0.0.1:7071,127.0.0.1:7071"], "twice");
        check("", &["cluster.seeds=127.0.0.1:7071,127.0.0.1:0"], "nobody can be reached");
        check("", &["cluster.seeds=0.0.0.0:7071"], "nobody can be reached");
        check("", &["cluster.seeds=host"], "the port is missing");
        let missing = Config::load(Some(Path::new("/nonexistent/x.toml")), [], &[]).expect_err("missing").to_string();
        assert!(missing.contains("cannot read the config file /nonexistent/x.toml"), "{missing}");
    }

    #[test]
    fn listeners_off_loopback_need_a_word() {
        let valid = |sets: &[&str]| load("", &[], sets).map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(valid(&["listen.client=[::1]:7070"]), Ok(()));
        assert_eq!(valid(&["listen.client=localhost:0"]), Ok(()));
        assert_eq!(
            valid(&["listen.client=0.0.0.0:7070", "advertise.client=a.example:7070", "security.insecure=true"]),
            Ok(())
        );
    }
}
