//! `StreamMessage` on the wire, from and to the replicas' own messages: no batch is copied on the way, and no intermediate
//! message is built.
//!
//! ```text
//!   | 0 | length, 4 | messages, heartbeats, ... with each entry's data as its last field, by reference |
//!   |--- gRPC ------|--- protobuf ---------------------------------------------------------------------|
//! ```
//!
//! What is received is believed only as far as it is there: lengths are checked against what remains, and the number of
//! messages, rows and entries against [`ITEMS_MAX`], since each takes far more memory than the two bytes in which it can be
//! written.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flowstone_protocol::peer as pb;
use flowstone_protocol::{ControlType, PartitionId, RaftIndex, ReplicaId, Term, TopicId, TopicPartition};
use flowstone_replication::{Beat, BeatAnswer, GroupMessage, PeerBody, PeerMessage, RestingGroup};
use flowstone_storage::{EntryBody, LogEntry};
use pb::group_message::Body;
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field};

use super::chunks::Chunks;

/// A gRPC message begins with a flag and its length.
pub(crate) const PREFIX_BYTES: usize = 5;
/// Messages, rows and entries of one stream message.
pub(crate) const ITEMS_MAX: usize = 1 << 16;
/// Data up to this size is copied: a piece of its own would cost more, and would keep all of the frame that it came in.
const COPY_BYTES_MAX: usize = 2 << 10;
/// Room for what stands before an entry's data.
const HEAD_BYTES: usize = 256;

/// Numbers in `peer.proto`.
mod field {
    pub(super) mod stream {
        pub(in super::super) const HELLO: u32 = 1;
        pub(in super::super) const MESSAGES: u32 = 2;
        pub(in super::super) const HEARTBEATS: u32 = 3;
        pub(in super::super) const HEARTBEAT_ANSWERS: u32 = 4;
    }
    pub(super) mod message {
        pub(in super::super) const TOPIC_HIGH: u32 = 1;
        pub(in super::super) const TOPIC_LOW: u32 = 2;
        pub(in super::super) const PARTITION: u32 = 3;
        pub(in super::super) const FROM: u32 = 4;
        pub(in super::super) const TO: u32 = 5;
        pub(in super::super) const TERM: u32 = 6;
        pub(in super::super) const APPEND: u32 = 7;
        pub(in super::super) const APPEND_ANSWER: u32 = 8;
        pub(in super::super) const VOTE: u32 = 9;
        pub(in super::super) const VOTE_ANSWER: u32 = 10;
        pub(in super::super) const HEARTBEAT_COMMIT: u32 = 11;
        pub(in super::super) const HEARTBEAT_ANSWER_COMMIT: u32 = 12;
        pub(in super::super) const TRANSFER_LEADER: u32 = 13;
        pub(in super::super) const TIMEOUT_NOW: u32 = 14;
        pub(in super::super) const SNAPSHOT_OFFER: u32 = 15;
        pub(in super::super) const SNAPSHOT_ANSWER: u32 = 16;
        pub(in super::super) const READ_INDEX: u32 = 17;
        pub(in super::super) const READ_INDEX_ANSWER: u32 = 18;
        pub(in super::super) const ENDED: u32 = 19;
        pub(in super::super) const BEAT: u32 = 20;
        pub(in super::super) const BEAT_ANSWER: u32 = 21;
        /// Of a heartbeat's row; the fields before it are those of a message.
        pub(in super::super) const ROW_COMMIT: u32 = 7;
        pub(in super::super) const ROW_LANE: u32 = 8;
    }
    pub(super) mod beat {
        pub(in super::super) const SESSION: u32 = 1;
        pub(in super::super) const NUMBER: u32 = 2;
        pub(in super::super) const LANE: u32 = 3;
        pub(in super::super) const SUM: u32 = 4;
        pub(in super::super) const JOINS: u32 = 5;
        pub(in super::super) const LEAVES: u32 = 6;
        /// Of an answer.
        pub(in super::super) const IS_KNOWN: u32 = 4;
        pub(in super::super) const LEFT: u32 = 5;
    }
    pub(super) mod append {
        pub(in super::super) const PREVIOUS_INDEX: u32 = 1;
        pub(in super::super) const PREVIOUS_TERM: u32 = 2;
        pub(in super::super) const COMMIT: u32 = 3;
        pub(in super::super) const ENTRIES: u32 = 4;
    }
    pub(super) mod entry {
        pub(in super::super) const INDEX: u32 = 1;
        pub(in super::super) const TERM: u32 = 2;
        pub(in super::super) const CONTROL_TYPE: u32 = 3;
        pub(in super::super) const DATA: u32 = 4;
    }
}

/// What was received is no stream message; the text says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Malformed(String);

impl From<prost::DecodeError> for Malformed {
    fn from(error: prost::DecodeError) -> Self {
        Self(error.to_string())
    }
}

