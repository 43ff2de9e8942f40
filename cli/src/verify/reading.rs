//! Readers that follow the end, readers that begin anywhere again and again, and whoever asks for the ends.

use super::{Log, Stop, Workbench, stopped};
use crate::connect::connect;
use crate::failure::Outcome;
use flowstone_checker::payload::NotAValue;
use flowstone_checker::{Isolation, Kind, Mark, Observed, ObserverId, Offset, ReaderId, View};
use flowstone_client::{Admin, Client, Consumer, ErrorCode, OffsetSpec, RecordBatch, StartAt};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Readers that follow the end, and what each is given of transactions.
const FOLLOWERS: [Isolation; 2] = [Isolation::ReadCommitted, Isolation::ReadUncommitted];
/// Records after which a reader that began anywhere begins elsewhere.
const REREAD_MAX: usize = 20_000;
/// Time after which it does, however little came.
const REREAD_FOR: Duration = Duration::from_secs(5);
/// Between two questions for the ends.
const ASK_INTERVAL: Duration = Duration::from_millis(50);
/// After an error.
const PAUSE: Duration = Duration::from_millis(200);

/// Starts them. Each ends when it is stopped.
pub(super) async fn start(bench: &Arc<Workbench>, stop: &Stop) -> Outcome<JoinSet<Outcome>> {
    let mut tasks = JoinSet::new();
    for isolation in FOLLOWERS {
        tasks.spawn(follow(bench.clone(), connect(&bench.common).await?, isolation, stop.clone()));
    }
    tasks.spawn(reread(bench.clone(), connect(&bench.common).await?, stop.clone()));
    tasks.spawn(ask(bench.clone(), connect(&bench.common).await?.admin(), stop.clone()));
    Ok(tasks)
}

/// A consumer, and how it stands in the history.
pub(super) struct Reading {
    bench: Arc<Workbench>,
    pub(super) consumer: Consumer,
    reader: ReaderId,
    observer: ObserverId,
}

impl Reading {
    /// Reads every partition from these offsets.
    pub(super) async fn begin(
        bench: &Arc<Workbench>,
        client: &Client,
        isolation: Isolation,
        from: impl Fn(&Log) -> i64,
    ) -> flowstone_client::Result<Reading> {
        let mut consumer = client.consumer().isolation(match isolation {
            Isolation::ReadCommitted => flowstone_client::Isolation::ReadCommitted,
            Isolation::ReadUncommitted => flowstone_client::Isolation::ReadUncommitted,
        });
        for log in &bench.logs {
            consumer = consumer.partition_at(&bench.topic, log.partition, StartAt::Offset(from(log)));
        }
        let consumer = consumer.build().await?;
        let mut history = bench.history();
        let (reader, observer) = (history.reader(isolation), history.observer());
        for log in &bench.logs {
            history.assigned(reader, log.id, Offset::new(from(log)));
        }
        drop(history);
        Ok(Reading { bench: bench.clone(), consumer, reader, observer })
    }

    /// Notes the next records; how many.
    ///
    /// # Errors
    /// What the consumer says; its partition goes on where it was.
    pub(super) async fn next(&mut self) -> flowstone_client::Result<usize> {
        match self.consumer.next_batch().await {
            Some(Ok(batch)) => {
                self.note(&batch);
                Ok(batch.len())
            }
            Some(Err(error)) => {
                self.note_error(&error);
                Err(error)
            }
            None => Ok(0),
        }
    }

    fn note(&self, batch: &RecordBatch) {
        let bench = &*self.bench;
        let Some(log) = bench.log(batch.partition()) else { return };
        // Decoded before the lock is taken: it takes longest.
        let observed: Vec<_> =
            batch.iter().map(|record| (record.offset(), observe(bench, record.value_bytes()))).collect();
        let mut history = bench.history();
        for (offset, observed) in observed {
            history.read(self.reader, log.id, Offset::new(offset), observed);
        }
        history.read_past(self.reader, log.id, Offset::new(batch.next_offset()));
        let asked = history.ask(log.id, Mark::HighWatermark, View::Session(self.observer));
        history.told(asked, Offset::new(batch.high_watermark()));
    }

