//! A member's session: one stream, on which it joins, is told what it owns, says that it lives, and commits.
//!
//! ```text
//!   client --messages--> session --commands--> coordinator
//!      ^                   |  ^                     |
//!      +--- a few answers -+  +--- the door: "look" -+
//! ```
//!
//! One task is the session. What it tells is never queued: it is made from the committed state when there is room to send,
//! so that a member that does not read costs [`ANSWERS_MAX`] answers and [`COMMITS_MAX`] commits, is not read from either,
//! and is removed for its silence.

use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::pb::session_request::Request as Asked;
use flowstone_protocol::pb::session_response::Response as Told;
use flowstone_protocol::{Error, ErrorCode, Offset, TopicPartition, pb};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Asked as AskedOffsets, decided, led, looked_up, odd_answer, offset_errors, show_partitions, well_named};
use crate::group::assignment::Assignor;
use crate::group::commands::{Commit, GroupCommand, GroupReply, Join, Report, Subscription, unknown_member};
use crate::group::driver::{Door, LedGroups};
use crate::group::pattern::compile;
use crate::internal_topics::InternalTopic;
use crate::metrics::Api;
use crate::node::Node;
use crate::partition::{PartitionCommand, PartitionReply};
use crate::receiving::Held;
use crate::service::coordinators::submit_owned;
use crate::service::{parse_tp, shutting_down, unreadable};

/// Answers that wait for HTTP/2.
const ANSWERS_MAX: usize = 4;
/// Commits of one session that are under way.
const COMMITS_MAX: usize = 64;
/// Time in which the first message must be there.
const JOIN_MAX: Duration = Duration::from_secs(30);
/// Longest of a member's names, in bytes.
const NAME_BYTES_MAX: usize = 249;
/// The longest that a member may take to give partitions up.
const REBALANCE_TIMEOUT_MAX: Duration = Duration::from_secs(86_400);
/// Heartbeats within one session timeout.
const HEARTBEATS_PER_SESSION: u32 = 3;

type Answers = mpsc::Sender<Result<pb::SessionResponse, Status>>;

/// Begins a session.
pub(super) fn begin(
    node: Arc<Node>,
    requests: Streaming<pb::SessionRequest>,
    host: String,
    held: Held,
) -> ReceiverStream<Result<pb::SessionResponse, Status>> {
    let (answers, stream) = mpsc::channel(ANSWERS_MAX);
    tokio::spawn(async move {
        node.metrics.received(Api::Groups, 0);
        let ended = run(&node, requests, host, &held, &answers).await;
        if let Err(error) = ended {
            node.metrics.refused(Api::Groups, &error);
            // The client may be gone, or not read: then it learns it from the stream's end.
            drop(answers.try_send(Err(error.to_status())));
        }
    });
    ReceiverStream::new(stream)
}

/// A membership as its session knows it.
struct Session<'a> {
    node: &'a Arc<Node>,
    led: Arc<LedGroups>,
    group: Arc<str>,
    member: Arc<str>,
    door: Arc<Door>,
    answers: &'a Answers,
    /// What the member was told last.
    told: Option<pb::Assignment>,
    /// Offset of the record about the member that was looked at last.
    seen: Option<Offset>,
    commits: FuturesUnordered<BoxFuture<'a, pb::Committed>>,
}

/// How a session ends.
enum End {
    /// The client went, or left the group.
    Gone,
    /// The membership is over, or is to go on elsewhere.
    Over(Error),
}

