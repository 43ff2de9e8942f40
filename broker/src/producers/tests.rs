use std::collections::VecDeque;

use flowstone_protocol::control::{encode_marker, log_start_payload};
use flowstone_protocol::{Compression, LeaderEpoch, ProducerEpoch, RecordBatchBuilder, Term};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

/// What was appended, with the bytes of a marker.
#[derive(Clone, Debug)]
struct InFlight {
    header: BatchHeader,
    offset: Offset,
    index: RaftIndex,
    marker: Option<Bytes>,
}

impl InFlight {
    fn entry(&self) -> MachineEntry<'_> {
        let body = self.marker.as_ref().map_or(MachineBody::Header, MachineBody::Records);
        MachineEntry { index: self.index, term: Term::new(1), base_offset: self.offset, header: &self.header, body }
    }
}

/// A partition of one replica: what is appended gets the next offset and index.
#[derive(Default)]
struct Partition {
    producers: Producers,
    in_flight: VecDeque<InFlight>,
    end: i64,
    index: u64,
    high_watermark: i64,
}

type Told = Result<i64, Result<i64, ErrorCode>>;

fn transactional() -> flowstone_protocol::Attributes {
    let mut batch = RecordBatchBuilder::new(Compression::None).transactional();
    batch.append(Timestamp::new(1), None, None, []).expect("fits");
    BatchHeader::parse(&batch.build()).expect("built here").attributes
}

/// Refused so.
fn refused(code: ErrorCode) -> Told {
    Err(Err(code))
}

fn header(id: i64, epoch: i16, first: i32, records: i32) -> BatchHeader {
    let mut batch = RecordBatchBuilder::new(Compression::None).producer(
        ProducerId::new(id),
        ProducerEpoch::new(epoch),
        Sequence::new(first),
    );
    for _ in 0..records {
        batch.append(Timestamp::new(1), None, Some(b"x"), []).expect("fits");
    }
    BatchHeader::parse(&batch.build()).expect("built here")
}

impl Partition {
    /// `Ok(offset)` appended, `Err(Ok(offset))` duplicate, `Err(Err(code))` refused.
    fn send(&mut self, id: i64, epoch: i16, first: i32, records: i32) -> Told {
        self.take(header(id, epoch, first, records))
    }

    /// The same, within a transaction.
    fn write(&mut self, id: i64, epoch: i16, first: i32) -> Told {
        let mut header = header(id, epoch, first, 1);
        header.attributes = transactional();
        self.take(header)
    }

    fn take(&mut self, header: BatchHeader) -> Told {
        let admission = self.producers.admit(&header);
        self.told(admission, header, None)
    }

    /// Ends a transaction with a marker of this epoch, as coordinator 1 unless said otherwise.
    fn end(&mut self, id: i64, epoch: i16, commit: bool) -> Told {
        self.end_by(1, id, epoch, commit)
    }

    fn end_by(&mut self, coordinator: i32, id: i64, epoch: i16, commit: bool) -> Told {
        let marker = Marker {
            producer_id: ProducerId::new(id),
            producer_epoch: ProducerEpoch::new(epoch),
            commit,
            coordinator_epoch: LeaderEpoch::new(coordinator),
        };
        let admission = self.producers.admit_marker(&marker);
        let bytes = encode_marker(&marker, Timestamp::new(1));
        self.told(admission, BatchHeader::parse(&bytes).expect("built here"), Some(bytes))
    }

    fn told(&mut self, admission: Admission, header: BatchHeader, marker: Option<Bytes>) -> Told {
        match admission {
            Admission::Append => {
                let offset = Offset::new(self.end);
                self.index += 1;
                self.in_flight.push_back(InFlight { header, offset, index: RaftIndex::new(self.index), marker });
                self.producers.appended(&self.in_flight[self.in_flight.len() - 1].entry());
                self.end += header.offsets();
                Ok(offset.get())
            }
            Admission::Duplicate { base_offset, .. } => Err(Ok(base_offset.get())),
            Admission::Refuse(error) => Err(Err(error.code)),
        }
    }

