//! Compaction in the background: one log of a shard at a time, a piece at a time, at a bounded rate.
//!
//! Nothing waits for it, and it waits for nobody: where a replica ends in the middle, what was put in place stays, and the
//! rest is done by another pass.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use flowstone_storage::{Compaction, CompactionStep, StorageError};

use super::{Message, Shard, ShardsConfig, SlotKey, State};
use crate::machine::Machine;
use crate::workers::JobKind;

/// Bytes of one piece.
const PIECE_BYTES_MIN: u64 = 64 << 10;
const PIECE_BYTES_MAX: u64 = 1 << 20;
/// Replicas looked at in one go.
const REPLICAS_AT_ONCE: usize = 1_024;
/// Between two looks at so many.
const NEXT_REPLICAS_AFTER: Duration = Duration::from_millis(10);

/// Where a shard's compaction is.
#[derive(Debug)]
pub(super) struct Compacting {
    bytes_per_second: u64,
    memory_bytes: u64,
    every: Duration,
    seed: u64,
    /// `None` while a piece is worked on, and where nothing is compacted.
    at: Option<Instant>,
    round_began: Instant,
    slot: u32,
    /// The pass that goes on at that time.
    pass: Option<(SlotKey, Box<Compaction>)>,
    /// Bytes that no pass has looked at, and all bytes, of the logs of this round so far.
    dirty: (u64, u64),
}

impl Compacting {
    pub(super) fn new(config: &ShardsConfig, now: Instant) -> Self {
        let first = now + config.compaction_every;
        Self {
            bytes_per_second: config.compaction_bytes_per_second,
            memory_bytes: config.compaction_memory_bytes,
            every: config.compaction_every,
            seed: config.seed,
            at: (config.compaction_bytes_per_second > 0).then_some(first),
            round_began: first,
            slot: 0,
            pass: None,
            dirty: (0, 0),
        }
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.at
    }

    fn piece_bytes(&self) -> u64 {
        (self.bytes_per_second / 8).clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX)
    }
}

impl<M: Machine> Shard<M> {
    /// The next piece, or the next log, if it is time.
    pub(super) fn compact_if_due(&mut self) {
        if self.compacting.at.is_none_or(|at| at > self.now) {
            return;
        }
        if self.stopping.is_some() {
            (self.compacting.at, self.compacting.pass) = (None, None);
            return;
        }
        if let Some((key, pass)) = self.compacting.pass.take() {
            let slot =
                self.slots.get(key.index as usize).filter(|slot| slot.life == key.life && slot.closing.is_none());
            match slot.map(|slot| &slot.state) {
                Some(State::Running(replica)) if replica.log().has_begun(&pass) => {
                    return self.compact_piece(key, pass);
                }
                _ => self.compacting.slot += 1,
            }
        }
        for _ in 0..REPLICAS_AT_ONCE {
            let index = self.compacting.slot;
            let Some(slot) = self.slots.get_mut(index as usize) else {
                // All were looked at: begin again some time later.
                let again = (self.compacting.round_began + self.compacting.every).max(self.now);
                (self.compacting.at, self.compacting.round_began) = (Some(again), again);
                self.compacting.slot = 0;
                let (dirty, total) = std::mem::take(&mut self.compacting.dirty);
                self.port.counters.compaction_dirty_bytes.store(dirty, Ordering::Relaxed);
                self.port.counters.compaction_total_bytes.store(total, Ordering::Relaxed);
                return;
            };
            if let State::Running(replica) = &mut slot.state
                && slot.closing.is_none()
                && replica.log().config().compaction.is_some()
            {
                self.compacting.seed = self.compacting.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let now = (self.clock)();
                let (dirty, total) = replica.log().dirty_bytes();
                self.compacting.dirty.0 += dirty;
                self.compacting.dirty.1 += total;
                let pass = replica.begin_compaction(self.compacting.memory_bytes, self.compacting.seed, now);
                if let Some(pass) = pass {
                    tracing::debug!(tp = %slot.spec.tp, dirty, total, "compaction begins");
                    let key = self.key(index);
                    return self.compact_piece(key, Box::new(pass));
                }
            }
            self.compacting.slot += 1;
        }
        self.compacting.at = Some(self.now + NEXT_REPLICAS_AFTER);
    }

    fn compact_piece(&mut self, slot: SlotKey, mut pass: Box<Compaction>) {
        self.compacting.at = None;
        self.slots[slot.index as usize].jobs += 1;
        let (port, bytes) = (Arc::clone(&self.port), self.compacting.piece_bytes());
        self.workers.submit(
            JobKind::Clean,
            Box::new(move || {
                let stepped = pass.step(bytes);
                drop(port.inbox.report(Message::Compacted { slot, compaction: pass, stepped }));
            }),
        );
    }

    pub(super) fn on_compacted(
        &mut self,
        key: SlotKey,
        mut pass: Box<Compaction>,
        stepped: Result<CompactionStep, StorageError>,
    ) {
        let index = key.index;
        let slot = &mut self.slots[index as usize];
        assert_eq!(slot.life, key.life, "a place is not given away while a job of its replica is in flight");
        slot.jobs -= 1;
        let tp = slot.spec.tp;
        let is_taken = match &mut slot.state {
            State::Running(replica) => replica.compacted(&mut pass),
            _ => false,
        };
        let bytes = stepped.as_ref().map_or(0, |step| step.bytes);
        let counters = &self.port.counters;
        counters.compacted_bytes.fetch_add(bytes, Ordering::Relaxed);
        let pause = Duration::from_secs_f64(bytes as f64 / self.compacting.bytes_per_second.max(1) as f64);
        self.compacting.at = Some(self.now + pause);
        let mut corrupt = None;
        match stepped {
            Ok(step) if is_taken && !step.is_done => self.compacting.pass = Some((key, pass)),
            Ok(_) if is_taken => {
                let totals = pass.totals();
                let freed = totals.bytes_before.saturating_sub(totals.bytes_after);
                counters.compactions.fetch_add(1, Ordering::Relaxed);
                counters.compaction_freed_bytes.fetch_add(freed, Ordering::Relaxed);
                let (before, after) = (totals.bytes_before, totals.bytes_after);
                tracing::debug!(%tp, before, after, files = totals.swaps, "compaction ended");
                self.compacting.slot += 1;
            }
            // It ended, or was opened anew, meanwhile.
            Ok(_) => self.compacting.slot += 1,
            Err(error) => {
                if let StorageError::Corrupt { offset, .. } = &error {
                    corrupt = Some(*offset);
                }
                tracing::warn!(%tp, %error, "a log can not be compacted now; tried again later");
                self.compacting.slot += 1;
            }
        }
        if let Some(offset) = corrupt {
            self.on_corrupt(key, offset);
        }
        self.close_if_idle(index);
        self.drive_pull(index);
    }
}
