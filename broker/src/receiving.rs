//! What is received of requests: bounded for all clients together.
//!
//! HTTP/2's windows bound what lies in its own buffers. A message that is being put together lies outside of them: its
//! bytes were read, so the window is open again, and a client that never finishes its messages could have a whole message
//! kept for each of its calls. So request bodies are metered: a message takes room for all of its bytes, from one budget,
//! before its first byte is handed on, and gives it back when its call has taken it. It waits for all of its room at once
//! and holds nothing meanwhile, so messages never wait for each other in a circle. A message that begins and does not go
//! on ends its call.
//!
//! ```text
//!   HTTP/2 --frame--> | ..rest of A | length of B | B.. |
//!                        handed on     room for B?  --no--> not read on; the window fills; the client waits
//! ```

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tonic::Status;
use tonic::body::Body;

/// Messages up to this size take no room: calls are bounded, and so are these; and small requests go on while others have
/// used up the room with large ones that they do not finish.
const FREE_BYTES_MAX: u32 = 64 << 10;
/// A client that brings less than this of a message within its timeout counts as silent: a drop now and then must not
/// hold the room of a large message for as long as its sender likes.
const PROGRESS_BYTES_MIN: usize = 1 << 20;
/// A gRPC message begins with a flag and its length.
const PREFIX_BYTES: usize = 5;

/// Bytes that all requests under way may hold.
#[derive(Clone, Debug)]
pub(crate) struct Receiving {
    room: Arc<Semaphore>,
    bytes_max: u32,
    /// [`FREE_BYTES_MAX`], but for tests.
    free_bytes_max: u32,
    /// Time that a client may be silent in the middle of a message.
    message_timeout: Duration,
}

impl Receiving {
    pub(crate) fn new(bytes_max: usize, message_timeout: Duration) -> Self {
        let bytes_max = u32::try_from(bytes_max.min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        Self {
            room: Arc::new(Semaphore::new(bytes_max as usize)),
            bytes_max,
            free_bytes_max: FREE_BYTES_MAX,
            message_timeout,
        }
    }

    /// Meters a request's body. What its messages hold is released through [`Held`], and with the body at the latest.
    pub(crate) fn meter(&self, body: Body) -> (Body, Held) {
        let held = Held::default();
        let metered = MeteredBody {
            inner: body,
            receiving: self.clone(),
            held: held.clone(),
            pending: Bytes::new(),
            prefix: [0; PREFIX_BYTES],
            prefix_bytes: 0,
            rest: 0,
            waiting: None,
            progress_bytes: 0,
            deadline: None,
        };
        (Body::new(metered), held)
    }
}

/// The room of one call's messages, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    /// Held for a push or a take; nothing waits inside.
    messages: Arc<Mutex<VecDeque<Option<OwnedSemaphorePermit>>>>,
}

impl Held {
    /// The oldest message has been taken: its room is free again.
    pub(crate) fn release(&self) {
        drop(self.messages.lock().pop_front());
    }

    fn push(&self, permit: Option<OwnedSemaphorePermit>) {
        self.messages.lock().push_back(permit);
    }
}

type Room = Pin<Box<dyn Future<Output = Option<OwnedSemaphorePermit>> + Send>>;

/// A request's body whose messages take room.
struct MeteredBody {
    inner: Body,
    receiving: Receiving,
    held: Held,
    /// Received and not handed on: it begins with a message that waits for its room.
    pending: Bytes,
    /// The prefix of the next message, as far as it was seen.
    prefix: [u8; PREFIX_BYTES],
    prefix_bytes: usize,
    /// Bytes of the message under way that are still to come.
    rest: usize,
    /// The next message's room, and its bytes that are still to come, those of its prefix in `pending` included.
    waiting: Option<(Room, usize)>,
    /// Bytes received since the deadline was set.
    progress_bytes: usize,
    /// Of the message under way, while the client is silent.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl MeteredBody {
    /// What of `data` may be handed on; the rest stays in `pending`, its message waiting for room.
    fn admit(&mut self, mut data: Bytes) -> Bytes {
        let mut seen = 0;
        while seen < data.len() {
            if self.rest > 0 {
                let step = self.rest.min(data.len() - seen);
                self.rest -= step;
                seen += step;
                if self.rest == 0 {
                    self.begin_anew();
                }
                continue;
            }
            let begin = seen;
            let step = (PREFIX_BYTES - self.prefix_bytes).min(data.len() - seen);
            self.prefix[self.prefix_bytes..self.prefix_bytes + step].copy_from_slice(&data[seen..seen + step]);
            self.prefix_bytes += step;
            seen += step;
            if self.prefix_bytes < PREFIX_BYTES {
                break;
            }
            self.prefix_bytes = 0;
            let [_, length @ ..] = self.prefix;
            let length = u32::from_be_bytes(length);
            if length <= self.receiving.free_bytes_max {
                self.held.push(None);
                self.rest = length as usize;
                continue;
            }
            // One above all limits is refused by its call, by its length alone.
            let wanted = length.min(self.receiving.bytes_max);
            match Arc::clone(&self.receiving.room).try_acquire_many_owned(wanted) {
                Ok(permit) => {
                    self.held.push(Some(permit));
                    self.rest = length as usize;
                }
                Err(_) => {
                    let room = Arc::clone(&self.receiving.room);
                    // Never closed.
                    let room = async move { room.acquire_many_owned(wanted).await.ok() };
                    self.waiting = Some((Box::pin(room), length as usize + seen - begin));
                    // Behind what may go on; its prefix was looked at and is handed on with it.
                    self.pending = data.split_off(begin);
                    return data;
                }
            }
        }
        data
    }

