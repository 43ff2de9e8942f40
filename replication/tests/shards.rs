//! Shards with their threads, pools and timers, on a real disk.

mod ledger;
mod shell;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::{DirectoryId, Error, ErrorCode, Offset, PartitionId, ReplicaId, TopicId, TopicPartition};
use flowstone_replication::{
    Acks, FlushMode, Health, LogConfig, NoPeers, Permit, Produced, ReadAnswer, ReadRequest, Reconfigure, ReplicaHandle,
    ReplicaSpec, Reply, RetentionConfig, Role, Shards, ShardsConfig, Start, TrimTo, system_clock,
};
use flowstone_storage::{Checkpoint, DataDir, Disk, HardStateFile, RealDisk};
use ledger::{Counter, Ledger, batch};
use tokio::sync::oneshot;

/// A broker's shards over one data directory; opened again by the next.
struct Broker {
    shards: Shards<Ledger>,
    data_dir: Arc<DataDir>,
}

fn data_dir(path: &Path) -> Arc<DataDir> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    Arc::new(DataDir::open_or_create(disk, path, DirectoryId::new(1), 4).unwrap())
}

fn start(path: &Path, config: ShardsConfig) -> Broker {
    let data_dir = data_dir(path);
    let shards = Shards::start(config, Arc::clone(&data_dir), system_clock(), Arc::new(NoPeers)).unwrap();
    Broker { shards, data_dir }
}

fn two_shards() -> ShardsConfig {
    ShardsConfig { shards: 2, ..ShardsConfig::default() }
}

fn tp(partition: i32) -> TopicPartition {
    TopicPartition::new(TopicId::new(5), PartitionId::new(partition))
}

fn spec(data_dir: &DataDir, partition: i32) -> ReplicaSpec {
    ReplicaSpec {
        tp: tp(partition),
        replica: ReplicaId::new(1_000 + partition as u64),
        dir: data_dir.replica_dir(tp(partition)),
        log: LogConfig::default(),
        flush: FlushMode::Quorum,
        retention: RetentionConfig::default(),
        internal: false,
        max_message_bytes: 1 << 20,
        peers: Arc::from([]),
        start: Start::alone(ReplicaId::new(1_000 + partition as u64)),
    }
}

fn wait<T>(answer: oneshot::Receiver<T>) -> T {
    answer.blocking_recv().expect("every request is answered")
}

fn ask<T>(send: impl FnOnce(Reply<T>)) -> oneshot::Receiver<T> {
    let (sender, answer) = oneshot::channel();
    send(Reply::from(sender));
    answer
}

impl Broker {
    fn open(&self, partition: i32) -> ReplicaHandle<Ledger> {
        self.open_spec(spec(&self.data_dir, partition))
    }

    fn open_spec(&self, spec: ReplicaSpec) -> ReplicaHandle<Ledger> {
        wait(ask(|opened| self.shards.open(spec, Ledger::default(), opened))).unwrap()
    }

    fn lead(&self, partition: i32) -> ReplicaHandle<Ledger> {
        let handle = self.open(partition);
        ready(&handle);
        handle
    }
}

fn ready(handle: &ReplicaHandle<Ledger>) {
    block_on(handle.ready()).unwrap();
}

/// A runtime of its own is not worth it for one future.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        std::thread::park();
    }
}

fn produce(
    handle: &ReplicaHandle<Ledger>,
    producer: i64,
    sequence: i32,
    acks: Acks,
) -> oneshot::Receiver<Result<Produced, Error>> {
    let (batch, header) = batch(producer, sequence, 1, 100);
    ask(|reply| handle.produce(batch, header, acks, Permit::unbounded(), reply))
}

fn read(handle: &ReplicaHandle<Ledger>, from: i64, wait: bool) -> oneshot::Receiver<Result<ReadAnswer, Error>> {
    let request = ReadRequest { wait, ..ReadRequest::new(Offset::new(from), 1 << 20) };
    ask(|reply| handle.read(request, reply))
}

