//! What runs went through: a run that saw none of something proves nothing about it.

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// See the module.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)+
        }

        impl Counts {
            /// Adds those of another run.
            pub fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)+
            }

            /// All of them with their names.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),+]
            }
        }
    };
}

counts! {
    /// Milliseconds simulated.
    simulated_millis,
    /// Events: messages, requests, jobs, rounds.
    events,
    /// Leaders elected.
    elections,
    /// Of those, at a leader's own wish.
    transfers,
    /// Times that a log was cut.
    truncations,
    /// Checkpoints and ranges that replicas asked others for.
    pulls,
    /// Of those, answered with something damaged.
    pulls_damaged,
    /// Replicas that were made from another one's checkpoint and ranges.
    snapshots,
    /// Changes of members that were committed.
    membership_changes,
    /// Changes of places that came to their end.
    moves,
    /// Brokers killed.
    crashes,
    /// Of those, by a power failure.
    power_failures,
    /// Of those, in the middle of an operation on the disk.
    crashes_in_operation,
    /// Files of which a power failure kept some unflushed sectors and lost others.
    torn_files,
    /// Sectors lost.
    sectors_lost,
    /// Operations on a disk that were made to fail.
    disk_faults,
    /// Replicas that ended and were opened anew in the same process.
    reopened,
    /// Brokers stopped cleanly.
    stops,
    /// Brokers paused.
    pauses,
    /// Times that the network was cut somewhere.
    cuts,
    /// Messages between brokers that arrived.
    delivered,
    /// Those that were lost.
    lost,
    /// Disks that ran full.
    full_disks,
    /// Bits flipped.
    rot,
    /// Reads that came upon one.
    rotten_reads,
    /// Disks wiped.
    wipes,
    /// Voters whose power failed when they had just voted.
    struck_voters,
    /// Replicas that were moved away from a broker that did not hear of it.
    moves_behind,
    /// Partitions whose majority was destroyed.
    lost_majorities,
    /// Power failures of brokers whose writes counted unflushed.
    relaxed_power_failures,
    /// Replicas given up for new ones.
    replaced,
    /// Clocks that jumped.
    clock_jumps,
    /// Log starts moved.
    trims,
    /// Commands given to coordinators.
    commands,
    /// Those that were carried out.
    commanded,
    /// Transactions whose producer was told that they are committed.
    transactions_committed,
    /// Transactions that were aborted for certain.
    transactions_aborted,
    /// Transactions whose producer was told that they were open for too long.
    transactions_timed_out,
    /// Times that a producer was told that another one had taken its place.
    producers_fenced,
    /// Times that a member of a group was told of another assignment.
    rebalances,
    /// Offsets that groups have committed, those within transactions included.
    offset_commits,
    /// Transactions that were committed with offsets of a group.
    transactional_offset_commits,
    /// Commits that were refused: of who does not own the partition, or under an older epoch.
    stale_commits_refused,
    /// Times that a member was told that it is none any more.
    members_fenced,
    /// Passes of compaction that came to their end.
    compactions,
    /// Bytes that they freed.
    compacted_away_bytes,
    /// Times that a topic that is compacted was read from its beginning to its end.
    keyed_scans,
    /// Additions to transactions and markers that were answered a second time.
    errands_repeated,
    /// Those that were refused: late, of a transaction that was over, or of a coordinator that is none any more.
    errands_refused,
    /// Partitions that were added to transactions.
    partitions_added,
    /// Batches of aborted transactions that readers of committed records passed over.
    aborted_batches_passed,
    /// Partitions that went on without their majority.
    recoveries,
    /// Log starts moved by the leader's clock.
    retained,
    /// Bytes of sealed segments that were looked at.
    scrubbed_bytes,
    /// Damaged ranges that were replaced by another replica's.
    repairs,
    /// Certain high watermarks that were told.
    linearizable_reads,
    /// Batches acknowledged to a quorum's promise.
    acknowledged,
    /// Batches refused, or lost on their way, and sent again.
    retries,
    /// Batches whose second sending was answered with the first one's offset.
    answered_again,
    /// Batches that were left with nobody knowing.
    unknown,
    /// Records read.
    reads,
    /// Of those, from replicas that did not lead.
    follower_reads,
    /// States of machines compared with a replay of their log.
    states_compared,
    /// Machines that were compared with a replay at the end of a run.
    replays,
}
