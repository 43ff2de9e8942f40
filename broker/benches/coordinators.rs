//! What one step of a coordinator costs its shard's thread: a command is decided, its records are encoded, and taken in by
//! the leader's state and the committed one; and what it costs to share a group's partitions out.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flowstone_broker::measured::{Groups, PARTITIONS, Sharing, Transactions};

/// Groups, or transactional ids, of one coordinator; each step is another one's.
const TABLE: usize = 1_000;

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("coordinator step");
    group.throughput(Throughput::Elements(1));
    let mut groups = Groups::new(TABLE).expect("a new table");
    let mut turn = 0;
    group.bench_function(format!("a commit of {PARTITIONS} offsets, {TABLE} groups"), |b| {
        b.iter(|| {
            turn += 1;
            black_box(groups.commit(turn, turn as i64).expect("the member owns them"))
        });
    });
    let mut transactions = Transactions::new(TABLE).expect("a new table");
    let mut turn = 0;
    group.bench_function(format!("a transaction over {PARTITIONS} partitions, three steps, {TABLE} ids"), |b| {
        b.iter(|| {
            turn += 1;
            black_box(transactions.commit(turn).expect("the id's own"))
        });
    });
    group.finish();
}

fn sharing_out(c: &mut Criterion) {
    let mut group = c.benchmark_group("sharing out");
    for (members, partitions) in [(100, 1_000), (1_000, 1_000)] {
        let fresh = Sharing::new(members, partitions);
        group.bench_function(format!("{partitions} partitions among {members}, from nothing"), |b| {
            b.iter(|| black_box(fresh.share_out()));
        });
        let left = Sharing::new(members, partitions).after_one_left();
        group.bench_function(format!("{partitions} partitions among {members}, of whom one left"), |b| {
            b.iter(|| black_box(left.share_out()));
        });
    }
    group.finish();
}

criterion_group!(benches, steps, sharing_out);
criterion_main!(benches);