#[test]
fn what_was_acknowledged_is_there_after_a_clean_stop_and_without_one() {
    let temporary = tempfile::tempdir().unwrap();
    for round in 0..3 {
        let broker = start(temporary.path(), two_shards());
        let handles: Vec<_> = (0..10).map(|partition| broker.lead(partition)).collect();
        for handle in &handles {
            // All before is still there, and known to the machine: a duplicate gets its offset.
            for before in 0..round {
                let offset = wait(produce(handle, before, 0, Acks::Quorum)).unwrap().base_offset;
                assert_eq!(offset.get(), before * 11 + 1, "the no-op, then ten batches, per round");
            }
            let answers: Vec<_> = (0..10).map(|i| produce(handle, round, i, Acks::Quorum)).collect();
            for (i, answer) in answers.into_iter().enumerate() {
                assert_eq!(wait(answer).unwrap().base_offset.get(), round * 11 + 1 + i as i64);
            }
            let bytes = wait(read(handle, 0, false)).unwrap().bytes;
            bytes.verify().unwrap();
            assert_eq!(bytes.next.get(), (round + 1) * 11);
        }
        let running = temporary.path().join("running");
        assert!(running.exists());
        drop(handles);
        let Broker { shards, data_dir } = broker;
        shards.shutdown();
        drop(data_dir);
        assert!(!running.exists(), "a clean stop is noted");
        assert_eq!(flushed(temporary.path(), 3), Some(1 + (round as u64 + 1) * 11), "and how far the log is flushed");
    }
}

/// How far a partition's log is flushed, as its stripe's file says.
fn flushed(path: &Path, partition: i32) -> Option<u64> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let replica = ReplicaId::new(1_000 + partition as u64);
    (0..4).find_map(|stripe| {
        let (_, found, rot) = HardStateFile::open(Arc::clone(&disk), &data_dir(path).hard_state_dir(), stripe).unwrap();
        assert_eq!(rot, None);
        found.get(&replica).map(|state| state.flushed.get())
    })
}

#[test]
fn a_thousand_replicas_lead_in_well_under_a_second_each_restart() {
    let temporary = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let broker = start(temporary.path(), two_shards());
        let opening: Vec<_> = (0..1_000)
            .map(|partition| {
                ask(|opened| broker.shards.open(spec(&broker.data_dir, partition), Ledger::default(), opened))
            })
            .collect();
        let handles: Vec<_> = opening.into_iter().map(|opened| wait(opened).unwrap()).collect();
        for handle in &handles {
            ready(handle);
        }
        let terms: Vec<_> = handles.iter().map(|handle| handle.status().term.get()).collect();
        assert!(terms.iter().all(|term| *term == terms[0]), "one election each");
        // Group commit of votes: far fewer flushes of hard states than replicas. The time itself is the bench's matter.
        broker.shards.shutdown();
    }
}

#[test]
fn many_replicas_share_what_a_restart_may_replay() {
    let temporary = tempfile::tempdir().unwrap();
    // Two replicas of one shard: 1 000 entries each, though one alone might have 1 500.
    let config = ShardsConfig { shards: 1, replay_entries_max: 1_500, ..ShardsConfig::default() };
    let broker = start(temporary.path(), config);
    let handles = [broker.lead(1), broker.lead(2)];
    let checkpoints = |partition| {
        let dir = broker.data_dir.replica_dir(tp(partition));
        let names = broker.data_dir.disk().read_dir(&dir).unwrap();
        names.iter().filter_map(|name| Checkpoint::index_of_name(name)).max().map(|index| index.get())
    };
    for (partition, handle) in (1..).zip(&handles) {
        let answers: Vec<_> = (0..1_200).map(|sequence| produce(handle, 1, sequence, Acks::Quorum)).collect();
        for answer in answers {
            wait(answer).unwrap();
        }
        until(|| checkpoints(partition) > Some(1_000));
    }
}

#[test]
fn a_waiting_read_is_answered_by_the_next_batch() {
    let temporary = tempfile::tempdir().unwrap();
    let broker = start(temporary.path(), two_shards());
    let handle = broker.lead(1);
    let waiting = read(&handle, 1, true);
    wait(produce(&handle, 1, 0, Acks::Quorum)).unwrap();
    let answer = wait(waiting).unwrap();
    answer.bytes.verify().unwrap();
    assert_eq!(answer.high_watermark, Offset::new(2));
}

