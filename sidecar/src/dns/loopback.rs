//! Names of the clusterset answered with addresses of loopback that this sidecar listens at. So applications that know of
//! nothing are captured where nobody may write rules of a packet filter: they only have to ask this DNS server.
//!
//! Each virtual address has one of 127.240.0.0/12, and is listened for at the ports of its service from the first question about
//! it on. What listens stays for as long as the process does, as addresses that somebody remembers do.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tombolo_core::addresses::mesh::MeshAddresses;
use tombolo_core::addresses::{Ranges, VirtualAddress};
use tombolo_core::dns::{Known, Place, Places, ServiceRecords};
use tombolo_core::id::ServiceName;
use tombolo_dns::Zone;
use tombolo_runtime::metrics::Metrics;

use super::zone::MeshZone;
use crate::capture;
use crate::capture::loops::Loops;
use crate::capture::observe::Meters;
use crate::capture::outbound::CapturedOutbound;
use crate::outbound::Outbound;

/// The first address of 127.240.0.0/12, which has room for every number that a virtual address can have.
const BASE: u32 = 0x7ff0_0000;
/// Sockets that listen. Names beyond them are not answered.
const LISTENERS_MAX: usize = 2_048;
/// How long a connection waits until it is known whose address it went to.
const ADDRESSES_WAIT: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LoopbackConfig {
    /// Ports that the applications beside this sidecar listen at, at whatever address: here they are left to them.
    pub except_ports: BTreeSet<u16>,
}

/// The zone, with its addresses moved to loopback.
pub struct Loopback {
    zone: Arc<MeshZone>,
    addresses: watch::Receiver<MeshAddresses>,
    captured: Arc<CapturedOutbound>,
    except: BTreeSet<u16>,
    listening: Mutex<BTreeSet<SocketAddr>>,
}

impl Loopback {
    pub fn new(
        config: &LoopbackConfig,
        zone: Arc<MeshZone>,
        addresses: watch::Receiver<MeshAddresses>,
        outbound: &Arc<Outbound>,
        metrics: &Metrics,
    ) -> Self {
        let (loops, meters) = (Loops::default(), Meters::new(metrics));
        let captured = CapturedOutbound::new(outbound.clone(), addresses.clone(), ADDRESSES_WAIT, loops, &meters);
        let except = config.except_ports.clone();
        Self { zone, addresses, captured, except, listening: Mutex::default() }
    }

    /// The same records at addresses that are listened at. Places where nothing could be are left out; `None` when none is left.
    fn listened(&self, service: &ServiceName, records: ServiceRecords) -> Option<ServiceRecords> {
        let ranges = self.addresses.borrow().ranges()?;
        let ports = self.zone.tcp_ports(service);
        let moved = |address: VirtualAddress| self.listen(service, address, ranges, &ports);
        let places = match records.places {
            Places::Whole(Place { ipv4: Some(ipv4), ipv6: Some(ipv6) }) => {
                Places::Whole(moved(VirtualAddress { ipv4, ipv6 })?.into())
            }
            // No virtual address has one family only.
            Places::Whole(_) => return None,
            Places::Endpoints(endpoints) if endpoints.is_empty() => Places::Endpoints(endpoints),
            Places::Endpoints(mut endpoints) => {
                endpoints.retain_mut(|endpoint| match moved(endpoint.address) {
                    Some(address) => {
                        endpoint.address = address;
                        true
                    }
                    None => false,
                });
                (!endpoints.is_empty()).then_some(Places::Endpoints(endpoints))?
            }
        };
        Some(ServiceRecords { places, ports: records.ports })
    }

    /// Listens for one virtual address, unless that is done; yields where.
    fn listen(
        &self,
        service: &ServiceName,
        address: VirtualAddress,
        ranges: Ranges,
        ports: &BTreeSet<u16>,
    ) -> Option<VirtualAddress> {
        let here = loopback_of(address, ranges)?;
        let mut listening = self.listening();
        let mut any = false;
        for port in ports {
            let (at, origin) = (SocketAddr::from((here, *port)), SocketAddr::from((address.ipv4, *port)));
            any |= listening.contains(&at)
                || match self.open(at, origin, listening.len()) {
                    Ok(()) => listening.insert(at),
                    Err(error) => {
                        tracing::warn!(%service, %at, %error, "a port of a service can't be listened at, so its name leads nowhere");
                        false
                    }
                };
        }
        any.then(|| VirtualAddress { ipv4: here, ipv6: here.to_ipv6_mapped() })
    }

    fn open(&self, at: SocketAddr, origin: SocketAddr, open: usize) -> io::Result<()> {
        if self.except.contains(&at.port()) {
            return Err(io::Error::other("dns.loopback.exceptPorts leaves this port to the application"));
        }
        if open >= LISTENERS_MAX {
            return Err(io::Error::other(format!("{LISTENERS_MAX} sockets listen already")));
        }
        let listener = capture::listen(at.ip(), at.port())?;
        tokio::spawn(capture::run(self.captured.clone(), listener, capture::Origin::Fixed(origin)));
        Ok(())
    }

    /// How many sockets listen.
    pub fn sockets(&self) -> usize {
        self.listening().len()
    }

    fn listening(&self) -> MutexGuard<'_, BTreeSet<SocketAddr>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn loopback_of(address: VirtualAddress, ranges: Ranges) -> Option<Ipv4Addr> {
    ranges.number(address.ipv4.into()).map(|number| Ipv4Addr::from(BASE + number.0))
}

impl Zone for Loopback {
    fn look_up<'a>(&'a self, service: &'a ServiceName) -> BoxFuture<'a, Known> {
        Box::pin(async move {
            match self.zone.look_up(service).await {
                Known::Records(records) => self.listened(service, records).map_or(Known::CutOff, Known::Records),
                // Which ports it has only the federation tells.
                Known::Address(_) => Known::CutOff,
                known @ (Known::Absent | Known::CutOff) => known,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tombolo_core::addresses::Number;

    #[test]
    fn every_virtual_address_has_one_of_loopback() {
        let ranges = Ranges::default();
        for (number, want) in [(1, "127.240.0.1"), (300, "127.240.1.44"), (65_535, "127.240.255.255")] {
            let address = ranges.address(Number(number)).unwrap();
            assert_eq!(loopback_of(address, ranges), Some(want.parse().unwrap()));
        }
        let foreign = VirtualAddress { ipv4: Ipv4Addr::LOCALHOST, ipv6: std::net::Ipv6Addr::LOCALHOST };
        assert_eq!(loopback_of(foreign, ranges), None);
    }
}
