//! A table under test: commands in, their records taken in at once.

use std::sync::Arc;

use flowstone_protocol::internal::MetadataRecord;
use flowstone_protocol::{
    BrokerId, ClusterId, DirectoryId, Error, LeaderEpoch, Offset, ReplicaId, Timestamp, TopicId, TopicPartition,
};

use super::commands::{
    CreateTopic, Leadership, MetadataCommand, MetadataReply, MetadataRules, MovePartition, MoveProgress, PlannedMove,
    Registration,
};
use super::placement::Draws;
use super::table::{FEATURE_LEVEL, MetadataTable, Place, Topic};
use crate::coordinator::StateMachine;

/// A controller's table, with the records that led to it.
#[derive(Debug)]
pub(super) struct Cluster {
    table: MetadataTable,
    pub(super) log: Vec<MetadataRecord>,
    draws: Draws,
}

pub(super) fn rules() -> MetadataRules {
    MetadataRules {
        topics_max: 100,
        partitions_per_topic_max: 2_000,
        partitions_max: 10_000,
        batch_bytes_max: 1 << 24,
        internal_partitions: 4,
        topic_defaults: Default::default(),
    }
}

pub(super) fn registration(id: i32, directory: u128, rack: &str, incarnation: u64) -> Registration {
    Registration {
        id: BrokerId::new(id),
        directory: DirectoryId::new(directory),
        client_address: format!("127.0.0.1:{}", 7_070 + id),
        peer_address: format!("127.0.0.1:{}", 7_170 + id),
        rack: rack.to_owned(),
        version: "0".to_owned(),
        incarnation,
        feature_level: FEATURE_LEVEL,
        seed: incarnation,
    }
}

impl Cluster {
    /// Brokers from 1 on, with the directories of the same numbers; the first three vote on the metadata.
    pub(super) fn of(brokers: usize) -> Self {
        Self::of_racks(&vec![""; brokers])
    }

    pub(super) fn of_racks(racks: &[&str]) -> Self {
        Self::with_rules(racks, rules())
    }

    pub(super) fn with_rules(racks: &[&str], rules: MetadataRules) -> Self {
        let mut cluster = Self { table: MetadataTable::new(rules), log: Vec::new(), draws: Draws::from_seed(0xc0ffee) };
        let voters = (1..=racks.len().min(3)).map(|id| Place {
            broker: BrokerId::new(id as i32),
            directory: DirectoryId::new(id as u128),
            replica: ReplicaId::new(1_000 + id as u64),
        });
        let voters = voters.collect();
        cluster.run(MetadataCommand::Found { cluster: ClusterId::new(9), voters, feature_level: 1 }).expect("founded");
        for (id, rack) in (1..).zip(racks) {
            cluster.register_in(id, rack);
        }
        cluster
    }

    pub(super) fn table(&self) -> &MetadataTable {
        &self.table
    }

    pub(super) fn draw(&mut self) -> u64 {
        self.draws.next()
    }

    pub(super) fn run(&mut self, command: MetadataCommand) -> Result<MetadataReply, Error> {
        let (records, reply) = self.table.decide(command, Timestamp::new(1_700_000_000_000));
        for record in records {
            let at = Offset::new(self.log.len() as i64);
            self.table.apply(record.clone(), at).expect("it was decided in this very state");
            self.log.push(record);
        }
        reply
    }

    pub(super) fn run_all(&mut self, commands: Vec<MetadataCommand>) {
        for command in commands {
            let text = format!("{command:?}");
            self.run(command).unwrap_or_else(|error| panic!("{text}: {error}"));
        }
    }

