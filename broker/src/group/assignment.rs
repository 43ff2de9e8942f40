//! Who shall own what: pure assignors, from members and partitions to a target for each member.
//!
//! All of them are carried out in the same way, partition by partition (see [`commands`](super::commands)); they differ in
//! what they aim at. `range` and `roundrobin` look at nothing but names, so that everybody can foretell them; `sticky` and
//! `cooperative`, two names of one thing here, take away only what must go for the shares to be even, and prefer members in
//! a rack that has a replica where that costs nothing.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use flowstone_protocol::{PartitionId, TopicId, TopicPartition};

/// Partitions of one topic that are looked at for one in a better rack when one is to move.
const RACK_LOOKS_MAX: usize = 64;

/// A way to share partitions out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Assignor {
    /// Of each topic a run of neighbouring partitions, so that partitions of the same number of several topics meet.
    Range,
    /// One after another, over all topics.
    RoundRobin,
    /// Even shares; what is owned stays.
    Sticky,
    /// The same under the name that Kafka's incremental protocol gave it.
    Cooperative,
}

impl Assignor {
    pub(crate) const ALL: [Self; 4] = [Self::Range, Self::RoundRobin, Self::Sticky, Self::Cooperative];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Range => "range",
            Self::RoundRobin => "roundrobin",
            Self::Sticky => "sticky",
            Self::Cooperative => "cooperative",
        }
    }

    /// The assignor of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|assignor| assignor.name() == name)
    }
}

/// A topic that some member wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WantedTopic {
    pub(crate) id: TopicId,
    pub(crate) name: String,
    pub(crate) partitions: u32,
    /// Of each partition, the racks that have a replica; empty where racks play no part.
    pub(crate) racks: Vec<Vec<String>>,
}

/// A member that wants partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Decides about its place in the order: the instance id of a static member, else the member id.
    pub(crate) order: String,
    /// Empty for none.
    pub(crate) rack: String,
    /// Indexes of the topics that it wants, sorted.
    pub(crate) topics: Vec<usize>,
    /// Its target until now.
    pub(crate) current: Vec<TopicPartition>,
}

/// The targets of `members`, in their order, each sorted. Every partition that at least one member wants is in exactly one.
pub(crate) fn assign(assignor: Assignor, topics: &[WantedTopic], members: &[Candidate]) -> Vec<Vec<TopicPartition>> {
    assign_counted(assignor, topics, members).0
}

/// With the number of steps that it took: what is looked up in an ordered set, or moved.
fn assign_counted(
    assignor: Assignor,
    topics: &[WantedTopic],
    members: &[Candidate],
) -> (Vec<Vec<TopicPartition>>, u64) {
    let mut order: Vec<usize> = (0..members.len()).collect();
    order.sort_by(|a, b| members[*a].order.cmp(&members[*b].order));
    let mut by_name: Vec<usize> = (0..topics.len()).collect();
    by_name.sort_by(|a, b| topics[*a].name.cmp(&topics[*b].name));
    let mut subscribers: Vec<Vec<usize>> = vec![Vec::new(); topics.len()];
    for member in &order {
        for topic in &members[*member].topics {
            subscribers[*topic].push(*member);
        }
    }
    let (mut targets, steps) = match assignor {
        Assignor::Range => range(topics, &by_name, &subscribers, members.len()),
        Assignor::RoundRobin => round_robin(topics, &by_name, &subscribers, &order),
        Assignor::Sticky | Assignor::Cooperative => {
            let mut balance = Balance::new(topics, members, &order, &subscribers);
            balance.keep();
            balance.hand_out(&by_name);
            balance.even_out();
            balance.into_targets()
        }
    };
    for target in &mut targets {
        target.sort_unstable();
    }
    (targets, steps)
}

fn partition_of(topic: &WantedTopic, partition: u32) -> TopicPartition {
    TopicPartition { topic: topic.id, partition: PartitionId::new(partition as i32) }
}

type Targets = (Vec<Vec<TopicPartition>>, u64);

