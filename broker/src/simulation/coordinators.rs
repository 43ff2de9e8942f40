//! The coordinators of transactions and of groups: their machines, what is asked of them, and what their brokers do unasked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowstone_protocol::{Error, LeaderEpoch, Marker, Offset, ProducerEpoch, ProducerId, Timestamp, TopicPartition};

use super::{Answer, Command, LogMachine, MetadataView};
use crate::coordinator::Published;
use crate::group::commands::{Commit, GroupCommand, GroupReply, Join, NewOffset, Report, Subscription};
use crate::group::pattern::Patterns;
use crate::group::plan::{Wanting, wanted_topic};
use crate::group::presence::{Presence, Verdict};
use crate::group::state::{GroupRules, GroupTable};
use crate::internal_topics::InternalTopic;
use crate::partition::{MachineRules, MachineView, PartitionCommand, PartitionMachine, PartitionReply};
use crate::producers::Producers;
use crate::transaction::commands::{Addition, TransactionCommand, TransactionReply};
use crate::transaction::endings::{Endings, Turn};
use crate::transaction::state::{TransactionRules, TransactionTable};
use crate::transaction::upkeep::{begin_decided, due, marker_of};

/// Transactions whose markers are written side by side: so few that some wait for their place.
const ENDING_MAX: usize = 3;
/// A transactional id that was not used for so long is forgotten.
const ID_EXPIRATION: Duration = Duration::from_secs(10);

/// What a partition of `__transaction_state` has committed, as far as one replica knows.
#[derive(Debug, Clone)]
pub struct TransactionsView(Published<TransactionTable>);

/// The same of `__consumer_offsets`.
#[derive(Debug, Clone)]
pub struct GroupsView(Published<GroupTable>);

/// What is known of a member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberView {
    /// Its epoch.
    pub epoch: i32,
    /// What it owns.
    pub owned: Vec<TopicPartition>,
    /// What it was asked to give up, and holds until it says that it has.
    pub revoking: Vec<TopicPartition>,
    /// Grows with each change of it.
    pub changed_at: Offset,
}

impl LogMachine {
    /// Behind a topic's records, with producers that are forgotten when they were idle for so long.
    pub fn forgetful_records(expiration: Duration) -> Self {
        Self(PartitionMachine::Records(Box::new(Producers::new(expiration))))
    }

    /// Behind a partition of `__transaction_state`, with the view of what it commits.
    pub fn transactions() -> (Self, TransactionsView) {
        let rules = TransactionRules { id_expiration: ID_EXPIRATION, ..TransactionRules::default() };
        let rules = MachineRules { transactions: Arc::new(rules), ..MachineRules::default() };
        match PartitionMachine::behind(InternalTopic::Transactions.name(), &rules) {
            (machine, MachineView::Transactions(view)) => (Self(machine), TransactionsView(view)),
            (machine, _) => unreachable!("{machine:?} is not behind the transactions' topic"),
        }
    }

    /// Behind a partition of `__consumer_offsets`, with the view of what it commits; an empty group keeps its offsets for
    /// `offsets_retention`.
    pub fn groups(offsets_retention: Duration) -> (Self, GroupsView) {
        let rules = GroupRules { offsets_retention, ..GroupRules::default() };
        let rules = MachineRules { groups: Arc::new(rules), ..MachineRules::default() };
        match PartitionMachine::behind(InternalTopic::Groups.name(), &rules) {
            (machine, MachineView::Groups(view)) => (Self(machine), GroupsView(view)),
            (machine, _) => unreachable!("{machine:?} is not behind the groups' topic"),
        }
    }
}

impl TransactionsView {
    /// Whether the clock asks for nothing, and nothing is open or being ended.
    pub fn rests(&self) -> bool {
        self.0.with(|table| table.preparing().next().is_none() && table.iter().all(|(_, it)| it.due().is_none()))
    }
}

impl GroupsView {
    /// A member; `None` where it is none, or not any more.
    pub fn member(&self, group: &str, member: &str) -> Option<MemberView> {
        self.0.with(|table| {
            let member = table.group(group)?.members.get(member)?;
            Some(MemberView {
                epoch: member.epoch,
                owned: member.owned.clone(),
                revoking: member.revoking.clone(),
                changed_at: member.changed_at,
            })
        })
    }

