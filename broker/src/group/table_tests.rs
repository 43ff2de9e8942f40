//! A group's table under commands: single ones, and whole lives drawn at random.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::{
    Error, ErrorCode, LeaderEpoch, Offset, PartitionId, ProducerEpoch, ProducerId, Timestamp, TopicId, TopicPartition,
};

use super::assignment::WantedTopic;
use super::commands::{Commit, GroupCommand, GroupReply, Install, Join, NewOffset, Report, Subscription, offsets};
use super::pattern::Patterns;
use super::plan::Wanting;
use super::records::GroupLogRecord;
use super::state::{Group, GroupRules, GroupTable, Member};
use crate::controller::placement::Draws;
use crate::coordinator::{LoggedRecord, PIECE_BYTES, StateMachine};

const GROUP: &str = "readers";
const SESSION_MS: i32 = 10_000;

fn tp(topic: u128, partition: i32) -> TopicPartition {
    TopicPartition { topic: TopicId::new(topic), partition: PartitionId::new(partition) }
}

/// A coordinator's table with the log that led to it.
struct World {
    table: GroupTable,
    log: Vec<GroupLogRecord>,
    topics: Vec<WantedTopic>,
    now: Timestamp,
    /// Of the last command.
    records: usize,
}

impl World {
    fn with(rules: GroupRules, topics: &[(u128, u32)]) -> Self {
        let topic = |(id, partitions): &(u128, u32)| WantedTopic {
            id: TopicId::new(*id),
            name: format!("topic-{id}"),
            partitions: *partitions,
            racks: Vec::new(),
        };
        Self {
            table: GroupTable::new(Arc::new(rules)),
            log: Vec::new(),
            topics: topics.iter().map(topic).collect(),
            now: Timestamp::new(1_700_000_000_000),
            records: 0,
        }
    }

    fn new(topics: &[(u128, u32)]) -> Self {
        Self::with(GroupRules::default(), topics)
    }

    fn run(&mut self, command: GroupCommand) -> Result<GroupReply, Error> {
        let (records, reply) = self.table.decide(command, self.now);
        self.records = records.len();
        for record in records {
            let at = Offset::new(self.log.len() as i64);
            let (key, value) = record.to_log();
            assert!(key.is_some(), "the topic is compacted");
            let record = GroupLogRecord::from_log(key, value).expect("as it was written");
            self.table.apply(record.clone(), at).expect("it was decided in this very state");
            self.log.push(record);
        }
        if let Some(group) = self.table.group(GROUP) {
            check_one_owner(group);
        }
        reply
    }

    fn joining(&self, member: &str) -> Join {
        Join {
            group: GROUP.into(),
            member: member.into(),
            epoch: 0,
            instance: String::new(),
            client_id: "c".to_owned(),
            host: "127.0.0.1".to_owned(),
            rack: String::new(),
            subscription: Subscription {
                topics: self.topics.iter().map(|topic| topic.name.clone()).collect(),
                pattern: String::new(),
            },
            assignor: String::new(),
            session_timeout_ms: SESSION_MS,
            rebalance_timeout_ms: SESSION_MS,
            owned: Vec::new(),
        }
    }

    fn join(&mut self, member: &str) -> i32 {
        let join = self.joining(member);
        self.join_as(join).expect("joined").0
    }

    fn join_as(&mut self, join: Join) -> Result<(i32, Option<Arc<str>>), Error> {
        match self.run(GroupCommand::Join(join))? {
            GroupReply::Joined { epoch, displaced, .. } => Ok((epoch, displaced)),
            other => panic!("{other:?}"),
        }
    }

    fn leave(&mut self, member: &str) {
        self.run(GroupCommand::Leave { group: GROUP.into(), member: member.into(), keep_place: false }).expect("left");
    }

    /// What the driver does when the group or the topics changed.
    fn plan(&mut self) -> Option<Install> {
        let name: Arc<str> = GROUP.into();
        let group = self.table.group(GROUP)?;
        Wanting::of(&name, group).plan(&self.topics, &mut Patterns::default())
    }

    fn assign(&mut self) {
        if let Some(install) = self.plan() {
            self.run(GroupCommand::Install(install)).expect("installed");
        }
    }

    fn report(&mut self, member: &str, epoch: i32, owned: &[TopicPartition]) -> Result<GroupReply, Error> {
        let report = Report {
            group: GROUP.into(),
            member: member.into(),
            epoch,
            owned: Some(owned.to_vec()),
            subscription: None,
        };
        self.run(GroupCommand::Report(report))
    }

    /// Every member takes in what it is told, until nothing moves.
    fn settle(&mut self) {
        for _ in 0..100 {
            self.assign();
            let reports: Vec<(String, i32, Vec<TopicPartition>)> = self
                .group()
                .members
                .iter()
                .filter(|(_, member)| !member.is_settled())
                .map(|(id, member)| (id.to_string(), member.epoch, member.owned.clone()))
                .collect();
            if reports.is_empty() {
                return;
            }
            for (id, epoch, owned) in reports {
                self.report(&id, epoch, &owned).expect("taken");
            }
        }
        panic!("no end");
    }

    fn group(&self) -> &Group {
        self.table.group(GROUP).expect("it is there")
    }

    fn member(&self, id: &str) -> &Member {
        self.group().members.get(id).unwrap_or_else(|| panic!("{id} is a member"))
    }

    fn commit(
        &mut self,
        member: Option<(&str, i32)>,
        offsets: &[(TopicPartition, i64)],
    ) -> Result<Vec<ErrorCode>, Error> {
        self.commit_in(member, offsets, None)
    }

    fn commit_in(
        &mut self,
        member: Option<(&str, i32)>,
        offsets: &[(TopicPartition, i64)],
        transaction: Option<(i64, i16)>,
    ) -> Result<Vec<ErrorCode>, Error> {
        let commit = Commit {
            group: GROUP.into(),
            member: member.map(|(id, epoch)| (id.into(), epoch)),
            offsets: offsets.iter().map(|(tp, at)| (*tp, offset(*at))).collect(),
            transaction: transaction.map(|(id, epoch)| (ProducerId::new(id), ProducerEpoch::new(epoch))),
        };
        match self.run(GroupCommand::Commit(commit))? {
            GroupReply::Offsets(errors) => Ok(errors.into_iter().map(|(_, error)| error.code).collect()),
            other => panic!("{other:?}"),
        }
    }

