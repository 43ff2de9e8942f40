//! Transactions: records of many partitions and consumed offsets, stored together or not at all.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flowstone_protocol::pb;
use flowstone_protocol::pb::CoordinatorKind;
use flowstone_protocol::pb::groups_client::GroupsClient;
use flowstone_protocol::pb::transactions_client::TransactionsClient;
use flowstone_protocol::{ProducerEpoch, ProducerId};
use tokio::time::Instant;

use crate::consumer::RecordBatch;
use crate::coordinator::Coordinator;
use crate::error::{Error, ErrorCode, ErrorKind, Result};
use crate::group::{Member, Part};
use crate::locked;
use crate::producer::{Ack, Identity, Producer, ProducerBuilder};
use crate::record::Record;
use crate::retry::{Backoff, BackoffPolicy};

/// A transactional producer to be set up; made by
/// [`ProducerBuilder::transactional_id`](crate::ProducerBuilder::transactional_id).
#[derive(Clone, Debug)]
#[must_use = "nothing is set up before build()"]
pub struct TransactionalBuilder {
    producer: ProducerBuilder,
    transactional_id: String,
    timeout: Duration,
    retry_for: Duration,
}

impl TransactionalBuilder {
    pub(crate) fn new(producer: ProducerBuilder, transactional_id: String) -> Self {
        let timeout = Duration::from_secs(60);
        Self { producer, transactional_id, timeout, retry_for: Duration::from_secs(120) }
    }

    /// After how long the cluster aborts a transaction that was left open; 1 minute unless set. A producer that dies holds
    /// up readers of committed records for that long at most, or until its successor comes.
    pub fn transaction_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// For how long [`TransactionalProducer::transaction`] runs its closure again after abortable errors; 2 minutes unless
    /// set.
    pub fn retry_for(mut self, time: Duration) -> Self {
        self.retry_for = time;
        self
    }

    /// Asks for an identity. Whoever used the transactional id before is fenced, and what it left open is aborted.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for settings that make no sense; `INVALID_TRANSACTIONAL_ID`, `INVALID_TRANSACTION_TIMEOUT`;
    /// `TIMED_OUT` where no broker answers.
    pub async fn build(self) -> Result<TransactionalProducer> {
        self.producer.check()?;
        if !self.producer.is_idempotent() {
            return Err(Error::new(
                ErrorCode::InvalidRequest,
                "a transactional producer is idempotent, with acks=quorum; leave both as they are",
            ));
        }
        let timeout_ms =
            i32::try_from(self.timeout.as_millis()).ok().filter(|millis| *millis > 0).ok_or_else(|| {
                Error::new(ErrorCode::InvalidTransactionTimeout, "a transaction's timeout must be 1 ms to 24 days")
            })?;
        let id = self.transactional_id;
        let coordinator = Coordinator::new(self.producer.cluster().clone(), CoordinatorKind::Transaction, id.clone());
        let mut sequel = TransactionId { coordinator, id: id.clone(), timeout_ms, identity: None, fenced: None };
        let identity = sequel.init().await?;
        let producer = self.producer.start(Some(identity), Some(id));
        let begun = AtomicBool::new(false);
        Ok(TransactionalProducer { producer, sequel, open: false, begun, retry_for: self.retry_for })
    }
}

/// The transactional id and where it stands.
#[derive(Debug)]
struct TransactionId {
    coordinator: Coordinator,
    id: String,
    timeout_ms: i32,
    /// That of the transaction that is open, or comes next; none where it is not known.
    identity: Option<Identity>,
    /// Another producer has the id, or an operator took it away: asking for a new identity would fence that one in turn.
    fenced: Option<Error>,
}

impl TransactionId {
    /// A new identity: everything that was begun under an older one is over.
    async fn init(&mut self) -> Result<Identity> {
        if let Some(fenced) = &self.fenced {
            return Err(fenced.clone());
        }
        let request = pb::InitTransactionsRequest { transactional_id: self.id.clone(), timeout_ms: self.timeout_ms };
        let answer = self
            .coordinator
            .call(|channel| {
                let request = request.clone();
                async move { TransactionsClient::new(channel).init_transactions(request).await }
            })
            .await
            .inspect_err(|error| self.note(error))?;
        self.take(answer.producer_id, answer.producer_epoch)
    }

