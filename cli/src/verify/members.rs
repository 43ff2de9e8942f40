//! A consumer group that reads along: its members come, leave, and are dropped without a word. What the group commits
//! never goes back, and nothing before it was left unread.

use super::ending::{stuck, told};
use super::reading::observe;
use super::{Log, Stop, Workbench, stopped};
use crate::connect::connect;
use crate::failure::{Failure, Outcome};
use crate::stdio::say;
use flowstone_checker::{GroupId, Isolation, Kind, Mark, Offset, ReaderId, View};
use flowstone_client::{Client, GroupConsumer, GroupEvent, Position, RecordBatch};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Members at a time.
const MEMBERS: usize = 3;
/// How long one stays; each its own part of it.
const LIFE_MAX: Duration = Duration::from_secs(12);
/// Silence after which the group goes on without a member.
const SESSION_TIMEOUT: Duration = Duration::from_secs(6);
/// Time between two commits.
const COMMIT_EVERY: Duration = Duration::from_millis(200);
/// Between two questions for what is committed.
const ASK_INTERVAL: Duration = Duration::from_millis(100);
/// After an error.
const PAUSE: Duration = Duration::from_millis(200);

/// The group and what its members did.
pub(super) struct Members {
    group: Arc<Group>,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
}

/// What all members share.
pub(super) struct Group {
    pub(super) bench: Arc<Workbench>,
    pub(super) name: String,
    mark: GroupId,
    /// By partition: what members read or passed, in ranges of offsets. Guards the ranges alone.
    passed: Mutex<Vec<Vec<(i64, i64)>>>,
}

/// Members until the workload's own end: they have to read what is there by then.
pub(super) async fn start(bench: &Arc<Workbench>, client: &Client) -> Outcome<Members> {
    let group = Group::begin(bench, client).await?;
    let (stop, stopping) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for number in 0..MEMBERS {
        tasks.spawn(be_members(group.clone(), connect(&bench.common).await?, number as u64, stopping.clone()));
    }
    tasks.spawn(ask(group.clone(), connect(&bench.common).await?, stopping));
    Ok(Members { group, tasks, stop })
}

impl Members {
    /// Waits until the group has read up to these ends, and looks whether it left anything out.
    pub(super) async fn finish(&mut self, heal: Duration, ends: &[(Log, i64)]) {
        self.group.wait(heal, ends).await;
        let _ = self.stop.send(true);
        while self.tasks.join_next().await.is_some() {}
        self.group.judge().await;
    }

    pub(super) async fn clean_up(self, client: &Client) {
        drop(self.tasks);
        self.group.clean_up(client).await;
    }
}

impl Group {
    /// A new group, that begins where this run does.
    pub(super) async fn begin(bench: &Arc<Workbench>, client: &Client) -> Outcome<Arc<Group>> {
        let name = format!("verify-{:016x}", bench.run.0);
        let positions: Vec<_> =
            bench.logs.iter().map(|log| Position::new(&bench.topic, log.partition, log.base)).collect();
        client.admin().reset_offsets(&name, &positions, false).await?;
        let mark = bench.history().group();
        let passed = Mutex::new(vec![Vec::new(); bench.logs.len()]);
        Ok(Arc::new(Group { bench: bench.clone(), name, mark, passed }))
    }

