//! What each of the three deliveries costs, on three brokers: idempotent, transactional and plain producing in turns, reading
//! with and without regard to transactions in turns, commits, and a group that one member leaves.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flowstone_client::{
    Client, GroupConsumer, GroupEvent, Isolation, NewTopic, Position, Producer, ProducerBuilder, Record, StartAt,
    TransactionalProducer,
};
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use crate::cluster::Cluster;
use crate::running::{Figures, Folder, Programs};
use crate::{Cli, Failure};

const PARTITIONS: i32 = 8;
const RECORD_BYTES: usize = 1000;
/// One run of producing.
const PRODUCING: Duration = Duration::from_secs(3);
/// After so long a transaction is committed.
const COMMIT_INTERVAL: Duration = Duration::from_millis(100);
/// The same on both sides. What is taken in and not sent when a transaction is to be committed makes it longer: with a
/// buffer of many megabytes transactions would take far longer than [`COMMIT_INTERVAL`].
const BUFFER_BYTES: usize = 8 << 20;
/// As an idempotent producer has it by default; a plain one sends one batch of a partition at a time unless told otherwise.
const IN_FLIGHT: usize = 5;
/// Written in transactions, to be read both ways, in MB (10^6 bytes).
const READ_MEGABYTES: u64 = 500;
/// Transactions, and flushes in turn with them, whose times are taken.
const TRANSACTIONS: usize = 400;
/// Those before.
const WARM_UP: usize = 50;
/// What is flushed to have something to compare with.
const FLUSH_BYTES: usize = 4096;
/// Groups that commit at once, and for how long.
const COMMITTERS: usize = 32;
const COMMITTING: Duration = Duration::from_secs(3);
const MEMBERS: usize = 100;
const GROUP_PARTITIONS: i32 = 1_000;
/// Members of one connection.
const MEMBERS_PER_CLIENT: usize = 10;
/// Longest wait for anything that has to come by itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// What it costs to produce and to read so.
pub(crate) fn deliveries(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    on_three_brokers(programs, folder, "deliveries", async |_, client| {
        let mut lines = producing(client, cli.pairs).await?;
        lines.append(&mut reading(client, cli.pairs).await?);
        Ok(lines)
    })
}

/// What a commit takes.
pub(crate) fn commits(programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    on_three_brokers(programs, folder, "commits", async |_, client| {
        let mut lines = transactions(client, &folder.0).await?;
        lines.append(&mut offsets(client).await?);
        Ok(lines)
    })
}

/// How long a group's partitions are without owners.
pub(crate) fn rebalance(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    on_three_brokers(programs, folder, "rebalance", async |servers, client| {
        rebalances(servers, client, cli.pairs).await
    })
}

fn on_three_brokers(
    programs: &Programs,
    folder: &Folder,
    name: &str,
    measure: impl AsyncFnOnce(&str, &Client) -> Result<Vec<String>, Failure>,
) -> Result<Vec<String>, Failure> {
    let cluster = Cluster::start(programs, folder, name)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let lines = runtime.block_on(async {
        let servers = cluster.servers();
        measure(&servers, &Client::connect(&servers).await?).await
    })?;
    cluster.stop()?;
    Ok(lines)
}

/// How records are produced.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Delivery {
    Plain,
    Idempotent,
    Transactional,
}

