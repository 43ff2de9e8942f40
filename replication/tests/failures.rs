//! Shards on a disk that fails or fills up: who waits is told, the replica comes back by itself, nobody else notices.

mod ledger;
mod shell;

use std::path::Path;
use std::sync::Arc;

use flowstone_protocol::{DirectoryId, Error, ErrorCode, Offset, PartitionId, ReplicaId, TopicId, TopicPartition};
use flowstone_replication::{
    Acks, FlushMode, Health, LogConfig, NoPeers, Permit, Produced, ReadAnswer, ReadRequest, Reconfigure, ReplicaHandle,
    ReplicaSpec, Reply, RetentionConfig, Shards, ShardsConfig, Start, TrimTo, system_clock,
};
use flowstone_storage::sim_disk::{Crash, Operation};
use flowstone_storage::{DataDir, SimDisk};
use ledger::{Ledger, batch};
use tokio::sync::oneshot;

struct Broker {
    shards: Shards<Ledger>,
    data_dir: Arc<DataDir>,
}

fn start(disk: &SimDisk) -> Broker {
    let data_dir = DataDir::open_or_create(disk.shared(), Path::new("/data"), DirectoryId::new(1), 2).unwrap();
    let data_dir = Arc::new(data_dir);
    let config = ShardsConfig { shards: 1, ..ShardsConfig::default() };
    let shards = Shards::start(config, Arc::clone(&data_dir), system_clock(), Arc::new(NoPeers)).unwrap();
    Broker { shards, data_dir }
}

impl Broker {
    fn lead(&self, partition: i32) -> ReplicaHandle<Ledger> {
        let handle = self.open(partition);
        until(|| handle.status().is_ready());
        handle
    }

