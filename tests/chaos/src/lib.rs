//! Clusters of real processes, and faults: killed, paused, cut off, slowed, wiped, damaged, out of room.
//!
//! A [`Cluster`] runs daemons from config files. Each tells others the address of a [`proxy`] instead of its own,
//! for peers and for clients, and every byte between two of them passes through one: the [`Network`] says what becomes of
//! it, for each pair and direction. No packet filter, no root needed; what does need root says so.
//!
//! A [`Schedule`] is a list of faults that follows from a seed; [`run()`] puts a cluster through it while `flowstone verify`
//! writes, reads and judges.
//!
//! # What it guarantees
//! Whatever it starts it ends, by process id; faults of a schedule leave a majority with what was acknowledged.
//!
//! It must never know what a broker does inside: it sees files, processes, sockets and the binary's commands.

#![forbid(unsafe_code)]

mod broker;
mod cluster;
mod dialer;
mod disk;
mod failure;
mod namespaces;
mod network;
pub mod proxy;
mod run;
mod schedule;
mod workload;

pub use broker::{Broker, Ended};
pub use cluster::{Cluster, HANG, Setup, flowstone_binary};
pub use disk::{SmallDisk, active_segments, flip_byte, forget_tail, sealed_segments};
pub use failure::{Failure, Outcome};
pub use namespaces::Namespaces;
pub use network::{Link, Network, Node};
pub use run::{Report, Settings, run};
pub use schedule::{Fault, FaultKind, Schedule, Step};
pub use workload::Workload;
