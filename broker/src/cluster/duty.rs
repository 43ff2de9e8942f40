//! What the broker that leads the metadata does besides deciding: it notices who is silent, and begins what the brokers' losses and an operator's wishes make necessary.
//!
//! All of it is decided by pure functions of the table; here is the clock, and what is only worth knowing while it lasts.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowstone_protocol::peer::{BrokerHeartbeatRequest, LostReplica};
use flowstone_protocol::{BrokerId, RaftIndex, ReplicaId, Term, TopicPartition};
use parking_lot::Mutex;

use super::calls::partition;
use super::control::Control;
use super::recovery;
use crate::controller::commands::{MetadataCommand, feature_level_due};
use crate::controller::liveness::Liveness;
use crate::controller::lost::{LogEnd, LostReplicas, Told};
use crate::controller::table::MetadataTable;
use crate::controller::upkeep;

/// Between two looks at what is due.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Partitions that are moved at a time, for a broker that drains: each is a copy that takes from serving.
const MOVES_AT_ONCE: usize = 8;

/// What the controller keeps in memory; nothing of it outlives its leadership.
#[derive(Debug)]
pub(crate) struct Duty {
    session_timeout: Duration,
    /// Held for a look or a change; nothing waits inside.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// `None` while another broker is the controller.
    liveness: Option<Liveness>,
    lost: LostReplicas,
    disks: HashMap<BrokerId, Disk>,
    /// Brokers that are heard of by way of another one alone.
    detours: HashMap<BrokerId, BrokerId>,
}

/// A broker's disk, as it told last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) free_bytes: u64,
    pub(crate) total_bytes: u64,
    /// It says so itself.
    pub(crate) is_full: bool,
    /// As that.
    pub(crate) is_slow: bool,
}

/// A replica that can never vote again, as its broker tells.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lost {
    tp: TopicPartition,
    replica: ReplicaId,
    told: Told,
}

impl Lost {
    /// `None` for a message that names no partition.
    pub(crate) fn of(message: &LostReplica) -> Option<Self> {
        let end = LogEnd { term: Term::new(message.last_term), index: RaftIndex::new(message.last_index) };
        Some(Self {
            tp: partition(&message.topic_id, message.partition)?,
            replica: ReplicaId::new(message.replica_id),
            told: Told::of(message.lost_memory, end),
        })
    }
}

impl Duty {
    pub(crate) fn new(session_timeout: Duration) -> Self {
        Self { session_timeout, state: Mutex::default() }
    }

    /// A broker said something, and what it said of itself with a heartbeat.
    pub(crate) fn heard(
        &self,
        broker: BrokerId,
        incarnation: u64,
        now: Instant,
        said: Option<&BrokerHeartbeatRequest>,
    ) {
        let mut state = self.state.lock();
        let session_timeout = self.session_timeout;
        let liveness = state.liveness.get_or_insert_with(|| Liveness::new(session_timeout, now));
        liveness.heard(broker, incarnation, said.is_some_and(|said| said.stopping), now);
        if let Some(said) = said {
            let disk = Disk {
                free_bytes: said.disk_free_bytes,
                total_bytes: said.disk_total_bytes,
                is_full: said.disk_full,
                is_slow: said.disk_slow,
            };
            state.disks.insert(broker, disk);
        }
    }

    /// A broker's replicas that can never vote again, or have nothing yet: all that there are.
    pub(crate) fn lost(&self, by: BrokerId, lost: impl IntoIterator<Item = Lost>) {
        let mut state = self.state.lock();
        state.lost.heard(by);
        for lost in lost {
            state.lost.tell(by, lost.tp, lost.replica, lost.told);
        }
    }

    /// Replicas of a partition that are known to be lost.
    pub(crate) fn known_lost(&self, tp: TopicPartition) -> Vec<ReplicaId> {
        self.state.lock().lost.known_lost(tp)
    }

    /// For how long nothing was heard of a broker, `None` where nothing ever was; and its disk.
    pub(crate) fn of(&self, broker: BrokerId, now: Instant) -> (Option<Duration>, Disk) {
        let state = self.state.lock();
        let silence = state.liveness.as_ref().and_then(|liveness| liveness.silence(broker, now));
        (silence, state.disks.get(&broker).copied().unwrap_or_default())
    }

    /// By way of which broker another one's heartbeat came; `None`: of none.
    pub(crate) fn came_by(&self, broker: BrokerId, by: Option<BrokerId>) {
        let mut state = self.state.lock();
        match by {
            Some(by) => state.detours.insert(broker, by),
            None => state.detours.remove(&broker),
        };
    }

    /// By way of which broker alone another one is heard of.
    pub(crate) fn detour(&self, broker: BrokerId) -> Option<BrokerId> {
        self.state.lock().detours.get(&broker).copied()
    }

