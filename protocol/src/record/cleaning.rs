//! What compaction makes of a stored batch: records go, offsets stay.
//!
//! A cleaned batch keeps its base offset, its last offset delta, its epoch and its producer's fields; its records are
//! those that stay, with their own offset deltas and timestamps, in the codec that the batch had. Where tombstones stay,
//! the base timestamp becomes the time from which on they may go (Kafka's KIP-534: attribute bit 6), and the records'
//! timestamp deltas are made anew, so that every reader finds the timestamps that were there.

use bytes::Bytes;

use super::{RecordView, Slice, Source, SourceError, records, seal, varint, varlong};
use crate::batch::{Attributes, BatchError, BatchHeader, HEADER_BYTES, LOG_OVERHEAD, MAGIC, TimestampType};
use crate::compression::Compression;
use crate::ids::{LeaderEpoch, Offset, ProducerEpoch, ProducerId, Sequence, Timestamp};
use crate::varint::{varint_bytes, write_varint};

/// What is left of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cleaned {
    /// All of it, and nothing about it has changed.
    Same,
    /// This.
    Changed(Bytes),
    /// No record.
    Nothing,
}

/// Which horizon a batch is to carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Horizon {
    /// This one, unless it has one, if a tombstone stays; else none.
    OfTombstones(Timestamp),
    /// This one, unless it has one: of a transaction marker that may go then.
    Always(Timestamp),
    /// As it is.
    Untouched,
}

