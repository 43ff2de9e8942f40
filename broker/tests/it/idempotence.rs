//! An idempotent producer's batch is stored once, whatever is sent again, restarts included.

use flowstone_protocol::{ErrorCode, pb};

use crate::world::*;

#[tokio::test]
async fn a_batch_sent_again_gets_its_first_offset() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let id = world.log.init_producer(pb::InitProducerRequest {}).await.expect("an id").into_inner().producer_id;
    assert!(id >= 0);
    let first = sequenced(id, 0, 0, &["a", "b"]);
    let second = sequenced(id, 0, 2, &["c"]);
    let mut producer = world.producer().await;
    // Both twice, all under way at once.
    for batch in [&first, &first, &second, &second] {
        producer.send(&topic, 0, batch.clone()).await;
    }
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(producer.answer().await);
    }
    answers.sort_by_key(|(request, _)| *request);
    let offsets: Vec<_> = answers.into_iter().map(|(_, offset)| offset.expect("stored or a duplicate")).collect();
    assert_eq!(offsets, [1, 1, 3, 3]);
    assert_eq!(world.values(&topic, 0, 0).await, ["a", "b", "c"]);

    let mut world = world.restart().await;
    assert_eq!(world.produce(&topic, 0, second.clone()).await, Ok(3));
    let third = world.produce(&topic, 0, sequenced(id, 0, 3, &["d"])).await.expect("goes on");
    assert!(third > 3);
    let mut world = world.restart().await;
    assert_eq!(world.produce(&topic, 0, first).await, Ok(1));
    assert_eq!(world.values(&topic, 0, 0).await, ["a", "b", "c", "d"]);
    world.stop().await;
}

#[tokio::test]
async fn gaps_strangers_and_old_epochs_are_refused() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let unknown = world.produce(&topic, 0, sequenced(9, 0, 4, &["x"])).await;
    assert_refused(unknown, ErrorCode::UnknownProducer, "take a new producer id");
    world.produce(&topic, 0, sequenced(9, 1, 0, &["x"])).await.expect("stored");
    let gap = world.produce(&topic, 0, sequenced(9, 1, 5, &["x"])).await;
    assert_refused(gap, ErrorCode::OutOfOrderSequence, "1 is next");
    let fenced = world.produce(&topic, 0, sequenced(9, 0, 1, &["x"])).await;
    assert_refused(fenced, ErrorCode::ProducerFenced, "newer instance");
    let mut world = world.restart().await;
    let gap = world.produce(&topic, 0, sequenced(9, 1, 5, &["x"])).await;
    assert_refused(gap, ErrorCode::OutOfOrderSequence, "1 is next");
    world.produce(&topic, 0, sequenced(9, 1, 1, &["y"])).await.expect("goes on");
    assert_eq!(world.values(&topic, 0, 0).await, ["x", "y"]);
    world.stop().await;
}

#[tokio::test]
async fn what_is_stored_is_answered_whatever_its_topic_has_become_since() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let value = "x".repeat(50_000);
    let stored = sequenced(7, 0, 0, &[&value]);
    let offset = world.produce(&topic, 0, stored.clone()).await.expect("stored");
    let request = pb::AlterTopicRequest {
        name: topic.name.clone(),
        set: entries(&[("max.message.bytes", "10000")]),
        ..Default::default()
    };
    world.admin.alter_topic(request).await.expect("altered");
    let next = sequenced(7, 0, 1, &[&value]);
    until("the lower maximum holds", async || {
        world.produce(&topic, 0, batch(&[&value])).await.err().filter(|error| error.code == ErrorCode::BatchTooLarge)
    })
    .await;
    assert_eq!(world.produce(&topic, 0, stored).await, Ok(offset), "sent again: it is where it was");
    assert_refused(world.produce(&topic, 0, next).await, ErrorCode::BatchTooLarge, "max.message.bytes");
    world.stop().await;
}

#[tokio::test]
async fn a_duplicate_has_the_time_at_which_it_was_appended_first() {
    let mut world = World::new().await;
    let configs = [("message.timestamp.type", "LogAppendTime")];
    let topic = world.create_with("orders", 1, &configs).await.expect("created");
    let batch = sequenced(7, 0, 0, &["x"]);
    let mut producer = world.producer().await;
    producer.send(&topic, 0, batch.clone()).await;
    let first = producer.result().await.expect("the stream goes on").expect("answered");
    assert!(first.error.is_none() && first.log_append_time > 0, "{first:?}");
    until("the clock goes on", async || (now() > first.log_append_time).then_some(())).await;
    producer.send(&topic, 0, batch).await;
    let again = producer.result().await.expect("the stream goes on").expect("answered");
    assert_eq!((again.base_offset, again.log_append_time), (first.base_offset, first.log_append_time));
    world.stop().await;
}
