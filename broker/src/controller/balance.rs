//! Evening out: which replicas would better be elsewhere, and who should lead. Plans are made here, and carried out a few
//! moves at a time.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use flowstone_protocol::{BrokerId, TopicId, TopicPartition};

use super::change::PartitionEntry;
use super::commands::PlannedMove;
use super::placement::{Draws, Placement};
use super::table::{METADATA_TOPIC_ID, MetadataTable, Topic};

/// What it takes to empty a broker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Emptied {
    /// At most as many as were asked for.
    pub(crate) moves: Vec<PlannedMove>,
    /// Partitions whose replica no other broker could take.
    pub(crate) stuck: Vec<TopicPartition>,
}

/// Where the replicas of `broker` could go. Partitions that are being moved already are left out.
pub(crate) fn emptied(table: &MetadataTable, broker: BrokerId, moves_max: usize, draws: &mut Draws) -> Emptied {
    let mut emptied = Emptied::default();
    let mut placement = Placement::of(table).without(broker);
    let mut focused: Option<TopicId> = None;
    for (topic, tp, entry) in table.entries() {
        let Some(order) = entry.replicas().iter().position(|place| place.broker == broker) else { continue };
        if entry.is_changing() {
            continue;
        }
        if emptied.moves.len() >= moves_max {
            break;
        }
        if focused.replace(topic.id) != Some(topic.id) {
            placement.focus(topic);
        }
        let from: Vec<BrokerId> = entry.replicas().iter().map(|place| place.broker).collect();
        let kept: Vec<BrokerId> = from.iter().copied().filter(|other| *other != broker).collect();
        match placement.choose(&kept, &from, order == 0, draws) {
            Some(chosen) => {
                let mut to = from.clone();
                to[order] = chosen.broker;
                emptied.moves.push(PlannedMove { topic: topic.name.clone(), tp, from, to });
            }
            None => emptied.stuck.push(tp),
        }
    }
    emptied
}

/// What would even out the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Those that move data first, then those that only name another preferred leader.
    pub(crate) moves: Vec<PlannedMove>,
    /// Partitions that are led by another than their preferred leader, with that one.
    pub(crate) transfers: Vec<(TopicPartition, BrokerId)>,
    /// There is more to move than one plan takes.
    pub(crate) more: bool,
}

/// A partition while the plan is made.
#[derive(Debug)]
struct Planned {
    topic: Arc<Topic>,
    tp: TopicPartition,
    bytes: u64,
    from: Vec<BrokerId>,
    to: Vec<BrokerId>,
}

/// Evens out replicas (racks first, then numbers, the smallest partitions first) and preferred leaders over the brokers
/// that take replicas.
///
/// Partitions that are being moved, or have a replica on a broker that is down, are left alone. At most `moves_max` moves
/// of data come out; none with `leaders_only`. It walks over all partitions more than once: call it with a copy of the
/// table, not under the lock of the published one.
pub(crate) fn plan(
    table: &MetadataTable,
    bytes: &HashMap<TopicPartition, u64>,
    moves_max: usize,
    leaders_only: bool,
) -> Plan {
    let placement = Placement::of(table);
    let able: HashSet<BrokerId> =
        table.brokers().filter(|broker| broker.takes_replicas()).map(|broker| broker.id).collect();
    let is_up = |broker: BrokerId| table.broker(broker).is_some_and(|broker| !broker.fenced);
    let movable =
        |entry: &PartitionEntry| !entry.is_changing() && entry.replicas().iter().all(|place| is_up(place.broker));
    let partitions = table
        .entries()
        // Who votes on the metadata is the operator's choice.
        .filter(|(topic, _, entry)| topic.id != METADATA_TOPIC_ID && movable(entry))
        .map(|(topic, tp, entry)| {
            let from: Vec<BrokerId> = entry.replicas().iter().map(|place| place.broker).collect();
            let bytes = bytes.get(&tp).copied().unwrap_or_default();
            Planned { topic: Arc::clone(topic), tp, bytes, to: from.clone(), from }
        })
        .collect();
    let mut state = State { placement, partitions, able, more: false };
    if !leaders_only {
        let moved = state.spread_racks(moves_max);
        state.even_replicas(moves_max - moved, table);
    }
    state.even_leaders();
    let transfers = state.transfers(table);

    let (mut data, mut orders) = (Vec::new(), Vec::new());
    for Planned { topic, tp, from, to, .. } in state.partitions.into_iter().filter(|planned| planned.from != planned.to)
    {
        let moves_data = to.iter().any(|broker| !from.contains(broker));
        let planned = PlannedMove { topic: topic.name.clone(), tp, from, to };
        if moves_data { data.push(planned) } else { orders.push(planned) }
    }
    data.append(&mut orders);
    Plan { moves: data, transfers, more: state.more }
}

