//! The state machine behind a replica's log.

use std::fmt::Debug;

use bytes::Bytes;
use flowstone_protocol::{
    BatchHeader, ControlType, Error, ErrorCode, Marker, Offset, ProducerId, RaftIndex, Term, Timestamp,
};
use flowstone_storage::AbortedTransaction;

/// A deterministic state machine that is fed from one log.
///
/// It runs on its shard's thread and is pure: no files, no sockets, no clock but the `now` it is given. Its state is a
/// function of the entries it was given, so a restart (checkpoint, then replay) leads to the same state.
///
/// Two kinds exist. One that keeps an overlay for what is in flight, and applies at commit: the records of users with
/// their producers. And one that applies at append, so that two commands in flight see each other: the coordinators;
/// these say so by [`Machine::applies_at_append`], are never asked for a checkpoint while anything is in flight, and are
/// dropped and replayed when leadership ends.
pub trait Machine: Debug + Send + 'static {
    /// What a coordinator's caller asks for; an empty type where there are none.
    type Command: Debug + Send + 'static;
    /// What it is answered.
    type Reply: Debug + Send + 'static;

    /// Leader only: may this batch of a client be proposed? Reflects what is in flight; changes nothing by itself, as
    /// the batch may still be refused for another reason: [`Machine::appended`] follows if it was not.
    fn admit(&mut self, batch: &BatchHeader, now: Timestamp) -> Admission;

    /// Leader only: may this end of a transaction be proposed? [`Machine::appended`] follows if it is.
    fn admit_marker(&mut self, marker: &Marker, now: Timestamp) -> Admission {
        let _ = (marker, now);
        Admission::Refuse(Error::new(ErrorCode::InternalTopic, "no transaction writes into this log"))
    }

    /// Leader only: the payload of a [`ControlType::ProducerExpiry`], where the leader's clock says that producers have been
    /// idle for too long. Asked for now and then; nothing changes before that is committed.
    fn expired(&mut self, now: Timestamp) -> Option<Bytes> {
        let _ = now;
        None
    }

    /// Whether [`Machine::expired`] may ever say something.
    fn may_expire(&self) -> bool {
        false
    }

    /// Where the oldest open transaction begins; `high_watermark` where none is open. From what is committed alone.
    fn last_stable_offset(&self, high_watermark: Offset) -> Offset {
        high_watermark
    }

    /// Transactions that were aborted and have batches between two offsets: producer and first offset of each.
    fn aborted_between(&self, from: Offset, to: Offset) -> Vec<(ProducerId, Offset)> {
        let _ = (from, to);
        Vec::new()
    }

    /// All transactions that were aborted, as far as readers are told of them: their records need not be kept, their
    /// markers must be.
    fn aborted_transactions(&self) -> Vec<AbortedTransaction> {
        Vec::new()
    }

    /// Leader only: the entry was appended and is not committed yet. In log order, in the same step as its proposal.
    fn appended(&mut self, entry: &MachineEntry<'_>);

    /// Every replica: the entry is committed. In log order, each entry exactly once for a machine that was opened from a
    /// checkpoint.
    fn committed(&mut self, entry: &MachineEntry<'_>);

    /// Leader only: a coordinator's command. `now` is the leader's clock: what it decides must be in the records. Changes
    /// nothing by itself: [`Machine::appended`] follows with the records, before the next command, unless there is no
    /// room for them.
    fn command(&mut self, command: Self::Command, now: Timestamp) -> Commanded<Self::Reply>;

    /// Leadership of this term begins: everything before it is committed and applied.
    fn lead(&mut self, term: Term);

    /// Leadership ends: what was appended and not committed may never be. Drop overlays.
    fn step_down(&mut self);

    /// Whether entries handed over carry the batch's bytes (coordinators) or the header alone.
    fn reads_records(&self) -> bool;

    /// Whether [`Machine::appended`] changes the state itself, rather than an overlay beside it.
    fn applies_at_append(&self) -> bool {
        self.reads_records()
    }

    /// The committed state, in a form that [`Machine::restore`] understands in every later release.
    fn checkpoint(&self) -> Bytes;

    /// Becomes the machine that wrote `checkpoint`, whatever it was before; from nothing when it is empty.
    ///
    /// # Errors
    /// When the bytes are not those of a checkpoint: the replica is quarantined.
    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), Error>;
}

/// What [`Machine::admit`] says about a client's batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// It may be appended.
    Append,
    /// It is in the log already; the answer waits until `index` is committed.
    Duplicate {
        /// The offset of the original's first record.
        base_offset: Offset,
        /// The original's entry.
        index: RaftIndex,
        /// The original's latest timestamp, as it is in the log.
        timestamp: Timestamp,
    },
    /// It must not be appended.
    Refuse(Error),
}

/// What [`Machine::command`] decided.
#[derive(Debug)]
pub struct Commanded<R> {
    /// One record batch to append, if anything changes.
    pub batch: Option<Bytes>,
    /// The answer; it waits until all that was applied before it, and its own batch, is committed.
    pub reply: R,
}

/// One entry of the log, as a machine sees it.
#[derive(Debug, Clone, Copy)]
pub struct MachineEntry<'a> {
    /// Its Raft index.
    pub index: RaftIndex,
    /// Its term.
    pub term: Term,
    /// The offset of its first record.
    pub base_offset: Offset,
    /// The header of its batch, base offset and epoch as stamped.
    pub header: &'a BatchHeader,
    /// What is in it.
    pub body: MachineBody<'a>,
}

/// What an entry holds.
#[derive(Debug, Clone, Copy)]
pub enum MachineBody<'a> {
    /// Records; the machine asked for headers only.
    Header,
    /// Records, or a transaction's marker (which every machine is handed so): the whole batch. Only the base offset and the epoch inside may not be stamped yet.
    Records(&'a Bytes),
    /// A control batch.
    Control {
        /// Its type.
        ctype: ControlType,
        /// What follows the control record's fixed fields.
        payload: &'a Bytes,
    },
}
