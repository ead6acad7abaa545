//! A real Kubernetes control plane on loopback: etcd, kube-apiserver and, where a test needs it,
//! kube-controller-manager, with certificates of their own and all files in one directory. No node, no container.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::Signal;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::process::Process;

/// How long the API server may take to be ready.
const START_TIME_MAX: Duration = Duration::from_secs(60);
/// Ports are taken from below those that the kernel gives to whoever asks for any.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
const SERVICE_RANGE: &str = "10.96.0.0/16";

/// The programs of a control plane.
#[derive(Debug, Clone)]
pub struct Programs {
    etcd: PathBuf,
    apiserver: PathBuf,
    controller_manager: PathBuf,
    kubectl: PathBuf,
}

impl Programs {
    /// From variables (`ETCD_BIN`, `KUBE_APISERVER_BIN`, `KUBE_CONTROLLER_MANAGER_BIN`, `KUBECTL_BIN`), the folder
    /// that `KUBEBUILDER_ASSETS` names, or `built`. The error names what is missing.
    pub fn find(built: &Path) -> Result<Self, String> {
        let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
        let folders: Vec<&Path> = assets.iter().map(PathBuf::as_path).chain([built]).collect();
        let find = |variable: &str, name: &str| {
            let named = std::env::var_os(variable).map(PathBuf::from);
            let candidates = named.into_iter().chain(folders.iter().map(|folder| folder.join(name)));
            let found = candidates.into_iter().find(|path| path.is_file());
            found.ok_or_else(|| {
                format!("{name} ({variable}, KUBEBUILDER_ASSETS, or testbed/tools/install builds it with Go)")
            })
        };
        Ok(Self {
            etcd: find("ETCD_BIN", "etcd")?,
            apiserver: find("KUBE_APISERVER_BIN", "kube-apiserver")?,
            controller_manager: find("KUBE_CONTROLLER_MANAGER_BIN", "kube-controller-manager")?,
            kubectl: find("KUBECTL_BIN", "kubectl")?,
        })
    }
}

/// A running control plane. Dropping it kills its processes.
pub struct ControlPlane {
    programs: Programs,
    dir: PathBuf,
    address: SocketAddr,
    etcd: Process,
    apiserver: Option<Process>,
    controller_manager: Option<Process>,
}

impl ControlPlane {
    /// Starts etcd and the API server with all files below `dir`, and waits until the API server is ready.
    pub async fn start(programs: Programs, dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        write_certificates(dir)?;
        let socket = format!("unix://{}", dir.join("etcd.sock").display());
        let peers = format!("unix://{}", dir.join("peers.sock").display());
        let data = dir.join("etcd-data").display().to_string();
        let arguments = [
            "--name=etcd",
            &format!("--data-dir={data}"),
            &format!("--listen-client-urls={socket}"),
            &format!("--advertise-client-urls={socket}"),
            &format!("--listen-peer-urls={peers}"),
            &format!("--initial-advertise-peer-urls={peers}"),
            &format!("--initial-cluster=etcd={peers}"),
            // Nothing here outlives its machine's next breath.
            "--unsafe-no-fsync",
            "--log-level=warn",
        ];
        let etcd = start_program(&programs.etcd, "etcd", dir, &arguments)?;
        let mut plane =
            Self { programs, dir: dir.to_owned(), address, etcd, apiserver: None, controller_manager: None };
        plane.write_kubeconfig(
            "admin",
            &json!({
                "client-certificate": dir.join("admin.crt"),
                "client-key": dir.join("admin.key"),
            }),
        )?;
        plane.start_apiserver().await?;
        Ok(plane)
    }

