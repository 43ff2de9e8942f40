//! A stream from another broker, as its receiver runs it: the response is the whole session. When HTTP/2 polls it, it
//! reads messages, and hands them to the shards where it is.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use flowstone_protocol::peer as pb;
use flowstone_protocol::{Error, ErrorCode};
use http::{HeaderMap, HeaderValue, header};
use http_body::{Body as HttpBody, Frame};
use prost::Message;
use tokio::sync::{oneshot, watch};
use tokio::time::{Sleep, sleep};
use tonic::body::Body;
use tonic::{Code, Status};

use super::chunks::Chunks;
use super::identity::{PeerIdentity, Trust, check_caller, check_directory};
use super::network::{Shared, StreamKind};
use super::wire::{self, PREFIX_BYTES};
use crate::receiving::Held;

/// Until it is known who speaks, a message is no longer than this.
const HELLO_BYTES_MAX: usize = 4 << 10;
/// Messages that are taken before other tasks have their turn.
const MESSAGES_PER_TURN: usize = 64;

/// Answers one call of `Votes` or `Appends`.
pub(crate) fn serve(
    shared: Arc<Shared>,
    kind: StreamKind,
    drain: watch::Receiver<bool>,
    request: http::Request<Body>,
) -> http::Response<Body> {
    let held = request.extensions().get::<Held>().cloned().unwrap_or_default();
    let deadline = Box::pin(sleep(shared.config.hello_timeout));
    let mut drain = drain;
    let drained = Box::pin(async move {
        // An error means that the broker is gone altogether.
        drop(drain.wait_for(|drains| *drains).await);
    });
    let session = Session {
        shared,
        kind,
        messages: request.into_body(),
        held,
        received: Chunks::default(),
        expected: None,
        from: None,
        deadline,
        drained,
        answer: None,
        end: None,
        ended: false,
    };
    let mut response = http::Response::new(Body::new(session));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

struct Session {
    shared: Arc<Shared>,
    kind: StreamKind,
    messages: Body,
    /// The room that messages take while they are received.
    held: Held,
    received: Chunks,
    /// Length of the message that `received` begins with, once its prefix is gone from there.
    expected: Option<usize>,
    from: Option<Sender>,
    /// For saying who speaks.
    deadline: Pin<Box<Sleep>>,
    drained: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// To be sent next.
    answer: Option<pb::StreamAnswer>,
    /// To be sent last.
    end: Option<Status>,
    ended: bool,
}

/// Who was found to speak.
struct Sender {
    identity: PeerIdentity,
    /// Version of the book with which that was checked.
    book_version: u64,
    /// The start by which it was registered then.
    registered: Option<u64>,
    /// Ends when there is a newer stream of this kind from there.
    superseded: oneshot::Receiver<()>,
}

impl Session {
    /// Reads what has arrived. `Ready` when there is something to answer.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if self.drained.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(Error::new(ErrorCode::ShuttingDown, "this broker is shutting down")));
        }
        let is_superseded = match &mut self.from {
            Some(from) => Pin::new(&mut from.superseded).poll(cx).is_ready(),
            None => {
                if self.deadline.as_mut().poll(cx).is_ready() {
                    let timeout = self.shared.config.hello_timeout;
                    let why = format!("nobody said who speaks within {timeout:?}; say so first");
                    return Poll::Ready(Err(Error::new(ErrorCode::TimedOut, why)));
                }
                false
            }
        };
        if is_superseded {
            let why = "the same broker has opened a newer stream, which takes this one's place";
            return Poll::Ready(Err(Error::new(ErrorCode::NotLeader, why)));
        }
        let mut taken = 0;
        loop {
            match self.next_message() {
                Ok(Some(message)) => {
                    self.held.release();
                    if let Err(error) = self.take(message) {
                        return Poll::Ready(Err(error));
                    }
                    if self.answer.is_some() {
                        return Poll::Ready(Ok(()));
                    }
                    taken += 1;
                    if taken == MESSAGES_PER_TURN {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            match Pin::new(&mut self.messages).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.received.push(data);
                    }
                }
                // The meter's own words: a message that does not go on.
                Poll::Ready(Some(Err(status))) if status.code() == Code::DeadlineExceeded => {
                    return Poll::Ready(Err(Error::new(ErrorCode::TimedOut, status.message())));
                }
                Poll::Ready(Some(Err(_)) | None) => {
                    self.end = Some(Status::new(Code::Ok, ""));
                    return Poll::Ready(Ok(()));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// The next whole message.
    fn next_message(&mut self) -> Result<Option<(wire::Received, usize)>, Error> {
        let bytes = match self.expected {
            Some(bytes) => bytes,
            None if self.received.remaining() < PREFIX_BYTES => return Ok(None),
            None => {
                let flag = self.received.get_u8();
                let bytes = self.received.get_u32() as usize;
                if flag != 0 {
                    return Err(invalid("is compressed"));
                }
                let bytes_max =
                    if self.from.is_some() { self.shared.config.message_bytes_max } else { HELLO_BYTES_MAX };
                if bytes > bytes_max {
                    return Err(Error::new(
                        ErrorCode::MessageTooLarge,
                        format!(
                            "a message of {bytes} bytes is larger than the {bytes_max} that are taken; this is a defect of its sender"
                        ),
                    ));
                }
                self.expected = Some(bytes);
                bytes
            }
        };
        if self.received.remaining() < bytes {
            return Ok(None);
        }
        self.expected = None;
        let message = wire::decode((&mut self.received).take(bytes))
            .map_err(|error| invalid(&format!("cannot be read ({error})")))?;
        Ok(Some((message, bytes)))
    }

    fn take(&mut self, (received, bytes): (wire::Received, usize)) -> Result<(), Error> {
        let wire::Received { hello, messages } = received;
        match (&mut self.from, hello) {
            (None, None) => return Err(invalid("came before it was said who speaks")),
            (Some(_), Some(_)) => return Err(invalid("says again who speaks")),
            (None, Some(caller)) => {
                let own = self.shared.identity();
                let book_version = self.shared.book.version();
                let identity = check_caller(&own, &self.shared.book, Some(&caller), Trust::Registered)?;
                if identity.broker == own.broker {
                    return Err(invalid("came from this very broker"));
                }
                self.shared.check_start(&identity)?;
                let registered = self.shared.book.start_of(identity.broker);
                let superseded = self.shared.accept(identity.broker, identity.incarnation, self.kind);
                tracing::debug!(broker = %identity.broker, stream = self.kind.name(), "a stream from a broker");
                self.from = Some(Sender { identity, book_version, registered, superseded });
                self.answer = Some(pb::StreamAnswer { hello: Some(own.to_caller(Some(identity.broker))), error: None });
            }
            (Some(from), None) => {
                let book_version = self.shared.book.version();
                if book_version != from.book_version {
                    check_directory(&self.shared.book, &from.identity)?;
                    let registered = self.shared.book.start_of(from.identity.broker);
                    if registered != from.registered
                        && registered.is_some_and(|start| start != from.identity.incarnation)
                    {
                        return Err(Error::new(
                            ErrorCode::NotLeader,
                            format!("another start of broker {} has registered since", from.identity.broker),
                        ));
                    }
                    (from.book_version, from.registered) = (book_version, registered);
                }
            }
        }
        self.shared.counters.received(messages.len(), bytes);
        if let (Some(from), Some(events), false) = (&self.from, self.shared.events(), messages.is_empty()) {
            events.deliver(from.identity.broker, messages);
        }
        Ok(())
    }

    /// Ends the stream with what was wrong.
    fn refuse(&mut self, error: &Error) {
        if error.code != ErrorCode::ShuttingDown {
            self.shared.refused(
                "a stream of another broker",
                self.from.as_ref().map(|from| from.identity.broker),
                error,
            );
        }
        self.answer = Some(pb::StreamAnswer { hello: None, error: Some(error.to_detail()) });
        self.end = Some(error.to_status());
    }
}

fn invalid(what: &str) -> Error {
    Error::new(ErrorCode::InvalidRequest, format!("a message between brokers {what}; this is a defect of its sender"))
}

impl HttpBody for Session {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let session = &mut *self;
        loop {
            if let Some(answer) = session.answer.take() {
                let mut chunks = Chunks::default();
                chunks.push(answer.encode_to_vec().into());
                let mut framed = wire::framed(chunks);
                let bytes = framed.remaining();
                return Poll::Ready(Some(Ok(Frame::data(framed.copy_to_bytes(bytes)))));
            }
            if session.ended {
                return Poll::Ready(None);
            }
            if let Some(status) = session.end.take() {
                session.ended = true;
                let mut trailers = HeaderMap::new();
                status.add_header(&mut trailers)?;
                return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
            }
            match session.poll_read(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => session.refuse(&error),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}
