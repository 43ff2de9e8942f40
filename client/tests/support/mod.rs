//! What the tests of this folder share: a broker of their own making that fails on command, and a proxy that cuts
//! connections.

// Each test program uses a part of it.
#![allow(dead_code, unreachable_pub)]

pub mod fake_broker;
pub mod fake_cluster;
pub mod proxy;

use std::time::Duration;

/// Fails a test that hangs, rather than the whole run.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(60), future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing for a minute"),
    }
}

/// Waits for a condition, however long the machine takes.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    within(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}
