//! Targets of three brokers on one machine.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use flowstone_client::{Client, NewTopic, Record};
use serde_json::Value;

use crate::running::{Broker, Figures, Folder, Programs, field, free_ports, json, resident_mib, terminate};
use crate::{Cli, Failure};

const BROKERS: usize = 3;
const IDLE_PARTITIONS: u32 = 10_000;
/// How long the idle cluster is watched.
const IDLE_FOR: Duration = Duration::from_secs(30);
/// Leaders killed, and leaderships handed over.
const FAILOVERS: usize = 10;
/// Longest wait for anything that has to come by itself.
const PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);

/// Three brokers, three replicas, quorum: against one broker that does everything once.
pub(crate) fn replicated(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let (mut one, mut three, mut ratio) = (Figures::default(), Figures::default(), Figures::default());
    for pair in 0..cli.pairs {
        let alone = Broker::start(programs, &folder.0.join(format!("alone-{pair}")))?;
        let base = field(&alone.bench("produce", 1000, cli.megabytes, 8, "quorum")?, "mb_per_second")?;
        alone.stop()?;
        let cluster = Cluster::start(programs, folder, &format!("replicated-{pair}"))?;
        let got = field(&cluster.bench(1000, cli.megabytes, 8)?, "mb_per_second")?;
        cluster.stop()?;
        one.push(base);
        three.push(got);
        ratio.push(got / base);
    }
    Ok(vec![one.line("one broker, MB/s"), three.line("three brokers, three replicas, MB/s"), ratio.line("three / one")])
}

/// Ten thousand partitions that nobody uses.
pub(crate) fn idle(programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let cluster = Cluster::start(programs, folder, "idle")?;
    let before: Vec<f64> = cluster.each(resident_mib)?;
    let began = Instant::now();
    // In parts, as one who fills a cluster would.
    for part in 0..10 {
        let partitions = (IDLE_PARTITIONS / 10).to_string();
        cluster.flowstone(&["topic", "create", &format!("idle-{part}"), "-p", &partitions, "-r", "3"])?;
    }
    cluster.healthy()?;
    let created = began.elapsed();
    let processor_before: Vec<f64> = cluster.each(processor_seconds)?;
    let watched = Instant::now();
    std::thread::sleep(IDLE_FOR);
    let seconds = watched.elapsed().as_secs_f64();
    let processor_after: Vec<f64> = cluster.each(processor_seconds)?;
    let after: Vec<f64> = cluster.each(resident_mib)?;
    let (mut busy, mut memory) = (Figures::default(), Figures::default());
    for broker in 0..BROKERS {
        busy.push((processor_after[broker] - processor_before[broker]) / seconds * 100.0);
        memory.push((after[broker] - before[broker]) * 1024.0 / f64::from(IDLE_PARTITIONS));
    }
    cluster.stop()?;
    Ok(vec![
        format!("{IDLE_PARTITIONS} partitions of three replicas, created and led after {:.1} s", created.as_secs_f64()),
        busy.line("each broker, % of one core"),
        memory.line("each broker, KiB per replica"),
    ])
}

/// One record after another, while leaders are killed and leaderships handed over.
pub(crate) fn failover(_cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let mut cluster = Cluster::start(programs, folder, "failover")?;
    let topic = "failover";
    let writer = Writer::start(&cluster.servers(), topic)?;
    let (mut killed, mut handed) = (Figures::default(), Figures::default());
    for _ in 0..FAILOVERS {
        cluster.healthy()?;
        let leader = cluster.leader(topic)?;
        writer.goes_on()?;
        let at = Instant::now();
        cluster.kill(leader)?;
        killed.push(writer.next_after(at)?.as_secs_f64() * 1e3);
        cluster.restart(programs, leader)?;
    }
    for _ in 0..FAILOVERS {
        cluster.healthy()?;
        let leader = cluster.leader(topic)?;
        writer.goes_on()?;
        writer.longest_gap.store(0, Ordering::Relaxed);
        let to = (leader % BROKERS + 1).to_string();
        cluster.flowstone(&["partition", "transfer-leader", topic, "0", "--to", &to])?;
        writer.goes_on()?;
        handed.push(writer.longest_gap.load(Ordering::Relaxed) as f64 / 1e3);
    }
    writer.stop()?;
    cluster.stop()?;
    Ok(vec![
        killed.line("leader killed: next acknowledged write, ms"),
        handed.line("handed over: longest gap between acks, ms"),
    ])
}

