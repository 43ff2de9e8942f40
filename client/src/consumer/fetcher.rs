//! The fetch stream to one broker: connecting, credit, and what comes back. It owns no task: the consumer polls it,
//! and while nobody polls, the connection holds what the broker sent, which its credit bounds.

use std::pin::Pin;
use std::task::{Context, Poll};

use flowstone_protocol::pb;
use futures::Stream;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::Sleep;

use crate::address::ServerAddress;
use crate::connection::ConnectionSettings;
use crate::error::{Error, Result};
use crate::retry::{Backoff, BackoffPolicy};
use crate::wire::{self, Incoming, Outgoing};

/// The stream to one broker.
pub(crate) struct BrokerStream {
    pub(crate) broker: i32,
    state: State,
    backoff: Backoff,
    /// Bytes that the broker may have under way to us.
    window_bytes: usize,
    /// Bytes handed out and not yet given back to the broker as credit.
    owed_bytes: usize,
}

enum State {
    /// No stream, and none wanted yet.
    Idle,
    Connecting(BoxFuture<'static, Result<Open>>),
    Open(Box<Open>),
    /// After a failure.
    Waiting(Pin<Box<Sleep>>),
}

struct Open {
    address: ServerAddress,
    requests: mpsc::UnboundedSender<pb::FetchRequest>,
    responses: Incoming,
}

/// What the consumer must know of.
pub(crate) enum FetchEvent {
    /// A stream is there: nothing is set on it.
    Up,
    Response(pb::FetchResponse),
    /// It is gone, and all that was set on it; it may be tried again after a while.
    Down(Error),
    /// It may be tried again now.
    Rested,
}

impl BrokerStream {
    pub(crate) fn new(broker: i32, window_bytes: usize) -> Self {
        let backoff = Backoff::new(BackoffPolicy::CONNECT);
        Self { broker, state: State::Idle, backoff, window_bytes, owed_bytes: 0 }
    }

    pub(crate) fn is_open(&self) -> bool {
        matches!(self.state, State::Open(_))
    }

    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Begins to connect, where it is not connected nor waiting.
    pub(crate) fn connect(&mut self, settings: &ConnectionSettings, address: Option<&ServerAddress>) {
        if !self.is_idle() {
            return;
        }
        let Some(address) = address.cloned() else {
            self.state = State::Waiting(Box::pin(tokio::time::sleep(self.backoff.failed())));
            return;
        };
        let settings = settings.clone();
        let credit_bytes = self.window_bytes as u64;
        self.owed_bytes = 0;
        self.state = State::Connecting(Box::pin(async move {
            let channel = settings.connect(&address).await?;
            let (requests, outbound) = mpsc::unbounded_channel();
            // The whole credit at once; what is fetched is set when the stream is there.
            let _ = requests.send(pb::FetchRequest { credit_bytes, ..Default::default() });
            let bytes_max = settings.message_bytes_max;
            let call = wire::open(channel, "/flowstone.v1.Log/Fetch", Outbound(outbound), bytes_max).await;
            let responses = call.map_err(|status| Error::from_status(&address, status))?;
            Ok(Open { address, requests, responses })
        }));
    }

    /// Sends a request on the open stream; nothing happens without one.
    pub(crate) fn send(&self, request: pb::FetchRequest) {
        if let State::Open(open) = &self.state {
            // A stream that ended says so when it is polled.
            let _ = open.requests.send(request);
        }
    }

    /// These bytes are handed out: the broker may send as many more. Told when it is worth a message.
    pub(crate) fn taken(&mut self, bytes: usize) {
        self.owed_bytes += bytes;
        if self.owed_bytes >= self.window_bytes / 4 {
            let credit_bytes = std::mem::take(&mut self.owed_bytes) as u64;
            self.send(pb::FetchRequest { credit_bytes, ..Default::default() });
        }
    }

    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<FetchEvent> {
        match &mut self.state {
            State::Idle => Poll::Pending,
            State::Connecting(connecting) => connecting.as_mut().poll(context).map(|done| match done {
                Ok(open) => {
                    self.state = State::Open(Box::new(open));
                    FetchEvent::Up
                }
                Err(error) => self.failed(error),
            }),
            State::Open(open) => {
                let Open { responses, address, .. } = &mut **open;
                let message = std::task::ready!(responses.poll_message(context));
                let message = message.map(|message| message.map_err(|status| Error::from_status(address, status)));
                Poll::Ready(match message {
                    Some(Ok(response)) => {
                        self.backoff.succeeded();
                        FetchEvent::Response(response)
                    }
                    Some(Err(error)) => self.failed(error),
                    None => self.failed(Error::unreachable("the broker ended the fetch stream")),
                })
            }
            State::Waiting(sleep) => sleep.as_mut().poll(context).map(|()| {
                self.state = State::Idle;
                FetchEvent::Rested
            }),
        }
    }

    fn failed(&mut self, error: Error) -> FetchEvent {
        self.state = State::Waiting(Box::pin(tokio::time::sleep(self.backoff.failed())));
        FetchEvent::Down(error)
    }
}

/// Requests are small and as many as the user's seeks: unbounded costs nothing.
struct Outbound(mpsc::UnboundedReceiver<pb::FetchRequest>);

impl Stream for Outbound {
    type Item = Outgoing;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|request| request.map(|request| Outgoing::new(&request)))
    }
}
