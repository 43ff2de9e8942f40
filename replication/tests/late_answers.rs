//! Answers of other brokers that come when nobody waits for them any more.

mod ledger;
mod manual;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::{
    BrokerId, DirectoryId, Error, Offset, PartitionId, RaftIndex, ReplicaId, Timestamp, TopicId, TopicPartition,
};
use flowstone_replication::{
    FlushMode, GroupMessage, LogConfig, ManualShards, PeerTransport, PullAnswer, PullRequest, ReplicaSpec, Reply,
    RetentionConfig, ShardsConfig, Start,
};
use flowstone_storage::{DataDir, Disk, SimDisk};
use ledger::Ledger;
use manual::Jobs;
use tokio::sync::oneshot;

const TP: TopicPartition = TopicPartition::new(TopicId::new(9), PartitionId::new(0));

/// Nothing is answered before the test does.
#[derive(Debug, Default)]
struct Asked(Mutex<Vec<Reply<Result<PullAnswer, Error>>>>);

impl PeerTransport for Asked {
    fn send(&self, _to: BrokerId, _messages: Vec<GroupMessage>) {}

    fn pull(&self, _from: BrokerId, _request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        self.0.lock().unwrap().push(reply);
    }
}

#[test]
fn what_was_pulled_for_a_replica_that_was_closed_is_not_its_successors() {
    let disk: Arc<dyn Disk> = SimDisk::new(1).shared();
    let dir = Arc::new(DataDir::open_or_create(disk, Path::new("/data"), DirectoryId::new(1), 4).unwrap());
    let (jobs, asked) = (Arc::new(Jobs::default()), Arc::new(Asked::default()));
    let mut now = Instant::now();
    jobs.set_now(now);
    let clock = Arc::new(|| Timestamp::new(1_700_000_000_000));
    let config = ShardsConfig { shards: 1, ..ShardsConfig::default() };
    let mut shards = ManualShards::start(&config, Arc::clone(&dir), clock, jobs.clone(), asked.clone()).unwrap();
    let open = |shards: &ManualShards<Ledger>| {
        let spec = ReplicaSpec {
            tp: TP,
            replica: ReplicaId::new(2),
            dir: dir.replica_dir(TP),
            log: LogConfig::default(),
            flush: FlushMode::Quorum,
            retention: RetentionConfig::default(),
            internal: false,
            max_message_bytes: 1 << 20,
            peers: Arc::new([(ReplicaId::new(1), BrokerId::new(1)), (ReplicaId::new(2), BrokerId::new(2))]),
            start: Start::Learner,
        };
        let (sender, receiver) = oneshot::channel();
        shards.shards().open(spec, Ledger::default(), Reply::from(sender));
        receiver
    };
    let mut go_on = |shards: &mut ManualShards<Ledger>| {
        now += Duration::from_millis(100);
        jobs.set_now(now);
        shards.round(now);
    };
    let first = open(&shards);
    while asked.0.lock().unwrap().is_empty() {
        go_on(&mut shards);
        jobs.run();
    }
    let (closed, mut is_closed) = oneshot::channel();
    shards.shards().close(TP, false, Reply::from(closed));
    while is_closed.try_recv().is_err() {
        go_on(&mut shards);
        jobs.run();
    }
    let late = asked.0.lock().unwrap().remove(0);
    late.send(Ok(PullAnswer::Checkpoint {
        bytes: Bytes::from_static(b"a checkpoint"),
        first_index: RaftIndex::new(2),
        first_offset: Offset::ZERO,
        local_start: (Offset::ZERO, RaftIndex::new(2)),
    }));
    go_on(&mut shards);
    // Its place is another one's, and what was begun for it comes home.
    let second = open(&shards);
    while asked.0.lock().unwrap().is_empty() {
        go_on(&mut shards);
        jobs.run();
    }
    drop((first, second));
}
