//! Runs `flowstone` commands to their end.

use rustix::process::{Signal, kill_process};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Far beyond what any command here takes: a hang becomes a failure that names the command, whatever the machine.
const HANG: Duration = Duration::from_secs(180);

/// The binary under test.
pub(crate) const FLOWSTONE: &str = env!("CARGO_BIN_EXE_flowstone");

/// How a command ended.
pub(crate) struct Ended {
    what: String,
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ended {
    /// Its stdout, after it succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Vec<u8> {
        assert!(self.status.success(), "{} ended with {}: {}", self.what, self.status, self.stderr);
        self.stdout
    }

    /// Its stdout as text, after it succeeded.
    #[track_caller]
    pub(crate) fn text(self) -> String {
        String::from_utf8(self.ok()).expect("text")
    }

    /// Its stdout as JSON, after it succeeded.
    #[track_caller]
    pub(crate) fn json(self) -> serde_json::Value {
        let what = self.what.clone();
        let text = self.text();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{what} printed no JSON: {error}: {text}"))
    }

    /// Its stderr, after it failed with this code and said each of these things.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, says: &[&str]) -> String {
        assert_eq!(self.status.code(), Some(code), "{} ended with {}: {}", self.what, self.status, self.stderr);
        for part in says {
            assert!(self.stderr.contains(part), "{} should say `{part}`: {}", self.what, self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}: {}", self.what, self.stderr);
        self.stderr
    }
}

/// A command that runs; killed when dropped.
pub(crate) struct Running {
    what: String,
    pub(crate) child: Child,
    /// Gone with the command; a command that is there for too long is killed, so that whoever reads from it goes on.
    _watched: mpsc::Sender<()>,
}

impl Running {
    /// Starts `flowstone` with its input and output in our hands. A variable of the environment that would reach
    /// another broker is taken away.
    pub(crate) fn start<A: AsRef<OsStr>>(arguments: &[A]) -> Running {
        let mut command = Command::new(FLOWSTONE);
        command.args(arguments).env_remove("FLOWSTONE_SERVER");
        Running::spawn(command)
    }

    /// Starts any command so.
    pub(crate) fn spawn(mut command: Command) -> Running {
        let what = format!("{command:?}");
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let pid = rustix::process::Pid::from_child(&child);
        let (watched, ended) = mpsc::channel::<()>();
        thread::spawn(move || {
            if ended.recv_timeout(HANG) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        Running { what, child, _watched: watched }
    }

    /// Its process id, for signals.
    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// Gives it its input, and waits for its end.
    #[track_caller]
    pub(crate) fn with_input(mut self, input: &[u8]) -> Ended {
        let mut stdin = self.child.stdin.take().expect("stdin is piped");
        let input = input.to_vec();
        // A command that ends early closes its stdin: not this side's failure.
        let feeding = thread::spawn(move || drop(stdin.write_all(&input)));
        let ended = self.end();
        feeding.join().expect("feeding does not panic");
        ended
    }

    /// Waits for its end; its stdin is closed.
    #[track_caller]
    pub(crate) fn end(mut self) -> Ended {
        drop(self.child.stdin.take());
        let (done, both) = mpsc::channel();
        let mut stdout = self.child.stdout.take();
        let mut stderr = self.child.stderr.take();
        let out_done = done.clone();
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(stdout) = &mut stdout {
                let _ = stdout.read_to_end(&mut bytes);
            }
            let _ = out_done.send((true, bytes));
        });
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(stderr) = &mut stderr {
                let _ = stderr.read_to_end(&mut bytes);
            }
            let _ = done.send((false, bytes));
        });
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            match both.recv_timeout(HANG) {
                Ok((true, bytes)) => stdout = bytes,
                Ok((false, bytes)) => stderr = bytes,
                Err(_) => panic!("{} does not end", self.what),
            }
        }
        let status = self.child.wait().expect("it is our child");
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        Ended { what: self.what.clone(), status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Without effect where it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `flowstone` without input.
#[track_caller]
pub(crate) fn flowstone<A: AsRef<OsStr>>(arguments: &[A]) -> Ended {
    Running::start(arguments).end()
}
