//! Compiles the two protocols between Terraform and its plugins, as far as this provider speaks them.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/tfplugin6.proto", "proto/controller.proto"], ["proto"])?;
    tonic_prost_build::configure().build_transport(false).build_client(false).compile_fds(descriptors)?;
    Ok(())
}
