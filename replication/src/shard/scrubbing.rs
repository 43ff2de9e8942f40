//! Rot: sealed segments are read again in the background, and what is damaged is replaced by another replica's bytes.
//!
//! One piece at a time is read per shard, at a bounded rate; a read of a client's that found rot is looked at at once.
//! Found rot ends nothing: reads of it fail, and are told to try again, until it is repaired.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use flowstone_protocol::{Error, Offset};
use flowstone_storage::{
    ReadError, Repair, RepairDone, Rotten, ScrubJob, ScrubPosition, Scrubbed, SegmentCopy, StorageError,
};

use super::{Message, Shard, ShardsConfig, Slot, SlotKey, State};
use crate::machine::Machine;
use crate::reply::Reply;
use crate::transport::{PullAnswer, PullRequest, PullWhat};
use crate::workers::JobKind;

/// The first round begins this late: a start has better to do.
const FIRST_ROUND_AFTER: Duration = Duration::from_secs(60);
/// Between two looks at replicas that have nothing sealed.
const NEXT_REPLICAS_AFTER: Duration = Duration::from_millis(10);
/// Replicas looked at in one go.
const REPLICAS_AT_ONCE: usize = 1_024;
/// Bytes of one piece.
const PIECE_BYTES_MIN: u64 = 64 << 10;
const PIECE_BYTES_MAX: u64 = 1 << 20;
/// Ranges of one replica that wait to be repaired; more are found again.
const WAITING_MAX: usize = 64;
/// The pause after a source that failed; doubled with each that follows.
const PAUSE_MIN: Duration = Duration::from_millis(200);
/// At most.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Where a shard's scrubbing is.
#[derive(Debug)]
pub(super) struct Scrubbing {
    bytes_per_second: u64,
    every: Duration,
    /// `None` while a piece is being read, and where nothing is scrubbed.
    at: Option<Instant>,
    round_began: Instant,
    slot: u32,
    position: ScrubPosition,
    /// Replicas of which a read found something that is being looked at.
    looking: BTreeSet<u32>,
    repairing: Vec<u32>,
}

impl Scrubbing {
    pub(super) fn new(config: &ShardsConfig, now: Instant) -> Self {
        let first = now + config.scrub_every.min(FIRST_ROUND_AFTER);
        Self {
            bytes_per_second: config.scrub_bytes_per_second,
            every: config.scrub_every,
            at: (config.scrub_bytes_per_second > 0).then_some(first),
            round_began: first,
            slot: 0,
            position: ScrubPosition::START,
            looking: BTreeSet::new(),
            repairing: Vec::new(),
        }
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.at
    }

    pub(super) fn repairs<'a, M: Machine>(&'a self, slots: &'a [Slot<M>]) -> impl Iterator<Item = Instant> + 'a {
        self.repairing.iter().filter_map(|&index| match slots[index as usize].repair.as_ref()?.step {
            Step::Until(at) => Some(at),
            Step::Ask | Step::Answer | Step::Job => None,
        })
    }

    fn piece_bytes(&self) -> u64 {
        (self.bytes_per_second / 4).clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX)
    }
}

/// A replica that ended over what is damaged is given up after so many failures in a row.
const MENDING_FAILURES_MAX: u32 = 12;

/// What of a replica is being repaired.
#[derive(Debug)]
pub(super) struct Repairing {
    rotten: Rotten,
    repair: Option<Box<Repair>>,
    /// The same of a cleaned segment, which is written anew as a whole.
    copy: Option<Box<SegmentCopy>>,
    waiting: VecDeque<Rotten>,
    step: Step,
    number: u64,
    failures: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Ask,
    Answer,
    Job,
    Until(Instant),
}

/// How a part of a repair ended.
#[derive(Debug)]
pub(crate) enum Repaired {
    /// Another broker gave the bytes, or did not.
    Answered { number: u64, answer: Result<PullAnswer, Error> },
    /// They were taken, or refused.
    Goes(Box<Repair>, Option<StorageError>),
    /// The same, of a cleaned segment.
    Copied(Box<SegmentCopy>, Option<StorageError>),
    /// The new file is in place, or is not.
    Ended(RepairDone),
}

