//! What the cluster knows about itself: the metadata state machine's state.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::internal::metadata_record::Record as Kind;
use flowstone_protocol::internal::{
    BrokerRegistered, ClusterFounded, LeadersChanged, MetadataCheckpoint, MetadataRecord, PartitionReassigned,
    PartitionRecovered, TopicCreated,
};
use flowstone_protocol::{
    BrokerId, ClusterId, DirectoryId, Error, ErrorCode, LeaderEpoch, Offset, PartitionId, ReplicaId, Timestamp,
    TopicId, TopicPartition,
};
use prost::Message;

use super::change::{Assignment, Leader, PartitionEntry};
use super::chunked::Chunked;
use super::commands::{self, MetadataCommand, MetadataReply, MetadataRules};
use super::records::{self, contradiction, malformed};
use crate::coordinator::StateMachine;
use crate::topic_config::TopicOverrides;

pub(crate) use super::change::Place;

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
/// Recoveries with a possible loss that are kept for the record. The log has all of them, as far back as it reaches.
const RECOVERIES_MAX: usize = 256;

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
    /// Its replica of the metadata, a voter's or an observer's.
    pub(crate) metadata_replica: ReplicaId,
    /// Random at each start of the broker.
    pub(crate) incarnation: u64,
    /// The newest feature level that its release knows.
    pub(crate) feature_level: i32,
    /// The controller has not heard of it for too long: it is given nothing.
    pub(crate) fenced: bool,
    /// Its replicas are to move away: it is given nothing.
    pub(crate) draining: bool,
}

impl BrokerEntry {
    /// Whether it may be given replicas.
    pub(crate) fn takes_replicas(&self) -> bool {
        !self.fenced && !self.draining
    }
}

/// What a broker has to do, as the table counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BrokerLoad {
    /// Wanted replicas.
    pub(crate) replicas: u32,
    /// Of these the preferred leaders.
    pub(crate) preferred: u32,
    /// Replicas on their way out.
    pub(crate) leaving: u32,
    /// Partitions that it leads.
    pub(crate) leads: u32,
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
    pub(crate) partitions: Chunked<PartitionEntry>,
    /// Offset of the last record that changed it; its leaders do not count.
    pub(crate) changed_at: Offset,
}

impl Topic {
    pub(crate) fn partition(&self, partition: PartitionId) -> Option<&PartitionEntry> {
        self.partitions.get(usize::try_from(partition.get()).ok()?)
    }

    /// Its partitions, in order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (TopicPartition, &PartitionEntry)> {
        self.partitions.iter().enumerate().map(|(partition, entry)| {
            (TopicPartition { topic: self.id, partition: PartitionId::new(partition as i32) }, entry)
        })
    }
}

/// A partition that went on with what one replica had: acknowledged records may have been lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recovery {
    pub(crate) tp: TopicPartition,
    /// The survivor under its new id.
    pub(crate) survivor: Place,
    pub(crate) given_up: Vec<Place>,
    pub(crate) at: Timestamp,
    pub(crate) reason: String,
}

/// The cluster's metadata. Entries are shared between the committed and the live copy, so that a copy is cheap.
#[derive(Clone, Debug)]
pub(crate) struct MetadataTable {
    rules: Arc<MetadataRules>,
    /// The newest feature level that this release knows.
    supports: i32,
    founding: Option<Founding>,
    brokers: BTreeMap<BrokerId, Arc<BrokerEntry>>,
    /// Data directories of brokers that were decommissioned: they are never taken in again.
    removed: BTreeMap<DirectoryId, BrokerId>,
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
    /// Oldest first.
    recoveries: VecDeque<Recovery>,
    /// Number of the metadata's own last recovery; 0 for none. From one to the next it grows, whoever the survivor is: it
    /// is the time of it.
    recovery: i64,

