//! Members of a consumer group: they come and go, fall asleep, forget, take one another's place, and commit how far they
//! have come, plainly or within a transaction in which they write what they made of it.

use std::collections::BTreeMap;
use std::time::Duration;

use flowstone_broker::simulation::{Answered, Joining, MemberView};
use flowstone_checker::{
    Asked, GroupId, Kind as Anomaly, Mark, SenderId, SenderKind, TransactionEnd, TransactionId, ValueId, View,
};
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::{
    BatchHeader, Compression, Error, ErrorCode, Offset, ProducerEpoch, ProducerId, RecordBatchBuilder, Sequence,
};
use flowstone_replication::ReadRequest;

use super::clients::{Client, Operation, READ_BYTES, Request};
use super::group_coordinators::Committing;
use super::groups::Kind;
use super::outbox::Answer;
use super::transactions::{Ask, may_pass};
use super::world::World;

/// The group's name.
pub(crate) const GROUP: &str = "group";
/// A member tells this often that it lives.
const HEARTBEAT: Duration = Duration::from_millis(400);
/// After this silence it is a member no more; and as long it may keep what it was asked for.
const SESSION_TIMEOUT: Duration = Duration::from_millis(2_500);

/// See the module.
#[derive(Debug)]
pub(crate) struct Member {
    number: usize,
    /// Empty for a dynamic one.
    instance: String,
    /// Which process of it: each has another member id.
    process: u64,
    in_transactions: bool,
    /// Whom it believes to coordinate groups, and transactions.
    believes: [usize; 2],
    /// 0: it has not joined.
    epoch: i32,
    changed_at: Offset,
    /// What it owns, and how far it has come there.
    owned: BTreeMap<usize, Option<Offset>>,
    reports_at: Duration,
    wakes_at: Duration,
    waits_for: Option<Wait>,
    owner: Option<(ProducerId, ProducerEpoch, SenderId)>,
    work: Option<Work>,
    is_finished: bool,
}

/// The one thing that a member waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    Join,
    Report,
    Leave,
    Fetch(usize),
    Read(usize),
    LogStart(usize),
    Init,
    Write,
    Commit,
    End,
}

/// Something that was read, on its way to being consumed.
#[derive(Debug)]
struct Work {
    group: usize,
    /// How far was read.
    to: Offset,
    step: Step,
    /// It was not read at all: a commit of what another member owns.
    is_forged: bool,
    /// It was known to be another one's when its commit was asked for: see [`World::is_anothers`].
    is_anothers: bool,
    /// In a transaction: what was made of it.
    made: Option<Made>,
}

#[derive(Debug)]
struct Made {
    transaction: TransactionId,
    value: ValueId,
    sink: usize,
    request: Request,
    is_written: bool,
    may_be_committed: bool,
    /// What was committed before its commit was asked for first: whenever the answer comes, it may have counted since.
    asked: Option<Asked>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Write,
    Commit,
    End(bool),
}

/// Who owns what, as far as members were told, and what they have committed.
#[derive(Debug, Default)]
pub(crate) struct Ownership {
    pub(crate) group: Option<GroupId>,
    /// By partition: who was given it last, by the record that said so.
    owners: BTreeMap<usize, (usize, Offset)>,
    /// Members that read every offset once, or so they were promised.
    pub(crate) in_transactions: bool,
}

impl Member {
    pub(crate) fn describe(&self) -> String {
        format!("member {}: {:?}, work {:?}, owns {:?}", self.id(), self.waits_for, self.work, self.owned)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.is_finished && self.waits_for.is_none()
    }

    fn id(&self) -> String {
        format!("m{}-{}", self.number, self.process)
    }

    fn transactional_id(&self) -> String {
        format!("w{}", self.number)
    }

    /// It is a member no more, or has forgotten that it was.
    fn is_out(&mut self) {
        self.epoch = 0;
        self.changed_at = Offset::new(-1);
        self.owned.clear();
    }
}

