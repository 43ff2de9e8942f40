//! Producers that paused for too long.

use bytes::Bytes;
use flowstone_protocol::{Compression, ErrorCode, ProducerEpoch, ProducerId, RecordBatchBuilder, Sequence, pb};

use super::transactor::present;
use super::world::{World, soon, until};

/// One value of an idempotent producer.
fn sequenced(producer: i64, epoch: i16, sequence: i32, value: &str) -> Bytes {
    let (id, epoch) = (ProducerId::new(producer), ProducerEpoch::new(epoch));
    let mut batch = RecordBatchBuilder::new(Compression::None).producer(id, epoch, Sequence::new(sequence));
    batch.append(present(), None, Some(value.as_bytes()), []).expect("fits");
    batch.build()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_that_expired_is_told_so_by_every_later_leader_until_it_has_a_new_epoch() {
    let mut world = World::places(3).await;
    // By the clock of this one alone: what the others know of it they know from the log.
    let expires = 1;
    world.set(expires, "producer.id.expiration.ms", "1 ms");
    for id in 1..=3 {
        // Who leads is said here.
        world.set(id, "cluster.preferred_leaders", "false");
    }
    world.start_all(&[1, 2, 3]).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.healthy().await;
    world.hand_over("orders", 0, 2).await;
    let given = soon("an id", world.client(2).log.init_producer(pb::InitProducerRequest {})).await.expect("an id");
    let id = given.into_inner().producer_id;
    let first = sequenced(id, 0, 0, "first");
    let at = until("an acknowledgement", async || {
        world.client(2).produce(&topic, 0, first.clone()).await.map_err(|error| error.to_string())
    })
    .await;
    assert_eq!(world.client(2).produce(&topic, 0, first.clone()).await, Ok(at), "sent again, it is known");
    world.hand_over("orders", 0, expires).await;
    // A duplicate is no write: it keeps nobody.
    until("it is forgotten", async || match world.client(expires).produce(&topic, 0, first.clone()).await {
        Err(error) if error.code == ErrorCode::ProducerExpired => Ok(()),
        answered => Err(format!("{answered:?}")),
    })
    .await;
    let next = sequenced(id, 0, 1, "next");
    let error = world.client(expires).produce(&topic, 0, next.clone()).await.expect_err("it is forgotten");
    assert_eq!(error.code, ErrorCode::ProducerExpired);
    assert!(error.message.contains("producer.id.expiration.ms"), "{error}");
    assert!(error.message.contains("take a new producer id"), "{error}");
    world.kill(expires).await;
    let successor = until("another one leads", async || match world.client(2).leader("orders", 0).await? {
        leader if leader == expires => Err("nobody else yet".to_owned()),
        leader => Ok(leader),
    })
    .await;
    for batch in [&first, &next] {
        until("a refusal by the successor", async || {
            match world.client(successor).produce(&topic, 0, batch.clone()).await {
                Err(error) if error.code == ErrorCode::ProducerExpired => Ok(()),
                Err(error) if error.is_retriable() => Err(error.to_string()),
                answered => panic!("{answered:?}"),
            }
        })
        .await;
    }
    // Nor do those know it who open the partition anew.
    world.start(expires).await;
    world.healthy().await;
    world.kill(successor).await;
    world.start(successor).await;
    world.healthy().await;
    world.hand_over("orders", 0, successor).await;
    let refused = world.client(successor).produce(&topic, 0, next).await.expect_err("it is forgotten");
    assert_eq!(refused.code, ErrorCode::ProducerExpired);
    let anew = sequenced(id, 1, 0, "under a new epoch");
    world.client(successor).produce(&topic, 0, anew).await.expect("that is certainly new");
    assert_eq!(world.values(&topic, 0).await, ["first", "under a new epoch"]);
}
