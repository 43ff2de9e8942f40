//! The metadata's records: how the table's parts are written down and read again, and the whole table as records.

use bytes::Bytes;
use flowstone_protocol::internal::metadata_record::Record as Kind;
use flowstone_protocol::internal::{
    BrokerDraining, BrokerFenced, BrokerRegistered, BrokerRemoved, ClusterFounded, MetadataRecord, PartitionAssignment,
    PartitionLeadership, PartitionReassigned, PartitionRecovered, ReplicaPlace, TopicConfigValue, TopicCreated,
};
use flowstone_protocol::{
    BrokerId, DirectoryId, Error, ErrorCode, LeaderEpoch, Offset, PartitionId, ReplicaId, Timestamp, TopicId,
    TopicPartition,
};

use super::change::{Assignment, Founders, Leader, PartitionEntry, Recovered};
use super::table::{BrokerEntry, METADATA_PARTITION, METADATA_TOPIC_ID, MetadataTable, Place, Recovery};
use crate::topic_config::TopicOverrides;

impl MetadataTable {
    /// The records that lead to this state, in an order in which they can be taken in. What is derived, and what only
    /// those need who follow, is not among them.
    pub(super) fn checkpoint_records(&self) -> Vec<MetadataRecord> {
        let founding = self.founding().map(|founding| {
            Kind::ClusterFounded(ClusterFounded {
                cluster_id: founding.cluster.to_bytes().to_vec().into(),
                feature_level: founding.feature_level,
                voters: founding.voters.iter().map(show_place).collect(),
            })
        });
        let removed = self.removed_directories().map(|(directory, broker)| show_removed(broker, directory));
        let brokers = self.brokers().flat_map(|broker| {
            let fenced = broker.fenced.then(|| show_fenced(broker.id, true));
            let draining = broker.draining.then(|| show_draining(broker.id, true));
            [Some(show_broker(broker)), fenced, draining].into_iter().flatten()
        });
        let metadata = self.partition(METADATA_PARTITION).map(|entry| {
            Kind::PartitionReassigned(PartitionReassigned {
                topic_id: show_topic(METADATA_TOPIC_ID),
                partition: METADATA_PARTITION.partition.get(),
                assignment: Some(self.show_entry(entry)),
            })
        });
        let topics = self.topics().filter(|topic| topic.id != METADATA_TOPIC_ID).map(|topic| {
            Kind::TopicCreated(TopicCreated {
                topic_id: show_topic(topic.id),
                name: topic.name.clone(),
                replication_factor: topic.replication_factor as i32,
                configs: show_configs(&topic.overrides),
                partitions: topic.partitions.iter().map(|entry| self.show_entry(entry)).collect(),
            })
        });
        founding
            .into_iter()
            .chain(removed)
            .chain(brokers)
            .chain(metadata)
            .chain(topics)
            .map(|record| MetadataRecord { record: Some(record) })
            .collect()
    }

    /// As in a checkpoint: with the leader, and without the directories that the brokers have said.
    fn show_entry(&self, entry: &PartitionEntry) -> PartitionAssignment {
        let place = |place: &Place| {
            let broker = self.broker(place.broker);
            let is_known = broker.is_some_and(|broker| broker.directory == place.directory);
            ReplicaPlace {
                broker_id: place.broker.get(),
                directory_id: if is_known { Bytes::new() } else { place.directory.to_bytes().to_vec().into() },
                replica_id: place.replica.get(),
            }
        };
        let mut shown = show_assignment_with(&entry.assignment(), place);
        shown.leader = entry
            .leader()
            .map(|leader| PartitionLeadership { broker_id: leader.broker.get(), leader_epoch: leader.epoch.get() });
        shown
    }

    pub(super) fn parse_place(&self, place: &ReplicaPlace, at: Offset) -> Result<Place, Error> {
        let broker = BrokerId::new(place.broker_id);
        let directory = if place.directory_id.is_empty() {
            self.broker(broker).map(|broker| broker.directory)
        } else {
            DirectoryId::from_slice(&place.directory_id)
        };
        Ok(Place {
            broker,
            directory: directory.ok_or_else(|| malformed(at, "directory_id"))?,
            replica: ReplicaId::new(place.replica_id),
        })
    }

    pub(super) fn parse_entry(&self, shown: &PartitionAssignment, at: Offset) -> Result<PartitionEntry, Error> {
        let places = |places: &[ReplicaPlace]| {
            places.iter().map(|place| self.parse_place(place, at)).collect::<Result<Vec<_>, Error>>()
        };
        let ids = |ids: &[u64]| ids.iter().copied().map(ReplicaId::new).collect::<Vec<_>>();
        let founders = if shown.founders.is_empty() && !shown.founders_gone {
            Founders::Replicas
        } else {
            Founders::These(ids(&shown.founders))
        };
        let recovered = (shown.recovered_replica != 0).then(|| Recovered {
            replica: ReplicaId::new(shown.recovered_replica),
            from: ReplicaId::new(shown.recovered_from),
        });
        let assignment = Assignment {
            replicas: places(&shown.replicas)?,
            founders,
            leaving: places(&shown.leaving)?,
            before: ids(&shown.before),
            may_remove: shown.may_remove,
            recovered,
        };
        let leader = shown.leader.map(|leader| Leader {
            broker: BrokerId::new(leader.broker_id),
            epoch: LeaderEpoch::new(leader.leader_epoch),
        });
        Ok(PartitionEntry::new(assignment).with_leader(leader))
    }

