//! `flowstone consume -g`: as a member of a group. What was printed is what is committed.

use super::{ConsumeArgs, Printing};
use crate::args::Common;
use crate::broker::StopSignals;
use crate::failure::{Failure, Outcome};
use crate::position::{From, Until};
use crate::stdio::stdout_closed;
use flowstone_client::{
    Admin, Client, GroupConsumer, GroupEvent, GroupEvents, GroupState, OffsetSpec, RecordBatch, Revocation, StartAt,
};
use futures::FutureExt;
use std::collections::HashMap;
use std::time::Duration;

/// Time between two commits while records come.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Time between two looks at whether everything wanted was read.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Where to stop, by topic and partition; none means never.
type Ends = Option<HashMap<(String, i32), i64>>;

pub(super) async fn run(
    client: &Client,
    args: &ConsumeArgs,
    group: &str,
    printing: Printing,
    common: &Common,
) -> Outcome {
    if !args.partitions.is_empty() {
        return Err(Failure::usage("-g shares the partitions out among the group's members; leave -p out"));
    }
    // From here on: what was printed is committed, and the group left, whoever asks this to stop.
    let mut signals = StopSignals::new()?;
    // A topic that is missing is told at once, rather than waited for.
    for topic in &args.topics {
        client.partition_count(topic).await?;
    }
    let ends = ends(client, args).await?;
    let start_at = match args.from {
        From::Start => StartAt::Earliest,
        From::End => StartAt::Latest,
        From::Offset(offset) => StartAt::Offset(offset),
        From::Last(records) => StartAt::FromEnd(records),
        From::Time(ms) => StartAt::Timestamp(ms),
    };
    let mut member = client.group(group).topics(&args.topics).start_at(start_at).isolation(args.isolation.to_client());
    if let Some(rack) = &args.rack {
        member = member.rack(rack);
    }
    let group = tokio::select! {
        biased;
        joined = member.commit_manually().join() => joined?,
        // Nothing was printed yet; the member leaves by being dropped.
        () = signals.next() => return stopped(args),
    };
    let mut reading = Reading { admin: client.admin(), events: group.events(), group, printing, ends };
    let done = tokio::select! {
        biased;
        () = signals.next() => stopped(args),
        () = stdout_closed() => Err(Failure::OutputClosed),
        done = reading.print_all() => done,
    };
    reading.finish(done, common.timeout).await
}

/// The ordinary end of reading without one; elsewhere the rest is missing.
fn stopped(args: &ConsumeArgs) -> Outcome {
    match (args.count, args.until, args.to_end) {
        (None, None, false) => Ok(()),
        _ => Err(Failure::failed("interrupted before the end")),
    }
}

async fn ends(client: &Client, args: &ConsumeArgs) -> Outcome<Ends> {
    let spec = match args.until {
        Some(Until::Offset(_)) | None if !args.to_end => None,
        Some(Until::Time(ms)) => Some(OffsetSpec::Timestamp(ms)),
        _ => Some(OffsetSpec::End),
    };
    let mut places = Vec::new();
    for topic in &args.topics {
        places.extend((0..client.partition_count(topic).await?).map(|partition| (topic.as_str(), partition)));
    }
    if let Some(Until::Offset(offset)) = args.until {
        let until = |(topic, partition): (&str, i32)| ((topic.to_owned(), partition), offset);
        return Ok(Some(places.into_iter().map(until).collect()));
    }
    let Some(spec) = spec else { return Ok(None) };
    let queries: Vec<_> = places.into_iter().map(|(topic, partition)| (topic, partition, spec)).collect();
    let found = client.admin().list_offsets_linearizable(&queries).await?;
    let committed = args.isolation.is_committed();
    Ok(Some(
        found
            .into_iter()
            .map(|info| {
                let end = if committed { info.offset.min(info.last_stable_offset) } else { info.offset };
                ((info.topic, info.partition), end)
            })
            .collect(),
    ))
}

struct Reading {
    admin: Admin,
    /// Before the group: revocations in it are given back first.
    events: GroupEvents,
    group: GroupConsumer,
    printing: Printing,
    ends: Ends,
}

