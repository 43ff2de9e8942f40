//! Several fake brokers that share one log and one metadata, each behind a proxy of its own: it can be cut off, or go silent
//! with its connections open.

use super::fake_broker::{FakeBroker, Shared};
use super::proxy::Proxy;
use flowstone_client::{Client, Result};

pub struct FakeCluster {
    pub shared: Shared,
    /// By id, from 1 on.
    brokers: Vec<(FakeBroker, Proxy)>,
}

impl FakeCluster {
    /// As many brokers as racks are named; every topic has replicas on all, and is led by the first.
    pub async fn start(racks: &[&str], topics: &[(&str, usize)]) -> Self {
        let ids: Vec<i32> = (1..).take(racks.len()).collect();
        let shared = Shared::new(topics, &ids);
        let mut brokers = Vec::new();
        for (id, rack) in ids.iter().zip(racks) {
            let broker = FakeBroker::join(*id, rack, &shared).await;
            let proxy = Proxy::start(broker.address).await;
            brokers.push((broker.advertise(proxy.address), proxy));
        }
        Self { shared, brokers }
    }

    pub fn broker(&self, id: i32) -> &FakeBroker {
        &self.brokers[id as usize - 1].0
    }

    pub fn proxy(&self, id: i32) -> &Proxy {
        &self.brokers[id as usize - 1].1
    }

    /// `kill -9`: connections break, new ones are refused.
    pub fn kill(&self, id: i32) {
        self.proxy(id).go_dark();
    }

    /// A client that is told of one broker.
    pub async fn client(&self, bootstrap: i32) -> Client {
        self.try_client(bootstrap).await.unwrap()
    }

    pub async fn try_client(&self, bootstrap: i32) -> Result<Client> {
        Client::connect(self.proxy(bootstrap).address.to_string()).await
    }
}
