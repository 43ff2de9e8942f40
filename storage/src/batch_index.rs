//! The dense index of a segment: one slot per batch, so that slot number = Raft index - the segment's first.
//!
//! The active segment's slots are in memory; blocks of them are written to `.index` as they fill, without a flush:
//! nothing depends on the file but the time that opening takes. A block that is missing or wrong is rebuilt from the
//! log.
//!
//! ```text
//! file:  | block 0, 4096 bytes | block 1 | ...            all integers little-endian
//! block: | magic "FIX1" | block number: u32 | first index: u64 | base offset: i64 | slots: u32 | crc: u32 | 127 slots, 32 bytes each |
//!         0              4                   8                  16                 24           28         32                     4096
//! slot:  | relative offset: u32 | position: u32 | max timestamp: i64 | records: u32 | batch bytes: u32 | epoch: i32 | control: i16 | 0: u16 |
//!         0                      4               8                    16             20                 24           28             30
//! ```
//! The checksum is a CRC-32 (IEEE) of bytes 0 to 28 and of the slots in use.

use flowstone_protocol::{BatchHeader, LeaderEpoch, Offset, Timestamp};

use crate::segment::SegmentName;

/// Bytes of a slot, in memory and in the file.
pub const SLOT_BYTES: usize = 32;
/// Bytes of a block of the file: a page, so that one is read and written as a whole.
pub const BLOCK_BYTES: usize = 4096;
const BLOCK_HEAD_BYTES: usize = 32;
/// Slots of a block.
pub const BLOCK_SLOTS: usize = (BLOCK_BYTES - BLOCK_HEAD_BYTES) / SLOT_BYTES;
const _: () = assert!(BLOCK_HEAD_BYTES + BLOCK_SLOTS * SLOT_BYTES == BLOCK_BYTES);
const _: () = assert!(size_of::<Slot>() == SLOT_BYTES);

const BLOCK_MAGIC: [u8; 4] = *b"FIX1";
const CRC_AT: usize = 28;
/// In the control field of a batch that is none of the log's own control batches.
const NOT_CONTROL: i16 = -1;

/// What is known of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Base offset less the segment's.
    pub relative_offset: u32,
    /// Byte position of the batch in the segment.
    pub position: u32,
    /// Latest timestamp of all data batches of the segment up to and with this one; -1 if there is none.
    pub max_timestamp: Timestamp,
    /// Data records of the segment up to and with this batch.
    pub records: u32,
    /// Bytes of the batch.
    pub batch_bytes: u32,
    /// Its leader epoch.
    pub epoch: LeaderEpoch,
    /// Type of a control batch of the log's own; -1 otherwise.
    control: i16,
    zero: u16,
}

impl Slot {
    /// The slot of a stamped batch at `position`, behind `previous` in the segment that begins at `segment_base`.
    /// `control` is the type of a control batch of the log's own.
    pub(crate) fn of(
        header: &BatchHeader,
        control: Option<i16>,
        position: u32,
        segment_base: Offset,
        previous: Option<&Self>,
    ) -> Self {
        let (max_timestamp, records) = previous.map_or((Timestamp::NONE, 0), |slot| (slot.max_timestamp, slot.records));
        let is_data = !header.attributes.is_control();
        Self {
            relative_offset: (header.base_offset.get() - segment_base.get()) as u32,
            position,
            max_timestamp: if is_data { max_timestamp.max(header.max_timestamp) } else { max_timestamp },
            records: records.wrapping_add(header.data_records() as u32),
            batch_bytes: header.total_bytes() as u32,
            epoch: header.leader_epoch,
            control: control.unwrap_or(NOT_CONTROL),
            zero: 0,
        }
    }

    /// Type of a control batch of the log's own.
    pub fn control(&self) -> Option<i16> {
        (self.control != NOT_CONTROL).then_some(self.control)
    }

    /// One past the batch's last byte.
    pub fn end_position(&self) -> u64 {
        u64::from(self.position) + u64::from(self.batch_bytes)
    }

