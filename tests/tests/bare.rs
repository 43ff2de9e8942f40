//! The bare programs end by themselves, tell figures, and leave no file behind.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn bare(folder: &Path, arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_bare"))
        .args(arguments)
        .args(["-o", "json", "--dir"])
        .arg(folder)
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let left: Vec<_> = folder.read_dir().expect("the folder is there").collect();
    assert!(left.is_empty(), "{arguments:?} left {left:?}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn ingest_tells_its_rate() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for flush in [true, false] {
        let mut arguments = vec!["ingest", "--mib", "9", "--files", "4"];
        arguments.extend((!flush).then_some("--no-flush"));
        let told = bare(folder.path(), &arguments);
        assert_eq!(told["bytes"], 9 << 20);
        assert_eq!(told["flush"], flush);
        assert!(told["mb_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{told}");
    }
}

#[test]
fn pingpong_tells_its_latencies() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let told = bare(folder.path(), &["pingpong", "--round-trips", "50"]);
    assert_eq!(told["round_trips"], 50);
    let of = |name: &str| told["latency_us"][name].as_f64().expect("a figure");
    assert!(0.0 < of("p50") && of("p50") <= of("p99") && of("p99") <= of("max"), "{told}");
}

#[test]
fn a_folder_that_is_not_there_is_told() {
    let output = Command::new(env!("CARGO_BIN_EXE_bare"))
        .args(["ingest", "--mib", "1", "--dir", "/no/such/folder"])
        .output()
        .expect("the program starts");
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("/no/such/folder") && told.contains("--dir"), "{told}");
}
