//! Transactions as one replica sees them: markers, readers of what is committed, and what a clock says of producers.

mod shell;

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use flowstone_protocol::control::decode_marker;
use flowstone_protocol::{
    BatchHeader, Compression, ControlType, Error, ErrorCode, LeaderEpoch, Marker, Offset, ProducerEpoch, ProducerId,
    RaftIndex, RecordBatchBuilder, Sequence, Term, Timestamp,
};
use flowstone_replication::{
    Acks, Admission, Commanded, Event, LogConfig, Machine, MachineBody, MachineEntry, ReadAnswer, ReadRequest,
};
use flowstone_storage::{Disk, RealDisk};
use shell::{Answer, Shell, answered, config, create, reply, unanswered};

/// One producer's transactions, as simply as can be.
#[derive(Debug, Default)]
struct OneProducer {
    open: Option<Offset>,
    aborted: Vec<(ProducerId, Offset)>,
    last: Option<(Marker, RaftIndex)>,
    forgotten: Vec<Bytes>,
}

impl OneProducer {
    fn marker(entry: &MachineEntry<'_>) -> Option<Marker> {
        match entry.body {
            MachineBody::Records(batch) if entry.header.attributes.is_control() => {
                Some(decode_marker(batch).expect("a marker"))
            }
            _ => None,
        }
    }
}

impl Machine for OneProducer {
    type Command = ();
    type Reply = ();

    fn admit(&mut self, _batch: &BatchHeader, _now: Timestamp) -> Admission {
        Admission::Append
    }

    fn admit_marker(&mut self, marker: &Marker, _now: Timestamp) -> Admission {
        match self.last {
            Some((last, index)) if last == *marker => {
                Admission::Duplicate { base_offset: Offset::ZERO, index, timestamp: Timestamp::NONE }
            }
            Some((last, _)) if last.producer_epoch >= marker.producer_epoch => {
                Admission::Refuse(Error::new(ErrorCode::ProducerFenced, "an old one"))
            }
            _ => Admission::Append,
        }
    }

    fn expired(&mut self, now: Timestamp) -> Option<Bytes> {
        (now.get() >= 2_000_000 && self.forgotten.is_empty()).then(|| Bytes::from_static(b"idle"))
    }

    fn may_expire(&self) -> bool {
        true
    }

    fn last_stable_offset(&self, high_watermark: Offset) -> Offset {
        self.open.map_or(high_watermark, |open| open.min(high_watermark))
    }

    fn aborted_between(&self, _from: Offset, to: Offset) -> Vec<(ProducerId, Offset)> {
        self.aborted.iter().filter(|(_, first)| *first < to).copied().collect()
    }

    fn appended(&mut self, entry: &MachineEntry<'_>) {
        if let Some(marker) = Self::marker(entry) {
            self.last = Some((marker, entry.index));
        }
    }

    fn committed(&mut self, entry: &MachineEntry<'_>) {
        if let MachineBody::Control { ctype: ControlType::ProducerExpiry, payload } = entry.body {
            self.forgotten.push(payload.clone());
        } else if let Some(marker) = Self::marker(entry) {
            self.last = Some((marker, entry.index));
            if let (Some(first), false) = (self.open.take(), marker.commit) {
                self.aborted.push((marker.producer_id, first));
            }
        } else if entry.header.attributes.is_transactional() {
            self.open.get_or_insert(entry.base_offset);
        }
    }

    fn command(&mut self, (): (), _now: Timestamp) -> Commanded<()> {
        Commanded { batch: None, reply: () }
    }

    fn lead(&mut self, _term: Term) {}

    fn step_down(&mut self) {}

    fn reads_records(&self) -> bool {
        false
    }

    fn checkpoint(&self) -> Bytes {
        Bytes::new()
    }

    fn restore(&mut self, _checkpoint: &[u8]) -> Result<(), Error> {
        *self = Self::default();
        Ok(())
    }
}

struct Place {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    _temporary: tempfile::TempDir,
}

fn place() -> Place {
    let temporary = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::with_process_limit());
    let dir = temporary.path().join("replica");
    create(&disk, &dir, 1, &[1]);
    Place { disk, dir, _temporary: temporary }
}

impl Place {
    fn open(&self) -> Shell<OneProducer> {
        Shell::open(&self.disk, &self.dir, LogConfig::default(), None, OneProducer::default(), config(1)).unwrap()
    }

    fn leader(&self) -> Shell<OneProducer> {
        let mut shell = self.open();
        shell.step([Event::Campaign]);
        shell
    }
}

fn write(shell: &mut Shell<OneProducer>, transactional: bool) -> i64 {
    let mut batch = RecordBatchBuilder::new(Compression::None);
    if transactional {
        batch = batch.producer(ProducerId::new(7), ProducerEpoch::new(0), Sequence::new(0)).transactional();
    }
    batch.append(Timestamp::new(1_000), None, Some(b"value"), []).unwrap();
    let batch = batch.build();
    let header = BatchHeader::parse(&batch).unwrap();
    answered(shell.produce((batch, header), Acks::Quorum)).unwrap().base_offset.get()
}

