//! Clients of a cluster whose leaders move and whose brokers die, hang, and do not know.

mod support;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use flowstone_client::{Client, Consumer, ErrorCode, NewTopic, Producer, Record, StartAt, StopAt};
use support::fake_broker::{AdminFault, Verdict};
use support::fake_cluster::FakeCluster;
use support::{until, within};

const NO_RACKS: [&str; 3] = ["", "", ""];

fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

async fn send(producer: &Producer, range: std::ops::Range<u32>) {
    let mut acks = Vec::new();
    for value in numbers(range.clone()) {
        acks.push(producer.send(Record::to("t").value(value)).await.unwrap());
    }
    for (ack, offset) in acks.into_iter().zip(i64::from(range.start)..) {
        assert_eq!(within("an acknowledgement", ack).await.unwrap().offset, offset);
    }
}

/// The next records, one number each.
async fn read(consumer: &mut Consumer, range: std::ops::Range<u32>) {
    for value in numbers(range) {
        let record = within("a record", consumer.next_record()).await.unwrap().unwrap();
        assert_eq!(record.value_bytes(), Some(value.as_bytes()));
    }
}

/// One record per batch, five under way.
async fn producer(client: &Client) -> Producer {
    client.producer().batch_bytes(1).build().await.unwrap()
}

#[tokio::test]
async fn the_leader_moves_between_batches() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    let producer = producer(&cluster.client(1).await).await;
    let mut acks = VecDeque::new();
    let mut offsets = 0..300_i64;
    for number in 0..300_u32 {
        if number % 20 == 10 {
            cluster.shared.lead("t", 0, (number / 20 % 3) as i32 + 1);
            // Sometimes the metadata tells of it, sometimes only the old leader does.
            if number % 40 == 10 {
                cluster.shared.announce();
            }
        }
        acks.push_back(producer.send(Record::to("t").value(number.to_string())).await.unwrap());
        while acks.len() > 8 || number == 299 && !acks.is_empty() {
            let at = within("an acknowledgement", acks.pop_front().unwrap()).await.unwrap();
            assert_eq!(Some(at.offset), offsets.next());
        }
    }
    assert_eq!(cluster.broker(1).values("t", 0), numbers(0..300));
    for id in 1..=3 {
        assert!(cluster.broker(id).produced() > 5, "broker {id} was asked {} times", cluster.broker(id).produced());
    }
}

#[tokio::test]
async fn a_broker_dies_with_batches_under_way() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    let producer = producer(&cluster.client(2).await).await;
    let mut seen = 0;
    cluster.broker(1).judge(move |_, _| {
        seen += 1;
        match seen {
            1..=3 => Verdict::Normal,
            // Two more are stored, the rest is not; nobody hears of any.
            4..=5 => Verdict::StoreSilently,
            _ => Verdict::Ignore,
        }
    });
    let sending = tokio::spawn(async move {
        send(&producer, 0..20).await;
        producer
    });
    until("five to be under way", || cluster.broker(1).produced() == 8).await;
    cluster.kill(1);
    cluster.shared.lead("t", 0, 3);
    cluster.shared.announce();
    let producer = within("the acknowledgements", sending).await.unwrap();
    assert_eq!(cluster.broker(2).values("t", 0), numbers(0..20));
    assert!(producer.flush().await.is_ok());
}

#[tokio::test]
async fn the_broker_that_the_client_was_told_of_dies() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    let client = cluster.client(1).await;
    let producer = producer(&client).await;
    send(&producer, 0..1).await;
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    read(&mut consumer, 0..1).await;
    cluster.kill(1);
    cluster.shared.lead("t", 0, 2);
    cluster.shared.set_controller(3);
    cluster.shared.announce();
    send(&producer, 1..10).await;
    read(&mut consumer, 1..10).await;
    within("the topic", client.admin().create_topic(NewTopic::new("new"))).await.unwrap();
    // Nobody is told again of what dies later.
    cluster.kill(3);
    cluster.shared.set_controller(2);
    within("the topic", client.admin().create_topic(NewTopic::new("newer"))).await.unwrap();
    assert_eq!(cluster.shared.topic_names(), ["t", "new", "newer"]);
}

