//! What a group's consumer and its session's task share: the membership, how far each partition is read and committed,
//! and what either side has to tell the other.
//!
//! ```text
//!   consumer: hands out, marks what was done   ---- State (one short lock) ----   task: stream, heartbeats, commits
//!             <- changes: begin, revoke, lost                            work ->
//! ```

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;
use std::time::Instant;

use flowstone_protocol::pb;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::error::{Error, ErrorCode, Result};
use crate::group::events::{GroupEvent, Revocation};
use crate::group::membership::{Membership, Part, Step};
use crate::locked;

/// What the consumer must do before it hands out anything more.
#[derive(Debug)]
pub(crate) enum Change {
    /// Read this partition from here on.
    Begin {
        topic: Arc<crate::metadata::TopicInfo>,
        partition: i32,
        offset: i64,
        /// Leader epoch of the last record consumed, -1 for none.
        last_epoch: i32,
    },
    /// Read it no more.
    End(Part),
}

/// A partition that this member owns, with its position known.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) topic: Arc<str>,
    /// The user is done with everything before it.
    pub(crate) processed: Place,
    /// What the coordinator was last told, answered or not.
    pub(crate) committed: i64,
    /// Behind what was handed out last.
    pub(crate) handed: Place,
    /// The user has what was handed out last in hand.
    pub(crate) in_hand: bool,
    /// Handed out no more, given up once it is not in hand and nobody holds its revocation.
    pub(crate) revoking: bool,
    /// Revocations that the user holds.
    pub(crate) guards: usize,
    /// Its offsets commit with transactions, never by themselves.
    pub(crate) in_transactions: bool,
}

/// A position, with the leader epoch of the last record before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: i64,
    pub(crate) epoch: i32,
}

/// A commit on its way.
#[derive(Debug)]
pub(crate) struct Committing {
    pub(crate) request_id: u64,
    /// Under which it was sent last, 0 where it was not.
    epoch: i32,
    /// It came under an epoch that was over: it goes again under the next one.
    is_stale: bool,
    pub(crate) offsets: Vec<pb::CommitOffset>,
    pub(crate) reply: Option<oneshot::Sender<Result<()>>>,
}

/// How the session is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closing {
    /// What is in hand was not dealt with.
    Dropped,
    /// What was handed out is done.
    Closed,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) membership: Membership,
    pub(crate) held: HashMap<Part, Held>,
    /// Whether positions are committed without being asked for.
    pub(crate) auto_commit: bool,
    /// For the consumer; bounded by what a coordinator assigns while nobody polls: later changes replace earlier ones.
    pub(crate) changes: VecDeque<Change>,
    /// For the stream. Bounded: heartbeats while there is a stream, and one commit per call.
    pub(crate) outgoing: VecDeque<pb::SessionRequest>,
    /// Looked up next: where to begin.
    pub(crate) to_begin: Vec<(Part, String)>,
    /// Commits without an answer, oldest first.
    pub(crate) committing: VecDeque<Committing>,
    next_request: u64,
    /// Why the membership is over; told to the user once.
    pub(crate) failure: Option<Error>,
    pub(crate) over: bool,
    pub(crate) closing: Option<Closing>,
    /// Of the task that polls the consumer.
    waker: Option<Waker>,
    events: Option<mpsc::UnboundedSender<GroupEvent>>,
}

/// See the module.
pub(crate) struct Shared {
    /// Guards the whole state; held for a few assignments at a time, never across an await.
    state: Mutex<State>,
    /// There is something for the session's task.
    pub(crate) work: Notify,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state();
        f.debug_struct("Member")
            .field("group", &state.membership.group())
            .field("member_id", &state.membership.member_id())
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn new(membership: Membership, auto_commit: bool) -> Arc<Self> {
        let state = State {
            membership,
            held: HashMap::new(),
            auto_commit,
            changes: VecDeque::new(),
            outgoing: VecDeque::new(),
            to_begin: Vec::new(),
            committing: VecDeque::new(),
            next_request: 0,
            failure: None,
            over: false,
            closing: None,
            waker: None,
            events: None,
        };
        Arc::new(Self { state: Mutex::new(state), work: Notify::new() })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Events from now on.
    pub(crate) fn subscribe(&self) -> mpsc::UnboundedReceiver<GroupEvent> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.state().events = Some(sender);
        receiver
    }

