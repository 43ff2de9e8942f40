//! What one step of a replica costs the shard's thread: accept, propose, write, flush, commit, answer; the disk is memory.
#![allow(missing_docs, reason = "criterion's macros make public items")]

#[path = "../tests/ledger/mod.rs"]
mod ledger;
#[path = "../tests/shell/mod.rs"]
mod shell;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use flowstone_protocol::{BatchHeader, Error, Offset, RaftIndex, Term, Timestamp};
use flowstone_replication::{
    Acks, Admission, Commanded, Event, LogConfig, Machine, MachineEntry, Permit, Produce, Reply,
};
use flowstone_storage::{Disk, RealDisk};
use ledger::batch;
use shell::{Shell, config, create};

/// A machine that costs nothing.
#[derive(Debug, Default)]
struct Nothing;

impl Machine for Nothing {
    type Command = ();
    type Reply = ();
    fn admit(&mut self, _: &BatchHeader, _: Timestamp) -> Admission {
        Admission::Append
    }
    fn appended(&mut self, _: &MachineEntry<'_>) {}
    fn committed(&mut self, entry: &MachineEntry<'_>) {
        black_box((entry.index, Offset::ZERO, RaftIndex::new(0)));
    }
    fn command(&mut self, (): (), _: Timestamp) -> Commanded<()> {
        Commanded { batch: None, reply: () }
    }
    fn lead(&mut self, _: Term) {}
    fn step_down(&mut self) {}
    fn reads_records(&self) -> bool {
        false
    }
    fn checkpoint(&self) -> Bytes {
        Bytes::new()
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }
}

fn step(c: &mut Criterion) {
    // In memory where the system has such a folder: this is about the thread, not the disk.
    let memory = Path::new("/dev/shm");
    let temporary = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let temporary = temporary.expect("a temporary folder");
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let mut group = c.benchmark_group("replica step");
    for (entries, bytes) in [(1, 100), (16, 100), (256, 100), (16, 16 << 10)] {
        let dir: PathBuf = temporary.path().join(format!("{entries}-{bytes}"));
        create(&disk, &dir, 1, &[1]);
        let log = LogConfig { segment_bytes: 64 << 20, ..LogConfig::default() };
        let mut config = config(1);
        config.retention.bytes = Some(128 << 20);
        config.checkpoint_bytes = 64 << 20;
        config.checkpoint_entries = 100_000;
        let mut shell = Shell::open(&disk, &dir, log, None, Nothing, config).expect("just made");
        shell.step([Event::Campaign]);
        let (batch, header) = batch(1, 0, 1, bytes);
        let mut steps = 0_u64;
        group.throughput(Throughput::Elements(entries));
        group.bench_function(format!("{entries} entries of {bytes} B"), |b| {
            b.iter_batched(
                || {
                    (0..entries)
                        .map(|_| {
                            Event::Produce(Produce {
                                batch: batch.clone(),
                                header,
                                acks: Acks::Quorum,
                                permit: Permit::unbounded(),
                                reply: Reply::nowhere(),
                            })
                        })
                        .collect::<Vec<_>>()
                },
                |events| {
                    shell.step(events);
                    steps += 1;
                    // The folder stays small.
                    if steps.is_multiple_of(10_000) {
                        shell.step([Event::Retain]);
                    }
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
