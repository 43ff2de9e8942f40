//! `flowstone dev -n N`: brokers as processes of their own, which end when this one does, however it does.

use super::{DevArgs, shell_quoted};
use crate::args::VERSION;
use crate::broker::{SHUTDOWN_DEADLINE, StopSignals};
use crate::failure::{Failure, Outcome};
use crate::probe;
use crate::stdio::say;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Between the ports of one broker and of the next.
const PORTS_APART: u16 = 100;
/// Client, peer, admin.
const PORTS_EACH: usize = 3;
/// Time between two looks at the processes.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Time after which those that are not ready are named.
const SLOW_AFTER: Duration = Duration::from_secs(10);

/// Where a broker is, and what it keeps.
#[derive(Debug)]
struct Planned {
    id: usize,
    /// Ports for clients, peers and admin HTTP.
    ports: [u16; PORTS_EACH],
    config: PathBuf,
    data_dir: PathBuf,
}

impl Planned {
    fn address(&self, which: usize) -> String {
        format!("127.0.0.1:{}", self.ports[which])
    }
}

/// A broker's process.
#[derive(Debug)]
struct Process {
    planned: Planned,
    child: Child,
    /// How it ended, once it has.
    ended: Option<ExitStatus>,
}

impl Process {
    /// Whether it has ended since this was last asked.
    fn ends_now(&mut self) -> bool {
        if self.ended.is_none() {
            // It is our child: nobody else can have waited for it.
            self.ended = self.child.try_wait().ok().flatten();
            return self.ended.is_some();
        }
        false
    }

    fn signal(&self, signal: rustix::process::Signal) {
        if self.ended.is_none() {
            // It may end this very moment: then there is nobody to tell.
            let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal);
        }
    }
}

/// The processes; killed when dropped.
#[derive(Debug)]
struct Processes(Vec<Process>);

impl Drop for Processes {
    fn drop(&mut self) {
        for process in self.0.iter_mut().filter(|process| process.ended.is_none()) {
            // Without effect where it has ended since.
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }
}

/// Runs them until a signal asks to stop.
pub(super) async fn run(
    args: &DevArgs,
    mut signals: StopSignals,
    data_dir: &Path,
    temporary: bool,
    began: Instant,
) -> Outcome {
    let planned = plan(args, data_dir)?;
    let seeds: Vec<String> = planned.iter().map(|broker| format!("{:?}", broker.address(1))).collect();
    let mut processes = Processes(Vec::new());
    for planned in planned {
        write_config(&planned, &seeds.join(", "), &args.log)?;
        let child = start(&planned)?;
        processes.0.push(Process { planned, child, ended: None });
    }
    tokio::select! {
        ready = all_ready(&mut processes) => ready?,
        () = signals.next() => return stop(processes, signals).await,
    }
    greet(&processes, data_dir, temporary, began);
    loop {
        tokio::select! {
            () = signals.next() => return stop(processes, signals).await,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        for process in &mut processes.0 {
            if process.ends_now() {
                say(format_args!("{}; {} starts it again", ended(process), restart_command(&process.planned)));
            }
        }
        if processes.0.iter().all(|process| process.ended.is_some()) {
            let again = if temporary { "" } else { "; the data are kept: start it anew with the same --data-dir" };
            return Err(Failure::failed(format!("all brokers ended{again}")));
        }
    }
}

/// Ports, and where everything lies.
fn plan(args: &DevArgs, data_dir: &Path) -> Outcome<Vec<Planned>> {
    if data_dir.join("manifest").exists() {
        return Err(Failure::failed(format!(
            "{} holds the data of one broker; run `flowstone dev` without -n there, or choose another --data-dir",
            data_dir.display()
        )));
    }
    std::fs::create_dir_all(data_dir)
        .map_err(|error| Failure::failed(format!("cannot make {}: {error}", data_dir.display())))?;
    // The brokers are told where the folder is, wherever they run.
    let data_dir = std::path::absolute(data_dir)
        .map_err(|error| Failure::failed(format!("cannot tell where {} is: {error}", data_dir.display())))?;
    // Held until all are known, so that none is given out twice; the brokers take them over.
    let mut held = Vec::new();
    let mut planned = Vec::new();
    for number in 0..args.brokers {
        let mut ports = [0; PORTS_EACH];
        for (port, step) in ports.iter_mut().zip(0..) {
            if args.port > 0 {
                let past_all = || {
                    Failure::usage(format!(
                        "--port {} leaves no room for {} brokers; choose a lower one",
                        args.port, args.brokers
                    ))
                };
                let ahead = number.checked_mul(PORTS_APART).and_then(|ahead| ahead.checked_add(step));
                *port = ahead.and_then(|ahead| args.port.checked_add(ahead)).ok_or_else(past_all)?;
            }
            let listener = TcpListener::bind(("127.0.0.1", *port)).map_err(|error| {
                Failure::failed(format!(
                    "cannot listen on 127.0.0.1:{port}: {error}; choose other ports with --port, or stop what listens there"
                ))
            })?;
            *port = listener
                .local_addr()
                .map_err(|error| Failure::failed(format!("the system does not tell a port that it gave: {error}")))?
                .port();
            held.push(listener);
        }
        let id = usize::from(number) + 1;
        let config = data_dir.join(format!("broker-{id}.toml"));
        planned.push(Planned { id, ports, config, data_dir: data_dir.join(format!("broker-{id}")) });
    }
    Ok(planned)
}

fn write_config(planned: &Planned, seeds: &str, log: &str) -> Outcome {
    let data_dir = planned.data_dir.to_string_lossy();
    let text = format!(
        "# Written by `flowstone dev -n`.\n[node]\nid = {}\ndata_dir = {}\n[listen]\nclient = {:?}\npeer = {:?}\n\
         admin = {:?}\n[cluster]\nseeds = [{seeds}]\n[log]\nlevel = {}\n",
        planned.id,
        toml_string(&data_dir),
        planned.address(0),
        planned.address(1),
        planned.address(2),
        toml_string(log),
    );
    std::fs::write(&planned.config, text)
        .map_err(|error| Failure::failed(format!("cannot write {}: {error}", planned.config.display())))
}

/// A string as TOML takes it.
fn toml_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

fn binary() -> PathBuf {
    std::env::current_exe().unwrap_or_else(|_| PathBuf::from("flowstone"))
}

fn start(planned: &Planned) -> Outcome<Child> {
    let mut command = Command::new(binary());
    command.arg("broker").arg("--config").arg(&planned.config);
    command.arg("--end-with-parent").arg(std::process::id().to_string());
    // What configures a broker is in its file; one variable for all of them would give them all one id, or one folder.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FLOWSTONE_") {
            command.env_remove(name);
        }
    }
    // A group of its own: Ctrl-C reaches this process alone, which then stops them in order.
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    command.spawn().map_err(|error| Failure::failed(format!("cannot start broker {}: {error}", planned.id)))
}

