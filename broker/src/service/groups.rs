//! `flowstone.v1.Groups`: offsets committed, fetched, reset; groups listed, described, deleted. Sessions are in [`session`].

mod session;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::pb::groups_server::Groups;
use flowstone_protocol::{
    Error, ErrorCode, LeaderEpoch, Offset, ProducerEpoch, ProducerId, TopicId, TopicPartition, pb,
};
use prost::Message;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::coordinators::{confirmed, coordinator, submit};
use super::{counted, parse_tp, repeated};
use crate::connections::ConnectionCalls;
use crate::group::commands::{Commit, GroupCommand, GroupReply, NewOffset, unknown_group, unknown_member};
use crate::group::state::{CommittedOffset, Group, GroupTable};
use crate::internal_topics::InternalTopic;
use crate::metrics::Api;
use crate::node::Node;
use crate::partition::{MachineView, OpenPartition, PartitionCommand, PartitionReply};
use crate::receiving::Held;
use crate::transaction::commands::Addition;

/// Longest name of a group, in bytes.
const GROUP_BYTES_MAX: usize = 249;
/// How long an answer about stable offsets waits for transactions to end.
const STABLE_MAX: Duration = Duration::from_secs(5);
/// A topic that is not known here may have been made a moment ago: how long that may take to be found out.
const LOOK_UP_MAX: Duration = Duration::from_secs(2);

/// `flowstone.v1.Groups`.
#[derive(Clone, Debug)]
pub(crate) struct GroupsService {
    node: Arc<Node>,
}

impl GroupsService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

