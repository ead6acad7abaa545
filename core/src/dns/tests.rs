use std::collections::BTreeSet;

use jiff::Timestamp;
use proptest::prelude::*;

use super::*;
use crate::addresses::{Number, Ranges};
use crate::model::{AppProtocol, Export, Origin, ServicePort, SessionAffinity};

fn address(number: u32) -> VirtualAddress {
    Ranges::default().address(Number(number)).unwrap()
}

fn subject(name: &str) -> Option<Subject> {
    Subject::read(name.split('.').map(str::as_bytes))
}

fn port(name: &str, port: u16, transport: Transport) -> ServicePort {
    ServicePort { name: name.into(), port, transport, app: AppProtocol::Opaque }
}

/// Endpoints: id, host name, ready.
fn share(cluster: &str, kind: ServiceKind, endpoints: &[(&str, Option<&str>, bool)]) -> ClusterShare {
    let endpoint = |(id, hostname, ready): &(&str, Option<&str>, bool)| {
        let hostname = hostname.map(str::to_owned);
        let endpoint = Endpoint { id: id.parse().unwrap(), hostname, zone: None, weight: 1, ready: *ready };
        (endpoint.id.clone(), endpoint)
    };
    let ports = [
        port("http", 80, Transport::Tcp),
        port("dns", 53, Transport::Tcp),
        port("dns", 53, Transport::Udp),
        port("", 7, Transport::Tcp),
    ];
    ClusterShare {
        cluster: cluster.parse().unwrap(),
        origin: Origin::Remote,
        freshness: Freshness::Fresh,
        export: Export {
            service: "shop/web".parse().unwrap(),
            created: Timestamp::UNIX_EPOCH,
            kind,
            session_affinity: SessionAffinity::None,
            ports: ports.into(),
            server_ids: BTreeSet::new(),
            endpoints: endpoints.iter().map(endpoint).collect(),
            unmeshed: false,
            routes: Vec::new(),
        },
    }
}

fn records(shares: &[ClusterShare], whole: Option<VirtualAddress>) -> Option<ServiceRecords> {
    let of = |_: &ClusterId, endpoint: &EndpointId| endpoint.as_str().trim_start_matches('e').parse().ok().map(address);
    ServiceRecords::of(shares.iter(), whole.map(Into::into), of)
}

fn whole() -> Known {
    Known::Records(records(&[share("east", ServiceKind::ClusterSetIp, &[])], Some(address(1))).unwrap())
}

fn headless() -> Known {
    let shares = [
        share(
            "east",
            ServiceKind::Headless,
            &[("e2", Some("db-0"), true), ("e3", None, true), ("e4", Some("db-2"), false)],
        ),
        share("west", ServiceKind::Headless, &[("e5", Some("db-0"), true), ("e6", Some("not a label"), true)]),
        ClusterShare { freshness: Freshness::Draining, ..share("north", ServiceKind::Headless, &[("e7", None, true)]) },
    ];
    Known::Records(records(&shares, None).unwrap())
}

#[test]
fn a_service_may_have_an_address_of_one_family_only() {
    let place: Place = ["10.96.0.7", "10.96.0.8"].map(|address| address.parse().unwrap()).into_iter().collect();
    assert_eq!((place.ipv4, place.ipv6), (Some("10.96.0.7".parse().unwrap()), None));
    let shares = [share("east", ServiceKind::ClusterSetIp, &[])];
    let known = Known::Records(ServiceRecords::of(shares.iter(), Some(place), |_, _| None).unwrap());
    let subject = Subject::Service("shop/web".parse().unwrap());
    assert_eq!(answer(&subject, RecordType::Aaaa, &known, 0), Answer::NoData);
    assert!(
        matches!(answer(&subject, RecordType::A, &known, 0), Answer::Records { answers, .. } if answers.len() == 1)
    );
}

/// The answer in one line: records as `type:value`, those beside the answer in brackets.
fn told(name: &str, wanted: RecordType, known: &Known) -> String {
    let line = |record: &Record| {
        let owner = record.owner.as_ref().map(|owner| format!("{owner} ")).unwrap_or_default();
        match &record.data {
            Data::A(address) => format!("{owner}A:{address}"),
            Data::Aaaa(address) => format!("{owner}AAAA:{address}"),
            Data::Srv { port, target } => format!("{owner}SRV:{port}:{target}"),
            Data::Txt(text) => format!("{owner}TXT:{text}"),
            Data::Soa => format!("{owner}SOA"),
        }
    };
    let lines = |records: &[Record]| records.iter().map(line).collect::<Vec<_>>().join(" ");
    match answer(&subject(name).unwrap(), wanted, known, 0) {
        Answer::Records { answers, additional } if additional.is_empty() => lines(&answers),
        Answer::Records { answers, additional } => format!("{} [{}]", lines(&answers), lines(&additional)),
        Answer::NoData => "nodata".into(),
        Answer::NxDomain => "nxdomain".into(),
        Answer::ServFail => "servfail".into(),
    }
}

