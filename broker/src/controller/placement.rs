//! Which brokers hold which replicas.

use std::collections::BTreeMap;

use flowstone_protocol::{BrokerId, DirectoryId, ReplicaId};

use super::table::Place;

/// A broker that may hold replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) broker: BrokerId,
    pub(crate) directory: DirectoryId,
    pub(crate) rack: String,
}

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
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^= mixed >> 31;
            if mixed != 0 {
                return mixed;
            }
        }
    }
}

/// Places `partitions` times `replicas` replicas, each partition's on different brokers and, where there are enough, in
/// different racks. Partition after partition begins at the next broker, so leaders and replicas are spread evenly.
///
/// The caller has checked that there are at least `replicas` candidates.
pub(crate) fn place(candidates: &[Candidate], partitions: u32, replicas: u32, draws: &mut Draws) -> Vec<Vec<Place>> {
    let ring = rack_by_rack(candidates);
    assert!(ring.len() >= replicas as usize, "{} candidates for {replicas} replicas", ring.len());
    let start = (draws.next() % ring.len() as u64) as usize;
    (0..partitions as usize)
        .map(|partition| {
            (0..replicas as usize)
                .map(|replica| {
                    let Candidate { broker, directory, .. } = ring[(start + partition + replica) % ring.len()];
                    Place { broker: *broker, directory: *directory, replica: ReplicaId::new(draws.next()) }
                })
                .collect()
        })
        .collect()
}

/// The candidates in an order in which neighbours are in different racks, as far as there are any.
fn rack_by_rack(candidates: &[Candidate]) -> Vec<&Candidate> {
    let mut racks: BTreeMap<&str, Vec<&Candidate>> = BTreeMap::new();
    for candidate in candidates {
        racks.entry(&candidate.rack).or_default().push(candidate);
    }
    let longest = racks.values().map(Vec::len).max().unwrap_or(0);
    (0..longest).flat_map(|row| racks.values().filter_map(move |rack| rack.get(row).copied())).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn candidates(racks: &[&str]) -> Vec<Candidate> {
        let candidate = |(id, rack): (usize, &&str)| Candidate {
            broker: BrokerId::new(id as i32),
            directory: DirectoryId::new(id as u128),
            rack: (*rack).to_owned(),
        };
        racks.iter().enumerate().map(candidate).collect()
    }

    #[test]
    fn replicas_are_apart_and_spread_evenly() {
        for racks in [&["", "", ""][..], &["a", "a", "b", "b", "c", "c"]] {
            let candidates = candidates(racks);
            let placed = place(&candidates, 60, 3, &mut Draws::from_seed(7));
            let mut led = vec![0; candidates.len()];
            let mut ids = HashSet::new();
            for partition in &placed {
                let brokers: HashSet<i32> = partition.iter().map(|place| place.broker.get()).collect();
                assert_eq!(brokers.len(), 3);
                let distinct: HashSet<&str> = brokers.iter().map(|id| racks[*id as usize]).collect();
                assert_eq!(distinct.len(), racks.iter().collect::<HashSet<_>>().len().min(3));
                led[partition[0].broker.get() as usize] += 1;
                assert!(partition.iter().all(|place| ids.insert(place.replica)));
            }
            assert!(led.iter().all(|count| *count == 60 / candidates.len()), "{led:?}");
        }
    }

    #[test]
    fn the_same_seed_places_alike() {
        let candidates = candidates(&["", ""]);
        let placed = |seed| place(&candidates, 3, 2, &mut Draws::from_seed(seed));
        assert_eq!(placed(1), placed(1));
        assert_ne!(placed(1), placed(2));
    }
}
