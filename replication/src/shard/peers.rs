//! A shard and the other brokers: where replicas are, what goes to them and comes from them, and the clock that idle
//! groups share.
//!
//! A quiet group costs a look at one number per tick, and what its heartbeats cost: its replica is stepped only when a
//! heartbeat says something new or its clock runs out. One that stays quiet is spoken for together with others, see
//! [`super::resting`]. Everything that leaves in one round for one broker leaves in one
//! call of the transport.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use flowstone_protocol::{BrokerId, ReplicaId, TopicPartition};
use flowstone_storage::planted::{Bug, is_planted};

use super::{Shard, SlotKey, State};
use crate::effects::Event;
use crate::machine::Machine;
use crate::peer::{PeerBody, PeerMessage};
use crate::request::Role;
use crate::transport::GroupMessage;

/// Not woken by time.
pub(super) const NEVER: u64 = u64::MAX;
/// Places learned from messages, per replica: a group has a handful of members.
const LEARNED_MAX: usize = 16;

/// Where the replicas of one group are.
#[derive(Debug, Clone)]
pub(super) struct Places {
    told: Arc<[(ReplicaId, BrokerId)]>,
    /// From where they wrote, where that is not what was told.
    learned: Vec<(ReplicaId, BrokerId)>,
}

impl Places {
    pub(super) fn new(told: Arc<[(ReplicaId, BrokerId)]>) -> Self {
        Self { told, learned: Vec::new() }
    }

    pub(super) fn tell(&mut self, told: Arc<[(ReplicaId, BrokerId)]>) {
        // What is told now may be newer than what was learned of the same replica: whoever writes is learned again.
        self.learned.retain(|(replica, _)| told.iter().all(|(other, _)| other != replica));
        self.told = told;
    }

    fn learn(&mut self, replica: ReplicaId, broker: BrokerId) {
        if self.broker_of(replica) == Some(broker) {
            return;
        }
        self.learned.retain(|(other, _)| *other != replica);
        if self.learned.len() >= LEARNED_MAX {
            self.learned.remove(0);
        }
        self.learned.push((replica, broker));
    }

    pub(super) fn broker_of(&self, replica: ReplicaId) -> Option<BrokerId> {
        let all = self.learned.iter().chain(self.told.iter());
        all.into_iter().find(|(other, _)| *other == replica).map(|(_, broker)| *broker)
    }

    fn replicas_at(&self, broker: BrokerId) -> Vec<ReplicaId> {
        let all = self.told.iter().chain(&self.learned).map(|&(replica, _)| replica);
        let mut there: Vec<_> = all.filter(|&replica| self.broker_of(replica) == Some(broker)).collect();
        there.dedup();
        there
    }

    /// The other replicas, of which something may be pulled: those of `first` first, then as they were told.
    pub(super) fn sources(&self, but: ReplicaId, first: Option<BrokerId>) -> Vec<(BrokerId, ReplicaId)> {
        let mut sources = Vec::new();
        for &(replica, _) in self.told.iter().chain(&self.learned) {
            if let Some(broker) = self.broker_of(replica).filter(|_| replica != but)
                && !sources.contains(&(broker, replica))
            {
                sources.push((broker, replica));
            }
        }
        sources.sort_by_key(|&(broker, _)| Some(broker) != first);
        sources
    }
}

impl<M: Machine> Shard<M> {
    // ---- time ------------------------------------------------------------------------------------------------------

    /// Sets when time matters next to a replica.
    pub(super) fn wake(&mut self, index: u32) {
        self.rest(index);
        let wake = match &self.slots[index as usize].state {
            State::Running(replica) => replica.wakes_in().map_or(NEVER, |ticks| replica.ticks().saturating_add(ticks)),
            _ => NEVER,
        };
        // What was due while nothing happened is due with the next tick.
        let is_spoken_for = self.is_spoken_for(index);
        if is_spoken_for {
            self.settle_down(index);
        } else {
            self.slots[index as usize].status.rests(None);
        }
        let wake = if is_spoken_for { NEVER } else { wake };
        self.wakes[index as usize] = wake.max(self.ticks + 1);
        if wake != NEVER {
            let at = self.now + self.config.tick;
            self.timers.tick_at.get_or_insert(at);
        }
    }

    /// One tick of everybody's clock.
    pub(super) fn on_tick(&mut self) {
        self.ticks += 1;
        self.end_silent();
        let mut any = false;
        for index in 0..self.wakes.len() {
            let wake = self.wakes[index];
            any |= wake != NEVER;
            if wake <= self.ticks {
                self.tick(index as u32);
            }
        }
        self.beat();
        if any || !self.resting.is_empty() {
            self.timers.tick_at = Some(self.now + self.config.tick);
        }
    }

