//! The wire and disk formats of Flowstone.
//!
//! What lives here: the generated gRPC types ([`pb`]), typed ids ([`ids`]), error codes with what a caller may do
//! about them ([`error`]), and the Kafka record batch, format v2: its header, CRC and validation ([`batch`]), its
//! records ([`record`]), its codecs ([`compression`]), the log's own control batches ([`control`]), the rewrites that
//! a leader may do before it proposes ([`rewrite`]), and Kafka's key hash ([`murmur2`]).
//!
//! What it guarantees: no input makes it panic, and no input makes it allocate more than a stated bound: every length
//! read from outside is checked against what is there, or against a cap, before it is believed.
//!
//! What it must never know: files, sockets, clocks. Time is an argument.

#![forbid(unsafe_code)]

pub mod batch;
pub mod compression;
pub mod control;
pub mod error;
#[doc(hidden)]
pub mod fuzz_targets;
pub mod ids;
pub mod murmur2;
pub mod record;
pub mod rewrite;
mod varint;

/// The generated types and services of package `flowstone.v1`; their documentation is in `proto/flowstone/v1`.
// Generated: its docs are the .proto files' comments, and its style is the generator's.
#[allow(missing_docs, unreachable_pub, rust_2018_idioms, clippy::all)]
pub mod pb {
    tonic::include_proto!("flowstone.v1");
}

/// Records that the brokers keep for themselves, package `flowstone.internal.v1`: no part of the public interface.
// Generated, as above.
#[allow(missing_docs, unreachable_pub, rust_2018_idioms, clippy::all)]
pub mod internal {
    tonic::include_proto!("flowstone.internal.v1");
}

/// What brokers say to each other, package `flowstone.peer.v1`: no part of the public interface.
// Generated, as above.
#[allow(missing_docs, unreachable_pub, rust_2018_idioms, clippy::all)]
pub mod peer {
    tonic::include_proto!("flowstone.peer.v1");
}

/// Encoded `FileDescriptorSet` of all services, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("flowstone.v1");

pub use batch::{Attributes, BatchError, BatchHeader, HEADER_BYTES, LOG_OVERHEAD, TimestampType, ValidationLimits};
pub use compression::Compression;
pub use control::{ControlRecord, ControlType, Marker};
pub use error::{Error, ErrorCode, ErrorKind};
pub use ids::{
    BrokerId, ClusterId, DirectoryId, LeaderEpoch, Offset, PartitionId, ProducerEpoch, ProducerId, RaftIndex,
    ReplicaId, Sequence, Term, Timestamp, TopicId, TopicName, TopicNameError, TopicPartition,
};
pub use record::{Record, RecordBatchBuilder, RecordIter};
