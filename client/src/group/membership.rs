//! One member's side of a group, as a state machine: what it owns, what it was asked to give up, what it says next. Pure:
//! time is an argument, and what is to be sent or done is returned.
//!
//! ```text
//!   assigned:  [a b c] -> [b c d]
//!   owned:      a b c  ->  a b c d `d` begins; `a` is being given up: handed out no more, told when its user is done with it
//!                      ->    b c d
//! ```

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flowstone_protocol::pb;
use flowstone_protocol::pb::session_request::Request as Say;
use flowstone_protocol::pb::session_response::Response as Heard;

use crate::error::{Error, ErrorCode};

/// A partition as the coordinator names it: topic id and number.
pub(crate) type Part = (Bytes, i32);

/// What is to be done.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    /// Goes out on the session's stream.
    Send(Box<pb::SessionRequest>),
    /// Owned from now on: its reading may begin.
    Begin(Part, String),
    /// To be handed out no more; [`Membership::released`] once its user is done with it.
    Revoke(Part),
    /// Another member may have it by now: nothing of it may be committed any more.
    Lost(Part),
}

/// How the session stands, beyond what its steps say.
#[derive(Debug)]
pub(crate) enum Standing {
    /// It goes on.
    Up,
    /// The stream is of no more use; joining again may help.
    Again(Error),
    /// The membership is over for good.
    Over(Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No stream.
    Away,
    /// Asked to be taken in.
    Joining,
    Member,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Membership {
    /// What joining says; its epoch and what is owned are filled in each time.
    join: pb::JoinGroup,
    phase: Phase,
    /// The epoch that was taken in; 0 before any.
    epoch: i32,
    /// What the coordinator wants it to own.
    assigned: BTreeSet<Part>,
    /// The coordinator said what that is, under this epoch and on this stream: before, a report of what is owned would give
    /// up what was not heard of yet.
    is_assigned: bool,
    /// The coordinator was told the subscription that `join` has.
    is_subscribed: bool,
    /// What it owns, with what it is giving up.
    owned: BTreeSet<Part>,
    /// Part of `owned`: not handed out any more.
    revoking: BTreeSet<Part>,
    session_timeout: Duration,
    heartbeat_interval: Duration,
    /// When the coordinator was last heard; its own patience began no later than then.
    heard: Instant,
    /// When it was last spoken to.
    said: Instant,
}

/// Until the coordinator says how patient it is.
const FIRST_SESSION_TIMEOUT: Duration = Duration::from_secs(45);
const FIRST_HEARTBEAT_INTERVAL: Duration = Duration::from_secs(3);
/// How long a coordinator may take to take a member in.
const JOIN_PATIENCE: Duration = Duration::from_secs(9);

impl Membership {
    pub(crate) fn new(join: pb::JoinGroup, now: Instant) -> Self {
        Self {
            join,
            phase: Phase::Away,
            epoch: 0,
            assigned: BTreeSet::new(),
            is_assigned: false,
            is_subscribed: true,
            owned: BTreeSet::new(),
            revoking: BTreeSet::new(),
            session_timeout: FIRST_SESSION_TIMEOUT,
            heartbeat_interval: FIRST_HEARTBEAT_INTERVAL,
            heard: now,
            said: now,
        }
    }

    /// The epoch that a commit carries.
    pub(crate) fn epoch(&self) -> i32 {
        self.epoch
    }

    pub(crate) fn member_id(&self) -> &str {
        &self.join.member_id
    }

    pub(crate) fn group(&self) -> &str {
        &self.join.group
    }

    /// Whether it is taken in, on a stream that is there.
    pub(crate) fn is_member(&self) -> bool {
        self.phase == Phase::Member
    }

    /// Whether an assignment was taken in, and these many partitions are all that it owns and shall own.
    pub(crate) fn is_settled(&self, held: usize) -> bool {
        self.phase == Phase::Member && self.is_assigned && self.owned == self.assigned && self.owned.len() == held
    }

    /// There is a stream: asks to be taken in, or to go on.
    pub(crate) fn connected(&mut self, now: Instant) -> Step {
        self.phase = Phase::Joining;
        self.said = now;
        self.is_subscribed = true;
        let join = pb::JoinGroup { member_epoch: self.epoch, owned: by_topic(&self.owned), ..self.join.clone() };
        send(Say::Join(join))
    }

    /// The stream is gone. The membership is not, until the session's time is over.
    pub(crate) fn broken(&mut self) {
        self.phase = Phase::Away;
    }

    /// The coordinator said something. Answers to commits are for the shell.
    pub(crate) fn heard(&mut self, response: pb::SessionResponse, now: Instant) -> (Vec<Step>, Standing) {
        self.heard = now;
        match response.response {
            Some(Heard::Joined(joined)) => {
                self.phase = Phase::Member;
                if !joined.member_id.is_empty() {
                    self.join.member_id = joined.member_id;
                }
                self.epoch = joined.member_epoch;
                self.is_assigned = false;
                let span = |ms: i32, least: u64| Duration::from_millis(u64::try_from(ms).unwrap_or(0).max(least));
                self.session_timeout = span(joined.session_timeout_ms, 10);
                self.heartbeat_interval = span(joined.heartbeat_interval_ms, 1).min(self.session_timeout / 2);
                let behind = !std::mem::replace(&mut self.is_subscribed, true);
                (if behind { vec![self.tell_subscription(now)] } else { Vec::new() }, Standing::Up)
            }
            Some(Heard::Assignment(assignment)) => (self.assigned(assignment, now), Standing::Up),
            Some(Heard::Heartbeat(_) | Heard::Committed(_)) | None => (Vec::new(), Standing::Up),
            Some(Heard::Ended(detail)) => self.ended(Error::from_detail(&detail)),
        }
    }

    fn assigned(&mut self, assignment: pb::Assignment, now: Instant) -> Vec<Step> {
        self.epoch = assignment.member_epoch;
        let mut steps = Vec::new();
        let mut assigned = BTreeSet::new();
        for topic in assignment.partitions {
            for partition in topic.partitions {
                let part = (topic.topic_id.clone(), partition);
                if self.owned.insert(part.clone()) {
                    steps.push(Step::Begin(part.clone(), topic.topic.clone()));
                }
                assigned.insert(part);
            }
        }
        for part in self.owned.difference(&assigned) {
            if self.revoking.insert(part.clone()) {
                steps.push(Step::Revoke(part.clone()));
            }
        }
        self.assigned = assigned;
        self.is_assigned = true;
        // At once: it names what goes on, what begins, and what is still being given up.
        steps.push(self.tell_owned(now));
        steps
    }

    /// The user is done with these: they are given up.
    pub(crate) fn released(&mut self, parts: &[Part], now: Instant) -> Option<Step> {
        let mut is_news = false;
        for part in parts {
            if self.revoking.remove(part) {
                self.owned.remove(part);
                is_news = true;
            }
        }
        (is_news && self.phase == Phase::Member && self.is_assigned).then(|| self.tell_owned(now))
    }

    fn tell_owned(&mut self, now: Instant) -> Step {
        self.said = now;
        send(Say::Heartbeat(pb::MemberHeartbeat {
            owned: by_topic(&self.owned),
            owned_set: true,
            member_epoch: self.epoch,
            subscription: None,
        }))
    }

    /// Other topics from now on.
    pub(crate) fn subscribe(&mut self, topics: Vec<String>, pattern: String, now: Instant) -> Option<Step> {
        (self.join.topics, self.join.topic_pattern) = (topics, pattern);
        if self.phase != Phase::Member {
            // With the next join, or after the one that is under way.
            self.is_subscribed = false;
            return None;
        }
        Some(self.tell_subscription(now))
    }

    fn tell_subscription(&mut self, now: Instant) -> Step {
        self.said = now;
        let (topics, topic_pattern) = (self.join.topics.clone(), self.join.topic_pattern.clone());
        send(Say::Heartbeat(pb::MemberHeartbeat {
            member_epoch: self.epoch,
            subscription: Some(pb::Subscription { topics, topic_pattern }),
            ..Default::default()
        }))
    }

    fn ended(&mut self, error: Error) -> (Vec<Step>, Standing) {
        self.phase = Phase::Away;
        match error.code() {
            ErrorCode::UnknownMember | ErrorCode::StaleMemberEpoch => (self.lose_all(), Standing::Again(error)),
            _ if error.is_retriable() => (Vec::new(), Standing::Again(error)),
            _ => (self.lose_all(), Standing::Over(error)),
        }
    }

    /// Nothing is owned any more; whoever joins next is a newcomer.
    pub(crate) fn lose_all(&mut self) -> Vec<Step> {
        self.epoch = 0;
        self.assigned.clear();
        self.is_assigned = false;
        self.revoking.clear();
        std::mem::take(&mut self.owned).into_iter().map(Step::Lost).collect()
    }

    /// Time goes by: a heartbeat where one is due; everything is lost where the coordinator was not heard for as long as
    /// it would wait for this member.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<Step> {
        if self.epoch > 0 && now.saturating_duration_since(self.heard) >= self.session_timeout {
            return self.lose_all();
        }
        if self.phase == Phase::Member && now.saturating_duration_since(self.said) >= self.heartbeat_interval {
            self.said = now;
            return vec![send(Say::Heartbeat(pb::MemberHeartbeat { member_epoch: self.epoch, ..Default::default() }))];
        }
        Vec::new()
    }

    /// When [`Membership::tick`] has something to do.
    pub(crate) fn next_tick(&self) -> Instant {
        let expiry = self.heard + self.session_timeout;
        match self.phase {
            Phase::Member => expiry.min(self.said + self.heartbeat_interval),
            // One that owns nothing has nothing to lose.
            _ if self.epoch == 0 => self.heard.max(self.said) + Duration::from_secs(3600),
            _ => expiry,
        }
    }

    /// When the silence of the stream becomes too long: after three heartbeats without an echo, before the coordinator's own
    /// patience is over. Taking a member in may take its time.
    pub(crate) fn deaf_at(&self) -> Option<Instant> {
        let patience = (self.heartbeat_interval * 3).min(self.session_timeout / 2).max(Duration::from_millis(100));
        match self.phase {
            Phase::Away => None,
            Phase::Joining => Some(self.heard.max(self.said) + patience.max(JOIN_PATIENCE)),
            Phase::Member => Some(self.heard + patience),
        }
    }
}

fn send(request: Say) -> Step {
    Step::Send(Box::new(pb::SessionRequest { request: Some(request) }))
}

fn by_topic(parts: &BTreeSet<Part>) -> Vec<pb::TopicPartitions> {
    let mut topics: Vec<pb::TopicPartitions> = Vec::new();
    for (topic_id, partition) in parts {
        match topics.last_mut().filter(|last| last.topic_id == topic_id) {
            Some(last) => last.partitions.push(*partition),
            None => topics.push(pb::TopicPartitions {
                topic_id: topic_id.clone(),
                partitions: vec![*partition],
                topic: String::new(),
            }),
        }
    }
    topics
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: &[u8] = &[7; 16];

    fn part(partition: i32) -> Part {
        (Bytes::from_static(T), partition)
    }

    fn topics(partitions: &[i32]) -> Vec<pb::TopicPartitions> {
        let topic_id = Bytes::from_static(T);
        vec![pb::TopicPartitions { topic_id, partitions: partitions.to_vec(), topic: "t".to_owned() }]
    }

    struct Member {
        membership: Membership,
        now: Instant,
    }

    impl Member {
        fn joined() -> Self {
            let now = Instant::now();
            let join = pb::JoinGroup { group: "g".into(), member_id: "m".into(), ..Default::default() };
            let mut member = Self { membership: Membership::new(join, now), now };
            let Step::Send(request) = member.membership.connected(now) else { panic!("a join") };
            assert!(
                matches!(request.request, Some(Say::Join(join)) if join.member_epoch == 0 && join.owned.is_empty())
            );
            member.hear(Heard::Joined(pb::Joined {
                member_id: "m".into(),
                member_epoch: 1,
                session_timeout_ms: 10_000,
                heartbeat_interval_ms: 1_000,
            }));
            member
        }

        fn hear(&mut self, response: Heard) -> Vec<Step> {
            self.membership.heard(pb::SessionResponse { response: Some(response) }, self.now).0
        }

        fn assign(&mut self, epoch: i32, partitions: &[i32]) -> Vec<Step> {
            let partitions = topics(partitions);
            self.hear(Heard::Assignment(pb::Assignment { member_epoch: epoch, partitions, ..Default::default() }))
        }
    }

    /// The partitions that a heartbeat tells to be owned.
    fn told(step: &Step) -> Vec<i32> {
        match step {
            Step::Send(request) => match &request.request {
                Some(Say::Heartbeat(heartbeat)) if heartbeat.owned_set => {
                    heartbeat.owned.iter().flat_map(|topic| topic.partitions.clone()).collect()
                }
                other => panic!("no word of what is owned: {other:?}"),
            },
            other => panic!("nothing to send: {other:?}"),
        }
    }

    #[test]
    fn what_must_go_is_told_when_its_user_is_done_with_it() {
        let mut member = Member::joined();
        let steps = member.assign(1, &[0, 1, 2]);
        assert_eq!(steps[..3], [0, 1, 2].map(|p| Step::Begin(part(p), "t".into())));
        assert_eq!(told(&steps[3]), [0, 1, 2]);
        let steps = member.assign(2, &[1, 2, 3]);
        assert_eq!(steps[..2], [Step::Begin(part(3), "t".into()), Step::Revoke(part(0))]);
        assert_eq!(told(&steps[2]), [0, 1, 2, 3], "it is still held");
        assert!(member.membership.owned.contains(&part(0)), "it may still be committed");
        assert_eq!(member.membership.released(&[part(2)], member.now), None, "nobody asked for that one");
        let step = member.membership.released(&[part(0)], member.now).unwrap();
        assert_eq!(told(&step), [1, 2, 3]);
        assert!(!member.membership.owned.contains(&part(0)) && member.membership.owned.contains(&part(2)));
    }

    #[test]
    fn one_that_comes_back_goes_on_with_what_it_owns() {
        let mut member = Member::joined();
        member.assign(4, &[0, 1]);
        member.membership.broken();
        let Step::Send(request) = member.membership.connected(member.now) else { panic!("a join") };
        let Some(Say::Join(join)) = request.request else { panic!("a join") };
        assert_eq!((join.member_epoch, &join.owned[0].partitions), (4, &vec![0, 1]));
    }

    #[test]
    fn silence_for_the_sessions_time_loses_everything() {
        let mut member = Member::joined();
        member.assign(1, &[0]);
        let heard = member.now;
        assert_eq!(member.membership.next_tick(), heard + Duration::from_secs(1));
        let steps = member.membership.tick(heard + Duration::from_secs(1));
        assert!(matches!(&steps[..], [Step::Send(_)]), "a heartbeat");
        assert_eq!(member.membership.tick(heard + Duration::from_millis(1500)), [], "not yet");
        member.membership.broken();
        assert_eq!(member.membership.tick(heard + Duration::from_millis(9_999)), []);
        assert_eq!(member.membership.tick(heard + Duration::from_secs(10)), [Step::Lost(part(0))]);
        assert_eq!((member.membership.epoch(), member.membership.owned.contains(&part(0))), (0, false));
    }

    #[test]
    fn a_coordinator_that_hangs_is_noticed_although_it_is_spoken_to() {
        let mut member = Member::joined();
        member.assign(1, &[0]);
        let heard = member.now;
        for seconds in 1..=2 {
            let steps = member.membership.tick(heard + Duration::from_secs(seconds));
            assert!(matches!(&steps[..], [Step::Send(_)]), "a heartbeat");
        }
        assert_eq!(member.membership.deaf_at(), Some(heard + Duration::from_secs(3)), "whatever was said since");
        member.now = heard + Duration::from_secs(2);
        member.hear(Heard::Heartbeat(pb::HeartbeatTaken::default()));
        assert_eq!(member.membership.deaf_at(), Some(heard + Duration::from_secs(5)));
        member.membership.broken();
        assert_eq!(member.membership.deaf_at(), None);
        member.membership.connected(member.now);
        assert_eq!(member.membership.deaf_at(), Some(member.now + JOIN_PATIENCE));
    }

    #[test]
    fn nothing_is_reported_between_joining_again_and_its_assignment() {
        let mut member = Member::joined();
        member.assign(1, &[0, 1]);
        member.assign(1, &[0]);
        member.membership.broken();
        member.membership.connected(member.now);
        // It was given something meanwhile, and does not know what.
        member.hear(Heard::Joined(pb::Joined { member_epoch: 2, session_timeout_ms: 10_000, ..Default::default() }));
        assert_eq!(member.membership.released(&[part(1)], member.now), None);
        let steps = member.assign(2, &[0, 2]);
        assert_eq!(told(&steps[1]), [0, 2]);
    }

    #[test]
    fn a_subscription_that_changes_while_joining_is_told_afterwards() {
        let mut member = Member::joined();
        member.membership.broken();
        member.membership.connected(member.now);
        assert_eq!(member.membership.subscribe(vec!["u".into()], String::new(), member.now), None);
        let steps = member.hear(Heard::Joined(pb::Joined { member_epoch: 1, ..Default::default() }));
        let [Step::Send(request)] = &steps[..] else { panic!("{steps:?}") };
        let Some(Say::Heartbeat(heartbeat)) = &request.request else { panic!("{request:?}") };
        assert_eq!(heartbeat.subscription.as_ref().unwrap().topics, ["u"]);
    }

    #[test]
    fn how_a_session_may_end() {
        let check = |code: ErrorCode, again: bool, lost: bool| {
            let mut member = Member::joined();
            member.assign(1, &[0]);
            let detail = flowstone_protocol::Error::new(code, "a test says so").to_detail();
            let response = pb::SessionResponse { response: Some(Heard::Ended(detail)) };
            let (steps, standing) = member.membership.heard(response, member.now);
            assert_eq!(!steps.is_empty(), lost, "{code}");
            assert_eq!(matches!(standing, Standing::Again(_)), again, "{code}: {standing:?}");
            assert_eq!(member.membership.epoch() == 0, lost, "{code}");
        };
        check(ErrorCode::NotCoordinator, true, false);
        check(ErrorCode::ShuttingDown, true, false);
        check(ErrorCode::UnknownMember, true, true);
        check(ErrorCode::StaleMemberEpoch, true, true);
        check(ErrorCode::FencedInstance, false, true);
        check(ErrorCode::InvalidPattern, false, true);
    }
}