fn malformed<T>(what: &str) -> Result<T, Malformed> {
    Err(Malformed(what.to_owned()))
}

/// Messages, rows and entries that `message` counts for.
pub(crate) fn items_of(message: &GroupMessage) -> usize {
    match &message.message.body {
        PeerBody::Append { entries, .. } => 1 + entries.len(),
        PeerBody::Beat(beat) => 1 + beat.joins.len() + beat.leaves.len(),
        PeerBody::BeatAnswer(answer) => 1 + answer.left.len(),
        _ => 1,
    }
}

/// About the bytes that `message` takes, in a queue and on the wire.
pub(crate) fn bytes_of(message: &GroupMessage) -> usize {
    const FIXED: usize = std::mem::size_of::<GroupMessage>();
    match &message.message.body {
        PeerBody::Append { entries, .. } => {
            FIXED + entries.iter().map(|e| std::mem::size_of::<LogEntry>() + e.data_bytes()).sum::<usize>()
        }
        PeerBody::Beat(_) | PeerBody::BeatAnswer(_) => {
            FIXED + items_of(message) * std::mem::size_of::<RestingGroup>() + std::mem::size_of::<Beat>()
        }
        _ => FIXED,
    }
}

/// A message that says who speaks.
pub(crate) fn encode_hello(caller: pb::Caller) -> Chunks {
    let message = pb::StreamMessage { hello: Some(caller), ..Default::default() };
    let mut chunks = Chunks::default();
    chunks.push(message.encode_to_vec().into());
    framed(chunks)
}

/// One message of a stream from those of many groups.
pub(crate) fn encode(messages: &[GroupMessage]) -> Chunks {
    let mut out = Out { head: BytesMut::with_capacity(HEAD_BYTES * messages.len().min(64)), chunks: Chunks::default() };
    for message in messages {
        out.message(message);
    }
    framed(out.finish())
}

/// A gRPC message of `chunks`.
pub(crate) fn framed(mut chunks: Chunks) -> Chunks {
    let mut prefix = BytesMut::with_capacity(PREFIX_BYTES);
    prefix.put_u8(0);
    // The sender keeps messages far below 4 GiB: a group of them ends at its aim, and one alone at the largest batch.
    prefix.put_u32(u32::try_from(chunks.remaining()).unwrap_or(u32::MAX));
    chunks.push_front(prefix.freeze());
    chunks
}

struct Out {
    /// Written and not in `chunks` yet.
    head: BytesMut,
    chunks: Chunks,
}

impl Out {
    fn message(&mut self, message: &GroupMessage) {
        let GroupMessage { tp, message: PeerMessage { from, to, term, body } } = message;
        let row = |commit: &RaftIndex, lane: u32| pb::HeartbeatRow {
            topic_high: (tp.topic.get() >> 64) as u64,
            topic_low: tp.topic.get() as u64,
            partition: tp.partition.get() as u32,
            from: from.get(),
            to: to.get(),
            term: term.get(),
            commit: commit.get(),
            lane,
        };
        let body = match body {
            PeerBody::Heartbeat { commit } => return self.nested(field::stream::HEARTBEATS, &row(commit, 0)),
            PeerBody::HeartbeatResponse { commit, lane } => {
                return self.nested(field::stream::HEARTBEAT_ANSWERS, &row(commit, *lane));
            }
            PeerBody::Append { .. } => None,
            PeerBody::AppendResponse { index, commit, reject, reject_hint, hint_term, request_snapshot } => {
                Some(Body::AppendAnswer(pb::AppendAnswer {
                    index: index.get(),
                    commit: commit.get(),
                    reject: *reject,
                    reject_hint: reject_hint.get(),
                    hint_term: hint_term.get(),
                    request_snapshot: request_snapshot.get(),
                }))
            }
            PeerBody::Vote { pre, last_index, last_term, commit, commit_term, transfer } => {
                Some(Body::Vote(pb::Vote {
                    pre: *pre,
                    last_index: last_index.get(),
                    last_term: last_term.get(),
                    commit: commit.get(),
                    commit_term: commit_term.get(),
                    transfer: *transfer,
                }))
            }
            PeerBody::VoteResponse { pre, reject, commit, commit_term } => Some(Body::VoteAnswer(pb::VoteAnswer {
                pre: *pre,
                reject: *reject,
                commit: commit.get(),
                commit_term: commit_term.get(),
            })),
            PeerBody::TransferLeader => Some(Body::TransferLeader(pb::Nothing {})),
            PeerBody::TimeoutNow => Some(Body::TimeoutNow(pb::Nothing {})),
            PeerBody::SnapshotOffer { index, index_term } => {
                Some(Body::SnapshotOffer(pb::SnapshotOffer { index: index.get(), index_term: index_term.get() }))
            }
            PeerBody::SnapshotAnswer { index, failed } => {
                Some(Body::SnapshotAnswer(pb::SnapshotAnswer { index: index.get(), failed: *failed }))
            }
            PeerBody::ReadIndex { request } => Some(Body::ReadIndex(pb::ReadIndex { request: *request })),
            PeerBody::ReadIndexAnswer { request, index, refused } => Some(Body::ReadIndexAnswer(pb::ReadIndexAnswer {
                request: *request,
                index: index.get(),
                refused: *refused,
            })),
            PeerBody::Ended => Some(Body::Ended(pb::Nothing {})),
            PeerBody::Beat(beat) => Some(Body::Beat(pb::Beat {
                session: beat.session,
                number: beat.number,
                lane: beat.lane,
                sum: beat.sum,
                joins: beat.joins.iter().map(resting_row).collect(),
                leaves: beat.leaves.iter().map(resting_row).collect(),
            })),
            PeerBody::BeatAnswer(answer) => Some(Body::BeatAnswer(pb::BeatAnswer {
                session: answer.session,
                number: answer.number,
                lane: answer.lane,
                is_known: answer.is_known,
                left: answer.left.iter().map(resting_row).collect(),
            })),
        };
        let fields = pb::GroupMessage {
            topic_high: (tp.topic.get() >> 64) as u64,
            topic_low: tp.topic.get() as u64,
            partition: tp.partition.get() as u32,
            from: from.get(),
            to: to.get(),
            term: term.get(),
            body,
        };
        if let PeerBody::Append { previous_index, previous_term, commit, entries } = &message.message.body {
            self.append(&fields, *previous_index, *previous_term, *commit, entries);
        } else {
            self.nested(field::stream::MESSAGES, &fields);
        }
    }

