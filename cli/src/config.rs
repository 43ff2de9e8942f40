//! `flowstone config`: what a broker would run with, without starting one.

use crate::args::Common;
use crate::broker::load;
use crate::failure::Outcome;
use crate::output::{self, Format, List, Row};
use crate::stdio::say;
use clap::{Args, Subcommand};
use serde::Serialize;
use std::path::PathBuf;

/// Check or explain a broker's configuration
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Say whether a broker would take it; exit 2 and the reason if not
    Check(Source),
    /// Every key with its value and where that came from
    Explain(Source),
}

#[derive(Args, Debug)]
pub(crate) struct Source {
    /// A configuration file, in TOML; without one, defaults and environment alone
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// The same
    #[arg(value_name = "FILE", conflicts_with = "config")]
    file: Option<PathBuf>,

    /// A key of the configuration, above file and environment
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Serialize)]
struct Explained {
    key: String,
    value: String,
    /// `default`, `file PATH`, `env NAME` or `--set`.
    origin: String,
}

impl Row for Explained {
    const HEADINGS: &'static [&'static str] = &["KEY", "VALUE", "FROM"];
    const NARROW: usize = 3;

    fn cells(&self) -> Vec<String> {
        let value = if self.value.is_empty() { "\"\"" } else { &self.value };
        vec![self.key.clone(), value.to_owned(), self.origin.clone()]
    }

    fn name(&self) -> String {
        self.key.clone()
    }
}

pub(crate) fn run(command: &ConfigCommand, common: &Common) -> Outcome {
    let (ConfigCommand::Check(source) | ConfigCommand::Explain(source)) = command;
    let config = load(source.config.as_deref().or(source.file.as_deref()), &source.set)?;
    let explained: Vec<_> = config
        .explain()
        .into_iter()
        .map(|row| Explained { key: row.key, value: row.value, origin: row.origin.to_string() })
        .collect();
    match command {
        ConfigCommand::Explain(_) => output::print(common.output, &List(explained)),
        ConfigCommand::Check(_) if common.output == Format::Table => {
            let set = explained.iter().filter(|row| row.origin != "default").count();
            say(format_args!("the configuration is valid: {set} of {} keys are set", explained.len()));
            Ok(())
        }
        ConfigCommand::Check(_) => {
            let set: Vec<_> = explained.into_iter().filter(|row| row.origin != "default").collect();
            output::print(common.output, &List(set))
        }
    }
}
