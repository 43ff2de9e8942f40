//! What the metadata costs in a large cluster: the figures of `docs/scaling.md`.
//!
//! `cargo test --release -p flowstone-broker --lib scaling -- --ignored --nocapture --test-threads 1` prints them.

use std::time::{Duration, Instant};

use flowstone_protocol::peer::{BrokerHeartbeatRequest, Caller, HeartbeatRow, LeaderRow};
use flowstone_protocol::{BrokerId, LeaderEpoch, Offset, Term, Timestamp, TopicId, TopicPartition};
use flowstone_replication::Commanded;
use prost::Message;

use super::commands::{
    CreateTopic, Leadership, MetadataCommand, MetadataReply, MetadataRules, MoveProgress, ReplaceBroker,
};
use super::liveness::Liveness;
use super::placement::Draws;
use super::table::{BrokerLoad, MetadataTable};
use super::testing::{Cluster, rules};
use super::{balance, upkeep};
use crate::coordinator::{Coordinator, StateMachine};

/// How large.
#[derive(Clone, Copy, Debug)]
struct Size {
    brokers: usize,
    topics: usize,
    partitions_per_topic: i32,
}

impl Size {
    fn partitions(self) -> usize {
        self.topics * self.partitions_per_topic as usize
    }
}

/// A cluster of ten racks whose partitions all have three replicas and a leader.
fn grown(size: Size) -> Cluster {
    let racks: Vec<String> = (0..size.brokers).map(|broker| format!("rack-{}", broker % 10)).collect();
    let racks: Vec<&str> = racks.iter().map(String::as_str).collect();
    let limits = MetadataRules { topics_max: usize::MAX, partitions_max: usize::MAX, ..rules() };
    let mut cluster = Cluster::with_rules(&racks, limits);
    for topic in 0..size.topics {
        cluster.create(&format!("a-topic-with-a-name-{topic}"), size.partitions_per_topic, 3);
    }
    let preferred: Vec<(TopicPartition, BrokerId)> =
        cluster.table().entries().map(|(_, tp, entry)| (tp, entry.replicas()[0].broker)).collect();
    for (tp, broker) in preferred {
        cluster.lead(tp, broker.get(), 1);
    }
    cluster
}

/// Commands with which the other brokers tell what they lead after the death of one, a heartbeat's worth each.
fn taken_over(table: &MetadataTable, dead: BrokerId) -> Vec<MetadataCommand> {
    let mut draws = Draws::from_seed(5);
    let mut by_broker = std::collections::BTreeMap::<BrokerId, Vec<Leadership>>::new();
    for (_, tp, entry) in table.entries() {
        if entry.leader().is_some_and(|leader| leader.broker == dead) {
            let others: Vec<_> = entry.replicas().iter().filter(|place| place.broker != dead).collect();
            let next = others[draws.next() as usize % others.len()];
            let leadership = Leadership { tp, replica: next.replica, epoch: LeaderEpoch::new(2) };
            by_broker.entry(next.broker).or_default().push(leadership);
        }
    }
    by_broker.into_iter().map(|(broker, leaders)| MetadataCommand::LeadersChanged { broker, leaders }).collect()
}

/// Bytes of the batch that the coordinator would append for a command.
fn batch_bytes(machine: &mut Coordinator<MetadataTable>, command: MetadataCommand) -> usize {
    let Commanded { batch, reply } = machine.command(command, Timestamp::new(1_700_000_000_000));
    reply.expect("decided");
    batch.map_or(0, |batch| batch.len())
}

fn leading(table: &MetadataTable) -> Coordinator<MetadataTable> {
    let (mut machine, _) = Coordinator::new(table.clone());
    machine.lead(Term::new(1));
    machine
}

