//! Misfortunes that are known from elsewhere, one test each, told as they happened. Every one ends with the simulator's
//! last look: all faults over, everything read, the history judged.

use std::time::Duration;

use flowstone_protocol::{ErrorCode, ProducerEpoch, ProducerId};
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

/// Coordinators of everything, and a compacted topic, for a scenario to use.
fn coordinators(seed: u64) -> World {
    World::new(Plan { scripted: true, producers: 1, ..Plan::calm(seed) })
}

/// A transactional write that comes after its abort marker is refused, and readers of what is committed go on (KAFKA-14402).
#[test]
fn a_write_behind_its_abort_marker_is_refused_and_readers_go_on() {
    for seed in 0..5 {
        let mut world = coordinators(seed);
        let first = world.begin_with("t").expect("an identity");
        world.write_with("t", first, 0).expect("a write");
        let (stable, end) = world.stable_and_end();
        assert!(stable < end, "what is open is not held back: {stable}, {end}");
        let second = world.end_with("t", first, false).expect("aborted");
        world.wait_until_stable();
        for sequence in [0, 1] {
            let late = world.write_unasked(first, sequence, true);
            assert_eq!(late, Err(ErrorCode::ProducerFenced), "sequence {sequence}");
        }
        assert_eq!(world.write_with("t", first, 1), Err(ErrorCode::ProducerFenced), "the coordinator says the same");
        let (stable, end) = world.stable_and_end();
        assert_eq!(stable, end, "something hangs");
        world.write_with("t", second, 0).expect("the next transaction");
        world.end_with("t", second, true).expect("committed");
        world.wait_until_stable();
        ends_well(world);
    }
}

/// An end that comes late does not end the next transaction, nor does an old marker; the same once more, by another
/// coordinator, is answered as done (KAFKA-17754).
#[test]
fn a_late_end_does_not_touch_the_next_transaction() {
    for seed in 0..5 {
        let mut world = coordinators(seed);
        let first = world.begin_with("t").expect("an identity");
        world.write_with("t", first, 0).expect("a write");
        let second = world.end_with("t", first, true).expect("committed");
        world.wait_until_stable();
        world.write_with("t", second, 0).expect("the next transaction");
        // Late: the same, and the opposite.
        assert_eq!(world.end_with("t", first, true), Ok(second), "the same again is answered alike");
        assert_eq!(world.end_with("t", first, false), Err(ErrorCode::InvalidTransactionState));
        let (stable, end) = world.stable_and_end();
        assert!(stable < end, "the next transaction was ended");
        // The marker of the first one, as its coordinator wrote it, late and again: it is known.
        let coordinator = i32::MAX;
        assert_eq!(world.mark(first, true, coordinator), Err(ErrorCode::ProducerFenced), "below the first one's own");
        world.change_coordinator();
        let third = world.end_with("t", second, false).expect("aborted, by the next coordinator");
        world.wait_until_stable();
        assert_eq!(world.end_with("t", second, false), Ok(third), "the same again, after a failover");
        // Its marker again, by a coordinator of now, and by one of long ago.
        assert_eq!(world.mark(third, false, coordinator), Ok(()), "it is there already");
        assert_eq!(world.mark(third, false, 0), Err(ErrorCode::NotCoordinator), "a coordinator of before");
        assert_eq!(world.mark(third, true, coordinator), Err(ErrorCode::InvalidTransactionState));
        let (stable, end) = world.stable_and_end();
        assert_eq!(stable, end);
        world.write_with("t", third, 0).expect("a write");
        world.end_with("t", third, true).expect("committed");
        world.wait_until_stable();
        ends_well(world);
    }
}

/// A producer that was idle for longer than its state is kept is told so: nothing is taken twice, nor silently (KIP-360).
#[test]
fn an_idle_producer_is_told_that_it_is_forgotten() {
    for seed in 0..3 {
        let plan = Plan {
            scripted: true,
            producers: 1,
            produce_gap: Duration::from_millis(500),
            producers_kept: Duration::from_secs(5),
            ..Plan::calm(seed)
        };
        let mut world = World::new(plan);
        let owner = (ProducerId::new(900), ProducerEpoch::new(0));
        let first = world.write_unasked(owner, 0, false).expect("a write");
        assert_eq!(world.write_unasked(owner, 0, false), Ok(first), "the same again has its place");
        let mut told = world.write_unasked(owner, 0, false);
        for _ in 0..10 {
            if told != Ok(first) {
                break;
            }
            world.run_for(Duration::from_secs(10));
            told = world.write_unasked(owner, 0, false);
        }
        assert_eq!(told, Err(ErrorCode::ProducerExpired));
        assert_eq!(world.write_unasked(owner, 1, false), Err(ErrorCode::ProducerExpired));
        world.write_unasked((ProducerId::new(901), ProducerEpoch::new(0)), 0, false).expect("a new producer writes");
        ends_well(world);
    }
}

/// Offsets expire while a transaction has one pending, and a plain commit meets a transactional one: what the coordinator has
/// is what a replay of its log gives, which the simulator's last look compares.
#[test]
fn offsets_in_open_transactions_meet_expiry_and_plain_commits() {
    for seed in 0..5 {
        let plan = Plan { scripted: true, producers: 1, offsets_kept: Duration::from_secs(2), ..Plan::calm(seed) };
        let mut world = World::new(plan);
        let first = world.begin_with("t").expect("an identity");
        world.commit_offset("g", 5, None).expect("a plain commit");
        world.run_for(Duration::from_millis(1_500));
        world.commit_offset("g", 8, Some(("t", first))).expect("one in a transaction");
        assert_eq!(world.offset_of("g"), (Some(5), false), "it counts before its transaction is committed");
        world.run_for(Duration::from_millis(800));
        world.expire_offsets();
        assert_eq!(world.offset_of("g").0, Some(5), "what is pending keeps it");
        let second = world.end_with("t", first, true).expect("committed");
        world.wait_until("the offset counts", |world| world.is_offset("g", Some(8), true));
        // A plain commit is the newest word, however the transaction ends.
        world.commit_offset("g", 9, Some(("t", second))).expect("one in the next transaction");
        world.commit_offset("g", 11, None).expect("a plain one behind it");
        world.change_coordinator();
        world.end_with("t", second, true).expect("committed");
        world.run_for(Duration::from_secs(1));
        assert_eq!(world.offset_of("g"), (Some(11), true));
        assert_eq!(
            world.commit_offset("g", 9, Some(("t", second))),
            Err(ErrorCode::ProducerFenced),
            "a commit of a transaction that is over"
        );
        world.run_for(Duration::from_secs(4));
        world.expire_offsets();
        assert_eq!(world.offset_of("g"), (None, true), "nothing holds it any more");
        ends_well(world);
    }
}
