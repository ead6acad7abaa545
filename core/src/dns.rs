//! What names under `clusterset.local` mean and what is answered for them: the DNS specification of the Multi-Cluster
//! Services API, version 1.0.0.
//!
//! A name is read once ([`Subject::read`]), what is known of its service is looked up by the caller, and [`answer`]
//! decides. A name that can't be judged, since its service can't be asked for now, is never denied.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::addresses::VirtualAddress;
use crate::id::{ClusterId, EndpointId, Namespace, ServiceName, is_label};
use crate::model::{ClusterShare, Endpoint, Freshness, ServiceKind, Transport};

/// The zone that is answered here, all of it.
pub const ZONE: &str = "clusterset.local";
/// The specification that the answers follow, told by the TXT record of `dns-version.clusterset.local`.
pub const VERSION: &str = "1.0.0";
/// How long answers may be kept, denials included: endpoints of headless services come and go.
pub const TTL_S: u32 = 5;
/// Endpoints in one answer; those of larger services take turns.
pub const ENDPOINTS_MAX: usize = 1000;

/// What a name under [`ZONE`] is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    Apex,
    /// `dns-version.clusterset.local`.
    Version,
    /// It has no records itself, but names lie below it: `svc.clusterset.local`, or a namespace.
    Above,
    /// `<service>.<namespace>.svc.clusterset.local`.
    Service(ServiceName),
    /// `<cluster>.<service>...`, which has no records whatever lies below it.
    Cluster {
        cluster: ClusterId,
        service: ServiceName,
    },
    /// `<hostname>.<cluster>.<service>...`: endpoints of a headless service.
    Endpoint {
        hostname: String,
        cluster: ClusterId,
        service: ServiceName,
    },
    /// `_<protocol>.<service>...`.
    Protocol {
        transport: Transport,
        service: ServiceName,
    },
    /// `_<port>._<protocol>.<service>...`.
    Port {
        port: String,
        transport: Transport,
        service: ServiceName,
    },
    /// No name of this form ever exists.
    Nothing,
}

impl Subject {
    /// Reads the labels of a name, the leftmost first. `None` when it lies in another zone.
    pub fn read<'a>(labels: impl DoubleEndedIterator<Item = &'a [u8]>) -> Option<Self> {
        let mut labels = labels.rev();
        for part in ZONE.rsplit('.') {
            if !labels.next()?.eq_ignore_ascii_case(part.as_bytes()) {
                return None;
            }
        }
        // No name that exists has more than six labels left; one more tells those that are longer.
        let lower = |label: &[u8]| String::from_utf8(label.to_ascii_lowercase()).unwrap_or_default();
        let rest: Vec<String> = labels.take(7).map(lower).collect();
        let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
        Some(Self::below(&rest))
    }

    /// The labels in front of the zone, the rightmost first.
    fn below(labels: &[&str]) -> Self {
        match labels {
            [] => Subject::Apex,
            ["dns-version"] => Subject::Version,
            ["svc"] => Subject::Above,
            ["svc", namespace] if namespace.parse::<Namespace>().is_ok() => Subject::Above,
            ["svc", namespace, name, rest @ ..] => {
                let service = namespace.parse().and_then(|namespace| ServiceName::new(namespace, name));
                service.map_or(Subject::Nothing, |service| Self::of_service(service, rest))
            }
            _ => Subject::Nothing,
        }
    }

    fn of_service(service: ServiceName, rest: &[&str]) -> Self {
        let transport = |label: &str| match label {
            "_tcp" => Some(Transport::Tcp),
            "_udp" => Some(Transport::Udp),
            "_sctp" => Some(Transport::Sctp),
            _ => None,
        };
        match rest {
            [] => Subject::Service(service),
            [label] => match (transport(label), label.parse()) {
                (Some(transport), _) => Subject::Protocol { transport, service },
                (None, Ok(cluster)) => Subject::Cluster { cluster, service },
                (None, Err(_)) => Subject::Nothing,
            },
            [label, first] => match (transport(label), first.strip_prefix('_'), label.parse()) {
                (Some(transport), Some(port), _) => Subject::Port { port: port.into(), transport, service },
                (None, None, Ok(cluster)) if is_label(first, 63) => {
                    Subject::Endpoint { hostname: (*first).to_owned(), cluster, service }
                }
                _ => Subject::Nothing,
            },
            _ => Subject::Nothing,
        }
    }

    /// The service that has to be looked up to answer.
    pub fn service(&self) -> Option<&ServiceName> {
        match self {
            Subject::Apex | Subject::Version | Subject::Above | Subject::Nothing => None,
            Subject::Service(service)
            | Subject::Cluster { service, .. }
            | Subject::Endpoint { service, .. }
            | Subject::Protocol { service, .. }
            | Subject::Port { service, .. } => Some(service),
        }
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordType {
    A,
    Aaaa,
    Srv,
    Txt,
    Soa,
    Any,
    /// A type of which this zone has no records.
    Other,
}

impl RecordType {
    fn wants(self, other: RecordType) -> bool {
        self == other || self == RecordType::Any
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Srv { port: u16, target: String },
    Txt(String),
    Soa,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// `None`: the name that was asked for, as it was spelled.
    pub owner: Option<String>,
    pub data: Data,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Records {
        answers: Vec<Record>,
        additional: Vec<Record>,
    },
    /// The name exists, but has no records of this type.
    NoData,
    NxDomain,
    /// What is known does not suffice to say.
    ServFail,
}

/// What is known of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// There is none of that name.
    Absent,
    /// Nobody can be asked now, and nothing is remembered.
    CutOff,
    /// Its address and no more.
    Address(VirtualAddress),
    Records(ServiceRecords),
}

/// What DNS tells of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRecords {
    pub places: Places,
    /// By name; a port without one has no SRV record.
    pub ports: BTreeMap<(String, Transport), u16>,
}

