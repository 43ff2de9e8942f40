//! The cluster as producers, consumers and administration share it: the metadata cache, the control connections, and
//! how a call finds a broker that answers it.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use flowstone_protocol::pb;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::address::ServerAddress;
use crate::connection::{ConnectionSettings, ControlConnections};
use crate::error::{Error, ErrorCode, Result};
use crate::locked;
use crate::metadata::{Snapshot, TopicInfo};
use crate::retry::{Backoff, BackoffPolicy};

type Answered<T> = std::result::Result<tonic::Response<T>, tonic::Status>;

/// What the watching task tells: the newest snapshot, and why there is none or why it grows stale.
#[derive(Clone, Debug, Default)]
struct Watched {
    snapshot: Option<Arc<Snapshot>>,
    failure: Option<Error>,
}

/// The cache and the control connections. Dropping the last holder ends the tasks that keep the cache fresh.
#[derive(Debug)]
pub(crate) struct Cluster {
    connections: ControlConnections,
    bootstrap: Vec<ServerAddress>,
    request_timeout: Duration,
    watched: watch::Sender<Watched>,
    doubts: Arc<Doubts>,
    /// Where this client begins in lists of brokers that are as good as each other, so that clients do not all ask the same.
    spread: usize,
}

/// Topics whose metadata somebody has reason to take for stale.
#[derive(Debug, Default)]
struct Doubts {
    /// Guards the set alone.
    topics: Mutex<HashSet<Arc<str>>>,
    raised: Notify,
    /// The broker that is watched did not answer: another is to be watched.
    watch_elsewhere: Notify,
    /// Where the watch is. Guards the address alone.
    watching: Mutex<Option<ServerAddress>>,
}

/// Time between two rounds of questions about doubted topics, and for each answer.
const DOUBTS_EVERY: Duration = Duration::from_millis(100);
const DOUBT_ANSWER_MAX: Duration = Duration::from_millis(500);
/// Brokers asked in a round.
const DOUBT_BROKERS_MAX: usize = 3;
/// Topics asked for in one question, below what a broker takes by default.
const DOUBT_TOPICS_MAX: usize = 500;

impl Cluster {
    /// Starts to watch, and waits for the first answer for as long as a request may take.
    pub(crate) async fn connect(
        bootstrap: Vec<ServerAddress>,
        settings: ConnectionSettings,
        request_timeout: Duration,
    ) -> Result<Arc<Self>> {
        let cluster = Arc::new(Self {
            connections: ControlConnections::new(settings),
            bootstrap,
            request_timeout,
            watched: watch::Sender::default(),
            doubts: Arc::default(),
            spread: rand::random_range(0..1 << 16),
        });
        let mut watched = cluster.watched.subscribe();
        tokio::spawn(watch_metadata(Arc::downgrade(&cluster), cluster.doubts.clone(), watched.clone()));
        tokio::spawn(settle_doubts(Arc::downgrade(&cluster), cluster.doubts.clone(), watched.clone()));
        let refused = |watched: &Watched| watched.failure.as_ref().is_some_and(|failure| !failure.is_retriable());
        let first = watched.wait_for(|watched| watched.snapshot.is_some() || refused(watched));
        let answered = tokio::time::timeout(request_timeout, first).await.is_ok_and(|first| first.is_ok());
        if !answered || cluster.watched.borrow().snapshot.is_none() {
            let failure = cluster.watched.borrow().failure.clone();
            let tried = cluster.bootstrap.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(failure.unwrap_or_else(|| {
                Error::unreachable(format!(
                    "no broker answered within {request_timeout:?} at {tried}; is one running there?"
                ))
            }));
        }
        Ok(cluster)
    }

    pub(crate) fn settings(&self) -> &ConnectionSettings {
        self.connections.settings()
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        self.request_timeout
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.watched.borrow().snapshot.clone().unwrap_or_default()
    }

    /// Tells of every change from now on.
    pub(crate) fn changes(&self) -> MetadataChanges {
        MetadataChanges(self.watched.subscribe())
    }

    /// A topic: from the cache, or asked for where the cache has none.
    ///
    /// # Errors
    /// `UNKNOWN_TOPIC` where a broker that is ready does not know it.
    pub(crate) async fn topic(&self, name: &str) -> Result<Arc<TopicInfo>> {
        match self.snapshot().topic(name) {
            Some(topic) => Ok(topic.clone()),
            None => self.ask_for_topic(name).await,
        }
    }

