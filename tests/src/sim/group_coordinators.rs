//! Coordinators of groups: what members ask of them, and what their brokers do unasked. All that is decided is decided by the
//! broker's own code.

use std::time::Duration;

use flowstone_broker::simulation::{Command, GroupDuty, GroupsView, Joining};
use flowstone_protocol::{Error, Offset, ProducerEpoch, ProducerId, Term, TopicPartition};

use super::broker::{View, broker_id};
use super::groups::Kind;
use super::members::GROUP;
use super::outbox::{Answer, Commanded, Out};
use super::transactions::{ADD_MAX, Ask, Errand, Purpose, nobody_there};
use super::world::World;

/// What a broker keeps while it coordinates groups, since that term.
pub(crate) type Grouping = Option<(Term, GroupDuty)>;

/// An offset on its way to a group's coordinator.
#[derive(Debug, Clone)]
pub(crate) struct Committing {
    pub(crate) group: String,
    /// Nobody in particular: of a group without members.
    pub(crate) member: Option<(String, i32)>,
    pub(crate) tp: TopicPartition,
    pub(crate) offset: Offset,
    /// It counts once this transaction commits.
    pub(crate) transaction: Option<(String, (ProducerId, ProducerEpoch))>,
}

impl Committing {
    pub(crate) fn command(&self) -> Command {
        let member = self.member.as_ref().map(|(member, epoch)| (member.as_str(), *epoch));
        let owner = self.transaction.as_ref().map(|(_, owner)| *owner);
        Command::commit_offsets(&self.group, member, &[(self.tp, self.offset)], owner)
    }
}

impl World {
    /// What the groups' coordinator on this broker has committed, where there is one.
    pub(crate) fn groups_view(&self, broker: usize) -> Option<GroupsView> {
        let tp = self.groups[self.group_with(Kind::Groups)?].tp;
        match &self.brokers[broker].running.as_ref()?.replicas.get(&tp)?.view {
            View::Groups(view) => Some(view.clone()),
            _ => None,
        }
    }

    /// A member's question reached a broker, which may coordinate its group.
    pub(crate) fn on_group_ask(&mut self, broker: usize, operation: u64, tp: TopicPartition, ask: &Ask) {
        let it = &mut self.brokers[broker];
        it.clock.set(self.now);
        let now = it.clock.now();
        let Some(running) = &mut it.running else { return };
        if let (Some((_, duty)), Ask::Join(Joining { member, .. }) | Ask::Report { member, .. }) =
            (&mut running.grouping, ask)
        {
            duty.heard(GROUP, member, now);
        }
        let it = &self.brokers[broker];
        let (Some(running), Some(handle)) = (&it.running, it.handle(tp)) else { return };
        let asked = running.outbox.reply(move |result| Out::Asked { operation, result });
        match ask {
            Ask::Join(joining) => handle.command(Command::join(joining), asked),
            Ask::Leave { member, keep_place } => handle.command(Command::leave(GROUP, member, *keep_place), asked),
            Ask::Report { member, epoch, owned } => {
                let command = Command::report(GROUP, member, *epoch, owned.clone());
                let member = member.clone();
                let reply = running.outbox.reply(move |result| Out::Reported { operation, member, result });
                handle.command(command, reply);
            }
            Ask::Fetch { tp: of } => {
                let of = *of;
                let reply = running.outbox.reply(move |result| Out::Confirmed { operation, of, result });
                handle.read_index(reply);
            }
            Ask::Commit(committing) => match &committing.transaction {
                None => handle.command(committing.command(), asked),
                Some((id, owner)) => {
                    // The groups' partition is one of the transaction's from now on: its end reaches it.
                    let errand =
                        Errand::Add { id: id.clone(), owner: *owner, tp, group: Some(committing.group.clone()) };
                    let until = self.now + ADD_MAX;
                    let purpose = Purpose::Commit { operation, tp, committing: committing.clone(), until };
                    self.errand(broker, errand, purpose, Duration::ZERO);
                }
            },
            Ask::Expire => handle.command(Command::expire_offsets(), asked),
            Ask::Init { .. } | Ask::End { .. } | Ask::Abort { .. } => {
                unreachable!("{ask:?} is nothing for a coordinator of groups")
            }
        }
    }

    /// The offset's transaction knows of it: the group is told.
    pub(crate) fn commit_added(&mut self, broker: usize, operation: u64, tp: TopicPartition, committing: &Committing) {
        let it = &self.brokers[broker];
        let (Some(running), Some(handle)) = (&it.running, it.handle(tp)) else {
            return self.answer(broker, operation, Answer::Asked(Err(nobody_there())));
        };
        handle.command(committing.command(), running.outbox.reply(move |result| Out::Asked { operation, result }));
    }

    /// A member's report was taken: it is told what it owns.
    pub(crate) fn on_reported(&mut self, broker: usize, operation: u64, member: &str, result: Commanded) {
        let result = result.and_then(|answer| answer);
        let view = result.map(|_| self.groups_view(broker).and_then(|view| view.member(GROUP, member)));
        self.coordinate_groups(broker);
        self.answer(broker, operation, Answer::Member(view));
    }

    /// A coordinator was certain that it is one: what it has committed is the newest.
    pub(crate) fn on_confirmed(
        &mut self,
        broker: usize,
        operation: u64,
        of: TopicPartition,
        result: Result<Offset, Error>,
    ) {
        let view = self.groups_view(broker).ok_or_else(nobody_there);
        let offset = result.and(view).map(|view| view.offset(GROUP, of));
        self.answer(broker, operation, Answer::Offset(offset));
    }

    /// What a broker does for the groups that it coordinates.
    pub(crate) fn coordinate_groups(&mut self, broker: usize) {
        let Some(group) = self.group_with(Kind::Groups) else { return };
        let tp = self.groups[group].tp;
        let expires = self.random.one_in(20);
        let it = &mut self.brokers[broker];
        it.clock.set(self.now);
        let now = it.clock.now();
        let Some(running) = &mut it.running else { return };
        let led = running.replicas.get(&tp).and_then(|local| {
            let handle = local.handle.as_ref()?;
            let status = handle.status();
            let View::Groups(view) = &local.view else { return None };
            status.is_ready().then_some((handle, view, status.term))
        });
        let (Some((handle, view, term)), Some(metadata)) = (led, &running.view) else {
            running.grouping = None;
            return;
        };
        let duty = match &mut running.grouping {
            Some((since, duty)) if *since == term => duty,
            other => &mut other.insert((term, GroupDuty::new(view, now))).1,
        };
        let mut commands = duty.due(view, metadata, now);
        for command in &commands {
            self.trace
                .note(self.now, "duty", &[broker as u64], || format!("broker {}: {command:?}", broker_id(broker)));
        }
        if expires {
            commands.push(Command::expire_offsets());
        }
        for command in commands {
            handle.command(command, running.outbox.reply(|result| Out::Commanded { result }));
        }
    }
}
