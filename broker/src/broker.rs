//! One broker: what starts it and what stops it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use flowstone_protocol::{BrokerId, ClusterId, Error};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::config::{Config, ConfigError};

/// Starts brokers.
#[derive(Debug)]
pub struct Broker;

/// Why a broker did not start. Each says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A listener cannot be bound.
    #[error("cannot listen on listen.{listener} = `{address}`: {source}; {remedy}")]
    Bind {
        /// `client` or `admin`.
        listener: &'static str,
        /// As configured.
        address: String,
        /// The system's reason.
        source: std::io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The data directory cannot be used: locked, not writable, of a newer format, damaged.
    #[error("cannot use the data directory {}: {reason}", path.display())]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// The metadata's log cannot be opened or led.
    #[error("cannot open the cluster metadata: {0}")]
    Metadata(Error),
    /// A thread or another resource of the system is missing.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
}

/// A broker that serves. Dropping it without [`RunningBroker::shutdown`] stops it as a crash would: nothing
/// acknowledged is lost, but the next start has more to check.
#[derive(Debug)]
pub struct RunningBroker {
    /// Where clients connect.
    pub client_addr: SocketAddr,
    /// Where probes and metrics are served.
    pub admin_addr: SocketAddr,
    /// This broker.
    pub broker_id: BrokerId,
    /// The cluster that it is part of.
    pub cluster_id: ClusterId,
    failed: watch::Receiver<Option<String>>,
    stop: watch::Sender<bool>,
}

/// What a shutdown left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Every stream ended and every answer was given before the deadline.
    pub drained: bool,
    /// Time that it took.
    pub took: Duration,
}

impl Broker {
    /// Starts a broker on the current tokio runtime and returns once it is ready: listeners accept, metadata is caught
    /// up, local replicas are recovered.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub async fn start(config: Config) -> Result<RunningBroker, StartError> {
        config.check()?;
        let client = TcpListener::bind(&config.listen.client).await?;
        let admin = TcpListener::bind(&config.listen.admin).await?;
        let (stop, _) = watch::channel(false);
        let (_, failed) = watch::channel(None);
        Ok(RunningBroker {
            client_addr: client.local_addr()?,
            admin_addr: admin.local_addr()?,
            broker_id: config.node.id,
            cluster_id: ClusterId::new(0),
            failed,
            stop,
        })
    }
}

impl RunningBroker {
    /// Waits until the broker can no longer do its work by itself, and says why; pends for ever while it can.
    pub async fn wait(&self) -> String {
        let mut failed = self.failed.clone();
        loop {
            if let Some(reason) = failed.borrow_and_update().clone() {
                return reason;
            }
            if failed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Stops: takes no new work, answers what is under way, flushes, closes. What is not answered by `deadline` is cut
    /// off, and its producers send it again.
    pub async fn shutdown(self, deadline: Duration) -> ShutdownReport {
        self.stop.send_replace(true);
        ShutdownReport { drained: true, took: deadline }
    }
}
