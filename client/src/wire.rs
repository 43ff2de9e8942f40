//! gRPC's framing for the two data streams, without copying payloads.
//!
//! The generated client encodes each message into one buffer and gathers each answer in another: two copies of every
//! record. Here a batch goes to HTTP/2 as the very bytes that were built, behind a few bytes of head, and a fetched
//! payload is a slice of the HTTP/2 frame that brought it, where one frame did.
//!
//! ```text
//! message: | 0 | length, u32 | protobuf fields | tag and length of the payload | payload |
//!          |<----------------------- head, one DATA frame -------------------->|<- its ->|  small ones in one frame
//! ```

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::Stream;
use http_body::{Body as _, Frame};
use prost::Message;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Compression flag and length.
const PREFIX_BYTES: usize = 5;
/// Up to here a copy costs less than a frame of its own.
const INLINE_BYTES_MAX: usize = 4 << 10;

/// A message to be sent: its fields encoded, up to the payload, and the payload.
pub(crate) struct Outgoing {
    head: BytesMut,
    payload: Bytes,
}

impl Outgoing {
    /// A message whose last field is `payload`, with this tag; `fields` has all others and leaves that one empty.
    pub(crate) fn with_payload(fields: &impl Message, tag: u32, payload: Bytes) -> Self {
        let mut head = BytesMut::with_capacity(PREFIX_BYTES + fields.encoded_len() + 16 + inline(&payload));
        head.put_bytes(0, PREFIX_BYTES);
        // The buffer grows as it must: encoding cannot fail.
        let _ = fields.encode(&mut head);
        prost::encoding::encode_key(tag, prost::encoding::WireType::LengthDelimited, &mut head);
        prost::encoding::encode_varint(payload.len() as u64, &mut head);
        Self { head, payload }
    }

    pub(crate) fn new(message: &impl Message) -> Self {
        let mut head = BytesMut::with_capacity(PREFIX_BYTES + message.encoded_len());
        head.put_bytes(0, PREFIX_BYTES);
        let _ = message.encode(&mut head);
        Self { head, payload: Bytes::new() }
    }

    /// Its frames.
    fn into_frames(self) -> (Bytes, Option<Bytes>) {
        let Self { mut head, payload } = self;
        // A batch is shorter than 2 GiB: its length is an i32.
        let length = (head.len() - PREFIX_BYTES + payload.len()) as u32;
        head[1..PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
        if payload.len() <= INLINE_BYTES_MAX {
            head.extend_from_slice(&payload);
            return (head.freeze(), None);
        }
        (head.freeze(), Some(payload))
    }
}

fn inline(payload: &Bytes) -> usize {
    if payload.len() <= INLINE_BYTES_MAX { payload.len() } else { 0 }
}

/// A stream of messages as the body of a call.
struct RequestBody<S> {
    messages: S,
    /// The payload of the message whose head went last.
    payload: Option<Bytes>,
}

impl<S: Stream<Item = Outgoing> + Unpin> http_body::Body for RequestBody<S> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Some(payload) = self.payload.take() {
            return Poll::Ready(Some(Ok(Frame::data(payload))));
        }
        let message = ready!(Pin::new(&mut self.messages).poll_next(context));
        Poll::Ready(message.map(|message| {
            let (head, payload) = message.into_frames();
            self.payload = payload;
            Ok(Frame::data(head))
        }))
    }
}

/// Opens a stream of messages both ways.
pub(crate) async fn open<S>(
    mut channel: Channel,
    path: &'static str,
    messages: S,
    message_bytes_max: usize,
) -> Result<Incoming, Status>
where
    S: Stream<Item = Outgoing> + Send + Unpin + 'static,
{
    let unavailable = |error: tonic::transport::Error| Status::from_error(Box::new(error));
    std::future::poll_fn(|context| GrpcService::<Body>::poll_ready(&mut channel, context))
        .await
        .map_err(unavailable)?;
    let request = http::Request::post(path)
        .version(http::Version::HTTP_2)
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .header(http::header::TE, "trailers")
        .body(Body::new(RequestBody { messages, payload: None }))
        .map_err(|error| Status::internal(error.to_string()))?;
    let response = GrpcService::<Body>::call(&mut channel, request).await.map_err(unavailable)?;
    if response.status() != http::StatusCode::OK {
        return Err(Status::unavailable(format!("the server answered HTTP status {}", response.status())));
    }
    // A call that is refused at once has its status here.
    if let Some(status) = Status::from_header_map(response.headers()).filter(|status| status.code() != Code::Ok) {
        return Err(status);
    }
    Ok(Incoming { body: response.into_body(), chunks: Chunks::default(), message_bytes_max, _channel: channel })
}