#[test]
fn closing_refuses_and_deleting_removes_the_files() {
    let temporary = tempfile::tempdir().unwrap();
    let broker = start(temporary.path(), two_shards());
    let handle = broker.lead(1);
    wait(produce(&handle, 1, 0, Acks::Quorum)).unwrap();
    let waiting = read(&handle, 2, true);
    wait(ask(|closed| broker.shards.close(tp(1), false, closed)));
    assert_eq!(wait(waiting).unwrap_err().code, ErrorCode::NotLeader);
    assert_eq!(wait(produce(&handle, 1, 1, Acks::Quorum)).unwrap_err().code, ErrorCode::NotLeader);

    // Opened again, it is the same replica; the old handle stays dead.
    let again = broker.lead(1);
    assert_eq!(wait(produce(&again, 1, 0, Acks::Quorum)).unwrap().base_offset, Offset::new(1));
    assert_eq!(wait(produce(&handle, 1, 1, Acks::Quorum)).unwrap_err().code, ErrorCode::NotLeader);

    let dir = broker.data_dir.replica_dir(tp(1));
    assert!(dir.exists());
    wait(ask(|closed| broker.shards.close(tp(1), true, closed)));
    assert!(!dir.exists());
    // Under a new id, it begins anew.
    let mut anew = spec(&broker.data_dir, 1);
    anew.replica = ReplicaId::new(99);
    anew.start = Start::alone(anew.replica);
    let anew = broker.open_spec(anew);
    ready(&anew);
    assert_eq!(wait(produce(&anew, 1, 0, Acks::Quorum)).unwrap().base_offset, Offset::new(1));
}

#[test]
fn a_second_opening_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let broker = start(temporary.path(), two_shards());
    let _handle = broker.lead(1);
    let spec = spec(&broker.data_dir, 1);
    let second = wait(ask(|opened| broker.shards.open(spec, Ledger::default(), opened)));
    assert_eq!(second.unwrap_err().code, ErrorCode::InvalidRequest);
}

#[test]
fn files_that_are_gone_quarantine_the_replica_and_nobody_else() {
    let temporary = tempfile::tempdir().unwrap();
    let broker = start(temporary.path(), two_shards());
    wait(produce(&broker.lead(1), 1, 0, Acks::Quorum)).unwrap();
    wait(produce(&broker.lead(2), 1, 0, Acks::Quorum)).unwrap();
    let dir = broker.data_dir.replica_dir(tp(1));
    broker.shards.shutdown();
    drop(broker.data_dir);
    std::fs::remove_dir_all(&dir).unwrap();

    let broker = start(temporary.path(), two_shards());
    let lost = broker.open(1);
    let error = block_on(lost.ready()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Quarantined);
    assert!(error.message.contains(&dir.display().to_string()), "the error names the place: {error}");
    assert!(matches!(lost.status().health, Health::Quarantined { .. }));
    assert_eq!(wait(produce(&lost, 1, 0, Acks::Quorum)).unwrap_err().code, ErrorCode::Quarantined);
    assert!(!dir.exists(), "nothing is made in its place");
    assert_eq!(wait(produce(&broker.lead(2), 1, 0, Acks::Quorum)).unwrap().base_offset, Offset::new(1));
}

#[test]
fn the_byte_budget_is_given_back_with_the_answer() {
    let temporary = tempfile::tempdir().unwrap();
    let config = ShardsConfig { shards: 1, inbox_bytes_max: 1_000, ..ShardsConfig::default() };
    let broker = start(temporary.path(), config);
    let handle = broker.lead(1);
    for sequence in 0..20 {
        // Each takes more than half of it: the next has to wait for the answer to the one before.
        let permit = block_on(handle.reserve(600));
        assert!(handle.try_reserve(600).is_none());
        let (batch, header) = batch(1, sequence, 1, 100);
        drop(ask(|reply| handle.produce(batch, header, Acks::Quorum, permit, reply)));
    }
    let _all = block_on(handle.reserve(1_000));
    assert_eq!(handle.status().records, 20);
}

#[test]
fn relaxed_flushes_in_the_background() {
    let temporary = tempfile::tempdir().unwrap();
    let config = ShardsConfig { shards: 1, relaxed_flush_within: Duration::from_millis(5), ..ShardsConfig::default() };
    let broker = start(temporary.path(), config);
    let mut relaxed = spec(&broker.data_dir, 1);
    relaxed.flush = FlushMode::Relaxed;
    let handle = broker.open_spec(relaxed);
    ready(&handle);
    let flushes = || broker.shards.metrics()[0].flushes;
    for sequence in 0..3 {
        let before = flushes();
        wait(produce(&handle, 1, sequence, Acks::Quorum)).unwrap();
        until(|| flushes() > before);
    }
}

