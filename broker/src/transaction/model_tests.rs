//! Two instances of one transactional id, a coordinator and partitions that change their leaders, and a network that
//! delays, repeats and loses: in random order, with the very machines that run, and what must hold whatever happens.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::control::encode_marker;
use flowstone_protocol::{
    BatchHeader, Compression, ErrorCode, LeaderEpoch, Marker, Offset, ProducerEpoch, ProducerId, RaftIndex,
    RecordBatchBuilder, Sequence, Term, Timestamp,
};
use flowstone_replication::{Admission, MachineBody, MachineEntry};
use rand::rngs::SmallRng;
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};

use super::commands::{Addition, TransactionCommand, TransactionReply};
use super::records::TransactionRecord;
use super::state::{Decision, TransactionTable};
use super::table_tests::{apply, table, tp};
use crate::coordinator::StateMachine;
use crate::producers::Producers;

const PARTITIONS: usize = 3;
const TIMEOUT: Duration = Duration::from_millis(2_000);
/// Messages that the network keeps; then it loses some.
const MESSAGES_MAX: usize = 16;

/// Whose transaction: the epoch under which it writes.
type Owner = (ProducerId, ProducerEpoch);

#[derive(Clone, Debug)]
struct Write {
    client: usize,
    owner: Owner,
    partition: usize,
    sequence: i32,
    value: u64,
}

/// On its way.
#[derive(Clone, Debug)]
enum Message {
    Init {
        client: usize,
    },
    Given {
        client: usize,
        owner: Option<Owner>,
    },
    /// To the leader of the partition.
    Write(Write),
    /// From there to the coordinator, and back.
    Add(Write),
    Added(Write, Option<ErrorCode>),
    Wrote(Write, Result<(), ErrorCode>),
    End {
        client: usize,
        owner: Owner,
        commit: bool,
    },
    Ended {
        client: usize,
        owner: Owner,
        commit: bool,
        answer: Result<Owner, ErrorCode>,
    },
    Mark {
        partition: usize,
        decision: Decision,
        coordinator: i32,
    },
    Marked {
        partition: usize,
        decision: Decision,
    },
}

#[derive(Clone, Debug)]
struct Entry {
    header: BatchHeader,
    offset: i64,
    index: u64,
    /// A marker's bytes, or a value.
    marker: Option<Bytes>,
    value: u64,
}

impl Entry {
    fn as_machine(&self) -> MachineEntry<'_> {
        let body = self.marker.as_ref().map_or(MachineBody::Header, MachineBody::Records);
        let (index, base_offset) = (RaftIndex::new(self.index), Offset::new(self.offset));
        MachineEntry { index, term: Term::new(1), base_offset, header: &self.header, body }
    }
}

#[derive(Default)]
struct Partition {
    machine: Producers,
    log: Vec<Entry>,
    committed: usize,
    stable: i64,
    /// What is told once the log is committed so far.
    replies: Vec<(usize, Message)>,
}

impl Partition {
    fn offer(
        &mut self,
        admission: Admission,
        header: BatchHeader,
        marker: Option<Bytes>,
        value: u64,
    ) -> Result<usize, ErrorCode> {
        match admission {
            Admission::Append => {
                let offset = self.log.len() as i64;
                let entry = Entry { header, offset, index: offset as u64 + 1, marker, value };
                self.machine.appended(&entry.as_machine());
                self.log.push(entry);
                Ok(self.log.len())
            }
            Admission::Duplicate { index, .. } => Ok(index.get() as usize),
            Admission::Refuse(error) => Err(error.code),
        }
    }

    fn write(&mut self, write: &Write) -> Result<usize, ErrorCode> {
        let mut batch = RecordBatchBuilder::new(Compression::None)
            .producer(write.owner.0, write.owner.1, Sequence::new(write.sequence))
            .transactional();
        batch.append(Timestamp::new(1), None, Some(&write.value.to_be_bytes()), []).expect("fits");
        let header = BatchHeader::parse(&batch.build()).expect("built here");
        let admission = self.machine.admit(&header);
        self.offer(admission, header, None, write.value)
    }

