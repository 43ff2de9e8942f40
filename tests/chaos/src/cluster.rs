//! Several daemons as one cluster, and the binary's commands against it.

use crate::broker::{Broker, LOOK_INTERVAL};
use crate::failure::{Failure, Outcome};
use crate::network::{Network, Node};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Beyond it, what does not happen is taken never to happen, whatever the machine.
pub const HANG: Duration = Duration::from_secs(90);

/// How a cluster is made.
#[derive(Debug)]
pub struct Setup {
    brokers: i32,
    settings: Vec<String>,
    flowstone: Option<PathBuf>,
    folder: Option<PathBuf>,
}

impl Setup {
    /// With so many brokers, ids from 1.
    pub fn new(brokers: i32) -> Setup {
        Setup { brokers, settings: Vec::new(), flowstone: None, folder: None }
    }

    /// A key of the config of all of them, such as `storage.shards=1`.
    #[must_use]
    pub fn set(mut self, assignment: &str) -> Setup {
        self.settings.push(assignment.to_owned());
        self
    }

    /// Keeps all files below this folder, instead of in a temporary one.
    #[must_use]
    pub fn folder(mut self, folder: &Path) -> Setup {
        self.folder = Some(folder.to_owned());
        self
    }

    /// The binary, instead of the one that was built with this program.
    #[must_use]
    pub fn flowstone(mut self, flowstone: &Path) -> Setup {
        self.flowstone = Some(flowstone.to_owned());
        self
    }

    /// Lays it out; nothing runs yet.
    ///
    /// # Errors
    /// No binary, no folder, no port.
    pub fn prepare(self) -> Outcome<Cluster> {
        let flowstone = self.flowstone.map_or_else(flowstone_binary, Ok)?;
        let temporary = match &self.folder {
            Some(_) => None,
            None => Some(
                tempfile::Builder::new()
                    .prefix("flowstone-chaos-")
                    .tempdir()
                    .map_err(Failure::of("a temporary folder"))?,
            ),
        };
        let folder = self.folder.or_else(|| temporary.as_ref().map(|folder| folder.path().to_owned()));
        let folder = folder.ok_or_else(|| Failure::new("no folder"))?;
        let network = Arc::new(Network::default());
        let mut cluster = Cluster { flowstone, folder, network, brokers: Vec::new(), seeds: Vec::new(), temporary };
        for id in 1..=self.brokers {
            cluster.add(id)?;
        }
        for broker in &mut cluster.brokers {
            self.settings.iter().for_each(|assignment| broker.set(assignment.clone()));
        }
        cluster.seeds = cluster.brokers.iter().map(|broker| broker.peer().address()).collect();
        Ok(cluster)
    }

    /// Starts it, and waits until every broker is ready.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare); one does not become ready.
    pub fn start(self) -> Outcome<Cluster> {
        let mut cluster = self.prepare()?;
        cluster.start_all()?;
        Ok(cluster)
    }
}

/// Daemons that form a cluster. All of it ends when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    flowstone: PathBuf,
    folder: PathBuf,
    network: Arc<Network>,
    brokers: Vec<Broker>,
    /// The same list for all.
    seeds: Vec<SocketAddr>,
    /// Removed at the end, after the brokers.
    temporary: Option<TempDir>,
}

impl Cluster {
    /// The links between its nodes.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Its brokers.
    pub fn brokers(&self) -> &[Broker] {
        &self.brokers
    }

    /// The ids of its brokers.
    pub fn ids(&self) -> Vec<i32> {
        self.brokers.iter().map(Broker::id).collect()
    }

    /// A broker by its id, which it must have.
    ///
    /// # Panics
    /// There is none of this id.
    #[track_caller]
    pub fn broker(&mut self, id: i32) -> &mut Broker {
        self.brokers.iter_mut().find(|broker| broker.id() == id).expect("a broker of this cluster")
    }

    /// One more broker, with the same seeds; it does not run yet.
    ///
    /// # Errors
    /// No folder, no port.
    pub fn add(&mut self, id: i32) -> Outcome {
        let broker = Broker::new(id, &self.folder.join(format!("broker-{id}")), &self.network)?;
        self.brokers.push(broker);
        Ok(())
    }

