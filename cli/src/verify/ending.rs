//! The end of a run: what is under way is told, the cluster heals, and everything is read once more.

use super::producing::Line;
use super::reading::Reading;
use super::{Log, Workbench};
use crate::connect::connect;
use crate::failure::{Failure, Outcome};
use flowstone_checker::{Isolation, Kind, SenderKind};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How long one attempt to write a record may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// After an attempt that failed.
const PAUSE: Duration = Duration::from_millis(200);

/// Waits for all clients, then as [`heal_and_read_all`].
pub(super) async fn wait_and_read_all(
    bench: &Arc<Workbench>,
    heal: Duration,
    producers: &mut JoinSet<Outcome>,
    readers: &mut JoinSet<Outcome>,
) -> Vec<(Log, i64)> {
    bench.progress.set_message("waiting for what is under way");
    // A failure now is that of a client that was to end anyway.
    while producers.join_next().await.is_some() {}
    while readers.join_next().await.is_some() {}
    bench.history().sending_ended(bench.elapsed());
    heal_and_read_all(bench, heal).await
}

/// Waits until each partition takes a record, and reads everything; where each ends. Where that is not possible within
/// `heal`, it is an anomaly.
pub(super) async fn heal_and_read_all(bench: &Arc<Workbench>, heal: Duration) -> Vec<(Log, i64)> {
    let deadline = Instant::now() + heal;
    bench.progress.set_message("waiting for the cluster to heal");
    let mut ends = Vec::new();
    for log in &bench.logs {
        match healed(bench, log, deadline).await {
            Ok(end) => ends.push((*log, end)),
            Err(reason) => stuck(bench, log, &format!("takes no record {heal:?} after the workload's end: {reason}")),
        }
    }
    bench.progress.set_message("reading everything");
    // Time of its own, which begins anew with every record.
    if let Err(reason) = read_all(bench, heal, &ends).await {
        for (log, _) in &ends {
            stuck(bench, log, &format!("cannot be read to its end: {reason}"));
        }
    }
    ends
}

pub(super) fn stuck(bench: &Workbench, log: &Log, what: &str) {
    bench.history().report(Kind::Stuck, log.id, None, format!("the partition {what}"));
}

/// Writes records until one is acknowledged; its offset. All that this run wrote lies before it.
///
/// # Errors
/// What kept it from that until the deadline.
async fn healed(bench: &Arc<Workbench>, log: &Log, deadline: Instant) -> Result<i64, String> {
    loop {
        let attempt = async {
            let client = connect(&bench.common).await?;
            let producer = client.producer().delivery_timeout(PROBE_TIMEOUT).build().await?;
            let sender = bench.history().sender(SenderKind::IDEMPOTENT);
            Line::new(bench, producer, sender, *log).probe().await.map_err(Failure::from)
        };
        match attempt.await {
            Ok(offset) => return Ok(offset),
            Err(failure) if Instant::now() > deadline => return Err(told(failure)),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Reads each partition from where this run began up to this offset and all that is before it.
///
/// # Errors
/// What kept it from that: for `patience` not one record came.
async fn read_all(bench: &Arc<Workbench>, patience: Duration, ends: &[(Log, i64)]) -> Result<(), String> {
    let mut deadline = Instant::now() + patience;
    let mut reading = loop {
        let attempt = async {
            let client = connect(&bench.common).await?;
            Reading::begin(bench, &client, Isolation::ReadCommitted, |log| log.base).await.map_err(Failure::from)
        };
        match attempt.await {
            Ok(reading) => break reading,
            Err(failure) if Instant::now() > deadline => return Err(told(failure)),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    };
    let mut last_error = String::new();
    loop {
        let position = |log: &Log| reading.consumer.position(&bench.topic, log.partition).unwrap_or_default();
        let Some((log, end)) = ends.iter().find(|(log, end)| position(log) <= *end) else { break };
        let at = format!("partition {} is read up to offset {} of {end}", log.partition, position(log));
        match tokio::time::timeout_at(deadline.into(), reading.next()).await {
            Ok(Ok(_)) => deadline = Instant::now() + patience,
            Ok(Err(error)) => {
                last_error = format!(": {error}");
                tokio::time::sleep(PAUSE).await;
            }
            Err(_) => return Err(format!("{at}, and nothing came for {patience:?}{last_error}")),
        }
    }
    for (log, _) in ends {
        bench.history().fully_read(log.id);
    }
    Ok(())
}

pub(super) fn told(failure: Failure) -> String {
    match failure {
        Failure::Error { message, .. } => message,
        Failure::OutputClosed => "stdout was closed".to_owned(),
    }
}
