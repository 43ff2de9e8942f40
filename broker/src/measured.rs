//! The coordinators' pure parts, for benchmarks alone: commands that become records, which are taken in as a leader does
//! that has no disk and no followers; and the sharing out of partitions.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::{
    BatchHeader, Error, LeaderEpoch, Offset, PartitionId, ProducerEpoch, ProducerId, RaftIndex, Term, Timestamp,
    TopicId, TopicPartition,
};
use flowstone_replication::{Commanded, Machine, MachineBody, MachineEntry};

use crate::group::assignment::{Assignor, Candidate, WantedTopic, assign};
use crate::group::commands::{Commit, GroupCommand, GroupReply, Install, Join, NewOffset, Report, Subscription};
use crate::internal_topics::InternalTopic;
use crate::partition::{MachineRules, MachineView, PartitionCommand, PartitionMachine, PartitionReply};
use crate::transaction::commands::{Addition, TransactionCommand, TransactionReply};
use crate::transaction::state::Transaction;

/// Of each group's only member, and of each transaction.
pub const PARTITIONS: i32 = 8;
const NOW: Timestamp = Timestamp::new(1_700_000_000_000);
const TERM: Term = Term::new(1);
const TOPIC: TopicId = TopicId::new(1);

fn partition(number: i32) -> TopicPartition {
    TopicPartition { topic: TOPIC, partition: PartitionId::new(number) }
}

/// A coordinator that leads, and commits at once.
#[derive(Debug)]
struct Leading {
    machine: PartitionMachine,
    view: MachineView,
    end: Offset,
}

impl Leading {
    fn behind(topic: InternalTopic) -> Self {
        let (mut machine, view) = PartitionMachine::behind(topic.name(), &MachineRules::default());
        machine.lead(TERM);
        Self { machine, view, end: Offset::ZERO }
    }

    /// Decides, and takes in what follows, as the leader and as every replica.
    fn step(&mut self, command: PartitionCommand) -> Result<(PartitionReply, usize), Error> {
        let Commanded { batch, reply } = self.machine.command(command, NOW);
        let reply = reply?;
        let bytes = batch.as_ref().map_or(0, Bytes::len);
        if let Some(batch) = batch {
            let header = BatchHeader { base_offset: self.end, ..BatchHeader::parse(&batch)? };
            let index = RaftIndex::new(self.end.get().unsigned_abs() + 1);
            let body = MachineBody::Records(&batch);
            let entry = MachineEntry { index, term: TERM, base_offset: self.end, header: &header, body };
            self.machine.appended(&entry);
            self.machine.committed(&entry);
            self.end = header.next_offset();
        }
        Ok((reply, bytes))
    }
}

/// Groups of one member each.
#[derive(Debug)]
pub struct Groups {
    leading: Leading,
    /// Each group, its member, and the member's epoch.
    members: Vec<(Arc<str>, Arc<str>, i32)>,
}

impl Groups {
    /// So many groups, whose members own [`PARTITIONS`] partitions.
    ///
    /// # Errors
    /// What the coordinator refuses.
    pub fn new(groups: usize) -> Result<Self, Error> {
        let leading = Leading::behind(InternalTopic::Groups);
        let mut all = Self { leading, members: Vec::with_capacity(groups) };
        for number in 0..groups {
            all.join(format!("group-{number}").into())?;
        }
        Ok(all)
    }

    fn join(&mut self, group: Arc<str>) -> Result<(), Error> {
        let member: Arc<str> = format!("{group}-member").into();
        let target: Vec<TopicPartition> = (0..PARTITIONS).map(partition).collect();
        self.step(GroupCommand::Join(Join {
            group: Arc::clone(&group),
            member: Arc::clone(&member),
            epoch: 0,
            instance: String::new(),
            client_id: "client".to_owned(),
            host: "127.0.0.1".to_owned(),
            rack: String::new(),
            subscription: Subscription { topics: vec!["topic".to_owned()], pattern: String::new() },
            assignor: String::new(),
            session_timeout_ms: 10_000,
            rebalance_timeout_ms: 10_000,
            owned: Vec::new(),
        }))?;
        let epoch = self.group_epoch(&group);
        let targets = vec![(Arc::clone(&member), target.clone())];
        self.step(GroupCommand::Install(Install { group: Arc::clone(&group), epoch, targets }))?;
        let epoch = self.member_epoch(&group, &member);
        let (group_name, member_id) = (Arc::clone(&group), Arc::clone(&member));
        let report = Report { group: group_name, member: member_id, epoch, owned: Some(target), subscription: None };
        self.step(GroupCommand::Report(report))?;
        let epoch = self.member_epoch(&group, &member);
        self.members.push((group, member, epoch));
        Ok(())
    }

    fn step(&mut self, command: GroupCommand) -> Result<(GroupReply, usize), Error> {
        match self.leading.step(PartitionCommand::Groups(command))? {
            (PartitionReply::Groups(reply), bytes) => Ok((reply, bytes)),
            (other, _) => unreachable!("the groups' coordinator answers {other:?}"),
        }
    }

    fn group_epoch(&self, group: &str) -> i32 {
        let MachineView::Groups(view) = &self.leading.view else { return 0 };
        view.with(|table| table.group(group).map_or(0, |group| group.epoch))
    }

    fn member_epoch(&self, group: &str, member: &str) -> i32 {
        let MachineView::Groups(view) = &self.leading.view else { return 0 };
        view.with(|table| table.group(group).and_then(|group| group.members.get(member)).map_or(0, |it| it.epoch))
    }