    /// A topic as the controller knows it: another broker may not have heard yet of one that was just created.
    ///
    /// # Errors
    /// As [`Cluster::topic`].
    pub(crate) async fn ask_for_topic(&self, name: &str) -> Result<Arc<TopicInfo>> {
        let answer = self
            .call_log(self.controller().as_ref(), |mut log| {
                let request = pb::MetadataRequest { topics: vec![name.to_owned()], include_internal: true };
                async move { log.metadata(request).await }
            })
            .await
            .map_err(|error| error.at_topic(name))?;
        let missing = || Error::new(ErrorCode::UnknownTopic, "there is no such topic; create it first").at_topic(name);
        let topic = answer.topics.iter().find(|topic| topic.name == name).ok_or_else(missing)?;
        if let Some(detail) = &topic.error {
            return Err(Error::from_detail(detail).at_topic(name));
        }
        self.change(|snapshot| {
            snapshot.learn(&answer);
        });
        self.snapshot().topic(name).cloned().ok_or_else(missing)
    }

    /// Takes in a topic that was created just now.
    pub(crate) fn know_created(&self, topic: &pb::TopicDescription) {
        self.change(|snapshot| snapshot.know_created(topic));
    }

    /// Drops a topic that a broker does not know any more, so that its name is asked for anew.
    pub(crate) fn forget(&self, name: &str) {
        if self.snapshot().topic(name).is_some() {
            self.change(|snapshot| snapshot.forget(name));
        }
    }

    /// Somebody refused a request for a partition, or nobody answered it. Takes the word of a broker that says who
    /// leads; where none does, others are asked soon.
    pub(crate) fn refused(&self, topic: &str, partition: i32, error: &Error) {
        // Most hints are known, as all batches that were under way get the same: nothing is copied for those.
        let hint = self.snapshot().heeds_hint(topic, partition, error);
        let heeded = hint.is_some();
        if let Some(hint) = hint {
            self.change(|snapshot| snapshot.heed_hint(topic, hint));
        }
        let elsewhere = matches!(
            error.code(),
            ErrorCode::NotLeader
                | ErrorCode::NoLeader
                | ErrorCode::TimedOut
                | ErrorCode::ShuttingDown
                | ErrorCode::UnknownTopic
                | ErrorCode::UnknownPartition
        );
        if !heeded && elsewhere {
            self.doubt(topic);
        }
    }

    /// What is known of this topic may be stale: brokers are asked for it soon, another than the one that is watched
    /// too. Cheap, and as often as the reason recurs.
    pub(crate) fn doubt(&self, topic: &str) {
        let mut topics = locked(&self.doubts.topics);
        if topics.len() < DOUBT_TOPICS_MAX && !topics.contains(topic) {
            topics.insert(Arc::from(topic));
            self.doubts.raised.notify_one();
        }
    }

    fn change(&self, change: impl FnOnce(&mut Snapshot)) {
        self.watched.send_modify(|watched| {
            change(Arc::make_mut(watched.snapshot.get_or_insert_default()));
        });
    }

    /// Where to ask, best first: the one named, then the known brokers, then the addresses from the start; whoever did
    /// not answer lately comes last.
    fn candidates(&self, first: Option<&ServerAddress>) -> Vec<ServerAddress> {
        let snapshot = self.snapshot();
        let mut known: Vec<_> = snapshot.brokers.iter().map(|(id, broker)| (*id, broker.address.clone())).collect();
        known.sort();
        if !known.is_empty() {
            let middle = self.spread % known.len();
            known.rotate_left(middle);
        }
        let mut list: Vec<ServerAddress> = Vec::new();
        for address in known.into_iter().map(|(_, address)| address).chain(self.bootstrap.iter().cloned()) {
            if !list.contains(&address) {
                list.push(address);
            }
        }
        self.connections.best_first(&mut list);
        if let Some(first) = first {
            list.retain(|address| address != first);
            list.insert(0, first.clone());
        }
        list
    }

