//! What a group's consumer and its session's task share: the membership, how far each partition is read and committed,
//! and what either side has to tell the other.
//!
//! ```text
//!   consumer: hands out, marks what was done   ---- State (one short lock) ----   task: stream, heartbeats, commits
//!             <- changes: begin, end                                     work ->
//!
//!   a partition on its way out:  revoking -> not in hand, no guards -> leaving: its commits are answered -> given up
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::task::Waker;
use std::time::Instant;

use flowstone_protocol::pb;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::error::{Error, ErrorCode, Result};
use crate::group::events::{GroupEvent, Revocation};
use crate::group::membership::{Membership, Part, Standing, Step};
use crate::locked;

/// What the consumer must do before it hands out anything more.
#[derive(Debug)]
pub(crate) enum Change {
    /// Read this partition from here on.
    Begin { topic: Arc<crate::metadata::TopicInfo>, place: Place },
    /// Read it no more.
    End,
}

/// A partition that this member owns, with its position known.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) topic: Arc<str>,
    /// Which time it is that this member owns it: what was handed out in an earlier one counts no more.
    pub(crate) serial: u64,
    /// The user is done with everything before it.
    pub(crate) processed: Place,
    /// What the coordinator was last told, answered or not; -1 for nothing.
    committed: i64,
    /// What the coordinator last said that it has; -1 for nothing.
    acknowledged: i64,
    /// Behind what was handed out last.
    pub(crate) handed: Place,
    /// Handed out no more, given up once it is not in hand and nobody holds its revocation.
    pub(crate) revoking: bool,
    /// Revocations that the user holds.
    guards: usize,
    /// Its offsets commit with transactions, never by themselves.
    in_transactions: bool,
}

impl Held {
    /// One whose reading begins here; `committed` where the group has that already.
    pub(crate) fn new(topic: Arc<str>, serial: u64, place: Place, committed: bool) -> Self {
        let known = if committed { place.offset } else { -1 };
        Self {
            topic,
            serial,
            processed: place,
            committed: known,
            acknowledged: known,
            handed: place,
            revoking: false,
            guards: 0,
            in_transactions: false,
        }
    }
}

/// A position, with the leader epoch of the last record before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: i64,
    pub(crate) epoch: i32,
}

/// Commits that are sent and not answered, at most; all that come meanwhile wait as one. The broker takes 64.
const COMMITS_IN_FLIGHT_MAX: usize = 16;
/// Events that nobody took, at most: a listener that is further behind is told no more.
const EVENTS_MAX: usize = 1024;

/// A commit on its way.
#[derive(Debug, Default)]
struct Committing {
    /// Under which request id and which epoch it was sent last; none where it waits for its turn, or a stream.
    sent: Option<(u64, i32)>,
    /// It came under an epoch that was over: it goes again under the next one.
    is_stale: bool,
    offsets: BTreeMap<Part, Place>,
    /// Some of it belongs to another member by now.
    failure: Option<Error>,
    /// Why it was not taken when it was tried last, where it goes again.
    trouble: Option<Error>,
    replies: Vec<Arc<Reply>>,
}

/// Where it goes how a commit ended. Where a later commit has some of its partitions, both have to end before it is told, and
/// what either met is its failure.
#[derive(Debug)]
struct Reply {
    sender: oneshot::Sender<Result<()>>,
    failure: OnceLock<Error>,
}

impl Reply {
    fn new(sender: oneshot::Sender<Result<()>>) -> Arc<Self> {
        Arc::new(Self { sender, failure: OnceLock::new() })
    }

    /// One of the commits that it waits for has ended; the last one tells.
    fn settle(self: Arc<Self>, failure: Option<&Error>) {
        if let Some(failure) = failure {
            self.failure.get_or_init(|| failure.clone());
        }
        if let Some(Self { sender, failure }) = Arc::into_inner(self) {
            // A receiver that is gone does not mind.
            let _ = sender.send(failure.into_inner().map_or(Ok(()), Err));
        }
    }
}

/// How the session is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closing {
    /// What is in hand was not dealt with.
    Dropped,
    /// What was handed out is done.
    Closed,
}

/// A partition whose beginning is to be looked up: which, its topic's name, and its serial.
pub(crate) type Wanted = (Part, String, u64);

