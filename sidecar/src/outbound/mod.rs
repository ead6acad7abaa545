//! The outbound side: the application's calls, carried to an endpoint of the service that they name.
//!
//! - [`listener`] accepts connections, `detect` tells what they speak where nobody has said it; [`http`] carries requests, [`tunnel`] opaque bytes.
//! - [`services`] knows the services in use, [`route`] picks an endpoint of one port, [`target`] is one of them and
//!   learns from how tries end (decisions in `tombolo_core::{routing, outlier, retry}`).
//! - [`question`] says what would become of a request, `trail` what became of one, `access_log` keeps that.
//! - `hedge` tries beside a slow try, `mirror` sends copies.
//! - [`dial`] makes legs through [`gateways`], [`pool`] shares them, [`warm`] dials opaque ones ahead, [`upkeep`] tends all of it.
//!
//! The names that are accepted, CONNECT included, are `<service>.<namespace>.svc.clusterset.local[:port]`.
//! CONNECT always carries opaque bytes, to an HTTP port too: what runs inside is not ours to read.

mod access_log;
mod body;
mod breaker;
mod crossing;
mod detect;
pub mod dial;
mod explain;
pub mod gateways;
mod hedge;
pub mod http;
pub mod listener;
mod mirror;
pub mod name;
pub mod observe;
mod policy;
pub mod pool;
pub mod question;
pub mod refuse;
pub mod replay;
pub mod route;
pub mod services;
mod state;
mod switch;
pub mod target;
mod trail;
pub mod tunnel;
pub mod upkeep;
pub mod warm;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{Notify, Semaphore};
use tombolo_core::capture::parse_range;
use tombolo_core::retry::Schedule;
use tombolo_core::silence::SilenceConfig;
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::process::Process;
use tombolo_runtime::telemetry::Tracer;
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;

use crate::config::Config;
use access_log::AccessLog;
use dial::LegDialer;
use gateways::Gateways;
use observe::Observed;
use pool::PoolLimits;
use route::Surroundings;
use services::{ServiceLimits, ServiceSource, Services};

/// Everything that the outbound listeners share.
pub struct Outbound {
    pub services: Services,
    pub dialer: Arc<LegDialer>,
    pub gateways: Gateways,
    /// Rung when upkeep has something to look at.
    upkeep: Arc<Notify>,
    schedule: Schedule,
    observed: Observed,
    /// Room for copies of requests.
    copies: Arc<Semaphore>,
    tracer: Tracer,
    access_log: Option<AccessLog>,
    /// Whose requests are answered with the way that they took, if they ask.
    explain_to: Vec<IpNet>,
    pub(crate) drain: DrainWatch,
    pub(crate) connections_max: usize,
    connect_timeout: Duration,
    detection_timeout: Duration,
}

impl Outbound {
    pub fn new(
        config: &Config,
        process: &Process,
        svid: &SvidSource,
        trust: &TrustStore,
        source: Box<dyn ServiceSource>,
    ) -> Arc<Self> {
        Self::with_patience(config, process, svid, trust, source, SilenceConfig::default())
    }

    /// The same with other patience with gateways that fall silent.
    pub fn with_patience(
        config: &Config,
        process: &Process,
        svid: &SvidSource,
        trust: &TrustStore,
        source: Box<dyn ServiceSource>,
        patience: SilenceConfig,
    ) -> Arc<Self> {
        let (limits, retry) = (&config.limits, &config.retry);
        let observed = Observed::new(&process.metrics);
        let gateways = Gateways::default();
        let pool = PoolLimits {
            requests_per_leg: limits.requests_per_leg as usize,
            legs: limits.legs_per_endpoint,
            idle: limits.leg_idle,
        };
        let upkeep = Arc::new(Notify::new());
        let around = Surroundings {
            instance: config.instance.clone(),
            zone: config.zone.clone(),
            svid: svid.clone(),
            gateways: gateways.clone(),
            observed: observed.clone(),
            pool: pool.into(),
            warm_legs: limits.warm_legs,
            outlier: Arc::default(),
            retry_share: retry.budget,
            upkeep: upkeep.clone(),
            base: Instant::now(),
        };
        let service_limits =
            ServiceLimits { services: limits.services, wait: limits.discovery_wait, idle: limits.service_idle };
        let dialer = LegDialer::new(svid, trust, gateways.clone(), limits.connect_timeout, patience, observed.clone());
        Arc::new(Self {
            services: Services::new(source, around, service_limits),
            dialer: Arc::new(dialer),
            gateways,
            upkeep,
            schedule: Schedule { tries: retry.tries, per_try: retry.per_try_timeout, total: retry.deadline },
            observed,
            copies: Arc::new(Semaphore::new(mirror::COPIES_MAX)),
            tracer: process.tracer.clone(),
            access_log: config.access_log.as_ref().and_then(|log| AccessLog::start(log, &process.metrics)),
            // What is no range was refused with the configuration.
            explain_to: config.explain_to.iter().filter_map(|range| parse_range(range).ok()).collect(),
            drain: process.drain.clone(),
            connect_timeout: limits.connect_timeout,
            detection_timeout: limits.detection_timeout,
            connections_max: limits.connections,
        })
    }
}
