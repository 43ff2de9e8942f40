//! The way to the other brokers: two streams to each of them that carry the messages of all groups, ranges that are
//! pulled, and calls.
//!
//! What it guarantees: sending never blocks; every queue has a written maximum, and what does not fit is dropped and told;
//! the messages of one group that go on one stream keep their order, though any of them may be lost; a slow or silent
//! broker costs no other anything; a batch is not copied on its way from the log to the socket, nor, where it arrived in
//! one piece, on its way from there to the replica. Nothing that arrives makes the process panic or take unbounded memory,
//! and no stream is taken from a broker that is not registered with the directory that it names.
//!
//! What it must never know: what the messages mean to Raft, or the calls to the controller.
//!
//! Reading order: [`PeerNetwork`] (what a broker holds), `link` (a stream as its sender runs it), `streams` (as its
//! receiver does), `wire` (messages as bytes), `identity` (who is believed what), `server` and `client` (calls), `pull`.

mod book;
mod calls;
mod chunks;
mod client;
mod config;
mod identity;
mod link;
mod network;
mod pull;
mod queue;
mod server;
mod streams;
#[cfg(test)]
mod tests;
mod wire;
pub(crate) mod wrong_port;

pub use book::{PeerBook, PeerEntry};
pub use calls::{PeerCalls, PeerEvents};
pub use client::PeerClient;
pub(crate) use client::is_unanswered;
pub use config::{PeerConfig, QueueLimits};
pub use identity::{PROTOCOL_VERSION, PeerIdentity};
pub use network::{PeerFigures, PeerNetwork};
