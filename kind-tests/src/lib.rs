//! Links that behave badly, clusters that fail, and the load that meets them: what the tests and benches of failover
//! are built on.
//!
//! [`wan`] and [`chaos`] need root, `ip` and `/dev/net/tun`, and stay within network namespaces that they make
//! themselves. [`client`] and [`open_loop`] need nothing.

pub mod chaos;
pub mod client;
pub mod open_loop;
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
