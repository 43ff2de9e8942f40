//! The producer against a broker that refuses, forgets and goes silent on command.

mod support;

use std::collections::HashMap;
use std::time::Duration;

use flowstone_client::{Acks, Client, Compression, ErrorCode, ErrorKind, Partitioner, Producer, Record};
use support::fake_broker::{FakeBroker, Verdict};
use support::proxy::Proxy;
use support::{until, within};

async fn client(broker: &FakeBroker) -> Client {
    Client::connect(broker.address.to_string()).await.unwrap()
}

fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

/// Sends one record per batch, and returns how each ended.
async fn send_each(producer: &Producer, values: &[String]) -> Vec<Result<i64, ErrorCode>> {
    let mut acks = Vec::new();
    for value in values {
        acks.push(producer.send(Record::to("t").value(value)).await.unwrap());
    }
    let mut ends = Vec::new();
    for ack in acks {
        let end = within("an acknowledgement", ack).await;
        ends.push(end.map(|at| at.offset).map_err(|error| error.code()));
    }
    ends
}

#[tokio::test]
async fn records_land_where_their_acknowledgement_says() {
    let broker = FakeBroker::start(&[("t", 3)]).await;
    let client = client(&broker).await;
    for compression in Compression::ALL {
        let producer = client.producer().compression(compression).build().await.unwrap();
        let mut sent: HashMap<(i32, i64), String> = HashMap::new();
        let mut acks = Vec::new();
        for number in 0..500 {
            let (key, value) = (format!("key {}", number % 20), format!("{compression} {number}"));
            let record = Record::to("t").key(&key).value(&value).header("codec", compression.as_str());
            acks.push((producer.send(record).await.unwrap(), value));
        }
        producer.flush().await.unwrap();
        for (ack, value) in acks {
            assert!(ack.is_done());
            let at = ack.await.unwrap();
            assert_eq!(&*at.topic, "t");
            sent.insert((at.partition, at.offset), value);
        }
        assert_eq!(sent.len(), 500);
        for ((partition, offset), value) in sent {
            assert_eq!(broker.values("t", partition as usize)[offset as usize], value);
        }
    }
}

#[tokio::test]
async fn awaiting_one_record_does_not_wait_for_the_linger() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let linger = Duration::from_secs(30);
    let producer = client(&broker).await.producer().linger(linger).build().await.unwrap();
    let ack = producer.send(Record::to("t").value("v")).await.unwrap();
    assert!(broker.values("t", 0).is_empty());
    assert_eq!(tokio::time::timeout(linger / 2, ack).await.unwrap().unwrap().offset, 0);
}

#[tokio::test]
async fn a_lingering_batch_goes_by_itself() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    for linger in [Duration::ZERO, Duration::from_millis(20)] {
        let producer = client(&broker).await.producer().linger(linger).build().await.unwrap();
        let before = broker.values("t", 0).len();
        drop(producer.send(Record::to("t").value("v")).await.unwrap());
        until("the batch", || broker.values("t", 0).len() > before).await;
        until("its acknowledgement", || producer.stats().records_acknowledged == 1).await;
    }
}

#[tokio::test]
async fn a_topic_or_partition_that_does_not_exist_is_told_at_once() {
    let broker = FakeBroker::start(&[("t", 2)]).await;
    let producer = client(&broker).await.producer().build().await.unwrap();
    let error = producer.send(Record::to("nowhere").value("v")).await.unwrap_err();
    assert_eq!((error.code(), error.kind()), (ErrorCode::UnknownTopic, ErrorKind::Fatal));
    for partition in [-1, 2] {
        let error = producer.send(Record::to("t").partition(partition).value("v")).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::UnknownPartition);
    }
    let error = producer.send(Record::to("t").timestamp_millis(-1).value("v")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidTimestamp);
}

