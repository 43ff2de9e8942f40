//! Measures the client and a broker in this process together: records in, records out, one record at a time.
//!
//! `cargo run --release -p flowstone-client --example throughput --features testkit -- [RECORDS] [SIZE] [PARTITIONS]`
//!
//! With `FLOWSTONE_SERVER=HOST:PORT` set, against that broker instead, and with the client on one thread; its topic
//! `throughput` is made anew.

#![allow(clippy::print_stdout, reason = "a program talks on stdout")]

use std::time::{Duration, Instant};

use flowstone_client::testkit::TestBroker;
use flowstone_client::{Client, ErrorCode, NewTopic, Record, StopAt};

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<(), AnyError> {
    // One thread wakes nobody up; two are for the broker that shares them.
    let mut runtime = match std::env::var_os("FLOWSTONE_SERVER") {
        Some(_) => tokio::runtime::Builder::new_current_thread(),
        None => tokio::runtime::Builder::new_multi_thread(),
    };
    runtime.enable_all().build()?.block_on(measure())
}

async fn measure() -> Result<(), AnyError> {
    let number = |place: usize, or: usize| std::env::args().nth(place).map_or(Ok(or), |text| text.parse());
    let (records, size, partitions) = (number(1, 2_000_000)?, number(2, 100)?, number(3, 8)?);
    let broker = match std::env::var("FLOWSTONE_SERVER") {
        Ok(_) => None,
        Err(_) => Some(TestBroker::start().await?),
    };
    let server = match &broker {
        Some(broker) => broker.address().to_owned(),
        None => std::env::var("FLOWSTONE_SERVER")?,
    };
    let client = Client::builder(server).client_id("throughput").connect().await?;
    let admin = client.admin();
    match admin.delete_topic("throughput").await {
        Err(error) if error.code() != ErrorCode::UnknownTopic => return Err(error.into()),
        _ => {}
    }
    admin.create_topic(NewTopic::new("throughput").partitions(partitions as i32)).await?;

    let producer = client.producer().build().await?;
    let value = vec![b'v'; size];
    for round in 0..3 {
        let began = Instant::now();
        for _ in 0..records {
            drop(producer.send(Record::to("throughput").value(&value)).await?);
        }
        producer.flush().await?;
        report(&format!("in, round {round}"), records, size, began.elapsed());
    }
    for round in 0..3 {
        let mut consumer = client.consumer().topic("throughput").stop_at(StopAt::End).build().await?;
        let (mut seen, mut bytes) = (0, 0);
        let began = Instant::now();
        while let Some(batch) = consumer.next_batch().await {
            for record in &batch? {
                seen += 1;
                bytes += record.value_bytes().map_or(0, <[u8]>::len);
            }
        }
        report(&format!("out, round {round}"), seen, bytes / seen.max(1), began.elapsed());
    }
    let mut latencies = Vec::new();
    for _ in 0..3000 {
        let began = Instant::now();
        producer.send(Record::to("throughput").value(&value)).await?.await?;
        latencies.push(began.elapsed());
    }
    latencies.sort();
    println!(
        "one at a time: p50 {:?}, p99 {:?}",
        latencies[latencies.len() / 2],
        latencies[latencies.len() * 99 / 100]
    );
    producer.close(Duration::from_secs(10)).await?;
    admin.delete_topic("throughput").await?;
    if let Some(broker) = broker {
        broker.stop().await;
    }
    Ok(())
}

fn report(what: &str, records: usize, size: usize, took: Duration) {
    let seconds = took.as_secs_f64();
    let (per_second, megabytes) = (records as f64 / seconds, (records * size) as f64 / seconds / 1e6);
    println!("{what}: {records} records of {size} B in {took:.2?}: {per_second:.0}/s, {megabytes:.0} MB/s");
}