/// What listeners are told once the lock is given back.
#[derive(Debug)]
enum Told {
    Assigned(Vec<(String, i32)>),
    Revoking(Vec<(Part, u64)>, Vec<(String, i32)>),
    Lost(Vec<(String, i32)>),
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) membership: Membership,
    pub(crate) held: HashMap<Part, Held>,
    /// The user has what was handed out last of this one in hand.
    in_hand: Option<Part>,
    /// Part of `held`: given up once their commits are answered.
    leaving: BTreeSet<Part>,
    /// Owned, and not held yet: which lookup it waits for.
    beginning: HashMap<Part, u64>,
    last_serial: u64,
    /// Whether positions are committed without being asked for.
    auto_commit: bool,
    /// For the consumer: one for each partition at most, the later replaces the earlier.
    changes: HashMap<Part, Change>,
    /// For the stream. Bounded: heartbeats while there is a stream, and what may be in flight of commits.
    pub(crate) outgoing: VecDeque<pb::SessionRequest>,
    /// Looked up next: where to begin.
    pub(crate) to_begin: Vec<Wanted>,
    /// Commits without an answer, oldest first: those in flight and one that waits.
    committing: VecDeque<Committing>,
    next_request: u64,
    /// Why the membership is over, or what went wrong beside it; told to the user once.
    pub(crate) failure: Option<Error>,
    /// Why the last commits of a member that is closed were not taken.
    close_failure: Option<Error>,
    pub(crate) over: bool,
    pub(crate) closing: Option<Closing>,
    /// Its last commits are on their way.
    is_closing: bool,
    /// Of the task that polls the consumer.
    waker: Option<Waker>,
    events: Option<mpsc::Sender<GroupEvent>>,
    told: Vec<Told>,
}

/// See the module.
pub(crate) struct Shared {
    /// Guards the whole state; held for a few assignments at a time, never across an await.
    state: Mutex<State>,
    /// There is something for the session's task.
    pub(crate) work: Notify,
    /// A commit was answered, or given up, perhaps.
    answered: Notify,
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
            in_hand: None,
            leaving: BTreeSet::new(),
            beginning: HashMap::new(),
            last_serial: 0,
            auto_commit,
            changes: HashMap::new(),
            outgoing: VecDeque::new(),
            to_begin: Vec::new(),
            committing: VecDeque::new(),
            next_request: 0,
            failure: None,
            close_failure: None,
            over: false,
            closing: None,
            is_closing: false,
            waker: None,
            events: None,
            told: Vec::new(),
        };
        Arc::new(Self { state: Mutex::new(state), work: Notify::new(), answered: Notify::new() })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Changes the state as a whole, and tells the session's task and, once the lock is given back, whoever listens.
    pub(crate) fn update<T>(self: &Arc<Self>, change: impl FnOnce(&mut State) -> T) -> T {
        let (result, told, events) = {
            let mut state = self.state();
            let result = change(&mut state);
            state.wake();
            let told = std::mem::take(&mut state.told);
            let events = if told.is_empty() { None } else { state.events.clone() };
            (result, told, events)
        };
        self.work.notify_one();
        self.answered.notify_waiters();
        // A revocation that nobody takes is dropped here, and takes the lock.
        if let Some(events) = events
            && !told.into_iter().all(|told| events.try_send(self.event(told)).is_ok())
        {
            self.end_events();
        }
        result
    }

    fn event(self: &Arc<Self>, told: Told) -> GroupEvent {
        match told {
            Told::Assigned(partitions) => GroupEvent::Assigned(partitions),
            Told::Lost(partitions) => GroupEvent::Lost(partitions),
            Told::Revoking(parts, partitions) => {
                GroupEvent::Revoking(Revocation::new(Arc::clone(self), parts, partitions))
            }
        }
    }

    /// Events from now on.
    pub(crate) fn subscribe(&self) -> mpsc::Receiver<GroupEvent> {
        let (sender, receiver) = mpsc::channel(EVENTS_MAX);
        let earlier = {
            let mut state = self.state();
            if state.over { Some(sender) } else { state.events.replace(sender) }
        };
        // Outside the lock: what is left in it may be a revocation.
        drop(earlier);
        receiver
    }

    /// No more events.
    pub(crate) fn end_events(&self) {
        let events = self.state().events.take();
        // Outside the lock, as above.
        drop(events);
    }

    /// Does what the membership says.
    pub(crate) fn perform(self: &Arc<Self>, steps: Vec<Step>, now: Instant) {
        self.update(|state| state.perform(steps, now));
    }

    /// The coordinator said something.
    pub(crate) fn heard(self: &Arc<Self>, response: pb::SessionResponse, now: Instant) -> Standing {
        use pb::session_response::Response;
        self.update(|state| {
            let (joined, assigned) = match &response.response {
                Some(Response::Committed(answer)) => {
                    state.committed(answer, now);
                    (false, false)
                }
                Some(Response::Joined(_)) => (true, false),
                Some(Response::Assignment(_)) => (false, true),
                Some(Response::Heartbeat(_)) => {
                    state.send_commits();
                    (false, false)
                }
                _ => (false, false),
            };
            let (steps, standing) = state.membership.heard(response, now);
            // Commits first: what is not reported as owned any more cannot be committed.
            if joined {
                state.commit_all_again();
            } else if assigned {
                state.commit_stale_again();
            }
            state.perform(steps, now);
            standing
        })
    }

    /// One revocation of these is dealt with.
    pub(crate) fn unguard(self: &Arc<Self>, parts: &[(Part, u64)], now: Instant) {
        self.update(|state| {
            let mut free = Vec::new();
            for (part, serial) in parts {
                // It may have been lost, and given anew, since.
                if let Some(held) = state.held.get_mut(part).filter(|held| held.serial == *serial) {
                    held.guards = held.guards.saturating_sub(1);
                    free.push(part.clone());
                }
            }
            state.release(&free, now);
        });
    }

    /// Waits until no commit of this partition is under way. Once its offsets commit with transactions, none follows.
    pub(crate) async fn commits_answered(&self, part: &Part) {
        loop {
            let answered = self.answered.notified();
            let mut answered = std::pin::pin!(answered);
            // Before looking, so that no answer is missed in between.
            answered.as_mut().enable();
            if !self.state().is_committing(part) {
                return;
            }
            answered.await;
        }
    }

    /// The membership is over; `failure` is why, where the member did not leave by itself.
    pub(crate) fn ended(self: &Arc<Self>, failure: Option<Error>) {
        self.update(|state| {
            let steps = state.membership.lose_all();
            state.perform(steps, Instant::now());
            state.fail_commits(&failure.clone().unwrap_or_else(|| Error::closed("group's consumer")));
            let close_failure = state.close_failure.take();
            state.failure = failure.or(close_failure);
            state.over = true;
        });
        self.end_events();
    }
}

