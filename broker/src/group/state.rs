//! The state behind one partition of `__consumer_offsets`: its groups, their members and their offsets.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::internal::group_record_key::Key;
use flowstone_protocol::internal::group_record_value::Value;
use flowstone_protocol::internal::{GroupRecordKey, GroupRecordValue, GroupsCheckpoint};
use flowstone_protocol::{Error, ErrorCode, LeaderEpoch, Offset, ProducerEpoch, ProducerId, Timestamp, TopicPartition};
use prost::Message;

use super::commands::{self, GroupCommand, GroupReply};
use super::records::{self, GroupLogRecord, malformed};
use crate::coordinator::StateMachine;

/// No record has this offset.
const NEVER: Offset = Offset::new(i64::MIN);

/// Bounds of this broker's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupRules {
    /// Members of one group.
    pub(crate) members_max: usize,
    /// Groups of one partition of `__consumer_offsets`.
    pub(crate) groups_max: usize,
    /// Offsets of one group, those in transactions included.
    pub(crate) offsets_max: usize,
    /// How long an empty group keeps its offsets.
    pub(crate) offsets_retention: Duration,
    /// The assignor of groups whose members name none.
    pub(crate) assignor: String,
}

impl Default for GroupRules {
    fn default() -> Self {
        Self {
            members_max: 10_000,
            groups_max: 10_000,
            offsets_max: 100_000,
            offsets_retention: Duration::from_secs(7 * 86_400),
            assignor: "cooperative".to_owned(),
        }
    }
}

/// A member of a group.
///
/// `owned` and `revoking` are apart and together what nobody else may own; `owned` is within `target` but for the moment
/// in which a new target is taken in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Empty for a dynamic member.
    pub(crate) instance: String,
    pub(crate) client_id: String,
    pub(crate) host: String,
    pub(crate) rack: String,
    pub(crate) topics: Vec<String>,
    pub(crate) pattern: String,
    /// The assignor that it asked for; empty for any.
    pub(crate) assignor: String,
    pub(crate) session_timeout_ms: i32,
    pub(crate) rebalance_timeout_ms: i32,
    /// Grows whenever it is given a partition: what it says under an older epoch, it says without knowing of that one.
    pub(crate) epoch: i32,
    pub(crate) previous_epoch: i32,
    /// What it shall own once others have given it up. Sorted, as are the next two.
    pub(crate) target: Vec<TopicPartition>,
    /// What it was given and is not asked to give up.
    pub(crate) owned: Vec<TopicPartition>,
    /// What it was asked to give up and has not said to have given up.
    pub(crate) revoking: Vec<TopicPartition>,
    /// A static member that said it will be back.
    pub(crate) away: bool,
    /// Offset of the last record about it.
    pub(crate) changed_at: Offset,
}

impl Member {
    /// Whether nobody else may own the partition.
    pub(crate) fn holds(&self, tp: TopicPartition) -> bool {
        self.owned.binary_search(&tp).is_ok() || self.revoking.binary_search(&tp).is_ok()
    }

    pub(crate) fn session_timeout(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.session_timeout_ms).unwrap_or_default())
    }

    pub(crate) fn rebalance_timeout(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.rebalance_timeout_ms).unwrap_or_default())
    }

    /// It owns what it shall own.
    pub(crate) fn is_settled(&self) -> bool {
        self.revoking.is_empty() && self.owned == self.target
    }

    /// Bytes of what it says of itself: they are in every record about it.
    pub(crate) fn word_bytes(&self) -> usize {
        let words = [&self.instance, &self.client_id, &self.host, &self.rack, &self.pattern, &self.assignor];
        words.into_iter().chain(&self.topics).map(|word| word.len() + 4).sum()
    }

    fn held(&self) -> impl Iterator<Item = TopicPartition> {
        self.owned.iter().chain(&self.revoking).copied()
    }
}

/// An offset that a group has committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CommittedOffset {
    pub(crate) offset: Offset,
    pub(crate) leader_epoch: LeaderEpoch,
    pub(crate) metadata: Arc<str>,
    pub(crate) at: Timestamp,
}

