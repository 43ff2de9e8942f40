//! The simulator: whole clusters of the real replicas, logs and shards, in one thread, with seeded time, network, disks
//! and crashes.
//!
//! A run is a function of its seed: nothing in it asks the machine for the time, a random number, or another thread. What
//! it promises to find, it finds again with the same seed.
//!
//! ```text
//!  clients -> requests -> | shards (real) -> replicas (real) -> logs (real) -> simulated disk
//!          <- answers  <- |     ^    |
//!                               |    v
//!                         simulated network, jobs that end when the seed says, clocks that are wrong
//!
//! Behind the logs are the broker's own machines: producers of users' partitions, and the cluster's metadata, which says
//! where the replicas of all others are to be.
//! ```
//!
//! Reading order: [`Plan`] (what a run is made of), [`World`] (the queue of events), `faults` (what goes wrong),
//! `invariants` (what must hold after every step), `clients` (whose history is judged at the end).

mod broker;
mod clients;
mod controller;
mod counts;
mod faults;
mod group_coordinators;
mod groups;
mod invariants;
mod keyed;
mod machine;
mod members;
mod network;
mod outbox;
mod plan;
mod random;
mod scenario;
mod scripted;
mod time;
mod trace;
mod transactions;
mod transactors;
mod workers;
mod world;

pub use counts::Counts;
#[doc(hidden)]
pub use network::Weather;
pub use plan::{Fault, Plan};
pub use scripted::Owner;
pub use world::{Report, World, hear_panics, take_panic};

/// Runs one seed.
pub fn run(seed: u64) -> Report {
    World::new(Plan::drawn(seed)).run()
}
