//! What happens to a member's partitions, for programs that keep something per partition.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::Stream;
use tokio::sync::mpsc;

use crate::group::membership::Part;
use crate::group::shared::Shared;

/// What happens to a member's partitions. Topics and partition numbers.
#[derive(Debug)]
#[non_exhaustive]
pub enum GroupEvent {
    /// These are read from now on: their positions are known, and may be changed with
    /// [`GroupConsumer::seek`](crate::GroupConsumer::seek).
    Assigned(Vec<(String, i32)>),
    /// These are handed out no more, and go to other members once the revocation is dropped: time to finish what is under
    /// way and to commit it.
    Revoking(Revocation),
    /// These may be another member's by now: nothing of them can be committed any more.
    Lost(Vec<(String, i32)>),
}

/// Partitions that are on their way to other members. They wait for this to be dropped, up to the rebalance timeout, after
/// which the group goes on without this member.
#[derive(Debug)]
#[must_use = "dropping it gives the partitions up"]
pub struct Revocation {
    shared: Arc<Shared>,
    parts: Vec<(Part, u64)>,
    partitions: Vec<(String, i32)>,
}

impl Revocation {
    pub(crate) fn new(shared: Arc<Shared>, parts: Vec<(Part, u64)>, partitions: Vec<(String, i32)>) -> Self {
        Self { shared, parts, partitions }
    }

    /// Which: topic and number.
    pub fn partitions(&self) -> &[(String, i32)] {
        &self.partitions
    }

    /// Gives them up; as dropping it.
    pub fn done(self) {}
}

impl Drop for Revocation {
    fn drop(&mut self) {
        self.shared.unguard(&self.parts, Instant::now());
    }
}

/// The events of one member, from the moment on at which they were asked for; ends with the member, with the next call of
/// [`GroupConsumer::events`](crate::GroupConsumer::events), and where more than a thousand were left unread.
#[derive(Debug)]
pub struct GroupEvents {
    receiver: mpsc::Receiver<GroupEvent>,
}

impl GroupEvents {
    pub(crate) fn new(receiver: mpsc::Receiver<GroupEvent>) -> Self {
        Self { receiver }
    }

    /// The next event; `None` once the member is gone.
    pub async fn next(&mut self) -> Option<GroupEvent> {
        self.receiver.recv().await
    }
}

impl Stream for GroupEvents {
    type Item = GroupEvent;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<GroupEvent>> {
        self.receiver.poll_recv(context)
    }
}