impl World {
    pub(crate) fn make_members(&mut self) {
        if self.plan.members == 0 {
            return;
        }
        self.ownership.group = Some(self.history.group());
        let in_transactions = self.plan.transactional_ids > 0 && self.random.one_in(2);
        self.ownership.in_transactions = in_transactions;
        for number in 0..self.plan.members {
            // Two may have one instance id: they take one another's place.
            let instance = if self.random.one_in(2) { format!("i{}", number % 2) } else { String::new() };
            let believes = [self.random.index(self.plan.brokers), self.random.index(self.plan.brokers)];
            let wakes_at = self.random.millis(0, 4_000);
            self.add_client(Client::Member(Box::new(Member {
                number,
                instance,
                process: 0,
                in_transactions,
                believes,
                epoch: 0,
                changed_at: Offset::new(-1),
                owned: BTreeMap::new(),
                reports_at: Duration::ZERO,
                wakes_at,
                waits_for: None,
                owner: None,
                work: None,
                is_finished: false,
            })));
        }
    }

    pub(crate) fn on_member(&mut self, client: usize, it: &mut Member) -> Option<Duration> {
        if it.waits_for.is_some() {
            return None;
        }
        if self.stops_sending {
            return self.finish_member(client, it);
        }
        if it.wakes_at > self.now {
            return Some(it.wakes_at - self.now);
        }
        if it.work.is_none()
            && it.epoch > 0
            && let Some(again) = self.live(client, it)
        {
            return Some(again);
        }
        if it.waits_for.is_some() {
            return None;
        }
        if it.epoch == 0 && it.work.is_none() {
            let joining = Joining {
                group: GROUP.to_owned(),
                member: it.id(),
                epoch: 0,
                instance: it.instance.clone(),
                topic: Kind::Records.topic().to_owned(),
                session_timeout: SESSION_TIMEOUT,
                rebalance_timeout: SESSION_TIMEOUT,
                owned: Vec::new(),
            };
            self.ask_group(client, it, Wait::Join, Ask::Join(joining));
            return None;
        }
        if self.now >= it.reports_at && it.epoch > 0 {
            it.reports_at = self.now + HEARTBEAT;
            let owned = it.owned.keys().map(|&group| self.groups[group].tp).collect();
            let ask = Ask::Report { member: it.id(), epoch: it.epoch, owned };
            self.ask_group(client, it, Wait::Report, ask);
            return None;
        }
        if it.work.is_some() {
            return self.work_on(client, it);
        }
        if it.in_transactions && it.owner.is_none() {
            self.ask_transactions(client, it, Wait::Init, Ask::Init { id: it.transactional_id() });
            return None;
        }
        let groups: Vec<usize> = it.owned.keys().copied().collect();
        let Some(&group) = self.random.pick(&groups) else {
            return Some(it.reports_at.saturating_sub(self.now).max(Duration::from_millis(20)));
        };
        match it.owned[&group] {
            None => {
                let tp = self.groups[group].tp;
                let asked = self.ask_committed(group);
                let coordinator = self.group_with(Kind::Groups)?;
                it.waits_for = Some(Wait::Fetch(group));
                self.ask(client, coordinator, it.believes[0], Request::Ask(Ask::Fetch { tp }), 0, asked);
            }
            Some(position) => {
                let request =
                    ReadRequest { committed: true, any_replica: true, ..ReadRequest::new(position, READ_BYTES) };
                let broker = self.leader_of(group).filter(|_| !self.random.one_in(8));
                let broker = broker.unwrap_or_else(|| self.other_broker(group, it.believes[0]));
                it.waits_for = Some(Wait::Read(group));
                self.ask(client, group, broker, Request::Read(request), 0, None);
            }
        }
        None
    }