/// Waits until every broker is ready; one that ends before is the end of all.
async fn all_ready(processes: &mut Processes) -> Outcome {
    let began = Instant::now();
    let mut told = false;
    let mut waiting: Vec<usize> = (0..processes.0.len()).collect();
    while !waiting.is_empty() {
        let mut reasons = Vec::new();
        for number in std::mem::take(&mut waiting) {
            let process = &mut processes.0[number];
            if process.ends_now() {
                return Err(Failure::failed(format!("{} before it was ready; it says above why", ended(process))));
            }
            match probe::readiness(&process.planned.address(2), Duration::from_secs(1)).await {
                Ok(readiness) if readiness.ready => {}
                Ok(readiness) => {
                    reasons.push(format!("broker {}: {}", process.planned.id, readiness.reasons));
                    waiting.push(number);
                }
                Err(error) => {
                    reasons.push(format!("broker {}: {error}", process.planned.id));
                    waiting.push(number);
                }
            }
        }
        if !told && began.elapsed() > SLOW_AFTER {
            say(format_args!("still waiting for {}", reasons.join("; ").replace('\n', ", ")));
            told = true;
        }
        if !waiting.is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    Ok(())
}

fn ended(process: &Process) -> String {
    let how = process.ended.map_or_else(|| "still running".to_owned(), |status| status.to_string());
    format!("broker {} (process {}) ended: {how}", process.planned.id, process.child.id())
}

fn restart_command(planned: &Planned) -> String {
    let binary = shell_quoted(&binary().to_string_lossy());
    format!("`{binary} broker --config {}`", shell_quoted(&planned.config.to_string_lossy()))
}

/// Asks all to stop, and waits; those that take too long, or a second signal, end at once.
async fn stop(mut processes: Processes, mut signals: StopSignals) -> Outcome {
    for process in &processes.0 {
        process.signal(rustix::process::Signal::TERM);
    }
    let deadline = Instant::now() + SHUTDOWN_DEADLINE + Duration::from_secs(1);
    let mut again = std::pin::pin!(signals.again());
    loop {
        for process in &mut processes.0 {
            process.ends_now();
        }
        if processes.0.iter().all(|process| process.ended.is_some()) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Failure::failed(
                "some brokers did not stop in time and were killed; what was acknowledged is kept",
            ));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = &mut again => {
                return Err(Failure::failed("stopped at once, without draining, by a second signal"));
            }
        }
    }
}

/// Tells who they are and what to try. A stdout that is closed is no reason to stop.
fn greet(processes: &Processes, data_dir: &Path, temporary: bool, began: Instant) {
    let binary = shell_quoted(&binary().to_string_lossy());
    let servers: Vec<String> = processes.0.iter().map(|process| process.planned.address(0)).collect();
    let servers = servers.join(",");
    let mut table = String::new();
    for process in &processes.0 {
        let planned = &process.planned;
        table.push_str(&format!(
            "  broker {:<4} process {:<8} clients {:<16} peers {:<16} admin HTTP http://{}\n",
            planned.id,
            process.child.id(),
            planned.address(0),
            planned.address(1),
            planned.address(2)
        ));
    }
    let kept = if temporary { "removed at the end" } else { "kept" };
    let text = format!(
        "flowstone {VERSION} is ready after {ready} ms, {count} brokers\n\
         \n{table}\
         \n  clients     {servers}\
         \n  data        {data} ({kept})\n\
         \nTry, in another terminal:\n\
         \n  {binary} topic create greetings --server {servers}\
         \n  {binary} produce greetings /etc/hosts --server {servers}\
         \n  {binary} consume greetings -e --server {servers}\n\
         \nA broker may be killed while these run. Ctrl-C stops them all.\n",
        ready = began.elapsed().as_millis(),
        count = processes.0.len(),
        data = data_dir.display(),
    );
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_that_toml_would_cut_are_quoted() {
        assert_eq!(toml_string(r#"/a "b"\c"#), r#""/a \"b\"\\c""#);
        assert_eq!(toml_string("a\nb"), "\"a\\u000Ab\"");
    }
}
