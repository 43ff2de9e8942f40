//! A topic of which the last record of each key is kept: who writes it, and who reads it from the beginning again and again
//! while it is compacted. What is kept, what may be gone, and for how long a deletion is told, is held against what was
//! written.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::record::records;
use flowstone_protocol::{BatchHeader, Compression, Offset, ProducerEpoch, ProducerId, RecordBatchBuilder, Sequence};
use flowstone_replication::{Acks, ReadAnswer, ReadRequest};

use super::clients::{Client, Operation, READ_BYTES, Request};
use super::groups::Kind;
use super::outbox::Answer;
use super::world::World;

/// How long a deletion is told after it was first cleaned.
pub(crate) const TOMBSTONES_KEPT: Duration = Duration::from_secs(4);
/// Who reads everything of one replica within this time is told of every deletion, whatever its broker's clock.
const TOLD_WITHIN: Duration = Duration::from_secs(3);
/// Keys that are written again and again; besides, each has some that are written once.
const KEYS: u64 = 5;
const WRITERS: i64 = 2;

/// A key, and what was written: a number that no other record has, or that the key is deleted.
type Written = (u64, Option<u64>);

/// All that was ever written, as far as it was acknowledged, and what was read.
#[derive(Debug, Default)]
pub(crate) struct KeyedLog {
    written: BTreeMap<i64, Written>,
    /// What is at an offset, as somebody read it.
    read: BTreeMap<i64, Written>,
    /// Records on their way, by key.
    under_way: BTreeMap<u64, usize>,
    numbers: u64,
}

impl KeyedLog {
    /// The last word about each key.
    fn last(&self) -> BTreeMap<u64, (i64, Option<u64>)> {
        self.written.iter().map(|(&offset, &(key, number))| (key, (offset, number))).collect()
    }
}

#[derive(Debug)]
pub(crate) struct KeyedWriter {
    id: i64,
    sequence: i32,
    believes: usize,
    batch: Option<(Bytes, BatchHeader, Vec<Written>)>,
    is_asked: bool,
}

/// Reads from the beginning to the end.
#[derive(Debug)]
pub(crate) struct KeyedReader {
    position: Offset,
    began: Duration,
    found: BTreeMap<u64, (i64, Option<u64>)>,
    /// Which broker the first part was of, and how many replicas had been copied from others by then; whether another part
    /// may be of another replica's files. Each is cleaned by itself: what one has still, another one has told the end of.
    first: Option<(usize, u64)>,
    is_mixed: bool,
    /// The last one, of this broker.
    pinned: Option<usize>,
    believes: usize,
    is_asked: bool,
    is_done: bool,
}

impl KeyedWriter {
    pub(crate) fn is_done(&self) -> bool {
        self.batch.is_none()
    }
}

impl KeyedReader {
    pub(crate) fn is_done(&self) -> bool {
        self.pinned.is_none() || self.is_done
    }
}

impl World {
    pub(crate) fn make_keyed(&mut self) {
        if !self.plan.keyed {
            return;
        }
        for id in 0..WRITERS {
            let believes = self.random.index(self.plan.brokers);
            self.add_client(Client::KeyedWriter(KeyedWriter {
                id: 100 + id,
                sequence: 0,
                believes,
                batch: None,
                is_asked: false,
            }));
        }
        self.add_keyed_reader(None);
    }

    fn add_keyed_reader(&mut self, pinned: Option<usize>) {
        let believes = pinned.unwrap_or_else(|| self.random.index(self.plan.brokers));
        self.add_client(Client::KeyedReader(KeyedReader {
            position: Offset::ZERO,
            began: self.now,
            found: BTreeMap::new(),
            first: None,
            is_mixed: false,
            pinned,
            believes,
            is_asked: false,
            is_done: false,
        }));
    }

    /// Every replica is read once more when nothing is written any more.
    pub(crate) fn read_keyed(&mut self) {
        let Some(group) = self.group_with(Kind::Keyed) else { return };
        let brokers: Vec<usize> = self.groups[group].wanted.iter().map(|place| place.broker).collect();
        for broker in brokers {
            self.add_keyed_reader(Some(broker));
        }
    }