#[derive(Debug)]
struct State {
    placement: Placement,
    partitions: Vec<Planned>,
    able: HashSet<BrokerId>,
    more: bool,
}

impl State {
    /// Replicas by broker that takes any, of all partitions of the table.
    fn counts(&self, table: &MetadataTable) -> BTreeMap<BrokerId, i64> {
        let mut counts: BTreeMap<BrokerId, i64> =
            self.able.iter().map(|broker| (*broker, i64::from(table.load(*broker).replicas))).collect();
        for planned in &self.partitions {
            for broker in planned.from.iter().filter(|broker| !planned.to.contains(broker)) {
                counts.entry(*broker).and_modify(|count| *count -= 1);
            }
            for broker in planned.to.iter().filter(|broker| !planned.from.contains(broker)) {
                counts.entry(*broker).and_modify(|count| *count += 1);
            }
        }
        counts
    }

    /// Replicas beyond the first of each rack.
    fn crowding(&self, brokers: &[BrokerId]) -> usize {
        let racks: HashSet<Option<usize>> = brokers.iter().map(|broker| self.placement.rack(*broker)).collect();
        brokers.len() - racks.len()
    }

    /// Moves one of two replicas in one rack to a rack that has none. Returns the number of moves.
    fn spread_racks(&mut self, moves_max: usize) -> usize {
        let mut draws = Draws::from_seed(0);
        let mut moved = 0;
        for index in 0..self.partitions.len() {
            let to = self.partitions[index].to.clone();
            if self.crowding(&to) == 0 {
                continue;
            }
            let rack = |broker: BrokerId| self.placement.rack(broker);
            // The last of those that share a rack: the preferred leader stays.
            let crowded = (0..to.len()).rev().find(|order| {
                to.iter().enumerate().any(|(other, broker)| other != *order && rack(*broker) == rack(to[*order]))
            });
            let Some(order) = crowded else { continue };
            let kept: Vec<BrokerId> = to.iter().copied().filter(|broker| *broker != to[order]).collect();
            let mut placement = self.placement.clone();
            let Some(chosen) = placement.choose(&kept, &to, order == 0, &mut draws) else { continue };
            let mut better = to.clone();
            better[order] = chosen.broker;
            if self.crowding(&better) >= self.crowding(&to) {
                continue;
            }
            if moved == moves_max {
                self.more = true;
                break;
            }
            self.placement = placement;
            self.partitions[index].to = better;
            moved += 1;
        }
        moved
    }

    /// Moves replicas from brokers with many to brokers with few, until no two differ by more than one or nothing can be
    /// moved between those that do.
    fn even_replicas(&mut self, moves_max: usize, table: &MetadataTable) {
        let mut counts = self.counts(table);
        let mut held: HashMap<BrokerId, Vec<usize>> = HashMap::new();
        let mut of_topic: HashMap<(TopicId, BrokerId), i64> = HashMap::new();
        for (index, planned) in self.partitions.iter().enumerate() {
            for broker in &planned.to {
                held.entry(*broker).or_default().push(index);
                *of_topic.entry((planned.tp.topic, *broker)).or_default() += 1;
            }
        }
        // Pairs between which nothing can be moved: it stays so, as what a broker is given is not moved on.
        let mut hopeless = HashSet::new();
        for moved in 0.. {
            let Some((index, many, few)) = self.next_move(&counts, &held, &of_topic, &mut hopeless) else { return };
            if moved == moves_max {
                self.more = true;
                return;
            }
            let planned = &mut self.partitions[index];
            for broker in planned.to.iter_mut().filter(|broker| **broker == many) {
                *broker = few;
            }
            let topic = planned.tp.topic;
            held.entry(many).or_default().retain(|held| *held != index);
            // Not among what `few` could give away: one move of each partition is enough for one plan.
            for (broker, by) in [(many, -1), (few, 1)] {
                counts.entry(broker).and_modify(|count| *count += by);
                *of_topic.entry((topic, broker)).or_default() += by;
            }
        }
    }

