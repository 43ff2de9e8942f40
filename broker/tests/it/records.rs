//! Records in, records out, and where they are.

use flowstone_protocol::{Compression, ErrorCode, RecordBatchBuilder, pb};

use crate::world::*;

#[tokio::test]
async fn what_is_acknowledged_is_read_back() {
    let mut world = World::new().await;
    let topic = world.create("orders", 2).await;
    let mut producer = world.producer().await;
    for partition in [0, 1, 0] {
        producer.send(&topic, partition, batch(&[&format!("a{partition}"), ""])).await;
    }
    let mut offsets = Vec::new();
    for _ in 0..3 {
        let (request, offset) = producer.answer().await;
        offsets.push((request, offset.expect("stored")));
    }
    offsets.sort();
    // The term's first entry takes offset 0.
    assert_eq!(offsets, [(0, 1), (1, 1), (2, 3)]);
    assert_eq!(world.values(&topic, 0, 0).await, ["a0", "", "a0", ""]);
    assert_eq!(world.values(&topic, 1, 0).await, ["a1", ""]);
    assert_eq!(world.values(&topic, 0, 3).await, ["a0", ""]);
    world.stop().await;
}

#[tokio::test]
async fn every_acks_stores_and_none_is_not_answered() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let mut producer = world.producer().await;
    producer.send_acks(&topic, 0, batch(&["none"]), pb::Acks::None).await;
    let leader = producer.send_acks(&topic, 0, batch(&["leader"]), pb::Acks::Leader).await;
    let quorum = producer.send_acks(&topic, 0, batch(&["quorum"]), pb::Acks::Quorum).await;
    let mut answered = [producer.answer().await.0, producer.answer().await.0];
    answered.sort_unstable();
    assert_eq!(answered, [leader, quorum]);
    assert_eq!(world.values(&topic, 0, 0).await, ["none", "leader", "quorum"]);
    // Refused, and silent about it: the next answer is the next request's.
    producer.send_acks(&topic, 7, batch(&["nowhere"]), pb::Acks::None).await;
    let last = producer.send(&topic, 0, batch(&["last"])).await;
    assert_eq!(producer.answer().await.0, last);
    world.stop().await;
}

#[tokio::test]
async fn a_fetch_waits_for_what_is_not_there_yet() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let mut fetcher = world.fetcher().await;
    fetcher.set(5, &topic, 0, 1, 1 << 20).await;
    for value in ["one", "two"] {
        world.produce(&topic, 0, batch(&[value])).await.expect("stored");
        let response = fetcher.response().await.expect("pushed");
        assert_eq!((response.fetch_id, response.session), (5, 5));
        assert_eq!(records(&response.batches, 0)[0].1, value);
        assert!(response.high_watermark >= next_offset(&response.batches));
    }
    world.stop().await;
}

#[tokio::test]
async fn credit_bounds_what_is_pushed() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let value = "x".repeat(100_000);
    for _ in 0..20 {
        world.produce(&topic, 0, batch(&[&value])).await.expect("stored");
    }
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 1, 1).await;
    let mut received = fetcher.response().await.expect("one response").batches.len();
    assert!(received <= 300_000, "{received} bytes for a credit of 1");
    // Nothing more comes until there is more credit: the next answer is that of another position.
    let other = world.create("other", 1).await;
    world.produce(&other, 0, batch(&["later"])).await.expect("stored");
    fetcher.set(1, &topic, 9, 0, 0).await;
    let response = fetcher.response().await.expect("an error needs no credit");
    assert_eq!((response.fetch_id, response.error.is_some()), (1, true));
    fetcher.credit(10 << 20).await;
    while received < 20 * 100_000 {
        received += fetcher.response().await.expect("the rest").batches.len();
    }
    world.stop().await;
}

#[tokio::test]
async fn a_new_position_replaces_the_old_one() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    for value in ["a", "b", "c"] {
        world.produce(&topic, 0, batch(&[value])).await.expect("stored");
    }
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 3, 1 << 20).await;
    assert_eq!(records(&fetcher.response().await.expect("pushed").batches, 3), [(3, "c".to_owned())]);
    let mut back = position(0, &topic, 0, 1);
    back.session = 77;
    fetcher.send(pb::FetchRequest { set: vec![back], ..Default::default() }).await;
    let response = fetcher.response().await.expect("pushed");
    assert_eq!(response.session, 77);
    assert_eq!(records(&response.batches, 1)[0], (1, "a".to_owned()));
    // Removed: what is written now is not pushed, but what another position gets is.
    fetcher.send(pb::FetchRequest { remove: vec![0], ..Default::default() }).await;
    world.produce(&topic, 0, batch(&["d"])).await.expect("stored");
    fetcher.set(3, &topic, 0, 4, 0).await;
    let response = fetcher.response().await.expect("pushed");
    assert_eq!((response.fetch_id, &*records(&response.batches, 4)[0].1), (3, "d"));
    world.stop().await;
}

