//! Commands that are refused, a row each.
