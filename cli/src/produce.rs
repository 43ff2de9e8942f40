//! `flowstone produce`: lines in, records out, and a word for every record that was not acknowledged.

use crate::args::{Common, key_value};
use crate::broker::StopSignals;
use crate::connect::connect;
use crate::escape::unescape;
use crate::failure::{Exit, Failure, Outcome, chain, exit_of};
use crate::lines::{Chunk, Lines};
use crate::output::{self, Format};
use crate::stdio::say;
use crate::{moment, record_json, template};
use clap::{Args, ValueEnum};
use flowstone_client::{Ack, Acks, Compression, ErrorCode, Producer, Record, RecordMetadata, Transaction};
use futures::FutureExt;
use indicatif::ProgressBar;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Chunks read ahead of the producer.
const CHUNKS_AHEAD: usize = 4;
/// How often acknowledgements are looked at while no input comes. Waiting for one instead would send its batch
/// before it is full.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Write records: every line of a file or of stdin is one
#[derive(Args, Debug)]
pub(crate) struct ProduceArgs {
    /// The topic
    topic: String,

    /// Split each line at the first of these: key before it, value after it. \t, \n and \xNN are understood. A
    /// line without it has a null key
    #[arg(short, long = "key-delimiter", value_name = "DELIM", value_parser = delimiter)]
    key_delimiter: Option<Delimiter>,

    /// The partition; else the key decides, and records without one fill one partition after the other
    #[arg(short, long, value_parser = clap::value_parser!(i32).range(0..))]
    partition: Option<i32>,

    /// A header of every record
    #[arg(short = 'H', long = "header", value_name = "KEY=VALUE", value_parser = key_value)]
    headers: Vec<(String, String)>,

    /// When a record counts as written: never told, on the leader's disk, on the disks of a majority
    #[arg(long, value_enum, default_value_t)]
    acks: AcksArg,

    /// How batches are compressed
    #[arg(long, value_enum, default_value_t)]
    compression: CompressionArg,

    /// Store each record once, whatever has to be sent again; needs --acks quorum
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    idempotent: Option<bool>,

    /// Store the whole input as one transaction under this id: readers of committed records get all of it or nothing. Who
    /// used the id before is cut off
    #[arg(long, value_name = "ID")]
    transactional_id: Option<String>,

    /// How long the transaction may stay open before the cluster aborts it
    #[arg(long, value_name = "SPAN", default_value = "5m", value_parser = moment::parse_span, requires = "transactional_id")]
    transaction_timeout: Duration,

    /// What a line is: a value, or a record as `consume -o json` writes it. Of such a record, key, value, headers
    /// and timestamp are taken; topic, partition and offset are not
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    input: InputForm,

    /// The file; stdin without one
    file: Option<PathBuf>,
}

/// The value of `--acks`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum AcksArg {
    /// Nothing is told, errors included.
    None,
    /// The leader has it.
    Leader,
    /// A majority has it.
    #[default]
    Quorum,
}

impl AcksArg {
    pub(crate) fn to_client(self) -> Acks {
        match self {
            AcksArg::None => Acks::None,
            AcksArg::Leader => Acks::Leader,
            AcksArg::Quorum => Acks::Quorum,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            AcksArg::None => "none",
            AcksArg::Leader => "leader",
            AcksArg::Quorum => "quorum",
        }
    }
}

/// The value of `--compression`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompressionArg {
    #[default]
    None,
    Gzip,
    Snappy,
    Lz4,
    Zstd,
}

