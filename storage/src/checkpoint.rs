//! A replica's manifest (who it is) and its checkpoints (what all entries up to an index amount to).
//!
//! A checkpoint is an immutable file `<applied index>.state`, written only after a flush up to that index; files of the
//! log are deleted only below the newest durable one. A replica's creation is `1.state`: index 1, term 1, not
//! replicated, so that every log begins at index 2.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use flowstone_protocol::{LeaderEpoch, Offset, PartitionId, RaftIndex, ReplicaId, Term, TopicId, TopicPartition};

use crate::disk::Disk;
use crate::error::{OpenError, ReadError, StorageError};
use crate::small_file::{self, Fields, FrameError};

/// The manifest's name.
pub(crate) const MANIFEST_NAME: &str = "replica";
const MANIFEST_MAGIC: [u8; 8] = *b"FLOWREPL";
/// The newest version of a replica's folder: its manifest, segments and index files.
pub const LOG_FORMAT_VERSION: u32 = 1;

const CHECKPOINT_MAGIC: [u8; 8] = *b"FLOWSTAT";
/// The newest version of a checkpoint file.
pub const CHECKPOINT_FORMAT_VERSION: u32 = 1;
/// Ends a checkpoint's name.
pub(crate) const CHECKPOINT_SUFFIX: &str = ".state";

/// The index of a group's creation, which no log holds.
pub const CREATION_INDEX: RaftIndex = RaftIndex::new(1);
/// The term of a group's creation.
pub const CREATION_TERM: Term = Term::new(1);

/// Who a replica is: written once, when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaIdentity {
    /// Its Raft id.
    pub replica: ReplicaId,
    /// The partition it is a replica of.
    pub topic_partition: TopicPartition,
    /// The cluster's feature level when it was made; gates what may be written.
    pub feature_level: u32,
}

impl ReplicaIdentity {
    pub(crate) fn put(&self, body: &mut BytesMut) {
        body.put_u64_le(self.replica.get());
        body.put_u128_le(self.topic_partition.topic.get());
        body.put_i32_le(self.topic_partition.partition.get());
        body.put_u32_le(self.feature_level);
    }

    pub(crate) fn take(fields: &mut Fields<'_>) -> Result<Self, FrameError> {
        Ok(Self {
            replica: ReplicaId::new(fields.u64()?),
            topic_partition: TopicPartition {
                topic: TopicId::new(fields.u128()?),
                partition: PartitionId::new(fields.i32()?),
            },
            feature_level: fields.u32()?,
        })
    }

    fn encode(&self) -> Bytes {
        let mut body = BytesMut::with_capacity(32);
        self.put(&mut body);
        small_file::frame(MANIFEST_MAGIC, LOG_FORMAT_VERSION, &body)
    }

    fn decode(file: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields(small_file::unframe(MANIFEST_MAGIC, LOG_FORMAT_VERSION, file)?);
        let identity = Self::take(&mut fields)?;
        fields.end()?;
        Ok(identity)
    }

    pub(crate) fn write(&self, disk: &Arc<dyn Disk>, dir: &Path) -> Result<(), StorageError> {
        let path = dir.join(MANIFEST_NAME);
        let written = small_file::replace_file(disk, &path, &self.encode());
        written.map(|_| ()).map_err(StorageError::io("write", &path))
    }

    /// The identity of the replica in `dir`.
    pub fn read(disk: &Arc<dyn Disk>, dir: &Path) -> Result<Self, OpenError> {
        let path = dir.join(MANIFEST_NAME);
        let file = small_file::read_file(disk, &path).map_err(OpenError::io("open", &path))?;
        Self::decode(&file).map_err(|error| match error {
            FrameError::Newer { found } => {
                OpenError::NewerFormat { path: path.clone(), found, known: LOG_FORMAT_VERSION }
            }
            FrameError::Invalid(detail) => OpenError::Quarantine {
                path: dir.to_owned(),
                offset: Offset::ZERO,
                detail: format!("its manifest is rotten ({detail})"),
                remedy: format!(
                    "restore {} from a backup, or remove the folder to give the replica up",
                    path.display()
                ),
            },
        })
    }
}

