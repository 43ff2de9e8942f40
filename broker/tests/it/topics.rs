//! Topics: made, changed, trimmed, deleted, and told of.

use flowstone_protocol::{ErrorCode, pb};

use crate::world::*;

#[tokio::test]
async fn a_topic_lives_and_ends() {
    let mut world = World::new().await;
    let topic = world.create_with("orders", 3, &[("retention.ms", "1d")]).await.expect("created");
    let described = world.describe("orders").await;
    assert_eq!((described.partitions.len(), described.replication_factor, described.internal), (3, 1, false));
    assert!(described.partitions.iter().all(|partition| partition.leader_id == 1 && partition.error.is_none()));
    let config = |topic: &pb::TopicDescription, key: &str| {
        let found = topic.configs.iter().find(|config| config.key == key).expect(key);
        (found.value.clone(), found.source())
    };
    assert_eq!(config(&described, "retention.ms"), ("86400000".to_owned(), pb::ConfigSource::Topic));
    assert_eq!(config(&described, "segment.ms").1, pb::ConfigSource::Default);

    let alter = pb::AlterTopicRequest {
        name: "orders".to_owned(),
        set: entries(&[("segment.bytes", "2 MiB")]),
        unset: vec!["retention.ms".to_owned()],
        partitions: 5,
        validate_only: false,
    };
    let altered = world.admin.alter_topic(alter).await.expect("altered").into_inner().topic.expect("described");
    assert_eq!(altered.partitions.len(), 5);
    assert_eq!(config(&altered, "retention.ms"), ("604800000".to_owned(), pb::ConfigSource::Default));
    assert_eq!(config(&altered, "segment.bytes"), ("2097152".to_owned(), pb::ConfigSource::Topic));
    world.produce(&topic, 4, batch(&["in the new one"])).await.expect("stored");

    let mut world = world.restart().await;
    let again = world.describe("orders").await;
    assert_eq!((again.topic_id.clone(), again.partitions.len()), (topic.id.clone(), 5));
    assert_eq!(world.values(&topic, 4, 0).await, ["in the new one"]);

    world.admin.delete_topic(pb::DeleteTopicRequest { name: "orders".to_owned() }).await.expect("deleted");
    assert_refused(world.produce(&topic, 0, batch(&["late"])).await, ErrorCode::UnknownTopic, "deleted");
    let folder = world.dir.path().join("data/topics");
    until("its folder is gone", async || {
        let left = std::fs::read_dir(&folder).expect("readable").count();
        // The metadata's own stays.
        (left <= 1).then_some(())
    })
    .await;
    // The name is free again, and the new topic is another one.
    let next = world.create("orders", 1).await;
    assert_ne!(next.id, topic.id);
    assert!(world.values(&next, 0, 0).await.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn only_checking_changes_nothing() {
    let mut world = World::new().await;
    let request =
        pb::CreateTopicRequest { name: "maybe".to_owned(), partitions: 2, validate_only: true, ..Default::default() };
    let checked = world.admin.create_topic(request).await.expect("valid").into_inner().topic.expect("described");
    assert_eq!(checked.partitions.len(), 2);
    let listed = world.admin.list_topics(pb::ListTopicsRequest::default()).await.expect("listed").into_inner();
    assert!(listed.topics.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn lists_hide_what_is_the_clusters_own() {
    let mut world = World::new().await;
    world.create("b", 1).await;
    world.create("a", 2).await;
    let mut list = async |include_internal| {
        let request = pb::ListTopicsRequest { include_internal };
        let topics = world.admin.list_topics(request).await.expect("listed").into_inner().topics;
        topics.into_iter().map(|topic| topic.name).collect::<Vec<_>>()
    };
    assert_eq!(list(false).await, ["a", "b"]);
    assert_eq!(list(true).await, ["__cluster_metadata", "a", "b"]);
    let cluster = world.admin.describe_cluster(pb::DescribeClusterRequest {}).await.expect("described").into_inner();
    assert_eq!((cluster.topics, cluster.partitions, cluster.controller_id, cluster.broker_id), (2, 3, 1, 1));
    assert_eq!(cluster.brokers[0].address, world.broker.client_addr.to_string());
    assert_eq!(cluster.cluster_id, world.broker.cluster_id.to_string());
    world.stop().await;
}

#[tokio::test]
async fn trimmed_records_are_gone_for_readers() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    for value in ["a", "b", "c"] {
        world.produce(&topic, 0, batch(&[value])).await.expect("stored");
    }
    let mut trim = async |offset| {
        let request = pb::TrimPartitionRequest { topic: "orders".to_owned(), partition: 0, offset };
        let response = world.admin.trim_partition(request).await.map_err(|status| error_of(&status));
        response.map(|response| response.into_inner().log_start)
    };
    assert_refused(trim(99).await, ErrorCode::OffsetOutOfRange, "begins at 0 and ends at 4");
    assert_refused(trim(-2).await, ErrorCode::OffsetOutOfRange, "begins at 0");
    assert_eq!(trim(2).await, Ok(2));
    assert_eq!(trim(1).await, Ok(2), "it never goes back");
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &topic, 0, 1, 1 << 20).await;
    let error = fetcher.error().await;
    assert_eq!(error.code, ErrorCode::OffsetOutOfRange);
    assert!(error.message.contains('2'), "names the range: {}", error.message);
    assert_eq!(world.values(&topic, 0, 2).await, ["b", "c"]);
    let mut world = world.restart().await;
    assert_eq!(world.offset(&topic, 0, Start).await.expect("listed").offset, 2);
    let request = pb::TrimPartitionRequest { topic: "orders".to_owned(), partition: 0, offset: -1 };
    world.admin.trim_partition(request).await.expect("trimmed to its end");
    let start = world.offset(&topic, 0, Start).await.expect("listed");
    assert_eq!(start.records, 0);
    world.stop().await;
}

#[tokio::test]
async fn metadata_names_what_is_and_refuses_what_is_not() {
    let mut world = World::new().await;
    let topic = world.create("orders", 2).await;
    let topics = ["orders", "nowhere", "a/b"].map(str::to_owned).to_vec();
    let request = pb::MetadataRequest { topics, include_internal: false };
    let metadata = world.log.metadata(request).await.expect("told").into_inner();
    assert_eq!((metadata.controller_id, metadata.brokers.len()), (1, 1));
    let [orders, nowhere, malformed] = &metadata.topics[..] else { panic!("{:?}", metadata.topics) };
    assert_eq!((orders.topic_id.clone(), orders.partitions.len()), (topic.id, 2));
    assert!(orders.partitions.iter().all(|partition| partition.leader_id == 1 && partition.leader_epoch >= 1));
    let code = |topic: &pb::TopicMetadata| topic.error.as_ref().expect("refused").code();
    assert_eq!((code(nowhere), code(malformed)), (ErrorCode::UnknownTopic, ErrorCode::InvalidTopicName));
    world.stop().await;
}

#[tokio::test]
async fn a_watcher_is_told_of_every_change() {
    let mut world = World::new().await;
    world.create("first", 1).await;
    let mut watch = world.log.watch_metadata(pb::WatchMetadataRequest::default()).await.expect("told").into_inner();
    let mut next = async || {
        let update = soon("an update", watch.message()).await.expect("the stream goes on").expect("an update");
        let names = update.metadata.expect("metadata").topics.into_iter().map(|topic| topic.name).collect::<Vec<_>>();
        (names, update.deleted_topic_ids)
    };
    assert_eq!(next().await, (vec!["first".to_owned()], Vec::new()));
    let second = world.create("second", 1).await;
    // It is told of the topic, and again when its leader is known.
    let (names, deleted) = next().await;
    assert_eq!((names, deleted), (vec!["second".to_owned()], Vec::new()));
    world.admin.delete_topic(pb::DeleteTopicRequest { name: "second".to_owned() }).await.expect("deleted");
    let deleted = loop {
        let (names, deleted) = next().await;
        if !deleted.is_empty() {
            break deleted;
        }
        assert_eq!(names, ["second"]);
    };
    assert_eq!(deleted, [second.id]);
    world.stop().await;
}

#[tokio::test]
async fn altered_settings_hold_at_once() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let value = "x".repeat(60_000);
    for _ in 0..4 {
        world.produce(&topic, 0, batch(&[&value])).await.expect("stored");
    }
    let segments = |world: &World| {
        let id = uuid::Uuid::from_slice(&topic.id).expect("16 bytes").to_string();
        let folder = world.dir.path().join("data/topics").join(id).join("0");
        let names = std::fs::read_dir(folder).expect("readable").map(|entry| entry.expect("readable").file_name());
        names.filter(|name| name.to_string_lossy().ends_with(".log")).count()
    };
    assert_eq!(segments(&world), 1);
    let alter = pb::AlterTopicRequest {
        name: "orders".to_owned(),
        set: entries(&[("segment.bytes", "100000"), ("max.message.bytes", "70000")]),
        ..Default::default()
    };
    world.admin.alter_topic(alter).await.expect("altered");
    let large = "x".repeat(80_000);
    let refused = until("the new limit holds", async || world.produce(&topic, 0, batch(&[&large])).await.err()).await;
    assert_eq!(refused.code, ErrorCode::BatchTooLarge);
    for _ in 0..4 {
        world.produce(&topic, 0, batch(&[&value])).await.expect("stored");
    }
    assert!(segments(&world) >= 4, "{} segments", segments(&world));
    world.stop().await;
}
