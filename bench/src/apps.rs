//! Starts the application of [`crate::app`] as a process of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running application. Dropping it kills it.
pub struct App {
    name: String,
    announce: PathBuf,
    pub address: SocketAddr,
    process: Child,
}

impl App {
    pub async fn start(name: &str, folder: &std::path::Path) -> anyhow::Result<Self> {
        let announce = folder.join(format!("app-{name}"));
        let listen = (std::net::Ipv4Addr::LOCALHOST, 0).into();
        let (process, address) = launch(name, listen, &announce).await?;
        Ok(Self { name: name.to_owned(), announce, address, process })
    }

    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        kill(Pid::from_raw(i32::try_from(self.process.id())?), signal)?;
        Ok(())
    }

    /// Ends the process the way a crash does.
    pub fn crash(&mut self) -> anyhow::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Starts it again at the address it had.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        (self.process, _) = launch(&self.name, self.address, &self.announce).await?;
        Ok(())
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn launch(name: &str, listen: SocketAddr, announce: &PathBuf) -> anyhow::Result<(Child, SocketAddr)> {
    let _ = std::fs::remove_file(announce);
    let mut process = Command::new(std::env::current_exe()?)
        .args(["app", "--name", name, "--listen", &listen.to_string(), "--announce"])
        .arg(announce)
        .stdin(Stdio::null())
        .spawn()
        .context("starting the application")?;
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(address) = std::fs::read_to_string(announce).ok().and_then(|text| text.parse().ok()) {
            return Ok((process, address));
        }
        if let Some(status) = process.try_wait()? {
            bail!("the application ended with {status}");
        }
        if Instant::now() > deadline {
            bail!("the application did not start");
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
