//! `Fetch` on the wire: its responses as gRPC frames whose batches are the very bytes that were read.
//!
//! The generated service would copy every batch into one buffer of its own before it is sent. Here a response is a few
//! bytes of our own, and behind them the pieces of the log, by reference: from the page cache to the socket.
//!
//! ```text
//!   | 0 | length, 4 | fetch_id, session, high_watermark, log_start, error | tag of `batches`, its length | pieces ... |
//!   |------------- gRPC ------------- one message, `batches` its last field ----------------------------------------|
//! ```

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};
use flowstone_protocol::pb;
use futures::Stream;
use http::{HeaderMap, HeaderValue, header};
use http_body::{Body as HttpBody, Frame};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use tonic::body::Body;
use tonic::codec::{Codec, Streaming};
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use super::fetch::{FetchSession, Fetched};
use crate::node::Node;
use crate::receiving::Held;

/// The call's path.
pub(crate) const PATH: &str = "/flowstone.v1.Log/Fetch";
/// Number of `FetchResponse.batches` in `log.proto`.
const BATCHES_FIELD: u32 = 3;
/// Pieces up to this size are copied behind their response's head: a frame of their own would cost more.
const COPY_BYTES_MAX: usize = 4 << 10;
/// A response's head, but for an error's text.
const HEAD_BYTES: usize = 96;

/// Answers one call of `Fetch`.
pub(crate) fn serve(node: Arc<Node>, request: http::Request<Body>) -> http::Response<Body> {
    let bytes_max = node.config.limits.admin_request_bytes;
    let held = request.extensions().get::<Held>().cloned().unwrap_or_default();
    let decoder = ProstCodec::<(), pb::FetchRequest>::default().decoder();
    let requests = Streaming::new_request(decoder, request.into_body(), None, Some(bytes_max));
    let body = FetchBody { session: FetchSession::new(node, requests, held), frames: VecDeque::new(), ended: false };
    let mut response = http::Response::new(Body::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// A session's responses as they are sent.
struct FetchBody {
    session: FetchSession,
    /// The rest of the response that is being sent.
    frames: VecDeque<Bytes>,
    ended: bool,
}

impl HttpBody for FetchBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(frame) = self.frames.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(frame))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let status = match ready!(Pin::new(&mut self.session).poll_next(cx)) {
            Some(Ok(fetched)) => {
                let head = encode(fetched, &mut self.frames);
                return Poll::Ready(Some(Ok(Frame::data(head))));
            }
            Some(Err(status)) => status,
            None => Status::new(Code::Ok, ""),
        };
        self.ended = true;
        let mut trailers = HeaderMap::new();
        status.add_header(&mut trailers)?;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

/// The head of a response; its pieces go behind `frames`.
fn encode(fetched: Fetched, frames: &mut VecDeque<Bytes>) -> Bytes {
    let Fetched { fetch_id, session, chunks, bytes, high_watermark, last_stable_offset, log_start, aborted, error } =
        fetched;
    let fields = pb::FetchResponse {
        fetch_id,
        session,
        batches: Bytes::new(),
        high_watermark,
        log_start,
        error,
        last_stable_offset,
        aborted,
    };
    let mut key = BytesMut::with_capacity(16);
    if bytes > 0 {
        encode_key(BATCHES_FIELD, WireType::LengthDelimited, &mut key);
        encode_varint(bytes as u64, &mut key);
    }
    let fields_bytes = fields.encoded_len();
    let copied = if bytes <= COPY_BYTES_MAX { bytes } else { 0 };
    let mut head = BytesMut::with_capacity(HEAD_BYTES + fields_bytes + copied);
    head.put_u8(0);
    // Batches are bounded by 32 bits themselves, and a response by the aim for one or a single batch.
    head.put_u32((fields_bytes + key.len() + bytes) as u32);
    fields.encode_raw(&mut head);
    head.put(key);
    if copied > 0 {
        chunks.iter().for_each(|chunk| head.put_slice(chunk));
    } else {
        frames.extend(chunks);
    }
    head.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(chunks: &[&'static [u8]], error: Option<pb::ErrorDetail>) {
        let chunks: Vec<Bytes> = chunks.iter().map(|chunk| Bytes::from_static(chunk)).collect();
        let batches: Bytes = chunks.concat().into();
        let fetched = Fetched {
            fetch_id: 3,
            session: 0,
            bytes: batches.len(),
            chunks,
            high_watermark: -1,
            last_stable_offset: 5,
            log_start: i64::MAX,
            aborted: vec![pb::AbortedTransaction { producer_id: 7, first_offset: 3 }; 2],
            error: error.clone(),
        };
        let mut frames = VecDeque::new();
        let mut wire = encode(fetched, &mut frames).to_vec();
        frames.iter().for_each(|frame| wire.extend_from_slice(frame));
        assert_eq!(wire[0], 0);
        assert_eq!(u32::from_be_bytes([wire[1], wire[2], wire[3], wire[4]]) as usize, wire.len() - 5);
        let read = pb::FetchResponse::decode(&wire[5..]).expect("a message");
        let wanted = pb::FetchResponse {
            fetch_id: 3,
            session: 0,
            batches,
            high_watermark: -1,
            log_start: i64::MAX,
            error,
            last_stable_offset: 5,
            aborted: vec![pb::AbortedTransaction { producer_id: 7, first_offset: 3 }; 2],
        };
        assert_eq!(read, wanted);
    }

    #[test]
    fn what_is_sent_is_a_fetch_response() {
        static LARGE: [u8; COPY_BYTES_MAX + 1] = [7; COPY_BYTES_MAX + 1];
        check(&[], Some(pb::ErrorDetail { message: "no".repeat(500), ..Default::default() }));
        check(&[b"small"], None);
        check(&[b"small", b"", b"pieces"], None);
        check(&[&LARGE], None);
        check(&[&LARGE, b"and more", &LARGE], None);
    }
}
