//! Brokers: they come, fall silent, are emptied, replaced, and go.

use flowstone_protocol::internal::metadata_record::Record as Kind;
use flowstone_protocol::internal::{ClusterFounded, FeatureLevelRaised};
use flowstone_protocol::{BrokerId, ClusterId, Error, ErrorCode, ErrorKind, ReplicaId};

use super::super::balance;
use super::super::change::Assignment;
use super::super::placement::{Draws, Placement};
use super::super::records::{show_broker, show_draining, show_fenced, show_place, show_reassigned, show_removed};
use super::super::table::{BrokerEntry, METADATA_PARTITION, MetadataTable, Place};
use super::partitions::{can_replace, fresh_place, planned};
use super::{Decided, MetadataReply, Registration, ReplaceBroker, unknown_broker};

/// Partitions that one command gives new replicas, and that one answer names: what it writes is one batch.
const PARTITIONS_MAX: usize = 500;

pub(super) fn found(table: &MetadataTable, cluster: ClusterId, voters: &[Place], feature_level: i32) -> Decided {
    if table.founding().is_some() {
        return (Vec::new(), MetadataReply::Done);
    }
    let record = ClusterFounded {
        cluster_id: cluster.to_bytes().to_vec().into(),
        feature_level,
        voters: voters.iter().map(show_place).collect(),
    };
    (vec![Kind::ClusterFounded(record)], MetadataReply::Done)
}

/// The level that the cluster may be raised to: the newest that every broker knows, once all that founded it are there.
pub(crate) fn feature_level_due(table: &MetadataTable) -> Option<i32> {
    let founding = table.founding()?;
    let has_come = |voter: &Place| table.broker(voter.broker).is_some() || table.removed(voter.directory).is_some();
    if !founding.voters.iter().all(has_come) {
        return None;
    }
    let known = table.brokers().map(|broker| broker.feature_level).min()?;
    (known > founding.feature_level).then_some(known)
}

pub(super) fn raise_feature_level(table: &MetadataTable) -> Decided {
    let raised = feature_level_due(table);
    let record = |feature_level| Kind::FeatureLevelRaised(FeatureLevelRaised { feature_level });
    (raised.map(record).into_iter().collect(), MetadataReply::Done)
}

pub(super) fn register(table: &MetadataTable, registration: Registration) -> Result<Decided, Error> {
    let Registration { id, directory, client_address, peer_address, rack, version, incarnation, seed, feature_level } =
        registration;
    let invalid = |text: String| Error::new(ErrorCode::InvalidRequest, text);
    if id.get() < 0 {
        return Err(invalid(format!("node.id {id} is below 0; give this broker one of 0 and above")));
    }
    let needed = table.feature_level();
    if feature_level < needed {
        return Err(invalid(format!(
            "the cluster's feature level is {needed}, and this broker's release knows up to {feature_level}: it could not \
             read the metadata; start it with a newer release"
        )));
    }
    if let Some(removed) = table.removed(directory) {
        return Err(invalid(format!(
            "this data directory (id {directory}) was broker {removed}'s, which was decommissioned; to add this broker, \
             start it with an empty node.data_dir"
        )));
    }
    if let Some(other) = table.brokers().find(|other| other.id != id && other.directory == directory) {
        return Err(invalid(format!(
            "this data directory (id {directory}) is broker {}'s; start this broker with node.id = {}, or with an empty \
             node.data_dir",
            other.id, other.id
        )));
    }
    let known = table.broker(id);
    if let Some(known) = known.filter(|known| known.directory != directory && !known.fenced) {
        let mut error = invalid(format!(
            "node.id {id} is that of a broker at {} with another data directory (id {}), which is alive or was a moment \
             ago; give this broker a node.id of its own, or, if that one is gone for good, wait until its session ends \
             (limits.broker_session_timeout)",
            known.peer_address, known.directory
        ));
        // It may be the same machine with a new disk, back before its silence was noticed.
        error.kind = ErrorKind::Retriable;
        return Err(error);
    }
    let metadata = table.partition(METADATA_PARTITION);
    let voter = metadata
        .and_then(|entry| entry.replicas().iter().find(|place| place.broker == id && place.directory == directory));
    let observer = known.filter(|known| known.directory == directory).map(|known| known.metadata_replica);
    let metadata_replica = voter
        .map(|place| place.replica)
        .or(observer.filter(|replica| replica.get() != 0))
        .unwrap_or_else(|| Draws::from_seed(seed).replica());
    let is_founder = metadata.is_some_and(|entry| entry.is_founder(metadata_replica));
    let reply = MetadataReply::Registered { metadata_replica, is_founder };
    let broker = BrokerEntry {
        id,
        directory,
        client_address,
        peer_address,
        rack,
        version,
        metadata_replica,
        incarnation,
        feature_level,
        fenced: false,
        draining: known.is_some_and(|known| known.draining),
    };
    let records = if known.is_some_and(|known| **known == broker) { Vec::new() } else { vec![show_broker(&broker)] };
    Ok((records, reply))
}

/// The same broker with another replica of the metadata.
pub(super) fn with_metadata_replica(broker: &BrokerEntry, metadata_replica: ReplicaId) -> Vec<Kind> {
    let mut records = vec![show_broker(&BrokerEntry { metadata_replica, ..broker.clone() })];
    if broker.fenced {
        // Registering unfences, and it was not the broker that did so.
        records.push(show_fenced(broker.id, true));
    }
    records
}

pub(super) fn fence(table: &MetadataTable, broker: BrokerId, incarnation: u64, fenced: bool) -> Decided {
    let meant = table.broker(broker).filter(|known| known.incarnation == incarnation && known.fenced != fenced);
    (meant.map(|_| show_fenced(broker, fenced)).into_iter().collect(), MetadataReply::Done)
}