#[track_caller]
fn check(name: &str, wanted: RecordType, known: &Known, want: &str) {
    assert_eq!(told(name, wanted, known), want, "{name} {wanted:?}");
}

#[test]
fn names_are_read() {
    let service = || "shop/web".parse::<ServiceName>().unwrap();
    let cluster = || "east".parse::<ClusterId>().unwrap();
    let tcp = Transport::Tcp;
    for (name, want) in [
        ("clusterset.local", Some(Subject::Apex)),
        ("ClusterSet.LOCAL", Some(Subject::Apex)),
        ("dns-version.clusterset.local", Some(Subject::Version)),
        ("svc.clusterset.local", Some(Subject::Above)),
        ("shop.svc.clusterset.local", Some(Subject::Above)),
        ("web.shop.svc.clusterset.local", Some(Subject::Service(service()))),
        ("WEB.Shop.svc.clusterset.local", Some(Subject::Service(service()))),
        ("east.web.shop.svc.clusterset.local", Some(Subject::Cluster { cluster: cluster(), service: service() })),
        (
            "db-0.east.web.shop.svc.clusterset.local",
            Some(Subject::Endpoint { hostname: "db-0".into(), cluster: cluster(), service: service() }),
        ),
        ("_tcp.web.shop.svc.clusterset.local", Some(Subject::Protocol { transport: tcp, service: service() })),
        (
            "_http._tcp.web.shop.svc.clusterset.local",
            Some(Subject::Port { port: "http".into(), transport: tcp, service: service() }),
        ),
        ("http._tcp.web.shop.svc.clusterset.local", Some(Subject::Nothing)),
        ("_http.east.web.shop.svc.clusterset.local", Some(Subject::Nothing)),
        ("_quic.web.shop.svc.clusterset.local", Some(Subject::Nothing)),
        ("a.b.c.web.shop.svc.clusterset.local", Some(Subject::Nothing)),
        ("pod.clusterset.local", Some(Subject::Nothing)),
        ("a/b.shop.svc.clusterset.local", Some(Subject::Nothing)),
        ("-x.svc.clusterset.local", Some(Subject::Nothing)),
        ("web.shop.svc.cluster.local", None),
        ("web.shop.svc.clusterset.local.cluster.local", None),
        ("notclusterset.local", None),
        ("local", None),
        ("example.com", None),
    ] {
        assert_eq!(subject(name), want, "{name}");
    }
    assert_eq!(Subject::read(std::iter::empty()), None);
}

#[test]
fn the_zone_itself_is_answered_without_any_service() {
    for known in [Known::Absent, Known::CutOff] {
        check("dns-version.clusterset.local", RecordType::Txt, &known, "TXT:1.0.0");
        check("dns-version.clusterset.local", RecordType::A, &known, "nodata");
        check("clusterset.local", RecordType::Soa, &known, "SOA");
        check("clusterset.local", RecordType::Any, &known, "SOA");
        check("clusterset.local", RecordType::A, &known, "nodata");
        check("shop.svc.clusterset.local", RecordType::A, &known, "nodata");
        check("x.clusterset.local", RecordType::A, &known, "nxdomain");
    }
}

#[test]
fn a_service_has_one_address_and_one_server_for_each_port() {
    let known = whole();
    let all = "A:240.1.0.1 AAAA:fd74:6f6d:626f::1";
    for (name, wanted, want) in [
        ("web.shop.svc.clusterset.local", RecordType::A, "A:240.1.0.1"),
        ("web.shop.svc.clusterset.local", RecordType::Aaaa, "AAAA:fd74:6f6d:626f::1"),
        ("web.shop.svc.clusterset.local", RecordType::Any, all),
        ("web.shop.svc.clusterset.local", RecordType::Srv, "nodata"),
        ("web.shop.svc.clusterset.local", RecordType::Other, "nodata"),
        ("east.web.shop.svc.clusterset.local", RecordType::A, "nxdomain"),
        ("e1.east.web.shop.svc.clusterset.local", RecordType::A, "nxdomain"),
        ("_tcp.web.shop.svc.clusterset.local", RecordType::Srv, "nodata"),
        ("_sctp.web.shop.svc.clusterset.local", RecordType::Srv, "nxdomain"),
        ("_http._tcp.web.shop.svc.clusterset.local", RecordType::A, "nodata"),
        ("_http._udp.web.shop.svc.clusterset.local", RecordType::Srv, "nxdomain"),
        ("_none._tcp.web.shop.svc.clusterset.local", RecordType::Srv, "nxdomain"),
        ("_._tcp.web.shop.svc.clusterset.local", RecordType::Srv, "nxdomain"),
    ] {
        check(name, wanted, &known, want);
    }
    // TCP and UDP share port 53, and each question has one answer.
    for (name, port) in [("_http._tcp", 80), ("_dns._tcp", 53), ("_dns._udp", 53)] {
        let target = "web.shop.svc.clusterset.local";
        let want = format!("SRV:{port}:{target} [{target} A:240.1.0.1 {target} AAAA:fd74:6f6d:626f::1]");
        check(&format!("{name}.{target}"), RecordType::Srv, &known, &want);
    }
}

