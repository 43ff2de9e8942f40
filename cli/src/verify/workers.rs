//! Workers that read a group's partitions and write what they read on to a second topic, in transactions with the offsets
//! of what they read: each record that went in comes out once, whoever dies.

use super::ending::heal_and_read_all;
use super::members::{Current, Dice, Group};
use super::{Log, Stop, VerifyArgs, Workbench, reading, stopped, workbench};
use crate::connect::connect;
use crate::failure::Outcome;
use crate::moment;
use crate::stdio::say;
use flowstone_checker::{
    Isolation, Kind, Offset, ReaderId, SenderId, SenderKind, TransactionEnd, TransactionId, ValueId,
};
use flowstone_client::{
    Ack, Client, ErrorKind, GroupConsumer, NewTopic, Record, RecordBatch, TopicDescription, Transaction,
    TransactionalProducer,
};
use futures::FutureExt;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Workers at a time.
const WORKERS: usize = 3;
/// Batches after which one is replaced by its successor.
const LIFE_MAX: u64 = 200;
const SESSION_TIMEOUT: Duration = Duration::from_secs(6);
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(10);
/// After an error.
const PAUSE: Duration = Duration::from_millis(200);

/// The workers and what they did.
pub(super) struct Workers {
    pipe: Arc<Pipe>,
    tasks: JoinSet<()>,
    readers: JoinSet<Outcome>,
    stop: watch::Sender<bool>,
}

/// What all workers share.
struct Pipe {
    /// Reads the first topic.
    group: Arc<Group>,
    /// The second topic.
    out: Arc<Workbench>,
    /// Of each value written on: which record it was made of. Guards the map alone.
    made_of: Mutex<HashMap<ValueId, (i32, i64)>>,
}

/// Workers until the workload's own end: they have to write on what is there by then.
pub(super) async fn start(
    args: &VerifyArgs,
    bench: &Arc<Workbench>,
    client: &Client,
    topic: &TopicDescription,
) -> Outcome<Workers> {
    let name = format!("verify-out-{}-{}", moment::now_ms(), std::process::id());
    let second = NewTopic::new(name).partitions(topic.partitions.len() as i32).replicas(topic.replication_factor);
    let second = client.admin().create_topic(second.config("retention.ms", "-1")).await?;
    let shared = (bench.run, bench.began, bench.history.clone(), bench.progress.clone());
    let out = Workbench { shared_topic: false, ..workbench(args, &bench.common, client, &second, shared).await? };
    let group = Group::begin(bench, client).await?;
    let pipe = Arc::new(Pipe { group, out: Arc::new(out), made_of: Mutex::default() });
    let (stop, stopping) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for number in 0..WORKERS {
        tasks.spawn(be_workers(pipe.clone(), connect(&bench.common).await?, number, stopping.clone()));
    }
    let readers = reading::start(&pipe.out, &stopping).await?;
    Ok(Workers { pipe, tasks, readers, stop })
}

impl Workers {
    /// Waits until the group has written everything up to these ends on, and counts what came out.
    pub(super) async fn finish(&mut self, heal: Duration, ends: &[(Log, i64)]) {
        self.pipe.group.wait(heal, ends).await;
        let _ = self.stop.send(true);
        while self.tasks.join_next().await.is_some() {}
        while self.readers.join_next().await.is_some() {}
        heal_and_read_all(&self.pipe.out, heal).await;
        self.pipe.judge(ends);
    }

    pub(super) async fn clean_up(self, client: &Client) {
        drop(self.tasks);
        drop(self.readers);
        self.pipe.group.clean_up(client).await;
        let name = &self.pipe.out.topic;
        if let Err(error) = client.admin().delete_topic(name).await {
            say(format_args!("warning: cannot remove topic {name}: {error}"));
        }
    }
}

