//! Records on their way out: whole batches whose records are slices of what came over the wire.

use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::batch::{BatchError, split_batches, verify_crc};
use flowstone_protocol::record::{headers_at, records};
use flowstone_protocol::{BatchHeader, pb};

use crate::error::{Error, ErrorCode};
use crate::group::Member;

/// One record, with memory of its own to hold on to (shared with its batch, not copied).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsumerRecord {
    /// Its topic.
    pub topic: Arc<str>,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its timestamp, in milliseconds since 1970.
    pub timestamp: i64,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value.
    pub value: Option<Bytes>,
    /// Its headers, in order, duplicates kept.
    pub headers: Vec<(Bytes, Option<Bytes>)>,
}

impl ConsumerRecord {
    /// The key's bytes, `None` for null.
    pub fn key_bytes(&self) -> Option<&[u8]> {
        self.key.as_deref()
    }

    /// The value's bytes, `None` for null.
    pub fn value_bytes(&self) -> Option<&[u8]> {
        self.value.as_deref()
    }
}

/// Records of one partition, in order, as they arrived together. Nothing is copied: the records borrow from it.
#[derive(Clone, Debug)]
pub struct RecordBatch {
    topic: Arc<str>,
    topic_id: Bytes,
    partition: i32,
    high_watermark: i64,
    start_offset: i64,
    next_offset: i64,
    /// Records of uncompressed batches are slices of the message; of compressed ones, what came out.
    chunks: Vec<Bytes>,
    places: Vec<Place>,
    /// Whose it is, where a group handed it out.
    member: Option<Member>,
}

/// Where a record lies. Positions and lengths within one chunk, which is shorter than 2 GiB; -1 is null.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: i64,
    timestamp: i64,
    chunk: u32,
    key_at: u32,
    key_bytes: i32,
    value_at: u32,
    value_bytes: i32,
    headers_at: u32,
    header_count: u32,
}

/// One record of a [`RecordBatch`], borrowed from it.
#[derive(Clone, Copy)]
pub struct RecordRef<'a> {
    batch: &'a RecordBatch,
    place: &'a Place,
}

impl RecordBatch {
    /// The topic.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    pub(crate) fn topic_id(&self) -> &Bytes {
        &self.topic_id
    }

    /// The partition.
    pub fn partition(&self) -> i32 {
        self.partition
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether it has none; those handed out have some.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// One past the last offset that could be read when it was sent.
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark
    }

    /// The offset from which on it was asked for: no record lies between it and its first record that this reader is to have.
    pub fn start_offset(&self) -> i64 {
        self.start_offset
    }

    /// Where reading goes on behind it: past its last record and past control records that follow.
    pub fn next_offset(&self) -> i64 {
        self.next_offset
    }

    /// The records.
    pub fn iter(&self) -> Records<'_> {
        Records { batch: self, places: self.places.iter() }
    }

    /// The record at this place of the batch.
    pub fn get(&self, index: usize) -> Option<RecordRef<'_>> {
        self.places.get(index).map(|place| RecordRef { batch: self, place })
    }

    fn slice(&self, chunk: u32, at: u32, bytes: i32) -> Option<&[u8]> {
        let bytes = usize::try_from(bytes).ok()?;
        self.chunks[chunk as usize].get(at as usize..at as usize + bytes)
    }

    fn share(&self, chunk: u32, at: u32, bytes: i32) -> Option<Bytes> {
        let bytes = usize::try_from(bytes).ok()?;
        Some(self.chunks[chunk as usize].slice(at as usize..at as usize + bytes))
    }

    /// Leaves out the records before `index`.
    pub(crate) fn skip_to(&mut self, index: usize) {
        self.places.drain(..index.min(self.places.len()));
    }

    pub(crate) fn set_member(&mut self, member: Member) {
        self.member = Some(member);
    }

    pub(crate) fn member(&self) -> Option<&Member> {
        self.member.as_ref()
    }

    pub(crate) fn offset_at(&self, index: usize) -> Option<i64> {
        self.places.get(index).map(|place| place.offset)
    }
}

