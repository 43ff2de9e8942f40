//! Counts words, at least once: the position is committed after the counts are stored. A worker that dies in between
//! counts some lines again; none is left out.
//!
//! `cargo run --release -p flowstone-client --example word_count_at_least_once -- localhost:7070 lines counts worker-1`

mod words;

use flowstone_client::{Client, Record};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let place = words::Place::from_args()?;
    let client = Client::builder(&place.servers).client_id(&place.worker).connect().await?;
    let mut group = client
        .group("word-count")
        .topics([&place.lines])
        .session_timeout(words::SESSION_TIMEOUT)
        .commit_manually()
        .join()
        .await?;
    let producer = client.producer().build().await?;
    while let Some(batch) = group.next_batch().await {
        let batch = batch?;
        for (word, count) in words::count(&batch) {
            drop(producer.send(Record::to(&place.counts).key(word).value(count.to_string())).await?);
        }
        producer.flush().await?;
        // Where another member has the partition by now, it counts these lines again.
        if let Err(error) = group.commit().await {
            eprintln!("not committed: {error}");
        }
    }
    Ok(())
}