/// A broker that was away while `--megabytes` times two and a half were written comes back.
pub(crate) fn catch_up(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let mut cluster = Cluster::start(programs, folder, "catch-up")?;
    let topic = "behind";
    cluster.flowstone(&["topic", "create", topic, "-p", "1", "-r", "3"])?;
    cluster.healthy()?;
    let leader = cluster.leader(topic)?;
    let away = leader % BROKERS + 1;
    cluster.kill(away)?;
    let megabytes = cli.megabytes * 5 / 2;
    let produce = |cluster: &Cluster, megabytes: u64| {
        let records = (megabytes * 1_000).to_string();
        cluster.flowstone(&["bench", "produce", "--topic", topic, "--records", &records, "--size", "1000"])
    };
    let without = field(&produce(&cluster, megabytes)?, "mb_per_second")?;
    let back = Instant::now();
    cluster.restart(programs, away)?;
    // It serves meanwhile: the same load again, in parts, until the one that was away has everything.
    let (mut meanwhile, mut written) = (Figures::default(), 0);
    while !cluster.is_healthy()? {
        meanwhile.push(field(&produce(&cluster, 200)?, "mb_per_second")?);
        written += 200;
        if back.elapsed() > PATIENCE {
            return Err(format!("broker {away} has not caught up after {:?}", back.elapsed()).into());
        }
    }
    let seconds = back.elapsed().as_secs_f64();
    cluster.stop()?;
    if meanwhile.0.is_empty() {
        meanwhile.push(0.0);
    }
    Ok(vec![
        format!("behind by {megabytes} MB, {written} MB written meanwhile, caught up after {seconds:.1} s"),
        format!("catching up, MB/s: {:.0}", (megabytes + written) as f64 / seconds),
        format!("producing with two brokers, MB/s: {without:.0}"),
        meanwhile.line("producing while the third catches up, MB/s"),
    ])
}

/// Three brokers, each a process with a configuration of its own.
struct Cluster {
    brokers: Vec<Member>,
    flowstone: PathBuf,
}

struct Member {
    child: Child,
    config: PathBuf,
    port: u16,
}

