//! Transactions against a real broker, in this process.

mod support;

use std::cell::Cell;
use std::time::Duration;

use flowstone_client::testkit::TestBroker;
use flowstone_client::{
    Client, ErrorCode, ErrorKind, GroupConsumer, Isolation, NewTopic, Record, StopAt, TransactionState,
    TransactionalBuilder, TransactionalProducer,
};
use futures::StreamExt;
use support::within;

async fn start(partitions: i32) -> (TestBroker, Client) {
    let broker = TestBroker::with_config(&[("cluster.internal_partitions", "2")]).await.unwrap();
    let client = broker.client().await.unwrap();
    client.admin().create_topic(NewTopic::new("t").partitions(partitions)).await.unwrap();
    (broker, client)
}

fn producer(client: &Client, id: &str) -> TransactionalBuilder {
    client.producer().transactional_id(id)
}

async fn build(client: &Client, id: &str) -> TransactionalProducer {
    within("a producer", producer(client, id).build()).await.unwrap()
}

fn to(partition: i32, value: &str) -> Record<'_> {
    Record::to("t").partition(partition).value(value)
}

/// Everything that readers of this level see, in order of partitions.
async fn values(client: &Client, isolation: Isolation) -> Vec<String> {
    let consumer = client.consumer().topic("t").isolation(isolation).stop_at(StopAt::End).build().await.unwrap();
    let records = within("all records", consumer.collect::<Vec<_>>()).await;
    let mut values: Vec<_> = records
        .into_iter()
        .map(|record| record.unwrap())
        .map(|record| (record.partition, record.offset, String::from_utf8(record.value.unwrap().to_vec()).unwrap()))
        .collect();
    values.sort();
    values.into_iter().map(|(.., value)| value).collect()
}

async fn committed(client: &Client) -> Vec<String> {
    values(client, Isolation::ReadCommitted).await
}

