//! Misfortunes that are known from elsewhere, one test each, told as they happened. Every one ends with the simulator's
//! last look: all faults over, everything read, the history judged.

use std::time::Duration;

use flowstone_tests::sim::{Plan, World};

/// Three brokers, one partition, producers that never stop.
fn three_brokers(seed: u64) -> World {
    World::new(Plan { producers: 3, produce_gap: Duration::from_millis(20), ..Plan::calm(seed) })
}

fn four_brokers(seed: u64) -> World {
    World::new(Plan { brokers: 4, producers: 3, produce_gap: Duration::from_millis(20), ..Plan::calm(seed) })
}

fn ends_well(world: World) {
    let report = world.finish();
    assert_eq!(report.broken, None);
    assert!(report.counts.acknowledged > 0, "nothing was acknowledged: {:?}", report.counts);
}

/// A follower that does not know how far was committed becomes leader, twice in a row (KIP-101, KIP-279).
#[test]
fn two_failovers_with_a_stale_watermark_do_not_diverge() {
    for seed in 0..10 {
        let mut world = three_brokers(seed);
        let first = world.wait_for_leader(0);
        world.wait_for_acknowledgements(20);
        // The others have the entries, and do not hear how far they are committed.
        world.cut_what_it_sends(first);
        world.run_for(Duration::from_millis(30));
        world.cut_power(first);
        world.mend_everything();
        let second = world.wait_for_another_leader(0, first);
        world.wait_for_acknowledgements(5);
        world.cut_power(second);
        world.start_broker(first);
        world.wait_for_another_leader(0, second);
        world.start_broker(second);
        world.wait_for_acknowledgements(20);
        ends_well(world);
    }
}

/// Batches in flight when the leader dies are sent again, and get the offsets that they have (redpanda #3039, #5355).
#[test]
fn batches_in_flight_keep_their_offsets_when_the_leader_dies() {
    for seed in 0..10 {
        let plan = Plan {
            producers: 4,
            produce_gap: Duration::from_millis(2),
            segment_bytes: 4 << 10,
            checkpoint_entries: 20,
            ..Plan::calm(seed)
        };
        let mut world = World::new(plan);
        for _ in 0..3 {
            let leader = world.wait_for_leader(0);
            world.wait_for_acknowledgements(150);
            world.kill_process(leader);
            world.wait_for_another_leader(0, leader);
            world.wait_for_acknowledgements(50);
            world.start_broker(leader);
        }
        assert!(world.counts().answered_again > 0, "no batch was ever in flight when a leader died");
        ends_well(world);
    }
}

/// A leader that can not commit its first entry serves nothing (redpanda #5090).
#[test]
fn a_new_leader_serves_nothing_before_its_own_entry_is_applied() {
    let mut seen = 0;
    for seed in 0..10 {
        let mut world = three_brokers(seed);
        let first = world.wait_for_leader(0);
        world.wait_for_acknowledgements(20);
        world.kill_process(first);
        world.wait_until("somebody is elected", |world| {
            !world.elected_and_not_serving(0).is_empty() || world.acknowledged() > 1_000
        });
        let Some(&second) = world.elected_and_not_serving(0).first() else { continue };
        seen += 1;
        world.cut_brokers_off(&[second]);
        let before = world.acknowledged();
        world.run_for(Duration::from_millis(400));
        assert_eq!(world.acknowledged(), before, "it acknowledges alone");
        assert_eq!(world.elected_and_not_serving(0), [second], "it neither serves nor is told that it does not lead");
        world.mend_everything();
        world.start_broker(first);
        world.wait_for_acknowledgements(20);
        ends_well(world);
    }
    assert!(seen > 5, "elected and not serving was seen {seen} times");
}

/// The power of one fails, of two, of all, with pauses between (nats-server #7549).
#[test]
fn power_failures_of_one_and_of_all_lose_nothing() {
    for seed in 0..10 {
        let mut world = three_brokers(seed);
        world.wait_for_acknowledgements(50);
        for many in [1, 2, 3, 3] {
            for broker in 0..many {
                world.cut_power(broker);
            }
            world.run_for(Duration::from_millis(100 + 700 * seed));
            for broker in 0..many {
                world.start_broker(broker);
                world.run_for(Duration::from_millis(37 * seed));
            }
            world.wait_for_acknowledgements(30);
        }
        ends_well(world);
    }
}

