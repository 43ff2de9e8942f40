//! What a benchmark found, in the form that `-o json` fixes.

use crate::output::{self, Shown};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::Duration;

/// Latencies, in microseconds with three digits, up to an hour.
#[derive(Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Self {
        Latencies(Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("the bounds are valid"))
    }

    /// So many records took this long each.
    pub(crate) fn record(&mut self, took: Duration, records: u64) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.0.saturating_record_n(micros, records);
    }

    /// What another thread saw.
    pub(crate) fn add(&mut self, other: &Latencies) {
        self.0.add(&other.0).expect("both have the same bounds");
    }

    fn millis(&self) -> LatencyMillis {
        let at = |quantile: f64| self.0.value_at_quantile(quantile) as f64 / 1_000.0;
        LatencyMillis { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: self.0.max() as f64 / 1_000.0 }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct LatencyMillis {
    p50: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Report {
    benchmark: &'static str,
    topic: String,
    partitions: i32,
    /// Records that arrived.
    records: u64,
    /// Bytes of their values.
    bytes: u64,
    seconds: f64,
    records_per_second: f64,
    /// 10^6 bytes.
    mb_per_second: f64,
    latency_ms: LatencyMillis,
    acks: String,
    flush: String,
    errors: u64,
}

/// What was run.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) benchmark: &'static str,
    pub(crate) topic: String,
    pub(crate) partitions: i32,
    pub(crate) acks: String,
    pub(crate) flush: String,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) records: u64,
    pub(crate) bytes: u64,
    pub(crate) took: Duration,
    pub(crate) latencies: Latencies,
    pub(crate) errors: u64,
}

impl Report {
    pub(crate) fn new(setting: Setting, measured: &Measured) -> Report {
        let seconds = measured.took.as_secs_f64();
        let rate = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
        Report {
            benchmark: setting.benchmark,
            topic: setting.topic,
            partitions: setting.partitions,
            records: measured.records,
            bytes: measured.bytes,
            seconds,
            records_per_second: rate(measured.records as f64),
            mb_per_second: rate(measured.bytes as f64 / 1e6),
            latency_ms: measured.latencies.millis(),
            acks: setting.acks,
            flush: setting.flush,
            errors: measured.errors,
        }
    }
}

impl Shown for Report {
    fn table(&self, _wide: bool) -> String {
        let LatencyMillis { p50, p99, p999, max } = &self.latency_ms;
        output::pairs([
            ("benchmark", self.benchmark.to_owned()),
            ("topic", format!("{}, partitions: {}", self.topic, self.partitions)),
            ("records", self.records.to_string()),
            ("bytes", self.bytes.to_string()),
            ("seconds", format!("{:.3}", self.seconds)),
            ("records/s", format!("{:.0}", self.records_per_second)),
            ("MB/s", format!("{:.1}", self.mb_per_second)),
            ("latency", format!("p50 {p50:.3} ms, p99 {p99:.3} ms, p99.9 {p999:.3} ms, max {max:.3} ms")),
            ("acks", self.acks.clone()),
            ("flush", self.flush.clone()),
            ("errors", self.errors.to_string()),
        ])
    }

    fn name(&self) -> String {
        self.topic.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures() {
        let mut latencies = Latencies::new();
        latencies.record(Duration::from_millis(1), 98);
        latencies.record(Duration::from_millis(2), 1);
        let mut other = Latencies::new();
        other.record(Duration::from_millis(8), 1);
        latencies.add(&other);
        let setting = Setting {
            benchmark: "produce",
            topic: "t".to_owned(),
            partitions: 1,
            acks: "quorum".to_owned(),
            flush: "quorum".to_owned(),
        };
        let took = Duration::from_millis(500);
        let report = Report::new(setting, &Measured { records: 100, bytes: 2_000_000, took, latencies, errors: 0 });
        assert_eq!((report.records_per_second, report.mb_per_second), (200.0, 4.0));
        let near = |value: f64, expected: f64| (value - expected).abs() < expected / 100.0;
        assert!(
            near(report.latency_ms.p50, 1.0) && near(report.latency_ms.p99, 2.0) && near(report.latency_ms.max, 8.0)
        );
    }
}
