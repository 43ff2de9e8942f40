//! How long records are kept: the leader proposes a new log start, every replica applies it, and each removes its own
//! files once a durable checkpoint no longer needs them.

use std::time::Duration;

use flowstone_protocol::{Offset, Timestamp};

use crate::checkpoint::Checkpoint;
use crate::error::StorageError;
use crate::log::Log;

/// What a topic's retention allows; `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionConfig {
    /// Records older than this (by their own timestamps, whole segments at a time) may go.
    pub time: Option<Duration>,
    /// The oldest segments may go while the rest still holds this many bytes.
    pub bytes: Option<u64>,
}

impl Log {
    /// Where retention would have the log start, if that is further on than it does. Only whole sealed segments, all
    /// committed, go; the caller proposes a log-start control batch (no replica's state depends on its own clock).
    pub fn retention_target(&self, retention: &RetentionConfig, now: Timestamp) -> Option<Offset> {
        let live = || self.sealed.iter().skip_while(|segment| segment.end_offset <= self.log_start);
        let mut bytes = live().map(|segment| segment.bytes).sum::<u64>() + self.active.end;
        let mut target = None;
        for segment in live().take_while(|segment| segment.end_offset <= self.high_watermark) {
            let is_old = retention.time.is_some_and(|time| segment.max_timestamp.after(time) < now);
            let is_too_much = retention.bytes.is_some_and(|kept| bytes - segment.bytes >= kept);
            if !is_old && !is_too_much {
                break;
            }
            bytes -= segment.bytes;
            target = Some(segment.end_offset);
        }
        target
    }

    /// Whether there is anything that retention could let go by now, or that could be closed for its age: a log of one
    /// segment has nothing until then.
    pub fn may_retain(&self, now: Timestamp) -> bool {
        let is_due = |born: Timestamp| {
            // A clock that was ahead is noticed by whoever closes it.
            born > now || self.config.segment_age.is_some_and(|age| born.after(age) <= now)
        };
        !self.sealed.is_empty() || self.active.born.is_some_and(is_due)
    }

    /// A log-start control batch was applied: readers see nothing below `offset` from now on. Never moves back, nor
    /// past the high watermark.
    pub fn set_log_start(&mut self, offset: Offset) {
        self.log_start = self.log_start.max(offset.min(self.high_watermark));
    }

    /// Removes the segments of which the newest durable checkpoint needs nothing: all below its log start, all applied
    /// in it. The checkpoint before it goes where it would need them: room is worth more than a spare. Returns how many
    /// segments were removed; a failure leaves the rest for the next time.
    pub fn delete_segments_below_checkpoint(&mut self) -> Result<usize, StorageError> {
        let mut removed = 0;
        while let Some(segment) = self.sealed.front() {
            let is_needed = segment.end_offset > self.checkpoint.log_start
                || segment.end_index > self.checkpoint.applied.next()
                || self.unflushed_sealed.iter().any(|(name, _)| *name == segment.name);
            if is_needed {
                break;
            }
            if let Some(spare) = self.spare_checkpoint.take_if(|spare| segment.end_index > spare.next()) {
                // Where this fails it is found to be of no use at the next opening.
                let _ = self.disk.remove_file(&self.dir.join(Checkpoint::file_name(spare)));
            }
            if removed == 0 && (self.dir_changed || self.flush_in_flight) {
                // The segments that stay must not be lost by a power failure that these removals survive.
                self.disk.sync_dir(&self.dir).map_err(StorageError::io("flush", &self.dir))?;
            }
            // First: nothing may give these names to files again.
            segment.files.retire();
            self.remove_segment_files(segment.name)?;
            self.compaction.cleaned_segments -= usize::from(segment.name.is_cleaned());
            self.sealed.pop_front();
            removed += 1;
        }
        if removed > 0 {
            let first = self.oldest_segment().first_index;
            let kept_from = self.epochs.partition_point(|start| start.index < first).saturating_sub(1);
            self.epochs.drain(..kept_from);
            self.index_blocks.retain(|((segment, _), _)| *segment >= first);
        }
        Ok(removed)
    }
}
