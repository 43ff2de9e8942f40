//! What may be asked of groups, and what is decided: commands in, records and an answer out.
//!
//! A target is reached partition by partition. A member is asked to give up what it shall not own any more; once it says
//! that it has, whoever shall own that partition is given it, and its member epoch grows.
//!
//! ```text
//!   member a   owned 0 1 2   target 0 1    -> owned 0 1, revoking 2
//!   member b   owned 3       target 2 3    -> waits: 2 is held by a
//!   a reports that it owns 0 1             -> a is settled; b is given 2, its epoch grows
//! ```
//!
//! So nobody waits for anybody but the one whose partition it gets, and no partition has two owners: it is held by the
//! old one until that says otherwise, leaves, or is removed. A report counts only under the member's current epoch: one
//! that was sent before the last gift arrived does not speak of it.

mod draft;
pub(crate) mod offsets;

use std::sync::Arc;

use flowstone_protocol::{
    Error, ErrorCode, LeaderEpoch, Offset, ProducerEpoch, ProducerId, Timestamp, TopicId, TopicPartition,
};

use self::draft::Draft;
use super::assignment::Assignor;
use super::records::GroupLogRecord;
use super::state::{Group, GroupTable, Member};

/// Longest metadata of a committed offset, in bytes.
pub(crate) const METADATA_BYTES_MAX: usize = 4096;

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) enum GroupCommand {
    /// A member comes, or goes on with its membership.
    Join(Join),
    /// A member tells what it owns, or wants something else.
    Report(Report),
    /// A member goes.
    Leave { group: Arc<str>, member: Arc<str>, keep_place: bool },
    /// A member was silent for too long, or does not give up what it was asked for.
    Remove { group: Arc<str>, member: Arc<str> },
    /// Who shall own what.
    Install(Install),
    /// How far consumers have come.
    Commit(Commit),
    /// A producer's transaction has ended: its offsets count from now on, or never. Answered alike when that was done
    /// before.
    EndPending {
        producer: ProducerId,
        /// Of the next transaction: offsets under an epoch below it are ended, and refused from now on.
        epoch: ProducerEpoch,
        commit: bool,
    },
    /// Other offsets for a group without members; `None` removes one.
    Reset { group: Arc<str>, offsets: Vec<(TopicPartition, Option<NewOffset>)>, dry_run: bool },
    /// Away with a group without members.
    Delete { group: Arc<str> },
    /// These topics are gone, and what was committed of them with them.
    ForgetTopics(Vec<TopicId>),
    /// What is too old goes, at most so many records at a time.
    Expire { records_max: usize },
}

/// A member that comes.
#[derive(Clone, Debug)]
pub(crate) struct Join {
    pub(crate) group: Arc<str>,
    pub(crate) member: Arc<str>,
    /// 0: it begins; else it goes on with the membership of this epoch.
    pub(crate) epoch: i32,
    pub(crate) instance: String,
    pub(crate) client_id: String,
    pub(crate) host: String,
    pub(crate) rack: String,
    pub(crate) subscription: Subscription,
    /// Empty for any.
    pub(crate) assignor: String,
    /// Within this broker's bounds.
    pub(crate) session_timeout_ms: i32,
    pub(crate) rebalance_timeout_ms: i32,
    /// What it still owns.
    pub(crate) owned: Vec<TopicPartition>,
}

/// What a member wants to read: topic names, and a pattern of such (empty for none).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Subscription {
    pub(crate) topics: Vec<String>,
    pub(crate) pattern: String,
}

/// What a member tells.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) group: Arc<str>,
    pub(crate) member: Arc<str>,
    /// The one that it has taken in.
    pub(crate) epoch: i32,
    pub(crate) owned: Option<Vec<TopicPartition>>,
    pub(crate) subscription: Option<Subscription>,
}

/// Targets of all members of a group, computed for what it was at `epoch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Install {
    pub(crate) group: Arc<str>,
    pub(crate) epoch: i32,
    /// Of every member, sorted partitions.
    pub(crate) targets: Vec<(Arc<str>, Vec<TopicPartition>)>,
}

/// An offset as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewOffset {
    pub(crate) offset: Offset,
    pub(crate) leader_epoch: LeaderEpoch,
    pub(crate) metadata: String,
}

/// Offsets to be committed.
#[derive(Clone, Debug)]
pub(crate) struct Commit {
    pub(crate) group: Arc<str>,
    /// Who commits, under which epoch; `None`: nobody in particular, of a group without members.
    pub(crate) member: Option<(Arc<str>, i32)>,
    pub(crate) offsets: Vec<(TopicPartition, NewOffset)>,
    /// They count once this transaction commits.
    pub(crate) transaction: Option<(ProducerId, ProducerEpoch)>,
}

