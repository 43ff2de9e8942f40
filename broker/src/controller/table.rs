//! What the cluster knows about itself: the metadata state machine's state.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::internal::metadata_record::Record as Kind;
use flowstone_protocol::internal::{
    BrokerRegistered, ClusterFounded, MetadataCheckpoint, MetadataRecord, PartitionAssignment, ReplicaPlace,
    TopicConfigValue, TopicCreated,
};
use flowstone_protocol::{
    BrokerId, ClusterId, DirectoryId, Error, ErrorCode, Offset, PartitionId, ReplicaId, Timestamp, TopicId,
    TopicPartition,
};
use prost::Message;

use super::commands::{self, MetadataCommand, MetadataReply, MetadataRules};
use crate::coordinator::StateMachine;
use crate::topic_config::TopicOverrides;

/// Name of the metadata's own topic.
pub(crate) const METADATA_TOPIC: &str = "__cluster_metadata";
/// Its id, the same in every cluster: it must be known before there is any metadata.
pub(crate) const METADATA_TOPIC_ID: TopicId = TopicId::new(1);
/// Its only partition.
pub(crate) const METADATA_PARTITION: TopicPartition =
    TopicPartition { topic: METADATA_TOPIC_ID, partition: PartitionId::new(0) };
/// What this release writes and understands.
pub(crate) const FEATURE_LEVEL: i32 = 1;
/// Deletions that are remembered for watchers; one further behind is sent everything anew.
const DELETIONS_MAX: usize = 1024;

/// A replica's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) broker: BrokerId,
    pub(crate) directory: DirectoryId,
    pub(crate) replica: ReplicaId,
}

/// The cluster's founding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Founding {
    pub(crate) cluster: ClusterId,
    pub(crate) feature_level: i32,
    pub(crate) voters: Vec<Place>,
}

/// A broker that registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BrokerEntry {
    pub(crate) id: BrokerId,
    pub(crate) directory: DirectoryId,
    pub(crate) client_address: String,
    pub(crate) peer_address: String,
    pub(crate) rack: String,
    pub(crate) version: String,
}

/// A topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Topic {
    pub(crate) id: TopicId,
    pub(crate) name: String,
    pub(crate) replication_factor: u32,
    pub(crate) internal: bool,
    /// What was set for this topic alone, canonical.
    pub(crate) overrides: TopicOverrides,
    /// Replicas by partition, the preferred leader first.
    pub(crate) partitions: Vec<Vec<Place>>,
    /// Offset of the last record that changed it.
    pub(crate) changed_at: Offset,
}

/// The cluster's metadata. Entries are shared between the committed and the live copy, so that a copy is cheap.
#[derive(Clone, Debug)]
pub(crate) struct MetadataTable {
    rules: Arc<MetadataRules>,
    founding: Option<Founding>,
    brokers: BTreeMap<BrokerId, Arc<BrokerEntry>>,
    topics: HashMap<TopicId, Arc<Topic>>,
    names: BTreeMap<String, TopicId>,
    /// Of all topics that are not internal.
    partitions: usize,
    /// Offset of the last record taken in.
    applied: Option<Offset>,
    /// Last deletions, oldest first.
    deletions: VecDeque<(Offset, TopicId)>,
    /// Deletions at or below this offset are forgotten.
    deletions_forgotten: Option<Offset>,
    /// Offset of the last record about brokers.
    brokers_changed_at: Offset,
}

impl MetadataTable {
    pub(crate) fn new(rules: MetadataRules) -> Self {
        Self {
            rules: Arc::new(rules),
            founding: None,
            brokers: BTreeMap::new(),
            topics: HashMap::new(),
            names: BTreeMap::new(),
            partitions: 0,
            applied: None,
            deletions: VecDeque::new(),
            deletions_forgotten: None,
            brokers_changed_at: Offset::new(-1),
        }
    }