impl Pipe {
    fn made_of(&self) -> MutexGuard<'_, HashMap<ValueId, (i32, i64)>> {
        self.made_of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every record that went in came out once.
    fn judge(&self, ends: &[(Log, i64)]) {
        let made_of = self.made_of();
        let mut history = self.out.history();
        let mut came_out: HashMap<(i32, i64), ValueId> = HashMap::new();
        let mut made: Vec<_> = made_of.iter().collect();
        made.sort_unstable();
        for (value, place) in made {
            if !history.is_given_to_committed(*value) {
                continue;
            }
            if let Some(before) = came_out.insert(*place, *value)
                && let Some(log) = self.group.bench.log(place.0)
            {
                let detail = format!("it was written on twice, as value {before} and as value {value}");
                history.report(Kind::Duplicate, log.id, Some(Offset::new(place.1)), detail);
            }
        }
        for (log, end) in ends {
            let went_in: Vec<_> = history.values(log.id, Offset::new(log.base), Offset::new(*end)).collect();
            for (offset, value) in went_in {
                if !came_out.contains_key(&(log.partition, offset.get())) {
                    let detail = format!("value {value} went in and was never written on");
                    history.report(Kind::LostWrite, log.id, Some(offset), detail);
                }
            }
        }
    }
}

/// One worker after the other, each under the same transactional id: whatever fails, the next one begins anew.
async fn be_workers(pipe: Arc<Pipe>, client: Client, number: usize, mut stop: Stop) {
    let id = format!("verify-{:016x}-{number}", pipe.out.run.0);
    let mut dice = Dice(pipe.out.run.0 ^ (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut before: Option<SenderId> = None;
    while !*stop.borrow() {
        let begun = async {
            let builder = client.producer().delivery_timeout(TRANSACTION_TIMEOUT).transactional_id(&id);
            let producer = builder.transaction_timeout(TRANSACTION_TIMEOUT).build().await?;
            let group = client.group(&pipe.group.name).topic(&pipe.group.bench.topic);
            let consumer = group.session_timeout(SESSION_TIMEOUT).commit_manually().join().await?;
            flowstone_client::Result::Ok((producer, consumer))
        };
        let Ok((producer, consumer)) = begun.await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        // Given back before anything is awaited.
        let (sender, reader) = {
            let mut history = pipe.out.history();
            if let Some(before) = before {
                history.fenced(before);
            }
            (history.sender(SenderKind::IDEMPOTENT), history.reader(Isolation::ReadCommitted))
        };
        before = Some(sender);
        let mut worker = Worker { pipe: &pipe, client: &client, id: &id, producer, consumer, sender, reader };
        let zombie = tokio::select! {
            zombie = worker.work(&mut dice) => zombie,
            () = stopped(&mut stop) => false,
        };
        if zombie {
            before = worker.be_fenced().await.or(before);
        } else {
            let Worker { producer, consumer, .. } = worker;
            // Whoever cannot say good-bye is missed after a while.
            let _ = consumer.close(SESSION_TIMEOUT).await;
            if dice.below(2) == 0 {
                let _ = producer.close(SESSION_TIMEOUT).await;
            }
        }
    }
}

struct Worker<'a> {
    pipe: &'a Arc<Pipe>,
    client: &'a Client,
    id: &'a str,
    producer: TransactionalProducer,
    consumer: GroupConsumer,
    sender: SenderId,
    reader: ReaderId,
}

/// Values of one transaction, and what tells what became of each.
type Sent = Vec<(ValueId, Ack)>;

impl Worker<'_> {
    /// Works until something fails or its life is over; whether it should be cut off by its successor.
    async fn work(&mut self, dice: &mut Dice) -> bool {
        let mut events = self.consumer.events();
        let mut current = Current::default();
        for _ in 0..1 + dice.below(LIFE_MAX) {
            let batch = loop {
                tokio::select! {
                    biased;
                    Some(event) = events.next() => current.take(event),
                    batch = self.consumer.next_batch() => match batch {
                        Some(Ok(batch)) => break batch,
                        _ => return false,
                    },
                }
            };
            current.note(&self.pipe.group, self.reader, &batch);
            // Some are thrown away and done again.
            while dice.below(10) == 0 {
                if !self.write_on(&batch, false).await {
                    return false;
                }
            }
            if !self.write_on(&batch, true).await {
                return false;
            }
        }
        dice.below(2) == 0
    }

    /// Writes a batch on in one transaction; whether that is over as it was meant.
    async fn write_on(&mut self, batch: &RecordBatch, commit: bool) -> bool {
        let Ok(transaction) = self.producer.begin().await else { return false };
        let id = self.pipe.out.history().transaction();
        let (sent, whole) = send_all(self.pipe, self.sender, id, &transaction, batch).await;
        transaction.consumed(batch);
        let end = if commit && whole {
            self.pipe.out.history().committing(id);
            match transaction.commit().await {
                Ok(()) => TransactionEnd::Committed,
                // The client has rolled it back.
                Err(error) if error.kind() == ErrorKind::Abortable => TransactionEnd::Aborted,
                Err(_) => TransactionEnd::Unknown,
            }
        } else {
            // Nobody asked for a commit: whatever becomes of it, it never counts.
            let _ = transaction.abort().await;
            TransactionEnd::Aborted
        };
        settle(self.pipe, sent);
        self.pipe.out.history().transaction_ended(id, end);
        whole && end == if commit { TransactionEnd::Committed } else { TransactionEnd::Aborted }
    }

    /// Has its successor cut it off in the middle of a transaction, and goes on as if nothing were: nothing of that may
    /// count. The successor's sender, which is the last one by then.
    async fn be_fenced(mut self) -> Option<SenderId> {
        let batch = tokio::time::timeout(PAUSE * 5, self.consumer.next_batch()).await.ok()??.ok()?;
        let transaction = self.producer.begin().await.ok()?;
        let id = self.pipe.out.history().transaction();
        let (sent, _) = send_all(self.pipe, self.sender, id, &transaction, &batch).await;
        let _ = transaction.flush().await;
        settle(self.pipe, sent);
        let builder = self.client.producer().delivery_timeout(TRANSACTION_TIMEOUT).transactional_id(self.id);
        let successor = builder.transaction_timeout(TRANSACTION_TIMEOUT).build().await.ok()?;
        let next = {
            let mut history = self.pipe.out.history();
            history.fenced(self.sender);
            history.sender(SenderKind::IDEMPOTENT)
        };
        let (late, _) = send_all(self.pipe, self.sender, id, &transaction, &batch).await;
        transaction.consumed(&batch);
        let committed = transaction.commit().await;
        settle(self.pipe, late);
        let mut history = self.pipe.out.history();
        history.transaction_ended(id, TransactionEnd::Aborted);
        if committed.is_ok()
            && let Some(log) = self.pipe.out.logs.first()
        {
            let detail = format!("a producer that was cut off committed transaction {}", id.number());
            history.report(Kind::ZombieAccepted, log.id, None, detail);
        }
        drop(history);
        drop(successor);
        Some(next)
    }
}

