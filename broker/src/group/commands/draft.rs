//! A group as a command leaves it: only what changes is copied, so that one report among a thousand members costs what one
//! member has.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use flowstone_protocol::{Error, ErrorCode, Timestamp, TopicPartition};

use flowstone_storage::planted::{Bug, is_planted};

use super::super::records::{GroupLogRecord, show_group, show_member};
use super::super::state::{Group, Member};
use super::elected;

/// Bytes of all that a group's members say of themselves, topic names above all. A change may be about every member, and
/// what it writes has to fit into one command.
const WORD_BYTES_MAX: usize = 8 << 20;

pub(super) struct Draft<'a> {
    name: Arc<str>,
    /// `None`: it is new.
    base: Option<&'a Group>,
    /// The group itself, its members aside.
    group: Group,
    /// Members that change; `None`: it is gone.
    members: BTreeMap<Arc<str>, Option<Member>>,
    /// Partitions whose holder, or whose target's owner, changes.
    holders: HashMap<TopicPartition, Option<Arc<str>>>,
    targets: HashMap<TopicPartition, Option<Arc<str>>>,
    /// Partitions that somebody may be given now.
    loose: Vec<TopicPartition>,
    count: usize,
    /// Bytes of the members' words.
    word_bytes: usize,
    now: Timestamp,
}

impl<'a> Draft<'a> {
    pub(super) fn of(name: &Arc<str>, base: &'a Group, now: Timestamp) -> Self {
        Self::new(name, Some(base), &base.assignor, now)
    }

    pub(super) fn new(name: &Arc<str>, base: Option<&'a Group>, assignor: &str, now: Timestamp) -> Self {
        let mut group = Group::new(assignor, now);
        if let Some(base) = base {
            (group.epoch, group.assigned_epoch) = (base.epoch, base.assigned_epoch);
            (group.empty_since, group.changed_at) = (base.empty_since, base.changed_at);
        }
        Self {
            name: Arc::clone(name),
            base,
            group,
            members: BTreeMap::new(),
            holders: HashMap::new(),
            targets: HashMap::new(),
            loose: Vec::new(),
            count: base.map_or(0, |base| base.members.len()),
            word_bytes: base.map_or(0, Group::word_bytes),
            now,
        }
    }

    pub(super) fn epoch(&self) -> i32 {
        self.group.epoch
    }

    /// Members, or what they want, are others.
    pub(super) fn grow(&mut self) {
        self.group.epoch += 1;
    }

    /// A member that was at `epoch` is gone: where it comes again under its old name, it is given none that it had.
    pub(super) fn grow_past(&mut self, epoch: i32) {
        self.group.epoch = self.group.epoch.max(epoch);
    }

    /// Whoever lost its place to another one under its instance id was at a lower epoch than that one is. The group does not
    /// grow when that happens, since nobody else is concerned: it does when one comes who may be the one that lost it.
    pub(super) fn grow_past_displaced(&mut self) {
        let members = self.base.into_iter().flat_map(|base| base.members.values());
        let highest = members.filter(|member| !member.instance.is_empty()).map(|member| member.epoch).max();
        self.grow_past(highest.unwrap_or_default());
    }

    /// # Errors
    /// `GROUP_FULL` where the members now say more of themselves than they may together.
    pub(super) fn check_words(&self) -> Result<(), Error> {
        let before = self.base.map_or(0, Group::word_bytes);
        if self.word_bytes <= WORD_BYTES_MAX || self.word_bytes <= before {
            return Ok(());
        }
        let what = format!(
            "the names that the members of group `{}` subscribe to, and their own, are more than {WORD_BYTES_MAX} bytes \
             together, the limit; subscribe by a pattern, or run fewer consumers",
            self.name
        );
        Err(Error::new(ErrorCode::GroupFull, what))
    }

    /// The targets are those of the group as it is.
    pub(super) fn assigned(&mut self) {
        self.group.assigned_epoch = self.group.epoch;
    }

    pub(super) fn member(&self, id: &str) -> Option<&Member> {
        match self.members.get(id) {
            Some(changed) => changed.as_ref(),
            None => self.base?.members.get(id).map(|member| &**member),
        }
    }

