//! Brokers of different releases in one cluster.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use flowstone_storage::{Disk, RealDisk, ReplicaIdentity};

use super::world::{World, soon, until};

/// The feature levels under which the replicas in a broker's data directory were made.
fn made_under(world: &World, id: i32) -> BTreeSet<u32> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let mut levels = BTreeSet::new();
    let mut folders: Vec<PathBuf> = vec![world.config(id).node.data_dir];
    while let Some(folder) = folders.pop() {
        // One that is being made has no manifest yet.
        levels.extend(ReplicaIdentity::read(&disk, &folder).map(|identity| identity.feature_level));
        let inside = std::fs::read_dir(&folder).into_iter().flatten().filter_map(Result::ok);
        folders.extend(inside.map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    levels
}

async fn level_is(world: &World, wanted: i32) {
    for id in world.ids() {
        until("the cluster's feature level", async || {
            let level = world.client(id).cluster().await.map_err(|error| error.to_string())?.feature_level;
            if level == wanted { Ok(()) } else { Err(format!("broker {id} says {level}")) }
        })
        .await;
    }
}

async fn refused(world: &World, id: i32) {
    let error = soon("refusal", world.starting(id)).await.expect_err("it cannot read what the others write");
    assert!(error.to_string().contains("start it with a newer release"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_upgrade_ends_with_the_newer_level_and_there_is_no_way_back() {
    let mut world = World::of(3).await;
    let topic = world.any().create("orders", 1, 3).await.expect("created");
    for (upgraded, written) in [(1, "first"), (2, "second"), (3, "third")] {
        level_is(&world, 1).await;
        world.kill(upgraded).await;
        world.install(upgraded, 2);
        world.start(upgraded).await;
        world.produce(&topic, 0, written).await;
        world.healthy().await;
    }
    level_is(&world, 2).await;
    assert_eq!(world.values(&topic, 0).await, ["first", "second", "third"]);
    // One that was there before, and one that is new.
    world.kill(2).await;
    world.install(2, 1);
    refused(&world, 2).await;
    world.add_place(4).await;
    refused(&world, 4).await;
    // All restart: the level is not forgotten, and one of the old release that knows nobody says what is wrong.
    for id in [1, 3] {
        world.kill(id).await;
    }
    let starting = [1, 3].map(|id| world.starting(id));
    let started = soon("start of two", futures::future::join_all(starting)).await;
    for (id, broker) in [1, 3].into_iter().zip(started) {
        world.running.insert(id, broker.expect("it starts"));
    }
    level_is(&world, 2).await;
    world.install(2, 2);
    world.start(2).await;
    world.healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_cannot_read_the_metadata_says_so_where_nobody_else_is_there_to_do_it() {
    let mut world = World::places(1).await;
    world.install(1, 2);
    world.start(1).await;
    level_is(&world, 2).await;
    world.kill(1).await;
    world.install(1, 1);
    let error = soon("refusal", world.starting(1)).await.expect_err("it cannot read its metadata");
    assert!(error.to_string().contains("start a newer release"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_begins_with_what_all_of_its_seeds_know() {
    let mut world = World::places(3).await;
    for (id, release) in [(1, 3), (2, 2), (3, 3)] {
        world.install(id, release);
    }
    world.start_all(&[1, 2, 3]).await;
    level_is(&world, 2).await;
    world.kill(2).await;
    assert_eq!(made_under(&world, 1), [2].into(), "the metadata's");
    world.install(2, 3);
    world.start(2).await;
    level_is(&world, 3).await;
    world.any().create("orders", 1, 3).await.expect("created");
    for id in [1, 2, 3] {
        until("a new replica is made under the new level", async || {
            let levels = made_under(&world, id);
            if levels == [2, 3].into() { Ok(()) } else { Err(format!("broker {id}: {levels:?}")) }
        })
        .await;
    }
}
