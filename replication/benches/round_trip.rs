//! One record at a time through a shard, and a thousand replicas started, against the least that the disk and two threads
//! allow; all in one run, interleaved, so that the ratios mean something on a shared machine.
//!
//! The skeleton: a thread that takes a message from a queue, writes it into zeros that are there already, calls
//! `fdatasync`, and answers.
#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(clippy::print_stdout, reason = "its table is what it is for")]

#[path = "../tests/ledger/mod.rs"]
mod ledger;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use flowstone_protocol::{DirectoryId, PartitionId, ReplicaId, TopicId, TopicPartition};
use flowstone_replication::{
    Acks, FlushMode, LogConfig, NoPeers, Permit, ReplicaHandle, ReplicaSpec, Reply, RetentionConfig, Shards,
    ShardsConfig, Start, system_clock,
};
use flowstone_storage::{DataDir, Disk, RealDisk};
use ledger::{Ledger, batch};
use tokio::sync::oneshot;

const ROUNDS: usize = 7;
/// A round takes turns this often...
const TURNS: usize = 40;
/// ...with this many records each, so that all meet the same weather.
const RECORDS: usize = 50;

fn percentile(sorted: &[Duration], of: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * of) as usize].as_secs_f64() * 1e6
}

fn spec(data_dir: &DataDir, partition: i32, flush: FlushMode) -> ReplicaSpec {
    let tp = TopicPartition::new(TopicId::new(9), PartitionId::new(partition));
    ReplicaSpec {
        tp,
        replica: ReplicaId::new(partition as u64 + 1),
        dir: data_dir.replica_dir(tp),
        log: LogConfig::default(),
        flush,
        retention: RetentionConfig::default(),
        internal: false,
        max_message_bytes: 4 << 20,
        peers: Arc::from([]),
        start: Start::alone(ReplicaId::new(partition as u64 + 1)),
    }
}

struct Skeleton {
    requests: mpsc::Sender<(Vec<u8>, oneshot::Sender<()>)>,
}

impl Skeleton {
    fn start(path: &Path) -> Self {
        let file = File::create(path).expect("a file");
        file.write_all_at(&vec![0; 64 << 20], 0).and_then(|()| file.sync_all()).expect("64 MiB of zeros");
        let (requests, taken) = mpsc::channel::<(Vec<u8>, oneshot::Sender<()>)>();
        std::thread::spawn(move || {
            let mut at = 0;
            for (bytes, reply) in taken {
                file.write_all_at(&bytes, at).and_then(|()| file.sync_data()).expect("written and flushed");
                at += bytes.len() as u64;
                let _ = reply.send(());
            }
        });
        Self { requests }
    }

    fn round(&self) -> Vec<Duration> {
        (0..RECORDS)
            .map(|_| {
                let bytes = vec![1; 1_000];
                let began = Instant::now();
                let (reply, answer) = oneshot::channel();
                self.requests.send((bytes, reply)).expect("it runs");
                answer.blocking_recv().expect("an answer");
                began.elapsed()
            })
            .collect()
    }
}

struct Sharded {
    // Held so that the shards live.
    _shards: Shards<Ledger>,
    handle: ReplicaHandle<Ledger>,
    sequence: i32,
}

impl Sharded {
    fn start(path: &Path, inline_flush_bytes_max: u64, flush: FlushMode) -> Self {
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
        let data_dir = DataDir::open_or_create(disk, path, DirectoryId::new(1), 4).expect("a data directory");
        let data_dir = Arc::new(data_dir);
        let config = ShardsConfig { shards: 2, inline_flush_bytes_max, ..ShardsConfig::default() };
        let shards = Shards::start(config, Arc::clone(&data_dir), system_clock(), Arc::new(NoPeers)).expect("shards");
        let handle = open(&shards, spec(&data_dir, 1, flush)).blocking_recv().expect("an answer").expect("a replica");
        while !handle.status().is_ready() {
            std::thread::yield_now();
        }
        Self { _shards: shards, handle, sequence: 0 }
    }

    fn round(&mut self) -> Vec<Duration> {
        (0..RECORDS)
            .map(|_| {
                let (batch, header) = batch(1, self.sequence, 1, 1_000);
                self.sequence += 1;
                let began = Instant::now();
                let (reply, answer) = oneshot::channel();
                self.handle.produce(batch, header, Acks::Quorum, Permit::unbounded(), Reply::from(reply));
                answer.blocking_recv().expect("an answer").expect("appended");
                began.elapsed()
            })
            .collect()
    }
}

