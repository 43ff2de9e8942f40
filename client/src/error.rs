//! One error type for everything that can go wrong, with what a caller may do about it.

use std::fmt;
use std::sync::Arc;

use flowstone_protocol::PartitionId;
use flowstone_protocol::pb;

use crate::address::ServerAddress;

pub use flowstone_protocol::{ErrorCode, ErrorKind};

/// What every call of this crate fails with. Cheap to clone: all records of a failed batch share one.
///
/// [`kind`](Error::kind) says what may be done, [`code`](Error::code) what happened; the text ends with what to do.
/// What underlies it (a refused connection, say) is its [`source`](std::error::Error::source).
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    detail: flowstone_protocol::Error,
    unreachable: bool,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::from(flowstone_protocol::Error::new(code, message))
    }

    /// No broker answered: retriable, as `TIMED_OUT`, and told apart by [`Error::is_unreachable`].
    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        let detail = flowstone_protocol::Error::new(ErrorCode::TimedOut, message);
        Self(Arc::new(Inner { detail, unreachable: true, source: None }))
    }

    pub(crate) fn closed(what: &str) -> Self {
        Self::new(ErrorCode::ShuttingDown, format!("the {what} is closed; build a new one"))
    }

    pub(crate) fn from_detail(detail: &pb::ErrorDetail) -> Self {
        Self::from(flowstone_protocol::Error::from_detail(detail))
    }

    /// Its form in messages.
    pub(crate) fn to_detail(&self) -> pb::ErrorDetail {
        self.0.detail.to_detail()
    }

    /// From the end of a call to this server: the broker's own words where it sent them, else what gRPC says.
    pub(crate) fn from_status(server: &ServerAddress, status: tonic::Status) -> Self {
        if let Some(error) = flowstone_protocol::Error::from_status(&status) {
            return Self::from(error);
        }
        // gRPC's own text is often as vague as "transport error"; the reason is the innermost source.
        let text = match std::error::Error::source(&status) {
            Some(source) => innermost(source).to_string(),
            None if status.message().is_empty() => status.code().description().to_owned(),
            None => status.message().to_owned(),
        };
        let error = match status.code() {
            tonic::Code::Unavailable | tonic::Code::Cancelled | tonic::Code::Unknown | tonic::Code::Aborted => {
                Self::unreachable(format!("cannot reach the broker at {server}: {text}; is it running?"))
            }
            tonic::Code::DeadlineExceeded => {
                Self::new(ErrorCode::TimedOut, format!("the call to {server} timed out: {text}"))
            }
            tonic::Code::ResourceExhausted => Self::new(ErrorCode::Overloaded, text),
            tonic::Code::OutOfRange | tonic::Code::InvalidArgument => Self::new(ErrorCode::MessageTooLarge, text),
            tonic::Code::Unimplemented => Self::new(
                ErrorCode::Unsupported,
                format!("{server} does not know this call ({text}); is it a Flowstone broker of this version?"),
            ),
            tonic::Code::PermissionDenied | tonic::Code::Unauthenticated => {
                Self::new(ErrorCode::PermissionDenied, text)
            }
            _ => Self::new(ErrorCode::Internal, text),
        };
        error.caused_by(status)
    }

    pub(crate) fn caused_by(self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.edit(|inner| inner.source = Some(Arc::new(source)))
    }

    pub(crate) fn at_topic(self, topic: &str) -> Self {
        self.edit(|inner| {
            inner.detail.topic.get_or_insert_with(|| topic.to_owned());
        })
    }

    pub(crate) fn at(self, topic: &str, partition: i32) -> Self {
        self.edit(|inner| {
            inner.detail.topic.get_or_insert_with(|| topic.to_owned());
            inner.detail.partition.get_or_insert(PartitionId::new(partition));
        })
    }

    fn edit(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// What a caller may do: try again, abort its transaction, or change the request.
    pub fn kind(&self) -> ErrorKind {
        self.0.detail.kind()
    }

    /// What happened. Faults that this side found carry the nearest code: `TIMED_OUT` where no broker answered in
    /// time, `INVALID_REQUEST` for a setting that makes no sense, `SHUTTING_DOWN` for a producer or consumer that is
    /// closed, `CORRUPT_BATCH` for records whose checksum does not fit.
    pub fn code(&self) -> ErrorCode {
        self.0.detail.code
    }

    /// What is wrong and what to do about it, without topic and partition.
    pub fn message(&self) -> &str {
        &self.0.detail.message
    }

    /// The topic it is about.
    pub fn topic(&self) -> Option<&str> {
        self.0.detail.topic.as_deref()
    }

    /// The partition it is about.
    pub fn partition(&self) -> Option<i32> {
        self.0.detail.partition.map(PartitionId::get)
    }

    /// Whether the same call may succeed later.
    pub fn is_retriable(&self) -> bool {
        self.kind() == ErrorKind::Retriable
    }

    /// Whether no broker could be reached, or a connection broke.
    pub fn is_unreachable(&self) -> bool {
        self.0.unreachable
    }

    /// Whether a broker said so in its own words, rather than the transport or this side.
    pub(crate) fn is_of_broker(&self) -> bool {
        !self.0.unreachable && self.0.source.is_none()
    }

    /// Whether something that was named does not exist: a topic or a partition.
    pub fn is_not_found(&self) -> bool {
        matches!(self.code(), ErrorCode::UnknownTopic | ErrorCode::UnknownPartition)
    }

    /// Who leads the partition, where the answering broker knew better.
    pub(crate) fn leader_hint(&self) -> Option<(i32, &str)> {
        self.0.detail.leader_hint.as_ref().map(|(broker, address)| (broker.get(), address.as_str()))
    }
}

