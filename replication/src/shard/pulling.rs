//! Ranges of committed entries: given to other brokers, and pulled from them.
//!
//! ```text
//! catch up   a follower is offered (index, term), and its committed prefix reaches what the source still has:
//!            batches from commit + 1 on are appended as if the leader had sent them; it stays alive
//! install    no log to go on with:  checkpoint -> batches first..=applied into `<dir>.incoming` -> swapped in -> opened
//! ```
//! One request per replica is under way at a time. Where to go on is known from what is there already; a source that has
//! not what is wanted, or gives something else, is followed by the next, after a pause that grows.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flowstone_protocol::{BrokerId, Error, ErrorCode, RaftIndex, ReplicaId, Term};
use flowstone_storage::{HardState, Install, KeptLog, LogEntry, ReplicaIdentity, StorageError, checkpoint};

use super::{Message, Shard, SlotKey, State};
use crate::effects::{Event, HardStateNumber, Offered, Pulled};
use crate::machine::Machine;
use crate::replica::read_error;
use crate::reply::Reply;
use crate::request::GroupStatus;
use crate::transport::{PullAnswer, PullRequest, PullWhat};
use crate::workers::JobKind;

/// The pause after the first source that failed; doubled with each that follows.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// At most.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// The pause while the disk is full.
const FULL_PAUSE: Duration = Duration::from_secs(1);
/// Numbers the hard state that an install waits for: none of a replica's.
pub(super) const LOWER_MARK: HardStateNumber = HardStateNumber(u64::MAX);
/// What is installed is made durable after so many bytes: a crash does not begin anew.
const INSTALL_FLUSH_BYTES: u64 = 32 << 20;
/// Bytes that one job copies of what is there already, and flushes.
const COPY_BYTES_MAX: u64 = 32 << 20;
/// Bytes of one piece of that.
const COPY_PIECE_BYTES: usize = 1 << 20;
/// Where nothing good is found, twice as many entries are pulled before it is looked for again; so often.
const COPY_MISSES_MAX: u32 = 16;

/// What a replica is pulling.
#[derive(Debug)]
pub(super) struct Pull {
    goal: Goal,
    step: Step,
    /// Answers to earlier requests are not taken.
    number: u64,
    /// Failures in a row: says after which pause to ask again.
    failures: u32,
    /// Which source is asked: one that answers is stayed with, as only it is sure to have what its checkpoint goes with.
    turn: usize,
    /// What was asked for last was asked of the leader.
    asks_leader: bool,
    /// Who that was.
    asked: Option<(BrokerId, ReplicaId)>,
    /// Sources there were then.
    sources: usize,
    /// Sources in a row that have trimmed what is wanted.
    trimmed: usize,
    /// An install waits for room.
    pub(super) is_disk_full: bool,
}

#[derive(Debug)]
enum Goal {
    CatchUp {
        offered: Offered,
        /// Where to go on.
        next: RaftIndex,
        /// The last chunk began here: it is to be flushed before the one after the next is asked for.
        last_chunk: RaftIndex,
        /// What is beyond the committed prefix is compared first: it may be good.
        compare: bool,
        /// The entry that was found to be good.
        compared: Option<(RaftIndex, Term)>,
    },
    Install {
        install: Option<Box<Install>>,
        unflushed: u64,
        /// It takes the place of a log that reaches further and diverged before this entry: a checkpoint from there on
        /// covers all that the replica still answers for.
        at_least: Option<RaftIndex>,
        /// Who gave its checkpoint.
        source: Option<(BrokerId, ReplicaId)>,
        /// What is in the replica's folder already, under whatever id: what is good of it need not be pulled.
        kept: Option<Box<KeptLog>>,
        /// Up to here it is not, or is damaged: to be pulled.
        missing: Option<RaftIndex>,
        /// Times in a row that nothing good was found there.
        misses: u32,
    },
}

impl Goal {
    fn install(install: Option<Box<Install>>, kept: Option<Box<KeptLog>>, at_least: Option<RaftIndex>) -> Self {
        Self::Install { install, unflushed: 0, at_least, source: None, kept, missing: None, misses: 0 }
    }
}

/// What it waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// To be asked for.
    Ask,
    Answer,
    /// A job.
    Job,
    /// A lower mark to be durable.
    Mark,
    /// This moment.
    Until(std::time::Instant),
}

