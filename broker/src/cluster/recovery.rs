//! The metadata where its majority is gone for good: it goes on with what one broker has of it.
//!
//! ```text
//!   asked for           refused while anybody names a controller, or a majority of the voters answers
//!     -> noted here     the new id, and whose log it goes on with
//!     -> opened         under that id, as the only voter: it leads
//!     -> committed      `PartitionRecovered`: the table names the new id, and all others come under ids that never were
//! ```
//!
//! A cut at any point is gone on from: a start opens what was noted, and whoever leads the metadata alone, under an id that
//! the table does not name, writes what is missing before anything else.

use std::sync::Arc;
use std::time::Duration;

use flowstone_protocol::peer::{ForwardRequest, HelloRequest, HelloResponse};
use flowstone_protocol::{BrokerId, Error, ErrorCode, ReplicaId, pb};
use flowstone_replication::{Health, Role};
use futures::future::join_all;
use prost::Message;
use tokio::sync::oneshot;

use super::control::Control;
use super::drive::group;
use crate::controller::change::PartitionEntry;
use crate::controller::commands::{MetadataCommand, RecoverPartition};
use crate::controller::table::{METADATA_PARTITION, METADATA_TOPIC, Place};

/// The call by which a broker hands the wish on to the survivor.
pub(crate) const RECOVER_METADATA: &str = "RecoverMetadata";
/// A survivor that leads alone does so at once, its log recovered.
const RECOVERY_MAX: Duration = Duration::from_secs(30);
/// A broker that takes longer to say who it is is taken for dead.
const HELLO_MAX: Duration = Duration::from_secs(2);
/// The survivor does all of it within this.
const FORWARD_MAX: Duration = Duration::from_secs(60);

/// The replica of the metadata here is to go on under this id, as the only voter.
#[derive(Debug)]
pub(crate) struct MetadataRecovery {
    pub(crate) survives_as: ReplicaId,
    /// Told once it is open.
    pub(crate) done: oneshot::Sender<()>,
}

fn refused(text: String) -> Error {
    Error::new(ErrorCode::InvalidRequest, text).with_topic(METADATA_TOPIC)
}

/// Has the broker that the request names go on with what it has, asked by a client of this one.
///
/// # Errors
/// There is no need to, or it cannot; with what to do.
pub(crate) async fn asked_for(
    control: &Arc<Control>,
    request: pb::RecoverPartitionRequest,
) -> Result<pb::RecoverPartitionResponse, Error> {
    let survivor = BrokerId::new(request.from_broker_id);
    if survivor == control.me {
        return recover(control, request).await;
    }
    not_while_led(control)?;
    let request = ForwardRequest {
        method: RECOVER_METADATA.to_owned(),
        request: request.encode_to_vec().into(),
        ..ForwardRequest::default()
    };
    let answer = control.peers.forward(survivor, request, FORWARD_MAX).await?;
    pb::RecoverPartitionResponse::decode(answer.response).map_err(|error| {
        let text =
            format!("broker {survivor} answered what is no answer ({error}); run one version of Flowstone on all");
        Error::new(ErrorCode::Internal, text)
    })
}

/// Goes on with what this broker has of the metadata. Whoever stops waiting for the answer does not stop it.
///
/// # Errors
/// As for [`asked_for`].
pub(crate) async fn recover(
    control: &Arc<Control>,
    request: pb::RecoverPartitionRequest,
) -> Result<pb::RecoverPartitionResponse, Error> {
    let control = Arc::clone(control);
    let recovering = tokio::spawn(async move { run(&control, request.validate_only).await });
    recovering.await.map_err(|_| shutting_down())?
}

