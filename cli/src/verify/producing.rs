//! Idempotent producers: each writes every partition, a few records under way on each.

use super::{Log, Stop, VerifyArgs, Workbench, stopped};
use crate::connect::connect;
use crate::failure::Outcome;
use flowstone_checker::{Offset, SenderId, SenderKind, ValueId};
use flowstone_client::{Ack, Producer, Record, RecordMetadata};
use futures::stream::{FuturesUnordered, StreamExt};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Records of one producer under way on one partition: enough for several batches in flight.
const UNDER_WAY_MAX: usize = 16;
/// Every other producer gives up early: what becomes of its records is then unknown, and its numbering begins anew.
const PATIENCE: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(2)];
/// After a record that was not taken in.
const PAUSE: Duration = Duration::from_millis(50);

/// Starts them. Each ends when it is stopped and all it sent is told.
pub(super) async fn start(bench: &Arc<Workbench>, args: &VerifyArgs, stop: &Stop) -> Outcome<JoinSet<Outcome>> {
    let mut tasks = JoinSet::new();
    let lines = u32::from(args.producers) * bench.logs.len() as u32;
    let interval = Duration::from_secs(1) * lines;
    let interval = interval.checked_div(args.rate).unwrap_or_default();
    for number in 0..usize::from(args.producers) {
        let client = connect(&bench.common).await?;
        let patience = PATIENCE[number % PATIENCE.len()];
        let producer = client.producer().linger(Duration::from_millis(1)).delivery_timeout(patience).build().await?;
        let sender = bench.history().sender(SenderKind::IDEMPOTENT);
        for log in &bench.logs {
            let line = Line { bench: bench.clone(), producer: producer.clone(), sender, log: *log, interval };
            tasks.spawn(line.run(stop.clone()));
        }
    }
    Ok(tasks)
}

/// What one producer writes to one partition, in order.
pub(super) struct Line {
    bench: Arc<Workbench>,
    producer: Producer,
    sender: SenderId,
    log: Log,
    /// Between two records.
    interval: Duration,
}

impl Line {
    /// One record after the other, for probing whether a partition takes any.
    pub(super) fn new(bench: &Arc<Workbench>, producer: Producer, sender: SenderId, log: Log) -> Self {
        Line { bench: bench.clone(), producer, sender, log, interval: Duration::ZERO }
    }

    async fn run(self, mut stop: Stop) -> Outcome {
        let mut under_way = FuturesUnordered::new();
        let mut due = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = stopped(&mut stop) => break,
                Some((value, told)) = under_way.next() => self.settle(value, told),
                () = tokio::time::sleep_until(due.into()), if under_way.len() < UNDER_WAY_MAX => {
                    // Whoever was held up does not catch up.
                    due = (due + self.interval).max(Instant::now() - self.interval);
                    match self.send().await {
                        Ok((value, ack)) => under_way.push(async move { (value, ack.await) }),
                        Err(error) if error.is_not_found() => return Err(error.into()),
                        Err(_) => due = Instant::now() + PAUSE,
                    }
                }
            }
        }
        // Bounded by the delivery timeout.
        while let Some((value, told)) = under_way.next().await {
            self.settle(value, told);
        }
        Ok(())
    }

    /// Sends the next value.
    ///
    /// # Errors
    /// It was not taken in: nothing of it has left.
    async fn send(&self) -> flowstone_client::Result<(ValueId, Ack)> {
        let bench = &self.bench;
        let value = bench.history().send(self.sender, self.log.id, bench.elapsed());
        let bytes = bench.run.encode(value, bench.value_bytes);
        match self.producer.send(Record::to(&bench.topic).partition(self.log.partition).value(&bytes)).await {
            Ok(ack) => Ok((value, ack)),
            Err(error) => {
                bench.history().failed(value);
                Err(error)
            }
        }
    }

    /// Notes what became of a value.
    fn settle(&self, value: ValueId, told: flowstone_client::Result<RecordMetadata>) {
        match told {
            Ok(at) => {
                self.bench.history().acknowledged(value, Offset::new(at.offset), self.bench.elapsed());
                self.bench.progress.inc(1);
            }
            // It may have been stored by an attempt whose answer was lost.
            Err(_) => self.bench.history().unknown(value),
        }
    }

    /// Sends one value and waits for what becomes of it; its offset.
    ///
    /// # Errors
    /// Why it was not acknowledged.
    pub(super) async fn probe(&self) -> flowstone_client::Result<i64> {
        let (value, ack) = self.send().await?;
        let told = ack.await;
        let outcome = told.as_ref().map(|at| at.offset).map_err(Clone::clone);
        self.settle(value, told);
        outcome
    }
}
