//! Which partition a record goes to.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use flowstone_protocol::murmur2::partition_for_key;

use crate::record::Record;

/// Chooses the partition of records that name none.
#[derive(Clone, Default)]
pub struct Partitioner(Choice);

#[derive(Clone, Default)]
enum Choice {
    #[default]
    Murmur2,
    Sticky,
    RoundRobin,
    Custom(Arc<Custom>),
}

type Custom = dyn Fn(&Record<'_>, i32) -> i32 + Send + Sync;

impl Partitioner {
    /// The default: by Kafka's murmur2 hash of the key, so that a Kafka client's keys land in the same place; records
    /// without a key fill one partition's batch after the other.
    pub fn murmur2() -> Self {
        Self(Choice::Murmur2)
    }

    /// Keys count for nothing: one partition's batch is filled after the other.
    pub fn sticky() -> Self {
        Self(Choice::Sticky)
    }

    /// Keys count for nothing: each record goes to the next partition. Batches are smaller than with
    /// [`Partitioner::sticky`].
    pub fn round_robin() -> Self {
        Self(Choice::RoundRobin)
    }

    /// Your own: from the record and the number of partitions to a partition. A number that is none of them fails the
    /// record with `UNKNOWN_PARTITION`.
    pub fn custom(choose: impl Fn(&Record<'_>, i32) -> i32 + Send + Sync + 'static) -> Self {
        Self(Choice::Custom(Arc::new(choose)))
    }

    /// The partition; `partitions` is at least 1.
    pub(crate) fn choose(&self, record: &Record<'_>, partitions: i32, sticky: &StickyPartition) -> i32 {
        match &self.0 {
            Choice::Murmur2 => match record.key_bytes() {
                Some(key) => partition_for_key(key, partitions).get(),
                None => sticky.current(partitions),
            },
            Choice::Sticky => sticky.current(partitions),
            Choice::RoundRobin => sticky.next(partitions),
            Choice::Custom(choose) => choose(record, partitions),
        }
    }
}

impl fmt::Debug for Partitioner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Choice::Murmur2 => "murmur2",
            Choice::Sticky => "sticky",
            Choice::RoundRobin => "round robin",
            Choice::Custom(_) => "custom",
        })
    }
}

/// The partition of a topic that takes records without a key now.
#[derive(Debug)]
pub(crate) struct StickyPartition(AtomicI32);

impl StickyPartition {
    pub(crate) fn starting_at(partition: i32) -> Self {
        Self(AtomicI32::new(partition.max(0)))
    }

    fn current(&self, partitions: i32) -> i32 {
        self.0.load(Ordering::Relaxed) % partitions
    }

    fn next(&self, partitions: i32) -> i32 {
        // Wraps past i32::MAX into negative numbers; the remainder must not.
        self.0.fetch_add(1, Ordering::Relaxed).rem_euclid(partitions)
    }

    /// A batch of `from` was closed, full or not: the next partition that has a leader takes over, unless another has already.
    pub(crate) fn move_on(&self, from: i32, leaders: &[Option<i32>]) {
        let partitions = i32::try_from(leaders.len()).unwrap_or(i32::MAX);
        let now = self.0.load(Ordering::Relaxed);
        if partitions < 2 || now.rem_euclid(partitions) != from {
            return;
        }
        let with_leader = |partition: &i32| leaders[*partition as usize].is_some();
        let next = (1..partitions).map(|step| (from + step) % partitions).find(with_leader);
        // Lost to another thread that moved on: as good.
        let _ = self.0.compare_exchange(now, next.unwrap_or(from), Ordering::Relaxed, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_land_where_kafkas_land() {
        // From Kafka's own Utils test vectors (murmur2 of these keys), made positive, modulo the partitions.
        let rows: [(&[u8], i32); 6] = [
            (b"21", -973_932_308),
            (b"foobar", -790_332_482),
            (b"a-little-bit-long-string", -985_981_536),
            (b"a-little-bit-longer-string", -1_486_304_829),
            (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            (b"abc", 479_470_107),
        ];
        let sticky = StickyPartition::starting_at(0);
        for (key, hash) in rows {
            for partitions in [1, 7, 12, 1000] {
                let expected = (hash & i32::MAX) % partitions;
                let record = Record::to("t").key(key);
                assert_eq!(Partitioner::murmur2().choose(&record, partitions, &sticky), expected, "{key:?}");
            }
        }
    }

    #[test]
    fn without_a_key_one_partition_is_kept_until_its_batch_closes() {
        let sticky = StickyPartition::starting_at(2);
        let record = Record::to("t").value("v");
        let choose = || Partitioner::murmur2().choose(&record, 4, &sticky);
        assert_eq!([choose(), choose(), choose()], [2, 2, 2]);
        sticky.move_on(2, &[Some(1), None, Some(1), None]);
        assert_eq!(choose(), 0, "3 has no leader");
        sticky.move_on(2, &[Some(1); 4]);
        assert_eq!(choose(), 0, "a batch of another partition moves nothing");
        sticky.move_on(0, &[Some(1), None, None, None]);
        assert_eq!(choose(), 0, "nowhere to go");
    }

    #[test]
    fn round_robin_survives_its_own_overflow() {
        let sticky = StickyPartition::starting_at(i32::MAX);
        let record = Record::to("t").key("k");
        let chosen: Vec<i32> = (0..4).map(|_| Partitioner::round_robin().choose(&record, 3, &sticky)).collect();
        assert!(chosen.iter().all(|partition| (0..3).contains(partition)), "{chosen:?}");
    }

    #[test]
    fn ones_own_sees_record_and_count() {
        let sticky = StickyPartition::starting_at(0);
        let by_length = Partitioner::custom(|record, partitions| {
            record.value_bytes().map_or(0, |value| value.len() as i32) % partitions
        });
        assert_eq!(by_length.choose(&Record::to("t").value("abcd"), 3, &sticky), 1);
    }
}
