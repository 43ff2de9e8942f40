//! The binary `flowstone` as its users meet it: real processes, real files, real signals.

mod bad_input;
mod commands;
mod crash;
mod daemon;
mod resources;
mod round_trip;
mod running;