/// An offset that counts once its transaction commits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PendingOffset {
    pub(crate) offset: CommittedOffset,
    pub(crate) epoch: ProducerEpoch,
}

/// A consumer group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// Grows with each change of members or of what they want.
    pub(crate) epoch: i32,
    /// The group epoch of which the members' targets are.
    pub(crate) assigned_epoch: i32,
    pub(crate) assignor: String,
    /// When its last member left; `None` while it has members.
    pub(crate) empty_since: Option<Timestamp>,
    pub(crate) members: BTreeMap<Arc<str>, Arc<Member>>,
    pub(crate) offsets: HashMap<TopicPartition, CommittedOffset>,
    /// Offsets in open transactions.
    pub(crate) pending: BTreeMap<ProducerId, BTreeMap<TopicPartition, PendingOffset>>,
    /// Offset of the last record about the group itself.
    pub(crate) changed_at: Offset,

    // What follows from the members.
    /// By partition, the member that holds it.
    holders: HashMap<TopicPartition, Arc<str>>,
    /// By partition, the member that shall own it.
    targets: HashMap<TopicPartition, Arc<str>>,
    /// By instance id.
    instances: HashMap<String, Arc<str>>,
    /// In how many transactions an offset of a partition is pending.
    pending_counts: HashMap<TopicPartition, usize>,
    /// Bytes of the members' words.
    word_bytes: usize,
}

impl Group {
    pub(crate) fn new(assignor: &str, now: Timestamp) -> Self {
        Self {
            epoch: 0,
            assigned_epoch: 0,
            assignor: assignor.to_owned(),
            empty_since: Some(now),
            members: BTreeMap::new(),
            offsets: HashMap::new(),
            pending: BTreeMap::new(),
            changed_at: NEVER,
            holders: HashMap::new(),
            targets: HashMap::new(),
            instances: HashMap::new(),
            pending_counts: HashMap::new(),
            word_bytes: 0,
        }
    }

    /// The member that owns the partition, or was asked to give it up and has not yet.
    pub(crate) fn holder(&self, tp: TopicPartition) -> Option<&Arc<str>> {
        self.holders.get(&tp)
    }

    /// The member that shall own the partition.
    pub(crate) fn target(&self, tp: TopicPartition) -> Option<&Arc<str>> {
        self.targets.get(&tp)
    }

    /// The static member of this instance id.
    pub(crate) fn instance(&self, instance: &str) -> Option<&Arc<str>> {
        self.instances.get(instance)
    }

    /// Whether everyone owns what they shall own.
    pub(crate) fn is_stable(&self) -> bool {
        self.assigned_epoch == self.epoch && self.members.values().all(|member| member.is_settled())
    }

    /// Offsets, those in transactions included.
    pub(crate) fn offset_count(&self) -> usize {
        self.offsets.len() + self.pending.values().map(BTreeMap::len).sum::<usize>()
    }

    /// Whether some transaction has an offset of this partition pending.
    pub(crate) fn is_pending(&self, tp: TopicPartition) -> bool {
        self.pending_counts.contains_key(&tp)
    }

    /// Producers in whose transactions an offset of this partition is pending.
    pub(crate) fn pending_of(&self, tp: TopicPartition) -> impl Iterator<Item = ProducerId> + '_ {
        let all =
            self.is_pending(tp).then(|| self.pending.iter().filter(move |(_, offsets)| offsets.contains_key(&tp)));
        all.into_iter().flatten().map(|(producer, _)| *producer)
    }

    /// Bytes of all that members say of themselves.
    pub(crate) fn word_bytes(&self) -> usize {
        self.word_bytes
    }

    fn take_out(&mut self, id: &str) -> Option<Arc<Member>> {
        let member = self.members.remove(id)?;
        self.word_bytes -= member.word_bytes();
        for tp in member.held() {
            if self.holders.get(&tp).is_some_and(|holder| **holder == *id) {
                self.holders.remove(&tp);
            }
        }
        for tp in &member.target {
            if self.targets.get(tp).is_some_and(|target| **target == *id) {
                self.targets.remove(tp);
            }
        }
        if self.instances.get(&member.instance).is_some_and(|known| **known == *id) {
            self.instances.remove(&member.instance);
        }
        Some(member)
    }

    fn put_in(&mut self, id: &Arc<str>, member: Member) {
        self.word_bytes += member.word_bytes();
        self.holders.extend(member.held().map(|tp| (tp, Arc::clone(id))));
        self.targets.extend(member.target.iter().map(|tp| (*tp, Arc::clone(id))));
        if !member.instance.is_empty() {
            self.instances.insert(member.instance.clone(), Arc::clone(id));
        }
        self.members.insert(Arc::clone(id), Arc::new(member));
    }
}

