//! Groups at rest are spoken for together, and wake when they should: three brokers' shards in one thread, with a clock and a
//! network of the test's own.

mod ledger;
mod manual;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flowstone_protocol::{
    BrokerId, DirectoryId, Error, ErrorCode, Offset, PartitionId, ReplicaId, Timestamp, TopicId, TopicPartition,
};
use flowstone_replication::{
    Acks, FlushMode, GroupMessage, LogConfig, ManualShards, PeerBody, PeerTransport, Permit, Produced, PullAnswer,
    PullRequest, ReplicaHandle, ReplicaSpec, Reply, RetentionConfig, Role, ShardsConfig, Start,
};
use flowstone_storage::{DataDir, Disk, SimDisk};
use ledger::{Ledger, batch};
use manual::Jobs;
use tokio::sync::oneshot;

const BROKERS: usize = 3;
const GROUPS: usize = 12;
const TICK: Duration = Duration::from_millis(100);
/// Whatever has to come by itself comes within this many ticks.
const PATIENCE: usize = 300;
/// An election timeout at most, and what an election takes.
const FAILED_OVER_WITHIN: usize = 7 + 1 + 2 * 3 + 4;

/// What was sent in this round.
#[derive(Debug, Default)]
struct Outbox(Mutex<Vec<(BrokerId, Vec<GroupMessage>)>>);

impl PeerTransport for Outbox {
    fn send(&self, to: BrokerId, messages: Vec<GroupMessage>) {
        self.0.lock().unwrap().push((to, messages));
    }

    fn pull(&self, _from: BrokerId, _request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        reply.send(Err(Error::new(ErrorCode::NoLeader, "nothing is pulled here")));
    }
}

struct Running {
    shards: ManualShards<Ledger>,
    jobs: Arc<Jobs>,
    outbox: Arc<Outbox>,
    handles: Vec<ReplicaHandle<Ledger>>,
}

/// What went over the network.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Sent {
    heartbeats: usize,
    beats: usize,
    all: usize,
}

struct World {
    disks: Vec<SimDisk>,
    brokers: Vec<Option<Running>>,
    shards: usize,
    now: Instant,
    wall: Arc<AtomicI64>,
    /// From whom to whom nothing comes.
    cut: HashSet<(usize, usize)>,
    paused: HashSet<usize>,
    /// What a paused process will find.
    held: BTreeMap<usize, Vec<(usize, Vec<GroupMessage>)>>,
    sent: Sent,
    sequence: i32,
    /// What would tell a follower only that it has all of it, and that it is committed, is lost.
    loses_news_of_commits: bool,
}

fn broker_id(at: usize) -> BrokerId {
    BrokerId::new(at as i32 + 1)
}

fn tp(group: usize) -> TopicPartition {
    TopicPartition::new(TopicId::new(9), PartitionId::new(group as i32))
}

fn replica_id(group: usize, at: usize) -> ReplicaId {
    ReplicaId::new((group * 10 + at + 1) as u64)
}

impl World {
    /// All groups have leaders, on all three brokers, and rest.
    fn at_rest(shards: usize) -> Self {
        let mut world = Self {
            disks: (0..BROKERS).map(|at| SimDisk::new(at as u64)).collect(),
            brokers: (0..BROKERS).map(|_| None).collect(),
            shards,
            now: Instant::now(),
            wall: Arc::new(AtomicI64::new(1_700_000_000_000)),
            cut: HashSet::new(),
            paused: HashSet::new(),
            held: BTreeMap::new(),
            sent: Sent::default(),
            sequence: 0,
            loses_news_of_commits: false,
        };
        for at in 0..BROKERS {
            world.start(at);
        }
        world.until_rest();
        world
    }

