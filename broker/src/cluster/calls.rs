//! What this broker answers to others on the peer listener, from before there is a cluster until it stops.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use bytes::Bytes;
use flowstone_protocol::peer::{
    AddToTransactionRequest, AddToTransactionResponse, BrokerHeartbeatRequest, BrokerHeartbeatResponse, ForwardRequest,
    ForwardResponse, HelloRequest, HelloResponse, InstructRequest, InstructResponse, KnownBroker, RegisterRequest,
    RegisterResponse, ReportRequest, ReportResponse, WriteMarkersRequest, WriteMarkersResponse, instruct_request,
};
use flowstone_protocol::{
    BrokerId, Error, ErrorCode, ErrorKind, LeaderEpoch, PartitionId, ReplicaId, TopicId, TopicPartition, pb,
};
use flowstone_replication::{Health, Role};
use parking_lot::RwLock;
use prost::Message;

use super::control::Control;
use super::drive::transfer;
use super::duty::Lost;
use super::form::{Founder, Founding, Me, founder_message};
use super::recovery::{self, RECOVER_METADATA};
use super::session::HAND_ON_HEARTBEAT;
use crate::controller::commands::{Leadership, MetadataCommand, MetadataReply, MoveProgress, Registration};
use crate::controller::table::{METADATA_PARTITION, MetadataTable, Place};
use crate::node::Node;
use crate::partition::{OpenPartition, Slot};
use crate::peer::{PeerBook, PeerCalls, PeerIdentity, PeerNetwork};
use crate::service;
use crate::transaction::adder::answer_add;
use crate::transaction::driver::answer_markers;

/// This broker, as others ask for it.
#[derive(Debug)]
pub(crate) struct Calls {
    me: Me,
    seeds: Vec<String>,
    book: PeerBook,
    /// Set once it is known, and never changed; readers clone it out.
    founding: RwLock<Option<Founding>>,
    /// Set while the metadata's replica is open.
    control: RwLock<Option<Arc<Control>>>,
    network: OnceLock<Weak<PeerNetwork>>,
    node: OnceLock<Arc<Node>>,
}

impl Calls {
    pub(crate) fn new(me: Me, seeds: Vec<String>, book: PeerBook) -> Arc<Self> {
        Arc::new(Self {
            me,
            seeds,
            book,
            founding: RwLock::new(None),
            control: RwLock::new(None),
            network: OnceLock::new(),
            node: OnceLock::new(),
        })
    }

    /// From now on it can be told to others; it is durable here.
    pub(crate) fn tell_founding(&self, founding: Founding) {
        *self.founding.write() = Some(founding);
    }

    /// The way by which others speak.
    pub(crate) fn attach(&self, network: &Arc<PeerNetwork>) {
        self.network.get_or_init(|| Arc::downgrade(network));
    }

    /// The metadata's replica is open.
    pub(crate) fn serve_metadata(&self, control: &Arc<Control>) {
        *self.control.write() = Some(Arc::clone(control));
    }

    /// It is closed again.
    pub(crate) fn stop_metadata(&self) {
        *self.control.write() = None;
    }

    /// The broker serves.
    pub(crate) fn serve_all(&self, node: &Arc<Node>) {
        self.node.get_or_init(|| Arc::clone(node));
    }

    /// Who this broker says it is.
    pub(crate) fn identity(&self) -> PeerIdentity {
        PeerIdentity {
            broker: self.me.broker,
            directory: self.me.directory,
            incarnation: self.me.incarnation,
            cluster: self.founding.read().as_ref().map(|founding| founding.cluster),
        }
    }

    /// Its hold on the metadata.
    ///
    /// # Errors
    /// `LEADER_NOT_READY` while that is not open.
    pub(crate) fn control(&self) -> Result<Arc<Control>, Error> {
        self.control.read().clone().ok_or_else(|| self.starting())
    }

    fn node(&self) -> Result<&Arc<Node>, Error> {
        self.node.get().ok_or_else(|| self.starting())
    }

