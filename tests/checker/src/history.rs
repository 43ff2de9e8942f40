//! What happened, as clients tell it, kept small; what is wrong at sight is found at once, the rest in `judge.rs`.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use flowstone_protocol::{Offset, PartitionId};

use crate::anomaly::{Anomaly, Findings, Kind};
use crate::marks::{Asked, GroupId, Mark, Marks, ObserverId, View};
use crate::offsets::{OffsetMap, Ranges};
use crate::pipeline::{Consumed, Derived};
use crate::transactions::{Progress, TransactionEnd, TransactionId};

/// A partition of a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LogId(pub(crate) u32);

/// A producer of a history: one line of sends, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SenderId(pub(crate) u32);

/// A consumer of a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReaderId(pub(crate) u32);

/// A value, unique in its history; numbered from 0 in the order of sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(u64);

impl ValueId {
    /// From its number.
    pub const fn new(number: u64) -> Self {
        ValueId(number)
    }

    /// Its number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a sender was promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SenderKind {
    /// Each value is stored once, and in the order of sending.
    pub idempotent: bool,
    /// What is acknowledged stays: `acks=quorum`, where the faults leave an intact copy. Else an acknowledged value may be
    /// lost.
    pub durable: bool,
}

impl SenderKind {
    /// An idempotent sender with `acks=quorum`.
    pub const IDEMPOTENT: SenderKind = SenderKind { idempotent: true, durable: true };
    /// `acks=quorum` without idempotence: what was sent again may be there twice, and late.
    pub const PLAIN: SenderKind = SenderKind { idempotent: false, durable: true };
    /// `acks=leader` or none.
    pub const LOSSY: SenderKind = SenderKind { idempotent: false, durable: false };
}

/// What a reader is given of transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Everything, once committed by a majority.
    ReadUncommitted,
    /// Only what is in no transaction or in a committed one.
    ReadCommitted,
}

/// What a record turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// This value, byte for byte.
    Value(ValueId),
    /// Something that nobody can have written; says what.
    Phantom(String),
    /// Someone else's record in a topic that is shared.
    Other,
}

/// How a send ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Pending,
    Acknowledged,
    Failed,
    Unknown,
}

/// A send and what became of it.
#[derive(Clone, Debug)]
pub(crate) struct Send {
    pub(crate) sender: SenderId,
    pub(crate) log: LogId,
    pub(crate) transaction: Option<TransactionId>,
    pub(crate) outcome: Outcome,
    /// Its sender was fenced when it sent it.
    pub(crate) fenced: bool,
    /// A committed reader was given it.
    pub(crate) seen_committed: bool,
    /// Where the log was known to end when it was sent: it can only lie there or behind.
    floor: i64,
    /// Milliseconds from the run's beginning to its acknowledgement.
    pub(crate) acknowledged_after_ms: u32,
    /// Where it was acknowledged; -1: it was not.
    acknowledged_at: i64,
    /// Where it was read first; -1: it was not.
    seen_at: i64,
}

impl Send {
    pub(crate) fn acknowledged_at(&self) -> Option<i64> {
        (self.outcome == Outcome::Acknowledged).then_some(self.acknowledged_at)
    }

    pub(crate) fn seen_at(&self) -> Option<i64> {
        (self.seen_at >= 0).then_some(self.seen_at)
    }
}

/// A range of offsets that a reader passed without a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Gap {
    pub(crate) from: i64,
    /// The offset that was read behind it.
    pub(crate) to: i64,
    pub(crate) reader: ReaderId,
}

/// What is known of a partition.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    pub(crate) topic: String,
    pub(crate) partition: PartitionId,
    pub(crate) values: OffsetMap,
    pub(crate) gaps: Vec<Gap>,
    /// What readers passed that are no longer assigned.
    pub(crate) covered: Ranges,
    /// As much of it as committed readers passed.
    pub(crate) covered_committed: Ranges,
    /// What lies before it may be gone.
    pub(crate) trimmed: i64,
    pub(crate) fully_read: bool,
    /// One past what is known to be committed: acknowledged to a durable sender, read, or told as high watermark.
    committed_end: i64,
    /// One past what committed readers were given.
    stable_end: i64,
    /// Sends that have not ended.
    open: u64,
    /// Since when nothing was acknowledged although something waits or gave up waiting.
    waiting_since: Option<Duration>,
    pub(crate) longest_gap: Duration,
}

