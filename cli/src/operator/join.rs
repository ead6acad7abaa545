//! `tombolo join add | list | remove`: how sidecars and gateways get their first identity.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Context as _;
use serde_json::json;
use tombolo_api::proto::operator::{JoinAddRequest, JoinListRequest, JoinRemoveRequest};
use tombolo_core::id::Role;

use super::client::{block_on, connect, refused};
use super::table;
use crate::args::{JoinAddCommand, JoinCommand, JoinRemoveCommand, Output, StatusCommand};

pub fn run(command: JoinCommand) -> anyhow::Result<()> {
    match command {
        JoinCommand::Add(command) => block_on(add(command)),
        JoinCommand::List(command) => block_on(list(command)),
        JoinCommand::Remove(command) => block_on(remove(command)),
    }
}

async fn add(command: JoinAddCommand) -> anyhow::Result<()> {
    let workload = match &command.workload {
        Some(text) => {
            let (namespace, account) = text.split_once('/').context("--workload: write namespace/service-account")?;
            format!("ns/{namespace}/sa/{account}")
        }
        None => String::new(),
    };
    let role = if command.gateway.is_some() { Role::Gateway.to_string() } else { String::new() };
    let request = JoinAddRequest {
        workload,
        role,
        instance: command.gateway.unwrap_or_default(),
        uses: command.uses,
        life_s: u32::try_from(command.expires.as_secs()).context("--expires is too long")?,
    };
    let mut operator = connect(&command.socket.state).await?;
    let answer = operator.join_add(request).await.map_err(refused)?.into_inner();
    match &command.out {
        Some(path) => {
            write_token(path, &answer.token)?;
            anstream::eprintln!("join token for {} written to {}", answer.spiffe_id, path.display());
        }
        None => anstream::println!("{}", answer.token),
    }
    anstream::eprintln!("{}: {} use(s), until {}", answer.spiffe_id, command.uses, table::time(answer.expires_unix_ms));
    Ok(())
}

/// Writes a token where only its owner can read it.
pub fn write_token(path: &Path, token: &str) -> anyhow::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("writing the token to {}", path.display()))?;
    writeln!(file, "{token}").with_context(|| format!("writing the token to {}", path.display()))
}

async fn list(command: StatusCommand) -> anyhow::Result<()> {
    let mut operator = connect(&command.socket.state).await?;
    let answer = operator.join_list(JoinListRequest {}).await.map_err(refused)?.into_inner();
    if command.output == Output::Json {
        let entries: Vec<_> = answer
            .entries
            .iter()
            .map(|row| {
                json!({
                    "entry": row.entry_id,
                    "spiffeId": row.spiffe_id,
                    "usesLeft": row.uses_left,
                    "expires": table::time(row.expires_unix_ms),
                })
            })
            .collect();
        anstream::println!("{}", serde_json::to_string_pretty(&entries)?);
        return Ok(());
    }
    let rows = answer.entries.iter().map(|row| {
        vec![row.entry_id.clone(), row.spiffe_id.clone(), row.uses_left.to_string(), table::time(row.expires_unix_ms)]
    });
    table::print(&["entry", "identity", "uses left", "expires"], rows);
    Ok(())
}

async fn remove(command: JoinRemoveCommand) -> anyhow::Result<()> {
    let mut operator = connect(&command.socket.state).await?;
    operator.join_remove(JoinRemoveRequest { entry_id: command.entry.clone() }).await.map_err(refused)?;
    anstream::println!("removed {}", command.entry);
    Ok(())
}