    fn commit(&mut self, batches: usize) {
        for appended in self.in_flight.drain(..batches) {
            self.producers.committed(&appended.entry());
            self.high_watermark = appended.header.next_offset().get().max(appended.offset.get() + 1);
        }
    }

    fn commit_all(&mut self) {
        self.commit(self.in_flight.len());
    }

    /// A control batch of the log's own, committed at once.
    fn control(&mut self, ctype: ControlType, payload: Bytes) {
        self.commit_all();
        let header = header(-1, -1, -1, 1);
        self.index += 1;
        let body = MachineBody::Control { ctype, payload: &payload };
        let (index, base_offset) = (RaftIndex::new(self.index), Offset::new(self.end));
        self.producers.committed(&MachineEntry { index, term: Term::new(1), base_offset, header: &header, body });
        self.end += 1;
        self.high_watermark = self.end;
    }

    /// Time goes by until whoever is idle is forgotten.
    fn expire(&mut self) {
        self.commit_all();
        let (first, later) = (Timestamp::new(0), Timestamp::new(0).after(Producers::EXPIRATION));
        assert_eq!(self.producers.expired(first), None, "nobody was seen idle yet");
        if let Some(payload) = self.producers.expired(later) {
            self.control(ControlType::ProducerExpiry, payload);
        }
    }

    fn stable(&self) -> i64 {
        self.producers.last_stable_offset(Offset::new(self.high_watermark)).get()
    }

    fn aborted(&self, from: i64, to: i64) -> Vec<(i64, i64)> {
        let aborted = self.producers.aborted_between(Offset::new(from), Offset::new(to));
        aborted.into_iter().map(|(id, first)| (id.get(), first.get())).collect()
    }
}

#[test]
fn batches_follow_each_other_whether_committed_or_in_flight() {
    let mut partition = Partition::default();
    assert_eq!(partition.send(7, 0, 0, 3), Ok(0));
    assert_eq!(partition.send(7, 0, 3, 2), Ok(3));
    assert_eq!(partition.send(7, 0, 3, 2), Err(Ok(3)), "a duplicate of what is in flight");
    partition.commit(2);
    assert_eq!(partition.send(7, 0, 0, 3), Err(Ok(0)), "a duplicate of what is committed");
    assert_eq!(partition.send(7, 0, 5, 1), Ok(5));
    assert_eq!(partition.send(8, 0, 0, 1), Ok(6), "another producer");
    assert_eq!(partition.send(-1, -1, -1, 1), Ok(7), "no producer");
}

#[test]
fn gaps_and_strangers_are_told() {
    let mut partition = Partition::default();
    assert_eq!(partition.send(7, 0, 5, 1), Err(Err(ErrorCode::UnknownProducer)));
    assert_eq!(partition.send(7, 0, 0, 3), Ok(0));
    assert_eq!(partition.send(7, 0, 4, 1), Err(Err(ErrorCode::OutOfOrderSequence)));
    assert_eq!(partition.send(7, 0, 0, 2), Err(Err(ErrorCode::DuplicateSequence)), "other bounds: not the same batch");
}

#[test]
fn five_batches_are_remembered() {
    let mut partition = Partition::default();
    for first in 0..6 {
        assert_eq!(partition.send(7, 0, first, 1), Ok(i64::from(first)));
    }
    let check = |partition: &mut Partition| {
        assert_eq!(partition.send(7, 0, 0, 1), Err(Err(ErrorCode::DuplicateSequence)));
        for first in 1..6 {
            assert_eq!(partition.send(7, 0, first, 1), Err(Ok(i64::from(first))));
        }
    };
    check(&mut partition);
    partition.commit(6);
    check(&mut partition);
}