impl Log {
    pub(crate) fn anomaly(&self, kind: Kind, offset: Option<i64>, detail: String) -> Anomaly {
        let offset = offset.map(Offset::new);
        Anomaly { kind, topic: self.topic.clone(), partition: self.partition, offset, detail }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Sender {
    pub(crate) kind: SenderKind,
    fenced: bool,
}

/// Where a reader is in a log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Session {
    pub(crate) from: i64,
    pub(crate) position: i64,
}

#[derive(Clone, Debug)]
pub(crate) struct Reader {
    pub(crate) isolation: Isolation,
    pub(crate) sessions: HashMap<LogId, Session>,
}

/// Everything that clients told, in the order in which it happened. See the crate's page.
///
/// Ids that another history gave make its methods panic, and so does an outcome for a send that has one.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub(crate) logs: Vec<Log>,
    log_by_name: HashMap<(String, PartitionId), LogId>,
    pub(crate) senders: Vec<Sender>,
    pub(crate) sends: Vec<Send>,
    pub(crate) readers: Vec<Reader>,
    pub(crate) transactions: Vec<Progress>,
    pub(crate) derived: Vec<Derived>,
    pub(crate) consumed: Vec<Consumed>,
    pub(crate) reads: u64,
    marks: Marks,
    groups: u32,
    observers: u32,
    pub(crate) findings: Findings,
}

impl History {
    /// Nothing has happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// A partition, made at its first naming.
    pub fn log(&mut self, topic: &str, partition: PartitionId) -> LogId {
        let next = LogId(index(self.logs.len()));
        let id = *self.log_by_name.entry((topic.to_owned(), partition)).or_insert(next);
        if id == next {
            self.logs.push(Log {
                topic: topic.to_owned(),
                partition,
                values: OffsetMap::default(),
                gaps: Vec::new(),
                covered: Ranges::default(),
                covered_committed: Ranges::default(),
                trimmed: 0,
                fully_read: false,
                committed_end: 0,
                stable_end: 0,
                open: 0,
                waiting_since: None,
                longest_gap: Duration::ZERO,
            });
        }
        id
    }

    /// A sender. What it sends to one log is ordered as [`send`](Self::send) is called.
    pub fn sender(&mut self, kind: SenderKind) -> SenderId {
        self.senders.push(Sender { kind, fenced: false });
        SenderId(index(self.senders.len() - 1))
    }

    /// A value is about to be sent, so long after the run began.
    pub fn send(&mut self, sender: SenderId, log: LogId, at: Duration) -> ValueId {
        self.add_send(sender, log, None, at)
    }

    /// A value is about to be sent within a transaction.
    pub fn send_in(&mut self, transaction: TransactionId, sender: SenderId, log: LogId, at: Duration) -> ValueId {
        self.add_send(sender, log, Some(transaction), at)
    }

    fn add_send(&mut self, sender: SenderId, log: LogId, transaction: Option<TransactionId>, at: Duration) -> ValueId {
        let value = ValueId(self.sends.len() as u64);
        self.sends.push(Send {
            sender,
            log,
            transaction,
            outcome: Outcome::Pending,
            fenced: self.senders[sender.0 as usize].fenced,
            seen_committed: false,
            floor: self.logs[log.0 as usize].committed_end,
            acknowledged_after_ms: 0,
            acknowledged_at: -1,
            seen_at: -1,
        });
        let log = &mut self.logs[log.0 as usize];
        log.open += 1;
        log.waiting_since.get_or_insert(at);
        value
    }

