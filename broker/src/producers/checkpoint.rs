//! The machine's state as checkpoints carry it.

use bytes::Bytes;
use flowstone_protocol::internal::{
    AbortedTransactionState, ForgottenProducer, ProducerBatch, ProducerMarker, ProducerState, ProducersCheckpoint,
};
use flowstone_protocol::{
    Error, ErrorCode, LeaderEpoch, Offset, ProducerEpoch, ProducerId, RaftIndex, Sequence, Timestamp,
};
use prost::Message;

use super::Known;
use super::forgotten::Rest;
use super::producer::{BATCHES_MAX, Batch, Ended, Producer};
use super::transactions::Aborted;

/// Equal states have equal checkpoints.
pub(super) fn encode(known: &Known) -> Bytes {
    let mut producers: Vec<ProducerState> = known.producers.iter().map(|(id, producer)| state(*id, producer)).collect();
    producers.sort_by_key(|producer| producer.producer_id);
    let aborted = known.transactions.aborted().map(|aborted| AbortedTransactionState {
        producer_id: aborted.producer.get(),
        first_offset: aborted.first.get(),
        last_offset: aborted.last.get(),
        stable_offset: aborted.stable.get(),
    });
    let forgotten = known.forgotten.iter().map(|(id, rest)| ForgottenProducer {
        producer_id: id.get(),
        producer_epoch: rest.epoch.get().into(),
        is_unused: rest.is_unused,
    });
    let checkpoint = ProducersCheckpoint { producers, aborted: aborted.collect(), forgotten: forgotten.collect() };
    checkpoint.encode_to_vec().into()
}

fn state(id: ProducerId, producer: &Producer) -> ProducerState {
    let batches = producer.batches.iter().map(|batch| ProducerBatch {
        first_sequence: batch.first.get(),
        last_sequence: batch.last.get(),
        base_offset: batch.base_offset.get(),
        raft_index: batch.index.get(),
        timestamp: batch.timestamp.get(),
    });
    ProducerState {
        producer_id: id.get(),
        producer_epoch: producer.epoch.get().into(),
        batches: batches.collect(),
        transactional: producer.transactional,
        open_since_plus_one: producer.open.map_or(0, |first| first.get() + 1),
        ended: producer.ended.map(|ended| ProducerMarker {
            producer_epoch: ended.epoch.get().into(),
            commit: ended.commit,
            coordinator_epoch: ended.coordinator.get(),
            offset: ended.offset.get(),
            raft_index: ended.index.get(),
            timestamp: ended.timestamp.get(),
        }),
        last_index: producer.last_index.get(),
    }
}

/// # Errors
/// When the bytes are no checkpoint of producers.
pub(super) fn decode(bytes: &[u8]) -> Result<Known, Error> {
    let ProducersCheckpoint { producers, aborted, forgotten } =
        ProducersCheckpoint::decode(bytes).map_err(|error| malformed(&format!("is malformed: {error}")))?;
    let mut known = Known::default();
    for state in producers {
        let id = ProducerId::new(state.producer_id);
        known.insert(id, producer(state)?);
    }
    for aborted in aborted {
        known.transactions.push_aborted(Aborted {
            producer: ProducerId::new(aborted.producer_id),
            first: Offset::new(aborted.first_offset),
            last: Offset::new(aborted.last_offset),
            stable: Offset::new(aborted.stable_offset),
        });
    }
    for forgotten in forgotten {
        let rest = Rest { epoch: epoch(forgotten.producer_epoch)?, is_unused: forgotten.is_unused };
        known.forgotten.push(ProducerId::new(forgotten.producer_id), rest);
    }
    Ok(known)
}

fn producer(state: ProducerState) -> Result<Producer, Error> {
    let batches = state.batches.len();
    if batches > BATCHES_MAX || (batches == 0 && state.ended.is_none()) {
        return Err(malformed(&format!("has a producer of {batches} batches")));
    }
    let batches = state.batches.iter().map(|batch| Batch {
        first: Sequence::new(batch.first_sequence),
        last: Sequence::new(batch.last_sequence),
        base_offset: Offset::new(batch.base_offset),
        index: RaftIndex::new(batch.raft_index),
        timestamp: Timestamp::new(batch.timestamp),
    });
    let ended = match state.ended {
        None => None,
        Some(ended) => Some(Ended {
            epoch: epoch(ended.producer_epoch)?,
            commit: ended.commit,
            coordinator: LeaderEpoch::new(ended.coordinator_epoch),
            offset: Offset::new(ended.offset),
            index: RaftIndex::new(ended.raft_index),
            timestamp: Timestamp::new(ended.timestamp),
        }),
    };
    // Earlier releases did not write it.
    let last_of_batches = state.batches.last().map_or(0, |batch| batch.raft_index);
    Ok(Producer {
        epoch: epoch(state.producer_epoch)?,
        batches: batches.collect(),
        transactional: state.transactional,
        open: (state.open_since_plus_one > 0).then(|| Offset::new(state.open_since_plus_one - 1)),
        ended,
        last_index: RaftIndex::new(if state.last_index > 0 { state.last_index } else { last_of_batches }),
    })
}

fn epoch(epoch: i32) -> Result<ProducerEpoch, Error> {
    i16::try_from(epoch).map(ProducerEpoch::new).map_err(|_| malformed("has an epoch too large"))
}

fn malformed(what: &str) -> Error {
    Error::new(ErrorCode::CorruptLog, format!("the producers' checkpoint {what}"))
}
