//! Who waits for what: answers for their index to be committed, reads for the high watermark to pass.

use std::collections::VecDeque;

use flowstone_protocol::{Error, ErrorCode, Offset, RaftIndex};

use crate::effects::Answer;
use crate::machine::Machine;
use crate::reply::{Permit, Reply};
use crate::request::{Produced, ReadAnswer, ReadRequest};

/// An answer that waits.
#[derive(Debug)]
pub(crate) enum Waiting<M: Machine> {
    Produce { reply: Reply<Result<Produced, Error>>, produced: Produced, permit: Permit },
    Command { reply: Reply<Result<M::Reply, Error>>, answer: M::Reply },
    Trim { reply: Reply<Result<Offset, Error>>, to: Offset },
    Marker { reply: Reply<Result<(), Error>> },
    Membership { reply: Reply<Result<(), Error>> },
}

impl<M: Machine> Waiting<M> {
    fn answered(self, log_start: Offset) -> Answer<M> {
        match self {
            Self::Produce { reply, produced, permit } => Answer::Produce { reply, result: Ok(produced), permit },
            Self::Command { reply, answer } => Answer::Command { reply, result: Ok(answer) },
            Self::Trim { reply, to } => Answer::Trim { reply, result: Ok(log_start.max(to)) },
            Self::Marker { reply } => Answer::Marker { reply, result: Ok(()) },
            Self::Membership { reply } => Answer::ChangeMembership { reply, result: Ok(()) },
        }
    }

    fn failed(self, error: Error) -> Answer<M> {
        match self {
            Self::Produce { reply, permit, .. } => Answer::Produce { reply, result: Err(error), permit },
            Self::Command { reply, .. } => {
                let mut error = error;
                if error.code == ErrorCode::NotLeader {
                    // Records know their own by producer and sequence, a command does not: asked of the next leader it would
                    // be done twice, or told that it cannot be.
                    (error.code, error.kind) = (ErrorCode::TimedOut, ErrorCode::TimedOut.kind());
                }
                Answer::Command { reply, result: Err(error) }
            }
            Self::Trim { reply, .. } => Answer::Trim { reply, result: Err(error) },
            Self::Marker { reply } => Answer::Marker { reply, result: Err(error) },
            Self::Membership { reply } => Answer::ChangeMembership { reply, result: Err(error) },
        }
    }
}

/// Answers that wait for their entry, in the order of the log. They all belong to the term that is led: whoever loses it
/// fails them all.
#[derive(Debug)]
pub(crate) struct Parked<M: Machine> {
    /// For the entry to be committed and applied.
    committed: VecDeque<(RaftIndex, Waiting<M>)>,
    /// For the leader's own disk alone.
    persisted: VecDeque<(RaftIndex, Waiting<M>)>,
    /// Room that is taken by entries which are answered already, and not committed.
    permits: VecDeque<(RaftIndex, Permit)>,
}

impl<M: Machine> Default for Parked<M> {
    fn default() -> Self {
        Self { committed: VecDeque::new(), persisted: VecDeque::new(), permits: VecDeque::new() }
    }
}

impl<M: Machine> Parked<M> {
    /// Gives back the room of those that waited.
    pub(crate) fn shed(&mut self) {
        self.committed.shrink_to_fit();
        self.persisted.shrink_to_fit();
        self.permits.shrink_to_fit();
    }

    pub(crate) fn park(&mut self, index: RaftIndex, only_persisted: bool, waiting: Waiting<M>) {
        let queue = if only_persisted { &mut self.persisted } else { &mut self.committed };
        // Nearly always at the end; a duplicate waits for an entry further up front, after those who came before.
        let at = match queue.back() {
            Some((last, _)) if *last > index => queue.partition_point(|(other, _)| *other <= index),
            _ => queue.len(),
        };
        queue.insert(at, (index, waiting));
    }

    /// Keeps the room of an entry until it is committed, whenever it is answered: what is appended and not committed is
    /// kept in memory.
    pub(crate) fn keep(&mut self, index: RaftIndex, permit: Permit) {
        self.permits.push_back((index, permit));
    }

