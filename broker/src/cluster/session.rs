//! This broker's session with the controller: it registers at each start, then says every half second that it lives, what
//! it leads, how far the changes of its groups are, and which of its replicas can never vote again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowstone_protocol::peer::{
    BrokerHeartbeatRequest, BrokerHeartbeatResponse, ForwardRequest, HelloRequest, LeaderRow, LostReplica,
    MoveProgress, RegisterRequest, RegisterResponse,
};
use flowstone_protocol::{BrokerId, Error, ErrorCode, LeaderEpoch, ReplicaId, TopicPartition};
use flowstone_replication::{Health, Role};
use futures::future::BoxFuture;
use prost::Message;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::calls::Calls;
use super::control::{Again, Control};
use super::drive::Led;
use crate::admin_http::Readiness;
use crate::controller::change::{Leader, PartitionEntry};
use crate::controller::table::MetadataTable;
use crate::partition::{LocalReplicas, OpenPartition, Slot};
use crate::peer::is_unanswered;
use crate::room::Room;
use crate::server::Gate;
use crate::topic_config::FlushPolicy;

/// Between two heartbeats where there is nothing to tell.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(500);
/// News are told this soon, several together.
const TELL_WITHIN: Duration = Duration::from_millis(20);
/// A controller that takes longer to answer is looked for anew.
pub(crate) const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Whoever takes longer to listen is told again with the next heartbeat.
const HELLO_MAX: Duration = Duration::from_secs(2);
/// Between two tries to register.
const REGISTER_EVERY: Duration = Duration::from_millis(100);
/// A session that has ended is noted this often.
const LOG_EVERY: Duration = Duration::from_secs(10);
/// What the metadata does not say, though it was told, is told again: the controller may have lost it, or not have known
/// the replica then.
const TELL_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Brokers by which a heartbeat is tried one after another.
const DETOURS_MAX: usize = 2;
/// What a broker that has no way to the controller has another one hand on: a heartbeat, with its own caller.
pub(crate) const HAND_ON_HEARTBEAT: &str = "HandOnHeartbeat";
/// Leaders told with one heartbeat.
const ROWS_MAX: usize = 10_000;

/// Registers, at whichever of the brokers that `contacts` gives is the controller; tries until it is accepted.
///
/// # Errors
/// A refusal that did not go away within `patience`: long enough for a session of the same broker that has ended to be
/// noticed.
pub(crate) async fn register<C, R, F>(
    contacts: C,
    register: R,
    request: &RegisterRequest,
    patience: Duration,
    readiness: &Readiness,
) -> Result<RegisterResponse, Error>
where
    C: Fn() -> Vec<BrokerId>,
    R: Fn(BrokerId, RegisterRequest) -> F,
    F: Future<Output = Result<RegisterResponse, Error>>,
{
    let mut refused_since: Option<Instant> = None;
    let mut hint = None;
    loop {
        let (mut why, mut was_refused) = (None, false);
        for broker in hint.take().into_iter().chain(contacts()) {
            match register(broker, request.clone()).await {
                Ok(response) => return Ok(response),
                Err(error) => {
                    hint = error.leader_hint.as_ref().map(|(leader, _)| *leader).filter(|leader| *leader != broker);
                    if error.code == ErrorCode::InvalidRequest && !error.is_retriable() {
                        // The controller's own decision, which no waiting changes.
                        return Err(error);
                    }
                    if !error.is_retriable() || error.code == ErrorCode::InvalidRequest {
                        let since = *refused_since.get_or_insert_with(Instant::now);
                        if since.elapsed() > patience {
                            return Err(error);
                        }
                        tracing::warn!(%broker, %error, "the registration was refused; it is tried again");
                        (why, was_refused) = (Some(error), true);
                        break;
                    }
                    why = Some(error);
                    if hint.is_some() {
                        break;
                    }
                }
            }
        }
        if !was_refused && hint.is_none() {
            // Nobody is the controller, or says so: the next refusal is another one's.
            refused_since = None;
        }
        let why = why.map_or_else(|| "no other broker is known yet".to_owned(), |error| error.message);
        readiness.hold("registration", format!("the cluster has not taken this broker in yet: {why}"));
        tokio::time::sleep(REGISTER_EVERY).await;
    }
}

