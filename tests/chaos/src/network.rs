//! What becomes of the bytes between any two of a cluster.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// An end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Node {
    /// A broker, by its id.
    Broker(i32),
    /// All clients together.
    Clients,
    /// Any other process, such as a broker of another cluster.
    Stranger,
}

/// What becomes of bytes in one direction between two nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// Nothing passes. As with a cable that is cut, connections stay, and what was sent waits.
    pub cut: bool,
    /// So much later.
    pub delay: Duration,
    /// Part of the packets (0 to 1) that must be sent again, which holds up all behind them.
    pub loss: f64,
}

/// How long a lost packet holds up its connection: the least time after which TCP sends again.
const SENT_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// All links of a cluster. Links that nobody touched let everything pass at once.
#[derive(Debug, Default)]
pub struct Network {
    /// Guards the links and who runs where; held for a look only.
    state: Mutex<State>,
    /// Told when a link changes.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    links: HashMap<(Node, Node), Link>,
    processes: HashMap<Node, u32>,
    /// Counts lost packets, so that which ones are lost follows from how many were sent.
    packets: u64,
    closed: bool,
}

impl Network {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what becomes of bytes from one node to another.
    pub fn set(&self, from: Node, to: Node, link: Link) {
        self.state().links.insert((from, to), link);
        self.changed.notify_all();
    }

    /// What becomes of bytes from one node to another.
    pub fn link(&self, from: Node, to: Node) -> Link {
        self.state().links.get(&(from, to)).copied().unwrap_or_default()
    }

    /// Nothing passes from one node to another; the way back is as it was.
    pub fn cut_one_way(&self, from: Node, to: Node) {
        let link = Link { cut: true, ..self.link(from, to) };
        self.set(from, to, link);
    }

    /// Nothing passes between two nodes.
    pub fn cut(&self, one: Node, other: Node) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// Everything passes again, everywhere.
    pub fn heal(&self) {
        self.state().links.clear();
        self.changed.notify_all();
    }

    /// No proxy waits any more; for the end of a cluster.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// Tells which process a node is now.
    pub(crate) fn runs_as(&self, node: Node, process: u32) {
        self.state().processes.insert(node, process);
    }

    /// The nodes with their processes.
    pub(crate) fn processes(&self) -> Vec<(Node, u32)> {
        self.state().processes.iter().map(|(node, process)| (*node, *process)).collect()
    }

    /// When something read now may arrive.
    pub(crate) fn due(&self, from: Node, to: Node) -> Instant {
        let mut state = self.state();
        let link = state.links.get(&(from, to)).copied().unwrap_or_default();
        let mut due = Instant::now() + link.delay;
        if link.loss > 0.0 {
            state.packets += 1;
            // The golden ratio's multiples spread evenly: of any hundred packets, the part that is to be lost is.
            if (state.packets as f64 * 0.618_033_988_749_895).fract() < link.loss {
                due += SENT_AGAIN_AFTER;
            }
        }
        due
    }

    /// Waits until it is due and the link is not cut; false where the cluster ended meanwhile.
    pub(crate) fn wait_to_pass(&self, from: Node, to: Node, due: Instant) -> bool {
        let mut state = self.state();
        loop {
            if state.closed {
                return false;
            }
            let cut = state.links.get(&(from, to)).is_some_and(|link| link.cut);
            let now = Instant::now();
            if !cut && now >= due {
                return true;
            }
            // What is cut waits for a change; what is late waits for its time.
            let wait = if cut { Duration::from_secs(3600) } else { due - now };
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
