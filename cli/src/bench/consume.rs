//! `bench consume`.

use super::load::share;
use super::report::{Latencies, Measured};
use super::{BenchArgs, Topic, produce};
use crate::args::Common;
use crate::connect::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::stdio::say;
use flowstone_client::{Client, Consumer, OffsetSpec, StartAt};
use std::time::Instant;

pub(crate) async fn run(args: &BenchArgs, client: &Client, topic: &Topic, common: &Common) -> Outcome<Measured> {
    let wanted = args.records(1_000_000);
    let there: u64 =
        client.admin().topic_offsets(&topic.name, OffsetSpec::Start).await?.iter().map(|place| place.records).sum();
    if there < wanted {
        say(format_args!("writing {} records to {} first", wanted - there, topic.name));
        let missing = BenchArgs { records: Some(wanted - there), rate: None, in_flight: None, ..args.clone() };
        let written = produce::run(&missing, topic, common).await?;
        if written.errors > 0 {
            return Err(Failure::failed(format!("{} of them failed; the broker's log says why", written.errors)));
        }
    }
    // Partitions go round among the consumers; one without any has nothing to do.
    let consumers = i32::from(args.producers).min(topic.partitions);
    let mut ready = Vec::new();
    for index in 0..consumers {
        let mut consumer = connect(common).await?.consumer().start_at(StartAt::Earliest);
        for partition in (0..topic.partitions).filter(|partition| partition % consumers == index) {
            consumer = consumer.partition(&topic.name, partition);
        }
        ready.push(consumer.build().await?);
    }
    let records = if consumers == 1 { vec![wanted] } else { shares(client, topic, wanted, consumers).await? };
    let began = Instant::now();
    let running: Vec<_> = ready
        .into_iter()
        .zip(records)
        .map(|(consumer, records)| tokio::spawn(read(consumer, records, common.timeout)))
        .collect();
    let mut measured = Measured { records: 0, bytes: 0, took: began.elapsed(), latencies: Latencies::new(), errors: 0 };
    for one in running {
        let part = one.await.map_err(|error| Failure::failed(format!("a consumer died: {error}")))??;
        measured.records += part.records;
        measured.bytes += part.bytes;
        measured.latencies.add(&part.latencies);
    }
    measured.took = began.elapsed();
    Ok(measured)
}

/// How many records each consumer can and should read, so that together they read what is wanted.
async fn shares(client: &Client, topic: &Topic, wanted: u64, consumers: i32) -> Outcome<Vec<u64>> {
    let mut there = vec![0; consumers as usize];
    for place in client.admin().topic_offsets(&topic.name, OffsetSpec::Start).await? {
        there[(place.partition % consumers) as usize] += place.records;
    }
    let mut shares: Vec<u64> =
        there.iter().zip(0..).map(|(there, index)| share(wanted, consumers as u64, index).min(*there)).collect();
    let mut missing = wanted - shares.iter().sum::<u64>();
    for (share, there) in shares.iter_mut().zip(there) {
        let more = missing.min(there - *share);
        *share += more;
        missing -= more;
    }
    Ok(shares)
}

/// Reads so many records; the latency is the time that each batch was waited for.
async fn read(mut consumer: Consumer, wanted: u64, timeout: std::time::Duration) -> Outcome<Measured> {
    let began = Instant::now();
    let mut measured = Measured { records: 0, bytes: 0, took: began.elapsed(), latencies: Latencies::new(), errors: 0 };
    while measured.records < wanted {
        let waiting = Instant::now();
        let batch = tokio::time::timeout(timeout, consumer.next_batch())
            .await
            .map_err(|_| Failure::new(Exit::Unreachable, "no records came; --timeout waits longer"))?;
        let Some(batch) = batch else { break };
        let batch = batch?;
        measured.latencies.record(waiting.elapsed(), 1);
        let left = usize::try_from(wanted - measured.records).unwrap_or(usize::MAX);
        // Every value is looked at, as a program that reads would.
        for record in batch.iter().take(left) {
            measured.records += 1;
            measured.bytes += record.value_bytes().map_or(0, <[u8]>::len) as u64;
        }
    }
    Ok(measured)
}