    fn end(&mut self, producer: i64, epoch: i16, commit: bool) {
        let (producer, epoch) = (ProducerId::new(producer), ProducerEpoch::new(epoch));
        self.run(GroupCommand::EndPending { producer, epoch, commit }).expect("ended");
    }

    fn committed(&self, tp: TopicPartition) -> Option<i64> {
        self.table.group(GROUP)?.offsets.get(&tp).map(|offset| offset.offset.get())
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
    }

    /// A new coordinator has replayed the log, from its beginning or from a checkpoint in between.
    fn fail_over(&mut self, from_checkpoint: bool) {
        let mut fresh = GroupTable::new(Arc::new(self.table.rules().clone()));
        if from_checkpoint {
            fresh.restore(&self.table.checkpoint()).expect("a checkpoint");
        } else {
            for (at, record) in (0..).zip(&self.log) {
                fresh.apply(record.clone(), Offset::new(at)).expect("it was taken in before");
            }
        }
        assert_eq!(fresh.checkpoint(), self.table.checkpoint(), "a replay equals the live state");
        self.table = fresh;
        assert_eq!(self.compacted().checkpoint(), self.table.checkpoint(), "so does that of a compacted log");
    }

    /// What the last record of each key leads to.
    fn compacted(&self) -> GroupTable {
        let keys: Vec<_> = self.log.iter().map(|record| record.to_log().0).collect();
        let last: HashMap<_, usize> = keys.iter().enumerate().map(|(at, key)| (key, at)).collect();
        let mut fresh = GroupTable::new(Arc::new(self.table.rules().clone()));
        for (at, record) in self.log.iter().enumerate().filter(|(at, _)| last[&keys[*at]] == *at) {
            fresh.apply(record.clone(), Offset::new(at as i64)).expect("in whatever order");
        }
        // The end of the log is known whatever is left of it.
        fresh.restore(&fresh.checkpoint()).expect("a checkpoint");
        fresh
    }
}

fn offset(at: i64) -> NewOffset {
    NewOffset { offset: Offset::new(at), leader_epoch: LeaderEpoch::new(1), metadata: String::new() }
}

/// No partition is held by two, and what follows from the members is what is kept beside them.
fn check_one_owner(group: &Group) {
    let mut holders: HashMap<TopicPartition, &str> = HashMap::new();
    for (id, member) in &group.members {
        assert!(member.owned.is_sorted() && member.target.is_sorted() && member.revoking.is_sorted());
        for tp in member.owned.iter().chain(&member.revoking) {
            assert_eq!(holders.insert(*tp, id), None, "{tp:?} has two owners");
            assert_eq!(group.holder(*tp).map(|holder| &**holder), Some(&**id));
        }
        assert!(member.owned.iter().all(|tp| member.target.contains(tp)), "{id} keeps what it shall not own");
        for tp in &member.target {
            assert_eq!(group.target(*tp).map(|target| &**target), Some(&**id));
        }
    }
}

#[test]
fn the_first_member_gets_everything_and_the_next_only_what_the_first_has_given_up() {
    let mut world = World::new(&[(1, 4)]);
    let first = world.join("a");
    assert_eq!((first, world.group().epoch), (1, 1));
    world.assign();
    let all = [tp(1, 0), tp(1, 1), tp(1, 2), tp(1, 3)];
    assert_eq!(world.member("a").owned, all);
    let epoch = world.member("a").epoch;
    assert!(epoch > first);
    assert!(world.group().is_stable());

    world.join("b");
    world.assign();
    let asked = world.member("a").revoking.clone();
    assert_eq!(asked.len(), 2);
    assert_eq!(world.member("a").epoch, epoch, "nobody is fenced by what others get");
    assert!(world.member("b").owned.is_empty());
    assert!(!world.group().is_stable());
    // What it is asked for, it commits until it has given it up.
    assert_eq!(world.commit(Some(("a", epoch)), &[(asked[0], 7)]), Ok(Vec::new()));
    // One of the two is given up.
    let still: Vec<_> = all.into_iter().filter(|tp| *tp != asked[0]).collect();
    world.report("a", epoch, &still).expect("taken");
    assert_eq!(world.member("b").owned, [asked[0]]);
    world.settle();
    assert_eq!((world.member("a").owned.len(), world.member("b").owned.len()), (2, 2));
    assert_eq!(world.commit(Some(("a", epoch)), &[(asked[0], 8)]), Ok(vec![ErrorCode::NotAssigned]));
    assert_eq!(world.committed(asked[0]), Some(7));
}

#[test]
fn a_report_from_before_a_gift_gives_nothing_up() {
    let mut world = World::new(&[(1, 2)]);
    world.join("a");
    world.join("b");
    world.settle();
    let before = world.member("a").epoch;
    let owned = world.member("a").owned.clone();
    // It is given the other's partition, and asked to give that one up again, before it has said anything.
    world.leave("b");
    world.assign();
    assert_eq!(world.member("a").owned.len(), 2);
    world.join("c");
    world.assign();
    let asked = world.member("a").revoking.clone();
    assert_eq!(asked.len(), 1);
    // It knows of neither.
    world.report("a", before, &owned).expect("taken");
    assert_eq!(world.member("a").revoking, asked, "it may be about to begin with it");
    let (epoch, owned) = (world.member("a").epoch, world.member("a").owned.clone());
    world.report("a", epoch, &owned).expect("taken");
    assert_eq!(world.member("c").owned, asked);
}

