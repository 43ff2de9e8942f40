//! Control batches: what the log itself writes, one record each, skipped by consumers.
//!
//! A control batch is a pure function of (type, term, index, offset, payload, format version), so that every replica
//! writes the same bytes; and it repeats all of them inside its CRC, so that a flipped bit in the header, which the
//! CRC does not cover, is found. The form is one that unchanged Kafka clients skip:
//!
//! ```text
//! attributes: control bit alone; no timestamps (-1), no producer (-1)
//! key   | i16 version = 0 | i16 type >= 100 |
//! value | i16 format version | i32 term | i64 index | i64 offset | payload... |
//! ```
//!
//! What ends a transaction in a partition is Kafka's own control batch, a [`Marker`]: it carries its producer, and to the
//! log it is a batch like any other.
//!
//! ```text
//! attributes: control and transactional bits; the producer's id and its NEXT epoch, no sequence (-1)
//! key   | i16 version = 0 | i16 type: 0 abort, 1 commit |
//! value | i16 version = 0 | i32 coordinator epoch |
//! ```

use bytes::{BufMut, Bytes};

use crate::batch::{Attributes, BatchError, BatchHeader, HEADER_BYTES, LOG_OVERHEAD, MAGIC, verify_crc};
use crate::compression::Compression;
use crate::ids::{LeaderEpoch, Offset, ProducerEpoch, ProducerId, RaftIndex, Sequence, Term, Timestamp};
use crate::record::{RecordBatchBuilder, RecordIter, records, seal};
use crate::varint::{varint_bytes, write_varint};

/// The newest format of control values that this program writes.
pub const CONTROL_FORMAT_VERSION: i16 = 1;

const KEY_VERSION: i16 = 0;
const KEY_BYTES: usize = 4;
/// Format version, term, index, offset.
const VALUE_LEAD_BYTES: usize = 2 + 4 + 8 + 8;

/// What a control record means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(i16)]
pub enum ControlType {
    /// First entry of a leader's term. No payload.
    NoOp = 100,
    /// The group's members change. Payload: replication's own encoding.
    Membership = 101,
    /// Records below an offset are gone for readers. Payload: [`log_start_payload`].
    LogStart = 102,
    /// Idle producers are forgotten. Payload: the broker's own encoding.
    ProducerExpiry = 103,
}

impl ControlType {
    /// Its number in a control record's key.
    pub const fn id(self) -> i16 {
        self as i16
    }

    /// The type of a number.
    pub const fn from_id(id: i16) -> Option<Self> {
        Some(match id {
            100 => Self::NoOp,
            101 => Self::Membership,
            102 => Self::LogStart,
            103 => Self::ProducerExpiry,
            _ => return None,
        })
    }
}

/// A control record, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlRecord {
    /// What it means.
    pub ctype: ControlType,
    /// The entry's term.
    pub term: Term,
    /// The entry's Raft index.
    pub index: RaftIndex,
    /// The offset that it takes.
    pub offset: Offset,
    /// Version of the value's format.
    pub format_version: i16,
    /// What the type says it is.
    pub payload: Bytes,
}

/// Encodes one control batch, stamped with its offset and epoch, CRC set.
///
/// # Panics
/// If the term does not fit a leader epoch (above `i32::MAX`): no such term is accepted anywhere (and 2^31 elections
/// in one group do not happen); or if the payload is 1 GiB or more.
pub fn encode_control(
    ctype: ControlType,
    term: Term,
    index: RaftIndex,
    offset: Offset,
    payload: &[u8],
    format_version: i16,
) -> Bytes {
    let Some(epoch) = LeaderEpoch::from_term(term) else {
        panic!("term {term} of index {index} is above the highest leader epoch, {}", i32::MAX);
    };
    assert!(payload.len() < 1 << 30, "control payload of {} bytes at index {index}", payload.len());
    let value_bytes = VALUE_LEAD_BYTES + payload.len();
    // Attributes, timestamp delta 0, offset delta 0, no headers: a byte each.
    let length = 3 + varint_bytes(KEY_BYTES as i64) + KEY_BYTES + varint_bytes(value_bytes as i64) + value_bytes + 1;

    let mut batch = Vec::with_capacity(HEADER_BYTES + 5 + length);
    batch.resize(HEADER_BYTES, 0);
    put_varint(&mut batch, length);
    batch.extend_from_slice(&[0, 0, 0]);
    put_varint(&mut batch, KEY_BYTES);
    batch.put_i16(KEY_VERSION);
    batch.put_i16(ctype.id());
    put_varint(&mut batch, value_bytes);
    batch.put_i16(format_version);
    batch.put_i32(epoch.get());
    batch.put_u64(index.get());
    batch.put_i64(offset.get());
    batch.extend_from_slice(payload);
    batch.push(0);

    let header = BatchHeader {
        base_offset: offset,
        batch_length: (batch.len() - LOG_OVERHEAD) as i32,
        leader_epoch: epoch,
        magic: MAGIC,
        crc: 0,
        attributes: Attributes::new(Attributes::CONTROL),
        last_offset_delta: 0,
        base_timestamp: Timestamp::NONE,
        max_timestamp: Timestamp::NONE,
        producer_id: ProducerId::NONE,
        producer_epoch: ProducerEpoch::NONE,
        base_sequence: Sequence::NONE,
        record_count: 1,
    };
    seal(batch, &header)
}

