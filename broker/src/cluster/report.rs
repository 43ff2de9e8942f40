//! How replicas are, as each broker tells of its own, and how the brokers are asked for that.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use flowstone_protocol::peer::{MemberReport, ReplicaReport, ReportRequest, ReportResponse};
use flowstone_protocol::{BrokerId, Error, ErrorCode, TopicId, TopicPartition};
use flowstone_replication::{Health, Role};
use futures::{StreamExt, stream};

use super::calls::partition;
use super::drive::group;
use crate::controller::change::Place;
use crate::node::Node;
use crate::partition::{OpenPartition, Slot};

/// A broker that does not report within this is left out.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// A replica that does not tell of its group within this is reported without: one sick disk is not all of a broker.
const GROUP_MAX: Duration = Duration::from_millis(200);
/// Roles of replicas that take no part.
const OPENING: &str = "opening";
const PULLING: &str = "pulling";
const FAILED: &str = "failed";
/// Groups that are asked side by side.
const AT_ONCE: usize = 64;

/// The replicas here, of these topics or of all.
pub(crate) async fn of_this_broker(node: &Node, topics: &[TopicId]) -> ReportResponse {
    let wanted: HashSet<TopicId> = topics.iter().copied().collect();
    let slots = node.replicas.all().into_iter().filter(|(tp, _)| wanted.is_empty() || wanted.contains(&tp.topic));
    let replicas = stream::iter(slots)
        .map(|(tp, slot)| async move {
            match slot {
                Slot::Open(partition) => Some(of_replica(&partition).await),
                Slot::Failed(error) | Slot::Refused(error) => Some(ReplicaReport {
                    topic_id: tp.topic.to_bytes().to_vec().into(),
                    partition: tp.partition.get(),
                    role: FAILED.to_owned(),
                    error: Some(error.to_detail()),
                    ..ReplicaReport::default()
                }),
                Slot::Opening => None,
            }
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
    ReportResponse { replicas, disk_free_bytes: node.room.free_bytes(), disk_total_bytes: node.room.total_bytes() }
}

async fn of_replica(partition: &OpenPartition) -> ReplicaReport {
    let status = partition.replica.status();
    let mut report = ReplicaReport {
        topic_id: partition.tp.topic.to_bytes().to_vec().into(),
        partition: partition.tp.partition.get(),
        replica_id: partition.replica_id.get(),
        role: role(status.role).to_owned(),
        term: status.term.get(),
        log_start: status.log_start.get(),
        high_watermark: status.high_watermark.get(),
        end_offset: status.end_offset.get(),
        log_bytes: status.size_bytes,
        records: status.records,
        error: sickness(&status.health).map(|error| error.with_topic(&*partition.topic).to_detail()),
        members: Vec::new(),
        pulled_bytes: 0,
        pull_bytes_total: 0,
    };
    if !matches!(status.role, Role::Leader | Role::Pulling) {
        return report;
    }
    // It may have ended since: then there is nothing more to tell.
    if let Ok(Ok(view)) = tokio::time::timeout(GROUP_MAX, group(&partition.replica)).await {
        report.members = view
            .members
            .iter()
            .map(|member| MemberReport {
                replica_id: member.replica.get(),
                is_learner: member.is_learner,
                matched_index: member.matched.get(),
                is_active: member.is_active,
                in_sync: member.in_sync,
                lag_entries: member.lag_entries,
            })
            .collect();
        (report.pulled_bytes, report.pull_bytes_total) = view.pulled.unwrap_or_default();
    }
    report
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Opening => OPENING,
        Role::Follower => "follower",
        Role::Candidate => "candidate",
        Role::Elected => "elected",
        Role::Leader => "leader",
        Role::Learner => "learner",
        Role::Pulling => PULLING,
    }
}

/// What keeps a replica from its work.
pub(crate) fn sickness(health: &Health) -> Option<Error> {
    match health {
        Health::Ok => None,
        Health::DiskFull => Some(Error::new(
            ErrorCode::DiskFull,
            "there is no room on the disk: the partition is read-only until there is; free some, or lower retention",
        )),
        Health::Failed { message } => Some(Error::new(ErrorCode::StorageFailed, message.clone())),
        Health::Quarantined { message } => Some(Error::new(ErrorCode::Quarantined, message.clone())),
        Health::Lost { message, .. } => Some(Error::new(
            ErrorCode::Quarantined,
            format!("{message}; it is given a new replica by itself while the partition has a majority"),
        )),
    }
}

/// What brokers said of their replicas.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    pub(crate) by_broker: HashMap<BrokerId, ReportResponse>,
    /// They were asked, and did not answer.
    pub(crate) silent: Vec<BrokerId>,
}