#[test]
fn commits_are_taken_from_the_owner_under_its_epoch_alone() {
    let mut world = World::new(&[(1, 2)]);
    let code = |result: Result<Vec<ErrorCode>, Error>| result.map_err(|error| error.code);
    assert_eq!(code(world.commit(Some(("a", 1)), &[(tp(1, 0), 1)])), Err(ErrorCode::UnknownMember));
    world.join("a");
    world.settle();
    let epoch = world.member("a").epoch;
    assert_eq!(code(world.commit(Some(("a", epoch - 1)), &[(tp(1, 0), 1)])), Err(ErrorCode::StaleMemberEpoch));
    assert_eq!(code(world.commit(Some(("a", epoch + 1)), &[(tp(1, 0), 1)])), Err(ErrorCode::StaleMemberEpoch));
    assert_eq!(code(world.commit(Some(("z", epoch)), &[(tp(1, 0), 1)])), Err(ErrorCode::UnknownMember));
    assert_eq!(code(world.commit(None, &[(tp(1, 0), 1)])), Err(ErrorCode::GroupNotEmpty));
    assert_eq!(world.commit(Some(("a", epoch)), &[(tp(1, 0), 5), (tp(9, 0), 5)]), Ok(vec![ErrorCode::NotAssigned]));
    assert_eq!(world.committed(tp(1, 0)), Some(5), "what could be taken was");
    assert_eq!(world.commit(Some(("a", epoch)), &[(tp(1, 0), -4)]), Ok(vec![ErrorCode::InvalidRequest]));
    let long = Commit {
        group: GROUP.into(),
        member: Some(("a".into(), epoch)),
        offsets: vec![(tp(1, 0), NewOffset { metadata: "x".repeat(4097), ..offset(6) })],
        transaction: None,
    };
    let GroupReply::Offsets(refused) = world.run(GroupCommand::Commit(long)).expect("decided") else { panic!() };
    assert_eq!(refused[0].1.code, ErrorCode::OffsetMetadataTooLarge);
    world.leave("a");
    assert_eq!(code(world.commit(Some(("a", epoch)), &[(tp(1, 0), 9)])), Err(ErrorCode::UnknownMember));
    assert_eq!(world.commit(None, &[(tp(1, 1), 9)]), Ok(Vec::new()), "nobody is there any more");
    assert_eq!((world.committed(tp(1, 0)), world.committed(tp(1, 1))), (Some(5), Some(9)));
}

#[test]
fn a_member_goes_on_with_its_membership_or_is_told_that_it_cannot() {
    let mut world = World::new(&[(1, 4)]);
    world.join("a");
    world.settle();
    let (epoch, owned) = (world.member("a").epoch, world.member("a").owned.clone());
    let resume = |world: &World, epoch: i32, owned: &[TopicPartition]| Join {
        epoch,
        owned: owned.to_vec(),
        ..world.joining("a")
    };
    let code = |result: Result<(i32, Option<Arc<str>>), Error>| result.map_err(|error| error.code);
    let again = resume(&world, epoch, &owned);
    assert_eq!(code(world.join_as(again)), Ok((epoch, None)));
    assert_eq!(world.records, 0, "nothing changed");
    let ahead = resume(&world, epoch + 1, &owned);
    assert_eq!(code(world.join_as(ahead)), Err(ErrorCode::StaleMemberEpoch));
    let unknown = Join { epoch: 3, ..world.joining("z") };
    assert_eq!(code(world.join_as(unknown)), Err(ErrorCode::UnknownMember));
    // Its stream broke while it was asked for something; what it says it owns is the answer.
    world.join("b");
    world.assign();
    let asked = world.member("a").revoking.clone();
    let kept = world.member("a").owned.clone();
    let back = resume(&world, epoch, &kept);
    assert_eq!(code(world.join_as(back)), Ok((epoch, None)));
    assert_eq!(world.member("b").owned, asked);
    // It comes back with what is another's by now.
    let late = resume(&world, epoch, &owned);
    assert_eq!(code(world.join_as(late)), Err(ErrorCode::StaleMemberEpoch));
    // It has forgotten everything: it gets the same again, and what it said before counts no more.
    let anew = resume(&world, 0, &[]);
    let (next, _) = world.join_as(anew).expect("joined");
    assert!(next > epoch);
    assert_eq!(world.member("a").owned, kept);
    let other_instance = Join { instance: "i".to_owned(), ..resume(&world, next, &kept) };
    assert_eq!(code(world.join_as(other_instance)), Err(ErrorCode::InvalidRequest));
}

#[test]
fn a_static_member_comes_back_without_a_rebalance_and_its_double_takes_over() {
    let mut world = World::new(&[(1, 6)]);
    let named = |world: &World, id: &str, instance: &str| Join { instance: instance.to_owned(), ..world.joining(id) };
    let (one, two) = (named(&world, "a", "one"), named(&world, "b", "two"));
    world.join_as(one).expect("joined");
    world.join_as(two).expect("joined");
    world.settle();
    let (group_epoch, owned) = (world.group().epoch, world.member("a").owned.clone());
    world
        .run(GroupCommand::Leave { group: GROUP.into(), member: "a".into(), keep_place: true })
        .expect("it will be back");
    assert!(world.member("a").away);
    assert_eq!(world.plan(), None, "nothing is to be moved");
    let back = named(&world, "c", "one");
    let (epoch, displaced) = world.join_as(back).expect("joined");
    assert_eq!(displaced.as_deref(), Some("a"));
    assert_eq!((world.group().epoch, world.member("c").owned.clone()), (group_epoch, owned.clone()));
    assert_eq!(world.plan(), None);
    assert_eq!(world.commit(Some(("c", epoch)), &[(owned[0], 3)]), Ok(Vec::new()));
    assert_eq!(
        world.commit(Some(("a", epoch)), &[(owned[0], 4)]).map_err(|error| error.code),
        Err(ErrorCode::UnknownMember)
    );
    // Both run at once: whoever came last has the place.
    let double = named(&world, "d", "one");
    assert_eq!(world.join_as(double).expect("joined").1.as_deref(), Some("c"));
    assert_eq!(world.member("d").owned, owned);
    // One that is away and is to own less has nothing to give up.
    world.run(GroupCommand::Leave { group: GROUP.into(), member: "d".into(), keep_place: true }).expect("away");
    world.join("e");
    world.assign();
    assert!(world.member("d").revoking.is_empty());
    world.settle();
    assert_eq!(world.member("e").owned.len(), 2);
    // With another subscription it is another member.
    let other = Join {
        subscription: Subscription { topics: Vec::new(), pattern: "topic-.*".to_owned() },
        ..named(&world, "f", "one")
    };
    let before = world.group().epoch;
    world.join_as(other).expect("joined");
    assert!(world.group().epoch > before);
}

