//! What can only be said when all is known: which values are missing, passed over, misplaced or out of order.

use std::collections::HashMap;

use crate::anomaly::{Findings, Kind, Verdict};
use crate::history::{History, Isolation, Log, LogId, Outcome, Send, SenderId, ValueId};
use crate::offsets::Ranges;
use crate::transactions::{Progress, TransactionEnd};

impl History {
    /// The verdict on all that was told so far. The time it takes grows as what was told, n log n at worst.
    pub fn judge(&self) -> Verdict {
        let (covered, covered_committed) = self.covered();
        let mut judge = Judge { history: self, findings: self.findings.clone(), covered, covered_committed };
        for (number, send) in self.sends.iter().enumerate() {
            judge.send(ValueId::new(number as u64), send);
        }
        judge.order();
        judge.gaps();
        judge.transactions();
        for (kind, log, offset, detail) in self.pipeline_anomalies() {
            judge.add(log, kind, Some(offset), detail);
        }
        let count = |outcome| self.sends.iter().filter(|send| send.outcome == outcome).count() as u64;
        let (anomalies, counts) = judge.findings.into_parts();
        Verdict {
            operations: self.sends.len() as u64,
            acknowledged: count(Outcome::Acknowledged),
            failed: count(Outcome::Failed),
            unknown: count(Outcome::Unknown) + count(Outcome::Pending),
            reads: self.reads,
            longest_gap: self.logs.iter().map(|log| log.longest_gap).max().unwrap_or_default(),
            anomalies,
            counts,
        }
    }

    /// What some reader passed, and what some committed reader passed, by log.
    fn covered(&self) -> (Vec<Ranges>, Vec<Ranges>) {
        let mut covered: Vec<Ranges> = self.logs.iter().map(|log| log.covered.clone()).collect();
        let mut committed: Vec<Ranges> = self.logs.iter().map(|log| log.covered_committed.clone()).collect();
        for reader in &self.readers {
            for (log, session) in &reader.sessions {
                covered[log.0 as usize].add(session.from, session.position);
                if reader.isolation == Isolation::ReadCommitted {
                    committed[log.0 as usize].add(session.from, session.position);
                }
            }
        }
        covered.iter_mut().chain(&mut committed).for_each(Ranges::merge);
        (covered, committed)
    }
}

struct Judge<'a> {
    history: &'a History,
    findings: Findings,
    covered: Vec<Ranges>,
    covered_committed: Vec<Ranges>,
}