#[tokio::test]
async fn hints_in_circles_cost_waits_and_no_order() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    // The metadata names 2, which names 3, which names 2. In truth it is 1.
    cluster.shared.lead("t", 0, 2);
    for id in 1..=3 {
        cluster.broker(id).freeze_metadata();
    }
    cluster.shared.lead("t", 0, 1);
    cluster.broker(2).hint_at(Some(3));
    cluster.broker(3).hint_at(Some(2));
    let producer = cluster.client(1).await.producer().batch_bytes(1).in_flight(1).build().await.unwrap();
    let began = Instant::now();
    let sending = tokio::spawn(async move { send(&producer, 0..3).await });
    until("nine requests", || cluster.broker(2).produced() + cluster.broker(3).produced() >= 9).await;
    // Eight waits lie between nine requests: 10, 20, 40 ms and so on, each at most a fifth shorter.
    assert!(began.elapsed() > Duration::from_millis(1000), "{:?}", began.elapsed());
    assert!(!sending.is_finished());
    cluster.broker(3).hint_at(None);
    within("the acknowledgements", sending).await.unwrap();
    assert_eq!(cluster.broker(1).values("t", 0), numbers(0..3));
}

#[tokio::test]
async fn nobody_leads_until_somebody_does() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    cluster.shared.lead("t", 0, -1);
    let client = cluster.client(1).await;
    let producer = producer(&client).await;
    let mut consumer = client.consumer().partition_at("t", 0, StartAt::Offset(0)).build().await.unwrap();
    let ack = producer.send(Record::to("t").value("0")).await.unwrap();
    assert!(futures::poll!(std::pin::pin!(consumer.next_record())).is_pending());
    // Told to nobody who watches: it must be asked for.
    cluster.shared.lead("t", 0, 3);
    assert_eq!(within("an acknowledgement", ack).await.unwrap().offset, 0);
    read(&mut consumer, 0..1).await;
}

/// A planned move: for a moment nobody leads, and whoever asks the old leader is refused.
#[tokio::test]
async fn clients_follow_at_once_when_the_metadata_names_a_leader_again() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    let client = cluster.client(1).await;
    let producer = producer(&client).await;
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    send(&producer, 0..1).await;
    read(&mut consumer, 0..1).await;
    let mut best = Duration::MAX;
    for round in 1..=8_u32 {
        cluster.shared.lead("t", 0, -1);
        cluster.shared.announce();
        // Long enough to be refused, and to find that nobody leads.
        let refused = tokio::time::timeout(Duration::from_millis(50), consumer.next_record()).await;
        assert!(refused.is_err(), "{refused:?}");
        cluster.shared.lead("t", 0, (round % 3) as i32 + 1);
        cluster.shared.announce();
        let led = Instant::now();
        tokio::join!(send(&producer, round..round + 1), read(&mut consumer, round..round + 1));
        best = best.min(led.elapsed());
    }
    // A look every now and then would take longer than this each time; a busy machine only now and then.
    assert!(best < Duration::from_millis(100), "{best:?}");
}

#[tokio::test]
async fn the_watched_broker_hears_no_news() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    cluster.shared.lead("t", 0, 2);
    let client = cluster.client(1).await;
    let producer = producer(&client).await;
    send(&producer, 0..1).await;
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    read(&mut consumer, 0..1).await;
    // It is cut off from the others, and answers all the same.
    cluster.broker(1).freeze_metadata();
    cluster.kill(2);
    cluster.shared.lead("t", 0, 3);
    cluster.shared.announce();
    send(&producer, 1..3).await;
    read(&mut consumer, 1..3).await;
}

