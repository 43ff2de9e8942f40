//! One-voter replicas on a disk that tears, forgets, fails and fills up: whatever happens when, what was acknowledged is
//! there.
//!
//! Everything runs in one thread and is a function of the seed. Flushes, votes and checkpoints that a replica ordered are
//! performed late and in any order that the shard could choose; crashes come in the middle of any operation on the disk.

mod ledger;
mod shell;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::{ErrorCode, Offset, ReplicaId, Term, Timestamp};
use flowstone_replication::effects::{FlushOrder, HardStateNumber};
use flowstone_replication::{
    Acks, CannotOpen, Effects, Ended, Event, FlushMode, LogConfig, Produced, ReadAnswer, ReadRequest, Replica,
    ReplicaConfig, Role, TrimTo,
};
use flowstone_storage::checkpoint::CREATION_INDEX;
use flowstone_storage::hard_state::HardStateFlushJob;
use flowstone_storage::sim_disk::{Crash, Operation};
use flowstone_storage::{CheckpointJob, Disk, HardState, HardStateFile, Log, OpenError, SimDisk};
use ledger::{Ledger, batch};
use shell::{Answer, config, create, produce, reply};
use tokio::sync::oneshot::error::TryRecvError;

const REPLICA: ReplicaId = ReplicaId::new(1);
const OPERATIONS: u64 = 600;

/// SplitMix64.
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

/// What a run saw: a run that saw none of something proves nothing about it.
#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    acknowledged: u64,
    duplicates: u64,
    lives: u64,
    power_failures: u64,
    ends: u64,
    refused_full: u64,
    taken_after_full: u64,
    checkpoints: u64,
    trims: u64,
    checked_batches: u64,
    clean_stops: u64,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.acknowledged += other.acknowledged;
        self.duplicates += other.duplicates;
        self.lives += other.lives;
        self.power_failures += other.power_failures;
        self.ends += other.ends;
        self.refused_full += other.refused_full;
        self.taken_after_full += other.taken_after_full;
        self.checkpoints += other.checkpoints;
        self.trims += other.trims;
        self.checked_batches += other.checked_batches;
        self.clean_stops += other.clean_stops;
    }
}

/// How a run is set up.
#[derive(Debug, Clone, Copy)]
struct Setup {
    seed: u64,
    flush: FlushMode,
    /// The power may fail; else only the process is killed.
    power: bool,
}

type Key = (i64, i32);

/// What the outside knows: it survives everything.
#[derive(Default)]
struct Known {
    next_sequence: BTreeMap<i64, i32>,
    sent: BTreeMap<Key, Bytes>,
    acknowledged: BTreeMap<Key, Offset>,
    /// Highest seen while it led.
    term: Term,
    high_watermark: Offset,
    log_start: Offset,
    was_full: bool,
    seen: Seen,
}

/// One life of the process.
struct Life {
    replica: Option<Replica<Ledger>>,
    stripe: HardStateFile,
    flush: Option<FlushOrder>,
    checkpoint: Option<CheckpointJob>,
    /// Appended to the stripe's file, not flushed.
    votes: Vec<HardStateNumber>,
    votes_in_flight: Option<(HardStateFlushJob, Vec<HardStateNumber>)>,
    hard_state: Option<HardState>,
    waiting: Vec<(Key, Answer<Produced>)>,
    trimming: Vec<Answer<Offset>>,
    reading: Vec<Answer<ReadAnswer>>,
    ended: Option<Ended>,
}

struct World {
    setup: Setup,
    random: Random,
    disk: SimDisk,
    dir: PathBuf,
    stripe_dir: PathBuf,
    now: Timestamp,
    known: Known,
}

/// A promise that was broken.
type Checked<T = ()> = Result<T, String>;

/// Why a life could not go on; the next one begins.
enum Over {
    /// Crash, or a failure that a process would not survive either.
    Life,
    Broken(String),
}

