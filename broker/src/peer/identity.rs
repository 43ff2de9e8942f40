//! Who speaks: what every call and every stream begins with, and what is refused.

use bytes::Bytes;
use flowstone_protocol::peer as pb;
use flowstone_protocol::{BrokerId, ClusterId, DirectoryId, Error, ErrorCode};

use super::book::PeerBook;

/// Version of what brokers say to each other. Compatible additions do not change it.
pub const PROTOCOL_VERSION: u32 = 1;

/// A broker, as it names itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// Its number.
    pub broker: BrokerId,
    /// Its data directory.
    pub directory: DirectoryId,
    /// Random at each start of its process.
    pub incarnation: u64,
    /// Its cluster, once it belongs to one.
    pub cluster: Option<ClusterId>,
}

/// What a call needs to know of its caller before it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    /// Speaks the same protocol: for those that still look for their cluster.
    Anyone,
    /// Belongs to the same cluster, and may still have to be registered there.
    SameCluster,
    /// Is registered with its directory.
    Registered,
}

impl PeerIdentity {
    /// On the wire; `to` is whom it believes to reach.
    pub(crate) fn to_caller(self, to: Option<BrokerId>) -> pb::Caller {
        pb::Caller {
            protocol_version: PROTOCOL_VERSION,
            cluster_id: self.cluster.map_or_else(Bytes::new, |id| Bytes::copy_from_slice(&id.to_bytes())),
            broker_id: self.broker.get(),
            directory_id: Bytes::copy_from_slice(&self.directory.to_bytes()),
            incarnation: self.incarnation,
            to_broker_id: to.map_or(-1, BrokerId::get),
        }
    }

    /// Who a caller says it is.
    ///
    /// # Errors
    /// Another protocol, or fields that are no ids.
    pub(crate) fn from_caller(caller: Option<&pb::Caller>) -> Result<Self, Error> {
        let Some(caller) = caller else {
            return Err(refused("it does not say who it is; only brokers connect to the peer listener".to_owned()));
        };
        if caller.protocol_version != PROTOCOL_VERSION {
            return Err(Error::new(
                ErrorCode::Unsupported,
                format!(
                    "broker {} speaks version {} of the peer protocol, and the other side version {PROTOCOL_VERSION}; run \
                     versions of Flowstone on both that share one",
                    caller.broker_id, caller.protocol_version
                ),
            ));
        }
        let Some(directory) = DirectoryId::from_slice(&caller.directory_id) else {
            return Err(refused(format!(
                "broker {} names no data directory; this is a defect there",
                caller.broker_id
            )));
        };
        let cluster = match &*caller.cluster_id {
            [] => None,
            id => Some(ClusterId::from_slice(id).ok_or_else(|| {
                refused(format!("broker {} names a cluster by {} bytes rather than 16", caller.broker_id, id.len()))
            })?),
        };
        let broker = BrokerId::new(caller.broker_id);
        Ok(Self { broker, directory, incarnation: caller.incarnation, cluster })
    }
}

/// Whether `own` serves this caller.
///
/// # Errors
/// What does not fit, and what to do about it.
pub(crate) fn check_caller(
    own: &PeerIdentity,
    book: &PeerBook,
    caller: Option<&pb::Caller>,
    trust: Trust,
) -> Result<PeerIdentity, Error> {
    let from = PeerIdentity::from_caller(caller)?;
    let to = caller.map_or(-1, |caller| caller.to_broker_id);
    if to != -1 && to != own.broker.get() {
        return Err(refused(format!(
            "broker {} looks for broker {to} and has reached broker {}; correct the advertised peer address of broker {to}",
            from.broker, own.broker
        )));
    }
    if trust == Trust::Anyone {
        return Ok(from);
    }
    match (from.cluster, own.cluster) {
        (Some(theirs), Some(ours)) if theirs == ours => {}
        (_, None) => {
            return Err(Error::new(
                ErrorCode::LeaderNotReady,
                format!("broker {} does not belong to a cluster yet; try again in a moment", own.broker),
            ));
        }
        (theirs, Some(ours)) => {
            let theirs = theirs.map_or_else(|| "none".to_owned(), |id| id.to_string());
            return Err(refused(format!(
                "broker {} is of cluster {theirs}, and broker {} of cluster {ours}; correct cluster.seeds, or give it the \
                 data directory that belongs here",
                from.broker, own.broker
            )));
        }
    }
    if from.broker == own.broker && from.directory != own.directory {
        return Err(refused(format!(
            "both sides are broker {}, with different data directories; give one of them another node.id",
            own.broker
        )));
    }
    // What it asks of itself it may.
    if trust == Trust::Registered && from.broker != own.broker {
        check_directory(book, &from)?;
    }
    Ok(from)
}

/// Whether a broker is registered with the directory that it names.
///
/// # Errors
/// It is not.
pub(crate) fn check_directory(book: &PeerBook, from: &PeerIdentity) -> Result<(), Error> {
    match book.get(from.broker).and_then(|entry| entry.directory) {
        Some(registered) if registered == from.directory => Ok(()),
        Some(registered) => Err(refused(format!(
            "broker {} is registered with data directory {registered}, not with {}; if that one is lost, wait until the \
             new one is registered in its place, and never run two brokers with one node.id",
            from.broker, from.directory
        ))),
        // It may be registered already, and this broker only does not know yet.
        None => Err(Error::new(
            ErrorCode::LeaderNotReady,
            format!("broker {} is not registered, as far as is known here; it has to register first", from.broker),
        )),
    }
}

