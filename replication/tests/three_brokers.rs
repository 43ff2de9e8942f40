//! Three brokers' shards, with threads and real disks, and a network in memory: fail-over, changes of members, falling
//! behind and catching up, starting with nothing, recovering from the loss of a majority.

mod ledger;
mod shell;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use flowstone_protocol::{
    BatchHeader, BrokerId, Compression, DirectoryId, Error, ErrorCode, Offset, PartitionId, ProducerEpoch, ProducerId,
    RecordBatchBuilder, ReplicaId, Sequence, Timestamp, TopicId, TopicPartition,
};
use flowstone_replication::membership_plan::{PlanStep, next_step};
use flowstone_replication::{
    Acks, FlushMode, GroupMessage, GroupStatus, Health, LogConfig, MembershipChange, OffsetQuery, PeerBody,
    PeerTransport, Permit, Produced, PullAnswer, PullRequest, PullWhat, ReadAnswer, ReadRequest, Reconfigure,
    ReplicaHandle, ReplicaSpec, ReplicaStatus, Reply, RetentionConfig, Role, ShardMetrics, Shards, ShardsConfig, Start,
    TrimTo, system_clock,
};
use flowstone_storage::{CompactionConfig, DataDir, Disk, HardStateFile, RealDisk};
use ledger::{Ledger, batch};
use tokio::sync::oneshot;

const TP: TopicPartition = TopicPartition::new(TopicId::new(5), PartitionId::new(0));
/// Whatever is waited for comes much sooner; on a machine with better to do it may be late.
const PATIENCE: Duration = Duration::from_secs(15);

/// Who can be reached from where.
#[derive(Debug, Default)]
struct Network {
    brokers: Mutex<HashMap<BrokerId, Weak<Shards<Ledger>>>>,
    cut: Mutex<HashSet<BrokerId>>,
    /// So many ranges that are pulled arrive with a flipped bit.
    spoiled: AtomicU32,
    /// How long a range is on its way, in milliseconds.
    pull_takes: AtomicU64,
    /// Followers get heartbeats, and no entries.
    without_appends: AtomicBool,
    /// What each broker was asked for, and by whom.
    pulls: Mutex<Vec<(BrokerId, BrokerId, PullWhat)>>,
}

impl Network {
    fn reach(&self, from: BrokerId, to: BrokerId) -> Option<Arc<Shards<Ledger>>> {
        let cut = self.cut.lock().unwrap();
        if cut.contains(&from) || cut.contains(&to) {
            return None;
        }
        self.brokers.lock().unwrap().get(&to)?.upgrade()
    }
}

#[derive(Debug)]
struct Link {
    network: Arc<Network>,
    own: BrokerId,
}

impl PeerTransport for Link {
    fn send(&self, to: BrokerId, mut messages: Vec<GroupMessage>) {
        if self.network.without_appends.load(Ordering::Relaxed) {
            messages.retain(|it| !matches!(it.message.body, PeerBody::Append { .. }));
        }
        if let Some(shards) = self.network.reach(self.own, to) {
            shards.deliver(self.own, messages);
        }
    }

    fn pull(&self, from: BrokerId, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        self.network.pulls.lock().unwrap().push((self.own, from, request.what));
        let spoil = matches!(request.what, PullWhat::Batches { .. })
            && self
                .network
                .spoiled
                .try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                .is_ok();
        let reply = if spoil { Reply::new(move |answer: Result<_, _>| reply.send(answer.map(spoiled))) } else { reply };
        let takes = Duration::from_millis(self.network.pull_takes.load(Ordering::Relaxed));
        let reply = if takes.is_zero() {
            reply
        } else {
            Reply::new(move |answer| {
                std::thread::spawn(move || {
                    std::thread::sleep(takes);
                    reply.send(answer);
                });
            })
        };
        match self.network.reach(self.own, from) {
            Some(shards) => shards.serve_pull(request, reply),
            None => reply.send(Err(Error::new(ErrorCode::TimedOut, "not reached"))),
        }
    }
}

fn spoiled(answer: PullAnswer) -> PullAnswer {
    match answer {
        PullAnswer::Batches { bytes, next, commit } => {
            let mut bytes = bytes.to_vec();
            *bytes.last_mut().unwrap() ^= 1;
            PullAnswer::Batches { bytes: bytes.into(), next, commit }
        }
        answer => answer,
    }
}

struct Broker {
    id: BrokerId,
    shards: Arc<Shards<Ledger>>,
    data_dir: Arc<DataDir>,
    handle: Option<ReplicaHandle<Ledger>>,
}

struct Cluster {
    network: Arc<Network>,
    brokers: Vec<Option<Broker>>,
    folders: Vec<tempfile::TempDir>,
    config: ShardsConfig,
    log: LogConfig,
    flush: FlushMode,
    /// Machines read the log again when they step down.
    replays: bool,
    /// Machines take a producer's batches in order alone.
    demands_order: bool,
    next_sequence: i32,
}

fn wait<T>(answer: oneshot::Receiver<T>) -> T {
    answer.blocking_recv().expect("every request is answered")
}

fn ask<T: Send + 'static>(with: impl FnOnce(Reply<T>)) -> T {
    let (sender, receiver) = oneshot::channel();
    with(Reply::from(sender));
    wait(receiver)
}

#[track_caller]
fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    until_or(what, String::new, look)
}

#[track_caller]
fn until_or<T>(what: &str, tell: impl Fn() -> String, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain: {what}\n{}", tell());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn broker_id(at: usize) -> BrokerId {
    BrokerId::new(at as i32 + 1)
}

fn replica_id(id: u64) -> ReplicaId {
    ReplicaId::new(id)
}

/// The first replicas' ids: 11 on the first broker, 12, 13.
fn founders() -> Vec<(ReplicaId, BrokerId)> {
    (0..3).map(|at| (replica_id(11 + at as u64), broker_id(at))).collect()
}

impl Cluster {
    fn new(config: ShardsConfig, log: LogConfig) -> Self {
        let mut cluster = Self {
            network: Arc::default(),
            brokers: Vec::new(),
            folders: Vec::new(),
            config,
            log,
            flush: FlushMode::Quorum,
            replays: false,
            demands_order: false,
            next_sequence: 0,
        };
        for at in 0..3 {
            cluster.folders.push(tempfile::tempdir().unwrap());
            cluster.brokers.push(None);
            cluster.start(at);
        }
        cluster
    }

    /// With a partition that all three have.
    fn founded(config: ShardsConfig, log: LogConfig) -> Self {
        let mut cluster = Self::new(config, log);
        cluster.open_founders();
        cluster
    }

    fn open_founders(&mut self) {
        for at in 0..3 {
            self.open_founder(at);
        }
    }

    fn open_founder(&mut self, at: usize) {
        let voters = founders().into_iter().map(|(replica, _)| replica).collect();
        self.open(at, 11 + at as u64, Start::FirstVoter { voters }, &founders());
    }

    fn start(&mut self, at: usize) {
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
        let path = self.folders[at].path();
        let data_dir = Arc::new(DataDir::open_or_create(disk, path, DirectoryId::new(at as u128 + 1), 4).unwrap());
        let own = broker_id(at);
        let link = Arc::new(Link { network: Arc::clone(&self.network), own });
        let config = ShardsConfig { seed: at as u64, ..self.config.clone() };
        let shards = Arc::new(Shards::start(config, Arc::clone(&data_dir), system_clock(), link).unwrap());
        self.network.brokers.lock().unwrap().insert(own, Arc::downgrade(&shards));
        self.brokers[at] = Some(Broker { id: own, shards, data_dir, handle: None });
    }

    fn open(&mut self, at: usize, replica: u64, start: Start, peers: &[(ReplicaId, BrokerId)]) {
        let broker = self.brokers[at].as_mut().unwrap();
        let spec = ReplicaSpec {
            tp: TP,
            replica: replica_id(replica),
            dir: broker.data_dir.replica_dir(TP),
            log: self.log.clone(),
            flush: self.flush,
            retention: RetentionConfig::default(),
            internal: false,
            max_message_bytes: 1 << 20,
            peers: peers.into(),
            start,
        };
        let mut machine = Ledger::default();
        machine.replays = self.replays;
        machine.demands_order = self.demands_order;
        let handle = ask(|opened| broker.shards.open(spec, machine, opened)).unwrap();
        broker.handle = Some(handle);
    }

