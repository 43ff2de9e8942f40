//! Groups at rest, spoken for together.
//!
//! A group rests where nothing is under way in it: every follower has what its leader has, and knows that it is committed.
//! All that its replicas would still tell each other is that they live. So one shard tells another one shard, in one message,
//! that all groups live which both count as resting:
//!
//! ```text
//!   leaders' shard                                                      followers' shard
//!   a heartbeat as ever              --- heartbeat ------------------->
//!                                    <-- answer: "it rests, in lane 2" -   nothing to do, same term, same commit index
//!   silent for a while, same commit:
//!   the group joins                  --- beat n: joins, leaves, sum -->    the same groups, by that sum: all were heard of
//!                                    <-- answer n: known, left --------    those that follow that leader no more
//!   left groups speak for themselves again
//! ```
//!
//! What keeps it true is the sum over (partition, leader, follower, term) of all groups that the beat speaks for: where it
//! is not the follower's own, where a beat is missing, or is of a session that the follower does not know (either side
//! was restarted), the session ends, and every group speaks for itself at once. A session also ends on either side after
//! [`ELECTION_TICKS`] of silence, and with the stream. Then each replica's own clock goes on from when the session was heard of
//! last: followers stand for election one after the other, as ever, and a leader that hears no majority steps down.
//!
//! Nothing that is promised hangs on it: beats say what heartbeats say, and no more. Votes, appends and the questions of
//! linearizable reads are never spared.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use flowstone_protocol::{BrokerId, ReplicaId, TopicPartition};

use super::{Shard, State};
use crate::machine::Machine;
use crate::peer::{Beat, BeatAnswer, PeerBody, PeerMessage, RestingGroup};
use crate::raft_adapter::{ELECTION_TICKS, HEARTBEAT_TICKS, REST_MEMBERS, Rest, mix};
use crate::transport::GroupMessage;

/// Ticks of rest after which a group is spoken for: one that is written to every now and then would only come and go.
const JOIN_AFTER_TICKS: u64 = 10;
/// Groups that join, leave, or are told to have left, in one message. More join later; where more leave, all do.
const ROWS_MAX: usize = 2_048;
/// Sessions of one shard, on either side; more groups than these hold speak for themselves.
const SESSIONS_MAX: usize = 4_096;
/// Ticks of silence after which a session is over: before any election timeout.
const SILENCE_TICKS: u64 = ELECTION_TICKS as u64;

/// A shard of another broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lane {
    broker: BrokerId,
    lane: u32,
}

/// What is known of a replica whose group is at rest: a few lines of the processor's cache, rather than the dozens that
/// looking into the replica takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quiet {
    rest: Rest,
    own: ReplicaId,
    /// Where its leader is.
    broker: BrokerId,
    /// Nothing has happened to the replica since. Else it is known again after its step.
    is_certain: bool,
    /// Since which tick nothing has changed.
    since: u64,
    /// When its leader was heard of last by itself.
    heard_at: Option<u64>,
    /// Which followers answered by themselves.
    answered: u8,
    /// With whom it is spoken for: its leader's shard, or those of its followers.
    lanes: [Option<Lane>; REST_MEMBERS],
}

impl Quiet {
    /// The others of the group.
    fn others(&self) -> impl Iterator<Item = (usize, ReplicaId)> {
        self.rest.others.into_iter().enumerate().take_while(|(_, other)| other.get() != 0)
    }

    /// Whether beats say all that it would.
    fn is_spoken_for(&self) -> bool {
        self.is_certain && self.others().all(|(at, _)| self.lanes[at].is_some())
    }

    fn row(&self, tp: TopicPartition, at: usize) -> RestingGroup {
        let other = self.rest.others[at];
        let (leader, follower) = if self.rest.leads { (self.own, other) } else { (other, self.own) };
        RestingGroup { tp, leader, follower, term: self.rest.term }
    }
}