#[test]
fn a_partition_stays_small_on_the_disk_and_a_death_is_a_record_for_each_broker_that_took_over() {
    let size = Size { brokers: 40, topics: 10, partitions_per_topic: 200 };
    let mut cluster = grown(size);
    let per_partition = cluster.table().checkpoint().len() / size.partitions();
    assert!(per_partition <= 60, "{per_partition} bytes of checkpoint for each partition");

    let dead = BrokerId::new(17);
    let led = cluster.table().load(dead).leads as usize;
    assert_eq!(led, size.partitions() / size.brokers, "leaders are spread evenly");
    cluster.fence(17);
    let takeovers = taken_over(cluster.table(), dead);
    // Its partitions are shared with many, as they were spread: no broker gets a large part of them.
    assert!(takeovers.len() >= led / 3, "{} brokers for {led} partitions", takeovers.len());
    let mut machine = leading(cluster.table());
    for command in &takeovers {
        let MetadataCommand::LeadersChanged { leaders, .. } = command else { panic!("{command:?}") };
        let bytes = batch_bytes(&mut machine, command.clone());
        assert!(bytes <= 90 + leaders.len() * 32, "{bytes} bytes for {} leaders", leaders.len());
    }
    let before = cluster.log.len();
    cluster.run_all(takeovers.clone());
    assert_eq!(cluster.log.len() - before, takeovers.len());
    assert_eq!(cluster.table().load(dead), BrokerLoad { leads: 0, ..cluster.table().load(dead) });
}

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number");
    pages * 4096
}

/// Time that this thread has had a processor, as far as the kernel has counted it: to a few milliseconds.
fn on_processor() -> Duration {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    let nanoseconds = schedstat.split(' ').next().and_then(|nanoseconds| nanoseconds.parse().ok());
    Duration::from_nanos(nanoseconds.expect("a number"))
}

/// With the time it took: of the processor where that is long enough to be counted, so that other programs do not count.
fn timed<T>(run: impl FnOnce() -> T) -> (T, Duration) {
    let (start, started) = (on_processor(), Instant::now());
    let result = run();
    let (took, elapsed) = (on_processor() - start, started.elapsed());
    (result, if took > Duration::from_millis(20) { took } else { elapsed })
}