impl From<String> for Over {
    fn from(broken: String) -> Self {
        Self::Broken(broken)
    }
}

fn run(setup: Setup) -> Checked<Seen> {
    let disk = SimDisk::new(setup.seed);
    let mut world = World {
        setup,
        random: Random(setup.seed ^ 0x5eed),
        dir: PathBuf::from("/data/replica"),
        stripe_dir: PathBuf::from("/data/hard-state"),
        disk,
        now: Timestamp::new(1_000_000),
        known: Known::default(),
    };
    let shared = world.disk.shared();
    shared.create_dir_all(&world.stripe_dir).unwrap();
    HardStateFile::create(&shared, &world.stripe_dir, 0).unwrap();
    create(&shared, &world.dir, REPLICA.get(), &[REPLICA.get()]);
    let mut operations = 0;
    while operations < OPERATIONS {
        match world.live(&mut operations) {
            Ok(()) => {}
            Err(Over::Life) => world.die(),
            Err(Over::Broken(broken)) => return Err(format!("seed {}: {broken}", setup.seed)),
        }
    }
    // At the end all faults stop, and everything is looked at once more.
    world.die();
    world.disk.set_bytes_max(None);
    match world.open() {
        Ok(mut life) => world.lead(&mut life).map_err(|over| match over {
            Over::Broken(broken) => format!("seed {}: at the end: {broken}", setup.seed),
            Over::Life => format!("seed {}: it does not lead at the end", setup.seed),
        })?,
        Err(Over::Broken(broken)) => return Err(format!("seed {}: at the end: {broken}", setup.seed)),
        Err(Over::Life) => return Err(format!("seed {}: it does not open at the end", setup.seed)),
    }
    Ok(world.known.seen)
}

impl World {
    fn config(&self) -> ReplicaConfig {
        let mut config = config(REPLICA.get());
        config.flush = self.setup.flush;
        config.checkpoint_entries = 40;
        config.seed = self.setup.seed;
        config
    }

    fn log_config() -> LogConfig {
        LogConfig {
            segment_bytes: 16 << 10,
            zero_ahead_bytes: 4 << 10,
            room_kept_bytes: 32 << 10,
            ..LogConfig::default()
        }
    }

    /// The process is gone; perhaps the power with it.
    fn die(&mut self) {
        let power = self.setup.power && self.random.one_in(2);
        self.known.seen.power_failures += u64::from(power);
        self.disk.restart(if power { Crash::Power } else { Crash::Process });
        // Someone frees the disk before it is started again, or not.
        if self.random.one_in(2) {
            self.disk.set_bytes_max(None);
        }
    }

    fn open(&mut self) -> Result<Life, Over> {
        self.known.seen.lives += 1;
        let shared = self.disk.shared();
        let (stripe, found, rot) = match HardStateFile::open(shared, &self.stripe_dir, 0) {
            Ok(opened) => opened,
            Err(OpenError::Io { .. }) => return self.cannot_open(),
            Err(error) => return Err(Over::Broken(format!("the hard states are not opened: {error}"))),
        };
        if let Some(rot) = rot {
            return Err(Over::Broken(format!("rot in the hard states that nobody made: {rot:?}")));
        }
        let hard_state = found.get(&REPLICA).copied();
        let mut life = Life {
            replica: None,
            stripe,
            flush: None,
            checkpoint: None,
            votes: Vec::new(),
            votes_in_flight: None,
            hard_state,
            waiting: Vec::new(),
            trimming: Vec::new(),
            reading: Vec::new(),
            ended: None,
        };
        self.open_replica(&mut life, Ledger::default())?;
        Ok(life)
    }

    fn cannot_open<T>(&self) -> Result<T, Over> {
        // A full disk is freed, at the latest when nothing else helps.
        self.disk.set_bytes_max(None);
        Err(Over::Life)
    }