/// What the controller was told, and how that went.
#[derive(Debug, Default)]
struct Told {
    /// With the time of it.
    leaders: HashMap<TopicPartition, (LeaderEpoch, Instant)>,
    /// The metadata's recovery under which the controller knew this session.
    recovery: i64,
    /// When all replicas here were looked at, and there was nothing to be told.
    looked: Option<Instant>,
    /// When it was last noted that the controller knows of no session.
    unknown_since: Option<Instant>,
}

/// What a session is about.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) control: Arc<Control>,
    pub(crate) calls: Arc<Calls>,
    pub(crate) replicas: LocalReplicas,
    pub(crate) led: Arc<Led>,
    pub(crate) room: Room,
    /// True once the broker hands its leaderships over.
    pub(crate) stopping: watch::Receiver<bool>,
    /// The replica of the metadata that this broker is to have.
    pub(crate) metadata_replica: watch::Sender<ReplicaId>,
    /// What this start registered with.
    pub(crate) registration: RegisterRequest,
    pub(crate) door: Door,
}

/// What is closed to clients while the cluster does not know this broker.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) gate: Arc<Gate>,
    pub(crate) readiness: Readiness,
    /// Ends streams.
    pub(crate) ends: watch::Sender<bool>,
}

impl Door {
    /// What this broker has of the metadata and of logs it shares changes no more: nobody is to take it for the newest.
    fn close(&self, why: &Error) {
        self.readiness.hold("registration", format!("the session with the cluster is over: {why}"));
        let text = format!("this broker has no session with its cluster any more, ask another one ({})", why.message);
        self.gate.shut(Some(Error::new(ErrorCode::ShuttingDown, text)));
        self.ends.send_replace(true);
    }

    fn open(&self) {
        self.readiness.release("registration");
        self.gate.shut(None);
        self.ends.send_replace(false);
    }
}

