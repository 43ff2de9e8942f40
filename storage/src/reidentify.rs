//! A replica's log that goes on under another replica's id.

use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::{Checkpoint, ReplicaIdentity};
use crate::disk::Disk;
use crate::error::{OpenError, StorageError};
use crate::log::Log;
use crate::small_file;

impl Log {
    /// Lets the closed log in `dir` go on as the replica `new`, from `checkpoint`: one of all that the log holds and that
    /// the new replica is to answer for, with the members that the group has from now on. Older checkpoints, which know
    /// other members, go. Durable when this returns.
    ///
    /// A crash leaves the old identity (then it is done again: the checkpoint that is found is the new one, or the one
    /// before) or the new one with the new checkpoint. The hard state of the new id is the caller's part.
    ///
    /// Fails with [`OpenError::Quarantine`] or [`OpenError::NewerFormat`] where `dir` has no manifest to be read, with
    /// [`OpenError::Io`] where a file fails, or `dir` holds a replica of another partition.
    ///
    /// # Panics
    /// If the checkpoint contradicts itself.
    pub fn reidentify(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        new: ReplicaIdentity,
        checkpoint: &Checkpoint,
    ) -> Result<(), OpenError> {
        if let Err(problem) = checkpoint.check() {
            panic!("a checkpoint of {} in {}: {problem:?}", checkpoint.applied, dir.display());
        }
        let old = ReplicaIdentity::read(disk, dir)?;
        if old.topic_partition != new.topic_partition {
            let detail = format!("it holds a replica of {:?}, not {:?}", old.topic_partition, new.topic_partition);
            return Err(OpenError::io("reidentify", dir)(std::io::Error::other(detail)));
        }
        let path = dir.join(Checkpoint::file_name(checkpoint.applied));
        small_file::replace_file(disk, &path, &checkpoint.encode()).map_err(OpenError::io("write", &path))?;
        for name in disk.read_dir(dir).map_err(OpenError::io("read", dir))? {
            if Checkpoint::index_of_name(&name).is_some_and(|applied| applied != checkpoint.applied) {
                let path = dir.join(name);
                disk.remove_file(&path).map_err(OpenError::io("remove", &path))?;
            }
        }
        disk.sync_dir(dir).map_err(OpenError::io("flush", dir))?;
        new.write(disk, dir).map_err(|error: StorageError| OpenError::of_storage(error))
    }
}
