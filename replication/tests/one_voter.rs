//! One replica alone in its group, step by step, on a real disk.

mod ledger;
mod shell;

use std::path::PathBuf;
use std::sync::Arc;

use flowstone_protocol::{Error, ErrorCode, LeaderEpoch, Offset, Timestamp};
use flowstone_replication::{
    Acks, Ended, Event, FlushMode, Health, LogConfig, MembershipChange, OffsetQuery, PeerBody, PeerMessage,
    ReadRequest, Reconfigure, Role, TrimTo,
};
use flowstone_storage::{Disk, RealDisk};
use ledger::{Counter, Ledger, batch};
use shell::{Shell, answered, config, create, produce, reply, unanswered};

struct Place {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    _temporary: tempfile::TempDir,
}

fn place() -> Place {
    let temporary = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let dir = temporary.path().join("replica");
    create(&disk, &dir, 1, &[1]);
    Place { disk, dir, _temporary: temporary }
}

impl Place {
    fn open(&self) -> Shell<Ledger> {
        Shell::open(&self.disk, &self.dir, LogConfig::default(), None, Ledger::default(), config(1)).unwrap()
    }

    fn leader(&self) -> Shell<Ledger> {
        let mut shell = self.open();
        shell.step([Event::Campaign]);
        assert_eq!(shell.replica.status().role, Role::Leader);
        shell
    }
}

#[test]
fn leads_only_when_term_and_no_op_are_flushed() {
    let place = place();
    let mut shell = place.open();
    shell.holds_flushes = true;
    shell.holds_hard_states = true;
    shell.step([Event::Campaign]);
    assert_eq!(shell.replica.status().role, Role::Elected);
    let early = shell.produce(batch(1, 0, 1, 10), Acks::Quorum);
    assert_eq!(answered(early).unwrap_err().code, ErrorCode::LeaderNotReady);

    // The no-op alone is not enough: a crash now would forget the vote.
    shell.holds_flushes = false;
    shell.work();
    assert_eq!(shell.replica.status().role, Role::Elected);

    shell.holds_hard_states = false;
    shell.work();
    let status = shell.replica.status();
    assert_eq!(status.role, Role::Leader);
    assert_eq!((status.high_watermark, status.records), (Offset::new(1), 0), "the no-op takes offset 0");
    assert_eq!(shell.hard_state.unwrap().vote, Some(config(1).replica));
    assert!(shell.replica.wakes_in().is_none(), "alone, it costs nothing while idle");
}

#[test]
fn answers_when_flushed_and_not_before() {
    let place = place();
    let mut shell = place.leader();
    shell.holds_flushes = true;
    let first = shell.produce(batch(1, 0, 2, 10), Acks::Quorum);
    let leader_only = shell.produce(batch(1, 2, 1, 10), Acks::Leader);
    let nothing = shell.produce(batch(1, 3, 1, 10), Acks::None);
    let first = unanswered(first);
    let leader_only = unanswered(leader_only);
    assert_eq!(answered(nothing).unwrap().base_offset, Offset::new(4), "acks none waits for nothing");
    assert_eq!(shell.replica.status().high_watermark, Offset::new(1));
    assert_eq!(shell.replica.status().end_offset, Offset::new(5));

    // The flush under way covers the first batch alone; the rest form the next group.
    let event = shell.run_flush().unwrap();
    shell.step([event]);
    assert_eq!(answered(first).unwrap().base_offset, Offset::new(1));
    let leader_only = unanswered(leader_only);
    let event = shell.run_flush().unwrap();
    shell.step([event]);
    assert_eq!(answered(leader_only).unwrap().base_offset, Offset::new(3));
    assert!(shell.flush.is_none(), "nothing is left to flush");
    assert_eq!(shell.replica.status().records, 4);
}

