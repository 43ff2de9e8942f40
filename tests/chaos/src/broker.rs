//! One daemon: its files, its process, its addresses.

use crate::failure::{Failure, Outcome};
use crate::network::{Network, Node};
use crate::proxy::{Dialers, Proxy};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at something that is awaited.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// A daemon of a cluster. Its process is killed when this is dropped.
#[derive(Debug)]
pub struct Broker {
    id: i32,
    /// Config, data and messages.
    folder: PathBuf,
    data_dir: PathBuf,
    peer: Proxy,
    client: Proxy,
    network: Arc<Network>,
    /// Keys of the config besides those that every broker has.
    settings: Vec<String>,
    process: Option<Process>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    admin: SocketAddr,
    peer: SocketAddr,
    paused: bool,
}

/// How a daemon ended by itself.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// All it said since it was first started.
    pub messages: String,
}

impl Broker {
    pub(crate) fn new(id: i32, folder: &Path, network: &Arc<Network>) -> Outcome<Broker> {
        fs::create_dir_all(folder).map_err(Failure::of(folder.display()))?;
        Ok(Broker {
            id,
            folder: folder.to_owned(),
            data_dir: folder.join("data"),
            peer: Proxy::start(network, Node::Broker(id), Dialers::Brokers)?,
            client: Proxy::start(network, Node::Broker(id), Dialers::Clients)?,
            network: network.clone(),
            settings: Vec::new(),
            process: None,
        })
    }

    /// Its id.
    pub fn id(&self) -> i32 {
        self.id
    }

    /// Its data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// The proxy in front of its peer listener, by which other brokers know it.
    pub fn peer(&self) -> &Proxy {
        &self.peer
    }

    /// The proxy in front of its client listener, by which clients know it.
    pub fn client(&self) -> &Proxy {
        &self.client
    }

    /// Where its peer listener really is, while it runs: for what no broker would send.
    pub fn peer_listener(&self) -> Option<SocketAddr> {
        self.process.as_ref().map(|process| process.peer)
    }

    /// Gives it other addresses by which it is known, from its next start on.
    ///
    /// # Errors
    /// No port is free.
    pub fn move_house(&mut self) -> Outcome {
        self.peer = Proxy::start(&self.network, Node::Broker(self.id), Dialers::Brokers)?;
        self.client = Proxy::start(&self.network, Node::Broker(self.id), Dialers::Clients)?;
        Ok(())
    }

    /// Puts its data elsewhere, before it is first started: on a disk of its own.
    pub fn set_data_dir(&mut self, data_dir: &Path) {
        self.data_dir = data_dir.to_owned();
    }

    /// Sets another key of its config, such as `storage.shards=1`, from its next start on.
    pub fn set(&mut self, assignment: impl Into<String>) {
        self.settings.push(assignment.into());
    }