    /// What becomes of a member that has nothing to do.
    fn live(&mut self, client: usize, it: &mut Member) -> Option<Duration> {
        match self.random.below(240) {
            0 | 1 => {
                // It falls asleep, and goes on as if nothing had happened.
                let time = self.random.millis(500, 5_000);
                it.wakes_at = self.now + time;
                Some(time)
            }
            2 | 3 => {
                let ask = Ask::Leave { member: it.id(), keep_place: self.random.one_in(2) };
                self.ask_group(client, it, Wait::Leave, ask);
                None
            }
            4 | 5 => {
                // Another process begins in its place.
                it.is_out();
                it.process += 1;
                it.owner = None;
                let time = self.random.millis(50, 4_000);
                it.wakes_at = self.now + time;
                Some(time)
            }
            6 => {
                // It commits what it may not even own.
                let group = self.random.index(self.plan.groups);
                if it.in_transactions || !self.is_anothers(client, it, group) {
                    return None;
                }
                let to = Offset::ZERO;
                it.work = Some(Work { group, to, step: Step::Commit, is_forged: true, is_anothers: true, made: None });
                None
            }
            _ => None,
        }
    }

    /// Whether a commit of the member for this partition is to be refused: another one was told that it owns it. What the
    /// member holds it may have been given since then, and have to give up before it was told: under an epoch of its own that
    /// is older than the other one's word, or in which some broker knows it without the partition, it does not get it any
    /// more.
    fn is_anothers(&self, client: usize, it: &Member, group: usize) -> bool {
        let Some(&(owner, told_at)) = self.ownership.owners.get(&group) else { return false };
        if owner == client {
            return false;
        }
        let is_older = it.changed_at >= Offset::ZERO && it.changed_at < told_at;
        let tp = self.groups[group].tp;
        let views = (0..self.brokers.len()).filter_map(|broker| self.groups_view(broker)?.member(GROUP, &it.id()));
        let mut known = views.filter(|view| view.epoch == it.epoch);
        is_older || known.any(|view| !view.owned.contains(&tp) && !view.revoking.contains(&tp))
    }

    fn ask_group(&mut self, client: usize, it: &mut Member, wait: Wait, ask: Ask) {
        let Some(group) = self.group_with(Kind::Groups) else { return };
        it.waits_for = Some(wait);
        self.ask(client, group, it.believes[0], Request::Ask(ask), 0, None);
    }

    fn ask_transactions(&mut self, client: usize, it: &mut Member, wait: Wait, ask: Ask) {
        let Some(group) = self.group_with(Kind::Transactions) else { return };
        it.waits_for = Some(wait);
        self.ask(client, group, it.believes[1], Request::Ask(ask), 0, None);
    }

    /// Nothing new is begun; what may be committed is asked for until that is known, and what else is open is ended.
    fn finish_member(&mut self, client: usize, it: &mut Member) -> Option<Duration> {
        let may_be_committed =
            it.work.as_ref().and_then(|work| work.made.as_ref()).is_some_and(|made| made.may_be_committed);
        if may_be_committed {
            return self.work_on(client, it);
        }
        self.drop_work(it);
        if it.in_transactions && !it.is_finished {
            self.ask_transactions(client, it, Wait::Init, Ask::Init { id: it.transactional_id() });
        } else {
            it.is_finished = true;
        }
        None
    }

