//! One replica's Raft as a sans-io state machine, and the shard threads that run replicas.
//!
//! What it guarantees: a request is answered only when what it did is as durable as was asked for; what was answered is
//! there again after any crash that its flush mode covers; a machine is given every committed entry once and in order; and
//! a replica whose disk failed answers nothing any more until it was opened anew.
//!
//! What it must never know: topics' meaning, groups, transactions, gRPC services.
//!
//! Reading order: [`Machine`] (what is fed from the log), [`effects`] (what goes into a step and comes out), [`Replica`]
//! (the step itself; `raft_adapter` and `raft_log` hold the Raft crate's ways), [`Shards`] (threads, timers, pools; `peers`:
//! the other brokers and the clock of idle groups; `pulling`: ranges given and taken; `scrubbing`: rot), [`PeerTransport`]
//! (the way to other brokers), [`membership_plan`] (what a leader does to change its members), and [`ReplicaHandle`] (what
//! callers hold).

#![forbid(unsafe_code)]

pub mod effects;
mod handle;
mod inbox;
mod machine;
mod membership;
pub mod membership_plan;
mod metrics;
mod opening;
mod parked;
mod peer;
mod raft_adapter;
mod raft_log;
mod replica;
mod reply;
mod request;
mod shard;
mod stripe;
mod transport;
mod workers;

pub use effects::{Answer, Effects, Ended, Event};
pub use flowstone_storage::{Cleanness, LogConfig, ReadBytes, RetentionConfig};
pub use handle::ReplicaHandle;
pub use machine::{Admission, Commanded, Machine, MachineBody, MachineEntry};
pub use membership::{Membership, MembershipChange, MembershipError};
pub use metrics::{FLUSH_BUCKETS, ShardMetrics};
pub use peer::{Beat, BeatAnswer, PeerBody, PeerMessage, RestingGroup};
pub use replica::{CannotOpen, Replica, ReplicaConfig};
pub use reply::{Permit, Reply};
pub use request::{
    Acks, FlushMode, FoundOffset, GroupStatus, Health, MemberStatus, OffsetQuery, Produce, Produced, ReadAnswer,
    ReadRequest, Reconfigure, ReplicaSpec, ReplicaStatus, Role, Start, TrimTo,
};
pub use shard::{Clock, ManualShards, Shards, ShardsConfig, StartError, system_clock};
pub use transport::{GroupMessage, NoPeers, PeerTransport, PullAnswer, PullRequest, PullWhat};
pub use workers::{JobKind, Workers};