impl<M: Machine> Shard<M> {
    /// The next piece, if it is time.
    pub(super) fn scrub_if_due(&mut self) {
        for index in std::mem::take(&mut self.scrubbing.repairing) {
            let Some(repairing) = &mut self.slots[index as usize].repair else { continue };
            self.scrubbing.repairing.push(index);
            if matches!(repairing.step, Step::Until(at) if at <= self.now) {
                repairing.step = Step::Ask;
                self.drive_repair(index);
            }
        }
        if self.stopping.is_some() || self.scrubbing.at.is_none_or(|at| at > self.now) {
            return;
        }
        for _ in 0..REPLICAS_AT_ONCE {
            let index = self.scrubbing.slot;
            let Some(slot) = self.slots.get(index as usize) else {
                // All were looked at: begin again some time later.
                let again = (self.scrubbing.round_began + self.scrubbing.every).max(self.now + Duration::from_secs(1));
                self.scrubbing.at = Some(again);
                self.scrubbing.round_began = again;
                self.scrubbing.slot = 0;
                self.scrubbing.position = ScrubPosition::START;
                return;
            };
            let job = match &slot.state {
                State::Running(replica) if slot.closing.is_none() => {
                    replica.log().scrub_job(self.scrubbing.position, self.scrubbing.piece_bytes())
                }
                _ => None,
            };
            if let Some(job) = job {
                self.scrubbing.at = None;
                return self.scrub(index, job, false);
            }
            self.scrubbing.slot += 1;
            self.scrubbing.position = ScrubPosition::START;
        }
        self.scrubbing.at = Some(self.now + NEXT_REPLICAS_AFTER);
    }

    fn scrub(&mut self, index: u32, job: ScrubJob, by_read: bool) {
        let slot = self.key(index);
        self.slots[index as usize].jobs += 1;
        let port = Arc::clone(&self.port);
        self.workers.submit(
            JobKind::Work,
            Box::new(move || {
                drop(port.inbox.report(Message::Scrubbed { slot, scrubbed: job.run(), by_read }));
            }),
        );
    }

    pub(super) fn on_scrubbed(&mut self, key: SlotKey, scrubbed: Result<Scrubbed, ReadError>, by_read: bool) {
        let index = key.index;
        let slot = &mut self.slots[index as usize];
        assert_eq!(slot.life, key.life, "a place is not given away while a job of its replica is in flight");
        slot.jobs -= 1;
        let tp = slot.spec.tp;
        let bytes = scrubbed.as_ref().map_or(0, |scrubbed| scrubbed.bytes);
        self.port.counters.scrubbed_bytes.fetch_add(bytes, Ordering::Relaxed);
        if by_read {
            self.scrubbing.looking.remove(&index);
        } else {
            match scrubbed.as_ref().ok().and_then(|scrubbed| scrubbed.next) {
                Some(next) => self.scrubbing.position = next,
                None => {
                    self.scrubbing.slot += 1;
                    self.scrubbing.position = ScrubPosition::START;
                }
            }
            let pause = Duration::from_secs_f64(bytes as f64 / self.scrubbing.bytes_per_second.max(1) as f64);
            self.scrubbing.at = Some(self.now + pause);
        }
        match scrubbed {
            Ok(Scrubbed { rotten: Some(rotten), .. }) => self.on_rotten(index, rotten),
            Ok(_) => {}
            Err(error) => tracing::warn!(%tp, %error, "cannot look for rot"),
        }
        if by_read && self.slots[index as usize].repair.is_none() {
            self.mended(index);
        }
        self.close_if_idle(index);
        self.drive_pull(index);
    }

