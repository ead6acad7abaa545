//! Side-by-side measurements: `bench/run NAME` builds everything and calls this.

mod app;
mod apps;
mod chain;
mod compare;
mod demo;
mod envoy;
mod failover;
mod growth;
mod host;
mod layout;
mod load;
mod memory;
mod mesh;
mod pair;
mod report;
mod stall;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[derive(Debug, Parser)]
#[command(about = "Measures tombolo beside its peers; called by bench/run")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Throughput, CPU, tail and new connections across two clusters, beside Envoy.
    Chain(Given),
    /// Throughput, CPU, tail and new connections between two sidecars of one cluster, beside Envoy.
    Pair(Given),
    /// Resident memory of each role, idle and with a thousand connections.
    Memory(Given),
    /// Requests that fail while an application, a sidecar, a gateway, a link or a cluster does.
    Failover(Given),
    /// Time from the demo's start to its first crossing request.
    Demo(Given),
    /// What 200 clients that stop reading do to the others.
    Stall(Given),
    /// Which functions run, as a linker script; called by bench/layout.
    #[command(hide = true)]
    Layout(layout::Given),
    /// The application behind the proxies.
    #[command(hide = true)]
    App {
        #[arg(long)]
        name: String,
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        announce: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Given {
    /// The tombolo binary; without it only the peers are measured.
    #[arg(long)]
    tombolo: Option<PathBuf>,
    /// Jaeger, which takes the traces of `pair`.
    #[arg(long)]
    jaeger: Option<PathBuf>,
    /// The Envoy binary.
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Runs of each system.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Length of each measurement.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Where `<name>.json` is written.
    #[arg(long, default_value = "bench/results")]
    results: PathBuf,
    /// Only this part of the bench.
    #[arg(long)]
    only: Option<String>,
    /// Times that each fault happens in `failover`.
    #[arg(long)]
    faults: Option<usize>,
}

/// What a bench works with.
struct Options {
    tombolo: Option<PathBuf>,
    jaeger: Option<PathBuf>,
    envoy: PathBuf,
    runs: usize,
    seconds: u64,
    results: PathBuf,
    only: Option<String>,
    faults: Option<usize>,
}

impl Options {
    fn from(given: Given) -> anyhow::Result<Self> {
        Ok(Self {
            tombolo: given.tombolo,
            jaeger: given.jaeger,
            envoy: envoy::binary(given.envoy)?,
            runs: given.runs,
            seconds: given.seconds,
            results: given.results,
            only: given.only,
            faults: given.faults,
        })
    }

    fn versions(&self) -> anyhow::Result<BTreeMap<&'static str, String>> {
        let mut versions = BTreeMap::from([("envoy", envoy::version(&self.envoy)?)]);
        versions.insert("tombolo", env!("CARGO_PKG_VERSION").to_owned());
        Ok(versions)
    }
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    // A thousand connections need more descriptors than the usual soft limit; children inherit it.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    // One thread: the generator needs no more, and children end with the thread that started them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match cli.command {
            Command::Chain(given) => chain::run(&Options::from(given)?).await,
            Command::Pair(given) => pair::run(&Options::from(given)?).await,
            Command::Memory(given) => memory::run(&Options::from(given)?).await,
            Command::Failover(given) => failover::run(&Options::from(given)?).await,
            Command::Demo(given) => demo::run(&Options::from(given)?).await,
            Command::Stall(given) => stall::run(&Options::from(given)?).await,
            Command::Layout(given) => layout::run(&given).await,
            Command::App { name, listen, announce } => app::run(name, listen, &announce).await,
        }
    })
}
