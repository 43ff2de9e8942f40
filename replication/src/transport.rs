//! The way to the other brokers, as a shard sees it, and the ranges that are pulled through it.

use std::fmt::Debug;

use bytes::Bytes;
use flowstone_protocol::{BrokerId, Error, ErrorCode, Offset, RaftIndex, ReplicaId, TopicPartition};
use flowstone_storage::Cleanness;

use crate::peer::PeerMessage;
use crate::reply::Reply;

/// A message between replicas, with the group that it belongs to.
#[derive(Debug, Clone)]
pub struct GroupMessage {
    /// The group's partition.
    pub tp: TopicPartition,
    /// From whom, to whom, and what.
    pub message: PeerMessage,
}

/// The way to other brokers. Called on shards' threads: nothing here may block.
///
/// What a full queue can not take is dropped, and [`crate::Shards::unreachable`] tells of it: Raft repeats what matters.
pub trait PeerTransport: Debug + Send + Sync + 'static {
    /// Sends messages of many groups, in order, to one broker.
    fn send(&self, to: BrokerId, messages: Vec<GroupMessage>);

    /// Asks a broker for a range. Bandwidth and deadlines are the transport's; the reply always comes, once, from any
    /// thread but never from within this call.
    fn pull(&self, from: BrokerId, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>);
}

/// Which part of a replica is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PullRequest {
    /// Of which partition.
    pub tp: TopicPartition,
    /// Of which replica there: another of the same partition, of a group that was given up, has another history.
    pub of: ReplicaId,
    /// What of it.
    pub what: PullWhat,
}

/// What can be pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullWhat {
    /// The newest durable checkpoint.
    Checkpoint,
    /// Whole committed batches: as many as fit into `max_bytes`, at least one.
    Batches {
        /// The first entry.
        first: RaftIndex,
        /// The last, at most.
        last: RaftIndex,
        /// Bytes of them, at most; a single longer batch is given whole.
        max_bytes: u32,
    },
    /// Whole committed batches by their offsets, compacted or not: as many as fit into `max_bytes`, at least one.
    Offsets {
        /// The first offset.
        from: Offset,
        /// One past the last, at most.
        to: Offset,
        /// Bytes of them, at most; a single longer batch is given whole.
        max_bytes: u32,
        /// How far what the asking one holds of the log is cleaned: with what does not go with that it must begin again
        /// (`OFFSET_OUT_OF_RANGE`).
        held: Cleanness,
    },
}

/// What was pulled. The transport has checked that it came over whole; whoever takes it checks every batch again.
#[derive(Debug, Clone)]
pub enum PullAnswer {
    /// The newest durable checkpoint.
    Checkpoint {
        /// Its file, as it is stored.
        bytes: Bytes,
        /// The first entry that the answering log still has.
        first_index: RaftIndex,
        /// Its offset.
        first_offset: Offset,
        /// The first offset in its files, and the entry that was there: where it lies before `first_offset`, what is
        /// between them is compacted, and there by offset alone.
        local_start: (Offset, RaftIndex),
    },
    /// Batches, back to back, as they are stored.
    Batches {
        /// All of them.
        bytes: Bytes,
        /// One past the last entry among them.
        next: RaftIndex,
        /// What the answering replica knows to be committed.
        commit: RaftIndex,
    },
    /// Batches by offset, back to back.
    Offsets {
        /// All of them.
        bytes: Bytes,
        /// One past the last offset among them.
        next: Offset,
        /// How far their log is cleaned.
        cleanness: Cleanness,
    },
}

impl PullAnswer {
    /// What was pulled.
    pub fn bytes(&self) -> &Bytes {
        match self {
            Self::Checkpoint { bytes, .. } | Self::Batches { bytes, .. } | Self::Offsets { bytes, .. } => bytes,
        }
    }
}

/// No way to anybody: of a broker that is alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPeers;

impl PeerTransport for NoPeers {
    fn send(&self, to: BrokerId, messages: Vec<GroupMessage>) {
        tracing::debug!(%to, messages = messages.len(), "messages are dropped: there is no way to send them");
    }

    fn pull(&self, from: BrokerId, _request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        reply.send(Err(Error::new(
            ErrorCode::NoLeader,
            format!("there is no way to broker {from}: this broker runs alone"),
        )));
    }
}