    pub(crate) fn rules(&self) -> &MetadataRules {
        &self.rules
    }

    pub(crate) fn founding(&self) -> Option<&Founding> {
        self.founding.as_ref()
    }

    pub(crate) fn brokers(&self) -> impl Iterator<Item = &Arc<BrokerEntry>> {
        self.brokers.values()
    }

    pub(crate) fn broker(&self, id: BrokerId) -> Option<&Arc<BrokerEntry>> {
        self.brokers.get(&id)
    }

    pub(crate) fn topic(&self, id: TopicId) -> Option<&Arc<Topic>> {
        self.topics.get(&id)
    }

    pub(crate) fn topic_named(&self, name: &str) -> Option<&Arc<Topic>> {
        self.topics.get(self.names.get(name)?)
    }

    /// Sorted by name.
    pub(crate) fn topics(&self) -> impl Iterator<Item = &Arc<Topic>> {
        self.names.values().filter_map(|id| self.topics.get(id))
    }

    /// Topics that are not the cluster's own.
    pub(crate) fn topic_count(&self) -> usize {
        self.topics.values().filter(|topic| !topic.internal).count()
    }

    /// Partitions of topics that are not the cluster's own.
    pub(crate) fn partition_count(&self) -> usize {
        self.partitions
    }

    /// Offset of the last record taken in, -1 for none.
    pub(crate) fn applied(&self) -> Offset {
        self.applied.unwrap_or(Offset::new(-1))
    }

    pub(crate) fn brokers_changed_at(&self) -> Offset {
        self.brokers_changed_at
    }

    /// Topics deleted after `since`; `None` when that is too long ago to tell.
    pub(crate) fn deleted_since(&self, since: Offset) -> Option<Vec<TopicId>> {
        if self.deletions_forgotten.is_some_and(|forgotten| forgotten > since) {
            return None;
        }
        Some(self.deletions.iter().filter(|(at, _)| *at > since).map(|(_, topic)| *topic).collect())
    }

    fn found(&mut self, record: &ClusterFounded, at: Offset) -> Result<(), Error> {
        if self.founding.is_some() {
            return Err(contradiction(at, "the cluster is founded a second time"));
        }
        let cluster = ClusterId::from_slice(&record.cluster_id).ok_or_else(|| malformed(at, "cluster_id"))?;
        let voters = record.voters.iter().map(|place| parse_place(place, at)).collect::<Result<Vec<_>, Error>>()?;
        if record.feature_level > FEATURE_LEVEL {
            return Err(Error::new(
                ErrorCode::Unsupported,
                format!(
                    "the cluster's feature level is {}, and this release knows up to {FEATURE_LEVEL}; start a newer \
                     release",
                    record.feature_level
                ),
            ));
        }
        let topic = Topic {
            id: METADATA_TOPIC_ID,
            name: METADATA_TOPIC.to_owned(),
            replication_factor: voters.len() as u32,
            internal: true,
            overrides: TopicOverrides::new(),
            partitions: vec![voters.clone()],
            changed_at: at,
        };
        self.names.insert(topic.name.clone(), topic.id);
        self.topics.insert(topic.id, Arc::new(topic));
        self.founding = Some(Founding { cluster, feature_level: record.feature_level, voters });
        Ok(())
    }

    fn register(&mut self, record: BrokerRegistered, at: Offset) -> Result<(), Error> {
        let broker = BrokerEntry {
            id: BrokerId::new(record.broker_id),
            directory: DirectoryId::from_slice(&record.directory_id).ok_or_else(|| malformed(at, "directory_id"))?,
            client_address: record.client_address,
            peer_address: record.peer_address,
            rack: record.rack,
            version: record.version,
        };
        self.brokers.insert(broker.id, Arc::new(broker));
        self.brokers_changed_at = at;
        Ok(())
    }