/// Whether the answerer is who was dialled.
///
/// # Errors
/// It is another broker, cluster or directory.
pub(crate) fn check_answerer(
    own: &PeerIdentity,
    book: &PeerBook,
    to: BrokerId,
    address: &str,
    answerer: Option<&pb::Caller>,
) -> Result<PeerIdentity, Error> {
    let from = PeerIdentity::from_caller(answerer)?;
    if from.broker != to {
        return Err(refused(format!(
            "at {address}, the peer address of broker {to}, broker {} answers; correct advertise.peer of one of them",
            from.broker
        )));
    }
    if from.cluster != own.cluster {
        return Err(refused(format!(
            "at {address}, the peer address of broker {to}, another cluster answers ({}); correct advertise.peer there",
            from.cluster.map_or_else(|| "none".to_owned(), |id| id.to_string())
        )));
    }
    if book.get(to).and_then(|entry| entry.directory).is_some() {
        check_directory(book, &from)?;
    }
    Ok(from)
}

fn refused(message: String) -> Error {
    Error::new(ErrorCode::PermissionDenied, message)
}

#[cfg(test)]
mod tests {
    use super::super::book::PeerEntry;
    use super::*;

    fn identity(broker: i32, directory: u128, cluster: Option<u128>) -> PeerIdentity {
        PeerIdentity {
            broker: BrokerId::new(broker),
            directory: DirectoryId::new(directory),
            incarnation: 9,
            cluster: cluster.map(ClusterId::new),
        }
    }

    #[test]
    fn who_is_served_and_who_is_not() {
        let own = identity(1, 11, Some(5));
        let book = PeerBook::new();
        book.set(BrokerId::new(2), PeerEntry { address: String::new(), directory: Some(DirectoryId::new(22)) });
        let to_one = Some(BrokerId::new(1));
        let check = |caller: pb::Caller, trust: Trust, expected: Option<&str>| {
            let checked = check_caller(&own, &book, Some(&caller), trust);
            match (checked, expected) {
                (Ok(_), None) => {}
                (Err(error), Some(part)) if error.message.contains(part) => {}
                (checked, expected) => panic!("{caller:?}, {trust:?}: {checked:?} rather than {expected:?}"),
            }
        };
        let good = identity(2, 22, Some(5));
        check(good.to_caller(to_one), Trust::Registered, None);
        check(good.to_caller(None), Trust::Registered, None);
        check(good.to_caller(Some(BrokerId::new(3))), Trust::Anyone, Some("looks for broker 3"));
        check(identity(2, 23, Some(5)).to_caller(to_one), Trust::Registered, Some("is registered with data directory"));
        check(identity(2, 23, Some(5)).to_caller(to_one), Trust::SameCluster, None);
        check(identity(3, 33, Some(5)).to_caller(to_one), Trust::Registered, Some("not registered"));
        check(identity(3, 33, Some(6)).to_caller(to_one), Trust::SameCluster, Some("cluster.seeds"));
        check(identity(3, 33, None).to_caller(to_one), Trust::SameCluster, Some("of cluster none"));
        check(identity(3, 33, None).to_caller(to_one), Trust::Anyone, None);
        check(identity(1, 12, Some(5)).to_caller(to_one), Trust::SameCluster, Some("another node.id"));
        let newer = pb::Caller { protocol_version: 2, ..good.to_caller(to_one) };
        check(newer, Trust::Anyone, Some("version 2 of the peer protocol"));
        let cut = pb::Caller { directory_id: Bytes::from_static(b"short"), ..good.to_caller(to_one) };
        check(cut, Trust::Anyone, Some("no data directory"));
        let odd = pb::Caller { cluster_id: Bytes::from_static(b"short"), ..good.to_caller(to_one) };
        check(odd, Trust::Anyone, Some("by 5 bytes"));
        assert!(check_caller(&own, &book, None, Trust::Anyone).is_err());
        let alone = identity(1, 11, None);
        let early = check_caller(&alone, &book, Some(&good.to_caller(to_one)), Trust::SameCluster);
        assert!(early.expect_err("too early").is_retriable());
    }

    #[test]
    fn an_answerer_that_is_another_is_refused() {
        let own = identity(1, 11, Some(5));
        let book = PeerBook::new();
        book.set_address(BrokerId::new(2), "b:1");
        let check = |answerer: PeerIdentity| {
            check_answerer(&own, &book, BrokerId::new(2), "b:1", Some(&answerer.to_caller(None))).is_ok()
        };
        assert!(check(identity(2, 22, Some(5))), "its directory is not known yet");
        assert!(!check(identity(3, 22, Some(5))));
        assert!(!check(identity(2, 22, Some(6))));
        book.set(BrokerId::new(2), PeerEntry { address: "b:1".to_owned(), directory: Some(DirectoryId::new(1)) });
        assert!(!check(identity(2, 22, Some(5))));
    }
}