/// The groups of one partition. Groups are shared between the committed and the live copy, so that a copy is cheap.
#[derive(Clone, Debug)]
pub(crate) struct GroupTable {
    rules: Arc<GroupRules>,
    groups: HashMap<Arc<str>, Arc<Group>>,
    /// By producer, the epoch of the transaction after the last one that ended here, and when that was.
    ended: HashMap<ProducerId, (ProducerEpoch, Timestamp)>,
    /// Offset of the last record taken in.
    applied: Option<Offset>,

    // What follows from the above.
    /// Groups and members by the offset of the last record about them; `None`: the group itself.
    changed: BTreeMap<Offset, (Arc<str>, Option<Arc<str>>)>,
    /// Groups in which a producer has offsets pending.
    in_transactions: HashMap<ProducerId, Vec<Arc<str>>>,
    members: usize,
}

impl GroupTable {
    pub(crate) fn new(rules: Arc<GroupRules>) -> Self {
        Self {
            rules,
            groups: HashMap::new(),
            ended: HashMap::new(),
            applied: None,
            changed: BTreeMap::new(),
            in_transactions: HashMap::new(),
            members: 0,
        }
    }

    pub(crate) fn rules(&self) -> &GroupRules {
        &self.rules
    }

    pub(crate) fn group(&self, name: &str) -> Option<&Group> {
        self.groups.get(name).map(|group| &**group)
    }

    /// All groups, in no order.
    pub(crate) fn groups(&self) -> impl Iterator<Item = (&Arc<str>, &Group)> {
        self.groups.iter().map(|(name, group)| (name, &**group))
    }

    pub(crate) fn group_count(&self) -> usize {
        self.groups.len()
    }

    /// Members of all groups.
    pub(crate) fn member_count(&self) -> usize {
        self.members
    }

    /// The epoch of the transaction after the last one of this producer that ended here.
    pub(crate) fn ended(&self, producer: ProducerId) -> Option<ProducerEpoch> {
        self.ended.get(&producer).map(|(epoch, _)| *epoch)
    }

    /// Producers whose last end was before `before`.
    pub(crate) fn ended_before(&self, before: Timestamp) -> impl Iterator<Item = ProducerId> {
        self.ended.iter().filter(move |(_, (_, at))| *at < before).map(|(producer, _)| *producer)
    }

    /// Groups in which the producer has offsets pending.
    pub(crate) fn in_transaction(&self, producer: ProducerId) -> &[Arc<str>] {
        self.in_transactions.get(&producer).map_or(&[], Vec::as_slice)
    }

    /// Groups (`None`) and members that changed after `since`, those that are gone aside.
    pub(crate) fn changed_since(&self, since: Offset) -> impl Iterator<Item = (&Arc<str>, Option<&Arc<str>>)> {
        self.changed.range(since.next()..).map(|(_, (group, member))| (group, member.as_ref()))
    }

    /// The group of this name. In a compacted log the last word about a group may come after those about what belongs to it:
    /// until then it is there all the same.
    fn group_mut(&mut self, name: &str) -> &mut Group {
        if !self.groups.contains_key(name) {
            self.groups.insert(name.into(), Arc::new(Group::new("", Timestamp::new(-1))));
        }
        let group = self.groups.get_mut(name).unwrap_or_else(|| unreachable!("group `{name}` was put in above"));
        Arc::make_mut(group)
    }

