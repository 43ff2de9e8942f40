//! `flowstone consume`.

mod group;

use crate::args::Common;
use crate::connect::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::output::Format;
use crate::position::{From, Until};
use crate::record_view::RecordView;
use crate::stdio::stdout_closed;
use crate::template::Template;
use crate::{moment, record_json};
use clap::{Args, ValueEnum};
use flowstone_client::{Client, Consumer, Isolation, OffsetSpec, RecordBatch, RecordRef, StartAt, StopAt};
use futures::FutureExt;
use std::io::{self, Write};

/// Printed at once where more is at hand.
const PRINT_BYTES: usize = 256 << 10;

/// Read records: values, one a line
#[derive(Args, Debug)]
pub(crate) struct ConsumeArgs {
    /// The topics
    #[arg(required = true, value_name = "TOPIC")]
    topics: Vec<String>,

    /// Only this partition of each topic; may be given several times
    #[arg(short, long = "partition", value_name = "PARTITION", value_parser = clap::value_parser!(i32).range(0..))]
    partitions: Vec<i32>,

    /// As a member of this group: shares the partitions with its other members, and goes on where the group is. What was
    /// printed is what is committed
    #[arg(short, long)]
    group: Option<String>,

    /// Where to begin, with -g where nothing is committed: start, end, an offset, -N (the last N of each partition), @TIME (RFC 3339, milliseconds since
    /// 1970, or a span before now as in @-1h)
    #[arg(long, value_name = "POSITION", default_value = "start", allow_hyphen_values = true)]
    from: From,

    /// Where to stop, without the record there: end, an offset, @TIME
    #[arg(long, value_name = "POSITION", conflicts_with = "to_end")]
    until: Option<Until>,

    /// Stop after so many records, over all partitions
    #[arg(short = 'n', long = "count", value_name = "COUNT")]
    count: Option<u64>,

    /// Stop at the ends as they are now
    #[arg(short = 'e', long = "to-end")]
    to_end: bool,

    /// Read from a broker in this rack where one has a replica, rather than from the leader
    #[arg(long, value_name = "RACK")]
    rack: Option<String>,

    /// Which records of transactions to read
    #[arg(long, value_enum, value_name = "LEVEL", default_value_t)]
    isolation: IsolationArg,

    /// What to print of a record: %t topic, %p partition, %o offset, %k key, %v value, %h headers, %T timestamp in
    /// ms, %% and \n \t \xNN. No line end is added
    #[arg(short, long, value_name = "TEMPLATE")]
    format: Option<Template>,
}

/// The value of `--isolation`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum IsolationArg {
    /// Records of committed transactions, and those without one.
    #[default]
    ReadCommitted,
    /// Those of open and aborted transactions too.
    ReadUncommitted,
}

impl IsolationArg {
    fn to_client(self) -> Isolation {
        match self {
            Self::ReadCommitted => Isolation::ReadCommitted,
            Self::ReadUncommitted => Isolation::ReadUncommitted,
        }
    }

    fn is_committed(self) -> bool {
        self == Self::ReadCommitted
    }
}

/// What is printed of a record.
#[derive(Debug)]
enum Form {
    Value,
    Json,
    Template(Template),
}

impl Form {
    fn render(&self, record: RecordRef<'_>, out: &mut Vec<u8>) {
        match self {
            Form::Value => {
                out.extend_from_slice(record.value_bytes().unwrap_or_default());
                out.push(b'\n');
            }
            Form::Json => record_json::write(&RecordView::from(record), out),
            Form::Template(template) => template.render(&RecordView::from(record), out),
        }
    }
}

pub(crate) async fn run(args: ConsumeArgs, common: &Common) -> Outcome {
    let form = match (args.format.clone(), common.output) {
        (Some(_), Format::Json) => return Err(Failure::usage("-f and -o json exclude each other")),
        (Some(template), Format::Table) => Form::Template(template),
        (None, Format::Table) => Form::Value,
        (None, Format::Json) => Form::Json,
        _ => return Err(Failure::usage("consume prints values, -o json or -f TEMPLATE")),
    };
    let client = connect(common).await?;
    let all_there = args.to_end || args.until == Some(Until::End);
    let printing = Printing { form, left: args.count, printed: Vec::new() };
    if let Some(group) = &args.group {
        return group::run(&client, &args, group, printing, common).await;
    }
    let consumer = build(&client, &args).await?;
    tokio::select! {
        biased;
        // The ordinary end of reading without one; elsewhere the rest is missing.
        _ = tokio::signal::ctrl_c() => match (args.count, args.until, args.to_end) {
            (None, None, false) => Ok(()),
            _ => Err(Failure::failed("interrupted before the end")),
        },
        () = stdout_closed() => Err(Failure::OutputClosed),
        done = print_all(consumer, printing, all_there.then_some(common)) => done,
    }
}

