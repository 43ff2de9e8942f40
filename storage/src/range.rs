//! Ranges of entries: what another replica asks for, and what is sent to one that is far behind.
//!
//! An index is exactly one stored batch, and its bytes are the same on every replica; so a range travels as it lies in the
//! file. Who gives it checks it first, so that rot does not spread; who takes it checks it again.

use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::batch::{split_batches, verify_crc};
use flowstone_protocol::control::{CONTROL_FORMAT_VERSION, decode_control, encode_control};
use flowstone_protocol::{BatchHeader, LeaderEpoch, Offset, RaftIndex, Timestamp};

use crate::checkpoint::EpochStart;
use crate::error::{ReadError, StorageError};
use crate::log::{Appended, EntryBody, Log, LogEntry};
use crate::lookup::Which;
use crate::read::Source;
use crate::slots::{ActiveSlots, SealedFiles, Slots, View, WaitingSlots};
use crate::walk::is_own_control;

/// Whole stored batches, one per entry, CRCs checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// The entry of the first batch.
    pub first: RaftIndex,
    /// The batches, stamped, back to back; at least one.
    pub bytes: Bytes,
    /// The entry behind the last batch: where to go on.
    pub next: RaftIndex,
}

/// A range to read on a pool. It stays valid whatever becomes of the log: what was deleted meanwhile is an error, and so
/// is what was cut, with or without other entries in its place.
#[derive(Debug)]
pub struct RangeTicket {
    place: RangePlace,
    first: RaftIndex,
    /// From the one of `first` on.
    epochs: Box<[EpochStart]>,
}

#[derive(Debug)]
enum RangePlace {
    /// Its index is asked by whoever may wait for it.
    Sealed { files: Arc<SealedFiles>, view: View, numbers: std::ops::Range<usize>, bytes_max: usize },
    /// Known when the ticket was made: the active segment may go on meanwhile.
    Active { source: Source, extent: RangeExtent },
}

/// Where a range's batches lie in their segment.
#[derive(Clone, Copy, Debug)]
struct RangeExtent {
    position: u64,
    bytes: usize,
    batches: usize,
    first_offset: Offset,
}

impl RangeExtent {
    /// The batches of `numbers` that fit in `bytes_max`, at least one.
    fn find(
        slots: &mut dyn Slots,
        view: &View,
        numbers: &std::ops::Range<usize>,
        bytes_max: usize,
    ) -> Result<Self, StorageError> {
        let first = slots.slot(numbers.start)?;
        let position = u64::from(first.position);
        let limit = position.saturating_add(bytes_max as u64);
        let end = View::search(slots, numbers.start + 1, numbers.end, |slot| slot.end_position() <= limit)?;
        let bytes = (slots.slot(end - 1)?.end_position() - position) as usize;
        let first_offset = first.base_offset(view.base_offset);
        Ok(Self { position, bytes, batches: end - numbers.start, first_offset })
    }
}

impl Log {
    /// A ticket for the stored batches of entries `first` to `last`, both inclusive: as many as fit in `max_bytes` and lie
    /// in one segment, at least one; [`Range::next`] says where to go on. Costs no look at the disk.
    ///
    /// Entries above [`Self::committed_index`] may be asked for by whoever may send them; another replica may be given
    /// only what is committed. Fails with [`StorageError::NoEntry`] where `first` is not held (any more) or `last` not
    /// written yet.
    pub fn range(&self, first: RaftIndex, last: RaftIndex, max_bytes: usize) -> Result<RangeTicket, StorageError> {
        if last < first || last > self.last_index() {
            return Err(StorageError::NoEntry { index: last, first: self.first_index(), last: self.last_index() });
        }
        let (which, number) = self.segment_of_index(first)?;
        let view = self.view(which);
        let after_last = number + (last.get() - first.get()) as usize + 1;
        let numbers = number..after_last.min(view.batches);
        let place = match which {
            Which::Sealed(at) => {
                let files = Arc::clone(&self.sealed[at].files);
                RangePlace::Sealed { files, view, numbers, bytes_max: max_bytes }
            }
            Which::Active => {
                let extent = RangeExtent::find(&mut ActiveSlots(&self.active.slots), &view, &numbers, max_bytes)?;
                RangePlace::Active { source: self.source_of(which), extent }
            }
        };
        let kept_from = self.epochs.partition_point(|start| start.index <= first).saturating_sub(1);
        let epochs = self.epochs[kept_from..].iter().copied().take_while(|start| start.index <= last).collect();
        Ok(RangeTicket { place, first, epochs })
    }

    /// Appends batches that another replica stored as the entries behind the last one here: as
    /// [`Self::append_stamped`] does, for bytes as they come from [`RangeTicket::run`].
    ///
    /// Fails with [`StorageError::Refused`], and writes nothing, where they are not those: another offset, a wrong CRC, a
    /// piece of a batch.
    pub fn append_pulled(&mut self, batches: Bytes, now: Timestamp) -> Result<Vec<Appended>, StorageError> {
        let first = self.last_index().next();
        let offset = BatchHeader::parse(&batches)
            .map_err(|error| StorageError::Refused { index: first, detail: error.to_string() })?
            .base_offset;
        if offset != self.end_offset {
            let detail = format!("it was stored at offset {offset}, here it would be {}", self.end_offset);
            return Err(StorageError::Refused { index: first, detail });
        }
        let entries = LogEntry::decode_range(batches, first)?;
        self.append_stamped(&entries, now)
    }
}

