//! The walk through a segment's bytes, batch by batch: what recovery, rebuilding an index and inspecting share.

use std::io;
use std::sync::Arc;

use flowstone_protocol::batch::verify_crc;
use flowstone_protocol::control::decode_control;
use flowstone_protocol::{
    Attributes, BatchError, BatchHeader, ControlType, HEADER_BYTES, LeaderEpoch, Offset, RaftIndex,
};

use crate::disk::DiskFile;

/// Bytes read at a time, unless a batch is larger.
const WINDOW_BYTES: u64 = 64 << 10;

/// Zeros to compare with and to write.
pub(crate) static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What lies at the walk's position.
#[derive(Debug)]
pub(crate) enum Step {
    /// A whole batch, CRC right, in its place.
    Batch { header: BatchHeader, position: u64, control: Option<i16> },
    /// The file's end, or zeros up to there.
    Clean,
    /// Something else.
    Bad { detail: String },
    /// A control batch, whole, of a type that this program does not know: a newer one wrote it.
    Newer { ctype: i16 },
}

/// Whether a batch's attributes are those of the log's own control batches (transaction markers have more bits).
pub(crate) fn is_own_control(attributes: Attributes) -> bool {
    attributes.is_control() && !attributes.is_transactional()
}

/// A walk, standing before the batch that should have this offset and index.
#[derive(Debug)]
pub(crate) struct Walker {
    file: Arc<dyn DiskFile>,
    /// The file's length.
    pub(crate) len: u64,
    pub(crate) position: u64,
    pub(crate) offset: Offset,
    pub(crate) index: RaftIndex,
    /// The epoch of the batch before; unknown at the beginning of a log whose past is gone.
    pub(crate) epoch: Option<LeaderEpoch>,
    /// Whether the batches are entries of the Raft log, one index each.
    is_raft: bool,
    window: Vec<u8>,
    window_at: u64,
}

impl Walker {
    pub(crate) fn new(
        file: Arc<dyn DiskFile>,
        len: u64,
        position: u64,
        offset: Offset,
        index: RaftIndex,
        epoch: Option<LeaderEpoch>,
    ) -> Self {
        Self { file, len, position, offset, index, epoch, is_raft: true, window: Vec::new(), window_at: 0 }
    }

    /// The same through a cleaned segment, whose batches have no index.
    pub(crate) fn of_cleaned(mut self) -> Self {
        self.is_raft = false;
        self
    }

    /// The bytes of the batch that was stepped over last, which was at `position`.
    pub(crate) fn batch_at(&mut self, position: u64, bytes: usize) -> io::Result<&[u8]> {
        self.bytes(position, bytes as u64)
    }

    /// Looks at what lies here, and steps over it if it is a batch.
    pub(crate) fn step(&mut self) -> io::Result<Step> {
        let left = self.len.saturating_sub(self.position);
        if left == 0 {
            return Ok(Step::Clean);
        }
        let head_bytes = left.min(HEADER_BYTES as u64);
        let position = self.position;
        let head = self.bytes(position, head_bytes)?;
        if head == &ZEROS[..head.len()] {
            return Ok(match self.first_nonzero()? {
                None => Step::Clean,
                Some(at) => Step::Bad { detail: format!("zeros, then other bytes at position {at}") },
            });
        }
        let header = match BatchHeader::parse(head) {
            Ok(header) => header,
            Err(error) => return Ok(Step::Bad { detail: error.to_string() }),
        };
        let batch_bytes = header.total_bytes() as u64;
        if batch_bytes > left {
            return Ok(Step::Bad { detail: format!("a batch of {batch_bytes} bytes where {left} are left") });
        }
        let (offset, index, epoch) = (self.offset, self.index, self.epoch);
        let is_raft = self.is_raft;
        let batch = self.bytes(position, batch_bytes)?;
        let control = match check_placed(batch, &header, offset, is_raft.then_some(index), epoch) {
            Ok(control) => control,
            Err(Wrong::Newer { ctype }) => return Ok(Step::Newer { ctype }),
            Err(Wrong::Bad(detail)) => return Ok(Step::Bad { detail }),
        };
        self.position += batch_bytes;
        self.offset = header.next_offset();
        self.index = index.next();
        self.epoch = Some(header.leader_epoch);
        Ok(Step::Batch { header, position, control })
    }

