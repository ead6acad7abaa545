//! The command line, as `--help` shows it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use tombolo_core::capture::{Cgroup, Interface, parse_range};
use tombolo_core::id::{ClusterId, ServiceName, SpiffeId, TrustDomain};
use tombolo_core::model::ServiceSelector;

/// Ties Kubernetes clusters, clouds and plain machines into one service network.
#[derive(Parser)]
#[command(name = "tombolo", version, max_term_width = 110, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    /// End this process when its parent ends.
    #[arg(long, global = true, hide = true)]
    pub die_with_parent: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// Two clusters on this machine: a request crosses, the local app dies, traffic fails over and returns
    Demo(DemoOptions),
    /// Link this cluster to another one: invite, accept, list, remove
    #[command(subcommand)]
    Peer(PeerCommand),
    /// Export a service to the peers of this cluster
    Export(ExportCommand),
    /// Take an export back that `tombolo export` made
    Unexport(ExportCommand),
    /// Show peers, tunnels, services, gateways and sidecars of this cluster
    Status(StatusCommand),
    /// Look for what is wrong with this cluster, or would be with a role that is to be started; each finding with its fix
    Check(CheckCommand),
    /// Show which way a request would take now, and why not another one; asks a running sidecar
    Explain(ExplainCommand),
    /// Let a sidecar or gateway join this cluster: add, list, remove join entries
    #[command(subcommand)]
    Join(JoinCommand),
    /// Manage this cluster's own trust domain: add a root, revoke an identity
    #[command(subcommand)]
    Trust(TrustCommand),
    /// Write everything of this cluster's federation that can't be had again into one file; it may be running
    Backup(BackupCommand),
    /// Put a backup's content into an empty state directory or namespace
    Restore(RestoreCommand),
    /// Print the CustomResourceDefinitions of every kind that tombolo brings along, for `kubectl apply -f -`
    Crds(CrdsCommand),
    /// Give the Pods of a file of Kubernetes manifests their sidecars, as the admission webhook does
    Inject(InjectCommand),
    /// Run the federation service: catalogue, trust, peer sync
    Federation(StartRole),
    /// Run an east-west gateway: QUIC tunnels to other clusters
    Gateway(StartRole),
    /// Run a sidecar beside a workload, or hand it the connections of this host: capture
    Sidecar(SidecarCommand),
    /// Run all three in one process: a VM or laptop as a small cluster of its own
    Agent(StartRole),
    /// Print the version
    Version,
    /// The application that the demo puts behind its sidecars
    #[command(hide = true)]
    DemoApp(DemoAppOptions),
}

/// How a role is started: one YAML file, flags, or both (a flag wins over the file).
#[derive(Args)]
pub struct StartRole {
    /// YAML file with the role's configuration
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Set one field, by its path in the file: `--set admin=127.0.0.1:0 --set limits.legs=500`
    #[arg(long = "set", value_name = "FIELD=VALUE", value_parser = parse_set)]
    pub set: Vec<(String, String)>,

    /// Directory for keys and state
    #[arg(long, env = "TOMBOLO_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// Validate the configuration, print what is wrong with it, and stop
    #[arg(long)]
    pub check_config: bool,

    /// Worker threads [default: as many as the CPU limit (cgroup v2 cpu.max) allows, 1 without a limit]
    #[arg(long, env = "TOMBOLO_WORKERS", value_name = "N")]
    pub workers: Option<usize>,
}

impl StartRole {
    pub fn worker_count(&self) -> usize {
        self.workers.unwrap_or_else(tombolo_runtime::workers::from_cpu_limit)
    }
}

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct SidecarCommand {
    #[command(flatten)]
    pub start: StartRole,

    #[command(subcommand)]
    pub action: Option<SidecarAction>,
}

#[derive(Subcommand)]
pub enum SidecarAction {
    /// Redirect this host's connections to the sidecar, by rules of the kernel's packet filter (docs/capture.md)
    Capture(Box<CaptureCommand>),
}

/// Every option that excludes can be given several times, or with commas.
#[derive(Args)]
pub struct CaptureCommand {
    /// Take the rules away, of whichever backend wrote them
    #[arg(long)]
    pub remove: bool,

