//! Typed ids and positions: no bare integer travels between functions.

use std::fmt;
use std::str::FromStr;

macro_rules! integer_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub(crate) $inner);

        impl $name {
            /// Wraps the bare integer.
            pub const fn new(inner: $inner) -> Self {
                Self(inner)
            }

            /// The bare integer.
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl From<$inner> for $name {
            fn from(inner: $inner) -> Self {
                Self(inner)
            }
        }

        impl From<$name> for $inner {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            /// Wraps 128 bits.
            pub const fn new(bits: u128) -> Self {
                Self(bits)
            }

            /// The 128 bits.
            pub const fn get(self) -> u128 {
                self.0
            }

            /// From 16 bytes, the most significant first.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(u128::from_be_bytes(bytes))
            }

            /// From a field of a message; `None` unless it is 16 bytes long.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self::from_bytes)
            }

            /// 16 bytes, the most significant first.
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0.to_be_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                uuid::Uuid::from_u128(self.0).hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl From<u128> for $name {
            fn from(bits: u128) -> Self {
                Self(bits)
            }
        }

        impl From<$name> for u128 {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                uuid::Uuid::parse_str(text).map(|id| Self(id.as_u128()))
            }
        }
    };
}

integer_id! {
    /// Position of a record in its partition; the first is 0.
    Offset(i64)
}
integer_id! {
    /// The Raft term of the leader that appended a batch, as it stands in the batch's header; -1 before it is stamped.
    LeaderEpoch(i32)
}
integer_id! {
    /// A Raft term.
    Term(u64)
}
integer_id! {
    /// Position of an entry in a Raft log; the group's creation is 1.
    RaftIndex(u64)
}
integer_id! {
    /// A broker, as its operator numbered it.
    BrokerId(i32)
}
integer_id! {
    /// A partition's number within its topic; the first is 0.
    PartitionId(i32)
}
integer_id! {
    /// A producer: 63 random bits; -1 in a batch without one.
    ProducerId(i64)
}
integer_id! {
    /// Incarnation of a producer id: a higher one fences a lower one; -1 in a batch without a producer.
    ProducerEpoch(i16)
}
integer_id! {
    /// Number of a producer's record within a partition, wrapping from `i32::MAX` to 0; -1 in a batch without a producer.
    Sequence(i32)
}
integer_id! {
    /// A replica's Raft id: random, never used twice.
    ReplicaId(u64)
}
integer_id! {
    /// Milliseconds since 1970 (UTC); [`Timestamp::NONE`] is -1.
    Timestamp(i64)
}
uuid_id! {
    /// A topic, whatever its name: a deleted topic's id never comes back.
    TopicId
}
uuid_id! {
    /// A data directory of a broker: random, made with the directory.
    DirectoryId
}
uuid_id! {
    /// A cluster: random, made when it is founded.
    ClusterId
}

impl Offset {
    /// The first offset of a log.
    pub const ZERO: Self = Self(0);

    /// The offset `records` further on. Saturates: an offset never wraps.
    #[must_use]
    pub const fn plus(self, records: i64) -> Self {
        Self(self.0.saturating_add(records))
    }

    /// The next offset.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }
}

impl RaftIndex {
    /// The index `entries` further on.
    #[must_use]
    pub const fn plus(self, entries: u64) -> Self {
        Self(self.0.saturating_add(entries))
    }

    /// The next index.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }
}

impl LeaderEpoch {
    /// The epoch of a batch that was not stamped.
    pub const NONE: Self = Self(-1);

    /// The epoch of a Raft term; `None` above `i32::MAX`, which no log accepts.
    pub const fn from_term(term: Term) -> Option<Self> {
        if term.0 <= i32::MAX as u64 { Some(Self(term.0 as i32)) } else { None }
    }

    /// The Raft term of this epoch; `None` below zero.
    pub const fn term(self) -> Option<Term> {
        if self.0 >= 0 { Some(Term(self.0 as u64)) } else { None }
    }
}

impl ProducerId {
    /// No producer.
    pub const NONE: Self = Self(-1);
}

impl ProducerEpoch {
    /// No producer.
    pub const NONE: Self = Self(-1);
}

impl Sequence {
    /// No producer.
    pub const NONE: Self = Self(-1);

    /// The sequence `records` further on, wrapping from `i32::MAX` to 0 as Kafka's does.
    ///
    /// `records` must not be negative, nor `self`.
    #[must_use]
    pub const fn plus(self, records: i32) -> Self {
        Self(self.0.wrapping_add(records) & i32::MAX)
    }

    /// The next sequence.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }
}

impl Timestamp {
    /// No timestamp.
    pub const NONE: Self = Self(-1);

    /// The timestamp later by `by`; saturates.
    #[must_use]
    pub fn after(self, by: std::time::Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
    }

