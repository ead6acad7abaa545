//! Links that behave badly, and clusters that fail: what the tests and benches of failover are built on.
//!
//! Everything here needs root, `ip` and `/dev/net/tun`, and stays within network namespaces that it makes
//! itself.

pub mod chaos;
pub mod wan;

use std::fs::File;

use tombolo_testbed::Namespace;

/// What this machine lacks, for a test to name when it is skipped.
pub fn lacks() -> Option<String> {
    if let Err(error) = Namespace::new() {
        return Some(format!("network namespaces: {error:#}"));
    }
    let device = File::options().read(true).write(true).open("/dev/net/tun");
    device.err().map(|error| format!("/dev/net/tun: {error}"))
}
