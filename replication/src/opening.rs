//! Opening a replica from its files, closing its log, and the note that a broker runs here.
//!
//! ```text
//! folder            hard state | first voter       learner           recovered
//! none              none       | made              pulls everything  lost
//! none              known      | lost              lost              lost
//! its own           any        | recovered (above the flushed index written again), or lost by the log's own table
//! another replica's none       | quarantined       pulls everything  goes on under the new id, alone
//! ```
//! Lost is final for this id: where the group has others it is to be replaced, with one voter it is quarantined.

use std::path::Path;
use std::sync::Arc;

use flowstone_protocol::control::log_start_of;
use flowstone_protocol::{BatchHeader, ControlType, RaftIndex, ReplicaId, Term, Timestamp};
use flowstone_storage::checkpoint::{CREATION_INDEX, Checkpoint};
use flowstone_storage::recovery::Answered;
use flowstone_storage::{
    DataDir, Disk, EntryBody, HardState, Install, KeptLog, Log, OpenError, OpenMode, ReplicaIdentity, StorageError,
};

use crate::machine::{Machine, MachineBody, MachineEntry};
use crate::membership::Membership;
use crate::replica::{CannotOpen, Replica, ReplicaConfig};
use crate::request::{FlushMode, ReplicaSpec, Start};

/// Names the file that says that a broker is running here, and since which start of the machine.
const RUNNING_FILE: &str = "running";
/// Names the file in a replica's folder that says that it may answer for what is only in memory, and in which start of the
/// machine: it is there, durably, before that may be so, and goes once all is flushed and nothing is answered unflushed.
const RELAXED_FILE: &str = "relaxed";
/// A recovered log goes on with a term that its lost majority can not have reached: an election takes a second, and this is a
/// fortnight of them, without a single one that was heard of here. So what readers saw of that majority, and what is found of it
/// on a disk that comes back, is known to be of another history. There is room for some two thousand recoveries.
const RECOVERED_TERMS: u64 = 1 << 20;

/// How an opening ended.
#[derive(Debug)]
pub(crate) enum Opened<M: Machine> {
    Replica(Box<Replica<M>>),
    /// It has no log to begin with: all of it is to be pulled, or the rest.
    Pulls {
        machine: M,
        install: Option<Box<Install>>,
        /// What another replica left here.
        kept: Option<Box<KeptLog>>,
        /// Which one that is.
        replaces: Option<ReplicaId>,
    },
    /// The file system failed: tried again.
    Failed {
        machine: M,
        message: String,
    },
    /// Final.
    Quarantined {
        message: String,
    },
    /// Final for this id.
    Lost(Lost),
}

/// What is known of a replica that can not vote any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) message: String,
    pub(crate) lost_memory: bool,
    pub(crate) last_term: Term,
    pub(crate) last_index: RaftIndex,
}

/// Closes a log cleanly; says up to where it is flushed.
pub(crate) fn close_log(log: Log) -> Option<RaftIndex> {
    let tp = log.identity().topic_partition;
    match log.close() {
        Ok(flushed) => Some(flushed),
        Err(error) => {
            tracing::error!(%tp, %error, "cannot close a log cleanly: the next opening recovers it");
            None
        }
    }
}

/// What an opening needs.
pub(crate) struct OpenJob {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) spec: ReplicaSpec,
    pub(crate) hard_state: Option<HardState>,
    /// Of the replica whose log goes on under this one's id.
    pub(crate) hard_state_before: Option<HardState>,
    pub(crate) config: ReplicaConfig,
    pub(crate) feature_level: u32,
    /// What was only in memory at the end of the last run is gone.
    pub(crate) lost_memory: bool,
    /// This start of the machine.
    pub(crate) boot_id: String,
    /// Its log was copied from others a moment ago.
    pub(crate) is_new: bool,
    pub(crate) now: Timestamp,
}

/// Why it is not opened.
enum Unusable {
    /// Tried again.
    Io(String),
    Final(String),
    Lost(String),
}

impl From<OpenError> for Unusable {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Io { .. } => Self::Io(error.to_string()),
            OpenError::Quarantine { .. } => Self::Lost(error.to_string()),
            _ => Self::Final(error.to_string()),
        }
    }
}

