//! Probes and metrics over HTTP.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use flowstone_replication::{Health, Role};
use parking_lot::RwLock;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::controller::table::METADATA_PARTITION;
use crate::metrics::Metrics;
use crate::partition::{LocalReplicas, Slot};

/// Why the broker is not ready; empty once it is.
#[derive(Clone, Debug)]
pub(crate) struct Readiness {
    /// Reasons by what they concern. Held for a look or a change; nothing waits inside.
    reasons: Arc<RwLock<Vec<(&'static str, String)>>>,
    /// Looked through at each probe.
    replicas: LocalReplicas,
}

/// Partitions that a probe names; of more it says how many there are.
const SICK_NAMED_MAX: usize = 10;

impl Readiness {
    pub(crate) fn new(replicas: LocalReplicas) -> Self {
        Self { reasons: Arc::default(), replicas }
    }

    /// `concern` keeps the broker from being ready, for `reason`.
    pub(crate) fn hold(&self, concern: &'static str, reason: impl Into<String>) {
        let mut reasons = self.reasons.write();
        reasons.retain(|(held, _)| *held != concern);
        reasons.push((concern, reason.into()));
    }

    /// `concern` no longer does.
    pub(crate) fn release(&self, concern: &'static str) {
        self.reasons.write().retain(|(held, _)| *held != concern);
    }

    /// Why it is not ready, the state of single partitions aside.
    pub(crate) fn held(&self) -> Vec<String> {
        self.reasons.read().iter().map(|(concern, reason)| format!("{concern}: {reason}")).collect()
    }

    /// What is wrong with which replica: of those that are being recovered, and of those that no waiting will help.
    fn sick(&self) -> (Vec<String>, Vec<String>) {
        let (mut recovering, mut lost) = (Vec::new(), Vec::new());
        for (tp, slot) in self.replicas.all() {
            match slot {
                Slot::Open(partition) => {
                    let name = format!("{}-{}", partition.topic, tp.partition);
                    let status = partition.replica.status();
                    match status.health {
                        Health::Failed { message } => recovering.push(format!("partition {name}: {message}")),
                        // Served again by an operator alone; the metadata's is what all else depends on.
                        Health::Quarantined { message } if partition.internal => {
                            recovering.push(format!("partition {name}: {message}"));
                        }
                        Health::Quarantined { message } => lost.push(format!("partition {name}: {message}")),
                        // Without it nothing is followed here that the cluster decides.
                        Health::Lost { message, .. } if tp == METADATA_PARTITION => {
                            recovering.push(format!("partition {name}: {message}"));
                        }
                        // The cluster gives it another one by itself, for as long as there is a majority.
                        Health::Lost { message, .. } => lost.push(format!("partition {name}: {message}")),
                        Health::Ok | Health::DiskFull if status.role == Role::Opening => {
                            recovering.push(format!("partition {name}: it is being recovered"));
                        }
                        // Who leads a group of several does not depend on this broker alone.
                        Health::Ok | Health::DiskFull if !status.is_ready() && !partition.has_peers() => {
                            recovering.push(format!("partition {name}: nobody leads it yet"));
                        }
                        Health::Ok | Health::DiskFull => {}
                    }
                }
                Slot::Opening => recovering.push(format!("partition {tp}: it is being opened")),
                Slot::Failed(error) | Slot::Refused(error) if tp == METADATA_PARTITION => {
                    recovering.push(format!("partition {tp}: {error}"));
                }
                Slot::Failed(error) | Slot::Refused(error) => lost.push(format!("partition {tp}: {error}")),
            }
        }
        (named(recovering), named(lost))
    }
}

/// The first few, in the same order every time.
fn named(mut sick: Vec<String>) -> Vec<String> {
    sick.sort();
    let more = sick.len().saturating_sub(SICK_NAMED_MAX);
    sick.truncate(SICK_NAMED_MAX);
    if more > 0 {
        sick.push(format!("and {more} more"));
    }
    sick
}

/// Time that a probe or a scraper may take for one request.
const REQUEST_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
struct Served {
    readiness: Readiness,
    metrics: Arc<Metrics>,
}

/// Serves `/livez`, `/readyz` and `/metrics` until `stop`.
pub(crate) async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    mut stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(show_metrics))
        .with_state(Served { readiness, metrics });
    axum::serve(listener, router)
        .with_graceful_shutdown(async move {
            // An error means that the broker is gone altogether.
            drop(stop.wait_for(|stops| *stops).await);
        })
        .await
}

async fn readyz(State(served): State<Served>) -> impl IntoResponse {
    let mut reasons = served.readiness.held();
    let (recovering, lost) = served.readiness.sick();
    reasons.extend(recovering);
    if reasons.is_empty() {
        // What only an operator can bring back does not make a broker unready for ever, but is named.
        let lost: String = lost.iter().map(|lost| format!("lost: {lost}\n")).collect();
        return (StatusCode::OK, format!("ready\n{lost}"));
    }
    reasons.extend(lost);
    (StatusCode::SERVICE_UNAVAILABLE, format!("not ready\n{}\n", reasons.join("\n")))
}

async fn show_metrics(State(served): State<Served>) -> impl IntoResponse {
    // Thousands of partitions take a moment: not on the runtime's thread.
    let text = tokio::time::timeout(REQUEST_MAX, tokio::task::spawn_blocking(move || served.metrics.encode())).await;
    match text {
        Ok(Ok(Ok(text))) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, [(header::CONTENT_TYPE, kind)], text)
        }
        _ => {
            let kind = "text/plain; charset=utf-8";
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, kind)], "cannot gather metrics\n".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::{Error, ErrorCode, PartitionId, TopicId, TopicPartition};

    use super::*;

    #[test]
    fn a_broker_whose_metadata_cannot_be_opened_is_not_ready_and_says_why() {
        let replicas = LocalReplicas::default();
        let readiness = Readiness::new(replicas.clone());
        let broken = || Slot::Failed(Box::new(Error::new(ErrorCode::StorageFailed, "no such disk; mend it")));
        replicas.set(TopicPartition { topic: TopicId::new(7), partition: PartitionId::new(0) }, broken());
        let (recovering, lost) = readiness.sick();
        assert_eq!((recovering.len(), lost.len()), (0, 1), "one partition is not all of a broker");
        replicas.set(METADATA_PARTITION, broken());
        let (recovering, _) = readiness.sick();
        assert!(recovering.iter().any(|reason| reason.contains("no such disk")), "{recovering:?}");
    }
}