async fn producing(client: &Client, pairs: u32) -> Result<Vec<String>, Failure> {
    let mut turns = [Delivery::Plain, Delivery::Idempotent, Delivery::Transactional];
    let mut rates: [Figures; 3] = Default::default();
    let mut per_second = Figures::default();
    // One of each that does not count: a cluster that has just begun.
    for pair in 0..=pairs {
        let mut run = [0.0; 3];
        for delivery in turns {
            let topic = format!("deliveries-{pair}-{}", delivery as usize);
            create(client, &topic, PARTITIONS).await?;
            let produced = produce(client, &topic, delivery, Until::Time(PRODUCING)).await?;
            client.admin().delete_topic(&topic).await?;
            run[delivery as usize] = produced.megabytes_per_second();
            if delivery == Delivery::Transactional && pair > 0 {
                per_second.push(produced.transactions as f64 / produced.took.as_secs_f64());
            }
        }
        // Each is the first one as often as the others.
        turns.rotate_left(1);
        if pair > 0 {
            rates.iter_mut().zip(run).for_each(|(figures, rate)| figures.push(rate));
        }
    }
    let ratio = |of: Delivery| {
        let pairs = rates[of as usize].0.iter().zip(&rates[Delivery::Plain as usize].0);
        Figures(pairs.map(|(of, plain)| of / plain).collect())
    };
    Ok(vec![
        rates[Delivery::Plain as usize].line("plain, MB/s"),
        rates[Delivery::Idempotent as usize].line("idempotent, MB/s"),
        rates[Delivery::Transactional as usize].line("transactional, commit after 100 ms, MB/s"),
        per_second.line("its transactions per second"),
        ratio(Delivery::Idempotent).line("idempotent / plain"),
        ratio(Delivery::Transactional).line("transactional / plain"),
    ])
}

#[derive(Clone, Copy)]
enum Until {
    Time(Duration),
    Records(u64),
}

impl Until {
    fn is_over(self, began: Instant, records: u64) -> bool {
        match self {
            Self::Time(time) => began.elapsed() >= time,
            Self::Records(most) => records >= most,
        }
    }
}

struct Produced {
    records: u64,
    transactions: u64,
    took: Duration,
}

impl Produced {
    fn megabytes_per_second(&self) -> f64 {
        (self.records * RECORD_BYTES as u64) as f64 / 1e6 / self.took.as_secs_f64()
    }
}

fn builder(client: &Client, delivery: Delivery) -> ProducerBuilder {
    let builder = client.producer().buffer_bytes(BUFFER_BYTES).in_flight(IN_FLIGHT);
    builder.idempotent(delivery != Delivery::Plain)
}

/// From the first record to the last acknowledgement, or the last commit.
async fn produce(client: &Client, topic: &str, delivery: Delivery, until: Until) -> Result<Produced, Failure> {
    // The clock is read once for so many records.
    const RECORDS_PER_LOOK: usize = 64;
    let value = vec![b'v'; RECORD_BYTES];
    let record = || Record::to(topic).value(&value);
    let builder = builder(client, delivery);
    if delivery != Delivery::Transactional {
        let producer: Producer = builder.build().await?;
        let (began, mut records) = (Instant::now(), 0);
        while !until.is_over(began, records) {
            for _ in 0..RECORDS_PER_LOOK {
                drop(producer.send(record()).await?);
            }
            records += RECORDS_PER_LOOK as u64;
        }
        producer.flush().await?;
        return Ok(Produced { records, transactions: 0, took: began.elapsed() });
    }
    let mut producer: TransactionalProducer = builder.transactional_id(topic).build().await?;
    let (began, mut records, mut transactions) = (Instant::now(), 0, 0);
    while !until.is_over(began, records) {
        let transaction = producer.begin().await?;
        let opened = Instant::now();
        while opened.elapsed() < COMMIT_INTERVAL && !until.is_over(began, records) {
            for _ in 0..RECORDS_PER_LOOK {
                drop(transaction.send(record()).await?);
            }
            records += RECORDS_PER_LOOK as u64;
        }
        transaction.commit().await?;
        transactions += 1;
    }
    Ok(Produced { records, transactions, took: began.elapsed() })
}