/// All sessions of a shard.
#[derive(Debug)]
pub(super) struct Resting {
    /// This shard's number, from 1 on.
    own: u32,
    /// Grows with every session, and from start to start.
    next_session: u64,
    /// With shards of followers.
    told: BTreeMap<Lane, Told>,
    /// With shards of leaders.
    heard: BTreeMap<Lane, Heard>,
}

/// A session with followers' shard.
#[derive(Debug)]
struct Told {
    session: u64,
    /// Of the last beat.
    number: u64,
    /// The last that was answered, and when.
    answered: u64,
    answered_at: u64,
    groups: usize,
    /// Over all of them.
    sum: u64,
    /// With the next beat, if they still rest: places in the table, and which follower.
    joins: Vec<(u32, ReplicaId)>,
    leaves: Vec<RestingGroup>,
    /// One that was in it lately: a beat is addressed to a group that is there.
    carrier: u32,
}

/// A session with leaders' shard.
#[derive(Debug)]
struct Heard {
    session: u64,
    number: u64,
    heard_at: u64,
    groups: usize,
    /// Over all that the leaders' shard counts: these groups, and those that have left.
    sum: u64,
    /// Left, and the leaders' shard has not said so yet.
    left: Vec<RestingGroup>,
}

impl Resting {
    /// Of the shard with this number, of a start that no earlier one has the number of.
    pub(super) fn new(shard: usize, start: u64) -> Self {
        let own = u32::try_from(shard + 1).unwrap_or(u32::MAX);
        Self { own, next_session: start << 20, told: BTreeMap::new(), heard: BTreeMap::new() }
    }

    /// Whether it needs the clock.
    pub(super) fn is_empty(&self) -> bool {
        self.told.is_empty() && self.heard.is_empty()
    }
}

/// The same for every broker.
fn sum_of(row: &RestingGroup) -> u64 {
    let topic = row.tp.topic.get();
    let words = [
        (topic >> 64) as u64,
        topic as u64,
        row.tp.partition.get() as u64,
        row.leader.get(),
        row.follower.get(),
        row.term.get(),
    ];
    words.into_iter().fold(0, |sum, word| mix(sum ^ word))
}

impl<M: Machine> Shard<M> {
    // ---- one group -------------------------------------------------------------------------------------------------

    /// Takes a heartbeat, or an answer to one, where all that it says is known. Whether it did.
    pub(super) fn take_quietly(
        &mut self,
        index: u32,
        from: BrokerId,
        tp: TopicPartition,
        message: &PeerMessage,
    ) -> bool {
        let Some(quiet) = self.quiet[index as usize].as_mut().filter(|quiet| quiet.is_certain) else { return false };
        if quiet.own != message.to || quiet.rest.term != message.term {
            return false;
        }
        match message.body {
            PeerBody::Heartbeat { commit }
                if !quiet.rest.leads
                    && quiet.rest.others[0] == message.from
                    && quiet.broker == from
                    && commit <= quiet.rest.commit =>
            {
                quiet.heard_at = Some(self.ticks);
                if !quiet.is_spoken_for() {
                    self.wakes[index as usize] = self.ticks + quiet.rest.timeout;
                }
                let body = PeerBody::HeartbeatResponse { commit: quiet.rest.commit, lane: self.resting.own };
                let answer = PeerMessage { from: message.to, to: message.from, term: message.term, body };
                self.port.counters.messages_sent.fetch_add(1, Ordering::Relaxed);
                self.outgoing.entry(from).or_default().push(GroupMessage { tp, message: answer });
                true
            }
            PeerBody::HeartbeatResponse { commit, lane } if quiet.rest.leads => {
                let Some((at, follower)) = quiet.others().find(|&(_, other)| other == message.from) else {
                    return false;
                };
                // Spoken for it has no clock of its own: when that was could not be said later.
                if !quiet.is_spoken_for() {
                    quiet.answered |= 1 << at;
                }
                let joins = lane != 0
                    && commit == quiet.rest.commit
                    && quiet.lanes[at].is_none()
                    && self.ticks >= quiet.since + JOIN_AFTER_TICKS;
                if joins {
                    self.join(index, follower, Lane { broker: from, lane });
                }
                true
            }
            _ => false,
        }
    }

