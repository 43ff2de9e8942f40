//! Errors as every service tells them: a stable code, its kind (what a caller may do), and words for people.

use std::fmt;

use prost::Message;
use tonic::{Code, Status};

use crate::ids::{BrokerId, PartitionId};
use crate::pb;

pub use crate::pb::ErrorCode;

/// Bytes of a message in a status. On the wire it is there twice, once with up to three bytes for each and once in
/// base64, names beside it: together below 12 KiB, and peers take 16 KiB of headers and more.
pub const STATUS_MESSAGE_BYTES_MAX: usize = 2 << 10;
/// Bytes of a name or an address in a status: more than a valid one has.
pub const STATUS_NAME_BYTES_MAX: usize = 512;
/// Stands for what was cut.
const CUT_MARK: &str = "...";

const _: () =
    assert!(STATUS_MESSAGE_BYTES_MAX * 3 + (STATUS_MESSAGE_BYTES_MAX + 2 * STATUS_NAME_BYTES_MAX) * 4 / 3 < 12 << 10);

/// What a caller may do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ErrorKind {
    /// The same request may succeed later, here or at the leader that the error names.
    Retriable,
    /// What was begun is lost, the caller is not: abort the transaction, or join the group again, and begin anew.
    Abortable,
    /// The request can never succeed as it is.
    Fatal,
}

