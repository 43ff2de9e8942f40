//! Brokers that become one cluster.

use std::time::Duration;

use super::world::{World, soon, until};

#[tokio::test(flavor = "multi_thread")]
async fn three_brokers_with_one_list_form_one_cluster_in_any_order() {
    for order in [[1, 2, 3], [3, 2, 1]] {
        let mut world = World::places(3).await;
        let mut starting = Vec::new();
        for id in order {
            let future = world.starting(id);
            starting.push((id, tokio::spawn(future)));
            // The next one comes later; how much later changes nothing.
            tokio::task::yield_now().await;
        }
        for (id, broker) in starting {
            let broker = soon("start", broker).await.expect("no panic").expect("it starts");
            world.running.insert(id, broker);
        }
        let clusters: Vec<_> = world.running.values().map(|broker| broker.cluster_id).collect();
        assert!(clusters.iter().all(|cluster| *cluster == clusters[0]), "{clusters:?}");
        for id in world.ids() {
            until("all brokers know each other", async || {
                let cluster = world.client(id).cluster().await.map_err(|error| error.to_string())?;
                let known: Vec<i32> = cluster.brokers.iter().map(|broker| broker.id).collect();
                if known == [1, 2, 3] && cluster.controller_id > 0 { Ok(()) } else { Err(format!("{cluster:?}")) }
            })
            .await;
        }
        world.healthy().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_to_the_leader_is_read_everywhere() {
    let world = World::of(3).await;
    let topic = world.client(2).create("orders", 3, 3).await.expect("created");
    for number in 0..30 {
        world.produce(&topic, number % 3, &number.to_string()).await;
    }
    for partition in 0..3 {
        let written: Vec<String> = (0..30).filter(|number| number % 3 == partition).map(|n| n.to_string()).collect();
        let end = {
            let leader = world.leader(1, "orders", partition).await;
            world.client(leader).end(&topic, partition, true).await.expect("listed")
        };
        for id in world.ids() {
            let read = soon("a read", world.client(id).read(&topic, partition, end, true)).await.expect("any replica");
            assert_eq!(read, written, "broker {id}");
        }
    }
    let description = world.client(3).describe("orders").await.expect("described");
    assert_eq!(description.replication_factor, 3);
    for partition in &description.partitions {
        assert!(partition.leader_id > 0 && partition.error.is_none(), "{partition:?}");
        assert_eq!(partition.records, 10, "{partition:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn seeds_that_disagree_form_nothing_until_they_agree() {
    let mut world = World::places(3).await;
    let seeds = world.seeds.clone();
    let other = [&seeds[2], &seeds[0], &seeds[1]].map(String::as_str).join(",");
    world.set(3, "cluster.seeds", &other);
    let mut first = tokio::spawn(world.starting(1));
    let mut second = tokio::spawn(world.starting(2));
    let third = tokio::spawn(world.starting(3));
    for starting in [&mut first, &mut second] {
        // Nothing tells of what does not happen.
        assert!(tokio::time::timeout(Duration::from_secs(1), starting).await.is_err(), "it must wait");
    }
    assert!(!third.is_finished());
    third.abort();
    drop(third.await);
    world.set(3, "cluster.seeds", &seeds.join(","));
    world.start(3).await;
    for (id, starting) in [(1, first), (2, second)] {
        let broker = soon("start", starting).await.expect("no panic").expect("it starts");
        world.running.insert(id, broker);
    }
    world.healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_of_another_cluster_and_one_with_a_taken_id_are_refused() {
    let mut world = World::of(1).await;
    let mut other = World::of(1).await;
    other.stop(1).await;
    // The same directory, sent to the first cluster.
    let mut stranger = other.config(1);
    stranger.set_key("node.id", "7").expect("a key");
    stranger.set_key("cluster.seeds", &world.seeds[0]).expect("a key");
    let error = soon("refusal", flowstone_broker::Broker::start(stranger)).await.expect_err("of another cluster");
    assert!(error.to_string().contains("belongs to cluster"), "{error}");
    // An empty one with the first broker's id.
    world.add_place(9).await;
    world.set(9, "node.id", "1");
    let error = soon("refusal", world.starting(9)).await.expect_err("the id is taken");
    assert!(error.to_string().contains("node.id 1"), "{error}");
    assert!(world.any().cluster().await.is_ok(), "the cluster did not mind");
}
