//! `tombolo trust add-root | revoke | unrevoke`.

use tombolo_api::proto::operator::{TrustAddRootRequest, TrustRevokeRequest, TrustUnrevokeRequest};

use super::client::{block_on, connect, refused};
use crate::args::{IdentityCommand, SocketOnly, TrustCommand};

pub fn run(command: TrustCommand) -> anyhow::Result<()> {
    match command {
        TrustCommand::AddRoot(command) => block_on(add_root(command)),
        TrustCommand::Revoke(command) => block_on(revoke(command)),
        TrustCommand::Unrevoke(command) => block_on(unrevoke(command)),
    }
}

async fn add_root(command: SocketOnly) -> anyhow::Result<()> {
    let mut operator = connect(&command.socket.state).await?;
    let answer = operator.trust_add_root(TrustAddRootRequest {}).await.map_err(refused)?.into_inner();
    anstream::println!(
        "root sha256 {} is published with bundle sequence {}",
        answer.root_sha256,
        answer.bundle_sequence
    );
    Ok(())
}

async fn revoke(IdentityCommand { spiffe_id, socket }: IdentityCommand) -> anyhow::Result<()> {
    let mut operator = connect(&socket.state).await?;
    let request = TrustRevokeRequest { spiffe_id: spiffe_id.to_string() };
    let answer = operator.trust_revoke(request).await.map_err(refused)?.into_inner();
    let word = if answer.already { "was revoked already" } else { "is revoked" };
    anstream::println!("{spiffe_id} {word} (sequence {})", answer.sequence);
    if answer.join_entries_removed > 0 {
        anstream::println!("{} of its join entries removed", answer.join_entries_removed);
    }
    Ok(())
}

async fn unrevoke(IdentityCommand { spiffe_id, socket }: IdentityCommand) -> anyhow::Result<()> {
    let mut operator = connect(&socket.state).await?;
    let request = TrustUnrevokeRequest { spiffe_id: spiffe_id.to_string() };
    let answer = operator.trust_unrevoke(request).await.map_err(refused)?.into_inner();
    anstream::println!("{spiffe_id} is no longer revoked (sequence {})", answer.sequence);
    anstream::println!("what it holds is valid again; once that has expired it needs a new join token");
    Ok(())
}
