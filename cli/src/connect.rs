//! From `--server` and `--timeout` to a client.

use crate::args::Common;
use crate::failure::{Failure, Outcome};
use flowstone_client::Client;

/// Connects, within the timeout.
pub(crate) async fn connect(common: &Common) -> Outcome<Client> {
    let servers = common.servers()?.join(",");
    Client::builder(&*servers)
        .client_id("flowstone-cli")
        .connect_timeout(common.timeout)
        .request_timeout(common.timeout)
        .connect()
        .await
        .map_err(|error| {
            let unreachable = error.is_unreachable();
            let failure = Failure::from(error);
            if !unreachable {
                return failure;
            }
            failure.context(format_args!(
                "no broker answers at {servers} (`flowstone dev` starts one here, --server names another)"
            ))
        })
}