macro_rules! unary {
    ($($name:ident($request:ident) -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl Groups for GroupsService {
            type SessionStream = ReceiverStream<Result<pb::SessionResponse, Status>>;

            async fn session(
                &self,
                request: Request<Streaming<pb::SessionRequest>>,
            ) -> Result<Response<Self::SessionStream>, Status> {
                let held = request.extensions().get::<Held>().cloned().unwrap_or_default();
                let peer = request.extensions().get::<ConnectionCalls>().map(ConnectionCalls::peer);
                let host = peer.map(|peer| peer.ip().to_string()).unwrap_or_default();
                Ok(Response::new(session::begin(Arc::clone(&self.node), request.into_inner(), host, held)))
            }

            $(async fn $name(
                &self,
                request: Request<pb::$request>,
            ) -> Result<Response<pb::$response>, Status> {
                let request = request.into_inner();
                let bytes = request.encoded_len();
                counted(&self.node, Api::Groups, bytes, $name(&self.node, request)).await
            })*
        }
    };
}

unary! {
    commit_offsets(CommitOffsetsRequest) -> CommitOffsetsResponse;
    fetch_offsets(FetchOffsetsRequest) -> FetchOffsetsResponse;
    list_groups(ListGroupsRequest) -> ListGroupsResponse;
    describe_group(DescribeGroupRequest) -> DescribeGroupResponse;
    delete_group(DeleteGroupRequest) -> DeleteGroupResponse;
    reset_offsets(ResetOffsetsRequest) -> ResetOffsetsResponse;
}

/// # Errors
/// `INVALID_GROUP` for what no group can be called.
fn well_named(group: &str) -> Result<Arc<str>, Error> {
    let why = match group {
        "" => "a group's name is empty; name the group",
        name if name.len() > GROUP_BYTES_MAX => "a group's name is longer than 249 bytes; choose a shorter one",
        name if name.chars().any(char::is_control) => "a group's name holds a control character; choose another one",
        name => return Ok(name.into()),
    };
    Err(Error::new(ErrorCode::InvalidGroup, why))
}

/// The partition of a group that this broker coordinates, with what it commits.
fn led(node: &Node, group: &str) -> Result<Arc<OpenPartition>, Error> {
    coordinator(node, InternalTopic::Groups, group)
}

/// Reads what the partition's machine has committed.
fn read<R>(partition: &OpenPartition, read: impl FnOnce(&GroupTable) -> R) -> Result<R, Error> {
    match &partition.view {
        MachineView::Groups(view) => Ok(view.with(read)),
        _ => Err(Error::new(ErrorCode::Internal, "the groups' topic has another machine; this is a defect")),
    }
}

/// Waits until all that was acknowledged before the call can be read here.
async fn caught_up(node: &Node, partition: &OpenPartition) -> Result<(), Error> {
    let end = confirmed(node, InternalTopic::Groups, partition).await?;
    if let MachineView::Groups(view) = &partition.view {
        drop(view.changes().wait_for(|committed| *committed >= end).await);
    }
    Ok(())
}

async fn decided(node: &Node, partition: &OpenPartition, command: GroupCommand) -> Result<GroupReply, Error> {
    match submit(node, InternalTopic::Groups, partition, PartitionCommand::Groups(command)).await? {
        PartitionReply::Groups(reply) => Ok(reply),
        _ => Err(odd_answer()),
    }
}

fn odd_answer() -> Error {
    Error::new(ErrorCode::Internal, "the coordinator answered something else; this is a defect, please report it")
}

/// Offsets as they were asked for, those that cannot be taken apart.
#[derive(Default)]
struct Asked {
    offsets: Vec<(TopicPartition, NewOffset)>,
    errors: Vec<pb::OffsetError>,
}

/// Looks the partitions up; a topic that is not known here is asked for once.
async fn looked_up(node: &Node, offsets: Vec<pb::CommitOffset>) -> Asked {
    let is_known = |offset: &pb::CommitOffset| {
        let topic = TopicId::from_slice(&offset.topic_id);
        topic.is_none_or(|topic| node.table.with(|table| table.topic(topic).is_some()))
    };
    if !offsets.iter().all(is_known) {
        drop(tokio::time::timeout(LOOK_UP_MAX, node.control.caught_up()).await);
    }
    let mut asked = Asked::default();
    for offset in offsets {
        match known_partition(node, &offset) {
            Ok(tp) => {
                let new = NewOffset {
                    offset: Offset::new(offset.offset),
                    leader_epoch: LeaderEpoch::new(offset.leader_epoch),
                    metadata: offset.metadata,
                };
                asked.offsets.push((tp, new));
            }
            Err(error) => asked.errors.push(pb::OffsetError {
                topic_id: offset.topic_id,
                partition: offset.partition,
                error: Some(error.to_detail()),
            }),
        }
    }
    asked
}

fn known_partition(node: &Node, offset: &pb::CommitOffset) -> Result<TopicPartition, Error> {
    let tp = parse_tp(&offset.topic_id, offset.partition)?;
    let known =
        node.table.with(|table| table.topic(tp.topic).map(|topic| (topic.name.clone(), topic.partitions.len())));
    let Some((name, partitions)) = known else {
        let what = format!("there is no topic with id {}: it was deleted, or never created; subscribe anew", tp.topic);
        return Err(Error::new(ErrorCode::UnknownTopic, what).with_partition(tp.partition));
    };
    if usize::try_from(offset.partition).is_ok_and(|partition| partition < partitions) {
        return Ok(tp);
    }
    let what = format!(
        "topic `{name}` has no partition {}; it has {partitions}, from 0 to {}",
        offset.partition,
        partitions.saturating_sub(1)
    );
    Err(Error::new(ErrorCode::UnknownPartition, what).with_topic(name).with_partition(tp.partition))
}

fn offset_errors(node: &Node, errors: Vec<(TopicPartition, Error)>) -> impl Iterator<Item = pb::OffsetError> {
    errors.into_iter().map(|(tp, error)| {
        let topic = node.table.with(|table| table.topic(tp.topic).map(|topic| topic.name.clone()));
        let error = match topic {
            Some(topic) => error.with_topic(topic),
            None => error,
        };
        pb::OffsetError {
            topic_id: tp.topic.to_bytes().to_vec().into(),
            partition: tp.partition.get(),
            error: Some(error.to_detail()),
        }
    })
}

async fn commit_offsets(
    node: &Arc<Node>,
    request: pb::CommitOffsetsRequest,
) -> Result<pb::CommitOffsetsResponse, Error> {
    let group = well_named(&request.group)?;
    let partition = led(node, &group)?;
    let Asked { offsets, mut errors } = looked_up(node, request.offsets).await;
    let transaction = match &request.transaction {
        Some(transaction) => {
            let (producer, epoch) = named_transaction(transaction)?;
            // The group's partition is one of the transaction's from now on: its end reaches it.
            let addition = Addition {
                id: transaction.transactional_id.as_str().into(),
                producer,
                epoch,
                partition: Some(partition.tp),
                group: Some(Arc::clone(&group)),
            };
            node.transactions.adder.add(node, addition).await?;
            Some((producer, epoch))
        }
        None => None,
    };
    let count = offsets.len();
    let member = (!request.member_id.is_empty()).then(|| (request.member_id.into(), request.member_epoch));
    let command = GroupCommand::Commit(Commit { group, member, offsets, transaction });
    let GroupReply::Offsets(refused) = decided(node, &partition, command).await? else { return Err(odd_answer()) };
    node.metrics.group_commits.inc_by((count - refused.len()) as u64);
    errors.extend(offset_errors(node, refused));
    Ok(pb::CommitOffsetsResponse { errors })
}

fn named_transaction(transaction: &pb::TransactionRef) -> Result<(ProducerId, ProducerEpoch), Error> {
    let epoch = i16::try_from(transaction.producer_epoch).ok().filter(|epoch| *epoch >= 0);
    match epoch {
        Some(epoch) if transaction.producer_id >= 0 && !transaction.transactional_id.is_empty() => {
            Ok((ProducerId::new(transaction.producer_id), ProducerEpoch::new(epoch)))
        }
        _ => {
            let what = "a transaction needs its transactional id, and the producer id and epoch that InitProducer gave";
            Err(Error::new(ErrorCode::InvalidRequest, what))
        }
    }
}

async fn fetch_offsets(node: &Arc<Node>, request: pb::FetchOffsetsRequest) -> Result<pb::FetchOffsetsResponse, Error> {
    let group = well_named(&request.group)?;
    let partition = led(node, &group)?;
    let mut wanted = Vec::new();
    for topic in &request.partitions {
        for number in &topic.partitions {
            wanted.push(parse_tp(&topic.topic_id, *number)?);
        }
    }
    caught_up(node, &partition).await?;
    let look = || {
        read(&partition, |table| {
            let known = table.group(&group);
            if !request.member_id.is_empty() {
                let member = known.and_then(|known| known.members.get(&*request.member_id));
                let member = member.ok_or_else(|| unknown_member(&group))?;
                if member.epoch != request.member_epoch {
                    let what = format!(
                        "member epoch {} is not the current one, {}: take in the newest assignment, then try again",
                        request.member_epoch, member.epoch
                    );
                    return Err(Error::new(ErrorCode::StaleMemberEpoch, what));
                }
            }
            let partitions = if wanted.is_empty() { all_of(known) } else { wanted.clone() };
            let found = partitions.into_iter().map(|tp| {
                let offset = known.and_then(|known| known.offsets.get(&tp)).cloned();
                let is_stable = !request.require_stable || !known.is_some_and(|known| known.is_pending(tp));
                (tp, offset, is_stable)
            });
            Ok(found.collect::<Vec<_>>())
        })?
    };
    let mut found = look()?;
    if let (MachineView::Groups(view), true) = (&partition.view, found.iter().any(|(_, _, is_stable)| !is_stable)) {
        let mut changes = view.changes();
        let stable = async {
            loop {
                changes.borrow_and_update();
                let found = look()?;
                if found.iter().all(|(_, _, is_stable)| *is_stable) || changes.changed().await.is_err() {
                    return Ok::<_, Error>(found);
                }
            }
        };
        if let Ok(stable) = tokio::time::timeout(STABLE_MAX, stable).await {
            found = stable?;
        }
    }
    let offsets = found.into_iter().map(|(tp, offset, is_stable)| {
        let unstable = || {
            let what = "a transaction has an offset of this partition pending; try again in a moment";
            Error::new(ErrorCode::UnstableOffsets, what).with_partition(tp.partition)
        };
        let error = (!is_stable).then(unstable);
        show_offset(node, tp, offset.filter(|_| is_stable).as_ref(), error)
    });
    Ok(pb::FetchOffsetsResponse { offsets: offsets.collect() })
}

fn all_of(group: Option<&Group>) -> Vec<TopicPartition> {
    let Some(group) = group else { return Vec::new() };
    let pending = group.pending.values().flat_map(|offsets| offsets.keys());
    let mut all: Vec<TopicPartition> = group.offsets.keys().chain(pending).copied().collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn show_offset(
    node: &Node,
    tp: TopicPartition,
    offset: Option<&CommittedOffset>,
    error: Option<Error>,
) -> pb::CommittedOffset {
    let topic = node.table.with(|table| table.topic(tp.topic).map(|topic| topic.name.clone()));
    pb::CommittedOffset {
        topic_id: tp.topic.to_bytes().to_vec().into(),
        partition: tp.partition.get(),
        offset: offset.map_or(-1, |offset| offset.offset.get()),
        leader_epoch: offset.map_or(-1, |offset| offset.leader_epoch.get()),
        metadata: offset.map(|offset| offset.metadata.to_string()).unwrap_or_default(),
        committed_at: offset.map_or(-1, |offset| offset.at.get()),
        topic: topic.unwrap_or_default(),
        error: error.map(|error| error.to_detail()),
    }
}

async fn list_groups(node: &Arc<Node>, _request: pb::ListGroupsRequest) -> Result<pb::ListGroupsResponse, Error> {
    let mut groups = Vec::new();
    for led in node.groups.all() {
        led.view.with(|table| {
            groups.extend(table.groups().map(|(name, group)| pb::GroupListing {
                group: name.to_string(),
                state: state_of(group).into(),
                members: group.members.len() as i32,
                group_epoch: group.epoch,
                assignor: group.assignor.clone(),
            }));
        });
    }
    groups.sort_by(|a, b| a.group.cmp(&b.group));
    Ok(pb::ListGroupsResponse { groups })
}

fn state_of(group: &Group) -> pb::GroupState {
    match () {
        () if group.members.is_empty() => pb::GroupState::Empty,
        () if group.is_stable() => pb::GroupState::Stable,
        () => pb::GroupState::Rebalancing,
    }
}

async fn describe_group(
    node: &Arc<Node>,
    request: pb::DescribeGroupRequest,
) -> Result<pb::DescribeGroupResponse, Error> {
    let name = well_named(&request.group)?;
    let partition = led(node, &name)?;
    caught_up(node, &partition).await?;
    let group = read(&partition, |table| table.group(&name).cloned())?.ok_or_else(|| unknown_group(repeated(&name)))?;
    let members = group.members.iter().map(|(id, member)| pb::GroupMember {
        member_id: id.to_string(),
        instance_id: member.instance.clone(),
        client_id: member.client_id.clone(),
        host: member.host.clone(),
        rack: member.rack.clone(),
        member_epoch: member.epoch,
        subscription: Some(pb::Subscription { topics: member.topics.clone(), topic_pattern: member.pattern.clone() }),
        owned: show_partitions(node, member.owned.iter().chain(&member.revoking).copied()),
        target: show_partitions(node, member.target.iter().copied()),
    });
    let mut offsets: Vec<_> = group.offsets.iter().collect();
    offsets.sort_unstable_by_key(|(tp, _)| **tp);
    Ok(pb::DescribeGroupResponse {
        group: name.to_string(),
        state: state_of(&group).into(),
        group_epoch: group.epoch,
        assignor: group.assignor.clone(),
        coordinator: node
            .client_address(node.id)
            .map(|address| pb::BrokerAddress { broker_id: node.id.get(), address }),
        members: members.collect(),
        offsets: offsets.into_iter().map(|(tp, offset)| show_offset(node, *tp, Some(offset), None)).collect(),
    })
}

/// By topic.
fn show_partitions(node: &Node, partitions: impl Iterator<Item = TopicPartition>) -> Vec<pb::TopicPartitions> {
    let mut by_topic: BTreeMap<TopicId, Vec<i32>> = BTreeMap::new();
    for tp in partitions {
        by_topic.entry(tp.topic).or_default().push(tp.partition.get());
    }
    let shown = by_topic.into_iter().map(|(topic, partitions)| pb::TopicPartitions {
        topic_id: topic.to_bytes().to_vec().into(),
        partitions,
        topic: node.table.with(|table| table.topic(topic).map(|topic| topic.name.clone())).unwrap_or_default(),
    });
    shown.collect()
}

async fn delete_group(node: &Arc<Node>, request: pb::DeleteGroupRequest) -> Result<pb::DeleteGroupResponse, Error> {
    let group = well_named(&request.group)?;
    let partition = led(node, &group)?;
    // Piece by piece, where there is very much of it.
    while decided(node, &partition, GroupCommand::Delete { group: Arc::clone(&group) }).await? == GroupReply::More {}
    Ok(pb::DeleteGroupResponse {})
}

async fn reset_offsets(node: &Arc<Node>, request: pb::ResetOffsetsRequest) -> Result<pb::ResetOffsetsResponse, Error> {
    let group = well_named(&request.group)?;
    let partition = led(node, &group)?;
    // What is committed of a topic that is gone may be removed as well.
    let (removed, set): (Vec<_>, Vec<_>) = request.offsets.into_iter().partition(|offset| offset.offset == -1);
    let Asked { offsets, mut errors } = looked_up(node, set).await;
    let mut offsets: Vec<_> = offsets.into_iter().map(|(tp, offset)| (tp, Some(offset))).collect();
    for offset in removed {
        offsets.push((parse_tp(&offset.topic_id, offset.partition)?, None));
    }
    let command = GroupCommand::Reset { group, offsets, dry_run: request.dry_run };
    let GroupReply::Offsets(refused) = decided(node, &partition, command).await? else { return Err(odd_answer()) };
    errors.extend(offset_errors(node, refused));
    Ok(pb::ResetOffsetsResponse { errors })
}
