//! A cluster that keeps its promises, with all the liberty that they leave: seeded, and told to a history as clients
//! would tell it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use flowstone_checker::{
    Asked, History, Isolation, LogId, Mark, Observed, ObserverId, ReaderId, SenderId, SenderKind, TransactionEnd,
    TransactionId, ValueId, View,
};
use flowstone_protocol::{Offset, PartitionId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What [`World::step`] can do, by name.
pub(crate) const DEEDS: [&str; 17] = [
    "send",
    "append",
    "append twice",
    "drop",
    "control batch",
    "commit",
    "truncate",
    "ack",
    "give up",
    "read",
    "seek",
    "trim",
    "ask",
    "tell",
    "begin",
    "commit transaction",
    "abort transaction",
];

/// What lies at an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Value(ValueId),
    Control,
}

#[derive(Debug)]
struct Log {
    id: LogId,
    entries: Vec<Entry>,
    /// Committed by a majority; what lies behind may be cut.
    high_watermark: usize,
    log_start: usize,
}

#[derive(Debug)]
struct Sender {
    id: SenderId,
    kind: SenderKind,
    /// Not appended yet, by log: in the order of sending.
    waiting: Vec<VecDeque<ValueId>>,
    transaction: Option<TransactionId>,
}

#[derive(Debug)]
struct Reader {
    id: ReaderId,
    isolation: Isolation,
    positions: Vec<usize>,
}

/// What the cluster, not its clients, knows of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Committed,
    Aborted,
}

/// What the cluster knows of a value.
#[derive(Clone, Copy, Debug)]
struct Sent {
    sender: usize,
    transaction: Option<TransactionId>,
    /// Its client has been told how it ended, or has given it up.
    ended: bool,
}