/// Lets go of the records of one whole stored batch for which `keep` is false; see the module's documentation.
///
/// Fails where the batch is not one, or decompresses to more than `max_decompressed` bytes. CRCs are not checked.
pub fn clean(
    batch: &Bytes,
    max_decompressed: usize,
    horizon: Horizon,
    mut keep: impl FnMut(&RecordView<'_>) -> bool,
) -> Result<Cleaned, BatchError> {
    let mut iter = records(batch.clone(), max_decompressed)?;
    let header = *iter.header();
    let compression = header.attributes.compression()?;
    let mut kept: Vec<(usize, usize)> = Vec::new();
    let (mut count, mut max_timestamp, mut has_tombstones) = (0, i64::MIN, false);
    loop {
        let start = iter.at;
        let (timestamp, is_tombstone, stays) = match iter.next_view() {
            None => break,
            Some(view) => {
                let view = view?;
                (view.timestamp.get(), view.value.is_none(), keep(&view))
            }
        };
        if stays {
            count += 1;
            max_timestamp = max_timestamp.max(timestamp);
            has_tombstones |= is_tombstone;
            kept.push((start, iter.at));
        }
    }
    if count == 0 {
        return Ok(Cleaned::Nothing);
    }
    let has_horizon = header.attributes.has_delete_horizon();
    let (carries, base) = match horizon {
        Horizon::Untouched => (has_horizon, header.base_timestamp),
        Horizon::OfTombstones(_) if !has_tombstones => (false, header.base_timestamp),
        Horizon::OfTombstones(_) | Horizon::Always(_) if has_horizon => (true, header.base_timestamp),
        Horizon::OfTombstones(at) | Horizon::Always(at) => (true, at),
    };
    if count == header.record_count && carries == has_horizon {
        return Ok(Cleaned::Same);
    }
    let bytes = iter.record_bytes();
    let mut plain = Vec::with_capacity(HEADER_BYTES + bytes.len());
    plain.resize(HEADER_BYTES, 0);
    for (start, end) in kept {
        if base == header.base_timestamp {
            plain.extend_from_slice(&bytes[start..end]);
        } else {
            let shift = header.base_timestamp.get().wrapping_sub(base.get());
            shifted(&bytes[start..end], shift, &mut plain).map_err(|error| error.of_record(count))?;
        }
    }
    let mut attributes = header.attributes.bits() & !(Attributes::COMPRESSION | Attributes::DELETE_HORIZON);
    if carries {
        attributes |= Attributes::DELETE_HORIZON;
    }
    let mut stored = plain;
    if compression != Compression::None {
        let mut compressed = Vec::with_capacity(HEADER_BYTES + stored.len() / 2);
        compressed.resize(HEADER_BYTES, 0);
        let done = compression.compress(None, &stored[HEADER_BYTES..], &mut compressed);
        if done.is_ok() && compressed.len() < stored.len() {
            stored = compressed;
            attributes |= i16::from(compression.id());
        }
    }
    // The leader's time is that of all records, whichever stay.
    let max_timestamp = match header.attributes.timestamp_type() {
        TimestampType::CreateTime => Timestamp::new(max_timestamp),
        TimestampType::LogAppendTime => header.max_timestamp,
    };
    let header = BatchHeader {
        batch_length: (stored.len() - LOG_OVERHEAD) as i32,
        crc: 0,
        attributes: Attributes::new(attributes),
        base_timestamp: base,
        max_timestamp,
        record_count: count,
        ..header
    };
    Ok(Cleaned::Changed(seal(stored, &header)))
}

/// Copies a record, its timestamp delta `shift` later.
fn shifted(record: &[u8], shift: i64, into: &mut Vec<u8>) -> Result<(), SourceError> {
    let mut source = Slice { bytes: record, at: 0 };
    varint(&mut source)?;
    let attributes = source.byte()?;
    let delta = varlong(&mut source)?.wrapping_add(shift);
    let rest = &record[source.position()..];
    let length = (1 + varint_bytes(delta) + rest.len()) as i64;
    let mut lead = [0; 21];
    let mut at = write_varint(&mut lead, 0, length);
    lead[at] = attributes;
    at = write_varint(&mut lead, at + 1, delta);
    into.extend_from_slice(&lead[..at]);
    into.extend_from_slice(rest);
    Ok(())
}

/// A batch without records that stands for the offsets from `base_offset` up to and without `next_offset`, of which
/// compaction has left nothing.
///
/// # Panics
/// If there are no offsets between the two, or more than a batch can take.
pub fn empty_batch(base_offset: Offset, next_offset: Offset, epoch: LeaderEpoch) -> Bytes {
    let offsets = next_offset.get() - base_offset.get();
    assert!(offsets > 0, "a batch from {base_offset} to {next_offset}");
    let header = BatchHeader {
        base_offset,
        batch_length: (HEADER_BYTES - LOG_OVERHEAD) as i32,
        leader_epoch: epoch,
        magic: MAGIC,
        crc: 0,
        attributes: Attributes::default(),
        last_offset_delta: i32::try_from(offsets - 1).expect("a batch takes 2^31 offsets at most"),
        base_timestamp: Timestamp::NONE,
        max_timestamp: Timestamp::NONE,
        producer_id: ProducerId::NONE,
        producer_epoch: ProducerEpoch::NONE,
        base_sequence: Sequence::NONE,
        record_count: 0,
    };
    seal(vec![0; HEADER_BYTES], &header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::verify_crc;
    use crate::record::{Record, RecordBatchBuilder};

    const MAX: usize = 1 << 20;

    fn batch(compression: Compression) -> Bytes {
        let mut builder = RecordBatchBuilder::new(compression);
        for number in 0..20_u8 {
            let value = [number; 50];
            let value = (number % 5 != 0).then_some(&value[..]);
            let time = Timestamp::new(1_000 + i64::from(number) * 7);
            builder.append(time, Some(&[number]), value, [(&b"h"[..], None)]).expect("small");
        }
        builder.build()
    }

    fn all(batch: &Bytes) -> Vec<Record> {
        records(batch.clone(), MAX).expect("a batch").collect::<Result<_, _>>().expect("records")
    }

    #[test]
    fn what_stays_is_what_it_was() {
        for compression in Compression::ALL {
            let whole = batch(compression);
            for horizon in [Timestamp::new(1), Timestamp::new(5_000_000_000_000)] {
                let keep = |view: &RecordView<'_>| view.offset.get() % 3 != 1;
                let Ok(Cleaned::Changed(cleaned)) = clean(&whole, MAX, Horizon::OfTombstones(horizon), keep) else {
                    panic!("some records go");
                };
                verify_crc(&cleaned).expect("a right CRC");
                let (before, after) = (BatchHeader::parse(&whole).expect("whole"), BatchHeader::parse(&cleaned));
                let after = after.expect("a batch");
                let expected: Vec<_> = all(&whole).into_iter().filter(|record| record.offset.get() % 3 != 1).collect();
                assert_eq!(all(&cleaned), expected, "{compression:?}");
                assert_eq!((after.base_offset, after.last_offset()), (before.base_offset, before.last_offset()));
                assert!(after.attributes.has_delete_horizon());
                assert_eq!(after.base_timestamp, horizon);
                // Once set it stays, and comes to no other value.
                let later = Horizon::OfTombstones(Timestamp::new(9_000_000_000_000));
                assert_eq!(clean(&cleaned, MAX, later, |_| true), Ok(Cleaned::Same));
                // It goes with the last tombstone.
                let Ok(Cleaned::Changed(bare)) = clean(&cleaned, MAX, later, |view| view.value.is_some()) else {
                    panic!("tombstones go");
                };
                assert!(!BatchHeader::parse(&bare).expect("a batch").attributes.has_delete_horizon());
                let expected: Vec<_> = expected.into_iter().filter(|record| record.value.is_some()).collect();
                assert_eq!(all(&bare), expected);
                assert_eq!(
                    BatchHeader::parse(&bare).expect("a batch").max_timestamp,
                    expected.iter().map(|record| record.timestamp).max().expect("some")
                );
            }
            assert_eq!(clean(&whole, MAX, Horizon::Untouched, |_| true), Ok(Cleaned::Same));
            assert_eq!(clean(&whole, MAX, Horizon::Untouched, |_| false), Ok(Cleaned::Nothing));
        }
    }

    #[test]
    fn an_empty_batch_takes_its_offsets() {
        let empty = empty_batch(Offset::new(7), Offset::new(1_000), LeaderEpoch::new(3));
        verify_crc(&empty).expect("a right CRC");
        let header = BatchHeader::parse(&empty).expect("a header");
        assert_eq!((header.base_offset.get(), header.next_offset().get(), header.data_records()), (7, 1_000, 0));
        assert_eq!(all(&empty), []);
    }
}