    /// A read found rot there: it is measured, and repaired.
    pub(super) fn on_corrupt(&mut self, key: SlotKey, offset: Offset) {
        let index = key.index;
        let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.life == key.life) else { return };
        let State::Running(replica) = &mut slot.state else { return };
        if slot.closing.is_some() || self.stopping.is_some() || slot.repair.is_some() {
            return;
        }
        if slot.spec.has_peers()
            && let Err(error) = replica.seal_at(offset)
        {
            tracing::warn!(tp = %slot.spec.tp, %error, "damaged records can not be repaired: the log takes no writes");
        }
        let job = replica.log().scrub_job_at(offset);
        if let Some(job) = job
            && self.scrubbing.looking.insert(index)
        {
            self.scrub(index, job, true);
        }
    }

    /// Measures what a replica ended over.
    pub(super) fn look_at_rot(&mut self, index: u32, job: ScrubJob) {
        self.scrubbing.looking.insert(index);
        self.scrub(index, job, true);
    }

    fn on_rotten(&mut self, index: u32, rotten: Rotten) {
        let slot = &mut self.slots[index as usize];
        self.port.counters.rotten_ranges.fetch_add(1, Ordering::Relaxed);
        let (tp, offset, detail) = (slot.spec.tp, rotten.first_offset, &rotten.detail);
        let segment = rotten.segment.log_file();
        if !slot.spec.has_peers() {
            tracing::error!(%tp, segment, position = rotten.position, bytes = rotten.bytes, %offset, detail, "records are damaged on the disk, and there is no other replica to repair them from; restore the file from a backup, or trim the partition above them");
            return;
        }
        tracing::error!(%tp, segment, position = rotten.position, bytes = rotten.bytes, %offset, detail, "records are damaged on the disk; they are repaired from another replica");
        match &mut slot.repair {
            Some(repairing) => {
                let known = repairing.rotten.first_index == rotten.first_index
                    || repairing.waiting.iter().any(|other| other.first_index == rotten.first_index);
                if !known && repairing.waiting.len() < WAITING_MAX {
                    repairing.waiting.push_back(rotten);
                }
            }
            None => {
                slot.repair = Some(Box::new(Repairing {
                    rotten,
                    repair: None,
                    copy: None,
                    waiting: VecDeque::new(),
                    step: Step::Ask,
                    number: 0,
                    failures: 0,
                }));
                if !self.scrubbing.repairing.contains(&index) {
                    self.scrubbing.repairing.push(index);
                }
                self.drive_repair(index);
            }
        }
    }

    fn drive_repair(&mut self, index: u32) {
        let key = self.key(index);
        let slot = &mut self.slots[index as usize];
        let (State::Running(replica) | State::Mending { replica, .. }) = &slot.state else {
            slot.repair = None;
            return;
        };
        if slot.closing.is_some() || self.stopping.is_some() {
            slot.repair = None;
            return;
        }
        let Some(repairing) = slot.repair.as_mut().filter(|repairing| repairing.step == Step::Ask) else { return };
        let is_cleaned = repairing.rotten.segment.is_cleaned();
        if is_cleaned && repairing.copy.is_none() {
            repairing.copy = replica.log().begin_segment_copy(repairing.rotten.segment).map(Box::new);
            if repairing.copy.is_none() {
                if replica.log().has_cleaned(repairing.rotten.segment) {
                    // A pass is under way, which finds the damage, too, and gives up.
                    repairing.step = Step::Until(self.now + PAUSE_MIN);
                    return;
                }
                return self.next_repair(index);
            }
        }
        if !is_cleaned && repairing.repair.is_none() {
            let Ok(repair) = replica.log().repair(&repairing.rotten).map(Box::new) else {
                // It was trimmed meanwhile.
                return self.next_repair(index);
            };
            repairing.repair = Some(repair);
        }
        if repairing.repair.as_ref().is_some_and(|repair| repair.has_all()) {
            if let Some(repair) = repairing.repair.take() {
                repairing.step = Step::Job;
                self.repair_job(index, move || Repaired::Ended(repair.finish()));
            }
            return;
        }
        let what = match (&repairing.repair, &repairing.copy) {
            (_, Some(copy)) => {
                let Some((from, to)) = copy.wanted() else { return };
                PullWhat::Offsets { from, to, max_bytes: self.config.pull_bytes, held: copy.held() }
            }
            (Some(repair), None) => PullWhat::Batches {
                first: repair.next_index(),
                last: repairing.rotten.last_index,
                max_bytes: self.config.pull_bytes,
            },
            (None, None) => return,
        };
        let leader = replica.leader().filter(|&leader| leader != slot.spec.replica);
        let leader = leader.and_then(|leader| slot.places.broker_of(leader));
        let sources = slot.places.sources(slot.spec.replica, leader);
        if sources.is_empty() {
            repairing.step = Step::Until(self.now + PAUSE_MAX);
            return;
        }
        let (source, of) = sources[repairing.failures as usize % sources.len()];
        repairing.number += 1;
        repairing.step = Step::Answer;
        let (tp, number) = (slot.spec.tp, repairing.number);
        let port = Arc::clone(&self.port);
        let reply = Reply::new(move |answer| {
            let outcome = Repaired::Answered { number, answer };
            drop(port.inbox.report(Message::Repaired { slot: key, outcome }));
        });
        self.transport.pull(source, PullRequest { tp, of, what }, reply);
    }

    fn repair_job(&mut self, index: u32, job: impl FnOnce() -> Repaired + Send + 'static) {
        let slot = self.key(index);
        self.slots[index as usize].jobs += 1;
        let port = Arc::clone(&self.port);
        self.workers.submit(
            JobKind::Work,
            Box::new(move || {
                drop(port.inbox.report(Message::Repaired { slot, outcome: job() }));
            }),
        );
    }

    pub(super) fn on_repaired(&mut self, key: SlotKey, outcome: Repaired) {
        let index = key.index;
        let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.life == key.life) else { return };
        if !matches!(outcome, Repaired::Answered { .. }) {
            slot.jobs -= 1;
        }
        let tp = slot.spec.tp;
        let (State::Running(replica) | State::Mending { replica, .. }, Some(repairing)) =
            (&mut slot.state, &mut slot.repair)
        else {
            slot.repair = None;
            self.close_if_idle(index);
            return self.drive_pull(index);
        };
        match outcome {
            Repaired::Answered { number, .. } if number != repairing.number || repairing.step != Step::Answer => {}
            Repaired::Answered { answer: Ok(PullAnswer::Batches { bytes, .. }), .. } => {
                self.port.counters.pulled_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                let Some(mut repair) = repairing.repair.take() else { return };
                repairing.step = Step::Job;
                self.repair_job(index, move || match repair.append(bytes) {
                    Ok(()) => Repaired::Goes(repair, None),
                    Err(error) => Repaired::Goes(repair, Some(error)),
                });
            }
            Repaired::Answered { answer: Ok(PullAnswer::Offsets { bytes, cleanness, .. }), .. } => {
                self.port.counters.pulled_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                let Some(mut copy) = repairing.copy.take() else { return };
                repairing.step = Step::Job;
                self.repair_job(index, move || {
                    let error = copy.append(bytes, cleanness).err();
                    Repaired::Copied(copy, error)
                });
            }
            Repaired::Answered { answer, .. } => {
                let error = answer.err().map_or_else(|| "it answered something else".to_owned(), |e| e.to_string());
                self.repair_failed(index, &error);
            }
            Repaired::Goes(repair, None) => {
                repairing.repair = Some(repair);
                repairing.step = Step::Ask;
                repairing.failures = 0;
                self.drive_repair(index);
            }
            Repaired::Goes(repair, Some(error)) => {
                // What was refused was not written; after anything else it is begun anew.
                repairing.repair = matches!(error, StorageError::Refused { .. }).then_some(repair);
                self.repair_failed(index, &error.to_string());
            }
            Repaired::Copied(mut copy, None) => {
                if copy.wanted().is_some() {
                    repairing.copy = Some(copy);
                    repairing.step = Step::Ask;
                    repairing.failures = 0;
                    self.drive_repair(index);
                } else {
                    replica.segment_copied(&mut copy);
                    let segment = repairing.rotten.segment.log_file();
                    tracing::info!(%tp, segment, "a damaged compacted segment was replaced by another replica's records");
                    self.port.counters.repaired_ranges.fetch_add(1, Ordering::Relaxed);
                    // Others that were found in it are not there any more.
                    self.next_repair(index);
                }
            }
            Repaired::Copied(copy, Some(error)) => {
                repairing.copy = matches!(error, StorageError::Refused { .. }).then_some(copy);
                self.repair_failed(index, &error.to_string());
            }
            Repaired::Ended(done) => match replica.repaired(done) {
                Ok(is_whole) => {
                    let segment = repairing.rotten.segment.log_file();
                    tracing::info!(%tp, segment, bytes = repairing.rotten.bytes, "damaged records are repaired");
                    self.port.counters.repaired_ranges.fetch_add(1, Ordering::Relaxed);
                    self.next_repair(index);
                    if !is_whole && self.scrubbing.at.is_some() {
                        // There is more in it: looked for at once.
                        self.scrubbing.slot = index;
                        self.scrubbing.position = ScrubPosition::START;
                        self.scrubbing.at = Some(self.now);
                    }
                }
                Err(error) => self.repair_failed(index, &error.to_string()),
            },
        }
        self.close_if_idle(index);
    }

    fn repair_failed(&mut self, index: u32, error: &str) {
        let slot = &mut self.slots[index as usize];
        let Some(repairing) = &mut slot.repair else { return };
        repairing.failures += 1;
        tracing::warn!(tp = %slot.spec.tp, error, failures = repairing.failures, "damaged records could not be repaired; trying again");
        let pause = PAUSE_MIN.saturating_mul(1 << (repairing.failures - 1).min(10)).min(PAUSE_MAX);
        repairing.step = Step::Until(self.now + pause);
        if repairing.failures >= MENDING_FAILURES_MAX && matches!(slot.state, State::Mending { .. }) {
            self.lose(index);
        }
    }

    /// This one is done with.
    fn next_repair(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let Some(repairing) = &mut slot.repair else { return };
        match repairing.waiting.pop_front() {
            Some(next) => {
                repairing.rotten = next;
                (repairing.repair, repairing.copy) = (None, None);
                repairing.step = Step::Ask;
                repairing.failures = 0;
                self.drive_repair(index);
            }
            None => {
                slot.repair = None;
                self.mended(index);
            }
        }
    }
}
