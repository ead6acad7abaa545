//! `tombolo backup` and `tombolo restore`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use jiff::Timestamp;
use tombolo_federation::backup;
use tombolo_trust::atomic;

use crate::args::{BackupCommand, RestoreCommand};

pub fn backup(BackupCommand { file, socket }: &BackupCommand) -> anyhow::Result<()> {
    let state = federation_in(&socket.state);
    let octets = backup::backup(&state, Timestamp::now())?;
    let unwritten = || format!("{} can't be written; choose another file", file.display());
    anyhow::ensure!(!file.exists(), "{} exists; a backup overwrites nothing", file.display());
    atomic::write_private(file, &octets).with_context(unwritten)?;
    anstream::println!("{} holds the private keys of this cluster: keep it as safe as they are", file.display());
    Ok(())
}

pub fn restore(RestoreCommand { file, state }: &RestoreCommand) -> anyhow::Result<()> {
    let restored = backup::restore(state, file)?;
    let (state, created) = (state.display(), restored.created);
    anstream::println!("{state} is as it was at {created}; start the federation");
    anstream::println!("peers keep what was revoked since; peerings and join tokens made since are lost");
    Ok(())
}

/// An agent keeps the federation's state in a folder of its own.
fn federation_in(state: &Path) -> PathBuf {
    let inside = state.join("federation");
    if inside.join("ca.json").is_file() { inside } else { state.to_owned() }
}
