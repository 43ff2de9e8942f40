//! Consumer groups while brokers come and go.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flowstone_protocol::pb::coordinators_client::CoordinatorsClient;
use flowstone_protocol::pb::groups_client::GroupsClient;
use flowstone_protocol::pb::session_request::Request as Ask;
use flowstone_protocol::pb::session_response::Response as Told;
use flowstone_protocol::{Error, ErrorCode, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::world::*;

const GROUP: &str = "readers";
const PARTITIONS: i32 = 6;
/// Nobody is removed here, however slow the machine is.
const SESSION_TIMEOUT_MS: i32 = 120_000;
/// One call; a broker that was killed answers none.
const CALL_MAX: Duration = Duration::from_secs(5);

/// What all consumers together have seen.
#[derive(Default)]
struct Seen {
    /// Where brokers are.
    brokers: BTreeMap<i32, SocketAddr>,
    owners: HashMap<i32, String>,
    /// Counted by nobody twice.
    attempted: BTreeMap<i32, i64>,
    acknowledged: BTreeMap<i32, i64>,
    joins: usize,
    over: bool,
}

type Shared = Arc<Mutex<Seen>>;

fn channel(address: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{address}")).expect("an address").connect_lazy()
}

/// The coordinator as any broker that answers says.
async fn coordinator(seen: &Shared) -> SocketAddr {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let brokers: Vec<SocketAddr> = seen.lock().expect("no panic").brokers.values().copied().collect();
        for address in brokers {
            let request =
                pb::FindCoordinatorsRequest { kind: pb::CoordinatorKind::Group.into(), keys: vec![GROUP.to_owned()] };
            let mut client = CoordinatorsClient::new(channel(address));
            let Ok(Ok(found)) = tokio::time::timeout(CALL_MAX, client.find_coordinators(request)).await else {
                continue;
            };
            let found = found.into_inner().coordinators.remove(0).broker;
            let found = found.and_then(|found| seen.lock().expect("no panic").brokers.get(&found.broker_id).copied());
            if let Some(address) = found {
                return address;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("nobody knows a coordinator within {PATIENCE:?}");
}

/// A consumer that commits all the time, and goes on wherever its coordinator is.
async fn consume(id: String, topic: Topic, seen: Shared) {
    let (mut epoch, mut owned) = (0, BTreeSet::<i32>::new());
    while !seen.lock().expect("no panic").over {
        let address = coordinator(&seen).await;
        let (requests, receiver) = mpsc::channel(64);
        let join = pb::JoinGroup {
            group: GROUP.to_owned(),
            member_id: id.clone(),
            member_epoch: epoch,
            topics: vec![topic.name.clone()],
            session_timeout_ms: SESSION_TIMEOUT_MS,
            rebalance_timeout_ms: SESSION_TIMEOUT_MS,
            owned: shown(&topic, &owned),
            ..Default::default()
        };
        requests.send(pb::SessionRequest { request: Some(Ask::Join(join)) }).await.expect("room");
        let mut client = GroupsClient::new(channel(address));
        let Ok(Ok(answers)) = tokio::time::timeout(CALL_MAX, client.session(ReceiverStream::new(receiver))).await
        else {
            continue;
        };
        let mut answers = answers.into_inner();
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        let mut in_flight: HashMap<u64, Vec<(i32, i64)>> = HashMap::new();
        let mut next = 0;
        loop {
            let told = tokio::select! {
                told = answers.message() => told,
                _ = ticks.tick() => {
                    if seen.lock().expect("no panic").over {
                        return;
                    }
                    if epoch > 0 && !owned.is_empty() && in_flight.len() < 4 {
                        next += 1;
                        let offsets: Vec<(i32, i64)> = owned.iter().map(|number| (*number, attempt(&seen, *number))).collect();
                        let commit = pb::SessionCommit {
                            request_id: next,
                            member_epoch: epoch,
                            offsets: offsets.iter().map(|(number, offset)| at(&topic, *number, *offset)).collect(),
                        };
                        in_flight.insert(next, offsets);
                        drop(requests.try_send(pb::SessionRequest { request: Some(Ask::Commit(commit)) }));
                    }
                    continue;
                }
            };
            // A broken stream: the membership goes on elsewhere.
            let Ok(Some(pb::SessionResponse { response: Some(told) })) = told else { break };
            match told {
                Told::Joined(joined) => {
                    epoch = epoch.max(joined.member_epoch);
                    seen.lock().expect("no panic").joins += 1;
                }
                Told::Assignment(assignment) => {
                    let now: BTreeSet<i32> =
                        assignment.partitions.iter().flat_map(|topic| topic.partitions.iter().copied()).collect();
                    take_in(&seen, &id, &owned, &now);
                    (epoch, owned) = (assignment.member_epoch, now);
                    let report = pb::MemberHeartbeat {
                        owned: shown(&topic, &owned),
                        owned_set: true,
                        member_epoch: epoch,
                        subscription: None,
                    };
                    drop(requests.send(pb::SessionRequest { request: Some(Ask::Heartbeat(report)) }).await);
                }
                Told::Committed(committed) => {
                    let refused: BTreeSet<i32> = committed.errors.iter().map(|error| error.partition).collect();
                    let sent = in_flight.remove(&committed.request_id).unwrap_or_default();
                    let mut seen = seen.lock().expect("no panic");
                    for (number, offset) in sent.into_iter().filter(|(number, _)| !refused.contains(number)) {
                        let acknowledged = seen.acknowledged.entry(number).or_default();
                        *acknowledged = offset.max(*acknowledged);
                    }
                }
                Told::Heartbeat(_) => {}
                Told::Ended(error) => {
                    let error = Error::from_detail(&error);
                    assert!(error.is_retriable(), "{id}: {error:?}");
                    break;
                }
            }
        }
    }
}

fn attempt(seen: &Shared, number: i32) -> i64 {
    let mut seen = seen.lock().expect("no panic");
    let attempted = seen.attempted.entry(number).or_default();
    *attempted += 1;
    *attempted
}

/// What is owned now is nobody else's.
fn take_in(seen: &Shared, id: &str, before: &BTreeSet<i32>, now: &BTreeSet<i32>) {
    let mut seen = seen.lock().expect("no panic");
    for number in before.difference(now) {
        seen.owners.remove(number);
    }
    for number in now.difference(before) {
        let earlier = seen.owners.insert(*number, id.to_owned());
        assert_eq!(earlier, None, "partition {number} is consumed by two: {id}");
    }
}

fn shown(topic: &Topic, owned: &BTreeSet<i32>) -> Vec<pb::TopicPartitions> {
    let partitions = owned.iter().copied().collect();
    vec![pb::TopicPartitions { topic_id: topic.id.clone(), partitions, topic: String::new() }]
}

fn at(topic: &Topic, partition: i32, offset: i64) -> pb::CommitOffset {
    pb::CommitOffset { topic_id: topic.id.clone(), partition, offset, leader_epoch: -1, metadata: String::new() }
}

fn know(seen: &Shared, world: &World) {
    let brokers = world.running.iter().map(|(id, broker)| (*id, broker.client_addr)).collect();
    seen.lock().expect("no panic").brokers = brokers;
}

fn coordinates(world: &World, address: SocketAddr) -> i32 {
    *world.running.iter().find(|(_, broker)| broker.client_addr == address).expect("it runs").0
}

/// Consumers of one topic in a cluster whose group has one coordinator, with what they saw.
struct Consumers {
    topic: Topic,
    seen: Shared,
    running: tokio::task::JoinSet<()>,
}

impl Consumers {
    async fn of(world: &World) -> Consumers {
        let topic = world.any().create("orders", PARTITIONS, 3).await.expect("created");
        let seen = Shared::default();
        know(&seen, world);
        let mut consumers = Consumers { topic, seen, running: tokio::task::JoinSet::new() };
        consumers.join("a");
        consumers.join("b");
        consumers.progress("commits of all partitions").await;
        consumers
    }

    fn join(&mut self, id: &str) {
        self.running.spawn(consume(id.to_owned(), self.topic.clone(), Arc::clone(&self.seen)));
    }

    /// Waits until something was committed of every partition from here on.
    async fn progress(&self, what: &str) {
        let before = self.seen.lock().expect("no panic").acknowledged.clone();
        until(what, async || {
            let now = self.seen.lock().expect("no panic").acknowledged.clone();
            let moved = (0..PARTITIONS).all(|number| now.get(&number) > before.get(&number));
            if moved { Ok(()) } else { Err(format!("{before:?} {now:?}")) }
        })
        .await;
    }

    async fn even_shares(&self, members: usize) {
        until("even shares", async || {
            let owners = self.seen.lock().expect("no panic").owners.clone();
            let mut counts: BTreeMap<String, usize> = BTreeMap::new();
            for owner in owners.values() {
                *counts.entry(owner.clone()).or_default() += 1;
            }
            let least = PARTITIONS as usize / members;
            let even = counts.len() == members && counts.values().all(|count| (least..=least + 1).contains(count));
            if even && owners.len() == PARTITIONS as usize { Ok(()) } else { Err(format!("{counts:?}")) }
        })
        .await;
    }

    /// Ends them, and looks for whatever was acknowledged at the coordinator; says where that is.
    async fn end(mut self) -> (SocketAddr, usize) {
        self.seen.lock().expect("no panic").over = true;
        while let Some(ended) = self.running.join_next().await {
            ended.expect("no consumer saw what it must not");
        }
        let address = coordinator(&self.seen).await;
        let offsets = until("offsets", async || {
            let answer = GroupsClient::new(channel(address)).fetch_offsets(all_offsets()).await;
            answer.map_err(|status| status.to_string())
        })
        .await;
        let committed: BTreeMap<i32, i64> =
            offsets.into_inner().offsets.iter().map(|offset| (offset.partition, offset.offset)).collect();
        let seen = self.seen.lock().expect("no panic");
        for number in 0..PARTITIONS {
            let (acknowledged, attempted) = (seen.acknowledged[&number], seen.attempted[&number]);
            assert!((acknowledged..=attempted).contains(&committed[&number]), "{number}: {committed:?}");
        }
        (address, seen.joins)
    }
}

fn all_offsets() -> pb::FetchOffsetsRequest {
    pb::FetchOffsetsRequest { group: GROUP.to_owned(), ..Default::default() }
}

/// Three brokers, where one partition holds all groups.
async fn one_coordinator() -> World {
    let mut world = World::places(3).await;
    for id in 1..=3 {
        world.set(id, "cluster.internal_partitions", "1");
    }
    world.start_all(&[1, 2, 3]).await;
    world
}

#[tokio::test]
async fn a_coordinator_that_dies_during_joins_and_commits_takes_nothing_with_it() {
    let mut world = one_coordinator().await;
    let mut consumers = Consumers::of(&world).await;
    for (round, newcomer) in ["c", "d"].into_iter().enumerate() {
        // One joins while the coordinator dies.
        let dying = coordinates(&world, coordinator(&consumers.seen).await);
        consumers.join(newcomer);
        tokio::task::yield_now().await;
        world.kill(dying).await;
        know(&consumers.seen, &world);
        consumers.progress("commits by another coordinator").await;
        consumers.even_shares(3 + round).await;
        world.start(dying).await;
        know(&consumers.seen, &world);
    }
    let (address, joins) = consumers.end().await;
    assert!(joins >= 4 + 2, "sessions were gone on with: {joins}");
    // Others send there.
    let leader = coordinates(&world, address);
    let other = *world.running.keys().find(|id| **id != leader).expect("another one");
    let refused = until("a refusal that says where", async || {
        let mut client = GroupsClient::new(channel(world.running[&other].client_addr));
        let error = error_of(client.fetch_offsets(all_offsets()).await.expect_err("it does not coordinate"));
        if error.leader_hint.is_some() { Ok(error) } else { Err(error.to_string()) }
    })
    .await;
    assert_eq!(refused.code, ErrorCode::NotCoordinator);
    assert_eq!(refused.leader_hint.expect("a hint").0.get(), leader);
}

#[tokio::test]
async fn a_coordinator_that_hands_over_during_joins_and_commits_takes_nothing_with_it() {
    let world = one_coordinator().await;
    let mut consumers = Consumers::of(&world).await;
    world.healthy().await;
    let mut joins = 2;
    for (round, newcomer) in [Some("c"), None, Some("d"), None].into_iter().enumerate() {
        let before = coordinates(&world, coordinator(&consumers.seen).await);
        // One joins while commits of the others are under way.
        if let Some(id) = newcomer {
            consumers.join(id);
            joins += 1;
        }
        let to = before % 3 + 1;
        world.hand_over("__consumer_offsets", 0, to).await;
        consumers.progress("commits by another coordinator").await;
        consumers.even_shares(3 + round / 2).await;
    }
    let (_, seen) = consumers.end().await;
    assert!(seen > joins, "sessions were gone on with: {seen}");
}

/// Of partition 0, as the coordinator says.
async fn committed(address: SocketAddr) -> Result<Option<i64>, String> {
    let answer =
        GroupsClient::new(channel(address)).fetch_offsets(all_offsets()).await.map_err(|status| status.to_string())?;
    Ok(answer.into_inner().offsets.first().map(|offset| offset.offset))
}

#[tokio::test]
async fn the_groups_topic_follows_when_a_single_broker_becomes_three() {
    let mut world = World::places(1).await;
    world.set(1, "cluster.internal_partitions", "2");
    world.start(1).await;
    let topic = world.any().create("orders", 1, 1).await.expect("created");
    let seen = Shared::default();
    know(&seen, &world);
    let address = coordinator(&seen).await;
    let commit =
        pb::CommitOffsetsRequest { group: GROUP.to_owned(), offsets: vec![at(&topic, 0, 42)], ..Default::default() };
    until("a commit", async || {
        let answer = GroupsClient::new(channel(address)).commit_offsets(commit.clone()).await;
        answer.map(drop).map_err(|status| status.to_string())
    })
    .await;
    for id in 2..=3 {
        world.add_place(id).await;
        world.start(id).await;
    }
    until("three replicas", async || {
        let described = world.client(1).describe("__consumer_offsets").await.map_err(|error| error.to_string())?;
        let counts: Vec<usize> = described.partitions.iter().map(|partition| partition.replicas.len()).collect();
        if counts == [3, 3] { Ok(()) } else { Err(format!("{counts:?}")) }
    })
    .await;
    world.healthy().await;
    let address = coordinator(&seen).await;
    assert_eq!(until("what was committed", async || committed(address).await).await, Some(42));
}