#[tokio::test]
async fn what_was_read_for_an_old_position_is_not_sent_for_a_new_one() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let value = "x".repeat(200_000);
    for _ in 0..10 {
        world.produce(&topic, 0, batch(&[&value])).await.expect("stored");
    }
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 1, 1).await;
    let first = fetcher.response().await.expect("pushed").batches.len();
    // More was read for it, and waits for credit.
    until("there is more", async || {
        let (_, metrics) = crate::http::get(world.broker.admin_addr, "/metrics").await;
        let line = metrics.lines().find(|line| line.starts_with("flowstone_sent_bytes_total{api=\"Fetch\"}"))?;
        let read: usize = line.rsplit(' ').next()?.parse().ok()?;
        (read > first).then_some(())
    })
    .await;
    let back = pb::FetchPartition { session: 77, ..position(0, &topic, 0, 1) };
    fetcher.send(pb::FetchRequest { set: vec![back], credit_bytes: 64 << 20, ..Default::default() }).await;
    let mut seen = Vec::new();
    while seen.len() < 10 {
        let response = fetcher.response().await.expect("pushed");
        assert_eq!(response.session, 77);
        seen.extend(records(&response.batches, 1).into_iter().map(|(offset, _)| offset));
    }
    assert_eq!(seen, (1..=10).collect::<Vec<i64>>());
    world.stop().await;
}

#[tokio::test]
async fn one_fetch_stream_serves_many_partitions_fairly() {
    let mut world = World::new().await;
    let topic = world.create("orders", 8).await;
    let value = "x".repeat(200_000);
    for partition in 0..8 {
        for _ in 0..10 {
            world.produce(&topic, partition, batch(&[&value])).await.expect("stored");
        }
    }
    let mut fetcher = world.fetcher().await;
    let set = (0..8).map(|partition| position(partition as u32, &topic, partition, 0)).collect();
    fetcher.send(pb::FetchRequest { set, credit_bytes: 64 << 20, ..Default::default() }).await;
    let mut seen = [0usize; 8];
    while seen.iter().sum::<usize>() < 80 {
        let response = fetcher.response().await.expect("pushed");
        seen[response.fetch_id as usize] += records(&response.batches, 0).len();
        let (least, most) = (seen.iter().min().expect("8"), seen.iter().max().expect("8"));
        assert!(most - least <= 6, "one partition runs ahead: {seen:?}");
    }
    world.stop().await;
}

#[tokio::test]
async fn offsets_are_found_by_position_and_time() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let empty = world.offset(&topic, 0, End).await.expect("listed");
    assert_eq!((empty.records, empty.offset), (0, empty.high_watermark));
    for (value, timestamp) in [("a", 1_000), ("b", 2_000), ("c", 3_000)] {
        world.produce(&topic, 0, batch_at(&[value], timestamp)).await.expect("stored");
    }
    let start = world.offset(&topic, 0, Start).await.expect("listed");
    assert_eq!((start.offset, start.log_start, start.high_watermark, start.records), (0, 0, 4, 3));
    assert_eq!(world.offset(&topic, 0, End).await.expect("listed").offset, 4);
    let at = world.offset(&topic, 0, Time(1_500)).await.expect("listed");
    assert_eq!((at.offset, at.timestamp), (2, 2_000));
    let none = world.offset(&topic, 0, Time(3_001)).await.expect("listed");
    assert_eq!((none.offset, none.timestamp), (4, -1));
    assert_eq!(world.offset(&topic, 0, FromEnd(2)).await.expect("listed").offset, 2);
    assert_eq!(world.offset(&topic, 0, FromEnd(100)).await.expect("listed").offset, 0);
    assert_refused(world.offset(&topic, 0, Time(-5)).await, ErrorCode::InvalidRequest, "below zero");
    assert_refused(world.offset(&topic, 1, Start).await, ErrorCode::UnknownPartition, "from 0 to 0");
    world.stop().await;
}

#[tokio::test]
async fn a_topic_may_ask_for_a_codec_and_the_brokers_time() {
    let mut world = World::new().await;
    let configs = [("compression.type", "lz4"), ("message.timestamp.type", "LogAppendTime")];
    let topic = world.create_with("rewritten", 1, &configs).await.expect("created");
    let long = "flow".repeat(1_000);
    let before = now();
    let mut producer = world.producer().await;
    for codec in [Compression::None, Compression::Lz4, Compression::Zstd] {
        producer.send(&topic, 0, build(RecordBatchBuilder::new(codec), &[&long, "b"], 1_000)).await;
        let result = producer.result().await.expect("the stream goes on").expect("an answer");
        assert!(result.error.is_none(), "{:?}", result.error);
        assert!((before..=now()).contains(&result.log_append_time), "{}", result.log_append_time);
    }
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 1, 1 << 20).await;
    let mut batches = 0;
    while batches < 3 {
        let response = fetcher.response().await.expect("pushed");
        for split in flowstone_protocol::batch::split_batches(response.batches) {
            let (header, whole) = split.expect("whole");
            assert_eq!(header.attributes.compression(), Ok(Compression::Lz4));
            for record in flowstone_protocol::record::records(whole, 1 << 20).expect("valid") {
                assert!(record.expect("valid").timestamp.get() >= before);
            }
            batches += 1;
        }
    }
    world.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_loses_nothing_acknowledged() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let mut acknowledged = Vec::new();
    for round in 0..10 {
        let mut producer = world.producer().await;
        for number in 0..20 {
            producer.send(&topic, 0, batch(&[&format!("{round}-{number}")])).await;
        }
        for _ in 0..10 {
            let (request, offset) = producer.answer().await;
            acknowledged.push((offset.expect("stored"), format!("{round}-{request}")));
        }
        drop(producer);
    }
    let end = world.offset(&topic, 0, End).await.expect("listed").offset;
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 0, 64 << 20).await;
    let mut stored = std::collections::HashMap::new();
    let mut next = 0;
    while next < end {
        let response = fetcher.response().await.expect("pushed");
        next = next_offset(&response.batches);
        stored.extend(records(&response.batches, 0));
    }
    for (offset, value) in acknowledged {
        assert_eq!(stored.get(&offset), Some(&value), "at {offset}");
    }
    world.stop().await;
}

