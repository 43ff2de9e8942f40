//! Calls and ranges.

use flowstone_protocol::Offset;
use flowstone_protocol::pb as client_pb;
use flowstone_replication::{Cleanness, PullWhat};
use tokio::sync::oneshot;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::service::Routes;
use tonic::transport::Server;

use super::super::wrong_port::{OnlyOn, Port};
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_answered_and_errors_come_whole() {
    let nodes = cluster(2, config()).await;
    let (client, address) = (nodes[0].network.client(), nodes[1].address.to_string());
    let hello = pb::HelloRequest { seeds: vec!["a:1".to_owned()], ..Default::default() };
    let hello = client.hello(&address, hello, LONG).await.expect("an answer");
    assert_eq!((hello.controller_id, hello.seeds), (1, vec!["a:1".to_owned()]));
    let registered = client.register(id(2), pb::RegisterRequest::default(), LONG).await.expect("an answer");
    assert_eq!(registered.metadata_replica_id, 1);
    let forward = pb::ForwardRequest { request: Bytes::from_static(b"all of it"), ..Default::default() };
    let forwarded = client.forward(id(2), forward, LONG).await.expect("an answer");
    assert_eq!(&forwarded.response[..], b"all of it");
    let report = client.report(id(2), pb::ReportRequest::default(), LONG).await.expect("an answer");
    assert_eq!(report.disk_free_bytes, 1);
    let error = client.broker_heartbeat(id(2), pb::BrokerHeartbeatRequest::default(), LONG).await;
    assert_eq!(error.expect_err("refused"), refused_by_calls());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_have_deadlines_and_say_whom_they_did_not_reach() {
    let nodes = cluster(2, config()).await;
    let client = nodes[0].network.client();
    // It never answers this one.
    let late = client.instruct(id(2), pb::InstructRequest::default(), Duration::from_millis(50)).await;
    let late = late.expect_err("too late");
    assert_eq!((late.code, late.is_retriable()), (ErrorCode::TimedOut, true));
    let unknown = client.report(id(7), pb::ReportRequest::default(), LONG).await.expect_err("not known");
    assert!(unknown.is_retriable() && unknown.message.contains("broker 7 is not known"), "{unknown}");
    let nowhere = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("bound");
    nodes[0].network.book().set_address(id(7), &nowhere.to_string());
    let down = client.report(id(7), pb::ReportRequest::default(), LONG).await.expect_err("nobody there");
    assert!(down.is_retriable() && down.message.contains("broker 7 cannot be reached"), "{down}");
    assert_eq!(down.code, ErrorCode::NoLeader, "certainly not sent: it may be asked elsewhere");
    // It takes what is sent, and dies.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let dying = tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut some = [0; 64];
            drop(tokio::io::AsyncReadExt::read(&mut connection, &mut some).await);
        }
    });
    nodes[0].network.book().set_address(id(7), &address);
    let broken = client.forward(id(7), pb::ForwardRequest::default(), LONG).await.expect_err("no answer");
    assert_eq!(broken.code, ErrorCode::TimedOut, "it may have been done: {broken}");
    dying.abort();
    let odd = client.hello("no address at all", pb::HelloRequest::default(), LONG).await.expect_err("no address");
    assert_eq!(odd.code, ErrorCode::InvalidConfig, "{odd}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_trusted_as_far_as_they_need_to_be() {
    let first = Node::start(identity(1), config()).await;
    let stranger = Node::start(PeerIdentity { cluster: None, ..identity(2) }, config()).await;
    stranger.knows(&first);
    let client = stranger.network.client();
    let address = first.address.to_string();
    client.hello(&address, pb::HelloRequest::default(), LONG).await.expect("anyone may ask that");
    let register = client.register(id(1), pb::RegisterRequest::default(), LONG).await.expect_err("of no cluster");
    assert!(register.message.contains("cluster.seeds"), "{register}");
    stranger.network.set_cluster(ClusterId::new(CLUSTER));
    client.register(id(1), pb::RegisterRequest::default(), LONG).await.expect("of the same cluster");
    let report = client.report(id(1), pb::ReportRequest::default(), LONG).await.expect_err("not registered");
    assert!(report.is_retriable() && report.message.contains("not registered"), "{report}");
    first.knows(&stranger);
    client.report(id(1), pb::ReportRequest::default(), LONG).await.expect("registered");
}

/// Answers pulls with what was asked for.
fn range(request: PullRequest) -> Result<PullAnswer, Error> {
    Ok(match request.what {
        PullWhat::Checkpoint => PullAnswer::Checkpoint {
            bytes: Bytes::from_static(b"a checkpoint"),
            first_index: RaftIndex::new(3),
            first_offset: Offset::new(5),
            local_start: (Offset::new(1), RaftIndex::new(2)),
        },
        PullWhat::Offsets { from, to, max_bytes, held } => PullAnswer::Offsets {
            bytes: Bytes::from(vec![from.get() as u8; max_bytes as usize]),
            next: to.plus(3),
            cleanness: Cleanness { clean_to: held.dropped_to, dropped_to: held.clean_to },
        },
        PullWhat::Batches { first, last, max_bytes } => PullAnswer::Batches {
            bytes: Bytes::from(vec![first.get() as u8; max_bytes as usize]),
            next: last.next(),
            commit: last,
        },
    })
}

