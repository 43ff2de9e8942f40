//! `flowstone debug`: looks into files, without a broker.

use crate::args::Common;
use crate::failure::{Failure, Outcome};
use crate::moment;
use crate::output::{self, Row, Shown};
use clap::Subcommand;
use flowstone_broker::storage::disk::{Disk, RealDisk};
use flowstone_broker::storage::inspect::{InspectedBatch, InspectedEnd, SegmentInspector};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Look into files
#[derive(Debug, Subcommand)]
pub(crate) enum DebugCommand {
    /// The batches of a segment file, up to the first fault; exit 1 where there is one
    Segment {
        /// The file, `<base offset>-<first index>.log`
        file: PathBuf,
    },
}

#[derive(Serialize)]
struct Segment {
    file: String,
    batches: Vec<Batch>,
    /// Where the batches end, in bytes.
    end_position: u64,
    /// Zeros behind them: room taken ahead.
    zeros: u64,
    /// What is at the end if not zeros.
    fault: Option<String>,
}

#[derive(Serialize)]
struct Batch {
    /// Bytes from the file's beginning.
    position: u64,
    bytes: u64,
    /// Raft index.
    index: u64,
    base_offset: i64,
    last_offset: i64,
    leader_epoch: i32,
    records: i32,
    /// A batch of the log's own.
    control: bool,
    /// `data`, or the type of the control batch.
    kind: String,
    compression: String,
    /// Milliseconds since 1970.
    base_timestamp: i64,
    max_timestamp: i64,
    producer_id: i64,
    producer_epoch: i16,
    base_sequence: i32,
    crc: u32,
}

impl Batch {
    fn new(batch: &InspectedBatch) -> Batch {
        let header = &batch.header;
        let control = header.attributes.is_control();
        Batch {
            position: batch.position,
            bytes: header.total_bytes() as u64,
            index: batch.index.get(),
            base_offset: header.base_offset.get(),
            last_offset: header.last_offset().get(),
            leader_epoch: header.leader_epoch.get(),
            records: header.record_count,
            control,
            kind: match batch.control {
                Some(kind) => format!("{kind:?}"),
                None if control => "control".to_owned(),
                None => "data".to_owned(),
            },
            compression: header
                .attributes
                .compression()
                .map_or_else(|_| "unknown".to_owned(), |codec| codec.to_string()),
            base_timestamp: header.base_timestamp.get(),
            max_timestamp: header.max_timestamp.get(),
            producer_id: header.producer_id.get(),
            producer_epoch: header.producer_epoch.get(),
            base_sequence: header.base_sequence.get(),
            crc: header.crc,
        }
    }
}

impl Row for Batch {
    const HEADINGS: &'static [&'static str] = &[
        "POSITION",
        "BYTES",
        "INDEX",
        "OFFSETS",
        "EPOCH",
        "RECORDS",
        "KIND",
        "CODEC",
        "MAX-TIMESTAMP",
        "PRODUCER",
        "SEQUENCE",
        "CRC",
    ];
    const NARROW: usize = 9;

    fn cells(&self) -> Vec<String> {
        let time = if self.max_timestamp < 0 { "-".to_owned() } else { moment::rfc3339(self.max_timestamp) };
        let producer =
            if self.producer_id < 0 { "-".to_owned() } else { format!("{}/{}", self.producer_id, self.producer_epoch) };
        vec![
            self.position.to_string(),
            self.bytes.to_string(),
            self.index.to_string(),
            format!("{}..={}", self.base_offset, self.last_offset),
            self.leader_epoch.to_string(),
            self.records.to_string(),
            self.kind.clone(),
            self.compression.clone(),
            time,
            producer,
            self.base_sequence.to_string(),
            format!("{:08x}", self.crc),
        ]
    }

    fn name(&self) -> String {
        self.position.to_string()
    }
}

impl Shown for Segment {
    fn table(&self, wide: bool) -> String {
        let records: i64 =
            self.batches.iter().filter(|batch| !batch.control).map(|batch| i64::from(batch.records)).sum();
        format!(
            "{}\n{}",
            output::table_of(&self.batches, wide),
            output::pairs([
                ("batches", self.batches.len().to_string()),
                ("records", records.to_string()),
                ("end", format!("{}, zeros behind it: {}", self.end_position, self.zeros)),
            ])
        )
    }

    fn name(&self) -> String {
        self.file.clone()
    }
}

pub(crate) fn run(command: &DebugCommand, common: &Common) -> Outcome {
    let DebugCommand::Segment { file } = command;
    let segment = read(file).map_err(|error| Failure::failed(format!("cannot read {}: {error}", file.display())))?;
    output::print(common.output, &segment)?;
    match segment.fault {
        None => Ok(()),
        Some(fault) => Err(Failure::failed(format!(
            "{}: at byte {}: {fault}; what is before it is sound",
            segment.file, segment.end_position
        ))),
    }
}

fn read(file: &Path) -> std::io::Result<Segment> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(1));
    let mut inspector = SegmentInspector::open(&disk, file)?;
    let mut batches = Vec::new();
    for batch in inspector.by_ref() {
        batches.push(Batch::new(&batch?));
    }
    let (end_position, zeros, fault) = match inspector.end() {
        Some(InspectedEnd::Bad { position, detail }) => (*position, 0, Some(detail.clone())),
        Some(InspectedEnd::Clean { position, zeros }) => (*position, *zeros, None),
        None => (0, 0, None),
    };
    Ok(Segment { file: file.display().to_string(), batches, end_position, zeros, fault })
}
