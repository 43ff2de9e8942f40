//! A partition's memory of its idempotent producers, in small.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flowstone_protocol::{BatchHeader, Error, ErrorCode, Offset, RaftIndex};
use flowstone_replication::{Admission, MachineEntry};
use flowstone_storage::planted::{Bug, is_planted};

/// As many as a producer has in flight.
pub(crate) const BATCHES_MAX: usize = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Batch {
    first: i32,
    last: i32,
    base_offset: Offset,
    index: RaftIndex,
}

/// What is remembered of each producer: its last batches.
#[derive(Debug, Default)]
pub(crate) struct Producers {
    committed: BTreeMap<i64, VecDeque<Batch>>,
    /// Leader only: with what is in flight.
    overlay: BTreeMap<i64, VecDeque<Batch>>,
}

fn push(batches: &mut VecDeque<Batch>, batch: Batch) {
    if batches.len() == BATCHES_MAX {
        batches.pop_front();
    }
    batches.push_back(batch);
}

impl Producers {
    pub(crate) fn admit(&self, batch: &BatchHeader) -> Admission {
        if !batch.has_producer() || is_planted(Bug::NoDeduplication) {
            return Admission::Append;
        }
        let producer = batch.producer_id.get();
        let known = self.overlay.get(&producer).or_else(|| self.committed.get(&producer));
        let (first, last) = (batch.base_sequence.get(), batch.last_sequence().get());
        let original = known.and_then(|known| known.iter().find(|seen| seen.first == first && seen.last == last));
        if let Some(original) = original {
            return Admission::Duplicate {
                base_offset: original.base_offset,
                index: original.index,
                timestamp: batch.max_timestamp,
            };
        }
        let expected = known.and_then(VecDeque::back).map_or(0, |newest| newest.last + 1);
        if first == expected {
            return Admission::Append;
        }
        let code = if first > expected { ErrorCode::OutOfOrderSequence } else { ErrorCode::DuplicateSequence };
        Admission::Refuse(Error::new(code, format!("sequence {first}, and {expected} is next; send that first")))
    }

    pub(crate) fn appended(&mut self, entry: &MachineEntry<'_>) {
        if !entry.header.has_producer() {
            return;
        }
        let producer = entry.header.producer_id.get();
        let committed = &self.committed;
        let known =
            self.overlay.entry(producer).or_insert_with(|| committed.get(&producer).cloned().unwrap_or_default());
        push(known, batch_of(entry));
    }

    pub(crate) fn committed(&mut self, entry: &MachineEntry<'_>) {
        if entry.header.has_producer() {
            push(self.committed.entry(entry.header.producer_id.get()).or_default(), batch_of(entry));
        }
    }

    pub(crate) fn step_down(&mut self) {
        self.overlay.clear();
    }

    pub(crate) fn checkpoint(&self) -> Bytes {
        let mut bytes = BytesMut::new();
        for (&producer, batches) in &self.committed {
            bytes.put_i64(producer);
            bytes.put_u8(batches.len() as u8);
            for batch in batches {
                bytes.put_i32(batch.first);
                bytes.put_i32(batch.last);
                bytes.put_i64(batch.base_offset.get());
                bytes.put_u64(batch.index.get());
            }
        }
        bytes.freeze()
    }

    pub(crate) fn restore(&mut self, mut checkpoint: &[u8]) -> Result<(), Error> {
        let short = |_| Error::new(ErrorCode::Internal, "a checkpoint of another length; this is a defect");
        *self = Self::default();
        while !checkpoint.is_empty() {
            let producer = checkpoint.try_get_i64().map_err(short)?;
            let count = checkpoint.try_get_u8().map_err(short)?;
            let mut batches = VecDeque::new();
            for _ in 0..count {
                batches.push_back(Batch {
                    first: checkpoint.try_get_i32().map_err(short)?,
                    last: checkpoint.try_get_i32().map_err(short)?,
                    base_offset: Offset::new(checkpoint.try_get_i64().map_err(short)?),
                    index: RaftIndex::new(checkpoint.try_get_u64().map_err(short)?),
                });
            }
            self.committed.insert(producer, batches);
        }
        Ok(())
    }
}

fn batch_of(entry: &MachineEntry<'_>) -> Batch {
    Batch {
        first: entry.header.base_sequence.get(),
        last: entry.header.last_sequence().get(),
        base_offset: entry.base_offset,
        index: entry.index,
    }
}
