//! Which brokers hold which replicas: apart in racks first, even within a topic next, even over all in the end.
//!
//! Even within the topic comes before even over all, as a new and empty broker would else be given every partition of the
//! next topic, and all of its load.

use std::collections::{BTreeMap, HashMap};

use flowstone_protocol::{BrokerId, DirectoryId, ReplicaId};

use super::change::Place;
use super::table::{BrokerEntry, MetadataTable, Topic};

/// Random numbers from a seed (splitmix64), so that placement is a function of its arguments.
#[derive(Clone, Debug)]
pub(crate) struct Draws(u64);

impl Draws {
    pub(crate) fn from_seed(seed: u64) -> Self {
        Self(seed)
    }

    /// Never 0, which is no replica id.
    pub(crate) fn next(&mut self) -> u64 {
        loop {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = mix(self.0);
            if mixed != 0 {
                return mixed;
            }
        }
    }

    pub(crate) fn replica(&mut self) -> ReplicaId {
        ReplicaId::new(self.next())
    }
}

fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A broker that may be given replicas, and what it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) broker: BrokerId,
    pub(crate) directory: DirectoryId,
    /// Not heard of for too long: taken only where the others are too few.
    absent: bool,
    rack: usize,
    replicas: u32,
    preferred: u32,
    replicas_here: u32,
    preferred_here: u32,
}

/// Brokers with what they have, while replicas are given to them.
#[derive(Clone, Debug)]
pub(crate) struct Placement {
    candidates: Vec<Candidate>,
    /// Of all brokers, also of those that take nothing.
    racks: HashMap<BrokerId, usize>,
}

impl Placement {
    /// Over all brokers that take replicas, as the table has them.
    pub(crate) fn of(table: &MetadataTable) -> Self {
        Self::over(table, |broker| broker.takes_replicas())
    }

    /// For what is created: brokers that are down for the moment come last. A group is whole without a minority of its
    /// replicas, and creating a topic need not wait until every broker is there.
    pub(crate) fn of_new(table: &MetadataTable) -> Self {
        Self::over(table, |broker| !broker.draining)
    }

    fn over(table: &MetadataTable, takes: impl Fn(&BrokerEntry) -> bool) -> Self {
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut racks = HashMap::new();
        for broker in table.brokers() {
            let next = numbers.len();
            racks.insert(broker.id, *numbers.entry(&broker.rack).or_insert(next));
        }
        let candidates = table.brokers().filter(|broker| takes(broker)).map(|broker| {
            let load = table.load(broker.id);
            Candidate {
                broker: broker.id,
                directory: broker.directory,
                absent: broker.fenced,
                rack: racks[&broker.id],
                replicas: load.replicas,
                preferred: load.preferred,
                replicas_here: 0,
                preferred_here: 0,
            }
        });
        Self { candidates: candidates.collect(), racks }
    }

    /// Takes one of them out.
    #[must_use]
    pub(crate) fn without(mut self, broker: BrokerId) -> Self {
        self.candidates.retain(|candidate| candidate.broker != broker);
        self
    }

    pub(crate) fn len(&self) -> usize {
        self.candidates.len()
    }

    pub(crate) fn rack(&self, broker: BrokerId) -> Option<usize> {
        self.racks.get(&broker).copied()
    }

    /// What is placed from here on is of this topic.
    pub(crate) fn focus(&mut self, topic: &Topic) {
        let mut here: HashMap<BrokerId, (u32, u32)> = HashMap::new();
        for entry in topic.partitions.iter() {
            for (order, place) in entry.replicas().iter().enumerate() {
                let (replicas, preferred) = here.entry(place.broker).or_default();
                *replicas += 1;
                *preferred += u32::from(order == 0);
            }
        }
        for candidate in &mut self.candidates {
            (candidate.replicas_here, candidate.preferred_here) =
                here.get(&candidate.broker).copied().unwrap_or_default();
        }
    }

    /// The replicas of one more partition, the preferred leader first, each on another broker.
    ///
    /// The caller has checked that there are at least `replicas` candidates.
    pub(crate) fn partition(&mut self, replicas: u32, draws: &mut Draws) -> Vec<Place> {
        assert!(self.len() >= replicas as usize, "{} candidates for {replicas} replicas", self.len());
        let mut places: Vec<Place> = Vec::with_capacity(replicas as usize);
        for order in 0..replicas {
            let taken: Vec<BrokerId> = places.iter().map(|place| place.broker).collect();
            if let Some(chosen) = self.choose(&taken, &taken, order == 0, draws) {
                places.push(Place { broker: chosen.broker, directory: chosen.directory, replica: draws.replica() });
            }
        }
        places
    }

