//! What the fuzzer calls: each takes any bytes, and must neither panic nor take more memory than a constant times the
//! input; recovery must come to the same result the second time.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{Offset, PartitionId, RaftIndex, ReplicaId, Timestamp, TopicId, TopicPartition};

use crate::batch_index;
use crate::checkpoint::{Checkpoint, ReplicaIdentity};
use crate::disk::Disk;
use crate::error::OpenError;
use crate::hard_state::{self, HardStateFile};
use crate::log::{Log, LogConfig};
use crate::read::{Lookup, Read};
use crate::segment::SegmentName;
use crate::sim_disk::SimDisk;

/// Takes any bytes, and panics where it finds a defect.
pub type Target = fn(&[u8]);

/// The targets by name, which is also the name of their corpus folder.
pub const TARGETS: [(&str, Target); 4] = [
    ("recover_log", recover_log),
    ("read_index", read_index),
    ("read_hard_state", read_hard_state),
    ("read_checkpoint", read_checkpoint),
];

const NOW: Timestamp = Timestamp::new(1_700_000_000_000);
const FIRST: SegmentName = SegmentName { base_offset: Offset::new(0), first_index: RaftIndex::new(2) };

/// A log whose only segment holds `bytes`, of which nothing was known to be flushed: opening cuts what is no batch, and
/// what is left reads back, the same when opened again.
pub fn recover_log(bytes: &[u8]) {
    let sim = SimDisk::new(1);
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let dir = Path::new("/log");
    let identity = ReplicaIdentity {
        replica: ReplicaId::new(1),
        topic_partition: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
        feature_level: 1,
    };
    Log::create(&disk, dir, identity, Bytes::new()).expect("a simulated disk without faults");
    // The last quarter is the index, so that the fuzzer comes to think of both.
    let (log_bytes, index_bytes) = bytes.split_at(bytes.len() - bytes.len() / 4);
    sim.set_bytes(&FIRST.log_path(dir), log_bytes.to_vec());
    if !index_bytes.is_empty() {
        sim.set_bytes(&FIRST.index_path(dir), index_bytes.to_vec());
    }
    let open = || Log::open(Arc::clone(&disk), dir, LogConfig::default(), RaftIndex::new(1), NOW);
    let mut log = match open() {
        Ok(log) => log,
        // A control batch of a later version.
        Err(OpenError::NewerFormat { .. }) => return,
        Err(error) => panic!("nothing durable is missing, and still: {error}"),
    };
    log.commit_to(log.last_index());
    let mut at = log.log_start();
    while at < log.high_watermark() {
        let read = match log.read(at, 1 << 16).expect("committed") {
            Read::Bytes(read) => read,
            Read::Ticket(ticket) => ticket.run().expect("there"),
        };
        read.verify().expect("what recovery keeps is right");
        at = read.next;
    }
    if let Ok(Lookup::Ticket(ticket)) = log.find_timestamp(NOW) {
        let _ = ticket.run();
    }
    let found = (log.last_index(), log.end_offset(), log.last_term());
    drop(log);
    let again = open().expect("what was opened once opens again");
    assert_eq!((again.last_index(), again.end_offset(), again.last_term()), found, "recovery is idempotent");
}

/// An index file of any bytes.
pub fn read_index(bytes: &[u8]) {
    let slots = batch_index::valid_prefix(FIRST, bytes);
    assert!(slots.len() * batch_index::SLOT_BYTES <= bytes.len(), "slots out of nothing");
}

/// A hard state file of any bytes: never more states than bytes, and opening it twice finds the same.
pub fn read_hard_state(bytes: &[u8]) {
    let _ = hard_state::read_sectors(0, bytes);
    let sim = SimDisk::new(1);
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let dir = Path::new("/data");
    sim.set_bytes(&dir.join(HardStateFile::file_name(0)), bytes.to_vec());
    let open = || HardStateFile::open(Arc::clone(&disk), dir, 0).map(|(_, states, rot)| (states, rot));
    if let Ok(first) = open() {
        let second = open().expect("what was opened once opens again");
        assert_eq!(first, second, "opening is idempotent");
    }
}

/// A checkpoint of any bytes: what decodes encodes to the same bytes.
pub fn read_checkpoint(bytes: &[u8]) {
    let file = Bytes::copy_from_slice(bytes);
    if let Ok(checkpoint) = Checkpoint::decode(&file) {
        assert_eq!(checkpoint.encode(), file, "one form for each checkpoint");
    }
}
