#![allow(clippy::unwrap_used)]
use super::*;

fn whole() -> Options {
    Options {
        outbound: Some(15002),
        inbound: Some(15006),
        dns: Some(15053),
        exclude: Excludes {
            uids: [1337, 0].into(),
            gids: [1338].into(),
            cgroups: ["/system.slice/tombolo.service".parse().unwrap()].into(),
            interfaces: ["docker0".parse().unwrap(), "veth*".parse().unwrap()].into(),
            outbound_ranges: [parse_range("10.1.2.3/8").unwrap(), parse_range("fd00::/8").unwrap()].into(),
            outbound_ports: [22].into(),
            inbound_ranges: [parse_range("192.0.2.1").unwrap(), parse_range("2001:db8::1").unwrap()].into(),
            inbound_ports: [15008, 15020].into(),
        },
    }
}

#[test]
fn the_whole_as_nft() {
    let want = r#"add table inet tombolo
delete table inet tombolo
table inet tombolo {
	chain outbound {
		type nat hook output priority -100; policy accept;
		meta skuid 0 return
		meta skuid 1337 return
		meta skgid 1338 return
		socket cgroupv2 level 2 "system.slice/tombolo.service" return
		oifname "docker0" return
		oifname "veth*" return
		ip daddr 10.0.0.0/8 return
		ip6 daddr fd00::/8 return
		tcp dport 22 return
		udp dport 53 redirect to :15053
		tcp dport 53 redirect to :15053
		fib daddr type local return
		meta l4proto tcp redirect to :15002
	}
	chain inbound {
		type nat hook prerouting priority -100; policy accept;
		fib daddr type != local return
		iifname "lo" return
		iifname "docker0" return
		iifname "veth*" return
		ip saddr 192.0.2.1/32 return
		ip6 saddr 2001:db8::1/128 return
		tcp dport 15008 return
		tcp dport 15020 return
		meta l4proto tcp redirect to :15006
	}
}
"#;
    assert_eq!(nft::ruleset(&Plan::new(&whole()).unwrap()), want);
}

#[test]
fn the_whole_as_iptables_of_either_family() {
    let plan = Plan::new(&whole()).unwrap();
    let want = r#"*nat
:TOMBOLO_OUTBOUND - [0:0]
:TOMBOLO_INBOUND - [0:0]
-A TOMBOLO_OUTBOUND -m owner --uid-owner 0 -j RETURN
-A TOMBOLO_OUTBOUND -m owner --uid-owner 1337 -j RETURN
-A TOMBOLO_OUTBOUND -m owner --gid-owner 1338 -j RETURN
-A TOMBOLO_OUTBOUND -m cgroup --path "system.slice/tombolo.service" -j RETURN
-A TOMBOLO_OUTBOUND -o docker0 -j RETURN
-A TOMBOLO_OUTBOUND -o veth+ -j RETURN
-A TOMBOLO_OUTBOUND -d RANGE_OUT -j RETURN
-A TOMBOLO_OUTBOUND -p tcp --dport 22 -j RETURN
-A TOMBOLO_OUTBOUND -p udp --dport 53 -j REDIRECT --to-ports 15053
-A TOMBOLO_OUTBOUND -p tcp --dport 53 -j REDIRECT --to-ports 15053
-A TOMBOLO_OUTBOUND -m addrtype --dst-type LOCAL -j RETURN
-A TOMBOLO_OUTBOUND -p tcp -j REDIRECT --to-ports 15002
-A TOMBOLO_INBOUND -m addrtype ! --dst-type LOCAL -j RETURN
-A TOMBOLO_INBOUND -i lo -j RETURN
-A TOMBOLO_INBOUND -i docker0 -j RETURN
-A TOMBOLO_INBOUND -i veth+ -j RETURN
-A TOMBOLO_INBOUND -s RANGE_IN -j RETURN
-A TOMBOLO_INBOUND -p tcp --dport 15008 -j RETURN
-A TOMBOLO_INBOUND -p tcp --dport 15020 -j RETURN
-A TOMBOLO_INBOUND -p tcp -j REDIRECT --to-ports 15006
-A OUTPUT -j TOMBOLO_OUTBOUND
-A PREROUTING -j TOMBOLO_INBOUND
COMMIT
"#;
    for (family, out, from) in [(Family::V4, "10.0.0.0/8", "192.0.2.1/32"), (Family::V6, "fd00::/8", "2001:db8::1/128")]
    {
        let written = iptables::ruleset(&plan, family, &iptables::Standing::default());
        assert_eq!(written, want.replace("RANGE_OUT", out).replace("RANGE_IN", from), "{family}");
    }
}

