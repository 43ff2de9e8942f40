//! What is wrong is refused with its code and what to do, and the broker goes on.

use bytes::{Bytes, BytesMut};
use flowstone_protocol::batch::crc_of;
use flowstone_protocol::{Compression, Error, ErrorCode, RecordBatchBuilder, Timestamp, pb};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http;

use crate::world::*;

/// The batch with some bytes changed, its CRC right again.
fn forged(batch: &Bytes, at: usize, bytes: &[u8]) -> Bytes {
    let mut forged = BytesMut::from(&batch[..]);
    forged[at..at + bytes.len()].copy_from_slice(bytes);
    let crc = crc_of(&forged);
    forged[17..21].copy_from_slice(&crc.to_be_bytes());
    forged.freeze()
}

#[tokio::test]
async fn batches_that_lie() {
    let mut world = World::new().await;
    let topic = world.create_with("orders", 1, &[("max.message.bytes", "100000")]).await.expect("created");
    let good = batch(&["a", "b"]);
    let mut wrong_crc = BytesMut::from(&good[..]);
    wrong_crc[17] ^= 1;
    let wrong_crc = wrong_crc.freeze();
    let bomb = build(RecordBatchBuilder::new(Compression::Zstd), &[&"0".repeat(70 << 20)], now());
    assert!(bomb.len() < 100_000, "the bomb is small: {}", bomb.len());
    let hour_ahead = now() + 2 * 3_600_000;
    let rows: Vec<(&str, Bytes, ErrorCode, &str)> = vec![
        ("wrong CRC", wrong_crc, ErrorCode::CorruptBatch, "CRC"),
        ("wrong magic", forged(&good, 16, &[1]), ErrorCode::Unsupported, "format 1"),
        ("lying length", forged(&good, 8, &9_999i32.to_be_bytes()), ErrorCode::CorruptBatch, "bytes"),
        ("lying count", forged(&good, 57, &3i32.to_be_bytes()), ErrorCode::InvalidRecord, "record"),
        ("zero records", forged(&good, 57, &0i32.to_be_bytes()), ErrorCode::InvalidRecord, "record"),
        ("control bit", forged(&good, 21, &0x20i16.to_be_bytes()), ErrorCode::InvalidRecord, "control"),
        ("transactional bit", forged(&good, 21, &0x10i16.to_be_bytes()), ErrorCode::InvalidRecord, "transactional"),
        ("unknown codec", forged(&good, 21, &7i16.to_be_bytes()), ErrorCode::UnsupportedCompression, "7"),
        ("too large", batch(&[&"x".repeat(100_000)]), ErrorCode::BatchTooLarge, "100000"),
        ("bomb", bomb, ErrorCode::BatchTooLarge, "decompress"),
        ("before 1970", batch_at(&["x"], -5), ErrorCode::InvalidTimestamp, "-5"),
        ("far ahead", batch_at(&["x"], hour_ahead), ErrorCode::InvalidTimestamp, "allowed is 0"),
        ("nothing", Bytes::new(), ErrorCode::CorruptBatch, "61"),
        ("half a batch", good.slice(..70), ErrorCode::CorruptBatch, "bytes"),
        ("two batches", [good.clone(), good.clone()].concat().into(), ErrorCode::CorruptBatch, "bytes"),
    ];
    let mut producer = world.producer().await;
    for (what, bytes, code, part) in rows {
        producer.send(&topic, 0, bytes).await;
        let (_, result) = producer.answer().await;
        let error = result.expect_err(what);
        assert_eq!(error.code, code, "{what}: {error:?}");
        assert!(
            error.message.to_lowercase().contains(&part.to_lowercase()),
            "{what}, wanted `{part}`: {}",
            error.message
        );
        assert_eq!((error.topic.as_deref(), error.partition.map(|p| p.get())), (Some("orders"), Some(0)), "{what}");
    }
    // The same stream goes on.
    producer.send(&topic, 0, good).await;
    assert_eq!(producer.answer().await.1, Ok(1));
    assert_eq!(world.values(&topic, 0, 0).await, ["a", "b"]);
    world.stop().await;
}

#[tokio::test]
async fn a_compacted_topic_takes_records_with_keys_alone() {
    let mut world = World::new().await;
    let topic = world.create_with("table", 1, &[("cleanup.policy", "compact")]).await.expect("created");
    let keyed = |compression, keys: &[Option<&str>]| {
        let mut builder = RecordBatchBuilder::new(compression);
        for key in keys {
            let key = key.map(str::as_bytes);
            builder.append(Timestamp::new(now()), key, Some(&[7; 200]), []).expect("small");
        }
        builder.build()
    };
    for codec in [Compression::None, Compression::Zstd] {
        let refused = world.produce(&topic, 0, keyed(codec, &[Some("a"), None])).await;
        assert_refused(refused, ErrorCode::InvalidRecord, "key");
        world.produce(&topic, 0, keyed(codec, &[Some("a"), Some("")])).await.expect("all have one");
    }
    world.stop().await;
}

