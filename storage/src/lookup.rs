//! Reading a log: by offset, by index, by timestamp, by count of records.
//!
//! The active segment's index is in memory; blocks of sealed ones are read when needed (4 KiB each) and the last few
//! kept. The newest two segments' bytes are handed out from a map, older ones are read.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::batch::{stamped_prefix, verify_crc};
use flowstone_protocol::control::{CONTROL_FORMAT_VERSION, decode_control, encode_control};
use flowstone_protocol::record::records;
use flowstone_protocol::{BatchHeader, ControlType, HEADER_BYTES, LeaderEpoch, Offset, RaftIndex, Timestamp};

use crate::batch_index::{BLOCK_BYTES, BLOCK_SLOTS, Slot, blocks_of, decode_block};
use crate::disk::{DiskFile, OpenMode};
use crate::error::{ReadError, StorageError};
use crate::log::{EntryBody, EntryMeta, Log, LogEntry, write_blocks};
use crate::read::{FoundRecord, Lookup, LookupTicket, Place, Read, ReadBytes, ReadTicket};
use crate::segment::{SegmentMap, SegmentName};
use crate::walk::{Step, Walker, is_own_control};

/// Blocks of sealed indexes kept in memory per log (4 KiB each); a binary search through one needs a dozen.
const INDEX_BLOCKS_KEPT: usize = 16;
/// Most that one batch may decompress to when a timestamp is looked up in it.
const DECOMPRESSED_BYTES_MAX: usize = 256 << 20;

/// A segment of a log: the `n`th sealed one, or the active one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Sealed(usize),
    Active,
}

impl Log {
    /// Reads committed batches from the one that holds `from` on: whole batches, as many as fit in `max_bytes`, and
    /// always at least one; none at the high watermark. All of one segment, so a read may end before `max_bytes`.
    ///
    /// Fails with [`ReadError::OutOfRange`] below the log start or above the high watermark. CRCs are not checked here:
    /// [`ReadBytes::verify`] does.
    pub fn read(&mut self, from: Offset, max_bytes: usize) -> Result<Read, ReadError> {
        if from < self.log_start || from > self.high_watermark {
            return Err(ReadError::OutOfRange {
                offset: from,
                log_start: self.log_start,
                high_watermark: self.high_watermark,
            });
        }
        let which = self.segment_of_offset(from);
        let name = self.name_of(which);
        if from == self.high_watermark {
            let place = Place { segment: name, position: 0 };
            return Ok(Read::Bytes(ReadBytes::new(Vec::new(), from, from, place)));
        }
        let readable = self.committed_batches(which);
        let (first, first_slot) = self.slot_of_offset(which, from).map_err(into_read_error)?;
        let start = u64::from(first_slot.position);
        let limit = start + max_bytes as u64;
        let end = match which {
            // The usual read, at the tail, takes all there is: one look instead of a search.
            Which::Active if self.active.slots[readable - 1].end_position() <= limit => readable,
            _ => {
                self.search(which, first + 1, readable, |slot| slot.end_position() <= limit).map_err(into_read_error)?
            }
        };
        let last_slot = self.slot(which, end - 1).map_err(into_read_error)?;
        let next = if end < self.batches(which) {
            self.slot(which, end).map_err(into_read_error)?.base_offset(name.base_offset)
        } else {
            self.end_offset_of_segment(which)
        };
        let place = Place { segment: name, position: start };
        let bytes = (last_slot.end_position() - start) as usize;
        self.give(which, place, bytes, first_slot.base_offset(name.base_offset), next)
    }

    fn give(
        &mut self,
        which: Which,
        place: Place,
        bytes: usize,
        first: Offset,
        next: Offset,
    ) -> Result<Read, ReadError> {
        let is_mapped = match which {
            Which::Active => true,
            Which::Sealed(number) => number + 1 == self.sealed.len(),
        };
        if is_mapped && let Some(map) = self.map_of(which, place.position + bytes as u64) {
            let from = place.position as usize;
            return Ok(Read::Bytes(ReadBytes::new(vec![map.slice(from..from + bytes)], first, next, place)));
        }
        let path = self.path_of(which);
        let file = self.file_of(which).map_err(into_read_error)?;
        let ticket = ReadTicket { file, path, place, bytes, first, next };
        // What is mapped but could not be is in memory as likely as not.
        ticket.run_nowait()
    }

