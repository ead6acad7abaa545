//! Runs a federation: alone; as one of several replicas of which one leads and the others stand by; or as one of several
//! that all answer, where what is durable is kept in objects of the API server.

mod objects;
mod parts;
mod place;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tombolo_runtime::admin::Admin;
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::process::Process;
use tombolo_runtime::readiness::Condition;

use crate::config::{Config, KubernetesConfig, SourceConfig, StoreConfig};
use crate::hub::{HubHandle, PeeringEvent};
use crate::kubernetes::{Candidate, Lead, Leader, Leadership, Lost};
use crate::replica::pass_legs_on;
use crate::report;
use crate::store::StoreError;
use parts::{Base, Federation, OpenedSource, Sockets};

/// The name under which a federation announces its addresses, and of its metrics.
pub const ROLE: &str = "federation";
/// How often the state directory is asked for that another replica still has, and objects that nobody has made yet.
const STATE_PAUSE: Duration = Duration::from_millis(200);

/// The hub, as soon as there is one: what the admin port shows.
type Shown = Arc<OnceLock<HubHandle>>;

/// Runs a federation until it has drained. Of several replicas, one that led ends with an error when another one does.
pub async fn run(config: Config, process: Process) -> anyhow::Result<()> {
    let opened = OpenedSource::open(&config.source).await?;
    let shown = Shown::default();
    let admin = start_admin(&config, &process, shown.clone()).await?;
    match (&config.source, config.store) {
        (SourceConfig::Directory(_), _) => {
            let lead = Lead::alone(Leadership::always());
            run_alone(&config, process, opened, lead, &admin, shown).await
        }
        (SourceConfig::Kubernetes(kubernetes), StoreConfig::Directory) => {
            stand_by(&config, kubernetes.clone(), process, opened, &admin, shown).await
        }
        (SourceConfig::Kubernetes(kubernetes), StoreConfig::Kubernetes) => {
            Box::pin(run_replica(&config, kubernetes.clone(), process, opened, &admin, shown)).await
        }
    }
}

/// Leads from the beginning to the end.
async fn run_alone(
    config: &Config,
    process: Process,
    opened: OpenedSource,
    lead: Lead,
    admin: &Admin,
    shown: Shown,
) -> anyhow::Result<()> {
    let base = open_when_free(config, &opened, &process.drain).await?;
    let sockets = Sockets::bind(config).await?;
    let legs = place::reached_at(config, &opened, sockets.legs.local_addr()?).await?;
    let Some((mut federation, events)) = Federation::start(config, process, opened, base, lead, &shown).await? else {
        return Ok(());
    };
    let announced = [("legs", sockets.legs.local_addr()?), ("admin", admin.address())].into();
    federation.lead(events, sockets.legs).await?;
    federation.serve(sockets.discovery, sockets.operator, &legs, &announced).await?;
    federation.until_drained().await
}

/// Does nothing before it leads.
async fn stand_by(
    config: &Config,
    kubernetes: KubernetesConfig,
    process: Process,
    opened: OpenedSource,
    admin: &Admin,
    shown: Shown,
) -> anyhow::Result<()> {
    let leads = process.readiness.condition("leader", "it is not known yet who leads");
    let candidate = candidate(&kubernetes, &opened)?;
    let (leadership, drain) = (candidate.leadership(), process.drain.clone());
    let (elected, mut won) = watch::channel(false);
    let waiting = leads.clone();
    let waits = move |holder: &str| waiting.fails(format!("{holder} leads; this replica stands by"));
    let keeping = tokio::spawn(elect(candidate, elected, drain.clone(), waits));
    let lead = Lead::alone(leadership.clone());
    let running = async {
        if !is_set(&mut won).await {
            return Ok(());
        }
        leads.holds();
        run_alone(config, process, opened, lead, admin, shown).await
    };
    until_lost(Box::pin(running), keeping, &leadership, &drain).await
}