    fn mark(&mut self, decision: Decision, coordinator: i32) -> Result<usize, ErrorCode> {
        let marker = Marker {
            producer_id: decision.producer,
            producer_epoch: decision.epoch,
            commit: decision.commit,
            coordinator_epoch: LeaderEpoch::new(coordinator),
        };
        let bytes = encode_marker(&marker, Timestamp::new(1));
        let header = BatchHeader::parse(&bytes).expect("built here");
        let admission = self.machine.admit_marker(&marker);
        self.offer(admission, header, Some(bytes), 0)
    }

    fn commit(&mut self, up_to: usize) -> Vec<Message> {
        for entry in &self.log[self.committed..up_to] {
            self.machine.committed(&entry.as_machine());
        }
        self.committed = self.committed.max(up_to);
        let committed = self.committed;
        self.replies.extract_if(.., |(needed, _)| *needed <= committed).map(|(_, reply)| reply).collect()
    }

    /// Another leader, that has what is committed.
    fn change_leader(&mut self) {
        self.machine.step_down();
        self.log.truncate(self.committed);
        self.replies.clear();
    }

    fn end(&self) -> i64 {
        self.committed as i64
    }
}

/// The coordinator, its log and what it has committed.
struct Coordinator {
    live: TransactionTable,
    log: Vec<Vec<TransactionRecord>>,
    committed: usize,
    table: TransactionTable,
    epoch: i32,
    replies: Vec<(usize, Message)>,
}

#[derive(Clone, Debug, Default)]
struct Client {
    owner: Option<Owner>,
    sequences: HashMap<usize, i32>,
    /// What it waits for; sent again when nothing comes.
    asked: Option<Message>,
    /// Acknowledged in the transaction that is open.
    wrote: Vec<u64>,
}

/// What may be wrong: each has to be found, or what is said to hold was never put to the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The coordinator answers what it decided before that is committed.
    AnswersEarly,
    /// A partition answers what it wrote before that is committed.
    AcknowledgesEarly,
    /// Partitions are written to without the coordinator's knowledge.
    AddsNothing,
    /// Markers of what was decided are written before that is committed: another coordinator may decide otherwise.
    MarksEarly,
}

struct Model {
    fault: Option<Fault>,
    random: SmallRng,
    now: i64,
    network: Vec<Message>,
    coordinator: Coordinator,
    partitions: Vec<Partition>,
    clients: Vec<Client>,
    next_value: u64,
    next_producer: i64,
    marked: HashMap<Decision, BTreeSet<usize>>,
    /// As the coordinator's committed log says.
    decisions: BTreeMap<(i64, i16), bool>,
    /// Acknowledged writes of transactions whose commit was acknowledged.
    promised: BTreeSet<u64>,
    answered: usize,
}

impl Model {
    fn new(seed: u64, fault: Option<Fault>) -> Self {
        let coordinator =
            Coordinator { live: table(), log: Vec::new(), committed: 0, table: table(), epoch: 1, replies: Vec::new() };
        Self {
            fault,
            random: SmallRng::seed_from_u64(seed),
            now: 1_000_000,
            network: Vec::new(),
            coordinator,
            partitions: (0..PARTITIONS).map(|_| Partition::default()).collect(),
            clients: vec![Client::default(); 2],
            next_value: 0,
            next_producer: 100,
            marked: HashMap::new(),
            decisions: BTreeMap::new(),
            promised: BTreeSet::new(),
            answered: 0,
        }
    }

    fn fresh(&mut self) -> ProducerId {
        self.next_producer += 1;
        ProducerId::new(self.next_producer)
    }