impl Cluster {
    fn start(programs: &Programs, folder: &Folder, name: &str) -> Result<Self, Failure> {
        let folder = folder.0.join(name);
        let mut ports = Vec::new();
        while ports.len() < BROKERS {
            let port = free_ports()?;
            if ports.iter().all(|other: &u16| other.abs_diff(port) > 3) {
                ports.push(port);
            }
        }
        let seeds: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{}\"", port + 1)).collect();
        let mut cluster = Self { brokers: Vec::new(), flowstone: programs.folder.join("flowstone") };
        for (number, &port) in ports.iter().enumerate() {
            let dir = folder.join(format!("broker-{}", number + 1));
            fs::create_dir_all(&dir)?;
            let config = dir.join("broker.toml");
            fs::write(
                &config,
                format!(
                    "[node]\nid = {}\ndata_dir = \"{}\"\n[listen]\nclient = \"127.0.0.1:{port}\"\npeer = \
                     \"127.0.0.1:{}\"\nadmin = \"127.0.0.1:{}\"\n[cluster]\nseeds = [{}]\n",
                    number + 1,
                    dir.join("data").display(),
                    port + 1,
                    port + 2,
                    seeds.join(", ")
                ),
            )?;
            let child = spawn(programs, &config)?;
            cluster.brokers.push(Member { child, config, port });
        }
        cluster.healthy()?;
        Ok(cluster)
    }

    fn servers(&self) -> String {
        let servers: Vec<String> = self.brokers.iter().map(|broker| format!("127.0.0.1:{}", broker.port)).collect();
        servers.join(",")
    }

    fn flowstone(&self, args: &[&str]) -> Result<Value, Failure> {
        json(Command::new(&self.flowstone).args(args).args([
            "--server",
            &self.servers(),
            "--timeout",
            "120s",
            "-o",
            "json",
        ]))
    }

    fn bench(&self, size: u64, megabytes: u64, partitions: u32) -> Result<Value, Failure> {
        self.flowstone(&[
            "bench",
            "produce",
            "--records",
            &(megabytes * 1_000_000 / size).to_string(),
            "--size",
            &size.to_string(),
            "--partitions",
            &partitions.to_string(),
        ])
    }

    fn is_healthy(&self) -> Result<bool, Failure> {
        let asked = Command::new(&self.flowstone)
            .args(["cluster", "health", "--timeout", "5s", "--server", &self.servers()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        Ok(asked.success())
    }

    /// Waits until nothing is under-replicated or leaderless.
    fn healthy(&self) -> Result<(), Failure> {
        let from = Instant::now();
        while !self.is_healthy()? {
            if from.elapsed() > PATIENCE {
                return Err("the cluster does not become healthy: start three brokers by hand to see why".into());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// The broker that leads partition 0, counted from 1.
    fn leader(&self, topic: &str) -> Result<usize, Failure> {
        let topic = self.flowstone(&["topic", "describe", topic])?;
        let leader = topic["partitions"][0]["leader"].as_u64().ok_or_else(|| format!("no leader in {topic}"))?;
        Ok(usize::try_from(leader)?)
    }

    fn kill(&mut self, broker: usize) -> Result<(), Failure> {
        let child = &mut self.brokers[broker - 1].child;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    fn restart(&mut self, programs: &Programs, broker: usize) -> Result<(), Failure> {
        let member = &mut self.brokers[broker - 1];
        member.child = spawn(programs, &member.config)?;
        Ok(())
    }

    fn each(&self, figure: fn(u32) -> Result<f64, Failure>) -> Result<Vec<f64>, Failure> {
        self.brokers.iter().map(|broker| figure(broker.child.id())).collect()
    }

    fn stop(mut self) -> Result<(), Failure> {
        for broker in &mut self.brokers {
            terminate(&mut broker.child)?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for broker in &mut self.brokers {
            let _ = broker.child.kill();
            let _ = broker.child.wait();
        }
    }
}

fn spawn(programs: &Programs, config: &std::path::Path) -> Result<Child, Failure> {
    Ok(Command::new(programs.folder.join("flowstone"))
        .args(["broker", "--config"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?)
}

/// Processor time of a process, user and system, in seconds.
fn processor_seconds(pid: u32) -> Result<f64, Failure> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in brackets may hold blanks.
    let after = stat.rsplit_once(')').ok_or("no name in /proc/PID/stat")?.1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks: f64 = fields.get(11).zip(fields.get(12)).map_or(Err("short /proc/PID/stat"), |(user, system)| {
        user.parse::<f64>()
            .and_then(|user| Ok(user + system.parse::<f64>()?))
            .map_err(|_| "no number in /proc/PID/stat")
    })?;
    // USER_HZ is 100 on every Linux that this runs on.
    Ok(ticks / 100.0)
}

/// Writes one record after another, on a thread of its own, and notes when each was acknowledged.
struct Writer {
    thread: std::thread::JoinHandle<Result<(), String>>,
    stop: Arc<AtomicBool>,
    /// Microseconds from the writer's start to the last acknowledgement.
    last_ack: Arc<AtomicU64>,
    /// Microseconds between two acknowledgements, at most since this was set to 0.
    longest_gap: Arc<AtomicU64>,
    began: Instant,
}

impl Writer {
    fn start(servers: &str, topic: &str) -> Result<Self, Failure> {
        let (stop, last_ack, longest_gap) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let began = Instant::now();
        let writing = {
            let (stop, last_ack, longest_gap) = (Arc::clone(&stop), Arc::clone(&last_ack), Arc::clone(&longest_gap));
            let (servers, topic) = (servers.to_owned(), topic.to_owned());
            async move {
                let client = Client::builder(servers).client_id("failover").connect().await?;
                client.admin().create_topic(NewTopic::new(&topic).partitions(1).replicas(3)).await?;
                let producer = client.producer().linger(Duration::ZERO).build().await?;
                while !stop.load(Ordering::Relaxed) {
                    producer.send(Record::to(&topic).value(b"a record")).await?.await?;
                    let now = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                    let before = last_ack.swap(now, Ordering::Release);
                    longest_gap.fetch_max(now - before, Ordering::Relaxed);
                }
                Ok::<(), flowstone_client::Error>(())
            }
        };
        let thread = std::thread::Builder::new().name("writer".into()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| format!("no runtime: {error}"))?;
            runtime.block_on(writing).map_err(|error| format!("the writer failed: {error}"))
        })?;
        let writer = Self { thread, stop, last_ack, longest_gap, began };
        writer.goes_on()?;
        Ok(writer)
    }

    /// Waits for an acknowledgement that comes after this call.
    fn goes_on(&self) -> Result<(), Failure> {
        self.next_after(Instant::now()).map(drop)
    }

    /// How long after `at` the next acknowledgement came.
    fn next_after(&self, at: Instant) -> Result<Duration, Failure> {
        loop {
            let last = self.began + Duration::from_micros(self.last_ack.load(Ordering::Acquire));
            if last > at {
                return Ok(last - at);
            }
            if self.thread.is_finished() || at.elapsed() > PATIENCE {
                return Err("no record is acknowledged any more".into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn stop(self) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the writer panicked")??;
        Ok(())
    }
}
