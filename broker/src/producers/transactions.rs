//! The transactions of one partition: where open ones begin, and which were aborted.

use std::collections::{BTreeMap, VecDeque};

use flowstone_protocol::{Offset, ProducerId};

/// A transaction that was aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Aborted {
    pub(super) producer: ProducerId,
    pub(super) first: Offset,
    /// Its marker.
    pub(super) last: Offset,
    /// The last stable offset right behind the marker: all that was aborted later begins there or further on.
    pub(super) stable: Offset,
}

/// What is committed of a partition's transactions.
///
/// ```text
///   offsets   ..  4   5   6   7   8   9
///   producer      A   B   A   A!  B   C          A! aborts A
///   open: B at 5, C at 9 -> last stable offset 5; aborted: A from 4 to 7
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Transactions {
    /// By where they begin.
    open: BTreeMap<Offset, ProducerId>,
    /// In the order of their markers; those that end below the log start are dropped.
    aborted: VecDeque<Aborted>,
}

impl Transactions {
    /// One begins.
    pub(super) fn open(&mut self, first: Offset, producer: ProducerId) {
        self.open.insert(first, producer);
    }

    /// The one that began at `first` has ended, with its marker at `marker`.
    pub(super) fn end(&mut self, first: Offset, marker: Offset, commit: bool) {
        let Some(producer) = self.open.remove(&first) else { return };
        if !commit {
            let stable = self.stable(marker.next());
            self.aborted.push_back(Aborted { producer, first, last: marker, stable });
        }
    }

    /// Where the oldest open one begins; `end` where none does below that.
    pub(super) fn stable(&self, end: Offset) -> Offset {
        self.open.first_key_value().map_or(end, |(first, _)| end.min(*first))
    }

    /// Those that begin below `offset`.
    pub(super) fn open_below(&self, offset: Offset) -> impl Iterator<Item = (Offset, ProducerId)> + '_ {
        self.open.range(..offset).map(|(first, producer)| (*first, *producer))
    }

    /// Of the one that began at `first` nothing is left.
    pub(super) fn let_go(&mut self, first: Offset) {
        self.open.remove(&first);
    }

    pub(super) fn open_count(&self) -> usize {
        self.open.len()
    }

    /// How many aborted ones readers are told of.
    pub(super) fn aborted_count(&self) -> usize {
        self.aborted.len()
    }

    /// Those aborted that have batches between two offsets.
    pub(super) fn aborted_between(&self, from: Offset, to: Offset) -> Vec<(ProducerId, Offset)> {
        let begin = self.aborted.partition_point(|aborted| aborted.last < from);
        let mut found = Vec::new();
        for aborted in self.aborted.range(begin..) {
            if aborted.first < to {
                found.push((aborted.producer, aborted.first));
            }
            if aborted.stable >= to {
                break;
            }
        }
        found
    }

    /// Nothing below `log_start` is read any more.
    pub(super) fn prune(&mut self, log_start: Offset) {
        while self.aborted.pop_front_if(|aborted| aborted.last < log_start).is_some() {}
    }

    pub(super) fn aborted(&self) -> impl Iterator<Item = &Aborted> {
        self.aborted.iter()
    }

    /// From a checkpoint, in the order in which [`Transactions::aborted`] gave them.
    pub(super) fn push_aborted(&mut self, aborted: Aborted) {
        self.aborted.push_back(aborted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: i64) -> Offset {
        Offset::new(offset)
    }

    #[test]
    fn what_was_aborted_is_found_by_every_range_that_touches_it() {
        let mut transactions = Transactions::default();
        let mut all: Vec<(i64, i64, i64)> = Vec::new();
        // Nested and side by side: (producer, first, marker).
        let rows = [(1, 0, 3), (2, 1, 9), (3, 4, 6), (4, 5, 14), (5, 10, 12), (6, 11, 20), (7, 21, 22)];
        let mut events: Vec<(i64, bool, i64)> = Vec::new();
        for (producer, first, marker) in rows {
            events.push((first, true, producer));
            events.push((marker, false, producer));
        }
        events.sort_unstable();
        let first_of = |producer| rows.iter().find(|row| row.0 == producer).map_or(0, |row| row.1);
        for (offset, begins, producer) in events {
            if begins {
                transactions.open(at(offset), ProducerId::new(producer));
            } else {
                // The even ones are committed.
                transactions.end(at(first_of(producer)), at(offset), producer % 2 == 0);
                if producer % 2 == 1 {
                    all.push((producer, first_of(producer), offset));
                }
            }
            assert!(transactions.stable(at(offset + 1)) <= at(offset + 1));
        }
        assert_eq!(transactions.open_count(), 0);
        for from in 0..24 {
            for to in from..24 {
                let mut found: Vec<i64> =
                    transactions.aborted_between(at(from), at(to)).iter().map(|(producer, _)| producer.get()).collect();
                found.sort_unstable();
                let wanted: Vec<i64> = all
                    .iter()
                    .filter(|(_, first, marker)| *first < to && *marker >= from)
                    .map(|(producer, ..)| *producer)
                    .collect();
                assert_eq!(found, wanted, "{from}..{to}");
            }
        }
        transactions.prune(at(7));
        assert_eq!(transactions.aborted().count(), all.iter().filter(|(.., marker)| *marker >= 7).count());
    }
}