    /// Tells a replica what was heard while its group was at rest: before anything else happens to it.
    pub(super) fn stir(&mut self, index: u32) {
        let Some(quiet) = self.quiet[index as usize].as_mut().filter(|quiet| quiet.is_certain) else { return };
        quiet.is_certain = false;
        let (heard_at, answered) = (quiet.heard_at.take(), std::mem::take(&mut quiet.answered));
        let quiet = *quiet;
        let State::Running(replica) = &mut self.slots[index as usize].state else { return };
        if !quiet.rest.leads {
            let together = quiet.lanes[0].and_then(|lane| self.resting.heard.get(&lane)).map(|heard| heard.heard_at);
            if let Some(at) = heard_at.max(together) {
                replica.heard_leader(at);
            }
            return;
        }
        // What is due at this tick is not passed yet.
        let until = self.ticks.saturating_sub(1);
        let lanes = quiet.others().map(|(at, other)| {
            let told = quiet.lanes[at].and_then(|lane| self.resting.told.get(&lane));
            Some((other, told?.answered_at))
        });
        if let Some(together) = lanes.collect::<Option<Vec<_>>>().filter(|together| !together.is_empty()) {
            replica.rested(until, &together);
        }
        if answered != 0 {
            replica.pass_ticks(until.saturating_sub(replica.ticks()));
            for (at, other) in quiet.others() {
                if answered & (1 << at) != 0 {
                    replica.heard_follower(other);
                }
            }
        }
    }

    /// Lets it rest, if there is nothing to do for it.
    pub(super) fn rest(&mut self, index: u32) {
        let slot = &self.slots[index as usize];
        let State::Running(replica) = &slot.state else { return };
        if slot.touched || slot.closing.is_some() || !slot.events.is_empty() {
            return;
        }
        if replica.is_alone() {
            return self.rise(index);
        }
        let rest = replica.rest();
        let own = slot.spec.replica;
        let broker = rest
            .and_then(|rest| if rest.leads { Some(BrokerId::new(-1)) } else { slot.places.broker_of(rest.others[0]) });
        let (Some(rest), Some(broker)) = (rest, broker) else { return self.rise(index) };
        let now = self.ticks;
        if let Some(quiet) = &mut self.quiet[index as usize]
            && quiet.own == own
            && quiet.broker == broker
            && (quiet.rest.leads, quiet.rest.others, quiet.rest.term) == (rest.leads, rest.others, rest.term)
            && (quiet.rest.commit == rest.commit || !rest.leads)
        {
            if quiet.rest.commit != rest.commit {
                quiet.since = now;
            }
            quiet.rest = rest;
            quiet.is_certain = true;
            return;
        }
        self.rise(index);
        self.quiet[index as usize] = Some(Quiet {
            rest,
            own,
            broker,
            is_certain: true,
            since: now,
            heard_at: None,
            answered: 0,
            lanes: [None; REST_MEMBERS],
        });
    }

    /// Its group rests no more, or has ended here: it speaks for itself.
    pub(super) fn rise(&mut self, index: u32) {
        let Some(quiet) = self.quiet[index as usize].take() else { return };
        let tp = self.slots[index as usize].spec.tp;
        for (at, _) in quiet.others() {
            if let Some(lane) = quiet.lanes[at] {
                self.resting.left(lane, quiet.rest.leads, quiet.row(tp, at));
            }
        }
    }

    /// Spoken for from now on, or again after a step that nobody else heard of: nothing is expected to happen to it, and
    /// what only a busy replica needs is given back.
    pub(super) fn settle_down(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.status.rests(Some(self.ticks));
        slot.events.shrink_to_fit();
        if let State::Running(replica) = &mut slot.state {
            replica.shed();
        }
    }

    /// Whether beats say all that its group has to say: it needs no clock of its own.
    pub(super) fn is_spoken_for(&self, index: u32) -> bool {
        self.quiet[index as usize].is_some_and(|quiet| quiet.is_spoken_for())
    }

    // ---- leaders' side ---------------------------------------------------------------------------------------------