    fn open(&self, partition: i32) -> ReplicaHandle<Ledger> {
        let tp = TopicPartition::new(TopicId::new(5), PartitionId::new(partition));
        let spec = ReplicaSpec {
            tp,
            replica: ReplicaId::new(1_000 + partition as u64),
            dir: self.data_dir.replica_dir(tp),
            log: LogConfig { segment_bytes: 64 << 10, zero_ahead_bytes: 4 << 10, ..LogConfig::default() },
            flush: FlushMode::Quorum,
            retention: RetentionConfig::default(),
            internal: false,
            max_message_bytes: 1 << 20,
            peers: Arc::from([]),
            start: Start::alone(ReplicaId::new(1_000 + partition as u64)),
        };
        wait(ask(|opened| self.shards.open(spec, Ledger::default(), opened))).unwrap()
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

fn until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

fn produce(handle: &ReplicaHandle<Ledger>, sequence: i32) -> Result<Produced, Error> {
    let (batch, header) = batch(1, sequence, 1, 1_000);
    wait(ask(|reply| handle.produce(batch, header, Acks::Quorum, Permit::unbounded(), reply)))
}

fn read(handle: &ReplicaHandle<Ledger>, from: i64) -> oneshot::Receiver<Result<ReadAnswer, Error>> {
    let request = ReadRequest { wait: true, ..ReadRequest::new(Offset::new(from), 1 << 20) };
    ask(|reply| handle.read(request, reply))
}

#[test]
fn after_a_failed_flush_nothing_is_acknowledged_until_it_was_opened_anew() {
    let disk = SimDisk::new(1);
    let broker = start(&disk);
    let (failing, other) = (broker.lead(1), broker.lead(2));
    produce(&failing, 0).unwrap();
    let term = failing.status().term;
    let waiting = read(&failing, 2);
    disk.fail(Operation::Sync, 0);
    let error = produce(&failing, 1).unwrap_err();
    assert_eq!(error.code, ErrorCode::StorageFailed);
    assert!(error.is_retriable(), "it comes back by itself");
    assert_eq!(wait(waiting).unwrap_err().code, ErrorCode::StorageFailed, "readers are told, too");
    produce(&other, 0).expect("another replica goes on");
    assert_eq!(broker.shards.metrics()[0].replicas_ended, 1);

    until(|| failing.status().is_ready() && failing.status().term > term);
    // The same handle serves again; what failed may have got into the log, but is there only once.
    let again = produce(&failing, 1).unwrap();
    assert_eq!(produce(&failing, 1).unwrap(), again);
    assert_eq!(produce(&failing, 0).unwrap().base_offset, Offset::new(1));
    assert_eq!(failing.status().health, Health::Ok);
}

#[test]
fn a_failed_write_is_the_same() {
    let disk = SimDisk::new(2);
    let broker = start(&disk);
    let handle = broker.lead(1);
    disk.fail(Operation::Write, 0);
    assert_eq!(produce(&handle, 0).unwrap_err().code, ErrorCode::StorageFailed);
    until(|| handle.status().is_ready());
    produce(&handle, 0).unwrap();
}

#[test]
fn failed_hard_states_end_their_replicas_and_come_back_with_the_newest() {
    let disk = SimDisk::new(3);
    let broker = start(&disk);
    let handles: Vec<_> = (0..6).map(|partition| broker.lead(partition)).collect();
    let terms: Vec<_> = handles.iter().map(|handle| handle.status().term).collect();
    // The next election writes its vote, and that fails.
    disk.fail(Operation::Sync, 0);
    let _ = produce(&handles[0], 0);
    until(|| broker.shards.metrics()[0].replicas_ended > 0);
    disk.fail(Operation::Sync, 1);
    for (handle, term) in handles.iter().zip(terms) {
        until(|| produce(handle, 0).is_ok());
        assert!(handle.status().term >= term);
    }
}

#[test]
fn a_full_disk_refuses_writes_reads_go_on_and_room_is_found_again() {
    let disk = SimDisk::new(4);
    let broker = start(&disk);
    let handle = broker.lead(1);
    produce(&handle, 0).unwrap();
    // What is kept for the cure, and a little.
    disk.set_bytes_max(Some(disk.used_bytes() + LogConfig::default().room_kept_bytes + 100_000));
    let mut sequence = 1;
    let error = loop {
        match produce(&handle, sequence) {
            Ok(_) => sequence += 1,
            Err(error) => break error,
        }
        assert!(sequence < 10_000, "a limited disk fills up");
    };
    assert_eq!(error.code, ErrorCode::DiskFull);
    assert!(error.is_retriable());
    assert_eq!(handle.status().health, Health::DiskFull);
    assert!(handle.status().is_ready(), "it goes on leading");
    wait(read(&handle, 1)).unwrap().bytes.verify().unwrap();
    assert_eq!(produce(&handle, 0).unwrap().base_offset, Offset::new(1), "what is there already can be acknowledged");
    assert_eq!(broker.shards.metrics()[0].replicas_ended, 0, "no crash loop");

    // The cure goes through the log, and may use what is kept for it.
    let high_watermark = handle.status().high_watermark;
    assert_eq!(wait(ask(|reply| handle.trim(TrimTo::HighWatermark, reply))), Ok(high_watermark));

    disk.set_bytes_max(None);
    until(|| handle.status().health == Health::Ok);
    produce(&handle, sequence).unwrap();
}

#[test]
fn a_crash_of_the_power_keeps_what_was_acknowledged() {
    let disk = SimDisk::new(5);
    // By partition and sequence. What was in flight at a crash may be in the log or not, so no offset is known before.
    let mut acknowledged = std::collections::BTreeMap::new();
    for life in 0..5 {
        let broker = start(&disk);
        let handles: Vec<_> = (0..4).map(|partition| broker.lead(partition)).collect();
        for handle in &handles {
            for sequence in 0..life * 10 + 10 {
                let offset = produce(handle, sequence).unwrap().base_offset;
                let before = *acknowledged.entry((handle.tp().partition, sequence)).or_insert(offset);
                assert_eq!(before, offset, "it was acknowledged there");
                assert_eq!(produce(handle, sequence).unwrap().base_offset, offset, "and is there once");
            }
        }
        // From here on every operation fails, as in a process that is gone; then the machine starts again.
        disk.crash_after(0);
        let _ = produce(&handles[0], 99_999);
        drop(broker);
        disk.restart(Crash::Power);
    }
}

/// The first segment's file of a partition.
fn segment(broker: &Broker, partition: i32) -> std::path::PathBuf {
    let tp = TopicPartition::new(TopicId::new(5), PartitionId::new(partition));
    let dir = broker.data_dir.replica_dir(tp);
    let names = broker.data_dir.disk().read_dir(&dir).unwrap();
    dir.join(names.iter().find(|name| name.ends_with(".log")).expect("there is a segment"))
}

#[test]
fn a_replica_closed_after_it_failed_still_answers_for_what_it_acknowledged() {
    let disk = SimDisk::new(8);
    let broker = start(&disk);
    let handle = broker.lead(1);
    for sequence in 0..3 {
        produce(&handle, sequence).unwrap();
    }
    disk.set_read_only(true);
    produce(&handle, 3).unwrap_err();
    wait(ask(|closed| broker.shards.close(handle.tp(), false, closed)));
    disk.set_read_only(false);
    // The last acknowledged batch is damaged: it is flushed, so this is no torn end that may be cut.
    let path = segment(&broker, 1);
    let bytes = disk.bytes(&path).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    disk.flip_bit(&path, end as u64 - 20, 0);
    let again = broker.open(1);
    until(|| again.status().health != Health::Ok || again.status().is_ready());
    assert!(matches!(again.status().health, Health::Quarantined { .. }), "{:?}", again.status());
}

#[test]
fn a_failed_replica_with_a_job_in_flight_can_be_closed() {
    let disk = SimDisk::new(9);
    let broker = start(&disk);
    let handle = broker.lead(1);
    // Ended, and closed at once: whatever it had handed out comes home to a replica that is gone.
    for round in 0..20 {
        disk.fail(Operation::Write, round % 3);
        let (first, header) = batch(1, round as i32, 1, 1_000);
        handle.produce(first, header, Acks::None, Permit::unbounded(), Reply::nowhere());
        wait(ask(|closed| broker.shards.close(handle.tp(), false, closed)));
        disk.cancel_faults();
        let _ = broker.lead(1);
    }
}

#[test]
fn settings_given_to_a_failed_replica_are_those_of_its_next_life() {
    let disk = SimDisk::new(10);
    let broker = start(&disk);
    let handle = broker.lead(1);
    disk.set_read_only(true);
    produce(&handle, 0).unwrap_err();
    handle.reconfigure(Reconfigure {
        log: LogConfig::default(),
        retention: RetentionConfig::default(),
        flush: FlushMode::Quorum,
        max_message_bytes: 500,
    });
    disk.set_read_only(false);
    until(|| handle.status().is_ready());
    assert_eq!(produce(&handle, 1).unwrap_err().code, ErrorCode::BatchTooLarge, "its batches are of 1000 bytes");
}
