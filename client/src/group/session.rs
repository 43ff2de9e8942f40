//! The task around a membership: one stream to the coordinator, wherever that is, heartbeats on time, positions looked up.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowstone_protocol::pb;
use flowstone_protocol::pb::groups_client::GroupsClient;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::mpsc;

use crate::address::ServerAddress;
use crate::admin::{OffsetSpec, list_offsets};
use crate::consumer::StartAt;
use crate::coordinator::Coordinator;
use crate::error::{Error, ErrorCode, Result};
use crate::group::membership::{Part, Standing, Step};
use crate::group::shared::{Closing, Place, Shared, State, Wanted};
use crate::retry::{Backoff, BackoffPolicy};

/// How a session's task goes about it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) coordinator: Arc<Coordinator>,
    /// Where to begin what the group never committed.
    pub(crate) start_at: StartAt,
    /// Time between two commits of what was processed; none without automatic commits.
    pub(crate) commit_every: Option<Duration>,
    /// Keeps a static member's place when it leaves.
    pub(crate) keep_place: bool,
}

/// Longest that a member that was dropped waits for its commits, and that any waits for its leaving to be heard.
const LEAVE_MAX: Duration = Duration::from_secs(5);
/// Positions looked up with one question.
const LOOKUP_MAX: usize = 1000;

/// What a lookup found. What it did not find goes again.
struct Looked {
    wanted: Vec<Wanted>,
    /// Lookups in a row that left some of these out.
    failures: u32,
    found: Vec<Start>,
    /// Why the rest was not found.
    error: Option<Error>,
}

type Lookups = FuturesUnordered<BoxFuture<'static, Looked>>;

/// Where to begin a partition.
struct Start {
    part: Part,
    topic: Arc<crate::metadata::TopicInfo>,
    place: Place,
    /// Whether the group has that committed already.
    committed: bool,
}

/// Why a stream was left.
enum Left {
    /// The member said good-bye.
    Closed,
    /// The membership is over for good.
    Over(Error),
    Broken(Error),
}

/// Whether a member that is to leave need not find its coordinator for that.
fn may_go(state: &State) -> bool {
    match state.closing {
        Some(Closing::Dropped) => true,
        Some(Closing::Closed) => state.membership.epoch() == 0 && !state.is_committing_any(),
        None => false,
    }
}

impl Session {
    /// Runs until the member leaves or is put out for good.
    pub(crate) async fn run(self) {
        let mut backoff = Backoff::new(BackoffPolicy::CONNECT);
        let mut lookups = Lookups::new();
        loop {
            let connected = tokio::select! {
                connected = self.connect() => connected,
                () = self.without_stream(&mut lookups) => return self.shared.ended(None),
            };
            let error = match connected {
                Ok((address, stream, outbound)) => {
                    match self.talk(&address, stream, outbound, &mut lookups, &mut backoff).await {
                        Left::Closed => return self.shared.ended(None),
                        Left::Over(error) => return self.shared.ended(Some(error)),
                        Left::Broken(error) => {
                            self.shared.state().membership.broken();
                            self.coordinator.failed(&address, &error);
                            error
                        }
                    }
                }
                Err(error) if error.is_retriable() => error,
                Err(error) => return self.shared.ended(Some(error)),
            };
            tracing::debug!(key = self.shared.state().membership.group(), %error, "the group's session broke");
            tokio::select! {
                () = tokio::time::sleep(backoff.failed()) => {}
                () = self.without_stream(&mut lookups) => return self.shared.ended(None),
            }
        }
    }

