//! A partition's replicas, and the life of a change of them.
//!
//! ```text
//!             replicas  leaving  before   may_remove
//!  at rest    a b c     -        -        no
//!  wanted     d b c     a        a b c    no           d is fed; cancelling leads back to a b c
//!  caught up  d b c     a        a b c    yes          d votes, a is removed from the group; no way back
//!  at rest    d b c     -        -        no           a's broker deletes its files
//! ```
//!
//! The controller decides what is wanted; the partition's leader makes the group follow, one member at a time, and tells
//! how far it is. Everything here is a function of what is and what is told.

use std::collections::BTreeSet;

use flowstone_protocol::{BrokerId, DirectoryId, LeaderEpoch, ReplicaId};

/// A replica's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) broker: BrokerId,
    pub(crate) directory: DirectoryId,
    pub(crate) replica: ReplicaId,
}

/// Who leads a partition, as it said itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leader {
    pub(crate) broker: BrokerId,
    pub(crate) epoch: LeaderEpoch,
}

impl Leader {
    /// Kept in place of `Option`, which would cost each partition 8 bytes more.
    const NONE: Self = Self { broker: BrokerId::new(-1), epoch: LeaderEpoch::NONE };
}

/// A replica that goes on, as the only voter, with what another one had in the same directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    pub(crate) replica: ReplicaId,
    pub(crate) from: ReplicaId,
}

/// The replicas that a group began with: they alone may be made as voters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Founders {
    /// Those that are wanted now.
    Replicas,
    /// Sorted; none, once all of them are gone.
    These(Vec<ReplicaId>),
}

/// What is wanted of a partition's replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Assignment {
    /// The preferred leader first.
    pub(crate) replicas: Vec<Place>,
    pub(crate) founders: Founders,
    /// On their way out.
    pub(crate) leaving: Vec<Place>,
    /// The replicas before the change that is under way, in their order; empty at rest.
    pub(crate) before: Vec<ReplicaId>,
    /// Those that leave may be removed, and there is no way back.
    pub(crate) may_remove: bool,
    pub(crate) recovered: Option<Recovered>,
}

/// A partition as the metadata knows it. Small at rest: there are hundreds of thousands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PartitionEntry {
    replicas: Box<[Place]>,
    leader: Leader,
    /// `None` at rest, with the founders in place.
    unsettled: Option<Box<Unsettled>>,
}

const _: () = assert!(size_of::<PartitionEntry>() == 32 && size_of::<Place>() == 32);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Unsettled {
    founders: Founders,
    leaving: Box<[Place]>,
    before: Box<[ReplicaId]>,
    may_remove: bool,
    recovered: Option<Recovered>,
}

impl PartitionEntry {
    pub(crate) fn new(assignment: Assignment) -> Self {
        let Assignment { replicas, founders, leaving, before, may_remove, recovered } = assignment;
        let (leaving, before) = (leaving.into_boxed_slice(), before.into_boxed_slice());
        let unsettled = Unsettled { founders, leaving, before, may_remove, recovered };
        let at_rest = unsettled.founders == Founders::Replicas
            && unsettled.leaving.is_empty()
            && unsettled.before.is_empty()
            && !unsettled.may_remove
            && unsettled.recovered.is_none();
        let unsettled = if at_rest { None } else { Some(Box::new(unsettled)) };
        Self { replicas: replicas.into_boxed_slice(), leader: Leader::NONE, unsettled }
    }

    #[must_use]
    pub(crate) fn with_leader(mut self, leader: Option<Leader>) -> Self {
        self.set_leader(leader);
        self
    }

    pub(crate) fn set_leader(&mut self, leader: Option<Leader>) {
        self.leader = leader.unwrap_or(Leader::NONE);
    }

    /// Wanted replicas, the preferred leader first.
    pub(crate) fn replicas(&self) -> &[Place] {
        &self.replicas
    }

    /// Members of the group on their way out.
    pub(crate) fn leaving(&self) -> &[Place] {
        self.unsettled.as_ref().map_or(&[], |unsettled| &unsettled.leaving)
    }

