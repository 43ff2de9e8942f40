//! Counts words, exactly once: what a batch of lines adds to the counts is stored together with the position behind the
//! batch, or not at all. Kill it, or brokers, at any moment and start it again: no line counts twice, none is left out.
//!
//! `cargo run --release -p flowstone-client --example word_count_exactly_once -- localhost:7070 lines counts worker-1`

mod words;

use flowstone_client::{Client, ErrorCode, Record};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let place = words::Place::from_args()?;
    let client = Client::connect(&place.servers).await?;
    let mut group =
        client.group("word-count").topics([&place.lines]).session_timeout(words::SESSION_TIMEOUT).join().await?;
    let mut producer = client.producer().transactional_id(&place.worker).build().await?;
    while let Some(batch) = group.next_batch().await {
        let batch = batch?;
        let counted = producer
            .transaction(async |t| {
                for (word, count) in words::count(&batch) {
                    drop(t.send(Record::to(&place.counts).key(word).value(count.to_string())).await?);
                }
                t.consumed(&batch);
                Ok(())
            })
            .await;
        match counted {
            // The lines are another worker's by now, who reads them again: nothing of this counts.
            Err(error) if error.code() == ErrorCode::NotAssigned => {}
            // Ending is safe: the next worker goes on from what is committed. Going on with the next batch would leave this
            // one out.
            counted => counted?,
        }
    }
    Ok(())
}
