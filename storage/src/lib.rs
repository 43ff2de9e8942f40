//! One partition's bytes: segments, their index, durability and recovery.
//!
//! What it guarantees: what [`Log::flush_done`](log::Log::flush_done) reported as flushed is found again by
//! [`Log::open`](log::Log::open), whatever happened in between, or opening says which offset is gone and what to do;
//! what was not flushed is found whole or not at all. No byte below that durable watermark is ever cut silently, and
//! after a failed write or flush nothing more is written.
//!
//! What it must never know: topic names, Raft roles, the network, and the time (it is an argument).
//!
//! A folder of a replica holds `replica` (who it is, and the format's version), `<applied index>.state` (checkpoints),
//! and segments: `<base offset>-<first Raft index>.log` with its `.index`. `docs/formats.md` draws every byte.
//!
//! Reading order: [`disk`] (the only door to files), [`batch_index`] (one slot per batch), [`recovery`] (the table that
//! decides what to keep), [`log`] (append, flush, read, truncate, roll), [`hard_state`], [`checkpoint`], [`data_dir`]. What
//! replicas do for each other: [`range`](mod@range) (bytes to give away), [`install`] (a copy of a
//! whole replica), [`scrub`] and [`repair`] (rot).

#![deny(unsafe_code)]

pub mod batch_index;
pub mod checkpoint;
pub mod compaction;
pub mod data_dir;
pub mod disk;
pub mod error;
pub mod flush;
#[doc(hidden)]
pub mod fuzz_targets;
pub mod hard_state;
pub mod inspect;
pub mod install;
pub mod kept;
pub mod log;
mod lookup;
mod mmap;
mod open;
#[doc(hidden)]
pub mod planted;
pub mod range;
pub mod read;
pub mod recovery;
mod reidentify;
pub mod repair;
pub mod retention;
pub mod scrub;
pub mod segment;
pub mod sim_disk;
mod slots;
mod small_file;
mod walk;

pub use checkpoint::{Checkpoint, CheckpointDone, CheckpointJob, EpochStart, ReplicaIdentity};
pub use compaction::copying::{Cleanness, OffsetRange, OffsetRangeTicket, SegmentCopy};
pub use compaction::{
    AbortedTransaction, Compaction, CompactionConfig, CompactionLimits, CompactionStep, CompactionTotals, Settled,
};
pub use data_dir::{DataDir, DataDirError};
pub use disk::{Disk, DiskFile, OpenMode, RealDisk};
pub use error::{OpenError, ReadError, StorageError};
pub use flush::FlushPool;
pub use hard_state::{HardState, HardStateFile, HardStateRot};
pub use install::Install;
pub use kept::KeptLog;
pub use log::{Appended, EntryBody, EntryMeta, FlushDone, FlushJob, Log, LogConfig, LogEntry};
pub use range::{Range, RangeTicket};
pub use read::{
    CountTicket, DECOMPRESSED_BYTES_MAX, FoundRecord, Lookup, LookupTicket, Read, ReadBytes, ReadTicket, RecordCount,
};
pub use repair::{Repair, RepairDone};
pub use retention::RetentionConfig;
pub use scrub::{Rotten, ScrubJob, ScrubPosition, Scrubbed};
pub use sim_disk::SimDisk;
