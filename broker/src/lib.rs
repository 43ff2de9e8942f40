//! The Flowstone broker: listeners, gRPC services, the coordinators behind them, configuration and metrics.
//!
//! A program builds a [`Config`], calls [`Broker::start`], and later [`RunningBroker::shutdown`]. What is acknowledged
//! has been appended, flushed and committed by the replica underneath; this crate never answers ahead of it.
//!
//! It must never know how a client batches, nor how bytes lie on disk.

#![forbid(unsafe_code)]

pub mod config;
// Public for what measures them; programs start brokers.
#[doc(hidden)]
pub mod measured;
#[doc(hidden)]
pub mod peer;
// Public for the simulator.
#[doc(hidden)]
pub mod simulation;
pub mod telemetry;
pub mod topic_config;
mod transaction;

mod admin_http;
mod broker;
mod cluster;
mod connections;
mod controller;
mod coordinator;
mod group;
mod internal_topics;
mod metrics;
mod node;
mod partition;
mod producers;
mod receiving;
mod room;
mod server;
mod service;
mod units;

pub use broker::{Broker, Listeners, RunningBroker, ShutdownReport, StartError};
pub use config::{Config, ConfigError, Explained, Origin};
/// Reading the files of a data directory, for tools that inspect them.
pub use flowstone_storage as storage;
