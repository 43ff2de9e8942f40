//! From a group's members and the cluster's topics to the members' targets.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use flowstone_protocol::{TopicId, TopicPartition};

use super::assignment::{Assignor, Candidate, WantedTopic, assign};
use super::commands::Install;
use super::pattern::Patterns;
use super::state::{Group, Member};
use crate::controller::table::{MetadataTable, Topic};

/// A group as far as its targets depend on it.
#[derive(Clone, Debug)]
pub(crate) struct Wanting {
    pub(crate) name: Arc<str>,
    epoch: i32,
    assigned_epoch: i32,
    assignor: Assignor,
    members: Vec<(Arc<str>, Arc<Member>)>,
}

impl Wanting {
    pub(crate) fn of(name: &Arc<str>, group: &Group) -> Self {
        Self {
            name: Arc::clone(name),
            epoch: group.epoch,
            assigned_epoch: group.assigned_epoch,
            // An assignor that this release does not know is one of a newer release.
            assignor: Assignor::named(&group.assignor).unwrap_or(Assignor::Cooperative),
            members: group.members.iter().map(|(id, member)| (Arc::clone(id), Arc::clone(member))).collect(),
        }
    }

    pub(crate) fn member_count(&self) -> usize {
        self.members.len()
    }

    /// The topics that its members want, of those that there are.
    pub(crate) fn topics(&self, table: &MetadataTable, patterns: &mut Patterns) -> Vec<Arc<Topic>> {
        let names: HashSet<&str> =
            self.members.iter().flat_map(|(_, member)| member.topics.iter().map(String::as_str)).collect();
        let wanted: BTreeSet<&str> = self
            .members
            .iter()
            .map(|(_, member)| member.pattern.as_str())
            .filter(|pattern| !pattern.is_empty())
            .collect();
        let mut topics: BTreeMap<&str, &Arc<Topic>> = BTreeMap::new();
        for name in names {
            if let Some(topic) = table.topic_named(name) {
                topics.insert(&topic.name, topic);
            }
        }
        if !wanted.is_empty() {
            for topic in table.topics() {
                if wanted.iter().any(|pattern| patterns.matches(pattern, &topic.name)) {
                    topics.insert(&topic.name, topic);
                }
            }
        }
        topics.into_values().cloned().collect()
    }

    /// The targets; `None` where they are what they are to be.
    pub(crate) fn plan(&self, topics: &[WantedTopic], patterns: &mut Patterns) -> Option<Install> {
        let candidates: Vec<Candidate> = self
            .members
            .iter()
            .map(|(id, member)| {
                let names: HashSet<&str> = member.topics.iter().map(String::as_str).collect();
                let wants = |topic: &WantedTopic, patterns: &mut Patterns| {
                    names.contains(topic.name.as_str()) || patterns.matches(&member.pattern, &topic.name)
                };
                let wanted = topics.iter().enumerate().filter(|(_, topic)| wants(topic, patterns));
                Candidate {
                    topics: wanted.map(|(index, _)| index).collect(),
                    order: if member.instance.is_empty() { id.to_string() } else { member.instance.clone() },
                    rack: member.rack.clone(),
                    current: member.target.clone(),
                }
            })
            .collect();
        let targets = assign(self.assignor, topics, &candidates);
        let is_so = self.members.iter().zip(&targets).all(|((_, member), target)| member.target == *target);
        if is_so && self.epoch == self.assigned_epoch {
            return None;
        }
        let targets = self.members.iter().map(|(id, _)| Arc::clone(id)).zip(targets).collect();
        Some(Install { group: Arc::clone(&self.name), epoch: self.epoch, targets })
    }

    /// Whether racks play a part.
    pub(crate) fn has_racks(&self) -> bool {
        self.members.iter().any(|(_, member)| !member.rack.is_empty())
    }
}

/// A topic with the racks of its replicas, where these play a part.
pub(crate) fn wanted_topic(topic: &Topic, has_racks: bool, table: &MetadataTable) -> WantedTopic {
    let racks = |tp: TopicPartition| {
        let places = topic.partition(tp.partition).into_iter().flat_map(|entry| entry.replicas());
        let racks = places.filter_map(|place| table.broker(place.broker)).map(|broker| broker.rack.clone());
        racks.filter(|rack| !rack.is_empty()).collect::<Vec<String>>()
    };
    WantedTopic {
        id: topic.id,
        name: topic.name.clone(),
        partitions: topic.partitions.len() as u32,
        racks: if has_racks { topic.entries().map(|(tp, _)| racks(tp)).collect() } else { Vec::new() },
    }
}

/// Whether a change of these topics is one for the group: it wants them, or has to do with one that is gone.
pub(crate) fn concerns(
    group: &Group,
    changed: &[Arc<Topic>],
    deleted: &HashSet<TopicId>,
    patterns: &mut Patterns,
) -> bool {
    group.members.values().any(|member| {
        let is_gone = member.target.iter().any(|tp| deleted.contains(&tp.topic));
        is_gone
            || changed
                .iter()
                .any(|topic| member.topics.contains(&topic.name) || patterns.matches(&member.pattern, &topic.name))
    })
}
