//! What the targets share: programs that are started, asked and ended, and figures of several runs.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Failure;

/// What several runs came to.
#[derive(Default)]
pub(crate) struct Figures(pub(crate) Vec<f64>);

impl Figures {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(crate) fn line(&self, name: &str) -> String {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
        format!("{name:<50} {median:>10.2}   ({:.2} to {:.2})", sorted[0], sorted[sorted.len() - 1])
    }
}

pub(crate) fn field(value: &Value, name: &str) -> Result<f64, Failure> {
    value[name].as_f64().ok_or_else(|| format!("no number {name} in {value}").into())
}

pub(crate) struct Programs {
    pub(crate) folder: PathBuf,
}

impl Programs {
    pub(crate) fn beside_this_one() -> Result<Self, Failure> {
        let folder = std::env::current_exe()?.parent().ok_or("this program lies in no folder")?.to_owned();
        for name in ["flowstone", "bare"] {
            if !folder.join(name).is_file() {
                return Err(format!(
                    "{} is missing: run cargo build --release -p flowstone-cli -p flowstone-tests",
                    folder.join(name).display()
                )
                .into());
            }
        }
        Ok(Self { folder })
    }

    pub(crate) fn bare(&self, args: &[&str]) -> Result<Value, Failure> {
        json(Command::new(self.folder.join("bare")).args(args))
    }
}

pub(crate) fn json(command: &mut Command) -> Result<Value, Failure> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("{command:?} ended with {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
}

/// A broker of this run: killed when dropped, should the run end early.
pub(crate) struct Broker {
    child: Child,
    flowstone: PathBuf,
    server: String,
    pub(crate) ready_after: Duration,
}

impl Broker {
    pub(crate) fn start(programs: &Programs, data: &Path) -> Result<Self, Failure> {
        let flowstone = programs.folder.join("flowstone");
        let port = free_ports()?;
        let from = Instant::now();
        let mut child = Command::new(&flowstone)
            .args(["dev", "--port", &port.to_string(), "--data-dir"])
            .arg(data)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdout = child.stdout.take().ok_or("the broker has no output")?;
        let server = format!("127.0.0.1:{port}");
        let mut broker = Self { child, flowstone, server, ready_after: Duration::ZERO };
        let mut lines = BufReader::new(stdout);
        let mut line = String::new();
        while !line.contains("is ready") {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                return Err("the broker ended before it was ready: start flowstone dev by hand to see why".into());
            }
        }
        broker.ready_after = from.elapsed();
        // The rest of what it prints is read away, so that it never waits for us.
        std::thread::spawn(move || io::copy(&mut lines, &mut io::sink()));
        Ok(broker)
    }

    pub(crate) fn flowstone(&self, args: &[&str]) -> Result<Value, Failure> {
        json(Command::new(&self.flowstone).args(args).args([
            "--server",
            &self.server,
            "--timeout",
            "60s",
            "-o",
            "json",
        ]))
    }

    /// One run of `flowstone bench` into a topic of its own, removed afterwards.
    pub(crate) fn bench(
        &self,
        what: &str,
        size: u64,
        megabytes: u64,
        partitions: u32,
        flush: &str,
    ) -> Result<Value, Failure> {
        let records = (megabytes * 1_000_000 / size).to_string();
        let config = format!("flowstone.flush={flush}");
        self.flowstone(&[
            "bench",
            what,
            "--records",
            &records,
            "--size",
            &size.to_string(),
            "--partitions",
            &partitions.to_string(),
            "-c",
            &config,
        ])
    }

    pub(crate) fn delete(&self, topic: &str) -> Result<(), Failure> {
        self.flowstone(&["topic", "delete", topic, "--yes"]).map(drop)
    }

    pub(crate) fn resident_mib(&self) -> Result<f64, Failure> {
        resident_mib(self.child.id())
    }

    pub(crate) fn stop(mut self) -> Result<(), Failure> {
        terminate(&mut self.child)
    }

    pub(crate) fn kill(mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port whose two successors are free as well: `dev` takes three.
pub(crate) fn free_ports() -> Result<u16, Failure> {
    for _ in 0..100 {
        let first = TcpListener::bind(("127.0.0.1", 0))?;
        let port = first.local_addr()?.port();
        let next = |by: u16| port.checked_add(by).is_some_and(|port| TcpListener::bind(("127.0.0.1", port)).is_ok());
        if next(1) && next(2) {
            return Ok(port);
        }
    }
    Err("no three free ports in a row".into())
}

/// A folder of this run, removed at its end.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(parent: &Path) -> Result<Self, Failure> {
        let path = parent.join(format!("targets-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(fs::canonicalize(path)?))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Memory of a process, in MiB. Its program's text is in it; the maps of an idle broker's logs add next to nothing.
pub(crate) fn resident_mib(pid: u32) -> Result<f64, Failure> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<f64>().ok()
    };
    let (anonymous, file) = kib("RssAnon:").zip(kib("RssFile:")).ok_or("no RssAnon in /proc")?;
    Ok((anonymous + file) / 1024.0)
}

/// Stops a broker cleanly.
pub(crate) fn terminate(child: &mut Child) -> Result<(), Failure> {
    // SIGTERM by the shell's own kill: the standard library only knows SIGKILL.
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status()?;
    let ended = child.wait()?;
    if killed.success() && ended.success() { Ok(()) } else { Err(format!("a broker ended with {ended}").into()) }
}