    fn starting(&self) -> Error {
        Error::new(
            ErrorCode::LeaderNotReady,
            format!("broker {} is starting; try again in a moment, or ask another one", self.me.broker),
        )
    }

    /// Writes the founding into the metadata, if it is not there yet: nobody is taken in before.
    async fn found(&self, control: &Control) -> Result<(), Error> {
        if control.table.with(|table| table.founding().is_some()) {
            return Ok(());
        }
        let Some(founding) = self.founding.read().clone() else { return Err(self.starting()) };
        let voters = founding.voters.iter().map(|voter| Place {
            broker: voter.broker,
            directory: voter.directory,
            replica: voter.replica,
        });
        let found = MetadataCommand::Found {
            cluster: founding.cluster,
            voters: voters.collect(),
            feature_level: founding.feature_level,
        };
        control.command(found).await.map(|_| ())
    }

    /// Takes a broker in, where this one is the controller.
    pub(crate) async fn take_in(
        &self,
        from: PeerIdentity,
        request: RegisterRequest,
    ) -> Result<RegisterResponse, Error> {
        let control = self.control()?;
        if !control.leads() {
            return Err(control.not_controller());
        }
        self.found(&control).await?;
        recovery::adopt(&control).await?;
        // Whoever is taken in answers the controller at the address that the metadata has: that of an earlier start leads
        // nowhere, and what it then waits for never comes.
        let own = self.identity().incarnation;
        if from.broker != control.me
            && !control.table.with(|table| table.broker(control.me).is_some_and(|broker| broker.incarnation == own))
        {
            return Err(Error::new(
                ErrorCode::LeaderNotReady,
                "the controller has not registered its own start yet; try again in a moment",
            ));
        }
        not_a_copy(&control, &from, &request)?;
        let registration = Registration {
            id: from.broker,
            directory: from.directory,
            client_address: request.client_address,
            peer_address: request.peer_address,
            rack: request.rack,
            version: request.version,
            incarnation: from.incarnation,
            feature_level: request.feature_level,
            seed: rand::random(),
        };
        let reply = control.command(MetadataCommand::RegisterBroker(registration)).await?;
        let MetadataReply::Registered { metadata_replica, is_founder } = reply else {
            return Err(Error::new(ErrorCode::Internal, "the controller answered something else"));
        };
        control.duty.heard(from.broker, from.incarnation, Instant::now(), None);
        Ok(control.table.with(|table| RegisterResponse {
            error: None,
            cluster_id: table
                .founding()
                .map(|founding| Bytes::copy_from_slice(&founding.cluster.to_bytes()))
                .unwrap_or_default(),
            metadata_replica_id: metadata_replica.get(),
            is_founder,
            metadata_replicas: metadata_replicas(table).iter().map(founder_message).collect(),
            feature_level: table.feature_level(),
        }))
    }

