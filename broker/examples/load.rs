//! Drives one broker with the generated client alone, to see what the broker itself can do:
//!
//! ```text
//! cargo run --release -p flowstone-broker --example load -- [quorum|relaxed] [server threads]
//! ```
//!
//! or, for very many partitions and a start after a crash, in one folder after another:
//!
//! ```text
//! LOAD_DIR=folder cargo run --release -p flowstone-broker --example load -- fill 1000
//! LOAD_DIR=folder cargo run --release -p flowstone-broker --example load -- open
//! ```
//!
//! Prints what 8 partitions take of 1000 B records in batches of about 1 MiB, how fast one fetch stream gives them
//! back, and how long one record at a time takes.

#![allow(clippy::print_stdout, reason = "its figures are what it is for")]

use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_broker::{Broker, Config};
use flowstone_protocol::pb::admin_client::AdminClient;
use flowstone_protocol::pb::log_client::LogClient;
use flowstone_protocol::{Compression, RecordBatchBuilder, Timestamp, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

const PARTITIONS: i32 = 8;
const TOTAL_BYTES: usize = 4 << 30;
const IN_FLIGHT: usize = 32;
const PINGS: usize = 20_000;

fn batch(records: usize, size: usize) -> Bytes {
    let mut builder = RecordBatchBuilder::new(Compression::None);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    for _ in 0..records {
        let at = Timestamp::new(now.as_millis() as i64);
        builder.append(at, None, Some(&vec![7; size]), []).unwrap_or_else(|error| panic!("{error}"));
    }
    builder.build()
}

async fn channel(address: std::net::SocketAddr) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap_or_else(|error| panic!("{error}"));
    endpoint
        .tcp_nodelay(true)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .connect()
        .await
        .unwrap_or_else(|error| panic!("{error}"))
}

/// Processor time of this whole process so far, in seconds: on a busy machine a better measure than the clock.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|ticks| ticks.parse::<u64>().ok()).unwrap_or(0);
    (ticks(11) + ticks(12)) as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Starts a broker on the folder, says how long that took, fills it if asked to, and ends as if it were killed.