    /// The next step of what was read.
    fn work_on(&mut self, client: usize, it: &mut Member) -> Option<Duration> {
        let owner = it.owner;
        let (id, member) = (it.transactional_id(), (it.id(), it.epoch));
        let is_anothers = it.work.as_ref().is_some_and(|work| self.is_anothers(client, it, work.group));
        let work = it.work.as_mut()?;
        match work.step {
            Step::Write => {
                let made = work.made.as_ref()?;
                let (sink, request) = (made.sink, made.request.clone());
                it.waits_for = Some(Wait::Write);
                let broker = self.leader_of(sink).filter(|_| !self.random.one_in(8));
                let broker = broker.unwrap_or_else(|| self.random.index(self.brokers.len()));
                self.ask(client, sink, broker, request, 0, None);
            }
            Step::Commit => {
                work.is_anothers = is_anothers;
                if work.is_forged && !work.is_anothers {
                    // It may be its own by now.
                    it.work = None;
                    return Some(Duration::from_millis(1));
                }
                let transaction = match (&work.made, owner) {
                    (Some(_), Some((producer, epoch, _))) => Some((id, (producer, epoch))),
                    _ => None,
                };
                let asked = transaction.is_none().then(|| self.ask_committed(work.group)).flatten();
                let tp = self.groups[work.group].tp;
                let ask = Ask::Commit(Committing {
                    group: GROUP.to_owned(),
                    member: Some(member),
                    tp,
                    offset: work.to,
                    transaction,
                });
                let group = self.group_with(Kind::Groups)?;
                let (of, to, is_forged) = (work.group, work.to, work.is_forged);
                it.waits_for = Some(Wait::Commit);
                self.note("commits", &[it.number as u64, of as u64, to.get() as u64], || {
                    let how = if is_forged { "forged" } else { "earned" };
                    format!("member {} in epoch {}: {to} of {of}, {how}, another's: {is_anothers}", it.id(), it.epoch)
                });
                self.ask(client, group, it.believes[0], Request::Ask(ask), 0, asked);
            }
            Step::End(commit) => {
                let (producer, epoch, _) = owner?;
                let group = work.group;
                if let Some(made) = work.made.as_mut().filter(|_| commit) {
                    made.may_be_committed = true;
                    self.history.committing(made.transaction);
                    if made.asked.is_none() {
                        made.asked = self.ask_committed(group);
                    }
                }
                let transactions = self.group_with(Kind::Transactions)?;
                it.waits_for = Some(Wait::End);
                let ask = Ask::End { id, owner: (producer, epoch), commit };
                self.ask(client, transactions, it.believes[1], Request::Ask(ask), 0, None);
            }
        }
        None
    }

    fn ask_committed(&mut self, group: usize) -> Option<Asked> {
        let of = self.ownership.group?;
        Some(self.history.ask(self.logs[group], Mark::Committed(of), View::Fresh))
    }

    /// What was read was not consumed: whoever owns the partition begins there again.
    fn drop_work(&mut self, it: &mut Member) {
        let Some(work) = it.work.take() else { return };
        if let Some(position) = it.owned.get_mut(&work.group) {
            *position = None;
        }
        if let Some(made) = work.made {
            let end = if made.may_be_committed { TransactionEnd::Unknown } else { TransactionEnd::Aborted };
            self.end_made(&made, end);
            // Who does not know how its transaction ended asks for a new identity.
            it.owner = None;
        }
    }

    fn end_made(&mut self, made: &Made, end: TransactionEnd) {
        if !made.is_written {
            self.history.unknown(made.value);
        }
        match end {
            TransactionEnd::Committed => self.counts.transactions_committed += 1,
            TransactionEnd::Aborted => self.counts.transactions_aborted += 1,
            TransactionEnd::Unknown => {}
        }
        self.history.transaction_ended(made.transaction, end);
    }