    /// Starts a broker; it may take a while to be ready.
    ///
    /// # Errors
    /// The binary does not start.
    pub fn start(&mut self, id: i32) -> Outcome {
        let (flowstone, seeds) = (self.flowstone.clone(), self.seeds.clone());
        self.broker(id).start(&flowstone, &seeds)
    }

    /// Starts a broker with other seeds than the rest.
    ///
    /// # Errors
    /// The binary does not start.
    pub fn start_with_seeds(&mut self, id: i32, seeds: &[SocketAddr]) -> Outcome {
        let flowstone = self.flowstone.clone();
        self.broker(id).start(&flowstone, seeds)
    }

    /// Starts those that do not run, resumes those that are paused, and waits until all are ready.
    ///
    /// # Errors
    /// One does not become ready.
    pub fn start_all(&mut self) -> Outcome {
        for id in self.ids() {
            if !self.broker(id).is_running() {
                self.start(id)?;
            } else if self.broker(id).is_paused() {
                self.broker(id).resume()?;
            }
        }
        self.ids().into_iter().try_for_each(|id| self.wait_ready(id))
    }

    /// Waits until a broker is ready.
    ///
    /// # Errors
    /// It ended, or is not ready after [`HANG`].
    pub fn wait_ready(&mut self, id: i32) -> Outcome {
        let began = Instant::now();
        let broker = self.broker(id);
        loop {
            match broker.ready()? {
                Ok(()) => return Ok(()),
                Err(reason) if began.elapsed() > HANG => {
                    let said = broker.last_messages();
                    return Err(Failure::new(format!("broker {id} is not ready: {reason}\n{said}")));
                }
                Err(_) => thread::sleep(LOOK_INTERVAL),
            }
        }
    }

    /// The clients' addresses of all brokers, as `--server` takes them.
    pub fn servers(&self) -> String {
        self.brokers.iter().map(|broker| broker.client().address().to_string()).collect::<Vec<_>>().join(",")
    }

    /// Forgets a broker that was killed for good: commands do not ask it any more, and it is not started again.
    pub fn remove(&mut self, id: i32) {
        self.brokers.retain(|broker| broker.id() != id);
    }

    /// Cuts a broker off from all other brokers; clients still reach it.
    pub fn isolate(&self, id: i32) {
        for other in self.ids() {
            if other != id {
                self.network.cut(Node::Broker(id), Node::Broker(other));
            }
        }
    }

