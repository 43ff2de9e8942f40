//! Targets of three brokers on one machine.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
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
/// Nothing has moved for so long: all is where it stays. Longer than leaderships wait before they go back.
const SETTLED_FOR: Duration = Duration::from_secs(20);
/// Longest wait for that.
const SETTLED_WITHIN: Duration = Duration::from_secs(900);
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Leaders killed, and leaderships handed over.
const FAILOVERS: usize = 10;
/// Longest wait for anything that has to come by itself.
const PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);
/// One measurement of the load beside a broker that catches up, and the longest wait for that broker.
const CATCH_UP_PART: Duration = Duration::from_secs(3);
const CATCH_UP_MAX: Duration = Duration::from_secs(900);

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
    cluster.settled()?;
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

/// A broker that was away while `--megabytes` times two and a half were written (5 GB unless told otherwise) comes back,
/// while a quarter of what its two fellows can take goes on being written: all of it lies on the disk three times.
pub(crate) fn catch_up(cli: &Cli, programs: &Programs, folder: &Folder) -> Result<Vec<String>, Failure> {
    let mut cluster = Cluster::start(programs, folder, "catch-up")?;
    let topic = "behind";
    cluster.flowstone(&["topic", "create", topic, "-p", "1", "-r", "3"])?;
    cluster.healthy()?;
    let leader = cluster.leader(topic)?;
    let away = leader % BROKERS + 1;
    cluster.kill(away)?;
    let megabytes = cli.megabytes * 5 / 2;
    let produce = |cluster: &Cluster, records: u64, rate: Option<u64>| {
        let (records, rate) = (records.to_string(), rate.map(|rate| rate.to_string()));
        let mut arguments = vec!["bench", "produce", "--topic", topic, "--size", "1000", "--records", &records];
        arguments.extend(rate.iter().flat_map(|rate| ["--rate", rate]));
        cluster.flowstone(&arguments)
    };
    let without = field(&produce(&cluster, megabytes * 1_000, None)?, "mb_per_second")?;
    let rate = ((without * 1_000.0 / 4.0) as u64).max(1);
    let part = rate * CATCH_UP_PART.as_secs();
    let p99 = |told: &Value| field(&told["latency_ms"], "p99");
    let mut calm = Figures::default();
    for _ in 0..3 {
        calm.push(p99(&produce(&cluster, part, Some(rate))?)?);
    }
    let back = Instant::now();
    cluster.restart(programs, away)?;
    // It serves meanwhile, until the one that was away has everything.
    let (mut meanwhile, mut late, mut written) = (Figures::default(), Figures::default(), 0);
    let seconds = std::thread::scope(|scope| {
        let cluster = &cluster;
        let waiting = scope.spawn(move || cluster.healthy_within(CATCH_UP_MAX).map(|()| back.elapsed().as_secs_f64()));
        while !waiting.is_finished() {
            let told = produce(cluster, part, Some(rate))?;
            meanwhile.push(field(&told, "mb_per_second")?);
            late.push(p99(&told)?);
            written += part / 1_000;
        }
        waiting.join().map_err(|_| Failure::from("waiting for the cluster panicked"))?
    })?;
    let behind = megabytes + 3 * part / 1_000;
    let pulled = cluster.metric(away, "flowstone_pulled_bytes_total")? / 1e6;
    cluster.stop()?;
    Ok(vec![
        format!("behind by {behind} MB, some {written} MB written meanwhile, caught up after {seconds:.1} s"),
        format!("pulled from others: {pulled:.0} MB, MB/s: {:.0}", pulled / seconds),
        format!("less behind, what is written meanwhile taken off, MB/s: {:.0}", behind as f64 / seconds),
        format!("producing with two brokers as fast as it goes, MB/s: {without:.0}"),
        meanwhile.line("producing while the third catches up, MB/s"),
        calm.line("p99 before it came back, ms"),
        late.line("p99 while it catches up, ms"),
    ])
}

/// Three brokers, each a process with a configuration of its own.
pub(crate) struct Cluster {
    brokers: Vec<Member>,
    flowstone: PathBuf,
    folder: PathBuf,
    /// As all configurations have them.
    seeds: String,
}

struct Member {
    child: Child,
    config: PathBuf,
    port: u16,
}