    /// Asks brokers in turn, `first` before others and whoever a refusal names next, until one answers for good or the
    /// request timeout is over. `retried` is set where an attempt failed whose fate is not known.
    async fn call<T, F: Future<Output = Answered<T>>>(
        &self,
        first: Option<&ServerAddress>,
        attempt: impl Fn(&ServerAddress) -> Result<F>,
        retried: &mut bool,
    ) -> Result<T> {
        let deadline = Instant::now() + self.request_timeout;
        let mut backoff = Backoff::new(BackoffPolicy::REQUEST);
        let mut first = first.cloned();
        loop {
            let mut last = None;
            let mut waiting: VecDeque<ServerAddress> = self.candidates(first.as_ref()).into();
            // One that hangs must not use up the time of the others.
            let share = self.request_timeout / u32::try_from(waiting.len()).unwrap_or(u32::MAX).max(1);
            let mut asked = Vec::new();
            while let Some(address) = waiting.pop_front() {
                let until = deadline.min(Instant::now() + share);
                let error = match tokio::time::timeout_at(until, attempt(&address)?).await {
                    Ok(Ok(response)) => {
                        self.connections.answered(&address);
                        return Ok(response.into_inner());
                    }
                    Ok(Err(status)) => Error::from_status(&address, status),
                    Err(_) => {
                        let message = format!("the broker at {address} did not answer in {share:?}; is it overloaded?");
                        Error::unreachable(message)
                    }
                };
                if error.is_unreachable() {
                    self.connections.failed(&address);
                } else {
                    self.connections.answered(&address);
                }
                if !error.is_retriable() {
                    return Err(error);
                }
                *retried = true;
                asked.push(address);
                // Once around at most: two that name each other wait like all others.
                let hint = error.leader_hint().and_then(|(_, hint)| ServerAddress::parse(hint).ok());
                if let Some(hint) = hint {
                    if !asked.contains(&hint) {
                        waiting.retain(|address| *address != hint);
                        waiting.push_front(hint.clone());
                    }
                    first = Some(hint);
                }
                // A broker that gave a reason tells more than the next one's refused connection.
                if last.as_ref().is_none_or(Error::is_unreachable) || !error.is_unreachable() {
                    last = Some(error);
                }
                if Instant::now() >= deadline {
                    break;
                }
            }
            let wait = backoff.failed();
            if Instant::now() + wait >= deadline {
                return Err(last.unwrap_or_else(|| Error::unreachable("no broker is known")));
            }
            tokio::time::sleep(wait).await;
        }
    }

    pub(crate) async fn call_log<T, F: Future<Output = Answered<T>>>(
        &self,
        first: Option<&ServerAddress>,
        attempt: impl Fn(pb::log_client::LogClient<tonic::transport::Channel>) -> F,
    ) -> Result<T> {
        self.call(first, |address| Ok(attempt(self.connections.log(address)?)), &mut false).await
    }

    /// As [`call_log`](Self::call_log), for any service.
    pub(crate) async fn call_channel<T, F: Future<Output = Answered<T>>>(
        &self,
        first: Option<&ServerAddress>,
        attempt: impl Fn(tonic::transport::Channel) -> F,
    ) -> Result<T> {
        self.call(first, |address| Ok(attempt(self.connections.channel(address)?)), &mut false).await
    }

    /// The shared connection to one broker.
    pub(crate) fn channel(&self, address: &ServerAddress) -> Result<tonic::transport::Channel> {
        self.connections.channel(address)
    }

    /// Asks the controller first; the other brokers hand the request on to whoever it is.
    pub(crate) async fn call_admin<T, F: Future<Output = Answered<T>>>(
        &self,
        attempt: impl Fn(pb::admin_client::AdminClient<tonic::transport::Channel>) -> F,
    ) -> Result<T> {
        self.call_admin_at(self.controller().as_ref(), attempt, &mut false).await
    }

    /// As [`call_admin`](Self::call_admin), for what must not be taken for done twice: `retried` tells whether an attempt
    /// before the one that was answered may have been carried out.
    pub(crate) async fn call_admin_once<T, F: Future<Output = Answered<T>>>(
        &self,
        attempt: impl Fn(pb::admin_client::AdminClient<tonic::transport::Channel>) -> F,
        retried: &mut bool,
    ) -> Result<T> {
        self.call_admin_at(self.controller().as_ref(), attempt, retried).await
    }

    pub(crate) async fn call_admin_at<T, F: Future<Output = Answered<T>>>(
        &self,
        first: Option<&ServerAddress>,
        attempt: impl Fn(pb::admin_client::AdminClient<tonic::transport::Channel>) -> F,
        retried: &mut bool,
    ) -> Result<T> {
        self.call(first, |address| Ok(attempt(self.connections.admin(address)?)), retried).await
    }

    /// The controller's address, where it is known.
    pub(crate) fn controller(&self) -> Option<ServerAddress> {
        let snapshot = self.snapshot();
        snapshot.address(snapshot.controller?).cloned()
    }
}

/// Wakes whoever waits for the metadata to change.
#[derive(Clone, Debug)]
pub(crate) struct MetadataChanges(watch::Receiver<Watched>);

