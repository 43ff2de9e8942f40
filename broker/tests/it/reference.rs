//! `docs/operating.md` says what the code does: its reference of keys is made from the code's own tables, and the metrics
//! that it names exist.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;

use flowstone_broker::config::KEYS;
use flowstone_broker::topic_config::TOPIC_KEYS;

use crate::http::get;
use crate::world::*;

const MARK: &str = "<!-- What follows is written by the test `the_reference_is_the_code`. -->\n";

fn page() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/operating.md")
}

fn reference() -> String {
    let mut text = String::from("\n| key | default | what it does |\n|---|---|---|\n");
    let shown = |value: &str| if value.is_empty() { String::new() } else { format!("`{value}`") };
    for key in KEYS {
        writeln!(text, "| `{}` | {} | {} |", key.name, shown(key.default), key.doc).expect("text");
    }
    text.push_str("\nSection `[topic]` has the defaults of topics' own configuration; a topic's own values\n");
    text.push_str("(`topic create -c`, `topic alter -c`) go before them.\n");
    text.push_str("\n| topic config | default | what it does |\n|---|---|---|\n");
    for key in TOPIC_KEYS {
        writeln!(text, "| `{}` | {} | {} |", key.name, shown(key.default), key.doc).expect("text");
    }
    text
}

#[test]
fn the_reference_is_the_code() {
    let text = std::fs::read_to_string(page()).expect("readable");
    let (before, after) = text.split_once(MARK).expect("the mark");
    let wanted = reference();
    if after != wanted {
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(page(), format!("{before}{MARK}{wanted}")).expect("written");
            return;
        }
        panic!("the reference in docs/operating.md is old: run this test with UPDATE_DOCS=1, and look at what changed");
    }
}

#[tokio::test]
async fn every_metric_that_is_named_exists() {
    let mut world = World::new().await;
    let topic = world.create("orders", 1).await;
    world.produce(&topic, 0, batch(&["x"])).await.expect("stored");
    world.produce(&topic, 9, batch(&["x"])).await.expect_err("no such partition");
    let (_, metrics) = get(world.broker.admin_addr, "/metrics").await;
    let text = std::fs::read_to_string(page()).expect("readable");
    let named: BTreeSet<&str> = text
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("flowstone_") && *word != "flowstone_broker")
        .collect();
    assert!(named.len() > 20, "{named:?}");
    for name in named {
        let found = metrics.lines().any(|line| {
            let series = line.split(['{', ' ']).next().unwrap_or_default();
            series == name || series == format!("{name}_bucket")
        });
        assert!(found, "{name} is named in docs/operating.md and not in /metrics");
    }
    world.stop().await;
}