    fn start(&mut self, at: usize) {
        let disk: Arc<dyn Disk> = self.disks[at].shared();
        let dir = DataDir::open_or_create(disk, Path::new("/data"), DirectoryId::new(at as u128 + 1), 4).unwrap();
        let dir = Arc::new(dir);
        let (jobs, outbox) = (Arc::new(Jobs::default()), Arc::new(Outbox::default()));
        jobs.set_now(self.now);
        let config = ShardsConfig {
            shards: self.shards,
            // Brokers draw their own: the order in which voters stand is the same for all of them nevertheless.
            seed: at as u64,
            inline_flush_bytes_max: 0,
            scrub_bytes_per_second: 0,
            ..ShardsConfig::default()
        };
        let wall = Arc::clone(&self.wall);
        let clock = Arc::new(move || Timestamp::new(wall.load(Ordering::Relaxed)));
        let shards = ManualShards::start(&config, Arc::clone(&dir), clock, jobs.clone(), outbox.clone()).unwrap();
        self.brokers[at] = Some(Running { shards, jobs, outbox, handles: Vec::new() });
        let mut opened = Vec::new();
        for group in 0..GROUPS {
            let peers: Arc<[_]> = (0..BROKERS).map(|at| (replica_id(group, at), broker_id(at))).collect();
            // Which of them stands first goes round.
            let mut voters: Vec<_> = peers.iter().map(|(replica, _)| *replica).collect();
            voters.rotate_left(group % BROKERS);
            let spec = ReplicaSpec {
                tp: tp(group),
                replica: replica_id(group, at),
                dir: dir.replica_dir(tp(group)),
                log: LogConfig::default(),
                flush: FlushMode::Quorum,
                retention: RetentionConfig::default(),
                internal: false,
                max_message_bytes: 1 << 20,
                peers,
                start: Start::FirstVoter { voters: voters.into() },
            };
            let (sender, receiver) = oneshot::channel();
            self.brokers[at].as_ref().unwrap().shards.shards().open(spec, Ledger::default(), Reply::from(sender));
            opened.push(receiver);
        }
        self.deliver();
        let running = self.brokers[at].as_mut().unwrap();
        running.handles =
            opened.into_iter().map(|mut opened| opened.try_recv().expect("answered").expect("opened")).collect();
    }

    /// What a kill leaves: the others notice nothing by themselves.
    fn kill(&mut self, at: usize) {
        self.brokers[at] = None;
        self.held.remove(&at);
    }

    /// Everything that can happen without time going by.
    fn deliver(&mut self) {
        loop {
            let mut any = false;
            // Side by side: what is sent in a round arrives in the next.
            let mut arriving = Vec::new();
            for at in 0..BROKERS {
                if self.paused.contains(&at) {
                    continue;
                }
                let Some(running) = &mut self.brokers[at] else { continue };
                for (from, messages) in self.held.remove(&at).into_iter().flatten() {
                    running.shards.shards().deliver(broker_id(from), messages);
                }
                running.shards.round(self.now);
                // Jobs of a round are done in its order.
                running.jobs.run();
                any |= running.shards.is_waiting();
                let outgoing = std::mem::take(&mut *running.outbox.0.lock().unwrap());
                for (to, mut messages) in outgoing {
                    let to = (to.get() - 1) as usize;
                    if self.loses_news_of_commits {
                        let is_news =
                            |body: &PeerBody| matches!(body, PeerBody::Append { entries, .. } if entries.is_empty());
                        messages.retain(|message| !is_news(&message.message.body));
                    }
                    self.sent.all += messages.len();
                    for message in &messages {
                        match message.message.body {
                            PeerBody::Heartbeat { .. } => self.sent.heartbeats += 1,
                            PeerBody::Beat(_) => self.sent.beats += 1,
                            _ => {}
                        }
                    }
                    if !self.cut.contains(&(at, to)) && self.brokers[to].is_some() {
                        arriving.push((to, (at, messages)));
                    }
                }
            }
            for (to, messages) in arriving {
                self.held.entry(to).or_default().push(messages);
            }
            any |= self.held.keys().any(|at| !self.paused.contains(at));
            if !any {
                return;
            }
        }
    }