async fn run(
    node: &Arc<Node>,
    mut requests: Streaming<pb::SessionRequest>,
    host: String,
    held: &Held,
    answers: &Answers,
) -> Result<(), Error> {
    let first = tokio::time::timeout(JOIN_MAX, requests.message()).await.map_err(|_| {
        Error::new(ErrorCode::TimedOut, "nobody joined on this stream; begin a session with `join`, and at once")
    })?;
    let first =
        first.map_err(|status| broken(node, &status).unwrap_or_else(|| Error::new(ErrorCode::TimedOut, "gone")))?;
    held.release();
    let Some(pb::SessionRequest { request: Some(Asked::Join(join)) }) = first else {
        return Err(Error::new(ErrorCode::InvalidRequest, "a session begins with `join`"));
    };
    let join = checked(node, join, host)?;
    let partition = led(node, &join.group)?;
    let Some(led) = node.groups.get(partition.tp) else {
        let what = "this broker is about to coordinate the group; try again in a moment";
        return Err(Error::new(ErrorCode::LeaderNotReady, what));
    };
    let (group, member) = (Arc::clone(&join.group), Arc::clone(&join.member));
    let reply = decided(node, &led.partition, GroupCommand::Join(join)).await?;
    let GroupReply::Joined { epoch, session_timeout_ms, displaced } = reply else { return Err(odd_answer()) };
    if let Some(displaced) = displaced {
        let what = "another consumer has joined under the same instance id, and has the place of this one";
        led.end(&group, &displaced, Error::new(ErrorCode::FencedInstance, what));
    }
    let door = led.enter(&group, &member)?;
    let mut session =
        Session { node, led, group, member, door, answers, told: None, seen: None, commits: FuturesUnordered::new() };
    let session_timeout = Duration::from_millis(u64::try_from(session_timeout_ms).unwrap_or_default());
    let interval = node.config.group.heartbeat_interval.min(session_timeout / HEARTBEATS_PER_SESSION);
    let joined = pb::Joined {
        member_id: session.member.to_string(),
        member_epoch: epoch,
        session_timeout_ms,
        heartbeat_interval_ms: i32::try_from(interval.as_millis()).unwrap_or(i32::MAX).max(1),
    };
    let end = match session.tell(Told::Joined(joined)).await {
        Ok(()) => session.serve(&mut requests, held).await,
        Err(end) => end,
    };
    session.led.exit(&session.group, &session.member, &session.door);
    if let End::Over(error) = end {
        node.metrics.refused(Api::Groups, &error);
        let told = pb::SessionResponse { response: Some(Told::Ended(error.to_detail())) };
        // One that does not read learns it from the stream's end.
        drop(answers.try_send(Ok(told)));
    }
    Ok(())
}

