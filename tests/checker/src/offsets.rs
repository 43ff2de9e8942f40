//! Two sets over offsets: the value at each, and the ranges that some reader has passed.

use std::collections::BTreeMap;

use crate::history::ValueId;

/// Values of a page.
const PAGE: usize = 512;
/// No value; numbers of values begin at 0 and never get here.
const NONE: u64 = u64::MAX;

/// The value at each offset: 8 bytes each where offsets are dense, and a page for each where they are not.
#[derive(Clone, Debug, Default)]
pub(crate) struct OffsetMap {
    pages: BTreeMap<i64, Box<[u64; PAGE]>>,
    highest: Option<i64>,
}

impl OffsetMap {
    /// Puts a value where none is.
    ///
    /// # Errors
    /// The value that is there; it stays.
    pub(crate) fn insert(&mut self, offset: i64, value: ValueId) -> Result<(), ValueId> {
        let page = self.pages.entry(offset.div_euclid(PAGE as i64)).or_insert_with(|| Box::new([NONE; PAGE]));
        let slot = &mut page[offset.rem_euclid(PAGE as i64) as usize];
        if *slot != NONE {
            return Err(ValueId::new(*slot));
        }
        *slot = value.get();
        self.highest = self.highest.max(Some(offset));
        Ok(())
    }

    /// Forgets all from `end` on.
    pub(crate) fn cut(&mut self, end: i64) {
        let first = end.div_euclid(PAGE as i64);
        self.pages.retain(|number, _| *number <= first);
        if let Some(page) = self.pages.get_mut(&first) {
            page[end.rem_euclid(PAGE as i64) as usize..].fill(NONE);
        }
        let highest = self.pages.iter().rev().find_map(|(number, page)| {
            let at = page.iter().rposition(|value| *value != NONE)?;
            Some(number * PAGE as i64 + at as i64)
        });
        self.highest = highest;
    }

    pub(crate) fn get(&self, offset: i64) -> Option<ValueId> {
        let page = self.pages.get(&offset.div_euclid(PAGE as i64))?;
        let slot = page[offset.rem_euclid(PAGE as i64) as usize];
        (slot != NONE).then_some(ValueId::new(slot))
    }

    /// The highest offset that has a value.
    pub(crate) fn highest(&self) -> Option<i64> {
        self.highest
    }

    /// Offsets in `from..to` that have a value, in order.
    pub(crate) fn range(&self, from: i64, to: i64) -> impl Iterator<Item = (i64, ValueId)> + '_ {
        let first = from.div_euclid(PAGE as i64);
        let last = to.div_euclid(PAGE as i64);
        let pages = (first <= last).then(|| self.pages.range(first..=last)).into_iter().flatten();
        pages
            .flat_map(|(number, page)| {
                let base = number * PAGE as i64;
                page.iter().enumerate().map(move |(at, value)| (base + at as i64, *value))
            })
            .filter(move |(offset, value)| *value != NONE && from <= *offset && *offset < to)
            .map(|(offset, value)| (offset, ValueId::new(value)))
    }
}

/// Ranges of offsets, merged when asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges(Vec<(i64, i64)>);

impl Ranges {
    /// Adds `from..to`.
    pub(crate) fn add(&mut self, from: i64, to: i64) {
        if from < to {
            self.0.push((from, to));
            // Kept small while it grows: readers that are assigned anew add much the same ranges again and again.
            if self.0.len() >= 64 && self.0.len().is_power_of_two() {
                self.merge();
            }
        }
    }

    /// Forgets all from `end` on.
    pub(crate) fn cut(&mut self, end: i64) {
        for range in &mut self.0 {
            range.1 = range.1.min(end);
        }
        self.0.retain(|(from, to)| from < to);
    }

    /// Sorts, and joins what touches: [`contains`](Self::contains) needs it.
    pub(crate) fn merge(&mut self) {
        self.0.sort_unstable();
        let mut merged: Vec<(i64, i64)> = Vec::with_capacity(self.0.len());
        for &(from, to) in &self.0 {
            match merged.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(to),
                _ => merged.push((from, to)),
            }
        }
        self.0 = merged;
    }

    /// Whether some range has it, once merged.
    pub(crate) fn contains(&self, offset: i64) -> bool {
        let after = self.0.partition_point(|(from, _)| *from <= offset);
        after > 0 && offset < self.0[after - 1].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_of_offsets_is_a_map() {
        let mut map = OffsetMap::default();
        let wild = [i64::MAX - 1, 0, 511, 512, 513, 1 << 40];
        for (number, offset) in wild.iter().enumerate() {
            assert_eq!(map.insert(*offset, ValueId::new(number as u64)), Ok(()));
            assert_eq!(map.insert(*offset, ValueId::new(99)), Err(ValueId::new(number as u64)));
        }
        assert_eq!((map.get(512), map.get(514)), (Some(ValueId::new(3)), None));
        assert_eq!(map.highest(), Some(i64::MAX - 1));
        let within: Vec<i64> = map.range(1, 513).map(|(offset, _)| offset).collect();
        assert_eq!(within, [511, 512]);
        assert_eq!(map.range(5, 5).count(), 0);
    }

    #[test]
    fn what_is_cut_is_forgotten() {
        let mut map = OffsetMap::default();
        for offset in [3, 511, 512, 700, 5_000] {
            map.insert(offset, ValueId::new(offset as u64)).expect("free");
        }
        map.cut(512);
        assert_eq!((map.highest(), map.get(511), map.get(512)), (Some(511), Some(ValueId::new(511)), None));
        map.insert(700, ValueId::new(1)).expect("free again");
        map.cut(0);
        assert_eq!(map.highest(), None);
        let mut ranges = Ranges(vec![(0, 10), (20, 30)]);
        ranges.cut(5);
        assert_eq!(ranges.0, [(0, 5)]);
    }

    #[test]
    fn ranges_join() {
        let mut ranges = Ranges::default();
        for (from, to) in [(10, 20), (0, 5), (20, 21), (4, 7), (30, 30)] {
            ranges.add(from, to);
        }
        ranges.merge();
        assert_eq!(ranges.0, [(0, 7), (10, 21)]);
        let there: Vec<i64> = (-1..32).filter(|offset| ranges.contains(*offset)).collect();
        assert_eq!(there, (0..7).chain(10..21).collect::<Vec<_>>());
    }
}