#[test]
fn one_report_among_a_thousand_members_writes_what_it_changes() {
    let mut world = World::new(&[(1, 1_000)]);
    let mut written = 0;
    for number in 0..1_000 {
        world.join(&format!("m-{number:04}"));
        written += world.records;
    }
    assert_eq!(written, 2_000, "each join writes itself and the group");
    world.assign();
    assert_eq!(world.records, 1_001, "each gets one, at once");
    assert!(world.group().is_stable());
    // One leaves; the other 999 have no part in it.
    world.leave("m-0500");
    world.assign();
    assert_eq!(world.records, 2, "the group, and whoever gets its partition");
    world.settle();
    world.join("n");
    world.assign();
    assert_eq!(world.records, 3, "the group, whoever has two, and the newcomer's target");
    let epoch = world.member("m-0001").epoch;
    let owned = world.member("m-0001").owned.clone();
    world.report("m-0001", epoch, &owned).expect("taken");
    assert_eq!(world.records, 0);
    world.commit(Some(("m-0001", epoch)), &[(owned[0], 1)]).expect("taken");
    assert_eq!(world.records, 1);
}

#[test]
fn groups_and_members_and_offsets_have_their_bounds() {
    let rules = GroupRules { members_max: 2, groups_max: 1, offsets_max: 2, ..GroupRules::default() };
    let mut world = World::with(rules, &[(1, 4)]);
    world.join("a");
    world.join("b");
    let third = world.joining("c");
    assert_eq!(world.join_as(third).expect_err("full").code, ErrorCode::GroupFull);
    let elsewhere = Join { group: "others".into(), ..world.joining("a") };
    assert_eq!(world.join_as(elsewhere).expect_err("full").code, ErrorCode::GroupFull);
    world.leave("a");
    world.leave("b");
    let refused = world.commit(None, &[(tp(1, 0), 1), (tp(1, 1), 1), (tp(1, 2), 1)]);
    assert_eq!(refused, Ok(vec![ErrorCode::GroupFull]));
    assert_eq!(world.commit(None, &[(tp(1, 0), 2)]), Ok(Vec::new()), "those that are there go on");
}

#[test]
fn offsets_in_a_transaction_count_once_it_commits() {
    let mut world = World::new(&[(1, 2)]);
    world.commit(None, &[(tp(1, 0), 1)]).expect("taken");
    world.commit_in(None, &[(tp(1, 0), 5), (tp(1, 1), 6)], Some((7, 0))).expect("taken");
    assert_eq!((world.committed(tp(1, 0)), world.committed(tp(1, 1))), (Some(1), None));
    assert!(world.group().is_pending(tp(1, 0)));
    let delete = GroupCommand::Delete { group: GROUP.into() };
    assert_eq!(world.run(delete).expect_err("pending").code, ErrorCode::ConcurrentTransactions);
    world.fail_over(true);
    world.end(7, 1, true);
    assert_eq!((world.committed(tp(1, 0)), world.committed(tp(1, 1))), (Some(5), Some(6)));
    assert!(world.group().pending.is_empty());
    // Told again, it changes nothing; what is late is refused.
    world.end(7, 1, true);
    assert_eq!(world.records, 0);
    let late = world.commit_in(None, &[(tp(1, 0), 9)], Some((7, 0)));
    assert_eq!(late.map_err(|error| error.code), Err(ErrorCode::ProducerFenced));
    // The next one is aborted; an end of the one before does not touch it.
    world.commit_in(None, &[(tp(1, 0), 10)], Some((7, 1))).expect("taken");
    world.end(7, 1, true);
    assert!(world.group().is_pending(tp(1, 0)));
    world.end(7, 2, false);
    assert_eq!(world.committed(tp(1, 0)), Some(5));
    assert!(!world.group().is_pending(tp(1, 0)));
    // One of an older epoch is not mixed with what is pending, nor the other way round.
    world.commit_in(None, &[(tp(1, 0), 11)], Some((7, 3))).expect("taken");
    let older = world.commit_in(None, &[(tp(1, 0), 12)], Some((7, 2)));
    assert_eq!(older.map_err(|error| error.code), Err(ErrorCode::ProducerFenced));
    let newer = world.commit_in(None, &[(tp(1, 0), 12)], Some((7, 4)));
    assert_eq!(newer.map_err(|error| error.code), Err(ErrorCode::ConcurrentTransactions));
    world.fail_over(false);
}

#[test]
fn offsets_are_set_and_groups_deleted_only_without_members() {
    let mut world = World::new(&[(1, 2)]);
    let reset = |offsets: Vec<(TopicPartition, Option<NewOffset>)>, dry_run| GroupCommand::Reset {
        group: GROUP.into(),
        offsets,
        dry_run,
    };
    let delete = || GroupCommand::Delete { group: GROUP.into() };
    assert_eq!(world.run(delete()).expect_err("none").code, ErrorCode::UnknownGroup);
    world.run(reset(vec![(tp(1, 0), Some(offset(3)))], true)).expect("could be");
    assert!(world.table.group(GROUP).is_none(), "nothing was written");
    world.run(reset(vec![(tp(1, 0), Some(offset(3))), (tp(1, 1), Some(offset(4)))], false)).expect("set");
    world.run(reset(vec![(tp(1, 1), None)], false)).expect("removed");
    assert_eq!((world.committed(tp(1, 0)), world.committed(tp(1, 1))), (Some(3), None));
    world.join("a");
    assert_eq!(world.run(reset(Vec::new(), false)).expect_err("active").code, ErrorCode::GroupNotEmpty);
    assert_eq!(world.run(delete()).expect_err("active").code, ErrorCode::GroupNotEmpty);
    world.leave("a");
    world.run(delete()).expect("deleted");
    assert!(world.table.group(GROUP).is_none());
    world.fail_over(false);
}

