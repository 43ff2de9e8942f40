//! How a run is set up: drawn from its seed, or written down by a scenario.

use std::time::Duration;

use flowstone_protocol::{TopicId, TopicPartition};
use flowstone_storage::RetentionConfig;

use super::groups::Kind;
use super::network::Weather;
use super::random::Random;

/// What can go wrong. Each is one kind of fault of the table in the project's guarantees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A process is killed.
    Kill,
    /// The power of one broker fails.
    PowerOff,
    /// A majority is killed, or all are; perhaps with the power.
    KillMany,
    /// A broker crashes in the middle of one of its next operations on the disk.
    CrashSoon,
    /// A broker is stopped cleanly and started again.
    Stop,
    /// A process is paused (SIGSTOP) and goes on later.
    Pause,
    /// A leader alone on its side.
    CutLeader,
    /// Two halves.
    CutHalves,
    /// Each reaches its neighbours only.
    CutRing,
    /// One broker reaches both sides, which do not reach each other.
    CutBridge,
    /// One direction between two brokers.
    CutOneWay,
    /// The clients do not reach one broker.
    CutClients,
    /// A wall clock jumps.
    ClockJump,
    /// A disk runs full.
    DiskFull,
    /// An operation on a disk fails.
    DiskFault,
    /// Flushes take ten seconds.
    SlowDisk,
    /// A bit flips in a file of a broker that is down, or in a sealed segment of one that runs.
    Rot,
    /// A disk is replaced by an empty one.
    Wipe,
    /// A replica is moved to another broker.
    Move,
    /// Such a move is called off.
    CancelMove,
    /// Leadership is handed over.
    Transfer,
    /// The log start is moved.
    Trim,
    /// The leader is gone for a moment, calls for votes come late and again, and whoever gives its vote loses its power.
    CrashVoter,
    /// A replica is moved away from a broker that hears nothing of it, and another one restarts on its side.
    MoveBehind,
    /// What a majority of a partition's replicas had is gone for good.
    LoseMajority,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 25] = [
        Self::Kill,
        Self::PowerOff,
        Self::KillMany,
        Self::CrashSoon,
        Self::Stop,
        Self::Pause,
        Self::CutLeader,
        Self::CutHalves,
        Self::CutRing,
        Self::CutBridge,
        Self::CutOneWay,
        Self::CutClients,
        Self::ClockJump,
        Self::DiskFull,
        Self::DiskFault,
        Self::SlowDisk,
        Self::Rot,
        Self::Wipe,
        Self::Move,
        Self::CancelMove,
        Self::Transfer,
        Self::Trim,
        Self::CrashVoter,
        Self::MoveBehind,
        Self::LoseMajority,
    ];

    /// Its name, as it is written on a command line.
    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Everything random follows from it.
    pub seed: u64,
    /// Brokers.
    pub brokers: usize,
    /// Partitions.
    pub groups: usize,
    /// Replicas of each, at most as many as brokers.
    pub replicas: usize,
    /// Idempotent producers of each partition.
    pub producers: usize,
    /// Readers of each partition.
    pub readers: usize,
    /// A producer's pause between two batches, at most.
    pub produce_gap: Duration,
    /// How long faults come.
    pub faulty_for: Duration,
    /// How long it takes until the next fault, on average.
    pub fault_gap: Duration,
    /// Which faults.
    pub faults: Vec<Fault>,
    /// How bad the network is between cuts.
    #[doc(hidden)]
    pub weather: Weather,
    /// Clocks that are fast or slow.
    pub clock_drift: bool,
    /// After how many entries a checkpoint is due.
    pub checkpoint_entries: u64,
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Users' partitions count as written what is in the page cache.
    pub relaxed: bool,
    /// Users' records go when they are this old.
    pub keeps_for: Option<Duration>,
    /// Transactional ids, each used by two producers that fence one another; 0: no coordinator of transactions.
    pub transactional_ids: usize,
    /// Members of a consumer group; 0: no coordinator of groups.
    pub members: usize,
    /// There is a topic of which the last record of each key is kept.
    pub keyed: bool,
    /// All coordinators and the compacted topic are there, and nobody uses them but a scenario.
    pub scripted: bool,
    /// Producers that are idle for so long are forgotten.
    pub producers_kept: Duration,
    /// For so long a group without members keeps its offsets: so long that clocks that jump never make it so old.
    pub offsets_kept: Duration,
    /// Every event is printed.
    pub prints: bool,
}

