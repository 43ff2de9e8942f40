//! Topics: created, altered, deleted.

use std::sync::Arc;

use flowstone_protocol::internal::metadata_record::Record as Kind;
use flowstone_protocol::internal::{
    PartitionAssignment, PartitionsAdded, TopicConfigChanged, TopicCreated, TopicDeleted,
};
use flowstone_protocol::{Error, ErrorCode, TopicId, TopicName};

use super::super::change::{Assignment, PartitionEntry};
use super::super::placement::{Draws, Placement};
use super::super::records::{show_assignment, show_configs, show_topic};
use super::super::table::{MetadataTable, Topic};
use super::{AlterTopic, CreateTopic, Decided, MetadataReply, MetadataRules, internal_topic, unknown_topic};
use crate::internal_topics::InternalTopic;
use crate::topic_config::{self, TopicConfig, TopicOverrides};

/// Replicas of a topic whose creator does not say, where there are enough brokers.
pub(crate) const REPLICATION_FACTOR_DEFAULT: u32 = 3;

pub(super) fn create(table: &MetadataTable, create: CreateTopic) -> Result<Decided, Error> {
    let name = TopicName::new(create.name.as_str())
        .map_err(|error| Error::new(ErrorCode::InvalidTopicName, error.to_string()).with_topic(create.name.clone()))?;
    if name.is_internal() {
        return Err(internal_topic(name.as_str()));
    }
    if let Some(existing) = table.topic_named(name.as_str()) {
        // The same call once more: the answer to the first was lost.
        if existing.id == create.topic_id && !create.validate_only {
            return Ok((Vec::new(), MetadataReply::Topic(Arc::clone(existing))));
        }
        return Err(Error::new(
            ErrorCode::TopicAlreadyExists,
            format!("topic `{name}` exists already; choose another name, or delete that one first"),
        )
        .with_topic(name.as_str()));
    }
    if table.topic(create.topic_id).is_some() {
        return Err(Error::new(
            ErrorCode::InvalidRequest,
            "request_id is that of another topic's creation; draw one at random for each",
        )
        .with_topic(name.as_str()));
    }
    let in_topic = |error: Error| error.with_topic(name.as_str());
    let rules = table.rules();
    let partitions = if create.partitions == 0 { 1 } else { create.partitions };
    let partitions = check_partitions(table, partitions, 0).map_err(in_topic)?;
    let replicas = check_replicas(table, create.replication_factor).map_err(in_topic)?;
    if table.topic_count() >= rules.topics_max {
        return Err(in_topic(Error::new(
            ErrorCode::InvalidRequest,
            format!("the cluster has {} topics, its limit; delete some, or raise limits.topics", rules.topics_max),
        )));
    }
    let overrides = canonical(&create.configs).map_err(in_topic)?;
    check_config(rules, &overrides, replicas).map_err(in_topic)?;

    let (mut placement, mut draws) = (Placement::of_new(table), Draws::from_seed(create.seed));
    let topic = Topic {
        id: create.topic_id,
        name: name.as_str().to_owned(),
        replication_factor: replicas,
        internal: false,
        partitions: (0..partitions).map(|_| place(&mut placement, replicas, &mut draws)).collect(),
        changed_at: table.applied(),
        overrides,
    };
    let records = if create.validate_only { Vec::new() } else { vec![show_created(&topic)] };
    Ok((records, MetadataReply::Topic(Arc::new(topic))))
}