#[test]
fn what_nobody_needs_goes_after_its_time() {
    let mut world = World::new(&[(1, 2)]);
    let day = Duration::from_secs(86_400);
    let expire = |world: &mut World| {
        while offsets::is_due(&world.table, world.now) {
            world.run(GroupCommand::Expire { records_max: 1 }).expect("gone");
        }
    };
    world.join("a");
    world.settle();
    let epoch = world.member("a").epoch;
    world.commit(Some(("a", epoch)), &[(tp(1, 0), 5), (tp(1, 1), 5)]).expect("taken");
    world.pass(day * 30);
    expire(&mut world);
    assert_eq!(world.committed(tp(1, 0)), Some(5), "it has a member");
    world.leave("a");
    world.pass(day * 6);
    expire(&mut world);
    assert_eq!(world.committed(tp(1, 0)), Some(5), "not for long enough");
    // A transaction holds one of them, and a lone consumer commits the other now and then.
    world.commit_in(None, &[(tp(1, 0), 6)], Some((7, 0))).expect("taken");
    world.commit(None, &[(tp(1, 1), 6)]).expect("taken");
    world.pass(day * 2);
    expire(&mut world);
    assert_eq!((world.committed(tp(1, 0)), world.committed(tp(1, 1))), (Some(5), Some(6)));
    world.end(7, 1, false);
    expire(&mut world);
    assert_eq!((world.committed(tp(1, 0)), world.committed(tp(1, 1))), (None, Some(6)));
    world.pass(day * 8);
    expire(&mut world);
    assert!(world.table.group(GROUP).is_none(), "a group without members and offsets vanishes");
    assert_eq!(world.table.ended(ProducerId::new(7)), None, "and with it what was remembered of the producer");
    // Offsets of topics that are gone are forgotten at once.
    world.commit(None, &[(tp(1, 0), 1), (tp(2, 0), 1)]).expect("taken");
    world.run(GroupCommand::ForgetTopics(vec![TopicId::new(1)])).expect("forgotten");
    assert_eq!((world.committed(tp(1, 0)), world.committed(tp(2, 0))), (None, Some(1)));
    world.fail_over(true);
}

#[test]
fn most_votes_choose_the_assignor() {
    let mut world = World::new(&[(1, 2)]);
    let with = |world: &World, id: &str, assignor: &str| Join { assignor: assignor.to_owned(), ..world.joining(id) };
    let one = with(&world, "a", "range");
    world.join_as(one).expect("joined");
    assert_eq!(world.group().assignor, "range");
    let two = with(&world, "b", "roundrobin");
    world.join_as(two).expect("joined");
    assert_eq!(world.group().assignor, "range", "it has it already");
    world.join("c");
    assert_eq!(world.group().assignor, "range", "who does not care does not count");
    let three = with(&world, "d", "roundrobin");
    world.join_as(three).expect("joined");
    assert_eq!(world.group().assignor, "roundrobin");
    world.fail_over(true);
}

#[test]
fn targets_for_a_group_that_has_changed_meanwhile_are_left_alone() {
    let mut world = World::new(&[(1, 2)]);
    world.join("a");
    let install = world.plan().expect("due");
    world.join("b");
    world.run(GroupCommand::Install(install)).expect("ignored");
    assert_eq!(world.records, 0);
    let install = world.plan().expect("due");
    let double = Install { targets: vec![install.targets[0].clone()], ..install };
    world.run(GroupCommand::Install(double)).expect("ignored");
    assert_eq!(world.records, 0, "not all members are in it");
}

#[test]
fn records_that_no_release_knows_yet_are_refused() {
    let mut world = World::new(&[]);
    let gone = super::records::show_offset("nobody", tp(1, 1), None);
    world.table.apply(gone, Offset::new(4)).expect("what is gone may be told gone again");
    assert!(world.table.group("nobody").is_none());
    let unknown = world.table.apply(GroupLogRecord::default(), Offset::new(5)).expect_err("refused");
    assert_eq!(unknown.code, ErrorCode::Unsupported);
    let mut mixed = super::records::show_offset("nobody", tp(1, 1), None);
    mixed.0.value = super::records::show_ended(ProducerId::new(1), Some((ProducerEpoch::new(1), world.now))).0.value;
    assert_eq!(world.table.apply(mixed, Offset::new(5)).expect_err("refused").code, ErrorCode::CorruptLog);
    assert!(world.table.restore(b"no checkpoint").is_err());
}

/// A member as it knows itself: what it believes to own is what it was told, on streams that may be slow, break and be
/// replaced.
#[derive(Clone, Debug, Default)]
struct Believer {
    epoch: i32,
    /// What it processes now.
    owned: BTreeSet<TopicPartition>,
    /// Told and not taken in yet.
    told: Option<(i32, BTreeSet<TopicPartition>)>,
    /// Said and not heard yet: epoch, owned.
    said: Option<(i32, BTreeSet<TopicPartition>)>,
    instance: String,
}

struct Life {
    world: World,
    draws: Draws,
    members: BTreeMap<String, Believer>,
    born: u32,
}

impl Life {
    fn below(&mut self, bound: usize) -> usize {
        (self.draws.next() % bound as u64) as usize
    }

    fn anyone(&mut self) -> Option<String> {
        let at = self.below(self.members.len().max(1));
        self.members.keys().nth(at).cloned()
    }

