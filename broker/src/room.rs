//! Watches the data directory's file system: below a floor producing is refused before a write fails, and taken up again
//! when there is room.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use flowstone_protocol::{Error, ErrorCode};
use flowstone_storage::Disk;
use tokio::time::MissedTickBehavior;

/// How often the file system is asked: rarely enough to cost nothing, and a burst of a gigabyte per second still meets the
/// log's own check (`DISK_FULL` by its reservation).
const INTERVAL: Duration = Duration::from_millis(500);

/// Whether there is room.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    state: Arc<RoomState>,
}

#[derive(Debug)]
struct RoomState {
    free_bytes_min: u64,
    free_bytes: AtomicU64,
    total_bytes: AtomicU64,
    full: AtomicBool,
}

impl Room {
    pub(crate) fn new(free_bytes_min: u64) -> Self {
        let state = RoomState {
            free_bytes_min,
            free_bytes: AtomicU64::new(u64::MAX),
            total_bytes: AtomicU64::new(0),
            full: AtomicBool::new(false),
        };
        Self { state: Arc::new(state) }
    }

    /// Asks once: `free` is what the file system has.
    pub(crate) fn observe(&self, free: u64) {
        self.state.free_bytes.store(free, Ordering::Relaxed);
        let full = free < self.state.free_bytes_min;
        if self.state.full.swap(full, Ordering::Relaxed) != full {
            if full {
                tracing::error!(
                    free_bytes = free,
                    min = self.state.free_bytes_min,
                    "the disk is full: producing stops"
                );
            } else {
                tracing::info!(free_bytes = free, "the disk has room again: producing goes on");
            }
        }
    }

    /// # Errors
    /// `DISK_FULL` while there is no room.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if !self.is_full() {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::DiskFull,
            format!(
                "the broker's disk has {} bytes left, below storage.free_bytes_min ({}): nothing is written until there is \
                 room; free some, lower retention.ms or retention.bytes, or delete topics. Reading goes on",
                self.free_bytes(),
                self.state.free_bytes_min
            ),
        ))
    }

    pub(crate) fn is_full(&self) -> bool {
        self.state.full.load(Ordering::Relaxed)
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        self.state.free_bytes.load(Ordering::Relaxed)
    }

    /// Of the whole file system; 0 while it was not asked.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.state.total_bytes.load(Ordering::Relaxed)
    }

    /// Asks again and again, until aborted.
    pub(crate) async fn watch(self, disk: Arc<dyn Disk>, path: PathBuf) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let (disk, path) = (Arc::clone(&disk), path.clone());
            // Asking may wait for a sick disk: not on this runtime's thread.
            let asking = tokio::task::spawn_blocking(move || {
                let total = rustix::fs::statvfs(&path).map_or(0, |stat| stat.f_blocks.saturating_mul(stat.f_frsize));
                (disk.available_bytes(&path), total)
            });
            if let Ok((Ok(free), total)) = asking.await {
                self.state.total_bytes.store(total, Ordering::Relaxed);
                self.observe(free);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_below_the_floor_and_takes_up_again() {
        let room = Room::new(100);
        assert!(room.check().is_ok());
        room.observe(99);
        let error = room.check().expect_err("full");
        assert_eq!(error.code, ErrorCode::DiskFull);
        assert!(error.message.contains("99 bytes left"), "{}", error.message);
        room.observe(100);
        assert!(room.check().is_ok());
    }
}