    fn append(
        &mut self,
        message: &pb::GroupMessage,
        previous_index: RaftIndex,
        previous_term: Term,
        commit: RaftIndex,
        entries: &[LogEntry],
    ) {
        let fields = pb::Append {
            previous_index: previous_index.get(),
            previous_term: previous_term.get(),
            commit: commit.get(),
            entries: Vec::new(),
        };
        let entry_bytes = |entry: &LogEntry| {
            let (fields, data) = entry_parts(entry);
            let data = if data.is_empty() { 0 } else { len_of(data.len()) };
            fields.encoded_len() + data
        };
        let append_bytes = fields.encoded_len() + entries.iter().map(|entry| len_of(entry_bytes(entry))).sum::<usize>();
        self.head.reserve(HEAD_BYTES);
        self.key(field::stream::MESSAGES, message.encoded_len() + len_of(append_bytes));
        message.encode_raw(&mut self.head);
        self.key(field::message::APPEND, append_bytes);
        fields.encode_raw(&mut self.head);
        for entry in entries {
            self.key(field::append::ENTRIES, entry_bytes(entry));
            let (fields, data) = entry_parts(entry);
            fields.encode_raw(&mut self.head);
            if data.is_empty() {
                continue;
            }
            self.key(field::entry::DATA, data.len());
            if data.len() <= COPY_BYTES_MAX {
                self.head.put_slice(data);
            } else {
                self.chunks.push(self.head.split().freeze());
                self.chunks.push(data.clone());
            }
        }
    }

    fn nested(&mut self, tag: u32, message: &impl Message) {
        self.key(tag, message.encoded_len());
        message.encode_raw(&mut self.head);
    }

    fn key(&mut self, tag: u32, bytes: usize) {
        encode_key(tag, WireType::LengthDelimited, &mut self.head);
        encode_varint(bytes as u64, &mut self.head);
    }

    fn finish(mut self) -> Chunks {
        self.chunks.push(self.head.freeze());
        self.chunks
    }
}

/// A field's bytes with its tag, of one byte, and its length.
fn len_of(bytes: usize) -> usize {
    1 + prost::length_delimiter_len(bytes) + bytes
}

fn resting_row(group: &RestingGroup) -> pb::RestingGroup {
    pb::RestingGroup {
        topic_high: (group.tp.topic.get() >> 64) as u64,
        topic_low: group.tp.topic.get() as u64,
        partition: group.tp.partition.get() as u32,
        leader: group.leader.get(),
        follower: group.follower.get(),
        term: group.term.get(),
    }
}

fn entry_parts(entry: &LogEntry) -> (pb::Entry, &Bytes) {
    let (control_type, data) = match &entry.body {
        EntryBody::Batch(batch) => (0, batch),
        EntryBody::Control { ctype, payload } => (i32::from(ctype.id()), payload),
    };
    (pb::Entry { index: entry.index.get(), term: entry.term.get(), control_type, data: Bytes::new() }, data)
}

/// One message of a stream, decoded.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// Who speaks.
    pub(crate) hello: Option<pb::Caller>,
    /// All messages, heartbeats among them, in the order of their kinds.
    pub(crate) messages: Vec<GroupMessage>,
}

