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