    pub(crate) fn len(&self) -> usize {
        self.committed.len()
    }

    pub(crate) fn answer_applied(&mut self, applied: RaftIndex, log_start: Offset, answers: &mut Vec<Answer<M>>) {
        answer(&mut self.committed, applied, log_start, answers);
        // Whatever is committed is good enough for those, too.
        answer(&mut self.persisted, applied, log_start, answers);
        while self.permits.pop_front_if(|(index, _)| *index <= applied).is_some() {}
    }

    pub(crate) fn answer_persisted(&mut self, persisted: RaftIndex, answers: &mut Vec<Answer<M>>) {
        answer(&mut self.persisted, persisted, Offset::ZERO, answers);
    }

    pub(crate) fn fail_all(&mut self, error: &Error, answers: &mut Vec<Answer<M>>) {
        self.permits.clear();
        for queue in [&mut self.committed, &mut self.persisted] {
            answers.extend(queue.drain(..).map(|(_, waiting)| waiting.failed(error.clone())));
        }
    }
}

fn answer<M: Machine>(
    queue: &mut VecDeque<(RaftIndex, Waiting<M>)>,
    up_to: RaftIndex,
    log_start: Offset,
    answers: &mut Vec<Answer<M>>,
) {
    while queue.front().is_some_and(|(index, _)| *index <= up_to) {
        let (_, waiting) = queue.pop_front().expect("it was there a line ago");
        answers.push(waiting.answered(log_start));
    }
}

type WaitingRead = (ReadRequest, Reply<Result<ReadAnswer, Error>>);

/// Reads that wait at the end of a log.
#[derive(Debug)]
pub(crate) struct ParkedReads {
    reads: Vec<WaitingRead>,
    reads_max: usize,
}

impl ParkedReads {
    pub(crate) fn new(reads_max: usize) -> Self {
        Self { reads: Vec::new(), reads_max }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.reads.is_empty()
    }

    /// Parks a read; gives the reply back when too many wait, those who left not counted.
    pub(crate) fn park(
        &mut self,
        request: ReadRequest,
        reply: Reply<Result<ReadAnswer, Error>>,
    ) -> Result<(), Reply<Result<ReadAnswer, Error>>> {
        if self.reads.len() >= self.reads_max {
            self.drop_abandoned();
            if self.reads.len() >= self.reads_max {
                return Err(reply);
            }
        }
        self.reads.push((request, reply));
        Ok(())
    }

    pub(crate) fn drop_abandoned(&mut self) {
        self.reads.retain(|(_, reply)| !reply.is_abandoned());
        if self.reads.is_empty() {
            self.reads = Vec::new();
        }
    }

    /// Those for which there is something below the high watermark now, or below the last stable offset where they want
    /// no more.
    pub(crate) fn take_below(&mut self, high_watermark: Offset, last_stable_offset: Offset) -> Vec<WaitingRead> {
        let has_something =
            |request: &ReadRequest| request.from < if request.committed { last_stable_offset } else { high_watermark };
        if self.reads.iter().all(|(request, _)| has_something(request)) {
            return std::mem::take(&mut self.reads);
        }
        self.reads.extract_if(.., |(request, _)| has_something(request)).collect()
    }

    /// Those that only a leader may answer.
    pub(crate) fn fail_leaders<M: Machine>(&mut self, error: &Error, answers: &mut Vec<Answer<M>>) {
        let leaders = self.reads.extract_if(.., |(request, _)| !request.any_replica);
        answers.extend(leaders.map(|(_, reply)| Answer::Read { reply, result: Err(error.clone()) }));
    }

    pub(crate) fn fail_all<M: Machine>(&mut self, error: &Error, answers: &mut Vec<Answer<M>>) {
        answers.extend(self.reads.drain(..).map(|(_, reply)| Answer::Read { reply, result: Err(error.clone()) }));
    }
}
