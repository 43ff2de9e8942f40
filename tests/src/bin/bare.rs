//! The bare limits that the broker's figures are ratios of: the least that any program could do for the same work, on
//! the same machine, in the same minute.
//!
//! - `bare ingest`: the same bytes as a durable ingest, over loopback, appended 1 MiB at a time to 8 files in turn, each
//!   flushed (`fdatasync`) before the next is read.
//! - `bare pingpong`: one record at a time over a gRPC stream, through one writing thread that appends it into blocks
//!   that were zeroed before, flushes, and answers.
//!
//! It knows the protocol's messages and nothing else of Flowstone. It ends by itself and removes its files.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Args, Parser, Subcommand, ValueEnum};
use flowstone_protocol::compression::Compression;
use flowstone_protocol::pb;
use flowstone_protocol::pb::log_client::LogClient;
use flowstone_protocol::pb::log_server::{Log, LogServer};
use flowstone_protocol::record::RecordBatchBuilder;
use flowstone_protocol::{Offset, Timestamp, TopicId};
use hdrhistogram::Histogram;
use tokio::sync::{mpsc as async_mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// Bytes that are received, appended and flushed at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// The writing thread begins anew at the file's start where a run would need more.
const PINGPONG_FILE_BYTES_MAX: u64 = 256 << 20;
/// Round trips before those that count.
const PINGPONG_WARM_UP: u64 = 500;

#[derive(Parser)]
#[command(about = "The bare limits that Flowstone's figures are ratios of")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Receive over loopback, append to files in turn, flush each.
    Ingest {
        /// Bytes to send, in MiB.
        #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..))]
        mib: u64,
        /// Files that are appended to in turn.
        #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1000))]
        files: u64,
        #[command(flatten)]
        options: Options,
    },
    /// One record at a time: stream, writing thread, flush, answer.
    Pingpong {
        /// Round trips that are measured.
        #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
        round_trips: u64,
        /// Bytes of each record's value.
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
        size: u64,
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Args)]
struct Options {
    /// Leave out the flush.
    #[arg(long)]
    no_flush: bool,
    /// Folder for a temporary folder with the files; it should lie on the disk that the broker uses.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Form of the result.
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Form::Table)]
    output: Form,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Table,
    Json,
}

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "bare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Ingest { mib, files, options } => {
            let folder = Folder::new(options.dir.as_deref())?;
            let chunks = mib;
            let took = ingest(&folder.0, chunks, files, !options.no_flush)?;
            let bytes = chunks * CHUNK_BYTES as u64;
            let mb_per_second = bytes as f64 / 1e6 / took.as_secs_f64();
            match options.output {
                Form::Table => print(&format!(
                    "{mb_per_second:.0} MB/s ({mib} MiB into {files} files in {:.2} s, {})",
                    took.as_secs_f64(),
                    if options.no_flush { "not flushed" } else { "flushed 1 MiB at a time" },
                )),
                Form::Json => print(
                    &serde_json::json!({
                        "bytes": bytes,
                        "seconds": took.as_secs_f64(),
                        "mb_per_second": mb_per_second,
                        "files": files,
                        "flush": !options.no_flush,
                    })
                    .to_string(),
                ),
            }
        }
        Command::Pingpong { round_trips, size, options } => {
            let folder = Folder::new(options.dir.as_deref())?;
            let latency = pingpong(&folder.0, round_trips, size as usize, !options.no_flush)?;
            let us = |quantile: f64| latency.value_at_quantile(quantile) as f64 / 1000.0;
            match options.output {
                Form::Table => print(&format!(
                    "p50 {:.1} us, p99 {:.1} us, p99.9 {:.1} us, max {:.1} us ({round_trips} round trips of {size} B, {})",
                    us(0.5),
                    us(0.99),
                    us(0.999),
                    latency.max() as f64 / 1000.0,
                    if options.no_flush { "not flushed" } else { "flushed" },
                )),
                Form::Json => print(
                    &serde_json::json!({
                        "round_trips": round_trips,
                        "size": size,
                        "latency_us": {
                            "p50": us(0.5),
                            "p99": us(0.99),
                            "p999": us(0.999),
                            "max": latency.max() as f64 / 1000.0,
                        },
                        "flush": !options.no_flush,
                    })
                    .to_string(),
                ),
            }
        }
    }
    Ok(())
}