/// One place, by an address of one family or of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
}

impl From<VirtualAddress> for Place {
    fn from(address: VirtualAddress) -> Self {
        Self { ipv4: Some(address.ipv4), ipv6: Some(address.ipv6) }
    }
}

/// The first address of each family.
impl FromIterator<IpAddr> for Place {
    fn from_iter<T: IntoIterator<Item = IpAddr>>(addresses: T) -> Self {
        let mut place = Self::default();
        for address in addresses {
            match address {
                IpAddr::V4(address) => _ = place.ipv4.get_or_insert(address),
                IpAddr::V6(address) => _ = place.ipv6.get_or_insert(address),
            }
        }
        place
    }
}

/// Where a service is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Places {
    /// At one place for all of it (`ClusterSetIP`).
    Whole(Place),
    /// Headless: each ready endpoint at its own.
    Endpoints(Vec<EndpointPlace>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPlace {
    pub hostname: String,
    pub cluster: ClusterId,
    pub address: VirtualAddress,
}

impl ServiceRecords {
    /// `whole` is the address of the service, which a headless one lacks. `None` while a service has no address yet.
    pub fn of<'a>(
        shares: impl Iterator<Item = &'a ClusterShare> + Clone,
        whole: Option<Place>,
        endpoint: impl Fn(&ClusterId, &EndpointId) -> Option<VirtualAddress>,
    ) -> Option<Self> {
        let mut ports = BTreeMap::new();
        for port in shares.clone().flat_map(|share| &share.export.ports).filter(|port| !port.name.is_empty()) {
            ports.entry((port.name.to_ascii_lowercase(), port.transport)).or_insert(port.port);
        }
        if let Some(whole) = whole {
            return Some(Self { places: Places::Whole(whole), ports });
        }
        if shares.clone().any(|share| share.export.kind != ServiceKind::Headless) {
            return None;
        }
        let used = shares.filter(|share| share.freshness != Freshness::Draining);
        let places = used.flat_map(|share| {
            let ready = share.export.endpoints.values().filter(|endpoint| endpoint.ready);
            ready.map(move |ready| (&share.cluster, ready))
        });
        let places = places.filter_map(|(cluster, ready)| {
            let address = endpoint(cluster, &ready.id)?;
            Some(EndpointPlace { hostname: hostname(ready), cluster: cluster.clone(), address })
        });
        Some(Self { places: Places::Endpoints(places.collect()), ports })
    }
}

/// The specification wants a unique name for an endpoint that has none: its id.
fn hostname(endpoint: &Endpoint) -> String {
    let given = endpoint.hostname.as_ref().filter(|name| is_label(name, 63));
    given.cloned().unwrap_or_else(|| endpoint.id.to_string())
}

