//! The cluster's metadata: what may be asked of it ([`commands`]), what it is ([`table`]), where replicas go
//! ([`placement`], [`balance`]), how they get there ([`change`]), what happens without being asked ([`liveness`],
//! [`upkeep`], [`lost`]), and how this broker follows it ([`reconcile`]).
//!
//! All but the last is pure: time and chance are arguments.

pub(crate) mod balance;
pub(crate) mod change;
pub(crate) mod chunked;
pub(crate) mod commands;
pub(crate) mod liveness;
pub(crate) mod lost;
pub(crate) mod placement;
pub(crate) mod reconcile;
mod records;
pub(crate) mod table;
pub(crate) mod upkeep;

#[cfg(test)]
mod command_tests;
#[cfg(test)]
mod refusal_tests;
#[cfg(test)]
mod scaling_tests;
#[cfg(test)]
mod table_tests;
#[cfg(test)]
mod testing;