#[tokio::test]
async fn the_watched_broker_hangs_and_leads() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    let address = cluster.proxy(1).address.to_string();
    // Pings on the data streams would find it too, but not in this test's time.
    let client = Client::builder(address).keep_alive_timeout(Duration::from_secs(600)).connect().await.unwrap();
    let producer = producer(&client).await;
    send(&producer, 0..1).await;
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    read(&mut consumer, 0..1).await;
    cluster.proxy(1).go_silent();
    let sending = tokio::spawn(async move {
        send(&producer, 1..5).await;
        producer
    });
    cluster.shared.lead("t", 0, 2);
    cluster.shared.set_controller(2);
    cluster.shared.announce();
    let producer = within("the acknowledgements", sending).await.unwrap();
    read(&mut consumer, 1..5).await;
    until("another broker to be watched", || (2..=3).any(|id| cluster.broker(id).metadata_calls().1 > 0)).await;
    // When it wakes up, what it was sent must not count.
    cluster.proxy(1).heal();
    send(&producer, 5..8).await;
    read(&mut consumer, 5..8).await;
    assert_eq!(cluster.broker(1).values("t", 0), numbers(0..8));
}

#[tokio::test]
async fn a_producer_whose_records_are_all_acknowledged_waits_for_nobody() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    let producer = producer(&cluster.client(2).await).await;
    send(&producer, 0..1).await;
    cluster.proxy(1).go_silent();
    let began = Instant::now();
    producer.close(Duration::from_secs(30)).await.unwrap();
    // Five seconds are what a broker has that must be waited for.
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_broker_that_has_not_heard_of_a_topic_yet_is_no_end() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    // Of all brokers, the client asks one that is behind: the controller knows better.
    cluster.broker(2).freeze_metadata();
    let client = cluster.client(2).await;
    cluster.shared.add_topic("new", 1, &[1, 2, 3]);
    // That is an entry of the metadata which the one behind does not have: what it says of the topic is old.
    cluster.shared.announce();
    let producer = producer(&client).await;
    let mut seen = 0;
    cluster.broker(1).judge(move |_, _| {
        seen += 1;
        if seen <= 3 { Verdict::Refuse(ErrorCode::UnknownTopic) } else { Verdict::Normal }
    });
    let ack = within("a known topic", producer.send(Record::to("new").value("0"))).await.unwrap();
    within("an acknowledgement", ack).await.unwrap();
    let mut consumer = client.consumer().topic("new").stop_at(StopAt::End).build().await.unwrap();
    read(&mut consumer, 0..1).await;
    // One that nobody has is the end at once.
    let error = producer.send(Record::to("nowhere").value("0")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::UnknownTopic);
}

#[tokio::test]
async fn the_nearest_replica_is_read() {
    let cluster = FakeCluster::start(&["a", "b", "c"], &[("t", 1)]).await;
    let client = cluster.client(3).await;
    let producer = producer(&client).await;
    send(&producer, 0..5).await;
    for (rack, id) in [("b", 2), ("a", 1), ("nowhere", 1), ("", 1)] {
        let before = cluster.broker(id).fetch_sessions();
        let mut consumer = client.consumer().topic("t").rack(rack).stop_at(StopAt::End).build().await.unwrap();
        read(&mut consumer, 0..5).await;
        assert!(within("the end", consumer.next_record()).await.is_none());
        assert_eq!(cluster.broker(id).fetch_sessions(), before + 1, "{rack}");
    }
    assert_eq!(cluster.broker(3).fetch_sessions(), 0);
}

