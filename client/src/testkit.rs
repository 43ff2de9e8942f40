//! An in-process broker for tests of programs that use this client (feature `testkit`).
//!
//! ```
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flowstone_client::{NewTopic, Record, testkit::TestBroker};
//!
//! let broker = TestBroker::start().await?;
//! let client = broker.client().await?;
//! client.admin().create_topic(NewTopic::new("orders").partitions(2)).await?;
//! let producer = client.producer().build().await?;
//! let at = producer.send(Record::to("orders").key("17").value("2 apples")).await?.await?;
//! assert_eq!(at.offset >= 0, true);
//! # broker.stop().await;
//! # Ok(())
//! # }
//! ```

use std::path::Path;
use std::time::Duration;

use flowstone_broker::{Broker, Config, RunningBroker};
use tempfile::TempDir;

use crate::client::Client;
use crate::error::{Error, ErrorCode, Result};

/// Time that open calls are given when the broker stops.
const STOP_MAX: Duration = Duration::from_secs(1);

/// One broker on loopback, on ports that the system chose, with its data in a temporary folder. Dropped, it stops at once
/// and its data is removed.
#[derive(Debug)]
pub struct TestBroker {
    /// `None` only between a stop and a start.
    running: Option<RunningBroker>,
    /// Behind the broker: it is removed last.
    dir: TempDir,
    settings: Vec<(String, String)>,
    address: String,
}

impl TestBroker {
    /// Starts a broker with its default config.
    ///
    /// # Errors
    /// Why the broker did not start.
    pub async fn start() -> Result<Self> {
        Self::with_config(&[]).await
    }

    /// Starts a broker with these config keys set, such as `("topic.max.message.bytes", "2 MiB")`.
    ///
    /// # Errors
    /// Why the broker did not start: a key that is not known, for example.
    pub async fn with_config(settings: &[(&str, &str)]) -> Result<Self> {
        let dir = tempfile::tempdir().map_err(|error| {
            Error::new(ErrorCode::StorageFailed, format!("no temporary folder can be made: {error}")).caused_by(error)
        })?;
        let settings: Vec<(String, String)> =
            settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let running = launch(dir.path(), 0, &settings).await?;
        let address = running.client_addr.to_string();
        Ok(Self { running: Some(running), dir, settings, address })
    }

    /// `HOST:PORT` of its client listener.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A client of it.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`](crate::ClientBuilder::connect).
    pub async fn client(&self) -> Result<Client> {
        Client::connect(self.address()).await
    }

    /// Stops it and starts it again on the same data and port.
    ///
    /// # Errors
    /// Why the broker did not start.
    pub async fn restart(&mut self) -> Result<()> {
        self.halt().await;
        let port = self.address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or_default();
        self.running = Some(launch(self.dir.path(), port, &self.settings).await?);
        Ok(())
    }

    /// Stops it in good order, and removes its data.
    pub async fn stop(mut self) {
        self.halt().await;
    }

    async fn halt(&mut self) {
        if let Some(running) = self.running.take() {
            running.shutdown(STOP_MAX).await;
        }
    }
}

async fn launch(dir: &Path, port: u16, settings: &[(String, String)]) -> Result<RunningBroker> {
    let failed = |why: String| Error::new(ErrorCode::Internal, format!("the test broker did not start: {why}"));
    let mut config = Config::dev(dir, port);
    if port != 0 {
        // The client's port must be the old one; for the others any will do.
        config.listen.peer = "127.0.0.1:0".into();
        config.listen.admin = "127.0.0.1:0".into();
    }
    for (key, value) in settings {
        config.set_key(key, value).map_err(|error| failed(error.to_string()))?;
    }
    Broker::start(config).await.map_err(|error| failed(error.to_string()))
}
