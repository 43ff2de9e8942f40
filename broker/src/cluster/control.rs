//! The metadata as this broker holds it: its own replica, what is committed, and the way to whoever leads it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use flowstone_protocol::peer::ForwardRequest;
use flowstone_protocol::{BrokerId, Error, ErrorCode, Offset, ReplicaId};
use flowstone_replication::Reply;
use futures::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, oneshot};

use super::duty::Duty;
use super::recovery::MetadataRecovery;
use crate::controller::commands::{MetadataCommand, MetadataReply};
use crate::controller::table::MetadataTable;
use crate::coordinator::Published;
use crate::partition::{PartitionCommand, PartitionReply, Replica};
use crate::peer::{PeerBook, PeerClient, PeerNetwork};

/// A call for the controller looks for it this long: about two elections.
const LOOK_FOR_CONTROLLER_MAX: Duration = Duration::from_secs(8);
/// A controller that takes longer to say how far the metadata is is not waited for.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// What a broker forwards to learn how far the metadata is: no call of clients'. Answered with the number of its last
/// recovery and an offset, both big endian.
pub(crate) const METADATA_END: &str = "MetadataEnd";
/// A broker to which there was no way is not tried for so long.
const CUT_FOR: Duration = Duration::from_secs(5);
/// Between two looks where nothing tells of a change.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Whether a call may be sent to the controller once more when its answer was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Again {
    /// It changes nothing a second time, or is known by its id.
    Harmless,
    /// The second answer would say that it cannot be done, as it is done.
    Harmful,
}

/// This broker's hold on the metadata.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) me: BrokerId,
    /// Its replica of the metadata: takes commands while it leads. Replaced where the controller gives this broker another
    /// one; readers clone it out.
    metadata: RwLock<(ReplicaId, Replica)>,
    /// The committed metadata.
    pub(crate) table: Published<MetadataTable>,
    /// What the controller keeps in memory, in use while the metadata is led here.
    pub(crate) duty: Duty,
    /// Calls other brokers.
    pub(crate) peers: PeerClient,
    /// Brokers that may know who the controller is.
    pub(crate) book: PeerBook,
    /// Takes the wish that the metadata's replica here go on as the only voter.
    pub(crate) recover: mpsc::Sender<MetadataRecovery>,
    /// Held while the metadata is recovered: that takes several steps.
    pub(crate) recovering: tokio::sync::Mutex<()>,
    /// Whom to ask next where nobody is known to be it.
    asked: AtomicUsize,
    /// The controller to which there was no way, and when that was found out. Held for a look or a change.
    cut: Mutex<Option<(BrokerId, Instant)>>,
}

impl Control {
    pub(crate) fn new(
        me: BrokerId,
        metadata: (ReplicaId, Replica),
        table: Published<MetadataTable>,
        duty: Duty,
        network: &PeerNetwork,
        recover: mpsc::Sender<MetadataRecovery>,
    ) -> Arc<Self> {
        Arc::new(Self {
            me,
            metadata: RwLock::new(metadata),
            table,
            duty,
            peers: network.client(),
            book: network.book().clone(),
            recover,
            recovering: tokio::sync::Mutex::new(()),
            asked: AtomicUsize::new(0),
            cut: Mutex::new(None),
        })
    }

    /// This broker's replica of the metadata.
    pub(crate) fn metadata(&self) -> Replica {
        self.metadata.read().1.clone()
    }

    /// That replica's id.
    pub(crate) fn metadata_id(&self) -> ReplicaId {
        self.metadata.read().0
    }

    /// It has another one from now on.
    pub(crate) fn set_metadata(&self, id: ReplicaId, replica: Replica) {
        *self.metadata.write() = (id, replica);
    }

    /// Somebody who may know, where this broker does not: a replica that was removed from its group hears nothing more.
    fn anybody(&self) -> Option<BrokerId> {
        let known = self.book.all();
        if known.is_empty() {
            return None;
        }
        let turn = self.asked.fetch_add(1, Ordering::Relaxed) % known.len();
        Some(known[turn].0)
    }