/// The answer to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GroupReply {
    /// It is so.
    Done,
    /// The member belongs to the group.
    Joined {
        epoch: i32,
        session_timeout_ms: i32,
        /// The one whose place it took.
        displaced: Option<Arc<str>>,
    },
    /// Those that were not taken; all others were.
    Offsets(Vec<(TopicPartition, Error)>),
    /// A piece of it is done; the same command again does the next one.
    More,
    /// Whether there is more to be done.
    Expired { more: bool },
}

type Decided = (Vec<GroupLogRecord>, GroupReply);

/// What follows from `command` in this state.
pub(crate) fn decide(table: &GroupTable, command: GroupCommand, now: Timestamp) -> Result<Decided, Error> {
    match command {
        GroupCommand::Join(wanted) => join(table, wanted, now),
        GroupCommand::Report(report) => self::report(table, report, now),
        GroupCommand::Leave { group, member, keep_place } => leave(table, &group, &member, keep_place, now),
        GroupCommand::Remove { group, member } => leave(table, &group, &member, false, now),
        GroupCommand::Install(targets) => Ok(install(table, targets, now)),
        GroupCommand::Commit(commit) => offsets::commit(table, commit, now),
        GroupCommand::EndPending { producer, epoch, commit } => {
            Ok(offsets::end_pending(table, producer, epoch, commit, now))
        }
        GroupCommand::Reset { group, offsets, dry_run } => offsets::reset(table, &group, offsets, dry_run, now),
        GroupCommand::Delete { group } => offsets::delete(table, &group),
        GroupCommand::ForgetTopics(topics) => Ok(offsets::forget_topics(table, &topics)),
        GroupCommand::Expire { records_max } => Ok(offsets::expire(table, records_max, now)),
    }
}

/// For a group that is not there.
pub(crate) fn unknown_group(name: &str) -> Error {
    let what = format!("there is no group `{name}`: nobody has joined it or committed for it; check its name");
    Error::new(ErrorCode::UnknownGroup, what)
}

/// For a member that is not in the group, or not any more.
pub(crate) fn unknown_member(group: &str) -> Error {
    let what = format!(
        "this member is not one of group `{group}`: it was silent for too long, left, or never joined; give up what it \
         owned and join anew under member epoch 0"
    );
    Error::new(ErrorCode::UnknownMember, what)
}

fn stale(asked: i32, current: i32) -> Error {
    let what = format!(
        "member epoch {asked} is not the current one, {current}: take in the newest assignment, then try again"
    );
    Error::new(ErrorCode::StaleMemberEpoch, what)
}

/// For a partition's group that has no room for another one.
fn check_room(table: &GroupTable) -> Result<(), Error> {
    let groups_max = table.rules().groups_max;
    if table.group_count() < groups_max {
        return Ok(());
    }
    let what = format!(
        "this partition of the groups' topic holds {groups_max} groups, its limit; delete groups that are not used, or \
         raise group.groups_per_partition"
    );
    Err(Error::new(ErrorCode::GroupFull, what))
}

fn join(table: &GroupTable, wanted: Join, now: Timestamp) -> Result<Decided, Error> {
    let base = table.group(&wanted.group);
    let known = base.and_then(|group| group.members.get(&wanted.member));
    if let Some(known) = known {
        return go_on(table, &wanted, known, now);
    }
    if wanted.epoch != 0 {
        return Err(unknown_member(&wanted.group));
    }
    let place = base.filter(|_| !wanted.instance.is_empty()).and_then(|group| group.instance(&wanted.instance));
    let Some(group) = base else {
        check_room(table)?;
        return begin(Draft::new(&wanted.group, None, &table.rules().assignor, now), wanted);
    };
    if let Some(place) = place {
        return take_over(Draft::of(&wanted.group, group, now), &Arc::clone(place), wanted);
    }
    let members_max = table.rules().members_max;
    if group.members.len() >= members_max {
        let what = format!(
            "group `{}` has {members_max} members, its limit; run fewer consumers, or raise group.members",
            wanted.group
        );
        return Err(Error::new(ErrorCode::GroupFull, what));
    }
    begin(Draft::of(&wanted.group, group, now), wanted)
}

/// The first epoch of a member is that of the group, which has just grown.
fn begin(mut draft: Draft<'_>, wanted: Join) -> Result<Decided, Error> {
    draft.grow_past_displaced();
    draft.grow();
    let epoch = draft.epoch();
    let session_timeout_ms = wanted.session_timeout_ms;
    let (name, member) = newcomer(wanted, epoch);
    draft.put(&name, Some(member));
    draft.check_words()?;
    draft.elect();
    let reply = GroupReply::Joined { epoch, session_timeout_ms, displaced: None };
    Ok((draft.into_records(), reply))
}

