//! Every state against every command; and what no single step shows.

use std::collections::BTreeSet;

use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::{ErrorCode, PartitionId, ProducerEpoch, ProducerId, Timestamp, TopicId, TopicPartition};

use super::commands::{Addition, TransactionCommand, TransactionReply, check_id};
use super::records::{self, TransactionRecord};
use super::state::{Cut, Decision, Stage, Transaction, TransactionRules, TransactionTable};
use crate::coordinator::{LoggedRecord, PIECE_BYTES, StateMachine};

/// Between two looks; timeouts are a hundred of it.
const TICK: Duration = Duration::from_millis(1_000);
const TIMEOUT: Duration = Duration::from_millis(100_000);
const FRESH: ProducerId = ProducerId::new(99);

pub(super) fn tp(partition: i32) -> TopicPartition {
    TopicPartition::new(TopicId::new(7), PartitionId::new(partition))
}

fn id() -> Arc<str> {
    "t".into()
}

fn now() -> Timestamp {
    Timestamp::new(1_000_000)
}

pub(super) fn table() -> TransactionTable {
    TransactionTable::new(Arc::new(TransactionRules { ids_max: 3, ..TransactionRules::default() }))
}

/// A table with one transactional id, whose producer 7 is at epoch 5; partition 0 is in what is not ended everywhere.
fn at(stage: Stage, cut: Cut) -> TransactionTable {
    let commit = matches!(stage, Stage::Ongoing | Stage::PrepareCommit | Stage::CompleteCommit);
    let has_partitions = stage == Stage::Ongoing || stage.is_preparing();
    let it = Transaction {
        producer: ProducerId::new(7),
        epoch: ProducerEpoch::new(5),
        previous: None,
        stage,
        timeout: TIMEOUT,
        started_at: if has_partitions { now() } else { Timestamp::NONE },
        updated_at: now(),
        partitions: if has_partitions { BTreeSet::from([tp(0)]) } else { BTreeSet::new() },
        groups: BTreeSet::new(),
        last_ended: (stage != Stage::Empty).then_some((ProducerEpoch::new(4), commit)),
        cut,
    };
    let mut table = table();
    apply(&mut table, vec![TransactionRecord { id: id(), value: Some(records::to_value(&it)) }]);
    table
}

pub(super) fn apply(table: &mut TransactionTable, records: Vec<TransactionRecord>) {
    for record in records {
        let (key, value) = record.to_log();
        let read = TransactionRecord::from_log(key, value).expect("own bytes");
        assert_eq!(read, record);
        let at = table.applied().next();
        table.apply(read, at).expect("follows");
    }
}

/// What became of a command: the state after it where that changed, and the answer.
fn outcome(table: &TransactionTable, command: TransactionCommand, now: Timestamp) -> String {
    let mut after = table.clone();
    let (records, reply) = table.decide(command, now);
    let changed = !records.is_empty();
    assert!(reply.is_ok() || !changed, "a refusal changes nothing");
    apply(&mut after, records);
    let state = match after.get("t") {
        _ if !changed => "=".to_owned(),
        Some(it) => format!("{:?} {}/{}", it.stage, it.producer, it.epoch),
        None => "gone".to_owned(),
    };
    match reply {
        Ok(TransactionReply::Producer { producer, epoch }) => format!("{state} > {producer}/{epoch}"),
        Ok(TransactionReply::Busy) => format!("{state} > busy"),
        Ok(TransactionReply::Added(results)) => match &results[0] {
            Ok(()) => format!("{state} > added"),
            Err(error) => {
                assert!(!changed, "a refusal changes nothing");
                format!("{}", error.code)
            }
        },
        Ok(TransactionReply::Done) => format!("{state} > done"),
        Err(error) => error.code.to_string(),
    }
}

fn addition(producer: i64, epoch: i16, partition: i32) -> TransactionCommand {
    TransactionCommand::Add(vec![Addition {
        id: id(),
        producer: ProducerId::new(producer),
        epoch: ProducerEpoch::new(epoch),
        partition: Some(tp(partition)),
        group: None,
    }])
}