    /// Remembers that this producer is fenced.
    fn note(&mut self, error: &Error) {
        if error.code() == ErrorCode::ProducerFenced {
            self.fenced = Some(error.clone());
        }
    }

    fn take(&mut self, producer_id: i64, epoch: i32) -> Result<Identity> {
        let epoch = i16::try_from(epoch).map_err(|_| {
            Error::new(ErrorCode::Internal, "the broker gave a producer epoch that is no 16-bit number; report this")
        })?;
        let identity = Identity { producer_id: ProducerId::new(producer_id), epoch: ProducerEpoch::new(epoch) };
        self.identity = Some(identity);
        Ok(identity)
    }

    fn reference(&self, identity: Identity) -> pb::TransactionRef {
        pb::TransactionRef {
            transactional_id: self.id.clone(),
            producer_id: identity.producer_id.get(),
            producer_epoch: identity.epoch.get().into(),
        }
    }

    /// Decides the transaction, and takes the next one's identity.
    async fn end(&mut self, identity: Identity, commit: bool) -> Result<Identity> {
        let request = pb::EndTransactionRequest { transaction: Some(self.reference(identity)), commit };
        // Where it is not answered, or nobody waits for the answer, nobody knows which identity comes next.
        self.identity = None;
        let answer = self
            .coordinator
            .call(|channel| {
                let request = request.clone();
                async move { TransactionsClient::new(channel).end_transaction(request).await }
            })
            .await;
        let answer = answer.inspect_err(|error| {
            self.note(error);
            if error.kind() == ErrorKind::Abortable {
                self.identity = Some(identity);
            }
        })?;
        self.take(answer.producer_id, answer.producer_epoch)
    }
}

/// Stores records in transactions: all of one or none, whatever dies in between. Readers with
/// [`Isolation::ReadCommitted`](crate::Isolation::ReadCommitted) see them once they are committed.
///
/// ```no_run
/// # async fn run(client: flowstone_client::Client) -> flowstone_client::Result<()> {
/// use flowstone_client::Record;
/// let mut group = client.group("billing").topics(["orders"]).join().await?;
/// let mut tx = client.producer().transactional_id("billing-0").build().await?;
/// while let Some(batch) = group.next_batch().await {
///     let batch = batch?;
///     tx.transaction(async |t| {
///         for order in &batch {
///             t.send(Record::to("bills").value(order.value_bytes().unwrap_or_default())).await?;
///         }
///         t.consumed(&batch);
///         Ok(())
///     })
///     .await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TransactionalProducer {
    producer: Producer,
    sequel: TransactionId,
    /// A transaction was begun and neither committed nor aborted.
    open: bool,
    /// The cluster may know of it: a record was taken in, or offsets were.
    begun: AtomicBool,
    retry_for: Duration,
}