    async fn connect(
        &self,
    ) -> Result<(ServerAddress, tonic::Streaming<pb::SessionResponse>, mpsc::UnboundedSender<pb::SessionRequest>)> {
        let address = self.coordinator.address().await?;
        let channel = self.coordinator.cluster().channel(&address)?;
        // Bounded by what the state queues while there is a stream, see there.
        let (outbound, requests) = mpsc::unbounded_channel();
        let step = self.shared.state().membership.connected(Instant::now());
        if let Step::Send(join) = step {
            let _ = outbound.send(*join);
        }
        self.shared.state().outgoing.clear();
        let mut client = GroupsClient::new(channel);
        let call = client.session(Outbound(requests));
        let timeout = self.coordinator.cluster().request_timeout();
        let error = match tokio::time::timeout(timeout, call).await {
            Ok(Ok(response)) => return Ok((address, response.into_inner(), outbound)),
            Ok(Err(status)) => Error::from_status(&address, status),
            Err(_) => Error::unreachable(format!("the coordinator at {address} did not answer in {timeout:?}")),
        };
        self.coordinator.failed(&address, &error);
        self.shared.state().membership.broken();
        Err(error)
    }

    /// What goes on while there is no stream: time. Returns when the member may go.
    async fn without_stream(&self, lookups: &mut Lookups) {
        loop {
            let next = {
                let state = self.shared.state();
                if may_go(&state) {
                    return;
                }
                state.membership.next_tick()
            };
            self.look_up(lookups);
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => self.tick(),
                () = self.shared.work.notified() => {}
                Some(looked) = lookups.next(), if !lookups.is_empty() => self.looked_up(looked, lookups),
            }
        }
    }

    fn tick(&self) {
        let now = Instant::now();
        let steps = self.shared.state().membership.tick(now);
        if !steps.is_empty() {
            self.shared.perform(steps, now);
        }
    }

    async fn talk(
        &self,
        address: &ServerAddress,
        mut stream: tonic::Streaming<pb::SessionResponse>,
        outbound: mpsc::UnboundedSender<pb::SessionRequest>,
        lookups: &mut Lookups,
        backoff: &mut Backoff,
    ) -> Left {
        let mut commit_at = self.commit_every.map(|every| Instant::now() + every);
        // From when on one that was dropped waits for its commits no longer.
        let mut leave_at: Option<Instant> = None;
        loop {
            self.look_up(lookups);
            let now = Instant::now();
            let (mut next, leaves) = {
                let mut state = self.shared.state();
                let closing = state.closing.filter(|_| state.membership.is_member());
                if let Some(closing) = closing {
                    state.begin_closing(closing, now);
                    leave_at.get_or_insert(now + LEAVE_MAX);
                }
                for request in state.outgoing.drain(..) {
                    // A stream that is gone says so below.
                    let _ = outbound.send(request);
                }
                let late = leave_at.is_some_and(|at| at <= now);
                // One that is closed waits for as long as its user does: dropped is what it is then.
                let leaves =
                    closing.is_some_and(|closing| !state.is_committing_any() || closing == Closing::Dropped && late);
                let deaf_at = state.membership.deaf_at();
                let tick = state.membership.next_tick();
                (deaf_at.map_or(tick, |deaf_at| tick.min(deaf_at)), leaves)
            };
            if leaves {
                self.leave(outbound, stream).await;
                return Left::Closed;
            }
            if let Some(at) = leave_at.filter(|at| *at > now) {
                next = next.min(at);
            }
            let commit = async {
                match commit_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // What came in while this program stood still counts before the time that went by.
                biased;
                message = stream.message() => match message {
                    Ok(Some(response)) => {
                        backoff.succeeded();
                        match self.shared.heard(response, Instant::now()) {
                            Standing::Up => {}
                            Standing::Again(error) => return Left::Broken(error),
                            Standing::Over(error) => return Left::Over(error),
                        }
                    }
                    Ok(None) => return Left::Broken(Error::unreachable("the coordinator ended the session")),
                    Err(status) => {
                        let error = Error::from_status(address, status);
                        let detail = pb::session_response::Response::Ended(error.to_detail());
                        let ended = pb::SessionResponse { response: Some(detail) };
                        return match self.shared.heard(ended, Instant::now()) {
                            Standing::Over(error) => Left::Over(error),
                            _ => Left::Broken(error),
                        };
                    }
                },
                () = self.shared.work.notified() => {}
                Some(looked) = lookups.next(), if !lookups.is_empty() => self.looked_up(looked, lookups),
                () = tokio::time::sleep_until(next.into()) => {
                    let deaf_at = self.shared.state().membership.deaf_at();
                    if deaf_at.is_some_and(|at| at <= Instant::now()) {
                        return Left::Broken(Error::unreachable(format!("the coordinator at {address} says nothing")));
                    }
                    self.tick();
                }
                () = commit => {
                    self.shared.state().commit_processed(None);
                    commit_at = self.commit_every.map(|every| Instant::now() + every);
                }
            }
        }
    }

    /// Says good-bye: every commit is answered by now, or waited for long enough.
    async fn leave(
        &self,
        outbound: mpsc::UnboundedSender<pb::SessionRequest>,
        mut stream: tonic::Streaming<pb::SessionResponse>,
    ) {
        let until = tokio::time::Instant::now() + LEAVE_MAX;
        let leave = pb::session_request::Request::Leave(pb::LeaveGroup { keep_place: self.keep_place });
        let _ = outbound.send(pb::SessionRequest { request: Some(leave) });
        drop(outbound);
        // The coordinator ends the stream once it has noted that the member left.
        while let Ok(Ok(Some(_))) = tokio::time::timeout_at(until, stream.message()).await {}
    }

    /// Begins to look up where to begin what is new.
    fn look_up(&self, lookups: &mut Lookups) {
        let mut wanted = std::mem::take(&mut self.shared.state().to_begin);
        while !wanted.is_empty() {
            let rest = wanted.split_off(wanted.len().min(LOOKUP_MAX));
            let these = std::mem::replace(&mut wanted, rest);
            lookups.push(self.look_up_these(these, 0).boxed());
        }
    }

    fn look_up_these(&self, wanted: Vec<Wanted>, failures: u32) -> impl Future<Output = Looked> + use<> {
        let (shared, coordinator) = (Arc::clone(&self.shared), Arc::clone(&self.coordinator));
        let start_at = self.start_at;
        async move {
            if failures > 0 {
                tokio::time::sleep(BackoffPolicy::REQUEST.wait(failures, rand::random::<f64>())).await;
            }
            let (found, error) = find_starts(&coordinator, &shared, start_at, &wanted).await;
            Looked { wanted, failures, found, error }
        }
    }

    /// Hands what was looked up to the consumer, as far as it is still wanted; what was not found is looked up again.
    fn looked_up(&self, Looked { wanted, failures, found, error }: Looked, lookups: &mut Lookups) {
        let mut rest: HashMap<Part, Wanted> = wanted.into_iter().map(|wanted| (wanted.0.clone(), wanted)).collect();
        let some = !found.is_empty();
        let rest = self.shared.update(|state| {
            let starts = found.into_iter().filter_map(|Start { part, topic, place, committed }| {
                rest.remove(&part).map(|wanted| (wanted, topic, place, committed))
            });
            let starts: Vec<_> = starts.collect();
            state.begin(starts);
            let passing = |error: &Error| {
                error.is_retriable() || error.is_not_found() || error.kind() == crate::error::ErrorKind::Abortable
            };
            let rest: Vec<Wanted> = rest.into_values().filter(|wanted| state.is_beginning(wanted)).collect();
            if let Some(error) = &error {
                tracing::debug!(%error, "where to begin could not be looked up; again soon");
                if !rest.is_empty() && !passing(error) {
                    state.failure = Some(error.clone());
                }
            }
            rest
        });
        if !rest.is_empty() {
            let failures = if some { 1 } else { failures.saturating_add(1) };
            lookups.push(self.look_up_these(rest, failures).boxed());
        }
    }
}

