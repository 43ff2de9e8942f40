//! The Raft crate's view of a replica's log: a partition's log *is* its group's Raft log.
//!
//! What goes to a follower is read with its bytes; committed entries are handed back hollow (index, term, type), because
//! the replica applies from its own log. Creation is index 1, term 1: a checkpoint that no log holds.

use std::cell::RefCell;

use flowstone_protocol::{ControlType, RaftIndex, ReplicaId, Term};
use flowstone_storage::{EntryBody, HardState, Log, LogEntry};
use raft::eraftpb::{self, Entry, EntryType, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use crate::membership::{Membership, MembershipChange};

/// Hollow entries handed to the Raft crate at once; a longer replay comes in several rounds.
const HOLLOW_ENTRIES_MAX: u64 = 1_024;

/// A log with what the Raft crate asks for beside it.
#[derive(Debug)]
pub(crate) struct RaftLog {
    // The crate reads through `&self`, and a log keeps what it reads in a bounded cache. Borrowed for one call at a time:
    // no call of the crate's is made from within another.
    pub(crate) log: RefCell<Log>,
    // Why an entry could not be given: the crate, which takes no such answer, panics next.
    pub(crate) unreadable: RefCell<Option<flowstone_storage::StorageError>>,
    // As found when it was opened; the crate asks once.
    hard_state: HardState,
    membership: Membership,
}

impl RaftLog {
    pub(crate) fn new(log: Log, hard_state: HardState, membership: Membership) -> Self {
        Self { log: RefCell::new(log), unreadable: RefCell::new(None), hard_state, membership }
    }

    fn hollow(&self, index: u64) -> raft::Result<Entry> {
        let meta = self.log.borrow_mut().entry_meta(RaftIndex::new(index)).map_err(|error| {
            let told = raft::Error::Store(StorageError::Other(error.to_string().into()));
            *self.unreadable.borrow_mut() = Some(error);
            told
        })?;
        let mut entry = Entry { index, term: meta.term.get(), ..Entry::default() };
        // The crate counts changes of membership among them, nothing else.
        if meta.control == Some(ControlType::Membership) {
            entry.set_entry_type(EntryType::EntryConfChangeV2);
        }
        Ok(entry)
    }
}

impl Storage for RaftLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        // Commit = the checkpoint: the leader says how far it really is.
        let mut hard_state = eraftpb::HardState::default();
        hard_state.term = self.hard_state.term.get();
        hard_state.vote = self.hard_state.vote.map_or(raft::INVALID_ID, ReplicaId::get);
        hard_state.commit = self.log.borrow().checkpoint().applied.get();
        Ok(RaftState::new(hard_state, self.membership.to_raft()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low < self.log.borrow().first_index().get() {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        // Only what is to be sent may be late, and only that needs its bytes.
        if !context.can_async() {
            let high = high.min(low + HOLLOW_ENTRIES_MAX);
            return (low..high).map(|index| self.hollow(index)).collect();
        }
        let bytes_max = max_size.into().unwrap_or(u64::MAX);
        let mut bytes = 0;
        let mut entries = Vec::new();
        for index in low..high {
            let entry = match self.log.borrow_mut().entry(RaftIndex::new(index)) {
                Ok(entry) => to_raft(entry),
                // Asked for again with the follower's next answer; it stays behind for as long as it can not be read.
                Err(error) if entries.is_empty() => {
                    tracing::warn!(index, %error, "cannot read an entry for a follower");
                    return Err(raft::Error::Store(StorageError::LogTemporarilyUnavailable));
                }
                Err(_) => break,
            };
            bytes += entry.data.len() as u64;
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        let log = self.log.borrow();
        match log.term_at(RaftIndex::new(index)) {
            Some(term) => Ok(term.get()),
            None if index < log.first_index().get() => Err(raft::Error::Store(StorageError::Compacted)),
            None => Err(raft::Error::Store(StorageError::Unavailable)),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.log.borrow().first_index().get())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.log.borrow().last_index().get())
    }

    fn snapshot(&self, _request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        // Nobody to send one to before there are peers.
        Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}

/// An entry as the log stores it. `None` for a form that no leader of ours makes.
///
/// | Raft entry | ours |
/// |---|---|
/// | normal, no data, no context | control batch `NoOp` |
/// | normal, data, no context | a record batch |
/// | normal, context = the control type | a control batch, data = its payload |
/// | change of membership, context = our bytes | control batch `Membership`, payload = our bytes |
pub(crate) fn from_raft(entry: Entry) -> Option<LogEntry> {
    let body = match (entry.get_entry_type(), entry.context.is_empty()) {
        (EntryType::EntryNormal, true) if entry.data.is_empty() => {
            EntryBody::Control { ctype: ControlType::NoOp, payload: entry.data }
        }
        (EntryType::EntryNormal, true) => EntryBody::Batch(entry.data),
        (EntryType::EntryNormal, false) => {
            let ctype = i16::from_be_bytes(entry.context[..].try_into().ok()?);
            EntryBody::Control { ctype: ControlType::from_id(ctype)?, payload: entry.data }
        }
        (EntryType::EntryConfChangeV2, false) => {
            EntryBody::Control { ctype: ControlType::Membership, payload: entry.context }
        }
        (EntryType::EntryConfChangeV2, true) | (EntryType::EntryConfChange, _) => return None,
    };
    Some(LogEntry { index: RaftIndex::new(entry.index), term: Term::new(entry.term), body })
}

/// The inverse of [`from_raft`]: bytes that the Raft crate decodes are made here, from our own.
pub(crate) fn to_raft(entry: LogEntry) -> Entry {
    let mut raft_entry = body_to_raft(entry.body);
    raft_entry.index = entry.index.get();
    raft_entry.term = entry.term.get();
    raft_entry
}

pub(crate) fn body_to_raft(body: EntryBody) -> Entry {
    let mut entry = Entry::default();
    match body {
        EntryBody::Batch(batch) => entry.data = batch,
        EntryBody::Control { ctype: ControlType::NoOp, .. } => {}
        EntryBody::Control { ctype: ControlType::Membership, payload } => {
            entry.set_entry_type(EntryType::EntryConfChangeV2);
            // What can not be understood changes nobody: the same nothing on every replica.
            if let Ok(change) = MembershipChange::decode(&payload) {
                entry.data = encode_change(change);
            }
            entry.context = payload;
        }
        EntryBody::Control { ctype, payload } => {
            entry.data = payload;
            entry.context = bytes::Bytes::copy_from_slice(&ctype.id().to_be_bytes());
        }
    }
    entry
}

fn encode_change(change: MembershipChange) -> bytes::Bytes {
    use protobuf::Message as _;
    // Writing to memory can not fail; an empty change is what the crate makes of no bytes.
    change.to_raft().write_to_bytes().unwrap_or_default().into()
}