impl TransactionalProducer {
    /// Runs `body` within a transaction, and commits what it did. Where that fails in a way that costs the transaction but
    /// not the producer ([`ErrorKind::Abortable`], or a passing fault before the transaction was decided), it is aborted and
    /// `body` runs again, as long as the batches that it [consumed](Transaction::consumed) are still this member's. Any
    /// other error aborts and is returned; so is what `body` itself makes of things.
    ///
    /// # Errors
    /// What `body` returns; an abortable error (of which the transaction is aborted: nothing of it counts) where a batch is
    /// another member's by now, who reads it again, or the time for another attempt is over. Fatal: `PRODUCER_FENCED` where
    /// another producer took the transactional id, or an operator aborted the transaction; `MESSAGE_TOO_LARGE` and its like
    /// for a record that no attempt would store. `TIMED_OUT` where the coordinator did not answer whether the transaction is
    /// committed: it is, as a whole, or it is not, and whoever reads on from what the group has committed finds out.
    ///
    /// After an error the batches that it consumed are not consumed. To go on with the next ones would leave them out, but
    /// for `NOT_ASSIGNED`, where another member reads them: run the transaction again, seek back to where they began, or
    /// end, and begin anew where the group is.
    pub async fn transaction<T>(&mut self, mut body: impl AsyncFnMut(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + self.retry_for;
        let mut backoff = Backoff::new(BackoffPolicy::REQUEST);
        loop {
            let transaction = loop {
                match self.begin().await.map(drop) {
                    // Nothing is under way yet that could be in doubt.
                    Err(error) if error.is_retriable() => {
                        let wait = backoff.failed();
                        if Instant::now() + wait >= deadline {
                            return Err(error);
                        }
                        tokio::time::sleep(wait).await;
                    }
                    Err(error) => return Err(error),
                    Ok(()) => break Transaction { producer: self, consumed: Mutex::default() },
                }
            };
            let done = body(&transaction).await;
            let (error, owned) = match done {
                Ok(value) => match transaction.finish().await {
                    Ok(()) => return Ok(value),
                    Err(Unfinished::Aborted { error, owned }) => (error, owned),
                    Err(Unfinished::Fatal(error)) => return Err(error),
                },
                Err(error) => {
                    // A record that could not be taken in is told as what it is: why the transaction is spoiled.
                    let error = transaction.producer.producer.core().spoiled().unwrap_or(error);
                    let owned = transaction.is_owned();
                    transaction.abort().await?;
                    (aborted_by(error), owned)
                }
            };
            let wait = backoff.failed();
            if error.kind() != ErrorKind::Abortable || !owned || Instant::now() + wait >= deadline {
                return Err(error);
            }
            tracing::debug!(%error, "the transaction was aborted, and runs again");
            tokio::time::sleep(wait).await;
        }
    }

    /// Begins a transaction. One that was left open before is aborted first.
    ///
    /// # Errors
    /// `PRODUCER_FENCED` where another producer took the transactional id; `TIMED_OUT` where the coordinator does not
    /// answer.
    pub async fn begin(&mut self) -> Result<Transaction<'_>> {
        if self.open {
            self.roll_back().await?;
        }
        if self.sequel.identity.is_none() {
            let identity = self.sequel.init().await?;
            self.next(identity);
        }
        self.open = true;
        Ok(Transaction { producer: self, consumed: Mutex::default() })
    }

    /// Ends what is open, without any of it.
    async fn roll_back(&mut self) -> Result<()> {
        let core = self.producer.core().clone();
        core.give_up_transaction();
        // Whatever was under way is told to have failed, and cannot count any more once the epoch is raised.
        let _ = self.producer.flush().await;
        let identity = match self.sequel.identity {
            Some(identity) if !self.begun.load(Ordering::SeqCst) => Ok(identity),
            Some(identity) => self.sequel.end(identity, false).await,
            None => self.sequel.init().await,
        };
        let identity = match identity {
            // It was not used for so long that the cluster forgot it, or it was decided before, whichever way.
            Err(error)
                if matches!(error.code(), ErrorCode::UnknownTransaction | ErrorCode::InvalidTransactionState) =>
            {
                self.sequel.init().await?
            }
            other => other?,
        };
        self.next(identity);
        Ok(())
    }

    /// What was open is over.
    fn next(&mut self, identity: Identity) {
        self.producer.core().begin_transaction(identity);
        self.begun.store(false, Ordering::SeqCst);
        self.open = false;
    }

    /// Aborts what is open, and ends the producer.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub async fn close(mut self, timeout: Duration) -> Result<()> {
        let rolled_back = match self.open {
            true => tokio::time::timeout(timeout, self.roll_back()).await.unwrap_or_else(|_| {
                Err(Error::unreachable("the transaction was not aborted in time; the cluster does so by its timeout"))
            }),
            false => Ok(()),
        };
        self.producer.close(timeout).await?;
        rolled_back
    }
}

/// A transaction that is open. Dropping it leaves it to be aborted: by the producer's next [`begin`], its
/// [`close`], its successor, or its timeout.
///
/// [`begin`]: TransactionalProducer::begin
/// [`close`]: TransactionalProducer::close
#[derive(Debug)]
#[must_use = "what is not committed is aborted"]
pub struct Transaction<'a> {
    producer: &'a mut TransactionalProducer,
    /// Guards the map alone.
    consumed: Mutex<Consumed>,
}

/// Next offset by topic id and partition, with the serial of the time for which the member owned it.
type Offsets = BTreeMap<Part, (i64, u64)>;