fn end(shell: &mut Shell<OneProducer>, epoch: i16, commit: bool) -> Answer<()> {
    let marker = Marker {
        producer_id: ProducerId::new(7),
        producer_epoch: ProducerEpoch::new(epoch),
        commit,
        coordinator_epoch: LeaderEpoch::new(1),
    };
    let (reply, answer) = reply();
    shell.step([Event::Marker { marker, reply }]);
    answer
}

fn read(shell: &mut Shell<OneProducer>, from: i64, committed: bool, wait: bool) -> Answer<ReadAnswer> {
    let (reply, answer) = reply();
    let request = ReadRequest { committed, wait, ..ReadRequest::new(Offset::new(from), 1 << 20) };
    shell.step([Event::Read { request, reply }]);
    answer
}

/// Where the bytes end, the last stable offset, the high watermark, and what was aborted among them.
fn seen(answer: Answer<ReadAnswer>) -> (i64, i64, i64, Vec<(i64, i64)>) {
    let ReadAnswer { bytes, high_watermark, last_stable_offset, aborted, .. } = answered(answer).unwrap();
    bytes.verify().unwrap();
    let aborted = aborted.iter().map(|(producer, first)| (producer.get(), first.get())).collect();
    (bytes.next.get(), last_stable_offset.get(), high_watermark.get(), aborted)
}

#[test]
fn readers_of_what_is_committed_wait_at_the_last_stable_offset() {
    let place = place();
    let mut shell = place.leader();
    assert_eq!((write(&mut shell, false), write(&mut shell, true), write(&mut shell, false)), (1, 2, 3));
    assert_eq!(shell.replica.status().last_stable_offset, Offset::new(2));
    let answer = read(&mut shell, 0, true, true);
    assert_eq!(seen(answer), (2, 2, 4, vec![]));
    let answer = read(&mut shell, 0, false, true);
    assert_eq!(seen(answer), (4, 2, 4, vec![]), "all of it, without a wish for what is committed alone");
    for from in [2, 3, 4] {
        let answer = read(&mut shell, from, true, false);
        assert_eq!(seen(answer), (from, 2, 4, vec![]), "nothing yet, and nothing wrong");
    }
    let (at, within) = (read(&mut shell, 2, true, true), read(&mut shell, 3, true, true));
    let (at, within) = (unanswered(at), unanswered(within));
    assert_eq!(write(&mut shell, false), 4);
    let (at, within) = (unanswered(at), unanswered(within));
    answered(end(&mut shell, 1, false)).unwrap();
    assert_eq!(seen(at), (6, 6, 6, vec![(7, 2)]));
    assert_eq!(seen(within), (6, 6, 6, vec![(7, 2)]));
    assert_eq!(shell.replica.status().records, 4, "a marker is no record");
}

#[test]
fn a_marker_is_answered_once_it_is_committed() {
    let place = place();
    let mut shell = place.open();
    assert_eq!(answered(end(&mut shell, 1, true)).unwrap_err().code, ErrorCode::LeaderNotReady);
    shell.step([Event::Campaign]);
    write(&mut shell, true);
    shell.holds_flushes = true;
    let first = end(&mut shell, 1, true);
    let again = end(&mut shell, 1, true);
    let (first, again) = (unanswered(first), unanswered(again));
    shell.holds_flushes = false;
    shell.work();
    answered(first).unwrap();
    answered(again).unwrap();
    answered(end(&mut shell, 1, true)).unwrap();
    assert_eq!(shell.replica.status().end_offset, Offset::new(3), "it is there once");
    assert_eq!(answered(end(&mut shell, 0, true)).unwrap_err().code, ErrorCode::ProducerFenced);
}

#[test]
fn a_replica_that_is_opened_anew_knows_its_transactions() {
    let place = place();
    let mut shell = place.leader();
    write(&mut shell, true);
    answered(end(&mut shell, 1, false)).unwrap();
    write(&mut shell, true);
    let hard_state = shell.hard_state;
    drop(shell);
    let mut shell =
        Shell::open(&place.disk, &place.dir, LogConfig::default(), hard_state, OneProducer::default(), config(1))
            .unwrap();
    shell.step([Event::Campaign]);
    assert_eq!(shell.replica.status().last_stable_offset, Offset::new(3));
    let answer = read(&mut shell, 0, true, true);
    assert_eq!(seen(answer), (3, 3, 5, vec![(7, 1)]));
}

#[test]
fn what_the_leaders_clock_says_of_producers_is_in_the_log() {
    let place = place();
    let mut shell = place.leader();
    shell.step([Event::Retain]);
    assert!(shell.replica.machine().forgotten.is_empty());
    shell.now = Timestamp::new(2_000_000);
    shell.step([Event::Retain, Event::Retain]);
    assert_eq!(shell.replica.machine().forgotten, [&b"idle"[..], &b"idle"[..]], "said until it is committed");
    shell.step([Event::Retain]);
    assert_eq!(shell.replica.machine().forgotten.len(), 2);
}