    // What follows from the above, kept so that nothing has to walk over all partitions.
    /// Topics by `changed_at`.
    changed: BTreeSet<(Offset, TopicId)>,
    /// Partitions whose replicas are being changed.
    changing: BTreeSet<TopicPartition>,
    /// Of brokers with a place or a leadership, registered or not.
    loads: BTreeMap<BrokerId, BrokerLoad>,
    /// Wanted replicas by data directory.
    held: BTreeMap<DirectoryId, u32>,
}

impl MetadataTable {
    pub(crate) fn new(rules: MetadataRules) -> Self {
        Self {
            rules: Arc::new(rules),
            supports: FEATURE_LEVEL,
            founding: None,
            brokers: BTreeMap::new(),
            removed: BTreeMap::new(),
            topics: HashMap::new(),
            names: BTreeMap::new(),
            partitions: 0,
            applied: None,
            deletions: VecDeque::new(),
            deletions_forgotten: None,
            brokers_changed_at: Offset::new(-1),
            recoveries: VecDeque::new(),
            recovery: 0,
            changed: BTreeSet::new(),
            changing: BTreeSet::new(),
            loads: BTreeMap::new(),
            held: BTreeMap::new(),
        }
    }

    /// Of a release that knows feature levels up to this one.
    #[must_use]
    pub(crate) fn supporting(mut self, feature_level: i32) -> Self {
        self.supports = feature_level;
        self
    }

    /// What the cluster's brokers may write; before the founding what this release knows.
    pub(crate) fn feature_level(&self) -> i32 {
        self.founding.as_ref().map_or(self.supports, |founding| founding.feature_level)
    }

    fn check_level(&self, feature_level: i32) -> Result<(), Error> {
        if feature_level <= self.supports {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::Unsupported,
            format!(
                "the cluster's feature level is {feature_level}, and this release knows up to {}; start a newer release",
                self.supports
            ),
        ))
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

    /// The broker that was decommissioned with this data directory.
    pub(crate) fn removed(&self, directory: DirectoryId) -> Option<BrokerId> {
        self.removed.get(&directory).copied()
    }

    /// All that were decommissioned.
    pub(super) fn removed_directories(&self) -> impl Iterator<Item = (DirectoryId, BrokerId)> {
        self.removed.iter().map(|(directory, broker)| (*directory, *broker))
    }

    pub(crate) fn load(&self, broker: BrokerId) -> BrokerLoad {
        self.loads.get(&broker).copied().unwrap_or_default()
    }

    /// Whether some replica is wanted in a data directory that no broker has any more.
    pub(crate) fn holds_strays(&self) -> bool {
        let known: BTreeSet<DirectoryId> = self.brokers.values().map(|broker| broker.directory).collect();
        self.held.keys().any(|directory| !known.contains(directory))
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

    pub(crate) fn partition(&self, tp: TopicPartition) -> Option<&PartitionEntry> {
        self.topics.get(&tp.topic)?.partition(tp.partition)
    }

    /// Every partition with its topic, sorted by name and number.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&Arc<Topic>, TopicPartition, &PartitionEntry)> {
        self.topics().flat_map(|topic| topic.entries().map(move |(tp, entry)| (topic, tp, entry)))
    }

    /// Partitions whose replicas are being changed.
    pub(crate) fn changing(&self) -> impl Iterator<Item = (TopicPartition, &PartitionEntry)> {
        self.changing.iter().filter_map(|tp| Some((*tp, self.partition(*tp)?)))
    }

    /// Topics whose settings or replicas changed after `since`.
    pub(crate) fn changed_since(&self, since: Offset) -> impl Iterator<Item = &Arc<Topic>> {
        self.changed.range((since.next(), TopicId::new(0))..).filter_map(|(_, topic)| self.topics.get(topic))
    }

