//! What the cluster looks like: brokers, topics, who leads and who follows. Pure: updates in, a snapshot out.
//!
//! Updates come from several brokers, and not in order: from the one that is watched, from another that is watched after
//! it, from whoever was asked because the watched one seemed to be behind. Two numbers tell old from new. The metadata
//! offset orders everything but leaders; a leader's epoch orders the leaders of one partition, which brokers know from
//! one another sooner than from the metadata's log.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::pb;

use crate::address::ServerAddress;
use crate::error::Error;

/// One topic as last heard of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TopicInfo {
    pub(crate) name: Arc<str>,
    /// 16 bytes, as on the wire.
    pub(crate) id: Bytes,
    /// Leader of each partition, by its number; `None` where there is none now.
    pub(crate) leaders: Vec<Option<i32>>,
    /// The epochs of these leaders.
    epochs: Vec<i32>,
    /// Brokers that are alive and hold a replica, of each partition.
    alive: Vec<Box<[i32]>>,
    pub(crate) internal: bool,
}

impl TopicInfo {
    pub(crate) fn partition_count(&self) -> i32 {
        i32::try_from(self.leaders.len()).unwrap_or(i32::MAX)
    }

    pub(crate) fn from_pb(topic: &pb::TopicMetadata) -> Self {
        let count = topic.partitions.len();
        let mut info = Self {
            name: Arc::from(topic.name.as_str()),
            id: topic.topic_id.clone(),
            leaders: vec![None; count],
            epochs: vec![-1; count],
            alive: vec![Box::default(); count],
            internal: topic.internal,
        };
        for partition in &topic.partitions {
            let place = usize::try_from(partition.partition).ok().filter(|number| *number < count);
            if let Some(place) = place {
                info.leaders[place] = (partition.leader_id >= 0).then_some(partition.leader_id);
                info.epochs[place] = partition.leader_epoch;
                info.alive[place] = partition.alive.clone().into();
            }
        }
        info
    }

    /// Whether the other knows of a leader of a later epoch.
    fn is_behind(&self, other: &Self) -> bool {
        self.id == other.id && self.epochs.iter().zip(&other.epochs).any(|(ours, theirs)| theirs > ours)
    }

    /// Takes over every leader of a later epoch than ours.
    fn heed_later_leaders(&mut self, other: &Self) {
        if self.id == other.id {
            for (number, epoch) in self.epochs.iter_mut().enumerate().take(other.epochs.len()) {
                if other.epochs[number] > *epoch {
                    *epoch = other.epochs[number];
                    self.leaders[number] = other.leaders[number];
                }
            }
        }
    }
}

/// One broker as last heard of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BrokerInfo {
    pub(crate) address: ServerAddress,
    /// Empty where not set.
    pub(crate) rack: Arc<str>,
}

/// Who leads a partition, as a broker said that does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hint {
    number: usize,
    broker: i32,
    address: ServerAddress,
}

/// The cluster at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) cluster_id: String,
    pub(crate) controller: Option<i32>,
    pub(crate) brokers: HashMap<i32, BrokerInfo>,
    topics: HashMap<Arc<str>, Arc<TopicInfo>>,
    metadata_offset: i64,
    metadata_recovery: i64,
    /// Topics that were asked for by name, and the metadata offset of the answer: the watch may be behind it, and does
    /// not know them then.
    ahead: HashMap<Arc<str>, i64>,
}

impl Snapshot {
    pub(crate) fn topic(&self, name: &str) -> Option<&Arc<TopicInfo>> {
        self.topics.get(name)
    }

    pub(crate) fn leader(&self, topic: &str, partition: i32) -> Option<i32> {
        let topic = self.topics.get(topic)?;
        *topic.leaders.get(usize::try_from(partition).ok()?)?
    }

    pub(crate) fn address(&self, broker: i32) -> Option<&ServerAddress> {
        self.brokers.get(&broker).map(|broker| &broker.address)
    }

    /// The broker in this rack from which to read a partition: its leader if that one is there, else one of the replicas
    /// that are, partitions spread over them. Those that `avoided` says are passed over. `None`: the leader will do.
    pub(crate) fn nearest(
        &self,
        topic: &str,
        partition: i32,
        rack: &str,
        avoided: impl Fn(i32) -> bool,
    ) -> Option<i32> {
        let info = self.topics.get(topic)?;
        let number = usize::try_from(partition).ok()?;
        let near =
            |broker: &i32| self.brokers.get(broker).is_some_and(|known| &*known.rack == rack) && !avoided(*broker);
        let leader = info.leaders.get(number).copied().flatten();
        if let Some(leader) = leader.filter(near) {
            return Some(leader);
        }
        let there: Vec<i32> = info.alive.get(number)?.iter().copied().filter(near).collect();
        there.get(number % there.len().max(1)).copied()
    }

