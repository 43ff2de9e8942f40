//! A transactional producer, and readers of what is committed, that know the wire alone.

use std::collections::HashMap;

use bytes::Bytes;
use flowstone_protocol::batch::split_batches;
use flowstone_protocol::control::decode_marker;
use flowstone_protocol::pb::coordinators_client::CoordinatorsClient;
use flowstone_protocol::pb::transactions_client::TransactionsClient;
use flowstone_protocol::{
    Compression, Error, ErrorCode, ErrorKind, ProducerEpoch, ProducerId, RecordBatchBuilder, Sequence, Timestamp, pb,
    record,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use super::world::{Client, Topic, World, error_of, soon, until};

pub(crate) const READ_COMMITTED: i32 = pb::IsolationLevel::ReadCommitted as i32;

/// What is older goes, after a while.
pub(crate) fn present() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    Timestamp::new(since.as_millis() as i64)
}

/// One instance of a transactional producer.
#[derive(Clone, Debug)]
pub(crate) struct Transactor {
    pub(crate) id: String,
    pub(crate) producer: i64,
    pub(crate) epoch: i16,
    /// The next sequence of each partition, of this epoch.
    sequences: HashMap<(Bytes, i32), i32>,
}

pub(crate) fn channel(world: &World, id: i32) -> Channel {
    let address = world.running[&id].client_addr;
    Endpoint::from_shared(format!("http://{address}")).expect("an address").connect_lazy()
}

pub(crate) fn transactions(world: &World, id: i32) -> TransactionsClient<Channel> {
    TransactionsClient::new(channel(world, id))
}

/// The broker that coordinates a transactional id, as any that runs says.
pub(crate) async fn coordinator(world: &World, id: &str) -> i32 {
    until("a coordinator", async || {
        let ask = *world.running.keys().next().ok_or("nobody runs")?;
        let request =
            pb::FindCoordinatorsRequest { kind: pb::CoordinatorKind::Transaction.into(), keys: vec![id.to_owned()] };
        let found = CoordinatorsClient::new(channel(world, ask)).find_coordinators(request).await;
        let found = found.map_err(|status| status.to_string())?.into_inner().coordinators.remove(0);
        let broker = found.broker.ok_or_else(|| format!("{:?}", found.error))?.broker_id;
        if world.running.contains_key(&broker) { Ok(broker) } else { Err(format!("{broker} does not run")) }
    })
    .await
}

/// Asks the coordinator, whoever that is by then, as often as it may be asked again.
pub(crate) async fn at_coordinator<T>(
    world: &World,
    id: &str,
    call: impl AsyncFn(TransactionsClient<Channel>) -> Result<tonic::Response<T>, tonic::Status>,
) -> Result<T, Error> {
    until("an answer of the coordinator", async || {
        let broker = coordinator(world, id).await;
        match soon("the coordinator", call(transactions(world, broker))).await.map_err(error_of) {
            Ok(answer) => Ok(Ok(answer.into_inner())),
            Err(error) if error.kind == ErrorKind::Retriable || error.code == ErrorCode::Unspecified => {
                Err(error.to_string())
            }
            Err(error) => Ok(Err(error)),
        }
    })
    .await
}

impl Transactor {
    /// Takes the id over.
    pub(crate) async fn begin(world: &World, id: &str, timeout_ms: i32) -> Result<Transactor, Error> {
        let request = pb::InitTransactionsRequest { transactional_id: id.to_owned(), timeout_ms };
        let given =
            at_coordinator(world, id, async |mut client| client.init_transactions(request.clone()).await).await?;
        let epoch = i16::try_from(given.producer_epoch).expect("an epoch");
        Ok(Transactor { id: id.to_owned(), producer: given.producer_id, epoch, sequences: HashMap::new() })
    }

    pub(crate) fn reference(&self) -> pb::TransactionRef {
        pb::TransactionRef {
            transactional_id: self.id.clone(),
            producer_id: self.producer,
            producer_epoch: self.epoch.into(),
        }
    }

    /// One value as a transactional batch of this sequence.
    pub(crate) fn batch(&self, sequence: i32, value: &str) -> Bytes {
        let mut batch = RecordBatchBuilder::new(Compression::None)
            .producer(ProducerId::new(self.producer), ProducerEpoch::new(self.epoch), Sequence::new(sequence))
            .transactional();
        batch.append(present(), None, Some(value.as_bytes()), []).expect("fits");
        batch.build()
    }

    /// Writes one value in the transaction, at whoever leads the partition, until that says yes or no.
    pub(crate) async fn write(
        &mut self,
        world: &World,
        topic: &Topic,
        partition: i32,
        value: &str,
    ) -> Result<i64, Error> {
        let sequence = *self.sequences.get(&(topic.id.clone(), partition)).unwrap_or(&0);
        let request = self.request(topic, partition, self.batch(sequence, value));
        let written = until("an acknowledgement", async || {
            let mut why = "nobody runs".to_owned();
            for id in world.ids() {
                match produce(&mut world.client(id), request.clone()).await {
                    Ok(offset) => return Ok(Ok(offset)),
                    Err(error) if error.kind == ErrorKind::Retriable || error.code == ErrorCode::Unspecified => {
                        why = format!("broker {id}: {error}");
                    }
                    Err(error) => return Ok(Err(error)),
                }
            }
            Err(why)
        })
        .await?;
        self.sequences.insert((topic.id.clone(), partition), sequence + 1);
        Ok(written)
    }