    fn create(&mut self, record: TopicCreated, at: Offset) -> Result<(), Error> {
        let id = parse_topic(&record.topic_id, at)?;
        if self.topics.contains_key(&id) || self.names.contains_key(&record.name) {
            return Err(contradiction(at, "a topic is created that exists"));
        }
        let topic = Topic {
            id,
            replication_factor: record.replication_factor as u32,
            internal: record.name.starts_with("__"),
            overrides: record.configs.into_iter().map(|config| (config.key, config.value)).collect(),
            partitions: parse_partitions(&record.partitions, at)?,
            changed_at: at,
            name: record.name,
        };
        if !topic.internal {
            self.partitions += topic.partitions.len();
        }
        self.names.insert(topic.name.clone(), id);
        self.topics.insert(id, Arc::new(topic));
        Ok(())
    }

    fn change(&mut self, topic: &[u8], at: Offset, change: impl FnOnce(&mut Topic)) -> Result<(), Error> {
        let id = parse_topic(topic, at)?;
        let topic =
            self.topics.get_mut(&id).ok_or_else(|| contradiction(at, "a topic is changed that is not there"))?;
        let topic = Arc::make_mut(topic);
        let before = topic.partitions.len();
        change(topic);
        topic.changed_at = at;
        if !topic.internal {
            self.partitions += topic.partitions.len() - before;
        }
        Ok(())
    }

    fn delete(&mut self, topic: &[u8], at: Offset) -> Result<(), Error> {
        let id = parse_topic(topic, at)?;
        let topic = self.topics.remove(&id).ok_or_else(|| contradiction(at, "a topic is deleted that is not there"))?;
        self.names.remove(&topic.name);
        if !topic.internal {
            self.partitions -= topic.partitions.len();
        }
        self.deletions.push_back((at, id));
        if self.deletions.len() > DELETIONS_MAX {
            self.deletions_forgotten = self.deletions.pop_front().map(|(at, _)| at);
        }
        Ok(())
    }
}

impl StateMachine for MetadataTable {
    type Command = MetadataCommand;
    type Reply = MetadataReply;
    type Record = MetadataRecord;

    fn decide(&self, command: MetadataCommand, _now: Timestamp) -> (Vec<MetadataRecord>, Result<MetadataReply, Error>) {
        match commands::decide(self, command) {
            Ok((records, reply)) => {
                (records.into_iter().map(|record| MetadataRecord { record: Some(record) }).collect(), Ok(reply))
            }
            Err(error) => (Vec::new(), Err(error)),
        }
    }

    fn apply(&mut self, record: MetadataRecord, at: Offset) -> Result<(), Error> {
        match record.record {
            Some(Kind::ClusterFounded(record)) => self.found(&record, at)?,
            Some(Kind::BrokerRegistered(record)) => self.register(record, at)?,
            Some(Kind::TopicCreated(record)) => self.create(record, at)?,
            Some(Kind::PartitionsAdded(record)) => {
                let added = parse_partitions(&record.partitions, at)?;
                self.change(&record.topic_id, at, |topic| topic.partitions.extend(added))?;
            }
            Some(Kind::TopicConfigChanged(record)) => self.change(&record.topic_id, at, |topic| {
                for key in &record.unset {
                    topic.overrides.remove(key);
                }
                topic.overrides.extend(record.set.into_iter().map(|config| (config.key, config.value)));
            })?,
            Some(Kind::TopicDeleted(record)) => self.delete(&record.topic_id, at)?,
            None => {
                return Err(Error::new(
                    ErrorCode::Unsupported,
                    format!(
                        "the metadata record at offset {at} is of a kind that this release does not know; start the \
                         release that wrote it, or a newer one"
                    ),
                ));
            }
        }
        self.applied = Some(at);
        Ok(())
    }

    fn applied(&self) -> Offset {
        Self::applied(self)
    }

