//! One stream to another broker, opened by the side that sends on it: one task connects, sends what is queued, and begins
//! anew when it breaks.
//!
//! ```text
//!   shards --push--> queue --take--> encode --> HTTP/2 stream --> the other side
//!                      | full: dropped           | broken: what waits is dropped
//!                      '--> unreachable <--------'--> peer_gone, where the connection was closed there
//! ```
//!
//! All of it is polled by the one task, the connection included: what is queued is on the socket within one wake-up.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use flowstone_protocol::peer as pb;
use flowstone_protocol::{BrokerId, Error, ErrorCode};
use flowstone_replication::GroupMessage;
use h2::client::{Connection, ResponseFuture, SendRequest};
use h2::{PingPong, RecvStream, SendStream};
use prost::Message;
use rand::Rng;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout};
use tonic::Status;

use super::chunks::Chunks;
use super::identity::check_answerer;
use super::network::{Shared, StreamKind};
use super::queue::Queue;
use super::wire::{self, PREFIX_BYTES};

/// Aim for one message of a stream: one HTTP/2 frame, large enough that its costs do not count.
pub(crate) const MESSAGE_BYTES_AIM: usize = 1 << 20;
/// Messages, rows and entries of one, at most; a single one with more goes alone.
const MESSAGE_ITEMS_MAX: usize = 8 << 10;
/// What HTTP/2 may hold to be written.
const SEND_BUFFER_BYTES: usize = 2 << 20;
/// The other side only says that it accepts, or why not.
const ANSWER_BYTES_MAX: usize = 16 << 10;
/// HTTP/2 window for that.
const ANSWER_WINDOW_BYTES: u32 = 64 << 10;
/// `unreachable` is told this often at most while a queue overflows.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// Failures that repeat are logged this often.
const LOG_EVERY: Duration = Duration::from_secs(30);

const _: () = assert!(MESSAGE_ITEMS_MAX < wire::ITEMS_MAX);
/// Room for so many messages is kept between two of the stream's.
const GROUP_KEPT: usize = 256;

/// One stream to one broker.
#[derive(Debug)]
pub(crate) struct Link {
    to: BrokerId,
    kind: StreamKind,
    queue: Queue,
    connected: AtomicBool,
    /// The other side has come back: no reason to wait any longer.
    retry: Notify,
    /// The other side is no broker of the cluster any more.
    over: Notify,
}

/// Why a stream is no more.
#[derive(Debug)]
enum End {
    /// The other side said so.
    Refused(Error),
    /// Its side of the connection was closed or reset.
    Gone(String),
    /// Anything else.
    Broken(String),
    /// It listens elsewhere now, or is no peer any more.
    Moved,
}

impl Link {
    pub(crate) fn new(to: BrokerId, kind: StreamKind, shared: &Shared) -> Arc<Self> {
        let limits = match kind {
            StreamKind::Votes => shared.config.votes_queue,
            StreamKind::Appends => shared.config.appends_queue,
        };
        let queue = Queue::new(limits);
        Arc::new(Self { to, kind, queue, connected: AtomicBool::new(false), retry: Notify::new(), over: Notify::new() })
    }