/// Where a leader's epoch begins in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochStart {
    /// The leader's epoch.
    pub epoch: LeaderEpoch,
    /// The index of its first entry.
    pub index: RaftIndex,
    /// The offset of its first entry.
    pub offset: Offset,
}

/// What all entries up to `applied` amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The last entry in it.
    pub applied: RaftIndex,
    /// That entry's term.
    pub term: Term,
    /// First offset that readers may see.
    pub log_start: Offset,
    /// One past the last offset of entry `applied`.
    pub end_offset_at_applied: Offset,
    /// The group's members, in the replication crate's own form.
    pub membership: Bytes,
    /// The state machine's state, in its own form.
    pub machine: Bytes,
    /// The epochs up to `applied`, oldest first; the last one is that of `applied`. Empty only at the creation.
    pub epochs: Vec<EpochStart>,
}

impl Checkpoint {
    /// The creation of a group with these members.
    pub fn creation(membership: Bytes) -> Self {
        Self {
            applied: CREATION_INDEX,
            term: CREATION_TERM,
            log_start: Offset::ZERO,
            end_offset_at_applied: Offset::ZERO,
            membership,
            machine: Bytes::new(),
            epochs: Vec::new(),
        }
    }

    /// The file's name.
    pub fn file_name(applied: RaftIndex) -> String {
        format!("{:020}{CHECKPOINT_SUFFIX}", applied.get())
    }

    /// The index in a checkpoint's file name, if it is one.
    pub fn index_of_name(name: &str) -> Option<RaftIndex> {
        let digits = name.strip_suffix(CHECKPOINT_SUFFIX)?;
        (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit()))
            .then(|| digits.parse().ok().map(RaftIndex::new))
            .flatten()
    }

    /// The file's bytes.
    pub fn encode(&self) -> Bytes {
        let mut body =
            BytesMut::with_capacity(44 + self.membership.len() + self.machine.len() + self.epochs.len() * 20);
        body.put_u64_le(self.applied.get());
        body.put_u64_le(self.term.get());
        body.put_i64_le(self.log_start.get());
        body.put_i64_le(self.end_offset_at_applied.get());
        small_file::put_sized(&mut body, &self.membership);
        small_file::put_sized(&mut body, &self.machine);
        body.put_u32_le(u32::try_from(self.epochs.len()).expect("epochs are counted by an i32"));
        for start in &self.epochs {
            body.put_i32_le(start.epoch.get());
            body.put_u64_le(start.index.get());
            body.put_i64_le(start.offset.get());
        }
        small_file::frame(CHECKPOINT_MAGIC, CHECKPOINT_FORMAT_VERSION, &body)
    }

    fn parse(file: &Bytes) -> Result<Self, FrameError> {
        let mut fields = Fields(small_file::unframe(CHECKPOINT_MAGIC, CHECKPOINT_FORMAT_VERSION, file)?);
        let applied = RaftIndex::new(fields.u64()?);
        let term = Term::new(fields.u64()?);
        let log_start = Offset::new(fields.i64()?);
        let end_offset_at_applied = Offset::new(fields.i64()?);
        let membership = file.slice_ref(fields.sized()?);
        let machine = file.slice_ref(fields.sized()?);
        let count = fields.u32()? as usize;
        // What is left bounds what is reserved: 20 bytes each.
        if fields.0.len() != count * 20 {
            return Err(FrameError::Invalid("wrong number of epochs"));
        }
        let mut epochs = Vec::with_capacity(count);
        for _ in 0..count {
            epochs.push(EpochStart {
                epoch: LeaderEpoch::new(fields.i32()?),
                index: RaftIndex::new(fields.u64()?),
                offset: Offset::new(fields.i64()?),
            });
        }
        fields.end()?;
        let checkpoint = Self { applied, term, log_start, end_offset_at_applied, membership, machine, epochs };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// What every checkpoint that this program writes fulfils.
    pub(crate) fn check(&self) -> Result<(), FrameError> {
        if self.applied < CREATION_INDEX || self.term.get() > i32::MAX as u64 {
            return Err(FrameError::Invalid("index or term out of range"));
        }
        if self.log_start < Offset::ZERO || self.log_start > self.end_offset_at_applied {
            return Err(FrameError::Invalid("log start out of range"));
        }
        let ascends = |pair: &[EpochStart]| {
            pair[0].epoch < pair[1].epoch && pair[0].index < pair[1].index && pair[0].offset < pair[1].offset
        };
        if !self.epochs.windows(2).all(ascends) {
            return Err(FrameError::Invalid("epochs do not ascend"));
        }
        match self.epochs.last() {
            None if self.applied == CREATION_INDEX => Ok(()),
            Some(last)
                if last.epoch.term() == Some(self.term)
                    && last.index <= self.applied
                    && last.offset < self.end_offset_at_applied =>
            {
                Ok(())
            }
            _ => Err(FrameError::Invalid("the last epoch is not that of the last entry")),
        }
    }

    /// Reads a checkpoint file's bytes; the error says what is wrong with them.
    pub fn decode(file: &Bytes) -> Result<Self, String> {
        Self::parse(file).map_err(|error| match error {
            FrameError::Invalid(detail) => detail.to_owned(),
            FrameError::Newer { found } => format!("format version {found} is newer than {CHECKPOINT_FORMAT_VERSION}"),
        })
    }
}

