//! Three replicas of one group, through the same step as one: messages are lost, reordered and late, processes die and the
//! power fails, flushes and votes are slow. What was acknowledged survives any minority, and all logs end up the same.
//!
//! There is no transport yet, nor a snapshot: logs keep all their entries here.

mod ledger;
mod shell;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::{BatchHeader, Offset, ReplicaId, Term, Timestamp};
use flowstone_replication::{Acks, Event, LogConfig, PeerBody, PeerMessage, Produced, Role};
use flowstone_storage::sim_disk::Crash;
use flowstone_storage::{HardState, SimDisk};
use ledger::{Ledger, batch};
use shell::{Answer, Shell, config, create, produce};
use tokio::sync::oneshot::error::TryRecvError;

const VOTERS: [u64; 3] = [11, 22, 33];
const STEPS: u64 = 6_000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

struct Node {
    id: u64,
    disk: SimDisk,
    dir: PathBuf,
    shell: Shell<Ledger>,
    /// Talks to nobody.
    cut_off: bool,
}

#[derive(Debug, Default)]
struct Seen {
    acknowledged: u64,
    leaders: u64,
    crashes: u64,
    truncations: u64,
}

struct Group {
    random: Random,
    nodes: Vec<Node>,
    on_the_way: Vec<PeerMessage>,
    waiting: Vec<((i64, i32), Answer<Produced>)>,
    sent: BTreeMap<(i64, i32), Bytes>,
    acknowledged: BTreeMap<(i64, i32), Offset>,
    led_by: BTreeMap<Term, u64>,
    next_sequence: i32,
    seen: Seen,
}

fn open(disk: &SimDisk, dir: &Path, id: u64, hard_state: Option<HardState>, random: &mut Random) -> Shell<Ledger> {
    let mut config = config(id);
    config.seed = random.next();
    let log = LogConfig { segment_bytes: 1 << 20, zero_ahead_bytes: 4 << 10, ..LogConfig::default() };
    let mut shell = Shell::open(&disk.shared(), dir, log, hard_state, Ledger::default(), config)
        .unwrap_or_else(|error| panic!("replica {id} opens again: {error}"));
    shell.holds_flushes = true;
    shell.holds_hard_states = true;
    shell.holds_checkpoints = true;
    shell
}