impl From<StorageError> for Unusable {
    fn from(error: StorageError) -> Self {
        Self::Io(error.to_string())
    }
}

/// Where a replica stands before its log is opened.
enum Begun {
    Open {
        /// It was made just now: nothing of it was in another start's memory.
        is_new: bool,
    },
    Pull(Option<Box<Install>>),
}

impl OpenJob {
    pub(crate) fn run<M: Machine>(mut self, mut machine: M) -> Opened<M> {
        let begun = match self.begin(&mut machine) {
            Ok(Begun::Open { is_new }) => {
                self.is_new |= is_new;
                self.open_log()
            }
            Ok(Begun::Pull(install)) => {
                let Self { disk, spec, .. } = &self;
                let kept = KeptLog::find(disk, &spec.dir).unwrap_or_else(|error| {
                    tracing::warn!(tp = %spec.tp, %error, "cannot look for what an earlier replica left: all is copied from others");
                    None
                });
                let replaces = ReplicaIdentity::read(disk, &spec.dir).ok().map(|identity| identity.replica);
                let replaces = replaces.filter(|&replica| replica != spec.replica);
                return Opened::Pulls { machine, install, kept: kept.map(Box::new), replaces };
            }
            Err(unusable) => Err(unusable),
        };
        let log = match begun {
            Ok(log) => log,
            Err(unusable) => return self.unusable(unusable, machine),
        };
        if matches!(self.spec.start, Start::Recovered { .. }) && self.hard_state.is_none() {
            self.hard_state = Some(self.recovered_state(&log));
            self.is_new = true;
        }
        // What the topic's setting is now says nothing of what it was when the power failed.
        let mark = self.relaxed_in();
        if self.lost_memory && !self.is_new && matches!(mark, Relaxed::Before) {
            if self.has_peers(&log) {
                return Opened::Lost(Lost {
                    message: format!(
                        "it was run with flowstone.flush = relaxed when the machine was restarted without a clean stop: entries above {} may be gone that this replica answered for",
                        log.last_index()
                    ),
                    lost_memory: true,
                    last_term: log.last_term(),
                    last_index: log.last_index(),
                });
            }
            let end_offset = log.end_offset();
            tracing::warn!(tp = %self.spec.tp, %end_offset, "records above this offset may be lost: it was run with flowstone.flush = relaxed when the machine was restarted");
        }
        // All that was found is flushed by now.
        let (disk, dir) = (&self.disk, &self.spec.dir);
        let noted = match (self.spec.flush, mark) {
            (FlushMode::Relaxed, Relaxed::Now) | (FlushMode::Quorum, Relaxed::Never) => Ok(()),
            (FlushMode::Relaxed, _) => note_relaxed(disk, dir, &self.boot_id),
            (FlushMode::Quorum, _) => forget_relaxed(disk, dir),
        };
        if let Err(error) = noted {
            let message = format!("cannot note in {} whether it is flushed: {error}", dir.display());
            return Opened::Failed { machine, message };
        }
        match Replica::open(log, self.hard_state, machine, self.config) {
            Ok(replica) => Opened::Replica(Box::new(replica)),
            Err(CannotOpen(message)) => Opened::Quarantined { message },
        }
    }

    fn unusable<M: Machine>(&self, unusable: Unusable, machine: M) -> Opened<M> {
        match unusable {
            Unusable::Io(message) => Opened::Failed { machine, message },
            Unusable::Lost(message) if self.spec.has_peers() => Opened::Lost(Lost {
                message,
                lost_memory: false,
                last_term: Term::new(0),
                last_index: RaftIndex::new(0),
            }),
            Unusable::Final(message) | Unusable::Lost(message) => Opened::Quarantined { message },
        }
    }