    fn join(&mut self, index: u32, follower: ReplicaId, lane: Lane) {
        let resting = &mut self.resting;
        if resting.told.len() >= SESSIONS_MAX && !resting.told.contains_key(&lane) {
            return;
        }
        let told = resting.told.entry(lane).or_insert_with(|| {
            resting.next_session += 1;
            Told {
                session: resting.next_session,
                number: 0,
                answered: 0,
                answered_at: self.ticks,
                groups: 0,
                sum: 0,
                joins: Vec::new(),
                leaves: Vec::new(),
                carrier: index,
            }
        });
        if told.joins.len() < ROWS_MAX {
            told.joins.push((index, follower));
        }
    }

    /// One beat to everybody, when it is time.
    pub(super) fn beat(&mut self) {
        if !self.ticks.is_multiple_of(HEARTBEAT_TICKS) || self.stopping.is_some() {
            return;
        }
        let lanes: Vec<Lane> = self.resting.told.keys().copied().collect();
        for lane in lanes {
            self.beat_to(lane);
        }
    }

    fn beat_to(&mut self, lane: Lane) {
        let Some(mut told) = self.resting.told.remove(&lane) else { return };
        if told.leaves.len() > ROWS_MAX {
            self.resting.told.insert(lane, told);
            return self.end_told(lane);
        }
        let mut joins = Vec::new();
        for (index, follower) in std::mem::take(&mut told.joins) {
            let tp = self.slots[index as usize].spec.tp;
            // Something may have been committed since the follower answered, and it may not have heard of that.
            let still_rests =
                |it: &&mut Quiet| it.is_certain && it.rest.leads && self.ticks >= it.since + JOIN_AFTER_TICKS;
            let Some(quiet) = self.quiet[index as usize].as_mut().filter(still_rests) else { continue };
            let Some((at, _)) = quiet.others().find(|&(_, other)| other == follower) else { continue };
            // Once, though it may have been found twice.
            if quiet.lanes[at].is_none() {
                quiet.lanes[at] = Some(lane);
                let row = quiet.row(tp, at);
                let is_spoken_for = quiet.is_spoken_for();
                if is_spoken_for {
                    quiet.answered = 0;
                    self.wakes[index as usize] = super::NEVER;
                }
                told.groups += 1;
                told.sum = told.sum.wrapping_add(sum_of(&row));
                told.carrier = index;
                joins.push(row);
                if is_spoken_for {
                    self.settle_down(index);
                }
            }
        }
        let leaves = std::mem::take(&mut told.leaves);
        let carrier = joins.first().or(leaves.first()).copied().or_else(|| self.carrier(lane, &mut told));
        let Some(RestingGroup { tp, leader, follower, term }) = carrier else {
            // Nobody is left in it.
            return;
        };
        told.number += 1;
        let beat =
            Beat { session: told.session, number: told.number, lane: self.resting.own, sum: told.sum, joins, leaves };
        let message = PeerMessage { from: leader, to: follower, term, body: PeerBody::Beat(Box::new(beat)) };
        self.port.counters.messages_sent.fetch_add(1, Ordering::Relaxed);
        self.outgoing.entry(lane.broker).or_default().push(GroupMessage { tp, message });
        self.resting.told.insert(lane, told);
    }

    /// A group of this session: all are in the shard that it is with.
    fn carrier(&self, lane: Lane, told: &mut Told) -> Option<RestingGroup> {
        if told.groups == 0 {
            return None;
        }
        let (first, count) = (told.carrier, self.quiet.len() as u32);
        (0..count).map(|after| (first + after) % count).find_map(|index| {
            let quiet = self.quiet[index as usize].as_ref().filter(|quiet| quiet.rest.leads)?;
            let (at, _) = quiet.others().find(|&(at, _)| quiet.lanes[at] == Some(lane))?;
            told.carrier = index;
            Some(quiet.row(self.slots[index as usize].spec.tp, at))
        })
    }