    fn checkpoint(&self) -> Bytes {
        let founding = self.founding.iter().map(|founding| {
            Kind::ClusterFounded(ClusterFounded {
                cluster_id: founding.cluster.to_bytes().to_vec().into(),
                feature_level: founding.feature_level,
                voters: founding.voters.iter().map(show_place).collect(),
            })
        });
        let brokers = self.brokers.values().map(|broker| {
            Kind::BrokerRegistered(BrokerRegistered {
                broker_id: broker.id.get(),
                directory_id: broker.directory.to_bytes().to_vec().into(),
                client_address: broker.client_address.clone(),
                peer_address: broker.peer_address.clone(),
                rack: broker.rack.clone(),
                version: broker.version.clone(),
            })
        });
        let topics = self.topics().filter(|topic| topic.id != METADATA_TOPIC_ID).map(|topic| {
            Kind::TopicCreated(TopicCreated {
                topic_id: topic.id.to_bytes().to_vec().into(),
                name: topic.name.clone(),
                replication_factor: topic.replication_factor as i32,
                configs: show_configs(&topic.overrides),
                partitions: topic.partitions.iter().map(|places| show_assignment(places)).collect(),
            })
        });
        let records = founding.chain(brokers).chain(topics).map(|record| MetadataRecord { record: Some(record) });
        let checkpoint = MetadataCheckpoint { applied: self.applied().get(), records: records.collect() };
        checkpoint.encode_to_vec().into()
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut fresh =
            MetadataTable { rules: Arc::clone(&self.rules), ..MetadataTable::new(MetadataRules::default()) };
        if !bytes.is_empty() {
            let checkpoint = MetadataCheckpoint::decode(bytes).map_err(|error| {
                Error::new(ErrorCode::CorruptLog, format!("the metadata's checkpoint is malformed: {error}"))
            })?;
            let applied = Offset::new(checkpoint.applied);
            for record in checkpoint.records {
                fresh.apply(record, applied)?;
            }
            fresh.applied = (applied.get() >= 0).then_some(applied);
            // What was deleted before is not told any more.
            fresh.deletions_forgotten = fresh.applied;
        }
        *self = fresh;
        Ok(())
    }
}

pub(crate) fn show_place(place: &Place) -> ReplicaPlace {
    ReplicaPlace {
        broker_id: place.broker.get(),
        directory_id: place.directory.to_bytes().to_vec().into(),
        replica_id: place.replica.get(),
    }
}

pub(crate) fn show_assignment(places: &[Place]) -> PartitionAssignment {
    PartitionAssignment { replicas: places.iter().map(show_place).collect() }
}

pub(crate) fn show_configs(configs: &TopicOverrides) -> Vec<TopicConfigValue> {
    configs.iter().map(|(key, value)| TopicConfigValue { key: key.clone(), value: value.clone() }).collect()
}

fn parse_place(place: &ReplicaPlace, at: Offset) -> Result<Place, Error> {
    Ok(Place {
        broker: BrokerId::new(place.broker_id),
        directory: DirectoryId::from_slice(&place.directory_id).ok_or_else(|| malformed(at, "directory_id"))?,
        replica: ReplicaId::new(place.replica_id),
    })
}

fn parse_partitions(partitions: &[PartitionAssignment], at: Offset) -> Result<Vec<Vec<Place>>, Error> {
    partitions
        .iter()
        .map(|assignment| assignment.replicas.iter().map(|place| parse_place(place, at)).collect())
        .collect()
}

fn parse_topic(id: &[u8], at: Offset) -> Result<TopicId, Error> {
    TopicId::from_slice(id).ok_or_else(|| malformed(at, "topic_id"))
}

fn malformed(at: Offset, field: &str) -> Error {
    Error::new(ErrorCode::CorruptLog, format!("the metadata record at offset {at} has a malformed {field}"))
}

fn contradiction(at: Offset, what: &str) -> Error {
    Error::new(
        ErrorCode::CorruptLog,
        format!("the metadata record at offset {at} contradicts what is before it: {what}"),
    )
}
