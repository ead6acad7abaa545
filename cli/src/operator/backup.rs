//! `tombolo backup` and `tombolo restore`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use jiff::Timestamp;
use tombolo_federation::Config;
use tombolo_federation::backup::{self, Restored};
use tombolo_federation::store::objects::Objects;
use tombolo_runtime::config;
use tombolo_trust::atomic;

use crate::args::{BackupCommand, Kept, RestoreCommand};

pub fn backup(BackupCommand { file, kept }: &BackupCommand) -> anyhow::Result<()> {
    let octets = match kept {
        Kept { config: Some(config), .. } => {
            with_objects(config, |objects| Ok(backup::backup_objects(&objects, Timestamp::now())?))?
        }
        Kept { state, config: None } => {
            let state = state.as_deref().unwrap_or(Path::new("/var/lib/tombolo"));
            backup::backup(&federation_in(state), Timestamp::now())?
        }
    };
    let unwritten = || format!("{} can't be written; choose another file", file.display());
    anyhow::ensure!(!file.exists(), "{} exists; a backup overwrites nothing", file.display());
    atomic::write_private(file, &octets).with_context(unwritten)?;
    anstream::println!("{} holds the private keys of this cluster: keep it as safe as they are", file.display());
    Ok(())
}

pub fn restore(RestoreCommand { file, kept }: &RestoreCommand) -> anyhow::Result<()> {
    let (place, Restored { created, .. }) = match kept {
        Kept { config: Some(config), .. } => {
            let file = file.clone();
            with_objects(config, move |objects| {
                let restored = backup::restore_objects(&objects, &file, Timestamp::now())?;
                Ok((objects.whole(), restored))
            })?
        }
        Kept { state: Some(state), config: None } => (state.display().to_string(), backup::restore(state, file)?),
        Kept { state: None, config: None } => anyhow::bail!("say where to: --state DIR, or --config FILE"),
    };
    anstream::println!("{place} is as it was at {created}; start the federation");
    anstream::println!("peers keep what was revoked since; peerings and join tokens made since are lost");
    Ok(())
}

/// Works with the objects of a federation on a thread that may wait for the API server.
fn with_objects<T: Send + 'static>(
    file: &Path,
    work: impl FnOnce(Objects) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let config: Config = config::load(file)?;
    tombolo_runtime::block_on(1, async move {
        let objects = backup::objects_of(&config).await?;
        tokio::task::spawn_blocking(move || work(objects)).await.context("the command panicked")?
    })?
}

/// An agent keeps the federation's state in a folder of its own.
fn federation_in(state: &Path) -> PathBuf {
    let inside = state.join("federation");
    if inside.join("ca.json").is_file() { inside } else { state.to_owned() }
}