type Opening = oneshot::Receiver<Result<ReplicaHandle<Ledger>, flowstone_protocol::Error>>;

fn open(shards: &Shards<Ledger>, spec: ReplicaSpec) -> Opening {
    let (opened, handle) = oneshot::channel();
    shards.open(spec, Ledger::default(), Reply::from(opened));
    handle
}

/// Opens a thousand replicas; gives the time until all lead.
fn thousand(path: &Path) -> Duration {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let data_dir = Arc::new(DataDir::open_or_create(disk, path, DirectoryId::new(1), 4).expect("a data directory"));
    let config = ShardsConfig { shards: 2, ..ShardsConfig::default() };
    let began = Instant::now();
    let shards = Shards::start(config, Arc::clone(&data_dir), system_clock(), Arc::new(NoPeers)).expect("shards");
    let opening: Vec<_> =
        (0..1_000).map(|partition| open(&shards, spec(&data_dir, partition, FlushMode::Quorum))).collect();
    let handles: Vec<_> =
        opening.into_iter().map(|opened| opened.blocking_recv().expect("an answer").expect("a replica")).collect();
    for handle in &handles {
        while !handle.status().is_ready() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    let took = began.elapsed();
    let stopping = Instant::now();
    shards.shutdown();
    println!(
        "  1000 replicas: all lead after {:.0} ms; stopped cleanly in {:.0} ms",
        took.as_secs_f64() * 1e3,
        stopping.elapsed().as_secs_f64() * 1e3
    );
    took
}

/// Resident bytes and processor time of this process.
fn used() -> (u64, Duration) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or_default();
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name: user and system time are the 12th and 13th, in hundredths of a second.
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    let ticks: u64 = after_name.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    (pages * 4_096, Duration::from_millis(ticks * 10))
}

/// What ten thousand replicas cost that nobody uses.
fn idle(path: &Path) {
    const REPLICAS: i32 = 10_000;
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let data_dir = Arc::new(DataDir::open_or_create(disk, path, DirectoryId::new(1), 4).expect("a data directory"));
    let shards = Shards::start(
        ShardsConfig { shards: 2, ..ShardsConfig::default() },
        Arc::clone(&data_dir),
        system_clock(),
        Arc::new(NoPeers),
    )
    .expect("shards");
    let (before, _) = used();
    let opening: Vec<_> = (0..REPLICAS)
        .map(|partition| {
            let mut spec = spec(&data_dir, partition, FlushMode::Quorum);
            spec.retention.time = Some(Duration::from_secs(7 * 24 * 3_600));
            open(&shards, spec)
        })
        .collect();
    let handles: Vec<_> =
        opening.into_iter().map(|opened| opened.blocking_recv().expect("an answer").expect("a replica")).collect();
    while !handles.iter().all(|handle| handle.status().is_ready()) {
        std::thread::sleep(Duration::from_millis(10));
    }
    // The votes' flushed marks are flushed within a second: that is not idle yet.
    std::thread::sleep(Duration::from_secs(2));
    let (resident, busy) = used();
    std::thread::sleep(Duration::from_secs(10));
    let (_, busy_later) = used();
    println!(
        "  {REPLICAS} idle replicas: {} bytes of memory each, {:.2} % of a core in all",
        resident.saturating_sub(before) / REPLICAS as u64,
        (busy_later - busy).as_secs_f64() * 10.0
    );
}