/// What lies at the bottom of a chain of errors.
pub(crate) fn innermost<'a>(error: &'a (dyn std::error::Error + 'static)) -> &'a (dyn std::error::Error + 'static) {
    let mut reason = error;
    while let Some(source) = reason.source() {
        reason = source;
    }
    reason
}

impl From<flowstone_protocol::Error> for Error {
    fn from(detail: flowstone_protocol::Error) -> Self {
        Self(Arc::new(Inner { detail, unreachable: false, source: None }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.detail, f)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code(), self.0.detail)?;
        if let Some(source) = &self.0.source {
            write!(f, " (caused by: {source})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| &**source as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    fn server() -> ServerAddress {
        ServerAddress::parse("h:1").unwrap()
    }

    #[test]
    fn the_reason_is_the_innermost() {
        let refused = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "refused by a test");
        let outer = std::io::Error::other(Error::new(ErrorCode::Internal, "vague").caused_by(refused));
        let error = Error::from_status(&server(), tonic::Status::from_error(Box::new(outer)));
        assert!(error.is_unreachable() && error.to_string().contains("refused by a test"), "{error}");
    }

    #[test]
    fn a_status_keeps_the_brokers_words_and_its_kind() {
        let told = flowstone_protocol::Error::new(ErrorCode::UnknownTopic, "there is no such topic; create it")
            .with_topic("t");
        let error = Error::from_status(&server(), told.to_status());
        assert_eq!((error.code(), error.kind(), error.topic()), (ErrorCode::UnknownTopic, ErrorKind::Fatal, Some("t")));
        assert!(error.is_not_found() && !error.is_unreachable());
        assert!(error.source().is_none());
    }

    #[test]
    fn a_broken_connection_is_retriable_and_names_its_cause() {
        let error = Error::from_status(&server(), tonic::Status::unavailable("tcp connect error"));
        assert!(error.is_retriable() && error.is_unreachable());
        assert!(error.to_string().contains("h:1"), "{error}");
        assert!(error.source().is_some_and(|source| source.to_string().contains("tcp connect error")));
    }

    #[test]
    fn adding_a_place_leaves_other_holders_alone() {
        let shared = Error::new(ErrorCode::TimedOut, "late");
        let placed = shared.clone().at("t", 3);
        assert_eq!((shared.topic(), placed.topic(), placed.partition()), (None, Some("t"), Some(3)));
    }
}
