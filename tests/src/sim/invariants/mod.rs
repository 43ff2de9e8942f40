//! What must hold after every step of every replica: one invariant per file.

mod acknowledged_is_committed;
mod committed_never_changes;
mod committed_on_quorum;
mod leader_completeness;
mod log_matching;
mod nothing_goes_back;
mod one_leader_per_term;
mod promoted_has_caught_up;
mod replay_equals;
mod votes_are_kept;

use std::fmt::Debug;

use flowstone_protocol::{Offset, TopicPartition};
use flowstone_replication::{PeerMessage, Replica, Role};

use super::machine::{Heard, Listener, SimMachine};

/// A promise that was broken: both sides, for people.
pub(crate) type Held = Result<(), String>;

/// Where a partition that went on without its majority goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// The last entry that it kept.
    pub(crate) index: u64,
    /// One past its last offset.
    pub(crate) offset: Offset,
}

/// One replica, looked at after a round of its shard.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sight<'a> {
    pub(crate) who: Listener,
    pub(crate) replica: &'a Replica<SimMachine>,
    /// Another one after each opening.
    pub(crate) life: u64,
    /// What is written counts, flushed or not.
    pub(crate) is_relaxed: bool,
}

impl Sight<'_> {
    pub(crate) fn leads(&self) -> bool {
        matches!(self.replica.status().role, Role::Elected | Role::Leader)
    }
}

/// Looks at everything, says nothing until it is broken.
pub(crate) trait Invariant: Debug {
    /// A replica after a round.
    fn replica(&mut self, _sight: &Sight<'_>) -> Held {
        Ok(())
    }

    /// What a machine was given.
    fn heard(&mut self, _who: Listener, _what: &Heard) -> Held {
        Ok(())
    }

    /// A message on its way out.
    fn sent(&mut self, _tp: TopicPartition, _message: &PeerMessage) -> Held {
        Ok(())
    }

    /// A client was told that all before this offset is with a quorum.
    fn acknowledged(&mut self, _tp: TopicPartition, _next: Offset) -> Held {
        Ok(())
    }

    /// What this replica had may be gone: its disk was wiped, or rots.
    fn damaged(&mut self, _who: Listener) {}

    /// A partition goes on without its majority: what lies above the cut never was.
    fn recovered(&mut self, _tp: TopicPartition, _cut: Cut) {}

    /// A replica when all has healed and nothing is in flight.
    fn at_rest(&mut self, _sight: &Sight<'_>) -> Held {
        Ok(())
    }

    /// It ended in this round: what it did last was not looked at.
    fn ended(&mut self, _who: Listener) {}

    /// It crashed in the middle of an operation: what that did is not known.
    fn interrupted(&mut self, _who: Listener) {}
}

/// All of them, with their names.
pub(crate) fn all() -> Vec<(&'static str, Box<dyn Invariant>)> {
    vec![
        ("one leader per term", Box::<one_leader_per_term::OneLeaderPerTerm>::default()),
        ("log matching", Box::<log_matching::LogMatching>::default()),
        ("leader completeness", Box::<leader_completeness::LeaderCompleteness>::default()),
        ("committed on a quorum", Box::<committed_on_quorum::CommittedOnQuorum>::default()),
        ("committed never changes", Box::<committed_never_changes::CommittedNeverChanges>::default()),
        ("nothing goes back", Box::<nothing_goes_back::NothingGoesBack>::default()),
        ("votes are kept", Box::<votes_are_kept::VotesAreKept>::default()),
        ("promoted has caught up", Box::<promoted_has_caught_up::PromotedHasCaughtUp>::default()),
        ("replay equals", Box::<replay_equals::ReplayEquals>::default()),
        ("acknowledged is committed", Box::<acknowledged_is_committed::AcknowledgedIsCommitted>::default()),
    ]
}
