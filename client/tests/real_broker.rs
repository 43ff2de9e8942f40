//! The client against a real broker, in this process.

mod support;

use std::time::Duration;

use flowstone_client::testkit::TestBroker;
use flowstone_client::{
    AlterTopic, Client, Compression, ConfigSource, ErrorCode, NewTopic, OffsetSpec, OnOutOfRange, Record, StartAt,
    StopAt,
};
use futures::StreamExt;
use support::proxy::Proxy;
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

/// Values that were acknowledged at these offsets, and nothing else, lie in each partition, in the order sent.
async fn check_stored(client: &Client, sent: &[Vec<(i64, String)>]) {
    let consumer = client.consumer().topic("t").stop_at(StopAt::End).build().await.unwrap();
    let mut stored = vec![Vec::new(); sent.len()];
    for record in within("all records", consumer.collect::<Vec<_>>()).await {
        let record = record.unwrap();
        let value = String::from_utf8(record.value.unwrap().to_vec()).unwrap();
        stored[record.partition as usize].push((record.offset, value));
    }
    assert_eq!(stored, sent);
}

#[tokio::test]
async fn cut_connections_lose_nothing_double_nothing_and_keep_the_order() {
    let proxy = Proxy::start("127.0.0.1:1".parse().unwrap()).await;
    let address = proxy.address.to_string();
    let broker = TestBroker::with_config(&[("advertise.client", &address)]).await.unwrap();
    proxy.aim(broker.address().parse().unwrap());
    let client = topic(&broker, 2).await;
    let producer = client.producer().batch_bytes(300).build().await.unwrap();
    let mut acks = Vec::new();
    for number in 0..4000_usize {
        let value = number.to_string();
        let record = Record::to("t").partition(number as i32 % 2).value(&value);
        acks.push((producer.send(record).await.unwrap(), value));
        if number % 250 == 249 {
            within("an acknowledgement", &mut acks[number - 200].0).await.unwrap();
            proxy.cut();
        }
    }
    let mut sent = vec![Vec::new(); 2];
    for (ack, value) in acks {
        let at = within("an acknowledgement", ack).await.unwrap();
        sent[at.partition as usize].push((at.offset, value));
    }
    check_stored(&client, &sent).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_restart_in_the_middle_of_producing_costs_nothing() {
    let mut broker = TestBroker::start().await.unwrap();
    let client = topic(&broker, 2).await;
    let producer = client.producer().batch_bytes(300).build().await.unwrap();
    let mut acks = Vec::new();
    for number in 0..1500_usize {
        let value = number.to_string();
        let record = Record::to("t").partition(number as i32 % 2).value(&value);
        acks.push((producer.send(record).await.unwrap(), value));
        if number % 500 == 499 {
            within("an acknowledgement", &mut acks[number - 400].0).await.unwrap();
            within("the restart", broker.restart()).await.unwrap();
        }
    }
    let mut sent = vec![Vec::new(); 2];
    for (ack, value) in acks {
        let at = within("an acknowledgement", ack).await.unwrap();
        sent[at.partition as usize].push((at.offset, value));
    }
    check_stored(&client, &sent).await;
    broker.stop().await;
}

#[tokio::test]
async fn topics_from_creation_to_deletion() {
    let broker = TestBroker::start().await.unwrap();
    let client = broker.client().await.unwrap();
    let admin = client.admin();
    let checked = admin.create_topic(NewTopic::new("orders").partitions(3).validate_only(true)).await.unwrap();
    assert_eq!(checked.name, "orders");
    assert!(admin.list_topics().await.unwrap().is_empty());
    let topic = NewTopic::new("orders").partitions(3).config("retention.ms", "60000");
    let created = admin.create_topic(topic.clone()).await.unwrap();
    assert_eq!((created.partitions.len(), created.internal), (3, false));
    assert_eq!(admin.create_topic(topic).await.unwrap_err().code(), ErrorCode::TopicAlreadyExists);
    for (name, partitions, code) in [
        ("..", 1, ErrorCode::InvalidTopicName),
        ("a b", 1, ErrorCode::InvalidTopicName),
        ("none", 0, ErrorCode::InvalidPartitions),
        ("many", 1_000_000_000, ErrorCode::InvalidPartitions),
        ("__mine", 1, ErrorCode::InternalTopic),
    ] {
        let error = admin.create_topic(NewTopic::new(name).partitions(partitions)).await.unwrap_err();
        assert_eq!(error.code(), code, "{name}: {error}");
    }
    let listed = admin.list_topics().await.unwrap();
    assert_eq!((listed.len(), &listed[0].topic_id), (1, &created.topic_id));
    assert!(admin.list_all_topics().await.unwrap().iter().any(|topic| topic.internal));

    let altered = AlterTopic::new("orders").partitions(5).set("retention.bytes", "1000000").unset("retention.ms");
    admin.alter_topic(altered).await.unwrap();
    let described = admin.describe_topic("orders").await.unwrap();
    assert_eq!(described.partitions.len(), 5);
    let config = |key: &str| described.configs.iter().find(|config| config.key == key).unwrap();
    assert_eq!((&*config("retention.bytes").value, config("retention.bytes").source), ("1000000", ConfigSource::Topic));
    assert_ne!(config("retention.ms").source, ConfigSource::Topic);
    let fewer = admin.alter_topic(AlterTopic::new("orders").partitions(2)).await.unwrap_err();
    assert_eq!(fewer.code(), ErrorCode::InvalidPartitions);

    let cluster = admin.describe_cluster().await.unwrap();
    assert_eq!((cluster.brokers.len(), cluster.topics, cluster.partitions), (1, 1, 5));
    assert_eq!(cluster.cluster_id, client.cluster_id());

    admin.delete_topic("orders").await.unwrap();
    assert_eq!(admin.delete_topic("orders").await.unwrap_err().code(), ErrorCode::UnknownTopic);
    assert!(admin.describe_topic("orders").await.unwrap_err().is_not_found());
    let producer = client.producer().build().await.unwrap();
    assert!(producer.send(Record::to("orders").value("v")).await.unwrap_err().is_not_found());
    broker.stop().await;
}

#[tokio::test]
async fn offsets_count_data_and_positions_pass_control_records() {
    let mut broker = TestBroker::start().await.unwrap();
    let client = topic(&broker, 1).await;
    let producer = client.producer().build().await.unwrap();
    for number in 0..6 {
        producer.send(Record::to("t").value(number.to_string())).await.unwrap().await.unwrap();
        // Every restart leaves a control record.
        if number % 2 == 1 {
            within("the restart", broker.restart()).await.unwrap();
        }
    }
    let admin = client.admin();
    let end = &admin.topic_offsets("t", OffsetSpec::End).await.unwrap()[0];
    assert_eq!(end.records, 6);
    assert!(end.offset > 6, "{end:?}");
    let consumer =
        client.consumer().topic("t").start_at(StartAt::FromEnd(3)).stop_at(StopAt::End).build().await.unwrap();
    let last: Vec<_> = within("the last three", consumer.collect::<Vec<_>>()).await;
    let last: Vec<_> = last.into_iter().map(|record| record.unwrap().value.unwrap()).collect();
    assert_eq!(last, ["3", "4", "5"]);

    let third = admin.list_offsets(&[("t", 0, OffsetSpec::FromEnd(3))]).await.unwrap()[0].offset;
    assert_eq!(admin.trim("t", 0, third).await.unwrap(), third);
    let error = admin.trim("t", 0, end.offset + 100).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::OffsetOutOfRange);
    let builder = client.consumer().topic("t").start_at(StartAt::Offset(0));
    let mut consumer = builder.clone().build().await.unwrap();
    let error = within("the error", consumer.next_record()).await.unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::OffsetOutOfRange);
    assert!(error.to_string().contains(&third.to_string()), "it names the valid range: {error}");
    let mut consumer = builder.on_out_of_range(OnOutOfRange::Earliest).build().await.unwrap();
    assert_eq!(within("a record", consumer.next_record()).await.unwrap().unwrap().value.unwrap(), "3");
    assert_eq!(admin.list_offsets(&[("t", 9, OffsetSpec::End)]).await.unwrap_err().code(), ErrorCode::UnknownPartition);
    assert!(admin.trim_to_end("t", 0).await.unwrap() >= end.offset);
    broker.stop().await;
}

