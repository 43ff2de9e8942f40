//! A broker's data directory: who it is, who may use it, and what lies where.
//!
//! ```text
//! LOCK                           held by the process that uses the directory
//! manifest                       format version, directory id, cluster id once known, number of stripes
//! founding                       how the cluster began and which replica of its metadata is here; the broker's own words
//! hard-state-00000 ...           one per stripe
//! topics/<topic id>/<partition>/ a replica
//! topics/<topic id>/<partition>.incoming/ one that is being installed
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use flowstone_protocol::{ClusterId, DirectoryId, PartitionId, ReplicaId, TopicId, TopicPartition};

use crate::checkpoint::ReplicaIdentity;
use crate::disk::{DirLock, Disk};
use crate::error::{OpenError, StorageError};
use crate::hard_state::{HardState, HardStateFile};
use crate::install::{INCOMING_SUFFIX, incoming_dir};
use crate::small_file::{self, Fields, FrameError};

const LOCK_NAME: &str = "LOCK";
const MANIFEST_NAME: &str = "manifest";
const TOPICS_NAME: &str = "topics";
const FOUNDING_NAME: &str = "founding";
const FOUNDING_MAGIC: [u8; 8] = *b"FLOWFOUN";
const FOUNDING_FORMAT_VERSION: u32 = 1;
/// Kept here by whoever runs on the directory: a stop that was not clean.
const RUNNING_NAME: &str = "running";
const MANIFEST_MAGIC: [u8; 8] = *b"FLOWDATA";
/// The newest version of a data directory.
pub const DATA_DIR_FORMAT_VERSION: u32 = 1;
/// The feature level of everything that this program writes: every new record, control type and file format waits for the
/// cluster to reach its level.
pub const FEATURE_LEVEL: u32 = 1;
/// More stripes than this are a damaged manifest.
const STRIPES_MAX: u32 = 4096;

/// A data directory, locked by this process.
pub struct DataDir {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    manifest: Manifest,
    _lock: DirLock,
}

impl std::fmt::Debug for DataDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataDir").field("path", &self.path).field("manifest", &self.manifest).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Manifest {
    id: DirectoryId,
    cluster: Option<ClusterId>,
    stripes: u32,
    feature_level: u32,
}

impl Manifest {
    fn encode(&self) -> Bytes {
        let mut body = BytesMut::with_capacity(41);
        body.put_u128_le(self.id.get());
        body.put_u8(u8::from(self.cluster.is_some()));
        body.put_u128_le(self.cluster.map_or(0, ClusterId::get));
        body.put_u32_le(self.stripes);
        body.put_u32_le(self.feature_level);
        small_file::frame(MANIFEST_MAGIC, DATA_DIR_FORMAT_VERSION, &body)
    }

    fn decode(file: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields(small_file::unframe(MANIFEST_MAGIC, DATA_DIR_FORMAT_VERSION, file)?);
        let id = DirectoryId::new(fields.u128()?);
        let is_founded = fields.take(1)? != [0];
        let cluster = ClusterId::new(fields.u128()?);
        let manifest =
            Self { id, cluster: is_founded.then_some(cluster), stripes: fields.u32()?, feature_level: fields.u32()? };
        fields.end()?;
        if manifest.stripes == 0 || manifest.stripes > STRIPES_MAX {
            return Err(FrameError::Invalid("impossible number of stripes"));
        }
        Ok(manifest)
    }
}

