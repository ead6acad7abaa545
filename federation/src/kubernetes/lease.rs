//! Stands for election by the `Lease` of this cluster's federation, and keeps it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::Instant;
use tombolo_core::id::Namespace;
use tombolo_core::lease::{Election, Read, Record, Standing};
use tombolo_runtime::drain::DrainWatch;

use super::reason;

/// The lease's name, in the namespace where tombolo is installed.
const NAME: &str = "tombolo-federation";

/// How long giving it up may hold up a stop.
const RELEASE_TIME_MAX: Duration = Duration::from_secs(5);

/// Another replica leads now.
#[derive(Debug, thiserror::Error)]
#[error("{holder} has taken the lease, since this process did not renew it in time; a new start stands by")]
pub struct Lost {
    pub holder: String,
}

/// Until when this process may write, as far as it has renewed its lease.
#[derive(Debug, Clone, Default)]
pub struct Leadership(Arc<Mutex<Option<std::time::Instant>>>);

impl Leadership {
    pub fn holds(&self) -> bool {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now().into_std() < until)
    }

    fn set(&self, until: Option<std::time::Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }
}

/// One replica that leads, or stands by to.
pub struct Candidate {
    api: Api<Lease>,
    election: Election,
    /// The lease as it was last read or written: its version is what the next write replaces.
    lease: Option<Lease>,
    leadership: Leadership,
    told: Option<Standing>,
}

impl Candidate {
    pub fn new(client: Client, namespace: &Namespace, identity: String, duration: Duration) -> Self {
        let api = Api::namespaced(client, namespace.as_str());
        let election = Election::new(identity, duration);
        Self { api, election, lease: None, leadership: Leadership::default(), told: None }
    }

    pub fn leadership(&self) -> Leadership {
        self.leadership.clone()
    }

    /// Stands by until this replica leads. `waits` is told whom it waits for.
    pub async fn until_leading(&mut self, waits: impl Fn(&str)) {
        loop {
            match self.step().await {
                Standing::Leading => return,
                Standing::Standby { holder: Some(holder) } if !holder.is_empty() => waits(&holder),
                Standing::Standby { .. } | Standing::Unsure | Standing::Lost { .. } => {}
            }
            self.pause().await;
        }
    }

    /// Renews the lease until another replica has it. When the process drains it is given up, so that the next one need
    /// not wait; then this ends with `None`.
    pub async fn keep(mut self, drain: DrainWatch) -> Option<Lost> {
        loop {
            tokio::select! {
                () = self.pause() => {}
                () = drain.draining() => {
                    self.release().await;
                    return None;
                }
            }
            if let Standing::Lost { holder } = self.step().await {
                return Some(Lost { holder });
            }
        }
    }

    async fn pause(&self) {
        tokio::time::sleep_until(self.election.poll_timeout(Instant::now().into_std()).into()).await;
    }

    /// Asks once, and writes what has to be written.
    async fn step(&mut self) -> Standing {
        let patience = self.election.interval();
        match tokio::time::timeout(patience, self.exchange()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(reason = reason(&error), "the lease can't be read or renewed; trying on"),
            Err(_) => tracing::warn!(?patience, "the API server does not answer about the lease in time; trying on"),
        }
        self.leadership.set(self.election.leads_until());
        let standing = self.election.standing(Instant::now().into_std());
        if self.told.as_ref() != Some(&standing) {
            tracing::info!(?standing, "election of the leader");
            self.told = Some(standing.clone());
        }
        standing
    }

    async fn exchange(&mut self) -> Result<(), kube::Error> {
        self.lease = self.api.get_opt(NAME).await?;
        let read = self.lease.as_ref().and_then(read_of);
        let now = Instant::now().into_std();
        if let Some(record) = self.election.handle_read(read, now, Timestamp::now()) {
            let sent = Instant::now().into_std();
            if self.write(&record).await?
                && let Some(written) = self.lease.as_ref().and_then(read_of)
            {
                self.election.handle_written(written, sent);
            }
        }
        Ok(())
    }

    /// Replaces the lease, unless somebody else has since it was read.
    async fn write(&mut self, record: &Record) -> Result<bool, kube::Error> {
        let lease = lease_of(record, self.lease.as_ref().map(|lease| &lease.metadata));
        let written = match &self.lease {
            Some(_) => self.api.replace(NAME, &PostParams::default(), &lease).await,
            None => self.api.create(&PostParams::default(), &lease).await,
        };
        match written {
            Ok(lease) => {
                self.lease = Some(lease);
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn release(&mut self) {
        self.leadership.set(None);
        let Some(record) = self.election.release() else { return };
        match tokio::time::timeout(RELEASE_TIME_MAX, self.write(&record)).await {
            Ok(Ok(_)) => self.election.handle_released(),
            Ok(Err(error)) => tracing::warn!(reason = reason(&error), "the lease is not given up; it expires"),
            Err(_) => tracing::warn!("the lease is not given up in time; it expires"),
        }
    }
}

fn read_of(lease: &Lease) -> Option<Read> {
    let spec = lease.spec.as_ref()?;
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or_default();
    let time = |time: &Option<MicroTime>| time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let record = Record {
        holder: spec.holder_identity.clone().unwrap_or_default(),
        duration: Duration::from_secs(seconds),
        acquired: time(&spec.acquire_time),
        renewed: time(&spec.renew_time),
        transitions: spec.lease_transitions.and_then(|count| u32::try_from(count).ok()).unwrap_or_default(),
    };
    Some(Read { record, version: lease.metadata.resource_version.clone()? })
}

fn lease_of(record: &Record, metadata: Option<&ObjectMeta>) -> Lease {
    let new = || ObjectMeta { name: Some(NAME.into()), ..ObjectMeta::default() };
    let spec = LeaseSpec {
        holder_identity: Some(record.holder.clone()),
        lease_duration_seconds: i32::try_from(record.duration.as_secs()).ok(),
        acquire_time: Some(MicroTime(record.acquired)),
        renew_time: Some(MicroTime(record.renewed)),
        lease_transitions: i32::try_from(record.transitions).ok(),
        ..LeaseSpec::default()
    };
    Lease { metadata: metadata.cloned().unwrap_or_else(new), spec: Some(spec) }
}