impl Group {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let nodes = VOTERS
            .iter()
            .map(|&id| {
                let disk = SimDisk::new(seed ^ id);
                let dir = PathBuf::from("/data/replica");
                create(&disk.shared(), &dir, id, &VOTERS);
                let shell = open(&disk, &dir, id, None, &mut random);
                Node { id, disk, dir, shell, cut_off: false }
            })
            .collect();
        Self {
            random,
            nodes,
            on_the_way: Vec::new(),
            waiting: Vec::new(),
            sent: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            led_by: BTreeMap::new(),
            next_sequence: 0,
            seen: Seen::default(),
        }
    }

    fn step(&mut self, at: usize, event: Event<Ledger>) {
        let node = &mut self.nodes[at];
        let end = node.shell.replica.status().end_offset;
        node.shell.step([event]);
        assert!(node.shell.ended.is_none(), "replica {} ended: {:?}", node.id, node.shell.ended);
        let status = node.shell.replica.status();
        self.seen.truncations += u64::from(status.end_offset < end);
        if matches!(status.role, Role::Leader | Role::Elected) {
            let leader = *self.led_by.entry(status.term).or_insert(node.id);
            assert_eq!(leader, node.id, "two leaders in term {}", status.term);
        }
        self.on_the_way.append(&mut node.shell.sent);
    }

    fn work(&mut self, at: usize) {
        let shell = &mut self.nodes[at].shell;
        let event = match self.random.below(3) {
            0 => shell.run_flush(),
            1 => shell.run_hard_state(),
            _ => shell.run_checkpoint(),
        };
        if let Some(event) = event {
            self.step(at, event);
        }
    }

    fn deliver(&mut self) {
        if self.on_the_way.is_empty() {
            return;
        }
        // Mostly in order, else whatever comes.
        let which = if self.random.one_in(4) { self.random.below(self.on_the_way.len() as u64) as usize } else { 0 };
        let message = self.on_the_way.remove(which);
        let place = |id: ReplicaId| VOTERS.iter().position(|&voter| voter == id.get()).expect("one of the three");
        let (from, to) = (place(message.from), place(message.to));
        let lost = self.nodes[from].cut_off || self.nodes[to].cut_off || self.random.one_in(50);
        if !lost {
            if self.random.one_in(50) {
                self.on_the_way.push(message.clone());
            }
            self.step(to, Event::Peer(message));
        }
    }

    fn crash(&mut self, at: usize) {
        self.seen.crashes += 1;
        let kind = if self.random.one_in(2) { Crash::Power } else { Crash::Process };
        let node = &mut self.nodes[at];
        let hard_state = node.shell.hard_state;
        node.disk.restart(kind);
        node.shell = open(&node.disk, &node.dir, node.id, hard_state, &mut self.random);
    }

    fn write(&mut self, at: usize) {
        let key = if self.random.one_in(5) && self.next_sequence > 0 {
            (7, self.random.below(self.next_sequence as u64) as i32)
        } else {
            self.next_sequence += 1;
            (7, self.next_sequence - 1)
        };
        let (bytes, header) = batch(key.0, key.1, 1, 60);
        self.sent.insert(key, bytes.clone());
        let (event, answer) = produce((bytes, header), Acks::Quorum);
        self.waiting.push((key, answer));
        self.step(at, event);
    }

    fn collect(&mut self) {
        for (key, mut answer) in std::mem::take(&mut self.waiting) {
            match answer.try_recv() {
                Ok(Ok(produced)) => {
                    self.seen.acknowledged += 1;
                    let before = *self.acknowledged.entry(key).or_insert(produced.base_offset);
                    assert_eq!(before, produced.base_offset, "{key:?} is acknowledged at one offset");
                }
                Ok(Err(error)) => assert!(error.is_retriable(), "{error}"),
                Err(TryRecvError::Empty) => self.waiting.push((key, answer)),
                // Its leader crashed.
                Err(TryRecvError::Closed) => {}
            }
        }
    }

    fn leader(&self) -> Option<usize> {
        (0..3)
            .filter(|&at| self.nodes[at].shell.replica.status().role == Role::Leader)
            .max_by_key(|&at| self.nodes[at].shell.replica.status().term)
    }

    fn log_of(&mut self, at: usize) -> BTreeMap<i64, (BatchHeader, Bytes)> {
        let replica = &self.nodes[at].shell.replica;
        let (first, last) = (replica.log().first_index().get(), replica.log().committed_index().get());
        let mut shell = open_again(&mut self.nodes[at], &mut self.random);
        let log = &mut shell;
        (first..=last)
            .map(|index| {
                let bytes = log.stored_batch(index.into()).expect("a committed entry can be read");
                let (header, batch) = split_batches(bytes).next().expect("one batch").expect("a whole one");
                (header.base_offset.get(), (header, batch))
            })
            .collect()
    }
}

/// Its log, closed and opened by itself: what is on the disk.
fn open_again(node: &mut Node, random: &mut Random) -> flowstone_storage::Log {
    let hard_state = node.shell.hard_state;
    let replica = std::mem::replace(&mut node.shell, {
        // A stand-in, elsewhere, for the one that is taken apart.
        let disk = SimDisk::new(random.next());
        let dir = PathBuf::from("/elsewhere");
        create(&disk.shared(), &dir, node.id, &VOTERS);
        open(&disk, &dir, node.id, None, random)
    })
    .replica;
    let config = replica.log().config().clone();
    drop(replica.into_log().close());
    let flushed = hard_state.map_or(flowstone_storage::checkpoint::CREATION_INDEX, |state| state.flushed);
    flowstone_storage::Log::open(node.disk.shared(), &node.dir, config, flushed, Timestamp::new(0)).expect("it opens")
}