impl Reports {
    /// Asks these brokers, side by side; who does not answer is not in it.
    pub(crate) async fn of(node: &Node, brokers: impl IntoIterator<Item = BrokerId>, topics: &[TopicId]) -> Self {
        // Those that are down say nothing, and asking them would only take time.
        let is_up =
            |broker: &BrokerId| node.table.with(|table| table.broker(*broker).is_some_and(|known| !known.fenced));
        let brokers: HashSet<BrokerId> =
            brokers.into_iter().filter(|broker| *broker == node.id || is_up(broker)).collect();
        let asked = brokers.into_iter().map(|broker| async move {
            if broker == node.id {
                return Ok((broker, of_this_broker(node, topics).await));
            }
            let request = ReportRequest {
                caller: None,
                topic_ids: topics.iter().map(|topic| topic.to_bytes().to_vec().into()).collect(),
            };
            match node.control.peers.report(broker, request, ANSWER_MAX).await {
                Ok(report) => Ok((broker, report)),
                Err(error) => {
                    tracing::debug!(%broker, %error, "a broker does not report");
                    Err(broker)
                }
            }
        });
        let mut reports = Self::default();
        for answer in futures::future::join_all(asked).await {
            match answer {
                Ok((broker, report)) => drop(reports.by_broker.insert(broker, report)),
                Err(broker) => reports.silent.push(broker),
            }
        }
        reports
    }

    /// Every replica that was reported.
    pub(crate) fn replicas(&self) -> impl Iterator<Item = (BrokerId, TopicPartition, &ReplicaReport)> {
        self.by_broker.iter().flat_map(|(broker, report)| {
            let rows = report.replicas.iter();
            rows.filter_map(|row| Some((*broker, partition(&row.topic_id, row.partition)?, row)))
        })
    }

    /// What each replica says of itself, to be looked up: there are very many.
    pub(crate) fn rows(&self) -> Rows<'_> {
        let rows = self.replicas().map(|(broker, tp, row)| ((broker, tp, row.replica_id), row)).collect();
        Rows { answered: &self.by_broker, rows }
    }

    /// By partition what its leader says: of several that say they lead the one of the latest term.
    pub(crate) fn leaders(&self) -> HashMap<TopicPartition, (BrokerId, &ReplicaReport)> {
        let mut leaders: HashMap<TopicPartition, (BrokerId, &ReplicaReport)> = HashMap::new();
        for (broker, tp, report) in self.replicas().filter(|(_, _, report)| report.role == "leader") {
            let known = leaders.entry(tp).or_insert((broker, report));
            if known.1.term < report.term {
                *known = (broker, report);
            }
        }
        leaders
    }
}

/// What replicas say of themselves; made by [`Reports::rows`].
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    answered: &'a HashMap<BrokerId, ReportResponse>,
    rows: HashMap<(BrokerId, TopicPartition, u64), &'a ReplicaReport>,
}

impl Rows<'_> {
    /// What the replica at this place says.
    pub(crate) fn of(&self, tp: TopicPartition, place: &Place) -> Option<&ReplicaReport> {
        self.rows.get(&(place.broker, tp, place.replica.get())).copied()
    }

    /// Whether the replica at this place takes no part, by its own broker's word: it is being opened or copied, or cannot
    /// go on. Its leader may not have noticed yet that it is not what it was before its broker was started again. Of a
    /// broker that did not answer nothing is known.
    pub(crate) fn is_away(&self, tp: TopicPartition, place: &Place) -> bool {
        let takes_part = |row: &ReplicaReport| !matches!(row.role.as_str(), OPENING | PULLING | FAILED);
        self.answered.contains_key(&place.broker) && !self.of(tp, place).is_some_and(takes_part)
    }
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::{DirectoryId, PartitionId, ReplicaId};

    use super::*;

    #[test]
    fn a_replica_is_away_where_its_own_broker_says_so() {
        let tp = TopicPartition { topic: TopicId::from_bytes([7; 16]), partition: PartitionId::new(0) };
        let place = |broker: i32, replica: u64| Place {
            broker: BrokerId::new(broker),
            directory: DirectoryId::from_bytes([1; 16]),
            replica: ReplicaId::new(replica),
        };
        let row = |replica_id: u64, role: Role| ReplicaReport {
            topic_id: tp.topic.to_bytes().to_vec().into(),
            replica_id,
            role: self::role(role).to_owned(),
            ..ReplicaReport::default()
        };
        let mut reports = Reports::default();
        let answer = |replicas| ReportResponse { replicas, ..ReportResponse::default() };
        reports.by_broker.insert(BrokerId::new(1), answer(vec![row(11, Role::Leader)]));
        reports.by_broker.insert(BrokerId::new(2), answer(vec![row(12, Role::Opening)]));
        reports.by_broker.insert(BrokerId::new(3), answer(vec![row(13, Role::Pulling)]));
        reports.by_broker.insert(BrokerId::new(4), answer(vec![row(14, Role::Follower)]));
        reports.silent.push(BrokerId::new(5));
        let rows = reports.rows();
        for (broker, replica, away) in
            [(1, 11, false), (2, 12, true), (3, 13, true), (4, 14, false), (4, 99, true), (5, 15, false)]
        {
            assert_eq!(rows.is_away(tp, &place(broker, replica)), away, "replica {replica} of broker {broker}");
        }
    }
}
