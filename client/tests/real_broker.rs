//! The client against a real broker, in this process.

mod support;

use std::time::Duration;

use flowstone_client::testkit::TestBroker;
use flowstone_client::{Client, Compression, NewTopic, Record, StartAt, StopAt};
use futures::StreamExt;
use support::within;

async fn topic(broker: &TestBroker, partitions: i32) -> Client {
    let client = broker.client().await.unwrap();
    client.admin().create_topic(NewTopic::new("t").partitions(partitions)).await.unwrap();
    client
}

#[tokio::test]
async fn records_come_back_as_they_went_in() {
    let broker = TestBroker::start().await.unwrap();
    let client = topic(&broker, 1).await;
    for compression in Compression::ALL {
        let producer = client.producer().compression(compression).build().await.unwrap();
        producer.send(Record::to("t").key("k").value("v").timestamp_millis(1234)).await.unwrap().await.unwrap();
        drop(producer.send(Record::to("t").key("").value("")).await.unwrap());
        drop(producer.send(Record::to("t")).await.unwrap());
        let headers =
            Record::to("t").value("h").header("a", "1").header("b", None::<&str>).header("a", "").header("", "x");
        drop(producer.send(headers).await.unwrap());
        drop(producer.send(Record::to("t").value(vec![7; 300_000])).await.unwrap());
        producer.flush().await.unwrap();
    }
    let mut consumer = client.consumer().topic("t").stop_at(StopAt::End).build().await.unwrap();
    for _ in Compression::ALL {
        let mut records = Vec::new();
        for _ in 0..5 {
            records.push(within("a record", consumer.next_record()).await.unwrap().unwrap());
        }
        let [plain, empty, null, headers, large] = &records[..] else { panic!() };
        assert_eq!((plain.key_bytes(), plain.value_bytes()), (Some(&b"k"[..]), Some(&b"v"[..])));
        assert_eq!((plain.timestamp, &*plain.topic, plain.partition), (1234, "t", 0));
        assert_eq!((empty.key_bytes(), empty.value_bytes()), (Some(&b""[..]), Some(&b""[..])));
        assert_eq!((null.key_bytes(), null.value_bytes()), (None, None));
        let pairs: Vec<(&[u8], Option<&[u8]>)> = headers.headers.iter().map(|(k, v)| (&**k, v.as_deref())).collect();
        assert_eq!(pairs, [(&b"a"[..], Some(&b"1"[..])), (b"b", None), (b"a", Some(b"")), (b"", Some(b"x"))]);
        assert_eq!(large.value_bytes(), Some(&vec![7; 300_000][..]));
    }
    assert!(within("the end", consumer.next()).await.is_none());
    broker.stop().await;
}

#[tokio::test]
async fn start_positions() {
    let broker = TestBroker::start().await.unwrap();
    let client = topic(&broker, 1).await;
    let producer = client.producer().build().await.unwrap();
    let mut offsets = Vec::new();
    for number in 0..10 {
        let record = Record::to("t").value(number.to_string()).timestamp_millis(1000 * number);
        offsets.push(producer.send(record).await.unwrap().await.unwrap().offset);
    }
    let first = async |start_at: StartAt| {
        let mut consumer = client.consumer().topic("t").start_at(start_at).stop_at(StopAt::End).build().await.unwrap();
        within("a record", consumer.next_record()).await.map(|record| record.unwrap().value.unwrap())
    };
    assert_eq!(first(StartAt::Earliest).await.unwrap(), "0");
    assert_eq!(first(StartAt::Offset(offsets[4])).await.unwrap(), "4");
    assert_eq!(first(StartAt::Timestamp(6500)).await.unwrap(), "7");
    assert_eq!(first(StartAt::FromEnd(3)).await.unwrap(), "7");
    assert_eq!(first(StartAt::Latest).await, None);
    broker.stop().await;
}

#[tokio::test]
async fn a_restarted_broker_is_found_again() {
    let mut broker = TestBroker::start().await.unwrap();
    let client = topic(&broker, 2).await;
    let producer = client.producer().build().await.unwrap();
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    for round in 0..3 {
        for number in 0..20 {
            let record = Record::to("t").partition(number % 2).value(format!("{round} {number}"));
            drop(producer.send(record).await.unwrap());
        }
        within("the flush", producer.flush()).await.unwrap();
        let mut seen = 0;
        while seen < 20 {
            let batch = within("a batch", consumer.next_batch()).await.unwrap().unwrap();
            for record in &batch {
                let text = std::str::from_utf8(record.value_bytes().unwrap()).unwrap();
                assert!(text.starts_with(&format!("{round} ")), "{text} in round {round}");
                seen += 1;
            }
        }
        assert_eq!(seen, 20);
        within("the restart", broker.restart()).await.unwrap();
    }
    producer.close(Duration::from_secs(10)).await.unwrap();
    broker.stop().await;
}