#[test]
fn relaxed_answers_when_written() {
    let place = place();
    let mut relaxed = config(1);
    relaxed.flush = FlushMode::Relaxed;
    let mut shell =
        Shell::open(&place.disk, &place.dir, LogConfig::default(), None, Ledger::default(), relaxed).unwrap();
    shell.step([Event::Campaign]);
    shell.holds_flushes = true;
    let answer = shell.produce(batch(1, 0, 1, 10), Acks::Quorum);
    assert_eq!(answered(answer).unwrap().base_offset, Offset::new(1));
    assert!(shell.flush.is_none(), "nobody waits for a flush");
    assert!(shell.replica.is_dirty());
    shell.step([Event::FlushNow]);
    assert!(shell.flush.is_some(), "but it comes");
    let event = shell.run_flush().unwrap();
    shell.step([event]);
    assert!(!shell.replica.is_dirty());
}

#[test]
fn a_duplicate_gets_the_original_offset_once_that_is_committed() {
    let place = place();
    let mut shell = place.leader();
    shell.holds_flushes = true;
    let original = shell.produce(batch(9, 0, 3, 10), Acks::Quorum);
    let duplicate = shell.produce(batch(9, 0, 3, 10), Acks::Quorum);
    let (original, duplicate) = (unanswered(original), unanswered(duplicate));
    shell.holds_flushes = false;
    shell.work();
    assert_eq!(answered(original).unwrap(), answered(duplicate).unwrap());
    let late = shell.produce(batch(9, 0, 3, 10), Acks::Quorum);
    assert_eq!(answered(late).unwrap().base_offset, Offset::new(1));
    assert_eq!(shell.replica.status().end_offset, Offset::new(4), "stored once");
}

#[test]
fn reads_wait_for_the_high_watermark() {
    let place = place();
    let mut shell = place.leader();
    shell.holds_flushes = true;
    let waiting = shell.read(1);
    let produced = shell.produce(batch(1, 0, 1, 10), Acks::Quorum);
    let waiting = unanswered(waiting);
    shell.holds_flushes = false;
    shell.work();
    answered(produced).unwrap();
    let answer = answered(waiting).unwrap();
    answer.bytes.verify().unwrap();
    assert_eq!((answer.high_watermark, answer.bytes.next), (Offset::new(2), Offset::new(2)));

    let beyond = answered(shell.read(99)).unwrap_err();
    assert_eq!(beyond.code, ErrorCode::OffsetOutOfRange);
    assert!(beyond.message.contains("0 to 2"), "the valid range is named: {beyond}");

    // Without waiting, the end is an empty answer.
    let (to, nothing) = reply();
    let request = ReadRequest::new(Offset::new(2), 100);
    shell.step([Event::Read { request, reply: to }]);
    assert!(answered(nothing).unwrap().bytes.is_empty());
}

#[test]
fn too_many_waiting_readers_are_refused_and_those_who_left_do_not_count() {
    let place = place();
    let mut shell = place.leader();
    let mut waiting: Vec<_> = (0..100).map(|_| shell.read(1)).collect();
    assert_eq!(answered(shell.read(1)).unwrap_err().code, ErrorCode::Overloaded);
    waiting.truncate(50);
    let late = unanswered(shell.read(1));
    assert!(shell.replica.has_parked_reads());
    drop((late, waiting));
    shell.step([Event::DropAbandoned]);
    assert!(!shell.replica.has_parked_reads());
}

#[test]
fn a_reader_of_a_lost_history_is_told() {
    let place = place();
    let mut shell = place.leader();
    answered(shell.produce(batch(1, 0, 5, 10), Acks::Quorum)).unwrap();
    let epoch = shell.replica.status().leader_epoch();
    let mut ask = |from, epoch| {
        let (to, answer) = reply();
        let request = ReadRequest { last_epoch: Some(epoch), ..ReadRequest::new(Offset::new(from), 100) };
        shell.step([Event::Read { request, reply: to }]);
        answered(answer).map(|answer| answer.bytes.len())
    };
    ask(6, epoch).unwrap();
    // This reader saw offset 5 in an epoch that ended, here, before it.
    let told = ask(5, LeaderEpoch::new(epoch.get() - 1)).unwrap_err();
    assert_eq!(told.code, ErrorCode::LogDiverged);
    // And this one knows a later leader: nothing says that its history is lost.
    let behind = ask(5, LeaderEpoch::new(epoch.get() + 1)).unwrap_err();
    assert_eq!(behind.code, ErrorCode::NotLeader);
    assert!(behind.is_retriable());
}

