//! Committed offsets: taken, held back by transactions, set anew, and gone after their time.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::{Error, ErrorCode, ProducerEpoch, ProducerId, Timestamp, TopicId, TopicPartition};

use super::super::records::{GroupLogRecord, show_ended, show_group, show_member, show_offset, show_pending};
use super::super::state::{CommittedOffset, Group, GroupTable, PendingOffset};
use super::{Commit, Decided, GroupReply, METADATA_BYTES_MAX, NewOffset, check_room, find, stale, unknown_group};
use crate::coordinator::PIECE_BYTES;
use flowstone_storage::planted::{Bug, is_planted};

/// How long the end of a producer's transaction is remembered: far longer than any transaction may be under way.
const ENDED_KEPT: Duration = Duration::from_secs(86_400);
/// How long a group stays that has neither members nor offsets: its members may be about to start again.
const EMPTY_KEPT: Duration = Duration::from_secs(600);

/// A part of a change that may be of any size: see [`PIECE_BYTES`].
#[derive(Default)]
struct Piece {
    records: Vec<GroupLogRecord>,
    bytes: usize,
}

impl Piece {
    /// What is left is for the next one.
    fn is_full(&self) -> bool {
        self.bytes >= PIECE_BYTES
    }

    fn push(&mut self, record: GroupLogRecord) {
        self.bytes += record.bytes();
        self.records.push(record);
    }

    fn done(self) -> Decided {
        (self.records, GroupReply::Done)
    }

    fn more(self) -> Decided {
        (self.records, GroupReply::More)
    }
}

pub(super) fn commit(table: &GroupTable, commit: Commit, now: Timestamp) -> Result<Decided, Error> {
    let group = table.group(&commit.group);
    let member = match &commit.member {
        Some((id, epoch)) => {
            let (_, member) = find(table, &commit.group, id)?;
            if *epoch != member.epoch && !is_planted(Bug::TakeStaleCommits) {
                return Err(stale(*epoch, member.epoch));
            }
            Some(member)
        }
        None if group.is_some_and(|group| !group.members.is_empty()) => {
            let what = format!(
                "group `{}` has members, and only they commit; stop its consumers first, or commit as one of them",
                commit.group
            );
            return Err(Error::new(ErrorCode::GroupNotEmpty, what));
        }
        None => None,
    };
    if let Some((producer, epoch)) = commit.transaction {
        check_transaction(table, producer, epoch)?;
    }
    let mut room = table.rules().offsets_max.saturating_sub(group.map_or(0, Group::offset_count));
    let (mut records, mut errors) = (Vec::new(), Vec::new());
    if group.is_none() {
        check_room(table)?;
        records.push(show_group(&commit.group, Some(&Group::new(&table.rules().assignor, now))));
    }
    let empty = records.len();
    for (tp, wanted) in commit.offsets {
        let refused = check(&wanted).or_else(|| match member {
            Some(member) if !member.holds(tp) && !is_planted(Bug::TakeStaleCommits) => Some(Error::new(
                ErrorCode::NotAssigned,
                "this member does not own the partition: it was given to another one, whose commits count; go on with \
                 what the newest assignment says",
            )),
            _ => None,
        });
        let is_known = match commit.transaction {
            Some((producer, _)) => {
                group.is_some_and(|group| group.pending.get(&producer).is_some_and(|pending| pending.contains_key(&tp)))
            }
            None => group.is_some_and(|group| group.offsets.contains_key(&tp)),
        };
        let refused = refused.or_else(|| (!is_known && room == 0).then(|| too_many(table)));
        if let Some(error) = refused {
            errors.push((tp, error.with_partition(tp.partition)));
            continue;
        }
        room -= usize::from(!is_known);
        let offset = committed(wanted, now);
        records.push(match commit.transaction {
            Some(_) if is_planted(Bug::CommitPendingAtOnce) => show_offset(&commit.group, tp, Some(&offset)),
            Some((producer, epoch)) => {
                show_pending(producer, &commit.group, tp, Some(&PendingOffset { offset, epoch }))
            }
            None => show_offset(&commit.group, tp, Some(&offset)),
        });
        if let (None, Some(group)) = (commit.transaction, group) {
            // It is the newest word: what a transaction said before does not count any more, however that ends.
            let older = group.pending_of(tp).map(|producer| show_pending(producer, &commit.group, tp, None));
            records.extend(older);
        }
    }
    if records.len() == empty {
        // Nothing was taken: no group comes into being by that.
        records.clear();
    }
    Ok((records, GroupReply::Offsets(errors)))
}

