//! Partitions: where their replicas go, how far that is, who leads, and what happens when replicas are lost.

use flowstone_protocol::internal::metadata_record::Record as Kind;
use flowstone_protocol::internal::{LeadersChanged, PartitionLeader, PartitionRecovered};
use flowstone_protocol::{BrokerId, Error, ErrorCode, ReplicaId, Timestamp, TopicPartition};

use super::super::change::{Assignment, NotCancelled, PartitionEntry};
use super::super::placement::{Draws, Placement};
use super::super::records::{show_assignment, show_reassigned, show_recovery, show_topic};
use super::super::table::{BrokerEntry, METADATA_PARTITION, MetadataTable, Place, Recovery, Topic};
use super::brokers::with_metadata_replica;
use super::{
    Decided, Leadership, MetadataReply, MovePartition, MoveProgress, PlannedMove, RecoverPartition, unknown_broker,
    unknown_partition, unknown_topic,
};
use crate::topic_config::TopicConfig;

/// Rows of one record: below 40 KiB.
const LEADERS_PER_RECORD_MAX: usize = 1_000;

/// A replica for `broker` that never was. The metadata's observers become its voters under the id that they have; where a
/// broker needs another one of those, it is registered with it.
pub(super) fn fresh_place(
    table: &MetadataTable,
    tp: TopicPartition,
    broker: &BrokerEntry,
    draws: &mut Draws,
) -> (Place, Vec<Kind>) {
    let place = |replica: ReplicaId| Place { broker: broker.id, directory: broker.directory, replica };
    if tp != METADATA_PARTITION {
        return (place(draws.replica()), Vec::new());
    }
    let is_member = table.partition(tp).is_some_and(|entry| entry.place(broker.metadata_replica).is_some());
    if is_member || broker.metadata_replica.get() == 0 {
        let replica = draws.replica();
        return (place(replica), with_metadata_replica(broker, replica));
    }
    (place(broker.metadata_replica), Vec::new())
}

pub(super) fn planned(topic: &Topic, tp: TopicPartition, from: &PartitionEntry, to: &[Place]) -> PlannedMove {
    let brokers = |places: &[Place]| places.iter().map(|place| place.broker).collect();
    PlannedMove { topic: topic.name.clone(), tp, from: brokers(from.replicas()), to: brokers(to) }
}

fn find<'a>(
    table: &'a MetadataTable,
    name: &str,
    partition: i32,
) -> Result<(&'a Topic, TopicPartition, &'a PartitionEntry), Error> {
    let topic = table.topic_named(name).ok_or_else(|| unknown_topic(name))?;
    let tp = TopicPartition { topic: topic.id, partition: partition.into() };
    let entry = topic.partition(tp.partition).ok_or_else(|| unknown_partition(topic, partition))?;
    Ok((topic, tp, entry))
}

pub(super) fn move_to(table: &MetadataTable, wanted: &MovePartition) -> Result<Decided, Error> {
    let (topic, tp, entry) = find(table, &wanted.topic, wanted.partition)?;
    let in_partition = |error: Error| error.with_topic(topic.name.as_str()).with_partition(tp.partition);
    let refuse = |text: String| Err(in_partition(Error::new(ErrorCode::InvalidRequest, text)));
    if wanted.brokers.is_empty() {
        return refuse("a partition needs at least one replica; name the brokers that shall hold it".to_owned());
    }
    for (order, broker) in wanted.brokers.iter().enumerate() {
        if wanted.brokers[..order].contains(broker) {
            return refuse(format!("broker {broker} is named twice, and holds at most one replica; name it once"));
        }
        let known = table.broker(*broker).ok_or_else(|| in_partition(unknown_broker(table, *broker)))?;
        let has_it = entry.replicas().iter().any(|place| place.broker == *broker);
        if !has_it && !known.takes_replicas() {
            let (why, remedy) = match known.fenced {
                true => ("down", "start it"),
                false => ("draining", "stop draining it"),
            };
            return refuse(format!("broker {broker} is {why} and takes no replicas; {remedy}, or name another one"));
        }
    }
    if entry.is_changing() {
        return refuse(format!(
            "topic `{}` partition {} is being moved already; wait until that is done, or cancel it: flowstone partition \
             cancel-move {} {}",
            topic.name, tp.partition, topic.name, tp.partition
        ));
    }
    let rules = table.rules();
    TopicConfig::resolve(&rules.topic_defaults, &topic.overrides)
        .and_then(|config| config.check(wanted.brokers.len() as u32, rules.batch_bytes_max))
        .map_err(in_partition)?;

    let (mut draws, mut records) = (Draws::from_seed(wanted.seed), Vec::new());
    let mut places = Vec::with_capacity(wanted.brokers.len());
    for broker in &wanted.brokers {
        match entry.replicas().iter().find(|place| place.broker == *broker) {
            Some(place) => places.push(*place),
            None => {
                let broker = table.broker(*broker).ok_or_else(|| unknown_broker(table, *broker))?;
                let (fresh, registered) = fresh_place(table, tp, broker, &mut draws);
                places.push(fresh);
                records.extend(registered);
            }
        }
    }
    let moves = vec![planned(topic, tp, entry, &places)];
    if places != entry.replicas() {
        records.push(show_reassigned(tp, &Assignment::moved(entry, places)));
    }
    if wanted.validate_only {
        records.clear();
    }
    Ok((records, MetadataReply::Moves { moves, more: false }))
}