#[test]
fn a_closed_relaxed_replica_is_flushed_and_says_so() {
    let temporary = tempfile::tempdir().unwrap();
    let config =
        ShardsConfig { shards: 1, relaxed_flush_within: Duration::from_secs(3_600), ..ShardsConfig::default() };
    let Broker { shards, data_dir } = start(temporary.path(), config);
    let mut relaxed = spec(&data_dir, 1);
    relaxed.flush = FlushMode::Relaxed;
    let handle = wait(ask(|opened| shards.open(relaxed, Ledger::default(), opened))).unwrap();
    ready(&handle);
    wait(produce(&handle, 1, 0, Acks::Quorum)).unwrap();
    wait(ask(|closed| shards.close(tp(1), false, closed)));
    shards.shutdown();
    drop(data_dir);
    assert_eq!(flushed(temporary.path(), 1), Some(3), "creation, no-op, one batch");
}

/// Waits for a condition; the test's own time limit is the runner's.
fn until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

#[test]
fn retention_moves_the_log_start_and_frees_the_disk() {
    let temporary = tempfile::tempdir().unwrap();
    let config = ShardsConfig { shards: 1, retention_every: Duration::from_millis(32), ..ShardsConfig::default() };
    let broker = start(temporary.path(), config);
    let mut small = spec(&broker.data_dir, 1);
    small.log.segment_bytes = 4_096;
    small.retention.bytes = Some(8_192);
    let handle = broker.open_spec(small);
    ready(&handle);
    for sequence in 0..200 {
        wait(produce(&handle, 1, sequence, Acks::Quorum)).unwrap();
    }
    // 200 batches of some 170 bytes: most of them go, by whole segments.
    until(|| handle.status().log_start.get() > 100 && handle.status().size_bytes < 20_000);
    assert_eq!(wait(read(&handle, 1, false)).unwrap_err().code, ErrorCode::OffsetOutOfRange);
    let status = handle.status();
    wait(read(&handle, status.log_start.get(), false)).unwrap().bytes.verify().unwrap();
    assert!(status.records < 100);

    // Given later, it counts, too.
    let other = broker.lead(2);
    for sequence in 0..100 {
        wait(produce(&other, 1, sequence, Acks::Quorum)).unwrap();
    }
    other.reconfigure(Reconfigure {
        log: LogConfig { segment_bytes: 4_096, ..LogConfig::default() },
        retention: RetentionConfig { time: None, bytes: Some(1) },
        flush: FlushMode::Quorum,
        max_message_bytes: 1 << 20,
    });
    wait(produce(&other, 1, 100, Acks::Quorum)).unwrap();
    until(|| other.status().log_start.get() > 90);
}

#[test]
fn settings_change_while_it_runs() {
    let temporary = tempfile::tempdir().unwrap();
    let broker = start(temporary.path(), two_shards());
    let handle = broker.lead(1);
    handle.reconfigure(Reconfigure {
        log: LogConfig::default(),
        retention: RetentionConfig::default(),
        flush: FlushMode::Quorum,
        max_message_bytes: 64,
    });
    assert_eq!(wait(produce(&handle, 1, 0, Acks::Quorum)).unwrap_err().code, ErrorCode::BatchTooLarge);
}

#[test]
fn a_stop_finishes_what_was_accepted() {
    let temporary = tempfile::tempdir().unwrap();
    let broker = start(temporary.path(), two_shards());
    let handle = broker.lead(1);
    let answers: Vec<_> = (0..500).map(|sequence| produce(&handle, 1, sequence, Acks::Quorum)).collect();
    let waiting = read(&handle, 10_000, false);
    broker.shards.shutdown();
    for answer in answers {
        wait(answer).unwrap();
    }
    assert!(wait(waiting).is_err());
    assert_eq!(wait(produce(&handle, 1, 501, Acks::Quorum)).unwrap_err().code, ErrorCode::ShuttingDown);
}

#[test]
fn coordinators_run_on_the_same_shards() {
    let temporary = tempfile::tempdir().unwrap();
    let data_dir = data_dir(temporary.path());
    let shards =
        Shards::<Counter>::start(two_shards(), Arc::clone(&data_dir), system_clock(), Arc::new(NoPeers)).unwrap();
    let mut internal = spec(&data_dir, 0);
    internal.internal = true;
    let handle = wait(ask(|opened| shards.open(internal, Counter::default(), opened))).unwrap();
    block_on(handle.ready()).unwrap();
    let answers: Vec<_> = (1..=100).map(|add| ask(|reply| handle.command(add, reply))).collect();
    let totals: Vec<_> = answers.into_iter().map(|answer| wait(answer).unwrap()).collect();
    assert_eq!(totals.last(), Some(&5_050));
    assert_eq!(handle.status().role, Role::Leader);
    assert_eq!(wait(ask(|reply| handle.trim(TrimTo::HighWatermark, reply))), Ok(Offset::new(101)));
    drop(shards);
}
