//! The consumer against a broker that forgets, moves and trims on command.

mod support;

use std::time::Duration;

use flowstone_client::{
    Acks, Client, Compression, Consumer, ErrorCode, OnOutOfRange, Record, RecordBatch, StartAt, StopAt,
};
use futures::StreamExt;
use support::fake_broker::FakeBroker;
use support::proxy::Proxy;
use support::{until, within};

async fn client(broker: &FakeBroker) -> Client {
    Client::connect(broker.address.to_string()).await.unwrap()
}

/// Numbers in `range` as values, so many to a batch, partition by partition in turn.
async fn fill(client: &Client, partitions: i32, range: std::ops::Range<i32>, per_batch: i32) {
    let producer = client.producer().linger(Duration::from_secs(30)).build().await.unwrap();
    for number in range {
        let record = Record::to("t").partition(number % partitions).value(number.to_string());
        drop(producer.send(record).await.unwrap());
        if number % per_batch == per_batch - 1 {
            producer.flush().await.unwrap();
        }
    }
    producer.close(Duration::from_secs(30)).await.unwrap();
}

fn number(bytes: Option<&[u8]>) -> i64 {
    std::str::from_utf8(bytes.unwrap()).unwrap().parse().unwrap()
}

fn numbers(batch: &RecordBatch) -> Vec<i64> {
    batch.iter().map(|record| number(record.value_bytes())).collect()
}

async fn next(consumer: &mut Consumer) -> i64 {
    let record = within("a record", consumer.next_record()).await.unwrap().unwrap();
    assert_eq!(consumer.position(&record.topic, record.partition).unwrap(), record.offset + 1);
    number(record.value_bytes())
}

#[tokio::test]
async fn every_record_of_every_partition_comes_once_in_order() {
    let broker = FakeBroker::start(&[("t", 3)]).await;
    let client = client(&broker).await;
    fill(&client, 3, 0..300, 30).await;
    let consumer = client.consumer().topic("t").stop_at(StopAt::End).build().await.unwrap();
    let records: Vec<_> = within("all records", consumer.collect::<Vec<_>>()).await;
    assert_eq!(records.len(), 300);
    let mut last = [-1; 3];
    for record in records {
        let record = record.unwrap();
        let last = &mut last[record.partition as usize];
        assert_eq!(record.offset, *last + 1);
        *last = record.offset;
        assert_eq!(number(record.value_bytes()), record.offset * 3 + i64::from(record.partition));
    }
}

#[tokio::test]
async fn batches_and_single_records_mix() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    fill(&client, 1, 0..20, 10).await;
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    assert_eq!([next(&mut consumer).await, next(&mut consumer).await], [0, 1]);
    let batch = within("a batch", consumer.next_batch()).await.unwrap().unwrap();
    assert_eq!(numbers(&batch), (2..10).collect::<Vec<_>>());
    assert_eq!((batch.topic(), batch.partition(), batch.next_offset(), batch.high_watermark()), ("t", 0, 10, 20));
    assert_eq!(consumer.position("t", 0).unwrap(), 10);
    assert_eq!(next(&mut consumer).await, 10);
    assert_eq!(consumer.high_watermark("t", 0).unwrap(), Some(20));
    assert_eq!(consumer.end_offsets().await.unwrap()[0].offset, 20);
}

#[tokio::test]
async fn seeking_goes_anywhere_and_forgets_what_is_under_way() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    fill(&client, 1, 0..1000, 10).await;
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    for target in [0, 500, 13, 999, 13, 14, 0] {
        consumer.seek("t", 0, target).unwrap();
        assert_eq!(consumer.position("t", 0).unwrap(), target);
        assert_eq!(next(&mut consumer).await, target);
        if target < 999 {
            assert_eq!(next(&mut consumer).await, target + 1);
        }
    }
    consumer.seek_to("t", 0, StartAt::FromEnd(2)).await.unwrap();
    assert_eq!(next(&mut consumer).await, 998);
    assert_eq!(consumer.seek("t", 1, 0).unwrap_err().code(), ErrorCode::UnknownPartition);
    assert_eq!(consumer.seek("t", 0, -1).unwrap_err().code(), ErrorCode::InvalidRequest);
}

#[tokio::test]
async fn a_paused_partition_is_silent_and_goes_on_where_it_was() {
    let broker = FakeBroker::start(&[("t", 2)]).await;
    let client = client(&broker).await;
    fill(&client, 2, 0..40, 4).await;
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    // In the middle of a batch of partition 0.
    while next(&mut consumer).await % 2 != 0 {}
    let at = consumer.position("t", 0).unwrap();
    consumer.pause("t", 0).unwrap();
    // What happens to the other does not wake it.
    consumer.pause("t", 1).unwrap();
    consumer.resume("t", 1).unwrap();
    let mut others = 20 - consumer.position("t", 1).unwrap();
    while others > 0 {
        assert_eq!(next(&mut consumer).await % 2, 1);
        others -= 1;
    }
    let silent = tokio::time::timeout(Duration::from_millis(50), consumer.next_record()).await;
    assert!(silent.is_err(), "{silent:?}");
    assert_eq!(consumer.position("t", 0).unwrap(), at);
    consumer.resume("t", 0).unwrap();
    for offset in at..20 {
        assert_eq!(next(&mut consumer).await, offset * 2);
    }
}

