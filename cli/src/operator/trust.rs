//! `tombolo trust add-root`.

use tombolo_api::proto::operator::TrustAddRootRequest;

use super::client::{block_on, connect, refused};
use crate::args::TrustCommand;

pub fn run(command: TrustCommand) -> anyhow::Result<()> {
    let TrustCommand::AddRoot(command) = command;
    block_on(async {
        let mut operator = connect(&command.socket.state).await?;
        let answer = operator.trust_add_root(TrustAddRootRequest {}).await.map_err(refused)?.into_inner();
        anstream::println!(
            "root sha256 {} is published with bundle sequence {}",
            answer.root_sha256,
            answer.bundle_sequence
        );
        Ok(())
    })
}