const SAVED: &str = "*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:TOMBOLO_INBOUND - [0:0]\n\
    :TOMBOLO_OUTBOUND - [0:0]\n-A PREROUTING -j TOMBOLO_INBOUND\n-A OUTPUT -j TOMBOLO_OUTBOUND\n\
    -A OUTPUT -j TOMBOLO_OUTBOUND\n-A TOMBOLO_OUTBOUND -p tcp -j REDIRECT --to-ports 15002\nCOMMIT\n";

#[test]
fn what_stands_is_neither_doubled_nor_left_behind() {
    let standing = iptables::Standing::read(SAVED);
    assert!(!standing.is_empty() && iptables::Standing::read("*nat\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n").is_empty());
    let plan = Plan::new(&whole()).unwrap();
    let again = iptables::ruleset(&plan, Family::V4, &standing);
    assert!(!again.contains("-A OUTPUT") && !again.contains("-A PREROUTING"), "{again}");
    // A direction that is no longer captured goes away with its jumps.
    let only_inbound = Plan::new(&Options { outbound: None, dns: None, ..whole() }).unwrap();
    let less = iptables::ruleset(&only_inbound, Family::V4, &standing);
    let gone =
        "-D OUTPUT -j TOMBOLO_OUTBOUND\n-D OUTPUT -j TOMBOLO_OUTBOUND\n-F TOMBOLO_OUTBOUND\n-X TOMBOLO_OUTBOUND\n";
    assert!(less.contains(gone) && !less.contains(":TOMBOLO_OUTBOUND"), "{less}");
    let removal = iptables::removal(&standing);
    let all = "-D PREROUTING -j TOMBOLO_INBOUND\n-F TOMBOLO_INBOUND\n-X TOMBOLO_INBOUND\nCOMMIT\n";
    assert!(removal.starts_with(&format!("*nat\n{gone}")) && removal.ends_with(all), "{removal}");
}

#[test]
fn a_direction_that_is_not_captured_has_no_rules() {
    let exclude = Excludes { uids: [1337].into(), ..Excludes::default() };
    let dns = Plan::new(&Options { dns: Some(15053), exclude: exclude.clone(), ..Options::default() }).unwrap();
    let text = nft::ruleset(&dns);
    assert!(text.contains("udp dport 53 redirect") && !text.contains("l4proto") && !text.contains("inbound"), "{text}");
    let inbound = Plan::new(&Options { inbound: Some(15006), ..Options::default() }).unwrap();
    assert!(inbound.outbound.is_empty() && !nft::ruleset(&inbound).contains("output"));
    let outbound = Plan::new(&Options { outbound: Some(15002), exclude, ..Options::default() }).unwrap();
    let text = iptables::ruleset(&outbound, Family::V6, &iptables::Standing::default());
    assert!(!text.contains("53") && !text.contains("INBOUND"), "{text}");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let changed = |change: fn(&mut Options)| {
        let mut options = whole();
        change(&mut options);
        Plan::new(&options).map(drop)
    };
    assert_eq!(Plan::new(&Options::default()), Err(CaptureError::Nothing));
    assert_eq!(changed(|_| {}), Ok(()));
    let nobody = |options: &mut Options| {
        options.exclude = Excludes::default();
    };
    assert_eq!(changed(nobody), Err(CaptureError::NobodyExcluded));
    assert_eq!(changed(|options| options.inbound = Some(0)), Err(CaptureError::NoPort(0)));
    assert_eq!(changed(|options| options.exclude.inbound_ports = [0].into()), Err(CaptureError::NoPort(0)));
    assert_eq!(changed(|options| options.dns = Some(15002)), Err(CaptureError::SamePort(15002)));
    assert_eq!(changed(|options| options.exclude.outbound_ports = [53].into()), Err(CaptureError::DnsExcluded));
    let many = changed(|options| options.exclude.inbound_ports = (1..=257).collect());
    assert_eq!(many, Err(CaptureError::TooMany { kind: "inbound ports", count: 257 }));
}

#[test]
fn nothing_that_is_read_can_end_a_rule_early() {
    for text in ["", "/", "a//b", "../etc", "a/..", "a b", "a\"b", "a\nb", "a;b", "a{b"] {
        assert!(text.parse::<Cgroup>().is_err(), "{text:?}");
    }
    assert_eq!("kubepods/pod1@x.slice".parse::<Cgroup>().unwrap().level(), 2);
    for text in ["", "*", "a b", "eth0\"", "eth0\n", "a*b", "sixteen-letters-", "eth/0"] {
        assert!(text.parse::<Interface>().is_err(), "{text:?}");
    }
    for text in ["", "10.0.0.0/33", "10.0.0/8", "fd00::/129", "example.com", "10.0.0.0 /8"] {
        assert!(parse_range(text).is_err(), "{text:?}");
    }
}
