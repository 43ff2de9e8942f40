//! Who belongs to a group, in our own bytes: the Raft crate's are never stored and never decoded from outside.
//!
//! ```text
//! membership  version u8 = 1 | voters u32 | voter id u64 ... | learners u32 | learner id u64 ...     (big endian)
//! change      version u8 = 1 | kind u8 (1 add learner, 2 promote, 3 remove) | replica id u64
//! ```
//! One replica changes at a time, and there is no joint consensus: add a learner, let it catch up, promote it, remove the
//! other.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flowstone_protocol::ReplicaId;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState};

const VERSION: u8 = 1;

/// The members of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    /// Those whose acknowledgement counts.
    pub voters: Vec<ReplicaId>,
    /// Those that follow, and do not count.
    pub learners: Vec<ReplicaId>,
}

/// Bytes that are not those of a membership or a change of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// They end too early, or go on where they should end.
    #[error("a membership of {0} bytes has a wrong length")]
    Length(usize),
    /// A newer program wrote them.
    #[error("membership format {0} is not known here")]
    Version(u8),
    /// No such change.
    #[error("membership change {0} is not known here")]
    Kind(u8),
}

impl Membership {
    /// A group of one.
    pub fn alone(replica: ReplicaId) -> Self {
        Self { voters: vec![replica], learners: Vec::new() }
    }

    /// Whether `replica` decides alone.
    pub fn is_only_voter(&self, replica: ReplicaId) -> bool {
        self.voters == [replica]
    }

    /// Whether `replica` belongs to the group.
    pub fn contains(&self, replica: ReplicaId) -> bool {
        self.voters.contains(&replica) || self.learners.contains(&replica)
    }

    /// Whether nobody else belongs to the group.
    pub fn is_alone(&self, replica: ReplicaId) -> bool {
        self.is_only_voter(replica) && self.learners.is_empty()
    }

    /// The members after this change, as the Raft crate makes them.
    pub(crate) fn after(&self, change: MembershipChange) -> Self {
        let (MembershipChange::AddLearner(replica)
        | MembershipChange::Promote(replica)
        | MembershipChange::Remove(replica)) = change;
        let without =
            |members: &[ReplicaId]| -> Vec<_> { members.iter().copied().filter(|&other| other != replica).collect() };
        let mut next = Self { voters: without(&self.voters), learners: without(&self.learners) };
        match change {
            MembershipChange::AddLearner(_) => next.learners.push(replica),
            MembershipChange::Promote(_) => next.voters.push(replica),
            MembershipChange::Remove(_) => {}
        }
        next.voters.sort_unstable();
        next.learners.sort_unstable();
        next
    }

    /// Their bytes.
    pub fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(9 + 8 * (self.voters.len() + self.learners.len()));
        bytes.put_u8(VERSION);
        for members in [&self.voters, &self.learners] {
            bytes.put_u32(members.len() as u32);
            for member in members {
                bytes.put_u64(member.get());
            }
        }
        bytes.freeze()
    }

    /// From their bytes.
    ///
    /// # Errors
    /// When they are something else.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, MembershipError> {
        let length = MembershipError::Length(bytes.len());
        version(&mut bytes, length)?;
        let mut lists = [Vec::new(), Vec::new()];
        for members in &mut lists {
            let count = bytes.try_get_u32().map_err(|_| length)? as usize;
            if bytes.len() / 8 < count {
                return Err(length);
            }
            members.extend((0..count).map(|_| ReplicaId::new(bytes.get_u64())));
        }
        if !bytes.is_empty() {
            return Err(length);
        }
        let [voters, learners] = lists;
        Ok(Self { voters, learners })
    }

    pub(crate) fn to_raft(&self) -> ConfState {
        let ids = |members: &[ReplicaId]| members.iter().map(|member| member.get()).collect::<Vec<_>>();
        ConfState::from((ids(&self.voters), ids(&self.learners)))
    }

    pub(crate) fn from_raft(state: &ConfState) -> Self {
        // The crate keeps them in sets: sorted, so that all replicas store the same bytes.
        let ids = |members: &[u64]| {
            let mut ids: Vec<_> = members.iter().copied().map(ReplicaId::new).collect();
            ids.sort_unstable();
            ids
        };
        Self { voters: ids(&state.voters), learners: ids(&state.learners) }
    }
}