    /// Print the rules and change nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Who writes the rules [default: nft]
    #[arg(long, value_enum)]
    pub backend: Option<Backend>,

    /// Capture only what processes of this host begin, or only what arrives at it
    #[arg(long, value_enum)]
    pub only: Option<Direction>,

    /// Capture DNS queries too (UDP and TCP, port 53)
    #[arg(long)]
    pub dns: bool,

    /// Where the sidecar takes captured outbound connections
    #[arg(long, default_value_t = tombolo_sidecar::capture::OUTBOUND_PORT, value_name = "PORT")]
    pub outbound_port: u16,

    /// Where the sidecar takes captured inbound connections
    #[arg(long, default_value_t = tombolo_sidecar::capture::INBOUND_PORT, value_name = "PORT")]
    pub inbound_port: u16,

    /// Where the sidecar answers DNS queries
    #[arg(long, default_value_t = tombolo_sidecar::capture::DNS_PORT, value_name = "PORT")]
    pub dns_port: u16,

    /// Ports of the sidecar itself, which inbound connections reach as they are
    #[arg(long, value_delimiter = ',', default_values_t = tombolo_sidecar::capture::OWN_PORTS, value_name = "PORT")]
    pub sidecar_port: Vec<u16>,

    /// Leave connections of this user alone, by number or name: the one that the sidecar runs as
    #[arg(long, value_delimiter = ',', value_parser = parse_user, value_name = "USER")]
    pub exclude_uid: Vec<u32>,

    /// Leave connections of this group alone, by number or name
    #[arg(long, value_delimiter = ',', value_parser = parse_group, value_name = "GROUP")]
    pub exclude_gid: Vec<u32>,

    /// Leave connections of this cgroup (version 2) alone: system.slice/tombolo.service
    #[arg(long, value_delimiter = ',', value_name = "PATH")]
    pub exclude_cgroup: Vec<Cgroup>,

    /// Leave what leaves or arrives by this interface alone: docker0, veth*
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub exclude_interface: Vec<Interface>,

    /// Leave connections to these addresses alone: 10.0.0.0/8, fd00::/8
    #[arg(long, value_delimiter = ',', value_parser = parse_range, value_name = "RANGE")]
    pub exclude_outbound_range: Vec<IpNet>,

    /// Leave connections to this port alone
    #[arg(long, value_delimiter = ',', value_name = "PORT")]
    pub exclude_outbound_port: Vec<u16>,

    /// Leave connections from these addresses alone
    #[arg(long, value_delimiter = ',', value_parser = parse_range, value_name = "RANGE")]
    pub exclude_inbound_range: Vec<IpNet>,

    /// Leave connections that arrive at this port alone: health checks of somebody else, say
    #[arg(long, value_delimiter = ',', value_name = "PORT")]
    pub exclude_inbound_port: Vec<u16>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    #[default]
    Nft,
    Iptables,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Direction {
    Outbound,
    Inbound,
}

fn parse_user(text: &str) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    let user = nix::unistd::User::from_name(text).map_err(|error| error.to_string())?;
    user.map(|user| user.uid.as_raw()).ok_or_else(|| format!("this host knows no user {text:?}"))
}

fn parse_group(text: &str) -> Result<u32, String> {
    if let Ok(gid) = text.parse() {
        return Ok(gid);
    }
    let group = nix::unistd::Group::from_name(text).map_err(|error| error.to_string())?;
    group.map(|group| group.gid.as_raw()).ok_or_else(|| format!("this host knows no group {text:?}"))
}

fn parse_set(text: &str) -> Result<(String, String), String> {
    let (field, value) = text.split_once('=').ok_or("write FIELD=VALUE")?;
    Ok((field.to_owned(), value.to_owned()))
}

fn parse_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// Where the federation of this cluster listens for its operator.
#[derive(Args)]
pub struct Socket {
    /// State directory of the federation, or of the agent; the operator socket is in there
    #[arg(long, env = "TOMBOLO_STATE", default_value = "/var/lib/tombolo", value_name = "DIR")]
    pub state: PathBuf,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Tables for a person
    #[default]
    Table,
    /// One JSON document
    Json,
}