    pub(crate) fn on_membered(
        &mut self,
        client: usize,
        it: &mut Member,
        operation: &Operation,
        answer: Answer,
    ) -> Option<Duration> {
        let wait = it.waits_for.take()?;
        let error = match (wait, answer) {
            (Wait::Join, Answer::Asked(Ok(Answered::Joined(epoch)))) => {
                it.is_out();
                it.epoch = epoch;
                it.reports_at = self.now;
                self.note("joined", &[it.number as u64, epoch as u64], || {
                    format!("member {} in epoch {epoch}", it.id())
                });
                return Some(Duration::from_millis(1));
            }
            (Wait::Report, Answer::Member(Ok(Some(view)))) => {
                self.take_assignment(client, it, view);
                return Some(Duration::from_millis(1));
            }
            (Wait::Report, Answer::Member(Ok(None))) => Error::new(ErrorCode::UnknownMember, "it is none any more"),
            (Wait::Leave, Answer::Asked(Ok(_))) => {
                it.is_out();
                it.process += 1;
                let time = self.random.millis(100, 3_000);
                it.wakes_at = self.now + time;
                return Some(time);
            }
            (Wait::Fetch(group), Answer::Offset(Ok((offset, is_stable)))) => {
                if !is_stable {
                    return Some(self.random.millis(5, 100));
                }
                if let (Some(asked), Some(offset)) = (operation.asked, offset) {
                    self.history.told(asked, offset);
                }
                if let Some(position) = it.owned.get_mut(&group) {
                    *position = Some(offset.unwrap_or(Offset::ZERO));
                }
                return Some(Duration::from_micros(100));
            }
            (Wait::LogStart(group), Answer::HighWatermark(Ok(start))) => {
                if let Some(Some(position)) = it.owned.get_mut(&group) {
                    *position = start.max(*position);
                }
                return Some(Duration::from_micros(100));
            }
            (Wait::Read(group), Answer::Read(Ok(answer))) => {
                let position = it.owned.get(&group).copied().flatten()?;
                let mut to = position;
                if self.is_undamaged(operation.group, operation.broker, &answer) {
                    for chunk in &answer.bytes.chunks {
                        for batch in split_batches(chunk.clone()).flatten() {
                            to = to.max(batch.0.next_offset());
                        }
                    }
                }
                if to <= position {
                    return Some(self.random.millis(20, 200));
                }
                self.begin_work(it, group, position, to);
                return Some(self.random.micros(100, 20_000));
            }
            (Wait::Init, Answer::Asked(Ok(Answered::Producer { producer, epoch }))) => {
                if self.stops_sending {
                    it.is_finished = true;
                    return None;
                }
                it.owner = Some((producer, epoch, self.history.sender(SenderKind::IDEMPOTENT)));
                return Some(Duration::from_micros(100));
            }
            (Wait::Write, Answer::Produced(Ok(produced))) => {
                let work = it.work.as_mut()?;
                let made = work.made.as_mut()?;
                made.is_written = true;
                self.history.acknowledged(made.value, produced.base_offset, self.now);
                work.step = Step::Commit;
                return Some(self.random.micros(100, 5_000));
            }
            (Wait::Commit, Answer::Asked(Ok(Answered::Offsets(refused)))) => match refused.into_iter().next() {
                None => return self.on_offset_taken(it, operation),
                Some((_, error)) => error,
            },
            (Wait::End, Answer::Asked(Ok(Answered::Producer { producer, epoch }))) => {
                return self.on_work_ended(it, (producer, epoch));
            }
            (_, Answer::Asked(Err(error))) => error,
            (_, Answer::Member(Err(error)) | Answer::Offset(Err(error))) => error,
            (_, Answer::Produced(Err(error)) | Answer::Read(Err(error)) | Answer::HighWatermark(Err(error))) => error,
            (_, Answer::Asked(Ok(Answered::Busy))) => return Some(self.random.millis(10, 200)),
            (_, Answer::NotTaken | Answer::Lost) => Error::new(ErrorCode::TimedOut, "no answer; try again"),
            (wait, answer) => {
                self.fail(&format!("a member waits for {wait:?} and is answered {answer:?}"));
                return None;
            }
        };
        self.on_member_refused(client, it, operation, wait, &error)
    }

    fn begin_work(&mut self, it: &mut Member, group: usize, from: Offset, to: Offset) {
        let made = it.owner.filter(|_| it.in_transactions).map(|(producer, epoch, sender)| {
            let transaction = self.history.transaction();
            let sink = self.random.index(self.plan.groups);
            let value = self.history.send_in(transaction, sender, self.logs[sink], self.now);
            self.history.derived(value, self.logs[group], from, to);
            let mut builder =
                RecordBatchBuilder::new(Compression::None).producer(producer, epoch, Sequence::new(0)).transactional();
            let wall = self.brokers[0].clock.wall();
            let appended = builder.append(wall, None, Some(&self.run_id().encode(value, 0)), []);
            appended.expect("one record is far below any limit");
            let batch = builder.build();
            let header = BatchHeader::parse(&batch).expect("just built");
            let request = Request::Transact { group: sink, id: it.transactional_id(), batch, header };
            Made { transaction, value, sink, request, is_written: false, may_be_committed: false, asked: None }
        });
        let step = if made.is_some() { Step::Write } else { Step::Commit };
        it.work = Some(Work { group, to, step, is_forged: false, is_anothers: false, made });
    }

