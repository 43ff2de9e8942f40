//! Whose turn it is to have its markers written.
//!
//! A place is for work, not for waiting: a decision with a partition that cannot be reached gives its place up after each
//! try, and comes again after a pause. So one partition that is out of reach delays nobody else.
//!
//! ```text
//!   decided --begin--> has a place --ended--> gone
//!                        |     ^
//!                      again   | begin_due, for at most half of the places
//!                        v     |
//!                        waits
//! ```

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowstone_protocol::{LeaderEpoch, TopicPartition};

use super::state::Decision;

/// Between two tries of what a partition did not take; doubles.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// One decision that is being carried out: by the coordinator of a partition and leader epoch, of a transactional id.
pub(crate) type Ending = (TopicPartition, LeaderEpoch, Arc<str>, Decision);

/// One try to carry a decision out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) ending: Ending,
    /// Partitions that lack their marker.
    pub(crate) left: BTreeSet<TopicPartition>,
    /// Before the next try.
    pause: Duration,
}

/// All that are known of, in memory alone.
#[derive(Debug)]
pub(crate) struct Endings {
    places: usize,
    /// Those that have a place; and of them those that have had one before.
    working: HashSet<Ending>,
    again: HashSet<Ending>,
    /// Those that wait, by when they are due; the number tells equal ones apart.
    waiting: BTreeMap<(Instant, u64), Turn>,
    waiting_of: HashSet<Ending>,
    next: u64,
}

impl Endings {
    pub(crate) fn new(places: usize) -> Self {
        Self {
            places,
            working: HashSet::new(),
            again: HashSet::new(),
            waiting: BTreeMap::new(),
            waiting_of: HashSet::new(),
            next: 0,
        }
    }

    /// Whether it has a place, or waits for one again.
    pub(crate) fn is_known(&self, ending: &Ending) -> bool {
        self.working.contains(ending) || self.waiting_of.contains(ending)
    }

    /// Places that nobody has.
    pub(crate) fn room(&self) -> usize {
        self.places.saturating_sub(self.working.len())
    }

    /// A decision that was not known is given a place; `None` where there is none.
    pub(crate) fn begin(&mut self, ending: Ending, left: BTreeSet<TopicPartition>) -> Option<Turn> {
        if self.room() == 0 || self.is_known(&ending) {
            return None;
        }
        self.working.insert(ending.clone());
        Some(Turn { ending, left, pause: RETRY_MIN })
    }

    /// One whose pause is over is given a place again. Half of the places are for those that were never tried.
    pub(crate) fn begin_due(&mut self, now: Instant) -> Option<Turn> {
        if self.next_due()? > now {
            return None;
        }
        let (_, turn) = self.waiting.pop_first()?;
        self.waiting_of.remove(&turn.ending);
        self.working.insert(turn.ending.clone());
        self.again.insert(turn.ending.clone());
        Some(turn)
    }

    /// When the next one may be given a place again; `None` where none waits, or there is no place for it.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let (due, _) = *self.waiting.first_key_value()?.0;
        (self.room() > 0 && self.again.len() < self.places.div_ceil(2)).then_some(due)
    }

    /// It is carried out, or another coordinator's.
    pub(crate) fn ended(&mut self, ending: &Ending) {
        self.working.remove(ending);
        self.again.remove(ending);
    }

    /// Something is left to be done: it waits, and its place is free.
    pub(crate) fn again(&mut self, turn: Turn, now: Instant) {
        self.ended(&turn.ending);
        if self.waiting_of.insert(turn.ending.clone()) {
            let due = now + turn.pause;
            let pause = (turn.pause * 2).min(RETRY_MAX);
            self.waiting.insert((due, self.next), Turn { pause, ..turn });
            self.next += 1;
        }
    }

    /// Nothing is known any more.
    pub(crate) fn clear(&mut self) {
        *self = Self { next: self.next, ..Self::new(self.places) };
    }
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::{ProducerEpoch, ProducerId};

    use super::super::table_tests::tp;
    use super::*;

    fn ending(id: i64) -> Ending {
        let decision = Decision { producer: ProducerId::new(id), epoch: ProducerEpoch::new(1), commit: true };
        (tp(0), LeaderEpoch::new(1), id.to_string().into(), decision)
    }

    fn left() -> BTreeSet<TopicPartition> {
        BTreeSet::from([tp(1)])
    }

    /// What is given places at `now`, and keeps them.
    fn begun(endings: &mut Endings, fresh: impl IntoIterator<Item = i64>, now: Instant) -> Vec<Turn> {
        let mut begun = Vec::new();
        while let Some(turn) = endings.begin_due(now) {
            begun.push(turn);
        }
        begun.extend(fresh.into_iter().filter_map(|id| endings.begin(ending(id), left())));
        begun
    }

    #[test]
    fn one_that_cannot_be_ended_holds_nobody_up() {
        let mut endings = Endings::new(2);
        let mut now = Instant::now();
        // Two whose partition nobody leads; the third and the fourth are decided while they are tried.
        let stuck = begun(&mut endings, [1, 2, 3], now);
        assert_eq!(stuck.len(), 2);
        for turn in stuck {
            endings.again(turn, now);
        }
        let third = begun(&mut endings, [1, 2, 3, 4], now);
        let ids: Vec<_> = third.iter().map(|turn| turn.ending.3.producer.get()).collect();
        assert_eq!(ids, [3, 4], "those that wait are not begun a second time, and have no place");
        for turn in third {
            endings.ended(&turn.ending);
        }
        // For ever: whatever waits, half of the places are not for it.
        for fresh in 5..200 {
            now += RETRY_MAX;
            let turns = begun(&mut endings, [fresh], now);
            let ids: BTreeSet<_> = turns.iter().map(|turn| turn.ending.3.producer.get()).collect();
            assert!(ids.contains(&fresh) && ids.len() == 2, "{ids:?}");
            for turn in turns {
                match turn.ending.3.producer.get() {
                    1 | 2 => endings.again(turn, now),
                    _ => endings.ended(&turn.ending),
                }
            }
        }
    }

    #[test]
    fn one_that_waits_keeps_what_is_left_and_comes_again_less_and_less_often() {
        let mut endings = Endings::new(4);
        let mut now = Instant::now();
        let mut turn = endings.begin(ending(1), left()).expect("a place");
        assert_eq!(endings.begin(ending(1), left()), None);
        let mut pauses = Vec::new();
        for round in 0..10 {
            turn.left = BTreeSet::from([tp(round)]);
            endings.again(turn, now);
            let due = endings.next_due().expect("it waits");
            assert_eq!(endings.begin_due(due - Duration::from_nanos(1)), None, "before its time");
            pauses.push(due - now);
            now = due;
            turn = endings.begin_due(now).expect("due");
            assert_eq!(turn.left, BTreeSet::from([tp(round)]));
        }
        assert!(pauses.is_sorted() && pauses[0] == RETRY_MIN && pauses[9] == RETRY_MAX, "{pauses:?}");
        endings.ended(&turn.ending);
        assert!(!endings.is_known(&turn.ending) && endings.next_due().is_none());
        assert!(endings.begin(ending(1), left()).is_some(), "it may be begun anew");
    }
}