#[derive(Subcommand)]
pub enum PeerCommand {
    /// Print a one-time token with which another cluster can link itself to this one
    Invite(InviteCommand),
    /// Link this cluster to the one that made the token
    Accept(AcceptCommand),
    /// List linked clusters and open invitations
    List(StatusCommand),
    /// Unlink a cluster: close its tunnels and withdraw its services, at once
    Remove(RemoveCommand),
}

/// What this cluster grants the other one.
#[derive(Args)]
pub struct Grants {
    /// What the peer is offered, among what is exported: `*`, `shop/*`, `shop/web` [default: *]
    #[arg(long, value_name = "SELECTOR", value_delimiter = ',')]
    pub exports: Vec<ServiceSelector>,

    /// What the peer may bring in: `shop/*`, `shop/web`, `*`, or `none`; asked for when not given
    #[arg(long, value_name = "SELECTOR", value_delimiter = ',')]
    pub imports: Vec<String>,
}

#[derive(Args)]
pub struct InviteCommand {
    #[command(flatten)]
    pub grants: Grants,

    /// How long the token can be used
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub expires: Duration,

    /// Address of a gateway of this cluster as the other one can reach it (host:port) [default: what the gateways advertise]
    #[arg(long = "address", value_name = "HOST:PORT")]
    pub addresses: Vec<String>,

    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,

    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Args)]
pub struct AcceptCommand {
    /// The token that `tombolo peer invite` printed; `-` reads it from standard input
    pub token: String,

    #[command(flatten)]
    pub grants: Grants,

    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,

    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Args)]
pub struct RemoveCommand {
    /// The cluster to unlink
    pub cluster: ClusterId,

    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Args)]
pub struct ExportCommand {
    /// The service: `web.shop` or `shop/web`
    pub service: ServiceName,

    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Args)]
pub struct StatusCommand {
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,

    #[command(flatten)]
    pub socket: Socket,
}

/// Without a role's configuration, the running cluster is looked at.
#[derive(Args)]
pub struct CheckCommand {
    /// Before it runs: the configuration of a federation
    #[arg(long, value_name = "FILE")]
    pub federation: Option<PathBuf>,

    /// Before it runs: the configuration of a gateway
    #[arg(long, value_name = "FILE")]
    pub gateway: Option<PathBuf>,

    /// Before it runs: the configuration of a sidecar
    #[arg(long, value_name = "FILE")]
    pub sidecar: Option<PathBuf>,

    /// Print the CoreDNS configuration that forwards clusterset.local to the federation, and check nothing
    #[arg(long)]
    pub fix_dns: bool,

    /// Where CoreDNS reaches the federation's DNS server [default: where that listens]
    #[arg(long, value_name = "ADDR", requires = "fix_dns")]
    pub dns_server: Option<SocketAddr>,

    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,

    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Args)]
pub struct ExplainCommand {
    /// The request: `http://web.shop.svc.clusterset.local/cart` (`https://` for what is carried as it is)
    pub url: String,

    /// Who calls, as namespace/service-account or spiffe://...; the sidecar that is asked must be its own, or deliver
    /// the service [default: the sidecar's own identity]
    #[arg(long, value_name = "IDENTITY")]
    pub from: Option<String>,

    /// The request's method
    #[arg(long, default_value = "GET", value_name = "METHOD")]
    pub method: String,

    /// A header of the request; can be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_header)]
    pub header: Vec<(String, String)>,

    /// Admin address of the sidecar beside the caller
    #[arg(long, env = "TOMBOLO_ADMIN", default_value = "127.0.0.1:15020", value_name = "ADDR")]
    pub admin: SocketAddr,

    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,
}

#[derive(Subcommand)]
pub enum JoinCommand {
    /// Print a join token for one identity
    Add(JoinAddCommand),
    /// List join entries
    List(StatusCommand),
    /// Remove a join entry; identities issued by it stay until they expire
    Remove(JoinRemoveCommand),
}

#[derive(Args)]
#[group(skip)]
pub struct JoinAddCommand {
    /// A workload, as namespace/service-account
    #[arg(long, value_name = "NAMESPACE/ACCOUNT", required_unless_present = "gateway", conflicts_with = "gateway")]
    pub workload: Option<String>,

    /// A gateway, by its id
    #[arg(long, value_name = "ID")]
    pub gateway: Option<String>,

