//! Virtual addresses: what DNS answers for names of the clusterset, and what capture recognizes.
//!
//! A service has one number in its cluster; its IPv4 and its IPv6 address are the number added to the base of a range,
//! so that one small table serves both families. An endpoint of a headless service has a number of its own. The
//! addresses mean something on this cluster's machines only and never leave one: a sidecar turns them into names.
//!
//! [`allocation`] hands numbers out, [`mesh`] is what sidecars know of them; [`ports`] are numbers of another kind.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Serializes as what `Display` writes, and reads by `FromStr`.
macro_rules! as_text {
    ($($name:ident)*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

pub mod allocation;
pub mod mesh;
pub mod ports;

/// Numbers that any range can hold.
const COUNT_MAX: u32 = 1 << 20;

/// An IPv4 range inside 240.0.0.0/4, written `240.1.0.0/16`.
///
/// That block is reserved (RFC 1112 section 4): no network routes it and no cloud or cluster hands it out, so a virtual
/// address collides with nothing, and a packet that escapes capture arrives nowhere. Other blocks are refused: a sidecar
/// that has not been told the ranges yet has to know which addresses could be virtual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Range {
    base: u32,
    length: u8,
}

/// An IPv6 range of unique local addresses (RFC 4193), written `fd74:6f6d:626f::/112`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Range {
    base: u128,
    length: u8,
}

/// Why a range was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} can't hold virtual addresses: {rule}")]
pub struct InvalidRange {
    value: String,
    rule: &'static str,
}

fn invalid(value: &str, rule: &'static str) -> InvalidRange {
    InvalidRange { value: value.chars().take(80).collect(), rule }
}

impl Ipv4Range {
    const BLOCK: u32 = 0xf000_0000;

    pub fn network(self) -> Ipv4Addr {
        self.base.into()
    }

    fn contains(self, address: Ipv4Addr) -> bool {
        (u32::from(address) ^ self.base) >> (32 - self.length) == 0
    }
}

impl Ipv6Range {
    pub fn network(self) -> Ipv6Addr {
        self.base.into()
    }

    fn contains(self, address: Ipv6Addr) -> bool {
        (u128::from(address) ^ self.base) >> (128 - self.length) == 0
    }
}

impl FromStr for Ipv4Range {
    type Err = InvalidRange;

    fn from_str(text: &str) -> Result<Self, InvalidRange> {
        let rule = "write a part of 240.0.0.0/4 with a length of 8 to 28, like 240.1.0.0/16";
        let (network, length) = text.split_once('/').ok_or_else(|| invalid(text, rule))?;
        let base = network.parse::<Ipv4Addr>().map(u32::from).map_err(|_| invalid(text, rule))?;
        let length =
            length.parse().ok().filter(|length| (8..=28).contains(length)).ok_or_else(|| invalid(text, rule))?;
        if base & Self::BLOCK != Self::BLOCK {
            return Err(invalid(text, rule));
        }
        if base << length != 0 {
            return Err(invalid(text, "bits are set behind the length; write the first address of the range"));
        }
        // 255.0.0.0/8 holds the broadcast address, which is no host's.
        if base >> 24 == 0xff {
            return Err(invalid(text, "255.0.0.0/8 holds the broadcast address"));
        }
        Ok(Self { base, length })
    }
}

impl FromStr for Ipv6Range {
    type Err = InvalidRange;

    fn from_str(text: &str) -> Result<Self, InvalidRange> {
        let rule = "write a part of fc00::/7 with a length of 8 to 124, like fd74:6f6d:626f::/112";
        let (network, length) = text.split_once('/').ok_or_else(|| invalid(text, rule))?;
        let base = network.parse::<Ipv6Addr>().map(u128::from).map_err(|_| invalid(text, rule))?;
        let length =
            length.parse().ok().filter(|length| (8..=124).contains(length)).ok_or_else(|| invalid(text, rule))?;
        if base >> 121 != 0xfc >> 1 {
            return Err(invalid(text, rule));
        }
        if base << length != 0 {
            return Err(invalid(text, "bits are set behind the length; write the first address of the range"));
        }
        Ok(Self { base, length })
    }
}

impl fmt::Display for Ipv4Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.length)
    }
}

impl fmt::Display for Ipv6Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.length)
    }
}

as_text!(Ipv4Range Ipv6Range);

/// What a service, or an endpoint of a headless one, is numbered with. Never zero: the first address of a range names
/// the range itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Number(pub u32);

/// The two addresses of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtualAddress {
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
}

/// Where a cluster's virtual addresses lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ranges {
    pub ipv4: Ipv4Range,
    pub ipv6: Ipv6Range,
}