/// Waits until readers of committed records see exactly this.
async fn until_committed(client: &Client, wanted: &[&str]) {
    within("what was committed", async {
        while committed(client).await != wanted {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn all_or_nothing_over_sixteen_partitions() {
    let (broker, client) = start(16).await;
    let mut tx = build(&client, "a").await;
    let names: Vec<String> = (0..16).map(|partition| format!("{partition:02}")).collect();
    let open = tx.begin().await.unwrap();
    for (partition, name) in names.iter().enumerate() {
        drop(open.send(to(partition as i32, name)).await.unwrap());
    }
    within("the flush", open.flush()).await.unwrap();
    assert_eq!(committed(&client).await, Vec::<String>::new(), "not yet");
    assert_eq!(values(&client, Isolation::ReadUncommitted).await.len(), 16);
    within("the commit", open.commit()).await.unwrap();
    until_committed(&client, &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    // Aborted, nothing of it is seen by those who ask for what is committed, and all by the others.
    let open = tx.begin().await.unwrap();
    for partition in 0..16 {
        drop(open.send(to(partition, "x")).await.unwrap());
    }
    within("the flush", open.flush()).await.unwrap();
    within("the abort", open.abort()).await.unwrap();
    within("the next", tx.transaction(async |t| t.send(to(3, "03 later")).await.map(drop))).await.unwrap();
    let mut wanted: Vec<&str> = names.iter().map(String::as_str).collect();
    wanted.insert(4, "03 later");
    until_committed(&client, &wanted).await;
    assert_eq!(values(&client, Isolation::ReadUncommitted).await.len(), 33);
    // One in which nothing happened is fine too.
    within("nothing", tx.transaction(async |_| Ok(()))).await.unwrap();
    tx.close(Duration::from_secs(30)).await.unwrap();
    broker.stop().await;
}

#[tokio::test]
async fn a_successor_fences_and_aborts_what_was_left_open() {
    let (broker, client) = start(1).await;
    let mut zombie = build(&client, "a").await;
    let open = zombie.begin().await.unwrap();
    within("the ack", open.send(to(0, "zombie")).await.unwrap()).await.unwrap();
    let mut successor = build(&client, "a").await;
    within("the successor's", successor.transaction(async |t| t.send(to(0, "successor")).await.map(drop)))
        .await
        .unwrap();
    let fenced = within("the commit", open.commit()).await.unwrap_err();
    assert_eq!((fenced.code(), fenced.kind()), (ErrorCode::ProducerFenced, ErrorKind::Fatal), "{fenced}");
    // For good: it does not fence its successor in turn.
    for _ in 0..2 {
        assert_eq!(zombie.begin().await.unwrap_err().code(), ErrorCode::ProducerFenced);
        let again = zombie.transaction(async |t| t.send(to(0, "zombie")).await.map(drop)).await.unwrap_err();
        assert_eq!(again.code(), ErrorCode::ProducerFenced);
    }
    within("the successor's", successor.transaction(async |t| t.send(to(0, "again")).await.map(drop))).await.unwrap();
    until_committed(&client, &["successor", "again"]).await;
    broker.stop().await;
}

#[tokio::test]
async fn one_that_was_open_for_too_long_runs_again() {
    let (broker, client) = start(2).await;
    let mut tx = producer(&client, "a").transaction_timeout(Duration::from_millis(500)).build().await.unwrap();
    let admin = client.admin();
    let runs = Cell::new(0);
    let ran = tx.transaction(async |t| {
        runs.set(runs.get() + 1);
        t.send(to(0, "kept")).await?.await?;
        // The first one waits until it is told to be over.
        while runs.get() == 1 && admin.describe_transaction("a").await?.summary.state != TransactionState::CompleteAbort
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(t.send(to(1, "whole")).await?);
        Ok(runs.get())
    });
    let ran = within("the transaction", ran).await.unwrap();
    assert!(ran >= 2, "the first was over before it was committed");
    until_committed(&client, &["kept", "whole"]).await;
    assert!(values(&client, Isolation::ReadUncommitted).await.len() >= 3);
    // Without another attempt it is told, and the producer goes on.
    let open = tx.begin().await.unwrap();
    within("the ack", open.send(to(0, "late")).await.unwrap()).await.unwrap();
    within("the timeout", async {
        while admin.describe_transaction("a").await.unwrap().summary.state != TransactionState::CompleteAbort {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let error = within("the commit", open.commit()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Abortable, "{error}");
    within("the next", tx.transaction(async |t| t.send(to(0, "next")).await.map(drop))).await.unwrap();
    until_committed(&client, &["kept", "next", "whole"]).await;
    broker.stop().await;
}

#[tokio::test]
async fn an_operators_abort_is_final() {
    let (broker, client) = start(1).await;
    let mut tx = build(&client, "a").await;
    let open = tx.begin().await.unwrap();
    within("the ack", open.send(to(0, "x")).await.unwrap()).await.unwrap();
    let listed = client.admin().list_transactions(None).await.unwrap();
    assert_eq!((listed.len(), listed[0].state), (1, TransactionState::Ongoing));
    client.admin().abort_transaction("a").await.unwrap();
    let error = within("the commit", open.commit()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ProducerFenced, "{error}");
    assert_eq!(committed(&client).await, Vec::<String>::new());
    broker.stop().await;
}

#[tokio::test]
async fn the_closures_own_errors_abort_and_are_returned() {
    let (broker, client) = start(1).await;
    let mut tx = build(&client, "a").await;
    let runs = Cell::new(0);
    let refused = tx.transaction(async |t| {
        runs.set(runs.get() + 1);
        drop(t.send(to(0, "x")).await?);
        t.send(Record::to("nowhere").value("x")).await.map(drop)
    });
    let refused = within("the transaction", refused).await.unwrap_err();
    assert_eq!((refused.code(), runs.get()), (ErrorCode::UnknownTopic, 1));
    // A record that no attempt would store is told as what it is, at once.
    let large = vec![b'x'; 3 << 20];
    let spoilt = tx.transaction(async |t| {
        runs.set(runs.get() + 1);
        drop(t.send(to(0, "beside it")).await?);
        t.send(Record::to("t").value(&large)).await.map(drop)
    });
    let spoilt = within("the transaction", spoilt).await.unwrap_err();
    assert!(matches!(spoilt.code(), ErrorCode::MessageTooLarge | ErrorCode::BatchTooLarge), "{spoilt}");
    assert_eq!((spoilt.kind(), runs.get()), (ErrorKind::Fatal, 2));
    // One that this side refuses fails alone.
    let mut small = client.producer().record_bytes_max(1000).transactional_id("b").build().await.unwrap();
    let alone = small.transaction(async |t| {
        let refused = t.send(Record::to("t").value(&large)).await.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::MessageTooLarge);
        t.send(to(0, "kept")).await.map(drop)
    });
    within("the transaction", alone).await.unwrap();
    within("the next", tx.transaction(async |t| t.send(to(0, "next")).await.map(drop))).await.unwrap();
    until_committed(&client, &["kept", "next"]).await;
    broker.stop().await;
}

#[tokio::test]
async fn one_that_was_dropped_is_aborted_by_the_next() {
    let (broker, client) = start(1).await;
    let mut tx = build(&client, "a").await;
    let open = tx.begin().await.unwrap();
    within("the ack", open.send(to(0, "dropped")).await.unwrap()).await.unwrap();
    drop(open.send(to(0, "dropped unsent")).await.unwrap());
    drop(open);
    within("the next", tx.transaction(async |t| t.send(to(0, "kept")).await.map(drop))).await.unwrap();
    until_committed(&client, &["kept"]).await;
    // Nobody waited for the answer to a commit: it counts as a whole, or it does not.
    let open = tx.begin().await.unwrap();
    within("the ack", open.send(to(0, "perhaps")).await.unwrap()).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_micros(1), open.commit()).await.is_err());
    within("the next", tx.transaction(async |t| t.send(to(0, "last")).await.map(drop))).await.unwrap();
    within("what was committed", async {
        loop {
            let seen = committed(&client).await;
            if seen == ["kept", "last"] || seen == ["kept", "perhaps", "last"] {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    // One that is closed leaves nothing open either.
    let open = tx.begin().await.unwrap();
    within("the ack", open.send(to(0, "closed")).await.unwrap()).await.unwrap();
    drop(open);
    tx.close(Duration::from_secs(30)).await.unwrap();
    let state = client.admin().describe_transaction("a").await.unwrap().summary.state;
    assert!(matches!(state, TransactionState::PrepareAbort | TransactionState::CompleteAbort), "{state:?}");
    broker.stop().await;
}

#[tokio::test]
async fn timeouts_that_make_no_sense_are_refused() {
    let (broker, client) = start(1).await;
    for timeout in [Duration::ZERO, Duration::from_secs(365 * 24 * 3600), Duration::from_secs(16 * 60)] {
        let error = producer(&client, "a").transaction_timeout(timeout).build().await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidTransactionTimeout, "{timeout:?}");
    }
    let error = producer(&client, "").build().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidTransactionalId);
    broker.stop().await;
}

#[tokio::test]
async fn a_restarted_broker_costs_time_and_no_more() {
    let (mut broker, client) = start(2).await;
    let mut tx = build(&client, "a").await;
    let mut wanted = Vec::new();
    for round in 0..3 {
        let value = round.to_string();
        let open = tx.begin().await.unwrap();
        within("the ack", open.send(to(0, &value)).await.unwrap()).await.unwrap();
        within("the restart", broker.restart()).await.unwrap();
        drop(open.send(to(0, &value)).await.unwrap());
        within("the commit", open.commit()).await.unwrap();
        wanted.extend([value.clone(), value]);
    }
    until_committed(&client, &wanted.iter().map(String::as_str).collect::<Vec<_>>()).await;
    broker.stop().await;
}

async fn copier(client: &Client) -> GroupConsumer {
    client.group("copiers").topic("in").join().await.unwrap()
}

async fn position(client: &Client) -> i64 {
    let group = client.admin().describe_group("copiers").await.unwrap();
    group.offsets.first().map_or(-1, |offset| offset.offset)
}

#[tokio::test]
async fn consumed_offsets_count_with_the_records_or_not_at_all() {
    let (broker, client) = start(1).await;
    client.admin().create_topic(NewTopic::new("in").partitions(1)).await.unwrap();
    let source = client.producer().build().await.unwrap();
    let feed = async |value: &'static str| source.send(Record::to("in").value(value)).await.unwrap().await.unwrap();
    feed("one").await;
    let mut group = copier(&client).await;
    let mut tx = build(&client, "copier").await;
    let batch = within("a batch", group.next_batch()).await.unwrap().unwrap();
    // Aborted: neither.
    let open = tx.begin().await.unwrap();
    drop(open.send(to(0, "thrown away")).await.unwrap());
    open.consumed(&batch);
    within("the abort", open.abort()).await.unwrap();
    // The group's own commits leave it alone, the one at the end too.
    assert!(tokio::time::timeout(Duration::from_millis(50), group.next_batch()).await.is_err());
    group.commit().await.unwrap();
    group.close(Duration::from_secs(30)).await.unwrap();
    assert!(position(&client).await < batch.next_offset());
    // Read again, by the next, and committed: both.
    let mut group = copier(&client).await;
    for value in ["one", "two"] {
        if value == "two" {
            feed("two").await;
        }
        let batch = within("a batch", group.next_batch()).await.unwrap().unwrap();
        let copied = tx.transaction(async |t| {
            for record in &batch {
                assert_eq!(record.value_bytes().unwrap(), value.as_bytes());
                drop(t.send(Record::to("t").value(record.value_bytes().unwrap())).await?);
            }
            t.consumed(&batch);
            Ok(())
        });
        within("the copy", copied).await.unwrap();
        within("the position", async {
            while position(&client).await != batch.next_offset() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
    until_committed(&client, &["one", "two"]).await;
    // Its batch is another's by now: the transaction is aborted, and does not run again.
    feed("three").await;
    let batch = within("a batch", group.next_batch()).await.unwrap().unwrap();
    group.close(Duration::from_secs(30)).await.unwrap();
    let runs = Cell::new(0);
    let late = tx.transaction(async |t| {
        runs.set(runs.get() + 1);
        drop(t.send(to(0, "late")).await?);
        t.consumed(&batch);
        Ok(())
    });
    let late = within("the transaction", late).await.unwrap_err();
    assert_eq!((late.code(), late.kind(), runs.get()), (ErrorCode::NotAssigned, ErrorKind::Abortable, 1), "{late}");
    until_committed(&client, &["one", "two"]).await;
    broker.stop().await;
}
