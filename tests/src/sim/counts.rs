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
    /// Replicas given up for new ones.
    replaced,
    /// Clocks that jumped.
    clock_jumps,
    /// Log starts moved.
    trims,
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
    /// Checkpoints compared between replicas.
    states_compared,
}