impl State {
    fn perform(&mut self, steps: Vec<Step>, now: Instant) {
        let mut revoking = Vec::new();
        let mut lost = Vec::new();
        for step in steps {
            match step {
                Step::Send(request) => self.outgoing.push_back(*request),
                Step::Begin(part, topic) => {
                    self.last_serial += 1;
                    self.beginning.insert(part.clone(), self.last_serial);
                    self.to_begin.push((part, topic, self.last_serial));
                }
                Step::Revoke(part) => {
                    self.stop(&part);
                    if let Some(held) = self.held.get_mut(&part) {
                        held.revoking = true;
                    }
                    revoking.push(part);
                }
                Step::Lost(part) => {
                    self.stop(&part);
                    self.in_hand.take_if(|known| *known == part);
                    self.leaving.remove(&part);
                    if let Some(held) = self.held.remove(&part) {
                        lost.push((part.clone(), (held.topic.to_string(), part.1)));
                    }
                }
            }
        }
        if !lost.is_empty() {
            self.lose_commits(&lost);
            self.tell(Told::Lost(lost.into_iter().map(|(_, named)| named).collect()));
        }
        if self.events.is_some() {
            let (mut guarded, mut named) = (Vec::new(), Vec::new());
            for part in &revoking {
                if let Some(held) = self.held.get_mut(part) {
                    held.guards += 1;
                    guarded.push((part.clone(), held.serial));
                    named.push((held.topic.to_string(), part.1));
                }
            }
            if !guarded.is_empty() {
                self.tell(Told::Revoking(guarded, named));
            }
        }
        self.release(&revoking, now);
    }

    /// Nothing more of this partition is handed out.
    fn stop(&mut self, part: &Part) {
        self.to_begin.retain(|(known, ..)| known != part);
        self.beginning.remove(part);
        self.changes.insert(part.clone(), Change::End);
    }

    fn tell(&mut self, told: Told) {
        if self.events.is_some() {
            self.told.push(told);
        }
    }

    /// It is known where these begin: they are read from now on, as far as they are still wanted.
    pub(crate) fn begin(
        &mut self,
        starts: impl IntoIterator<Item = (Wanted, Arc<crate::metadata::TopicInfo>, Place, bool)>,
    ) {
        let mut begun = Vec::new();
        for ((part, _, serial), topic, place, committed) in starts {
            if self.beginning.get(&part) != Some(&serial) {
                continue;
            }
            self.beginning.remove(&part);
            begun.push((topic.name.to_string(), part.1));
            self.held.insert(part.clone(), Held::new(topic.name.clone(), serial, place, committed));
            self.changes.insert(part, Change::Begin { topic, place });
        }
        if !begun.is_empty() {
            self.tell(Told::Assigned(begun));
        }
    }

    /// Whether this lookup's answer is still waited for.
    pub(crate) fn is_beginning(&self, (part, _, serial): &Wanted) -> bool {
        self.beginning.get(part) == Some(serial)
    }

    pub(crate) fn take_changes(&mut self) -> HashMap<Part, Change> {
        std::mem::take(&mut self.changes)
    }

    /// Whether the consumer has been told everything.
    pub(crate) fn is_settled(&self) -> bool {
        self.membership.is_settled(self.held.len()) && self.changes.is_empty()
    }

    /// Gives up what of these is on its way out and not held any more, its positions committed first.
    fn release(&mut self, parts: &[Part], now: Instant) {
        let mut done = Vec::new();
        for part in parts {
            match self.held.get(part) {
                Some(held) if !held.revoking || held.guards > 0 || self.in_hand.as_ref() == Some(part) => {}
                Some(_) => {
                    if self.leaving.insert(part.clone()) {
                        self.commit_processed(Some(part));
                    }
                }
                None => done.push(part.clone()),
            }
        }
        self.give_up(done, now);
    }

