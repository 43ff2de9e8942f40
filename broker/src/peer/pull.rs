//! Ranges that are pulled: how many at once, and how fast.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::peer as pb;
use flowstone_protocol::{
    BrokerId, Error, ErrorCode, ErrorKind, Offset, PartitionId, RaftIndex, ReplicaId, TopicId, TopicPartition,
};
use flowstone_replication::{Cleanness, PullAnswer, PullRequest, PullWhat, Reply};
use parking_lot::Mutex;
use pb::pull_request::What;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::config::PeerConfig;
use super::network::Shared;

/// Bytes of one answer, unless a single batch is longer.
const PULL_BYTES_MAX: u32 = 16 << 20;
/// What a checkpoint is taken to have before it is there.
const CHECKPOINT_BYTES_GUESS: u32 = 64 << 10;
/// Time that a pull of another broker may wait for its turn here.
const TURN_MAX: Duration = Duration::from_secs(5);
/// Time that may be caught up after a pause.
const BURST: Duration = Duration::from_millis(100);

/// What this broker pulls from others.
#[derive(Debug)]
pub(crate) struct Pulling {
    turns: Semaphore,
    /// Those under way and those that wait.
    places: Semaphore,
    rate: Rate,
    timeout: Duration,
}

impl Pulling {
    pub(crate) fn new(config: &PeerConfig) -> Self {
        Self {
            turns: Semaphore::new(config.pulls_asked_max),
            places: Semaphore::new(config.pulls_asked_max + config.pulls_waiting_max),
            rate: Rate::new(config.limits.pull_bytes_per_second),
            timeout: config.pull_timeout,
        }
    }

    /// Pulls one range and answers, whatever happens.
    pub(crate) async fn run(shared: Arc<Shared>, from: BrokerId, request: PullRequest, asked: Asked) {
        let answer = Self::pull(&shared, from, request).await;
        asked.answer(answer);
    }

    async fn pull(shared: &Arc<Shared>, from: BrokerId, request: PullRequest) -> Result<PullAnswer, Error> {
        let pulling = &shared.pulling;
        let Ok(_place) = pulling.places.try_acquire() else {
            return Err(Error::new(ErrorCode::Overloaded, "too many ranges are being pulled here; try again later"));
        };
        // Never closed.
        let _turn = pulling.turns.acquire().await.ok();
        let wanted = match request.what {
            PullWhat::Checkpoint => CHECKPOINT_BYTES_GUESS,
            PullWhat::Batches { max_bytes, .. } | PullWhat::Offsets { max_bytes, .. } => max_bytes.min(PULL_BYTES_MAX),
        };
        sleep_until(pulling.rate.take(wanted as usize, Instant::now())).await;
        let client = super::client::PeerClient::new(Arc::clone(shared));
        let response = client.pull(from, to_pb(request), pulling.timeout).await;
        let bytes = response.as_ref().map_or(0, |response| response.batches.len() + response.checkpoint.len());
        pulling.rate.correct(wanted as usize, bytes);
        shared.counters.pulled(bytes);
        from_pb(from, request, response?)
    }
}

/// Whoever asked for a range is answered, even where the task that would do it never runs to its end.
pub(crate) struct Asked {
    reply: Option<Reply<Result<PullAnswer, Error>>>,
}

impl Asked {
    pub(crate) fn new(reply: Reply<Result<PullAnswer, Error>>) -> Self {
        Self { reply: Some(reply) }
    }

    fn answer(mut self, answer: Result<PullAnswer, Error>) {
        if let Some(reply) = self.reply.take() {
            reply.send(answer);
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            reply.send(Err(Error::new(
                ErrorCode::ShuttingDown,
                "this broker is shutting down; pull again when it is back",
            )));
        }
    }
}

/// What others pull from this broker.
#[derive(Debug)]
pub(crate) struct Serving {
    turns: Semaphore,
}

impl Serving {
    pub(crate) fn new(config: &PeerConfig) -> Self {
        Self { turns: Semaphore::new(config.limits.pulls_served) }
    }