impl ErrorKind {
    /// Its name in lower case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Retriable => "retriable",
            Self::Abortable => "abortable",
            Self::Fatal => "fatal",
        }
    }

    /// Its form on the wire.
    pub const fn to_pb(self) -> pb::ErrorKind {
        match self {
            Self::Retriable => pb::ErrorKind::Retriable,
            Self::Abortable => pb::ErrorKind::Abortable,
            Self::Fatal => pb::ErrorKind::Fatal,
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl ErrorCode {
    /// What a caller may do about it.
    pub const fn kind(self) -> ErrorKind {
        match self {
            Self::NotLeader
            | Self::LeaderNotReady
            | Self::NoLeader
            | Self::TimedOut
            | Self::ShuttingDown
            | Self::Overloaded
            | Self::DiskFull
            | Self::StorageFailed
            | Self::NotCoordinator
            | Self::UnstableOffsets
            | Self::ConcurrentTransactions => ErrorKind::Retriable,
            Self::TransactionAborted | Self::StaleMemberEpoch | Self::UnknownMember | Self::NotAssigned => {
                ErrorKind::Abortable
            }
            // Nothing that a caller could change is wrong with the request, and the broker is not the one to promise
            // that a second try goes better: an internal error must be seen, not retried until a timeout hides it.
            Self::Unspecified
            | Self::Internal
            | Self::InvalidRequest
            | Self::Unsupported
            | Self::MessageTooLarge
            | Self::PermissionDenied
            | Self::UnknownTopic
            | Self::UnknownPartition
            | Self::TopicAlreadyExists
            | Self::InvalidTopicName
            | Self::InvalidPartitions
            | Self::InvalidReplicationFactor
            | Self::InvalidConfig
            | Self::InternalTopic
            | Self::CorruptBatch
            | Self::InvalidRecord
            | Self::BatchTooLarge
            | Self::InvalidTimestamp
            | Self::UnsupportedCompression
            | Self::OffsetOutOfRange
            | Self::LogDiverged
            | Self::CorruptLog
            | Self::Quarantined
            | Self::OutOfOrderSequence
            | Self::UnknownProducer
            | Self::ProducerFenced
            | Self::ProducerExpired
            | Self::DuplicateSequence
            | Self::UnknownGroup
            | Self::InvalidGroup
            | Self::FencedInstance
            | Self::GroupNotEmpty
            | Self::GroupFull
            | Self::InvalidPattern
            | Self::OffsetMetadataTooLarge
            | Self::InvalidTransactionState
            | Self::InvalidTransactionalId
            | Self::InvalidTransactionTimeout
            | Self::UnknownTransaction => ErrorKind::Fatal,
        }
    }

    /// Its stable name, such as `UNKNOWN_TOPIC`.
    pub fn as_str(self) -> &'static str {
        let name = self.as_str_name();
        name.strip_prefix("ERROR_CODE_").unwrap_or(name)
    }

    /// The gRPC status code that fits best.
    pub const fn status_code(self) -> Code {
        match self {
            Self::UnknownTopic
            | Self::UnknownPartition
            | Self::UnknownGroup
            | Self::UnknownMember
            | Self::UnknownTransaction => Code::NotFound,
            Self::TopicAlreadyExists | Self::DuplicateSequence => Code::AlreadyExists,
            Self::PermissionDenied | Self::InternalTopic => Code::PermissionDenied,
            Self::Unsupported => Code::Unimplemented,
            Self::InvalidRequest
            | Self::InvalidTopicName
            | Self::InvalidPartitions
            | Self::InvalidReplicationFactor
            | Self::InvalidConfig
            | Self::CorruptBatch
            | Self::InvalidRecord
            | Self::BatchTooLarge
            | Self::InvalidTimestamp
            | Self::MessageTooLarge
            | Self::UnsupportedCompression
            | Self::InvalidGroup
            | Self::InvalidPattern
            | Self::OffsetMetadataTooLarge
            | Self::InvalidTransactionalId
            | Self::InvalidTransactionTimeout => Code::InvalidArgument,
            Self::OffsetOutOfRange => Code::OutOfRange,
            Self::LogDiverged | Self::CorruptLog | Self::Quarantined => Code::DataLoss,
            Self::NotLeader
            | Self::LeaderNotReady
            | Self::NoLeader
            | Self::ShuttingDown
            | Self::StorageFailed
            | Self::NotCoordinator
            | Self::UnstableOffsets => Code::Unavailable,
            Self::TimedOut => Code::DeadlineExceeded,
            Self::Overloaded | Self::DiskFull | Self::GroupFull => Code::ResourceExhausted,
            Self::OutOfOrderSequence
            | Self::UnknownProducer
            | Self::ProducerExpired
            | Self::GroupNotEmpty
            | Self::NotAssigned
            | Self::InvalidTransactionState => Code::FailedPrecondition,
            Self::ProducerFenced
            | Self::StaleMemberEpoch
            | Self::FencedInstance
            | Self::ConcurrentTransactions
            | Self::TransactionAborted => Code::Aborted,
            Self::Unspecified | Self::Internal => Code::Internal,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error of a request: what goes into a response or a gRPC status, and what comes out of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Error {
    /// What happened.
    pub code: ErrorCode,
    /// What a caller may do: the code's kind, or what the sender of a code that is newer than this program said.
    pub kind: ErrorKind,
    /// For people: what is wrong and what to do about it.
    pub message: String,
    /// The topic it is about.
    pub topic: Option<String>,
    /// The partition it is about.
    pub partition: Option<PartitionId>,
    /// Who leads the partition, and the address of its client listener.
    pub leader_hint: Option<(BrokerId, String)>,
}

impl Error {
    /// An error of this code; the message says what is wrong and what to do about it.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, kind: code.kind(), message: message.into(), topic: None, partition: None, leader_hint: None }
    }

    /// Names the topic.
    #[must_use]
    pub fn with_topic(mut self, topic: impl Into<String>) -> Self {
        self.topic = Some(topic.into());
        self
    }

    /// Names the partition.
    #[must_use]
    pub fn with_partition(mut self, partition: PartitionId) -> Self {
        self.partition = Some(partition);
        self
    }

    /// Names who leads the partition.
    #[must_use]
    pub fn with_leader(mut self, broker: BrokerId, address: impl Into<String>) -> Self {
        self.leader_hint = Some((broker, address.into()));
        self
    }

    /// What a caller may do about it.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the same request may succeed later.
    pub fn is_retriable(&self) -> bool {
        self.kind == ErrorKind::Retriable
    }

    /// Its form inside a response.
    pub fn to_detail(&self) -> pb::ErrorDetail {
        pb::ErrorDetail {
            code: self.code.into(),
            kind: self.kind.to_pb().into(),
            message: self.message.clone(),
            topic: self.topic.clone().unwrap_or_default(),
            partition: self.partition.map(PartitionId::get),
            leader_hint: self
                .leader_hint
                .as_ref()
                .map(|(broker, address)| pb::BrokerAddress { broker_id: broker.get(), address: address.clone() }),
        }
    }

    /// From its form inside a response. A code that this program does not know becomes [`ErrorCode::Unspecified`] and
    /// keeps the kind that its sender gave it.
    pub fn from_detail(detail: &pb::ErrorDetail) -> Self {
        let code = detail.code();
        let kind = match detail.kind() {
            pb::ErrorKind::Retriable => ErrorKind::Retriable,
            pb::ErrorKind::Abortable => ErrorKind::Abortable,
            pb::ErrorKind::Fatal => ErrorKind::Fatal,
            pb::ErrorKind::Unspecified => code.kind(),
        };
        Self {
            code,
            kind,
            message: detail.message.clone(),
            topic: (!detail.topic.is_empty()).then(|| detail.topic.clone()),
            partition: detail.partition.map(PartitionId::new),
            leader_hint: detail.leader_hint.as_ref().map(|hint| (BrokerId::new(hint.broker_id), hint.address.clone())),
        }
    }

    /// Its form as the end of a call: the status code that fits, the message, and the detail.
    ///
    /// A status travels in HTTP/2 headers, and peers end the whole connection over headers that are too large: texts
    /// longer than [`STATUS_MESSAGE_BYTES_MAX`] and [`STATUS_NAME_BYTES_MAX`] are cut, as those may be that quote what a
    /// caller sent.
    pub fn to_status(&self) -> Status {
        let mut detail = self.to_detail();
        cut(&mut detail.message, STATUS_MESSAGE_BYTES_MAX);
        cut(&mut detail.topic, STATUS_NAME_BYTES_MAX);
        if let Some(hint) = &mut detail.leader_hint {
            cut(&mut hint.address, STATUS_NAME_BYTES_MAX);
        }
        let message = detail.message.clone();
        Status::with_details(self.code.status_code(), message, detail.encode_to_vec().into())
    }

    /// From the end of a call; `None` where the status has no detail of ours (gRPC's own failures, a proxy's).
    pub fn from_status(status: &Status) -> Option<Self> {
        if status.details().is_empty() {
            return None;
        }
        pb::ErrorDetail::decode(status.details()).ok().map(|detail| Self::from_detail(&detail))
    }
}

/// Shortens a text that is longer than `bytes_max`, at the end of a character, and says so by [`CUT_MARK`].
fn cut(text: &mut String, bytes_max: usize) {
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max - CUT_MARK.len()));
        text.push_str(CUT_MARK);
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match (&self.topic, self.partition) {
            (Some(topic), Some(partition)) => write!(f, " (topic {topic}, partition {partition})")?,
            (Some(topic), None) => write!(f, " (topic {topic})")?,
            (None, Some(partition)) => write!(f, " (partition {partition})")?,
            (None, None) => {}
        }
        if let Some((broker, address)) = &self.leader_hint {
            write!(f, " (leader: broker {broker} at {address})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        error.to_status()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_codes() -> impl Iterator<Item = ErrorCode> {
        (0..100).filter_map(|number| ErrorCode::try_from(number).ok())
    }

    #[test]
    fn every_code_survives_detail_and_status() {
        assert!(all_codes().count() >= 35);
        for code in all_codes() {
            for error in [
                Error::new(code, "plain"),
                Error::new(code, "what is wrong")
                    .with_topic("orders")
                    .with_partition(PartitionId::new(0))
                    .with_leader(BrokerId::new(2), "[::1]:7070"),
            ] {
                assert_eq!(Error::from_detail(&error.to_detail()), error);
                let status = error.to_status();
                assert_ne!(status.code(), Code::Ok);
                assert_eq!(Error::from_status(&status), Some(error));
            }
        }
    }

    #[test]
    fn a_status_fits_into_headers_whatever_it_quotes() {
        for text in ["x", "ü", "\u{10ffff}", "\n"] {
            let long = text.repeat(20_000);
            let error = Error::new(ErrorCode::InvalidConfig, long.clone())
                .with_topic(long.clone())
                .with_leader(BrokerId::new(1), long);
            let mut headers = tonic::codegen::http::HeaderMap::new();
            error.to_status().add_header(&mut headers).expect("valid headers");
            let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
            assert!(bytes < 12 << 10, "{bytes} bytes of headers");
            let told = Error::from_status(&error.to_status()).expect("one of ours");
            assert_eq!(told.code, ErrorCode::InvalidConfig);
            assert!(told.message.ends_with(CUT_MARK) && told.message.starts_with(text), "{}", told.message);
        }
        let short = Error::new(ErrorCode::InvalidConfig, "x".repeat(STATUS_MESSAGE_BYTES_MAX));
        assert_eq!(Error::from_status(&short.to_status()), Some(short));
    }

    #[test]
    fn an_unknown_code_keeps_its_senders_kind() {
        let detail = pb::ErrorDetail {
            code: 9999,
            kind: pb::ErrorKind::Retriable.into(),
            message: "from the future".into(),
            ..Default::default()
        };
        let error = Error::from_detail(&detail);
        assert_eq!((error.code, error.kind()), (ErrorCode::Unspecified, ErrorKind::Retriable));
    }

    #[test]
    fn statuses_of_others_have_no_error() {
        assert_eq!(Error::from_status(&Status::unavailable("connection refused")), None);
        let garbage = Status::with_details(Code::Internal, "x", vec![0xff; 7].into());
        assert_eq!(Error::from_status(&garbage), None);
    }

    #[test]
    fn names_are_stable() {
        assert_eq!(ErrorCode::UnknownTopic.as_str(), "UNKNOWN_TOPIC");
        assert_eq!(ErrorCode::OffsetOutOfRange.to_string(), "OFFSET_OUT_OF_RANGE");
    }

    #[test]
    fn display_tells_where() {
        let error = Error::new(ErrorCode::NotLeader, "not the leader, ask it")
            .with_topic("orders")
            .with_partition(PartitionId::new(3))
            .with_leader(BrokerId::new(2), "127.0.0.1:7170");
        assert_eq!(
            error.to_string(),
            "not the leader, ask it (topic orders, partition 3) (leader: broker 2 at 127.0.0.1:7170)"
        );
    }
}