    fn open_replica(&mut self, life: &mut Life, machine: Ledger) -> Result<(), Over> {
        let shared: Arc<dyn Disk> = self.disk.shared();
        let flushed = life.hard_state.map_or(CREATION_INDEX, |state| state.flushed);
        let log = match Log::open(shared, &self.dir, Self::log_config(), flushed, self.now) {
            Ok(log) => log,
            Err(OpenError::Io { .. }) => return self.cannot_open(),
            Err(error) => return Err(Over::Broken(format!("the log is not opened: {error}"))),
        };
        match Replica::open(log, life.hard_state, machine, self.config()) {
            Ok(replica) => life.replica = Some(replica),
            Err(CannotOpen(why)) => return Err(Over::Broken(format!("the replica is not opened: {why}"))),
        }
        Ok(())
    }

    /// Elects it and looks at everything.
    fn lead(&mut self, life: &mut Life) -> Result<(), Over> {
        self.step(life, [Event::Campaign])?;
        self.settle(life)?;
        self.check_all(life)
    }

    /// Does all that was ordered.
    fn settle(&mut self, life: &mut Life) -> Result<(), Over> {
        while life.flush.is_some()
            || life.checkpoint.is_some()
            || !life.votes.is_empty()
            || life.votes_in_flight.is_some()
        {
            self.do_one_job(life)?;
        }
        Ok(())
    }

    fn live(&mut self, operations: &mut u64) -> Result<(), Over> {
        if self.random.one_in(3) {
            self.disk.crash_after(self.random.below(60));
        }
        let mut life = self.open()?;
        self.lead(&mut life)?;
        self.disk.cancel_crash();
        while *operations < OPERATIONS {
            *operations += 1;
            self.now = self.now.after(std::time::Duration::from_millis(self.random.below(1_000)));
            self.operate(&mut life)?;
            self.collect(&mut life)?;
            if life.ended.is_some() {
                self.reopen(&mut life)?;
            }
        }
        Ok(())
    }

    /// What ended is opened anew, in the same process.
    fn reopen(&mut self, life: &mut Life) -> Result<(), Over> {
        self.known.seen.ends += 1;
        let Some(replica) = life.replica.take() else { return Err(Over::Life) };
        life.ended = None;
        // What is in flight comes home first.
        life.votes.clear();
        life.votes_in_flight = life.votes_in_flight.take().map(|(job, _)| (job, Vec::new()));
        if let Some(order) = life.flush.take() {
            drop(order.job.run());
        }
        if let Some(job) = life.checkpoint.take() {
            drop(job.run());
        }
        self.collect(life)?;
        if !life.waiting.is_empty() || !life.trimming.is_empty() {
            return Err(Over::Broken("it ended, and somebody waits for it still".to_owned()));
        }
        if self.disk.is_crashed() {
            return Err(Over::Life);
        }
        let machine = replica.into_machine();
        self.open_replica(life, machine)?;
        self.lead(life)
    }

    fn step(&mut self, life: &mut Life, events: impl IntoIterator<Item = Event<Ledger>>) -> Result<(), Over> {
        let Some(replica) = &mut life.replica else { return Err(Over::Life) };
        let effects = replica.step(events, self.now);
        self.perform(life, effects)
    }

    fn perform(&mut self, life: &mut Life, effects: Effects<Ledger>) -> Result<(), Over> {
        let Effects { send_now, send_flushed, hard_state, flushed, flush, checkpoint, answers, tickets, ended, .. } =
            effects;
        if !send_now.is_empty() || !send_flushed.is_empty() {
            return Err(Over::Broken("alone, it talks to somebody".to_owned()));
        }
        for answer in answers {
            answer.send();
        }
        for order in tickets {
            if let (reply, Ok(answer)) = order.run() {
                reply.send(Ok(answer));
            }
        }
        if flush.is_some() {
            if life.flush.is_some() {
                return Err(Over::Broken("two flushes at a time".to_owned()));
            }
            life.flush = flush;
        }
        if checkpoint.is_some() {
            life.checkpoint = checkpoint;
        }
        life.ended = ended;
        let mut states = Vec::new();
        if let Some((number, state)) = hard_state {
            states.push((REPLICA, state));
            life.votes.push(number);
            life.hard_state = Some(state);
        }
        if let Some(state) = flushed {
            states.push((REPLICA, state));
            life.hard_state = Some(state);
        }
        if !states.is_empty() && life.stripe.append(&states).is_err() {
            return Err(Over::Life);
        }
        if self.disk.is_crashed() { Err(Over::Life) } else { Ok(()) }
    }