    /// Gives up these, and what of those that leave has no commit under way any more.
    fn give_up(&mut self, mut done: Vec<Part>, now: Instant) {
        let answered: Vec<Part> = self.leaving.iter().filter(|part| !self.is_committing(part)).cloned().collect();
        for part in answered {
            self.leaving.remove(&part);
            self.held.remove(&part);
            done.push(part);
        }
        if !done.is_empty()
            && let Some(Step::Send(request)) = self.membership.released(&done, now)
        {
            self.outgoing.push_back(*request);
        }
    }

    /// Commits what the user is done with, of one partition or of all, where that is news and done without being asked.
    pub(crate) fn commit_processed(&mut self, of: Option<&Part>) {
        if !self.auto_commit {
            return;
        }
        let mut offsets = BTreeMap::new();
        let mut news = |part: &Part, held: &Held| {
            if !held.in_transactions && held.processed.offset != held.committed {
                offsets.insert(part.clone(), held.processed);
            }
        };
        match of {
            Some(part) => {
                if let Some(held) = self.held.get(part) {
                    news(part, held);
                }
            }
            None => self.held.iter().for_each(|(part, held)| news(part, held)),
        }
        if !offsets.is_empty() {
            self.commit(offsets, None);
        }
    }

    /// Commits all that was handed out.
    pub(crate) fn commit_handed(&mut self, reply: oneshot::Sender<Result<()>>) {
        let mut offsets = BTreeMap::new();
        for (part, held) in &self.held {
            // What is under way may still fail, or be of another position: it goes along again.
            let is_there = held.handed.offset == held.acknowledged && held.handed.offset == held.committed;
            if !held.in_transactions && !is_there {
                offsets.insert(part.clone(), held.handed);
            }
        }
        if offsets.is_empty() {
            // A receiver that is gone does not mind.
            let _ = reply.send(Ok(()));
            return;
        }
        self.commit(offsets, Some(reply));
    }

    /// Puts a commit on its way; it is sent again where its stream breaks.
    pub(crate) fn commit(&mut self, offsets: BTreeMap<Part, Place>, reply: Option<oneshot::Sender<Result<()>>>) {
        for (part, place) in &offsets {
            if let Some(held) = self.held.get_mut(part) {
                held.committed = place.offset;
            }
        }
        let waits = |last: &Committing| last.sent.is_none() && last.failure.is_none();
        if !self.committing.back().is_some_and(waits) {
            self.committing.push_back(Committing::default());
        }
        if let Some(last) = self.committing.back_mut() {
            last.offsets.extend(offsets);
            last.replies.retain(|reply| !reply.sender.is_closed());
            last.replies.extend(reply.map(Reply::new));
        }
        self.send_commits();
    }

    /// Sends what waits, as far as there is a stream and room.
    fn send_commits(&mut self) {
        if !self.membership.is_member() {
            return;
        }
        let in_flight = self.committing.iter().filter(|committing| committing.sent.is_some()).count();
        let room = COMMITS_IN_FLIGHT_MAX.saturating_sub(in_flight);
        let epoch = self.membership.epoch();
        for committing in self.committing.iter_mut().filter(|committing| committing.sent.is_none()).take(room) {
            self.next_request += 1;
            committing.sent = Some((self.next_request, epoch));
            let offsets = committing.offsets.iter().map(|(part, place)| to_pb(part, *place)).collect();
            self.outgoing.push_back(commit_request(self.next_request, epoch, offsets));
        }
    }

    /// There is a new stream on which this is a member: what was not answered on the old one goes again, in its order.
    fn commit_all_again(&mut self) {
        for committing in &mut self.committing {
            committing.sent = None;
            committing.is_stale = false;
        }
        self.send_commits();
    }

    /// There is a new epoch, perhaps: what came under an older one goes again.
    fn commit_stale_again(&mut self) {
        let epoch = self.membership.epoch();
        let mut at = 0;
        while at < self.committing.len() {
            let committing = &self.committing[at];
            let behind = committing.is_stale && committing.sent.is_some_and(|(_, sent)| sent != epoch);
            if behind && self.queue_again(at) {
                continue;
            }
            at += 1;
        }
        self.send_commits();
    }

    /// Has this commit sent again, without what a later one has of its partitions: a position must not go back. True
    /// where nothing of it is left. Whoever waits for it waits for the later ones, too.
    fn queue_again(&mut self, at: usize) -> bool {
        let Some(mut committing) = self.committing.remove(at) else { return false };
        for later in self.committing.range_mut(at..) {
            let before = committing.offsets.len();
            committing.offsets.retain(|part, _| !later.offsets.contains_key(part));
            if committing.offsets.len() < before {
                later.replies.extend(committing.replies.iter().cloned());
            }
        }
        if committing.offsets.is_empty() {
            self.settle(committing);
            return true;
        }
        committing.sent = None;
        committing.is_stale = false;
        self.committing.insert(at, committing);
        false
    }

