//! A group's records as they are in the log.

use bytes::Bytes;
use flowstone_protocol::internal::group_record_key::Key;
use flowstone_protocol::internal::group_record_value::Value;
use flowstone_protocol::internal::{
    EndedTransaction, EndedTransactionKey, GroupKey, GroupRecord, GroupRecordKey, GroupRecordValue, GroupValue,
    MemberKey, MemberValue, OffsetKey, OffsetValue, OwnedPartitions, PendingOffsetKey, PendingOffsetValue,
};
use flowstone_protocol::{
    Error, ErrorCode, LeaderEpoch, Offset, PartitionId, ProducerEpoch, ProducerId, Timestamp, TopicId, TopicPartition,
};
use prost::Message;

use super::state::{CommittedOffset, Group, Member, PendingOffset};
use crate::coordinator::LoggedRecord;

/// One record: the newest word about its key; without a value the key is gone.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct GroupLogRecord(pub(crate) GroupRecord);

impl GroupLogRecord {
    /// Of its key and value in the log.
    pub(super) fn bytes(&self) -> usize {
        self.0.key.as_ref().map_or(0, Message::encoded_len) + self.0.value.as_ref().map_or(0, Message::encoded_len)
    }
}

impl LoggedRecord for GroupLogRecord {
    fn to_log(&self) -> (Option<Bytes>, Option<Bytes>) {
        let key = self.0.key.as_ref().map(|key| key.encode_to_vec().into());
        (key, self.0.value.as_ref().map(|value| value.encode_to_vec().into()))
    }

    fn from_log(key: Option<Bytes>, value: Option<Bytes>) -> Result<Self, prost::DecodeError> {
        let key = key.map(GroupRecordKey::decode).transpose()?;
        Ok(Self(GroupRecord { key, value: value.map(GroupRecordValue::decode).transpose()? }))
    }
}

fn record(key: Key, value: Option<Value>) -> GroupLogRecord {
    let value = value.map(|value| GroupRecordValue { value: Some(value) });
    GroupLogRecord(GroupRecord { key: Some(GroupRecordKey { key: Some(key) }), value })
}

/// What a group is, its members and offsets aside; `None`: it is gone.
pub(super) fn show_group(name: &str, group: Option<&Group>) -> GroupLogRecord {
    let value = group.map(|group| {
        Value::Group(GroupValue {
            group_epoch: group.epoch,
            assignor: group.assignor.clone(),
            empty_since: group.empty_since.map_or(-1, Timestamp::get),
            assigned_epoch: group.assigned_epoch,
        })
    });
    record(Key::Group(GroupKey { group: name.to_owned() }), value)
}

/// What a member is; `None`: it is gone.
pub(super) fn show_member(group: &str, id: &str, member: Option<&Member>) -> GroupLogRecord {
    let key = MemberKey { group: group.to_owned(), member_id: id.to_owned() };
    let value = member.map(|member| {
        Value::Member(MemberValue {
            instance_id: member.instance.clone(),
            client_id: member.client_id.clone(),
            host: member.host.clone(),
            rack: member.rack.clone(),
            topics: member.topics.clone(),
            topic_pattern: member.pattern.clone(),
            assignor: member.assignor.clone(),
            session_timeout_ms: member.session_timeout_ms,
            rebalance_timeout_ms: member.rebalance_timeout_ms,
            member_epoch: member.epoch,
            previous_member_epoch: member.previous_epoch,
            target: show_partitions(&member.target),
            owned: show_partitions(&member.owned),
            revoking: show_partitions(&member.revoking),
            away: member.away,
        })
    });
    record(Key::Member(key), value)
}

pub(super) fn parse_member(value: MemberValue, at: Offset) -> Result<Member, Error> {
    Ok(Member {
        instance: value.instance_id,
        client_id: value.client_id,
        host: value.host,
        rack: value.rack,
        topics: value.topics,
        pattern: value.topic_pattern,
        assignor: value.assignor,
        session_timeout_ms: value.session_timeout_ms,
        rebalance_timeout_ms: value.rebalance_timeout_ms,
        epoch: value.member_epoch,
        previous_epoch: value.previous_member_epoch,
        target: parse_partitions(&value.target, at)?,
        owned: parse_partitions(&value.owned, at)?,
        revoking: parse_partitions(&value.revoking, at)?,
        away: value.away,
        changed_at: at,
    })
}