/// One of the cluster's own topics, made where it is not there yet. It does not count for the cluster's limits.
pub(super) fn ensure(
    table: &MetadataTable,
    wanted: InternalTopic,
    topic_id: TopicId,
    seed: u64,
) -> Result<Decided, Error> {
    if let Some(existing) = table.topic_named(wanted.name()) {
        return Ok((Vec::new(), MetadataReply::Topic(Arc::clone(existing))));
    }
    let replicas = check_replicas(table, 0).map_err(|error| error.with_topic(wanted.name()))?;
    let (mut placement, mut draws) = (Placement::of_new(table), Draws::from_seed(seed));
    let partitions = table.rules().internal_partitions.max(1);
    let topic = Topic {
        id: topic_id,
        name: wanted.name().to_owned(),
        replication_factor: replicas,
        internal: true,
        partitions: (0..partitions).map(|_| place(&mut placement, replicas, &mut draws)).collect(),
        changed_at: table.applied(),
        overrides: wanted.overrides(),
    };
    Ok((vec![show_created(&topic)], MetadataReply::Topic(Arc::new(topic))))
}

fn show_created(topic: &Topic) -> Kind {
    Kind::TopicCreated(TopicCreated {
        topic_id: show_topic(topic.id),
        name: topic.name.clone(),
        replication_factor: topic.replication_factor as i32,
        configs: show_configs(&topic.overrides),
        partitions: topic.partitions.iter().map(show_new).collect(),
    })
}

pub(super) fn alter(table: &MetadataTable, alter: AlterTopic) -> Result<Decided, Error> {
    let topic = user_topic(table, &alter.name)?;
    let in_topic = |error: Error| error.with_topic(alter.name.as_str());
    let rules = table.rules();
    let mut changed = Topic::clone(topic);
    let mut records = Vec::new();

    let set = canonical(&alter.set).map_err(in_topic)?;
    for key in &alter.unset {
        // Refuses keys that do not exist; the value plays no part.
        if topic_config::topic_key(key).is_none() {
            return Err(in_topic(
                topic_config::canonical_value(key, "")
                    .err()
                    .unwrap_or_else(|| Error::new(ErrorCode::InvalidConfig, format!("unknown topic config `{key}`"))),
            ));
        }
        if set.contains_key(key) {
            return Err(in_topic(Error::new(
                ErrorCode::InvalidConfig,
                format!("topic config `{key}` is both set and unset; do one of them"),
            )));
        }
        changed.overrides.remove(key);
    }
    changed.overrides.extend(set.clone());
    if changed.overrides != topic.overrides {
        // Moves may have given some partitions fewer replicas than the topic began with.
        let fewest = topic.partitions.iter().map(|entry| entry.replicas().len() as u32).min().unwrap_or_default();
        check_config(rules, &changed.overrides, fewest).map_err(in_topic)?;
        records.push(Kind::TopicConfigChanged(TopicConfigChanged {
            topic_id: show_topic(topic.id),
            set: show_configs(&set),
            unset: alter.unset.clone(),
        }));
    }

    if alter.partitions != 0 {
        let before = topic.partitions.len() as u32;
        let wanted = check_partitions(table, alter.partitions, before).map_err(in_topic)?;
        if wanted > before {
            let replicas = check_replicas(table, topic.replication_factor as i32).map_err(in_topic)?;
            let (mut placement, mut draws) = (Placement::of_new(table), Draws::from_seed(alter.seed));
            placement.focus(topic);
            let added: Vec<_> = (before..wanted).map(|_| place(&mut placement, replicas, &mut draws)).collect();
            records.push(Kind::PartitionsAdded(PartitionsAdded {
                topic_id: show_topic(topic.id),
                partitions: added.iter().map(show_new).collect(),
            }));
            changed.partitions.extend(added);
        }
    }
    if alter.validate_only {
        records.clear();
    }
    Ok((records, MetadataReply::Topic(Arc::new(changed))))
}

pub(super) fn delete(table: &MetadataTable, name: &str) -> Result<Decided, Error> {
    let topic = user_topic(table, name)?;
    let record = TopicDeleted { topic_id: show_topic(topic.id) };
    Ok((vec![Kind::TopicDeleted(record)], MetadataReply::Deleted(topic.id)))
}