/// Follows whoever leads and answers as it would, and leads when it is its turn.
async fn run_replica(
    config: &Config,
    kubernetes: KubernetesConfig,
    process: Process,
    opened: OpenedSource,
    admin: &Admin,
    shown: Shown,
) -> anyhow::Result<()> {
    let sockets = Sockets::bind(config).await?;
    let places = Places {
        discovery: place::reached_at(config, &opened, sockets.discovery.local_addr()?).await?,
        legs: place::reached_at(config, &opened, sockets.legs.local_addr()?).await?,
        announced: [("legs", sockets.legs.local_addr()?), ("admin", admin.address())].into(),
        answers: process.readiness.condition("replica", "what the other replicas know has not been learnt yet"),
    };
    let candidate = candidate(&kubernetes, &opened)?;
    let own = Leader {
        holder: candidate.identity().to_owned(),
        discovery: places.discovery.clone(),
        legs: places.legs.clone(),
    };
    let name = own.holder.clone();
    let candidate = candidate.reached_at(own);
    let lead = Lead { leadership: candidate.leadership(), leader: candidate.leader() };
    let (leadership, drain) = (lead.leadership.clone(), process.drain.clone());
    let (elected, won) = watch::channel(false);
    let keeping = tokio::spawn(elect(candidate, elected, drain.clone(), |_| ()));
    let running = async {
        let Some(base) = objects::open(config, &kubernetes, &opened, &lead.leadership, &drain).await? else {
            return Ok(());
        };
        let started = Federation::start(config, process, opened, base, lead.clone(), &shown).await?;
        let Some((federation, events)) = started else { return Ok(()) };
        replicate(federation, events, sockets, places, name, lead, won).await
    };
    until_lost(Box::pin(running), keeping, &leadership, &drain).await
}

/// Where others reach this replica.
struct Places {
    discovery: String,
    legs: String,
    announced: BTreeMap<&'static str, SocketAddr>,
    /// Holds when this replica knows what the others know.
    answers: Condition,
}

async fn replicate(
    mut federation: Federation,
    mut events: mpsc::Receiver<PeeringEvent>,
    sockets: Sockets,
    places: Places,
    name: String,
    lead: Lead,
    mut won: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let (synced, mut told) = watch::channel(false);
    let mut follower = federation.follower(name, synced);
    let numbered = tokio::spawn(federation.follow_addresses());
    let Sockets { discovery, operator, legs } = sockets;
    let mut unserved = Some((discovery, operator));
    {
        let following = async { tokio::join!(follower.run(&mut events), pass_legs_on(&legs, lead.leader.clone())) };
        let mut following = std::pin::pin!(following);
        loop {
            tokio::select! {
                won = is_set(&mut won) => if won { break } else { return federation.until_drained().await },
                true = is_set(&mut told), if unserved.is_some() => {
                    let (discovery, operator) = unserved.take().expect("asked just now");
                    federation.serve(discovery, operator, &places.legs, &places.announced).await?;
                    places.answers.holds();
                }
                ended = federation.a_server_ended() => return ended,
                _ = &mut following => return federation.until_drained().await,
            }
        }
    }
    numbered.abort();
    federation.take_over(&mut follower).await?;
    federation.lead(events, legs).await?;
    if let Some((discovery, operator)) = unserved {
        federation.serve(discovery, operator, &places.legs, &places.announced).await?;
        places.answers.holds();
    }
    federation.until_drained().await
}

/// Stands for election until the process drains or somebody else has taken the lead from it.
async fn elect(
    mut candidate: Candidate,
    elected: watch::Sender<bool>,
    drain: DrainWatch,
    waits: impl Fn(&str) + Send,
) -> Option<Lost> {
    tokio::select! {
        () = candidate.until_leading(waits) => {}
        () = drain.draining() => return None,
    }
    elected.send_replace(true);
    candidate.keep(drain).await
}

/// Waits until it is; `false` when nobody is there any more who could set it.
async fn is_set(flag: &mut watch::Receiver<bool>) -> bool {
    flag.wait_for(|set| *set).await.is_ok()
}

/// Runs until it ends by itself, or another replica leads.
async fn until_lost(
    mut running: impl Future<Output = anyhow::Result<()>> + Unpin,
    mut keeping: JoinHandle<Option<Lost>>,
    leadership: &Leadership,
    drain: &DrainWatch,
) -> anyhow::Result<()> {
    let panicked = "the task that keeps the lease panicked";
    tokio::select! {
        () = leadership.ended() => anyhow::bail!(
            "another replica has written the state, or somebody has deleted it: this one leads no more; a new start will"
        ),
        ended = &mut running => {
            if drain.is_draining() {
                // The lease is given up first, or has run out of patience.
                keeping.await.context(panicked)?;
            } else {
                keeping.abort();
            }
            ended
        }
        kept = &mut keeping => match kept.context(panicked)? {
            Some(lost) => Err(lost.into()),
            None => running.await,
        },
    }
}

