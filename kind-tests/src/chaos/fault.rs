//! The faults, as data.

use crate::wan::Side;

/// One of the two clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Home {
    /// Where the caller is.
    East,
    West,
}

impl Home {
    pub fn name(self) -> &'static str {
        match self {
            Home::East => "east",
            Home::West => "west",
        }
    }
}

/// A process, by the name under which its cluster runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Victim {
    pub home: Home,
    pub process: &'static str,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// SIGKILL: the kernel tells whoever asks that nobody is there.
    Kill(&'static [Victim]),
    /// SIGSTOP: connections stand, and nobody answers.
    Stop(&'static [Victim]),
    /// Nothing that leaves this side arrives (A is east), and nobody is told.
    Cut(Side),
}

/// A fault that clients should not notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub name: &'static str,
    pub blow: Blow,
}

pub const APP: &str = "app";
/// The sidecar of the application.
pub const SERVER: &str = "web";
pub const GATEWAY: &str = "gw";
/// East's second gateway.
pub const GATEWAY_2: &str = "gw-2";
/// Stands for that of east's gateways which carries the caller's requests when the fault begins.
pub const CARRIER: &str = "carrying gateway";
pub const FEDERATION: &str = "federation";

const fn east(process: &'static str) -> Victim {
    Victim { home: Home::East, process }
}

const fn west(process: &'static str) -> Victim {
    Victim { home: Home::West, process }
}

const WHOLE_WEST: &[Victim] = &[west(GATEWAY), west(SERVER), west(APP), west(FEDERATION)];

pub const FAULTS: [Fault; 17] = [
    Fault { name: "local app killed", blow: Blow::Kill(&[east(APP)]) },
    Fault { name: "local app stopped", blow: Blow::Stop(&[east(APP)]) },
    Fault { name: "local sidecar killed", blow: Blow::Kill(&[east(SERVER)]) },
    Fault { name: "local sidecar stopped", blow: Blow::Stop(&[east(SERVER)]) },
    Fault { name: "local gateway killed", blow: Blow::Kill(&[east(CARRIER)]) },
    Fault { name: "local gateway stopped", blow: Blow::Stop(&[east(CARRIER)]) },
    Fault { name: "remote app killed", blow: Blow::Kill(&[west(APP)]) },
    Fault { name: "remote app stopped", blow: Blow::Stop(&[west(APP)]) },
    Fault { name: "remote sidecar killed", blow: Blow::Kill(&[west(SERVER)]) },
    Fault { name: "remote sidecar stopped", blow: Blow::Stop(&[west(SERVER)]) },
    Fault { name: "remote gateway killed", blow: Blow::Kill(&[west(GATEWAY)]) },
    Fault { name: "remote gateway stopped", blow: Blow::Stop(&[west(GATEWAY)]) },
    Fault { name: "link cut", blow: Blow::Cut(Side::Both) },
    Fault { name: "link cut outwards", blow: Blow::Cut(Side::A) },
    Fault { name: "link cut inwards", blow: Blow::Cut(Side::B) },
    Fault { name: "remote cluster killed", blow: Blow::Kill(WHOLE_WEST) },
    Fault { name: "remote cluster stopped", blow: Blow::Stop(WHOLE_WEST) },
];
