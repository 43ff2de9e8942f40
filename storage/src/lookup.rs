//! Reading a log: by offset, by index, by timestamp, by count of records.
//!
//! The active segment's index is in memory; blocks of sealed ones are read when needed (4 KiB each) and the last few
//! kept. The newest two segments' bytes are handed out from a map, older ones are read. What readers ask for never waits
//! here: it becomes a ticket where anything it needs is not cached. What the group asks for (entries) does.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::batch::{stamped_prefix, verify_crc};
use flowstone_protocol::control::{CONTROL_FORMAT_VERSION, decode_control, encode_control};
use flowstone_protocol::{BatchHeader, ControlType, LeaderEpoch, Offset, RaftIndex, Timestamp};

use crate::batch_index::Slot;
use crate::disk::DiskFile;
use crate::error::{ReadError, StorageError};
use crate::log::{EntryBody, EntryMeta, Log, LogEntry};
use crate::read::{
    CountTicket, FoundRecord, Lookup, LookupTicket, Place, Question, Read, ReadBytes, ReadTicket, RecordCount,
    RecordsBefore, Source, Span, read_now,
};
use crate::segment::{SegmentMap, SegmentName};
use crate::slots::{ActiveSlots, Extent, KeptSlots, NoSlot, Slots, View};
use crate::walk::is_own_control;

