//! A log of ten records per key is compacted: how fast, in how much memory, and what a read takes meanwhile.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::{
    Compression, ControlType, Offset, PartitionId, RaftIndex, RecordBatchBuilder, ReplicaId, Term, Timestamp, TopicId,
    TopicPartition,
};
use flowstone_storage::{
    Compaction, CompactionConfig, CompactionLimits, Disk, EntryBody, Log, LogConfig, LogEntry, Read, RealDisk,
    ReplicaIdentity, Settled,
};

use crate::Failure;

const RECORDS: u64 = 10_000_000;
const KEYS: u64 = 1_000_000;
const RECORDS_PER_BATCH: u64 = 100;
const VALUE_BYTES: usize = 100;
/// As by default.
const MEMORY_BYTES: u64 = 64 << 20;
const PIECE_BYTES: u64 = 1 << 20;
const NOW: Timestamp = Timestamp::new(1_700_000_000_000);

/// Writes the log, then compacts it without a limit of its rate, while records are read at random offsets.
pub(crate) fn compaction(dir: &Path) -> Result<Vec<String>, Failure> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let mut log = written(&disk, dir)?;
    let bytes = log.size_bytes();
    let quiet = reads(&mut log, Duration::from_secs(2))?;
    let before = anonymous_mib()?;
    let limits = CompactionLimits { up_to: RaftIndex::new(u64::MAX), memory_bytes: MEMORY_BYTES, seed: 7, now: NOW };
    let settled = Settled::new(log.high_watermark(), Vec::new());
    let pass = log.begin_compaction(settled, limits).ok_or("nothing to compact")?;
    let (step, steps) = mpsc::sync_channel::<Box<Compaction>>(1);
    let (ended, ends) = mpsc::sync_channel(1);
    let worker = std::thread::spawn(move || {
        for mut pass in steps {
            let stepped = pass.step(PIECE_BYTES);
            if ended.send((pass, stepped)).is_err() {
                return;
            }
        }
    });
    let began = Instant::now();
    step.send(Box::new(pass))?;
    let (mut moved, mut peak, mut is_done, mut totals) = (0, before, false, None);
    let mut meanwhile = Vec::new();
    while !is_done {
        meanwhile.append(&mut reads(&mut log, Duration::from_millis(1))?);
        let Ok((mut pass, stepped)) = ends.try_recv() else { continue };
        let stepped = stepped?;
        log.compacted(&mut pass);
        moved += stepped.bytes;
        is_done = stepped.is_done;
        totals = Some(pass.totals());
        peak = peak.max(anonymous_mib()?);
        if !is_done {
            step.send(pass)?;
        }
    }
    let took = began.elapsed().as_secs_f64();
    drop(step);
    worker.join().map_err(|_| "the pass panicked")?;
    let totals = totals.ok_or("no pass")?;
    let mb = |bytes: u64| bytes as f64 / 1e6;
    Ok(vec![
        format!("{RECORDS} records, {KEYS} keys: {:.0} MB, of which {:.0} MB stay", mb(bytes), mb(totals.bytes_after)),
        format!("cleaned in {took:.1} s: {:.0} MB/s of log, {:.0} MB/s moved", mb(bytes) / took, mb(moved) / took),
        format!("memory: {:.0} MiB more at most, of {} MiB for keys", peak - before, MEMORY_BYTES >> 20),
        format!("a read of 64 KiB: {} in peace, {} meanwhile", times(quiet), times(meanwhile)),
    ])
}

/// A log of all records, in batches, the keys in an order of their own each time.
fn written(disk: &Arc<dyn Disk>, dir: &Path) -> Result<Log, Failure> {
    let identity = ReplicaIdentity {
        replica: ReplicaId::new(1),
        topic_partition: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
        feature_level: 1,
    };
    Log::create(disk, dir, identity, Bytes::from_static(b"alone"))?;
    let compaction = CompactionConfig { dirty_per_mille_min: 1, ..CompactionConfig::default() };
    let config = LogConfig { segment_bytes: 128 << 20, compaction: Some(compaction), ..LogConfig::default() };
    let mut log = Log::open(Arc::clone(disk), dir, config, RaftIndex::new(1), NOW)?;
    let term = Term::new(2);
    let append = |log: &mut Log, body| {
        log.append(&[LogEntry { index: log.last_index().next(), term, body }], NOW).map(|_| log.last_index())
    };
    append(&mut log, EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() })?;
    let mut value = [0; VALUE_BYTES];
    for batch in 0..RECORDS / RECORDS_PER_BATCH {
        let mut builder = RecordBatchBuilder::new(Compression::None);
        for number in batch * RECORDS_PER_BATCH..(batch + 1) * RECORDS_PER_BATCH {
            // A step without a common divisor: every key once in so many records.
            let key = format!("key-{:012}", number.wrapping_mul(7_368_787) % KEYS);
            value[..8].copy_from_slice(&number.to_be_bytes());
            builder.append(NOW, Some(key.as_bytes()), Some(&value), [])?;
        }
        let last = append(&mut log, EntryBody::Batch(builder.build()))?;
        log.commit_to(last);
    }
    log.seal()?;
    log.flush()?;
    let checkpoint = log.new_checkpoint(log.committed_index(), Bytes::from_static(b"alone"), Bytes::new());
    log.write_checkpoint(checkpoint)?;
    Ok(log)
}

/// Reads at offsets all over the log for so long: how long each took.
fn reads(log: &mut Log, within: Duration) -> Result<Vec<Duration>, Failure> {
    let began = Instant::now();
    let mut took = Vec::new();
    while took.is_empty() || began.elapsed() < within {
        let at = (began.elapsed().subsec_nanos() as i64).wrapping_mul(6_364_136_223_846_793_005).unsigned_abs();
        let offset = Offset::new((at % log.high_watermark().get() as u64) as i64);
        let reading = Instant::now();
        let bytes = match log.read(offset, 64 << 10)? {
            Read::Bytes(bytes) => bytes,
            Read::Ticket(ticket) => ticket.run()?,
        };
        bytes.verify()?;
        took.push(reading.elapsed());
    }
    Ok(took)
}

fn times(mut took: Vec<Duration>) -> String {
    took.sort_unstable();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize].as_micros();
    format!("p50 {} us, p99 {} us of {}", at(0.5), at(0.99), took.len())
}

/// Memory of this process that is not a file's.
fn anonymous_mib() -> Result<f64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).ok_or("no RssAnon in /proc")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("no RssAnon in /proc")?.parse()?;
    Ok(kib / 1024.0)
}