#[tokio::test]
async fn places_that_do_not_exist() {
    let mut world = World::new().await;
    let topic = world.create("orders", 2).await;
    let nowhere = Topic { name: "nowhere".to_owned(), id: vec![7; 16].into() };
    let malformed = Topic { name: "short".to_owned(), id: vec![7; 3].into() };
    assert_refused(world.produce(&nowhere, 0, batch(&["x"])).await, ErrorCode::UnknownTopic, "look its name up");
    assert_refused(world.produce(&malformed, 0, batch(&["x"])).await, ErrorCode::InvalidRequest, "needs 16");
    assert_refused(world.produce(&topic, 2, batch(&["x"])).await, ErrorCode::UnknownPartition, "from 0 to 1");
    assert_refused(world.produce(&topic, -1, batch(&["x"])).await, ErrorCode::UnknownPartition, "from 0 to 1");

    world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
    let mut fetcher = world.fetcher().await;
    for (id, (topic, partition, offset, code, part)) in [
        (&nowhere, 0, 0, ErrorCode::UnknownTopic, "look its name up"),
        (&topic, 2, 0, ErrorCode::UnknownPartition, "from 0 to 1"),
        (&topic, 0, 99, ErrorCode::OffsetOutOfRange, "0 to 2"),
        (&topic, 0, -1, ErrorCode::OffsetOutOfRange, "0 to 2"),
    ]
    .into_iter()
    .enumerate()
    {
        fetcher.set(id as u32, topic, partition, offset, 1 << 20).await;
        assert_refused(Err::<(), Error>(fetcher.error().await), code, part);
    }
    // Other partitions of the stream go on.
    fetcher.set(9, &topic, 0, 1, 0).await;
    assert_eq!(fetcher.response().await.expect("pushed").fetch_id, 9);
    world.stop().await;
}

#[tokio::test]
async fn topics_that_cannot_be() {
    let mut world = World::new().await;
    world.create("taken", 2).await;
    let long = "x".repeat(250);
    let endless = "x".repeat(1_000_000);
    let none: &[(&str, &str)] = &[];
    for (name, partitions, configs, code, part) in [
        ("", 1, none, ErrorCode::InvalidTopicName, "empty"),
        (".", 1, none, ErrorCode::InvalidTopicName, "'.'"),
        ("..", 1, none, ErrorCode::InvalidTopicName, "'..'"),
        ("a/b", 1, none, ErrorCode::InvalidTopicName, "/"),
        (endless.as_str(), 1, none, ErrorCode::InvalidTopicName, "249"),
        (long.as_str(), 1, none, ErrorCode::InvalidTopicName, "249"),
        ("taken", 1, none, ErrorCode::TopicAlreadyExists, "another name"),
        ("__mine", 1, none, ErrorCode::InternalTopic, "cluster's own"),
        ("many", 1_000_000, none, ErrorCode::InvalidPartitions, "limits.partitions_per_topic"),
        ("minus", -1, none, ErrorCode::InvalidPartitions, "1 to"),
        ("small", 1, &[("segment.bytes", "100000")], ErrorCode::InvalidConfig, "below max.message.bytes"),
        ("typo", 1, &[("retention.mss", "1")], ErrorCode::InvalidConfig, "did you mean `retention.ms`"),
        ("isr", 1, &[("min.insync.replicas", "2")], ErrorCode::InvalidConfig, "majority"),
        ("twice", 1, &[("retention.ms", "1"), ("retention.ms", "2")], ErrorCode::InvalidConfig, "twice"),
    ] {
        assert_refused(world.create_with(name, partitions, configs).await, code, part);
    }
    let request = pb::CreateTopicRequest { name: "copies".to_owned(), replication_factor: 3, ..Default::default() };
    let copies = world.admin.create_topic(request).await.map_err(|status| error_of(&status));
    assert_refused(copies, ErrorCode::InvalidReplicationFactor, "1 broker(s)");

    let mut alter = async |partitions, set: &[(&str, &str)], unset: &[&str], name: &str| {
        let request = pb::AlterTopicRequest {
            name: name.to_owned(),
            partitions,
            set: entries(set),
            unset: unset.iter().map(|key| (*key).to_owned()).collect(),
            validate_only: false,
        };
        world.admin.alter_topic(request).await.map(|_| ()).map_err(|status| error_of(&status))
    };
    assert_refused(alter(1, none, &[], "taken").await, ErrorCode::InvalidPartitions, "only ever added");
    assert_refused(alter(3, none, &[], "nowhere").await, ErrorCode::UnknownTopic, "create it first");
    assert_refused(alter(3, none, &[], "__cluster_metadata").await, ErrorCode::InternalTopic, "cluster's own");
    assert_refused(alter(0, none, &["retention"], "taken").await, ErrorCode::InvalidConfig, "unknown topic config");
    let both = alter(0, &[("retention.ms", "1")], &["retention.ms"], "taken").await;
    assert_refused(both, ErrorCode::InvalidConfig, "both set and unset");
    world.stop().await;
}