    /// Wanted or on its way out: every replica that may be a member of the group.
    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        self.replicas.iter().chain(self.leaving())
    }

    pub(crate) fn place(&self, replica: ReplicaId) -> Option<&Place> {
        self.places().find(|place| place.replica == replica)
    }

    /// The replicas before the change that is under way; empty at rest.
    pub(crate) fn before(&self) -> &[ReplicaId] {
        self.unsettled.as_ref().map_or(&[], |unsettled| &unsettled.before)
    }

    /// Those that leave may be removed from the group.
    pub(crate) fn may_remove(&self) -> bool {
        self.unsettled.as_ref().is_some_and(|unsettled| unsettled.may_remove)
    }

    pub(crate) fn recovered(&self) -> Option<Recovered> {
        self.unsettled.as_ref().and_then(|unsettled| unsettled.recovered)
    }

    /// The members with which the group began, sorted; empty once none of them is left.
    pub(crate) fn founders(&self) -> Vec<ReplicaId> {
        match self.unsettled.as_ref().map(|unsettled| &unsettled.founders) {
            None | Some(Founders::Replicas) => sorted(&self.replicas),
            Some(Founders::These(founders)) => founders.clone(),
        }
    }

    /// As it is, but that no replica may be made as a voter any more.
    #[must_use]
    pub(crate) fn without_founders(&self) -> Self {
        let assignment = Assignment { founders: Founders::These(Vec::new()), ..self.assignment() };
        Self::new(assignment).with_leader(self.leader())
    }

    /// Whether the replica may be made as a voter; all others begin as learners.
    pub(crate) fn is_founder(&self, replica: ReplicaId) -> bool {
        match self.unsettled.as_ref().map(|unsettled| &unsettled.founders) {
            None | Some(Founders::Replicas) => self.replicas.iter().any(|place| place.replica == replica),
            Some(Founders::These(founders)) => founders.contains(&replica),
        }
    }

    /// Wanted replicas that the change under way brought.
    pub(crate) fn joining(&self) -> impl Iterator<Item = &Place> {
        let before = self.before();
        self.replicas.iter().filter(|place| !before.is_empty() && !before.contains(&place.replica))
    }

    /// A change of replicas is under way: it ends when nobody is leaving any more.
    pub(crate) fn is_changing(&self) -> bool {
        !self.leaving().is_empty()
    }

    /// The group's voters, as far as the controller can know: those of before the change, as new ones come last. Once all
    /// of these are gone, it is the new ones.
    pub(crate) fn voters(&self) -> Vec<Place> {
        let old: Vec<Place> = self.before().iter().filter_map(|replica| self.place(*replica).copied()).collect();
        if old.is_empty() { self.replicas.to_vec() } else { old }
    }

    /// Every set of voters that the group may have at this moment, as far as the controller can know: while a change is
    /// under way nobody but the leader knows which of its steps are done.
    pub(crate) fn electorates(&self) -> Vec<Vec<Place>> {
        let before = self.voters();
        let mut electorates = vec![before.clone()];
        if self.is_changing() {
            electorates.push(before.iter().chain(self.joining()).copied().collect());
        }
        if self.may_remove() {
            electorates.push(self.replicas.to_vec());
        }
        electorates
    }

    /// Whether the replica has voted from the group's beginning on. Of others it is not known whether they ever came to
    /// that.
    pub(crate) fn has_voted(&self, replica: ReplicaId) -> bool {
        self.is_founder(replica) || self.recovered().is_some_and(|recovered| recovered.replica == replica)
    }

    pub(crate) fn leader(&self) -> Option<Leader> {
        (self.leader != Leader::NONE).then_some(self.leader)
    }

    pub(crate) fn assignment(&self) -> Assignment {
        let replicas = self.replicas.to_vec();
        match self.unsettled.as_deref().cloned() {
            None => Assignment::new(replicas),
            Some(Unsettled { founders, leaving, before, may_remove, recovered }) => Assignment {
                replicas,
                founders,
                leaving: leaving.into_vec(),
                before: before.into_vec(),
                may_remove,
                recovered,
            },
        }
    }
}