#[tokio::test]
async fn a_pause_behind_the_last_fetch_loses_nothing() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    fill(&client, 1, 0..10, 10).await;
    let mut consumer = client.consumer().topic("t").stop_at(StopAt::End).build().await.unwrap();
    // One batch holds all: with its first record in hand, the partition is fetched to its end.
    assert_eq!(next(&mut consumer).await, 0);
    consumer.pause("t", 0).unwrap();
    consumer.resume("t", 0).unwrap();
    for value in 1..10 {
        assert_eq!(next(&mut consumer).await, value);
    }
    assert!(within("the end", consumer.next_record()).await.is_none());
}

#[tokio::test]
async fn reading_stops_where_it_should() {
    let broker = FakeBroker::start(&[("t", 2)]).await;
    let client = client(&broker).await;
    fill(&client, 2, 0..40, 8).await;
    let read = async |stop_at: StopAt, start_at: StartAt| {
        let consumer = client.consumer().topic("t").start_at(start_at).stop_at(stop_at).build().await.unwrap();
        within("the end", consumer.collect::<Vec<_>>()).await.len()
    };
    assert_eq!(read(StopAt::End, StartAt::Earliest).await, 40);
    assert_eq!(read(StopAt::Offset(3), StartAt::Earliest).await, 6);
    assert_eq!(read(StopAt::Offset(3), StartAt::Offset(2)).await, 2);
    assert_eq!(read(StopAt::Offset(3), StartAt::Offset(7)).await, 0);
    assert_eq!(read(StopAt::End, StartAt::Latest).await, 0);
    assert_eq!(read(StopAt::End, StartAt::FromEnd(5)).await, 10);
}

#[tokio::test]
async fn an_explicit_partition_is_read_alone_from_its_own_start() {
    let broker = FakeBroker::start(&[("t", 3)]).await;
    let client = client(&broker).await;
    fill(&client, 3, 0..30, 30).await;
    let builder = client.consumer().partition("t", 2).partition_at("t", 1, StartAt::Offset(8));
    let consumer = builder.stop_at(StopAt::End).build().await.unwrap();
    let records: Vec<_> = within("all", consumer.collect::<Vec<_>>()).await;
    let mut values: Vec<i64> = records.into_iter().map(|record| number(record.unwrap().value_bytes())).collect();
    values.sort_unstable();
    assert_eq!(values, [2, 5, 8, 11, 14, 17, 20, 23, 25, 26, 28, 29]);
    for (topic, partition, code) in [
        ("t", 3, ErrorCode::UnknownPartition),
        ("t", -1, ErrorCode::UnknownPartition),
        ("no", 0, ErrorCode::UnknownTopic),
    ] {
        let error = client.consumer().partition(topic, partition).build().await.unwrap_err();
        assert_eq!(error.code(), code);
    }
    assert_eq!(client.consumer().build().await.unwrap_err().code(), ErrorCode::InvalidRequest);
}

#[tokio::test]
async fn out_of_range_is_an_error_or_a_jump_as_wanted() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    fill(&client, 1, 0..20, 10).await;
    broker.trim("t", 0, 10);
    let builder = client.consumer().topic("t").start_at(StartAt::Offset(3));

    let mut consumer = builder.clone().build().await.unwrap();
    let error = within("the error", consumer.next_record()).await.unwrap().unwrap_err();
    assert_eq!((error.code(), error.partition()), (ErrorCode::OffsetOutOfRange, Some(0)));
    assert!(error.to_string().contains("10..20"), "{error}");
    assert!(within("the end", consumer.next_record()).await.is_none(), "nothing more comes until a seek");
    consumer.seek("t", 0, 15).unwrap();
    assert_eq!(next(&mut consumer).await, 15);

    let mut consumer = builder.clone().on_out_of_range(OnOutOfRange::Earliest).build().await.unwrap();
    assert_eq!(next(&mut consumer).await, 10);

    let mut consumer = builder.on_out_of_range(OnOutOfRange::Latest).build().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(50), consumer.next_record()).await.is_err());
    fill(&client, 1, 20..21, 1).await;
    assert_eq!(next(&mut consumer).await, 20);
}