    /// Brokers whose replica of the metadata follows without a vote, with that replica.
    pub(crate) fn observers(&self) -> impl Iterator<Item = Place> {
        let metadata = self.partition(METADATA_PARTITION);
        self.brokers
            .values()
            .map(|broker| Place { broker: broker.id, directory: broker.directory, replica: broker.metadata_replica })
            .filter(move |place| metadata.is_none_or(|metadata| metadata.place(place.replica).is_none()))
    }

    /// Partitions that went on with a possible loss, oldest first; the last [`RECOVERIES_MAX`]. Whoever asks reads them in
    /// the metadata's log.
    #[cfg(test)]
    pub(crate) fn recoveries(&self) -> impl Iterator<Item = &Recovery> {
        self.recoveries.iter()
    }

    /// Number of the last time that the metadata itself went on with a possible loss, 0 where it never did: whoever has
    /// followed an earlier one takes everything anew, and there may be what this table does not know of.
    pub(crate) fn recovery(&self) -> i64 {
        self.recovery
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
        let voters =
            record.voters.iter().map(|place| self.parse_place(place, at)).collect::<Result<Vec<_>, Error>>()?;
        self.check_level(record.feature_level)?;
        self.insert(Topic {
            id: METADATA_TOPIC_ID,
            name: METADATA_TOPIC.to_owned(),
            replication_factor: voters.len() as u32,
            internal: true,
            overrides: TopicOverrides::new(),
            partitions: [PartitionEntry::new(Assignment::new(voters.clone()))].into_iter().collect(),
            changed_at: at,
        });
        self.founding = Some(Founding { cluster, feature_level: record.feature_level, voters });
        Ok(())
    }

    fn register(&mut self, record: BrokerRegistered, at: Offset) -> Result<(), Error> {
        let id = BrokerId::new(record.broker_id);
        let broker = BrokerEntry {
            id,
            directory: DirectoryId::from_slice(&record.directory_id).ok_or_else(|| malformed(at, "directory_id"))?,
            client_address: record.client_address,
            peer_address: record.peer_address,
            rack: record.rack,
            version: record.version,
            metadata_replica: ReplicaId::new(record.metadata_replica_id),
            incarnation: record.incarnation,
            feature_level: record.feature_level,
            // A broker that registers lives.
            fenced: false,
            draining: self.brokers.get(&id).is_some_and(|known| known.draining),
        };
        self.brokers.insert(id, Arc::new(broker));
        self.brokers_changed_at = at;
        Ok(())
    }

    fn change_broker(&mut self, id: i32, at: Offset, change: impl FnOnce(&mut BrokerEntry)) -> Result<(), Error> {
        let broker = self
            .brokers
            .get_mut(&BrokerId::new(id))
            .ok_or_else(|| contradiction(at, "a broker is changed that is not there"))?;
        change(Arc::make_mut(broker));
        self.brokers_changed_at = at;
        Ok(())
    }

    fn create(&mut self, record: TopicCreated, at: Offset) -> Result<(), Error> {
        let id = records::parse_topic(&record.topic_id, at)?;
        if self.topics.contains_key(&id) || self.names.contains_key(&record.name) {
            return Err(contradiction(at, "a topic is created that exists"));
        }
        let partitions = record.partitions.iter().map(|partition| self.parse_entry(partition, at));
        let topic = Topic {
            id,
            replication_factor: record.replication_factor as u32,
            internal: record.name.starts_with("__"),
            partitions: partitions.collect::<Result<Chunked<_>, Error>>()?,
            overrides: record.configs.into_iter().map(|config| (config.key, config.value)).collect(),
            changed_at: at,
            name: record.name,
        };
        self.insert(topic);
        Ok(())
    }

    fn insert(&mut self, topic: Topic) {
        if !topic.internal {
            self.partitions += topic.partitions.len();
        }
        for (tp, entry) in topic.entries() {
            self.count(tp, entry, true);
        }
        self.changed.insert((topic.changed_at, topic.id));
        self.names.insert(topic.name.clone(), topic.id);
        self.topics.insert(topic.id, Arc::new(topic));
    }

