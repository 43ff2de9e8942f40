//! Generates the gRPC types from `proto/` with `protox`, so that no `protoc` is needed.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["flowstone/v1/error.proto", "flowstone/v1/log.proto", "flowstone/v1/admin.proto"];
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    // Payloads stay reference-counted from socket to disk and back.
    tonic_prost_build::configure()
        .bytes(".")
        .file_descriptor_set_path(PathBuf::from(std::env::var("OUT_DIR")?).join("flowstone.v1.bin"))
        .compile_fds(descriptors)?;
    Ok(())
}