    /// Makes sure that there is a log to open, or says that one is to be pulled.
    fn begin<M: Machine>(&mut self, machine: &mut M) -> Result<Begun, Unusable> {
        let Self { disk, spec, .. } = &*self;
        if self.hard_state.is_some_and(|state| state.is_lost()) {
            return Err(Unusable::Lost(format!(
                "the file of hard states that replica {} was in could not be read: what it voted for is forgotten; where no other replica can take its place, recover the partition explicitly: flowstone partition recover",
                spec.replica
            )));
        }
        // One that is whole takes the replica's place now; one that is not goes on.
        match Install::resume(disk, &spec.dir, spec.log.clone())? {
            // Begun in place of a log that reaches further: whether it covers what the replica answers for is not known
            // any more. The log is there still, and will be offered the same.
            Some(install)
                if install.identity().replica == spec.replica
                    && self.hard_state.is_some_and(|state| state.flushed > install.target().applied) =>
            {
                drop(install);
                Install::abandon(disk, &spec.dir)?;
            }
            Some(install) if install.identity().replica == spec.replica => {
                return Ok(Begun::Pull(Some(Box::new(install))));
            }
            Some(_) => Install::abandon(disk, &spec.dir)?,
            None => {}
        }
        let exists = Log::exists(disk, &spec.dir)
            .map_err(|error| Unusable::Io(format!("cannot look into {}: {error}", spec.dir.display())))?;
        let holds = match exists.then(|| ReplicaIdentity::read(disk, &spec.dir)) {
            None => None,
            // Whose it was can not be told. A replica that has said nothing yet takes its place: it is copied from others.
            Some(Err(error @ OpenError::Quarantine { .. }))
                if self.hard_state.is_none() && spec.start == Start::Learner =>
            {
                tracing::warn!(tp = %spec.tp, %error, "a new replica takes the place of one that can not be told by its folder");
                None
            }
            Some(identity) => Some(identity?.replica),
        };
        match (holds, &spec.start) {
            (Some(holds), _) if holds == spec.replica => Ok(Begun::Open { is_new: false }),
            // It voted, or it wrote: what it answered for is gone, and a new one must not take its name.
            _ if self.hard_state.is_some() => Err(Unusable::Lost(missing(spec))),
            (_, Start::Learner) => Ok(Begun::Pull(None)),
            (Some(holds), Start::Recovered { from }) if holds == *from => {
                self.recover(machine)?;
                Ok(Begun::Open { is_new: true })
            }
            (Some(holds), _) => Err(Unusable::Final(format!(
                "the folder {} belongs to replica {holds} of {}, not to replica {}",
                spec.dir.display(),
                spec.tp,
                spec.replica
            ))),
            (None, Start::Recovered { .. }) => Err(Unusable::Lost(missing(spec))),
            (None, Start::FirstVoter { voters }) if !voters.contains(&spec.replica) => Err(Unusable::Final(format!(
                "replica {} of {} is none of those that its group begins with",
                spec.replica, spec.tp
            ))),
            (None, Start::FirstVoter { voters }) => {
                let membership = Membership { voters: voters.to_vec(), learners: Vec::new() };
                Log::create(disk, &spec.dir, self.identity(), membership.encode())?;
                Ok(Begun::Open { is_new: true })
            }
        }
    }

    fn identity(&self) -> ReplicaIdentity {
        let (replica, topic_partition) = (self.spec.replica, self.spec.tp);
        ReplicaIdentity { replica, topic_partition, feature_level: self.feature_level }
    }

    fn open_log(&self) -> Result<Log, Unusable> {
        let answered = Answered {
            flushed: self.hard_state.map_or(CREATION_INDEX, |state| state.flushed),
            written: self.relaxed_in() == Relaxed::Now,
        };
        Ok(Log::open(Arc::clone(&self.disk), &self.spec.dir, self.spec.log.clone(), answered, self.now)?)
    }

    fn has_peers(&self, log: &Log) -> bool {
        let alone = Membership::decode(&log.checkpoint().membership)
            .is_ok_and(|membership| membership.is_alone(self.spec.replica));
        self.spec.has_peers() || !alone
    }

