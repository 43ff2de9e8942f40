//! The task around a membership: one stream to the coordinator, wherever that is, heartbeats on time, positions looked up.

use std::collections::HashMap;
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
use crate::group::membership::{Part, Standing};
use crate::group::shared::{Change, Closing, Held, Place, Shared};
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

/// Longest that a member waits for its leaving to be heard.
const LEAVE_MAX: Duration = Duration::from_secs(5);
/// Positions looked up with one question.
const LOOKUP_MAX: usize = 1000;

type Started = (Vec<(Part, String)>, Result<Vec<Start>>);

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

impl Session {
    /// Runs until the member leaves or is put out for good.
    pub(crate) async fn run(self) {
        let mut backoff = Backoff::new(BackoffPolicy::CONNECT);
        let mut lookups = FuturesUnordered::new();
        loop {
            let connected = tokio::select! {
                connected = self.connect() => connected,
                () = self.without_stream(&mut lookups) => return self.ended(None),
            };
            let error = match connected {
                Ok((address, stream, outbound)) => {
                    match self.talk(&address, stream, outbound, &mut lookups, &mut backoff).await {
                        Left::Closed => return self.ended(None),
                        Left::Over(error) => return self.ended(Some(error)),
                        Left::Broken(error) => {
                            self.shared.state().membership.broken();
                            self.coordinator.failed(&address, &error);
                            error
                        }
                    }
                }
                Err(error) if error.is_retriable() => error,
                Err(error) => return self.ended(Some(error)),
            };
            tracing::debug!(key = self.shared.state().membership.group(), %error, "the group's session broke");
            tokio::select! {
                () = tokio::time::sleep(backoff.failed()) => {}
                () = self.without_stream(&mut lookups) => return self.ended(None),
            }
        }
    }

    /// The member is gone; `failure` is why, where it did not leave by itself.
    fn ended(&self, failure: Option<Error>) {
        let steps = self.shared.state().membership.lose_all();
        self.shared.perform(steps, Instant::now());
        let mut state = self.shared.state();
        let why = failure.clone().unwrap_or_else(|| Error::closed("group's consumer"));
        state.fail_commits(&why);
        state.failure = failure;
        state.over = true;
        state.end_events();
        state.wake();
    }

