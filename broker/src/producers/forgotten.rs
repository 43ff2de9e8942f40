//! Producers whose state was given up: what they send late is told apart from what was never known.

use std::collections::{BTreeMap, HashMap};

use flowstone_protocol::{ProducerEpoch, ProducerId};

/// So many are remembered; of the oldest nothing is known any more when there are more.
const FORGOTTEN_MAX: usize = 10_000;

/// What is left of a producer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rest {
    pub(super) epoch: ProducerEpoch,
    /// Nothing of that epoch was written: it may still begin.
    pub(super) is_unused: bool,
}

/// The last ones, see the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Forgotten {
    rests: HashMap<ProducerId, (u64, Rest)>,
    /// By when they were forgotten.
    order: BTreeMap<u64, ProducerId>,
    next: u64,
}

impl PartialEq for Forgotten {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Forgotten {}

impl Forgotten {
    pub(super) fn get(&self, id: ProducerId) -> Option<Rest> {
        self.rests.get(&id).map(|(_, rest)| *rest)
    }

    pub(super) fn push(&mut self, id: ProducerId, rest: Rest) {
        self.remove(id);
        self.rests.insert(id, (self.next, rest));
        self.order.insert(self.next, id);
        self.next += 1;
        if self.order.len() > FORGOTTEN_MAX
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.rests.remove(&oldest);
        }
    }

    /// It is known again.
    pub(super) fn remove(&mut self, id: ProducerId) {
        if let Some((order, _)) = self.rests.remove(&id) {
            self.order.remove(&order);
        }
    }

    /// The one that was forgotten first goes first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (ProducerId, Rest)> {
        self.order.values().filter_map(|id| Some((*id, self.get(*id)?)))
    }
}