/// Reads one message of a stream, which is all of `buf`.
///
/// # Errors
/// It is none, or has too many parts.
pub(crate) fn decode(mut buf: impl Buf) -> Result<Received, Malformed> {
    let buf = &mut buf;
    let mut received = Received::default();
    let mut items = 0;
    while buf.has_remaining() {
        let (tag, wire) = decode_key(buf)?;
        match tag {
            field::stream::HELLO => {
                let bytes = length(wire, buf)?;
                received.hello = Some(pb::Caller::decode(buf.take(bytes))?);
            }
            field::stream::MESSAGES => {
                count(&mut items)?;
                received.messages.push(decode_message(wire, buf, &mut items)?);
            }
            field::stream::HEARTBEATS | field::stream::HEARTBEAT_ANSWERS => {
                count(&mut items)?;
                let mut address = Address::default();
                let (mut commit, mut lane) = (0, 0);
                nested(wire, buf, |tag, wire, buf| match tag {
                    field::message::ROW_COMMIT => set(&mut commit, varint(wire, buf)),
                    field::message::ROW_LANE => set(&mut lane, varint(wire, buf)),
                    _ => address.field(tag, wire, buf),
                })?;
                let commit = RaftIndex::new(commit);
                let body = match tag {
                    field::stream::HEARTBEATS => PeerBody::Heartbeat { commit },
                    _ => PeerBody::HeartbeatResponse { commit, lane: lane_of(lane)? },
                };
                received.messages.push(address.message(body)?);
            }
            _ => skip_field(wire, tag, buf, DecodeContext::default())?,
        }
    }
    Ok(received)
}

/// What messages and rows begin with.
#[derive(Default)]
struct Address {
    topic_high: u64,
    topic_low: u64,
    partition: u64,
    from: u64,
    to: u64,
    term: u64,
}

impl Address {
    fn field(&mut self, tag: u32, wire: WireType, buf: &mut impl Buf) -> Result<(), Malformed> {
        match tag {
            field::message::TOPIC_HIGH => set(&mut self.topic_high, fixed64(wire, buf)),
            field::message::TOPIC_LOW => set(&mut self.topic_low, fixed64(wire, buf)),
            field::message::PARTITION => set(&mut self.partition, varint(wire, buf)),
            field::message::FROM => set(&mut self.from, fixed64(wire, buf)),
            field::message::TO => set(&mut self.to, fixed64(wire, buf)),
            field::message::TERM => set(&mut self.term, varint(wire, buf)),
            _ => Ok(skip_field(wire, tag, buf, DecodeContext::default())?),
        }
    }

    fn message(self, body: PeerBody) -> Result<GroupMessage, Malformed> {
        let Ok(partition) = i32::try_from(self.partition) else {
            return malformed("a partition's number is too large");
        };
        let topic = TopicId::new(u128::from(self.topic_high) << 64 | u128::from(self.topic_low));
        Ok(GroupMessage {
            tp: TopicPartition::new(topic, PartitionId::new(partition)),
            message: PeerMessage {
                from: ReplicaId::new(self.from),
                to: ReplicaId::new(self.to),
                term: Term::new(self.term),
                body,
            },
        })
    }
}