    /// A controller that takes longer to answer a heartbeat is not reached: there must be time for another way.
    pub(crate) fn answer_max(&self) -> Duration {
        self.session_timeout / 3
    }

    /// Brokers whose disks are full.
    pub(crate) fn full(&self) -> Vec<BrokerId> {
        let state = self.state.lock();
        state.disks.iter().filter(|(_, disk)| disk.is_full).map(|(broker, _)| *broker).collect()
    }

    /// Brokers whose disks are slow.
    pub(crate) fn slow(&self) -> Vec<BrokerId> {
        let state = self.state.lock();
        state.disks.iter().filter(|(_, disk)| disk.is_slow).map(|(broker, _)| *broker).collect()
    }

    /// It rested between two looks. Where that took far too long this whole process stood still, perhaps with all others:
    /// what it did not hear meanwhile says nothing of them.
    fn woke(&self, rested: Instant, now: Instant) {
        if now.saturating_duration_since(rested) > self.session_timeout / 2 {
            tracing::warn!("this process stood still; all brokers are given a new session");
            self.state.lock().liveness = Some(Liveness::new(self.session_timeout, now));
        }
    }

    /// Another broker is the controller.
    fn resign(&self) {
        *self.state.lock() = State::default();
    }

    /// What the sessions of the brokers, their losses and the operator's wishes make necessary now.
    fn due(&self, table: &MetadataTable, now: Instant) -> Vec<MetadataCommand> {
        let mut state = self.state.lock();
        let session_timeout = self.session_timeout;
        let State { liveness, lost, .. } = &mut *state;
        let liveness = liveness.get_or_insert_with(|| Liveness::new(session_timeout, now));
        liveness.keep(table);
        let mut due = liveness.due(table, now);
        if feature_level_due(table).is_some() {
            due.push(MetadataCommand::RaiseFeatureLevel);
        }
        due.extend(lost.due(table, session_timeout, now, rand::random()));
        due.extend(upkeep::due(table, MOVES_AT_ONCE, rand::random()));
        due
    }
}

/// Does the controller's part whenever this broker is it, until aborted.
pub(crate) async fn run(control: Arc<Control>, incarnation: u64) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let metadata = control.metadata();
        let seen = metadata.status();
        if !seen.is_ready() {
            control.duty.resign();
            // Its replica may be another one by then.
            drop(tokio::time::timeout(LOOK_EVERY, metadata.changed(&seen)).await);
            continue;
        }
        look(&control, incarnation).await;
        let rested = Instant::now();
        ticks.tick().await;
        control.duty.woke(rested, Instant::now());
    }
}

async fn look(control: &Arc<Control>, incarnation: u64) {
    if let Err(error) = recovery::adopt(control).await {
        tracing::debug!(%error, "the metadata's recovery could not be written down; it is tried again");
        return;
    }
    let now = Instant::now();
    if control.table.with(|table| table.brokers().count() <= 1) {
        // Nobody else is there to tell of, and this broker lives as long as it runs.
        control.duty.heard(control.me, incarnation, now, None);
    }
    // Walks over much, at times: not under the lock that every reader takes.
    let table = control.table.with(MetadataTable::clone);
    for command in control.duty.due(&table, now) {
        carry_out(control, command).await;
    }
}

async fn carry_out(control: &Arc<Control>, command: MetadataCommand) {
    match &command {
        MetadataCommand::FenceBroker { broker, .. } => tracing::warn!(%broker, "a broker is silent, or stops"),
        MetadataCommand::UnfenceBroker { broker, .. } => tracing::info!(%broker, "a broker is heard of again"),
        MetadataCommand::RecoverPartition(recover) => {
            tracing::error!(tp = %recover.tp, reason = recover.reason, "a partition is recovered, records may be lost");
        }
        MetadataCommand::RaiseFeatureLevel => {
            tracing::info!("all brokers run a newer release: what it brought is used from now on");
        }
        command => tracing::debug!(?command, "the controller acts"),
    }
    if let Err(error) = control.command(command).await {
        tracing::debug!(%error, "what the controller began was refused; it looks again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_that_stood_still_does_not_blame_the_others() {
        let (start, timeout) = (Instant::now(), Duration::from_secs(6));
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let broker = BrokerId::new(2);
        let is_dead = |duty: &Duty, now: Instant| {
            duty.state.lock().liveness.as_ref().is_some_and(|liveness| liveness.is_dead(broker, now))
        };
        let duty = Duty::new(timeout);
        duty.heard(broker, 1, start, None);
        duty.woke(at(6), at(7));
        assert!(is_dead(&duty, at(7)), "it was awake, and heard nothing");
        duty.heard(broker, 1, at(7), None);
        duty.woke(at(8), at(60));
        assert!(!is_dead(&duty, at(60)));
        assert!(is_dead(&duty, at(67)));
    }
}