    /// Whatever was ordered, in any order.
    fn do_one_job(&mut self, life: &mut Life) -> Result<(), Over> {
        match self.random.below(3) {
            0 => {
                if let Some(order) = life.flush.take() {
                    let done = order.job.run();
                    self.step(life, [Event::Flushed(done)])?;
                }
            }
            1 => {
                if let Some((job, numbers)) = life.votes_in_flight.take() {
                    let done = job.run();
                    if life.stripe.flush_done(done).is_err() {
                        return Err(Over::Life);
                    }
                    self.step(life, numbers.into_iter().map(Event::HardStateFlushed).collect::<Vec<_>>())?;
                } else if let Some(job) = life.stripe.flush_job() {
                    life.votes_in_flight = Some((job, std::mem::take(&mut life.votes)));
                } else if life.stripe.flush().is_err() {
                    return Err(Over::Life);
                }
            }
            _ => {
                if let Some(job) = life.checkpoint.take() {
                    let done = job.run();
                    self.known.seen.checkpoints += 1;
                    self.step(life, [Event::CheckpointWritten(done)])?;
                }
            }
        }
        Ok(())
    }

    fn operate(&mut self, life: &mut Life) -> Result<(), Over> {
        match self.random.below(100) {
            0..40 => {
                let mut events = Vec::new();
                for _ in 0..=self.random.below(3) {
                    let producer = self.random.below(3) as i64;
                    let sequence = self.known.next_sequence.entry(producer).or_default();
                    let records = 1 + self.random.below(3) as i32;
                    let key = (producer, *sequence);
                    *sequence += records;
                    let size = if self.random.one_in(10) { 3_000 } else { 120 };
                    let (bytes, header) = batch(key.0, key.1, records, self.random.below(size) as usize + 8);
                    self.known.sent.insert(key, bytes.clone());
                    let acks = if self.random.one_in(8) { Acks::Leader } else { Acks::Quorum };
                    let (event, answer) = produce((bytes, header), acks);
                    events.push(event);
                    // What the leader alone acknowledged is promised as far as it is alone: here, wholly.
                    life.waiting.push((key, answer));
                }
                self.step(life, events)
            }
            40..50 => {
                // A client tries again, whatever it was told.
                let at = self.random.below(self.known.sent.len().max(1) as u64) as usize;
                let Some((&key, bytes)) = self.known.sent.iter().nth(at) else { return Ok(()) };
                let bytes = bytes.clone();
                let header = flowstone_protocol::BatchHeader::parse(&bytes).expect("ours");
                let (event, answer) = produce((bytes, header), Acks::Quorum);
                life.waiting.push((key, answer));
                self.step(life, [event])
            }
            50..82 => self.do_one_job(life),
            82..86 => self.check_some(life),
            86..88 => {
                let high_watermark = self.high_watermark(life).get();
                let log_start = self.known.log_start.get();
                let to = log_start + self.random.below((high_watermark - log_start).max(0) as u64 / 4 + 1) as i64;
                let (reply, answer) = reply();
                life.trimming.push(answer);
                self.step(life, [Event::Trim { to: TrimTo::Offset(Offset::new(to)), reply }])
            }
            88 => self.step(life, [Event::CheckpointNow]),
            89 => self.step(life, [Event::FlushNow]),
            90..92 => {
                // Under `relaxed` a failed flush may lose what it promised in memory alone.
                if self.setup.flush == FlushMode::Quorum {
                    let failing = [Operation::Sync, Operation::Sync, Operation::Write, Operation::Rename];
                    let failing = failing[self.random.below(4) as usize];
                    self.disk.fail(failing, self.random.below(3));
                }
                Ok(())
            }
            92 => {
                self.disk.set_bytes_max(Some(self.disk.used_bytes() + 32_768 + self.random.below(8_000)));
                Ok(())
            }
            93..96 => {
                self.disk.set_bytes_max(None);
                self.step(life, [Event::RoomAgain])
            }
            96..98 => {
                self.disk.crash_after(self.random.below(30));
                Ok(())
            }
            98 => self.stop_cleanly(life),
            _ => Err(Over::Life),
        }
    }

