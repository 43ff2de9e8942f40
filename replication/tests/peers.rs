//! What others say, and what is pulled from them, through one replica's step.

mod ledger;
mod shell;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use flowstone_protocol::{ControlType, ErrorCode, RaftIndex, ReplicaId, Term};
use flowstone_replication::effects::Pulled;
use flowstone_replication::{Event, LogConfig, MembershipChange, PeerBody, PeerMessage};
use flowstone_storage::{EntryBody, LogEntry, SimDisk};
use ledger::{Ledger, batch};
use shell::{Shell, answered, config, create, reply};

const US: u64 = 11;
const LEADER: u64 = 22;
const CANDIDATE: u64 = 33;

struct Place {
    disk: SimDisk,
    shell: Shell<Ledger>,
}

const DIR: &str = "/data/replica";

fn one_of(voters: &[u64], log: LogConfig) -> Place {
    let disk = SimDisk::new(1);
    let dir = PathBuf::from(DIR);
    create(&disk.shared(), &dir, US, voters);
    let shell = Shell::open(&disk.shared(), &dir, log, None, Ledger::default(), config(US)).unwrap();
    Place { disk, shell }
}

fn one_of_three() -> Place {
    one_of(&[US, LEADER, CANDIDATE], LogConfig::default())
}

fn message(from: u64, term: u64, body: PeerBody) -> Event<Ledger> {
    let (from, to) = (ReplicaId::new(from), ReplicaId::new(US));
    Event::Peer(PeerMessage { from, to, term: Term::new(term), body })
}

fn no_op() -> EntryBody {
    EntryBody::Control { ctype: ControlType::NoOp, payload: Bytes::new() }
}

fn records(index: u64, records: i32, bytes: usize) -> EntryBody {
    EntryBody::Batch(batch(1, index as i32, records, bytes).0)
}

/// One entry of the leader's, in term 2, which begins with entry 2.
fn append(index: u64, body: EntryBody, commit: u64) -> Event<Ledger> {
    message(
        LEADER,
        2,
        PeerBody::Append {
            previous_index: RaftIndex::new(index - 1),
            previous_term: Term::new(if index == 2 { 1 } else { 2 }),
            commit: RaftIndex::new(commit),
            entries: vec![LogEntry { index: RaftIndex::new(index), term: Term::new(2), body }],
        },
    )
}

/// A log of term 2 with entries of so many records each behind its no-op, and all of it known to be committed.
fn with_entries(counts: &[i32]) -> Place {
    let mut place = one_of_three();
    place.shell.step([append(2, no_op(), 1)]);
    for (at, &count) in counts.iter().enumerate() {
        let index = at as u64 + 3;
        place.shell.step([append(index, records(index, count, 50), index)]);
    }
    place
}

/// Entries from `first` up to the last as this one has them stored.
fn range(place: &Place, first: u64) -> Pulled {
    let log = place.shell.replica.log();
    let (first, last) = (RaftIndex::new(first), log.last_index());
    let range = log.range(first, last, 1 << 20).unwrap().run().unwrap();
    Pulled { first, next: range.next, compared: None, bytes: range.bytes }
}

#[test]
fn what_is_pulled_from_others_is_no_sign_that_the_leader_lives() {
    let source = with_entries(&[1; 8]);
    let mut place = with_entries(&[1; 2]);
    place.shell.step([Event::LeaderGone]);
    place.shell.step([Event::Pulled(range(&source, 5))]);
    assert_eq!(place.shell.replica.log().last_index(), RaftIndex::new(10), "it is taken all the same");
    place.shell.sent.clear();
    let vote = PeerBody::Vote {
        pre: true,
        last_index: RaftIndex::new(12),
        last_term: Term::new(2),
        commit: RaftIndex::new(10),
        commit_term: Term::new(2),
        transfer: false,
    };
    place.shell.step([message(CANDIDATE, 3, vote)]);
    let granted = place.shell.sent.iter().any(|it| matches!(it.body, PeerBody::VoteResponse { reject: false, .. }));
    assert!(granted, "{:?}", place.shell.sent);
}

#[test]
fn what_is_pulled_must_carry_the_offsets_that_it_gets() {
    // Its entry 3 holds more records than ours: what follows stands at other offsets, whatever the terms say.
    let source = with_entries(&[5, 1, 1, 1]);
    let mut place = with_entries(&[1]);
    place.shell.step([append(4, records(4, 1, 50), 3)]);
    let end = place.shell.replica.log().end_offset();
    place.shell.step([Event::Pulled(range(&source, 4))]);
    assert_eq!(place.shell.replica.log().end_offset(), end, "nothing of it is taken");
    assert!(place.shell.ended.is_none());
}