fn committed(wanted: NewOffset, at: Timestamp) -> CommittedOffset {
    let NewOffset { offset, leader_epoch, metadata } = wanted;
    CommittedOffset { offset, leader_epoch, metadata: metadata.into(), at }
}

fn check(wanted: &NewOffset) -> Option<Error> {
    if wanted.metadata.len() > METADATA_BYTES_MAX {
        let what = format!(
            "metadata of {} bytes, and {METADATA_BYTES_MAX} is the limit; keep what is longer elsewhere",
            wanted.metadata.len()
        );
        return Some(Error::new(ErrorCode::OffsetMetadataTooLarge, what));
    }
    if wanted.offset.get() < 0 {
        let what = format!("offset {} is below zero; commit the next offset to read", wanted.offset);
        return Some(Error::new(ErrorCode::InvalidRequest, what));
    }
    None
}

fn too_many(table: &GroupTable) -> Error {
    let what = format!(
        "the group has {} committed offsets, its limit; remove those that nobody needs, or raise group.offsets",
        table.rules().offsets_max
    );
    Error::new(ErrorCode::GroupFull, what)
}

/// A transaction that has ended takes nothing more, and a producer has one at a time.
fn check_transaction(table: &GroupTable, producer: ProducerId, epoch: ProducerEpoch) -> Result<(), Error> {
    let fenced = || {
        let what = format!(
            "the transaction under producer epoch {epoch} has ended: the producer was taken over, or its transaction was \
             timed out; begin anew"
        );
        Error::new(ErrorCode::ProducerFenced, what)
    };
    if table.ended(producer).is_some_and(|ended| epoch < ended) {
        return Err(fenced());
    }
    for name in table.in_transaction(producer) {
        // All that a producer has pending is of one epoch: another one is refused here.
        let pending = table.group(name).and_then(|group| group.pending.get(&producer)?.values().next());
        let Some(pending) = pending else { continue };
        if pending.epoch > epoch {
            return Err(fenced());
        }
        if pending.epoch < epoch {
            let what = "the producer's last transaction has not ended here yet; try again in a moment";
            return Err(Error::new(ErrorCode::ConcurrentTransactions, what));
        }
    }
    Ok(())
}

pub(super) fn end_pending(
    table: &GroupTable,
    producer: ProducerId,
    epoch: ProducerEpoch,
    commit: bool,
    now: Timestamp,
) -> Decided {
    let mut piece = Piece::default();
    // In the first piece: nothing late comes in between two of them.
    if table.ended(producer).is_none_or(|ended| ended < epoch) {
        piece.push(show_ended(producer, Some((epoch, now))));
    }
    for name in table.in_transaction(producer) {
        let Some(group) = table.group(name) else { continue };
        let pending = group.pending.get(&producer).into_iter().flatten();
        for (tp, pending) in pending.filter(|(_, pending)| pending.epoch < epoch) {
            if piece.is_full() {
                return piece.more();
            }
            let counts = match commit {
                true => !is_planted(Bug::LosePendingOffsets),
                false => is_planted(Bug::KeepAbortedOffsets),
            };
            if counts {
                piece.push(show_offset(name, *tp, Some(&pending.offset)));
            }
            piece.push(show_pending(producer, name, *tp, None));
        }
    }
    piece.done()
}

fn check_empty(name: &str, group: &Group, what: &str) -> Result<(), Error> {
    if group.members.is_empty() {
        return Ok(());
    }
    let members = group.members.len();
    let why = format!("group `{name}` has {members} member(s): stop its consumers before {what}");
    Err(Error::new(ErrorCode::GroupNotEmpty, why))
}

pub(super) fn reset(
    table: &GroupTable,
    name: &Arc<str>,
    offsets: Vec<(TopicPartition, Option<NewOffset>)>,
    dry_run: bool,
    now: Timestamp,
) -> Result<Decided, Error> {
    let group = table.group(name);
    let (mut records, mut errors) = (Vec::new(), Vec::new());
    match group {
        Some(group) => check_empty(name, group, "its offsets are set")?,
        None => {
            check_room(table)?;
            records.push(show_group(name, Some(&Group::new(&table.rules().assignor, now))));
        }
    }
    let empty = records.len();
    let mut room = table.rules().offsets_max.saturating_sub(group.map_or(0, Group::offset_count));
    for (tp, wanted) in offsets {
        let is_known = group.is_some_and(|group| group.offsets.contains_key(&tp));
        let pending = group.is_some_and(|group| group.is_pending(tp)).then(|| {
            let what = "a transaction has an offset of this partition pending; try again once it has ended";
            Error::new(ErrorCode::UnstableOffsets, what)
        });
        let refused = pending.or_else(|| wanted.as_ref().and_then(check));
        let refused = refused.or_else(|| (wanted.is_some() && !is_known && room == 0).then(|| too_many(table)));
        if let Some(error) = refused {
            errors.push((tp, error.with_partition(tp.partition)));
            continue;
        }
        match wanted {
            Some(wanted) => {
                room -= usize::from(!is_known);
                records.push(show_offset(name, tp, Some(&committed(wanted, now))));
            }
            None if is_known => records.push(show_offset(name, tp, None)),
            None => {}
        }
    }
    if dry_run || records.len() == empty {
        records.clear();
    }
    Ok((records, GroupReply::Offsets(errors)))
}

