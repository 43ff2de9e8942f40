//! Bytes in pieces: what is sent without having been put together, and what was received so.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Pieces back to back. None is empty.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chunks {
    pieces: VecDeque<Bytes>,
    bytes: usize,
}

impl Chunks {
    pub(crate) fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes += piece.len();
            self.pieces.push_back(piece);
        }
    }

    pub(crate) fn push_front(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes += piece.len();
            self.pieces.push_front(piece);
        }
    }
}

impl Buf for Chunks {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let filled = slices.len().min(self.pieces.len());
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(piece);
        }
        filled
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.bytes, "{count} of {} bytes", self.bytes);
        self.bytes -= count;
        while count > 0 {
            // There are pieces of `bytes` bytes, asserted above.
            let Some(front) = self.pieces.front_mut() else { return };
            if front.len() > count {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.pieces.pop_front();
        }
    }

    /// Without a copy where a single piece has them.
    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        assert!(count <= self.bytes, "{count} of {} bytes", self.bytes);
        match self.pieces.front_mut() {
            Some(front) if front.len() > count => {
                self.bytes -= count;
                front.split_to(count)
            }
            Some(front) if front.len() == count => {
                self.bytes -= count;
                self.pieces.pop_front().unwrap_or_default()
            }
            _ => {
                let mut copied = BytesMut::with_capacity(count);
                copied.put(self.take(count));
                copied.freeze()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks() -> Chunks {
        let mut chunks = Chunks::default();
        for piece in [&b"one"[..], b"", b"two", b"three"] {
            chunks.push(Bytes::copy_from_slice(piece));
        }
        chunks.push_front(Bytes::from_static(b"zero"));
        chunks
    }

    #[test]
    fn any_cut_gives_the_same_bytes() {
        let whole = b"zeroonetwothree";
        for cut in 0..=whole.len() {
            let mut chunks = chunks();
            let head = chunks.copy_to_bytes(cut);
            assert_eq!(&head, &whole[..cut]);
            assert_eq!(chunks.remaining(), whole.len() - cut);
            let mut slices = [IoSlice::new(&[]); 8];
            let filled = chunks.chunks_vectored(&mut slices);
            let sliced: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.iter().copied()).collect();
            assert_eq!(sliced, &whole[cut..]);
            let mut advanced = self::chunks();
            advanced.advance(cut);
            assert_eq!(advanced.copy_to_bytes(whole.len() - cut), &whole[cut..]);
        }
    }

    #[test]
    fn within_a_piece_nothing_is_copied() {
        let piece = Bytes::from(vec![7; 100]);
        let at = piece.as_ptr();
        let mut chunks = Chunks::default();
        chunks.push(piece);
        assert_eq!(chunks.copy_to_bytes(60).as_ptr(), at);
        assert_eq!(chunks.copy_to_bytes(40).as_ptr(), at.wrapping_add(60));
    }
}
