//! Generates the gRPC types from `proto/` with `protox`, so that no `protoc` is needed.

use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let public = [
        "flowstone/v1/error.proto",
        "flowstone/v1/log.proto",
        "flowstone/v1/admin.proto",
        "flowstone/v1/coordinator.proto",
        "flowstone/v1/groups.proto",
        "flowstone/v1/transactions.proto",
    ];
    let internal = [
        "flowstone/internal/v1/metadata.proto",
        "flowstone/internal/v1/producers.proto",
        "flowstone/internal/v1/groups.proto",
        "flowstone/internal/v1/transactions.proto",
    ];
    let peer = ["flowstone/peer/v1/peer.proto"];
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let descriptors = protox::compile(public, ["proto"])?;
    // Server reflection tells of the public services alone.
    std::fs::write(out.join("flowstone.v1.bin"), descriptors.encode_to_vec())?;
    // Payloads stay reference-counted from socket to disk and back.
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    tonic_prost_build::configure().bytes(".").compile_fds(protox::compile(internal, ["proto"])?)?;
    tonic_prost_build::configure()
        .bytes(".")
        .extern_path(".flowstone.v1", "crate::pb")
        .compile_fds(protox::compile(peer, ["proto"])?)?;
    Ok(())
}
