//! A topic's configuration: Kafka's keys and ours, with their parsing, defaults and checks.
//!
//! A value travels and is stored as text in its canonical form (milliseconds and bytes as plain numbers, -1 for
//! "without limit"); what a user writes may have a unit (`retention.ms=7d`).

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use flowstone_protocol::{Compression, Error, ErrorCode};
use flowstone_storage::CompactionConfig;

use crate::units;

/// Below this a log would be more files than records.
const SEGMENT_BYTES_MIN: u64 = 1 << 16;
/// So would it be if a segment were closed more often than this.
const SEGMENT_MS_MIN: u64 = 100;
/// A segment's positions are 32 bits wide.
const SEGMENT_BYTES_MAX: u64 = 2 << 30;

/// No key or value is longer; what is would only be quoted in an error.
const QUOTED_BYTES_MAX: usize = 200;

/// When a partition acknowledges: after its majority flushed, or as soon as a majority has it in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushPolicy {
    /// On the disks of a majority before the answer.
    Quorum,
    /// In a majority's memory before the answer.
    Relaxed,
}

/// What the broker does with the codec of a produced batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionPolicy {
    /// Kept as the producer sent it.
    Producer,
    /// Rewritten with this codec where it differs.
    Codec(Compression),
}

/// Which time a record carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimestampPolicy {
    /// The producer's.
    CreateTime,
    /// The leader's, when it appends.
    LogAppendTime,
}

/// A topic's effective settings, defaults and overrides merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicConfig {
    /// Whether age and size make room: where not, the two that follow have no effect.
    pub deletes: bool,
    /// Whether, and how, only the last record of each key is kept.
    pub compaction: Option<CompactionConfig>,
    /// Records older than this may go; `None` keeps them for ever.
    pub retention: Option<Duration>,
    /// Bytes of one partition's log above which its oldest segments go; `None` is without limit.
    pub retention_bytes: Option<u64>,
    /// Size at which a segment is closed.
    pub segment_bytes: u64,
    /// Age at which a segment is closed; `None` never by age.
    pub segment_age: Option<Duration>,
    /// Largest batch accepted, header included.
    pub max_message_bytes: usize,
    /// How far a record's timestamp may lie ahead of the broker's clock.
    pub timestamp_ahead_max: Duration,
    /// What becomes of the producer's codec.
    pub compression: CompressionPolicy,
    /// Which time records carry.
    pub timestamps: TimestampPolicy,
    /// Replicas that must have a batch before `quorum` is answered; never above the majority.
    pub min_insync_replicas: u32,
    /// When a batch counts as had.
    pub flush: FlushPolicy,
}

/// One key of a topic's configuration.
#[derive(Debug)]
pub struct TopicKey {
    /// The key, as users write it.
    pub name: &'static str,
    /// Its default, in canonical form.
    pub default: &'static str,
    /// What it does, for the reference.
    pub doc: &'static str,
    /// Canonical form of a value, or why it is none.
    canonical: fn(&str) -> Result<String, String>,
}

