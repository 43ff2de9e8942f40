//! Copies one topic into another, order kept per partition, as fast as both go: whole batches in, records out without
//! copying them in between. It ends where the source ended when it began.
//!
//! `cargo run -p flowstone-client --example copy_topic -- SERVER FROM TO`

#![allow(clippy::print_stdout, reason = "a program talks on stdout")]

use std::time::Duration;

use flowstone_client::{Client, Compression, ErrorCode, NewTopic, Record, StopAt};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [server, from, to] = &arguments[..] else { return Err("usage: copy_topic SERVER FROM TO".into()) };
    let client = Client::builder(server).client_id("copy_topic").connect().await?;
    let partitions = client.partition_count(from).await?;
    match client.admin().create_topic(NewTopic::new(to).partitions(partitions)).await {
        Err(error) if error.code() != ErrorCode::TopicAlreadyExists => return Err(error.into()),
        _ => {}
    }

    let producer = client.producer().compression(Compression::Lz4).build().await?;
    let mut consumer = client.consumer().topic(from).stop_at(StopAt::End).build().await?;
    let mut records = 0;
    while let Some(batch) = consumer.next_batch().await {
        let batch = batch?;
        for record in &batch {
            let mut copy = Record::to(to)
                .partition(record.partition())
                .timestamp_millis(record.timestamp())
                .key(record.key_bytes())
                .value(record.value_bytes());
            for (key, value) in record.headers() {
                copy = copy.header(key, value);
            }
            // Waits while the buffer is full; whether all was stored, the close tells.
            drop(producer.send(copy).await?);
        }
        records += batch.len();
    }
    producer.close(Duration::from_secs(60)).await?;
    println!("{records} records copied");
    Ok(())
}
