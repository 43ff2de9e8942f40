//! What a partition remembers of its idempotent producers: the machine behind every topic's log.
//!
//! For each producer id: its epoch and its last five batches. That state follows from the log alone (a batch is
//! remembered when it is committed), so it is the same on every replica and after every restart. On the leader an
//! overlay adds what is appended and not committed yet, since that decides about the next batch too.
//!
//! ```text
//!   committed:  .. [5..7] [8..9]                    from the log, in checkpoints
//!   overlay:    .. [5..7] [8..9] [10..14] [15..15]  the leader's; dropped when it steps down
//!                                                ^ next: 16
//! ```

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use flowstone_protocol::internal::{ProducerBatch, ProducerState, ProducersCheckpoint};
use flowstone_protocol::{
    BatchHeader, Error, ErrorCode, Offset, ProducerEpoch, ProducerId, RaftIndex, Sequence, Timestamp,
};
use flowstone_replication::{Admission, MachineEntry};
use prost::Message;

/// Batches remembered per producer: as many as a producer has in flight, so that whichever of them is sent again is
/// recognised.
const BATCHES_MAX: usize = 5;

/// A batch that a producer wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Batch {
    first: Sequence,
    last: Sequence,
    base_offset: Offset,
    index: RaftIndex,
    timestamp: Timestamp,
}

/// One producer, as far as this partition knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Producer {
    epoch: ProducerEpoch,
    /// Oldest first, never empty, never above [`BATCHES_MAX`].
    batches: VecDeque<Batch>,
}

impl Producer {
    fn new(epoch: ProducerEpoch) -> Self {
        Self { epoch, batches: VecDeque::with_capacity(BATCHES_MAX) }
    }

    fn push(&mut self, batch: Batch) {
        if self.batches.len() == BATCHES_MAX {
            self.batches.pop_front();
        }
        self.batches.push_back(batch);
    }

    /// Takes a batch in; a new epoch begins anew.
    fn take(&mut self, epoch: ProducerEpoch, batch: Batch) {
        if self.epoch != epoch {
            *self = Self::new(epoch);
        }
        self.push(batch);
    }

    fn last(&self) -> Option<&Batch> {
        self.batches.back()
    }
}

/// The machine: see the module.
#[derive(Debug, Default)]
pub(crate) struct Producers {
    committed: HashMap<ProducerId, Producer>,
    /// Leader only: producers with batches in flight, these batches included.
    overlay: HashMap<ProducerId, Producer>,
}

impl Producers {
    /// May this batch be appended?
    pub(crate) fn admit(&self, batch: &BatchHeader) -> Admission {
        if batch.producer_id == ProducerId::NONE {
            return Admission::Append;
        }
        let Some(known) = self.overlay.get(&batch.producer_id).or_else(|| self.committed.get(&batch.producer_id))
        else {
            if batch.base_sequence == Sequence::new(0) {
                return Admission::Append;
            }
            return refuse(
                ErrorCode::UnknownProducer,
                format!(
                    "producer {} begins at sequence {}, and this partition knows nothing of it (its state went with the \
                     records, or this is another log than the one it wrote to); what it sent before may or may not be \
                     stored: take a new producer id",
                    batch.producer_id, batch.base_sequence
                ),
            );
        };
        if batch.producer_epoch < known.epoch {
            return refuse(
                ErrorCode::ProducerFenced,
                format!(
                    "producer {} is at epoch {}, and this batch has epoch {}: a newer instance took over; stop this one",
                    batch.producer_id, known.epoch, batch.producer_epoch
                ),
            );
        }
        if batch.producer_epoch > known.epoch {
            if batch.base_sequence == Sequence::new(0) {
                return Admission::Append;
            }
            return refuse(
                ErrorCode::OutOfOrderSequence,
                format!(
                    "producer {} begins epoch {} at sequence {}; a new epoch begins at 0",
                    batch.producer_id, batch.producer_epoch, batch.base_sequence
                ),
            );
        }
        let (first, last) = (batch.base_sequence, batch.last_sequence());
        if let Some(original) = known.batches.iter().find(|seen| seen.first == first && seen.last == last) {
            let Batch { base_offset, index, timestamp, .. } = *original;
            return Admission::Duplicate { base_offset, index, timestamp };
        }
        let Some(newest) = known.last() else {
            return Admission::Append;
        };
        let expected = newest.last.next();
        if first == expected {
            return Admission::Append;
        }
        if ahead_of(first, expected) {
            return refuse(
                ErrorCode::OutOfOrderSequence,
                format!(
                    "producer {} sent sequence {first}, and {expected} is next: batches before it are missing; send them \
                     first",
                    batch.producer_id
                ),
            );
        }
        refuse(
            ErrorCode::DuplicateSequence,
            format!(
                "producer {} sent sequences {first} to {last} again, and they are too old to say at which offset they \
                 are (the last {BATCHES_MAX} batches are remembered, {expected} is next): they are stored",
                batch.producer_id
            ),
        )
    }

