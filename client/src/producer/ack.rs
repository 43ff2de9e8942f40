//! What became of a batch, shared by all records in it, and one record's view of it.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::task::{Context, Poll, Waker};

use crate::error::{Error, Result};
use crate::producer::sender::PartitionQueue;
use crate::record::RecordMetadata;

/// How a batch ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Stored; -1 for an offset that is not known (`acks=none`, or a duplicate older than the broker remembers).
    Stored { base_offset: i64, log_append_time: Option<i64> },
    /// None of its records is known to be stored.
    Failed(Error),
    /// Sent again as two: the records before `at`, and the others.
    Split { at: i32, halves: [Arc<Delivery>; 2] },
}

/// What became of one batch. Resolved once, for all its records.
#[derive(Debug)]
pub(crate) struct Delivery {
    topic: Arc<str>,
    partition: i32,
    outcome: OnceLock<Outcome>,
    /// Who awaits it; a place each, so that a future polled many times takes one place. Guarded so that nobody
    /// registers between the outcome and the waking; nothing awaits inside.
    waiting: Mutex<Vec<Waker>>,
    /// Somebody awaits it: it must not wait for more records.
    wanted: AtomicBool,
    queue: Weak<PartitionQueue>,
}

impl Delivery {
    pub(crate) fn new(topic: Arc<str>, partition: i32, queue: Weak<PartitionQueue>) -> Arc<Self> {
        let (outcome, waiting, wanted) = (OnceLock::new(), Mutex::default(), AtomicBool::new(false));
        Arc::new(Self { topic, partition, outcome, waiting, wanted, queue })
    }

    /// A part of this batch that goes its own way.
    pub(crate) fn part(&self) -> Arc<Self> {
        let part = Self::new(self.topic.clone(), self.partition, self.queue.clone());
        part.want();
        part
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// Marks it as awaited; whether it was not before.
    pub(crate) fn want(&self) -> bool {
        !self.wanted.swap(true, Ordering::AcqRel)
    }

    /// Tells everybody; the first outcome counts.
    pub(crate) fn resolve(&self, outcome: Outcome) {
        let waiting = {
            let mut waiting = crate::locked(&self.waiting);
            if self.outcome.set(outcome).is_err() {
                return;
            }
            std::mem::take(&mut *waiting)
        };
        for waker in waiting {
            waker.wake();
        }
    }

    /// The outcome, or a place in the waiting list.
    fn poll_outcome(&self, place: &mut Option<usize>, context: &mut Context<'_>) -> Poll<&Outcome> {
        if let Some(outcome) = self.outcome.get() {
            return Poll::Ready(outcome);
        }
        {
            let mut waiting = crate::locked(&self.waiting);
            if let Some(outcome) = self.outcome.get() {
                return Poll::Ready(outcome);
            }
            match place.and_then(|place| waiting.get_mut(place)) {
                Some(waker) => waker.clone_from(context.waker()),
                None => {
                    *place = Some(waiting.len());
                    waiting.push(context.waker().clone());
                }
            }
        }
        if self.want()
            && let Some(queue) = self.queue.upgrade()
        {
            queue.send_now();
        }
        // Sending may have failed the batch at once.
        self.outcome.get().map_or(Poll::Pending, Poll::Ready)
    }

    /// Waits until it, and all it was split into, is resolved.
    pub(crate) async fn settled(self: Arc<Self>) {
        let mut open = vec![self];
        while let Some(delivery) = open.pop() {
            let mut place = None;
            let halves = std::future::poll_fn(|context| {
                delivery.poll_outcome(&mut place, context).map(|outcome| match outcome {
                    Outcome::Split { halves, .. } => Some(halves.clone()),
                    _ => None,
                })
            })
            .await;
            open.extend(halves.into_iter().flatten());
        }
    }
}

/// The acknowledgement of one record: a future of where it lies. Awaiting it sends its batch at once; dropping it
/// changes nothing about the record.
///
/// # Errors
/// What the broker refused the record for; `TIMED_OUT` where the delivery timeout passed first, and the record may or
/// may not be stored.
#[derive(Debug)]
#[must_use = "a record may still fail: await its Ack, or flush the producer"]
pub struct Ack {
    delivery: Arc<Delivery>,
    index: i32,
    timestamp: i64,
    place: Option<usize>,
}

impl Ack {
    pub(crate) fn new(delivery: Arc<Delivery>, index: i32, timestamp: i64) -> Self {
        Self { delivery, index, timestamp, place: None }
    }

