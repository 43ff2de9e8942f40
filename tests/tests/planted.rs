//! Every planted bug is found, within a stated number of seeds. A bug that is not would mean that the simulator looks away.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use flowstone_storage::planted::{Bug, plant};
use flowstone_tests::sim::run;

/// Within so many seeds each of them is found; `docs/testing.md` says how many it took.
const SEEDS: u64 = 300;

#[test]
fn every_planted_bug_is_found() {
    std::panic::set_hook(Box::new(|_| {}));
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(&bug) = Bug::ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
                    plant(Some(bug));
                    let seed = (0..SEEDS).find(|&seed| {
                        // A broken invariant may show as a panic, too.
                        std::panic::catch_unwind(|| run(seed)).map_or(true, |report| report.broken.is_some())
                    });
                    plant(None);
                    found.lock().unwrap().push((bug, seed));
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let mut found = found.into_inner().unwrap();
    found.sort();
    let missed: Vec<_> = found.iter().filter(|(_, seed)| seed.is_none()).map(|(bug, _)| *bug).collect();
    assert!(missed.is_empty(), "not found within {SEEDS} seeds: {missed:?}; found: {found:?}");
}
