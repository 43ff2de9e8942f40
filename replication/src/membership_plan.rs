//! What a leader does next to bring its group's members to where they are wanted: one replica at a time, a dead one out
//! first, itself last, and never through a group that could not elect.
//!
//! A pure function of how the group is and what is wanted, asked again after every step: it needs no memory, so a new
//! leader goes on where the old one stopped.

use flowstone_protocol::ReplicaId;
use flowstone_storage::planted::{Bug, is_planted};

use crate::request::{GroupStatus, MemberStatus};

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanStep {
    /// Nothing now: all is as wanted, or something has to catch up first.
    Nothing,
    /// It begins to follow.
    AddLearner(ReplicaId),
    /// It votes from now on.
    Promote(ReplicaId),
    /// It is out.
    Remove(ReplicaId),
    /// The leader itself is to go, or a better one is there: that one leads from now on.
    TransferAway(ReplicaId),
    /// Every new replica has caught up: the controller may begin the second half.
    ReportMayRemove,
    /// Of those that were to leave, these are out of the group for good.
    Done {
        /// Whom the controller may forget.
        removed: Vec<ReplicaId>,
    },
}

/// The next step of a group that should have the `wanted` replicas as voters and be rid of those in `leaving`; these go
/// only once the controller said that they `may_remove`.
///
/// `view` is the leader's: of any other replica nothing follows.
pub fn next_step(view: &GroupStatus, wanted: &[ReplicaId], leaving: &[ReplicaId], may_remove: bool) -> PlanStep {
    if view.leader != Some(view.replica) {
        return PlanStep::Nothing;
    }
    let voters = &view.membership.voters;
    let is_voter = |replica: ReplicaId| voters.contains(&replica);
    let is_member = |replica: ReplicaId| is_voter(replica) || view.membership.learners.contains(&replica);
    let member = |replica: ReplicaId| view.members.iter().find(|member| member.replica == replica);
    let lives = |replica: ReplicaId| replica == view.replica || member(replica).is_some_and(|member| member.is_active);
    let in_sync = |replica: ReplicaId| {
        replica == view.replica
            || is_planted(Bug::PromoteTooEarly)
            || member(replica).is_some_and(|member: &MemberStatus| member.is_active && member.in_sync)
    };

    // One whose removal was committed only after it was elected leads on; but what it proposes is not taken any more.
    if !is_member(view.replica) {
        let successor = wanted.iter().copied().find(|&replica| is_voter(replica) && in_sync(replica));
        return successor.map_or(PlanStep::Nothing, PlanStep::TransferAway);
    }

    // New ones begin to catch up at once: they do not count, so any number may do so side by side.
    if let Some(&replica) = wanted.iter().find(|&&replica| !is_member(replica)) {
        return PlanStep::AddLearner(replica);
    }
    // A learner that neither is wanted nor leaves was wanted by a change that is over.
    let stray = view.membership.learners.iter().find(|replica| !wanted.contains(replica) && !leaving.contains(replica));
    if let Some(&replica) = stray {
        return PlanStep::Remove(replica);
    }

    let leavers: Vec<_> = leaving.iter().copied().filter(|&replica| !wanted.contains(&replica)).collect();
    if may_remove {
        // A learner on its way out counts for nothing.
        if let Some(&replica) = leavers.iter().find(|&&replica| is_member(replica) && !is_voter(replica)) {
            return PlanStep::Remove(replica);
        }
        // A dead voter makes every majority harder: out before anybody is promoted, as long as the rest can still elect.
        let dead = leavers.iter().copied().find(|&replica| is_voter(replica) && !lives(replica));
        if let Some(replica) = dead
            && can_elect(voters.iter().copied().filter(|&voter| voter != replica), &lives)
        {
            return PlanStep::Remove(replica);
        }
    }

    let newcomer = wanted.iter().copied().find(|&replica| !is_voter(replica) && in_sync(replica));
    if let Some(replica) = newcomer
        && can_elect(voters.iter().copied().chain([replica]), &lives)
    {
        return PlanStep::Promote(replica);
    }

    let all_in = wanted.iter().all(|&replica| is_voter(replica));
    let leaving_members: Vec<_> = leavers.iter().copied().filter(|&replica| is_member(replica)).collect();
    if !may_remove {
        return if all_in && !leavers.is_empty() && wanted.iter().all(|&replica| in_sync(replica)) {
            PlanStep::ReportMayRemove
        } else {
            PlanStep::Nothing
        };
    }
    if leaving_members.is_empty() {
        return match leavers.first() {
            _ if leaving.is_empty() => PlanStep::Nothing,
            // Whoever is forgotten is deleted, and those who do not know that it is out count on its vote.
            Some(&replica) if !view.change_is_known => PlanStep::Remove(replica),
            _ => PlanStep::Done { removed: leavers },
        };
    }
    if !all_in {
        return PlanStep::Nothing;
    }
    // Live ones, the leader last: before its own removal somebody else must lead.
    let next = leaving_members.iter().copied().find(|&replica| replica != view.replica);
    match next {
        Some(replica) if can_elect(voters.iter().copied().filter(|&voter| voter != replica), &lives) => {
            PlanStep::Remove(replica)
        }
        Some(_) => PlanStep::Nothing,
        None => match wanted.iter().copied().find(|&replica| replica != view.replica && in_sync(replica)) {
            Some(successor) => PlanStep::TransferAway(successor),
            None => PlanStep::Nothing,
        },
    }
}

