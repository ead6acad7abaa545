//! The four configurations of a chain, as Envoy's v3 API writes them.

use std::path::Path;

use serde_json::{Value, json};

use super::Ports;

pub const CLIENT_SIDECAR: &str = "spiffe://east.bench/ns/bench/sa/client";
pub const NEAR_GATEWAY: &str = "spiffe://east.bench/ns/mesh/sa/gateway";
pub const FAR_GATEWAY: &str = "spiffe://west.bench/ns/mesh/sa/gateway";
pub const SERVER_SIDECAR: &str = "spiffe://west.bench/ns/bench/sa/echo";

const SNI: &str = "echo.bench.west.bench";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chain {
    /// TCP-proxy sidecars, gateways with an HTTP/2 CONNECT tunnel.
    Opaque,
    /// HTTP-connection-manager sidecars with HTTP/2 between them, the same gateways.
    Http,
    /// TCP-proxy sidecars, gateways that pass on by SNI without a tunnel.
    SniPassthrough,
    /// TCP-proxy sidecars without gateways.
    Pair,
    /// HTTP-connection-manager sidecars without gateways, which authorize the caller, choose among routes and send a hundredth
    /// of the traces to this port (OTLP over gRPC).
    PairHttp { otlp: u16 },
}

impl Chain {
    fn http(self) -> bool {
        matches!(self, Chain::Http | Chain::PairHttp { .. })
    }

    fn gateways(self) -> bool {
        !matches!(self, Chain::Pair | Chain::PairHttp { .. })
    }
}

/// Name and configuration of each Envoy.
pub fn all(
    chain: Chain,
    certificates: &Path,
    ports: Ports,
    mut free_port: impl FnMut() -> anyhow::Result<u16>,
) -> anyhow::Result<Vec<(&'static str, Value)>> {
    let tls = Tls { certificates };
    let mut whole = |(listener, cluster): (Value, Value)| -> anyhow::Result<Value> {
        let mut clusters = vec![cluster];
        if let Chain::PairHttp { otlp } = chain {
            clusters.push(self::cluster("otlp", otlp, None, Some(http2())));
        }
        Ok(json!({
            "admin": { "address": address(free_port()?) },
            "static_resources": { "listeners": [listener], "clusters": clusters },
        }))
    };
    let mut all = vec![
        ("client-sidecar", whole(client_sidecar(chain, &tls, ports))?),
        ("server-sidecar", whole(server_sidecar(chain, &tls, ports))?),
    ];
    if chain.gateways() {
        all.push(("near-gateway", whole(near_gateway(chain, &tls, ports))?));
        all.push(("far-gateway", whole(far_gateway(chain, &tls, ports))?));
    }
    Ok(all)
}

fn client_sidecar(chain: Chain, tls: &Tls<'_>, ports: Ports) -> (Value, Value) {
    let http = chain.http();
    let next = if chain.gateways() { ports.near_gateway } else { ports.server_sidecar };
    let alpn = if http { "h2" } else { "tcp" };
    let secure = tls.upstream("client-sidecar", SERVER_SIDECAR, alpn, SNI);
    let inner = cluster("next", next, Some(secure), http.then(http2));
    let filter = if http { http_proxy("AUTO", chain, "client-sidecar") } else { tcp_proxy("next", false) };
    (listener(ports.client_sidecar, filter, None), inner)
}

fn near_gateway(chain: Chain, tls: &Tls<'_>, ports: Ports) -> (Value, Value) {
    if chain == Chain::SniPassthrough {
        return (sni_listener(ports.near_gateway), cluster("next", ports.far_gateway, None, None));
    }
    let secure = tls.upstream("near-gateway", FAR_GATEWAY, "h2", "gateway.west.bench");
    let tunnel = cluster("next", ports.far_gateway, Some(secure), Some(http2()));
    (listener(ports.near_gateway, tcp_proxy("next", true), None), tunnel)
}

fn far_gateway(chain: Chain, tls: &Tls<'_>, ports: Ports) -> (Value, Value) {
    let next = cluster("next", ports.server_sidecar, None, None);
    if chain == Chain::SniPassthrough {
        return (sni_listener(ports.far_gateway), next);
    }
    let secure = tls.downstream("far-gateway", NEAR_GATEWAY, "h2");
    (listener(ports.far_gateway, connect_proxy(), Some(secure)), next)
}

fn server_sidecar(chain: Chain, tls: &Tls<'_>, ports: Ports) -> (Value, Value) {
    let http = chain.http();
    let secure = tls.downstream("server-sidecar", CLIENT_SIDECAR, if http { "h2" } else { "tcp" });
    let filter = if http { http_proxy("HTTP2", chain, "server-sidecar") } else { tcp_proxy("next", false) };
    (listener(ports.server_sidecar, filter, Some(secure)), cluster("next", ports.app, None, None))
}

struct Tls<'a> {
    certificates: &'a Path,
}

impl Tls<'_> {
    fn common(&self, name: &str, peer: &str, alpn: &str) -> Value {
        let file = |name: String| json!({ "filename": self.certificates.join(name) });
        json!({
            "tls_certificates": [{
                "certificate_chain": file(format!("{name}.pem")),
                "private_key": file(format!("{name}.key")),
            }],
            "validation_context": {
                "trusted_ca": file("bundle.pem".to_owned()),
                "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": peer } }],
            },
            "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
            "alpn_protocols": [alpn],
        })
    }

    fn upstream(&self, name: &str, peer: &str, alpn: &str, sni: &str) -> Value {
        extension(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            json!({ "common_tls_context": self.common(name, peer, alpn), "sni": sni, "max_session_keys": 0 }),
        )
    }

    fn downstream(&self, name: &str, peer: &str, alpn: &str) -> Value {
        extension(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            json!({
                "common_tls_context": self.common(name, peer, alpn),
                "require_client_certificate": true,
                "disable_stateless_session_resumption": true,
                "disable_stateful_session_resumption": true,
            }),
        )
    }
}