/// Decodes one whole control batch: CRC, form, and that the header's offset and epoch are those inside the CRC.
pub fn decode_control(batch: &[u8]) -> Result<ControlRecord, BatchError> {
    verify_crc(batch)?;
    let header = BatchHeader::parse(batch)?;
    let bad = |problem| Err(BatchError::Control { problem });
    if header.attributes.bits() != Attributes::CONTROL {
        return bad("its attributes are not those of a control batch");
    }
    if header.record_count != 1 || header.last_offset_delta != 0 {
        return bad("it has not exactly one record");
    }
    let mut iter: RecordIter = records(Bytes::copy_from_slice(&batch[..header.total_bytes()]), 0)?;
    let record = match (iter.next(), iter.next()) {
        (Some(Ok(record)), None) => record,
        (Some(Err(error)), _) | (_, Some(Err(error))) => return Err(error),
        _ => return bad("it has not exactly one record"),
    };
    let (Some(key), Some(mut value)) = (record.key, record.value) else {
        return bad("its key or value is null");
    };
    let Ok(key) = <[u8; KEY_BYTES]>::try_from(&key[..]) else {
        return bad("its key is not 4 bytes long");
    };
    if i16::from_be_bytes([key[0], key[1]]) != KEY_VERSION {
        return bad("its key is of an unknown version");
    }
    let id = i16::from_be_bytes([key[2], key[3]]);
    let ctype = ControlType::from_id(id).ok_or(BatchError::UnknownControlType { ctype: id })?;
    let Some(lead) = value.first_chunk::<VALUE_LEAD_BYTES>() else {
        return bad("its value is too short");
    };
    let [v0, v1, t0, t1, t2, t3, rest @ ..] = *lead;
    let format_version = i16::from_be_bytes([v0, v1]);
    let epoch = LeaderEpoch::new(i32::from_be_bytes([t0, t1, t2, t3]));
    let (index, offset) = rest.split_at(8);
    let (Ok(index), Ok(offset)) = (index.try_into(), offset.try_into()) else {
        return bad("its value is too short");
    };
    let index = RaftIndex::new(u64::from_be_bytes(index));
    let offset = Offset::new(i64::from_be_bytes(offset));
    let Some(term) = epoch.term() else {
        return bad("its term is negative");
    };
    if offset != header.base_offset {
        return bad("the offset in its header is not the one inside");
    }
    if epoch != header.leader_epoch {
        return bad("the leader epoch in its header is not the term inside");
    }
    let payload = value.split_off(VALUE_LEAD_BYTES);
    Ok(ControlRecord { ctype, term, index, offset, format_version, payload })
}

/// What ends a transaction in one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Marker {
    /// Whose transaction.
    pub producer_id: ProducerId,
    /// The epoch after the transaction's own: what comes later under a lower one is refused.
    pub producer_epoch: ProducerEpoch,
    /// It counts, rather than being passed over.
    pub commit: bool,
    /// Leader epoch of the coordinator's partition: of two coordinators the newer one is right.
    pub coordinator_epoch: LeaderEpoch,
}

/// Kafka's types of markers.
const ABORT: i16 = 0;
const COMMIT: i16 = 1;

/// Encodes a marker; base offset and leader epoch are for storage to stamp.
pub fn encode_marker(marker: &Marker, now: Timestamp) -> Bytes {
    let mut key = [0; KEY_BYTES];
    key[2..].copy_from_slice(&(if marker.commit { COMMIT } else { ABORT }).to_be_bytes());
    let mut value = [0; 6];
    value[2..].copy_from_slice(&marker.coordinator_epoch.get().to_be_bytes());
    let mut batch = RecordBatchBuilder::new(Compression::None)
        .producer(marker.producer_id, marker.producer_epoch, Sequence::NONE)
        .transactional()
        .control();
    if batch.append(now, Some(&key), Some(&value), []).is_err() {
        unreachable!("ten bytes fit into a batch");
    }
    batch.build()
}

