//! How far a log is flushed is noted beside term and vote: one must never take the other back.

mod ledger;
mod shell;

use std::path::PathBuf;

use flowstone_protocol::{RaftIndex, ReplicaId, Term};
use flowstone_replication::{Event, LogConfig, PeerBody, PeerMessage};
use flowstone_storage::{EntryBody, HardState, LogEntry, SimDisk};
use ledger::{Ledger, batch};
use shell::{Shell, config, create};

const US: u64 = 11;
const LEADER: u64 = 22;
const CANDIDATE: u64 = 33;

/// A follower of `LEADER` in term 2, with three entries written and their flush held back.
fn follower() -> Shell<Ledger> {
    let disk = SimDisk::new(1);
    let dir = PathBuf::from("/data/replica");
    create(&disk.shared(), &dir, US, &[US, LEADER, CANDIDATE]);
    let mut shell =
        Shell::open(&disk.shared(), &dir, LogConfig::default(), None, Ledger::default(), config(US)).unwrap();
    shell.holds_flushes = true;
    shell.step([append(2, 2, 2)]);
    shell.step([append(3, 2, 2), append(4, 2, 2)]);
    // The first entry's flush is the one in flight.
    let first = shell.run_flush().expect("a flush was ordered");
    shell.step([first]);
    shell
}

fn message(from: u64, term: u64, body: PeerBody) -> Event<Ledger> {
    let (from, to) = (ReplicaId::new(from), ReplicaId::new(US));
    Event::Peer(PeerMessage { from, to, term: Term::new(term), body })
}

/// One entry; the first of a term is its no-op.
fn append(index: u64, term: u64, previous_term: u64) -> Event<Ledger> {
    let previous_term = Term::new(if index == 2 { 1 } else { previous_term });
    let body = if index == 2 || term != previous_term.get() {
        EntryBody::Control { ctype: flowstone_protocol::ControlType::NoOp, payload: bytes::Bytes::new() }
    } else {
        EntryBody::Batch(batch(1, index as i32, 1, 50).0)
    };
    let entry = LogEntry { index: RaftIndex::new(index), term: Term::new(term), body };
    message(
        if term == 2 { LEADER } else { CANDIDATE },
        term,
        PeerBody::Append {
            previous_index: RaftIndex::new(index - 1),
            previous_term,
            commit: RaftIndex::new(1),
            entries: vec![entry],
        },
    )
}

fn vote(term: u64) -> Event<Ledger> {
    message(
        CANDIDATE,
        term,
        PeerBody::Vote {
            pre: false,
            last_index: RaftIndex::new(9),
            last_term: Term::new(2),
            commit: RaftIndex::new(1),
            commit_term: Term::new(1),
            transfer: true,
        },
    )
}

/// What a stripe's file says after a step: the hard state first, the mark after it; the last one counts.
fn written(shell: &mut Shell<Ledger>, events: impl IntoIterator<Item = Event<Ledger>>) -> Option<HardState> {
    let fx = shell.replica.step(events, shell.now);
    let says = fx.flushed.or(fx.hard_state.map(|(_, state)| state));
    shell.perform(fx);
    says
}

#[test]
fn a_mark_does_not_take_back_a_vote_of_the_same_step() {
    let mut shell = follower();
    let flushed = shell.run_flush().expect("the next flush was ordered");
    let says = written(&mut shell, [flushed, vote(3)]).unwrap();
    assert_eq!((says.term, says.vote), (Term::new(3), Some(ReplicaId::new(CANDIDATE))));
    assert_eq!(says.flushed, RaftIndex::new(4), "and the mark is not lost either");
}

#[test]
fn a_mark_does_not_answer_for_what_the_same_step_is_about_to_cut() {
    let mut shell = follower();
    let flushed = shell.run_flush().expect("the next flush was ordered");
    let says = written(&mut shell, [flushed, append(4, 3, 2)]).unwrap();
    assert_eq!(says.flushed, RaftIndex::new(3), "entry 4 is about to be replaced");
}
