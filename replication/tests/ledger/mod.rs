//! Machines and batches for tests and benches.

// Each test program uses its own part of this.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flowstone_protocol::{
    BatchHeader, Compression, Error, ErrorCode, Offset, ProducerEpoch, ProducerId, RaftIndex, RecordBatchBuilder,
    Sequence, Term, Timestamp,
};
use flowstone_replication::{Admission, Commanded, Machine, MachineBody, MachineEntry};

/// A batch of `records` records of one idempotent producer; its bytes tell it from all others.
pub fn batch(producer: i64, sequence: i32, records: i32, value_bytes: usize) -> (Bytes, BatchHeader) {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    if producer >= 0 {
        builder = builder.producer(ProducerId::new(producer), ProducerEpoch::new(0), Sequence::new(sequence));
    }
    let mut value = vec![b'.'; value_bytes];
    for record in 0..records {
        let text = format!("{producer}/{sequence}+{record}");
        let length = text.len().min(value_bytes);
        value[..length].copy_from_slice(&text.as_bytes()[..length]);
        builder.append(Timestamp::new(1_000), None, Some(&value), []).expect("far below 2 GiB");
    }
    let batch = builder.build();
    let header = BatchHeader::parse(&batch).expect("just built");
    (batch, header)
}

/// Knows every batch by producer and sequence: the model of what deduplication needs.
#[derive(Debug, Default)]
pub struct Ledger {
    committed: BTreeMap<(i64, i32), (Offset, RaftIndex)>,
    in_flight: BTreeMap<(i64, i32), (Offset, RaftIndex)>,
    last_committed: RaftIndex,
    last_appended: RaftIndex,
    pub leads: Vec<Term>,
    /// As a coordinator does: what was appended is applied, and all is read again when it steps down.
    pub replays: bool,
    /// A producer's batch is taken in its turn alone.
    pub demands_order: bool,
}

impl Ledger {
    fn knows_before(&self, batch: &BatchHeader) -> bool {
        let before = (batch.producer_id.get(), batch.base_sequence.get() - 1);
        self.in_flight.contains_key(&before) || self.committed.contains_key(&before)
    }

    pub fn committed(&self) -> &BTreeMap<(i64, i32), (Offset, RaftIndex)> {
        &self.committed
    }
}

fn key(header: &BatchHeader) -> (i64, i32) {
    (header.producer_id.get(), header.base_sequence.get())
}

impl Machine for Ledger {
    type Command = ();
    type Reply = ();

    fn admit(&mut self, batch: &BatchHeader, _now: Timestamp) -> Admission {
        match self.in_flight.get(&key(batch)).or_else(|| self.committed.get(&key(batch))) {
            Some(&(base_offset, index)) if batch.has_producer() => {
                Admission::Duplicate { base_offset, index, timestamp: Timestamp::new(1_000) }
            }
            _ if self.demands_order && batch.base_sequence.get() > 0 && !self.knows_before(batch) => {
                let what = format!("batches before {} are missing; send them first", batch.base_sequence);
                Admission::Refuse(Error::new(ErrorCode::OutOfOrderSequence, what))
            }
            _ => Admission::Append,
        }
    }

    fn appended(&mut self, entry: &MachineEntry<'_>) {
        assert!(entry.index > self.last_appended, "{} after {}", entry.index, self.last_appended);
        self.last_appended = entry.index;
        if entry.header.has_producer() {
            self.in_flight.insert(key(entry.header), (entry.base_offset, entry.index));
        }
    }

    fn committed(&mut self, entry: &MachineEntry<'_>) {
        if self.last_committed > RaftIndex::new(0) {
            assert_eq!(entry.index, self.last_committed.next(), "every entry once, in order");
        }
        self.last_committed = entry.index;
        if !entry.header.attributes.is_control() {
            assert!(matches!(entry.body, MachineBody::Header));
            let place = (entry.base_offset, entry.index);
            if let Some(promised) = self.in_flight.remove(&key(entry.header)) {
                assert_eq!(promised, place, "committed where it was promised");
            }
            if entry.header.has_producer() {
                let before = self.committed.insert(key(entry.header), place);
                assert_eq!(before, None, "{:?} is in the log twice", key(entry.header));
            }
        }
    }