    /// A member's commit of an offset in each of its partitions; the bytes of the records.
    ///
    /// # Errors
    /// What the coordinator refuses.
    pub fn commit(&mut self, number: usize, offset: i64) -> Result<usize, Error> {
        let (group, member, epoch) = self.members[number % self.members.len()].clone();
        let new =
            || NewOffset { offset: Offset::new(offset), leader_epoch: LeaderEpoch::new(1), metadata: String::new() };
        let offsets = (0..PARTITIONS).map(|number| (partition(number), new())).collect();
        let commit = Commit { group, member: Some((member, epoch)), offsets, transaction: None };
        let (reply, bytes) = self.step(GroupCommand::Commit(commit))?;
        match reply {
            GroupReply::Offsets(refused) if refused.is_empty() => Ok(bytes),
            other => unreachable!("a commit of what the member owns is answered {other:?}"),
        }
    }
}

/// Transactional ids that are in use.
#[derive(Debug)]
pub struct Transactions {
    leading: Leading,
    ids: Vec<Arc<str>>,
}

impl Transactions {
    /// So many ids.
    ///
    /// # Errors
    /// What the coordinator refuses.
    pub fn new(ids: usize) -> Result<Self, Error> {
        let mut all = Self { leading: Leading::behind(InternalTopic::Transactions), ids: Vec::with_capacity(ids) };
        for number in 0..ids {
            let id = format!("id-{number}");
            all.ids.push(id.as_str().into());
            let fresh = ProducerId::new(number as i64 + 1);
            all.step(TransactionCommand::Init { id, timeout: Duration::from_secs(60), fresh })?;
        }
        Ok(all)
    }

    fn step(&mut self, command: TransactionCommand) -> Result<(TransactionReply, usize), Error> {
        match self.leading.step(PartitionCommand::Transactions(command))? {
            (PartitionReply::Transactions(reply), bytes) => Ok((reply, bytes)),
            (other, _) => unreachable!("the transactions' coordinator answers {other:?}"),
        }
    }

    fn read<R>(&self, id: &str, read: impl FnOnce(&Transaction) -> R) -> Option<R> {
        let MachineView::Transactions(view) = &self.leading.view else { return None };
        view.with(|table| table.get(id).map(|it| read(it)))
    }

    /// A whole transaction of an id, three commands: [`PARTITIONS`] partitions are added at once, it is committed, and its
    /// markers are written. The bytes of the records.
    ///
    /// # Errors
    /// What the coordinator refuses.
    pub fn commit(&mut self, number: usize) -> Result<usize, Error> {
        let id = Arc::clone(&self.ids[number % self.ids.len()]);
        let none = (ProducerId::new(-1), ProducerEpoch::new(-1));
        let (producer, epoch) = self.read(&id, |it| (it.producer, it.epoch)).unwrap_or(none);
        let addition =
            |number| Addition { id: Arc::clone(&id), producer, epoch, partition: Some(partition(number)), group: None };
        let (_, added) = self.step(TransactionCommand::Add((0..PARTITIONS).map(addition).collect()))?;
        let fresh = ProducerId::new(producer.get() ^ (1 << 40));
        let (_, decided) =
            self.step(TransactionCommand::End { id: id.to_string(), producer, epoch, commit: true, fresh })?;
        let Some(decision) = self.read(&id, Transaction::decision).flatten() else {
            unreachable!("a transaction of {PARTITIONS} partitions is decided, and not yet ended")
        };
        let (_, ended) = self.step(TransactionCommand::Written { id, decision })?;
        Ok(added + decided + ended)
    }
}

/// A group whose partitions are to be shared out.
#[derive(Debug)]
pub struct Sharing {
    topics: Vec<WantedTopic>,
    members: Vec<Candidate>,
}

impl Sharing {
    /// So many members that own nothing yet, and so many partitions of ten topics.
    pub fn new(members: usize, partitions: u32) -> Self {
        const TOPICS: u32 = 10;
        let topic = |number: u32| WantedTopic {
            id: TopicId::new(u128::from(number) + 1),
            name: format!("topic-{number}"),
            partitions: partitions / TOPICS,
            racks: Vec::new(),
        };
        let member = |number| Candidate {
            order: format!("member-{number:05}"),
            rack: String::new(),
            topics: (0..TOPICS as usize).collect(),
            current: Vec::new(),
        };
        Self { topics: (0..TOPICS).map(topic).collect(), members: (0..members).map(member).collect() }
    }

    /// The same group after everyone took its share in, and one member left.
    pub fn after_one_left(mut self) -> Self {
        let targets = self.targets();
        self.members.iter_mut().zip(targets).for_each(|(member, target)| member.current = target);
        self.members.pop();
        self
    }

    fn targets(&self) -> Vec<Vec<TopicPartition>> {
        assign(Assignor::Cooperative, &self.topics, &self.members)
    }

    /// Shares out; how many partitions have an owner then.
    pub fn share_out(&self) -> usize {
        self.targets().iter().map(Vec::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_does_something() {
        let mut groups = Groups::new(3).expect("three groups");
        assert!((0..10).all(|turn| groups.commit(turn, turn as i64).expect("taken") > 0));
        let mut transactions = Transactions::new(3).expect("three ids");
        assert!((0..10).all(|turn| transactions.commit(turn).expect("committed") > 0));
        assert_eq!(Sharing::new(10, 100).share_out(), 100);
        assert_eq!(Sharing::new(10, 100).after_one_left().share_out(), 100);
    }
}