/// All keys, sorted by name.
pub const TOPIC_KEYS: &[TopicKey] = &[
    TopicKey {
        name: "cleanup.policy",
        default: "delete",
        doc: "What makes room: `delete` drops whole segments by age and size; `compact` keeps the last record of each key, and takes only records with one; `compact,delete` does both.",
        canonical: cleanup_policy,
    },
    TopicKey {
        name: "compression.type",
        default: "producer",
        doc: "`producer` keeps batches as sent; `uncompressed`, `gzip`, `snappy`, `lz4`, `zstd` rewrite what differs.",
        canonical: compression_type,
    },
    TopicKey {
        name: "delete.retention.ms",
        default: "86400000",
        doc: "How long a compacted topic keeps a tombstone (a record without a value, which deletes its key) after it was cleaned first. No effect under `cleanup.policy=delete`.",
        canonical: milliseconds,
    },
    TopicKey {
        name: "flowstone.flush",
        default: "quorum",
        doc: "`quorum`: flushed to the disks of a majority before the answer; `relaxed`: in a majority's memory.",
        canonical: flush,
    },
    TopicKey {
        name: "max.compaction.lag.ms",
        default: "9223372036854775807",
        doc: "A compacted topic's segments are closed at this age, and cleaned when they have records this old, however few there are to clean. No effect under `cleanup.policy=delete`.",
        canonical: positive_milliseconds,
    },
    TopicKey {
        name: "max.message.bytes",
        default: "1048588",
        doc: "Largest record batch accepted, in bytes, compressed as it is sent.",
        canonical: positive_bytes,
    },
    TopicKey {
        name: "message.timestamp.after.max.ms",
        default: "3600000",
        doc: "How far a record's timestamp may lie ahead of the broker's clock.",
        canonical: milliseconds,
    },
    TopicKey {
        name: "message.timestamp.type",
        default: "CreateTime",
        doc: "`CreateTime`: the producer's time; `LogAppendTime`: the leader's.",
        canonical: timestamp_type,
    },
    TopicKey {
        name: "min.cleanable.dirty.ratio",
        default: "0.5",
        doc: "Share of a compacted partition's bytes, from 0 to 1, that must be new for it to be cleaned. No effect under `cleanup.policy=delete`.",
        canonical: ratio,
    },
    TopicKey {
        name: "min.compaction.lag.ms",
        default: "0",
        doc: "Youngest age at which a compacted topic's record may go. No effect under `cleanup.policy=delete`.",
        canonical: milliseconds,
    },
    TopicKey {
        name: "min.insync.replicas",
        default: "1",
        doc: "Replicas that must have a record before `acks=quorum` is answered; at most the majority.",
        canonical: positive_count,
    },
    TopicKey {
        name: "retention.bytes",
        default: "-1",
        doc: "Bytes kept per partition; -1 without limit.",
        canonical: bytes_or_unlimited,
    },
    TopicKey {
        name: "retention.ms",
        default: "604800000",
        doc: "How long records are kept; -1 for ever.",
        canonical: milliseconds_or_unlimited,
    },
    TopicKey {
        name: "segment.bytes",
        default: "1073741824",
        doc: "Size at which a segment file is closed; at least `max.message.bytes`.",
        canonical: segment_bytes,
    },
    TopicKey {
        name: "segment.ms",
        default: "604800000",
        doc: "Age at which a segment file is closed.",
        canonical: segment_ms,
    },
];

/// Overrides of a topic, or the broker's defaults: canonical values by key.
pub type TopicOverrides = BTreeMap<String, String>;

/// The key called `name`.
pub fn topic_key(name: &str) -> Option<&'static TopicKey> {
    TOPIC_KEYS.iter().find(|key| key.name == name)
}

/// Canonical form of `value` for `key`.
///
/// # Errors
/// `INVALID_CONFIG` for an unknown key (with the nearest known one) or a value that the key does not take.
pub fn canonical_value(key: &str, value: &str) -> Result<String, Error> {
    let value = value.trim();
    if key.len() > QUOTED_BYTES_MAX || value.len() > QUOTED_BYTES_MAX {
        let why = format!("a topic config whose key or value is longer than {QUOTED_BYTES_MAX} bytes; no config is");
        return Err(Error::new(ErrorCode::InvalidConfig, why));
    }
    let Some(known) = topic_key(key) else {
        let hint = match units::did_you_mean(key, TOPIC_KEYS.iter().map(|key| key.name)) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known are: {}", TOPIC_KEYS.iter().map(|key| key.name).collect::<Vec<_>>().join(", ")),
        };
        return Err(Error::new(ErrorCode::InvalidConfig, format!("unknown topic config `{key}`; {hint}")));
    };
    (known.canonical)(value)
        .map_err(|why| Error::new(ErrorCode::InvalidConfig, format!("topic config {key} = `{value}`: {why}")))
}