#[tokio::test]
async fn an_oversized_record_fails_alone() {
    let broker = TestBroker::start().await.unwrap();
    let client = broker.client().await.unwrap();
    let topic = NewTopic::new("t").config("max.message.bytes", "2000");
    client.admin().create_topic(topic).await.unwrap();
    let producer = client.producer().linger(Duration::from_secs(30)).build().await.unwrap();
    let mut acks = Vec::new();
    for number in 0..100_usize {
        let size = if number == 33 { 5000 } else { 20 };
        acks.push(producer.send(Record::to("t").value(vec![b'x'; size])).await.unwrap());
    }
    let mut stored = 0;
    for (ack, number) in acks.into_iter().zip(0..) {
        match within("an acknowledgement", ack).await {
            Ok(_) => stored += 1,
            Err(error) => assert_eq!((number, error.code()), (33, ErrorCode::BatchTooLarge)),
        }
    }
    assert_eq!(stored, 99);
    // Beyond what the broker takes as a message, too.
    let topic = NewTopic::new("u");
    client.admin().create_topic(topic).await.unwrap();
    let producer = client.producer().record_bytes_max(40 << 20).build().await.unwrap();
    let large = producer.send(Record::to("u").value(vec![b'x'; 20 << 20])).await.unwrap();
    let small = producer.send(Record::to("u").value("small")).await.unwrap();
    assert_eq!(within("the refusal", large).await.unwrap_err().code(), ErrorCode::MessageTooLarge);
    within("the other", small).await.unwrap();
    broker.stop().await;
}

#[tokio::test]
async fn bad_bytes_and_the_clusters_own_topics_are_refused() {
    let broker = TestBroker::start().await.unwrap();
    let client = topic(&broker, 1).await;
    let producer = client.producer().build().await.unwrap();
    let error = producer.send(Record::to("__cluster_metadata").value("v")).await.unwrap().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InternalTopic);
    let far = std::time::SystemTime::now() + Duration::from_secs(100 * 24 * 3600);
    let late = producer.send(Record::to("t").value("v").timestamp(far)).await.unwrap();
    let good = producer.send(Record::to("t").value("w")).await.unwrap();
    assert_eq!(within("the refusal", late).await.unwrap_err().code(), ErrorCode::InvalidTimestamp);
    within("its neighbour", good).await.unwrap();
    // The cluster's own topics can be read.
    let builder = client.consumer().topic("__cluster_metadata").stop_at(StopAt::End);
    let records: Vec<_> = within("the metadata", builder.build().await.unwrap().collect::<Vec<_>>()).await;
    assert!(!records.is_empty());
    broker.stop().await;
}