    /// Takes in an update of the watch; `whole` replaces everything.
    ///
    /// A broker that is behind what is known says nothing new but, perhaps, who leads.
    pub(crate) fn apply(&mut self, update: &pb::MetadataResponse, deleted: &[Bytes], whole: bool) {
        let same_cluster = self.cluster_id == update.cluster_id;
        if same_cluster && reach(update) < (self.metadata_recovery, self.metadata_offset) {
            self.heed_leaders(update);
            return;
        }
        // What was known of a history that was given up was given up with it: everything is told anew.
        let same_history = same_cluster && self.metadata_recovery == update.metadata_recovery;
        let whole = whole || !same_history;
        self.ahead.retain(|_, known_at| same_history && *known_at > update.metadata_offset);
        let mut before = HashMap::new();
        if whole {
            let (kept, gone) =
                std::mem::take(&mut self.topics).into_iter().partition(|(name, _)| self.ahead.contains_key(name));
            self.topics = kept;
            if same_cluster {
                before = gone;
            }
            self.cluster_id.clone_from(&update.cluster_id);
        }
        (self.metadata_recovery, self.metadata_offset) = reach(update);
        self.controller = (update.controller_id >= 0).then_some(update.controller_id);
        if !update.brokers.is_empty() {
            self.brokers = brokers(&update.brokers).collect();
        }
        if !deleted.is_empty() {
            self.topics.retain(|_, topic| !deleted.contains(&topic.id));
        }
        for topic in update.topics.iter().filter(|topic| topic.error.is_none()) {
            let mut info = TopicInfo::from_pb(topic);
            if let Some(known) = self.topics.get(&info.name).or_else(|| before.get(&info.name)) {
                info.heed_later_leaders(known);
            }
            self.topics.insert(info.name.clone(), Arc::new(info));
        }
    }

    /// Takes in the answer to a question for topics by name, from any broker. Tells whether it knew of another leader than
    /// we did, or that a topic is gone.
    pub(crate) fn learn(&mut self, answer: &pb::MetadataResponse) -> bool {
        if self.cluster_id != answer.cluster_id {
            return false;
        }
        for (id, broker) in brokers(&answer.brokers) {
            self.brokers.entry(id).or_insert(broker);
        }
        if reach(answer) < (self.metadata_recovery, self.metadata_offset) {
            let mut news = self.heed_leaders(answer);
            // A topic that we forgot is better known late than not at all: who uses it learns what became of it.
            for topic in answer.topics.iter().filter(|topic| topic.error.is_none()) {
                if !self.topics.contains_key(topic.name.as_str()) {
                    let info = TopicInfo::from_pb(topic);
                    self.topics.insert(info.name.clone(), Arc::new(info));
                    news = true;
                }
            }
            return news;
        }
        let mut news = false;
        for topic in &answer.topics {
            if topic.error.is_some() {
                let heard_later = self.ahead.get(topic.name.as_str()).is_some_and(|at| *at > answer.metadata_offset);
                news |= !heard_later && self.topics.remove(topic.name.as_str()).is_some();
                continue;
            }
            let mut info = TopicInfo::from_pb(topic);
            match self.topics.get(&info.name) {
                Some(known) => {
                    info.heed_later_leaders(known);
                    news |= info.leaders != known.leaders || info.id != known.id;
                }
                None => news = true,
            }
            // Of another history nothing is known ahead: the watch brings all of that.
            if answer.metadata_recovery == self.metadata_recovery && answer.metadata_offset > self.metadata_offset {
                self.ahead.insert(info.name.clone(), answer.metadata_offset);
            }
            self.topics.insert(info.name.clone(), Arc::new(info));
        }
        news
    }