impl Plan {
    const PRODUCERS_KEPT: Duration = Duration::from_secs(24 * 60 * 60);
    pub(crate) const OFFSETS_KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);

    /// Nothing goes wrong.
    pub fn calm(seed: u64) -> Self {
        Self {
            seed,
            brokers: 3,
            groups: 1,
            replicas: 3,
            producers: 2,
            readers: 2,
            produce_gap: Duration::from_millis(60),
            faulty_for: Duration::ZERO,
            fault_gap: Duration::from_millis(1_500),
            faults: Vec::new(),
            weather: Weather::CALM,
            clock_drift: false,
            checkpoint_entries: 60,
            segment_bytes: 16 << 10,
            relaxed: false,
            keeps_for: None,
            transactional_ids: 0,
            members: 0,
            keyed: false,
            scripted: false,
            producers_kept: Self::PRODUCERS_KEPT,
            offsets_kept: Self::OFFSETS_KEPT,
            prints: false,
        }
    }

    /// What the seed says.
    pub fn drawn(seed: u64) -> Self {
        let mut plan = Self::plain(seed);
        if Random::new(seed, 5).one_in(2) {
            plan.coordinate();
        }
        plan
    }

    /// The same without coordinators, and without a compacted topic.
    pub fn plain(seed: u64) -> Self {
        let mut random = Random::new(seed, 1);
        let brokers = [3, 3, 4, 4, 5][random.index(5)];
        let mut faults = Fault::ALL.to_vec();
        // Some runs have few kinds of faults, so that one kind is looked at closely.
        if random.one_in(3) {
            let kept = 3 + random.index(6);
            while faults.len() > kept {
                faults.swap_remove(random.index(faults.len()));
            }
        }
        Self {
            seed,
            brokers,
            groups: 1 + random.index(2),
            replicas: if brokers == 5 && random.one_in(3) { 5 } else { 3 },
            producers: 1 + random.index(3),
            readers: 2,
            produce_gap: Duration::from_millis([40, 80, 160][random.index(3)]),
            faulty_for: Duration::from_secs(10 + random.below(15)),
            fault_gap: Duration::from_millis([400, 1_000, 2_500][random.index(3)]),
            faults,
            weather: Weather::drawn(&mut random),
            clock_drift: random.one_in(3),
            checkpoint_entries: [10, 40, 150][random.index(3)],
            segment_bytes: [4 << 10, 16 << 10, 64 << 10][random.index(3)],
            relaxed: random.one_in(6),
            keeps_for: random.one_in(6).then_some(Duration::from_secs(4)),
            transactional_ids: 0,
            members: 0,
            keyed: false,
            scripted: false,
            producers_kept: Self::PRODUCERS_KEPT,
            offsets_kept: Self::OFFSETS_KEPT,
            prints: false,
        }
    }

    /// Transactions are in it from now on, and perhaps groups and a compacted topic.
    pub fn coordinate(&mut self) {
        if self.transactional_ids > 0 {
            return;
        }
        let mut random = Random::new(self.seed, 4);
        self.transactional_ids = 1 + random.index(2);
        self.members = [0, 2, 3][random.index(3)];
        self.keyed = random.one_in(2);
        // What a partition or a coordinator has lost for good may be half a transaction: then nothing is promised of those.
        self.relaxed = false;
        self.faults.retain(|fault| *fault != Fault::LoseMajority);
        // The new ones cost as much as they take away here.
        self.producers = 1;
        self.produce_gap = self.produce_gap.max(Duration::from_millis(80));
    }

    /// The topics that are made in a run, with their partitions, those of users' records first.
    pub(crate) fn topics(&self) -> Vec<(Kind, i32)> {
        let mut topics = vec![(Kind::Records, self.groups as i32)];
        if self.scripted {
            topics.extend([(Kind::Keyed, 1), (Kind::Transactions, 1), (Kind::Groups, 1)]);
            return topics;
        }
        topics.extend(self.keyed.then_some((Kind::Keyed, 1)));
        topics.extend((self.transactional_ids > 0).then_some((Kind::Transactions, 1)));
        topics.extend((self.members > 0).then_some((Kind::Groups, 1)));
        topics
    }

    /// How many partitions there are, that of the metadata included.
    pub(crate) fn partitions(&self) -> usize {
        self.topics().iter().map(|(_, partitions)| *partitions as usize).sum::<usize>() + 1
    }

    /// Whether a partition's writes count before they are flushed.
    pub(crate) fn is_relaxed(&self, tp: TopicPartition) -> bool {
        self.relaxed && Kind::of(tp.topic) == Kind::Records
    }

    /// What may be deleted of a topic's partitions.
    pub(crate) fn retention(&self, topic: TopicId) -> RetentionConfig {
        match Kind::of(topic) {
            Kind::Records => RetentionConfig { time: self.keeps_for, bytes: None },
            _ => RetentionConfig::default(),
        }
    }
}