/// Where the group is in these partitions, and where it has not been, where it wants to begin. What cannot be told now is
/// left out; with why, for one of them.
async fn find_starts(
    coordinator: &Coordinator,
    shared: &Shared,
    start_at: StartAt,
    wanted: &[Wanted],
) -> (Vec<Start>, Option<Error>) {
    let mut by_topic: HashMap<&bytes::Bytes, pb::TopicPartitions> = HashMap::new();
    for ((topic_id, partition), ..) in wanted {
        let topic = by_topic
            .entry(topic_id)
            .or_insert_with(|| pb::TopicPartitions { topic_id: topic_id.clone(), ..Default::default() });
        topic.partitions.push(*partition);
    }
    let request = {
        let membership = &shared.state().membership;
        pb::FetchOffsetsRequest {
            group: membership.group().to_owned(),
            partitions: by_topic.into_values().collect(),
            require_stable: true,
            member_id: membership.member_id().to_owned(),
            member_epoch: membership.epoch(),
        }
    };
    let answer = coordinator
        .call(|channel| {
            let request = request.clone();
            async move { GroupsClient::new(channel).fetch_offsets(request).await }
        })
        .await;
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return (Vec::new(), Some(error)),
    };
    let mut failure = None;
    let mut committed: HashMap<Part, Place> = HashMap::new();
    let mut refused: HashSet<Part> = HashSet::new();
    for offset in answer.offsets {
        let part = (offset.topic_id, offset.partition);
        if let Err(error) = Coordinator::told(offset.error.as_ref()) {
            failure = Some(error);
            refused.insert(part);
        } else if offset.offset >= 0 {
            committed.insert(part, Place { offset: offset.offset, epoch: offset.leader_epoch });
        }
    }
    let cluster = coordinator.cluster();
    let mut starts = Vec::new();
    let mut unknown = Vec::new();
    for (part, name, _) in wanted.iter().filter(|(part, ..)| !refused.contains(part)) {
        let is_it = |topic: &crate::metadata::TopicInfo| topic.id == part.0 && part.1 < topic.partition_count();
        let topic = match cluster.topic(name).await {
            Ok(topic) if !is_it(&topic) => cluster.ask_for_topic(name).await,
            topic => topic,
        };
        let topic = match topic {
            Ok(topic) if is_it(&topic) => topic,
            // The metadata is behind the coordinator, or the other way round: either will learn of it.
            Ok(topic) => {
                let message = "the topic was made anew; the group will hear of it";
                failure = Some(Error::new(ErrorCode::UnknownTopic, message).at(&topic.name, part.1));
                continue;
            }
            Err(error) => {
                failure = Some(error);
                continue;
            }
        };
        match committed.get(part) {
            Some(place) => starts.push(Start { part: part.clone(), topic, place: *place, committed: true }),
            None => unknown.push((part, topic)),
        }
    }
    let spec = match start_at {
        StartAt::Earliest => OffsetSpec::Start,
        StartAt::Latest => OffsetSpec::End,
        StartAt::Timestamp(millis) => OffsetSpec::Timestamp(millis),
        StartAt::FromEnd(records) => OffsetSpec::FromEnd(records),
        StartAt::Offset(offset) => {
            let place = Place { offset, epoch: -1 };
            let fixed = |(part, topic): (&Part, Arc<_>)| Start { part: part.clone(), topic, place, committed: false };
            starts.extend(unknown.into_iter().map(fixed));
            return (starts, failure);
        }
    };
    if unknown.is_empty() {
        return (starts, failure);
    }
    let queries: Vec<_> = unknown.iter().map(|(part, topic)| (&*topic.name, part.1, spec)).collect();
    match list_offsets(cluster, &queries, false).await {
        Ok(found) => {
            for ((part, topic), info) in unknown.iter().zip(found) {
                let place = Place { offset: info.offset, epoch: -1 };
                starts.push(Start { part: (*part).clone(), topic: topic.clone(), place, committed: false });
            }
        }
        Err(error) => failure = Some(error),
    }
    (starts, failure)
}

struct Outbound(mpsc::UnboundedReceiver<pb::SessionRequest>);

impl Stream for Outbound {
    type Item = pb::SessionRequest;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}
