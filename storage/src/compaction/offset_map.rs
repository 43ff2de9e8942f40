//! The newest offset of each key of the dirty part of a log, in bounded memory.
//!
//! Keys are known by 128 bits of two SipHashes, seeded anew for each pass: 24 bytes an entry, whatever the keys' lengths.

use std::hash::{DefaultHasher, Hasher as _};

use flowstone_protocol::Offset;

/// Bytes of an entry.
pub(crate) const ENTRY_BYTES: usize = 24;
const _: () = assert!(size_of::<Entry>() == ENTRY_BYTES);
/// Free places: with less, looking for a key that is not there would take long.
const FREE_SHARE: usize = 4;

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: [u64; 2],
    /// -1: free.
    offset: i64,
}

const FREE: Entry = Entry { hash: [0; 2], offset: -1 };

/// Keys and their newest offsets.
#[derive(Debug)]
pub(crate) struct OffsetMap {
    entries: Vec<Entry>,
    used: usize,
    seed: u64,
}

impl OffsetMap {
    /// A map for at most `keys` keys, or as many as fit in `memory_bytes`, but always for one.
    pub(crate) fn new(keys: u64, memory_bytes: u64, seed: u64) -> Self {
        let fit = usize::try_from(memory_bytes).unwrap_or(usize::MAX) / ENTRY_BYTES;
        let keys = usize::try_from(keys).unwrap_or(usize::MAX);
        let wanted = keys.saturating_add(keys / (FREE_SHARE - 1)).saturating_add(2);
        Self { entries: vec![FREE; wanted.min(fit).max(2)], used: 0, seed }
    }

    /// Notes that `key` was written at `offset`, which is above all noted before; whether there was room for it.
    pub(crate) fn insert(&mut self, key: &[u8], offset: Offset) -> bool {
        let hash = self.hash(key);
        let at = self.find(hash);
        let is_new = self.entries[at].offset < 0;
        if is_new && self.used > 0 && self.used + 1 > self.entries.len() - self.entries.len().div_ceil(FREE_SHARE) {
            return false;
        }
        self.used += usize::from(is_new);
        self.entries[at] = Entry { hash, offset: offset.get() };
        true
    }

    /// The newest offset of `key`, if it was noted.
    pub(crate) fn newest(&self, key: &[u8]) -> Option<Offset> {
        if self.used == 0 {
            return None;
        }
        let offset = self.entries[self.find(self.hash(key))].offset;
        (offset >= 0).then(|| Offset::new(offset))
    }

    /// Where the key of this hash is, or would be: there is always a free place.
    fn find(&self, hash: [u64; 2]) -> usize {
        let places = self.entries.len();
        let mut at = ((u128::from(hash[0]) * places as u128) >> 64) as usize;
        loop {
            let entry = &self.entries[at];
            if entry.offset < 0 || entry.hash == hash {
                return at;
            }
            at = if at + 1 == places { 0 } else { at + 1 };
        }
    }

    fn hash(&self, key: &[u8]) -> [u64; 2] {
        [0, 1].map(|half: u64| {
            let mut hasher = DefaultHasher::new();
            hasher.write_u64(self.seed ^ half);
            hasher.write(key);
            hasher.finish()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_offset_of_each_key_is_found() {
        let mut map = OffsetMap::new(1_000, 1 << 20, 9);
        for offset in 0..5_000_i64 {
            assert!(map.insert(&(offset % 1_000).to_le_bytes(), Offset::new(offset)));
        }
        for key in 0..1_000_i64 {
            assert_eq!(map.newest(&key.to_le_bytes()), Some(Offset::new(4_000 + key)));
        }
        assert_eq!(map.newest(b"another"), None);
    }

    #[test]
    fn it_keeps_to_its_memory_and_takes_at_least_one_key() {
        for memory_bytes in [0, 24, 100, 2_400, 24_000] {
            let mut map = OffsetMap::new(1 << 40, memory_bytes, 1);
            assert!(map.entries.len() <= (memory_bytes as usize / ENTRY_BYTES).max(2));
            let taken = (0..10_000_u64).take_while(|key| map.insert(&key.to_le_bytes(), Offset::new(*key as i64)));
            let taken = taken.count();
            assert!(taken >= 1 && taken < map.entries.len().max(2), "{taken} keys in {}", map.entries.len());
            // Keys that are known are taken on.
            assert!(map.insert(&0_u64.to_le_bytes(), Offset::new(20_000)));
            assert_eq!(map.newest(&0_u64.to_le_bytes()), Some(Offset::new(20_000)));
        }
    }
}