/// Why a change cannot be cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotCancelled {
    /// There is none.
    AtRest,
    /// Old replicas are being removed already.
    PastReturn,
}

impl Assignment {
    /// Of a partition that begins with these.
    pub(crate) fn new(replicas: Vec<Place>) -> Self {
        Self {
            replicas,
            founders: Founders::Replicas,
            leaving: Vec::new(),
            before: Vec::new(),
            may_remove: false,
            recovered: None,
        }
    }

    /// A partition at rest shall have these replicas. Where none leaves, that is all: another order is another preferred
    /// leader, and what is added begins to follow.
    #[must_use]
    pub(crate) fn moved(entry: &PartitionEntry, wanted: Vec<Place>) -> Self {
        let mut next = Self::of_changed(entry);
        next.leaving.extend(entry.replicas().iter().filter(|place| !wanted.contains(place)));
        next.before = ids(entry.replicas());
        next.replicas = wanted;
        next.normal()
    }

    /// Back to what was before the change.
    ///
    /// # Errors
    /// Why there is no way back.
    pub(crate) fn cancelled(entry: &PartitionEntry) -> Result<Self, NotCancelled> {
        if !entry.is_changing() {
            return Err(NotCancelled::AtRest);
        }
        if entry.may_remove() {
            return Err(NotCancelled::PastReturn);
        }
        let mut next = Self::of_changed(entry);
        // All of them are still there: none is removed before there is no way back.
        next.replicas = entry.voters();
        next.leaving = entry.places().filter(|place| !entry.before().contains(&place.replica)).copied().collect();
        next.may_remove = true;
        Ok(next.normal())
    }

    /// What the leader of the group tells of its progress; `None` where it says nothing new.
    pub(crate) fn progressed(entry: &PartitionEntry, may_remove: bool, removed: &[ReplicaId]) -> Option<Self> {
        if !entry.is_changing() {
            return None;
        }
        let mut next = Self::of_changed(entry);
        next.may_remove |= may_remove;
        // Nobody is removed before that; what says so is of another change.
        next.leaving.retain(|place| !next.may_remove || !removed.contains(&place.replica));
        if next.leaving.len() == entry.leaving().len() && next.may_remove == entry.may_remove() {
            return None;
        }
        Some(next.normal())
    }

    /// `lost` can never vote again: `fresh` takes its place. There is nothing to wait for, so that a dead voter may be
    /// removed before the new one votes; a learner that is lost counts in no majority, and its change goes on as it was.
    #[must_use]
    pub(crate) fn replaced(entry: &PartitionEntry, lost: Place, fresh: Place) -> Self {
        let was_joining = entry.joining().any(|place| *place == lost);
        let mut next = Self::of_changed(entry);
        if next.before.is_empty() {
            next.before = ids(entry.replicas());
        }
        for place in next.replicas.iter_mut().filter(|place| **place == lost) {
            *place = fresh;
        }
        next.leaving.push(lost);
        next.may_remove |= !was_joining;
        next.normal()
    }

    /// A survivor goes on alone, under a new id, and feeds `others`.
    #[must_use]
    pub(crate) fn recovered(survivor: Place, from: ReplicaId, others: Vec<Place>) -> Self {
        let mut replicas = vec![survivor];
        replicas.extend(others);
        Self {
            founders: Founders::These(Vec::new()),
            recovered: Some(Recovered { replica: survivor.replica, from }),
            ..Self::new(replicas)
        }
    }

    /// As it is, with the founders by name: what is wanted is about to be something else.
    fn of_changed(entry: &PartitionEntry) -> Self {
        let mut assignment = entry.assignment();
        assignment.founders = Founders::These(entry.founders());
        assignment
    }