impl Cluster {
    pub(crate) fn start(programs: &Programs, folder: &Folder, name: &str) -> Result<Self, Failure> {
        let folder = folder.0.join(name);
        let mut ports = Vec::new();
        while ports.len() < BROKERS {
            let port = free_ports()?;
            if ports.iter().all(|other: &u16| other.abs_diff(port) > 3) {
                ports.push(port);
            }
        }
        let seeds: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{}\"", port + 1)).collect();
        let flowstone = programs.folder.join("flowstone");
        let mut cluster = Self { brokers: Vec::new(), flowstone, folder, seeds: seeds.join(", ") };
        for port in ports {
            cluster.start_one(programs, port)?;
        }
        cluster.healthy()?;
        Ok(cluster)
    }

    fn start_one(&mut self, programs: &Programs, port: u16) -> Result<(), Failure> {
        let number = self.brokers.len() + 1;
        let dir = self.folder.join(format!("broker-{number}"));
        fs::create_dir_all(&dir)?;
        let config = dir.join("broker.toml");
        fs::write(
            &config,
            format!(
                "[node]\nid = {number}\ndata_dir = \"{}\"\n[listen]\nclient = \"127.0.0.1:{port}\"\npeer = \
                 \"127.0.0.1:{}\"\nadmin = \"127.0.0.1:{}\"\n[cluster]\nseeds = [{}]\n",
                dir.join("data").display(),
                port + 1,
                port + 2,
                self.seeds
            ),
        )?;
        let child = spawn(programs, &config)?;
        self.brokers.push(Member { child, config, port });
        Ok(())
    }

    /// Starts one more broker of the same seeds; its number.
    pub(crate) fn add(&mut self, programs: &Programs) -> Result<usize, Failure> {
        self.start_one(programs, free_ports()?)?;
        Ok(self.brokers.len())
    }

    /// Stops a broker cleanly.
    pub(crate) fn stop_one(&mut self, broker: usize) -> Result<(), Failure> {
        terminate(&mut self.brokers[broker - 1].child)
    }

    /// A metric of a broker, over all its labels.
    pub(crate) fn metric(&self, broker: usize, name: &str) -> Result<f64, Failure> {
        let mut socket = TcpStream::connect(("127.0.0.1", self.brokers[broker - 1].port + 2))?;
        write!(socket, "GET /metrics HTTP/1.1\r\nhost: broker\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        socket.read_to_string(&mut text)?;
        let of = |line: &str| {
            let rest = line.strip_prefix(name)?;
            (rest.starts_with(['{', ' '])).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
        };
        Ok(text.lines().filter_map(of).sum())
    }

    /// A command against this cluster, to be started.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.flowstone);
        command.args(args).args(["--server", &self.servers(), "-o", "json"]);
        command.stdin(Stdio::null()).stderr(Stdio::inherit());
        command
    }

    pub(crate) fn servers(&self) -> String {
        let servers: Vec<String> = self.brokers.iter().map(|broker| format!("127.0.0.1:{}", broker.port)).collect();
        servers.join(",")
    }

    pub(crate) fn flowstone(&self, args: &[&str]) -> Result<Value, Failure> {
        self.flowstone_within("120s", args)
    }

    /// A command that may take so long.
    pub(crate) fn flowstone_within(&self, timeout: &str, args: &[&str]) -> Result<Value, Failure> {
        let servers = self.servers();
        json(Command::new(&self.flowstone).args(args).args(["--server", &servers, "--timeout", timeout, "-o", "json"]))
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
    pub(crate) fn healthy(&self) -> Result<(), Failure> {
        self.healthy_within(PATIENCE)
    }

    fn healthy_within(&self, patience: Duration) -> Result<(), Failure> {
        let from = Instant::now();
        while !self.is_healthy()? {
            if from.elapsed() > patience {
                return Err("the cluster does not become healthy: start three brokers by hand to see why".into());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits until leaderships have gone where they were meant to be and all groups rest: some dozens per second move in a
    /// cluster that was just filled, which is work.
    fn settled(&self) -> Result<(), Failure> {
        // Nothing where the cluster is not healthy: while one moves, its partition has no leader for a moment.
        let leaders = || -> Option<Vec<Value>> {
            let health = self.flowstone(&["cluster", "health"]).ok()?;
            Some(health["brokers"].as_array()?.iter().map(|broker| broker["leaders"].clone()).collect())
        };
        let (from, mut since) = (Instant::now(), Instant::now());
        let mut before = leaders();
        while since.elapsed() < SETTLED_FOR {
            if from.elapsed() > SETTLED_WITHIN {
                return Err(
                    "leaderships keep moving: look at `flowstone cluster health --watch` to see where to".into()
                );
            }
            std::thread::sleep(LOOK_EVERY);
            let now = leaders();
            if now.is_none() || now != before {
                before = now;
                since = Instant::now();
            }
        }
        // Being asked how they are, they stirred.
        std::thread::sleep(LOOK_EVERY);
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

    pub(crate) fn stop(mut self) -> Result<(), Failure> {
        for broker in &mut self.brokers {
            // One may have been stopped before.
            if broker.child.try_wait()?.is_none() {
                terminate(&mut broker.child)?;
            }
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