    /// Lets a survivor's log go on under this replica's id, as the only voter of its group: all that is in it counts as
    /// committed from now on.
    fn recover<M: Machine>(&mut self, machine: &mut M) -> Result<(), Unusable> {
        let flushed = self.state_before().map_or(CREATION_INDEX, |state| state.flushed);
        let Self { disk, spec, .. } = &*self;
        let mut log = Log::open(Arc::clone(disk), &spec.dir, spec.log.clone(), flushed, self.now)?;
        let (first, last) = (log.checkpoint().applied.next(), log.last_index());
        let final_error = |what: String| Unusable::Final(format!("cannot recover {}: {what}", spec.tp));
        let state = log.checkpoint().machine.clone();
        machine.restore(&state).map_err(|error| final_error(error.to_string()))?;
        log.commit_to(last);
        for index in first.get()..=last.get() {
            replay(&mut log, machine, RaftIndex::new(index)).map_err(|error| final_error(error.to_string()))?;
        }
        let membership = Membership::alone(spec.replica);
        let (membership, machine) = (membership.encode(), machine.checkpoint());
        // Where there is one of the last entry already, that is what is given; it knows the members of before.
        let checkpoint = log.new_checkpoint(last, membership.clone(), machine.clone());
        if checkpoint.applied != last {
            return Err(final_error(format!("entry {last} can not be read")));
        }
        let checkpoint = Checkpoint { membership, machine, ..checkpoint };
        let last_term = log.last_term();
        log.close()?;
        Log::reidentify(disk, &spec.dir, self.identity(), &checkpoint)?;
        tracing::warn!(tp = %spec.tp, replica = %spec.replica, last_index = %last, %last_term, "a survivor's log goes on as that of the only voter: what it had not been sent is lost");
        Ok(())
    }

    /// What is known of what the replica said whose log goes on.
    fn state_before(&self) -> Option<HardState> {
        self.hard_state_before.filter(|state| !state.is_lost())
    }

    /// What a recovered replica begins with, as often as it does before that is durable.
    fn recovered_state(&self, log: &Log) -> HardState {
        let term = self.state_before().map_or(log.last_term(), |state| state.term.max(log.last_term()));
        HardState { term: Term::new(term.get() + RECOVERED_TERMS), vote: None, flushed: log.checkpoint().applied }
    }

    /// Since when it may answer for what is only in memory, by its note.
    fn relaxed_in(&self) -> Relaxed {
        let path = self.spec.dir.join(RELAXED_FILE);
        let read = || if self.disk.exists(&path)? { read_note(&*self.disk, &path).map(Some) } else { Ok(None) };
        match read() {
            Ok(None) => Relaxed::Never,
            Ok(Some(note)) if !self.boot_id.is_empty() && note == self.boot_id.as_bytes() => Relaxed::Now,
            Ok(Some(_)) => Relaxed::Before,
            Err(error) => {
                let error: std::io::Error = error;
                tracing::warn!(tp = %self.spec.tp, %error, "cannot see when a replica answered for what was not flushed: the worse is assumed");
                Relaxed::Before
            }
        }
    }
}

/// When a replica answered for what was only in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relaxed {
    /// All of it was flushed before.
    Never,
    /// In this start of the machine, which remembers.
    Now,
    /// Perhaps in another one.
    Before,
}

/// Notes that the replica in `dir` answers for what is only in memory; durable when this returns.
pub(crate) fn note_relaxed(disk: &Arc<dyn Disk>, dir: &Path, boot_id: &str) -> std::io::Result<()> {
    let (path, new) = (dir.join(RELAXED_FILE), dir.join(format!("{RELAXED_FILE}.new")));
    if disk.exists(&new)? {
        disk.remove_file(&new)?;
    }
    let file = disk.open(&new, OpenMode::CreateNew)?;
    file.write_at(boot_id.as_bytes(), 0)?;
    file.sync_data()?;
    drop(file);
    disk.rename(&new, &path)?;
    disk.sync_dir(dir)
}

/// Notes that all that the replica in `dir` answers for is flushed, and will be.
pub(crate) fn forget_relaxed(disk: &Arc<dyn Disk>, dir: &Path) -> std::io::Result<()> {
    disk.remove_file(&dir.join(RELAXED_FILE))?;
    disk.sync_dir(dir)
}