/// A log of transactions alone, read with and without regard to them.
async fn reading(client: &Client, pairs: u32) -> Result<Vec<String>, Failure> {
    let topic = "deliveries-read";
    create(client, topic, PARTITIONS).await?;
    let records = READ_MEGABYTES * 1_000_000 / RECORD_BYTES as u64;
    let written = produce(client, topic, Delivery::Transactional, Until::Records(records)).await?;
    let (mut uncommitted, mut committed, mut ratio) = (Figures::default(), Figures::default(), Figures::default());
    for pair in 0..=pairs {
        let read = async |isolation| read(client, topic, isolation, written.records).await;
        // Who is first takes turns too.
        let (without, with) = if pair % 2 == 0 {
            let without = read(Isolation::ReadUncommitted).await?;
            (without, read(Isolation::ReadCommitted).await?)
        } else {
            let with = read(Isolation::ReadCommitted).await?;
            (read(Isolation::ReadUncommitted).await?, with)
        };
        if pair > 0 {
            uncommitted.push(without);
            committed.push(with);
            ratio.push(with / without);
        }
    }
    client.admin().delete_topic(topic).await?;
    Ok(vec![
        format!("{} records in {} transactions are read", written.records, written.transactions),
        uncommitted.line("read_uncommitted, MB/s"),
        committed.line("read_committed, MB/s"),
        ratio.line("read_committed / read_uncommitted"),
    ])
}