/// What to answer for a name in [`ZONE`]. `known` is about [`Subject::service`] and not looked at where there is none.
/// `turn` grows with each question, so that every endpoint comes first in turn.
pub fn answer(subject: &Subject, wanted: RecordType, known: &Known, turn: usize) -> Answer {
    let records = match (subject, known) {
        (Subject::Apex, _) => return own(wanted, RecordType::Soa, Data::Soa),
        (Subject::Version, _) => return own(wanted, RecordType::Txt, Data::Txt(VERSION.into())),
        (Subject::Above, _) => return Answer::NoData,
        (Subject::Nothing, _) | (_, Known::Absent) => return Answer::NxDomain,
        (_, Known::CutOff) => return Answer::ServFail,
        (Subject::Service(_), Known::Address(address)) => return only_addresses(&[(*address).into()], wanted),
        // Only headless services have names of clusters and endpoints.
        (Subject::Cluster { .. } | Subject::Endpoint { .. }, Known::Address(_)) => return Answer::NxDomain,
        (Subject::Protocol { .. } | Subject::Port { .. }, Known::Address(_)) => return Answer::ServFail,
        (_, Known::Records(records)) => records,
    };
    let endpoints = match &records.places {
        Places::Whole(_) => &[][..],
        Places::Endpoints(endpoints) => endpoints,
    };
    match subject {
        Subject::Apex | Subject::Version | Subject::Above | Subject::Nothing => Answer::NxDomain,
        Subject::Service(_) => match &records.places {
            Places::Whole(place) => only_addresses(&[*place], wanted),
            Places::Endpoints(_) => {
                let addresses: Vec<Place> = in_turn(endpoints, turn).map(|endpoint| endpoint.address.into()).collect();
                only_addresses(&addresses, wanted)
            }
        },
        // Whoever is told that a name does not exist may conclude that none below it does (RFC 8020).
        Subject::Cluster { cluster, .. } => exists(endpoints.iter().any(|endpoint| endpoint.cluster == *cluster)),
        Subject::Endpoint { hostname, cluster, .. } => {
            let of = endpoints.iter().filter(|endpoint| endpoint.cluster == *cluster && endpoint.hostname == *hostname);
            let addresses: Vec<Place> = of.map(|endpoint| endpoint.address.into()).take(ENDPOINTS_MAX).collect();
            if addresses.is_empty() { Answer::NxDomain } else { only_addresses(&addresses, wanted) }
        }
        Subject::Protocol { transport, .. } => exists(records.ports.keys().any(|(_, other)| other == transport)),
        Subject::Port { port, transport, service } => match records.ports.get(&(port.clone(), *transport)) {
            None => Answer::NxDomain,
            Some(_) if !wanted.wants(RecordType::Srv) => Answer::NoData,
            Some(number) => servers(service, *number, &records.places, turn),
        },
    }
}

/// A name of ours with one record.
fn own(wanted: RecordType, has: RecordType, data: Data) -> Answer {
    if !wanted.wants(has) {
        return Answer::NoData;
    }
    Answer::Records { answers: vec![Record { owner: None, data }], additional: Vec::new() }
}

fn exists(exists: bool) -> Answer {
    if exists { Answer::NoData } else { Answer::NxDomain }
}

fn in_turn(endpoints: &[EndpointPlace], turn: usize) -> impl Iterator<Item = &EndpointPlace> {
    let begin = turn.checked_rem(endpoints.len()).unwrap_or(0);
    endpoints[begin..].iter().chain(&endpoints[..begin]).take(ENDPOINTS_MAX)
}

fn of_type(places: &[Place], wanted: RecordType, owner: Option<&String>) -> Vec<Record> {
    let record = |data| Record { owner: owner.cloned(), data };
    let ipv4 = places.iter().filter(|_| wanted.wants(RecordType::A)).filter_map(|place| Some(Data::A(place.ipv4?)));
    let ipv6 =
        places.iter().filter(|_| wanted.wants(RecordType::Aaaa)).filter_map(|place| Some(Data::Aaaa(place.ipv6?)));
    ipv4.chain(ipv6).map(record).collect()
}

fn only_addresses(addresses: &[Place], wanted: RecordType) -> Answer {
    let answers = of_type(addresses, wanted, None);
    if answers.is_empty() { Answer::NoData } else { Answer::Records { answers, additional: Vec::new() } }
}

/// One record for a service with an address of its own; one for each endpoint of a headless one.
fn servers(service: &ServiceName, port: u16, places: &Places, turn: usize) -> Answer {
    let name = service.clusterset_name();
    let targets: Vec<(String, Place)> = match places {
        Places::Whole(address) => vec![(name, *address)],
        Places::Endpoints(endpoints) => in_turn(endpoints, turn)
            .map(|endpoint| (format!("{}.{}.{name}", endpoint.hostname, endpoint.cluster), endpoint.address.into()))
            .collect(),
    };
    if targets.is_empty() {
        return Answer::NoData;
    }
    let mut answers: Vec<Record> = Vec::with_capacity(targets.len());
    let mut additional = Vec::new();
    for (target, address) in targets {
        additional.extend(of_type(&[address], RecordType::Any, Some(&target)));
        let record = Record { owner: None, data: Data::Srv { port, target } };
        // Endpoints that share a host name share its record.
        if !answers.contains(&record) {
            answers.push(record);
        }
    }
    Answer::Records { answers, additional }
}

#[cfg(test)]
mod tests;