    /// Takes a broker's heartbeat, where this one is the controller. Its news are committed when this returns.
    pub(crate) async fn take_heartbeat(
        &self,
        from: BrokerId,
        incarnation: u64,
        request: BrokerHeartbeatRequest,
    ) -> Result<BrokerHeartbeatResponse, Error> {
        let control = self.control()?;
        if !control.leads() {
            return Err(control.not_controller());
        }
        let known = control.table.with(|table| table.broker(from).cloned());
        let Some(known) = known.filter(|known| known.incarnation == incarnation) else {
            // Of one that was the controller once, and does not know who registered since, that is no word to end by.
            control.committed_end().await?;
            let recovery = control.table.with(MetadataTable::recovery);
            if request.metadata_recovery < recovery {
                return Ok(BrokerHeartbeatResponse {
                    register_again: true,
                    metadata_recovery: recovery,
                    ..BrokerHeartbeatResponse::default()
                });
            }
            return Err(Error::new(
                ErrorCode::InvalidRequest,
                format!(
                    "broker {from} has no session by this start of it: it was decommissioned, or another start has \
                     registered since; restart it where it belongs to the cluster, else stop it"
                ),
            ));
        };
        control.duty.heard(from, incarnation, Instant::now(), Some(&request));
        if known.fenced && !request.stopping {
            control.command(MetadataCommand::UnfenceBroker { broker: from, incarnation }).await?;
        }
        let leaders: Vec<Leadership> = request
            .leaders
            .iter()
            .filter_map(|row| {
                Some(Leadership {
                    tp: partition(&row.topic_id, row.partition)?,
                    replica: ReplicaId::new(row.replica_id),
                    epoch: LeaderEpoch::new(row.leader_epoch),
                })
            })
            .collect();
        if !leaders.is_empty() {
            control.command(MetadataCommand::LeadersChanged { broker: from, leaders }).await?;
        }
        let ids = |ids: &[u64]| ids.iter().copied().map(ReplicaId::new).collect::<Vec<_>>();
        let moves = request.moves.iter().filter_map(|progress| {
            let tp = partition(&progress.topic_id, progress.partition)?;
            Some(MetadataCommand::MoveProgress(MoveProgress {
                tp,
                may_remove: progress.may_remove,
                removed: ids(&progress.removed),
                wanted: ids(&progress.wanted),
                seed: rand::random(),
            }))
        });
        // One flush for all: whoever tells of many waits no longer than for one.
        futures::future::try_join_all(moves.map(|command| control.command(command))).await?;
        control.duty.lost(from, request.lost.iter().filter_map(Lost::of));
        let metadata_replica =
            || control.table.with(|table| table.broker(from).map_or(0, |broker| broker.metadata_replica.get()));
        if metadata_replica() != request.metadata_replica_id {
            // What is taken for the controller here may not be it any more, and know only an earlier id: the broker would give
            // up a replica that votes, for one that must never come back.
            control.committed_end().await?;
        }
        Ok(control.table.with(|table| BrokerHeartbeatResponse {
            error: None,
            metadata_end: table.applied().get(),
            metadata_replica_id: table.broker(from).map_or(0, |broker| broker.metadata_replica.get()),
            register_again: false,
            metadata_recovery: table.recovery(),
            full_brokers: control.duty.full().iter().map(|broker| broker.get()).collect(),
            slow_brokers: control.duty.slow().iter().map(|broker| broker.get()).collect(),
        }))
    }

    /// A heartbeat of a broker that has no way to the controller: taken where this is the controller, else handed on to it,
    /// if it comes from that broker itself.
    async fn hand_on_heartbeat(
        &self,
        from: PeerIdentity,
        request: ForwardRequest,
    ) -> Result<BrokerHeartbeatResponse, Error> {
        let heartbeat = BrokerHeartbeatRequest::decode(request.request.clone()).map_err(|error| {
            Error::new(ErrorCode::InvalidRequest, format!("what was handed on is malformed: {error}"))
        })?;
        let of = PeerIdentity::from_caller(heartbeat.caller.as_ref())?;
        if of.cluster != from.cluster {
            return Err(Error::new(ErrorCode::PermissionDenied, "the heartbeat is of a broker of another cluster"));
        }
        let control = self.control()?;
        if control.leads() {
            let answer = self.take_heartbeat(of.broker, of.incarnation, heartbeat).await?;
            control.duty.came_by(of.broker, (from.broker != of.broker).then_some(from.broker));
            return Ok(answer);
        }
        let controller = control.controller().filter(|controller| *controller != of.broker);
        let Some(controller) = controller.filter(|_| (from.broker, from.incarnation) == (of.broker, of.incarnation))
        else {
            return Err(control.not_controller());
        };
        let request = ForwardRequest { caller: None, ..request };
        let answer = control.peers.forward(controller, request, control.duty.answer_max()).await?;
        BrokerHeartbeatResponse::decode(answer.response).map_err(|_| {
            Error::new(
                ErrorCode::Internal,
                "the controller answered something else; run one version of Flowstone on all",
            )
        })
    }

    /// Hands a partition's leadership over, where it is led here.
    pub(crate) async fn hand_over(&self, tp: TopicPartition, to: Option<ReplicaId>) -> Result<(), Error> {
        let node = self.node()?;
        let partition = self.open(node, tp)?;
        if !partition.replica.status().is_ready() {
            let error = Error::new(ErrorCode::NotLeader, format!("broker {} does not lead the partition", node.id));
            return Err(node.explain(error, &partition));
        }
        transfer(&partition.replica, to).await.map_err(|error| node.explain(error, &partition))
    }

