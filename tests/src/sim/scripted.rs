//! What a scenario does with transactions and offsets by itself, one step after the other. It writes to the compacted topic,
//! which the history of readers knows nothing of.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use flowstone_broker::simulation::Answered;
use flowstone_protocol::{
    BatchHeader, Compression, Error, ErrorCode, LeaderEpoch, Marker, Offset, ProducerEpoch, ProducerId,
    RecordBatchBuilder, Sequence,
};
use flowstone_replication::{Acks, Reply};

use super::clients::{Client, Request};
use super::group_coordinators::Committing;
use super::groups::Kind;
use super::outbox::Answer;
use super::scenario::SOON;
use super::transactions::Ask;
use super::world::World;

/// Who writes in a transaction: its id and epoch.
pub type Owner = (ProducerId, ProducerEpoch);

fn owner_from(answer: Answer) -> Result<Owner, ErrorCode> {
    match answer {
        Answer::Asked(Ok(Answered::Producer { producer, epoch })) => Ok((producer, epoch)),
        Answer::Asked(Err(error)) => Err(error.code),
        other => unreachable!("no coordinator answers {other:?}"),
    }
}

fn offset_from(answer: Answer) -> Result<Offset, ErrorCode> {
    match answer {
        Answer::Produced(Ok(produced)) => Ok(produced.base_offset),
        Answer::Produced(Err(error)) => Err(error.code),
        other => unreachable!("no partition answers {other:?}"),
    }
}

/// Whether the same is to be asked again.
fn passes(answer: &Answer) -> bool {
    match answer {
        Answer::Lost | Answer::NotTaken | Answer::Asked(Ok(Answered::Busy)) => true,
        Answer::Asked(Err(error)) | Answer::Produced(Err(error)) => error.is_retriable(),
        _ => false,
    }
}

impl World {
    /// The partition of this kind.
    fn partition_of(&self, kind: Kind) -> usize {
        self.group_with(kind).expect("the plan has such a topic")
    }

    /// Asks the leader of a partition, again and again until it is answered with something that stays so.
    fn ask_until_answered(&mut self, group: usize, request: &Request) -> Answer {
        let until = self.now + SOON;
        loop {
            assert!(self.now < until, "not answered within {SOON:?}: {request:?}: {:?}", self.broken());
            let broker = self.wait_for_leader(group);
            let client = self.clients.len();
            self.add_client(Client::Script { answer: None });
            self.ask(client, group, broker, request.clone(), 0, None);
            self.run_until(until, |world| matches!(&world.clients[client], Client::Script { answer: Some(_) }));
            let asked = std::mem::replace(&mut self.clients[client], Client::Script { answer: None });
            if let Client::Script { answer: Some(answer) } = asked
                && !passes(&answer)
            {
                return answer;
            }
            self.run_for(Duration::from_millis(20));
        }
    }

    /// A producer begins to use a transactional id.
    ///
    /// # Errors
    /// What it is told.
    pub fn begin_with(&mut self, id: &str) -> Result<Owner, ErrorCode> {
        let request = Request::Ask(Ask::Init { id: id.to_owned() });
        owner_from(self.ask_until_answered(self.partition_of(Kind::Transactions), &request))
    }

    /// It ends its transaction, and is given its next epoch.
    ///
    /// # Errors
    /// What it is told.
    pub fn end_with(&mut self, id: &str, owner: Owner, commit: bool) -> Result<Owner, ErrorCode> {
        let request = Request::Ask(Ask::End { id: id.to_owned(), owner, commit });
        owner_from(self.ask_until_answered(self.partition_of(Kind::Transactions), &request))
    }

    fn one_record(&self, owner: Owner, sequence: i32, is_transactional: bool) -> (Bytes, BatchHeader) {
        let mut builder =
            RecordBatchBuilder::new(Compression::None).producer(owner.0, owner.1, Sequence::new(sequence));
        if is_transactional {
            builder = builder.transactional();
        }
        let appended = builder.append(self.brokers[0].clock.wall(), Some(b"1"), Some(b"1"), []);
        appended.expect("a record is far below any limit");
        let batch = builder.build();
        let header = BatchHeader::parse(&batch).expect("just built");
        (batch, header)
    }

    /// Writes one record in a transaction, as a client does: the partition is added to it first.
    ///
    /// # Errors
    /// What the producer is told.
    pub fn write_with(&mut self, id: &str, owner: Owner, sequence: i32) -> Result<Offset, ErrorCode> {
        let (batch, header) = self.one_record(owner, sequence, true);
        let group = self.partition_of(Kind::Keyed);
        let request = Request::Transact { group, id: id.to_owned(), batch, header };
        offset_from(self.ask_until_answered(group, &request))
    }

