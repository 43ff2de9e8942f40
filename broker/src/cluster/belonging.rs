//! What a data directory says about the cluster that it belongs to.
//!
//! It is written before anyone is told of it, so that a founding that was told is never forgotten by whoever made it.

use std::sync::Arc;

use flowstone_protocol::{BrokerId, ReplicaId, peer};
use flowstone_storage::DataDir;
use parking_lot::Mutex;
use prost::Message;

use super::form::{Founder, Founding, founder_message, founder_of};

/// Which cluster a directory belongs to, and which replica of its metadata it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Belonging {
    pub(crate) founding: Founding,
    /// `None` until this broker is registered for the first time, unless it is one of the founders.
    pub(crate) metadata_replica: Option<ReplicaId>,
    /// The replica with whose log that one goes on, as the only voter: noted before it does, so that a start in the middle
    /// of it goes on as well.
    pub(crate) recovered_from: Option<ReplicaId>,
    /// Brokers as they were registered when this was written: after a start they are believed before the metadata can be
    /// read, and founders may have lost the directories that the founding names.
    pub(crate) brokers: Vec<Founder>,
    /// The metadata's recovery with whose table the replicas here were compared last.
    pub(crate) settled_recovery: i64,
}

/// What a directory says, kept up to date while the broker runs.
#[derive(Debug)]
pub(crate) struct Kept {
    data_dir: Arc<DataDir>,
    /// Held while the file is written, on a thread that may block: so that the last change is the one that stays.
    state: Mutex<Belonging>,
}

impl Kept {
    pub(crate) fn new(data_dir: Arc<DataDir>, belonging: Belonging) -> Arc<Self> {
        Arc::new(Self { data_dir, state: Mutex::new(belonging) })
    }

    /// What is known.
    pub(crate) fn get<R>(&self, read: impl FnOnce(&Belonging) -> R) -> R {
        read(&self.state.lock())
    }

    /// Changes what is known; durable when this returns. Nothing is written where nothing changed.
    ///
    /// # Errors
    /// The file system failed: what was known before stays.
    pub(crate) async fn change(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Belonging) + Send + 'static,
    ) -> Result<(), String> {
        let kept = Arc::clone(self);
        let changing = tokio::task::spawn_blocking(move || {
            let mut state = kept.state.lock();
            let mut next = state.clone();
            change(&mut next);
            if next != *state {
                next.save(&kept.data_dir)?;
                *state = next;
            }
            Ok(())
        });
        changing.await.map_err(|error| error.to_string())?
    }
}

impl Belonging {
    /// What `broker` has to know of the cluster that `founding` made.
    pub(crate) fn new(founding: Founding, broker: BrokerId, data_dir: &DataDir) -> Self {
        let metadata_replica = founding.founder(broker, data_dir.id()).map(|founder| founder.replica);
        Self { founding, metadata_replica, recovered_from: None, brokers: Vec::new(), settled_recovery: 0 }
    }

    /// A cluster of this broker alone, from the start. Nothing of it has to be written but the cluster's id, which is in
    /// the manifest: all else follows from the directory's id.
    pub(crate) fn alone(data_dir: &DataDir, broker: BrokerId, peer_address: &str, level: i32) -> Option<Self> {
        let replica = founding_replica(data_dir);
        let me = Founder { broker, directory: data_dir.id(), replica, peer_address: peer_address.to_owned() };
        let founding = Founding { cluster: data_dir.cluster()?, voters: vec![me], feature_level: level };
        Some(Self {
            founding,
            metadata_replica: Some(replica),
            recovered_from: None,
            brokers: Vec::new(),
            settled_recovery: 0,
        })
    }

    /// As written; `None` for a directory that belongs to no cluster yet. `level` is the newest feature level that this
    /// release knows, with which a cluster of one begins.
    ///
    /// # Errors
    /// The file cannot be read, or is not what was written; with what to do.
    pub(crate) fn load(
        data_dir: &DataDir,
        broker: BrokerId,
        peer_address: &str,
        level: i32,
    ) -> Result<Option<Self>, String> {
        let Some(bytes) = data_dir.founding().map_err(|error| error.to_string())? else {
            return Ok(Self::alone(data_dir, broker, peer_address, level));
        };
        let damaged = || {
            format!(
                "the file `founding` in {} is damaged; restore it from a backup, or start with an empty directory under \
                 the same node.id: the cluster then gives this broker its replicas anew",
                data_dir.path().display()
            )
        };
        let message = peer::Belonging::decode(bytes).map_err(|_| damaged())?;
        let founding = message.founding.as_ref().and_then(Founding::from_message).ok_or_else(damaged)?;
        let metadata_replica = match message.metadata_replica_id {
            0 => founding.founder(broker, data_dir.id()).map(|founder| founder.replica),
            id => Some(ReplicaId::new(id)),
        };
        let brokers = message.brokers.iter().filter_map(founder_of).collect();
        let recovered_from =
            (message.metadata_recovered_from != 0).then(|| ReplicaId::new(message.metadata_recovered_from));
        let settled_recovery = message.settled_recovery;
        Ok(Some(Self { founding, metadata_replica, recovered_from, brokers, settled_recovery }))
    }

