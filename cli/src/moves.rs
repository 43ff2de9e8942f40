//! Replicas on the move: what is planned, how far it is, and the wait for its end.

use crate::failure::{Failure, Outcome};
use crate::output::{self, Row};
use crate::stdio::say;
use flowstone_client::{Admin, MoveDescription, PlannedMove};
use indicatif::ProgressBar;
use std::time::Duration;

/// Time between two looks at moves that are under way.
const LOOK_EVERY: Duration = Duration::from_millis(300);

impl Row for PlannedMove {
    const HEADINGS: &'static [&'static str] = &["TOPIC", "PARTITION", "FROM", "TO", "SIZE", "BYTES"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        vec![
            self.topic.clone(),
            self.partition.to_string(),
            output::numbers(&self.from),
            output::numbers(&self.to),
            output::bytes(self.bytes),
            self.bytes.to_string(),
        ]
    }

    fn name(&self) -> String {
        format!("{}/{}", self.topic, self.partition)
    }
}

impl Row for MoveDescription {
    const HEADINGS: &'static [&'static str] = &["TOPIC", "PARTITION", "ADDING", "REMOVING", "DONE", "OF", "STATE"];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        vec![
            self.topic.clone(),
            self.partition.to_string(),
            output::numbers(&self.adding),
            output::numbers(&self.removing),
            output::bytes(self.bytes_done),
            output::bytes(self.bytes_total),
            self.state.clone(),
        ]
    }

    fn name(&self) -> String {
        format!("{}/{}", self.topic, self.partition)
    }
}

/// What is waited for.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    /// These partitions are no longer on the move.
    pub(crate) moves: &'a [PlannedMove],
    /// This broker holds no replica any more.
    pub(crate) empty: Option<i32>,
}

impl Wanted<'_> {
    fn concerns(&self, moving: &MoveDescription) -> bool {
        let planned = |planned: &PlannedMove| planned.topic == moving.topic && planned.partition == moving.partition;
        self.moves.iter().any(planned) || self.empty.is_some_and(|broker| moving.removing.contains(&broker))
    }
}

/// Waits for the end of moves, however long that takes, and tells how far they are, on a terminal. They go on when the
/// wait is cut short.
pub(crate) async fn wait(admin: &Admin, wanted: &Wanted<'_>) -> Outcome {
    let bar = ProgressBar::new_spinner();
    let waited = tokio::select! {
        waited = until_done(admin, wanted, &bar) => waited,
        _ = tokio::signal::ctrl_c() => Err(Failure::failed(
            "no longer waiting; the moves go on: `flowstone partition list --moving` shows them",
        )),
    };
    bar.finish_and_clear();
    waited
}

async fn until_done(admin: &Admin, wanted: &Wanted<'_>, bar: &ProgressBar) -> Outcome {
    loop {
        let moving: Vec<MoveDescription> =
            admin.list_moves().await?.into_iter().filter(|moving| wanted.concerns(moving)).collect();
        let left = match wanted.empty {
            None => 0,
            Some(id) => {
                let health = admin.cluster_health().await?;
                health.brokers.iter().find(|broker| broker.id == id).map_or(0, |broker| broker.replicas)
            }
        };
        if moving.is_empty() && left == 0 {
            return Ok(());
        }
        let done: u64 = moving.iter().map(|moving| moving.bytes_done).sum();
        let total: u64 = moving.iter().map(|moving| moving.bytes_total).sum();
        let partitions = moving.len();
        let (done, total) = (output::bytes(done), output::bytes(total));
        let rest = if left > 0 { format!(", {left} replicas left on the broker") } else { String::new() };
        bar.set_message(format!("{partitions} partitions on the move, {done} of {total}{rest}"));
        bar.tick();
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// A plan that is only shown.
pub(crate) fn tell_plan(moves: &[PlannedMove]) {
    let bytes: u64 = moves.iter().map(|planned| planned.bytes).sum();
    say(format_args!("{} partitions would move, {} each way at most", moves.len(), output::bytes(bytes)));
}