#[test]
fn a_duplicate_is_told_so_whatever_the_settings_have_become() {
    let place = place();
    let mut shell = place.leader();
    let original = answered(shell.produce(batch(9, 0, 1, 1_000), Acks::Quorum)).unwrap();
    let settings = config(1);
    let log = LogConfig::default();
    let change = Reconfigure { log, retention: settings.retention, flush: settings.flush, max_message_bytes: 100 };
    shell.step([Event::Reconfigure(change)]);
    assert_eq!(answered(shell.produce(batch(9, 0, 1, 1_000), Acks::Quorum)).unwrap(), original);
    let error = answered(shell.produce(batch(9, 1, 1, 1_000), Acks::Quorum)).unwrap_err();
    assert_eq!(error.code, ErrorCode::BatchTooLarge);
}

#[test]
fn offsets_are_looked_up_and_trimmed() {
    let place = place();
    let mut shell = place.leader();
    for sequence in 0..10 {
        answered(shell.produce(batch(1, sequence, 1, 10), Acks::Quorum)).unwrap();
    }
    let ask = |shell: &mut Shell<Ledger>, query| {
        let (to, answer) = reply();
        shell.step([Event::ListOffset { query, reply: to }]);
        answered(answer).unwrap().map(|found| found.offset.get())
    };
    assert_eq!(ask(&mut shell, OffsetQuery::Start), Some(0));
    assert_eq!(ask(&mut shell, OffsetQuery::End), Some(11));
    assert_eq!(ask(&mut shell, OffsetQuery::RecordsFromEnd(4)), Some(7));
    assert_eq!(ask(&mut shell, OffsetQuery::Timestamp(Timestamp::new(0))), Some(1));
    assert_eq!(ask(&mut shell, OffsetQuery::Timestamp(Timestamp::new(9_999))), None);

    let trim = |shell: &mut Shell<Ledger>, to| {
        let (reply, answer) = reply();
        shell.step([Event::Trim { to, reply }]);
        answered(answer)
    };
    assert_eq!(trim(&mut shell, TrimTo::Offset(Offset::new(5))), Ok(Offset::new(5)));
    let status = shell.replica.status();
    assert_eq!((status.log_start, status.high_watermark, status.records), (Offset::new(5), Offset::new(12), 6));
    assert_eq!(trim(&mut shell, TrimTo::Offset(Offset::new(2))), Ok(Offset::new(5)), "never back");
    assert_eq!(trim(&mut shell, TrimTo::Offset(Offset::new(99))).unwrap_err().code, ErrorCode::OffsetOutOfRange);
    assert_eq!(answered(shell.read(4)).unwrap_err().code, ErrorCode::OffsetOutOfRange);
    assert_eq!(trim(&mut shell, TrimTo::HighWatermark), Ok(Offset::new(12)));
    assert_eq!(shell.replica.status().records, 0);
}

#[test]
fn a_restart_goes_on_where_it_was() {
    let place = place();
    let mut shell = place.leader();
    for sequence in 0..20 {
        answered(shell.produce(batch(1, sequence, 1, 10), Acks::Quorum)).unwrap();
        if sequence == 10 {
            shell.step([Event::CheckpointNow]);
            assert_eq!(shell.replica.entries_since_checkpoint(), 0);
        }
    }
    let before = shell.replica.status();
    let hard_state = shell.hard_state;
    let known = shell.replica.machine().committed().clone();
    drop(shell);

    let mut shell =
        Shell::open(&place.disk, &place.dir, LogConfig::default(), hard_state, Ledger::default(), config(1)).unwrap();
    assert_eq!(shell.replica.log().checkpoint().applied.get(), 13, "creation, no-op, eleven batches");
    shell.step([Event::Campaign]);
    let after = shell.replica.status();
    assert!(after.term > before.term);
    assert_eq!(after.records, before.records);
    assert_eq!(after.high_watermark, before.high_watermark.next(), "the new term's no-op follows");
    assert_eq!(shell.replica.machine().committed(), &known, "replayed from the checkpoint");
    let duplicate = answered(shell.produce(batch(1, 5, 1, 10), Acks::Quorum)).unwrap();
    assert_eq!(duplicate.base_offset, Offset::new(6));
}

