//! A record as JSON: what `consume -o json` writes, one object a line, and `produce --input json` reads.
//!
//! `{topic, partition, offset, timestamp, key, value, headers: [{key, value}]}`. Bytes that are no UTF-8 are
//! `{"base64": "..."}`; a missing key or value, null in the log, is `null`. So every record survives the round
//! trip byte for byte.

use crate::record_view::RecordView;
use crate::template::number;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Deserialize;
use std::borrow::Cow;

/// Appends the record as one line, line end included.
pub(crate) fn write(record: &RecordView<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"topic\":");
    text(record.topic, out);
    out.extend_from_slice(b",\"partition\":");
    number(out, i64::from(record.partition));
    out.extend_from_slice(b",\"offset\":");
    number(out, record.offset);
    out.extend_from_slice(b",\"timestamp\":");
    number(out, record.timestamp);
    out.extend_from_slice(b",\"key\":");
    nullable(record.key, out);
    out.extend_from_slice(b",\"value\":");
    nullable(record.value, out);
    out.extend_from_slice(b",\"headers\":[");
    for (at, (key, value)) in record.headers.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        out.extend_from_slice(b"{\"key\":");
        nullable(Some(key), out);
        out.extend_from_slice(b",\"value\":");
        nullable(*value, out);
        out.push(b'}');
    }
    out.extend_from_slice(b"]}\n");
}

fn nullable(bytes: Option<&[u8]>, out: &mut Vec<u8>) {
    match bytes.map(|bytes| (bytes, std::str::from_utf8(bytes))) {
        None => out.extend_from_slice(b"null"),
        Some((_, Ok(string))) => text(string, out),
        Some((bytes, Err(_))) => {
            out.extend_from_slice(b"{\"base64\":\"");
            out.extend_from_slice(BASE64.encode(bytes).as_bytes());
            out.extend_from_slice(b"\"}");
        }
    }
}

fn text(string: &str, out: &mut Vec<u8>) {
    // A string into memory: neither can fail.
    let _ = serde_json::to_writer(out, string);
}

/// What `produce --input json` takes from a line. Where the record lay before (`topic`, `partition`, `offset`)
/// is accepted and has no meaning for where it goes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Parsed {
    pub(crate) timestamp: Option<i64>,
    pub(crate) key: Option<Bytes>,
    pub(crate) value: Option<Bytes>,
    pub(crate) headers: Vec<(Bytes, Option<Bytes>)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    #[serde(default, rename = "topic")]
    _topic: Option<serde::de::IgnoredAny>,
    #[serde(default, rename = "partition")]
    _partition: Option<serde::de::IgnoredAny>,
    #[serde(default, rename = "offset")]
    _offset: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    timestamp: Option<i64>,
    #[serde(default, borrow)]
    key: Option<Blob<'a>>,
    #[serde(default, borrow)]
    value: Option<Blob<'a>>,
    #[serde(default, borrow)]
    headers: Vec<HeaderLine<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderLine<'a> {
    #[serde(borrow)]
    key: Blob<'a>,
    #[serde(default, borrow)]
    value: Option<Blob<'a>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string, null or {\"base64\": \"...\"}")]
enum Blob<'a> {
    Text(#[serde(borrow)] Cow<'a, str>),
    Binary(Base64<'a>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Base64<'a> {
    #[serde(borrow)]
    base64: Cow<'a, str>,
}

impl Blob<'_> {
    fn bytes(self) -> Result<Bytes, String> {
        match self {
            Blob::Text(text) => Ok(Bytes::from(text.into_owned().into_bytes())),
            Blob::Binary(Base64 { base64 }) => {
                BASE64.decode(base64.as_bytes()).map(Bytes::from).map_err(|error| format!("base64: {error}"))
            }
        }
    }
}

/// Reads one line.
///
/// # Errors
/// What is wrong with it and in which column.
pub(crate) fn parse(line: &[u8]) -> Result<Parsed, String> {
    // serde would take an array for a record as well.
    if line.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err("expected a JSON object, as `consume -o json` writes them".to_owned());
    }
    let line: Line<'_> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let mut headers = Vec::with_capacity(line.headers.len());
    for header in line.headers {
        headers.push((header.key.bytes()?, header.value.map(Blob::bytes).transpose()?));
    }
    Ok(Parsed {
        timestamp: line.timestamp.filter(|ms| *ms >= 0),
        key: line.key.map(Blob::bytes).transpose()?,
        value: line.value.map(Blob::bytes).transpose()?,
        headers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    #[test]
    fn the_form_is_fixed() {
        let mut out = Vec::new();
        write(
            &RecordView {
                topic: "t",
                partition: 1,
                offset: 2,
                timestamp: 3,
                key: None,
                value: Some(b"\xff\"\n"),
                headers: vec![(b"h", Some(b"1")), (b"h", None)],
            },
            &mut out,
        );
        assert_eq!(
            String::from_utf8(out).expect("text"),
            "{\"topic\":\"t\",\"partition\":1,\"offset\":2,\"timestamp\":3,\"key\":null,\
             \"value\":{\"base64\":\"/yIK\"},\
             \"headers\":[{\"key\":\"h\",\"value\":\"1\"},{\"key\":\"h\",\"value\":null}]}\n"
        );
    }

    #[test]
    fn little_is_needed_and_mistakes_are_named() {
        let parsed = parse(br#"{"value":"x"}"#).expect("valid");
        assert_eq!(parsed, Parsed { timestamp: None, key: None, value: Some("x".into()), headers: vec![] });
        for (line, part) in [
            ("nonsense", "expected a JSON object"),
            ("{\"value\":", "EOF"),
            ("{\"value\":1}", "expected a string, null or"),
            ("{\"valu\":\"x\"}", "unknown field `valu`"),
            ("{\"value\":{\"base64\":\"*\"}}", "base64"),
            ("{\"headers\":[{\"value\":\"x\"}]}", "missing field `key`"),
            ("[]", "expected a JSON object"),
        ] {
            let error = parse(line.as_bytes()).expect_err(line);
            assert!(error.contains(part), "{line}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            key in option::of(vec(any::<u8>(), 0..20)),
            value in option::of(vec(any::<u8>(), 0..50)),
            string in any::<String>(),
            headers in vec((vec(any::<u8>(), 0..9), option::of(vec(any::<u8>(), 0..9))), 0..4),
            timestamp in 0i64..,
        ) {
            let mut headers: Vec<_> = headers.into_iter().map(|(k, v)| (Bytes::from(k), v.map(Bytes::from))).collect();
            headers.push((Bytes::from(string), None));
            let mut out = Vec::new();
            let view = RecordView {
                topic: "t", partition: 0, offset: 0, timestamp,
                key: key.as_deref(), value: value.as_deref(),
                headers: headers.iter().map(|(k, v)| (k.as_ref(), v.as_deref())).collect(),
            };
            write(&view, &mut out);
            let parsed = parse(&out).expect("our own form");
            prop_assert_eq!(parsed.key.as_deref(), key.as_deref());
            prop_assert_eq!(parsed.value.as_deref(), value.as_deref());
            prop_assert_eq!(parsed.headers, headers);
            prop_assert_eq!(parsed.timestamp, Some(timestamp));
        }
    }
}