    fn take_in(&mut self, key: Key, value: Option<Value>, at: Offset) -> Result<(), Error> {
        match (key, value) {
            (Key::Group(key), Some(Value::Group(value))) => {
                let name: Arc<str> = key.group.into();
                let now = Timestamp::new(value.empty_since);
                let group = self.groups.entry(Arc::clone(&name)).or_insert_with(|| Arc::new(Group::new("", now)));
                let group = Arc::make_mut(group);
                self.changed.remove(&group.changed_at);
                group.epoch = value.group_epoch;
                group.assigned_epoch = value.assigned_epoch;
                group.assignor = value.assignor;
                group.empty_since = (value.empty_since >= 0).then_some(now);
                group.changed_at = at;
                self.changed.insert(at, (name, None));
            }
            (Key::Group(key), None) => {
                if let Some(group) = self.groups.remove(&*key.group) {
                    self.changed.remove(&group.changed_at);
                    self.members -= group.members.len();
                    for member in group.members.values() {
                        self.changed.remove(&member.changed_at);
                    }
                    for producer in group.pending.keys() {
                        self.forget_pending(*producer, &key.group);
                    }
                }
            }
            (Key::Member(key), Some(Value::Member(value))) => {
                let (name, id): (Arc<str>, Arc<str>) = (key.group.into(), key.member_id.into());
                let member = records::parse_member(value, at)?;
                let group = self.group_mut(&name);
                let before = group.take_out(&id);
                group.put_in(&id, member);
                match before {
                    Some(before) => drop(self.changed.remove(&before.changed_at)),
                    None => self.members += 1,
                }
                self.changed.insert(at, (name, Some(id)));
            }
            (Key::Member(key), None) => {
                // A group that is gone took its members with it.
                let gone =
                    self.groups.get_mut(&*key.group).and_then(|group| Arc::make_mut(group).take_out(&key.member_id));
                if let Some(member) = gone {
                    self.members -= 1;
                    self.changed.remove(&member.changed_at);
                }
            }
            (Key::Offset(key), value) => {
                let tp = records::parse_tp(&key.topic_id, key.partition, at)?;
                match value {
                    Some(Value::Offset(value)) => {
                        self.group_mut(&key.group).offsets.insert(tp, records::parse_offset(value));
                    }
                    Some(_) => return Err(malformed(at, "value")),
                    None => {
                        if let Some(group) = self.groups.get_mut(&*key.group) {
                            Arc::make_mut(group).offsets.remove(&tp);
                        }
                    }
                }
            }
            (Key::PendingOffset(key), value) => {
                let producer = ProducerId::new(key.producer_id);
                let tp = records::parse_tp(&key.topic_id, key.partition, at)?;
                match value {
                    Some(Value::PendingOffset(value)) => {
                        let epoch = records::parse_epoch(value.producer_epoch, at)?;
                        let offset = records::parse_offset(value.offset.ok_or_else(|| malformed(at, "offset"))?);
                        let group = self.group_mut(&key.group);
                        let before = group.pending.entry(producer).or_default();
                        if before.insert(tp, PendingOffset { offset, epoch }).is_none() {
                            *group.pending_counts.entry(tp).or_default() += 1;
                        }
                        let groups = self.in_transactions.entry(producer).or_default();
                        if !groups.iter().any(|group| **group == *key.group) {
                            groups.push(key.group.into());
                        }
                    }
                    Some(_) => return Err(malformed(at, "value")),
                    None => self.settle(producer, &key.group, tp),
                }
            }
            (Key::Ended(key), Some(Value::Ended(value))) => {
                let epoch = records::parse_epoch(value.producer_epoch, at)?;
                self.ended.insert(ProducerId::new(key.producer_id), (epoch, Timestamp::new(value.at)));
            }
            (Key::Ended(key), None) => drop(self.ended.remove(&ProducerId::new(key.producer_id))),
            (Key::Group(_) | Key::Member(_) | Key::Ended(_), Some(_)) => return Err(malformed(at, "value")),
        }
        Ok(())
    }