    /// The time of the message that follows, or of its next part, begins when the client is silent.
    fn begin_anew(&mut self) {
        self.progress_bytes = 0;
        self.deadline = None;
    }

    /// Whether the client has been silent for too long in the middle of a message.
    fn check(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        if self.rest == 0 && self.prefix_bytes == 0 {
            self.begin_anew();
            return Poll::Pending;
        }
        let timeout = self.receiving.message_timeout;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(deadline.as_mut().poll(cx));
        let why = format!("a message was not finished within {timeout:?} (limits.message_timeout); send it again");
        Poll::Ready(Status::deadline_exceeded(why))
    }
}

impl HttpBody for MeteredBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let body = &mut *self;
        loop {
            if let Some((room, to_come)) = &mut body.waiting {
                let permit = ready!(room.as_mut().poll(cx));
                body.rest = *to_come;
                body.waiting = None;
                body.held.push(permit);
            }
            if !body.pending.is_empty() {
                let pending = std::mem::take(&mut body.pending);
                let data = body.admit(pending);
                if !data.is_empty() {
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                continue;
            }
            match Pin::new(&mut body.inner).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        body.progress_bytes += data.len();
                        if body.progress_bytes >= PROGRESS_BYTES_MIN {
                            body.begin_anew();
                        }
                        let data = body.admit(data);
                        if !data.is_empty() {
                            return Poll::Ready(Some(Ok(Frame::data(data))));
                        }
                    }
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                Poll::Ready(end) => return Poll::Ready(end),
                Poll::Pending => return body.check(cx).map(|late| Some(Err(late))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.pending.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for MeteredBody {
    fn drop(&mut self) {
        self.held.messages.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use futures::future::poll_fn;
    use tokio::sync::mpsc;

    use super::*;

    /// A body of what is sent here.
    fn body() -> (mpsc::UnboundedSender<Bytes>, Body) {
        struct Sent(mpsc::UnboundedReceiver<Bytes>);
        impl HttpBody for Sent {
            type Data = Bytes;
            type Error = Status;
            fn poll_frame(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
                self.0.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
            }
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        (sender, Body::new(Sent(receiver)))
    }

    /// Small messages count, too.
    fn metering(bytes_max: usize, message_timeout: Duration) -> Receiving {
        Receiving { free_bytes_max: 0, ..Receiving::new(bytes_max, message_timeout) }
    }

    fn message(bytes: usize) -> Vec<u8> {
        let mut message = vec![0];
        message.extend_from_slice(&(bytes as u32).to_be_bytes());
        message.extend((0..bytes).map(|at| at as u8));
        message
    }

    async fn next(body: &mut Body) -> Result<Bytes, Status> {
        let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await.expect("no end");
        frame.map(|frame| frame.into_data().expect("bytes"))
    }

    async fn waits(body: &mut Body) -> bool {
        tokio::time::timeout(Duration::from_millis(20), next(body)).await.is_err()
    }

    #[tokio::test]
    async fn a_message_waits_for_its_room_and_gives_it_back() {
        let receiving = metering(100, Duration::from_secs(600));
        let (first, body_one) = body();
        let (second, body_two) = body();
        let (mut one, held_one) = receiving.meter(body_one);
        let (mut two, held_two) = receiving.meter(body_two);
        first.send(message(60)[..20].to_vec().into()).expect("open");
        second.send(message(60).into()).expect("open");
        assert_eq!(next(&mut one).await.expect("bytes").len(), 20);
        assert_eq!(receiving.room.available_permits(), 40, "room for all of it, though it has only begun");
        assert!(waits(&mut two).await, "there is no room for the second");
        held_one.release();
        assert_eq!(next(&mut two).await.expect("bytes"), message(60));
        drop((held_two, two));
        assert_eq!(receiving.room.available_permits(), 100, "a call that ends gives its room back");
    }

    #[tokio::test]
    async fn what_is_whole_goes_on_before_what_has_to_wait() {
        let receiving = metering(100, Duration::from_secs(600));
        let (sender, body) = body();
        let (mut metered, held) = receiving.meter(body);
        // Three messages, cut into frames anywhere: the third finds no room until the first is taken.
        let wire = [message(40), message(50), message(30), message(0)].concat();
        for frame in wire.chunks(7) {
            sender.send(frame.to_vec().into()).expect("open");
        }
        let mut received = Vec::new();
        while received.len() < 100 {
            received.extend_from_slice(&next(&mut metered).await.expect("bytes"));
        }
        assert_eq!(received.len(), 100, "the two that fit, and nothing of the third");
        assert!(waits(&mut metered).await);
        held.release();
        while received.len() < wire.len() {
            received.extend_from_slice(&next(&mut metered).await.expect("bytes"));
        }
        assert_eq!(received, wire);
        assert_eq!(receiving.room.available_permits(), 100 - 50 - 30);
    }

    #[tokio::test]
    async fn one_larger_than_all_there_is_passes_alone() {
        let receiving = metering(100, Duration::from_secs(600));
        let (sender, body) = body();
        let (mut metered, _held) = receiving.meter(body);
        sender.send(message(1_000).into()).expect("open");
        assert_eq!(next(&mut metered).await.expect("bytes").len(), 1_005);
        assert_eq!(receiving.room.available_permits(), 0);
    }

    #[tokio::test]
    async fn a_message_that_does_not_go_on_ends_its_call() {
        let receiving = metering(100, Duration::from_millis(20));
        let (sender, body) = body();
        let (mut metered, _held) = receiving.meter(body);
        // Between messages, it may wait for as long as it likes.
        let idle = tokio::time::timeout(Duration::from_millis(100), next(&mut metered)).await;
        assert!(idle.is_err(), "{idle:?}");
        sender.send(message(30)[..4].to_vec().into()).expect("open");
        assert_eq!(next(&mut metered).await.expect("bytes").len(), 4);
        let late = next(&mut metered).await.expect_err("too late");
        assert!(late.message().contains("limits.message_timeout"), "{late:?}");
    }

    #[tokio::test]
    async fn a_message_that_drips_ends_its_call() {
        let receiving = metering(1 << 20, Duration::from_millis(50));
        let (sender, dripping) = body();
        let (mut metered, _held) = receiving.meter(dripping);
        sender.send(message(100_000)[..100].to_vec().into()).expect("open");
        let drip = async {
            loop {
                sender.send(Bytes::from_static(b"x")).expect("open");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let end = async {
            loop {
                if let Err(late) = next(&mut metered).await {
                    return late;
                }
            }
        };
        let late = tokio::select! { late = end => late, () = drip => unreachable!("it drips for ever") };
        assert!(late.message().contains("limits.message_timeout"), "{late:?}");
    }

    #[tokio::test]
    async fn small_messages_go_on_when_there_is_no_room() {
        let receiving = Receiving::new(100_000, Duration::from_secs(600));
        let (greedy, body_one) = body();
        let (small, body_two) = body();
        let (mut one, _held_one) = receiving.meter(body_one);
        let (mut two, held_two) = receiving.meter(body_two);
        greedy.send(message(100_000)[..100].to_vec().into()).expect("open");
        next(&mut one).await.expect("bytes");
        for _ in 0..10 {
            small.send(message(FREE_BYTES_MAX as usize).into()).expect("open");
            assert_eq!(next(&mut two).await.expect("bytes").len(), FREE_BYTES_MAX as usize + PREFIX_BYTES);
            held_two.release();
        }
        small.send(message(FREE_BYTES_MAX as usize + 1).into()).expect("open");
        assert!(futures::poll!(Box::pin(next(&mut two))).is_pending(), "a larger one waits");
        drop((one, greedy));
        assert!(next(&mut two).await.is_ok());
    }
}