/// The messages that come back.
pub(crate) struct Incoming {
    body: Body,
    chunks: Chunks,
    message_bytes_max: usize,
    /// The connection ends with the last of its handles.
    _channel: Channel,
}

impl Incoming {
    /// The next message; `None` where the server ended the call in good order.
    pub(crate) fn poll_message<M: Message + Default>(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<M, Status>>> {
        loop {
            match self.chunks.take_message(self.message_bytes_max) {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(message))),
                Ok(None) => {}
                Err(status) => return Poll::Ready(Some(Err(status))),
            }
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => frame,
                Some(Err(status)) => return Poll::Ready(Some(Err(status))),
                None => return Poll::Ready(None),
            };
            match frame.into_data() {
                Ok(data) => self.chunks.push(data),
                Err(frame) => {
                    let status = frame.trailers_ref().and_then(Status::from_header_map);
                    if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
                        return Poll::Ready(Some(Err(status)));
                    }
                }
            }
        }
    }

    pub(crate) async fn message<M: Message + Default>(&mut self) -> Option<Result<M, Status>> {
        std::future::poll_fn(|context| self.poll_message(context)).await
    }
}

/// Bytes in the pieces in which they came.
#[derive(Debug, Default)]
struct Chunks {
    pieces: VecDeque<Bytes>,
    bytes: usize,
}

impl Chunks {
    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// The next message, if it is here in full.
    fn take_message<M: Message + Default>(&mut self, bytes_max: usize) -> Result<Option<M>, Status> {
        if self.bytes < PREFIX_BYTES {
            return Ok(None);
        }
        let mut prefix = [0; PREFIX_BYTES];
        let places = self.pieces.iter().flat_map(|piece| piece.iter());
        for (to, from) in prefix.iter_mut().zip(places) {
            *to = *from;
        }
        let [flag, length @ ..] = prefix;
        if flag != 0 {
            return Err(Status::unimplemented("the server compressed a message, which was not asked for"));
        }
        let length = u32::from_be_bytes(length) as usize;
        if length > bytes_max {
            return Err(Status::out_of_range(format!(
                "a message of {length} bytes is above the client's message_bytes_max ({bytes_max}); raise it"
            )));
        }
        if self.bytes < PREFIX_BYTES + length {
            return Ok(None);
        }
        self.advance(PREFIX_BYTES);
        let rest = self.bytes - length;
        let message = M::decode((&mut *self).take(length))
            .map_err(|error| Status::internal(format!("failed to decode a message of the server: {error}")))?;
        debug_assert_eq!(self.bytes, rest);
        Ok(Some(message))
    }
}