/// How a job of an install ended.
#[derive(Debug)]
pub(crate) enum Installed {
    /// It goes on; with what was refused, if anything.
    Goes(Box<Install>, Option<StorageError>),
    /// It was begun.
    Begun(Box<Install>, Option<Box<KeptLog>>),
    /// It took what was there already.
    Copied(Box<Copied>),
    /// It is to be taken up again from what is on the disk.
    Broken(StorageError),
    /// It is complete.
    Done,
}

/// How far what was there already took an install.
#[derive(Debug)]
pub(crate) struct Copied {
    install: Box<Install>,
    /// Nothing, where there is no more to find.
    kept: Option<Box<KeptLog>>,
    bytes: u64,
    /// Up to here it is to be pulled.
    missing: Option<RaftIndex>,
    /// The disk is full.
    refused: Option<StorageError>,
}

/// Copies what is good of a log that was there already, for a while.
fn copy_kept(mut install: Box<Install>, mut kept: Box<KeptLog>, misses: u32) -> Result<Copied, StorageError> {
    let target = install.target().applied;
    let mut bytes_max = COPY_PIECE_BYTES;
    let (mut bytes, mut missing, mut refused) = (0, None, None);
    while bytes < COPY_BYTES_MAX && !install.has_all() {
        let next = install.next_index();
        let appended = kept.read(next, target, bytes_max).map(|batches| (batches.len(), install.append(batches)));
        match appended {
            Some((count, Ok(()))) => bytes += count as u64,
            // Which of them is another one?
            Some((_, Err(StorageError::Refused { .. }))) if bytes_max > 1 => bytes_max = 1,
            Some((_, Err(StorageError::Refused { .. }))) | None => {
                let misses = if bytes > 0 { 0 } else { misses };
                missing = Some(next.plus((1 << misses.min(COPY_MISSES_MAX)) - 1).min(target));
                break;
            }
            Some((_, Err(error))) if error.is_disk_full() => {
                refused = Some(error);
                break;
            }
            Some((_, Err(error))) => return Err(error),
        }
    }
    if bytes > 0 {
        install.flush()?;
    }
    let goes_on = missing.map(|missing| kept.resumes_behind(missing));
    let kept = (goes_on != Some(None)).then_some(kept);
    Ok(Copied { install, kept, bytes, missing: goes_on.flatten().map(|on| RaftIndex::new(on.get() - 1)), refused })
}

impl Pull {
    fn new(goal: Goal) -> Self {
        Self {
            goal,
            step: Step::Ask,
            number: 0,
            failures: 0,
            turn: 0,
            asks_leader: false,
            asked: None,
            sources: 0,
            trimmed: 0,
            is_disk_full: false,
        }
    }

    pub(super) fn due(&self) -> Option<std::time::Instant> {
        match self.step {
            Step::Until(at) => Some(at),
            Step::Ask | Step::Answer | Step::Job | Step::Mark => None,
        }
    }

    /// Entries that are there, and how many it will be.
    fn progress(&self) -> (u64, u64) {
        match &self.goal {
            Goal::CatchUp { offered, next, .. } => (next.get().saturating_sub(1), offered.index.get()),
            Goal::Install { install: Some(install), .. } => {
                let first = install.first_index().get();
                (install.next_index().get() - first, (install.target().applied.get() + 1).saturating_sub(first))
            }
            Goal::Install { install: None, .. } => (0, 0),
        }
    }
}

