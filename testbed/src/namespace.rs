//! A network namespace without a name. It lives as long as something holds it: this value, a process or a
//! thread inside, a device. So nothing is left behind, whatever ends the process that made it.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use nix::sched::{CloneFlags, setns, unshare};

const OWN: &str = "/proc/thread-self/ns/net";

/// Clones are the same namespace.
#[derive(Debug, Clone)]
pub struct Namespace(Arc<File>);

impl Namespace {
    /// A new one, with nothing in it but its loopback device, up. Needs CAP_SYS_ADMIN and `ip`.
    pub fn new() -> anyhow::Result<Self> {
        // Made by a thread that ends with it, so that this one stays where it is.
        let made = std::thread::spawn(|| -> anyhow::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace (it takes root)")?;
            Ok(File::open(OWN)?)
        });
        let file = made.join().map_err(|_| anyhow!("the thread that makes a network namespace panicked"))??;
        let namespace = Self(Arc::new(file));
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// One that has a name, as `ip netns add` makes them.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        let path = Path::new("/run/netns").join(name);
        let file = File::open(&path).with_context(|| format!("no network namespace {}", path.display()))?;
        Ok(Self(Arc::new(file)))
    }

    /// A path by which `nsenter` and `ip` find it, for as long as this value lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Runs `work` inside. Sockets belong to the namespace in which they were made, and child processes to
    /// that in which they were started; what `work` starts to wait for goes on outside.
    pub fn within<T>(&self, work: impl FnOnce() -> T) -> anyhow::Result<T> {
        let _home = Home(File::open(OWN)?);
        setns(&*self.0, CloneFlags::CLONE_NEWNET).context("entering a network namespace")?;
        Ok(work())
    }

    /// Moves the calling thread inside for good.
    pub fn enter(&self) -> anyhow::Result<()> {
        setns(&*self.0, CloneFlags::CLONE_NEWNET).context("entering a network namespace")
    }

    /// Runs `ip` inside.
    pub fn ip(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let run = || Command::new("ip").args(arguments).stdin(Stdio::null()).output();
        let output = self.within(run)?.context("running `ip` (Debian package iproute2)")?;
        if !output.status.success() {
            bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Takes the thread back to the namespace that it came from, also when what it did there panics.
struct Home(File);

impl Drop for Home {
    fn drop(&mut self) {
        setns(&self.0, CloneFlags::CLONE_NEWNET).expect("a thread may return to the namespace that it came from");
    }
}