/// Reads so many records from the start, in MB/s; every value is looked at.
async fn read(client: &Client, topic: &str, isolation: Isolation, records: u64) -> Result<f64, Failure> {
    let builder = client.consumer().topic(topic).start_at(StartAt::Earliest).isolation(isolation);
    let mut consumer = builder.build().await?;
    let (began, mut read, mut bytes) = (Instant::now(), 0, 0);
    while read < records {
        let batch = tokio::time::timeout(PATIENCE, consumer.next_batch()).await?.ok_or("reading ended early")??;
        for record in &batch {
            read += 1;
            bytes += record.value_bytes().map_or(0, <[u8]>::len);
        }
    }
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// Transactions of one record for each of 8 partitions, one after another, each after a flush of a file of the same disk.
async fn transactions(client: &Client, dir: &Path) -> Result<Vec<String>, Failure> {
    let topic = "deliveries-transactions";
    create(client, topic, PARTITIONS).await?;
    let mut producer = client.producer().transactional_id(topic).build().await?;
    let mut file = File::create(dir.join("flushed"))?;
    let (mut flushes, mut whole, mut commits) = (Times::default(), Times::default(), Times::default());
    for turn in 0..WARM_UP + TRANSACTIONS {
        let flushing = Instant::now();
        file.write_all(&[turn as u8; FLUSH_BYTES])?;
        file.sync_data()?;
        let flushed = flushing.elapsed();
        let beginning = Instant::now();
        let transaction = producer.begin().await?;
        for partition in 0..PARTITIONS {
            drop(transaction.send(Record::to(topic).partition(partition).value(b"a record")).await?);
        }
        transaction.flush().await?;
        let committing = Instant::now();
        transaction.commit().await?;
        if turn >= WARM_UP {
            flushes.push(flushed);
            whole.push(beginning.elapsed());
            commits.push(committing.elapsed());
        }
    }
    client.admin().delete_topic(topic).await?;
    let flush = flushes.at(0.5);
    Ok(vec![
        format!("{TRANSACTIONS} transactions over {PARTITIONS} partitions, in turns with flushes of {FLUSH_BYTES} B"),
        flushes.line("a flush", flush),
        commits.line("commit, its records acknowledged", flush),
        whole.line("from begin to committed", flush),
    ])
}

/// How long something took, each time.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn push(&mut self, took: Duration) {
        self.0.push(took);
    }

    /// The time within which this share of them was over, in ms.
    fn at(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        sorted[((sorted.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3
    }

    fn line(&self, name: &str, flush_ms: f64) -> String {
        let (p50, p99) = (self.at(0.5), self.at(0.99));
        format!("{name:<50} p50 {p50:.2} ms, p99 {p99:.2} ms; {:.1} and {:.1} flushes", p50 / flush_ms, p99 / flush_ms)
    }
}

/// Commits of a position in each of 8 partitions: one after another of one group, and those of many groups.
async fn offsets(client: &Client) -> Result<Vec<String>, Failure> {
    let topic = "deliveries-commits";
    create(client, topic, PARTITIONS).await?;
    let producer = client.producer().build().await?;
    for partition in 0..PARTITIONS {
        for _ in 0..OFFSETS {
            drop(producer.send(Record::to(topic).partition(partition).value(b"a record")).await?);
        }
    }
    producer.flush().await?;
    let alone = committing(client, topic, 1).await?;
    let together = committing(client, topic, COMMITTERS).await?;
    client.admin().delete_topic(topic).await?;
    Ok(vec![
        format!("{:<50} {alone:>10.0}   commits of 8 offsets per second", "one group, one commit after another"),
        format!("{:<50} {together:>10.0}   commits of 8 offsets per second", format!("{COMMITTERS} groups at once")),
    ])
}

/// Records of each partition that groups commit positions of.
const OFFSETS: i64 = 1_000;

async fn committing(client: &Client, topic: &str, groups: usize) -> Result<f64, Failure> {
    let mut members = Vec::new();
    for number in 0..groups {
        let group = client.group(format!("committing-{groups}-{number}")).topic(topic).commit_manually().join().await?;
        members.push(settled(group).await?);
    }
    let began = Instant::now();
    let mut running: JoinSet<Result<u64, flowstone_client::Error>> = JoinSet::new();
    for member in members {
        let topic = topic.to_owned();
        running.spawn(async move {
            let mut commits = 0;
            while began.elapsed() < COMMITTING {
                let offset = commits as i64 % OFFSETS;
                let positions: Vec<Position> =
                    (0..PARTITIONS).map(|partition| Position::new(&topic, partition, offset)).collect();
                match member.commit_positions(&positions).await {
                    Ok(()) => commits += 1,
                    // The coordinator has moved.
                    Err(error) if error.is_retriable() => {}
                    Err(error) => return Err(error),
                }
            }
            member.close(PATIENCE).await?;
            Ok(commits)
        });
    }
    let mut commits = 0;
    while let Some(ended) = running.join_next().await {
        commits += ended??;
    }
    Ok(commits as f64 / COMMITTING.as_secs_f64())
}

/// Waits until the member owns all partitions.
async fn settled(mut member: GroupConsumer) -> Result<GroupConsumer, Failure> {
    let began = Instant::now();
    while !member.is_settled() || member.assignment().len() < PARTITIONS as usize {
        if began.elapsed() > PATIENCE {
            return Err("a group's only member gets no partitions".into());
        }
        // What it is given is looked at when the next batch is asked for.
        let _ = tokio::time::timeout(Duration::from_millis(5), member.next_batch()).await;
    }
    Ok(member)
}

/// One of a hundred members leaves, another one comes, and so on.
async fn rebalances(servers: &str, client: &Client, rounds: u32) -> Result<Vec<String>, Failure> {
    let topic = "deliveries-group";
    create(client, topic, GROUP_PARTITIONS).await?;
    let owners = Arc::new(Owners::default());
    let mut clients = Vec::new();
    for _ in 0..MEMBERS.div_ceil(MEMBERS_PER_CLIENT) {
        clients.push(Client::connect(servers).await?);
    }
    let began = Instant::now();
    let mut members = Vec::new();
    for number in 0..MEMBERS {
        members.push(Member::join(&clients[number / MEMBERS_PER_CLIENT], topic, number, &owners).await?);
    }
    let joined = owners.wait(|owned| owned.is_shared_out(MEMBERS)).await? - began;
    let (mut left, mut came) = (Figures::default(), Figures::default());
    for round in 0..rounds as usize {
        let leaver = members.remove(0);
        let at = Instant::now();
        leaver.leave(&owners)?;
        let over = owners.wait(Owned::is_complete).await?;
        left.push((over - at).as_secs_f64() * 1e3);
        let newcomer = MEMBERS + round;
        let at = Instant::now();
        members.push(Member::join(&clients[round % clients.len()], topic, newcomer, &owners).await?);
        let over = owners.wait(|owned| owned.is_shared_out(MEMBERS)).await?;
        came.push((over - at).as_secs_f64() * 1e3);
    }
    for member in members {
        member.leave(&owners)?;
    }
    client.admin().delete_topic(topic).await?;
    Ok(vec![
        format!(
            "{MEMBERS} members, {GROUP_PARTITIONS} partitions: all have come, and have their share, after {:.1} s",
            joined.as_secs_f64()
        ),
        left.line("one leaves: each partition has an owner again, ms"),
        came.line("one comes: each has its share, ms"),
    ])
}

/// Which member reads each partition, as the members themselves say.
#[derive(Default)]
struct Owners {
    /// Held for the time of one change.
    owned: Mutex<Owned>,
    changed: Notify,
}

#[derive(Default)]
struct Owned {
    /// By partition.
    by: std::collections::BTreeMap<i32, usize>,
}

impl Owned {
    fn is_complete(&self) -> bool {
        self.by.len() == GROUP_PARTITIONS as usize
    }

    /// Every one of so many members has as many as any other.
    fn is_shared_out(&self, members: usize) -> bool {
        let mut counts: std::collections::BTreeMap<usize, usize> = Default::default();
        self.by.values().for_each(|owner| *counts.entry(*owner).or_default() += 1);
        self.is_complete() && counts.len() == members && counts.values().all(|count| *count == self.by.len() / members)
    }
}

impl Owners {
    fn change(&self, change: impl FnOnce(&mut Owned)) {
        change(&mut self.owned.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }

    fn gained(&self, member: usize, partitions: &[(String, i32)]) {
        self.change(|owned| owned.by.extend(partitions.iter().map(|(_, partition)| (*partition, member))));
    }

    fn lost(&self, member: usize, partitions: &[(String, i32)]) {
        self.change(|owned| {
            for (_, partition) in partitions {
                // Its next owner may have said so already.
                if owned.by.get(partition) == Some(&member) {
                    owned.by.remove(partition);
                }
            }
        });
    }

    /// Waits until this is so.
    async fn wait(&self, is_so: impl Fn(&Owned) -> bool) -> Result<Instant, Failure> {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                if is_so(&self.owned.lock().unwrap_or_else(PoisonError::into_inner)) {
                    return Instant::now();
                }
                changed.await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.map_err(|_| "the group's partitions find no owners".into())
    }
}

/// A member that reads, and tells what it has.
struct Member {
    number: usize,
    leave: oneshot::Sender<()>,
    /// Ends once it left.
    _task: JoinHandle<()>,
}

impl Member {
    async fn join(client: &Client, topic: &str, number: usize, owners: &Arc<Owners>) -> Result<Self, Failure> {
        let mut group = client.group("deliveries").topic(topic).join().await?;
        let mut events = group.events();
        let (leave, mut leaving) = oneshot::channel();
        let owners = Arc::clone(owners);
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = &mut leaving => break,
                    event = events.next() => match event {
                        Some(GroupEvent::Assigned(partitions)) => owners.gained(number, &partitions),
                        Some(GroupEvent::Revoking(revocation)) => owners.lost(number, revocation.partitions()),
                        Some(GroupEvent::Lost(partitions)) => owners.lost(number, &partitions),
                        _ => return,
                    },
                    // The topic is empty: what it waits for are the partitions.
                    batch = group.next_batch() => if batch.is_none() { return },
                }
            }
            let _ = group.close(PATIENCE).await;
        });
        Ok(Self { number, leave, _task: task })
    }

    /// Begins to leave: what it had has no owner from now on.
    fn leave(self, owners: &Owners) -> Result<(), Failure> {
        owners.change(|owned| owned.by.retain(|_, owner| *owner != self.number));
        self.leave.send(()).map_err(|()| "a member left by itself".into())
    }
}

/// A topic of three replicas, led everywhere.
async fn create(client: &Client, topic: &str, partitions: i32) -> Result<(), Failure> {
    client.admin().create_topic(NewTopic::new(topic).partitions(partitions).replicas(3)).await?;
    let began = Instant::now();
    loop {
        if client.admin().cluster_health().await?.is_healthy() {
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            return Err(format!("topic {topic} does not get its replicas").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
