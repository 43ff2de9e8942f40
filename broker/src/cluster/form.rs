//! How brokers that start become one cluster, and never two.
//!
//! The first broker of the seed list decides, once *all* seeds have answered, belong to no cluster yet, and have the same
//! list. It names the voters of the metadata, each with its data directory; the others pull that founding. Whoever hears
//! of a cluster joins it instead. Nothing here knows sockets or clocks: answers and the time go in, what to do comes out.
//!
//! ```text
//!   every seed empty, same list, I am the first  -> Found
//!   every seed empty, same list, I am not        -> Wait for the first
//!   a founding that names my directory           -> Follow: my replica of the metadata is one of the first voters
//!   any other founding                           -> Join
//!   a seed silent, unresolvable, of another list -> Wait, and say which
//!   two clusters, two brokers with one id        -> Refuse
//! ```
//!
//! Why that forms one cluster only: a broker founds only as the first of a list that all of its seeds share, and each of
//! them, asked by anyone else, shows that list too; so two founders would have to be first of the same list. A first seed
//! that lost its directory after the founding hears of the cluster from the others, and waits as long as one is silent.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use flowstone_protocol::{BrokerId, ClusterId, DirectoryId, ReplicaId, peer};

/// Voters of the metadata: of five or more seeds five, else the first three.
const VOTERS: usize = 3;
const VOTERS_OF_MANY: usize = 5;
/// A silent seed is asked again after this, and one that answered too: what it said may have changed.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// A founding counts only answers that are at most this old: all seeds are there now, not one after another.
const FRESH: Duration = Duration::from_secs(10);

/// One of the brokers whose directories the metadata was founded on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Founder {
    pub(crate) broker: BrokerId,
    pub(crate) directory: DirectoryId,
    /// Its replica of the metadata.
    pub(crate) replica: ReplicaId,
    /// Where it was reached when the cluster was founded.
    pub(crate) peer_address: String,
}

/// The decision that made a cluster. Never changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Founding {
    pub(crate) cluster: ClusterId,
    pub(crate) voters: Vec<Founder>,
    /// The newest that every seed knew: the cluster begins with it.
    pub(crate) feature_level: i32,
}

impl Founding {
    /// The founder that is this broker on this directory.
    pub(crate) fn founder(&self, broker: BrokerId, directory: DirectoryId) -> Option<&Founder> {
        self.voters.iter().find(|founder| founder.broker == broker && founder.directory == directory)
    }

    pub(crate) fn to_message(&self) -> peer::Founding {
        peer::Founding {
            cluster_id: self.cluster.to_bytes().to_vec().into(),
            voters: self.voters.iter().map(founder_message).collect(),
            feature_level: self.feature_level,
        }
    }

    /// `None` for a message that is none.
    pub(crate) fn from_message(message: &peer::Founding) -> Option<Self> {
        let voters = message.voters.iter().map(founder_of).collect::<Option<Vec<_>>>()?;
        if voters.is_empty() {
            return None;
        }
        let cluster = ClusterId::from_slice(&message.cluster_id)?;
        Some(Self { cluster, voters, feature_level: message.feature_level })
    }
}

pub(crate) fn founder_message(founder: &Founder) -> peer::Founder {
    peer::Founder {
        broker_id: founder.broker.get(),
        directory_id: founder.directory.to_bytes().to_vec().into(),
        replica_id: founder.replica.get(),
        peer_address: founder.peer_address.clone(),
    }
}

pub(crate) fn founder_of(message: &peer::Founder) -> Option<Founder> {
    Some(Founder {
        broker: BrokerId::new(message.broker_id),
        directory: DirectoryId::from_slice(&message.directory_id)?,
        replica: (message.replica_id != 0).then(|| ReplicaId::new(message.replica_id))?,
        peer_address: message.peer_address.clone(),
    })
}

/// This broker, as it looks for its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Me {
    pub(crate) broker: BrokerId,
    pub(crate) directory: DirectoryId,
    /// Random at each start of the process.
    pub(crate) incarnation: u64,
    /// Where others reach it.
    pub(crate) peer_address: String,
    /// The cluster that its directory belongs to already.
    pub(crate) cluster: Option<ClusterId>,
    /// The newest feature level that its release knows.
    pub(crate) feature_level: i32,
}