    fn open(&self, node: &Node, tp: TopicPartition) -> Result<Arc<OpenPartition>, Error> {
        match node.replicas.get(tp) {
            Some(Slot::Open(partition)) => Ok(partition),
            _ => Err(Error::new(ErrorCode::NotLeader, format!("broker {} has no replica of the partition", node.id))
                .with_partition(tp.partition)),
        }
    }
}

/// Where the metadata's replicas are: those that vote, and those that follow.
pub(crate) fn metadata_replicas(table: &MetadataTable) -> Vec<Founder> {
    let voters = table.partition(METADATA_PARTITION).into_iter().flat_map(|entry| entry.places().copied());
    let places = voters.chain(table.observers());
    places
        .map(|place| Founder {
            broker: place.broker,
            directory: place.directory,
            replica: place.replica,
            peer_address: table.broker(place.broker).map(|broker| broker.peer_address.clone()).unwrap_or_default(),
        })
        .collect()
}

pub(crate) fn partition(topic_id: &[u8], partition: i32) -> Option<TopicPartition> {
    Some(TopicPartition { topic: TopicId::from_slice(topic_id)?, partition: PartitionId::new(partition) })
}

/// Whether a broker that registers with a known directory is not a second one beside the first: on a copy of it both would
/// vote, and acknowledge, under the same names. One that was killed and came back elsewhere waits until its session ends.
fn not_a_copy(control: &Control, from: &PeerIdentity, request: &RegisterRequest) -> Result<(), Error> {
    let known = control.table.with(|table| table.broker(from.broker).cloned());
    let Some(known) = known.filter(|known| {
        known.directory == from.directory
            && known.incarnation != from.incarnation
            && known.peer_address != request.peer_address
            && !known.fenced
            && from.broker != control.me
    }) else {
        return Ok(());
    };
    let mut error = Error::new(
        ErrorCode::InvalidRequest,
        format!(
            "broker {} runs at {} with this very data directory, or did a moment ago, and this one is at {}: if its directory \
             is a copy, start it with an empty one; else wait until the session of its earlier start ends \
             (limits.broker_session_timeout)",
            from.broker, known.peer_address, request.peer_address
        ),
    );
    error.kind = ErrorKind::Retriable;
    Err(error)
}

/// This broker's replica of the metadata, where it can vote.
fn voter(control: &Control) -> Option<ReplicaId> {
    let (id, status) = (control.metadata_id(), control.metadata().status());
    let is_well = matches!(status.health, Health::Ok | Health::DiskFull);
    (is_well && status.is_voter && !matches!(status.role, Role::Opening | Role::Pulling)).then_some(id)
}

fn malformed() -> Error {
    Error::new(ErrorCode::InvalidRequest, "topic_id needs 16 bytes; this is a defect of the broker that asked")
}

