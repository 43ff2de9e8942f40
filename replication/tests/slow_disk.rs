//! One of three brokers has a disk whose flushes take ten seconds: what others lead goes on as before, what it led is led by
//! others, and when the disk is well again nothing is missing. And one of two groups of a shard that gets nothing done.

mod ledger;

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::{
    BrokerId, DirectoryId, Error, ErrorCode, Offset, PartitionId, ReplicaId, TopicId, TopicPartition,
};
use flowstone_replication::{
    Acks, FlushMode, GroupMessage, LogConfig, PeerBody, PeerTransport, Permit, PullAnswer, PullRequest, ReplicaHandle,
    ReplicaSpec, Reply, RetentionConfig, Shards, ShardsConfig, Start, system_clock,
};
use flowstone_storage::disk::DirLock;
use flowstone_storage::{DataDir, Disk, DiskFile, OpenMode, RealDisk};
use ledger::{Ledger, batch};
use tokio::sync::oneshot;

/// Of one flush, while the disk is slow.
const FLUSH: Duration = Duration::from_secs(10);
/// Far less than one such flush, far more than an election takes.
const BOUND: Duration = Duration::from_secs(5);
/// Whatever is waited for comes much sooner.
const PATIENCE: Duration = Duration::from_secs(60);
const PARTITIONS: i32 = 2;
/// The broker with the slow disk.
const SICK: usize = 0;

/// Whether flushes are slow; those that wait are told when they no longer are.
#[derive(Debug, Default)]
struct Gate {
    slow: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, slow: bool) {
        *self.slow.lock().unwrap() = slow;
        self.changed.notify_all();
    }

    /// Takes as long as a flush.
    fn pass(&self) {
        drop(self.changed.wait_timeout_while(self.slow.lock().unwrap(), FLUSH, |slow| *slow).unwrap());
    }
}

#[derive(Debug)]
struct SlowDisk {
    inner: RealDisk,
    gate: Arc<Gate>,
}

impl Disk for SlowDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(SlowFile { inner: self.inner.open(path, mode)?, gate: Arc::clone(&self.gate) }))
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.create_dir_all(path)
    }
    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        self.inner.read_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir_all(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.gate.pass();
        self.inner.sync_dir(path)
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.inner.exists(path)
    }
    fn file_len(&self, path: &Path) -> io::Result<u64> {
        self.inner.file_len(path)
    }
    fn available_bytes(&self, path: &Path) -> io::Result<u64> {
        self.inner.available_bytes(path)
    }
    fn open_logs(&self) -> &Arc<AtomicUsize> {
        self.inner.open_logs()
    }
    fn lock(&self, path: &Path) -> io::Result<Option<DirLock>> {
        self.inner.lock(path)
    }
}

#[derive(Debug)]
struct SlowFile {
    inner: Arc<dyn DiskFile>,
    gate: Arc<Gate>,
}

impl DiskFile for SlowFile {
    fn write_vectored_at(&self, parts: &[IoSlice<'_>], position: u64) -> io::Result<()> {
        self.inner.write_vectored_at(parts, position)
    }
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.inner.read_at(buffer, position)
    }
    fn read_at_nowait(&self, buffer: &mut [u8], position: u64) -> io::Result<Option<usize>> {
        self.inner.read_at_nowait(buffer, position)
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }
    fn allocate(&self, position: u64, len: u64) -> io::Result<bool> {
        self.inner.allocate(position, len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.gate.pass();
        self.inner.sync_data()
    }
    fn map(&self, len: u64) -> io::Result<Bytes> {
        self.inner.map(len)
    }
    fn map_is_live(&self) -> bool {
        self.inner.map_is_live()
    }
}

type Places = Arc<Mutex<HashMap<BrokerId, Weak<Shards<Ledger>>>>>;

#[derive(Debug)]
struct Link {
    brokers: Places,
    own: BrokerId,
    /// Followers of partition 0 get heartbeats, and no entries.
    holds_entries: Arc<AtomicBool>,
}

impl Link {
    fn reach(&self, to: BrokerId) -> Option<Arc<Shards<Ledger>>> {
        self.brokers.lock().unwrap().get(&to)?.upgrade()
    }
}

impl PeerTransport for Link {
    fn send(&self, to: BrokerId, mut messages: Vec<GroupMessage>) {
        if self.holds_entries.load(Ordering::Relaxed) {
            messages.retain(|it| it.tp != tp(0) || !matches!(it.message.body, PeerBody::Append { .. }));
        }
        if let Some(shards) = self.reach(to) {
            shards.deliver(self.own, messages);
        }
    }