/// Whether a majority of these voters lives.
fn can_elect(voters: impl Iterator<Item = ReplicaId>, lives: &impl Fn(ReplicaId) -> bool) -> bool {
    let (mut all, mut alive) = (0, 0);
    for voter in voters {
        all += 1;
        alive += usize::from(lives(voter));
    }
    alive > all / 2
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::{RaftIndex, Term};

    use super::*;
    use crate::membership::{Membership, MembershipChange};

    /// A group as a test drives it: changes are applied at once.
    struct Group {
        view: GroupStatus,
        dead: Vec<u64>,
    }

    fn id(replica: u64) -> ReplicaId {
        ReplicaId::new(replica)
    }

    fn ids(replicas: &[u64]) -> Vec<ReplicaId> {
        replicas.iter().copied().map(ReplicaId::new).collect()
    }

    impl Group {
        fn new(voters: &[u64], leader: u64, dead: &[u64]) -> Self {
            let view = GroupStatus {
                replica: id(leader),
                leader: Some(id(leader)),
                term: Term::new(3),
                commit: RaftIndex::new(9),
                last: RaftIndex::new(9),
                membership: Membership { voters: ids(voters), learners: Vec::new() },
                members: Vec::new(),
                change_is_known: false,
                pulled: None,
            };
            let mut group = Self { view, dead: dead.to_vec() };
            group.look();
            group
        }

        fn look(&mut self) {
            let membership = &self.view.membership;
            let all = membership.voters.iter().chain(&membership.learners);
            self.view.members = all
                .map(|&replica| {
                    let lives = !self.dead.contains(&replica.get());
                    MemberStatus {
                        replica,
                        is_learner: membership.learners.contains(&replica),
                        matched: RaftIndex::new(9),
                        is_active: lives,
                        in_sync: lives,
                        lag_entries: 0,
                    }
                })
                .collect();
        }

        fn change(&mut self, change: MembershipChange) {
            let before = self.view.membership.clone();
            let Membership { voters, learners } = &mut self.view.membership;
            match change {
                MembershipChange::AddLearner(replica) => learners.push(replica),
                MembershipChange::Promote(replica) => {
                    learners.retain(|&other| other != replica);
                    voters.push(replica);
                }
                MembershipChange::Remove(replica) => {
                    learners.retain(|&other| other != replica);
                    voters.retain(|&other| other != replica);
                }
            }
            self.view.change_is_known = before == self.view.membership;
            self.look();
        }

        /// Follows the plan to its end; says the steps.
        fn drive(&mut self, wanted: &[u64], leaving: &[u64], may_remove: bool) -> Vec<PlanStep> {
            let (wanted, leaving) = (ids(wanted), ids(leaving));
            let mut may_remove = may_remove;
            let mut steps = Vec::new();
            loop {
                assert!(steps.len() < 50, "no end: {steps:?}");
                let step = next_step(&self.view, &wanted, &leaving, may_remove);
                match step.clone() {
                    PlanStep::Nothing | PlanStep::Done { .. } => {
                        steps.push(step);
                        return steps;
                    }
                    PlanStep::AddLearner(replica) => self.change(MembershipChange::AddLearner(replica)),
                    PlanStep::Promote(replica) => self.change(MembershipChange::Promote(replica)),
                    PlanStep::Remove(replica) => {
                        assert_ne!(replica, self.view.replica, "a leader does not remove itself");
                        self.change(MembershipChange::Remove(replica));
                    }
                    PlanStep::TransferAway(to) => {
                        self.view.replica = to;
                        self.view.leader = Some(to);
                    }
                    PlanStep::ReportMayRemove => may_remove = true,
                }
                steps.push(step);
                let lives = |replica: ReplicaId| !self.dead.contains(&replica.get());
                assert!(can_elect(self.view.membership.voters.iter().copied(), &lives), "nobody could lead: {steps:?}");
            }
        }
    }

    #[test]
    fn a_live_voter_is_replaced_after_the_new_one_votes() {
        use PlanStep::{AddLearner, Done, Promote, Remove, ReportMayRemove};
        let steps = Group::new(&[1, 2, 3], 1, &[]).drive(&[1, 2, 4], &[3], false);
        let removed = ids(&[3]);
        // The second removal is empty: it says that the first is committed.
        let out = [Remove(id(3)), Remove(id(3)), Done { removed }];
        assert_eq!(steps[..3], [AddLearner(id(4)), Promote(id(4)), ReportMayRemove]);
        assert_eq!(steps[3..], out);
    }

    #[test]
    fn a_dead_voter_goes_before_the_new_one_votes() {
        use PlanStep::{AddLearner, Done, Promote, Remove};
        let steps = Group::new(&[1, 2, 3], 1, &[3]).drive(&[1, 2, 4], &[3], true);
        let removed = ids(&[3]);
        assert_eq!(steps, [AddLearner(id(4)), Remove(id(3)), Promote(id(4)), Remove(id(3)), Done { removed }]);
    }

    #[test]
    fn the_leader_hands_over_before_it_goes() {
        let mut group = Group::new(&[1, 2, 3], 1, &[]);
        let steps = group.drive(&[4, 5, 6], &[1, 2, 3], false);
        let transfer = steps.iter().position(|step| *step == PlanStep::TransferAway(id(4))).expect("it hands over");
        let out = steps.iter().position(|step| *step == PlanStep::Remove(id(1))).expect("it goes");
        assert!(transfer < out, "{steps:?}");
        assert_eq!(group.view.membership.voters, ids(&[4, 5, 6]));
        assert_eq!(steps.last(), Some(&PlanStep::Done { removed: ids(&[1, 2, 3]) }));
    }

    #[test]
    fn nothing_goes_before_the_controller_says_so() {
        let group = Group::new(&[1, 2, 3, 4], 1, &[]);
        assert_eq!(next_step(&group.view, &ids(&[1, 2, 4]), &ids(&[3]), false), PlanStep::ReportMayRemove);
        let mut lagging = Group::new(&[1, 2, 3, 4], 1, &[]);
        lagging.view.members[3].in_sync = false;
        assert_eq!(next_step(&lagging.view, &ids(&[1, 2, 4]), &ids(&[3]), false), PlanStep::Nothing);
    }

    #[test]
    fn a_cancelled_change_leaves_the_old_members() {
        let mut group = Group::new(&[1, 2, 3], 1, &[]);
        group.change(MembershipChange::AddLearner(id(4)));
        let steps = group.drive(&[1, 2, 3], &[4], true);
        assert_eq!(steps, [PlanStep::Remove(id(4)), PlanStep::Remove(id(4)), PlanStep::Done { removed: ids(&[4]) }]);
    }

    #[test]
    fn nobody_is_removed_whose_absence_would_leave_no_majority() {
        // Of three one is dead, and a live one is to go: the two that would be left need both.
        let group = Group::new(&[1, 2, 3], 1, &[2]);
        assert_eq!(next_step(&group.view, &ids(&[1, 2]), &ids(&[3]), true), PlanStep::Nothing);
    }

    #[test]
    fn who_is_out_is_forgotten_only_once_all_can_do_without_it() {
        let mut group = Group::new(&[1, 2, 4], 1, &[]);
        let next = |group: &Group| next_step(&group.view, &ids(&[1, 2, 4]), &ids(&[3]), true);
        assert_eq!(next(&group), PlanStep::Remove(id(3)), "again, which changes nothing");
        group.view.change_is_known = true;
        assert_eq!(next(&group), PlanStep::Done { removed: ids(&[3]) });
    }

    #[test]
    fn a_leader_that_is_out_hands_over_before_it_is_forgotten() {
        let mut group = Group::new(&[1, 2, 4], 3, &[]);
        let next = |group: &Group| next_step(&group.view, &ids(&[1, 2, 4]), &ids(&[3]), true);
        assert_eq!(next(&group), PlanStep::TransferAway(id(1)));
        (group.view.replica, group.view.leader) = (id(1), Some(id(1)));
        assert_eq!(next(&group), PlanStep::Remove(id(3)));
    }

    #[test]
    fn only_the_leader_has_a_plan() {
        let mut group = Group::new(&[1, 2, 3], 1, &[]);
        group.view.leader = Some(id(2));
        assert_eq!(next_step(&group.view, &ids(&[1, 2, 4]), &ids(&[3]), false), PlanStep::Nothing);
    }
}