async fn run(control: &Control, validate_only: bool) -> Result<pb::RecoverPartitionResponse, Error> {
    // One at a time: a second new id would be a second loss.
    let _turn = control.recovering.lock().await;
    let status = control.metadata().status();
    // One that was cut off in the middle is only finished.
    if unnamed(control).is_none() || !status.is_ready() {
        not_while_led(control)?;
        if let Health::Lost { message, .. } | Health::Quarantined { message } = &status.health {
            let text =
                format!("what broker {} has of the metadata is lost itself ({message}); name another", control.me);
            return Err(refused(text));
        }
        if matches!(status.role, Role::Opening | Role::Pulling) {
            let text = format!(
                "broker {} has not got the metadata whole, or opens it; try again, or name another",
                control.me
            );
            return Err(refused(text));
        }
        others_have_no_majority(control).await?;
        if !validate_only {
            let survives_as = ReplicaId::new(rand::random::<u64>().max(1));
            let (done, opened) = oneshot::channel();
            control.recover.send(MetadataRecovery { survives_as, done }).await.map_err(|_| shutting_down())?;
            opened.await.map_err(|_| {
                Error::new(
                    ErrorCode::StorageFailed,
                    "the survivor cannot be opened under its new id; look at the broker's log",
                )
            })?;
            let metadata = control.metadata();
            let led = tokio::time::timeout(RECOVERY_MAX, metadata.ready()).await;
            led.map_err(|_| {
                Error::new(ErrorCode::TimedOut, "the survivor does not lead yet; look at the broker's log")
            })??;
        }
    }
    if !validate_only {
        adopt_in_turn(control).await?;
    }
    Ok(pb::RecoverPartitionResponse {
        end_offset: status.end_offset.get(),
        last_epoch: status.leader_epoch().get(),
        detail: format!(
            "what broker {} has of the metadata is kept, up to offset {} (exclusive); changes that only other brokers had \
             are lost, and their replicas of it begin anew",
            control.me, status.end_offset
        ),
    })
}

/// Whether a controller is known here: then there is a majority, and nothing to recover.
fn not_while_led(control: &Control) -> Result<(), Error> {
    match control.controller() {
        Some(controller) => Err(refused(format!(
            "broker {controller} leads the metadata: there is a majority, and nothing to recover; see flowstone cluster \
             health"
        ))),
        None => Ok(()),
    }
}

/// Asks every broker that is known: two metadata of one cluster would be two leaders of every partition.
async fn others_have_no_majority(control: &Control) -> Result<(), Error> {
    let known =
        control.book.all().into_iter().filter(|(broker, entry)| *broker != control.me && !entry.address.is_empty());
    let asked = known.map(|(broker, entry)| async move {
        let said = control.peers.hello(&entry.address, HelloRequest::default(), HELLO_MAX).await.ok()?;
        Some((broker, said))
    });
    let said: Vec<_> = join_all(asked).await.into_iter().flatten().collect();
    let voters =
        control.table.with(|table| table.partition(METADATA_PARTITION).map(PartitionEntry::voters).unwrap_or_default());
    let own = Some(control.metadata_id()).filter(|_| control.metadata().status().is_voter);
    match majority(control.me, own, &voters, &said) {
        Some(reason) => Err(refused(reason)),
        None => Ok(()),
    }
}

/// Why the metadata needs no recovery, by what the others `said`; `own` is the replica of `me`, where that votes.
fn majority(
    me: BrokerId,
    own: Option<ReplicaId>,
    voters: &[Place],
    said: &[(BrokerId, HelloResponse)],
) -> Option<String> {
    if let Some((broker, said)) = said.iter().find(|(_, said)| said.controller_id >= 0) {
        return Some(format!(
            "broker {broker} says that broker {} leads the metadata: a second one would lead every partition twice; connect \
             broker {me} to them, or, if that one has just died, try again in a moment",
            said.controller_id
        ));
    }
    let answers = |replica: ReplicaId| {
        own == Some(replica) || said.iter().any(|(_, said)| said.metadata_voter_id == replica.get())
    };
    let alive: Vec<String> =
        voters.iter().filter(|voter| answers(voter.replica)).map(|voter| voter.broker.to_string()).collect();
    (2 * alive.len() > voters.len()).then(|| {
        format!(
            "most voters of the metadata answer (brokers {}): they elect a controller by themselves, and recovering would \
             throw away what they have acknowledged; see what keeps them from reaching each other",
            alive.join(", ")
        )
    })
}