    /// The best broker for one more replica beside those that stay on `kept`, on none of `excluded`; `None` where there
    /// is no such broker. It is given the replica.
    pub(crate) fn choose(
        &mut self,
        kept: &[BrokerId],
        excluded: &[BrokerId],
        is_preferred: bool,
        draws: &mut Draws,
    ) -> Option<Candidate> {
        // Ties are broken anew each time, so that not the same brokers share all their partitions: at the death of one,
        // all others then take over a bit.
        let salt = draws.next();
        let in_rack = |rack: usize| kept.iter().filter(|broker| self.rack(**broker) == Some(rack)).count();
        let best = self
            .candidates
            .iter()
            .enumerate()
            .filter(|(_, candidate)| !excluded.contains(&candidate.broker))
            .min_by_key(|(_, candidate)| {
                let order = if is_preferred { (candidate.preferred_here, candidate.preferred) } else { (0, 0) };
                let even = (candidate.replicas_here, candidate.replicas);
                (
                    candidate.absent,
                    in_rack(candidate.rack),
                    order,
                    even,
                    mix(salt ^ candidate.broker.get() as u64),
                    candidate.broker,
                )
            })
            .map(|(index, _)| index)?;
        let chosen = &mut self.candidates[best];
        chosen.replicas += 1;
        chosen.replicas_here += 1;
        chosen.preferred += u32::from(is_preferred);
        chosen.preferred_here += u32::from(is_preferred);
        Some(*chosen)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::testing::Cluster;
    use super::*;

    /// Replicas and preferred leaders by broker.
    fn counts(placed: &[Vec<Place>], brokers: usize) -> Vec<(usize, usize)> {
        let mut counts = vec![(0, 0); brokers];
        for partition in placed {
            for (order, place) in partition.iter().enumerate() {
                counts[place.broker.get() as usize - 1].0 += 1;
                counts[place.broker.get() as usize - 1].1 += usize::from(order == 0);
            }
        }
        counts
    }

    #[test]
    fn replicas_are_apart_and_spread_evenly() {
        for racks in [&["", "", ""][..], &["a", "a", "b", "b", "c", "c"], &["a", "a", "a", "b", "b", "b"]] {
            let cluster = Cluster::of_racks(racks);
            let mut placement = Placement::of(cluster.table());
            let mut draws = Draws::from_seed(7);
            let placed: Vec<_> = (0..60).map(|_| placement.partition(3, &mut draws)).collect();
            let mut ids = HashSet::new();
            for partition in &placed {
                let brokers: HashSet<usize> = partition.iter().map(|place| place.broker.get() as usize - 1).collect();
                assert_eq!(brokers.len(), 3);
                let distinct: HashSet<&str> = brokers.iter().map(|id| racks[*id]).collect();
                assert_eq!(distinct.len(), racks.iter().collect::<HashSet<_>>().len().min(3));
                assert!(partition.iter().all(|place| ids.insert(place.replica)));
            }
            let counts = counts(&placed, racks.len());
            let even = (180 / racks.len(), 60 / racks.len());
            assert!(counts.iter().all(|(_, preferred)| *preferred == even.1), "{counts:?}");
            assert!(counts.iter().all(|(replicas, _)| replicas.abs_diff(even.0) <= 1), "{counts:?}");
            // Every two brokers share some partition, where they may.
            let pairs: HashSet<(i32, i32)> = placed
                .iter()
                .flat_map(|places| places.iter().flat_map(|a| places.iter().map(|b| (a.broker.get(), b.broker.get()))))
                .filter(|(a, b)| a < b)
                .collect();
            let apart = if racks.len() == 6 && racks[2] == "b" { 3 } else { 0 };
            assert_eq!(pairs.len(), racks.len() * (racks.len() - 1) / 2 - apart, "{racks:?}: {pairs:?}");
        }
    }

    #[test]
    fn brokers_that_are_down_are_taken_last_and_never_lead_first() {
        let mut cluster = Cluster::of_racks(&["a", "b", "c", "a"]);
        cluster.fence(2);
        let (mut placement, mut draws) = (Placement::of_new(cluster.table()), Draws::from_seed(7));
        for _ in 0..40 {
            let brokers = |places: Vec<Place>| places.iter().map(|place| place.broker.get()).collect::<Vec<_>>();
            let three = brokers(placement.partition(3, &mut draws));
            assert!(!three.contains(&2), "there are three others: {three:?}");
            let four = brokers(placement.partition(4, &mut draws));
            assert_eq!(four[3], 2, "{four:?}");
        }
        assert_eq!(Placement::of(cluster.table()).len(), 3, "nothing is moved to one that is down");
    }

    #[test]
    fn an_empty_broker_is_not_given_everything() {
        let mut cluster = Cluster::of(3);
        cluster.create("old", 30, 1);
        cluster.register(4);
        let mut placement = Placement::of(cluster.table());
        let mut draws = Draws::from_seed(1);
        let placed: Vec<_> = (0..8).map(|_| placement.partition(1, &mut draws)).collect();
        assert_eq!(counts(&placed, 4), [(2, 2); 4], "even within the topic");
        let mut placement = Placement::of(cluster.table());
        let placed: Vec<_> = (0..8).map(|_| placement.partition(2, &mut draws)).collect();
        assert_eq!(counts(&placed, 4), [(4, 2); 4], "followers as well");
        let mut placement = Placement::of(cluster.table());
        assert_eq!(placement.partition(1, &mut draws)[0].broker, BrokerId::new(4), "a single one goes where room is");
    }

    #[test]
    fn what_the_topic_has_already_counts() {
        let mut cluster = Cluster::of(2);
        cluster.create("t", 1, 1);
        let topic = cluster.topic("t");
        let holder = topic.partitions.get(0).expect("there").replicas()[0].broker;
        let mut placement = Placement::of(cluster.table());
        placement.focus(&topic);
        let placed = placement.partition(1, &mut Draws::from_seed(3));
        assert_ne!(placed[0].broker, holder);
    }

    #[test]
    fn the_same_seed_places_alike() {
        let cluster = Cluster::of(3);
        let placed = |seed| Placement::of(cluster.table()).partition(2, &mut Draws::from_seed(seed));
        assert_eq!(placed(1), placed(1));
        assert_ne!(placed(1), placed(2));
    }
}