    /// Has the coordinator decide; `reply` is told what it answers once that is committed.
    fn command(
        &mut self,
        command: TransactionCommand,
        reply: impl FnOnce(Result<TransactionReply, ErrorCode>) -> Option<Message>,
    ) {
        let (records, answer) = self.coordinator.live.decide(command, Timestamp::new(self.now));
        if !records.is_empty() {
            apply(&mut self.coordinator.live, records.clone());
            self.coordinator.log.push(records);
        }
        let Some(message) = reply(answer.map_err(|error| error.code)) else { return };
        if self.fault == Some(Fault::AnswersEarly) {
            self.network.push(message);
        } else {
            self.coordinator.replies.push((self.coordinator.log.len(), message));
        }
    }

    fn commit_coordinator(&mut self, up_to: usize) {
        let coordinator = &mut self.coordinator;
        for records in &coordinator.log[coordinator.committed..up_to] {
            apply(&mut coordinator.table, records.clone());
            for record in records {
                let it = coordinator.table.get(&record.id).expect("nothing is forgotten here");
                if let Some((epoch, commit)) = it.last_ended {
                    let owner = (it.previous.unwrap_or(it.producer).get(), epoch.get());
                    let before = *self.decisions.entry(owner).or_insert(commit);
                    assert_eq!(before, commit, "two decisions for {owner:?}");
                }
            }
        }
        coordinator.committed = coordinator.committed.max(up_to);
        let committed = coordinator.committed;
        let told = coordinator.replies.extract_if(.., |(needed, _)| *needed <= committed);
        self.network.extend(told.map(|(_, reply)| reply));
    }

    fn change_coordinator(&mut self) {
        let coordinator = &mut self.coordinator;
        coordinator.log.truncate(coordinator.committed);
        coordinator.replies.clear();
        coordinator.epoch += 1;
        let mut replayed = table();
        for records in &coordinator.log {
            apply(&mut replayed, records.clone());
        }
        assert_eq!(replayed.checkpoint(), coordinator.table.checkpoint(), "a replay differs");
        coordinator.live = replayed;
    }

    /// What the driver does: from what is committed alone.
    fn drive(&mut self) {
        let epoch = self.coordinator.epoch;
        let overdue: Vec<Arc<str>> = self.coordinator.table.overdue(Timestamp::new(self.now)).cloned().collect();
        for id in overdue {
            let fresh = self.fresh();
            self.command(TransactionCommand::TimeOut { id, fresh }, |_| None);
        }
        let table = match self.fault {
            Some(Fault::MarksEarly) => &self.coordinator.live,
            _ => &self.coordinator.table,
        };
        let preparing: Vec<_> = table
            .preparing()
            .filter_map(|(id, it)| Some((Arc::clone(id), it.decision()?, it.partitions.clone())))
            .collect();
        for (id, decision, partitions) in preparing {
            let marked = self.marked.entry(decision).or_default();
            let missing: Vec<usize> =
                (0..PARTITIONS).filter(|at| partitions.contains(&tp(*at as i32)) && !marked.contains(at)).collect();
            if missing.is_empty() {
                self.command(TransactionCommand::Written { id, decision }, |_| None);
            }
            for partition in missing {
                self.network.push(Message::Mark { partition, decision, coordinator: epoch });
            }
        }
    }

    fn client_acts(&mut self, at: usize) {
        if let Some(asked) = self.clients[at].asked.clone() {
            // Nothing came for a while: again, or given up for another beginning.
            let again = match self.random.random_range(0..400) {
                0 => Message::Init { client: at },
                1..40 => asked,
                _ => return,
            };
            self.clients[at].asked = Some(again.clone());
            self.network.push(again);
            return;
        }
        let message = match self.clients[at].owner {
            // Who was fenced comes back after a while: the two would only ever fence each other.
            None if self.random.random_range(0..40) > 0 => return,
            None => Message::Init { client: at },
            Some(owner) => match self.random.random_range(0..10) {
                0..7 => {
                    self.next_value += 1;
                    let partition = self.random.random_range(0..PARTITIONS);
                    let sequence = *self.clients[at].sequences.get(&partition).unwrap_or(&0);
                    Message::Write(Write { client: at, owner, partition, sequence, value: self.next_value })
                }
                ending => Message::End { client: at, owner, commit: ending < 9 },
            },
        };
        self.clients[at].asked = Some(message.clone());
        self.network.push(message);
    }

