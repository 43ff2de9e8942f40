//! This broker as one of several: how it finds its cluster ([`form`]).

pub(crate) mod form;