impl<M: Machine> Shard<M> {
    /// Reads a range for another broker, on a pool. `OFFSET_OUT_OF_RANGE` says that the log does not begin early enough.
    pub(super) fn on_serve_pull(&mut self, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        let partition = request.tp.partition;
        let refuse = |code, message: String| Error::new(code, message).with_partition(partition);
        let index = self.by_partition.get(&request.tp).copied();
        let Some((index, State::Running(replica))) = index.map(|index| (index, &self.slots[index as usize].state))
        else {
            let message = "this broker has no open replica of the partition; ask another".to_owned();
            return reply.send(Err(refuse(ErrorCode::NotLeader, message)));
        };
        let own = replica.config().replica;
        if own != request.of {
            // After a recovery with loss its group may be another one, with another history.
            let message = format!("this broker has replica {own}, and {} was asked for; ask another", request.of);
            return reply.send(Err(refuse(ErrorCode::NotLeader, message)));
        }
        let log = replica.log();
        let committed = log.committed_index();
        let job: Box<dyn FnOnce() -> Result<PullAnswer, flowstone_storage::ReadError> + Send> = match request.what {
            PullWhat::Checkpoint => {
                let (disk, (_, path)) = (Arc::clone(&self.disk), log.newest_checkpoint_file());
                let (first_index, first_offset) = (log.first_index(), log.first_offset());
                let local_start = log.local_start();
                Box::new(move || {
                    let bytes = checkpoint::read_file(&disk, &path)?;
                    Ok(PullAnswer::Checkpoint { bytes, first_index, first_offset, local_start })
                })
            }
            PullWhat::Offsets { from, to, held, .. } if !log.goes_with(held, from, to) => {
                let own = log.cleanness();
                drop(log);
                if let State::Running(replica) = &mut self.slots[index as usize].state {
                    replica.want_clean_to(held.dropped_to);
                }
                let message = format!(
                    "what was deleted could come back: this one is clean up to {} and has dropped tombstones up to {}, that one {} and {}; begin again, or ask another, or later",
                    own.clean_to, own.dropped_to, held.clean_to, held.dropped_to
                );
                return reply.send(Err(refuse(ErrorCode::OffsetOutOfRange, message)));
            }
            PullWhat::Offsets { from, to, max_bytes, .. } => match log.offset_range(from, to, max_bytes as usize) {
                Ok(ticket) => Box::new(move || {
                    let range = ticket.run()?;
                    Ok(PullAnswer::Offsets { bytes: range.bytes, next: range.next, cleanness: range.cleanness })
                }),
                Err(error) => {
                    let is_trimmed = from < log.local_start().0;
                    let code = if is_trimmed { ErrorCode::OffsetOutOfRange } else { ErrorCode::NotLeader };
                    return reply.send(Err(refuse(code, format!("{error}; ask another"))));
                }
            },
            PullWhat::Batches { first, .. } if first < log.first_index() => {
                let message = format!("the log begins at entry {}, and {first} was asked for", log.first_index());
                return reply.send(Err(refuse(ErrorCode::OffsetOutOfRange, message)));
            }
            PullWhat::Batches { first, .. } if first > committed => {
                let message = format!("entry {first} is not known to be committed here; ask another, or later");
                return reply.send(Err(refuse(ErrorCode::NotLeader, message)));
            }
            PullWhat::Batches { first, last, max_bytes } => {
                match log.range(first, last.min(committed), max_bytes as usize) {
                    Ok(ticket) => Box::new(move || {
                        let range = ticket.run()?;
                        Ok(PullAnswer::Batches { bytes: range.bytes, next: range.next, commit: committed })
                    }),
                    Err(error) => return reply.send(Err(refuse(ErrorCode::StorageFailed, error.to_string()))),
                }
            }
        };
        drop(log);
        let waiting = match self.wait_for_disk() {
            Ok(waiting) => waiting,
            Err(error) => return reply.send(Err(error.with_partition(partition))),
        };
        let (port, slot) = (Arc::clone(&self.port), self.key(index));
        self.workers.submit(
            JobKind::Read,
            Box::new(move || {
                let answer = job();
                if let Ok(answer) = &answer {
                    port.counters.served_bytes.fetch_add(answer.bytes().len() as u64, Ordering::Relaxed);
                }
                if let Err(flowstone_storage::ReadError::Corrupt { offset, .. }) = &answer {
                    drop(port.inbox.report(Message::Corrupt { slot, offset: *offset }));
                }
                reply.send(answer.map_err(|error| read_error(&error).with_partition(partition)));
                waiting.fetch_sub(1, Ordering::Relaxed);
            }),
        );
    }

    // ---- pulling ---------------------------------------------------------------------------------------------------