    pub(crate) fn on_keyed_writer(&mut self, client: usize, it: &mut KeyedWriter) -> Option<Duration> {
        let group = self.group_with(Kind::Keyed)?;
        if it.is_asked {
            return None;
        }
        if it.batch.is_none() {
            if self.stops_sending {
                return None;
            }
            let written = self.new_keyed(it.id as u64);
            let sequence = Sequence::new(it.sequence);
            let mut builder = RecordBatchBuilder::new(Compression::None).producer(
                ProducerId::new(it.id),
                ProducerEpoch::new(0),
                sequence,
            );
            let wall = self.brokers[0].clock.wall();
            for (key, number) in &written {
                let value = number.map(|number| format!("{number}"));
                let appended =
                    builder.append(wall, Some(format!("{key}").as_bytes()), value.as_deref().map(str::as_bytes), []);
                appended.expect("a few records are far below any limit");
            }
            it.sequence += written.len() as i32;
            let batch = builder.build();
            let header = BatchHeader::parse(&batch).expect("just built");
            it.batch = Some((batch, header, written));
        }
        let (batch, header, _) = it.batch.as_ref()?;
        let request = Request::Produce { batch: batch.clone(), header: *header, acks: Acks::Quorum };
        it.is_asked = true;
        self.ask(client, group, it.believes, request, 0, None);
        None
    }

    /// Some records: mostly of few keys, some of them deletions.
    fn new_keyed(&mut self, writer: u64) -> Vec<Written> {
        let count = 1 + self.random.below(4);
        let log = &mut self.keyed;
        let mut written = Vec::new();
        for _ in 0..count {
            log.numbers += 1;
            // Those of another writer's keys, too: the order of both is the log's.
            let key = match self.random.below(12) {
                0 => 1_000 * (writer + 1) + log.numbers / 16,
                _ => self.random.below(KEYS),
            };
            let number = (!self.random.one_in(5)).then_some(log.numbers);
            *log.under_way.entry(key).or_default() += 1;
            written.push((key, number));
        }
        written
    }

    pub(crate) fn on_keyed_written(
        &mut self,
        it: &mut KeyedWriter,
        operation: &Operation,
        answer: Answer,
    ) -> Option<Duration> {
        it.is_asked = false;
        let Answer::Produced(Ok(produced)) = answer else {
            it.believes = self.other_broker(operation.group, operation.broker);
            return Some(self.random.millis(5, 150));
        };
        let (_, _, written) = it.batch.take()?;
        for (number, is) in written.into_iter().enumerate() {
            let offset = produced.base_offset.get() + number as i64;
            if let Some(left) = self.keyed.under_way.get_mut(&is.0) {
                *left -= 1;
            }
            self.keyed.written.insert(offset, is);
            self.compare_keyed(offset);
        }
        Some(self.random.millis(5, 100))
    }

    /// What is written at an offset is what is read there.
    fn compare_keyed(&mut self, offset: i64) {
        if let (Some(written), Some(read)) = (self.keyed.written.get(&offset), self.keyed.read.get(&offset))
            && written != read
        {
            let what = format!("keyed: {written:?} was written at offset {offset}, and {read:?} is read there");
            self.fail(&what);
        }
    }

    pub(crate) fn on_keyed_reader(&mut self, client: usize, it: &mut KeyedReader) -> Option<Duration> {
        let group = self.group_with(Kind::Keyed)?;
        if it.is_asked || it.is_done || (self.stops_sending && it.pinned.is_none()) {
            return None;
        }
        let broker = it.pinned.unwrap_or(it.believes);
        // Little at a time, so that what is read is cleaned meanwhile.
        let bytes = if it.pinned.is_some() { READ_BYTES } else { 500 };
        let request = ReadRequest { any_replica: true, ..ReadRequest::new(it.position, bytes) };
        it.is_asked = true;
        self.ask(client, group, broker, Request::Read(request), 0, None);
        None
    }