#[test]
fn epochs_fence() {
    let mut partition = Partition::default();
    assert_eq!(partition.send(7, 1, 0, 1), Ok(0));
    assert_eq!(partition.send(7, 0, 1, 1), Err(Err(ErrorCode::ProducerFenced)));
    assert_eq!(partition.send(7, 2, 1, 1), Err(Err(ErrorCode::OutOfOrderSequence)));
    assert_eq!(partition.send(7, 2, 0, 1), Ok(1));
    assert_eq!(partition.send(7, 1, 1, 1), Err(Err(ErrorCode::ProducerFenced)));
    partition.commit(2);
    assert_eq!(partition.send(7, 2, 0, 1), Err(Ok(1)));
}

#[test]
fn sequences_wrap() {
    let mut partition = Partition::default();
    assert_eq!(partition.send(7, 0, 0, 1), Ok(0));
    partition.commit(1);
    // As after 2^31 - 3 records: the last batch before the wrap ends at MAX - 1.
    let newest = partition.producers.committed.producers.get_mut(&ProducerId::new(7)).expect("known");
    newest.batches[0].first = Sequence::new(i32::MAX - 1);
    newest.batches[0].last = Sequence::new(i32::MAX - 1);
    assert_eq!(partition.send(7, 0, i32::MAX, 3), Ok(1), "MAX, 0, 1");
    assert_eq!(partition.send(7, 0, 3, 1), Err(Err(ErrorCode::OutOfOrderSequence)));
    assert_eq!(partition.send(7, 0, 2, 1), Ok(4));
    assert_eq!(partition.send(7, 0, i32::MAX, 3), Err(Ok(1)));
}

#[test]
fn what_was_in_flight_is_forgotten_with_leadership() {
    let mut partition = Partition::default();
    assert_eq!(partition.send(7, 0, 0, 1), Ok(0));
    partition.commit(1);
    assert_eq!(partition.send(7, 0, 1, 1), Ok(1));
    partition.producers.step_down();
    partition.in_flight.clear();
    assert_eq!(partition.send(7, 0, 2, 1), Err(Err(ErrorCode::OutOfOrderSequence)));
    assert_eq!(partition.send(7, 0, 1, 1), Ok(2));
}

#[test]
fn a_checkpoint_restores_what_was_committed() {
    let mut partition = Partition::default();
    for first in 0..7 {
        partition.send(7, 3, first, 1).expect("in order");
    }
    partition.send(8, 0, 0, 4).expect("in order");
    partition.commit(7);
    let bytes = partition.producers.checkpoint();
    let mut restored = Producers::default();
    restored.restore(&bytes).expect("own bytes");
    assert_eq!(restored.committed, partition.producers.committed);
    assert!(restored.overlay.is_empty() && !restored.committed.producers.contains_key(&ProducerId::new(8)));
    assert_eq!(restored.checkpoint(), bytes);
    assert!(restored.restore(b"\xff\xff").is_err());
    restored.restore(b"").expect("from nothing");
    assert_eq!(restored.committed, Known::default());
}

#[test]
fn a_transaction_holds_readers_back_until_it_ends() {
    let mut partition = Partition::default();
    assert_eq!(partition.send(-1, -1, -1, 1), Ok(0));
    assert_eq!(partition.write(7, 0, 0), Ok(1));
    assert_eq!(partition.stable(), 0, "nothing is committed yet");
    partition.commit_all();
    assert_eq!((partition.stable(), partition.high_watermark), (1, 2));
    assert_eq!(partition.write(8, 0, 0), Ok(2));
    assert_eq!(partition.write(7, 0, 1), Ok(3));
    assert_eq!(partition.end(7, 1, false), Ok(4));
    assert_eq!(partition.stable(), 1, "the marker is not committed");
    partition.commit_all();
    assert_eq!(partition.stable(), 2, "8 is open");
    assert_eq!(partition.end(8, 1, true), Ok(5));
    partition.commit_all();
    assert_eq!(partition.stable(), 6);
    assert_eq!(partition.aborted(0, 6), [(7, 1)]);
    assert_eq!(partition.aborted(5, 6), []);
    partition.control(ControlType::LogStart, log_start_payload(Offset::new(5)));
    assert_eq!(partition.aborted(0, 6), [], "nobody reads there any more");
}