    /// Starts its process; it may take a while to be ready. Its listeners get free ports, its proxies lead there.
    pub(crate) fn start(&mut self, flowstone: &Path, seeds: &[SocketAddr]) -> Outcome {
        let [client, peer, admin] = free_ports()?;
        let seeds: Vec<String> = seeds.iter().map(|seed| format!("{:?}", seed.to_string())).collect();
        let config = self.folder.join("broker.toml");
        let text = format!(
            "[node]\nid = {id}\ndata_dir = {data:?}\nrack = \"rack-{id}\"\n\
             [listen]\nclient = \"{client}\"\npeer = \"{peer}\"\nadmin = \"{admin}\"\n\
             [advertise]\nclient = \"{}\"\npeer = \"{}\"\n\
             [cluster]\nseeds = [{}]\n",
            self.client.address(),
            self.peer.address(),
            seeds.join(", "),
            id = self.id,
            data = self.data_dir,
        );
        fs::write(&config, text).map_err(Failure::of(config.display()))?;
        let messages = self.messages_file();
        let log = OpenOptions::new().create(true).append(true).open(&messages);
        let log = log.map_err(Failure::of(messages.display()))?;
        let mut command = Command::new(flowstone);
        command.arg("broker").arg("--config").arg(&config);
        for assignment in &self.settings {
            command.args(["--set", assignment]);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(Failure::of(format!("cannot start {}", flowstone.display())))?;
        self.network.runs_as(Node::Broker(self.id), child.id());
        self.client.set_target(Some(client));
        self.peer.set_target(Some(peer));
        self.process = Some(Process { child, admin, peer, paused: false });
        Ok(())
    }

    /// Whether its process is there, paused or not.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Its process id.
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.child.id())
    }

    fn signal(&self, signal: Signal) -> Outcome {
        let process = self.running()?;
        kill_process(Pid::from_child(&process.child), signal)
            .map_err(Failure::of(format!("cannot signal broker {}", self.id)))
    }

    fn running(&self) -> Outcome<&Process> {
        self.process.as_ref().ok_or_else(|| Failure::new(format!("broker {} does not run", self.id)))
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Outcome {
        self.running()?;
        self.end();
        Ok(())
    }

    fn end(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = (process.child.kill(), process.child.wait());
        }
        self.client.set_target(None);
        self.peer.set_target(None);
    }

    /// SIGSTOP: it keeps its connections, and does nothing.
    ///
    /// # Errors
    /// It does not run.
    pub fn pause(&mut self) -> Outcome {
        self.signal(Signal::STOP)?;
        self.process.iter_mut().for_each(|process| process.paused = true);
        Ok(())
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// It does not run.
    pub fn resume(&mut self) -> Outcome {
        self.signal(Signal::CONT)?;
        self.process.iter_mut().for_each(|process| process.paused = false);
        Ok(())
    }

    /// Lets its process have so many open files from now on, fewer than it has already perhaps; what it was allowed before.
    ///
    /// # Errors
    /// It does not run.
    pub fn limit_open_files(&self, files: u64) -> Outcome<u64> {
        let process = Pid::from_child(&self.running()?.child);
        let failure = || Failure::of(format!("the limits of broker {}", self.id));
        let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
        let limit = Rlimit { current: Some(files), maximum };
        let before = prlimit(Some(process), Resource::Nofile, limit).map_err(failure())?;
        Ok(before.current.unwrap_or(u64::MAX))
    }

    /// Bytes of memory that are its process's own: what it maps of files is not counted.
    ///
    /// # Errors
    /// It does not run.
    pub fn own_memory(&self) -> Outcome<u64> {
        let path = format!("/proc/{}/status", self.running()?.child.id());
        let status = fs::read_to_string(&path).map_err(Failure::of(&path))?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next()?.parse::<u64>().ok());
        kib.map(|kib| kib << 10).ok_or_else(|| Failure::new(format!("{path} has no RssAnon")))
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.paused)
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// It does not run, or not end.
    pub fn terminate(&mut self, patience: Duration) -> Outcome<ExitStatus> {
        self.signal(Signal::TERM)?;
        Ok(self.wait_for_end(patience)?.status)
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_for_end(&mut self, patience: Duration) -> Outcome<Ended> {
        let deadline = Instant::now() + patience;
        loop {
            let status = match &mut self.process {
                None => return Err(Failure::new(format!("broker {} does not run", self.id))),
                Some(process) => process.child.try_wait().map_err(Failure::of(format!("broker {}", self.id)))?,
            };
            if let Some(status) = status {
                self.end();
                return Ok(Ended { status, messages: self.messages() });
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!("broker {} goes on: {}", self.id, self.last_messages())));
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Deletes its data, while it does not run.
    ///
    /// # Errors
    /// It runs, or a file cannot be deleted.
    pub fn wipe(&mut self) -> Outcome {
        if self.is_running() {
            return Err(Failure::new(format!("broker {} runs; kill it first", self.id)));
        }
        match fs::remove_dir_all(&self.data_dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::of(self.data_dir.display())(error))
            }
            _ => Ok(()),
        }
    }

    /// Whether it says that it is ready; with the reasons where not.
    ///
    /// # Errors
    /// It does not run any more: a broker that ends while others wait for it is a finding.
    pub fn ready(&mut self) -> Outcome<Result<(), String>> {
        let Some(process) = &mut self.process else {
            return Err(Failure::new(format!("broker {} does not run", self.id)));
        };
        if let Ok(Some(status)) = process.child.try_wait() {
            let said = self.last_messages();
            self.end();
            return Err(Failure::new(format!("broker {} ended with {status}: {said}", self.id)));
        }
        Ok(match self.http("/readyz") {
            Ok((200, _)) => Ok(()),
            Ok((status, body)) => Err(format!("{status}: {}", body.trim())),
            Err(error) => Err(error.to_string()),
        })
    }

    /// Asks its admin listener: status and body.
    ///
    /// # Errors
    /// It does not answer.
    pub fn http(&self, path: &str) -> Outcome<(u16, String)> {
        let failure = || Failure::of::<std::io::Error>(format!("broker {}: {path}", self.id));
        let address = self.running()?.admin;
        let patience = Duration::from_secs(5);
        let mut stream = TcpStream::connect_timeout(&address, patience).map_err(failure())?;
        stream.set_read_timeout(Some(patience)).map_err(failure())?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").map_err(failure())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).map_err(failure())?;
        let answer = String::from_utf8_lossy(&answer);
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        status
            .map(|status| (status, body.to_owned()))
            .ok_or_else(|| Failure::new(format!("broker {}: {path}: no HTTP answer", self.id)))
    }

    /// The sum of a metric over its labels; 0 where it is not told.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metric(&self, name: &str) -> Outcome<f64> {
        let (_, text) = self.http("/metrics")?;
        let of = |line: &str| {
            let rest = line.strip_prefix(name)?;
            (rest.starts_with('{') || rest.starts_with(' ')).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
        };
        Ok(text.lines().filter_map(of).sum())
    }

    fn messages_file(&self) -> PathBuf {
        self.folder.join("messages.log")
    }

    /// All it said since it was first started.
    pub fn messages(&self) -> String {
        fs::read(self.messages_file()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The last it said, and where it panicked, if it did.
    pub fn last_messages(&self) -> String {
        let all = self.messages();
        let lines: Vec<&str> = all.lines().collect();
        let last = lines.len().saturating_sub(15);
        let panicked = lines[..last].iter().rposition(|line| line.contains("panicked at"));
        let panicked = panicked.map_or(&[][..], |at| &lines[at..(at + 3).min(last)]);
        [panicked, &lines[last..]].concat().join("\n")
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.end();
    }
}

/// An address for each listener of a broker that is about to start, all held at once so that they differ.
///
/// They are free now, and the broker binds them a little later. Whatever connects to somebody meanwhile gets its own port
/// on 127.0.0.1, and might be given one of these there: so they are of another address of the loopback, where this machine
/// has more than that one.
fn free_ports() -> Outcome<[SocketAddr; 3]> {
    static ASKED: AtomicU8 = AtomicU8::new(0);
    let [.., high, low] = std::process::id().to_be_bytes();
    let own = Ipv4Addr::new(127, 1 + ASKED.fetch_add(1, Ordering::Relaxed) % 250, high, low);
    let hold = || {
        let listener = TcpListener::bind((own, 0)).or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let listener = listener.map_err(Failure::of("no port is free"))?;
        let address = listener.local_addr().map_err(Failure::of("a port without a number"))?;
        Ok::<_, Failure>((listener, address))
    };
    let (one, other, third) = (hold()?, hold()?, hold()?);
    Ok([one.1, other.1, third.1])
}