    /// The coordinator answered a commit.
    fn committed(&mut self, answer: &pb::Committed, now: Instant) {
        let is_it = |known: &Committing| known.sent.is_some_and(|(request_id, _)| request_id == answer.request_id);
        let Some(at) = self.committing.iter().position(is_it) else { return };
        let stale = |failed: &pb::OffsetError| {
            failed.error.as_ref().is_some_and(|detail| detail.code() == ErrorCode::StaleMemberEpoch)
        };
        if answer.errors.iter().any(stale) {
            // What the member was given meanwhile is on its way on this very stream, or here already.
            self.committing[at].is_stale = true;
            self.commit_stale_again();
            return;
        }
        let passing =
            |failed: &pb::OffsetError| failed.error.as_ref().map(Error::from_detail).filter(Error::is_retriable);
        if let Some(error) = answer.errors.iter().find_map(passing) {
            // A coordinator that is not it any more, or cannot write just now: on the next stream, or with the next heartbeat.
            tracing::warn!(group = self.membership.group(), %error, "a commit was not taken; it goes again");
            self.committing[at].trouble = Some(error);
            self.queue_again(at);
            return;
        }
        let Some(mut committing) = self.committing.remove(at) else { return };
        for failed in &answer.errors {
            let part = (failed.topic_id.clone(), failed.partition);
            let Some(detail) = &failed.error else { continue };
            let mut error = Error::from_detail(detail);
            // It was not taken: whatever is committed next for it is news.
            if let Some(held) = self.held.get_mut(&part) {
                held.committed = -1;
                error = error.at(&held.topic, part.1);
            }
            committing.failure.get_or_insert(error);
            committing.offsets.remove(&part);
        }
        for (part, place) in &committing.offsets {
            if let Some(held) = self.held.get_mut(part) {
                held.acknowledged = place.offset;
            }
        }
        self.settle(committing);
        self.send_commits();
        self.give_up(Vec::new(), now);
    }

    /// Tells how a commit ended.
    fn settle(&mut self, committing: Committing) {
        match (committing.replies.is_empty(), committing.failure) {
            (true, Some(error)) => {
                tracing::warn!(group = self.membership.group(), %error, "a commit was not taken");
                if self.closing == Some(Closing::Closed) {
                    self.close_failure.get_or_insert(error);
                }
            }
            (_, failure) => committing.replies.into_iter().for_each(|reply| reply.settle(failure.as_ref())),
        }
    }

    /// Why commits that are under way were not taken when they were tried last.
    pub(crate) fn trouble(&self) -> Option<&Error> {
        self.committing.iter().find_map(|committing| committing.trouble.as_ref())
    }

    /// These may be another member's by now: nothing of them may be committed any more, now or after they come back.
    fn lose_commits(&mut self, lost: &[(Part, (String, i32))]) {
        for committing in &mut self.committing {
            for (part, (topic, partition)) in lost {
                if committing.offsets.remove(part).is_some() {
                    let message = "another member may have it by now, and reads on from what was committed before";
                    let error = Error::new(ErrorCode::NotAssigned, message).at(topic, *partition);
                    committing.failure.get_or_insert(error);
                }
            }
        }
        let empty = |committing: &Committing| committing.offsets.is_empty() && committing.failure.is_some();
        let (ended, rest) = std::mem::take(&mut self.committing).into_iter().partition(empty);
        self.committing = rest;
        let ended: VecDeque<Committing> = ended;
        for committing in ended {
            self.settle(committing);
        }
    }

    /// Whether a commit of this partition is under way.
    fn is_committing(&self, part: &Part) -> bool {
        self.committing.iter().any(|committing| committing.offsets.contains_key(part))
    }

    /// Whether any commit is under way.
    pub(crate) fn is_committing_any(&self) -> bool {
        !self.committing.is_empty()
    }

    /// Nothing can be committed any more for this reason.
    fn fail_commits(&mut self, error: &Error) {
        for mut committing in std::mem::take(&mut self.committing) {
            committing.failure.get_or_insert_with(|| error.clone());
            self.settle(committing);
        }
    }

    /// The member is to leave: the last commits go on their way, once.
    pub(crate) fn begin_closing(&mut self, closing: Closing, now: Instant) {
        if std::mem::replace(&mut self.is_closing, true) {
            return;
        }
        if closing == Closing::Closed {
            self.hand_back(now);
        }
        self.commit_processed(None);
    }

    /// The user is done with what it had in hand.
    pub(crate) fn hand_back(&mut self, now: Instant) -> bool {
        let Some(part) = self.in_hand.take() else { return false };
        let Some(held) = self.held.get_mut(&part) else { return false };
        held.processed = held.handed;
        let revoking = held.revoking;
        if revoking {
            self.release(&[part], now);
        }
        revoking
    }

    /// This is handed out now, with its end at `next`, unless it must not be any more. `serial` is that of the first time
    /// that something of it was handed out.
    pub(crate) fn hand_out(&mut self, part: &Part, next: Place, serial: Option<u64>) -> Option<u64> {
        if self.changes.contains_key(part) {
            return None;
        }
        let held = self.held.get_mut(part).filter(|held| !held.revoking)?;
        if serial.is_some_and(|serial| serial != held.serial) {
            return None;
        }
        held.handed = next;
        let serial = held.serial;
        self.in_hand = Some(part.clone());
        Some(serial)
    }