    /// Ends a broker; the others see its connections break, or not.
    fn kill(&mut self, at: usize, hint: bool) {
        let broker = self.brokers[at].take().unwrap();
        self.network.cut.lock().unwrap().insert(broker.id);
        let id = broker.id;
        let folder = Arc::downgrade(&broker.data_dir);
        drop(broker);
        // A message that is being delivered to it just now keeps it a moment longer.
        until("its folder is free", || (folder.strong_count() == 0).then_some(()));
        if hint {
            for other in self.brokers.iter().flatten() {
                other.shards.peer_gone(id);
            }
        }
    }

    fn restart(&mut self, at: usize) {
        self.start(at);
        self.network.cut.lock().unwrap().remove(&broker_id(at));
    }

    fn handle(&self, at: usize) -> &ReplicaHandle<Ledger> {
        self.brokers[at].as_ref().unwrap().handle.as_ref().unwrap()
    }

    fn status(&self, at: usize) -> ReplicaStatus {
        self.handle(at).status()
    }

    fn metrics(&self, at: usize) -> ShardMetrics {
        self.brokers[at].as_ref().unwrap().shards.metrics().remove(0)
    }

    /// Which broker leads; waits for one that serves.
    #[track_caller]
    fn leader(&self) -> usize {
        until("somebody leads", || {
            let cut = self.network.cut.lock().unwrap().clone();
            let there = (0..3).filter(|&at| {
                self.brokers[at].as_ref().is_some_and(|broker| broker.handle.is_some() && !cut.contains(&broker.id))
            });
            there.filter(|&at| self.status(at).is_ready()).max_by_key(|&at| self.status(at).term)
        })
    }

    /// Writes at whoever leads until it is taken; says where.
    #[track_caller]
    fn write(&mut self) -> Offset {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        until("a write is taken", || {
            let (bytes, header) = batch(1, sequence, 1, 900);
            let handle = self.handle(self.leader()).clone();
            let (sender, receiver) = oneshot::channel();
            handle.produce(bytes, header, Acks::Quorum, Permit::unbounded(), Reply::from(sender));
            match wait(receiver) {
                Ok(Produced { base_offset, .. }) => Some(base_offset),
                Err(error) => {
                    assert!(error.is_retriable(), "{error}");
                    None
                }
            }
        })
    }

    fn write_many(&mut self, count: usize) {
        self.write_many_of(count, 900);
    }

    fn write_many_of(&mut self, count: usize, bytes: usize) {
        let leader = self.handle(self.leader()).clone();
        let answers: Vec<_> = (0..count)
            .map(|_| {
                let (bytes, header) = batch(1, self.next_sequence, 1, bytes);
                self.next_sequence += 1;
                let (sender, receiver) = oneshot::channel();
                leader.produce(bytes, header, Acks::Quorum, Permit::unbounded(), Reply::from(sender));
                receiver
            })
            .collect();
        for answer in answers {
            wait(answer).unwrap();
        }
    }

    fn read(&self, at: usize, request: ReadRequest) -> Result<ReadAnswer, Error> {
        ask(|reply| self.handle(at).read(request, reply))
    }

    fn group(&self, at: usize) -> GroupStatus {
        ask(|reply| self.handle(at).group(reply)).unwrap()
    }

    /// Whether these have all that is committed, the same number of offsets, and know it.
    #[track_caller]
    fn until_equal(&self, which: &[usize]) {
        until_or(
            "all replicas are equal",
            || which.iter().map(|&at| format!("{:?}\n{:?}\n", self.status(at), self.group(at))).collect(),
            || {
                let statuses: Vec<_> = which.iter().map(|&at| self.status(at)).collect();
                let leader = self.status(self.leader());
                let equal = statuses
                    .iter()
                    .all(|it| it.high_watermark == leader.high_watermark && it.end_offset == leader.end_offset);
                equal.then_some(())
            },
        );
        let bytes: Vec<_> = which.iter().map(|&at| self.all_bytes(at)).collect();
        assert!(bytes.iter().all(|other| *other == bytes[0]), "replicas hold other bytes");
    }

    /// All that can be read of a replica, from where all of them begin.
    fn all_bytes(&self, at: usize) -> Vec<u8> {
        let mut from = self.status(self.leader()).log_start;
        let end = self.status(at).high_watermark;
        let mut all = Vec::new();
        while from < end {
            let request = ReadRequest { any_replica: true, ..ReadRequest::new(from, 1 << 20) };
            let answer = self.read(at, request).unwrap();
            answer.bytes.verify().unwrap();
            let before = all.len();
            for chunk in &answer.bytes.chunks {
                all.extend_from_slice(chunk);
            }
            assert!(all.len() > before, "nothing to read at {from} below {end}");
            from = answer.bytes.next;
        }
        all
    }

    /// Follows the plan until it is done; what it removed.
    fn drive(&mut self, wanted: &[u64], leaving: &[u64], may_remove: bool) -> Vec<ReplicaId> {
        let ids = |ids: &[u64]| ids.iter().copied().map(replica_id).collect::<Vec<_>>();
        let (wanted, leaving) = (ids(wanted), ids(leaving));
        let mut may_remove = may_remove;
        let mut leaving = leaving;
        let mut all_removed = Vec::new();
        until("the change of members is done", || {
            let at = self.leader();
            let view = self.group(at);
            let change = match next_step(&view, &wanted, &leaving, may_remove) {
                PlanStep::Nothing => {
                    let done = leaving.is_empty() && view.leader == Some(view.replica);
                    let all_in = wanted.iter().all(|replica| view.membership.voters.contains(replica));
                    return (done && all_in).then(|| all_removed.clone());
                }
                // The controller forgets them.
                PlanStep::Done { removed } => {
                    leaving.retain(|replica| !removed.contains(replica));
                    all_removed.extend(removed);
                    return None;
                }
                PlanStep::ReportMayRemove => {
                    may_remove = true;
                    return None;
                }
                PlanStep::TransferAway(to) => {
                    // It may fail; then it is tried again.
                    drop(ask(|reply| self.handle(at).transfer_leader(Some(to), reply)));
                    return None;
                }
                PlanStep::AddLearner(replica) => MembershipChange::AddLearner(replica),
                PlanStep::Promote(replica) => MembershipChange::Promote(replica),
                PlanStep::Remove(replica) => MembershipChange::Remove(replica),
            };
            if let Err(error) = ask(|reply| self.handle(at).change_membership(change, reply)) {
                assert!(error.is_retriable(), "{change:?}: {error}");
            }
            None
        })
    }
}

fn config() -> ShardsConfig {
    ShardsConfig { shards: 1, tick: Duration::from_millis(50), ..ShardsConfig::default() }
}

fn small_segments() -> LogConfig {
    LogConfig { segment_bytes: 64 << 10, zero_ahead_bytes: 4 << 10, ..LogConfig::default() }
}

#[test]
fn a_killed_leader_is_replaced_and_comes_back_as_a_follower() {
    for hint in [true, false] {
        let mut cluster = Cluster::founded(ShardsConfig { shards: 1, ..ShardsConfig::default() }, LogConfig::default());
        cluster.write_many(50);
        let old = cluster.leader();
        let before = cluster.status(old);
        cluster.kill(old, hint);
        let began = Instant::now();
        cluster.write();
        // Well under a second on a machine of its own; this one may have better to do.
        assert!(began.elapsed() < Duration::from_secs(10), "nobody took over for {:?}", began.elapsed());
        let new = cluster.leader();
        assert_ne!(new, old);
        assert!(cluster.status(new).term > before.term);
        assert!(cluster.status(new).high_watermark > before.high_watermark, "what was acknowledged is there");

        cluster.restart(old);
        cluster.open_founder(old);
        cluster.write_many(20);
        cluster.until_equal(&[0, 1, 2]);
        assert_eq!(cluster.status(old).role, Role::Follower);
        assert_eq!(cluster.status(old).leader_broker, Some(broker_id(new)));
    }
}