impl Session {
    /// Until aborted.
    pub(crate) async fn run(mut self) {
        let mut ticks = tokio::time::interval(HEARTBEAT_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut changes = self.replicas.changes();
        let mut seen = *changes.borrow();
        let mut told = Told { recovery: self.control.table.with(MetadataTable::recovery), ..Told::default() };
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                changed = changes.changed() => match changed {
                    Ok(()) => tokio::time::sleep(TELL_WITHIN).await,
                    Err(_) => return,
                },
                () = self.led.has_news() => {}
                changed = self.stopping.changed() => if changed.is_err() { return },
            }
            let count = *changes.borrow_and_update();
            if std::mem::replace(&mut seen, count) != count {
                told.looked = None;
            }
            self.heartbeat(&mut told).await;
        }
    }

    /// Says everything once. What was not taken is said again.
    async fn heartbeat(&self, told: &mut Told) {
        if self.control.table.with(|table| table.brokers().count() <= 1)
            && self.control.leads()
            && !self.led.has_progress()
        {
            // There is nobody to tell, and nothing.
            return;
        }
        let now = Instant::now();
        // Ten thousand replicas of which none has changed have nothing to tell; now and then they are looked at all the same,
        // as the metadata may have forgotten what it was told.
        let is_quiet = told.looked.is_some_and(|at| now.saturating_duration_since(at) < TELL_AGAIN_AFTER);
        let open = if is_quiet { Vec::new() } else { self.open() };
        let leads = self.leads(&open, &told.leaders, now);
        let moves = self.led.take_progress().into_iter().map(|(tp, progress)| MoveProgress {
            topic_id: tp.topic.to_bytes().to_vec().into(),
            partition: tp.partition.get(),
            may_remove: progress.may_remove,
            removed: progress.removed.iter().map(|replica| replica.get()).collect(),
            wanted: progress.wanted.iter().map(|replica| replica.get()).collect(),
        });
        let request = BrokerHeartbeatRequest {
            caller: None,
            metadata_replica_id: self.metadata_replica.borrow().get(),
            metadata_applied: self.control.table.with(|table| table.applied().get()),
            leaders: leads.iter().map(|(_, _, row)| row.clone()).collect(),
            moves: moves.collect(),
            lost: open.iter().filter_map(|partition| lost(partition).or_else(|| has_nothing(partition))).collect(),
            stopping: *self.stopping.borrow(),
            disk_free_bytes: self.room.free_bytes(),
            disk_total_bytes: self.room.total_bytes(),
            metadata_recovery: told.recovery,
            disk_full: self.room.is_full()
                || open.iter().any(|partition| partition.replica.status().health == Health::DiskFull),
            disk_slow: open.iter().any(|partition| partition.replica.is_disk_slow(now)),
        };
        if !is_quiet {
            let is_all = leads.is_empty() && request.lost.is_empty() && !request.disk_full && !request.disk_slow;
            told.looked = is_all.then_some(now);
        }
        match tell(&self.control, &self.calls, &request).await {
            Ok(answer) if answer.register_again => self.register_again(told, answer.metadata_recovery).await,
            Ok(answer) => {
                if std::mem::replace(&mut told.recovery, answer.metadata_recovery) != answer.metadata_recovery {
                    // It may have forgotten what it was told.
                    told.leaders.clear();
                    told.looked = None;
                }
                if told.unknown_since.take().is_some() {
                    self.door.open();
                }
                self.led.set_full(answer.full_brokers.iter().copied().map(BrokerId::new).collect());
                self.led.set_slow(answer.slow_brokers.iter().copied().map(BrokerId::new).collect());
                for (tp, epoch, _) in leads {
                    told.leaders.insert(tp, (epoch, now));
                }
                self.take_metadata_replica(answer.metadata_replica_id);
            }
            Err(error) if error.code == ErrorCode::InvalidRequest => {
                // It was decommissioned, or another broker took its place.
                if told.unknown_since.is_none_or(|logged| logged.elapsed() > LOG_EVERY) {
                    tracing::error!(%error, "the controller does not know this broker's session");
                    told.unknown_since = Some(Instant::now());
                    self.door.close(&error);
                }
            }
            Err(error) => {
                tracing::debug!(%error, "a heartbeat was not taken");
                if self.control.controller().is_none() {
                    self.say_where().await;
                }
            }
        }
    }

    /// Tells all that are known where this broker is. Who was away when it came to another address has only its old one, and
    /// cannot answer its calls for votes; where these two are all that is left, nobody else could tell.
    async fn say_where(&self) {
        let request = HelloRequest {
            peer_address: self.registration.peer_address.clone(),
            feature_level: self.registration.feature_level,
            ..HelloRequest::default()
        };
        let known = self.control.book.all().into_iter();
        let others = known.filter(|(broker, entry)| *broker != self.control.me && !entry.address.is_empty());
        let said = others.map(|(broker, entry)| {
            let request = request.clone();
            async move {
                if let Err(error) = self.control.peers.hello(&entry.address, request, HELLO_MAX).await {
                    tracing::debug!(%broker, %error, "it was not told where this broker is");
                }
            }
        });
        futures::future::join_all(said).await;
    }

    /// The metadata went on with a loss, and this start's registration is among what was lost.
    async fn register_again(&self, told: &mut Told, recovery: i64) {
        tracing::warn!("the metadata was recovered and does not know this broker's start any more: it registers again");
        let register = |to: BrokerId| -> BoxFuture<'_, Result<RegisterResponse, Error>> {
            Box::pin(async move {
                let request = self.registration.clone();
                if to == self.control.me {
                    return self.calls.take_in(self.calls.identity(), request).await;
                }
                self.control.peers.register(to, request, ANSWER_MAX).await
            })
        };
        match self.control.at_controller(Again::Harmless, register).await {
            Ok(response) => {
                told.recovery = recovery;
                told.leaders.clear();
                told.looked = None;
                self.take_metadata_replica(response.metadata_replica_id);
            }
            Err(error) => tracing::warn!(%error, "the registration was refused; it is tried again"),
        }
    }

    /// The replica of the metadata that this broker is to have from now on, as the controller says.
    fn take_metadata_replica(&self, id: u64) {
        if id != 0 {
            self.metadata_replica.send_if_modified(|known| std::mem::replace(known, ReplicaId::new(id)).get() != id);
        }
    }

    fn open(&self) -> Vec<Arc<OpenPartition>> {
        let all = self.replicas.all().into_iter();
        all.filter_map(|(_, slot)| if let Slot::Open(partition) = slot { Some(partition) } else { None }).collect()
    }

    /// Leaderships that the controller was not told of, or does not know any more.
    fn leads(
        &self,
        open: &[Arc<OpenPartition>],
        told: &HashMap<TopicPartition, (LeaderEpoch, Instant)>,
        now: Instant,
    ) -> Vec<(TopicPartition, LeaderEpoch, LeaderRow)> {
        let led = open.iter().filter_map(|partition| {
            let status = partition.replica.status();
            status.is_ready().then(|| (partition, status.leader_epoch()))
        });
        let led: Vec<_> = led.collect();
        let known: Vec<Option<Leader>> = self.control.table.with(|table| {
            led.iter().map(|(partition, _)| table.partition(partition.tp).and_then(PartitionEntry::leader)).collect()
        });
        let rows = led.into_iter().zip(known).filter_map(|((partition, epoch), known)| {
            let leads = Leader { broker: self.control.me, epoch };
            if !is_news(leads, known, told.get(&partition.tp).copied(), now) {
                return None;
            }
            let row = LeaderRow {
                topic_id: partition.tp.topic.to_bytes().to_vec().into(),
                partition: partition.tp.partition.get(),
                leader_epoch: epoch.get(),
                replica_id: partition.replica_id.get(),
            };
            Some((partition.tp, epoch, row))
        });
        rows.take(ROWS_MAX).collect()
    }
}