pub(super) fn delete(table: &GroupTable, name: &Arc<str>) -> Result<Decided, Error> {
    let group = table.group(name).ok_or_else(|| unknown_group(name))?;
    check_empty(name, group, "it is deleted")?;
    if !group.pending.is_empty() {
        let what = format!("a transaction has offsets of group `{name}` pending; try again once it has ended");
        return Err(Error::new(ErrorCode::ConcurrentTransactions, what));
    }
    let mut piece = Piece::default();
    Ok(if gone(&mut piece, name, group) { piece.done() } else { piece.more() })
}

/// Everything of a group, itself last; whether there was room for that.
fn gone(piece: &mut Piece, name: &str, group: &Group) -> bool {
    let mut partitions: Vec<TopicPartition> = group.offsets.keys().copied().collect();
    partitions.sort_unstable();
    let offsets = partitions.into_iter().map(|tp| show_offset(name, tp, None));
    let members = group.members.keys().map(|id| show_member(name, id, None));
    for record in offsets.chain(members).chain([show_group(name, None)]) {
        if piece.is_full() {
            return false;
        }
        piece.push(record);
    }
    true
}

pub(super) fn forget_topics(table: &GroupTable, topics: &[TopicId]) -> Decided {
    let topics: HashSet<TopicId> = topics.iter().copied().collect();
    let mut piece = Piece::default();
    for (name, group) in table.groups() {
        let mut gone: Vec<TopicPartition> =
            group.offsets.keys().filter(|tp| topics.contains(&tp.topic)).copied().collect();
        gone.sort_unstable();
        for tp in gone {
            if piece.is_full() {
                return piece.more();
            }
            piece.push(show_offset(name, tp, None));
        }
    }
    piece.done()
}

/// Whether [`expire`] would find anything.
pub(crate) fn is_due(table: &GroupTable, now: Timestamp) -> bool {
    !expire(table, 1, now).0.is_empty()
}

/// Offsets of a group that has been empty for long, unless they were committed since then; groups without any; and the
/// ends of transactions of long ago.
pub(super) fn expire(table: &GroupTable, records_max: usize, now: Timestamp) -> Decided {
    let before = now.before(table.rules().offsets_retention);
    let mut piece = Piece::default();
    let more = |piece: Piece| (piece.records, GroupReply::Expired { more: true });
    let expired = |group: &Group| {
        let until = if group.offset_count() == 0 { now.before(EMPTY_KEPT) } else { before };
        group.empty_since.is_some_and(|since| since < until)
    };
    for (name, group) in table.groups().filter(|(_, group)| expired(group)) {
        if piece.records.len() >= records_max {
            return more(piece);
        }
        let is_old = |(tp, offset): &(&TopicPartition, &CommittedOffset)| offset.at < before && !group.is_pending(**tp);
        let old: Vec<TopicPartition> = group.offsets.iter().filter(is_old).map(|(tp, _)| *tp).collect();
        if old.len() == group.offsets.len() && group.pending.is_empty() {
            gone(&mut piece, name, group);
        } else {
            for tp in old {
                if !piece.is_full() {
                    piece.push(show_offset(name, tp, None));
                }
            }
        }
        if piece.is_full() {
            return more(piece);
        }
    }
    let room = records_max.saturating_sub(piece.records.len());
    let forgotten: Vec<ProducerId> = table
        .ended_before(now.before(ENDED_KEPT))
        .filter(|producer| table.in_transaction(*producer).is_empty())
        .take(room)
        .collect();
    let is_cut = forgotten.len() == room;
    forgotten.into_iter().for_each(|producer| piece.push(show_ended(producer, None)));
    (piece.records, GroupReply::Expired { more: is_cut })
}