fn range(topics: &[WantedTopic], by_name: &[usize], subscribers: &[Vec<usize>], members: usize) -> Targets {
    let (mut targets, mut steps) = (vec![Vec::new(); members], 0);
    for topic in by_name {
        let (wanted, takers) = (&topics[*topic], &subscribers[*topic]);
        let Some(share) = wanted.partitions.checked_div(takers.len() as u32) else { continue };
        let (mut rest, mut next) = (wanted.partitions % takers.len() as u32, 0);
        for member in takers {
            let until = next + share + u32::from(rest > 0);
            rest = rest.saturating_sub(1);
            targets[*member].extend((next..until).map(|partition| partition_of(wanted, partition)));
            steps += u64::from(until - next) + 1;
            next = until;
        }
    }
    (targets, steps)
}

fn round_robin(topics: &[WantedTopic], by_name: &[usize], subscribers: &[Vec<usize>], order: &[usize]) -> Targets {
    let (mut targets, mut steps, mut turn) = (vec![Vec::new(); order.len()], 0, 0);
    for topic in by_name {
        let wanted = &topics[*topic];
        if subscribers[*topic].is_empty() {
            continue;
        }
        let mut takes = vec![false; order.len()];
        for member in &subscribers[*topic] {
            takes[*member] = true;
        }
        for partition in 0..wanted.partitions {
            // Somebody takes it: this ends within one round.
            while !takes[order[turn % order.len()]] {
                turn += 1;
                steps += 1;
            }
            targets[order[turn % order.len()]].push(partition_of(wanted, partition));
            turn += 1;
            steps += 1;
        }
    }
    (targets, steps)
}

/// Members that want the same topics and are in the same rack are alike: of each such class only the one with the least
/// has to be looked at.
struct Balance<'a> {
    topics: &'a [WantedTopic],
    members: &'a [Candidate],
    /// Place of each member in the order of names.
    rank: Vec<usize>,
    class_of: Vec<usize>,
    /// Rack of each class, empty for none.
    class_racks: Vec<&'a str>,
    /// Per class, its members by (partitions, rank).
    by_load: Vec<BTreeSet<(usize, usize)>>,
    /// Per topic, the classes that want it.
    takers: Vec<Vec<usize>>,
    by_rank: Vec<usize>,
    /// Per member and topic.
    owned: Vec<BTreeMap<usize, Vec<u32>>>,
    load: Vec<usize>,
    index: HashMap<TopicId, usize>,
    steps: u64,
}

impl<'a> Balance<'a> {
    fn new(topics: &'a [WantedTopic], members: &'a [Candidate], order: &[usize], subscribers: &[Vec<usize>]) -> Self {
        let mut rank = vec![0; members.len()];
        for (place, member) in order.iter().enumerate() {
            rank[*member] = place;
        }
        let has_racks = topics.iter().any(|topic| !topic.racks.is_empty());
        let mut classes: HashMap<(&[usize], &str), usize> = HashMap::new();
        let (mut class_of, mut class_racks, mut by_load) = (Vec::new(), Vec::new(), Vec::<BTreeSet<_>>::new());
        for (member, candidate) in members.iter().enumerate() {
            let rack = if has_racks { candidate.rack.as_str() } else { "" };
            let class = *classes.entry((&candidate.topics, rack)).or_insert_with(|| {
                class_racks.push(rack);
                by_load.push(BTreeSet::new());
                by_load.len() - 1
            });
            class_of.push(class);
            by_load[class].insert((0, rank[member]));
        }
        let takers = subscribers.iter().map(|subscribers| {
            let classes: BTreeSet<usize> = subscribers.iter().map(|member| class_of[*member]).collect();
            classes.into_iter().collect()
        });
        Self {
            topics,
            members,
            rank,
            class_racks,
            by_load,
            takers: takers.collect(),
            by_rank: order.to_vec(),
            owned: vec![BTreeMap::new(); members.len()],
            load: vec![0; members.len()],
            index: topics.iter().enumerate().map(|(index, topic)| (topic.id, index)).collect(),
            class_of,
            steps: 0,
        }
    }

