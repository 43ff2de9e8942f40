//! The broker's own messages: text for people on a terminal, JSON for machines otherwise; levels can be changed while it
//! runs.

use std::io::IsTerminal;

use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::{LogConfig, LogFormat};

/// Changes the level of a program's messages.
#[derive(Clone, Debug)]
pub struct LogLevel {
    filter: reload::Handle<EnvFilter, Registry>,
}

/// Why messages cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The filter is malformed.
    #[error(
        "log.level = `{level}`: {source}; write a level as in `info`, or per module as in `info,flowstone_broker=debug`"
    )]
    Level {
        /// As configured.
        level: String,
        /// What is wrong.
        source: ParseError,
    },
    /// The program has set up its messages already.
    #[error("the program's messages are set up already")]
    Twice,
}

impl LogLevel {
    /// Sets other directives, as in `info,flowstone_broker=debug`.
    ///
    /// # Errors
    /// When they are malformed; the old ones then stay.
    pub fn set(&self, level: &str) -> Result<(), TelemetryError> {
        let filter = parse(level)?;
        // Fails only when the subscriber is gone, and then there is nothing to change.
        self.filter.reload(filter).map_err(|_| TelemetryError::Twice)
    }
}

/// Sets up the program's messages on stderr. Once per process, by its binary.
///
/// # Errors
/// A malformed level, or a second call.
pub fn init(config: &LogConfig) -> Result<LogLevel, TelemetryError> {
    let (filter, handle) = reload::Layer::new(parse(&config.level)?);
    let text = match config.format {
        LogFormat::Text => true,
        LogFormat::Json => false,
        LogFormat::Auto => std::io::stderr().is_terminal(),
    };
    let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let lines = if text {
        fmt::layer().with_writer(std::io::stderr).with_ansi(ansi).with_target(false).boxed()
    } else {
        fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed()
    };
    Registry::default().with(filter).with(lines).try_init().map_err(|_| TelemetryError::Twice)?;
    Ok(LogLevel { filter: handle })
}

fn parse(level: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::builder().parse(level).map_err(|source| TelemetryError::Level { level: level.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_level_is_told() {
        assert!(parse("info,flowstone_broker=debug").is_ok());
        let error = parse("info,=x=y").expect_err("malformed").to_string();
        assert!(error.contains("log.level"), "{error}");
    }
}