    pub(crate) fn push(&self, shared: &Shared, messages: Vec<GroupMessage>) {
        let dropped = self.queue.push(messages);
        shared.counters.dropped(dropped);
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Messages that wait to be sent, and their bytes.
    pub(crate) fn waiting(&self) -> (usize, usize) {
        self.queue.waiting()
    }

    /// Does not wait any longer before the next attempt, or then.
    pub(crate) fn retry_now(&self) {
        self.retry.notify_one();
    }

    /// Ends for good; what is pushed from now on goes nowhere.
    pub(crate) fn end(&self) {
        self.over.notify_one();
    }

    /// Keeps the stream up while there is something to send, until the network stops or the link ends.
    pub(crate) async fn run(self: Arc<Self>, shared: Arc<Shared>) {
        let mut stop = shared.stop.subscribe();
        let mut book = shared.book.watch();
        let mut backoff = shared.config.backoff_min;
        let mut log = Log { last: None };
        loop {
            tokio::select! {
                () = poll_fn(|cx| self.queue.poll_work(cx)) => {}
                _ = stop.wait_for(|stop| *stop) => return,
                () = self.over.notified() => return,
            }
            book.mark_unchanged();
            let end = tokio::select! {
                end = self.session(&shared, &mut backoff, &mut log) => end,
                _ = stop.wait_for(|stop| *stop) => return,
            };
            log.ended(&self, &end);
            // What was queued meanwhile is old when the next stream is there; Raft sends again what matters.
            shared.counters.dropped(self.queue.clear());
            shared.unreachable(self.to);
            let pause = backoff.mul_f64(rand::rng().random_range(0.5..1.0));
            backoff = (backoff * 2).min(shared.config.backoff_max);
            tokio::select! {
                () = sleep(pause) => {}
                () = self.retry.notified() => {}
                // Perhaps it is where that broker listens.
                _ = book.changed() => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// One stream, from the first attempt to reach the other side to its end.
    async fn session(&self, shared: &Shared, backoff: &mut Duration, log: &mut Log) -> End {
        let mut stream = match self.open(shared).await {
            Ok(stream) => stream,
            Err(end) => return end,
        };
        if let Err(end) = stream.until_accepted(shared).await {
            return end;
        }
        *backoff = shared.config.backoff_min;
        log.connected(self, &stream.address);
        self.connected.store(true, Ordering::Relaxed);
        shared.counters.connected();
        let end = stream.pump(self, shared).await;
        self.connected.store(false, Ordering::Relaxed);
        self.tell_end(shared, &end);
        end
    }

    /// A process that has ended is told of once, by one of its two streams.
    fn tell_end(&self, shared: &Shared, end: &End) {
        let is_gone = match end {
            End::Gone(_) => true,
            End::Refused(error) => error.code == ErrorCode::ShuttingDown,
            End::Broken(_) | End::Moved => false,
        };
        if is_gone && self.kind == StreamKind::Votes {
            shared.peer_gone(self.to);
        }
    }

    async fn open(&self, shared: &Shared) -> Result<Stream, End> {
        let address = match shared.book.get(self.to) {
            Some(entry) if !entry.address.is_empty() => entry.address,
            _ => return Err(End::Broken("its peer address is not known".to_owned())),
        };
        let connecting = async {
            let socket = TcpStream::connect(&address).await?;
            // Small messages must not wait for the other side's delayed acknowledgement.
            socket.set_nodelay(true)?;
            Ok::<_, io::Error>(socket)
        };
        let socket = match timeout(shared.config.connect_timeout, connecting).await {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => return Err(End::Broken(format!("cannot connect to {address}: {error}"))),
            Err(_) => return Err(End::Broken(format!("cannot connect to {address}: no answer"))),
        };
        let handshake = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(ANSWER_WINDOW_BYTES)
            .max_send_buffer_size(SEND_BUFFER_BYTES)
            .max_header_list_size(shared.config.limits.header_bytes)
            .handshake::<_, Chunks>(socket);
        let (mut send_request, mut connection) = handshake.await.map_err(end_of)?;
        let request = http::Request::post(format!("http://{address}{}", self.kind.path()))
            .header(http::header::CONTENT_TYPE, "application/grpc")
            .header(http::header::TE, "trailers")
            .body(())
            .map_err(|error| End::Broken(format!("{address} is no address: {error}")))?;
        let (response, mut sender) = send_request.send_request(request, false).map_err(end_of)?;
        let caller = shared.identity().to_caller(Some(self.to));
        sender.send_data(wire::encode_hello(caller), false).map_err(end_of)?;
        let ping = connection.ping_pong();
        let mut keepalive = interval(shared.config.keepalive_interval);
        keepalive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Stream {
            to: self.to,
            connection,
            _send_request: send_request,
            sender,
            answers: Answers { response: Some(response), body: None, received: BytesMut::new() },
            ping,
            asked: None,
            keepalive,
            address,
            group: Vec::new(),
            untold: false,
            told: None,
        })
    }
}

/// An open stream and the connection that carries it alone.
struct Stream {
    to: BrokerId,
    /// Where it was dialled.
    address: String,
    connection: Connection<TcpStream, Chunks>,
    /// The connection ends when there is none.
    _send_request: SendRequest<Chunks>,
    sender: SendStream<Chunks>,
    answers: Answers,
    ping: Option<PingPong>,
    /// When the ping was sent that was not answered yet.
    asked: Option<Instant>,
    keepalive: Interval,
    /// Reused from message to message.
    group: Vec<GroupMessage>,
    /// Messages were dropped since `told`.
    untold: bool,
    /// When `unreachable` was told last for an overflow.
    told: Option<Instant>,
}

impl Stream {
    /// Waits until the other side has accepted the stream, and is who it should be.
    async fn until_accepted(&mut self, shared: &Shared) -> Result<(), End> {
        let accepted = poll_fn(|cx| {
            if let Poll::Ready(answer) = self.answers.poll(cx) {
                return Poll::Ready(answer);
            }
            match Pin::new(&mut self.connection).poll(cx) {
                Poll::Ready(ended) => Poll::Ready(Err(closed(ended))),
                Poll::Pending => Poll::Pending,
            }
        });
        let answer = match timeout(shared.config.hello_timeout, accepted).await {
            Ok(answer) => answer?,
            Err(_) => return Err(End::Broken(format!("{} does not answer", self.address))),
        };
        let own = shared.identity();
        check_answerer(&own, &shared.book, self.to, &self.address, answer.hello.as_ref()).map_err(End::Refused)?;
        Ok(())
    }

    /// Sends what is queued until the stream ends.
    async fn pump(&mut self, link: &Link, shared: &Shared) -> End {
        let mut book = shared.book.watch();
        loop {
            tokio::select! {
                biased;
                end = poll_fn(|cx| self.poll(link, shared, cx)) => return end,
                changed = book.changed() => {
                    let entry = shared.book.get(self.to);
                    if changed.is_err() || entry.is_none_or(|entry| entry.address != self.address) {
                        return End::Moved;
                    }
                }
            }
        }
    }

    fn poll(&mut self, link: &Link, shared: &Shared, cx: &mut Context<'_>) -> Poll<End> {
        if let Err(end) = self.send(link, shared, cx) {
            return Poll::Ready(end);
        }
        match self.answers.poll(cx) {
            // It says nothing more until it ends.
            Poll::Ready(Ok(_)) => return Poll::Ready(End::Broken("it answers twice".to_owned())),
            Poll::Ready(Err(end)) => return Poll::Ready(end),
            Poll::Pending => {}
        }
        // Writes what was sent above.
        if let Poll::Ready(ended) = Pin::new(&mut self.connection).poll(cx) {
            return Poll::Ready(closed(ended));
        }
        self.poll_keepalive(shared, cx)
    }

    /// Hands what is queued to HTTP/2 for as long as that takes it.
    fn send(&mut self, link: &Link, shared: &Shared, cx: &mut Context<'_>) -> Result<(), End> {
        while link.queue.poll_work(cx).is_ready() {
            self.untold |= link.queue.take_overflow();
            self.tell_overflow(shared);
            if link.queue.is_empty() {
                continue;
            }
            self.sender.reserve_capacity(1);
            while self.sender.capacity() == 0 {
                match self.sender.poll_capacity(cx) {
                    Poll::Ready(Some(Ok(_))) => {}
                    Poll::Ready(Some(Err(error))) => return Err(end_of(error)),
                    // The stream is over: its answer says why.
                    Poll::Ready(None) | Poll::Pending => return Ok(()),
                }
            }
            link.queue.take(&mut self.group, MESSAGE_ITEMS_MAX, MESSAGE_BYTES_AIM);
            self.group.retain(|message| fits(shared, message));
            if self.group.is_empty() {
                continue;
            }
            let message = wire::encode(&self.group);
            shared.counters.sent(self.group.len(), message.remaining());
            self.group.clear();
            self.sender.send_data(message, false).map_err(end_of)?;
        }
        // A burst is over: of an idle stream nothing is kept.
        self.group.shrink_to(GROUP_KEPT);
        Ok(())
    }

    /// Tells that messages were dropped: at once, then every [`TELL_EVERY`].
    fn tell_overflow(&mut self, shared: &Shared) {
        if self.untold && self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            self.untold = false;
            self.told = Some(Instant::now());
            shared.unreachable(self.to);
        }
    }

    fn poll_keepalive(&mut self, shared: &Shared, cx: &mut Context<'_>) -> Poll<End> {
        let Some(ping) = &mut self.ping else { return Poll::Pending };
        if self.asked.is_some() {
            match ping.poll_pong(cx) {
                Poll::Ready(Ok(_)) => self.asked = None,
                Poll::Ready(Err(error)) => return Poll::Ready(end_of(error)),
                Poll::Pending => {}
            }
        }
        while self.keepalive.poll_tick(cx).is_ready() {
            self.tell_overflow(shared);
            let Some(ping) = &mut self.ping else { return Poll::Pending };
            match self.asked {
                Some(asked) if asked.elapsed() >= shared.config.keepalive_timeout => {
                    return Poll::Ready(End::Broken(format!("silent for {:?}", asked.elapsed())));
                }
                Some(_) => {}
                None => {
                    self.asked = Some(Instant::now());
                    if let Err(error) = ping.send_ping(h2::Ping::opaque()) {
                        return Poll::Ready(end_of(error));
                    }
                    // The connection has to write it.
                    cx.waker().wake_by_ref();
                }
            }
        }
        Poll::Pending
    }
}

/// Whether the other side would take it. Nothing larger should ever have been appended.
fn fits(shared: &Shared, message: &GroupMessage) -> bool {
    let (bytes, items) = (wire::bytes_of(message), wire::items_of(message));
    if bytes <= shared.config.message_bytes_max && items <= wire::ITEMS_MAX {
        return true;
    }
    tracing::error!(
        partition = %message.tp,
        bytes,
        items,
        "a message between replicas is larger than any broker takes and is dropped: this is a defect, report it"
    );
    shared.counters.dropped(1);
    false
}

/// What the other side says: nothing but that it accepts the stream, or why not.
struct Answers {
    response: Option<ResponseFuture>,
    body: Option<RecvStream>,
    received: BytesMut,
}

impl Answers {
    /// Its next answer; an error when there will be none.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<pb::StreamAnswer, End>> {
        loop {
            if let Some(response) = &mut self.response {
                let Poll::Ready(response_head) = Pin::new(response).poll(cx) else { return Poll::Pending };
                self.response = None;
                let (head, body) = response_head.map_err(end_of)?.into_parts();
                if let Some(status) = Status::from_header_map(&head.headers) {
                    return Poll::Ready(Err(refused(&status)));
                }
                if head.status != http::StatusCode::OK {
                    return Poll::Ready(Err(End::Broken(format!("no broker answers, but HTTP {}", head.status))));
                }
                self.body = Some(body);
            }
            match self.next_message() {
                Ok(Some(answer)) => {
                    return Poll::Ready(match &answer.error {
                        Some(error) => Err(End::Refused(Error::from_detail(error))),
                        None => Ok(answer),
                    });
                }
                Ok(None) => {}
                Err(why) => return Poll::Ready(Err(End::Broken(why))),
            }
            let Some(body) = &mut self.body else { return Poll::Pending };
            match body.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) => {
                    // An error means that the stream is over: the next poll says so.
                    drop(body.flow_control().release_capacity(data.len()));
                    self.received.extend_from_slice(&data);
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(end_of(error))),
                Poll::Ready(None) => {
                    let Poll::Ready(trailers) = body.poll_trailers(cx) else { return Poll::Pending };
                    let trailers = trailers.map_err(end_of)?;
                    let status = trailers.as_ref().and_then(Status::from_header_map);
                    return Poll::Ready(Err(match status {
                        Some(status) if status.code() != tonic::Code::Ok => refused(&status),
                        _ => End::Broken("the other side ended the stream".to_owned()),
                    }));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn next_message(&mut self) -> Result<Option<pb::StreamAnswer>, String> {
        let Some((prefix, rest)) = self.received.split_first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
        let [flag, length @ ..] = *prefix;
        let bytes = u32::from_be_bytes(length) as usize;
        if flag != 0 || bytes > ANSWER_BYTES_MAX {
            return Err("what answers is no broker".to_owned());
        }
        if rest.len() < bytes {
            return Ok(None);
        }
        self.received.advance(PREFIX_BYTES);
        let message: Bytes = self.received.split_to(bytes).freeze();
        pb::StreamAnswer::decode(message).map(Some).map_err(|error| format!("what answers is no broker: {error}"))
    }
}

fn refused(status: &Status) -> End {
    match Error::from_status(status) {
        Some(error) => End::Refused(error),
        None => {
            End::Broken(format!("what answers is no broker's peer listener: {:?} {}", status.code(), status.message()))
        }
    }
}

/// What the end of a connection means.
fn closed(ended: Result<(), h2::Error>) -> End {
    match ended {
        Ok(()) => End::Gone("the connection was closed".to_owned()),
        Err(error) => end_of(error),
    }
}

fn end_of(error: h2::Error) -> End {
    let is_gone = error.get_io().is_some_and(|error| {
        matches!(
            error.kind(),
            io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::UnexpectedEof
        )
    });
    if is_gone { End::Gone(error.to_string()) } else { End::Broken(error.to_string()) }
}

/// Says what happens to one stream, and does not repeat itself.
struct Log {
    last: Option<(String, Instant)>,
}

impl Log {
    fn connected(&mut self, link: &Link, address: &str) {
        self.last = None;
        tracing::info!(broker = %link.to, %address, stream = link.kind.name(), "connected to a broker");
    }

    fn ended(&mut self, link: &Link, end: &End) {
        let why = match end {
            End::Refused(error) => error.message.clone(),
            End::Gone(why) | End::Broken(why) => why.clone(),
            End::Moved => "its address has changed, or it is no broker of this cluster any more".to_owned(),
        };
        let is_new = self.last.as_ref().is_none_or(|(last, at)| *last != why || at.elapsed() >= LOG_EVERY);
        if is_new {
            tracing::warn!(broker = %link.to, stream = link.kind.name(), why, "no stream to a broker; trying again");
            self.last = Some((why, Instant::now()));
        } else {
            tracing::debug!(broker = %link.to, stream = link.kind.name(), why, "no stream to a broker");
        }
    }
}