    /// Adds what a partition asks of brokers to their loads, or takes it off.
    fn count(&mut self, tp: TopicPartition, entry: &PartitionEntry, add: bool) {
        if add && entry.is_changing() {
            self.changing.insert(tp);
        } else {
            self.changing.remove(&tp);
        }
        for place in entry.replicas() {
            self.weigh(place.broker, add, |load| &mut load.replicas);
            let held = self.held.entry(place.directory).or_default();
            *held = if add { *held + 1 } else { *held - 1 };
            if *held == 0 {
                self.held.remove(&place.directory);
            }
        }
        if let Some(preferred) = entry.replicas().first() {
            self.weigh(preferred.broker, add, |load| &mut load.preferred);
        }
        for place in entry.leaving() {
            self.weigh(place.broker, add, |load| &mut load.leaving);
        }
        if let Some(leader) = entry.leader() {
            self.leads(leader.broker, add);
        }
    }

    fn leads(&mut self, broker: BrokerId, add: bool) {
        self.weigh(broker, add, |load| &mut load.leads);
    }

    fn weigh(&mut self, broker: BrokerId, add: bool, field: fn(&mut BrokerLoad) -> &mut u32) {
        let load = self.loads.entry(broker).or_default();
        let count = field(load);
        *count = if add { *count + 1 } else { *count - 1 };
        if *load == BrokerLoad::default() {
            self.loads.remove(&broker);
        }
    }

    fn topic_mut(&mut self, id: TopicId, at: Offset) -> Result<&mut Topic, Error> {
        let topic =
            self.topics.get_mut(&id).ok_or_else(|| contradiction(at, "a topic is changed that is not there"))?;
        Ok(Arc::make_mut(topic))
    }

    /// Marks a topic as changed.
    fn touch(&mut self, id: TopicId, at: Offset) -> Result<(), Error> {
        let topic = self.topic_mut(id, at)?;
        let before = std::mem::replace(&mut topic.changed_at, at);
        self.changed.remove(&(before, id));
        self.changed.insert((at, id));
        Ok(())
    }

    fn set_entry(&mut self, tp: TopicPartition, entry: PartitionEntry, at: Offset) -> Result<(), Error> {
        let missing = || contradiction(at, "a partition is changed that is not there");
        self.count(tp, &entry, true);
        let slot = usize::try_from(tp.partition.get()).map_err(|_| missing())?;
        let slot = self.topic_mut(tp.topic, at)?.partitions.get_mut(slot).ok_or_else(missing)?;
        let before = std::mem::replace(slot, entry);
        let changing = self.changing.contains(&tp);
        self.count(tp, &before, false);
        if changing {
            self.changing.insert(tp);
        }
        Ok(())
    }

    fn add_partitions(&mut self, id: TopicId, added: Vec<PartitionEntry>, at: Offset) -> Result<(), Error> {
        let topic = self.topic_mut(id, at)?;
        let (first, internal) = (topic.partitions.len(), topic.internal);
        topic.partitions.extend(added.iter().cloned());
        for (partition, entry) in (first..).zip(&added) {
            let tp = TopicPartition { topic: id, partition: PartitionId::new(partition as i32) };
            self.count(tp, entry, true);
        }
        if !internal {
            self.partitions += added.len();
        }
        self.touch(id, at)
    }

    fn reassign(&mut self, record: &PartitionReassigned, at: Offset) -> Result<(), Error> {
        let tp = records::parse_partition(&record.topic_id, record.partition, at)?;
        let assignment = record.assignment.as_ref().ok_or_else(|| malformed(at, "assignment"))?;
        let leader = self.partition(tp).and_then(PartitionEntry::leader);
        let entry = self.parse_entry(assignment, at)?;
        // A checkpoint's record carries the leader itself.
        let leader = entry.leader().or(leader);
        self.set_entry(tp, entry.with_leader(leader), at)?;
        self.touch(tp.topic, at)
    }

