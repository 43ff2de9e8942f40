//! The one coordinator shell: a pure state machine behind an internal topic's partition.
//!
//! A command becomes records and a parked reply; the records are appended to the machine's own log; the leader applies
//! them at once, so that the next command sees them; the reply leaves when everything before it is committed.
//!
//! ```text
//!   command --decide--> records --append--> live state (leader only, ahead)
//!                          |
//!                       commit ----------> committed state (every replica, published to readers)
//! ```
//!
//! Two states rather than one: readers never see what may still be lost, a checkpoint is always of committed state, and
//! a leader that steps down just drops `live`.

use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::{
    BatchHeader, Compression, Error, ErrorCode, Offset, Record, RecordBatchBuilder, Term, Timestamp, record,
};
use flowstone_replication::{Admission, Commanded, MachineBody, MachineEntry};
use parking_lot::RwLock;
use prost::Message;
use tokio::sync::watch;

/// Most bytes that one batch of a coordinator's records may decompress to. They are written uncompressed; this bounds
/// what a damaged log can cost.
const BATCH_BYTES_MAX: usize = 64 << 20;

/// The largest change that one command may make, as the bytes of its batch. Far below what any broker takes of another in
/// one message: a batch above that would be in the leader's log, and never on any other's.
const COMMAND_BYTES_MAX: usize = 16 << 20;
/// A machine whose change may grow without bound makes it in pieces of about so many bytes, one command each.
pub(crate) const PIECE_BYTES: usize = 4 << 20;

const _: () = assert!(PIECE_BYTES <= COMMAND_BYTES_MAX / 2 && COMMAND_BYTES_MAX <= BATCH_BYTES_MAX / 2);

/// What a coordinator appends: one record of its log. One with a key is the newest word about that key, and without a value
/// it removes the key, so that the topic can be compacted.
pub(crate) trait LoggedRecord: Sized {
    /// Its key and value.
    fn to_log(&self) -> (Option<Bytes>, Option<Bytes>);

    /// What was written so.
    ///
    /// # Errors
    /// What is malformed.
    fn from_log(key: Option<Bytes>, value: Option<Bytes>) -> Result<Self, prost::DecodeError>;
}

/// A message without a key: its topic is never compacted.
impl<M: Message + Default> LoggedRecord for M {
    fn to_log(&self) -> (Option<Bytes>, Option<Bytes>) {
        (None, Some(self.encode_to_vec().into()))
    }

    fn from_log(_key: Option<Bytes>, value: Option<Bytes>) -> Result<Self, prost::DecodeError> {
        M::decode(value.unwrap_or_default())
    }
}

/// A coordinator's pure core. Equal records lead to equal states.
pub(crate) trait StateMachine: Clone + Debug + Send + Sync + 'static {
    /// What a caller asks for.
    type Command: Debug + Send + 'static;
    /// What it is answered.
    type Reply: Debug + Send + 'static;
    /// What is appended.
    type Record: LoggedRecord;

    /// What follows from a command in this state: records to append (none where nothing changes) and the answer for
    /// when they are committed. Whatever depends on the clock or on chance is in the command or in `now`.
    fn decide(&self, command: Self::Command, now: Timestamp) -> (Vec<Self::Record>, Result<Self::Reply, Error>);

    /// Takes one record in.
    ///
    /// # Errors
    /// When the record cannot follow this state, or a newer release wrote it: the machine refuses to go on.
    fn apply(&mut self, record: Self::Record, at: Offset) -> Result<(), Error>;

    /// Offset of the last record taken in, -1 for none.
    fn applied(&self) -> Offset;

    /// Number of the last recovery with a possible loss that this state has seen; 0 for none. A state of a later one goes
    /// before a state of an earlier one, even where that had seen more records: these were given up.
    fn recovery(&self) -> i64 {
        0
    }

    /// The whole state.
    fn checkpoint(&self) -> Bytes;

    /// Becomes the state that was checkpointed; from nothing when `bytes` is empty.
    ///
    /// # Errors
    /// When the bytes are no checkpoint.
    fn restore(&mut self, bytes: &[u8]) -> Result<(), Error>;
}