/// A newcomer under a known instance id: it gets what its predecessor had, who is nobody from now on.
fn take_over(mut draft: Draft<'_>, place: &Arc<str>, wanted: Join) -> Result<Decided, Error> {
    let Some(before) = draft.member(place).cloned() else { return begin(draft, wanted) };
    draft.put(place, None);
    let is_another = before.topics != wanted.subscription.topics
        || before.pattern != wanted.subscription.pattern
        || before.rack != wanted.rack
        || before.assignor != wanted.assignor;
    if is_another {
        draft.grow();
    }
    let epoch = (before.epoch + 1).max(draft.epoch());
    let session_timeout_ms = wanted.session_timeout_ms;
    let (name, member) = newcomer(wanted, epoch);
    // What the other was asked to give up, it has lost with its place.
    let member = Member { target: before.target, owned: before.owned, changed_at: before.changed_at, ..member };
    draft.put(&name, Some(member));
    draft.check_words()?;
    draft.elect();
    draft.give();
    let epoch = draft.member(&name).map_or(epoch, |member| member.epoch);
    let reply = GroupReply::Joined { epoch, session_timeout_ms, displaced: Some(Arc::clone(place)) };
    Ok((draft.into_records(), reply))
}

/// Who joins, by name, with nothing yet.
fn newcomer(wanted: Join, epoch: i32) -> (Arc<str>, Member) {
    let member = Member {
        instance: wanted.instance,
        client_id: wanted.client_id,
        host: wanted.host,
        rack: wanted.rack,
        topics: wanted.subscription.topics,
        pattern: wanted.subscription.pattern,
        assignor: wanted.assignor,
        session_timeout_ms: wanted.session_timeout_ms,
        rebalance_timeout_ms: wanted.rebalance_timeout_ms,
        epoch,
        previous_epoch: 0,
        target: Vec::new(),
        owned: Vec::new(),
        revoking: Vec::new(),
        away: false,
        changed_at: Offset::new(-1),
    };
    (wanted.member, member)
}

/// A member that is known joins: over another stream, or after it lost its memory.
fn go_on(table: &GroupTable, wanted: &Join, known: &Member, now: Timestamp) -> Result<Decided, Error> {
    let Some(group) = table.group(&wanted.group) else { return Err(unknown_member(&wanted.group)) };
    if known.instance != wanted.instance {
        let what = "a member keeps its instance id; join under another member id to change it";
        return Err(Error::new(ErrorCode::InvalidRequest, what));
    }
    if wanted.epoch > known.epoch || wanted.epoch < 0 {
        return Err(stale(wanted.epoch, known.epoch));
    }
    if !wanted.owned.iter().all(|tp| known.holds(*tp)) {
        let what = "it owns what was taken from it meanwhile: give up everything and join anew under member epoch 0";
        return Err(Error::new(ErrorCode::StaleMemberEpoch, what));
    }
    let mut draft = Draft::of(&wanted.group, group, now);
    let mut member = Member {
        client_id: wanted.client_id.clone(),
        host: wanted.host.clone(),
        rack: wanted.rack.clone(),
        topics: wanted.subscription.topics.clone(),
        pattern: wanted.subscription.pattern.clone(),
        assignor: wanted.assignor.clone(),
        session_timeout_ms: wanted.session_timeout_ms,
        rebalance_timeout_ms: wanted.rebalance_timeout_ms,
        // Who speaks under an older epoch does not know what it was given since, and may work on by now: it is asked again.
        revoking: match wanted.epoch == known.epoch || wanted.epoch == 0 {
            true => both(&known.revoking, &wanted.owned),
            false => known.revoking.clone(),
        },
        away: false,
        ..known.clone()
    };
    if wanted.epoch == 0 {
        // It has begun anew under its old name: what it says under the old epoch is from before.
        (member.previous_epoch, member.epoch) = (0, (known.epoch + 1).max(group.epoch));
    }
    let is_another = member.topics != known.topics
        || member.pattern != known.pattern
        || member.rack != known.rack
        || member.assignor != known.assignor;
    if is_another {
        draft.grow();
    }
    if member != *known {
        draft.put(&wanted.member, Some(member));
        draft.check_words()?;
        draft.elect();
        draft.give();
    }
    let epoch = draft.member(&wanted.member).map_or(known.epoch, |member| member.epoch);
    let reply = GroupReply::Joined { epoch, session_timeout_ms: wanted.session_timeout_ms, displaced: None };
    Ok((draft.into_records(), reply))
}