#[test]
fn leadership_is_handed_over_and_reads_know_who_leads() {
    let mut cluster = Cluster::founded(config(), LogConfig::default());
    cluster.write_many(10);
    for _ in 0..3 {
        let old = cluster.leader();
        let offset = cluster.write();
        let known = ask(|reply| cluster.handle(old).read_index(reply)).unwrap();
        assert!(known > offset, "{known} does not cover what was acknowledged at {offset}");
        let to = (old + 1) % 3;
        until("it is handed over", || {
            ask(|reply| cluster.handle(old).transfer_leader(Some(replica_id(11 + to as u64)), reply)).ok()
        });
        assert_eq!(until("it leads", || Some(cluster.leader()).filter(|&at| at != old)), to);
        let error = ask(|reply| cluster.handle(old).read_index(reply)).unwrap_err();
        assert_eq!(error.code, ErrorCode::NotLeader, "{error}");
    }
    // A leader that nobody hears can not know.
    let old = cluster.leader();
    cluster.network.cut.lock().unwrap().insert(broker_id(old));
    ask(|reply| cluster.handle(old).read_index(reply)).unwrap_err();
    cluster.network.cut.lock().unwrap().clear();
    cluster.write();
    cluster.until_equal(&[0, 1, 2]);
}

#[test]
fn followers_are_read_from_and_never_go_back() {
    let mut cluster = Cluster::founded(config(), LogConfig::default());
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
    let leader = cluster.leader();
    let follower = (leader + 1) % 3;
    let end = cluster.status(leader).high_watermark;
    let from = Offset::new(end.get() - 1);
    assert_eq!(cluster.read(follower, ReadRequest::new(from, 1 << 20)).unwrap_err().code, ErrorCode::NotLeader);
    let request = ReadRequest { any_replica: true, ..ReadRequest::new(from, 1 << 20) };
    assert_eq!(cluster.read(follower, request).unwrap().high_watermark, end);

    // What the reader knows of and this one does not have yet is not out of range.
    let request = ReadRequest { known_high_watermark: Some(end.plus(5)), from: end.plus(3), ..request };
    let error = cluster.read(follower, request).unwrap_err();
    assert!(error.is_retriable(), "{error}");
    let (sender, receiver) = oneshot::channel();
    let waiting = ReadRequest { wait: true, from: end, known_high_watermark: Some(end.plus(1)), ..request };
    cluster.handle(follower).read(waiting, Reply::from(sender));
    cluster.write();
    assert!(!wait(receiver).unwrap().bytes.is_empty());
}

#[test]
fn who_waits_at_a_follower_that_is_cut_off_is_sent_elsewhere() {
    let mut cluster = Cluster::founded(config(), LogConfig::default());
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
    let follower = (cluster.leader() + 1) % 3;
    let end = cluster.status(follower).high_watermark;
    let (sender, mut receiver) = oneshot::channel();
    let waiting = ReadRequest { wait: true, any_replica: true, ..ReadRequest::new(end, 1 << 20) };
    cluster.handle(follower).read(waiting, Reply::from(sender));
    cluster.cut(follower);
    let answer = until("the reader is told", || receiver.try_recv().ok());
    assert_eq!(answer.unwrap_err().code, ErrorCode::NotLeader);
}

#[test]
fn a_leader_that_was_replaced_without_knowing_does_not_say_what_is_missing() {
    let mut cluster = Cluster::new(config(), LogConfig::default());
    cluster.demands_order = true;
    cluster.open_founders();
    cluster.write();
    cluster.until_equal(&[0, 1, 2]);
    let old = cluster.leader();
    let produce = |handle: &ReplicaHandle<Ledger>, sequence| {
        let (bytes, header) = batch(1, sequence, 1, 10);
        let (sender, receiver) = oneshot::channel();
        handle.produce(bytes, header, Acks::Quorum, Permit::unbounded(), Reply::from(sender));
        receiver
    };
    let gap = wait(produce(cluster.handle(old), 2));
    assert_eq!(gap.unwrap_err().code, ErrorCode::OutOfOrderSequence, "it leads, and says so");
    // From now on it can not know what the others have.
    cluster.cut(old);
    let missing = produce(cluster.handle(old), 2);
    cluster.write();
    assert_eq!(wait(missing).unwrap_err().code, ErrorCode::NotLeader, "the new leader has it");
    assert!(wait(produce(cluster.handle(cluster.leader()), 2)).is_ok());
}