#[tokio::test]
async fn settings_that_contradict_each_other_are_refused() {
    let broker = FakeBroker::start(&[]).await;
    let client = client(&broker).await;
    for acks in [Acks::None, Acks::Leader] {
        let error = client.producer().acks(acks).idempotent(true).build().await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidRequest);
        assert!(error.to_string().contains("acks=quorum"), "{error}");
        client.producer().acks(acks).build().await.unwrap();
    }
    for builder in [
        client.producer().in_flight(0),
        client.producer().in_flight(6),
        client.producer().batch_bytes(0),
        client.producer().buffer_bytes(0),
        client.producer().record_bytes_max(0),
        client.producer().delivery_timeout(Duration::ZERO),
    ] {
        assert_eq!(builder.build().await.unwrap_err().code(), ErrorCode::InvalidRequest);
    }
}

#[tokio::test]
async fn a_refusal_for_now_is_retried_and_the_order_kept() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let producer = client(&broker).await.producer().batch_bytes(1).build().await.unwrap();
    let mut seen = 0;
    broker.judge(move |_, _| {
        seen += 1;
        // No multiple of what may be in flight, or a repeated round would meet the same fate for ever.
        match seen % 7 {
            1 => Verdict::Refuse(ErrorCode::Overloaded),
            4 => Verdict::StoreAndRefuse(ErrorCode::TimedOut),
            _ => Verdict::Normal,
        }
    });
    let values = numbers(0..40);
    let ends = send_each(&producer, &values).await;
    assert_eq!(ends, (0..40).map(Ok).collect::<Vec<_>>());
    assert_eq!(broker.values("t", 0), values);
}

#[tokio::test]
async fn one_batch_refused_for_good_fails_alone() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let producer = client(&broker).await.producer().batch_bytes(1).build().await.unwrap();
    let mut seen = 0;
    broker.judge(move |_, _| {
        seen += 1;
        if seen == 3 { Verdict::Refuse(ErrorCode::UnsupportedCompression) } else { Verdict::Normal }
    });
    let mut ends = send_each(&producer, &numbers(0..20)).await;
    assert_eq!(ends.remove(2), Err(ErrorCode::UnsupportedCompression));
    assert_eq!(ends, (0..19).map(Ok).collect::<Vec<_>>());
    let mut values = numbers(0..20);
    values.remove(2);
    assert_eq!(broker.values("t", 0), values);
    // The next epoch begins its sequence anew.
    assert!(broker.sequences("t", 0).contains(&(1, 0)));
    assert_eq!(producer.flush().await.unwrap_err().code(), ErrorCode::UnsupportedCompression);
    producer.flush().await.unwrap();
    let stats = producer.stats();
    assert_eq!((stats.records_acknowledged, stats.records_failed), (19, 1));
}

#[tokio::test]
async fn one_oversized_record_fails_alone_not_its_batch() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    broker.judge(
        |request, _| {
            if request.batch.len() > 500 { Verdict::Refuse(ErrorCode::BatchTooLarge) } else { Verdict::Normal }
        },
    );
    let producer = client.producer().linger(Duration::from_secs(30)).build().await.unwrap();
    let mut values = numbers(0..20);
    values[7] = "x".repeat(600);
    let mut ends = send_each(&producer, &values).await;
    assert_eq!(ends.remove(7), Err(ErrorCode::BatchTooLarge));
    assert_eq!(ends, (0..19).map(Ok).collect::<Vec<_>>());
    values.remove(7);
    assert_eq!(broker.values("t", 0), values);
    // And one beyond the producer's own limit is not even taken in.
    let small = client.producer().record_bytes_max(100).build().await.unwrap();
    let error = small.send(Record::to("t").value(vec![0; 200])).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::MessageTooLarge);
}

#[tokio::test]
async fn a_message_beyond_the_brokers_limit_fails_alone_though_it_ends_the_stream() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    broker.judge(|request, _| {
        let too_large = request.batch.len() > 500;
        if too_large { Verdict::EndStream(ErrorCode::MessageTooLarge) } else { Verdict::Normal }
    });
    let producer = client(&broker).await.producer().batch_bytes(1).build().await.unwrap();
    let mut values = numbers(0..8);
    values[3] = "x".repeat(600);
    let mut ends = send_each(&producer, &values).await;
    assert_eq!(ends.remove(3), Err(ErrorCode::MessageTooLarge));
    assert_eq!(ends, (0..7).map(Ok).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_is_not_acknowledged_in_time_fails_and_what_follows_goes_on() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let timeout = Duration::from_millis(300);
    let producer = client(&broker).await.producer().batch_bytes(1).delivery_timeout(timeout).build().await.unwrap();
    let mut seen = 0;
    broker.judge(move |_, _| {
        seen += 1;
        if seen == 2 { Verdict::Ignore } else { Verdict::Normal }
    });
    let ends = send_each(&producer, &numbers(0..2)).await;
    assert_eq!(ends, [Ok(0), Err(ErrorCode::TimedOut)]);
    let ends = send_each(&producer, &numbers(2..4)).await;
    assert_eq!(ends, [Ok(1), Ok(2)]);
    assert_eq!(broker.values("t", 0), ["0", "2", "3"]);
}

