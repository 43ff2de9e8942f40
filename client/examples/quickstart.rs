//! From nothing to a record and back. Needs a broker: `cargo run --release -- dev`, then
//! `cargo run -p flowstone-client --example quickstart -- [HOST:PORT]`.

#![allow(clippy::print_stdout, reason = "a program talks on stdout")]

use flowstone_client::{Client, ErrorCode, NewTopic, Record, StopAt};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7070".to_owned());
    let client = Client::builder(server).client_id("quickstart").connect().await?;
    match client.admin().create_topic(NewTopic::new("quickstart").partitions(2)).await {
        Ok(topic) => println!("made topic {}", topic.name),
        Err(error) if error.code() == ErrorCode::TopicAlreadyExists => println!("the topic is there already"),
        Err(error) => return Err(error.into()),
    }

    let producer = client.producer().build().await?;
    for fruit in ["apple", "banana", "cherry"] {
        let record = Record::to("quickstart").key(fruit).value(format!("one {fruit}")).header("source", "quickstart");
        let at = producer.send(record).await?.await?;
        println!("{fruit} lies in partition {} at offset {}", at.partition, at.offset);
    }

    let mut consumer = client.consumer().topic("quickstart").stop_at(StopAt::End).build().await?;
    while let Some(batch) = consumer.next_batch().await {
        for record in &batch? {
            let value = String::from_utf8_lossy(record.value_bytes().unwrap_or_default());
            println!("{}/{}: {value}", record.partition(), record.offset());
        }
    }
    Ok(())
}