    pub(super) fn on_beat_answer(&mut self, from: BrokerId, answer: BeatAnswer) {
        let lane = Lane { broker: from, lane: answer.lane };
        let Some(told) = self.resting.told.get_mut(&lane).filter(|told| told.session == answer.session) else { return };
        if !answer.is_known {
            return self.end_told(lane);
        }
        if answer.number <= told.answered || answer.number > told.number {
            return;
        }
        told.answered = answer.number;
        told.answered_at = self.ticks;
        for row in answer.left {
            let Some((index, at)) = self.find(&row, lane, true) else { continue };
            self.stir(index);
            if let Some(quiet) = &mut self.quiet[index as usize] {
                quiet.lanes[at] = None;
                quiet.since = self.ticks;
            }
            self.resting.left(lane, true, row);
            self.wake(index);
        }
    }

    /// The group of this row, if it is in that session.
    fn find(&self, row: &RestingGroup, lane: Lane, leads: bool) -> Option<(u32, usize)> {
        let index = *self.by_partition.get(&row.tp)?;
        let quiet = self.quiet[index as usize].as_ref().filter(|quiet| quiet.rest.leads == leads)?;
        let (at, _) = quiet.others().find(|&(at, _)| quiet.lanes[at] == Some(lane) && quiet.row(row.tp, at) == *row)?;
        Some((index, at))
    }

    /// Followers there are not spoken to together any more.
    fn end_told(&mut self, lane: Lane) {
        self.end(lane, true);
        self.resting.told.remove(&lane);
    }

    // ---- followers' side -------------------------------------------------------------------------------------------

    pub(super) fn on_beat(&mut self, from: BrokerId, tp: TopicPartition, message: &PeerMessage, beat: &Beat) {
        let lane = Lane { broker: from, lane: beat.lane };
        let mut is_known = match self.resting.heard.get(&lane) {
            // Twice, or late.
            Some(heard) if (heard.session, heard.number) >= (beat.session, beat.number) => return,
            Some(heard) if heard.session == beat.session && heard.number + 1 == beat.number => true,
            _ => {
                self.end_heard(lane);
                beat.number == 1 && self.resting.heard.len() < SESSIONS_MAX
            }
        };
        let mut left = Vec::new();
        if is_known {
            (is_known, left) = self.take_beat(lane, beat);
        }
        if !is_known {
            self.end_heard(lane);
        }
        let answer = BeatAnswer { session: beat.session, number: beat.number, lane: self.resting.own, is_known, left };
        let body = PeerBody::BeatAnswer(Box::new(answer));
        let answer = PeerMessage { from: message.to, to: message.from, term: message.term, body };
        self.port.counters.messages_sent.fetch_add(1, Ordering::Relaxed);
        self.outgoing.entry(from).or_default().push(GroupMessage { tp, message: answer });
    }

    /// The next beat of a session: whether it speaks for the same groups, and which of them have left.
    fn take_beat(&mut self, lane: Lane, beat: &Beat) -> (bool, Vec<RestingGroup>) {
        let now = self.ticks;
        let begun = Heard { session: beat.session, number: 0, heard_at: now, groups: 0, sum: 0, left: Vec::new() };
        let mut heard = self.resting.heard.remove(&lane).unwrap_or(begun);
        heard.number = beat.number;
        // Before anything else: those that leave now were heard of until now.
        heard.heard_at = now;
        self.resting.heard.insert(lane, heard);
        let mut sum_left = 0u64;
        for row in &beat.leaves {
            let found = self.find(row, lane, false);
            let Some(heard) = self.resting.heard.get_mut(&lane) else { break };
            if let Some(at) = heard.left.iter().position(|left| left == row) {
                heard.left.swap_remove(at);
                sum_left = sum_left.wrapping_add(sum_of(row));
            } else if let Some((index, _)) = found {
                heard.groups -= 1;
                sum_left = sum_left.wrapping_add(sum_of(row));
                self.stir(index);
                if let Some(quiet) = &mut self.quiet[index as usize] {
                    quiet.lanes[0] = None;
                }
                self.wake(index);
            }
        }
        let (mut groups, mut sum_joined, mut unfit) = (0, 0u64, Vec::new());
        for row in &beat.joins {
            sum_joined = sum_joined.wrapping_add(sum_of(row));
            let index = self.by_partition.get(&row.tp).copied();
            let quiet = index.and_then(|index| self.quiet[index as usize].as_mut());
            match quiet.filter(|quiet| {
                quiet.is_certain
                    && !quiet.rest.leads
                    && quiet.broker == lane.broker
                    && quiet.lanes[0].is_none()
                    && quiet.row(row.tp, 0) == *row
            }) {
                Some(quiet) => {
                    quiet.lanes[0] = Some(lane);
                    groups += 1;
                    if let Some(index) = index {
                        self.wakes[index as usize] = super::NEVER;
                        self.settle_down(index);
                    }
                }
                None => unfit.push(*row),
            }
        }
        let at = self.now + self.config.tick;
        self.timers.tick_at.get_or_insert(at);
        let Some(heard) = self.resting.heard.get_mut(&lane) else { return (false, Vec::new()) };
        heard.groups += groups;
        heard.left.append(&mut unfit);
        heard.sum = heard.sum.wrapping_sub(sum_left).wrapping_add(sum_joined);
        (heard.sum == beat.sum && heard.left.len() <= ROWS_MAX, heard.left.clone())
    }