    /// An offset was taken: it counts, or will once the transaction commits.
    fn on_offset_taken(&mut self, it: &mut Member, operation: &Operation) -> Option<Duration> {
        self.note("committed", &[it.number as u64], || format!("member {}: {:?}", it.id(), it.work));
        let work = it.work.as_mut()?;
        if work.is_anothers {
            let detail = format!("member {} committed offset {} of what another member owned", it.number, work.to);
            self.history.report(Anomaly::ZombieAccepted, self.logs[work.group], Some(work.to), detail);
        }
        self.counts.offset_commits += 1;
        if work.made.is_some() {
            let commits = !self.random.one_in(10);
            work.step = Step::End(commits);
            return Some(self.random.micros(100, 20_000));
        }
        if let Some(asked) = operation.asked {
            self.history.told(asked, work.to);
        }
        let (group, to) = (work.group, work.to);
        it.work = None;
        if let Some(position) = it.owned.get_mut(&group) {
            *position = Some(to);
        }
        Some(self.random.millis(1, 60))
    }

    fn on_work_ended(&mut self, it: &mut Member, (producer, epoch): (ProducerId, ProducerEpoch)) -> Option<Duration> {
        let work = it.work.take()?;
        if let Some(owner) = &mut it.owner {
            (owner.0, owner.1) = (producer, epoch);
        }
        let made = work.made?;
        if work.step == Step::End(true) {
            self.end_made(&made, TransactionEnd::Committed);
            self.counts.transactional_offset_commits += 1;
            if let Some(asked) = made.asked {
                self.history.told(asked, work.to);
            }
            if let Some(position) = it.owned.get_mut(&work.group) {
                *position = Some(work.to);
            }
        } else {
            self.end_made(&made, TransactionEnd::Aborted);
            if let Some(position) = it.owned.get_mut(&work.group) {
                *position = None;
            }
        }
        Some(self.random.millis(1, 80))
    }

    /// A member is told what it owns.
    fn take_assignment(&mut self, client: usize, it: &mut Member, view: MemberView) {
        // An answer of before it was told something newer says nothing.
        if view.changed_at < it.changed_at || view.epoch < it.epoch {
            return;
        }
        it.changed_at = view.changed_at;
        it.epoch = view.epoch;
        let owned: Vec<usize> = view.owned.iter().map(|tp| self.group_of(*tp)).collect();
        let lost: Vec<usize> = it.owned.keys().filter(|group| !owned.contains(group)).copied().collect();
        let is_other = !lost.is_empty() || owned.iter().any(|group| !it.owned.contains_key(group));
        for group in lost {
            it.owned.remove(&group);
            let is_in_work = it.work.as_ref().is_some_and(|work| work.group == group);
            if is_in_work && let Some(work) = &mut it.work {
                match &work.made {
                    // What was asked for stays asked for.
                    Some(made) if made.may_be_committed => {}
                    Some(_) => work.step = Step::End(false),
                    None => it.work = None,
                }
            }
        }
        for group in owned {
            it.owned.entry(group).or_insert(None);
            let known = self.ownership.owners.entry(group).or_insert((client, view.changed_at));
            if known.1 < view.changed_at {
                *known = (client, view.changed_at);
            }
        }
        if is_other {
            self.counts.rebalances += 1;
            self.note("assigned", &[it.number as u64, it.epoch as u64], || {
                format!("member {} in epoch {} owns {:?}", it.id(), it.epoch, it.owned.keys())
            });
            // What it has given up it says at once.
            it.reports_at = self.now;
        }
    }

