//! `flowstone completion SHELL`.

use crate::args::Cli;
use crate::failure::{Failure, Outcome};
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::io::{self, Write};

/// Print a completion script for a shell
#[derive(Args, Debug)]
pub(crate) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(args: &CompletionArgs) -> Outcome {
    // Into memory first: the generator panics where stdout is closed.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "flowstone", &mut script);
    let mut out = io::stdout().lock();
    out.write_all(&script).and_then(|()| out.flush()).map_err(Failure::from_stdout)
}
