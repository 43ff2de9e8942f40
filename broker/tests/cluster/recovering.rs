//! The metadata, where most of its voters are gone for good.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::peer::peer_client::PeerClient;
use flowstone_protocol::{DirectoryId, pb, peer};
use flowstone_storage::{DataDir, Disk, RealDisk};
use prost::Message;
use tokio::net::TcpListener;

use super::world::{Client, Topic, World, error_of, free_address, soon, until};

fn recovery(topic: &str, from: i32) -> pb::RecoverPartitionRequest {
    pb::RecoverPartitionRequest { topic: topic.to_owned(), partition: 0, from_broker_id: from, validate_only: false }
}

/// Three brokers with one value; brokers 1 and 2 and their disks are gone, broker 3 was cut off as well.
async fn only_the_third_disk_is_left() -> (World, Topic) {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.produce(&topic, 0, "kept").await;
    for broker in [1, 2, 3] {
        world.kill(broker).await;
    }
    world.wipe(1);
    world.wipe(2);
    (world, topic)
}

/// Broker 3 serves: the rest is as after any recovery.
async fn goes_on(mut world: World, topic: Topic) {
    until("the partition is recovered", async || {
        let answered = soon("recover", world.client(3).admin.recover_partition(recovery("orders", 3))).await;
        answered.map(|_| ()).map_err(|status| error_of(status).to_string())
    })
    .await;
    assert_eq!(world.values(&topic, 0).await, ["kept"]);
    for lost in [1, 2] {
        world.start(lost).await;
    }
    world.healthy().await;
    world.kill(3).await;
    assert_eq!(world.values(&topic, 0).await, ["kept"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metadata_goes_on_with_what_its_last_voter_has() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.produce(&topic, 0, "kept").await;
    for lost in [1, 2] {
        world.kill(lost).await;
        world.wipe(lost);
    }
    until("the metadata is recovered", async || {
        let answered =
            soon("recover", world.client(3).admin.recover_partition(recovery("__cluster_metadata", 3))).await;
        answered.map(|_| ()).map_err(|status| error_of(status).to_string())
    })
    .await;
    goes_on(world, topic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_that_was_started_again_recovers_the_metadata_before_it_is_registered() {
    let (mut world, topic) = only_the_third_disk_is_left().await;
    let address = free_address().await;
    world.set(3, "listen.client", &address);
    let starting = tokio::spawn(world.starting(3));
    let mut client = Client::of(address.parse().expect("an address"));
    until("the metadata is recovered", async || {
        let answered = soon("recover", client.admin.recover_partition(recovery("__cluster_metadata", 3))).await;
        answered.map(|_| ()).map_err(|status| error_of(status).to_string())
    })
    .await;
    let broker = soon("start", starting).await.expect("no panic").expect("it starts");
    world.running.insert(3, broker);
    goes_on(world, topic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_that_was_cut_off_is_gone_on_with_at_the_next_start() {
    let (mut world, topic) = only_the_third_disk_is_left().await;
    // What is noted first of all; nothing more was done.
    begin_recovery(&world.places[&3].dir);
    world.start(3).await;
    // And as it is from then on.
    world.kill(3).await;
    world.start(3).await;
    goes_on(world, topic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_recovered_metadata_does_not_know_is_set_aside_rather_than_deleted() {
    let (mut world, _topic) = only_the_third_disk_is_left().await;
    begin_recovery(&world.places[&3].dir);
    // A topic that only the metadata that burnt knew of.
    let dir = world.places[&3].dir.clone();
    let unknown = dir.join("topics/00000000-0000-0000-0000-00000000002a/0");
    std::fs::create_dir_all(&unknown).expect("a folder");
    std::fs::write(unknown.join("some.log"), b"acknowledged").expect("written");
    world.start(3).await;
    assert!(!unknown.exists(), "it is not in the way of another one");
    let aside: Vec<_> = std::fs::read_dir(dir.join("set-aside")).expect("there").flatten().collect();
    assert_eq!(aside.len(), 1, "{aside:?}");
    assert_eq!(std::fs::read(aside[0].path().join("some.log")).expect("kept"), b"acknowledged");
}

fn begin_recovery(dir: &Path) {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let data_dir = DataDir::open_or_create(disk, dir, DirectoryId::new(1), 1).expect("a data directory");
    let noted = data_dir.founding().expect("read").expect("it belongs to a cluster");
    let mut belonging = peer::Belonging::decode(noted).expect("as it was written");
    let founding = belonging.founding.as_ref().expect("founded");
    let founder = founding.voters.iter().find(|voter| voter.broker_id == 3).expect("a founder").replica_id;
    belonging.metadata_recovered_from = match belonging.metadata_replica_id {
        0 => founder,
        id => id,
    };
    belonging.metadata_replica_id = founder ^ 1;
    data_dir.set_founding(&belonging.encode_to_vec()).expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metadata_of_a_cluster_that_is_well_is_not_recovered() {
    let world = World::of(3).await;
    for (asked, from) in [(1, 1), (1, 2), (2, 3), (3, 3)] {
        let request = recovery("__cluster_metadata", from);
        let answered = soon("recover", world.client(asked).admin.recover_partition(request)).await;
        let error = error_of(answered.expect_err("there is a majority"));
        assert!(error.message.contains("leads the metadata"), "{error}");
    }
    world.healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_tells_its_cluster_from_the_first_moment() {
    let mut world = World::of(3).await;
    for broker in [1, 2, 3] {
        world.kill(broker).await;
    }
    // Its machine takes connections and answers nothing: who asks it waits as long as that takes.
    let third = until("the third's port", async || {
        TcpListener::bind(&world.places[&3].peer).await.map_err(|error| error.to_string())
    })
    .await;
    let starting = tokio::spawn(world.starting(2));
    let address = format!("http://{}", world.places[&2].peer);
    let said = until("the second answers", async || {
        let mut client = PeerClient::connect(address.clone()).await.map_err(|error| error.to_string())?;
        let caller = peer::Caller {
            protocol_version: 1,
            broker_id: 9,
            directory_id: DirectoryId::new(9).to_bytes().to_vec().into(),
            to_broker_id: -1,
            ..peer::Caller::default()
        };
        let request = peer::HelloRequest { caller: Some(caller), ..peer::HelloRequest::default() };
        let said = tokio::time::timeout(Duration::from_secs(5), client.hello(request)).await;
        said.map_err(|error| error.to_string())?.map_err(|status| status.to_string())
    })
    .await;
    assert!(said.into_inner().founding.is_some(), "an empty first seed that hears this would found a second cluster");
    starting.abort();
    drop((starting.await, third));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_broker_follows_a_recovered_metadata_that_knows_less_and_loses_nothing_by_it() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.produce(&topic, 0, "kept").await;
    world.healthy().await;
    world.kill(3).await;
    // The third's metadata knows neither the fourth broker nor what was made on it.
    world.add_place(4).await;
    world.start(4).await;
    until("broker 3 is known to be dead", async || {
        let health = world.client(4).health().await.map_err(|error| error.to_string())?;
        let third = health.brokers.iter().find(|broker| broker.broker_id == 3).ok_or("unknown")?;
        if third.state() == pb::BrokerState::Dead { Ok(()) } else { Err(format!("{third:?}")) }
    })
    .await;
    let late = world.client(4).create("late", 1, 3).await.expect("created");
    world.produce(&late, 0, "acknowledged").await;
    let id = flowstone_protocol::TopicId::from_slice(&late.id).expect("an id").to_string();
    let here = world.places[&4].dir.join("topics").join(&id);
    assert!(here.exists());
    let mut watch = world.client(4).watch().await;
    let told = soon("all topics", watch.message()).await.expect("served").expect("something");
    assert!(told.metadata.expect("whole").topics.iter().any(|topic| topic.name == "late"));
    for burnt in [1, 2] {
        world.kill(burnt).await;
        world.wipe(burnt);
    }
    begin_recovery(&world.places[&3].dir);
    world.start(3).await;
    until("the fourth is taken in again, without a restart", async || {
        let health = world.client(3).health().await.map_err(|error| error.to_string())?;
        let fourth = health.brokers.iter().find(|broker| broker.broker_id == 4).ok_or("unknown")?;
        if fourth.state() == pb::BrokerState::Alive { Ok(()) } else { Err(format!("{fourth:?}")) }
    })
    .await;
    until("the fourth knows what the metadata knows", async || {
        let known = world.client(4).metadata("late").await.map_err(|error| error.to_string())?;
        if known.topics[0].error.is_some() && known.metadata_recovery > 0 { Ok(()) } else { Err(format!("{known:?}")) }
    })
    .await;
    // Who watches is told as well, though the offset has gone back.
    loop {
        let told = soon("news", watch.message()).await.expect("served").expect("something");
        let metadata = told.metadata.expect("told");
        if metadata.metadata_recovery > 0 {
            assert!(metadata.topics.iter().all(|topic| topic.name != "late"), "{metadata:?}");
            assert!(metadata.topics.iter().any(|topic| topic.name == "orders"), "everything is told anew");
            break;
        }
    }
    let aside = world.places[&4].dir.join("set-aside");
    until("what it has of the topic is set aside", async || {
        let found = std::fs::read_dir(&aside).map_err(|error| error.to_string())?.flatten();
        let names: Vec<String> = found.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        if !here.exists() && names.iter().any(|name| name.starts_with(&id)) {
            Ok(())
        } else {
            Err(format!("{names:?}"))
        }
    })
    .await;
    // It is one of the cluster: what is made now is made on it.
    until("a topic is made on both", async || {
        let made = world.client(4).create("again", 1, 2).await;
        made.map(|_| ()).map_err(|error| error.to_string())
    })
    .await;
}