#[tonic::async_trait]
impl PeerCalls for Calls {
    async fn hello(&self, from: PeerIdentity, request: HelloRequest) -> Result<HelloResponse, Error> {
        let founding = self.founding.read().clone();
        // One that came back at another address cannot register before the metadata's leader reaches it there.
        let is_member = founding.as_ref().map(|founding| founding.cluster) == from.cluster && from.cluster.is_some();
        let is_known = || self.book.get(from.broker).is_some_and(|known| known.directory == Some(from.directory));
        let may_speak = || {
            let network = self.network.get().and_then(Weak::upgrade);
            network.is_none_or(|network| network.check_start(&from).is_ok())
        };
        if is_member && !request.peer_address.is_empty() && is_known() && may_speak() {
            self.book.set_address(from.broker, &request.peer_address);
        }
        let control = self.control.read().clone();
        let brokers = match &control {
            Some(control) => control.table.with(|table| {
                let known = table.brokers().map(|broker| (broker.id, broker.peer_address.clone()));
                known.collect::<Vec<_>>()
            }),
            None => founding
                .iter()
                .flat_map(|founding| &founding.voters)
                .map(|voter| (voter.broker, voter.peer_address.clone()))
                .collect(),
        };
        let brokers =
            brokers.into_iter().map(|(broker, peer_address)| KnownBroker { broker_id: broker.get(), peer_address });
        Ok(HelloResponse {
            answerer: Some(self.identity().to_caller(None)),
            seeds: self.seeds.clone(),
            peer_address: self.me.peer_address.clone(),
            feature_level: self.me.feature_level,
            cluster_feature_level: control
                .as_ref()
                .and_then(|control| control.table.with(|table| table.founding().map(|founding| founding.feature_level)))
                .or(founding.as_ref().map(|founding| founding.feature_level))
                .unwrap_or(0),
            founding: founding.map(|founding| founding.to_message()),
            controller_id: control.as_ref().and_then(|control| control.controller()).map_or(-1, BrokerId::get),
            brokers: brokers.collect(),
            metadata_voter_id: control.as_ref().and_then(|control| voter(control)).map_or(0, ReplicaId::get),
        })
    }

    async fn register(&self, from: PeerIdentity, request: RegisterRequest) -> Result<RegisterResponse, Error> {
        self.take_in(from, request).await
    }

    async fn broker_heartbeat(
        &self,
        from: PeerIdentity,
        request: BrokerHeartbeatRequest,
    ) -> Result<BrokerHeartbeatResponse, Error> {
        let answer = self.take_heartbeat(from.broker, from.incarnation, request).await?;
        self.control()?.duty.came_by(from.broker, None);
        Ok(answer)
    }

    async fn forward(&self, from: PeerIdentity, request: ForwardRequest) -> Result<ForwardResponse, Error> {
        if request.method == HAND_ON_HEARTBEAT {
            let response = self.hand_on_heartbeat(from, request).await?.encode_to_vec().into();
            return Ok(ForwardResponse { error: None, response });
        }
        if request.method == RECOVER_METADATA {
            // While it starts as well: without a majority it would start for ever.
            let asked = pb::RecoverPartitionRequest::decode(request.request).map_err(|error| {
                Error::new(ErrorCode::InvalidRequest, format!("what was handed on is malformed: {error}"))
            })?;
            let response = recovery::recover(&self.control()?, asked).await?.encode_to_vec().into();
            return Ok(ForwardResponse { error: None, response });
        }
        let response = service::forwarded(self.node()?, request).await?;
        Ok(ForwardResponse { error: None, response })
    }

    async fn report(&self, _from: PeerIdentity, request: ReportRequest) -> Result<ReportResponse, Error> {
        let topics = request.topic_ids.iter().map(|id| TopicId::from_slice(id).ok_or_else(malformed));
        let topics = topics.collect::<Result<Vec<_>, Error>>()?;
        Ok(super::report::of_this_broker(self.node()?, &topics).await)
    }

    async fn instruct(&self, _from: PeerIdentity, request: InstructRequest) -> Result<InstructResponse, Error> {
        let tp = partition(&request.topic_id, request.partition).ok_or_else(malformed)?;
        match request.what {
            Some(instruct_request::What::TransferLeaderTo(to)) => {
                let to = (to != 0).then(|| ReplicaId::new(to));
                self.hand_over(tp, to).await?;
            }
            Some(instruct_request::What::RecoverAs(_)) | None => {
                return Err(Error::new(
                    ErrorCode::Unsupported,
                    format!("broker {} does not know this instruction; run one version on all", self.me.broker),
                ));
            }
        }
        Ok(InstructResponse { error: None })
    }

    async fn add_to_transaction(
        &self,
        _from: PeerIdentity,
        request: AddToTransactionRequest,
    ) -> Result<AddToTransactionResponse, Error> {
        Ok(answer_add(self.node()?, request).await)
    }

    async fn write_markers(
        &self,
        _from: PeerIdentity,
        request: WriteMarkersRequest,
    ) -> Result<WriteMarkersResponse, Error> {
        Ok(answer_markers(self.node()?, request).await)
    }
}