    /// The leader offers what it can not send: it is pulled, unless that is under way.
    pub(super) fn on_offered(&mut self, index: u32, offered: Offered) {
        let slot = &mut self.slots[index as usize];
        let State::Running(replica) = &slot.state else { return };
        match slot.pull.as_deref_mut() {
            Some(Pull { goal: Goal::CatchUp { offered: before, .. }, .. }) => {
                // A new leader may offer less than the one before it did; that has nothing more to give.
                if offered.index >= before.index || offered.leader != before.leader {
                    *before = offered;
                }
                return;
            }
            Some(_) => return,
            None => {}
        }
        let next = replica.committed().next();
        let goal = Goal::CatchUp { offered, next, last_chunk: RaftIndex::new(0), compare: true, compared: None };
        tracing::info!(tp = %slot.spec.tp, from = %next, to = %offered.index, "a replica is far behind and pulls what is committed");
        slot.pull = Some(Box::new(Pull::new(goal)));
        self.note_pull(index);
        self.drive_pull(index);
    }

    fn note_pull(&mut self, index: u32) {
        if !self.pulls.contains(&index) {
            self.pulls.push(index);
        }
    }

    /// It has no log to go on with, or one that is not complete.
    pub(super) fn begin_install(&mut self, index: u32, install: Option<Box<Install>>, kept: Option<Box<KeptLog>>) {
        self.slots[index as usize].pull = Some(Box::new(Pull::new(Goal::install(install, kept, None))));
        self.note_pull(index);
        self.drive_pull(index);
    }

    /// How a replica that pulls sees its group.
    pub(super) fn pulling_status(&self, index: u32) -> GroupStatus {
        let slot = &self.slots[index as usize];
        GroupStatus {
            replica: slot.spec.replica,
            leader: None,
            term: slot.shown.term,
            commit: RaftIndex::new(0),
            last: RaftIndex::new(0),
            membership: crate::membership::Membership::default(),
            members: Vec::new(),
            change_is_known: false,
            pulled: Some(slot.pull.as_deref().map_or((0, 0), Pull::progress)),
        }
    }

    /// Entries pulled and wanted, while it pulls.
    pub(super) fn pulled(&self, index: u32) -> Option<(u64, u64)> {
        self.slots[index as usize].pull.as_deref().map(Pull::progress)
    }

    /// Pulls whose pause is over.
    pub(super) fn drive_due_pulls(&mut self) {
        for index in std::mem::take(&mut self.pulls) {
            let Some(pull) = &mut self.slots[index as usize].pull else { continue };
            self.pulls.push(index);
            if pull.due().is_some_and(|at| at <= self.now) {
                pull.step = Step::Ask;
                self.drive_pull(index);
            }
        }
    }

