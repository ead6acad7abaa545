//! What a gateway counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tombolo_core::refusal::Refusal;
use tombolo_runtime::metrics::{Metrics, Refusals};

use crate::copy::LegEnd;

/// Where a leg came in.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Entrance {
    /// `ingress`, `tunnel` or `unmeshed`.
    pub entrance: &'static str,
}

pub const INGRESS: Entrance = Entrance { entrance: "ingress" };
pub const TUNNEL: Entrance = Entrance { entrance: "tunnel" };
/// Connections of workloads without a sidecar, for each of which this gateway begins a leg. One to another cluster counts at the
/// ingress too.
pub const UNMESHED: Entrance = Entrance { entrance: "unmeshed" };

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    end: &'static str,
}

/// One peer; there are as many as an operator has accepted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Peer {
    pub peer: String,
}

/// Handles of all metrics; clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Meters {
    pub refusals: Refusals,
    pub legs: Family<Entrance, Counter>,
    pub legs_open: Family<Entrance, Gauge>,
    ended: Family<Ended, Counter>,
    /// Octets carried into and out of tunnels.
    pub into_tunnel: Counter,
    pub out_of_tunnel: Counter,
    pub stalled: Gauge,
    pub tunnels: Family<Peer, Gauge>,
    pub tunnels_up: Family<Peer, Gauge>,
    pub tunnel_rtt_us: Family<Peer, Gauge>,
    pub dials_failed: Family<Peer, Counter>,
    pub watchers: Gauge,
    pub federation_connected: Gauge,
    pub federation_remembered: Gauge,
}

impl Meters {
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            refusals: metrics.refusals("gateway"),
            legs: metrics.counters("tombolo_gateway_legs", "Legs accepted, by where they came in"),
            legs_open: metrics.gauges("tombolo_gateway_legs_open", "Legs being carried, by where they came in"),
            ended: metrics.counters("tombolo_gateway_legs_ended", "Legs that ended, by how"),
            into_tunnel: metrics.counter("tombolo_gateway_into_tunnel_bytes", "Octets of legs sent into tunnels"),
            out_of_tunnel: metrics
                .counter("tombolo_gateway_out_of_tunnel_bytes", "Octets of legs taken out of tunnels"),
            stalled: metrics.gauge("tombolo_gateway_legs_stalled", "Legs whose receiver has stopped reading"),
            tunnels: metrics.gauges("tombolo_gateway_tunnels", "Tunnel connections, by peer"),
            tunnels_up: metrics.gauges("tombolo_gateway_tunnels_up", "Tunnel connections that take legs, by peer"),
            tunnel_rtt_us: metrics
                .gauges("tombolo_gateway_tunnel_rtt_microseconds", "Round trip of the best tunnel, by peer"),
            dials_failed: metrics
                .counters("tombolo_gateway_dials_failed", "Tunnels that could not be dialled, by peer"),
            watchers: metrics.gauge("tombolo_gateway_watchers", "Sidecars that watch this gateway"),
            federation_connected: metrics.gauge(
                "tombolo_gateway_federation_connected",
                "1 while the federation answers; else what is in force is what it told last",
            ),
            federation_remembered: metrics.gauge(
                "tombolo_gateway_federation_remembered",
                "1 while what is in force was told to the process before this one",
            ),
        }
    }

    pub fn refused(&self, refusal: Refusal) {
        self.refusals.inc(refusal);
    }

    pub fn ended(&self, end: LegEnd) {
        match end {
            LegEnd::Stalled => self.refused(Refusal::Stalled),
            LegEnd::Silent => self.refused(Refusal::Timeout),
            LegEnd::Closed | LegEnd::TcpReset | LegEnd::StreamReset | LegEnd::TunnelLost => {}
        }
        self.ended.get_or_create(&Ended { end: end.as_str() }).inc();
    }
}
