//! The cluster's metadata: what may be asked of it ([`commands`]), what it is ([`table`]), where replicas go
//! ([`placement`]), and how this broker follows it ([`reconcile`]).

pub(crate) mod commands;
pub(crate) mod placement;
pub(crate) mod reconcile;
pub(crate) mod table;

#[cfg(test)]
mod table_tests;