#[tokio::test]
async fn an_answer_that_never_comes_is_a_timeout_though_the_record_is_stored() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let timeout = Duration::from_millis(200);
    let producer = client(&broker).await.producer().delivery_timeout(timeout).build().await.unwrap();
    let mut seen = 0;
    broker.judge(move |_, _| {
        seen += 1;
        if seen == 1 { Verdict::StoreSilently } else { Verdict::Normal }
    });
    let error = producer.send(Record::to("t").value("0")).await.unwrap().await.unwrap_err();
    assert_eq!((error.code(), error.kind()), (ErrorCode::TimedOut, ErrorKind::Retriable));
    assert!(error.to_string().contains("may be stored"), "{error}");
    assert_eq!(producer.send(Record::to("t").value("1")).await.unwrap().await.unwrap().offset, 1);
    assert_eq!(broker.values("t", 0), ["0", "1"]);
}

#[tokio::test]
async fn a_broker_that_forgot_the_producer_is_written_to_under_a_new_epoch() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let producer = client(&broker).await.producer().batch_bytes(1).build().await.unwrap();
    send_each(&producer, &numbers(0..3)).await;
    broker.forget_producers();
    assert_eq!(send_each(&producer, &numbers(3..6)).await, [Ok(3), Ok(4), Ok(5)]);
    assert_eq!(broker.values("t", 0), numbers(0..6));
}

#[tokio::test]
async fn connections_cut_at_any_moment_lose_nothing_double_nothing_and_keep_the_order() {
    let broker = FakeBroker::start(&[("t", 2)]).await;
    let proxy = Proxy::start(broker.address).await;
    // Metadata names the broker's own address: the proxy must be what it names.
    let broker = broker.advertise(proxy.address);
    let client = Client::connect(proxy.address.to_string()).await.unwrap();
    let producer = client.producer().batch_bytes(200).build().await.unwrap();
    let total = 4000;
    let mut acks = Vec::new();
    for number in 0..total {
        let record = Record::to("t").partition(number % 2).value(number.to_string());
        acks.push(producer.send(record).await.unwrap());
        if number % 250 == 249 {
            // Batches of this round are answered, others under way, others not yet sent.
            within("an acknowledgement", &mut acks[number as usize - 200]).await.unwrap();
            proxy.cut();
        }
    }
    within("the flush", producer.flush()).await.unwrap();
    for (ack, number) in acks.into_iter().zip(0..) {
        let at = ack.await.unwrap();
        assert_eq!((at.partition, at.offset), (number % 2, i64::from(number / 2)));
    }
    for partition in 0..2 {
        let expected: Vec<String> =
            (0..total).filter(|number| number % 2 == partition).map(|number| number.to_string()).collect();
        assert_eq!(broker.values("t", partition as usize), expected);
    }
    assert!(proxy.accepted() > 4, "the cuts were real");
}