    fn tick(&mut self) {
        self.now += TICK;
        self.wall.fetch_add(TICK.as_millis() as i64, Ordering::Relaxed);
        for running in self.brokers.iter().flatten() {
            running.jobs.set_now(self.now);
        }
        self.deliver();
    }

    /// Ticks until it is so; how many it took.
    #[track_caller]
    fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) -> usize {
        for ticks in 0..PATIENCE {
            if is_so(self) {
                return ticks;
            }
            self.tick();
        }
        let roles: Vec<_> = (0..GROUPS).map(|group| self.roles(group)).collect();
        panic!("waited in vain: {what}: {roles:?}");
    }

    fn roles(&self, group: usize) -> Vec<Option<(Role, u64)>> {
        let status = |running: &Running| running.handles.get(group).map(|handle| handle.status());
        self.brokers
            .iter()
            .map(|it| it.as_ref().and_then(status).map(|status| (status.role, status.term.get())))
            .collect()
    }

    /// Who leads: of several that say so, the one of the latest term.
    fn leader(&self, group: usize) -> Option<usize> {
        let roles = self.roles(group).into_iter().enumerate();
        roles
            .filter_map(|(at, it)| it.filter(|(role, _)| *role == Role::Leader).map(|(_, term)| (term, at)))
            .max()
            .map(|(_, at)| at)
    }

    fn leaders(&self) -> Vec<Option<usize>> {
        (0..GROUPS).map(|group| self.leader(group)).collect()
    }

    fn terms(&self) -> Vec<u64> {
        (0..GROUPS).filter_map(|group| self.roles(group).into_iter().flatten().map(|(_, term)| term).max()).collect()
    }

    /// Ticks until every group has a leader, and only beats are sent.
    #[track_caller]
    fn until_rest(&mut self) {
        for _ in 0..PATIENCE {
            self.sent = Sent::default();
            for _ in 0..12 {
                self.tick();
            }
            if self.sent.heartbeats == 0 && self.leaders().iter().all(Option::is_some) {
                assert!(self.sent.beats > 0);
                return;
            }
        }
        panic!("they do not come to rest: {:?}, {:?}", self.sent, self.leaders());
    }

    fn groups_of(&self, leader: usize) -> Vec<usize> {
        (0..GROUPS).filter(|&group| self.leader(group) == Some(leader)).collect()
    }

    fn produce(&mut self, group: usize, at: usize) -> oneshot::Receiver<Result<Produced, Error>> {
        let (bytes, header) = batch(1, self.sequence, 1, 100);
        self.sequence += 1;
        let (sender, receiver) = oneshot::channel();
        let handle = &self.brokers[at].as_ref().unwrap().handles[group];
        handle.produce(bytes, header, Acks::Quorum, Permit::unbounded(), Reply::from(sender));
        receiver
    }

    fn ends(&self, group: usize) -> Vec<Offset> {
        self.brokers.iter().flatten().map(|running| running.handles[group].status().high_watermark).collect()
    }
}

#[test]
fn beats_take_the_place_of_all_heartbeats() {
    for shards in [1, 3] {
        let mut world = World::at_rest(shards);
        let (leaders, terms) = (world.leaders(), world.terms());
        assert!((0..BROKERS).all(|at| leaders.contains(&Some(at))), "{leaders:?}");
        world.sent = Sent::default();
        for _ in 0..300 {
            world.tick();
        }
        // One per pair of shards every three ticks, and an answer to each; there may be pairs without a group.
        let sent = world.sent;
        assert_eq!(sent.heartbeats, 0, "{sent:?}");
        assert!(sent.beats <= 101 * 6 * shards * shards && sent.beats >= 99 * 6, "{sent:?}");
        assert!(sent.all <= 2 * sent.beats + BROKERS, "{sent:?}");
        assert_eq!((world.leaders(), world.terms()), (leaders, terms), "nobody stood for election");
    }
}