    /// The batch's first offset, in the segment that begins at `segment_base`.
    pub fn base_offset(&self, segment_base: Offset) -> Offset {
        segment_base.plus(i64::from(self.relative_offset))
    }

    fn write(&self, into: &mut [u8; SLOT_BYTES]) {
        into[0..4].copy_from_slice(&self.relative_offset.to_le_bytes());
        into[4..8].copy_from_slice(&self.position.to_le_bytes());
        into[8..16].copy_from_slice(&self.max_timestamp.get().to_le_bytes());
        into[16..20].copy_from_slice(&self.records.to_le_bytes());
        into[20..24].copy_from_slice(&self.batch_bytes.to_le_bytes());
        into[24..28].copy_from_slice(&self.epoch.get().to_le_bytes());
        into[28..30].copy_from_slice(&self.control.to_le_bytes());
        into[30..32].copy_from_slice(&self.zero.to_le_bytes());
    }

    fn read(from: &[u8; SLOT_BYTES]) -> Self {
        Self {
            relative_offset: u32::from_le_bytes(field(from, 0)),
            position: u32::from_le_bytes(field(from, 4)),
            max_timestamp: Timestamp::new(i64::from_le_bytes(field(from, 8))),
            records: u32::from_le_bytes(field(from, 16)),
            batch_bytes: u32::from_le_bytes(field(from, 20)),
            epoch: LeaderEpoch::new(i32::from_le_bytes(field(from, 24))),
            control: i16::from_le_bytes(field(from, 28)),
            zero: u16::from_le_bytes(field(from, 30)),
        }
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// How many blocks hold `slots` slots.
pub(crate) fn blocks_of(slots: usize) -> usize {
    slots.div_ceil(BLOCK_SLOTS)
}

/// Block `number` of a segment's index; `slots` are its slots, 1 to [`BLOCK_SLOTS`] of them.
pub(crate) fn encode_block(segment: SegmentName, number: u32, slots: &[Slot]) -> [u8; BLOCK_BYTES] {
    assert!(!slots.is_empty() && slots.len() <= BLOCK_SLOTS, "{} slots in an index block", slots.len());
    let mut block = [0; BLOCK_BYTES];
    block[0..4].copy_from_slice(&BLOCK_MAGIC);
    block[4..8].copy_from_slice(&number.to_le_bytes());
    block[8..16].copy_from_slice(&segment.first_index.get().to_le_bytes());
    block[16..24].copy_from_slice(&segment.base_offset.get().to_le_bytes());
    block[24..28].copy_from_slice(&(slots.len() as u32).to_le_bytes());
    let (places, _) = block[BLOCK_HEAD_BYTES..].as_chunks_mut::<SLOT_BYTES>();
    for (slot, place) in slots.iter().zip(places) {
        slot.write(place);
    }
    let crc = checksum(&block, slots.len());
    block[CRC_AT..BLOCK_HEAD_BYTES].copy_from_slice(&crc.to_le_bytes());
    block
}

/// The slots of block `number`; `None` where it is not that block, whole and unchanged.
pub(crate) fn decode_block(segment: SegmentName, number: u32, block: &[u8]) -> Option<Vec<Slot>> {
    let block: &[u8; BLOCK_BYTES] = block.try_into().ok()?;
    let slots = u32::from_le_bytes(field(block, 24)) as usize;
    let is_it = block[0..4] == BLOCK_MAGIC
        && u32::from_le_bytes(field(block, 4)) == number
        && u64::from_le_bytes(field(block, 8)) == segment.first_index.get()
        && i64::from_le_bytes(field(block, 16)) == segment.base_offset.get()
        && (1..=BLOCK_SLOTS).contains(&slots)
        && u32::from_le_bytes(field(block, CRC_AT)) == checksum(block, slots);
    if !is_it {
        return None;
    }
    let (places, _) = block[BLOCK_HEAD_BYTES..].as_chunks::<SLOT_BYTES>();
    Some(places[..slots].iter().map(Slot::read).collect())
}

fn checksum(block: &[u8; BLOCK_BYTES], slots: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&block[..CRC_AT]);
    hasher.update(&block[BLOCK_HEAD_BYTES..BLOCK_HEAD_BYTES + slots * SLOT_BYTES]);
    hasher.finalize()
}

/// The slots of all leading blocks of an index file that are whole and follow each other; none where the file is not
/// this segment's.
pub(crate) fn valid_prefix(segment: SegmentName, file: &[u8]) -> Vec<Slot> {
    let mut slots: Vec<Slot> = Vec::with_capacity(file.len() / SLOT_BYTES);
    for (number, block) in file.chunks(BLOCK_BYTES).enumerate() {
        let Some(read) = decode_block(segment, number as u32, block) else { break };
        // A checksum says that the bytes are those written, not that they follow the block before.
        let follows = match (slots.last(), read.first()) {
            (Some(last), Some(first)) => {
                u64::from(first.position) == last.end_position() && first.relative_offset > last.relative_offset
            }
            (None, Some(first)) => first.position == 0 && first.relative_offset == 0,
            (_, None) => false,
        };
        if !follows {
            break;
        }
        let full = read.len() == BLOCK_SLOTS;
        slots.extend(read);
        if !full {
            break;
        }
    }
    slots
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::RaftIndex;

    use super::*;

    const SEGMENT: SegmentName = SegmentName::of_raft(Offset::new(1000), RaftIndex::new(7));

    fn slots(count: usize) -> Vec<Slot> {
        (0..count as u32)
            .map(|number| Slot {
                relative_offset: number * 3,
                position: number * 100,
                max_timestamp: Timestamp::new(i64::from(number)),
                records: number * 3,
                batch_bytes: 100,
                epoch: LeaderEpoch::new(2),
                control: if number == 0 { 100 } else { NOT_CONTROL },
                zero: 0,
            })
            .collect()
    }

    fn file(slots: &[Slot]) -> Vec<u8> {
        slots
            .chunks(BLOCK_SLOTS)
            .enumerate()
            .flat_map(|(number, slots)| encode_block(SEGMENT, number as u32, slots))
            .collect()
    }

    #[test]
    fn blocks_are_read_back() {
        for count in [1, 2, 126, 127, 128, 254, 300] {
            assert_eq!(valid_prefix(SEGMENT, &file(&slots(count))), slots(count), "{count} slots");
        }
    }

    #[test]
    fn every_flipped_bit_ends_the_prefix_before_its_block() {
        let whole = slots(300);
        let bytes = file(&whole);
        for bit in (0..bytes.len() * 8).step_by(37) {
            let at = bit / 8;
            let number = at / BLOCK_BYTES;
            let in_use = BLOCK_HEAD_BYTES + whole[number * BLOCK_SLOTS..].len().min(BLOCK_SLOTS) * SLOT_BYTES;
            if at % BLOCK_BYTES >= in_use {
                continue;
            }
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (bit % 8);
            assert_eq!(valid_prefix(SEGMENT, &flipped), whole[..number * BLOCK_SLOTS], "bit {bit}");
        }
    }

    #[test]
    fn another_segments_blocks_are_refused() {
        let other = SegmentName { first_index: RaftIndex::new(8), ..SEGMENT };
        assert_eq!(valid_prefix(other, &file(&slots(10))), []);
        let other = SegmentName { base_offset: Offset::new(999), ..SEGMENT };
        assert_eq!(valid_prefix(other, &file(&slots(10))), []);
        // Blocks in the wrong place.
        let bytes = file(&slots(300));
        assert_eq!(valid_prefix(SEGMENT, &bytes[BLOCK_BYTES..]), []);
    }

    #[test]
    fn a_torn_block_is_refused() {
        let bytes = file(&slots(300));
        for len in [0, 1, 31, 32, 4095] {
            assert_eq!(valid_prefix(SEGMENT, &bytes[..len]), []);
        }
        assert_eq!(valid_prefix(SEGMENT, &bytes[..2 * BLOCK_BYTES + 512]), slots(300)[..2 * BLOCK_SLOTS]);
    }
}