    /// A send was acknowledged at this offset.
    pub fn acknowledged(&mut self, value: ValueId, offset: Offset, at: Duration) {
        let offset = offset.get();
        let send = self.end(value, Outcome::Acknowledged);
        send.acknowledged_at = offset;
        send.acknowledged_after_ms = u32::try_from(at.as_millis()).unwrap_or(u32::MAX);
        let Send { log, sender, floor, .. } = *send;
        let durable = self.senders[sender.0 as usize].kind.durable;
        let log = &mut self.logs[log.0 as usize];
        if durable && offset < floor {
            let detail = format!(
                "value {value} was acknowledged at offset {offset}, and the log was known to end at {floor} before it was sent"
            );
            self.findings.add(log.anomaly(Kind::Regression, Some(offset), detail));
        }
        if durable {
            log.committed_end = log.committed_end.max(offset.saturating_add(1));
        }
        if let Some(since) = log.waiting_since {
            log.longest_gap = log.longest_gap.max(at.saturating_sub(since));
        }
        log.waiting_since = (log.open > 0).then_some(at);
    }

    /// A send failed, and it is certain that nothing of it is stored or ever will be.
    pub fn failed(&mut self, value: ValueId) {
        self.end(value, Outcome::Failed);
    }

    /// Nobody knows what became of a send; it may still be stored.
    pub fn unknown(&mut self, value: ValueId) {
        self.end(value, Outcome::Unknown);
    }

    fn end(&mut self, value: ValueId, outcome: Outcome) -> &mut Send {
        let send = &mut self.sends[value.0 as usize];
        assert_eq!(send.outcome, Outcome::Pending, "value {value} has ended before");
        send.outcome = outcome;
        self.logs[send.log.0 as usize].open -= 1;
        send
    }

    /// No more is sent: what waits since the last acknowledgement counts for the longest gap until now.
    pub fn sending_ended(&mut self, at: Duration) {
        for log in &mut self.logs {
            if let Some(since) = log.waiting_since.take() {
                log.longest_gap = log.longest_gap.max(at.saturating_sub(since));
            }
        }
    }

    /// Another took over from this sender: what it sends from now on must not be taken.
    pub fn fenced(&mut self, sender: SenderId) {
        self.senders[sender.0 as usize].fenced = true;
    }

    /// A transaction begins.
    pub fn transaction(&mut self) -> TransactionId {
        self.transactions.push(Progress::Open);
        TransactionId(index(self.transactions.len() - 1))
    }

    /// A transaction's commit is about to be asked for: it may be visible from now on.
    pub fn committing(&mut self, transaction: TransactionId) {
        self.transactions[transaction.0 as usize] = Progress::Committing;
    }

    /// A transaction ended.
    pub fn transaction_ended(&mut self, transaction: TransactionId, end: TransactionEnd) {
        self.transactions[transaction.0 as usize] = Progress::Ended(end);
    }

    /// A reader, not assigned to anything yet.
    pub fn reader(&mut self, isolation: Isolation) -> ReaderId {
        self.readers.push(Reader { isolation, sessions: HashMap::new() });
        ReaderId(index(self.readers.len() - 1))
    }

    /// From now on a reader reads a log from this position: it began, sought, or was given it anew.
    pub fn assigned(&mut self, reader: ReaderId, log: LogId, position: Offset) {
        let at = position.get();
        let session = Session { from: at, position: at };
        if let Some(before) = self.readers[reader.0 as usize].sessions.insert(log, session) {
            self.leave(reader, log, before);
        }
    }

    /// A reader was given a record.
    pub fn read(&mut self, reader: ReaderId, log: LogId, offset: Offset, observed: Observed) {
        let at = offset.get();
        self.reads += 1;
        self.pass(reader, log, at);
        let committed = self.readers[reader.0 as usize].isolation == Isolation::ReadCommitted;
        let state = &mut self.logs[log.0 as usize];
        state.committed_end = state.committed_end.max(at.saturating_add(1));
        if committed {
            state.stable_end = state.stable_end.max(at.saturating_add(1));
        }
        match observed {
            Observed::Value(value) => self.see(log, at, value, committed),
            Observed::Phantom(detail) => self.findings.add(state.anomaly(Kind::Phantom, Some(at), detail)),
            Observed::Other => {}
        }
    }

