//! `tombolo peer invite | accept | list | remove`.

use std::io::{IsTerminal, Write};

use anyhow::{Context as _, bail};
use serde_json::json;
use tombolo_api::proto::operator::{
    InvitationRow, PeerAcceptRequest, PeerInviteRequest, PeerListRequest, PeerRemoveRequest, PeerRow, TunnelRow,
};
use tombolo_core::model::ServiceSelector;

use super::client::{block_on, connect, refused};
use super::table;
use crate::args::{AcceptCommand, Grants, InviteCommand, Output, PeerCommand, RemoveCommand, StatusCommand};

pub fn run(command: PeerCommand) -> anyhow::Result<()> {
    match command {
        PeerCommand::Invite(command) => block_on(invite(command)),
        PeerCommand::Accept(command) => block_on(accept(command)),
        PeerCommand::List(command) => block_on(list(command)),
        PeerCommand::Remove(command) => block_on(remove(command)),
    }
}

async fn invite(command: InviteCommand) -> anyhow::Result<()> {
    let imports = imports(&command.grants, "the cluster that accepts this invitation")?;
    let mut operator = connect(&command.socket.state).await?;
    let request = PeerInviteRequest {
        life_s: u32::try_from(command.expires.as_secs()).context("--expires is too long")?,
        exports: exports(&command.grants),
        imports,
        addresses: command.addresses,
    };
    let answer = operator.peer_invite(request).await.map_err(refused)?.into_inner();
    if command.output == Output::Json {
        let document = json!({
            "token": answer.token,
            "invitation": answer.invitation_id,
            "expires": table::time(answer.expires_unix_ms),
            "addresses": answer.addresses,
        });
        anstream::println!("{}", serde_json::to_string_pretty(&document)?);
        return Ok(());
    }
    // The token alone on standard output, so that it can be piped; what a person needs beside it.
    anstream::println!("{}", answer.token);
    anstream::eprintln!(
        "One use, until {}. In the other cluster: tombolo peer accept TOKEN\n\
         Treat it as a password: whoever redeems it first is linked. Dialled at: {}",
        table::time(answer.expires_unix_ms),
        table::list(&answer.addresses)
    );
    Ok(())
}

async fn accept(command: AcceptCommand) -> anyhow::Result<()> {
    let token = match command.token.as_str() {
        "-" => std::io::read_to_string(std::io::stdin()).context("reading the token from standard input")?,
        token => token.to_owned(),
    };
    let imports = imports(&command.grants, "the cluster that made this token")?;
    let mut operator = connect(&command.socket.state).await?;
    let request = PeerAcceptRequest { token: token.trim().to_owned(), exports: exports(&command.grants), imports };
    let answer = operator.peer_accept(request).await.map_err(refused)?.into_inner();
    if command.output == Output::Json {
        let document = json!({
            "cluster": answer.cluster,
            "trustDomain": answer.trust_domain,
            "rootSha256": answer.root_sha256,
        });
        anstream::println!("{}", serde_json::to_string_pretty(&document)?);
    } else {
        anstream::println!("linked to {} (trust domain {})", answer.cluster, answer.trust_domain);
        anstream::println!("root sha256 {}", answer.root_sha256);
    }
    Ok(())
}

async fn list(command: StatusCommand) -> anyhow::Result<()> {
    let mut operator = connect(&command.socket.state).await?;
    let answer = operator.peer_list(PeerListRequest {}).await.map_err(refused)?.into_inner();
    if command.output == Output::Json {
        let invitations: Vec<_> = answer
            .invitations
            .iter()
            .map(|row| json!({ "id": row.id, "state": row.state, "expires": table::time(row.expires_unix_ms) }))
            .collect();
        let peers: Vec<_> = answer.peers.iter().map(peer_json).collect();
        anstream::println!("{}", serde_json::to_string_pretty(&json!({ "peers": peers, "invitations": invitations }))?);
        return Ok(());
    }
    print_peers(&answer.peers);
    print_invitations(&answer.invitations);
    Ok(())
}

async fn remove(command: RemoveCommand) -> anyhow::Result<()> {
    let mut operator = connect(&command.socket.state).await?;
    let request = PeerRemoveRequest { cluster: command.cluster.to_string() };
    operator.peer_remove(request).await.map_err(refused)?;
    anstream::println!("unlinked from {}: its tunnels are closed and its services withdrawn", command.cluster);
    Ok(())
}

fn exports(grants: &Grants) -> Vec<String> {
    let given = || grants.exports.iter().map(ToString::to_string).collect();
    if grants.exports.is_empty() { vec!["*".to_owned()] } else { given() }
}