#[test]
fn one_that_is_written_to_as_it_comes_back_stays_until_all_know_what_is_committed() {
    let mut world = World::at_rest(1);
    let leader = world.leader(0).unwrap();
    for (phase, quiet) in (0..3).flat_map(|phase| (0..20).map(move |quiet| (phase, quiet))) {
        for _ in 0..phase {
            world.tick();
        }
        drop(world.produce(0, leader));
        for _ in 0..quiet {
            world.tick();
        }
        world.loses_news_of_commits = true;
        let produced = world.produce(0, leader);
        world.tick();
        world.loses_news_of_commits = false;
        world.until_rest();
        let end = produced.blocking_recv().unwrap().unwrap().base_offset.next();
        assert_eq!(world.ends(0), [end; BROKERS], "written to after {quiet} quiet ticks");
    }
}

#[test]
fn one_that_is_written_to_leaves_and_comes_back_and_the_others_stay() {
    let mut world = World::at_rest(1);
    let leader = world.leader(0).unwrap();
    for _ in 0..5 {
        world.sent = Sent::default();
        let answer = world.produce(0, leader);
        world.deliver();
        let written = answer.blocking_recv().unwrap().unwrap().base_offset;
        world.until("all know that it is committed", |world| world.ends(0).iter().all(|end| *end > written));
        for _ in 0..6 {
            world.tick();
        }
        // Its own, to two followers.
        assert!((1..=6).contains(&world.sent.heartbeats), "{:?}", world.sent);
        world.until_rest();
    }
    assert_eq!(world.leader(0), Some(leader));
}

#[test]
fn a_broker_that_dies_silently_is_replaced_in_all_its_groups() {
    let mut world = World::at_rest(2);
    for killed in [1, 0, 2, 1, 0, 2] {
        let terms = world.terms();
        let groups = world.groups_of(killed);
        world.kill(killed);
        let took = world.until("others lead", |world| {
            groups.iter().all(|&group| world.leader(group).is_some_and(|leader| leader != killed))
        });
        assert!(groups.is_empty() || (7..=FAILED_OVER_WITHIN).contains(&took), "{took} ticks");
        for (group, (after, before)) in world.terms().iter().zip(&terms).enumerate() {
            // The others' groups are left alone, and nowhere is a vote split.
            assert_eq!(*after, before + u64::from(groups.contains(&group)), "group {group}");
        }
        world.start(killed);
        world.until_rest();
    }
}

#[test]
fn a_broker_whose_connections_broke_is_replaced_at_once() {
    let mut world = World::at_rest(1);
    let groups = world.groups_of(1);
    world.kill(1);
    for running in world.brokers.iter().flatten() {
        running.shards.shards().unreachable(broker_id(1));
        running.shards.shards().peer_gone(broker_id(1));
    }
    let took = world.until("others lead", |world| {
        groups.iter().all(|&group| world.leader(group).is_some_and(|leader| leader != 1))
    });
    assert!(took <= 6, "{took} ticks");
}

#[test]
fn a_leader_that_is_heard_and_hears_nobody_steps_down() {
    let mut world = World::at_rest(1);
    let groups = world.groups_of(0);
    world.cut.extend([(1, 0), (2, 0)]);
    let took = world.until("it steps down", |world| {
        groups.iter().all(|&group| world.roles(group)[0].is_some_and(|(role, _)| role != Role::Leader))
    });
    assert!(took <= 2 * 7 + 2, "{took} ticks");
    world.until("others lead", |world| {
        groups.iter().all(|&group| world.leader(group).is_some_and(|leader| leader != 0))
    });
    world.cut.clear();
    world.until_rest();
}

#[test]
fn a_leader_that_nobody_hears_is_replaced() {
    let mut world = World::at_rest(1);
    let groups = world.groups_of(0);
    world.cut.extend([(0, 1), (0, 2)]);
    let took = world.until("others lead", |world| {
        groups.iter().all(|&group| world.leader(group).is_some_and(|leader| leader != 0))
    });
    assert!(took <= FAILED_OVER_WITHIN, "{took} ticks");
    world.cut.clear();
    world.until_rest();
}

