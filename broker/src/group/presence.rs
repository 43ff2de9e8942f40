//! How long a member was silent, and for how long it has kept what it was asked to give up: known in memory alone, by whoever
//! coordinates its group.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use flowstone_protocol::TopicPartition;

use super::state::Member;

/// What a coordinator has seen of one member.
#[derive(Clone, Debug)]
pub(crate) struct Presence {
    heard: Instant,
    /// What it has to give up, and since when: each partition has a rebalance timeout of its own.
    revoking: BTreeMap<TopicPartition, Instant>,
}

/// What follows for the member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Stays,
    /// Nothing was heard of it for its session timeout: it is removed.
    IsSilent,
    /// It keeps what it was asked for longer than its rebalance timeout: it is removed, too.
    Keeps,
}

impl Presence {
    /// It has a whole session from now on.
    pub(crate) fn new(now: Instant) -> Self {
        Self { heard: now, revoking: BTreeMap::new() }
    }

    /// It said something.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// This process stood still: nothing is held against the member of what it could not see.
    pub(crate) fn anew(&mut self, now: Instant) {
        self.heard = now;
        self.revoking.values_mut().for_each(|since| *since = now);
    }

    /// This is what it has to give up now, sorted.
    pub(crate) fn asked(&mut self, revoking: &[TopicPartition], now: Instant) {
        self.revoking.retain(|tp, _| revoking.binary_search(tp).is_ok());
        for tp in revoking {
            self.revoking.entry(*tp).or_insert(now);
        }
    }

    pub(crate) fn verdict(&self, member: &Member, now: Instant) -> Verdict {
        if now.saturating_duration_since(self.heard) > member.session_timeout() {
            Verdict::IsSilent
        } else if self.keeps(member.rebalance_timeout(), now) {
            Verdict::Keeps
        } else {
            Verdict::Stays
        }
    }

    /// Whether it keeps something for longer than `timeout`.
    fn keeps(&self, timeout: Duration, now: Instant) -> bool {
        self.revoking.values().any(|since| now.saturating_duration_since(*since) > timeout)
    }
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::{PartitionId, TopicId};

    use super::*;

    fn tp(partition: i32) -> TopicPartition {
        TopicPartition { topic: TopicId::new(1), partition: PartitionId::new(partition) }
    }

    #[test]
    fn whoever_gives_up_what_it_is_asked_for_is_not_removed_in_a_long_series_of_rebalances() {
        let (start, timeout) = (Instant::now(), Duration::from_secs(60));
        let mut presence = Presence::new(start);
        // Every 20 s it is asked for another one, in the same moment in which it gives the last one up.
        for round in 0..30 {
            let now = start + Duration::from_secs(20) * round;
            presence.asked(&[tp(round as i32)], now);
            assert!(!presence.keeps(timeout, now), "round {round}");
        }
        // One that it keeps counts, whatever else it gives up.
        let asked = start + Duration::from_secs(600);
        for round in 0..5 {
            let now = asked + Duration::from_secs(20) * round;
            presence.asked(&[tp(100), tp(200 + round as i32)], now);
            assert_eq!(presence.keeps(timeout, now), round > 3, "round {round}");
        }
        presence.asked(&[], asked);
        assert!(!presence.keeps(timeout, asked + timeout * 10));
    }
}