    /// Asks for what comes next, if it is time to.
    pub(super) fn drive_pull(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let Some(pull) = &mut slot.pull else { return };
        if slot.closing.is_some() || self.stopping.is_some() {
            slot.pull = None;
            return;
        }
        if pull.step != Step::Ask {
            return;
        }
        let wanted = match (&mut pull.goal, &slot.state) {
            // What came last is not taken yet.
            (Goal::CatchUp { .. }, State::Running(_))
                if slot.events.iter().any(|event| matches!(event, Event::Pulled(_))) =>
            {
                return;
            }
            (Goal::CatchUp { offered, next, last_chunk, compare, compared }, State::Running(replica)) => {
                let log = replica.log();
                let (committed, last) = (replica.committed(), log.last_index());
                let leader = replica.leader().filter(|&leader| leader != slot.spec.replica);
                if leader.is_none() || committed >= offered.index {
                    drop(log);
                    slot.pull = None;
                    return;
                }
                let before = RaftIndex::new(next.get() - 1);
                let is_compared = compared.is_some() && *compared == log.term_at(before).map(|term| (before, term));
                if committed < before && !is_compared {
                    // The last chunk was not taken (there was no room, or no leader at that moment), or what was compared
                    // is not there any more. What follows the committed prefix may be of another history.
                    *next = committed.next();
                    *last_chunk = RaftIndex::new(0);
                    (*compare, *compared) = (true, None);
                    pull.step = Step::Until(self.now + FULL_PAUSE);
                    return;
                }
                *next = (*next).max(committed.next());
                // At or above what is offered, the log was found to be another one there.
                *compare = *compare && last >= *next && last < offered.index;
                if *compare {
                    PullWhat::Batches { first: last, last, max_bytes: 1 }
                } else if replica.persisted() < *last_chunk {
                    // Comes again when that is flushed.
                    return;
                } else {
                    PullWhat::Batches { first: *next, last: offered.index, max_bytes: self.config.pull_bytes }
                }
            }
            (Goal::Install { install: None, .. }, State::Pulling { .. }) => PullWhat::Checkpoint,
            (Goal::Install { install: Some(it), kept, .. }, State::Pulling { .. }) if it.wanted_offsets().is_some() => {
                // What is there are entries: they have no place among what was compacted.
                *kept = None;
                let Some((from, to)) = it.wanted_offsets() else { return };
                let Some(held) = it.held_offsets() else { return };
                PullWhat::Offsets { from, to, max_bytes: self.config.pull_bytes, held }
            }
            (Goal::Install { install, at_least, kept, missing, misses, .. }, State::Pulling { .. }) => match install {
                Some(it) if it.has_all() => {
                    *kept = None;
                    let (applied, replica) = (it.target().applied, slot.spec.replica);
                    // What diverged is not answered for any more, and that is durable before it goes.
                    if at_least.is_some_and(|at_least| at_least <= applied)
                        && let Some(stripe) = self.stripes.get_mut(&self.data_dir.stripe_of(slot.spec.tp))
                    {
                        if stripe.failed().is_some()
                            && (stripe.has_flush_in_flight()
                                || stripe.reopen(&self.disk, &self.hard_state_dir).is_err())
                        {
                            pull.step = Step::Until(self.now + FULL_PAUSE);
                            return;
                        }
                        if let Some(state) = stripe.state(replica).filter(|state| state.flushed > applied) {
                            pull.step = Step::Mark;
                            let key = SlotKey { index, life: slot.life };
                            stripe.put(key, LOWER_MARK, replica, HardState { flushed: applied, ..state });
                            return;
                        }
                    }
                    // Nothing of the life before may be written any more: whatever is in flight comes home first.
                    if slot.jobs == 0
                        && let Some(install) = install.take()
                    {
                        pull.step = Step::Job;
                        let (disk, dir) = (Arc::clone(&self.disk), slot.spec.dir.clone());
                        self.install_job(index, move || match install.finish() {
                            Ok(()) => Installed::Done,
                            Err(error) => {
                                // It would be found again: what leads nowhere is begun anew.
                                if matches!(error, StorageError::NotInstallable { .. })
                                    && let Err(error) = Install::abandon(&disk, &dir)
                                {
                                    tracing::warn!(dir = %dir.display(), %error, "cannot give up an install");
                                }
                                Installed::Broken(error)
                            }
                        });
                    }
                    return;
                }
                Some(it) => {
                    let (first, target) = (it.next_index(), it.target().applied);
                    *missing = missing.filter(|&missing| missing >= first);
                    if missing.is_none()
                        && let Some(kept) = kept.take()
                        && let Some(install) = install.take()
                    {
                        let misses = *misses;
                        pull.step = Step::Job;
                        self.install_job(index, move || match copy_kept(install, kept, misses) {
                            Ok(copied) => Installed::Copied(Box::new(copied)),
                            Err(error) => Installed::Broken(error),
                        });
                        return;
                    }
                    let last = missing.map_or(target, |missing| missing.min(target));
                    PullWhat::Batches { first, last, max_bytes: self.config.pull_bytes }
                }
                None => PullWhat::Checkpoint,
            },
            // It ended, or was opened anew, meanwhile.
            _ => {
                slot.pull = None;
                return;
            }
        };
        // The leader first, then whoever else there is.
        let leader = match &slot.state {
            State::Running(replica) => replica.leader().and_then(|leader| slot.places.broker_of(leader)),
            _ => slot.hint,
        };
        let sources = slot.places.sources(slot.spec.replica, leader);
        if sources.is_empty() {
            pull.step = Step::Until(self.now + PAUSE_MAX.min(PAUSE_MIN * 5));
            return;
        }
        let (source, of) = sources[pull.turn % sources.len()];
        pull.asks_leader = Some(source) == leader;
        pull.asked = Some((source, of));
        pull.sources = sources.len();
        pull.number += 1;
        pull.step = Step::Answer;
        let (tp, number) = (slot.spec.tp, pull.number);
        let key = self.key(index);
        let port = Arc::clone(&self.port);
        let reply = Reply::new(move |answer| {
            drop(port.inbox.report(Message::Pulled { slot: key, number, answer }));
        });
        self.transport.pull(source, PullRequest { tp, of, what: wanted }, reply);
    }