    fn holder(&self, tp: TopicPartition) -> Option<&Arc<str>> {
        match self.holders.get(&tp) {
            Some(changed) => changed.as_ref(),
            None => self.base?.holder(tp),
        }
    }

    fn target(&self, tp: TopicPartition) -> Option<&Arc<str>> {
        match self.targets.get(&tp) {
            Some(changed) => changed.as_ref(),
            None => self.base?.target(tp),
        }
    }

    /// The member is `after` from now on; `None`: it is gone.
    pub(super) fn put(&mut self, id: &Arc<str>, after: Option<Member>) {
        let before = self.member(id).cloned();
        if let Some(before) = &before {
            for tp in before.owned.iter().chain(&before.revoking) {
                if self.holder(*tp).is_some_and(|holder| holder == id) {
                    self.holders.insert(*tp, None);
                    self.loose.push(*tp);
                }
            }
            for tp in &before.target {
                if self.target(*tp).is_some_and(|target| target == id) {
                    self.targets.insert(*tp, None);
                }
            }
        }
        if let Some(after) = &after {
            for tp in after.owned.iter().chain(&after.revoking) {
                self.holders.insert(*tp, Some(Arc::clone(id)));
            }
            for tp in &after.target {
                self.targets.insert(*tp, Some(Arc::clone(id)));
                self.loose.push(*tp);
            }
        }
        self.word_bytes += after.as_ref().map_or(0, Member::word_bytes);
        self.word_bytes -= before.as_ref().map_or(0, Member::word_bytes);
        self.count = self.count + usize::from(after.is_some()) - usize::from(before.is_some());
        self.group.empty_since = match (self.count, self.group.empty_since) {
            (0, None) => Some(self.now),
            (0, since) => since,
            _ => None,
        };
        self.members.insert(Arc::clone(id), after);
    }

    /// Whoever shall own what nobody holds is given it.
    pub(super) fn give(&mut self) {
        let mut gifts: BTreeMap<Arc<str>, Vec<TopicPartition>> = BTreeMap::new();
        let mut loose = std::mem::take(&mut self.loose);
        loose.sort_unstable();
        loose.dedup();
        for tp in loose {
            let is_free =
                self.holder(tp).is_none() || (is_planted(Bug::GiveTwice) && self.holder(tp) != self.target(tp));
            if is_free && let Some(target) = self.target(tp).cloned() {
                self.holders.insert(tp, Some(Arc::clone(&target)));
                gifts.entry(target).or_default().push(tp);
            }
        }
        for (id, gift) in gifts {
            let Some(mut member) = self.member(&id).cloned() else { continue };
            member.owned.extend(gift);
            member.owned.sort_unstable();
            member.previous_epoch = member.epoch;
            member.epoch = (member.epoch + 1).max(self.group.epoch);
            self.members.insert(id, Some(member));
        }
    }

    /// The members decide about the assignor anew.
    pub(super) fn elect(&mut self) {
        let unchanged = self.base.into_iter().flat_map(|base| &base.members);
        let unchanged = unchanged.filter(|(id, _)| !self.members.contains_key(*id)).map(|(_, member)| &**member);
        let changed = self.members.values().flatten();
        self.group.assignor = elected(unchanged.chain(changed), &self.group.assignor);
    }

    /// What there is to be written. The group goes before its members.
    pub(super) fn into_records(self) -> Vec<GroupLogRecord> {
        let group = &self.group;
        let is_as_before = self.base.is_some_and(|base| {
            (base.epoch, base.assigned_epoch, &base.assignor, base.empty_since)
                == (group.epoch, group.assigned_epoch, &group.assignor, group.empty_since)
        });
        let mut records = Vec::with_capacity(self.members.len() + 1);
        if !is_as_before {
            records.push(show_group(&self.name, Some(group)));
        }
        for (id, member) in &self.members {
            let base = self.base.and_then(|base| base.members.get(id)).map(|base| &**base);
            if base != member.as_ref() {
                records.push(show_member(&self.name, id, member.as_ref()));
            }
        }
        records
    }
}
