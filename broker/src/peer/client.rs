//! Calls to other brokers, each with a deadline.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::peer as pb;
use flowstone_protocol::{BrokerId, Error, ErrorCode};
use parking_lot::Mutex;
use pb::peer_client::PeerClient as GrpcClient;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use super::config::RESPONSE_BYTES_MAX;
use super::network::Shared;

/// HTTP/2 windows for answers, as of ranges.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Calls other brokers. Cheap to clone. `caller` is filled in by the client: leave it empty in requests.
///
/// Every error says what to do. One of the called broker's own comes as it was made there; where it cannot be reached or
/// does not answer in time, the error is retriable.
#[derive(Clone, Debug)]
pub struct PeerClient {
    shared: Arc<Shared>,
}

/// The connections that calls go over, made when they are needed: ranges take one of their own, so that small calls do
/// not wait behind them.
#[derive(Debug, Default)]
pub(crate) struct Channels {
    /// With the address that each was made for. Held for a look or a change.
    open: Mutex<HashMap<(BrokerId, Lane), (String, Channel)>>,
}

impl Channels {
    /// Closes those to a broker, once what is under way on them has ended.
    pub(crate) fn forget(&self, broker: BrokerId) {
        self.open.lock().retain(|(to, _), _| *to != broker);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    Calls,
    Ranges,
}

macro_rules! call {
    ($(#[$doc:meta])* $name:ident, $request:ident, $response:ident) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// The answerer's own, or that it cannot be reached within `deadline`.
        pub async fn $name(
            &self,
            to: BrokerId,
            mut request: pb::$request,
            deadline: Duration,
        ) -> Result<pb::$response, Error> {
            request.caller = Some(self.shared.identity().to_caller(Some(to)));
            let mut client = self.to(to, Lane::Calls)?;
            let answer = answered(to, deadline, client.$name(Request::new(request))).await;
            self.heard(to, Lane::Calls, answer)
        }
    };
}

impl PeerClient {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Asks whoever listens at `address` who it is.
    ///
    /// # Errors
    /// It cannot be reached within `deadline`, is no broker, or speaks another version.
    pub async fn hello(
        &self,
        address: &str,
        mut request: pb::HelloRequest,
        deadline: Duration,
    ) -> Result<pb::HelloResponse, Error> {
        request.caller = Some(self.shared.identity().to_caller(None));
        let mut client = grpc(connect(&self.shared, address)?);
        answered_at(&format!("the broker at {address}"), deadline, client.hello(Request::new(request))).await
    }

    call!(
        /// Registers this broker with the controller.
        register,
        RegisterRequest,
        RegisterResponse
    );
    call!(
        /// Tells the controller that this broker lives.
        broker_heartbeat,
        BrokerHeartbeatRequest,
        BrokerHeartbeatResponse
    );
    call!(
        /// Hands the controller a call of `flowstone.v1.Admin`.
        forward,
        ForwardRequest,
        ForwardResponse
    );
    call!(
        /// Asks a broker how its replicas are.
        report,
        ReportRequest,
        ReportResponse
    );
    call!(
        /// Asks a broker to do something with a partition that it leads.
        instruct,
        InstructRequest,
        InstructResponse
    );
    call!(
        /// Asks a coordinator to add partitions to transactions; the same again changes nothing.
        add_to_transaction,
        AddToTransactionRequest,
        AddToTransactionResponse
    );
    call!(
        /// Asks a broker to end transactions in partitions that it leads; the same again changes nothing.
        write_markers,
        WriteMarkersRequest,
        WriteMarkersResponse
    );

    /// Asks a broker for a range.
    pub(crate) async fn pull(
        &self,
        to: BrokerId,
        mut request: pb::PullRequest,
        deadline: Duration,
    ) -> Result<pb::PullResponse, Error> {
        request.caller = Some(self.shared.identity().to_caller(Some(to)));
        let mut client = self.to(to, Lane::Ranges)?;
        let answer = answered(to, deadline, client.pull(Request::new(request))).await;
        self.heard(to, Lane::Ranges, answer)
    }

    fn to(&self, to: BrokerId, lane: Lane) -> Result<GrpcClient<Channel>, Error> {
        let address = match self.shared.book.get(to) {
            Some(entry) if !entry.address.is_empty() => entry.address,
            _ => {
                return Err(Error::new(
                    ErrorCode::NoLeader,
                    format!("the peer address of broker {to} is not known here yet; try again"),
                ));
            }
        };
        let mut open = self.shared.channels.open.lock();
        if let Some((made_for, channel)) = open.get(&(to, lane))
            && *made_for == address
        {
            return Ok(grpc(channel.clone()));
        }
        let channel = connect(&self.shared, &address)?;
        open.insert((to, lane), (address, channel.clone()));
        Ok(grpc(channel))
    }

    /// What was answered. Whoever refuses this broker may be another one, to which the address led when the connection was
    /// made: the next call makes its own.
    fn heard<T>(&self, to: BrokerId, lane: Lane, answer: Result<T, Error>) -> Result<T, Error> {
        if answer.as_ref().is_err_and(|error| error.code == ErrorCode::PermissionDenied) {
            self.shared.channels.open.lock().remove(&(to, lane));
        }
        answer
    }
}

fn grpc(channel: Channel) -> GrpcClient<Channel> {
    GrpcClient::new(channel).max_decoding_message_size(RESPONSE_BYTES_MAX)
}

/// A connection that is made with its first call, and anew after it broke.
fn connect(shared: &Shared, address: &str) -> Result<Channel, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| {
        Error::new(ErrorCode::InvalidConfig, format!("`{address}` is no address of a broker: {error}; write host:port"))
    })?;
    let config = &shared.config;
    Ok(endpoint
        .connect_timeout(config.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(config.keepalive_interval)
        .keep_alive_timeout(config.keepalive_timeout)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .connect_lazy())
}

async fn answered<T>(
    to: BrokerId,
    deadline: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    answered_at(&format!("broker {to}"), deadline, call).await
}

async fn answered_at<T>(
    whom: &str,
    deadline: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    match timeout(deadline, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(error_of(whom, &status)),
        Err(_) => {
            let why =
                format!("{whom} did not answer within {deadline:?}: what was asked of it may have been done; look");
            Err(Error::new(ErrorCode::TimedOut, why))
        }
    }
}

/// What is said of a broker that a call did not get to.
const UNREACHED: &str = "cannot be reached";

/// Whether a call got no answer at all: neither the other side's own error, nor one of those in between.
pub(crate) fn is_unanswered(error: &Error) -> bool {
    error.code == ErrorCode::TimedOut || (error.code == ErrorCode::NoLeader && error.message.contains(UNREACHED))
}

/// What a failed call means: the other side's own error, or that there is none.
fn error_of(whom: &str, status: &Status) -> Error {
    if let Some(error) = Error::from_status(status) {
        return error;
    }
    match status.code() {
        Code::Unimplemented => Error::new(
            ErrorCode::Unsupported,
            format!("{whom} is no peer listener of Flowstone: {}; check its address", status.message()),
        ),
        Code::OutOfRange => Error::new(
            ErrorCode::MessageTooLarge,
            format!("the answer of {whom} is too large: {}; ask for less at a time", status.message()),
        ),
        _ => {
            let mut why = status.message().to_owned();
            let mut was_sent = true;
            let mut source = std::error::Error::source(status);
            while let Some(error) = source {
                why = format!("{why}: {error}");
                was_sent &= !error.is::<tonic::ConnectError>();
                source = error.source();
            }
            if was_sent {
                let text = format!(
                    "{whom} broke off before it answered ({why}): what was asked of it may have been done; look"
                );
                return Error::new(ErrorCode::TimedOut, text);
            }
            Error::new(ErrorCode::NoLeader, format!("{whom} {UNREACHED} ({why}); try again"))
        }
    }
}
