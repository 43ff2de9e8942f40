//! From `--server` and `--timeout` to a client.

use crate::args::Common;
use crate::failure::{Failure, Outcome};
use flowstone_client::Client;

/// Connects, within the timeout.
pub(crate) async fn connect(common: &Common) -> Outcome<Client> {
    let servers = common.servers()?.join(",");
    Client::builder(servers)
        .client_id("flowstone-cli")
        .connect_timeout(common.timeout)
        .request_timeout(common.timeout)
        .connect()
        .await
        .map_err(Failure::from)
}