#[tokio::test]
async fn the_watermark_never_goes_back_whichever_replica_is_read() {
    let cluster = FakeCluster::start(&["a", "b", "b"], &[("t", 1)]).await;
    let client = cluster.client(1).await;
    let producer = producer(&client).await;
    send(&producer, 0..10).await;
    cluster.broker(3).set_committed(Some(4), false);
    let mut consumer = client.consumer().topic("t").rack("b").build().await.unwrap();
    read(&mut consumer, 0..10).await;
    assert_eq!((consumer.high_watermark("t", 0).unwrap(), cluster.broker(2).fetch_sessions()), (Some(10), 1));
    // The one that is left in the rack knows less than the reader: it makes it wait.
    cluster.kill(2);
    cluster.shared.set_alive(2, false);
    cluster.shared.announce();
    let mut next = tokio::spawn(async move {
        let record = consumer.next_record().await.unwrap().unwrap();
        (record.offset, consumer)
    });
    until("the other replica to be asked", || cluster.broker(3).fetch_sessions() == 1).await;
    send(&producer, 10..11).await;
    cluster.broker(3).set_committed(Some(8), false);
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut next).await.is_err());
    cluster.broker(3).set_committed(None, false);
    let (offset, consumer) = within("the record", next).await.unwrap();
    assert_eq!((offset, consumer.high_watermark("t", 0).unwrap()), (10, Some(11)));
    assert!(cluster.broker(3).watermarks().iter().all(|told| *told >= 10), "{:?}", cluster.broker(3).watermarks());
}

#[tokio::test]
async fn a_replica_that_is_behind_sends_its_readers_to_the_leader() {
    let cluster = FakeCluster::start(&["a", "b", "b"], &[("t", 1)]).await;
    let client = cluster.client(1).await;
    let producer = producer(&client).await;
    send(&producer, 0..10).await;
    cluster.shared.set_alive(3, false);
    cluster.shared.announce();
    // It tells those who know more to retry.
    cluster.broker(2).set_committed(Some(4), true);
    let mut consumer = client.consumer().topic("t").rack("b").build().await.unwrap();
    read(&mut consumer, 0..10).await;
    assert!(cluster.broker(2).fetch_sessions() == 1 && cluster.broker(1).fetch_sessions() == 1);
    // To those who know nothing, an offset that it does not have yet is out of range: the leader decides.
    for (offset, found) in [(7, true), (50, false)] {
        let builder = client.consumer().partition_at("t", 0, StartAt::Offset(offset)).rack("b");
        let mut consumer = builder.build().await.unwrap();
        let record = within("a record", consumer.next_record()).await.unwrap();
        match record {
            Ok(record) => assert!(found && record.offset == offset),
            Err(error) => assert!(!found && error.code() == ErrorCode::OffsetOutOfRange, "{error}"),
        }
    }
}

#[tokio::test]
async fn readers_follow_leaders_and_neither_skip_nor_repeat() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    let client = cluster.client(3).await;
    let producer = producer(&client).await;
    let mut consumer = client.consumer().topic("t").prefetch_bytes(300).build().await.unwrap();
    for round in 0..6_u32 {
        send(&producer, round * 30..round * 30 + 30).await;
        read(&mut consumer, round * 30..round * 30 + 15).await;
        let (old, new) = ((round % 3) as i32 + 1, ((round + 1) % 3) as i32 + 1);
        if round % 2 == 0 {
            cluster.kill(old);
        }
        cluster.shared.lead("t", 0, new);
        if round % 3 != 1 {
            cluster.shared.announce();
        }
        read(&mut consumer, round * 30 + 15..round * 30 + 30).await;
        cluster.proxy(old).heal();
    }
}

/// The controller is `1`; what it answers is lost, or what it is asked.
async fn with_fault(fault: AdminFault) -> (FakeCluster, Client) {
    let cluster = FakeCluster::start(&NO_RACKS, &[("old", 2)]).await;
    let client = cluster.client(2).await;
    cluster.broker(1).set_admin_fault(fault);
    (cluster, client)
}