impl<'a> RecordRef<'a> {
    /// Its topic.
    pub fn topic(&self) -> &'a str {
        &self.batch.topic
    }

    /// Its partition.
    pub fn partition(&self) -> i32 {
        self.batch.partition
    }

    /// Its offset.
    pub fn offset(&self) -> i64 {
        self.place.offset
    }

    /// Its timestamp, in milliseconds since 1970.
    pub fn timestamp(&self) -> i64 {
        self.place.timestamp
    }

    /// The key's bytes, `None` for null.
    pub fn key_bytes(&self) -> Option<&'a [u8]> {
        self.batch.slice(self.place.chunk, self.place.key_at, self.place.key_bytes)
    }

    /// The value's bytes, `None` for null.
    pub fn value_bytes(&self) -> Option<&'a [u8]> {
        self.batch.slice(self.place.chunk, self.place.value_at, self.place.value_bytes)
    }

    /// Its headers, in order, duplicates kept.
    pub fn headers(&self) -> impl Iterator<Item = (&'a [u8], Option<&'a [u8]>)> + use<'a> {
        let chunk = &self.batch.chunks[self.place.chunk as usize];
        headers_at(chunk, self.place.headers_at as usize, self.place.header_count as usize)
    }

    /// The same record to hold on to: it shares the batch's memory, and keeps all of it alive.
    pub fn to_record(&self) -> ConsumerRecord {
        let Self { batch, place } = self;
        let chunk = &batch.chunks[place.chunk as usize];
        ConsumerRecord {
            topic: batch.topic.clone(),
            partition: batch.partition,
            offset: place.offset,
            timestamp: place.timestamp,
            key: batch.share(place.chunk, place.key_at, place.key_bytes),
            value: batch.share(place.chunk, place.value_at, place.value_bytes),
            headers: self
                .headers()
                .map(|(key, value)| (chunk.slice_ref(key), value.map(|v| chunk.slice_ref(v))))
                .collect(),
        }
    }
}

impl std::fmt::Debug for RecordRef<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordRef")
            .field("topic", &self.topic())
            .field("partition", &self.partition())
            .field("offset", &self.offset())
            .field("key", &self.key_bytes())
            .field("value", &self.value_bytes())
            .finish_non_exhaustive()
    }
}

/// The records of a [`RecordBatch`].
#[derive(Clone, Debug)]
pub struct Records<'a> {
    batch: &'a RecordBatch,
    places: std::slice::Iter<'a, Place>,
}

impl<'a> Iterator for Records<'a> {
    type Item = RecordRef<'a>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        self.places.next().map(|place| RecordRef { batch: self.batch, place })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.places.size_hint()
    }
}

impl ExactSizeIterator for Records<'_> {}

impl<'a> IntoIterator for &'a RecordBatch {
    type Item = RecordRef<'a>;
    type IntoIter = Records<'a>;

    fn into_iter(self) -> Records<'a> {
        self.iter()
    }
}

/// What of a partition's bytes is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// First offset wanted; a batch may begin before it.
    pub(crate) from: i64,
    /// First offset not wanted any more.
    pub(crate) until: i64,
    /// Cap of what one batch may decompress to.
    pub(crate) decompressed_bytes_max: usize,
}

/// Transactions that were aborted and have batches in a message, as its broker tells them: by producer, where each begins.
/// One ends with its producer's next abort marker.
#[derive(Debug, Default)]
pub(crate) struct Aborted {
    /// Those that begin further on, by first offset, the next one last.
    ahead: Vec<(i64, i64)>,
    /// Producers within one.
    within: Vec<i64>,
}

impl Aborted {
    pub(crate) fn new(told: &[pb::AbortedTransaction]) -> Self {
        let mut ahead: Vec<_> = told.iter().map(|aborted| (aborted.first_offset, aborted.producer_id)).collect();
        ahead.sort_unstable_by(|a, b| b.cmp(a));
        Self { ahead, within: Vec::new() }
    }

    /// Whether this batch, the next one in the log, belongs to an aborted transaction.
    fn has(&mut self, header: &BatchHeader) -> bool {
        while let Some((_, producer)) = self.ahead.pop_if(|(first, _)| *first < header.next_offset().get()) {
            if !self.within.contains(&producer) {
                self.within.push(producer);
            }
        }
        header.attributes.is_transactional() && self.within.contains(&header.producer_id.get())
    }

