//! What a segment file holds, batch by batch: for people who look at one.

use std::io;
use std::path::Path;
use std::sync::Arc;

use flowstone_protocol::{BatchHeader, ControlType, LeaderEpoch, RaftIndex};

use crate::checkpoint::{CREATION_INDEX, CREATION_TERM};
use crate::disk::{Disk, OpenMode};
use crate::segment::SegmentName;
use crate::walk::{Step, Walker};

/// One batch of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InspectedBatch {
    /// Byte position in the file.
    pub position: u64,
    /// Its Raft index.
    pub index: RaftIndex,
    /// Its header.
    pub header: BatchHeader,
    /// Its type, if it is a control batch of the log's own.
    pub control: Option<ControlType>,
}

/// Where a segment's batches end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InspectedEnd {
    /// At the file's end, but for this many bytes of zeros.
    Clean {
        /// Byte position after the last batch.
        position: u64,
        /// Zeros from there to the file's end.
        zeros: u64,
    },
    /// At bytes that are no batch of this segment.
    Bad {
        /// Byte position of the first of them.
        position: u64,
        /// What is wrong.
        detail: String,
    },
}

/// The batches of a segment file, in order; the first thing that is wrong ends them.
#[derive(Debug)]
pub struct SegmentInspector {
    name: SegmentName,
    walker: Walker,
    end: Option<InspectedEnd>,
}

impl SegmentInspector {
    /// Opens a segment file; its name says with which offset and index it begins. The file is only read.
    pub fn open(disk: &Arc<dyn Disk>, path: &Path) -> io::Result<Self> {
        let name = path.file_name().and_then(|name| name.to_str()).and_then(SegmentName::of_log_file);
        let Some(name) = name else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not named like a segment, <20 digits>-<20 digits>.log", path.display()),
            ));
        };
        let file = disk.open(path, OpenMode::Read)?;
        let len = file.len()?;
        let epoch =
            (name.first_index == CREATION_INDEX.next()).then(|| LeaderEpoch::from_term(CREATION_TERM)).flatten();
        let walker = Walker::new(file, len, 0, name.base_offset, name.first_index, epoch);
        Ok(Self { name, walker, end: None })
    }

    /// What the file is called.
    pub fn name(&self) -> SegmentName {
        self.name
    }

    /// How the batches ended; `None` before they did.
    pub fn end(&self) -> Option<&InspectedEnd> {
        self.end.as_ref()
    }
}

impl Iterator for SegmentInspector {
    type Item = io::Result<InspectedBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.end.is_some() {
            return None;
        }
        let (position, index) = (self.walker.position, self.walker.index);
        let step = match self.walker.step() {
            Ok(step) => step,
            Err(error) => {
                self.end = Some(InspectedEnd::Bad { position, detail: error.to_string() });
                return Some(Err(error));
            }
        };
        self.end = match step {
            Step::Batch { header, position, control } => {
                let control = control.and_then(ControlType::from_id);
                return Some(Ok(InspectedBatch { position, index, header, control }));
            }
            Step::Clean => Some(InspectedEnd::Clean { position, zeros: self.walker.len - position }),
            Step::Bad { detail } => Some(InspectedEnd::Bad { position, detail }),
            Step::Newer { ctype } => {
                let detail = format!("a control batch of type {ctype}, which this program does not know");
                Some(InspectedEnd::Bad { position, detail })
            }
        };
        None
    }
}