fn ended(producer: i64, epoch: i16, commit: bool) -> TransactionCommand {
    let (producer, epoch) = (ProducerId::new(producer), ProducerEpoch::new(epoch));
    TransactionCommand::End { id: "t".to_owned(), producer, epoch, commit, fresh: FRESH }
}

fn written(epoch: i16, commit: bool) -> TransactionCommand {
    let decision = Decision { producer: ProducerId::new(7), epoch: ProducerEpoch::new(epoch), commit };
    TransactionCommand::Written { id: id(), decision }
}

fn init(timeout: Duration) -> TransactionCommand {
    TransactionCommand::Init { id: "t".to_owned(), timeout, fresh: FRESH }
}

#[test]
fn every_state_against_every_command() {
    const FENCED: &str = "PRODUCER_FENCED";
    const ABORTED: &str = "TRANSACTION_ABORTED";
    const BUSY: &str = "CONCURRENT_TRANSACTIONS";
    const INVALID: &str = "INVALID_TRANSACTION_STATE";
    let late = now().after(TIMEOUT);
    let unused = now().after(TransactionRules::default().id_expiration);
    let commands = || {
        vec![
            ("init", init(TIMEOUT), now()),
            ("add", addition(7, 5, 1), now()),
            ("add what is there", addition(7, 5, 0), now()),
            ("add of the one before", addition(7, 4, 1), now()),
            ("add of an older one", addition(7, 3, 1), now()),
            ("commit", ended(7, 5, true), now()),
            ("abort", ended(7, 5, false), now()),
            ("commit of the one before", ended(7, 4, true), now()),
            ("abort of the one before", ended(7, 4, false), now()),
            ("commit of an older one", ended(7, 3, true), now()),
            ("timeout before its time", TransactionCommand::TimeOut { id: id(), fresh: FRESH }, late.before(TICK)),
            ("timeout", TransactionCommand::TimeOut { id: id(), fresh: FRESH }, late),
            ("operator", TransactionCommand::Abort { id: "t".to_owned(), fresh: FRESH }, now()),
            ("commit markers", written(5, true), now()),
            ("abort markers", written(5, false), now()),
            ("markers of an older one", written(4, true), now()),
            ("forget too early", TransactionCommand::Forget(vec![id()]), unused.before(TICK)),
            ("forget", TransactionCommand::Forget(vec![id()]), unused),
        ]
    };
    let check = |stage: Stage, cut: Cut, wanted: &[&str]| {
        let table = at(stage, cut);
        let commands = commands();
        assert_eq!(commands.len(), wanted.len(), "{stage:?} {cut:?}");
        for ((name, command, at), wanted) in commands.into_iter().zip(wanted) {
            assert_eq!(outcome(&table, command, at), *wanted, "{stage:?} {cut:?}: {name}");
        }
    };
    #[rustfmt::skip]
    let rows: &[(Stage, &[Cut], &[&str])] = &[
        (Stage::Empty, &[Cut::None, Cut::TakenOver], &[
            "Empty 7/6 > 7/6", "Ongoing 7/5 > added", "Ongoing 7/5 > added", FENCED, FENCED,
            "CompleteCommit 7/6 > 7/6", "CompleteAbort 7/6 > 7/6", FENCED, FENCED, FENCED,
            "= > done", "= > done", INVALID, "= > done", "= > done", "= > done", "= > done", "gone > done",
        ]),
        (Stage::Ongoing, &[Cut::None], &[
            "PrepareAbort 7/6 > busy", "Ongoing 7/5 > added", "= > added", FENCED, FENCED,
            "PrepareCommit 7/6 > 7/6", "PrepareAbort 7/6 > 7/6", "= > 7/5", INVALID, FENCED,
            "= > done", "PrepareAbort 7/6 > done", "PrepareAbort 7/6 > done", "= > done", "= > done", "= > done",
            "= > done", "= > done",
        ]),
        (Stage::PrepareCommit, &[Cut::None], &[
            "= > busy", BUSY, BUSY, FENCED, FENCED,
            BUSY, BUSY, "= > 7/5", INVALID, FENCED,
            "= > done", "= > done", INVALID, "CompleteCommit 7/5 > done", "= > done", "= > done", "= > done", "= > done",
        ]),
        (Stage::PrepareAbort, &[Cut::None], &[
            "= > busy", BUSY, BUSY, FENCED, FENCED,
            BUSY, BUSY, INVALID, "= > 7/5", FENCED,
            "= > done", "= > done", "= > done", "= > done", "CompleteAbort 7/5 > done", "= > done", "= > done", "= > done",
        ]),
        (Stage::PrepareAbort, &[Cut::TimedOut], &[
            "= > busy", BUSY, BUSY, ABORTED, FENCED,
            BUSY, BUSY, ABORTED, "= > 7/5", FENCED,
            "= > done", "= > done", "= > done", "= > done", "CompleteAbort 7/5 > done", "= > done", "= > done", "= > done",
        ]),
        (Stage::PrepareAbort, &[Cut::Operator, Cut::TakenOver], &[
            "= > busy", BUSY, BUSY, FENCED, FENCED,
            BUSY, BUSY, FENCED, FENCED, FENCED,
            "= > done", "= > done", "= > done", "= > done", "CompleteAbort 7/5 > done", "= > done", "= > done", "= > done",
        ]),
        (Stage::CompleteCommit, &[Cut::None], &[
            "Empty 7/6 > 7/6", "Ongoing 7/5 > added", "Ongoing 7/5 > added", FENCED, FENCED,
            "CompleteCommit 7/6 > 7/6", "CompleteAbort 7/6 > 7/6", "= > 7/5", INVALID, FENCED,
            "= > done", "= > done", INVALID, "= > done", "= > done", "= > done", "= > done", "gone > done",
        ]),
        (Stage::CompleteAbort, &[Cut::TimedOut], &[
            "Empty 7/6 > 7/6", "Ongoing 7/5 > added", "Ongoing 7/5 > added", ABORTED, FENCED,
            "CompleteCommit 7/6 > 7/6", "CompleteAbort 7/6 > 7/6", ABORTED, "= > 7/5", FENCED,
            "= > done", "= > done", INVALID, "= > done", "= > done", "= > done", "= > done", "gone > done",
        ]),
        (Stage::CompleteAbort, &[Cut::Operator, Cut::TakenOver], &[
            "Empty 7/6 > 7/6", "Ongoing 7/5 > added", "Ongoing 7/5 > added", FENCED, FENCED,
            "CompleteCommit 7/6 > 7/6", "CompleteAbort 7/6 > 7/6", FENCED, FENCED, FENCED,
            "= > done", "= > done", INVALID, "= > done", "= > done", "= > done", "= > done", "gone > done",
        ]),
    ];
    for (stage, cuts, wanted) in rows {
        for cut in *cuts {
            check(*stage, *cut, wanted);
        }
    }
    // An id that nobody uses.
    let nobody = table();
    for (name, command, at) in commands() {
        let wanted = match name {
            "init" => "Empty 99/0 > 99/0",
            "timeout" | "timeout before its time" | "forget" | "forget too early" => "= > done",
            _ if name.contains("markers") => "= > done",
            _ => "UNKNOWN_TRANSACTION",
        };
        assert_eq!(outcome(&nobody, command, at), wanted, "{name}");
    }
}

