//! What the services of one broker share.

use std::sync::Arc;
use std::time::Instant;

use flowstone_protocol::{BrokerId, ClusterId, Error, ErrorCode};
use flowstone_replication::Reply;
use tokio::sync::{Semaphore, oneshot, watch};

use crate::config::Config;
use crate::controller::commands::{MetadataCommand, MetadataReply};
use crate::controller::table::MetadataTable;
use crate::coordinator::Published;
use crate::metrics::Metrics;
use crate::partition::{LocalReplicas, PartitionCommand, PartitionReply, Replica};
use crate::room::Room;

/// One broker, as its services see it.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) id: BrokerId,
    pub(crate) cluster: ClusterId,
    /// The committed metadata.
    pub(crate) table: Published<MetadataTable>,
    /// The metadata's own replica: takes commands while it leads.
    pub(crate) metadata: Replica,
    pub(crate) replicas: LocalReplicas,
    /// True once the broker drains: streams end, no new work is taken.
    pub(crate) drain: watch::Receiver<bool>,
    pub(crate) metrics: Arc<Metrics>,
    /// Whether the disk has room.
    pub(crate) room: Room,
    /// Turns of checks that decompress or compress much.
    pub(crate) checks: Arc<Semaphore>,
    pub(crate) ready_since: Instant,
}

impl Node {
    /// Has the controller decide, and waits until that is committed.
    pub(crate) async fn command(&self, command: MetadataCommand) -> Result<MetadataReply, Error> {
        command_to(&self.metadata, command).await
    }
}

/// Has the controller behind `metadata` decide, and waits until that is committed.
pub(crate) async fn command_to(metadata: &Replica, command: MetadataCommand) -> Result<MetadataReply, Error> {
    let (sender, receiver) = oneshot::channel();
    metadata.command(PartitionCommand::Metadata(command), Reply::from(sender));
    let answered = receiver
        .await
        .map_err(|_| Error::new(ErrorCode::ShuttingDown, "this broker is shutting down; try again when it is back"))?;
    let PartitionReply::Metadata(reply) = answered??;
    Ok(reply)
}