#[tokio::test]
async fn a_full_buffer_makes_senders_wait_until_there_is_room() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let builder = client(&broker).await.producer().buffer_bytes(20_000).batch_bytes(2000);
    let producer = builder.linger(Duration::from_secs(30)).build().await.unwrap();
    let mut opened = false;
    broker.judge(move |_, _| {
        opened |= gate.try_recv().is_ok();
        if opened { Verdict::Normal } else { Verdict::Refuse(ErrorCode::Overloaded) }
    });
    let value = vec![b'v'; 1000];
    let mut taken = 0;
    drop(producer.send(Record::to("t").value(&value)).await.unwrap());
    while let Some(ack) = producer.try_send(&Record::to("t").value(&value)).unwrap() {
        drop(ack);
        taken += 1;
        assert!(taken < 25, "the buffer has no end");
    }
    assert!(taken >= 10, "{taken}");
    // One beyond the whole buffer can never be taken in.
    let error = producer.send(Record::to("t").value(vec![0; 30_000])).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::MessageTooLarge);
    let waiting = tokio::spawn({
        let producer = producer.clone();
        async move { producer.send(Record::to("t").value(vec![b'w'; 5000])).await.unwrap().await.unwrap().offset }
    });
    // A waiting sender that gives up takes no room along.
    let given_up = producer.send(Record::to("t").value(&value));
    assert!(tokio::time::timeout(Duration::from_millis(20), given_up).await.is_err());
    assert!(!waiting.is_finished());
    open.send(()).unwrap();
    assert_eq!(within("room", waiting).await.unwrap(), taken + 1);
    // All of it is free again.
    producer.flush().await.unwrap();
    let mut again = 0;
    while producer.try_send(&Record::to("t").value(&value)).unwrap().is_some() {
        again += 1;
        if again > taken {
            break;
        }
    }
    assert!(again >= taken, "{again} of {taken}");
}

#[tokio::test]
async fn dropped_acknowledgements_change_nothing() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let producer = client(&broker).await.producer().build().await.unwrap();
    for number in 0..1000 {
        let mut ack = Box::pin(producer.send(Record::to("t").value(number.to_string())).await.unwrap());
        if number % 3 == 0 {
            // Polled once, then dropped.
            let _ = futures::poll!(&mut ack);
        }
    }
    producer.flush().await.unwrap();
    assert_eq!(broker.values("t", 0), numbers(0..1000));
}

#[tokio::test]
async fn without_answers_a_record_is_done_when_it_has_left() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let producer = client(&broker).await.producer().acks(Acks::None).build().await.unwrap();
    for number in 0..1000 {
        drop(producer.send(Record::to("t").value(number.to_string())).await.unwrap());
    }
    let ack = producer.send(Record::to("t").value("1000")).await.unwrap();
    assert_eq!(within("the record to leave", ack).await.unwrap().offset, -1);
    producer.flush().await.unwrap();
    until("the records", || broker.values("t", 0).len() == 1001).await;
    assert_eq!(broker.values("t", 0), numbers(0..1001));
}

#[tokio::test]
async fn with_leader_acks_order_is_kept_though_batches_are_refused() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let producer = client(&broker).await.producer().acks(Acks::Leader).batch_bytes(1).build().await.unwrap();
    let mut seen = 0;
    broker.judge(move |request, header| {
        assert_eq!((request.acks(), header.producer_id.get()), (flowstone_protocol::pb::Acks::Leader, -1));
        seen += 1;
        if seen % 3 == 1 { Verdict::Refuse(ErrorCode::NotLeader) } else { Verdict::Normal }
    });
    let values = numbers(0..20);
    send_each(&producer, &values).await;
    assert_eq!(broker.values("t", 0), values);
}

#[tokio::test]
async fn records_without_a_key_fill_one_batch_after_the_other() {
    let broker = FakeBroker::start(&[("t", 4)]).await;
    let producer = client(&broker).await.producer().linger(Duration::from_secs(30)).build().await.unwrap();
    for number in 0..100 {
        drop(producer.send(Record::to("t").value(number.to_string())).await.unwrap());
    }
    producer.flush().await.unwrap();
    assert_eq!(producer.stats().batches_sent, 1);
    let builder = client(&broker).await.producer().linger(Duration::from_secs(30)).batch_bytes(500);
    let producer = builder.partitioner(Partitioner::sticky()).build().await.unwrap();
    for number in 0..400 {
        drop(producer.send(Record::to("t").key("one key").value(number.to_string())).await.unwrap());
    }
    producer.flush().await.unwrap();
    for partition in 0..4 {
        assert!(broker.values("t", partition).len() >= 50, "partition {partition}");
    }
}

