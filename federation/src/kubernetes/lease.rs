//! Stands for election by the `Lease` of this cluster's federation, and keeps it.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;
use tombolo_core::id::Namespace;
use tombolo_core::lease::{Election, Read, Record, Standing};
use tombolo_runtime::drain::DrainWatch;

use super::reason;

/// The lease's name, in the namespace where tombolo is installed.
const NAME: &str = "tombolo-federation";

/// Annotations of the lease: where the leader is reached.
const DISCOVERY: &str = "tombolo.dev/discovery";
const LEGS: &str = "tombolo.dev/legs";

/// How long giving it up may hold up a stop.
const RELEASE_TIME_MAX: Duration = Duration::from_secs(5);

/// Another replica leads now.
#[derive(Debug, thiserror::Error)]
#[error("{holder} has taken the lease, since this process did not renew it in time; a new start stands by")]
pub struct Lost {
    pub holder: String,
}

/// Who leads, and where other replicas reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    pub holder: String,
    /// `host:port`
    pub discovery: String,
    pub legs: String,
}

/// Until when this process may write and publish. Clones share it.
#[derive(Debug, Clone)]
pub struct Leadership(Arc<watch::Sender<Term>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Term {
    Not,
    /// As far as the lease has been renewed.
    Until(Instant),
    /// Nobody else could.
    Always,
    /// Another one has, whatever the lease says.
    Ended,
}

impl Leadership {
    /// Of a process that has not been elected yet.
    pub fn none() -> Self {
        Self(Arc::new(watch::Sender::new(Term::Not)))
    }

    /// Of the only process that there is.
    pub fn always() -> Self {
        Self(Arc::new(watch::Sender::new(Term::Always)))
    }

    pub fn holds(&self) -> bool {
        match *self.0.borrow() {
            Term::Not | Term::Ended => false,
            Term::Until(until) => Instant::now() < until,
            Term::Always => true,
        }
    }

    /// Ends it for good: somebody else was found to lead.
    pub fn end(&self) {
        self.0.send_replace(Term::Ended);
    }

    /// Waits until it was ended for good.
    pub async fn ended(&self) {
        // Fails only when the sender is gone, which `self` holds.
        let _ = self.0.subscribe().wait_for(|term| *term == Term::Ended).await;
    }

    /// Waits as long as it holds.
    pub async fn lapses(&self) {
        let mut term = self.0.subscribe();
        while self.holds() {
            let now = *term.borrow_and_update();
            let until = async {
                match now {
                    Term::Until(until) => tokio::time::sleep_until(until).await,
                    Term::Not | Term::Always | Term::Ended => std::future::pending().await,
                }
            };
            tokio::select! {
                () = until => {}
                _ = term.changed() => {}
            }
        }
    }

    fn set(&self, until: Option<std::time::Instant>) {
        let next = until.map_or(Term::Not, |until| Term::Until(until.into()));
        self.0.send_if_modified(|term| *term != Term::Ended && std::mem::replace(term, next) != next);
    }
}

/// Whether this replica leads, and who does otherwise.
#[derive(Debug, Clone)]
pub struct Lead {
    pub leadership: Leadership,
    pub leader: watch::Receiver<Option<Leader>>,
}

impl Lead {
    /// Of the only process that there is, or of one that does nothing before it leads.
    pub fn alone(leadership: Leadership) -> Self {
        Self { leadership, leader: watch::Sender::new(None).subscribe() }
    }

    /// Refuses with the name of the replica that leads.
    pub fn check(&self) -> Result<(), NotLeading> {
        if self.leadership.holds() {
            return Ok(());
        }
        Err(self.leader.borrow().as_ref().map_or(NotLeading::Nobody, |leader| NotLeading::Other(leader.holder.clone())))
    }
}

/// Why a replica changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotLeading {
    #[error("replica {0} leads, and it alone changes anything: run this command there")]
    Other(String),
    #[error("no replica is known to lead at the moment, so that nothing can be changed; see `tombolo status`")]
    Nobody,
}

/// One replica that leads, or stands by to.
pub struct Candidate {
    api: Api<Lease>,
    election: Election,
    /// The lease as it was last read or written: its version is what the next write replaces.
    lease: Option<Lease>,
    leadership: Leadership,
    told: Option<Standing>,
    /// Where others reach this process when it leads.
    own: Option<Leader>,
    leader: watch::Sender<Option<Leader>>,
}

impl Candidate {
    pub fn new(client: Client, namespace: &Namespace, identity: String, duration: Duration) -> Self {
        let api = Api::namespaced(client, namespace.as_str());
        let election = Election::new(identity, duration);
        let (leadership, leader) = (Leadership::none(), watch::Sender::new(None));
        Self { api, election, lease: None, leadership, told: None, own: None, leader }
    }

    /// The same, and others will read in the lease where this process is reached.
    pub fn reached_at(mut self, own: Leader) -> Self {
        self.own = Some(own);
        self
    }

    /// What this replica is called.
    pub fn identity(&self) -> &str {
        self.election.identity()
    }

    /// The replica that leads, as far as it says where it is reached; never this one.
    pub fn leader(&self) -> watch::Receiver<Option<Leader>> {
        self.leader.subscribe()
    }

    /// Until when this replica may write and publish.
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
        let leader = self.lease.as_ref().and_then(leader_of);
        let leader = leader.filter(|leader| self.own.as_ref().is_none_or(|own| own.holder != leader.holder));
        self.leader.send_if_modified(|known| {
            let changed = *known != leader;
            known.clone_from(&leader);
            changed
        });
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
        let mut lease = lease_of(record, self.lease.as_ref().map(|lease| &lease.metadata));
        if let Some(Leader { discovery, legs, .. }) = &self.own {
            let places = [(DISCOVERY, discovery), (LEGS, legs)];
            let places = places.map(|(name, place)| (name.to_owned(), place.clone()));
            lease.metadata.annotations.get_or_insert_default().extend(places);
        }
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

fn leader_of(lease: &Lease) -> Option<Leader> {
    let holder = lease.spec.as_ref()?.holder_identity.clone().filter(|holder| !holder.is_empty())?;
    let annotations = lease.metadata.annotations.as_ref()?;
    let place = |name: &str| annotations.get(name).cloned();
    Some(Leader { holder, discovery: place(DISCOVERY)?, legs: place(LEGS)? })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_term_lasts_as_long_as_it_was_renewed_and_one_that_ended_never_comes_back() {
        let leadership = Leadership::none();
        assert!(!leadership.holds());
        let until = |milliseconds| Some((Instant::now() + Duration::from_millis(milliseconds)).into_std());
        leadership.set(until(200));
        let held = leadership.clone();
        let lapses = tokio::spawn(async move { held.lapses().await });
        let renewed = Instant::now();
        leadership.set(until(400));
        assert!(leadership.holds());
        lapses.await.unwrap();
        assert!(renewed.elapsed() >= Duration::from_millis(400), "it was renewed");
        assert!(!leadership.holds());
        leadership.set(until(60_000));
        assert!(leadership.holds());
        leadership.end();
        leadership.set(until(60_000));
        leadership.ended().await;
        assert!(!leadership.holds() && Leadership::always().holds());
    }
}