    fn be_born(&mut self) {
        self.born += 1;
        let id = format!("m{}", self.born);
        let instance = if self.below(3) == 0 { format!("i{}", self.below(3)) } else { String::new() };
        let join = Join { instance: instance.clone(), ..self.world.joining(&id) };
        let (epoch, displaced) = self.world.join_as(join).expect("there is room");
        if let Some(displaced) = displaced {
            // Its session is ended before the newcomer is told anything.
            self.members.remove(&*displaced);
        }
        self.members.insert(id, Believer { epoch, instance, ..Believer::default() });
    }

    /// The session tells the member what it owns.
    fn tell(&mut self, id: &str) {
        let member = self.world.member(id);
        let told = Some((member.epoch, member.owned.iter().copied().collect()));
        self.members.get_mut(id).expect("known").told = told;
    }

    fn take_in(&mut self, id: &str) {
        let believer = self.members.get_mut(id).expect("known");
        if let Some((epoch, owned)) = believer.told.take() {
            (believer.epoch, believer.owned) = (epoch, owned);
        }
        believer.said = Some((believer.epoch, believer.owned.clone()));
    }

    fn hear(&mut self, id: &str) {
        if let Some((epoch, owned)) = self.members.get_mut(id).expect("known").said.take() {
            let owned: Vec<_> = owned.into_iter().collect();
            self.world.report(id, epoch, &owned).expect("it is a member");
        }
    }

    /// Its stream breaks; what was on its way in both directions is lost.
    fn resume(&mut self, id: &str) {
        let believer = self.members.get_mut(id).expect("known");
        (believer.told, believer.said) = (None, None);
        let believer = believer.clone();
        let join = Join {
            epoch: believer.epoch,
            owned: believer.owned.iter().copied().collect(),
            instance: believer.instance.clone(),
            ..self.world.joining(id)
        };
        self.world.join_as(join).expect("nobody took anything from it that it holds");
    }

    fn step(&mut self) {
        let someone = self.anyone();
        match (self.below(20), someone) {
            (0, _) if self.members.len() < 12 => self.be_born(),
            (1, Some(id)) => {
                self.world.leave(&id);
                self.members.remove(&id);
            }
            (2, Some(id)) if self.below(3) == 0 => {
                // Silent for too long. It may go on believing: what it does is fenced.
                self.world
                    .run(GroupCommand::Remove { group: GROUP.into(), member: id.as_str().into() })
                    .expect("removed");
                let believer = self.members.remove(&id).expect("known");
                if let Some(first) = believer.owned.first() {
                    let late = self.world.commit(Some((&id, believer.epoch)), &[(*first, 1)]);
                    assert_eq!(late.map_err(|error| error.code), Err(ErrorCode::UnknownMember));
                }
            }
            (3..=5, _) => self.world.assign(),
            (6..=9, Some(id)) => self.tell(&id),
            (10..=12, Some(id)) => self.take_in(&id),
            (13..=15, Some(id)) => self.hear(&id),
            (16, Some(id)) => self.resume(&id),
            (17, _) => {
                let at = self.below(self.world.topics.len());
                self.world.topics[at].partitions = (self.world.topics[at].partitions + 1).min(20);
            }
            (18, _) => {
                let from_checkpoint = self.below(2) == 0;
                self.world.fail_over(from_checkpoint);
            }
            (19, Some(id)) => {
                let believer = &self.members[&id];
                let (epoch, first) = (believer.epoch, believer.owned.first().copied());
                if let Some(first) = first {
                    let _ = self.world.commit(Some((&id, epoch)), &[(first, i64::from(epoch))]);
                }
            }
            _ => {}
        }
        self.check();
    }

    /// What nobody may see: two members that both believe to own a partition, each of them still a member.
    fn check(&self) {
        let mut owners: HashMap<TopicPartition, &str> = HashMap::new();
        for (id, believer) in &self.members {
            for tp in &believer.owned {
                assert_eq!(owners.insert(*tp, id), None, "{tp:?} is processed by two");
            }
            if self.world.table.group(GROUP).is_some() {
                let member = self.world.member(id);
                assert!(believer.epoch <= member.epoch);
                assert!(believer.owned.iter().all(|tp| member.holds(*tp)), "{id} processes what it does not hold");
            }
        }
    }

    fn come_to_rest(&mut self) {
        for _ in 0..50 {
            self.world.assign();
            let ids: Vec<String> = self.members.keys().cloned().collect();
            for id in ids {
                self.tell(&id);
                self.take_in(&id);
                self.hear(&id);
                self.check();
            }
        }
        if self.members.is_empty() {
            return;
        }
        assert!(self.world.group().is_stable());
        let partitions: u32 = self.world.topics.iter().map(|topic| topic.partitions).sum();
        let counts: Vec<usize> = self.members.values().map(|believer| believer.owned.len()).collect();
        assert_eq!(counts.iter().sum::<usize>() as u32, partitions, "everything is processed");
        let (least, most) = (counts.iter().min().expect("some"), counts.iter().max().expect("some"));
        assert!(most - least <= 1, "{counts:?}");
    }
}

#[test]
fn whatever_happens_a_partition_has_one_owner_and_after_quiet_shares_are_even() {
    for seed in 0..300 {
        let mut world = World::new(&[(1, 7), (2, 3)]);
        world.topics[0].name = "topic-1".to_owned();
        let mut life = Life { world, draws: Draws::from_seed(seed), members: BTreeMap::new(), born: 0 };
        for _ in 0..3 {
            life.be_born();
        }
        for _ in 0..200 {
            life.step();
        }
        life.come_to_rest();
        life.world.fail_over(false);
        life.world.fail_over(true);
    }
}

#[test]
fn a_thousand_members_that_come_and_go_write_and_compute_no_square() {
    let mut world = World::new(&[(1, 1_000)]);
    let mut written = 0;
    for number in 0..1_000 {
        world.join(&format!("m-{number:04}"));
        // A hundred come between two looks of the driver.
        if number % 100 == 99 {
            world.assign();
            written += world.records;
            for member in 0..=number {
                let id = format!("m-{member:04}");
                if !world.member(&id).revoking.is_empty() {
                    let (epoch, owned) = (world.member(&id).epoch, world.member(&id).owned.clone());
                    world.report(&id, epoch, &owned).expect("taken");
                    written += world.records;
                }
            }
        }
    }
    assert!(world.group().is_stable());
    assert!(world.group().members.values().all(|member| member.owned.len() == 1));
    assert!(written < 20_000, "{written} records");
}