/// Gives one entry to a machine, as if it had just been committed.
fn replay<M: Machine>(log: &mut Log, machine: &mut M, index: RaftIndex) -> Result<(), StorageError> {
    let header: BatchHeader = log.header(index)?;
    let term = header.leader_epoch.term().unwrap_or_default();
    let base_offset = header.base_offset;
    let reads_records = machine.reads_records();
    let mut give = |body| machine.committed(&MachineEntry { index, term, base_offset, header: &header, body });
    match log.entry(index)?.body {
        EntryBody::Batch(batch) if reads_records || header.attributes.is_control() => {
            give(MachineBody::Records(&batch))
        }
        EntryBody::Batch(_) => give(MachineBody::Header),
        EntryBody::Control { ctype, payload } => {
            give(MachineBody::Control { ctype, payload: &payload });
            if ctype == ControlType::LogStart
                && let Ok(offset) = log_start_of(&payload)
                && offset > log.log_start()
            {
                log.set_log_start(offset.min(log.high_watermark()));
            }
        }
    }
    Ok(())
}

fn missing(spec: &ReplicaSpec) -> String {
    format!(
        "the files of replica {} in {} are gone; put them back from a backup, or delete the topic",
        spec.replica,
        spec.dir.display()
    )
}

/// Notes that a broker runs here; says whether an earlier one ended with the machine, without a clean stop.
///
/// A note that is there already stays until a clean stop by which every replica was looked at: were it replaced now, a crash
/// before that would forget what was lost. So the loss is told again at each start until then; better twice than not at all.
pub(crate) fn mark_running(disk: &Arc<dyn Disk>, data_dir: &DataDir, boot_id: &str) -> std::io::Result<bool> {
    let path = data_dir.path().join(RUNNING_FILE);
    if disk.exists(&path)? {
        let before = read_note(&**disk, &path)?;
        // Without a name for either start, the worse is assumed; so it is of a note that a crash cut short.
        return Ok(boot_id.is_empty() || before != boot_id.as_bytes());
    }
    let file = disk.open(&path, OpenMode::CreateNew)?;
    file.write_at(boot_id.as_bytes(), 0)?;
    file.sync_data()?;
    disk.sync_dir(data_dir.path())?;
    Ok(false)
}

fn read_note(disk: &dyn Disk, path: &Path) -> std::io::Result<Vec<u8>> {
    let file = disk.open(path, OpenMode::Read)?;
    let mut note = vec![0; usize::try_from(file.len()?.min(256)).unwrap_or(256)];
    let length = file.read_at(&mut note, 0)?;
    note.truncate(length);
    Ok(note)
}

/// Notes that the broker stopped cleanly: nothing was only in memory.
///
/// Not so where the machine had gone down before this start, and a replica was not opened since, as its broker was not
/// registered yet, say: what it lost is to be told still.
pub(crate) fn mark_stopped(data_dir: &DataDir, boot_id: &str) {
    let path = data_dir.path().join(RUNNING_FILE);
    match are_looked_at(data_dir, &path, boot_id) {
        Ok(true) => {}
        Ok(false) => {
            tracing::warn!(path = %path.display(), "stopped before every replica was looked at that may have lost what was in memory: the next start looks");
            return;
        }
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "cannot see whether every replica was looked at: the next start takes it that the machine went down");
            return;
        }
    }
    let removed = data_dir.disk().remove_file(&path);
    if let Err(error) = removed.and_then(|()| data_dir.disk().sync_dir(data_dir.path())) {
        tracing::warn!(%error, path = %path.display(), "cannot note that the broker stopped cleanly");
    }
}

/// Whether every replica that may have lost what was in memory was opened in this start of the machine, or nothing was lost.
fn are_looked_at(data_dir: &DataDir, running: &Path, boot_id: &str) -> std::io::Result<bool> {
    let disk = &**data_dir.disk();
    if read_note(disk, running)? == boot_id.as_bytes() {
        return Ok(true);
    }
    for tp in data_dir.replicas().map_err(std::io::Error::other)? {
        let note = data_dir.replica_dir(tp).join(RELAXED_FILE);
        if disk.exists(&note)? && read_note(disk, &note)? != boot_id.as_bytes() {
            return Ok(false);
        }
    }
    Ok(true)
}
