//! How answers leave a shard: parked replies, and the permits that bound what is in flight.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Where one answer goes. It is called at most once, on the shard's thread or on a pool's: it must hand the answer on and
/// return at once, never block.
///
/// A reply that is dropped unanswered means that the shards were stopped in the middle.
pub struct Reply<T>(Way<T>);

enum Way<T> {
    Call(Box<dyn FnOnce(T) + Send>),
    CallWhile(Weak<dyn Any + Send + Sync>, Box<dyn FnOnce(T) + Send>),
    Channel(oneshot::Sender<T>),
    Nowhere,
}

impl<T> Reply<T> {
    /// Calls `then` with the answer.
    pub fn new(then: impl FnOnce(T) + Send + 'static) -> Self {
        Self(Way::Call(Box::new(then)))
    }

    /// Calls `then` with the answer for as long as `asker` lives (a connection, say); afterwards the request is
    /// abandoned and may be dropped unanswered.
    pub fn while_alive<A: Any + Send + Sync>(asker: &Arc<A>, then: impl FnOnce(T) + Send + 'static) -> Self {
        let asker: Weak<A> = Arc::downgrade(asker);
        Self(Way::CallWhile(asker, Box::new(then)))
    }

    /// Nobody waits.
    pub fn nowhere() -> Self {
        Self(Way::Nowhere)
    }

    /// Hands the answer on.
    pub fn send(self, answer: T) {
        match self.0 {
            Way::Call(then) => then(answer),
            Way::CallWhile(asker, then) => {
                if asker.strong_count() > 0 {
                    then(answer);
                }
            }
            // The asker is gone: nobody is left to tell.
            Way::Channel(sender) => drop(sender.send(answer)),
            Way::Nowhere => {}
        }
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_abandoned(&self) -> bool {
        match &self.0 {
            Way::Call(_) => false,
            Way::CallWhile(asker, _) => asker.strong_count() == 0,
            Way::Channel(sender) => sender.is_closed(),
            Way::Nowhere => true,
        }
    }
}

impl<T> From<oneshot::Sender<T>> for Reply<T> {
    fn from(sender: oneshot::Sender<T>) -> Self {
        Self(Way::Channel(sender))
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_abandoned() { "Reply(abandoned)" } else { "Reply" })
    }
}

/// Room for one request's bytes in its shard. It rides with the request and is given back when the answer leaves.
#[derive(Debug)]
pub struct Permit {
    // Held for its drop alone.
    _held: Option<OwnedSemaphorePermit>,
}

impl Permit {
    /// A permit that takes no room: for what the broker itself appends, which is bounded elsewhere.
    pub const fn unbounded() -> Self {
        Self { _held: None }
    }
}

/// The bytes that may be in flight in one shard.
#[derive(Debug, Clone)]
pub(crate) struct ByteBudget {
    semaphore: Arc<Semaphore>,
    bytes_max: u32,
}

impl ByteBudget {
    pub(crate) fn new(bytes_max: usize) -> Self {
        let bytes_max = u32::try_from(bytes_max).unwrap_or(u32::MAX);
        Self { semaphore: Arc::new(Semaphore::new(bytes_max as usize)), bytes_max }
    }

    /// Waits for room, first come first served. A request above the whole budget takes all of it: it passes alone.
    pub(crate) async fn reserve(&self, bytes: usize) -> Permit {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.bytes_max);
        // The semaphore is never closed: the error can not happen, and a request without a permit is refused later anyway
        // when the shard is gone.
        Permit { _held: Arc::clone(&self.semaphore).acquire_many_owned(bytes).await.ok() }
    }

    pub(crate) fn free(&self) -> usize {
        self.semaphore.available_permits()
    }

    pub(crate) fn try_reserve(&self, bytes: usize) -> Option<Permit> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.bytes_max);
        Arc::clone(&self.semaphore).try_acquire_many_owned(bytes).ok().map(|held| Permit { _held: Some(held) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_abandoned_when_its_asker_is_gone() {
        let (sender, receiver) = oneshot::channel::<u8>();
        let reply = Reply::from(sender);
        assert!(!reply.is_abandoned());
        drop(receiver);
        assert!(reply.is_abandoned());

        let asker = Arc::new(());
        let (said, heard) = std::sync::mpsc::channel();
        let reply = Reply::while_alive(&asker, move |answer: u8| said.send(answer).unwrap());
        assert!(!reply.is_abandoned());
        drop(asker);
        assert!(reply.is_abandoned());
        reply.send(1);
        assert!(heard.recv().is_err(), "an abandoned reply is not called");
    }

    #[test]
    fn a_permit_gives_its_room_back() {
        let budget = ByteBudget::new(100);
        let first = budget.try_reserve(60).expect("room for 60 of 100");
        assert!(budget.try_reserve(60).is_none());
        drop(first);
        // More than the whole budget takes all of it, alone.
        let all = budget.try_reserve(1_000).expect("all of it");
        assert!(budget.try_reserve(1).is_none());
        drop(all);
        assert!(budget.try_reserve(1).is_some());
    }
}