/// Writes a checkpoint's file; run it on a pool, then give what it returns to
/// [`Log::checkpoint_done`](crate::log::Log::checkpoint_done).
#[derive(Debug)]
pub struct CheckpointJob {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) dir: PathBuf,
    pub(crate) checkpoint: Checkpoint,
    /// Whether it is newer than the newest durable one.
    pub(crate) is_new: bool,
}

/// A checkpoint that was written, or why not.
#[derive(Debug)]
pub struct CheckpointDone {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) written: Result<(), StorageError>,
}

impl CheckpointJob {
    /// Writes, flushes, renames, flushes the folder.
    pub fn run(self) -> CheckpointDone {
        if !self.is_new {
            return CheckpointDone { checkpoint: self.checkpoint, written: Ok(()) };
        }
        let path = self.dir.join(Checkpoint::file_name(self.checkpoint.applied));
        let written = small_file::replace_file(&self.disk, &path, &self.checkpoint.encode())
            .map(|_| ())
            .map_err(StorageError::io("write", &path));
        CheckpointDone { checkpoint: self.checkpoint, written }
    }
}

/// The bytes of a checkpoint file ([`Log::newest_checkpoint_file`](crate::log::Log::newest_checkpoint_file)), whole: they
/// are checked. Run it on a pool.
///
/// Fails with [`ReadError::Io`] of kind `NotFound` where newer ones took its place meanwhile: ask the log again.
pub fn read_file(disk: &Arc<dyn Disk>, path: &Path) -> Result<Bytes, ReadError> {
    let io = |source| ReadError::Io { path: path.to_owned(), source };
    let file = small_file::read_file(disk, path).map_err(io)?;
    match Checkpoint::decode(&file) {
        Ok(_) => Ok(file),
        Err(detail) => Err(io(io::Error::new(io::ErrorKind::InvalidData, format!("it is rotten ({detail})")))),
    }
}

/// A checkpoint file as it was found.
#[derive(Debug)]
pub(crate) enum Found {
    Valid(Box<Checkpoint>),
    Rotten(String),
}

pub(crate) fn read(disk: &Arc<dyn Disk>, dir: &Path, applied: RaftIndex) -> Result<Found, OpenError> {
    let path = dir.join(Checkpoint::file_name(applied));
    let file = match small_file::read_file(disk, &path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(Found::Rotten(error.to_string())),
        Err(source) => return Err(OpenError::Io { action: "open", path, source }),
    };
    match Checkpoint::parse(&file) {
        Ok(checkpoint) if checkpoint.applied == applied => Ok(Found::Valid(Box::new(checkpoint))),
        Ok(_) => Ok(Found::Rotten("its name is not its index".to_owned())),
        Err(FrameError::Invalid(detail)) => Ok(Found::Rotten(detail.to_owned())),
        Err(FrameError::Newer { found }) => {
            Err(OpenError::NewerFormat { path, found, known: CHECKPOINT_FORMAT_VERSION })
        }
    }
}