    /// The one form of what it says: nothing is left of a change that has ended.
    fn normal(mut self) -> Self {
        let members: BTreeSet<ReplicaId> =
            self.replicas.iter().chain(&self.leaving).map(|place| place.replica).collect();
        if self.leaving.is_empty() {
            self.may_remove = false;
            self.before.clear();
        }
        if let Founders::These(founders) = &mut self.founders {
            if !founders.iter().any(|founder| members.contains(founder)) {
                founders.clear();
            }
            if self.leaving.is_empty() && *founders == sorted(&self.replicas) {
                self.founders = Founders::Replicas;
            }
        }
        self.recovered = self.recovered.filter(|recovered| members.contains(&recovered.replica));
        self
    }
}

fn sorted(places: &[Place]) -> Vec<ReplicaId> {
    let mut ids = ids(places);
    ids.sort_unstable();
    ids
}

pub(crate) fn ids(places: &[Place]) -> Vec<ReplicaId> {
    places.iter().map(|place| place.replica).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(id: u64) -> Place {
        Place { broker: BrokerId::new(id as i32), directory: DirectoryId::new(id.into()), replica: ReplicaId::new(id) }
    }

    fn places(ids: &[u64]) -> Vec<Place> {
        ids.iter().map(|id| place(*id)).collect()
    }

    fn at_rest(ids: &[u64]) -> PartitionEntry {
        PartitionEntry::new(Assignment::new(places(ids)))
    }

    fn numbers(entry: &PartitionEntry) -> (Vec<u64>, Vec<u64>, bool) {
        let ids = |places: &[Place]| places.iter().map(|place| place.replica.get()).collect();
        (ids(entry.replicas()), ids(entry.leaving()), entry.may_remove())
    }

    fn founders(entry: &PartitionEntry) -> Vec<u64> {
        entry.founders().iter().map(|id| id.get()).collect()
    }

    #[test]
    fn a_move_goes_forward_in_two_halves() {
        let moving = PartitionEntry::new(Assignment::moved(&at_rest(&[1, 2, 3]), places(&[4, 2, 3])));
        assert_eq!(numbers(&moving), (vec![4, 2, 3], vec![1], false));
        assert_eq!(moving.joining().collect::<Vec<_>>(), [&place(4)]);
        assert_eq!(founders(&moving), [1, 2, 3], "the group's first members do not change");
        assert!(moving.is_founder(ReplicaId::new(1)) && !moving.is_founder(ReplicaId::new(4)));

        assert_eq!(Assignment::progressed(&moving, false, &[ReplicaId::new(1)]), None, "nobody may go yet");

        let caught_up = PartitionEntry::new(Assignment::progressed(&moving, true, &[]).expect("news"));
        assert_eq!(numbers(&caught_up), (vec![4, 2, 3], vec![1], true));
        assert_eq!(Assignment::progressed(&caught_up, true, &[ReplicaId::new(2)]), None, "nothing new");

        let done = PartitionEntry::new(Assignment::progressed(&caught_up, false, &[ReplicaId::new(1)]).expect("news"));
        assert_eq!(numbers(&done), (vec![4, 2, 3], vec![], false));
        assert!(!done.is_changing());
        assert_eq!(founders(&done), [1, 2, 3]);
    }

    #[test]
    fn founders_are_forgotten_once_none_is_left() {
        let mut entry = at_rest(&[1, 2]);
        for wanted in [[1, 3], [4, 3]] {
            let gone: Vec<ReplicaId> = entry
                .replicas()
                .iter()
                .map(|place| place.replica)
                .filter(|replica| !wanted.contains(&replica.get()))
                .collect();
            entry = PartitionEntry::new(Assignment::moved(&entry, places(&wanted)));
            entry = PartitionEntry::new(Assignment::progressed(&entry, true, &gone).expect("news"));
        }
        assert_eq!(founders(&entry), [0u64; 0]);
        assert!(!entry.is_founder(ReplicaId::new(4)), "what comes later begins as a learner");
    }

    #[test]
    fn cancelling_leads_back_until_old_replicas_may_be_removed() {
        assert_eq!(Assignment::cancelled(&at_rest(&[1])), Err(NotCancelled::AtRest));
        let moving = PartitionEntry::new(Assignment::moved(&at_rest(&[1, 2, 3]), places(&[3, 4, 5])));
        let back = PartitionEntry::new(Assignment::cancelled(&moving).expect("there is a way back"));
        assert_eq!(numbers(&back), (vec![1, 2, 3], vec![4, 5], true));
        let gone = [ReplicaId::new(4), ReplicaId::new(5)];
        let done = Assignment::progressed(&back, false, &gone).expect("news");
        assert_eq!(PartitionEntry::new(done), at_rest(&[1, 2, 3]), "as if nothing had been");

        let caught_up = PartitionEntry::new(Assignment::progressed(&moving, true, &[]).expect("news"));
        assert_eq!(Assignment::cancelled(&caught_up), Err(NotCancelled::PastReturn));
    }

    #[test]
    fn a_group_grows_without_a_second_half() {
        let grown = PartitionEntry::new(Assignment::moved(&at_rest(&[1]), places(&[1, 2, 3])));
        assert_eq!(numbers(&grown), (vec![1, 2, 3], vec![], false));
        assert!(!grown.is_changing());
        assert_eq!(founders(&grown), [1], "those who came later are no founders");
        // It shrinks back: the way back is open until the others may be removed.
        let shrinking = PartitionEntry::new(Assignment::moved(&grown, places(&[1])));
        assert_eq!(numbers(&shrinking), (vec![1], vec![2, 3], false));
        assert_eq!(PartitionEntry::new(Assignment::cancelled(&shrinking).expect("there is a way back")), grown);
    }

    #[test]
    fn another_order_is_no_change_of_members() {
        let turned = PartitionEntry::new(Assignment::moved(&at_rest(&[1, 2, 3]), places(&[2, 1, 3])));
        assert!(!turned.is_changing());
        assert_eq!(numbers(&turned), (vec![2, 1, 3], vec![], false));
        assert_eq!(turned, at_rest(&[2, 1, 3]), "it takes no more room than before");
    }

    #[test]
    fn what_is_lost_is_replaced_at_once() {
        let entry = at_rest(&[1, 2, 3]);
        let replaced = PartitionEntry::new(Assignment::replaced(&entry, place(2), place(9)));
        assert_eq!(numbers(&replaced), (vec![1, 9, 3], vec![2], true));
        assert_eq!(Assignment::cancelled(&replaced), Err(NotCancelled::PastReturn));

        // A learner that is lost on the way in: the move stays one that can be cancelled.
        let moving = PartitionEntry::new(Assignment::moved(&entry, places(&[4, 2, 3])));
        let replaced = PartitionEntry::new(Assignment::replaced(&moving, place(4), place(9)));
        assert_eq!(numbers(&replaced), (vec![9, 2, 3], vec![1, 4], false));
        let back = PartitionEntry::new(Assignment::cancelled(&replaced).expect("there is a way back"));
        assert_eq!(numbers(&back), (vec![1, 2, 3], vec![9, 4], true));
    }

    #[test]
    fn a_survivor_goes_on_alone_and_feeds_the_others() {
        let recovered = PartitionEntry::new(Assignment::recovered(place(9), ReplicaId::new(1), places(&[7, 8])));
        assert_eq!(numbers(&recovered), (vec![9, 7, 8], vec![], false));
        assert_eq!(recovered.recovered(), Some(Recovered { replica: ReplicaId::new(9), from: ReplicaId::new(1) }));
        assert_eq!(founders(&recovered), [0u64; 0], "nobody but the survivor begins with a vote");
        let moved = PartitionEntry::new(Assignment::moved(&recovered, places(&[7, 8])));
        assert!(moved.recovered().is_some(), "its broker may still have to learn of it");
        let moved = PartitionEntry::new(Assignment::progressed(&moved, true, &[ReplicaId::new(9)]).expect("news"));
        assert_eq!(moved.recovered(), None);
    }
}
