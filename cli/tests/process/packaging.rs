//! The shipped dashboard and alerts against a running broker: whatever they ask for is there.

use crate::daemon::{Daemon, Setup};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

#[derive(Deserialize)]
struct Alerts {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    rules: Vec<Alert>,
}

#[derive(Deserialize)]
struct Alert {
    alert: String,
    expr: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

fn shipped(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    std::fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn alerts() -> Vec<Alert> {
    let alerts: Alerts = serde_saphyr::from_str(&shipped("packaging/prometheus/alerts.yml")).expect("rules");
    alerts.groups.into_iter().flat_map(|group| group.rules).collect()
}

/// Every value of this key, however deep.
fn all<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| all(value, key, found)),
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if name == key => found.push(text),
                    _ => all(value, key, found),
                }
            }
        }
        _ => {}
    }
}

/// The series of a broker that was used: names, each with the names of its labels.
fn series(folder: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let admin = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    let broker: Daemon = Setup::new(&folder.join("data")).set(&format!("listen.admin={admin}")).start();
    broker.run(&["topic", "create", "t"]).ok();
    broker.feed(&["produce", "t"], b"a line\n").ok();
    broker.run(&["consume", "t", "-e"]).ok();
    // An error, so that there is a series of errors.
    broker.run(&["topic", "delete", "nothing", "--yes"]).fails(3, &["nothing"]);
    let mut socket = TcpStream::connect(admin).expect("the admin listener");
    write!(socket, "GET /metrics HTTP/1.1\r\nhost: broker\r\nconnection: close\r\n\r\n").expect("sent");
    let mut text = String::new();
    socket.read_to_string(&mut text).expect("text");
    let mut series: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("flowstone_")) {
        let (name, rest) = line.split_at(line.find(['{', ' ']).expect("a value"));
        let labels = series.entry(name.to_owned()).or_default();
        // Prometheus adds these to whatever it reads.
        labels.extend(["instance", "job"].map(str::to_owned));
        if let Some((inside, _)) = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            labels.extend(inside.split(',').filter_map(|label| Some(label.split_once('=')?.0.to_owned())));
        }
    }
    series
}

/// The metrics of an expression, each with the labels that it is asked by.
fn asked(expression: &str) -> Vec<(&str, Vec<&str>)> {
    let mut asked = Vec::new();
    let mut rest = expression;
    while let Some(at) = rest.find("flowstone_") {
        let tail = &rest[at..];
        let end = tail.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(tail.len());
        let (name, behind) = tail.split_at(end);
        let labels =
            behind.strip_prefix('{').and_then(|inside| inside.split_once('}')).map_or("", |(inside, _)| inside);
        let labels = labels.split(',').filter_map(|label| Some(label.split(['=', '!']).next()?.trim()));
        asked.push((name, labels.filter(|label| !label.is_empty()).collect()));
        rest = behind;
    }
    asked
}

#[test]
fn what_dashboard_and_alerts_ask_for_is_there() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let series = series(folder.path());
    let dashboard: Value = serde_json::from_str(&shipped("packaging/grafana/flowstone.json")).expect("a dashboard");
    let mut expressions = Vec::new();
    all(&dashboard, "expr", &mut expressions);
    all(&dashboard, "definition", &mut expressions);
    assert!(expressions.len() > 40, "{}", expressions.len());
    let alerts = alerts();
    assert!(alerts.len() > 15, "{}", alerts.len());
    expressions.extend(alerts.iter().map(|alert| alert.expr.as_str()));
    for expression in expressions {
        let asked = asked(expression);
        assert!(!asked.is_empty(), "{expression} asks for nothing");
        for (name, labels) in asked {
            let has = series.get(name).unwrap_or_else(|| panic!("{name} is not in /metrics: {expression}"));
            for label in labels {
                assert!(has.contains(label), "{name} has no label {label}: {expression}");
            }
        }
        // What is grouped by must be a label of something.
        for by in expression.split("by (").skip(1) {
            for label in by.split_once(')').expect("closed").0.split(',').map(str::trim) {
                assert!(series.values().any(|labels| labels.contains(label)), "no label {label}: {expression}");
            }
        }
    }
}

#[test]
fn every_alert_says_what_to_do_and_is_a_row_of_the_operators_page() {
    let page = shipped("docs/operating.md");
    let alerts = alerts();
    let names: BTreeSet<&str> = alerts.iter().map(|alert| alert.alert.as_str()).collect();
    assert_eq!(names.len(), alerts.len(), "two alerts of one name");
    for alert in &alerts {
        assert!(page.contains(&format!("`{}`", alert.alert)), "{} is not in docs/operating.md", alert.alert);
        for key in ["summary", "description", "command"] {
            assert!(alert.annotations.contains_key(key), "{} has no {key}", alert.alert);
        }
        let command = &alert.annotations["command"];
        assert!(page.contains(command.as_str()), "`{command}` of {} is not in docs/operating.md", alert.alert);
        assert!(matches!(alert.labels["severity"].as_str(), "critical" | "warning" | "info"), "{}", alert.alert);
    }
    for word in page.split('`').filter(|word| word.starts_with("Flowstone") && word.len() > "Flowstone".len()) {
        assert!(names.contains(word), "docs/operating.md names {word}, and no alert is called so");
    }
}