impl TopicConfig {
    /// Merges a topic's overrides over the broker's defaults over the built-in ones.
    ///
    /// # Errors
    /// `INVALID_CONFIG` where a value is malformed or two of them contradict each other.
    pub fn resolve(defaults: &TopicOverrides, overrides: &TopicOverrides) -> Result<TopicConfig, Error> {
        let value = |name: &str| -> &str {
            overrides
                .get(name)
                .or_else(|| defaults.get(name))
                .map(String::as_str)
                .or_else(|| topic_key(name).map(|key| key.default))
                .unwrap_or_default()
        };
        let cleanup = value("cleanup.policy");
        let compacts = cleanup.contains("compact");
        let lag_max: u64 = number("max.compaction.lag.ms", value("max.compaction.lag.ms"))?;
        let lag_max = (lag_max < i64::MAX as u64).then(|| Duration::from_millis(lag_max));
        let compaction = CompactionConfig {
            tombstones_kept: Duration::from_millis(number("delete.retention.ms", value("delete.retention.ms"))?),
            lag_min: Duration::from_millis(number("min.compaction.lag.ms", value("min.compaction.lag.ms"))?),
            lag_max,
            dirty_per_mille_min: per_mille("min.cleanable.dirty.ratio", value("min.cleanable.dirty.ratio"))?,
        };
        let segment_age = Duration::from_millis(number("segment.ms", value("segment.ms"))?);
        // What is not closed is not cleaned.
        let segment_age_max = if compacts { lag_max } else { None };
        let config = TopicConfig {
            deletes: cleanup.contains("delete"),
            compaction: compacts.then_some(compaction),
            retention: unlimited_duration("retention.ms", value("retention.ms"))?,
            retention_bytes: unlimited_number("retention.bytes", value("retention.bytes"))?,
            segment_bytes: number("segment.bytes", value("segment.bytes"))?,
            segment_age: Some(segment_age_max.map_or(segment_age, |age| age.min(segment_age))),
            max_message_bytes: number("max.message.bytes", value("max.message.bytes"))?,
            timestamp_ahead_max: Duration::from_millis(number(
                "message.timestamp.after.max.ms",
                value("message.timestamp.after.max.ms"),
            )?),
            compression: match value("compression.type") {
                "producer" => CompressionPolicy::Producer,
                "uncompressed" => CompressionPolicy::Codec(Compression::None),
                codec => CompressionPolicy::Codec(
                    Compression::from_str(codec).map_err(|_| malformed("compression.type", codec))?,
                ),
            },
            timestamps: match value("message.timestamp.type") {
                "LogAppendTime" => TimestampPolicy::LogAppendTime,
                _ => TimestampPolicy::CreateTime,
            },
            min_insync_replicas: number("min.insync.replicas", value("min.insync.replicas"))?,
            flush: if value("flowstone.flush") == "relaxed" { FlushPolicy::Relaxed } else { FlushPolicy::Quorum },
        };
        if let Some(lag_max) = lag_max.filter(|lag_max| compacts && *lag_max < compaction.lag_min) {
            return Err(Error::new(
                ErrorCode::InvalidConfig,
                format!(
                    "max.compaction.lag.ms ({}) is below min.compaction.lag.ms ({}): a record would have to be cleaned \
                     before it may be; raise the one or lower the other",
                    lag_max.as_millis(),
                    compaction.lag_min.as_millis()
                ),
            ));
        }
        if config.segment_bytes < config.max_message_bytes as u64 {
            return Err(Error::new(
                ErrorCode::InvalidConfig,
                format!(
                    "segment.bytes ({}) is below max.message.bytes ({}): a segment must hold the largest batch; raise \
                     segment.bytes or lower max.message.bytes",
                    config.segment_bytes, config.max_message_bytes
                ),
            ));
        }
        Ok(config)
    }

    /// Checks what depends on the topic's replicas and the broker's limits.
    ///
    /// # Errors
    /// `INVALID_CONFIG`, saying which bound is broken.
    pub fn check(&self, replication_factor: u32, batch_bytes_max: usize) -> Result<(), Error> {
        let majority = replication_factor / 2 + 1;
        if self.min_insync_replicas > majority {
            return Err(Error::new(
                ErrorCode::InvalidConfig,
                format!(
                    "min.insync.replicas ({}) is above the majority ({majority}) of {replication_factor} replica(s): a \
                     quorum never has more; lower it to {majority}",
                    self.min_insync_replicas
                ),
            ));
        }
        if self.max_message_bytes > batch_bytes_max {
            return Err(Error::new(
                ErrorCode::InvalidConfig,
                format!(
                    "max.message.bytes ({}) is above what this broker's limits.request_bytes lets through \
                     ({batch_bytes_max}); lower it, or raise limits.request_bytes",
                    self.max_message_bytes
                ),
            ));
        }
        Ok(())
    }
}