fn decode_message(wire: WireType, buf: &mut impl Buf, items: &mut usize) -> Result<GroupMessage, Malformed> {
    let mut address = Address::default();
    let mut body = None;
    nested(wire, buf, |tag, wire, buf| {
        body = Some(match tag {
            field::message::APPEND => decode_append(wire, buf, items)?,
            field::message::APPEND_ANSWER => {
                let answer: pb::AppendAnswer = flat(wire, buf)?;
                PeerBody::AppendResponse {
                    index: RaftIndex::new(answer.index),
                    commit: RaftIndex::new(answer.commit),
                    reject: answer.reject,
                    reject_hint: RaftIndex::new(answer.reject_hint),
                    hint_term: Term::new(answer.hint_term),
                    request_snapshot: RaftIndex::new(answer.request_snapshot),
                }
            }
            field::message::VOTE => {
                let vote: pb::Vote = flat(wire, buf)?;
                PeerBody::Vote {
                    pre: vote.pre,
                    last_index: RaftIndex::new(vote.last_index),
                    last_term: Term::new(vote.last_term),
                    commit: RaftIndex::new(vote.commit),
                    commit_term: Term::new(vote.commit_term),
                    transfer: vote.transfer,
                }
            }
            field::message::VOTE_ANSWER => {
                let answer: pb::VoteAnswer = flat(wire, buf)?;
                PeerBody::VoteResponse {
                    pre: answer.pre,
                    reject: answer.reject,
                    commit: RaftIndex::new(answer.commit),
                    commit_term: Term::new(answer.commit_term),
                }
            }
            field::message::HEARTBEAT_COMMIT => PeerBody::Heartbeat { commit: RaftIndex::new(varint(wire, buf)?) },
            field::message::HEARTBEAT_ANSWER_COMMIT => {
                PeerBody::HeartbeatResponse { commit: RaftIndex::new(varint(wire, buf)?), lane: 0 }
            }
            field::message::TRANSFER_LEADER => nothing(wire, buf, PeerBody::TransferLeader)?,
            field::message::TIMEOUT_NOW => nothing(wire, buf, PeerBody::TimeoutNow)?,
            field::message::SNAPSHOT_OFFER => {
                let offer: pb::SnapshotOffer = flat(wire, buf)?;
                PeerBody::SnapshotOffer { index: RaftIndex::new(offer.index), index_term: Term::new(offer.index_term) }
            }
            field::message::SNAPSHOT_ANSWER => {
                let answer: pb::SnapshotAnswer = flat(wire, buf)?;
                PeerBody::SnapshotAnswer { index: RaftIndex::new(answer.index), failed: answer.failed }
            }
            field::message::READ_INDEX => {
                let read: pb::ReadIndex = flat(wire, buf)?;
                PeerBody::ReadIndex { request: read.request }
            }
            field::message::READ_INDEX_ANSWER => {
                let answer: pb::ReadIndexAnswer = flat(wire, buf)?;
                PeerBody::ReadIndexAnswer {
                    request: answer.request,
                    index: RaftIndex::new(answer.index),
                    refused: answer.refused,
                }
            }
            field::message::ENDED => nothing(wire, buf, PeerBody::Ended)?,
            field::message::BEAT => decode_beat(wire, buf, items)?,
            field::message::BEAT_ANSWER => decode_beat_answer(wire, buf, items)?,
            _ => return address.field(tag, wire, buf),
        });
        Ok(())
    })?;
    match body {
        Some(body) => address.message(body),
        None => malformed("a message says nothing that this version knows"),
    }
}

fn decode_append(wire: WireType, buf: &mut impl Buf, items: &mut usize) -> Result<PeerBody, Malformed> {
    let (mut previous_index, mut previous_term, mut commit) = (0, 0, 0);
    let mut entries = Vec::new();
    nested(wire, buf, |tag, wire, buf| match tag {
        field::append::PREVIOUS_INDEX => set(&mut previous_index, varint(wire, buf)),
        field::append::PREVIOUS_TERM => set(&mut previous_term, varint(wire, buf)),
        field::append::COMMIT => set(&mut commit, varint(wire, buf)),
        field::append::ENTRIES => {
            count(items)?;
            entries.push(decode_entry(wire, buf)?);
            Ok(())
        }
        _ => Ok(skip_field(wire, tag, buf, DecodeContext::default())?),
    })?;
    Ok(PeerBody::Append {
        previous_index: RaftIndex::new(previous_index),
        previous_term: Term::new(previous_term),
        commit: RaftIndex::new(commit),
        entries,
    })
}

fn decode_beat(wire: WireType, buf: &mut impl Buf, items: &mut usize) -> Result<PeerBody, Malformed> {
    let (mut session, mut number, mut lane, mut sum) = (0, 0, 0, 0);
    let (mut joins, mut leaves) = (Vec::new(), Vec::new());
    nested(wire, buf, |tag, wire, buf| match tag {
        field::beat::SESSION => set(&mut session, fixed64(wire, buf)),
        field::beat::NUMBER => set(&mut number, varint(wire, buf)),
        field::beat::LANE => set(&mut lane, varint(wire, buf)),
        field::beat::SUM => set(&mut sum, fixed64(wire, buf)),
        field::beat::JOINS => decode_resting(wire, buf, items, &mut joins),
        field::beat::LEAVES => decode_resting(wire, buf, items, &mut leaves),
        _ => Ok(skip_field(wire, tag, buf, DecodeContext::default())?),
    })?;
    Ok(PeerBody::Beat(Box::new(Beat { session, number, lane: lane_of(lane)?, sum, joins, leaves })))
}

fn decode_beat_answer(wire: WireType, buf: &mut impl Buf, items: &mut usize) -> Result<PeerBody, Malformed> {
    let (mut session, mut number, mut lane, mut is_known) = (0, 0, 0, 0);
    let mut left = Vec::new();
    nested(wire, buf, |tag, wire, buf| match tag {
        field::beat::SESSION => set(&mut session, fixed64(wire, buf)),
        field::beat::NUMBER => set(&mut number, varint(wire, buf)),
        field::beat::LANE => set(&mut lane, varint(wire, buf)),
        field::beat::IS_KNOWN => set(&mut is_known, varint(wire, buf)),
        field::beat::LEFT => decode_resting(wire, buf, items, &mut left),
        _ => Ok(skip_field(wire, tag, buf, DecodeContext::default())?),
    })?;
    let is_known = is_known != 0;
    Ok(PeerBody::BeatAnswer(Box::new(BeatAnswer { session, number, lane: lane_of(lane)?, is_known, left })))
}

