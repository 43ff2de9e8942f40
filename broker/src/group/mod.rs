//! Consumer groups: who belongs to them, what each member owns, and how far they have come.
//!
//! ```text
//!   sessions, calls --command--> GroupTable (commands) --records--> __consumer_offsets
//!        ^                            |
//!        +---- what changed ---- committed view <---- driver: silence, deadlines, new topics, targets
//! ```
//!
//! A group's life is in [`state`]; what may be done to it, and what follows, in [`commands`]; who shall own what in
//! [`assignment`] and [`plan`]. All of that is pure. What only holds while this broker leads the group's partition (who was
//! heard when, open streams) is the [`driver`]'s, and is forgotten with the leadership.

pub(crate) mod assignment;
pub(crate) mod commands;
pub(crate) mod driver;
pub(crate) mod pattern;
pub(crate) mod plan;
pub(crate) mod presence;
pub(crate) mod records;
pub(crate) mod state;
#[cfg(test)]
mod table_tests;
