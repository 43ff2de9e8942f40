//! A vector whose copies share what they have in common: a change copies one chunk, not everything.

use std::sync::Arc;

/// Items that are copied together when one of them changes.
const CHUNK: usize = 64;

/// A vector for much that seldom changes and is copied often: a copy costs a pointer per [`CHUNK`] items.
#[derive(Clone, Debug)]
pub(crate) struct Chunked<T> {
    /// All but the last hold exactly [`CHUNK`] items.
    chunks: Vec<Arc<Vec<T>>>,
}

impl<T: Clone> Chunked<T> {
    pub(crate) fn len(&self) -> usize {
        match self.chunks.split_last() {
            None => 0,
            Some((last, full)) => full.len() * CHUNK + last.len(),
        }
    }

    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        self.chunks.get(index / CHUNK)?.get(index % CHUNK)
    }

    pub(crate) fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        let chunk = self.chunks.get_mut(index / CHUNK).filter(|chunk| index % CHUNK < chunk.len())?;
        Arc::make_mut(chunk).get_mut(index % CHUNK)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }
}

impl<T: Clone> Extend<T> for Chunked<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, items: I) {
        let mut items = items.into_iter().peekable();
        if let Some(last) = self.chunks.last_mut().filter(|last| last.len() < CHUNK) {
            let room = CHUNK - last.len();
            Arc::make_mut(last).extend(items.by_ref().take(room));
        }
        while items.peek().is_some() {
            let mut chunk: Vec<T> = items.by_ref().take(CHUNK).collect();
            chunk.shrink_to_fit();
            self.chunks.push(Arc::new(chunk));
        }
    }
}

impl<T: Clone> FromIterator<T> for Chunked<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut chunked = Self { chunks: Vec::new() };
        chunked.extend(items);
        chunked.chunks.shrink_to_fit();
        chunked
    }
}

impl<T: Clone + PartialEq> PartialEq for Chunked<T> {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

impl<T: Clone + Eq> Eq for Chunked<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_vector_whose_copies_do_not_see_changes() {
        let mut plain: Vec<usize> = Vec::new();
        let mut chunked: Chunked<usize> = Chunked::from_iter([]);
        for added in [0, 1, 62, 1, 1, 63, 64, 65, 200] {
            let items = plain.len()..plain.len() + added;
            plain.extend(items.clone());
            let before = chunked.clone();
            chunked.extend(items);
            assert_eq!(before.len() + added, chunked.len());
            assert!(chunked.iter().eq(&plain), "after {added} more");
            assert_eq!(chunked, plain.iter().copied().collect());
        }
        let before = chunked.clone();
        *chunked.get_mut(100).expect("there") = 7;
        assert_eq!((before.get(100), chunked.get(100)), (Some(&100), Some(&7)));
        assert_eq!(chunked.get(plain.len()), None);
        assert_eq!(chunked.get_mut(plain.len()), None);
        let shared = before.chunks.iter().zip(&chunked.chunks).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert_eq!(shared, before.chunks.len() - 1, "one chunk was copied");
    }
}