    pub(crate) fn on_keyed_read(
        &mut self,
        it: &mut KeyedReader,
        operation: &Operation,
        answer: Answer,
    ) -> Option<Duration> {
        it.is_asked = false;
        let Answer::Read(Ok(answer)) = answer else {
            it.believes = self.other_broker(operation.group, operation.broker);
            return Some(self.random.millis(20, 200));
        };
        if !self.is_undamaged(operation.group, operation.broker, &answer) {
            it.believes = self.other_broker(operation.group, operation.broker);
            return Some(self.random.millis(20, 200));
        }
        let of = (operation.broker, self.counts.snapshots);
        it.is_mixed |= *it.first.get_or_insert(of) != of;
        self.take_keyed(it, &answer);
        if it.position < answer.high_watermark {
            return Some(self.random.micros(500, 90_000));
        }
        self.judge_keyed(it);
        self.counts.keyed_scans += 1;
        if it.pinned.is_some() && !it.is_mixed {
            it.is_done = true;
            return None;
        }
        (it.position, it.found) = (Offset::ZERO, BTreeMap::new());
        (it.first, it.is_mixed) = (None, false);
        let pause = self.random.millis(50, 500);
        it.began = self.now + pause;
        it.believes = self.random.index(self.brokers.len());
        Some(pause)
    }

    fn take_keyed(&mut self, it: &mut KeyedReader, answer: &ReadAnswer) {
        for chunk in &answer.bytes.chunks {
            for (header, bytes) in split_batches(chunk.clone()).flatten() {
                let from = it.position;
                if header.base_offset > from {
                    let to = header.base_offset;
                    self.fail(&format!("keyed: a reader at offset {from} is given a batch from {to} on"));
                }
                it.position = it.position.max(header.next_offset());
                if header.attributes.is_control() {
                    continue;
                }
                let Ok(all) = records(bytes, 1 << 20) else {
                    self.fail("keyed: a batch that was read is none");
                    return;
                };
                for record in all.flatten().filter(|record| record.offset >= from) {
                    let text =
                        |bytes: &Bytes| std::str::from_utf8(bytes).ok().and_then(|text| text.parse::<u64>().ok());
                    let offset = record.offset.get();
                    let Some(key) = record.key.as_ref().and_then(text) else {
                        self.fail(&format!("keyed: what is read at offset {offset} nobody wrote"));
                        return;
                    };
                    let number = record.value.as_ref().and_then(text);
                    let known = *self.keyed.read.entry(offset).or_insert((key, number));
                    if known != (key, number) {
                        let what = format!("keyed: offset {offset} was read as {known:?}, and as {:?}", (key, number));
                        self.fail(&what);
                    }
                    self.compare_keyed(offset);
                    it.found.insert(key, (offset, number));
                }
            }
        }
    }

    /// Somebody has read everything: of each key the last word is told, unless a newer one has come meanwhile.
    fn judge_keyed(&mut self, it: &KeyedReader) {
        // A clock that jumped may have ended the time of deletions; a scan that took long may have missed them.
        let in_time = self.now - it.began < TOLD_WITHIN && self.counts.clock_jumps == 0;
        let mut wrong = None;
        for (key, (offset, number)) in self.keyed.last() {
            let is_under_way = self.keyed.under_way.get(&key).is_some_and(|count| *count > 0);
            if is_under_way || offset >= it.position.get() {
                continue;
            }
            let found = it.found.get(&key);
            let is_well = match (number, found) {
                (_, Some(&(at, _))) if at >= offset => true,
                // It was deleted, and is gone altogether.
                (None, None) => true,
                // What was deleted was read, and its deletion was not told.
                (None, Some(_)) => it.is_mixed || !in_time && it.pinned.is_none(),
                (Some(_), _) => false,
            };
            if !is_well {
                wrong = Some(format!(
                    "keyed: the last word about key {key} is {number:?} at offset {offset}, and who read all up to {} found {found:?}",
                    it.position
                ));
            }
        }
        if let Some(wrong) = wrong {
            self.fail(&wrong);
        }
    }
}