    /// Leader: the batch is in the log and in flight.
    pub(crate) fn appended(&mut self, entry: &MachineEntry<'_>) {
        if let Some((id, epoch, batch)) = producer_batch(entry) {
            let committed = &self.committed;
            let known = || committed.get(&id).cloned().unwrap_or_else(|| Producer::new(epoch));
            self.overlay.entry(id).or_insert_with(known).take(epoch, batch);
        }
    }

    /// The batch is committed.
    pub(crate) fn committed(&mut self, entry: &MachineEntry<'_>) {
        let Some((id, epoch, batch)) = producer_batch(entry) else {
            return;
        };
        self.committed.entry(id).or_insert_with(|| Producer::new(epoch)).take(epoch, batch);
        // Nothing of it is in flight any more: both would say the same.
        if self.overlay.get(&id).and_then(Producer::last).is_some_and(|newest| newest.index <= batch.index) {
            self.overlay.remove(&id);
        }
    }

    /// What was in flight may never be committed.
    pub(crate) fn step_down(&mut self) {
        self.overlay.clear();
    }

    pub(crate) fn checkpoint(&self) -> Bytes {
        let mut producers: Vec<ProducerState> = self
            .committed
            .iter()
            .map(|(id, producer)| ProducerState {
                producer_id: id.get(),
                producer_epoch: i32::from(producer.epoch.get()),
                batches: producer
                    .batches
                    .iter()
                    .map(|batch| ProducerBatch {
                        first_sequence: batch.first.get(),
                        last_sequence: batch.last.get(),
                        base_offset: batch.base_offset.get(),
                        raft_index: batch.index.get(),
                        timestamp: batch.timestamp.get(),
                    })
                    .collect(),
                ..ProducerState::default()
            })
            .collect();
        // Equal states have equal checkpoints.
        producers.sort_by_key(|producer| producer.producer_id);
        ProducersCheckpoint { producers, ..Default::default() }.encode_to_vec().into()
    }

    pub(crate) fn restore(&mut self, checkpoint: &[u8]) -> Result<(), Error> {
        let malformed = |what: String| Error::new(ErrorCode::CorruptLog, format!("the producers' checkpoint {what}"));
        let checkpoint =
            ProducersCheckpoint::decode(checkpoint).map_err(|error| malformed(format!("is malformed: {error}")))?;
        let mut committed = HashMap::with_capacity(checkpoint.producers.len());
        for producer in checkpoint.producers {
            let epoch =
                i16::try_from(producer.producer_epoch).map_err(|_| malformed("has an epoch too large".into()))?;
            if !(1..=BATCHES_MAX).contains(&producer.batches.len()) {
                return Err(malformed(format!("has a producer of {} batches", producer.batches.len())));
            }
            let batches = producer.batches.iter().map(|batch| Batch {
                first: Sequence::new(batch.first_sequence),
                last: Sequence::new(batch.last_sequence),
                base_offset: Offset::new(batch.base_offset),
                index: RaftIndex::new(batch.raft_index),
                timestamp: Timestamp::new(batch.timestamp),
            });
            let producer_state = Producer { epoch: ProducerEpoch::new(epoch), batches: batches.collect() };
            committed.insert(ProducerId::new(producer.producer_id), producer_state);
        }
        *self = Self { committed, overlay: HashMap::new() };
        Ok(())
    }
}