    /// What was handed out as a whole begins here, and nothing of it is in hand.
    pub(crate) fn hold_at(&mut self, part: &Part, offset: i64) {
        self.in_hand.take_if(|known| known == part);
        if let Some(held) = self.held.get_mut(part) {
            held.handed = Place { offset, ..held.processed };
        }
    }

    /// The position moved past records that nobody is handed: they count as processed, unless something before them is in
    /// hand.
    pub(crate) fn passed_over(&mut self, part: &Part, place: Place) {
        if self.in_hand.as_ref() == Some(part) || self.changes.contains_key(part) {
            return;
        }
        if let Some(held) = self.held.get_mut(part) {
            (held.processed, held.handed) = (place, place);
        }
    }

    /// The user reads on elsewhere.
    pub(crate) fn sought(&mut self, part: &Part, offset: i64) {
        self.in_hand.take_if(|known| known == part);
        if let Some(held) = self.held.get_mut(part) {
            let place = Place { offset, epoch: -1 };
            (held.processed, held.handed) = (place, place);
        }
    }

    /// From now on this partition's offsets commit with transactions alone.
    pub(crate) fn in_transactions(&mut self, part: &Part) {
        if let Some(held) = self.held.get_mut(part) {
            held.in_transactions = true;
        }
    }

    /// That of the time for which this member has the partition; none where the consumer is yet to hear of that time.
    pub(crate) fn serial(&self, part: &Part) -> Option<u64> {
        if self.changes.contains_key(part) {
            return None;
        }
        self.held.get(part).map(|held| held.serial)
    }

    /// Whether this partition is this member's, and has been since the time with this serial began.
    pub(crate) fn owns(&self, part: &Part, serial: u64) -> bool {
        self.held.get(part).is_some_and(|held| held.serial == serial)
    }