    /// What a group has committed for a partition, and whether no transaction has an offset of it pending.
    pub fn offset(&self, group: &str, tp: TopicPartition) -> (Option<Offset>, bool) {
        self.0.with(|table| {
            let known = table.group(group);
            let offset = known.and_then(|known| known.offsets.get(&tp)).map(|committed| committed.offset);
            (offset, !known.is_some_and(|known| known.is_pending(tp)))
        })
    }

    /// Whether no transaction has an offset pending, and everyone owns what they shall own.
    pub fn rests(&self) -> bool {
        self.0.with(|table| table.groups().all(|(_, group)| group.pending.is_empty() && group.is_stable()))
    }
}

/// An answer, told apart.
#[derive(Debug, Clone)]
pub enum Answered {
    /// Who may write now.
    Producer {
        /// Its id.
        producer: ProducerId,
        /// And epoch.
        epoch: ProducerEpoch,
    },
    /// What was open before is being ended.
    Busy,
    /// Of each addition.
    Added(Vec<Result<(), Error>>),
    /// It is so.
    Done,
    /// A member belongs to the group, under this epoch.
    Joined(i32),
    /// Offsets that were not taken.
    Offsets(Vec<(TopicPartition, Error)>),
    /// A piece of it is done.
    More,
    /// Of another coordinator.
    Other,
}

impl Answer {
    /// What it says.
    pub fn told(self) -> Answered {
        match self.0 {
            PartitionReply::Transactions(reply) => match reply {
                TransactionReply::Producer { producer, epoch } => Answered::Producer { producer, epoch },
                TransactionReply::Busy => Answered::Busy,
                TransactionReply::Added(results) => Answered::Added(results),
                TransactionReply::Done => Answered::Done,
            },
            PartitionReply::Groups(reply) => match reply {
                GroupReply::Done | GroupReply::Expired { more: false } => Answered::Done,
                GroupReply::Joined { epoch, .. } => Answered::Joined(epoch),
                GroupReply::Offsets(refused) => Answered::Offsets(refused),
                GroupReply::More | GroupReply::Expired { more: true } => Answered::More,
            },
            PartitionReply::Metadata(_) => Answered::Other,
        }
    }
}

/// Who joins a group.
#[derive(Debug, Clone)]
pub struct Joining {
    /// The group.
    pub group: String,
    /// The member.
    pub member: String,
    /// 0: it begins.
    pub epoch: i32,
    /// Empty for a dynamic member.
    pub instance: String,
    /// What it wants to read.
    pub topic: String,
    /// After this silence it is one no more.
    pub session_timeout: Duration,
    /// How long it may keep what it was asked to give up.
    pub rebalance_timeout: Duration,
    /// What it still owns.
    pub owned: Vec<TopicPartition>,
}

impl Command {
    fn transactions(command: TransactionCommand) -> Self {
        Self(PartitionCommand::Transactions(command))
    }

    fn groups(command: GroupCommand) -> Self {
        Self(PartitionCommand::Groups(command))
    }

    /// A producer begins to use a transactional id.
    pub fn init_transactions(id: &str, timeout: Duration, fresh: ProducerId) -> Self {
        Self::transactions(TransactionCommand::Init { id: id.to_owned(), timeout, fresh })
    }

    /// A partition, or a partition of groups with one of these, is about to be written to in a transaction.
    pub fn add_to_transaction(
        id: &str,
        (producer, epoch): (ProducerId, ProducerEpoch),
        tp: TopicPartition,
        group: Option<&str>,
    ) -> Self {
        let addition = Addition { id: id.into(), producer, epoch, partition: Some(tp), group: group.map(Into::into) };
        Self::transactions(TransactionCommand::Add(vec![addition]))
    }