pub(crate) struct World {
    pub(crate) history: History,
    pub(crate) done: BTreeMap<&'static str, u64>,
    random: StdRng,
    clock: Duration,
    logs: Vec<Log>,
    senders: Vec<Sender>,
    readers: Vec<Reader>,
    observers: Vec<(ObserverId, Vec<usize>)>,
    values: Vec<Sent>,
    transactions: Vec<Fate>,
    /// Questions under way, with the log and what its high watermark was.
    asked: Vec<(Asked, usize, usize, Mark)>,
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        let mut history = History::new();
        let random = StdRng::seed_from_u64(seed);
        let logs: Vec<Log> = (0..3)
            .map(|number| {
                let id = history.log("orders", PartitionId::new(number));
                Log { id, entries: Vec::new(), high_watermark: 0, log_start: 0 }
            })
            .collect();
        let kinds = [SenderKind::IDEMPOTENT, SenderKind::IDEMPOTENT, SenderKind::PLAIN, SenderKind::LOSSY];
        let senders = kinds
            .into_iter()
            .map(|kind| {
                let waiting = vec![VecDeque::new(); logs.len()];
                Sender { id: history.sender(kind), kind, waiting, transaction: None }
            })
            .collect();
        let mut readers = Vec::new();
        for isolation in [Isolation::ReadUncommitted, Isolation::ReadCommitted, Isolation::ReadUncommitted] {
            let id = history.reader(isolation);
            for log in &logs {
                history.assigned(id, log.id, Offset::new(0));
            }
            readers.push(Reader { id, isolation, positions: vec![0; logs.len()] });
        }
        let observers = (0..2).map(|_| (history.observer(), vec![0; logs.len()])).collect();
        World {
            history,
            done: BTreeMap::new(),
            random,
            clock: Duration::ZERO,
            logs,
            senders,
            readers,
            observers,
            values: Vec::new(),
            transactions: Vec::new(),
            asked: Vec::new(),
        }
    }

    fn did(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random.random_range(0..bound)
    }

    /// One thing happens, if it can.
    pub(crate) fn step(&mut self) {
        self.clock += Duration::from_millis(self.random.random_range(0..20));
        let log = self.below(self.logs.len());
        match self.below(100) {
            0..20 => self.send(log),
            20..38 => self.append(log),
            38..42 => self.drop_one(log),
            42..44 => self.control(log),
            44..54 => self.commit(log),
            54..57 => self.truncate(log),
            57..67 => self.acknowledge(),
            67..70 => self.give_up(),
            70..84 => self.read(log),
            84..86 => self.seek(log),
            86..87 => self.trim(log),
            87..91 => self.ask(log),
            91..95 => self.tell(),
            95..97 => self.begin(),
            _ => self.end_transaction(),
        }
    }

    fn send(&mut self, log: usize) {
        let sender = self.below(self.senders.len());
        let Sender { id, transaction, .. } = self.senders[sender];
        let value = match transaction {
            Some(transaction) => self.history.send_in(transaction, id, self.logs[log].id, self.clock),
            None => self.history.send(id, self.logs[log].id, self.clock),
        };
        self.values.push(Sent { sender, transaction, ended: false });
        self.senders[sender].waiting[log].push_back(value);
        self.did("send");
    }

    /// The leader appends what a sender sent: in order if it is idempotent.
    fn append(&mut self, log: usize) {
        let sender = self.below(self.senders.len());
        let kind = self.senders[sender].kind;
        let count = self.senders[sender].waiting[log].len();
        if count == 0 {
            return;
        }
        let at = if kind.idempotent { 0 } else { self.below(count) };
        let value = self.senders[sender].waiting[log][at];
        self.logs[log].entries.push(Entry::Value(value));
        if !kind.idempotent && self.below(4) == 0 {
            // It stays, and will be appended again.
            return self.did("append twice");
        }
        self.senders[sender].waiting[log].remove(at);
        self.did("append");
        if !kind.durable && !self.values[value.get() as usize].ended && self.below(2) == 0 {
            // Acknowledged by the leader alone, and may be lost.
            let offset = self.logs[log].entries.len() - 1;
            self.end(value);
            self.history.acknowledged(value, offset_of(offset), self.clock);
        }
    }

    /// What was sent is never stored: its client is told so, or never knows.
    fn drop_one(&mut self, log: usize) {
        let sender = self.below(self.senders.len());
        let Some(value) = self.senders[sender].waiting[log].pop_front() else { return };
        self.did("drop");
        let nowhere = !self.logs[log].entries.contains(&Entry::Value(value))
            && !self.senders[sender].waiting[log].contains(&value);
        if nowhere && !self.values[value.get() as usize].ended && self.below(3) > 0 {
            self.end(value);
            self.history.failed(value);
        }
    }

    fn control(&mut self, log: usize) {
        self.logs[log].entries.push(Entry::Control);
        self.did("control batch");
    }

    fn commit(&mut self, log: usize) {
        let Log { entries, high_watermark, .. } = &self.logs[log];
        let more = entries.len() - high_watermark;
        if more > 0 {
            self.logs[log].high_watermark += 1 + self.below(more);
            self.did("commit");
        }
    }

    /// A new leader did not have the end of the log. What was in it is sent again, or is lost.
    fn truncate(&mut self, log: usize) {
        let keep = self.logs[log].high_watermark;
        let cut = self.logs[log].entries.split_off(keep);
        if cut.is_empty() {
            return;
        }
        self.did("truncate");
        self.control(log);
        let again = self.below(2) == 0;
        for entry in cut.into_iter().rev() {
            if let Entry::Value(value) = entry
                && again
                && !self.acknowledged_by_leader(value)
            {
                let sender = self.values[value.get() as usize].sender;
                self.senders[sender].waiting[log].push_front(value);
            }
        }
    }

    fn acknowledged_by_leader(&self, value: ValueId) -> bool {
        let Sent { sender, ended, .. } = self.values[value.get() as usize];
        ended && !self.senders[sender].kind.durable
    }

    fn end(&mut self, value: ValueId) {
        self.values[value.get() as usize].ended = true;
    }

    /// Somewhere a committed value is acknowledged.
    fn acknowledge(&mut self) {
        let open: Vec<(ValueId, usize)> = self
            .logs
            .iter()
            .flat_map(|log| log.entries[..log.high_watermark].iter().enumerate())
            .filter_map(|(offset, entry)| match entry {
                Entry::Value(value) if !self.values[value.get() as usize].ended => Some((*value, offset)),
                _ => None,
            })
            .collect();
        if open.is_empty() {
            return;
        }
        let (value, offset) = open[self.below(open.len())];
        self.end(value);
        self.history.acknowledged(value, offset_of(offset), self.clock);
        self.did("ack");
    }

    /// A client waits no longer; what it sent may still be stored.
    fn give_up(&mut self) {
        let open: Vec<usize> = (0..self.values.len()).filter(|number| !self.values[*number].ended).collect();
        if open.is_empty() {
            return;
        }
        let value = ValueId::new(open[self.below(open.len())] as u64);
        self.end(value);
        self.history.unknown(value);
        self.did("give up");
    }

    fn fate(&self, value: ValueId) -> Fate {
        let transaction = self.values[value.get() as usize].transaction;
        transaction.map_or(Fate::Committed, |id| self.transactions[number_of(id)])
    }

    /// One past what a committed reader may be given.
    fn stable(&self, log: usize) -> usize {
        let Log { entries, high_watermark, .. } = &self.logs[log];
        let open = |entry: &Entry| matches!(entry, Entry::Value(value) if self.fate(*value) == Fate::Open);
        entries[..*high_watermark].iter().position(open).unwrap_or(*high_watermark)
    }

    fn read(&mut self, log: usize) {
        let reader = self.below(self.readers.len());
        let records = 1 + self.below(6);
        self.read_some(reader, log, records);
        self.did("read");
    }

    fn read_some(&mut self, reader: usize, log: usize, records: usize) {
        let Reader { id, isolation, ref positions } = self.readers[reader];
        let mut position = positions[log].max(self.logs[log].log_start);
        let committed = isolation == Isolation::ReadCommitted;
        let end = if committed { self.stable(log) } else { self.logs[log].high_watermark };
        let mut given = 0;
        while position < end && given < records {
            if let Entry::Value(value) = self.logs[log].entries[position]
                && !(committed && self.fate(value) == Fate::Aborted)
            {
                self.history.read(id, self.logs[log].id, offset_of(position), Observed::Value(value));
                given += 1;
            }
            position += 1;
        }
        if self.below(2) == 0 || records == usize::MAX {
            self.history.read_past(id, self.logs[log].id, offset_of(position));
        }
        self.readers[reader].positions[log] = position;
    }

    fn seek(&mut self, log: usize) {
        let reader = self.below(self.readers.len());
        let end = self.logs[log].high_watermark;
        let to = self.below(end + 1);
        self.readers[reader].positions[log] = to;
        self.history.assigned(self.readers[reader].id, self.logs[log].id, offset_of(to));
        self.did("seek");
    }

    fn trim(&mut self, log: usize) {
        let Log { id, high_watermark, log_start, .. } = self.logs[log];
        if high_watermark > log_start + 30 {
            let to = log_start + self.below(20);
            self.logs[log].log_start = to;
            self.history.trimmed(id, offset_of(to));
            self.did("trim");
        }
    }

    fn mark(&self, log: usize, mark: Mark) -> usize {
        match mark {
            Mark::HighWatermark => self.logs[log].high_watermark,
            Mark::LastStableOffset => self.stable(log),
            _ => self.logs[log].log_start,
        }
    }

    fn ask(&mut self, log: usize) {
        let mark = [Mark::HighWatermark, Mark::LastStableOffset, Mark::LogStart][self.below(3)];
        let id = self.logs[log].id;
        if mark == Mark::HighWatermark && self.below(2) == 0 {
            // Of a replica that is behind, but not behind what it said before.
            let observer = self.below(self.observers.len());
            let (who, told) = &self.observers[observer];
            let (who, before) = (*who, told[log]);
            let asked = self.history.ask(id, mark, View::Session(who));
            let now = before + self.below(self.logs[log].high_watermark - before + 1);
            self.observers[observer].1[log] = now;
            self.history.told(asked, offset_of(now));
        } else {
            let asked = self.history.ask(id, mark, View::Fresh);
            self.asked.push((asked, log, self.mark(log, mark), mark));
        }
        self.did("ask");
    }

    /// An answer comes: any state between the question and now.
    fn tell(&mut self) {
        if self.asked.is_empty() {
            return;
        }
        let at = self.below(self.asked.len());
        let (asked, log, then, mark) = self.asked.swap_remove(at);
        let now = self.mark(log, mark);
        // Only what is known to go up: with `below` of the difference.
        let told = then + self.below(now - then + 1);
        self.history.told(asked, offset_of(told));
        self.did("tell");
    }

    fn begin(&mut self) {
        // The second sender is the transactional one.
        if self.senders[1].transaction.is_none() {
            let id = self.history.transaction();
            self.transactions.push(Fate::Open);
            self.senders[1].transaction = Some(id);
            self.did("begin");
        }
    }

    /// All of it is committed, or none of it.
    fn end_transaction(&mut self) {
        let Some(id) = self.senders[1].transaction else { return };
        // What was not appended by now never is.
        for log in 0..self.logs.len() {
            while let Some(value) = self.senders[1].waiting[log].pop_front() {
                if !self.values[value.get() as usize].ended {
                    self.end(value);
                    self.history.unknown(value);
                }
            }
        }
        for log in 0..self.logs.len() {
            self.logs[log].high_watermark = self.logs[log].entries.len();
        }
        self.senders[1].transaction = None;
        let known = self.below(3) > 0;
        let (fate, end) = if self.below(2) == 0 {
            self.history.committing(id);
            self.did("commit transaction");
            (Fate::Committed, TransactionEnd::Committed)
        } else {
            if self.below(2) == 0 {
                self.history.committing(id);
            }
            self.did("abort transaction");
            (Fate::Aborted, TransactionEnd::Aborted)
        };
        self.transactions[number_of(id)] = fate;
        self.history.transaction_ended(id, if known { end } else { TransactionEnd::Unknown });
        for log in 0..self.logs.len() {
            self.control(log);
        }
    }

    /// All that can still come comes; then one reader of each isolation reads everything.
    pub(crate) fn heal_and_read_all(&mut self) {
        self.end_transaction();
        for log in 0..self.logs.len() {
            for _ in 0..20 {
                self.append(log);
            }
            self.logs[log].high_watermark = self.logs[log].entries.len();
        }
        for _ in 0..self.values.len() / 2 {
            self.acknowledge();
        }
        self.history.sending_ended(self.clock);
        for reader in 0..2 {
            for log in 0..self.logs.len() {
                let from = self.logs[log].log_start;
                self.readers[reader].positions[log] = from;
                self.history.assigned(self.readers[reader].id, self.logs[log].id, offset_of(from));
                self.read_some(reader, log, usize::MAX);
                self.history.fully_read(self.logs[log].id);
            }
        }
    }

    /// A log with its end: the offset of what would be appended next.
    pub(crate) fn log(&self, log: usize) -> (LogId, i64) {
        (self.logs[log].id, self.logs[log].entries.len() as i64)
    }
}

fn offset_of(position: usize) -> Offset {
    Offset::new(position as i64)
}

fn number_of(id: TransactionId) -> usize {
    id.number() as usize
}
