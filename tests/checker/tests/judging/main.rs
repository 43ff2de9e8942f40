//! The checker finds what was planted, and nothing in what is legal.

mod legal;
mod planted;
mod world;