    fn pull(&self, from: BrokerId, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        match self.reach(from) {
            Some(shards) => shards.serve_pull(request, reply),
            None => reply.send(Err(Error::new(ErrorCode::TimedOut, "not reached"))),
        }
    }
}

fn tp(partition: i32) -> TopicPartition {
    TopicPartition::new(TopicId::new(5), PartitionId::new(partition))
}

fn broker_id(at: usize) -> BrokerId {
    BrokerId::new(at as i32 + 1)
}

fn replica_id(partition: i32, at: usize) -> ReplicaId {
    ReplicaId::new(10 * (partition as u64 + 1) + at as u64 + 1)
}

fn ask<T: Send + 'static>(with: impl FnOnce(Reply<T>)) -> T {
    let (sender, receiver) = oneshot::channel();
    with(Reply::from(sender));
    receiver.blocking_recv().expect("every request is answered")
}

#[track_caller]
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Cluster {
    /// By broker, then by partition.
    handles: Vec<Vec<ReplicaHandle<Ledger>>>,
    // Behind the handles: dropped after them, as are the folders after the shards.
    shards: Vec<Arc<Shards<Ledger>>>,
    gates: Vec<Arc<Gate>>,
    holds_entries: Arc<AtomicBool>,
    _folders: Vec<tempfile::TempDir>,
    next_sequence: i32,
}

impl Cluster {
    /// Each partition has a replica on every broker, and each broker one shard, so that nothing but the disk tells them apart.
    fn start() -> Cluster {
        let brokers = Places::default();
        let mut cluster = Cluster {
            handles: Vec::new(),
            shards: Vec::new(),
            gates: Vec::new(),
            holds_entries: Arc::default(),
            _folders: Vec::new(),
            next_sequence: 0,
        };
        for at in 0..3 {
            let folder = tempfile::tempdir().unwrap();
            let gate = Arc::new(Gate::default());
            let disk: Arc<dyn Disk> =
                Arc::new(SlowDisk { inner: RealDisk::with_process_limit(), gate: Arc::clone(&gate) });
            let directory = DirectoryId::new(at as u128 + 1);
            let data_dir = Arc::new(DataDir::open_or_create(disk, folder.path(), directory, 4).unwrap());
            let link = Arc::new(Link {
                brokers: Arc::clone(&brokers),
                own: broker_id(at),
                holds_entries: Arc::clone(&cluster.holds_entries),
            });
            let config = ShardsConfig { shards: 1, seed: at as u64, ..ShardsConfig::default() };
            let shards = Arc::new(Shards::start(config, Arc::clone(&data_dir), system_clock(), link).unwrap());
            brokers.lock().unwrap().insert(broker_id(at), Arc::downgrade(&shards));
            let open = |partition: i32| {
                let peers: Vec<_> = (0..3).map(|at| (replica_id(partition, at), broker_id(at))).collect();
                let spec = ReplicaSpec {
                    tp: tp(partition),
                    replica: replica_id(partition, at),
                    dir: data_dir.replica_dir(tp(partition)),
                    log: LogConfig::default(),
                    flush: FlushMode::Quorum,
                    retention: RetentionConfig::default(),
                    internal: false,
                    max_message_bytes: 1 << 20,
                    peers: peers.as_slice().into(),
                    start: Start::FirstVoter { voters: peers.iter().map(|(replica, _)| *replica).collect() },
                };
                ask(|opened| shards.open(spec, Ledger::default(), opened)).unwrap()
            };
            cluster.handles.push((0..PARTITIONS).map(open).collect());
            cluster.shards.push(shards);
            cluster.gates.push(gate);
            cluster._folders.push(folder);
        }
        cluster
    }

    fn handle(&self, at: usize, partition: i32) -> &ReplicaHandle<Ledger> {
        &self.handles[at][partition as usize]
    }

    /// Who leads and serves: the one of the highest term that says so.
    fn leader(&self, partition: i32) -> usize {
        until("somebody leads", || {
            let ready = (0..3).filter(|&at| self.handle(at, partition).status().is_ready());
            ready.max_by_key(|&at| self.handle(at, partition).status().term)
        })
    }

    fn lead(&self, at: usize, partition: i32) {
        until("it leads", || {
            let leader = self.leader(partition);
            if leader == at {
                return Some(());
            }
            // It may fail; then it is tried again.
            let to = Some(replica_id(partition, at));
            drop(ask(|reply| self.handle(leader, partition).transfer_leader(to, reply)));
            None
        });
    }

    /// Writes one batch, wherever it is taken, as a client would: whoever does not answer in time is asked no longer. How
    /// long it took.
    fn write(&mut self, partition: i32) -> Duration {
        self.write_as(1, partition)
    }