/// The producer's part of an entry; `None` for batches without a producer and for the log's own.
fn producer_batch(entry: &MachineEntry<'_>) -> Option<(ProducerId, ProducerEpoch, Batch)> {
    let header = entry.header;
    if header.producer_id == ProducerId::NONE || header.attributes.is_control() {
        return None;
    }
    let batch = Batch {
        first: header.base_sequence,
        last: header.last_sequence(),
        base_offset: entry.base_offset,
        index: entry.index,
        timestamp: header.max_timestamp,
    };
    Some((header.producer_id, header.producer_epoch, batch))
}

/// Whether `a` comes after `b` on the circle of 2^31 sequence numbers: the shorter way decides.
fn ahead_of(a: Sequence, b: Sequence) -> bool {
    let distance = a.get().wrapping_sub(b.get()) & i32::MAX;
    distance != 0 && distance < 1 << 30
}

fn refuse(code: ErrorCode, message: String) -> Admission {
    Admission::Refuse(Error::new(code, message))
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::{Compression, RecordBatchBuilder, Term};
    use flowstone_replication::MachineBody;

    use super::*;

    /// A partition of one replica: what is appended gets the next offset and index.
    #[derive(Default)]
    struct Partition {
        producers: Producers,
        in_flight: VecDeque<(BatchHeader, Offset, RaftIndex)>,
        end: i64,
        index: u64,
    }

    fn header(id: i64, epoch: i16, first: i32, records: i32) -> BatchHeader {
        let mut batch = RecordBatchBuilder::new(Compression::None).producer(
            ProducerId::new(id),
            ProducerEpoch::new(epoch),
            Sequence::new(first),
        );
        for _ in 0..records {
            batch.append(Timestamp::new(1), None, Some(b"x"), []).expect("fits");
        }
        BatchHeader::parse(&batch.build()).expect("built here")
    }

    fn entry<'a>(header: &'a BatchHeader, base_offset: Offset, index: RaftIndex) -> MachineEntry<'a> {
        MachineEntry { index, term: Term::new(1), base_offset, header, body: MachineBody::Header }
    }

    impl Partition {
        /// `Ok(offset)` appended, `Err(Ok(offset))` duplicate, `Err(Err(code))` refused.
        fn send(&mut self, id: i64, epoch: i16, first: i32, records: i32) -> Result<i64, Result<i64, ErrorCode>> {
            let header = header(id, epoch, first, records);
            match self.producers.admit(&header) {
                Admission::Append => {
                    let (offset, index) = (Offset::new(self.end), RaftIndex::new(self.index));
                    self.producers.appended(&entry(&header, offset, index));
                    self.in_flight.push_back((header, offset, index));
                    self.end += i64::from(records);
                    self.index += 1;
                    Ok(offset.get())
                }
                Admission::Duplicate { base_offset, .. } => Err(Ok(base_offset.get())),
                Admission::Refuse(error) => Err(Err(error.code)),
            }
        }

        fn commit(&mut self, batches: usize) {
            for (header, offset, index) in self.in_flight.drain(..batches) {
                self.producers.committed(&entry(&header, offset, index));
            }
        }
    }

    #[test]
    fn batches_follow_each_other_whether_committed_or_in_flight() {
        let mut partition = Partition::default();
        assert_eq!(partition.send(7, 0, 0, 3), Ok(0));
        assert_eq!(partition.send(7, 0, 3, 2), Ok(3));
        assert_eq!(partition.send(7, 0, 3, 2), Err(Ok(3)), "a duplicate of what is in flight");
        partition.commit(2);
        assert_eq!(partition.send(7, 0, 0, 3), Err(Ok(0)), "a duplicate of what is committed");
        assert_eq!(partition.send(7, 0, 5, 1), Ok(5));
        assert_eq!(partition.send(8, 0, 0, 1), Ok(6), "another producer");
        assert_eq!(partition.send(-1, -1, -1, 1), Ok(7), "no producer");
    }

    #[test]
    fn gaps_and_strangers_are_told() {
        let mut partition = Partition::default();
        assert_eq!(partition.send(7, 0, 5, 1), Err(Err(ErrorCode::UnknownProducer)));
        assert_eq!(partition.send(7, 0, 0, 3), Ok(0));
        assert_eq!(partition.send(7, 0, 4, 1), Err(Err(ErrorCode::OutOfOrderSequence)));
        assert_eq!(
            partition.send(7, 0, 0, 2),
            Err(Err(ErrorCode::DuplicateSequence)),
            "other bounds: not the same batch"
        );
    }

    #[test]
    fn five_batches_are_remembered() {
        let mut partition = Partition::default();
        for first in 0..6 {
            assert_eq!(partition.send(7, 0, first, 1), Ok(i64::from(first)));
        }
        let check = |partition: &mut Partition| {
            assert_eq!(partition.send(7, 0, 0, 1), Err(Err(ErrorCode::DuplicateSequence)));
            for first in 1..6 {
                assert_eq!(partition.send(7, 0, first, 1), Err(Ok(i64::from(first))));
            }
        };
        check(&mut partition);
        partition.commit(6);
        check(&mut partition);
    }

    #[test]
    fn epochs_fence() {
        let mut partition = Partition::default();
        assert_eq!(partition.send(7, 1, 0, 1), Ok(0));
        assert_eq!(partition.send(7, 0, 1, 1), Err(Err(ErrorCode::ProducerFenced)));
        assert_eq!(partition.send(7, 2, 1, 1), Err(Err(ErrorCode::OutOfOrderSequence)));
        assert_eq!(partition.send(7, 2, 0, 1), Ok(1));
        assert_eq!(partition.send(7, 1, 1, 1), Err(Err(ErrorCode::ProducerFenced)));
        partition.commit(2);
        assert_eq!(partition.send(7, 2, 0, 1), Err(Ok(1)));
    }

    #[test]
    fn sequences_wrap() {
        let mut partition = Partition::default();
        assert_eq!(partition.send(7, 0, 0, 1), Ok(0));
        partition.commit(1);
        // As after 2^31 - 3 records: the last batch before the wrap ends at MAX - 1.
        let newest = partition.producers.committed.get_mut(&ProducerId::new(7)).expect("known");
        newest.batches[0].first = Sequence::new(i32::MAX - 1);
        newest.batches[0].last = Sequence::new(i32::MAX - 1);
        assert_eq!(partition.send(7, 0, i32::MAX, 3), Ok(1), "MAX, 0, 1");
        assert_eq!(partition.send(7, 0, 3, 1), Err(Err(ErrorCode::OutOfOrderSequence)));
        assert_eq!(partition.send(7, 0, 2, 1), Ok(4));
        assert_eq!(partition.send(7, 0, i32::MAX, 3), Err(Ok(1)));
    }

    #[test]
    fn what_was_in_flight_is_forgotten_with_leadership() {
        let mut partition = Partition::default();
        assert_eq!(partition.send(7, 0, 0, 1), Ok(0));
        partition.commit(1);
        assert_eq!(partition.send(7, 0, 1, 1), Ok(1));
        partition.producers.step_down();
        partition.in_flight.clear();
        assert_eq!(partition.send(7, 0, 2, 1), Err(Err(ErrorCode::OutOfOrderSequence)));
        assert_eq!(partition.send(7, 0, 1, 1), Ok(2));
    }

    #[test]
    fn a_checkpoint_restores_what_was_committed() {
        let mut partition = Partition::default();
        for first in 0..7 {
            partition.send(7, 3, first, 1).expect("in order");
        }
        partition.send(8, 0, 0, 4).expect("in order");
        partition.commit(7);
        let bytes = partition.producers.checkpoint();
        let mut restored = Producers::default();
        restored.restore(&bytes).expect("own bytes");
        assert_eq!(restored.committed, partition.producers.committed);
        assert!(restored.overlay.is_empty() && !restored.committed.contains_key(&ProducerId::new(8)));
        assert_eq!(restored.checkpoint(), bytes);
        assert!(restored.restore(b"\xff\xff").is_err());
        restored.restore(b"").expect("from nothing");
        assert!(restored.committed.is_empty());
    }
}
