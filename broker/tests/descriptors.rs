//! A process without a free file descriptor: in a test program of its own, as the limit is the whole process's.

use std::fs::File;
use std::time::Duration;

use flowstone_broker::{Broker, Config};
use flowstone_protocol::pb::admin_client::AdminClient;
use flowstone_protocol::pb::log_client::LogClient;
use flowstone_protocol::{Compression, RecordBatchBuilder, Timestamp, pb};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

const PATIENCE: Duration = Duration::from_secs(60);
/// Enough for the test's program, a broker and a topic; few enough to use up.
const OPEN_FILES: u64 = 256;

#[tokio::test]
async fn no_descriptors_left_sheds_load_and_recovers() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(OPEN_FILES), maximum }).expect("lowered");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut config = Config::dev(dir.path().join("data"), 0);
    config.set_key("limits.open_files", &OPEN_FILES.to_string()).expect("a valid key");
    let broker = Broker::start(config).await.expect("the broker starts");
    let endpoint = Endpoint::from_shared(format!("http://{}", broker.client_addr)).expect("an address");
    let channel = endpoint.connect().await.expect("the broker listens");
    let mut admin = AdminClient::new(channel.clone());
    let mut log = LogClient::new(channel);
    let request = pb::CreateTopicRequest { name: "orders".to_owned(), ..Default::default() };
    let topic = admin.create_topic(request).await.expect("created").into_inner().topic.expect("described");
    let (requests, receiver) = mpsc::channel(1);
    let mut answers = log.produce(ReceiverStream::new(receiver)).await.expect("a stream").into_inner();
    let mut batch = RecordBatchBuilder::new(Compression::None);
    batch.append(Timestamp::new(1), None, Some(b"x"), []).expect("fits");
    let batch = batch.build();
    let mut produce = async |request_id| {
        let (topic_id, batch) = (topic.topic_id.clone(), batch.clone());
        let request = pb::ProduceRequest { request_id, topic_id, partition: 0, batch, ..Default::default() };
        requests.send(request).await.expect("the stream is open");
        let answer = tokio::time::timeout(PATIENCE, answers.message()).await.expect("in time");
        let result = answer.expect("the stream goes on").expect("an answer").results.remove(0);
        assert!(result.error.is_none(), "{:?}", result.error);
    };
    produce(0).await;

    // All but one are used up; the last one is the client's end of a connection, and the broker has none for its own.
    let mut used = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        used.push(file);
    }
    used.pop();
    let mut late = TcpStream::connect(broker.client_addr).await.expect("the system's queue takes it");
    assert!(File::open("/dev/null").is_err(), "nothing is left");
    // Who is connected is served meanwhile, again and again.
    for request in 1..=50 {
        produce(request).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut byte = [0];
    let nothing = tokio::time::timeout(Duration::from_millis(50), late.read(&mut byte)).await;
    assert!(nothing.is_err(), "it waits in the system's queue: {nothing:?}");

    drop(used);
    // The broker speaks first on an accepted connection: its HTTP/2 settings.
    let greeted = tokio::time::timeout(PATIENCE, late.read(&mut byte)).await.expect("accepted in the end");
    assert_eq!(greeted.expect("readable"), 1);
    produce(51).await;
    let deadline = Duration::from_secs(10);
    drop((admin, log, requests, late));
    broker.shutdown(deadline).await;
}