    async fn connect(
        &self,
    ) -> Result<(ServerAddress, tonic::Streaming<pb::SessionResponse>, mpsc::UnboundedSender<pb::SessionRequest>)> {
        let address = self.coordinator.address().await?;
        let channel = self.coordinator.cluster().channel(&address)?;
        // Bounded by what the state queues while there is a stream, see there.
        let (outbound, requests) = mpsc::unbounded_channel();
        let step = self.shared.state().membership.connected(Instant::now());
        if let crate::group::membership::Step::Send(join) = step {
            let _ = outbound.send(*join);
        }
        self.shared.state().outgoing.clear();
        let mut client = GroupsClient::new(channel);
        let call = client.session(Outbound(requests));
        let timeout = self.coordinator.cluster().request_timeout();
        let stream = match tokio::time::timeout(timeout, call).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => {
                let error = Error::from_status(&address, status);
                self.coordinator.failed(&address, &error);
                self.shared.state().membership.broken();
                return Err(error);
            }
            Err(_) => {
                let error = Error::unreachable(format!("the coordinator at {address} did not answer in {timeout:?}"));
                self.coordinator.failed(&address, &error);
                self.shared.state().membership.broken();
                return Err(error);
            }
        };
        Ok((address, stream, outbound))
    }

    /// What goes on while there is no stream: time. Returns when the member is to leave.
    async fn without_stream(&self, lookups: &mut FuturesUnordered<BoxFuture<'static, Started>>) {
        loop {
            let next = {
                let state = self.shared.state();
                if state.closing == Some(Closing::Dropped) {
                    return;
                }
                state.membership.next_tick()
            };
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => self.tick(),
                () = self.shared.work.notified() => self.look_up(lookups),
                Some(started) = lookups.next(), if !lookups.is_empty() => self.started(started, lookups),
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
        lookups: &mut FuturesUnordered<BoxFuture<'static, Started>>,
        backoff: &mut Backoff,
    ) -> Left {
        let mut commit_at = self.commit_every.map(|every| Instant::now() + every);
        loop {
            self.look_up(lookups);
            let (next, closing) = {
                let mut state = self.shared.state();
                if let Some(closing) = state.closing.filter(|_| state.membership.is_member()) {
                    if closing == Closing::Closed {
                        state.hand_back(Instant::now());
                    }
                    state.commit_processed(None);
                }
                for request in state.outgoing.drain(..) {
                    // A stream that is gone says so below.
                    let _ = outbound.send(request);
                }
                (state.membership.next_tick(), state.closing.is_some() && state.membership.is_member())
            };
            if closing {
                self.leave(outbound, stream).await;
                return Left::Closed;
            }
            let commit = async {
                match commit_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                message = stream.message() => match message {
                    Ok(Some(response)) => {
                        backoff.succeeded();
                        match self.heard(response) {
                            Standing::Up => {}
                            Standing::Again(error) => return Left::Broken(error),
                            Standing::Over(error) => return Left::Over(error),
                        }
                    }
                    Ok(None) => return Left::Broken(Error::unreachable("the coordinator ended the session")),
                    Err(status) => {
                        let error = Error::from_status(address, status);
                        let detail = pb::session_response::Response::Ended(error.to_detail());
                        return match self.heard(pb::SessionResponse { response: Some(detail) }) {
                            Standing::Over(error) => Left::Over(error),
                            _ => Left::Broken(error),
                        };
                    }
                },
                () = self.shared.work.notified() => {}
                () = tokio::time::sleep_until(next.into()) => {
                    let now = Instant::now();
                    if self.shared.state().membership.is_deaf(now) {
                        return Left::Broken(Error::unreachable(format!("the coordinator at {address} says nothing")));
                    }
                    self.tick();
                }
                () = commit => {
                    self.shared.state().commit_processed(None);
                    commit_at = self.commit_every.map(|every| Instant::now() + every);
                }
                Some(started) = lookups.next(), if !lookups.is_empty() => self.started(started, lookups),
            }
        }
    }

    fn heard(&self, response: pb::SessionResponse) -> Standing {
        let now = Instant::now();
        if let Some(pb::session_response::Response::Committed(answer)) = &response.response {
            self.shared.state().committed(answer);
        }
        let joined = matches!(response.response, Some(pb::session_response::Response::Joined(_)));
        let assigned = matches!(response.response, Some(pb::session_response::Response::Assignment(_)));
        let (steps, standing) = self.shared.state().membership.heard(response, now);
        if joined {
            self.shared.state().commit_all_again();
        } else if assigned {
            self.shared.state().commit_stale_again();
        }
        self.shared.perform(steps, now);
        standing
    }

    /// Says good-bye once every commit is answered.
    async fn leave(
        &self,
        outbound: mpsc::UnboundedSender<pb::SessionRequest>,
        mut stream: tonic::Streaming<pb::SessionResponse>,
    ) {
        let until = tokio::time::Instant::now() + LEAVE_MAX;
        while !self.shared.state().committing.is_empty() {
            match tokio::time::timeout_at(until, stream.message()).await {
                Ok(Ok(Some(response))) => {
                    self.heard(response);
                }
                _ => break,
            }
        }
        let leave = pb::session_request::Request::Leave(pb::LeaveGroup { keep_place: self.keep_place });
        let _ = outbound.send(pb::SessionRequest { request: Some(leave) });
        drop(outbound);
        // The coordinator ends the stream once it has noted that the member left.
        while let Ok(Ok(Some(_))) = tokio::time::timeout_at(until, stream.message()).await {}
    }

    /// Begins to look up where to begin what is new.
    fn look_up(&self, lookups: &mut FuturesUnordered<BoxFuture<'static, Started>>) {
        let mut wanted = std::mem::take(&mut self.shared.state().to_begin);
        while !wanted.is_empty() {
            let rest = wanted.split_off(wanted.len().min(LOOKUP_MAX));
            let these = std::mem::replace(&mut wanted, rest);
            lookups.push(self.look_up_these(these, Duration::ZERO).boxed());
        }
    }

    fn look_up_these(&self, parts: Vec<(Part, String)>, wait: Duration) -> impl Future<Output = Started> + use<> {
        let coordinator = Arc::clone(&self.coordinator);
        let start_at = self.start_at;
        let (group, member_id, member_epoch) = {
            let membership = &self.shared.state().membership;
            (membership.group().to_owned(), membership.member_id().to_owned(), membership.epoch())
        };
        async move {
            tokio::time::sleep(wait).await;
            let starts = find_starts(&coordinator, start_at, group, member_id, member_epoch, &parts).await;
            (parts, starts)
        }
    }

    /// Hands what was looked up to the consumer, as far as it is still owned.
    fn started(&self, (parts, found): Started, lookups: &mut FuturesUnordered<BoxFuture<'static, Started>>) {
        let mut state = self.shared.state();
        match found {
            Ok(starts) => {
                for Start { part, topic, place, committed } in starts {
                    if !state.membership.owns(&part)
                        || state.membership.is_revoking(&part)
                        || state.held.contains_key(&part)
                    {
                        continue;
                    }
                    let held = Held {
                        topic: topic.name.clone(),
                        processed: place,
                        committed: if committed { place.offset } else { -1 },
                        handed: place,
                        in_hand: false,
                        revoking: false,
                        guards: 0,
                        in_transactions: false,
                    };
                    let partition = part.1;
                    state.held.insert(part, held);
                    state.changes.push_back(Change::Begin {
                        topic,
                        partition,
                        offset: place.offset,
                        last_epoch: place.epoch,
                    });
                }
                state.wake();
            }
            Err(error) => {
                let still: Vec<_> = parts.into_iter().filter(|(part, _)| state.membership.owns(part)).collect();
                let passing = error.is_retriable()
                    || error.is_not_found()
                    || matches!(error.code(), ErrorCode::StaleMemberEpoch | ErrorCode::UnknownMember);
                if !passing {
                    state.failure = Some(error.clone());
                    state.wake();
                }
                drop(state);
                tracing::debug!(%error, "where to begin could not be looked up; again soon");
                if !still.is_empty() {
                    let wait = BackoffPolicy::REQUEST.wait(4, rand::random::<f64>());
                    lookups.push(self.look_up_these(still, wait).boxed());
                }
            }
        }
    }
}