impl Default for Ranges {
    fn default() -> Self {
        Self {
            ipv4: Ipv4Range { base: 0xf001_0000, length: 16 },
            // "tombo" in ASCII behind the prefix of locally assigned addresses; random digits would gain nothing where
            // no two sites ever see each other's.
            ipv6: Ipv6Range { base: 0xfd74_6f6d_626f << 80, length: 112 },
        }
    }
}

impl Ranges {
    /// Numbers that both ranges have room for, zero included.
    pub fn count(&self) -> u32 {
        let room = |bits: u8| if bits >= 20 { COUNT_MAX } else { 1 << bits };
        room(32 - self.ipv4.length).min(room(128 - self.ipv6.length))
    }

    /// `None` when the number lies outside.
    pub fn address(&self, number: Number) -> Option<VirtualAddress> {
        let inside = number.0 != 0 && number.0 < self.count();
        inside.then(|| VirtualAddress {
            ipv4: (self.ipv4.base + number.0).into(),
            ipv6: (self.ipv6.base + u128::from(number.0)).into(),
        })
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        match address.to_canonical() {
            IpAddr::V4(address) => self.ipv4.contains(address),
            IpAddr::V6(address) => self.ipv6.contains(address),
        }
    }

    /// The number of an address; `None` outside the ranges, and for those of their addresses that have none.
    pub fn number(&self, address: IpAddr) -> Option<Number> {
        if !self.contains(address) {
            return None;
        }
        let number = match address.to_canonical() {
            IpAddr::V4(address) => u32::from(address) - self.ipv4.base,
            IpAddr::V6(address) => u32::try_from(u128::from(address) - self.ipv6.base).ok()?,
        };
        (number != 0 && number < self.count()).then_some(Number(number))
    }
}

/// Whether an address lies where a range may lie at all.
pub fn could_be_virtual(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => u32::from(address) & Ipv4Range::BLOCK == Ipv4Range::BLOCK && !address.is_broadcast(),
        IpAddr::V6(address) => address.is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_others_refused() {
        for (text, valid) in [
            ("240.1.0.0/16", true),
            ("254.0.0.0/8", true),
            ("240.1.0.0/28", true),
            ("240.1.0.0/29", false),
            ("240.1.0.1/16", false),
            ("255.0.0.0/8", false),
            ("10.0.0.0/16", false),
            ("240.1.0.0", false),
            ("240.1.0.0/x", false),
            ("240.0.0.0/4", false),
        ] {
            assert_eq!(text.parse::<Ipv4Range>().is_ok_and(|range| range.to_string() == text), valid, "{text}");
        }
        for (text, valid) in [
            ("fd74:6f6d:626f::/112", true),
            ("fd00::/8", true),
            ("fd00::1/112", false),
            ("2001:db8::/112", false),
            ("fd00::/125", false),
            ("fd00::", false),
        ] {
            assert_eq!(text.parse::<Ipv6Range>().is_ok_and(|range| range.to_string() == text), valid, "{text}");
        }
        assert_eq!(Ranges::default().ipv4.to_string(), "240.1.0.0/16");
        assert_eq!(Ranges::default().ipv6.to_string(), "fd74:6f6d:626f::/112");
    }

    #[test]
    fn numbers_and_addresses_lead_to_each_other() {
        let ranges = Ranges::default();
        assert_eq!(ranges.count(), 65_536);
        let address = ranges.address(Number(258)).unwrap();
        assert_eq!(
            (address.ipv4.to_string(), address.ipv6.to_string()),
            ("240.1.1.2".into(), "fd74:6f6d:626f::102".into())
        );
        for ip in [IpAddr::from(address.ipv4), address.ipv6.into(), address.ipv4.to_ipv6_mapped().into()] {
            assert_eq!(ranges.number(ip), Some(Number(258)), "{ip}");
        }
        for none in ["240.1.0.0", "240.2.0.1", "10.0.0.1", "fd74:6f6d:626f::", "fd74:6f6d:626f::1:1", "::1"] {
            assert_eq!(ranges.number(none.parse().unwrap()), None, "{none}");
        }
        assert_eq!(ranges.address(Number(0)), None);
        assert_eq!(ranges.address(Number(65_536)), None);
        let narrow = Ranges { ipv6: "fd00::/120".parse().unwrap(), ..ranges };
        assert_eq!((narrow.count(), narrow.address(Number(256))), (256, None));
        let wide = Ranges { ipv4: "240.0.0.0/8".parse().unwrap(), ipv6: "fd00::/8".parse().unwrap() };
        assert_eq!(wide.count(), COUNT_MAX);
    }
}
