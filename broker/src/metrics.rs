//! What the broker counts, and how `/metrics` shows it: Prometheus text, names `flowstone_<what>_<unit>[_total]`, labels
//! with few values. Series per partition are made when asked for, and only for so many partitions.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use flowstone_protocol::Error;
use flowstone_replication::{FLUSH_BUCKETS, Health, ReplicaStatus, ShardMetrics, Shards};
use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::cluster::control::Control;
use crate::cluster::drive::Led;
use crate::controller::table::MetadataTable;
use crate::coordinator::Published;
use crate::group::driver::GroupCoordinators;
use crate::partition::{LocalReplicas, PartitionMachine, Slot};
use crate::peer::PeerNetwork;
use crate::room::Room;

/// Upper bounds of the latency histograms, in seconds: 50 us to 6.5 s, each twice the one before.
const LATENCY_BUCKETS: [f64; 18] = [
    0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_6, 0.003_2, 0.006_4, 0.012_8, 0.025_6, 0.051_2, 0.102_4,
    0.204_8, 0.409_6, 0.819_2, 1.638_4, 3.276_8, 6.553_6,
];

/// A call, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Api {
    Produce,
    Fetch,
    Metadata,
    ListOffsets,
    Admin,
    FindCoordinators,
    Groups,
    Transactions,
}