fn print(line: &str) {
    // A reader who has gone away needs no answer.
    let _ = writeln!(io::stdout(), "{line}");
}

/// A folder that is removed with all in it when this is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(within: Option<&Path>) -> io::Result<Self> {
        let within = within.map_or_else(std::env::temp_dir, Path::to_path_buf);
        let path = within.join(format!("flowstone-bare-{}", std::process::id()));
        fs::create_dir(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}; give another --dir", path.display()))
        })?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Time from the first byte received to the last one appended (and flushed).
fn ingest(folder: &Path, chunks: u64, files: u64, flush: bool) -> Result<Duration, Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let sender = thread::spawn(move || -> io::Result<()> {
        let mut socket = TcpStream::connect(address)?;
        let chunk: Vec<u8> = (0..CHUNK_BYTES).map(|at| (at % 251) as u8).collect();
        for _ in 0..chunks {
            socket.write_all(&chunk)?;
        }
        Ok(())
    });
    let files: Vec<File> = (0..files)
        .map(|number| File::options().write(true).create_new(true).open(folder.join(number.to_string())))
        .collect::<Result<_, _>>()?;
    let (mut socket, _) = listener.accept()?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut began = None;
    for number in 0..chunks {
        socket.read_exact(&mut chunk[..1])?;
        began.get_or_insert_with(Instant::now);
        socket.read_exact(&mut chunk[1..])?;
        let (round, file) = (number / files.len() as u64, number as usize % files.len());
        files[file].write_all_at(&chunk, round * CHUNK_BYTES as u64)?;
        if flush {
            files[file].sync_data()?;
        }
    }
    let took = began.map_or(Duration::ZERO, |began| began.elapsed());
    sender.join().map_err(|_| "the sending thread panicked")??;
    Ok(took)
}

/// Nanoseconds of each round trip.
fn pingpong(folder: &Path, round_trips: u64, size: usize, flush: bool) -> Result<Histogram<u64>, Failure> {
    let value: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
    let mut builder = RecordBatchBuilder::new(Compression::None);
    builder.append(Timestamp::new(0), None, Some(&value), [])?;
    let batch = builder.build();

    let (appends, inbox) = mpsc::channel::<Append>();
    let file_bytes = (batch.len() as u64 * (round_trips + PINGPONG_WARM_UP)).min(PINGPONG_FILE_BYTES_MAX);
    let file = zeroed(&folder.join("log"), file_bytes)?;
    let writer = thread::spawn(move || write_appends(&file, file_bytes, flush, &inbox));

    let (bound, address) = mpsc::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = thread::spawn(move || -> Result<(), Failure> {
        one_thread()?.block_on(async move {
            let incoming = TcpIncoming::bind((Ipv4Addr::LOCALHOST, 0).into())?.with_nodelay(Some(true));
            bound.send(incoming.local_addr()?)?;
            Server::builder()
                .add_service(LogServer::new(Appender { appends }))
                .serve_with_incoming_shutdown(incoming, async {
                    let _ = stopped.await;
                })
                .await?;
            Ok(())
        })
    });
    let Ok(address) = address.recv() else {
        return Err(join(server).err().unwrap_or_else(|| "the server did not start".into()));
    };

    let latency = one_thread()?.block_on(async move {
        let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
        let (requests, stream) = async_mpsc::channel(1);
        let mut answers = LogClient::new(channel).produce(ReceiverStream::new(stream)).await?.into_inner();
        let topic_id = Bytes::copy_from_slice(&TopicId::new(1).to_bytes());
        let mut latency = Histogram::<u64>::new(3)?;
        for request_id in 0..PINGPONG_WARM_UP + round_trips {
            let request = pb::ProduceRequest {
                request_id,
                topic_id: topic_id.clone(),
                partition: 0,
                acks: pb::Acks::Quorum.into(),
                batch: batch.clone(),
                ..Default::default()
            };
            let sent = Instant::now();
            requests.send(request).await?;
            let answer = answers.next().await.ok_or("the server ended the stream")??;
            let took = sent.elapsed();
            if answer.results.first().map(|result| result.request_id) != Some(request_id) {
                return Err("an answer to another request".into());
            }
            if request_id >= PINGPONG_WARM_UP {
                latency.record(took.as_nanos() as u64)?;
            }
        }
        Ok::<_, Failure>(latency)
    });
    // The server ends once its streams have, the writing thread once the server has.
    let _ = stop.send(());
    join(server)?;
    writer.join().map_err(|_| "the writing thread panicked")??;
    latency
}