/// By group and member: whose batches they were, and the next offset of each partition.
#[derive(Debug, Default)]
struct Consumed {
    members: BTreeMap<(String, String), (Member, Offsets)>,
}

impl Consumed {
    fn is_owned(&self) -> bool {
        self.members.values().all(|(member, offsets)| owner(member, offsets).is_some())
    }
}

/// Who may commit these: the member's id and its epoch, where it has owned them ever since it read them.
fn owner(member: &Member, offsets: &Offsets) -> Option<(String, i32)> {
    member.owner(offsets.iter().map(|(part, (_, serial))| (part, *serial)))
}

/// Why a transaction did not commit.
enum Unfinished {
    /// Nothing of it counts, for an abortable reason; `owned`: all that it consumed is still the member's.
    Aborted { error: Error, owned: bool },
    /// Another attempt is of no use, or nobody knows whether it is committed.
    Fatal(Error),
}

/// Why the transaction is aborted: a passing fault costs the transaction, and no more.
fn aborted_by(error: Error) -> Error {
    if !error.is_retriable() {
        return error;
    }
    let message = format!("the transaction was aborted ({error}); run it again");
    Error::new(ErrorCode::TransactionAborted, message).caused_by(error)
}

impl Transaction<'_> {
    /// As [`Producer::send`], within the transaction: the [`Ack`] tells where the record lies, and committing tells whether
    /// it counts.
    ///
    /// # Errors
    /// As [`Producer::send`]; an abortable one after any record of the transaction failed.
    pub async fn send(&self, record: Record<'_>) -> Result<Ack> {
        // Before it is known to be taken in: what is sent by then may reach a broker.
        self.producer.begun.store(true, Ordering::SeqCst);
        self.producer.producer.send(record).await
    }

    /// As [`Producer::flush`]: waits until every record taken in so far is acknowledged or failed.
    ///
    /// # Errors
    /// As [`Producer::flush`].
    pub async fn flush(&self) -> Result<()> {
        self.producer.producer.flush().await
    }

    /// The offsets behind this batch become the group's when the transaction commits; never otherwise: from now on the
    /// group's own commits leave its partition alone.
    ///
    /// A batch that no group handed out has no offsets to commit, and is passed over.
    pub fn consumed(&self, batch: &RecordBatch) {
        let Some(member) = batch.member() else { return };
        let part = (batch.topic_id().clone(), batch.partition());
        member.in_transactions(&part);
        let mut consumed = locked(&self.consumed);
        let (_, offsets) = consumed.members.entry(member.name()).or_insert_with(|| (member.clone(), BTreeMap::new()));
        // Of two times for which it was owned, the earlier fails the transaction.
        let (offset, serial) = offsets.entry(part).or_insert((0, member.serial()));
        *offset = batch.next_offset().max(*offset);
        *serial = member.serial().min(*serial);
    }

    /// Whether every batch consumed is still the member's that read it.
    fn is_owned(&self) -> bool {
        locked(&self.consumed).is_owned()
    }

    /// Waits until every record is acknowledged, then commits: when this returns `Ok`, all of it counts, whatever dies.
    ///
    /// # Errors
    /// Where it did not: an abortable error (the transaction is aborted by then, and may be tried again),
    /// `PRODUCER_FENCED`, or `TIMED_OUT` where the coordinator's answer never came and nobody knows yet; others for a record
    /// that cannot be stored, of which the transaction is aborted too.
    pub async fn commit(self) -> Result<()> {
        self.finish().await.map_err(|unfinished| match unfinished {
            Unfinished::Aborted { error, .. } | Unfinished::Fatal(error) => error,
        })
    }

    /// Commits; aborts where that fails.
    async fn finish(self) -> std::result::Result<(), Unfinished> {
        let prepared = self.prepare().await;
        let owned = self.is_owned();
        let producer = self.producer;
        let error = match (prepared, producer.sequel.identity) {
            (Err(error), _) => error,
            (Ok(()), Some(identity)) if !producer.begun.load(Ordering::SeqCst) => {
                producer.next(identity);
                return Ok(());
            }
            (Ok(()), Some(identity)) => match producer.sequel.end(identity, true).await {
                Ok(identity) => {
                    producer.next(identity);
                    return Ok(());
                }
                // It is over, and not committed: another identity, and it may be tried again.
                Err(error) if error.kind() == ErrorKind::Abortable => error,
                Err(error) => return Err(Unfinished::Fatal(error)),
            },
            (Ok(()), None) => return Err(Unfinished::Fatal(Error::closed("transaction"))),
        };
        match producer.roll_back().await {
            Ok(()) => Err(Unfinished::Aborted { error: aborted_by(error), owned }),
            Err(fatal) => Err(Unfinished::Fatal(fatal)),
        }
    }

    /// Everything but the decision: all records acknowledged, all offsets taken in.
    async fn prepare(&self) -> Result<()> {
        let core = self.producer.producer.core();
        let flushed = self.producer.producer.flush().await;
        if let Some(error) = core.spoiled() {
            return Err(error);
        }
        flushed?;
        let Some(identity) = self.producer.sequel.identity else { return Err(Error::closed("transaction")) };
        let members: Vec<_> = locked(&self.consumed)
            .members
            .iter()
            .map(|((group, _), (member, offsets))| (group.clone(), member.clone(), offsets.clone()))
            .collect();
        for (group, member, offsets) in members {
            self.commit_offsets(identity, group, &member, offsets).await?;
        }
        Ok(())
    }

    async fn commit_offsets(&self, identity: Identity, group: String, member: &Member, offsets: Offsets) -> Result<()> {
        self.producer.begun.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + self.producer.sequel.coordinator.cluster().request_timeout();
        // A commit from before the first transaction must not come after this one, and take the position back.
        for part in offsets.keys() {
            tokio::time::timeout_at(deadline, member.commits_answered(part)).await.map_err(|_| {
                Error::unreachable(format!(
                    "an earlier commit of group {group} was not answered; is the cluster healthy?"
                ))
            })?;
        }
        let mut backoff = Backoff::new(BackoffPolicy::REQUEST);
        loop {
            let committed = self.commit_offsets_once(identity, &group, member, &offsets).await;
            let wait = backoff.failed();
            match committed {
                // The member was given more partitions meanwhile, and what it has it still has; or this will pass.
                Err(error)
                    if (error.code() == ErrorCode::StaleMemberEpoch || error.is_retriable())
                        && Instant::now() + wait < deadline => {}
                committed => return committed,
            }
            tokio::time::sleep(wait).await;
        }
    }

    async fn commit_offsets_once(
        &self,
        identity: Identity,
        group: &str,
        member: &Member,
        offsets: &Offsets,
    ) -> Result<()> {
        // Both at once: under this epoch the coordinator takes them, unless they were given away since.
        let Some((member_id, member_epoch)) = owner(member, offsets) else {
            let message =
                "what the transaction consumed is another member's by now, who reads it again; go on with the next";
            return Err(Error::new(ErrorCode::NotAssigned, message));
        };
        let offset = |((topic_id, partition), (offset, _)): (&Part, &(i64, u64))| pb::CommitOffset {
            topic_id: topic_id.clone(),
            partition: *partition,
            offset: *offset,
            leader_epoch: -1,
            metadata: String::new(),
        };
        let request = pb::CommitOffsetsRequest {
            group: group.to_owned(),
            member_id,
            member_epoch,
            offsets: offsets.iter().map(offset).collect(),
            transaction: Some(self.producer.sequel.reference(identity)),
        };
        let coordinator: Arc<Coordinator> = member.coordinator();
        let answer = coordinator
            .call(|channel| {
                let request = request.clone();
                async move { GroupsClient::new(channel).commit_offsets(request).await }
            })
            .await?;
        match answer.errors.iter().find_map(|failed| failed.error.as_ref()) {
            Some(detail) => Err(Error::from_detail(detail)),
            None => Ok(()),
        }
    }

    /// Ends it without any of it. Records that are not acknowledged yet fail with `TRANSACTION_ABORTED`.
    ///
    /// # Errors
    /// `PRODUCER_FENCED` where another producer took the transactional id; `TIMED_OUT` where the coordinator does not
    /// answer: the transaction is aborted by its timeout at the latest.
    pub async fn abort(self) -> Result<()> {
        self.producer.roll_back().await
    }
}