fn decode_resting(
    wire: WireType,
    buf: &mut impl Buf,
    items: &mut usize,
    into: &mut Vec<RestingGroup>,
) -> Result<(), Malformed> {
    count(items)?;
    let row: pb::RestingGroup = flat(wire, buf)?;
    let Ok(partition) = i32::try_from(row.partition) else {
        return malformed("a partition's number is too large");
    };
    let topic = TopicId::new(u128::from(row.topic_high) << 64 | u128::from(row.topic_low));
    into.push(RestingGroup {
        tp: TopicPartition::new(topic, PartitionId::new(partition)),
        leader: ReplicaId::new(row.leader),
        follower: ReplicaId::new(row.follower),
        term: Term::new(row.term),
    });
    Ok(())
}

fn lane_of(lane: u64) -> Result<u32, Malformed> {
    u32::try_from(lane).or_else(|_| malformed("a shard's number is too large"))
}

fn decode_entry(wire: WireType, buf: &mut impl Buf) -> Result<LogEntry, Malformed> {
    let (mut index, mut term, mut control_type) = (0, 0, 0);
    let mut data = Bytes::new();
    nested(wire, buf, |tag, wire, buf| match tag {
        field::entry::INDEX => set(&mut index, varint(wire, buf)),
        field::entry::TERM => set(&mut term, varint(wire, buf)),
        field::entry::CONTROL_TYPE => set(&mut control_type, varint(wire, buf)),
        field::entry::DATA => {
            let bytes = length(wire, buf)?;
            data = if bytes <= COPY_BYTES_MAX {
                let mut copied = BytesMut::with_capacity(bytes);
                copied.put(buf.take(bytes));
                copied.freeze()
            } else {
                buf.copy_to_bytes(bytes)
            };
            Ok(())
        }
        _ => Ok(skip_field(wire, tag, buf, DecodeContext::default())?),
    })?;
    let body = match control_type {
        0 => EntryBody::Batch(data),
        id => match i16::try_from(id).ok().and_then(ControlType::from_id) {
            Some(ctype) => EntryBody::Control { ctype, payload: data },
            None => return malformed("an entry is of a control type that this version does not know"),
        },
    };
    Ok(LogEntry { index: RaftIndex::new(index), term: Term::new(term), body })
}

/// Reads the fields of a nested message, which ends where it said it would.
fn nested<B: Buf>(
    wire: WireType,
    buf: &mut B,
    mut field: impl FnMut(u32, WireType, &mut B) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    let bytes = length(wire, buf)?;
    let end = buf.remaining() - bytes;
    while buf.remaining() > end {
        let (tag, wire) = decode_key(buf)?;
        field(tag, wire, buf)?;
    }
    if buf.remaining() == end { Ok(()) } else { malformed("a part is longer than the message that it is in") }
}

/// A nested message without repeated fields: what it takes does not grow with what it says.
fn flat<M: Message + Default>(wire: WireType, buf: &mut impl Buf) -> Result<M, Malformed> {
    let bytes = length(wire, buf)?;
    Ok(M::decode(buf.take(bytes))?)
}

fn nothing(wire: WireType, buf: &mut impl Buf, body: PeerBody) -> Result<PeerBody, Malformed> {
    let pb::Nothing {} = flat(wire, buf)?;
    Ok(body)
}

/// The length of a delimited field, which is there.
fn length(wire: WireType, buf: &mut impl Buf) -> Result<usize, Malformed> {
    if wire != WireType::LengthDelimited {
        return malformed("a field is not of the type that it should be");
    }
    match usize::try_from(decode_varint(buf)?) {
        Ok(bytes) if bytes <= buf.remaining() => Ok(bytes),
        _ => malformed("a field is longer than its message"),
    }
}

fn varint(wire: WireType, buf: &mut impl Buf) -> Result<u64, Malformed> {
    if wire != WireType::Varint {
        return malformed("a field is not of the type that it should be");
    }
    Ok(decode_varint(buf)?)
}

fn fixed64(wire: WireType, buf: &mut impl Buf) -> Result<u64, Malformed> {
    if wire != WireType::SixtyFourBit {
        return malformed("a field is not of the type that it should be");
    }
    if buf.remaining() < 8 {
        return malformed("a field is longer than its message");
    }
    Ok(buf.get_u64_le())
}

fn set(field: &mut u64, value: Result<u64, Malformed>) -> Result<(), Malformed> {
    *field = value?;
    Ok(())
}

