//! What leaves a broker during one round: kept until the round is over, and forgotten where the broker crashed in it.

use std::sync::{Arc, Mutex, PoisonError};

use flowstone_broker::simulation::{Answer as CoordinatorAnswer, Answered, MemberView};
use flowstone_protocol::{BrokerId, Error, Marker, Offset, TopicPartition};
use flowstone_replication::{
    GroupMessage, GroupStatus, PeerTransport, Produced, PullAnswer, PullRequest, ReadAnswer, ReplicaHandle, Reply,
};

use super::machine::SimMachine;

/// What a coordinator answers, where it was asked at all.
pub(crate) type Commanded = Result<Result<CoordinatorAnswer, Error>, Error>;

/// One thing that leaves.
pub(crate) enum Out {
    /// A replica was opened, or not.
    Opened { tp: TopicPartition, handle: Result<ReplicaHandle<SimMachine>, Error> },
    /// A replica was closed.
    Closed { tp: TopicPartition },
    /// To another broker.
    Sent { to: BrokerId, messages: Vec<GroupMessage> },
    /// A question for a range.
    Pull { from: BrokerId, request: PullRequest, reply: Reply<Result<PullAnswer, Error>> },
    /// The answer to such a question of another broker.
    Pulled { question: u64, answer: Result<PullAnswer, Error> },
    /// To a client.
    Answered { operation: u64, answer: Answer },
    /// The controller's answer to a command.
    Commanded { result: Commanded },
    /// To the broker that had an errand here.
    ErrandDone { to: usize, life: u64, number: u64, result: Result<(), Error> },
    /// A piece of the end of a transaction in a group coordinator is done, on such an errand.
    EndPending { to: usize, life: u64, number: u64, marker: Marker, result: Commanded },
    /// The coordinator has noted that a transaction has ended everywhere, or could not.
    Written { turn: u64, is_written: bool },
    /// A member's report was taken, or not.
    Reported { operation: u64, member: String, result: Commanded },
    /// A group coordinator is certain that it is one still.
    Confirmed { operation: u64, of: TopicPartition, result: Result<Offset, Error> },
    /// What a client asked of a coordinator is answered.
    Asked { operation: u64, result: Commanded },
    /// To the broker's own reconciler.
    Status { group: usize, status: Result<GroupStatus, Error> },
    /// To the same.
    Changed { group: usize, what: &'static str, result: Result<(), Error> },
}

/// To a client.
#[derive(Debug)]
pub(crate) enum Answer {
    Produced(Result<Produced, Error>),
    Read(Result<ReadAnswer, Error>),
    HighWatermark(Result<Offset, Error>),
    Trimmed(Result<Offset, Error>),
    /// Of a coordinator.
    Asked(Result<Answered, Error>),
    /// What a member owns; `None`: it is none.
    Member(Result<Option<MemberView>, Error>),
    /// What a group has committed, and whether nothing is pending.
    Offset(Result<(Option<Offset>, bool), Error>),
    /// Nobody took the question: nothing came of it.
    NotTaken,
    /// Nobody knows.
    Lost,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Outbox(Mutex<Vec<Out>>);

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").finish_non_exhaustive()
    }
}

impl Outbox {
    pub(crate) fn put(&self, out: Out) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(out);
    }

    pub(crate) fn take(&self) -> Vec<Out> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A reply whose answer ends up here.
    pub(crate) fn reply<T: 'static>(self: &Arc<Self>, out: impl FnOnce(T) -> Out + Send + 'static) -> Reply<T> {
        let outbox = Arc::clone(self);
        Reply::new(move |answer| outbox.put(out(answer)))
    }
}

/// The way to the other brokers: into the outbox.
#[derive(Debug)]
pub(crate) struct SimTransport(pub(crate) Arc<Outbox>);

impl PeerTransport for SimTransport {
    fn send(&self, to: BrokerId, messages: Vec<GroupMessage>) {
        self.0.put(Out::Sent { to, messages });
    }

    fn pull(&self, from: BrokerId, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        self.0.put(Out::Pull { from, request, reply });
    }
}