impl Session<'_> {
    async fn serve(&mut self, requests: &mut Streaming<pb::SessionRequest>, held: &Held) -> End {
        let mut drain = self.node.drain.clone();
        let mut asked = true;
        loop {
            if let Err(end) = self.tell_news().await {
                return end;
            }
            tokio::select! {
                // Looked at in the next round.
                () = self.door.wake.notified() => {}
                () = self.answers.closed() => return End::Gone,
                () = drained(&mut drain) => return End::Over(shutting_down()),
                Some(committed) = self.commits.next(), if !self.commits.is_empty() => {
                    if let Err(end) = self.tell(Told::Committed(committed)).await {
                        return end;
                    }
                }
                request = requests.message(), if asked && self.commits.len() < COMMITS_MAX => match request {
                    Ok(Some(request)) => {
                        let taken = self.take(request).await;
                        held.release();
                        if let Err(end) = taken {
                            return end;
                        }
                    }
                    // It only closed its own half: its commits are still answered, and its membership ends by its silence.
                    Ok(None) => asked = false,
                    Err(status) => return broken(self.node, &status).map_or(End::Gone, End::Over),
                },
            }
            if !asked && self.commits.is_empty() {
                return End::Gone;
            }
        }
    }

    /// Sends, unless the session ends first.
    async fn tell(&mut self, told: Told) -> Result<(), End> {
        let told = pb::SessionResponse { response: Some(told) };
        let bytes = told.encoded_len();
        let mut drain = self.node.drain.clone();
        let sending = self.answers.send(Ok(told));
        tokio::pin!(sending);
        loop {
            tokio::select! {
                biased;
                sent = &mut sending => {
                    self.node.metrics.sent(Api::Groups, None, bytes);
                    return sent.map_err(|_| End::Gone);
                }
                () = self.door.wake.notified() => {
                    if let Some(why) = self.door.ended() {
                        return Err(End::Over(why.clone()));
                    }
                    // Whatever is new is looked at once this is sent.
                }
                () = drained(&mut drain) => return Err(End::Over(shutting_down())),
            }
        }
    }

    /// Tells the member what it owns, if that is not what it was told last.
    async fn tell_news(&mut self) -> Result<(), End> {
        if let Some(why) = self.door.ended() {
            return Err(End::Over(why.clone()));
        }
        let looked = self.led.view.with(|table| {
            let group = table.group(&self.group)?;
            let member = group.members.get(&self.member)?;
            if Some(member.changed_at) == self.seen {
                return Some(None);
            }
            let pending: Vec<TopicPartition> =
                member.target.iter().filter(|tp| member.owned.binary_search(tp).is_err()).copied().collect();
            Some(Some((member.changed_at, member.epoch, group.epoch, member.owned.clone(), pending)))
        });
        let looked = looked.ok_or_else(|| self.no_member())?;
        let Some((seen, member_epoch, group_epoch, owned, pending)) = looked else { return Ok(()) };
        let assignment = pb::Assignment {
            member_epoch,
            group_epoch,
            partitions: show_partitions(self.node, owned.into_iter()),
            pending: show_partitions(self.node, pending.into_iter()),
        };
        let is_news = self.told.as_ref().is_none_or(|told| {
            told.member_epoch != assignment.member_epoch
                || told.partitions != assignment.partitions
                || told.pending != assignment.pending
        });
        if is_news {
            self.tell(Told::Assignment(assignment.clone())).await?;
            self.told = Some(assignment);
        }
        self.seen = Some(seen);
        Ok(())
    }

    /// The membership is gone: why, if it was taken away.
    fn no_member(&self) -> End {
        End::Over(self.door.removed_for().unwrap_or_else(|| unknown_member(&self.group)))
    }

    async fn take(&mut self, request: pb::SessionRequest) -> Result<(), End> {
        self.node.metrics.received(Api::Groups, request.encoded_len());
        self.led.heard(&self.group, &self.member);
        match request.request {
            Some(Asked::Heartbeat(heartbeat)) => self.take_heartbeat(heartbeat).await,
            Some(Asked::Commit(commit)) => {
                self.take_commit(commit).await;
                Ok(())
            }
            Some(Asked::Leave(leave)) => {
                let (group, member) = (Arc::clone(&self.group), Arc::clone(&self.member));
                // Its last commits go before.
                while let Some(committed) = self.commits.next().await {
                    self.tell(Told::Committed(committed)).await?;
                }
                let command = GroupCommand::Leave { group, member, keep_place: leave.keep_place };
                decided(self.node, &self.led.partition, command).await.map_err(End::Over)?;
                Err(End::Gone)
            }
            Some(Asked::Join(_)) => {
                let what = "this session has joined already; open another stream for another membership";
                Err(End::Over(Error::new(ErrorCode::InvalidRequest, what)))
            }
            None => {
                let what = "this broker does not know the request; check which release it is";
                Err(End::Over(Error::new(ErrorCode::Unsupported, what)))
            }
        }
    }

    async fn take_heartbeat(&mut self, heartbeat: pb::MemberHeartbeat) -> Result<(), End> {
        let subscription = heartbeat.subscription.map(subscription).transpose().map_err(End::Over)?;
        if heartbeat.owned_set || subscription.is_some() {
            let owned = match heartbeat.owned_set {
                true => Some(partitions(&heartbeat.owned).map_err(End::Over)?),
                false => None,
            };
            let report = Report {
                group: Arc::clone(&self.group),
                member: Arc::clone(&self.member),
                epoch: heartbeat.member_epoch,
                owned,
                subscription,
            };
            let reported = decided(self.node, &self.led.partition, GroupCommand::Report(report)).await;
            reported.map_err(|error| match error.code {
                ErrorCode::UnknownMember => self.no_member(),
                _ => End::Over(error),
            })?;
        }
        let epoch = self.led.view.with(|table| {
            let member = table.group(&self.group).and_then(|group| group.members.get(&self.member));
            member.map(|member| member.epoch)
        });
        let Some(member_epoch) = epoch else { return Err(self.no_member()) };
        self.tell(Told::Heartbeat(pb::HeartbeatTaken { member_epoch })).await
    }

    async fn take_commit(&mut self, commit: pb::SessionCommit) {
        let all: Vec<_> = commit.offsets.iter().map(|offset| (offset.topic_id.clone(), offset.partition)).collect();
        let AskedOffsets { offsets, mut errors } = looked_up(self.node, commit.offsets).await;
        let count = offsets.len();
        let command = GroupCommand::Commit(Commit {
            group: Arc::clone(&self.group),
            member: Some((Arc::clone(&self.member), commit.member_epoch)),
            offsets,
            transaction: None,
        });
        let (node, led) = (Arc::clone(self.node), &self.led);
        // Given to the coordinator here, so that commits keep their order.
        let decided = submit_owned(
            Arc::clone(&node),
            InternalTopic::Groups,
            Arc::clone(&led.partition),
            PartitionCommand::Groups(command),
        );
        let request_id = commit.request_id;
        let committing = async move {
            match decided.await {
                Ok(PartitionReply::Groups(GroupReply::Offsets(refused))) => {
                    node.metrics.group_commits.inc_by((count - refused.len()) as u64);
                    errors.extend(offset_errors(&node, refused));
                }
                Ok(_) => errors = all_failed(all, &odd_answer()),
                Err(error) => errors = all_failed(all, &error),
            }
            pb::Committed { request_id, errors }
        };
        self.commits.push(committing.boxed());
    }
}

async fn drained(drain: &mut watch::Receiver<bool>) {
    // An error means that the broker is gone altogether.
    drop(drain.wait_for(|drains| *drains).await);
}

