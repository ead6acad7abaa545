//! `tombolo`: one binary, four roles, and the operator's commands.

mod agent;
mod args;
mod capture;
mod demo;
mod inject;
mod operator;
mod role;

use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use clap::Parser;

use args::{Cli, Command, SidecarAction};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.die_with_parent {
        role::die_with_parent();
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let red = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
            anstream::eprintln!("{red}error{red:#}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Federation(start) => role::federation(start),
        Command::Gateway(start) => role::gateway(start),
        Command::Sidecar(command) => match command.action {
            Some(SidecarAction::Capture(command)) => capture::run(*command),
            None => role::sidecar(command.start),
        },
        Command::Agent(start) => agent::run(start),
        Command::Peer(command) => operator::peer::run(command),
        Command::Export(command) => operator::export::export(command),
        Command::Unexport(command) => operator::export::unexport(command),
        Command::Status(command) => operator::status::run(command),
        Command::Check(command) => operator::check::run(command),
        Command::Explain(command) => operator::explain::run(command),
        Command::Join(command) => operator::join::run(command),
        Command::Trust(command) => operator::trust::run(command),
        Command::Backup(command) => operator::backup::backup(&command),
        Command::Restore(command) => operator::backup::restore(&command),
        Command::Crds(command) => operator::crds::run(&command),
        Command::Inject(command) => inject::run(&command),
        Command::Demo(options) => demo::run(options),
        Command::DemoApp(options) => demo::app::run(options),
        Command::Version => {
            println!("tombolo {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}
