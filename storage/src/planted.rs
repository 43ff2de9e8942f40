//! Bugs on purpose, for the simulator to find. Nothing of this is in a build without the feature `planted`.

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// What waits for a flush of the log does not wait.
    AckBeforeFlush,
    /// What waits for a flush of term and vote does not wait.
    VoteBeforeFlush,
    /// A message that needs no flush itself overtakes those before it.
    ReleaseOutOfOrder,
    /// A new leader serves before its own entry is committed.
    ServeBeforeOwnEntry,
    /// A leader that steps down keeps what it had in flight.
    KeepOverlay,
    /// What is flushed is cut before it is noted that it is not answered for any more.
    CutWithoutMark,
    /// A quorum's acknowledgement is given when the leader alone has the batch.
    AnswerBeforeCommit,
    /// A linearizable read asks nobody.
    ReadWithoutQuorum,
    /// A flush that failed counts.
    IgnoreFailedFlush,
    /// A message for another replica id is taken.
    TakeStrangersMessages,
    /// A vote is forgotten when the replica is opened.
    ForgetVote,
    /// What only the page cache may hold is not written again when the replica is opened.
    TrustThePageCache,
    /// A learner votes before it has caught up.
    PromoteTooEarly,
    /// A replica whose disk was wiped comes back under its old id.
    VoterWithAmnesia,
    /// A replica that is opened votes with the members of its checkpoint, however old, and no checkpoint follows a change.
    ForgetMembers,
    /// Batches in flight are not looked for among those that are sent again.
    NoDeduplication,
    /// Readers of what is committed are given what is open.
    ServeUnstable,
    /// Readers of what is committed are not told what was aborted.
    HideAborted,
    /// What a checkpoint says of open transactions is not taken in.
    ForgetOpenTransactions,
    /// A partition takes what is written under an epoch that is over.
    TakeOldEpochs,
    /// A marker that could not be written counts as written.
    LoseMarkers,
    /// A partition is written to in a transaction whose coordinator does not know of it.
    WriteUnadded,
    /// A producer gets its transactional id while what was open before is still being ended.
    KeepPreparing,
    /// Offsets are taken from a member under any epoch, whoever owns the partition.
    TakeStaleCommits,
    /// A partition is given to another member before the one that has it gives it up.
    GiveTwice,
    /// Offsets do not count although their transaction was committed.
    LosePendingOffsets,
    /// Offsets count although their transaction was aborted.
    KeepAbortedOffsets,
    /// Offsets count before their transaction is committed.
    CommitPendingAtOnce,
    /// A deletion goes with the first pass of compaction that sees it.
    DropTombstones,
    /// Of two records of a key the older one is kept.
    KeepOlderRecords,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 30] = [
        Self::AckBeforeFlush,
        Self::VoteBeforeFlush,
        Self::ReleaseOutOfOrder,
        Self::ServeBeforeOwnEntry,
        Self::KeepOverlay,
        Self::CutWithoutMark,
        Self::AnswerBeforeCommit,
        Self::ReadWithoutQuorum,
        Self::IgnoreFailedFlush,
        Self::TakeStrangersMessages,
        Self::ForgetVote,
        Self::TrustThePageCache,
        Self::PromoteTooEarly,
        Self::VoterWithAmnesia,
        Self::ForgetMembers,
        Self::NoDeduplication,
        Self::ServeUnstable,
        Self::HideAborted,
        Self::ForgetOpenTransactions,
        Self::TakeOldEpochs,
        Self::LoseMarkers,
        Self::WriteUnadded,
        Self::KeepPreparing,
        Self::TakeStaleCommits,
        Self::GiveTwice,
        Self::LosePendingOffsets,
        Self::KeepAbortedOffsets,
        Self::CommitPendingAtOnce,
        Self::DropTombstones,
        Self::KeepOlderRecords,
    ];
}

#[cfg(feature = "planted")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug for all that this thread runs from now on; `None` takes it out.
#[cfg(feature = "planted")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this bug is planted.
#[cfg(feature = "planted")]
pub fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this bug is planted: never, in this build.
#[cfg(not(feature = "planted"))]
pub const fn is_planted(_bug: Bug) -> bool {
    false
}