    /// A command of the binary against this cluster, to be started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_at(&self.servers(), arguments)
    }

    fn command_at(&self, servers: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.flowstone);
        command.args(arguments).args(["--server", servers]).env_remove("FLOWSTONE_SERVER");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Asks this broker; what it printed with `-o json`.
    ///
    /// # Errors
    /// It failed, or printed no JSON.
    pub(crate) fn json_of(&self, broker: &Broker, arguments: &[&str]) -> Outcome<serde_json::Value> {
        if !broker.is_running() || broker.is_paused() {
            return Err(Failure::new(format!("broker {} answers nothing", broker.id())));
        }
        let address = broker.client().address().to_string();
        let arguments = [arguments, &["-o", "json", "--timeout", "5s"]].concat();
        let output = self.command_at(&address, &arguments).output().map_err(Failure::of(arguments.join(" ")))?;
        serde_json::from_slice(&output.stdout).map_err(Failure::of(arguments.join(" ")))
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// It does not start.
    pub fn run(&self, arguments: &[&str]) -> Outcome<Output> {
        self.command(arguments).output().map_err(Failure::of(format!("flowstone {}", arguments.join(" "))))
    }

    /// Runs a command that must succeed; its stdout.
    ///
    /// # Errors
    /// It failed.
    pub fn ok(&self, arguments: &[&str]) -> Outcome<String> {
        let output = self.run(arguments)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Failure::new(format!("flowstone {}: {}: {}", arguments.join(" "), output.status, said.trim())))
    }

    /// Runs a command that must succeed; what it printed with `-o json`.
    ///
    /// # Errors
    /// It failed, or printed no JSON.
    pub fn json(&self, arguments: &[&str]) -> Outcome<serde_json::Value> {
        let text = self.ok(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).map_err(Failure::of(format!("flowstone {}: {text}", arguments.join(" "))))
    }

    /// Runs a command again and again until it succeeds; its stdout.
    ///
    /// # Errors
    /// It still fails after [`HANG`].
    pub fn eventually(&self, arguments: &[&str]) -> Outcome<String> {
        let began = Instant::now();
        loop {
            match self.ok(arguments) {
                Err(_) if began.elapsed() < HANG => thread::sleep(LOOK_INTERVAL),
                done => return done,
            }
        }
    }

    /// Who leads a partition now, if anybody knows.
    ///
    /// # Errors
    /// Nobody can be asked.
    pub fn leader(&self, topic: &str, partition: usize) -> Outcome<Option<i32>> {
        let described = self.json(&["topic", "describe", topic])?;
        let leader = described["partitions"][partition]["leader"].as_i64();
        Ok(leader.and_then(|leader| i32::try_from(leader).ok()))
    }

    /// Waits until a partition has a leader other than this one; who it is.
    ///
    /// # Errors
    /// It has none after [`HANG`].
    pub fn wait_leader(&self, topic: &str, partition: usize, other_than: Option<i32>) -> Outcome<i32> {
        let began = Instant::now();
        loop {
            let leader = self.leader(topic, partition);
            match leader {
                Ok(Some(leader)) if Some(leader) != other_than => return Ok(leader),
                _ if began.elapsed() < HANG => thread::sleep(LOOK_INTERVAL),
                Ok(leader) => return Err(Failure::new(format!("{topic}-{partition} is still led by {leader:?}"))),
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Waits until nothing is under-replicated or leaderless.
    ///
    /// # Errors
    /// Something still is after [`HANG`].
    pub fn wait_healthy(&self) -> Outcome {
        self.eventually(&["cluster", "health"]).map(drop)
    }

    /// Keeps the files of a cluster in a temporary folder; where.
    pub fn keep(&mut self) -> PathBuf {
        self.temporary.take().map_or_else(|| self.folder.clone(), TempDir::keep)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.network.close();
        // Before their files go.
        self.brokers.clear();
    }
}

/// The binary that was built with this program: beside it, or one folder above as for tests. `FLOWSTONE_BIN` names another.
/// Where it is missing, cargo builds it.
///
/// # Errors
/// It is not there, and cannot be built.
pub fn flowstone_binary() -> Outcome<PathBuf> {
    if let Some(named) = std::env::var_os("FLOWSTONE_BIN") {
        return Ok(named.into());
    }
    let this = std::env::current_exe().map_err(Failure::of("this program"))?;
    let folder = this.ancestors().skip(1).find(|folder| !folder.ends_with("deps"));
    let folder = folder.ok_or_else(|| Failure::new("this program lies in no folder"))?;
    let binary = folder.join("flowstone");
    if !binary.is_file() {
        build(folder)?;
    }
    if binary.is_file() {
        Ok(binary)
    } else {
        Err(Failure::new(format!("{} is missing; build it with cargo build -p flowstone-cli", binary.display())))
    }
}

/// Builds the binary with the profile of this program.
fn build(folder: &Path) -> Outcome {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "-p", "flowstone-cli"]);
    if folder.ends_with("release") {
        command.arg("--release");
    }
    let status = command.current_dir(env!("CARGO_MANIFEST_DIR")).status().map_err(Failure::of("cargo"))?;
    if status.success() { Ok(()) } else { Err(Failure::new(format!("{command:?} ended with {status}"))) }
}

/// Waits for the end of a command that was started, `patience` at most; then it is killed.
///
/// # Errors
/// It did not end.
pub(crate) fn wait_for(mut child: Child, patience: Duration, what: &str) -> Outcome<Output> {
    let deadline = Instant::now() + patience;
    // Read on threads of their own, so that a full pipe does not hold it up.
    let stdout = child.stdout.take().map(reader);
    let stderr = child.stderr.take().map(reader);
    loop {
        match child.try_wait().map_err(Failure::of(what))? {
            Some(status) => {
                let all = |thread: Option<thread::JoinHandle<Vec<u8>>>| {
                    thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
                };
                return Ok(Output { status, stdout: all(stdout), stderr: all(stderr) });
            }
            None if Instant::now() > deadline => {
                let _ = (child.kill(), child.wait());
                return Err(Failure::new(format!("{what} does not end")));
            }
            None => thread::sleep(LOOK_INTERVAL),
        }
    }
}

fn reader(mut from: impl std::io::Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}
