//! `tombolo status`: what this cluster is, knows and does, in tables or as JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tombolo_api::proto::operator::{ServiceRow, StatusRequest, StatusResponse};

use super::client::{block_on, connect, refused};
use super::{peer, table};
use crate::args::{Output, StatusCommand};

/// Revoked identities in the table; all are in the JSON.
const REVOKED_SHOWN_MAX: usize = 20;

pub fn run(command: StatusCommand) -> anyhow::Result<()> {
    let status = block_on(async {
        let mut operator = connect(&command.socket.state).await?;
        Ok(operator.status(StatusRequest {}).await.map_err(refused)?.into_inner())
    })?;
    match command.output {
        Output::Json => anstream::println!("{}", serde_json::to_string_pretty(&to_json(&status))?),
        Output::Table => print(&status),
    }
    Ok(())
}

fn print(status: &StatusResponse) {
    anstream::println!(
        "cluster {}   trust domain {}   bundle {}   epoch {}   tombolo {}\n",
        status.cluster,
        status.trust_domain,
        status.bundle_sequence,
        status.epoch,
        status.version
    );
    if status.leader != "this replica" && !status.leader.is_empty() {
        anstream::println!("leader: {}; this replica changes nothing\n", status.leader);
    }
    peer::print_peers(&status.peers);
    anstream::println!();
    print_services(&status.services);
    anstream::println!();
    let gateways = status.gateways.iter().map(|row| {
        let state = if row.connected { "connected" } else { "away" };
        let up = row.tunnels.iter().filter(|tunnel| tunnel.reach == "up").count();
        let legs: u32 = row.tunnels.iter().map(|tunnel| tunnel.legs).sum();
        let advertise = table::list(&row.advertise);
        vec![
            row.gateway_id.clone(),
            state.into(),
            up.to_string(),
            legs.to_string(),
            row.ingress_address.clone(),
            advertise,
        ]
    });
    table::print(&["gateway", "state", "tunnels up", "legs", "ingress", "advertises"], gateways);
    anstream::println!();
    let sidecars = status.sidecars.iter().map(|row| {
        // One that only calls others has nothing to be ready.
        let ready = if row.registered == 0 { "-".into() } else { format!("{}/{}", row.ready, row.registered) };
        vec![row.instance.clone(), ready, table::list(&row.services), row.spiffe_id.clone()]
    });
    table::print(&["sidecar", "ready", "serves", "identity"], sidecars);
    print_revoked(&status.revoked);
    for problem in &status.problems {
        match problem.line {
            0 => anstream::println!("\nproblem: {}: {}", problem.file, problem.reason),
            line => anstream::println!("\nproblem: {}:{line}: {}", problem.file, problem.reason),
        }
    }
}

fn print_revoked(revoked: &[String]) {
    for id in revoked.iter().take(REVOKED_SHOWN_MAX) {
        anstream::println!("\nrevoked: {id}");
    }
    if let Some(more) = revoked.len().checked_sub(REVOKED_SHOWN_MAX).filter(|more| *more > 0) {
        anstream::println!("\nrevoked: {more} more; see `tombolo status -o json`");
    }
}

fn print_services(services: &[ServiceRow]) {
    let mut rows = Vec::new();
    for service in services {
        for (index, share) in service.shares.iter().enumerate() {
            let name = if index == 0 { service.service.clone() } else { String::new() };
            let origin = if share.local { "local" } else { share.freshness.as_str() };
            let exported = match (share.local, share.exported) {
                (true, true) => table::list(&share.exported_to),
                (true, false) => "not exported".into(),
                (false, _) => "-".into(),
            };
            let ready = format!("{}/{}", share.ready, share.endpoints);
            rows.push(vec![name, share.cluster.clone(), origin.into(), ready, table::list(&share.ports), exported]);
        }
        for excluded in &service.excluded {
            rows.push(vec![
                String::new(),
                excluded.clone(),
                "left out by the import grant".into(),
                "-".into(),
                "-".into(),
                "-".into(),
            ]);
        }
    }
    table::print(&["service", "cluster", "state", "ready", "ports", "offered to"], rows);
    for service in services.iter().filter(|service| !service.conflicts.is_empty()) {
        anstream::println!("  {}: conflict: {}", service.service, service.conflicts.join(", "));
    }
    for service in services {
        for (port, listen) in service.listeners.iter().collect::<BTreeMap<_, _>>() {
            anstream::println!(
                "  {}:{port}: port {listen} of the gateways, for whoever has no sidecar",
                service.service
            );
        }
    }
}

fn to_json(status: &StatusResponse) -> Value {
    let services: Vec<_> = status
        .services
        .iter()
        .map(|service| {
            let shares: Vec<_> = service
                .shares
                .iter()
                .map(|share| {
                    json!({
                        "cluster": share.cluster,
                        "local": share.local,
                        "freshness": share.freshness,
                        "endpoints": share.endpoints,
                        "ready": share.ready,
                        "ports": share.ports,
                        "exported": share.exported,
                        "exportedTo": share.exported_to,
                        "serverIds": share.server_ids,
                    })
                })
                .collect();
            json!({
                "service": service.service,
                "shares": shares,
                "conflicts": service.conflicts,
                "excluded": service.excluded,
                "listeners": service.listeners.iter().collect::<BTreeMap<_, _>>(),
            })
        })
        .collect();
    let gateways: Vec<_> = status
        .gateways
        .iter()
        .map(|row| {
            json!({
                "gateway": row.gateway_id,
                "connected": row.connected,
                "ingressAddress": row.ingress_address,
                "advertise": row.advertise,
                "unmeshedAddress": row.unmeshed_address,
                "tunnels": row.tunnels.len(),
            })
        })
        .collect();
    let sidecars: Vec<_> = status
        .sidecars
        .iter()
        .map(|row| {
            json!({
                "instance": row.instance,
                "spiffeId": row.spiffe_id,
                "services": row.services,
                "ready": row.ready,
                "registered": row.registered,
            })
        })
        .collect();
    let problems: Vec<_> = status
        .problems
        .iter()
        .map(|problem| json!({ "file": problem.file, "line": problem.line, "reason": problem.reason }))
        .collect();
    json!({
        "cluster": status.cluster,
        "trustDomain": status.trust_domain,
        "version": status.version,
        "epoch": status.epoch,
        "leader": status.leader,
        "rootSha256": status.root_sha256,
        "bundleSequence": status.bundle_sequence,
        "peers": status.peers.iter().map(peer::peer_json).collect::<Vec<_>>(),
        "services": services,
        "gateways": gateways,
        "sidecars": sidecars,
        "problems": problems,
        "revoked": status.revoked,
        "revocationSequence": status.revocation_sequence,
    })
}
