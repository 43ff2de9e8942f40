//! From `--server` and `--timeout` to a client.

use crate::args::Common;
use crate::failure::{Exit, Failure, Outcome, chain};
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
        .map_err(|error| {
            if !error.is_unreachable() {
                return Failure::from(error);
            }
            let told = chain(&error);
            let stop = if told.ends_with('?') { "" } else { ";" };
            let message = format!("{told}{stop} `flowstone dev` starts one here, --server names another");
            Failure::new(Exit::Unreachable, message)
        })
}
