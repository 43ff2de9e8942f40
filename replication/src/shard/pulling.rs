//! Ranges of committed entries that are given to other brokers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use flowstone_protocol::{Error, ErrorCode};
use flowstone_storage::checkpoint;

use super::{Message, Shard, State};
use crate::machine::Machine;
use crate::replica::read_error;
use crate::reply::Reply;
use crate::transport::{PullAnswer, PullRequest, PullWhat};
use crate::workers::JobKind;

impl<M: Machine> Shard<M> {
    /// Reads a range for another broker, on a pool. `OFFSET_OUT_OF_RANGE` says that the log does not begin early enough.
    pub(super) fn on_serve_pull(&mut self, request: PullRequest, reply: Reply<Result<PullAnswer, Error>>) {
        let partition = request.tp.partition;
        let refuse = |code, message: String| Error::new(code, message).with_partition(partition);
        let index = self.by_partition.get(&request.tp).copied();
        let Some((index, State::Running(replica))) = index.map(|index| (index, &self.slots[index as usize].state))
        else {
            let message = "this broker has no open replica of the partition; ask another".to_owned();
            return reply.send(Err(refuse(ErrorCode::NotLeader, message)));
        };
        let log = replica.log();
        let committed = log.committed_index();
        let job: Box<dyn FnOnce() -> Result<PullAnswer, flowstone_storage::ReadError> + Send> = match request.what {
            PullWhat::Checkpoint => {
                let (disk, (_, path)) = (Arc::clone(&self.disk), log.newest_checkpoint_file());
                let (first_index, first_offset) = (log.first_index(), log.first_offset());
                Box::new(move || {
                    let bytes = checkpoint::read_file(&disk, &path)?;
                    Ok(PullAnswer::Checkpoint { bytes, first_index, first_offset })
                })
            }
            PullWhat::Batches { first, .. } if first < log.first_index() => {
                let message = format!("the log begins at entry {}, and {first} was asked for", log.first_index());
                return reply.send(Err(refuse(ErrorCode::OffsetOutOfRange, message)));
            }
            PullWhat::Batches { first, .. } if first > committed => {
                let message = format!("entry {first} is not known to be committed here; ask another, or later");
                return reply.send(Err(refuse(ErrorCode::NotLeader, message)));
            }
            PullWhat::Batches { first, last, max_bytes } => {
                match log.range(first, last.min(committed), max_bytes as usize) {
                    Ok(ticket) => Box::new(move || {
                        let range = ticket.run()?;
                        Ok(PullAnswer::Batches { bytes: range.bytes, next: range.next, commit: committed })
                    }),
                    Err(error) => return reply.send(Err(refuse(ErrorCode::StorageFailed, error.to_string()))),
                }
            }
        };
        drop(log);
        let waiting = match self.wait_for_disk() {
            Ok(waiting) => waiting,
            Err(error) => return reply.send(Err(error.with_partition(partition))),
        };
        let (port, slot) = (Arc::clone(&self.port), self.key(index));
        self.workers.submit(
            JobKind::Read,
            Box::new(move || {
                let answer = job();
                if let Ok(PullAnswer::Checkpoint { bytes, .. } | PullAnswer::Batches { bytes, .. }) = &answer {
                    port.counters.served_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                }
                if let Err(flowstone_storage::ReadError::Corrupt { offset, .. }) = &answer {
                    drop(port.inbox.report(Message::Corrupt { slot, offset: *offset }));
                }
                reply.send(answer.map_err(|error| read_error(&error).with_partition(partition)));
                waiting.fetch_sub(1, Ordering::Relaxed);
            }),
        );
    }
}