/// `stormy`: elections all the time, crashes right after votes, next to no writing.
fn run(seed: u64, stormy: bool) -> Seen {
    let mut group = Group::new(seed);
    for _ in 0..STEPS {
        let at = group.random.below(3) as usize;
        let what = group.random.below(100);
        if stormy {
            match what {
                0..20 => group.step(at, Event::Tick),
                20..60 => group.deliver(),
                60..90 => group.work(at),
                90..92 => group.crash(at),
                92..95 => {
                    if let Some(leader) = group.leader() {
                        group.write(leader);
                    }
                }
                _ => {}
            }
            group.collect();
            continue;
        }
        match what {
            0..12 => group.step(at, Event::Tick),
            12..50 => group.deliver(),
            50..80 => group.work(at),
            80..95 => {
                if let Some(leader) = group.leader() {
                    group.write(leader);
                }
            }
            95 => {
                let count = group.nodes.iter().filter(|node| node.cut_off).count();
                let node = &mut group.nodes[at];
                node.cut_off = !node.cut_off && count == 0;
            }
            96 if group.random.one_in(3) => group.crash(at),
            97 => group.step(at, Event::CheckpointNow),
            _ => {}
        }
        group.collect();
    }

    // Everything heals: one of them leads, and all of them agree.
    for node in &mut group.nodes {
        node.cut_off = false;
        node.shell.holds_flushes = false;
        node.shell.holds_hard_states = false;
        node.shell.holds_checkpoints = false;
    }
    let mut healed = false;
    for _ in 0..2_000 {
        for at in 0..3 {
            group.nodes[at].shell.work();
            group.step(at, Event::Tick);
        }
        while !group.on_the_way.is_empty() {
            group.deliver();
        }
        group.collect();
        let marks: Vec<_> = group
            .nodes
            .iter()
            .map(|node| (node.shell.replica.status().high_watermark, node.shell.replica.status().end_offset))
            .collect();
        healed = group.leader().is_some() && marks.iter().all(|mark| *mark == marks[0] && mark.0 == mark.1);
        if healed {
            break;
        }
    }
    assert!(healed, "seed {seed}: it does not heal");
    group.seen.leaders = group.led_by.len() as u64;
    let logs: Vec<_> = (0..3).map(|at| group.log_of(at)).collect();
    assert!(logs[0] == logs[1] && logs[1] == logs[2], "seed {seed}: the logs differ");
    for (key, offset) in &group.acknowledged {
        let (header, stored) = logs[0]
            .get(&offset.get())
            .unwrap_or_else(|| panic!("seed {seed}: {key:?}, acknowledged at {offset}, is lost"));
        assert_eq!((header.producer_id.get(), header.base_sequence.get()), *key, "seed {seed}: at {offset}");
        assert_eq!(stored[16..], group.sent[key][16..], "seed {seed}: other bytes at {offset}");
    }
    group.seen
}

#[test]
fn a_group_of_three_goes_through_the_same_step() {
    let mut all = Seen::default();
    for seed in 0..25 {
        let seen = run(seed, false);
        all.acknowledged += seen.acknowledged;
        all.leaders += seen.leaders;
        all.crashes += seen.crashes;
        all.truncations += seen.truncations;
    }
    assert!(all.acknowledged > 1_000 && all.leaders > 50 && all.crashes > 200 && all.truncations > 10, "{all:?}");
}

#[test]
fn votes_survive_whatever_comes_right_after_them() {
    let seen: Vec<_> = (0..25).map(|seed| run(seed, true)).collect();
    let leaders: u64 = seen.iter().map(|seen| seen.leaders).sum();
    let crashes: u64 = seen.iter().map(|seen| seen.crashes).sum();
    assert!(leaders > 300 && crashes > 2_000, "{leaders} leaders, {crashes} crashes");
}

#[test]
fn a_vote_is_told_when_it_is_flushed_and_only_once_in_a_term() {
    let mut group = Group::new(1);
    let ask = |from: u64| PeerMessage {
        from: ReplicaId::new(from),
        to: ReplicaId::new(VOTERS[0]),
        term: Term::new(5),
        body: PeerBody::Vote {
            pre: false,
            last_index: 9.into(),
            last_term: Term::new(4),
            commit: 1.into(),
            commit_term: Term::new(1),
            transfer: false,
        },
    };
    group.step(0, Event::Peer(ask(VOTERS[1])));
    assert!(group.on_the_way.is_empty(), "a crash now would forget it");
    let event = group.nodes[0].shell.run_hard_state().expect("the vote is to be flushed");
    group.step(0, event);
    let told = group.on_the_way.pop().expect("flushed, it is told");
    assert!(matches!(told.body, PeerBody::VoteResponse { pre: false, reject: false, .. }), "{told:?}");

    group.crash(0);
    group.step(0, Event::Peer(ask(VOTERS[2])));
    let told = group.on_the_way.pop().expect("nothing new to flush");
    assert!(matches!(told.body, PeerBody::VoteResponse { reject: true, .. }), "{told:?}");
}
