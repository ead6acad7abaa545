//! `tombolo export` and `tombolo unexport`.

use tombolo_api::proto::operator::{ExportRequest, UnexportRequest};

use super::client::{block_on, connect, refused};
use crate::args::ExportCommand;

pub fn export(command: ExportCommand) -> anyhow::Result<()> {
    block_on(async {
        let mut operator = connect(&command.socket.state).await?;
        let request = ExportRequest { service: command.service.to_string() };
        let answer = operator.export(request).await.map_err(refused)?.into_inner();
        if answer.already {
            anstream::println!("{} is exported already, by {}", command.service, answer.file);
        } else {
            anstream::println!("{} is exported as {}", command.service, command.service.clusterset_name());
            anstream::println!("written to {}", answer.file);
        }
        Ok(())
    })
}

pub fn unexport(command: ExportCommand) -> anyhow::Result<()> {
    block_on(async {
        let mut operator = connect(&command.socket.state).await?;
        let request = UnexportRequest { service: command.service.to_string() };
        let answer = operator.unexport(request).await.map_err(refused)?.into_inner();
        anstream::println!("{} is no longer exported; removed {}", command.service, answer.file);
        Ok(())
    })
}