    fn passed(&self) -> MutexGuard<'_, Vec<Vec<(i64, i64)>>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A member read or passed these offsets.
    pub(super) fn pass(&self, partition: i32, from: i64, to: i64) {
        let mut passed = self.passed();
        let Some(ranges) = passed.get_mut(partition as usize) else { return };
        match ranges.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => ranges.push((from, to)),
        }
    }

    /// What the group has committed, by partition.
    async fn committed(&self, client: &Client) -> flowstone_client::Result<HashMap<i32, i64>> {
        let asked: Vec<_> = {
            let history = self.bench.history();
            let ask = |log: &Log| (*log, history.ask(log.id, Mark::Committed(self.mark), View::Fresh));
            self.bench.logs.iter().map(ask).collect()
        };
        let described = client.admin().describe_group(&self.name).await?;
        let offset = |log: &Log| {
            let offsets = described.offsets.iter();
            offsets
                .filter(|offset| offset.topic == self.bench.topic && offset.partition == log.partition)
                .map(|o| o.offset)
                .next()
        };
        let mut history = self.bench.history();
        let mut committed = HashMap::new();
        for (log, asked) in asked {
            // What was committed once is there for ever.
            let offset = offset(&log).unwrap_or(-1);
            history.told(asked, Offset::new(offset));
            committed.insert(log.partition, offset);
        }
        Ok(committed)
    }

    /// Waits until all before these ends is committed.
    pub(super) async fn wait(&self, heal: Duration, ends: &[(Log, i64)]) {
        self.bench.progress.set_message("waiting for the group to read everything");
        let deadline = Instant::now() + heal;
        loop {
            let asked = async {
                let client = connect(&self.bench.common).await?;
                self.committed(&client).await.map_err(Failure::from)
            };
            let behind = match asked.await {
                Ok(committed) => {
                    let at = |log: &Log| committed.get(&log.partition).copied().unwrap_or(-1);
                    match ends.iter().find(|(log, end)| at(log) <= *end) {
                        None => return,
                        Some((log, end)) => (*log, format!("it has committed {} of {end}", at(log))),
                    }
                }
                Err(failure) => match ends.first() {
                    Some((log, _)) => (*log, told(failure)),
                    None => return,
                },
            };
            if Instant::now() > deadline {
                let (log, why) = behind;
                return stuck(&self.bench, &log, &format!("is not read by its group {heal:?} after the end: {why}"));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Nothing before what is committed was left unread.
    async fn judge(&self) {
        let committed = async {
            let client = connect(&self.bench.common).await?;
            self.committed(&client).await.map_err(Failure::from)
        };
        let Ok(committed) = committed.await else { return };
        let mut passed = self.passed().clone();
        for log in &self.bench.logs {
            let end = committed.get(&log.partition).copied().unwrap_or(-1);
            let ranges = &mut passed[log.partition as usize];
            ranges.sort_unstable();
            let mut at = log.base;
            let mut skipped = Vec::new();
            for (from, to) in ranges.iter().copied().chain([(end, end)]) {
                if from > at {
                    skipped.push((at, from.min(end)));
                }
                at = at.max(to);
            }
            let mut history = self.bench.history();
            for (from, to) in skipped {
                let first = history.values(log.id, Offset::new(from), Offset::new(to)).next();
                if let Some((offset, value)) = first {
                    let detail = format!(
                        "the group has committed {end}, and no member of it was given value {value}; nobody read {from} to {to}"
                    );
                    history.report(Kind::Skip, log.id, Some(offset), detail);
                }
            }
        }
    }

    pub(super) async fn clean_up(&self, client: &Client) {
        // A member that was dropped is remembered until its session is over.
        let deadline = Instant::now() + SESSION_TIMEOUT * 2;
        while let Err(error) = client.admin().delete_group(&self.name).await {
            if Instant::now() > deadline {
                return say(format_args!("warning: cannot remove group {}: {error}", self.name));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Numbers that look random, the same for one run.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most.max(1)
    }
}

/// One member after the other.
async fn be_members(group: Arc<Group>, client: Client, number: u64, mut stop: Stop) {
    let mut dice = Dice(group.bench.run.0 ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    while !*stop.borrow() {
        let life = Duration::from_millis(1 + dice.below(LIFE_MAX.as_millis() as u64));
        let leaves = dice.below(3) > 0;
        let joined = client
            .group(&group.name)
            .topic(&group.bench.topic)
            .session_timeout(SESSION_TIMEOUT)
            .commit_every(COMMIT_EVERY)
            .join()
            .await;
        let Ok(mut consumer) = joined else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        tokio::select! {
            () = read(&group, &mut consumer) => {}
            () = tokio::time::sleep(life) => {}
            () = stopped(&mut stop) => {}
        }
        if leaves || *stop.borrow() {
            // Whoever cannot say good-bye is missed after a while.
            let _ = consumer.close(SESSION_TIMEOUT).await;
        }
    }
}

/// What one member is in the middle of: by partition, where it goes on.
#[derive(Default)]
pub(super) struct Current(HashMap<i32, i64>);

impl Current {
    pub(super) fn take(&mut self, event: GroupEvent) {
        match event {
            GroupEvent::Revoking(revocation) => {
                for (_, partition) in revocation.partitions() {
                    self.0.remove(partition);
                }
            }
            GroupEvent::Lost(partitions) => {
                for (_, partition) in partitions {
                    self.0.remove(&partition);
                }
            }
            _ => {}
        }
    }

    /// Notes a batch; its partition may be new to this member.
    pub(super) fn note(&mut self, group: &Group, reader: ReaderId, batch: &RecordBatch) {
        let bench = &*group.bench;
        let Some(log) = bench.log(batch.partition()) else { return };
        let observed: Vec<_> =
            batch.iter().map(|record| (record.offset(), observe(bench, record.value_bytes()))).collect();
        let mut history = bench.history();
        let from = *self.0.entry(log.partition).or_insert_with(|| {
            history.assigned(reader, log.id, Offset::new(batch.start_offset()));
            batch.start_offset()
        });
        for (offset, observed) in observed {
            history.read(reader, log.id, Offset::new(offset), observed);
        }
        history.read_past(reader, log.id, Offset::new(batch.next_offset()));
        drop(history);
        group.pass(log.partition, from, batch.next_offset());
        self.0.insert(log.partition, batch.next_offset());
    }
}

/// Reads until the membership is over for good.
async fn read(group: &Group, consumer: &mut GroupConsumer) {
    let mut events = consumer.events();
    let reader = group.bench.history().reader(Isolation::ReadCommitted);
    let mut current = Current::default();
    loop {
        tokio::select! {
            biased;
            Some(event) = events.next() => current.take(event),
            batch = consumer.next_batch() => match batch {
                Some(Ok(batch)) => current.note(group, reader, &batch),
                Some(Err(_)) => tokio::time::sleep(PAUSE).await,
                None => return,
            },
        }
    }
}

/// Asks for what is committed all the while.
async fn ask(group: Arc<Group>, client: Client, mut stop: Stop) {
    let asking = async {
        loop {
            // Nobody to ask just now is no finding; the end will tell.
            let _ = group.committed(&client).await;
            tokio::time::sleep(ASK_INTERVAL).await;
        }
    };
    tokio::select! {
        () = asking => {}
        () = stopped(&mut stop) => {}
    }
}