impl RangeTicket {
    /// Reads, waiting for the disk, and checks all of it.
    pub fn run(self) -> Result<Range, ReadError> {
        let Self { place, first, epochs } = self;
        let (source, extent) = match place {
            RangePlace::Active { source, extent } => (source, extent),
            RangePlace::Sealed { files, view, numbers, bytes_max } => {
                let extent = RangeExtent::find(&mut WaitingSlots::of(&files), &view, &numbers, bytes_max)?;
                (Source::Sealed(files), extent)
            }
        };
        let mut buffer = vec![0; extent.bytes];
        source.read(&*source.file()?, &mut buffer, extent.position, extent.first_offset)?;
        let range = Range { first, bytes: Bytes::from(buffer), next: first.plus(extent.batches as u64) };
        range
            .check(&epochs, extent.first_offset)
            .map_err(|(at, offset, detail)| source.corrupt(extent.position + at as u64, offset, detail))?;
        Ok(range)
    }

    /// The same as entries, for a leader's appends.
    pub fn run_entries(self) -> Result<Vec<LogEntry>, ReadError> {
        let range = self.run()?;
        // Checked a moment ago: what cannot be an entry now was written by something newer, or is a defect.
        let entries = entries_of(range.bytes, range.first, false);
        entries.map_err(|error| ReadError::from(StorageError::from(error)))
    }
}

impl Range {
    /// Whether every batch is whole, and the one that belongs there; else position, offset and what is wrong.
    fn check(&self, epochs: &[EpochStart], first_offset: Offset) -> Result<(), (usize, Offset, String)> {
        let (mut at, mut offset, mut index) = (0, first_offset, self.first);
        while at < self.bytes.len() {
            let batch = &self.bytes[at..];
            let checked = BatchHeader::parse(batch).and_then(|header| verify_crc(batch).map(|()| header));
            let header = checked.map_err(|error| (at, offset, error.to_string()))?;
            let epoch = epochs.iter().rev().find(|start| start.index <= index).map(|start| start.epoch);
            if header.base_offset != offset || epoch.is_some_and(|epoch| epoch != header.leader_epoch) {
                let detail = format!("a batch with base offset {}, epoch {}", header.base_offset, header.leader_epoch);
                return Err((at, offset, detail));
            }
            at += header.total_bytes();
            offset = header.next_offset();
            index = index.next();
        }
        if index == self.next { Ok(()) } else { Err((at, offset, "batches are missing".to_owned())) }
    }
}

/// A batch that cannot be the entry that it is given as.
#[derive(Debug)]
struct NotAnEntry {
    index: RaftIndex,
    detail: String,
}

impl From<NotAnEntry> for StorageError {
    fn from(NotAnEntry { index, detail }: NotAnEntry) -> Self {
        Self::Refused { index, detail }
    }
}

impl LogEntry {
    /// The entries of stored batches, of which the first is entry `first`; every CRC is checked, and that offsets and
    /// epochs go on from one batch to the next. The entries' data are slices of `batches`.
    ///
    /// Fails with [`StorageError::Refused`].
    pub fn decode_range(batches: Bytes, first: RaftIndex) -> Result<Vec<Self>, StorageError> {
        Ok(entries_of(batches, first, true)?)
    }
}

fn entries_of(batches: Bytes, first: RaftIndex, check_crc: bool) -> Result<Vec<LogEntry>, NotAnEntry> {
    let mut entries = Vec::new();
    let mut index = first;
    let mut behind: Option<(Offset, LeaderEpoch)> = None;
    for split in split_batches(batches) {
        let refused = |detail: String| NotAnEntry { index, detail };
        let (header, batch) = split.map_err(|error| refused(error.to_string()))?;
        if check_crc {
            verify_crc(&batch).map_err(|error| refused(error.to_string()))?;
        }
        if let Some((offset, epoch)) = behind
            && (header.base_offset != offset || header.leader_epoch < epoch)
        {
            return Err(refused(format!(
                "offset {} and epoch {} behind {offset} and {epoch}",
                header.base_offset, header.leader_epoch
            )));
        }
        behind = Some((header.next_offset(), header.leader_epoch));
        let Some(term) = header.leader_epoch.term() else {
            return Err(refused("its epoch is negative".to_owned()));
        };
        let body = if is_own_control(header.attributes) {
            let record = decode_control(&batch).map_err(|error| refused(error.to_string()))?;
            // It will be encoded anew from type and payload: that must give these bytes, entry and offset included.
            let (ctype, version) = (record.ctype, CONTROL_FORMAT_VERSION);
            if encode_control(ctype, term, index, header.base_offset, &record.payload, version) != batch {
                return Err(refused(format!("a control batch of entry {}, or of another form", record.index)));
            }
            EntryBody::Control { ctype, payload: record.payload }
        } else {
            EntryBody::Batch(batch)
        };
        entries.push(LogEntry { index, term, body });
        index = index.next();
    }
    Ok(entries)
}