    /// Finishes, closes, and comes back: nothing may be missing, whatever the mode.
    fn stop_cleanly(&mut self, life: &mut Life) -> Result<(), Over> {
        self.step(life, [Event::FlushNow, Event::CheckpointNow])?;
        self.settle(life)?;
        self.collect(life)?;
        if life.ended.is_some() {
            return Ok(());
        }
        let Some(replica) = life.replica.take() else { return Err(Over::Life) };
        let hard_state = replica.hard_state();
        let Ok(flushed) = replica.into_log().close() else { return Err(Over::Life) };
        let state = HardState { flushed, ..hard_state };
        if life.stripe.append(&[(REPLICA, state)]).and_then(|()| life.stripe.flush()).is_err() {
            return Err(Over::Life);
        }
        self.known.seen.clean_stops += 1;
        Err(Over::Life)
    }

    /// Takes the answers that came.
    fn collect(&mut self, life: &mut Life) -> Result<(), Over> {
        for (key, mut answer) in std::mem::take(&mut life.waiting) {
            match answer.try_recv() {
                Ok(Ok(Produced { base_offset, .. })) => {
                    self.known.seen.acknowledged += 1;
                    if self.known.was_full {
                        self.known.was_full = false;
                        self.known.seen.taken_after_full += 1;
                    }
                    if let Some(&before) = self.known.acknowledged.get(&key) {
                        self.known.seen.duplicates += 1;
                        if before != base_offset {
                            return Err(Over::Broken(format!(
                                "batch {key:?} was acknowledged at {before}, and now at {base_offset}"
                            )));
                        }
                    }
                    self.known.acknowledged.insert(key, base_offset);
                }
                Ok(Err(error)) => {
                    if error.code == ErrorCode::DiskFull {
                        self.known.seen.refused_full += 1;
                        self.known.was_full = true;
                    }
                    if !error.is_retriable() {
                        return Err(Over::Broken(format!("a good batch is refused for good: {error}")));
                    }
                }
                Err(TryRecvError::Empty) => life.waiting.push((key, answer)),
                Err(TryRecvError::Closed) => {
                    return Err(Over::Broken(format!("batch {key:?} was dropped without an answer")));
                }
            }
        }
        for mut answer in std::mem::take(&mut life.trimming) {
            match answer.try_recv() {
                Ok(Ok(log_start)) => {
                    self.known.seen.trims += 1;
                    self.known.log_start = self.known.log_start.max(log_start);
                }
                Ok(Err(_)) => {}
                Err(TryRecvError::Empty) => life.trimming.push(answer),
                Err(TryRecvError::Closed) => {
                    return Err(Over::Broken("a trim was dropped without an answer".to_owned()));
                }
            }
        }
        self.note_status(life)
    }

    fn high_watermark(&self, life: &Life) -> Offset {
        life.replica.as_ref().map_or(Offset::ZERO, |replica| replica.status().high_watermark)
    }

