//! Brokers that die, come back, and lose what they had.

use flowstone_protocol::peer::peer_client::PeerClient;
use flowstone_protocol::{ErrorCode, pb, peer};
use prost::Message;

use super::world::{World, batch, soon, until};

#[tokio::test(flavor = "multi_thread")]
async fn any_one_broker_may_die_and_come_back() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 3, 3).await.expect("created");
    let mut written = vec![Vec::new(); 3];
    for dead in [1, 2, 3] {
        for partition in 0..3 {
            let value = format!("before {dead} dies");
            world.produce(&topic, partition, &value).await;
            written[partition as usize].push(value);
        }
        world.kill(dead).await;
        for partition in 0..3 {
            let value = format!("while {dead} is dead");
            world.produce(&topic, partition, &value).await;
            written[partition as usize].push(value);
        }
        world.start(dead).await;
        world.healthy().await;
    }
    for partition in 0..3 {
        assert_eq!(world.values(&topic, partition).await, written[partition as usize]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_may_die_and_come_back() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.produce(&topic, 0, "kept").await;
    for id in [1, 2, 3] {
        world.kill(id).await;
    }
    world.start_all(&[3, 1, 2]).await;
    assert_eq!(world.values(&topic, 0).await, ["kept"]);
    world.produce(&topic, 0, "more").await;
    assert_eq!(world.values(&topic, 0).await, ["kept", "more"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_with_a_lost_disk_gets_everything_anew_under_its_old_id() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 2, 3).await.expect("created");
    for number in 0..10 {
        world.produce(&topic, number % 2, &number.to_string()).await;
    }
    for wiped in [2, 1] {
        world.kill(wiped).await;
        world.wipe(wiped);
        world.start(wiped).await;
        world.healthy().await;
        for partition in 0..2 {
            let leader = world.leader(wiped, "orders", partition).await;
            let end = world.client(leader).end(&topic, partition, true).await.expect("listed");
            let read = world.client(wiped).read(&topic, partition, end, true).await.expect("it has all");
            let written: Vec<String> = (0..10).filter(|n| n % 2 == partition).map(|n| n.to_string()).collect();
            assert_eq!(read, written, "on broker {wiped}");
        }
    }
    // Hardly a directory is left of those that the cluster was founded on, and nobody knows the metadata at a start.
    for id in [1, 2, 3] {
        world.kill(id).await;
    }
    world.start_all(&[1, 2, 3]).await;
    world.healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_comes_back_under_another_address() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.kill(2).await;
    let moved = super::world::free_address().await;
    world.places.get_mut(&2).expect("a place").peer = moved;
    world.start(2).await;
    world.healthy().await;
    world.kill(1).await;
    world.produce(&topic, 0, "by the broker that moved").await;
    assert_eq!(world.values(&topic, 0).await, ["by the broker that moved"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_was_away_finds_a_leader_whose_address_changed_meanwhile() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.produce(&topic, 0, "before").await;
    world.healthy().await;
    // All that broker 2 has of broker 3, its seeds and its metadata, says where that was.
    world.kill(2).await;
    world.kill(3).await;
    let moved = super::world::free_address().await;
    world.places.get_mut(&3).expect("a place").peer = moved;
    world.start(3).await;
    world.hand_over("orders", 0, 3).await;
    world.hand_over("__cluster_metadata", 0, 3).await;
    world.produce(&topic, 0, "by the leader that moved").await;
    // Nobody is left who could tell, but for that leader itself.
    world.kill(1).await;
    world.start(2).await;
    world.produce(&topic, 0, "once it was found").await;
    assert_eq!(world.values(&topic, 0).await, ["before", "by the leader that moved", "once it was found"]);
    let leader = world.leader(2, "orders", 0).await;
    let end = world.client(leader).end(&topic, 0, true).await.expect("listed");
    let read = until("broker 2 has all of it", async || {
        world.client(2).read(&topic, 0, end, true).await.map_err(|error| error.to_string())
    });
    assert_eq!(read.await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_stops_hands_its_leaderships_over_first() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 6, 3).await.expect("created");
    world.healthy().await;
    let described = world.any().describe("orders").await.expect("described").partitions;
    let stops = described[0].leader_id;
    let led: Vec<i32> = described.iter().filter(|p| p.leader_id == stops).map(|p| p.partition).collect();
    let before: Vec<i32> = described.iter().map(|p| p.leader_epoch).collect();
    world.stop(stops).await;
    let ask = world.ids()[0];
    // Its session has not ended, and no election timeout has passed: they are led already.
    for partition in led {
        let leader = world.leader(ask, "orders", partition).await;
        assert_ne!(leader, stops);
        let description = world.client(ask).describe("orders").await.expect("described");
        let epoch = description.partitions[partition as usize].leader_epoch;
        assert_eq!(epoch, before[partition as usize] + 1, "one election, no more");
        world.client(leader).produce(&topic, partition, batch(&["x"])).await.expect("served");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_is_deleted_while_a_broker_is_down_and_made_anew() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 2, 3).await.expect("created");
    world.produce(&topic, 0, "old").await;
    world.kill(3).await;
    world.any().delete("orders").await.expect("deleted");
    // Until it is known to be dead it may be given replicas.
    until("broker 3 is known to be dead", async || {
        let health = world.client(2).health().await.map_err(|error| error.to_string())?;
        let third = health.brokers.iter().find(|broker| broker.broker_id == 3).ok_or("unknown")?;
        if third.state() == pb::BrokerState::Dead { Ok(()) } else { Err(format!("{third:?}")) }
    })
    .await;
    let again = world.client(2).create("orders", 1, 2).await.expect("created anew");
    assert_ne!(again.id, topic.id);
    world.produce(&again, 0, "new").await;
    world.start(3).await;
    world.healthy().await;
    assert_eq!(world.values(&again, 0).await, ["new"]);
    let folder = world.places[&3].dir.join("topics");
    until("the old topic's files are gone", async || {
        let old = flowstone_protocol::TopicId::from_slice(&topic.id).expect("an id").to_string();
        let names: Vec<String> = std::fs::read_dir(&folder)
            .expect("a folder")
            .map(|entry| entry.expect("read").file_name().to_string_lossy().into_owned())
            .collect();
        if names.contains(&old) { Err(format!("{names:?}")) } else { Ok(()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_broker_names_the_right_one() {
    let world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    let single = world.any().create("single", 1, 1).await.expect("created");
    for topic in [&topic, &single] {
        let leader = world.leader(1, &topic.name, 0).await;
        for id in world.ids().into_iter().filter(|id| *id != leader) {
            until("the leader's name", async || {
                let answered = world.client(id).produce(topic, 0, batch(&["x"])).await;
                let error = answered.expect_err("it does not lead");
                assert!(matches!(error.code, ErrorCode::NotLeader | ErrorCode::NoLeader), "{error}");
                match error.leader_hint {
                    Some((hint, address)) if hint.get() == leader => {
                        assert_eq!(address, world.running[&leader].client_addr.to_string());
                        Ok(())
                    }
                    hint => Err(format!("{hint:?}")),
                }
            })
            .await;
        }
    }
    soon("nothing hangs", async {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_missed_nothing_while_it_was_away_counts_again() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 3, 3).await.expect("created");
    for partition in 0..3 {
        world.produce(&topic, partition, "before").await;
    }
    world.healthy().await;
    for away in [1, 2, 3] {
        world.kill(away).await;
        // Its leaderships move, and nothing else happens in the groups that it followed.
        for partition in 0..3 {
            world.leader(world.ids()[0], "orders", partition).await;
        }
        world.start(away).await;
        world.healthy().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_a_way_to_the_controller_is_heard_of_by_another_one() {
    let mut world = World::of(3).await;
    world.add_place(4).await;
    world.start(4).await;
    let controller = world.client(1).cluster().await.expect("described").controller_id;
    let by = if controller == 1 { 2 } else { 1 };
    let fourth = format!("http://{}", world.places[&4].peer);
    let caller = hello(&fourth, None).await.expect("it answers").answerer.expect("said");
    // From here on it speaks with one of the others alone, and its own process says nothing.
    world.kill(4).await;
    let address = format!("http://{}", world.places[&by].peer);
    let speaking = tokio::spawn(async move {
        let mut client = PeerClient::connect(address).await.expect("it listens");
        let heartbeat = peer::BrokerHeartbeatRequest {
            caller: Some(peer::Caller { to_broker_id: controller, ..caller.clone() }),
            ..peer::BrokerHeartbeatRequest::default()
        };
        loop {
            let request = peer::ForwardRequest {
                caller: Some(peer::Caller { to_broker_id: by, ..caller.clone() }),
                method: "HandOnHeartbeat".to_owned(),
                request: heartbeat.encode_to_vec().into(),
                ..peer::ForwardRequest::default()
            };
            let answered = client.forward(request).await.expect("handed on").into_inner();
            let answer = peer::BrokerHeartbeatResponse::decode(answered.response).expect("the controller's");
            assert!(answer.metadata_replica_id != 0, "{answer:?}");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    });
    until("it is heard of by another one", async || {
        let health = world.client(controller).health().await.map_err(|error| error.to_string())?;
        let fourth = health.brokers.iter().find(|broker| broker.broker_id == 4).ok_or("unknown")?;
        let is_heard =
            fourth.state() == pb::BrokerState::Alive && fourth.detail.contains(&format!("by way of broker {by} alone"));
        if is_heard { Ok(()) } else { Err(format!("{fourth:?}")) }
    })
    .await;
    assert!(!speaking.is_finished());
    speaking.abort();
    until("its session ends with that", async || {
        let health = world.client(controller).health().await.map_err(|error| error.to_string())?;
        let fourth = health.brokers.iter().find(|broker| broker.broker_id == 4).ok_or("unknown")?;
        if fourth.state() == pb::BrokerState::Dead { Ok(()) } else { Err(format!("{fourth:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_running_brokers_directory_is_refused() {
    let mut world = World::of(3).await;
    world.add_place(4).await;
    world.start(4).await;
    world.add_place(5).await;
    world.set(5, "node.id", "4");
    copy(&world.places[&4].dir, &world.places[&5].dir);
    let error = soon("refusal", world.starting(5)).await.expect_err("the first one runs");
    // By the controller, or by the first one itself where the copy knows already where that is.
    let refusals = ["very data directory", "runs on a copy of this data directory"];
    assert!(refusals.iter().any(|refusal| error.to_string().contains(refusal)), "{error}");
    // The first one did not mind.
    let health = world.client(4).health().await.expect("it serves");
    assert!(health.brokers.iter().any(|broker| broker.broker_id == 4 && broker.state() == pb::BrokerState::Alive));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_voter_of_the_metadata_neither_votes_nor_takes_the_address_of_the_first() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.produce(&topic, 0, "before").await;
    world.healthy().await;
    world.add_place(5).await;
    world.set(5, "node.id", "3");
    // Its seeds do not name the one that it is a copy of.
    let others = world.seeds[..2].join(",");
    world.set(5, "cluster.seeds", &others);
    copy(&world.places[&3].dir, &world.places[&5].dir);
    let error = soon("refusal", world.starting(5)).await.expect_err("the first one runs");
    assert!(error.to_string().contains("runs on a copy of this data directory"), "{error}");
    // One that does not look: it says that broker 3 is elsewhere now.
    let third = format!("http://{}", world.places[&3].peer);
    let mut caller = hello(&third, None).await.expect("it answers").answerer.expect("said");
    (caller.incarnation, caller.to_broker_id) = (1, -1);
    for told in [1, 2] {
        let address = format!("http://{}", world.places[&told].peer);
        hello(&address, Some(caller.clone())).await.expect("it answers");
    }
    world.produce(&topic, 0, "after").await;
    world.healthy().await;
    let end = world.client(1).end(&topic, 0, false).await.unwrap_or(2);
    let read = soon("a read", world.client(3).read(&topic, 0, end.max(2), true)).await.expect("it follows");
    assert_eq!(read, ["before", "after"]);
}

/// Asks a broker who it is, as this caller or as a stranger.
pub(crate) async fn hello(address: &str, caller: Option<peer::Caller>) -> Result<peer::HelloResponse, String> {
    let stranger = || peer::Caller {
        protocol_version: 1,
        broker_id: 9,
        directory_id: vec![9; 16].into(),
        to_broker_id: -1,
        ..peer::Caller::default()
    };
    let mut client = PeerClient::connect(address.to_owned()).await.map_err(|error| error.to_string())?;
    let request = peer::HelloRequest {
        caller: Some(caller.unwrap_or_else(stranger)),
        peer_address: "127.0.0.1:9".to_owned(),
        ..peer::HelloRequest::default()
    };
    let answered = soon("hello", client.hello(request)).await;
    answered.map(tonic::Response::into_inner).map_err(|status| status.to_string())
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("read") {
        let entry = entry.expect("read");
        let to = to.join(entry.file_name());
        if entry.file_type().expect("known").is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("copied");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_was_decommissioned_serves_nobody_any_more() {
    let mut world = World::of(3).await;
    world.add_place(4).await;
    world.start(4).await;
    world.client(4).cluster().await.expect("it is one of them");
    until("broker 4 is decommissioned", async || {
        let request = pb::DecommissionBrokerRequest { broker_id: 4 };
        let answered = soon("decommission", world.client(1).admin.decommission_broker(request)).await;
        answered.map(|_| ()).map_err(|status| super::world::error_of(status).to_string())
    })
    .await;
    until("its clients are sent elsewhere", async || match world.client(4).cluster().await {
        Err(error) if error.code == ErrorCode::ShuttingDown && error.message.contains("decommissioned") => Ok(()),
        answered => Err(format!("{answered:?}")),
    })
    .await;
    world.client(1).cluster().await.expect("the others serve");
}