    /// Answers one pull of a broker that was checked.
    pub(crate) async fn serve(shared: &Shared, request: &pb::PullRequest) -> Result<pb::PullResponse, Error> {
        let request = request_of(request)?;
        let Ok(Ok(_turn)) = timeout(TURN_MAX, shared.serving.turns.acquire()).await else {
            return Err(Error::new(
                ErrorCode::Overloaded,
                "too many ranges are being pulled from this broker; try another one, or later",
            ));
        };
        let not_ready = || Error::new(ErrorCode::LeaderNotReady, "the broker is starting, or stopping; try again");
        let events = shared.events().ok_or_else(not_ready)?;
        let (reply, answer) = oneshot::channel();
        events.serve_pull(request, Reply::from(reply));
        let answer = answer.await.map_err(|_| not_ready())??;
        let response = match answer {
            PullAnswer::Checkpoint { bytes, first_index, first_offset, local_start } => pb::PullResponse {
                checksum: checksum(&bytes),
                checkpoint: bytes,
                first_index: first_index.get(),
                first_offset: first_offset.get(),
                local_offset: local_start.0.get(),
                local_index: local_start.1.get(),
                ..Default::default()
            },
            PullAnswer::Offsets { bytes, next, cleanness } => pb::PullResponse {
                checksum: checksum(&bytes),
                batches: bytes,
                next_offset: next.get(),
                clean_to: cleanness.clean_to.get(),
                dropped_to: cleanness.dropped_to.get(),
                ..Default::default()
            },
            PullAnswer::Batches { bytes, next, commit } => pb::PullResponse {
                checksum: checksum(&bytes),
                batches: bytes,
                next_index: next.get(),
                commit: commit.get(),
                ..Default::default()
            },
        };
        shared.counters.served(response.batches.len() + response.checkpoint.len());
        Ok(response)
    }
}

/// Bytes per second, evenly.
#[derive(Debug)]
struct Rate {
    /// 0: no limit.
    bytes_per_second: u64,
    /// From when on the next may begin. Held for a look and a change.
    next: Mutex<Option<Instant>>,
}

impl Rate {
    fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, next: Mutex::new(None) }
    }

    /// Takes `bytes`; they may be pulled from the returned time on.
    fn take(&self, bytes: usize, now: Instant) -> Instant {
        if self.bytes_per_second == 0 {
            return now;
        }
        let mut next = self.next.lock();
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let begin = next.map_or(earliest, |next| next.max(earliest));
        *next = Some(begin + self.time_of(bytes));
        begin
    }

    /// There were `actual` bytes rather than the `taken` ones.
    fn correct(&self, taken: usize, actual: usize) {
        let mut next = self.next.lock();
        let Some(at) = *next else { return };
        *next = Some(if actual >= taken {
            at + self.time_of(actual - taken)
        } else {
            at.checked_sub(self.time_of(taken - actual)).unwrap_or(at)
        });
    }

    fn time_of(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64)
    }
}

fn to_pb(request: PullRequest) -> pb::PullRequest {
    let PullRequest { tp, of, what } = request;
    pb::PullRequest {
        caller: None,
        topic_id: Bytes::copy_from_slice(&tp.topic.to_bytes()),
        partition: tp.partition.get(),
        replica_id: of.get(),
        what: Some(match what {
            PullWhat::Checkpoint => What::Checkpoint(pb::PullCheckpoint {}),
            PullWhat::Batches { first, last, max_bytes } => What::Batches(pb::PullBatches {
                first_index: first.get(),
                last_index: last.get(),
                max_bytes: max_bytes.min(PULL_BYTES_MAX),
            }),
            PullWhat::Offsets { from, to, max_bytes, held } => What::Offsets(pb::PullOffsets {
                from_offset: from.get(),
                to_offset: to.get(),
                max_bytes: max_bytes.min(PULL_BYTES_MAX),
                held_clean_to: held.clean_to.get(),
                held_dropped_to: held.dropped_to.get(),
            }),
        }),
    }
}

