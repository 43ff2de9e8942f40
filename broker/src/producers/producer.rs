//! One producer, as far as a partition knows it.

use std::collections::VecDeque;

use flowstone_protocol::{LeaderEpoch, Marker, Offset, ProducerEpoch, ProducerId, RaftIndex, Sequence, Timestamp};
use flowstone_replication::MachineEntry;

/// Batches remembered per producer: as many as a producer has in flight, so that whichever of them is sent again is
/// recognised.
pub(super) const BATCHES_MAX: usize = 5;

/// A batch that a producer wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) first: Sequence,
    pub(super) last: Sequence,
    pub(super) base_offset: Offset,
    pub(super) index: RaftIndex,
    pub(super) timestamp: Timestamp,
}

impl Batch {
    /// Of its last record.
    pub(super) fn last_offset(&self) -> Offset {
        // Sequences go round at 2^31.
        let records_after = self.last.get().wrapping_sub(self.first.get()) & i32::MAX;
        self.base_offset.plus(records_after.into())
    }
}

/// How a producer's last transaction in this partition ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// The marker's: one above the transaction's.
    pub(super) epoch: ProducerEpoch,
    pub(super) commit: bool,
    pub(super) coordinator: LeaderEpoch,
    /// The marker.
    pub(super) offset: Offset,
    pub(super) index: RaftIndex,
    pub(super) timestamp: Timestamp,
}

/// One producer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Producer {
    pub(super) epoch: ProducerEpoch,
    /// Of this epoch, oldest first, never above [`BATCHES_MAX`]. None after a marker, until the next transaction writes.
    pub(super) batches: VecDeque<Batch>,
    /// It writes in transactions alone.
    pub(super) transactional: bool,
    /// Where its open transaction begins.
    pub(super) open: Option<Offset>,
    pub(super) ended: Option<Ended>,
    /// Its last entry in the log.
    pub(super) last_index: RaftIndex,
}

/// What an entry of the log says of a producer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Said {
    Wrote { id: ProducerId, epoch: ProducerEpoch, transactional: bool, batch: Batch },
    Ended { id: ProducerId, ended: Ended },
}

impl Said {
    /// A batch of a producer's; `None` where it has none, and for the log's own.
    pub(super) fn wrote(entry: &MachineEntry<'_>) -> Option<Self> {
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
        let (id, epoch) = (header.producer_id, header.producer_epoch);
        Some(Self::Wrote { id, epoch, transactional: header.attributes.is_transactional(), batch })
    }

    /// The marker that the entry is.
    pub(super) fn ended(entry: &MachineEntry<'_>, marker: &Marker) -> Self {
        let ended = Ended {
            epoch: marker.producer_epoch,
            commit: marker.commit,
            coordinator: marker.coordinator_epoch,
            offset: entry.base_offset,
            index: entry.index,
            timestamp: entry.header.max_timestamp,
        };
        Self::Ended { id: marker.producer_id, ended }
    }

    pub(super) fn id(&self) -> ProducerId {
        match self {
            Self::Wrote { id, .. } | Self::Ended { id, .. } => *id,
        }
    }
}

impl Producer {
    /// One of which nothing is known yet.
    pub(super) fn unknown() -> Self {
        Self {
            epoch: ProducerEpoch::NONE,
            batches: VecDeque::new(),
            transactional: false,
            open: None,
            ended: None,
            last_index: RaftIndex::default(),
        }
    }

    /// Takes in what the log says of it. A new epoch begins anew.
    pub(super) fn take(&mut self, said: &Said) {
        match *said {
            Said::Wrote { epoch, transactional, batch, .. } => {
                if self.epoch != epoch {
                    self.epoch = epoch;
                    self.batches.clear();
                }
                if self.batches.len() == BATCHES_MAX {
                    self.batches.pop_front();
                }
                self.batches.push_back(batch);
                self.transactional = transactional;
                if transactional {
                    self.open.get_or_insert(batch.base_offset);
                }
                self.last_index = batch.index;
            }
            Said::Ended { ended, .. } => {
                self.epoch = ended.epoch;
                self.batches.clear();
                self.transactional = true;
                self.open = None;
                self.ended = Some(ended);
                self.last_index = ended.index;
            }
        }
    }

    pub(super) fn last(&self) -> Option<&Batch> {
        self.batches.back()
    }
}