    /// The timestamp earlier by `by`; saturates.
    #[must_use]
    pub fn before(self, by: std::time::Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
    }
}

/// One partition of one topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicPartition {
    /// The topic.
    pub topic: TopicId,
    /// The partition within it.
    pub partition: PartitionId,
}

impl TopicPartition {
    /// The partition `partition` of `topic`.
    pub const fn new(topic: TopicId, partition: PartitionId) -> Self {
        Self { topic, partition }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

/// A topic's name: 1 to 249 of `[a-zA-Z0-9._-]`, neither `.` nor `..`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicName(String);

impl TopicName {
    /// Longest name, in bytes.
    pub const BYTES_MAX: usize = 249;

    /// Checks and wraps a name.
    pub fn new(name: impl Into<String>) -> Result<Self, TopicNameError> {
        let name = name.into();
        if name.is_empty() {
            return Err(TopicNameError::Empty);
        }
        if name.len() > Self::BYTES_MAX {
            return Err(TopicNameError::TooLong { bytes: name.len() });
        }
        if let Some(found) = name.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '-')) {
            return Err(TopicNameError::Character { found });
        }
        if name == "." || name == ".." {
            return Err(TopicNameError::Dots);
        }
        Ok(Self(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the topic is the cluster's own (`__...`): users read it, and never write or delete it.
    pub fn is_internal(&self) -> bool {
        self.0.starts_with("__")
    }

    /// The name as a `String`.
    pub fn into_string(self) -> String {
        self.0
    }
}

impl fmt::Display for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for TopicName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for TopicName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl FromStr for TopicName {
    type Err = TopicNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::new(text)
    }
}

impl From<TopicName> for String {
    fn from(name: TopicName) -> Self {
        name.0
    }
}

/// What is wrong with a topic's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicNameError {
    /// It is empty.
    #[error("a topic name cannot be empty: use 1 to 249 of a-z A-Z 0-9 . _ -")]
    Empty,
    /// It is longer than [`TopicName::BYTES_MAX`].
    #[error("a topic name of {bytes} bytes is too long: use at most 249")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It has a character that is not allowed.
    #[error("a topic name cannot contain {found:?}: use a-z A-Z 0-9 . _ -")]
    Character {
        /// The first such character.
        found: char,
    },
    /// It is `.` or `..`.
    #[error("a topic cannot be named '.' or '..': choose another name")]
    Dots,
}

impl From<TopicNameError> for crate::Error {
    fn from(error: TopicNameError) -> Self {
        Self::new(crate::ErrorCode::InvalidTopicName, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topic_names() {
        #[track_caller]
        fn check(name: &str, expected: Result<(), TopicNameError>) {
            assert_eq!(TopicName::new(name).map(|_| ()), expected, "{name:?}");
        }
        check("orders", Ok(()));
        check("A.b_c-9", Ok(()));
        check("...", Ok(()));
        check(&"x".repeat(249), Ok(()));
        check(&"x".repeat(250), Err(TopicNameError::TooLong { bytes: 250 }));
        check("", Err(TopicNameError::Empty));
        check(".", Err(TopicNameError::Dots));
        check("..", Err(TopicNameError::Dots));
        check("a/b", Err(TopicNameError::Character { found: '/' }));
        check("caf\u{e9}", Err(TopicNameError::Character { found: '\u{e9}' }));
        check("a b", Err(TopicNameError::Character { found: ' ' }));
        check("a\0", Err(TopicNameError::Character { found: '\0' }));
        assert!(TopicName::new("__cluster_metadata").is_ok_and(|name| name.is_internal()));
        assert!(TopicName::new("_private").is_ok_and(|name| !name.is_internal()));
    }

    #[test]
    fn sequences_wrap_to_zero() {
        assert_eq!(Sequence::new(i32::MAX).next(), Sequence::new(0));
        assert_eq!(Sequence::new(i32::MAX - 1).plus(3), Sequence::new(1));
        assert_eq!(Sequence::new(5).plus(3), Sequence::new(8));
    }

    #[test]
    fn uuids_show_and_parse() {
        let id = TopicId::new(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
        assert_eq!(id.to_string(), "01234567-89ab-cdef-0123-456789abcdef");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(TopicId::from_bytes(id.to_bytes()), id);
        assert_eq!(TopicId::from_slice(&id.to_bytes()), Some(id));
        assert_eq!(TopicId::from_slice(&[1, 2, 3]), None);
    }

    #[test]
    fn terms_and_epochs() {
        assert_eq!(LeaderEpoch::from_term(Term::new(i32::MAX as u64)), Some(LeaderEpoch::new(i32::MAX)));
        assert_eq!(LeaderEpoch::from_term(Term::new(i32::MAX as u64 + 1)), None);
        assert_eq!(LeaderEpoch::NONE.term(), None);
        assert_eq!(LeaderEpoch::new(7).term(), Some(Term::new(7)));
    }
}