#[test]
#[ignore = "measures, with an optimised build and alone; see the top of the file"]
fn figures_of_a_large_cluster() {
    let size = Size { brokers: 500, topics: 2_000, partitions_per_topic: 100 };
    let (mut cluster, took) = timed(|| grown(size));
    eprintln!("{size:?}: {} partitions, made in {took:?}, {} records", size.partitions(), cluster.log.len());

    // Memory: of tables that were read from a checkpoint, once what reading one leaves behind is there to be used again.
    let (checkpoint, wrote) = timed(|| cluster.table().checkpoint());
    eprintln!(
        "checkpoint: {:.1} MB, {:.1} bytes per partition, written in {wrote:?}",
        checkpoint.len() as f64 / 1e6,
        checkpoint.len() as f64 / size.partitions() as f64
    );
    let mut tables = Vec::new();
    let mut before = 0;
    let mut read = Duration::ZERO;
    for round in 0..6 {
        if round == 2 {
            before = resident();
        }
        let mut table = MetadataTable::new(rules());
        read = timed(|| table.restore(&checkpoint).expect("own bytes")).1;
        tables.push(table);
    }
    let each = (resident() - before) as f64 / 4.0;
    eprintln!(
        "memory: {:.1} MB a table, {:.0} bytes per partition; read from the checkpoint in {read:?}",
        each / 1e6,
        each / size.partitions() as f64
    );
    let before = resident();
    let (copies, took) = timed(|| (0..10).map(|_| tables[0].clone()).collect::<Vec<_>>());
    eprintln!(
        "a copy (taken when a controller begins to lead): {:?}, {:.2} MB",
        took / 10,
        (resident() - before) as f64 / 10e6
    );
    drop(copies);

    // A broker's death.
    let dead = BrokerId::new(123);
    let load = cluster.table().load(dead);
    let fence = MetadataCommand::FenceBroker { broker: dead, incarnation: cluster.incarnation(123) };
    let takeovers = taken_over(cluster.table(), dead);
    let mut machine = leading(cluster.table());
    let rows: usize = takeovers
        .iter()
        .map(|command| match command {
            MetadataCommand::LeadersChanged { leaders, .. } => leaders.len(),
            other => panic!("{other:?}"),
        })
        .sum();
    let bytes: usize = takeovers.iter().map(|command| batch_bytes(&mut machine, command.clone())).sum();
    eprintln!(
        "death of a broker with {} replicas, {} of them leaders: {} records with {rows} leaders, {bytes} bytes as batches",
        load.replicas,
        load.leads,
        takeovers.len() + 1
    );
    // With a reader that holds what it read, as one that answers for all topics does: the worst case for copying.
    for held in [false, true] {
        let mut cluster_table = tables[usize::from(held)].clone();
        let reader = held.then(|| cluster_table.topics().cloned().collect::<Vec<_>>());
        let (applied, took) = timed(|| {
            let mut applied = 0;
            for command in std::iter::once(fence.clone()).chain(takeovers.clone()) {
                let (records, reply) = cluster_table.decide(command, Timestamp::new(1));
                reply.expect("decided");
                for record in records {
                    cluster_table.apply(record, Offset::new(10_000_000 + applied)).expect("decided here");
                    applied += 1;
                }
            }
            applied
        });
        eprintln!("  decided and applied, topics held by a reader: {held}: {:?} a record", took / applied as u32);
        drop(reader);
    }

    // Giving its replicas to another broker.
    cluster.run(fence).expect("fenced");
    cluster.register_in(501, "rack-2");
    let mut machine = leading(cluster.table());
    let replace = |seed| {
        MetadataCommand::ReplaceBroker(ReplaceBroker { old: dead, new: BrokerId::new(501), seed, validate_only: false })
    };
    let (bytes, took) = timed(|| batch_bytes(&mut machine, replace(7)));
    eprintln!("replacing it: {bytes} bytes for 500 partitions, decided in {took:?}");
    let before = cluster.log.len();
    loop {
        let seed = cluster.draw();
        match cluster.run(replace(seed)).expect("decided") {
            MetadataReply::Moves { more: true, .. } => {}
            _ => break,
        }
    }
    let began = cluster.log.len() - before;
    let (tp, entry) = cluster.table().changing().next().map(|(tp, entry)| (tp, entry.clone())).expect("under way");
    let progress = MoveProgress {
        tp,
        may_remove: true,
        removed: entry.leaving().iter().map(|place| place.replica).collect(),
        wanted: entry.replicas().iter().map(|place| place.replica).collect(),
        seed: 1,
    };
    let mut machine = leading(cluster.table());
    let done = batch_bytes(&mut machine, MetadataCommand::MoveProgress(progress));
    eprintln!("  {began} records to begin, as many of {done} bytes to end");
    cluster.finish_moves();

    // What goes on all the time.
    let start = Instant::now();
    let mut liveness = Liveness::new(Duration::from_secs(6), start);
    let incarnations: Vec<(BrokerId, u64)> =
        cluster.table().brokers().map(|broker| (broker.id, broker.incarnation)).collect();
    let ((), heard) = timed(|| {
        for (broker, incarnation) in &incarnations {
            liveness.heard(*broker, *incarnation, false, start);
        }
    });
    let (_, due) = timed(|| liveness.due(cluster.table(), start));
    let (_, kept) = timed(|| upkeep::due(cluster.table(), 20, 1));
    eprintln!("all heartbeats taken in: {heard:?}; who is dead: {due:?}; upkeep: {kept:?}");
    let caller = Caller {
        protocol_version: 1,
        cluster_id: vec![1; 16].into(),
        broker_id: 499,
        directory_id: vec![1; 16].into(),
        incarnation: 1,
        to_broker_id: 3,
    };
    let idle = BrokerHeartbeatRequest {
        caller: Some(caller),
        metadata_applied: 1_000_000,
        disk_free_bytes: 1 << 42,
        disk_total_bytes: 1 << 43,
        ..Default::default()
    };
    let row = LeaderRow { topic_id: vec![1; 16].into(), partition: 99, leader_epoch: 9, replica_id: 1 };
    let heartbeat = HeartbeatRow {
        topic_high: 1,
        topic_low: 1,
        partition: 99,
        from: 1,
        to: 1,
        term: 9,
        commit: 1_000_000_000,
        lane: 0,
    };
    eprintln!(
        "bytes: a broker's heartbeat {}, each leader in it {}, a row of a group's heartbeat {}",
        idle.encoded_len(),
        row.encoded_len() + 2,
        heartbeat.encoded_len() + 2
    );

    // What operators ask for.
    let create = CreateTopic {
        name: "one-more".to_owned(),
        partitions: 100,
        replication_factor: 3,
        configs: Vec::new(),
        topic_id: TopicId::new(7),
        seed: 3,
        validate_only: true,
    };
    let (_, created) = timed(|| cluster.run(MetadataCommand::CreateTopic(create)).expect("decided"));
    let (plan, planned) = timed(|| balance::plan(cluster.table(), &Default::default(), 50, false));
    let (_, emptied) =
        timed(|| balance::emptied(cluster.table(), BrokerId::new(5), usize::MAX, &mut Draws::from_seed(1)));
    eprintln!(
        "a topic of 100 partitions placed in {created:?}; a plan of {} moves in {planned:?}; a broker emptied on paper in \
         {emptied:?}",
        plan.moves.len()
    );
}