    /// A map of the segment that holds at least its first `needed` bytes; `None` where the system refuses one.
    fn map_of(&mut self, which: Which, needed: u64) -> Option<Bytes> {
        let (map, written, len) = match which {
            Which::Active => (&self.active.map, self.active.end, self.active.zeroed_to),
            Which::Sealed(number) => {
                let segment = &self.sealed[number];
                (&segment.map, segment.bytes, segment.bytes)
            }
        };
        if let Some(map) = map
            && map.current_to >= needed
        {
            return Some(map.bytes.clone());
        }
        let file = self.file_of(which).ok()?;
        let bytes = match file.map(len) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::debug!(path = %self.path_of(which).display(), %error, "cannot map a segment, reading it instead");
                return None;
            }
        };
        let current_to = if file.map_is_live() { len } else { written };
        let map = Some(SegmentMap { bytes: bytes.clone(), current_to });
        match which {
            Which::Active => self.active.map = map,
            Which::Sealed(number) => self.sealed[number].map = map,
        }
        Some(bytes)
    }

    // ---- entries ----

    /// An entry with its data: from memory while it is not committed, else from the file, its CRC checked.
    pub fn entry(&mut self, index: RaftIndex) -> Result<LogEntry, StorageError> {
        if let Some(entry) = self.in_tail(index) {
            return Ok(LogEntry { index, term: entry.term, body: entry.body.clone() });
        }
        let batch = self.stored_batch(index)?;
        let header = BatchHeader::parse(&batch).map_err(|error| self.corrupt_entry(index, error.to_string()))?;
        let Some(term) = header.leader_epoch.term() else {
            return Err(self.corrupt_entry(index, "its epoch is negative".to_owned()));
        };
        let body = if is_own_control(header.attributes) {
            let record = decode_control(&batch).map_err(|error| self.corrupt_entry(index, error.to_string()))?;
            EntryBody::Control { ctype: record.ctype, payload: record.payload }
        } else {
            EntryBody::Batch(batch)
        };
        Ok(LogEntry { index, term, body })
    }

    /// What the index knows of an entry: no byte of its batch is read.
    pub fn entry_meta(&mut self, index: RaftIndex) -> Result<EntryMeta, StorageError> {
        let (which, number) = self.segment_of_index(index)?;
        let slot = self.slot(which, number)?;
        let base = self.name_of(which).base_offset;
        let next = if number + 1 < self.batches(which) {
            self.slot(which, number + 1)?.base_offset(base)
        } else {
            self.end_offset_of_segment(which)
        };
        let base_offset = slot.base_offset(base);
        let Some(term) = slot.epoch.term() else {
            return Err(self.corrupt_entry(index, "its epoch is negative".to_owned()));
        };
        Ok(EntryMeta {
            index,
            term,
            base_offset,
            last_offset: next.plus(-1),
            batch_bytes: slot.batch_bytes,
            control: slot.control().and_then(ControlType::from_id),
        })
    }

    /// The header of an entry as it is stored.
    pub fn header(&mut self, index: RaftIndex) -> Result<BatchHeader, StorageError> {
        let meta = self.entry_meta(index)?;
        let parsed = match self.in_tail(index).map(|entry| &entry.body) {
            Some(EntryBody::Batch(batch)) => BatchHeader::parse(batch),
            Some(EntryBody::Control { ctype, payload }) => BatchHeader::parse(&encode_control(
                *ctype,
                meta.term,
                index,
                meta.base_offset,
                payload,
                CONTROL_FORMAT_VERSION,
            )),
            None => {
                let (which, number) = self.segment_of_index(index)?;
                let slot = self.slot(which, number)?;
                let mut head = [0; HEADER_BYTES];
                let file = self.file_of(which)?;
                let read = file.read_exact_at(&mut head, u64::from(slot.position));
                read.map_err(StorageError::io("read", &self.path_of(which)))?;
                BatchHeader::parse(&head)
            }
        };
        let mut header = parsed.map_err(|error| self.corrupt_entry(index, error.to_string()))?;
        header.base_offset = meta.base_offset;
        header.leader_epoch = LeaderEpoch::from_term(meta.term).unwrap_or(LeaderEpoch::NONE);
        Ok(header)
    }

    /// The batch of an entry as it is stored, stamped; its CRC is checked where it comes from the file.
    pub fn stored_batch(&mut self, index: RaftIndex) -> Result<Bytes, StorageError> {
        let (which, number) = self.segment_of_index(index)?;
        let slot = self.slot(which, number)?;
        let offset = slot.base_offset(self.name_of(which).base_offset);
        if let Some(entry) = self.in_tail(index) {
            return Ok(match &entry.body {
                EntryBody::Batch(batch) => {
                    let mut stamped = batch.to_vec();
                    stamped[..16].copy_from_slice(&stamped_prefix(batch, offset, slot.epoch));
                    Bytes::from(stamped)
                }
                EntryBody::Control { ctype, payload } => {
                    encode_control(*ctype, entry.term, index, offset, payload, CONTROL_FORMAT_VERSION)
                }
            });
        }
        let file = self.file_of(which)?;
        let mut batch = vec![0; slot.batch_bytes as usize];
        let read = file.read_exact_at(&mut batch, u64::from(slot.position));
        read.map_err(StorageError::io("read", &self.path_of(which)))?;
        let stamp = stamped_prefix(&batch, offset, slot.epoch);
        let checked = verify_crc(&batch).map_err(|error| error.to_string()).and_then(|()| {
            if batch[..16] == stamp { Ok(()) } else { Err("its offset or epoch is not that of the index".to_owned()) }
        });
        match checked {
            Ok(()) => Ok(Bytes::from(batch)),
            Err(detail) => Err(self.corrupt_entry(index, detail)),
        }
    }

    fn in_tail(&self, index: RaftIndex) -> Option<&crate::log::TailEntry> {
        self.tail.get(index.get().checked_sub(self.tail_first.get())? as usize)
    }

    fn corrupt_entry(&mut self, index: RaftIndex, detail: String) -> StorageError {
        match self.segment_of_index(index).and_then(|(which, number)| Ok((which, self.slot(which, number)?))) {
            Ok((which, slot)) => {
                let name = self.name_of(which);
                StorageError::Corrupt {
                    segment: name.log_file(),
                    position: u64::from(slot.position),
                    offset: slot.base_offset(name.base_offset),
                    detail,
                }
            }
            Err(error) => error,
        }
    }

    // ---- lookups ----

    /// The first committed record, from the log start on, whose timestamp is at least `timestamp`; with its own
    /// timestamp. Exact to the record: its batch is read and decompressed.
    pub fn offset_for_timestamp(&mut self, timestamp: Timestamp) -> Result<Option<(Offset, Timestamp)>, ReadError> {
        let mut at = self.log_start;
        while at < self.high_watermark {
            let Some((which, number)) = self.first_batch_reaching(timestamp, at).map_err(into_read_error)? else {
                return Ok(None);
            };
            let name = self.name_of(which);
            let index = name.first_index.plus(number as u64);
            let batch = self.stored_batch(index).map_err(into_read_error)?;
            let corrupt = |log: &mut Self, detail: String| into_read_error(log.corrupt_entry(index, detail));
            let header = BatchHeader::parse(&batch).map_err(|error| corrupt(self, error.to_string()))?;
            if !header.attributes.is_control() && header.max_timestamp >= timestamp {
                let found = records(batch, DECOMPRESSED_BYTES_MAX).map_err(|error| corrupt(self, error.to_string()))?;
                for record in found {
                    let record = record.map_err(|error| corrupt(self, error.to_string()))?;
                    if record.offset >= at && record.timestamp >= timestamp {
                        return Ok(Some((record.offset, record.timestamp)));
                    }
                }
            }
            // A batch before the log start had the segment's latest timestamp so far, or the record is before it.
            at = header.next_offset();
        }
        Ok(None)
    }

    /// Looks for the first committed record, from the log start on, whose timestamp is at least `timestamp`. Exact to
    /// the record; its batch is read and decompressed by the ticket.
    pub fn find_timestamp(&mut self, timestamp: Timestamp) -> Result<Lookup, ReadError> {
        let found = self.offset_for_timestamp(timestamp)?.map(|(offset, timestamp)| FoundRecord { offset, timestamp });
        Ok(Lookup::Ticket(LookupTicket { found }))
    }

    /// Looks for the `n`th data record before the high watermark; the log start where there are fewer. Its timestamp
    /// is not looked at.
    pub fn find_records_from_end(&mut self, n: u64) -> Result<Lookup, ReadError> {
        let offset = self.offset_records_from_end(n)?;
        Ok(Lookup::Found(Some(FoundRecord { offset, timestamp: Timestamp::NONE })))
    }

    /// The batch at or behind offset `at` where the segment's running maximum reaches `timestamp`: the earliest that
    /// can hold a record so late.
    fn first_batch_reaching(
        &mut self,
        timestamp: Timestamp,
        at: Offset,
    ) -> Result<Option<(Which, usize)>, StorageError> {
        let mut which = self.segment_of_offset(at);
        loop {
            let base = self.name_of(which).base_offset;
            if base >= self.high_watermark {
                return Ok(None);
            }
            let readable = self.committed_batches(which);
            let max_timestamp = match which {
                Which::Sealed(number) => self.sealed[number].max_timestamp,
                Which::Active => self.active.max_timestamp(),
            };
            if max_timestamp >= timestamp {
                let from = if base < at { self.slot_of_offset(which, at)?.0 } else { 0 };
                let found = self.search(which, from, readable, |slot| slot.max_timestamp < timestamp)?;
                if found < readable {
                    return Ok(Some((which, found)));
                }
            }
            which = match which {
                Which::Sealed(number) if number + 1 < self.sealed.len() => Which::Sealed(number + 1),
                Which::Sealed(_) => Which::Active,
                Which::Active => return Ok(None),
            };
        }
    }

    /// Data records (those that consumers see) from `from` up to and without `to`; both are taken to lie in the log.
    pub fn records_between(&mut self, from: Offset, to: Offset) -> Result<u64, ReadError> {
        let until = self.records_before(to)?;
        Ok(until.saturating_sub(self.records_before(from)?))
    }

    /// The offset of the `n`th data record before the high watermark; the log start where there are fewer.
    pub fn offset_records_from_end(&mut self, n: u64) -> Result<Offset, ReadError> {
        if n == 0 {
            return Ok(self.high_watermark);
        }
        let readable = self.records_between(self.log_start, self.high_watermark)?;
        if n >= readable {
            return Ok(self.log_start);
        }
        // The record wanted has this many before it, from the first segment on.
        let before = self.records_before(self.high_watermark)? - n;
        let mut in_earlier = 0;
        for number in 0..self.sealed.len() {
            let records = self.sealed[number].records;
            if before < in_earlier + records {
                return self.offset_of_record(Which::Sealed(number), before - in_earlier).map_err(into_read_error);
            }
            in_earlier += records;
        }
        self.offset_of_record(Which::Active, before - in_earlier).map_err(into_read_error)
    }

    /// The offset of the data record of a segment that has `before` others before it there.
    fn offset_of_record(&mut self, which: Which, before: u64) -> Result<Offset, StorageError> {
        let batches = self.batches(which);
        let number = self.search(which, 0, batches, |slot| u64::from(slot.records) <= before)?;
        let slot = self.slot(which, number)?;
        let in_earlier = match number.checked_sub(1) {
            Some(previous) => u64::from(self.slot(which, previous)?.records),
            None => 0,
        };
        Ok(slot.base_offset(self.name_of(which).base_offset).plus((before - in_earlier) as i64))
    }

    /// Data records of all segments before `offset`.
    fn records_before(&mut self, offset: Offset) -> Result<u64, ReadError> {
        let which = self.segment_of_offset(offset);
        let earlier = match which {
            Which::Sealed(number) => number,
            Which::Active => self.sealed.len(),
        };
        let in_earlier: u64 = self.sealed.iter().take(earlier).map(|segment| segment.records).sum();
        if offset >= self.end_offset_of_segment(which) {
            let in_this = match which {
                Which::Sealed(number) => self.sealed[number].records,
                Which::Active => self.active.records(),
            };
            return Ok(in_earlier + in_this);
        }
        let (number, slot) = self.slot_of_offset(which, offset).map_err(into_read_error)?;
        let in_batches_before = match number.checked_sub(1) {
            Some(previous) => u64::from(self.slot(which, previous).map_err(into_read_error)?.records),
            None => 0,
        };
        // Offsets within a batch are its records: nothing removes single records from a log that is not compacted.
        let into_batch = (offset.get() - slot.base_offset(self.name_of(which).base_offset).get()).max(0) as u64;
        let of_batch = u64::from(slot.records) - in_batches_before;
        Ok(in_earlier + in_batches_before + into_batch.min(of_batch))
    }

    // ---- segments and slots ----

    fn name_of(&self, which: Which) -> SegmentName {
        match which {
            Which::Sealed(number) => self.sealed[number].name,
            Which::Active => self.active.name,
        }
    }

    fn batches(&self, which: Which) -> usize {
        match which {
            Which::Sealed(number) => self.sealed[number].batches(),
            Which::Active => self.active.slots.len(),
        }
    }

    fn committed_batches(&self, which: Which) -> usize {
        let committed = self.committed.next().get().saturating_sub(self.name_of(which).first_index.get());
        self.batches(which).min(committed as usize)
    }

    fn end_offset_of_segment(&self, which: Which) -> Offset {
        match which {
            Which::Sealed(number) => self.sealed[number].end_offset,
            Which::Active => self.end_offset,
        }
    }

    fn path_of(&self, which: Which) -> PathBuf {
        self.name_of(which).log_path(&self.dir)
    }

    fn file_of(&mut self, which: Which) -> Result<Arc<dyn DiskFile>, StorageError> {
        let number = match which {
            Which::Active => return Ok(Arc::clone(&self.active.log)),
            Which::Sealed(number) => number,
        };
        if let Some(file) = &self.sealed[number].log {
            return Ok(Arc::clone(file));
        }
        let path = self.path_of(which);
        let file = self.disk.open(&path, OpenMode::Read).map_err(StorageError::io("open", &path))?;
        self.sealed[number].log = Some(Arc::clone(&file));
        Ok(file)
    }

    /// The segment that holds `offset`, or the one that it comes after.
    fn segment_of_offset(&self, offset: Offset) -> Which {
        if offset >= self.active.name.base_offset {
            return Which::Active;
        }
        let after = self.sealed.partition_point(|segment| segment.name.base_offset <= offset);
        Which::Sealed(after.saturating_sub(1))
    }

    fn segment_of_index(&self, index: RaftIndex) -> Result<(Which, usize), StorageError> {
        let (first, last) = (self.first_index(), self.last_index());
        if index < first || index > last {
            return Err(StorageError::NoEntry { index, first, last });
        }
        let which = if index >= self.active.name.first_index {
            Which::Active
        } else {
            Which::Sealed(self.sealed.partition_point(|segment| segment.name.first_index <= index) - 1)
        };
        Ok((which, (index.get() - self.name_of(which).first_index.get()) as usize))
    }

    /// The slot of the batch that holds `offset`, with its number.
    fn slot_of_offset(&mut self, which: Which, offset: Offset) -> Result<(usize, Slot), StorageError> {
        let base = self.name_of(which).base_offset;
        let batches = self.batches(which);
        let after = self.search(which, 0, batches, |slot| slot.base_offset(base) <= offset)?;
        let number = after.saturating_sub(1);
        Ok((number, self.slot(which, number)?))
    }

    /// The first of slots `from..to` for which `is_before` does not hold; `to` where it holds for all.
    fn search(
        &mut self,
        which: Which,
        from: usize,
        to: usize,
        is_before: impl Fn(&Slot) -> bool,
    ) -> Result<usize, StorageError> {
        if which == Which::Active {
            let slots = &self.active.slots[from.min(to)..to];
            return Ok(from.min(to) + slots.partition_point(is_before));
        }
        let (mut from, mut to) = (from, to.max(from));
        while from < to {
            let middle = from + (to - from) / 2;
            if is_before(&self.slot(which, middle)?) {
                from = middle + 1;
            } else {
                to = middle;
            }
        }
        Ok(from)
    }

    fn slot(&mut self, which: Which, number: usize) -> Result<Slot, StorageError> {
        match which {
            Which::Active => Ok(self.active.slots[number]),
            Which::Sealed(segment) => {
                let block = self.sealed_block(segment, (number / BLOCK_SLOTS) as u32)?;
                Ok(block[number % BLOCK_SLOTS])
            }
        }
    }

    /// A block of a sealed segment's index, from memory or from its file; rebuilt from the log where that is wrong.
    fn sealed_block(&mut self, segment: usize, block: u32) -> Result<&[Slot], StorageError> {
        let key = (self.sealed[segment].name.first_index, block);
        // The front was used last.
        let kept = self.index_blocks.iter().position(|(at, _)| *at == key);
        match kept {
            Some(0) => {}
            Some(at) => {
                if let Some(found) = self.index_blocks.remove(at) {
                    self.index_blocks.push_front(found);
                }
            }
            None => {
                let slots = match self.read_sealed_block(segment, block) {
                    Some(slots) => slots,
                    None => {
                        let from = block as usize * BLOCK_SLOTS;
                        let all = self.rebuild_sealed_index(segment)?;
                        all[from..all.len().min(from + BLOCK_SLOTS)].to_vec()
                    }
                };
                self.index_blocks.truncate(INDEX_BLOCKS_KEPT - 1);
                self.index_blocks.push_front((key, slots.into_boxed_slice()));
            }
        }
        Ok(&self.index_blocks[0].1)
    }

    fn read_sealed_block(&mut self, number: usize, block: u32) -> Option<Vec<Slot>> {
        let segment = &mut self.sealed[number];
        let file = match &segment.index {
            Some(file) => Arc::clone(file),
            None => {
                let file = self.disk.open(&segment.name.index_path(&self.dir), OpenMode::Read).ok()?;
                segment.index = Some(Arc::clone(&file));
                file
            }
        };
        let mut bytes = vec![0; BLOCK_BYTES];
        file.read_exact_at(&mut bytes, u64::from(block) * BLOCK_BYTES as u64).ok()?;
        let slots = decode_block(segment.name, block, &bytes)?;
        let expected = (segment.batches() - block as usize * BLOCK_SLOTS).min(BLOCK_SLOTS);
        (slots.len() == expected).then_some(slots)
    }

    /// Walks through a sealed segment, and writes its index anew.
    fn rebuild_sealed_index(&mut self, number: usize) -> Result<Vec<Slot>, StorageError> {
        let which = Which::Sealed(number);
        let file = self.file_of(which)?;
        let path = self.path_of(which);
        let segment = &self.sealed[number];
        let name = segment.name;
        tracing::warn!(path = %name.index_path(&self.dir).display(), "an index is missing or wrong: rebuilding it");
        let epoch = self.term_at(RaftIndex::new(name.first_index.get() - 1)).and_then(LeaderEpoch::from_term);
        let mut walker = Walker::new(file, segment.bytes, 0, name.base_offset, name.first_index, epoch);
        let mut slots: Vec<Slot> = Vec::with_capacity(segment.batches());
        while slots.len() < segment.batches() {
            match walker.step().map_err(StorageError::io("read", &path))? {
                Step::Batch { header, position, control } => {
                    slots.push(Slot::of(&header, control, position as u32, name.base_offset, slots.last()));
                }
                end @ (Step::Clean | Step::Bad { .. } | Step::Newer { .. }) => {
                    let detail = match end {
                        Step::Bad { detail } => detail,
                        Step::Newer { ctype } => format!("a control batch of unknown type {ctype}"),
                        _ => "batches are missing".to_owned(),
                    };
                    return Err(StorageError::Corrupt {
                        segment: name.log_file(),
                        position: walker.position,
                        offset: walker.offset,
                        detail,
                    });
                }
            }
        }
        self.replace_index_file(name, &slots);
        self.sealed[number].index = None;
        Ok(slots)
    }

    /// Writes a sealed segment's index file anew; a failure only costs time later.
    pub(crate) fn replace_index_file(&self, name: SegmentName, slots: &[Slot]) {
        let path = name.index_path(&self.dir);
        // It may not be there.
        let _ = self.disk.remove_file(&path);
        let written = self
            .disk
            .open(&path, OpenMode::CreateNew)
            .and_then(|file| write_blocks(&*file, name, slots, 0..blocks_of(slots.len())));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "cannot write a rebuilt index");
        }
    }

    /// All slots of the newest sealed segment, to make it the active one again.
    pub(crate) fn all_slots_of_newest_sealed(&mut self) -> Result<Vec<Slot>, StorageError> {
        let Some(number) = self.sealed.len().checked_sub(1) else { return Ok(Vec::new()) };
        let batches = self.sealed[number].batches();
        let mut slots = Vec::with_capacity(batches);
        for block in 0..blocks_of(batches) {
            slots.extend_from_slice(self.sealed_block(number, block as u32)?);
        }
        Ok(slots)
    }
}

fn into_read_error(error: StorageError) -> ReadError {
    match error {
        StorageError::Corrupt { segment, position, offset, detail } => {
            ReadError::Corrupt { segment, position, offset, detail }
        }
        StorageError::Io { path, source, .. } => ReadError::Io { path, source },
        // The other errors are of writes; a read's own lookups never leave the log.
        other => ReadError::Io { path: PathBuf::new(), source: std::io::Error::other(other) },
    }
}