impl CompressionArg {
    pub(crate) fn to_client(self) -> Compression {
        match self {
            CompressionArg::None => Compression::None,
            CompressionArg::Gzip => Compression::Gzip,
            CompressionArg::Snappy => Compression::Snappy,
            CompressionArg::Lz4 => Compression::Lz4,
            CompressionArg::Zstd => Compression::Zstd,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum InputForm {
    #[default]
    Lines,
    Json,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Delimiter(Vec<u8>);

fn delimiter(text: &str) -> Result<Delimiter, String> {
    let bytes = unescape(text)?;
    if bytes.is_empty() { Err("the delimiter is empty".to_owned()) } else { Ok(Delimiter(bytes)) }
}

impl Delimiter {
    fn split<'a>(&self, line: &'a [u8]) -> (Option<&'a [u8]>, &'a [u8]) {
        match memchr::memmem::find(line, &self.0) {
            Some(at) => (Some(&line[..at]), &line[at + self.0.len()..]),
            None => (None, line),
        }
    }
}

pub(crate) async fn run(args: ProduceArgs, common: &Common) -> Outcome {
    let idempotent = check(&args, common)?;
    // From here on: an interrupted transaction is aborted, and holds nobody up until its timeout.
    let mut signals = StopSignals::new()?;
    let input = open(args.file.as_deref())?;
    let client = connect(common).await?;
    check_place(&client, &args).await?;
    let producer = client
        .producer()
        .acks(args.acks.to_client())
        .idempotent(idempotent)
        .compression(args.compression.to_client())
        .delivery_timeout(common.timeout);
    let began = Instant::now();
    let Some(id) = &args.transactional_id else {
        let producer = producer.build().await?;
        let (sent, end) = produce(&Sink::Plain(&producer), &args, common, input, &mut signals).await;
        // With `--acks none` only the end of the stream says that the broker has it; failures are told above.
        let _ = producer.close(common.timeout).await;
        return sent.finish(end, &args.topic, began.elapsed());
    };
    let mut producer = producer.transactional_id(id).transaction_timeout(args.transaction_timeout).build().await?;
    let transaction = producer.begin().await?;
    let (sent, end) = produce(&Sink::Transaction(&transaction), &args, common, input, &mut signals).await;
    let whole = matches!(end, End::Input) && sent.is_whole();
    let ended = if whole { transaction.commit().await } else { transaction.abort().await };
    // Its failures are told below, or are those of an end that is decided.
    let _ = producer.close(common.timeout).await;
    match (whole, ended) {
        (true, Ok(())) => sent.finish(end, &args.topic, began.elapsed()),
        (true, Err(error)) => Err(Failure::from(error).context("the transaction was not committed")),
        (false, ended) => {
            let fate = match ended {
                Ok(()) => "the transaction was aborted, nothing of it counts".to_owned(),
                Err(error) => format!("the transaction is not committed, and its abort failed ({error})"),
            };
            let told = sent.finish(end, &args.topic, began.elapsed());
            Err(told.err().unwrap_or_else(|| Failure::failed("interrupted")).context(fate))
        }
    }
}

/// Where records go.
enum Sink<'a> {
    Plain(&'a Producer),
    Transaction(&'a Transaction<'a>),
}

impl Sink<'_> {
    async fn send(&self, record: Record<'_>) -> flowstone_client::Result<Ack> {
        match self {
            Self::Plain(producer) => producer.send(record).await,
            Self::Transaction(transaction) => transaction.send(record).await,
        }
    }

    async fn flush(&self) -> flowstone_client::Result<()> {
        match self {
            Self::Plain(producer) => producer.flush().await,
            Self::Transaction(transaction) => transaction.flush().await,
        }
    }
}

/// Sends the input, and waits for what became of it.
async fn produce(
    sink: &Sink<'_>,
    args: &ProduceArgs,
    common: &Common,
    input: Input,
    signals: &mut StopSignals,
) -> (Sent, End) {
    let mut sent = Sent::new(common.output == Format::Json);
    let mut chunks = read_ahead(input);
    let bar = progress();
    let end = loop {
        let chunk = tokio::select! {
            biased;
            () = signals.next() => break End::Interrupted,
            chunk = chunks.recv() => chunk,
            () = tokio::time::sleep(LOOK_INTERVAL), if !sent.pending.is_empty() => {
                sent.look();
                if sent.hopeless {
                    break End::Hopeless;
                }
                continue;
            }
        };
        match chunk {
            None => break End::Input,
            Some(Err(error)) => break End::Unreadable(error),
            Some(Ok(chunk)) => {
                // Waiting for room in the producer's buffer is where a stuck broker is waited for.
                let fed = tokio::select! {
                    biased;
                    () = signals.next() => break End::Interrupted,
                    fed = feed(sink, args, &chunk, &mut sent) => fed,
                };
                if let Err(error) = fed {
                    break End::Unreadable(error);
                }
            }
        }
        sent.look();
        bar.set_message(format!("{} records acknowledged", sent.acknowledged));
        if sent.hopeless {
            break End::Hopeless;
        }
    };
    if matches!(end, End::Interrupted) {
        // What was sent is given its time; who has none says so again.
        tokio::select! {
            () = sent.settle(sink) => {}
            () = signals.again() => sent.look(),
        }
    } else {
        tokio::select! {
            () = sent.settle(sink) => {}
            () = signals.next() => {
                sent.look();
                bar.finish_and_clear();
                return (sent, End::Interrupted);
            }
        }
    }
    bar.finish_and_clear();
    (sent, end)
}

/// What clap cannot check; whether the producer is idempotent.
fn check(args: &ProduceArgs, common: &Common) -> Outcome<bool> {
    if args.key_delimiter.is_some() && args.input == InputForm::Json {
        return Err(Failure::usage("-k splits lines; records of --input json have their keys"));
    }
    if !matches!(common.output, Format::Table | Format::Json) {
        return Err(Failure::usage("produce prints nothing, or with -o json what was acknowledged; leave -o out"));
    }
    let quorum = args.acks == AcksArg::Quorum;
    if args.transactional_id.is_some() && (!quorum || args.idempotent == Some(false)) {
        return Err(Failure::usage(
            "a transaction needs --acks quorum and idempotence; leave --acks and --idempotent out",
        ));
    }
    match args.idempotent {
        Some(true) if !quorum => Err(Failure::usage(format!(
            "--idempotent=true needs --acks quorum, not {}; leave one of them out",
            args.acks.name()
        ))),
        None if !quorum => {
            say(format_args!(
                "warning: with --acks {} the producer is not idempotent: a record may be stored twice; \
                 --idempotent=false silences this",
                args.acks.name()
            ));
            Ok(false)
        }
        given => Ok(given.unwrap_or(true)),
    }
}

/// The topic and the partition are there: told before anything is read.
async fn check_place(client: &flowstone_client::Client, args: &ProduceArgs) -> Outcome {
    let partitions = client.partition_count(&args.topic).await?;
    match args.partition {
        Some(partition) if partition >= partitions => Err(Failure::new(
            Exit::NotFound,
            format!("{} has no partition {partition}; it has 0 to {}", args.topic, partitions - 1),
        )),
        _ => Ok(()),
    }
}

/// Where lines come from.
struct Input {
    name: String,
    reader: Box<dyn Read + Send>,
}

fn open(file: Option<&Path>) -> Outcome<Input> {
    let Some(path) = file else {
        return Ok(Input { name: "stdin".to_owned(), reader: Box::new(io::stdin()) });
    };
    let name = path.display().to_string();
    let file = File::open(path)
        .map_err(|error| Failure::failed(format!("cannot read {name}: {error}; check the path and its permissions")))?;
    Ok(Input { name, reader: Box::new(file) })
}

/// Reads on a thread of its own: a read of a terminal or a pipe may take for ever, and cannot be called off.
fn read_ahead(input: Input) -> mpsc::Receiver<Result<Chunk, String>> {
    let (chunks, receiver) = mpsc::channel(CHUNKS_AHEAD);
    std::thread::spawn(move || {
        let mut lines = Lines::new(input.reader);
        loop {
            let chunk = match lines.next_chunk() {
                Ok(Some(chunk)) => Ok(chunk),
                Ok(None) => return,
                Err(error) => Err(format!("cannot read {}: {error}", input.name)),
            };
            let failed = chunk.is_err();
            if chunks.blocking_send(chunk).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

/// A bar on a terminal that does not also show what is typed.
fn progress() -> ProgressBar {
    if io::stdin().is_terminal() { ProgressBar::hidden() } else { ProgressBar::new_spinner() }
}

/// Sends every line of a chunk.
///
/// # Errors
/// A line that is no record.
async fn feed(sink: &Sink<'_>, args: &ProduceArgs, chunk: &Chunk, sent: &mut Sent) -> Result<(), String> {
    for line in chunk.lines() {
        sent.line += 1;
        let mut record = Record::to(&args.topic);
        // Outlives the record, which borrows it.
        let parsed;
        match (args.input, &args.key_delimiter) {
            (InputForm::Lines, None) => record = record.value(line),
            (InputForm::Lines, Some(delimiter)) => {
                let (key, value) = delimiter.split(line);
                record = record.key(key).value(value);
            }
            (InputForm::Json, _) if line.iter().all(u8::is_ascii_whitespace) => continue,
            (InputForm::Json, _) => {
                parsed = record_json::parse(line).map_err(|error| format!("line {}: {error}", sent.line))?;
                record = record.key(parsed.key.as_ref()).value(parsed.value.as_ref());
                for (key, value) in &parsed.headers {
                    record = record.header(key, value.as_ref());
                }
                if let Some(timestamp) = parsed.timestamp {
                    record = record.timestamp_millis(timestamp);
                }
            }
        }
        if let Some(partition) = args.partition {
            record = record.partition(partition);
        }
        for (key, value) in &args.headers {
            record = record.header(key.as_str(), value.as_str());
        }
        let bytes = record.value_bytes().map_or(0, <[u8]>::len);
        match sink.send(record).await {
            Ok(ack) => sent.pending.push_back(Pending { ack, line: sent.line, bytes }),
            Err(error) => sent.failed(sent.line, &error),
        }
        if sent.hopeless {
            return Ok(());
        }
    }
    Ok(())
}

/// How reading ended.
#[derive(Debug)]
enum End {
    Input,
    Interrupted,
    Unreadable(String),
    /// A failure that every further record would share.
    Hopeless,
}

#[derive(Debug)]
struct Pending {
    ack: Ack,
    line: u64,
    bytes: usize,
}

/// What was sent, and what became of it.
#[derive(Debug)]
struct Sent {
    line: u64,
    /// In the order in which they were sent. The producer's buffer bounds how many can be unacknowledged.
    pending: VecDeque<Pending>,
    acknowledged: u64,
    bytes: u64,
    failures: Vec<Failed>,
    hopeless: bool,
    /// Prints what is acknowledged, until whoever reads it has gone.
    printing: bool,
    printed: Vec<u8>,
}

/// Records that failed for one reason.
#[derive(Debug)]
struct Failed {
    code: ErrorCode,
    exit: Exit,
    line: u64,
    records: u64,
    message: String,
}

impl Sent {
    fn new(printing: bool) -> Self {
        Sent {
            line: 0,
            pending: VecDeque::new(),
            acknowledged: 0,
            bytes: 0,
            failures: Vec::new(),
            hopeless: false,
            printing,
            printed: Vec::new(),
        }
    }

    /// Takes what is acknowledged from the front, waiting for nothing.
    fn look(&mut self) {
        while self.pending.front().is_some_and(|pending| pending.ack.is_done()) {
            if let Some(Pending { ack, line, bytes }) = self.pending.pop_front()
                && let Some(result) = ack.now_or_never()
            {
                self.settled(line, bytes, result);
            }
        }
        self.print();
    }

    /// Waits for all that was sent.
    async fn settle(&mut self, sink: &Sink<'_>) {
        // What failed is told by the records' own acknowledgements.
        let _ = sink.flush().await;
        while let Some(pending) = self.pending.front_mut() {
            let result = (&mut pending.ack).await;
            let (line, bytes) = (pending.line, pending.bytes);
            self.pending.pop_front();
            self.settled(line, bytes, result);
        }
        self.print();
    }

    fn settled(&mut self, line: u64, bytes: usize, result: flowstone_client::Result<RecordMetadata>) {
        match result {
            Ok(at) => {
                self.acknowledged += 1;
                self.bytes += bytes as u64;
                if self.printing {
                    // A topic's name needs no escapes.
                    self.printed.extend_from_slice(b"{\"topic\":\"");
                    self.printed.extend_from_slice(at.topic.as_bytes());
                    self.printed.extend_from_slice(b"\",\"partition\":");
                    template::number(&mut self.printed, i64::from(at.partition));
                    self.printed.extend_from_slice(b",\"offset\":");
                    template::number(&mut self.printed, at.offset);
                    self.printed.extend_from_slice(b",\"timestamp\":");
                    template::number(&mut self.printed, at.timestamp);
                    self.printed.extend_from_slice(b"}\n");
                }
            }
            Err(error) => self.failed(line, &error),
        }
    }

    fn failed(&mut self, line: u64, error: &flowstone_client::Error) {
        self.hopeless |= !is_of_one_record(error.code());
        match self.failures.iter_mut().find(|failed| failed.code == error.code()) {
            Some(failed) => failed.records += 1,
            None => self.failures.push(Failed {
                code: error.code(),
                exit: exit_of(error),
                line,
                records: 1,
                message: chain(error),
            }),
        }
    }

    /// Whether everything sent is acknowledged.
    fn is_whole(&self) -> bool {
        self.pending.is_empty() && self.failures.is_empty()
    }

    fn print(&mut self) {
        if !self.printed.is_empty() {
            let mut out = io::stdout().lock();
            // Records are worth more than the word about them: it goes on without.
            self.printing = out.write_all(&self.printed).and_then(|()| out.flush()).is_ok();
            self.printed.clear();
        }
    }

    /// The summary, and the failure if there is one.
    fn finish(self, end: End, topic: &str, took: Duration) -> Outcome {
        let seconds = took.as_secs_f64();
        say(format_args!(
            "produced {} {} ({}) to {topic} in {seconds:.2} s",
            self.acknowledged,
            records(self.acknowledged),
            output::bytes(self.bytes),
        ));
        let unknown = self.pending.len() as u64;
        let failed = unknown + self.failures.iter().map(|failed| failed.records).sum::<u64>();
        let mut exit = self.failures.first().map_or(Exit::Failed, |failed| failed.exit);
        let mut said = Vec::new();
        match end {
            End::Interrupted => said.push("interrupted".to_owned()),
            End::Unreadable(error) => {
                exit = Exit::Failed;
                said.push(error);
            }
            End::Hopeless => said.push(format!("stopped at line {}", self.line)),
            End::Input => {}
        }
        if failed > 0 {
            said.push(format!("{failed} {} not acknowledged", if failed == 1 { "record was" } else { "records were" }));
        }
        for failed in &self.failures {
            let more = match failed.records {
                1 => String::new(),
                count => format!(" and {} more", count - 1),
            };
            said.push(format!("line {}{more}: {}", failed.line, failed.message));
        }
        if said.is_empty() { Ok(()) } else { Err(Failure::new(exit, said.join("; "))) }
    }
}

fn records(count: u64) -> &'static str {
    if count == 1 { "record" } else { "records" }
}

/// Whether an error is about one record, so that the next may do better.
fn is_of_one_record(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::MessageTooLarge
            | ErrorCode::BatchTooLarge
            | ErrorCode::InvalidRecord
            | ErrorCode::InvalidTimestamp
            | ErrorCode::CorruptBatch
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_split_at_the_first_delimiter() {
        let tab = delimiter("\\t").expect("valid");
        assert_eq!(tab.split(b"k\tv\tw"), (Some(&b"k"[..]), &b"v\tw"[..]));
        assert_eq!(tab.split(b"\tv"), (Some(&b""[..]), &b"v"[..]));
        assert_eq!(tab.split(b"no key"), (None, &b"no key"[..]));
        assert_eq!(delimiter("::").expect("valid").split(b"a:b::c"), (Some(&b"a:b"[..]), &b"c"[..]));
        assert!(delimiter("").is_err());
    }
}