#[test]
fn ids_and_timeouts_have_bounds() {
    let table = at(Stage::Empty, Cut::None);
    let max = TransactionRules::default().timeout_max;
    for (timeout, wanted) in [
        (Duration::ZERO, "INVALID_TRANSACTION_TIMEOUT"),
        (Duration::from_millis(1), "Empty 7/6 > 7/6"),
        (max, "Empty 7/6 > 7/6"),
        (max + Duration::from_millis(1), "INVALID_TRANSACTION_TIMEOUT"),
        (Duration::from_secs(365 * 24 * 60 * 60), "INVALID_TRANSACTION_TIMEOUT"),
    ] {
        assert_eq!(outcome(&table, init(timeout), now()), wanted, "{timeout:?}");
    }
    for (id, is_valid) in [
        ("", false),
        ("x", true),
        (&*"y".repeat(249), true),
        (&*"y".repeat(250), false),
        ("a\nb", false),
        ("zürich", true),
    ] {
        assert_eq!(check_id(id).is_ok(), is_valid, "{id:?}");
    }
    // Three ids are known at the most.
    let mut table = table;
    for (id, wanted) in [("u", true), ("v", true), ("w", false), ("u", true)] {
        let command = TransactionCommand::Init { id: id.to_owned(), timeout: TIMEOUT, fresh: FRESH };
        let (records, reply) = table.decide(command, now());
        assert_eq!(reply.map_err(|error| error.code).is_ok(), wanted, "{id}");
        apply(&mut table, records);
    }
}