    fn tick(&mut self, index: u32) {
        self.stir(index);
        let slot = &mut self.slots[index as usize];
        let State::Running(replica) = &mut slot.state else {
            self.wakes[index as usize] = NEVER;
            return;
        };
        let due = self.ticks.saturating_sub(replica.ticks());
        if due == 0 || slot.closing.is_some() {
            self.wake(index);
            return;
        }
        if slot.events.is_empty() && !slot.touched {
            let mut heartbeats = std::mem::take(&mut self.heartbeats);
            let passed = replica.quick_ticks(due, &mut heartbeats);
            let tp = slot.spec.tp;
            for message in heartbeats.drain(..) {
                self.send(index, tp, message);
            }
            self.heartbeats = heartbeats;
            match passed {
                Some(true) => return self.touch(index),
                Some(false) => return self.wake(index),
                None => {}
            }
        }
        let State::Running(replica) = &mut self.slots[index as usize].state else { return };
        replica.pass_ticks(due - 1);
        self.slots[index as usize].events.push(Event::Tick);
        self.touch(index);
    }

    /// Ticks that a replica has not seen are passed before it is stepped.
    pub(super) fn pass_ticks(&mut self, index: u32) {
        self.stir(index);
        let slot = &mut self.slots[index as usize];
        if let State::Running(replica) = &mut slot.state {
            let late = self.ticks.saturating_sub(replica.ticks());
            if late > 0 && !slot.events.iter().any(|event| matches!(event, Event::Tick)) {
                replica.pass_ticks(late);
            }
        }
    }

    // ---- messages --------------------------------------------------------------------------------------------------

    /// Puts a message among those of this round.
    pub(super) fn send(&mut self, index: u32, tp: TopicPartition, message: PeerMessage) {
        match self.slots[index as usize].places.broker_of(message.to) {
            Some(broker) => {
                self.port.counters.messages_sent.fetch_add(1, Ordering::Relaxed);
                self.outgoing.entry(broker).or_default().push(GroupMessage { tp, message });
            }
            // It is not known yet where the replica is: Raft repeats what matters.
            None => {
                self.port.counters.messages_dropped.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%tp, to = %message.to, "a message is dropped: it is not known where the replica is");
            }
        }
    }

    /// Hands over what was collected: one call per broker.
    pub(super) fn send_messages(&mut self) {
        while let Some((broker, messages)) = self.outgoing.pop_first() {
            self.transport.send(broker, messages);
        }
    }

    pub(super) fn on_peers(&mut self, from: BrokerId, messages: Vec<GroupMessage>, bytes: usize) {
        self.port.peer_bytes.fetch_sub(bytes, Ordering::Relaxed);
        if self.stopping.is_some() {
            return;
        }
        for GroupMessage { tp, message } in messages {
            match message.body {
                PeerBody::Beat(ref beat) => {
                    self.on_beat(from, tp, &message, beat);
                    continue;
                }
                PeerBody::BeatAnswer(answer) => {
                    self.on_beat_answer(from, *answer);
                    continue;
                }
                _ => {}
            }
            let Some(&index) = self.by_partition.get(&tp) else { continue };
            if self.take_quietly(index, from, tp, &message) {
                continue;
            }
            self.stir(index);
            let slot = &mut self.slots[index as usize];
            // Ids are never used twice: what is not for this very replica is of another life, or of none.
            let is_for_this = message.to == slot.spec.replica || is_planted(Bug::TakeStrangersMessages);
            if !is_for_this || slot.closing.is_some() {
                continue;
            }
            slot.places.learn(message.from, from);
            let State::Running(replica) = &mut slot.state else { continue };
            let mut message = message;
            if slot.events.is_empty() && !slot.touched {
                replica.pass_ticks(self.ticks.saturating_sub(replica.ticks()));
                match replica.quick_message(message) {
                    Ok(answer) => {
                        if let Some(answer) = answer {
                            self.send(index, tp, answer);
                        }
                        self.wake(index);
                        continue;
                    }
                    Err(back) => message = back,
                }
            }
            self.slots[index as usize].events.push(Event::Peer(message));
            self.touch(index);
        }
    }

    pub(super) fn on_unreachable(&mut self, broker: BrokerId) {
        self.end_all_told(broker);
        for index in 0..self.slots.len() as u32 {
            let slot = &self.slots[index as usize];
            if matches!(slot.shown.role, Role::Leader | Role::Elected) {
                let replicas = slot.places.replicas_at(broker);
                if !replicas.is_empty() {
                    self.event(index, Event::Unreachable(replicas));
                }
            }
        }
    }

    pub(super) fn on_peer_gone(&mut self, broker: BrokerId) {
        self.end_all_told(broker);
        self.end_all_heard(broker);
        for index in 0..self.slots.len() as u32 {
            if self.slots[index as usize].shown.leader_broker == Some(broker) {
                self.event(index, Event::LeaderGone);
            }
        }
    }

    pub(super) fn on_set_peers(&mut self, key: SlotKey, peers: Arc<[(ReplicaId, BrokerId)]>) {
        if let Some(slot) = self.slots.get_mut(key.index as usize).filter(|slot| slot.life == key.life) {
            slot.spec.peers = Arc::clone(&peers);
            slot.places.tell(peers);
        }
    }
}