async fn build(client: &Client, args: &ConsumeArgs) -> Outcome<Consumer> {
    let mut consumer = client
        .consumer()
        .start_at(match args.from {
            From::Start => StartAt::Earliest,
            From::End => StartAt::Latest,
            From::Offset(offset) => StartAt::Offset(offset),
            From::Last(records) => StartAt::FromEnd(records),
            From::Time(ms) => StartAt::Timestamp(ms),
        })
        .stop_at(match args.until {
            None if args.to_end => StopAt::End,
            None => StopAt::Never,
            Some(Until::End) => StopAt::End,
            Some(Until::Offset(offset)) => StopAt::Offset(offset),
            Some(Until::Time(ms)) => StopAt::Timestamp(ms),
        });
    consumer = consumer.isolation(args.isolation.to_client());
    if let Some(rack) = &args.rack {
        consumer = consumer.rack(rack);
    }
    let mut places = Vec::new();
    for topic in &args.topics {
        if args.partitions.is_empty() {
            consumer = consumer.topic(topic);
            places.extend((0..client.partition_count(topic).await?).map(|partition| (topic, partition)));
        }
        for partition in &args.partitions {
            consumer = consumer.partition(topic, *partition);
            places.push((topic, *partition));
        }
    }
    if let From::Offset(offset) = args.from {
        // Beyond the end it would wait, or with an end before it be done: neither is what was meant.
        let queries: Vec<_> =
            places.iter().map(|(topic, number)| (topic.as_str(), *number, OffsetSpec::Start)).collect();
        for place in client.admin().list_offsets(&queries).await? {
            if !(place.log_start..=place.high_watermark).contains(&offset) {
                return Err(Failure::failed(format!(
                    "offset {offset} is out of range: {}/{} has {} to {}; choose one of these, or --from start, end, -N, @TIME",
                    place.topic, place.partition, place.log_start, place.high_watermark
                )));
            }
        }
    }
    Ok(consumer.build().await?)
}

/// Prints until the consumer is where it should stop.
///
/// With `within`, everything wanted is there already: nothing coming for the timeout is a broker that does not
/// answer. Else silence may be just that.
async fn print_all(mut consumer: Consumer, mut printing: Printing, within: Option<&Common>) -> Outcome {
    while printing.left != Some(0) {
        let batch = match consumer.next_batch().now_or_never() {
            Some(batch) => batch,
            None => {
                // Nothing at hand: what there is goes out before waiting.
                printing.flush()?;
                match within {
                    None => consumer.next_batch().await,
                    Some(common) => {
                        tokio::time::timeout(common.timeout, consumer.next_batch()).await.map_err(|_| {
                            Failure::new(
                                Exit::Unreachable,
                                format!(
                                    "nothing came from {} for {}; is the broker there? --timeout waits longer",
                                    common.server,
                                    moment::span(i64::try_from(common.timeout.as_millis()).unwrap_or(i64::MAX))
                                ),
                            )
                        })?
                    }
                }
            }
        };
        match batch {
            None => break,
            Some(batch) => {
                let batch = batch.map_err(|error| {
                    // What came before it is printed all the same.
                    printing.flush().err().unwrap_or_else(|| Failure::from(error))
                })?;
                printing.take(&batch)?;
            }
        }
    }
    printing.flush()
}

#[derive(Debug)]
struct Printing {
    form: Form,
    /// Records still wanted; without a number, all.
    left: Option<u64>,
    printed: Vec<u8>,
}

impl Printing {
    fn take(&mut self, batch: &RecordBatch) -> Outcome {
        self.take_until(batch, i64::MAX).map(drop)
    }

    /// Prints what is wanted of a batch, up to this offset; the next offset, where something of it is left.
    fn take_until(&mut self, batch: &RecordBatch, until: i64) -> Outcome<Option<i64>> {
        for record in batch {
            if self.left == Some(0) || record.offset() >= until {
                return Ok(Some(record.offset()));
            }
            self.left = self.left.map(|left| left - 1);
            self.form.render(record, &mut self.printed);
            if self.printed.len() >= PRINT_BYTES {
                self.flush()?;
            }
        }
        Ok(None)
    }

    fn flush(&mut self) -> Outcome {
        if self.printed.is_empty() {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(&self.printed).and_then(|()| out.flush()).map_err(Failure::from_stdout)?;
        self.printed.clear();
        Ok(())
    }
}
