//! Input cut into lines, many lines at a time: one allocation and one read for a chunk of them, so that cutting
//! costs little more than finding the line ends.

use std::io::{self, Read};

/// How much is read at a time, and so what a `read` that has everything at hand gives.
const CHUNK_BYTES: usize = 256 << 10;
/// The longest line; beyond it the input is refused rather than held in memory. No record can be so long.
const LINE_BYTES_MAX: usize = 256 << 20;

/// Whole lines back to back, as they were read.
#[derive(Debug)]
pub(crate) struct Chunk {
    /// Whole lines, each with its line end; the input's last may lack it.
    bytes: Vec<u8>,
}

impl Chunk {
    /// The lines without their line ends (`\n`; a `\r` before it is part of the line).
    pub(crate) fn lines(&self) -> impl Iterator<Item = &[u8]> {
        let mut from = 0;
        memchr::memchr_iter(b'\n', &self.bytes).chain((!self.bytes.ends_with(b"\n")).then_some(self.bytes.len())).map(
            move |end| {
                let line = &self.bytes[from..end];
                from = end + 1;
                line
            },
        )
    }
}

/// Reads chunks of whole lines.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    input: R,
    /// What was read beyond the last line end.
    ///
    /// ```text
    /// read so far: [ chunks handed out ... \n | rest ]
    /// ```
    rest: Vec<u8>,
    ended: bool,
}

impl<R: Read> Lines<R> {
    /// Over an input that needs no buffer of its own.
    pub(crate) fn new(input: R) -> Self {
        Lines { input, rest: Vec::new(), ended: false }
    }

    /// The lines that the next reads complete, `None` at the end. Never waits for more than it needs for one
    /// whole line, so that what is typed is sent at once. A chunk is never empty.
    ///
    /// # Errors
    /// Those of the input; a line beyond the maximum.
    pub(crate) fn next_chunk(&mut self) -> io::Result<Option<Chunk>> {
        while !self.ended {
            let filled = self.rest.len();
            self.rest.resize(filled + CHUNK_BYTES, 0);
            let read = loop {
                match self.input.read(&mut self.rest[filled..]) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    read => break read,
                }
            };
            self.rest.truncate(filled + *read.as_ref().unwrap_or(&0));
            if read? == 0 {
                self.ended = true;
                break;
            }
            if let Some(end) = memchr::memrchr(b'\n', &self.rest[filled..]) {
                // The unfinished line moves to a new buffer, so the chunk owns its own and nothing is copied twice.
                let unfinished = self.rest[filled + end + 1..].to_vec();
                let mut chunk = std::mem::replace(&mut self.rest, unfinished);
                chunk.truncate(filled + end + 1);
                return Ok(Some(Chunk { bytes: chunk }));
            }
            if self.rest.len() > LINE_BYTES_MAX {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a line is longer than {LINE_BYTES_MAX} bytes; is this a text of lines?"),
                ));
            }
        }
        if self.rest.is_empty() {
            return Ok(None);
        }
        Ok(Some(Chunk { bytes: std::mem::take(&mut self.rest) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Gives its bytes in pieces of the given sizes, in turn.
    struct Pieces<'a> {
        bytes: &'a [u8],
        sizes: &'a [usize],
        at: usize,
    }
    impl Read for Pieces<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let size = self.sizes[self.at % self.sizes.len()].min(self.bytes.len()).min(out.len());
            self.at += 1;
            out[..size].copy_from_slice(&self.bytes[..size]);
            self.bytes = &self.bytes[size..];
            Ok(size)
        }
    }

    fn all(input: &[u8], sizes: &[usize]) -> Vec<Vec<u8>> {
        let mut lines = Lines::new(Pieces { bytes: input, sizes, at: 0 });
        let mut out = Vec::new();
        while let Some(chunk) = lines.next_chunk().expect("memory does not fail") {
            out.extend(chunk.lines().map(<[u8]>::to_vec));
        }
        out
    }

    #[test]
    fn empty_lines_and_a_last_one_without_its_end() {
        assert_eq!(all(b"", &[9]), Vec::<Vec<u8>>::new());
        assert_eq!(all(b"\n", &[9]), [b""]);
        assert_eq!(all(b"a\n\nb\r\nc", &[9]), [&b"a"[..], b"", b"b\r", b"c"]);
        assert_eq!(all(b"a\n\nb\r\nc", &[1]), [&b"a"[..], b"", b"b\r", b"c"]);
    }

    #[test]
    fn a_line_longer_than_a_chunk() {
        let mut input = vec![b'x'; 3 * CHUNK_BYTES];
        input.push(b'\n');
        input.push(b'y');
        assert_eq!(all(&input, &[CHUNK_BYTES]), [&input[..3 * CHUNK_BYTES], b"y"]);
    }

    proptest! {
        #[test]
        fn however_it_arrives(lines in vec(vec(any::<u8>().prop_filter("line end", |b| *b != b'\n'), 0..12), 0..20),
                              sizes in vec(1usize..9, 1..4)) {
            let input: Vec<u8> = lines.iter().flat_map(|line| line.iter().copied().chain([b'\n'])).collect();
            prop_assert_eq!(all(&input, &sizes), lines);
        }
    }
}