    /// A producer ends its transaction.
    pub fn end_transaction(
        id: &str,
        (producer, epoch): (ProducerId, ProducerEpoch),
        commit: bool,
        fresh: ProducerId,
    ) -> Self {
        Self::transactions(TransactionCommand::End { id: id.to_owned(), producer, epoch, commit, fresh })
    }

    /// An operator aborts what is open.
    pub fn abort_transaction(id: &str, fresh: ProducerId) -> Self {
        Self::transactions(TransactionCommand::Abort { id: id.to_owned(), fresh })
    }

    /// A member comes, or goes on.
    pub fn join(joining: &Joining) -> Self {
        let millis = |time: Duration| i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
        Self::groups(GroupCommand::Join(Join {
            group: joining.group.as_str().into(),
            member: joining.member.as_str().into(),
            epoch: joining.epoch,
            instance: joining.instance.clone(),
            client_id: String::new(),
            host: String::new(),
            rack: String::new(),
            subscription: Subscription { topics: vec![joining.topic.clone()], pattern: String::new() },
            assignor: String::new(),
            session_timeout_ms: millis(joining.session_timeout),
            rebalance_timeout_ms: millis(joining.rebalance_timeout),
            owned: joining.owned.clone(),
        }))
    }

    /// A member tells what it owns, sorted.
    pub fn report(group: &str, member: &str, epoch: i32, owned: Vec<TopicPartition>) -> Self {
        let (group, member) = (group.into(), member.into());
        Self::groups(GroupCommand::Report(Report { group, member, epoch, owned: Some(owned), subscription: None }))
    }

    /// A member goes; a static one that keeps its place comes back.
    pub fn leave(group: &str, member: &str, keep_place: bool) -> Self {
        Self::groups(GroupCommand::Leave { group: group.into(), member: member.into(), keep_place })
    }

    /// Consumers have come so far: a member under its epoch, or nobody in particular; perhaps once a transaction commits.
    pub fn commit_offsets(
        group: &str,
        member: Option<(&str, i32)>,
        offsets: &[(TopicPartition, Offset)],
        transaction: Option<(ProducerId, ProducerEpoch)>,
    ) -> Self {
        let new = |offset| NewOffset { offset, leader_epoch: LeaderEpoch::NONE, metadata: String::new() };
        Self::groups(GroupCommand::Commit(Commit {
            group: group.into(),
            member: member.map(|(member, epoch)| (member.into(), epoch)),
            offsets: offsets.iter().map(|&(tp, offset)| (tp, new(offset))).collect(),
            transaction,
        }))
    }

    /// A transaction has ended, for offsets that are pending in it. Where that is answered with [`Answered::More`] the same
    /// again does the next piece.
    pub fn end_pending(marker: &Marker) -> Self {
        let Marker { producer_id: producer, producer_epoch: epoch, commit, .. } = *marker;
        Self::groups(GroupCommand::EndPending { producer, epoch, commit })
    }

    /// What is too old goes.
    pub fn expire_offsets() -> Self {
        Self::groups(GroupCommand::Expire { records_max: 100 })
    }
}

/// One try to end a decided transaction everywhere.
#[derive(Debug)]
pub struct EndTurn(Turn);

impl EndTurn {
    /// Partitions that lack their marker.
    pub fn left(&self) -> &BTreeSet<TopicPartition> {
        &self.0.left
    }

    /// The coordinator's partition, and in which leader epoch it decided to write.
    pub fn coordinator(&self) -> (TopicPartition, LeaderEpoch) {
        (self.0.ending.0, self.0.ending.1)
    }

    /// What is written.
    pub fn marker(&self) -> Marker {
        marker_of(self.0.ending.3, self.0.ending.1)
    }

    /// What a partition answered.
    pub fn take(&mut self, tp: TopicPartition, written: &Result<(), Error>) {
        self.0.take(tp, written);
    }

    /// What the coordinator is told once nothing is left.
    pub fn written(&self) -> Command {
        let (_, _, id, decision) = &self.0.ending;
        Command::transactions(TransactionCommand::Written { id: Arc::clone(id), decision: *decision })
    }
}

/// What a broker keeps in memory of the transactions that it ends.
#[derive(Debug)]
pub struct TransactionDuty(Endings);

