//! A broker as a process of its own, with its data in a folder that outlives it.

use crate::running::{Ended, FLOWSTONE, Running};
use rustix::process::{Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Beyond it, a broker that says nothing is taken to hang.
const HANG: Duration = Duration::from_secs(120);

/// A running `flowstone broker`; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    /// HOST:PORT for clients.
    pub(crate) server: String,
    /// From the start of the process to its word that it is ready.
    pub(crate) ready_after: Duration,
    messages: JoinHandle<String>,
}

/// How to start one.
pub(crate) struct Setup {
    data_dir: PathBuf,
    client: String,
    set: Vec<String>,
    open_files: Option<u32>,
}

impl Setup {
    /// On any free ports.
    pub(crate) fn new(data_dir: &Path) -> Setup {
        Setup { data_dir: data_dir.to_owned(), client: "127.0.0.1:0".to_owned(), set: Vec::new(), open_files: None }
    }

    /// At this address, as an earlier broker was.
    pub(crate) fn at(mut self, server: &str) -> Setup {
        self.client = server.to_owned();
        self
    }

    /// With one more key of the configuration.
    pub(crate) fn set(mut self, assignment: &str) -> Setup {
        self.set.push(assignment.to_owned());
        self
    }

    /// Under `ulimit -n`.
    pub(crate) fn open_files(mut self, count: u32) -> Setup {
        self.open_files = Some(count);
        self
    }

    /// The command that runs it.
    pub(crate) fn command(&self) -> Command {
        std::fs::create_dir_all(self.data_dir.parent().expect("a folder within a folder")).expect("a folder for it");
        let config = self.data_dir.with_extension("toml");
        let text = format!(
            "[node]\nid = 1\ndata_dir = {:?}\n[listen]\nclient = {:?}\npeer = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\n",
            self.data_dir, self.client
        );
        std::fs::write(&config, text).expect("the config file is written");
        let mut command = match self.open_files {
            Some(count) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("ulimit -n {count} && exec \"$0\" \"$@\""), FLOWSTONE]);
                shell
            }
            None => Command::new(FLOWSTONE),
        };
        command.arg("broker").arg("--config").arg(&config).args(["--set", "log.format=json"]);
        for assignment in &self.set {
            command.args(["--set", assignment]);
        }
        command
    }

    /// Starts it and waits until it is ready.
    #[track_caller]
    pub(crate) fn start(&self) -> Daemon {
        let began = Instant::now();
        let mut child = self
            .command()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let (ready, is_ready) = mpsc::channel();
        let messages = std::thread::spawn(move || follow(stderr, &ready));
        match is_ready.recv_timeout(HANG) {
            Ok(server) => Daemon { child, server, ready_after: began.elapsed(), messages },
            Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("the broker did not become ready: {}", messages.join().unwrap_or_default());
            }
        }
    }

    /// Starts it where it cannot: waits for its end.
    #[track_caller]
    pub(crate) fn start_fails(&self) -> Ended {
        Running::spawn(self.command()).end()
    }
}

/// Reads all its messages; tells the address in the one that says it is ready.
fn follow(mut stderr: BufReader<ChildStderr>, ready: &mpsc::Sender<String>) -> String {
    let mut all = String::new();
    let mut line = String::new();
    loop {
        line.clear();
        match stderr.read_line(&mut line) {
            Ok(0) => return all,
            Ok(_) => {}
            Err(_) => {
                let mut rest = Vec::new();
                let _ = stderr.read_to_end(&mut rest);
                return all;
            }
        }
        all.push_str(&line);
        if let Ok(message) = serde_json::from_str::<serde_json::Value>(&line)
            && message["message"] == "ready"
        {
            let _ = ready.send(message["client"].as_str().expect("an address").to_owned());
        }
    }
}

impl Daemon {
    /// A broker with default settings over a folder.
    #[track_caller]
    pub(crate) fn start(data_dir: &Path) -> Daemon {
        Setup::new(data_dir).start()
    }

    /// A command against this broker, without input.
    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.begin(arguments).end()
    }

    /// A command against this broker, with input.
    #[track_caller]
    pub(crate) fn feed(&self, arguments: &[&str], input: &[u8]) -> Ended {
        self.begin(arguments).with_input(input)
    }

    /// A command against this broker that goes on.
    #[track_caller]
    pub(crate) fn begin(&self, arguments: &[&str]) -> Running {
        Running::start(&[arguments, &["--server", &self.server]].concat())
    }

    /// kill -9.
    #[track_caller]
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is our child");
    }

    /// Any signal.
    #[track_caller]
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(rustix::process::Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// SIGTERM, and its end: exit status and all it said.
    #[track_caller]
    pub(crate) fn stop(mut self) -> (ExitStatus, String) {
        self.signal(Signal::TERM);
        let status = self.child.wait().expect("it is our child");
        let messages = std::mem::replace(&mut self.messages, std::thread::spawn(String::new));
        (status, messages.join().expect("following does not panic"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
