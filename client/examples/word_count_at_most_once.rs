//! Counts words, at most once: the position is committed before the counts are stored. A worker that dies in between
//! leaves some lines out; none counts twice.
//!
//! `cargo run --release -p flowstone-client --example word_count_at_most_once -- localhost:7070 lines counts worker-1`

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
        // Not committed, not counted: another member has the partition by now.
        if let Err(error) = group.commit().await {
            eprintln!("not committed: {error}");
            continue;
        }
        for (word, count) in words::count(&batch) {
            drop(producer.send(Record::to(&place.counts).key(word).value(count.to_string())).await?);
        }
        producer.flush().await?;
    }
    Ok(())
}