/// Decodes one whole marker. The CRC is not checked.
///
/// # Errors
/// When it is no marker.
pub fn decode_marker(batch: &Bytes) -> Result<Marker, BatchError> {
    let bad = |problem| Err(BatchError::Control { problem });
    let header = BatchHeader::parse(batch)?;
    if !is_marker(&header) || header.record_count != 1 {
        return bad("it is no transaction's marker");
    }
    let Some(record) = records(batch.slice(..header.total_bytes().min(batch.len())), 0)?.next() else {
        return bad("it has no record");
    };
    let record = record?;
    let (Some(key), Some(value)) = (record.key, record.value) else {
        return bad("its key or value is null");
    };
    // Later versions may append fields.
    let (Some([_, _, t0, t1]), Some([_, _, e0, e1, e2, e3])) = (key.first_chunk::<4>(), value.first_chunk::<6>())
    else {
        return bad("its key or value is too short");
    };
    let commit = match i16::from_be_bytes([*t0, *t1]) {
        ABORT => false,
        COMMIT => true,
        ctype => return Err(BatchError::UnknownControlType { ctype }),
    };
    Ok(Marker {
        producer_id: header.producer_id,
        producer_epoch: header.producer_epoch,
        commit,
        coordinator_epoch: LeaderEpoch::new(i32::from_be_bytes([*e0, *e1, *e2, *e3])),
    })
}

/// Whether a batch ends a transaction.
pub const fn is_marker(header: &BatchHeader) -> bool {
    header.attributes.is_control() && header.attributes.is_transactional()
}

/// The payload of [`ControlType::LogStart`]: the first offset still readable.
pub fn log_start_payload(log_start: Offset) -> Bytes {
    Bytes::copy_from_slice(&log_start.get().to_be_bytes())
}

/// The other way.
pub fn log_start_of(payload: &[u8]) -> Result<Offset, BatchError> {
    payload
        .try_into()
        .map(|bytes| Offset::new(i64::from_be_bytes(bytes)))
        .map_err(|_| BatchError::Control { problem: "a log start's payload is not 8 bytes long" })
}

fn put_varint(into: &mut Vec<u8>, value: usize) {
    let mut bytes = [0; 10];
    let end = write_varint(&mut bytes, 0, value as i64);
    into.extend_from_slice(&bytes[..end]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_has_kafkas_bytes_and_comes_back() {
        for commit in [false, true] {
            let marker = Marker {
                producer_id: ProducerId::new(77),
                producer_epoch: ProducerEpoch::new(3),
                commit,
                coordinator_epoch: LeaderEpoch::new(9),
            };
            let batch = encode_marker(&marker, Timestamp::new(1_000));
            let header = BatchHeader::parse(&batch).expect("a batch");
            verify_crc(&batch).expect("its CRC is set");
            assert!(is_marker(&header) && header.data_records() == 0);
            assert_eq!((header.base_sequence, header.max_timestamp), (Sequence::NONE, Timestamp::new(1_000)));
            let record = records(batch.clone(), 0).expect("records").next().expect("one").expect("whole");
            assert_eq!(record.key.as_deref(), Some(&[0, 0, 0, u8::from(commit)][..]));
            assert_eq!(record.value.as_deref(), Some(&[0, 0, 0, 0, 0, 9][..]));
            assert_eq!(decode_marker(&batch), Ok(marker));
            assert!(decode_control(&batch).is_err(), "it is none of the log's own");
        }
    }

    #[test]
    fn what_is_no_marker_is_told() {
        let (term, index, offset) = (Term::new(1), RaftIndex::new(1), Offset::ZERO);
        let own = encode_control(ControlType::NoOp, term, index, offset, &[], CONTROL_FORMAT_VERSION);
        assert!(decode_marker(&own).is_err());
        let mut other = RecordBatchBuilder::new(Compression::None).transactional().control();
        other.append(Timestamp::new(1), Some(&[0, 0, 0, 7]), Some(&[0; 6]), []).expect("fits");
        assert_eq!(decode_marker(&other.build()), Err(BatchError::UnknownControlType { ctype: 7 }));
        let mut short = RecordBatchBuilder::new(Compression::None).transactional().control();
        short.append(Timestamp::new(1), Some(&[0, 0, 0, 1]), Some(&[0; 5]), []).expect("fits");
        assert!(decode_marker(&short.build()).is_err());
    }
}
