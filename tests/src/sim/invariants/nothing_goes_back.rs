//! Term, commit, high watermark and log start of a replica never go back while it lives; and what was flushed is there
//! when it is opened again, unless its disk was damaged.

use std::collections::BTreeMap;

use flowstone_protocol::{Offset, RaftIndex, Term};
use flowstone_replication::Role;

use super::super::machine::Listener;
use super::{Held, Invariant, Sight};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    life: u64,
    term: Term,
    applied: RaftIndex,
    high_watermark: Offset,
    log_start: Offset,
    flushed: RaftIndex,
}

#[derive(Debug, Default)]
pub(super) struct NothingGoesBack {
    seen: BTreeMap<Listener, Seen>,
}

impl Invariant for NothingGoesBack {
    fn replica(&mut self, sight: &Sight<'_>) -> Held {
        let Sight { who, replica, life, is_relaxed } = *sight;
        let status = replica.status();
        if matches!(status.role, Role::Opening | Role::Pulling) {
            return Ok(());
        }
        let now = Seen {
            life,
            term: status.term,
            applied: replica.applied(),
            high_watermark: status.high_watermark,
            log_start: status.log_start,
            flushed: replica.log().flushed_index(),
        };
        let Some(before) = self.seen.insert(who, now) else { return Ok(()) };
        let went_back = if before.life == life {
            now.term < before.term
                || now.applied < before.applied
                || now.high_watermark < before.high_watermark
                || now.log_start < before.log_start
        } else {
            !is_relaxed && replica.log().last_index() < before.flushed
        };
        if went_back {
            return Err(format!("{}: replica {} was at {before:?} and is at {now:?}", who.tp, who.replica));
        }
        Ok(())
    }

    fn damaged(&mut self, who: Listener) {
        self.seen.remove(&who);
    }

    // It may have cut its log in the round in which it ended.
    fn ended(&mut self, who: Listener) {
        self.seen.remove(&who);
    }

    fn interrupted(&mut self, who: Listener) {
        self.seen.remove(&who);
    }
}