impl<'a> Judge<'a> {
    fn log(&self, id: LogId) -> &'a Log {
        &self.history.logs[id.0 as usize]
    }

    fn add(&mut self, log: LogId, kind: Kind, offset: Option<i64>, detail: String) {
        self.findings.add(self.log(log).anomaly(kind, offset, detail));
    }

    /// How the transaction of a send ended; committed where there is none.
    fn end_of(&self, send: &Send) -> Option<TransactionEnd> {
        match send.transaction.map(|id| self.history.transactions[id.0 as usize]) {
            None => Some(TransactionEnd::Committed),
            Some(Progress::Ended(end)) => Some(end),
            Some(Progress::Open | Progress::Committing) => None,
        }
    }

    fn send(&mut self, value: ValueId, send: &Send) {
        let kind = self.history.senders[send.sender.0 as usize].kind;
        let seen_at = send.seen_at();
        if send.fenced && (seen_at.is_some() || send.outcome == Outcome::Acknowledged) {
            let at = seen_at.or(send.acknowledged_at());
            let detail = format!("value {value} was sent by sender {} after it was fenced", send.sender.0);
            self.add(send.log, Kind::ZombieAccepted, at, detail);
        }
        if let (Some(at), Outcome::Failed) = (seen_at, send.outcome) {
            self.add(send.log, Kind::AbortedRead, Some(at), format!("value {value}, whose send failed for certain"));
        }
        if send.seen_committed && self.end_of(send) == Some(TransactionEnd::Aborted) {
            let detail = format!("value {value}, whose transaction was aborted, was given to a committed reader");
            self.add(send.log, Kind::AbortedRead, seen_at, detail);
        }
        let Some(told) = send.acknowledged_at() else { return };
        let log = self.log(send.log);
        match seen_at {
            Some(at) => {
                let there = log.values.get(told);
                let misplaced = match there {
                    Some(there) => there != value && at != told,
                    // A value that is there twice may have been acknowledged where nobody looked yet.
                    None => kind.idempotent || self.passed(send.log, told),
                };
                if misplaced && (kind.durable || kind.idempotent) && told >= log.trimmed {
                    let detail = format!("value {value} was acknowledged at offset {told} and read at offset {at}");
                    self.add(send.log, Kind::WrongAck, Some(told), detail);
                }
            }
            // Transactions are judged as a whole.
            None if kind.durable
                && send.transaction.is_none()
                && told >= log.trimmed
                && self.passed(send.log, told) =>
            {
                let highest = log.values.highest();
                let kind = if highest.is_some_and(|highest| told < highest) { Kind::LostWrite } else { Kind::Unseen };
                let instead = match (log.values.get(told), highest) {
                    (Some(other), _) => format!("value {other} lies there"),
                    (None, Some(highest)) => format!("nothing was read there; the highest offset read is {highest}"),
                    (None, None) => "nothing was read at all".to_owned(),
                };
                let detail = format!(
                    "value {value} of sender {}, acknowledged after {} ms at offset {told}, was never read: {instead}",
                    send.sender.0, send.acknowledged_after_ms
                );
                self.add(send.log, kind, Some(told), detail);
            }
            None => {}
        }
    }

    /// Whether someone looked at this offset.
    fn passed(&self, log: LogId, offset: i64) -> bool {
        self.log(log).fully_read || self.covered[log.0 as usize].contains(offset)
    }

    /// Each idempotent sender's values lie in the order in which it sent them.
    fn order(&mut self) {
        let mut last: HashMap<(SenderId, LogId), (i64, ValueId)> = HashMap::new();
        for (number, send) in self.history.sends.iter().enumerate() {
            let value = ValueId::new(number as u64);
            let idempotent = self.history.senders[send.sender.0 as usize].kind.idempotent;
            let Some(at) = send.seen_at().or(send.acknowledged_at()).filter(|_| idempotent) else { continue };
            let before = last.entry((send.sender, send.log)).or_insert((i64::MIN, value));
            if at < before.0 {
                let (earlier_at, earlier) = *before;
                let detail = format!(
                    "sender {} sent value {earlier} before value {value}, which lies before it: offset {at} against \
                     {earlier_at}",
                    send.sender.0
                );
                self.add(send.log, Kind::NonMonotonicSend, Some(at), detail);
            } else {
                *before = (at, value);
            }
        }
    }

    /// What readers passed without a record holds no record that they should have been given.
    fn gaps(&mut self) {
        for index in 0..self.history.logs.len() {
            let log = &self.history.logs[index];
            for gap in &log.gaps {
                let isolation = self.history.readers[gap.reader.0 as usize].isolation;
                let visible = |value: ValueId| {
                    let send = &self.history.sends[value.get() as usize];
                    isolation == Isolation::ReadUncommitted || self.end_of(send) == Some(TransactionEnd::Committed)
                };
                let mut skipped =
                    log.values.range(gap.from.max(log.trimmed), gap.to).filter(|(_, value)| visible(*value));
                if let Some((offset, value)) = skipped.next() {
                    let more = skipped.count();
                    let detail = format!(
                        "reader {} went from offset {} to {} and was not given value {value} and {more} more",
                        gap.reader.0, gap.from, gap.to
                    );
                    self.findings.add(log.anomaly(Kind::Skip, Some(offset), detail));
                }
            }
        }
    }

    /// Of each transaction all is there or nothing.
    fn transactions(&mut self) {
        let mut parts: HashMap<u32, (bool, Vec<usize>)> = HashMap::new();
        for (number, send) in self.history.sends.iter().enumerate() {
            let Some(transaction) = send.transaction else { continue };
            let (any_seen, missing) = parts.entry(transaction.0).or_default();
            *any_seen |= send.seen_committed;
            let told = send.acknowledged_at().filter(|told| *told >= self.log(send.log).trimmed);
            if !send.seen_committed
                && told.is_some_and(|told| self.covered_committed[send.log.0 as usize].contains(told))
            {
                missing.push(number);
            }
        }
        let mut parts: Vec<_> = parts.into_iter().collect();
        parts.sort_unstable_by_key(|(transaction, _)| *transaction);
        for (transaction, (any_seen, missing)) in parts {
            for number in missing {
                let send = &self.history.sends[number];
                let kind = match self.end_of(send) {
                    Some(TransactionEnd::Committed | TransactionEnd::Unknown) if any_seen => Kind::TornTransaction,
                    Some(TransactionEnd::Committed) => Kind::Unseen,
                    _ => continue,
                };
                let detail =
                    format!("value {number} of transaction {transaction} was never given to a committed reader");
                self.add(send.log, kind, send.acknowledged_at(), detail);
            }
        }
    }
}