    /// Takes in a topic that was created just now: ahead of what any other broker has told.
    pub(crate) fn know_created(&mut self, topic: &pb::TopicDescription) {
        let partitions = topic.partitions.iter().map(|partition| pb::PartitionMetadata {
            partition: partition.partition,
            leader_id: partition.leader_id,
            leader_epoch: partition.leader_epoch,
            replicas: partition.replicas.clone(),
            alive: partition.replicas.clone(),
        });
        let told = pb::TopicMetadata {
            name: topic.name.clone(),
            topic_id: topic.topic_id.clone(),
            partitions: partitions.collect(),
            internal: topic.internal,
            error: None,
        };
        let mut info = TopicInfo::from_pb(&told);
        if let Some(known) = self.topics.get(&info.name) {
            info.heed_later_leaders(known);
        }
        self.ahead.insert(info.name.clone(), self.metadata_offset.saturating_add(1));
        self.topics.insert(info.name.clone(), Arc::new(info));
    }

    /// Of an answer that is behind what is known, only leaders of later epochs count.
    fn heed_leaders(&mut self, answer: &pb::MetadataResponse) -> bool {
        let mut heeded = false;
        for topic in answer.topics.iter().filter(|topic| topic.error.is_none()) {
            let told = TopicInfo::from_pb(topic);
            if let Some(known) = self.topics.get_mut(&told.name).filter(|known| known.is_behind(&told)) {
                Arc::make_mut(known).heed_later_leaders(&told);
                heeded = true;
            }
        }
        heeded
    }

    /// What a broker's word for who leads would change: the partition's place and the leader; `None` where it is known,
    /// or the address of that broker is not.
    pub(crate) fn heeds_hint(&self, topic: &str, partition: i32, error: &Error) -> Option<Hint> {
        let (broker, address) = error.leader_hint().filter(|(broker, _)| *broker >= 0)?;
        let leaders = &self.topics.get(topic)?.leaders;
        let number = usize::try_from(partition).ok().filter(|number| *number < leaders.len())?;
        let address = ServerAddress::parse(address).ok().or_else(|| self.address(broker).cloned())?;
        (leaders[number] != Some(broker)).then_some(Hint { number, broker, address })
    }

    /// Takes a broker's word for who leads. It did not say since which epoch: what comes next from the metadata counts
    /// more.
    pub(crate) fn heed_hint(&mut self, topic: &str, hint: Hint) {
        let Hint { number, broker, address } = hint;
        let rack = self.brokers.get(&broker).map_or_else(|| Arc::from(""), |known| known.rack.clone());
        self.brokers.insert(broker, BrokerInfo { address, rack });
        if let Some(info) = self.topics.get_mut(topic) {
            Arc::make_mut(info).leaders[number] = Some(broker);
        }
    }

    pub(crate) fn forget(&mut self, name: &str) {
        self.topics.remove(name);
    }

    pub(crate) fn forget_ids(&mut self, deleted: &[Bytes]) {
        self.topics.retain(|_, topic| !deleted.contains(&topic.id));
    }
}

/// How far an answer's metadata is: a later recovery goes before whatever was committed earlier.
fn reach(told: &pb::MetadataResponse) -> (i64, i64) {
    (told.metadata_recovery, told.metadata_offset)
}

