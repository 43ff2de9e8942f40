//! Probes and metrics over HTTP.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use parking_lot::RwLock;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::metrics::Metrics;

/// Why the broker is not ready; empty once it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readiness {
    /// Reasons by what they concern. Held for a look or a change; nothing waits inside.
    reasons: Arc<RwLock<Vec<(&'static str, String)>>>,
}

impl Readiness {
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

    fn reasons(&self) -> Vec<String> {
        self.reasons.read().iter().map(|(concern, reason)| format!("{concern}: {reason}")).collect()
    }
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
    let reasons = served.readiness.reasons();
    if reasons.is_empty() {
        return (StatusCode::OK, "ready\n".to_owned());
    }
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
