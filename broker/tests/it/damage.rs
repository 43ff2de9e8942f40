//! Bytes that changed on disk are told, with their place; the rest goes on.

use std::path::PathBuf;

use flowstone_protocol::{ErrorCode, pb};

use crate::world::*;

/// The segments of one partition, oldest first.
fn segments(world_data: &std::path::Path, topic: &Topic, partition: i32) -> Vec<PathBuf> {
    let id = uuid::Uuid::from_slice(&topic.id).expect("16 bytes");
    let folder = world_data.join("data/topics").join(id.to_string()).join(partition.to_string());
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("readable")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    found.sort();
    found
}

#[tokio::test]
async fn a_flipped_bit_in_a_sealed_segment() {
    let mut world = World::new().await;
    let configs = [("segment.bytes", "300000"), ("max.message.bytes", "100000")];
    let topic = world.create_with("orders", 2, &configs).await.expect("created");
    let value = "x".repeat(40_000);
    for partition in [0, 1] {
        for _ in 0..20 {
            world.produce(&topic, partition, batch(&[&value])).await.expect("stored");
        }
    }
    let dir = world.stop().await;
    let sealed = segments(dir.path(), &topic, 0);
    assert!(sealed.len() >= 3, "{sealed:?}");
    let mut bytes = std::fs::read(&sealed[1]).expect("readable");
    // In the middle of what one read brings: some whole batches lie before it in the same segment.
    let at = bytes.len() * 5 / 8;
    bytes[at] ^= 1;
    std::fs::write(&sealed[1], bytes).expect("written");

    let mut world = World::at(dir, &[]).await;
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 0, 64 << 20).await;
    fetcher.set(1, &topic, 1, 0, 0).await;
    let (mut before, mut other) = (Vec::new(), Vec::new());
    let mut error = None;
    while other.len() < 20 || error.is_none() {
        let response = fetcher.response().await.expect("the stream goes on");
        match (response.fetch_id, response.error) {
            (0, Some(detail)) => error = Some(flowstone_protocol::Error::from_detail(&detail)),
            (0, None) => before.extend(records(&response.batches, 0)),
            (_, None) => other.extend(records(&response.batches, 0)),
            (_, Some(detail)) => panic!("{detail:?}"),
        }
    }
    let error = error.expect("told");
    assert_eq!(error.code, ErrorCode::CorruptLog);
    let segment = sealed[1].file_name().expect("a name").to_string_lossy().into_owned();
    assert!(error.message.contains(&segment), "{} names {segment}", error.message);
    assert!(error.message.contains("position") && error.message.contains("offset"), "{}", error.message);
    // All that lies before the damage was delivered.
    let last = before.last().expect("some").0;
    assert!(error.message.contains(&format!("(offset {})", last + 1)), "read to {last}, and: {}", error.message);
    // What lies behind it can be read, and the partition takes writes.
    let last = world.produce(&topic, 0, batch(&["after"])).await.expect("stored");
    assert_eq!(world.values(&topic, 0, last).await, ["after"]);
    world.stop().await;
}

#[tokio::test]
async fn a_garbage_tail_is_cut_and_what_was_acknowledged_stays() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    for value in ["a", "b"] {
        world.produce(&topic, 0, batch(&[value])).await.expect("stored");
    }
    let dir = world.stop().await;
    let last = segments(dir.path(), &topic, 0).pop().expect("a segment");
    let mut bytes = std::fs::read(&last).expect("readable");
    bytes.extend_from_slice(b"no batch at all, but some bytes that lie behind the last one");
    std::fs::write(&last, bytes).expect("written");
    std::fs::remove_file(last.with_extension("index")).ok();
    let mut world = World::at(dir, &[]).await;
    assert_eq!(world.values(&topic, 0, 0).await, ["a", "b"]);
    world.produce(&topic, 0, batch(&["c"])).await.expect("stored");
    assert_eq!(world.values(&topic, 0, 0).await, ["a", "b", "c"]);
    world.stop().await;
}

#[tokio::test]
async fn one_folder_that_cannot_be_read_does_not_keep_the_others_from_being_served() {
    let mut world = World::new().await;
    let topic = world.create("orders", 2).await;
    for partition in [0, 1] {
        world.produce(&topic, partition, batch(&["before"])).await.expect("stored");
    }
    let dir = world.stop().await;
    // A file that cannot be opened, as after EIO or without the right to.
    let segment = segments(dir.path(), &topic, 0).pop().expect("a segment");
    let aside = segment.with_extension("aside");
    std::fs::rename(&segment, &aside).expect("moved");
    std::fs::create_dir(&segment).expect("made");

    let mut world = World::at(dir, &[]).await;
    world.produce(&topic, 1, batch(&["after"])).await.expect("the other partition is served");
    let error = world.produce(&topic, 0, batch(&["x"])).await.expect_err("it failed");
    assert_eq!(error.code, ErrorCode::StorageFailed, "{error:?}");
    let described = world.describe("orders").await;
    assert!(described.partitions[0].error.is_some() && described.partitions[1].error.is_none());
    let (status, text) = crate::http::get(world.broker.admin_addr, "/readyz").await;
    assert_eq!(status, 503, "{text}");
    assert!(text.contains("partition orders-0: ") && !text.contains("orders-1"), "{text}");

    // Who follows the metadata is told that nobody leads it, and later that it is led again.
    let mut watch = world.log.watch_metadata(pb::WatchMetadataRequest::default()).await.expect("told").into_inner();
    let mut leaders = async || {
        let update = soon("an update", watch.message()).await.expect("the stream goes on").expect("an update");
        let topics = update.metadata.expect("metadata").topics;
        topics.first().map(|topic| topic.partitions.iter().map(|partition| partition.leader_id).collect::<Vec<_>>())
    };
    assert_eq!(leaders().await, Some(vec![-1, 1]));

    // Once it can be read, it is, without another start.
    std::fs::remove_dir(&segment).expect("removed");
    std::fs::rename(&aside, &segment).expect("moved back");
    while leaders().await != Some(vec![1, 1]) {}
    until("it is opened again", async || world.produce(&topic, 0, batch(&["after"])).await.ok()).await;
    assert_eq!(world.values(&topic, 0, 0).await, ["before", "after"]);
    let (status, text) = crate::http::get(world.broker.admin_addr, "/readyz").await;
    assert_eq!(status, 200, "{text}");
    world.stop().await;
}