    /// A control batch of this producer that aborts.
    fn ended(&mut self, producer: i64) {
        self.within.retain(|within| *within != producer);
    }
}

/// Key of the control record that ends a transaction: version and type, `i16` each. Type 0 aborts, 1 commits.
fn is_abort_marker(bytes: Bytes, decompressed_bytes_max: usize) -> std::result::Result<bool, BatchError> {
    let Some(record) = records(bytes, decompressed_bytes_max)?.next() else { return Ok(false) };
    Ok(record?.key.is_some_and(|key| key.get(2..4) == Some(&[0, 0])))
}

/// What was in a message, and where reading goes on.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(crate) batch: RecordBatch,
    /// Leader epoch of the last batch, -1 where there was none.
    pub(crate) last_epoch: i32,
    /// What stopped the decoding early: what was read before it stands.
    pub(crate) failure: Option<Error>,
}

/// Takes a message apart: checks every CRC, skips control batches, finds every record.
///
/// Batches of `aborted` transactions are passed over.
pub(crate) fn decode(
    topic: &Arc<str>,
    (topic_id, partition): (&Bytes, i32),
    bytes: Bytes,
    high_watermark: i64,
    wanted: Wanted,
    mut aborted: Aborted,
) -> Decoded {
    let mut batch = RecordBatch {
        topic: topic.clone(),
        topic_id: topic_id.clone(),
        partition,
        high_watermark,
        start_offset: wanted.from,
        next_offset: wanted.from,
        chunks: Vec::new(),
        places: Vec::new(),
        member: None,
    };
    let mut last_epoch = -1;
    let mut failure = None;
    for item in split_batches(bytes) {
        match item.and_then(|(header, bytes)| {
            if header.next_offset().get() <= batch.next_offset || batch.next_offset >= wanted.until {
                return Ok(());
            }
            verify_crc(&bytes)?;
            let is_aborted = aborted.has(&header);
            if header.attributes.is_control() {
                if is_aborted && is_abort_marker(bytes, wanted.decompressed_bytes_max)? {
                    aborted.ended(header.producer_id.get());
                }
            } else if !is_aborted {
                add_records(&mut batch, bytes, wanted)?;
            }
            last_epoch = header.leader_epoch.get();
            batch.next_offset = header.next_offset().get();
            Ok(())
        }) {
            Ok(()) => {}
            Err(error) => {
                failure = Some(broken(topic, partition, batch.next_offset, error));
                break;
            }
        }
    }
    Decoded { batch, last_epoch, failure }
}

fn add_records(into: &mut RecordBatch, bytes: Bytes, wanted: Wanted) -> std::result::Result<(), BatchError> {
    let mut iter = records(bytes, wanted.decompressed_bytes_max)?;
    let chunk = into.chunks.len() as u32;
    let first = into.places.len();
    // A record takes 7 bytes at least, so a lying count reserves no more than the bytes that are there allow.
    let most = (iter.header().record_count.max(0) as usize).min(iter.record_bytes().len() / 7);
    into.places.reserve(most);
    // Positions fit: a batch's length is an i32, and so is the cap of what it decompresses to.
    let span = |span: Option<(usize, usize)>| span.map_or((0, -1), |(at, bytes)| (at as u32, bytes as i32));
    while let Some(layout) = iter.next_layout() {
        let layout = match layout {
            Ok(layout) => layout,
            Err(error) => {
                into.places.truncate(first);
                return Err(error);
            }
        };
        let offset = layout.offset.get();
        if offset < wanted.from || offset >= wanted.until {
            continue;
        }
        let (key_at, key_bytes) = span(layout.key);
        let (value_at, value_bytes) = span(layout.value);
        into.places.push(Place {
            offset,
            timestamp: layout.timestamp.get(),
            chunk,
            key_at,
            key_bytes,
            value_at,
            value_bytes,
            headers_at: layout.headers_at as u32,
            header_count: layout.header_count as u32,
        });
    }
    into.chunks.push(iter.record_bytes().clone());
    Ok(())
}