#[test]
fn coordinators_see_what_is_in_flight_and_answer_when_it_is_committed() {
    let place = place();
    let mut config = config(1);
    config.internal = true;
    config.checkpoint_entries = 3;
    let mut shell =
        Shell::open(&place.disk, &place.dir, LogConfig::default(), None, Counter::default(), config.clone()).unwrap();
    shell.step([Event::Campaign]);
    shell.holds_flushes = true;
    let ask = |shell: &mut Shell<Counter>, command| {
        let (to, answer) = reply();
        shell.step([Event::Command { command, reply: to }]);
        answer
    };
    let first = ask(&mut shell, 5);
    let second = ask(&mut shell, 7);
    let read = ask(&mut shell, 0);
    // Even the read waits: what it tells may yet be lost.
    let (first, second, read) = (unanswered(first), unanswered(second), unanswered(read));
    shell.holds_flushes = false;
    shell.work();
    assert_eq!((answered(first), answered(second), answered(read)), (Ok(5), Ok(12), Ok(12)));
    assert_eq!(answered(ask(&mut shell, 0)), Ok(12), "nothing in flight: at once");

    // What the machine has and the log may yet lose is in no checkpoint.
    assert_eq!(answered(ask(&mut shell, 1)), Ok(13));
    assert_eq!(answered(ask(&mut shell, -1)), Ok(12));
    shell.holds_flushes = true;
    shell.holds_checkpoints = true;
    let in_flight = ask(&mut shell, 100);
    shell.step([Event::CheckpointNow]);
    assert!(shell.checkpoint.is_none(), "not before it is committed");
    let event = shell.run_flush().unwrap();
    shell.step([event]);
    assert!(shell.checkpoint.is_some(), "but then");
    answered(in_flight).unwrap();
    shell.holds_checkpoints = false;
    shell.work();

    // A stream without a pause: the checkpoint gets its quiet moment all the same, and nothing is lost or held for ever.
    let before = shell.replica.log().checkpoint().applied;
    let mut answers = vec![ask(&mut shell, 1)];
    for _ in 0..100 {
        // The next command is there before the flush is over.
        let (to, answer) = reply();
        let flushed = shell.run_flush();
        shell.step(flushed.into_iter().chain([Event::Command { command: 1, reply: to }]));
        answers.push(answer);
    }
    assert!(shell.replica.log().checkpoint().applied > before, "checkpoints are written meanwhile");
    shell.holds_flushes = false;
    shell.work();
    for answer in answers {
        answered(answer).unwrap();
    }
    assert_eq!(shell.replica.machine().total(), 213);
    let hard_state = shell.hard_state;
    drop(shell);
    let mut shell =
        Shell::open(&place.disk, &place.dir, LogConfig::default(), hard_state, Counter::default(), config).unwrap();
    shell.step([Event::Campaign]);
    assert_eq!(shell.replica.machine().total(), 213);
}

#[test]
fn what_is_too_large_or_refused_changes_nothing() {
    let place = place();
    let mut shell = place.leader();
    let end = shell.replica.status().end_offset;
    let large = answered(shell.produce(batch(1, 0, 1, 2 << 20), Acks::Quorum)).unwrap_err();
    assert_eq!(large.code, ErrorCode::BatchTooLarge);
    assert_eq!(shell.replica.status().end_offset, end);
}

#[test]
fn many_batches_of_one_round_are_one_write_and_one_flush() {
    let place = place();
    let mut shell = place.leader();
    shell.holds_flushes = true;
    let (events, answers): (Vec<_>, Vec<_>) =
        (0..100).map(|sequence| produce(batch(1, sequence, 1, 100), Acks::Quorum)).unzip();
    shell.step(events);
    let event = shell.run_flush().unwrap();
    shell.holds_flushes = false;
    shell.step([event]);
    for (i, answer) in answers.into_iter().enumerate() {
        assert_eq!(answered(answer).unwrap().base_offset, Offset::new(i as i64 + 1));
    }
}