    pub(super) fn moves(&mut self, command: MetadataCommand) -> (Vec<PlannedMove>, bool) {
        match self.run(command).expect("decided") {
            MetadataReply::Moves { moves, more } => (moves, more),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn register(&mut self, id: i32) {
        self.register_in(id, "");
    }

    pub(super) fn register_in(&mut self, id: i32, rack: &str) {
        let incarnation = self.draw();
        self.run(MetadataCommand::RegisterBroker(registration(id, id as u128, rack, incarnation))).expect("registered");
    }

    pub(super) fn try_register(&mut self, id: i32, directory: u128) -> Result<MetadataReply, Error> {
        let incarnation = self.draw();
        self.run(MetadataCommand::RegisterBroker(registration(id, directory, "", incarnation)))
    }

    /// It starts once more, with the same directory.
    pub(super) fn restart(&mut self, id: i32) {
        let directory = self.table.broker(BrokerId::new(id)).expect("registered").directory;
        self.try_register(id, directory.get()).expect("registered");
    }

    pub(super) fn incarnation(&self, id: i32) -> u64 {
        self.table.broker(BrokerId::new(id)).expect("registered").incarnation
    }

    pub(super) fn fence(&mut self, id: i32) {
        let incarnation = self.incarnation(id);
        self.run(MetadataCommand::FenceBroker { broker: BrokerId::new(id), incarnation }).expect("fenced");
    }

    pub(super) fn create(&mut self, name: &str, partitions: i32, replicas: i32) {
        let command = self.creation(name, partitions, replicas);
        self.run(MetadataCommand::CreateTopic(command)).expect("created");
    }

    pub(super) fn creation(&mut self, name: &str, partitions: i32, replicas: i32) -> CreateTopic {
        CreateTopic {
            name: name.to_owned(),
            partitions,
            replication_factor: replicas,
            configs: Vec::new(),
            topic_id: TopicId::new(u128::from(self.draw())),
            seed: self.draw(),
            validate_only: false,
        }
    }

    /// A topic whose partitions' replicas are on these brokers.
    pub(super) fn create_on(&mut self, name: &str, partitions: &[&[i32]]) {
        let replicas = partitions[0].len() as i32;
        self.create(name, partitions.len() as i32, replicas);
        for (partition, brokers) in (0..).zip(partitions) {
            self.move_to(name, partition, brokers).expect("moved");
            self.finish_moves();
        }
    }

    pub(super) fn move_to(&mut self, name: &str, partition: i32, brokers: &[i32]) -> Result<MetadataReply, Error> {
        let command = MovePartition {
            topic: name.to_owned(),
            partition,
            brokers: brokers.iter().copied().map(BrokerId::new).collect(),
            seed: self.draw(),
            validate_only: false,
        };
        self.run(MetadataCommand::MovePartition(command))
    }

    pub(super) fn topic(&self, name: &str) -> Arc<Topic> {
        Arc::clone(self.table.topic_named(name).expect("it exists"))
    }

    /// The leaders of all partitions that are being changed bring it to its end.
    pub(super) fn finish_moves(&mut self) {
        let changing: Vec<_> = self.table.changing().map(|(tp, entry)| (tp, entry.clone())).collect();
        for (tp, entry) in changing {
            let wanted: Vec<ReplicaId> = entry.replicas().iter().map(|place| place.replica).collect();
            let removed = entry.leaving().iter().map(|place| place.replica).collect();
            for (may_remove, removed) in [(true, Vec::new()), (false, removed)] {
                let progress = MoveProgress { tp, may_remove, removed, wanted: wanted.clone(), seed: self.draw() };
                self.run(MetadataCommand::MoveProgress(progress)).expect("taken in");
            }
        }
    }

    /// A broker says that its replica leads.
    pub(super) fn lead(&mut self, tp: TopicPartition, broker: i32, epoch: i32) {
        let broker = BrokerId::new(broker);
        let entry = self.table.partition(tp).expect("there");
        let replica = entry.places().find(|place| place.broker == broker).expect("it has one").replica;
        let leaders = vec![Leadership { tp, replica, epoch: LeaderEpoch::new(epoch) }];
        self.run(MetadataCommand::LeadersChanged { broker, leaders }).expect("taken in");
    }
}