fn malformed(key: &str, value: &str) -> Error {
    Error::new(ErrorCode::InvalidConfig, format!("topic config {key} = `{value}` is malformed"))
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, Error> {
    value.parse().map_err(|_| malformed(key, value))
}

fn unlimited_number(key: &str, value: &str) -> Result<Option<u64>, Error> {
    if value == "-1" { Ok(None) } else { number(key, value).map(Some) }
}

fn unlimited_duration(key: &str, value: &str) -> Result<Option<Duration>, Error> {
    Ok(unlimited_number(key, value)?.map(Duration::from_millis))
}

fn milliseconds(value: &str) -> Result<String, String> {
    let ms = match value.parse::<u64>() {
        Ok(ms) => ms,
        Err(_) => u64::try_from(units::parse_duration(value)?.as_millis()).map_err(|_| "too long".to_owned())?,
    };
    if ms > i64::MAX as u64 {
        return Err("too long".to_owned());
    }
    Ok(ms.to_string())
}

fn segment_ms(value: &str) -> Result<String, String> {
    let ms = milliseconds(value)?;
    if ms.parse().is_ok_and(|ms: u64| ms < SEGMENT_MS_MIN) {
        return Err(format!("at least {SEGMENT_MS_MIN} ms, or there would be a file for every batch"));
    }
    Ok(ms)
}

fn milliseconds_or_unlimited(value: &str) -> Result<String, String> {
    if value == "-1" { Ok(value.to_owned()) } else { milliseconds(value) }
}

fn bytes(value: &str) -> Result<u64, String> {
    let bytes = units::parse_bytes(value)?;
    if bytes > i64::MAX as u64 { Err("too large".to_owned()) } else { Ok(bytes) }
}

fn bytes_or_unlimited(value: &str) -> Result<String, String> {
    if value == "-1" { Ok(value.to_owned()) } else { bytes(value).map(|bytes| bytes.to_string()) }
}

fn positive_bytes(value: &str) -> Result<String, String> {
    match bytes(value)? {
        0 => Err("must be above 0".to_owned()),
        bytes if bytes > i32::MAX as u64 => Err(format!("at most {} (a batch's length has 32 bits)", i32::MAX)),
        bytes => Ok(bytes.to_string()),
    }
}

fn segment_bytes(value: &str) -> Result<String, String> {
    let bytes = bytes(value)?;
    if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&bytes) {
        return Err(format!("must lie between {SEGMENT_BYTES_MIN} and {SEGMENT_BYTES_MAX} bytes"));
    }
    Ok(bytes.to_string())
}

fn positive_count(value: &str) -> Result<String, String> {
    match value.parse::<u32>() {
        Ok(count) if (1..=1_000).contains(&count) => Ok(count.to_string()),
        _ => Err("must be a number from 1 to 1000".to_owned()),
    }
}

fn one_of(value: &str, known: &[&str]) -> Result<String, String> {
    known
        .iter()
        .find(|name| name.eq_ignore_ascii_case(value))
        .map(|name| (*name).to_owned())
        .ok_or_else(|| format!("must be one of {}", known.join(", ")))
}

fn cleanup_policy(value: &str) -> Result<String, String> {
    let mut policies = value
        .split(',')
        .map(|policy| one_of(policy.trim(), &["compact", "delete"]))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| "must be one of compact, delete, or `compact,delete`".to_owned())?;
    policies.sort_unstable();
    policies.dedup();
    Ok(policies.join(","))
}

fn positive_milliseconds(value: &str) -> Result<String, String> {
    let ms = milliseconds(value)?;
    if ms == "0" { Err("must be above 0".to_owned()) } else { Ok(ms) }
}

/// A share from 0 to 1, in steps of a thousandth.
fn ratio(value: &str) -> Result<String, String> {
    match value.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(((share * 1_000.0).round() / 1_000.0).to_string()),
        _ => Err("must be a number from 0 to 1".to_owned()),
    }
}

fn per_mille(key: &str, value: &str) -> Result<u32, Error> {
    Ok((number::<f64>(key, value)? * 1_000.0).round() as u32)
}

fn compression_type(value: &str) -> Result<String, String> {
    let value = if value.eq_ignore_ascii_case("none") { "uncompressed" } else { value };
    one_of(value, &["producer", "uncompressed", "gzip", "snappy", "lz4", "zstd"])
}

fn flush(value: &str) -> Result<String, String> {
    one_of(value, &["quorum", "relaxed"])
}