pub(super) fn cancel_move(table: &MetadataTable, name: &str, partition: i32) -> Result<Decided, Error> {
    let (topic, tp, entry) = find(table, name, partition)?;
    let why = match Assignment::cancelled(entry) {
        Ok(next) => return Ok((vec![show_reassigned(tp, &next)], MetadataReply::Done)),
        Err(NotCancelled::AtRest) => {
            "is not being moved: there is nothing to cancel; see what is under way: flowstone partition list --moving"
        }
        Err(NotCancelled::PastReturn) => {
            "is past the point of return: its new replicas have caught up, and old ones are being removed; wait until that \
             is done, then move it back"
        }
    };
    let error = Error::new(ErrorCode::InvalidRequest, format!("topic `{}` partition {partition} {why}", topic.name));
    Err(error.with_topic(topic.name.as_str()).with_partition(tp.partition))
}

pub(super) fn progress(table: &MetadataTable, progress: &MoveProgress) -> Decided {
    let nothing = (Vec::new(), MetadataReply::Done);
    // The topic may be gone by now.
    let Some(entry) = table.partition(progress.tp) else { return nothing };
    let is_of_this_change = super::super::change::ids(entry.replicas()) == progress.wanted;
    let may_remove = progress.may_remove && is_of_this_change;
    let Some(next) = Assignment::progressed(entry, may_remove, &progress.removed) else { return nothing };
    let mut records = vec![show_reassigned(progress.tp, &next)];
    if progress.tp == METADATA_PARTITION {
        // Who votes no more observes, under an id that never was.
        let mut draws = Draws::from_seed(progress.seed);
        let gone = entry.leaving().iter().filter(|place| progress.removed.contains(&place.replica));
        for place in gone {
            let observer = table.broker(place.broker).filter(|broker| broker.metadata_replica == place.replica);
            if let Some(broker) = observer {
                records.extend(with_metadata_replica(broker, draws.replica()));
            }
        }
    }
    (records, MetadataReply::Done)
}

pub(super) fn leaders_changed(table: &MetadataTable, broker: BrokerId, leaders: &[Leadership]) -> Decided {
    let news = leaders.iter().filter(|leadership| {
        table.partition(leadership.tp).is_some_and(|entry| {
            // A replica that was given up may still believe to lead.
            entry.place(leadership.replica).is_some_and(|place| place.broker == broker)
                && entry.leader().is_none_or(|known| known.epoch < leadership.epoch)
        })
    });
    let rows: Vec<PartitionLeader> = news
        .map(|leadership| PartitionLeader {
            topic_id: show_topic(leadership.tp.topic),
            partition: leadership.tp.partition.get(),
            broker_id: broker.get(),
            leader_epoch: leadership.epoch.get(),
        })
        .collect();
    let records = rows.chunks(LEADERS_PER_RECORD_MAX);
    let records = records.map(|rows| Kind::LeadersChanged(LeadersChanged { leaders: rows.to_vec() }));
    (records.collect(), MetadataReply::Done)
}

