//! Marks that only ever go up, as asked for by several observers at once.

use std::collections::HashMap;

use crate::history::LogId;

/// A group whose committed offsets are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupId(pub(crate) u32);

/// Someone who asks for marks in one session, one question after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObserverId(pub(crate) u32);

/// A position that never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mark {
    /// One past the last offset that can be read.
    HighWatermark,
    /// One past the last offset that a committed reader can read.
    LastStableOffset,
    /// First offset that can be read.
    LogStart,
    /// What a group has committed.
    Committed(GroupId),
}

impl Mark {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mark::HighWatermark => "high watermark",
            Mark::LastStableOffset => "last stable offset",
            Mark::LogStart => "log start",
            Mark::Committed(_) => "committed offset",
        }
    }
}

/// What an answer is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    /// With all that was known anywhere when it was asked for: other fresh answers, acknowledgements, reads. For
    /// linearizable questions.
    Fresh,
    /// With what this observer was told before. For a replica that may be behind.
    Session(ObserverId),
}

/// A question that is under way; [`History::told`](crate::History::told) takes its answer.
#[derive(Clone, Copy, Debug)]
#[must_use = "an answer that is not told is not judged"]
pub struct Asked {
    pub(crate) log: LogId,
    pub(crate) mark: Mark,
    pub(crate) view: View,
    /// What was known when it was asked.
    pub(crate) floor: i64,
}

/// The highest that is known of each mark.
#[derive(Clone, Debug, Default)]
pub(crate) struct Marks(HashMap<(LogId, Mark, View), i64>);

impl Marks {
    pub(crate) fn known(&self, log: LogId, mark: Mark, view: View) -> i64 {
        self.0.get(&(log, mark, view)).copied().unwrap_or(i64::MIN)
    }

    pub(crate) fn raise(&mut self, log: LogId, mark: Mark, view: View, to: i64) {
        let known = self.0.entry((log, mark, view)).or_insert(to);
        *known = to.max(*known);
    }

    /// What was known of it counts no more.
    pub(crate) fn forget(&mut self, log: LogId, mark: Mark) {
        self.0.retain(|(of, known, _), _| (*of, *known) != (log, mark));
    }
}