impl DataDir {
    /// Opens a data directory, or makes it, with the id `new_id` (random) and `stripes` hard state files (fixed then).
    ///
    /// Fails where another process has it, where it cannot be written, or a newer program made it.
    pub fn open_or_create(
        disk: Arc<dyn Disk>,
        path: &Path,
        new_id: DirectoryId,
        stripes: u32,
    ) -> Result<Self, DataDirError> {
        disk.create_dir_all(path).map_err(DataDirError::io(path))?;
        let lock_path = path.join(LOCK_NAME);
        let lock = disk.lock(&lock_path).map_err(DataDirError::io(path))?;
        let Some(lock) = lock else { return Err(DataDirError::Locked { path: path.to_owned() }) };
        let manifest_path = path.join(MANIFEST_NAME);
        let manifest = match small_file::read_file(&disk, &manifest_path) {
            Ok(file) => {
                // A life before this one may have been killed between the manifest's renaming and this.
                disk.sync_dir(path).map_err(DataDirError::io(path))?;
                Manifest::decode(&file).map_err(|error| match error {
                    FrameError::Newer { found } => {
                        DataDirError::Newer { path: path.to_owned(), found, known: DATA_DIR_FORMAT_VERSION }
                    }
                    FrameError::Invalid(detail) => DataDirError::Damaged { path: manifest_path.clone(), detail },
                })?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let manifest = Manifest {
                    id: new_id,
                    cluster: None,
                    stripes: stripes.clamp(1, STRIPES_MAX),
                    feature_level: FEATURE_LEVEL,
                };
                Self::create(&disk, path, &manifest)?;
                manifest
            }
            Err(error) => return Err(DataDirError::io(&manifest_path)(error)),
        };
        Ok(Self { disk, path: path.to_owned(), manifest, _lock: lock })
    }

