//! Why a harness cannot go on.

use std::fmt;

/// What went wrong and with what; ends with what to do, where there is something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure(String);

/// A result with [`Failure`].
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// With these words.
    pub fn new(message: impl Into<String>) -> Self {
        Failure(message.into())
    }

    /// For `map_err`: what was attempted, and what came of it.
    pub(crate) fn of<E: fmt::Display>(attempt: impl fmt::Display) -> impl FnOnce(E) -> Failure {
        move |error| Failure(format!("{attempt}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}
