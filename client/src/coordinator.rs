//! How a call finds the coordinator of a group or of a transactional id, and follows it when it moves.

use std::sync::{Arc, Mutex};

use flowstone_protocol::pb;
use flowstone_protocol::pb::CoordinatorKind;
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::address::ServerAddress;
use crate::cluster::Cluster;
use crate::error::{Error, ErrorCode, Result};
use crate::locked;
use crate::retry::{Backoff, BackoffPolicy};

/// The coordinator of one key.
#[derive(Debug)]
pub(crate) struct Coordinator {
    cluster: Arc<Cluster>,
    kind: CoordinatorKind,
    key: String,
    /// Where it was when somebody last told. Guards the address alone.
    known: Mutex<Option<ServerAddress>>,
}

impl Coordinator {
    pub(crate) fn new(cluster: Arc<Cluster>, kind: CoordinatorKind, key: impl Into<String>) -> Self {
        Self { cluster, kind, key: key.into(), known: Mutex::default() }
    }

    pub(crate) fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// Its address, as far as is known; brokers are asked where nothing is.
    ///
    /// # Errors
    /// What the brokers say of the key, such as `INVALID_GROUP`; `TIMED_OUT` where none answers.
    pub(crate) async fn address(&self) -> Result<ServerAddress> {
        if let Some(known) = locked(&self.known).clone() {
            return Ok(known);
        }
        let request = pb::FindCoordinatorsRequest { kind: self.kind.into(), keys: vec![self.key.clone()] };
        let answer = self
            .cluster
            .call_channel(None, |channel| {
                let request = request.clone();
                let mut client = pb::coordinators_client::CoordinatorsClient::new(channel);
                async move { client.find_coordinators(request).await }
            })
            .await?;
        let found = answer.coordinators.into_iter().next().unwrap_or_default();
        if let Some(detail) = &found.error {
            return Err(Error::from_detail(detail));
        }
        let broker = found.broker.unwrap_or_default();
        let address = ServerAddress::parse(&broker.address)?;
        *locked(&self.known) = Some(address.clone());
        Ok(address)
    }

    /// A call to this address failed: the next one asks anew, or goes to where the answer points.
    pub(crate) fn failed(&self, address: &ServerAddress, error: &Error) {
        let hint = error.leader_hint().and_then(|(_, hint)| ServerAddress::parse(hint).ok());
        let mut known = locked(&self.known);
        if known.as_ref() == Some(address) || hint.is_some() {
            *known = hint;
        }
    }

    /// Calls it until it answers for good or the request timeout is over.
    pub(crate) async fn call<T, F: Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>>(
        &self,
        attempt: impl Fn(Channel) -> F,
    ) -> Result<T> {
        let deadline = Instant::now() + self.cluster.request_timeout();
        let mut backoff = Backoff::new(BackoffPolicy::REQUEST);
        // A coordinator that hangs must not use up all the time: another broker may have its place by now.
        let share = self.cluster.request_timeout() / 3;
        loop {
            let error = match self.address().await {
                Ok(address) => {
                    let channel = self.cluster.channel(&address)?;
                    let until = deadline.min(Instant::now() + share);
                    let error = match tokio::time::timeout_at(until, attempt(channel)).await {
                        Ok(Ok(response)) => return Ok(response.into_inner()),
                        Ok(Err(status)) => Error::from_status(&address, status),
                        Err(_) => {
                            Error::unreachable(format!("the coordinator at {address} did not answer in {share:?}"))
                        }
                    };
                    self.failed(&address, &error);
                    error
                }
                Err(error) => error,
            };
            if !error.is_retriable() {
                return Err(error);
            }
            let wait = backoff.failed();
            if Instant::now() + wait >= deadline {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// As [`call`](Self::call), for answers that carry an error in themselves.
    pub(crate) fn told(detail: Option<&pb::ErrorDetail>) -> Result<()> {
        match detail {
            Some(detail) if detail.code() != ErrorCode::Unspecified => Err(Error::from_detail(detail)),
            _ => Ok(()),
        }
    }
}

/// Asks every broker that coordinates keys of this kind, each once; brokers that fail are asked again, or whoever has their
/// place, until the request timeout.
pub(crate) async fn ask_all_coordinators<
    T,
    F: Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>,
>(
    cluster: &Arc<Cluster>,
    kind: CoordinatorKind,
    attempt: impl Fn(Channel) -> F,
) -> Result<Vec<T>> {
    let name = match kind {
        CoordinatorKind::Transaction => "__transaction_state",
        CoordinatorKind::Group | CoordinatorKind::Unspecified => "__consumer_offsets",
    };
    let deadline = Instant::now() + cluster.request_timeout();
    let share = cluster.request_timeout() / 3;
    let mut backoff = Backoff::new(BackoffPolicy::REQUEST);
    let mut asked: Vec<i32> = Vec::new();
    let mut answers = Vec::new();
    loop {
        let topic = match cluster.topic(name).await {
            Ok(topic) => topic,
            // Nothing was ever coordinated.
            Err(error) if error.is_not_found() => return Ok(answers),
            Err(error) => return Err(error),
        };
        let mut failed = None;
        for (partition, leader) in topic.leaders.iter().enumerate() {
            let Some(broker) = leader else {
                let error =
                    Error::new(ErrorCode::NoLeader, "nobody leads it (yet); try again").at(name, partition as i32);
                failed = Some(error);
                continue;
            };
            if asked.contains(broker) {
                continue;
            }
            let Some(address) = cluster.snapshot().address(*broker).cloned() else {
                let message = format!("broker {broker} coordinates, and its address is not known (yet); try again");
                failed = Some(Error::new(ErrorCode::NoLeader, message));
                cluster.doubt(name);
                continue;
            };
            let until = deadline.min(Instant::now() + share);
            let error = match tokio::time::timeout_at(until, attempt(cluster.channel(&address)?)).await {
                Ok(Ok(response)) => {
                    asked.push(*broker);
                    answers.push(response.into_inner());
                    continue;
                }
                Ok(Err(status)) => Error::from_status(&address, status),
                Err(_) => Error::unreachable(format!("the broker at {address} did not answer in {share:?}")),
            };
            if !error.is_retriable() {
                return Err(error);
            }
            cluster.doubt(name);
            failed = Some(error);
        }
        let Some(error) = failed else { return Ok(answers) };
        let wait = backoff.failed();
        if Instant::now() + wait >= deadline {
            return Err(error);
        }
        tokio::time::sleep(wait).await;
    }
}
