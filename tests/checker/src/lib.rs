//! Judges a history: what clients sent, what they were told, what they read, and whether a log that keeps its promises
//! can have done that.
//!
//! ```
//! use std::time::Duration;
//! use flowstone_checker::{History, Isolation, Kind, Offset, PartitionId, SenderKind};
//!
//! let mut history = History::new();
//! let log = history.log("orders", PartitionId::new(0));
//! let sender = history.sender(SenderKind::IDEMPOTENT);
//! let lost = history.send(sender, log, Duration::ZERO);
//! history.acknowledged(lost, Offset::new(1), Duration::from_millis(2));
//!
//! // When all has healed: one reader reads everything.
//! let reader = history.reader(Isolation::ReadUncommitted);
//! history.assigned(reader, log, Offset::new(0));
//! history.read_past(reader, log, Offset::new(2));
//! history.fully_read(log);
//! let verdict = history.judge();
//! assert_eq!(verdict.anomalies[0].kind, Kind::Unseen);
//! ```
//!
//! # How it is used
//! A workload tells a [`History`] each event as it happens, in the order in which it happens: a send before it leaves, its
//! outcome when it is known, a read when the record is there. Operations end *acknowledged*, *failed* (it is certain that
//! nothing was stored or ever will be) or *unknown* (it may be stored now or later); what never ended is unknown. Values are
//! unique: [`History::send`] numbers them, [`payload`] makes bytes of a number and a number of bytes.
//!
//! # What it guarantees
//! - What it finds cannot have happened in a log that keeps its promises: there are no false alarms, whatever was unknown.
//! - Every kind of anomaly in [`Kind`] is found, once there was a reader to see it; what nobody looked at is not judged.
//! - Memory: some 50 bytes for each send, 8 for each offset, none for each further read of an offset.
//!
//! It must never know how a log works inside, nor what time it is: time is an argument.

#![forbid(unsafe_code)]

mod anomaly;
mod history;
mod judge;
mod marks;
mod offsets;
pub mod payload;
mod pipeline;
mod transactions;

pub use flowstone_protocol::{Offset, PartitionId};

pub use anomaly::{Anomaly, Kind, Verdict};
pub use history::{History, Isolation, LogId, Observed, ReaderId, SenderId, SenderKind, ValueId};
pub use marks::{Asked, GroupId, Mark, ObserverId, View};
pub use transactions::{TransactionEnd, TransactionId};
