//! Consumer groups from outside: who reads what, how far, how far behind.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use flowstone_protocol::pb;
use flowstone_protocol::pb::CoordinatorKind;
use flowstone_protocol::pb::groups_client::GroupsClient;
use serde::Serialize;

use super::Admin;
use crate::cluster::Cluster;
use crate::consumer::Position;
use crate::coordinator::{Coordinator, ask_all_coordinators};
use crate::error::{Error, ErrorCode, Result};

/// How a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum GroupState {
    /// It has no members; what it committed is kept for a while.
    Empty,
    /// Every member reads what it shall.
    Stable,
    /// Partitions are on their way from one member to another.
    Rebalancing,
}

/// A group in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct GroupSummary {
    /// Its name.
    pub group: String,
    /// How it is.
    pub state: GroupState,
    /// Number of members.
    pub members: i32,
    /// Grows whenever its members, topics or partitions change.
    pub group_epoch: i32,
    /// How partitions are shared out.
    pub assignor: String,
}

/// A group in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct GroupDescription {
    /// Its name.
    pub group: String,
    /// How it is.
    pub state: GroupState,
    /// Grows whenever its members, topics or partitions change.
    pub group_epoch: i32,
    /// How partitions are shared out.
    pub assignor: String,
    /// The broker that coordinates it.
    pub coordinator: i32,
    /// Its members, by id.
    pub members: Vec<GroupMember>,
    /// What it has committed, by topic and partition.
    pub offsets: Vec<CommittedOffset>,
}

/// A member of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct GroupMember {
    /// Its id.
    pub member_id: String,
    /// Its instance id, empty where it has none.
    pub instance_id: String,
    /// What it calls itself.
    pub client_id: String,
    /// Where it connects from.
    pub host: String,
    /// Its rack, empty where not set.
    pub rack: String,
    /// Its epoch.
    pub member_epoch: i32,
    /// The topics that it subscribed to by name.
    pub topics: Vec<String>,
    /// The pattern that it subscribed to, empty for none.
    pub topic_pattern: String,
    /// What it reads, by topic and partition.
    pub owned: Vec<MemberPartition>,
    /// What it shall read.
    pub target: Vec<MemberPartition>,
}

/// A partition of a member.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[non_exhaustive]
pub struct MemberPartition {
    /// Its topic.
    pub topic: String,
    /// Its number.
    pub partition: i32,
}

/// What a group has committed for a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CommittedOffset {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The next offset to read.
    pub offset: i64,
    /// What the committer noted with it.
    pub metadata: String,
    /// When, in milliseconds since 1970.
    pub committed_at: i64,
}

/// How far a group is behind in a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PartitionLag {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The next offset to read; none where nothing is committed.
    pub committed: Option<i64>,
    /// One past the last offset that can be read.
    pub end: i64,
    /// Data records from `committed` on; all there are where nothing is committed.
    pub lag: u64,
}

impl Admin {
    /// All groups, by name.
    ///
    /// # Errors
    /// `TIMED_OUT` where a coordinator does not answer.
    pub async fn list_groups(&self) -> Result<Vec<GroupSummary>> {
        let answers = ask_all_coordinators(&self.cluster, CoordinatorKind::Group, |channel| async move {
            GroupsClient::new(channel).list_groups(pb::ListGroupsRequest {}).await
        })
        .await?;
        let mut groups = BTreeMap::new();
        for listing in answers.into_iter().flat_map(|answer| answer.groups) {
            let summary = GroupSummary {
                state: state(listing.state()),
                group: listing.group,
                members: listing.members,
                group_epoch: listing.group_epoch,
                assignor: listing.assignor,
            };
            groups.insert(summary.group.clone(), summary);
        }
        Ok(groups.into_values().collect())
    }

    /// A group with its members and offsets.
    ///
    /// # Errors
    /// `UNKNOWN_GROUP`.
    pub async fn describe_group(&self, group: &str) -> Result<GroupDescription> {
        let answer = self
            .coordinator_of(group)
            .call(|channel| async move {
                GroupsClient::new(channel).describe_group(pb::DescribeGroupRequest { group: group.to_owned() }).await
            })
            .await?;
        let state = state(answer.state());
        let mut members: Vec<_> = answer.members.into_iter().map(member).collect();
        members.sort_by(|a, b| a.member_id.cmp(&b.member_id));
        let mut offsets: Vec<_> =
            answer.offsets.into_iter().filter(|offset| offset.offset >= 0).map(committed).collect();
        offsets.sort_by(|a, b| (&a.topic, a.partition).cmp(&(&b.topic, b.partition)));
        Ok(GroupDescription {
            group: answer.group,
            state,
            group_epoch: answer.group_epoch,
            assignor: answer.assignor,
            coordinator: answer.coordinator.map_or(-1, |broker| broker.broker_id),
            members,
            offsets,
        })
    }

