//! A record on its way in, and where it came to lie.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Serialize;

use crate::error::{Error, ErrorCode, Result};

/// Bytes of a key, value or header, borrowed or owned; `Null` is Kafka's null, which is not the same as empty.
///
/// Made by `into()` from `&str`, `String`, `&[u8]`, `&[u8; N]`, `Vec<u8>`, [`Bytes`], references to these, and
/// `Option` of them (`None` is null).
#[derive(Clone, Debug, Default)]
pub enum Payload<'a> {
    /// No value at all.
    #[default]
    Null,
    /// The caller's bytes: nothing is allocated for them.
    Borrowed(&'a [u8]),
    /// The record's own bytes.
    Owned(Vec<u8>),
    /// Shared bytes.
    Shared(Bytes),
}

impl Payload<'_> {
    /// The bytes, or `None` for null.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Null => None,
            Self::Borrowed(bytes) => Some(bytes),
            Self::Owned(bytes) => Some(bytes),
            Self::Shared(bytes) => Some(bytes),
        }
    }
}

impl<'a> From<&'a [u8]> for Payload<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Borrowed(bytes)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Payload<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        Self::Borrowed(bytes)
    }
}

impl<'a> From<&'a str> for Payload<'a> {
    fn from(text: &'a str) -> Self {
        Self::Borrowed(text.as_bytes())
    }
}

impl<'a> From<&'a String> for Payload<'a> {
    fn from(text: &'a String) -> Self {
        Self::Borrowed(text.as_bytes())
    }
}

impl<'a> From<&'a Vec<u8>> for Payload<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        Self::Borrowed(bytes)
    }
}

impl<'a> From<&'a Bytes> for Payload<'a> {
    fn from(bytes: &'a Bytes) -> Self {
        Self::Borrowed(bytes)
    }
}

impl From<String> for Payload<'_> {
    fn from(text: String) -> Self {
        Self::Owned(text.into_bytes())
    }
}

impl From<Vec<u8>> for Payload<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Owned(bytes)
    }
}

impl From<Bytes> for Payload<'_> {
    fn from(bytes: Bytes) -> Self {
        Self::Shared(bytes)
    }
}

impl<'a, T: Into<Payload<'a>>> From<Option<T>> for Payload<'a> {
    fn from(bytes: Option<T>) -> Self {
        bytes.map_or(Self::Null, Into::into)
    }
}

/// A record to send: topic, and what else is set of partition, timestamp, key, value and headers.
///
/// ```
/// use flowstone_client::Record;
/// let record = Record::to("orders").key("order-17").value("2 apples").header("source", "web");
/// assert_eq!(record.key_bytes(), Some(&b"order-17"[..]));
/// ```
#[derive(Clone, Debug)]
#[must_use = "a record does nothing until it is sent"]
pub struct Record<'a> {
    pub(crate) topic: &'a str,
    pub(crate) partition: Option<i32>,
    pub(crate) timestamp: Option<i64>,
    pub(crate) key: Payload<'a>,
    pub(crate) value: Payload<'a>,
    pub(crate) headers: Vec<(Payload<'a>, Payload<'a>)>,
}

impl<'a> Record<'a> {
    /// A record for this topic, with null key and value until they are set.
    pub fn to(topic: &'a str) -> Self {
        Self { topic, partition: None, timestamp: None, key: Payload::Null, value: Payload::Null, headers: Vec::new() }
    }

    /// The key: records of one key go to one partition.
    pub fn key(mut self, key: impl Into<Payload<'a>>) -> Self {
        self.key = key.into();
        self
    }

    /// The value; null stays what it is, an empty one is not null.
    pub fn value(mut self, value: impl Into<Payload<'a>>) -> Self {
        self.value = value.into();
        self
    }

    /// The value, as JSON.
    ///
    /// # Errors
    /// `INVALID_RECORD` where the value cannot be written as JSON.
    pub fn json<T: Serialize + ?Sized>(mut self, value: &T) -> Result<Self> {
        let text = serde_json::to_vec(value).map_err(|error| {
            Error::new(ErrorCode::InvalidRecord, format!("the value cannot be written as JSON: {error}"))
                .at_topic(self.topic)
                .caused_by(error)
        })?;
        self.value = Payload::Owned(text);
        Ok(self)
    }

    /// One more header; their order is kept, and so are several of one key.
    pub fn header(mut self, key: impl Into<Payload<'a>>, value: impl Into<Payload<'a>>) -> Self {
        self.headers.push((key.into(), value.into()));
        self
    }

    /// The partition, instead of letting the producer's partitioner choose.
    pub fn partition(mut self, partition: i32) -> Self {
        self.partition = Some(partition);
        self
    }

    /// When it happened; the time of sending unless set. Kept to the millisecond.
    pub fn timestamp(mut self, at: SystemTime) -> Self {
        self.timestamp = Some(unix_millis(at));
        self
    }

    /// When it happened, in milliseconds since 1970.
    pub fn timestamp_millis(mut self, millis: i64) -> Self {
        self.timestamp = Some(millis);
        self
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        self.topic
    }

    /// The key's bytes, `None` for null.
    pub fn key_bytes(&self) -> Option<&[u8]> {
        self.key.as_bytes()
    }

    /// The value's bytes, `None` for null.
    pub fn value_bytes(&self) -> Option<&[u8]> {
        self.value.as_bytes()
    }

    /// An upper bound of the bytes it takes in a batch.
    pub(crate) fn bytes_max(&self) -> usize {
        // Length, attributes, timestamp delta, offset delta, two lengths and the header count, each at its widest.
        const FRAME: usize = 5 + 1 + 10 + 5 + 5 + 5 + 5;
        let of = |payload: &Payload<'_>| payload.as_bytes().map_or(0, <[u8]>::len);
        let headers: usize = self.headers.iter().map(|(key, value)| 10 + of(key) + of(value)).sum();
        FRAME + of(&self.key) + of(&self.value) + headers
    }
}

/// Where an acknowledged record lies.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordMetadata {
    /// Its topic.
    pub topic: Arc<str>,
    /// Its partition.
    pub partition: i32,
    /// Its offset; -1 with `acks=none`, which are not told.
    pub offset: i64,
    /// Its timestamp in milliseconds since 1970: the broker's where the topic stamps at append, else the record's own.
    pub timestamp: i64,
}

/// Milliseconds since 1970, negative before.
pub(crate) fn unix_millis(at: SystemTime) -> i64 {
    let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    match at.duration_since(UNIX_EPOCH) {
        Ok(since) => millis(since),
        Err(before) => -millis(before.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_and_empty_differ() {
        let record = Record::to("t").key(None::<&str>).value("");
        assert_eq!((record.key_bytes(), record.value_bytes()), (None, Some(&b""[..])));
        assert_eq!(Record::to("t").value(Some(vec![1, 2])).value_bytes(), Some(&[1, 2][..]));
    }

    #[test]
    fn json_that_cannot_be_written_is_told() {
        let bad = std::collections::BTreeMap::from([(vec![1], 2)]);
        let error = Record::to("t").json(&bad).unwrap_err();
        assert_eq!((error.code(), error.topic()), (ErrorCode::InvalidRecord, Some("t")));
        assert_eq!(Record::to("t").json(&[1, 2]).unwrap().value_bytes(), Some(&b"[1,2]"[..]));
    }

    #[test]
    fn times_before_1970_are_negative() {
        assert_eq!(unix_millis(UNIX_EPOCH + Duration::from_millis(1500)), 1500);
        assert_eq!(unix_millis(UNIX_EPOCH - Duration::from_millis(1500)), -1500);
    }
}