fn timestamp_type(value: &str) -> Result<String, String> {
    one_of(value, &["CreateTime", "LogAppendTime"])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(overrides: &[(&str, &str)]) -> Result<TopicConfig, Error> {
        let overrides = overrides
            .iter()
            .map(|(key, value)| Ok(((*key).to_owned(), canonical_value(key, value)?)))
            .collect::<Result<_, Error>>()?;
        TopicConfig::resolve(&TopicOverrides::new(), &overrides)
    }

    #[test]
    fn keys_are_sorted_and_their_defaults_canonical() {
        assert!(TOPIC_KEYS.is_sorted_by_key(|key| key.name));
        for key in TOPIC_KEYS {
            assert_eq!(canonical_value(key.name, key.default).as_deref(), Ok(key.default), "{}", key.name);
        }
        assert!(TopicConfig::resolve(&TopicOverrides::new(), &TopicOverrides::new()).is_ok());
    }

    #[test]
    fn values_take_units_and_are_kept_plain() {
        assert_eq!(canonical_value("retention.ms", "7d").as_deref(), Ok("604800000"));
        assert_eq!(canonical_value("segment.bytes", "64 MiB").as_deref(), Ok("67108864"));
        assert_eq!(canonical_value("compression.type", "none").as_deref(), Ok("uncompressed"));
    }

    #[test]
    fn what_makes_room_is_compaction_age_or_both() {
        assert_eq!(canonical_value("cleanup.policy", "delete, compact").as_deref(), Ok("compact,delete"));
        assert_eq!(canonical_value("min.cleanable.dirty.ratio", "0.25").as_deref(), Ok("0.25"));
        let config = resolve(&[]).expect("the defaults");
        assert!(config.deletes && config.compaction.is_none());
        let config = resolve(&[("cleanup.policy", "compact"), ("max.compaction.lag.ms", "1h")]).expect("compacted");
        assert!(!config.deletes);
        let compaction = config.compaction.expect("compacted");
        assert_eq!(compaction.tombstones_kept, Duration::from_secs(24 * 60 * 60));
        assert_eq!((compaction.dirty_per_mille_min, compaction.lag_min), (500, Duration::ZERO));
        assert_eq!(compaction.lag_max, Some(Duration::from_secs(3_600)));
        assert_eq!(config.segment_age, Some(Duration::from_secs(3_600)));
        let config = resolve(&[("cleanup.policy", "compact,delete")]).expect("both");
        assert!(config.deletes && config.compaction.is_some_and(|compaction| compaction.lag_max.is_none()));
        let lags = [("cleanup.policy", "compact"), ("max.compaction.lag.ms", "5"), ("min.compaction.lag.ms", "6")];
        assert!(resolve(&lags).expect_err("contradictory").message.contains("raise the one or lower the other"));
    }

    #[test]
    fn bad_values_are_told() {
        let check = |key: &str, value: &str, part: &str| {
            let error = canonical_value(key, value).expect_err(key);
            assert!(error.message.contains(part), "{key}={value}: {}", error.message);
        };
        check("retention.msec", "1", "did you mean `retention.ms`?");
        check("colour", "red", "known are");
        check("retention.ms", "soon", "no duration");
        check("retention.ms", "-2", "no duration");
        check("max.message.bytes", "0", "above 0");
        check("max.message.bytes", "3 GiB", "at most");
        check("segment.bytes", "1", "between");
        check("segment.ms", "1", "at least 100 ms");
        check("segment.ms", "-1", "no duration");
        check("retention.ms", &"9".repeat(10_000), "longer than");
        check("cleanup.policy", "shred", "compact, delete");
        check("cleanup.policy", "", "compact, delete");
        check("min.cleanable.dirty.ratio", "1.5", "from 0 to 1");
        check("min.cleanable.dirty.ratio", "NaN", "from 0 to 1");
        check("max.compaction.lag.ms", "0", "above 0");
        check("compression.type", "rar", "one of");
        check("min.insync.replicas", "0", "1 to 1000");
        check("flowstone.flush", "maybe", "one of quorum, relaxed");
    }

    #[test]
    fn a_segment_holds_the_largest_batch() {
        let error = resolve(&[("segment.bytes", "65536"), ("max.message.bytes", "65537")]).expect_err("refused");
        assert!(error.message.contains("below max.message.bytes"), "{}", error.message);
        assert!(resolve(&[("segment.bytes", "65536"), ("max.message.bytes", "65536")]).is_ok());
    }

    #[test]
    fn more_replicas_than_the_majority_are_refused() {
        let config = resolve(&[("min.insync.replicas", "2")]).expect("valid alone");
        assert!(config.check(1, 1 << 24).is_err());
        assert!(config.check(3, 1 << 24).is_ok());
        assert!(resolve(&[("max.message.bytes", "32 MiB")]).expect("valid alone").check(1, 1 << 24).is_err());
    }
}
