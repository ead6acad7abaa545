//! Compiles the protobuf contracts with a compiler written in Rust, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let names = [
        "catalog",
        "discovery",
        "gateway_watch",
        "identity",
        "opaque",
        "operator",
        "peer",
        "peering",
        "replica",
        "tunnel",
    ];
    let files: Vec<String> = names.iter().map(|name| format!("proto/tombolo/{name}.proto")).collect();
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().build_transport(false).compile_fds(descriptors)?;
    Ok(())
}
