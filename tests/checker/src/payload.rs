//! Values as bytes: text that tells its number, and whose every byte is checked when it comes back.
//!
//! `flowstone-checker <run> <number> <bytes> <filling>`: run and number in hexadecimal. The filling follows from the
//! number, so that a value with any byte changed, cut or mixed with another is seen.

use std::fmt;

use crate::history::ValueId;

/// With what a value begins.
const MAGIC: &str = "flowstone-checker";

/// Bytes of the shortest value: what it tells, and as much filling as shows that its number is right.
pub const BYTES_MIN: usize = MAGIC.len() + 1 + 16 + 1 + 16 + 1 + 8 + 1 + 16;

/// One run of a workload, so that values of another run in the same topic are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run(pub u64);

/// Why bytes are no value of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotAValue {
    /// They were never a value of this run: someone else's record.
    Foreign,
    /// They begin as a value of this run does, and are none.
    Damaged(String),
}

impl fmt::Display for NotAValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotAValue::Foreign => f.write_str("not a value of this run"),
            NotAValue::Damaged(what) => f.write_str(what),
        }
    }
}

impl Run {
    /// The bytes of a value: `bytes` of them, [`BYTES_MIN`] at least.
    pub fn encode(self, value: ValueId, bytes: usize) -> Vec<u8> {
        let bytes = bytes.clamp(BYTES_MIN, u32::MAX as usize);
        let mut text = format!("{MAGIC} {:016x} {:016x} {bytes:08x} ", self.0, value.get()).into_bytes();
        let mut state = value.get() ^ self.0.rotate_left(32);
        while text.len() < bytes {
            // A linear congruential generator: cheap, and no two values have the same filling.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            for letter in 0..8 {
                text.push(b"abcdefghijklmnopqrstuvwxyz234567"[(state >> (24 + 5 * letter)) as usize & 31]);
            }
        }
        text.truncate(bytes);
        text
    }

    /// The value of these bytes.
    ///
    /// # Errors
    /// Why they are none.
    pub fn decode(self, bytes: &[u8]) -> Result<ValueId, NotAValue> {
        let prefix = format!("{MAGIC} {:016x} ", self.0);
        let Some(rest) = bytes.strip_prefix(prefix.as_bytes()) else {
            return Err(NotAValue::Foreign);
        };
        let field = |from: usize, to: usize| {
            rest.get(from..to)
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        };
        let (Some(number), Some(length)) = (field(0, 16), field(17, 25)) else {
            return Err(NotAValue::Damaged(format!("wrong bytes: `{}`", beginning(bytes))));
        };
        let value = ValueId::new(number);
        if length != bytes.len() as u64 {
            return Err(NotAValue::Damaged(format!(
                "wrong bytes: value {value} was {length} bytes long, {} came back",
                bytes.len()
            )));
        }
        let written = self.encode(value, bytes.len());
        match written.iter().zip(bytes).position(|(written, read)| written != read) {
            None => Ok(value),
            Some(at) => Err(NotAValue::Damaged(format!(
                "wrong bytes: byte {at} of value {value} was {:#04x} and came back as {:#04x}",
                written[at], bytes[at]
            ))),
        }
    }
}

/// The first of the bytes, so that a person can see whose they are.
fn beginning(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(80)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_is_seen() {
        let run = Run(7);
        for bytes in [0, BYTES_MIN, BYTES_MIN + 1, 100, 1000] {
            let value = ValueId::new(0xfeed_0000_0000_0001);
            let whole = run.encode(value, bytes);
            assert_eq!(whole.len(), bytes.max(BYTES_MIN));
            assert_eq!(run.decode(&whole), Ok(value));
            for at in 0..whole.len() {
                let mut other = whole.clone();
                other[at] ^= 1;
                assert!(run.decode(&other).is_err(), "byte {at} of {bytes}");
            }
            assert!(matches!(run.decode(&whole[..whole.len() - 1]), Err(NotAValue::Damaged(_))));
        }
    }

    #[test]
    fn other_runs_and_other_records_are_foreign() {
        let value = ValueId::new(1);
        assert_eq!(Run(1).decode(&Run(2).encode(value, 100)), Err(NotAValue::Foreign));
        assert_eq!(Run(1).decode(b"hello"), Err(NotAValue::Foreign));
        assert_eq!(Run(1).decode(b""), Err(NotAValue::Foreign));
    }
}