    /// Does what the membership says.
    pub(crate) fn perform(self: &Arc<Self>, steps: Vec<Step>, now: Instant) {
        let mut state = self.state();
        let mut begun = Vec::new();
        let mut revoking = Vec::new();
        let mut lost = Vec::new();
        for step in steps {
            match step {
                Step::Send(request) => state.outgoing.push_back(*request),
                Step::Begin(part, topic) => {
                    begun.push((topic.clone(), part.1));
                    state.to_begin.push((part, topic));
                }
                Step::Revoke(part) => {
                    state.to_begin.retain(|(known, _)| *known != part);
                    state.changes.push_back(Change::End(part.clone()));
                    if let Some(held) = state.held.get_mut(&part) {
                        held.revoking = true;
                    }
                    revoking.push(part);
                }
                Step::Lost(part) => {
                    state.to_begin.retain(|(known, _)| *known != part);
                    state.changes.push_back(Change::End(part.clone()));
                    if let Some(held) = state.held.remove(&part) {
                        lost.push((held.topic.to_string(), part.1));
                    }
                }
            }
        }
        let mut guard = None;
        if let Some(events) = state.events.clone() {
            // A receiver that is gone wants no more.
            let tell = |event| events.send(event).is_ok();
            let mut open = true;
            if !lost.is_empty() {
                open &= tell(GroupEvent::Lost(lost));
            }
            if !begun.is_empty() {
                open &= tell(GroupEvent::Assigned(begun));
            }
            let held: Vec<Part> = revoking.iter().filter(|part| state.held.contains_key(*part)).cloned().collect();
            if open && !held.is_empty() {
                let mut named = Vec::new();
                for part in &held {
                    if let Some(held) = state.held.get_mut(part) {
                        held.guards += 1;
                        named.push((held.topic.to_string(), part.1));
                    }
                }
                guard = Some((events, Revocation::new(Arc::clone(self), held, named)));
            } else if !open {
                state.events = None;
            }
        }
        state.release(&revoking, now);
        state.wake();
        drop(state);
        self.work.notify_one();
        // Outside the lock: one that nobody takes is dropped here, and takes it.
        if let Some((events, revocation)) = guard {
            let _ = events.send(GroupEvent::Revoking(revocation));
        }
    }

    /// One revocation of these is dealt with.
    pub(crate) fn unguard(&self, parts: &[Part], now: Instant) {
        let mut state = self.state();
        for part in parts {
            if let Some(held) = state.held.get_mut(part) {
                held.guards = held.guards.saturating_sub(1);
            }
        }
        state.release(parts, now);
        drop(state);
        self.work.notify_one();
    }
}

impl State {
    /// Gives up what of these is on its way out and not held any more, its positions committed first.
    pub(crate) fn release(&mut self, parts: &[Part], now: Instant) {
        let mut done = Vec::new();
        for part in parts {
            match self.held.get(part) {
                Some(held) if !held.revoking || held.in_hand || held.guards > 0 => {}
                _ => done.push(part.clone()),
            }
        }
        if done.is_empty() {
            return;
        }
        self.commit_processed(Some(&done));
        for part in &done {
            self.held.remove(part);
        }
        if let Some(Step::Send(request)) = self.membership.released(&done, now) {
            self.outgoing.push_back(*request);
        }
    }

    /// Commits what the user is done with, where that is news and where it is done without being asked.
    pub(crate) fn commit_processed(&mut self, of: Option<&[Part]>) {
        if !self.auto_commit {
            return;
        }
        let mut offsets = Vec::new();
        for (part, held) in &mut self.held {
            let wanted = of.is_none_or(|parts| parts.contains(part));
            if wanted && !held.in_transactions && held.processed.offset != held.committed {
                held.committed = held.processed.offset;
                offsets.push(to_pb(part, held.processed));
            }
        }
        if !offsets.is_empty() {
            self.commit(offsets, None);
        }
    }

    /// Commits all that was handed out.
    pub(crate) fn commit_handed(&mut self, reply: oneshot::Sender<Result<()>>) {
        let mut offsets = Vec::new();
        for (part, held) in &mut self.held {
            if held.handed.offset != held.committed {
                held.committed = held.handed.offset;
                offsets.push(to_pb(part, held.handed));
            }
        }
        if offsets.is_empty() && self.committing.is_empty() {
            // A receiver that is gone does not mind.
            let _ = reply.send(Ok(()));
            return;
        }
        self.commit(offsets, Some(reply));
    }

    /// Puts a commit on its way; it is sent again where its stream breaks.
    pub(crate) fn commit(&mut self, offsets: Vec<pb::CommitOffset>, reply: Option<oneshot::Sender<Result<()>>>) {
        self.next_request += 1;
        let request_id = self.next_request;
        let epoch = self.membership.epoch();
        if self.membership.is_member() {
            self.outgoing.push_back(commit_request(request_id, epoch, offsets.clone()));
        }
        self.committing.push_back(Committing { request_id, epoch, is_stale: false, offsets, reply });
    }