impl MetadataChanges {
    /// Returns once something changed since the last call; never, once the cluster is gone.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Keeps the cache fresh for as long as somebody holds the cluster. The receiver is only there to learn of its end:
/// a task that held the cluster itself would keep it alive for ever.
async fn watch_metadata(cluster: Weak<Cluster>, doubts: Arc<Doubts>, mut alive: watch::Receiver<Watched>) {
    let mut backoff = Backoff::new(BackoffPolicy::CONNECT);
    loop {
        let Some(strong) = cluster.upgrade() else { return };
        let Some(address) = strong.candidates(None).into_iter().next() else { return };
        let client = strong.connections.log(&address);
        drop(strong);
        *locked(&doubts.watching) = Some(address.clone());
        let mut heard = false;
        let failure = match client {
            Ok(client) => tokio::select! {
                failure = follow(&cluster, &address, client, &mut heard) => failure,
                () = doubts.watch_elsewhere.notified() => Error::unreachable("the broker that is watched does not answer"),
                () = ended(&mut alive) => return,
            },
            Err(error) => error,
        };
        if heard {
            backoff.succeeded();
        }
        let Some(strong) = cluster.upgrade() else { return };
        // Whatever the reason: the next one is tried first.
        strong.connections.failed(&address);
        tracing::debug!(%address, %failure, "metadata watch ended");
        strong.watched.send_if_modified(|watched| {
            watched.failure = Some(failure);
            // Only who waits for the first answer wants to know.
            watched.snapshot.is_none()
        });
        drop(strong);
        tokio::select! {
            () = tokio::time::sleep(backoff.failed()) => {}
            () = ended(&mut alive) => return,
        }
    }
}

async fn ended(alive: &mut watch::Receiver<Watched>) {
    while alive.changed().await.is_ok() {}
}

/// One watch, to its end; the error says why it ended.
async fn follow(
    cluster: &Weak<Cluster>,
    address: &ServerAddress,
    mut client: pb::log_client::LogClient<tonic::transport::Channel>,
    heard: &mut bool,
) -> Error {
    let mut stream = match client.watch_metadata(pb::WatchMetadataRequest { include_internal: true }).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Error::from_status(address, status),
    };
    loop {
        match stream.message().await {
            Ok(Some(update)) => {
                let Some(strong) = cluster.upgrade() else { return Error::closed("client") };
                if let Some(metadata) = &update.metadata {
                    let whole = !*heard;
                    strong.change(|snapshot| snapshot.apply(metadata, &update.deleted_topic_ids, whole));
                    *heard = true;
                    strong.connections.answered(address);
                } else if *heard && !update.deleted_topic_ids.is_empty() {
                    strong.change(|snapshot| snapshot.forget_ids(&update.deleted_topic_ids));
                }
            }
            Ok(None) => return Error::unreachable("the broker ended the metadata watch"),
            Err(status) => return Error::from_status(address, status),
        }
    }
}

/// Asks brokers for what is doubted, for as long as somebody holds the cluster: the one that is watched first, since its
/// next update may be on its way, or never come.
async fn settle_doubts(cluster: Weak<Cluster>, doubts: Arc<Doubts>, mut alive: watch::Receiver<Watched>) {
    loop {
        tokio::select! {
            () = doubts.raised.notified() => {}
            () = ended(&mut alive) => return,
        }
        let Some(strong) = cluster.upgrade() else { return };
        let topics: Vec<String> = locked(&doubts.topics).drain().map(|name| name.to_string()).collect();
        let watching = locked(&doubts.watching).clone();
        let mut candidates = strong.candidates(watching.as_ref());
        candidates.truncate(DOUBT_BROKERS_MAX);
        for address in candidates {
            let Ok(mut client) = strong.connections.log(&address) else { continue };
            let request = pb::MetadataRequest { topics: topics.clone(), include_internal: true };
            let answer = tokio::time::timeout(DOUBT_ANSWER_MAX, client.metadata(request)).await;
            let Ok(Ok(answer)) = answer else {
                strong.connections.failed(&address);
                if watching.as_ref() == Some(&address) {
                    doubts.watch_elsewhere.notify_one();
                }
                continue;
            };
            strong.connections.answered(&address);
            let answer = answer.into_inner();
            let mut news = false;
            strong.watched.send_if_modified(|watched| {
                news = watched.snapshot.as_mut().is_some_and(|snapshot| Arc::make_mut(snapshot).learn(&answer));
                news
            });
            if news {
                break;
            }
        }
        drop(strong);
        tokio::select! {
            () = tokio::time::sleep(DOUBTS_EVERY) => {}
            () = ended(&mut alive) => return,
        }
    }
}