fn candidate(kubernetes: &KubernetesConfig, opened: &OpenedSource) -> anyhow::Result<Candidate> {
    let OpenedSource::Kubernetes { client, .. } = opened else { anyhow::bail!("there is no API server to elect by") };
    let identity = kubernetes.identity.clone().map_or_else(place::host_name, Ok)?;
    Ok(Candidate::new(client.clone(), &kubernetes.namespace, identity, kubernetes.lease_duration))
}

/// A replica that has just taken the lease waits for the state directory until the last leader has ended.
async fn open_when_free(config: &Config, source: &OpenedSource, drain: &DrainWatch) -> anyhow::Result<Base> {
    loop {
        let opened = parts::open_directory(config);
        let in_use = opened
            .as_ref()
            .is_err_and(|error| matches!(error.downcast_ref::<StoreError>(), Some(StoreError::InUse { .. })));
        match source {
            OpenedSource::Kubernetes { .. } if in_use && !drain.is_draining() => tokio::time::sleep(STATE_PAUSE).await,
            OpenedSource::Kubernetes { .. } | OpenedSource::Directory(_) => return opened,
        }
    }
}

async fn start_admin(config: &Config, process: &Process, shown: Shown) -> anyhow::Result<Admin> {
    let state = Arc::new(move || match shown.get() {
        Some(hub) => report::state(&hub.view()),
        None => serde_json::json!({ "leads": false }),
    });
    let redacted = serde_json::to_value(config)?;
    let admin = Admin::start(config.admin, process.metrics.clone(), process.readiness.clone(), redacted, state).await;
    admin.with_context(|| format!("can't listen on {} (admin)", config.admin))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::path::Path;
    use tombolo_runtime::config::parse;
    use tombolo_runtime::drain::{DrainOutcome, drain};
    use tombolo_runtime::metrics::Metrics;
    use tombolo_runtime::process;
    use tombolo_runtime::readiness::Readiness;
    use tombolo_runtime::telemetry::Tracer;

    use crate::testing::{DEADLINE, until};

    const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {tombolo.dev/service-accounts: web}}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: web, namespace: shop}
";

    async fn get(address: SocketAddr, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_federation_starts_shows_its_state_and_drains() {
        let folder = tempfile::tempdir().unwrap();
        let (state, source) = (folder.path().join("state"), folder.path().join("source"));
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("web.yaml"), SERVICE).unwrap();
        let text = format!(
            "cluster: east\nstate: {}\nsource: {{directory: {}}}\n\
             discovery: 127.0.0.1:0\nlegs: 127.0.0.1:0\nadmin: 127.0.0.1:0\n",
            state.display(),
            source.display()
        );
        let config: Config = parse(&text, Path::new("federation.yaml")).unwrap();
        let (trigger, watch) = drain();
        let process = Process {
            name: ROLE.into(),
            readiness: Readiness::new(watch.clone()),
            drain: watch,
            metrics: Metrics::new(ROLE),
            tracer: Tracer::Off,
        };
        let running = tokio::spawn(run(config, process));
        let announced = || process::announced(&state, ROLE).unwrap();
        until("it listens", || announced().is_some()).await;
        let admin = announced().unwrap().addresses["admin"];
        assert!(get(admin, "/readyz").await.contains("200 OK"));
        let shown = get(admin, "/state").await;
        assert!(shown.contains("shop/web") && !shown.contains("PRIVATE"), "{shown}");
        assert!(get(admin, "/metrics").await.contains("tombolo_services 1"));
        assert!(state.join("ca.pem").exists() && state.join("operator.sock").exists());

        assert_eq!(trigger.drain(DEADLINE).await, DrainOutcome::Clean);
        tokio::time::timeout(DEADLINE, running).await.unwrap().unwrap().unwrap();
        assert!(announced().is_none() && !state.join("operator.sock").exists());
    }
}
