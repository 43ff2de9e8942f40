//! `bench produce`.

use super::load::{Pace, Values, share};
use super::report::{Latencies, Measured};
use super::{BenchArgs, Topic};
use crate::args::Common;
use crate::connect::connect;
use crate::failure::{Failure, Outcome};
use flowstone_client::{Ack, Producer, ProducerStats, Record};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// At full speed the clock is read for one record in so many; the latency then stands for all of them.
const SAMPLE: u64 = 64;

pub(crate) async fn run(args: &BenchArgs, topic: &Topic, common: &Common) -> Outcome<Measured> {
    let records = args.records(1_000_000);
    let producers = u64::from(args.producers);
    let values = Arc::new(Values::new(args.size as usize));
    let mut ready = Vec::new();
    for index in 0..producers {
        let client = connect(common).await?;
        let mut producer = client
            .producer()
            .acks(args.acks.to_client())
            .compression(args.compression.to_client())
            .delivery_timeout(common.timeout.max(std::time::Duration::from_secs(1)));
        if let Some(bytes) = args.batch_bytes {
            producer = producer.batch_bytes(bytes as usize);
        }
        ready.push(One {
            producer: producer.build().await?,
            topic: topic.name.clone(),
            values: values.clone(),
            records: share(records, producers, index),
            rate: args.rate.map(|rate| rate as f64 / producers as f64),
            in_flight: args.in_flight.map(|records| records as usize),
        });
    }
    let began = Instant::now();
    let running: Vec<_> = ready.into_iter().map(|one| tokio::spawn(one.run())).collect();
    let mut latencies = Latencies::new();
    let mut sent = ProducerStats::default();
    for one in running {
        let (its_latencies, stats) =
            one.await.map_err(|error| Failure::failed(format!("a producer died: {error}")))??;
        latencies.add(&its_latencies);
        sent.records_acknowledged += stats.records_acknowledged;
        sent.records_failed += stats.records_failed;
    }
    let took = began.elapsed();
    let errors = sent.records_failed;
    let records = sent.records_acknowledged;
    Ok(Measured { records, bytes: records * u64::from(args.size), took, latencies, errors })
}

/// One producer's part.
struct One {
    producer: Producer,
    topic: String,
    values: Arc<Values>,
    records: u64,
    rate: Option<f64>,
    in_flight: Option<usize>,
}

/// A record whose acknowledgement is timed, and how many it stands for.
struct Timed {
    ack: Ack,
    sent: Instant,
    records: u64,
}

impl One {
    async fn run(self) -> Outcome<(Latencies, ProducerStats)> {
        let mut latencies = Latencies::new();
        let mut timed: VecDeque<Timed> = VecDeque::new();
        let pace = self.rate.map(|rate| Pace::new(Instant::now(), rate));
        // Whoever sends slowly wants every record timed.
        let sample = if pace.is_some() || self.in_flight.is_some() { 1 } else { SAMPLE };
        for number in 0..self.records {
            if let Some(pace) = &pace {
                self.wait_until(pace.due(number), &mut timed, &mut latencies).await;
            }
            let record = Record::to(&self.topic).value(self.values.value(number));
            if number % sample != 0 {
                if self.producer.try_send(&record)?.is_none() {
                    let _untimed = self.producer.send(record).await?;
                    done(&mut timed, &mut latencies);
                }
                continue;
            }
            let sent = Instant::now();
            let ack = self.producer.send(record).await?;
            timed.push_back(Timed { ack, sent, records: sample.min(self.records - number) });
            done(&mut timed, &mut latencies);
            while self.in_flight.is_some_and(|most| timed.len() >= most) {
                oldest(&mut timed, &mut latencies).await;
            }
        }
        // Failures are counted by the producer.
        let _ = self.producer.flush().await;
        while !timed.is_empty() {
            oldest(&mut timed, &mut latencies).await;
        }
        Ok((latencies, self.producer.stats()))
    }

    /// Waits for a record's turn; acknowledgements that come meanwhile are timed as they come.
    async fn wait_until(&self, due: Instant, timed: &mut VecDeque<Timed>, latencies: &mut Latencies) {
        // A timer's millisecond late at most; then all that is due goes at once.
        if due <= Instant::now() {
            return;
        }
        let turn = tokio::time::sleep_until(due.into());
        tokio::pin!(turn);
        loop {
            tokio::select! {
                biased;
                () = &mut turn => return,
                () = oldest(timed, latencies), if !timed.is_empty() => {}
            }
        }
    }
}

/// Takes what is acknowledged already.
fn done(timed: &mut VecDeque<Timed>, latencies: &mut Latencies) {
    if timed.front().is_some_and(|timed| timed.ack.is_done()) {
        let now = Instant::now();
        while let Some(front) = timed.front()
            && front.ack.is_done()
        {
            latencies.record(now - front.sent, front.records);
            timed.pop_front();
        }
    }
}

/// Waits for the oldest acknowledgement. A record that failed has taken its time as well.
async fn oldest(timed: &mut VecDeque<Timed>, latencies: &mut Latencies) {
    if let Some(front) = timed.front_mut() {
        let _ = (&mut front.ack).await;
        latencies.record(front.sent.elapsed(), front.records);
        timed.pop_front();
    }
}