    fn first_nonzero(&mut self) -> io::Result<Option<u64>> {
        let mut at = self.position;
        while at < self.len {
            let count = (self.len - at).min(WINDOW_BYTES);
            let bytes = self.bytes(at, count)?;
            if bytes != &ZEROS[..bytes.len()] {
                let within = bytes.iter().position(|byte| *byte != 0).unwrap_or(0);
                return Ok(Some(at + within as u64));
            }
            at += count;
        }
        Ok(None)
    }

    /// `count` bytes at `at`, all within the file's length.
    fn bytes(&mut self, at: u64, count: u64) -> io::Result<&[u8]> {
        let window_end = self.window_at + self.window.len() as u64;
        if at < self.window_at || at + count > window_end {
            let want = count.max(WINDOW_BYTES).min(self.len - at);
            // Bounded by the file's own length, checked by the caller.
            self.window.resize(usize::try_from(want).map_err(io::Error::other)?, 0);
            self.window_at = at;
            if let Err(error) = self.file.read_exact_at(&mut self.window, at) {
                self.window.clear();
                return Err(error);
            }
        }
        let from = (at - self.window_at) as usize;
        Ok(&self.window[from..from + count as usize])
    }
}

/// Why a batch is not the one that belongs somewhere.
pub(crate) enum Wrong {
    Bad(String),
    /// It is whole; a newer program wrote it.
    Newer {
        ctype: i16,
    },
}

impl Wrong {
    /// What is wrong with the bytes; nothing where only a newer program understands them.
    pub(crate) fn unless_newer(self) -> Result<(), String> {
        match self {
            Self::Bad(detail) => Err(detail),
            Self::Newer { .. } => Ok(()),
        }
    }
}

/// Whether `batch` is the batch that belongs at this offset and index, after one of `epoch`; its control type if it is
/// one of the log's own.
///
/// Offset and epoch lie outside the CRC. The offset must be the next one. The epoch may change only at a no-op, which
/// repeats it inside its CRC; so one flipped bit there never looks like a higher term.
pub(crate) fn check(
    batch: &[u8],
    header: &BatchHeader,
    offset: Offset,
    index: RaftIndex,
    epoch: Option<LeaderEpoch>,
) -> Result<Option<i16>, Wrong> {
    check_placed(batch, header, offset, Some(index), epoch)
}

/// The same; the index is not known in a cleaned segment. The no-ops stay there, so that the epoch is checked all the same.
pub(crate) fn check_placed(
    batch: &[u8],
    header: &BatchHeader,
    offset: Offset,
    index: Option<RaftIndex>,
    epoch: Option<LeaderEpoch>,
) -> Result<Option<i16>, Wrong> {
    verify_crc(batch).map_err(|error| Wrong::Bad(error.to_string()))?;
    if header.base_offset != offset {
        return Err(Wrong::Bad(format!("a batch with base offset {} where {offset} belongs", header.base_offset)));
    }
    let mut control = None;
    let mut is_no_op = false;
    if is_own_control(header.attributes) {
        let record = decode_control(batch).map_err(|error| match error {
            BatchError::UnknownControlType { ctype } => Wrong::Newer { ctype },
            error => Wrong::Bad(error.to_string()),
        })?;
        if let Some(index) = index.filter(|index| *index != record.index) {
            return Err(Wrong::Bad(format!("a control batch of entry {} where {index} belongs", record.index)));
        }
        control = Some(record.ctype.id());
        is_no_op = record.ctype == ControlType::NoOp;
    }
    let epoch_is_right = match epoch {
        Some(epoch) if is_no_op => header.leader_epoch >= epoch,
        Some(epoch) => header.leader_epoch == epoch,
        None => true,
    };
    if epoch_is_right {
        Ok(control)
    } else {
        let epoch = epoch.unwrap_or(LeaderEpoch::NONE);
        Err(Wrong::Bad(format!("a batch with leader epoch {} after epoch {epoch}", header.leader_epoch)))
    }
}
