//! Seeds of the simulator, each run twice: nothing is broken, the same seed is the same run, and all that a run can go
//! through was gone through.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use flowstone_tests::sim::{Counts, hear_panics, run};

/// How many; more with `cargo run -p flowstone-tests --release --bin sim -- --seeds 100000`.
const SEEDS: u64 = 200;

#[test]
fn seeds_hold_and_replay_exactly() {
    hear_panics();
    let next = AtomicU64::new(0);
    let found = Mutex::new((Counts::default(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= SEEDS {
                        return;
                    }
                    let runs = [0, 1].map(|_| std::panic::catch_unwind(|| run(seed)));
                    let mut found = found.lock().unwrap();
                    match runs {
                        [Ok(first), Ok(second)] => {
                            found.0.add(&first.counts);
                            found.1.extend(first.broken);
                            if first.hash != second.hash {
                                found.1.push(format!("seed {seed}: two runs are not the same"));
                            }
                        }
                        _ => found.1.push(format!("seed {seed}: a panic")),
                    }
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let (counts, broken) = found.into_inner().unwrap();
    assert!(broken.is_empty(), "{}", broken.join("\n\n"));
    let missing: Vec<_> = counts.all().into_iter().filter(|(_, count)| *count == 0).map(|(name, _)| name).collect();
    assert!(missing.is_empty(), "{SEEDS} seeds never saw {missing:?}: they prove nothing about it");
}
