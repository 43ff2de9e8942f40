//! This broker as one of several: how it finds its cluster ([`form`], [`join`], [`belonging`]), holds on to it
//! ([`control`], [`session`], [`book`]), does its part for the groups that it leads ([`drive`]), answers others
//! ([`calls`], [`report`]) and, where it leads the metadata, looks after the cluster ([`duty`]); and how the metadata goes on
//! where its majority is gone ([`recovery`]).

pub(crate) mod belonging;
pub(crate) mod book;
pub(crate) mod calls;
pub(crate) mod control;
pub(crate) mod drive;
pub(crate) mod duty;
pub(crate) mod form;
pub(crate) mod join;
pub(crate) mod recovery;
pub(crate) mod report;
pub(crate) mod session;
