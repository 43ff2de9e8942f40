//! No false alarm: whatever a cluster that keeps its promises may do, and whatever of it is unknown.

use flowstone_checker::Verdict;
use proptest::prelude::*;

use crate::world::World;

fn judge(seed: u64, steps: usize) -> (Verdict, World) {
    let mut world = World::new(seed);
    for _ in 0..steps {
        world.step();
    }
    world.heal_and_read_all();
    (world.history.judge(), world)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_legal_history_is_clean(seed: u64, steps in 0_usize..1_500) {
        let (verdict, _) = judge(seed, steps);
        prop_assert!(verdict.is_clean(), "{:#?}", verdict.anomalies);
    }
}

/// What the generator does not do proves nothing: over some seeds it does everything.
#[test]
fn the_generator_does_everything() {
    let mut done = std::collections::BTreeMap::<&str, u64>::new();
    let mut verdicts = Vec::new();
    for seed in 0..40 {
        let (verdict, world) = judge(seed, 1_000);
        for (what, times) in world.done {
            *done.entry(what).or_default() += times;
        }
        verdicts.push(verdict);
    }
    for what in crate::world::DEEDS {
        assert!(done.get(what).is_some_and(|times| *times > 20), "{what} happened too seldom: {done:?}");
    }
    let sum = |of: fn(&Verdict) -> u64| verdicts.iter().map(of).sum::<u64>();
    let (acknowledged, failed, unknown) = (sum(|v| v.acknowledged), sum(|v| v.failed), sum(|v| v.unknown));
    assert!(acknowledged > 500 && failed > 100 && unknown > 100, "{acknowledged} {failed} {unknown}");
    assert_eq!(acknowledged + failed + unknown, sum(|v| v.operations));
}
