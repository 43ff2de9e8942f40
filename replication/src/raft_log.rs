//! The Raft crate's view of a replica's log: a partition's log *is* its group's Raft log.
//!
//! What goes to a follower is read with its bytes; committed entries are handed back hollow (index, term, type), because
//! the replica applies from its own log. Creation is index 1, term 1: a checkpoint that no log holds.

use std::cell::RefCell;

use flowstone_protocol::{ControlType, RaftIndex, ReplicaId, Term};
use flowstone_storage::{EntryBody, HardState, Log, LogEntry, ReadError};
use raft::eraftpb::{self, Entry, EntryType, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use crate::effects::{FetchContext, FetchOrder};
use crate::membership::{Membership, MembershipChange};

/// Hollow entries handed to the Raft crate at once; a longer replay comes in several rounds.
const HOLLOW_ENTRIES_MAX: u64 = 1_024;
/// Reads of the same entries for different followers side by side.
const SAME_READS_MAX: usize = 4;

/// A log with what the Raft crate asks for beside it.
#[derive(Debug)]
pub(crate) struct RaftLog {
    // The crate reads through `&self`, and a log keeps what it reads in a bounded cache. Borrowed for one call at a time:
    // no call of the crate's is made from within another.
    pub(crate) log: RefCell<Log>,
    // Why an entry could not be given: the crate, which takes no such answer, panics next.
    pub(crate) unreadable: RefCell<Option<flowstone_storage::StorageError>>,
    // An entry that is not known to be committed, damaged, and a follower needs it: perhaps nobody else has it.
    pub(crate) damaged_tail: RefCell<Option<flowstone_storage::StorageError>>,
    // As found when it was opened; the crate asks once.
    hard_state: HardState,
    membership: Membership,
    offer_after_bytes: u64,
    reads: RefCell<FollowerReads>,
}

/// What is read from the disk for followers, off this thread.
#[derive(Debug, Default)]
struct FollowerReads {
    /// To be handed out.
    orders: Vec<FetchOrder>,
    /// The first entries of what is being read.
    under_way: Vec<RaftIndex>,
    /// Read, for the call that is being made just now.
    fetched: Option<(RaftIndex, Vec<Entry>)>,
}

impl RaftLog {
    pub(crate) fn new(log: Log, hard_state: HardState, membership: Membership, offer_after_bytes: u64) -> Self {
        Self {
            log: RefCell::new(log),
            unreadable: RefCell::new(None),
            damaged_tail: RefCell::new(None),
            hard_state,
            membership,
            offer_after_bytes,
            reads: RefCell::default(),
        }
    }

    /// Gives back what only a busy group needs.
    pub(crate) fn shed(&self) {
        let mut reads = self.reads.borrow_mut();
        reads.orders.shrink_to_fit();
        reads.under_way.shrink_to_fit();
    }

    /// What is to be read for followers.
    pub(crate) fn fetches(&self) -> Vec<FetchOrder> {
        std::mem::take(&mut self.reads.borrow_mut().orders)
    }

    /// Keeps what was read for the call that follows; whether there is anything.
    pub(crate) fn take_fetched(&self, first: RaftIndex, entries: Result<Vec<LogEntry>, ReadError>) -> bool {
        let mut reads = self.reads.borrow_mut();
        if let Some(at) = reads.under_way.iter().position(|&other| other == first) {
            reads.under_way.swap_remove(at);
        }
        match entries {
            Ok(entries) => {
                reads.fetched = Some((first, entries.into_iter().map(to_raft).collect()));
                true
            }
            Err(error) => {
                tracing::warn!(%first, %error, "cannot read entries for a follower");
                false
            }
        }
    }

    /// What nobody asked for is not needed.
    pub(crate) fn drop_fetched(&self) {
        self.reads.borrow_mut().fetched = None;
    }

    /// Whether a follower that needs `low` next is better off with pulling what is committed.
    fn is_far_behind(&self, low: u64) -> bool {
        let mut log = self.log.borrow_mut();
        let checkpoint = log.checkpoint().applied;
        let low = RaftIndex::new(low);
        low <= checkpoint && log.bytes_between(low, checkpoint) > self.offer_after_bytes
    }

    /// Entries for a follower: from memory what is not committed, else from what was read for it.
    fn for_follower(
        &self,
        low: u64,
        high: u64,
        bytes_max: u64,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if self.is_far_behind(low) {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        let first = RaftIndex::new(low);
        let mut entries = Vec::new();
        if first <= self.log.borrow().committed_index() {
            let mut reads = self.reads.borrow_mut();
            match reads.fetched.take() {
                Some((at, fetched)) if at == first => entries = fetched,
                _ => {
                    // A few followers may need the same at once; more ask again with their next answer.
                    if reads.under_way.iter().filter(|&&other| other == first).count() < SAME_READS_MAX {
                        reads.under_way.push(first);
                        reads.orders.push(FetchOrder {
                            first,
                            last: RaftIndex::new(high - 1),
                            max_bytes: u32::try_from(bytes_max).unwrap_or(u32::MAX),
                            context: FetchContext(context),
                        });
                    }
                    return Err(raft::Error::Store(StorageError::LogTemporarilyUnavailable));
                }
            }
            entries.truncate(usize::try_from(high - low).unwrap_or(usize::MAX));
            return Ok(entries);
        }
        let mut bytes = 0;
        for index in low..high {
            let entry = match self.log.borrow_mut().entry(RaftIndex::new(index)) {
                Ok(entry) => to_raft(entry),
                // Asked for again with the follower's next answer; it stays behind for as long as it can not be read.
                Err(error) if entries.is_empty() => {
                    tracing::warn!(index, %error, "cannot read an entry for a follower");
                    if matches!(error, flowstone_storage::StorageError::Corrupt { .. }) {
                        *self.damaged_tail.borrow_mut() = Some(error);
                    }
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
            // Whoever names a limit takes what comes and asks again. Whoever does not counts what is in all of them.
            let limit = max_size.into().map_or(u64::MAX, |_| HOLLOW_ENTRIES_MAX);
            let high = high.min(low.saturating_add(limit));
            return (low..high).map(|index| self.hollow(index)).collect();
        }
        self.for_follower(low, high, max_size.into().unwrap_or(u64::MAX), context)
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

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        // Only an offer comes of it: the newest checkpoint, and whoever takes it pulls what it needs.
        let log = self.log.borrow();
        let checkpoint = log.checkpoint();
        let (index, members) = (checkpoint.applied, Membership::decode(&checkpoint.membership));
        let (Some(term), Ok(members)) = (log.term_at(index), members) else {
            return Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        };
        if index.get() < request_index {
            return Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        metadata.index = index.get();
        metadata.term = term.get();
        metadata.set_conf_state(members.to_raft());
        Ok(snapshot)
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
