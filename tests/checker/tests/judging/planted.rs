//! One of each anomaly, planted into a random legal history: it is found, and nothing else is.

use std::time::Duration;

use flowstone_checker::{
    History, Isolation, Kind, LogId, Mark, Observed, SenderKind, TransactionEnd, ValueId, Verdict, View, payload,
};
use flowstone_protocol::Offset;

use crate::world::World;

const NOW: Duration = Duration::from_secs(3600);

fn at(offset: i64) -> Offset {
    Offset::new(offset)
}

/// A history in which something more happens at the end of a log.
struct Scene {
    history: History,
    log: LogId,
    other_log: LogId,
    /// Where the log ends.
    end: i64,
}

impl Scene {
    /// Sent and acknowledged, not read yet.
    fn acknowledged(&mut self, offset: i64) -> ValueId {
        let sender = self.history.sender(SenderKind::IDEMPOTENT);
        let value = self.history.send(sender, self.log, NOW);
        self.history.acknowledged(value, at(offset), NOW);
        value
    }

    /// A reader of its own is given these, in this order.
    fn read(&mut self, records: &[(i64, ValueId)]) {
        self.read_as(Isolation::ReadUncommitted, records);
    }

    fn read_as(&mut self, isolation: Isolation, records: &[(i64, ValueId)]) {
        let reader = self.history.reader(isolation);
        self.history.assigned(reader, self.log, at(records[0].0));
        for (offset, value) in records {
            self.history.read(reader, self.log, at(*offset), Observed::Value(*value));
        }
    }
}

/// Plants into many histories, and expects this kind, so often, alone.
#[track_caller]
fn finds(kind: Kind, times: u64, plant: impl Fn(&mut Scene)) {
    for seed in 0..25 {
        let mut world = World::new(seed);
        for _ in 0..seed * 20 {
            world.step();
        }
        world.heal_and_read_all();
        let ((log, end), (other_log, _)) = (world.log(1), world.log(2));
        let mut scene = Scene { history: world.history, log, other_log, end };
        plant(&mut scene);
        let Verdict { counts, anomalies, .. } = scene.history.judge();
        assert_eq!(counts.into_iter().collect::<Vec<_>>(), [(kind, times)], "seed {seed}: {anomalies:#?}");
        assert_eq!(anomalies.len() as u64, times);
        for anomaly in &anomalies {
            assert_eq!((&*anomaly.topic, anomaly.partition.get(), anomaly.kind), ("orders", 1, kind));
            assert!(!anomaly.detail.is_empty() && anomaly.to_string().starts_with(kind.as_str()));
        }
    }
}

#[test]
fn one_offset_with_two_values() {
    finds(Kind::InconsistentOffsets, 1, |scene| {
        let value = scene.acknowledged(scene.end);
        scene.read(&[(scene.end, value)]);
        let sender = scene.history.sender(SenderKind::PLAIN);
        let other = scene.history.send(sender, scene.log, NOW);
        scene.read(&[(scene.end, other)]);
    });
}

#[test]
fn one_value_at_two_offsets() {
    finds(Kind::Duplicate, 1, |scene| {
        let value = scene.acknowledged(scene.end);
        scene.read(&[(scene.end, value), (scene.end + 1, value)]);
        // Seen again there, it is no further one.
        scene.read(&[(scene.end, value), (scene.end + 1, value)]);
    });
}

#[test]
fn a_value_that_a_reader_passed_and_nobody_read() {
    finds(Kind::LostWrite, 1, |scene| {
        let before = scene.acknowledged(scene.end);
        scene.acknowledged(scene.end + 1);
        let behind = scene.acknowledged(scene.end + 2);
        scene.read(&[(scene.end, before), (scene.end + 2, behind)]);
    });
}

#[test]
fn values_at_the_end_that_the_last_reading_did_not_find() {
    finds(Kind::Unseen, 2, |scene| {
        scene.acknowledged(scene.end);
        scene.acknowledged(scene.end + 1);
    });
}

#[test]
fn a_send_that_failed_is_read() {
    finds(Kind::AbortedRead, 1, |scene| {
        let sender = scene.history.sender(SenderKind::IDEMPOTENT);
        let value = scene.history.send(sender, scene.log, NOW);
        scene.history.failed(value);
        scene.read(&[(scene.end, value)]);
    });
}

/// A transaction with two values, acknowledged at the end of the log.
fn transaction(scene: &mut Scene) -> (flowstone_checker::TransactionId, [(i64, ValueId); 2]) {
    let sender = scene.history.sender(SenderKind::IDEMPOTENT);
    let id = scene.history.transaction();
    let values = [0, 1].map(|number| {
        let value = scene.history.send_in(id, sender, scene.log, NOW);
        scene.history.acknowledged(value, at(scene.end + number), NOW);
        (scene.end + number, value)
    });
    (id, values)
}

#[test]
fn an_aborted_transaction_is_given_to_a_committed_reader() {
    finds(Kind::AbortedRead, 2, |scene| {
        let (id, values) = transaction(scene);
        scene.history.committing(id);
        scene.history.transaction_ended(id, TransactionEnd::Aborted);
        scene.read_as(Isolation::ReadUncommitted, &values);
        scene.read_as(Isolation::ReadCommitted, &values);
    });
}

