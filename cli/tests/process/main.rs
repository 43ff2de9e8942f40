//! The binary `flowstone` as its users meet it: real processes, real files, real signals.

mod bad_input;
mod cluster;
mod commands;
mod compose;
mod crash;
mod daemon;
mod dev_cluster;
mod groups;
mod packaging;
mod resources;
mod round_trip;
mod running;
mod verify;