pub(super) fn undo_drain(table: &MetadataTable, broker: BrokerId, validate_only: bool) -> Result<Decided, Error> {
    let known = table.broker(broker).ok_or_else(|| unknown_broker(table, broker))?;
    let records = if known.draining && !validate_only { vec![show_draining(broker, false)] } else { Vec::new() };
    Ok((records, MetadataReply::Moves { moves: Vec::new(), more: false }))
}

pub(super) fn drain(table: &MetadataTable, broker: BrokerId, seed: u64, validate_only: bool) -> Result<Decided, Error> {
    let known = table.broker(broker).ok_or_else(|| unknown_broker(table, broker))?;
    let emptied = balance::emptied(table, broker, usize::MAX, &mut Draws::from_seed(seed));
    if let Some(tp) = emptied.stuck.first() {
        let (topic, entry) =
            table.topic(tp.topic).zip(table.partition(*tp)).ok_or_else(|| unknown_broker(table, broker))?;
        let others: Vec<String> = entry.replicas().iter().map(|place| place.broker.to_string()).collect();
        return Err(Error::new(
            ErrorCode::InvalidRequest,
            format!(
                "broker {broker} cannot be drained: no other broker that is alive and not draining could take its \
                 replica of topic `{}` partition {} (on {}), nor those of {} more partition(s); add a broker, or move the \
                 partition to fewer replicas, first",
                topic.name,
                tp.partition,
                others.join(", "),
                emptied.stuck.len() - 1
            ),
        ));
    }
    let records = if known.draining || validate_only { Vec::new() } else { vec![show_draining(broker, true)] };
    let more = emptied.moves.len() > PARTITIONS_MAX;
    let moves = emptied.moves.into_iter().take(PARTITIONS_MAX).collect();
    Ok((records, MetadataReply::Moves { moves, more }))
}

pub(super) fn decommission(table: &MetadataTable, broker: BrokerId) -> Result<Decided, Error> {
    let known = table.broker(broker).ok_or_else(|| unknown_broker(table, broker))?;
    let load = table.load(broker);
    let left = load.replicas + load.leaving;
    if left > 0 {
        let remedy = match (known.draining, known.fenced) {
            (true, false) => "wait until it is empty".to_owned(),
            (false, false) => format!("drain it first: flowstone broker-admin drain {broker}"),
            (_, true) => format!(
                "it is down: start it again, or give its replicas to another one: flowstone broker-admin replace {broker} \
                 NEW"
            ),
        };
        return Err(Error::new(
            ErrorCode::InvalidRequest,
            format!("broker {broker} still holds {left} replica(s), and forgetting it would lose them; {remedy}"),
        ));
    }
    Ok((vec![show_removed(broker, known.directory)], MetadataReply::Done))
}

pub(super) fn replace(table: &MetadataTable, replace: &ReplaceBroker) -> Result<Decided, Error> {
    let ReplaceBroker { old, new, seed, validate_only } = *replace;
    let refuse = |text: String| Err(Error::new(ErrorCode::InvalidRequest, text));
    let old_broker = table.broker(old).ok_or_else(|| unknown_broker(table, old))?;
    let new_broker = table.broker(new).ok_or_else(|| unknown_broker(table, new))?;
    if old == new {
        return refuse(format!("broker {old} cannot replace itself; name the broker that takes over"));
    }
    if !old_broker.fenced {
        return refuse(format!(
            "broker {old} is alive, or was a moment ago; move its replicas in order: flowstone broker-admin drain {old}"
        ));
    }
    if !new_broker.takes_replicas() {
        let (why, remedy) = match new_broker.fenced {
            true => ("down", "start it"),
            false => ("draining", "stop draining it"),
        };
        return refuse(format!("broker {new} is {why} and takes no replicas; {remedy}, or name another one"));
    }

    let (mut placement, mut draws) = (Placement::of(table), Draws::from_seed(seed));
    let mut records = Vec::new();
    if !old_broker.draining {
        records.push(show_draining(old, true));
    }
    let mut moves = Vec::new();
    let held = table.entries().filter_map(|(topic, tp, entry)| {
        let lost = entry.replicas().iter().find(|place| place.broker == old)?;
        // Nobody could add the new one: its records would only be in the way of a recovery.
        can_replace(table, entry, lost.replica).then_some((topic, tp, entry, *lost))
    });
    let mut held = held.peekable();
    while moves.len() < PARTITIONS_MAX
        && let Some((topic, tp, entry, lost)) = held.next()
    {
        let taken: Vec<BrokerId> = entry.places().map(|place| place.broker).collect();
        let target = if taken.contains(&new) {
            let is_preferred = entry.replicas()[0] == lost;
            placement.choose(&taken, &taken, is_preferred, &mut draws).and_then(|other| table.broker(other.broker))
        } else {
            Some(new_broker)
        };
        let Some(target) = target else {
            return refuse(format!(
                "topic `{}` partition {} has a replica on broker {new} already, and no other broker could take that of \
                 broker {old}; add a broker, or move the partition to fewer replicas",
                topic.name, tp.partition
            ));
        };
        let (fresh, registered) = fresh_place(table, tp, target, &mut draws);
        let next = Assignment::replaced(entry, lost, fresh);
        moves.push(planned(topic, tp, entry, &next.replicas));
        records.extend(registered);
        records.push(show_reassigned(tp, &next));
    }
    let more = held.peek().is_some();
    if validate_only {
        records.clear();
    }
    Ok((records, MetadataReply::Moves { moves, more }))
}