    /// Whether this is what the client waits for.
    fn awaited(&mut self, at: usize, is_it: impl Fn(&Message) -> bool) -> bool {
        self.clients[at].asked.take_if(|asked| is_it(asked)).is_some()
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Init { client } => {
                let fresh = self.fresh();
                let command = TransactionCommand::Init { id: "t".to_owned(), timeout: TIMEOUT, fresh };
                self.command(command, |answer| match answer.expect("valid") {
                    TransactionReply::Producer { producer, epoch } => {
                        Some(Message::Given { client, owner: Some((producer, epoch)) })
                    }
                    _ => Some(Message::Given { client, owner: None }),
                });
            }
            Message::Given { client, owner } => {
                if self.awaited(client, |asked| matches!(asked, Message::Init { .. })) {
                    self.clients[client] = Client { owner, ..Client::default() };
                }
            }
            Message::Write(write) if self.fault == Some(Fault::AddsNothing) => {
                self.network.push(Message::Added(write, None));
            }
            Message::Write(write) => self.network.push(Message::Add(write)),
            Message::Add(write) => {
                let addition = Addition {
                    id: "t".into(),
                    producer: write.owner.0,
                    epoch: write.owner.1,
                    partition: Some(tp(write.partition as i32)),
                    group: None,
                };
                self.command(TransactionCommand::Add(vec![addition]), |answer| {
                    let Ok(TransactionReply::Added(mut results)) = answer else { panic!("{answer:?}") };
                    match results.remove(0).map_err(|error| error.code) {
                        Ok(()) => Some(Message::Added(write, None)),
                        Err(ErrorCode::ConcurrentTransactions) => Some(Message::Add(write)),
                        Err(code) => Some(Message::Added(write, Some(code))),
                    }
                });
            }
            Message::Added(write, Some(code)) => self.network.push(Message::Wrote(write, Err(code))),
            Message::Added(write, None) => {
                let partition = &mut self.partitions[write.partition];
                match partition.write(&write) {
                    Ok(_) if self.fault == Some(Fault::AcknowledgesEarly) => {
                        self.network.push(Message::Wrote(write, Ok(())));
                    }
                    Ok(needed) => partition.replies.push((needed, Message::Wrote(write, Ok(())))),
                    Err(code) => self.network.push(Message::Wrote(write, Err(code))),
                }
            }
            Message::Wrote(write, outcome) => {
                let at = write.client;
                let is_it = |asked: &Message| matches!(asked, Message::Write(it) if it.value == write.value);
                if !self.awaited(at, is_it) {
                    return;
                }
                let client = &mut self.clients[at];
                match outcome {
                    Ok(()) => {
                        client.wrote.push(write.value);
                        *client.sequences.entry(write.partition).or_insert(0) += 1;
                    }
                    // The coordinator knows whether it may go on.
                    Err(_) => {
                        let ask = Message::End { client: at, owner: write.owner, commit: false };
                        client.asked = Some(ask.clone());
                        self.network.push(ask);
                    }
                }
            }
            Message::End { client, owner, commit } => {
                let fresh = self.fresh();
                let (producer, epoch) = owner;
                let command = TransactionCommand::End { id: "t".to_owned(), producer, epoch, commit, fresh };
                self.command(command, |answer| {
                    let answer = answer.map(|reply| match reply {
                        TransactionReply::Producer { producer, epoch } => (producer, epoch),
                        reply => panic!("{reply:?}"),
                    });
                    Some(Message::Ended { client, owner, commit, answer })
                });
            }
            Message::Ended { client: at, owner, commit, answer } => {
                if commit && answer.is_ok() {
                    assert_eq!(self.decisions.get(&(owner.0.get(), owner.1.get())), Some(&true), "told, not decided");
                }
                let is_it = |asked: &Message| matches!(asked, Message::End { owner: of, commit: was, .. } if *of == owner && *was == commit);
                if answer == Err(ErrorCode::ConcurrentTransactions) || !self.awaited(at, is_it) {
                    return;
                }
                self.answered += 1;
                let client = &mut self.clients[at];
                match answer {
                    Ok(next) => {
                        if commit {
                            self.promised.extend(client.wrote.drain(..));
                        }
                        *client = Client { owner: Some(next), ..Client::default() };
                    }
                    Err(ErrorCode::TransactionAborted) => {
                        let ask = Message::End { client: at, owner, commit: false };
                        client.wrote.clear();
                        client.asked = Some(ask.clone());
                        self.network.push(ask);
                    }
                    Err(_) => *client = Client::default(),
                }
            }
            Message::Mark { partition: at, decision, coordinator } => {
                let partition = &mut self.partitions[at];
                match partition.mark(decision, coordinator) {
                    Ok(needed) => partition.replies.push((needed, Message::Marked { partition: at, decision })),
                    Err(ErrorCode::ProducerFenced) => self.network.push(Message::Marked { partition: at, decision }),
                    Err(ErrorCode::NotCoordinator) => {}
                    Err(code) => panic!("{decision:?} in partition {at}: {code}"),
                }
            }
            Message::Marked { partition, decision } => {
                self.marked.entry(decision).or_default().insert(partition);
            }
        }
    }

    fn step(&mut self) {
        match self.random.random_range(0..100) {
            0..46 => {
                if let Some(at) = (0..self.network.len()).choose(&mut self.random) {
                    // Repeated, at times.
                    let stays = self.random.random_range(0..10) == 0;
                    let message = if stays { self.network[at].clone() } else { self.network.swap_remove(at) };
                    self.deliver(message);
                }
            }
            46..60 => {
                let at = self.random.random_range(0..2);
                self.client_acts(at);
            }
            60..70 => {
                let up_to = self.random.random_range(self.coordinator.committed..=self.coordinator.log.len());
                self.commit_coordinator(up_to);
            }
            70..82 => {
                let at = self.random.random_range(0..PARTITIONS);
                self.commit_partition(at);
            }
            82..90 => self.drive(),
            90..93 => self.now += self.random.random_range(1..60_i64),
            93..96 => self.change_coordinator(),
            96..98 => {
                let at = self.random.random_range(0..PARTITIONS);
                self.partitions[at].change_leader();
            }
            _ => {
                while self.network.len() > MESSAGES_MAX {
                    let at = self.random.random_range(0..self.network.len());
                    self.network.swap_remove(at);
                }
            }
        }
    }

    fn commit_partition(&mut self, at: usize) {
        let partition = &mut self.partitions[at];
        let up_to = self.random.random_range(partition.committed..=partition.log.len());
        self.network.extend(partition.commit(up_to));
        let stable = partition.machine.last_stable_offset(Offset::new(partition.end())).get();
        assert!(stable >= partition.stable, "the last stable offset goes back from {} to {stable}", partition.stable);
        partition.stable = stable;
    }

    /// Nobody asks any more, and all that is under way comes to its end.
    fn settle(&mut self) {
        self.network.clear();
        self.now += 1_000_000;
        for _ in 0..20 {
            self.drive();
            self.commit_coordinator(self.coordinator.log.len());
            for message in std::mem::take(&mut self.network) {
                if matches!(message, Message::Mark { .. } | Message::Marked { .. }) {
                    self.deliver(message);
                }
            }
            for at in 0..PARTITIONS {
                let all = self.partitions[at].log.len();
                let told = self.partitions[at].commit(all);
                self.network.extend(told);
            }
        }
        assert_eq!(self.coordinator.table.preparing().count(), 0, "something is never ended");
    }

    /// What holds at the end.
    fn check(&self) {
        let mut seen = BTreeSet::new();
        for (number, partition) in self.partitions.iter().enumerate() {
            let end = Offset::new(partition.end());
            assert_eq!(partition.machine.last_stable_offset(end), end, "something hangs in partition {number}");
            let mut replayed = Producers::default();
            let mut ended: HashMap<ProducerId, i16> = HashMap::new();
            let mut aborted: VecDeque<(ProducerId, Offset)> =
                partition.machine.aborted_between(Offset::ZERO, end).into();
            for entry in &partition.log {
                replayed.committed(&entry.as_machine());
                let (id, epoch) = (entry.header.producer_id, entry.header.producer_epoch.get());
                if entry.marker.is_some() {
                    let before = ended.insert(id, epoch);
                    assert!(before < Some(epoch), "two markers of {id}/{epoch} in partition {number}");
                    let commit = self.decisions.get(&(id.get(), epoch - 1));
                    let body = entry
                        .marker
                        .as_ref()
                        .map(|marker| flowstone_protocol::control::decode_marker(marker).expect("a marker").commit);
                    assert_eq!(body.as_ref(), commit, "a marker that nobody decided");
                    if commit == Some(&false) {
                        let over = aborted.iter().position(|(of, first)| *of == id && first.get() < entry.offset);
                        if let Some(over) = over {
                            aborted.remove(over);
                        }
                    }
                    continue;
                }
                assert!(ended.get(&id).is_none_or(|ended| epoch >= *ended), "a zombie's write in partition {number}");
                let is_seen = !aborted.iter().any(|(of, first)| *of == id && first.get() <= entry.offset);
                let commit = self.decisions.get(&(id.get(), epoch)).copied();
                assert_eq!(Some(is_seen), commit, "{id}/{epoch} at {} of partition {number}", entry.offset);
                if is_seen {
                    assert!(seen.insert(entry.value), "{} is there twice", entry.value);
                }
            }
            assert!(aborted.is_empty());
            assert_eq!(replayed.checkpoint(), partition.machine.checkpoint(), "a replay differs");
        }
        let lost: Vec<_> = self.promised.difference(&seen).collect();
        assert!(lost.is_empty(), "committed, and not there: {lost:?}");
    }
}