    fn write_as(&mut self, producer: i64, partition: i32) -> Duration {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let began = Instant::now();
        until("a write is taken", || {
            let (bytes, header) = batch(producer, sequence, 1, 900);
            let (sender, mut receiver) = oneshot::channel();
            let asked = self.leader(partition);
            let handle = self.handle(asked, partition);
            handle.produce(bytes, header, Acks::Quorum, Permit::unbounded(), Reply::from(sender));
            loop {
                match receiver.try_recv() {
                    Ok(Ok(_)) => return Some(()),
                    Ok(Err(error)) => {
                        assert!(error.is_retriable(), "{error}");
                        return None;
                    }
                    // Another one leads by now.
                    Err(_) if self.leader(partition) != asked => return None,
                    Err(_) => {
                        assert!(began.elapsed() < PATIENCE, "no answer from broker {asked}");
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            }
        });
        began.elapsed()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // However the test ends: no flush holds up the end of the shards.
        self.gates.iter().for_each(|gate| gate.set(false));
    }
}

/// A cluster whose first broker has a slow disk from now on; it leads partition 0, and the second one partition 1.
fn with_a_slow_disk() -> Cluster {
    let mut cluster = Cluster::start();
    cluster.lead(SICK, 0);
    cluster.lead(1, 1);
    for partition in [0, 1] {
        for _ in 0..20 {
            cluster.write(partition);
        }
    }
    cluster.gates[SICK].set(true);
    cluster
}

#[test]
fn a_slow_disk_holds_up_no_partition_of_others_and_catches_up() {
    let mut cluster = with_a_slow_disk();
    let mut took: Vec<Duration> = (0..200).map(|_| cluster.write(1)).collect();
    took.sort();
    let p99 = took[took.len() * 99 / 100];
    assert!(p99 < BOUND / 5, "p99 of another broker's partition is {p99:?}");
    assert_eq!(cluster.leader(1), 1);
    // The disk is well again: it has everything soon.
    cluster.gates[SICK].set(false);
    for partition in [0, 1] {
        cluster.write(partition);
        until("the broker with the slow disk has all of it", || {
            let end = cluster.handle(cluster.leader(partition), partition).status().high_watermark;
            let status = cluster.handle(SICK, partition).status();
            (end > Offset::ZERO && status.high_watermark == end && status.end_offset == end).then_some(())
        });
    }
}

#[test]
fn leadership_moves_away_from_a_slow_disk() {
    let mut cluster = with_a_slow_disk();
    // The two others are a majority, and one of them leads where it cannot.
    for number in 0..20 {
        let took = cluster.write(0);
        assert!(took < BOUND, "write {number} to the partition of the broker with the slow disk took {took:?}");
    }
    until("leadership moves to a broker whose disk is well", || (cluster.leader(0) != SICK).then_some(()));
    // Handed over, or, where the shard's own thread waits for that flush, lost to those who heard nothing of it.
    until("its disk counts as slow: nobody gives it back at once", || {
        cluster.handle(SICK, 0).is_disk_slow(Instant::now()).then_some(())
    });
    assert!(!cluster.handle(1, 0).is_disk_slow(Instant::now()));
}

#[test]
fn a_group_that_gets_nothing_committed_holds_up_no_other_in_its_shard() {
    let mut cluster = Cluster::start();
    for partition in [0, 1] {
        cluster.lead(SICK, partition);
        cluster.write(partition);
    }
    let term = cluster.handle(SICK, 0).status().term;
    cluster.holds_entries.store(true, Ordering::Relaxed);
    // As many as clients could have under way.
    let waiting: Vec<_> = (0..200)
        .map(|_| {
            let (bytes, header) = batch(1, cluster.next_sequence, 1, 900);
            cluster.next_sequence += 1;
            let (sender, receiver) = oneshot::channel();
            cluster.handle(SICK, 0).produce(bytes, header, Acks::Quorum, Permit::unbounded(), Reply::from(sender));
            receiver
        })
        .collect();
    let mut took: Vec<Duration> = (0..200).map(|_| cluster.write_as(2, 1)).collect();
    took.sort();
    let p99 = took[took.len() * 99 / 100];
    assert!(p99 < BOUND / 5, "p99 beside a group that is stuck is {p99:?}");
    assert_eq!(cluster.leader(1), SICK);
    let status = cluster.handle(SICK, 0).status();
    assert!(
        status.high_watermark < status.end_offset && status.term == term,
        "nothing of it was committed: {status:?}"
    );
    cluster.holds_entries.store(false, Ordering::Relaxed);
    for answer in waiting {
        answer.blocking_recv().expect("every request is answered").expect("it is the same leader");
    }
}