    pub(super) fn parse_recovery(&self, shown: &PartitionRecovered, at: Offset) -> Result<Recovery, Error> {
        let survivor = shown.survivor.as_ref().ok_or_else(|| malformed(at, "survivor"))?;
        let given_up = shown.given_up.iter().map(|place| self.parse_place(place, at));
        Ok(Recovery {
            tp: parse_partition(&shown.topic_id, shown.partition, at)?,
            survivor: self.parse_place(survivor, at)?,
            given_up: given_up.collect::<Result<Vec<_>, Error>>()?,
            at: Timestamp::new(shown.at),
            reason: shown.reason.clone(),
        })
    }
}

pub(super) fn show_topic(topic: TopicId) -> Bytes {
    topic.to_bytes().to_vec().into()
}

pub(super) fn show_place(place: &Place) -> ReplicaPlace {
    ReplicaPlace {
        broker_id: place.broker.get(),
        directory_id: place.directory.to_bytes().to_vec().into(),
        replica_id: place.replica.get(),
    }
}

pub(super) fn show_assignment(assignment: &Assignment) -> PartitionAssignment {
    show_assignment_with(assignment, show_place)
}

fn show_assignment_with(assignment: &Assignment, place: impl Fn(&Place) -> ReplicaPlace) -> PartitionAssignment {
    let ids = |ids: &[ReplicaId]| ids.iter().map(|replica| replica.get()).collect::<Vec<_>>();
    let (founders, founders_gone) = match &assignment.founders {
        Founders::Replicas => (Vec::new(), false),
        Founders::These(founders) => (ids(founders), founders.is_empty()),
    };
    PartitionAssignment {
        replicas: assignment.replicas.iter().map(&place).collect(),
        founders,
        leaving: assignment.leaving.iter().map(&place).collect(),
        may_remove: assignment.may_remove,
        founders_gone,
        before: ids(&assignment.before),
        recovered_replica: assignment.recovered.map_or(0, |recovered| recovered.replica.get()),
        recovered_from: assignment.recovered.map_or(0, |recovered| recovered.from.get()),
        leader: None,
    }
}

pub(super) fn show_reassigned(tp: TopicPartition, assignment: &Assignment) -> Kind {
    Kind::PartitionReassigned(PartitionReassigned {
        topic_id: show_topic(tp.topic),
        partition: tp.partition.get(),
        assignment: Some(show_assignment(assignment)),
    })
}

/// Without what came of it: the table has that elsewhere.
pub(super) fn show_recovery(recovery: &Recovery) -> PartitionRecovered {
    PartitionRecovered {
        topic_id: show_topic(recovery.tp.topic),
        partition: recovery.tp.partition.get(),
        survivor: Some(show_place(&recovery.survivor)),
        given_up: recovery.given_up.iter().map(show_place).collect(),
        at: recovery.at.get(),
        reason: recovery.reason.clone(),
        assignment: None,
    }
}

pub(super) fn show_broker(broker: &BrokerEntry) -> Kind {
    Kind::BrokerRegistered(BrokerRegistered {
        broker_id: broker.id.get(),
        directory_id: broker.directory.to_bytes().to_vec().into(),
        client_address: broker.client_address.clone(),
        peer_address: broker.peer_address.clone(),
        rack: broker.rack.clone(),
        version: broker.version.clone(),
        metadata_replica_id: broker.metadata_replica.get(),
        incarnation: broker.incarnation,
        feature_level: broker.feature_level,
    })
}

pub(super) fn show_fenced(broker: BrokerId, fenced: bool) -> Kind {
    Kind::BrokerFenced(BrokerFenced { broker_id: broker.get(), fenced })
}

pub(super) fn show_draining(broker: BrokerId, draining: bool) -> Kind {
    Kind::BrokerDraining(BrokerDraining { broker_id: broker.get(), draining })
}

pub(super) fn show_removed(broker: BrokerId, directory: DirectoryId) -> Kind {
    Kind::BrokerRemoved(BrokerRemoved { broker_id: broker.get(), directory_id: directory.to_bytes().to_vec().into() })
}

pub(super) fn show_configs(configs: &TopicOverrides) -> Vec<TopicConfigValue> {
    configs.iter().map(|(key, value)| TopicConfigValue { key: key.clone(), value: value.clone() }).collect()
}

pub(super) fn parse_topic(id: &[u8], at: Offset) -> Result<TopicId, Error> {
    TopicId::from_slice(id).ok_or_else(|| malformed(at, "topic_id"))
}

pub(super) fn parse_partition(topic: &[u8], partition: i32, at: Offset) -> Result<TopicPartition, Error> {
    Ok(TopicPartition { topic: parse_topic(topic, at)?, partition: PartitionId::new(partition) })
}

pub(super) fn malformed(at: Offset, field: &str) -> Error {
    Error::new(
        ErrorCode::CorruptLog,
        format!("the metadata record at offset {at} has a malformed {field}; start a release that can read it"),
    )
}

pub(super) fn contradiction(at: Offset, what: &str) -> Error {
    Error::new(
        ErrorCode::CorruptLog,
        format!(
            "the metadata record at offset {at} contradicts what is before it: {what}; keep the directory as it is and \
             report this"
        ),
    )
}
