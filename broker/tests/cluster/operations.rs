//! What operators ask for, at any broker.

use flowstone_protocol::pb;

use super::world::{World, error_of, soon, until};

async fn no_moves(world: &World) {
    until("all moves are done", async || {
        let moves = world.any().moves().await.map_err(|error| error.to_string())?;
        if moves.is_empty() { Ok(()) } else { Err(format!("{moves:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fourth_broker_takes_over_from_the_first() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 4, 3).await.expect("created");
    for number in 0..20 {
        world.produce(&topic, number % 4, &number.to_string()).await;
    }
    world.add_place(4).await;
    world.start(4).await;
    // One partition by hand, asked at the newcomer.
    let request = pb::MovePartitionRequest { topic: "orders".to_owned(), partition: 0, brokers: vec![4, 2, 3] };
    let moved = soon("move", world.client(4).admin.move_partition(request)).await.map_err(error_of).expect("begun");
    assert_eq!(moved.into_inner().r#move.expect("told").to, [4, 2, 3]);
    no_moves(&world).await;
    let description = world.client(4).describe("orders").await.expect("described");
    assert_eq!(description.partitions[0].replicas, [4, 2, 3]);
    // The rest by draining, the metadata's vote included.
    let drain = pb::DrainBrokerRequest { broker_id: 1, ..Default::default() };
    soon("drain", world.client(2).admin.drain_broker(drain)).await.map_err(error_of).expect("begun");
    until("broker 1 is empty", async || {
        let health = world.client(3).health().await.map_err(|error| error.to_string())?;
        let first = health.brokers.iter().find(|broker| broker.broker_id == 1).ok_or("gone")?;
        if first.replicas == 0 && world.any().moves().await.is_ok_and(|moves| moves.is_empty()) {
            Ok(())
        } else {
            Err(format!("{first:?}"))
        }
    })
    .await;
    world.stop(1).await;
    until("broker 1 is decommissioned", async || {
        let request = pb::DecommissionBrokerRequest { broker_id: 1 };
        let answered = soon("decommission", world.client(4).admin.decommission_broker(request)).await;
        answered.map(|_| ()).map_err(|status| error_of(status).to_string())
    })
    .await;
    world.healthy().await;
    for partition in 0..4 {
        let written: Vec<String> = (0..20).filter(|n| n % 4 == partition).map(|n| n.to_string()).collect();
        assert_eq!(world.values(&topic, partition).await, written);
    }
    let cluster = world.client(2).cluster().await.expect("described");
    assert_eq!(cluster.brokers.iter().map(|broker| broker.id).collect::<Vec<_>>(), [2, 3, 4]);
    // The three that are left are a cluster of their own right: any one may die.
    world.kill(2).await;
    world.produce(&topic, 1, "after").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaderships_are_transferred_and_balanced() {
    let world = World::of(3).await;
    world.any().create("orders", 3, 3).await.expect("created");
    world.healthy().await;
    for to in [2, 3, 1] {
        let request = pb::TransferLeaderRequest { topic: "orders".to_owned(), partition: 0, to_broker_id: to };
        let answered = until("transferred", async || {
            let answered = soon("transfer", world.client(1).admin.transfer_leader(request.clone())).await;
            answered.map_err(|status| error_of(status).to_string())
        })
        .await;
        assert_eq!(answered.into_inner().leader_id, to);
        until("everyone knows", async || {
            for id in world.ids() {
                let leader = world.client(id).leader("orders", 0).await?;
                if leader != to {
                    return Err(format!("broker {id} says {leader}"));
                }
            }
            Ok(())
        })
        .await;
    }
    let request = pb::RebalanceRequest { validate_only: true, leaders_only: true };
    soon("rebalance", world.client(3).admin.rebalance(request)).await.map_err(error_of).expect("planned");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_broker_is_replaced_by_a_new_one() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 2, 3).await.expect("created");
    world.produce(&topic, 0, "kept").await;
    world.add_place(4).await;
    world.start(4).await;
    world.kill(3).await;
    until("replaced", async || {
        let request = pb::ReplaceBrokerRequest { old_broker_id: 3, new_broker_id: 4, validate_only: false };
        let answered = soon("replace", world.client(1).admin.replace_broker(request)).await;
        answered.map(|_| ()).map_err(|status| error_of(status).to_string())
    })
    .await;
    no_moves(&world).await;
    world.healthy().await;
    let description = world.client(4).describe("orders").await.expect("described");
    for partition in &description.partitions {
        assert!(partition.replicas.contains(&4) && !partition.replicas.contains(&3), "{partition:?}");
    }
    world.kill(1).await;
    assert_eq!(world.values(&topic, 0).await, ["kept"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_without_a_majority_goes_on_with_what_a_survivor_has() {
    let mut world = World::of(3).await;
    // On two brokers: one of them gone is the majority gone, while the cluster itself goes on.
    let topic = world.any().create("orders", 1, 2).await.expect("created");
    world.produce(&topic, 0, "kept").await;
    let replicas = world.any().describe("orders").await.expect("described").partitions[0].replicas.clone();
    let (gone, survivor) = (replicas[0], replicas[1]);
    world.kill(gone).await;
    let recovered = until("recovered", async || {
        let request = pb::RecoverPartitionRequest {
            topic: "orders".to_owned(),
            partition: 0,
            from_broker_id: survivor,
            validate_only: false,
        };
        let answered = soon("recover", world.any().admin.recover_partition(request)).await;
        answered.map_err(|status| error_of(status).to_string())
    })
    .await;
    assert!(recovered.into_inner().detail.contains("is kept"));
    assert_eq!(world.values(&topic, 0).await, ["kept"]);
    world.produce(&topic, 0, "after").await;
    world.start(gone).await;
    world.healthy().await;
    assert_eq!(world.values(&topic, 0).await, ["kept", "after"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_cannot_end_is_cancelled() {
    let mut world = World::places(3).await;
    for id in 1..=3 {
        // Nobody notices that a broker is gone, however slow this machine is.
        world.set(id, "limits.broker_session_timeout", "10m");
    }
    world.start_all(&[1, 2, 3]).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.produce(&topic, 0, "kept").await;
    let before = world.any().describe("orders").await.expect("described").partitions[0].replicas.clone();
    world.add_place(4).await;
    world.start(4).await;
    // The move begins, and goes nowhere.
    world.kill(4).await;
    let mut wanted = before.clone();
    wanted[2] = 4;
    let request = pb::MovePartitionRequest { topic: "orders".to_owned(), partition: 0, brokers: wanted };
    soon("move", world.client(1).admin.move_partition(request)).await.map_err(error_of).expect("begun");
    let moves = world.client(2).moves().await.expect("told");
    assert_eq!(moves.len(), 1, "{moves:?}");
    assert_eq!((moves[0].adding.as_slice(), moves[0].removing.as_slice()), (&[4][..], &before[2..]), "{moves:?}");
    world.produce(&topic, 0, "meanwhile").await;
    let request = pb::CancelMoveRequest { topic: "orders".to_owned(), partition: 0 };
    soon("cancel", world.client(3).admin.cancel_move(request)).await.map_err(error_of).expect("there is a way back");
    no_moves(&world).await;
    world.healthy().await;
    let after = world.any().describe("orders").await.expect("described").partitions[0].replicas.clone();
    assert_eq!(after, before);
    assert_eq!(world.values(&topic, 0).await, ["kept", "meanwhile"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_whose_move_is_stuck_holds_up_no_other() {
    let mut world = World::of(3).await;
    let move_to = async |world: &World, name: &str, brokers: &[i32]| {
        let request = pb::MovePartitionRequest { topic: name.to_owned(), partition: 0, brokers: brokers.to_vec() };
        soon("move", world.client(1).admin.move_partition(request)).await.map_err(error_of).expect("begun");
    };
    let mut topics = Vec::new();
    for name in ["stuck", "moved"] {
        topics.push(world.any().create(name, 1, 2).await.expect("created"));
        move_to(&world, name, &[1, 2]).await;
    }
    no_moves(&world).await;
    world.healthy().await;
    world.add_place(4).await;
    world.start(4).await;
    // Nobody has noticed yet that it is gone: what is moved there goes nowhere.
    world.kill(4).await;
    move_to(&world, "stuck", &[1, 4]).await;
    // Both are led by one broker, on its only shard.
    for topic in &topics {
        world.hand_over(&topic.name, 0, 1).await;
    }
    move_to(&world, "moved", &[1, 3]).await;
    until("the other one is moved", async || {
        let moves = world.client(2).moves().await.map_err(|error| error.to_string())?;
        if moves.iter().any(|it| it.topic == "moved") { Err(format!("{moves:?}")) } else { Ok(()) }
    })
    .await;
    let replicas = world.any().describe("moved").await.expect("described").partitions[0].replicas.clone();
    assert_eq!(replicas, [1, 3]);
    let moves = world.client(1).moves().await.expect("told");
    assert_eq!(moves.iter().map(|it| it.topic.as_str()).collect::<Vec<_>>(), ["stuck"], "{moves:?}");
    for topic in &topics {
        world.produce(topic, 0, "served").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_by_any_broker() {
    let world = World::of(3).await;
    world.any().create("orders", 1, 3).await.expect("created");
    for id in world.ids() {
        let mut client = world.client(id);
        let error = client.create("more", 1, 4).await.expect_err("four replicas on three brokers");
        assert!(error.message.contains('3'), "{error}");
        let drain = pb::DrainBrokerRequest { broker_id: 2, ..Default::default() };
        let error =
            error_of(soon("drain", client.admin.drain_broker(drain)).await.expect_err("nobody could take them"));
        assert!(error.message.contains("cannot be drained"), "{error}");
        let request = pb::DecommissionBrokerRequest { broker_id: 3 };
        let answered = soon("decommission", client.admin.decommission_broker(request)).await;
        assert!(answered.is_err(), "it holds replicas");
        let request = pb::TransferLeaderRequest { topic: "orders".to_owned(), partition: 0, to_broker_id: 9 };
        let error =
            error_of(soon("transfer", client.admin.transfer_leader(request)).await.expect_err("no such broker"));
        assert!(error.message.contains("broker 9"), "{error}");
        let error = client.describe("nothing").await.expect_err("no such topic");
        assert_eq!(error.code, flowstone_protocol::ErrorCode::UnknownTopic);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_disk_is_full_hands_over_to_one_with_room() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.produce(&topic, 0, "before").await;
    let full = world.leader(1, "orders", 0).await;
    world.stop(full).await;
    // More than any disk has.
    world.set(full, "storage.free_bytes_min", "1000000000000000000");
    world.start(full).await;
    world.healthy().await;
    // Given the lead all the same, it does not keep it: what nobody could write can be written.
    let request = pb::TransferLeaderRequest { topic: "orders".to_owned(), partition: 0, to_broker_id: full };
    until("transferred", async || {
        let answered = soon("transfer", world.client(full).admin.transfer_leader(request.clone())).await;
        answered.map(|_| ()).map_err(|status| error_of(status).to_string())
    })
    .await;
    world.produce(&topic, 0, "after").await;
    let leader = world.leader(full, "orders", 0).await;
    assert_ne!(leader, full);
    assert_eq!(world.values(&topic, 0).await, ["before", "after"]);
    let health = world.any().health().await.expect("told");
    let told = health.brokers.iter().find(|broker| broker.broker_id == full).expect("there");
    assert!(told.detail.contains("disk is full"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_cut_off_does_not_pass_old_figures_for_new_ones() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    world.produce(&topic, 0, "x").await;
    world.healthy().await;
    let leader = world.leader(1, "orders", 0).await;
    let asked = if leader == 1 { 2 } else { 1 };
    let described = world.client(asked).describe("orders").await.expect("described");
    assert!(described.partitions[0].error.is_none(), "{:?}", described.partitions[0]);
    for other in [1, 2, 3].into_iter().filter(|other| *other != asked) {
        world.kill(other).await;
    }
    let described = world.client(asked).describe("orders").await.expect("described");
    let partition = &described.partitions[0];
    let error = partition.error.as_ref().expect("who is asked knows that it may be old");
    assert!(error.message.contains("may be old"), "{error:?}");
    assert_eq!(partition.records, 1, "what it has is shown all the same");
}