    /// How many different keys may redeem the token
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub uses: u32,

    /// How long the token can be redeemed
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub expires: Duration,

    /// Write the token to this file (0600) instead of printing it
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,

    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Args)]
pub struct JoinRemoveCommand {
    /// The entry, as `tombolo join list` shows it
    pub entry: String,

    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Subcommand)]
pub enum TrustCommand {
    /// Make a new root and publish it beside the present one, to peers too
    AddRoot(SocketOnly),
    /// Refuse an identity of this cluster from now on, here and at every peer, and close what it has open
    Revoke(IdentityCommand),
    /// Take a revocation back
    Unrevoke(IdentityCommand),
}

#[derive(Args)]
pub struct IdentityCommand {
    /// The identity, as `tombolo status` shows it: spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT
    pub spiffe_id: SpiffeId,

    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Args)]
pub struct SocketOnly {
    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Args)]
pub struct BackupCommand {
    /// The file to write (0600); it holds private keys
    pub file: PathBuf,

    #[command(flatten)]
    pub kept: Kept,
}

#[derive(Args)]
pub struct RestoreCommand {
    /// What `tombolo backup` wrote
    pub file: PathBuf,

    #[command(flatten)]
    pub kept: Kept,
}

/// Where a federation's state is.
#[derive(Args)]
pub struct Kept {
    /// The federation's state directory; /var/lib/tombolo for a backup unless something is said
    #[arg(long, env = "TOMBOLO_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// The configuration of a federation with `store: kubernetes`, in the place of a state directory
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Args)]
pub struct CrdsCommand {
    /// Only those of one API group: `tombolo.dev` where the cluster has the Multi-Cluster Services API already
    #[arg(long, value_name = "GROUP")]
    pub group: Option<String>,
}

#[derive(Args)]
pub struct InjectCommand {
    /// YAML file with Deployments, StatefulSets, DaemonSets, Jobs, CronJobs or Pods; `-` for standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Image with the tombolo binary
    #[arg(long, value_name = "IMAGE")]
    pub image: String,

    /// Image of the container that writes the packet filter's rules: tombolo and nft [default: the same]
    #[arg(long, value_name = "IMAGE")]
    pub capture_image: Option<String>,

    /// Where Pods reach the federation's discovery
    #[arg(long, default_value = "tombolo-federation.tombolo-system.svc:15010", value_name = "HOST:PORT")]
    pub federation: String,

    /// Trust domain of the cluster: whom the Pods' tokens are for
    #[arg(long, value_name = "DOMAIN")]
    pub trust_domain: TrustDomain,

    /// Namespace of objects that name none
    #[arg(long, short, value_name = "NAMESPACE")]
    pub namespace: Option<String>,

    /// What namespaces enforce that are not in the file (Pod Security Standards)
    #[arg(long, value_enum, default_value_t = SecurityLevel::Privileged)]
    pub pod_security: SecurityLevel,

    /// The cluster's DNS servers, for Pods that ask their sidecar alone (tombolo.dev/capture: dns)
    #[arg(long, value_delimiter = ',', value_name = "ADDRESS")]
    pub cluster_dns: Vec<IpAddr>,

    /// Domain of the cluster's own names
    #[arg(long, default_value = "cluster.local", value_name = "DOMAIN")]
    pub cluster_domain: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SecurityLevel {
    Privileged,
    Baseline,
    Restricted,
}

#[derive(Args)]
pub struct DemoOptions {
    /// Run the script once, clean up, and exit 0 only if every step really happened
    #[arg(long)]
    pub once: bool,

    /// Keep the configurations, states and logs of the run, and say where they are
    #[arg(long)]
    pub keep: bool,

    /// UDP port of the first cluster's tunnel; 0 picks a free one
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    pub tunnel_port: u16,

    /// Send traces of every process to this OTLP/gRPC endpoint
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,
}

#[derive(Args)]
pub struct DemoAppOptions {
    /// Where to listen
    #[arg(long)]
    pub listen: SocketAddr,

    /// What it answers with
    #[arg(long)]
    pub name: String,

    /// Where to write the address that it listens on
    #[arg(long)]
    pub announce: PathBuf,
}