    fn command(&mut self, (): (), _now: Timestamp) -> Commanded<()> {
        Commanded { batch: None, reply: () }
    }

    fn lead(&mut self, term: Term) {
        assert!(self.leads.last().is_none_or(|last| *last < term), "terms go on: {:?}, {term}", self.leads);
        self.leads.push(term);
    }

    fn step_down(&mut self) {
        self.in_flight.clear();
        self.last_appended = self.last_committed;
    }

    fn reads_records(&self) -> bool {
        false
    }

    fn applies_at_append(&self) -> bool {
        self.replays
    }

    fn checkpoint(&self) -> Bytes {
        let mut bytes = BytesMut::new();
        bytes.put_u64(self.last_committed.get());
        for (&(producer, sequence), &(offset, index)) in &self.committed {
            bytes.put_i64(producer);
            bytes.put_i32(sequence);
            bytes.put_i64(offset.get());
            bytes.put_u64(index.get());
        }
        bytes.freeze()
    }

    fn restore(&mut self, mut checkpoint: &[u8]) -> Result<(), Error> {
        let leads = std::mem::take(&mut self.leads);
        *self = Self { leads, replays: self.replays, demands_order: self.demands_order, ..Self::default() };
        if checkpoint.is_empty() {
            return Ok(());
        }
        let short = |_| Error::new(ErrorCode::Internal, "a checkpoint of another length");
        self.last_committed = RaftIndex::new(checkpoint.try_get_u64().map_err(short)?);
        while !checkpoint.is_empty() {
            let key = (checkpoint.try_get_i64().map_err(short)?, checkpoint.try_get_i32().map_err(short)?);
            let offset = Offset::new(checkpoint.try_get_i64().map_err(short)?);
            let index = RaftIndex::new(checkpoint.try_get_u64().map_err(short)?);
            self.committed.insert(key, (offset, index));
        }
        Ok(())
    }
}

/// A coordinator in small: one number, changed at append, so that commands in flight see each other.
#[derive(Debug, Default)]
pub struct Counter {
    total: i64,
    applied: RaftIndex,
}

impl Counter {
    pub fn total(&self) -> i64 {
        self.total
    }

    fn apply(&mut self, entry: &MachineEntry<'_>) {
        // At append first, and once more at commit: by its index it is known which it is.
        if entry.index <= self.applied {
            return;
        }
        self.applied = entry.index;
        if let MachineBody::Records(batch) = entry.body {
            for record in flowstone_protocol::record::records(batch.clone(), 1 << 20).expect("our own batch") {
                let value = record.expect("our own record").value.expect("always a value");
                self.total += value.as_ref().get_i64();
            }
        }
    }
}

impl Machine for Counter {
    type Command = i64;
    type Reply = i64;

    fn admit(&mut self, _batch: &BatchHeader, _now: Timestamp) -> Admission {
        Admission::Refuse(Error::new(ErrorCode::InternalTopic, "counts by commands alone"))
    }

    fn appended(&mut self, entry: &MachineEntry<'_>) {
        self.apply(entry);
    }

    fn committed(&mut self, entry: &MachineEntry<'_>) {
        self.apply(entry);
    }

    /// Zero asks for the total, without a record.
    fn command(&mut self, add: i64, now: Timestamp) -> Commanded<i64> {
        let reply = self.total + add;
        let batch = (add != 0).then(|| {
            let mut builder = RecordBatchBuilder::new(Compression::None);
            builder.append(now, None, Some(&add.to_be_bytes()), []).expect("eight bytes");
            builder.build()
        });
        Commanded { batch, reply }
    }

    fn lead(&mut self, _term: Term) {}

    fn step_down(&mut self) {}

    fn reads_records(&self) -> bool {
        true
    }

    fn checkpoint(&self) -> Bytes {
        let mut bytes = BytesMut::new();
        bytes.put_i64(self.total);
        bytes.put_u64(self.applied.get());
        bytes.freeze()
    }

    fn restore(&mut self, mut checkpoint: &[u8]) -> Result<(), Error> {
        *self = Self::default();
        if !checkpoint.is_empty() {
            self.total = checkpoint.get_i64();
            self.applied = RaftIndex::new(checkpoint.get_u64());
        }
        Ok(())
    }
}