#[test]
fn the_last_epoch_is_the_markers_and_the_next_transaction_has_another_id() {
    let mut table = at(Stage::Ongoing, Cut::None);
    let last =
        Transaction { epoch: ProducerEpoch::new(i16::MAX - 1), ..Transaction::clone(table.get("t").expect("known")) };
    apply(&mut table, vec![TransactionRecord { id: id(), value: Some(records::to_value(&last)) }]);
    let mut ways = Vec::new();
    for command in [
        ended(7, i16::MAX - 1, true),
        ended(7, i16::MAX - 1, false),
        init(TIMEOUT),
        TransactionCommand::Abort { id: "t".to_owned(), fresh: FRESH },
    ] {
        let mut table = table.clone();
        let (records, _) = table.decide(command, now());
        apply(&mut table, records);
        let it = table.get("t").expect("known").clone();
        let decision = it.decision().expect("decided");
        assert_eq!((decision.producer.get(), decision.epoch.get()), (7, i16::MAX));
        assert_eq!((it.producer, it.epoch.get()), (FRESH, 0));
        ways.push(table);
    }
    let mut table = ways.swap_remove(0);
    assert_eq!(outcome(&table, ended(7, i16::MAX - 1, true), now()), "= > 99/0", "the same again");
    let written = Decision { producer: ProducerId::new(7), epoch: ProducerEpoch::new(i16::MAX), commit: true };
    let (records, _) = table.decide(TransactionCommand::Written { id: id(), decision: written }, now());
    apply(&mut table, records);
    let (records, _) = table.decide(addition(99, 0, 4), now());
    apply(&mut table, records);
    assert_eq!(outcome(&table, ended(7, i16::MAX - 1, true), now()), "= > 99/0", "the next one is as it was");
    assert_eq!(outcome(&table, addition(7, i16::MAX - 1, 4), now()), "PRODUCER_FENCED");
    assert_eq!(outcome(&table, ended(99, 0, true), now()), "PrepareCommit 99/1 > 99/1");
    // Nothing open: taken over at the last epoch but one.
    let mut idle = at(Stage::Empty, Cut::None);
    let last =
        Transaction { epoch: ProducerEpoch::new(i16::MAX - 1), ..Transaction::clone(idle.get("t").expect("known")) };
    apply(&mut idle, vec![TransactionRecord { id: id(), value: Some(records::to_value(&last)) }]);
    assert_eq!(outcome(&idle, init(TIMEOUT), now()), "Empty 99/0 > 99/0");
}

