//! Clients that ask for too much: names and values of a message's length, watchers that take nothing.

use flowstone_protocol::{ErrorCode, pb};

use crate::world::*;

#[tokio::test]
async fn names_and_values_of_20_kb_are_refused_and_their_connection_goes_on() {
    let mut world = World::new().await;
    world.create("orders", 1).await;
    let long = "x".repeat(20_000);
    assert_refused(world.create_with(&long, 1, &[]).await, ErrorCode::InvalidTopicName, "249");
    for configs in [[("retention.ms", long.as_str())], [(long.as_str(), "1")]] {
        let error = world.create_with("other", 1, &configs).await.expect_err("refused");
        assert_eq!(error.code, ErrorCode::InvalidConfig, "{error:?}");
    }
    let request = pb::DescribeTopicRequest { name: long.clone() };
    let described = world.admin.describe_topic(request).await.map_err(|status| error_of(&status));
    assert_refused(described, ErrorCode::InvalidTopicName, "249");
    let request = pb::TrimPartitionRequest { topic: long.clone(), partition: 0, offset: -1 };
    let trimmed = world.admin.trim_partition(request).await.map_err(|status| error_of(&status));
    assert_refused(trimmed, ErrorCode::InvalidTopicName, "249");
    let request = pb::AlterTopicRequest { name: "orders".to_owned(), unset: vec![long.clone()], ..Default::default() };
    let altered = world.admin.alter_topic(request).await.map_err(|status| error_of(&status));
    assert_refused(altered, ErrorCode::InvalidConfig, "config");
    let request = pb::MetadataRequest { topics: vec![long], include_internal: false };
    let told = world.log.metadata(request).await.expect("told").into_inner().topics.remove(0);
    assert_eq!(told.error.expect("an error").code(), ErrorCode::InvalidTopicName);
    // The very connection that asked for all that.
    world.create("another", 1).await;
    world.stop().await;
}

#[tokio::test]
async fn watchers_that_take_nothing_hold_up_nobody() {
    let mut world = World::new().await;
    world.create("orders", 100).await;
    let mut watchers = Vec::new();
    for _ in 0..4 {
        let channel = channel(&world.broker).await;
        for _ in 0..8 {
            let mut log = pb::log_client::LogClient::new(channel.clone());
            let request = pb::WatchMetadataRequest { include_internal: true };
            watchers.push(log.watch_metadata(request).await.expect("a stream").into_inner());
        }
    }
    for number in 0..20 {
        world.create(&format!("topic-{number}"), 10).await;
    }
    // Each gets to where things are, in fewer updates than there were changes while it took none.
    for mut watcher in watchers.drain(..) {
        let mut seen = std::collections::HashSet::new();
        while seen.len() < 21 {
            let update = soon("an update", watcher.message()).await.expect("no error").expect("an update");
            let topics = update.metadata.expect("metadata").topics;
            seen.extend(topics.into_iter().filter(|topic| !topic.internal).map(|topic| topic.name));
        }
    }
    world.stop().await;
}