#[test]
fn entries_that_are_refused_take_no_room() {
    let log = LogConfig { segment_bytes: 64 << 10, zero_ahead_bytes: 0, ..LogConfig::default() };
    let mut place = one_of(&[US, LEADER, CANDIDATE], log);
    place.shell.step([append(2, no_op(), 1)]);
    for index in 50..60 {
        place.shell.step([append(index, records(index, 1, 20_000), 1)]);
    }
    let names = place.disk.shared().read_dir(Path::new(DIR)).unwrap();
    assert_eq!(names.iter().filter(|name| name.ends_with(".log")).count(), 1, "{names:?}");
    assert_eq!(place.shell.replica.log().last_index(), RaftIndex::new(2));
}

/// Elected in `term` by `LEADER`'s vote, with its no-op, entry `index`, committed.
fn elected(place: &mut Place, term: u64, index: u64, begin: Event<Ledger>) {
    place.shell.step([begin]);
    for pre in [true, false] {
        let body = PeerBody::VoteResponse { pre, reject: false, commit: RaftIndex::new(1), commit_term: Term::new(1) };
        place.shell.step([message(LEADER, term, body)]);
    }
    place.shell.step([message(LEADER, term, has_up_to(index))]);
}

fn has_up_to(index: u64) -> PeerBody {
    PeerBody::AppendResponse {
        index: RaftIndex::new(index),
        commit: RaftIndex::new(1),
        reject: false,
        reject_hint: RaftIndex::new(0),
        hint_term: Term::new(0),
        request_snapshot: RaftIndex::new(0),
    }
}

#[test]
fn leadership_is_not_handed_over_in_the_middle_of_a_change_of_members() {
    let mut place = one_of_three();
    elected(&mut place, 2, 2, Event::Campaign);
    assert!(place.shell.replica.status().is_ready(), "{:?}", place.shell.replica.status());
    let (removed, _removed) = reply();
    let change = MembershipChange::Remove(ReplicaId::new(CANDIDATE));
    place.shell.step([Event::ChangeMembership { change, reply: removed }]);
    let (handed, answer) = reply();
    place.shell.step([Event::TransferLeader { to: Some(ReplicaId::new(CANDIDATE)), reply: handed }]);
    let error = answered(answer).unwrap_err();
    assert_eq!(error.code, ErrorCode::Overloaded, "{error}");
    // Once that is done, whoever is left may take over.
    place.shell.step([message(LEADER, 2, has_up_to(3))]);
    let (handed, _answer) = reply();
    place.shell.step([Event::TransferLeader { to: Some(ReplicaId::new(LEADER)), reply: handed }]);
    let told = place.shell.sent.iter().any(|it| matches!(it.body, PeerBody::TimeoutNow));
    assert!(told, "{:?}", place.shell.sent);
}

#[test]
fn a_leader_that_is_removed_does_not_believe_to_be_alone() {
    let mut place = one_of(&[US, LEADER], LogConfig::default());
    let removed = MembershipChange::Remove(ReplicaId::new(US));
    place.shell.step([append(2, no_op(), 1)]);
    place.shell.step([append(3, EntryBody::Control { ctype: ControlType::Membership, payload: removed.encode() }, 2)]);
    elected(&mut place, 3, 4, message(LEADER, 2, PeerBody::TimeoutNow));
    let members = place.shell.replica.membership().voters.clone();
    assert_eq!(members, [ReplicaId::new(LEADER)], "it leads, and applies its own removal");
    assert!(place.shell.replica.wakes_in().is_some(), "its clock goes on");
}

#[test]
fn every_replica_of_a_new_group_opens_whatever_its_election_timeout() {
    for voters in 1..=9 {
        let voters: Vec<u64> = (0..voters).map(|number| US + number).collect();
        for seed in 0..40 {
            let disk = SimDisk::new(1);
            let dir = PathBuf::from(DIR);
            create(&disk.shared(), &dir, US, &voters);
            for stands_first in [true, false] {
                let config = flowstone_replication::ReplicaConfig { seed, stands_first, ..config(US) };
                let log = LogConfig::default();
                drop(Shell::open(&disk.shared(), &dir, log, None, Ledger::default(), config).unwrap());
            }
        }
    }
}