    fn note_status(&mut self, life: &Life) -> Result<(), Over> {
        let Some(replica) = &life.replica else { return Ok(()) };
        let status = replica.status();
        if status.role == Role::Leader {
            let known = &mut self.known;
            if status.term < known.term {
                return Err(Over::Broken(format!("it leads in term {} after {}", status.term, known.term)));
            }
            known.term = status.term;
            if status.high_watermark < known.high_watermark && life.ended.is_none() {
                return Err(Over::Broken(format!(
                    "the high watermark goes back from {} to {}",
                    known.high_watermark, status.high_watermark
                )));
            }
            known.high_watermark = known.high_watermark.max(status.high_watermark);
        }
        Ok(())
    }

    fn read(&mut self, life: &mut Life, from: Offset) -> Result<Option<ReadAnswer>, Over> {
        let (reply, mut answer) = reply();
        let request = ReadRequest::new(from, 20_000);
        self.step(life, [Event::Read { request, reply }])?;
        match answer.try_recv() {
            Ok(Ok(read)) => {
                read.bytes.verify().map_err(|error| format!("read at {from}: {error}"))?;
                Ok(Some(read))
            }
            Ok(Err(error)) if error.is_retriable() => Ok(None),
            Ok(Err(error)) => Err(Over::Broken(format!("cannot read at {from}: {error}"))),
            Err(_) => Ok(None),
        }
    }

    fn check_some(&mut self, life: &mut Life) -> Result<(), Over> {
        // A reader waits meanwhile, and is answered or told.
        let (reply, answer) = reply();
        let from = self.high_watermark(life);
        let request = ReadRequest { wait: true, ..ReadRequest::new(from, 1) };
        life.reading.push(answer);
        life.reading.truncate(20);
        self.step(life, [Event::Read { request, reply }])?;
        let log_start = self.known.log_start.get();
        let from = log_start + self.random.below((from.get() - log_start).max(1) as u64) as i64;
        let actual = life.replica.as_ref().map_or(Offset::ZERO, |replica| replica.status().log_start);
        self.read(life, Offset::new(from).max(actual)).map(drop)
    }

    /// Everything acknowledged is there, whole, once, and where it was said to be.
    fn check_all(&mut self, life: &mut Life) -> Result<(), Over> {
        let before = self.known.term;
        let Some(replica) = &life.replica else { return Err(Over::Life) };
        let status = replica.status();
        if life.ended.is_some() || status.role != Role::Leader {
            return Err(Over::Life);
        }
        if status.term <= before {
            return Err(Over::Broken(format!("it leads in term {} again, after {before}", status.term)));
        }
        if status.log_start < self.known.log_start {
            return Err(Over::Broken(format!(
                "the log start goes back from {} to {}",
                self.known.log_start, status.log_start
            )));
        }
        let mut stored: BTreeMap<Key, (Offset, Bytes)> = BTreeMap::new();
        let (mut next, mut data_records) = (status.log_start, 0);
        while next < status.high_watermark {
            let Some(read) = self.read(life, next)? else { return Err(Over::Life) };
            for chunk in read.bytes.chunks {
                for batch in split_batches(chunk) {
                    let (header, batch) = batch.map_err(|error| format!("at {next}: {error}"))?;
                    if header.base_offset > next {
                        return Err(Over::Broken(format!("offsets {next} to {} are missing", header.base_offset)));
                    }
                    next = header.next_offset();
                    self.known.seen.checked_batches += 1;
                    if !header.attributes.is_control() {
                        data_records += header.data_records();
                        let key = (header.producer_id.get(), header.base_sequence.get());
                        if stored.insert(key, (header.base_offset, batch)).is_some() {
                            return Err(Over::Broken(format!("batch {key:?} is stored twice")));
                        }
                    }
                }
            }
        }
        for (key, &offset) in &self.known.acknowledged {
            if offset < status.log_start {
                continue;
            }
            match stored.get(key) {
                None => return Err(Over::Broken(format!("batch {key:?}, acknowledged at {offset}, is lost"))),
                Some((at, _)) if *at != offset => {
                    return Err(Over::Broken(format!("batch {key:?}, acknowledged at {offset}, is at {at}")));
                }
                Some(_) => {}
            }
        }
        for (key, (offset, batch)) in &stored {
            let Some(sent) = self.known.sent.get(key) else {
                return Err(Over::Broken(format!("at {offset} is a batch that nobody sent: {key:?}")));
            };
            // Base offset and leader epoch are stamped, at 0..8 and 12..16; all else is as it was sent.
            if batch[8..12] != sent[8..12] || batch[16..] != sent[16..] {
                return Err(Over::Broken(format!("batch {key:?} at {offset} has other bytes than were sent")));
            }
        }
        let first_is_cut = stored.values().any(|(offset, _)| *offset < status.log_start);
        // Counted from a segment whose index is not at hand they are spread evenly: off by its control batches at most.
        let readable = (status.high_watermark.get() - status.log_start.get()).unsigned_abs();
        let slack = 2 * readable.saturating_sub(data_records) + 2;
        if !first_is_cut && data_records.abs_diff(status.records) > slack {
            return Err(Over::Broken(format!("{} records are counted, {data_records} are there", status.records)));
        }
        let replica = life.replica.as_ref().expect("it was there above");
        let committed = replica.log().committed_index();
        if replica.applied() != committed {
            return Err(Over::Broken(format!("{committed} is committed, the machine has {}", replica.applied())));
        }
        self.note_status(life)
    }
}