    /// Whether awaiting it returns at once.
    pub fn is_done(&self) -> bool {
        match self.delivery.outcome.get() {
            Some(Outcome::Split { at, halves }) => {
                let (delivery, index) = half(halves, *at, self.index);
                Self { delivery, index, timestamp: self.timestamp, place: None }.is_done()
            }
            Some(_) => true,
            None => false,
        }
    }
}

fn half(halves: &[Arc<Delivery>; 2], at: i32, index: i32) -> (Arc<Delivery>, i32) {
    if index < at { (halves[0].clone(), index) } else { (halves[1].clone(), index - at) }
}

impl Future for Ack {
    type Output = Result<RecordMetadata>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let this = &mut *self;
            let Poll::Ready(outcome) = this.delivery.poll_outcome(&mut this.place, context) else {
                return Poll::Pending;
            };
            let (delivery, index) = match outcome {
                Outcome::Stored { base_offset, log_append_time } => {
                    return Poll::Ready(Ok(RecordMetadata {
                        topic: this.delivery.topic.clone(),
                        partition: this.delivery.partition,
                        offset: if *base_offset < 0 { -1 } else { base_offset + i64::from(this.index) },
                        timestamp: log_append_time.unwrap_or(this.timestamp),
                    }));
                }
                Outcome::Failed(error) => return Poll::Ready(Err(error.clone())),
                Outcome::Split { at, halves } => half(halves, *at, this.index),
            };
            *this = Self { delivery, index, timestamp: this.timestamp, place: None };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;
    use crate::error::ErrorCode;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn delivery() -> Arc<Delivery> {
        Delivery::new("t".into(), 3, Weak::new())
    }

    fn poll(ack: &mut Ack, count: &Arc<Count>) -> Poll<Result<RecordMetadata>> {
        Pin::new(ack).poll(&mut Context::from_waker(&Waker::from(count.clone())))
    }

    #[test]
    fn one_outcome_wakes_every_waiting_record_once() {
        let (delivery, count) = (delivery(), Arc::new(Count::default()));
        let mut acks: Vec<Ack> = (0..3).map(|index| Ack::new(delivery.clone(), index, 100)).collect();
        for ack in &mut acks {
            // Polled twice, it still takes one place.
            assert!(poll(ack, &count).is_pending() && poll(ack, &count).is_pending() && !ack.is_done());
        }
        assert!(delivery.is_wanted());
        delivery.resolve(Outcome::Stored { base_offset: 40, log_append_time: None });
        delivery.resolve(Outcome::Failed(Error::new(ErrorCode::Internal, "too late")));
        assert_eq!(count.0.load(Ordering::Relaxed), 3);
        for (ack, offset) in acks.iter_mut().zip(40..) {
            let Poll::Ready(Ok(at)) = poll(ack, &count) else { panic!("not done") };
            assert_eq!((at.offset, at.partition, at.timestamp), (offset, 3, 100));
        }
    }

    #[test]
    fn records_follow_the_half_that_they_are_in() {
        let (whole, count) = (delivery(), Arc::new(Count::default()));
        let halves = [whole.part(), whole.part()];
        let mut acks: Vec<Ack> = (0..4).map(|index| Ack::new(whole.clone(), index, 0)).collect();
        assert!(poll(&mut acks[0], &count).is_pending());
        whole.resolve(Outcome::Split { at: 1, halves: halves.clone() });
        assert!(poll(&mut acks[0], &count).is_pending() && !acks[3].is_done());
        halves[0].resolve(Outcome::Failed(Error::new(ErrorCode::BatchTooLarge, "too large")));
        halves[1].resolve(Outcome::Stored { base_offset: 7, log_append_time: Some(5) });
        assert!(matches!(poll(&mut acks[0], &count), Poll::Ready(Err(_))));
        for (ack, offset) in acks[1..].iter_mut().zip(7..) {
            let Poll::Ready(Ok(at)) = poll(ack, &count) else { panic!("not done") };
            assert_eq!((at.offset, at.timestamp), (offset, 5));
        }
    }

    #[test]
    fn an_unknown_offset_stays_unknown() {
        let (delivery, count) = (delivery(), Arc::new(Count::default()));
        let mut ack = Ack::new(delivery.clone(), 5, 0);
        delivery.resolve(Outcome::Stored { base_offset: -1, log_append_time: None });
        let Poll::Ready(Ok(at)) = poll(&mut ack, &count) else { panic!("not done") };
        assert_eq!(at.offset, -1);
    }
}