    /// A reader goes on at `position` without having been given a record before it, as behind control batches.
    pub fn read_past(&mut self, reader: ReaderId, log: LogId, position: Offset) {
        let session = self.session(reader, log);
        let (from, to) = (session.position, position.get());
        if from < to {
            session.position = to;
            self.logs[log.0 as usize].gaps.push(Gap { from, to, reader });
        }
    }

    fn session(&mut self, reader: ReaderId, log: LogId) -> &mut Session {
        self.readers[reader.0 as usize].sessions.get_mut(&log).expect("a reader reads what it was assigned to")
    }

    /// Moves a reader over the record at `at`.
    fn pass(&mut self, reader: ReaderId, log: LogId, at: i64) {
        let session = self.session(reader, log);
        let Session { from, position } = *session;
        session.position = at.saturating_add(1);
        if at < position {
            session.from = at;
            self.leave(reader, log, Session { from, position });
            let state = &self.logs[log.0 as usize];
            let detail = format!("reader {} was at offset {position} and was given offset {at}", reader.0);
            self.findings.add(state.anomaly(Kind::NonMonotonicRead, Some(at), detail));
        } else if at > position {
            self.logs[log.0 as usize].gaps.push(Gap { from: position, to: at, reader });
        }
    }

    /// A reader passed this range, and goes on elsewhere.
    fn leave(&mut self, reader: ReaderId, log: LogId, passed: Session) {
        let log = &mut self.logs[log.0 as usize];
        log.covered.add(passed.from, passed.position);
        if self.readers[reader.0 as usize].isolation == Isolation::ReadCommitted {
            log.covered_committed.add(passed.from, passed.position);
        }
    }

    fn see(&mut self, log: LogId, at: i64, value: ValueId, committed: bool) {
        let state = &mut self.logs[log.0 as usize];
        let Some(send) = self.sends.get_mut(value.0 as usize) else {
            let detail = format!("value {value}, which nobody has sent");
            return self.findings.add(state.anomaly(Kind::Phantom, Some(at), detail));
        };
        if send.log != log {
            let detail = format!("value {value}, which was sent to another partition");
            return self.findings.add(state.anomaly(Kind::Phantom, Some(at), detail));
        }
        if committed && !send.seen_committed {
            send.seen_committed = true;
            if send.transaction.is_some_and(|id| self.transactions[id.0 as usize] == Progress::Open) {
                let detail = format!("value {value} was read before its transaction's commit was asked for");
                self.findings.add(state.anomaly(Kind::PreCommittedRead, Some(at), detail));
            }
        }
        match state.values.insert(at, value) {
            Ok(()) => match send.seen_at() {
                None => send.seen_at = at,
                Some(first) if self.senders[send.sender.0 as usize].kind.idempotent => {
                    let detail = format!("value {value} was read at offset {first} and at offset {at}");
                    self.findings.add(state.anomaly(Kind::Duplicate, Some(at), detail));
                }
                Some(_) => {}
            },
            Err(there) if there == value => {}
            Err(there) => {
                let detail = format!("value {there} was read there, and value {value} as well");
                self.findings.add(state.anomaly(Kind::InconsistentOffsets, Some(at), detail));
                if send.seen_at < 0 {
                    send.seen_at = at;
                }
            }
        }
    }

    /// What lies before this offset was deleted as it should be.
    pub fn trimmed(&mut self, log: LogId, log_start: Offset) {
        let log = &mut self.logs[log.0 as usize];
        log.trimmed = log.trimmed.max(log_start.get());
    }