#[tokio::test]
async fn records_without_a_key_that_come_slowly_reach_all_partitions() {
    let broker = FakeBroker::start(&[("t", 4)]).await;
    let producer = client(&broker).await.producer().linger(Duration::from_secs(30)).build().await.unwrap();
    for number in 0..8 {
        // Its batch goes at once, and is never full.
        producer.send(Record::to("t").value(number.to_string())).await.unwrap().await.unwrap();
    }
    let counts = [0, 1, 2, 3].map(|partition| broker.values("t", partition).len());
    assert_eq!(counts, [2; 4]);
}

#[tokio::test]
async fn closing_sends_what_there_is_and_fails_what_cannot_be() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    let linger = Duration::from_secs(30);
    let producer = client.producer().linger(linger).build().await.unwrap();
    let clone = producer.clone();
    let ack = producer.send(Record::to("t").value("0")).await.unwrap();
    within("the close", producer.close(Duration::from_secs(30))).await.unwrap();
    assert_eq!(ack.await.unwrap().offset, 0);
    let error = clone.send(Record::to("t").value("1")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ShuttingDown);

    broker.judge(|_, _| Verdict::Ignore);
    let producer = client.producer().linger(linger).build().await.unwrap();
    let ack = producer.send(Record::to("t").value("1")).await.unwrap();
    let error = producer.close(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TimedOut);
    assert_eq!(within("the failed record", ack).await.unwrap_err().code(), ErrorCode::TimedOut);
}

#[tokio::test]
async fn a_dropped_producer_still_sends_what_it_took_in() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let producer = client(&broker).await.producer().linger(Duration::from_secs(110)).build().await.unwrap();
    // Its acknowledgement is not awaited: that alone would send it.
    drop(producer.send(Record::to("t").value("0")).await.unwrap());
    drop(producer);
    until("the record", || broker.values("t", 0) == ["0"]).await;
}

#[tokio::test]
async fn a_deleted_topic_fails_what_waits_for_it() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let producer = client(&broker).await.producer().build().await.unwrap();
    broker.judge(|_, _| Verdict::Ignore);
    let ack = producer.send(Record::to("t").value("0")).await.unwrap();
    let waiting = tokio::spawn(ack);
    until("the batch to leave", || producer.stats().batches_sent == 1).await;
    broker.delete_topic("t");
    let error = within("the failure", waiting).await.unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::UnknownTopic);
    assert_eq!(producer.send(Record::to("t").value("1")).await.unwrap_err().code(), ErrorCode::UnknownTopic);
}

#[tokio::test]
async fn partitions_added_later_are_written_to() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let producer = client(&broker).await.producer().build().await.unwrap();
    producer.send(Record::to("t").value("0")).await.unwrap().await.unwrap();
    broker.add_partition("t");
    within("the new partition", async {
        while producer.send(Record::to("t").partition(1).value("1")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    producer.flush().await.unwrap();
    assert_eq!(broker.values("t", 1), ["1"]);
}

#[tokio::test]
async fn an_unreachable_broker_is_told_with_its_address_and_reason() {
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let builder = Client::builder(closed.to_string()).request_timeout(Duration::from_millis(200));
    let error = builder.connect().await.unwrap_err();
    assert!(error.is_unreachable() && error.code() == ErrorCode::TimedOut, "{error:?}");
    assert_eq!(Client::connect("localhost").await.unwrap_err().code(), ErrorCode::InvalidRequest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_taken_in_while_the_producer_closes_is_told_its_end() {
    let broker = FakeBroker::start(&[("t", 1)]).await;
    let client = client(&broker).await;
    for _ in 0..200 {
        let producer = client.producer().linger(Duration::from_secs(30)).build().await.unwrap();
        producer.send(Record::to("t").value("first")).await.unwrap().await.unwrap();
        let sender = producer.clone();
        let sending = tokio::spawn(async move {
            let mut ends = 0;
            while let Ok(ack) = sender.send(Record::to("t").value("v")).await {
                // Stored or failed: told either way.
                let _ = ack.await;
                ends += 1;
            }
            ends
        });
        tokio::task::yield_now().await;
        within("the close", producer.close(Duration::from_secs(30))).await.ok();
        within("every record's end", sending).await.unwrap();
    }
}