fn all_failed(all: Vec<(bytes::Bytes, i32)>, error: &Error) -> Vec<pb::OffsetError> {
    let failed = all.into_iter().map(|(topic_id, partition)| pb::OffsetError {
        topic_id,
        partition,
        error: Some(error.to_detail()),
    });
    failed.collect()
}

/// What to say about a stream that cannot be read on; `None` where the client has just gone.
fn broken(node: &Node, status: &Status) -> Option<Error> {
    let bytes_max = node.config.limits.admin_request_bytes;
    unreadable(status, "SessionRequest", "limits.admin_request_bytes", bytes_max)
}

fn partitions(shown: &[pb::TopicPartitions]) -> Result<Vec<TopicPartition>, Error> {
    let mut partitions = Vec::new();
    for topic in shown {
        for partition in &topic.partitions {
            partitions.push(parse_tp(&topic.topic_id, *partition)?);
        }
    }
    partitions.sort_unstable();
    partitions.dedup();
    Ok(partitions)
}

fn subscription(asked: pb::Subscription) -> Result<Subscription, Error> {
    let pb::Subscription { mut topics, topic_pattern } = asked;
    if let Some(name) = topics.iter().find(|name| flowstone_protocol::TopicName::new(name.as_str()).is_err()) {
        let what = format!("`{}` is no topic's name; check the subscription", super::repeated(name).escape_debug());
        return Err(Error::new(ErrorCode::InvalidTopicName, what));
    }
    if !topic_pattern.is_empty() {
        compile(&topic_pattern)?;
    }
    topics.sort_unstable();
    topics.dedup();
    Ok(Subscription { topics, pattern: topic_pattern })
}

/// A join that may be decided.
fn checked(node: &Node, join: pb::JoinGroup, host: String) -> Result<Join, Error> {
    let invalid = |what: String| Err(Error::new(ErrorCode::InvalidRequest, what));
    let group = well_named(&join.group)?;
    if join.member_id.is_empty() {
        return invalid(
            "a member needs an id of its own; draw a random UUID and keep it while the consumer lives".into(),
        );
    }
    let names = [
        ("member id", &join.member_id),
        ("instance id", &join.instance_id),
        ("client id", &join.client_id),
        ("rack", &join.rack),
    ];
    for (what, name) in names {
        if name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return invalid(format!(
                "the {what} is longer than {NAME_BYTES_MAX} bytes or holds a control character; choose another one"
            ));
        }
    }
    if !join.assignor.is_empty() && Assignor::named(&join.assignor).is_none() {
        return invalid(format!(
            "there is no assignor `{}`; choose range, roundrobin, sticky or cooperative",
            super::repeated(&join.assignor).escape_debug()
        ));
    }
    let rules = &node.config.group;
    let session_timeout = match u64::try_from(join.session_timeout_ms) {
        Ok(0) => rules.session_timeout,
        Ok(ms) => Duration::from_millis(ms),
        Err(_) => Duration::ZERO,
    };
    if !(rules.session_timeout_min..=rules.session_timeout_max).contains(&session_timeout) {
        return invalid(format!(
            "a session timeout of {} ms is not within {:?} and {:?} (group.session_timeout_min, group.session_timeout_max); \
             choose another one, or 0 for the broker's",
            join.session_timeout_ms, rules.session_timeout_min, rules.session_timeout_max
        ));
    }
    let rebalance_timeout = match u64::try_from(join.rebalance_timeout_ms) {
        Ok(0) => rules.rebalance_timeout,
        Ok(ms) if Duration::from_millis(ms) <= REBALANCE_TIMEOUT_MAX => Duration::from_millis(ms),
        _ => {
            return invalid(format!(
                "a rebalance timeout of {} ms is not within 1 and {} ms; choose another one, or 0 for the broker's",
                join.rebalance_timeout_ms,
                REBALANCE_TIMEOUT_MAX.as_millis()
            ));
        }
    };
    let ms = |duration: Duration| i32::try_from(duration.as_millis()).unwrap_or(i32::MAX);
    Ok(Join {
        group,
        member: join.member_id.into(),
        epoch: join.member_epoch,
        instance: join.instance_id,
        client_id: join.client_id,
        host,
        rack: join.rack,
        subscription: subscription(pb::Subscription { topics: join.topics, topic_pattern: join.topic_pattern })?,
        assignor: join.assignor,
        session_timeout_ms: ms(session_timeout),
        rebalance_timeout_ms: ms(rebalance_timeout),
        owned: partitions(&join.owned)?,
    })
}