#[test]
fn a_replica_of_another_partition_or_id_is_not_opened() {
    let place = place();
    let opened = Shell::open(&place.disk, &place.dir, LogConfig::default(), None, Ledger::default(), config(2));
    assert!(opened.err().unwrap().to_string().contains("belongs to replica 1"));
}

#[test]
fn the_last_term_is_refused() {
    let place = place();
    let hard_state = flowstone_storage::HardState {
        term: flowstone_protocol::Term::new(i32::MAX as u64),
        vote: None,
        flushed: flowstone_storage::checkpoint::CREATION_INDEX,
    };
    let mut shell =
        Shell::open(&place.disk, &place.dir, LogConfig::default(), Some(hard_state), Ledger::default(), config(1))
            .unwrap();
    shell.step([Event::Campaign]);
    assert!(matches!(shell.ended, Some(Ended::TermExhausted(_))));
    let refused: Error = answered(shell.produce(batch(1, 0, 1, 1), Acks::Quorum)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::StorageFailed);
}

#[test]
fn a_learner_is_added_through_the_log_and_is_still_there_after_a_restart() {
    let place = place();
    let mut shell = place.leader();
    let learner = flowstone_protocol::ReplicaId::new(77);
    let (to, answer) = reply();
    shell.step([Event::ChangeMembership { change: MembershipChange::AddLearner(learner), reply: to }]);
    answered(answer).unwrap();
    assert_eq!(shell.replica.membership().learners, [learner]);
    assert!(shell.replica.is_only_voter());
    assert_eq!(shell.replica.status().health, Health::Ok);
    let hard_state = shell.hard_state;
    drop(shell);
    let mut shell =
        Shell::open(&place.disk, &place.dir, LogConfig::default(), hard_state, Ledger::default(), config(1)).unwrap();
    shell.step([Event::Campaign]);
    assert_eq!(shell.replica.status().role, Role::Leader);
    assert_eq!(shell.replica.membership().learners, [learner], "replayed");
}

#[test]
fn a_panic_of_the_raft_crate_ends_the_replica_and_it_opens_again() {
    let place = place();
    let mut shell = place.leader();
    answered(shell.produce(batch(1, 0, 1, 10), Acks::Quorum)).unwrap();
    shell.holds_flushes = true;
    let waiting = unanswered(shell.produce(batch(1, 1, 1, 10), Acks::Quorum));
    // A leader of a later term that wants more committed than there is: nobody of ours, and the crate says so by a panic.
    shell.step([Event::Peer(PeerMessage {
        from: flowstone_protocol::ReplicaId::new(2),
        to: config(1).replica,
        term: shell.replica.status().term.get().saturating_add(5).into(),
        body: PeerBody::Heartbeat { commit: 9_999.into() },
    })]);
    assert!(matches!(&shell.ended, Some(Ended::Panicked(why)) if why.contains("9999")), "{:?}", shell.ended);
    assert_eq!(answered(waiting).unwrap_err().code, ErrorCode::StorageFailed);
    assert_eq!(answered(shell.read(0)).unwrap_err().code, ErrorCode::StorageFailed, "nothing is served any more");

    let hard_state = shell.hard_state;
    drop(shell);
    let mut shell =
        Shell::open(&place.disk, &place.dir, LogConfig::default(), hard_state, Ledger::default(), config(1)).unwrap();
    shell.step([Event::Campaign]);
    assert_eq!(answered(shell.produce(batch(1, 0, 1, 10), Acks::Quorum)).unwrap().base_offset, Offset::new(1));
}

#[test]
fn messages_for_another_replica_or_of_an_impossible_term_are_dropped() {
    let place = place();
    let mut shell = place.leader();
    let before = shell.replica.status();
    let this = config(1).replica;
    for (to, term) in [(flowstone_protocol::ReplicaId::new(9), before.term.get() + 1), (this, i32::MAX as u64 + 1)] {
        shell.step([Event::Peer(PeerMessage {
            from: flowstone_protocol::ReplicaId::new(2),
            to,
            term: term.into(),
            body: PeerBody::Heartbeat { commit: 0.into() },
        })]);
        assert_eq!(shell.replica.status(), before);
    }
}