    fn wake(&mut self) {
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures::FutureExt;
    use pb::session_request::Request as Say;
    use pb::session_response::Response as Heard;

    use super::*;

    const T: &[u8] = &[7; 16];

    fn part(partition: i32) -> Part {
        (Bytes::from_static(T), partition)
    }

    fn place(offset: i64) -> Place {
        Place { offset, epoch: 3 }
    }

    /// A member, and what its stream carries.
    struct Member {
        shared: Arc<Shared>,
        now: Instant,
    }

    impl Member {
        /// One that owns these partitions, under epoch 1, with nothing committed.
        fn with(partitions: &[i32], auto_commit: bool) -> Self {
            let now = Instant::now();
            let join = pb::JoinGroup { group: "g".into(), member_id: "m".into(), ..Default::default() };
            let member = Self { shared: Shared::new(Membership::new(join, now), auto_commit), now };
            member.join();
            member.assign(1, partitions);
            member.said();
            member
        }

        fn join(&self) {
            self.shared.state().membership.connected(self.now);
            self.hear(Heard::Joined(pb::Joined {
                member_epoch: 1,
                session_timeout_ms: 10_000,
                heartbeat_interval_ms: 1_000,
                ..Default::default()
            }));
        }

        fn hear(&self, response: Heard) {
            self.shared.heard(pb::SessionResponse { response: Some(response) }, self.now);
        }

        /// What is assigned anew begins at offset 0.
        fn assign(&self, epoch: i32, partitions: &[i32]) {
            let topic_id = Bytes::from_static(T);
            let topic = pb::TopicPartitions { topic_id, partitions: partitions.to_vec(), topic: "t".to_owned() };
            let partitions = vec![topic];
            self.hear(Heard::Assignment(pb::Assignment { member_epoch: epoch, partitions, ..Default::default() }));
            let mut state = self.shared.state();
            let wanted = std::mem::take(&mut state.to_begin);
            let named =
                pb::TopicMetadata { name: "t".to_owned(), topic_id: Bytes::from_static(T), ..Default::default() };
            let topic = Arc::new(crate::metadata::TopicInfo::from_pb(&named));
            state.begin(wanted.into_iter().map(|wanted| (wanted, topic.clone(), place(0), true)));
            state.take_changes();
        }

        fn hand_out(&self, partition: i32, next: i64) {
            let mut state = self.shared.state();
            state.hand_back(self.now);
            assert!(state.hand_out(&part(partition), place(next), None).is_some());
        }

        fn hand_back(&self) {
            self.shared.state().hand_back(self.now);
        }

        fn commit(&self) -> oneshot::Receiver<Result<()>> {
            let (reply, answered) = oneshot::channel();
            self.shared.state().commit_handed(reply);
            answered
        }

        /// Commits as (request, epoch, offsets by partition), and reports of what is owned, in their order.
        fn said(&self) -> Vec<Said> {
            let requests = std::mem::take(&mut self.shared.state().outgoing);
            let said = |request: pb::SessionRequest| match request.request {
                Some(Say::Commit(commit)) => {
                    let offsets = commit.offsets.iter().map(|offset| (offset.partition, offset.offset)).collect();
                    Said::Commit(commit.request_id, commit.member_epoch, offsets)
                }
                Some(Say::Heartbeat(heartbeat)) => {
                    Said::Owned(heartbeat.owned.iter().flat_map(|topic| topic.partitions.clone()).collect())
                }
                other => panic!("{other:?}"),
            };
            requests.into_iter().map(said).collect()
        }

        fn answer(&self, request_id: u64, refused: &[(i32, ErrorCode)]) {
            let error = |(partition, code): &(i32, ErrorCode)| pb::OffsetError {
                topic_id: Bytes::from_static(T),
                partition: *partition,
                error: Some(flowstone_protocol::Error::new(*code, "a test says so").to_detail()),
            };
            let errors = refused.iter().map(error).collect();
            self.hear(Heard::Committed(pb::Committed { request_id, errors }));
        }
    }

    #[derive(Debug, PartialEq)]
    enum Said {
        Commit(u64, i32, Vec<(i32, i64)>),
        Owned(Vec<i32>),
    }

    fn code(answered: oneshot::Receiver<Result<()>>) -> Option<ErrorCode> {
        let answer = answered.now_or_never().expect("an answer").expect("no hang-up");
        answer.err().map(|error| error.code())
    }

    #[test]
    fn a_partition_is_given_up_once_its_commit_is_answered() {
        let member = Member::with(&[0, 1], true);
        member.hand_out(0, 10);
        member.assign(1, &[1]);
        assert_eq!(member.said(), [Said::Owned(vec![0, 1])], "it is in hand");
        member.hand_back();
        assert_eq!(member.said(), [Said::Commit(1, 1, vec![(0, 10)])], "and committed first");
        // It came late: the member was given something else before. What it has under way goes again.
        member.assign(2, &[1, 2]);
        assert_eq!(member.said(), [Said::Owned(vec![0, 1, 2])], "it is still held");
        member.answer(1, &[(0, ErrorCode::StaleMemberEpoch)]);
        assert_eq!(member.said(), [Said::Commit(2, 2, vec![(0, 10)])]);
        member.answer(2, &[]);
        assert_eq!(member.said(), [Said::Owned(vec![1, 2])]);
    }

    #[test]
    fn what_was_lost_is_never_committed_again() {
        let member = Member::with(&[0, 1], false);
        member.hand_out(0, 10);
        member.hand_out(1, 5);
        let answered = member.commit();
        assert_eq!(member.said(), [Said::Commit(1, 1, vec![(0, 10), (1, 5)])]);
        member.hear(Heard::Ended(flowstone_protocol::Error::new(ErrorCode::UnknownMember, "late").to_detail()));
        assert_eq!(code(answered), Some(ErrorCode::NotAssigned));
        // Back again, with the same partitions, and whatever others committed meanwhile.
        member.join();
        member.assign(1, &[0, 1]);
        assert_eq!(member.said(), [Said::Owned(vec![0, 1])]);
        // The answer to the old one is of no account.
        member.answer(1, &[]);
        assert_eq!(code(member.commit()), None, "nothing was handed out since");
    }

    #[test]
    fn a_commit_goes_again_on_the_next_stream_and_never_behind_a_later_one() {
        let member = Member::with(&[0, 1], false);
        member.hand_out(0, 10);
        let first = member.commit();
        member.assign(2, &[0, 1, 2]);
        member.hand_out(0, 20);
        member.hand_out(1, 7);
        let second = member.commit();
        let both =
            [Said::Commit(1, 1, vec![(0, 10)]), Said::Owned(vec![0, 1, 2]), Said::Commit(2, 2, vec![(0, 20), (1, 7)])];
        assert_eq!(member.said(), both);
        // Stale, and overtaken: it is part of the later one now.
        member.answer(1, &[(0, ErrorCode::StaleMemberEpoch)]);
        assert_eq!(member.said(), []);
        member.shared.state().membership.broken();
        member.hand_out(0, 30);
        let third = member.commit();
        assert_eq!(member.said(), [], "there is no stream");
        member.join();
        assert_eq!(
            member.said(),
            [Said::Commit(3, 1, vec![(0, 20), (1, 7)]), Said::Commit(4, 1, vec![(0, 30), (1, 7)])]
        );
        member.answer(3, &[]);
        assert_eq!((code(first), code(second)), (None, None));
        member.answer(4, &[(0, ErrorCode::NotAssigned)]);
        assert_eq!(code(third), Some(ErrorCode::NotAssigned));
    }

    #[test]
    fn commits_without_an_answer_are_few_however_many_are_asked_for() {
        let member = Member::with(&[0], false);
        let mut answered = Vec::new();
        for offset in 1..=1000 {
            member.hand_out(0, offset);
            answered.push(member.commit());
        }
        assert_eq!(member.said().len(), COMMITS_IN_FLIGHT_MAX);
        for request in 1..=COMMITS_IN_FLIGHT_MAX as u64 {
            member.answer(request, &[]);
        }
        let last = COMMITS_IN_FLIGHT_MAX as u64 + 1;
        assert_eq!(member.said(), [Said::Commit(last, 1, vec![(0, 1000)])], "all that waited, as one");
        member.answer(last, &[]);
        assert!(answered.into_iter().all(|answered| code(answered).is_none()));
    }

    #[test]
    fn a_commit_that_failed_is_made_good_by_the_next() {
        let member = Member::with(&[0], true);
        member.hand_out(0, 10);
        member.hand_back();
        member.shared.state().commit_processed(None);
        assert_eq!(member.said(), [Said::Commit(1, 1, vec![(0, 10)])]);
        // Asked for while that one is under way: its failure must not pass for success.
        let asked = member.commit();
        assert_eq!(member.said(), [Said::Commit(2, 1, vec![(0, 10)])]);
        member.answer(1, &[(0, ErrorCode::NotAssigned)]);
        member.answer(2, &[]);
        assert_eq!(code(asked), None);
        member.shared.state().commit_processed(None);
        assert_eq!(member.said(), [Said::Commit(3, 1, vec![(0, 10)])]);
    }

    #[test]
    fn a_commit_that_cannot_be_taken_just_now_goes_again_with_the_next_heartbeat() {
        let member = Member::with(&[0], false);
        member.hand_out(0, 10);
        let mut asked = member.commit();
        assert_eq!(member.said(), [Said::Commit(1, 1, vec![(0, 10)])]);
        member.answer(1, &[(0, ErrorCode::NotLeader)]);
        assert_eq!(member.said(), []);
        assert!(asked.try_recv().is_err(), "it is not answered");
        member.hear(Heard::Heartbeat(pb::HeartbeatTaken { member_epoch: 1 }));
        assert_eq!(member.said(), [Said::Commit(2, 1, vec![(0, 10)])]);
        member.answer(2, &[]);
        assert_eq!(code(asked), None);
    }

    #[test]
    fn a_commit_of_which_a_later_one_has_a_part_ends_with_both() {
        let member = Member::with(&[0, 1], false);
        let commit = |offsets: &[(i32, i64)]| {
            let (reply, answered) = oneshot::channel();
            let offsets = offsets.iter().map(|&(partition, offset)| (part(partition), place(offset))).collect();
            member.shared.state().commit(offsets, Some(reply));
            answered
        };
        let (mut first, second) = (commit(&[(0, 10), (1, 5)]), commit(&[(0, 20)]));
        assert_eq!(member.said(), [Said::Commit(1, 1, vec![(0, 10), (1, 5)]), Said::Commit(2, 1, vec![(0, 20)])]);
        member.answer(1, &[(0, ErrorCode::NotLeader), (1, ErrorCode::NotLeader)]);
        assert_eq!(member.shared.state().trouble().map(Error::code), Some(ErrorCode::NotLeader));
        member.hear(Heard::Heartbeat(pb::HeartbeatTaken { member_epoch: 1 }));
        assert_eq!(member.said(), [Said::Commit(3, 1, vec![(1, 5)])]);
        member.answer(3, &[]);
        assert!(first.try_recv().is_err(), "its other partition is in the later one");
        member.answer(2, &[(0, ErrorCode::NotAssigned)]);
        assert_eq!((code(first), code(second)), (Some(ErrorCode::NotAssigned), Some(ErrorCode::NotAssigned)));
    }

    #[test]
    fn transactions_have_a_partition_to_themselves() {
        let member = Member::with(&[0], true);
        member.hand_out(0, 10);
        let serial = member.shared.state().held[&part(0)].serial;
        member.shared.state().commit_processed(None);
        member.shared.state().in_transactions(&part(0));
        member.hand_back();
        member.shared.state().commit_processed(None);
        assert_eq!((member.said(), code(member.commit())), (vec![], None));
        assert!(member.shared.state().owns(&part(0), serial));
        // Lost and given anew is not the same.
        member.hear(Heard::Ended(flowstone_protocol::Error::new(ErrorCode::UnknownMember, "late").to_detail()));
        member.join();
        member.assign(1, &[0]);
        assert!(!member.shared.state().owns(&part(0), serial));
    }

    #[test]
    fn a_revocation_that_is_left_unread_holds_on_and_one_of_an_earlier_time_does_not_count() {
        let member = Member::with(&[0, 1], false);
        let mut events = member.shared.subscribe();
        member.assign(1, &[1]);
        assert_eq!(member.said(), [Said::Owned(vec![0, 1])]);
        let Ok(GroupEvent::Revoking(old)) = events.try_recv() else { panic!("a revocation") };
        member.hear(Heard::Ended(flowstone_protocol::Error::new(ErrorCode::UnknownMember, "late").to_detail()));
        member.join();
        member.assign(1, &[0, 1]);
        member.assign(1, &[1]);
        member.said();
        drop(old);
        assert_eq!(member.said(), [], "the newer one holds on");
        // Its queue dropped, it is given up, and nobody waits for a lock.
        drop(events);
        assert_eq!(member.said(), [Said::Owned(vec![1])]);
    }
}
