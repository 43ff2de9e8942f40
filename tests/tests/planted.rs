//! Planted bugs are found, each within a stated number of seeds. A bug that is not would mean that the simulator looks away.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use flowstone_storage::planted::{Bug, plant};
use flowstone_tests::sim::{Plan, World, hear_panics};

/// Each with at most how many seeds it may take: a few times what it took, see `docs/testing.md`.
const FOUND_WITHIN: [(Bug, u64); 29] = [
    (Bug::CutWithoutMark, 2_000),
    (Bug::AckBeforeFlush, 10),
    (Bug::VoteBeforeFlush, 150),
    (Bug::ReleaseOutOfOrder, 10),
    (Bug::ServeBeforeOwnEntry, 10),
    (Bug::KeepOverlay, 10),
    (Bug::AnswerBeforeCommit, 10),
    (Bug::ReadWithoutQuorum, 40),
    (Bug::IgnoreFailedFlush, 60),
    (Bug::TakeStrangersMessages, 60),
    (Bug::ForgetVote, 20),
    (Bug::TrustThePageCache, 250),
    (Bug::PromoteTooEarly, 50),
    (Bug::VoterWithAmnesia, 60),
    (Bug::ForgetMembers, 80),
    (Bug::NoDeduplication, 10),
    (Bug::ServeUnstable, 10),
    (Bug::HideAborted, 10),
    (Bug::ForgetOpenTransactions, 10),
    (Bug::TakeOldEpochs, 40),
    (Bug::LoseMarkers, 10),
    (Bug::WriteUnadded, 10),
    (Bug::KeepPreparing, 40),
    (Bug::TakeStaleCommits, 90),
    (Bug::GiveTwice, 60),
    (Bug::LosePendingOffsets, 30),
    (Bug::KeepAbortedOffsets, 30),
    (Bug::CommitPendingAtOnce, 30),
    (Bug::KeepOlderRecords, 10),
];

/// Those of coordinators and of compaction are looked for where there are such.
fn plan(bug: Bug, seed: u64) -> Plan {
    let mut plan = Plan::plain(seed);
    if bug >= Bug::ServeUnstable {
        plan.coordinate();
    }
    plan
}

#[test]
fn planted_bugs_are_found() {
    hear_panics();
    let next = AtomicUsize::new(0);
    let missed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(&(bug, seeds)) = FOUND_WITHIN.get(next.fetch_add(1, Ordering::Relaxed)) {
                    plant(Some(bug));
                    let is_found = (0..seeds).any(|seed| {
                        // A broken invariant may show as a panic, too.
                        std::panic::catch_unwind(|| World::new(plan(bug, seed)).run())
                            .map_or(true, |report| report.broken.is_some())
                    });
                    plant(None);
                    if !is_found {
                        missed.lock().unwrap().push((bug, seeds));
                    }
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "not found within so many seeds: {missed:?}");
}