impl Api {
    const ALL: [Api; 8] = [
        Api::Produce,
        Api::Fetch,
        Api::Metadata,
        Api::ListOffsets,
        Api::Admin,
        Api::FindCoordinators,
        Api::Groups,
        Api::Transactions,
    ];
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ApiLabels {
    api: Api,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    api: Api,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartitionLabels {
    topic: String,
    partition: i32,
}

/// Counters of one broker.
pub(crate) struct Metrics {
    registry: RwLock<Registry>,
    requests: PerApi<Counter>,
    received_bytes: PerApi<Counter>,
    sent_bytes: PerApi<Counter>,
    latency: PerApi<Histogram>,
    errors: Family<ErrorLabels, Counter>,
    /// Times that a producer had to wait for room.
    pub(crate) produce_waits: Counter,
    /// Client connections open now.
    pub(crate) connections: Gauge,
    /// Client connections turned away by a limit.
    pub(crate) connections_refused: Counter,
    /// Client connections cut off by a deadline.
    pub(crate) connections_timed_out: Counter,
    /// Accepts that failed, as for want of file descriptors.
    pub(crate) accept_errors: Counter,
    /// Reads that wait in a shard for something to be written.
    reads_parked: Gauge,
    /// Times that a consumer group's targets were set anew.
    pub(crate) group_rebalances: Counter,
    /// Members that were removed for their silence.
    pub(crate) group_members_removed: Counter,
    /// Offsets of consumer groups that were committed here.
    pub(crate) group_commits: Counter,
}

/// One read that waits in a shard: counted for as long as this is kept with it.
#[derive(Debug)]
pub(crate) struct ParkedRead(Gauge);

impl Drop for ParkedRead {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// One metric per call, in the order of [`Api::ALL`], looked up without a lock.
type PerApi<M> = [M; Api::ALL.len()];

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("flowstone");
        let counters = |registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>| {
            let family = Family::<ApiLabels, Counter>::default();
            match unit {
                Some(unit) => registry.register_with_unit(name, help, unit, family.clone()),
                None => registry.register(name, help, family.clone()),
            }
            per_api(|api| family.get_or_create_owned(&ApiLabels { api }))
        };
        let requests = counters(&mut registry, "requests", "Requests received, by call", None);
        let received_bytes = counters(
            &mut registry,
            "received",
            "Bytes of requests, by call; of Produce, of their batches",
            Some(Unit::Bytes),
        );
        let sent_bytes =
            counters(&mut registry, "sent", "Bytes of answers, by call; of Fetch, of their batches", Some(Unit::Bytes));
        let latency =
            Family::<ApiLabels, Histogram, fn() -> Histogram>::new_with_constructor(|| Histogram::new(LATENCY_BUCKETS));
        registry.register_with_unit(
            "request_latency",
            "Time from a request's arrival to its answer, by call; of fetches, from read to delivery",
            Unit::Seconds,
            latency.clone(),
        );
        let latency = per_api(|api| latency.get_or_create_owned(&ApiLabels { api }));
        let errors = Family::<ErrorLabels, Counter>::default();
        registry.register("request_errors", "Requests answered with an error, by call and code", errors.clone());
        let mut counter = |name: &str, help: &str| {
            let counter: Counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let produce_waits = counter("produce_waits", "Times that a producer had to wait for room in flight");
        let connections_refused = counter("connections_refused", "Client connections turned away by a limit");
        let connections_timed_out = counter("connections_timed_out", "Client connections cut off by a deadline");
        let accept_errors = counter("accept_errors", "Connections that the system could not accept");
        let group_rebalances = counter("group_rebalances", "Times that a consumer group's targets were set anew");
        let group_members_removed =
            counter("group_members_removed", "Members of consumer groups that were removed: silent, or too slow");
        let group_commits = counter("group_commits", "Offsets of consumer groups that were committed");
        let connections = Gauge::default();
        registry.register("connections", "Client connections open now", connections.clone());
        let reads_parked = Gauge::default();
        registry.register(
            "reads_parked",
            "Reads at the end of a partition that wait for something to be written",
            reads_parked.clone(),
        );
        Self {
            registry: RwLock::new(registry),
            requests,
            received_bytes,
            sent_bytes,
            latency,
            errors,
            produce_waits,
            connections,
            connections_refused,
            connections_timed_out,
            accept_errors,
            reads_parked,
            group_rebalances,
            group_members_removed,
            group_commits,
        }
    }

    /// Adds what is read off the broker's state when asked for.
    pub(crate) fn watch(&self, collector: BrokerCollector) {
        self.registry.write().register_collector(Box::new(collector));
    }

    pub(crate) fn received(&self, api: Api, bytes: usize) {
        self.requests[api as usize].inc();
        self.received_bytes[api as usize].inc_by(bytes as u64);
    }

    pub(crate) fn answered(&self, api: Api, received: Instant, error: Option<&Error>) {
        self.latency[api as usize].observe(received.elapsed().as_secs_f64());
        if let Some(error) = error {
            self.refused(api, error);
        }
    }

    /// `since`: when that was asked for; `None` where it was waited for on purpose.
    pub(crate) fn sent(&self, api: Api, since: Option<Instant>, bytes: usize) {
        self.sent_bytes[api as usize].inc_by(bytes as u64);
        if let Some(since) = since {
            self.latency[api as usize].observe(since.elapsed().as_secs_f64());
        }
    }

    /// `bytes` of an answer whose latency is told by [`Metrics::answered`].
    pub(crate) fn sent_bytes(&self, api: Api, bytes: usize) {
        self.sent_bytes[api as usize].inc_by(bytes as u64);
    }

    /// A read is given to a shard, to wait there.
    pub(crate) fn read_parks(&self) -> ParkedRead {
        self.reads_parked.inc();
        ParkedRead(self.reads_parked.clone())
    }

    pub(crate) fn refused(&self, api: Api, error: &Error) {
        self.errors.get_or_create(&ErrorLabels { api, code: error.code.as_str() }).inc();
    }

    /// All of it, as Prometheus reads it.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry.read())?;
        Ok(text)
    }
}

fn per_api<M>(metric: impl Fn(Api) -> M) -> PerApi<M> {
    Api::ALL.map(metric)
}

/// A family of one series per partition: its name, help, unit, and how it is read off a replica.
type PartitionFamily = (&'static str, &'static str, Option<Unit>, fn(&ReplicaStatus) -> i64);

/// Reads gauges off the broker's state.
#[derive(Debug)]
pub(crate) struct BrokerCollector {
    /// Weak: the shards end when the broker says so.
    pub(crate) shards: Weak<Shards<PartitionMachine>>,
    /// Weak, as above.
    pub(crate) network: Weak<PeerNetwork>,
    pub(crate) control: Arc<Control>,
    pub(crate) groups: GroupCoordinators,
    /// What the last survey of the groups led here found.
    pub(crate) led: Arc<Led>,
    /// Bytes that all shards together take in flight.
    pub(crate) in_flight_bytes_max: usize,
    pub(crate) replicas: LocalReplicas,
    pub(crate) table: Published<MetadataTable>,
    pub(crate) room: Room,
    /// Where folders of replicas go that the metadata does not know any more.
    pub(crate) set_aside: PathBuf,
    /// Partitions with series of their own.
    pub(crate) partitions_max: usize,
    pub(crate) started: Instant,
}

impl Collector for BrokerCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut replicas = self.replicas.all();
        // The same partitions every time, whatever their number.
        replicas.sort_by_key(|(tp, _)| *tp);
        let mut totals = Totals::default();
        let mut rows = Vec::new();
        for (tp, slot) in &replicas {
            let Slot::Open(partition) = slot else {
                totals.unavailable += 1;
                continue;
            };
            let status = partition.replica.status();
            totals.count(&status);
            if rows.len() < self.partitions_max {
                rows.push((
                    PartitionLabels { topic: partition.topic.to_string(), partition: tp.partition.get() },
                    status,
                ));
            }
        }
        let per_partition: [PartitionFamily; 5] = [
            ("partition_end_offset", "One past the last appended offset", None, |status| status.end_offset.get()),
            ("partition_high_watermark", "One past the last committed offset", None, |s| s.high_watermark.get()),
            ("partition_log_start", "First offset that can be read", None, |status| status.log_start.get()),
            ("partition_log", "Bytes of the partition's segments", Some(Unit::Bytes), |s| s.size_bytes as i64),
            ("partition_leader_epoch", "Term of the leader", None, |s| i64::from(s.leader_epoch().get())),
        ];
        for (name, help, unit, value) in per_partition {
            // A family without series would be named twice by some readers.
            if rows.is_empty() {
                break;
            }
            let mut family =
                encoder.encode_descriptor(name, help, unit.as_ref(), ConstGauge::new(0i64).metric_type())?;
            for (labels, status) in &rows {
                let gauge = ConstGauge::new(value(status));
                gauge.encode(family.encode_family(labels)?)?;
            }
        }
        let (topics, metadata_offset) = self.table.with(|table| (table.topic_count(), table.applied()));
        let (brokers, fenced) = self.table.with(|table| {
            let fenced = table.brokers().filter(|broker| broker.fenced).count();
            (table.brokers().count() as i64, fenced as i64)
        });
        let peers = self.network.upgrade().map(|network| network.figures()).unwrap_or_default();
        let process = ProcessFigures::read();
        let set_aside = std::fs::read_dir(&self.set_aside).map_or(0, |entries| entries.count() as i64);
        let (groups, members) = self.groups.counts();
        let gauges: [(&str, &str, Option<Unit>, i64); 30] = [
            ("groups", "Consumer groups that this broker coordinates", None, groups as i64),
            ("group_members", "Members of these groups", None, members as i64),
            ("topics", "Topics of the cluster, its own aside", None, topics as i64),
            ("metadata_offset", "Last metadata record taken in", None, metadata_offset.get()),
            ("replicas", "Replicas of this broker", None, replicas.len() as i64),
            ("replicas_leading", "Replicas that lead and serve", None, totals.leading),
            ("partitions_leaderless", "Partitions of this broker that nobody leads", None, totals.leaderless()),
            (
                "partitions_under_replicated",
                "Partitions led here that lack replicas in sync",
                None,
                self.led.under_replicated() as i64,
            ),
            ("brokers", "Brokers of the cluster", None, brokers),
            ("brokers_fenced", "Brokers that the controller has not heard of for too long", None, fenced),
            ("controller", "1 where this broker is the controller", None, i64::from(self.control.leads())),
            ("peers_connected", "Other brokers that both streams to are open", None, peers.brokers_connected as i64),
            ("peer_connections", "Connections of other brokers open now", None, peers.connections as i64),
            (
                "peer_messages_waiting",
                "Messages that wait to be sent to other brokers",
                None,
                peers.messages_waiting as i64,
            ),
            ("peer_waiting", "Bytes of messages that wait to be sent", Some(Unit::Bytes), peers.bytes_waiting as i64),
            ("partitions_read_only", "Partitions that refuse writes for want of room", None, totals.full),
            ("partitions_failed", "Partitions whose log failed or is quarantined", None, totals.failed),
            (
                "partitions_quarantined",
                "Those of the failed partitions that only an operator can bring back",
                None,
                totals.quarantined,
            ),
            (
                "replicas_lost",
                "Those of the failed partitions whose replica here is to be replaced by another one",
                None,
                totals.lost,
            ),
            (
                "replicas_set_aside",
                "Folders of replicas that a recovered metadata does not know; nothing reads them",
                None,
                set_aside,
            ),
            ("log", "Bytes of all segments on this broker", Some(Unit::Bytes), totals.bytes),
            (
                "disk_free",
                "Bytes left on the data directory's file system",
                Some(Unit::Bytes),
                i64::try_from(self.room.free_bytes()).unwrap_or(i64::MAX),
            ),
            (
                "disk",
                "Bytes of the data directory's file system",
                Some(Unit::Bytes),
                i64::try_from(self.room.total_bytes()).unwrap_or(i64::MAX),
            ),
            ("uptime", "Time since start", Some(Unit::Seconds), self.started.elapsed().as_secs() as i64),
            ("process_resident", "Memory of the process", Some(Unit::Bytes), process.resident_bytes),
            (
                "process_virtual",
                "Address space of the process, maps included",
                Some(Unit::Bytes),
                process.virtual_bytes,
            ),
            ("process_open_files", "Open file descriptors of the process", None, process.open_files),
            ("process_open_files_max", "File descriptors that the process may open", None, process.open_files_max),
            ("process_threads", "Threads of the process", None, process.threads),
            (
                "process_start_time",
                "When the process started, from 1970-01-01 UTC on",
                Some(Unit::Seconds),
                process.started_seconds,
            ),
        ];
        for (name, help, unit, value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?)?;
        }
        let shards = ShardTotals::of(&self.shards.upgrade().map(|shards| shards.metrics()).unwrap_or_default());
        let in_flight = self.in_flight_bytes_max.saturating_sub(shards.bytes_free) as i64;
        for (name, help, unit, value) in [
            ("requests_waiting", "Requests in the shards' inboxes", None, shards.requests_waiting as i64),
            ("in_flight", "Bytes of batches received and not answered", Some(Unit::Bytes), in_flight),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?)?;
        }
        let dirty = ConstGauge::new(shards.dirty_ratio());
        let help = "Share of compacted topics' closed segments that no compaction has looked at, from 0 to 1";
        dirty.encode(encoder.encode_descriptor("compaction_dirty_ratio", help, None, dirty.metric_type())?)?;
        let counters: [(&str, &str, Option<Unit>, f64); 20] = [
            ("process_cpu", "Processor time of the process", Some(Unit::Seconds), process.cpu_seconds),
            ("replica_steps", "Steps of replicas", None, shards.steps as f64),
            ("flushes_inline", "Flushes that a shard ran itself", None, shards.flushes_inline as f64),
            ("replicas_ended", "Replicas that ended since their disk failed", None, shards.replicas_ended as f64),
            ("elections", "Elections that replicas here stood for", None, shards.elections as f64),
            ("leader_changes", "Leaderships that began here", None, shards.leader_changes as f64),
            ("peer_messages_sent", "Messages to other brokers' replicas", None, shards.messages_sent as f64),
            (
                "peer_messages_dropped",
                "Messages of or to other brokers' replicas that there was no room or no way for",
                None,
                shards.messages_dropped as f64 + peers.messages_dropped as f64,
            ),
            ("peer_sent", "Bytes of messages to other brokers", Some(Unit::Bytes), peers.bytes_sent as f64),
            ("peer_received", "Bytes of messages of other brokers", Some(Unit::Bytes), peers.bytes_received as f64),
            ("peer_streams_opened", "Streams to other brokers that were opened", None, peers.streams_opened as f64),
            ("peers_refused", "Streams and calls of other brokers that were refused", None, peers.refused as f64),
            ("pulled", "Bytes pulled from other brokers", Some(Unit::Bytes), shards.pulled_bytes as f64),
            (
                "pulls_served",
                "Bytes that other brokers pulled from here",
                Some(Unit::Bytes),
                shards.served_bytes as f64,
            ),
            ("scrubbed", "Bytes of old segments read to find rot", Some(Unit::Bytes), shards.scrubbed_bytes as f64),
            ("rotten_ranges", "Damaged ranges found", None, shards.rotten_ranges as f64),
            ("repaired_ranges", "Damaged ranges replaced from another replica", None, shards.repaired_ranges as f64),
            ("compactions", "Passes of compaction that ended", None, shards.compactions as f64),
            ("compacted", "Bytes that compaction read and wrote", Some(Unit::Bytes), shards.compacted_bytes as f64),
            (
                "compaction_freed",
                "Bytes that compaction made room for",
                Some(Unit::Bytes),
                shards.compaction_freed_bytes as f64,
            ),
        ];
        for (name, help, unit, value) in counters {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, unit.as_ref(), counter.metric_type())?)?;
        }
        let bounds = FLUSH_BUCKETS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(shards.flush_buckets).collect();
        encoder
            .encode_descriptor(
                "flush_latency",
                "Time that a flush of a log took",
                Some(&Unit::Seconds),
                MetricType::Histogram,
            )?
            .encode_histogram::<NoLabelSet>(shards.flush_time.as_secs_f64(), shards.flushes, &buckets, None)
    }
}