fn run_all(setups: impl Iterator<Item = Setup>) -> Seen {
    let mut seen = Seen::default();
    for setup in setups {
        match run(setup) {
            Ok(run) => seen.add(run),
            Err(broken) => panic!("{broken} ({setup:?})"),
        }
    }
    seen
}

#[test]
fn what_is_acknowledged_survives_any_crash() {
    // More, where there is time: FLOWSTONE_SEEDS=10000 cargo test --release -p flowstone-replication --test simulation
    let seeds = std::env::var("FLOWSTONE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(60);
    let seen = run_all((0..seeds).map(|seed| Setup { seed, flush: FlushMode::Quorum, power: true }));
    eprintln!("{seen:?}");
    // Not vacuous: each of these happened, often.
    let often = |count: u64, per_seed: u64| assert!(count >= seeds * per_seed, "{count} in {seeds} seeds: {seen:?}");
    often(seen.acknowledged, 200);
    often(seen.checked_batches, 2_000);
    often(seen.power_failures, 6);
    often(seen.lives - seen.power_failures, 6);
    often(seen.ends, 2);
    often(seen.refused_full, 10);
    often(seen.taken_after_full, 1);
    often(seen.duplicates, 20);
    often(seen.trims, 4);
    often(seen.checkpoints, 10);
    often(seen.clean_stops, 2);
}

#[test]
fn relaxed_survives_the_death_of_the_process() {
    let setups = (1_000..1_050).map(|seed| Setup { seed, flush: FlushMode::Relaxed, power: false });
    let seen = run_all(setups);
    assert!(seen.acknowledged > 3_000 && seen.lives > 200, "{seen:?}");
}

/// The simulation finds a replica that acknowledges what is not flushed: that is what relaxed does, and the power fails.
#[test]
fn an_acknowledgement_before_the_flush_is_found() {
    let broken = (0..20)
        .filter_map(|seed| run(Setup { seed, flush: FlushMode::Relaxed, power: true }).err())
        .collect::<Vec<_>>();
    assert!(broken.iter().any(|broken| broken.contains("is lost")), "found only: {broken:?}");
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 0..3 {
        let setup = Setup { seed, flush: FlushMode::Quorum, power: true };
        assert_eq!(format!("{:?}", run(setup)), format!("{:?}", run(setup)));
    }
}
