//! Adds up what the word counts stored, up to where it ends now: `word count` lines, sorted by word.
//!
//! `cargo run --release -p flowstone-client --example word_count_total -- localhost:7070 counts`

use std::collections::BTreeMap;
use std::io::Write;

use flowstone_client::{Client, StopAt};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [servers, counts] = args.try_into().map_err(|_| "give SERVERS COUNTS")?;
    let client = Client::connect(servers).await?;
    let mut consumer = client.consumer().topic(counts).stop_at(StopAt::End).build().await?;
    let mut totals: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    while let Some(batch) = consumer.next_batch().await {
        for record in &batch? {
            let count: u64 = std::str::from_utf8(record.value_bytes().unwrap_or_default())?.parse()?;
            *totals.entry(record.key_bytes().unwrap_or_default().to_vec()).or_default() += count;
        }
    }
    let mut out = std::io::stdout().lock();
    for (word, total) in totals {
        out.write_all(&word)?;
        writeln!(out, " {total}")?;
    }
    Ok(())
}
