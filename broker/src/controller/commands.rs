//! What may be asked of the metadata, and what is decided: commands in, records and an answer out.

use std::sync::Arc;

use flowstone_protocol::internal::metadata_record::Record as Kind;
use flowstone_protocol::internal::{
    BrokerRegistered, ClusterFounded, PartitionsAdded, TopicConfigChanged, TopicCreated, TopicDeleted,
};
use flowstone_protocol::{ClusterId, Error, ErrorCode, TopicId, TopicName};

use super::placement::{self, Candidate, Draws};
use super::table::{
    BrokerEntry, FEATURE_LEVEL, MetadataTable, Place, Topic, show_assignment, show_configs, show_place,
};
use crate::topic_config::{self, TopicConfig, TopicOverrides};

/// Replicas of a topic whose creator does not say, where there are enough brokers.
const REPLICATION_FACTOR_DEFAULT: u32 = 3;

/// A change that is asked for. Whatever is random was drawn by the caller.
#[derive(Clone, Debug)]
pub(crate) enum MetadataCommand {
    /// The cluster begins; answered alike when it exists.
    Found { cluster: ClusterId, voters: Vec<Place> },
    /// A broker started.
    RegisterBroker(BrokerEntry),
    /// A new topic.
    CreateTopic(CreateTopic),
    /// Other settings, more partitions, or both.
    AlterTopic(AlterTopic),
    /// Away with it.
    DeleteTopic { name: String },
}

/// What a new topic shall be.
#[derive(Clone, Debug)]
pub(crate) struct CreateTopic {
    pub(crate) name: String,
    /// As the user said, unchecked; 0 for the default.
    pub(crate) partitions: i32,
    /// As the user said, unchecked; 0 for the default.
    pub(crate) replication_factor: i32,
    /// As the user wrote them.
    pub(crate) configs: Vec<(String, String)>,
    pub(crate) topic_id: TopicId,
    pub(crate) seed: u64,
    pub(crate) validate_only: bool,
}

/// What shall become of a topic.
#[derive(Clone, Debug)]
pub(crate) struct AlterTopic {
    pub(crate) name: String,
    pub(crate) set: Vec<(String, String)>,
    pub(crate) unset: Vec<String>,
    /// New total, unchecked; 0 leaves it.
    pub(crate) partitions: i32,
    pub(crate) seed: u64,
    pub(crate) validate_only: bool,
}

/// The answer to a command.
#[derive(Clone, Debug)]
pub(crate) enum MetadataReply {
    /// It is so.
    Done,
    /// The topic as it is, or would be.
    Topic(Arc<Topic>),
    /// The topic that is gone.
    Deleted(TopicId),
}

/// Bounds and defaults of this broker's configuration.
#[derive(Clone, Debug, Default)]
pub(crate) struct MetadataRules {
    pub(crate) topics_max: usize,
    pub(crate) partitions_per_topic_max: u32,
    pub(crate) partitions_max: usize,
    pub(crate) batch_bytes_max: usize,
    pub(crate) topic_defaults: TopicOverrides,
}

type Decided = (Vec<Kind>, MetadataReply);

/// What follows from `command` in this state.
pub(crate) fn decide(table: &MetadataTable, command: MetadataCommand) -> Result<Decided, Error> {
    match command {
        MetadataCommand::Found { cluster, voters } => Ok(found(table, cluster, &voters)),
        MetadataCommand::RegisterBroker(broker) => register(table, broker),
        MetadataCommand::CreateTopic(create) => create_topic(table, create),
        MetadataCommand::AlterTopic(alter) => alter_topic(table, alter),
        MetadataCommand::DeleteTopic { name } => delete_topic(table, &name),
    }
}

fn found(table: &MetadataTable, cluster: ClusterId, voters: &[Place]) -> Decided {
    if table.founding().is_some() {
        return (Vec::new(), MetadataReply::Done);
    }
    let record = ClusterFounded {
        cluster_id: cluster.to_bytes().to_vec().into(),
        feature_level: FEATURE_LEVEL,
        voters: voters.iter().map(show_place).collect(),
    };
    (vec![Kind::ClusterFounded(record)], MetadataReply::Done)
}

fn register(table: &MetadataTable, broker: BrokerEntry) -> Result<Decided, Error> {
    if let Some(known) = table.broker(broker.id) {
        if known.directory != broker.directory {
            return Err(Error::new(
                ErrorCode::InvalidRequest,
                format!(
                    "node.id {} belongs to a broker with another data directory (id {}); give this broker a node.id of \
                     its own, or start it with that directory",
                    broker.id, known.directory
                ),
            ));
        }
        if **known == broker {
            return Ok((Vec::new(), MetadataReply::Done));
        }
    }
    let record = BrokerRegistered {
        broker_id: broker.id.get(),
        directory_id: broker.directory.to_bytes().to_vec().into(),
        client_address: broker.client_address,
        peer_address: broker.peer_address,
        rack: broker.rack,
        version: broker.version,
    };
    Ok((vec![Kind::BrokerRegistered(record)], MetadataReply::Done))
}