#[test]
fn a_transaction_is_read_before_its_commit() {
    finds(Kind::PreCommittedRead, 2, |scene| {
        let (id, values) = transaction(scene);
        scene.read_as(Isolation::ReadCommitted, &values);
        scene.history.committing(id);
        scene.history.transaction_ended(id, TransactionEnd::Committed);
    });
}

#[test]
fn half_a_transaction() {
    for end in [TransactionEnd::Committed, TransactionEnd::Unknown] {
        finds(Kind::TornTransaction, 1, |scene| {
            let (id, [first, second]) = transaction(scene);
            scene.history.committing(id);
            scene.history.transaction_ended(id, end);
            let reader = scene.history.reader(Isolation::ReadCommitted);
            scene.history.assigned(reader, scene.log, at(second.0));
            scene.history.read(reader, scene.log, at(second.0), Observed::Value(second.1));
            // It began behind the first: only one that passed it can say that it is missing.
            scene.history.assigned(reader, scene.log, at(first.0));
            scene.history.read_past(reader, scene.log, at(first.0 + 1));
            scene.history.read(reader, scene.log, at(second.0), Observed::Value(second.1));
        });
    }
}

#[test]
fn a_reader_jumps_over_a_value() {
    finds(Kind::Skip, 1, |scene| {
        let values = [0, 1, 2].map(|number| (scene.end + number, scene.acknowledged(scene.end + number)));
        scene.read(&[values[0], values[2]]);
        scene.read(&values);
    });
}

#[test]
fn a_reader_goes_back_or_is_given_a_value_again() {
    for again in [0, 1, 2] {
        finds(Kind::NonMonotonicRead, 1, |scene| {
            let values = [0, 1, 2].map(|number| (scene.end + number, scene.acknowledged(scene.end + number)));
            scene.read(&[&values[..], &values[again..]].concat());
        });
    }
}

#[test]
fn a_later_value_lies_before_an_earlier_one() {
    finds(Kind::NonMonotonicSend, 1, |scene| {
        let sender = scene.history.sender(SenderKind::IDEMPOTENT);
        let values = [0, 1].map(|_| scene.history.send(sender, scene.log, NOW));
        // The first of them was given up; it came late.
        scene.history.unknown(values[0]);
        scene.history.acknowledged(values[1], at(scene.end), NOW);
        scene.read(&[(scene.end, values[1]), (scene.end + 1, values[0])]);
    });
}

#[test]
fn marks_go_back() {
    let group_marks = |scene: &mut Scene| Mark::Committed(scene.history.group());
    finds(Kind::Regression, 3, |scene| {
        for mark in [Mark::HighWatermark, Mark::LogStart, group_marks(scene)] {
            for (told, view) in [(scene.end + 10, View::Fresh), (scene.end + 9, View::Fresh)] {
                let asked = scene.history.ask(scene.log, mark, view);
                scene.history.told(asked, at(told));
            }
        }
    });
}

#[test]
fn a_stale_mark_is_told_as_fresh() {
    // Below what was acknowledged, and below what was read.
    finds(Kind::Regression, 2, |scene| {
        let value = scene.acknowledged(scene.end);
        let asked = scene.history.ask(scene.log, Mark::HighWatermark, View::Fresh);
        scene.history.told(asked, at(scene.end));
        scene.read_as(Isolation::ReadCommitted, &[(scene.end, value)]);
        let asked = scene.history.ask(scene.log, Mark::LastStableOffset, View::Fresh);
        scene.history.told(asked, at(scene.end));
    });
    // Within one session, of a replica that may be behind.
    finds(Kind::Regression, 1, |scene| {
        let observer = scene.history.observer();
        for told in [scene.end - 1, scene.end, scene.end - 1] {
            let asked = scene.history.ask(scene.log, Mark::HighWatermark, View::Session(observer));
            scene.history.told(asked, at(told));
        }
    });
}

#[test]
fn what_is_sent_lands_before_what_was_there() {
    finds(Kind::Regression, 1, |scene| {
        let before = scene.acknowledged(scene.end + 1);
        let behind = scene.acknowledged(scene.end);
        scene.read(&[(scene.end, behind), (scene.end + 1, before)]);
    });
}

#[test]
fn a_mark_that_was_set_back_on_purpose_begins_anew() {
    finds(Kind::Regression, 1, |scene| {
        let mark = Mark::Committed(scene.history.group());
        for (number, told) in [10, 4, 3].into_iter().enumerate() {
            if number == 1 {
                scene.history.set_back(scene.log, mark);
            }
            let asked = scene.history.ask(scene.log, mark, View::Fresh);
            scene.history.told(asked, at(told));
        }
    });
}

#[test]
fn what_the_workload_found_is_in_the_verdict() {
    for kind in [Kind::Stuck, Kind::ReplayDiffers, Kind::ZombieAccepted] {
        finds(kind, 1, |scene| scene.history.report(kind, scene.log, Some(at(3)), "no progress for a minute"));
    }
}