fn count(items: &mut usize) -> Result<(), Malformed> {
    *items += 1;
    if *items > ITEMS_MAX {
        return Err(Malformed(format!("more than {ITEMS_MAX} parts in one message")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::super::tests::{append, heartbeat, message};
    use super::*;

    fn index(index: u64) -> RaftIndex {
        RaftIndex::new(index)
    }

    fn resting(number: u64) -> RestingGroup {
        RestingGroup {
            tp: TopicPartition::new(TopicId::new(u128::MAX - u128::from(number)), PartitionId::new(number as i32)),
            leader: ReplicaId::new(number),
            follower: ReplicaId::new(u64::MAX - number),
            term: Term::new(number),
        }
    }

    /// One of each kind.
    fn all_kinds() -> Vec<GroupMessage> {
        let term = Term::new(4);
        let control = |ctype, payload: &'static [u8]| LogEntry {
            index: index(8),
            term,
            body: EntryBody::Control { ctype, payload: Bytes::from_static(payload) },
        };
        let entries = vec![control(ControlType::NoOp, b""), control(ControlType::Membership, b"members")];
        vec![
            append(1, &[]),
            append(2, &[0, 1, COPY_BYTES_MAX, COPY_BYTES_MAX + 1, 300_000]),
            message(3, PeerBody::Append { previous_index: index(9), previous_term: term, commit: index(2), entries }),
            message(
                4,
                PeerBody::AppendResponse {
                    index: index(1),
                    commit: index(u64::MAX),
                    reject: true,
                    reject_hint: index(3),
                    hint_term: term,
                    request_snapshot: index(0),
                },
            ),
            message(
                5,
                PeerBody::Vote {
                    pre: true,
                    last_index: index(1),
                    last_term: term,
                    commit: index(2),
                    commit_term: term,
                    transfer: true,
                },
            ),
            message(6, PeerBody::VoteResponse { pre: false, reject: true, commit: index(2), commit_term: term }),
            message(7, PeerBody::TransferLeader),
            message(8, PeerBody::TimeoutNow),
            message(9, PeerBody::SnapshotOffer { index: index(2), index_term: term }),
            message(10, PeerBody::SnapshotAnswer { index: index(2), failed: true }),
            message(11, PeerBody::ReadIndex { request: u64::MAX }),
            message(12, PeerBody::ReadIndexAnswer { request: 1, index: index(3), refused: true }),
            message(13, PeerBody::Ended),
            heartbeat(14),
            message(15, PeerBody::HeartbeatResponse { commit: index(u64::MAX), lane: u32::MAX }),
            message(
                16,
                PeerBody::Beat(Box::new(Beat {
                    session: u64::MAX,
                    number: 2,
                    lane: 3,
                    sum: 4,
                    joins: vec![resting(5), resting(6)],
                    leaves: vec![resting(7)],
                })),
            ),
            message(
                17,
                PeerBody::BeatAnswer(Box::new(BeatAnswer {
                    session: 1,
                    number: u64::MAX,
                    lane: 2,
                    is_known: true,
                    left: vec![resting(8)],
                })),
            ),
        ]
    }

    fn shown(messages: &[GroupMessage]) -> Vec<String> {
        let mut shown: Vec<_> = messages.iter().map(|message| format!("{message:?}")).collect();
        // Messages of different kinds may change places.
        shown.sort();
        shown
    }

    fn unframed(mut chunks: Chunks) -> Chunks {
        assert_eq!(chunks.get_u8(), 0);
        assert_eq!(chunks.get_u32() as usize, chunks.remaining());
        chunks
    }

    #[test]
    fn what_is_sent_is_received() {
        let sent = all_kinds();
        let received = decode(unframed(encode(&sent))).expect("a message");
        assert!(received.hello.is_none());
        assert_eq!(shown(&received.messages), shown(&sent));
        for one in &sent {
            let received = decode(unframed(encode(std::slice::from_ref(one)))).expect("a message");
            assert_eq!(shown(&received.messages), shown(std::slice::from_ref(one)));
        }
    }

    #[test]
    fn it_is_what_the_proto_file_says() {
        let sent = all_kinds();
        let mut wire = unframed(encode(&sent));
        let bytes = wire.copy_to_bytes(wire.remaining());
        let generated = pb::StreamMessage::decode(bytes.clone()).expect("a stream message");
        assert_eq!(generated.messages.len(), sent.len() - 2);
        assert_eq!((generated.heartbeats.len(), generated.heartbeat_answers.len()), (1, 1));
        let again = decode(Bytes::from(generated.encode_to_vec())).expect("a message");
        assert_eq!(shown(&again.messages), shown(&sent));
        let Some(Body::Append(append)) = &generated.messages[1].body else { panic!("{:?}", generated.messages[1]) };
        assert_eq!(
            append.entries.iter().map(|entry| entry.data.len()).collect::<Vec<_>>(),
            [0, 1, COPY_BYTES_MAX, COPY_BYTES_MAX + 1, 300_000]
        );
    }

    #[test]
    fn batches_are_copied_neither_out_nor_in() {
        let pointers = |messages: &[GroupMessage]| -> Vec<*const u8> {
            let PeerBody::Append { entries, .. } = &messages[0].message.body else { panic!("{messages:?}") };
            entries.iter().map(|entry| entry_parts(entry).1.as_ptr()).collect()
        };
        let sent = [append(1, &[100_000, 5_000])];
        let mut wire = unframed(encode(&sent));
        let mut pieces = Vec::new();
        while wire.has_remaining() {
            let piece = wire.copy_to_bytes(wire.chunk().len());
            pieces.push(piece.as_ptr());
        }
        assert!(pointers(&sent).iter().all(|batch| pieces.contains(batch)), "sent by reference");

        let mut wire = unframed(encode(&sent));
        let whole = wire.copy_to_bytes(wire.remaining());
        let mut frame = Chunks::default();
        frame.push(whole.clone());
        let received = decode(frame).expect("a message").messages;
        let range = whole.as_ptr_range();
        assert!(pointers(&received).iter().all(|batch| range.contains(batch)), "received as parts of the frame");
    }

    #[test]
    fn frames_may_be_cut_anywhere() {
        let sent = [append(2, &[1, COPY_BYTES_MAX + 1, 10]), heartbeat(3)];
        let mut wire = unframed(encode(&sent));
        let whole = wire.copy_to_bytes(wire.remaining());
        for cut in (0..whole.len()).step_by(7) {
            let mut chunks = Chunks::default();
            chunks.push(whole.slice(..cut));
            chunks.push(whole.slice(cut..));
            assert_eq!(shown(&decode(chunks).expect("a message").messages), shown(&sent));
        }
    }

    #[test]
    fn parts_are_counted() {
        // A message of two bytes becomes one of more than a hundred.
        let empty_entries = |count: usize| {
            let append = [[0x22, 0].repeat(count)].concat();
            let mut message = vec![0x3a];
            encode_varint(append.len() as u64, &mut message);
            message.extend(append);
            let mut stream = vec![0x12];
            encode_varint(message.len() as u64, &mut stream);
            stream.extend(message);
            stream
        };
        assert!(decode(&empty_entries(ITEMS_MAX - 1)[..]).is_ok());
        assert!(decode(&empty_entries(ITEMS_MAX)[..]).is_err());
        // Message, beat, groups that join: 2 bytes each.
        let empty_groups = |count: usize| {
            let mut stream = [0x2a, 0].repeat(count);
            for tag in [&[0xa2, 0x01][..], &[0x12]] {
                let mut outer = tag.to_vec();
                encode_varint(stream.len() as u64, &mut outer);
                outer.append(&mut stream);
                stream = outer;
            }
            stream
        };
        assert!(decode(&empty_groups(ITEMS_MAX - 1)[..]).is_ok());
        assert!(decode(&empty_groups(ITEMS_MAX)[..]).is_err());
        let rows = [0x1a, 0].repeat(ITEMS_MAX + 1);
        assert!(decode(&rows[..rows.len() - 2]).is_ok());
        assert!(decode(&rows[..]).is_err());
    }

    /// Any bytes: no panic, and no memory beyond what the bounds say (the decoder reserves nothing that is not there).
    #[test]
    fn mutated_messages_are_refused_or_read() {
        let mut rng = StdRng::seed_from_u64(54);
        let originals: Vec<Vec<u8>> = all_kinds()
            .chunks(3)
            .map(|kinds| {
                let small: Vec<_> = kinds.iter().filter(|message| bytes_of(message) < 50_000).cloned().collect();
                let mut wire = unframed(encode(&small));
                wire.copy_to_bytes(wire.remaining()).to_vec()
            })
            .collect();
        let (mut read, mut refused) = (0, 0);
        for round in 0..20_000 {
            let mut bytes = originals[round % originals.len()].clone();
            for _ in 0..rng.random_range(1..4) {
                if bytes.is_empty() {
                    break;
                }
                let at = rng.random_range(0..bytes.len());
                match rng.random_range(0..5) {
                    0 => bytes[at] ^= 1 << rng.random_range(0..8),
                    1 => bytes[at] = rng.random(),
                    2 => bytes.truncate(at),
                    3 => {
                        let end = rng.random_range(at..bytes.len().min(at + 20));
                        bytes.extend_from_within(at..end);
                    }
                    _ => {
                        bytes.drain(at..(at + 1 + at % 5).min(bytes.len()));
                    }
                }
            }
            let mut chunks = Chunks::default();
            let cut = rng.random_range(0..=bytes.len());
            chunks.push(Bytes::copy_from_slice(&bytes[..cut]));
            chunks.push(Bytes::copy_from_slice(&bytes[cut..]));
            match decode(chunks) {
                Ok(received) => {
                    assert!(received.messages.len() <= bytes.len() / 2);
                    read += 1;
                }
                Err(_) => refused += 1,
            }
        }
        assert!(read > 100 && refused > 100, "{read} read, {refused} refused: the mutations say little");
    }
}