/// All shards together.
#[derive(Default)]
struct ShardTotals {
    requests_waiting: usize,
    bytes_free: usize,
    steps: u64,
    flushes: u64,
    flushes_inline: u64,
    flush_time: Duration,
    flush_buckets: [u64; FLUSH_BUCKETS.len() + 1],
    replicas_ended: u64,
    elections: u64,
    leader_changes: u64,
    messages_sent: u64,
    messages_dropped: u64,
    pulled_bytes: u64,
    served_bytes: u64,
    scrubbed_bytes: u64,
    rotten_ranges: u64,
    repaired_ranges: u64,
    compactions: u64,
    compacted_bytes: u64,
    compaction_freed_bytes: u64,
    compaction_dirty_bytes: u64,
    compaction_total_bytes: u64,
}

impl ShardTotals {
    fn dirty_ratio(&self) -> f64 {
        self.compaction_dirty_bytes as f64 / self.compaction_total_bytes.max(1) as f64
    }
}

impl ShardTotals {
    fn of(shards: &[ShardMetrics]) -> Self {
        let mut totals = Self::default();
        for shard in shards {
            totals.requests_waiting += shard.requests_waiting;
            totals.bytes_free += shard.bytes_free;
            totals.steps += shard.steps;
            totals.flushes += shard.flushes;
            totals.flushes_inline += shard.flushes_inline;
            totals.flush_time += shard.flush_time;
            totals.replicas_ended += shard.replicas_ended;
            totals.elections += shard.elections;
            totals.leader_changes += shard.leader_changes;
            totals.messages_sent += shard.messages_sent;
            totals.messages_dropped += shard.messages_dropped;
            totals.pulled_bytes += shard.pulled_bytes;
            totals.served_bytes += shard.served_bytes;
            totals.scrubbed_bytes += shard.scrubbed_bytes;
            totals.rotten_ranges += shard.rotten_ranges;
            totals.repaired_ranges += shard.repaired_ranges;
            totals.compactions += shard.compactions;
            totals.compacted_bytes += shard.compacted_bytes;
            totals.compaction_freed_bytes += shard.compaction_freed_bytes;
            totals.compaction_dirty_bytes += shard.compaction_dirty_bytes;
            totals.compaction_total_bytes += shard.compaction_total_bytes;
            for (total, bucket) in totals.flush_buckets.iter_mut().zip(shard.flush_buckets) {
                *total += bucket;
            }
        }
        totals
    }
}