#[tokio::test]
async fn a_consumer_that_stops_reading_costs_its_prefetch_and_no_more() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    let producer = client.producer().acks(Acks::Leader).batch_bytes(10_000).build().await.unwrap();
    for _ in 0..3000 {
        drop(producer.send(Record::to("t").value(vec![b'1'; 1000])).await.unwrap());
    }
    producer.flush().await.unwrap();
    let prefetch = 100_000;
    let mut consumer = client.consumer().topic("t").prefetch_bytes(prefetch).build().await.unwrap();
    let mut taken = 0;
    for _ in 0..5 {
        taken += within("a batch", consumer.next_batch()).await.unwrap().unwrap().len() * 1000;
    }
    // What comes while nobody reads is what the credit allows, and one batch.
    let most = (taken + prefetch + 3 * 10_200) as u64;
    let mut before = 0;
    until("the broker to run out of credit", || {
        let now = broker.fetched_bytes();
        std::mem::replace(&mut before, now) == now && now > taken as u64
    })
    .await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(broker.fetched_bytes() <= most, "{} of at most {most}", broker.fetched_bytes());
    // It goes on as if nothing had been.
    let mut records = 5 * 9;
    while records < 3000 {
        records += within("a batch", consumer.next_batch()).await.unwrap().unwrap().len();
    }
    assert_eq!(consumer.position("t", 0).unwrap(), 3000);
}

#[tokio::test]
async fn cut_connections_skip_and_repeat_nothing() {
    let broker = FakeBroker::start(&[("t", 2)]).await;
    let proxy = Proxy::start(broker.address).await;
    fill(&client(&broker).await, 2, 0..2000, 20).await;
    let broker = broker.advertise(proxy.address);
    let client = Client::connect(proxy.address.to_string()).await.unwrap();
    let builder = client.consumer().topic("t").prefetch_bytes(2000).stop_at(StopAt::End);
    let mut consumer = builder.build().await.unwrap();
    let mut expected = [0, 0];
    let mut seen = 0;
    while let Some(batch) = within("a batch", consumer.next_batch()).await {
        let batch = batch.unwrap();
        for record in &batch {
            let expected = &mut expected[record.partition() as usize];
            assert_eq!(record.offset(), *expected);
            *expected += 1;
        }
        seen += batch.len();
        if seen % 300 < 10 {
            proxy.cut();
        }
    }
    assert_eq!(expected, [1000, 1000]);
    assert!(broker.fetch_sessions() > 3, "the cuts were real: {}", broker.fetch_sessions());
}

#[tokio::test]
async fn a_broker_that_was_away_is_read_on_when_it_is_back() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let proxy = Proxy::start(broker.address).await;
    let direct = client(&broker).await;
    let broker = broker.advertise(proxy.address);
    let client = Client::connect(proxy.address.to_string()).await.unwrap();
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    fill(&direct, 1, 0..1, 1).await;
    assert_eq!(next(&mut consumer).await, 0);
    proxy.go_dark();
    let silent = tokio::time::timeout(Duration::from_millis(200), consumer.next_record()).await;
    assert!(silent.is_err(), "{silent:?}");
    proxy.heal();
    fill(&client, 1, 1..2, 1).await;
    assert_eq!(next(&mut consumer).await, 1);
    drop(broker);
}

#[tokio::test]
async fn a_deleted_topic_is_told_and_a_new_partition_is_read() {
    let broker = FakeBroker::start(&[("t", 1), ("gone", 1)]).await;
    let client = client(&broker).await;
    fill(&client, 1, 0..1, 1).await;
    let mut consumer = client.consumer().topics(["t", "gone"]).start_at(StartAt::Latest).build().await.unwrap();
    broker.add_partition("t");
    let producer = client.producer().build().await.unwrap();
    within("the new partition", async {
        while producer.send(Record::to("t").partition(1).value("7")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    producer.flush().await.unwrap();
    assert_eq!(next(&mut consumer).await, 7);
    broker.delete_topic("gone");
    let error = within("the error", consumer.next_record()).await.unwrap().unwrap_err();
    assert_eq!((error.code(), error.topic()), (ErrorCode::UnknownTopic, Some("gone")));
    let record = Record::to("t").partition(1).value("8");
    producer.send(record).await.unwrap().await.unwrap();
    assert_eq!(next(&mut consumer).await, 8);
}

#[tokio::test]
async fn dropping_the_future_of_a_batch_loses_nothing() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    fill(&client, 1, 0..300, 3).await;
    let mut consumer = client.consumer().topic("t").stop_at(StopAt::End).build().await.unwrap();
    let mut seen = Vec::new();
    loop {
        // Polled a few times, each future dropped.
        let polled = futures::poll!(std::pin::pin!(consumer.next_batch()));
        match polled {
            std::task::Poll::Ready(Some(batch)) => seen.extend(numbers(&batch.unwrap())),
            std::task::Poll::Ready(None) => break,
            std::task::Poll::Pending => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    assert_eq!(seen, (0..300).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_decompresses_beyond_the_cap_is_refused() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    let producer = client.producer().compression(Compression::Zstd).build().await.unwrap();
    producer.send(Record::to("t").value(vec![b'0'; 500_000])).await.unwrap().await.unwrap();
    producer.send(Record::to("t").value("1")).await.unwrap().await.unwrap();
    let mut consumer = client.consumer().topic("t").decompressed_bytes_max(100_000).build().await.unwrap();
    let error = within("the error", consumer.next_record()).await.unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::BatchTooLarge);
    consumer.seek("t", 0, 1).unwrap();
    assert_eq!(next(&mut consumer).await, 1);
}