    fn recover(&mut self, record: PartitionRecovered, at: Offset) -> Result<(), Error> {
        let recovery = self.parse_recovery(&record, at)?;
        let assignment = record.assignment.as_ref().ok_or_else(|| malformed(at, "assignment"))?;
        // Whoever led what was given up leads it no more, and the survivor's epochs may begin below theirs.
        let entry = self.parse_entry(assignment, at)?.with_leader(None);
        let tp = recovery.tp;
        self.set_entry(tp, entry, at)?;
        self.touch(tp.topic, at)?;
        if tp == METADATA_PARTITION {
            self.recovery = recovery.at.get().max(self.recovery + 1);
            self.forget_founders();
        }
        self.remember(recovery);
        Ok(())
    }

    /// What this table says of replicas may be from long ago: one that voted then, and was taken away since, must not be
    /// made as a voter once more.
    fn forget_founders(&mut self) {
        for topic in self.topics.values_mut().filter(|topic| topic.id != METADATA_TOPIC_ID) {
            let topic = Arc::make_mut(topic);
            topic.partitions = topic.partitions.iter().map(PartitionEntry::without_founders).collect();
        }
    }

    fn remember(&mut self, recovery: Recovery) {
        self.recoveries.push_back(recovery);
        if self.recoveries.len() > RECOVERIES_MAX {
            self.recoveries.pop_front();
        }
    }

    fn lead(&mut self, record: &LeadersChanged, at: Offset) -> Result<(), Error> {
        for row in &record.leaders {
            let tp = records::parse_partition(&row.topic_id, row.partition, at)?;
            let leader = Leader { broker: BrokerId::new(row.broker_id), epoch: LeaderEpoch::new(row.leader_epoch) };
            let topic = self.topic_mut(tp.topic, at)?;
            let entry = usize::try_from(tp.partition.get()).ok().and_then(|slot| topic.partitions.get_mut(slot));
            let entry = entry.ok_or_else(|| contradiction(at, "a partition is led that is not there"))?;
            let before = entry.leader();
            // An older epoch never replaces a newer one.
            if before.is_some_and(|before| before.epoch >= leader.epoch) {
                continue;
            }
            entry.set_leader(Some(leader));
            self.leads(leader.broker, true);
            if let Some(before) = before {
                self.leads(before.broker, false);
            }
        }
        Ok(())
    }

    fn delete(&mut self, topic: &[u8], at: Offset) -> Result<(), Error> {
        let id = records::parse_topic(topic, at)?;
        let topic = self.topics.remove(&id).ok_or_else(|| contradiction(at, "a topic is deleted that is not there"))?;
        self.names.remove(&topic.name);
        if !topic.internal {
            self.partitions -= topic.partitions.len();
        }
        for (tp, entry) in topic.entries() {
            self.count(tp, entry, false);
        }
        self.changed.remove(&(topic.changed_at, id));
        self.deletions.push_back((at, id));
        if self.deletions.len() > DELETIONS_MAX {
            self.deletions_forgotten = self.deletions.pop_front().map(|(at, _)| at);
        }
        Ok(())
    }