fn find<'a>(table: &'a GroupTable, group: &str, member: &str) -> Result<(&'a Group, &'a Member), Error> {
    let known = table.group(group).and_then(|known| Some((known, &**known.members.get(member)?)));
    known.ok_or_else(|| unknown_member(group))
}

fn report(table: &GroupTable, report: Report, now: Timestamp) -> Result<Decided, Error> {
    let (group, known) = find(table, &report.group, &report.member)?;
    if report.epoch > known.epoch {
        return Err(stale(report.epoch, known.epoch));
    }
    let mut member = known.clone();
    if let Some(owned) = &report.owned
        && report.epoch == known.epoch
    {
        member.revoking = both(&known.revoking, owned);
    }
    let mut draft = Draft::of(&report.group, group, now);
    if let Some(subscription) = report.subscription {
        let Subscription { topics, pattern } = subscription;
        if topics != known.topics || pattern != known.pattern {
            (member.topics, member.pattern) = (topics, pattern);
            draft.grow();
        }
    }
    if member != *known {
        draft.put(&report.member, Some(member));
        draft.check_words()?;
        draft.give();
    }
    Ok((draft.into_records(), GroupReply::Done))
}

fn leave(
    table: &GroupTable,
    group: &Arc<str>,
    member: &Arc<str>,
    keep_place: bool,
    now: Timestamp,
) -> Result<Decided, Error> {
    let (known_group, known) = find(table, group, member)?;
    let mut draft = Draft::of(group, known_group, now);
    if keep_place && !known.instance.is_empty() {
        // It has stopped: what it was asked for, it has given up.
        draft.put(member, Some(Member { away: true, revoking: Vec::new(), ..known.clone() }));
    } else {
        draft.put(member, None);
        draft.grow_past(known.epoch);
        draft.grow();
        draft.elect();
    }
    draft.give();
    Ok((draft.into_records(), GroupReply::Done))
}

/// Targets of a group that has changed since they were computed are left alone: it is looked at again.
fn install(table: &GroupTable, install: Install, now: Timestamp) -> Decided {
    let nothing = (Vec::new(), GroupReply::Done);
    let Some(group) = table.group(&install.group).filter(|group| group.epoch == install.epoch) else { return nothing };
    let known = install.targets.iter().filter(|(id, _)| group.members.contains_key(id)).count();
    if known != group.members.len() || known != install.targets.len() {
        return nothing;
    }
    let changed: Vec<(Arc<str>, Member)> = install
        .targets
        .into_iter()
        .filter_map(|(id, target)| {
            let known = group.members.get(&id).filter(|known| known.target != target)?;
            let taken = minus(&known.owned, &target);
            let mut member = Member { owned: both(&known.owned, &target), target, ..Member::clone(known) };
            // One that is away runs nowhere: there is nothing to give up.
            if !member.away {
                member.revoking.extend(taken);
                member.revoking.sort_unstable();
            }
            Some((id, member))
        })
        .collect();
    let mut draft = Draft::of(&install.group, group, now);
    if !changed.is_empty() && group.assigned_epoch == group.epoch {
        // Not the members have changed, but the topics.
        draft.grow();
    }
    draft.assigned();
    for (id, member) in changed {
        draft.put(&id, Some(member));
    }
    draft.give();
    (draft.into_records(), GroupReply::Done)
}

/// The assignor that most members ask for; among equals the one that the group has, then the first by name.
fn elected<'a>(members: impl Iterator<Item = &'a Member>, current: &str) -> String {
    let mut votes = [0usize; Assignor::ALL.len()];
    for member in members {
        if let Some(at) = Assignor::ALL.iter().position(|assignor| assignor.name() == member.assignor) {
            votes[at] += 1;
        }
    }
    let best = Assignor::ALL.iter().zip(votes).filter(|(_, votes)| *votes > 0);
    let best =
        best.max_by_key(|(assignor, votes)| (*votes, assignor.name() == current, std::cmp::Reverse(assignor.name())));
    best.map_or_else(|| current.to_owned(), |(assignor, _)| assignor.name().to_owned())
}

/// What is in both; `a` is sorted.
fn both(a: &[TopicPartition], b: &[TopicPartition]) -> Vec<TopicPartition> {
    if b.is_sorted() {
        return a.iter().filter(|tp| b.binary_search(tp).is_ok()).copied().collect();
    }
    let mut b = b.to_vec();
    b.sort_unstable();
    both(a, &b)
}

/// What is in `a` and not in `b`; both are sorted.
fn minus(a: &[TopicPartition], b: &[TopicPartition]) -> Vec<TopicPartition> {
    a.iter().filter(|tp| b.binary_search(tp).is_err()).copied().collect()
}