#[test]
fn a_transaction_of_which_nothing_is_left_holds_nobody_up() {
    let mut partition = Partition::default();
    assert_eq!(partition.write(7, 0, 0), Ok(0));
    assert_eq!(partition.write(8, 0, 0), Ok(1));
    assert_eq!(partition.write(7, 0, 1), Ok(2));
    partition.commit_all();
    // Its marker was lost with the power: nobody writes it again, and its producer has gone on.
    assert_eq!(partition.write(7, 1, 0), refused(ErrorCode::ConcurrentTransactions));
    let trim = |partition: &mut Partition, to: i64| {
        partition.control(ControlType::LogStart, log_start_payload(Offset::new(to)));
    };
    trim(&mut partition, 2);
    assert_eq!(partition.stable(), 0, "a record of it is left; of the other one none is");
    assert_eq!(partition.write(8, 1, 0), Ok(4));
    trim(&mut partition, 4);
    assert_eq!(partition.stable(), 4, "only the one that began anew is open");
    assert_eq!(partition.write(7, 1, 0), Ok(6));
    partition.commit_all();
    // One that was open all along and goes on is open again.
    trim(&mut partition, 7);
    let stable = partition.stable();
    assert_eq!(partition.write(7, 1, 1), Ok(8));
    partition.commit_all();
    assert_eq!((stable, partition.stable()), (8, 8));
    assert_eq!(partition.end(7, 2, false), Ok(9));
    partition.commit_all();
    assert_eq!((partition.stable(), partition.aborted(7, 10)), (10, vec![(7, 8)]));
}

#[test]
fn what_comes_after_its_marker_is_refused_and_does_not_hang() {
    // Late on the leader that wrote the marker, and on one that learned of it from the log.
    for commit in [false, true] {
        let mut partition = Partition::default();
        assert_eq!(partition.write(7, 0, 0), Ok(0));
        assert_eq!(partition.end(7, 1, false), Ok(1));
        if commit {
            partition.commit_all();
        }
        assert_eq!(partition.write(7, 0, 1), refused(ErrorCode::ProducerFenced));
        assert_eq!(partition.write(7, 1, 3), refused(ErrorCode::OutOfOrderSequence), "the next one begins at 0");
        partition.commit_all();
        assert_eq!(partition.stable(), 2);
    }
    // A marker for a write that never came.
    let mut partition = Partition::default();
    assert_eq!(partition.end(7, 1, false), Ok(0));
    assert_eq!(partition.write(7, 0, 0), refused(ErrorCode::ProducerFenced));
    partition.commit_all();
    assert_eq!(partition.write(7, 0, 0), refused(ErrorCode::ProducerFenced));
    assert_eq!((partition.stable(), partition.aborted(0, 1)), (1, Vec::new()));
}

#[test]
fn a_marker_ends_the_transaction_that_it_is_for() {
    let mut partition = Partition::default();
    assert_eq!(partition.write(7, 0, 0), Ok(0));
    assert_eq!(partition.end(7, 1, true), Ok(1));
    assert_eq!(partition.end(7, 1, true), Err(Ok(1)), "again, while it is in flight");
    partition.commit_all();
    assert_eq!(partition.write(7, 1, 0), Ok(2), "the next transaction has that epoch");
    assert_eq!(partition.end(7, 1, true), Err(Ok(1)), "again, of a coordinator that took over: it is done");
    assert_eq!(partition.end(7, 1, false), refused(ErrorCode::InvalidTransactionState), "decided otherwise");
    assert_eq!(partition.end(7, 0, true), refused(ErrorCode::ProducerFenced), "an old one");
    partition.commit_all();
    assert_eq!(partition.stable(), 2, "the next transaction is as it was");
    assert_eq!(partition.end_by(5, 7, 2, false), Ok(3));
    assert_eq!(partition.end_by(4, 7, 3, false), refused(ErrorCode::NotCoordinator), "a newer one has written");
    assert_eq!(partition.end_by(5, 7, 2, false), Err(Ok(3)));
    assert_eq!(partition.end_by(6, 7, 2, false), Err(Ok(3)));
    partition.commit_all();
    assert_eq!(partition.aborted(0, 4), [(7, 2)]);
}