    fn set_load(&mut self, member: usize, load: usize) {
        let set = &mut self.by_load[self.class_of[member]];
        set.remove(&(self.load[member], self.rank[member]));
        set.insert((load, self.rank[member]));
        self.load[member] = load;
        self.steps += 1;
    }

    fn give(&mut self, member: usize, topic: usize, partition: u32) {
        self.owned[member].entry(topic).or_default().push(partition);
        self.set_load(member, self.load[member] + 1);
    }

    /// Whatever members have and may have, they keep for now.
    fn keep(&mut self) {
        let members = self.members;
        let mut taken: Vec<Vec<bool>> =
            self.topics.iter().map(|topic| vec![false; topic.partitions as usize]).collect();
        for (member, candidate) in members.iter().enumerate() {
            let mut kept = 0;
            for tp in &candidate.current {
                let Some(topic) = self.index.get(&tp.topic).copied() else { continue };
                let Some(taken) = usize::try_from(tp.partition.get()).ok().and_then(|at| taken[topic].get_mut(at))
                else {
                    continue;
                };
                if !*taken && candidate.topics.binary_search(&topic).is_ok() {
                    *taken = true;
                    kept += 1;
                    self.owned[member].entry(topic).or_default().push(tp.partition.get() as u32);
                }
            }
            self.set_load(member, kept);
        }
    }

    /// What nobody has goes to whoever has the least.
    fn hand_out(&mut self, by_name: &[usize]) {
        let mut taken: Vec<Vec<bool>> =
            self.topics.iter().map(|topic| vec![false; topic.partitions as usize]).collect();
        for owned in &self.owned {
            for (topic, partitions) in owned {
                for partition in partitions {
                    taken[*topic][*partition as usize] = true;
                }
            }
        }
        // Topics that few want go first, while these few have little.
        let mut order: Vec<usize> = by_name.iter().copied().filter(|topic| !self.takers[*topic].is_empty()).collect();
        order.sort_by_key(|topic| self.takers[*topic].iter().map(|class| self.by_load[*class].len()).sum::<usize>());
        for topic in order {
            for partition in 0..self.topics[topic].partitions {
                if taken[topic][partition as usize] {
                    continue;
                }
                if let Some((_, member)) = self.least(topic, Some(partition)) {
                    self.give(member, topic, partition);
                }
            }
        }
    }

    fn in_rack(&self, topic: usize, partition: u32, rack: &str) -> bool {
        let racks = self.topics[topic].racks.get(partition as usize);
        !rack.is_empty() && racks.is_some_and(|racks| racks.iter().any(|known| known == rack))
    }

    /// Of those that want the topic, the member with the least; among equals one whose rack has a replica of `partition`.
    fn least(&mut self, topic: usize, partition: Option<u32>) -> Option<(usize, usize)> {
        self.steps += self.takers[topic].len() as u64;
        let best = self.takers[topic].iter().filter_map(|class| {
            let (load, rank) = *self.by_load[*class].first()?;
            let near = partition.is_some_and(|partition| self.in_rack(topic, partition, self.class_racks[*class]));
            Some((load, !near, rank))
        });
        best.min().map(|(load, _, rank)| (load, self.by_rank[rank]))
    }

