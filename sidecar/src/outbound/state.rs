//! What the outbound side holds, for the admin page.

use std::time::Instant;

use serde_json::{Value, json};

use super::Outbound;
use super::route::Route;

impl Outbound {
    /// Services in use with their plans, and the gateways. No secrets, no addresses of other clusters.
    pub fn state(&self) -> Value {
        let routes: Vec<_> = self.services.routes().iter().map(|route| route_state(route)).collect();
        let gateways = self.gateways.snapshot();
        let gateways = gateways.iter().map(|gateway| {
            json!({
                "id": gateway.id,
                "ingress": gateway.ingress,
                "draining": self.gateways.is_draining(&gateway.id),
                "avoided": gateway.is_avoided(),
            })
        });
        json!({ "routes": routes, "gateways": gateways.collect::<Vec<_>>() })
    }
}

fn route_state(route: &Route) -> Value {
    let (live, now) = (route.live(), Instant::now());
    let endpoints = live.plan.endpoints.iter().zip(&live.targets).map(|(endpoint, target)| {
        json!({
            "cluster": endpoint.key.cluster,
            "endpoint": endpoint.key.endpoint,
            "weight": endpoint.weight,
            "standing": endpoint.standing,
            "ejected": target.outlier().ejected_for(),
            "requests": target.in_flight(),
            "latencyMs": target.expected_latency(now).map(|latency| latency.as_secs_f64() * 1e3),
            "legs": target.pool.legs(),
            "warmLegs": target.warm.standing(),
            "address": target.address,
            "serverIds": target.server_ids,
        })
    });
    json!({
        "service": route.service,
        "port": route.port,
        "only": route.only,
        "protocol": live.app,
        "idleSeconds": route.idle_for(now).as_secs(),
        "clusters": live.plan.clusters,
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
}