    /// The manifest comes last: without it, the next opening begins again.
    fn create(disk: &Arc<dyn Disk>, path: &Path, manifest: &Manifest) -> Result<(), DataDirError> {
        let names = disk.read_dir(path).map_err(DataDirError::io(path))?;
        let is_ours = |name: &str| {
            name == LOCK_NAME
                || name == TOPICS_NAME
                || name == RUNNING_NAME
                || name.starts_with("hard-state-")
                || name.ends_with(small_file::TEMPORARY_SUFFIX)
                || name == "lost+found"
        };
        if let Some(other) = names.iter().find(|name| !is_ours(name)) {
            return Err(DataDirError::NotEmpty { path: path.to_owned(), found: other.clone() });
        }
        let topics = path.join(TOPICS_NAME);
        if disk.exists(&topics).map_err(DataDirError::io(path))?
            && !disk.read_dir(&topics).map_err(DataDirError::io(&topics))?.is_empty()
        {
            return Err(DataDirError::Damaged { path: path.join(MANIFEST_NAME), detail: "it is missing" });
        }
        disk.create_dir_all(&topics).map_err(DataDirError::io(&topics))?;
        for stripe in 0..manifest.stripes {
            HardStateFile::create(disk, path, stripe).map_err(DataDirError::storage(path))?;
        }
        // Where there is a manifest all that leads to it is durable.
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            match disk.sync_dir(parent) {
                // Not ours to read, so it was not made by this.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => break,
                flushed => flushed.map_err(DataDirError::io(parent))?,
            }
        }
        let manifest_path = path.join(MANIFEST_NAME);
        small_file::replace_file(disk, &manifest_path, &manifest.encode()).map(|_| ()).map_err(DataDirError::io(path))
    }

    /// Its id: random, made with it.
    pub fn id(&self) -> DirectoryId {
        self.manifest.id
    }

    /// The cluster that it belongs to, once that is known.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.manifest.cluster
    }

    /// Notes the cluster that it belongs to; durable when this returns. Refused if it belongs to another.
    pub fn set_cluster(&mut self, cluster: ClusterId) -> Result<(), DataDirError> {
        match self.manifest.cluster {
            Some(known) if known == cluster => Ok(()),
            Some(known) => Err(DataDirError::OtherCluster { path: self.path.clone(), known, asked: cluster }),
            None => {
                let manifest = Manifest { cluster: Some(cluster), ..self.manifest };
                let path = self.path.join(MANIFEST_NAME);
                small_file::replace_file(&self.disk, &path, &manifest.encode()).map_err(DataDirError::io(&path))?;
                self.manifest = manifest;
                Ok(())
            }
        }
    }

    /// What the broker wrote about its cluster's founding; `None` where it never did.
    pub fn founding(&self) -> Result<Option<Bytes>, DataDirError> {
        let path = self.path.join(FOUNDING_NAME);
        let file = match small_file::read_file(&self.disk, &path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(DataDirError::io(&path)(error)),
        };
        match small_file::unframe(FOUNDING_MAGIC, FOUNDING_FORMAT_VERSION, &file) {
            Ok(body) => Ok(Some(Bytes::copy_from_slice(body))),
            Err(FrameError::Newer { found }) => {
                Err(DataDirError::Newer { path: self.path.clone(), found, known: FOUNDING_FORMAT_VERSION })
            }
            Err(FrameError::Invalid(detail)) => Err(DataDirError::Damaged { path, detail }),
        }
    }

    /// Replaces it; durable when this returns.
    pub fn set_founding(&self, body: &[u8]) -> Result<(), DataDirError> {
        let path = self.path.join(FOUNDING_NAME);
        let file = small_file::frame(FOUNDING_MAGIC, FOUNDING_FORMAT_VERSION, body);
        small_file::replace_file(&self.disk, &path, &file).map(|_| ()).map_err(DataDirError::io(&path))
    }

    /// Number of hard state files, fixed when it was made.
    pub fn stripes(&self) -> u32 {
        self.manifest.stripes
    }

    /// The stripe of a partition: the same for as long as the directory lives.
    pub fn stripe_of(&self, topic_partition: TopicPartition) -> u32 {
        // CRC-32: stable across versions of the standard library, unlike its hashers.
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&topic_partition.topic.to_bytes());
        hasher.update(&topic_partition.partition.get().to_le_bytes());
        hasher.finalize() % self.manifest.stripes
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk that it is on.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// The folder of the hard state files.
    pub fn hard_state_dir(&self) -> PathBuf {
        self.path.clone()
    }

    /// The folder of a partition's replica.
    pub fn replica_dir(&self, topic_partition: TopicPartition) -> PathBuf {
        let topic = self.path.join(TOPICS_NAME).join(topic_partition.topic.to_string());
        topic.join(topic_partition.partition.to_string())
    }

    /// The partitions that have a folder here, in order; it may not be a whole replica, nor more than an install that was
    /// under way.
    pub fn replicas(&self) -> Result<Vec<TopicPartition>, DataDirError> {
        let topics = self.path.join(TOPICS_NAME);
        let mut found = Vec::new();
        for topic_name in self.disk.read_dir(&topics).map_err(DataDirError::io(&topics))? {
            let Ok(topic) = topic_name.parse::<TopicId>() else { continue };
            let partitions = topics.join(&topic_name);
            for name in self.disk.read_dir(&partitions).map_err(DataDirError::io(&partitions))? {
                if let Ok(partition) = name.strip_suffix(INCOMING_SUFFIX).unwrap_or(&name).parse::<i32>() {
                    found.push(TopicPartition { topic, partition: PartitionId::new(partition) });
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Makes a stripe's file of hard states anew where it is rotten, so that new replicas can live in that stripe. Those that
    /// have a folder here, or are named in what is left of the file, are noted as [`HardState::LOST`]: what they voted for is
    /// forgotten, for good. Says which.
    ///
    /// Durable when this returns; a crash leaves the rotten file, or the new one.
    pub fn renew_hard_states(&self, stripe: u32) -> Result<Vec<ReplicaId>, DataDirError> {
        // One whose folder is missing would else be taken for one that never was, and vote a second time.
        let mut lost =
            HardStateFile::mentioned(&self.disk, &self.path, stripe).map_err(DataDirError::storage(&self.path))?;
        for topic_partition in self.replicas()?.into_iter().filter(|&it| self.stripe_of(it) == stripe) {
            let dir = self.replica_dir(topic_partition);
            // One that was about to take another's place may be half way there.
            for dir in [&incoming_dir(&dir), &dir] {
                match ReplicaIdentity::read(&self.disk, dir) {
                    Ok(identity) => lost.push(identity.replica),
                    Err(OpenError::Io { path, source, .. }) if source.kind() != io::ErrorKind::NotFound => {
                        return Err(DataDirError::io(&path)(source));
                    }
                    // Nobody is opened from a folder that does not say whose it is.
                    Err(_) => {}
                }
            }
        }
        lost.sort_unstable();
        lost.dedup();
        let states = lost.iter().map(|&replica| (replica, HardState::LOST)).collect();
        HardStateFile::replace(&self.disk, &self.path, stripe, &states).map_err(DataDirError::storage(&self.path))?;
        Ok(lost)
    }

    /// Removes a replica's folder, and that of an install; fine if there is none. Durable when this returns.
    pub fn remove_replica(&self, topic_partition: TopicPartition) -> Result<(), DataDirError> {
        let dir = self.replica_dir(topic_partition);
        let mut removed_any = false;
        // The install first: one that is whole would take the replica's place.
        for dir in [&incoming_dir(&dir), &dir] {
            match self.disk.remove_dir_all(dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => {
                    removed.map_err(DataDirError::io(dir))?;
                    removed_any = true;
                }
            }
        }
        if !removed_any {
            return Ok(());
        }
        let Some(topic) = dir.parent() else { return Ok(()) };
        // Another partition of the topic may be made or removed at this moment: the folder goes if it is empty, and
        // whoever finds it gone has nothing left to do.
        let changed = match self.disk.remove_dir(topic) {
            Ok(()) => self.path.join(TOPICS_NAME),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => topic.to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.path.join(TOPICS_NAME),
            Err(error) => return Err(DataDirError::io(topic)(error)),
        };
        match self.disk.sync_dir(&changed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let topics = self.path.join(TOPICS_NAME);
                self.disk.sync_dir(&topics).map_err(DataDirError::io(&topics))
            }
            flushed => flushed.map_err(DataDirError::io(&changed)),
        }
    }
}

/// Why a data directory cannot be used; each says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataDirError {
    /// Another process has it.
    #[error(
        "the data directory {} is in use by another broker: stop that one, or choose another directory",
        path.display()
    )]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// This user may not write there.
    #[error(
        "the data directory {} cannot be written ({source}): give this user the right to, or choose another directory",
        path.display()
    )]
    NotWritable {
        /// The directory, or what in it.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A newer program made it.
    #[error(
        "the data directory {} has format version {found}, this program knows up to {known}: start a newer Flowstone, or choose another directory",
        path.display()
    )]
    Newer {
        /// The directory.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version known here.
        known: u32,
    },
    /// It holds something else.
    #[error("the directory {} is not empty (it has {found}) and no data directory: choose another one", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// One of the names in it.
        found: String,
    },
    /// Its manifest is missing or rotten.
    #[error("{} is damaged ({detail}): restore it from a backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: &'static str,
    },
    /// It belongs to another cluster.
    #[error(
        "the data directory {} belongs to cluster {known}, not {asked}: choose another directory, or correct the seeds",
        path.display()
    )]
    OtherCluster {
        /// The directory.
        path: PathBuf,
        /// Its cluster.
        known: ClusterId,
        /// The one that it was to join.
        asked: ClusterId,
    },
    /// The file system failed.
    #[error("the data directory {} cannot be used: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl DataDirError {
    fn io<'a>(path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Self::NotWritable { path, source }
                }
                _ => Self::Io { path, source },
            }
        }
    }

    fn storage<'a>(path: &'a Path) -> impl FnOnce(StorageError) -> Self + 'a {
        move |error| match error {
            StorageError::Io { path, source, .. } => Self::io(&path)(source),
            other => Self::Io { path: path.to_owned(), source: io::Error::other(other) },
        }
    }
}