/// What the peer may bring in. Nobody is granted anything by accident: without the flag a person is
/// asked, and a script is refused.
fn imports(grants: &Grants, who: &str) -> anyhow::Result<Vec<String>> {
    let words = if !grants.imports.is_empty() {
        grants.imports.clone()
    } else if std::io::stdin().is_terminal() {
        ask_imports(who)?
    } else {
        bail!(
            "--imports is required without a terminal: it says what the peer may bring in \
             (`--imports 'shop/*'`, `--imports '*'`, or `--imports none`)"
        );
    };
    if words == ["none"] {
        return Ok(Vec::new());
    }
    words
        .iter()
        .map(|word| Ok(word.parse::<ServiceSelector>().with_context(|| format!("--imports {word:?}"))?.to_string()))
        .collect()
}

fn ask_imports(who: &str) -> anyhow::Result<Vec<String>> {
    anstream::eprint!("Which services may {who} bring in? (`*`, `shop/*`, `shop/web`, several with commas) [none]: ");
    std::io::stderr().flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let words: Vec<String> =
        line.split(',').map(|word| word.trim().to_owned()).filter(|word| !word.is_empty()).collect();
    Ok(if words.is_empty() { vec!["none".to_owned()] } else { words })
}

pub fn print_peers(peers: &[PeerRow]) {
    if peers.is_empty() {
        anstream::println!("no peers; link one with `tombolo peer invite` here and `tombolo peer accept` there");
        return;
    }
    let header = ["peer", "sync", "last word", "tunnel", "rtt", "offered", "may bring in", "trust domain"];
    table::print(&header, peers.iter().map(peer_cells));
    for peer in peers.iter().filter(|peer| !peer.last_refusal.is_empty()) {
        anstream::println!("  {}: refused: {}", peer.cluster, peer.last_refusal);
    }
    for peer in peers.iter().filter(|peer| !peer.refused_there.is_empty()) {
        anstream::println!("  {}: refused there: {}", peer.cluster, peer.refused_there);
    }
}

fn peer_cells(peer: &PeerRow) -> Vec<String> {
    let best = peer.tunnels.iter().find(|tunnel| tunnel.reach == "up").or(peer.tunnels.first());
    let (reach, rtt) = match best {
        Some(tunnel) if tunnel.reach == "up" => (with_error(tunnel), table::millis(tunnel.rtt_us)),
        Some(tunnel) if !tunnel.last_error.is_empty() => (with_error(tunnel), "-".into()),
        Some(tunnel) => (tunnel.reach.clone(), "-".into()),
        None => ("none".into(), "-".into()),
    };
    vec![
        peer.cluster.clone(),
        peer.sync.clone(),
        table::ago(peer.silent_ms),
        reach,
        rtt,
        table::list(&peer.exports),
        table::list(&peer.imports),
        peer.trust_domain.clone(),
    ]
}

/// A tunnel that is up has an error while another one is dialled where its gateway moved to.
fn with_error(tunnel: &TunnelRow) -> String {
    match tunnel.last_error.as_str() {
        "" => tunnel.reach.clone(),
        error => format!("{} ({error})", tunnel.reach),
    }
}

fn print_invitations(invitations: &[InvitationRow]) {
    if invitations.is_empty() {
        return;
    }
    anstream::println!();
    let rows = invitations.iter().map(|row| vec![row.id.clone(), row.state.clone(), table::time(row.expires_unix_ms)]);
    table::print(&["invitation", "state", "expires"], rows);
}

pub fn peer_json(peer: &PeerRow) -> serde_json::Value {
    let tunnels: Vec<_> = peer
        .tunnels
        .iter()
        .map(|tunnel| {
            json!({
                "gateway": tunnel.gateway_id,
                "remoteGateway": tunnel.remote_gateway_id,
                "reach": tunnel.reach,
                "rttUs": tunnel.rtt_us,
                "remoteAddress": tunnel.remote_address,
                "dialledHere": tunnel.dialled_here,
                "legs": tunnel.legs,
                "lastError": tunnel.last_error,
                "resolved": tunnel.resolved,
            })
        })
        .collect();
    json!({
        "cluster": peer.cluster,
        "trustDomain": peer.trust_domain,
        "exports": peer.exports,
        "imports": peer.imports,
        "sync": peer.sync,
        "epoch": peer.epoch,
        "revision": peer.revision,
        "silentMs": peer.silent_ms,
        "bundleSequence": peer.bundle_sequence,
        "gateways": peer.gateways,
        "tunnels": tunnels,
        "lastRefusal": peer.last_refusal,
        "refusedThere": peer.refused_there,
    })
}