fn extension(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = json!(format!("type.googleapis.com/{kind}"));
    json!({ "name": name, "typed_config": config })
}

fn address(port: u16) -> Value {
    json!({ "socket_address": { "address": "127.0.0.1", "port_value": port } })
}

fn listener(port: u16, filter: Value, secure: Option<Value>) -> Value {
    let mut chain = json!({ "filters": [filter] });
    if let Some(secure) = secure {
        chain["transport_socket"] = secure;
    }
    json!({ "name": "in", "address": address(port), "filter_chains": [chain] })
}

fn sni_listener(port: u16) -> Value {
    let mut listener = listener(port, tcp_proxy("next", false), None);
    listener["filter_chains"][0]["filter_chain_match"] = json!({ "server_names": [SNI] });
    let inspector = extension(
        "envoy.filters.listener.tls_inspector",
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
        json!({}),
    );
    listener["listener_filters"] = json!([inspector]);
    listener
}

fn cluster(name: &str, port: u16, secure: Option<Value>, http: Option<Value>) -> Value {
    let most = 200_000;
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": { "thresholds": [{
            "max_connections": most, "max_pending_requests": most, "max_requests": most, "max_retries": 10,
        }] },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(port) } }] }],
        },
    });
    if let Some(secure) = secure {
        cluster["transport_socket"] = secure;
    }
    if let Some(http) = http {
        let kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        cluster["typed_extension_protocol_options"] = json!({
            kind: { "@type": format!("type.googleapis.com/{kind}"), "explicit_http_config": http },
        });
    }
    cluster
}

/// Windows wide enough never to be what limits a bulk stream on loopback.
fn http2_windows() -> Value {
    json!({
        "max_concurrent_streams": 100_000,
        "initial_stream_window_size": 16 << 20,
        "initial_connection_window_size": 64 << 20,
        "allow_connect": true,
    })
}

fn http2() -> Value {
    json!({ "http2_protocol_options": http2_windows() })
}

fn tcp_proxy(cluster: &str, tunnel: bool) -> Value {
    let mut config = json!({ "stat_prefix": cluster, "cluster": cluster, "idle_timeout": "3600s" });
    if tunnel {
        config["tunneling_config"] = json!({ "hostname": "echo:80" });
    }
    let kind = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
    extension("envoy.filters.network.tcp_proxy", kind, config)
}

fn connection_manager(codec: &str, virtual_host: Value, connect: bool) -> Value {
    let router = extension(
        "envoy.filters.http.router",
        "envoy.extensions.filters.http.router.v3.Router",
        json!({ "suppress_envoy_headers": true }),
    );
    let mut config = json!({
        "stat_prefix": "in",
        "codec_type": codec,
        "stream_idle_timeout": "0s",
        "generate_request_id": false,
        "http_filters": [router],
        "http2_protocol_options": http2_windows(),
        "route_config": { "name": "all", "virtual_hosts": [virtual_host] },
    });
    if connect {
        config["upgrade_configs"] = json!([{ "upgrade_type": "CONNECT" }]);
    }
    let kind = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    extension("envoy.filters.network.http_connection_manager", kind, config)
}

fn http_proxy(codec: &str, chain: Chain, name: &str) -> Value {
    let route = |prefix: &str, timeout: &str| json!({ "match": { "prefix": prefix }, "route": { "cluster": "next", "timeout": timeout } });
    let routes = |routes: Value| json!({ "name": "all", "domains": ["*"], "routes": routes });
    let Chain::PairHttp { .. } = chain else {
        return connection_manager(codec, routes(json!([route("/", "0s")])), false);
    };
    let mut manager = connection_manager(codec, routes(json!([route("/other", "10s"), route("/", "10s")])), false);
    let config = &mut manager["typed_config"];
    // Without an id Envoy can't decide about a trace once for all its hops.
    config["generate_request_id"] = json!(true);
    config["tracing"] = tracing(name);
    if name == "server-sidecar" {
        let filters = config["http_filters"].as_array_mut().into_iter();
        filters.for_each(|filters| filters.insert(0, only_the_caller()));
    }
    manager
}

fn tracing(name: &str) -> Value {
    let kind = "envoy.config.trace.v3.OpenTelemetryConfig";
    let to = json!({ "envoy_grpc": { "cluster_name": "otlp" }, "timeout": "1s" });
    json!({
        "random_sampling": { "value": 1.0 },
        "provider": extension("envoy.tracers.opentelemetry", kind, json!({ "grpc_service": to, "service_name": name })),
    })
}

fn only_the_caller() -> Value {
    let caller = json!({ "authenticated": { "principal_name": { "exact": CLIENT_SIDECAR } } });
    let policy = json!({ "permissions": [{ "any": true }], "principals": [caller] });
    extension(
        "envoy.filters.http.rbac",
        "envoy.extensions.filters.http.rbac.v3.RBAC",
        json!({ "rules": { "action": "ALLOW", "policies": { "caller": policy } } }),
    )
}

fn connect_proxy() -> Value {
    let route = json!({
        "match": { "connect_matcher": {} },
        "route": {
            "cluster": "next",
            "timeout": "0s",
            "idle_timeout": "3600s",
            "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }],
        },
    });
    connection_manager("HTTP2", json!({ "name": "all", "domains": ["*"], "routes": [route] }), true)
}
