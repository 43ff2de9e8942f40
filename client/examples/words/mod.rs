//! What the word counts have in common: the words of a batch of lines, and the arguments.

use std::collections::BTreeMap;
use std::time::Duration;

use flowstone_client::RecordBatch;

/// After so much silence of a worker the others go on with what it read. Shorter than by default: these workers are killed
/// often, and what they had waits that long.
pub(crate) const SESSION_TIMEOUT: Duration = Duration::from_secs(3);

/// Where a worker reads and writes.
pub(crate) struct Place {
    /// `HOST:PORT`, several separated by commas.
    pub(crate) servers: String,
    /// Lines of text.
    pub(crate) lines: String,
    /// For each batch of lines: words, and how often each was in it.
    pub(crate) counts: String,
    /// Tells this worker from its neighbours; the same when it starts again.
    pub(crate) worker: String,
}

impl Place {
    /// From the command line: servers, topic of lines, topic of counts, worker.
    pub(crate) fn from_args() -> Result<Self, &'static str> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let [servers, lines, counts, worker] = args.try_into().map_err(|_| "give SERVERS LINES COUNTS WORKER")?;
        Ok(Self { servers, lines, counts, worker })
    }
}

/// How often each word is in the lines of a batch.
pub(crate) fn count(batch: &RecordBatch) -> BTreeMap<&[u8], u64> {
    let mut words = BTreeMap::new();
    for line in batch {
        for word in line.value_bytes().unwrap_or_default().split(u8::is_ascii_whitespace) {
            if !word.is_empty() {
                *words.entry(word).or_insert(0) += 1;
            }
        }
    }
    words
}