/// Whether the controller is to be told of a leadership: what it last was told and when, and what the metadata here says.
fn is_news(leads: Leader, known: Option<Leader>, told: Option<(LeaderEpoch, Instant)>, now: Instant) -> bool {
    match told {
        Some((epoch, at)) if epoch == leads.epoch => {
            known != Some(leads) && now.saturating_duration_since(at) >= TELL_AGAIN_AFTER
        }
        _ => true,
    }
}

/// Says it to the controller, whoever that is.
pub(crate) async fn tell(
    control: &Arc<Control>,
    calls: &Arc<Calls>,
    request: &BrokerHeartbeatRequest,
) -> Result<BrokerHeartbeatResponse, Error> {
    let call = |to: BrokerId| -> BoxFuture<'_, Result<BrokerHeartbeatResponse, Error>> {
        Box::pin(async move {
            if to == control.me {
                return calls.take_heartbeat(control.me, calls.identity().incarnation, request.clone()).await;
            }
            by_any_way(control, calls, to, request).await
        })
    };
    control.at_controller(Again::Harmless, call).await
}

/// Says it to the controller itself, or by another broker where there is no way to it: one link that is cut is no reason to
/// be taken for dead, as all that this broker leads may go on.
async fn by_any_way(
    control: &Control,
    calls: &Calls,
    to: BrokerId,
    request: &BrokerHeartbeatRequest,
) -> Result<BrokerHeartbeatResponse, Error> {
    let (now, deadline) = (Instant::now(), control.duty.answer_max());
    let is_cut = control.cut_from(to, now);
    if !is_cut {
        match control.peers.broker_heartbeat(to, request.clone(), deadline).await {
            Err(error) if is_unanswered(&error) => {
                control.note_cut(to, Instant::now());
            }
            answered => return answered,
        }
    }
    let alive: Vec<BrokerId> = control.table.with(|table| {
        let others = table.brokers().filter(|broker| broker.id != control.me && broker.id != to && !broker.fenced);
        others.map(|broker| broker.id).collect()
    });
    let caller = Some(calls.identity().to_caller(Some(to)));
    let heartbeat = BrokerHeartbeatRequest { caller, ..request.clone() }.encode_to_vec();
    let mut why = control.not_controller();
    for by in control.in_turn(&alive).take(DETOURS_MAX) {
        let request = ForwardRequest {
            method: HAND_ON_HEARTBEAT.to_owned(),
            request: heartbeat.clone().into(),
            ..ForwardRequest::default()
        };
        let answered = control.peers.forward(by, request, 2 * deadline).await;
        match answered.and_then(|answer| BrokerHeartbeatResponse::decode(answer.response).map_err(|_| odd_answer(by))) {
            Ok(answer) => return Ok(answer),
            // Whoever is the controller by now is named in it; what it says of the session comes from it.
            Err(error) if error.code == ErrorCode::NotLeader || error.code == ErrorCode::InvalidRequest => {
                return Err(error);
            }
            Err(error) => why = error,
        }
    }
    Err(why)
}

