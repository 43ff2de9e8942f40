//! Consumer groups: members join, share, commit, fall silent and come back; what is wrong is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use flowstone_protocol::pb::coordinators_client::CoordinatorsClient;
use flowstone_protocol::pb::groups_client::GroupsClient;
use flowstone_protocol::pb::session_request::Request as Ask;
use flowstone_protocol::pb::session_response::Response as Told;
use flowstone_protocol::{Error, ErrorCode, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use crate::http::get;
use crate::world::*;

const GROUP: &str = "readers";
/// Short, for those who fall silent.
const SHORT: &[(&str, &str)] = &[("cluster.internal_partitions", "2"), ("group.session_timeout_min", "100ms")];

async fn groups(world: &World) -> GroupsClient<Channel> {
    GroupsClient::new(channel(&world.broker).await)
}

/// Until the coordinator of the group is there.
async fn found(world: &World) {
    let mut coordinators = CoordinatorsClient::new(channel(&world.broker).await);
    until("a coordinator", async || {
        let request =
            pb::FindCoordinatorsRequest { kind: pb::CoordinatorKind::Group.into(), keys: vec![GROUP.to_owned()] };
        let found = coordinators.find_coordinators(request).await.expect("answered").into_inner();
        found.coordinators[0].broker.is_some().then_some(())
    })
    .await;
}

fn join(id: &str, topics: &[&str]) -> pb::JoinGroup {
    pb::JoinGroup {
        group: GROUP.to_owned(),
        member_id: id.to_owned(),
        topics: topics.iter().map(|topic| (*topic).to_owned()).collect(),
        ..Default::default()
    }
}

fn ask(request: Ask) -> pb::SessionRequest {
    pb::SessionRequest { request: Some(request) }
}

struct Member {
    asked: pb::JoinGroup,
    requests: mpsc::Sender<pb::SessionRequest>,
    answers: Streaming<pb::SessionResponse>,
    joined: pb::Joined,
    epoch: i32,
    /// Topic id and partition.
    owned: BTreeSet<(Bytes, i32)>,
    next: u64,
}

fn flat(partitions: &[pb::TopicPartitions]) -> BTreeSet<(Bytes, i32)> {
    partitions
        .iter()
        .flat_map(|topic| topic.partitions.iter().map(|number| (topic.topic_id.clone(), *number)))
        .collect()
}

fn shown(partitions: &BTreeSet<(Bytes, i32)>) -> Vec<pb::TopicPartitions> {
    let shown = partitions.iter().map(|(topic_id, number)| pb::TopicPartitions {
        topic_id: topic_id.clone(),
        partitions: vec![*number],
        topic: String::new(),
    });
    shown.collect()
}

impl Member {
    /// Joins, as often as the coordinator says that it is not ready.
    async fn join(world: &World, asked: pb::JoinGroup) -> Member {
        until("a membership", async || match Member::try_join(world, asked.clone()).await {
            Ok(member) => Some(member),
            Err(error) if error.is_retriable() => None,
            Err(error) => panic!("{error:?}"),
        })
        .await
    }

    async fn try_join(world: &World, asked: pb::JoinGroup) -> Result<Member, Error> {
        Member::join_over(channel(&world.broker).await, asked).await
    }

    async fn join_over(channel: Channel, asked: pb::JoinGroup) -> Result<Member, Error> {
        let (requests, receiver) = mpsc::channel(64);
        requests.send(ask(Ask::Join(asked.clone()))).await.expect("room");
        let mut groups = GroupsClient::new(channel);
        let answers = soon("a session", groups.session(ReceiverStream::new(receiver))).await;
        let mut answers = answers.map_err(|status| error_of(&status))?.into_inner();
        let first = soon("an answer", answers.message()).await.map_err(|status| error_of(&status))?;
        let Some(pb::SessionResponse { response: Some(Told::Joined(joined)) }) = first else { panic!("{first:?}") };
        let owned = flat(&asked.owned);
        Ok(Member { asked, requests, answers, epoch: joined.member_epoch, joined, owned, next: 0 })
    }

    async fn send(&self, request: Ask) {
        soon("room", self.requests.send(ask(request))).await.expect("the session goes on");
    }

    async fn told(&mut self) -> Told {
        let told = soon("an answer", self.answers.message()).await.expect("the stream goes on");
        told.expect("the stream goes on").response.expect("something")
    }

    /// Takes an assignment in, gives up at once what is to be given up, and says so.
    async fn take_in(&mut self, assignment: &pb::Assignment) {
        self.epoch = assignment.member_epoch;
        self.owned = flat(&assignment.partitions);
        self.report().await;
    }

    async fn report(&self) {
        let heartbeat = pb::MemberHeartbeat {
            owned: shown(&self.owned),
            owned_set: true,
            member_epoch: self.epoch,
            subscription: None,
        };
        self.send(Ask::Heartbeat(heartbeat)).await;
    }

    /// Takes in whatever it is told, until it owns so many.
    async fn until_owned(&mut self, count: usize) {
        while self.owned.len() != count {
            match self.told().await {
                Told::Assignment(assignment) => self.take_in(&assignment).await,
                Told::Heartbeat(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Commits on the stream; the errors.
    async fn commit(&mut self, offsets: Vec<pb::CommitOffset>) -> Vec<ErrorCode> {
        self.next += 1;
        let commit = pb::SessionCommit { request_id: self.next, member_epoch: self.epoch, offsets };
        self.send(Ask::Commit(commit)).await;
        loop {
            match self.told().await {
                Told::Committed(committed) => {
                    assert_eq!(committed.request_id, self.next);
                    let codes = committed.errors.iter().map(|error| error.error.as_ref().expect("an error").code());
                    return codes.collect();
                }
                Told::Assignment(assignment) => self.take_in(&assignment).await,
                Told::Heartbeat(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Why its membership ended.
    async fn ended(&mut self) -> Error {
        loop {
            match self.told().await {
                Told::Ended(error) => return Error::from_detail(&error),
                Told::Assignment(_) | Told::Heartbeat(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn again(&self) -> pb::JoinGroup {
        pb::JoinGroup { member_epoch: self.epoch, owned: shown(&self.owned), ..self.asked.clone() }
    }
}

fn at(topic: &Topic, partition: i32, offset: i64) -> pb::CommitOffset {
    pb::CommitOffset { topic_id: topic.id.clone(), partition, offset, leader_epoch: -1, metadata: String::new() }
}

async fn committed(world: &World, topic: &Topic, partition: i32) -> i64 {
    let wanted = pb::TopicPartitions { topic_id: topic.id.clone(), partitions: vec![partition], topic: String::new() };
    let request = pb::FetchOffsetsRequest { group: GROUP.to_owned(), partitions: vec![wanted], ..Default::default() };
    let answer = soon("offsets", groups(world).await.fetch_offsets(request)).await.expect("answered").into_inner();
    answer.offsets[0].offset
}

async fn described(world: &World) -> Result<pb::DescribeGroupResponse, Error> {
    let request = pb::DescribeGroupRequest { group: GROUP.to_owned() };
    let answer = soon("a description", groups(world).await.describe_group(request)).await;
    answer.map(tonic::Response::into_inner).map_err(|status| error_of(&status))
}

#[tokio::test]
async fn the_topic_behind_groups_is_made_when_it_is_first_needed() {
    let mut world = World::with(SHORT).await;
    let mut coordinators = CoordinatorsClient::new(channel(&world.broker).await);
    let code = |status: tonic::Status| error_of(&status).code;
    let nameless = pb::FindCoordinatorsRequest { kind: 0, keys: Vec::new() };
    let refused = coordinators.find_coordinators(nameless).await.map(drop).map_err(code);
    assert_eq!(refused, Err(ErrorCode::InvalidRequest));
    let many =
        pb::FindCoordinatorsRequest { kind: pb::CoordinatorKind::Group.into(), keys: vec![String::new(); 1_001] };
    assert_eq!(coordinators.find_coordinators(many).await.map(drop).map_err(code), Err(ErrorCode::InvalidRequest));
    // Nobody asked for it yet: who takes a broker for the coordinator is told to look first.
    assert_eq!(described(&world).await.expect_err("nobody coordinates").code, ErrorCode::NotCoordinator);
    found(&world).await;
    let topic = world.describe("__consumer_offsets").await;
    assert_eq!(topic.partitions.len(), 2);
    let keys = (0..20).map(|number| format!("group-{number}")).collect();
    let request = pb::FindCoordinatorsRequest { kind: pb::CoordinatorKind::Group.into(), keys };
    let found = coordinators.find_coordinators(request).await.expect("answered").into_inner().coordinators;
    assert_eq!(found.len(), 20);
    assert_eq!(found.iter().map(|found| found.partition).collect::<BTreeSet<_>>().len(), 2, "both are used");
    let delete = pb::DeleteTopicRequest { name: "__consumer_offsets".to_owned() };
    assert_eq!(world.admin.delete_topic(delete).await.map(drop).map_err(code), Err(ErrorCode::InternalTopic));
    assert_eq!(described(&world).await.expect_err("no such group").code, ErrorCode::UnknownGroup);
    world.stop().await;
}

#[tokio::test]
async fn members_share_and_commit_and_go() {
    let mut world = World::with(SHORT).await;
    let topic = world.create("orders", 4).await;
    found(&world).await;
    let mut a = Member::join(&world, join("a", &["orders"])).await;
    assert!(a.joined.heartbeat_interval_ms * 3 <= a.joined.session_timeout_ms);
    a.until_owned(4).await;
    assert_eq!(a.commit(vec![at(&topic, 0, 5), at(&topic, 3, 7)]).await, []);
    assert_eq!((committed(&world, &topic, 0).await, committed(&world, &topic, 1).await), (5, -1));

    let mut b = Member::join(&world, join("b", &["orders"])).await;
    a.until_owned(2).await;
    b.until_owned(2).await;
    assert!(a.owned.is_disjoint(&b.owned));
    let lost = b.owned.first().expect("two").1;
    assert_eq!(a.commit(vec![at(&topic, lost, 9)]).await, [ErrorCode::NotAssigned]);
    let group = until("a stable group", async || {
        let group = described(&world).await.expect("described");
        (group.state() == pb::GroupState::Stable).then_some(group)
    })
    .await;
    assert_eq!((group.members.len(), group.assignor.as_str()), (2, "cooperative"));
    assert_eq!(group.members[0].host, "127.0.0.1");
    assert_eq!(flat(&group.members[0].owned), a.owned);
    assert_eq!(group.members[0].owned[0].topic, "orders");
    assert_eq!(group.offsets.len(), 2);
    let listed = groups(&world).await.list_groups(pb::ListGroupsRequest {}).await.expect("listed").into_inner().groups;
    assert_eq!((listed.len(), listed[0].group.as_str(), listed[0].members), (1, GROUP, 2));
    let (_, metrics) = get(world.broker.admin_addr, "/metrics").await;
    for line in ["flowstone_groups 1", "flowstone_group_members 2", "flowstone_group_commits_total 2"] {
        assert!(metrics.lines().any(|found| found == line), "{line}");
    }

    // Neither is touched while somebody consumes.
    let code = |status: tonic::Status| error_of(&status).code;
    let mut calls = groups(&world).await;
    let delete = || pb::DeleteGroupRequest { group: GROUP.to_owned() };
    assert_eq!(calls.delete_group(delete()).await.map(drop).map_err(code), Err(ErrorCode::GroupNotEmpty));
    let reset = |offset, dry_run| pb::ResetOffsetsRequest {
        group: GROUP.to_owned(),
        offsets: vec![at(&topic, 1, offset)],
        dry_run,
    };
    assert_eq!(calls.reset_offsets(reset(1, true)).await.map(drop).map_err(code), Err(ErrorCode::GroupNotEmpty));
    let alone =
        pb::CommitOffsetsRequest { group: GROUP.to_owned(), offsets: vec![at(&topic, 1, 1)], ..Default::default() };
    assert_eq!(calls.commit_offsets(alone.clone()).await.map(drop).map_err(code), Err(ErrorCode::GroupNotEmpty));

    // One goes, the other has everything; and then nobody is there.
    b.send(Ask::Leave(pb::LeaveGroup { keep_place: false })).await;
    a.until_owned(4).await;
    a.send(Ask::Leave(pb::LeaveGroup { keep_place: false })).await;
    until("an empty group", async || {
        let group = described(&world).await.expect("described");
        (group.state() == pb::GroupState::Empty).then_some(())
    })
    .await;
    assert!(calls.commit_offsets(alone).await.expect("taken").into_inner().errors.is_empty());
    assert!(calls.reset_offsets(reset(77, true)).await.expect("checked").into_inner().errors.is_empty());
    assert_eq!(committed(&world, &topic, 1).await, 1, "it was only checked");
    assert!(calls.reset_offsets(reset(77, false)).await.expect("set").into_inner().errors.is_empty());
    assert_eq!(committed(&world, &topic, 1).await, 77);
    assert!(calls.reset_offsets(reset(-1, false)).await.expect("removed").into_inner().errors.is_empty());
    assert_eq!(committed(&world, &topic, 1).await, -1);
    calls.delete_group(delete()).await.expect("deleted");
    assert_eq!(described(&world).await.expect_err("gone").code, ErrorCode::UnknownGroup);
    world.stop().await;
}

#[tokio::test]
async fn commits_that_are_wrong_are_refused_each_alone() {
    let mut world = World::with(SHORT).await;
    let topic = world.create("orders", 2).await;
    let other = world.create("others", 1).await;
    found(&world).await;
    let mut a = Member::join(&world, join("a", &["orders"])).await;
    a.until_owned(2).await;
    let nowhere = Topic { name: "nowhere".to_owned(), id: vec![7; 16].into() };
    let offsets = vec![
        at(&topic, 0, 5),
        at(&nowhere, 0, 5),
        at(&topic, 2, 5),
        at(&topic, -1, 5),
        at(&Topic { name: String::new(), id: vec![1, 2].into() }, 0, 5),
        at(&other, 0, 5),
        at(&topic, 1, -2),
        pb::CommitOffset { metadata: "x".repeat(4097), ..at(&topic, 1, 5) },
    ];
    let mut refused = a.commit(offsets).await;
    refused.sort_unstable();
    let mut wanted = vec![
        ErrorCode::UnknownTopic,
        ErrorCode::UnknownPartition,
        ErrorCode::UnknownPartition,
        ErrorCode::InvalidRequest,
        ErrorCode::NotAssigned,
        ErrorCode::InvalidRequest,
        ErrorCode::OffsetMetadataTooLarge,
    ];
    wanted.sort_unstable();
    assert_eq!(refused, wanted);
    assert_eq!((committed(&world, &topic, 0).await, committed(&world, &topic, 1).await), (5, -1));
    // Of another epoch, all are.
    let epoch = a.epoch;
    a.epoch = epoch - 1;
    assert_eq!(a.commit(vec![at(&topic, 0, 6), at(&topic, 1, 6)]).await, [ErrorCode::StaleMemberEpoch; 2]);
    let code = |status: tonic::Status| error_of(&status).code;
    let mut calls = groups(&world).await;
    for (member, member_epoch, wanted) in
        [("a", epoch + 1, ErrorCode::StaleMemberEpoch), ("nobody", epoch, ErrorCode::UnknownMember)]
    {
        let commit = pb::CommitOffsetsRequest {
            group: GROUP.to_owned(),
            member_id: member.to_owned(),
            member_epoch,
            offsets: vec![at(&topic, 0, 6)],
            transaction: None,
        };
        assert_eq!(calls.commit_offsets(commit).await.map(drop).map_err(code), Err(wanted), "{member}");
        let fetch = pb::FetchOffsetsRequest {
            group: GROUP.to_owned(),
            member_id: member.to_owned(),
            member_epoch,
            ..Default::default()
        };
        assert_eq!(calls.fetch_offsets(fetch).await.map(drop).map_err(code), Err(wanted), "{member}");
    }
    let transaction = pb::TransactionRef { transactional_id: String::new(), producer_id: 1, producer_epoch: 0 };
    let commit =
        pb::CommitOffsetsRequest { group: GROUP.to_owned(), transaction: Some(transaction), ..Default::default() };
    assert_eq!(calls.commit_offsets(commit).await.map(drop).map_err(code), Err(ErrorCode::InvalidRequest));
    assert_eq!(committed(&world, &topic, 0).await, 5);
    world.stop().await;
}

#[tokio::test]
async fn joins_that_are_wrong_are_refused_with_what_to_do() {
    let world = World::with(&[("cluster.internal_partitions", "1"), ("group.members", "1")]).await;
    found(&world).await;
    let rows: Vec<(&str, pb::JoinGroup, ErrorCode, &str)> = vec![
        ("no group", pb::JoinGroup { group: String::new(), ..join("a", &[]) }, ErrorCode::InvalidGroup, "name"),
        ("long", pb::JoinGroup { group: "g".repeat(250), ..join("a", &[]) }, ErrorCode::InvalidGroup, "249"),
        ("control", pb::JoinGroup { group: "a\nb".into(), ..join("a", &[]) }, ErrorCode::InvalidGroup, "control"),
        ("no id", join("", &[]), ErrorCode::InvalidRequest, "UUID"),
        ("long id", join(&"m".repeat(250), &[]), ErrorCode::InvalidRequest, "member id"),
        ("topic", join("a", &["a/b"]), ErrorCode::InvalidTopicName, "subscription"),
        (
            "pattern",
            pb::JoinGroup { topic_pattern: "(((a{100}){100}){100})".into(), ..join("a", &[]) },
            ErrorCode::InvalidPattern,
            "repetitions",
        ),
        ("assignor", pb::JoinGroup { assignor: "fair".into(), ..join("a", &[]) }, ErrorCode::InvalidRequest, "range"),
        (
            "short session",
            pb::JoinGroup { session_timeout_ms: 10, ..join("a", &[]) },
            ErrorCode::InvalidRequest,
            "group.session_timeout_min",
        ),
        (
            "long session",
            pb::JoinGroup { session_timeout_ms: i32::MAX, ..join("a", &[]) },
            ErrorCode::InvalidRequest,
            "group.session_timeout_max",
        ),
        (
            "rebalance",
            pb::JoinGroup { rebalance_timeout_ms: -1, ..join("a", &[]) },
            ErrorCode::InvalidRequest,
            "rebalance timeout",
        ),
        ("unknown", pb::JoinGroup { member_epoch: 4, ..join("a", &[]) }, ErrorCode::UnknownMember, "anew"),
    ];
    for (what, asked, code, part) in rows {
        let joined = until(what, async || match Member::try_join(&world, asked.clone()).await {
            Err(error) if error.is_retriable() => None,
            joined => Some(joined.map(|_| ())),
        })
        .await;
        assert_refused(joined, code, part);
    }
    // A session begins with `join`, and has one.
    let (requests, receiver) = mpsc::channel(4);
    requests.send(ask(Ask::Heartbeat(pb::MemberHeartbeat::default()))).await.expect("room");
    let mut answers = groups(&world).await.session(ReceiverStream::new(receiver)).await.expect("a stream").into_inner();
    let refused = soon("an answer", answers.message()).await.map_err(|status| error_of(&status));
    assert_refused(refused, ErrorCode::InvalidRequest, "join");
    let mut a = Member::join(&world, join("a", &[])).await;
    a.send(Ask::Join(join("b", &[]))).await;
    assert_eq!(a.ended().await.code, ErrorCode::InvalidRequest);
    // The group has one member, its limit.
    let second = Member::try_join(&world, join("b", &[])).await.map(|_| ());
    assert_refused(second, ErrorCode::GroupFull, "group.members");
    world.stop().await;
}

#[tokio::test]
async fn a_member_that_falls_silent_is_removed_and_fenced() {
    let mut world = World::with(SHORT).await;
    let topic = world.create("orders", 2).await;
    found(&world).await;
    let quick = pb::JoinGroup { session_timeout_ms: 300, ..join("quick", &["orders"]) };
    let mut silent = Member::join(&world, quick).await;
    silent.until_owned(2).await;
    let mut other = Member::join(&world, join("other", &["orders"])).await;
    // Its stream stays open, as that of a process that was stopped; it says nothing.
    other.until_owned(2).await;
    assert_eq!(silent.ended().await.code, ErrorCode::UnknownMember);
    // It goes on and does not know: what it commits is refused.
    let commit = pb::CommitOffsetsRequest {
        group: GROUP.to_owned(),
        member_id: "quick".to_owned(),
        member_epoch: silent.epoch,
        offsets: vec![at(&topic, 0, 3)],
        transaction: None,
    };
    let refused = groups(&world).await.commit_offsets(commit).await.map_err(|status| error_of(&status).code);
    assert_eq!(refused.map(drop), Err(ErrorCode::UnknownMember));
    let back = Member::try_join(&world, silent.again()).await.map(|_| ());
    assert_refused(back, ErrorCode::UnknownMember, "epoch 0");
    assert_eq!(other.commit(vec![at(&topic, 0, 4)]).await, []);
    assert_eq!(committed(&world, &topic, 0).await, 4);
    world.stop().await;
}

#[tokio::test]
async fn a_member_that_keeps_what_it_is_asked_for_is_removed() {
    let mut world = World::with(SHORT).await;
    world.create("orders", 2).await;
    found(&world).await;
    let slow = pb::JoinGroup { rebalance_timeout_ms: 300, ..join("slow", &["orders"]) };
    let mut slow = Member::join(&world, slow).await;
    slow.until_owned(2).await;
    let mut other = Member::join(&world, join("other", &["orders"])).await;
    // It lives, and says that it owns what it has.
    let keeps = async {
        loop {
            let lives = pb::MemberHeartbeat {
                owned: shown(&slow.owned),
                owned_set: true,
                member_epoch: slow.epoch,
                subscription: None,
            };
            // Fails once the session has ended; what is told then says why.
            drop(slow.requests.send(ask(Ask::Heartbeat(lives))).await);
            match slow.told().await {
                Told::Ended(error) => return Error::from_detail(&error),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let (ended, ()) = tokio::join!(soon("its end", keeps), other.until_owned(2));
    assert_eq!(ended.code, ErrorCode::UnknownMember);
    // Also where its next heartbeat finds it gone before its session is told to end.
    assert!(ended.message.contains("did not give up in time"), "{}", ended.message);
    world.stop().await;
}

#[tokio::test]
async fn a_lost_session_is_gone_on_with() {
    let mut world = World::with(SHORT).await;
    let topic = world.create("orders", 4).await;
    found(&world).await;
    let mut a = Member::join(&world, join("a", &["orders"])).await;
    a.until_owned(4).await;
    let mut b = Member::join(&world, join("b", &["orders"])).await;
    a.until_owned(2).await;
    b.until_owned(2).await;
    let before = until("a stable group", async || {
        let group = described(&world).await.expect("described");
        (group.state() == pb::GroupState::Stable).then_some(group)
    })
    .await;
    let (asked, owned) = (a.again(), a.owned.clone());
    drop(a);
    let mut a = Member::join(&world, asked.clone()).await;
    assert_eq!(a.joined.member_epoch, asked.member_epoch);
    let Told::Assignment(assignment) = a.told().await else { panic!("no assignment") };
    assert_eq!(flat(&assignment.partitions), owned);
    assert_eq!(described(&world).await.expect("described").group_epoch, before.group_epoch, "nobody noticed");
    let mine = owned.first().expect("two").1;
    assert_eq!(a.commit(vec![at(&topic, mine, 3)]).await, []);
    // A second stream takes over from the first one, which may be dead and not know it.
    let mut second = Member::join(&world, a.again()).await;
    assert_eq!(a.ended().await.code, ErrorCode::StaleMemberEpoch);
    assert_eq!(second.commit(vec![at(&topic, mine, 4)]).await, []);
    // The broker starts anew: members and offsets are what they were.
    let asked = second.again();
    drop((a, b, second));
    let world = world.restart().await;
    let mut back = Member::join(&world, asked).await;
    let Told::Assignment(assignment) = back.told().await else { panic!("no assignment") };
    assert_eq!(flat(&assignment.partitions), owned);
    assert_eq!(back.commit(vec![at(&topic, mine, 5)]).await, []);
    assert_eq!(committed(&world, &topic, mine).await, 5);
    world.stop().await;
}

#[tokio::test]
async fn of_two_with_one_instance_id_the_later_one_has_the_place() {
    let mut world = World::with(SHORT).await;
    world.create("orders", 4).await;
    found(&world).await;
    let named = |id: &str| pb::JoinGroup { instance_id: "host-1".to_owned(), ..join(id, &["orders"]) };
    let mut first = Member::join(&world, named("first")).await;
    first.until_owned(4).await;
    let epoch = described(&world).await.expect("described").group_epoch;
    let mut second = Member::join(&world, named("second")).await;
    assert_eq!(first.ended().await.code, ErrorCode::FencedInstance);
    second.until_owned(4).await;
    let group = described(&world).await.expect("described");
    assert_eq!((group.group_epoch, group.members.len()), (epoch, 1), "no rebalance");
    // It goes and says that it will be back: so it is.
    second.send(Ask::Leave(pb::LeaveGroup { keep_place: true })).await;
    assert!(soon("the end", second.answers.message()).await.is_ok());
    let mut third = Member::join(&world, named("third")).await;
    third.until_owned(4).await;
    assert_eq!(described(&world).await.expect("described").group_epoch, epoch);
    world.stop().await;
}

#[tokio::test]
async fn new_topics_and_partitions_are_picked_up_and_deleted_ones_let_go() {
    let mut world = World::with(SHORT).await;
    let first = world.create("events-a", 2).await;
    world.create("others", 3).await;
    found(&world).await;
    let asked = pb::JoinGroup { topic_pattern: "events-.*".to_owned(), ..join("a", &["later"]) };
    let mut a = Member::join(&world, asked).await;
    a.until_owned(2).await;
    assert_eq!(a.commit(vec![at(&first, 0, 9)]).await, []);
    world.create("events-b", 1).await;
    a.until_owned(3).await;
    world.create("later", 1).await;
    a.until_owned(4).await;
    let alter = pb::AlterTopicRequest { name: "events-b".to_owned(), partitions: 4, ..Default::default() };
    world.admin.alter_topic(alter).await.expect("altered");
    a.until_owned(7).await;
    // It wants something else.
    let subscription = pb::Subscription { topics: vec!["events-a".to_owned()], topic_pattern: String::new() };
    let heartbeat = pb::MemberHeartbeat { subscription: Some(subscription), ..Default::default() };
    a.send(Ask::Heartbeat(heartbeat)).await;
    a.until_owned(2).await;
    world.admin.delete_topic(pb::DeleteTopicRequest { name: "events-a".to_owned() }).await.expect("deleted");
    a.until_owned(0).await;
    until("its offsets are forgotten", async || {
        described(&world).await.expect("described").offsets.is_empty().then_some(())
    })
    .await;
    world.stop().await;
}

#[tokio::test]
async fn a_member_that_does_not_read_is_not_read_from_and_goes() {
    let mut world = World::with(SHORT).await;
    world.create("orders", 1).await;
    found(&world).await;
    // On a runtime of its own: its connection ends with that.
    let client = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let (address, sent) = (world.broker.client_addr, Arc::new(AtomicUsize::new(0)));
    let taken = Arc::clone(&sent);
    client.spawn(async move {
        // Little room for answers on its side.
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let narrow = endpoint.initial_stream_window_size(1_024).connect().await.expect("connected");
        let (requests, receiver) = mpsc::channel(1);
        let asked = pb::JoinGroup { session_timeout_ms: 1_000, ..join("deaf", &["orders"]) };
        requests.send(ask(Ask::Join(asked))).await.expect("room");
        let mut calls = GroupsClient::new(narrow);
        let _unread = calls.session(ReceiverStream::new(receiver)).await.expect("a session");
        // Large, so that what lies in windows on the way is soon full.
        let padding = pb::TopicPartitions {
            topic_id: vec![0; 16].into(),
            partitions: (0..20_000).map(|number| 1_000_000 + number).collect(),
            topic: String::new(),
        };
        let heartbeat = ask(Ask::Heartbeat(pb::MemberHeartbeat { owned: vec![padding], ..Default::default() }));
        let bytes = prost::Message::encoded_len(&heartbeat);
        while requests.send(heartbeat.clone()).await.is_ok() {
            taken.fetch_add(bytes, Ordering::Relaxed);
        }
    });
    until("its removal", async || {
        let group = described(&world).await.ok()?;
        (group.group_epoch > 1 && group.members.is_empty()).then_some(())
    })
    .await;
    // What was answered while there was room, and what lies in windows and buffers on the way.
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent > 0 && sent < 64 << 20, "{sent} bytes were taken");
    client.shutdown_background();
    world.stop().await;
}

/// What each member owns, by its name.
type Owned = BTreeMap<String, BTreeSet<(Bytes, i32)>>;

/// One of many members: takes in what it is told, for as long as its stream lives.
async fn follow(mut member: Member, owned: Arc<Mutex<Owned>>) {
    loop {
        let beat = tokio::time::sleep(Duration::from_millis(member.joined.heartbeat_interval_ms as u64));
        tokio::select! {
            told = member.answers.message() => {
                let Ok(Some(pb::SessionResponse { response: Some(told) })) = told else { return };
                if let Told::Assignment(assignment) = told {
                    member.take_in(&assignment).await;
                    owned.lock().expect("no panic").insert(member.joined.member_id.clone(), member.owned.clone());
                }
            }
            () = beat => member.report().await,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_members_share_a_thousand_partitions() {
    const MEMBERS: usize = 1_000;
    const PARTITIONS: i32 = 1_000;
    let mut world = World::with(&[("cluster.internal_partitions", "1"), ("group.session_timeout", "20m")]).await;
    world.create("orders", PARTITIONS).await;
    found(&world).await;
    let owned = Arc::new(Mutex::new(BTreeMap::new()));
    let mut members = tokio::task::JoinSet::new();
    for first in (0..MEMBERS).step_by(200) {
        // A connection has so many streams.
        let channel = channel(&world.broker).await;
        for number in first..first + 200 {
            let (channel, owned) = (channel.clone(), Arc::clone(&owned));
            members.spawn(async move {
                let asked = join(&format!("m-{number:04}"), &["orders"]);
                let member = Member::join_over(channel, asked).await.expect("joined");
                follow(member, owned).await;
            });
        }
    }
    let shared = async |members: usize| {
        until("even shares", async || {
            let owned = owned.lock().expect("no panic");
            let all: BTreeSet<&(Bytes, i32)> = owned.values().flatten().collect();
            let sum: usize = owned.values().map(BTreeSet::len).sum();
            let most = owned.values().map(BTreeSet::len).max();
            let is_even = (owned.len(), all.len(), sum) == (members, PARTITIONS as usize, PARTITIONS as usize);
            (is_even && most <= Some(PARTITIONS as usize / members + 1)).then_some(())
        })
        .await;
    };
    shared(MEMBERS).await;
    let group = described(&world).await.expect("described");
    assert_eq!((group.members.len(), group.state()), (MEMBERS, pb::GroupState::Stable));
    let epochs: BTreeMap<String, i32> =
        group.members.into_iter().map(|member| (member.member_id, member.member_epoch)).collect();
    // One goes: whoever gets its partition is told, and nobody else.
    let gone = "m-0500".to_owned();
    let asked = pb::JoinGroup { member_epoch: epochs[&gone], ..join(&gone, &["orders"]) };
    let taken = owned.lock().expect("no panic").remove(&gone).expect("it had one");
    let leaving = Member::join(&world, pb::JoinGroup { owned: shown(&taken), ..asked }).await;
    leaving.send(Ask::Leave(pb::LeaveGroup { keep_place: false })).await;
    shared(MEMBERS - 1).await;
    let group = described(&world).await.expect("described");
    let touched = group.members.iter().filter(|member| epochs[&member.member_id] != member.member_epoch).count();
    assert_eq!(touched, 1);
    members.shutdown().await;
    world.stop().await;
}
