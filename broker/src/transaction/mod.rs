//! Transactions: their coordinator (a pure table, and what acts for it), and the way to it.

pub(crate) mod adder;
pub(crate) mod commands;
pub(crate) mod driver;
pub(crate) mod endings;
pub(crate) mod records;
pub(crate) mod state;
pub(crate) mod upkeep;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod table_tests;
