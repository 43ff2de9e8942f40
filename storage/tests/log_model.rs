//! The log against its model, a small run of it; `examples/log_model.rs` runs as long as it is told to.

mod model;

#[test]
fn random_operations_and_crashes() {
    let mut total = model::Counts::default();
    for seed in 0..8 {
        let counts = model::run(seed, 2_000);
        total.crashed_within += counts.crashed_within;
        total.crashed_while_opening += counts.crashed_while_opening;
        total.truncations += counts.truncations;
        total.entries_lost += counts.entries_lost;
        total.fell_back += counts.fell_back;
        total.spares_useless += counts.spares_useless;
        total.flushes_failed += counts.flushes_failed;
        total.writes_failed += counts.writes_failed;
        total.disk_full += counts.disk_full;
        total.tickets += counts.tickets;
        total.checkpoints += counts.checkpoints;
        total.segments_deleted += counts.segments_deleted;
        total.reopened_clean += counts.reopened_clean;
        total.disk.torn_files += counts.disk.torn_files;
        total.disk.names_lost += counts.disk.names_lost;
        total.disk.dirs_lost += counts.disk.dirs_lost;
    }
    // A run that saw none of these has shown nothing.
    for (what, count) in [
        ("crashes in the middle of an operation", total.crashed_within),
        ("crashes while opening", total.crashed_while_opening),
        ("truncations", total.truncations),
        ("unflushed entries lost", total.entries_lost),
        ("checkpoints that were rotten", total.fell_back),
        ("failed flushes", total.flushes_failed),
        ("failed writes", total.writes_failed),
        ("full disks", total.disk_full),
        ("reads by ticket", total.tickets),
        ("checkpoints", total.checkpoints),
        ("segments deleted", total.segments_deleted),
        ("clean restarts", total.reopened_clean),
        ("torn files", total.disk.torn_files),
        ("changes of folders lost", total.disk.names_lost),
        ("folders lost", total.disk.dirs_lost),
    ] {
        assert!(count > 0, "no {what}: the run is vacuous");
    }
    let (useless, used) = (total.spares_useless, total.fell_back);
    assert!(useless * 10 < used, "{useless} spare checkpoints were of no use, {used} were");
}