#[test]
fn an_epoch_of_a_member_is_never_given_to_its_next_life() {
    let mut world = World::new(&[(1, 8)]);
    world.join("a");
    world.settle();
    world.join("m");
    world.assign();
    // Gifts come one by one: its epoch runs ahead of the group's.
    let (epoch, mut owned) = (world.member("a").epoch, world.member("a").owned.clone());
    owned.extend(world.member("a").revoking.clone());
    for given in world.member("a").revoking.clone() {
        owned.retain(|tp| *tp != given);
        world.report("a", epoch, &owned).expect("taken");
    }
    let highest = world.member("m").epoch;
    assert!(highest > world.group().epoch + 1, "{highest} {}", world.group().epoch);
    let held = world.member("m").owned[0];
    assert_eq!(world.commit(Some(("m", highest)), &[(held, 100)]), Ok(Vec::new()));
    world.run(GroupCommand::Remove { group: GROUP.into(), member: "m".into() }).expect("removed");
    let again = world.join("m");
    assert!(again > highest, "{again} after {highest}");
    world.settle();
    let now = world.member("m").epoch;
    let (tps, epoch) = (world.member("m").owned.clone(), world.member("m").epoch);
    assert_eq!(world.commit(Some(("m", epoch)), &[(tps[0], 500)]), Ok(Vec::new()));
    // What hung on its way since the first life.
    for old in 0..=highest {
        let late = world.commit(Some(("m", old)), &[(tps[0], 1)]);
        assert_eq!(late.map_err(|error| error.code), Err(ErrorCode::StaleMemberEpoch), "under {old} of {now}");
    }
    assert_eq!(world.committed(tps[0]), Some(500));
}

#[test]
fn who_lost_its_place_gets_no_epoch_again_that_it_had() {
    let mut world = World::new(&[(1, 4)]);
    let with_place = |world: &World, member: &str| Join { instance: "place".to_owned(), ..world.joining(member) };
    let (mut highest, mut before) = (0, None);
    for round in 0..4 {
        let name = format!("m{round}");
        let join = with_place(&world, &name);
        let (_, displaced) = world.join_as(join).expect("the place is taken over");
        assert_eq!(displaced.as_deref(), before.as_deref());
        world.settle();
        highest = world.member(&name).epoch;
        before = Some(name);
    }
    assert!(highest > world.group().epoch + 1, "{highest} {}", world.group().epoch);
    // The one before the last, without a place of its own: it was at an epoch below that of the last one.
    let again = world.join("m2");
    assert!(again > highest, "{again} after {highest}");
}

#[test]
fn a_late_join_gives_nothing_up() {
    let mut world = World::new(&[(1, 2)]);
    world.join("m");
    world.join("b");
    world.settle();
    let before = world.member("m").epoch;
    // Over another stream it is given the other partition, and works on it; then it is asked for that one.
    world.leave("b");
    world.assign();
    assert_eq!(world.member("m").owned.len(), 2);
    world.join("c");
    world.assign();
    let asked = world.member("m").revoking.clone();
    assert_eq!(asked.len(), 1);
    let epoch = world.member("m").epoch;
    assert!(before < epoch);
    // Sent while it had the other one alone.
    let late = Join { epoch: before, owned: world.member("m").owned.clone(), ..world.joining("m") };
    assert!(!late.owned.contains(&asked[0]));
    world.join_as(late).expect("it is a member");
    assert_eq!(world.member("m").revoking, asked, "it may work on it");
    assert!(world.member("c").owned.is_empty());
    // Under its epoch it says so.
    let join = Join { epoch, owned: world.member("m").owned.clone(), ..world.joining("m") };
    world.join_as(join).expect("it is a member");
    assert_eq!(world.member("c").owned, asked);
}

#[test]
fn the_end_of_a_transaction_takes_no_newer_commit_back() {
    for (commit, from_checkpoint) in [(true, false), (true, true), (false, false)] {
        let mut world = World::new(&[(1, 3)]);
        world.commit(None, &[(tp(1, 0), 1)]).expect("taken");
        world.commit_in(None, &[(tp(1, 0), 10), (tp(1, 1), 11)], Some((7, 3))).expect("pending");
        world.commit(None, &[(tp(1, 0), 20)]).expect("taken");
        // And the other way round: what is pending is the newest word.
        world.commit(None, &[(tp(1, 2), 30)]).expect("taken");
        world.commit_in(None, &[(tp(1, 2), 12)], Some((7, 3))).expect("pending");
        assert!(!world.group().is_pending(tp(1, 0)) && world.group().is_pending(tp(1, 2)));
        world.fail_over(from_checkpoint);
        world.end(7, 4, commit);
        let wanted = if commit { (Some(20), Some(11), Some(12)) } else { (Some(20), None, Some(30)) };
        assert_eq!((world.committed(tp(1, 0)), world.committed(tp(1, 1)), world.committed(tp(1, 2))), wanted);
        assert!((0..3).all(|partition| !world.group().is_pending(tp(1, partition))));
        world.fail_over(from_checkpoint);
    }
}

/// A command as often as there is more of it; the most bytes that one step writes.
fn in_pieces(world: &mut World, command: &GroupCommand) -> (usize, usize) {
    let (mut steps, mut bytes_max) = (0, 0);
    loop {
        let before = world.log.len();
        let reply = world.run(command.clone()).expect("done");
        let bytes = |record: &GroupLogRecord| {
            let (key, value) = record.to_log();
            key.map_or(0, |key| key.len()) + value.map_or(0, |value| value.len())
        };
        bytes_max = bytes_max.max(world.log[before..].iter().map(bytes).sum());
        steps += 1;
        if reply != GroupReply::More {
            return (steps, bytes_max);
        }
        assert!(world.log.len() > before, "a step that does nothing");
    }
}

