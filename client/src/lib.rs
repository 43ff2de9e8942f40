//! The client of Flowstone, a distributed commit log.

#![forbid(unsafe_code)]

mod address;
pub mod admin;
mod client;
mod connection;
pub mod consumer;
pub mod error;
mod metadata;
pub mod producer;
mod record;
mod retry;
#[cfg(feature = "testkit")]
pub mod testkit;

pub use admin::{
    Admin, AlterTopic, BrokerDescription, ClusterDescription, ConfigSource, ConfigValue, NewTopic, OffsetInfo,
    OffsetSpec, PartitionDescription, TopicDescription, TopicSummary,
};
pub use client::{Client, ClientBuilder};
pub use consumer::{
    Consumer, ConsumerBuilder, ConsumerRecord, OnOutOfRange, Position, RecordBatch, RecordRef, Records, StartAt, StopAt,
};
pub use error::{Error, ErrorCode, ErrorKind, Result};
pub use flowstone_protocol::Compression;
pub use producer::{Ack, Acks, Partitioner, Producer, ProducerBuilder, ProducerStats};
pub use record::{Payload, Record, RecordMetadata};

/// Locks, whatever became of the thread that held it last: what these locks guard is whole between any two statements
/// that can panic.
fn locked<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
