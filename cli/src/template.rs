//! The template of `consume -f`: `%t` topic, `%p` partition, `%o` offset, `%k` key, `%v` value, `%h` headers,
//! `%T` timestamp in ms, `%%`, and the escapes of [`crate::escape`]. Nothing is added, no line end either.

use crate::escape::escape;
use crate::record_view::RecordView;
use std::io::Write;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Literal(Vec<u8>),
    Topic,
    Partition,
    Offset,
    Key,
    Value,
    Headers,
    Timestamp,
}

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template {
    pieces: Vec<Piece>,
}

impl std::str::FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let mut pieces = Vec::new();
        let mut literal = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let byte = bytes[at];
            at += 1;
            let piece = match byte {
                b'\\' => {
                    let (byte, taken) = escape(&bytes[at..])?;
                    literal.push(byte);
                    at += taken;
                    continue;
                }
                b'%' => {
                    let directive = text[at..].chars().next();
                    at += directive.map_or(0, char::len_utf8);
                    match directive {
                        Some('%') => {
                            literal.push(b'%');
                            continue;
                        }
                        Some('t') => Piece::Topic,
                        Some('p') => Piece::Partition,
                        Some('o') => Piece::Offset,
                        Some('k') => Piece::Key,
                        Some('v') => Piece::Value,
                        Some('h') => Piece::Headers,
                        Some('T') => Piece::Timestamp,
                        Some(other) => {
                            return Err(format!("unknown %{other}; known are %t %p %o %k %v %h %T %%"));
                        }
                        None => return Err("it ends with a lone %; write %% for a per cent sign".to_owned()),
                    }
                }
                byte => {
                    literal.push(byte);
                    continue;
                }
            };
            if !literal.is_empty() {
                pieces.push(Piece::Literal(std::mem::take(&mut literal)));
            }
            pieces.push(piece);
        }
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal));
        }
        Ok(Template { pieces })
    }
}

impl Template {
    /// Appends the record. A null key or value prints nothing; headers print as `key=value,key=value`.
    pub(crate) fn render(&self, record: &RecordView<'_>, out: &mut Vec<u8>) {
        for piece in &self.pieces {
            match piece {
                Piece::Literal(bytes) => out.extend_from_slice(bytes),
                Piece::Topic => out.extend_from_slice(record.topic.as_bytes()),
                Piece::Partition => number(out, i64::from(record.partition)),
                Piece::Offset => number(out, record.offset),
                Piece::Key => out.extend_from_slice(record.key.unwrap_or_default()),
                Piece::Value => out.extend_from_slice(record.value.unwrap_or_default()),
                Piece::Headers => {
                    for (at, (key, value)) in record.headers.iter().enumerate() {
                        if at > 0 {
                            out.push(b',');
                        }
                        out.extend_from_slice(key);
                        out.push(b'=');
                        out.extend_from_slice(value.unwrap_or_default());
                    }
                }
                Piece::Timestamp => number(out, record.timestamp),
            }
        }
    }
}

/// Appends a number in decimal.
pub(crate) fn number(out: &mut Vec<u8>, value: i64) {
    // Writing to memory does not fail.
    let _ = write!(out, "{value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(template: &str, record: &RecordView<'_>) -> String {
        let mut out = Vec::new();
        template.parse::<Template>().expect("a valid template").render(record, &mut out);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn every_directive() {
        let headers: Vec<(&[u8], Option<&[u8]>)> = vec![(b"a", Some(b"1")), (b"a", None), (b"b", Some(b"2"))];
        let record = RecordView {
            topic: "orders",
            partition: 3,
            offset: 42,
            timestamp: 1_700_000_000_000,
            key: Some(b"k"),
            value: Some(b"v"),
            headers,
        };
        assert_eq!(
            rendered(r"%t[%p]@%o %T %k\t%v %h 100%%\x21\n", &record),
            "orders[3]@42 1700000000000 k\tv a=1,a=,b=2 100%!\n"
        );
        assert_eq!(rendered("%k|%v|%h", &RecordView { key: None, value: None, headers: Vec::new(), ..record }), "||");
        assert_eq!(rendered("", &record), "");
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for text in ["%x", "%", "%é", "\\", "\\q", "%v\\x1"] {
            assert!(text.parse::<Template>().is_err(), "{text}");
        }
    }
}