/// An offset that counts; `None`: it is gone.
pub(super) fn show_offset(group: &str, tp: TopicPartition, offset: Option<&CommittedOffset>) -> GroupLogRecord {
    let key = OffsetKey { group: group.to_owned(), topic_id: show_topic(tp.topic), partition: tp.partition.get() };
    record(Key::Offset(key), offset.map(|offset| Value::Offset(offset_value(offset))))
}

/// An offset in a transaction; `None`: it is gone.
pub(super) fn show_pending(
    producer: ProducerId,
    group: &str,
    tp: TopicPartition,
    pending: Option<&PendingOffset>,
) -> GroupLogRecord {
    let key = PendingOffsetKey {
        producer_id: producer.get(),
        group: group.to_owned(),
        topic_id: show_topic(tp.topic),
        partition: tp.partition.get(),
    };
    let value = pending.map(|pending| {
        Value::PendingOffset(PendingOffsetValue {
            offset: Some(offset_value(&pending.offset)),
            producer_epoch: pending.epoch.get().into(),
        })
    });
    record(Key::PendingOffset(key), value)
}

/// The end of a producer's last transaction here; `None`: it is forgotten.
pub(super) fn show_ended(producer: ProducerId, ended: Option<(ProducerEpoch, Timestamp)>) -> GroupLogRecord {
    let value = ended.map(|(epoch, at)| {
        Value::Ended(EndedTransaction { producer_id: producer.get(), producer_epoch: epoch.get().into(), at: at.get() })
    });
    record(Key::Ended(EndedTransactionKey { producer_id: producer.get() }), value)
}

fn offset_value(offset: &CommittedOffset) -> OffsetValue {
    OffsetValue {
        offset: offset.offset.get(),
        leader_epoch: offset.leader_epoch.get(),
        metadata: offset.metadata.to_string(),
        committed_at: offset.at.get(),
    }
}

pub(super) fn parse_offset(value: OffsetValue) -> CommittedOffset {
    CommittedOffset {
        offset: Offset::new(value.offset),
        leader_epoch: LeaderEpoch::new(value.leader_epoch),
        metadata: value.metadata.into(),
        at: Timestamp::new(value.committed_at),
    }
}

pub(super) fn parse_epoch(epoch: i32, at: Offset) -> Result<ProducerEpoch, Error> {
    i16::try_from(epoch).map(ProducerEpoch::new).map_err(|_| malformed(at, "producer_epoch"))
}

pub(super) fn parse_tp(topic_id: &[u8], partition: i32, at: Offset) -> Result<TopicPartition, Error> {
    let topic = TopicId::from_slice(topic_id).ok_or_else(|| malformed(at, "topic_id"))?;
    Ok(TopicPartition { topic, partition: PartitionId::new(partition) })
}

fn show_topic(topic: TopicId) -> Bytes {
    Bytes::copy_from_slice(&topic.to_bytes())
}

/// `partitions`, which are sorted, by topic.
fn show_partitions(partitions: &[TopicPartition]) -> Vec<OwnedPartitions> {
    let by_topic = partitions.chunk_by(|a, b| a.topic == b.topic);
    let shown = by_topic.map(|chunk| OwnedPartitions {
        topic_id: show_topic(chunk[0].topic),
        partitions: chunk.iter().map(|tp| tp.partition.get()).collect(),
    });
    shown.collect()
}

fn parse_partitions(shown: &[OwnedPartitions], at: Offset) -> Result<Vec<TopicPartition>, Error> {
    let mut partitions = Vec::with_capacity(shown.iter().map(|owned| owned.partitions.len()).sum());
    for owned in shown {
        for partition in &owned.partitions {
            partitions.push(parse_tp(&owned.topic_id, *partition, at)?);
        }
    }
    partitions.sort_unstable();
    partitions.dedup();
    Ok(partitions)
}

pub(super) fn malformed(at: Offset, field: &str) -> Error {
    Error::new(ErrorCode::CorruptLog, format!("the group record at offset {at} has a malformed {field}"))
}