fn request_of(request: &pb::PullRequest) -> Result<PullRequest, Error> {
    let invalid =
        |what: &str| Error::new(ErrorCode::InvalidRequest, format!("a pull {what}; this is a defect of its sender"));
    let topic = TopicId::from_slice(&request.topic_id).ok_or_else(|| invalid("names no topic"))?;
    let what = match &request.what {
        Some(What::Checkpoint(pb::PullCheckpoint {})) => PullWhat::Checkpoint,
        Some(What::Batches(batches)) => PullWhat::Batches {
            first: RaftIndex::new(batches.first_index),
            last: RaftIndex::new(batches.last_index),
            max_bytes: batches.max_bytes.min(PULL_BYTES_MAX),
        },
        Some(What::Offsets(offsets)) => PullWhat::Offsets {
            from: Offset::new(offsets.from_offset),
            to: Offset::new(offsets.to_offset),
            max_bytes: offsets.max_bytes.min(PULL_BYTES_MAX),
            held: Cleanness {
                clean_to: Offset::new(offsets.held_clean_to),
                dropped_to: Offset::new(offsets.held_dropped_to),
            },
        },
        None => return Err(invalid("does not say what is wanted")),
    };
    let tp = TopicPartition::new(topic, PartitionId::new(request.partition));
    Ok(PullRequest { tp, of: ReplicaId::new(request.replica_id), what })
}

fn from_pb(from: BrokerId, request: PullRequest, response: pb::PullResponse) -> Result<PullAnswer, Error> {
    if let Some(error) = &response.error {
        return Err(Error::from_detail(error));
    }
    let bytes = match request.what {
        PullWhat::Checkpoint => response.checkpoint,
        PullWhat::Batches { .. } | PullWhat::Offsets { .. } => response.batches,
    };
    if checksum(&bytes) != response.checksum {
        let why = format!("a range of {} did not come over whole from broker {from}; pull it again", request.tp);
        let mut error = Error::new(ErrorCode::CorruptBatch, why);
        error.kind = ErrorKind::Retriable;
        return Err(error);
    }
    Ok(match request.what {
        PullWhat::Checkpoint => PullAnswer::Checkpoint {
            bytes,
            first_index: RaftIndex::new(response.first_index),
            first_offset: Offset::new(response.first_offset),
            local_start: match response.local_index {
                // One that does not know compaction has all that it has as entries.
                0 => (Offset::new(response.first_offset), RaftIndex::new(response.first_index)),
                index => (Offset::new(response.local_offset), RaftIndex::new(index)),
            },
        },
        PullWhat::Offsets { .. } => PullAnswer::Offsets {
            bytes,
            next: Offset::new(response.next_offset),
            cleanness: Cleanness {
                clean_to: Offset::new(response.clean_to),
                dropped_to: Offset::new(response.dropped_to),
            },
        },
        PullWhat::Batches { .. } => PullAnswer::Batches {
            bytes,
            next: RaftIndex::new(response.next_index),
            commit: RaftIndex::new(response.commit),
        },
    })
}

/// CRC-32C.
fn checksum(bytes: &[u8]) -> u32 {
    // Cast: a checksum of 32 bits in the low half.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_pauses_are_not_saved_up() {
        let rate = Rate::new(1_000);
        let start = Instant::now() + Duration::from_secs(10);
        let at = |instant: Instant| (instant + BURST - start).as_millis();
        assert_eq!(at(rate.take(500, start)), 0);
        assert_eq!(at(rate.take(500, start)), 500);
        rate.correct(500, 100);
        assert_eq!(at(rate.take(500, start)), 600, "what did not come is given back");
        rate.correct(500, 1_500);
        assert_eq!(at(rate.take(1, start)), 2_100, "what came beyond is owed");
        let later = start + Duration::from_secs(100);
        assert_eq!(at(rate.take(1_000, later)), 100_000, "a pause saves up no more than a burst");
        assert_eq!(at(rate.take(1_000, later)), 101_000);
        let unlimited = Rate::new(0);
        for _ in 0..3 {
            assert_eq!(unlimited.take(usize::MAX, start), start);
        }
    }

    #[test]
    fn a_range_that_did_not_come_over_whole_is_pulled_again() {
        let tp = TopicPartition::new(TopicId::new(1), PartitionId::new(2));
        let request = PullRequest { tp, of: ReplicaId::new(3), what: PullWhat::Checkpoint };
        let bytes = Bytes::from_static(b"checkpoint");
        let good = pb::PullResponse { checksum: checksum(&bytes), checkpoint: bytes, ..Default::default() };
        let cut = pb::PullResponse { checkpoint: good.checkpoint.slice(1..), ..good.clone() };
        assert!(from_pb(BrokerId::new(2), request, good).is_ok());
        let error = from_pb(BrokerId::new(2), request, cut).expect_err("cut");
        assert!(error.is_retriable() && error.message.contains("broker 2"), "{error}");
    }
}