/// A segment of a log: the `n`th sealed one, or the active one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
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
        self.read_below(from, max_bytes, self.high_watermark)
    }

    /// As [`Log::read`], of batches that begin below `below` alone: none where `from` is not.
    ///
    /// # Errors
    /// As [`Log::read`]; `below` changes nothing about that.
    pub fn read_below(&mut self, from: Offset, max_bytes: usize, below: Offset) -> Result<Read, ReadError> {
        if from < self.log_start || from > self.high_watermark {
            return Err(ReadError::OutOfRange {
                offset: from,
                log_start: self.log_start,
                high_watermark: self.high_watermark,
            });
        }
        let which = self.segment_of_offset(from);
        let name = self.name_of(which);
        if from >= below.min(self.high_watermark) {
            let place = Place { segment: name, position: 0 };
            return Ok(Read::Bytes(ReadBytes::new(Vec::new(), from, from, place)));
        }
        match self.with_slots(which, false, |slots, view| view.extent(slots, from, max_bytes, below)) {
            Ok(extent) => Ok(self.give(which, extent)),
            Err(NoSlot::NotCached) => {
                let Which::Sealed(number) = which else { unreachable!("the active segment's index is in memory") };
                let files = Arc::clone(&self.sealed[number].files);
                Ok(Read::Ticket(ReadTicket::search(files, self.view(which), from, max_bytes, below)))
            }
            Err(NoSlot::Failed(error)) => Err(error.into()),
        }
    }

    fn give(&mut self, which: Which, extent: Extent) -> Read {
        let is_mapped = match which {
            Which::Active => true,
            Which::Sealed(number) => number + 1 == self.sealed.len(),
        };
        if is_mapped && let Some(map) = self.map_of(which, extent.position + extent.bytes as u64) {
            let from = extent.position as usize;
            let bytes = map.slice(from..from + extent.bytes);
            return Read::Bytes(ReadBytes::of_extent(self.name_of(which), extent, bytes));
        }
        // What is mapped but could not be is in memory as likely as not.
        read_now(self.source_of(which), extent)
    }

    pub(crate) fn source_of(&self, which: Which) -> Source {
        match which {
            Which::Sealed(number) => Source::Sealed(Arc::clone(&self.sealed[number].files)),
            Which::Active => {
                let file = Arc::clone(&self.active.log);
                Source::Active { name: self.active.name, path: self.path_of(which), file }
            }
        }
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
        let (slot, next) =
            self.with_slots(which, true, |slots, view| Ok((slots.slot(number)?, view.offset_behind(slots, number)?)))?;
        let base_offset = slot.base_offset(self.name_of(which).base_offset);
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

    /// The header of an entry as it is stored; the CRC is checked where it comes from the file.
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
            // The CRC is of the whole batch, and a header that rotted must not reach a machine.
            None => BatchHeader::parse(&self.stored_batch(index)?),
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

    /// Looks for the first committed record, from the log start on, whose timestamp is at least `timestamp`; with its own
    /// timestamp. Exact to the record: its batch is read and decompressed, by the ticket.
    pub fn find_timestamp(&mut self, timestamp: Timestamp) -> Result<Lookup, ReadError> {
        let from = self.log_start;
        let mut spans = Vec::new();
        let first = match self.segment_of_offset(from) {
            Which::Sealed(number) => number,
            Which::Active => self.sealed.len(),
        };
        let segments = (first..self.sealed.len()).map(Which::Sealed).chain([Which::Active]);
        for which in segments.take_while(|which| self.name_of(*which).base_offset < self.high_watermark) {
            let view = self.view(which);
            match which {
                Which::Sealed(number) => {
                    let segment = &self.sealed[number];
                    if segment.max_timestamp < timestamp {
                        continue;
                    }
                    spans.push(Span::Sealed { files: Arc::clone(&segment.files), view });
                    // All of it is readable, so it holds one: nothing behind it is needed.
                    if view.base_offset >= from && view.readable == view.batches {
                        break;
                    }
                }
                Which::Active => {
                    let slots = &mut ActiveSlots(&self.active.slots);
                    if let Some((position, offset)) = view.first_reaching(slots, timestamp, from)? {
                        let end = view.readable_end(slots)?;
                        spans.push(Span::Active { source: self.source_of(which), position, offset, end });
                    }
                }
            }
        }
        if spans.is_empty() {
            return Ok(Lookup::Found(None));
        }
        Ok(Lookup::Ticket(LookupTicket(Question::Timestamp { timestamp, from, spans })))
    }

    /// Looks for the `n`th data record before the high watermark; the log start where there are fewer. Its timestamp is
    /// not looked at.
    pub fn find_records_from_end(&mut self, n: u64) -> Result<Lookup, ReadError> {
        let (from, to) = (self.log_start, self.high_watermark);
        let found = |offset| Ok(Lookup::Found(Some(FoundRecord::at(offset))));
        if n == 0 {
            return found(to);
        }
        match self.records_from_end_now(n) {
            Ok(offset) => found(offset),
            Err(NoSlot::Failed(error)) => Err(error.into()),
            Err(NoSlot::NotCached) => {
                // Only sealed segments can be short of slots, so that the answer lies in one.
                let mut segments: Vec<_> = (0..self.sealed.len())
                    .map(|number| (number, self.view(Which::Sealed(number))))
                    .filter(|(_, view)| view.base_offset < to)
                    .map(|(number, view)| (Arc::clone(&self.sealed[number].files), view, self.sealed[number].records))
                    .collect();
                let mut n = n;
                let mut end = to;
                if to > self.active.name.base_offset {
                    n -= self.records_before(to).map_err(ReadError::from)? - self.sealed_records();
                    end = self.active.name.base_offset;
                }
                // Those that hold the last `n` records will do: a log may have thousands.
                let mut held = segments.pop().map_or(Vec::new(), |last| vec![last]);
                let mut records = 0;
                while records < n
                    && let Some(segment) = segments.pop()
                {
                    records += segment.2;
                    held.push(segment);
                }
                held.reverse();
                Ok(Lookup::Ticket(LookupTicket(Question::RecordsFromEnd { n, from, to: end, segments: held })))
            }
        }
    }

    fn records_from_end_now(&mut self, n: u64) -> Result<Offset, NoSlot> {
        let Some(mut before) = self.records_before(self.high_watermark)?.checked_sub(n) else {
            return Ok(self.log_start);
        };
        let mut which = Which::Active;
        for (number, segment) in self.sealed.iter().enumerate() {
            if before < segment.records {
                which = Which::Sealed(number);
                break;
            }
            before -= segment.records;
        }
        let offset = self.with_slots(which, false, |slots, view| view.offset_of_record(slots, before, None))?;
        Ok(offset.max(self.log_start))
    }

    /// Records in sealed segments, whatever the log start is.
    pub fn sealed_records(&self) -> u64 {
        self.sealed.iter().map(|segment| segment.records).sum()
    }

    /// Data records (those that consumers see) from `from` up to and without `to`; both are taken to lie in the log.
    ///
    /// Never waits: what has to be looked for in a sealed segment whose index is not at hand becomes a ticket.
    pub fn records_between(&mut self, from: Offset, to: Offset) -> Result<RecordCount, ReadError> {
        let mut before = |offset| match self.records_before(offset) {
            Ok(records) => Ok((records, RecordsBefore::Known(records))),
            Err(NoSlot::NotCached) => Ok((self.records_before_about(offset), self.records_before_later(offset))),
            Err(NoSlot::Failed(error)) => Err(ReadError::from(error)),
        };
        let (until, from) = (before(to)?, before(from)?);
        let about = until.0.saturating_sub(from.0);
        Ok(match (until.1, from.1) {
            (RecordsBefore::Known(_), RecordsBefore::Known(_)) => RecordCount::Exact(about),
            (until, from) => RecordCount::About(about, CountTicket { until, from }),
        })
    }

    /// Bytes of the entries `first` to `last` that are held. Never waits: within a sealed segment whose index is not at
    /// hand, entries are taken to be of one size.
    pub fn bytes_between(&mut self, first: RaftIndex, last: RaftIndex) -> u64 {
        let until = self.bytes_before(last.next());
        until.saturating_sub(self.bytes_before(first))
    }

    /// Bytes of all segments before the entry `index`.
    fn bytes_before(&mut self, index: RaftIndex) -> u64 {
        let index = index.max(self.first_index());
        let Ok((which, number)) = self.segment_of_index(index) else { return self.size_bytes() };
        let earlier = match which {
            Which::Sealed(at) => at,
            Which::Active => self.sealed.len(),
        };
        let earlier: u64 = self.sealed.iter().take(earlier).map(|segment| segment.bytes).sum();
        let view = self.view(which);
        let share = || (u128::from(view.end) * number as u128 / view.batches.max(1) as u128) as u64;
        let within = self.with_slots(which, false, |slots, _| Ok(u64::from(slots.slot(number)?.position)));
        earlier + within.unwrap_or_else(|_| share())
    }

    /// Data records of all segments before `offset`.
    fn records_before(&mut self, offset: Offset) -> Result<u64, NoSlot> {
        let which = self.segment_of_offset(offset);
        let (in_earlier, in_this) = self.records_of(which);
        if offset >= self.end_offset_of_segment(which) {
            return Ok(in_earlier + in_this);
        }
        Ok(in_earlier + self.with_slots(which, false, |slots, view| view.records_before(slots, offset, None))?)
    }

    fn records_before_about(&self, offset: Offset) -> u64 {
        let which = self.segment_of_offset(offset);
        let (in_earlier, in_this) = self.records_of(which);
        let (base, end) = (self.name_of(which).base_offset.get(), self.end_offset_of_segment(which).get());
        let share = (offset.get() - base).max(0) as f64 / (end - base).max(1) as f64;
        in_earlier + (in_this as f64 * share.min(1.0)) as u64
    }

    /// The same, exactly, for whoever may wait.
    fn records_before_later(&self, offset: Offset) -> RecordsBefore {
        let which = self.segment_of_offset(offset);
        let (in_earlier, in_this) = self.records_of(which);
        match which {
            Which::Active => RecordsBefore::Known(in_earlier + in_this),
            Which::Sealed(number) => RecordsBefore::Sealed {
                in_earlier,
                files: Arc::clone(&self.sealed[number].files),
                view: self.view(which),
                offset,
            },
        }
    }

    /// Data records of all segments before one, and of that one.
    fn records_of(&self, which: Which) -> (u64, u64) {
        match which {
            Which::Active => (self.sealed_records(), self.active.records()),
            Which::Sealed(number) => {
                let earlier = self.sealed.iter().take(number).map(|segment| segment.records).sum();
                (earlier, self.sealed[number].records)
            }
        }
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
        self.sealed[number].files.log()
    }

    /// The segment that holds `offset`, or the one that it comes after.
    pub(crate) fn segment_of_offset(&self, offset: Offset) -> Which {
        if offset >= self.active.name.base_offset {
            return Which::Active;
        }
        let after = self.sealed.partition_point(|segment| segment.name.base_offset <= offset);
        Which::Sealed(after.saturating_sub(1))
    }

    pub(crate) fn segment_of_index(&self, index: RaftIndex) -> Result<(Which, usize), StorageError> {
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

    pub(crate) fn view(&self, which: Which) -> View {
        let end = match which {
            Which::Sealed(number) => self.sealed[number].bytes,
            Which::Active => self.active.end,
        };
        View {
            base_offset: self.name_of(which).base_offset,
            batches: self.batches(which),
            readable: self.committed_batches(which),
            end_offset: self.end_offset_of_segment(which),
            end,
            has_holes: self.name_of(which).is_cleaned(),
        }
    }

    /// Asks a segment's index: the active one's is in memory, blocks of sealed ones are kept, or read; where `waits` is
    /// not set, only from the page cache.
    fn with_slots<T>(
        &mut self,
        which: Which,
        waits: bool,
        ask: impl FnOnce(&mut dyn Slots, &View) -> Result<T, NoSlot>,
    ) -> Result<T, NoSlot> {
        let view = self.view(which);
        match which {
            Which::Active => ask(&mut ActiveSlots(&self.active.slots), &view),
            Which::Sealed(number) => {
                let files = &self.sealed[number].files;
                ask(&mut KeptSlots { kept: &mut self.index_blocks, files, waits }, &view)
            }
        }
    }

    /// A slot, waited for.
    fn slot(&mut self, which: Which, number: usize) -> Result<Slot, StorageError> {
        Ok(self.with_slots(which, true, |slots, _| slots.slot(number))?)
    }

    /// All slots of the newest sealed segment, to make it the active one again.
    pub(crate) fn all_slots_of_newest_sealed(&mut self) -> Result<Vec<Slot>, StorageError> {
        let Some(number) = self.sealed.len().checked_sub(1) else { return Ok(Vec::new()) };
        let batches = self.sealed[number].batches();
        let all = |slots: &mut dyn Slots, _: &View| (0..batches).map(|number| slots.slot(number)).collect();
        Ok(self.with_slots(Which::Sealed(number), true, all)?)
    }
}
