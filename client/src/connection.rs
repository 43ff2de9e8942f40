//! Connections to brokers: how each is set up, and which are shared.
//!
//! Control calls (metadata, offsets, administration) share one lazy connection per broker. Every producer and consumer
//! has connections of its own for its streams: a consumer that stops reading fills the flow-control window of its
//! connection, and must not hold up the acknowledgements of a producer beside it.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use flowstone_protocol::pb::admin_client::AdminClient;
use flowstone_protocol::pb::log_client::LogClient;
use tonic::transport::{Channel, Endpoint};

use crate::address::ServerAddress;
use crate::error::{Error, ErrorCode, Result, innermost};

/// Bytes that a broker may have under way to us on one stream or connection. Far above the product of bandwidth and
/// delay of a local network, so that HTTP/2's windows are never what limits a fetch; a consumer's credit is.
const WINDOW_BYTES: u32 = 64 << 20;

/// A consumer's credit must fit into the window, or the window would bound the prefetch instead.
pub(crate) const CREDIT_BYTES_MAX: usize = WINDOW_BYTES as usize / 2;

/// Largest payload of one HTTP/2 frame to us: with the default, 16 KiB, a MiB of records costs 64 frames.
const FRAME_BYTES: u32 = 1 << 20;

/// Silence after which a control connection is asked whether it is still there, and how long the answer may take: the
/// metadata comes over it, and with it who leads when a broker hangs.
const CONTROL_PING_AFTER: Duration = Duration::from_secs(2);
const CONTROL_PONG_MAX: Duration = Duration::from_secs(3);

/// For how long a broker that did not answer is asked after all others.
const TROUBLE_REMEMBERED: Duration = Duration::from_secs(10);

/// How connections are made.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionSettings {
    /// Already checked to be fit for a header.
    pub(crate) user_agent: String,
    pub(crate) connect_timeout: Duration,
    /// A connection without an answer to a ping for this long is taken for dead.
    pub(crate) keep_alive_timeout: Duration,
    /// Largest message taken from a broker.
    pub(crate) message_bytes_max: usize,
}

impl ConnectionSettings {
    fn endpoint(&self, address: &ServerAddress) -> Result<Endpoint> {
        let invalid = |error: tonic::transport::Error| {
            Error::new(ErrorCode::InvalidRequest, format!("{address} is no server address; write HOST:PORT"))
                .caused_by(error)
        };
        Ok(Endpoint::from_shared(address.uri())
            .and_then(|endpoint| endpoint.user_agent(self.user_agent.clone()))
            .map_err(invalid)?
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .http2_keep_alive_interval(self.keep_alive_timeout)
            .keep_alive_timeout(self.keep_alive_timeout)
            .keep_alive_while_idle(true))
    }

    /// A connection of its own, established when this returns.
    pub(crate) async fn connect(&self, address: &ServerAddress) -> Result<Channel> {
        self.endpoint(address)?.connect().await.map_err(|error| refused(address, error))
    }

    pub(crate) fn log_client(&self, channel: Channel) -> LogClient<Channel> {
        // What we send is bounded by the batch size; the broker judges it, so that its own words come back.
        LogClient::new(channel).max_decoding_message_size(self.message_bytes_max).max_encoding_message_size(usize::MAX)
    }
}

fn refused(address: &ServerAddress, error: tonic::transport::Error) -> Error {
    let reason = innermost(&error);
    Error::unreachable(format!("cannot reach the broker at {address}: {reason}; is it running?")).caused_by(error)
}

/// The shared connections for control calls, one per address, opened at first use and again after each failure.
#[derive(Debug)]
pub(crate) struct ControlConnections {
    settings: ConnectionSettings,
    // Guards the map alone; never held across an await.
    channels: Mutex<HashMap<ServerAddress, Channel>>,
    /// When each that did not answer was last asked. Guards the map alone; never held across an await.
    troubles: Mutex<HashMap<ServerAddress, Instant>>,
}

impl ControlConnections {
    pub(crate) fn new(settings: ConnectionSettings) -> Self {
        Self { settings, channels: Mutex::default(), troubles: Mutex::default() }
    }

    /// It answered: it is as good as any.
    pub(crate) fn answered(&self, address: &ServerAddress) {
        crate::locked(&self.troubles).remove(address);
    }

    /// It did not answer.
    pub(crate) fn failed(&self, address: &ServerAddress) {
        crate::locked(&self.troubles).insert(address.clone(), Instant::now());
    }

    /// Puts those last that did not answer lately, the latest at the very end; the others keep their order.
    pub(crate) fn best_first(&self, list: &mut [ServerAddress]) {
        let mut troubles = crate::locked(&self.troubles);
        let now = Instant::now();
        troubles.retain(|_, since| now.saturating_duration_since(*since) < TROUBLE_REMEMBERED);
        list.sort_by_key(|address| troubles.get(address).copied());
    }

    pub(crate) fn settings(&self) -> &ConnectionSettings {
        &self.settings
    }

    pub(crate) fn channel(&self, address: &ServerAddress) -> Result<Channel> {
        let mut channels = crate::locked(&self.channels);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let pong_max = CONTROL_PONG_MAX.min(self.settings.keep_alive_timeout);
        let endpoint = self.settings.endpoint(address)?.keep_alive_timeout(pong_max);
        let channel =
            endpoint.http2_keep_alive_interval(CONTROL_PING_AFTER.min(self.settings.keep_alive_timeout)).connect_lazy();
        channels.insert(address.clone(), channel.clone());
        Ok(channel)
    }

    pub(crate) fn log(&self, address: &ServerAddress) -> Result<LogClient<Channel>> {
        Ok(self.settings.log_client(self.channel(address)?))
    }

    pub(crate) fn admin(&self, address: &ServerAddress) -> Result<AdminClient<Channel>> {
        Ok(AdminClient::new(self.channel(address)?).max_decoding_message_size(self.settings.message_bytes_max))
    }
}