#[test]
fn a_follower_that_was_away_pulls_what_it_missed() {
    let config = ShardsConfig { checkpoint_entries: 200, offer_after_bytes: 64 << 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    cluster.write_many(100);
    let away = (cluster.leader() + 1) % 3;
    cluster.network.cut.lock().unwrap().insert(broker_id(away));
    for _ in 0..10 {
        cluster.write_many(100);
    }
    cluster.network.cut.lock().unwrap().clear();
    cluster.until_equal(&[0, 1, 2]);
    assert!(cluster.metrics(away).pulled_bytes > 400_000, "{:?}", cluster.metrics(away));
    cluster.write();
    cluster.until_equal(&[0, 1, 2]);
}

impl Cluster {
    fn cut(&self, at: usize) {
        self.network.cut.lock().unwrap().insert(broker_id(at));
    }

    fn join(&self, at: usize) {
        self.network.cut.lock().unwrap().remove(&broker_id(at));
    }

    /// Cuts the leader off with so many batches of its own behind what is committed; who that is.
    fn cut_leader_with_tail(&mut self, count: usize) -> usize {
        let old = self.leader();
        self.cut(old);
        let before = self.status(old).end_offset;
        let leader = self.handle(old).clone();
        for _ in 0..count {
            // Nobody will commit it: it belongs to another producer than what follows.
            let (bytes, header) = batch(2, self.next_sequence, 1, 10);
            leader.produce(bytes, header, Acks::None, Permit::unbounded(), Reply::new(drop));
            self.next_sequence += 1;
        }
        self.next_sequence -= count as i32;
        until("it has appended them", || (self.status(old).end_offset >= before.plus(count as i64)).then_some(()));
        old
    }
}

#[test]
fn a_tail_that_is_longer_than_what_the_new_leader_committed_is_given_up() {
    let config = ShardsConfig { checkpoint_entries: 10, offer_after_bytes: 16 << 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    cluster.write_many(20);
    cluster.until_equal(&[0, 1, 2]);
    let old = cluster.cut_leader_with_tail(400);
    // Fewer, but larger ones.
    for _ in 0..60 {
        cluster.write();
    }
    let new = cluster.leader();
    let third = 3 - old - new;
    cluster.until_equal(&[new, third]);
    cluster.kill(third, true);
    cluster.join(old);
    // Nothing is committed without it.
    cluster.until_equal(&[old, new]);
    cluster.write();
    cluster.until_equal(&[old, new]);
}

#[test]
fn a_tail_that_was_given_up_is_not_missed_where_the_log_is_copied_as_a_whole() {
    let config = ShardsConfig { checkpoint_entries: 10, offer_after_bytes: 16 << 10, ..config() };
    let log = LogConfig { segment_bytes: 8 << 10, zero_ahead_bytes: 4 << 10, ..LogConfig::default() };
    let mut cluster = Cluster::founded(config, log);
    cluster.write_many(20);
    cluster.until_equal(&[0, 1, 2]);
    let old = cluster.cut_leader_with_tail(400);
    for _ in 0..60 {
        cluster.write();
    }
    let new = cluster.leader();
    let third = 3 - old - new;
    let (end, size) = (cluster.status(new).high_watermark, cluster.status(new).size_bytes);
    ask(|reply| cluster.handle(new).trim(TrimTo::Offset(Offset::new(end.get() - 5)), reply)).unwrap();
    until("the trimmed files are gone", || (cluster.status(new).size_bytes < size / 2).then_some(()));
    cluster.until_equal(&[new, third]);
    cluster.kill(third, true);
    cluster.join(old);
    cluster.until_equal(&[old, new]);
    assert_eq!(cluster.status(old).health, Health::Ok);
    cluster.write();
}

#[test]
fn a_range_that_was_not_taken_is_asked_for_again_from_what_is_committed() {
    let config = ShardsConfig { checkpoint_entries: 10, offer_after_bytes: 16 << 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    cluster.write_many(20);
    cluster.until_equal(&[0, 1, 2]);
    let old = cluster.cut_leader_with_tail(40);
    for _ in 0..100 {
        cluster.write();
    }
    // The answer to the comparison, if there is one, and what is to replace the tail.
    cluster.network.spoiled.store(2, Ordering::Relaxed);
    cluster.join(old);
    cluster.until_equal(&[0, 1, 2]);
    assert_eq!(cluster.network.spoiled.load(Ordering::Relaxed), 0);
}

#[test]
fn a_follower_whose_part_was_trimmed_is_copied_as_a_whole() {
    let config = ShardsConfig { checkpoint_entries: 200, offer_after_bytes: 64 << 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    cluster.write_many(100);
    let away = (cluster.leader() + 1) % 3;
    cluster.network.cut.lock().unwrap().insert(broker_id(away));
    for _ in 0..10 {
        cluster.write_many(100);
    }
    let leader = cluster.leader();
    let end = cluster.status(leader).high_watermark;
    let size = cluster.status(leader).size_bytes;
    ask(|reply| cluster.handle(leader).trim(TrimTo::Offset(Offset::new(end.get() - 100)), reply)).unwrap();
    until("the trimmed files are gone", || (cluster.status(leader).size_bytes < size / 2).then_some(()));
    cluster.network.cut.lock().unwrap().clear();
    cluster.write();
    cluster.until_equal(&[0, 1, 2]);
    assert!(cluster.status(away).size_bytes < size / 2, "it has what the others have");
    // It votes as before.
    let old = cluster.leader();
    cluster.kill(if old == away { (old + 1) % 3 } else { old }, true);
    cluster.write();
}

#[test]
fn a_copy_that_was_cut_short_begins_anew_where_what_it_wants_was_trimmed() {
    let config = ShardsConfig { checkpoint_entries: 100, pull_bytes: 1 << 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    for _ in 0..10 {
        cluster.write_many(100);
    }
    cluster.until_equal(&[0, 1, 2]);
    let leader = cluster.leader();
    let at = (leader + 1) % 3;
    cluster.kill(at, true);
    cluster.folders[at] = tempfile::tempdir().unwrap();
    cluster.restart(at);
    // Among those that are asked is one that is gone: it has nothing to say of what was trimmed.
    let mut places = founders();
    places.push((replica_id(99), broker_id(at)));
    cluster.network.pull_takes.store(20, Ordering::Relaxed);
    cluster.open(at, 99, Start::Learner, &places);
    until("it is being copied", || (cluster.metrics(at).pulled_bytes > 20_000).then_some(()));
    cluster.kill(at, true);
    let (end, size) = (cluster.status(leader).high_watermark, cluster.status(leader).size_bytes);
    ask(|reply| cluster.handle(leader).trim(TrimTo::Offset(Offset::new(end.get() - 100)), reply)).unwrap();
    cluster.write_many(100);
    let others = [leader, 3 - leader - at];
    until("the trimmed files are gone", || {
        others.iter().all(|&other| cluster.status(other).size_bytes < size / 2).then_some(())
    });
    cluster.network.pull_takes.store(0, Ordering::Relaxed);
    cluster.restart(at);
    cluster.open(at, 99, Start::Learner, &places);
    for at in 0..3 {
        cluster.handle(at).set_peers(places.clone().into());
    }
    let ids: Vec<_> = others.iter().map(|&other| 11 + other as u64).collect();
    cluster.drive(&[ids[0], ids[1], 99], &[11 + at as u64], true);
    cluster.until_equal(&[0, 1, 2]);
}

#[test]
fn a_copy_whose_source_is_trimmed_meanwhile_ends_with_what_is_left() {
    let config = ShardsConfig { checkpoint_entries: 100, pull_bytes: 1 << 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    for _ in 0..10 {
        cluster.write_many(100);
    }
    cluster.until_equal(&[0, 1, 2]);
    let leader = cluster.leader();
    let at = (leader + 1) % 3;
    cluster.kill(at, true);
    cluster.folders[at] = tempfile::tempdir().unwrap();
    cluster.restart(at);
    let mut places = founders();
    places.push((replica_id(99), broker_id(at)));
    cluster.network.pull_takes.store(20, Ordering::Relaxed);
    cluster.open(at, 99, Start::Learner, &places);
    until("it is being copied", || (cluster.metrics(at).pulled_bytes > 20_000).then_some(()));
    // What it asks for next is gone, on both that have it, while it runs.
    let (end, size) = (cluster.status(leader).high_watermark, cluster.status(leader).size_bytes);
    ask(|reply| cluster.handle(leader).trim(TrimTo::Offset(Offset::new(end.get() - 100)), reply)).unwrap();
    cluster.write_many(100);
    let others = [leader, 3 - leader - at];
    until("the trimmed files are gone", || {
        others.iter().all(|&other| cluster.status(other).size_bytes < size / 2).then_some(())
    });
    assert!(cluster.metrics(at).pulled_bytes < size, "it was not through before");
    cluster.network.pull_takes.store(0, Ordering::Relaxed);
    for at in 0..3 {
        cluster.handle(at).set_peers(places.clone().into());
    }
    let ids: Vec<_> = others.iter().map(|&other| 11 + other as u64).collect();
    cluster.drive(&[ids[0], ids[1], 99], &[11 + at as u64], true);
    cluster.until_equal(&[0, 1, 2]);
    assert!(cluster.status(at).size_bytes < size / 2, "it has what the others have");
    // It votes as the others do.
    cluster.kill(leader, true);
    cluster.write();
}

#[test]
fn a_wiped_broker_gets_a_new_replica_that_learns_everything() {
    let config = ShardsConfig { checkpoint_entries: 100, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    for _ in 0..5 {
        cluster.write_many(100);
    }
    let leader = cluster.leader();
    let wiped = (leader + 1) % 3;
    cluster.kill(wiped, true);
    cluster.folders[wiped] = tempfile::tempdir().unwrap();
    cluster.restart(wiped);
    let mut places = founders();
    places.push((replica_id(99), broker_id(wiped)));
    cluster.open(wiped, 99, Start::Learner, &places);
    for at in 0..3 {
        cluster.handle(at).set_peers(places.clone().into());
    }
    let others: Vec<_> = (0..3).filter(|&at| at != wiped).map(|at| 11 + at as u64).collect();
    let old = 11 + wiped as u64;
    let removed = cluster.drive(&[others[0], others[1], 99], &[old], true);
    assert_eq!(removed, [replica_id(old)]);
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
    assert!(cluster.status(wiped).is_voter);
    // The new one's vote counts: with another gone there is still a majority.
    cluster.kill(leader, true);
    cluster.write();
}

#[test]
fn every_replica_is_replaced_the_leader_last() {
    let mut cluster = Cluster::new(config(), LogConfig::default());
    // It begins on the first broker alone, moves to the second, and then to the third.
    cluster.open(0, 11, Start::alone(replica_id(11)), &[(replica_id(11), broker_id(0))]);
    cluster.write_many(100);
    for (from, to) in [(0, 1), (1, 2)] {
        let places: Vec<_> = founders();
        cluster.open(to, 11 + to as u64, Start::Learner, &places);
        cluster.handle(from).set_peers(places.into());
        let removed = cluster.drive(&[11 + to as u64], &[11 + from as u64], false);
        assert_eq!(removed, [replica_id(11 + from as u64)]);
        assert_eq!(cluster.leader(), to, "the old leader handed over before it went");
        let broker = cluster.brokers[from].as_mut().unwrap();
        broker.handle = None;
        ask(|closed| broker.shards.close(TP, true, closed));
        assert!(!broker.data_dir.replica_dir(TP).exists());
        cluster.write_many(100);
    }
    let group = cluster.group(2);
    assert_eq!((group.membership.voters.len(), group.membership.learners.len()), (1, 0));
    // The producer's state came along: a repeated batch is told where its original is.
    let (bytes, header) = batch(1, 0, 1, 900);
    let (sender, receiver) = oneshot::channel();
    cluster.handle(2).produce(bytes, header, Acks::Quorum, Permit::unbounded(), Reply::from(sender));
    assert_eq!(wait(receiver).unwrap().base_offset, Offset::new(1));
}

#[test]
fn a_leader_does_not_remove_itself_and_nonsense_is_refused() {
    let cluster = Cluster::founded(config(), LogConfig::default());
    let leader = cluster.leader();
    let own = replica_id(11 + leader as u64);
    let change = |change| ask(|reply| cluster.handle(leader).change_membership(change, reply));
    assert_eq!(change(MembershipChange::Remove(own)).unwrap_err().code, ErrorCode::InvalidRequest);
    assert_eq!(change(MembershipChange::Promote(replica_id(77))).unwrap_err().code, ErrorCode::InvalidRequest);
    assert_eq!(change(MembershipChange::AddLearner(own)).unwrap_err().code, ErrorCode::InvalidRequest);
    change(MembershipChange::Remove(replica_id(77))).expect("it is out already");
    let follower = (leader + 1) % 3;
    let error = ask(|reply| cluster.handle(follower).change_membership(MembershipChange::Remove(own), reply));
    assert_eq!(error.unwrap_err().code, ErrorCode::NotLeader);
}

#[test]
fn a_survivor_goes_on_alone_when_it_is_told_to() {
    let mut cluster = Cluster::founded(config(), LogConfig::default());
    cluster.write_many(100);
    cluster.until_equal(&[0, 1, 2]);
    let (before, term) = (cluster.status(0).high_watermark, cluster.status(0).term);
    cluster.kill(1, true);
    cluster.kill(2, true);
    until("nobody leads", || (!cluster.status(0).is_ready()).then_some(()));
    let broker = cluster.brokers[0].as_mut().unwrap();
    broker.handle = None;
    ask(|closed| broker.shards.close(TP, false, closed));
    cluster.open(0, 50, Start::Recovered { from: replica_id(11) }, &[(replica_id(50), broker_id(0))]);
    assert_eq!(cluster.leader(), 0);
    assert!(cluster.status(0).high_watermark > before, "all of it, and the new term's first entry");
    // What the others wrote while they were cut off, over many elections, is not taken for a part of this history.
    assert!(cluster.status(0).term.get() > term.get() + 100_000);
    cluster.write_many(10);
    // Once done it stays so.
    cluster.kill(0, false);
    cluster.restart(0);
    cluster.open(0, 50, Start::Recovered { from: replica_id(11) }, &[(replica_id(50), broker_id(0))]);
    let offset = cluster.write();
    assert!(offset.get() > before.get() + 10);
}

#[test]
fn a_replica_of_a_recovered_group_takes_nothing_from_the_one_that_was_given_up() {
    let config = ShardsConfig { checkpoint_entries: 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    cluster.write_many(100);
    cluster.until_equal(&[0, 1, 2]);
    cluster.cut(0);
    until("the others go on", || (!cluster.status(0).is_ready()).then_some(()));
    cluster.write_many(100);
    cluster.until_equal(&[1, 2]);
    let given_up = cluster.status(1).high_watermark;
    for (at, delete_files) in [(0, false), (2, true)] {
        let broker = cluster.brokers[at].as_mut().unwrap();
        broker.handle = None;
        ask(|closed| broker.shards.close(TP, delete_files, closed));
    }
    // The second broker has not heard of it yet: there the old replica runs on.
    let places = [(replica_id(61), broker_id(1)), (replica_id(50), broker_id(0)), (replica_id(60), broker_id(2))];
    cluster.join(0);
    cluster.open(0, 50, Start::Recovered { from: replica_id(11) }, &places);
    until_or("it leads", || format!("{:?}", cluster.status(0)), || cluster.status(0).is_ready().then_some(()));
    cluster.open(2, 60, Start::Learner, &places);
    cluster.write_many(10);
    cluster.drive(&[50, 60], &[], false);
    cluster.until_equal(&[0, 2]);
    assert!(cluster.status(2).high_watermark < given_up);
    let pulls = cluster.network.pulls.lock().unwrap().clone();
    assert!(pulls.iter().any(|&(by, from, _)| (by, from) == (broker_id(2), broker_id(1))), "it was asked: {pulls:?}");
}

#[test]
fn what_is_appended_and_not_committed_takes_room_however_it_is_answered() {
    for acks in [Acks::None, Acks::Leader] {
        let config = ShardsConfig { inbox_bytes_max: 64 << 10, ..config() };
        let cluster = Cluster::founded(config, LogConfig::default());
        let leader = cluster.handle(cluster.leader()).clone();
        cluster.network.without_appends.store(true, Ordering::Relaxed);
        let before = leader.status().end_offset;
        let mut taken = 0;
        while let Some(permit) = leader.try_reserve(1_024) {
            let (bytes, header) = batch(1, taken, 1, 900);
            taken += 1;
            assert!(taken <= 64, "nothing holds it back");
            let produced = ask(|reply| leader.produce(bytes, header, acks, permit, reply)).unwrap();
            assert_eq!(produced.base_offset, before.plus(i64::from(taken) - 1));
        }
        assert_eq!(taken, 64);
        cluster.network.without_appends.store(false, Ordering::Relaxed);
        until("the room is given back", || leader.try_reserve(64 << 10));
    }
}

#[test]
fn an_idle_group_is_not_stepped() {
    let cluster = Cluster::founded(config(), LogConfig::default());
    let leader = cluster.leader();
    cluster.until_equal(&[0, 1, 2]);
    let look = |at: usize| (cluster.metrics(at).steps, cluster.metrics(at).messages_sent);
    // It comes to rest, and then its heartbeats go on without a step.
    let quiet = until("no more steps", || {
        let before: Vec<_> = (0..3).map(look).collect();
        let target = before[leader].1 + 10;
        until("heartbeats go on", || (look(leader).1 >= target).then_some(()));
        let after: Vec<_> = (0..3).map(look).collect();
        (before.iter().map(|(steps, _)| *steps).eq(after.iter().map(|(steps, _)| *steps))).then_some(after)
    });
    assert!(quiet[leader].1 > 0);
    assert_eq!(cluster.leader(), leader, "nobody stood for election meanwhile");
}

#[test]
fn what_only_memory_held_is_in_doubt_after_the_machine_was_restarted() {
    let mut cluster = Cluster::new(config(), LogConfig::default());
    cluster.flush = FlushMode::Relaxed;
    cluster.config.boot_id = "first".to_owned();
    for at in 0..3 {
        cluster.kill(at, false);
        cluster.restart(at);
    }
    cluster.open_founders();
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
    let leader = cluster.leader();
    let away = (leader + 1) % 3;
    // A stop that is not clean leaves its note.
    let note = cluster.folders[away].path().join("running");
    let kept = std::fs::read(&note).unwrap();
    cluster.kill(away, true);
    std::fs::write(&note, kept).unwrap();
    cluster.config.boot_id = "second".to_owned();
    cluster.restart(away);
    cluster.open_founder(away);
    match cluster.status(away).health {
        Health::Lost { lost_memory: true, last_index, .. } => assert!(last_index.get() > 10),
        health => panic!("{health:?}"),
    }
    // Another start under the same boot finds the same: the verdict is not forgotten.
    let kept = std::fs::read(&note).unwrap();
    cluster.kill(away, false);
    std::fs::write(&note, kept).unwrap();
    cluster.restart(away);
    cluster.open_founder(away);
    assert!(matches!(cluster.status(away).health, Health::Lost { lost_memory: true, .. }));

    // Its successor is not lost again when only the process dies.
    let broker = cluster.brokers[away].as_mut().unwrap();
    broker.handle = None;
    ask(|closed| broker.shards.close(TP, true, closed));
    let mut places = founders();
    places.push((replica_id(99), broker_id(away)));
    cluster.open(away, 99, Start::Learner, &places);
    for at in 0..3 {
        cluster.handle(at).set_peers(places.clone().into());
    }
    let others: Vec<_> = (0..3).filter(|&at| at != away).map(|at| 11 + at as u64).collect();
    cluster.drive(&[others[0], others[1], 99], &[11 + away as u64], true);
    let kept = std::fs::read(&note).unwrap();
    cluster.kill(away, false);
    std::fs::write(&note, kept).unwrap();
    cluster.restart(away);
    cluster.open(away, 99, Start::Learner, &places);
    cluster.until_equal(&[0, 1, 2]);
    assert_eq!(cluster.status(away).health, Health::Ok);
}

#[test]
fn rot_that_a_read_meets_in_the_active_segment_is_repaired() {
    let mut cluster = Cluster::founded(config(), LogConfig::default());
    cluster.write_many(100);
    cluster.until_equal(&[0, 1, 2]);
    let victim = (cluster.leader() + 1) % 3;
    let dir: PathBuf = cluster.brokers[victim].as_ref().unwrap().data_dir.replica_dir(TP);
    let file = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "log"))
        .unwrap();
    let good = std::fs::read(&file).unwrap();
    {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
        file.write_all_at(&[good[20_000] ^ 0x40], 20_000).unwrap();
    }
    // Who reads the bytes finds it.
    let request = ReadRequest { any_replica: true, ..ReadRequest::new(Offset::new(0), 1 << 20) };
    let error = cluster.read(victim, request).map(|answer| answer.bytes.verify().unwrap_err());
    let offset = match error {
        Ok(flowstone_storage::ReadError::Corrupt { offset, .. }) => offset,
        other => panic!("{other:?}"),
    };
    cluster.handle(victim).found_corrupt(offset);
    until("it is repaired", || (cluster.metrics(victim).repaired_ranges > 0).then_some(()));
    assert_eq!(std::fs::read(&file).unwrap()[20_000], good[20_000]);
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
}

#[test]
fn rot_that_a_lookup_by_time_meets_is_repaired() {
    let mut cluster = Cluster::founded(config(), LogConfig::default());
    cluster.write_many(100);
    cluster.until_equal(&[0, 1, 2]);
    let leader = cluster.leader();
    let dir: PathBuf = cluster.brokers[leader].as_ref().unwrap().data_dir.replica_dir(TP);
    let mut files = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let path = files.find(|path| path.extension().is_some_and(|extension| extension == "log")).unwrap();
    // In the first batch with records.
    let at = 600;
    let good = std::fs::read(&path).unwrap()[at];
    {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[good ^ 0x40], at as u64).unwrap();
    }
    let look_up = || {
        let query = OffsetQuery::Timestamp(Timestamp::new(1));
        ask(|reply| cluster.handle(cluster.leader()).list_offset(query, reply))
    };
    look_up().unwrap_err();
    until("it is repaired", || (cluster.metrics(leader).repaired_ranges > 0).then_some(()));
    assert_eq!(std::fs::read(&path).unwrap()[at], good);
    let found = until("it is found", || look_up().ok()).expect("a record of that time");
    assert_eq!(found.timestamp, Timestamp::new(1_000));
}

#[test]
fn rot_is_found_and_repaired_from_another_replica() {
    let config = ShardsConfig { scrub_every: Duration::from_millis(50), checkpoint_entries: 100, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    cluster.write_many(300);
    cluster.until_equal(&[0, 1, 2]);
    let victim = (cluster.leader() + 1) % 3;
    let dir: PathBuf = cluster.brokers[victim].as_ref().unwrap().data_dir.replica_dir(TP);
    let mut files: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    files.sort();
    let good = std::fs::read(&files[0]).unwrap();
    let mut bad = good.clone();
    let at = bad.len() / 2;
    bad[at] ^= 0x40;
    {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::OpenOptions::new().write(true).open(&files[0]).unwrap();
        file.write_all_at(&bad[at..=at], at as u64).unwrap();
    }
    until("it is repaired", || (cluster.metrics(victim).repaired_ranges > 0).then_some(()));
    assert_eq!(std::fs::read(&files[0]).unwrap(), good);
    assert_eq!(cluster.status(victim).health, Health::Ok);
    cluster.until_equal(&[0, 1, 2]);
}

impl Cluster {
    /// The machine of a broker is restarted, without a clean stop: what was in its memory is gone, as far as anyone knows.
    fn lose_memory(&mut self, at: usize, boot_id: &str) {
        let note = self.folders[at].path().join("running");
        let kept = std::fs::read(&note).unwrap();
        self.kill(at, true);
        std::fs::write(&note, kept).unwrap();
        self.config.boot_id = boot_id.to_owned();
        self.restart(at);
    }

    /// In the first start of its machines, with this mode.
    fn founded_in(boot_id: &str, flush: FlushMode) -> Self {
        let mut cluster = Self::new(ShardsConfig { boot_id: boot_id.to_owned(), ..config() }, LogConfig::default());
        cluster.flush = flush;
        cluster.open_founders();
        cluster.write_many(10);
        cluster.until_equal(&[0, 1, 2]);
        cluster
    }

    fn note_of_relaxed(&self, at: usize) -> PathBuf {
        self.brokers[at].as_ref().unwrap().data_dir.replica_dir(TP).join("relaxed")
    }

    fn reconfigure(&self, at: usize, flush: FlushMode) {
        self.handle(at).reconfigure(Reconfigure {
            log: self.log.clone(),
            retention: RetentionConfig::default(),
            flush,
            max_message_bytes: 1 << 20,
        });
    }
}

#[test]
fn a_mode_that_is_set_after_a_power_failure_does_not_hide_what_was_lost_in_it() {
    let mut cluster = Cluster::founded_in("first", FlushMode::Relaxed);
    let away = (cluster.leader() + 1) % 3;
    cluster.flush = FlushMode::Quorum;
    cluster.lose_memory(away, "second");
    cluster.open_founder(away);
    assert!(
        matches!(cluster.status(away).health, Health::Lost { lost_memory: true, .. }),
        "{:?}",
        cluster.status(away)
    );
}

#[test]
fn a_clean_stop_before_a_replica_was_opened_does_not_hide_what_it_lost() {
    let mut cluster = Cluster::founded_in("first", FlushMode::Relaxed);
    let away = (cluster.leader() + 1) % 3;
    cluster.lose_memory(away, "second");
    // Its broker was not registered yet, say.
    cluster.kill(away, true);
    cluster.restart(away);
    cluster.open_founder(away);
    assert!(
        matches!(cluster.status(away).health, Health::Lost { lost_memory: true, .. }),
        "{:?}",
        cluster.status(away)
    );
}

#[test]
fn a_replica_that_was_always_flushed_lost_nothing_whatever_its_mode_is_now() {
    let mut cluster = Cluster::founded_in("first", FlushMode::Quorum);
    let away = (cluster.leader() + 1) % 3;
    cluster.flush = FlushMode::Relaxed;
    cluster.lose_memory(away, "second");
    cluster.open_founder(away);
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
    assert_eq!(cluster.status(away).health, Health::Ok);
    // From now on it may lose something.
    cluster.lose_memory(away, "third");
    cluster.open_founder(away);
    assert!(
        matches!(cluster.status(away).health, Health::Lost { lost_memory: true, .. }),
        "{:?}",
        cluster.status(away)
    );
}

#[test]
fn that_a_replica_may_lose_something_is_noted_for_as_long_as_it_may() {
    let mut cluster = Cluster::founded_in("first", FlushMode::Quorum);
    let (at, note) = (0, cluster.note_of_relaxed(0));
    assert!(!note.exists());
    cluster.reconfigure(at, FlushMode::Relaxed);
    until("it is noted", || note.exists().then_some(()));
    cluster.write_many(10);
    cluster.reconfigure(at, FlushMode::Quorum);
    until("all of it is flushed", || (!note.exists()).then_some(()));
    // One after the other, however quickly they come.
    for _ in 0..20 {
        cluster.reconfigure(at, FlushMode::Relaxed);
        cluster.reconfigure(at, FlushMode::Quorum);
    }
    cluster.reconfigure(at, FlushMode::Relaxed);
    until("it is noted again", || note.exists().then_some(()));
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
    assert!(note.exists());
}

#[test]
fn in_a_file_of_hard_states_that_was_rotten_new_replicas_live_and_old_ones_stay_lost() {
    use std::os::unix::fs::FileExt as _;
    let mut cluster = Cluster::founded(config(), small_segments());
    cluster.write_many(100);
    cluster.until_equal(&[0, 1, 2]);
    let away = (cluster.leader() + 1) % 3;
    let stripe = cluster.brokers[away].as_ref().unwrap().data_dir.stripe_of(TP);
    cluster.kill(away, true);
    let path = cluster.folders[away].path().join(format!("hard-state-{stripe:05}"));
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 4096 + 40).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 4096 + 40).unwrap();
    // Found once, it is not forgotten by the starts that follow.
    for _ in 0..2 {
        cluster.restart(away);
        cluster.open_founder(away);
        assert!(matches!(cluster.status(away).health, Health::Lost { lost_memory: false, .. }));
        cluster.kill(away, true);
    }
    cluster.restart(away);
    let mut places = founders();
    places.push((replica_id(99), broker_id(away)));
    cluster.open(away, 99, Start::Learner, &places);
    for at in 0..3 {
        cluster.handle(at).set_peers(places.clone().into());
    }
    let others: Vec<_> = (0..3).filter(|&at| at != away).map(|at| 11 + at as u64).collect();
    cluster.drive(&[others[0], others[1], 99], &[11 + away as u64], true);
    cluster.until_equal(&[0, 1, 2]);
    cluster.kill(away, true);
    cluster.restart(away);
    cluster.open(away, 99, Start::Learner, &places);
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
    assert_eq!((cluster.status(away).health, cluster.status(away).is_voter), (Health::Ok, true));
    // Nothing is kept of the one that was replaced.
    cluster.kill(away, true);
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let (_, states, rot) = HardStateFile::open(disk, cluster.folders[away].path(), stripe).unwrap();
    assert!(rot.is_none());
    assert_eq!(states.keys().copied().collect::<Vec<_>>(), [replica_id(99)]);
}

#[test]
fn a_voter_whose_folder_is_gone_with_its_hard_states_is_not_made_anew() {
    use std::os::unix::fs::FileExt as _;
    // A flip in the header, and one in a sector: what is left of the file still names it.
    for position in [0, 4096 + 512 * 8 + 40] {
        let mut cluster = Cluster::founded(config(), small_segments());
        cluster.write_many(100);
        cluster.until_equal(&[0, 1, 2]);
        let away = (cluster.leader() + 1) % 3;
        let data_dir = Arc::clone(&cluster.brokers[away].as_ref().unwrap().data_dir);
        let (stripe, dir) = (data_dir.stripe_of(TP), data_dir.replica_dir(TP));
        drop(data_dir);
        cluster.kill(away, true);
        let path = cluster.folders[away].path().join(format!("hard-state-{stripe:05}"));
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, position).unwrap();
        file.write_all_at(&[byte[0] ^ 1], position).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        for _ in 0..2 {
            cluster.restart(away);
            cluster.open_founder(away);
            let health = cluster.status(away).health;
            assert!(matches!(health, Health::Lost { lost_memory: false, .. }), "{position}: {health:?}");
            cluster.kill(away, true);
        }
    }
}

#[test]
fn a_follower_that_catches_up_does_not_keep_a_dead_leader_alive() {
    let config = ShardsConfig { checkpoint_entries: 200, offer_after_bytes: 16 << 10, pull_bytes: 1 << 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    cluster.write_many(100);
    let old = cluster.leader();
    let (away, third) = ((old + 1) % 3, (old + 2) % 3);
    cluster.cut(away);
    for _ in 0..20 {
        cluster.write_many(100);
    }
    cluster.until_equal(&[old, third]);
    // A batch at a time, each after a while: it takes longer than anyone here waits.
    cluster.network.pull_takes.store(20, Ordering::Relaxed);
    cluster.join(away);
    let pulled = cluster.metrics(away).pulled_bytes;
    until("it catches up", || (cluster.metrics(away).pulled_bytes > pulled + 10_000).then_some(()));
    cluster.kill(old, false);
    let both = || format!("{:?}\n{:?}\n", cluster.status(away), cluster.status(third));
    // It serves once the other one has what is committed: a majority needs that one.
    let leads = || matches!(cluster.status(third).role, Role::Elected | Role::Leader).then_some(());
    until_or("another leads", both, leads);
    cluster.network.pull_takes.store(0, Ordering::Relaxed);
    cluster.until_equal(&[away, third]);
}

impl Cluster {
    /// The segments of a broker's replica, the oldest first.
    fn segments(&self, at: usize) -> Vec<PathBuf> {
        let dir = self.brokers[at].as_ref().unwrap().data_dir.replica_dir(TP);
        let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|it| it == "log")).collect();
        files.sort();
        files
    }

    /// Another replica takes this one's place on its broker, which keeps the folder.
    fn replace(&mut self, at: usize, replica: u64) {
        let mut places = founders();
        places.push((replica_id(replica), broker_id(at)));
        self.open(at, replica, Start::Learner, &places);
        for at in 0..3 {
            self.handle(at).set_peers(places.clone().into());
        }
        let others: Vec<_> = (0..3).filter(|&other| other != at).map(|at| 11 + at as u64).collect();
        self.drive(&[others[0], others[1], replica], &[11 + at as u64], true);
    }
}

/// Flips bits of a byte.
fn damage(path: &std::path::Path, position: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, position).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], position).unwrap();
}

