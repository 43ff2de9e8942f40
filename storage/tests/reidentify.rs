//! A survivor's log that goes on under another replica id.

mod source;

use std::path::Path;

use bytes::Bytes;
use flowstone_protocol::{RaftIndex, TopicId};
use flowstone_storage::sim_disk::Crash;
use flowstone_storage::{Checkpoint, Log, OpenError, ReplicaIdentity, SimDisk};
use source::{DIR, Random, append_some, batches, config, filled, identity, open, settle};

/// A closed log with an older and a newer checkpoint, and one of all that it holds under new members.
fn survivor(seed: u64) -> (SimDisk, Checkpoint, Vec<Bytes>) {
    let (sim, mut log) = filled(1 + seed, 2_000, seed, 15);
    append_some(&mut log, &mut Random(seed), 5);
    settle(&mut log);
    source::checkpoint(&mut log);
    append_some(&mut log, &mut Random(seed), 5);
    settle(&mut log);
    let last = log.last_index();
    let checkpoint = log.new_checkpoint(last, Bytes::from_static(b"9 alone"), Bytes::from_static(b"machine"));
    let all = batches(&mut log, RaftIndex::new(2), last);
    log.close().expect("closed");
    (sim, checkpoint, all)
}

#[test]
fn a_log_goes_on_under_another_id_whatever_crash_comes_between() {
    let mut seen = [0; 2];
    for seed in 0..60 {
        for operations in 0..14 {
            let (sim, checkpoint, all) = survivor(seed);
            let disk = sim.shared();
            sim.crash_after(operations);
            let done = Log::reidentify(&disk, Path::new(DIR), identity(99), &checkpoint);
            assert!(done.is_ok() || sim.is_crashed(), "{done:?}");
            sim.cancel_crash();
            sim.restart(if seed % 4 == 0 { Crash::Process } else { Crash::Power });
            let found = ReplicaIdentity::read(&disk, Path::new(DIR)).expect("there is one");
            let is_new = found == identity(99);
            seen[usize::from(is_new)] += 1;
            assert!(is_new || found == identity(1 + seed));
            assert!(is_new || done.is_err(), "durable when it returned");
            if is_new {
                // No older checkpoint is begun from, were the new one rotten: it knows members that are none any more.
                let path = Path::new(DIR).join(Checkpoint::file_name(checkpoint.applied));
                sim.flip_bit(&path, 30, 1);
                let opened = Log::open(sim.shared(), Path::new(DIR), config(2_000), checkpoint.applied, source::NOW);
                assert!(matches!(opened, Err(OpenError::Quarantine { .. })), "{opened:?}");
                sim.flip_bit(&path, 30, 1);
            }
            let mut log = open(&disk, 2_000, checkpoint.applied);
            if is_new {
                assert_eq!(log.checkpoint(), &checkpoint);
                assert_eq!(log.spare_checkpoint(), None, "nothing knows the old members");
            }
            assert_eq!(batches(&mut log, RaftIndex::new(2), checkpoint.applied), all);
            drop(log);
            // It is done again, and comes to the same.
            Log::reidentify(&disk, Path::new(DIR), identity(99), &checkpoint).expect("done");
            let log = open(&disk, 2_000, checkpoint.applied);
            assert_eq!((log.identity(), log.checkpoint()), (&identity(99), &checkpoint));
        }
    }
    assert!(seen[0] > 10 && seen[1] > 10, "both ends of it: {seen:?}");
}

#[test]
fn a_replica_of_another_partition_is_left_alone() {
    let (sim, checkpoint, _) = survivor(1);
    let disk = sim.shared();
    let mut other = identity(99);
    other.topic_partition.topic = TopicId::new(77);
    Log::reidentify(&disk, Path::new(DIR), other, &checkpoint).expect_err("refused");
    assert_eq!(ReplicaIdentity::read(&disk, Path::new(DIR)).expect("there is one"), identity(2));
    let log = open(&disk, 2_000, RaftIndex::new(1));
    assert_ne!(log.checkpoint(), &checkpoint);
}
