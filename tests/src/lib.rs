//! What spans several crates of Flowstone: the simulator, multi-process tests, and the programs that measure its figures'
//! limits.

#![forbid(unsafe_code)]

pub mod sim;
