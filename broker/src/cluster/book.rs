//! Keeps the peer network told of who the other brokers are: from the founding, the seeds, and then the metadata.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use flowstone_protocol::peer::HelloResponse;
use flowstone_protocol::{BrokerId, Error, Offset};

use super::belonging::Kept;
use super::form::{Founder, Heard};
use crate::controller::table::MetadataTable;
use crate::coordinator::Published;
use crate::peer::{PeerBook, PeerEntry, PeerIdentity, PeerNetwork};

/// Between two looks around.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// One of those that the cluster was founded on: its directory may speak before it is registered.
pub(crate) fn enter(book: &PeerBook, founder: &Founder) {
    let entry = PeerEntry { address: founder.peer_address.clone(), directory: Some(founder.directory) };
    book.set(founder.broker, entry);
}

/// Asks the seeds again and again who else there is, until aborted: for a broker that cannot reach the controller by what
/// it knows.
pub(crate) async fn look_around<H, A>(
    seeds: Vec<String>,
    own_address: String,
    book: PeerBook,
    hello: H,
    me: PeerIdentity,
) where
    H: Fn(String) -> A,
    A: Future<Output = Result<HelloResponse, Error>>,
{
    loop {
        let mut told = HashMap::new();
        let mut told_by_others = HashMap::new();
        let ask = async |address: &String| {
            let response = hello(address.clone()).await.ok()?;
            let heard = Heard::from_message(&response)?;
            // Members of this cluster alone are believed.
            let is_member = heard.founding.as_ref().map(|founding| founding.cluster) == me.cluster;
            is_member.then_some((heard, response.brokers))
        };
        for seed in seeds.iter().filter(|seed| **seed != own_address) {
            let Some((heard, brokers)) = ask(seed).await else { continue };
            told_by_others
                .extend(brokers.into_iter().map(|known| (BrokerId::new(known.broker_id), known.peer_address)));
            told.insert(heard.broker, (heard.peer_address, heard.directory));
        }
        // Where a broker is, it knows best itself: when all came back at other addresses, what the others know of it are
        // the old ones. And which directory it keeps, it alone says: the metadata may be led by one that joined after
        // all that this broker knows, and whose streams it would refuse.
        told_by_others
            .retain(|broker, address| !told.contains_key(broker) && *broker != me.broker && !address.is_empty());
        for (broker, address) in &told_by_others {
            match ask(address).await {
                Some((heard, _)) if heard.broker == *broker => {
                    told.insert(heard.broker, (heard.peer_address, heard.directory));
                }
                _ => book.set_address(*broker, address),
            }
        }
        for (broker, (address, directory)) in &told {
            if *broker != me.broker && !address.is_empty() {
                book.introduce(*broker, address, *directory);
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Follows the metadata until aborted.
pub(crate) async fn follow(
    table: Published<MetadataTable>,
    network: Weak<PeerNetwork>,
    book: PeerBook,
    me: BrokerId,
    kept: Arc<Kept>,
) {
    let mut changes = table.changes();
    // With the metadata's recovery: an offset of another one says nothing.
    let mut seen: Option<(i64, Offset)> = None;
    // What the metadata said last: only what it says anew counts, as a broker may have told a newer address since.
    let mut said: HashMap<BrokerId, PeerEntry> = HashMap::new();
    loop {
        changes.borrow_and_update();
        let changed = table.with(|table| {
            let at = (table.recovery(), table.brokers_changed_at());
            if seen == Some(at) || table.founding().is_none() {
                return None;
            }
            let others = table.brokers().filter(|broker| broker.id != me);
            let entries: HashMap<BrokerId, PeerEntry> = others
                .map(|broker| {
                    let entry = PeerEntry { address: broker.peer_address.clone(), directory: Some(broker.directory) };
                    (broker.id, entry)
                })
                .collect();
            let starts: Vec<(BrokerId, u64)> =
                table.brokers().filter(|broker| broker.id != me).map(|known| (known.id, known.incarnation)).collect();
            Some((at, entries, starts))
        });
        if let Some((at, entries, starts)) = changed {
            for (broker, entry) in entries.iter().filter(|(broker, entry)| said.get(broker) != Some(entry)) {
                book.set(*broker, entry.clone());
            }
            for (broker, incarnation) in starts {
                book.set_start(broker, incarnation);
            }
            // Only who was taken out is forgotten: others may be on their way to register, for the first time or since a
            // metadata that went on with a loss does not know them.
            for (broker, entry) in book.all() {
                if !entries.contains_key(&broker)
                    && table.with(|table| was_removed(table, broker, &entry))
                    && let Some(network) = network.upgrade()
                {
                    network.forget(broker);
                }
            }
            said = entries;
            seen = Some(at);
            // After a start in which nobody can read the metadata yet, they must still know each other.
            let brokers = table.with(registered);
            if let Err(error) = kept.change(move |belonging| belonging.brokers = brokers).await {
                tracing::warn!(error, "cannot note who the other brokers are");
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// All brokers, with their directories.
fn registered(table: &MetadataTable) -> Vec<Founder> {
    // A cluster of one needs no note, nor the flushes that it takes.
    if table.brokers().count() <= 1 {
        return Vec::new();
    }
    let brokers = table.brokers().map(|broker| Founder {
        broker: broker.id,
        directory: broker.directory,
        replica: broker.metadata_replica,
        peer_address: broker.peer_address.clone(),
    });
    brokers.collect()
}

/// Whether what is known of a broker is from before it was decommissioned.
fn was_removed(table: &MetadataTable, broker: BrokerId, entry: &PeerEntry) -> bool {
    entry.directory.is_some_and(|directory| table.removed(directory) == Some(broker))
}