    fn take_in(&mut self, record: Kind, at: Offset) -> Result<(), Error> {
        match record {
            Kind::ClusterFounded(record) => self.found(&record, at),
            Kind::BrokerRegistered(record) => self.register(record, at),
            Kind::BrokerFenced(record) => {
                self.change_broker(record.broker_id, at, |broker| broker.fenced = record.fenced)
            }
            Kind::BrokerDraining(record) => {
                self.change_broker(record.broker_id, at, |broker| broker.draining = record.draining)
            }
            Kind::BrokerRemoved(record) => {
                let id = BrokerId::new(record.broker_id);
                // In a checkpoint there are only the directories of those that are gone.
                self.brokers.remove(&id);
                let directory =
                    DirectoryId::from_slice(&record.directory_id).ok_or_else(|| malformed(at, "directory_id"))?;
                self.removed.insert(directory, id);
                self.brokers_changed_at = at;
                Ok(())
            }
            Kind::FeatureLevelRaised(record) => {
                self.check_level(record.feature_level)?;
                let founding =
                    self.founding.as_mut().ok_or_else(|| contradiction(at, "a level is raised before the founding"))?;
                founding.feature_level = record.feature_level;
                Ok(())
            }
            Kind::TopicCreated(record) => self.create(record, at),
            Kind::PartitionsAdded(record) => {
                let id = records::parse_topic(&record.topic_id, at)?;
                let added = record.partitions.iter().map(|partition| self.parse_entry(partition, at));
                let added = added.collect::<Result<Vec<_>, Error>>()?;
                self.add_partitions(id, added, at)
            }
            Kind::TopicConfigChanged(record) => {
                let id = records::parse_topic(&record.topic_id, at)?;
                let topic = self.topic_mut(id, at)?;
                for key in &record.unset {
                    topic.overrides.remove(key);
                }
                topic.overrides.extend(record.set.into_iter().map(|config| (config.key, config.value)));
                self.touch(id, at)
            }
            Kind::TopicDeleted(record) => self.delete(&record.topic_id, at),
            Kind::PartitionReassigned(record) => self.reassign(&record, at),
            Kind::PartitionRecovered(record) => self.recover(record, at),
            Kind::LeadersChanged(record) => self.lead(&record, at),
        }
    }
}

impl StateMachine for MetadataTable {
    type Command = MetadataCommand;
    type Reply = MetadataReply;
    type Record = MetadataRecord;

    fn decide(&self, command: MetadataCommand, now: Timestamp) -> (Vec<MetadataRecord>, Result<MetadataReply, Error>) {
        match commands::decide(self, command, now) {
            Ok((records, reply)) => {
                (records.into_iter().map(|record| MetadataRecord { record: Some(record) }).collect(), Ok(reply))
            }
            Err(error) => (Vec::new(), Err(error)),
        }
    }

    fn apply(&mut self, record: MetadataRecord, at: Offset) -> Result<(), Error> {
        let Some(record) = record.record else {
            return Err(Error::new(
                ErrorCode::Unsupported,
                format!(
                    "the metadata record at offset {at} is of a kind that this release does not know; start the release \
                     that wrote it, or a newer one"
                ),
            ));
        };
        self.take_in(record, at)?;
        self.applied = Some(at);
        Ok(())
    }

    fn applied(&self) -> Offset {
        Self::applied(self)
    }

    fn recovery(&self) -> i64 {
        Self::recovery(self)
    }

    fn checkpoint(&self) -> Bytes {
        let checkpoint = MetadataCheckpoint {
            applied: self.applied().get(),
            records: self.checkpoint_records(),
            recoveries: self.recoveries.iter().map(records::show_recovery).collect(),
            recovery: self.recovery,
        };
        checkpoint.encode_to_vec().into()
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let empty = MetadataTable::new(MetadataRules::default()).supporting(self.supports);
        let mut fresh = MetadataTable { rules: Arc::clone(&self.rules), ..empty };
        if !bytes.is_empty() {
            let checkpoint = MetadataCheckpoint::decode(bytes).map_err(|error| {
                Error::new(ErrorCode::CorruptLog, format!("the metadata's checkpoint is malformed: {error}"))
            })?;
            let applied = Offset::new(checkpoint.applied);
            for record in checkpoint.records {
                fresh.apply(record, applied)?;
            }
            for recovery in &checkpoint.recoveries {
                let recovery = fresh.parse_recovery(recovery, applied)?;
                fresh.remember(recovery);
            }
            fresh.recovery = checkpoint.recovery;
            fresh.applied = (applied.get() >= 0).then_some(applied);
            // What was deleted before is not told any more.
            fresh.deletions_forgotten = fresh.applied;
        }
        *self = fresh;
        Ok(())
    }
}