impl Buf for Chunks {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.bytes, "advanced by {count} of {} bytes", self.bytes);
        self.bytes -= count;
        while let Some(front) = self.pieces.front_mut() {
            if count < front.len() {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.pieces.pop_front();
        }
    }

    /// A slice where one piece has it all, as a payload that came in one frame has.
    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        assert!(count <= self.bytes, "{count} of {} bytes asked for", self.bytes);
        if let Some(front) = self.pieces.front_mut().filter(|front| front.len() >= count) {
            let slice = front.split_to(count);
            self.bytes -= count;
            if front.is_empty() {
                self.pieces.pop_front();
            }
            return slice;
        }
        let mut all = BytesMut::with_capacity(count);
        all.put(self.take(count));
        all.freeze()
    }
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::pb;

    use super::*;

    fn framed(message: Outgoing) -> (Vec<u8>, usize) {
        let (head, payload) = message.into_frames();
        let frames = 1 + usize::from(payload.is_some());
        ([head, payload.unwrap_or_default()].concat(), frames)
    }

    fn produce(batch: Bytes) -> pb::ProduceRequest {
        let topic_id = Bytes::from_static(&[7; 16]);
        pb::ProduceRequest {
            request_id: 300,
            topic_id,
            partition: 5,
            acks: pb::Acks::Leader.into(),
            batch,
            ..Default::default()
        }
    }

    #[test]
    fn a_message_is_what_prost_would_have_made_of_it() {
        for (bytes, frames) in
            [(0, 1), (1, 1), (200, 1), (INLINE_BYTES_MAX, 1), (INLINE_BYTES_MAX + 1, 2), (1 << 20, 2)]
        {
            let payload = Bytes::from(vec![9; bytes]);
            let (wire, in_frames) = framed(Outgoing::with_payload(&produce(Bytes::new()), 5, payload.clone()));
            assert_eq!(in_frames, frames, "{bytes}");
            assert_eq!(wire[..PREFIX_BYTES], [&[0][..], &(wire.len() as u32 - 5).to_be_bytes()].concat());
            assert_eq!(pb::ProduceRequest::decode(&wire[PREFIX_BYTES..]).unwrap(), produce(payload));
        }
        let request = pb::FetchRequest { credit_bytes: 77, remove: vec![1, 2], ..Default::default() };
        let (wire, _) = framed(Outgoing::new(&request));
        assert_eq!(pb::FetchRequest::decode(&wire[PREFIX_BYTES..]).unwrap(), request);
    }

    fn fetched(bytes: usize) -> pb::FetchResponse {
        let batches = (0..bytes).map(|byte| byte as u8).collect::<Vec<_>>().into();
        pb::FetchResponse { fetch_id: 3, session: 1, batches, high_watermark: 9, log_start: 0, ..Default::default() }
    }

    #[test]
    fn messages_come_out_whole_however_they_are_cut() {
        let sent: Vec<pb::FetchResponse> = [0, 1, 127, 128, 5000].map(fetched).into();
        let wire: Vec<u8> = sent.iter().flat_map(|message| framed(Outgoing::new(message)).0).collect();
        for step in [1, 2, 3, 5, 7, 64, 1000, wire.len()] {
            let mut chunks = Chunks::default();
            let mut got = Vec::new();
            for piece in wire.chunks(step) {
                chunks.push(Bytes::copy_from_slice(piece));
                while let Some(message) = chunks.take_message::<pb::FetchResponse>(1 << 20).unwrap() {
                    got.push(message);
                }
            }
            assert_eq!(got, sent, "in steps of {step}");
            assert_eq!(chunks.bytes, 0);
        }
    }

    #[test]
    fn a_payload_in_one_piece_is_not_copied() {
        let (wire, _) = framed(Outgoing::new(&fetched(100_000)));
        let wire = Bytes::from(wire);
        let range = wire.as_ptr_range();
        let mut chunks = Chunks::default();
        chunks.push(wire.clone());
        let message = chunks.take_message::<pb::FetchResponse>(1 << 20).unwrap().unwrap();
        assert!(range.contains(&message.batches.as_ptr()));
    }

    #[test]
    fn lengths_beyond_the_limit_and_compression_are_refused_before_anything_is_kept() {
        let mut chunks = Chunks::default();
        chunks.push(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]));
        assert_eq!(chunks.take_message::<pb::FetchResponse>(1000).unwrap_err().code(), Code::OutOfRange);
        let mut chunks = Chunks::default();
        chunks.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
        assert_eq!(chunks.take_message::<pb::FetchResponse>(1000).unwrap_err().code(), Code::Unimplemented);
        let mut chunks = Chunks::default();
        chunks.push(Bytes::from_static(&[0, 0, 0, 0, 2, 0xff, 0xff]));
        assert_eq!(chunks.take_message::<pb::FetchResponse>(1000).unwrap_err().code(), Code::Internal);
    }
}
