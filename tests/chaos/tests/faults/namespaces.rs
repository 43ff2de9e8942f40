//! One-way cuts below TCP: brokers in network namespaces, and routes that throw away what one of them sends.

use crate::alone;
use flowstone_chaos::{HANG, Namespaces, flowstone_binary};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

const BROKERS: u8 = 3;

struct World {
    flowstone: std::path::PathBuf,
    // Before the namespaces that they run in.
    _brokers: Vec<Running>,
    namespaces: Namespaces,
}

impl World {
    fn start(namespaces: Namespaces, folder: &Path) -> World {
        let flowstone = flowstone_binary().expect("the binary");
        let at = |broker: u8, port: u16| format!("{}:{port}", namespaces.address(broker));
        let seeds: Vec<String> = (1..=BROKERS).map(|broker| format!("{:?}", at(broker, 7071))).collect();
        let brokers = (1..=BROKERS).map(|broker| {
            let home = folder.join(broker.to_string());
            std::fs::create_dir(&home).expect("made");
            let text = format!(
                "[node]\nid = {broker}\ndata_dir = {:?}\n[listen]\nclient = {:?}\npeer = {:?}\nadmin = {:?}\n\
                 [cluster]\nseeds = [{}]\n[security]\ninsecure = true\n",
                home.join("data"),
                at(broker, 7070),
                at(broker, 7071),
                at(broker, 7072),
                seeds.join(", ")
            );
            let config = home.join("broker.toml");
            std::fs::write(&config, text).expect("written");
            let log = std::fs::File::create(home.join("messages.log")).expect("made");
            let mut command = namespaces.broker(broker, &flowstone);
            command.arg("broker").arg("--config").arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
            Running(command.spawn().expect("it starts"))
        });
        let brokers = brokers.collect();
        World { flowstone, _brokers: brokers, namespaces }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let servers: Vec<String> =
            (1..=BROKERS).map(|broker| format!("{}:7070", self.namespaces.address(broker))).collect();
        let mut command = self.namespaces.client(&self.flowstone);
        command.args(arguments).args(["--server", &servers.join(",")]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command again and again until it succeeds and `is_so` of what it printed.
    #[track_caller]
    fn until(&self, arguments: &[&str], mut is_so: impl FnMut(&str) -> bool) {
        let began = Instant::now();
        loop {
            let output = self.command(arguments).output().expect("it runs");
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() && is_so(&said) {
                return;
            }
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(began.elapsed() < HANG, "{arguments:?}: {said}{error}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Who leads the only partition; another one than `other_than`.
    #[track_caller]
    fn leader(&self, other_than: Option<u8>) -> u8 {
        let mut leader = None;
        self.until(&["topic", "describe", "checked", "-o", "json", "--timeout", "5s"], |said| {
            let told: serde_json::Value = serde_json::from_str(said).unwrap_or_default();
            leader = told["partitions"][0]["leader"].as_u64().and_then(|leader| u8::try_from(leader).ok());
            leader.is_some_and(|leader| leader > 0 && Some(leader) != other_than)
        });
        leader.expect("waited for")
    }
}

#[test]
fn packets_of_one_direction_are_lost_and_nothing_wedges() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let namespaces = match Namespaces::new(BROKERS) {
        Ok(namespaces) => namespaces,
        Err(failure) => return eprintln!("left out, this takes root: {failure}"),
    };
    let world = World::start(namespaces, folder.path());
    world.until(&["cluster", "health", "--timeout", "5s"], |_| true);
    let arguments =
        ["verify", "--for", "1h", "--rate", "1000", "-o", "json", "--topic", "checked", "--partitions", "1"];
    let mut verify = Running(world.command(&arguments).spawn().expect("it starts"));
    for mute in [true, false] {
        let leader = world.leader(None);
        let others: Vec<u8> = (1..=BROKERS).filter(|broker| *broker != leader).collect();
        let cuts: Vec<(u8, u8)> =
            others.iter().map(|other| if mute { (leader, *other) } else { (*other, leader) }).collect();
        for (from, to) in &cuts {
            world.namespaces.cut_one_way(*from, *to).expect("a route");
        }
        world.leader(Some(leader));
        for (from, to) in &cuts {
            world.namespaces.mend(*from, *to).expect("the route");
        }
        world.until(&["cluster", "health", "--timeout", "5s"], |_| true);
    }
    kill_process(Pid::from_child(&verify.0), Signal::INT).expect("it runs");
    let stdout = verify.0.stdout.take().expect("piped");
    let verdict: serde_json::Value = serde_json::from_reader(stdout).expect("a verdict");
    assert!(verify.0.wait().expect("our child").success(), "{verdict}");
    assert_eq!(verdict["anomalies"].as_array().map(Vec::len), Some(0), "{verdict}");
    assert!(verdict["acknowledged"].as_u64() > Some(0), "{verdict}");
}
