//! The client of Flowstone, a distributed commit log: records in, records out, administration.
//!
//! ```
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let broker = flowstone_client::testkit::TestBroker::start().await?;
//! # let server = broker.address();
//! use flowstone_client::{Client, NewTopic, Record, StopAt};
//!
//! // `server` is HOST:PORT, or several separated by commas.
//! let client = Client::builder(server).client_id("billing").connect().await?;
//! client.admin().create_topic(NewTopic::new("orders").partitions(3)).await?;
//!
//! // In: `send` takes the record, its `Ack` tells where it lies.
//! let producer = client.producer().build().await?;
//! let ack = producer.send(Record::to("orders").key("17").value("2 apples")).await?;
//! let at = ack.await?;
//! println!("stored in partition {} at offset {}", at.partition, at.offset);
//!
//! // Out: from the first record to where the topic ends now.
//! let mut consumer = client.consumer().topic("orders").stop_at(StopAt::End).build().await?;
//! let mut values = Vec::new();
//! while let Some(batch) = consumer.next_batch().await {
//!     for record in &batch? {
//!         values.push(String::from_utf8_lossy(record.value_bytes().unwrap_or_default()).into_owned());
//!     }
//! }
//! assert_eq!(values, ["2 apples"]);
//! # broker.stop().await;
//! # Ok(())
//! # }
//! ```
//!
//! # What it promises
//! - A [`Producer`] is idempotent with `acks=quorum` unless told otherwise: a record that was acknowledged is stored
//!   once, at the offset told, and the records of one partition lie in the order in which they were sent, whatever had to
//!   be sent again. A record that failed with `TIMED_OUT` may or may not be stored; it is never stored twice.
//! - Memory is bounded: a producer holds [`buffer_bytes`](ProducerBuilder::buffer_bytes), then [`Producer::send`] waits; a
//!   consumer holds [`prefetch_bytes`](ConsumerBuilder::prefetch_bytes) per broker, then the broker waits.
//! - A [`Consumer`] hands out every record from its position on, once, in order per partition, checksums checked. Records
//!   of the log's own (control records) take offsets and are passed over.
//! - Records of aborted and open transactions are not handed out, unless [`Isolation::ReadUncommitted`] is asked for.
//! - A [`GroupConsumer`] shares partitions with the other members of its group. What it handed out is committed once the next
//!   is asked for; a partition goes to another member once that commit is answered; a member that lost a partition
//!   cannot take the group's position back.
//! - Records and consumed offsets of a [`Transaction`] count together or not at all, whoever dies.
//! - Brokers that go away are tried again, leaders that move are followed; what that costs is time.
//! - Every [`Error`] says what may be done ([`Error::kind`]), what happened ([`Error::code`]), and in words what to do.
//!
//! # What it is not
//! It must never know how a broker stores what it is sent. It assigns no partitions, which the broker does, and it keeps no
//! state beyond the process: positions are the group's, in the cluster. It is no framework for stream processing:
//! `transaction` and a loop over batches is what there is.
//!
//! # How it is built
//! What decides is kept apart from what does: the batches of a partition are a state machine that takes time as an
//! argument (`producer/batcher.rs`), around which `producer/sender.rs` keeps the streams. A record is encoded once,
//! straight into its batch, under a short lock; whoever fills a batch, awaits it or hears an answer sends what may go
//! next. A consumer owns no task: it polls its streams when it is polled, and hands out whole batches whose records are
//! slices of what came over the wire. A group's member has a task of its own, so that its heartbeats do not depend on how
//! often it is polled: what it owns is a state machine (`group/membership.rs`), what both sides share lies behind one short
//! lock (`group/shared.rs`), and the task keeps the stream (`group/session.rs`). A transactional producer
//! (`transaction.rs`) is a producer whose identity changes with every transaction.
//!
//! With the feature `testkit`, `testkit::TestBroker` runs a broker inside your tests.

#![forbid(unsafe_code)]

mod address;
pub mod admin;
mod client;
mod cluster;
mod connection;
pub mod consumer;
mod coordinator;
pub mod error;
pub mod group;
mod metadata;
pub mod producer;
mod record;
mod retry;
#[cfg(feature = "testkit")]
pub mod testkit;
pub mod transaction;
mod wire;

pub use admin::{
    Admin, AlterTopic, BrokerDescription, BrokerHealth, BrokerState, ClusterDescription, ClusterHealth,
    CommittedOffset, ConfigSource, ConfigValue, GroupDescription, GroupMember, GroupState, GroupSummary,
    MemberPartition, MoveDescription, NewTopic, OffsetInfo, OffsetSpec, PartitionDescription, PartitionHealth,
    PartitionLag, PartitionProblem, PlannedMove, RebalancePlan, RecoveredPartition, TopicDescription, TopicSummary,
    TransactionDescription, TransactionState, TransactionSummary,
};
pub use client::{Client, ClientBuilder};
pub use consumer::{
    Consumer, ConsumerBuilder, ConsumerRecord, Isolation, OnOutOfRange, Position, RecordBatch, RecordRef, Records,
    StartAt, StopAt,
};
pub use error::{Error, ErrorCode, ErrorKind, Result};
pub use flowstone_protocol::Compression;
pub use group::{Assignor, GroupBuilder, GroupConsumer, GroupEvent, GroupEvents, Revocation};
pub use producer::{Ack, Acks, Partitioner, Producer, ProducerBuilder, ProducerStats};
pub use record::{Payload, Record, RecordMetadata};
pub use transaction::{Transaction, TransactionalBuilder, TransactionalProducer};

/// Locks, whatever became of the thread that held it last: what these locks guard is whole between any two statements
/// that can panic.
fn locked<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