/// Writes every record of a batch on; whether all were taken in.
async fn send_all(
    pipe: &Pipe,
    sender: SenderId,
    transaction_id: TransactionId,
    transaction: &Transaction<'_>,
    batch: &RecordBatch,
) -> (Sent, bool) {
    let out = &pipe.out;
    let mut sent = Vec::with_capacity(batch.len());
    for record in batch {
        let partition = record.partition();
        let Some(log) = out.log(partition) else { continue };
        let value = out.history().send_in(transaction_id, sender, log.id, out.elapsed());
        pipe.made_of().insert(value, (partition, record.offset()));
        let bytes = out.run.encode(value, out.value_bytes);
        match transaction.send(Record::to(&out.topic).partition(partition).value(&bytes)).await {
            Ok(ack) => sent.push((value, ack)),
            Err(_) => {
                out.history().failed(value);
                return (sent, false);
            }
        }
    }
    (sent, true)
}

/// What became of each; what is not told by now nobody knows.
fn settle(pipe: &Pipe, sent: Sent) {
    for (value, ack) in sent {
        let told = ack.now_or_never();
        let mut history = pipe.out.history();
        match told {
            Some(Ok(at)) => history.acknowledged(value, Offset::new(at.offset), pipe.out.elapsed()),
            _ => history.unknown(value),
        }
    }
}
