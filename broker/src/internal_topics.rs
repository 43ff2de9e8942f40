//! The topics behind coordinators: what they are called, how they are made, and which of their partitions a key belongs to.

use flowstone_protocol::murmur2::partition_for_key;
use flowstone_protocol::{PartitionId, pb};

use crate::topic_config::TopicOverrides;

/// Size at which a segment is closed: only closed ones are compacted.
const SEGMENT_BYTES: &str = "33554432";

/// A topic whose partitions' leaders are coordinators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum InternalTopic {
    /// `__consumer_offsets`, keyed by group.
    Groups,
    /// `__transaction_state`, keyed by transactional id.
    Transactions,
}

impl InternalTopic {
    pub(crate) const ALL: [Self; 2] = [Self::Groups, Self::Transactions];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Groups => "__consumer_offsets",
            Self::Transactions => "__transaction_state",
        }
    }

    /// The topic of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|topic| topic.name() == name)
    }

    /// The topic whose leaders coordinate what is asked for; `None` where that is not said.
    pub(crate) fn of_kind(kind: pb::CoordinatorKind) -> Option<Self> {
        match kind {
            pb::CoordinatorKind::Unspecified => None,
            pb::CoordinatorKind::Group => Some(Self::Groups),
            pb::CoordinatorKind::Transaction => Some(Self::Transactions),
        }
    }

    /// The partition of `partitions` whose leader coordinates `key`.
    pub(crate) fn partition_of(key: &str, partitions: usize) -> PartitionId {
        partition_for_key(key.as_bytes(), i32::try_from(partitions.max(1)).unwrap_or(i32::MAX))
    }

    /// Its settings.
    pub(crate) fn overrides(self) -> TopicOverrides {
        let settings = [("cleanup.policy", "compact"), ("retention.ms", "-1"), ("segment.bytes", SEGMENT_BYTES)];
        settings.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topic_config::TopicConfig;

    #[test]
    fn their_settings_are_valid_and_their_names_are_the_clusters_own() {
        for topic in InternalTopic::ALL {
            let config = TopicConfig::resolve(&TopicOverrides::new(), &topic.overrides()).expect("valid");
            assert_eq!(config.retention, None);
            assert!(topic.name().starts_with("__"));
            assert_eq!(InternalTopic::named(topic.name()), Some(topic));
        }
    }

    #[test]
    fn a_key_has_one_partition() {
        // As Kafka's murmur2 of "21" says, of 50 partitions.
        let partition = InternalTopic::partition_of("21", 50);
        assert_eq!(partition, partition_for_key(b"21", 50));
        assert_eq!(InternalTopic::partition_of("anything", 1).get(), 0);
    }
}