    /// Leaders there are not heard of together any more.
    fn end_heard(&mut self, lane: Lane) {
        self.end(lane, false);
        self.resting.heard.remove(&lane);
    }

    // ---- both ------------------------------------------------------------------------------------------------------

    /// Every group of a session speaks for itself, its clock going on from when it was heard of last.
    fn end(&mut self, lane: Lane, leads: bool) {
        let is_in = |quiet: &Quiet| quiet.rest.leads == leads && quiet.lanes.contains(&Some(lane));
        for index in 0..self.quiet.len() as u32 {
            if !self.quiet[index as usize].as_ref().is_some_and(is_in) {
                continue;
            }
            self.stir(index);
            if let Some(quiet) = &mut self.quiet[index as usize] {
                for own in quiet.lanes.iter_mut().filter(|own| **own == Some(lane)) {
                    *own = None;
                }
                quiet.since = self.ticks;
            }
            self.wake(index);
        }
    }

    /// Ends the sessions in which nothing was heard of for too long.
    pub(super) fn end_silent(&mut self) {
        let is_silent = |at: u64| self.ticks >= at + SILENCE_TICKS;
        let resting = &self.resting;
        let told: Vec<_> =
            resting.told.iter().filter(|(_, told)| is_silent(told.answered_at)).map(|(lane, _)| *lane).collect();
        let heard: Vec<_> =
            resting.heard.iter().filter(|(_, heard)| is_silent(heard.heard_at)).map(|(lane, _)| *lane).collect();
        for lane in told {
            self.end_told(lane);
        }
        for lane in heard {
            self.end_heard(lane);
        }
    }

    /// What was sent to this broker may be lost.
    pub(super) fn end_all_told(&mut self, broker: BrokerId) {
        let lanes: Vec<_> = self.resting.told.keys().copied().filter(|lane| lane.broker == broker).collect();
        for lane in lanes {
            self.end_told(lane);
        }
    }

    /// Nothing comes from this broker any more.
    pub(super) fn end_all_heard(&mut self, broker: BrokerId) {
        let lanes: Vec<_> = self.resting.heard.keys().copied().filter(|lane| lane.broker == broker).collect();
        for lane in lanes {
            self.end_heard(lane);
        }
    }
}

impl Resting {
    /// A group that was spoken for in that session is so no more.
    fn left(&mut self, lane: Lane, leads: bool, row: RestingGroup) {
        if leads {
            if let Some(told) = self.told.get_mut(&lane) {
                told.groups -= 1;
                told.sum = told.sum.wrapping_sub(sum_of(&row));
                told.leaves.push(row);
            }
        } else if let Some(heard) = self.heard.get_mut(&lane) {
            heard.groups -= 1;
            heard.left.push(row);
        }
    }
}