/// What a seed said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) broker: BrokerId,
    pub(crate) directory: DirectoryId,
    pub(crate) incarnation: u64,
    pub(crate) seeds: Vec<String>,
    pub(crate) peer_address: String,
    /// The cluster that it belongs to, once it does.
    pub(crate) founding: Option<Founding>,
    /// The newest feature level that its release knows.
    pub(crate) feature_level: i32,
    /// Its cluster's; 0 where it does not know.
    pub(crate) cluster_feature_level: i32,
}

impl Heard {
    /// `None` for an answer that lacks what it must have.
    pub(crate) fn from_message(message: &peer::HelloResponse) -> Option<Self> {
        let answerer = message.answerer.as_ref()?;
        let founding = match &message.founding {
            Some(founding) => Some(Founding::from_message(founding)?),
            None => None,
        };
        Some(Self {
            broker: BrokerId::new(answerer.broker_id),
            directory: DirectoryId::from_slice(&answerer.directory_id)?,
            incarnation: answerer.incarnation,
            seeds: message.seeds.clone(),
            peer_address: message.peer_address.clone(),
            founding,
            feature_level: message.feature_level,
            cluster_feature_level: message.cluster_feature_level,
        })
    }
}

/// What is to be done with what is known so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Make the cluster, by [`Form::found`].
    Found,
    /// It exists, and this directory is among those that it was founded on.
    Follow(Founding),
    /// It exists, and this broker is to register with it.
    Join(Founding),
    /// Nothing yet; why, for whoever asks whether the broker is ready.
    Wait(String),
    /// It can never become part of this cluster as it is; what to do about it.
    Refuse(String),
}

#[derive(Clone, Debug)]
struct Seed {
    address: String,
    asked: Option<Instant>,
    /// When the question was asked whose answer the state is.
    said_at: Option<Instant>,
    state: SeedState,
}

impl Seed {
    fn is_news(&self, at: Instant) -> bool {
        self.said_at.is_none_or(|said| said <= at)
    }
}

#[derive(Clone, Debug)]
enum SeedState {
    NotHeard,
    Heard { said: Heard, at: Instant },
    Failed { reason: String },
}

/// One broker's search for its cluster.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    me: Me,
    seeds: Vec<Seed>,
}

impl Form {
    /// `seeds` as configured, in order, without doubles.
    pub(crate) fn new(me: Me, seeds: &[String]) -> Self {
        let seeds = seeds.iter().map(|address| Seed {
            address: address.clone(),
            asked: None,
            said_at: None,
            state: SeedState::NotHeard,
        });
        Self { me, seeds: seeds.collect() }
    }

