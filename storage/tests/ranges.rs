//! Ranges of stored entries: what they hold, and what becomes of a ticket while its log goes on.

mod source;

use bytes::Bytes;
use flowstone_protocol::{Compression, ControlType, Offset, RaftIndex, RecordBatchBuilder, Term};
use flowstone_storage::{EntryBody, Log, LogEntry, ReadError, StorageError};
use source::{NOW, Random, append_some, batches, created, filled, range, settle, trim};

#[test]
fn ranges_of_any_size_give_the_stored_batches_back_to_back() {
    let (_sim, mut log) = filled(1, 3_000, 5, 120);
    let last = log.last_index();
    let all = batches(&mut log, RaftIndex::new(2), last);
    for max_bytes in [1, 700, 5_000, 1 << 20] {
        let mut at = RaftIndex::new(2);
        while at <= last {
            let found = range(&log, at, last, max_bytes).expect("readable");
            let (from, to) = ((at.get() - 2) as usize, (found.next.get() - 2) as usize);
            assert_eq!(found.first, at);
            assert_eq!(found.bytes, all[from..to].concat(), "from {at} in {max_bytes}");
            assert!(to == from + 1 || found.bytes.len() <= max_bytes, "{} bytes of {max_bytes}", found.bytes.len());
            at = found.next;
        }
        assert_eq!(at, last.next());
    }
    // Up to an entry, and no further.
    let found = range(&log, RaftIndex::new(3), RaftIndex::new(5), 1 << 20).expect("readable");
    assert_eq!(found.bytes, all[1..4].concat());
}

#[test]
fn entries_of_a_range_are_those_that_were_appended() {
    let (_sim, mut log) = filled(1, 3_000, 6, 60);
    let last = log.last_index();
    let mut at = RaftIndex::new(2);
    while at <= last {
        let entries = log.range(at, last, 2_000).expect("held").run_entries().expect("readable");
        for entry in entries {
            assert_eq!(entry, log.entry(at).expect("stored"));
            at = at.next();
        }
    }
}

#[test]
fn what_is_not_held_is_an_error_that_says_what_is() {
    let (_sim, mut log) = filled(1, 2_000, 7, 100);
    let middle = log.entry_meta(RaftIndex::new(60)).expect("held").base_offset;
    trim(&mut log, middle);
    let (first, last) = (log.first_index(), log.last_index());
    assert!(first > RaftIndex::new(2), "something was deleted");
    assert_eq!(log.first_offset(), log.entry_meta(first).expect("held").base_offset);
    for (from, to) in [(RaftIndex::new(2), last), (first, last.next()), (last, first)] {
        match log.range(from, to, 100) {
            Err(StorageError::NoEntry { first: from, last: to, .. }) => assert_eq!((from, to), (first, last)),
            other => panic!("{from} to {to}: {other:?}"),
        }
    }
    range(&log, first, last, 100).expect("what is held is given");
}

#[test]
fn appended_to_another_log_they_make_the_same_log() {
    let (_sim, mut log) = filled(1, 3_000, 8, 150);
    let last = log.last_index();
    let (_other_sim, mut copy) = created(2, 1_000);
    while copy.last_index() < last {
        let found = range(&log, copy.last_index().next(), last, 4_000).expect("readable");
        let appended = copy.append_pulled(found.bytes, NOW).expect("they belong there");
        assert_eq!(appended.last().map(|entry| entry.index.next()), Some(found.next));
        settle(&mut copy);
    }
    assert_eq!(batches(&mut copy, RaftIndex::new(2), last), batches(&mut log, RaftIndex::new(2), last));
    assert_eq!(copy.epochs(), log.epochs());
    assert_eq!(copy.end_offset(), log.end_offset());
}

