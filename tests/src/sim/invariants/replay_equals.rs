//! The state of a machine follows from its log: it is that of a replay from the log's beginning, on every replica, after every
//! restart, and on a leader with what it has in flight.

use std::collections::BTreeMap;

use bytes::Bytes;
use flowstone_broker::simulation::LogMachine;
use flowstone_protocol::TopicPartition;
use flowstone_replication::{Machine, Role};
use flowstone_storage::checkpoint::CREATION_INDEX;

use super::super::groups::Kind;
use super::super::machine::{CommittedEntry, Heard, Listener};
use super::super::plan::Plan;
use super::{Cut, Held, Invariant, Sight};

/// One log, replayed by a machine that never crashed, never led and was never restored.
#[derive(Debug)]
struct Replay {
    machine: LogMachine,
    /// All entries from the first on, to begin again from.
    entries: Vec<CommittedEntry>,
    /// The state after some of them.
    states: BTreeMap<u64, Bytes>,
    /// An entry was missed: those who crashed in the moment in which they committed it told nobody.
    has_gap: bool,
}

impl Replay {
    fn new(tp: TopicPartition) -> Self {
        Self { machine: machine_of(tp), entries: Vec::new(), states: BTreeMap::new(), has_gap: false }
    }

    fn last(&self) -> u64 {
        CREATION_INDEX.get() + self.entries.len() as u64
    }

    fn take(&mut self, entry: &CommittedEntry) {
        let (index, next) = (entry.index.get(), self.last() + 1);
        self.has_gap |= index > next;
        if index == next && !self.has_gap {
            entry.give(&mut self.machine);
            self.entries.push(entry.clone());
        }
    }

    /// The state after an entry; `None` where it is not known, or not any more.
    fn state(&mut self, index: u64) -> Option<&Bytes> {
        if index == self.last() && !self.has_gap {
            let machine = &self.machine;
            return Some(self.states.entry(index).or_insert_with(|| machine.checkpoint()));
        }
        self.states.get(&index)
    }
}

fn machine_of(tp: TopicPartition) -> LogMachine {
    match Kind::of(tp.topic) {
        Kind::Metadata => LogMachine::metadata().0,
        Kind::Transactions => LogMachine::transactions().0,
        Kind::Groups => LogMachine::groups(Plan::OFFSETS_KEPT).0,
        Kind::Records | Kind::Keyed => LogMachine::records(),
    }
}

#[derive(Debug, Default)]
pub(super) struct ReplayEquals {
    logs: BTreeMap<TopicPartition, Replay>,
}

impl ReplayEquals {
    fn compare(&mut self, who: Listener, index: u64, state: &Bytes, what: &str) -> Held {
        let replay = self.logs.entry(who.tp).or_insert_with(|| Replay::new(who.tp));
        match replay.state(index) {
            Some(known) if known != state => Err(format!(
                "{}: after entry {index} {what} of replica {} is not what a replay gives: {known:?}, {state:?}",
                who.tp, who.replica
            )),
            _ => Ok(()),
        }
    }
}

impl Invariant for ReplayEquals {
    fn heard(&mut self, who: Listener, what: &Heard) -> Held {
        match what {
            Heard::Committed(entry) => {
                self.logs.entry(who.tp).or_insert_with(|| Replay::new(who.tp)).take(entry);
                Ok(())
            }
            Heard::State { index, state } => self.compare(who, index.get(), state, "the state"),
            Heard::Leads => Ok(()),
        }
    }

    fn recovered(&mut self, tp: TopicPartition, cut: Cut) {
        let Some(replay) = self.logs.get_mut(&tp) else { return };
        replay.entries.truncate(cut.index.saturating_sub(CREATION_INDEX.get()) as usize);
        replay.states.retain(|index, _| *index <= cut.index);
        replay.machine = machine_of(tp);
        for entry in &replay.entries {
            entry.give(&mut replay.machine);
        }
        // It may have kept entries of which nobody was told that they are committed.
        replay.has_gap |= replay.last() < cut.index;
    }

    fn at_rest(&mut self, sight: &Sight<'_>) -> Held {
        let Sight { who, replica, .. } = *sight;
        if matches!(replica.status().role, Role::Opening | Role::Pulling) {
            return Ok(());
        }
        let machine = replica.machine().inner();
        self.compare(who, replica.applied().get(), &machine.checkpoint(), "the state")?;
        if let Some(live) = machine.live_checkpoint()
            && replica.applied() == replica.log().last_index()
        {
            self.compare(who, replica.applied().get(), &live, "the leader's live state")?;
        }
        Ok(())
    }
}