#[test]
fn a_replica_that_takes_another_ones_place_pulls_what_is_damaged_and_keeps_the_rest() {
    let config = ShardsConfig { checkpoint_entries: 100, pull_bytes: 8 << 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    for _ in 0..10 {
        cluster.write_many(100);
    }
    cluster.until_equal(&[0, 1, 2]);
    let at = (cluster.leader() + 1) % 3;
    let segments = cluster.segments(at);
    assert!(segments.len() > 10, "{segments:?}");
    cluster.kill(at, true);
    // A byte here, a byte there, and a file.
    let middle = |path: &std::path::Path| std::fs::metadata(path).unwrap().len() / 2;
    damage(&segments[2], middle(&segments[2]));
    damage(&segments[5], 100);
    damage(&segments[5], middle(&segments[5]));
    std::fs::remove_file(&segments[7]).unwrap();
    // Nor does it say any more whose it was.
    damage(&segments[0].with_file_name("replica"), 20);
    cluster.restart(at);
    cluster.replace(at, 99);
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
    let (pulled, size) = (cluster.metrics(at).pulled_bytes, cluster.status(at).size_bytes);
    assert!(size > 900_000 && pulled < 150_000, "{pulled} of {size} bytes were pulled");
    // It is one like any other, and answers for all of it.
    cluster.kill(at, true);
    cluster.restart(at);
    cluster.open(at, 99, Start::Learner, &founders());
    cluster.until_equal(&[0, 1, 2]);
}

#[test]
fn what_another_history_left_is_not_kept() {
    let config = ShardsConfig { checkpoint_entries: 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    cluster.write_many(20);
    cluster.until_equal(&[0, 1, 2]);
    // Its tail is whole, was flushed, and is none of the group's.
    let old = cluster.cut_leader_with_tail(300);
    for _ in 0..300 {
        cluster.write();
    }
    cluster.kill(old, true);
    cluster.restart(old);
    cluster.replace(old, 99);
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
}

#[test]
fn rot_that_a_coordinator_meets_when_it_steps_down_costs_the_range_and_not_the_replica() {
    let mut cluster = Cluster::new(config(), small_segments());
    cluster.replays = true;
    cluster.open_founders();
    cluster.write_many(300);
    cluster.until_equal(&[0, 1, 2]);
    let old = cluster.leader();
    let segments = cluster.segments(old);
    damage(&segments[1], 20_000);
    let to = replica_id(11 + (old as u64 + 1) % 3);
    // It may be answered by the replica's end.
    drop(ask(|reply| cluster.handle(old).transfer_leader(Some(to), reply)));
    let is_lost = || matches!(cluster.status(old).health, Health::Lost { .. });
    until("it is repaired", || {
        assert!(!is_lost(), "{:?}", cluster.status(old));
        (cluster.metrics(old).repaired_ranges > 0).then_some(())
    });
    assert!(cluster.metrics(old).replicas_ended > 0, "it was met");
    cluster.write_many(10);
    cluster.until_equal(&[0, 1, 2]);
    assert_eq!(cluster.status(old).health, Health::Ok);
    assert!(cluster.metrics(old).pulled_bytes < 20_000, "{:?}", cluster.metrics(old));
}

#[test]
fn a_follower_that_misses_many_small_entries_is_not_far_behind() {
    let config = ShardsConfig { checkpoint_entries: 10, offer_after_bytes: 256 << 10, ..config() };
    let mut cluster = Cluster::founded(config, small_segments());
    cluster.write_many_of(200, 20_000);
    cluster.until_equal(&[0, 1, 2]);
    let away = (cluster.leader() + 1) % 3;
    cluster.cut(away);
    // At the log's average they would be more than a megabyte.
    for _ in 0..10 {
        cluster.write_many_of(20, 10);
    }
    cluster.join(away);
    cluster.until_equal(&[0, 1, 2]);
    assert_eq!(cluster.metrics(away).pulled_bytes, 0, "it was sent what it missed");
}

// ---- compaction ----

fn compacted_topic() -> (ShardsConfig, LogConfig) {
    let compaction = CompactionConfig { dirty_per_mille_min: 1, ..CompactionConfig::default() };
    let config = ShardsConfig {
        compaction_every: Duration::from_millis(20),
        compaction_bytes_per_second: 1 << 30,
        checkpoint_bytes: 32 << 10,
        replay_entries_max: 1,
        offer_after_bytes: 64 << 10,
        pull_bytes: 16 << 10,
        ..config()
    };
    (config, LogConfig { compaction: Some(compaction), ..small_segments() })
}

impl Cluster {
    /// Writes batches with one record each, of so many keys in turn; the last of each key tells which number it was.
    fn write_keyed(&mut self, numbers: std::ops::Range<i32>, keys: i32) {
        let leader = self.handle(self.leader()).clone();
        let answers: Vec<_> = numbers
            .map(|number| {
                let mut builder = RecordBatchBuilder::new(Compression::None).producer(
                    ProducerId::new(1),
                    ProducerEpoch::new(0),
                    Sequence::new(self.next_sequence),
                );
                self.next_sequence += 1;
                let mut value = vec![7; 900];
                value[..4].copy_from_slice(&number.to_be_bytes());
                let key = (number % keys).to_be_bytes();
                builder.append(Timestamp::new(1_000), Some(&key), Some(&value), []).unwrap();
                let bytes = builder.build();
                let header = BatchHeader::parse(&bytes).unwrap();
                let (sender, receiver) = oneshot::channel();
                leader.produce(bytes, header, Acks::Quorum, Permit::unbounded(), Reply::from(sender));
                receiver
            })
            .collect();
        for answer in answers {
            wait(answer).unwrap();
        }
    }

    /// The last number of each key, and how many records there are.
    fn view(&self, at: usize) -> (HashMap<i32, i32>, usize) {
        let number = |bytes: &[u8]| i32::from_be_bytes(bytes[..4].try_into().unwrap());
        let (mut view, mut count) = (HashMap::new(), 0);
        for split in flowstone_protocol::batch::split_batches(self.all_bytes(at).into()) {
            let (header, batch) = split.unwrap();
            if header.attributes.is_control() {
                continue;
            }
            for record in flowstone_protocol::record::records(batch, 1 << 20).unwrap() {
                let record = record.unwrap();
                view.insert(number(&record.key.unwrap()), number(&record.value.unwrap()));
                count += 1;
            }
        }
        (view, count)
    }
}

#[test]
fn a_follower_that_is_behind_a_compacted_log_is_given_what_is_left_of_it() {
    let (config, log) = compacted_topic();
    let mut cluster = Cluster::founded(config, log);
    cluster.write_keyed(0..20, 10);
    let leader = cluster.leader();
    let behind = (0..3).find(|&at| at != leader).unwrap();
    cluster.kill(behind, true);
    cluster.write_keyed(20..800, 10);
    let expected: HashMap<i32, i32> = (0..10).map(|key| (key, 790 + key)).collect();
    // Readers see the same while it is compacted, and after.
    until("the log is compacted", || {
        let at = cluster.leader();
        assert_eq!(cluster.view(at).0, expected);
        (cluster.metrics(at).compaction_freed_bytes > 400 << 10).then_some(())
    });
    assert!(cluster.view(cluster.leader()).1 < 300, "records have gone");
    cluster.restart(behind);
    cluster.open_founder(behind);
    let others = (0..3).filter(|&at| at != behind).count();
    assert_eq!(others, 2);
    until_or(
        "it has caught up",
        || format!("{:?}", cluster.status(behind)),
        || {
            let (status, leader) = (cluster.status(behind), cluster.status(cluster.leader()));
            (status.high_watermark == leader.high_watermark && status.end_offset == leader.end_offset).then_some(())
        },
    );
    let own = broker_id(behind);
    let by_offset = |pulls: &[(BrokerId, BrokerId, PullWhat)]| {
        pulls.iter().filter(|(by, _, what)| *by == own && matches!(what, PullWhat::Offsets { .. })).count()
    };
    assert!(by_offset(&cluster.network.pulls.lock().unwrap()) > 1, "it came by offset, in pieces");
    assert_eq!(cluster.view(behind).0, expected);
    // It goes on as any other, and can lead.
    cluster.write_keyed(800..900, 10);
    let expected: HashMap<i32, i32> = (0..10).map(|key| (key, 890 + key)).collect();
    for at in 0..3 {
        until("all have it", || (cluster.view(at).0 == expected).then_some(()));
        until("what has gone is not counted", || {
            (cluster.status(at).records == cluster.view(at).1 as u64).then_some(())
        });
    }
    drop(ask(|reply| cluster.handle(cluster.leader()).transfer_leader(Some(replica_id(11 + behind as u64)), reply)));
    until("it leads", || (cluster.leader() == behind).then_some(()));
    cluster.write_keyed(900..950, 10);
    assert_eq!(cluster.view(behind).0.values().copied().max(), Some(949));
}

#[test]
fn damage_in_a_compacted_segment_is_replaced_by_what_another_replica_has() {
    let (config, log) = compacted_topic();
    let scrubs = ShardsConfig { scrub_bytes_per_second: 64 << 20, scrub_every: Duration::from_millis(50), ..config };
    let mut cluster = Cluster::founded(scrubs, log);
    cluster.write_keyed(0..600, 10);
    let at = cluster.leader();
    let dir = cluster.brokers[at].as_ref().unwrap().data_dir.replica_dir(TP);
    let cleaned = || -> Option<PathBuf> {
        let names = std::fs::read_dir(&dir).unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        names.filter(|name| name.ends_with(".log") && name.matches('-').count() == 2).min().map(|name| dir.join(name))
    };
    until("the log is compacted", || (cluster.metrics(at).compactions > 0).then_some(()));
    let expected = cluster.view(at).0;
    // A pass may take its place just then: then it is another file's turn.
    let mut damaged = HashSet::new();
    until("damage is found and repaired", || {
        if let Some(path) = cleaned()
            && let Ok(bytes) = std::fs::read(&path)
            && bytes.len() > 100
            && damaged.insert(path.clone())
        {
            // In place: it may be open.
            use std::os::unix::fs::FileExt as _;
            let last = bytes.len() - 1;
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[bytes[last] ^ 1], last as u64).unwrap();
        }
        (cluster.metrics(at).repaired_ranges > 0).then_some(())
    });
    until("it is whole", || {
        let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cluster.view(at).0));
        (answer.ok()? == expected).then_some(())
    });
}