    /// An offset is pending no more.
    fn settle(&mut self, producer: ProducerId, name: &str, tp: TopicPartition) {
        let Some(group) = self.groups.get_mut(name) else { return };
        let group = Arc::make_mut(group);
        let Some(offsets) = group.pending.get_mut(&producer) else { return };
        if offsets.remove(&tp).is_some() {
            let count = group.pending_counts.entry(tp).or_insert(1);
            *count -= 1;
            if *count == 0 {
                group.pending_counts.remove(&tp);
            }
        }
        if offsets.is_empty() {
            group.pending.remove(&producer);
            self.forget_pending(producer, name);
        }
    }

    fn forget_pending(&mut self, producer: ProducerId, name: &str) {
        if let Some(groups) = self.in_transactions.get_mut(&producer) {
            groups.retain(|group| **group != *name);
            if groups.is_empty() {
                self.in_transactions.remove(&producer);
            }
        }
    }

    /// Everything as records: a group goes before what belongs to it.
    fn to_records(&self) -> Vec<GroupLogRecord> {
        let mut records = Vec::new();
        let mut names: Vec<&Arc<str>> = self.groups.keys().collect();
        names.sort_unstable();
        for name in names {
            let Some(group) = self.group(name) else { continue };
            records.push(records::show_group(name, Some(group)));
            let members = group.members.iter();
            records.extend(members.map(|(id, member)| records::show_member(name, id, Some(member))));
            let mut offsets: Vec<_> = group.offsets.iter().collect();
            offsets.sort_unstable_by_key(|(tp, _)| **tp);
            records.extend(offsets.into_iter().map(|(tp, offset)| records::show_offset(name, *tp, Some(offset))));
            for (producer, offsets) in &group.pending {
                let pending = offsets.iter();
                records.extend(pending.map(|(tp, offset)| records::show_pending(*producer, name, *tp, Some(offset))));
            }
        }
        let mut ended: Vec<_> = self.ended.iter().collect();
        ended.sort_unstable_by_key(|(producer, _)| **producer);
        records.extend(ended.into_iter().map(|(producer, ended)| records::show_ended(*producer, Some(*ended))));
        records
    }
}

impl StateMachine for GroupTable {
    type Command = GroupCommand;
    type Reply = GroupReply;
    type Record = GroupLogRecord;

    fn decide(&self, command: GroupCommand, now: Timestamp) -> (Vec<GroupLogRecord>, Result<GroupReply, Error>) {
        match commands::decide(self, command, now) {
            Ok((records, reply)) => (records, Ok(reply)),
            Err(error) => (Vec::new(), Err(error)),
        }
    }

    fn apply(&mut self, record: GroupLogRecord, at: Offset) -> Result<(), Error> {
        let unknown = || {
            Error::new(
                ErrorCode::Unsupported,
                format!(
                    "the group record at offset {at} is of a kind that this release does not know; start the release \
                     that wrote it, or a newer one"
                ),
            )
        };
        let key = record.0.key.and_then(|GroupRecordKey { key }| key).ok_or_else(unknown)?;
        let value = match record.0.value {
            Some(GroupRecordValue { value }) => Some(value.ok_or_else(unknown)?),
            None => None,
        };
        self.take_in(key, value, at)?;
        self.applied = Some(at);
        Ok(())
    }

    fn applied(&self) -> Offset {
        self.applied.unwrap_or(Offset::new(-1))
    }

    fn checkpoint(&self) -> Bytes {
        let records = self.to_records().into_iter().map(|record| record.0).collect();
        GroupsCheckpoint { records, applied: self.applied().get() }.encode_to_vec().into()
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut fresh = Self::new(Arc::clone(&self.rules));
        if !bytes.is_empty() {
            let checkpoint = GroupsCheckpoint::decode(bytes).map_err(|error| {
                Error::new(ErrorCode::CorruptLog, format!("the groups' checkpoint is malformed: {error}"))
            })?;
            // Each has an offset of its own, below all that follow: what changed is told apart by them.
            let first = checkpoint.applied - checkpoint.records.len() as i64;
            for (at, record) in (first..).zip(checkpoint.records) {
                fresh.apply(GroupLogRecord(record), Offset::new(at))?;
            }
            let applied = Offset::new(checkpoint.applied);
            fresh.applied = (applied.get() >= 0).then_some(applied);
        }
        *self = fresh;
        Ok(())
    }
}
