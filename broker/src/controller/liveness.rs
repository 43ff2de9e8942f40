//! Which brokers are alive, as the controller hears them. In memory alone: what follows from it is written down as
//! fencing.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use flowstone_protocol::BrokerId;

use super::commands::MetadataCommand;
use super::table::MetadataTable;

/// What the controller has heard of the brokers since it leads.
#[derive(Clone, Debug)]
pub(crate) struct Liveness {
    session_timeout: Duration,
    /// When this controller began: brokers count as heard of then, or its first act would be to fence all of them.
    began: Instant,
    heard: HashMap<BrokerId, Heard>,
}

#[derive(Clone, Copy, Debug)]
struct Heard {
    at: Instant,
    incarnation: u64,
    stopping: bool,
}

impl Liveness {
    pub(crate) fn new(session_timeout: Duration, now: Instant) -> Self {
        Self { session_timeout, began: now, heard: HashMap::new() }
    }

    /// A broker said something; `stopping` when it is on its way out.
    pub(crate) fn heard(&mut self, broker: BrokerId, incarnation: u64, stopping: bool, now: Instant) {
        let heard = Heard { at: now, incarnation, stopping };
        let known = self.heard.entry(broker).or_insert(heard);
        // A word of an earlier start that arrives late says nothing of this one's health; the table knows which is which.
        if known.at <= now {
            *known = heard;
        }
    }

    /// For how long nothing was heard; `None` since this controller began.
    pub(crate) fn silence(&self, broker: BrokerId, now: Instant) -> Option<Duration> {
        self.heard.get(&broker).map(|heard| now.saturating_duration_since(heard.at))
    }

    /// Whether its session has ended.
    pub(crate) fn is_dead(&self, broker: BrokerId, now: Instant) -> bool {
        let heard = self.heard.get(&broker).map_or(self.began, |heard| heard.at);
        now.saturating_duration_since(heard) > self.session_timeout
    }

    /// Brokers to fence and to take back. A broker that is stopping is fenced at once: it is given nothing more.
    pub(crate) fn due(&self, table: &MetadataTable, now: Instant) -> Vec<MetadataCommand> {
        let due = table.brokers().filter_map(|known| {
            let (broker, incarnation) = (known.id, known.incarnation);
            let heard = self.heard.get(&broker).filter(|heard| heard.incarnation == incarnation);
            let is_out = self.is_dead(broker, now) || heard.is_some_and(|heard| heard.stopping);
            match (known.fenced, is_out) {
                (false, true) => Some(MetadataCommand::FenceBroker { broker, incarnation }),
                // Only by its own word: the controller's first moments say nothing.
                (true, false) if heard.is_some() => Some(MetadataCommand::UnfenceBroker { broker, incarnation }),
                _ => None,
            }
        });
        due.collect()
    }

    /// Forgets brokers that are gone.
    pub(crate) fn keep(&mut self, table: &MetadataTable) {
        self.heard.retain(|broker, _| table.broker(*broker).is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Cluster;
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(6);

    fn ids(commands: &[MetadataCommand]) -> Vec<(i32, bool)> {
        let ids = commands.iter().map(|command| match command {
            MetadataCommand::FenceBroker { broker, .. } => (broker.get(), true),
            MetadataCommand::UnfenceBroker { broker, .. } => (broker.get(), false),
            other => panic!("{other:?}"),
        });
        ids.collect()
    }

    #[test]
    fn brokers_are_fenced_when_silent_and_taken_back_by_their_own_word() {
        let mut cluster = Cluster::of(3);
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut liveness = Liveness::new(TIMEOUT, start);
        for second in [0, 2, 4, 6] {
            for broker in [1, 2] {
                liveness.heard(BrokerId::new(broker), cluster.incarnation(broker), false, at(second));
            }
            assert_eq!(
                ids(&liveness.due(cluster.table(), at(second))),
                [],
                "a new controller gives everybody a session"
            );
        }
        let due = liveness.due(cluster.table(), at(7));
        assert_eq!(ids(&due), [(3, true)]);
        cluster.run_all(due);
        assert_eq!(ids(&liveness.due(cluster.table(), at(8))), [], "once");
        // A new controller has not heard of it: it stays fenced until it says something.
        let mut next = Liveness::new(TIMEOUT, at(9));
        assert_eq!(ids(&next.due(cluster.table(), at(9))), []);
        next.heard(BrokerId::new(3), 999, false, at(9));
        assert_eq!(ids(&next.due(cluster.table(), at(9))), [], "an earlier start of it");
        next.heard(BrokerId::new(3), cluster.incarnation(3), false, at(10));
        assert_eq!(ids(&next.due(cluster.table(), at(10))), [(3, false)]);
    }

    #[test]
    fn a_broker_that_stops_is_given_nothing_more() {
        let mut cluster = Cluster::of(2);
        let now = Instant::now();
        let mut liveness = Liveness::new(TIMEOUT, now);
        liveness.heard(BrokerId::new(2), cluster.incarnation(2), true, now);
        let due = liveness.due(cluster.table(), now);
        assert_eq!(ids(&due), [(2, true)]);
        cluster.run_all(due);
        // It starts again, as another incarnation: what the last one said counts no more.
        cluster.restart(2);
        assert_eq!(ids(&liveness.due(cluster.table(), now)), []);
        assert!(!cluster.table().broker(BrokerId::new(2)).expect("registered").fenced);
    }

    #[test]
    fn silence_is_counted_from_the_last_word() {
        let start = Instant::now();
        let mut liveness = Liveness::new(TIMEOUT, start);
        let broker = BrokerId::new(1);
        assert_eq!(liveness.silence(broker, start), None);
        liveness.heard(broker, 1, false, start);
        assert_eq!(liveness.silence(broker, start + TIMEOUT), Some(TIMEOUT));
        assert!(!liveness.is_dead(broker, start + TIMEOUT));
        assert!(liveness.is_dead(broker, start + TIMEOUT + Duration::from_millis(1)));
        liveness.keep(Cluster::of(0).table());
        assert_eq!(liveness.silence(broker, start), None);
    }
}
