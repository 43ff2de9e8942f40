//! How a command ends: its exit code, and the message that a person can act on.

use crate::stdio::say;
use flowstone_client::ErrorCode;
use std::fmt;
use std::io;
use std::process::ExitCode;

/// Exit codes are stable: scripts branch on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The request was understood and did not succeed: name taken, offset out of range, port in use.
    Failed = 1,
    /// The command line or a configuration is wrong; the same call never succeeds.
    Usage = 2,
    /// A topic, partition, group or transactional id that does not exist.
    NotFound = 3,
    /// No broker answered within `--timeout`.
    Unreachable = 4,
    /// The cluster refuses this caller.
    Denied = 5,
}

/// Why a command stopped before its end.
#[derive(Debug)]
pub(crate) enum Failure {
    /// To be printed to stderr, with the exit code that goes with it.
    Error {
        /// Exit code.
        exit: Exit,
        /// For people; ends with what to do.
        message: String,
    },
    /// Whoever read our output has gone (`flowstone ... | head`): nothing is wrong, nothing is said, exit 0.
    OutputClosed,
}

/// What every command returns.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A failure with its exit code.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Failure::Error { exit, message: message.into() }
    }

    /// Exit 1.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Failure::new(Exit::Failed, message)
    }

    /// Exit 2.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Failure::new(Exit::Usage, message)
    }

    /// An error while writing to stdout: a reader that has gone is no failure.
    pub(crate) fn from_stdout(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Failure::OutputClosed
        } else {
            Failure::failed(format!("cannot write to stdout: {error}"))
        }
    }

    /// Puts what was attempted before the message.
    pub(crate) fn context(self, attempt: impl fmt::Display) -> Self {
        match self {
            Failure::Error { exit, message } => Failure::Error { exit, message: format!("{attempt}: {message}") },
            Failure::OutputClosed => Failure::OutputClosed,
        }
    }

    /// Prints the message to stderr, if there is one, and gives the process's exit code.
    pub(crate) fn report(&self) -> ExitCode {
        match self {
            Failure::Error { exit, message } => {
                say(format_args!("error: {message}"));
                ExitCode::from(*exit as u8)
            }
            Failure::OutputClosed => ExitCode::SUCCESS,
        }
    }
}

impl From<flowstone_client::Error> for Failure {
    fn from(error: flowstone_client::Error) -> Self {
        Failure::new(exit_of(&error), chain(&error))
    }
}

/// The exit code of what the client says.
pub(crate) fn exit_of(error: &flowstone_client::Error) -> Exit {
    if error.is_unreachable() {
        return Exit::Unreachable;
    }
    match error.code() {
        ErrorCode::TimedOut
        | ErrorCode::NotLeader
        | ErrorCode::LeaderNotReady
        | ErrorCode::NoLeader
        | ErrorCode::NotCoordinator => Exit::Unreachable,
        ErrorCode::UnknownTopic
        | ErrorCode::UnknownPartition
        | ErrorCode::UnknownGroup
        | ErrorCode::UnknownTransaction => Exit::NotFound,
        ErrorCode::PermissionDenied | ErrorCode::InternalTopic => Exit::Denied,
        ErrorCode::InvalidTopicName
        | ErrorCode::InvalidPartitions
        | ErrorCode::InvalidReplicationFactor
        | ErrorCode::InvalidConfig
        | ErrorCode::InvalidGroup
        | ErrorCode::InvalidPattern
        | ErrorCode::InvalidTransactionalId
        | ErrorCode::InvalidTransactionTimeout => Exit::Usage,
        _ => Exit::Failed,
    }
}

/// The message of an error with that of its root cause. What lies between them says the same in other words.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let text = error.to_string();
    let mut root = error.source();
    while let Some(deeper) = root.and_then(std::error::Error::source) {
        root = Some(deeper);
    }
    match root.map(ToString::to_string) {
        Some(cause) if !text.contains(&cause) => format!("{text} ({cause})"),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Nested(&'static str, Option<Box<Nested>>);
    impl fmt::Display for Nested {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }
    impl std::error::Error for Nested {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            self.1.as_deref().map(|nested| nested as _)
        }
    }

    #[test]
    fn a_chain_ends_with_its_root_said_once() {
        let error = Nested(
            "cannot connect: refused",
            Some(Box::new(Nested("refused", Some(Box::new(Nested("os error 111", None)))))),
        );
        assert_eq!(chain(&error), "cannot connect: refused (os error 111)");
        assert_eq!(
            chain(&Nested("refused: os error 111", Some(Box::new(Nested("os error 111", None))))),
            "refused: os error 111"
        );
    }

    #[test]
    fn a_reader_that_has_gone_is_no_failure() {
        assert!(matches!(Failure::from_stdout(io::ErrorKind::BrokenPipe.into()), Failure::OutputClosed));
        assert!(matches!(
            Failure::from_stdout(io::ErrorKind::StorageFull.into()),
            Failure::Error { exit: Exit::Failed, .. }
        ));
    }
}
