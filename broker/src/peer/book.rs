//! Who the other brokers are and where they listen, as far as this broker knows.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flowstone_protocol::{BrokerId, DirectoryId};
use parking_lot::Mutex;
use tokio::sync::watch;

/// What is known of one broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerEntry {
    /// Its peer listener, `host:port`; empty: not known yet, so that it is not dialled.
    pub address: String,
    /// The directory that is registered for it; `None`: not known yet, so that its streams are refused.
    pub directory: Option<DirectoryId>,
}

/// All brokers that may be talked to, shared by whoever keeps it up to date (the metadata, the founding, `Hello`) and the
/// peer network, which takes every change in at once: it dials the new address, and ends the streams of a broker whose
/// directory is not the registered one any more.
#[derive(Clone, Debug)]
pub struct PeerBook {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Held for a look or a change; nothing waits inside.
    entries: Mutex<HashMap<BrokerId, PeerEntry>>,
    /// The start by which each was registered last: its incarnation. As the entries' lock.
    starts: Mutex<HashMap<BrokerId, u64>>,
    /// Counts changes, for readers that only want to know whether there was one.
    version: AtomicU64,
    changed: watch::Sender<u64>,
}

impl Default for PeerBook {
    fn default() -> Self {
        let inner = Inner {
            entries: Mutex::new(HashMap::new()),
            starts: Mutex::default(),
            version: AtomicU64::new(0),
            changed: watch::Sender::new(0),
        };
        Self { inner: Arc::new(inner) }
    }
}

impl PeerBook {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters a broker, or changes what is known of it.
    pub fn set(&self, broker: BrokerId, entry: PeerEntry) {
        self.change(|entries| entries.insert(broker, entry.clone()).as_ref() != Some(&entry));
    }

    /// Changes where a broker listens and keeps its directory; one that was not known is entered.
    pub fn set_address(&self, broker: BrokerId, address: &str) {
        self.change(|entries| {
            let entry = entries.entry(broker).or_insert_with(|| PeerEntry { address: String::new(), directory: None });
            let is_new = entry.address != address;
            address.clone_into(&mut entry.address);
            is_new
        });
    }

    /// As [`set_address`](Self::set_address), for a broker that said itself where it is and which directory it keeps. The
    /// directory is believed where none is known: a registration that is known here is not overruled.
    pub fn introduce(&self, broker: BrokerId, address: &str, directory: DirectoryId) {
        self.change(|entries| {
            let entry = entries.entry(broker).or_insert_with(|| PeerEntry { address: String::new(), directory: None });
            let is_new = entry.address != address || entry.directory.is_none();
            address.clone_into(&mut entry.address);
            entry.directory.get_or_insert(directory);
            is_new
        });
    }

    /// Enters the start by which a broker is registered: where another one has its streams open, these end.
    pub fn set_start(&self, broker: BrokerId, incarnation: u64) {
        self.change(|_| self.inner.starts.lock().insert(broker, incarnation) != Some(incarnation));
    }

    /// The start by which a broker was registered last; `None` where that is not known.
    pub fn start_of(&self, broker: BrokerId) -> Option<u64> {
        self.inner.starts.lock().get(&broker).copied()
    }

    /// Forgets a broker: it is dialled no more, and its streams end.
    pub fn remove(&self, broker: BrokerId) {
        self.inner.starts.lock().remove(&broker);
        self.change(|entries| entries.remove(&broker).is_some());
    }

    /// What is known of a broker.
    pub fn get(&self, broker: BrokerId) -> Option<PeerEntry> {
        self.inner.entries.lock().get(&broker).cloned()
    }

    /// All brokers, by number.
    pub fn all(&self) -> Vec<(BrokerId, PeerEntry)> {
        let mut all: Vec<_> = self.inner.entries.lock().iter().map(|(id, entry)| (*id, entry.clone())).collect();
        all.sort_by_key(|(id, _)| *id);
        all
    }

    /// Number of changes so far.
    pub(crate) fn version(&self) -> u64 {
        self.inner.version.load(Ordering::Acquire)
    }

    /// Is woken by changes.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    fn change(&self, apply: impl FnOnce(&mut HashMap<BrokerId, PeerEntry>) -> bool) {
        let mut entries = self.inner.entries.lock();
        if apply(&mut entries) {
            let version = self.inner.version.fetch_add(1, Ordering::AcqRel) + 1;
            self.inner.changed.send_replace(version);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_are_told() {
        let book = PeerBook::new();
        let mut watch = book.watch();
        let entry = PeerEntry { address: "a:1".to_owned(), directory: Some(DirectoryId::new(7)) };
        book.set(BrokerId::new(1), entry.clone());
        assert!(watch.has_changed().expect("open"));
        watch.mark_unchanged();
        book.set(BrokerId::new(1), entry);
        book.set_address(BrokerId::new(1), "a:1");
        book.remove(BrokerId::new(2));
        assert!(!watch.has_changed().expect("open"));
        book.introduce(BrokerId::new(1), "a:1", DirectoryId::new(8));
        assert!(!watch.has_changed().expect("open"), "the directory that is registered counts");
        book.set_address(BrokerId::new(1), "a:2");
        assert!(watch.has_changed().expect("open"));
        assert_eq!(book.get(BrokerId::new(1)).expect("known").directory, Some(DirectoryId::new(7)));
        book.set_address(BrokerId::new(3), "c:1");
        book.introduce(BrokerId::new(3), "c:1", DirectoryId::new(9));
        assert_eq!(book.get(BrokerId::new(3)).expect("known").directory, Some(DirectoryId::new(9)));
        assert_eq!(book.version(), 4);
    }
}