#[test]
fn many_additions_are_one_record_of_each_id() {
    let table = at(Stage::Empty, Cut::None);
    let one = |partition| Addition {
        id: id(),
        producer: ProducerId::new(7),
        epoch: ProducerEpoch::new(5),
        partition: Some(tp(partition)),
        group: Some("g".into()),
    };
    let mut additions: Vec<Addition> = (0..200).map(one).collect();
    additions.push(Addition { epoch: ProducerEpoch::new(4), ..one(200) });
    additions.push(Addition { id: "stranger".into(), ..one(201) });
    let (records, reply) = table.decide(TransactionCommand::Add(additions), now());
    assert_eq!(records.len(), 1);
    let Ok(TransactionReply::Added(results)) = reply else { panic!("{reply:?}") };
    assert!(results[..200].iter().all(Result::is_ok));
    let codes: Vec<_> = results[200..].iter().map(|result| result.as_ref().map_err(|error| error.code)).collect();
    assert_eq!(codes, [Err(ErrorCode::ProducerFenced), Err(ErrorCode::UnknownTransaction)]);
    let mut table = table;
    apply(&mut table, records);
    let it = table.get("t").expect("known");
    assert_eq!((it.partitions.len(), it.groups.len()), (200, 1));
}

#[test]
fn what_is_added_at_once_stays_within_one_step() {
    // As large as a transaction may be, and as many of them as one call may speak of.
    let large = Transaction {
        partitions: (0..9_999).map(tp).collect(),
        ..Transaction::clone(at(Stage::Ongoing, Cut::None).get("t").expect("known"))
    };
    let mut table = TransactionTable::new(Arc::new(TransactionRules::default()));
    let ids: Vec<Arc<str>> = (0..1_000).map(|number| format!("{number:0>249}").into()).collect();
    let record = |id: &Arc<str>| TransactionRecord { id: Arc::clone(id), value: Some(records::to_value(&large)) };
    for (at, id) in ids.iter().enumerate() {
        table.apply(record(id), flowstone_protocol::Offset::new(at as i64)).expect("follows");
    }
    let one = |id: &Arc<str>| Addition {
        id: Arc::clone(id),
        producer: ProducerId::new(7),
        epoch: ProducerEpoch::new(5),
        partition: Some(tp(9_999)),
        group: None,
    };
    let mut left: Vec<Addition> = ids.iter().map(one).collect();
    let mut steps = 0;
    while !left.is_empty() {
        let (records, reply) = table.decide(TransactionCommand::Add(left.clone()), now());
        let bytes: usize = records
            .iter()
            .map(|record| record.to_log())
            .map(|(key, value)| key.map_or(0, |key| key.len()) + value.map_or(0, |value| value.len()))
            .sum();
        assert!(bytes <= 2 * PIECE_BYTES, "{bytes}");
        apply(&mut table, records);
        let Ok(TransactionReply::Added(results)) = reply else { panic!("{reply:?}") };
        let before = left.len();
        let mut results = results.into_iter();
        left.retain(|_| match results.next().expect("one each") {
            Ok(()) => false,
            Err(error) => {
                assert_eq!(error.code, ErrorCode::Overloaded);
                true
            }
        });
        assert!(left.len() < before, "nothing is taken");
        steps += 1;
    }
    assert!(steps > 10, "{steps}");
    assert!(ids.iter().all(|id| table.get(id).is_some_and(|it| it.partitions.len() == 10_000)));
}

#[test]
fn a_checkpoint_restores_all_of_it() {
    for stage in [Stage::Empty, Stage::Ongoing, Stage::PrepareCommit, Stage::CompleteAbort] {
        let table = at(stage, Cut::TimedOut);
        let mut restored = super::table_tests::table();
        restored.restore(&table.checkpoint()).expect("own bytes");
        assert_eq!(restored.get("t"), table.get("t"));
        assert_eq!(restored.applied(), table.applied());
        assert_eq!(restored.preparing().count(), usize::from(stage.is_preparing()));
        let later = now().after(TIMEOUT);
        assert_eq!(restored.overdue(later).count(), usize::from(stage == Stage::Ongoing));
        assert_eq!(restored.overdue(later.before(TICK)).count(), 0);
        assert!(restored.restore(b"\xff\xff").is_err());
    }
}