/// The topic, unless it is the cluster's own.
fn user_topic<'a>(table: &'a MetadataTable, name: &str) -> Result<&'a Arc<Topic>, Error> {
    if name.starts_with("__") {
        return Err(internal_topic(name));
    }
    table.topic_named(name).ok_or_else(|| unknown_topic(name))
}

/// The number of replicas that `asked` means (0 is the default), if there are brokers for them, and a majority of each
/// partition's replicas can begin at once.
fn check_replicas(table: &MetadataTable, asked: i32) -> Result<u32, Error> {
    let able = table.brokers().filter(|broker| broker.takes_replicas()).count() as u32;
    // A broker that is down for a moment is no reason for fewer replicas than there would be with it.
    let staying = table.brokers().filter(|broker| !broker.draining).count() as u32;
    let replicas = match asked {
        0 => REPLICATION_FACTOR_DEFAULT.min(staying),
        asked => u32::try_from(asked).unwrap_or(0),
    };
    if (1..=staying).contains(&replicas) && able > replicas / 2 {
        return Ok(replicas);
    }
    let (text, all) = (if asked == 0 { replicas as i32 } else { asked }, table.brokers().count());
    let remedy = match able {
        0 => "start a broker, or stop draining one".to_owned(),
        _ if (1..=staying).contains(&replicas) => {
            format!("start the brokers that are down, or ask for 1 to {}", most_begun_by(able).min(staying))
        }
        _ => format!("ask for 1 to {}", most_begun_by(able).min(staying)),
    };
    Err(Error::new(
        ErrorCode::InvalidReplicationFactor,
        format!(
            "{text} replica(s) cannot be placed: of {all} broker(s) {able} can take one now, each holds at most one of a \
             partition, and a majority of a partition's replicas has to be there when it begins; {remedy}"
        ),
    ))
}

/// The most replicas of which `able` brokers are a majority.
fn most_begun_by(able: u32) -> u32 {
    able * 2 - 1
}

fn place(placement: &mut Placement, replicas: u32, draws: &mut Draws) -> PartitionEntry {
    PartitionEntry::new(Assignment::new(placement.partition(replicas, draws)))
}

fn show_new(entry: &PartitionEntry) -> PartitionAssignment {
    show_assignment(&entry.assignment())
}

/// `total` partitions for a topic that has `before`.
fn check_partitions(table: &MetadataTable, total: i32, before: u32) -> Result<u32, Error> {
    let rules = table.rules();
    let refuse = |text: String| Err(Error::new(ErrorCode::InvalidPartitions, text));
    let per_topic = rules.partitions_per_topic_max;
    let Some(total) = u32::try_from(total).ok().filter(|total| (1..=per_topic).contains(total)) else {
        return refuse(format!(
            "{total} partitions: a topic has 1 to {per_topic}; ask for fewer, or raise limits.partitions_per_topic"
        ));
    };
    if total < before {
        return refuse(format!(
            "the topic has {before} partitions, and {total} would be fewer: partitions are only ever added, as their \
             records would be lost; ask for more, or create another topic"
        ));
    }
    let in_all = table.partition_count() + (total - before) as usize;
    if in_all > rules.partitions_max {
        return refuse(format!(
            "the cluster would have {in_all} partitions, and its limit is {}; delete topics, or raise \
             limits.partitions",
            rules.partitions_max
        ));
    }
    Ok(total)
}

fn canonical(configs: &[(String, String)]) -> Result<TopicOverrides, Error> {
    let mut overrides = TopicOverrides::new();
    for (key, value) in configs {
        if overrides.insert(key.clone(), topic_config::canonical_value(key, value)?).is_some() {
            return Err(Error::new(
                ErrorCode::InvalidConfig,
                format!("topic config `{key}` is given twice; give it once"),
            ));
        }
    }
    Ok(overrides)
}

fn check_config(rules: &MetadataRules, overrides: &TopicOverrides, replicas: u32) -> Result<(), Error> {
    TopicConfig::resolve(&rules.topic_defaults, overrides)?.check(replicas, rules.batch_bytes_max)
}