#[test]
fn what_does_not_belong_there_is_refused_and_nothing_is_written() {
    let (_sim, log) = filled(1, 100_000, 9, 40);
    let (_other_sim, mut copy) = created(2, 100_000);
    let whole = range(&log, RaftIndex::new(2), log.last_index(), 1 << 20).expect("readable").bytes;
    let later = range(&log, RaftIndex::new(3), log.last_index(), 1 << 20).expect("readable").bytes;
    let mut wrong = vec![
        ("other entries", later),
        ("a piece of a batch", whole.slice(..whole.len() - 1)),
        ("less than a header", whole.slice(..20)),
        ("nothing", Bytes::new()),
        ("zeros behind", [&whole[..], &[0; 100]].concat().into()),
        ("the same twice", [&whole[..], &whole[..]].concat().into()),
    ];
    for at in (0..whole.len()).step_by(97) {
        let mut flipped = whole.to_vec();
        flipped[at] ^= 0x10;
        wrong.push(("a flipped bit", flipped.into()));
    }
    for (what, bytes) in wrong {
        match copy.append_pulled(bytes, NOW) {
            Err(StorageError::Refused { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
        assert_eq!((copy.last_index(), copy.end_offset()), (RaftIndex::new(1), Offset::ZERO), "{what}");
        assert!(!copy.is_poisoned(), "{what}");
    }
    copy.append_pulled(whole, NOW).expect("the right ones are taken after all that");
}

/// A log of a no-op, a batch of each of these many records, and a control batch.
fn log_of(replica: u64, records: &[usize]) -> (flowstone_storage::SimDisk, Log) {
    let (sim, mut log) = created(replica, 100_000);
    let no_op = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
    let batch = |count: &usize| {
        let mut builder = RecordBatchBuilder::new(Compression::None);
        (0..*count).for_each(|_| builder.append(NOW, None, Some(b"value"), []).expect("a small record"));
        EntryBody::Batch(builder.build())
    };
    let expiry = EntryBody::Control { ctype: ControlType::ProducerExpiry, payload: Bytes::new() };
    for body in [no_op].into_iter().chain(records.iter().map(batch)).chain([expiry]) {
        log.append(&[LogEntry { index: log.last_index().next(), term: Term::new(2), body }], NOW).expect("appended");
    }
    settle(&mut log);
    (sim, log)
}

#[test]
fn control_batches_of_another_place_are_refused() {
    let (_sim, log) = log_of(1, &[1, 1, 1]);
    let control = range(&log, RaftIndex::new(6), RaftIndex::new(6), 1 << 20).expect("readable").bytes;
    // The same offset under another index; the same index at another offset.
    for (records, what) in [(&[3][..], "another entry"), (&[1, 1, 9], "another offset")] {
        let (_other_sim, mut other) = log_of(2, records);
        let last = other.last_index();
        let before = batches(&mut other, RaftIndex::new(2), RaftIndex::new(last.get() - 1)).concat();
        let (_copy_sim, mut copy) = created(3, 100_000);
        copy.append_pulled(before.into(), NOW).expect("they belong there");
        match copy.append_pulled(control.clone(), NOW) {
            Err(StorageError::Refused { .. }) => assert_eq!(copy.last_index().next(), last, "{what}"),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
fn a_ticket_never_gives_what_took_the_place_of_its_entries() {
    let (_sim, mut log) = created(1, 100_000);
    append_some(&mut log, &mut Random(3), 10);
    settle(&mut log);
    append_some(&mut log, &mut Random(4), 10);
    let (first, last) = (log.committed_index().next(), log.last_index());
    let ticket = |log: &Log| log.range(first, last, 1 << 20).expect("held");
    let (cut, replaced) = (ticket(&log), ticket(&log));
    log.truncate_from(first).expect("cut");
    match cut.run() {
        Err(ReadError::Corrupt { .. }) => {}
        other => panic!("of a log that was cut: {other:?}"),
    }
    append_some(&mut log, &mut Random(5), 40);
    match replaced.run() {
        Err(ReadError::Corrupt { .. }) => {}
        other => panic!("of a log that went on otherwise: {other:?}"),
    }
}

#[test]
fn a_ticket_never_gives_an_entry_of_another_term() {
    let (_sim, mut log) = created(1, 100_000);
    append_some(&mut log, &mut Random(3), 10);
    settle(&mut log);
    let first = log.committed_index().next();
    let ahead = |log: &Log, terms| Term::new(log.last_term().get() + terms);
    let no_op = |term| {
        let body = EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() };
        [LogEntry { index: first, term, body }]
    };
    let (one, other) = (ahead(&log, 1), ahead(&log, 2));
    log.append(&no_op(one), NOW).expect("appended");
    let ticket = log.range(first, first, 1 << 20).expect("held");
    log.truncate_from(first).expect("cut");
    // Of the same length, in the same place, whole.
    log.append(&no_op(other), NOW).expect("appended");
    match ticket.run() {
        Err(ReadError::Corrupt { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn rot_is_not_passed_on() {
    let (sim, mut log) = filled(1, 2_000, 11, 100);
    let segment = std::path::Path::new(source::DIR).join("00000000000000000000-00000000000000000002.log");
    sim.flip_bit(&segment, 300, 2);
    let bad = (2..).map(RaftIndex::new).find(|index| log.stored_batch(*index).is_err()).expect("a rotten one");
    match range(&log, RaftIndex::new(2), bad, 1 << 20) {
        Err(ReadError::Corrupt { position, .. }) => assert!(position <= 300, "where the batch begins: {position}"),
        other => panic!("{other:?}"),
    }
    range(&log, bad.next(), log.last_index(), 500).expect("the rest is given");
}