fn odd_answer(by: BrokerId) -> Error {
    Error::new(ErrorCode::Internal, format!("broker {by} answered something else; run one version of Flowstone on all"))
}

/// A replica that can never vote again under its id.
pub(crate) fn lost(partition: &OpenPartition) -> Option<LostReplica> {
    let Health::Lost { message, lost_memory, last_term, last_index } = partition.replica.status().health else {
        return None;
    };
    Some(LostReplica {
        topic_id: partition.tp.topic.to_bytes().to_vec().into(),
        partition: partition.tp.partition.get(),
        replica_id: partition.replica_id.get(),
        reason: message,
        lost_memory,
        last_term: last_term.get(),
        last_index: last_index.get(),
    })
}

/// A replica that is being copied from the others, where these may be in doubt: it has nothing to offer in their place.
fn has_nothing(partition: &OpenPartition) -> Option<LostReplica> {
    if partition.replica.status().role != Role::Pulling || partition.config().flush != FlushPolicy::Relaxed {
        return None;
    }
    Some(LostReplica {
        topic_id: partition.tp.topic.to_bytes().to_vec().into(),
        partition: partition.tp.partition.get(),
        replica_id: partition.replica_id.get(),
        reason: "it is being copied from the others".to_owned(),
        lost_memory: true,
        last_term: 0,
        last_index: 0,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Registers at broker 2, which answers as `say` does, given the number of the try.
    async fn register_at(
        patience: Duration,
        say: impl Fn(u32) -> Result<RegisterResponse, Error>,
    ) -> (u32, Result<RegisterResponse, Error>) {
        let (tries, readiness) = (Mutex::new(0), Readiness::new(LocalReplicas::default()));
        let contacts = || vec![BrokerId::new(2)];
        let ask = |_, _| {
            let mut tries = tries.lock().expect("nobody panicked");
            *tries += 1;
            std::future::ready(say(*tries))
        };
        let registered = register(contacts, ask, &RegisterRequest::default(), patience, &readiness).await;
        (tries.into_inner().expect("nobody panicked"), registered)
    }

    #[tokio::test]
    async fn a_refusal_ends_a_start_once_it_holds_for_long_and_no_sooner() {
        let refused = || Err(Error::new(ErrorCode::Unsupported, "its release is too old"));
        let nobody = || Err(Error::new(ErrorCode::NotLeader, "it is not the controller, and knows of none"));
        let (tries, registered) = register_at(Duration::ZERO, |_| refused()).await;
        assert_eq!((tries, registered.expect_err("it holds").code), (1, ErrorCode::Unsupported));
        // Between two refusals nobody was the controller, for longer than they may last: the second is another one's.
        let (patience, began) = (Duration::from_secs(2), Mutex::new(None));
        let (_, registered) = register_at(patience, |attempt| {
            let mut began = began.lock().expect("nobody panicked");
            match (attempt, *began) {
                (1, _) => {
                    *began = Some(Instant::now());
                    refused()
                }
                (_, Some(since)) if since.elapsed() <= patience => nobody(),
                (_, Some(_)) => {
                    *began = None;
                    refused()
                }
                (_, None) => Ok(RegisterResponse::default()),
            }
        })
        .await;
        registered.expect("the controller that came took it in");
    }

    #[test]
    fn a_leadership_that_the_metadata_forgot_is_told_again() {
        let (now, me) = (Instant::now(), BrokerId::new(1));
        let leader = |broker: i32, epoch: i32| Leader { broker: BrokerId::new(broker), epoch: LeaderEpoch::new(epoch) };
        let leads = leader(1, 7);
        assert_eq!(leads.broker, me);
        let told = Some((LeaderEpoch::new(7), now));
        assert!(is_news(leads, None, None, now));
        assert!(is_news(leads, Some(leader(1, 6)), Some((LeaderEpoch::new(6), now)), now), "another epoch");
        assert!(!is_news(leads, None, told, now), "its answer is on the way");
        assert!(!is_news(leads, Some(leads), told, now + 10 * TELL_AGAIN_AFTER));
        assert!(is_news(leads, None, told, now + TELL_AGAIN_AFTER));
        assert!(
            is_news(leads, Some(leader(2, 5)), told, now + TELL_AGAIN_AFTER),
            "strangers would be sent to broker 2"
        );
    }
}