#[test]
fn what_a_fenced_sender_sends_is_taken() {
    finds(Kind::ZombieAccepted, 2, |scene| {
        let sender = scene.history.sender(SenderKind::IDEMPOTENT);
        let before = scene.history.send(sender, scene.log, NOW);
        scene.history.fenced(sender);
        let behind = [0, 1].map(|_| scene.history.send(sender, scene.log, NOW));
        // What was under way may be told late.
        scene.history.acknowledged(before, at(scene.end), NOW);
        scene.history.acknowledged(behind[0], at(scene.end + 1), NOW);
        scene.read(&[(scene.end, before), (scene.end + 1, behind[0]), (scene.end + 2, behind[1])]);
    });
}

#[test]
fn a_value_lies_elsewhere_than_acknowledged() {
    // Nothing there; something else there.
    finds(Kind::WrongAck, 1, |scene| {
        let value = scene.acknowledged(scene.end + 5);
        scene.read(&[(scene.end, value)]);
    });
    finds(Kind::WrongAck, 1, |scene| {
        let plain = scene.history.sender(SenderKind::PLAIN);
        let values = [0, 1].map(|_| scene.history.send(plain, scene.log, NOW));
        scene.history.acknowledged(values[0], at(scene.end + 1), NOW);
        scene.read(&[(scene.end, values[0]), (scene.end + 1, values[1])]);
    });
}

#[test]
fn values_that_nobody_wrote() {
    finds(Kind::Phantom, 3, |scene| {
        scene.read(&[(scene.end, ValueId::new(1 << 50))]);
        let sender = scene.history.sender(SenderKind::IDEMPOTENT);
        let elsewhere = scene.history.send(sender, scene.other_log, NOW);
        scene.history.unknown(elsewhere);
        scene.read(&[(scene.end + 1, elsewhere)]);
        // A byte was changed on the way.
        let (run, value) = (payload::Run(4), scene.history.send(sender, scene.log, NOW));
        let mut bytes = run.encode(value, 100);
        bytes[70] ^= 1;
        let Err(payload::NotAValue::Damaged(what)) = run.decode(&bytes) else { panic!("the damage is not seen") };
        let reader = scene.history.reader(Isolation::ReadUncommitted);
        scene.history.assigned(reader, scene.log, at(scene.end + 2));
        scene.history.read(reader, scene.log, at(scene.end + 2), Observed::Phantom(what));
    });
}

#[test]
fn what_nobody_looked_at_is_not_judged() {
    let mut history = History::new();
    let log = history.log("orders", flowstone_protocol::PartitionId::new(0));
    let sender = history.sender(SenderKind::IDEMPOTENT);
    let value = history.send(sender, log, NOW);
    history.acknowledged(value, at(7), NOW);
    assert!(history.judge().is_clean());
    history.fully_read(log);
    assert_eq!(history.judge().counts.into_keys().collect::<Vec<_>>(), [Kind::Unseen]);
    // Deleted as it should be.
    history.trimmed(log, at(8));
    assert!(history.judge().is_clean());
}

#[test]
fn many_anomalies_are_counted_and_the_first_are_kept() {
    let mut history = History::new();
    let log = history.log("orders", flowstone_protocol::PartitionId::new(0));
    let sender = history.sender(SenderKind::IDEMPOTENT);
    for offset in 0..1_000 {
        let value = history.send(sender, log, NOW);
        history.acknowledged(value, at(offset), NOW);
    }
    history.fully_read(log);
    let verdict = history.judge();
    assert_eq!((verdict.counts[&Kind::Unseen], verdict.anomalies.len()), (1_000, Verdict::KEPT_MAX));
}

#[test]
fn the_longest_gap_is_that_of_the_partition_that_waited_longest() {
    let mut history = History::new();
    let logs = [0, 1].map(|number| history.log("orders", flowstone_protocol::PartitionId::new(number)));
    let sender = history.sender(SenderKind::IDEMPOTENT);
    let ms = Duration::from_millis;
    let acknowledge = |history: &mut History, log, offset, from, to| {
        let value = history.send(sender, log, ms(from));
        history.acknowledged(value, at(offset), ms(to));
    };
    acknowledge(&mut history, logs[0], 0, 100, 110);
    // Nothing was under way: that is no gap.
    acknowledge(&mut history, logs[0], 1, 5_000, 5_020);
    assert_eq!(history.judge().longest_gap, ms(20));
    // One is given up, the next is taken: the gap lasts from the first.
    let value = history.send(sender, logs[1], ms(6_000));
    history.unknown(value);
    acknowledge(&mut history, logs[1], 0, 6_700, 6_900);
    acknowledge(&mut history, logs[0], 2, 6_100, 6_101);
    assert_eq!(history.judge().longest_gap, ms(900));
    history.send(sender, logs[1], ms(7_000));
    history.sending_ended(ms(9_000));
    assert_eq!(history.judge().longest_gap, ms(2_000));
}