/// Where the group is in these partitions, and where it has not been, where it wants to begin.
async fn find_starts(
    coordinator: &Coordinator,
    start_at: StartAt,
    group: String,
    member_id: String,
    member_epoch: i32,
    parts: &[(Part, String)],
) -> Result<Vec<Start>> {
    let mut by_topic: HashMap<&bytes::Bytes, pb::TopicPartitions> = HashMap::new();
    for ((topic_id, partition), _) in parts {
        let topic = by_topic
            .entry(topic_id)
            .or_insert_with(|| pb::TopicPartitions { topic_id: topic_id.clone(), ..Default::default() });
        topic.partitions.push(*partition);
    }
    let request = pb::FetchOffsetsRequest {
        group,
        partitions: by_topic.into_values().collect(),
        require_stable: true,
        member_id,
        member_epoch,
    };
    let answer = coordinator
        .call(|channel| {
            let request = request.clone();
            async move { GroupsClient::new(channel).fetch_offsets(request).await }
        })
        .await?;
    let mut committed: HashMap<Part, Place> = HashMap::new();
    for offset in answer.offsets {
        Coordinator::told(offset.error.as_ref())?;
        if offset.offset >= 0 {
            let place = Place { offset: offset.offset, epoch: offset.leader_epoch };
            committed.insert((offset.topic_id, offset.partition), place);
        }
    }
    let cluster = coordinator.cluster();
    let mut starts = Vec::new();
    let mut unknown = Vec::new();
    for (part, name) in parts {
        let topic = match cluster.topic(name).await {
            Ok(topic) if topic.id == part.0 && part.1 < topic.partition_count() => topic,
            Ok(_) => cluster.ask_for_topic(name).await?,
            Err(error) => return Err(error),
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
            return Ok(starts);
        }
    };
    let queries: Vec<_> = unknown.iter().map(|(part, topic)| (&*topic.name, part.1, spec)).collect();
    let found = if queries.is_empty() { Vec::new() } else { list_offsets(cluster, &queries, false).await? };
    for ((part, topic), info) in unknown.iter().zip(found) {
        let place = Place { offset: info.offset, epoch: -1 };
        starts.push(Start { part: (*part).clone(), topic: topic.clone(), place, committed: false });
    }
    Ok(starts)
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
