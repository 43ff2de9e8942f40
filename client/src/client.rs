//! The way in: one [`Client`] per cluster, from which producers, consumers and administration are made.

use std::sync::Arc;
use std::time::Duration;

use crate::address::ServerAddress;
use crate::admin::Admin;
use crate::cluster::Cluster;
use crate::connection::ConnectionSettings;
use crate::consumer::ConsumerBuilder;
use crate::error::{Error, ErrorCode, Result};
use crate::group::GroupBuilder;
use crate::producer::ProducerBuilder;

/// A cluster that was reached. Cheap to clone; the last clone, producer, consumer or [`Admin`] that goes ends its
/// connections.
///
/// ```no_run
/// # async fn run() -> flowstone_client::Result<()> {
/// use flowstone_client::Client;
/// let client = Client::builder("localhost:7070").client_id("billing").connect().await?;
/// println!("cluster {}", client.cluster_id());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    cluster: Arc<Cluster>,
    client_id: Arc<str>,
}

/// How to connect; made by [`Client::builder`].
#[derive(Clone, Debug)]
#[must_use = "nothing is connected before connect()"]
pub struct ClientBuilder {
    servers: String,
    client_id: String,
    connect_timeout: Duration,
    request_timeout: Duration,
    keep_alive_timeout: Duration,
    message_bytes_max: usize,
}

impl Client {
    /// Starts from these servers: `HOST:PORT`, several separated by commas, IPv6 hosts in brackets. One that answers
    /// is enough; it names the others.
    pub fn builder(servers: impl Into<String>) -> ClientBuilder {
        ClientBuilder {
            servers: servers.into(),
            client_id: String::new(),
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(10),
            message_bytes_max: 128 << 20,
        }
    }

    /// [`Client::builder`] with nothing set.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`].
    pub async fn connect(servers: impl Into<String>) -> Result<Self> {
        Self::builder(servers).connect().await
    }

    /// Topics, offsets and the cluster itself: to create, list, describe, change, delete.
    pub fn admin(&self) -> Admin {
        Admin::new(self.cluster.clone())
    }

    /// A producer to be set up.
    pub fn producer(&self) -> ProducerBuilder {
        ProducerBuilder::new(self.cluster.clone())
    }

    /// A consumer to be set up.
    pub fn consumer(&self) -> ConsumerBuilder {
        ConsumerBuilder::new(self.cluster.clone())
    }

    /// A member of this group, to be set up.
    pub fn group(&self, group: impl Into<String>) -> GroupBuilder {
        GroupBuilder::new(self.cluster.clone(), group.into(), self.client_id.to_string())
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> String {
        self.cluster.snapshot().cluster_id.clone()
    }

    /// Number of partitions of a topic.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC`; `TIMED_OUT` where no broker answers.
    pub async fn partition_count(&self, topic: &str) -> Result<i32> {
        Ok(self.cluster.topic(topic).await?.partition_count())
    }
}

impl ClientBuilder {
    /// A name for this program, seen in the brokers' logs and metrics: printable ASCII.
    pub fn client_id(mut self, client_id: impl Into<String>) -> Self {
        self.client_id = client_id.into();
        self
    }

    /// How long one attempt to connect may take; 5 s unless set.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long a call may take in all, retries included: [`connect`](Self::connect), administration, offsets; 10 s
    /// unless set. Records have [`ProducerBuilder::delivery_timeout`] instead.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// How long a connection may leave a ping unanswered before it is given up; 10 s unless set.
    pub fn keep_alive_timeout(mut self, timeout: Duration) -> Self {
        self.keep_alive_timeout = timeout;
        self
    }

    /// Largest message taken from a broker, in bytes; 128 MiB unless set. It must exceed the largest batch stored.
    pub fn message_bytes_max(mut self, bytes: usize) -> Self {
        self.message_bytes_max = bytes;
        self
    }

    /// Connects, and learns the cluster's metadata.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for an address that is not `HOST:PORT` or a setting that makes no sense; `TIMED_OUT` where no
    /// server answers within the request timeout ([`Error::is_unreachable`]); what the server says, where it refuses.
    pub async fn connect(self) -> Result<Client> {
        let bootstrap = ServerAddress::parse_list(&self.servers)?;
        for (name, timeout) in [
            ("connect", self.connect_timeout),
            ("request", self.request_timeout),
            ("keep-alive", self.keep_alive_timeout),
        ] {
            if timeout.is_zero() {
                return Err(invalid(format!("the {name} timeout must be longer than zero")));
            }
        }
        let settings = ConnectionSettings {
            user_agent: user_agent(&self.client_id)?,
            connect_timeout: self.connect_timeout,
            keep_alive_timeout: self.keep_alive_timeout,
            message_bytes_max: self.message_bytes_max,
        };
        let cluster = Cluster::connect(bootstrap, settings, self.request_timeout).await?;
        Ok(Client { cluster, client_id: self.client_id.into() })
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorCode::InvalidRequest, message)
}

fn user_agent(client_id: &str) -> Result<String> {
    const PROGRAM: &str = concat!("flowstone-client/", env!("CARGO_PKG_VERSION"));
    if client_id.is_empty() {
        return Ok(PROGRAM.to_owned());
    }
    if client_id.len() > 256 || !client_id.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Err(invalid("a client id is up to 256 printable ASCII characters".to_owned()));
    }
    Ok(format!("{PROGRAM} ({client_id})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_id_must_fit_a_header() {
        assert!(user_agent("").unwrap().starts_with("flowstone-client/"));
        assert!(user_agent("billing").unwrap().ends_with(" (billing)"));
        for bad in ["two\nlines", "ä", &"x".repeat(257)] {
            assert_eq!(user_agent(bad).unwrap_err().code(), ErrorCode::InvalidRequest);
        }
    }
}