fn create_topic(table: &MetadataTable, create: CreateTopic) -> Result<Decided, Error> {
    let name = TopicName::new(create.name.as_str())
        .map_err(|error| Error::new(ErrorCode::InvalidTopicName, error.to_string()).with_topic(create.name.clone()))?;
    if name.is_internal() {
        return Err(internal_topic(name.as_str()));
    }
    if table.topic_named(name.as_str()).is_some() {
        return Err(Error::new(
            ErrorCode::TopicAlreadyExists,
            format!("topic `{name}` exists already; choose another name, or delete that one first"),
        )
        .with_topic(name.as_str()));
    }
    let in_topic = |error: Error| error.with_topic(name.as_str());
    let rules = table.rules();
    let partitions = if create.partitions == 0 { 1 } else { create.partitions };
    let partitions = check_partitions(table, partitions, 0).map_err(in_topic)?;
    let brokers = table.brokers().count() as u32;
    let replicas = match create.replication_factor {
        0 => REPLICATION_FACTOR_DEFAULT.min(brokers),
        asked => u32::try_from(asked).unwrap_or(0),
    };
    if replicas == 0 || replicas > brokers {
        return Err(in_topic(Error::new(
            ErrorCode::InvalidReplicationFactor,
            format!(
                "{} replica(s) cannot be placed: the cluster has {brokers} broker(s), each holds one of a partition; ask \
                 for 1 to {brokers}",
                create.replication_factor
            ),
        )));
    }
    if table.topic_count() >= rules.topics_max {
        return Err(in_topic(Error::new(
            ErrorCode::InvalidRequest,
            format!("the cluster has {} topics, its limit; delete some, or raise limits.topics", rules.topics_max),
        )));
    }
    let overrides = canonical(&create.configs).map_err(in_topic)?;
    check_config(rules, &overrides, replicas).map_err(in_topic)?;

    let mut draws = Draws::from_seed(create.seed);
    let topic = Topic {
        id: create.topic_id,
        name: name.as_str().to_owned(),
        replication_factor: replicas,
        internal: false,
        partitions: placement::place(&candidates(table), partitions, replicas, &mut draws),
        changed_at: table.applied(),
        overrides,
    };
    let record = TopicCreated {
        topic_id: topic.id.to_bytes().to_vec().into(),
        name: topic.name.clone(),
        replication_factor: replicas as i32,
        configs: show_configs(&topic.overrides),
        partitions: topic.partitions.iter().map(|places| show_assignment(places)).collect(),
    };
    let records = if create.validate_only { Vec::new() } else { vec![Kind::TopicCreated(record)] };
    Ok((records, MetadataReply::Topic(Arc::new(topic))))
}

fn alter_topic(table: &MetadataTable, alter: AlterTopic) -> Result<Decided, Error> {
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
        check_config(rules, &changed.overrides, topic.replication_factor).map_err(in_topic)?;
        records.push(Kind::TopicConfigChanged(TopicConfigChanged {
            topic_id: topic.id.to_bytes().to_vec().into(),
            set: show_configs(&set),
            unset: alter.unset.clone(),
        }));
    }

    if alter.partitions != 0 {
        let before = topic.partitions.len() as u32;
        let wanted = check_partitions(table, alter.partitions, before).map_err(in_topic)?;
        if wanted > before {
            let mut draws = Draws::from_seed(alter.seed);
            let candidates = candidates(table);
            let added = placement::place(&candidates, wanted - before, topic.replication_factor, &mut draws);
            records.push(Kind::PartitionsAdded(PartitionsAdded {
                topic_id: topic.id.to_bytes().to_vec().into(),
                partitions: added.iter().map(|places| show_assignment(places)).collect(),
            }));
            changed.partitions.extend(added);
        }
    }
    if alter.validate_only {
        records.clear();
    }
    Ok((records, MetadataReply::Topic(Arc::new(changed))))
}

fn delete_topic(table: &MetadataTable, name: &str) -> Result<Decided, Error> {
    let topic = user_topic(table, name)?;
    let record = TopicDeleted { topic_id: topic.id.to_bytes().to_vec().into() };
    Ok((vec![Kind::TopicDeleted(record)], MetadataReply::Deleted(topic.id)))
}

/// The topic, unless it is the cluster's own.
fn user_topic<'a>(table: &'a MetadataTable, name: &str) -> Result<&'a Arc<Topic>, Error> {
    if name.starts_with("__") {
        return Err(internal_topic(name));
    }
    table.topic_named(name).ok_or_else(|| unknown_topic(name))
}

/// For a name that no topic has.
pub(crate) fn unknown_topic(name: &str) -> Error {
    Error::new(
        ErrorCode::UnknownTopic,
        format!("there is no topic `{}`; topics are not created by using them: create it first", name.escape_debug()),
    )
    .with_topic(name)
}

/// For a change to what is the cluster's own.
pub(crate) fn internal_topic(name: &str) -> Error {
    Error::new(
        ErrorCode::InternalTopic,
        format!("`{name}`: names that begin with `__` are the cluster's own; they are read, never written or changed"),
    )
    .with_topic(name)
}

/// `total` partitions for a topic that has `before`.
fn check_partitions(table: &MetadataTable, total: i32, before: u32) -> Result<u32, Error> {
    let rules = table.rules();
    let refuse = |text: String| Err(Error::new(ErrorCode::InvalidPartitions, text));
    let per_topic = rules.partitions_per_topic_max;
    let Some(total) = u32::try_from(total).ok().filter(|total| (1..=per_topic).contains(total)) else {
        return refuse(format!("{total} partitions: a topic has 1 to {per_topic} (limits.partitions_per_topic)"));
    };
    if total < before {
        return refuse(format!(
            "the topic has {before} partitions, and {total} would be fewer: partitions are only ever added, as their \
             records would be lost"
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

fn candidates(table: &MetadataTable) -> Vec<Candidate> {
    table
        .brokers()
        .map(|broker| Candidate { broker: broker.id, directory: broker.directory, rack: broker.rack.clone() })
        .collect()
}
