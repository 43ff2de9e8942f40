//! Members of consumer groups against a real broker, in this process.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use flowstone_client::testkit::TestBroker;
use flowstone_client::{
    AlterTopic, Client, ErrorCode, GroupBuilder, GroupConsumer, GroupEvent, GroupState, NewTopic, Position, Record,
    RecordBatch, Revocation, StartAt,
};
use futures::FutureExt;
use support::proxy::Proxy;
use support::within;

/// Quick to make internal topics, and to give up members that are gone.
const SETTINGS: &[(&str, &str)] = &[("cluster.internal_partitions", "2"), ("group.session_timeout_min", "100 ms")];

async fn start(partitions: i32) -> (TestBroker, Client) {
    let broker = TestBroker::with_config(SETTINGS).await.unwrap();
    let client = broker.client().await.unwrap();
    client.admin().create_topic(NewTopic::new("t").partitions(partitions)).await.unwrap();
    (broker, client)
}

/// Puts these numbers into a partition of `t`, each a record.
async fn produce(client: &Client, partition: i32, numbers: std::ops::Range<u32>) {
    let producer = client.producer().build().await.unwrap();
    for number in numbers {
        drop(producer.send(Record::to("t").partition(partition).value(number.to_string())).await.unwrap());
    }
    within("the flush", producer.flush()).await.unwrap();
}

fn member(client: &Client) -> GroupBuilder {
    client.group("g").topic("t")
}

fn numbers(batch: &RecordBatch) -> Vec<u32> {
    let number = |value: Option<&[u8]>| std::str::from_utf8(value.unwrap()).unwrap().parse().unwrap();
    batch.iter().map(|record| number(record.value_bytes())).collect()
}

async fn batch(member: &mut GroupConsumer) -> RecordBatch {
    within("a batch", member.next_batch()).await.unwrap().unwrap()
}

/// Reads so many records, and one batch's rest; the numbers by partition.
async fn read(member: &mut GroupConsumer, count: usize) -> BTreeMap<i32, Vec<u32>> {
    let mut seen: BTreeMap<i32, Vec<u32>> = BTreeMap::new();
    while seen.values().map(Vec::len).sum::<usize>() < count {
        let batch = batch(member).await;
        seen.entry(batch.partition()).or_default().extend(numbers(&batch));
    }
    seen
}

