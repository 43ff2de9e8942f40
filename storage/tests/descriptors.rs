//! A process without descriptors: in a file of its own, because the limit is the whole process's.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{ControlType, PartitionId, RaftIndex, ReplicaId, Term, Timestamp, TopicId, TopicPartition};
use flowstone_storage::{Disk, EntryBody, Log, LogConfig, LogEntry, RealDisk, ReplicaIdentity};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const NOW: Timestamp = Timestamp::new(1_700_000_000_000);

#[test]
fn a_flush_needs_no_descriptor_that_is_not_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(8));
    let dir = folder.path().join("replica");
    let identity = ReplicaIdentity {
        replica: ReplicaId::new(1),
        topic_partition: TopicPartition::new(TopicId::new(1), PartitionId::new(0)),
        feature_level: 1,
    };
    Log::create(&disk, &dir, identity, Bytes::new()).expect("a new log");
    let config = LogConfig { segment_bytes: 400, room_kept_bytes: 0, ..LogConfig::default() };
    let mut log = Log::open(Arc::clone(&disk), &dir, config, RaftIndex::new(1), NOW).expect("opens");
    let append = |log: &mut Log| {
        let body = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::from(vec![0; 100]) };
        let index = log.last_index().next();
        log.append(&[LogEntry { index, term: Term::new(2), body }], NOW).expect("appended");
    };
    // Two segments, so that the folder has to be flushed.
    while !has_segments(&dir, 2) {
        append(&mut log);
    }

    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum: limit.maximum }).expect("a lower limit");
    let mut taken = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        taken.push(file);
    }
    let flushed = log.flush();
    drop(taken);
    setrlimit(Resource::Nofile, limit).expect("the old limit");
    assert_eq!(flushed.expect("flushed"), log.last_index());
}

fn has_segments(dir: &Path, count: usize) -> bool {
    let names = std::fs::read_dir(dir).expect("the folder").filter_map(Result::ok).map(|entry| entry.file_name());
    names.filter(|name| name.to_string_lossy().ends_with(".log")).count() >= count
}