    /// Writes one record of which no coordinator is asked: it came late, or is in no transaction.
    ///
    /// # Errors
    /// What the partition says.
    pub fn write_unasked(&mut self, owner: Owner, sequence: i32, is_transactional: bool) -> Result<Offset, ErrorCode> {
        let (batch, header) = self.one_record(owner, sequence, is_transactional);
        let group = self.partition_of(Kind::Keyed);
        let request = Request::Produce { batch, header, acks: Acks::Quorum };
        offset_from(self.ask_until_answered(group, &request))
    }

    /// Gives the partition's leader a marker, from a coordinator of this epoch.
    ///
    /// # Errors
    /// What the partition says.
    pub fn mark(&mut self, owner: Owner, commit: bool, coordinator: i32) -> Result<(), ErrorCode> {
        let group = self.partition_of(Kind::Keyed);
        let leader = self.wait_for_leader(group);
        let marker = Marker {
            producer_id: owner.0,
            producer_epoch: owner.1,
            commit,
            coordinator_epoch: LeaderEpoch::new(coordinator),
        };
        let heard: Arc<Mutex<Option<Result<(), Error>>>> = Arc::default();
        let told = Arc::clone(&heard);
        let handle = self.brokers[leader].handle(self.groups[group].tp).expect("it leads");
        let reply = Reply::new(move |answer: Result<(), Error>| {
            *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        });
        handle.marker(marker, reply);
        self.after(leader);
        let until = self.now + SOON;
        self.run_until(until, |_| heard.lock().unwrap_or_else(PoisonError::into_inner).is_some());
        let answer = heard.lock().unwrap_or_else(PoisonError::into_inner).take();
        answer.expect("a leader answers").map_err(|error| error.code)
    }

    /// The partition's last stable offset and high watermark, as its leader has them.
    pub fn stable_and_end(&mut self) -> (i64, i64) {
        let group = self.partition_of(Kind::Keyed);
        let leader = self.wait_for_leader(group);
        let status = self.brokers[leader].handle(self.groups[group].tp).expect("it leads").status();
        (status.last_stable_offset.get(), status.high_watermark.get())
    }

    /// Waits until nothing is open in the partition.
    ///
    /// # Panics
    /// When something is for too long.
    pub fn wait_until_stable(&mut self) {
        let group = self.partition_of(Kind::Keyed);
        let tp = self.groups[group].tp;
        self.wait_until("nothing is open any more", |world| {
            let status = world.leader_of(group).and_then(|leader| Some(world.brokers[leader].handle(tp)?.status()));
            status.is_some_and(|status| status.last_stable_offset == status.high_watermark)
        });
    }

    /// The coordinator of transactions is killed, and another one takes over.
    pub fn change_coordinator(&mut self) {
        let group = self.partition_of(Kind::Transactions);
        let leader = self.wait_for_leader(group);
        self.kill_process(leader);
        self.wait_for_another_leader(group, leader);
        self.start_broker(leader);
    }

    /// Commits an offset of a group without members, perhaps within a transaction.
    ///
    /// # Errors
    /// What is answered.
    pub fn commit_offset(&mut self, group: &str, offset: i64, of: Option<(&str, Owner)>) -> Result<(), ErrorCode> {
        let ask = Ask::Commit(Committing {
            group: group.to_owned(),
            member: None,
            tp: self.groups[0].tp,
            offset: Offset::new(offset),
            transaction: of.map(|(id, owner)| (id.to_owned(), owner)),
        });
        match self.ask_until_answered(self.partition_of(Kind::Groups), &Request::Ask(ask)) {
            Answer::Asked(Ok(Answered::Offsets(refused))) => {
                refused.into_iter().next().map_or(Ok(()), |(_, error)| Err(error.code))
            }
            Answer::Asked(Err(error)) => Err(error.code),
            other => unreachable!("no coordinator answers {other:?}"),
        }
    }

    /// Offsets that are too old go.
    pub fn expire_offsets(&mut self) {
        self.ask_until_answered(self.partition_of(Kind::Groups), &Request::Ask(Ask::Expire));
    }

    /// What a group has committed, and whether nothing is pending.
    pub fn offset_of(&mut self, group: &str) -> (Option<i64>, bool) {
        let leader = self.wait_for_leader(self.partition_of(Kind::Groups));
        let view = self.groups_view(leader).expect("it coordinates");
        let (offset, is_stable) = view.offset(group, self.groups[0].tp);
        (offset.map(Offset::get), is_stable)
    }

    /// Whether that is so, where somebody coordinates the group.
    pub fn is_offset(&self, group: &str, offset: Option<i64>, is_stable: bool) -> bool {
        let leader = self.leader_of(self.partition_of(Kind::Groups));
        let view = leader.and_then(|leader| self.groups_view(leader));
        let is = view.map(|view| view.offset(group, self.groups[0].tp));
        is == Some((offset.map(Offset::new), is_stable))
    }
}