fn many(dir: &std::path::Path, fill: Option<i32>) -> Result<(), Box<dyn std::error::Error>> {
    let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let began = Instant::now();
    let broker = server.block_on(Broker::start(Config::dev(dir, 0)))?;
    println!("start: {:?}", began.elapsed());
    if let Some(partitions) = fill {
        server.block_on(async {
            let channel = channel(broker.client_addr).await;
            let (mut log, mut admin) = (LogClient::new(channel.clone()), AdminClient::new(channel));
            let began = Instant::now();
            let request = pb::CreateTopicRequest { name: "many".to_owned(), partitions, ..Default::default() };
            let topic = admin.create_topic(request).await?.into_inner().topic.unwrap_or_default();
            println!("create {partitions} partitions: {:?}", began.elapsed());
            let (sender, receiver) = mpsc::channel(IN_FLIGHT);
            let mut answers = log.produce(ReceiverStream::new(receiver)).await?.into_inner();
            let (batch, mut answered) = (batch(1, 1_000), 0);
            for round in 1..=3 {
                let began = Instant::now();
                for partition in 0..partitions {
                    let (topic_id, batch) = (topic.topic_id.clone(), batch.clone());
                    let request_id = partition as u64;
                    sender
                        .send(pb::ProduceRequest { request_id, topic_id, partition, batch, ..Default::default() })
                        .await?;
                }
                while answered < partitions as usize * round {
                    answered += answers.message().await?.ok_or("the stream ended")?.results.len();
                }
                println!("one record to each: {:?}", began.elapsed());
            }
            Ok::<(), Box<dyn std::error::Error>>(())
        })?;
    }
    let pages: u64 = std::fs::read_to_string("/proc/self/statm")?.split(' ').nth(1).unwrap_or("0").parse()?;
    println!("resident: {} KiB", pages * 4);
    std::process::exit(0)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::var_os("LOAD_DIR").map(std::path::PathBuf::from);
    match (std::env::args().nth(1).as_deref(), folder) {
        (Some("fill"), Some(dir)) => return many(&dir, std::env::args().nth(2).map(|n| n.parse()).transpose()?),
        (Some("open"), Some(dir)) => return many(&dir, None),
        _ => {}
    }
    let flush = std::env::args().nth(1).unwrap_or_else(|| "quorum".to_owned());
    let threads: usize = std::env::args().nth(2).map_or(Ok(1), |text| text.parse())?;
    let shards = std::env::args().nth(3).unwrap_or_else(|| "0".to_owned());
    let dir = std::env::var_os("LOAD_DIR").map_or_else(std::env::temp_dir, Into::into);
    let dir = dir.join(format!("flowstone-load-{}", std::process::id()));
    let mut config = Config::dev(&dir, 0);
    config.set_key("topic.flowstone.flush", &flush)?;
    config.set_key("storage.shards", &shards)?;
    let server = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let broker = server.block_on(Broker::start(config))?;
    let address = broker.client_addr;
    let client = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    client.block_on(run(address))?;
    server.block_on(broker.shutdown(Duration::from_secs(10)));
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

async fn run(address: std::net::SocketAddr) -> Result<(), Box<dyn std::error::Error>> {
    let mut log = LogClient::new(channel(address).await).max_decoding_message_size(64 << 20);
    let mut admin = AdminClient::new(channel(address).await);
    let request = pb::CreateTopicRequest { name: "load".to_owned(), partitions: PARTITIONS, ..Default::default() };
    let topic = admin.create_topic(request).await?.into_inner().topic.map(|topic| topic.topic_id).unwrap_or_default();
    let request = |partition: usize, batch: &Bytes, request_id: usize| pb::ProduceRequest {
        request_id: request_id as u64,
        topic_id: topic.clone(),
        partition: partition as i32,
        batch: batch.clone(),
        ..Default::default()
    };

    for round in 0..3 {
        let batch = batch(1_020, 1_000);
        let count = TOTAL_BYTES / batch.len();
        let (sender, receiver) = mpsc::channel(IN_FLIGHT);
        let mut answers = log.produce(ReceiverStream::new(receiver)).await?.into_inner();
        let (began, processor) = (Instant::now(), processor_seconds());
        let (mut sent, mut answered) = (0, 0);
        while answered < count {
            while sent < count && sent - answered < IN_FLIGHT {
                sender.send(request(sent % PARTITIONS as usize, &batch, sent)).await?;
                sent += 1;
            }
            let response = answers.message().await?.ok_or("the stream ended")?;
            if let Some(failed) = response.results.iter().find_map(|result| result.error.as_ref()) {
                return Err(failed.message.clone().into());
            }
            answered += response.results.len();
        }
        let took = began.elapsed().as_secs_f64();
        let gigabytes = (count * batch.len()) as f64 / 1e9;
        let processor = (processor_seconds() - processor) / gigabytes;
        println!("produce {round}: {:.0} MB/s, {processor:.2} s of processor per GB", gigabytes / took * 1e3);
    }

    for round in 0..3 {
        let (sender, receiver) = mpsc::channel(64);
        let set = (0..PARTITIONS)
            .map(|partition| pb::FetchPartition {
                fetch_id: partition as u32,
                session: 0,
                topic_id: topic.clone(),
                partition,
                offset: 0,
                last_epoch: -1,
                from_any_replica: false,
                known_high_watermark: -1,
                ..Default::default()
            })
            .collect();
        let credit = 8 << 20;
        sender.send(pb::FetchRequest { set, credit_bytes: credit, ..Default::default() }).await?;
        let mut answers = log.fetch(ReceiverStream::new(receiver)).await?.into_inner();
        let (began, processor) = (Instant::now(), processor_seconds());
        let (mut received, mut owed, mut responses) = (0usize, 0u64, 0);
        while received < 2 * TOTAL_BYTES {
            let response = answers.message().await?.ok_or("the stream ended")?;
            received += response.batches.len();
            responses += 1;
            owed += response.batches.len() as u64;
            if owed >= credit / 4 {
                sender.send(pb::FetchRequest { credit_bytes: owed, ..Default::default() }).await?;
                owed = 0;
            }
        }
        let took = began.elapsed().as_secs_f64();
        let gigabytes = received as f64 / 1e9;
        let processor = (processor_seconds() - processor) / gigabytes;
        let (speed, size) = (gigabytes / took * 1e3, received / responses);
        println!("fetch {round}: {speed:.0} MB/s, {processor:.2} s of processor per GB, {size} B a response");
    }

    for round in 0..3 {
        let batch = batch(1, 1_000);
        let (sender, receiver) = mpsc::channel(1);
        let mut answers = log.produce(ReceiverStream::new(receiver)).await?.into_inner();
        let mut took = Vec::with_capacity(PINGS);
        for ping in 0..PINGS {
            let began = Instant::now();
            sender.send(request(0, &batch, ping)).await?;
            answers.message().await?.ok_or("the stream ended")?;
            took.push(began.elapsed());
        }
        took.sort_unstable();
        let at = |share: f64| took[(took.len() as f64 * share) as usize];
        println!("one at a time {round}: p50 {:?}, p99 {:?}, p99.9 {:?}", at(0.5), at(0.99), at(0.999));
    }
    Ok(())
}