async fn pull(node: &Node, from: BrokerId, what: PullWhat) -> Result<PullAnswer, Error> {
    let (reply, answer) = oneshot::channel();
    let tp = heartbeat(1).tp;
    node.network.pull(from, PullRequest { tp, of: ReplicaId::new(7), what }, Reply::from(reply));
    timeout(LONG, answer).await.expect("in time").expect("an answer, whatever happens")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_are_pulled() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let source = Node::start_on(listener, identity(2), config(), range);
    let asker = Node::start(identity(1), config()).await;
    asker.knows(&source);
    let refused = pull(&asker, id(2), PullWhat::Checkpoint).await.expect_err("not registered there");
    assert!(refused.is_retriable(), "{refused}");
    source.knows(&asker);
    let answer = pull(&asker, id(2), PullWhat::Checkpoint).await.expect("a checkpoint");
    let PullAnswer::Checkpoint { bytes, first_index, first_offset, local_start } = answer else { panic!("{answer:?}") };
    assert_eq!(local_start, (Offset::new(1), RaftIndex::new(2)));
    assert_eq!((&bytes[..], first_index, first_offset), (&b"a checkpoint"[..], RaftIndex::new(3), Offset::new(5)));
    let (from, to) = (Offset::new(5), Offset::new(9));
    let held = Cleanness { clean_to: Offset::new(21), dropped_to: Offset::new(20) };
    let answer = pull(&asker, id(2), PullWhat::Offsets { from, to, max_bytes: 100, held }).await.expect("batches");
    let PullAnswer::Offsets { bytes, next, cleanness } = answer else { panic!("{answer:?}") };
    assert_eq!((bytes, next), (vec![5; 100].into(), Offset::new(12)));
    assert_eq!(cleanness, Cleanness { clean_to: Offset::new(20), dropped_to: Offset::new(21) });
    let what = PullWhat::Batches { first: RaftIndex::new(7), last: RaftIndex::new(9), max_bytes: 3 << 20 };
    let answer = pull(&asker, id(2), what).await.expect("batches");
    let PullAnswer::Batches { bytes, next, commit } = answer else { panic!("{answer:?}") };
    assert_eq!(bytes, vec![7; 3 << 20]);
    assert_eq!((next, commit), (RaftIndex::new(10), RaftIndex::new(9)));
    let (asked, served) = (asker.network.figures().pulled_bytes, source.network.figures().served_bytes);
    assert_eq!((asked, served), ((3 << 20) + 112, (3 << 20) + 112));
    // Its own refusal comes as it was; nobody at all is an answer, too.
    let error = pull(&source, id(1), PullWhat::Checkpoint).await.expect_err("it has none");
    assert_eq!(error.code, ErrorCode::UnknownPartition);
    assert!(pull(&asker, id(8), PullWhat::Checkpoint).await.expect_err("not there").is_retriable());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_that_is_cut_off_is_answered() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent = Node::start_on(listener, identity(2), config(), range);
    // Its turns are all taken: it lets the pull wait until it is gone.
    let asker = Node::start(identity(1), PeerConfig { pull_timeout: Duration::from_millis(50), ..config() }).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let nobody = listener.local_addr().expect("bound").to_string();
    asker.knows_at(&silent, &nobody);
    let late = pull(&asker, id(2), PullWhat::Checkpoint).await.expect_err("accepted by nobody");
    assert!(late.is_retriable(), "{late}");
}

#[test]
fn a_pull_is_answered_though_the_runtime_ends() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let network = PeerNetwork::start(config(), identity(1), PeerBook::new(), runtime.handle().clone());
    let (reply, answer) = oneshot::channel();
    network.pull(
        id(2),
        PullRequest { tp: heartbeat(1).tp, of: ReplicaId::new(7), what: PullWhat::Checkpoint },
        Reply::from(reply),
    );
    drop(runtime);
    let error = answer.blocking_recv().expect("an answer").expect_err("not pulled");
    assert_eq!(error.code, ErrorCode::ShuttingDown);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_at_the_peer_port_is_told_where_to_go() {
    let node = Node::start(identity(1), config()).await;
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", node.address)).expect("an address");
    let mut client = client_pb::log_client::LogClient::new(endpoint.connect().await.expect("connected"));
    let status = client.metadata(client_pb::MetadataRequest::default()).await.expect_err("the wrong port");
    let error = Error::from_status(&status).expect("one of ours");
    assert_eq!(error.code, ErrorCode::Unsupported);
    assert!(error.message.contains("listen.client, client.test:7070"), "{error}");
}

/// Never reached.
#[derive(Clone)]
struct Nothing;

impl Service<http::Request<Body>> for Nothing {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<http::Response<Body>, std::convert::Infallible>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        panic!("it is not for this port")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_at_the_client_port_is_told_where_to_go() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let service = OnlyOn::new(Port::Client, "peer.test:7071", Nothing);
    let serving = tokio::spawn(Server::builder().serve_with_incoming(service, incoming));

    let mut node = Node::start(identity(1), config()).await;
    let error = node.network.client().hello(&address, pb::HelloRequest::default(), LONG).await.expect_err("wrong port");
    assert!(error.message.contains("listen.peer, peer.test:7071"), "{error}");
    // A stream neither.
    node.network.book().set_address(id(2), &address);
    node.network.send(id(2), vec![heartbeat(1)]);
    node.until(|told| matches!(told, Told::Unreachable(_))).await;
    serving.abort();

    // One that knows nothing of brokers at all.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let serving = tokio::spawn(Server::builder().serve_with_incoming(Routes::default().prepare(), incoming));
    let error = node.network.client().hello(&address, pb::HelloRequest::default(), LONG).await.expect_err("no broker");
    assert!(error.message.contains("no peer listener"), "{error}");
    serving.abort();
}