    fn on_member_refused(
        &mut self,
        client: usize,
        it: &mut Member,
        operation: &Operation,
        wait: Wait,
        error: &Error,
    ) -> Option<Duration> {
        self.note("member refused", &[it.number as u64], || format!("member {}: {wait:?}: {error}", it.id()));
        let pause = self.random.millis(5, 150);
        if may_pass(error) && !matches!(error.code, ErrorCode::StaleMemberEpoch | ErrorCode::NotAssigned) {
            match wait {
                Wait::Init | Wait::End if error.code != ErrorCode::ConcurrentTransactions => {
                    it.believes[1] = self.other_broker(self.group_with(Kind::Transactions)?, operation.broker);
                }
                Wait::Join | Wait::Report | Wait::Leave | Wait::Fetch(_) | Wait::Commit => {
                    it.believes[0] = self.other_broker(self.group_with(Kind::Groups)?, operation.broker);
                    if wait == Wait::Report {
                        it.reports_at = self.now + pause;
                    }
                    let is_plain = it.work.as_ref().is_some_and(|work| work.made.is_none());
                    if wait == Wait::Commit && is_plain {
                        // Nobody knows whether it was taken: it is read again, from what is.
                        self.drop_work(it);
                    }
                }
                _ => {}
            }
            return Some(pause);
        }
        match (wait, error.code) {
            (Wait::Read(group), ErrorCode::OffsetOutOfRange) => {
                let broker = self.leader_of(group).unwrap_or(operation.broker);
                it.waits_for = Some(Wait::LogStart(group));
                self.ask(client, group, broker, Request::LogStart, 0, None);
                return None;
            }
            (Wait::Init, _) => self.fail(&format!("w{}: no producer is given: {error:?}", it.number)),
            (_, ErrorCode::UnknownMember | ErrorCode::FencedInstance) => {
                it.is_out();
                self.counts.members_fenced += 1;
                self.back_out(it);
            }
            (Wait::Report | Wait::Join, ErrorCode::StaleMemberEpoch) => {
                it.is_out();
                self.back_out(it);
            }
            (Wait::Commit, ErrorCode::StaleMemberEpoch | ErrorCode::NotAssigned) => {
                self.counts.stale_commits_refused += 1;
                it.reports_at = self.now;
                self.back_out(it);
            }
            (Wait::Write | Wait::Commit, ErrorCode::TransactionAborted | ErrorCode::UnknownTransaction) => {
                self.counts.transactions_timed_out += 1;
                self.back_out(it);
            }
            (Wait::End, ErrorCode::TransactionAborted) => {
                self.counts.transactions_timed_out += 1;
                if let Some(made) = it.work.as_mut().and_then(|work| work.made.as_mut()) {
                    made.may_be_committed = false;
                }
                self.back_out(it);
            }
            (Wait::Write | Wait::Commit | Wait::End, ErrorCode::ProducerFenced | ErrorCode::UnknownTransaction) => {
                self.drop_work(it)
            }
            (Wait::Leave, _) => it.is_out(),
            (wait, _) => self.fail(&format!("member {}: {wait:?} is refused: {error:?}", it.number)),
        }
        Some(pause)
    }

    /// What it was about to consume it does not consume: its transaction is aborted.
    fn back_out(&mut self, it: &mut Member) {
        match &mut it.work {
            Some(Work { made: Some(made), step, .. }) if !made.may_be_committed => *step = Step::End(false),
            Some(Work { made: Some(_), .. }) => {}
            _ => self.drop_work(it),
        }
    }

    /// When everything was read: all that the group has committed was processed.
    pub(crate) fn judge_pipeline(&mut self) {
        if !self.ownership.in_transactions {
            return;
        }
        let Some(coordinator) = self.group_with(Kind::Groups) else { return };
        let Some(view) = self.leader_of(coordinator).and_then(|leader| self.groups_view(leader)) else { return };
        for group in 0..self.plan.groups {
            let (offset, is_stable) = view.offset(GROUP, self.groups[group].tp);
            if !is_stable {
                self.fail(&format!(
                    "group {group}: a transaction has an offset pending, and all transactions have ended"
                ));
            }
            // What was made of it may be gone where records were deleted.
            let is_whole = self.groups.iter().all(|group| group.trimmed_to == 0);
            if let Some(offset) = offset.filter(|_| is_whole) {
                self.history.consumed(self.logs[group], Offset::ZERO, offset);
            }
        }
    }
}