/// Polls until the group gave this member so many partitions and nothing is on its way; nothing is to be handed out.
async fn settle(member: &mut GroupConsumer, partitions: usize) {
    within("a settled assignment", async {
        while !(member.is_settled() && member.assignment().len() == partitions) {
            if let Some(handed) = member.next_batch().now_or_never() {
                panic!("handed out: {handed:?}");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

async fn committed(client: &Client) -> BTreeMap<i32, i64> {
    let group = client.admin().describe_group("g").await.unwrap();
    group.offsets.into_iter().map(|offset| (offset.partition, offset.offset)).collect()
}

async fn until_committed(client: &Client, wanted: &[(i32, i64)]) {
    let wanted: BTreeMap<i32, i64> = wanted.iter().copied().collect();
    within("the commit", async {
        while committed(client).await != wanted {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_was_handed_out_is_committed_when_the_next_is_asked_for() {
    let (broker, client) = start(1).await;
    produce(&client, 0, 0..10).await;
    let mut first = member(&client).commit_every(Duration::from_millis(5)).join().await.unwrap();
    assert_eq!(read(&mut first, 10).await[&0], (0..10).collect::<Vec<_>>());
    let end = first.position("t", 0).unwrap();
    // Nobody asked for more: it is in hand, and what was committed is where reading began.
    let began = committed(&client).await.get(&0).copied().unwrap_or(0);
    assert!(began < end, "{began} of {end}");
    assert!(first.next_batch().now_or_never().is_none());
    until_committed(&client, &[(0, end)]).await;
    first.close(Duration::from_secs(30)).await.unwrap();
    let group = client.admin().describe_group("g").await.unwrap();
    assert_eq!((group.state, group.members.len()), (GroupState::Empty, 0));
    broker.stop().await;
}

#[tokio::test]
async fn a_drop_leaves_what_is_in_hand_to_the_next_and_a_close_commits_it() {
    let (broker, client) = start(1).await;
    produce(&client, 0, 0..5).await;
    let never = Duration::from_secs(3600);
    let mut dropped = member(&client).commit_every(never).join().await.unwrap();
    assert_eq!(read(&mut dropped, 5).await[&0].len(), 5);
    drop(dropped);
    let mut closed = member(&client).commit_every(never).join().await.unwrap();
    assert_eq!(read(&mut closed, 5).await[&0], [0, 1, 2, 3, 4], "again");
    let end = closed.position("t", 0).unwrap();
    closed.close(Duration::from_secs(30)).await.unwrap();
    until_committed(&client, &[(0, end)]).await;
    // With commits by hand, a close commits nothing.
    produce(&client, 0, 5..6).await;
    let mut manual = member(&client).commit_manually().join().await.unwrap();
    assert_eq!(read(&mut manual, 1).await[&0], [5]);
    manual.close(Duration::from_secs(30)).await.unwrap();
    assert_eq!(committed(&client).await[&0], end);
    broker.stop().await;
}

#[tokio::test]
async fn records_count_one_by_one() {
    let (broker, client) = start(1).await;
    produce(&client, 0, 0..5).await;
    let mut group = member(&client).commit_manually().join().await.unwrap();
    let mut last = 0;
    for number in 0..3 {
        let record = within("a record", group.next_record()).await.unwrap().unwrap();
        assert_eq!(record.value_bytes().unwrap(), number.to_string().as_bytes());
        last = record.offset;
    }
    assert_eq!(group.position("t", 0).unwrap(), last + 1);
    group.commit().await.unwrap();
    assert_eq!(committed(&client).await[&0], last + 1);
    // Paused in the middle of a batch, nothing of it comes; resumed, nothing is left out.
    group.pause("t", 0).unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(100), group.next_record()).await.is_err());
    group.resume("t", 0).unwrap();
    let record = within("a record", group.next_record()).await.unwrap().unwrap();
    assert_eq!(record.value_bytes().unwrap(), b"3");
    // The rest as a batch.
    assert_eq!(numbers(&batch(&mut group).await), [4]);
    group.seek("t", 0, last).unwrap();
    let record = within("a record", group.next_record()).await.unwrap().unwrap();
    assert_eq!((record.offset, record.value_bytes().unwrap()), (last, &b"2"[..]));
    group.close(Duration::from_secs(30)).await.unwrap();
    broker.stop().await;
}

#[tokio::test]
async fn commits_by_position_are_checked() {
    let (broker, client) = start(2).await;
    produce(&client, 0, 0..5).await;
    let mut group = member(&client).commit_manually().join().await.unwrap();
    read(&mut group, 5).await;
    let position = |partition, offset| Position::new("t", partition, offset);
    let refused = async |position| group.commit_positions(&[position]).await.unwrap_err().code();
    assert_eq!(refused(position(7, 0)).await, ErrorCode::UnknownPartition);
    assert_eq!(refused(position(0, 1_000_000)).await, ErrorCode::OffsetOutOfRange);
    assert_eq!(refused(position(0, -1)).await, ErrorCode::OffsetOutOfRange);
    group.commit_positions(&[position(0, 2)]).await.unwrap();
    assert_eq!(committed(&client).await[&0], 2);
    let reset = client.admin().reset_offsets("g", &[position(0, 1)], false).await.unwrap_err();
    assert_eq!(reset.code(), ErrorCode::GroupNotEmpty);
    // What was handed out is ahead of that: it is committed although it was never told.
    let end = group.position("t", 0).unwrap();
    group.commit().await.unwrap();
    assert_eq!(committed(&client).await[&0], end);
    // From a task, too, which may go on in another thread meanwhile.
    let committing = tokio::spawn(async move {
        group.commit_positions(&[position(0, end - 1)]).await.unwrap();
        group
    });
    let group = committing.await.unwrap();
    assert_eq!(committed(&client).await[&0], end - 1);
    group.close(Duration::from_secs(30)).await.unwrap();
    let beyond = client.admin().reset_offsets("g", &[position(0, 1_000_000)], true).await.unwrap_err();
    assert_eq!(beyond.code(), ErrorCode::OffsetOutOfRange);
    client.admin().reset_offsets("g", &[position(0, 1)], false).await.unwrap();
    assert_eq!(committed(&client).await[&0], 1);
    broker.stop().await;
}

#[tokio::test]
async fn commits_that_nobody_waits_for_keep_their_order() {
    let (broker, client) = start(1).await;
    produce(&client, 0, 0..5).await;
    let mut group = member(&client).commit_manually().join().await.unwrap();
    let mut waiting = Vec::new();
    for _ in 0..200 {
        within("a record", group.next_record()).await.unwrap().unwrap();
        waiting.push(group.commit_async());
        group.seek("t", 0, 0).unwrap();
        waiting.push(group.commit_async());
    }
    for commit in waiting {
        within("a commit", commit).await.unwrap();
    }
    // The last one counts.
    assert_eq!(committed(&client).await[&0], 0);
    group.close(Duration::from_secs(30)).await.unwrap();
    broker.stop().await;
}

#[tokio::test]
async fn a_partition_goes_to_the_second_member_once_the_first_is_done_with_it() {
    let (broker, client) = start(2).await;
    let never = Duration::from_secs(3600);
    let mut first = member(&client).commit_every(never).join().await.unwrap();
    settle(&mut first, 2).await;
    produce(&client, 0, 0..10).await;
    produce(&client, 1, 100..110).await;
    let mut seen = read(&mut first, 20).await;
    assert_eq!(first.assignment().len(), 2);
    let second = member(&client).commit_every(never).join().await.unwrap();
    // One of the two is asked back: handed out no more, yet not given up while a batch of it may be in hand.
    within("the revocation", async {
        while first.assignment().len() == 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    let (_, stays) = first.assignment().remove(0);
    let goes = 1 - stays;
    let mut second = second;
    settle(&mut first, 1).await;
    settle(&mut second, 1).await;
    assert_eq!(second.assignment(), [("t".to_owned(), goes)]);
    // What the first had read of it was committed on the way: the second goes on behind that.
    produce(&client, goes, 200..210).await;
    produce(&client, stays, 300..310).await;
    assert_eq!(read(&mut second, 10).await, BTreeMap::from([(goes, (200..210).collect())]));
    let more = read(&mut first, 10).await;
    assert_eq!(more, BTreeMap::from([(stays, (300..310).collect())]));
    for (partition, numbers) in more {
        seen.get_mut(&partition).unwrap().extend(numbers);
    }
    assert_eq!(seen[&stays].len(), 20);
    // The second leaves in good order: the first has it all again, and repeats nothing.
    second.close(Duration::from_secs(30)).await.unwrap();
    settle(&mut first, 2).await;
    produce(&client, goes, 400..401).await;
    assert_eq!(read(&mut first, 1).await, BTreeMap::from([(goes, vec![400])]));
    broker.stop().await;
}

async fn revocation(events: &mut flowstone_client::GroupEvents) -> Revocation {
    loop {
        if let GroupEvent::Revoking(revocation) = within("an event", events.next()).await.unwrap() {
            return revocation;
        }
    }
}

#[tokio::test]
async fn a_revocation_waits_for_whoever_listens() {
    let (broker, client) = start(2).await;
    produce(&client, 0, 0..3).await;
    produce(&client, 1, 0..3).await;
    let mut first = member(&client).commit_manually().join().await.unwrap();
    let mut events = first.events();
    assert!(matches!(within("an event", events.next()).await.unwrap(), GroupEvent::Assigned(_)));
    read(&mut first, 6).await;
    let mut second = member(&client).commit_manually().join().await.unwrap();
    let revoked = revocation(&mut events).await;
    let (topic, partition) = revoked.partitions()[0].clone();
    assert_eq!((revoked.partitions().len(), &*topic), (1, "t"));
    assert!(first.next_batch().now_or_never().is_none(), "nothing is handed out, what was in hand is back");
    // It still belongs to the first, who may commit it.
    let read_to = first.position("t", partition);
    first.commit().await.unwrap();
    assert!(second.next_batch().now_or_never().is_none() && second.assignment().is_empty());
    drop(revoked);
    settle(&mut second, 1).await;
    settle(&mut first, 1).await;
    assert_eq!(second.assignment(), [(topic, partition)]);
    assert!(read_to.is_err(), "it is read no more: {read_to:?}");
    assert!(committed(&client).await[&partition] > 0);
    produce(&client, partition, 7..8).await;
    assert_eq!(read(&mut second, 1).await[&partition], [7], "and nothing twice");
    // Who drops the listener holds nothing up.
    let third = member(&client).join().await.unwrap();
    drop((events, second));
    settle(&mut first, 1).await;
    drop(third);
    settle(&mut first, 2).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_restarted_broker_and_a_cut_stream_are_resumed() {
    let proxy = Proxy::start("127.0.0.1:1".parse().unwrap()).await;
    let address = proxy.address.to_string();
    let settings = [SETTINGS, &[("advertise.client", &*address)]].concat();
    let mut broker = TestBroker::with_config(&settings).await.unwrap();
    proxy.aim(broker.address().parse().unwrap());
    let client = Client::connect(&address).await.unwrap();
    client.admin().create_topic(NewTopic::new("t").partitions(2)).await.unwrap();
    let mut group = member(&client).session_timeout(Duration::from_secs(60)).commit_manually().join().await.unwrap();
    settle(&mut group, 2).await;
    let id = group.member_id();
    let mut events = group.events();
    for round in 0..4 {
        let from = round * 10;
        produce(&client, 0, from..from + 10).await;
        assert_eq!(read(&mut group, 10).await[&0], (from..from + 10).collect::<Vec<_>>());
        let commit = group.commit_async();
        if round % 2 == 0 {
            proxy.cut();
        } else {
            within("the restart", broker.restart()).await.unwrap();
        }
        within("the commit", commit).await.unwrap();
        assert_eq!(committed(&client).await[&0], group.position("t", 0).unwrap());
    }
    assert_eq!(group.member_id(), id, "the same member all along");
    assert!(events.next().now_or_never().is_none(), "nothing was lost or given anew");
    group.close(Duration::from_secs(30)).await.unwrap();
    broker.stop().await;
}

#[tokio::test]
async fn a_close_while_the_coordinator_is_away_commits_when_it_is_back() {
    let (mut broker, client) = start(1).await;
    produce(&client, 0, 0..5).await;
    let mut group = member(&client).commit_every(Duration::from_secs(3600)).join().await.unwrap();
    read(&mut group, 5).await;
    let end = group.position("t", 0).unwrap();
    let (closed, restarted) = tokio::join!(
        within("the close", group.close(Duration::from_secs(50))),
        within("the restart", broker.restart())
    );
    restarted.unwrap();
    closed.unwrap();
    assert_eq!(committed(&client).await[&0], end);
    broker.stop().await;
}

#[tokio::test]
async fn a_member_that_was_cut_off_for_too_long_has_nothing_and_begins_anew() {
    let proxy = Proxy::start("127.0.0.1:1".parse().unwrap()).await;
    let address = proxy.address.to_string();
    let settings = [SETTINGS, &[("advertise.client", &*address)]].concat();
    let broker = TestBroker::with_config(&settings).await.unwrap();
    proxy.aim(broker.address().parse().unwrap());
    let client = Client::connect(&address).await.unwrap();
    client.admin().create_topic(NewTopic::new("t").partitions(1)).await.unwrap();
    produce(&client, 0, 0..5).await;
    let mut late = member(&client).session_timeout(Duration::from_secs(1)).commit_manually().join().await.unwrap();
    let mut events = late.events();
    read(&mut late, 5).await;
    proxy.go_silent();
    let commit = late.commit_async();
    loop {
        match within("an event", events.next()).await {
            Some(GroupEvent::Lost(lost)) => break assert_eq!(lost, [("t".to_owned(), 0)]),
            Some(_) => {}
            None => panic!("it goes on"),
        }
    }
    // Whether the commit came through or not: nothing of it comes later, when another may have gone on from there.
    let refused = within("the commit", commit).await.unwrap_err();
    assert_eq!((refused.code(), refused.partition()), (ErrorCode::NotAssigned, Some(0)));
    assert!(late.assignment().is_empty());
    proxy.heal();
    proxy.cut();
    produce(&client, 0, 5..6).await;
    let seen = within("all of it", async {
        let mut seen = Vec::new();
        while seen.last() != Some(&5) {
            seen.extend(numbers(&batch(&mut late).await));
        }
        seen
    })
    .await;
    assert!(seen == [0, 1, 2, 3, 4, 5] || seen == [5], "{seen:?}");
    late.commit().await.unwrap();
    late.close(Duration::from_secs(30)).await.unwrap();
    broker.stop().await;
}

#[tokio::test]
async fn a_static_member_comes_back_to_its_place_and_fences_who_has_it() {
    let (broker, client) = start(4).await;
    let joined = async |instance: &str| {
        member(&client).instance_id(instance).session_timeout(Duration::from_secs(60)).join().await.unwrap()
    };
    let (mut a, mut b) = (joined("a").await, joined("b").await);
    tokio::join!(settle(&mut a, 2), settle(&mut b, 2));
    let had = a.assignment();
    let epoch = client.admin().describe_group("g").await.unwrap().group_epoch;
    a.close(Duration::from_secs(30)).await.unwrap();
    let mut a = joined("a").await;
    settle(&mut a, 2).await;
    assert_eq!(a.assignment(), had);
    assert_eq!(b.assignment().len(), 2, "nobody else noticed");
    assert_eq!(client.admin().describe_group("g").await.unwrap().group_epoch, epoch);
    // Two at a time: the newcomer has it, the other is told, once.
    let mut newcomer = joined("a").await;
    settle(&mut newcomer, 2).await;
    let fenced = within("the end", a.next_batch()).await.unwrap().unwrap_err();
    assert_eq!(fenced.code(), ErrorCode::FencedInstance);
    assert!(within("the end", a.next_batch()).await.is_none());
    assert_eq!(a.commit().await.unwrap_err().code(), ErrorCode::ShuttingDown);
    assert_eq!(newcomer.assignment(), had);
    broker.stop().await;
}

#[tokio::test]
async fn patterns_later_topics_and_other_subscriptions() {
    let (broker, client) = start(1).await;
    let error = client.group("g").join().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidRequest);
    let error = client.group("g").pattern("(").join().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidPattern);
    let mut group = client.group("g").topic("later").pattern("t|logs-.*").join().await.unwrap();
    settle(&mut group, 1).await;
    for name in ["logs-a", "other", "later"] {
        client.admin().create_topic(NewTopic::new(name).partitions(1)).await.unwrap();
    }
    settle(&mut group, 3).await;
    let names: Vec<String> = group.assignment().into_iter().map(|(topic, _)| topic).collect();
    assert_eq!(names, ["later", "logs-a", "t"]);
    group.subscribe(["other"], "");
    within("the other topic", async {
        while group.assignment() != [("other".to_owned(), 0)] {
            assert!(group.next_batch().now_or_never().is_none());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    client.admin().delete_topic("other").await.unwrap();
    settle(&mut group, 0).await;
    group.close(Duration::from_secs(30)).await.unwrap();
    broker.stop().await;
}

#[tokio::test]
async fn partitions_that_are_added_are_read_from_their_beginning() {
    let (broker, client) = start(1).await;
    produce(&client, 0, 0..5).await;
    let mut group = member(&client).join().await.unwrap();
    assert_eq!(read(&mut group, 5).await, BTreeMap::from([(0, (0..5).collect())]));
    client.admin().alter_topic(AlterTopic::new("t").partitions(3)).await.unwrap();
    // Written before the member can know of them.
    produce(&client, 1, 10..15).await;
    produce(&client, 2, 20..25).await;
    let seen = read(&mut group, 10).await;
    assert_eq!(seen, BTreeMap::from([(1, (10..15).collect()), (2, (20..25).collect())]));
    assert_eq!(group.assignment().len(), 3);
    let ends = [0, 1, 2].map(|partition| (partition, group.position("t", partition).unwrap()));
    group.close(Duration::from_secs(30)).await.unwrap();
    until_committed(&client, &ends).await;
    broker.stop().await;
}

#[tokio::test]
async fn where_nothing_is_committed_the_beginning_is_as_asked() {
    let (broker, client) = start(1).await;
    produce(&client, 0, 0..10).await;
    let first = async |group: &str, start_at: StartAt| {
        let mut group = client.group(group).topic("t").start_at(start_at).join().await.unwrap();
        let numbers = numbers(&batch(&mut group).await);
        group.close(Duration::from_secs(30)).await.unwrap();
        numbers[0]
    };
    assert_eq!(first("a", StartAt::Earliest).await, 0);
    assert_eq!(first("b", StartAt::FromEnd(3)).await, 7);
    produce(&client, 0, 10..11).await;
    assert_eq!(first("b", StartAt::Earliest).await, 10, "it is committed by now");
    let latest = client.group("c").topic("t").start_at(StartAt::Latest).join().await.unwrap();
    let mut latest = latest;
    settle(&mut latest, 1).await;
    produce(&client, 0, 11..12).await;
    assert_eq!(numbers(&batch(&mut latest).await), [11]);
    let lag = client.admin().group_lag("a").await.unwrap();
    assert_eq!((lag.len(), lag[0].lag), (1, 2), "{lag:?}");
    broker.stop().await;
}