#[test]
fn one_follower_that_is_cut_off_changes_nothing_and_is_taken_in_again() {
    let mut world = World::at_rest(1);
    let groups = world.groups_of(0);
    let terms = world.terms();
    world.cut.extend([(0, 2), (2, 0)]);
    for _ in 0..60 {
        world.tick();
    }
    for &group in &groups {
        assert_eq!((world.leader(group), world.terms()[group]), (Some(0), terms[group]), "pre-votes are refused");
    }
    world.cut.clear();
    world.until_rest();
    assert!(groups.iter().all(|&group| world.terms()[group] == terms[group]));
}

#[test]
fn a_follower_that_is_restarted_is_taken_in_again() {
    let mut world = World::at_rest(1);
    let groups = world.groups_of(0);
    let terms = world.terms();
    world.kill(2);
    world.start(2);
    // Sessions that it knows nothing of end, and begin anew.
    world.until_rest();
    for group in groups {
        assert_eq!((world.leader(group), world.terms()[group]), (Some(0), terms[group]));
    }
}

#[test]
fn a_leader_that_is_restarted_does_not_keep_its_followers_waiting() {
    let mut world = World::at_rest(1);
    let groups = world.groups_of(0);
    world.kill(0);
    world.start(0);
    let took = world.until("somebody leads", |world| groups.iter().all(|&group| world.leader(group).is_some()));
    assert!(took <= FAILED_OVER_WITHIN, "{took} ticks");
    world.until_rest();
}

#[test]
fn a_leader_that_was_stopped_acknowledges_nothing_when_it_goes_on() {
    let mut world = World::at_rest(1);
    let groups = world.groups_of(0);
    world.paused.insert(0);
    world.until("others lead", |world| {
        groups.iter().all(|&group| world.leader(group).is_some_and(|leader| leader != 0))
    });
    let answers: Vec<_> = groups.iter().map(|&group| world.produce(group, 0)).collect();
    let reads: Vec<_> = groups
        .iter()
        .map(|&group| {
            let (sender, receiver) = oneshot::channel();
            world.brokers[0].as_ref().unwrap().handles[group].read_index(Reply::from(sender));
            receiver
        })
        .collect();
    world.paused.clear();
    for _ in 0..30 {
        world.tick();
    }
    for answer in answers {
        assert!(answer.blocking_recv().unwrap().is_err(), "acknowledged by one that does not lead");
    }
    for read in reads {
        assert!(read.blocking_recv().unwrap().is_err(), "answered by one that does not lead");
    }
    world.until_rest();
}

#[test]
fn a_leader_at_rest_knows_what_is_committed() {
    let mut world = World::at_rest(1);
    let leader = world.leader(3).unwrap();
    let (sender, receiver) = oneshot::channel();
    world.brokers[leader].as_ref().unwrap().handles[3].read_index(Reply::from(sender));
    world.deliver();
    assert!(receiver.blocking_recv().unwrap().is_ok());
    // Cut off it does not, though it rests.
    world.until_rest();
    for other in (0..BROKERS).filter(|&other| other != leader) {
        world.cut.extend([(leader, other), (other, leader)]);
    }
    let (sender, receiver) = oneshot::channel();
    world.brokers[leader].as_ref().unwrap().handles[3].read_index(Reply::from(sender));
    for _ in 0..30 {
        world.tick();
    }
    assert!(receiver.blocking_recv().unwrap().is_err());
}

#[test]
fn lost_beats_cost_nothing_but_heartbeats() {
    let mut world = World::at_rest(1);
    let (leaders, terms) = (world.leaders(), world.terms());
    for round in 0..20 {
        // One beat of broker 0, or one answer to it, is lost.
        world.sent = Sent::default();
        let cut = if round % 2 == 0 { (0, 1) } else { (1, 0) };
        world.cut.insert(cut);
        while world.sent.beats == 0 {
            world.tick();
        }
        world.cut.clear();
        world.until_rest();
    }
    assert_eq!((world.leaders(), world.terms()), (leaders, terms), "nobody stood for election");
}