fn broken(topic: &str, partition: i32, offset: i64, error: BatchError) -> Error {
    let told = match &error {
        BatchError::DecompressedTooLarge { bytes_max } => Error::new(
            ErrorCode::BatchTooLarge,
            format!(
                "the record batch at offset {offset} decompresses to more than {bytes_max} bytes; raise the consumer's \
                 decompressed_bytes_max, or seek past it"
            ),
        ),
        _ => Error::new(
            ErrorCode::CorruptBatch,
            format!("the record batch at offset {offset} is damaged: {error}; read it again, or seek past it"),
        ),
    };
    told.at(topic, partition).caused_by(error)
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::batch::{crc_of, stamped_prefix};
    use flowstone_protocol::{
        Compression, LeaderEpoch, Offset, ProducerEpoch, ProducerId, RecordBatchBuilder, Sequence, Timestamp,
    };

    use super::*;

    fn stamped(base: i64, epoch: i32, batch: &[u8]) -> Vec<u8> {
        let mut bytes = batch.to_vec();
        let prefix = stamped_prefix(batch, Offset::new(base), LeaderEpoch::new(epoch));
        bytes[..16].copy_from_slice(&prefix);
        bytes
    }

    fn values(base: i64, values: &[&str], compression: Compression) -> Vec<u8> {
        let mut builder = RecordBatchBuilder::new(compression);
        for (value, step) in values.iter().zip(0..) {
            let headers = [(&b"h"[..], Some(value.as_bytes())), (&b"h"[..], None)];
            builder.append(Timestamp::new(1000 + step), None, Some(value.as_bytes()), headers).unwrap();
        }
        stamped(base, 3, &builder.build())
    }

    fn control(base: i64) -> Vec<u8> {
        use flowstone_protocol::{ControlType, RaftIndex, Term, control};
        let no_op = control::encode_control(
            ControlType::NoOp,
            Term::new(4),
            RaftIndex::new(base as u64),
            Offset::new(base),
            &[],
            0,
        );
        no_op.to_vec()
    }

    fn wanted(from: i64, until: i64) -> Wanted {
        Wanted { from, until, decompressed_bytes_max: 1 << 20 }
    }

    fn read(bytes: Vec<u8>, wanted: Wanted) -> Decoded {
        decode(&"t".into(), (&Bytes::new(), 5), bytes.into(), 100, wanted, Aborted::default())
    }

    fn texts(batch: &RecordBatch) -> Vec<(i64, String)> {
        let text = |record: RecordRef<'_>| String::from_utf8(record.value_bytes().unwrap().to_vec()).unwrap();
        batch.iter().map(|record| (record.offset(), text(record))).collect()
    }

    #[test]
    fn batches_of_every_codec_come_out_as_one_and_control_batches_are_passed() {
        let mut bytes = Vec::new();
        let mut base = 0;
        for codec in Compression::ALL {
            bytes.extend(values(base, &["a", "b"], codec));
            bytes.extend(control(base + 2));
            base += 3;
        }
        let decoded = read(bytes, wanted(0, i64::MAX));
        assert!(decoded.failure.is_none());
        assert_eq!(decoded.batch.len(), 10);
        assert_eq!((decoded.batch.next_offset(), decoded.last_epoch), (15, 4));
        for (index, (offset, text)) in texts(&decoded.batch).into_iter().enumerate() {
            assert_eq!(offset, (index / 2 * 3 + index % 2) as i64);
            assert_eq!(text, ["a", "b"][index % 2]);
        }
        let record = decoded.batch.get(3).unwrap().to_record();
        assert_eq!((record.topic.as_ref(), record.partition, record.timestamp, record.key), ("t", 5, 1001, None));
        assert_eq!(record.headers, [("h".into(), Some("b".into())), ("h".into(), None)]);
    }

    #[test]
    fn only_what_is_wanted_comes_out() {
        let mut bytes = values(0, &["a", "b", "c"], Compression::None);
        bytes.extend(values(3, &["d", "e", "f"], Compression::Lz4));
        bytes.extend(values(6, &["g"], Compression::None));
        let decoded = read(bytes, wanted(2, 5));
        assert_eq!(texts(&decoded.batch), [(2, "c".into()), (3, "d".into()), (4, "e".into())]);
        assert!(decoded.batch.next_offset() >= 5);
    }

    #[test]
    fn a_flipped_bit_is_told_with_its_offset_and_what_came_before_it_stands() {
        let mut bytes = values(0, &["a", "b"], Compression::None);
        let at = bytes.len() + 70;
        bytes.extend(values(2, &["c", "d"], Compression::None));
        bytes[at] ^= 4;
        let decoded = read(bytes, wanted(0, i64::MAX));
        assert_eq!(texts(&decoded.batch), [(0, "a".into()), (1, "b".into())]);
        assert_eq!(decoded.batch.next_offset(), 2);
        let error = decoded.failure.unwrap();
        assert_eq!((error.code(), error.partition()), (ErrorCode::CorruptBatch, Some(5)));
        assert!(error.to_string().contains("offset 2"), "{error}");
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut builder = RecordBatchBuilder::new(Compression::Zstd);
        builder.append(Timestamp::new(1), None, Some(&vec![0; 3 << 20]), []).unwrap();
        let decoded = read(stamped(0, 1, &builder.build()), wanted(0, i64::MAX));
        assert!(decoded.failure.is_some() && decoded.batch.is_empty());
    }

    #[test]
    fn records_share_the_messages_memory() {
        let bytes = Bytes::from(values(0, &["abc"], Compression::None));
        let range = bytes.as_ptr_range();
        let decoded = decode(&"t".into(), (&Bytes::new(), 0), bytes, 1, wanted(0, i64::MAX), Aborted::default());
        let value = decoded.batch.get(0).unwrap().to_record().value.unwrap();
        assert!(range.contains(&value.as_ptr()));
    }

    fn transactional(base: i64, producer: i64, text: &str) -> Vec<u8> {
        let mut builder = RecordBatchBuilder::new(Compression::None)
            .producer(ProducerId::new(producer), ProducerEpoch::new(0), Sequence::new(0))
            .transactional();
        builder.append(Timestamp::new(1), None, Some(text.as_bytes()), []).unwrap();
        stamped(base, 3, &builder.build())
    }

    fn marker(base: i64, producer: i64, commit: bool) -> Vec<u8> {
        let mut builder = RecordBatchBuilder::new(Compression::None)
            .producer(ProducerId::new(producer), ProducerEpoch::new(1), Sequence::new(-1))
            .transactional();
        let key = [0, 0, 0, u8::from(commit)];
        builder.append(Timestamp::new(1), Some(&key), Some(&[0; 6]), []).unwrap();
        let mut batch = builder.build().to_vec();
        // The control bit, which no producer sets.
        batch[22] |= 0x20;
        let crc = crc_of(&batch).to_be_bytes();
        batch[17..21].copy_from_slice(&crc);
        stamped(base, 3, &batch)
    }

    #[test]
    fn what_was_aborted_is_passed_over_up_to_its_marker() {
        let log = [
            transactional(0, 7, "a"),
            transactional(1, 8, "b"),
            values(2, &["plain"], Compression::None),
            transactional(3, 7, "c"),
            marker(4, 7, false),
            transactional(5, 7, "d"),
            marker(6, 8, true),
            marker(7, 7, true),
            transactional(8, 7, "e"),
            marker(9, 7, false),
        ];
        let aborted = |told: &[(i64, i64)]| {
            let one = |&(producer_id, first_offset): &(i64, i64)| pb::AbortedTransaction { producer_id, first_offset };
            Aborted::new(&told.iter().map(one).collect::<Vec<_>>())
        };
        let read = |from: usize, aborted: Aborted| {
            let bytes: Vec<u8> = log[from..].concat();
            let decoded =
                decode(&"t".into(), (&Bytes::new(), 0), bytes.into(), 10, wanted(from as i64, i64::MAX), aborted);
            assert!(decoded.failure.is_none());
            assert_eq!(decoded.batch.next_offset(), 10);
            texts(&decoded.batch).into_iter().map(|(_, text)| text).collect::<Vec<_>>()
        };
        assert_eq!(read(0, aborted(&[(7, 0), (7, 8)])), ["b", "plain", "d"]);
        assert_eq!(read(0, aborted(&[(7, 8), (7, 0), (8, 1)])), ["plain", "d"], "in any order");
        assert_eq!(read(3, aborted(&[(7, 0), (7, 8)])), ["d"], "one that began before");
        assert_eq!(read(0, Aborted::default()), ["a", "b", "plain", "c", "d", "e"]);
    }
}