/// One step of a change of members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MembershipChange {
    /// It begins to follow.
    AddLearner(ReplicaId),
    /// It counts from now on.
    Promote(ReplicaId),
    /// It is out, and its id is never used again.
    Remove(ReplicaId),
}

impl MembershipChange {
    /// Its bytes: the payload of a membership control batch.
    pub fn encode(self) -> Bytes {
        let (kind, replica) = match self {
            Self::AddLearner(replica) => (1, replica),
            Self::Promote(replica) => (2, replica),
            Self::Remove(replica) => (3, replica),
        };
        let mut bytes = BytesMut::with_capacity(10);
        bytes.put_u8(VERSION);
        bytes.put_u8(kind);
        bytes.put_u64(replica.get());
        bytes.freeze()
    }

    /// From its bytes.
    ///
    /// # Errors
    /// When they are something else.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, MembershipError> {
        let length = MembershipError::Length(bytes.len());
        version(&mut bytes, length)?;
        if bytes.len() != 9 {
            return Err(length);
        }
        let kind = bytes.get_u8();
        let replica = ReplicaId::new(bytes.get_u64());
        match kind {
            1 => Ok(Self::AddLearner(replica)),
            2 => Ok(Self::Promote(replica)),
            3 => Ok(Self::Remove(replica)),
            kind => Err(MembershipError::Kind(kind)),
        }
    }

    pub(crate) fn to_raft(self) -> ConfChangeV2 {
        let (kind, replica) = match self {
            Self::AddLearner(replica) => (ConfChangeType::AddLearnerNode, replica),
            Self::Promote(replica) => (ConfChangeType::AddNode, replica),
            Self::Remove(replica) => (ConfChangeType::RemoveNode, replica),
        };
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.node_id = replica.get();
        let mut change = ConfChangeV2::default();
        change.set_changes(vec![single].into());
        change
    }
}

fn version(bytes: &mut &[u8], length: MembershipError) -> Result<(), MembershipError> {
    match bytes.try_get_u8().map_err(|_| length)? {
        VERSION => Ok(()),
        other => Err(MembershipError::Version(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_and_changes_come_back_from_their_bytes() {
        let id = ReplicaId::new;
        for membership in [
            Membership::default(),
            Membership::alone(id(u64::MAX)),
            Membership { voters: vec![id(1), id(2), id(3)], learners: vec![id(4)] },
        ] {
            let bytes = membership.encode();
            assert_eq!(Membership::decode(&bytes), Ok(membership));
            for cut in 0..bytes.len() {
                assert!(Membership::decode(&bytes[..cut]).is_err(), "cut at {cut}");
            }
        }
        for change in
            [MembershipChange::AddLearner(id(7)), MembershipChange::Promote(id(8)), MembershipChange::Remove(id(9))]
        {
            let bytes = change.encode();
            assert_eq!(MembershipChange::decode(&bytes), Ok(change));
            for cut in 0..bytes.len() {
                assert!(MembershipChange::decode(&bytes[..cut]).is_err(), "cut at {cut}");
            }
        }
    }

    #[test]
    fn lies_about_lengths_reserve_nothing() {
        // Four thousand million voters in five bytes.
        assert_eq!(Membership::decode(&[1, 255, 255, 255, 255]), Err(MembershipError::Length(5)));
        assert_eq!(Membership::decode(&[2]), Err(MembershipError::Version(2)));
        assert_eq!(MembershipChange::decode(&[1, 9, 0, 0, 0, 0, 0, 0, 0, 1]), Err(MembershipError::Kind(9)));
    }
}