/// Where the replica here goes on under an id that the table does not name: the one that the table has in its place.
pub(crate) fn unnamed(control: &Control) -> Option<ReplicaId> {
    let own = control.metadata_id();
    control.table.with(|table| {
        table.founding()?;
        let me = table.broker(control.me)?;
        let entry = table.partition(METADATA_PARTITION)?;
        if entry.place(own).is_some() || me.metadata_replica == own {
            return None;
        }
        let place = entry.places().find(|place| place.broker == me.id && place.directory == me.directory);
        place.map(|place| place.replica).or(Some(me.metadata_replica).filter(|replica| replica.get() != 0))
    })
}

/// Writes into the metadata that it went on with what this broker has of it, where that is so and is not there yet.
///
/// # Errors
/// It leads no more, or is stopping.
pub(crate) async fn adopt(control: &Control) -> Result<(), Error> {
    if !control.leads() || unnamed(control).is_none() {
        return Ok(());
    }
    let _turn = control.recovering.lock().await;
    adopt_in_turn(control).await
}

async fn adopt_in_turn(control: &Control) -> Result<(), Error> {
    let Some(survivor) = unnamed(control).filter(|_| control.leads()) else { return Ok(()) };
    let (own, view) = (control.metadata_id(), group(&control.metadata()).await?);
    if view.membership.voters != [own] {
        return Ok(());
    }
    tracing::error!(from = %survivor, to = %own, "the metadata went on with what this broker has of it: changes may be lost");
    let known_lost = control.table.with(|table| {
        let voters = table.partition(METADATA_PARTITION).map(PartitionEntry::voters).unwrap_or_default();
        voters.iter().map(|place| place.replica).filter(|replica| *replica != survivor).collect()
    });
    let command = RecoverPartition {
        tp: METADATA_PARTITION,
        survivor,
        survives_as: Some(own),
        known_lost,
        reason: format!("an operator asked to go on with what broker {} has of the metadata", control.me),
        seed: rand::random(),
        validate_only: false,
    };
    control.command(MetadataCommand::RecoverPartition(command)).await.map(|_| ())
}

fn shutting_down() -> Error {
    Error::new(ErrorCode::ShuttingDown, "this broker is shutting down; try again when it is back")
}

#[cfg(test)]
mod tests {
    use flowstone_protocol::DirectoryId;

    use super::*;

    #[test]
    fn nothing_is_recovered_while_a_majority_lives() {
        let (me, own) = (BrokerId::new(3), ReplicaId::new(30));
        let voters = [1, 2, 3].map(|broker| Place {
            broker: BrokerId::new(broker),
            directory: DirectoryId::new(broker as u128),
            replica: ReplicaId::new(broker as u64 * 10),
        });
        let says = |broker: i32, controller_id: i32, metadata_voter_id: u64| {
            let said = HelloResponse { controller_id, metadata_voter_id, ..HelloResponse::default() };
            (BrokerId::new(broker), said)
        };
        let check = |own: Option<ReplicaId>, said: &[(BrokerId, HelloResponse)], refused: Option<&str>| {
            let why = majority(me, own, &voters, said);
            match (&why, refused) {
                (None, None) => {}
                (Some(why), Some(part)) if why.contains(part) => {}
                _ => panic!("{said:?}: {why:?} rather than {refused:?}"),
            }
        };
        check(Some(own), &[], None);
        // Wiped, or lost: its broker lives, and it cannot vote.
        check(Some(own), &[says(1, -1, 0), says(2, -1, 0)], None);
        check(Some(own), &[says(2, -1, 20)], Some("most voters of the metadata answer (brokers 2, 3)"));
        check(None, &[says(2, -1, 20)], None);
        check(None, &[says(1, -1, 10), says(2, -1, 20)], Some("(brokers 1, 2)"));
        // An observer's word counts as well: who is cut off from the controller himself does not know it.
        check(Some(own), &[says(4, 1, 0)], Some("broker 4 says that broker 1 leads"));
    }
}
