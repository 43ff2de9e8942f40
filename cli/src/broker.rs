//! `flowstone broker`: the daemon; and what it shares with `dev`: starting, signals, stopping.

use crate::args::VERSION;
use crate::failure::{Exit, Failure, Outcome, chain};
use crate::probe;
use clap::Args;
use flowstone_broker::{Broker, Config, RunningBroker, StartError, telemetry};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How long a stopping broker may take to answer what it has accepted and to flush. Service managers kill
/// after 10 s at the earliest.
pub(crate) const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(9);

/// Run a broker as a daemon
#[derive(Args, Debug)]
pub(crate) struct BrokerArgs {
    /// Its configuration, in TOML; `flowstone config explain` lists the keys
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// A key of the configuration, above file and environment
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Start nothing: ask the broker that runs with this configuration whether it is ready; exit 0 only if it is
    #[arg(long)]
    check_health: bool,

    /// End when the process that started this one, with this id, does
    #[arg(long, hide = true, value_name = "PROCESS")]
    end_with_parent: Option<i32>,
}

/// How long a broker may take to say whether it is ready.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) async fn run(args: BrokerArgs) -> Outcome {
    if args.check_health {
        return check_health(&load(Some(&args.config), &args.set)?).await;
    }
    if let Some(parent) = args.end_with_parent {
        end_with_parent(parent)?;
    }
    // Before the first file is touched, so that an early signal stops it in order too.
    let mut signals = StopSignals::new()?;
    let config = load(Some(&args.config), &args.set)?;
    init_log(&config)?;
    // A broker that waits for the others of its cluster is stopped like any other.
    let broker = tokio::select! {
        started = Broker::start(config) => started.map_err(start_failure)?,
        () = signals.next() => {
            tracing::info!("stopped before it was ready");
            return Ok(());
        }
    };
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

/// Whether the broker with this configuration is ready, for whoever watches over it.
async fn check_health(config: &Config) -> Outcome {
    let admin = &config.listen.admin;
    match probe::readiness(admin, HEALTH_TIMEOUT).await {
        Ok(readiness) if readiness.ready => Ok(()),
        Ok(readiness) => Err(Failure::failed(format!("not ready: {}", readiness.reasons))),
        Err(error) => {
            Err(Failure::new(Exit::Unreachable, format!("cannot ask {admin}: {error}; is the broker running?")))
        }
    }
}

/// Has the system kill this process when its parent ends, however that ends.
fn end_with_parent(parent: i32) -> Outcome {
    let kill = Some(rustix::process::Signal::KILL);
    rustix::process::set_parent_process_death_signal(kill)
        .map_err(|error| Failure::failed(format!("cannot ask to end with the parent process: {error}")))?;
    // It may have ended before the system was asked.
    if rustix::process::getppid() != rustix::process::Pid::from_raw(parent) {
        return Err(Failure::failed("the process that started this broker has ended"));
    }
    Ok(())
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

    /// After the first: one that was meant as another.
    pub(crate) async fn again(&mut self) {
        let apart = tokio::time::sleep(SIGNALS_APART);
        let mut apart = std::pin::pin!(apart);
        loop {
            tokio::select! {
                () = &mut apart => break,
                () = self.next() => {}
            }
        }
        self.next().await;
    }
}

/// Within this time of the first signal a second one is the same request, told twice: `timeout` and some shells signal the
/// process and then its group.
const SIGNALS_APART: Duration = Duration::from_millis(300);

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
        () = signals.again() => Err(Failure::failed("stopped at once, without draining, by a second signal")),
    }
}