    pub(super) fn on_pulled(&mut self, key: SlotKey, number: u64, answer: Result<PullAnswer, Error>) {
        let index = key.index;
        let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.life == key.life) else { return };
        // Its place is given away once what is under way for its end is done: nothing more begins.
        if slot.closing.is_some() {
            slot.pull = None;
            return;
        }
        let Some(pull) = slot.pull.as_mut().filter(|pull| pull.number == number && pull.step == Step::Answer) else {
            return;
        };
        pull.step = Step::Ask;
        let answer = match answer {
            Ok(answer) => {
                pull.trimmed = 0;
                answer
            }
            Err(error) => return self.pull_failed(index, &error),
        };
        self.port.counters.pulled_bytes.fetch_add(answer.bytes().len() as u64, Ordering::Relaxed);
        let tp = slot.spec.tp;
        let nonsense = || Error::new(ErrorCode::Internal, "the source answered something else than was asked for");
        match (&mut pull.goal, answer) {
            (
                Goal::CatchUp { next, last_chunk, compare, compared, .. },
                PullAnswer::Batches { bytes, next: after, .. },
            ) => {
                let State::Running(replica) = &slot.state else { return };
                if *compare {
                    *compare = false;
                    // Which entry that is: the log may have grown since it was asked for.
                    let last = RaftIndex::new(after.get().saturating_sub(1));
                    let theirs = LogEntry::decode_range(bytes, last).ok();
                    let theirs = theirs.and_then(|entries| entries.first().map(|entry| entry.term));
                    if let Some(term) = theirs.filter(|&term| Some(term) == replica.log().term_at(last)) {
                        *next = last.next();
                        *compared = Some((last, term));
                    }
                    return self.drive_pull(index);
                }
                let first = *next;
                if after <= first {
                    return self.pull_failed(index, &nonsense());
                }
                *last_chunk = first;
                *next = after;
                pull.failures = 0;
                let compared = compared.take();
                self.event(index, Event::Pulled(Pulled { first, next: after, compared, bytes }));
            }
            (
                Goal::Install { install: taker @ Some(_), unflushed, .. },
                answer @ (PullAnswer::Batches { .. } | PullAnswer::Offsets { .. }),
            ) => {
                let cleanness = match &answer {
                    PullAnswer::Offsets { cleanness, .. } => Some(*cleanness),
                    _ => None,
                };
                let bytes = answer.bytes().clone();
                let Some(mut install) = taker.take() else { return };
                *unflushed += bytes.len() as u64;
                let flush = *unflushed >= INSTALL_FLUSH_BYTES;
                if flush {
                    *unflushed = 0;
                }
                pull.step = Step::Job;
                self.install_job(index, move || {
                    // Whether they are what was asked for is seen by what they are.
                    let appended = match (install.wanted_offsets(), cleanness) {
                        (Some(_), Some(cleanness)) => install.append_offsets(bytes, cleanness),
                        (Some(_), None) => {
                            let (index, detail) = (install.next_index(), "it is wanted by offset".to_owned());
                            Err(StorageError::Refused { index, detail })
                        }
                        (None, _) => install.append(bytes),
                    };
                    let appended = appended.and_then(|()| if flush { install.flush() } else { Ok(()) });
                    match appended {
                        Ok(()) => Installed::Goes(install, None),
                        Err(error) if error.is_disk_full() || matches!(error, StorageError::Refused { .. }) => {
                            Installed::Goes(install, Some(error))
                        }
                        Err(error) => Installed::Broken(error),
                    }
                });
            }
            (
                Goal::Install { install: None, at_least, source, .. },
                PullAnswer::Checkpoint { bytes, first_index, first_offset, local_start },
            ) => {
                *source = pull.asked;
                if let Some(at_least) = *at_least
                    && checkpoint::Checkpoint::decode(&bytes).is_ok_and(|checkpoint| checkpoint.applied < at_least)
                {
                    let message =
                        format!("its newest checkpoint lies before entry {at_least}; another may have a newer one");
                    return self.pull_failed(index, &Error::new(ErrorCode::NotLeader, message));
                }
                pull.step = Step::Job;
                let (disk, dir, log) = (Arc::clone(&self.disk), slot.spec.dir.clone(), slot.spec.log.clone());
                let identity = ReplicaIdentity {
                    replica: slot.spec.replica,
                    topic_partition: tp,
                    feature_level: self.feature_level.load(Ordering::Relaxed),
                };
                self.install_job(index, move || {
                    if local_start.0 < first_offset {
                        return match Install::begin_by_offset(&disk, &dir, identity, &bytes, local_start, log) {
                            Ok(install) => Installed::Begun(Box::new(install), None),
                            Err(error) => Installed::Broken(error),
                        };
                    }
                    match Install::begin(&disk, &dir, identity, &bytes, first_index, first_offset, log) {
                        Ok(install) => {
                            // Without it all is pulled.
                            let kept = KeptLog::find(&disk, &dir).unwrap_or_default();
                            Installed::Begun(Box::new(install), kept.map(Box::new))
                        }
                        Err(error) => Installed::Broken(error),
                    }
                });
            }
            _ => self.pull_failed(index, &nonsense()),
        }
    }

    /// The lower mark is durable, or its file failed and it is tried again.
    pub(super) fn mark_lowered(&mut self, index: u32, is_durable: bool) {
        let now = self.now;
        if let Some(pull) = self.slots[index as usize].pull.as_mut().filter(|pull| pull.step == Step::Mark) {
            pull.step = if is_durable { Step::Ask } else { Step::Until(now + FULL_PAUSE) };
            self.drive_pull(index);
        }
    }

    fn install_job(&mut self, index: u32, job: impl FnOnce() -> Installed + Send + 'static) {
        let key = self.key(index);
        self.slots[index as usize].jobs += 1;
        let port = Arc::clone(&self.port);
        self.workers.submit(
            JobKind::Work,
            Box::new(move || {
                let installed = job();
                drop(port.inbox.report(Message::Installed { slot: key, installed }));
            }),
        );
    }

    pub(super) fn on_installed(&mut self, key: SlotKey, installed: Installed) {
        let index = key.index;
        let slot = &mut self.slots[index as usize];
        assert_eq!(slot.life, key.life, "a place is not given away while a job of its replica is in flight");
        slot.jobs -= 1;
        if slot.closing.is_some() || slot.pull.is_none() {
            slot.pull = None;
            return self.close_if_idle(index);
        }
        let Some(Pull {
            goal: Goal::Install { install, kept, missing, misses, .. }, step, is_disk_full, failures, ..
        }) = slot.pull.as_deref_mut()
        else {
            return;
        };
        *step = Step::Ask;
        *is_disk_full = false;
        match installed {
            Installed::Goes(it, None) => {
                *install = Some(it);
                *failures = 0;
                self.drive_pull(index);
            }
            Installed::Goes(it, Some(error)) => {
                *install = Some(it);
                *is_disk_full = error.is_disk_full();
                self.install_failed(index, &error);
            }
            Installed::Begun(it, found) => {
                *install = Some(it);
                (*kept, *missing, *misses) = (found, None, 0);
                *failures = 0;
                self.drive_pull(index);
            }
            Installed::Copied(copied) => {
                let Copied { install: it, kept: left, bytes, missing: until, refused } = *copied;
                *install = Some(it);
                (*kept, *missing) = (left, until);
                *misses = if bytes > 0 { 0 } else { *misses + 1 };
                match refused {
                    Some(error) => {
                        *is_disk_full = true;
                        self.install_failed(index, &error);
                    }
                    None => self.drive_pull(index),
                }
            }
            Installed::Broken(error) => self.install_failed(index, &error),
            Installed::Done => {
                slot.pull = None;
                let (tp, replaced) = (slot.spec.tp, slot.replaces.take());
                if let Some(replaced) = replaced {
                    // Its files are gone; its id is never used again.
                    self.stripe_mut(tp).forget(replaced);
                }
                let slot = &mut self.slots[index as usize];
                slot.is_copied = true;
                tracing::info!(tp = %slot.spec.tp, "a replica was copied from others, and is opened");
                if let State::Pulling { machine } = std::mem::replace(&mut slot.state, State::Opening) {
                    self.open_slot(index, machine);
                }
            }
        }
    }

    fn install_failed(&mut self, index: u32, error: &StorageError) {
        let slot = &mut self.slots[index as usize];
        let tp = slot.spec.tp;
        let Some(pull) = &mut slot.pull else { return };
        if pull.is_disk_full {
            tracing::warn!(%tp, %error, "disk full: a replica is not copied any further until there is room");
            pull.step = Step::Until(self.now + FULL_PAUSE);
            return self.show(index);
        }
        // What it has is taken up again where it can be: by an opening, which finds it.
        if !matches!(&pull.goal, Goal::Install { install: Some(_), .. }) {
            tracing::warn!(%tp, %error, "an install failed: it is taken up again");
            slot.pull = None;
            if let State::Pulling { machine } = std::mem::replace(&mut slot.state, State::Ending) {
                self.set_failed(index, machine, error.to_string());
            }
            return;
        }
        self.pull_failed(index, &Error::new(ErrorCode::CorruptBatch, error.to_string()));
    }

    /// The source has not what is wanted, or can not be reached: the next one, after a pause.
    fn pull_failed(&mut self, index: u32, error: &Error) {
        let slot = &mut self.slots[index as usize];
        let tp = slot.spec.tp;
        let Some(pull) = &mut slot.pull else { return };
        pull.failures += 1;
        pull.turn += 1;
        tracing::debug!(%tp, %error, failures = pull.failures, "a range could not be pulled");
        let pause = PAUSE_MIN.saturating_mul(1 << (pull.failures - 1).min(8)).min(PAUSE_MAX);
        pull.step = Step::Until(self.now + pause);
        let is_trimmed = error.code == ErrorCode::OffsetOutOfRange;
        pull.trimmed = if is_trimmed { pull.trimmed + 1 } else { 0 };
        let is_final = is_trimmed && (pull.asks_leader || pull.trimmed >= pull.sources);
        match &mut pull.goal {
            // The leader does not know it to be committed, or has no more of it: then it is not worth keeping.
            Goal::CatchUp { compare: compare @ true, .. }
                if is_final || (pull.asks_leader && error.code == ErrorCode::NotLeader) =>
            {
                *compare = false;
                pull.turn -= 1;
                pull.step = Step::Ask;
                self.drive_pull(index);
            }
            // One that trimmed what is wanted says nothing of the others.
            Goal::CatchUp { compare: false, .. } if is_final => self.reinstall(index),
            Goal::CatchUp { .. } => {}
            // One that trimmed what is wanted says nothing of the others, but of its own checkpoint.
            Goal::Install { source, .. }
                if !is_trimmed
                    // After a round of all of them it does not matter whose it was: that one may be gone.
                    || ((pull.failures as usize) < pull.sources && (source.is_none() || *source != pull.asked)) => {}
            // That is begun anew, with its newest checkpoint: all that goes with it this one has. (A checkpoint of one that has
            // not compacted what is wanted, and can not read it any more, would lead here again.)
            Goal::Install { install, unflushed, source, .. } => {
                *install = None;
                *unflushed = 0;
                *source = None;
                pull.turn -= 1;
            }
        }
    }

    /// What the replica has does not reach to what the others still have: it stops, and is copied as a whole. Whatever it
    /// answered for lies below what is copied: that is committed.
    fn reinstall(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        tracing::warn!(tp = %slot.spec.tp, "what a replica misses was trimmed everywhere: it is copied as a whole");
        slot.hint = slot.shown.leader_broker;
        self.rise(index);
        let slot = &mut self.slots[index as usize];
        let at_least = match slot.pull.as_deref() {
            Some(Pull { goal: Goal::CatchUp { offered, .. }, .. }) => Some(offered.index),
            _ => None,
        };
        slot.repair = None;
        let State::Running(mut replica) = std::mem::replace(&mut slot.state, State::Ending) else { return };
        let error = super::gone().with_partition(slot.spec.tp.partition);
        let mut fx = replica.close(&error);
        self.answers.append(&mut fx.answers);
        let late = std::mem::take(&mut slot.events);
        self.answers.extend(late.into_iter().filter_map(|event| event.refused(error.clone())));
        slot.state = State::Pulling { machine: replica.into_machine() };
        slot.pull = Some(Box::new(Pull::new(Goal::install(None, None, at_least))));
        self.wakes[index as usize] = super::NEVER;
        self.note_pull(index);
        self.show(index);
        self.drive_pull(index);
    }
}