#[tokio::test]
async fn the_clusters_own_topics_are_read_and_never_written() {
    let mut world = World::new().await;
    world.create("orders", 1).await;
    let request = pb::MetadataRequest { topics: vec!["__cluster_metadata".to_owned()], include_internal: false };
    let metadata = world.log.metadata(request).await.expect("told").into_inner().topics.remove(0);
    assert!(metadata.internal && metadata.error.is_none());
    let own = Topic { name: metadata.name, id: metadata.topic_id };
    assert_refused(world.produce(&own, 0, batch(&["x"])).await, ErrorCode::InternalTopic, "never written");
    let delete = pb::DeleteTopicRequest { name: own.name.clone() };
    let deleted = world.admin.delete_topic(delete).await.map_err(|status| error_of(&status));
    assert_refused(deleted, ErrorCode::InternalTopic, "cluster's own");
    let trim = pb::TrimPartitionRequest { topic: own.name.clone(), partition: 0, offset: -1 };
    let trimmed = world.admin.trim_partition(trim).await.map_err(|status| error_of(&status));
    assert_refused(trimmed, ErrorCode::InternalTopic, "cluster's own");
    let mut fetcher = world.fetcher().await;
    fetcher.set(0, &own, 0, 0, 1 << 20).await;
    assert!(!fetcher.response().await.expect("pushed").batches.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn a_request_on_the_wrong_stream() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    let channel = channel(&world.broker).await;
    // A fetch request where produce requests belong, and the other way round.
    let fetch = pb::FetchRequest { set: vec![position(0, &topic, 0, 0)], ..Default::default() };
    let error = raw::<pb::FetchRequest, pb::ProduceResponse>(channel.clone(), "/flowstone.v1.Log/Produce", fetch).await;
    assert_eq!(error.code, ErrorCode::InvalidRequest, "{error:?}");
    assert!(error.message.contains("no ProduceRequest"), "{}", error.message);
    let produce = pb::ProduceRequest { request_id: 1, ..Default::default() };
    let error = raw::<pb::ProduceRequest, pb::FetchResponse>(channel, "/flowstone.v1.Log/Fetch", produce).await;
    assert_eq!(error.code, ErrorCode::InvalidRequest, "{error:?}");
    assert!(error.message.contains("no FetchRequest"), "{}", error.message);
    world.produce(&topic, 0, batch(&["x"])).await.expect("the broker goes on");
    world.stop().await;
}

/// Sends one message on a bidirectional call, whatever the call carries, and takes its error.
async fn raw<Q, A>(channel: tonic::transport::Channel, path: &'static str, message: Q) -> Error
where
    Q: prost::Message + Default + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.expect("connected");
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    sender.send(message).await.expect("room");
    let codec = tonic_prost::ProstCodec::<Q, A>::default();
    let path = http::uri::PathAndQuery::from_static(path);
    let request = tonic::Request::new(ReceiverStream::new(receiver));
    let outcome = soon("an answer", async {
        let mut answers = client.streaming(request, path, codec).await?.into_inner();
        answers.message().await
    })
    .await;
    error_of(&outcome.err().expect("refused"))
}

#[tokio::test]
async fn a_message_above_the_limit() {
    let mut world = World::with(&[("limits.request_bytes", "2 MiB")]).await;
    let topic = world.create("orders", 1).await;
    let mut producer = world.producer().await;
    producer.send(&topic, 0, vec![0; 3 << 20].into()).await;
    let error = producer.result().await.expect_err("the stream ends");
    assert_eq!(error.code, ErrorCode::MessageTooLarge, "{error:?}");
    assert!(error.message.contains("limits.request_bytes"), "{}", error.message);
    let large = world.create_with("large", 1, &[("max.message.bytes", "3 MiB"), ("segment.bytes", "8 MiB")]).await;
    assert_refused(large, ErrorCode::InvalidConfig, "limits.request_bytes");
    world.produce(&topic, 0, batch(&["x"])).await.expect("the broker goes on");
    world.stop().await;
}