/// Whether a replica's directory is not that of its broker any more, or its broker has another replica by now: it will
/// not come back.
fn is_gone(table: &MetadataTable, entry: &PartitionEntry, place: &Place) -> bool {
    let is_replaced = entry.leaving().contains(place) && entry.replicas().iter().any(|new| new.broker == place.broker);
    is_replaced || table.broker(place.broker).is_none_or(|broker| broker.directory != place.directory)
}

/// Whether the group can be without `lost` and still decide that another one takes its place.
pub(crate) fn can_replace(table: &MetadataTable, entry: &PartitionEntry, lost: ReplicaId) -> bool {
    let is_whole = |voter: &&Place| voter.replica != lost && !is_gone(table, entry, voter);
    // One that has not voted yet counts in no majority.
    let voters = entry.voters();
    let votes = voters.iter().any(|voter| voter.replica == lost);
    if !votes || voters.iter().filter(is_whole).count() > voters.len() / 2 {
        return true;
    }
    // The group may be smaller than what is wanted of it: of replicas that were added, only its leader knows which ones
    // vote by now. Where it has one, that one decides; should it have lost its majority, nothing is done and nothing harmed.
    let leads = |place: &&Place| {
        let lives = table.broker(place.broker).is_some_and(|broker| !broker.fenced);
        lives && entry.leader().is_some_and(|leader| leader.broker == place.broker)
    };
    !entry.has_voted(lost) && entry.places().filter(is_whole).any(|place| leads(&place))
}

pub(super) fn replace(
    table: &MetadataTable,
    tp: TopicPartition,
    replica: ReplicaId,
    seed: u64,
) -> Result<Decided, Error> {
    let nothing = (Vec::new(), MetadataReply::Done);
    let mut draws = Draws::from_seed(seed);
    let Some((topic, entry)) = table.topic(tp.topic).zip(table.partition(tp)) else { return Ok(nothing) };
    let Some(lost) = entry.replicas().iter().find(|place| place.replica == replica) else {
        // On its way out, or replaced already; the metadata's observers are in no partition's replicas.
        let is_observer = tp == METADATA_PARTITION && entry.place(replica).is_none();
        let observer = table.brokers().find(|broker| is_observer && broker.metadata_replica == replica);
        let records = observer.map(|broker| with_metadata_replica(broker, draws.replica())).unwrap_or_default();
        return Ok((records, MetadataReply::Done));
    };
    let broker = table.broker(lost.broker).ok_or_else(|| unknown_broker(table, lost.broker))?;
    if !can_replace(table, entry, replica) {
        let error = Error::new(
            ErrorCode::InvalidRequest,
            format!(
                "topic `{}` partition {}: without the replica on broker {} no majority of its voters is left to decide on \
                 another one; bring the others back, or go on with what one of them has: flowstone partition recover {} {}",
                topic.name, tp.partition, lost.broker, topic.name, tp.partition
            ),
        );
        return Err(error.with_topic(topic.name.as_str()).with_partition(tp.partition));
    }
    let (fresh, mut records) = fresh_place(table, tp, broker, &mut draws);
    records.push(show_reassigned(tp, &Assignment::replaced(entry, *lost, fresh)));
    Ok((records, MetadataReply::Done))
}