#[test]
fn plain_and_transactional_do_not_mix() {
    let mut partition = Partition::default();
    assert_eq!(partition.write(7, 0, 0), Ok(0));
    assert_eq!(partition.send(7, 0, 1, 1), refused(ErrorCode::InvalidTransactionState));
    assert_eq!(partition.send(7, 1, 0, 1), refused(ErrorCode::InvalidTransactionState));
    assert_eq!(partition.send(8, 0, 0, 1), Ok(1));
    assert_eq!(partition.write(8, 0, 1), refused(ErrorCode::InvalidTransactionState));
    assert_eq!(partition.write(7, 1, 0), refused(ErrorCode::ConcurrentTransactions), "the one before is open");
}

#[test]
fn an_epoch_at_its_maximum_ends_with_a_marker() {
    let mut partition = Partition::default();
    assert_eq!(partition.write(7, i16::MAX - 1, 0), Ok(0));
    assert_eq!(partition.end(7, i16::MAX, true), Ok(1));
    assert_eq!(partition.write(7, i16::MAX - 1, 1), refused(ErrorCode::ProducerFenced));
    // What comes next has another id.
    assert_eq!(partition.write(70, 0, 0), Ok(2));
    partition.commit_all();
    assert_eq!(partition.stable(), 2);
}

#[test]
fn one_that_was_idle_for_long_is_told_so() {
    let mut partition = Partition::default();
    for first in 0..3 {
        assert_eq!(partition.send(7, 4, first, 1), Ok(i64::from(first)));
    }
    assert_eq!(partition.write(8, 0, 0), Ok(3));
    assert_eq!(partition.write(9, 0, 0), Ok(4));
    assert_eq!(partition.end(9, 1, true), Ok(5));
    partition.expire();
    assert_eq!(partition.send(7, 4, 3, 1), refused(ErrorCode::ProducerExpired), "it goes on");
    assert_eq!(partition.send(7, 4, 0, 1), refused(ErrorCode::ProducerExpired), "it may be a duplicate");
    assert_eq!(partition.send(7, 3, 0, 1), refused(ErrorCode::ProducerFenced));
    assert_eq!(partition.send(6, 0, 3, 1), refused(ErrorCode::UnknownProducer), "that one was never known");
    // One with an open transaction is kept.
    assert_eq!(partition.write(8, 0, 1), Ok(7));
    // Of one whose transaction ended nothing late is taken, and the next begins.
    assert_eq!(partition.write(9, 0, 1), refused(ErrorCode::ProducerFenced));
    assert_eq!(partition.end(9, 1, true), refused(ErrorCode::ProducerFenced), "over, whatever became of it");
    assert_eq!(partition.write(9, 1, 0), Ok(8));
    assert_eq!(partition.send(7, 5, 0, 1), Ok(9), "a new epoch");
    partition.commit_all();
    assert_eq!(partition.stable(), 3);
    let mut restored = Producers::default();
    restored.restore(&partition.producers.checkpoint()).expect("own bytes");
    assert_eq!(restored.committed, partition.producers.committed);
}

#[test]
fn one_that_writes_is_not_idle() {
    let mut partition = Partition::default();
    partition.send(7, 0, 0, 1).expect("appended");
    partition.commit_all();
    let at = |hours: u32| Timestamp::new(0).after(Duration::from_secs(3_600) * hours);
    assert_eq!(partition.producers.expired(at(0)), None);
    partition.send(7, 0, 1, 1).expect("appended");
    partition.commit_all();
    assert_eq!(partition.producers.expired(at(24)), None, "it wrote since");
    partition.send(7, 0, 2, 1).expect("appended");
    assert_eq!(partition.producers.expired(at(48)), None, "something of it is in flight");
    partition.commit_all();
    assert_eq!(partition.producers.expired(at(72)), None);
    partition.producers.step_down();
    partition.producers.lead();
    assert_eq!(partition.producers.expired(at(96)), None, "a new leader gives everyone the whole time");
    assert!(partition.producers.expired(at(120)).is_some());
}