#[derive(Default)]
struct Totals {
    leading: i64,
    leaderless: i64,
    full: i64,
    /// Of any of the kinds below, and those that are opened anew by themselves.
    failed: i64,
    quarantined: i64,
    lost: i64,
    bytes: i64,
    unavailable: i64,
}

impl Totals {
    fn count(&mut self, status: &ReplicaStatus) {
        self.leaderless += i64::from(!status.is_ready() && status.leader_broker.is_none());
        self.leading += i64::from(status.is_ready());
        self.full += i64::from(status.health == Health::DiskFull);
        self.failed += i64::from(matches!(
            status.health,
            Health::Failed { .. } | Health::Quarantined { .. } | Health::Lost { .. }
        ));
        self.quarantined += i64::from(matches!(status.health, Health::Quarantined { .. }));
        self.lost += i64::from(matches!(status.health, Health::Lost { .. }));
        self.bytes += status.size_bytes as i64;
    }

    fn leaderless(&self) -> i64 {
        self.unavailable + self.leaderless
    }
}

/// Basics of this process, from `/proc`; zeros where there is none.
#[derive(Default)]
struct ProcessFigures {
    resident_bytes: i64,
    virtual_bytes: i64,
    open_files: i64,
    open_files_max: i64,
    threads: i64,
    /// Since 1970.
    started_seconds: i64,
    cpu_seconds: f64,
}

impl ProcessFigures {
    fn read() -> Self {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let pages = |text: &str, field: usize| {
            let pages = text.split(' ').nth(field).and_then(|pages| pages.parse::<i64>().ok());
            pages.unwrap_or(0) * rustix::param::page_size() as i64
        };
        let statm = read("/proc/self/statm");
        let stat = read("/proc/self/stat");
        // The name, second field, may hold spaces; what counts begins behind its bracket, with the third.
        let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<i64>().ok()).unwrap_or(0);
        let (user, system, threads, started) = (field(14), field(15), field(20), field(22));
        let booted = read("/proc/stat").lines().find_map(|line| line.strip_prefix("btime ")?.parse::<i64>().ok());
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        Self {
            resident_bytes: pages(&statm, 1),
            virtual_bytes: pages(&statm, 0),
            open_files: std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as i64),
            open_files_max: limit.map_or(i64::MAX, |limit| i64::try_from(limit).unwrap_or(i64::MAX)),
            threads,
            started_seconds: booted.map_or(0, |booted| booted + (started as f64 / ticks) as i64),
            cpu_seconds: (user + system) as f64 / ticks,
        }
    }
}