    /// There is a new stream on which this is a member: what was not answered on the old one goes again, as far as it is
    /// still owned.
    pub(crate) fn commit_all_again(&mut self) {
        for committing in &mut self.committing {
            committing.is_stale = true;
        }
        self.commit_stale_again();
    }

    /// There is a new epoch, perhaps: what came under an older one goes again.
    pub(crate) fn commit_stale_again(&mut self) {
        let epoch = self.membership.epoch();
        for committing in self.committing.iter_mut().filter(|committing| committing.is_stale) {
            let membership = &self.membership;
            committing.is_stale = false;
            committing.epoch = epoch;
            committing.offsets.retain(|offset| membership.owns(&(offset.topic_id.clone(), offset.partition)));
            self.outgoing.push_back(commit_request(committing.request_id, epoch, committing.offsets.clone()));
        }
    }

    /// The coordinator answered a commit.
    pub(crate) fn committed(&mut self, answer: &pb::Committed) {
        let Some(at) = self.committing.iter().position(|known| known.request_id == answer.request_id) else { return };
        let stale = |failed: &pb::OffsetError| {
            failed.error.as_ref().is_some_and(|detail| detail.code() == ErrorCode::StaleMemberEpoch)
        };
        if answer.errors.iter().any(stale) {
            // What the member was given meanwhile is on its way on this very stream, or here already.
            self.committing[at].is_stale = true;
            if self.committing[at].epoch != self.membership.epoch() {
                self.commit_stale_again();
            }
            return;
        }
        let Some(committing) = self.committing.remove(at) else { return };
        let failed = answer.errors.iter().find_map(|failed| {
            let topic = self.held.get(&(failed.topic_id.clone(), failed.partition)).map(|held| held.topic.clone());
            let error = Error::from_detail(failed.error.as_ref()?);
            Some(match topic {
                Some(topic) => error.at(&topic, failed.partition),
                None => error,
            })
        });
        for failed in &answer.errors {
            // It was not taken: whatever is committed next for it is news.
            if let Some(held) = self.held.get_mut(&(failed.topic_id.clone(), failed.partition)) {
                held.committed = -1;
            }
        }
        match (committing.reply, failed) {
            (Some(reply), failed) => {
                let _ = reply.send(failed.map_or(Ok(()), Err));
            }
            (None, Some(error)) => tracing::warn!(group = self.membership.group(), %error, "a commit was not taken"),
            (None, None) => {}
        }
    }

    /// Nothing can be committed any more for this reason.
    pub(crate) fn fail_commits(&mut self, error: &Error) {
        for committing in self.committing.drain(..) {
            if let Some(reply) = committing.reply {
                let _ = reply.send(Err(error.clone()));
            }
        }
    }

    /// The user is done with what it had in hand.
    pub(crate) fn hand_back(&mut self, now: Instant) -> bool {
        let mut done = Vec::new();
        for (part, held) in self.held.iter_mut().filter(|(_, held)| held.in_hand) {
            held.in_hand = false;
            held.processed = held.handed;
            if held.revoking {
                done.push(part.clone());
            }
        }
        self.release(&done, now);
        !done.is_empty()
    }

    /// This is handed out now, unless it must not be any more.
    pub(crate) fn hand_out(&mut self, part: &Part, next: Place) -> bool {
        match self.held.get_mut(part).filter(|held| !held.revoking) {
            Some(held) => {
                held.handed = next;
                held.in_hand = true;
                true
            }
            None => false,
        }
    }

    /// No more events.
    pub(crate) fn end_events(&mut self) {
        self.events = None;
    }

    pub(crate) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    pub(crate) fn wake_me(&mut self, waker: &Waker) {
        self.waker = Some(waker.clone());
    }
}

fn to_pb(part: &Part, place: Place) -> pb::CommitOffset {
    pb::CommitOffset {
        topic_id: part.0.clone(),
        partition: part.1,
        offset: place.offset,
        leader_epoch: place.epoch,
        metadata: String::new(),
    }
}

fn commit_request(request_id: u64, member_epoch: i32, offsets: Vec<pb::CommitOffset>) -> pb::SessionRequest {
    let commit = pb::SessionCommit { request_id, member_epoch, offsets };
    pb::SessionRequest { request: Some(pb::session_request::Request::Commit(commit)) }
}
