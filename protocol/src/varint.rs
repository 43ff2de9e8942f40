//! Zigzag varints, as records use them: at most 5 bytes for 32 bits, 10 for 64, and no bit beyond.

/// A signed number as an unsigned one that is small where the number is near zero.
pub(crate) const fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

/// The other way.
pub(crate) const fn unzigzag(value: u64) -> i64 {
    ((value >> 1) as i64) ^ -((value & 1) as i64)
}

/// Bytes that `value` takes: 1 to 10.
pub(crate) const fn varint_bytes(value: i64) -> usize {
    let bits = 64 - (zigzag(value) | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

/// Writes `value` at `at` and returns the position behind it.
pub(crate) fn write_varint(into: &mut [u8], mut at: usize, value: i64) -> usize {
    let mut rest = zigzag(value);
    while rest >= 0x80 {
        into[at] = rest as u8 | 0x80;
        rest >>= 7;
        at += 1;
    }
    into[at] = rest as u8;
    at + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_values() {
        for (value, bytes) in [
            (0, 1),
            (-1, 1),
            (63, 1),
            (-64, 1),
            (64, 2),
            (-65, 2),
            (8191, 2),
            (8192, 3),
            (i64::from(i32::MAX), 5),
            (i64::from(i32::MIN), 5),
            (i64::MAX, 10),
            (i64::MIN, 10),
        ] {
            let mut out = [0; 10];
            assert_eq!(write_varint(&mut out, 0, value), bytes, "{value}");
            assert_eq!(varint_bytes(value), bytes, "{value}");
            assert_eq!(unzigzag(zigzag(value)), value);
        }
    }
}