#[test]
fn what_is_too_much_for_one_step_is_done_in_many() {
    const BYTES_MAX: usize = PIECE_BYTES + (1 << 20);
    let groups: Vec<Arc<str>> = (0..10).map(|number| format!("{number:0>249}").into()).collect();
    let mut world = World::new(&[]);
    let mut small = World::new(&[]);
    for (world, metadata_bytes) in [(&mut world, 4096), (&mut small, 1)] {
        for group in &groups {
            let offsets = (0..400).map(|partition| {
                let new = NewOffset { metadata: "x".repeat(metadata_bytes), ..offset(i64::from(partition)) };
                (tp(1 + u128::from(partition as u32 % 2), partition), new)
            });
            let commit = Commit {
                group: Arc::clone(group),
                member: None,
                offsets: offsets.collect(),
                transaction: Some((ProducerId::new(7), ProducerEpoch::new(3))),
            };
            world.run(GroupCommand::Commit(commit)).expect("taken");
        }
    }
    let end = GroupCommand::EndPending { producer: ProducerId::new(7), epoch: ProducerEpoch::new(4), commit: true };
    // Between two pieces nothing of the ended transaction comes in, and nothing of the next one either.
    let reply = world.run(end.clone()).expect("begun");
    assert_eq!(reply, GroupReply::More);
    for (epoch, wanted) in [(3, ErrorCode::ProducerFenced), (4, ErrorCode::ConcurrentTransactions)] {
        let late = world.commit_in(None, &[(tp(1, 0), 1)], Some((7, epoch)));
        assert_eq!(late.map_err(|error| error.code), Err(wanted));
    }
    let (steps, bytes) = in_pieces(&mut world, &end);
    assert!(steps >= 3 && bytes <= BYTES_MAX, "{steps} steps of {bytes} bytes");
    assert_eq!(in_pieces(&mut small, &end).0, 1, "what is little is one step");
    let offsets = |world: &World| -> Vec<(Arc<str>, BTreeMap<TopicPartition, i64>)> {
        let of = |group: &Group| group.offsets.iter().map(|(tp, at)| (*tp, at.offset.get())).collect();
        groups.iter().map(|name| (Arc::clone(name), of(world.table.group(name).expect("there")))).collect()
    };
    assert_eq!(offsets(&world), offsets(&small), "however many steps");
    assert!(groups.iter().all(|name| world.table.group(name).is_some_and(|group| group.pending.is_empty())));
    world.fail_over(false);

    // A record that is removed has its key alone, and so more of them make a step.
    let (_, bytes) = in_pieces(&mut world, &GroupCommand::ForgetTopics(vec![TopicId::new(1)]));
    assert!(bytes <= BYTES_MAX, "{bytes} bytes");
    assert!(groups.iter().all(|name| world.table.group(name).is_some_and(|group| group.offsets.len() == 200)));
    for group in &groups {
        let (_, bytes) = in_pieces(&mut world, &GroupCommand::Delete { group: Arc::clone(group) });
        assert!(bytes <= BYTES_MAX && world.table.group(group).is_none());
    }
    world.fail_over(true);
}

#[test]
fn a_very_large_group_goes_in_many_steps() {
    let name: Arc<str> = "g".repeat(249).into();
    let mut world = World::new(&[]);
    for topic in 1..=40 {
        let offsets = (0..1_000).map(|partition| (tp(topic, partition), offset(1))).collect();
        let commit = Commit { group: Arc::clone(&name), member: None, offsets, transaction: None };
        world.run(GroupCommand::Commit(commit)).expect("taken");
    }
    let delete = GroupCommand::Delete { group: Arc::clone(&name) };
    let mut forgetting = World::new(&[]);
    forgetting.table = world.table.clone();
    forgetting.log = world.log.clone();
    let (steps, bytes) = in_pieces(&mut world, &delete);
    assert!(steps > 1 && bytes <= PIECE_BYTES + (1 << 20), "{steps} steps of {bytes} bytes");
    assert!(world.table.group(&name).is_none());
    let (steps, bytes) = in_pieces(&mut forgetting, &GroupCommand::ForgetTopics((1..=40).map(TopicId::new).collect()));
    assert!(steps > 1 && bytes <= PIECE_BYTES + (1 << 20), "{steps} steps of {bytes} bytes");
    assert!(forgetting.table.group(&name).is_some_and(|group| group.offsets.is_empty()));
}

#[test]
fn what_members_say_of_themselves_is_bounded() {
    let mut world = World::new(&[(1, 4)]);
    let names = |count: usize| Subscription {
        topics: (0..count).map(|number| format!("{number:0>240}")).collect(),
        pattern: String::new(),
    };
    // Some 244 KB each: 34 of them are 8 MiB.
    let mut taken = 0;
    let refused = loop {
        let join = Join { subscription: names(1_000), ..world.joining(&format!("m{taken}")) };
        match world.join_as(join) {
            Ok(_) => taken += 1,
            Err(error) => break error,
        }
        assert!(taken < 100, "no bound");
    };
    assert_eq!((refused.code, taken), (ErrorCode::GroupFull, 34), "{refused}");
    // Nor by another subscription; who says less, or the same, goes on.
    world.join("small");
    let epoch = world.member("small").epoch;
    let report = |subscription| Report {
        group: GROUP.into(),
        member: "small".into(),
        epoch,
        owned: None,
        subscription: Some(subscription),
    };
    let refused = world.run(GroupCommand::Report(report(names(1_000))));
    assert_eq!(refused.map_err(|error| error.code), Err(ErrorCode::GroupFull));
    world.run(GroupCommand::Report(report(names(1)))).expect("taken");
    world.fail_over(true);
    let words: usize = world.group().members.values().map(|member| member.word_bytes()).sum();
    assert_eq!(world.group().word_bytes(), words);
    world.leave("m0");
    let join = Join { subscription: names(1_000), ..world.joining("another") };
    world.join_as(join).expect("there is room again");
}