fn join(thread: thread::JoinHandle<Result<(), Failure>>) -> Result<(), Failure> {
    thread.join().map_err(|_| "a thread panicked")?
}

fn one_thread() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// A file whose blocks are allocated and written: an append into it changes no metadata but the time.
fn zeroed(path: &Path, bytes: u64) -> io::Result<File> {
    let file = File::options().write(true).create_new(true).open(path)?;
    let zeros = vec![0; CHUNK_BYTES];
    let mut at = 0;
    while at < bytes {
        let part = (bytes - at).min(CHUNK_BYTES as u64);
        file.write_all_at(&zeros[..part as usize], at)?;
        at += part;
    }
    file.sync_all()?;
    Ok(file)
}

struct Append {
    request_id: u64,
    batch: Bytes,
    answer: async_mpsc::UnboundedSender<Result<pb::ProduceResponse, Status>>,
}

fn write_appends(file: &File, file_bytes: u64, flush: bool, inbox: &mpsc::Receiver<Append>) -> io::Result<()> {
    let (mut at, mut offset) = (0, Offset::ZERO);
    for append in inbox {
        let bytes = append.batch.len() as u64;
        if at + bytes > file_bytes {
            at = 0;
        }
        file.write_all_at(&append.batch, at)?;
        if flush {
            file.sync_data()?;
        }
        let result = pb::ProduceResult {
            request_id: append.request_id,
            base_offset: offset.get(),
            log_append_time: -1,
            error: None,
        };
        // A client that has gone away needs no answer.
        let _ = append.answer.send(Ok(pb::ProduceResponse { results: vec![result] }));
        at += bytes;
        offset = offset.next();
    }
    Ok(())
}

struct Appender {
    appends: mpsc::Sender<Append>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn not_here<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("only Produce is served here"))
}

#[tonic::async_trait]
impl Log for Appender {
    type ProduceStream = UnboundedReceiverStream<Result<pb::ProduceResponse, Status>>;
    type FetchStream = Answers<pb::FetchResponse>;
    type WatchMetadataStream = Answers<pb::MetadataUpdate>;

    async fn produce(
        &self,
        request: Request<Streaming<pb::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        let mut requests = request.into_inner();
        let appends = self.appends.clone();
        let (answer, answers) = async_mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                let append = Append { request_id: request.request_id, batch: request.batch, answer: answer.clone() };
                if appends.send(append).is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(answers)))
    }

    async fn fetch(
        &self,
        _request: Request<Streaming<pb::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        not_here()
    }

    async fn metadata(&self, _request: Request<pb::MetadataRequest>) -> Result<Response<pb::MetadataResponse>, Status> {
        not_here()
    }

    async fn watch_metadata(
        &self,
        _request: Request<pb::WatchMetadataRequest>,
    ) -> Result<Response<Self::WatchMetadataStream>, Status> {
        not_here()
    }

    async fn list_offsets(
        &self,
        _request: Request<pb::ListOffsetsRequest>,
    ) -> Result<Response<pb::ListOffsetsResponse>, Status> {
        not_here()
    }

    async fn init_producer(
        &self,
        _request: Request<pb::InitProducerRequest>,
    ) -> Result<Response<pb::InitProducerResponse>, Status> {
        not_here()
    }
}