    /// Starts the API server, again on the same port after [`ControlPlane::kill_apiserver`].
    pub async fn start_apiserver(&mut self) -> anyhow::Result<()> {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let arguments = [
            format!("--etcd-servers=unix://{}", file("etcd.sock")),
            format!("--bind-address={}", self.address.ip()),
            format!("--advertise-address={}", self.address.ip()),
            format!("--secure-port={}", self.address.port()),
            "--endpoint-reconciler-type=none".into(),
            format!("--service-cluster-ip-range={SERVICE_RANGE}"),
            format!("--tls-cert-file={}", file("apiserver.crt")),
            format!("--tls-private-key-file={}", file("apiserver.key")),
            format!("--client-ca-file={}", file("ca.crt")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", file("accounts.pub")),
            format!("--service-account-signing-key-file={}", file("accounts.key")),
            "--authorization-mode=RBAC".into(),
            "--profiling=false".into(),
        ];
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.apiserver = Some(start_program(&self.programs.apiserver, "kube-apiserver", &self.dir, &arguments)?);
        let deadline = Instant::now() + START_TIME_MAX;
        while self.kubectl(&["get", "--raw=/readyz"]).await.is_err() {
            let apiserver = self.apiserver.as_mut().expect("it was started above");
            if apiserver.has_ended()? || self.etcd.has_ended()? || Instant::now() > deadline {
                bail!("the API server did not get ready:\n{}{}", self.etcd.log_tail(), apiserver.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Ends the API server the way a crash does; what it stored stays.
    pub async fn kill_apiserver(&mut self) -> anyhow::Result<()> {
        self.apiserver.take().context("the API server is not running")?.kill().await
    }

    /// Sends the API server a signal: one that is stopped takes connections and answers nobody.
    pub fn signal_apiserver(&self, signal: Signal) -> anyhow::Result<()> {
        self.apiserver.as_ref().context("the API server is not running")?.signal(signal);
        Ok(())
    }

    /// Starts the controllers: service accounts, endpoint slices, garbage collection, the end of namespaces.
    pub fn start_controllers(&mut self) -> anyhow::Result<()> {
        let kubeconfig = self.kubeconfig("admin").display().to_string();
        let arguments = [
            format!("--kubeconfig={kubeconfig}"),
            "--secure-port=0".into(),
            "--leader-elect=false".into(),
            format!("--service-account-private-key-file={}", self.dir.join("accounts.key").display()),
            format!("--root-ca-file={}", self.dir.join("ca.crt").display()),
            format!("--service-cluster-ip-range={SERVICE_RANGE}"),
        ];
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let program = &self.programs.controller_manager;
        self.controller_manager = Some(start_program(program, "kube-controller-manager", &self.dir, &arguments)?);
        Ok(())
    }

    /// The kubeconfig of `user`: `admin`, or one made by [`ControlPlane::kubeconfig_of_account`].
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.dir.join(format!("{user}.kubeconfig"))
    }

    /// Makes the kubeconfig of a service account, whose rights are those that were bound to it and no others.
    pub async fn kubeconfig_of_account(&self, namespace: &str, account: &str) -> anyhow::Result<PathBuf> {
        let token = self.kubectl(&["create", "token", account, "-n", namespace, "--duration=1h"]).await?;
        self.write_kubeconfig(account, &json!({ "token": token }))?;
        Ok(self.kubeconfig(account))
    }

    /// Runs the real `kubectl` as administrator and gives its standard output.
    pub async fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.kubectl_with(arguments, "").await
    }

    /// The same with `input` as its standard input.
    pub async fn kubectl_with(&self, arguments: &[&str], input: &str) -> anyhow::Result<String> {
        let mut child = Command::new(&self.programs.kubectl)
            .arg(format!("--kubeconfig={}", self.kubeconfig("admin").display()))
            .arg(format!("--cache-dir={}", self.dir.join("kubectl-cache").display()))
            .args(arguments)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut stdin = child.stdin.take().context("its standard input was asked for")?;
        // A command that reads nothing may have ended by now; its status says how.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        let output = child.wait_with_output().await?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {}", arguments.join(" "), errors.trim());
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Creates or changes the objects of a YAML text.
    pub async fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        self.kubectl_with(&["apply", "--server-side", "--force-conflicts", "-f", "-"], yaml).await.map(drop)
    }

    /// One object as JSON; an error when it is not there.
    pub async fn get(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<Value> {
        let text = self.kubectl(&["get", kind, name, "-n", namespace, "-o", "json"]).await?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Ends all processes.
    pub async fn stop(self) {
        let programs = [self.controller_manager, self.apiserver, Some(self.etcd)];
        for program in programs.into_iter().flatten() {
            // There is nothing in it that anybody needs to be flushed.
            let _ = program.kill().await;
        }
    }

    fn write_kubeconfig(&self, user: &str, credentials: &Value) -> anyhow::Result<()> {
        let server = json!({
            "server": format!("https://{}", self.address),
            "certificate-authority": self.dir.join("ca.crt"),
        });
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": server }],
            "users": [{ "name": user, "user": credentials }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": user } }],
            "current-context": "test",
        });
        Ok(fs::write(self.kubeconfig(user), config.to_string())?)
    }
}

/// Starts a program of others, which ends with the thread that started it: `setpriv` sees to that.
fn start_program(program: &Path, name: &str, dir: &Path, arguments: &[&str]) -> anyhow::Result<Process> {
    let program = program.display().to_string();
    let mut all = vec!["--pdeathsig", "KILL", "--", program.as_str()];
    all.extend_from_slice(arguments);
    Process::start_other(Path::new("setpriv"), name, dir, &all)
}

fn free_port() -> anyhow::Result<u16> {
    // Different processes begin at different places, so that they don't try the same ports in step.
    let seed =
        std::process::id() as usize * 97 + SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_micros() as usize;
    let start = seed % PORTS.len();
    let free = PORTS.cycle().skip(start).take(PORTS.len());
    let mut free = free.filter(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
    free.next().context("no free port on loopback")
}

fn write_certificates(dir: &Path) -> anyhow::Result<()> {
    let authority_key = KeyPair::generate()?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.distinguished_name.push(DnType::CommonName, "test-ca");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    fs::write(dir.join("ca.crt"), authority.self_signed(&authority_key)?.pem())?;
    let issuer = Issuer::new(authority, authority_key);

    let names = ["localhost", "127.0.0.1", "kubernetes.default.svc"].map(str::to_owned);
    let mut server = CertificateParams::new(names)?;
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let mut admin = CertificateParams::new(Vec::new())?;
    admin.distinguished_name.push(DnType::CommonName, "admin");
    admin.distinguished_name.push(DnType::OrganizationName, "system:masters");
    admin.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    for (name, params) in [("apiserver", server), ("admin", admin)] {
        let key = KeyPair::generate()?;
        fs::write(dir.join(format!("{name}.crt")), params.signed_by(&key, &issuer)?.pem())?;
        fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
    }
    let accounts = KeyPair::generate()?;
    fs::write(dir.join("accounts.key"), accounts.serialize_pem())?;
    fs::write(dir.join("accounts.pub"), accounts.public_key_pem())?;
    Ok(())
}