/// The committed state as everyone else sees it.
#[derive(Debug)]
pub(crate) struct Published<S> {
    /// Written by the shard's thread alone, for the time of one record; readers copy out what they need and never await
    /// while they hold it.
    state: Arc<RwLock<S>>,
    /// Offset after the last committed record taken in.
    version: Arc<watch::Sender<Offset>>,
    /// Why it goes no further.
    broken: Arc<watch::Sender<Option<Error>>>,
}

impl<S> Clone for Published<S> {
    fn clone(&self) -> Self {
        Self { state: Arc::clone(&self.state), version: Arc::clone(&self.version), broken: Arc::clone(&self.broken) }
    }
}

impl<S> Published<S> {
    fn new(state: S) -> Self {
        Self {
            state: Arc::new(RwLock::new(state)),
            version: Arc::new(watch::Sender::new(Offset::ZERO)),
            broken: Arc::new(watch::Sender::new(None)),
        }
    }

    /// Reads under the lock; `read` must be short.
    pub(crate) fn with<R>(&self, read: impl FnOnce(&S) -> R) -> R {
        read(&self.state.read())
    }

    /// Waits until a record cannot be taken in, and says why; pends while all can.
    pub(crate) async fn broken(&self) -> Error {
        let mut broken = self.broken.subscribe();
        loop {
            if let Some(error) = broken.borrow_and_update().clone() {
                return error;
            }
            if broken.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Told of every commit.
    pub(crate) fn changes(&self) -> watch::Receiver<Offset> {
        self.version.subscribe()
    }
}

/// The shell around one state machine; a replica's machine.
#[derive(Debug)]
pub(crate) struct Coordinator<S: StateMachine> {
    committed: Published<S>,
    /// Committed state and what is in flight; on the leader only.
    live: Option<S>,
    /// After the replica was opened anew: the committed state as far as it was replayed, until it has caught up with what
    /// was published before, or has seen a recovery that this had not. Readers never see it go back but for that.
    replayed: Option<S>,
    /// Why this machine goes no further: a record that it could not take in. Nothing is answered any more.
    broken: Option<Error>,
}

impl<S: StateMachine> Coordinator<S> {
    /// A machine that has seen nothing, and the view on what it commits.
    pub(crate) fn new(empty: S) -> (Self, Published<S>) {
        let committed = Published::new(empty);
        (Self { committed: committed.clone(), live: None, replayed: None, broken: None }, committed)
    }

    /// A machine of another replica of the same log, that commits into the same view: nothing that was published is taken
    /// back.
    pub(crate) fn behind(view: &Published<S>) -> Self {
        Self { committed: view.clone(), live: None, replayed: None, broken: None }
    }

    /// Only the coordinator writes to its own log.
    pub(crate) fn admit(&self, _batch: &BatchHeader) -> Admission {
        Admission::Refuse(Error::new(
            ErrorCode::InternalTopic,
            "this topic is the cluster's own and is never written by clients; topics of yours do not begin with `__`",
        ))
    }

    pub(crate) fn appended(&mut self, entry: &MachineEntry<'_>) {
        if let (Some(live), None) = (&mut self.live, &self.broken)
            && let Err(error) = apply_entry(live, entry)
        {
            // This leader wrote the record itself a moment ago: what it decides and what it applies differ.
            unreachable!("a coordinator cannot take in its own record at offset {}: {error}", entry.base_offset);
        }
    }

    pub(crate) fn committed(&mut self, entry: &MachineEntry<'_>) {
        if self.broken.is_none() {
            let applied = match &mut self.replayed {
                Some(replayed) => apply_entry(replayed, entry),
                None => apply_entry(&mut *self.committed.state.write(), entry),
            };
            if let Err(error) = applied {
                tracing::error!(offset = entry.base_offset.get(), %error, "a committed record cannot be taken in");
                self.committed.broken.send_replace(Some(error.clone()));
                self.broken = Some(error);
            }
        }
        let published = self.committed.with(reach);
        if self.replayed.as_ref().is_some_and(|replayed| reach(replayed) >= published) {
            self.publish();
        }
        if self.replayed.is_none() {
            self.committed.version.send_replace(entry.header.next_offset().max(entry.base_offset));
        }
    }

    /// What was replayed is what readers see from now on.
    fn publish(&mut self) {
        let Some(replayed) = self.replayed.take() else { return };
        let (recovery, end) = (replayed.recovery(), replayed.applied().next());
        let before = {
            let mut state = self.committed.state.write();
            std::mem::replace(&mut *state, replayed).recovery()
        };
        // What waits for an offset of a history that was given up waits for it anew.
        self.committed
            .version
            .send_modify(|version| *version = if recovery == before { end.max(*version) } else { end });
    }

    pub(crate) fn command(&mut self, command: S::Command, now: Timestamp) -> Commanded<Result<S::Reply, Error>> {
        if let Some(error) = &self.broken {
            return Commanded { batch: None, reply: Err(error.clone()) };
        }
        let Some(live) = &self.live else {
            let reply = Err(Error::new(ErrorCode::LeaderNotReady, "this coordinator does not lead yet; try again"));
            return Commanded { batch: None, reply };
        };
        let (records, reply) = live.decide(command, now);
        if records.is_empty() || reply.is_err() {
            return Commanded { batch: None, reply };
        }
        // Nothing is applied before it is appended: to refuse it here changes nothing.
        match to_batch(&records, now) {
            Ok(batch) => Commanded { batch: Some(batch), reply },
            Err(error) => Commanded { batch: None, reply: Err(error) },
        }
    }

    pub(crate) fn lead(&mut self, _term: Term) {
        // Everything before this term is committed and applied.
        self.publish();
        self.live = Some(self.committed.with(S::clone));
    }

    pub(crate) fn step_down(&mut self) {
        self.live = None;
    }

    /// The state with what is in flight, on a leader.
    pub(crate) fn live_checkpoint(&self) -> Option<Bytes> {
        self.live.as_ref().map(S::checkpoint)
    }

    pub(crate) fn checkpoint(&self) -> Bytes {
        match &self.replayed {
            Some(replayed) => replayed.checkpoint(),
            None => self.committed.with(S::checkpoint),
        }
    }

    pub(crate) fn restore(&mut self, checkpoint: &[u8]) -> Result<(), Error> {
        self.live = None;
        self.broken = None;
        let mut restored = self.committed.with(S::clone);
        restored.restore(checkpoint)?;
        let behind = reach(&restored) < self.committed.with(reach);
        self.replayed = Some(restored);
        if !behind {
            self.publish();
        }
        Ok(())
    }
}

/// # Errors
/// `INVALID_REQUEST` where they are more than one command may change.
fn to_batch<R: LoggedRecord>(records: &[R], now: Timestamp) -> Result<Bytes, Error> {
    let too_large = |how: String| {
        let what = format!("the change is too large for one step, {how}; ask for less at a time");
        Error::new(ErrorCode::InvalidRequest, what)
    };
    let mut batch = RecordBatchBuilder::new(Compression::None);
    let mut bytes = 0;
    for record in records {
        let (key, value) = record.to_log();
        bytes += key.as_ref().map_or(0, Bytes::len) + value.as_ref().map_or(0, Bytes::len);
        if bytes > COMMAND_BYTES_MAX {
            return Err(too_large(format!("above {COMMAND_BYTES_MAX} bytes")));
        }
        batch.append(now, key.as_deref(), value.as_deref(), []).map_err(|error| too_large(error.to_string()))?;
    }
    Ok(batch.build())
}

/// How far a state has come: what is further goes before what is less.
fn reach<S: StateMachine>(state: &S) -> (i64, Offset) {
    (state.recovery(), state.applied())
}

fn apply_entry<S: StateMachine>(state: &mut S, entry: &MachineEntry<'_>) -> Result<(), Error> {
    match entry.body {
        MachineBody::Records(batch) => {
            // The bytes may not be stamped yet; and where the log was compacted, offsets have gaps.
            let unstamped = BatchHeader::parse(batch)?.base_offset.get();
            for record in record::records(batch.clone(), BATCH_BYTES_MAX)? {
                let Record { offset, key, value, .. } = record?;
                let at = entry.base_offset.plus(offset.get() - unstamped);
                let record = S::Record::from_log(key, value).map_err(|error| {
                    Error::new(ErrorCode::CorruptLog, format!("the record at offset {at} is malformed: {error}"))
                })?;
                state.apply(record, at)?;
            }
            Ok(())
        }
        // The log's own entries say nothing to a coordinator.
        MachineBody::Control { .. } => Ok(()),
        MachineBody::Header => unreachable!("a coordinator reads records, and was handed a header alone"),
    }
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::RaftIndex;
    use flowstone_protocol::internal::PartitionLeadership;

    use super::*;

    /// Keeps the last value; a record with an epoch is a recovery of that number.
    #[derive(Clone, Debug, Default)]
    struct Last {
        value: i32,
        applied: i64,
        recovery: i64,
    }

    impl StateMachine for Last {
        type Command = ();
        type Reply = ();
        type Record = PartitionLeadership;

        fn decide(&self, (): (), _now: Timestamp) -> (Vec<PartitionLeadership>, Result<(), Error>) {
            (Vec::new(), Ok(()))
        }

        fn apply(&mut self, record: PartitionLeadership, at: Offset) -> Result<(), Error> {
            (self.value, self.applied) = (record.broker_id, at.get());
            self.recovery = self.recovery.max(record.leader_epoch.into());
            Ok(())
        }

        fn applied(&self) -> Offset {
            Offset::new(self.applied)
        }

        fn recovery(&self) -> i64 {
            self.recovery
        }

        fn checkpoint(&self) -> Bytes {
            [self.value.into(), self.applied, self.recovery].iter().flat_map(|field| field.to_be_bytes()).collect()
        }

        fn restore(&mut self, bytes: &[u8]) -> Result<(), Error> {
            let field = |number: usize| {
                let bytes = bytes.get(number * 8..number * 8 + 8).and_then(|bytes| bytes.try_into().ok());
                bytes.map_or(0, i64::from_be_bytes)
            };
            *self = Self { value: field(0) as i32, applied: field(1), recovery: field(2) };
            Ok(())
        }
    }

    fn commit(coordinator: &mut Coordinator<Last>, at: i64, broker_id: i32, leader_epoch: i32) {
        let mut batch = RecordBatchBuilder::new(Compression::None);
        let record = PartitionLeadership { broker_id, leader_epoch };
        batch.append(Timestamp::new(1), None, Some(&record.encode_to_vec()), []).expect("fits");
        let bytes = batch.build();
        let header = BatchHeader { base_offset: Offset::new(at), ..BatchHeader::parse(&bytes).expect("built here") };
        coordinator.committed(&MachineEntry {
            index: RaftIndex::new(at as u64 + 2),
            term: Term::new(1),
            base_offset: Offset::new(at),
            header: &header,
            body: MachineBody::Records(&bytes),
        });
    }

    fn seen(view: &Published<Last>) -> (i32, i64, i64) {
        let end = view.changes().borrow().get();
        view.with(|state| (state.value, state.recovery, end))
    }

    #[test]
    fn readers_never_see_a_replay_go_back() {
        let (mut first, view) = Coordinator::new(Last::default());
        for at in 0..6 {
            commit(&mut first, at, at as i32, 0);
        }
        let mut again = Coordinator::behind(&view);
        again.restore(&[]).expect("from nothing");
        for at in 0..6 {
            commit(&mut again, at, at as i32, 0);
            assert_eq!(seen(&view), (5, 0, 6), "at {at}");
        }
        commit(&mut again, 6, 60, 0);
        assert_eq!(seen(&view), (60, 0, 7));
    }

    #[test]
    fn a_recovery_replaces_a_longer_history_at_once() {
        let (mut first, view) = Coordinator::new(Last::default());
        for at in 0..6 {
            commit(&mut first, at, at as i32, 0);
        }
        // The survivor had three of the six; the fourth is its recovery.
        let mut again = Coordinator::behind(&view);
        again.restore(&[]).expect("from nothing");
        for at in 0..3 {
            commit(&mut again, at, at as i32, 0);
        }
        assert_eq!(seen(&view), (5, 0, 6));
        commit(&mut again, 3, 30, 9);
        assert_eq!(seen(&view), (30, 9, 4), "who waits for an offset waits for one of this history");
        // In one piece as well, and never back to what was given up.
        let (mut longer, view) = Coordinator::new(Last::default());
        for at in 0..6 {
            commit(&mut longer, at, at as i32, 0);
        }
        let mut installed = Coordinator::behind(&view);
        installed.restore(&again.checkpoint()).expect("its own");
        assert_eq!(seen(&view), (30, 9, 4));
        let mut stale = Coordinator::behind(&view);
        stale.restore(&[]).expect("from nothing");
        for at in 0..9 {
            commit(&mut stale, at, at as i32, 0);
        }
        assert_eq!(seen(&view), (30, 9, 4));
    }

    /// Writes as many bytes as it is told to.
    #[derive(Clone, Debug, Default)]
    struct Large(i64);

    struct OfBytes(Bytes);

    impl LoggedRecord for OfBytes {
        fn to_log(&self) -> (Option<Bytes>, Option<Bytes>) {
            (Some(Bytes::from_static(b"key")), Some(self.0.clone()))
        }

        fn from_log(_key: Option<Bytes>, value: Option<Bytes>) -> Result<Self, prost::DecodeError> {
            Ok(Self(value.unwrap_or_default()))
        }
    }

    impl StateMachine for Large {
        type Command = usize;
        type Reply = ();
        type Record = OfBytes;

        fn decide(&self, bytes: usize, _now: Timestamp) -> (Vec<OfBytes>, Result<(), Error>) {
            let pieces = bytes.div_ceil(1 << 20);
            ((0..pieces).map(|_| OfBytes(vec![0; bytes / pieces].into())).collect(), Ok(()))
        }

        fn apply(&mut self, _record: OfBytes, at: Offset) -> Result<(), Error> {
            self.0 = at.get();
            Ok(())
        }

        fn applied(&self) -> Offset {
            Offset::new(self.0)
        }

        fn checkpoint(&self) -> Bytes {
            Bytes::new()
        }

        fn restore(&mut self, _bytes: &[u8]) -> Result<(), Error> {
            Ok(())
        }
    }

    #[test]
    fn a_change_that_no_replica_would_be_sent_is_refused_before_it_is_appended() {
        let (mut coordinator, _) = Coordinator::new(Large::default());
        coordinator.lead(Term::new(1));
        for (bytes, is_taken) in [(1 << 10, true), (15 << 20, true), (17 << 20, false), (70 << 20, false), (9, true)] {
            let Commanded { batch, reply } = coordinator.command(bytes, Timestamp::new(1));
            assert_eq!(batch.is_some(), is_taken, "{bytes}");
            assert_eq!(reply.map_err(|error| error.code).err(), (!is_taken).then_some(ErrorCode::InvalidRequest));
            assert!(batch.is_none_or(|batch| batch.len() <= COMMAND_BYTES_MAX + (1 << 20)));
        }
    }
}
