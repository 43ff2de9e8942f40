//! What spans several crates of Flowstone: multi-process tests, and the programs that measure its figures' limits.

#![forbid(unsafe_code)]
