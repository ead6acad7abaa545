//! The sidecar's DNS server between real clusters, asked with `dig`.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Stdio;

use serde_json::json;
use support::{World, app, curl_until, get, installed, link, resolver, serve, until};
use tokio::process::Command;
use tombolo_testbed::Sidecar;

const WEB: &str = "web.shop.svc.clusterset.local";

/// What `dig` prints.
async fn dig(server: SocketAddr, arguments: &[&str]) -> String {
    let (at, port) = (format!("@{}", server.ip()), server.port().to_string());
    let mut command = Command::new("dig");
    command.args([&at, "-p", &port, "+tries=1", "+timeout=10"]).args(arguments).stdin(Stdio::null());
    let output = command.output().await.unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The first line that `dig +short` prints, once it is a `T`.
async fn resolved<T: std::str::FromStr>(server: SocketAddr, arguments: &[&str]) -> T {
    let arguments = [&["+short"], arguments].concat();
    until(&format!("{arguments:?} to be answered"), async || dig(server, &arguments).await.lines().next()?.parse().ok())
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_the_clusterset_and_all_others_are_resolved_with_and_without_a_federation() {
    let Some(()) = installed(&["dig"]) else { return };
    let world = World::new().await;
    let (mut east, mut west) = (world.cluster("east").await, world.cluster("west").await);
    let app = app::http("west-web").await;
    serve(&mut west, "web", "http", "http", app.address).await;
    west.operator(&["export", "shop/web"]).await.unwrap();
    link(&east, &west).await;
    let ordinary = resolver::start("127.0.0.1:0".parse().unwrap(), Ipv4Addr::new(192, 0, 2, 80)).await;
    let dns = json!({ "listen": ["127.0.0.1:0", "[::1]:0"], "upstreams": [ordinary] });
    let sidecar = Sidecar { name: "frontend", workload: "shop/frontend", config: json!({ "dns": dns }) };
    let frontend = east.start_sidecar(sidecar).await.unwrap();
    let proxy = frontend.address("outbound").unwrap();
    let (v4, v6) = (frontend.address("dns-0").unwrap(), frontend.address("dns-1").unwrap());

    // The federation is asked as soon as somebody asks; over both families and both transports.
    let address: Ipv4Addr = resolved(v4, &[WEB]).await;
    assert_eq!(address.octets()[..2], [240, 1], "{address}");
    assert_eq!(resolved::<Ipv4Addr>(v6, &["+tcp", WEB]).await, address);
    let wide: Ipv6Addr = resolved(v6, &["AAAA", WEB]).await;
    assert_eq!(wide.segments()[..3], [0xfd74, 0x6f6d, 0x626f], "{wide}");
    let srv = dig(v4, &["+short", "SRV", &format!("_http._tcp.{WEB}")]).await;
    assert!(srv.contains(&format!("80 {WEB}.")), "{srv}");
    assert!(dig(v4, &["+short", "TXT", "dns-version.clusterset.local"]).await.contains("1.0.0"));
    let answer = curl_until(proxy, &format!("http://{WEB}/"), "west-web").await;
    assert_eq!(answer.status, 200);
    let none = format!("none.{}", WEB.split_once('.').unwrap().1);
    assert!(dig(v4, &[&none]).await.contains("status: NXDOMAIN"));
    assert!(dig(v4, &["www.example.com"]).await.contains("192.0.2.80"));

    let admin = frontend.address("admin").unwrap();
    let metrics = get(admin, "/metrics").await;
    assert!(metrics.contains("tombolo_dns_messages_total{outcome=\"denied\"} 1"), "{metrics}");
    assert!(metrics.contains("tombolo_dns_messages_total{outcome=\"relayed\"} 1"), "{metrics}");
    let state: serde_json::Value = serde_json::from_str(&get(admin, "/state").await).unwrap();
    assert_eq!(state["dns"]["upstreams"], json!([ordinary]));
    assert!(state["dns"]["services"].as_array().unwrap().iter().any(|held| held["service"] == "shop/web"), "{state}");

    // Without the federation nothing is denied, what is known stays, and ordinary names are as before.
    east.kill("federation").await.unwrap();
    until("the sidecar to notice", async || {
        get(admin, "/metrics").await.contains("tombolo_sidecar_federation_connected 0").then_some(())
    })
    .await;
    assert_eq!(resolved::<Ipv4Addr>(v4, &[WEB]).await, address);
    for unknown in [none.as_str(), "other.shop.svc.clusterset.local"] {
        assert!(dig(v4, &[unknown]).await.contains("status: SERVFAIL"), "{unknown}");
    }
    assert!(dig(v4, &["mail.example.com"]).await.contains("192.0.2.80"));
    // Nor is there need of one to start.
    east.kill("frontend").await.unwrap();
    let frontend = east.restart("frontend").await.unwrap();
    let v4 = frontend.address("dns-0").unwrap();
    assert!(dig(v4, &["ftp.example.com"]).await.contains("192.0.2.80"));
    assert_eq!(resolved::<Ipv4Addr>(v4, &[WEB]).await, address, "remembered");
    east.stop().await;
    west.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_lead_to_loopback_where_nothing_is_redirected() {
    let Some(()) = installed(&["dig"]) else { return };
    let world = World::new().await;
    let (mut east, mut west) = (world.cluster("east").await, world.cluster("west").await);
    let app = app::http("west-web").await;
    // Ports that nobody has: they are listened at here.
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (port, own) = (free(), free());
    west.declare_service("shop", "web", &[("http", port), ("own", own)]).unwrap();
    west.declare_service("shop", "db", &[("tcp", own)]).unwrap();
    let service = json!({ "service": "shop/web", "port": port, "app": app.address, "protocol": "http" });
    let config = json!({ "services": [service] });
    west.start_sidecar(Sidecar { name: "web", workload: "shop/web", config }).await.unwrap();
    west.operator(&["export", "shop/web"]).await.unwrap();
    west.operator(&["export", "shop/db"]).await.unwrap();
    link(&east, &west).await;
    let ordinary = resolver::start("127.0.0.1:0".parse().unwrap(), Ipv4Addr::new(192, 0, 2, 80)).await;
    let dns = json!({ "listen": ["127.0.0.1:0"], "upstreams": [ordinary], "loopback": { "exceptPorts": [own] } });
    let sidecar = Sidecar { name: "frontend", workload: "shop/frontend", config: json!({ "dns": dns }) };
    let frontend = east.start_sidecar(sidecar).await.unwrap();
    let server = frontend.address("dns-0").unwrap();

    let address: Ipv4Addr = resolved(server, &[WEB]).await;
    assert_eq!(address.octets()[..2], [127, 240], "{address}");
    assert_eq!(resolved::<Ipv6Addr>(server, &["AAAA", WEB]).await, address.to_ipv6_mapped());
    let web = SocketAddr::from((address, port));
    until("the application of the other cluster", async || get(web, "/").await.contains("west-web").then_some(()))
        .await;
    // The port that the application has itself is left to it, so a service with no other can't be found here.
    assert!(tokio::net::TcpStream::connect((address, own)).await.is_err());
    assert!(dig(server, &["db.shop.svc.clusterset.local"]).await.contains("status: SERVFAIL"));
    assert!(dig(server, &["none.shop.svc.clusterset.local"]).await.contains("status: NXDOMAIN"));
    assert!(dig(server, &["www.example.com"]).await.contains("192.0.2.80"));

    // Whoever remembers the address of a service that has gone is refused.
    west.operator(&["unexport", "shop/web"]).await.unwrap();
    until("the service to be gone", async || (!get(web, "/").await.contains("west-web")).then_some(())).await;
    east.stop().await;
    west.stop().await;
}