    pub(crate) fn request(&self, topic: &Topic, partition: i32, batch: Bytes) -> pb::ProduceRequest {
        pb::ProduceRequest {
            request_id: 0,
            topic_id: topic.id.clone(),
            partition,
            acks: pb::Acks::Quorum.into(),
            batch,
            transactional_id: self.id.clone(),
        }
    }

    /// Ends the transaction; the next one follows.
    pub(crate) async fn end(&mut self, world: &World, commit: bool) -> Result<(), Error> {
        let request = pb::EndTransactionRequest { transaction: Some(self.reference()), commit };
        let next =
            at_coordinator(world, &self.id, async |mut client| client.end_transaction(request.clone()).await).await?;
        self.producer = next.producer_id;
        self.epoch = i16::try_from(next.producer_epoch).expect("an epoch");
        self.sequences.clear();
        Ok(())
    }
}

/// One request, answered by this very broker.
pub(crate) async fn produce(client: &mut Client, request: pb::ProduceRequest) -> Result<i64, Error> {
    let (requests, receiver) = mpsc::channel(1);
    requests.send(request).await.expect("room");
    let answers = soon("produce", client.log.produce(ReceiverStream::new(receiver))).await.map_err(error_of)?;
    let answer = soon("an answer", answers.into_inner().message()).await.map_err(error_of)?;
    let Some(answer) = answer else {
        return Err(Error::new(ErrorCode::ShuttingDown, "the stream ended"));
    };
    match &answer.results[0].error {
        Some(error) => Err(Error::from_detail(error)),
        None => Ok(answer.results[0].base_offset),
    }
}

/// High watermark and last stable offset of a partition, as its leader says.
pub(crate) async fn ends(world: &World, topic: &Topic, partition: i32) -> (i64, i64) {
    until("the ends", async || {
        let mut why = "nobody runs".to_owned();
        for id in world.ids() {
            let at = pb::offset_query::At::End(pb::offset_query::End {});
            let query = pb::OffsetQuery { topic_id: topic.id.clone(), partition, at: Some(at) };
            let request = pb::ListOffsetsRequest { queries: vec![query], linearizable: true };
            match soon("list offsets", world.client(id).log.list_offsets(request)).await {
                Ok(answer) => {
                    let answer = answer.into_inner().answers.remove(0);
                    match answer.error {
                        None => return Ok((answer.high_watermark, answer.last_stable_offset)),
                        Some(error) => why = format!("broker {id}: {}", error.message),
                    }
                }
                Err(status) => why = status.to_string(),
            }
        }
        Err(why)
    })
    .await
}

/// Waits until nothing is open in a partition.
pub(crate) async fn settled(world: &World, topic: &Topic, partition: i32) -> i64 {
    until("the last stable offset", async || match ends(world, topic, partition).await {
        (high_watermark, stable) if high_watermark == stable => Ok(stable),
        (high_watermark, stable) => Err(format!("{stable} of {high_watermark}")),
    })
    .await
}

/// What readers of what is committed see of a partition up to `end`, at any broker that leads it, or at this very one.
pub(crate) async fn committed(world: &World, at: Option<i32>, topic: &Topic, partition: i32, end: i64) -> Vec<String> {
    until("what is committed", async || {
        let mut why = "nobody runs".to_owned();
        for id in at.map_or_else(|| world.ids(), |id| vec![id]) {
            match read_committed(&mut world.client(id), topic, partition, end, at.is_some()).await {
                Ok(values) => return Ok(values),
                Err(error) => why = format!("broker {id}: {error}"),
            }
        }
        Err(why)
    })
    .await
}

pub(crate) fn position(topic: &Topic, partition: i32, any: bool, isolation: i32) -> pb::FetchPartition {
    pb::FetchPartition {
        fetch_id: 1,
        session: 1,
        topic_id: topic.id.clone(),
        partition,
        offset: 0,
        last_epoch: -1,
        from_any_replica: any,
        known_high_watermark: -1,
        isolation,
    }
}

async fn read_committed(
    client: &mut Client,
    topic: &Topic,
    partition: i32,
    end: i64,
    any: bool,
) -> Result<Vec<String>, Error> {
    let set = pb::FetchPartition { known_high_watermark: end, ..position(topic, partition, any, READ_COMMITTED) };
    let mut values = Vec::new();
    client
        .fetch(set, end, |answer| {
            let next = take(answer, &mut values);
            assert!(next <= answer.last_stable_offset, "{next} is above {}", answer.last_stable_offset);
            next
        })
        .await?;
    Ok(values)
}

/// Values that are committed in an answer; where it ends.
pub(crate) fn take(answer: &pb::FetchResponse, values: &mut Vec<String>) -> i64 {
    let mut aborted = answer.aborted.clone();
    let mut next = 0;
    for batch in split_batches(answer.batches.clone()) {
        let (header, batch) = batch.expect("whole batches");
        next = header.next_offset().get();
        let producer = header.producer_id.get();
        if header.attributes.is_control() {
            if decode_marker(&batch).is_ok_and(|marker| !marker.commit)
                && let Some(over) = aborted.iter().position(|it| it.producer_id == producer && it.first_offset < next)
            {
                aborted.remove(over);
            }
            continue;
        }
        let is_aborted = aborted.iter().any(|it| it.producer_id == producer && it.first_offset < next);
        if header.attributes.is_transactional() && is_aborted {
            continue;
        }
        for record in record::records(batch, 64 << 20).expect("valid") {
            let value = record.expect("valid").value.unwrap_or_default();
            values.push(String::from_utf8(value.to_vec()).expect("text"));
        }
    }
    next
}