/// Bytes per second of `partitions` partitions with batches of `bytes`, `in_flight` of them on their way in each.
fn bulk(path: &Path, partitions: i32, bytes: usize, in_flight: usize, total: usize) -> f64 {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let data_dir = Arc::new(DataDir::open_or_create(disk, path, DirectoryId::new(1), 4).expect("a data directory"));
    let shards = Shards::start(
        ShardsConfig { shards: 2, ..ShardsConfig::default() },
        Arc::clone(&data_dir),
        system_clock(),
        Arc::new(NoPeers),
    )
    .expect("shards");
    let opening: Vec<_> =
        (0..partitions).map(|partition| open(&shards, spec(&data_dir, partition, FlushMode::Quorum))).collect();
    let handles: Vec<_> =
        opening.into_iter().map(|opened| opened.blocking_recv().expect("an answer").expect("a replica")).collect();
    while !handles.iter().all(|handle| handle.status().is_ready()) {
        std::thread::yield_now();
    }
    let (batch, header) = batch(-1, 0, (bytes / 1_000) as i32, 1_000);
    let batches = total / bytes;
    let (answered, answers) = mpsc::channel();
    let began = Instant::now();
    for number in 0..batches {
        if number >= in_flight * partitions as usize {
            answers.recv().expect("an answer");
        }
        let answered = answered.clone();
        let reply = Reply::new(move |result: Result<_, flowstone_protocol::Error>| {
            result.expect("appended");
            answered.send(()).expect("it is waited for");
        });
        handles[number % partitions as usize].produce(batch.clone(), header, Acks::Quorum, Permit::unbounded(), reply);
    }
    for _ in 0..batches.min(in_flight * partitions as usize) {
        answers.recv().expect("an answer");
    }
    let rate = (batches * batch.len()) as f64 / began.elapsed().as_secs_f64();
    shards.shutdown();
    rate
}

/// The bare loop: the same bytes from memory into as many files in turn, flushed each time.
fn bare(path: &Path, files: usize, bytes: usize, total: usize) -> f64 {
    std::fs::create_dir_all(path).expect("a folder");
    let files: Vec<_> = (0..files).map(|number| File::create(path.join(number.to_string())).expect("a file")).collect();
    let chunk = vec![7; bytes];
    let began = Instant::now();
    for number in 0..total / bytes {
        let file = &files[number % files.len()];
        let at = (number / files.len() * bytes) as u64;
        file.write_all_at(&chunk, at).and_then(|()| file.sync_data()).expect("written and flushed");
    }
    total as f64 / began.elapsed().as_secs_f64()
}

fn main() {
    // `cargo test --benches` and the like run it for its compiling alone.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let skeleton = Skeleton::start(&temporary.path().join("skeleton"));
    let mut inline = Sharded::start(&temporary.path().join("inline"), 256 << 10, FlushMode::Quorum);
    let mut pool = Sharded::start(&temporary.path().join("pool"), 0, FlushMode::Quorum);
    let mut relaxed = Sharded::start(&temporary.path().join("relaxed"), 256 << 10, FlushMode::Relaxed);
    println!("one record of 1000 B at a time, us: p50 / p99 per round");
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let mut times: [Vec<Duration>; 4] = Default::default();
        for _ in 0..TURNS {
            times[0].extend(skeleton.round());
            times[1].extend(inline.round());
            times[2].extend(pool.round());
            times[3].extend(relaxed.round());
        }
        let [skeleton, inline, pool, relaxed] = times.map(|mut times| {
            times.sort_unstable();
            (percentile(&times, 0.5), percentile(&times, 0.99))
        });
        println!(
            "  skeleton {:.0} / {:.0}   shard, flush inline {:.0} / {:.0}   on the pool {:.0} / {:.0}   relaxed {:.0} / {:.0}",
            skeleton.0, skeleton.1, inline.0, inline.1, pool.0, pool.1, relaxed.0, relaxed.1
        );
        ratios.push((inline.0 / skeleton.0, pool.0 / skeleton.0));
    }
    ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
    let inline = ratios[ROUNDS / 2].0;
    ratios.sort_by(|a, b| a.1.total_cmp(&b.1));
    println!("  median ratio to the skeleton's p50: inline {inline:.2}, pool {:.2}", ratios[ROUNDS / 2].1);
    drop((inline, pool, relaxed));

    println!("8 partitions, batches of 1 MiB, MB/s flushed: a bare loop in turn / shards");
    for round in 0..ROUNDS {
        let path = temporary.path().join(format!("bulk-{round}"));
        let bare = bare(&path.join("bare"), 8, 1 << 20, 512 << 20);
        let bulk = bulk(&path.join("shards"), 8, 1 << 20, 4, 512 << 20);
        println!("  {:.0} / {:.0} = {:.2}", bare / 1e6, bulk / 1e6, bulk / bare);
        std::fs::remove_dir_all(&path).expect("removed");
    }

    println!("starting");
    let many = temporary.path().join("many");
    for _ in 0..4 {
        thousand(&many);
    }
    idle(&temporary.path().join("idle"));
}
