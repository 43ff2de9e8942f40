//! Values that were made of what was read before: each part of the source is in them once, or, in a pipeline that promises
//! less, at most or at least once.

use crate::anomaly::Kind;
use crate::history::{History, LogId, ValueId};
use flowstone_protocol::Offset;

/// A value that was made of the offsets `from..to` of a log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Derived {
    pub(crate) value: ValueId,
    source: LogId,
    from: i64,
    to: i64,
}

/// All of `from..to` of a log was made into values, each offset in one of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Consumed {
    source: LogId,
    from: i64,
    to: i64,
}

impl History {
    /// A value is made of the offsets `from..to` of `source`. Where committed readers are given two values that are made of
    /// one offset, that is a duplicate.
    pub fn derived(&mut self, value: ValueId, source: LogId, from: Offset, to: Offset) {
        self.derived.push(Derived { value, source, from: from.get(), to: to.get() });
    }

    /// When everything was read: what was made of the offsets `from..to` of `source`, all of them, is to have been given to
    /// committed readers. An offset of which nothing came is lost.
    pub fn consumed(&mut self, source: LogId, from: Offset, to: Offset) {
        self.consumed.push(Consumed { source, from: from.get(), to: to.get() });
    }

    /// What was made of a log and given to committed readers, by offset.
    fn made_of(&self, source: LogId) -> Vec<Derived> {
        let given = self.derived.iter().filter(|it| it.source == source && self.is_given_to_committed(it.value));
        let mut made: Vec<Derived> = given.copied().collect();
        made.sort_unstable_by_key(|it| (it.from, it.to, it.value));
        made
    }

    /// What was processed twice, or never: kind, log, offset and what to say.
    pub(crate) fn pipeline_anomalies(&self) -> Vec<(Kind, LogId, i64, String)> {
        let mut found = Vec::new();
        let mut sources: Vec<LogId> = self.derived.iter().map(|it| it.source).collect();
        sources.sort_unstable();
        sources.dedup();
        for source in sources {
            let made = self.made_of(source);
            let mut furthest: Option<Derived> = None;
            for it in made.iter().filter(|it| it.from < it.to) {
                if let Some(before) = furthest.filter(|before| it.from < before.to) {
                    let detail = format!(
                        "values {} and {} are made of it: of offsets {} to {}, and {} to {}",
                        before.value, it.value, before.from, before.to, it.from, it.to
                    );
                    found.push((Kind::Duplicate, source, it.from, detail));
                }
                furthest = furthest.filter(|before| before.to >= it.to).or(Some(*it));
            }
        }
        for Consumed { source, from, to } in &self.consumed {
            let mut at = *from;
            for it in self.made_of(*source) {
                if it.from > at {
                    break;
                }
                at = at.max(it.to);
            }
            if at < *to {
                let detail = format!(
                    "offsets from {at} on are consumed, up to {to}, and nothing that is made of them was given"
                );
                found.push((Kind::LostWrite, *source, at, detail));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use flowstone_protocol::PartitionId;

    use super::*;
    use crate::history::{Isolation, Observed, SenderKind};

    /// Values made of these ranges, all of them committed and read; and what is found once all up to `to` is consumed.
    fn found(ranges: &[(i64, i64)], to: i64) -> Vec<Kind> {
        let mut history = History::new();
        let (source, sink) = (history.log("in", PartitionId::new(0)), history.log("out", PartitionId::new(0)));
        let sender = history.sender(SenderKind::IDEMPOTENT);
        let reader = history.reader(Isolation::ReadCommitted);
        history.assigned(reader, sink, Offset::ZERO);
        for (number, (from, to)) in ranges.iter().enumerate() {
            let value = history.send(sender, sink, Duration::ZERO);
            history.derived(value, source, Offset::new(*from), Offset::new(*to));
            history.read(reader, sink, Offset::new(number as i64), Observed::Value(value));
        }
        // Nobody was given this one: it counts for nothing.
        let unseen = history.send(sender, sink, Duration::ZERO);
        history.derived(unseen, source, Offset::ZERO, Offset::new(100));
        history.consumed(source, Offset::ZERO, Offset::new(to));
        history.judge().counts.into_keys().collect()
    }

    #[test]
    fn what_is_processed_once_is_well() {
        assert_eq!(found(&[(0, 3), (3, 3), (3, 10)], 10), []);
        assert_eq!(found(&[(4, 10), (0, 4)], 8), []);
    }

    #[test]
    fn what_is_processed_twice_or_never_is_found() {
        assert_eq!(found(&[(0, 5), (4, 10)], 10), [Kind::Duplicate]);
        assert_eq!(found(&[(0, 10), (2, 3), (5, 6)], 10), [Kind::Duplicate]);
        assert_eq!(found(&[(0, 3), (5, 10)], 10), [Kind::LostWrite]);
        assert_eq!(found(&[(0, 3)], 4), [Kind::LostWrite]);
        assert_eq!(found(&[], 1), [Kind::LostWrite]);
    }
}