    /// All of these, another one first each time.
    pub(crate) fn in_turn<'a>(&self, brokers: &'a [BrokerId]) -> impl Iterator<Item = BrokerId> + use<'a> {
        let first = self.asked.fetch_add(1, Ordering::Relaxed) % brokers.len().max(1);
        brokers[first..].iter().chain(&brokers[..first]).copied()
    }

    /// Whether there was no way to a broker a moment ago; now and then it is tried again.
    pub(crate) fn cut_from(&self, broker: BrokerId, now: Instant) -> bool {
        self.cut.lock().is_some_and(|(cut, at)| cut == broker && now.saturating_duration_since(at) < CUT_FOR)
    }

    /// There is no way to a broker.
    pub(crate) fn note_cut(&self, broker: BrokerId, now: Instant) {
        *self.cut.lock() = Some((broker, now));
    }

    /// Whether this broker is the controller.
    pub(crate) fn leads(&self) -> bool {
        self.metadata().status().is_ready()
    }

    /// The broker that leads the metadata, as far as is known here.
    pub(crate) fn controller(&self) -> Option<BrokerId> {
        let status = self.metadata().status();
        if status.is_ready() { Some(self.me) } else { status.leader_broker }
    }

    /// Waits until this broker has applied all that was committed when it was asked, as the controller says.
    ///
    /// # Errors
    /// The controller cannot be asked.
    pub(crate) async fn caught_up(&self) -> Result<(), Error> {
        let (recovery, end) = self
            .at_controller(Again::Harmless, |to| {
                Box::pin(async move {
                    if to == self.me {
                        let end = self.committed_end().await?;
                        return Ok((self.table.with(MetadataTable::recovery), end));
                    }
                    let request = ForwardRequest { method: METADATA_END.to_owned(), ..ForwardRequest::default() };
                    let response = self.peers.forward(to, request, ANSWER_MAX).await?.response;
                    let end = <[u8; 16]>::try_from(&response[..]).map_err(|_| {
                        let what = "the controller answered something else; run one version of Flowstone on all";
                        Error::new(ErrorCode::Internal, what)
                    })?;
                    let end = i128::from_be_bytes(end);
                    Ok(((end >> 64) as i64, Offset::new(end as i64)))
                })
            })
            .await?;
        // Told of every commit; a term's first entry changes nothing, and is told as well.
        let is_there = || self.table.with(MetadataTable::recovery) >= recovery;
        drop(self.table.changes().wait_for(|applied| is_there() && *applied >= end).await);
        Ok(())
    }

    /// One past the last committed offset of the metadata, once most voters have confirmed that this broker leads them.
    ///
    /// # Errors
    /// This broker is not the controller.
    pub(crate) async fn committed_end(&self) -> Result<Offset, Error> {
        if !self.leads() {
            return Err(self.not_controller());
        }
        let (sender, receiver) = oneshot::channel();
        self.metadata().read_index(Reply::from(sender));
        receiver.await.map_err(|_| shutting_down())?
    }

    /// Has the controller, which must be this broker, decide; returns when that is committed.
    ///
    /// # Errors
    /// `NOT_LEADER` where another is the controller, `LEADER_NOT_READY` or `NO_LEADER` where nobody is at the moment.
    pub(crate) async fn command(&self, command: MetadataCommand) -> Result<MetadataReply, Error> {
        if !self.leads() {
            return Err(self.not_controller());
        }
        let decided = command_to(&self.metadata(), command).await;
        if decided.as_ref().is_err_and(|error| !error.is_retriable()) {
            // A refusal writes nothing, so that nobody has confirmed it: this broker may have been the controller once, and not
            // know of its successor's doings.
            self.committed_end().await?;
        }
        decided
    }

    /// Who is, for whoever took this broker for the controller.
    pub(crate) fn not_controller(&self) -> Error {
        match self.controller().filter(|controller| *controller != self.me) {
            Some(controller) => {
                let error = Error::new(
                    ErrorCode::NotLeader,
                    format!("broker {} is not the controller, broker {controller} is; ask that one", self.me),
                );
                let address =
                    self.table.with(|table| table.broker(controller).map(|broker| broker.client_address.clone()));
                error.with_leader(controller, address.unwrap_or_default())
            }
            None => Error::new(
                ErrorCode::NoLeader,
                "the cluster has no controller at the moment: it is being elected, or most voters of the metadata cannot \
                 be reached; try again in a moment",
            ),
        }
    }

    /// Has `call` speak to the controller, whoever that is, as often as it says that it was not, or not yet. Where its
    /// answer was lost, it may have been done: then `again` says whether it is sent once more.
    ///
    /// # Errors
    /// What the controller said, or that there is none.
    pub(crate) async fn at_controller<'a, T, C>(&self, again: Again, call: C) -> Result<T, Error>
    where
        C: Fn(BrokerId) -> BoxFuture<'a, Result<T, Error>>,
    {
        let began = Instant::now();
        let mut hint = None;
        // Who leads as far as is known here may be long dead, where nobody tells this broker of another one.
        let mut failed = None;
        loop {
            let known = self.controller().filter(|controller| failed.take() != Some(*controller));
            let error = match hint.take().or(known).or_else(|| self.anybody()) {
                Some(controller) => match call(controller).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => {
                        failed = Some(controller);
                        hint = error.leader_hint.as_ref().map(|(broker, _)| *broker).filter(|hint| *hint != controller);
                        error
                    }
                },
                None => self.not_controller(),
            };
            // Nothing was done where nobody was the controller.
            let is_elsewhere =
                matches!(error.code, ErrorCode::NotLeader | ErrorCode::NoLeader | ErrorCode::LeaderNotReady)
                    || (error.code == ErrorCode::TimedOut && again == Again::Harmless);
            if !is_elsewhere || began.elapsed() > LOOK_FOR_CONTROLLER_MAX {
                return Err(error);
            }
            let metadata = self.metadata();
            let seen = metadata.status();
            drop(tokio::time::timeout(LOOK_EVERY, metadata.changed(&seen)).await);
        }
    }
}

/// Has the controller behind `metadata` decide, and waits until that is committed.
pub(crate) async fn command_to(metadata: &Replica, command: MetadataCommand) -> Result<MetadataReply, Error> {
    let (sender, receiver) = oneshot::channel();
    metadata.command(PartitionCommand::Metadata(command), Reply::from(sender));
    let answered = receiver.await.map_err(|_| shutting_down())?;
    match answered?? {
        PartitionReply::Metadata(reply) => Ok(reply),
        other => Err(Error::new(ErrorCode::Internal, format!("the metadata answered {other:?}"))),
    }
}

fn shutting_down() -> Error {
    Error::new(ErrorCode::ShuttingDown, "this broker is shutting down; try again when it is back")
}
