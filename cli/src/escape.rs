//! The backslash escapes of delimiters and templates: `\n \t \r \0 \\ \xNN`.

/// Reads the escape that follows a backslash; `rest` begins after the backslash. Gives the byte it stands for
/// and how many bytes of `rest` it took.
///
/// # Errors
/// What is wrong with it, for a usage error.
pub(crate) fn escape(rest: &[u8]) -> Result<(u8, usize), String> {
    match rest.first() {
        Some(b'n') => Ok((b'\n', 1)),
        Some(b't') => Ok((b'\t', 1)),
        Some(b'r') => Ok((b'\r', 1)),
        Some(b'0') => Ok((0, 1)),
        Some(b'\\') => Ok((b'\\', 1)),
        Some(b'x') => {
            let digit = |at: usize| rest.get(at).and_then(|byte| (*byte as char).to_digit(16));
            match (digit(1), digit(2)) {
                (Some(high), Some(low)) => Ok(((high * 16 + low) as u8, 3)),
                _ => Err("\\x needs two hexadecimal digits, as in \\x1f".to_owned()),
            }
        }
        Some(_) => Err(format!(
            "unknown escape \\{}; known are \\n \\t \\r \\0 \\\\ \\xNN",
            String::from_utf8_lossy(rest).chars().next().unwrap_or('?')
        )),
        None => Err("it ends with a lone backslash; write \\\\ for a backslash".to_owned()),
    }
}

/// Bytes with their escapes replaced.
///
/// # Errors
/// What is wrong with an escape.
pub(crate) fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'\\' {
            let (byte, taken) = escape(&bytes[at + 1..])?;
            out.push(byte);
            at += 1 + taken;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        for (text, expected) in
            [("\\t", Ok(vec![b'\t'])), ("a\\x1Fb", Ok(vec![b'a', 0x1f, b'b'])), ("::", Ok(b"::".to_vec()))]
        {
            assert_eq!(unescape(text), expected, "{text}");
        }
        for text in ["\\", "\\x1", "\\q", "\\é"] {
            assert!(unescape(text).is_err(), "{text}");
        }
    }
}