/// One run; whether all held.
fn run(seed: u64, fault: Option<Fault>) -> Option<Model> {
    let mut model = Model::new(seed, fault);
    let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for _ in 0..20_000 {
            model.step();
        }
        model.settle();
        model.check();
    }));
    run.is_ok().then_some(model)
}

#[test]
fn whatever_happens_a_transaction_is_there_whole_or_not_at_all() {
    let (mut promised, mut answered, mut aborted) = (0, 0, 0);
    for seed in 0..80 {
        let Some(model) = run(seed, None) else { panic!("seed {seed}") };
        promised += model.promised.len();
        answered += model.answered;
        aborted += model.decisions.values().filter(|commit| !**commit).count();
    }
    // A run in which nothing happens shows nothing.
    assert!(promised > 500 && answered > 1_500 && aborted > 800, "{promised} {answered} {aborted}");
}

#[test]
fn what_is_wrong_is_found() {
    for (fault, seeds) in
        [(Fault::AnswersEarly, 20), (Fault::AcknowledgesEarly, 20), (Fault::AddsNothing, 20), (Fault::MarksEarly, 20)]
    {
        let found = (0..seeds).find(|seed| run(*seed, Some(fault)).is_none());
        assert!(found.is_some(), "{fault:?} is not found within {seeds} seeds");
    }
}
