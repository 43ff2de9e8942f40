//! Every maximum and deadline of the peer network.

use std::time::Duration;

use crate::config::LimitsConfig;

/// How a [`super::PeerNetwork`] behaves. [`PeerConfig::new`] gives what brokers run with.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// Limits of the peer listener: as the client listener's, but for the number of connections.
    pub limits: LimitsConfig,
    /// What may wait to be sent to one broker beside batches: votes, heartbeats and their answers.
    pub votes_queue: QueueLimits,
    /// What may wait to be sent to one broker of appends and their answers.
    pub appends_queue: QueueLimits,
    /// Largest message of a stream: one batch of the largest kind, alone.
    pub message_bytes_max: usize,
    /// Time in which a connection must come about.
    pub connect_timeout: Duration,
    /// Time in which a stream must have been accepted, or have said who opens it.
    pub hello_timeout: Duration,
    /// How often the other side is asked whether it is still there.
    pub keepalive_interval: Duration,
    /// Silence after which a connection is given up. TCP would try for minutes, ever more seldom, and go on late once the
    /// network is whole again.
    pub keepalive_timeout: Duration,
    /// First pause after a connection failed; it doubles from there.
    pub backoff_min: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
    /// Time that one pull may take, waiting for its turn not counted.
    pub pull_timeout: Duration,
    /// Pulls under way side by side.
    pub pulls_asked_max: usize,
    /// Pulls that may wait for their turn.
    pub pulls_waiting_max: usize,
}

/// The written maximum of a queue; one message larger than all of it passes alone.
#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// Messages.
    pub messages_max: usize,
    /// Bytes of them.
    pub bytes_max: usize,
}

/// Largest answer of a call: a checkpoint of the metadata of very many partitions, a range that is one of the largest
/// batches, reports of very many replicas.
pub(crate) const RESPONSE_BYTES_MAX: usize = 256 << 20;
/// Connections that other brokers may have open: four from each, two of them for streams.
const CONNECTIONS_MAX: usize = 4096;
/// Open calls of one of them.
const STREAMS_PER_CONNECTION: u32 = 64;
/// The largest batch there is: metadata of very many partitions; clients' are smaller.
const BATCH_BYTES_MAX: usize = 64 << 20;
/// Room in a message beside its batches.
const MESSAGE_OVERHEAD_BYTES: usize = 1 << 20;
const _: () = assert!(RESPONSE_BYTES_MAX > BATCH_BYTES_MAX + MESSAGE_OVERHEAD_BYTES);

/// A call between brokers, as a forwarded one of a client, with room around it.
const CALL_OVERHEAD_BYTES: usize = 4 << 10;

impl PeerConfig {
    /// What a broker with these limits uses.
    pub fn new(limits: &LimitsConfig) -> Self {
        let mut limits = limits.clone();
        let message_bytes_max = limits.request_bytes.max(BATCH_BYTES_MAX) + MESSAGE_OVERHEAD_BYTES;
        limits.connections = limits.connections.max(CONNECTIONS_MAX);
        limits.streams_per_connection = STREAMS_PER_CONNECTION;
        limits.admin_request_bytes += CALL_OVERHEAD_BYTES;
        limits.receiving_bytes = limits.receiving_bytes.max(2 * message_bytes_max);
        Self {
            limits,
            votes_queue: QueueLimits { messages_max: 1 << 16, bytes_max: 16 << 20 },
            appends_queue: QueueLimits { messages_max: 1 << 16, bytes_max: 64 << 20 },
            message_bytes_max,
            connect_timeout: Duration::from_secs(1),
            hello_timeout: Duration::from_secs(2),
            keepalive_interval: Duration::from_secs(1),
            keepalive_timeout: Duration::from_secs(3),
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_millis(500),
            pull_timeout: Duration::from_secs(30),
            pulls_asked_max: 8,
            pulls_waiting_max: 4096,
        }
    }
}
