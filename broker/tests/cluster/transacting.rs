//! Transactions: seen whole or not at all, whoever dies, stands still or comes late.

use flowstone_protocol::pb::groups_client::GroupsClient;
use flowstone_protocol::{Compression, Error, ErrorCode, ProducerEpoch, ProducerId, RecordBatchBuilder, Sequence, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::transactor::*;
use super::world::{Topic, World, batch, error_of, soon, until};

const LONG_MS: i32 = 600_000;

fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorCode {
    result.expect_err("refused").code
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_is_seen_whole_and_what_is_aborted_not_at_all() {
    let world = World::of(1).await;
    let topic = world.any().create("bills", 3, 1).await.expect("created");
    let mut tx = Transactor::begin(&world, "billing", LONG_MS).await.expect("begun");
    world.produce(&topic, 0, "plain").await;
    for partition in 0..3 {
        tx.write(&world, &topic, partition, "one").await.expect("written");
        tx.write(&world, &topic, partition, "two").await.expect("written");
    }
    let (high_watermark, stable) = ends(&world, &topic, 0).await;
    assert_eq!((high_watermark, stable), (4, 2), "behind the no-op and what was there before");
    // A reader waits there, and is given all of it once it is committed.
    let (requests, receiver) = mpsc::channel(1);
    let set = pb::FetchPartition { offset: 2, ..position(&topic, 0, false, READ_COMMITTED) };
    requests.send(pb::FetchRequest { set: vec![set], remove: Vec::new(), credit_bytes: 1 << 20 }).await.expect("room");
    let mut log = world.any().log;
    let mut waiting = soon("fetch", log.fetch(ReceiverStream::new(receiver))).await.expect("a stream").into_inner();
    world.produce(&topic, 0, "plain again").await;
    assert_eq!(ends(&world, &topic, 0).await.1, 2, "what is behind it waits, too");
    tx.end(&world, true).await.expect("committed");
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let answer = soon("what was committed", waiting.message()).await.expect("a stream").expect("goes on");
        assert_eq!(answer.error, None);
        take(&answer, &mut seen);
    }
    assert_eq!(seen, ["one", "two", "plain again"]);
    for partition in 0..3 {
        tx.write(&world, &topic, partition, "three").await.expect("written");
    }
    tx.end(&world, false).await.expect("aborted");
    for partition in 0..3 {
        tx.write(&world, &topic, partition, "four").await.expect("written");
    }
    tx.end(&world, true).await.expect("committed");
    for partition in 0..3 {
        let end = settled(&world, &topic, partition).await;
        let wanted: &[&str] =
            if partition == 0 { &["plain", "one", "two", "plain again", "four"] } else { &["one", "two", "four"] };
        assert_eq!(committed(&world, None, &topic, partition, end).await, wanted, "partition {partition}");
        let all = world.values(&topic, partition).await;
        assert!(all.contains(&"three".to_owned()), "it is in the log, and only passed over: {all:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused() {
    let world = World::of(1).await;
    let topic = world.any().create("bills", 1, 1).await.expect("created");
    for (id, timeout_ms, wanted) in [
        ("x", 0, ErrorCode::InvalidTransactionTimeout),
        ("x", -1, ErrorCode::InvalidTransactionTimeout),
        ("x", i32::MAX, ErrorCode::InvalidTransactionTimeout),
        ("", LONG_MS, ErrorCode::InvalidTransactionalId),
        (&*"y".repeat(250), LONG_MS, ErrorCode::InvalidTransactionalId),
        ("line\nbreak", LONG_MS, ErrorCode::InvalidTransactionalId),
    ] {
        assert_eq!(code(Transactor::begin(&world, id, timeout_ms).await), wanted, "{id:?} {timeout_ms}");
    }
    let mut tx = Transactor::begin(&world, "billing", LONG_MS).await.expect("begun");
    let mut client = world.any();
    let good = tx.request(&topic, 0, tx.batch(0, "v"));
    let plain_of = |producer: i64, epoch: i16, sequence| {
        let (id, epoch) = (ProducerId::new(producer), ProducerEpoch::new(epoch));
        let mut batch = RecordBatchBuilder::new(Compression::None).producer(id, epoch, Sequence::new(sequence));
        batch.append(present(), None, Some(b"v"), []).expect("fits");
        batch.build()
    };
    let outside = pb::ProduceRequest { transactional_id: String::new(), ..good.clone() };
    assert_eq!(code(produce(&mut client, outside).await), ErrorCode::InvalidTransactionState);
    let not_marked = pb::ProduceRequest { batch: batch(&["v"]), ..good.clone() };
    assert_eq!(code(produce(&mut client, not_marked).await), ErrorCode::InvalidTransactionState);
    let may_be_lost = pb::ProduceRequest { acks: pb::Acks::Leader.into(), ..good.clone() };
    assert_eq!(code(produce(&mut client, may_be_lost).await), ErrorCode::InvalidRequest);
    let stranger = pb::ProduceRequest { transactional_id: "nobody".to_owned(), ..good.clone() };
    assert_eq!(code(produce(&mut client, stranger).await), ErrorCode::UnknownTransaction);
    // Nothing of that began anything.
    assert_eq!(settled(&world, &topic, 0).await, 1);
    tx.write(&world, &topic, 0, "v").await.expect("written");
    let plain = pb::ProduceRequest {
        transactional_id: String::new(),
        batch: plain_of(tx.producer, tx.epoch, 1),
        ..good.clone()
    };
    assert_eq!(code(produce(&mut client, plain).await), ErrorCode::InvalidTransactionState, "plainly, by its producer");
    // An unknown isolation level.
    let (requests, receiver) = mpsc::channel(1);
    let set = position(&topic, 0, false, 7);
    requests.send(pb::FetchRequest { set: vec![set], remove: Vec::new(), credit_bytes: 1 << 20 }).await.expect("room");
    let mut answers = client.log.fetch(ReceiverStream::new(receiver)).await.expect("a stream").into_inner();
    let answer = soon("an error", answers.message()).await.expect("a stream").expect("goes on");
    assert_eq!(Error::from_detail(&answer.error.expect("an error")).code, ErrorCode::InvalidRequest);
    // What operators ask.
    let describe = |id: &str| pb::DescribeTransactionRequest { transactional_id: id.to_owned() };
    let mut coordinator = transactions(&world, 1);
    let told = coordinator.describe_transaction(describe("billing")).await.expect("described").into_inner();
    let listing = told.transaction.expect("told");
    assert_eq!((listing.state(), listing.partitions), (pb::TransactionState::Ongoing, 1));
    assert_eq!((told.partitions[0].topic.as_str(), &told.partitions[0].partitions[..]), ("bills", &[0][..]));
    let unknown = coordinator.describe_transaction(describe("nobody")).await.map_err(error_of);
    assert_eq!(code(unknown), ErrorCode::UnknownTransaction);
    for (open_longer_than_ms, states, wanted) in [
        (0, vec![], 1),
        (0, vec![pb::TransactionState::Ongoing.into()], 1),
        (0, vec![pb::TransactionState::PrepareCommit.into()], 0),
        (3_600_000, vec![], 0),
    ] {
        let request = pb::ListTransactionsRequest { states, open_longer_than_ms };
        let listed = coordinator.list_transactions(request).await.expect("listed").into_inner();
        assert_eq!(listed.transactions.len(), wanted);
    }
    // Ends of what is not open, or was decided otherwise.
    let first = tx.clone();
    tx.end(&world, true).await.expect("committed");
    first.clone().end(&world, true).await.expect("the same again");
    assert_eq!(code(first.clone().end(&world, false).await), ErrorCode::InvalidTransactionState);
    tx.write(&world, &topic, 0, "w").await.expect("written");
    first.clone().end(&world, true).await.expect("the same, late");
    assert_eq!(ends(&world, &topic, 0).await.1, 3, "the next transaction is as it was");
    let late = pb::ProduceRequest { batch: first.batch(1, "late"), ..good };
    assert_eq!(code(produce(&mut client, late).await), ErrorCode::ProducerFenced, "after its marker");
    let abort = |id: &str| pb::AbortTransactionRequest { transactional_id: id.to_owned() };
    coordinator.abort_transaction(abort("billing")).await.expect("aborted by an operator");
    assert_eq!(code(tx.clone().end(&world, true).await), ErrorCode::ProducerFenced);
    let end = settled(&world, &topic, 0).await;
    assert_eq!(committed(&world, None, &topic, 0, end).await, ["v"]);
    until("the markers", async || {
        let error = coordinator.abort_transaction(abort("billing")).await.map_err(error_of).map(|_| ());
        match error {
            Err(error) if error.code == ErrorCode::InvalidTransactionState => Ok(()),
            told => Err(format!("{told:?}")),
        }
    })
    .await;
    assert_eq!(
        code(coordinator.abort_transaction(abort("nobody")).await.map_err(error_of)),
        ErrorCode::UnknownTransaction
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_instance_fences_the_first() {
    let world = World::of(1).await;
    let topic = world.any().create("bills", 2, 1).await.expect("created");
    let mut first = Transactor::begin(&world, "billing", LONG_MS).await.expect("begun");
    first.write(&world, &topic, 0, "zombie").await.expect("written");
    let mut second = Transactor::begin(&world, "billing", LONG_MS).await.expect("taken over");
    assert_eq!(second.producer, first.producer);
    assert!(second.epoch > first.epoch);
    settled(&world, &topic, 0).await;
    assert_eq!(code(first.write(&world, &topic, 0, "zombie").await), ErrorCode::ProducerFenced, "where it wrote");
    assert_eq!(code(first.write(&world, &topic, 1, "zombie").await), ErrorCode::ProducerFenced, "where it did not");
    assert_eq!(code(first.clone().end(&world, true).await), ErrorCode::ProducerFenced);
    assert_eq!(code(first.clone().end(&world, false).await), ErrorCode::ProducerFenced);
    second.write(&world, &topic, 0, "alive").await.expect("written");
    assert_eq!(code(first.clone().end(&world, true).await), ErrorCode::ProducerFenced);
    second.end(&world, true).await.expect("committed");
    for (partition, wanted) in [(0, &["alive"][..]), (1, &[][..])] {
        let end = settled(&world, &topic, partition).await;
        assert_eq!(committed(&world, None, &topic, partition, end).await, wanted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_open_for_too_long_is_aborted() {
    let world = World::of(1).await;
    let topic = world.any().create("bills", 1, 1).await.expect("created");
    let mut tx = Transactor::begin(&world, "billing", 200).await.expect("begun");
    tx.write(&world, &topic, 0, "slow").await.expect("written");
    let end = settled(&world, &topic, 0).await;
    assert_eq!(committed(&world, None, &topic, 0, end).await, [""; 0]);
    assert_eq!(code(tx.write(&world, &topic, 0, "late").await), ErrorCode::ProducerFenced);
    assert_eq!(code(tx.clone().end(&world, true).await), ErrorCode::TransactionAborted);
    tx.end(&world, false).await.expect("it was aborted: the next one follows");
    // As long as nobody took it over, its producer goes on.
    let mut done = false;
    for _ in 0..50 {
        // Two hundred milliseconds may be too short on a busy machine.
        done = tx.write(&world, &topic, 0, "quick").await.is_ok() && tx.clone().end(&world, true).await.is_ok();
        if done {
            break;
        }
        tx.end(&world, false).await.expect("aborted");
    }
    assert!(done);
    let end = settled(&world, &topic, 0).await;
    assert_eq!(committed(&world, None, &topic, 0, end).await, ["quick"]);
}

/// How a coordinator goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaves {
    /// It is killed.
    Dies,
    /// It hands over to another one, and stays.
    HandsOver,
}

impl Leaves {
    async fn leave(self, world: &mut World, broker: i32) {
        match self {
            Leaves::Dies => world.kill(broker).await,
            Leaves::HandsOver => world.hand_over("__transaction_state", 0, broker % 3 + 1).await,
        }
    }
}

/// One transaction after the other, of each of which the coordinator leaves at another step.
async fn a_coordinator_leaves_at_every_step(how: Leaves) {
    let mut world = World::places(3).await;
    for id in 1..=3 {
        world.set(id, "cluster.internal_partitions", "1");
    }
    world.start_all(&[1, 2, 3]).await;
    let topic = world.any().create("bills", 3, 3).await.expect("created");
    let mut tx = Transactor::begin(&world, "billing", LONG_MS).await.expect("begun");
    world.healthy().await;
    let mut wanted = Vec::new();
    for step in ["beginning", "begun", "written", "deciding", "decided", "aborting"] {
        let value = format!("{step} 1");
        let leaves = coordinator(&world, "billing").await;
        if step == "beginning" {
            // The same producer goes on under another epoch, whether the first call was carried out or not.
            let mut asked = transactions(&world, leaves);
            let request = pb::InitTransactionsRequest { transactional_id: tx.id.clone(), timeout_ms: LONG_MS };
            let asking = tokio::spawn(async move { asked.init_transactions(request).await });
            how.leave(&mut world, leaves).await;
            drop(asking.await);
            let next = Transactor::begin(&world, "billing", LONG_MS).await.expect("begun anew");
            assert_eq!(next.producer, tx.producer);
            assert!(next.epoch > tx.epoch);
            tx = next;
        }
        if step == "begun" {
            how.leave(&mut world, leaves).await;
        }
        tx.write(&world, &topic, 0, &value).await.expect("written");
        if step == "written" {
            how.leave(&mut world, leaves).await;
        }
        let second = format!("{step} 2");
        for partition in 1..3 {
            tx.write(&world, &topic, partition, &second).await.expect("written");
        }
        let commit = step != "aborting";
        let before = tx.clone();
        match step {
            "deciding" | "aborting" => {
                // The answer may be lost, and the decision not.
                let mut asked = transactions(&world, leaves);
                let request = pb::EndTransactionRequest { transaction: Some(tx.reference()), commit };
                let asking = tokio::spawn(async move { asked.end_transaction(request).await });
                how.leave(&mut world, leaves).await;
                drop(asking.await);
                tx.end(&world, commit).await.expect("decided");
            }
            _ => tx.end(&world, commit).await.expect("decided"),
        }
        if step == "decided" {
            // Its markers are being written.
            how.leave(&mut world, leaves).await;
        }
        before.clone().end(&world, commit).await.expect("the same again");
        assert_eq!(code(before.clone().end(&world, !commit).await), ErrorCode::InvalidTransactionState);
        if commit {
            wanted.push((value, second));
        }
        if how == Leaves::Dies {
            world.start(leaves).await;
        }
        world.healthy().await;
    }
    for partition in 0..3 {
        let end = settled(&world, &topic, partition).await;
        let wanted: Vec<&String> =
            wanted.iter().map(|(first, others)| if partition == 0 { first } else { others }).collect();
        for at in [None, Some(1), Some(2), Some(3)] {
            let seen = committed(&world, at, &topic, partition, end).await;
            assert_eq!(seen.iter().collect::<Vec<_>>(), wanted, "partition {partition} at {at:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_may_die_at_every_step() {
    a_coordinator_leaves_at_every_step(Leaves::Dies).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_may_hand_over_at_every_step() {
    a_coordinator_leaves_at_every_step(Leaves::HandsOver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_over_200_partitions_whose_leaders_die_one_after_another() {
    const PARTITIONS: i32 = 200;
    let mut world = World::of(3).await;
    let topic = world.any().create("bills", PARTITIONS, 3).await.expect("created");
    let mut tx = Transactor::begin(&world, "billing", LONG_MS).await.expect("begun");
    world.healthy().await;
    for (round, dies) in [(0, 1), (1, 2), (2, 3)] {
        for partition in 0..PARTITIONS {
            if partition == PARTITIONS / 2 {
                world.kill(dies).await;
            }
            tx.write(&world, &topic, partition, &format!("round {round}")).await.expect("written");
        }
        // One that is aborted in between, with whoever is left.
        tx.end(&world, round != 1).await.expect("decided");
        world.start(dies).await;
    }
    for partition in 0..PARTITIONS {
        let end = settled(&world, &topic, partition).await;
        let seen = committed(&world, None, &topic, partition, end).await;
        assert_eq!(seen, ["round 0", "round 2"], "partition {partition}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_deleted_does_not_hold_its_transaction_back() {
    let world = World::of(1).await;
    let topic = world.any().create("bills", 1, 1).await.expect("created");
    let gone = world.any().create("gone", 1, 1).await.expect("created");
    let mut tx = Transactor::begin(&world, "billing", LONG_MS).await.expect("begun");
    tx.write(&world, &gone, 0, "lost").await.expect("written");
    tx.write(&world, &topic, 0, "kept").await.expect("written");
    world.any().delete("gone").await.expect("deleted");
    tx.end(&world, true).await.expect("committed");
    tx.write(&world, &topic, 0, "next").await.expect("the next one begins once all is ended");
    tx.end(&world, true).await.expect("committed");
    let end = settled(&world, &topic, 0).await;
    assert_eq!(committed(&world, None, &topic, 0, end).await, ["kept", "next"]);
}

/// The committed offset of the group, -1 where there is none.
async fn committed_offset(world: &World, group: &str, topic: &Topic, require_stable: bool) -> Result<i64, Error> {
    let partitions = pb::TopicPartitions { topic_id: topic.id.clone(), partitions: vec![0], topic: String::new() };
    let request = pb::FetchOffsetsRequest {
        group: group.to_owned(),
        partitions: vec![partitions],
        require_stable,
        ..Default::default()
    };
    let mut groups = GroupsClient::new(channel(world, 1));
    let answer = soon("offsets", groups.fetch_offsets(request)).await.map_err(error_of)?.into_inner();
    match &answer.offsets[0].error {
        Some(error) => Err(Error::from_detail(error)),
        None => Ok(answer.offsets[0].offset),
    }
}

async fn commit_offset(
    world: &World,
    group: &str,
    tx: pb::TransactionRef,
    topic: &Topic,
    offset: i64,
) -> Result<(), Error> {
    let offset = pb::CommitOffset { topic_id: topic.id.clone(), partition: 0, offset, ..Default::default() };
    let request = pb::CommitOffsetsRequest {
        group: group.to_owned(),
        offsets: vec![offset],
        transaction: Some(tx),
        ..Default::default()
    };
    until("an answer of the group's coordinator", async || {
        let mut groups = GroupsClient::new(channel(world, 1));
        match soon("commit", groups.commit_offsets(request.clone())).await.map_err(error_of) {
            Ok(answer) => Ok(match answer.into_inner().errors.first().and_then(|row| row.error.clone()) {
                Some(error) => Err(Error::from_detail(&error)),
                None => Ok(()),
            }),
            Err(error) if error.is_retriable() => Err(error.to_string()),
            Err(error) => Ok(Err(error)),
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn consumed_offsets_are_committed_with_their_transaction_or_not_at_all() {
    let world = World::of(1).await;
    let orders = world.any().create("orders", 1, 1).await.expect("created");
    let bills = world.any().create("bills", 1, 1).await.expect("created");
    for number in 0..6 {
        world.produce(&orders, 0, &number.to_string()).await;
    }
    until("the group's coordinator", async || {
        let kind = pb::CoordinatorKind::Group.into();
        let request = pb::FindCoordinatorsRequest { kind, keys: vec!["billing".to_owned()] };
        let mut client = pb::coordinators_client::CoordinatorsClient::new(channel(&world, 1));
        let found = client.find_coordinators(request).await.map_err(|status| status.to_string())?.into_inner();
        found.coordinators[0].broker.is_some().then_some(()).ok_or_else(|| format!("{found:?}"))
    })
    .await;
    let mut tx = Transactor::begin(&world, "billing-0", LONG_MS).await.expect("begun");
    tx.write(&world, &bills, 0, "one").await.expect("written");
    commit_offset(&world, "billing", tx.reference(), &orders, 3).await.expect("pending");
    assert_eq!(committed_offset(&world, "billing", &orders, false).await, Ok(-1), "nothing counts yet");
    let first = tx.clone();
    tx.end(&world, true).await.expect("committed");
    let stable = async || match committed_offset(&world, "billing", &orders, true).await {
        Ok(offset) => Ok(offset),
        Err(error) => Err(error.to_string()),
    };
    assert_eq!(until("the offset", stable).await, 3);
    // Nothing of a transaction that is over is taken.
    let late = commit_offset(&world, "billing", first.reference(), &orders, 5).await;
    assert_eq!(code(late), ErrorCode::ProducerFenced);
    commit_offset(&world, "billing", tx.reference(), &orders, 5).await.expect("pending");
    let pending = committed_offset(&world, "billing", &orders, true).await;
    assert_eq!(code(pending), ErrorCode::UnstableOffsets);
    tx.end(&world, false).await.expect("aborted");
    assert_eq!(until("the offset", stable).await, 3, "as if the second had never been");
}