    /// Takes from whoever has the most as long as somebody else may have it who has two less: so nobody loses more than
    /// what it has above its share.
    fn even_out(&mut self) {
        loop {
            let loads = (0..self.members.len()).filter(|member| self.load[*member] > 1);
            let mut most: BTreeSet<(Reverse<usize>, usize)> =
                loads.map(|member| (Reverse(self.load[member]), self.rank[member])).collect();
            let mut moved = false;
            while let Some((_, rank)) = most.pop_first() {
                let member = self.by_rank[rank];
                // One that can pass nothing on waits for the next round: who takes what it has may have less by then.
                if self.pass_one_on(member) {
                    moved = true;
                    most.insert((Reverse(self.load[member]), rank));
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn pass_one_on(&mut self, member: usize) -> bool {
        let owned: Vec<usize> = self.owned[member]
            .iter()
            .filter(|(_, partitions)| !partitions.is_empty())
            .map(|(topic, _)| *topic)
            .collect();
        let mut best: Option<(usize, usize, usize)> = None;
        for topic in owned {
            if let Some((load, to)) = self.least(topic, None)
                && best.is_none_or(|(least, _, _)| load < least)
            {
                best = Some((load, to, topic));
            }
        }
        let Some((load, to, topic)) = best.filter(|(load, _, _)| load + 2 <= self.load[member]) else { return false };
        debug_assert_eq!(load, self.load[to]);
        let at = self.worth_moving(member, topic, to);
        if let Some(partitions) = self.owned[member].get_mut(&topic) {
            let partition = partitions.swap_remove(at);
            self.set_load(member, self.load[member] - 1);
            self.give(to, topic, partition);
        }
        true
    }

    /// Which of its partitions of a topic: one that comes nearer to a replica by it, rather than one that goes away from one.
    fn worth_moving(&mut self, from: usize, topic: usize, to: usize) -> usize {
        let partitions = &self.owned[from][&topic];
        let last = partitions.len() - 1;
        if self.topics[topic].racks.is_empty() {
            return last;
        }
        self.steps += partitions.len().min(RACK_LOOKS_MAX) as u64;
        let worth = |at: usize| {
            let near = |member: usize| self.in_rack(topic, partitions[at], &self.members[member].rack);
            i32::from(near(to)) - i32::from(near(from))
        };
        let looked_at = partitions.len().saturating_sub(RACK_LOOKS_MAX)..partitions.len();
        looked_at.max_by_key(|at| worth(*at)).unwrap_or(last)
    }

    fn into_targets(self) -> Targets {
        let topics = self.topics;
        let targets = self.owned.into_iter().map(|owned| {
            let partitions = owned.into_iter().flat_map(|(topic, partitions)| {
                partitions.into_iter().map(move |partition| partition_of(&topics[topic], partition))
            });
            partitions.collect()
        });
        (targets.collect(), self.steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(id: u128, partitions: u32) -> WantedTopic {
        WantedTopic { id: TopicId::new(id), name: format!("topic-{id:03}"), partitions, racks: Vec::new() }
    }

    fn member(order: &str, topics: &[usize]) -> Candidate {
        Candidate { order: order.to_owned(), rack: String::new(), topics: topics.to_vec(), current: Vec::new() }
    }

    fn members(count: usize, topics: &[usize]) -> Vec<Candidate> {
        (0..count).map(|number| member(&format!("m-{number:04}"), topics)).collect()
    }

    /// Every partition that somebody wants has one owner, who wants it.
    fn check(assignor: Assignor, topics: &[WantedTopic], members: &[Candidate]) -> Vec<Vec<TopicPartition>> {
        let targets = assign(assignor, topics, members);
        let mut owners: HashMap<TopicPartition, usize> = HashMap::new();
        for (member, target) in targets.iter().enumerate() {
            assert!(target.is_sorted());
            for tp in target {
                assert_eq!(owners.insert(*tp, member), None, "{assignor:?}: two own {tp:?}");
                let topic = topics.iter().position(|topic| topic.id == tp.topic).expect("known");
                assert!(members[member].topics.contains(&topic));
            }
        }
        let wanted = |topic: usize| members.iter().any(|member| member.topics.contains(&topic));
        let all = topics.iter().enumerate().filter(|(topic, _)| wanted(*topic)).map(|(_, topic)| topic.partitions);
        assert_eq!(owners.len() as u32, all.sum::<u32>(), "{assignor:?}");
        targets
    }

    fn counts(targets: &[Vec<TopicPartition>]) -> Vec<usize> {
        targets.iter().map(Vec::len).collect()
    }

    /// Takes `targets` for what the members have.
    fn settle(members: &mut [Candidate], targets: &[Vec<TopicPartition>]) {
        for (member, target) in members.iter_mut().zip(targets) {
            member.current.clone_from(target);
        }
    }

    fn moved(members: &[Candidate], targets: &[Vec<TopicPartition>]) -> usize {
        let lost = |(member, target): (&Candidate, &Vec<TopicPartition>)| {
            member.current.iter().filter(|tp| !target.contains(tp)).count()
        };
        members.iter().zip(targets).map(lost).sum()
    }

    #[test]
    fn shares_are_even_whatever_the_assignor() {
        for assignor in Assignor::ALL {
            for (partitions, count) in [(12, 5), (3, 7), (1, 1), (100, 33), (0, 3)] {
                let targets = check(assignor, &[topic(1, partitions)], &members(count, &[0]));
                let counts = counts(&targets);
                let (least, most) = (counts.iter().min().expect("some"), counts.iter().max().expect("some"));
                assert!(most - least <= 1, "{assignor:?} {partitions} over {count}: {counts:?}");
            }
            check(assignor, &[topic(1, 5)], &[]);
            check(assignor, &[], &members(3, &[]));
        }
    }

    #[test]
    fn range_keeps_equal_numbers_together_and_round_robin_goes_over_all_topics() {
        let topics = [topic(1, 4), topic(2, 4)];
        let numbers = |target: &[TopicPartition]| target.iter().map(|tp| tp.partition.get()).collect::<Vec<_>>();
        let targets = check(Assignor::Range, &topics, &members(3, &[0, 1]));
        assert_eq!(
            targets.iter().map(|target| numbers(target)).collect::<Vec<_>>(),
            [vec![0, 1, 0, 1], vec![2, 2], vec![3, 3]]
        );
        let targets = check(Assignor::RoundRobin, &topics, &members(3, &[0, 1]));
        assert_eq!(counts(&targets), [3, 3, 2]);
        // Members that do not want a topic are passed over.
        let some = [member("a", &[0]), member("b", &[0, 1]), member("c", &[1])];
        assert_eq!(counts(&check(Assignor::RoundRobin, &topics, &some)), [2, 4, 2]);
    }

    #[test]
    fn only_what_must_move_moves() {
        for assignor in [Assignor::Sticky, Assignor::Cooperative] {
            let topics = [topic(1, 60), topic(2, 40)];
            let mut all = members(10, &[0, 1]);
            let targets = check(assignor, &topics, &all);
            settle(&mut all, &targets);
            assert_eq!(moved(&all, &check(assignor, &topics, &all)), 0, "nothing changed");
            // One leaves: what it had is shared out, and nothing else moves.
            let gone = all.remove(4);
            let targets = check(assignor, &topics, &all);
            assert_eq!(moved(&all, &targets), 0, "the others keep what they have");
            assert!(counts(&targets).iter().all(|count| (11..=12).contains(count)), "{:?}", counts(&targets));
            settle(&mut all, &targets);
            // One comes: it gets its share, and no more is moved than that.
            all.push(Candidate { current: Vec::new(), ..gone });
            let targets = check(assignor, &topics, &all);
            assert_eq!(targets[9].len(), 10);
            assert_eq!(moved(&all, &targets), 10);
            settle(&mut all, &targets);
            // A topic grows: nothing moves that is owned.
            let grown = [topic(1, 70), topic(2, 40)];
            let targets = check(assignor, &grown, &all);
            assert_eq!((moved(&all, &targets), counts(&targets)), (0, vec![11; 10]));
        }
    }

    #[test]
    fn members_that_want_different_topics_share_as_evenly_as_they_can() {
        let topics = [topic(1, 6), topic(2, 6)];
        let some = [member("a", &[0]), member("b", &[0, 1]), member("c", &[1]), member("d", &[1])];
        let counts = counts(&check(Assignor::Sticky, &topics, &some));
        assert_eq!(counts.iter().sum::<usize>(), 12);
        assert!(counts.iter().all(|count| (2..=4).contains(count)), "{counts:?}");
    }

    #[test]
    fn racks_decide_among_equals_and_never_against_even_shares() {
        let racks =
            |partitions: u32| (0..partitions).map(|number| vec![["x", "y", "z"][number as usize % 3].to_owned()]);
        let near = |topics: &[WantedTopic], members: &[Candidate], targets: &[Vec<TopicPartition>]| {
            let count = |(member, target): (&Candidate, &Vec<TopicPartition>)| {
                target.iter().filter(|tp| topics[0].racks[tp.partition.get() as usize].contains(&member.rack)).count()
            };
            members.iter().zip(targets).map(count).sum::<usize>()
        };
        let topics = [WantedTopic { racks: racks(30).collect(), ..topic(1, 30) }];
        let mut all = members(3, &[0]);
        for (member, rack) in all.iter_mut().zip(["z", "x", "y"]) {
            member.rack = rack.to_owned();
        }
        let targets = check(Assignor::Cooperative, &topics, &all);
        assert_eq!(counts(&targets), [10, 10, 10]);
        assert_eq!(near(&topics, &all, &targets), 30);
        // All of it is where there is no rack: whoever comes gets what is near to it.
        let mut two = vec![Candidate { rack: String::new(), ..member("a", &[0]) }, member("b", &[0])];
        two[0].current = (0..30).map(|partition| partition_of(&topics[0], partition)).collect();
        two[1].rack = "y".to_owned();
        let targets = check(Assignor::Cooperative, &topics, &two);
        assert_eq!(counts(&targets), [15, 15]);
        assert_eq!(near(&topics, &two, &targets), 10, "all ten of its rack");
    }

    #[test]
    fn the_order_in_which_members_are_given_plays_no_part() {
        let topics = [topic(1, 17), topic(2, 5)];
        for assignor in Assignor::ALL {
            let all = members(6, &[0, 1]);
            let mut turned = all.clone();
            turned.reverse();
            let (mut one, two) = (check(assignor, &topics, &all), check(assignor, &topics, &turned));
            one.reverse();
            assert_eq!(one, two, "{assignor:?}");
        }
    }

    #[test]
    fn a_thousand_members_and_partitions_cost_no_square_of_steps() {
        let topics: Vec<WantedTopic> = (0..10).map(|id| topic(id, 100)).collect();
        let wants: Vec<usize> = (0..10).collect();
        for assignor in Assignor::ALL {
            let mut all = members(1_000, &wants);
            // By topics, one of ten has a partition of each.
            let is_even = |targets: &[Vec<TopicPartition>], share: usize| {
                assignor == Assignor::Range || counts(targets).iter().all(|count| *count == share)
            };
            let (targets, steps) = assign_counted(assignor, &topics, &all);
            assert!(is_even(&targets, 1));
            assert!(steps < 40_000, "{assignor:?} from nothing: {steps} steps");
            settle(&mut all, &targets);
            all.truncate(500);
            let (targets, steps) = assign_counted(assignor, &topics, &all);
            assert!(is_even(&targets, 2));
            assert!(steps < 40_000, "{assignor:?} after half of them left: {steps} steps");
            settle(&mut all, &targets);
            // One had everything, and a thousand come.
            let everything = targets.concat();
            let mut all = members(1_000, &wants);
            all[7].current = everything;
            let (targets, steps) = assign_counted(assignor, &topics, &all);
            assert!(is_even(&targets, 1));
            assert!(steps < 60_000, "{assignor:?} from one to all: {steps} steps");
        }
    }

    #[test]
    fn a_thousand_members_that_all_want_something_else_are_still_shared_out() {
        let topics: Vec<WantedTopic> = (0..100).map(|id| topic(id, 10)).collect();
        let all: Vec<Candidate> = (0..1_000)
            .map(|number: usize| {
                let wants: BTreeSet<usize> = (0..5).map(|turn| (number * 31 + turn * (number % 7 + 1)) % 100).collect();
                Candidate { topics: wants.into_iter().collect(), ..member(&format!("m-{number:04}"), &[]) }
            })
            .collect();
        check(Assignor::Cooperative, &topics, &all);
        let (_, steps) = assign_counted(Assignor::Cooperative, &topics, &all);
        assert!(steps < 1_000_000, "{steps} steps");
    }
}