#[tokio::test]
async fn a_topic_whose_creation_was_not_answered_is_created() {
    for fault in [AdminFault::LoseAnswer, AdminFault::LoseRequest] {
        let (cluster, client) = with_fault(fault).await;
        let topic = client.admin().create_topic(NewTopic::new("new").partitions(3)).await.unwrap();
        assert_eq!((topic.name.as_str(), topic.partitions.len()), ("new", 3), "{fault:?}");
        assert_eq!(cluster.shared.topic_names(), ["old", "new"]);
        assert!(cluster.broker(1).admin_calls() >= 2);
        // One that was there before, exactly as it is asked for, is an error, whatever was lost.
        cluster.broker(1).set_admin_fault(fault);
        let error = client.admin().create_topic(NewTopic::new("old").partitions(2)).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::TopicAlreadyExists, "{fault:?}");
    }
}

#[tokio::test]
async fn a_topic_that_somebody_else_created_meanwhile_is_not_taken_for_ours() {
    let (cluster, client) = with_fault(AdminFault::LoseRequest).await;
    let admin = client.admin();
    let creating = tokio::spawn(async move { admin.create_topic(NewTopic::new("new").partitions(3)).await });
    until("the first attempt", || cluster.broker(1).admin_calls() >= 1).await;
    cluster.shared.add_topic("new", 5, &[1, 2, 3]);
    match creating.await.unwrap() {
        Err(error) => assert_eq!(error.code(), ErrorCode::TopicAlreadyExists),
        // The second attempt was faster than this test: then both were created, which the fake broker does not mind.
        Ok(topic) => assert_eq!(topic.partitions.len(), 3),
    }
}

#[tokio::test]
async fn the_controller_moves_while_a_topic_is_created() {
    let (cluster, client) = with_fault(AdminFault::LoseAnswer).await;
    let admin = client.admin();
    cluster.broker(1).freeze_metadata();
    cluster.broker(2).freeze_metadata();
    let creating = tokio::spawn(async move { admin.create_topic(NewTopic::new("new")).await });
    until("it to be carried out", || cluster.shared.topic_names().len() == 2).await;
    cluster.kill(1);
    cluster.shared.set_controller(3);
    within("the topic", creating).await.unwrap().unwrap();
    assert_eq!(cluster.shared.topic_names(), ["old", "new"]);
}

#[tokio::test]
async fn what_was_done_and_not_answered_is_not_done_twice() {
    let (cluster, client) = with_fault(AdminFault::LoseAnswer).await;
    let admin = client.admin();
    let topic = admin.alter_topic(flowstone_client::AlterTopic::new("old").partitions(4)).await.unwrap();
    assert_eq!(topic.partitions.len(), 4);
    let error = admin.alter_topic(flowstone_client::AlterTopic::new("old").partitions(3)).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidPartitions);
    cluster.broker(1).set_admin_fault(AdminFault::LoseAnswer);
    admin.delete_topic("old").await.unwrap();
    assert_eq!(admin.delete_topic("old").await.unwrap_err().code(), ErrorCode::UnknownTopic);
    cluster.broker(1).set_admin_fault(AdminFault::LoseAnswer);
    admin.decommission_broker(3).await.unwrap();
    assert_eq!(admin.decommission_broker(3).await.unwrap_err().code(), ErrorCode::InvalidRequest);
}

#[tokio::test]
async fn dead_brokers_are_not_asked_first() {
    let cluster = FakeCluster::start(&NO_RACKS, &[("t", 1)]).await;
    let client = cluster.client(1).await;
    // It hangs: each call that begins there takes a share of the time that it has.
    cluster.proxy(1).go_silent();
    cluster.shared.lead("t", 0, 2);
    cluster.shared.set_controller(2);
    cluster.shared.announce();
    within("the producer id", client.producer().build()).await.unwrap();
    let before = cluster.proxy(1).accepted();
    for _ in 0..10 {
        client.producer().build().await.unwrap();
    }
    assert_eq!(cluster.proxy(1).accepted(), before, "it is known to hang");
}
