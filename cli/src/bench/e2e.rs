//! `bench e2e`: from sending a record to reading it.

use super::load::{Pace, Values};
use super::report::{Latencies, Measured};
use super::{BenchArgs, Topic};
use crate::args::Common;
use crate::connect::connect;
use crate::failure::{Exit, Failure, Outcome};
use flowstone_client::{Client, Consumer, Producer, Record, RecordBatch, StartAt};
use std::time::{Duration, Instant};

/// A value begins with the nanoseconds from the run's beginning to its sending.
const STAMP_BYTES: usize = 8;

pub(crate) async fn run(args: &BenchArgs, client: &Client, topic: &Topic, common: &Common) -> Outcome<Measured> {
    if (args.size as usize) < STAMP_BYTES {
        return Err(Failure::usage(format!("e2e stamps every value: --size must be {STAMP_BYTES} at least")));
    }
    let producer = client
        .producer()
        .acks(args.acks.to_client())
        .compression(args.compression.to_client())
        // A record is sent as soon as it is there: what is measured is the way, not the waiting.
        .linger(Duration::ZERO)
        .build()
        .await?;
    // A connection of its own, as the reader of what others write has.
    let consumer = connect(common).await?.consumer().topic(&topic.name).start_at(StartAt::Latest).build().await?;
    let run = Run {
        topic: topic.name.clone(),
        records: args.records(10_000),
        values: Values::new(args.size as usize),
        began: Instant::now(),
        timeout: common.timeout,
        latencies: Latencies::new(),
        seen: 0,
    };
    match args.rate {
        None => run.in_turn(producer, consumer).await,
        Some(rate) => run.at_rate(producer, consumer, rate as f64).await,
    }
}

struct Run {
    topic: String,
    records: u64,
    values: Values,
    began: Instant,
    timeout: Duration,
    latencies: Latencies,
    /// Records read.
    seen: u64,
}

impl Run {
    /// Sends a record when the one before it was read.
    async fn in_turn(mut self, producer: Producer, mut consumer: Consumer) -> Outcome<Measured> {
        let mut value = Vec::new();
        for number in 0..self.records {
            self.stamp(number, &mut value);
            let _told_by_reading = producer.send(Record::to(&self.topic).value(&value)).await?;
            while self.seen <= number {
                let batch = self.next(&mut consumer).await?;
                self.read(&batch);
            }
        }
        self.finish(&producer).await
    }

    /// Sends by the clock and reads meanwhile.
    async fn at_rate(mut self, producer: Producer, mut consumer: Consumer, rate: f64) -> Outcome<Measured> {
        let pace = Pace::new(self.began, rate);
        let mut value = Vec::new();
        let mut sent = 0;
        while self.seen < self.records {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(pace.due(sent).into()), if sent < self.records => {
                    while sent < self.records && pace.due(sent) <= Instant::now() {
                        self.stamp(sent, &mut value);
                        let _told_by_reading = producer.send(Record::to(&self.topic).value(&value)).await?;
                        sent += 1;
                    }
                }
                batch = self.next(&mut consumer) => self.read(&batch?),
            }
        }
        self.finish(&producer).await
    }

    fn stamp(&self, number: u64, value: &mut Vec<u8>) {
        value.clear();
        value.extend_from_slice(self.values.value(number));
        value[..STAMP_BYTES].copy_from_slice(&(self.began.elapsed().as_nanos() as u64).to_be_bytes());
    }

    async fn next(&self, consumer: &mut Consumer) -> Outcome<RecordBatch> {
        let batch = tokio::time::timeout(self.timeout, consumer.next_batch())
            .await
            .map_err(|_| Failure::new(Exit::Unreachable, "a record did not come back; --timeout waits longer"))?;
        Ok(batch.ok_or_else(|| Failure::failed("the consumer ended"))??)
    }

    fn read(&mut self, batch: &RecordBatch) {
        let now = self.began.elapsed();
        for record in batch {
            // Records of others in a topic that was there before count for nothing.
            let stamp = record.value_bytes().and_then(|value| value.first_chunk::<STAMP_BYTES>());
            if let Some(stamp) = stamp {
                self.latencies.record(now.saturating_sub(Duration::from_nanos(u64::from_be_bytes(*stamp))), 1);
                self.seen += 1;
            }
        }
    }

    async fn finish(self, producer: &Producer) -> Outcome<Measured> {
        let took = self.began.elapsed();
        producer.flush().await?;
        Ok(Measured {
            records: self.seen,
            bytes: self.seen * self.values.size() as u64,
            took,
            latencies: self.latencies,
            errors: producer.stats().records_failed,
        })
    }
}