    /// How far a group is behind, by topic and partition: in all partitions of which it has committed something, or
    /// which a member of it reads. Counted are data records alone.
    ///
    /// # Errors
    /// `UNKNOWN_GROUP`; `TIMED_OUT` where a partition has no leader.
    pub async fn group_lag(&self, group: &str) -> Result<Vec<PartitionLag>> {
        let described = self.describe_group(group).await?;
        let mut positions: BTreeMap<(String, i32), Option<i64>> = BTreeMap::new();
        for partition in described.members.iter().flat_map(|member| &member.target) {
            positions.insert((partition.topic.clone(), partition.partition), None);
        }
        for offset in described.offsets {
            positions.insert((offset.topic, offset.partition), Some(offset.offset));
        }
        // Topics that are gone have nothing to be behind of.
        let mut gone: HashSet<String> = HashSet::new();
        for (topic, _) in positions.keys() {
            if !gone.contains(topic) && self.cluster.topic(topic).await.is_err_and(|error| error.is_not_found()) {
                gone.insert(topic.clone());
            }
        }
        positions.retain(|(topic, _), _| !gone.contains(topic));
        let queries: Vec<_> = positions
            .iter()
            .map(|((topic, partition), committed)| {
                let from = committed.unwrap_or(0);
                (topic.as_str(), *partition, pb::offset_query::At::RecordsFrom(from))
            })
            .collect();
        let found = super::query_offsets(&self.cluster, &queries, false).await?;
        let lag = |(((topic, partition), committed), info): ((&(String, i32), &Option<i64>), super::OffsetInfo)| {
            PartitionLag {
                topic: topic.clone(),
                partition: *partition,
                committed: *committed,
                end: info.high_watermark,
                lag: info.records,
            }
        };
        Ok(positions.iter().zip(found).map(lag).collect())
    }

    /// Sets what a group without members has committed: each position is the next offset to read. With `dry_run`
    /// nothing is set, and the errors are the same.
    ///
    /// # Errors
    /// `GROUP_NOT_EMPTY` where it has members: stop them first; `UNKNOWN_TOPIC`, `UNKNOWN_PARTITION`,
    /// `OFFSET_OUT_OF_RANGE`.
    pub async fn reset_offsets(&self, group: &str, positions: &[Position], dry_run: bool) -> Result<()> {
        check_range(&self.cluster, positions).await?;
        let mut offsets = Vec::new();
        for position in positions {
            let topic = self.cluster.topic(&position.topic).await?;
            super::known_partition(&topic, position.partition)?;
            offsets.push(pb::CommitOffset {
                topic_id: topic.id.clone(),
                partition: position.partition,
                offset: position.offset,
                leader_epoch: -1,
                metadata: String::new(),
            });
        }
        let request = pb::ResetOffsetsRequest { group: group.to_owned(), offsets, dry_run };
        let answer = self
            .coordinator_of(group)
            .call(|channel| {
                let request = request.clone();
                async move { GroupsClient::new(channel).reset_offsets(request).await }
            })
            .await?;
        match answer.errors.into_iter().find_map(|failed| failed.error) {
            Some(detail) => Err(Error::from_detail(&detail)),
            None => Ok(()),
        }
    }

    /// Forgets a group without members, and all that it has committed.
    ///
    /// # Errors
    /// `UNKNOWN_GROUP`; `GROUP_NOT_EMPTY` where it has members: stop them first.
    pub async fn delete_group(&self, group: &str) -> Result<()> {
        self.coordinator_of(group)
            .call(|channel| async move {
                GroupsClient::new(channel).delete_group(pb::DeleteGroupRequest { group: group.to_owned() }).await
            })
            .await
            .map(drop)
    }

    fn coordinator_of(&self, group: &str) -> Coordinator {
        Coordinator::new(self.cluster.clone(), CoordinatorKind::Group, group)
    }
}

/// Whether these logs have these positions: a group that goes on beyond an end would pass over what comes next.
///
/// # Errors
/// `OFFSET_OUT_OF_RANGE` for the first that is not there; as [`Admin::list_offsets_linearizable`].
pub(crate) async fn check_range(cluster: &Arc<Cluster>, positions: &[Position]) -> Result<()> {
    let queries: Vec<_> =
        positions.iter().map(|position| (&*position.topic, position.partition, super::OffsetSpec::Start)).collect();
    if queries.is_empty() {
        return Ok(());
    }
    let found = super::list_offsets(cluster, &queries, true).await?;
    for (position, info) in positions.iter().zip(found) {
        if !(info.log_start..=info.high_watermark).contains(&position.offset) {
            let (offset, first, end) = (position.offset, info.log_start, info.high_watermark);
            let message =
                format!("there is no offset {offset}: the partition has {first} to {end}; choose one of these");
            return Err(Error::new(ErrorCode::OffsetOutOfRange, message).at(&position.topic, position.partition));
        }
    }
    Ok(())
}

fn state(state: pb::GroupState) -> GroupState {
    match state {
        pb::GroupState::Stable => GroupState::Stable,
        pb::GroupState::Rebalancing => GroupState::Rebalancing,
        pb::GroupState::Empty | pb::GroupState::Unspecified => GroupState::Empty,
    }
}

fn member(member: pb::GroupMember) -> GroupMember {
    let subscription = member.subscription.unwrap_or_default();
    GroupMember {
        member_id: member.member_id,
        instance_id: member.instance_id,
        client_id: member.client_id,
        host: member.host,
        rack: member.rack,
        member_epoch: member.member_epoch,
        topics: subscription.topics,
        topic_pattern: subscription.topic_pattern,
        owned: partitions(member.owned),
        target: partitions(member.target),
    }
}

pub(super) fn partitions(topics: Vec<pb::TopicPartitions>) -> Vec<MemberPartition> {
    let mut all: Vec<_> = topics
        .into_iter()
        .flat_map(|pb::TopicPartitions { topic, partitions, .. }| {
            partitions.into_iter().map(move |partition| MemberPartition { topic: topic.clone(), partition })
        })
        .collect();
    all.sort();
    all
}

fn committed(offset: pb::CommittedOffset) -> CommittedOffset {
    CommittedOffset {
        topic: offset.topic,
        partition: offset.partition,
        offset: offset.offset,
        metadata: offset.metadata,
        committed_at: offset.committed_at,
    }
}