/// One bit of one replica's sealed segment flips, then the leader dies (nats-server #7564, #7567).
#[test]
fn a_flipped_bit_on_a_minority_loses_nothing() {
    for seed in 0..10 {
        let plan = Plan { segment_bytes: 4 << 10, produce_gap: Duration::from_millis(10), ..Plan::calm(seed) };
        let mut world = World::new(plan);
        let leader = world.wait_for_leader(0);
        world.wait_for_acknowledgements(150);
        let rotten = if seed % 2 == 0 { leader } else { (leader + 1) % 3 };
        assert!(world.flip_a_bit_in_a_sealed_segment(rotten), "no sealed segment");
        world.run_for(Duration::from_secs(2));
        world.kill_process(leader);
        world.wait_for_another_leader(0, leader);
        world.start_broker(leader);
        world.wait_for_acknowledgements(50);
        ends_well(world);
    }
}

/// A replica that copies another one is killed in the middle, with its power, again and again (nats-server #7545).
#[test]
fn a_crash_between_snapshot_and_hard_state_is_gone_through() {
    for seed in 0..10 {
        let mut world = four_brokers(seed);
        world.wait_for_acknowledgements(100);
        let before = world.brokers_of(0);
        world.begin_move(0);
        let new = world.brokers_of(0).into_iter().find(|broker| !before.contains(broker)).expect("a new place");
        for _ in 0..6 {
            world.run_for(Duration::from_millis(40 + 60 * seed));
            world.cut_power(new);
            world.start_broker(new);
        }
        world.wait_until("the move is done", |world| world.is_settled(0));
        ends_well(world);
    }
}

/// The leader is killed, or cut off, while members change; the change comes to its end (nats-server #7545).
#[test]
fn a_leader_that_goes_in_the_middle_of_a_change_of_members_does_not_stop_it() {
    for seed in 0..10 {
        let mut world = four_brokers(seed);
        world.wait_for_acknowledgements(50);
        world.begin_move(0);
        for round in 0..4 {
            world.run_for(Duration::from_millis(50 * seed + 200 * round));
            let leader = world.wait_for_leader(0);
            if round % 2 == 0 {
                world.kill_process(leader);
                world.wait_for_another_leader(0, leader);
                world.start_broker(leader);
            } else {
                world.cut_brokers_off(&[leader]);
                world.wait_for_another_leader(0, leader);
                world.mend_brokers(&[leader]);
            }
        }
        world.wait_until("the move is done", |world| world.is_settled(0));
        ends_well(world);
    }
}

/// A disk is replaced by an empty one: its broker comes back under a new replica id, as a learner, and is no voter with
/// amnesia.
#[test]
fn a_wiped_disk_comes_back_as_a_learner() {
    for seed in 0..10 {
        let mut world = three_brokers(seed);
        world.wait_for_acknowledgements(50);
        world.wait_until("all is settled", |world| world.is_settled(0));
        world.wipe_disk((seed % 3) as usize);
        world.wait_for_acknowledgements(50);
        world.wait_until("the wiped broker's replica is replaced", |world| world.counts().replaced > 0);
        world.wait_until("all is settled again", |world| world.is_settled(0));
        ends_well(world);
    }
}

/// A leader that is paused for longer than an election and goes on acknowledges nothing in its old term.
#[test]
fn a_paused_leader_that_goes_on_acknowledges_nothing_stale() {
    for seed in 0..10 {
        let mut world = three_brokers(seed);
        world.wait_for_acknowledgements(30);
        let leader = world.wait_for_leader(0);
        world.pause_broker(leader, Duration::from_secs(4));
        world.wait_for_another_leader(0, leader);
        world.wait_for_acknowledgements(30);
        world.run_for(Duration::from_secs(5));
        ends_well(world);
    }
}

/// A leader that nobody hears, and that hears everyone: one-way cuts wedge nothing.
#[test]
fn a_leader_that_nobody_hears_steps_down() {
    for seed in 0..10 {
        let mut world = three_brokers(seed);
        world.wait_for_acknowledgements(30);
        let leader = world.wait_for_leader(0);
        world.cut_what_it_sends(leader);
        world.wait_for_another_leader(0, leader);
        world.wait_for_acknowledgements(30);
        world.mend_everything();
        ends_well(world);
    }
}