    /// Durable when this returns.
    ///
    /// # Errors
    /// The file system failed.
    pub(crate) fn save(&self, data_dir: &DataDir) -> Result<(), String> {
        let message = peer::Belonging {
            founding: Some(self.founding.to_message()),
            metadata_replica_id: self.metadata_replica.map_or(0, ReplicaId::get),
            brokers: self.brokers.iter().map(founder_message).collect(),
            metadata_recovered_from: self.recovered_from.map_or(0, ReplicaId::get),
            settled_recovery: self.settled_recovery,
        };
        data_dir.set_founding(&message.encode_to_vec()).map_err(|error| error.to_string())
    }

    /// Whether this directory's replica of the metadata is one of those that the group began with.
    pub(crate) fn is_founder(&self) -> bool {
        self.founding.voters.iter().any(|founder| Some(founder.replica) == self.metadata_replica)
    }
}

/// The id of the replica that a directory founds a cluster of one with. Random, as the directory's id is, and a directory
/// founds once: so a start that is cut off at any point goes on with the same one.
fn founding_replica(data_dir: &DataDir) -> ReplicaId {
    let id = data_dir.id().get();
    ReplicaId::new(((id >> 64) as u64 ^ id as u64).max(1))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use flowstone_protocol::{ClusterId, DirectoryId};
    use flowstone_storage::SimDisk;

    use super::*;

    fn directory(disk: &SimDisk) -> DataDir {
        DataDir::open_or_create(disk.shared(), Path::new("/data"), DirectoryId::new(70), 1).expect("an empty disk")
    }

    #[test]
    fn what_a_directory_belongs_to_survives() {
        let disk = SimDisk::new(1);
        let mut data_dir = directory(&disk);
        let me = BrokerId::new(2);
        assert_eq!(Belonging::load(&data_dir, me, "b:1", 1), Ok(None), "no cluster yet");
        let voter = |broker: i32, directory: DirectoryId| Founder {
            broker: BrokerId::new(broker),
            directory,
            replica: ReplicaId::new(broker as u64 * 11),
            peer_address: format!("host-{broker}:1"),
        };
        let founding = Founding {
            cluster: ClusterId::new(9),
            voters: vec![voter(1, DirectoryId::new(1)), voter(2, data_dir.id())],
            feature_level: 1,
        };
        let founder = Belonging::new(founding.clone(), me, &data_dir);
        assert_eq!(founder.metadata_replica, Some(ReplicaId::new(22)));
        assert!(founder.is_founder());
        founder.save(&data_dir).expect("written");
        data_dir.set_cluster(ClusterId::new(9)).expect("its first");
        drop(data_dir);
        let data_dir = directory(&disk);
        assert_eq!(Belonging::load(&data_dir, me, "b:1", 1), Ok(Some(founder)));
        let other = BrokerId::new(4);
        let mut observer = Belonging::new(founding, other, &data_dir);
        assert_eq!((observer.metadata_replica, observer.is_founder()), (None, false));
        observer.metadata_replica = Some(ReplicaId::new(44));
        observer.recovered_from = Some(ReplicaId::new(43));
        observer.brokers = vec![voter(1, DirectoryId::new(3))];
        observer.settled_recovery = 77;
        observer.save(&data_dir).expect("written");
        assert_eq!(Belonging::load(&data_dir, other, "d:1", 1), Ok(Some(observer)));
    }

    #[test]
    fn a_cluster_of_one_needs_its_directory_alone() {
        let mut data_dir = directory(&SimDisk::new(1));
        data_dir.set_cluster(ClusterId::new(5)).expect("its first");
        let loaded = Belonging::load(&data_dir, BrokerId::new(1), "a:1", 1).expect("read").expect("it has a cluster");
        assert!(loaded.is_founder());
        assert_eq!(loaded.founding.cluster, ClusterId::new(5));
        assert_eq!(Belonging::load(&data_dir, BrokerId::new(1), "a:1", 1), Ok(Some(loaded)), "the same every time");
    }
}