#[test]
fn the_least_recent_make_room() {
    let mut partition = Partition::default();
    assert_eq!(partition.write(1, 0, 0), Ok(0), "open: it stays");
    for id in 2..=PRODUCERS_MAX as i64 + 1 {
        partition.send(id, 0, 0, 1).expect("appended");
        if id == 1_000 {
            partition.send(2, 0, 1, 1).expect("2 is not the least recent any more");
        }
    }
    partition.commit_all();
    assert_eq!(partition.producers.committed.producers.len(), PRODUCERS_MAX);
    assert_eq!(partition.send(3, 0, 1, 1), refused(ErrorCode::ProducerExpired));
    partition.send(2, 0, 2, 1).expect("known");
    partition.write(1, 0, 1).expect("known");
}

/// Random producers, plain and transactional, ends that repeat and come late, commits that lag, leaders that change: what a
/// replica makes of the committed log, from any checkpoint on, is what the leader knows; and the last stable offset never
/// goes back.
#[test]
fn a_replay_equals_the_live_state() {
    for seed in 0..60 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut partition = Partition::default();
        let mut follower = Producers::default();
        let mut log: Vec<InFlight> = Vec::new();
        let (mut stable, mut ended) = (0, 0);
        for _ in 0..400 {
            let (id, epoch) = (random.random_range(1..5_i64), random.random_range(0..4_i16));
            let first = random.random_range(0..4);
            match random.random_range(0..10) {
                0..=4 => drop(partition.write(id, epoch, first)),
                5 => drop(partition.send(id + 10, epoch, first, 2)),
                6 | 7 => ended += i32::from(partition.end(id, epoch + 1, random.random()).is_ok()),
                8 => {
                    let count = random.random_range(0..=partition.in_flight.len());
                    log.extend(partition.in_flight.iter().take(count).cloned());
                    partition.commit(count);
                }
                _ => {
                    // Another leader, or the same again: what was in flight is lost.
                    partition.producers.step_down();
                    for lost in partition.in_flight.drain(..) {
                        partition.end = partition.end.min(lost.offset.get());
                        partition.index = partition.index.min(lost.index.get() - 1);
                    }
                }
            }
            assert!(partition.stable() >= stable, "seed {seed}: {} after {stable}", partition.stable());
            stable = partition.stable();
            if random.random_range(0..20) == 0 {
                for entry in log.drain(..) {
                    follower.committed(&entry.entry());
                }
                assert_eq!(follower.committed, partition.producers.committed, "seed {seed}");
                let checkpoint = follower.checkpoint();
                follower = Producers::default();
                follower.restore(&checkpoint).expect("own bytes");
                assert_eq!(follower.checkpoint(), checkpoint);
            }
        }
        assert!(ended > 0, "seed {seed} ended nothing");
    }
}

#[test]
fn what_is_remembered_of_aborted_transactions_is_bounded() {
    let mut partition = Partition::default();
    let count = ABORTED_MAX as i64;
    for at in 0..count {
        let (first, last) = (Offset::new(2 * at), Offset::new(2 * at + 1));
        let aborted = transactions::Aborted { producer: ProducerId::new(at), first, last, stable: last.next() };
        partition.producers.committed.transactions.push_aborted(aborted);
    }
    (partition.end, partition.high_watermark) = (2 * count, 2 * count);
    assert!(partition.producers.checkpoint().len() < 64 << 20);
    assert_eq!(partition.write(7, 0, 0), refused(ErrorCode::Overloaded));
    assert_eq!(partition.send(8, 0, 0, 1), Ok(2 * count), "what is written plainly is taken");
    partition.producers.committed.transactions.prune(Offset::new(2));
    assert_eq!(partition.write(7, 0, 0), Ok(2 * count + 1), "the log start has passed one");
}