#[tokio::test]
async fn a_producer_that_sends_no_more_is_still_answered() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let mut producer = world.producer().await;
    for _ in 0..50 {
        producer.send(&topic, 0, batch(&["x"])).await;
    }
    let mut producer = producer.finish();
    let mut answered = 0;
    while producer.result().await.expect("a clean end").is_some() {
        answered += 1;
    }
    assert_eq!(answered, 50);
    world.stop().await;
}

#[tokio::test]
async fn a_reader_of_an_old_epoch_goes_on_and_one_of_a_lost_history_is_told() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let value = "x".repeat(200_000);
    world.produce(&topic, 0, batch(&["old"])).await.expect("stored");
    let last_epoch = world.describe("orders").await.partitions[0].leader_epoch;
    let mut world = world.restart().await;
    let mut first = 0;
    for _ in 0..5 {
        let offset = world.produce(&topic, 0, batch(&[&value])).await.expect("stored");
        first = if first == 0 { offset } else { first };
    }
    // It saw the first epoch to its end, and reads on through the next: in more than one read.
    let mut fetcher = world.fetcher().await;
    let old = pb::FetchPartition { last_epoch, ..position(0, &topic, 0, 2) };
    fetcher.send(pb::FetchRequest { set: vec![old], credit_bytes: 64 << 20, ..Default::default() }).await;
    let mut seen = 0;
    while seen < 5 {
        let response = fetcher.response().await.expect("pushed");
        assert!(response.error.is_none(), "{:?}", response.error);
        seen += records(&response.batches, 2).len();
    }
    // One that saw that epoch further than it ever went here followed another history.
    let lost = pb::FetchPartition { last_epoch, ..position(1, &topic, 0, first + 2) };
    fetcher.send(pb::FetchRequest { set: vec![lost.clone()], ..Default::default() }).await;
    assert_eq!(fetcher.error().await.code, ErrorCode::InvalidRequest, "one position per partition and stream");
    fetcher.send(pb::FetchRequest { set: vec![lost], remove: vec![0], ..Default::default() }).await;
    let error = fetcher.error().await;
    assert_eq!(error.code, ErrorCode::LogDiverged, "{error:?}");
    world.stop().await;
}

#[tokio::test]
async fn positions_that_are_replaced_do_not_pile_up() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let mut fetcher = world.fetcher().await;
    // More than a log lets wait at its end, if each left its read behind. The answer to a position that does not exist
    // says that those before it were taken.
    for session in 0..17_000 {
        let end = pb::FetchPartition { session, ..position(0, &topic, 0, 1) };
        let set = vec![end, position(1, &topic, 99, 0)];
        fetcher.send(pb::FetchRequest { set, credit_bytes: 1 << 10, ..Default::default() }).await;
        assert_eq!(fetcher.error().await.code, ErrorCode::UnknownPartition);
    }
    let mut other = world.fetcher().await;
    other.set(0, &topic, 0, 1, 1 << 20).await;
    until("both are pushed to", async || {
        world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
        Some(())
    })
    .await;
    let response = other.response().await.expect("pushed");
    assert!(response.error.is_none(), "{:?}", response.error);
    loop {
        let response = fetcher.response().await.expect("pushed");
        assert!(response.error.is_none(), "{:?}", response.error);
        if response.session == 16_999 {
            break;
        }
    }
    world.stop().await;
}

#[tokio::test]
async fn partitions_that_have_nothing_do_not_hold_up_one_that_has() {
    let mut world = World::new().await;
    let topic = world.create("orders", 20).await;
    world.produce(&topic, 19, batch(&["x"])).await.expect("stored");
    let mut fetcher = world.fetcher().await;
    // Many wait at their ends, before the one that is behind its.
    let set = (0..19).map(|partition| position(partition as u32, &topic, partition, 1)).collect();
    fetcher.send(pb::FetchRequest { set, credit_bytes: 64 << 20, ..Default::default() }).await;
    fetcher.set(19, &topic, 19, 1, 0).await;
    let response = fetcher.response().await.expect("pushed");
    assert_eq!((response.fetch_id, &*records(&response.batches, 1)[0].1), (19, "x"));
    world.stop().await;
}