    /// Seeds to ask now, with their numbers; they count as asked.
    pub(crate) fn ask(&mut self, now: Instant) -> Vec<(usize, String)> {
        let due = |seed: &Seed| seed.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= ASK_EVERY);
        let mut asked = Vec::new();
        for (number, seed) in self.seeds.iter_mut().enumerate() {
            if due(seed) {
                seed.asked = Some(now);
                asked.push((number, seed.address.clone()));
            }
        }
        asked
    }

    /// When [`Form::ask`] has something to say again.
    pub(crate) fn ask_again_at(&self) -> Option<Instant> {
        self.seeds.iter().filter_map(|seed| seed.asked.map(|asked| asked + ASK_EVERY)).min()
    }

    /// What it said when it was asked at `at`; an answer to an earlier question than the last one heard says nothing new.
    pub(crate) fn heard(&mut self, number: usize, said: Heard, at: Instant) {
        if let Some(seed) = self.seeds.get_mut(number).filter(|seed| seed.is_news(at)) {
            (seed.state, seed.said_at) = (SeedState::Heard { said, at }, Some(at));
        }
    }

    /// It did not answer what it was asked at `at`, or its name could not be resolved; what it said before counts no more,
    /// unless it was a founding, which is never taken back.
    pub(crate) fn failed(&mut self, number: usize, at: Instant, reason: String) {
        if let Some(seed) = self.seeds.get_mut(number).filter(|seed| seed.is_news(at)) {
            let is_member = matches!(&seed.state, SeedState::Heard { said, .. } if said.founding.is_some());
            if !is_member {
                (seed.state, seed.said_at) = (SeedState::Failed { reason }, Some(at));
            }
        }
    }

    fn answers(&self) -> impl Iterator<Item = (&str, &Heard, Instant)> {
        self.seeds.iter().filter_map(|seed| match &seed.state {
            SeedState::Heard { said, at } => Some((seed.address.as_str(), said, *at)),
            SeedState::NotHeard | SeedState::Failed { .. } => None,
        })
    }

    /// Whether this very process answered there.
    fn is_me(&self, said: &Heard) -> bool {
        said.directory == self.me.directory && said.incarnation == self.me.incarnation
    }

    /// What follows from all answers so far.
    pub(crate) fn decide(&self, now: Instant) -> Decision {
        if self.seeds.is_empty() {
            return Decision::Found;
        }
        if let Some(refusal) = self.contradiction() {
            return Decision::Refuse(refusal);
        }
        // Of a directory that belongs to a cluster already, that one alone counts.
        let is_mine = |founding: &&Founding| self.me.cluster.is_none_or(|mine| founding.cluster == mine);
        if let Some(founding) = self.answers().filter_map(|(_, said, _)| said.founding.as_ref()).find(is_mine) {
            return match founding.founder(self.me.broker, self.me.directory) {
                Some(_) => Decision::Follow(founding.clone()),
                None => Decision::Join(founding.clone()),
            };
        }
        match self.lacking(now) {
            Some(reason) => Decision::Wait(reason),
            // All answered, are empty, and have the same list.
            None => match self.answers().next() {
                Some((_, first, _)) if self.is_me(first) => Decision::Found,
                Some((address, first, _)) => Decision::Wait(format!(
                    "broker {} at {address}, the first of cluster.seeds, is to found the cluster; it has not yet",
                    first.broker
                )),
                None => Decision::Wait("no seed has answered yet".to_owned()),
            },
        }
    }

    /// What no waiting will mend.
    fn contradiction(&self) -> Option<String> {
        let others = || self.answers().filter(|(_, said, _)| !self.is_me(said));
        for (address, said, _) in others() {
            if said.directory == self.me.directory {
                return Some(format!(
                    "the broker at {address} runs on a copy of this data directory (id {}); start this broker with an \
                     empty data directory: a copy would answer for what it does not have",
                    said.directory
                ));
            }
            if said.broker == self.me.broker {
                return Some(format!(
                    "two brokers have node.id {}: this one and the one at {address} (data directory {}, this one's is {}); \
                     give each broker a node.id of its own",
                    self.me.broker, said.directory, self.me.directory
                ));
            }
        }
        let is_mine = |said: &Heard| match (&said.founding, self.me.cluster) {
            (Some(founding), Some(mine)) => founding.cluster == mine,
            (founding, _) => founding.is_some(),
        };
        let is_newer = |said: &Heard| is_mine(said) && said.cluster_feature_level > self.me.feature_level;
        if let Some((address, said, _)) = others().find(|(_, said, _)| is_newer(said)) {
            return Some(too_old(address, said.cluster_feature_level, self.me.feature_level));
        }
        let clusters: BTreeSet<ClusterId> =
            others().filter_map(|(_, said, _)| said.founding.as_ref()).map(|founding| founding.cluster).collect();
        match self.me.cluster {
            // One seed that lies must not keep a whole cluster from starting: more than half decide.
            Some(mine) => {
                let elsewhere: Vec<_> = others()
                    .filter_map(|(address, said, _)| Some((address, said.founding.as_ref()?.cluster)))
                    .filter(|(_, cluster)| *cluster != mine)
                    .collect();
                if 2 * elsewhere.len() <= self.seeds.len() {
                    return None;
                }
                let (address, theirs) = elsewhere.first()?;
                Some(format!(
                    "this data directory belongs to cluster {mine}, and the seeds to another ({address} to {theirs}); \
                     correct cluster.seeds, or start with an empty data directory to join that cluster"
                ))
            }
            None if clusters.len() > 1 => {
                let of_each: Vec<String> = others()
                    .filter_map(|(address, said, _)| Some(format!("{address} of {}", said.founding.as_ref()?.cluster)))
                    .collect();
                Some(format!(
                    "the seeds belong to different clusters ({}); name brokers of one cluster in cluster.seeds",
                    of_each.join(", ")
                ))
            }
            None => {
                let mut seen: Vec<(&str, &Heard)> = Vec::new();
                for (address, said, _) in self.answers() {
                    if let Some((other, _)) = seen.iter().find(|(_, earlier)| earlier.directory == said.directory) {
                        return Some(format!(
                            "cluster.seeds names broker {} twice, as {other} and {address}; name every broker once",
                            said.broker
                        ));
                    }
                    if let Some((other, _)) = seen.iter().find(|(_, earlier)| earlier.broker == said.broker) {
                        return Some(format!(
                            "two brokers have node.id {}: those at {other} and {address}; give each broker a node.id of \
                             its own",
                            said.broker
                        ));
                    }
                    seen.push((address, said));
                }
                None
            }
        }
    }

    /// What a founding still waits for.
    fn lacking(&self, now: Instant) -> Option<String> {
        let mine: Vec<&str> = self.seeds.iter().map(|seed| seed.address.as_str()).collect();
        let mut lacking = Vec::new();
        for seed in &self.seeds {
            match &seed.state {
                SeedState::NotHeard => lacking.push(format!("{} has not answered yet", seed.address)),
                SeedState::Failed { reason } => lacking.push(format!("{}: {reason}", seed.address)),
                SeedState::Heard { said, .. } if said.seeds != mine => lacking.push(format!(
                    "broker {} at {} has other seeds ([{}], this broker has [{}]): set the same list, in the same order, \
                     on all",
                    said.broker,
                    seed.address,
                    said.seeds.join(", "),
                    mine.join(", ")
                )),
                SeedState::Heard { at, .. } if now.saturating_duration_since(*at) > FRESH => {
                    lacking.push(format!("{} answered once, and does not any more", seed.address));
                }
                SeedState::Heard { .. } => {}
            }
        }
        if lacking.is_empty() {
            return None;
        }
        Some(format!("a new cluster is formed once all cluster.seeds answer; {}", lacking.join("; ")))
    }

    /// The founding that this broker is to make, with what `draw` gives for the replicas' ids. Only after
    /// [`Decision::Found`].
    pub(crate) fn found(&self, cluster: ClusterId, mut draw: impl FnMut() -> u64) -> Founding {
        let mut replica = || loop {
            match draw() {
                0 => {}
                id => return ReplicaId::new(id),
            }
        };
        if self.seeds.is_empty() {
            let me = Founder {
                broker: self.me.broker,
                directory: self.me.directory,
                replica: replica(),
                peer_address: self.me.peer_address.clone(),
            };
            return Founding { cluster, voters: vec![me], feature_level: self.me.feature_level };
        }
        let feature_level = self.answers().map(|(_, said, _)| said.feature_level).min();
        let feature_level = feature_level.unwrap_or(self.me.feature_level);
        let voters = if self.seeds.len() >= VOTERS_OF_MANY { VOTERS_OF_MANY } else { VOTERS };
        let voters = self.answers().take(voters).map(|(_, said, _)| Founder {
            broker: said.broker,
            directory: said.directory,
            replica: replica(),
            peer_address: said.peer_address.clone(),
        });
        Founding { cluster, voters: voters.collect(), feature_level }
    }
}