impl Reading {
    /// Prints until everything wanted was read.
    async fn print_all(&mut self) -> Outcome {
        let mut commit_at = tokio::time::Instant::now() + COMMIT_EVERY;
        while self.printing.left != Some(0) {
            self.let_go()?;
            let batch = match self.group.next_batch().now_or_never() {
                Some(batch) => batch,
                None => {
                    self.commit_printed()?;
                    commit_at = tokio::time::Instant::now() + COMMIT_EVERY;
                    if self.is_done().await {
                        return Ok(());
                    }
                    match tokio::time::timeout(LOOK_EVERY, self.group.next_batch()).await {
                        Ok(batch) => batch,
                        Err(_) => continue,
                    }
                }
            };
            let Some(batch) = batch else { return Ok(()) };
            let batch = batch.map_err(|error| self.commit_printed().err().unwrap_or_else(|| Failure::from(error)))?;
            self.take(&batch)?;
            if tokio::time::Instant::now() >= commit_at {
                self.commit_printed()?;
                commit_at = tokio::time::Instant::now() + COMMIT_EVERY;
            }
        }
        Ok(())
    }

    /// Prints what is wanted of a batch; the position is behind what was printed.
    fn take(&mut self, batch: &RecordBatch) -> Outcome {
        let until = match &self.ends {
            Some(ends) => ends.get(&(batch.topic().to_owned(), batch.partition())).copied().unwrap_or(i64::MAX),
            None => i64::MAX,
        };
        if let Some(next) = self.printing.take_until(batch, until)? {
            self.group.seek(batch.topic(), batch.partition(), next)?;
            if next >= until {
                self.group.pause(batch.topic(), batch.partition())?;
            }
        }
        Ok(())
    }

    /// What is printed goes out, and is committed then.
    fn commit_printed(&mut self) -> Outcome {
        self.printing.flush()?;
        // Its failure is met again by the last one, or does not matter: another member has the partition by then.
        drop(self.group.commit_async());
        Ok(())
    }

    /// Partitions that go to other members go once what was printed of them is committed.
    fn let_go(&mut self) -> Outcome {
        let mut going: Vec<Revocation> = Vec::new();
        while let Some(Some(event)) = self.events.next().now_or_never() {
            if let GroupEvent::Revoking(revocation) = event {
                going.push(revocation);
            }
        }
        // They are given up behind the commit.
        if going.is_empty() { Ok(()) } else { self.commit_printed() }
    }

    /// Whether every partition that this member has was read to its end.
    async fn is_done(&self) -> bool {
        let Some(ends) = &self.ends else { return false };
        if !self.group.is_settled() {
            return false;
        }
        let assignment = self.group.assignment();
        if assignment.is_empty() {
            return self.has_none_to_come().await;
        }
        assignment.into_iter().all(|(topic, partition)| {
            let end = ends.get(&(topic.clone(), partition)).copied().unwrap_or(0);
            self.group.position(&topic, partition).is_ok_and(|position| position >= end)
        })
    }

    /// A member without partitions may be about to get some, or be one too many.
    async fn has_none_to_come(&self) -> bool {
        let Ok(group) = self.admin.describe_group(&self.group.group()).await else { return false };
        let member_id = self.group.member_id();
        let shall_read =
            |member: &flowstone_client::GroupMember| member.member_id == member_id && !member.target.is_empty();
        group.state == GroupState::Stable && group.members.len() > 1 && !group.members.iter().any(shall_read)
    }

    /// Commits what was printed, and leaves the group.
    async fn finish(mut self, done: Outcome, timeout: Duration) -> Outcome {
        // What nobody could read is not committed.
        let printed = self.printing.flush();
        let committed = match (&done, &printed) {
            (Err(Failure::OutputClosed), _) | (_, Err(_)) => Ok(()),
            _ => tokio::time::timeout(timeout, self.group.commit()).await.unwrap_or_else(|_| Ok(())),
        };
        let closed = self.group.close(timeout).await;
        done?;
        printed?;
        committed.map_err(|error| Failure::from(error).context("what was printed last is not committed"))?;
        closed?;
        Ok(())
    }
}