    /// The log lost its majority for good and went on, explicitly, with what one replica had: nothing at or above `end` counts
    /// any more. What was acknowledged or read there may be gone, or come again at another offset; what lies below is promised
    /// as before. Readers that were further go on from `end`; questions that are under way are not to be told.
    pub fn recovered(&mut self, log: LogId, end: Offset) {
        let at = end.get();
        let state = &mut self.logs[log.0 as usize];
        state.values.cut(at);
        state.covered.cut(at);
        state.covered_committed.cut(at);
        state.gaps.retain(|gap| gap.from < at);
        for gap in &mut state.gaps {
            gap.to = gap.to.min(at);
        }
        state.committed_end = state.committed_end.min(at);
        state.stable_end = state.stable_end.min(at);
        for mark in [Mark::HighWatermark, Mark::LastStableOffset] {
            self.marks.forget(log, mark);
        }
        for reader in &mut self.readers {
            if let Some(session) = reader.sessions.get_mut(&log) {
                session.from = session.from.min(at);
                session.position = session.position.min(at);
            }
        }
        for send in self.sends.iter_mut().filter(|send| send.log == log) {
            send.floor = send.floor.min(at);
            if send.outcome == Outcome::Acknowledged && send.acknowledged_at >= at {
                send.outcome = Outcome::Unknown;
                send.acknowledged_at = -1;
            }
            if send.seen_at >= at {
                send.seen_at = -1;
                send.seen_committed = false;
            }
        }
    }

    /// Everything that is in this log now was read, after all faults had healed and all sends had ended.
    pub fn fully_read(&mut self, log: LogId) {
        self.logs[log.0 as usize].fully_read = true;
    }

    /// A group whose committed offsets are watched.
    pub fn group(&mut self) -> GroupId {
        self.groups += 1;
        GroupId(self.groups)
    }

    /// Someone who asks for marks.
    pub fn observer(&mut self) -> ObserverId {
        self.observers += 1;
        ObserverId(self.observers)
    }

    /// A mark is about to be asked for.
    pub fn ask(&self, log: LogId, mark: Mark, view: View) -> Asked {
        let state = &self.logs[log.0 as usize];
        let known = self.marks.known(log, mark, view);
        let floor = match (view, mark) {
            (View::Fresh, Mark::HighWatermark) => known.max(state.committed_end),
            (View::Fresh, Mark::LastStableOffset) => known.max(state.stable_end),
            _ => known,
        };
        Asked { log, mark, view, floor }
    }

    /// The answer to a question.
    pub fn told(&mut self, asked: Asked, offset: Offset) {
        let Asked { log, mark, view, floor } = asked;
        let offset = offset.get();
        if offset < floor {
            let detail = format!("the {} was {floor} before it was asked for, and was told as {offset}", mark.name());
            let anomaly = self.logs[log.0 as usize].anomaly(Kind::Regression, Some(offset), detail);
            self.findings.add(anomaly);
        }
        if mark == Mark::HighWatermark {
            let state = &mut self.logs[log.0 as usize];
            state.committed_end = state.committed_end.max(offset);
        }
        self.marks.raise(log, mark, view, offset);
        // Whoever asks for the newest may not be told less than someone who asked a replica that is behind.
        self.marks.raise(log, mark, View::Fresh, offset);
    }

    /// A mark was set back on purpose, as when a group seeks.
    pub fn set_back(&mut self, log: LogId, mark: Mark) {
        self.marks.forget(log, mark);
    }

    /// Something that only the workload can see: a log that makes no progress, a member that should be fenced, a replay
    /// that differs.
    pub fn report(&mut self, kind: Kind, log: LogId, offset: Option<Offset>, detail: impl Into<String>) {
        let anomaly = self.logs[log.0 as usize].anomaly(kind, offset.map(Offset::get), detail.into());
        self.findings.add(anomaly);
    }

    /// The values that were read in this range of a log, by offset.
    pub fn values(&self, log: LogId, from: Offset, to: Offset) -> impl Iterator<Item = (Offset, ValueId)> {
        let values = &self.logs[log.0 as usize].values;
        values.range(from.get(), to.get()).map(|(offset, value)| (Offset::new(offset), value))
    }

    /// Whether a committed reader was given this value.
    pub fn is_given_to_committed(&self, value: ValueId) -> bool {
        self.sends[value.0 as usize].seen_committed
    }

    /// Sends so far.
    pub fn sends(&self) -> u64 {
        self.sends.len() as u64
    }

    /// Whether something was wrong at sight. [`judge`](Self::judge) finds the rest.
    pub fn is_suspicious(&self) -> bool {
        !self.findings.is_empty()
    }
}

/// Ids are 32 bits wide, so that a send stays small.
fn index(number: usize) -> u32 {
    u32::try_from(number).expect("a history has fewer than 2^32 of anything")
}
