//! What idle groups of three cost: processor time per broker while nothing is written.
//!
//! Three brokers' shards in this process, over a network in memory: `IDLE_GROUPS` groups (1 000), `IDLE_SECONDS` (10).

// A benchmark tells its figures.
#![allow(clippy::print_stdout, missing_docs)]

#[path = "../tests/ledger/mod.rs"]
mod ledger;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use flowstone_protocol::{BrokerId, DirectoryId, Error, ErrorCode, PartitionId, ReplicaId, TopicId, TopicPartition};
use flowstone_replication::{
    FlushMode, GroupMessage, LogConfig, PeerTransport, PullAnswer, PullRequest, ReplicaSpec, Reply, RetentionConfig,
    Shards, ShardsConfig, Start, system_clock,
};
use flowstone_storage::DataDir;
use flowstone_storage::{Disk, SimDisk};
use ledger::Ledger;

type Brokers = Arc<Mutex<HashMap<BrokerId, Weak<Shards<Ledger>>>>>;

#[derive(Debug)]
struct Link {
    brokers: Brokers,
    own: BrokerId,
}

impl PeerTransport for Link {
    fn send(&self, to: BrokerId, messages: Vec<GroupMessage>) {
        let shards = self.brokers.lock().unwrap().get(&to).and_then(Weak::upgrade);
        if let Some(shards) = shards {
            shards.deliver(self.own, messages);
        }
    }

    fn pull(&self, _from: BrokerId, _request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        reply.send(Err(Error::new(ErrorCode::NoLeader, "nothing is pulled here")));
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// Processor time of this process so far, in clock ticks of 10 ms.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux tells");
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

fn main() {
    let (groups, seconds) = (setting("IDLE_GROUPS", 1_000), setting("IDLE_SECONDS", 10));
    let brokers = Brokers::default();
    let places: Vec<_> = (1..=3).map(|at| (ReplicaId::new(at as u64), BrokerId::new(at))).collect();
    let voters: Arc<[ReplicaId]> = places.iter().map(|(replica, _)| *replica).collect();
    let all: Vec<_> = places
        .iter()
        .map(|&(replica, own)| {
            let disk: Arc<dyn Disk> = SimDisk::new(replica.get()).shared();
            let data_dir =
                Arc::new(DataDir::open_or_create(disk, Path::new("/data"), DirectoryId::new(1), 4).expect("made"));
            let link = Arc::new(Link { brokers: Arc::clone(&brokers), own });
            let config = ShardsConfig { shards: 1, seed: 7, ..ShardsConfig::default() };
            let shards = Shards::start(config, Arc::clone(&data_dir), system_clock(), link).expect("started");
            let shards = Arc::new(shards);
            brokers.lock().unwrap().insert(own, Arc::downgrade(&shards));
            (replica, data_dir, shards)
        })
        .collect();
    let mut handles = Vec::new();
    for group in 0..groups {
        for (replica, data_dir, shards) in &all {
            let tp = TopicPartition::new(TopicId::new(9), PartitionId::new(group as i32));
            // Which of the three stands first goes round.
            let mut order = voters.to_vec();
            order.rotate_left(group as usize % 3);
            let spec = ReplicaSpec {
                tp,
                replica: *replica,
                dir: data_dir.replica_dir(tp),
                log: LogConfig::default(),
                flush: FlushMode::Quorum,
                retention: RetentionConfig::default(),
                internal: false,
                max_message_bytes: 1 << 20,
                peers: places.clone().into(),
                start: Start::FirstVoter { voters: order.into() },
            };
            let (sender, receiver) = tokio::sync::oneshot::channel();
            shards.open(spec, Ledger::default(), Reply::from(sender));
            handles.push(receiver);
        }
    }
    let handles: Vec<_> = handles.into_iter().map(|it| it.blocking_recv().unwrap().expect("opened")).collect();
    let began = Instant::now();
    while handles.iter().filter(|handle| handle.status().is_ready()).count() < groups as usize {
        assert!(began.elapsed() < Duration::from_secs(120), "not all groups have a leader");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Until the last heartbeat told the last commit.
    std::thread::sleep(Duration::from_secs(3));
    let steps = || all.iter().map(|(_, _, shards)| shards.metrics()[0].steps).sum::<u64>();
    let sent = || all.iter().map(|(_, _, shards)| shards.metrics()[0].messages_sent).sum::<u64>();
    let (cpu_before, steps_before, sent_before) = (cpu_time(), steps(), sent());
    std::thread::sleep(Duration::from_secs(seconds));
    let cpu = (cpu_time() - cpu_before).as_secs_f64() / seconds as f64 / 3.0;
    println!(
        "{groups} idle groups of three: {:.2} % of a core per broker ({:.2} % for 10 000); {} steps, {} messages a second in all",
        cpu * 100.0,
        cpu * 100.0 * 10_000.0 / groups as f64,
        (steps() - steps_before) / seconds,
        (sent() - sent_before) / seconds,
    );
}
