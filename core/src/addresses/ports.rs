//! Listener ports of gateways: workloads without a sidecar reach a port of a service there.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Number;
use crate::catalog::ServiceView;
use crate::id::ServiceName;
use crate::model::{ServiceKind, Transport};

/// Ports of one range.
const COUNT_MAX: u16 = 10_000;
const PORT_MIN: u16 = 1_024;

/// TCP ports from one to another, both included, written `20000-20999`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// A text that is no range of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write the first and the last port, like 20000-20999: at least {PORT_MIN}, and at most {COUNT_MAX} of them")]
pub struct InvalidPortRange;

impl PortRange {
    /// Numbers that the range has room for, zero included.
    pub fn count(self) -> u32 {
        u32::from(self.last - self.first) + 2
    }

    /// `None` when the number lies outside.
    pub fn port(self, number: Number) -> Option<u16> {
        let offset = u16::try_from(number.0.checked_sub(1)?).ok()?;
        self.first.checked_add(offset).filter(|port| *port <= self.last)
    }
}

impl FromStr for PortRange {
    type Err = InvalidPortRange;

    fn from_str(text: &str) -> Result<Self, InvalidPortRange> {
        let (first, last) = text.split_once('-').ok_or(InvalidPortRange)?;
        let port = |text: &str| text.trim().parse::<u16>().map_err(|_| InvalidPortRange);
        let (first, last) = (port(first)?, port(last)?);
        let fits = first >= PORT_MIN && first <= last && last - first < COUNT_MAX;
        if fits { Ok(Self { first, last }) } else { Err(InvalidPortRange) }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// A port of a service that has a listener. Written `namespace/name:port`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortOwner {
    pub service: ServiceName,
    pub port: u16,
}

impl fmt::Display for PortOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)
    }
}

/// A text that names no port of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write namespace/name:port")]
pub struct InvalidPortOwner;

impl FromStr for PortOwner {
    type Err = InvalidPortOwner;

    fn from_str(text: &str) -> Result<Self, InvalidPortOwner> {
        let (service, port) = text.rsplit_once(':').ok_or(InvalidPortOwner)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or(InvalidPortOwner)?;
        Ok(Self { service: service.parse().map_err(|_| InvalidPortOwner)?, port })
    }
}

as_text!(PortRange PortOwner);

/// What of a service has a listener: each TCP port that some cluster allows workloads without a sidecar to call. Endpoints of
/// a headless service can't be told apart behind one.
pub fn port_owners(view: &ServiceView) -> impl Iterator<Item = PortOwner> {
    let allowing = view.shares.iter().filter(|share| share.export.unmeshed);
    let allowing = allowing.filter(|share| share.export.kind == ServiceKind::ClusterSetIp);
    let ports = allowing.flat_map(|share| &share.export.ports);
    let tcp = ports.filter(|port| port.transport == Transport::Tcp);
    tcp.map(|port| PortOwner { service: view.service.clone(), port: port.port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_others_refused() {
        for (text, valid) in [
            ("20000-20999", true),
            ("20000-20000", true),
            ("1024-11023", true),
            ("1024-11024", false),
            ("1023-1024", false),
            ("20001-20000", false),
            ("20000", false),
            ("20000-70000", false),
            ("", false),
        ] {
            assert_eq!(text.parse::<PortRange>().is_ok_and(|range| range.to_string() == text), valid, "{text}");
        }
    }

    #[test]
    fn numbers_are_ports_of_the_range() {
        let range: PortRange = "20000-20002".parse().unwrap();
        assert_eq!(range.count(), 4);
        let ports: Vec<_> = (0..5).map(|number| range.port(Number(number))).collect();
        assert_eq!(ports, [None, Some(20_000), Some(20_001), Some(20_002), None]);
    }

    #[test]
    fn owners_are_read_back() {
        let text = "shop/web:80";
        assert_eq!(text.parse::<PortOwner>().unwrap().to_string(), text);
        for text in ["", "shop/web", "shop/web:0", "shop/web:x", "web:80"] {
            assert!(text.parse::<PortOwner>().is_err(), "{text}");
        }
    }
}
