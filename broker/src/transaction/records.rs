//! What the coordinator of transactions writes: the newest word about a transactional id, keyed by it.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::internal::{TransactionPartitions, TransactionValue};
use flowstone_protocol::{
    Error, ErrorCode, PartitionId, ProducerEpoch, ProducerId, Timestamp, TopicId, TopicPartition,
};
use prost::{DecodeError, Message};

use super::state::{Cut, Stage, Transaction};
use crate::coordinator::LoggedRecord;

/// How producers take part: 2 is an epoch per transaction. There is no other yet.
const PROTOCOL_VERSION: i32 = 2;

/// One record of `__transaction_state`. Without a value, the id is forgotten.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TransactionRecord {
    pub(crate) id: Arc<str>,
    pub(crate) value: Option<TransactionValue>,
}

impl LoggedRecord for TransactionRecord {
    fn to_log(&self) -> (Option<Bytes>, Option<Bytes>) {
        let value = self.value.as_ref().map(|value| value.encode_to_vec().into());
        (Some(Bytes::copy_from_slice(self.id.as_bytes())), value)
    }

    fn from_log(key: Option<Bytes>, value: Option<Bytes>) -> Result<Self, DecodeError> {
        // What is no text reads as something else than any id: those are checked before they are written.
        let id = String::from_utf8_lossy(&key.unwrap_or_default()).into();
        let value = value.map(TransactionValue::decode).transpose()?;
        Ok(Self { id, value })
    }
}

/// What is written of a transaction.
pub(super) fn to_value(transaction: &Transaction) -> TransactionValue {
    let mut partitions: Vec<TransactionPartitions> = Vec::new();
    for tp in &transaction.partitions {
        let topic_id = Bytes::copy_from_slice(&tp.topic.to_bytes());
        match partitions.last_mut().filter(|topic| topic.topic_id == topic_id) {
            Some(topic) => topic.partitions.push(tp.partition.get()),
            None => partitions.push(TransactionPartitions { topic_id, partitions: vec![tp.partition.get()] }),
        }
    }
    TransactionValue {
        producer_id: transaction.producer.get(),
        producer_epoch: transaction.epoch.get().into(),
        previous_producer_id: transaction.previous.unwrap_or(ProducerId::NONE).get(),
        state: transaction.stage as i32,
        timeout_ms: i32::try_from(transaction.timeout.as_millis()).unwrap_or(i32::MAX),
        started_at: transaction.started_at.get(),
        updated_at: transaction.updated_at.get(),
        partitions,
        groups: transaction.groups.iter().map(|group| group.to_string()).collect(),
        protocol_version: PROTOCOL_VERSION,
        last_ended_epoch: transaction.last_ended.map_or(-1, |(epoch, _)| epoch.get().into()),
        last_ended_commit: transaction.last_ended.is_some_and(|(_, commit)| commit),
        fenced_reason: transaction.cut.as_str().to_owned(),
    }
}

/// # Errors
/// When a newer release wrote it, or nobody could.
pub(super) fn from_value(value: &TransactionValue) -> Result<Transaction, Error> {
    let unknown = |what: &str| {
        let text = format!("{what} is not known; start the release that wrote it, or a newer one");
        Error::new(ErrorCode::Unsupported, text)
    };
    if value.protocol_version != PROTOCOL_VERSION {
        return Err(unknown(&format!("version {} of how producers take part", value.protocol_version)));
    }
    let epoch =
        |epoch: i32| i16::try_from(epoch).map(ProducerEpoch::new).map_err(|_| unknown(&format!("epoch {epoch}")));
    let mut partitions = BTreeSet::new();
    for topic in &value.partitions {
        let id = TopicId::from_slice(&topic.topic_id).ok_or_else(|| unknown("a topic's id"))?;
        partitions
            .extend(topic.partitions.iter().map(|partition| TopicPartition::new(id, PartitionId::new(*partition))));
    }
    let last_ended = match value.last_ended_epoch {
        ..0 => None,
        ended => Some((epoch(ended)?, value.last_ended_commit)),
    };
    Ok(Transaction {
        producer: ProducerId::new(value.producer_id),
        epoch: epoch(value.producer_epoch)?,
        previous: (value.previous_producer_id >= 0).then(|| ProducerId::new(value.previous_producer_id)),
        stage: Stage::from_number(value.state).ok_or_else(|| unknown(&format!("state {}", value.state)))?,
        timeout: std::time::Duration::from_millis(value.timeout_ms.max(0).unsigned_abs().into()),
        started_at: Timestamp::new(value.started_at),
        updated_at: Timestamp::new(value.updated_at),
        partitions,
        groups: value.groups.iter().map(|group| group.as_str().into()).collect(),
        last_ended,
        cut: Cut::named(&value.fenced_reason),
    })
}
