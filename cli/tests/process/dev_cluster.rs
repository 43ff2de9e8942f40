//! `flowstone dev -n N`: a cluster of real processes, each of which can be hit alone.

use crate::running::{Ended, FLOWSTONE, Running};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Beyond it, what is waited for does not come.
const HANG: Duration = Duration::from_secs(120);

/// One of its brokers.
#[derive(Clone, Debug)]
pub(crate) struct Broker {
    pub(crate) id: i64,
    pub(crate) pid: Pid,
    pub(crate) client: String,
}

/// A running `dev -n N`; killed when dropped, and its brokers with it.
pub(crate) struct DevCluster {
    pub(crate) dev: Running,
    pub(crate) brokers: Vec<Broker>,
    /// All client addresses.
    pub(crate) servers: String,
    pub(crate) data: PathBuf,
    messages: Option<JoinHandle<String>>,
}

impl DevCluster {
    /// On any free ports, ready.
    #[track_caller]
    pub(crate) fn start(brokers: usize, data: Option<&Path>) -> DevCluster {
        let mut command = Command::new(FLOWSTONE);
        command.args(["dev", "-n", &brokers.to_string(), "--port", "0"]).env_remove("FLOWSTONE_SERVER");
        if let Some(data) = data {
            command.arg("--data-dir").arg(data);
        }
        let mut dev = Running::spawn(command);
        let mut stderr = dev.child.stderr.take().expect("stderr is piped");
        // Read all the time: a broker that finds its stderr full would wait.
        let messages = std::thread::spawn(move || {
            let mut said = Vec::new();
            let _ = stderr.read_to_end(&mut said);
            String::from_utf8_lossy(&said).into_owned()
        });
        let stdout = BufReader::new(dev.child.stdout.take().expect("stdout is piped"));
        let mut greeting = Vec::new();
        for line in stdout.lines().map_while(Result::ok) {
            let last = line.contains("Ctrl-C");
            greeting.push(line);
            if last {
                break;
            }
        }
        if !greeting.last().is_some_and(|line| line.contains("Ctrl-C")) {
            let _ = dev.child.kill();
            panic!("it did not become ready: {greeting:?} {}", messages.join().unwrap_or_default());
        }
        let mut cluster = DevCluster {
            dev,
            brokers: Vec::new(),
            servers: String::new(),
            data: PathBuf::new(),
            messages: Some(messages),
        };
        for line in &greeting {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["broker", id, "process", pid, "clients", client, ..] => cluster.brokers.push(Broker {
                    id: id.parse().expect("an id"),
                    pid: Pid::from_raw(pid.parse().expect("a process id")).expect("a process id"),
                    client: client.to_owned(),
                }),
                ["clients", servers] => cluster.servers = servers.to_owned(),
                ["data", data, ..] => cluster.data = PathBuf::from(data),
                _ => {}
            }
        }
        assert_eq!(cluster.brokers.len(), brokers, "{greeting:?}");
        cluster
    }

    /// A command against it, without input.
    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.begin(arguments).end()
    }

    /// A command against it, with input.
    #[track_caller]
    pub(crate) fn feed(&self, arguments: &[&str], input: &[u8]) -> Ended {
        self.begin(arguments).with_input(input)
    }

    /// A command against it that goes on.
    #[track_caller]
    pub(crate) fn begin(&self, arguments: &[&str]) -> Running {
        Running::start(&[arguments, &["--server", &self.servers]].concat())
    }

    #[track_caller]
    pub(crate) fn broker(&self, id: i64) -> &Broker {
        self.brokers.iter().find(|broker| broker.id == id).expect("one of its brokers")
    }

    /// Any signal to one broker.
    #[track_caller]
    pub(crate) fn signal(&self, id: i64, signal: Signal) {
        kill_process(self.broker(id).pid, signal).expect("it runs");
    }

    /// Who leads a partition.
    #[track_caller]
    pub(crate) fn leader(&self, topic: &str, partition: usize) -> i64 {
        let mut leader = None;
        until("a leader", || {
            let described = self.run(&["topic", "describe", topic, "-o", "json"]).json();
            leader = described["partitions"][partition]["leader"].as_i64();
            leader.is_some()
        });
        leader.expect("there is one")
    }

    /// Waits until nothing is under-replicated or leaderless.
    #[track_caller]
    pub(crate) fn healthy(&self) {
        let began = Instant::now();
        loop {
            let health = self.run(&["cluster", "health"]);
            if health.status.success() {
                return;
            }
            let told = String::from_utf8_lossy(&health.stdout).into_owned() + &health.stderr;
            assert!(began.elapsed() < HANG, "not healthy after {HANG:?}: {told}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends it by this signal, and returns how it ended and what was said.
    #[track_caller]
    pub(crate) fn end(self, signal: Signal) -> (Ended, String) {
        kill_process(self.dev.pid(), signal).expect("it runs");
        self.ends()
    }

    /// Waits until it ends by itself, and returns how and what was said.
    #[track_caller]
    pub(crate) fn ends(mut self) -> (Ended, String) {
        let messages = self.messages.take().expect("it is read").join().expect("reading does not panic");
        let DevCluster { dev, .. } = self;
        (dev.end(), messages)
    }
}

/// Whether a process is there and more than an entry that nobody has taken notice of.
pub(crate) fn runs(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    // The state follows the name, which is in brackets and may hold anything.
    status.is_ok_and(|status| !status.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
}

/// Waits for a condition, however long the machine takes.
#[track_caller]
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < HANG, "{what}: nothing for {HANG:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
