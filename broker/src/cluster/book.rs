//! Keeps the peer network told of who the other brokers are: from the founding, the seeds, and then the metadata.

use std::collections::HashMap;
use std::time::Duration;

use flowstone_protocol::peer::HelloResponse;
use flowstone_protocol::{BrokerId, Error, Offset};

use super::form::{Founder, Heard};
use crate::controller::table::MetadataTable;
use crate::coordinator::Published;
use crate::peer::{PeerBook, PeerEntry, PeerIdentity};

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
        for seed in seeds.iter().filter(|seed| **seed != own_address) {
            let Ok(response) = hello(seed.clone()).await else { continue };
            let Some(heard) = Heard::from_message(&response) else { continue };
            // Members of this cluster alone are believed.
            if heard.founding.as_ref().map(|founding| founding.cluster) != me.cluster {
                continue;
            }
            let known = response.brokers.iter().map(|known| (BrokerId::new(known.broker_id), &known.peer_address));
            told_by_others.extend(known.map(|(broker, address)| (broker, address.clone())));
            told.insert(heard.broker, heard.peer_address.clone());
        }
        // Where a broker is, it knows best itself: when all came back at other addresses, what the others know of it are
        // the old ones.
        told_by_others.retain(|broker, _| !told.contains_key(broker));
        for (broker, address) in told_by_others.iter().chain(&told) {
            if *broker != me.broker && !address.is_empty() {
                book.set_address(*broker, address);
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Follows the metadata until aborted.
pub(crate) async fn follow(table: Published<MetadataTable>, book: PeerBook, me: BrokerId) {
    let mut changes = table.changes();
    let mut seen: Option<Offset> = None;
    loop {
        changes.borrow_and_update();
        let changed = table.with(|table| {
            let at = table.brokers_changed_at();
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
            Some((at, entries))
        });
        if let Some((at, entries)) = changed {
            for (broker, entry) in &entries {
                book.set(*broker, entry.clone());
            }
            // Only who was registered and is not any more is forgotten: a founder may still be on its way to register.
            for (broker, _) in book.all() {
                if !entries.contains_key(&broker) && seen.is_some() && table.with(|table| was_removed(table, broker)) {
                    book.remove(broker);
                }
            }
            seen = Some(at);
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// No part of the cluster, and none of those that it was founded on and that may not have registered yet.
fn was_removed(table: &MetadataTable, broker: BrokerId) -> bool {
    let is_founder = table.founding().is_some_and(|founding| {
        founding.voters.iter().any(|voter| voter.broker == broker && table.removed(voter.directory).is_none())
    });
    table.broker(broker).is_none() && !is_founder
}
