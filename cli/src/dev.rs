//! `flowstone dev`: a broker in a minute, or several, for trying things out.

mod cluster;

use crate::args::VERSION;
use crate::broker::{StopSignals, init_log, serve, start_failure};
use crate::failure::{Failure, Outcome};
use clap::Args;
use flowstone_broker::{Broker, Config, StartError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Run a broker for development, or a cluster of some, with nothing to set up; Ctrl-C stops it
#[derive(Args, Debug)]
pub(crate) struct DevArgs {
    /// How many brokers; several are processes of their own, a real cluster
    #[arg(short = 'n', long = "brokers", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=99))]
    brokers: u16,

    /// Where to keep the data; without it they go to a temporary folder that is removed at the end
    #[arg(long, value_name = "DIR", env = "FLOWSTONE_DEV_DATA_DIR")]
    data_dir: Option<PathBuf>,

    /// Port for clients; the next two are taken for peers and for admin HTTP, those of the next broker lie 100 higher. 0
    /// takes any free ones
    #[arg(long, value_name = "PORT", env = "FLOWSTONE_DEV_PORT", default_value_t = 7070,
          value_parser = clap::value_parser!(u16).range(..=65533))]
    port: u16,

    /// What the broker says on stderr: error, warn, info, debug, trace, or per module
    #[arg(long, value_name = "LEVEL", env = "FLOWSTONE_DEV_LOG", default_value = "warn")]
    log: String,
}

pub(crate) async fn run(args: DevArgs) -> Outcome {
    let began = Instant::now();
    // Installed before the first file is made, so that an early Ctrl-C cleans up as well.
    let signals = StopSignals::new()?;
    let temporary;
    let data_dir = match &args.data_dir {
        Some(data_dir) => data_dir.clone(),
        None => {
            temporary = tempfile::Builder::new()
                .prefix("flowstone-dev-")
                .tempdir()
                .map_err(|error| Failure::failed(format!("cannot make a temporary folder: {error}; use --data-dir")))?;
            temporary.path().to_owned()
        }
    };
    if args.brokers > 1 {
        return cluster::run(&args, signals, &data_dir, args.data_dir.is_none(), began).await;
    }
    if data_dir.join("broker-1.toml").exists() {
        return Err(Failure::failed(format!(
            "{} holds the data of several brokers; say how many with -n, or choose another --data-dir",
            data_dir.display()
        )));
    }
    let mut config = Config::dev(&data_dir, args.port);
    config.log.level = args.log;
    init_log(&config)?;
    let broker = Broker::start(config).await.map_err(|error| match error {
        // The daemon's remedy names a key of a configuration that there is not.
        StartError::Bind { address, source, .. } => Failure::failed(format!(
            "cannot listen on {address}: {source}; choose other ports with --port, or stop what listens there"
        )),
        error => start_failure(error),
    })?;
    greet(&broker.client_addr.to_string(), &broker.admin_addr.to_string(), &data_dir, args.data_dir.is_none(), began);
    serve(broker, signals).await
}

/// Tells where it listens and what to try. A stdout that is closed is no reason to stop.
fn greet(client: &str, admin: &str, data_dir: &Path, temporary: bool, began: Instant) {
    let binary = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("flowstone"));
    let binary = shell_quoted(&binary.to_string_lossy());
    let server = if client == "127.0.0.1:7070" { String::new() } else { format!(" --server {client}") };
    let kept = if temporary { "removed at the end" } else { "kept" };
    let text = format!(
        "flowstone {VERSION} is ready after {ready} ms\n\
         \n  clients     {client}\
         \n  admin HTTP  http://{admin}\
         \n  data        {data} ({kept})\n\
         \nTry, in another terminal:\n\
         \n  {binary} topic create greetings{server}\
         \n  {binary} produce greetings /etc/hosts{server}\
         \n  {binary} consume greetings -e{server}\n\
         \nCtrl-C stops it.\n",
        ready = began.elapsed().as_millis(),
        data = data_dir.display(),
    );
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// As a shell takes it literally.
fn shell_quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_a_shell_would_cut_are_quoted() {
        assert_eq!(shell_quoted("/a/b-c_1.0"), "/a/b-c_1.0");
        assert_eq!(shell_quoted("/a b/it's"), "'/a b/it'\\''s'");
    }
}
