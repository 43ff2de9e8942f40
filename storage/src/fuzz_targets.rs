//! What the fuzzer calls: each takes any bytes, and must neither panic nor take more memory than a constant times the
//! input; recovery must come to the same result the second time.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{Offset, PartitionId, RaftIndex, ReplicaId, Timestamp, TopicId, TopicPartition};

use crate::batch_index;
use crate::checkpoint::{Checkpoint, ReplicaIdentity};
use crate::disk::Disk;
use crate::error::{OpenError, StorageError};
use crate::hard_state::{self, HardStateFile};
use crate::install::{Install, PROGRESS_NAME, incoming_dir};
use crate::log::{Log, LogConfig};
use crate::read::{Lookup, Read};
use crate::segment::SegmentName;
use crate::sim_disk::SimDisk;

/// Takes any bytes, and panics where it finds a defect.
pub type Target = fn(&[u8]);

/// The targets by name, which is also the name of their corpus folder.
pub const TARGETS: [(&str, Target); 6] = [
    ("recover_log", recover_log),
    ("read_index", read_index),
    ("read_hard_state", read_hard_state),
    ("read_checkpoint", read_checkpoint),
    ("pull_range", pull_range),
    ("resume_install", resume_install),
];

const NOW: Timestamp = Timestamp::new(1_700_000_000_000);
const FIRST: SegmentName = SegmentName::of_raft(Offset::new(0), RaftIndex::new(2));

fn identity() -> ReplicaIdentity {
    ReplicaIdentity {
        replica: ReplicaId::new(1),
        topic_partition: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
        feature_level: 1,
    }
}

/// A log whose only segment holds `bytes`, of which nothing was known to be flushed: opening cuts what is no batch, and
/// what is left reads back, the same when opened again.
pub fn recover_log(bytes: &[u8]) {
    let sim = SimDisk::new(1);
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let dir = Path::new("/log");
    Log::create(&disk, dir, identity(), Bytes::new()).expect("a simulated disk without faults");
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

/// A range of any bytes, as another replica may have sent it: refused, with nothing written, or stored byte for byte.
pub fn pull_range(bytes: &[u8]) {
    let range = Bytes::copy_from_slice(bytes);
    let disk = SimDisk::new(1).shared();
    let dir = Path::new("/log");
    Log::create(&disk, dir, identity(), Bytes::new()).expect("a simulated disk without faults");
    let mut log = Log::open(Arc::clone(&disk), dir, LogConfig::default(), RaftIndex::new(1), NOW).expect("a new log");
    match log.append_pulled(range, NOW) {
        Ok(appended) => {
            let stored: Vec<Bytes> =
                appended.iter().map(|entry| log.stored_batch(entry.index).expect("a moment ago")).collect();
            assert_eq!(stored.concat(), bytes, "what is taken is kept as it is");
            let last = log.last_index();
            log.flush().expect("a simulated disk without faults");
            drop(log);
            let again = Log::open(disk, dir, LogConfig::default(), last, NOW).expect("what was taken opens again");
            assert_eq!(again.last_index(), last);
        }
        Err(StorageError::Refused { .. }) => {
            assert!(log.last_index() == RaftIndex::new(1) && !log.is_poisoned(), "nothing was written");
        }
        Err(error) => panic!("refused is what it may be, not: {error}"),
    }
}

/// An install that was under way, with any bytes as its progress, its checkpoint (of entry 9) and its segment: it goes on
/// or is given up, and no replica appears by it. The input begins with the lengths of the first two, `u16` each.
pub fn resume_install(bytes: &[u8]) {
    let sim = SimDisk::new(1);
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let dir = Path::new("/log");
    let incoming = incoming_dir(dir);
    let Some((lengths, mut rest)) = bytes.split_first_chunk::<4>() else { return };
    let mut part = |length: [u8; 2]| {
        let (part, behind) = rest.split_at(usize::from(u16::from_le_bytes(length)).min(rest.len()));
        rest = behind;
        part.to_vec()
    };
    sim.set_bytes(&incoming.join(PROGRESS_NAME), part([lengths[0], lengths[1]]));
    sim.set_bytes(&incoming.join(Checkpoint::file_name(RaftIndex::new(9))), part([lengths[2], lengths[3]]));
    sim.set_bytes(&FIRST.log_path(&incoming), rest.to_vec());
    let resumed = Install::resume(&disk, dir, LogConfig::default()).expect("a simulated disk without faults");
    if let Some(install) = resumed {
        assert!(install.next_index() <= install.target().applied.next(), "no more than was wanted");
        if install.has_all() {
            // The bytes may contradict the checkpoint, which is told.
            let _ = install.finish();
            return;
        }
    }
    assert!(!Log::exists(&disk, dir).expect("a simulated disk without faults"), "a replica out of nothing");
}