/// Why a broker cannot be part of a cluster that writes what its release cannot read.
pub(crate) fn too_old(address: &str, needed: i32, known: i32) -> String {
    format!(
        "the cluster's feature level is {needed}, as the broker at {address} says, and this broker's release knows up to \
         {known}: it could not read the metadata; start it with a newer release"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me(number: i32) -> Me {
        Me {
            broker: BrokerId::new(number),
            directory: DirectoryId::new(number as u128 + 100),
            incarnation: number as u64 + 1_000,
            peer_address: address(number),
            cluster: None,
            feature_level: 1,
        }
    }

    fn address(number: i32) -> String {
        format!("host-{number}:7071")
    }

    fn list(numbers: &[i32]) -> Vec<String> {
        numbers.iter().map(|number| address(*number)).collect()
    }

    /// What the broker of that number says of itself.
    fn says(number: i32, seeds: &[i32]) -> Heard {
        let me = me(number);
        Heard {
            broker: me.broker,
            directory: me.directory,
            incarnation: me.incarnation,
            seeds: list(seeds),
            peer_address: me.peer_address,
            founding: None,
            feature_level: 1,
            cluster_feature_level: 0,
        }
    }

    fn member(number: i32, seeds: &[i32], founding: &Founding) -> Heard {
        Heard { founding: Some(founding.clone()), ..says(number, seeds) }
    }

    fn founding(cluster: u128, voters: &[i32]) -> Founding {
        let voters = voters.iter().map(|number| Founder {
            broker: BrokerId::new(*number),
            directory: me(*number).directory,
            replica: ReplicaId::new(*number as u64 + 50),
            peer_address: address(*number),
        });
        Founding { cluster: ClusterId::new(cluster), voters: voters.collect(), feature_level: 1 }
    }

    /// What a row's seed did.
    enum Did {
        Nothing,
        Failed(&'static str),
        Said(Heard),
    }
    use Did::{Failed, Nothing, Said};

    #[derive(Debug)]
    enum Wants {
        Found(&'static [i32]),
        Follow(u128),
        Join(u128),
        Wait(&'static [&'static str]),
        Refuse(&'static [&'static str]),
    }

    fn check_of(what: &str, me: Me, seeds: &[i32], did: Vec<Did>, wants: Wants) {
        let now = Instant::now();
        let mut form = Form::new(me, &list(seeds));
        assert_eq!(form.ask(now).len(), seeds.len(), "{what}: all are asked");
        assert_eq!(did.len(), seeds.len(), "{what}: a row's seeds");
        for (number, did) in did.into_iter().enumerate() {
            match did {
                Nothing => {}
                Failed(reason) => form.failed(number, now, reason.to_owned()),
                Said(said) => form.heard(number, said, now),
            }
        }
        let decided = form.decide(now);
        let has = |text: &str, parts: &[&str]| {
            for part in parts {
                assert!(text.contains(part), "{what}: wanted `{part}` in: {text}");
            }
        };
        match (&decided, &wants) {
            (Decision::Found, Wants::Found(voters)) => {
                let mut next = 0;
                let founding = form.found(ClusterId::new(9), || {
                    next += 1;
                    next - 1
                });
                let brokers: Vec<i32> = founding.voters.iter().map(|voter| voter.broker.get()).collect();
                assert_eq!(brokers, *voters, "{what}");
                let ids: BTreeSet<ReplicaId> = founding.voters.iter().map(|voter| voter.replica).collect();
                assert_eq!(ids.len(), voters.len(), "{what}: ids of their own");
                assert!(!ids.contains(&ReplicaId::new(0)), "{what}: 0 is no replica id");
                assert_eq!(Founding::from_message(&founding.to_message()), Some(founding), "{what}");
            }
            (Decision::Follow(founding), Wants::Follow(cluster)) | (Decision::Join(founding), Wants::Join(cluster)) => {
                assert_eq!(founding.cluster, ClusterId::new(*cluster), "{what}");
            }
            (Decision::Wait(text), Wants::Wait(parts)) | (Decision::Refuse(text), Wants::Refuse(parts)) => {
                has(text, parts);
            }
            _ => panic!("{what}: wanted {wants:?}, got {decided:?}"),
        }
    }

    fn check(what: &str, number: i32, seeds: &[i32], did: Vec<Did>, wants: Wants) {
        check_of(what, me(number), seeds, did, wants);
    }

    const ALL: &[i32] = &[1, 2, 3];

    fn empty(seeds: &[i32]) -> Vec<Did> {
        seeds.iter().map(|number| Said(says(*number, seeds))).collect()
    }

    #[test]
    fn the_first_of_all_founds_and_the_others_wait_for_it() {
        check("alone without seeds", 1, &[], vec![], Wants::Found(&[1]));
        check("alone with its own seed", 1, &[1], empty(&[1]), Wants::Found(&[1]));
        check("the first", 1, ALL, empty(ALL), Wants::Found(ALL));
        check("not the first", 2, ALL, empty(ALL), Wants::Wait(&["broker 1", "is to found"]));
        check("the first by place, not by id", 3, &[3, 1, 2], empty(&[3, 1, 2]), Wants::Found(&[3, 1, 2]));
        check("two", 1, &[1, 2], empty(&[1, 2]), Wants::Found(&[1, 2]));
        check("four: three vote", 1, &[1, 2, 3, 4], empty(&[1, 2, 3, 4]), Wants::Found(&[1, 2, 3]));
        check("six: five vote", 1, &[1, 2, 3, 4, 5, 6], empty(&[1, 2, 3, 4, 5, 6]), Wants::Found(&[1, 2, 3, 4, 5]));
        check("one that is no seed", 4, ALL, empty(ALL), Wants::Wait(&["broker 1"]));
    }

    #[test]
    fn nothing_is_founded_while_a_seed_is_silent_or_has_another_list() {
        let said = |number| Said(says(number, ALL));
        check("nobody yet", 1, ALL, vec![Nothing, Nothing, Nothing], Wants::Wait(&["host-2:7071 has not answered"]));
        check("one is silent", 1, ALL, vec![said(1), said(2), Nothing], Wants::Wait(&["host-3:7071 has not answered"]));
        let unresolvable = Failed("cannot resolve the name; correct cluster.seeds");
        check(
            "one cannot be resolved",
            1,
            ALL,
            vec![said(1), unresolvable, said(3)],
            Wants::Wait(&["host-2:7071: cannot resolve"]),
        );
        let other_order = Said(says(3, &[3, 1, 2]));
        check(
            "another order",
            1,
            ALL,
            vec![said(1), said(2), other_order],
            Wants::Wait(&["broker 3", "other seeds", "host-3:7071, host-1:7071", "same list"]),
        );
        let fewer = Said(says(2, &[1, 2]));
        check("a shorter list", 1, ALL, vec![said(1), fewer, said(3)], Wants::Wait(&["broker 2", "other seeds"]));
        let none = Said(says(2, &[]));
        check("an empty list", 1, ALL, vec![said(1), none, said(3)], Wants::Wait(&["other seeds ([]"]));
    }

    #[test]
    fn whoever_hears_of_a_cluster_becomes_part_of_it() {
        let cluster = founding(7, ALL);
        let of = |number| Said(member(number, ALL, &cluster));
        let said = |number| Said(says(number, ALL));
        check("a voter that was not told yet", 2, ALL, vec![of(1), said(2), Nothing], Wants::Follow(7));
        check("told by a voter that is not the first", 3, ALL, vec![Nothing, of(2), said(3)], Wants::Follow(7));
        check("a fourth broker", 4, ALL, vec![Nothing, of(2), Nothing], Wants::Join(7));
        check(
            "a fourth broker with a list of its own",
            4,
            &[4, 1],
            vec![Said(says(4, &[4, 1])), of(1)],
            Wants::Join(7),
        );
        let alone = founding(7, &[1]);
        let grown = vec![Said(member(1, &[1], &alone)), said(2), said(3)];
        check("a cluster of one that grows", 2, ALL, grown, Wants::Join(7));
    }

    #[test]
    fn a_first_seed_that_lost_its_directory_founds_no_second_cluster() {
        let cluster = founding(7, ALL);
        let of = |number| Said(member(number, ALL, &cluster));
        let wiped = Me { directory: DirectoryId::new(555), incarnation: 5, ..me(1) };
        let itself = || Said(Heard { directory: wiped.directory, incarnation: 5, ..says(1, ALL) });
        check_of("the others tell", wiped.clone(), ALL, vec![itself(), of(2), of(3)], Wants::Join(7));
        check_of("one tells", wiped.clone(), ALL, vec![itself(), Nothing, of(3)], Wants::Join(7));
        check_of(
            "while nobody can be asked it waits",
            wiped.clone(),
            ALL,
            vec![itself(), Nothing, Failed("refused")],
            Wants::Wait(&["host-2:7071"]),
        );
        let unaware = vec![itself(), Said(says(2, ALL)), Nothing];
        check_of("one that never heard of it is not enough", wiped, ALL, unaware, Wants::Wait(&["host-3:7071"]));
    }

    #[test]
    fn what_no_waiting_mends_is_refused() {
        let (seven, eight) = (founding(7, &[1]), founding(8, &[2]));
        let said = |number| Said(says(number, ALL));
        check(
            "two clusters",
            3,
            ALL,
            vec![Said(member(1, &[1], &seven)), Said(member(2, &[2], &eight)), said(3)],
            Wants::Refuse(&["different clusters", "host-1:7071", "host-2:7071"]),
        );
        let impostor = Heard { directory: DirectoryId::new(999), incarnation: 1, ..says(1, ALL) };
        check(
            "another has this broker's id",
            1,
            ALL,
            vec![said(1), Said(impostor.clone()), said(3)],
            Wants::Refuse(&["two brokers have node.id 1", "host-2:7071"]),
        );
        let twin = Heard { broker: BrokerId::new(2), ..says(3, ALL) };
        check(
            "two others have one id",
            1,
            ALL,
            vec![said(1), said(2), Said(twin)],
            Wants::Refuse(&["two brokers have node.id 2", "host-2:7071", "host-3:7071"]),
        );
        check(
            "one broker under two names",
            1,
            ALL,
            vec![said(1), said(2), said(2)],
            Wants::Refuse(&["broker 2 twice"]),
        );
        let copy = Heard { broker: BrokerId::new(2), directory: me(1).directory, ..says(2, ALL) };
        check("a copied directory", 1, ALL, vec![said(1), Said(copy), said(3)], Wants::Refuse(&["copy of this data"]));
    }

    #[test]
    fn a_directory_of_another_cluster_is_refused_by_more_than_half_of_the_seeds() {
        let theirs = founding(8, ALL);
        let mine = Me { cluster: Some(ClusterId::new(7)), ..me(4) };
        let of = |number| Said(member(number, ALL, &theirs));
        check_of(
            "all are of another",
            mine.clone(),
            ALL,
            vec![of(1), of(2), Nothing],
            Wants::Refuse(&["belongs to cluster", "correct cluster.seeds"]),
        );
        let own = founding(7, &[1, 2, 4]);
        let stranger = vec![of(1), Said(member(2, ALL, &own)), Nothing];
        check_of("one stranger among the seeds", mine, ALL, stranger, Wants::Follow(7));
    }

    #[test]
    fn answers_grow_old_and_foundings_do_not() {
        let start = Instant::now();
        let mut form = Form::new(me(1), &list(ALL));
        form.ask(start);
        for number in 1..=3 {
            form.heard(number as usize - 1, says(number, ALL), start);
        }
        assert_eq!(form.decide(start), Decision::Found);
        let late = start + FRESH + Duration::from_millis(1);
        assert!(matches!(form.decide(late), Decision::Wait(reason) if reason.contains("does not any more")));
        form.failed(1, start, "connection refused".to_owned());
        assert!(matches!(form.decide(start), Decision::Wait(reason) if reason.contains("connection refused")));
        form.heard(1, member(2, ALL, &founding(7, ALL)), start);
        form.failed(1, start, "connection refused".to_owned());
        assert!(matches!(form.decide(late), Decision::Follow(_)), "a founding is never taken back");
    }

    #[test]
    fn what_was_asked_earlier_says_nothing_of_what_was_heard_later() {
        let start = Instant::now();
        let later = start + ASK_EVERY;
        let mut form = Form::new(me(1), &list(ALL));
        for number in 1..=3 {
            form.heard(number as usize - 1, says(number, ALL), start);
        }
        form.heard(1, says(2, &[2, 1, 3]), later);
        assert!(matches!(form.decide(later), Decision::Wait(reason) if reason.contains("has other seeds")));
        form.heard(1, says(2, ALL), start);
        assert!(matches!(form.decide(later), Decision::Wait(_)), "its later list counts");
        form.failed(1, start, "connection refused".to_owned());
        assert!(matches!(form.decide(later), Decision::Wait(reason) if reason.contains("has other seeds")));
    }

    #[test]
    fn a_release_that_cannot_read_the_metadata_is_told_so_by_whoever_can() {
        let newer = |founding: &Founding| Heard { cluster_feature_level: 2, ..member(2, ALL, founding) };
        let row = |said: Heard| vec![Said(says(1, ALL)), Said(said), Nothing];
        let refused = || Wants::Refuse(&["feature level is 2", "start it with a newer release"]);
        check_of("an empty one", me(1), ALL, row(newer(&founding(7, ALL))), refused());
        let mine = |cluster: u128| Me { cluster: Some(ClusterId::new(cluster)), ..me(1) };
        check_of("a member", mine(7), ALL, row(newer(&founding(7, ALL))), refused());
        let upgraded = Me { feature_level: 2, ..mine(7) };
        check_of("a newer one", upgraded, ALL, row(newer(&founding(7, ALL))), Wants::Follow(7));
        let mut form = Form::new(Me { feature_level: 3, ..me(1) }, &list(ALL));
        for (number, feature_level) in [(1, 3), (2, 2), (3, 3)] {
            form.heard(number as usize - 1, Heard { feature_level, ..says(number, ALL) }, Instant::now());
        }
        assert_eq!(form.found(ClusterId::new(9), || 5).feature_level, 2, "what all of them know");
    }

    #[test]
    fn seeds_are_asked_again_and_again_but_not_all_the_time() {
        let start = Instant::now();
        let mut form = Form::new(me(1), &list(ALL));
        assert_eq!(form.ask_again_at(), None);
        assert_eq!(form.ask(start).len(), 3);
        assert!(form.ask(start).is_empty());
        let again = form.ask_again_at().expect("asked");
        assert_eq!(form.ask(again).len(), 3);
    }
}
