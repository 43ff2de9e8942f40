//! `flowstone broker`: the daemon; and what it shares with `dev`: starting, signals, stopping.

use crate::args::VERSION;
use crate::failure::{Exit, Failure, Outcome, chain};
use clap::Args;
use flowstone_broker::{Broker, Config, RunningBroker, StartError, telemetry};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How long a stopping broker may take to answer what it has accepted and to flush. Service managers kill
/// after 10 s at the earliest.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(9);

/// Run a broker as a daemon
#[derive(Args, Debug)]
pub(crate) struct BrokerArgs {
    /// Its configuration, in TOML; `flowstone config explain` lists the keys
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// A key of the configuration, above file and environment
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub(crate) async fn run(args: BrokerArgs) -> Outcome {
    // Before the first file is touched, so that an early signal stops it in order too.
    let signals = StopSignals::new()?;
    let config = load(Some(&args.config), &args.set)?;
    init_log(&config)?;
    let broker = Broker::start(config).await.map_err(start_failure)?;
    tracing::info!(
        version = VERSION,
        broker = %broker.broker_id,
        cluster = %broker.cluster_id,
        client = %broker.client_addr,
        admin = %broker.admin_addr,
        pid = std::process::id(),
        "ready"
    );
    serve(broker, signals).await
}

/// The configuration from file, environment and `--set`.
pub(crate) fn load(file: Option<&Path>, set: &[String]) -> Outcome<Config> {
    // A variable that is no text is not one of ours.
    let env =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    Config::load(file, env, set).map_err(|error| Failure::usage(chain(&error)))
}

/// Sends the broker's messages to stderr, as the configuration says.
pub(crate) fn init_log(config: &Config) -> Outcome {
    telemetry::init(&config.log).map(drop).map_err(|error| Failure::usage(chain(&error)))
}

/// A failed start, with its exit code.
pub(crate) fn start_failure(error: StartError) -> Failure {
    let exit = if matches!(error, StartError::Config(_)) { Exit::Usage } else { Exit::Failed };
    Failure::new(exit, chain(&error))
}

/// SIGTERM and SIGINT, heard from the moment this is made.
#[derive(Debug)]
pub(crate) struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    pub(crate) fn new() -> Outcome<Self> {
        let listen =
            |kind| signal(kind).map_err(|error| Failure::failed(format!("cannot listen for signals: {error}")));
        Ok(StopSignals { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// The next of them.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Serves until a signal asks to stop, then drains; a second signal stops at once.
pub(crate) async fn serve(broker: RunningBroker, mut signals: StopSignals) -> Outcome {
    tokio::select! {
        ended = broker.wait() => return Err(Failure::failed(format!("the broker stopped: {ended}"))),
        () = signals.next() => {}
    }
    tracing::info!("stopping");
    tokio::select! {
        report = broker.shutdown(SHUTDOWN_DEADLINE) => {
            tracing::info!(drained = report.drained, took = ?report.took, "stopped");
            Ok(())
        }
        () = signals.next() => Err(Failure::failed("stopped at once, without draining, by a second signal")),
    }
}