    /// What no reader may be told who only ever read what was committed, and sets its partition going again.
    fn note_error(&mut self, error: &flowstone_client::Error) {
        let bench = self.bench.clone();
        let Some(log) = error.partition().and_then(|partition| bench.log(partition)) else { return };
        let Ok(position) = self.consumer.position(&bench.topic, log.partition) else { return };
        let promised = match error.code() {
            ErrorCode::LogDiverged => true,
            // Of a topic that others trim, it may be gone.
            ErrorCode::OffsetOutOfRange => !bench.shared_topic,
            // Damage that is detected is no anomaly, if the last reading finds it mended.
            _ => false,
        };
        if promised {
            let detail = format!("reader at offset {position}: {error}");
            bench.history().report(Kind::Regression, log.id, Some(Offset::new(position)), detail);
        }
        // It is a partition of this consumer, and no negative offset.
        let _ = self.consumer.seek(&bench.topic, log.partition, position);
    }
}

pub(super) fn observe(bench: &Workbench, value: Option<&[u8]>) -> Observed {
    match bench.run.decode(value.unwrap_or_default()) {
        Ok(value) => Observed::Value(value),
        Err(NotAValue::Foreign) if bench.shared_topic => Observed::Other,
        Err(NotAValue::Foreign) => Observed::Phantom(match value {
            None => "a record without a value".to_owned(),
            Some(bytes) => format!("a record of nobody: `{}`", bytes[..bytes.len().min(60)].escape_ascii()),
        }),
        Err(NotAValue::Damaged(what)) => Observed::Phantom(what),
    }
}

/// Reads from the beginning, and on at the end.
async fn follow(bench: Arc<Workbench>, client: Client, isolation: Isolation, mut stop: Stop) -> Outcome {
    let reading = async {
        loop {
            let Ok(mut reading) = Reading::begin(&bench, &client, isolation, |log| log.base).await else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            loop {
                if reading.next().await.is_err() {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = reading => {}
        () = stopped(&mut stop) => {}
    }
    Ok(())
}

/// Begins somewhere between the beginning and the end, again and again.
async fn reread(bench: Arc<Workbench>, client: Client, mut stop: Stop) -> Outcome {
    let mut random = bench.run.0;
    let reading = async {
        let mut ends: Vec<i64> = bench.logs.iter().map(|log| log.base).collect();
        loop {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let part = (random >> 33) as i64;
            let from = |log: &Log| log.base + part % (ends[log.partition as usize] - log.base + 1);
            let Ok(mut reading) = Reading::begin(&bench, &client, Isolation::ReadCommitted, from).await else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            let mut read = 0;
            let some = async {
                while read < REREAD_MAX {
                    match reading.next().await {
                        Ok(records) => read += records,
                        Err(_) => tokio::time::sleep(PAUSE).await,
                    }
                }
            };
            let _ = tokio::time::timeout(REREAD_FOR, some).await;
            for position in reading.consumer.positions() {
                let end = &mut ends[position.partition as usize];
                *end = position.offset.max(*end);
            }
        }
    };
    tokio::select! {
        () = reading => {}
        () = stopped(&mut stop) => {}
    }
    Ok(())
}

/// Asks for the ends all the while.
async fn ask(bench: Arc<Workbench>, admin: Admin, mut stop: Stop) -> Outcome {
    let asking = async {
        loop {
            // One by one: a partition without a leader does not keep the others from being asked for.
            for log in &bench.logs {
                let _ = end_of(&bench, &admin, log).await;
            }
            tokio::time::sleep(ASK_INTERVAL).await;
        }
    };
    tokio::select! {
        () = asking => {}
        () = stopped(&mut stop) => {}
    }
    Ok(())
}

/// Asks where a partition ends, linearizably, and notes the answer.
async fn end_of(bench: &Workbench, admin: &Admin, log: &Log) -> flowstone_client::Result<()> {
    let asked = {
        let history = bench.history();
        [Mark::HighWatermark, Mark::LogStart, Mark::LastStableOffset].map(|mark| history.ask(log.id, mark, View::Fresh))
    };
    let told = admin.list_offsets_linearizable(&[(&bench.topic, log.partition, OffsetSpec::End)]).await?;
    let Some(told) = told.first() else { return Ok(()) };
    let mut history = bench.history();
    let [end, start, stable] = asked;
    history.told(end, Offset::new(told.high_watermark));
    history.told(stable, Offset::new(told.last_stable_offset));
    history.told(start, Offset::new(told.log_start));
    if bench.shared_topic {
        history.trimmed(log.id, Offset::new(told.log_start));
    }
    Ok(())
}