    /// The partition that moves next, from which broker to which.
    fn next_move(
        &self,
        counts: &BTreeMap<BrokerId, i64>,
        held: &HashMap<BrokerId, Vec<usize>>,
        of_topic: &HashMap<(TopicId, BrokerId), i64>,
        hopeless: &mut HashSet<(BrokerId, BrokerId)>,
    ) -> Option<(usize, BrokerId, BrokerId)> {
        let mut order: Vec<(i64, BrokerId)> = counts.iter().map(|(broker, count)| (*count, *broker)).collect();
        order.sort_unstable();
        let here = |topic: TopicId, broker: BrokerId| of_topic.get(&(topic, broker)).copied().unwrap_or_default();
        for (much, many) in order.iter().rev() {
            for (little, few) in order.iter().take_while(|(little, _)| much - little >= 2) {
                debug_assert!(little < much);
                if hopeless.contains(&(*many, *few)) {
                    continue;
                }
                let best = held.get(many).into_iter().flatten().copied();
                let best = best.filter(|index| self.can_move(&self.partitions[*index], *many, *few));
                let best = best.min_by_key(|index| {
                    let Planned { tp, bytes, .. } = &self.partitions[*index];
                    (here(tp.topic, *few) - here(tp.topic, *many), *bytes, *tp)
                });
                if let Some(index) = best {
                    return Some((index, *many, *few));
                }
                hopeless.insert((*many, *few));
            }
        }
        None
    }

    /// Whether a replica may go from one broker to the other: racks are shared by no more replicas than before.
    fn can_move(&self, planned: &Planned, many: BrokerId, few: BrokerId) -> bool {
        let Planned { from, to, .. } = planned;
        // One that was given a replica in this plan is not moved again.
        if to.contains(&few) || to.iter().any(|broker| !from.contains(broker)) {
            return false;
        }
        let is_shared =
            |rack: Option<usize>| to.iter().any(|broker| *broker != many && self.placement.rack(*broker) == rack);
        !is_shared(self.placement.rack(few)) || is_shared(self.placement.rack(many))
    }