pub(super) fn recover(table: &MetadataTable, recover: RecoverPartition, now: Timestamp) -> Result<Decided, Error> {
    let RecoverPartition { tp, survivor, survives_as, known_lost, reason, seed, validate_only } = recover;
    let topic = table.topic(tp.topic).ok_or_else(|| unknown_topic(&tp.topic.to_string()))?;
    let entry = topic.partition(tp.partition).ok_or_else(|| unknown_partition(topic, tp.partition.get()))?;
    let refuse = |text: String| {
        let error = Error::new(ErrorCode::InvalidRequest, text);
        Err(error.with_topic(topic.name.as_str()).with_partition(tp.partition))
    };
    let holders = || {
        let holders: Vec<String> = entry.places().map(|place| place.broker.to_string()).collect();
        holders.join(", ")
    };
    if reason.trim().is_empty() {
        return refuse("a recovery may lose records, and is kept for the record; give the reason for it".to_owned());
    }
    // The metadata's observers have all of it as well.
    let observer = || table.observers().find(|place| tp == METADATA_PARTITION && place.replica == survivor);
    let Some(survived) = entry.place(survivor).copied().or_else(observer) else {
        return refuse(format!(
            "replica {survivor} is none of topic `{}` partition {}; name a broker that has one: {}",
            topic.name,
            tp.partition,
            holders()
        ));
    };
    let host = table.broker(survived.broker).ok_or_else(|| unknown_broker(table, survived.broker))?;
    if host.directory != survived.directory {
        let others: Vec<String> = entry
            .places()
            .filter(|place| !is_gone(table, entry, place))
            .map(|place| place.broker.to_string())
            .collect();
        let remedy = match others.is_empty() {
            true => format!(
                "nothing is left of it: delete the topic and create it again: flowstone topic delete {}",
                topic.name
            ),
            false => format!("name another one of brokers {}", others.join(", ")),
        };
        return refuse(format!(
            "broker {} has another data directory now, and what that replica had is gone; {remedy}",
            host.id
        ));
    }
    // It goes on by now: the table has to follow, whatever it said of brokers before.
    let is_done = survives_as.is_some();
    if host.fenced && !is_done {
        return refuse(format!("broker {} is down, and cannot go on with what it has; start it first", host.id));
    }
    let voters = entry.voters();
    let alive = |voter: &&Place| {
        let lives = table.broker(voter.broker).is_some_and(|broker| !broker.fenced);
        lives && !known_lost.contains(&voter.replica) && !is_gone(table, entry, voter)
    };
    // In the middle of a change the group may be another one than before it: only a majority of each that it can be is
    // one for certain.
    let majority_lives =
        entry.electorates().iter().all(|voters| voters.iter().filter(alive).count() > voters.len() / 2);
    let alive: Vec<String> = voters.iter().filter(alive).map(|voter| voter.broker.to_string()).collect();
    if majority_lives && !is_done {
        return refuse(format!(
            "a majority of topic `{}` partition {} seems to be alive (brokers {}), and recovering would throw away what it \
             has acknowledged; wait until it has a leader, and see what keeps it from that: flowstone cluster health",
            topic.name,
            tp.partition,
            alive.join(", ")
        ));
    }

    let (mut draws, mut placement) = (Draws::from_seed(seed), Placement::of(table));
    let replica = survives_as.unwrap_or_else(|| draws.replica());
    let survives = Place { replica, ..survived };
    let mut brokers = vec![host.id];
    for place in entry.replicas().iter().filter(|place| place.broker != host.id) {
        let is_up = table.broker(place.broker).is_some_and(|broker| broker.takes_replicas());
        let excluded: Vec<BrokerId> = brokers.iter().copied().chain(entry.places().map(|place| place.broker)).collect();
        if is_up {
            brokers.push(place.broker);
        } else if let Some(other) = placement.choose(&brokers, &excluded, false, &mut draws) {
            brokers.push(other.broker);
        } else if table.broker(place.broker).is_some() {
            // Nobody else is there; it begins anew when it is back.
            brokers.push(place.broker);
        }
    }
    let others = brokers[1..].iter().filter_map(|broker| table.broker(*broker)).map(|broker| Place {
        broker: broker.id,
        directory: broker.directory,
        replica: draws.replica(),
    });
    let others: Vec<Place> = others.collect();
    let given_up: Vec<Place> = entry.places().copied().collect();
    let mut records = Vec::new();
    if tp == METADATA_PARTITION {
        // The group knows nobody but the survivor: all others come to it under ids that never were.
        for broker in table.brokers() {
            let place = others.iter().find(|place| place.broker == broker.id);
            let id = match place {
                Some(place) => place.replica,
                None if broker.id == host.id => replica,
                None => draws.replica(),
            };
            records.extend(with_metadata_replica(broker, id));
        }
    }
    let recovery = Recovery { tp, survivor: survives, given_up: given_up.clone(), at: now, reason };
    let assignment = Assignment::recovered(survives, survivor, others);
    records.push(Kind::PartitionRecovered(PartitionRecovered {
        assignment: Some(show_assignment(&assignment)),
        ..show_recovery(&recovery)
    }));
    if validate_only {
        records.clear();
    }
    Ok((records, MetadataReply::Recovered { given_up }))
}