impl Default for TransactionDuty {
    fn default() -> Self {
        Self(Endings::new(ENDING_MAX))
    }
}

impl TransactionDuty {
    /// What the clock asks of a coordinator.
    pub fn due(
        view: &TransactionsView,
        now: Timestamp,
        forgets: bool,
        fresh: impl FnMut() -> ProducerId,
    ) -> Vec<Command> {
        let due = view.0.with(|table| due(table, now, forgets, fresh));
        due.into_iter().map(Command::transactions).collect()
    }

    /// What is decided by this leadership and not being ended yet, as far as there is room.
    pub fn begin(&mut self, tp: TopicPartition, epoch: LeaderEpoch, view: &TransactionsView) -> Vec<EndTurn> {
        let (turns, _) = view.0.with(|table| begin_decided(&mut self.0, (tp, epoch), table));
        turns.into_iter().map(EndTurn).collect()
    }

    /// One whose pause is over.
    pub fn begin_due(&mut self, now: Instant) -> Option<EndTurn> {
        self.0.begin_due(now).map(EndTurn)
    }

    /// When the next pause is over.
    pub fn next_due(&self) -> Option<Instant> {
        self.0.next_due()
    }

    /// It is carried out, or another coordinator's.
    pub fn ended(&mut self, turn: &EndTurn) {
        self.0.ended(&turn.0.ending);
    }

    /// Something of it is left.
    pub fn again(&mut self, turn: EndTurn, now: Instant) {
        self.0.again(turn.0, now);
    }
}

/// What a broker keeps in memory of the groups that it coordinates, for one leadership.
#[derive(Debug)]
pub struct GroupDuty {
    present: BTreeMap<(Arc<str>, Arc<str>), Presence>,
    patterns: Patterns,
}

impl GroupDuty {
    /// Everybody is given a whole session.
    pub fn new(view: &GroupsView, now: Instant) -> Self {
        let mut duty = Self { present: BTreeMap::new(), patterns: Patterns::default() };
        duty.look(view, now);
        duty
    }

    /// A member said something.
    pub fn heard(&mut self, group: &str, member: &str, now: Instant) {
        self.present.entry((group.into(), member.into())).or_insert_with(|| Presence::new(now)).heard(now);
    }

    fn look(&mut self, view: &GroupsView, now: Instant) {
        view.0.with(|table| {
            self.present.retain(|(name, id), _| table.group(name).is_some_and(|group| group.members.contains_key(id)));
            for (name, group) in table.groups() {
                for (id, member) in &group.members {
                    let who = (Arc::clone(name), Arc::clone(id));
                    self.present.entry(who).or_insert_with(|| Presence::new(now)).asked(&member.revoking, now);
                }
            }
        });
    }

    /// What is due: members that are silent or keep what they were asked for go, and targets that are not what they are to
    /// be are set.
    pub fn due(&mut self, view: &GroupsView, metadata: &MetadataView, now: Instant) -> Vec<Command> {
        self.look(view, now);
        view.0.with(|table| {
            let mut due: Vec<GroupCommand> = Vec::new();
            for ((name, id), presence) in &self.present {
                let member = table.group(name).and_then(|group| group.members.get(id));
                if member.is_some_and(|member| presence.verdict(member, now) != Verdict::Stays) {
                    due.push(GroupCommand::Remove { group: Arc::clone(name), member: Arc::clone(id) });
                }
            }
            let mut groups: Vec<_> = table.groups().filter(|(_, group)| !group.members.is_empty()).collect();
            groups.sort_unstable_by_key(|(name, _)| Arc::clone(name));
            for (name, group) in groups {
                let wanting = Wanting::of(name, group);
                let topics = metadata.0.with(|known| {
                    let topics = wanting.topics(known, &mut self.patterns);
                    topics.iter().map(|topic| wanted_topic(topic, false, known)).collect::<Vec<_>>()
                });
                due.extend(wanting.plan(&topics, &mut self.patterns).map(GroupCommand::Install));
            }
            due.into_iter().map(Command::groups).collect()
        })
    }
}