fn brokers(list: &[pb::Broker]) -> impl Iterator<Item = (i32, BrokerInfo)> {
    list.iter().filter_map(|broker| {
        let address = ServerAddress::parse(&broker.address).ok()?;
        Some((broker.id, BrokerInfo { address, rack: Arc::from(broker.rack.as_str()) }))
    })
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::{BrokerId, ErrorCode};

    use super::*;

    /// Partitions led by these brokers since epoch 1, each on brokers 1 to 3.
    fn topic(name: &str, id: u8, leaders: &[i32]) -> pb::TopicMetadata {
        led_since(name, id, &leaders.iter().map(|leader| (*leader, 1)).collect::<Vec<_>>())
    }

    /// Partitions with leader and epoch.
    fn led_since(name: &str, id: u8, leaders: &[(i32, i32)]) -> pb::TopicMetadata {
        let partitions = leaders.iter().zip(0..).map(|((leader, epoch), partition)| pb::PartitionMetadata {
            partition,
            leader_id: *leader,
            leader_epoch: *epoch,
            replicas: vec![1, 2, 3],
            alive: vec![1, 2, 3],
        });
        pb::TopicMetadata {
            name: name.into(),
            topic_id: Bytes::copy_from_slice(&[id; 16]),
            partitions: partitions.collect(),
            internal: false,
            error: None,
        }
    }

    fn broker(id: i32, rack: &str) -> pb::Broker {
        pb::Broker { id, address: format!("127.0.0.1:{}", 7000 + id), rack: rack.into(), ..Default::default() }
    }

    fn update(offset: i64, topics: Vec<pb::TopicMetadata>) -> pb::MetadataResponse {
        pb::MetadataResponse {
            cluster_id: "c".into(),
            brokers: vec![broker(1, "a"), broker(2, "b"), broker(3, "b")],
            controller_id: 1,
            topics,
            metadata_offset: offset,
            metadata_recovery: 0,
        }
    }

    fn knowing(update: &pb::MetadataResponse) -> Snapshot {
        let mut snapshot = Snapshot::default();
        snapshot.apply(update, &[], true);
        snapshot
    }

    #[test]
    fn a_metadata_that_was_recovered_replaces_a_longer_one() {
        let mut snapshot = knowing(&update(500, vec![topic("lost", 1, &[1]), topic("kept", 2, &[1])]));
        let recovered = pb::MetadataResponse { metadata_recovery: 7, ..update(450, vec![topic("kept", 2, &[2])]) };
        snapshot.apply(&recovered, &[], false);
        assert!(snapshot.topic("lost").is_none() && snapshot.topic("kept").is_some());
        // A broker that has not heard of it says nothing new.
        snapshot.apply(&update(501, vec![topic("lost", 1, &[1])]), &[], false);
        assert!(snapshot.topic("lost").is_none());
    }

    #[test]
    fn a_whole_update_replaces_and_a_part_adds() {
        let mut snapshot = knowing(&update(5, vec![topic("a", 1, &[1, -1]), topic("b", 2, &[1])]));
        assert_eq!((snapshot.leader("a", 0), snapshot.leader("a", 1), snapshot.leader("a", 2)), (Some(1), None, None));
        snapshot.apply(&update(6, vec![topic("a", 1, &[2, 2])]), &[Bytes::copy_from_slice(&[2; 16])], false);
        assert_eq!(snapshot.leader("a", 1), Some(2));
        assert!(snapshot.topic("b").is_none());
        snapshot.apply(&update(7, vec![topic("c", 3, &[1])]), &[], true);
        assert!(snapshot.topic("a").is_none() && snapshot.topic("c").is_some());
    }

    #[test]
    fn a_topic_asked_for_by_name_outlives_a_watch_that_is_behind() {
        let mut snapshot = knowing(&update(5, vec![]));
        assert!(snapshot.learn(&update(8, vec![topic("new", 3, &[1])])));
        snapshot.apply(&update(7, vec![]), &[], true);
        assert!(snapshot.topic("new").is_some(), "the watch is behind the answer");
        snapshot.apply(&update(8, vec![]), &[], true);
        assert!(snapshot.topic("new").is_none(), "the watch knows better");
    }

    #[test]
    fn a_topic_that_was_created_just_now_is_known() {
        let mut snapshot = knowing(&update(5, vec![]));
        let partition = pb::PartitionDescription { leader_id: -1, replicas: vec![1, 2], ..Default::default() };
        let described = pb::TopicDescription { name: "new".into(), partitions: vec![partition], ..Default::default() };
        snapshot.know_created(&described);
        assert_eq!(snapshot.topic("new").map(|topic| topic.partition_count()), Some(1));
        // A broker that has not heard of it yet does not undo it; the leader comes later.
        snapshot.apply(&update(5, vec![]), &[], true);
        let mut led = led_since("new", 0, &[(2, 1)]);
        led.topic_id = Bytes::new();
        snapshot.apply(&update(6, vec![led]), &[], false);
        assert_eq!(snapshot.leader("new", 0), Some(2));
    }

    #[test]
    fn a_broker_that_is_behind_changes_nothing() {
        let mut snapshot = knowing(&update(9, vec![topic("a", 1, &[1])]));
        snapshot.apply(&update(4, vec![]), &[], true);
        assert!(snapshot.topic("a").is_some());
        // Another cluster at the same address starts anew, however small its offsets.
        let other = pb::MetadataResponse { cluster_id: "other".into(), ..update(1, vec![]) };
        snapshot.apply(&other, &[], true);
        assert!(snapshot.topic("a").is_none());
    }

    #[test]
    fn a_leader_of_a_later_epoch_counts_whoever_tells_of_it_and_when() {
        let mut snapshot = knowing(&update(9, vec![led_since("a", 1, &[(1, 5), (2, 5)])]));
        // A broker that is behind in the log knows of an election all the same.
        snapshot.apply(&update(4, vec![led_since("a", 1, &[(3, 6), (3, 4)])]), &[], true);
        assert_eq!((snapshot.leader("a", 0), snapshot.leader("a", 1)), (Some(3), Some(2)));
        // One that is ahead in the log, but has not heard of it, does not undo it; in parts or whole.
        for (offset, whole) in [(10, false), (11, true)] {
            snapshot.apply(&update(offset, vec![led_since("a", 1, &[(1, 5), (1, 6)])]), &[], whole);
            assert_eq!((snapshot.leader("a", 0), snapshot.leader("a", 1)), (Some(3), Some(1)), "{whole}");
        }
        // The same epoch without a leader: it is gone.
        snapshot.apply(&update(12, vec![led_since("a", 1, &[(-1, 6), (1, 6)])]), &[], false);
        assert_eq!(snapshot.leader("a", 0), None);
        // The topic made anew begins its epochs anew.
        snapshot.apply(&update(13, vec![led_since("a", 2, &[(2, 1)])]), &[], false);
        assert_eq!(snapshot.leader("a", 0), Some(2));
    }

    #[test]
    fn whoever_is_asked_by_name_tells_news_or_none() {
        let mut snapshot = knowing(&update(9, vec![led_since("a", 1, &[(1, 5)]), topic("b", 2, &[1])]));
        assert!(!snapshot.learn(&update(9, vec![led_since("a", 1, &[(1, 5)])])));
        assert!(!snapshot.learn(&update(12, vec![led_since("a", 1, &[(2, 4)])])), "an older epoch");
        assert!(snapshot.learn(&update(3, vec![led_since("a", 1, &[(2, 6)])])), "behind, but with a later epoch");
        assert_eq!(snapshot.leader("a", 0), Some(2));
        let error = flowstone_protocol::Error::new(ErrorCode::UnknownTopic, "gone").to_detail();
        let gone = pb::TopicMetadata { name: "b".into(), error: Some(error), ..Default::default() };
        assert!(!snapshot.learn(&update(8, vec![gone.clone()])), "it may not have heard of it yet");
        assert!(snapshot.topic("b").is_some());
        assert!(snapshot.learn(&update(10, vec![gone])));
        assert!(snapshot.topic("b").is_none());
        let other = pb::MetadataResponse { cluster_id: "other".into(), ..update(99, vec![topic("x", 7, &[1])]) };
        assert!(!snapshot.learn(&other) && snapshot.topic("x").is_none());
    }

    #[test]
    fn a_hint_moves_one_leader() {
        let mut snapshot = knowing(&update(1, vec![topic("a", 1, &[1, 1])]));
        let hint = |broker, address: &str| {
            let error = flowstone_protocol::Error::new(ErrorCode::NotLeader, "no");
            Error::from(error.with_leader(BrokerId::new(broker), address))
        };
        let mut heed = |partition, error: Error| {
            let hint = snapshot.heeds_hint("a", partition, &error);
            let heeds = hint.is_some();
            hint.into_iter().for_each(|hint| snapshot.heed_hint("a", hint));
            heeds
        };
        assert!(heed(1, hint(7, "h:1")));
        assert!(!heed(1, hint(7, "h:1")), "known");
        assert!(!heed(9, hint(7, "h:1")), "no such partition");
        assert!(!heed(0, hint(8, "")), "nobody knows where that is");
        assert!(heed(0, hint(2, "")), "this one is known");
        assert_eq!((snapshot.leader("a", 0), snapshot.leader("a", 1)), (Some(2), Some(7)));
        assert_eq!(snapshot.address(7).unwrap().to_string(), "h:1");
    }

    #[test]
    fn the_nearest_replica_is_in_the_same_rack_and_alive() {
        let mut partitions = led_since("a", 1, &[(1, 1), (1, 1), (2, 1), (-1, 1)]);
        partitions.partitions[1].alive = vec![1, 3];
        let snapshot = knowing(&update(1, vec![partitions]));
        let nearest = |partition, rack| snapshot.nearest("a", partition, rack, |_| false);
        assert_eq!(nearest(0, "a"), Some(1), "the leader itself");
        assert_eq!([nearest(0, "b"), nearest(1, "b")], [Some(2), Some(3)], "only 3 holds the second and lives");
        assert_eq!(nearest(2, "b"), Some(2), "the leader is there");
        assert_eq!(nearest(3, "b"), Some(3), "no leader is needed; spread by number");
        assert_eq!([nearest(0, "c"), nearest(9, "b")], [None, None]);
        assert_eq!(snapshot.nearest("a", 0, "b", |broker| broker == 2), Some(3));
        assert_eq!(snapshot.nearest("a", 0, "b", |_| true), None);
    }
}