    /// Names other preferred leaders where some brokers have more than others. What one broker has too many may reach the
    /// one that has too few through others in between.
    fn even_leaders(&mut self) {
        let mut preferred: BTreeMap<BrokerId, Vec<usize>> =
            self.able.iter().map(|broker| (*broker, Vec::new())).collect();
        for (index, planned) in self.partitions.iter().enumerate() {
            preferred.entry(planned.to[0]).or_default().push(index);
        }
        'next: loop {
            let mut order: Vec<(usize, BrokerId)> =
                preferred.iter().map(|(broker, led)| (led.len(), *broker)).collect();
            order.sort_unstable();
            let least = order.first().map_or(0, |(least, _)| *least);
            for (most, start) in order.into_iter().rev().take_while(|(most, _)| *most >= least + 2) {
                if let Some(path) = self.path_down(&preferred, start, most) {
                    for (index, from, to) in path {
                        let planned = &mut self.partitions[index].to;
                        if let Some(order) = planned.iter().position(|broker| *broker == to) {
                            planned.swap(0, order);
                        }
                        preferred.entry(from).or_default().retain(|led| *led != index);
                        preferred.entry(to).or_default().push(index);
                    }
                    continue 'next;
                }
            }
            return;
        }
    }

    /// Partitions whose preferred leaders would have to change, one after the other, so that `start` has one fewer and one
    /// that has at least two fewer gets one more.
    fn path_down(
        &self,
        preferred: &BTreeMap<BrokerId, Vec<usize>>,
        start: BrokerId,
        most: usize,
    ) -> Option<Vec<(usize, BrokerId, BrokerId)>> {
        let mut came: HashMap<BrokerId, (usize, BrokerId)> = HashMap::new();
        let mut queue = VecDeque::from([start]);
        while let Some(from) = queue.pop_front() {
            for index in preferred.get(&from).into_iter().flatten() {
                for to in &self.partitions[*index].to[1..] {
                    if *to == start || came.contains_key(to) || !self.able.contains(to) {
                        continue;
                    }
                    came.insert(*to, (*index, from));
                    if preferred.get(to).map_or(0, Vec::len) + 2 <= most {
                        let mut path = Vec::new();
                        let mut at = *to;
                        while let Some((index, from)) = came.get(&at) {
                            path.push((*index, *from, at));
                            at = *from;
                        }
                        return Some(path);
                    }
                    queue.push_back(*to);
                }
            }
        }
        None
    }

    fn transfers(&self, table: &MetadataTable) -> Vec<(TopicPartition, BrokerId)> {
        let transfers = self.partitions.iter().filter_map(|planned| {
            let leader = table.partition(planned.tp)?.leader()?.broker;
            let preferred = planned.to[0];
            let could_lead = planned.from.contains(&preferred) && self.able.contains(&preferred);
            (leader != preferred && could_lead).then_some((planned.tp, preferred))
        });
        transfers.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::commands::{MetadataCommand, MovePartition};
    use super::super::testing::Cluster;
    use super::*;

    /// Replicas and preferred leaders of users' topics, by broker.
    fn counts(cluster: &Cluster) -> Vec<(usize, usize)> {
        let brokers = cluster.table().brokers().count();
        let mut counts = vec![(0, 0); brokers];
        for (topic, _, entry) in cluster.table().entries() {
            for (order, place) in entry.replicas().iter().enumerate().filter(|_| !topic.internal) {
                counts[place.broker.get() as usize - 1].0 += 1;
                counts[place.broker.get() as usize - 1].1 += usize::from(order == 0);
            }
        }
        counts
    }

    fn spread(counts: impl Iterator<Item = usize> + Clone) -> usize {
        counts.clone().max().unwrap_or(0) - counts.min().unwrap_or(0)
    }

    fn carry_out(cluster: &mut Cluster, plan: &Plan) {
        for planned in &plan.moves {
            let command = MovePartition {
                topic: planned.topic.clone(),
                partition: planned.tp.partition.get(),
                brokers: planned.to.clone(),
                seed: cluster.draw(),
                validate_only: false,
            };
            cluster.run(MetadataCommand::MovePartition(command)).expect("as planned");
            cluster.finish_moves();
        }
    }

    #[test]
    fn new_brokers_get_their_share_a_few_moves_at_a_time() {
        let mut cluster = Cluster::of(3);
        cluster.create("a", 40, 3);
        cluster.create("b", 7, 1);
        for id in 4..=5 {
            cluster.register(id);
        }
        let mut rounds = 0;
        loop {
            let plan = plan(cluster.table(), &HashMap::new(), 10, false);
            let data = plan.moves.iter().filter(|planned| planned.to.iter().any(|to| !planned.from.contains(to)));
            assert!(data.count() <= 10, "a few at a time");
            if plan.moves.is_empty() {
                break;
            }
            carry_out(&mut cluster, &plan);
            rounds += 1;
            assert!(rounds < 50, "no end");
        }
        let counts = counts(&cluster);
        assert!(rounds > 3, "{rounds} rounds");
        // The metadata's own replicas, on the first three, count as well.
        assert!(spread(counts.iter().map(|(replicas, _)| *replicas)) <= 2, "{counts:?}");
        assert!(spread(counts.iter().map(|(_, preferred)| *preferred)) <= 1, "{counts:?}");
    }

    #[test]
    fn racks_come_first_and_are_never_given_up_for_numbers() {
        let mut cluster = Cluster::of_racks(&["a", "a"]);
        cluster.create("t", 12, 2);
        cluster.register_in(3, "b");
        cluster.register_in(4, "b");
        for _ in 0..10 {
            let plan = plan(cluster.table(), &HashMap::new(), 5, false);
            carry_out(&mut cluster, &plan);
        }
        for (_, tp, entry) in cluster.table().entries().filter(|(topic, ..)| !topic.internal) {
            let racks: HashSet<bool> = entry.replicas().iter().map(|place| place.broker.get() <= 2).collect();
            assert_eq!(racks.len(), 2, "{tp}: {:?}", entry.replicas());
        }
        let counts = counts(&cluster);
        assert!(spread(counts.iter().map(|(replicas, _)| *replicas)) <= 2, "{counts:?}");
    }

    #[test]
    fn replicas_in_one_rack_are_parted_though_all_brokers_have_as_many() {
        let mut cluster = Cluster::of_racks(&["a", "a", "b", "b"]);
        cluster.create_on("t", &[&[1, 2], &[4, 3]]);
        assert_eq!(plan(cluster.table(), &HashMap::new(), 0, false).moves, [], "no more than may be moved");
        let plan = plan(cluster.table(), &HashMap::new(), 9, false);
        assert_eq!(plan.moves.len(), 2);
        for planned in &plan.moves {
            assert_eq!(planned.to[0], planned.from[0], "the preferred leader stays");
            assert_ne!(planned.to[0].get() <= 2, planned.to[1].get() <= 2, "{planned:?}");
        }
    }

    #[test]
    fn a_small_rack_holds_more_than_its_share() {
        let mut cluster = Cluster::of_racks(&["a", "a", "b"]);
        cluster.create("t", 12, 2);
        assert_eq!(counts(&cluster)[2].0, 12);
        let plan = plan(cluster.table(), &HashMap::new(), 9, false);
        let in_small = BrokerId::new(3);
        assert!(plan.moves.iter().all(|planned| planned.to.contains(&in_small)), "{:?}", plan.moves);
    }

    #[test]
    fn the_smallest_partitions_move_first() {
        let mut cluster = Cluster::of(1);
        cluster.create("t", 4, 1);
        cluster.register(2);
        let topic = cluster.topic("t");
        let bytes: HashMap<TopicPartition, u64> =
            topic.entries().map(|(tp, _)| (tp, [50, 10, 40, 20][tp.partition.get() as usize])).collect();
        let plan = plan(cluster.table(), &bytes, 9, false);
        let mut moved: Vec<u64> = plan.moves.iter().map(|planned| bytes[&planned.tp]).collect();
        moved.sort_unstable();
        assert_eq!(moved, [10, 20]);
    }

    #[test]
    fn leaders_alone_are_evened_without_moving_data() {
        let mut cluster = Cluster::of(3);
        cluster.create("t", 9, 3);
        // All led by one broker, which is also preferred everywhere.
        let topic = cluster.topic("t");
        for (tp, entry) in topic.entries() {
            let mut brokers: Vec<BrokerId> = entry.replicas().iter().map(|place| place.broker).collect();
            brokers.sort_unstable();
            let command = MovePartition {
                topic: "t".to_owned(),
                partition: tp.partition.get(),
                brokers,
                seed: 0,
                validate_only: false,
            };
            cluster.run(MetadataCommand::MovePartition(command)).expect("another order");
            cluster.lead(tp, 1, 1);
        }
        assert_eq!(counts(&cluster).iter().map(|(_, preferred)| *preferred).collect::<Vec<_>>(), [9, 0, 0]);
        let plan = plan(cluster.table(), &HashMap::new(), 10, true);
        assert_eq!(plan.moves.len(), 6);
        assert_eq!(plan.transfers.len(), 6, "{:?}", plan.transfers);
        carry_out(&mut cluster, &plan);
        assert_eq!(counts(&cluster), [(9, 3); 3]);
    }

    #[test]
    fn leaders_reach_a_broker_through_others() {
        // Brokers 1 and 3 share no partition: what 1 has too many goes to 2, and what 2 has then to 3.
        let mut cluster = Cluster::of(3);
        for (name, brokers) in
            [("a", [1, 2]), ("b", [1, 2]), ("c", [1, 2]), ("d", [2, 3]), ("e", [2, 3]), ("f", [2, 3])]
        {
            cluster.create_on(name, &[&brokers]);
        }
        let plan = plan(cluster.table(), &HashMap::new(), 0, true);
        carry_out(&mut cluster, &plan);
        assert_eq!(counts(&cluster).iter().map(|(_, preferred)| *preferred).collect::<Vec<_>>(), [2, 2, 2]);
    }

    #[test]
    fn nothing_is_moved_from_under_a_broker_that_is_down_or_to_one() {
        let mut cluster = Cluster::of(3);
        cluster.create("t", 12, 2);
        cluster.fence(3);
        cluster.register(4);
        let plan = plan(cluster.table(), &HashMap::new(), 100, false);
        let down = BrokerId::new(3);
        assert!(plan.moves.iter().all(|planned| !planned.from.contains(&down) && !planned.to.contains(&down)));
        assert!(!plan.moves.is_empty());
    }
}
