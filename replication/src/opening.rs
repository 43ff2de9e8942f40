//! Opening a replica from its files, closing its log, and the note that a broker runs here.
//!
//! ```text
//! folder   hard state | what happens
//! none     none       | made
//! none     known      | quarantined: what it answered for is gone
//! there    any        | recovered (above the flushed index written again), or quarantined by the log's own table
//! ```

use std::sync::Arc;

use flowstone_protocol::{RaftIndex, Timestamp};
use flowstone_storage::checkpoint::CREATION_INDEX;
use flowstone_storage::{DataDir, Disk, HardState, Log, OpenError, OpenMode, ReplicaIdentity};

use crate::machine::Machine;
use crate::membership::Membership;
use crate::replica::{CannotOpen, Replica, ReplicaConfig};
use crate::request::{FlushMode, ReplicaSpec, Start};

/// Names the file that says that a broker is running here, and since which start of the machine.
const RUNNING_FILE: &str = "running";

/// How an opening ended.
#[derive(Debug)]
pub(crate) enum Opened<M: Machine> {
    Replica(Box<Replica<M>>),
    /// The file system failed: tried again.
    Failed {
        machine: M,
        message: String,
    },
    /// Final.
    Quarantined {
        message: String,
    },
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
    pub(crate) config: ReplicaConfig,
    pub(crate) feature_level: u32,
    /// What was only in memory at the end of the last run is gone.
    pub(crate) lost_memory: bool,
    pub(crate) now: Timestamp,
}

impl OpenJob {
    pub(crate) fn run<M: Machine>(self, machine: M) -> Opened<M> {
        let Self { disk, spec, hard_state, config, feature_level, lost_memory, now } = self;
        let exists = match Log::exists(&disk, &spec.dir) {
            Ok(exists) => exists,
            Err(error) => {
                return Opened::Failed {
                    machine,
                    message: format!("cannot look into {}: {error}", spec.dir.display()),
                };
            }
        };
        if !exists {
            // It voted, or it wrote: what it answered for is gone, and a new one must not take its name.
            if hard_state.is_some() {
                return Opened::Quarantined { message: missing(&spec) };
            }
            let membership = match &spec.start {
                Start::FirstVoter { voters } => Membership { voters: voters.to_vec(), learners: Vec::new() },
                Start::Learner | Start::Recovered { .. } => Membership::alone(spec.replica),
            };
            let identity = ReplicaIdentity { replica: spec.replica, topic_partition: spec.tp, feature_level };
            if let Err(error) = Log::create(&disk, &spec.dir, identity, membership.encode()) {
                return Opened::Failed { machine, message: error.to_string() };
            }
        }
        let flushed = hard_state.map_or(CREATION_INDEX, |state| state.flushed);
        match Log::open(disk, &spec.dir, spec.log.clone(), flushed, now) {
            Ok(log) => {
                if lost_memory && spec.flush == FlushMode::Relaxed {
                    let end_offset = log.end_offset();
                    tracing::warn!(tp = %spec.tp, %end_offset, "records above this offset may be lost: flowstone.flush = relaxed, and the machine was restarted");
                }
                match Replica::open(log, hard_state, machine, config) {
                    Ok(replica) => Opened::Replica(Box::new(replica)),
                    Err(CannotOpen(message)) => Opened::Quarantined { message },
                }
            }
            Err(error @ OpenError::Io { .. }) => Opened::Failed { machine, message: error.to_string() },
            Err(error) => Opened::Quarantined { message: error.to_string() },
        }
    }
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
/// A note that is there already stays until a clean stop: were it replaced now, a crash before every replica was looked at
/// would forget what was lost. So the loss is told again at each start until then; better twice than not at all.
pub(crate) fn mark_running(disk: &Arc<dyn Disk>, data_dir: &DataDir, boot_id: &str) -> std::io::Result<bool> {
    let path = data_dir.path().join(RUNNING_FILE);
    if disk.exists(&path)? {
        let file = disk.open(&path, OpenMode::Read)?;
        let mut before = vec![0; usize::try_from(file.len()?.min(256)).unwrap_or(256)];
        let length = file.read_at(&mut before, 0)?;
        // Without a name for either start, the worse is assumed; so it is of a note that a crash cut short.
        return Ok(boot_id.is_empty() || &before[..length] != boot_id.as_bytes());
    }
    let file = disk.open(&path, OpenMode::CreateNew)?;
    file.write_at(boot_id.as_bytes(), 0)?;
    file.sync_data()?;
    disk.sync_dir(data_dir.path())?;
    Ok(false)
}

/// Notes that the broker stopped cleanly: nothing was only in memory.
pub(crate) fn mark_stopped(data_dir: &DataDir) {
    let path = data_dir.path().join(RUNNING_FILE);
    let removed = data_dir.disk().remove_file(&path);
    if let Err(error) = removed.and_then(|()| data_dir.disk().sync_dir(data_dir.path())) {
        tracing::warn!(%error, path = %path.display(), "cannot note that the broker stopped cleanly");
    }
}