#[test]
fn a_headless_service_is_where_its_ready_endpoints_are() {
    let known = headless();
    let web = "web.shop.svc.clusterset.local";
    check(web, RecordType::A, &known, "A:240.1.0.2 A:240.1.0.3 A:240.1.0.5 A:240.1.0.6");
    check(&format!("db-0.east.{web}"), RecordType::A, &known, "A:240.1.0.2");
    check(&format!("db-0.west.{web}"), RecordType::A, &known, "A:240.1.0.5");
    // An endpoint without a host name that could be used is known by its id.
    check(&format!("e3.east.{web}"), RecordType::Aaaa, &known, "AAAA:fd74:6f6d:626f::3");
    check(&format!("e6.west.{web}"), RecordType::A, &known, "A:240.1.0.6");
    check(&format!("db-2.east.{web}"), RecordType::A, &known, "nxdomain");
    check(&format!("db-0.east.{web}"), RecordType::Srv, &known, "nodata");
    // The cluster's name has no records of its own, and does not hide those below it.
    check(&format!("east.{web}"), RecordType::A, &known, "nodata");
    check(&format!("north.{web}"), RecordType::A, &known, "nxdomain");
    let servers = told(&format!("_http._tcp.{web}"), RecordType::Srv, &known);
    for target in ["db-0.east", "e3.east", "db-0.west", "e6.west"] {
        assert!(servers.contains(&format!("SRV:80:{target}.{web}")), "{servers}");
    }
    assert_eq!(servers.matches("SRV:").count(), 4);
    let none = Known::Records(records(&[share("east", ServiceKind::Headless, &[])], None).unwrap());
    check(web, RecordType::A, &none, "nodata");
    check(&format!("_http._tcp.{web}"), RecordType::Srv, &none, "nodata");
}

#[test]
fn endpoints_come_first_in_turn() {
    let Known::Records(records) = headless() else { unreachable!() };
    let web = subject("web.shop.svc.clusterset.local").unwrap();
    let first = |turn| match answer(&web, RecordType::A, &Known::Records(records.clone()), turn) {
        Answer::Records { answers, .. } => answers[0].data.clone(),
        other => panic!("{other:?}"),
    };
    let firsts: BTreeSet<_> = (0..4).map(|turn| format!("{:?}", first(turn))).collect();
    assert_eq!(firsts.len(), 4);
    assert_eq!(first(0), first(4));
}

#[test]
fn what_can_not_be_known_is_not_denied() {
    let cut = Known::CutOff;
    let known = Known::Address(address(1));
    for (name, wanted, cut_off, by_address, absent) in [
        ("web.shop.svc.clusterset.local", RecordType::A, "servfail", "A:240.1.0.1", "nxdomain"),
        ("web.shop.svc.clusterset.local", RecordType::Txt, "servfail", "nodata", "nxdomain"),
        ("_http._tcp.web.shop.svc.clusterset.local", RecordType::Srv, "servfail", "servfail", "nxdomain"),
        ("_tcp.web.shop.svc.clusterset.local", RecordType::A, "servfail", "servfail", "nxdomain"),
        ("east.web.shop.svc.clusterset.local", RecordType::A, "servfail", "nxdomain", "nxdomain"),
        ("e1.east.web.shop.svc.clusterset.local", RecordType::A, "servfail", "nxdomain", "nxdomain"),
    ] {
        check(name, wanted, &cut, cut_off);
        check(name, wanted, &known, by_address);
        check(name, wanted, &Known::Absent, absent);
    }
    assert_eq!(records(&[share("east", ServiceKind::ClusterSetIp, &[])], None), None, "it has no address yet");
}

proptest! {
    /// Any labels are read without a panic, and whatever is in the zone gets an answer.
    #[test]
    fn any_name_is_judged(labels in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..64), 0..8)) {
        let zone = [b"clusterset".to_vec(), b"local".to_vec()];
        let name: Vec<&[u8]> = labels.iter().chain(&zone).map(Vec::as_slice).collect();
        let subject = Subject::read(name.into_iter()).unwrap();
        for known in [Known::Absent, Known::CutOff, whole(), headless()] {
            answer(&subject, RecordType::Any, &known, usize::MAX);
        }
    }
}