#[test]
fn a_leader_that_can_not_read_what_is_not_committed_gives_way() {
    let mut cluster = Cluster::founded(config(), small_segments());
    cluster.write_many(20);
    cluster.until_equal(&[0, 1, 2]);
    let at = cluster.leader();
    let others = [(at + 1) % 3, (at + 2) % 3];
    for other in others {
        cluster.kill(other, false);
    }
    // What it takes in from now on nobody else gets.
    let (before, handle) = (cluster.status(at).end_offset, cluster.handle(at).clone());
    for sequence in 20..320 {
        let (bytes, header) = batch(1, sequence, 1, 900);
        let (sender, _) = oneshot::channel();
        handle.produce(bytes, header, Acks::Quorum, Permit::unbounded(), Reply::from(sender));
    }
    drop(handle);
    until("it has all of it", || (cluster.status(at).end_offset >= before.plus(300)).then_some(()));
    cluster.kill(at, false);
    cluster.restart(at);
    cluster.open_founder(at);
    let damaged = cluster.segments(at)[2].clone();
    damage(&damaged, std::fs::metadata(&damaged).unwrap().len() / 2);
    // One that has less is not elected by it.
    cluster.restart(others[0]);
    cluster.open_founder(others[0]);
    until_or(
        "it gives way",
        || format!("{:?}", cluster.status(at)),
        || matches!(cluster.status(at).health, Health::Lost { .. }).then_some(()),
    );
    cluster.restart(others[1]);
    cluster.open_founder(others[1]);
    cluster.next_sequence = 20;
    cluster.write();
    assert_ne!(cluster.leader(), at);
    cluster.until_equal(&others);
}
